"""Blocks on a CPU, one after the other, by the flash attention that torch keeps for itself there."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from rayward.attention.rows import Blocks, Row
from rayward.attention.segments import Kernel, over_segments

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def forward(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, scale: float) -> tuple[Tensor, Tensor]:
    """out_QHD and lse_HQ; see segments.Kernel."""
    out = v.new_empty(len(blocks.query_Q), *v.shape[1:])
    lse = q.new_empty(1, q.shape[1], len(out), dtype=torch.promote_types(q.dtype, torch.float32))
    q, k, v = (_heads_first(t) for t in (q, k, v))
    into, at = _heads_first(out), 0
    for (a, b), (c, d) in zip(blocks.queries, blocks.keys, strict=True):
        to = at + b - a
        into[:, :, at:to], lse[:, :, at:to] = _forward(q[:, :, a:b], k[:, :, c:d], v[:, :, c:d], 0.0, blocks.causal, scale=scale)
        at = to
    return out, lse.squeeze(0)


def backward(
    grad: Tensor, given: tuple[Tensor, Tensor, Tensor], out: Tensor, lse: Tensor, blocks: Blocks, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dq_QHD, dk_KHD and dv_KHD; see segments.Kernel."""
    counts = (len(blocks.query_Q), len(blocks.key_K), len(blocks.key_K))
    made = [t.new_empty(count, *t.shape[1:]) for t, count in zip(given, counts, strict=True)]
    dq, dk, dv = (_heads_first(t) for t in made)
    grad, out, q, k, v = (_heads_first(t) for t in (grad, out, *given))
    lse = lse.unsqueeze(0)
    ends = (itertools.accumulate((b - a for a, b in side), initial=0) for side in (blocks.queries, blocks.keys))
    bounds = zip(*(itertools.pairwise(side) for side in ends), strict=True)
    for (a, b), (c, d), ((qa, qb), (ka, kb)) in zip(blocks.queries, blocks.keys, bounds, strict=True):
        seen = (q[:, :, a:b], k[:, :, c:d], v[:, :, c:d], out[:, :, a:b], lse[:, :, a:b])
        of_block = _backward(grad[:, :, a:b], *seen, 0.0, blocks.causal, scale=scale)
        dq[:, :, qa:qb], dk[:, :, ka:kb], dv[:, :, ka:kb] = of_block
    return made[0], made[1], made[2]


def attend(q: Tensor, k: Tensor, v: Tensor, row: Row, scale: float) -> Tensor:
    """out_1THD of q, k, v: 1HTD."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) if t.shape[1] < q.shape[1] else t for t in (k, v))
    return over_segments(q, k, v, row, scale, Kernel(forward, backward))


def _heads_first(t: Tensor) -> Tensor:
    return t.transpose(0, 1).unsqueeze(0)
