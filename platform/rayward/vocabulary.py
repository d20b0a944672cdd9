"""Logits over a whole vocabulary, where they are needed: a verdict that a language model gives, and the loss of its next token.

A language model's output layer has a row per token, 150,000 of them, so the logits of a batch are many times its hidden states. They are
made a chunk at a time and made again for the gradient, so that memory holds one chunk whatever the batch.

    TiedHead         wrong, right, rest: the logits of two tokens, and of all others together (log-sum-exp)
    next_token_loss  -log softmax over the vocabulary at the token that came

Shape letters: N places, D hidden size, V tokens of the vocabulary.

>>> weight_VD = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
>>> next_token_loss(torch.zeros(2, 2), torch.tensor([0, 2]), weight_VD).exp().round()
tensor([3., 3.])
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from rayward.errors import SettingsError

TIED = "tied"  # an output layer that is the embedding of the input
CHUNK = 1 << 25  # numbers of a chunk of logits: 128 MiB in float32


class TiedHead(nn.Module):
    """A head without weights of its own: it reads a language model's output layer, and what it learns the language model learns."""

    def __init__(self, classifier: Any, layer: str, right: int, wrong: int):
        super().__init__()
        self.layer, self.tokens = layer, (wrong, right)
        self._classifier = [classifier]  # in a list, so that it is no part of its own head

    @property
    def weight(self) -> Tensor:
        """weight_VD of the output layer."""
        return output_weight(self._classifier[0], self.layer)

    def rows(self) -> Tensor:
        """row_2D of the two tokens, wrong first: what a linear head of two classes would be."""
        return self.weight.detach()[list(self.tokens)].float().clone()

    def forward(self, pooled: Tensor) -> Tensor:
        """output[..., 3], float32: the logits of wrong and right, and the log-sum-exp of all others."""
        flat_ND = pooled.float().flatten(0, -2)
        return in_chunks(self._verdict, flat_ND, self.weight).unflatten(0, pooled.shape[:-1])

    def _verdict(self, pooled_ND: Tensor, weight_VD: Tensor) -> Tensor:
        logit_NV = pooled_ND @ weight_VD.float().T
        token = torch.tensor(self.tokens, device=logit_NV.device)
        rest_N = logit_NV.index_fill(-1, token, -torch.inf).logsumexp(-1)
        return torch.cat([logit_NV[:, token], rest_N.unsqueeze(-1)], -1)


def output_weight(classifier: Any, layer: str) -> Tensor:
    """weight_VD of a classifier's output layer.

    Raises:
        SettingsError: if it is spread over workers: every worker would need all of it at every step.
    """
    module = classifier.get_input_embeddings() if layer == TIED else getattr(classifier, layer)
    if isinstance(module.weight, DTensor):
        raise SettingsError(
            "train.shard=true spreads the embedding, and logits over the vocabulary need all of it", "use head_tokens with two_class"
        )
    return module.weight


def next_token_loss(hidden_ND: Tensor, token_N: Tensor, weight_VD: Tensor) -> Tensor:
    """loss_N = -log softmax(hidden W^T) at the token that came, in float32."""

    def lost(hidden_ND: Tensor, token_N: Tensor, weight_VD: Tensor) -> Tensor:
        logit_NV = hidden_ND.float() @ weight_VD.float().T
        return logit_NV.logsumexp(-1) - logit_NV.gather(-1, token_N.unsqueeze(-1)).squeeze(-1)

    return in_chunks(lost, hidden_ND, token_N, weight_VD)


def in_chunks(function: Callable[..., Tensor], *of_places: Tensor) -> Tensor:
    """function(..., weight_VD) over places, as many at a time as CHUNK allows; nothing of a chunk is kept for the gradient."""
    *places, weight_VD = of_places
    size = max(1, CHUNK // len(weight_VD))
    with torch.autocast(weight_VD.device.type, enabled=False):
        parts = zip(*(p.split(size) for p in places), strict=True)
        return torch.cat([checkpoint(function, *part, weight_VD, use_reentrant=False) for part in parts])
