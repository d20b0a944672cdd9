"""The whole state of a training run in one folder, written aside and renamed; no pickle in it.

    FOLDER/
      step-00000120/  model.safetensors  optimizer.safetensors  average.safetensors  state.json     the last two, to go on from
      best-00000100/  model.safetensors  state.json                                                 the best on validation

A folder never changes once it has its name. Which ones are the best says the state of the step-*; those that no state names go.

Only weights that are trained are written: the frozen ones of a body under LoRA lie where the run started from. They are copied, and
written by a thread while training goes on, one write at a time; a run ends with all of them on disk, also one that an error ends. More
than COPIED bytes are not copied: training waits while they are written. What has its name is on the disk for good (fsync). A run at a
URL (`mirror`) sends each one there when it is whole, in the same thread, its state.json last.

The learning rate, the order of the examples and every random number are functions of the step, so they need no state.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from rayward import places, sharding
from rayward.errors import DataError, RaywardError
from rayward.mirror import Mirror, patiently
from rayward.places import Place
from rayward.storage import publish, sibling

KEEP = 2  # checkpoints to go on from: the last, and the one before should the last be damaged
COPIED = 4 * 2**30  # bytes of a checkpoint that are copied at most, so that training need not wait for the disk


class Writer:
    """Writes checkpoints into FOLDER, one at a time, while training goes on. Every worker calls it; the first one writes.

    `with Writer(...)` ends with nothing left to write, whatever ended it. Where a model is spread over workers (`sharded`), they put
    the weights together, a tensor at a time, for a checkpoint of weights alone, and write one to go on from together, each its share.
    With `mirror` checkpoints also go to a URL, and the workers need share no disk.
    """

    def __init__(self, folder: Path, rank: int = 0, sharded: bool = False, mirror: Mirror | None = None):
        self.folder, self.rank, self.sharded, self.mirror = folder, rank, sharded, mirror
        self._thread: threading.Thread | None = None
        self._failed: list[Exception] = []
        if rank == 0:
            _tidy(folder)
            if mirror is not None:
                _tidy_mirror(mirror)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self.wait()
        except RaywardError as unwritten:
            if error is None:
                raise
            error.add_note(str(unwritten))

    def save(
        self,
        name: str,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        state: Mapping[str, Any],
        average: Mapping[str, torch.Tensor] | None = None,
        best: Iterable[int] = (),
    ) -> None:
        """Begin to write FOLDER/NAME as things are now; it is there whole or not at all.

        Weights kept as among the best go when neither `best` (steps) nor a checkpoint to go on from names them.
        """
        if self.sharded and optimizer is not None:
            return self._save_shards(name, model, optimizer, state, average)
        if self.sharded:
            return self._save_together(self.folder / name, model, _said(state), set(best))
        if self.rank:
            return None
        files = {"model.safetensors": trained_tensors(model)}
        if optimizer is not None:
            files["optimizer.safetensors"], plain = flat_optimizer(optimizer)
            state = {**state, "optimizer": plain}
        if average is not None:
            files["average.safetensors"] = dict(average)
        self.wait()
        if sum(t.nbytes for tensors in files.values() for t in tensors.values()) > COPIED:
            self._write(self.folder / name, files, _said(state), set(best))
            return self.wait()
        copies = {file: {n: t.detach().to("cpu", copy=True).contiguous() for n, t in tensors.items()} for file, tensors in files.items()}
        self._thread = threading.Thread(target=self._write, args=(self.folder / name, copies, _said(state), set(best)))
        self._thread.start()
        return None

    def _save_together(self, target: Path, model: nn.Module, state: str, best: set[int]) -> None:
        """Write weights that lie on all workers while they are put together, a tensor at a time; what is left to do is done by a thread."""
        self.wait()
        stage = target.with_name(f".{target.name}.partial")
        if self.rank == 0:
            shutil.rmtree(stage, ignore_errors=True)
            stage.mkdir(parents=True)
        try:
            sharding.write_whole(stage / "model.safetensors", trained_tensors(model))
        except OSError as error:
            shutil.rmtree(stage, ignore_errors=True)
            raise _unwritten(target, error) from error
        if self.rank == 0:
            self._thread = threading.Thread(target=self._write, args=(target, {}, state, best))
            self._thread.start()

    def _save_shards(
        self, name: str, model: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any], average: Mapping[str, Any] | None
    ) -> None:
        self.wait()
        target = self.folder / name
        stage = sibling(target, "partial")
        if self.rank == 0:
            shutil.rmtree(stage, ignore_errors=True)
            stage.mkdir(parents=True)
            if self.mirror is not None:
                self.mirror.remove(name)
        elif self.mirror is not None:
            for sent in set(self.folder.glob(".step-*.partial")) - {stage}:  # left on a disk that the first worker does not see
                shutil.rmtree(sent, ignore_errors=True)
        try:
            sharding.save(stage, _all_tensors(model, optimizer, average))  # begins and ends with all workers together
            if self.mirror is not None:
                self._send_shards(stage, target.name)
            if self.rank == 0:
                (stage / "state.json").write_text(_said(state), encoding="utf-8")
                self._finish(stage, target, set())
        except Exception as error:  # torch's own kind holds the error of every worker
            if self.rank == 0:
                shutil.rmtree(stage, ignore_errors=True)
            raise _unwritten(target, error) from error

    def _send_shards(self, stage: Path, name: str) -> None:
        """Send this worker's share: on a disk of its own nobody else could. The first one goes on when all are there."""
        assert self.mirror is not None
        mine = (stage / sharding.SHARDS).glob(f"__{self.rank}_*")
        for file in sorted((*mine, stage / sharding.SHARDS / ".metadata") if self.rank == 0 else mine):
            to = self.mirror.there / name / sharding.SHARDS / file.name
            patiently(partial(places.send, file, to), to)
        sharding.meet()

    def wait(self) -> None:
        """Until what was begun is on disk; an error of the writing is raised here."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failed:
            raise self._failed.pop()

    def _write(self, target: Path, files: Mapping[str, Mapping[str, torch.Tensor]], state: str, best: set[int]) -> None:
        stage = target.with_name(f".{target.name}.partial")
        try:
            if files:
                shutil.rmtree(stage, ignore_errors=True)
                stage.mkdir(parents=True)
            for file, tensors in files.items():
                save_file({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, stage / file)
            (stage / "state.json").write_text(state, encoding="utf-8")
            self._finish(stage, target, best)
        except Exception as error:  # raised by the next wait, in the thread of the training; safetensors has its own kind
            shutil.rmtree(stage, ignore_errors=True)
            self._failed.append(_unwritten(target, error))

    def _finish(self, stage: Path, target: Path, best: set[int]) -> None:
        publish(stage, target)
        if self.mirror is not None:  # of a spread model only this worker's share lies here, and all shares are there already
            spread = (target / sharding.SHARDS).is_dir()
            self.mirror.send("metrics.jsonl", f"{target.name}/state.json" if spread else target.name)
        kept = steps(self.folder)[-KEEP:]
        needed = best | {entry["step"] for path in kept for entry in read_state(path).get("kept") or ()}
        for old in _outlived([path.name for path in self.folder.iterdir()], needed):
            places.remove(self.folder / old)
        if self.mirror is not None:  # which may hold what another node sent
            for old in _outlived(self.mirror.whole(), needed):
                self.mirror.remove(old)


def _tidy(folder: Path) -> None:
    """Take away what a killed run left half done; of what it was about to replace, the former comes back."""
    for old in folder.glob(".*.old"):
        name = folder / old.name.removeprefix(".").removesuffix(".old")
        if not name.exists():
            old.rename(name)
    for left in (*folder.glob(".*.partial"), *folder.glob(".*.old"), *folder.glob(f"{places.ASIDE}*")):
        shutil.rmtree(left, ignore_errors=True)


def _tidy_mirror(mirror: Mirror) -> None:
    """Take away what was half sent: what has no state.json is no checkpoint."""
    whole = set(mirror.whole())
    for name in sorted(mirror.names() - whole):
        if name.startswith(("step-", "best-", "last")):
            mirror.remove(name)


def _outlived(names: Iterable[str], needed: set[int]) -> list[str]:
    """Of the names of checkpoints those that may go: all but the last to go on from, and the best of the steps that are needed.

    >>> _outlived(["step-00000002", "step-00000004", "step-00000006", "best-00000002", "best-00000006", "last"], {6})
    ['step-00000002', 'best-00000002']
    """
    ordered = sorted(names)
    bests = [name for name in ordered if name.startswith("best-") and int(name.removeprefix("best-")) not in needed]
    return [name for name in ordered if name.startswith("step-")][:-KEEP] + bests


def _unwritten(target: Path, error: Exception) -> RaywardError:
    if isinstance(error, RaywardError):  # of the URL, with its own way out
        return error
    kept = steps(target.parent)
    start = f"goes on from {kept[-1].name}" if kept else "begins anew"
    return RaywardError(f"checkpoint {target} cannot be written: {error}\n  -> make room on that disk; the same command {start}")


def _said(state: Mapping[str, Any]) -> str:
    return json.dumps(state, indent=2, sort_keys=True) + "\n"


def _all_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, average: Mapping[str, torch.Tensor] | None) -> dict[str, torch.Tensor]:
    """Everything a run goes on from, by name; spread over workers where the model is."""
    named = {"model": trained_tensors(model), "optimizer": sharding.states(optimizer), "average": average or {}}
    return {f"{kind}.{name}": tensor for kind, tensors in named.items() for name, tensor in tensors.items()}


def trained_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The trained state of a model by name, buffers among it; of tensors that share memory (tied weights) the first."""
    trained = {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    trained |= {name for name, _ in model.named_buffers(remove_duplicate=False)}
    seen: set[int] = set()
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        local = tensor.to_local() if sharding.is_sharded(tensor) else tensor
        if name not in trained or (local.numel() and local.data_ptr() in seen):
            continue
        seen.add(local.data_ptr())
        tensors[name] = tensor.detach()
    return tensors


def flat_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The state of an optimizer as named tensors and plain values."""
    tensors: dict[str, torch.Tensor] = {}
    plain: dict[str, Any] = {}
    for number, entries in optimizer.state_dict()["state"].items():
        for name, value in entries.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{number}.{name}"] = value.detach()
            else:
                plain[f"{number}.{name}"] = value
    return tensors, plain


def best_name(step: int) -> str:
    """The name of the weights kept as among the best at a step."""
    return f"best-{step:08d}"


def steps(folder: Path) -> list[Path]:
    """Checkpoints to go on from, oldest first."""
    return sorted(p for p in folder.glob("step-*") if (p / "state.json").is_file())


def best(folder: Path) -> list[Path]:
    """The weights that did best on validation, the best first, as the last checkpoint names them."""
    kept = steps(folder)
    named = [folder / best_name(entry["step"]) for entry in (read_state(kept[-1]).get("kept") or () if kept else ())]
    return [path for path in named if (path / "state.json").is_file()]


def read_state(path: Place) -> dict[str, Any]:
    """The state.json of a checkpoint."""
    try:
        return json.loads(places.read(path / "state.json"))
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Place, error: Exception) -> DataError:
    if isinstance(error, DataError):
        return error
    newest = "" if path.name.startswith("step-") else " and the newest step-* beside it"
    return DataError(f"checkpoint {path} cannot be read: {error}", f"delete that folder{newest}; the run goes on from the one before")


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    """Put a checkpoint into a model and an optimizer; returns its state.json."""
    try:
        state = read_state(path)
        with safe_open(path / "model.safetensors", "pt") as file:
            _take(model, {name: partial(file.get_tensor, name) for name in file.keys()}, path)  # noqa: SIM118 - no mapping
        entries = load_file(path / "optimizer.safetensors") if optimizer is not None else {}
    except (OSError, ValueError, KeyError, SafetensorError, RaywardError) as error:
        raise _damaged(path, error) from error
    if optimizer is not None:
        whole = optimizer.state_dict()
        for key, value in {**entries, **state.pop("optimizer")}.items():
            number, name = key.split(".", 1)
            whole["state"].setdefault(int(number), {})[name] = value
        optimizer.load_state_dict(whole)
    return state


@torch.no_grad()
def _take(model: nn.Module, read: Mapping[str, Callable[[], torch.Tensor]], path: Path) -> None:
    """Put tensors into a model, one after another: no second model is held."""
    own = model.state_dict()
    unexpected = sorted(read.keys() - own.keys())
    assert not unexpected, f"{path} holds weights this model has no place for: {unexpected[:3]}"
    for name, tensor in read.items():
        given = tensor()
        assert given.shape == own[name].shape, f"{path} holds {name} of shape {tuple(given.shape)}, and not {tuple(own[name].shape)}"
        own[name].copy_(given)


def load_whole(path: Path, model: nn.Module) -> None:
    """Put the weights of a checkpoint into a model that is spread over workers; the first of them reads."""
    sharding.read_whole(path / "model.safetensors", trained_tensors(model))
    sharding.reshard(model)


def load_shards(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, average: Mapping[str, torch.Tensor] | None
) -> dict[str, Any]:
    """Put a checkpoint that workers wrote together into a model that is spread over them, over as many or others; its state.json."""
    try:
        state = read_state(path)
        sharding.load(path, _all_tensors(model, optimizer, average))
    except Exception as error:
        raise _damaged(path, error) from error
    return state


def load_average(path: Path) -> dict[str, torch.Tensor] | None:
    """The averaged weights of a checkpoint, by name; None if it has none."""
    file = path / "average.safetensors"
    return load_file(file) if file.is_file() else None
