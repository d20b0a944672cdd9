"""Losses over the whole order of K places.

Targets are values: the higher, the better. A rank (1 is best) is something else, and an order (the place at every rank) a third thing;
no loss takes either. Give ranks as targets by their negative.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rayward.objectives.places import better, gaps, rank


class _Draws(NamedTuple):
    """Every place, drawn by exp(score) among itself and all that are strictly below it."""

    lost_GK: Tensor  # -log P(it is drawn)
    below_GKK: Tensor  # what is below it


def _draws(score_GK: Tensor, target_GK: Tensor, mask_GK: Tensor) -> _Draws:
    score_GK = torch.where(mask_GK, score_GK, 0.0)
    below_GKK = better(target_GK, mask_GK)
    rivals_GKK = below_GKK | torch.eye(score_GK.shape[-1], dtype=torch.bool, device=score_GK.device)
    rest_GK = torch.where(rivals_GKK, score_GK.unsqueeze(-2), -math.inf).logsumexp(-1)
    return _Draws(rest_GK - score_GK, below_GKK)


def plackett_luce(score_GK: Tensor, target_GK: Tensor, mask_GK: Tensor) -> Tensor:
    """-log P(ranking): each place is drawn before all that rank strictly below it (Plackett 1975; ListMLE, Xia et al. 2008).

        sum over i with something below of  log(exp(s_i) + sum of exp(s_j) over j with target_j < target_i) - s_i

    Without ties this is the Plackett-Luce likelihood. Tied places do not compete with each other, only with what is below both; an
    unranked tail, tied at the bottom, is in every denominator and draws nothing itself (the likelihood of a top-k ranking).
    Shift-invariant; equals `bradley_terry` at K = 2; sums to one over all strict rankings of K places.
    """
    draws = _draws(score_GK, target_GK, mask_GK)
    return torch.where(draws.below_GKK.any(-1), draws.lost_GK, 0.0).sum(-1)


def pick_best(score_GK: Tensor, target_GK: Tensor, mask_GK: Tensor, temperature: float = 1.0) -> Tensor:
    """-log of the softmax share of the best of K (Ziegler et al. 2019, arXiv 1909.08593, eq. 1); only who is best is learned.

        log(exp(s_i / T) + sum of exp(s_j / T) over j below i) - s_i / T,  averaged over the places i that nothing is above

    The first factor of `plackett_luce`; with a `temperature` T it is InfoNCE with the best as the positive (arXiv 1807.03748, eq. 4).
    Several best ones do not compete with each other. Shift-invariant; equals `bradley_terry` at K = 2.
    """
    draws = _draws(score_GK / temperature, target_GK, mask_GK)
    best_GK = draws.below_GKK.any(-1) & ~draws.below_GKK.any(-2)
    return torch.where(best_GK, draws.lost_GK, 0.0).sum(-1) / best_GK.sum(-1).clamp(min=1)


def listnet(score_GK: Tensor, target_GK: Tensor, mask_GK: Tensor, temperature: float = 1.0) -> Tensor:
    """Cross-entropy of who comes first by the scores against who comes first by the targets (Cao et al. 2007, section 4.3).

        - sum over i of P_i log Q_i     P = softmax(target / temperature), Q = softmax(score)

    Least where scores and targets / temperature differ by a constant. Unlike the other losses of this file it sees how far apart targets
    are: give a temperature of their size. Shift-invariant.
    """
    least = torch.finfo(score_GK.dtype).min
    share_GK = torch.where(mask_GK, target_GK.to(score_GK.dtype) / temperature, least).softmax(-1)
    said_GK = torch.where(mask_GK, score_GK, least).log_softmax(-1)
    return torch.where(mask_GK, -share_GK * said_GK, 0.0).sum(-1)


def lambdarank(score_GK: Tensor, target_GK: Tensor, mask_GK: Tensor) -> Tensor:
    """-log sigma(s_i - s_j) times how far NDCG moves if i and j swap ranks, summed over pairs (Burges 2010, MSR-TR-2010-82, section 4).

        |gain_i - gain_j| * |1 / log2(1 + rank_i) - 1 / log2(1 + rank_j)| / ideal DCG      gain = 2^level - 1

    `rank` is that of a place by its score now, 1 the highest (`places.rank`); level counts the different targets below a place. The
    weights are constants, so that the gradient is the paper's lambda with sigma = 1. They follow the ranks: values at different
    scores do not compare, so keep weights by accuracy (`train.best_by`). Mistakes near the top weigh most. Shift-invariant.
    """
    pair_GKK = better(target_GK, mask_GK)
    level_GK = _level(target_GK, mask_GK).to(torch.float32)
    top_G1 = level_GK.amax(-1, keepdim=True)
    gain_GK = torch.where(mask_GK, 2.0 ** (level_GK - top_G1) - 2.0**-top_G1, 0.0).to(
        score_GK.dtype
    )  # over 2^top, which the quotient drops
    discount_GK = 1 / (1 + rank(score_GK, target_GK, mask_GK)).to(score_GK.dtype).log2()
    at_K = torch.arange(2, score_GK.shape[-1] + 2, device=score_GK.device).to(score_GK.dtype)
    ideal_G = (gain_GK.sort(-1, descending=True).values / at_K.log2()).sum(-1)
    moved_GKK = (gaps(gain_GK, mask_GK) * gaps(discount_GK, mask_GK)).abs() / ideal_G.clamp(min=1e-6)[..., None, None]
    loss_GKK = moved_GKK * F.softplus(-gaps(score_GK, mask_GK))
    return loss_GKK.where(pair_GKK, loss_GKK.new_zeros(())).sum((-1, -2))


def _level(target_GK: Tensor, mask_GK: Tensor) -> Tensor:
    """level_GK: how many different targets are below a place; 0 for the worst and for what is masked."""
    below_GKK = better(target_GK, mask_GK)
    equal_GKK = mask_GK.unsqueeze(-2) & (target_GK.unsqueeze(-1) == target_GK.unsqueeze(-2))
    first_GK = ~equal_GKK.tril(-1).any(-1)  # no earlier place has the same target
    return (below_GKK & first_GK.unsqueeze(-2)).sum(-1)


def q_ranking(score_GK: Tensor, target_GK: Tensor, mask_GK: Tensor, answer_GK: Tensor | None = None, margin: float = 2.0) -> Tensor:
    """Right steps rise from step to step, and above all wrong ones by `margin` (PQM, Li & Li 2024, arXiv 2410.11287, eq. 10).

        log(1 + sum of exp(s_q) over right q up to t + sum of exp(s_w + margin) over wrong w) - s_t,  averaged over the right steps t

    The 1 is the question itself, at score 0; where a step is wrong it is one of the t's. Right is a target above 1/2. Steps are compared
    inside an answer, `answer_GK`, in the order of the places. Unlike `bradley_terry` over steps it also orders the right ones, and 0
    divides right from wrong, so it is not shift-invariant.
    """
    score_GK = torch.where(mask_GK, score_GK, 0.0)
    right_GK = mask_GK & (target_GK > 0.5)
    wrong_GK = mask_GK & ~right_GK
    K = score_GK.shape[-1]
    answer_GK = torch.zeros_like(mask_GK, dtype=torch.int64) if answer_GK is None else answer_GK
    own_GKK = answer_GK.unsqueeze(-1) == answer_GK.unsqueeze(-2)
    so_far_GKK = own_GKK & right_GK.unsqueeze(-2) & torch.ones(K, K, dtype=torch.bool, device=score_GK.device).tril()
    fails_GKK = own_GKK & wrong_GK.unsqueeze(-2)

    def rivals(seen_GKK: Tensor) -> Tensor:
        """log(1 + what is seen + what is wrong), for every place."""
        raised_GKK = score_GK.unsqueeze(-2) + margin * wrong_GK.unsqueeze(-2).to(score_GK.dtype)
        return F.pad(torch.where(seen_GKK | fails_GKK, raised_GKK, -math.inf), (1, 0)).logsumexp(-1)

    first_wrong_GK = wrong_GK & ~fails_GKK.tril(-1).any(-1)  # stands for the question of its answer
    step_GK = torch.where(right_GK, rivals(so_far_GKK) - score_GK, 0.0)
    question_GK = torch.where(first_wrong_GK, rivals(torch.zeros_like(so_far_GKK)), 0.0)
    return (step_GK + question_GK).sum(-1) / (right_GK | first_wrong_GK).sum(-1).clamp(min=1)
