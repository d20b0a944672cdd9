"""Attention over the blocks of a row, by any kernel that gives the logarithm of its sum of exponentials beside its result.

A query with two blocks gets two partial results; with their logarithms they add up to the whole softmax exactly (Milakov & Gimelshein
2018, arXiv 1805.02867; ring attention puts blocks of keys together so, arXiv 2310.01889). The backward pass takes the blocks one by one,
given the whole result and its logarithm (Dao et al. 2022, arXiv 2205.14135, algorithm 4). So a layer is two calls of a kernel forward
and two backward, however many groups lie in the row.

Shape letters: T tokens of the row, Q queries and K keys of all blocks (rows.Blocks), H heads, D width of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rayward.attention.rows import Blocks, Row

Attend = Callable[[Tensor, Tensor, Tensor, Row, float], Tensor]  # (q_1HTD, k, v, row, scale) -> out_1THD; k, v may have fewer heads


class Kernel(NamedTuple):
    """Attention inside blocks; tensors of the row go in, those of the blocks' queries and keys come out."""

    forward: Callable[[Tensor, Tensor, Tensor, Blocks, float], tuple[Tensor, Tensor]]
    """(q_THD, k_THD, v_THD, blocks, scale) -> out_QHD, lse_HQ"""
    backward: Callable[[Tensor, tuple[Tensor, Tensor, Tensor], Tensor, Tensor, Blocks, float], tuple[Tensor, Tensor, Tensor]]
    """(grad_THD, (q_THD, k_THD, v_THD), out_THD, lse_HT, blocks, scale) -> dq_QHD, dk_KHD, dv_KHD; out and lse are of all that is seen"""


class SegmentAttention(torch.autograd.Function):
    """out_THD = softmax(q k^T * scale) v over what every token sees."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, row: Row, scale: float, kernel: Kernel) -> Tensor:
        """q, k, v: THD; k and v may have fewer heads where the kernel takes that."""
        out, lse = kernel.forward(q, k, v, row.own, scale)
        if row.across.queries:
            at = row.across.query_Q
            seen, seen_lse = kernel.forward(q, k, v, row.across, scale)
            own_lse = lse[:, at]
            share_QH1 = torch.sigmoid(seen_lse - own_lse).T.unsqueeze(-1)
            out[at] = out[at].lerp_(seen, share_QH1.to(seen.dtype))
            lse[:, at] = torch.logaddexp(own_lse, seen_lse)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.row, ctx.scale, ctx.kernel = row, scale, kernel
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of q, k, v."""
        q, k, v, out, lse = ctx.saved_tensors
        given = (grads[0], (q, k, v), out, lse)
        dq, dk, dv = ctx.kernel.backward(*given, ctx.row.own, ctx.scale)
        blocks = ctx.row.across
        if blocks.queries:
            more_q, more_k, more_v = ctx.kernel.backward(*given, blocks, ctx.scale)
            dq[blocks.query_Q] += more_q
            dk[blocks.key_K] += more_k
            dv[blocks.key_K] += more_v
        return dq, dk, dv, None, None, None


def over_segments(q: Tensor, k: Tensor, v: Tensor, row: Row, scale: float, kernel: Kernel) -> Tensor:
    """out_1THD of q, k, v: 1HTD."""
    q, k, v = (t.squeeze(0).transpose(0, 1) for t in (q, k, v))
    return SegmentAttention.apply(q, k, v, row, scale, kernel).unsqueeze(0)


def over_mask(q: Tensor, k: Tensor, v: Tensor, row: Row, scale: float) -> Tensor:
    """out_1THD of q, k, v: 1HTD, by a dense mask: what every kernel is held against."""
    fewer = k.shape[1] < q.shape[1]
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=row.mask_TT(), scale=scale, enable_gqa=fewer)
    return out.transpose(1, 2).contiguous()
