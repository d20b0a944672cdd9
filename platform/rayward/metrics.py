"""Metrics: how good scores are, with what it takes to believe it. Numpy only.

    score_GK, target_GK   float   scores and labels of G examples, K places in the widest
    mask_GK               bool    False where an example has fewer than K places

A mean is a total and a weight that add, divided once at the end, so it is the same however the data was cut:

>>> (Mean(1.0, 2) + Mean(2.0, 2)).value
0.75
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from rayward.records import Example

Array = Any  # a numpy array
Ties = Literal["wrong", "half"]
Aggregation = Literal["min", "product", "mean", "last", "geometric_mean"]


@dataclass(frozen=True)
class Mean:
    """A weighted mean that adds up exactly however the data was cut into batches, steps and workers."""

    total: float = 0.0
    weight: float = 0.0

    def __add__(self, other: Mean) -> Mean:
        return Mean(self.total + other.total, self.weight + other.weight)

    @property
    def value(self) -> float:
        """The mean, or NaN of nothing."""
        return self.total / self.weight if self.weight else math.nan


Accuracy = Callable[[Array, Array, Array], Mean]


def order_accuracy(score_GK: Array, target_GK: Array, mask_GK: Array) -> Mean:
    """Share of pairs with different targets that the scores order the same way; equal scores are wrong.

    >>> order_accuracy(np.array([[2.0, 1.0, 1.0]]), np.array([[1.0, 0.0, 2.0]]), np.ones((1, 3), bool))
    Mean(total=1.0, weight=3.0)
    """
    both = mask_GK[..., :, None] & mask_GK[..., None, :]
    better = both & (target_GK[..., :, None] > target_GK[..., None, :])
    right = better & (score_GK[..., :, None] > score_GK[..., None, :])
    return Mean(float(right.sum()), float(better.sum()))


def threshold_accuracy(score_GK: Array, target_GK: Array, mask_GK: Array) -> Mean:
    """Share of places where sigma(score) and the target lie on the same side of one half; a target of one half is left out.

    >>> threshold_accuracy(np.array([[2.0, -1.0]]), np.array([[0.9, 0.6]]), np.ones((1, 2), bool))
    Mean(total=1.0, weight=2.0)
    """
    decided = mask_GK & (target_GK != 0.5)
    return Mean(float((decided & ((score_GK > 0) == (target_GK > 0.5))).sum()), float(decided.sum()))


# ------------------------------------------------------------------------------------------------------------- calibration


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)), without overflow."""
    return np.exp(-np.logaddexp(0.0, -np.asarray(x, float)))


def log_loss(logit: Array, target: Array) -> float:
    """Mean cross-entropy of sigma(logit) against a probability, in nats."""
    logit = np.asarray(logit, float)
    return float(np.mean(np.logaddexp(0.0, logit) - target * logit)) if len(logit) else math.nan


def brier(logit: Array, target: Array) -> float:
    """Mean squared difference of sigma(logit) and the target (Brier 1950)."""
    return float(np.mean((sigmoid(logit) - target) ** 2)) if len(logit) else math.nan


@dataclass(frozen=True)
class Reliability:
    """Confidence and accuracy in equal-width bins of confidence."""

    confidence: list[float]
    accuracy: list[float]
    count: list[int]

    @property
    def ece(self) -> float:
        """Expected calibration error: mean |accuracy - confidence| over bins, weighted by count (Guo et al. 2017, eq. 3)."""
        total = sum(self.count)
        if not total:
            return math.nan
        return sum(n * abs(a - c) for c, a, n in zip(self.confidence, self.accuracy, self.count, strict=True)) / total


def reliability(logit: Array, target: Array, bins: int = 10) -> Reliability:
    """Confidence in the predicted side, 0.5 to 1 in `bins` bins, against how often (or how far, if soft) that side was right.

    >>> reliability(np.array([2.0, 2.0]), np.array([1.0, 0.0])).ece.__round__(3)
    0.381
    """
    p, target = sigmoid(logit), np.asarray(target, float)
    confidence, right = np.maximum(p, 1 - p), np.where(p >= 0.5, target, 1 - target)
    which = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    filled = [which == b for b in range(bins) if (which == b).any()]
    return Reliability(
        [float(confidence[m].mean()) for m in filled], [float(right[m].mean()) for m in filled], [int(m.sum()) for m in filled]
    )


def fit_temperature(logit: Array, target: Array) -> float:
    """The temperature T that minimises the log loss of sigma(logit / T), between 1/100 and 100 (Guo et al. 2017, section 4.2).

    The loss is convex in 1/T, so a golden-section search over log(1/T) finds it.

    >>> x = np.array([3.0] * 4); round(float(sigmoid(3.0 / fit_temperature(x, np.array([1, 1, 1, 0])))), 3)
    0.75
    """
    if not len(logit):
        return 1.0
    low, high = math.log(1 / 100), math.log(100)
    ratio = (math.sqrt(5) - 1) / 2
    for _ in range(80):
        a, b = high - ratio * (high - low), low + ratio * (high - low)
        if log_loss(np.asarray(logit) * math.exp(a), target) <= log_loss(np.asarray(logit) * math.exp(b), target):
            high = b
        else:
            low = a
    return math.exp(-(low + high) / 2)


# ------------------------------------------------------------------------------------------------------------ intervals


def bootstrap(cluster: Sequence[Any], total: Array, weight: Array, *, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95 % interval of sum(total) / sum(weight), resampling whole clusters (prompts), percentile method (Efron 1979).

    >>> low, high = bootstrap(range(100), np.r_[np.ones(80), np.zeros(20)], np.ones(100)); 0.7 < low < 0.8 < high < 0.9
    True
    """
    names = {c: n for n, c in enumerate(dict.fromkeys(cluster))}
    if not names:
        return math.nan, math.nan
    at = np.array([names[c] for c in cluster])
    totals, weights = np.bincount(at, np.asarray(total, float)), np.bincount(at, np.asarray(weight, float))
    rng = np.random.default_rng(seed)
    values = np.empty(draws)
    for d in range(draws):
        times = np.bincount(rng.integers(0, len(names), len(names)), minlength=len(names))
        weighed = (times * weights).sum()
        values[d] = (times * totals).sum() / weighed if weighed else np.nan
    if np.isnan(values).all():
        return math.nan, math.nan
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return float(low), float(high)


# -------------------------------------------------------------------------------------------------- judging whole examples

Scores = Sequence[Sequence[float]]  # per example one score per target, in the order of the targets


@dataclass(frozen=True)
class Comparisons:
    """Every pair of answers of one example with different targets: logit is score(better) - score(worse)."""

    example: Array  # which example each comparison belongs to
    logit: Array  # of P(better is preferred)
    longer: Array  # +1 the better answer is longer, -1 shorter, 0 equal, in characters
    weight: Array  # of the comparison inside its example: an example's comparisons weigh its weight together


def comparisons(examples: Sequence[Example], scores: Scores) -> Comparisons:
    """All comparisons of one-segment answers of which every target is known."""
    rows: list[tuple[int, float, int, float]] = []
    for n, (example, score) in enumerate(zip(examples, scores, strict=True)):
        if any(len(answer) > 1 for answer in example.answers) or not all(example.counts):
            continue
        length = [len(answer[0]) for answer in example.answers]
        found = [
            (n, score[i] - score[j], int(np.sign(length[i] - length[j])), example.weight)
            for i in range(len(length))
            for j in range(len(length))
            if example.targets[i] > example.targets[j]
        ]
        rows += [(a, b, c, w / len(found)) for a, b, c, w in found]
    columns = np.array(rows, dtype=float).reshape(-1, 4).T
    return Comparisons(columns[0].astype(int), columns[1], columns[2].astype(int), columns[3])


def best_of(examples: Sequence[Example], scores: Scores) -> dict[str, float]:
    """What picking the best-scored answer is worth, beside the mean answer and the best there was (equal best scores share)."""
    picked, mean, best = [], [], []
    for example, score in zip(examples, scores, strict=True):
        if len(example.answers) > 1 and all(len(a) == 1 for a in example.answers) and all(example.counts):
            top = np.asarray(score) == max(score)
            target = np.asarray(example.targets)
            picked.append(target[top].mean())
            mean.append(target.mean())
            best.append(target.max())
    if not picked:
        return {}
    return {
        "picked": float(np.mean(picked)),
        "mean_answer": float(np.mean(mean)),
        "best_answer": float(np.mean(best)),
        "examples": len(picked),
    }


def kendall_tau(examples: Sequence[Example], scores: Scores) -> float:
    """Mean over examples of (concordant - discordant) / pairs with different targets (Kendall's tau-a on the untied; Goodman-Kruskal)."""
    taus = []
    for example, score in zip(examples, scores, strict=True):
        if len(example.answers) > 2 and all(len(a) == 1 for a in example.answers) and all(example.counts):
            t, s = np.asarray(example.targets), np.asarray(score)
            sign = np.sign(t[:, None] - t[None, :]) * np.sign(s[:, None] - s[None, :])
            pairs = (t[:, None] != t[None, :]).sum()
            if pairs:
                taus.append(sign.sum() / pairs)
    return float(np.mean(taus)) if taus else math.nan


def rating_agreement(score: Array, target: Array) -> dict[str, float]:
    """How scores follow ratings: Pearson's and Spearman's correlation, and the root of the mean squared error. NaN where one does not vary.

    >>> rating_agreement(np.array([1.0, 2.0, 4.0]), np.array([1.0, 2.0, 3.0]))["spearman"]
    1.0
    """
    return {
        "ratings": len(score),
        "pearson": _correlation(score, target),
        "spearman": _correlation(_mid_ranks(score), _mid_ranks(target)),
        "rmse": float(np.sqrt(np.mean((score - target) ** 2))) if len(score) else math.nan,
    }


def _mid_ranks(values: Array) -> Array:
    """Ranks from low to high; equal values share the mean of theirs."""
    _, where, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[where]


def _correlation(a: Array, b: Array) -> float:
    if len(a) < 2 or not np.ptp(a) or not np.ptp(b):
        return math.nan
    return float(np.round(np.corrcoef(a, b)[0, 1], 12))


def first_below(values: Sequence[float], threshold: float = 0.5) -> int:
    """Index of the first value below the threshold, -1 if there is none.

    >>> first_below([0.9, 0.2, 0.8]), first_below([0.9])
    (1, -1)
    """
    return next((n for n, value in enumerate(values) if value < threshold), -1)


def first_error_f1(truth: Sequence[int], found: Sequence[int]) -> dict[str, float]:
    """ProcessBench's measure (arXiv 2412.06559): exact first error where there is one, -1 where there is none, harmonic mean of both.

    NaN where one of the two kinds is missing.

    >>> first_error_f1([1, 2, -1], [1, 0, -1])["f1"].__round__(3)
    0.667
    """
    wrong = [t == f for t, f in zip(truth, found, strict=True) if t >= 0]
    clean = [f == -1 for t, f in zip(truth, found, strict=True) if t < 0]
    error, correct = (float(np.mean(x)) if x else math.nan for x in (wrong, clean))
    both = _harmonic(error, correct)
    return {"error_accuracy": error, "correct_accuracy": correct, "f1": both, "erroneous": len(wrong), "clean": len(clean)}


def _harmonic(a: float, b: float) -> float:
    """The harmonic mean; 0 of two zeros, NaN if one of them is."""
    return 0.0 if a + b == 0 else 2 * a * b / (a + b)


# ------------------------------------------------------------------------------------------------- from steps to an answer


def _logit_of_share(log_share: float) -> float:
    """log(p / (1 - p)) from log p, exact on both ends; at most 708, where 1 - p is the least number there is."""
    log_share = min(log_share, -np.finfo(float).tiny)
    return float(log_share - np.log(-np.expm1(log_share)))


def _product(logit_T: Array) -> float:
    return _logit_of_share(float(-np.logaddexp(0.0, -logit_T).sum()))


def _mean(logit_T: Array) -> float:
    return float(np.logaddexp.reduce(-np.logaddexp(0.0, -logit_T)) - np.logaddexp.reduce(-np.logaddexp(0.0, logit_T)))


def _geometric_mean(logit_T: Array) -> float:
    return _logit_of_share(float(-np.logaddexp(0.0, -logit_T).mean()))


AGGREGATIONS: dict[str, Callable[[Array], float]] = {  # logits of the steps of an answer -> logit of the answer
    "min": lambda logit_T: float(logit_T.min()),
    "product": _product,
    "mean": _mean,
    "last": lambda logit_T: float(logit_T[-1]),
    "geometric_mean": _geometric_mean,
}


def aggregate(score: Sequence[float], how: str) -> float:
    """One score of an answer from those of its steps: the logit of min, prod, mean, last or prod^(1/T) of p_t = sigma(score_t).

    min and product: Lightman et al. 2023 (arXiv 2305.20050, appendix F); min: Math-Shepherd (arXiv 2312.08935); mean, last and the
    geometric mean are among those that RewardMATH compares (arXiv 2410.01729). Computed on logits, so that nothing is lost to rounding
    where every step is sure. An answer of one step keeps its score.

    >>> [round(float(sigmoid(aggregate([0.0, float(np.log(4.0))], how))), 3) for how in AGGREGATIONS]
    [0.5, 0.4, 0.65, 0.8, 0.632]
    """
    if not len(score):
        raise ValueError("an answer without a step has no score")
    return float(score[0]) if len(score) == 1 else AGGREGATIONS[how](np.asarray(score, float))


def best_of_steps(prompt: Sequence[str], scores: Scores, right: Sequence[float]) -> dict[str, Any]:
    """Best-of-N by step scores: what the best answer of every prompt is worth, by every aggregation; equal best scores share.

    One entry per answer: its prompt, the scores of its steps, and how right it is (0 to 1). Prompts with one answer are left out.

    >>> best_of_steps(["q", "q"], [(2.0, -1.0), (0.0, 0.0)], [0.0, 1.0])["picked"]["min"]
    1.0
    """
    groups: dict[str, list[int]] = {}
    for n, name in enumerate(prompt):
        groups.setdefault(name, []).append(n)
    several = [group for group in groups.values() if len(group) > 1]
    if not several:
        return {}
    worth = np.asarray(right, float)
    picked: dict[str, float] = {}
    for how in AGGREGATIONS:
        answer = np.array([aggregate(score, how) for score in scores])
        picked[how] = float(np.mean([worth[g][answer[g] == answer[g].max()].mean() for g in several]))
    return {
        "picked": picked,
        "mean_answer": float(np.mean([worth[g].mean() for g in several])),
        "best_answer": float(np.mean([worth[g].max() for g in several])),
        "prompts": len(several),
        "answers": sum(map(len, several)),
    }


def prm_score(right: Sequence[bool] | Array, said: Sequence[bool] | Array) -> dict[str, float]:
    """PRMScore of steps: the mean of the F1 of right steps and the F1 of wrong ones (PRMBench, arXiv 2501.03124).

    `right` and `said` per step, pooled over all answers. F1 = 2 TP / (2 TP + FP + FN) of each class; 0 where a class is there and
    never said, NaN where there is no step of a class, and PRMScore with it.

    >>> prm_score([True, True, True, False], [True, True, False, False])["prm_score"].__round__(4)
    0.7333
    """
    is_right, says_right = np.asarray(right, bool), np.asarray(said, bool)
    f1 = [
        2.0 * float((t & s).sum()) / float(t.sum() + s.sum()) if t.any() else math.nan
        for t, s in ((is_right, says_right), (~is_right, ~says_right))
    ]
    return {
        "prm_score": (f1[0] + f1[1]) / 2,
        "f1_right": f1[0],
        "f1_wrong": f1[1],
        "right": int(is_right.sum()),
        "wrong": int((~is_right).sum()),
    }


def least_on_last(scores: Scores) -> dict[str, float]:
    """Share of answers of several steps whose least score is the last step's alone, beside that share by chance, the mean of 1/T.

    A share far above chance says that a process model has become an outcome model (Zhang et al. 2025, arXiv 2501.07301).

    >>> least_on_last([(1.0, 0.0), (0.0, 1.0), (2.0, 2.0), (3.0,)])
    {'share': 0.3333333333333333, 'chance': 0.5, 'answers': 3}
    """
    several = [score for score in scores if len(score) > 1]
    if not several:
        return {"share": math.nan, "chance": math.nan, "answers": 0}
    share = float(np.mean([score[-1] < min(score[:-1]) for score in several]))
    return {"share": share, "chance": float(np.mean([1 / len(score) for score in several])), "answers": len(several)}


def first_error_baselines(truth: Sequence[int], steps: Sequence[int]) -> dict[str, dict[str, float]]:
    """Accuracies and F1 of first_error_f1 for rules that read nothing: first errors and numbers of steps, one per answer.

    always_clean   no step is wrong
    random_step    one of the T steps or none, each with 1 / (T + 1); in expectation
    last_step      the last step is the first wrong one

    >>> first_error_baselines([1, -1], [2, 2])["random_step"]["f1"].__round__(3)
    0.333
    """
    found = {}
    for name, hit in {
        "always_clean": [float(t < 0) for t in truth],
        "random_step": [1 / (n + 1) for n in steps],
        "last_step": [float(t == n - 1) for t, n in zip(truth, steps, strict=True)],
    }.items():
        error, clean = (
            float(np.mean(x)) if x else math.nan
            for x in ([h for h, t in zip(hit, truth, strict=True) if (t >= 0) == wrong] for wrong in (True, False))
        )
        found[name] = {"error_accuracy": error, "correct_accuracy": clean, "f1": _harmonic(error, clean)}
    return found
