"""Blocks on a GPU, all in one call of flash attention for sequences of varying length: bf16 and fp16, fewer heads of keys as they are.

The kernel is torch's own (torch.nn.attention.varlen says how it is called); no package besides is needed. Queries and keys of `own` are
the row as it lies; those of `across` are gathered first. Nothing here waits for the device: where blocks begin and how long the longest
is was counted with the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rayward.attention.rows import Blocks, Row
from rayward.attention.segments import Kernel, over_segments

PRECISIONS = (torch.bfloat16, torch.float16)
_forward = torch.ops.aten._flash_attention_forward
_backward = torch.ops.aten._flash_attention_backward


def forward(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, scale: float) -> tuple[Tensor, Tensor]:
    """out_QHD and lse_HQ; see segments.Kernel."""
    q, k, v = _taken((q, k, v), blocks)
    out, lse, *_ = _forward(q, k, v, *_sequences(blocks), 0.0, blocks.causal, False, scale=scale)
    return out, lse


def backward(
    grad: Tensor, given: tuple[Tensor, Tensor, Tensor], out: Tensor, lse: Tensor, blocks: Blocks, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dq_QHD, dk_KHD and dv_KHD; see segments.Kernel."""
    q, k, v = _taken(given, blocks)
    if not blocks.whole:
        grad, out, lse = grad[blocks.query_Q], out[blocks.query_Q], lse[:, blocks.query_Q]
    dropout_state = torch.zeros(2, dtype=torch.uint64, device=q.device)  # there is no dropout
    unused = torch.empty(0, device=q.device)
    said = (grad.contiguous(), q, k, v, out, lse.contiguous())
    return _backward(*said, *_sequences(blocks), 0.0, blocks.causal, dropout_state, unused, scale=scale)


def attend(q: Tensor, k: Tensor, v: Tensor, row: Row, scale: float) -> Tensor:
    """out_1THD of q, k, v: 1HTD."""
    return over_segments(q, k, v, row, scale, Kernel(forward, backward))


def _taken(given: tuple[Tensor, Tensor, Tensor], blocks: Blocks) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of the blocks, with numbers of a head side by side in memory."""
    q, k, v = given if blocks.whole else (given[0][blocks.query_Q], given[1][blocks.key_K], given[2][blocks.key_K])
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    return q, k, v


def _sequences(blocks: Blocks) -> tuple[Tensor, Tensor, int, int]:
    return blocks.query_ends_N, blocks.key_ends_N, blocks.longest_query, blocks.longest_key
