"""Batching: which examples go together, and how they lie in packed rows.

Shape letters: G examples (groups), K places in the widest group, B rows, T tokens of a row.

A packed row holds whole groups: a prompt, then its answers. A token attends to earlier tokens of its own answer and to its own prompt,
and to nothing else; every answer's positions continue from the prompt's end. So a prompt is encoded once, however many answers it has,
and every score equals the one the answer gets alone (`reward_model` checks this on the model at hand before it relies on it).
Where a model cannot do that (encoders, recurrent mixers), every answer is a row of its own, with the prompt in front.

Which groups make a step, and how they are cut into micro-batches, is a pure function of (lengths, settings, seed, epoch): the same
on any number of workers, before and after a crash.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rayward.attention.rows import Row, row_of
from rayward.rendering import Group

AT_ONCE = 4096  # tokens
ANSWERS = 1 << 12  # segment ids: group * ANSWERS + answer, 0 for the prompt; -1 is padding


@dataclass(frozen=True)
class BatchSettings:
    """How examples are cut into steps and rows."""

    size: int = 32  # examples in a step, over all workers and micro-batches
    row_tokens: int = 320  # tokens a packed row aims at; attention costs grow with its square, a longer group gets a longer row
    micro_tokens: int = AT_ONCE  # tokens that go through the model at once; a smaller number takes less memory and changes no loss; 0: in
    # training as many as fit into the GPU's memory

    def __post_init__(self) -> None:
        for name, least in (("size", 1), ("row_tokens", 1), ("micro_tokens", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")

    @property
    def at_once(self) -> int:
        """`micro_tokens`, where nothing was measured its default."""
        return self.micro_tokens or AT_ONCE


@dataclass(frozen=True)
class Batch:
    """Packed rows, and where in them scores are read."""

    token_BT: Tensor  # int64
    position_BT: Tensor  # int64; an answer's positions continue from its prompt's end
    segment_BT: Tensor  # int64; who may attend to whom (ANSWERS)
    place_GK: Tensor  # int64; flat index into B*T
    target_GK: Tensor  # float32
    mask_GK: Tensor  # bool; False where a group has fewer than K places
    weight_G: Tensor  # float32
    count_GK: Tensor  # float32; verdicts behind a target
    length_GK: Tensor  # float32; tokens of the answer that a place is in
    column_GK: Tensor  # int64; which output of the head a target is about, -1: the score that is made of all of them
    owner_BT: Tensor  # int64; group * ANSWERS + answer of every token, also where an answer is a row of its own; -1: padding
    prompt_GK: Tensor  # int64; flat index of the last token of the prompt in front of a place
    read_N: Tensor  # int64; flat index of every token that is the last of a place, each once; with token 0 where places are masked
    row: Row | None = field(default=None, kw_only=True)  # who sees whom, of a single row of whole groups

    def to(self, device: torch.device | str) -> Batch:
        """The same on another device."""
        there: dict[str, Any] = {name: part.to(device, non_blocking=True) for name, part in self.__dict__.items() if part is not None}
        return replace(self, **there)

    @property
    def tokens(self) -> int:
        """Tokens that are no padding."""
        return int((self.segment_BT >= 0).sum())

    @property
    def group_BT(self) -> Tensor:
        """Which example a token belongs to, -1: padding."""
        return self.owner_BT // ANSWERS

    @property
    def answer_BT(self) -> Tensor:
        """Which of its example's answers a token is in, from 1; 0: the prompt, or padding."""
        return self.owner_BT.clamp(min=0) % ANSWERS

    @property
    def prompted_GK(self) -> Tensor:
        """Whether a place has a prompt in front, of a token at least."""
        own_G1 = torch.arange(len(self.prompt_GK), device=self.prompt_GK.device).unsqueeze(-1)
        return self.owner_BT.flatten()[self.prompt_GK] == own_G1 * ANSWERS

    def answer_GKT(self) -> Tensor:
        """Flat index of every token of the answer that a place is in, -1 behind its end and for masked places; T of the longest answer."""
        position_N = self.position_BT.flatten()
        prompt_GK = torch.where(self.prompted_GK, position_N[self.prompt_GK] + 1, 0)
        start_GK = self.place_GK - (position_N[self.place_GK] - prompt_GK)
        along_T = torch.arange(int(self.length_GK.max()), device=start_GK.device)
        there_GKT = (along_T < self.length_GK.unsqueeze(-1)) & self.mask_GK.unsqueeze(-1)
        return torch.where(there_GKT, start_GK.unsqueeze(-1) + along_T, -1)

    def mask_BTT(self) -> Tensor:
        """mask[b, i, j]: token i attends to token j. Padding attends to itself, so that no row of a softmax is empty."""
        segment = self.segment_BT
        group, answer = segment // ANSWERS, segment % ANSWERS
        T = segment.shape[1]
        causal = torch.ones(T, T, dtype=torch.bool, device=segment.device).tril()
        same_group = group[:, :, None] == group[:, None, :]
        prompt_or_own = (answer[:, None, :] == 0) | (answer[:, :, None] == answer[:, None, :])
        real = (segment >= 0)[:, :, None] & (segment >= 0)[:, None, :]
        return (causal & same_group & prompt_or_own & real) | torch.eye(T, dtype=torch.bool, device=segment.device)


def plan(examples: int, size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """The examples of every step of an epoch: a permutation by (seed, epoch), cut into steps; the last one may be smaller.

    >>> [len(step) for step in plan(10, 4, seed=0, epoch=0)], bool((plan(10, 4, 0, 0)[0] == plan(10, 4, 0, 1)[0]).all())
    ([4, 4, 2], False)
    """
    order = np.random.default_rng([seed, epoch]).permutation(examples)
    return [order[start : start + size] for start in range(0, examples, size)]


def micro_batches(groups: Sequence[Group], settings: BatchSettings, shared: bool, flat: bool = False) -> Iterator[tuple[list[int], Batch]]:
    """Groups as batches of at most `micro_tokens` tokens (or one row), rows of like length together; with the numbers of the groups.

    With `flat` (where a body attends over segments, see `attention`), each is one row without padding.
    """
    if not groups:
        return
    if shared and flat:
        for row in pack([len(g.token_T) for g in groups], settings.at_once):
            yield row, collate([[groups[n] for n in row]], shared)
        return
    if shared:
        rows = pack([len(g.token_T) for g in groups], settings.row_tokens)
        lengths = [sum(len(groups[n].token_T) for n in row) for row in rows]
    else:
        rows = [[n] for n in range(len(groups))]
        lengths = [g.longest for g in groups]
    order = sorted(range(len(rows)), key=lambda r: (-lengths[r], rows[r][0]))
    chunk: list[int] = []
    height = 0
    for r in order:
        tall = 1 if shared else groups[rows[r][0]].answers
        first = lengths[chunk[0]] if chunk else 0
        if chunk and ((height + tall) * first > settings.at_once or lengths[r] < 0.75 * first):
            yield [n for c in chunk for n in rows[c]], collate([[groups[n] for n in rows[c]] for c in chunk], shared)
            chunk, height = [], 0
        chunk.append(r)
        height += tall
    yield [n for c in chunk for n in rows[c]], collate([[groups[n] for n in rows[c]] for c in chunk], shared)


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """First-fit decreasing: which items lie in which row of `capacity`; an item longer than that has a row of its own.

    The first row with room is found in a tree of what is free, in log(items) steps (Johnson 1973, first-fit in O(n log n)).

    >>> pack([5, 9, 3, 4, 30], 10)
    [[4], [1], [0, 3], [2]]
    """
    order = sorted(range(len(lengths)), key=lambda n: (-lengths[n], n))
    rows = [[n] for n in order if lengths[n] > capacity]
    too_long = len(rows)
    leaves = 1 << max(0, len(order) - too_long - 1).bit_length()
    free = [capacity] * (2 * leaves)  # free[n] = max(free[2n], free[2n + 1]); the last `leaves` are rows, those not begun yet included
    for n in order[too_long:]:
        at = 1
        while at < leaves:
            at = 2 * at + (free[2 * at] < lengths[n])
        if at - leaves + too_long == len(rows):
            rows.append([])
        rows[at - leaves + too_long].append(n)
        free[at] -= lengths[n]
        while at := at // 2:
            free[at] = max(free[2 * at], free[2 * at + 1])
    return rows


def collate(rows: Sequence[Sequence[Group]], shared: bool) -> Batch:
    """Rows of groups as one batch, padded to the longest row. With `shared` a row holds its groups; else every answer is a row."""
    groups = [group for row in rows for group in row]
    K = max(len(g.target_K) for g in groups)
    token: list[np.ndarray] = []
    position: list[np.ndarray] = []
    segment: list[np.ndarray] = []
    owner: list[np.ndarray] = []  # of every token: group * ANSWERS + answer
    places: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # (row, column) of each place of each group, and where its prompt ends
    number = 0  # of the group
    for row in rows:
        if shared:
            start = 0
            for group in row:
                columns = group.place_K.astype(np.int64) + start
                places.append((np.full(len(columns), len(token)), columns, np.full(len(columns), start + group.length_A[0] - 1)))
                start += len(group.token_T)
            token.append(np.concatenate([g.token_T for g in row]))
            position.append(np.concatenate([_positions(g) for g in row]))
            owner.append(np.concatenate([_segments(g, number + n) for n, g in enumerate(row)]))
            segment.append(owner[-1])
            number += len(row)
            continue
        for group in row:
            first_row, prompt = len(token), group.length_A[0]
            ends = np.cumsum(group.length_A)
            for n in range(group.answers):
                ids = np.concatenate([group.token_T[:prompt], group.token_T[ends[n] : ends[n + 1]]])
                token.append(ids)
                position.append(np.arange(len(ids)))
                segment.append(np.zeros(len(ids), np.int64))
                owner.append(number * ANSWERS + np.repeat([0, n + 1], [prompt, len(ids) - prompt]))
            number += 1
            answer = np.searchsorted(ends, group.place_K, side="right") - 1
            places.append((first_row + answer, group.place_K - ends[answer] + prompt, np.full(len(answer), prompt - 1)))
    B, T = len(token), max(map(len, token))
    token_BT, position_BT, segment_BT = np.zeros((B, T), np.int64), np.zeros((B, T), np.int64), np.full((B, T), -1, np.int64)
    owner_BT = np.full((B, T), -1, np.int64)
    for b, (ids, at, who, whose) in enumerate(zip(token, position, segment, owner, strict=True)):
        for made, of_row in ((token_BT, ids), (position_BT, at), (segment_BT, who), (owner_BT, whose)):
            made[b, : len(ids)] = of_row
    G = len(groups)
    place_GK, target_GK, mask_GK = np.zeros((G, K), np.int64), np.zeros((G, K), np.float32), np.zeros((G, K), bool)
    count_GK, length_GK, column_GK = np.zeros((G, K), np.float32), np.zeros((G, K), np.float32), np.full((G, K), -1, np.int64)
    prompt_GK = np.zeros((G, K), np.int64)
    for g, (group, (row_at, column, prompt_at)) in enumerate(zip(groups, places, strict=True)):
        k = len(group.target_K)
        place_GK[g, :k], target_GK[g, :k], mask_GK[g, :k] = row_at * T + column, group.target_K, True
        prompt_GK[g, :k] = row_at * T + prompt_at
        count_GK[g, :k] = 1 if group.count_K is None else group.count_K
        length_GK[g, :k] = group.length_A[1:][np.searchsorted(np.cumsum(group.length_A), group.place_K, side="right") - 1]
        if group.column_K is not None:
            column_GK[g, :k] = group.column_K
    weight_G = np.array([g.weight for g in groups], np.float32)
    of_places = (place_GK, target_GK, mask_GK, weight_G, count_GK, length_GK, column_GK)
    arrays = (token_BT, position_BT, segment_BT, *of_places, owner_BT, prompt_GK, np.unique(place_GK))
    sees = row_of(g.length_A.tolist() for g in groups) if shared and B == 1 else None
    return Batch(*map(torch.from_numpy, arrays), row=sees)


def _positions(group: Group) -> np.ndarray:
    prompt = int(group.length_A[0])
    return np.concatenate([np.arange(prompt), *(np.arange(prompt, prompt + n) for n in group.length_A[1:])])


def _segments(group: Group, number: int) -> np.ndarray:
    assert group.answers < ANSWERS, f"{group.answers} answers are more than a segment id can tell apart"
    return number * ANSWERS + np.repeat(np.arange(group.answers + 1), group.length_A)
