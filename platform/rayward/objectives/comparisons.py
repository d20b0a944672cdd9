"""Losses over pairs of places: the better one should score higher."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from rayward.objectives.places import better, correlation, gaps, next_better, pair_mean


def bradley_terry(score_GK: Tensor, target_GK: Tensor, mask_GK: Tensor, temperature: float = 1.0, smoothing: float = 0.0) -> Tensor:
    """-log sigma(s_i - s_j), averaged over the pairs with target_i > target_j (Bradley & Terry 1952; InstructGPT arXiv 2203.02155, eq. 1).

    With K = 2 it is the usual pairwise loss, log(1 + exp(s_worse - s_better)); without ties the mean is InstructGPT's 1 / C(K, 2).
    `temperature` divides the gap: the contrastive loss of one pair. With `smoothing` e a judgement is taken to be wrong with chance e,
    -(1 - e) log sigma(gap) - e log sigma(-gap) (label smoothing, arXiv 2401.06080). Shift-invariant; equal targets make no pair.
    """
    gap_GKK = gaps(score_GK, mask_GK) / temperature
    return pair_mean(F.softplus(-gap_GKK) + smoothing * gap_GKK, better(target_GK, mask_GK))


def vote_share(score_GK: Tensor, target_GK: Tensor, mask_GK: Tensor) -> Tensor:
    """Cross-entropy of sigma(s_i - s_j) against the share of votes for i, averaged over pairs (soft labels; arXiv 2401.06080, eq. 7).

        -p log sigma(s_i - s_j) - (1 - p) log sigma(s_j - s_i)   with  p = target_i / (target_i + target_j)

    Targets lie in [0, 1]; equal ones (two of four votes) pull the scores together; 1 and 0 give `bradley_terry`. Shift-invariant.
    """
    score_GK, target_GK = torch.where(mask_GK, score_GK, 0.0), torch.where(mask_GK, target_GK, 0.0).to(score_GK.dtype)
    first, second = torch.triu_indices(score_GK.shape[-1], score_GK.shape[-1], offset=1, device=score_GK.device)
    both_GP = mask_GK[..., first] & mask_GK[..., second]
    total_GP = target_GK[..., first] + target_GK[..., second]
    share_GP = torch.where(total_GP > 0, target_GK[..., first] / total_GP.clamp(min=1e-30), 0.5)
    gap_GP = score_GK[..., first] - score_GK[..., second]
    loss_GP = F.binary_cross_entropy_with_logits(gap_GP, share_GP, reduction="none")
    return torch.where(both_GP, loss_GP, 0.0).sum(-1) / both_GP.sum(-1).clamp(min=1)


def margin(score_GK: Tensor, target_GK: Tensor, mask_GK: Tensor, scale: float = 1.0) -> Tensor:
    """-log sigma(s_i - s_j - m), m = scale * (target_i - target_j), averaged over pairs (Llama 2, arXiv 2307.09288, eq. 2).

    The further apart two answers were judged, the further apart their scores must be. Shift-invariant; scale 0 is `bradley_terry`.
    """
    short_GKK = scale * gaps(target_GK, mask_GK).to(score_GK.dtype) - gaps(score_GK, mask_GK)
    return pair_mean(F.softplus(short_GKK), better(target_GK, mask_GK))


def scaled(score_GK: Tensor, target_GK: Tensor, mask_GK: Tensor) -> Tensor:
    """-(target_i - target_j) log sigma(s_i - s_j), averaged over pairs (scaled Bradley-Terry; HelpSteer2, arXiv 2410.01257, section 3).

    A pair judged twice as far apart counts as if it were there twice. Shift-invariant; target gaps of 1 give `bradley_terry`.
    """
    times_GKK = gaps(target_GK, mask_GK).to(score_GK.dtype)
    return pair_mean(times_GKK * F.softplus(-gaps(score_GK, mask_GK)), better(target_GK, mask_GK))


def hinge(score_GK: Tensor, target_GK: Tensor, mask_GK: Tensor, margin: float = 1.0) -> Tensor:
    """max(0, margin - (s_i - s_j)), averaged over pairs (ranking SVM, Joachims 2002).

    A pair that is right by `margin` teaches nothing more. With distances d = -s from the prompt it is the triplet loss
    max(0, d_better - d_worse + margin) (FaceNet, arXiv 1503.03832, section 3.1). Shift-invariant.
    """
    return pair_mean(F.relu(margin - gaps(score_GK, mask_GK)), better(target_GK, mask_GK))


def focal(score_GK: Tensor, target_GK: Tensor, mask_GK: Tensor, gamma: float = 2.0) -> Tensor:
    """-(1 - 2 max(0, P - 1/2))^gamma log P, P = sigma(s_i - s_j), averaged over pairs (InternLM2, arXiv 2403.17297, section 4.2).

    A pair weighs 1 while it is wrong and less the surer it is right. Shift-invariant; gamma 0 is `bradley_terry`.
    """
    gap_GKK = gaps(score_GK, mask_GK)
    unsure_GKK = (math.log(2) + F.logsigmoid(-gap_GKK)).clamp(max=0.0)  # the log: a power below 1 has no slope at 0
    return pair_mean(torch.exp(gamma * unsure_GKK) * F.softplus(-gap_GKK), better(target_GK, mask_GK))


def adjacent(score_GK: Tensor, target_GK: Tensor, mask_GK: Tensor) -> Tensor:
    """-log sigma(s_i - s_j), averaged over the pairs next to each other in the ranking: no target lies between target_i and target_j.

    K places without ties make K - 1 pairs, not K(K - 1) / 2, and these settle all others (adjacency posteriors, Burges et al. 2005,
    section 3). All places of a tie are held against all of the next one. Shift-invariant; equals `bradley_terry` where there are two
    different targets.
    """
    return pair_mean(F.softplus(-gaps(score_GK, mask_GK)), next_better(target_GK, mask_GK))


def ranknet(score_GK: Tensor, target_GK: Tensor, mask_GK: Tensor) -> Tensor:
    """Cross-entropy of sigma(s_i - s_j) against 1, or against 1/2 where targets are equal, averaged over all pairs (Burges et al. 2005).

    `bradley_terry` in which ties count too: equal targets pull scores together. Shift-invariant.
    """
    gap_GKK, above_GKK = gaps(score_GK, mask_GK), better(target_GK, mask_GK)
    both_GKK = mask_GK.unsqueeze(-1) & mask_GK.unsqueeze(-2) & ~torch.eye(mask_GK.shape[-1], dtype=torch.bool, device=mask_GK.device)
    tied_GKK = both_GKK & ~above_GKK & ~above_GKK.transpose(-1, -2)
    loss_GKK = torch.where(tied_GKK, 0.5, 1.0) * F.softplus(-gap_GKK)  # a tie is met twice, once from either side
    summed_G = loss_GKK.where(above_GKK | tied_GKK, loss_GKK.new_zeros(())).sum((-1, -2))
    return summed_G / (both_GKK.sum((-1, -2)) // 2).clamp(min=1)


def debiased(
    score_GK: Tensor, target_GK: Tensor, mask_GK: Tensor, output_GKC: Tensor, length_GK: Tensor, length_weight: float = 1.0
) -> Tensor:
    """Bradley-Terry of quality + length, and a quality that does not follow the length (ODIN, arXiv 2402.07319, section 3).

        BT(q + l) + length_weight * (|rho(q, tokens)| + 1 - rho(l, tokens))     q, l: the two outputs; rho: Pearson's correlation

    What length explains of the judgements goes into l, and the score is q alone. The correlations are over all places of the micro-batch
    that take part in a comparison, so an example's loss depends on its neighbours: give `batch.micro_tokens` room for a whole step, and
    train on one worker, to have the paper's. Its third term, orthogonal rows of the head, is left out: a loss does not see weights.
    Shift-invariant. `score_GK` is not used, it is q.
    """
    quality_GK, long_GK = torch.where(mask_GK.unsqueeze(-1), output_GKC, 0.0).unbind(-1)
    compared_G = better(target_GK, mask_GK).any(-1).any(-1)
    used_GK = mask_GK & compared_G.unsqueeze(-1)
    decorrelated = correlation(quality_GK, length_GK, used_GK).abs() + 1 - correlation(long_GK, length_GK, used_GK)
    return bradley_terry(quality_GK + long_GK, target_GK, mask_GK) + torch.where(compared_G, length_weight * decorrelated, 0.0)
