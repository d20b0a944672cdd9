"""Pooling: what of a body's hidden states the head reads.

    last      D    the token at the place: one score per step or answer; for bodies whose tokens see nothing that comes after them
    first     D    the first token of the sequence, e.g. [CLS]
    mean      D    the mean over the sequence
    max       D    the largest value of every feature over the sequence
    mean_max  2D   both, one after the other (the head is twice as wide)
    own       -    what the class does by itself, e.g. BERT's pooler

A sequence is a prompt with one answer, and all of its tokens that are no padding count, the prompt's too: an encoder mixes the two in
every token, and a mean over a short answer alone is noisier than over both. Only `last` gives different scores to different places of an
answer, and only with `last` are prompts shared (`batching`): the others read states of the prompt once per answer.

Shape letters: B sequences, T tokens, D hidden size.

>>> hidden_BTD = torch.tensor([[[1.0, 0.0], [3.0, -2.0], [9.0, 9.0]]])
>>> POOLINGS["mean_max"](hidden_BTD, torch.tensor([[True, True, False]]))
tensor([[ 2., -1.,  3.,  0.]])
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Pooling = Literal["auto", "last", "first", "mean", "max", "mean_max", "own"]


def first(hidden_BTD: Tensor, real_BT: Tensor) -> Tensor:
    """pooled_BD, float32: the first token."""
    return hidden_BTD[:, 0].float()


def mean(hidden_BTD: Tensor, real_BT: Tensor) -> Tensor:
    """pooled_BD, float32: the mean over real tokens."""
    real_BT1 = real_BT.unsqueeze(-1)
    return (hidden_BTD.float() * real_BT1).sum(1) / real_BT1.sum(1)


def largest(hidden_BTD: Tensor, real_BT: Tensor) -> Tensor:
    """pooled_BD, float32: the maximum over real tokens."""
    return hidden_BTD.float().masked_fill(~real_BT.unsqueeze(-1), -torch.inf).amax(1)


def mean_and_largest(hidden_BTD: Tensor, real_BT: Tensor) -> Tensor:
    """pooled_B2D, float32: the mean, then the maximum."""
    return torch.cat([mean(hidden_BTD, real_BT), largest(hidden_BTD, real_BT)], -1)


POOLINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # those that read a whole sequence
    "first": first,
    "mean": mean,
    "max": largest,
    "mean_max": mean_and_largest,
}


def width_of(pooling: str) -> int:
    """How many times the hidden size a head reads."""
    return 2 if pooling == "mean_max" else 1
