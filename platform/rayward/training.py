"""One worker's loop: step, validate, checkpoint, go on. It knows no label kind, no Ray and no MLflow.

The loss of a step is a sum over all its examples, divided once by their weight, however the examples were cut into micro-batches and
workers. The examples of a step, its learning rate and its random numbers are functions of the step. So the curve is the same whatever
the number of workers and the size of the micro-batches, and a run that was stopped anywhere ends as if it had not been.
"""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from rayward import checkpoints
from rayward.batching import BatchSettings, micro_batches, plan
from rayward.errors import Interrupted, RaywardError, SettingsError
from rayward.metrics import Mean
from rayward.mirror import Mirror
from rayward.objectives import Objective, bootstrap
from rayward.optimizers import Average, Schedule, depth_of, head_parts, is_part, layers_of, lr_share, parameter_groups
from rayward.places import Place
from rayward.rendering import Groups
from rayward.reward_model import OVERALL, RewardModel, autocast
from rayward.sharding import clip, is_sharded
from rayward.toy_world import seed_of


@dataclass(frozen=True)
class TrainSettings:
    """How weights are fitted."""

    epochs: int = 1  # times every example is seen; reward models overfit soon
    lr: float = 1e-4  # peak learning rate of AdamW; 1e-5 to 1e-4 for pretrained bodies, 2e-3 for small ones from scratch
    weight_decay: float = 0.01  # of weight matrices; biases and norms have none
    beta2: float = 0.98  # decay of AdamW's second moment
    warmup: float = 0.05  # share of steps over which the learning rate rises
    schedule: Schedule = "cosine"  # how it falls after that, to a twentieth; wsd: constant, then over the last fifth
    layer_decay: float = 1.0  # times the learning rate of a layer for the one below it; 0.9 to 0.95 keeps a pretrained body's lower layers
    freeze_layers: int = 0  # lowest layers that are not trained, with the embeddings; -1: nothing but the head is, or but
    # what makes one score of the attributes that it has (net.overall)
    average: float = 0.0  # decay of an exponential moving average of the weights, which is then what is validated and kept; e.g. 0.99
    clip: float = 1.0  # largest norm of a step's gradient
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # of the forward pass; auto: bf16 on a GPU
    validate_every: int = 0  # steps (0: five times a run); the end is always validated
    checkpoint_every: int = 0  # steps (0: ten times a run, at least 20 steps apart)
    log_every: int = 10  # steps
    best_by: Literal["loss", "accuracy", "last"] = "loss"  # which validated weights are kept; last: those of the last step
    shard: bool = False  # spread the body over the workers (FSDP2), for models that do not fit into one device
    recompute: bool = False  # keep no activations of a layer and compute them again for the gradient: less memory, a third slower
    offload: bool = False  # with recompute: what is kept between layers lies in the host's memory
    keep_best: int = 1  # weights that are kept of the best validations; OUTPUT/model are those of the best one
    patience: int = 0  # validations without a better one after which a run ends (0: it runs to its last step)
    bootstrap: bool = False  # of net.members: each learns from a draw of the examples of its own, with replacement
    seed: int = 0  # another seed is another order of the examples, another fresh head, another dropout

    def __post_init__(self) -> None:
        ranges = {
            "epochs": (self.epochs >= 1, "at least 1"),
            "lr": (0 < self.lr < math.inf, "above 0"),
            "weight_decay": (self.weight_decay >= 0, "at least 0"),
            "beta2": (0 <= self.beta2 < 1, "from 0 up and below 1"),
            "warmup": (0 <= self.warmup < 1, "from 0 up and below 1"),
            "clip": (self.clip > 0, "above 0"),
            "layer_decay": (0 < self.layer_decay <= 1, "above 0 and at most 1"),
            "freeze_layers": (self.freeze_layers >= -1, "at least -1"),
            "average": (0 <= self.average < 1, "from 0 up and below 1"),
            "validate_every": (self.validate_every >= 0, "at least 0"),
            "checkpoint_every": (self.checkpoint_every >= 0, "at least 0"),
            "log_every": (self.log_every >= 1, "at least 1"),
            "keep_best": (self.keep_best >= 1, "at least 1"),
            "patience": (self.patience >= 0, "at least 0"),
        }
        for name, (fits, wanted) in ranges.items():
            if not fits:
                raise ValueError(f"{name}={getattr(self, name)} must be {wanted}")
        if self.offload and not self.recompute:
            raise ValueError("offload=true is about what recompute=true keeps: set both")
        if self.keep_best > 1 and self.best_by == "last":
            raise ValueError(f"keep_best={self.keep_best} needs best_by=loss or accuracy, to know what is best")
        if self.patience and self.best_by == "last":
            raise ValueError(f"patience={self.patience} needs best_by=loss or accuracy, to know what is better")

    def lr_at(self, step: int, total: int) -> float:
        """The learning rate of a step.

        >>> s = TrainSettings(lr=1.0, warmup=0.2)
        >>> [round(s.lr_at(n, 10), 2) for n in (0, 1, 2, 9)]
        [0.5, 1.0, 1.0, 0.09]
        """
        return self.lr * lr_share(step, total, self.warmup, self.schedule)


@dataclass(frozen=True)
class Team:
    """The workers of a run; alone unless torch.distributed was started."""

    rank: int = 0
    size: int = 1
    sharded: bool = False  # the body is spread over them

    @classmethod
    def here(cls, sharded: bool = False) -> Team:
        """This process's team."""
        return cls(dist.get_rank(), dist.get_world_size(), sharded) if dist.is_available() and dist.is_initialized() else cls()

    def share(self, batches: Iterable[Any], device: torch.device) -> Iterator[tuple[int, Any, bool]]:
        """This worker's batches, every `size`-th, with their numbers; the last word is False for one that is none of its own.

        Where the body is spread, all workers must go through it equally often, so those with fewer take the first one again.
        """
        if not self.sharded:
            yield from ((n, batch, True) for n, batch in enumerate(batches) if n % self.size == self.rank)
            return
        every = list(batches)
        for first in range(0, len(every), self.size):
            n = first + self.rank
            yield (n, every[n], True) if n < len(every) else (n, every[0], False)

    def sum_gradients(self, parameters: list[torch.nn.Parameter], bucket: int = 2**25) -> None:
        """Add up gradients over all workers, in buckets of `bucket` numbers; a worker without one adds zero."""
        parameters = [p for p in parameters if not is_sharded(p)]
        if self.size == 1 or not parameters:
            return
        waiting: list[torch.nn.Parameter] = []
        held = 0
        for n, parameter in enumerate(parameters):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            waiting.append(parameter)
            held += parameter.numel()
            if held >= bucket or n == len(parameters) - 1:
                flat = torch.cat([p.grad.flatten() for p in waiting])  # type: ignore[union-attr]
                dist.all_reduce(flat)
                for p, part in zip(waiting, flat.split([p.numel() for p in waiting]), strict=True):
                    p.grad.copy_(part.view_as(p))  # type: ignore[union-attr]
                waiting, held = [], 0

    def any(self, word: bool, device: torch.device) -> bool:
        """Whether any worker says yes; all of them must ask."""
        if self.size == 1:
            return word
        said = torch.tensor([float(word)], device=device)
        dist.all_reduce(said)
        return bool(said.item())

    def sum(self, means: dict[str, Mean], device: torch.device) -> dict[str, Mean]:
        """Add up means over all workers."""
        if self.size == 1:
            return means
        flat = torch.tensor([x for m in means.values() for x in (m.total, m.weight)], dtype=torch.float64, device=device)
        dist.all_reduce(flat)
        return {name: Mean(*pair) for name, pair in zip(means, flat.view(-1, 2).tolist(), strict=True)}


Report = Callable[[dict[str, float]], None]  # a line of metrics, `step` among them; called by rank 0


@dataclass
class _Tally:
    """What steps did, kept on the device until a line is due, so that no step waits for the device."""

    scores: list[tuple[Tensor, Tensor, Tensor, Tensor]] = field(default_factory=list)  # score, target, mask, column
    losses: list[tuple[Tensor, float]] = field(default_factory=list)
    tokens: int = 0
    since: float = field(default_factory=time.monotonic)

    def drain(self, objective: Objective, team: Team) -> dict[str, Mean]:
        """The means since the last time; workers' speeds add up."""
        right = sum((objective.right(*(t.cpu().numpy() for t in said)) for said in self.scores), Mean())
        loss = sum((Mean(float(total), weight) for total, weight in self.losses), Mean())
        speed = Mean(self.tokens, (time.monotonic() - self.since) / team.size)
        self.scores, self.losses, self.tokens, self.since = [], [], 0, time.monotonic()
        return {"loss": loss, "accuracy": right, "tokens_per_s": speed}


@dataclass(frozen=True)
class Run:
    """Everything a worker needs to train."""

    model: RewardModel
    groups: Groups
    validation: Groups | None
    objective: Objective
    train: TrainSettings
    batch: BatchSettings
    folder: Path  # checkpoints, metrics.jsonl; seen by all workers, or else kept at a URL too
    mirror: Mirror | None = None  # that URL
    report: Report = lambda line: None
    team: Team = Team()
    asked_to_stop: Callable[[], bool] = lambda: False  # besides a signal; looked at with every line of metrics

    @property
    def place(self) -> Place:
        """Where the run is kept, as a user named it."""
        return self.folder if self.mirror is None else self.mirror.there

    @property
    def total(self) -> int:
        """Steps of the whole run."""
        return self.train.epochs * math.ceil(len(self.groups) / self.batch.size)

    @property
    def writes_last(self) -> bool:
        """Whether the last weights are put together at the end: the shares of a spread model are no weights to load elsewhere."""
        return self.train.shard and (self.train.best_by == "last" or self.validation is None)

    def every(self, given: int, times: int, least: int = 1) -> int:
        """A period in steps: as given, or so that it comes so many times a run."""
        return given or max(least, math.ceil(self.total / times))


def train(run: Run) -> dict[str, Any]:
    """Run to the end from the last checkpoint, if there is one; returns the state of the last step. Weights end in run.model."""
    model, settings, team = run.model, run.train, run.team
    optimizer = make_optimizer(model, settings)
    average = Average(model.classifier, settings.average) if settings.average else None
    state = _resume(run, optimizer, average)
    with checkpoints.Writer(run.folder, team.rank, team.sharded, run.mirror) as writer:
        _steps(run, optimizer, average, state, writer)
        if run.writes_last:
            with average.in_place() if average is not None else nullcontext():
                writer.save("last", model.classifier, None, {"step": state["step"]})
    return state


def _steps(run: Run, optimizer: torch.optim.Optimizer, average: Average | None, state: dict[str, Any], writer: checkpoints.Writer) -> None:
    """All steps that are left."""
    model, settings, total, team = run.model, run.train, run.total, run.team
    parameters = [p for p in model.parameters() if p.requires_grad]
    validate_every = run.every(settings.validate_every, 5)
    checkpoint_every = run.every(settings.checkpoint_every, 10, least=20)
    lines = _Lines(run, state["step"])
    tally = _Tally()
    carried = {name: Mean(*pair) for name, pair in (state.pop("since_last_line", None) or {}).items()}  # what the next line also covers
    steps_of: tuple[int, list[Any]] = (-1, [])
    model.train()
    with stop_on_signal() as stop:
        for step in range(state["step"], state["step"] if over(state, settings) else total):
            per_epoch = total // settings.epochs
            epoch, at = divmod(step, per_epoch)
            if steps_of[0] != epoch:
                steps_of = (epoch, plan(len(run.groups), run.batch.size, settings.seed, epoch))
            _step(run, optimizer, parameters, step, steps_of[1][at], tally)
            done = step + 1
            if average is not None:
                average.update(done)
            last, due = done == total, done == total or done % settings.log_every == 0
            if due:
                carried = _add(carried, team.sum(tally.drain(run.objective, team), model.device))
                lines.write(done, {**_values(carried), "lr": settings.lr_at(step, total)})
                carried = {}
            if run.validation is not None and (done % validate_every == 0 or last):
                _validated(run, lines, writer, tally, average, state, done)
                last = last or over(state, settings)
            stopping = stop.is_set() if team.size == 1 else due and team.any(run.asked_to_stop(), model.device)
            keep = done % checkpoint_every == 0 or last or stopping
            if keep and not due:
                carried = _add(carried, team.sum(tally.drain(run.objective, team), model.device))
            state["step"] = done
            if keep:
                pending = {name: [mean.total, mean.weight] for name, mean in carried.items()}
                whole = {**state, "since_last_line": pending}
                writer.save(f"step-{done:08d}", model.classifier, optimizer, whole, average.mean if average else None)
            if last:
                break
            if stopping:
                writer.wait()
                raise stopped(run.place, done, total)


def stopped(place: Place, done: int, total: int) -> Interrupted:
    """What is said to a user who stopped a run."""
    return Interrupted(f"step {done} of {total} is kept in {place}; the same command goes on from there")


def over(state: Mapping[str, Any], settings: TrainSettings) -> bool:
    """Whether a run has ended before its last step: it did not get better for `patience` validations."""
    return bool(settings.patience) and (state.get("stale") or 0) >= settings.patience


def _validated(
    run: Run, lines: _Lines, writer: checkpoints.Writer, tally: _Tally, average: Average | None, state: dict[str, Any], done: int
) -> None:
    """Validate, tell, and keep the weights where they are the best so far."""
    paused = time.monotonic()
    with average.in_place() if average is not None else nullcontext():
        values = validate(run)
        lines.write(done, {f"validation_{n}": v for n, v in values.items()})
        better = _better(values, state["best"], run.train.best_by)
        entry = {**values, "step": done}
        if better:
            state["best"] = entry
        kept = _best_of([*(state.get("kept") or ()), entry], run.train)
        if entry in kept:
            state["kept"] = kept
            writer.save(checkpoints.best_name(done), run.model.classifier, None, entry, best=[int(e["step"]) for e in kept])
    state["stale"] = 0 if better else (state.get("stale") or 0) + 1
    tally.since += time.monotonic() - paused


def make_optimizer(model: RewardModel, settings: TrainSettings) -> torch.optim.Optimizer:
    """AdamW over what is trained; a group's learning rate is `scale` times that of the step."""
    groups = parameter_groups(model.classifier, model.head_name, settings.weight_decay, settings.layer_decay)
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, settings.beta2), fused=True)  # several times faster, on CPU too


def freeze(model: RewardModel, lowest: int) -> None:
    """Train neither the embeddings nor the `lowest` layers of a body; -1: nothing but the head, or but what makes one score of it."""
    layers = layers_of(model.classifier)
    if lowest > layers:
        raise SettingsError(f"freeze_layers={lowest} and the body has {layers} layers", "freeze fewer, or -1 for all of them")
    parts = (OVERALL,) if lowest < 0 and model.reading.learns_overall else head_parts(model.classifier, model.head_name)
    for name, parameter in model.classifier.named_parameters():
        head = is_part(name, parts)
        frozen = lowest and not head and (lowest < 0 or depth_of(name, layers, head) <= lowest)
        parameter.requires_grad_(parameter.requires_grad and not frozen)
    if not any(parameter.requires_grad for parameter in model.classifier.parameters()):
        raise SettingsError(
            f"train.freeze_layers={lowest} leaves nothing to train: this head has no weights but the embeddings, which are frozen",
            "freeze fewer layers, or none: leave it out",
        )


def _step(run: Run, optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter], step: int, numbers: Any, tally: _Tally) -> None:
    """One optimizer step over the examples of that step; every worker does every `size`-th micro-batch."""
    model, settings, team = run.model, run.train, run.team
    groups = [run.groups[int(n)] for n in numbers]
    weight = sum(g.weight for g in groups)
    for entry in optimizer.param_groups:
        entry["lr"] = settings.lr_at(step, run.total) * entry["scale"]
    every = micro_batches(groups, run.batch, model.shares_prefix, model.flat_in(settings.precision))
    for number, (which, batch), mine in team.share(every, model.device):
        torch.manual_seed(seed_of("dropout", settings.seed, step, number))
        micro_weight = float(batch.weight_G.sum())
        tokens, batch = batch.tokens, batch.to(model.device)
        with autocast(model.device, settings.precision):
            output_GKC, terms = model.hear(batch, run.objective.body_terms)
        score_GK = model.reading.pick(output_GKC, batch.column_GK)
        share_MG = bootstrap(numbers[which], model.reading.members, settings.seed).to(model.device) if settings.bootstrap else None
        loss_G = run.objective.of_members(batch, model.reading, output_GKC, terms, share_MG)
        total = (loss_G * batch.weight_G).sum() * mine
        (total / weight).backward()
        if not mine:
            continue
        tally.tokens += tokens
        tally.losses.append((total.detach(), micro_weight))
        tally.scores.append((score_GK.detach(), batch.target_GK, batch.mask_GK, batch.column_GK))
    team.sum_gradients(parameters)
    clip(parameters, settings.clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def validate(run: Run) -> dict[str, float]:
    """Loss and accuracy on the validation examples, exact on any number of workers."""
    assert run.validation is not None
    model, groups = run.model, run.validation
    loss, right = Mean(), Mean()
    with model.evaluating(), autocast(model.device, run.train.precision):
        for start in range(0, len(groups), 256):
            chunk = [groups[n] for n in range(start, min(start + 256, len(groups)))]
            every = micro_batches(chunk, run.batch, model.shares_prefix, model.flat_in(run.train.precision))
            for _, (_, batch), mine in run.team.share(every, model.device):
                batch = batch.to(model.device)
                output_GKC, terms = model.hear(batch, run.objective.body_terms)
                if not mine:
                    continue
                score_GK = model.reading.pick(output_GKC, batch.column_GK)
                loss_G = run.objective.of_members(batch, model.reading, output_GKC, terms)
                loss += Mean(float((loss_G * batch.weight_G).sum()), float(batch.weight_G.sum()))
                said = (score_GK, batch.target_GK, batch.mask_GK, batch.column_GK)
                right += run.objective.right(*(t.cpu().numpy() for t in said))
    return _values(run.team.sum({"loss": loss, "accuracy": right}, model.device))


def _add(a: dict[str, Mean], b: dict[str, Mean]) -> dict[str, Mean]:
    return {name: (a.get(name) or Mean()) + mean for name, mean in b.items()}


def _values(means: dict[str, Mean]) -> dict[str, float]:
    return {name: mean.value for name, mean in means.items()}


def _better(values: dict[str, float], best: dict[str, float], by: str) -> bool:
    if by == "last":
        return False
    if not best:
        return True
    return values["loss"] < best["loss"] if by == "loss" else values["accuracy"] > best["accuracy"]


def _best_of(entries: list[dict[str, float]], settings: TrainSettings) -> list[dict[str, float]]:
    """The best validations, the best first; of equal ones the earlier."""
    if settings.best_by == "last":
        return []
    ranked = sorted(entries, key=lambda e: -e["accuracy"] if settings.best_by == "accuracy" else e["loss"])  # keeps the order of equals
    return ranked[: settings.keep_best]


def _resume(run: Run, optimizer: torch.optim.Optimizer, average: Average | None) -> dict[str, Any]:
    kept = checkpoints.steps(run.folder)
    if not kept:
        return {"step": 0, "best": {}}
    if run.team.sharded:
        return checkpoints.load_shards(kept[-1], run.model.classifier, optimizer, average.mean if average is not None else None)
    state = checkpoints.load(kept[-1], run.model.classifier, optimizer)
    if average is not None and (tensors := checkpoints.load_average(kept[-1])) is not None:
        average.restore(tensors)
    return state


class _Lines:
    """metrics.jsonl of a run: what was written after the checkpoint that the run goes on from is written anew, not twice."""

    def __init__(self, run: Run, step: int):
        self.run, self.path = run, run.folder / "metrics.jsonl"
        if run.team.rank == 0:
            run.folder.mkdir(parents=True, exist_ok=True)
            old = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
            kept = "".join(line + "\n" for line in old.splitlines() if line.endswith("}") and json.loads(line)["step"] <= step)
            if kept != old:
                aside = self.path.with_suffix(".partial")
                with self._told():
                    aside.write_text(kept, encoding="utf-8")
                    aside.replace(self.path)

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RaywardError(f"{self.path} cannot be written: {error}\n  -> make room on that disk; the same command goes on") from None

    def write(self, step: int, values: dict[str, float]) -> None:
        """One line, on rank 0; a loss that is no number ends the run with the way out."""
        bad = [name for name, value in values.items() if name.endswith("loss") and not math.isfinite(value)]
        if bad:
            raise RaywardError(f"{bad[0]} is {values[bad[0]]} at step {step}\n  -> lower the learning rate: --set train.lr=...")
        if self.run.team.rank == 0:
            line = {"step": step, **{n: v for n, v in values.items() if math.isfinite(v)}}
            with self._told(), self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            self.run.report(line)


@contextmanager
def stop_on_signal() -> Iterator[threading.Event]:
    """Ctrl-C or a polite kill lets the step end and a checkpoint be written; a second one stops at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def on_signal(number: int, frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    for s in before:
        signal.signal(s, on_signal)
    try:
        yield stop
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
