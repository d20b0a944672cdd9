"""From a folder or the hub to a model with its tokenizer, and back into a plain Hugging Face folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import nn

from rayward import foreign
from rayward.errors import ModelError, RaywardError
from rayward.heads import Reading
from rayward.pooling import width_of
from rayward.rendering import tag_token
from rayward.reward_model.bodies import HEADS
from rayward.reward_model.head_choice import adopt, attach_output_layer, begin_head, other_outputs, reading_of, same_width
from rayward.reward_model.model import RewardModel, Seen
from rayward.reward_model.overall import attach_overall
from rayward.reward_model.settings import SCALAR, ModelSettings
from rayward.vocabulary import TiedHead


class Loaded(NamedTuple):
    """A model with its tokenizer and the `rayward` entry of its config."""

    model: RewardModel
    tokenizer: Any
    notes: dict[str, Any]


def load_model(
    path: str,
    settings: ModelSettings,
    max_length: int = 0,
    attributes: Sequence[str] = (),
    how: Mapping[str, Any] | None = None,
    known: Seen | None = None,
) -> Loaded:
    """A model and its tokenizer from a folder or the hub. A missing head is an error unless `new_head` asks for one.

    `attributes` are the names of the targets, for a new head that gives one output per attribute; `how` is said to `from_pretrained`.
    With what is `known` of the same model it is built without its numbers (on torch's meta device), and is not run.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    _quiet()
    options = {"trust_remote_code": settings.trust_remote_code}
    try:
        stored = foreign.stored_head(path, settings.new_head)
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
        config = AutoConfig.from_pretrained(path, **options)
        notes = dict(getattr(config, "rayward", None) or {})
        reading = reading_of(path, settings, notes, attributes, stored)
        pooling = settings.pooling if settings.pooling != "auto" else notes.get("pooling") or "auto"
        _check_class(path, config)
        classifier, info = AutoModelForSequenceClassification.from_pretrained(
            path,
            num_labels=len(reading.labels),
            output_loading_info=True,
            use_safetensors=True,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # looked at below
            **options,
            **({"device_map": {"": "meta"}} if known is not None else {}),
            **(how or {}),
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        if isinstance(error, RaywardError):
            raise
        raise ModelError(
            f"--model {path} cannot be loaded: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
            "give a folder with config.json, model.safetensors and a tokenizer, a name on the hub, models:/NAME@ALIAS, or tiny",
        ) from None
    kept = bool(notes) and reading.fits(Reading.of_notes(notes.get("head"))) and same_width(path, settings, notes, pooling)
    adopted = stored is not None and (kept or not notes) and adopt(path, classifier, stored, reading, pooling)
    if kept and reading.layers > 1 and not adopted:
        raise ModelError(f"--model {path} lacks weights of its head of {reading.layers} layers", "save it again")
    head = _without_head(path, settings, info, adopted)
    other = settings.new_head and not adopted and (width_of(pooling) > 1 or reading.layers > 1)
    if head or (notes and not kept) or other:
        reading = begin_head(path, classifier, tokenizer, settings, reading, pooling)
    elif settings.new_head and settings.head_tokens:
        raise ModelError(f"--model {path} has a head, and head_tokens starts a new one", "leave head_tokens out, or name a language model")
    attach_output_layer(path, classifier, settings, reading)
    attach_overall(path, classifier, reading, Reading.of_notes(notes.get("head")) if kept else SCALAR)
    _settle(classifier.config, tokenizer, reading)
    if not settings.dropout:
        _without_dropout(classifier)
    max_length = max_length or (notes.get("render") or {}).get("max_length") or 0
    return Loaded(RewardModel(classifier, pooling, max_length, reading, known, settings.attention), tokenizer, notes)


def _without_head(path: str, settings: ModelSettings, info: dict[str, Any], deep: bool) -> list[str]:
    """The weights of the head that a checkpoint does not have, or not in that shape; a hole in the body is an error."""
    resized = {name: shape for name, shape, _ in info["mismatched_keys"]}
    missing = sorted({*info["missing_keys"], *resized})
    missing = [n for n in missing if not n.endswith("position_ids") and not (deep and n.split(".")[0] in HEADS)]
    head = [n for n in missing if n.split(".")[0] in HEADS]
    holes = [n for n in missing if n not in head and "pooler" not in n]
    if head and not holes and set(missing) <= set(resized) and not settings.new_head:
        raise other_outputs(path, settings, resized[head[0]][0])
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


def _settle(config: Any, tokenizer: Any, reading: Reading) -> None:
    """Tell the plain Hugging Face class what its outputs are called and what padding is; our own scores never depend on it.

    Where padding and end of text are one token it is told of none: it would skip the end of every text. It then takes one text at a
    time, and reads the token that we read.
    """
    config.id2label = dict(enumerate(reading.labels))
    config.label2id = {name: n for n, name in enumerate(reading.labels)}
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
    """A plain Hugging Face folder with safetensors, its config carrying `notes` as `rayward`.

    Of a tied head the rows that it reads are saved as a head of two classes, beside the output layer that they are rows of.
    """
    _quiet()
    model.classifier.config.rayward = {**notes, "pooling": model.pooling, "head": model.reading.as_notes()}
    tensors = model.classifier.state_dict()
    if isinstance(model.head, TiedHead):
        tensors[f"{model.head_name}.weight"] = model.head.rows()
    model.classifier.save_pretrained(folder, state_dict=tensors)
    tokenizer.save_pretrained(folder)


def read_notes(folder: Path) -> dict[str, Any]:
    """The `rayward` entry of a saved model's config."""
    return json.loads((folder / "config.json").read_text(encoding="utf-8")).get("rayward") or {}
