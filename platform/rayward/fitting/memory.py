"""How many tokens go through a model at once: with `batch.micro_tokens=0` as many as fit into the device's memory, found by trying.

Full rows of random tokens go forward and backward, once to make the gradients and once beside them: 1 row, 2, 4, ... until one try does
not fit, then halving between. Room is left for the optimizer's moments, an average of the weights, and a share of what is free. All
workers take what the smallest device found. It is kept in OUTPUT/run, so a run that goes on has the micro-batches that it began with.

What is found never makes a row longer: rows are `batch.row_tokens` long, and as many lie in a micro-batch as fit.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from rayward import places
from rayward.batching import AT_ONCE, Batch, collate
from rayward.errors import SettingsError
from rayward.rendering import Group, Groups
from rayward.reward_model import RewardModel, autocast
from rayward.training import Run

FOUND = "micro_tokens.json"  # in OUTPUT/run
RESERVE = 0.1  # share of the free memory that is left free
MOMENTS = 2  # numbers that AdamW keeps for a weight


def measured(run: Run, fits: Callable[[int], bool] | None = None) -> Run:
    """The run with its `micro_tokens` decided; every worker calls it. `fits` says of a number of full rows whether they fit.

    Raises:
        SettingsError: if not even one row fits.
    """
    if run.batch.micro_tokens:
        return run
    kept = _kept(run)
    if kept is None:
        kept = _found(run, fits)
        if run.team.rank == 0:
            places.write(run.place / FOUND, json.dumps({"micro_tokens": kept}) + "\n")
    return replace(run, batch=replace(run.batch, micro_tokens=kept))


def _kept(run: Run) -> int | None:
    """What the run began with."""
    try:
        return int(json.loads(places.read(run.place / FOUND))["micro_tokens"])
    except FileNotFoundError:
        return None


def _found(run: Run, fits: Callable[[int], bool] | None) -> int:
    row, most = longest_row(run)
    if fits is None and run.model.device.type != "cuda":
        found, said = AT_ONCE, "without a GPU there is nothing to measure"
    else:
        rows = _least(largest(fits or Trial(run, row), most), run)
        if not rows:
            raise SettingsError(
                f"batch.micro_tokens=0: not one row of {row:,} tokens fits into the device's memory",
                "train.recompute=true, --set lora.rank=16, a smaller render.max_length, or fewer answers to an example",
            )
        found, said = rows * row, f"{rows} row{'s' * (rows > 1)} of {row:,}"
    if run.team.rank == 0:
        print(f"batch.micro_tokens=0: {found:,} tokens go through the model at once ({said})")
    return found


def largest(fits: Callable[[int], bool], most: int) -> int:
    """About the largest number from 1 to `most` that fits, and never more: by doubling, then by halving to within an eighth; 0 for none.

    >>> largest(lambda rows: rows <= 100, 1000), largest(lambda rows: rows <= 5, 1000), largest(lambda rows: False, 9)
    (96, 5, 0)
    """
    low, high = 0, 1
    while high <= most and fits(high):
        low, high = high, 2 * high
    high = min(high, most + 1)  # which does not fit, or is not wanted
    while high - low > max(1, low // 8):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def longest_row(run: Run) -> tuple[int, int]:
    """Tokens of the longest row that a step can have, and how many rows its examples can fill."""
    row, answers = run.batch.row_tokens if run.model.shares_prefix else 1, 1
    for groups in filter(None, (run.groups, run.validation)):
        assert isinstance(groups, Groups)
        for n in range(len(groups)):
            group = groups[n]
            row = max(row, len(group.token_T) if run.model.shares_prefix else group.longest)
            answers = max(answers, group.answers)
    return row, run.batch.size * (1 if run.model.shares_prefix else answers)


def full_rows(rows: int, row: int, vocabulary: int, shared: bool) -> Batch:
    """Rows without padding, of random tokens: a prompt of a quarter and one answer each."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(rows):
        lengths = np.array([row // 4, row - row // 4], np.int32)
        at = np.array([row - 1], np.int32)
        made.append([Group(rng.integers(0, vocabulary, row).astype(np.int32), lengths, at, np.zeros(1, np.float32), 1.0)])
    return collate(made, shared)


class Trial:
    """Whether so many full rows fit: forward and backward, on the device where the model is. Weights and gradients stay as they were."""

    def __init__(self, run: Run, row: int):
        self.run, self.row = run, row
        trained = sum(p.numel() * p.element_size() for p in run.model.parameters() if p.requires_grad)
        copies = MOMENTS + bool(run.train.average)
        device: Any = run.model.device
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(device)
        self.room = (1 - RESERVE) * (free + torch.cuda.memory_reserved(device)) - copies * trained

    def __call__(self, rows: int) -> bool:
        """Whether they fit, with what else will be in memory."""
        model, device = self.run.model, self.run.model.device
        torch.cuda.reset_peak_memory_stats(device)
        try:
            through(model, full_rows(rows, self.row, model.classifier.config.get_text_config().vocab_size, model.shares_prefix), self.run)
            return torch.cuda.max_memory_reserved(device) <= self.room
        except torch.OutOfMemoryError:
            return False
        finally:
            model.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()


def through(model: RewardModel, batch: Batch, run: Run) -> None:
    """A batch forward and backward, twice: the second time beside the gradients of the first."""
    was = model.training
    model.train()
    batch = batch.to(model.device)
    for _ in range(2):
        with autocast(model.device, run.train.precision):
            said = model.hear(batch, run.objective.body_terms)
        sum((term.sum() for term in said.terms.values()), said.output_GKC.sum()).backward()
    model.train(was)


def _least(rows: int, run: Run) -> int:
    """What the smallest device of the team found."""
    if run.team.size == 1:
        return rows
    least = torch.tensor([rows], device=run.model.device)
    dist.all_reduce(least, op=dist.ReduceOp.MIN)
    return int(least.item())
