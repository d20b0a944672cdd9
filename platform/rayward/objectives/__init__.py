"""Objectives: what scores should be, as functions on the last axis. Score, target, mask in; one loss per example out.

    score_GK   float   what the model says at every place of G examples, K places in the widest
    target_GK  float   what the labels say, higher is better
    mask_GK    bool    False where an example has fewer than K places
    loss_G     float   0 where an example has nothing to learn from; the training loop weighs, sums and divides

Masked places change nothing and get no gradient, whatever stands in them. A loss that needs more names it as an argument: `count_GK`
(verdicts behind a target), `length_GK` (tokens of the answer), `column_GK` (which output a target is about), `answer_GK` (which answer a
place is in), `output_GKC` (all outputs of the head), `every_GKT` and `token_GKT` (tokens.py). Its other arguments
are settings: --objective-settings '{"by_count": 8}'. Where targets are about attributes, comparisons are made inside an attribute only.

    comparisons.py   over pairs of places        pointwise.py      every place by itself
    rankings.py      over the whole order        tokens.py         at every token of an answer
    regularisers.py  terms that add to any: --regularise '{"centre": 0.01}'

To add an objective: write the function and enter it into OBJECTIVES; or name your own with --objective my_module:my_loss. All of them,
with their settings and other names: docs/objectives.md (`python -m rayward.objectives.docs` writes it again).

>>> import torch
>>> score = torch.tensor([[2.0, 0.0]]); target = torch.tensor([[1.0, 0.0]]); mask = torch.ones(1, 2, dtype=torch.bool)
>>> bradley_terry(score, target, mask)
tensor([0.1269])
>>> torch.allclose(plackett_luce(score, target, mask), bradley_terry(score, target, mask))
True
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rayward import metrics
from rayward.batching import Batch
from rayward.config import choose, parse_settings
from rayward.errors import SettingsError
from rayward.heads import Reading
from rayward.objectives.comparisons import adjacent, bradley_terry, debiased, focal, hinge, margin, ranknet, scaled, vote_share
from rayward.objectives.pointwise import binary_cross_entropy, next_token, squared_error, three_class
from rayward.objectives.rankings import lambdarank, listnet, pick_best, plackett_luce, q_ranking
from rayward.objectives.regularisers import REGULARISERS
from rayward.objectives.tokens import token_cross_entropy, token_wise
from rayward.terms import EVERY, TERMS

Loss = Callable[..., Tensor]  # (score_GK, target_GK, mask_GK, what else it names) -> loss_G
GIVEN = ("count_GK", "length_GK", "column_GK", "answer_GK", "output_GKC", "every_GKT", "token_GKT")  # what a loss may name besides


@dataclass(frozen=True)
class Objective:
    """A loss, what counts as right for it, and what it asks of targets and of the model."""

    loss: Loss
    accuracy: metrics.Accuracy
    probabilities: bool = False  # a target is the chance that a score, through sigma, is to give
    unit: bool = False  # targets must lie in [0, 1]
    compares: bool = True  # it learns from places of one example that have different targets
    head: str = ""  # the kind of head that it needs (heads.KINDS); empty: any
    steps: bool = False  # the places of an answer are steps that follow one another
    ends: bool = False  # an answer has one target, at its end
    whole: bool = False  # an example's loss depends on the examples of its micro-batch
    terms: Mapping[str, float] = field(default_factory=dict)  # regularisers and their weights

    @property
    def body_terms(self) -> tuple[str, ...]:
        """What is made of what the body says: regularisers (terms.TERMS), and the scores at every token, if the loss is about them."""
        every = (EVERY,) if "every_GKT" in inspect.signature(self.loss).parameters else ()
        return (*(name for name in self.terms if name in TERMS), *every)

    def of(
        self, batch: Batch, score_GK: Tensor, output_GKC: Tensor, attributes: int = 0, terms: Mapping[str, Tensor] = MappingProxyType({})
    ) -> Tensor:
        """loss_G of what a model said of a batch; `attributes` are how many of the outputs have names, `terms` what the body said."""
        named = inspect.signature(self.loss).parameters
        given = {name: _given(name, batch, output_GKC, terms) for name in GIVEN if name in named}
        if self.compares and attributes > 1:
            loss_G = self._by_column(batch, score_GK, given, attributes)
        else:
            loss_G = self.loss(score_GK, batch.target_GK, batch.mask_GK, **given)
        for name, weight in self.terms.items():
            loss_G = loss_G + weight * (terms[name] if name in TERMS else REGULARISERS[name](score_GK, batch.mask_GK))
        return loss_G

    def of_members(
        self,
        batch: Batch,
        reading: Reading,
        output_GKC: Tensor,
        terms: Mapping[str, Tensor] = MappingProxyType({}),
        share_MG: Tensor | None = None,
    ) -> Tensor:
        """loss_G of a model: the mean over its members of the loss of each by itself, times its share of the example where one is given.

        It is not the loss of their mean: that would teach members nothing apart.
        """
        attributes = len(reading.attributes)
        if reading.members == 1:
            return self.of(batch, reading.pick(output_GKC, batch.column_GK), output_GKC, attributes, terms)
        losses = []
        for m, own_GKC in enumerate(reading.each(output_GKC)):
            own_terms = {**terms, EVERY: terms[EVERY][m]} if EVERY in terms else terms
            losses.append(self.of(batch, reading.one.pick(own_GKC, batch.column_GK), own_GKC, attributes, own_terms))
        loss_MG = torch.stack(losses)
        return (loss_MG if share_MG is None else loss_MG * share_MG).mean(0)

    def right(self, score_GK: Any, target_GK: Any, mask_GK: Any, column_GK: Any) -> metrics.Mean:
        """How often scores (numpy) are right; a place is held against places of its own column only."""
        columns = np.unique(column_GK[mask_GK])
        return sum((self.accuracy(score_GK, target_GK, mask_GK & (column_GK == c)) for c in columns), metrics.Mean())

    def _by_column(self, batch: Batch, score_GK: Tensor, given: dict[str, Tensor], columns: int) -> Tensor:
        """The loss of every column by itself, averaged over those of an example that have something to compare."""
        total_G, count_G = torch.zeros_like(score_GK[..., 0]), torch.zeros_like(score_GK[..., 0])
        for column in range(-1, columns):
            mask_GK = batch.mask_GK & (batch.column_GK == column)
            compared_G = mask_GK.sum(-1) > 1
            loss_G = self.loss(score_GK, batch.target_GK, mask_GK, **given)
            total_G, count_G = total_G + torch.where(compared_G, loss_G, 0.0), count_G + compared_G
        return total_G / count_G.clamp(min=1)


def bootstrap(numbers_G: Sequence[int], members: int, seed: int) -> Tensor:
    """share_MG: how often each of M members has an example in its own bootstrap draw of all of them, by their numbers; 1 on average.

    Poisson(1), which is what a draw with replacement comes to (Oza and Russell 2001), for the masks of Osband et al. (2016, arXiv
    1602.04621). It is a function of seed and number, whatever the batch.
    """
    draws = [np.random.default_rng([seed, int(n)]).poisson(1.0, members) for n in numbers_G]
    return torch.from_numpy(np.array(draws, np.float32).reshape(-1, members).T.copy())


def _given(name: str, batch: Batch, output_GKC: Tensor, terms: Mapping[str, Tensor]) -> Tensor:
    if name == "output_GKC":
        return output_GKC
    if name == "every_GKT":
        return terms[EVERY]
    if name == "token_GKT":
        index_GKT = batch.answer_GKT()
        return torch.where(index_GKT >= 0, batch.token_BT.flatten()[index_GKT.clamp(min=0)], -1)
    if name == "answer_GK":
        return batch.owner_BT.flatten()[batch.place_GK]
    return getattr(batch, name)


_BY_ORDER = metrics.order_accuracy
_BY_SIGN = metrics.threshold_accuracy

OBJECTIVES: dict[str, Objective] = {
    "bradley_terry": Objective(bradley_terry, _BY_ORDER),
    "vote_share": Objective(vote_share, _BY_ORDER, unit=True),
    "margin": Objective(margin, _BY_ORDER),
    "scaled": Objective(scaled, _BY_ORDER),
    "hinge": Objective(hinge, _BY_ORDER),
    "focal": Objective(focal, _BY_ORDER),
    "adjacent": Objective(adjacent, _BY_ORDER),
    "ranknet": Objective(ranknet, _BY_ORDER),
    "debiased": Objective(debiased, _BY_ORDER, head="debiased", whole=True),
    "plackett_luce": Objective(plackett_luce, _BY_ORDER),
    "pick_best": Objective(pick_best, _BY_ORDER),
    "listnet": Objective(listnet, _BY_ORDER),
    "lambdarank": Objective(lambdarank, _BY_ORDER),
    "q_ranking": Objective(q_ranking, _BY_SIGN, unit=True, compares=False, steps=True),
    "binary_cross_entropy": Objective(binary_cross_entropy, _BY_SIGN, probabilities=True, unit=True, compares=False),
    "three_class": Objective(three_class, _BY_SIGN, probabilities=True, unit=True, compares=False, head="three_class"),
    "next_token": Objective(next_token, _BY_SIGN, probabilities=True, unit=True, compares=False, head="verdict"),
    "token_wise": Objective(token_wise, _BY_ORDER, ends=True),
    "token_cross_entropy": Objective(token_cross_entropy, _BY_SIGN, probabilities=True, unit=True, compares=False, ends=True),
    "squared_error": Objective(squared_error, _BY_ORDER, compares=False),
}


def make_objective(name: str, settings: str = "{}", regularise: str = "{}") -> Objective:
    """The objective of that name; a loss of the user's own is judged by the order of its scores.

    `settings` is JSON of the loss's own arguments, `regularise` JSON of regularisers and their weights.

    >>> make_objective("binary_cross_entropy", '{"by_counts": 8}')
    Traceback (most recent call last):
    rayward.errors.SettingsError: objective=binary_cross_entropy has no setting by_counts
      -> it has: by_count
    """
    entry = choose(OBJECTIVES, name, "objective")
    if not isinstance(entry, Objective) and not callable(entry):
        raise SettingsError(f"objective={name} is no function", "name one of (score_GK, target_GK, mask_GK) -> loss_G")
    made = entry if isinstance(entry, Objective) else Objective(entry, metrics.order_accuracy)
    given = parse_settings(settings, "objective_settings", '{"margin": 1}')
    terms = parse_settings(regularise, "regularise", '{"centre": 0.01}')
    able = settings_of(made.loss)
    if unknown := [n for n in given if n not in able]:
        raise SettingsError(f"objective={name} has no setting {', '.join(unknown)}", f"it has: {', '.join(able) or 'none'}")
    if isinstance(entry, Objective):  # what the user's own loss takes is the user's business
        for setting, value in given.items():
            _check_setting(f"objective={name}: {setting}", value, able[setting])
    for term, weight in terms.items():
        choose({**REGULARISERS, **TERMS}, term, "regularise")
        _check_setting(f"regularise: {term}", weight, 0.01)
    return replace(made, loss=partial(made.loss, **given) if given else made.loss, terms=terms)


def _check_setting(what: str, value: Any, default: Any) -> None:
    """A setting is a switch or a number from 0 up, as its default is; a temperature divides, much smoothing teaches the opposite."""
    switch, name = isinstance(default, bool), what.rpartition(" ")[2]
    most = 0.5 if name == "smoothing" else math.inf
    fits = isinstance(value, bool) == switch and isinstance(value, int | float) and 0 <= value < most
    if not fits or (name == "temperature" and value == 0):
        wanted = "true or false" if switch else "a number from 0 up" + (f" and below {most:g}" if most < math.inf else "")
        raise SettingsError(f"{what}={value!r} is not {wanted}", f"e.g. {json.dumps(default)}")


def settings_of(loss: Loss) -> dict[str, Any]:
    """The settings of a loss and their defaults: its arguments behind score, target and mask that it is not given by the loop.

    >>> settings_of(binary_cross_entropy)
    {'by_count': 0.0}
    """
    arguments = list(inspect.signature(loss).parameters.values())[3:]
    return {a.name: a.default for a in arguments if a.name not in GIVEN}
