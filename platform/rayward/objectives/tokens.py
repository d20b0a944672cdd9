"""Losses at every token of an answer, not at its end alone. A score is then an estimate that goes on from token to token.

    every_GKT  float  what the model says at every token of the answer that a place is in, T tokens in the longest
    token_GKT  int    the tokens themselves, -1 behind an answer's end

Nothing else changes: what is validated, calibrated and scored is the score at the end. The head is read at every token of the answers,
which takes one more copy of their hidden states in float32; comparisons hold T numbers for every two answers of an example.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rayward.objectives.places import better, pair_mean, place_mean


def token_wise(score_GK: Tensor, target_GK: Tensor, mask_GK: Tensor, every_GKT: Tensor, token_GKT: Tensor) -> Tensor:
    """-log sigma(s_i,t - s_j,t), averaged over tokens t from the first that differs on, then over pairs (DeepSpeed-Chat, arXiv 2308.01320).

    Two answers are compared token by token from where they part to the end of the longer one; an answer that has ended keeps its last
    score, where DeepSpeed-Chat reads padding. Shift-invariant; with answers of one token it is `bradley_terry`. `score_GK` is not used,
    it is the last of the scores.
    """
    there_GKT = (token_GKT >= 0) & mask_GK.unsqueeze(-1)
    token_GKT = torch.where(there_GKT, token_GKT, -1)
    last_GK1 = (there_GKT.sum(-1, keepdim=True) - 1).clamp(min=0)
    along_GKT = torch.arange(there_GKT.shape[-1], device=last_GK1.device).expand_as(there_GKT).minimum(last_GK1)
    held_GKT = torch.where(there_GKT, every_GKT, 0.0).gather(-1, along_GKT)
    gap_GKKT = held_GKT.unsqueeze(-2) - held_GKT.unsqueeze(-3)
    apart_GKKT = (token_GKT.unsqueeze(-2) != token_GKT.unsqueeze(-3)).cumsum(-1) > 0
    counts_GKKT = apart_GKKT & (there_GKT.unsqueeze(-2) | there_GKT.unsqueeze(-3))
    many_GKK = counts_GKKT.sum(-1)
    loss_GKK = torch.where(counts_GKKT, F.softplus(-gap_GKKT), 0.0).sum(-1) / many_GKK.clamp(min=1)
    return pair_mean(loss_GKK, better(target_GK, mask_GK) & (many_GKK > 0))


def token_cross_entropy(score_GK: Tensor, target_GK: Tensor, mask_GK: Tensor, every_GKT: Tensor, token_GKT: Tensor) -> Tensor:
    """Cross-entropy of sigma(s_t) against an answer's target, averaged over its tokens, then over answers (Cobbe et al. 2021, section 4.2).

    Every token of a solution learns whether it ends right, so that the score at a token is the logit of that chance given what stands
    so far: a value function (arXiv 2110.14168; whether its loss is this or a squared error, its mean is the same chance). Targets lie
    in [0, 1]. `score_GK` is not used, it is the last of the scores.
    """
    there_GKT = (token_GKT >= 0) & mask_GK.unsqueeze(-1)
    target_GKT = torch.where(mask_GK, target_GK, 0.0).unsqueeze(-1).expand_as(every_GKT).to(every_GKT.dtype)
    loss_GKT = F.binary_cross_entropy_with_logits(torch.where(there_GKT, every_GKT, 0.0), target_GKT, reduction="none")
    return place_mean(torch.where(there_GKT, loss_GKT, 0.0).sum(-1) / there_GKT.sum(-1).clamp(min=1), mask_GK)
