"""Objectives: every entry of the table keeps the contract: padding, empty, large, permuted, batched, shifted, tied, in the right direction.

The formulas are in test_objectives_formulas.py, what a model learns in test_objectives_training.py. `CASES` are all entries by default
and all settings that docs/objectives.md names, so a new entry is held to everything here.
"""

from __future__ import annotations

import inspect
import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from rayward.batching import Batch, collate
from rayward.errors import SettingsError
from rayward.metrics import Mean, order_accuracy
from rayward.objectives import GIVEN, OBJECTIVES, Objective, make_objective, settings_of
from rayward.objectives.docs import ALSO, page
from rayward.objectives.regularisers import REGULARISERS
from rayward.rendering import Group

torch.set_num_threads(1)
PROPERTY = settings(deadline=None, max_examples=25)
CASES: dict[str, Objective] = {
    **OBJECTIVES,
    **{f"{name} {given}": make_objective(name, given) for name, given, _ in ALSO.values() if given != "{}"},
}
PULLS_TIES = {"vote_share", "ranknet", "listnet"}  # equal targets pull their scores together; the others see nothing in them

Places = list[tuple[float, float]]  # (score, target) of every place of a group
SCORE = st.floats(-8, 8, width=32)
TARGET = st.sampled_from([0.0, 0.25, 0.3, 0.5, 0.75, 1.0])  # probabilities, with many ties: fit for every objective
GROUP = st.lists(st.tuples(SCORE, TARGET), min_size=1, max_size=6)
JUNK = st.sampled_from([1e30, -1e30, 12345.0, math.inf, -math.inf, math.nan])
# head -> its outputs, as multiples of the score
OUTPUTS = {"debiased": [1.0, 0.5], "three_class": [-1.0, 0.0, 1.0], "verdict": [-0.5, 0.5, 0.2]}

ALONG, SHORT = [0.5, -1.0, 0.0], 0.6  # three tokens of an answer, as far from its score; two of one with a target above


def every(**flags: bool) -> pytest.MarkDecorator:
    """The cases with these flags."""
    return pytest.mark.parametrize("name", [n for n, o in CASES.items() if all(getattr(o, flag) == v for flag, v in flags.items())])


def tensors(groups: list[Places], junk: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """score_GK, target_GK, mask_GK in float64, padded on the right with `junk`."""
    K = max(map(len, groups))
    score, target = torch.full((len(groups), K), junk).double(), torch.full((len(groups), K), junk).double()
    mask = torch.zeros(len(groups), K, dtype=torch.bool)
    for g, places in enumerate(groups):
        for k, (s, t) in enumerate(places):
            score[g, k], target[g, k], mask[g, k] = s, t, True
    return score, target, mask


def given_of(entry: Objective, score: Tensor, target: Tensor) -> dict[str, Tensor]:
    """What a loss names besides, each place's from its own score and target: junk where they are."""
    ids = (100 * target.nan_to_num(posinf=0, neginf=0)).round().long()
    made = {
        "count_GK": 1 + 4 * target,
        "length_GK": 5 + 10 * (target - 0.3) ** 2,
        "column_GK": torch.full(target.shape, -1),
        "answer_GK": torch.zeros(target.shape, dtype=torch.int64),
        "every_GKT": score.unsqueeze(-1) + torch.tensor(ALONG).to(score),
        "token_GKT": torch.stack([torch.full(target.shape, 7), ids, torch.where(target > SHORT, -1, ids)], -1),
        "output_GKC": score.unsqueeze(-1) * torch.tensor(OUTPUTS[entry.head] if entry.head else [1.0]).to(score),
    }
    return {name: made[name] for name in GIVEN if name in inspect.signature(entry.loss).parameters}


def losses(name: str, score: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """loss_G of a case."""
    return CASES[name].loss(score, target, mask, **given_of(CASES[name], score, target))


def loss_of(name: str, places: Places) -> float:
    """The loss of one group."""
    return float(losses(name, *tensors([places]))[0])


def with_gradient(name: str, score: Tensor, target: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The losses, and what they pull every score by."""
    score = score.detach().requires_grad_()
    loss = losses(name, score, target, mask)
    loss.sum().backward()
    assert score.grad is not None
    return loss.detach(), score.grad


# ---------------------------------------------------------------------------------------------------------- the contract


@every()
@PROPERTY
@given(places=GROUP, holes=st.lists(st.integers(0, 6), min_size=1, max_size=3), junk=JUNK)
def test_masked_places_change_nothing_and_get_no_gradient(name: str, places: Places, holes: list[int], junk: float) -> None:
    plain, target, mask = tensors([places])
    expected, pulls = with_gradient(name, plain, target, mask)
    order = list(range(len(places)))
    for hole in holes:
        order.insert(min(hole, len(order)), -1)
    at = torch.tensor(order)
    there = at >= 0
    fill = torch.tensor(junk, dtype=torch.float64)
    padded, padded_target = (torch.where(there, values[:, at], fill) for values in (plain, target))
    seen, seen_pulls = with_gradient(name, padded, padded_target, there.unsqueeze(0))
    torch.testing.assert_close(seen, expected, rtol=1e-12, atol=1e-12)
    assert (seen_pulls[:, ~there] == 0).all()
    torch.testing.assert_close(seen_pulls[:, there], pulls, rtol=1e-12, atol=1e-12)


@every()
@pytest.mark.parametrize("junk", [0.0, 1e30, math.nan])
def test_an_empty_group_costs_nothing_and_pulls_nothing(name: str, junk: float) -> None:
    junk_GK = torch.full((2, 3), junk)
    loss, pulls = with_gradient(name, junk_GK, junk_GK, torch.zeros(2, 3, dtype=torch.bool))
    assert loss.tolist() == [0.0, 0.0]
    assert (pulls == 0).all()


@every()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@PROPERTY
@given(signs=st.lists(st.tuples(st.sampled_from([-1e4, 0.0, 1e4]), TARGET), min_size=1, max_size=5))
def test_large_scores_stay_finite(name: str, dtype: torch.dtype, signs: Places) -> None:
    score, target, mask = tensors([signs])
    loss, pulls = with_gradient(name, score.to(dtype), target.float(), mask)
    assert torch.isfinite(loss).all()
    assert torch.isfinite(pulls).all()


EXTREMES: dict[str, list[float]] = {  # small and large values of every setting that a loss has
    "temperature": [0.01, 0.1, 5.0, 100.0],
    "smoothing": [0.0, 0.01, 0.49],
    "scale": [0.0, 0.01, 100.0],
    "margin": [0.0, 0.01, 100.0],
    "gamma": [0.0, 0.01, 0.3, 1.0, 1.5, 5.0, 100.0],
    "length_weight": [0.0, 0.01, 10.0],
    "by_count": [0.0, 0.5, 8.0],
}
SET = [(name, setting, value) for name, entry in OBJECTIVES.items() for setting in settings_of(entry.loss) for value in EXTREMES[setting]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "setting", "value"), SET)
def test_large_scores_stay_finite_under_every_setting(name: str, setting: str, value: float, dtype: torch.dtype) -> None:
    entry = make_objective(name, json.dumps({setting: value}))
    scores = torch.tensor(list(itertools.product([-1e4, -104.5, 0.0, 3.0, 200.0, 1e4], repeat=3)), dtype=dtype)
    for targets in ([1.0, 0.0, 0.5], [0.0, 1.0, 0.5], [1.0, 1.0, 0.0], [0.5, 0.5, 0.5], [0.0, 0.0, 0.0]):
        score, target = scores.clone().requires_grad_(), torch.tensor([targets] * len(scores))
        loss = entry.loss(score, target, torch.ones_like(target, dtype=torch.bool), **given_of(entry, score, target))
        loss.sum().backward()
        assert torch.isfinite(loss).all()
        assert score.grad is not None
        assert torch.isfinite(score.grad).all()


@every(whole=False)  # a correlation of values that hardly vary is all rounding
@PROPERTY
@given(places=GROUP)
def test_float32_and_bfloat16_say_what_float64_says(name: str, places: Places) -> None:
    score, target, mask = tensors([places])
    score = score.bfloat16().double()  # the same numbers in all three
    expected = losses(name, score, target, mask)
    torch.testing.assert_close(losses(name, score.float(), target.float(), mask).double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(losses(name, score.bfloat16(), target.float(), mask).double(), expected, rtol=0.05, atol=0.3)


@every(steps=False)
@PROPERTY
@given(places=GROUP, data=st.data())
def test_the_order_of_places_does_not_matter(name: str, places: Places, data: st.DataObject) -> None:
    shuffled = data.draw(st.permutations(places))
    assert loss_of(name, shuffled) == pytest.approx(loss_of(name, places), rel=1e-12, abs=1e-12)


@every(whole=False)
@PROPERTY
@given(groups=st.lists(GROUP, min_size=2, max_size=4))
def test_a_group_costs_the_same_alone_and_in_a_batch(name: str, groups: list[Places]) -> None:
    together = losses(name, *tensors(groups, junk=9.0)).tolist()
    assert together == pytest.approx([loss_of(name, places) for places in groups], rel=1e-12, abs=1e-12)


@every(compares=True, whole=False)
@PROPERTY
@given(places=GROUP, shift=st.floats(-100, 100))
def test_comparing_objectives_do_not_see_a_shift(name: str, places: Places, shift: float) -> None:
    moved = [s + shift for s, _ in places]
    assume(len(set(moved)) == len({s for s, _ in places}))  # a shift may make equal what hardly differs, and ranks with it
    assert loss_of(name, [(s + shift, t) for s, t in places]) == pytest.approx(loss_of(name, places), rel=1e-9, abs=1e-9)


@every(compares=False)
def test_the_others_do(name: str) -> None:
    places = [(0.5, 1.0), (-0.25, 0.0)]
    assert loss_of(name, [(s + 3, t) for s, t in places]) != pytest.approx(loss_of(name, places), rel=1e-3)


@every(compares=True)
@PROPERTY
@given(score=SCORE, target=TARGET)
def test_one_place_has_nothing_to_learn_from(name: str, score: float, target: float) -> None:
    loss, pulls = with_gradient(name, *tensors([[(score, target)]]))
    assert loss.item() == pytest.approx(0.0, abs=1e-12)
    assert pulls.item() == pytest.approx(0.0, abs=1e-12)


@every(compares=True)
@PROPERTY
@given(scores=st.lists(SCORE, min_size=2, max_size=5), target=TARGET)
def test_equal_targets_pull_nothing_or_pull_together(name: str, scores: list[float], target: float) -> None:
    score, targets, mask = tensors([[(s, target) for s in scores]])
    loss, pulls = with_gradient(name, score, targets, mask)
    if name in PULLS_TIES:
        level, level_pulls = with_gradient(name, torch.full_like(score, score.mean().item()), targets, mask)
        assert loss.item() >= level.item() - 1e-9
        assert (level_pulls.abs() < 1e-9).all()
    else:
        assert loss.item() == 0.0
        assert (pulls == 0).all()


@every(steps=False, whole=False)
@PROPERTY
@given(places=GROUP)
def test_scores_in_the_order_of_the_targets_cost_less_than_reversed(name: str, places: Places) -> None:
    if "by_count" in name or name == "lambdarank":  # one favours what has more verdicts, the other weighs by the ranks there are now
        return
    scores, targets = sorted(s for s, _ in places), sorted(t for _, t in places)
    along = loss_of(name, list(zip(scores, targets, strict=True)))
    against = loss_of(name, list(zip(reversed(scores), targets, strict=True)))
    assert along <= against + 1e-9
    if scores[-1] - scores[0] > 1 and targets[-1] > targets[0]:
        assert along < against


@pytest.mark.parametrize("name", list(REGULARISERS))
@PROPERTY
@given(places=GROUP, junk=JUNK)
def test_regularisers_mask_stay_finite_and_are_least_at_zero(name: str, places: Places, junk: float) -> None:
    term = REGULARISERS[name]
    score, _, mask = tensors([places, [(0.0, 0.0)] * (len(places) + 2)], junk)
    score.requires_grad_()
    cost = term(score, mask)
    cost.sum().backward()
    assert score.grad is not None
    assert torch.isfinite(score.grad).all()
    assert (score.grad[~mask] == 0).all()
    assert cost[0].item() == pytest.approx(term(score[:1, : len(places)], mask[:1, : len(places)]).item())
    assert cost[0].item() >= 0.0
    assert cost[1].item() == 0.0
    assert term(torch.full((1, 2), junk), torch.zeros(1, 2, dtype=torch.bool)).item() == 0.0
    assert torch.isfinite(term(torch.tensor([[1e4, -1e4, 1e4]]), torch.ones(1, 3, dtype=torch.bool))).all()


# ------------------------------------------------------------------------------------- what a batch gives: columns and answers


def group(lengths: list[int], at: list[int], targets: list[float], columns: list[int] | None = None) -> Group:
    """A prompt of two tokens and answers of the given lengths, read at the given tokens behind the prompt."""
    size = 2 + sum(lengths)
    return Group(
        np.arange(size, dtype=np.int32),
        np.array([2, *lengths], np.int32),
        np.array(at, np.int32) + 2,
        np.array(targets, np.float32),
        1.0,
        column_K=None if columns is None else np.array(columns, np.int32),
    )


RATED = group([1, 1], [0, 0, 1, 1], [4.0, 1.0, 2.0, 3.0], [0, 1, 0, 1])  # two answers, each with a target on two attributes
HALF_RATED = group([1, 1], [0, 1, 1], [4.0, 2.0, 9.0], [0, 0, 1])  # nobody rated the first answer on the second attribute


def of_columns(entry: Objective, score: list[list[float]], batch: Batch) -> Tensor:
    """The loss of scores under a head of two attributes."""
    score_GK = torch.tensor(score)
    return entry.of(batch, score_GK, torch.stack([score_GK, score_GK], -1), attributes=2)


@pytest.mark.parametrize("name", [n for n, e in OBJECTIVES.items() if e.compares and not e.head and not e.ends])
def test_the_width_of_a_head_changes_no_loss(name: str) -> None:
    batch = collate([[group([1, 1], [0, 1], [0.5, 0.5])], [group([1, 1, 1], [0, 1, 2], [0.25, 0.75, 0.25])]], shared=True)
    score_GK = torch.tensor([[1.0, -1.0, 0.0], [0.3, 0.2, 0.9]])
    one, two = (OBJECTIVES[name].of(batch, score_GK, torch.stack([score_GK] * C, -1)) for C in (1, 2))
    assert torch.equal(one, two)
    tie, mask = torch.tensor([[1.0, -1.0]]), torch.ones(1, 2, dtype=torch.bool)
    assert one[0].item() == pytest.approx(OBJECTIVES[name].loss(tie, torch.full((1, 2), 0.5), mask).item())


def test_a_ranking_of_many_has_a_finite_lambda() -> None:
    score = torch.randn(1, 300, generator=torch.Generator().manual_seed(0), requires_grad=True)
    target = torch.arange(300.0).unsqueeze(0)
    loss = OBJECTIVES["lambdarank"].loss(score, target, torch.ones(1, 300, dtype=torch.bool))
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert score.grad is not None
    assert torch.isfinite(score.grad).all()


@pytest.mark.parametrize("name", ["bradley_terry", "plackett_luce", "hinge", "lambdarank", "ranknet"])
def test_attributes_are_compared_among_themselves(name: str) -> None:
    batch = collate([[RATED], [HALF_RATED]], shared=True)
    loss = of_columns(OBJECTIVES[name], [[0.5, 0.1, -0.25, 0.7], [0.5, -0.25, 30.0, 0.0]], batch)
    helpful, short = loss_of(name, [(0.5, 4.0), (-0.25, 2.0)]), loss_of(name, [(0.1, 1.0), (0.7, 3.0)])
    assert loss.tolist() == pytest.approx([(helpful + short) / 2, helpful], rel=1e-5)


def test_accuracy_is_within_an_attribute() -> None:
    score, target, column = np.array([[5.0, 0.1, 4.0, 0.7]]), RATED.target_K[None], np.array([[0, 1, 0, 1]])
    mask = np.ones((1, 4), bool)
    assert OBJECTIVES["squared_error"].right(score, target, mask, column) == Mean(2.0, 2.0)
    assert order_accuracy(score, target, mask).weight == 6.0  # which mixes them


def test_regression_masks_what_nobody_rated() -> None:
    batch = collate([[HALF_RATED], [RATED]], shared=True)
    loss = of_columns(OBJECTIVES["squared_error"], [[3.0, 2.0, 7.0, math.nan], [0.0, 0.0, 0.0, 0.0]], batch)
    assert loss.tolist() == pytest.approx([(1 + 0 + 4) / 3, (16 + 1 + 4 + 9) / 4])


@pytest.mark.parametrize("shared", [True, False])
def test_steps_are_ranked_within_their_answer(shared: bool) -> None:
    two = group([4, 3], [0, 1, 3, 4, 6], [1.0, 1.0, 0.0, 1.0, 1.0])
    entry, scores = OBJECTIVES["q_ranking"], [0.5, 1.0, -1.0, 2.0, 0.25]
    batch = collate([[two, two]] if shared else [[two], [two]], shared)
    score = torch.tensor([scores, scores])
    first = loss_of("q_ranking", list(zip(scores[:3], [1.0, 1.0, 0.0], strict=True)))
    second = loss_of("q_ranking", list(zip(scores[3:], [1.0, 1.0], strict=True)))
    expected = (3 * first + 2 * second) / 5  # steps and, where one is wrong, the question
    assert entry.of(batch, score, score.unsqueeze(-1)).tolist() == pytest.approx([expected, expected], rel=1e-5)


@pytest.mark.parametrize("name", list(REGULARISERS))
def test_a_regulariser_adds_its_weight(name: str) -> None:
    batch = collate([[group([1, 1], [0, 1], [1.0, 0.0])]], shared=True)
    score = torch.tensor([[0.5, 1.5]])
    plain, more = (make_objective("hinge", regularise=r).of(batch, score, score.unsqueeze(-1)) for r in ("{}", f'{{"{name}": 0.25}}'))
    assert (more - plain).item() == pytest.approx(0.25 * REGULARISERS[name](score, batch.mask_GK).item(), rel=1e-4)


# --------------------------------------------------------------------------------------------------- settings and documents


def test_a_loss_of_the_users_own_by_module_and_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = "def hinge(score_GK, target_GK, mask_GK):\n    return (1 - score_GK[:, 0] + score_GK[:, 1]).clamp(min=0)\n"
    (tmp_path / "my_losses.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    mine = make_objective("my_losses:hinge")
    loss = mine.loss(torch.tensor([[0.5, 0.25]]), torch.tensor([[1.0, 0.0]]), torch.ones(1, 2, dtype=torch.bool))
    assert loss.tolist() == [0.75]
    assert mine.accuracy is order_accuracy
    assert not mine.probabilities


REFUSED: list[tuple[str, str, str, str]] = [
    ("bradly_terry", "{}", "{}", "did you mean bradley_terry"),
    ("os:path", "{}", "{}", "objective=os:path is no function"),
    ("hinge", '{"margn": 1}', "{}", "has no setting margn\n  -> it has: margin"),
    ("listnet", '{"temperature": 0}', "{}", "temperature=0 is not a number from 0 up"),
    ("bradley_terry", '{"smoothing": -0.1}', "{}", "smoothing=-0.1 is not a number from 0 up"),
    ("bradley_terry", '{"smoothing": 0.5}', "{}", "smoothing=0.5 is not a number from 0 up and below 0.5"),
    ("bradley_terry", '{"smoothing": "much"}', "{}", "smoothing='much' is not a number"),
    ("binary_cross_entropy", '{"by_count": true}', "{}", "by_count=True is not a number"),
    ("hinge", '{"margin": true}', "{}", "margin=True is not a number"),
    ("hinge", "{}", '{"centre": -1}', "regularise: centre=-1 is not a number from 0 up"),
    ("hinge", "{}", '{"center": 1}', "did you mean centre"),
]


@pytest.mark.parametrize(("name", "given", "regularise", "says"), REFUSED)
def test_what_is_no_objective_is_refused_with_the_way_out(name: str, given: str, regularise: str, says: str) -> None:
    with pytest.raises(SettingsError, match=re.escape(says)):
        make_objective(name, given, regularise)


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_every_setting_changes_the_loss(name: str) -> None:
    score, target, mask = tensors([[(0.5, 1.0), (-1.0, 0.5), (0.75, 0.25), (0.0, 0.0)], [(-0.5, 1.0), (2.0, 0.0)]])
    entry = OBJECTIVES[name]
    for setting, default in settings_of(entry.loss).items():
        other: Any = not default if isinstance(default, bool) else default + 0.3
        more = {setting: other, **given_of(entry, score, target)}
        assert not torch.allclose(entry.loss(score, target, mask, **more), losses(name, score, target, mask)), setting


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_every_entry_says_its_formula_and_its_source(name: str) -> None:
    said = inspect.getdoc(OBJECTIVES[name].loss) or ""
    assert re.search(r"arXiv \d{4}\.\d{5}|\b(19|20)\d\d\b", said), "where is the formula from?"


def test_the_page_in_the_documents_is_made_from_the_code() -> None:
    text = (Path(__file__).parent.parent / "docs" / "objectives.md").read_text(encoding="utf-8")
    assert text == page(), "run  python -m rayward.objectives.docs  to write it again"
    for name, *_ in ALSO.values():
        assert name in OBJECTIVES
    assert all(f"`{name}` |" in text for name in (*OBJECTIVES, *REGULARISERS))
