"""Scoring: what a saved model says is what the training said, alone or in a pool of actors, and nothing is lost on the way."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rayward.batching import BatchSettings
from rayward.dataflow import Engine, Recipe
from rayward.errors import DataError
from rayward.records import Rejected, Rollout, rollouts_of
from rayward.rendering import Renderer, RenderSettings
from rayward.reward_model import Loaded, ModelSettings, RewardModel, save_model, score_groups, tiny_model
from rayward.sampling import SampleSettings, sample
from rayward.scoring import TOGETHER, Scorer, score_dataset
from rayward.storage import Dataset
from tiny import byte_tokenizer, classifier, example, plain_scores, question, rendered, toy_examples, toy_rollouts

torch.set_num_threads(1)

RENDER = {"max_length": 128, "too_long": "reject"}


def trained(folder: Path, labeler: str) -> Loaded:
    """A model of random weights, saved as a fit saves one."""
    loaded = tiny_model(toy_examples("pairs", 20), ModelSettings(width=32), 128, seed=0)
    with torch.no_grad():
        for weight in loaded.model.parameters():
            weight += 0.1 * torch.randn_like(weight)
    save_model(loaded.model, loaded.tokenizer, folder, {"labeler": labeler, "render": RENDER, "temperature": 2.0})
    return loaded


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Loaded, Path]:
    folder = tmp_path_factory.mktemp("answers")
    return trained(folder, "pairs"), folder


@pytest.fixture(scope="module")
def stepwise(tmp_path_factory: pytest.TempPathFactory) -> tuple[Loaded, Path]:
    folder = tmp_path_factory.mktemp("stepwise")
    return trained(folder, "steps"), folder


def rollouts(problems: int = 6) -> list[Rollout]:
    return [r for of in toy_rollouts(problems, answers=4) for r in of]


def alone(loaded: Loaded, rollout: Rollout, steps: bool) -> list[float]:
    """The scores of a rollout's segments in plain transformers."""
    segments = rollout.steps if steps else (rollout.text,)
    [group] = rendered(loaded.tokenizer, [example(segments, prompt=rollout.prompt)])
    return plain_scores(loaded.model.eval().classifier, group)


def too_long(rollout: Rollout) -> Rollout:
    return replace(rollout, id="long", steps=(rollout.steps[0] * 60, *rollout.steps[1:]))


# --------------------------------------------------------------------------------------------------------------- examples


@pytest.mark.parametrize("kind", ["pairs", "rankings", "steps"])
def test_scores_are_those_of_the_model_that_was_trained(kind: str, answers: tuple[Loaded, Path]) -> None:
    loaded, folder = answers
    examples = toy_examples(kind, 12, seed=3)
    groups = rendered(loaded.tokenizer, examples)
    training = score_groups(loaded.model, groups, BatchSettings(row_tokens=500, micro_tokens=600))
    scores = Scorer.load(folder)(examples)
    for score, before, of, group in zip(scores, training, examples, groups, strict=True):
        assert len(score) == len(of.targets)
        np.testing.assert_allclose(score, before, atol=1e-5)
        np.testing.assert_allclose(score, plain_scores(loaded.model.eval().classifier, group), atol=1e-5)


def test_an_example_that_cannot_be_scored_is_named(answers: tuple[Loaded, Path]) -> None:
    scorer = Scorer.load(answers[1])
    fine, long = toy_examples("pairs", 8)[0], example("word " * 200, "b", id="wide")
    first, second, third = scorer.try_score([fine, long, fine])
    assert isinstance(second, Rejected)
    assert second.reason.startswith("too long: ")
    for score in (first, third):
        assert score == pytest.approx(scorer([fine])[0], abs=1e-6)
    with pytest.raises(DataError, match="example wide cannot be scored: too long: "):
        scorer([fine, long])


@pytest.mark.parametrize(("kind", "window"), [("mistral", "sliding_window"), ("gemma2", "sliding_window")])
def test_a_model_with_a_window_scores_as_it_was_trained(kind: str, window: str, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    model = RewardModel(classifier(kind, vocabulary=len(tokenizer), **{window: 16}), max_length=128).eval()
    save_model(model, tokenizer, tmp_path, {"labeler": "pairs", "render": RENDER})
    examples = [example("Yes, it is so.", "First we add the tens, then the ones.", "No.", prompt=question(f"Is it {n}?")) for n in range(4)]
    groups = rendered(tokenizer, examples)
    assert max(g.longest for g in groups) > 16
    for score, group in zip(Scorer.load(tmp_path)(examples), groups, strict=True):
        np.testing.assert_allclose(score, plain_scores(model.classifier, group), atol=1e-5)


# --------------------------------------------------------------------------------------------------------------- rollouts


def test_rollouts_of_any_order_have_one_score_each(answers: tuple[Loaded, Path]) -> None:
    loaded, folder = answers
    mixed = [r for pair in zip(rollouts()[::2], rollouts()[1::2], strict=True) for r in reversed(pair)]
    scores = Scorer.load(folder).score_rollouts(mixed)
    assert [len(s) for s in scores if not isinstance(s, Rejected)] == [1] * len(mixed)
    for rollout, score in zip(mixed, scores, strict=True):
        np.testing.assert_allclose(np.array(score), alone(loaded, rollout, steps=False), atol=1e-5)


def test_more_answers_of_a_prompt_than_go_together(answers: tuple[Loaded, Path]) -> None:
    loaded, folder = answers
    [many] = toy_rollouts(1, answers=2 * TOGETHER + 3)
    scores = Scorer.load(folder).score_rollouts(many)
    for rollout, score in zip(many, scores, strict=True):
        np.testing.assert_allclose(np.array(score), alone(loaded, rollout, steps=False), atol=1e-5)


def test_a_model_of_steps_gives_a_score_per_step(stepwise: tuple[Loaded, Path]) -> None:
    loaded, folder = stepwise
    scorer = Scorer.load(folder)
    assert scorer.reads_steps
    for rollout, score in zip(rollouts(), scorer.score_rollouts(rollouts()), strict=True):
        assert not isinstance(score, Rejected)
        assert len(score) == len(rollout.steps)
        np.testing.assert_allclose(score, alone(loaded, rollout, steps=True), atol=1e-5)


@pytest.mark.parametrize("which", ["answers", "stepwise"])
def test_a_rollout_that_is_too_long_takes_no_other_with_it(which: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(which)[1]
    fine = rollouts(2)
    with_long = [*fine[:2], too_long(fine[0]), *fine[2:]]
    scorer = Scorer.load(folder)
    scores = scorer.score_rollouts(with_long)
    rejected = scores.pop(2)
    assert isinstance(rejected, Rejected)
    assert rejected.row == "long"
    assert rejected.reason.startswith("too long: ")
    for score, expected in zip(scores, scorer.score_rollouts(fine), strict=True):
        np.testing.assert_allclose(np.array(score), np.array(expected), atol=1e-5)


def test_no_rollouts_have_no_scores(answers: tuple[Loaded, Path]) -> None:
    assert Scorer.load(answers[1]).score_rollouts([]) == []


def test_rendering_and_temperature_come_with_the_model(answers: tuple[Loaded, Path]) -> None:
    scorer = Scorer.load(answers[1])
    assert scorer.renderer.settings == RenderSettings(**RENDER)  # type: ignore[arg-type]
    assert scorer.temperature == 2.0
    [theirs] = scorer.renderer.render([toy_examples("pairs", 8)[0]])
    [ours] = Renderer(answers[0].tokenizer, RenderSettings()).render([toy_examples("pairs", 8)[0]])
    assert theirs.token_T.tolist() == ours.token_T.tolist()  # type: ignore[union-attr]


# ----------------------------------------------------------------------------------------------------------- whole datasets


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Rollouts of the toy world in four parts, with problems too long for the model among them."""
    chosen = SampleSettings(answers=3)
    path = tmp_path_factory.mktemp("source")
    numbers = [[10 + (n + k) % 29 for k in range(5 + 9 * (n % 4))] for n in range(40)]
    lengthy = [{"question": f"largest of {' '.join(map(str, n))} ?", "gold": "39"} for n in numbers]
    (path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lengthy))
    recipe = Recipe("sample_rollouts", str(path / "rollouts"), chosen, [], "local")
    return sample(recipe, str(path / "problems.jsonl"), chosen, parts=4)


def scored(source: Dataset, folder: Path, output: Path, engine: Engine) -> Dataset:
    return score_dataset(Recipe("score_rollouts", str(output), RenderSettings(), [source.lineage()], engine), source, str(folder), actors=1)


def check_counts(made: Dataset, source: Dataset) -> None:
    manifest = made.manifest
    assert manifest.rows_in == source.manifest.out == manifest.used + sum(manifest.rejected.values())
    assert manifest.out == manifest.used == made.table().num_rows
    assert manifest.rejected == {"too long": made.rejects().num_rows}
    assert manifest.rejected["too long"] > 0


def test_a_dataset_is_scored_row_by_row_and_its_manifest_adds_up(source: Dataset, stepwise: tuple[Loaded, Path], tmp_path: Path) -> None:
    made = scored(source, stepwise[1], tmp_path / "scored", "local")
    check_counts(made, source)
    table = made.table()
    kept = rollouts_of(table.drop_columns(["score", "step_scores"]))
    expected: Sequence[Any] = Scorer.load(stepwise[1]).score_rollouts(kept)
    for score, steps, rollout, scores in zip(table["score"].to_pylist(), table["step_scores"].to_pylist(), kept, expected, strict=True):
        assert len(steps) == len(rollout.steps)
        np.testing.assert_allclose(steps, scores, atol=1e-5)
        assert score == steps[-1]
    assert sorted([*table["id"].to_pylist(), *made.rejects()["row"].to_pylist()]) == sorted(source.table()["id"].to_pylist())


def test_an_actor_on_ray_gives_the_same_scores(ray_cluster: Any, source: Dataset, answers: tuple[Loaded, Path], tmp_path: Path) -> None:
    here = scored(source, answers[1], tmp_path / "here", "local")
    there = scored(source, answers[1], tmp_path / "there", "ray")
    check_counts(there, source)
    assert there.manifest.rejected == here.manifest.rejected
    assert there.table()["id"].to_pylist() == here.table()["id"].to_pylist()
    np.testing.assert_allclose(there.table()["score"].to_numpy(), here.table()["score"].to_numpy(), atol=1e-5)
    assert there.table()["step_scores"].null_count == there.table().num_rows
