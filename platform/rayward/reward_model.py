"""Reward models: a Hugging Face sequence-classification model, read at the places a batch names.

    hidden_BTD  what the body says at every token         pooled_GKD  what is read at every place
    output_GKC  the head's answer, in float32             score_GK    what it comes to (heads.Reading)

What is saved is a plain Hugging Face folder (config.json, model.safetensors, tokenizer): `AutoModelForSequenceClassification` loads
it, and gives the same score for one unpadded sequence where the pooling is the model's own. `config.json` carries a `rayward` entry:
pooling, rendering, temperature, what it was trained on.

What a body can do is found out by asking it, not by a list of names (`examine`): whether it is causal, and whether packed rows with a
shared prompt give the scores that separate sequences give.
"""

from __future__ import annotations

import inspect
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from rayward import attention, foreign, heads
from rayward.batching import ANSWERS, Batch, BatchSettings, collate, micro_batches
from rayward.config import choose, parse_settings
from rayward.errors import ModelError, RaywardError
from rayward.heads import Reading
from rayward.pooling import POOLINGS, Pooling, width_of
from rayward.records import Example
from rayward.rendering import Group, tag_token

SCALAR = Reading()


@dataclass(frozen=True)
class ModelSettings:
    """Which model, and how a score is read from it."""

    pooling: Pooling = "auto"  # last: at the place; first, mean, max, mean_max: of the sequence; own: the class's way; auto: last if causal
    new_head: bool = False  # put a fresh head on a model that has none (a base model); without it, a missing head is an error
    head: str = "auto"  # scalar, two_class, three_class, attributes or debiased (heads.KINDS); auto: the model's own, else by the labels
    head_layers: int = 1  # 2: a hidden layer before the outputs of a new head
    head_tokens: str = ""  # a new head starts from the language model's rows of these tokens, right first, e.g. "+ -"
    attribute_weights: str = "{}"  # JSON of attribute -> weight in the score; without any all weigh alike
    dropout: bool = False  # keep the model's dropout on while training
    trust_remote_code: bool = False  # run code that comes with the model
    width: int = 64  # hidden size of a model from scratch (--model tiny)
    layers: int = 2  # layers of a model from scratch
    words: int = 8192  # most words in the vocabulary of a model from scratch

    def __post_init__(self) -> None:
        if self.width % 16 or self.width < 16:
            raise ValueError(f"width={self.width} must be a multiple of 16")
        if self.layers < 1:
            raise ValueError(f"layers={self.layers} must be at least 1")
        if self.head != "auto":
            choose(heads.KINDS, self.head, "head")
        if self.head_layers not in (1, 2):
            raise ValueError(f"head_layers={self.head_layers} must be 1 or 2")
        parse_settings(self.attribute_weights, "attribute_weights", '{"helpful": 2}')


class Traits(NamedTuple):
    """What a body was seen to do."""

    causal: bool  # a token does not change with what comes after it
    shares_prefix: bool  # packed rows give the hidden states of separate sequences


class RewardModel(nn.Module):
    """Body and head; `score_GK = model(batch)`."""

    def __init__(self, classifier: Any, pooling: Pooling = "auto", max_length: int = 0, reading: Reading = SCALAR):
        super().__init__()
        self.classifier: Any = classifier
        self.reading = reading
        window = _sliding_window(classifier.config)
        seen = examine(classifier)
        outgrown = bool(window and max_length > window)
        self.traits = Traits(seen.causal, seen.shares_prefix and not outgrown)
        self.pooling: Pooling = ("last" if seen.causal else "own") if pooling == "auto" else pooling
        if self.pooling == "last" and not seen.causal:
            raise ModelError(
                "pooling=last reads a token that has seen what comes after it: this body is not causal",
                "use --set net.pooling=mean or own",
            )
        plain = isinstance(self.head, nn.Linear | nn.Sequential)
        if self.pooling == "own" and seen.causal and plain:
            raise ModelError("pooling=own would look for the last token that is not padding, by its id", "use --set net.pooling=last")
        self.shares_prefix = self.traits.shares_prefix and self.pooling == "last"
        self.segmented = self.shares_prefix and use_segments(classifier)
        if self.pooling != "own" and not plain:
            raise ModelError(
                f"pooling={self.pooling} needs a linear head, and {type(classifier).__name__} has a {type(self.head).__name__}",
                "use --set net.pooling=own",
            )
        self.head.float()
        if self.pooling == "own":
            self.head.forward = partial(_in_float32, self.head.forward)
        else:
            _check_width(self.head, self.pooling, classifier.config)
        self.train(classifier.training)

    @property
    def head_name(self) -> str:
        """What Hugging Face's class calls its last layer: the prefix of its parameters."""
        return _head_name(self.classifier)

    @property
    def head(self) -> Any:
        """The last layer or layers, hidden size to outputs."""
        return getattr(self.classifier, self.head_name)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def flat(self) -> bool:
        """Whether all tokens of a micro-batch lie in one row, with attention over its segments and without a mask."""
        return self.segmented and self.shares_prefix and self.device.type == "cpu"

    def forward(self, batch: Batch) -> Tensor:
        """score_GK, float32. Masked places hold whatever place 0 scores."""
        return self.reading.pick(self.outputs(batch), batch.column_GK)

    def outputs(self, batch: Batch) -> Tensor:
        """output_GKC, float32: everything the head says at the places of a batch."""
        T = batch.token_BT.shape[1]
        if self.pooling == "own":
            logit_BC = self.classifier(**_inputs(self.classifier, batch, packed=False)).logits
            return logit_BC.float()[batch.place_GK // T]
        hidden_BTD = self.hidden(batch)
        if self.pooling == "last":
            pooled_GKD = hidden_BTD.flatten(0, 1)[batch.place_GK]
        else:
            pooled_GKD = POOLINGS[self.pooling](hidden_BTD, batch.segment_BT >= 0)[batch.place_GK // T]
        with torch.autocast(pooled_GKD.device.type, enabled=False):
            return self.head(pooled_GKD.float())

    def hidden(self, batch: Batch) -> Tensor:
        """hidden_BTD of the body."""
        body = _body(self.classifier)
        return body(**_inputs(body, batch, packed=self.shares_prefix, flat=self.flat)).last_hidden_state

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Dropout off and no gradients inside, and the mode it was in after."""
        was = self.training
        self.eval()
        try:
            with torch.inference_mode():
                yield
        finally:
            self.train(was)


def _in_float32(forward: Callable[..., Tensor], hidden: Tensor, *more: Any, **named: Any) -> Tensor:
    """A class's own head as ours are: in float32, whatever the body is in."""
    with torch.autocast(hidden.device.type, enabled=False):
        return forward(hidden.float(), *more, **named)


def autocast(device: torch.device, precision: Literal["auto", "fp32", "bf16"]) -> Any:
    """bf16 where it is asked for, or where the device is made for it; weights and head stay in float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=is_bf16(device, precision))


def is_bf16(device: torch.device, precision: Literal["auto", "fp32", "bf16"]) -> bool:
    """Whether a forward pass on this device is in bf16."""
    return precision == "bf16" or (precision == "auto" and device.type == "cuda")


def score_groups(
    model: RewardModel, groups: Sequence[Group], settings: BatchSettings, precision: Literal["auto", "fp32", "bf16"] = "auto"
) -> list[np.ndarray]:
    """The scores of every group, one per place, in order."""
    scores: list[np.ndarray] = [np.empty(0)] * len(groups)
    with model.evaluating(), autocast(model.device, precision):
        for start in range(0, len(groups), 1024):  # so that no more than these are sorted and held as batches
            for numbers, batch in micro_batches(groups[start : start + 1024], settings, model.shares_prefix, model.flat):
                score_GK = model(batch.to(model.device)).cpu().numpy()
                for n, score_K in zip(numbers, score_GK, strict=True):
                    scores[start + n] = score_K[: len(groups[start + n].place_K)]
    return scores


# ------------------------------------------------------------------------------------------------- what bodies take and do


def _body(classifier: Any) -> Any:
    body = classifier.base_model
    assert body is not classifier, f"{type(classifier).__name__} has no body of its own"
    return body


def _check_width(head: nn.Module, pooling: str, config: Any) -> None:
    """Whether a head is as wide as what is read."""
    reads = next(m for m in head.modules() if isinstance(m, nn.Linear)).in_features
    own = config.get_text_config()
    wide = width_of(pooling) * (getattr(own, "word_embed_proj_dim", None) or own.hidden_size)  # OPT projects what it says
    if reads != wide:
        raise ModelError(
            f"pooling={pooling} reads {wide} numbers per sequence, and the head takes {reads}",
            "leave net.pooling out to go on with the head that is there, or put a fresh one in its place: --set net.new_head=true",
        )


def _inputs(module: Any, batch: Batch, *, packed: bool, flat: bool = False) -> dict[str, Any]:
    """The arguments of a forward call: a 4-D mask and positions for packed rows, the usual 2-D mask for separate sequences.

    With `flat`, a single row comes with its spans instead of a mask; the 4-D mask of one element only keeps the body from making one.
    """
    inputs: dict[str, Any] = {"input_ids": batch.token_BT}
    if packed and flat and len(batch.token_BT) == 1:
        inputs |= {"attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool), "position_ids": batch.position_BT}
        inputs["spans"] = attention.spans_of(batch.segment_BT[0], ANSWERS)
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


def _sliding_window(config: Any) -> int | None:
    """The width of a local attention window, which a 4-D mask would take away; `examine` looks at too few tokens to see a wide one."""
    names = ("sliding_window", "window_size", "attention_window_size", "attention_chunk_size", "local_attention_window")
    windows = [getattr(config, name, None) for name in names]
    if getattr(config, "use_sliding_window", None) is False:
        windows[0] = None
    return min((w for w in windows if isinstance(w, int) and w > 0), default=None)


@torch.no_grad()
def examine(classifier: Any) -> Traits:
    """Ask a body what it can do, with one group of a prompt and two answers, packed and separate, on its own device and in float32."""
    body, group = _body(classifier), _probe(classifier.config)
    device = next(body.parameters()).device
    was = classifier.training
    classifier.eval()
    try:
        separate = collate([[group]], shared=False).to(device)
        alone_BTD = body(**_inputs(body, separate, packed=False)).last_hidden_state.float()
        shorter = {n: v[:, :6] if isinstance(v, Tensor) else v for n, v in _inputs(body, separate, packed=False).items()}
        causal = _close(body(**shorter).last_hidden_state.float(), alone_BTD[:, :6])
        packed = collate([[group]], shared=True).to(device)
        try:
            together_BTD = body(**_inputs(body, packed, packed=True)).last_hidden_state.float()
        except (ValueError, RuntimeError, TypeError, IndexError):  # takes no 4-D mask or no positions
            return Traits(causal, False)
        seen = together_BTD.flatten(0, 1)[packed.place_GK[0]]
        return Traits(causal, causal and _close(seen, alone_BTD.flatten(0, 1)[separate.place_GK[0]]))
    finally:
        classifier.train(was)


@torch.no_grad()
def use_segments(classifier: Any) -> bool:
    """Switch a body that takes packed rows to attention over segments, if it then says what it says with a mask, also while training.

    Bodies with more in their attention than a softmax of scaled products (soft caps, biases, sinks, dropout) keep their masks.
    """
    before, body = classifier.config._attn_implementation, _body(classifier)
    if before not in ("sdpa", attention.NAME):
        return False
    attention.register()
    device, was = next(body.parameters()).device, classifier.training
    batch = collate([[_probe(classifier.config, 1), _probe(classifier.config, 2)]], shared=True).to(device)
    try:
        classifier.eval()
        masked_BTD = body(**_inputs(body, batch, packed=True)).last_hidden_state.float()
        classifier.set_attn_implementation(attention.NAME)
        classifier.train()
        same = _close(body(**_inputs(body, batch, packed=True, flat=True)).last_hidden_state.float(), masked_BTD)
    except (ValueError, RuntimeError, TypeError, KeyError):
        same = False
    finally:
        classifier.train(was)
    if not same:
        classifier.set_attn_implementation(before)
    return same


def _probe(config: Any, seed: int = 0) -> Group:
    """Random tokens: a prompt of 5 and answers of 4 and 3."""
    rng = np.random.default_rng(seed)
    reserved = {config.pad_token_id, 0}
    ids = np.array([t for t in range(1, min(config.vocab_size, 400)) if t not in reserved] or [1], np.int32)
    lengths = np.array([5, 4, 3], np.int32)
    return Group(rng.choice(ids, 12), lengths, np.array([8, 11], np.int32), np.zeros(2, np.float32), 1.0)


def _close(a: Tensor, b: Tensor) -> bool:
    """Equal up to the rounding of float32 through many layers."""
    return bool((a - b).abs().max() <= 2e-4 * b.abs().mean().clamp(min=1e-6))


# --------------------------------------------------------------------------------------------------------- load and save

HEADS = ("score", "classifier")  # what Hugging Face calls the last layer


class Loaded(NamedTuple):
    """A model with its tokenizer and the `rayward` entry of its config."""

    model: RewardModel
    tokenizer: Any
    notes: dict[str, Any]


def load_model(
    path: str, settings: ModelSettings, max_length: int = 0, attributes: Sequence[str] = (), how: Mapping[str, Any] | None = None
) -> Loaded:
    """A model and its tokenizer from a folder or the hub. A missing head is an error unless `new_head` asks for one.

    `attributes` are the names of the targets, for a new head that gives one output per attribute; `how` is said to `from_pretrained`.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    _quiet()
    options = {"trust_remote_code": settings.trust_remote_code}
    try:
        stored = foreign.stored_head(path, settings.new_head)
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
        config = AutoConfig.from_pretrained(path, **options)
        notes = dict(getattr(config, "rayward", None) or {})
        reading = _reading_of(path, settings, notes, attributes, stored)
        pooling = settings.pooling if settings.pooling != "auto" else notes.get("pooling") or "auto"
        _check_class(path, config)
        classifier, info = AutoModelForSequenceClassification.from_pretrained(
            path,
            num_labels=len(reading.names),
            output_loading_info=True,
            use_safetensors=True,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # looked at below
            **options,
            **(how or {}),
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        if isinstance(error, RaywardError):
            raise
        raise ModelError(
            f"--model {path} cannot be loaded: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
            "give a folder with config.json, model.safetensors and a tokenizer, a name on the hub, models:/NAME@ALIAS, or tiny",
        ) from None
    kept = bool(notes) and reading.fits(Reading.of_notes(notes.get("head"))) and _same_width(path, settings, notes, pooling)
    adopted = stored is not None and (kept or not notes) and _adopt(path, classifier, stored, reading, pooling)
    if kept and reading.layers > 1 and not adopted:
        raise ModelError(f"--model {path} lacks weights of its head of {reading.layers} layers", "save it again")
    head = _without_head(path, settings, info, adopted)
    narrow = settings.new_head and not adopted and width_of(pooling) > 1
    if head or (notes and not kept) or narrow:
        _fresh_head(classifier, reading, pooling)
        if settings.head_tokens:
            rows = _token_rows(path, heads.token_ids(tokenizer, settings.head_tokens, reading), options)
            heads.start_from_rows(getattr(classifier, _head_name(classifier)), rows, reading)
    elif settings.new_head and settings.head_tokens:
        raise ModelError(f"--model {path} has a head, and head_tokens starts a new one", "leave head_tokens out, or name a language model")
    _settle(classifier.config, tokenizer, reading)
    if not settings.dropout:
        _without_dropout(classifier)
    max_length = max_length or (notes.get("render") or {}).get("max_length") or 0
    return Loaded(RewardModel(classifier, pooling, max_length, reading), tokenizer, notes)


def _without_head(path: str, settings: ModelSettings, info: dict[str, Any], deep: bool) -> list[str]:
    """The weights of the head that a checkpoint does not have, or not in that shape; a hole in the body is an error."""
    resized = {name: shape for name, shape, _ in info["mismatched_keys"]}
    missing = sorted({*info["missing_keys"], *resized})
    missing = [n for n in missing if not n.endswith("position_ids") and not (deep and n.split(".")[0] in HEADS)]
    head = [n for n in missing if n.split(".")[0] in HEADS]
    holes = [n for n in missing if n not in head and "pooler" not in n]
    if head and not holes and set(missing) <= set(resized) and not settings.new_head:
        raise _other_outputs(path, settings, resized[head[0]][0])
    if holes or (missing and not settings.new_head):
        lacking, unused = holes or missing, sorted(info["unexpected_keys"])
        beside = f" and has some that its class has no place for: {_some(unused)}" if unused else ""
        raise ModelError(
            f"--model {path} lacks weights for {_some(lacking)}{beside}",
            "the body is not whole: save it again"
            if holes
            else "if it is a base model and is to get a fresh head, say --set net.new_head=true",
        )
    return head


def _other_outputs(path: str, settings: ModelSettings, outputs: int) -> ModelError:
    return ModelError(
        f"--model {path} cannot be loaded with head={settings.head}: its own has {outputs} outputs",
        "name the head it has, e.g. --set net.head=two_class, or put a fresh one in its place: --set net.new_head=true",
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (" ..." if len(names) > 4 else "")


def _check_class(path: str, config: Any) -> None:
    """Whether there is a sequence classifier for a body: in transformers, or with the model."""
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

    brought = getattr(config, "auto_map", None) or {}
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING and "AutoModelForSequenceClassification" not in brought:
        raise ModelError(
            f"--model {path} cannot be loaded: transformers has no sequence classifier for bodies of type {config.model_type}",
            "take a body that has one, e.g. qwen3, llama, gemma3_text, mixtral, jamba or modernbert",
        )


def _reading_of(
    path: str, settings: ModelSettings, notes: dict[str, Any], attributes: Sequence[str], stored: foreign.StoredHead | None
) -> Reading:
    """The head that is there, made here or elsewhere, or the one that is asked for."""
    if notes or stored is None or settings.new_head:
        return _reading(path, settings, notes, attributes)
    single = replace(settings, head_layers=1) if stored.layers > 1 else settings
    reading = replace(_reading(path, single, notes, attributes), layers=stored.layers)
    if stored.outputs != len(reading.names):
        raise _other_outputs(path, settings, stored.outputs)
    return reading


def _same_width(path: str, settings: ModelSettings, notes: dict[str, Any], pooling: str) -> bool:
    """Whether the head of a model that was made here reads as much as the pooling gives; an error where no other may take its place."""
    own = notes.get("pooling") or "auto"
    same = width_of(own) == width_of(pooling)
    if not same and not settings.new_head:
        raise ModelError(
            f"--model {path} has a head for pooling={own}, which is not as wide as one for pooling={pooling}",
            "leave net.pooling out to go on with it, or put a fresh one in its place: --set net.new_head=true",
        )
    return same


def _adopt(path: str, classifier: Any, stored: foreign.StoredHead, reading: Reading, pooling: str) -> bool:
    """Whether the class's head was replaced by one that lies in the checkpoint in a way that the class does not know."""
    name = _head_name(classifier)
    there = getattr(classifier, name)
    fits = (stored.outputs, stored.layers) == (len(reading.names), reading.layers)
    if not fits or not isinstance(there, nn.Linear) or stored.width != width_of(pooling) * there.in_features:
        return False
    try:
        return foreign.adopt(classifier, name, stored)
    except (KeyError, OSError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"--model {path} lacks weights of its head of {reading.layers} layers: {error}", "save it again") from None


def _reading(path: str, settings: ModelSettings, notes: dict[str, Any], attributes: Sequence[str]) -> Reading:
    """The head that is there, or the one that is asked for."""
    own = Reading.of_notes(notes.get("head"))
    if not notes and not settings.new_head and (settings.head_layers > 1 or settings.head_tokens):
        raise ModelError("head_layers and head_tokens are about a new head", "say --set net.new_head=true, or leave them out")
    if path == "tiny" and settings.head_tokens:
        raise ModelError("head_tokens: a model from scratch has no language model to take rows from", "leave head_tokens out")
    if settings.head_tokens and width_of(settings.pooling) > 1:
        raise ModelError(f"head_tokens starts a head that reads one token, and not pooling={settings.pooling}", "leave one of them out")
    kind = settings.head
    if kind == "auto":
        kind = "attributes" if len(attributes) > 1 and settings.new_head and not notes else own.kind
    same = bool(notes) and kind == own.kind
    names = own.names if same and (settings.head == "auto" or set(attributes) <= set(own.names)) else tuple(attributes)
    layers = max(own.layers, settings.head_layers) if same else settings.head_layers
    asked = heads.make_reading(kind, layers, names, settings.attribute_weights)
    if notes and not asked.fits(own) and not settings.new_head:
        raise ModelError(
            f"--model {path} has a head of {_in_words(own)}, not of {_in_words(asked)}",
            "leave net.head and net.head_layers out to go on with it, or put a fresh one in its place: --set net.new_head=true",
        )
    return replace(asked, weights=own.weights) if asked.fits(own) and not parse_settings(settings.attribute_weights, "") else asked


def _in_words(reading: Reading) -> str:
    return f"kind {reading.kind} ({', '.join(reading.names)}; {reading.layers} layer{'s' if reading.layers > 1 else ''})"


@torch.no_grad()
def _token_rows(path: str, ids: Sequence[int], options: dict[str, Any]) -> Tensor:
    """The rows of a language model's output layer that belong to some tokens, row_ND.

    Raises:
        ModelError: if it is no causal language model, or its logits are not these rows times what its body says (a bias, a cap, a scale).
    """
    from transformers import AutoModelForCausalLM

    way_out = "leave head_tokens out for a random head"
    try:
        language, info = AutoModelForCausalLM.from_pretrained(
            path, use_safetensors=True, dtype=torch.float32, output_loading_info=True, **options
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"head_tokens: {path} is no causal language model: {str(error).splitlines()[0]}", way_out) from None
    if info["missing_keys"]:
        raise ModelError(f"head_tokens: {path} was saved without its output layer ({', '.join(sorted(info['missing_keys']))})", way_out)
    row_ND = language.get_output_embeddings().weight[list(ids)].clone()
    token_BT = torch.arange(1, 9).remainder(language.config.vocab_size).unsqueeze(0)
    hidden_BTD = _body(language)(input_ids=token_BT).last_hidden_state
    if not _close(language(input_ids=token_BT).logits[..., list(ids)], hidden_BTD @ row_ND.T):
        raise ModelError(f"head_tokens: the logits of {path} are more than rows of its output layer (a bias, a cap or a scale)", way_out)
    return row_ND


def register_tag(loaded: Loaded, tag: str) -> bool:
    """Make a step tag one token of the tokenizer, with a row of its own in the embedding; whether anything had to be done.

    A new row starts as the mean of the others (Hewitt 2021), so that the first step does not begin with an outlier.
    """
    model, tokenizer = loaded.model, loaded.tokenizer
    if tag_token(tokenizer, tag) is not None:
        return False
    before = len(tokenizer)
    tokenizer.add_tokens([tag], special_tokens=True)
    if len(tokenizer) > model.classifier.get_input_embeddings().num_embeddings:
        model.classifier.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        weight = model.classifier.get_input_embeddings().weight
        weight[before : len(tokenizer)] = weight[:before].mean(0)
    return True


def _quiet() -> None:
    """No bars for shards, no warning of a fresh head: that is checked, and an error."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _head_name(classifier: Any) -> str:
    name = next((name for name in HEADS if isinstance(getattr(classifier, name, None), nn.Module)), "")
    if not name:
        raise ModelError(
            f"{type(classifier).__name__} has no head called {' or '.join(HEADS)}",
            "put a fresh one on the language model that it was made from",
        )
    return name


def _fresh_head(classifier: Any, reading: Reading, pooling: str = "auto") -> None:
    """Fresh weights in the class's own head, or a head of several layers, or of twice the width, in its place."""
    name = _head_name(classifier)
    head = getattr(classifier, name)
    wide = width_of(pooling)
    if reading.layers == 1 and wide == 1:
        for layer in head.modules():
            if isinstance(layer, nn.Linear):
                heads.fresh(layer)
    elif isinstance(head, nn.Linear):
        setattr(classifier, name, heads.make_head(wide * head.in_features, reading))
    else:
        asked = f"head_layers={reading.layers}" if wide == 1 else f"pooling={pooling}"
        raise ModelError(
            f"{asked} takes the place of a linear head, and {type(classifier).__name__} has a {type(head).__name__}",
            "leave it out",
        )


def _settle(config: Any, tokenizer: Any, reading: Reading) -> None:
    """Tell the plain Hugging Face class what its outputs are called and what padding is; our own scores never depend on it.

    Where padding and end of text are one token it is told of none: it would skip the end of every text. It then takes one text at a
    time, and reads the token that we read.
    """
    config.id2label = dict(enumerate(reading.names))
    config.label2id = {name: n for n, name in enumerate(reading.names)}
    foreign.drop_normaliser(config)
    pad = config.pad_token_id if config.pad_token_id is not None else tokenizer.pad_token_id
    config.pad_token_id = None if pad == tokenizer.eos_token_id else pad


def _without_dropout(classifier: nn.Module) -> None:
    for module in classifier.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout_prob"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def save_model(model: RewardModel, tokenizer: Any, folder: Path, notes: dict[str, Any]) -> None:
    """A plain Hugging Face folder with safetensors, its config carrying `notes` as `rayward`."""
    _quiet()
    model.classifier.config.rayward = {**notes, "pooling": model.pooling, "head": model.reading.as_notes()}
    model.classifier.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def read_notes(folder: Path) -> dict[str, Any]:
    """The `rayward` entry of a saved model's config."""
    return json.loads((folder / "config.json").read_text(encoding="utf-8")).get("rayward") or {}


# ---------------------------------------------------------------------------------------------------------- from scratch

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} <|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)


def tiny_model(examples: Iterable[Example], settings: ModelSettings, max_length: int, seed: int, attributes: Sequence[str] = ()) -> Loaded:
    """A small Qwen3 decoder from scratch, and a word-level tokenizer of the words that the examples use most."""
    from transformers import Qwen3Config, Qwen3ForSequenceClassification

    tokenizer = word_tokenizer(examples, settings.words)
    reading = _reading("tiny", replace(settings, new_head=True), {}, attributes)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=settings.width,
        intermediate_size=3 * settings.width,
        num_hidden_layers=settings.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=settings.width // 4,
        max_position_embeddings=max_length,
        num_labels=len(reading.names),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(seed)
    classifier = Qwen3ForSequenceClassification(config)
    _fresh_head(classifier, reading, settings.pooling)
    return Loaded(RewardModel(classifier, settings.pooling, max_length, reading), tokenizer, {})


def word_tokenizer(examples: Iterable[Example], most: int) -> Any:
    """One token per word or run of punctuation, the most frequent words first; roles and ends of turns are tokens of their own."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    split = pre_tokenizers.Whitespace()
    counts: Counter[str] = Counter()
    for example in examples:
        for text in (*(m.content for m in example.prompt), *("".join(a) for a in example.answers)):
            counts.update(word for word, _ in split.pre_tokenize_str(text))
    special = ["<|pad|>", "<|unknown|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"]
    words = [w for w, _ in sorted(counts.items(), key=lambda c: (-c[1], c[0])) if w not in special][: max(0, most - len(special))]
    tokenizer = Tokenizer(models.WordLevel({w: n for n, w in enumerate(special + words)}, unk_token="<|unknown|>"))
    tokenizer.pre_tokenizer = split
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        unk_token="<|unknown|>",
        eos_token="<|end|>",
        additional_special_tokens=special[3:],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
