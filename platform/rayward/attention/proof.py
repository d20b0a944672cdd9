"""Whether a kernel says on a device what dense masks say there: outputs and gradients, on one row of three prompts, in one precision.

What is exact is taken from float32 and masks. A kernel may be three times as far from that as masks are in the same precision, at the
token where each is farthest off, and a little more: so nothing depends on how large numbers are, and a single key too many is seen.

Shape letters: H heads, T tokens, D width of a head.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from rayward.attention.rows import Row, row_of
from rayward.attention.segments import Attend, over_mask

GROUPS = [(300, 200, 1, 150), (1, 130, 40), (64, 64, 64), (90, 20)]  # blocks of 128 that are seen whole, in part and not at all
SLACK = 3.0  # times as far off as masks in the same precision
LEAST = {torch.float32: 1e-3, torch.bfloat16: 8e-3, torch.float16: 1e-3}  # share of a token's norm that is always allowed


class Shape(NamedTuple):
    """Heads of an attention layer."""

    heads: int
    key_heads: int
    width: int
    value_width: int


def against_masks(attend: Attend, shape: Shape, device: torch.device, precision: torch.dtype) -> str:
    """What is wrong with a kernel for heads of that shape; an empty text if nothing is.

    It runs outside of inference mode and autocast, draws from no generator but its own, and talks to no other worker.
    """
    draw = torch.Generator().manual_seed(0)
    row = row_of(GROUPS).to(device)
    T = len(row.own_T)
    sizes = [(shape.heads, shape.width), (shape.key_heads, shape.width), (shape.key_heads, shape.value_width)]
    sizes.append((shape.heads, shape.value_width))  # of the direction in which gradients are taken
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        given = [torch.randn(1, T, heads, width, generator=draw).to(device, precision).transpose(1, 2) for heads, width in sizes]
        exact = _numbers(over_mask, [t.float() for t in given], row)
        rounded = exact if precision == torch.float32 else _numbers(over_mask, given, row)
        try:
            said = _numbers(attend, given, row)
        except Exception as error:  # a compiler or a driver may fail in any way, and each is a reason to do without
            return reason(error)
    return difference(said, rounded, exact, precision)


def difference(said: Mapping[str, Tensor], rounded: Mapping[str, Tensor], exact: Mapping[str, Tensor], precision: torch.dtype) -> str:
    """How what a kernel said (name -> numbers_TD) is too far from what is exact; an empty text if it is not."""
    for name, wanted in exact.items():
        off, usual = _off(said[name], wanted), _off(rounded[name], wanted)
        if not off <= SLACK * usual + LEAST[precision]:  # also if it is no number
            return f"its {name} are off by {off:.2g} of their size, and those of masks by {usual:.2g}"
    return ""


def reason(error: Exception) -> str:
    """An exception in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def _numbers(attend: Attend, given: list[Tensor], row: Row) -> dict[str, Tensor]:
    """Outputs and gradients, T x numbers of all heads."""
    q, k, v = (t.detach().requires_grad_() for t in given[:3])
    out_1THD = attend(q, k, v, row, q.shape[-1] ** -0.5)
    gradients = torch.autograd.grad((out_1THD.float() * given[3].transpose(1, 2).float()).sum(), (q, k, v))
    named = {"outputs": out_1THD, **{f"gradients of {n}": g.transpose(1, 2) for n, g in zip("qkv", gradients, strict=True)}}
    return {name: t.detach().float().squeeze(0).flatten(1) for name, t in named.items()}


def _off(said_TD: Tensor, exact_TD: Tensor) -> float:
    """The largest error of a token, as a share of the usual norm of one."""
    return float((said_TD - exact_TD).norm(dim=-1).max() / exact_TD.norm(dim=-1).square().mean().sqrt().clamp(min=1e-30))
