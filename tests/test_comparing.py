"""Versions side by side: what differs is shown and nothing else, differences are paired where they can be, and nobody is told more."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from driving import Toy, done, here
from driving import toy as make_toy
from rayward import registry
from rayward.registry import comparing
from rayward.storage import open_dataset


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return make_toy(tmp_path_factory.getbasetemp())


@pytest.fixture
def own(toy: Toy, store: Path) -> Toy:
    """A copy of the session's store, with a second version of toy-pairs: other weights, another learning rate, the same labels."""
    shutil.copytree(toy.store, store)
    first = registry.find("toy-pairs/1")
    labels = {name: tag for name, tag in first["tags"].items() if name != "code_version"}
    with registry.run("train_reward_model", {**first["params"], "train.lr": "0.5", "train.new": "1"}) as run:
        assert registry.register(run, toy.steps_model, "toy-pairs", {**labels, "best_accuracy": 0.25}) == "2"
    return toy


def bootstrapped(prompts: list[str], gap: np.ndarray, weight: np.ndarray) -> list[float]:
    """The 95 % interval of sum(gap) / sum(weight), prompts drawn one by one."""
    rows = {name: [n for n, p in enumerate(prompts) if p == name] for name in prompts}
    rng, names, values = np.random.default_rng(7), list(rows), []
    for _ in range(1500):
        drawn = [n for name in rng.choice(names, len(names)) for n in rows[name]]
        values.append(gap[drawn].sum() / weight[drawn].sum())
    return [float(np.quantile(values, q)) for q in (0.025, 0.975)]


def test_what_differs_is_shown_and_differences_are_paired(own: Toy, tmp_path: Path) -> None:
    for version in "12":
        words = ("--examples", own.pairs, "--output", tmp_path / version)
        done(here("evaluate_model", "--model", f"models:/toy-pairs/{version}", *words))
    found = registry.compare(["toy-pairs", "models:/toy-pairs/2"])
    assert [(v["name"], v["version"], v["aliases"]) for v in found["versions"]] == [
        ("toy-pairs", "1", ["champion"]),
        ("toy-pairs", "2", []),
    ]
    assert found["settings"] == [{"name": "train.lr", "values": ["0.002", "0.5"]}, {"name": "train.new", "values": [None, "1"]}]
    digest = open_dataset(own.pairs).manifest.digest
    assert found["labels"] == {"digests": [digest] * 2, "differ": []}
    assert found["validation"]["same"]
    assert {f["name"]: f["values"][1] for f in found["validation"]["figures"]}["accuracy"] == 0.25

    [report] = found["reports"]
    assert report["on"] == f"pairs {digest[:8]}"
    numbers = [json.loads((tmp_path / v / "report.json").read_text(encoding="utf-8")) for v in "12"]
    assert report["paired"] == [numbers[0]["prompts"]]
    figures = {f["name"]: f for f in report["figures"]}
    assert not [name for name in figures if name.endswith(("_low", "_high"))]
    accuracy = figures["accuracy"]
    told = [n["order"]["accuracy"] for n in numbers]
    assert accuracy["values"] == pytest.approx([t["value"] for t in told], abs=5e-5)
    assert accuracy["intervals"] == [pytest.approx([t["low"], t["high"]], abs=5e-5) for t in told]
    [difference] = accuracy["differences"]
    assert difference["value"] == pytest.approx(told[1]["value"] - told[0]["value"])
    tables = [pq.read_table(tmp_path / v / "scores.parquet") for v in "12"]
    gap = tables[1]["accuracy.total"].to_numpy() - tables[0]["accuracy.total"].to_numpy()
    assert gap.any()
    expected = bootstrapped(tables[0]["prompt_id"].to_pylist(), gap, tables[0]["accuracy.weight"].to_numpy())
    assert difference["interval"] == pytest.approx(expected, abs=0.03)
    assert figures["ece"]["differences"][0]["interval"] is None

    said = done(here("rayward", "models", "compare", "toy-pairs", "toy-pairs/2")).out
    for words in (
        f"B - A: paired over {numbers[0]['prompts']:,} prompts",
        "labels: the same examples",
        "train.lr",
        f"{difference['value']:+.3f} [",
    ):
        assert words in said
    assert "validation_share" not in said
    assert "significant" not in said
    assert json.loads(done(here("rayward", "models", "compare", "toy-pairs", "toy-pairs/2", "--json")).out) == found


def test_what_cannot_be_compared_says_so_with_the_way_out(own: Toy) -> None:
    here("rayward", "models", "compare", "toy-pairs").mistake("alone is nothing to compare", "NAME/1 NAME/2")
    here("rayward", "models", "compare", "toy-pairs", "toy-pears").mistake("no model toy-pears", "did you mean toy-pairs?")
    here("rayward", "models", "compare", "toy-pairs", "toy-pairs/9").mistake("has no version 9", "it has 2, 1")
    here("rayward", "models", "compare", "toy-pairs", "toy-pairs@champion").mistake("are the same: toy-pairs/1")
    none = done(here("rayward", "models", "compare", "toy-pairs/1", "toy-steps")).out
    assert "(tests of A: none; B: none)" in none
    assert "rayward run evaluate_model --model models:/toy-steps/1" in none
    assert "labels: not the same examples" in none
    assert "not the same examples, so no comparison" in none
    registry.tag("toy-pairs", "1", {"toy_pairs accuracy": "0.8000", "toy_pairs run": "0" * 32})
    registry.tag("toy-pairs", "2", {"toy_steps accuracy": "0.7000", "toy_steps run": "1" * 32})
    assert "(tests of A: toy_pairs; B: toy_steps)" in done(here("rayward", "models", "compare", "toy-pairs/1", "toy-pairs/2")).out


@pytest.mark.parametrize(("low", "word"), [(0.6, "apart"), (0.3, "overlap")])
def test_without_the_scores_of_examples_intervals_are_laid_side_by_side(own: Toy, low: float, word: str) -> None:
    kept = {"1": (0.4, 0.3, 0.5), "2": (0.7, low, 0.8)}
    for version, values in kept.items():
        figures = {f"mine accuracy{end}": f"{value:.4f}" for end, value in zip(("", "_low", "_high"), values, strict=True)}
        registry.tag("toy-pairs", version, {**figures, "mine run": version * 32})
    said = done(here("rayward", "models", "compare", "toy-pairs/1", "toy-pairs/2")).out
    assert f"+0.300 {word}" in said
    assert "B - A: not paired: a report keeps no scores of single examples: evaluate the model again" in said
    assert "is no test" in said


def row(**tags: str) -> dict[str, Any]:
    return {"tags": tags}


def test_a_test_is_known_by_its_digest_or_its_name() -> None:
    tests = comparing._tests(
        row(
            **{"pairs run": "a", "pairs accuracy": "0.5000", "pairs 0123abcd run": "b", "pairs 0123abcd accuracy": "0.7500"},
            **{"pairs 0123abcd nll": "-1.0000", "pairs note": "looks well", "data_digest": "x"},
        )
    )
    assert tests == {"pairs": ("pairs", {"accuracy": 0.5}), "0123abcd": ("pairs 0123abcd", {"accuracy": 0.75, "nll": -1.0})}
    assert set(comparing._tests(row(**{"moved 0123abcd run": "c"}))) == {"0123abcd"}


def table(ids: str, target: float = 1.0, right: float = 1.0) -> pa.Table:
    columns = {"id": list(ids), "prompt_id": [f"p{n}" for n in ids], "targets": [[target, 0.0]] * len(ids)}
    return pa.table({**columns, "accuracy.total": [right] * len(ids), "accuracy.weight": [1.0] * len(ids)})


@pytest.mark.parametrize(
    ("first", "other", "found"),
    [
        (table("abc"), table("abc"), "abc"),
        (table("abc"), table("cab"), "abc"),  # in another order
        (table("abcd"), table("bdx"), "bd"),  # one was too long for either
        (table("abc"), None, "evaluate the model again"),
        (table("aba"), table("aba"), "two examples have the same id"),
        (table("abc"), table("xyz"), "not on the same examples"),
        (table("abc"), table("abc", target=2.0), "not on the same examples"),
    ],
)
def test_only_the_same_examples_are_paired(first: pa.Table, other: pa.Table | None, found: str) -> None:
    pair = comparing._pair(first, other)
    if isinstance(pair, str):
        assert found in pair
        return
    assert [t["id"].to_pylist() for t in pair[:2]] == [list(found)] * 2
    assert pair[2] == [f"p{n}" for n in found]
    assert comparing._difference("accuracy", *pair) == (0.0, [0.0, 0.0])
    assert comparing._difference("ece", *pair) is None
    nothing = pair[0].set_column(4, "accuracy.weight", pa.array([0.0] * len(found)))
    assert comparing._difference("accuracy", nothing, nothing, pair[2]) is None
