"""Attention over the segments of one long row, without a mask: what packed rows use on a CPU.

    row      prompt 1 | answer 1 | answer 2 | prompt 2 | answer 1 ...
    prompt   attends to its own earlier tokens
    answer   attends to its own earlier tokens and to all of its prompt

A dense mask over a row costs the square of its length, also where nothing may be seen. Here a prompt with its first answer is one causal
block, every later answer is one too, and these together are a full block of queries against the prompt's keys. So what is computed is
what is seen, rows can be as long as memory allows, and none has padding.

A query with two blocks gets two partial results, each with the logarithm of its sum of exponentials; with these they add up to the whole
softmax exactly (Milakov & Gimelshein 2018, arXiv 1805.02867; ring attention puts blocks of keys together so, arXiv 2310.01889). The
backward pass takes the blocks one by one, given the whole result and its logarithm (Dao et al. 2022, arXiv 2205.14135, algorithm 4).

Shape letters: H heads, T tokens, D width of a head.

>>> import torch
>>> segment_T = torch.tensor([0, 0, 1, 1, 1, 2])  # a prompt of 2 tokens and answers of 3 and 1
>>> spans_of(segment_T, answers=4096)
((0, 2, (2, 5, 6)),)
>>> q, k, v = torch.randn(3, 1, 2, 6, 8).unbind()
>>> mask = torch.tensor([[1,0,0,0,0,0], [1,1,0,0,0,0], [1,1,1,0,0,0], [1,1,1,1,0,0], [1,1,1,1,1,0], [1,1,0,0,0,1]]).bool()
>>> whole = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
>>> torch.allclose(SegmentAttention.apply(q, k, v, spans_of(segment_T, 4096), 8**-0.5), whole, atol=1e-6)
True
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

NAME = "rayward_segments"  # of the attention function in transformers' registry
Spans = tuple[tuple[int, int, tuple[int, ...]], ...]  # per prompt: where it starts and ends, and where its answers start and the last ends

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def spans_of(segment_T: Tensor, answers: int) -> Spans:
    """The prompts and answers of a row; segment ids are group * `answers` + answer, with 0 for the prompt."""
    ids, counts = (t.tolist() for t in segment_T.unique_consecutive(return_counts=True))
    spans: list[tuple[int, int, list[int]]] = []
    start, group = 0, None
    for name, count in zip(ids, counts, strict=True):
        if name // answers != group:
            group = name // answers
            prompt = start + (count if name % answers == 0 else 0)
            spans.append((start, prompt, [prompt]))
        start += count
        if start > spans[-1][2][-1]:
            spans[-1][2].append(start)
    return tuple((first, prompt, tuple(ends)) for first, prompt, ends in spans)


class SegmentAttention(torch.autograd.Function):
    """out_1HTD = softmax(q k^T * scale) v over what every segment may see, on a CPU."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, spans: Spans, scale: float) -> Tensor:
        """q, k, v: 1HTD."""
        out = torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
        lse = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
        for start, prompt, ends in spans:
            for a, b in _blocks(start, prompt, ends):
                out[:, :, a:b], lse[:, :, a:b] = _forward(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], 0.0, True, scale=scale)
            a, b = _later(ends)
            if start < prompt and a < b:
                seen, seen_lse = _forward(q[:, :, a:b], k[:, :, start:prompt], v[:, :, start:prompt], 0.0, False, scale=scale)
                own_lse = lse[:, :, a:b]
                out[:, :, a:b].lerp_(seen, torch.sigmoid(seen_lse - own_lse).unsqueeze(-1).to(seen.dtype))
                lse[:, :, a:b] = torch.logaddexp(own_lse, seen_lse)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.spans, ctx.scale = spans, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of q, k, v, block by block."""
        q, k, v, out, lse = ctx.saved_tensors
        (grad,) = grads
        dq, dk, dv = (torch.empty_like(t) for t in (q, k, v))

        def block(a: int, b: int, c: int, d: int, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
            queries = (t[:, :, a:b] for t in (out, lse))
            keys = (t[:, :, c:d] for t in (k, v))
            return _backward(grad[:, :, a:b], q[:, :, a:b], *keys, *queries, 0.0, causal, scale=ctx.scale)

        for start, prompt, ends in ctx.spans:
            for a, b in _blocks(start, prompt, ends):
                dq[:, :, a:b], dk[:, :, a:b], dv[:, :, a:b] = block(a, b, a, b, True)
            a, b = _later(ends)
            if start < prompt and a < b:
                more_q, more_k, more_v = block(a, b, start, prompt, False)
                dq[:, :, a:b] += more_q
                dk[:, :, start:prompt] += more_k
                dv[:, :, start:prompt] += more_v
        return dq, dk, dv, None, None


def _blocks(start: int, prompt: int, ends: tuple[int, ...]) -> list[tuple[int, int]]:
    """Every causal block of a span: the prompt with the first answer, which goes on from it, and each later answer."""
    bounds = (start, *ends[1:]) if len(ends) > 1 else (start, prompt)
    return list(itertools.pairwise(bounds))


def _later(ends: tuple[int, ...]) -> tuple[int, int]:
    """Where the answers after the first lie; they see the prompt through a block of their own."""
    return ends[min(1, len(ends) - 1)], ends[-1]


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *, spans: Spans | None = None, **kwargs: Any
) -> tuple[Tensor, None]:
    """An attention function as transformers calls it; without `spans` it is transformers' own for SDPA.

    Raises:
        ValueError: if a body wants something in its attention that blocks do not have; it is then given masks (`reward_model.segmented`).
    """
    if spans is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    given = {name: kwargs.pop(name, None) for name in ("dropout", "softcap", "position_bias", "s_aux")}
    wanted = [name for name, value in given.items() if value is not None and (isinstance(value, Tensor) or value)]
    if wanted:
        raise ValueError(f"attention over segments has no {', '.join(wanted)}")
    query, key = query.to(value.dtype), key.to(value.dtype)  # autocast leaves rotated ones in float32
    scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
    key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) if t.shape[1] < query.shape[1] else t for t in (key, value))
    return SegmentAttention.apply(query, key, value, spans, scale).transpose(1, 2).contiguous(), None


def register() -> None:
    """Make the function known to transformers, with the masks of SDPA for calls without spans."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
