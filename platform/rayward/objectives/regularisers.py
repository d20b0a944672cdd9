"""Terms that add to any objective. Score and mask in, one number per example out."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rayward.objectives.places import place_mean


def centre(score_GK: Tensor, mask_GK: Tensor) -> Tensor:
    """(sum of the scores)^2: rewards of an example add up to nothing (Eisenstein et al. 2023, arXiv 2312.09244, section 2)."""
    return torch.where(mask_GK, score_GK, 0.0).sum(-1) ** 2


def square(score_GK: Tensor, mask_GK: Tensor) -> Tensor:
    """The mean of score^2 over the places: rewards stay small."""
    return place_mean(torch.where(mask_GK, score_GK, 0.0) ** 2, mask_GK)


def log_barrier(score_GK: Tensor, mask_GK: Tensor) -> Tensor:
    """The mean of -log(1 - (score / 5)^2): rewards stay between -5 and 5 (InternLM2, arXiv 2403.17297, section 4.2).

    It is the paper's -(log(5 + s) + log(5 - s)), moved so that a score of 0 costs nothing. From 4.95 on it goes on as its tangent, so
    that a score beyond the barrier costs and pulls a finite amount.
    """
    size_GK = torch.where(mask_GK, score_GK, 0.0).abs() / 5
    inside_GK = -torch.log1p(-(size_GK.clamp(max=_EDGE) ** 2))
    beyond_GK = (size_GK - _EDGE).clamp(min=0) * (2 * _EDGE / (1 - _EDGE**2))
    return place_mean(inside_GK + beyond_GK, mask_GK)


_EDGE = 0.99

REGULARISERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"centre": centre, "square": square, "log_barrier": log_barrier}
