"""Terms of a loss that need more of a body than scores: `--regularise '{"balance": 0.01}'`. One number per example comes out.

    balance    every layer's experts get like shares of an example's tokens
    language   the next token of every answer

Each is defined by one example alone, so that it does not depend on how a step is cut into micro-batches. Padding counts nothing, and a
prompt counts once, however many answers were put behind it or have it in front.

Shape letters: G examples, B rows, T tokens, N = B * T, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rayward.batching import Batch
from rayward.vocabulary import next_token_loss


@dataclass(frozen=True)
class Heard:
    """What a body said of a batch."""

    hidden_BTD: Tensor
    router_NE: tuple[Tensor, ...] = ()  # the logits of every layer's router
    top_k: int = 0  # experts that a token goes to
    weight_VD: Tensor | None = None  # the output layer of the language model


def balance(heard: Heard, batch: Batch) -> Tensor:
    """E * sum over experts of f_e P_e, averaged over layers: 1 where experts are used alike (Fedus et al. 2021, arXiv 2101.03961, eq. 4).

    f_e is the share of an example's tokens that go to expert e, 1/k of a token to each of its k; P_e the mean of the router's softmax.
    Both are of one example (the sequence-wise loss of DeepSeek-V3, arXiv 2412.19437, eq. 17 to 20): over a whole batch, as Switch has
    it, the product of two means would depend on how a step was cut.
    """
    owner_N, weight_N = batch.group_BT.flatten(), _once(batch)
    total_G = _sum(weight_N, owner_N, batch)
    losses = []
    for logit_NE in heard.router_NE:
        prob_NE = logit_NE.float().flatten(0, -2).softmax(-1)
        sent_NE = torch.zeros_like(prob_NE).scatter_(-1, prob_NE.detach().topk(heard.top_k, -1).indices, 1 / heard.top_k)
        share_GE, mean_GE = (_sum(x * weight_N.unsqueeze(-1), owner_N, batch) / total_G.unsqueeze(-1) for x in (sent_NE, prob_NE))
        losses.append(prob_NE.shape[-1] * (share_GE * mean_GE).sum(-1))
    return torch.stack(losses).mean(0)


def language(heard: Heard, batch: Batch) -> Tensor:
    """The mean of -log P(token) over an example's answers: a verifier that goes on modelling language (Cobbe et al. 2021, section 4).

    P is the language model's softmax over its vocabulary; needs `net.language=true`. With `render.judge` the question counts too.
    """
    assert heard.weight_VD is not None
    at_N = (batch.answer_BT.flatten() > 0).nonzero().squeeze(-1)
    hidden_ND = heard.hidden_BTD.flatten(0, 1)[_before(batch).flatten()[at_N]]
    loss_N = next_token_loss(hidden_ND, batch.token_BT.flatten()[at_N], heard.weight_VD)
    owner_N = batch.group_BT.flatten()[at_N]
    return _sum(loss_N, owner_N, batch) / _sum(torch.ones_like(loss_N), owner_N, batch).clamp(min=1)


def _sum(value_N: Tensor, owner_N: Tensor, batch: Batch) -> Tensor:
    """Sums over the tokens of every example."""
    real_N = owner_N >= 0
    total = value_N.new_zeros((len(batch.mask_GK), *value_N.shape[1:]))
    return total.index_add(0, owner_N[real_N], value_N[real_N])


def _once(batch: Batch) -> Tensor:
    """weight_N: 1 for a token of an answer, 1/n for one of a prompt that is there n times, 0 for padding."""
    owner_N, prompt_N = batch.group_BT.flatten(), batch.answer_BT.flatten() == 0
    first_N = (prompt_N & (batch.position_BT.flatten() == 0)).float()
    copies_G = _sum(first_N, owner_N, batch).clamp(min=1)
    return torch.where(prompt_N, 1 / copies_G[owner_N.clamp(min=0)], 1.0) * (owner_N >= 0)


def _before(batch: Batch) -> Tensor:
    """before_BT: where the token before an answer's token lies; that of its first one is the end of the prompt, wherever that is."""
    index_BT = torch.arange(batch.token_BT.numel(), device=batch.token_BT.device).view_as(batch.token_BT) - 1
    answer_BT, group_BT = batch.answer_BT, batch.group_BT
    left_BT = torch.cat([torch.zeros_like(answer_BT[:, :1]), answer_BT[:, :-1]], 1)
    other_BT = (left_BT != 0) & (left_BT != answer_BT)  # another answer of the same prompt stands there
    return torch.where(other_BT & (answer_BT > 0), batch.prompt_GK[group_BT.clamp(min=0), 0], index_BT)


EVERY = "every_token"  # no term of a loss, but what a loss at every token is made of (objectives.tokens)


def every_token(read: Callable[[Tensor], Tensor], heard: Heard, batch: Batch) -> Tensor:
    """every_GKT: what a model reads at every token of the answer that a place is in, 0 behind its end; `read` gives a score to states.

    Where it gives several, score_MN, it is every_MGKT.
    """
    at_N = (batch.answer_BT.flatten() > 0).nonzero().squeeze(-1)
    said_N = read(heard.hidden_BTD.flatten(0, 1)[at_N])
    index_GKT = batch.answer_GKT()
    all_N = said_N.new_zeros((*said_N.shape[:-1], batch.token_BT.numel())).index_copy(-1, at_N, said_N)
    return torch.where(index_GKT >= 0, all_N[..., index_GKT.clamp(min=0)], 0.0)


TERMS: dict[str, Callable[[Heard, Batch], Tensor]] = {"balance": balance, "language": language}
