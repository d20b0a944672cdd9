"""A row by FlexAttention (Dong et al. 2024, arXiv 2412.05496): one compiled kernel, in any precision and for any width of a head.

It skips blocks of 128 x 128 that nobody sees into, and asks for no mask inside those that are seen whole. Which these are follows from
each token's view of the row (rows.Row): a table of tokens by blocks of keys, made on the device, without waiting for it and without a
mask of tokens by tokens.

Shape letters: T tokens, T' the same filled up to whole blocks, N blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from rayward.attention.rows import Row

BLOCK = 128  # tokens
_masks: WeakKeyDictionary[Row, BlockMask] = WeakKeyDictionary()  # of rows that are in use: all layers share one


def attend(q: Tensor, k: Tensor, v: Tensor, row: Row, scale: float) -> Tensor:
    """out_1THD of q, k, v: 1HTD, compiled."""
    return run(_compiled(), q, k, v, row, scale)


def run(kernel: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, row: Row, scale: float) -> Tensor:
    """out_1THD by `flex_attention` as it is, or compiled."""
    if row not in _masks:
        _masks[row] = block_mask(row)
    fewer = k.shape[1] < q.shape[1]
    return kernel(q, k, v, block_mask=_masks[row], scale=scale, enable_gqa=fewer).transpose(1, 2).contiguous()


@cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(flex_attention)


def block_mask(row: Row) -> BlockMask:
    """Which blocks are seen in part, and which whole."""
    any_NN, all_NN = seen_blocks(row)
    own_T, prompt_T, prompt_end_T = row.own_T, row.prompt_T, row.prompt_end_T

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        own = (key <= query) & (key >= own_T[query])
        return own | ((key >= prompt_T[query]) & (key < prompt_end_T[query]))

    T = len(own_T)
    partly, whole = _listed(any_NN & ~all_NN), _listed(all_NN)
    return BlockMask.from_kv_blocks(*partly, *whole, BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(T, T))


def seen_blocks(row: Row) -> tuple[Tensor, Tensor]:
    """any_NN and all_NN, blocks of queries by blocks of keys: whether any query of a block sees any key of another; whether all see all."""
    T, device = len(row.own_T), row.own_T.device
    N = -(-T // BLOCK)
    own_T1, prompt_T1, prompt_end_T1 = (_filled(t, N * BLOCK).unsqueeze(-1) for t in (row.own_T, row.prompt_T, row.prompt_end_T))
    at_T1 = torch.arange(N * BLOCK, device=device).unsqueeze(-1)
    real_T1 = at_T1 < T
    first_N = torch.arange(0, N * BLOCK, BLOCK, device=device)
    last_N = first_N + BLOCK - 1
    any_TN = ((first_N <= at_T1) & (last_N >= own_T1)) | ((first_N < prompt_end_T1) & (last_N >= prompt_T1))
    all_TN = ((last_N <= at_T1) & (first_N >= own_T1)) | ((last_N < prompt_end_T1) & (first_N >= prompt_T1))
    return (any_TN & real_T1).unflatten(0, (N, BLOCK)).any(1), (all_TN & real_T1).unflatten(0, (N, BLOCK)).all(1)


def _filled(values_T: Tensor, length: int) -> Tensor:
    return torch.nn.functional.pad(values_T, (0, length - len(values_T)))


def _listed(seen_NN: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of keys each block of queries sees, and which, those first; with axes for batch and heads."""
    seen = seen_NN.int()
    order = seen.argsort(dim=-1, descending=True, stable=True)
    return seen.sum(-1).int()[None, None], order.int()[None, None]
