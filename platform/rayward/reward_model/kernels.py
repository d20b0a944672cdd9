"""Which kernel attends over the segments of a row, on the device at hand and in the precision of the pass (`net.attention`).

A kernel is taken after it was seen to say what masks say, on that device and in that precision:

    alone      for heads of the body's shape, outputs and gradients (attention.proof)
    in place   in the body, hidden states and the gradient of the embeddings, on a row of short examples

A body that is spread over workers (FSDP2) is not run for that: all of them would have to, and one that fails would leave the others
waiting. That attention over segments is right in the body itself was seen where it was loaded (`bodies.use_segments`).

Shape letters: B rows, T tokens, D width.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rayward.attention import KERNELS, Attend, Choice, cpu
from rayward.attention.proof import Shape, against_masks, difference, reason
from rayward.batching import Batch, collate
from rayward.errors import SettingsError
from rayward.reward_model.bodies import body_of, inputs_of, probe
from rayward.sharding import is_sharded

GROUPS = 16  # examples in the row that a body is run on; 192 tokens, more than a block of flex


def choose_kernel(classifier: Any, wanted: Choice, device: torch.device, precision: torch.dtype, insist: bool = True) -> Attend | None:
    """The first kernel that runs there and is right, or the one that is wanted; None for masks. What was not taken is told on stderr.

    Raises:
        SettingsError: if one was named that does not run there or is wrong, and `insist`.
    """
    words = str(precision).removeprefix("torch.")
    runs = [name for name, way in KERNELS.items() if way.runs(device, precision)]
    failed: dict[str, str] = {}
    if wanted not in ("auto", *runs):
        failed[str(wanted)] = f"it does not run on {device.type} in {words}"
    order = [str(wanted)] if wanted in runs else []
    for name in [*order, *(n for n in runs if n not in order and (wanted == "auto" or not insist))]:
        if not (why := _wrong(classifier, KERNELS[name].attend, device, precision)):
            break
        failed[name] = why
    else:
        name = "mask"
    if failed:
        told = f"attention on {device.type} in {words} is {name}: " + "; ".join(f"{n} was not taken, {why}" for n, why in failed.items())
        if insist and wanted != "auto":
            raise SettingsError(
                f"net.attention={wanted}: {failed[wanted]}", "leave net.attention out: what runs here and is right is taken"
            )
        print(told, file=sys.stderr)
    return KERNELS[name].attend if name in KERNELS else None


def every_worker(word: bool, device: torch.device) -> bool:
    """Whether all workers say yes; all of them must ask."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return word
    said = torch.tensor([float(word)], device=device)
    dist.all_reduce(said, op=dist.ReduceOp.MIN)
    return bool(said.item())


def _wrong(classifier: Any, attend: Attend, device: torch.device, precision: torch.dtype) -> str:
    """What is wrong with a kernel; an empty text if nothing is. On a CPU a body was run with its kernel when it was loaded."""
    if attend is cpu.attend:
        return ""
    try:
        shape = heads_of(classifier.config)
    except (AttributeError, TypeError):
        return "the config does not say how many heads there are"
    why = against_masks(attend, shape, device, precision)
    if why or is_sharded(next(body_of(classifier).parameters())):
        return why
    return in_body(classifier, attend, device, precision)


def heads_of(config: Any) -> Shape:
    """The heads of a body's attention, as its config tells."""
    own = config.get_text_config()
    heads = own.num_attention_heads
    width = getattr(own, "head_dim", None) or own.hidden_size // heads
    return Shape(heads, getattr(own, "num_key_value_heads", None) or heads, width, width)


def in_body(classifier: Any, attend: Attend, device: torch.device, precision: torch.dtype) -> str:
    """What is wrong with a kernel in a body; an empty text if nothing is. The body's weights, gradients and mode are left alone."""
    was = classifier.training
    classifier.eval()
    try:
        with torch.inference_mode(False), torch.enable_grad():
            batch = collate([[probe(classifier.config, n) for n in range(GROUPS)]], shared=True).to(device)
            exact = _numbers(classifier, batch, None, torch.float32)
            rounded = exact if precision == torch.float32 else _numbers(classifier, batch, None, precision)
            try:
                said = _numbers(classifier, batch, attend, precision)
            except Exception as error:  # a compiler or a driver may fail in any way, and each is a reason to do without
                return reason(error)
    finally:
        classifier.train(was)
    return difference(said, rounded, exact, precision)


def _numbers(classifier: Any, batch: Batch, attend: Attend | None, precision: torch.dtype) -> dict[str, Tensor]:
    """Hidden states, and the gradient of what the embeddings said in a direction that is always the same: T x numbers."""
    body, leaves = body_of(classifier), []

    def cut(module: Any, args: Any, output: Tensor) -> Tensor:
        leaves.append(output.detach().requires_grad_())
        return leaves[-1]

    low = precision in (torch.bfloat16, torch.float16)
    hook = classifier.get_input_embeddings().register_forward_hook(cut)
    try:
        with torch.autocast(batch.token_BT.device.type, precision if low else torch.bfloat16, enabled=low, cache_enabled=False):
            hidden_BTD = body(**inputs_of(body, batch, packed=True, kernel=attend)).last_hidden_state.float()
    finally:
        hook.remove()
    direction_BTD = torch.arange(hidden_BTD.numel(), device=hidden_BTD.device).sin().view_as(hidden_BTD)
    [gradient_BTD] = torch.autograd.grad((hidden_BTD * direction_BTD).sum(), leaves)
    return {"hidden states": hidden_BTD.detach()[0], "gradients of embeddings": gradient_BTD.float()[0]}
