"""Heads that other projects wrote: found by the names of their weights, loaded as they are.

    score.weight                              TRL's RewardTrainer, OpenRLHF, open-instruct, anything made for sequence classification
    score.weight, score.bias                  TRL's PRMTrainer: a token classifier, whose head has a bias (two outputs)
    value_head.weight                         OpenRLHF, before its head was called `score`
    score.0.*, score.2.*                      Qwen2.5-Math-PRM (two outputs) and Qwen2.5-Math-RM (one): two layers
    v_head.summary.*                          TRL's value head on a language model
    v_head.summary.* beside the weights       LLaMA-Factory: the same in a file value_head.safetensors

Hugging Face's class would leave all but the first in the file and give a fresh head instead. A head comes into the class under the
class's own name for it, and is saved under that name. A score is what the head says: the mean and deviation that OpenRLHF writes into
a config are not applied, so that a difference of scores stays the log-odds that it was trained to be.

>>> layout_of({"model.norm.weight", "score.0.weight", "score.0.bias", "score.2.weight", "score.2.bias"})
('score.', 2)
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from rayward.errors import ModelError

PREFIXES = ("score.", "classifier.", "value_head.", "v_head.summary.")
BESIDE = "value_head.safetensors"
_DEEP = {"0.weight", "0.bias", "2.weight", "2.bias"}

# What cannot be loaded: a file that gives it away -> what it is, and the way out
REFUSED: dict[str, tuple[str, str]] = {
    "value_head.bin": (
        "its head is in value_head.bin, a pickle, and pickles are not opened",
        "save it again as safetensors, e.g. safetensors.torch.save_file(torch.load('value_head.bin'), 'value_head.safetensors')",
    ),
    "adapter_config.json": (
        "it is an adapter without the model that it adapts",
        "merge it into its base first: peft's merge_and_unload(), then save_pretrained() with the tokenizer",
    ),
}


@dataclass(frozen=True)
class StoredHead:
    """A head as it lies in a checkpoint."""

    prefix: str
    layers: int  # 1, or 2 with a ReLU between them
    outputs: int
    width: int  # what its first layer reads
    files: Mapping[str, str]  # name of a weight without the prefix -> its file

    def names(self, own: str) -> set[str]:
        """What its weights are called once they are in a class that calls its head `own`."""
        return {f"{own}.{name}" for name in self.files}

    def load(self) -> nn.Module:
        """The head, in float32."""
        weights: dict[str, Tensor] = {}
        for name, file in self.files.items():
            with safe_open(file, "pt") as tensors:
                weights[name] = tensors.get_tensor(self.prefix + name).float()
        if self.layers == 1:
            head: nn.Module = nn.Linear(self.width, self.outputs, bias="bias" in weights)
        else:
            hidden = len(weights["0.bias"])
            head = nn.Sequential(nn.Linear(self.width, hidden), nn.ReLU(), nn.Linear(hidden, self.outputs))
        head.load_state_dict(weights)
        return head


def layout_of(names: Collection[str]) -> tuple[str, int] | None:
    """Prefix and layers of the head among the names of weights; None where there is none of a kind that is known."""
    for prefix in PREFIXES:
        own = {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
        if own == {"weight"} or own == {"weight", "bias"}:
            return prefix, 1
        if own == _DEEP:
            return prefix, 2
    return None


def stored_head(path: str, may_be_fresh: bool = False) -> StoredHead | None:
    """The head that a folder, or a model on the hub, has; None where it has none, or one that only its own class knows.

    Raises:
        ModelError: if it has one that cannot be loaded (REFUSED), and none may take its place; or if it is no whole model.
    """
    where = files_of(path)
    found = layout_of(where)
    if not found:
        _refuse(path, {"value_head.bin": not may_be_fresh, "adapter_config.json": not where})
        return None
    prefix, layers = found
    files = {name.removeprefix(prefix): file for name, file in where.items() if name.startswith(prefix)}
    _, width = _shape(files, prefix, "weight" if layers == 1 else "0.weight")
    outputs, _ = _shape(files, prefix, "weight" if layers == 1 else "2.weight")
    return StoredHead(prefix, layers, outputs, width, files)


def files_of(path: str) -> dict[str, str]:
    """Name of a weight -> its file, over all of a checkpoint; {} where it has no safetensors."""
    index = _file(path, "model.safetensors.index.json")
    if index:
        said = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
        files = {shard: _file(path, shard) for shard in sorted(set(said.values()))}
        where = {name: file for name, shard in said.items() if (file := files[shard])}
    else:
        where = _names(_file(path, "model.safetensors"))
    return where if layout_of(where) else {**where, **_names(_file(path, BESIDE))}


def stored_tensor(path: str, name: str) -> Tensor | None:
    """A weight of a folder, or of a model on the hub, by its name; None where it has none of that name."""
    where = files_of(path)
    if name not in where:
        return None
    with safe_open(where[name], "pt") as tensors:
        return tensors.get_tensor(name).float()


def _names(file: str | None) -> dict[str, str]:
    if not file:
        return {}
    with safe_open(file, "pt") as tensors:
        return dict.fromkeys(tensors.keys(), file)


def _shape(files: Mapping[str, str], prefix: str, name: str) -> tuple[int, int]:
    with safe_open(files[name], "pt") as tensors:
        rows, columns = tensors.get_slice(prefix + name).get_shape()
    return rows, columns


def _file(path: str, name: str) -> str | None:
    from transformers.utils import cached_file

    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_gated_repo": False}
    return cached_file(path, name, _raise_exceptions_for_connection_errors=False, **quiet)


def _refuse(path: str, matters: Mapping[str, bool]) -> None:
    for name, (why, way_out) in REFUSED.items():
        if matters[name] and _file(path, name):
            raise ModelError(f"--model {path} cannot be loaded: {why}", way_out)


def drop_normaliser(config: Any) -> None:
    """Take OpenRLHF's mean and deviation of rewards out of a config: they are of a head that is about to change."""
    if hasattr(config, "normalize_reward") or hasattr(config, "value_head_prefix"):
        for name in ("mean", "std", "normalize_reward", "value_head_prefix"):
            if hasattr(config, name):
                delattr(config, name)


@torch.no_grad()
def adopt(classifier: nn.Module, own: str, stored: StoredHead) -> bool:
    """Put a stored head into a class that calls its head `own`, where the class did not find it by itself; whether it did."""
    there = getattr(classifier, own)
    if not isinstance(there, nn.Linear):
        return False
    known = stored.prefix == f"{own}." and set(stored.files) == set(there.state_dict())
    if known and stored.width == there.in_features:
        return False
    setattr(classifier, own, stored.load().to(there.weight.device))
    return True
