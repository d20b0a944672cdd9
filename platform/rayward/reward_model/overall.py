"""From several attributes to one score: `net.overall`.

    mean     sum_a w_a r_a          fixed weights (`net.attribute_weights`)
    linear   sum_a w_a r_a + b      learned weights: an overall rating from its aspects
    gate     sum_a w_a(prompt) r_a  weights that a small network learns to give to a prompt, at least 0 and adding up to 1

The gate is ArmoRM's (Wang et al. 2024, arXiv 2406.12845, section 3.2), with one hidden layer; it reads the last token of the prompt, which
has seen no answer, so that all answers of a prompt are weighed alike. r_a is what the head says of an attribute. What teaches the weights
is a target without a name: a comparison, or an overall rating. A model learns its attributes first, and in a later stage with
`train.freeze_layers=-1` the weights alone.

`net.verbosity` takes off what an attribute says of how long an answer is, r_a - l_a v, so that the rank correlation of every attribute with
v is 0 (the same section). It is in the score alone: an attribute's own output stays the rating that it learned. `net.take_off` gives l_a by
hand, from the first step on.

Shape letters: G examples, K places, A attributes, B rows, T tokens, D hidden size, N answers.

>>> rating, words = np.array([1.0, 2.0, 4.0, 3.0]), np.array([1.0, 2.0, 3.0, 4.0])
>>> share = without(rating, words)
>>> round(share, 6), (rating - share * words).round(2).tolist()
(0.666667, [0.33, 0.67, 2.0, 0.33])
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rayward import foreign, metrics
from rayward.batching import Batch
from rayward.config import parse_settings
from rayward.errors import ModelError
from rayward.heads import Reading, make_head, weighted_mean
from rayward.reward_model.settings import SCALAR, ModelSettings

OVERALL = "overall"  # what a classifier calls the weights
TOKENS = "tokens"  # a verbosity that is no attribute: how many tokens the answer has


def with_overall(settings: ModelSettings, reading: Reading, own: Reading) -> Reading:
    """A reading with what makes one score of its attributes: as asked for, else as it was in the model's own.

    Raises:
        ModelError: if there are no attributes, or what is asked for does not go together.
    """
    overall = own.overall if settings.overall == "auto" else settings.overall
    asked = {f"overall={overall}": overall != "mean", f"verbosity={settings.verbosity}": bool(settings.verbosity)}
    for said in (name for name, there in asked.items() if there):
        if reading.kind != "attributes":
            raise ModelError(f"net.{said} is about attributes, and the head is of kind {reading.kind}", "train head=attributes first")
    if overall != "mean" and parse_settings(settings.attribute_weights, ""):
        raise ModelError(f"net.overall={overall} learns the weights that attribute_weights fixes", "leave one of them out")
    if settings.verbosity and settings.verbosity not in (*reading.names, TOKENS):
        raise ModelError(f"net.verbosity={settings.verbosity} is no attribute ({', '.join(reading.names)})", f"name one, or {TOKENS}")
    by_hand = _by_hand(settings.take_off, reading)
    if by_hand and own.learns_overall and own.overall == overall and by_hand != (own.verbosity, own.taken_off):
        raise ModelError(
            f"net.take_off={settings.take_off} would take off what the weights of overall={overall} have learned from",
            "say net.take_off in the stage that begins with fresh weights: it stays with the model",
        )
    if settings.verbosity and overall != "mean" and settings.verbosity != own.verbosity:
        raise ModelError(
            f"net.verbosity={settings.verbosity} with overall={overall} would take off what the weights have learned from",
            "say net.verbosity in the stage that learns the attributes: it stays with the model",
        )
    verbosity, taken_off = by_hand or (own.verbosity, own.taken_off)
    return replace(reading, overall=overall, verbosity=verbosity, taken_off=taken_off)


def _by_hand(take_off: str, reading: Reading) -> tuple[str, tuple[float, ...]] | None:
    """The verbosity that `net.take_off` names, and how much of it is taken off every attribute; None where it is not given.

    Raises:
        ModelError: if the head has no attributes, a name is not known, or a number is none or below 0.
    """
    given = parse_settings(take_off, "net.take_off", '{"tokens": 0.01}')
    if not given:
        return None
    names = reading.names
    if reading.kind != "attributes":
        raise ModelError(
            f"net.take_off={take_off} is about attributes, and the head is of kind {reading.kind}", "train head=attributes first"
        )
    [(verbosity, much)] = given.items()
    if verbosity not in (*names, TOKENS):
        raise ModelError(f"net.take_off: {verbosity} is no attribute ({', '.join(names)})", f"name one, or {TOKENS}")
    each = much if isinstance(much, dict) else dict.fromkeys(names, much)
    for name, share in each.items():
        if name not in names:
            raise ModelError(f"net.take_off: {name} is no attribute to take off from ({', '.join(names)})", "those not named lose nothing")
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share < math.inf:
            raise ModelError(
                f"net.take_off: {json.dumps(share)} of {verbosity} cannot be taken off {name}",
                "give a number of at least 0, in points of the attribute per "
                + ("token" if verbosity == TOKENS else f"point of {verbosity}"),
            )
    return verbosity, tuple(float(each[name]) if name in each else 0.0 for name in names)


def attach_overall(path: str, classifier: Any, reading: Reading, own: Reading = SCALAR) -> None:
    """Give a classifier the weights that make one score of its attributes: those beside its own head, or fresh ones.

    Raises:
        ModelError: if they were not saved with the model.
    """
    if not reading.learns_overall:
        return
    made = make_overall(reading, classifier.config.get_text_config().hidden_size)
    if own.overall == reading.overall:
        found = {name: foreign.stored_tensor(path, f"{OVERALL}.{name}") for name in made.state_dict()}
        if any(tensor is None for tensor in found.values()):
            raise ModelError(f"--model {path} lacks the weights of its overall={reading.overall}", "save it again")
        made.load_state_dict(found)
    setattr(classifier, OVERALL, made.to(classifier.device))


def make_overall(reading: Reading, width: int) -> nn.Module:
    """Fresh weights; all begin as the plain mean of the attributes."""
    if reading.overall == "linear":
        layer = nn.Linear(len(reading.names), 1)
        nn.init.constant_(layer.weight, 1 / len(reading.names))
        nn.init.zeros_(layer.bias)
        return layer
    gate = make_head(width, replace(reading, layers=2))
    nn.init.zeros_(gate[-1].weight)  # type: ignore[index]
    return gate


def overall_score(weights: Any, rating_GKA: Tensor, hidden_BTD: Tensor | None, batch: Batch, reading: Reading) -> Tensor:
    """score_GK, float32, of what the head says of the attributes at every place; `weights` are those of `make_overall`."""
    with torch.autocast(rating_GKA.device.type, enabled=False):
        if reading.taken_off:
            verbosity_GK = batch.length_GK if _is_tokens(reading) else rating_GKA[..., reading.names.index(reading.verbosity)]
            rating_GKA = rating_GKA - verbosity_GK.unsqueeze(-1) * rating_GKA.new_tensor(reading.taken_off)
        if reading.overall == "linear":
            return weights(rating_GKA).squeeze(-1)
        if reading.overall == "mean":
            return weighted_mean(rating_GKA, reading)
        assert hidden_BTD is not None
        return (rating_GKA * weights(_prompts(hidden_BTD, batch)).softmax(-1).unsqueeze(1)).sum(-1)


def _prompts(hidden_BTD: Tensor, batch: Batch) -> Tensor:
    """prompt_GD, float32: the state of every prompt's last token, which has seen no answer; zeros where a prompt has no token."""
    hidden_GD = hidden_BTD.flatten(0, 1)[batch.prompt_GK[:, 0]]
    return torch.where(batch.prompted_GK[:, :1], hidden_GD.float(), 0.0)


def _is_tokens(reading: Reading) -> bool:
    return reading.verbosity not in reading.names


def take_off(reading: Reading, verbosity: str, said: Iterator[tuple[Batch, Tensor]]) -> Reading:
    """The reading with as much of a verbosity taken off every attribute as leaves no rank correlation with it.

    `said` are batches, and what the head says of them (output_GKC). Every answer counts once, at its end.
    """
    ratings: list[np.ndarray] = []
    lengths: list[np.ndarray] = []
    for batch, output_GKC in said:
        mask, place, length = (t.cpu().numpy() for t in (batch.mask_GK, batch.place_GK, batch.length_GK))
        _, once = np.unique(place[mask], return_index=True)  # a place has a target per attribute
        ratings.append(output_GKC.float().cpu().numpy()[mask][once, : len(reading.names)])
        lengths.append(length[mask][once])
    rating_NA, tokens_N = np.concatenate(ratings).astype(np.float64), np.concatenate(lengths).astype(np.float64)
    named = replace(reading, verbosity=verbosity)
    if _is_tokens(named):
        return replace(named, taken_off=tuple(without(r, tokens_N) for r in rating_NA.T))
    itself = reading.names.index(verbosity)  # of which nothing is left
    return replace(named, taken_off=tuple(1.0 if a == itself else without(r, rating_NA[:, itself]) for a, r in enumerate(rating_NA.T)))


def without(rating_N: Sequence[float] | np.ndarray, verbosity_N: Sequence[float] | np.ndarray) -> float:
    """The least l, at least 0, with which rating - l * verbosity no longer rises with verbosity: Spearman's correlation is 0 or just below.

    The more is taken off, the lower the correlation: a pair that changes its order by it comes to stand against verbosity. So the place is
    found by halving. It is 0 for what does not rise with verbosity as it is.
    """
    rating, verbosity = np.asarray(rating_N, float), np.asarray(verbosity_N, float)

    def rises(share: float) -> bool:
        return metrics.rating_agreement(rating - share * verbosity, verbosity)["spearman"] > 0

    if not np.ptp(rating) or not np.ptp(verbosity) or not rises(0.0):
        return 0.0
    low, high = 0.0, float(np.ptp(rating) / np.ptp(verbosity))
    while rises(high):
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if rises(middle) else (low, middle)
    return high
