"""The whole state of a training run in one folder, written aside and renamed; no pickle in it.

    FOLDER/
      step-00000120/  model.safetensors  optimizer.safetensors  state.json     the last two, to go on from
      best/           model.safetensors  state.json                            the best on validation

The learning rate, the order of the examples and every random number are functions of the step, so they need no state.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from rayward.errors import DataError
from rayward.storage import publish, sibling

KEEP = 2  # checkpoints to go on from: the last, and the one before should the last be damaged


def save(folder: Path, name: str, model: nn.Module, optimizer: torch.optim.Optimizer | None, state: Mapping[str, Any]) -> None:
    """Write FOLDER/NAME, whole or not at all."""
    target = folder / name
    stage = sibling(target, "partial")
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir(parents=True)
    save_file(unique_tensors(model), stage / "model.safetensors")
    if optimizer is not None:
        tensors, plain = flat_optimizer(optimizer)
        save_file(tensors, stage / "optimizer.safetensors")
        state = {**state, "optimizer": plain}
    (stage / "state.json").write_text(json.dumps(state, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    publish(stage, target)
    for old in steps(folder)[:-KEEP]:
        shutil.rmtree(old, ignore_errors=True)


def unique_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state of a model by name; of tensors that share memory (tied weights) the first."""
    seen: dict[int, str] = {}
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        if tensor.numel() and tensor.data_ptr() in seen:
            continue
        seen[tensor.data_ptr()] = name
        tensors[name] = tensor.detach().cpu().contiguous()
    return tensors


def flat_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The state of an optimizer as named tensors and plain values."""
    tensors: dict[str, torch.Tensor] = {}
    plain: dict[str, Any] = {}
    for number, entries in optimizer.state_dict()["state"].items():
        for name, value in entries.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{number}.{name}"] = value.detach().cpu().contiguous()
            else:
                plain[f"{number}.{name}"] = value
    return tensors, plain


def steps(folder: Path) -> list[Path]:
    """Checkpoints to go on from, oldest first."""
    return sorted(p for p in folder.glob("step-*") if (p / "state.json").is_file())


def read_state(path: Path) -> dict[str, Any]:
    """The state.json of a checkpoint."""
    try:
        return json.loads((path / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> DataError:
    if isinstance(error, DataError):
        return error
    return DataError(f"checkpoint {path} cannot be read: {error}", "delete that folder; the run goes on from the one before")


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    """Put a checkpoint into a model and an optimizer; returns its state.json."""
    try:
        state = read_state(path)
        weights = load_file(path / "model.safetensors")
        entries = load_file(path / "optimizer.safetensors") if optimizer is not None else {}
    except Exception as error:  # safetensors raises its own kind, the disk another
        raise _damaged(path, error) from error
    unexpected = model.load_state_dict(weights, strict=False).unexpected_keys
    assert not unexpected, f"{path} holds weights this model has no place for: {unexpected[:3]}"
    if optimizer is not None:
        whole = optimizer.state_dict()
        for key, value in {**entries, **state.pop("optimizer")}.items():
            number, name = key.split(".", 1)
            whole["state"].setdefault(int(number), {})[name] = value
        optimizer.load_state_dict(whole)
    return state
