"""Which head a model gets: its own, one that another project wrote, a fresh one, or rows of its language model.

A head that is there is never replaced in silence: another kind, width or number of layers is an error that names `net.new_head=true`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from rayward import foreign, heads
from rayward.config import parse_settings
from rayward.errors import ModelError
from rayward.heads import Reading
from rayward.pooling import width_of
from rayward.reward_model.bodies import body_of, close, head_name_of
from rayward.reward_model.overall import with_overall
from rayward.reward_model.settings import ModelSettings
from rayward.vocabulary import TIED, TiedHead


def reading_of(
    path: str, settings: ModelSettings, notes: dict[str, Any], attributes: Sequence[str], stored: foreign.StoredHead | None
) -> Reading:
    """The head that is there, made here or elsewhere, or the one that is asked for."""
    if notes or stored is None or settings.new_head:
        return asked_reading(path, settings, notes, attributes)
    single = replace(settings, head_layers=1) if stored.layers > 1 else settings
    reading = replace(asked_reading(path, single, notes, attributes), layers=stored.layers)
    if stored.outputs != len(reading.labels):
        raise other_outputs(path, settings, stored.outputs)
    return reading


def asked_reading(path: str, settings: ModelSettings, notes: dict[str, Any], attributes: Sequence[str]) -> Reading:
    """The head that is there, or the one that is asked for."""
    own = Reading.of_notes(notes.get("head"))
    if not notes and not settings.new_head and (settings.head_layers > 1 or settings.head_tokens or settings.members > 1):
        raise ModelError("head_layers, head_tokens and members are about a new head", "say --set net.new_head=true, or leave them out")
    if path == "tiny" and settings.head_tokens and settings.head != "verdict":
        raise ModelError("head_tokens: a model from scratch has no language model to take rows from", "leave head_tokens out")
    if settings.head_tokens and width_of(settings.pooling) > 1:
        raise ModelError(f"head_tokens starts a head that reads one token, and not pooling={settings.pooling}", "leave one of them out")
    kind = settings.head
    if kind == "auto":
        kind = "attributes" if len(attributes) > 1 and settings.new_head and not notes else own.kind
    if heads.KINDS[kind].tied and not settings.head_tokens and kind != own.kind:
        raise ModelError(
            f"head={kind} reads a language model's logits of two tokens", 'name them, right first: --set net.head_tokens="Yes No"'
        )
    same = bool(notes) and kind == own.kind
    names = own.names if same and (settings.head == "auto" or set(attributes) <= set(own.names)) else tuple(attributes)
    layers = max(own.layers, settings.head_layers) if same else settings.head_layers
    members = settings.members or (own.members if same else 1)
    asked = heads.make_reading(kind, layers, names, settings.attribute_weights, members)
    _check_members(settings, asked)
    if notes and not asked.fits(own) and not settings.new_head:
        raise ModelError(
            f"--model {path} has a head of {_in_words(own)}, not of {_in_words(asked)}",
            "leave net.head, head_layers and members out to go on with it, or put a fresh one in its place: --set net.new_head=true",
        )
    if not asked.fits(own):
        return with_overall(settings, asked, Reading())
    weights = asked.weights if parse_settings(settings.attribute_weights, "") else own.weights
    return with_overall(settings, replace(asked, weights=weights, tokens=own.tokens, output_layer=own.output_layer), own)


def _check_members(settings: ModelSettings, asked: Reading) -> None:
    """Whether several members can be what is asked for: none may be like another, nor their outputs be more than theirs."""
    if asked.members == 1:
        return
    if settings.head_tokens:
        raise ModelError(
            f"net.members={asked.members} would all start from the rows of head_tokens={settings.head_tokens!r}, and so stay alike",
            "leave one of them out",
        )
    more = {
        "overall": settings.overall not in ("auto", "mean"),
        "verbosity": bool(settings.verbosity),
        "take_off": settings.take_off != "{}",
    }
    for name in (name for name, there in more.items() if there):
        raise ModelError(
            f"net.{name} makes one score of one set of attributes, and net.members={asked.members} give several",
            f"leave net.{name} or net.members out; attributes of several members are weighed by net.attribute_weights",
        )


def same_width(path: str, settings: ModelSettings, notes: dict[str, Any], pooling: str) -> bool:
    """Whether the head of a model that was made here reads as much as the pooling gives; an error where no other may take its place."""
    own = notes.get("pooling") or "auto"
    same = width_of(own) == width_of(pooling)
    if not same and not settings.new_head:
        raise ModelError(
            f"--model {path} has a head for pooling={own}, which is not as wide as one for pooling={pooling}",
            "leave net.pooling out to go on with it, or put a fresh one in its place: --set net.new_head=true",
        )
    return same


def _in_words(reading: Reading) -> str:
    several = f"; {reading.members} members" if reading.members > 1 else ""
    return f"kind {reading.kind} ({', '.join(reading.names)}; {reading.layers} layer{'s' if reading.layers > 1 else ''}{several})"


def other_outputs(path: str, settings: ModelSettings, outputs: int) -> ModelError:
    """What is said of a head that has not as many outputs as were asked for."""
    return ModelError(
        f"--model {path} cannot be loaded with head={settings.head}: its own has {outputs} outputs",
        "name the head it has, e.g. --set net.head=two_class, or put a fresh one in its place: --set net.new_head=true",
    )


def adopt(path: str, classifier: Any, stored: foreign.StoredHead, reading: Reading, pooling: str) -> bool:
    """Whether the class's head was replaced by one that lies in the checkpoint in a way that the class does not know."""
    name = head_name_of(classifier)
    there = getattr(classifier, name)
    fits = (stored.outputs, stored.layers) == (len(reading.labels), reading.layers)
    if not fits or not isinstance(there, nn.Linear) or stored.width != width_of(pooling) * there.in_features:
        return False
    try:
        adopted = foreign.adopt(classifier, name, stored)
    except (KeyError, OSError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"--model {path} lacks weights of its head of {reading.layers} layers: {error}", "save it again") from None
    if adopted:
        heads.keep_apart(getattr(classifier, name), reading)
    return adopted


def fresh_head(classifier: Any, reading: Reading, pooling: str = "auto") -> None:
    """Fresh weights in the class's own head, or a head of several layers, or of twice the width, in its place."""
    name = head_name_of(classifier)
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


def begin_head(path: str, classifier: Any, tokenizer: Any, settings: ModelSettings, reading: Reading, pooling: str) -> Reading:
    """A fresh head, one that starts from rows of the language model, or one that reads them; its reading, which then knows them."""
    if not reading.tied:
        fresh_head(classifier, reading, pooling)
    if not settings.head_tokens and not settings.language:
        return reading
    ids = heads.token_ids(tokenizer, settings.head_tokens, reading) if settings.head_tokens else []
    layer, weight_VD = _output_layer(path, {"trust_remote_code": settings.trust_remote_code})
    if reading.tied or settings.language:
        reading = replace(reading, output_layer=layer)
    if reading.tied:
        return replace(reading, tokens=tuple(ids))
    if ids:
        heads.start_from_rows(getattr(classifier, head_name_of(classifier)), weight_VD[ids], reading)
    return reading


def attach_output_layer(path: str, classifier: Any, settings: ModelSettings, reading: Reading) -> None:
    """Give a classifier the output layer that its reading names, and a tied head that reads it.

    Raises:
        ModelError: if it is asked for and was not kept with the model.
    """
    layer = reading.output_layer
    if settings.language and not layer:
        raise ModelError(f"--model {path} has a head and no output layer of a language model beside it", "leave net.language out")
    if layer and layer != TIED:
        weight_VD = foreign.stored_tensor(path, f"{layer}.weight")
        if weight_VD is None:  # a checkpoint may call it otherwise than the class
            _, weight_VD = _output_layer(path, {"trust_remote_code": settings.trust_remote_code})
        kept = nn.Linear(weight_VD.shape[1], len(weight_VD), bias=False, device=classifier.device)
        kept.weight.data.copy_(weight_VD)
        setattr(classifier, layer, kept)
    if reading.tied:
        setattr(classifier, head_name_of(classifier), TiedHead(classifier, layer, *reading.tokens))


@torch.no_grad()
def _output_layer(path: str, options: dict[str, Any]) -> tuple[str, Tensor]:
    """What a language model's output layer is called in its class (TIED: it is the embedding), and its weight_VD.

    Raises:
        ModelError: if it is no causal language model, or its logits are not these rows times what its body says (a bias, a cap, a scale).
    """
    from transformers import AutoModelForCausalLM

    way_out = "leave head_tokens (and language) out for a random head"
    try:
        language, info = AutoModelForCausalLM.from_pretrained(
            path, use_safetensors=True, dtype=torch.float32, output_loading_info=True, **options
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"head_tokens: {path} is no causal language model: {str(error).splitlines()[0]}", way_out) from None
    if info["missing_keys"]:
        raise ModelError(f"head_tokens: {path} was saved without its output layer ({', '.join(sorted(info['missing_keys']))})", way_out)
    output = language.get_output_embeddings()
    token_BT = torch.arange(1, 9).remainder(language.config.vocab_size).unsqueeze(0)
    hidden_BTD = body_of(language)(input_ids=token_BT).last_hidden_state
    if not close(language(input_ids=token_BT).logits, hidden_BTD @ output.weight.T):
        raise ModelError(f"head_tokens: the logits of {path} are more than rows of its output layer (a bias, a cap or a scale)", way_out)
    if output.weight is language.get_input_embeddings().weight:
        return TIED, output.weight
    return next(name for name, module in language.named_modules() if module is output), output.weight
