"""What the workers of a spread model (`train.shard`) begin with: each builds the model without its numbers, and reads its share of them.

    OUTPUT/spread/
      rest.safetensors   what does not lie in the model's files as it is in the model: buffers, adapters, weights that a class keeps in
                         another form than its files (the experts of a mixture)
      seen.json          what was seen of the body when it was run, which a model without numbers cannot be; or why workers read it whole

The process that starts the workers has the model, so nothing here is assumed: a tensor is read from the model's files if it was seen to
be equal to the one there, and the model without numbers was built once and has the same tensors.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from rayward import foreign, places
from rayward.errors import RaywardError
from rayward.fitting.settings import FitSettings
from rayward.fitting.starting import for_training, load_start, start_of
from rayward.fitting.working_copy import SPREAD, push
from rayward.mirror import Mirror
from rayward.reward_model import Loaded, Seen, Traits, is_bf16
from rayward.sharding import Rows, all_tensors, fill, shard

REST, SEEN = "rest.safetensors", "seen.json"
MUCH = 2**30  # bytes of a disk that are worth a word


def make_spread(folder: Path, mirror: Mirror | None, settings: FitSettings, loaded: Loaded) -> None:
    """Leave in OUTPUT/spread what workers begin with, once; `loaded` is ready for training."""
    if (folder / SPREAD / SEEN).is_file():
        return
    seen, mine = loaded.model.seen, all_tensors(loaded.model.classifier)
    why = _why_whole(folder, settings, loaded, seen)
    places.remove(folder / SPREAD)
    (folder / SPREAD).mkdir()
    if why:
        print(f"every worker reads the whole model into the host's memory: {why}")
    else:
        stored = _Stored(start_of(folder, settings))
        rest = {name: tensor.detach() for name, tensor in mine.items() if not stored.holds(name, tensor)}
        save_file({name: _own(tensor) for name, tensor in rest.items()}, folder / SPREAD / REST)
        much = sum(tensor.nbytes for tensor in rest.values())
        if much > MUCH:
            print(f"{much / 2**30:.2f} GiB of weights have another form in the model's files, and are kept in {folder / SPREAD}")
    said = {"traits": list(seen.traits), "segmented": seen.segmented, "parts": list(seen.parts), "whole": why}
    places.write(folder / SPREAD / SEEN, json.dumps(said, indent=2) + "\n")
    if mirror is not None:
        push(mirror, SPREAD)


def _own(tensor: Tensor) -> Tensor:
    """A tensor with memory of its own, which is what a file can hold; a weight has it already."""
    return tensor.contiguous() if isinstance(tensor, nn.Parameter) else tensor.clone().contiguous()


def _why_whole(folder: Path, settings: FitSettings, loaded: Loaded, seen: Seen) -> str:
    """Why a model cannot be built without its numbers; empty where it can."""
    classifier: nn.Module = loaded.model.classifier
    if len(list(classifier.named_parameters(remove_duplicate=False))) > len(list(classifier.parameters())):
        return "it has weights of two names"
    try:
        hollow: nn.Module = _hollow(folder, settings, seen).model.classifier
    except (RaywardError, RuntimeError, NotImplementedError, ValueError, TypeError, AttributeError) as error:
        return f"it cannot be built without its weights ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
    loose = [name for module in hollow.modules() for name, v in vars(module).items() if isinstance(v, Tensor) and v.is_meta]
    if loose:
        return f"it holds tensors that are neither weights nor buffers ({', '.join(sorted(set(loose))[:3])})"
    if _forms(hollow) != _forms(classifier):
        return "built without its weights it is another one"
    return ""


def _forms(module: nn.Module) -> dict[str, tuple[Any, ...]]:
    return {name: (tensor.shape, tensor.dtype, tensor.requires_grad) for name, tensor in all_tensors(module).items()}


def _hollow(folder: Path, settings: FitSettings, seen: Seen) -> Loaded:
    """The model that training begins with, on torch's meta device."""
    return for_training(load_start(folder, settings, seen), settings)


def load_spread(folder: Path, settings: FitSettings, device: torch.device) -> Loaded:
    """The model that training begins with, spread over the workers; every one of them must call it."""
    said = json.loads((folder / SPREAD / SEEN).read_text(encoding="utf-8"))
    bf16 = is_bf16(device, settings.train.precision)
    if said["whole"]:
        loaded = for_training(load_start(folder, settings), settings)
        shard(loaded.model.classifier.base_model, device, bf16)
        loaded.model.to(device)
        return loaded
    loaded = _hollow(folder, settings, Seen(Traits(*said["traits"]), said["segmented"], tuple(said["parts"])))
    shard(loaded.model.classifier.base_model, device, bf16)
    fill(loaded.model.classifier, device, _Stored(start_of(folder, settings), folder / SPREAD / REST).read)
    return loaded


class _Stored:
    """The tensors that lie in a model's files, and those of the rest."""

    def __init__(self, path: str, rest: Path | None = None):
        self.files: dict[str, Any] = {}
        self.where = foreign.files_of(path)
        self.rest = set(self._open(str(rest)).keys()) if rest is not None else set()
        self.rest_file = str(rest)

    def _open(self, file: str) -> Any:
        if file not in self.files:
            self.files[file] = safe_open(file, "pt")
        return self.files[file]

    def holds(self, name: str, tensor: Tensor) -> bool:
        """Whether a tensor of the model lies in a file as it is."""
        file = self.where.get(stored_name(name))
        if file is None:
            return False
        there = self._open(file)
        if there.get_slice(stored_name(name)).get_shape() != list(tensor.shape):
            return False
        return torch.equal(there.get_tensor(stored_name(name)).to(tensor.dtype), tensor.detach().cpu())

    def read(self, name: str, rows: Rows | None) -> Tensor:
        """A tensor, or some rows of it."""
        if name in self.rest:
            there, called = self._open(self.rest_file), name
        else:
            there, called = self._open(self.where[stored_name(name)]), stored_name(name)
        return there.get_tensor(called) if rows is None else there.get_slice(called)[rows[0] : rows[0] + rows[1]]


def stored_name(name: str) -> str:
    """What a weight is called in the model's files: every adapter that stands beside it puts it a level lower.

    >>> stored_name("model.layers.0.mlp.up_proj.base_layer.weight"), stored_name("experts.base_layer.base_layer.gate_up_proj")
    ('model.layers.0.mlp.up_proj.weight', 'experts.gate_up_proj')
    """
    return re.sub(r"(\.base_layer)+\.", ".", name)
