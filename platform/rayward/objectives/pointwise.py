"""Losses of every place by itself: a probability, a rating, a class."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rayward.objectives.places import place_mean


def squared_error(score_GK: Tensor, target_GK: Tensor, mask_GK: Tensor) -> Tensor:
    """(score - target)^2, averaged over places: regression on ratings (HelpSteer2, arXiv 2406.08673); missing places are masked."""
    error_GK = torch.where(mask_GK, score_GK - target_GK.to(score_GK.dtype), 0.0)
    return place_mean(error_GK * error_GK, mask_GK)


def _by_count(count_GK: Tensor | None, by_count: float) -> Tensor | None:
    return count_GK / by_count if by_count and count_GK is not None else None


def binary_cross_entropy(
    score_GK: Tensor, target_GK: Tensor, mask_GK: Tensor, count_GK: Tensor | None = None, by_count: float = 0.0
) -> Tensor:
    """Cross-entropy of sigma(score) against a probability, averaged over places; soft targets stay soft (arXiv 2312.08935, eq. 2).

    Its minimum is the entropy of the targets, reached at sigma(score) = target. Targets lie in [0, 1]. With two classes it is their
    cross-entropy, since the score is the difference of their logits. With `by_count` c above 0 a place weighs
    n / c, n the verdicts behind its target (`count_GK`): up to the factor c it is the likelihood of the verdicts themselves, so eight of
    sixteen tell more than one of two. With c about the usual n the loss keeps its size.
    """
    score_GK, target_GK = torch.where(mask_GK, score_GK, 0.0), torch.where(mask_GK, target_GK, 0.0)
    loss_GK = F.binary_cross_entropy_with_logits(score_GK, target_GK.to(score_GK.dtype), reduction="none")
    return place_mean(loss_GK, mask_GK, _by_count(count_GK, by_count))


def three_class(
    score_GK: Tensor, target_GK: Tensor, mask_GK: Tensor, output_GKC: Tensor, count_GK: Tensor | None = None, by_count: float = 0.0
) -> Tensor:
    """Cross-entropy of wrong, neutral, right (PRM800K's -1, 0, 1; Lightman et al. 2023, arXiv 2305.20050), averaged over places.

    Target 0 is wrong, 1/2 neutral, 1 right; one between two of them is shared between them, so that its mean stays the target. Needs a
    head of three outputs in that order; `score_GK` is not used, it is what they come to. `by_count` is that of binary_cross_entropy.
    """
    target_GK = torch.where(mask_GK, target_GK, 0.0).to(output_GKC.dtype)
    right_GK, wrong_GK = (2 * target_GK - 1).clamp(min=0), (1 - 2 * target_GK).clamp(min=0)
    share_GKC = torch.stack([wrong_GK, 1 - wrong_GK - right_GK, right_GK], -1)
    output_GKC = torch.where(mask_GK.unsqueeze(-1), output_GKC, 0.0)
    return place_mean(-(share_GKC * output_GKC.log_softmax(-1)).sum(-1), mask_GK, _by_count(count_GK, by_count))


def next_token(
    score_GK: Tensor, target_GK: Tensor, mask_GK: Tensor, output_GKC: Tensor, count_GK: Tensor | None = None, by_count: float = 0.0
) -> Tensor:
    """-log P(verdict) under a language model's softmax over all tokens, averaged over places (GenRM, arXiv 2408.15240, section 3).

        -t log P(right's token) - (1 - t) log P(wrong's token)

    `binary_cross_entropy` of the same head takes the softmax over the two tokens alone; this is larger by -log P(one of the two), and so
    also teaches to reply with a verdict at all, as a model must that is to be asked by sampling. Needs a head of three outputs: wrong,
    right, and the log-sum-exp of all other logits; `score_GK` is not used, it is right - wrong. `by_count` is as elsewhere.
    """
    target_GK = torch.where(mask_GK, target_GK, 0.0).to(output_GKC.dtype)
    wrong_GK, right_GK, _ = torch.where(mask_GK.unsqueeze(-1), output_GKC, 0.0).log_softmax(-1).unbind(-1)
    return place_mean(-target_GK * right_GK - (1 - target_GK) * wrong_GK, mask_GK, _by_count(count_GK, by_count))
