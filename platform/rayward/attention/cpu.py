"""Blocks on a CPU, one after the other, by the flash attention that torch keeps for itself there; R queries may share a head of keys."""

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
    out = v.new_empty(len(blocks.query_Q), *q.shape[1:-1], v.shape[-1])
    lse = q.new_empty(q.shape[1], len(out), dtype=torch.promote_types(q.dtype, torch.float32))
    shares = q.shape[1] // k.shape[1]
    q, into = (_grouped(t, shares) for t in (q, out))
    k, v = (_shared(t, shares) for t in (k, v))
    lse_RHQ, at = lse.unflatten(0, (-1, shares)).transpose(0, 1), 0
    for (a, b), (c, d) in zip(blocks.queries, blocks.keys, strict=True):
        to = at + b - a
        into[:, :, at:to], lse_RHQ[:, :, at:to] = _forward(q[:, :, a:b], k[:, :, c:d], v[:, :, c:d], 0.0, blocks.causal, scale=scale)
        at = to
    return out, lse


def backward(
    grad: Tensor, given: tuple[Tensor, Tensor, Tensor], out: Tensor, lse: Tensor, blocks: Blocks, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dq_QHD, dk_KHD and dv_KHD; see segments.Kernel."""
    counts = (len(blocks.query_Q), len(blocks.key_K), len(blocks.key_K))
    made = [t.new_empty(count, *t.shape[1:]) for t, count in zip(given, counts, strict=True)]
    shares = given[0].shape[1] // given[1].shape[1]
    dq, dk, dv = _grouped(made[0], shares), made[1].transpose(0, 1), made[2].transpose(0, 1)
    grad, out, q = (_grouped(t, shares) for t in (grad, out, given[0]))
    k, v = (_shared(t, shares) for t in given[1:])
    lse_RHQ = lse.unflatten(0, (-1, shares)).transpose(0, 1)
    ends = (itertools.accumulate((b - a for a, b in side), initial=0) for side in (blocks.queries, blocks.keys))
    bounds = zip(*(itertools.pairwise(side) for side in ends), strict=True)
    for (a, b), (c, d), ((qa, qb), (ka, kb)) in zip(blocks.queries, blocks.keys, bounds, strict=True):
        seen = (q[:, :, a:b], k[:, :, c:d], v[:, :, c:d], out[:, :, a:b], lse_RHQ[:, :, a:b])
        dq[:, :, qa:qb], more_k, more_v = _backward(grad[:, :, a:b], *seen, 0.0, blocks.causal, scale=scale)
        dk[:, ka:kb], dv[:, ka:kb] = (t[0] if shares == 1 else t.sum(0) for t in (more_k, more_v))
    return made[0], made[1], made[2]


def attend(q: Tensor, k: Tensor, v: Tensor, row: Row, scale: float) -> Tensor:
    """out_1THD of q, k, v: 1HTD."""
    return over_segments(q, k, v, row, scale, Kernel(forward, backward))


def _grouped(t: Tensor, shares: int) -> Tensor:
    """RHTD of queries: the R-th of those that share a head of keys, for all H of these."""
    return t.unflatten(1, (-1, shares)).permute(2, 1, 0, 3)


def _shared(t: Tensor, shares: int) -> Tensor:
    """RHTD of keys or values: the same for all R, without a copy."""
    return t.transpose(0, 1).expand(shares, -1, -1, -1)
