"""Who sees whom in a row of prompts and answers, as blocks of queries and keys and not as a mask.

    row      prompt 1 | answer 1 | answer 2 | prompt 2 | answer 1 ...
    own      a causal block: a prompt with its first answer, which goes on from it, and each later answer
    across   a full block: the later answers of a prompt, together, against the prompt's keys

Shape letters: T tokens of the row; Q queries and K keys of all blocks, one block after the other; N blocks.

>>> row = row_of([(2, 3, 1)])  # a prompt of 2 tokens and answers of 3 and 1
>>> row.own.queries, row.across.queries, row.across.keys
(((0, 5), (5, 6)), ((5, 6),), ((0, 2),))
>>> row.mask_TT().int().tolist()[-1]
[1, 1, 0, 0, 0, 1]
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

Ranges = tuple[tuple[int, int], ...]  # from, and up to, as tokens of the row


@dataclass(frozen=True, eq=False)
class Blocks:
    """Blocks of attention: the queries of each see its keys, all of them or (causal) those up to themselves; no token is in two."""

    queries: Ranges
    keys: Ranges
    causal: bool
    whole: bool  # the queries, and the keys, are all tokens of the row in order
    query_Q: Tensor  # int64; where in the row the queries are
    key_K: Tensor
    query_ends_N: Tensor  # int32, N + 1 of them: where each block begins among the queries, and the last one ends
    key_ends_N: Tensor
    longest_query: int  # tokens of the longest block
    longest_key: int

    @classmethod
    def of(cls, queries: Ranges, keys: Ranges, causal: bool, whole: bool) -> Blocks:
        """Blocks of these ranges, on the CPU."""
        (query_Q, query_ends_N, most_q), (key_K, key_ends_N, most_k) = (_side(side) for side in (queries, keys))
        return cls(queries, keys, causal, whole, query_Q, key_K, query_ends_N, key_ends_N, most_q, most_k)


def _side(ranges: Ranges) -> tuple[Tensor, Tensor, int]:
    """Where the tokens of the blocks are, where each block ends among them, and the tokens of the longest."""
    lengths = [b - a for a, b in ranges]
    at = np.concatenate([np.arange(a, b) for a, b in ranges]) if ranges else np.empty(0, np.int64)
    return torch.from_numpy(at), torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32)), max(lengths, default=0)


@dataclass(frozen=True, eq=False)
class Row:
    """The blocks of a row, made on the CPU with the batch, so that no device is waited for; and each token's view of it."""

    own: Blocks
    across: Blocks  # may be none
    own_T: Tensor  # int32; where the causal block of a token begins
    prompt_T: Tensor  # int32; where the prompt begins that a token sees through `across`, 0 if none
    prompt_end_T: Tensor  # int32; where that one ends, 0 if none

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Row:
        """The same on another device."""

        def moved(part: Any) -> Any:
            tensors = {n: t.to(device, non_blocking=non_blocking) for n, t in part.__dict__.items() if isinstance(t, Tensor)}
            return replace(part, **tensors)

        return replace(moved(self), own=moved(self.own), across=moved(self.across))

    def sees(self, query: Tensor, key: Tensor) -> Tensor:
        """Whether tokens see others, by their numbers, which broadcast."""
        own = (key <= query) & (key >= self.own_T[query])
        return own | ((key >= self.prompt_T[query]) & (key < self.prompt_end_T[query]))

    def mask_NT(self, at_N: Tensor) -> Tensor:
        """mask[n, j]: token at_N[n] sees token j."""
        return self.sees(at_N[:, None], torch.arange(len(self.own_T), device=self.own_T.device))

    def mask_TT(self) -> Tensor:
        """mask[i, j]: token i sees token j."""
        return self.mask_NT(torch.arange(len(self.own_T), device=self.own_T.device))


def row_of(groups: Iterable[Iterable[int]]) -> Row:
    """The row that groups make, each given as the tokens of its prompt and of its answers; any of them may be 0."""
    own: list[tuple[int, int]] = []
    later: list[tuple[int, int]] = []
    prompts: list[tuple[int, int]] = []
    start = 0
    for prompt, *answers in groups:
        ends = [start + int(n) for n in itertools.accumulate(answers, initial=prompt)]
        bounds = [start, *(ends[1:] or ends)]
        own += [(a, b) for a, b in itertools.pairwise(bounds) if a < b]
        if prompt and bounds[1] < bounds[-1]:
            later.append((bounds[1], bounds[-1]))
            prompts.append((start, ends[0]))
        start = ends[-1]
    own_T, prompt_T, prompt_end_T = (np.zeros(start, np.int32) for _ in range(3))
    for a, b in own:
        own_T[a:b] = a
    for (a, b), (first, end) in zip(later, prompts, strict=True):
        prompt_T[a:b], prompt_end_T[a:b] = first, end
    return Row(
        Blocks.of(tuple(own), tuple(own), causal=True, whole=True),
        Blocks.of(tuple(later), tuple(prompts), causal=False, whole=False),
        *map(torch.from_numpy, (own_T, prompt_T, prompt_end_T)),
    )
