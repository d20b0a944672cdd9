"""Reward models: a Hugging Face sequence-classification model with one output, read at the places a batch names.

    hidden_BTD  what the body says at every token         pooled_GKD  what is read at every place
    score_GK    the head's answer, in float32

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
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from rayward.batching import Batch, BatchSettings, collate, micro_batches
from rayward.errors import ModelError
from rayward.records import Example
from rayward.rendering import Group

Pooling = Literal["auto", "last", "first", "mean", "own"]


@dataclass(frozen=True)
class ModelSettings:
    """Which model, and how a score is read from it."""

    pooling: Pooling = "auto"  # last: at the place; mean, first: over the sequence; own: the class's own way; auto: last if causal
    new_head: bool = False  # put a fresh head on a model that has none (a base model); without it, a missing head is an error
    dropout: bool = False  # keep the model's dropout on while training
    trust_remote_code: bool = False  # run code that comes with the model
    width: int = 64  # hidden size of a model from scratch (--model tiny)
    layers: int = 2  # layers of a model from scratch
    words: int = 8192  # most words in the vocabulary of a model from scratch

    def __post_init__(self) -> None:
        if self.width % 16 or self.width < 16:
            raise ValueError(f"width={self.width} must be a multiple of 16")


class Traits(NamedTuple):
    """What a body was seen to do."""

    causal: bool  # a token does not change with what comes after it
    shares_prefix: bool  # packed rows give the hidden states of separate sequences


class RewardModel(nn.Module):
    """Body and head; `score_GK = model(batch)`."""

    def __init__(self, classifier: Any, pooling: Pooling = "auto", max_length: int = 0):
        super().__init__()
        self.classifier: Any = classifier
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
        if self.pooling == "own" and seen.causal and isinstance(self.head, nn.Linear):
            raise ModelError("pooling=own would look for the last token that is not padding, by its id", "use --set net.pooling=last")
        self.shares_prefix = self.traits.shares_prefix and self.pooling == "last"
        if self.pooling != "own" and not isinstance(self.head, nn.Linear):
            raise ModelError(
                f"pooling={self.pooling} needs a linear head, and {type(classifier).__name__} has a {type(self.head).__name__}",
                "use --set net.pooling=own",
            )
        self.train(classifier.training)

    @property
    def head(self) -> Any:
        """The last layer, hidden size to 1."""
        head = getattr(self.classifier, "score", None) or getattr(self.classifier, "classifier", None)
        assert isinstance(head, nn.Module), f"{type(self.classifier).__name__} has neither `score` nor `classifier`"
        return head

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def forward(self, batch: Batch) -> Tensor:
        """score_GK, float32. Masked places hold whatever place 0 scores."""
        T = batch.token_BT.shape[1]
        if self.pooling == "own":
            logit_B1 = self.classifier(**_inputs(self.classifier, batch, packed=False)).logits
            return logit_B1[:, 0].float()[batch.place_GK // T]
        hidden_BTD = self.hidden(batch)
        if self.pooling == "last":
            pooled_GKD = hidden_BTD.flatten(0, 1)[batch.place_GK]
        elif self.pooling == "first":
            pooled_GKD = hidden_BTD[:, 0][batch.place_GK // T]
        else:
            real_BT1 = (batch.segment_BT >= 0).unsqueeze(-1)
            mean_BD = (hidden_BTD.float() * real_BT1).sum(1) / real_BT1.sum(1)
            pooled_GKD = mean_BD[batch.place_GK // T]
        with torch.autocast(pooled_GKD.device.type, enabled=False):
            bias = self.head.bias.float() if self.head.bias is not None else None
            score_GK1 = F.linear(pooled_GKD.float(), self.head.weight.float(), bias)
        return score_GK1.squeeze(-1)

    def hidden(self, batch: Batch) -> Tensor:
        """hidden_BTD of the body."""
        return _body(self.classifier)(**_inputs(_body(self.classifier), batch, packed=self.shares_prefix)).last_hidden_state

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Dropout off and no gradients inside, and the mode it was in after."""
        was = self.training
        self.eval()
        with torch.inference_mode():
            yield
        self.train(was)


def autocast(device: torch.device, precision: Literal["auto", "fp32", "bf16"]) -> Any:
    """bf16 where it is asked for, or where the device is made for it; weights and head stay in float32."""
    wanted = precision == "bf16" or (precision == "auto" and device.type == "cuda")
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=wanted)


def score_groups(
    model: RewardModel, groups: Sequence[Group], settings: BatchSettings, precision: Literal["auto", "fp32", "bf16"] = "auto"
) -> list[np.ndarray]:
    """The scores of every group, one per place, in order."""
    scores: list[np.ndarray] = [np.empty(0)] * len(groups)
    with model.evaluating(), autocast(model.device, precision):
        for start in range(0, len(groups), 1024):  # packing looks at every row for every group
            for numbers, batch in micro_batches(groups[start : start + 1024], settings, model.shares_prefix):
                score_GK = model(batch.to(model.device)).cpu().numpy()
                for n, score_K in zip(numbers, score_GK, strict=True):
                    scores[start + n] = score_K[: len(groups[start + n].place_K)]
    return scores


# ------------------------------------------------------------------------------------------------- what bodies take and do


def _body(classifier: Any) -> Any:
    body = classifier.base_model
    assert body is not classifier, f"{type(classifier).__name__} has no body of its own"
    return body


def _inputs(module: Any, batch: Batch, *, packed: bool) -> dict[str, Tensor | bool]:
    """The arguments of a forward call: a 4-D mask and positions for packed rows, the usual 2-D mask for separate sequences."""
    inputs: dict[str, Tensor | bool] = {"input_ids": batch.token_BT}
    if packed:
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
    config, body = classifier.config, _body(classifier)
    rng = np.random.default_rng(0)
    reserved = {config.pad_token_id, 0}
    ids = np.array([t for t in range(1, min(config.vocab_size, 400)) if t not in reserved] or [1], np.int32)
    lengths = np.array([5, 4, 3], np.int32)
    group = Group(rng.choice(ids, 12), lengths, np.array([8, 11], np.int32), np.zeros(2, np.float32), 1.0)
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


def load_model(path: str, settings: ModelSettings, max_length: int = 0) -> Loaded:
    """A model and its tokenizer from a folder or the hub. A missing head is an error unless `new_head` asks for one."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    _quiet()
    options = {"trust_remote_code": settings.trust_remote_code}
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
        classifier, info = AutoModelForSequenceClassification.from_pretrained(
            path, num_labels=1, output_loading_info=True, use_safetensors=True, dtype=torch.float32, **options
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise ModelError(
            f"--model {path} cannot be loaded: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
            "give a folder with config.json, model.safetensors and a tokenizer, a name on the hub, models:/NAME@ALIAS, or tiny",
        ) from None
    missing = sorted(n for n in info["missing_keys"] if not n.endswith("position_ids"))
    head = [n for n in missing if n.split(".")[0] in HEADS]
    holes = [n for n in missing if n not in head and "pooler" not in n]
    if holes or (missing and not settings.new_head):
        lacking = holes or missing
        raise ModelError(
            f"--model {path} lacks weights for {', '.join(lacking[:4])}{' ...' if len(lacking) > 4 else ''}",
            "the body is not whole: save it again"
            if holes
            else "if it is a base model and is to get a fresh head, say --set net.new_head=true",
        )
    notes = dict(getattr(classifier.config, "rayward", None) or {})
    pooling = settings.pooling if settings.pooling != "auto" else notes.get("pooling") or "auto"
    if head:
        _fresh_head(classifier)
    _with_padding(classifier, tokenizer)
    if not settings.dropout:
        _without_dropout(classifier)
    max_length = max_length or (notes.get("render") or {}).get("max_length") or 0
    return Loaded(RewardModel(classifier, pooling, max_length), tokenizer, notes)


def _quiet() -> None:
    """No bars for shards, no warning of a fresh head: that is checked, and an error."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _fresh_head(classifier: Any) -> None:
    """Normal with standard deviation 1/sqrt(d+1), bias 0 (Stiennon et al. 2020, appendix B.1)."""
    for name in HEADS:
        head = getattr(classifier, name, None)
        if isinstance(head, nn.Linear):
            nn.init.normal_(head.weight, std=(head.in_features + 1) ** -0.5)
            if head.bias is not None:
                nn.init.zeros_(head.bias)


def _with_padding(classifier: Any, tokenizer: Any) -> None:
    """Tell the plain Hugging Face class what padding is; our own scores never depend on it.

    Where padding and end of text are one token it is told of none: it would skip the end of every text. It then takes one text at a
    time, and reads the token that we read.
    """
    pad = classifier.config.pad_token_id if classifier.config.pad_token_id is not None else tokenizer.pad_token_id
    classifier.config.pad_token_id = None if pad == tokenizer.eos_token_id else pad


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
    model.classifier.config.rayward = {**notes, "pooling": model.pooling}
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


def tiny_model(examples: Iterable[Example], settings: ModelSettings, max_length: int, seed: int) -> Loaded:
    """A small Qwen3 decoder from scratch, and a word-level tokenizer of the words that the examples use most."""
    from transformers import Qwen3Config, Qwen3ForSequenceClassification

    tokenizer = word_tokenizer(examples, settings.words)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=settings.width,
        intermediate_size=3 * settings.width,
        num_hidden_layers=settings.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=settings.width // 4,
        max_position_embeddings=max_length,
        num_labels=1,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(seed)
    classifier = Qwen3ForSequenceClassification(config)
    _fresh_head(classifier)
    return Loaded(RewardModel(classifier, settings.pooling, max_length), tokenizer, {})


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
