"""What bodies take and do, found out by asking them: causal or not, packed rows or separate sequences, with masks or without.

examine        with one group of a prompt and two answers: does it look ahead; does one row say what two sequences say
use_segments   does attention over segments (rayward.attention) say what it says with a mask
inputs_of      the arguments of its forward call for a batch
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from rayward import attention
from rayward.batching import Batch, collate
from rayward.errors import ModelError
from rayward.pooling import width_of
from rayward.rendering import Group
from rayward.vocabulary import TiedHead


class Traits(NamedTuple):
    """What a body was seen to do."""

    causal: bool  # a token does not change with what comes after it
    shares_prefix: bool  # packed rows give the hidden states of separate sequences


HEADS = ("score", "classifier")  # what Hugging Face calls the last layer


def body_of(classifier: Any) -> Any:
    """The part of a classifier that comes before its head."""
    body = classifier.base_model
    assert body is not classifier, f"{type(classifier).__name__} has no body of its own"
    return body


def head_name_of(classifier: Any) -> str:
    """What a class calls its last layer."""
    name = next((name for name in HEADS if isinstance(getattr(classifier, name, None), nn.Module)), "")
    if not name:
        raise ModelError(
            f"{type(classifier).__name__} has no head called {' or '.join(HEADS)}",
            "put a fresh one on the language model that it was made from",
        )
    return name


def check_width(head: nn.Module, pooling: str, config: Any) -> None:
    """Whether a head is as wide as what is read; a tied one is."""
    if isinstance(head, TiedHead):
        return
    reads = next(m for m in head.modules() if isinstance(m, nn.Linear)).in_features
    own = config.get_text_config()
    wide = width_of(pooling) * (getattr(own, "word_embed_proj_dim", None) or own.hidden_size)  # OPT projects what it says
    if reads != wide:
        raise ModelError(
            f"pooling={pooling} reads {wide} numbers per sequence, and the head takes {reads}",
            "leave net.pooling out to go on with the head that is there, or put a fresh one in its place: --set net.new_head=true",
        )


def inputs_of(module: Any, batch: Batch, *, packed: bool, kernel: attention.Attend | None = None) -> dict[str, Any]:
    """The arguments of a forward call: a 4-D mask and positions for packed rows, the usual 2-D mask for separate sequences.

    With a kernel, a single row comes with who sees whom instead of a mask; the 4-D mask of one element only keeps the body from making one.
    """
    inputs: dict[str, Any] = {"input_ids": batch.token_BT}
    if packed and kernel is not None and batch.row is not None:
        inputs |= {"attention_mask": _no_mask(batch.token_BT.device), "position_ids": batch.position_BT}
        inputs |= {"spans": batch.row, "kernel": kernel}
    elif packed:
        mask_B1TT = batch.mask_BTT().unsqueeze(1)
        if module.config._attn_implementation == "eager":  # adds its mask to the logits instead of choosing by it
            dtype = next(module.parameters()).dtype
            mask_B1TT = torch.zeros_like(mask_B1TT, dtype=dtype).masked_fill(~mask_B1TT, torch.finfo(dtype).min)
        inputs |= {"attention_mask": mask_B1TT, "position_ids": batch.position_BT}
    else:
        inputs["attention_mask"] = (batch.segment_BT >= 0).long()
    if "use_cache" in inspect.signature(module.forward).parameters:
        inputs["use_cache"] = False
    return inputs


@cache
def _no_mask(device: torch.device) -> Tensor:
    """Made once: a copy to a device is waited for."""
    with torch.inference_mode(False):
        return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)


def experts_per_token(body: Any) -> int:
    """How many experts a token of a body goes to, if the body tells of its routers; else 0."""
    recorded = getattr(body, "_can_record_outputs", None) or {}
    return getattr(body.config, "num_experts_per_tok", 0) if "router_logits" in recorded else 0


def sliding_window(config: Any) -> int | None:
    """The width of a local attention window, which a 4-D mask would take away; `examine` looks at too few tokens to see a wide one."""
    names = ("sliding_window", "window_size", "attention_window_size", "attention_chunk_size", "local_attention_window")
    windows = [getattr(config, name, None) for name in names]
    if getattr(config, "use_sliding_window", None) is False:
        windows[0] = None
    return min((w for w in windows if isinstance(w, int) and w > 0), default=None)


@torch.no_grad()
def examine(classifier: Any) -> Traits:
    """Ask a body what it can do, with one group of a prompt and two answers, packed and separate, on its own device and in float32."""
    body, group = body_of(classifier), probe(classifier.config)
    device = next(body.parameters()).device
    was = classifier.training
    classifier.eval()
    try:
        separate = collate([[group]], shared=False).to(device)
        alone_BTD = body(**inputs_of(body, separate, packed=False)).last_hidden_state.float()
        shorter = {n: v[:, :6] if isinstance(v, Tensor) else v for n, v in inputs_of(body, separate, packed=False).items()}
        causal = close(body(**shorter).last_hidden_state.float(), alone_BTD[:, :6])
        packed = collate([[group]], shared=True).to(device)
        try:
            together_BTD = body(**inputs_of(body, packed, packed=True)).last_hidden_state.float()
        except (ValueError, RuntimeError, TypeError, IndexError):  # takes no 4-D mask or no positions
            return Traits(causal, False)
        seen = together_BTD.flatten(0, 1)[packed.place_GK[0]]
        return Traits(causal, causal and close(seen, alone_BTD.flatten(0, 1)[separate.place_GK[0]]))
    finally:
        classifier.train(was)


@torch.no_grad()
def use_segments(classifier: Any) -> bool:
    """Switch a body that takes packed rows to attention over segments, if it then says what it says with a mask, also while training.

    Which kernel does that on another device is seen there (`kernels.choose_kernel`): elsewhere than on a CPU none is tried here.
    Bodies with more in their attention than a softmax of scaled products (soft caps, biases, sinks, dropout) keep their masks.
    """
    before, body = classifier.config._attn_implementation, body_of(classifier)
    if before not in ("sdpa", attention.NAME):
        return False
    attention.register()
    device, was = next(body.parameters()).device, classifier.training
    batch = collate([[probe(classifier.config, 1), probe(classifier.config, 2)]], shared=True).to(device)
    try:
        classifier.eval()
        masked_BTD = body(**inputs_of(body, batch, packed=True)).last_hidden_state.float()
        classifier.set_attn_implementation(attention.NAME)
        classifier.train()
        kernel = attention.KERNELS["segments"].attend if device.type == "cpu" else attention.over_mask
        same = close(body(**inputs_of(body, batch, packed=True, kernel=kernel)).last_hidden_state.float(), masked_BTD)
    except (ValueError, RuntimeError, TypeError, KeyError):
        same = False
    finally:
        classifier.train(was)
    if not same:
        classifier.set_attn_implementation(before)
    return same


def probe(config: Any, seed: int = 0) -> Group:
    """Random tokens: a prompt of 5 and answers of 4 and 3."""
    rng = np.random.default_rng(seed)
    reserved = {config.pad_token_id, 0}
    ids = np.array([t for t in range(1, min(config.vocab_size, 400)) if t not in reserved] or [1], np.int32)
    lengths = np.array([5, 4, 3], np.int32)
    return Group(rng.choice(ids, 12), lengths, np.array([8, 11], np.int32), np.zeros(2, np.float32), 1.0)


def close(a: Tensor, b: Tensor) -> bool:
    """Equal up to the rounding of float32 through many layers."""
    return bool((a - b).abs().max() <= 2e-4 * b.abs().mean().clamp(min=1e-6))
