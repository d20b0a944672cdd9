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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from rayward import checkpoints
from rayward.batching import BatchSettings, micro_batches, plan
from rayward.errors import Interrupted, RaywardError
from rayward.metrics import Mean
from rayward.objectives import Objective
from rayward.rendering import Groups
from rayward.reward_model import RewardModel, autocast
from rayward.toy_world import seed_of


@dataclass(frozen=True)
class TrainSettings:
    """How weights are fitted."""

    epochs: int = 1  # times every example is seen; reward models overfit soon
    lr: float = 1e-4  # peak learning rate of AdamW; 1e-5 to 1e-4 for pretrained bodies, 2e-3 for small ones from scratch
    weight_decay: float = 0.01  # of weight matrices; biases and norms have none
    beta2: float = 0.98  # decay of AdamW's second moment
    warmup: float = 0.05  # share of steps over which the learning rate rises
    schedule: Literal["cosine", "linear", "constant"] = "cosine"  # how it falls after that, to a twentieth
    clip: float = 1.0  # largest norm of a step's gradient
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # of the forward pass; auto: bf16 on a GPU
    validate_every: int = 0  # steps (0: five times a run); the end is always validated
    checkpoint_every: int = 0  # steps (0: ten times a run, at least 20 steps apart)
    log_every: int = 10  # steps
    best_by: Literal["loss", "accuracy", "last"] = "loss"  # which validated weights are kept; last: those of the last step
    seed: int = 0  # another seed is another order of the examples, another fresh head, another dropout

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.lr <= 0 or self.clip <= 0 or not 0 <= self.warmup < 1 or self.log_every < 1:
            raise ValueError(f"epochs={self.epochs}, lr={self.lr}, clip={self.clip}, warmup={self.warmup}: not a way to train")

        if not (
            math.isfinite(self.lr)
            and 0 <= self.beta2 < 1
            and self.weight_decay >= 0
            and min(self.validate_every, self.checkpoint_every) >= 0
        ):
            raise ValueError(f"lr={self.lr}, beta2={self.beta2}, weight_decay={self.weight_decay}: not a way to train")

    def lr_at(self, step: int, total: int) -> float:
        """The learning rate of a step: linear warm-up, then the schedule down to lr / 20.

        >>> s = TrainSettings(lr=1.0, warmup=0.2)
        >>> [round(s.lr_at(n, 10), 2) for n in (0, 1, 2, 9)]
        [0.5, 1.0, 1.0, 0.09]
        """
        rise = max(1, round(self.warmup * total))
        if step < rise:
            return self.lr * (step + 1) / rise
        along = (step - rise) / max(1, total - rise)
        fall = {"cosine": 0.5 * (1 + math.cos(math.pi * along)), "linear": 1 - along, "constant": 1.0}[self.schedule]
        return self.lr * (0.05 + 0.95 * fall)


@dataclass(frozen=True)
class Team:
    """The workers of a run; alone unless torch.distributed was started."""

    rank: int = 0
    size: int = 1

    @classmethod
    def here(cls) -> Team:
        """This process's team."""
        return cls(dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else cls()

    def sum_gradients(self, parameters: list[torch.nn.Parameter], bucket: int = 2**25) -> None:
        """Add up gradients over all workers, in buckets of `bucket` numbers; a worker without one adds zero."""
        if self.size == 1:
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

    scores: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    losses: list[tuple[Tensor, float]] = field(default_factory=list)
    tokens: int = 0
    since: float = field(default_factory=time.monotonic)

    def drain(self, objective: Objective, team: Team) -> dict[str, Mean]:
        """The means since the last time; workers' speeds add up."""
        right = sum((objective.accuracy(*(t.cpu().numpy() for t in triple)) for triple in self.scores), Mean())
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
    folder: Path  # checkpoints, metrics.jsonl; seen by all workers
    report: Report = lambda line: None
    team: Team = Team()

    @property
    def total(self) -> int:
        """Steps of the whole run."""
        return self.train.epochs * math.ceil(len(self.groups) / self.batch.size)

    def every(self, given: int, times: int, least: int = 1) -> int:
        """A period in steps: as given, or so that it comes so many times a run."""
        return given or max(least, math.ceil(self.total / times))


def train(run: Run) -> dict[str, Any]:
    """Run to the end from the last checkpoint, if there is one; returns the state of the last step. Weights end in run.model."""
    model, settings, total, team = run.model, run.train, run.total, run.team
    optimizer = make_optimizer(model, settings)
    parameters = [p for p in model.parameters() if p.requires_grad]
    state = _resume(run, optimizer)
    validate_every = run.every(settings.validate_every, 5)
    checkpoint_every = run.every(settings.checkpoint_every, 10, least=20)
    lines = _Lines(run, state["step"])
    tally = _Tally()
    carried = {name: Mean(*pair) for name, pair in (state.pop("since_last_line", None) or {}).items()}  # what the next line also covers
    steps_of: tuple[int, list[Any]] = (-1, [])
    model.train()
    with _stop_on_signal() as stop:
        for step in range(state["step"], total):
            per_epoch = total // settings.epochs
            epoch, at = divmod(step, per_epoch)
            if steps_of[0] != epoch:
                steps_of = (epoch, plan(len(run.groups), run.batch.size, settings.seed, epoch))
            _step(run, optimizer, parameters, step, steps_of[1][at], tally)
            done = step + 1
            last = done == total
            keep = done % checkpoint_every == 0 or last or stop.is_set()
            if keep or done % settings.log_every == 0:
                carried = _add(carried, team.sum(tally.drain(run.objective, team), model.device))
            if done % settings.log_every == 0 or last:
                lines.write(done, {**_values(carried), "lr": settings.lr_at(step, total)})
                carried = {}
            if run.validation is not None and (done % validate_every == 0 or last):
                paused = time.monotonic()
                values = validate(run)
                tally.since += time.monotonic() - paused
                lines.write(done, {f"validation_{n}": v for n, v in values.items()})
                if _better(values, state["best"], settings.best_by):
                    state["best"] = {**values, "step": done}
                    if team.rank == 0:
                        checkpoints.save(run.folder, "best", model.classifier, None, state["best"])
            state["step"] = done
            if team.rank == 0 and keep:
                pending = {name: [mean.total, mean.weight] for name, mean in carried.items()}
                whole = {**state, "since_last_line": pending}
                checkpoints.save(run.folder, f"step-{done:08d}", model.classifier, optimizer, whole)
            if keep and stop.is_set() and not last:
                raise Interrupted(f"step {done} of {total} is kept in {run.folder}; the same command goes on from there")
    return state


def make_optimizer(model: RewardModel, settings: TrainSettings) -> torch.optim.Optimizer:
    """AdamW, with weight decay on matrices only."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=settings.lr, betas=(0.9, settings.beta2))


def _step(run: Run, optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter], step: int, numbers: Any, tally: _Tally) -> None:
    """One optimizer step over the examples of that step; every worker does every `size`-th micro-batch."""
    model, settings, team = run.model, run.train, run.team
    groups = [run.groups[int(n)] for n in numbers]
    weight = sum(g.weight for g in groups)
    for entry in optimizer.param_groups:
        entry["lr"] = settings.lr_at(step, run.total)
    for number, (_, batch) in enumerate(micro_batches(groups, run.batch, model.shares_prefix)):
        if number % team.size != team.rank:
            continue
        torch.manual_seed(seed_of("dropout", settings.seed, step, number))
        tally.tokens += batch.tokens
        micro_weight = float(batch.weight_G.sum())
        batch = batch.to(model.device)
        with autocast(model.device, settings.precision):
            score_GK = model(batch)
        loss_G = run.objective.loss(score_GK, batch.target_GK, batch.mask_GK)
        total = (loss_G * batch.weight_G).sum()
        (total / weight).backward()
        tally.losses.append((total.detach(), micro_weight))
        tally.scores.append((score_GK.detach(), batch.target_GK, batch.mask_GK))
    team.sum_gradients(parameters)
    torch.nn.utils.clip_grad_norm_(parameters, settings.clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def validate(run: Run) -> dict[str, float]:
    """Loss and accuracy on the validation examples, exact on any number of workers."""
    assert run.validation is not None
    model, groups = run.model, run.validation
    loss, right = Mean(), Mean()
    with model.evaluating(), autocast(model.device, run.train.precision):
        for start in range(run.team.rank * 256, len(groups), run.team.size * 256):
            chunk = [groups[n] for n in range(start, min(start + 256, len(groups)))]
            for _, batch in micro_batches(chunk, run.batch, model.shares_prefix):
                batch = batch.to(model.device)
                score_GK = model(batch)
                loss_G = run.objective.loss(score_GK, batch.target_GK, batch.mask_GK)
                loss += Mean(float((loss_G * batch.weight_G).sum()), float(batch.weight_G.sum()))
                right += run.objective.accuracy(*(t.cpu().numpy() for t in (score_GK, batch.target_GK, batch.mask_GK)))
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


def _resume(run: Run, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    kept = checkpoints.steps(run.folder)
    if not kept:
        return {"step": 0, "best": {}}
    return checkpoints.load(kept[-1], run.model.classifier, optimizer)


class _Lines:
    """metrics.jsonl of a run: what was written after the checkpoint that the run goes on from is written anew, not twice."""

    def __init__(self, run: Run, step: int):
        self.run, self.path = run, run.folder / "metrics.jsonl"
        if run.team.rank == 0:
            run.folder.mkdir(parents=True, exist_ok=True)
            old = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
            kept = [line for line in old if line.endswith("}") and json.loads(line)["step"] <= step]
            self.path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")

    def write(self, step: int, values: dict[str, float]) -> None:
        """One line, on rank 0; a loss that is no number ends the run with the way out."""
        bad = [name for name, value in values.items() if name.endswith("loss") and not math.isfinite(value)]
        if bad:
            raise RaywardError(f"{bad[0]} is {values[bad[0]]} at step {step}\n  -> lower the learning rate: --set train.lr=...")
        if self.run.team.rank == 0:
            line = {"step": step, **{n: v for n, v in values.items() if math.isfinite(v)}}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            self.run.report(line)


@contextmanager
def _stop_on_signal() -> Iterator[threading.Event]:
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
