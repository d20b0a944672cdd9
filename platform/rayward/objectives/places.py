"""What losses over the places of an example share: which place is better than which, gaps between scores, means over what is there."""

from __future__ import annotations

import torch
from torch import Tensor


def better(target_GK: Tensor, mask_GK: Tensor) -> Tensor:
    """better_GKK[g, i, j]: place i is there, place j is there, and i's target is above j's."""
    both_GKK = mask_GK.unsqueeze(-1) & mask_GK.unsqueeze(-2)
    return both_GKK & (target_GK.unsqueeze(-1) > target_GK.unsqueeze(-2))


def next_better(target_GK: Tensor, mask_GK: Tensor) -> Tensor:
    """The pairs of `better` with no third target between them: neighbours in the ranking; all of one tie with all of the next."""
    better_GKK = better(target_GK, mask_GK)
    steps_GKK = better_GKK.float()
    return better_GKK & (steps_GKK @ steps_GKK == 0)  # how many places lie between


def gaps(value_GK: Tensor, mask_GK: Tensor) -> Tensor:
    """gap_GKK[g, i, j] = value_i - value_j; a masked place counts as 0."""
    value_GK = torch.where(mask_GK, value_GK, 0.0)
    return value_GK.unsqueeze(-1) - value_GK.unsqueeze(-2)


def rank(score_GK: Tensor, target_GK: Tensor, mask_GK: Tensor) -> Tensor:
    """rank_GK[g, k] is the rank that place k has by its score, 1 the highest; of equal scores the worse target comes first.

    A rank is a number of a place; an order (argsort) is its inverse, the place at every rank. They differ from three places on.

    >>> score = torch.tensor([[0.2, 0.9, 0.5]])
    >>> rank(score, score, score > 0).tolist(), score.argsort(descending=True).tolist()
    ([[3, 1, 2]], [[1, 2, 0]])
    """
    gap_GKK = gaps(score_GK, mask_GK)
    better_GKK = better(target_GK, mask_GK)
    tied_GKK = (gap_GKK == 0) & ~better_GKK.transpose(-1, -2)
    earlier_GKK = torch.ones_like(tied_GKK).tril(-1)
    above_GKK = (gap_GKK < 0) | (tied_GKK & (better_GKK | earlier_GKK))
    return 1 + (above_GKK & mask_GK.unsqueeze(-2)).sum(-1)


def pair_mean(loss_GKK: Tensor, pair_GKK: Tensor) -> Tensor:
    """loss_G: the mean over the pairs that count, 0 where there are none. Pairs that do not count get no gradient."""
    return loss_GKK.where(pair_GKK, loss_GKK.new_zeros(())).sum((-1, -2)) / pair_GKK.sum((-1, -2)).clamp(min=1)


def place_mean(loss_GK: Tensor, mask_GK: Tensor, weight_GK: Tensor | None = None) -> Tensor:
    """loss_G: the mean over the places that are there, each times its weight where there are weights; 0 where there is no place."""
    if weight_GK is not None:
        loss_GK = loss_GK * weight_GK.to(loss_GK.dtype)
    return loss_GK.where(mask_GK, loss_GK.new_zeros(())).sum(-1) / mask_GK.sum(-1).clamp(min=1)


def correlation(value_GK: Tensor, other_GK: Tensor, mask_GK: Tensor) -> Tensor:
    """Pearson's correlation over all places of all examples, a scalar; 0 where one does not vary. `other_GK` gets no gradient."""
    count = mask_GK.sum().clamp(min=1)

    def centred(x_GK: Tensor) -> Tensor:
        x_GK = torch.where(mask_GK, x_GK, 0.0)
        return torch.where(mask_GK, x_GK - x_GK.sum() / count, 0.0)

    value_GK, other_GK = centred(value_GK), centred(other_GK.detach().to(value_GK.dtype))
    other_GK = other_GK / ((other_GK**2).sum() / count + TINY).sqrt()
    return (value_GK * other_GK).sum() / count / ((value_GK**2).sum() / count + TINY).sqrt()


TINY = 1e-10  # of a variance: keeps the root of nothing differentiable
