"""Body and head as one module, read at the places that a batch names; and the scores of many groups."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from rayward import attention
from rayward.batching import Batch, BatchSettings, micro_batches
from rayward.errors import ModelError, SettingsError
from rayward.heads import Reading
from rayward.pooling import POOLINGS, Pooling
from rayward.rendering import Group
from rayward.reward_model.bodies import (
    Traits,
    body_of,
    check_width,
    examine,
    experts_per_token,
    head_name_of,
    inputs_of,
    sliding_window,
    use_segments,
)
from rayward.reward_model.kernels import choose_kernel, every_worker
from rayward.reward_model.last_layer import LastLayer, last_of, parts_of
from rayward.reward_model.overall import OVERALL, overall_score, take_off
from rayward.reward_model.settings import SCALAR
from rayward.terms import EVERY, TERMS, Heard, every_token
from rayward.vocabulary import TiedHead, output_weight


class Said(NamedTuple):
    """What a model says of a batch."""

    output_GKC: Tensor
    terms: dict[str, Tensor]  # name of a term of the body -> one number per example; terms.EVERY -> every_GKT, of M members every_MGKT


class Seen(NamedTuple):
    """What was found out of a body by running it."""

    traits: Traits
    segmented: bool  # attention over segments says what it says with a mask
    parts: tuple[str, ...]  # of its last layer, that can run on the tokens that are read alone


class RewardModel(nn.Module):
    """Body and head; `score_GK = model(batch)`."""

    def __init__(
        self,
        classifier: Any,
        pooling: Pooling = "auto",
        max_length: int = 0,
        reading: Reading = SCALAR,
        known: Seen | None = None,
        attend_by: attention.Choice = "auto",
    ):
        """`known` is what was seen of the same model elsewhere: then it is not run, and may have no numbers yet."""
        super().__init__()
        self.classifier: Any = classifier
        self.reading = reading
        window = sliding_window(classifier.config)
        seen = known.traits if known is not None else examine(classifier)
        outgrown = bool(window and max_length > window)
        self.traits = Traits(seen.causal, seen.shares_prefix and not outgrown)
        self.pooling: Pooling = ("last" if seen.causal else "own") if pooling == "auto" else pooling
        if self.pooling == "last" and not seen.causal:
            raise ModelError(
                "pooling=last reads a token that has seen what comes after it: this body is not causal",
                "use --set net.pooling=mean or own",
            )
        plain = isinstance(self.head, nn.Linear | nn.Sequential | TiedHead)
        if reading.output_layer and self.pooling != "last":
            raise ModelError(
                f"pooling={self.pooling} reads whole sequences, and a language model's logits are of one token",
                "use a decoder, with --set net.pooling=last",
            )
        if reading.overall == "gate" and self.pooling != "last":
            raise ModelError(
                f"overall=gate weighs attributes by the prompt alone, and pooling={self.pooling} reads prompts that have seen the answer",
                "use a decoder, with --set net.pooling=last, or overall=linear",
            )
        if self.pooling == "own" and seen.causal and plain:
            raise ModelError("pooling=own would look for the last token that is not padding, by its id", "use --set net.pooling=last")
        self.shares_prefix = self.traits.shares_prefix and self.pooling == "last"
        masked = attend_by == "mask" or not self.shares_prefix
        self.segmented = not masked and (known.segmented if known is not None else use_segments(classifier))
        self.attend_by: attention.Choice = attend_by
        self._kernels: dict[tuple[str, torch.dtype, bool], attention.Attend | None] = {}
        self._flat: dict[tuple[str, torch.dtype], bool] = {}
        if not self.segmented and attend_by not in ("auto", "mask"):
            raise ModelError(f"net.attention={attend_by} is about packed rows, and this body keeps to masks", "leave net.attention out")
        if known is not None and self.segmented:
            attention.register()
            classifier.set_attn_implementation(attention.NAME)
        if self.pooling != "own" and not plain:
            raise ModelError(
                f"pooling={self.pooling} needs a linear head, and {type(classifier).__name__} has a {type(self.head).__name__}",
                "use --set net.pooling=own",
            )
        layer = last_of(body_of(classifier)) if self.pooling == "last" else None
        parts = (known.parts if known is not None else parts_of(classifier, self.shares_prefix)) if layer is not None else ()
        self.last_layer = LastLayer(layer, parts) if layer is not None else None
        self.seen = Seen(seen, self.segmented, parts)
        self.head.float()
        if self.pooling == "own":
            self.head.forward = partial(_in_float32, self.head.forward)
        else:
            check_width(self.head, self.pooling, classifier.config)
        self.train(classifier.training)

    @property
    def head_name(self) -> str:
        """What Hugging Face's class calls its last layer: the prefix of its parameters."""
        return head_name_of(self.classifier)

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
        """Whether all tokens of a micro-batch lie in one row, with attention over its segments and without a mask; in precision `auto`."""
        return self.flat_in("auto")

    def flat_in(self, precision: Literal["auto", "fp32", "bf16"]) -> bool:
        """`flat` in a precision. On a GPU all workers must ask for it together: rows are the same on all of them, or no share is right."""
        if not (self.segmented and self.shares_prefix):
            return False
        device = self.device
        key = (device.type, torch.bfloat16 if is_bf16(device, precision) else torch.float32)
        if key not in self._flat:
            here = self.kernel_in(key[1]) is not None
            self._flat[key] = here if device.type == "cpu" else every_worker(here, device)
        return self._flat[key]

    def kernel_in(self, precision: torch.dtype) -> attention.Attend | None:
        """What attends over the segments of a row on the device at hand, None for masks; looked into once for each device and precision.

        Raises:
            SettingsError: if the model trains and `net.attention` names what does not run here, or is wrong.
        """
        device, insist = self.device, self.training and self.attend_by != "auto"
        key = (device.type, precision, insist)
        if key not in self._kernels:
            self._kernels[key] = choose_kernel(self.classifier, self.attend_by, device, precision, insist)
        return self._kernels[key]

    def _kernel_of(self, batch: Batch) -> attention.Attend | None:
        """The kernel for a batch, in the precision of now."""
        if not self.segmented or batch.row is None:
            return None
        kind = self.device.type
        return self.kernel_in(torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32)

    def forward(self, batch: Batch) -> Tensor:
        """score_GK, float32. Masked places hold whatever place 0 scores."""
        return self.reading.pick(self.outputs(batch), batch.column_GK)

    def each_score(self, batch: Batch) -> Tensor:
        """score_MGK, float32, of M members; the score is their mean."""
        return self.reading.pick_each(self.outputs(batch), batch.column_GK)

    def outputs(self, batch: Batch) -> Tensor:
        """output_GKC, float32: everything the head says at the places of a batch."""
        return self.hear(batch).output_GKC

    def hear(self, batch: Batch, terms: Collection[str] = ()) -> Said:
        """What the head says at the places of a batch, and the named terms of the body (terms.TERMS).

        Raises:
            SettingsError: if the body has nothing that a term could be made of.
        """
        T = batch.token_BT.shape[1]
        if terms:
            self.check_terms(terms)
        if self.pooling == "own":
            logit_BC = self.classifier(**inputs_of(self.classifier, batch, packed=False)).logits
            return Said(self._with_overall(logit_BC.float()[batch.place_GK // T], None, batch), {})
        kernel = self._kernel_of(batch)  # before the last layer reads less: it may have to be seen in the whole body
        partly = self.last_layer.reading(batch, prompts=self.reading.overall == "gate") if self.last_layer and not terms else None
        with partly or nullcontext():
            heard = self._body_says(batch, kernel, routers="balance" in terms)
        hidden_BTD = heard.hidden_BTD
        if self.pooling == "last":
            pooled_GKD = hidden_BTD.flatten(0, 1)[batch.place_GK]
        else:
            pooled_GKD = POOLINGS[self.pooling](hidden_BTD, batch.segment_BT >= 0)[batch.place_GK // T]
        with torch.autocast(pooled_GKD.device.type, enabled=False):
            output_GKC = self._with_overall(self.head(pooled_GKD.float()), hidden_BTD, batch)
            said = {name: TERMS[name](heard, batch) for name in terms if name != EVERY}
            if EVERY in terms:
                read = self.reading if self.reading.members == 1 else self.reading.each_score
                said[EVERY] = every_token(lambda hidden_ND: read(self.head(hidden_ND.float())), heard, batch)
            return Said(output_GKC, said)

    def _with_overall(self, output_GKC: Tensor, hidden_BTD: Tensor | None, batch: Batch) -> Tensor:
        """The outputs, and behind them the score that the attributes come to, where the model makes it."""
        if not self.reading.combined:
            return output_GKC
        score_GK = overall_score(getattr(self.classifier, OVERALL, None), output_GKC, hidden_BTD, batch, self.reading)
        return torch.cat([output_GKC, score_GK.unsqueeze(-1)], -1)

    def hidden(self, batch: Batch) -> Tensor:
        """hidden_BTD of the body."""
        return self._body_says(batch, self._kernel_of(batch)).hidden_BTD

    def _body_says(self, batch: Batch, kernel: attention.Attend | None, routers: bool = False) -> Heard:
        body = body_of(self.classifier)
        inputs = inputs_of(body, batch, packed=self.shares_prefix, kernel=kernel)
        if not routers:
            said, top_k = body(**inputs), 0
        else:
            said, top_k = body(**inputs, output_router_logits=True), experts_per_token(body)
        weight_VD = output_weight(self.classifier, self.reading.output_layer) if self.reading.output_layer else None
        return Heard(said.last_hidden_state, tuple(said.router_logits) if routers else (), top_k, weight_VD)

    def check_terms(self, terms: Collection[str]) -> None:
        """Whether the body has what terms are made of."""
        if "language" in terms and not self.reading.output_layer:
            raise SettingsError(
                "regularise: language is about a language model's output layer, which this model does not have",
                "keep it: --set net.language=true with --set net.new_head=true",
            )
        if EVERY in terms and (self.pooling != "last" or self.reading.attributes):
            raise SettingsError(
                "a loss at every token needs a score at every token: a decoder, and a head that is not of attributes",
                "use the objective of whole answers, e.g. bradley_terry or binary_cross_entropy",
            )
        if "balance" in terms and (self.pooling == "own" or not experts_per_token(body_of(self.classifier))):
            raise SettingsError("regularise: balance is about experts, and this body tells of none", "leave it out")

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


def forget_verbosity(
    model: RewardModel,
    groups: Sequence[Group],
    verbosity: str,
    settings: BatchSettings,
    precision: Literal["auto", "fp32", "bf16"] = "auto",
) -> dict[str, float]:
    """Take a verbosity off the attributes of a model, by what it says of these groups; how much of it, per attribute."""
    with model.evaluating(), autocast(model.device, precision):
        said = ((batch, model.outputs(batch)) for _, batch in _batches(model, groups, settings, model.flat_in(precision)))
        model.reading = take_off(model.reading, verbosity, said)
    return dict(zip(model.reading.names, model.reading.taken_off, strict=True))


def score_groups(
    model: RewardModel,
    groups: Sequence[Group],
    settings: BatchSettings,
    precision: Literal["auto", "fp32", "bf16"] = "auto",
    each: bool = False,
) -> list[np.ndarray]:
    """The scores of every group, one per place, in order; with `each` those of every member, score_KM."""
    scores: list[np.ndarray] = [np.empty(0)] * len(groups)
    with model.evaluating(), autocast(model.device, precision):
        for numbers, batch in _batches(model, groups, settings, model.flat_in(precision)):
            score_GK = model.each_score(batch).movedim(0, -1) if each else model(batch)
            for n, score_K in zip(numbers, score_GK.cpu().numpy(), strict=True):
                scores[n] = score_K[: len(groups[n].place_K)]
    return scores


def _batches(model: RewardModel, groups: Sequence[Group], settings: BatchSettings, flat: bool) -> Iterator[tuple[list[int], Batch]]:
    """Groups as batches on the model's device, with their numbers."""
    for start in range(0, len(groups), 1024):  # so that no more than these are sorted and held as batches
        for numbers, batch in micro_batches(groups[start : start + 1024], settings, model.shares_prefix, flat):
            yield [start + n for n in numbers], batch.to(model.device)
