"""Metrics: sums that add up, accuracies against brute force, calibration and rank measures against SciPy or by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.stats import kendalltau

from rayward import metrics
from rayward.metrics import Mean, order_accuracy, threshold_accuracy
from tiny import example

PROPERTY = settings(deadline=None, max_examples=60)
SCORE = st.sampled_from([-3.0, -1.0, 0.0, 0.5, 2.0])  # with ties
TARGET = st.sampled_from([0.0, 0.3, 0.5, 0.5, 1.0])
GROUPS = st.lists(st.lists(st.tuples(SCORE, TARGET), min_size=1, max_size=5), min_size=1, max_size=6)
Groups = list[list[tuple[float, float]]]


def arrays(groups: Groups) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    K = max(map(len, groups))
    score, target, mask = np.full((len(groups), K), 9.0), np.full((len(groups), K), 7.0), np.zeros((len(groups), K), bool)
    for g, places in enumerate(groups):
        for k, (s, t) in enumerate(places):
            score[g, k], target[g, k], mask[g, k] = s, t, True
    return score, target, mask


# ------------------------------------------------------------------------------------------------------------------ means


@given(values=st.lists(st.tuples(st.integers(-100, 100), st.integers(1, 9)), min_size=1), cut=st.integers(0, 50))
def test_a_mean_is_the_same_however_it_was_cut(values: list[tuple[int, int]], cut: int) -> None:
    means = [Mean(v * w, w) for v, w in values]
    left, right = sum(means[:cut], Mean()), sum(means[cut:], Mean())
    assert (left + right).value == pytest.approx(sum(v * w for v, w in values) / sum(w for _, w in values))


def test_a_mean_of_nothing_is_no_number() -> None:
    assert math.isnan(Mean().value)


# -------------------------------------------------------------------------------------------------------------- accuracies


@PROPERTY
@given(groups=GROUPS)
def test_order_accuracy_counts_ordered_pairs_and_ties_are_wrong(groups: Groups) -> None:
    pairs = [(a, b) for places in groups for a, t in places for b, u in places if t > u]
    assert order_accuracy(*arrays(groups)) == Mean(sum(a > b for a, b in pairs), len(pairs))


@PROPERTY
@given(groups=GROUPS)
def test_threshold_accuracy_counts_decided_places(groups: Groups) -> None:
    decided = [(s, t) for places in groups for s, t in places if t != 0.5]
    right = sum((1 / (1 + math.exp(-s)) > 0.5) == (t > 0.5) for s, t in decided)
    assert threshold_accuracy(*arrays(groups)) == Mean(right, len(decided))


@pytest.mark.parametrize("accuracy", [order_accuracy, threshold_accuracy])
@PROPERTY
@given(groups=GROUPS, cut=st.integers(0, 6))
def test_accuracies_do_not_depend_on_batches(accuracy: metrics.Accuracy, groups: Groups, cut: int) -> None:
    parts = [p for p in (groups[:cut], groups[cut:]) if p]
    assert sum((accuracy(*arrays(p)) for p in parts), Mean()) == accuracy(*arrays(groups))


# ------------------------------------------------------------------------------------------------------------- calibration


def test_reliability_of_a_case_worked_by_hand() -> None:
    # confidences .9 (twice, one right), .6 (right side is 0, and it is 0), and .5 (counts as saying 1, and is .25 right)
    logit = np.log(np.array([9.0, 9.0, 2 / 3, 1.0]))
    found = metrics.reliability(logit, np.array([1.0, 0.0, 0.0, 0.25]), bins=5)
    assert found.confidence == pytest.approx([0.5, 0.6, 0.9])
    assert found.accuracy == pytest.approx([0.25, 1.0, 0.5])
    assert found.count == [1, 1, 2]
    assert found.ece == pytest.approx((0.25 + 0.4 + 2 * 0.4) / 4)


def test_log_loss_and_brier_by_hand() -> None:
    logit, target = np.log(np.array([3.0, 1.0])), np.array([1.0, 0.25])
    assert metrics.log_loss(logit, target) == pytest.approx((-math.log(0.75) + math.log(2)) / 2)
    assert metrics.brier(logit, target) == pytest.approx((0.25**2 + 0.25**2) / 2)
    assert metrics.sigmoid(np.array([-1e4, 0.0, 1e4])).tolist() == [0.0, 0.5, 1.0]


@pytest.mark.parametrize("seed", range(4))
def test_the_temperature_is_where_scipy_finds_the_least_loss(seed: int) -> None:
    rng = np.random.default_rng(seed)
    logit, target = rng.normal(0, 3, 300), rng.integers(0, 2, 300).astype(float)
    target = np.where(rng.random(300) < 0.7, (logit > 0).astype(float), target)
    best = minimize_scalar(
        lambda t: metrics.log_loss(logit / math.exp(t), target), bounds=(-5, 5), method="bounded", options={"xatol": 1e-9}
    )
    assert metrics.fit_temperature(logit, target) == pytest.approx(math.exp(best.x), rel=1e-4)


@pytest.mark.parametrize("temperature", [0.25, 1.0, 4.0])
def test_a_known_temperature_is_recovered(temperature: float) -> None:
    logit = np.random.default_rng(0).normal(0, 2, 1000)
    probability = metrics.sigmoid(logit)
    scaled = logit * temperature
    assert metrics.fit_temperature(scaled, probability) == pytest.approx(temperature, rel=1e-4)
    calibrated = metrics.reliability(scaled / metrics.fit_temperature(scaled, probability), probability)
    assert calibrated.ece == pytest.approx(0.0, abs=1e-4)


def test_separable_scores_and_no_scores_have_a_temperature_too() -> None:
    assert 0.01 <= metrics.fit_temperature(np.array([3.0, 1.0]), np.ones(2)) < 0.1  # the sharper the better, down to rounding
    assert metrics.fit_temperature(np.array([]), np.array([])) == 1.0


# --------------------------------------------------------------------------------------------------------------- intervals


def test_bootstrap_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    held = 0
    for trial in range(120):
        share = rng.beta(4, 2, 60)  # prompts of their own difficulty, five answers each; their mean is 2/3
        right = (rng.random((60, 5)) < share[:, None]).astype(float).ravel()
        low, high = metrics.bootstrap(np.repeat(np.arange(60), 5), right, np.ones(300), draws=400, seed=trial)
        held += low <= 2 / 3 <= high
    assert 0.87 <= held / 120 <= 1.0


def test_bootstrap_resamples_whole_clusters() -> None:
    right = np.repeat(np.arange(20) % 2, 50).astype(float)  # all answers of a prompt are right, or none is
    by_prompt = metrics.bootstrap(np.repeat(np.arange(20), 50), right, np.ones(1000))
    by_answer = metrics.bootstrap(np.arange(1000), right, np.ones(1000))
    assert by_prompt[1] - by_prompt[0] > 4 * (by_answer[1] - by_answer[0])
    assert all(math.isnan(x) for x in metrics.bootstrap([], np.array([]), np.array([])))


# ------------------------------------------------------------------------------------------------------- whole examples

THREE = example("a", "bb", "cc", targets=(2.0, 0.0, 1.0), weight=0.5)


def test_comparisons_of_an_example_weigh_its_weight_together() -> None:
    tied = example("aaa", "b", "c", targets=(1.0, 0.0, 0.0))
    stepwise = example(("a", "b"), "c", targets=(1.0, 0.0, 1.0))
    found = metrics.comparisons([THREE, stepwise, tied], [(3.0, 1.0, 2.0), (0.0, 0.0, 0.0), (0.0, 1.0, 0.5)])
    assert found.example.tolist() == [0, 0, 0, 2, 2]
    assert found.logit.tolist() == [2.0, 1.0, 1.0, -1.0, -0.5]
    assert found.longer.tolist() == [-1, -1, 0, 1, 1]
    assert found.weight.tolist() == pytest.approx([0.5 / 3] * 3 + [0.5] * 2)


def test_best_of_takes_the_best_scored_and_shares_ties() -> None:
    found = metrics.best_of([THREE, THREE, example("alone")], [(0.0, 2.0, 2.0), (3.0, 1.0, 0.0), (0.0,)])
    assert found == {"picked": (0.5 + 2.0) / 2, "mean_answer": 1.0, "best_answer": 2.0, "examples": 2}
    assert metrics.best_of([], []) == {}


@given(seed=st.integers(0, 1000), size=st.integers(3, 8))
@PROPERTY
def test_kendall_tau_is_scipys_where_nothing_is_tied(seed: int, size: int) -> None:
    rng = np.random.default_rng(seed)
    target, score = rng.permutation(size).astype(float), rng.normal(size=size)
    of = example(*"abcdefgh"[:size], targets=tuple(target))
    assert metrics.kendall_tau([of], [tuple(score)]) == pytest.approx(kendalltau(target, score).statistic)


def test_kendall_tau_leaves_tied_targets_out_and_a_tied_score_counts_as_neither() -> None:
    of = example("a", "b", "c", targets=(1.0, 0.0, 0.0))
    assert metrics.kendall_tau([of], [(2.0, 1.0, 3.0)]) == 0.0
    assert metrics.kendall_tau([of], [(2.0, 1.0, 2.0)]) == 0.5
    assert math.isnan(metrics.kendall_tau([example("a", "b")], [(1.0, 0.0)]))


@pytest.mark.parametrize(
    ("truth", "found", "f1"),
    [
        ([1, 2, -1, -1], [1, 0, -1, 3], 0.5),
        ([1, -1], [0, 2], 0.0),  # 0 / 0 of two zeros is zero
        ([1, -1], [1, 2], 0.0),
        ([1, -1], [1, -1], 1.0),
        ([1, 2], [1, 2], math.nan),  # no clean answer, so no harmonic mean
        ([-1], [-1], math.nan),
        ([], [], math.nan),
    ],
)
def test_first_error_f1(truth: list[int], found: list[int], f1: float) -> None:
    assert metrics.first_error_f1(truth, found)["f1"] == pytest.approx(f1, nan_ok=True)
