"""What a run may be told besides: schedules, averages, layers that learn slowly or not at all, an early end, adapters."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import tiny
from rayward import checkpoints
from rayward.adapters import LoraSettings
from rayward.batching import BatchSettings
from rayward.errors import Interrupted, ModelError, SettingsError
from rayward.fitting import FitSettings, fit
from rayward.objectives import make_objective
from rayward.optimizers import depth_of, layers_of, lr_share, parameter_groups
from rayward.rendering import Groups
from rayward.reward_model import ModelSettings, load_model, score_groups, tiny_model
from rayward.scoring import Scorer
from rayward.storage import Dataset
from rayward.training import Run, TrainSettings, freeze, train
from tiny import classifier, groups_on_disk, toy_dataset, toy_examples

torch.set_num_threads(1)

TRAIN = TrainSettings(epochs=2, lr=2e-3, log_every=1, validate_every=2, checkpoint_every=2)
NET = ModelSettings(width=32, layers=2)


class Crash(Exception):
    """What stands for a lost machine."""


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("groups")
    examples = toy_examples("pairs", 60)
    tokenizer = tiny_model(examples, NET, 128, seed=0).tokenizer
    groups_on_disk(tokenizer, examples[:32], folder / "train")
    groups_on_disk(tokenizer, examples[32:56], folder / "held")
    return folder / "train", folder / "held"


def a_run(sides: tuple[Path, Path], folder: Path, settings: TrainSettings, **changes: Any) -> Run:
    run = Run(
        model=tiny_model(toy_examples("pairs", 60), NET, 128, seed=0).model,
        groups=Groups(sides[0]),
        validation=Groups(sides[1]),
        objective=make_objective("bradley_terry"),
        train=settings,
        batch=BatchSettings(size=8),
        folder=folder,
    )
    return replace(run, **changes)


def weights(run: Run) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in run.model.classifier.named_parameters()}


# -------------------------------------------------------------------------------------------------------------- schedules


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
def test_a_schedule_rises_to_its_peak_and_ends_where_it_says(schedule: Any) -> None:
    share = [lr_share(n, 1000, 0.1, schedule) for n in range(1000)]
    assert np.allclose(share[:100], np.arange(1, 101) / 100)
    assert max(share) == 1.0
    assert all(a >= b for a, b in itertools.pairwise(share[100:]))
    assert share[-1] == pytest.approx(1.0 if schedule == "constant" else 0.05, abs=0.006)


def test_wsd_is_flat_and_then_falls_straight() -> None:
    share = [lr_share(n, 1000, 0.1, "wsd") for n in range(1000)]
    assert set(share[100:800]) == {1.0}
    assert np.allclose(np.diff(share[800:]), -0.95 / 200)


# ----------------------------------------------------------------------------------------------------------------- layers


@pytest.mark.parametrize("kind", ["qwen3", "gpt2", "gpt_neox", "bert", "modernbert", "deberta-v2", "llama"])
def test_every_parameter_of_a_body_has_its_depth(kind: str) -> None:
    model = classifier(kind)
    layers = layers_of(model)
    assert layers == model.config.num_hidden_layers
    depth = {n: depth_of(n, layers, head=n.startswith(("score", "classifier"))) for n, _ in model.named_parameters()}
    assert {d for n, d in depth.items() if n.startswith(("score", "classifier"))} == {layers + 1}
    assert all(d == 0 for n, d in depth.items() if "embed" in n or "wte" in n)
    assert set(depth.values()) >= set(range(1, layers + 1))


def test_layer_decay_multiplies_the_learning_rate_once_per_layer() -> None:
    model = classifier("qwen3")
    layers = model.config.num_hidden_layers
    groups = parameter_groups(model, "score", weight_decay=0.1, layer_decay=0.5)
    scale = {id(p): g["scale"] for g in groups for p in g["params"]}
    named = dict(model.named_parameters())
    assert scale[id(named["score.weight"])] == 1.0
    assert scale[id(named[f"model.layers.{layers - 1}.mlp.up_proj.weight"])] == 0.5
    assert scale[id(named["model.embed_tokens.weight"])] == 0.5 ** (layers + 1)
    assert {id(p) for g in groups for p in g["params"]} == {id(p) for p in named.values()}
    assert {g["weight_decay"] for g in groups for p in g["params"] if p.ndim < 2} == {0.0}


def test_the_lower_the_layer_the_less_it_moves(sides: tuple[Path, Path], tmp_path: Path) -> None:
    moved = {}
    for decay in (1.0, 0.01):
        run = a_run(sides, tmp_path / str(decay), replace(TRAIN, layer_decay=decay))
        before = weights(run)
        train(run)
        moved[decay] = {n: float((p - before[n]).abs().mean()) for n, p in weights(run).items()}
    assert moved[0.01]["model.embed_tokens.weight"] < 1e-3 * moved[1.0]["model.embed_tokens.weight"]
    assert moved[0.01]["score.weight"] > 0.1 * moved[1.0]["score.weight"]


@pytest.mark.parametrize(("lowest", "still"), [(1, ("embed_tokens", "layers.0.")), (-1, ("embed_tokens", "layers.", "model.norm"))])
def test_frozen_layers_do_not_move_and_are_not_written_again(
    lowest: int, still: tuple[str, ...], sides: tuple[Path, Path], tmp_path: Path
) -> None:
    run = a_run(sides, tmp_path, TRAIN)
    freeze(run.model, lowest)
    before = weights(run)
    train(run)
    for name, now in weights(run).items():
        assert torch.equal(now, before[name]) == any(part in name for part in still), name
    kept = load_file(checkpoints.steps(tmp_path)[-1] / "model.safetensors")
    assert not any(part in name for name in kept for part in still)
    assert "score.weight" in kept


def test_more_layers_than_there_are_cannot_be_frozen(sides: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"freeze_layers=3 and the body has 2 layers(.|\n)*-1 for all"):
        freeze(a_run(sides, tmp_path, TRAIN).model, 3)


# ------------------------------------------------------------------------------------------------------------ the average


def test_the_average_is_that_of_the_weights_after_every_step(sides: tuple[Path, Path], tmp_path: Path) -> None:
    settings = replace(TRAIN, average=0.9, checkpoint_every=1, best_by="last", epochs=1)
    run = a_run(sides, tmp_path, settings)
    mean = weights(run)
    seen: list[dict[str, torch.Tensor]] = []

    def look(line: dict[str, float]) -> None:
        if "loss" in line:
            seen.append(weights(run))

    train(replace(run, report=look))
    assert len(seen) == 4
    for n, now in enumerate(seen, 1):
        keep = min(0.9, (1 + n) / (10 + n))
        mean = {name: keep * mean[name] + (1 - keep) * now[name] for name in mean}
    kept = checkpoints.load_average(checkpoints.steps(tmp_path)[-1])
    assert kept is not None
    for name, tensor in kept.items():
        torch.testing.assert_close(tensor, mean[name], rtol=1e-5, atol=1e-7)
    assert all(torch.equal(p, seen[-1][name]) for name, p in weights(run).items())  # validation put the live weights back


def test_a_run_with_an_average_goes_on_after_a_crash_as_if_nothing_had_been(sides: tuple[Path, Path], tmp_path: Path) -> None:
    settings = replace(TRAIN, average=0.8)
    whole, broken = a_run(sides, tmp_path / "whole", settings), a_run(sides, tmp_path / "broken", settings)
    train(whole)

    def crash(line: dict[str, float]) -> None:
        if line["step"] == 5:
            raise Crash

    with pytest.raises(Crash):
        train(replace(broken, report=crash))
    again = a_run(sides, tmp_path / "broken", settings)
    train(again)
    for name in ("model", "average"):
        one, two = (load_file(checkpoints.steps(tmp_path / f)[-1] / f"{name}.safetensors") for f in ("whole", "broken"))
        assert all(torch.equal(one[key], two[key]) for key in one)


def fit_settings(examples: Dataset, **changes: Any) -> FitSettings:
    return replace(tiny.FIT, **{"examples": str(examples.path), "net": NET, "train": TRAIN, **changes})


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return toy_dataset("pairs", tmp_path_factory.mktemp("pairs"), problems=60)


@pytest.mark.parametrize("best_by", ["loss", "last"])
def test_what_a_fit_with_an_average_leaves_is_the_average(best_by: Any, pairs: Dataset, tmp_path: Path) -> None:
    done = fit(fit_settings(pairs, train=replace(TRAIN, average=0.9, best_by=best_by)), str(tmp_path))
    kept = load_file(done.model / "model.safetensors")
    last = checkpoints.steps(tmp_path / "run")[-1]
    wanted = load_file(checkpoints.best(tmp_path / "run")[0] / "model.safetensors") if best_by == "loss" else checkpoints.load_average(last)
    live = load_file(last / "model.safetensors")
    assert wanted is not None
    assert all(torch.equal(kept[name], wanted[name]) for name in kept)
    assert any(not torch.equal(kept[name], live[name]) for name in kept)


# --------------------------------------------------------------------------------------------------------- an early end


def test_a_run_ends_when_it_does_not_get_better(pairs: Dataset, tmp_path: Path) -> None:
    settings = fit_settings(pairs, train=replace(TRAIN, epochs=30, lr=0.3, patience=2, validate_every=1, clip=100.0))
    done = fit(settings, str(tmp_path))
    [state] = [checkpoints.read_state(p) for p in checkpoints.steps(tmp_path / "run")[-1:]]
    best = checkpoints.read_state(checkpoints.best(tmp_path / "run")[0])["step"]
    assert state["step"] == best + 2
    assert fit(settings, str(tmp_path)) == done  # an ended run is not begun again
    assert checkpoints.read_state(checkpoints.steps(tmp_path / "run")[-1])["step"] == state["step"]


def test_patience_without_a_better_is_refused() -> None:
    with pytest.raises(ValueError, match="patience=2 needs best_by=loss or accuracy"):
        TrainSettings(patience=2, best_by="last")


# --------------------------------------------------------------------------------------------------------------- adapters

LORA = LoraSettings(rank=4)


def lora_fit(pairs: Dataset, folder: Path, **changes: Any) -> tuple[Any, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    done = fit(fit_settings(pairs, lora=LORA, **changes), str(folder))
    return done, load_file(folder / "start" / "model.safetensors"), load_file(done.model / "model.safetensors")


def test_adapters_are_merged_and_the_head_is_trained_and_saved(pairs: Dataset, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    done, start, kept = lora_fit(pairs, tmp_path)
    assert start.keys() == kept.keys()
    changed = {name for name in kept if not torch.equal(kept[name], start[name])}
    assert "score.weight" in changed
    assert {n for n in changed if n != "score.weight"} == {n for n in kept if "_proj" in n}  # every matrix but embeddings and head
    for name in changed - {"score.weight"}:
        assert torch.linalg.matrix_rank(kept[name] - start[name], tol=1e-5) <= LORA.rank
    assert done.notes["lora"]["rank"] == 4


def test_the_merged_model_scores_as_the_adapted_one_did(pairs: Dataset, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    done, _, _ = lora_fit(pairs, tmp_path)
    held = Groups(tmp_path / "groups" / "validation")
    groups = [held[n] for n in range(len(held))]
    merged = np.concatenate(score_groups(load_model(str(done.model), ModelSettings()).model, groups, BatchSettings()))
    from rayward import adapters

    model = load_model(str(tmp_path / "start"), ModelSettings()).model
    untrained = np.concatenate(score_groups(model, groups, BatchSettings()))
    adapters.add(model.classifier, "score", LORA)
    checkpoints.load(checkpoints.best(tmp_path / "run")[0], model.classifier, None)
    adapted = np.concatenate(score_groups(model, groups, BatchSettings()))
    np.testing.assert_allclose(merged, adapted, rtol=1e-5, atol=1e-5)
    assert np.abs(adapted - untrained).max() > 1e-3
    assert Scorer.load(done.model)([toy_examples("pairs", 20)[0]])


def test_a_checkpoint_with_adapters_holds_what_is_trained_alone_and_a_run_goes_on_from_it(pairs: Dataset, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    _, _, whole = lora_fit(pairs, tmp_path / "whole")
    names = load_file(checkpoints.steps(tmp_path / "whole" / "run")[-1] / "model.safetensors").keys()
    assert all("lora_" in n or n.startswith("score") for n in names)

    def crash(line: dict[str, float]) -> None:
        if line["step"] == 5:
            raise Crash

    settings = fit_settings(pairs, lora=LORA)
    with pytest.raises(Crash):
        fit(settings, str(tmp_path / "broken"), report=crash)
    done = fit(settings, str(tmp_path / "broken"))
    again = load_file(done.model / "model.safetensors")
    assert all(torch.equal(again[name], whole[name]) for name in whole)
    assert fit(settings, str(tmp_path / "broken")) == done


def test_adapters_that_fit_nothing_name_what_there_is(pairs: Dataset, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    with pytest.raises(ModelError, match=r"lora.targets=wq,wk fits nothing(.|\n)*down_proj, .*q_proj"):
        fit(fit_settings(pairs, lora=replace(LORA, targets="wq,wk")), str(tmp_path))


def test_settings_of_no_adapter_are_refused() -> None:
    with pytest.raises(ValueError, match="rank=0 means none"):
        LoraSettings(alpha=8.0)


def test_a_model_with_adapters_goes_on_as_the_start_of_another(pairs: Dataset, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    first, _, kept = lora_fit(pairs, tmp_path / "first")
    second = fit(fit_settings(pairs, model=str(first.model), lora=LORA, train=replace(TRAIN, epochs=1, lr=1e-9)), str(tmp_path / "second"))
    now = load_file(second.model / "model.safetensors")
    assert all(torch.allclose(now[name], kept[name], atol=1e-6) for name in kept)  # it began with the merged weights, head and all


def test_ctrl_c_waits_for_the_checkpoint_that_is_being_written(sides: tuple[Path, Path], tmp_path: Path) -> None:
    import os
    import signal

    run = a_run(sides, tmp_path, TRAIN)

    def interrupt(line: dict[str, float]) -> None:
        if line["step"] == 3 and "loss" in line:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match=r"step \d of 8 is kept"):
        train(replace(run, report=interrupt))
    assert checkpoints.steps(tmp_path)
    assert not list(tmp_path.glob(".*partial*"))


def test_a_body_in_four_bits_is_unpacked_when_its_adapters_are_merged(pairs: Dataset, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes", reason="a body in 4 bits needs bitsandbytes: pip install 'rayward[lora]'")
    from rayward import adapters
    from rayward.fitting import load_start

    settings = fit_settings(pairs, net=ModelSettings(width=64), lora=LoraSettings(rank=4, bits=4), train=replace(TRAIN, lr=5e-3))
    done = fit(settings, str(tmp_path))
    loaded = load_model(str(done.model), ModelSettings())
    assert "quantization_config" not in loaded.model.classifier.config.to_dict()
    held = Groups(tmp_path / "groups" / "validation")
    groups = [held[n] for n in range(len(held))]
    merged = np.concatenate(score_groups(loaded.model, groups, BatchSettings()))
    model = load_start(tmp_path, settings).model
    packed = {name for name, p in model.classifier.named_parameters() if getattr(p, "quant_state", None) is not None}
    assert packed == {name for name, _ in model.classifier.named_parameters() if "_proj." in name}
    assert {model.classifier.get_parameter(name).dtype for name in packed} == {torch.uint8}
    assert type(model.head) is torch.nn.Linear
    assert model.head.weight.dtype == torch.float32
    adapters.add(model.classifier, "score", settings.lora)
    checkpoints.load(checkpoints.best(tmp_path / "run")[0], model.classifier, None)
    np.testing.assert_allclose(merged, np.concatenate(score_groups(model, groups, BatchSettings())), rtol=1e-4, atol=1e-4)


def test_a_head_of_two_layers_is_trained_itself_and_has_no_adapter(pairs: Dataset, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    done = fit(fit_settings(pairs, lora=LORA, net=replace(NET, head_layers=2)), str(tmp_path))
    names = load_file(checkpoints.steps(tmp_path / "run")[-1] / "model.safetensors").keys()
    assert {n for n in names if n.startswith("score")} == {"score.0.weight", "score.0.bias", "score.2.weight", "score.2.bias"}
    assert fit(fit_settings(pairs, lora=LORA, net=replace(NET, head_layers=2)), str(tmp_path)) == done
