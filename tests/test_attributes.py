"""Ratings of several attributes: one output each, missing ones masked, judged attribute by attribute."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from driving import done, here
from rayward import metrics
from rayward.evaluation import evaluate
from rayward.records import Example
from tiny import example

NAMES = ("helpful", "short")


def rated(n: int) -> Example:
    """Two answers; the second is not rated on `short` in every third example."""
    rng = random.Random(n)
    targets = tuple(float(rng.randint(0, 4)) for _ in range(4))
    counts = (1, 1, 1, 0 if n % 3 == 0 else 1)
    return example("a", "bb", id=f"e{n}", targets=targets, counts=counts, attributes=NAMES)


def test_every_attribute_is_judged_by_itself_on_what_was_rated() -> None:
    examples = [rated(n) for n in range(40)]
    rng = np.random.default_rng(0)
    scores = [tuple(t + rng.normal() for t in e.targets) for e in examples]
    report, rows = evaluate(examples, lambda _: list(scores), "ratings", "m")
    assert rows.num_rows == 40
    for a, name in enumerate(NAMES):
        flat = [(s[k], e.targets[k]) for e, s in zip(examples, scores, strict=True) for k in (a, a + 2) if e.counts[k]]
        score, target = map(np.array, zip(*flat, strict=True))
        said = report.numbers["attributes"][name]
        assert said["ratings"] == len(flat)
        assert "segments" not in said  # a rating of 1 is no certainty
        assert said["pearson"] == pytest.approx(np.corrcoef(score, target)[0, 1])
        assert said["rmse"] == pytest.approx(np.sqrt(np.mean((score - target) ** 2)))
        pairs = [
            (e.targets[a] > e.targets[a + 2]) == (s[a] > s[a + 2])
            for e, s in zip(examples, scores, strict=True)
            if e.counts[a] and e.counts[a + 2] and e.targets[a] != e.targets[a + 2]
        ]
        assert said["order"]["comparisons"] == len(pairs)
        assert said["order"]["accuracy"]["value"] == pytest.approx(np.mean(pairs))
        assert report.headline[f"{name}_spearman"] == said["spearman"]


@given(st.lists(st.integers(-3, 3), min_size=2, max_size=30), st.randoms())
def test_spearman_is_pearson_of_mean_ranks(values: list[int], rng: random.Random) -> None:
    target = np.array(values, float)
    score = np.array(rng.sample(values, len(values)), float)
    ranks = [np.array([(sum(w < v for w in x) + sum(w <= v for w in x) + 1) / 2 for v in x]) for x in (score, target)]
    said = metrics.rating_agreement(score, target)["spearman"]
    if not np.ptp(target):
        assert np.isnan(said)
    else:
        assert said == pytest.approx(np.corrcoef(*ranks)[0, 1], abs=1e-9)


def test_a_model_of_two_attributes_from_ratings_to_a_report(store: Path, tmp_path: Path) -> None:
    rng = random.Random(0)
    words = ["red", "blue", "green", "cat", "dog", "sun", "moon", "tree"]
    rows = []
    for n in range(600):
        said = [rng.choice(words) for _ in range(rng.randint(2, 9))]
        rewards = {"length": len(said) / 3, **({"cats": float(said.count("cat"))} if rng.random() < 0.7 else {})}
        rows.append(json.dumps({"prompt": f"say {n // 2}", "answer": " ".join(said), "rewards": rewards}))
    (tmp_path / "ratings.jsonl").write_text("\n".join(rows))
    done(here("import_rollouts", "--source", tmp_path / "ratings.jsonl", "--output", tmp_path / "rollouts"))
    done(here("label_attributes", "--source", tmp_path / "rollouts", "--output", tmp_path / "examples"))
    done(here("split_examples", "--source", tmp_path / "examples", "--output", tmp_path / "split"))
    fast = ["--set", "train.lr=5e-3", "--set", "train.epochs=8", "--set", "net.width=32"]
    done(here("train_reward_model", "--examples", tmp_path / "split", "--output", tmp_path / "model", *fast))
    config = json.loads((tmp_path / "model" / "model" / "config.json").read_text())
    assert config["id2label"] == {"0": "cats", "1": "length"}
    assert config["rayward"]["head"]["kind"] == "attributes"
    folder = tmp_path / "model" / "model"
    done(here("evaluate_model", "--model", folder, "--examples", tmp_path / "split" / "test", "--output", tmp_path / "report"))
    numbers = json.loads((tmp_path / "report" / "report.json").read_text())["attributes"]
    assert min(numbers[name]["spearman"] for name in ("cats", "length")) > 0.7
    done(here("score_rollouts", "--model", folder, "--source", tmp_path / "rollouts", "--output", tmp_path / "scored"))


def test_attributes_that_a_model_does_not_know_are_named(store: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"p{n}", "answer": "a b"[: 1 + n % 3], "rewards": {"x": n % 3, "y": n % 2}} for n in range(60)]
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, rows)))
    done(here("import_rollouts", "--source", tmp_path / "r.jsonl", "--output", tmp_path / "rollouts"))
    for output, names in (("one", "x"), ("both", "x,y")):
        done(here("label_attributes", "--source", tmp_path / "rollouts", "--output", tmp_path / output, "--attributes", names))
    done(here("train_reward_model", "--examples", tmp_path / "one", "--output", tmp_path / "m", "--set", "net.width=16"))
    said = here("evaluate_model", "--model", tmp_path / "m" / "model", "--examples", tmp_path / "both", "--output", tmp_path / "report")
    said.mistake("targets called x, y, and the model gives one score", "net.head=attributes")
