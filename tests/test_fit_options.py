"""Runs that are hindered: killed, stopped, out of room, on groups that shrink; and settings beside one another."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rayward import adapters, checkpoints
from rayward.adapters import LoraSettings
from rayward.batching import BatchSettings
from rayward.checkpoints import Writer
from rayward.errors import RaywardError, SettingsError
from rayward.fitting import FitSettings, fit
from rayward.optimizers import head_parts
from rayward.rendering import RenderSettings
from rayward.reward_model import ModelSettings, RewardModel
from rayward.storage import Dataset
from rayward.training import TrainSettings, freeze
from tiny import classifier, toy_dataset

torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parents[1]
TRAIN = TrainSettings(epochs=2, lr=2e-3, log_every=1, validate_every=2, checkpoint_every=2)
LORA = LoraSettings(rank=4)


class Crash(Exception):
    """What stands for a lost machine."""


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return toy_dataset("pairs", tmp_path_factory.mktemp("pairs"), problems=60)


def settings_of(examples: Dataset, **changes: Any) -> FitSettings:
    usual = FitSettings(
        examples=str(examples.path),
        model="tiny",
        objective="auto",
        net=ModelSettings(width=32),
        render=RenderSettings(max_length=128),
        batch=BatchSettings(size=8),
        train=TRAIN,
        validation_share=0.2,
    )
    return replace(usual, **changes)


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "model" / "model.safetensors")


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def lines(output: Path) -> list[dict[str, float]]:
    read = [json.loads(line) for line in (output / "run" / "metrics.jsonl").read_text().splitlines()]
    return [{n: v for n, v in line.items() if n != "tokens_per_s"} for line in read]


def hidden(output: Path) -> list[str]:
    """What a run left half done."""
    return [str(p) for p in output.rglob("*") if p.name.startswith(".") or "partial" in p.name]


# ------------------------------------------------------------------------------------------------- settings beside one another

BESIDE: list[tuple[str, dict[str, Any]]] = [
    ("recompute", {"train": replace(TRAIN, recompute=True)}),
    ("everything", {"train": replace(TRAIN, schedule="wsd", layer_decay=0.9, freeze_layers=1, average=0.9, patience=5, recompute=True)}),
    ("adapters", {"lora": replace(LORA, dropout=0.1), "train": replace(TRAIN, average=0.9, freeze_layers=1, recompute=True)}),
    ("deep head", {"lora": LORA, "net": ModelSettings(width=32, head_layers=2), "train": replace(TRAIN, layer_decay=0.8, average=0.9)}),
    ("head alone", {"train": replace(TRAIN, freeze_layers=-1, average=0.5, schedule="linear", recompute=True)}),
    ("last", {"lora": LORA, "train": replace(TRAIN, average=0.9, best_by="last")}),
]


@pytest.mark.parametrize(("name", "changes"), BESIDE)
def test_settings_beside_one_another_go_on_after_a_crash(name: str, changes: dict[str, Any], pairs: Dataset, tmp_path: Path) -> None:
    if "lora" in changes:
        pytest.importorskip("peft")
    settings = settings_of(pairs, **changes)
    whole = fit(settings, str(tmp_path / "whole"))

    def crash(line: dict[str, float]) -> None:
        if line["step"] == 5:
            raise Crash

    with pytest.raises(Crash):
        fit(settings, str(tmp_path / "broken"), report=crash)
    done = fit(settings, str(tmp_path / "broken"))
    assert done.metrics == whole.metrics
    assert equal(weights(tmp_path / "broken"), weights(tmp_path / "whole"))
    assert lines(tmp_path / "broken") == lines(tmp_path / "whole")
    assert not hidden(tmp_path / "broken")
    assert fit(settings, str(tmp_path / "broken")) == done


def test_recomputing_changes_no_bit(pairs: Dataset, tmp_path: Path) -> None:
    fit(settings_of(pairs), str(tmp_path / "plain"))
    fit(settings_of(pairs, train=replace(TRAIN, recompute=True)), str(tmp_path / "again"))
    assert equal(weights(tmp_path / "plain"), weights(tmp_path / "again"))


def test_adapters_that_would_all_be_frozen_are_refused(pairs: Dataset, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    with pytest.raises(SettingsError, match=r"freeze_layers=-1 leaves no layer where lora.rank=4(.|\n)*leave one"):
        fit(settings_of(pairs, lora=LORA, train=replace(TRAIN, freeze_layers=-1)), str(tmp_path))


def test_offloading_what_is_not_kept_or_already_there_is_refused(pairs: Dataset, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="offload=true is about what recompute=true keeps"):
        TrainSettings(offload=True)
    if not torch.cuda.is_available():
        with pytest.raises(SettingsError, match=r"there is no GPU(.|\n)*leave it out"):
            fit(settings_of(pairs, train=replace(TRAIN, recompute=True, offload=True)), str(tmp_path))


def test_a_run_with_another_of_the_new_settings_is_refused(pairs: Dataset, tmp_path: Path) -> None:
    fit(settings_of(pairs), str(tmp_path))
    with pytest.raises(SettingsError, match=r"train.average: 0.0 -> 0.5; train.schedule: cosine -> wsd"):
        fit(settings_of(pairs, train=replace(TRAIN, average=0.5, schedule="wsd")), str(tmp_path))


PARTS = [
    ("qwen3", {"score"}),
    ("gpt2", {"score"}),
    ("bert", {"classifier", "bert.pooler"}),
    ("roberta", {"classifier"}),
    ("deberta-v2", {"classifier", "pooler"}),
    ("modernbert", {"classifier", "head"}),
]


@pytest.mark.parametrize(("kind", "parts"), PARTS)
def test_what_is_new_with_a_head_is_never_frozen(kind: str, parts: set[str]) -> None:
    pytest.importorskip("peft")
    for how in ("frozen", "adapted"):
        model = RewardModel(classifier(kind))
        assert set(head_parts(model.classifier, model.head_name)) == parts
        if how == "frozen":
            freeze(model, -1)
        else:
            adapters.add(model.classifier, model.head_name, LoraSettings(rank=2))
        trained = {n for n, p in model.classifier.named_parameters() if p.requires_grad and "lora_" not in n}
        assert trained == {n for n, _ in model.classifier.named_parameters() if any(n.startswith(p + ".") for p in parts)}
        assert not [n for n, _ in model.classifier.named_parameters() if "lora_" in n and any(n.startswith(p + ".") for p in parts)]


# ----------------------------------------------------------------------------------------------------------- writing checkpoints


def stepped(width: int = 64) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A layer and its optimizer after a step."""
    torch.manual_seed(0)
    model = torch.nn.Linear(width, width)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, width)).sum().backward()
    optimizer.step()
    return model, optimizer


def test_an_error_while_a_checkpoint_is_written_leaves_it_whole(tmp_path: Path) -> None:
    model, optimizer = stepped(1500)  # 27 MB: still being written when the error comes
    with pytest.raises(Crash), Writer(tmp_path) as writer:
        writer.save("step-00000001", model, optimizer, {"step": 1})
        raise Crash
    [kept] = checkpoints.steps(tmp_path)
    other, its = stepped(1500)
    torch.nn.init.zeros_(other.weight)  # type: ignore[arg-type]
    assert checkpoints.load(kept, other, its)["step"] == 1
    assert torch.equal(other.weight, model.weight)  # type: ignore[arg-type]
    assert not hidden(tmp_path)


def test_what_is_not_copied_is_the_same_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = stepped()
    average = {name: p.detach() * 0.5 for name, p in model.named_parameters()}
    for name, most in (("copied", 2**30), ("waited", 0)):
        monkeypatch.setattr(checkpoints, "COPIED", most)
        with Writer(tmp_path / name) as writer:
            writer.save("step-00000001", model, optimizer, {"step": 1}, average)
            if not most:
                assert checkpoints.steps(tmp_path / name)  # it is there when training goes on
    copied, waited = ({p.name: p.read_bytes() for p in (tmp_path / n / "step-00000001").iterdir()} for n in ("copied", "waited"))
    assert copied == waited
    assert len(copied) == 4


def test_a_full_disk_ends_the_run_and_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    model, optimizer = stepped(300)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Writer(tmp_path) as writer:
        writer.save("step-00000001", model, optimizer, {"step": 1})
    with pytest.raises(RaywardError, match=r"step-00000002 cannot be written(.|\n)*make room(.|\n)*goes on from step-00000001"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        try:
            with Writer(tmp_path) as writer:
                writer.save("step-00000002", model, optimizer, {"step": 2})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in checkpoints.steps(tmp_path)] == ["step-00000001"]
    assert not hidden(tmp_path)


def test_both_errors_are_told_where_there_are_two(tmp_path: Path) -> None:
    model, optimizer = stepped()
    (tmp_path / "run").write_text("a file where a folder should be")
    with pytest.raises(Crash) as caught, Writer(tmp_path / "run") as writer:
        writer.save("step-00000001", model, optimizer, {"step": 1})
        raise Crash
    assert "step-00000001 cannot be written" in caught.value.__notes__[0]


def test_what_a_killed_run_left_is_tidied_and_the_best_comes_back(tmp_path: Path) -> None:
    model, _ = stepped()
    with Writer(tmp_path) as writer:
        writer.save("best", model, None, {"step": 3})
    (tmp_path / "best").rename(tmp_path / ".best.old")  # killed between the two renames
    (tmp_path / ".best.partial").mkdir()
    (tmp_path / ".step-00000007.partial").mkdir()
    Writer(tmp_path, rank=1)
    assert not (tmp_path / "best").exists()  # the first worker alone does it
    Writer(tmp_path)
    assert checkpoints.read_state(tmp_path / "best") == {"step": 3}
    assert not hidden(tmp_path)
