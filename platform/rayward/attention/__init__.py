"""Attention over the segments of one long row, without a mask.

    row      prompt 1 | answer 1 | answer 2 | prompt 2 | answer 1 ...
    prompt   attends to its own earlier tokens
    answer   attends to its own earlier tokens and to all of its prompt

A dense mask over a row costs the square of its length, also where nothing may be seen. Here what is computed is what is seen, rows can be
as long as memory allows, and none has padding.

    rows        who sees whom, as blocks (row_of)
    segments    attention over blocks by any kernel that gives a log-sum-exp, forward and backward
    cpu         that kernel on a CPU: KERNELS["segments"]
    varlen      and on a GPU, in bf16 or fp16
    flex        another way on a GPU, in any precision
    proof       whether a kernel says on a device what masks say there

Shape letters: H heads, T tokens, D width of a head, N tokens that are read.

>>> import torch
>>> row = row_of([(2, 3, 1)])  # a prompt of 2 tokens and answers of 3 and 1
>>> q, k, v = torch.randn(3, 1, 2, 6, 8).unbind()
>>> masked = over_mask(q, k, v, row, 8**-0.5)
>>> torch.allclose(KERNELS["segments"].attend(q, k, v, row, 8**-0.5), masked, atol=1e-6)
True
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from rayward.attention import cpu, varlen
from rayward.attention.rows import Blocks, Row, row_of
from rayward.attention.segments import Attend, Kernel, SegmentAttention, over_mask, over_segments

NAME = "rayward_segments"  # of the attention function in transformers' registry
Choice = Literal["auto", "mask", "segments", "varlen", "flex"]  # what `net.attention` may be


class Way(NamedTuple):
    """A kernel, and where it runs."""

    attend: Attend
    device: str
    precisions: tuple[torch.dtype, ...] = ()  # none: any

    def runs(self, device: torch.device, precision: torch.dtype) -> bool:
        """Whether it is made for a device and a precision; whether it is right there, proof.against_masks says."""
        return device.type == self.device and (not self.precisions or precision in self.precisions)


def _flex(q: Tensor, k: Tensor, v: Tensor, row: Row, scale: float) -> Tensor:
    from rayward.attention import flex  # and with it a compiler

    return flex.attend(q, k, v, row, scale)


KERNELS = {  # the first that runs and is right is taken
    "segments": Way(cpu.attend, "cpu"),
    "varlen": Way(varlen.attend, "cuda", varlen.PRECISIONS),
    "flex": Way(_flex, "cuda"),
}

__all__ = [
    "KERNELS",
    "NAME",
    "Attend",
    "Blocks",
    "Choice",
    "Kernel",
    "Read",
    "Row",
    "SegmentAttention",
    "Way",
    "attend",
    "attend_where_read",
    "over_mask",
    "over_segments",
    "register",
    "row_of",
]


class Read(NamedTuple):
    """The tokens of one row whose hidden states are read, and what each of them sees."""

    at_N: Tensor  # int64, each once
    sees_NT: Tensor | None  # bool; None: attention is as ever


def attend_where_read(q: Tensor, k: Tensor, v: Tensor, read: Read, scale: float) -> Tensor:
    """out_1HTD at the tokens that are read, zeros at the others; `k` and `v` may have fewer heads than `q`."""
    few = q.index_select(2, read.at_N)
    said = torch.nn.functional.scaled_dot_product_attention(
        few, k, v, attn_mask=read.sees_NT, scale=scale, enable_gqa=k.shape[1] < q.shape[1]
    )
    return torch.zeros_like(q).index_copy(2, read.at_N, said)


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    spans: Row | None = None,
    kernel: Attend | None = None,
    read: Read | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function as transformers calls it; without `spans` and `kernel` it is transformers' own for SDPA.

    With `read` only the tokens that are read attend to anything.

    Raises:
        ValueError: if a body wants something in its attention that blocks do not have; it is then given masks (`reward_model.segmented`).
    """
    if spans is None or kernel is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    given = {name: kwargs.pop(name, None) for name in ("dropout", "softcap", "position_bias", "s_aux")}
    wanted = [name for name, value in given.items() if value is not None and (isinstance(value, Tensor) or value)]
    if wanted:
        raise ValueError(f"attention over segments has no {', '.join(wanted)}")
    query, key = query.to(value.dtype), key.to(value.dtype)  # autocast leaves rotated ones in float32
    scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
    if read is not None:
        return attend_where_read(query, key, value, read, scale).transpose(1, 2).contiguous(), None
    return kernel(query, key, value, spans, scale), None


def register() -> None:
    """Make the function known to transformers, with the masks of SDPA for calls without spans."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
