"""Training: one loss curve whatever the micro-batches, rows, workers and crashes; it learns; what cannot be is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file

import tiny
from rayward import checkpoints
from rayward.batching import BatchSettings, plan
from rayward.dataflow.claims import claimed
from rayward.errors import DataError, ModelError, RaywardError, SettingsError, UserError
from rayward.fitting import Fitted, fit, open_sides, prepare
from rayward.labels import LABELERS
from rayward.metrics import Mean
from rayward.objectives import make_objective
from rayward.records import Example, examples_of
from rayward.rendering import Groups
from rayward.reward_model import ModelSettings, RewardModel, load_model, save_model, tiny_model, word_tokenizer
from rayward.storage import Dataset
from rayward.training import Run, Team, TrainSettings, make_optimizer, train, validate
from tiny import classifier, dataset_of, example, groups_on_disk, plain_scores, toy_dataset, toy_examples

torch.set_num_threads(1)
pytestmark = pytest.mark.usefixtures("one_thread")

TRAIN = TrainSettings(epochs=2, lr=2e-3, log_every=1, validate_every=4, checkpoint_every=3)
STEPS = 8  # 30 examples in steps of 8, twice
ROOT = Path(__file__).resolve().parents[1]


class Crash(Exception):
    """What stands for a lost machine."""


def crash_at(step: int) -> Callable[[dict[str, float]], None]:
    def report(line: dict[str, float]) -> None:
        if line["step"] == step:
            raise Crash

    return report


def weighted(examples: list[Example]) -> list[Example]:
    """Every example with another weight."""
    return [replace(e, weight=0.5 + n % 4) for n, e in enumerate(examples)]


def rankings() -> list[Example]:
    return weighted(toy_examples("rankings", 60, answers=4)[:30])


def on_disk(folder: Path, held: int) -> tuple[Path, Path]:
    """30 rankings of unlike weights, and so many held-out pairs."""
    tokenizer = word_tokenizer(rankings(), 8192)
    groups_on_disk(tokenizer, rankings(), folder / "train")
    groups_on_disk(tokenizer, weighted(toy_examples("pairs", 400, seed=5)[:held]), folder / "held")
    return folder / "train", folder / "held"


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return on_disk(tmp_path_factory.mktemp("groups"), held=40)


def a_run(sides: tuple[Path, Path], folder: Path, **changes: Any) -> Run:
    """A run from the same start every time."""
    start = tiny_model(rankings(), ModelSettings(width=32), 128, seed=0).model
    usual = Run(
        model=start,
        groups=Groups(sides[0]),
        validation=Groups(sides[1]),
        objective=make_objective("plackett_luce"),
        train=TRAIN,
        batch=BatchSettings(size=8),
        folder=folder,
    )
    return replace(usual, **changes)


def lines(folder: Path) -> list[dict[str, float]]:
    """metrics.jsonl without how fast it was."""
    read = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{n: v for n, v in line.items() if n != "tokens_per_s"} for line in read]


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in lines(folder) if "loss" in line]


def same_weights(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture(scope="module")
def undisturbed(sides: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = a_run(sides, tmp_path_factory.mktemp("undisturbed"))
    train(run)
    return run


# --------------------------------------------------------------------------------------------------------- the same curve


def test_the_curve_is_that_of_a_loop_in_plain_torch(sides: tuple[Path, Path], undisturbed: Run, tmp_path: Path) -> None:
    run = a_run(sides, tmp_path)
    model = run.model.train()
    matrices, others = [p for p in model.parameters() if p.ndim >= 2], [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}], betas=(0.9, 0.98))
    curve = []
    for step in range(STEPS):
        epoch, at = divmod(step, STEPS // 2)
        total, weight = torch.zeros(()), 0.0
        for n in plan(len(run.groups), 8, seed=0, epoch=epoch)[at]:
            group = run.groups[int(n)]
            score_K = differentiable_scores(model, group)
            below_KK = torch.tensor(group.target_K)[:, None] > torch.tensor(group.target_K)[None, :]
            rivals_KK = below_KK | torch.eye(len(score_K), dtype=torch.bool)
            terms = [score_K[rivals_KK[k]].logsumexp(0) - score_K[k] for k in range(len(score_K)) if below_KK[k].any()]
            total, weight = total + group.weight * torch.stack(terms).sum(), weight + group.weight
        curve.append(total.item() / weight)
        (total / weight).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for entry in optimizer.param_groups:
            entry["lr"] = TRAIN.lr_at(step, STEPS)
        optimizer.step()
        optimizer.zero_grad()
    assert losses(undisturbed.folder) == pytest.approx(curve, abs=1e-5)


def differentiable_scores(model: RewardModel, group: Any) -> torch.Tensor:
    """The scores of one-segment answers, each alone in plain transformers, with gradients."""
    prompt, *answers = np.split(group.token_T, np.cumsum(group.length_A)[:-1])
    scores = []
    for answer in answers:
        ids = torch.tensor(np.concatenate([prompt, answer]), dtype=torch.int64).unsqueeze(0)
        scores.append(model.head(model.classifier.base_model(input_ids=ids).last_hidden_state[0, -1])[0])
    return torch.stack(scores)


@pytest.mark.parametrize(("row_tokens", "micro_tokens"), [(1, 1), (100, 700), (1000, 4096)])
def test_the_curve_does_not_depend_on_micro_batches(
    row_tokens: int, micro_tokens: int, sides: tuple[Path, Path], undisturbed: Run, tmp_path: Path
) -> None:
    train(a_run(sides, tmp_path, batch=BatchSettings(size=8, row_tokens=row_tokens, micro_tokens=micro_tokens)))
    assert losses(tmp_path) == pytest.approx(losses(undisturbed.folder), abs=1e-5)


def test_the_curve_does_not_depend_on_sharing_prompts(sides: tuple[Path, Path], undisturbed: Run, tmp_path: Path) -> None:
    run = a_run(sides, tmp_path)
    assert run.model.shares_prefix
    run.model.shares_prefix = False
    train(run)
    assert losses(tmp_path) == pytest.approx(losses(undisturbed.folder), abs=1e-5)


ONCE = replace(TRAIN, epochs=1)


def _worker(rank: int, folder: Path, sides: tuple[Path, Path]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for micro_tokens in (300, 100_000):  # the second leaves one worker without work
        batch = BatchSettings(size=8, micro_tokens=micro_tokens)
        run = a_run(sides, folder / f"{micro_tokens}", train=ONCE, batch=batch, team=Team.here())
        train(run)
        save_file(checkpoints.trained_tensors(run.model), folder / f"{micro_tokens}-{rank}.safetensors")
    dist.destroy_process_group()


def test_the_curve_does_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    sides = on_disk(tmp_path / "groups", held=260)
    train(a_run(sides, tmp_path / "alone", train=ONCE))
    mp.spawn(_worker, (tmp_path, sides), nprocs=2)
    for micro_tokens in (300, 100_000):
        both = [load_file(tmp_path / f"{micro_tokens}-{rank}.safetensors") for rank in (0, 1)]
        assert all(torch.equal(both[0][name], both[1][name]) for name in both[0])
        for here, there in zip(lines(tmp_path / f"{micro_tokens}"), lines(tmp_path / "alone"), strict=True):
            assert here == pytest.approx(there, abs=1e-5)


# ------------------------------------------------------------------------------------------------------- stop and go on


def resumed(run: Callable[[Path], Run], folder: Path, crashes: tuple[int, ...]) -> Run:
    """A run that is lost at those steps, and begun again each time."""
    for step in crashes:
        with pytest.raises(Crash):
            train(replace(run(folder), report=crash_at(step)))
    last = run(folder)
    train(last)
    return last


@pytest.mark.parametrize("crashes", [(1,), (3,), (4,), (8,), (2, 5, 5, 7)])
def test_a_run_that_was_lost_anywhere_ends_as_if_it_had_not_been(
    crashes: tuple[int, ...], sides: tuple[Path, Path], undisturbed: Run, tmp_path: Path
) -> None:
    again = resumed(lambda folder: a_run(sides, folder), tmp_path, crashes)
    assert same_weights(again.model, undisturbed.model)
    assert lines(tmp_path) == lines(undisturbed.folder)
    assert [line["step"] for line in lines(tmp_path) if "loss" in line] == list(range(1, STEPS + 1))
    best = [
        checkpoints.load(checkpoints.best(folder)[0], a_run(sides, folder).model.classifier, None)
        for folder in (tmp_path, undisturbed.folder)
    ]
    assert best[0] == best[1]


@pytest.mark.parametrize("crash", [4, 6])
def test_lines_that_cover_several_steps_are_the_same_after_a_crash_between_them(
    crash: int, sides: tuple[Path, Path], tmp_path: Path
) -> None:
    sparse = replace(TRAIN, log_every=2, checkpoint_every=3)
    train(a_run(sides, tmp_path / "whole", train=sparse))
    resumed(lambda folder: a_run(sides, folder, train=sparse), tmp_path / "lost", (crash,))
    assert lines(tmp_path / "lost") == lines(tmp_path / "whole")


def test_a_run_with_dropout_ends_as_if_it_had_not_been_lost(sides: tuple[Path, Path], tmp_path: Path) -> None:
    def run(folder: Path, dropout: float = 0.2) -> Run:
        drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
        return a_run(sides, folder, model=RewardModel(classifier("gpt2", vocabulary=128, **drops)))

    whole, without = run(tmp_path / "whole"), run(tmp_path / "without", dropout=0.0)
    train(whole)
    train(without)
    again = resumed(run, tmp_path / "lost", (5, 7))
    assert same_weights(again.model, whole.model)
    assert not same_weights(without.model, whole.model)
    assert lines(tmp_path / "lost") == lines(tmp_path / "whole")


def test_the_state_of_an_optimizer_goes_through_a_checkpoint_without_pickle(sides: tuple[Path, Path], tmp_path: Path) -> None:
    run = a_run(sides, tmp_path)
    optimizer = make_optimizer(run.model, TRAIN)
    for seed in range(3):
        torch.manual_seed(seed)
        for parameter in run.model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    writer = checkpoints.Writer(tmp_path)
    writer.save("step-00000003", run.model.classifier, optimizer, {"step": 3, "best": {}})
    writer.wait()
    assert {p.suffix for p in (tmp_path / "step-00000003").iterdir()} == {".safetensors", ".json"}
    other = a_run(sides, tmp_path).model
    restored = make_optimizer(other, TRAIN)
    assert checkpoints.load(tmp_path / "step-00000003", other.classifier, restored) == {"step": 3, "best": {}}
    assert same_weights(other, run.model)
    before, after = optimizer.state_dict(), restored.state_dict()
    assert before["param_groups"] == after["param_groups"]
    assert before["state"].keys() == after["state"].keys()
    for number, entries in before["state"].items():
        assert entries.keys() == after["state"][number].keys()
        assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(after["state"][number][n])) for n, v in entries.items())


def test_two_checkpoints_are_kept_and_nothing_half_written(undisturbed: Run) -> None:
    names = sorted(p.name for p in undisturbed.folder.iterdir())
    assert [n for n in names if not n.startswith("best-")] == ["metrics.jsonl", "step-00000006", "step-00000008"]
    named = {entry["step"] for path in checkpoints.steps(undisturbed.folder) for entry in checkpoints.read_state(path)["kept"]}
    assert [n for n in names if n.startswith("best-")] == [f"best-{step:08d}" for step in sorted(named)]


def test_the_best_three_are_kept_and_no_others(sides: tuple[Path, Path], tmp_path: Path) -> None:
    run = a_run(sides, tmp_path, train=replace(TRAIN, keep_best=3, validate_every=1, checkpoint_every=100, lr=5e-3, epochs=3))
    train(run)
    validated = [line for line in lines(tmp_path) if "validation_loss" in line]
    best = sorted(validated, key=lambda line: line["validation_loss"])[:3]
    kept = checkpoints.best(tmp_path)
    assert [checkpoints.read_state(path)["step"] for path in kept] == [line["step"] for line in best]
    assert {path.name for path in tmp_path.glob("best-*")} == {path.name for path in kept}
    for path, line in zip(kept, best, strict=True):
        checkpoints.load(path, run.model.classifier, None)
        assert validate(run)["loss"] == pytest.approx(line["validation_loss"], abs=1e-6)


# ------------------------------------------------------------------------------------------------------ numbers that are true


def by_hand(run: Run) -> tuple[float, float]:
    """Loss and accuracy on the held-out pairs, from scores of plain transformers."""
    assert run.validation is not None
    loss, right = Mean(), Mean()
    for n in range(len(run.validation)):
        group = run.validation[n]
        better, worse = plain_scores(run.model.classifier, group)
        loss += Mean(group.weight * float(np.logaddexp(0, worse - better)), group.weight)
        right += Mean(float(better > worse), 1)
    return loss.value, right.value


def test_validation_is_exact_though_batches_are_uneven(sides: tuple[Path, Path], undisturbed: Run, tmp_path: Path) -> None:
    run = replace(undisturbed, batch=BatchSettings(size=7, micro_tokens=700), folder=tmp_path)
    run.model.eval()
    loss, accuracy = by_hand(run)
    assert validate(run) == pytest.approx({"loss": loss, "accuracy": accuracy}, abs=1e-5)
    [*_, last] = [line for line in lines(undisturbed.folder) if "validation_loss" in line]
    assert (last["validation_loss"], last["validation_accuracy"]) == pytest.approx((loss, accuracy), abs=1e-5)


def test_a_loss_that_is_no_number_ends_the_run_with_a_way_out(sides: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(RaywardError, match=r"loss is nan at step \d+(.|\n)*lower the learning rate"):
        train(a_run(sides, tmp_path, train=replace(TRAIN, lr=1e30)))


def test_half_precision_is_near_and_the_weights_stay_whole(sides: tuple[Path, Path], undisturbed: Run, tmp_path: Path) -> None:
    run = a_run(sides, tmp_path, train=replace(TRAIN, precision="bf16"))
    train(run)
    assert losses(tmp_path) == pytest.approx(losses(undisturbed.folder), abs=0.05)
    assert losses(tmp_path) != losses(undisturbed.folder)
    assert {p.dtype for p in run.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("by", ["loss", "accuracy"])
def test_the_best_weights_are_those_of_the_best_line(by: Any, sides: tuple[Path, Path], tmp_path: Path) -> None:
    run = a_run(sides, tmp_path, train=replace(TRAIN, best_by=by, validate_every=1, lr=5e-3, epochs=4))
    state = train(run)
    validated = [line for line in lines(tmp_path) if "validation_loss" in line]
    assert len(validated) == 2 * STEPS
    best = min(validated, key=lambda line: line["validation_loss"] if by == "loss" else -line["validation_accuracy"])
    assert state["best"]["step"] == best["step"] < 2 * STEPS
    checkpoints.load(checkpoints.best(tmp_path)[0], run.model.classifier, None)
    assert validate(run) == pytest.approx({"loss": best["validation_loss"], "accuracy": best["validation_accuracy"]}, abs=1e-6)


def test_best_by_last_keeps_no_best(sides: tuple[Path, Path], tmp_path: Path) -> None:
    train(a_run(sides, tmp_path, train=replace(TRAIN, best_by="last")))
    assert not list(tmp_path.glob("best-*"))


LEARNS = [("pairs", 300, 3, 0.85), ("rankings", 200, 3, 0.85), ("steps", 300, 10, 0.8)]


@pytest.mark.parametrize(("kind", "problems", "epochs", "least"), LEARNS)
def test_every_kind_of_label_is_learned(kind: str, problems: int, epochs: int, least: float, tmp_path: Path) -> None:
    seen, unseen = toy_examples(kind, problems), toy_examples(kind, 100, seed=7)
    start = tiny_model(seen, ModelSettings(width=32), 128, seed=0)
    run = Run(
        model=start.model,
        groups=groups_on_disk(start.tokenizer, seen, tmp_path / "seen"),
        validation=groups_on_disk(start.tokenizer, unseen, tmp_path / "unseen"),
        objective=make_objective(LABELERS[kind].objective),
        train=TrainSettings(epochs=epochs, lr=4e-3),
        batch=BatchSettings(size=16),
        folder=tmp_path / "run",
    )
    before = validate(run)
    best = train(run)["best"]
    assert best["accuracy"] > least
    assert best["loss"] < before["loss"]
    if kind == "steps":  # always saying what is commoner, or how common it is, must be worse
        right, targets = np.mean([t > 0.5 for e in unseen for t in e.targets if t != 0.5]), [t for e in unseen for t in e.targets]
        common = np.mean(targets)
        assert best["accuracy"] > max(right, 1 - right) + 0.05
        assert best["loss"] < -common * np.log(common) - (1 - common) * np.log(1 - common)


# ------------------------------------------------------------------------------------------------------------ the whole fit

FIT = replace(tiny.FIT, train=TrainSettings(epochs=2, lr=2e-3, log_every=1, validate_every=4, checkpoint_every=3))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return toy_dataset("pairs", tmp_path_factory.mktemp("pairs"), problems=60)


@pytest.fixture(scope="module")
def fitted(pairs: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Fitted:
    return fit(replace(FIT, examples=str(pairs.path)), str(tmp_path_factory.mktemp("fit")))


def model_bytes(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_a_fit_leaves_the_best_weights_and_says_what_they_are(fitted: Fitted, pairs: Dataset) -> None:
    run = fitted.model.parent / "run"
    [kept_best] = checkpoints.best(run)
    best = load_file(kept_best / "model.safetensors")
    kept = load_file(fitted.model / "model.safetensors")
    assert all(torch.equal(best[name], kept[name]) for name in kept)
    [line] = [line for line in lines(run) if "validation_loss" in line and line["step"] == checkpoints.read_state(kept_best)["step"]]
    assert fitted.metrics == {"loss": line["validation_loss"], "accuracy": line["validation_accuracy"]}
    assert fitted.notes["objective"] == "bradley_terry"
    assert fitted.notes["labeler"] == "pairs"
    assert fitted.notes["data_digest"] == pairs.manifest.digest
    assert sum(fitted.examples.values()) == pairs.manifest.out


def test_a_finished_fit_is_not_done_twice(fitted: Fitted, pairs: Dataset) -> None:
    output = fitted.model.parent
    before, said, notes = model_bytes(fitted.model), lines(output / "run"), (fitted.model / "config.json").read_text()
    again = fit(replace(FIT, examples=str(pairs.path)), str(output))
    assert again == fitted
    assert (model_bytes(fitted.model), lines(output / "run"), (fitted.model / "config.json").read_text()) == (before, said, notes)


def test_a_fit_by_last_leaves_the_last_weights(pairs: Dataset, tmp_path: Path) -> None:
    done = fit(replace(FIT, examples=str(pairs.path), train=replace(FIT.train, best_by="last")), str(tmp_path))
    last = load_file(checkpoints.steps(tmp_path / "run")[-1] / "model.safetensors")
    kept = load_file(done.model / "model.safetensors")
    assert all(torch.equal(last[name], kept[name]) for name in kept)


@pytest.mark.parametrize(("file", "how"), [("model.safetensors", "half"), ("optimizer.safetensors", "gone"), ("state.json", "half")])
def test_a_damaged_checkpoint_is_named_and_without_it_the_run_goes_on(
    file: str, how: str, pairs: Dataset, fitted: Fitted, tmp_path: Path
) -> None:
    settings = replace(FIT, examples=str(pairs.path))
    with pytest.raises(Crash):
        fit(settings, str(tmp_path), report=crash_at(7))
    damaged = tmp_path / "run" / "step-00000006"
    content = (damaged / file).read_bytes()
    (damaged / file).unlink()
    if how == "half":
        (damaged / file).write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"step-00000006 cannot be read(.|\n)*delete that folder"):
        fit(settings, str(tmp_path))
    shutil.rmtree(damaged)
    assert model_bytes(fit(settings, str(tmp_path)).model) == model_bytes(fitted.model)


def test_a_folder_of_other_settings_is_refused_with_the_differences(fitted: Fitted, pairs: Dataset) -> None:
    other = replace(FIT, examples=str(pairs.path), train=replace(FIT.train, lr=1e-3), batch=BatchSettings(size=4))
    with pytest.raises(SettingsError, match=r"batch.size: 8 -> 4; train.lr: 0.002 -> 0.001\)(.|\n)*another --output"):
        fit(other, str(fitted.model.parent))


def test_a_folder_of_something_else_is_refused(pairs: Dataset, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(SettingsError, match="is not empty and holds no run"):
        fit(replace(FIT, examples=str(pairs.path)), str(tmp_path))


def test_of_two_fits_at_once_one_is_told(pairs: Dataset, tmp_path: Path) -> None:
    settings = replace(FIT, examples=str(pairs.path))
    with claimed(tmp_path, tmp_path), pytest.raises(DataError, match=r"another run is making .* at this moment(.|\n)*another --output"):
        fit(settings, str(tmp_path))
    assert not (tmp_path / "model").exists()
    assert fit(settings, str(tmp_path)).model.is_dir()


def test_a_tracked_run_that_began_before_the_fit_is_no_stranger(pairs: Dataset, tmp_path: Path) -> None:
    for name in ("tracking.json", "tracking.pending.jsonl"):
        (tmp_path / name).write_text("{}")
    prepare(replace(FIT, examples=str(pairs.path)), str(tmp_path))
    (tmp_path / "settings.json").unlink()
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(SettingsError, match="is not empty and holds no run"):
        prepare(replace(FIT, examples=str(pairs.path)), str(tmp_path))


def test_probabilities_are_not_learned_from_rewards_of_five(tmp_path: Path) -> None:
    graded = [example("a", "b", id=f"e{n}", targets=(5.0, 1.0), prompt=e.prompt) for n, e in enumerate(toy_examples("pairs", 30))]
    source = dataset_of(graded, tmp_path / "graded")
    settings = replace(FIT, examples=str(source.path), objective="binary_cross_entropy")
    with pytest.raises(SettingsError, match=r"needs targets between 0 and 1; these lie between 1 and 5(.|\n)*bradley_terry"):
        fit(settings, str(tmp_path / "out"))
    fit(replace(settings, objective="bradley_terry"), str(tmp_path / "out"))  # the way out it names, in the same folder


def test_a_model_that_is_not_there_leaves_the_folder_to_the_next_try(pairs: Dataset, tmp_path: Path) -> None:
    settings = replace(FIT, examples=str(pairs.path), model=str(tmp_path / "mistyped"))
    with pytest.raises(ModelError, match="mistyped cannot be loaded"):
        fit(settings, str(tmp_path / "out"))
    fit(replace(settings, model="tiny"), str(tmp_path / "out"))


@pytest.mark.parametrize("pooling", ["auto", "mean"])
def test_a_body_that_looks_ahead_cannot_learn_steps(pooling: Any, tmp_path: Path) -> None:
    examples = toy_examples("steps", 30)
    tokenizer = word_tokenizer(examples, 8192)
    save_model(RewardModel(classifier("bert", vocabulary=len(tokenizer))), tokenizer, tmp_path / "bert", {})
    source = dataset_of(examples, tmp_path / "steps", made_by="label_steps")
    settings = replace(FIT, examples=str(source.path), model=str(tmp_path / "bert"), net=ModelSettings(pooling=pooling))
    with pytest.raises(UserError, match="step"):  # it has one score for a whole answer, so every step would get the same
        fit(settings, str(tmp_path / "out"))


def test_comparing_is_not_learned_where_nothing_is_to_compare(tmp_path: Path) -> None:
    single = [replace(e, answers=(("".join(e.answers[0]),),), targets=e.targets[-1:], counts=(1,)) for e in toy_examples("steps", 30)]
    source = dataset_of(single, tmp_path / "single", made_by="label_steps")
    with pytest.raises(SettingsError, match=r"no example has two with different targets(.|\n)*binary_cross_entropy"):
        fit(replace(FIT, examples=str(source.path), objective="bradley_terry"), str(tmp_path / "out"))


def test_examples_of_nobody_knows_which_labeler_need_an_objective(tmp_path: Path) -> None:
    source = dataset_of(toy_examples("pairs", 20), tmp_path / "examples")
    with pytest.raises(SettingsError, match=r"does not say which labeler(.|\n)*--objective bradley_terry"):
        fit(replace(FIT, examples=str(source.path)), str(tmp_path / "out"))


def test_a_model_that_was_trained_is_trained_on(fitted: Fitted, pairs: Dataset, tmp_path: Path) -> None:
    done = fit(replace(FIT, examples=str(pairs.path), model=str(fitted.model)), str(tmp_path))
    assert losses(tmp_path / "run")[0] < losses(fitted.model.parent / "run")[0]
    assert load_model(str(done.model), ModelSettings()).notes["base_model"] == str(fitted.model)


def test_another_seed_is_another_order_of_the_same_examples(fitted: Fitted, pairs: Dataset, tmp_path: Path) -> None:
    starts, curves = [], []
    for n, seed in enumerate((0, 0, 1)):
        once = replace(FIT.train, epochs=1, lr=1e-9, seed=seed)
        settings = replace(FIT, examples=str(pairs.path), model=str(fitted.model), batch=BatchSettings(size=1), train=once)
        prepared = prepare(settings, str(tmp_path / f"{n}"))
        starts.append({name: p.clone() for name, p in prepared.loaded.model.classifier.state_dict().items()})
        prepared.train()
        curves.append(losses(tmp_path / f"{n}" / "run"))
    assert all(torch.equal(starts[0][name], start[name]) for start in starts for name in starts[0])
    assert curves[0] == curves[1] != curves[2]
    assert sorted(curves[0]) == pytest.approx(sorted(curves[2]), abs=1e-4)


def test_what_is_too_long_is_counted_told_and_kept_with_its_reason(
    pairs: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sides = open_sides(str(pairs.path), FIT.validation_share)
    first = {next(e.id for table in sides.tables(side) for e in examples_of(table)) for side in ("train", "validation")}
    whole = [e for table in pairs.tables() for e in examples_of(table)]
    longer = [replace(e, answers=(e.answers[0], ("so " * FIT.render.max_length,))) if e.id in first else e for e in whole]
    source = dataset_of(longer, tmp_path / "examples", "label_pairs")
    done = fit(replace(FIT, examples=str(source.path)), str(tmp_path / "fit"))
    assert done.examples["rejected"] == 2
    assert sum(done.examples.values()) == source.manifest.out == len(whole)
    for side in ("train", "validation"):
        assert done.examples[side] == sum(table.num_rows for table in sides.tables(side)) - 1
        assert len(Groups(tmp_path / "fit" / "groups" / side)) == done.examples[side]
    kept = tmp_path / "fit" / "groups" / "rejects.parquet"
    assert f"2 examples left out (too long 2); see {kept}" in capsys.readouterr().out.splitlines()
    rows = pq.read_table(kept).to_pylist()
    assert {row["row"] for row in rows} == first
    assert all(row["reason"].startswith("too long: ") for row in rows)


def test_a_fit_goes_on_from_its_model_wherever_that_was_fetched_to(fitted: Fitted, pairs: Dataset, tmp_path: Path) -> None:
    """A tracking server's client puts a registered version into another folder every time."""
    settings = [replace(FIT, examples=str(pairs.path), model=str(shutil.copytree(fitted.model, tmp_path / at))) for at in ("once", "again")]
    with pytest.raises(Crash):
        prepare(settings[0], str(tmp_path / "out"), base="models:/mine/1").train(crash_at(4))
    with pytest.raises(SettingsError, match=r"other settings \(model: models:/mine/1 -> models:/mine/2\)"):
        prepare(settings[1], str(tmp_path / "out"), base="models:/mine/2")
    done = prepare(settings[1], str(tmp_path / "out"), base="models:/mine/1").train()
    assert done.notes["base_model"] == "models:/mine/1"
    assert model_bytes(done.model) == model_bytes(fit(settings[0], str(tmp_path / "whole")).model)


# ----------------------------------------------------------------------------------------------------------------- Ctrl-C


CHANGED = replace(FIT, batch=BatchSettings(size=4), train=TrainSettings(epochs=6, lr=2e-3, log_every=1, checkpoint_every=1000))


def start_job(pairs: Dataset, store: Path, output: Path) -> subprocess.Popen[str]:
    """The job with settings CHANGED, as a process of its own."""
    words = f"--examples {pairs.path} --output {output} --validation-share 0.2"
    words += " --set net.width=32 --set render.max_length=128 --set batch.size=4"
    words += " --set train.epochs=6 --set train.lr=2e-3 --set train.log_every=1 --set train.checkpoint_every=1000"
    environment = {**os.environ, "RAYWARD_STORE": str(store)}
    command = [sys.executable, str(ROOT / "jobs" / "train_reward_model.py"), *words.split()]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_ctrl_c_keeps_the_step_and_the_same_command_ends_alike(pairs: Dataset, store: Path, tmp_path: Path) -> None:
    whole = fit(replace(CHANGED, examples=str(pairs.path)), str(tmp_path / "whole"))
    total = len(losses(tmp_path / "whole" / "run"))

    output = tmp_path / "job"
    job = start_job(pairs, store, output)
    metrics = output / "run" / "metrics.jsonl"
    while job.poll() is None and (not metrics.exists() or len(metrics.read_text().splitlines()) < 3):
        time.sleep(0.01)
    job.send_signal(signal.SIGINT)
    _, said = job.communicate()
    assert job.returncode == 130, said
    [kept] = checkpoints.steps(output / "run")
    step = int(kept.name.removeprefix("step-"))
    assert f"stopped: step {step} of {total} is kept in {output / 'run'}; the same command goes on from there" in said
    assert "Traceback" not in said
    assert 3 <= step < total
    assert not (output / "model").exists()

    again = start_job(pairs, store, output)
    out, said = again.communicate()
    assert again.returncode == 0, said
    assert f"going on from step {step} of {total}" in out
    assert model_bytes(output / "model") == model_bytes(whole.model)
    assert lines(output / "run") == lines(tmp_path / "whole" / "run")
