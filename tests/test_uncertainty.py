"""Uncertainty: the measures by their definitions, members that are the models they say, a selection that adds up and can be labelled."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import nn

from driving import Toy, done, here, toy
from rayward import uncertainty
from rayward.dataflow import Engine, Recipe
from rayward.errors import DataError, SettingsError
from rayward.records import Message, Rollout, prompt_id, rollouts_of
from rayward.reward_model import ModelSettings, save_model, tiny_model
from rayward.sampling import SampleSettings, sample
from rayward.scoring import Scorer, dropping
from rayward.storage import Dataset, open_dataset
from rayward.uncertainty import MEASURES, Members, SelectSettings, choose, comparisons, measure_prompts, select
from tiny import question, toy_examples, toy_rollouts

torch.set_num_threads(1)

LOGITS = arrays(float, st.tuples(st.integers(1, 5), st.integers(1, 4)), elements=st.floats(-30, 30))


# ---------------------------------------------------------------------------------------------------------------- measures


def information(logits: list[float]) -> float:
    """I(y; m) of a fair choice of member m and its verdict y, from the joint distribution: sum of p(y, m) ln p(y, m) / p(y) p(m)."""
    members = len(logits)
    chance = [1 / (1 + math.exp(-x)) for x in logits]
    total = 0.0
    for right in (True, False):
        joint = [(p if right else 1 - p) / members for p in chance]
        total += sum(j * math.log(j * members / sum(joint)) for j in joint if j > 0)
    return total


@given(LOGITS)
def test_mutual_information_is_that_of_the_joint_distribution(logit_MK: np.ndarray) -> None:
    found = MEASURES["mutual_information"](logit_MK)
    np.testing.assert_allclose(found, [information(column) for column in logit_MK.T.tolist()], atol=1e-9)
    assert (found <= math.log(2) + 1e-12).all()


@pytest.mark.parametrize(
    ("measure", "logit_MK", "expected"),
    [
        ("mutual_information", [[50.0, 0.0, 3.0], [-50.0, 0.0, 3.0]], [math.log(2), 0.0, 0.0]),
        ("entropy", [[50.0, 0.0, 50.0], [-50.0, 0.0, 50.0]], [math.log(2), math.log(2), 0.0]),
        ("deviation", [[1.0, 5.0], [3.0, 5.0]], [math.sqrt(2), 0.0]),
        ("probability_deviation", [[1e4, 0.0], [-1e4, 0.0]], [math.sqrt(0.5), 0.0]),
        ("deviation", [[1.0, 5.0]], [0.0, 0.0]),
    ],
)
def test_measures_of_what_is_known(measure: str, logit_MK: list[list[float]], expected: list[float]) -> None:
    np.testing.assert_allclose(MEASURES[measure](np.array(logit_MK)), expected, atol=1e-9)


@pytest.mark.parametrize("measure", MEASURES)
@given(LOGITS)
def test_members_have_no_order_and_sides_no_names(measure: str, logit_MK: np.ndarray) -> None:
    found = MEASURES[measure](logit_MK)
    np.testing.assert_allclose(MEASURES[measure](logit_MK[::-1]), found, atol=1e-9)
    np.testing.assert_allclose(MEASURES[measure](-logit_MK), found, atol=1e-9)


@given(arrays(float, (3, 4), elements=st.floats(-5, 5)), arrays(float, (3, 1), elements=st.floats(-100, 100)))
def test_what_every_model_adds_to_a_prompt_says_nothing(score_MA: np.ndarray, shift_M1: np.ndarray) -> None:
    for best_two in (False, True):
        a, b = comparisons(score_MA, best_two), comparisons(score_MA - score_MA.mean(1, keepdims=True), best_two)
        assert a.shape == (3, 1 if best_two else 6)
        np.testing.assert_allclose(comparisons(score_MA + shift_M1, False), comparisons(score_MA, False), atol=1e-9)
        if not best_two:
            np.testing.assert_allclose(a, b, atol=1e-9)


# ----------------------------------------------------------------------------------------------------------------- members


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Three random models of pairs and two of steps, with temperatures of their own."""
    base = tmp_path_factory.mktemp("models")
    examples = toy_examples("pairs", 20)
    made: dict[str, list[str]] = {"pairs": [], "steps": []}
    for kind, seed in (("pairs", 0), ("pairs", 1), ("pairs", 2), ("steps", 3), ("steps", 4)):
        loaded = tiny_model(examples, ModelSettings(width=32), 128, seed)
        with torch.no_grad():
            torch.manual_seed(seed)
            for weight in loaded.model.parameters():
                weight += 0.3 * torch.randn_like(weight)
        objective = {"pairs": "bradley_terry", "steps": "binary_cross_entropy"}[kind]
        notes = {"labeler": kind, "objective": objective, "render": {"max_length": 128}, "temperature": 1.0 + seed / 2}
        save_model(loaded.model, loaded.tokenizer, base / str(seed), notes)
        made[kind].append(str(base / str(seed)))
    return made


def pool(problems: int = 5) -> list[Rollout]:
    return [r for of in toy_rollouts(problems, answers=4) for r in of]


def test_uncertainty_of_pairs_by_hand(models: dict[str, list[str]]) -> None:
    folders = tuple(models["pairs"])
    measured = measure_prompts(pool(), Members(folders, SelectSettings()))
    scores = [
        {r.id: s[0] / float(t) for r, s in zip(pool(), Scorer.load(f).score_rollouts(pool()), strict=True)}
        for f, t in zip(folders, (1, 1.5, 2), strict=True)
    ]
    assert measured.left_out == {}
    assert measured.prompts["prompt_id"].to_pylist() == [prompt_id(p) for p in dict.fromkeys(r.prompt for r in pool())]
    for row in measured.prompts.to_pylist():
        own = {r.text: r.id for r in reversed(pool()) if prompt_id(r.prompt) == row["prompt_id"]}
        by_pair = [information([of[a] - of[b] for of in scores]) for a, b in itertools.combinations(own.values(), 2)]
        assert row["answers"] == len(own)
        assert row["uncertainty"] == pytest.approx(np.mean(by_pair), abs=1e-6)


def test_uncertainty_of_steps_is_that_of_every_step(models: dict[str, list[str]]) -> None:
    folders = tuple(models["steps"])
    rollouts = pool(2)[::4]
    measured = measure_prompts(rollouts, Members(folders, SelectSettings(measure="probability_deviation")))
    scored: Any = [Scorer.load(f).score_rollouts(rollouts) for f in folders]
    for row, one, other in zip(measured.prompts.to_pylist(), *scored, strict=True):
        chances = [[1 / (1 + math.exp(-s / t)) for s in of] for of, t in ((one, 2.5), (other, 3.0))]
        expected = np.mean([abs(a - b) / math.sqrt(2) for a, b in zip(*chances, strict=True)])
        assert row["uncertainty"] == pytest.approx(expected, abs=1e-6)


def test_one_model_alone_is_undecided_between_its_best_two(models: dict[str, list[str]]) -> None:
    measured = measure_prompts(pool(), Members((models["pairs"][1],), SelectSettings()))
    scorer = Scorer.load(models["pairs"][1])
    for row in measured.prompts.to_pylist():
        own = [r for r in pool() if prompt_id(r.prompt) == row["prompt_id"]]
        scores: Any = scorer.score_rollouts(own)
        best, second = sorted({r.text: s[0] for r, s in zip(own, scores, strict=True)}.values(), reverse=True)[:2]
        p = 1 / (1 + math.exp(-(best - second) / 1.5))
        assert row["uncertainty"] == pytest.approx(-p * math.log(p) - (1 - p) * math.log(1 - p), abs=1e-6)


def test_members_of_different_kinds_are_refused(models: dict[str, list[str]]) -> None:
    with pytest.raises(SettingsError, match="trained on steps with binary_cross_entropy"):
        measure_prompts(pool(), Members((models["pairs"][0], models["steps"][0]), SelectSettings()))


@pytest.mark.parametrize("measure", ["mutual_information", "deviation", "probability_deviation"])
def test_a_measure_of_disagreement_needs_several(measure: Any) -> None:
    settings = SelectSettings(measure=measure)
    with pytest.raises(SettingsError, match="there is one"):
        settings.chosen_measure(1)
    assert settings.chosen_measure(2) == replace(settings, dropout=0.1).chosen_measure(1) == measure


def test_an_answer_alone_or_too_long_has_no_part(models: dict[str, list[str]]) -> None:
    rollouts = pool(3)
    alone = Rollout(id="alone", prompt=question("another"), steps=("x",))
    long = replace(rollouts[0], id="long", steps=(rollouts[0].text * 60,))
    twice = [Rollout(id=f"twice {n}", prompt=question("the same"), steps=("y",)) for n in range(2)]
    measured = measure_prompts([long, *rollouts, alone, *twice], Members(tuple(models["pairs"]), SelectSettings()))
    assert measured.prompts.num_rows == 3
    assert {n: why.partition(":")[0] for n, why in measured.left_out.items()} == {0: "too long", 13: "alone", 14: "alone", 15: "alone"}
    plain = measure_prompts(rollouts, Members(tuple(models["pairs"]), SelectSettings()))
    np.testing.assert_allclose(measured.prompts["uncertainty"], plain.prompts["uncertainty"], atol=1e-6)


# ----------------------------------------------------------------------------------------------------------------- dropout


def test_dropout_zeroes_a_share_of_the_inputs_and_keeps_their_mean() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(20_000, 1, bias=False)
    nn.init.ones_(layer.weight)
    seen: list[torch.Tensor] = []
    with torch.inference_mode(), dropping(layer, 0.2, seed=1):
        layer.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
        layer.eval()(torch.ones(1, 20_000))
    assert set(seen[0].unique().tolist()) == {0.0, 1.25}
    assert float((seen[0] == 0).float().mean()) == pytest.approx(0.2, abs=0.01)


def test_a_draw_is_repeated_by_its_seed_and_leaves_nothing(models: dict[str, list[str]]) -> None:
    scorer = Scorer.load(models["pairs"][0])
    before = scorer.score_rollouts(pool())
    random = torch.random.get_rng_state()
    drawn = []
    for seed in (1, 1, 2):
        with dropping(scorer.model, 0.1, seed):
            drawn.append(scorer.score_rollouts(pool()))
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]
    assert drawn[0] != before
    assert scorer.score_rollouts(pool()) == before
    assert torch.equal(torch.random.get_rng_state(), random)


def test_passes_of_dropout_are_members(models: dict[str, list[str]]) -> None:
    few, many = (measure_prompts(pool(), Members((models["pairs"][0],), SelectSettings(dropout=rate, passes=6))) for rate in (0.01, 0.3))
    again = measure_prompts(pool(), Members((models["pairs"][0],), SelectSettings(dropout=0.3, passes=6)))
    assert again.prompts.equals(many.prompts)
    assert (few.prompts["uncertainty"].to_numpy() < many.prompts["uncertainty"].to_numpy()).all()
    assert (few.prompts["uncertainty"].to_numpy() > 0).all()


# ---------------------------------------------------------------------------------------------------------------- choosing


def prompts(texts: list[str], values: list[float]) -> pa.Table:
    ids = [prompt_id((Message("user", text),)) for text in texts]
    return pa.table({"prompt_id": ids, "text": texts, "answers": [2] * len(ids), "uncertainty": values})


def unlike(count: int) -> list[str]:
    return [f"question {n} about {' '.join(f'thing{n}x{k}' for k in range(8))}" for n in range(count)]


def picked(table: pa.Table, count: int, how: str, **settings: Any) -> set[int]:
    made = choose(table, count, SelectSettings(**settings))
    return {n for n, name in enumerate(table["prompt_id"].to_pylist()) if made[name].how == how}


def test_the_most_uncertain_and_some_at_random() -> None:
    table = prompts(unlike(200), [float(n) for n in range(200)])
    assert picked(table, 20, "uncertain", random=0) == set(range(180, 200))
    drawn = picked(table, 20, "random", random=0.5)
    assert len(drawn) == 10
    assert picked(table, 20, "uncertain", random=0.5) == set(sorted(set(range(200)) - drawn)[-10:])
    other = prompts(unlike(200), [float(-n) for n in range(200)])
    assert picked(other, 20, "random", random=0.5) == drawn  # whatever the models say
    assert picked(table, 20, "random", random=0.5, seed=1) != drawn
    assert drawn < picked(table, 40, "random", random=0.5)


def test_the_random_share_is_even_over_the_pool() -> None:
    table = prompts(unlike(400), [float(n) for n in range(400)])
    drawn = [n for seed in range(20) for n in picked(table, 40, "random", random=1, seed=seed, distinct=False)]
    assert np.mean(drawn) == pytest.approx(199.5, abs=4 * 115.5 / math.sqrt(len(drawn)))


def test_of_near_duplicates_one_is_chosen() -> None:
    words = " ".join(f"word{n}" for n in range(40))
    texts = [words, words + " more", words + " less", *unlike(6)]
    table = prompts(texts, [9.0, 10.0, 8.0, *range(6)])
    assert picked(table, 3, "uncertain", random=0) == {1, 7, 8}
    assert picked(table, 3, "near-duplicate", random=0) == {0, 2}
    assert picked(table, 3, "uncertain", random=0, distinct=False) == {0, 1, 2}
    assert picked(table, 9, "uncertain", random=0) == {1, 3, 4, 5, 6, 7, 8}
    taken = picked(table, 9, "random", random=1)
    assert len(taken & {0, 1, 2}) == 1


def test_ranks_are_of_the_whole_pool() -> None:
    table = prompts(unlike(5), [1.0, 5.0, 3.0, 4.0, 2.0])
    made = choose(table, 1, SelectSettings(random=0))
    assert [made[name].rank for name in table["prompt_id"].to_pylist()] == [5, 1, 3, 2, 4]


# ------------------------------------------------------------------------------------------------------------- the dataset


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("pool") / "rollouts"
    return sample(Recipe("sample_rollouts", str(folder), SampleSettings(), [], "local"), "toy:60", SampleSettings(answers=4), parts=4)


def selected(source: Dataset, folders: list[str], output: Path, engine: Engine = "local", **settings: Any) -> Dataset:
    chosen = SelectSettings(**settings)
    return select(Recipe("select_uncertain", str(output), chosen, [source.lineage()], engine), source, folders, 10, chosen)


def test_a_selection_adds_up_and_says_why(source: Dataset, models: dict[str, list[str]], tmp_path: Path) -> None:
    made = selected(source, models["pairs"], tmp_path / "next", random=0.2)
    manifest, table = made.manifest, made.table()
    assert manifest.rows_in == source.manifest.out == manifest.used + sum(manifest.rejected.values())
    assert manifest.out == manifest.used == table.num_rows
    whole = {r.id: r for r in rollouts_of(source.table())}
    ranked = {row["prompt_id"]: row for row in pq.read_table(made.path / "uncertainty.parquet").to_pylist()}
    kept = rollouts_of(table)
    for rollout in kept:
        row = ranked[prompt_id(rollout.prompt)]
        said = dict(rollout.provenance)
        assert said.pop("selected") == row["selected"] in ("uncertain", "random")
        assert said.pop("uncertainty") == f"mutual_information {row['uncertainty']:.6g}"
        assert said.pop("uncertainty_rank") == f"{row['rank']} of {len(ranked)}"
        assert replace(rollout, provenance=said) == whole[rollout.id]
    chosen = {name for name, row in ranked.items() if row["selected"] in ("uncertain", "random")}
    assert len(chosen) == 10
    assert {prompt_id(r.prompt) for r in kept} == chosen
    assert len(kept) == sum(prompt_id(r.prompt) in chosen for r in whole.values())
    assert sorted([*(r.id for r in kept), *made.rejects()["row"].to_pylist()]) == sorted(whole)
    assert [row["uncertainty"] for row in ranked.values()] == sorted((r["uncertainty"] for r in ranked.values()), reverse=True)


@pytest.mark.slow
def test_ray_chooses_the_same(ray_cluster: Any, source: Dataset, models: dict[str, list[str]], tmp_path: Path) -> None:
    made = [selected(source, models["pairs"], tmp_path / engine, engine) for engine in ("local", "ray")]
    assert made[0].manifest.digest == made[1].manifest.digest
    assert made[0].manifest.rejected == made[1].manifest.rejected


def test_a_run_that_was_stopped_measures_nothing_twice(
    source: Dataset, models: dict[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = selected(source, models["pairs"], tmp_path / "whole")
    measured: list[int] = []
    really: Callable[..., Any] = measure_prompts

    def counted(rollouts: list[Rollout], members: Members) -> Any:
        if len(measured) == 2:
            measured.append(-1)
            raise KeyboardInterrupt
        measured.append(len(rollouts))
        return really(rollouts, members)

    monkeypatch.setattr(uncertainty, "measure_prompts", counted)
    with pytest.raises(KeyboardInterrupt):
        selected(source, models["pairs"], tmp_path / "stopped")
    made = selected(source, models["pairs"], tmp_path / "stopped")
    assert sum(n for n in measured if n > 0) == source.manifest.out
    assert made.manifest.digest == whole.manifest.digest
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_a_pool_without_two_answers_is_refused(models: dict[str, list[str]], tmp_path: Path) -> None:
    one = SampleSettings(answers=1)
    source = sample(Recipe("sample_rollouts", str(tmp_path / "one"), one, [], "local"), "toy:5", one)
    with pytest.raises(DataError, match=r"no prompt of .* can be measured"):
        selected(source, models["pairs"], tmp_path / "next")


# ------------------------------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return toy(tmp_path_factory.getbasetemp())


def test_the_command_selects_what_can_be_labelled(world: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYWARD_STORE", str(world.store))
    words = ["--source", world.answers, "--model", "models:/toy-pairs@champion", "--dropout", "0.2", "--passes", "3", "--count", "12"]
    said = done(here("select_uncertain", *words, "--output", tmp_path / "next", "--engine", "local"))
    assert "11 prompts by uncertainty, 1 at random" in said.err
    again = done(here("select_uncertain", *words, "--output", tmp_path / "next", "--engine", "local"))
    assert "already made" in again.err
    done(here("label_pairs", "--source", tmp_path / "next", "--output", tmp_path / "pairs"))
    assert open_dataset(tmp_path / "pairs", "examples").manifest.out > 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--measure", "deviation"], ["measure=deviation", "there is one"]),
        (["--random", "2"], ["random=2.0 are shares"]),
        (["--count", "0"], ["count=0"]),
        (["--dropout", "0.1", "--passes", "1"], ["passes=1"]),
    ],
)
def test_mistakes_are_said(words: list[str], said: list[str], world: Toy, tmp_path: Path) -> None:
    usual = ["--source", world.answers, "--model", world.pairs_model, "--count", "5", "--output", tmp_path / "next"]
    here("select_uncertain", *usual, *words).mistake(*said)
    assert not (tmp_path / "next").exists()


def test_a_pool_that_is_too_small_is_said(world: Toy, tmp_path: Path) -> None:
    usual = ["--source", world.answers, "--model", world.pairs_model, "--output", tmp_path / "next", "--engine", "local"]
    assert "warning: the pool has no 5,000 prompts" in done(here("select_uncertain", *usual, "--count", "5000")).err
