"""Schemes that look for the first prefix from which nothing succeeds: all prefixes, left to right, or by halving.

    exhaustive   n continuations of every prefix at once (Math-Shepherd, arXiv 2312.08935)
    scan         left to right; a prefix stops at its first success, the solution at its first prefix with n failures.
                 The labels have the same distribution as exhaustive's any-of-n, at a sixth of the completions
    bisect       halving (OmegaPRM, arXiv 2406.06592): a continuation that succeeds from prefix t passes through every prefix before it
                 if the step texts do, so the prefixes with V > 0 come first and halving is exact in the limit
    skew         halving at the split that costs least, because a success is cheaper to see than k failures
    certified    halving with a sequential test at every node, so that the error has a stated level

>>> from rayward.schemes.states import State
>>> solution = Solution(4, outcome=False, tokens=(40.0, 30.0, 20.0, 10.0))
>>> bisect([State(solution, (0, 0, 1, 0), (0, 0, 1, 2), (0, 0, 0, 0))], BisectSettings(k=3, batch=2))
[[Ask(kept=3, times=1)]]

All of them are functions of the counts alone: a node is judged by what was drawn at it, and is never drawn again once judged. With early
stop the share of successes at a prefix is biased, so these schemes give hard labels; only exhaustive gives shares as well.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from rayward.schemes.states import Ask, Decision, Solution, State, abstain, decided


def first_error(solution: Solution, tau: int) -> int:
    """Index of the first wrong step where prefix `tau` is the first bad one; -1 if only the end is left and it is right."""
    return -1 if tau == solution.steps and solution.outcome else tau - 1


# ------------------------------------------------------------------------------------------------------------------------ every prefix


@dataclass(frozen=True)
class ExhaustiveSettings:
    """Every prefix, the same number of times."""

    n: int = 8  # graded continuations of every prefix 1..T-1
    decoder: Literal["first", "last"] = (
        "first"  # the first wrong step: the first prefix without a success, or the one after the last with one
    )

    def __post_init__(self) -> None:
        _at_least_one(n=self.n)


def exhaustive(states: Sequence[State], settings: ExhaustiveSettings) -> list[list[Ask] | Decision]:
    """All prefixes in one round; hard labels by any success, soft labels by the share, which is unbiased."""
    return [_exhaustive(state, settings) for state in states]


def _exhaustive(state: State, settings: ExhaustiveSettings) -> list[Ask] | Decision:
    of, n = state.solution, settings.n
    inner = range(1, of.steps)
    asks = [Ask(t, n - have) for t in inner if (have := state.right[t] + state.wrong[t]) < n]
    if asks:
        return asks
    counts = {t: state.right[t] + state.wrong[t] for t in inner}
    share = [state.right[t] / counts[t] for t in inner]
    # of the share's distribution with one success and one failure added: 0 of 8 is not known exactly
    sd = [math.sqrt(p * (1 - p) / counts[t]) for t in inner for p in [(state.right[t] + 1) / (counts[t] + 2)]]
    if of.outcome is None:
        return Decision((None,) * of.steps, (*share, None), (*sd, None), None)
    if settings.decoder == "first":
        tau = next((t for t in inner if not state.right[t]), of.steps)
    else:
        tau = max((t for t in inner if state.right[t]), default=0) + 1
    return decided(of, first_error(of, tau), share, sd)


# ----------------------------------------------------------------------------------------------------------------------- left to right


@dataclass(frozen=True)
class ScanSettings:
    """Left to right."""

    n: int = 8  # failures that make a prefix wrong
    batch: int = 1  # completions a round; more means fewer rounds, and draws after the first success that were not needed

    def __post_init__(self) -> None:
        _at_least_one(n=self.n, batch=self.batch)


def scan(states: Sequence[State], settings: ScanSettings) -> list[list[Ask] | Decision]:
    """The first prefix, from the left, with n failures and no success."""
    return [_scan(state, settings) for state in states]


def _scan(state: State, settings: ScanSettings) -> list[Ask] | Decision:
    of = state.solution
    for t in range(1, of.steps):
        if state.right[t]:
            continue
        if state.wrong[t] >= settings.n:
            return decided(of, first_error(of, t))
        return [Ask(t, min(settings.batch, settings.n - state.wrong[t]))]
    return decided(of, first_error(of, of.steps))


# ------------------------------------------------------------------------------------------------------------------------- by halving

Node = Callable[[int, int], bool | int]  # (right, wrong) at a prefix -> good or not, or how many more to draw
Split = Callable[[int, int], int]  # (lo, hi) -> the prefix in between to look at


def halve(state: State, node: Node, split: Split) -> list[Ask] | int:
    """The first bad prefix, 1..T, or what to draw. Invariant: prefix lo is good, prefix hi is bad or the end."""
    lo, hi = 0, state.solution.steps
    while hi - lo > 1:
        t = split(lo, hi)
        answer = node(state.right[t], state.wrong[t])
        if answer is True:
            lo = t
        elif answer is False:
            hi = t
        else:
            return [Ask(t, answer)]
    return hi


def any_of(k: int, batch: int) -> Node:
    """Good at the first success, bad after k failures."""
    return lambda right, wrong: True if right else (False if wrong >= k else min(batch, k - wrong))


def middle(lo: int, hi: int) -> int:
    """Halve."""
    return (lo + hi) // 2


@dataclass(frozen=True)
class BisectSettings:
    """Halving."""

    k: int = 8  # failures that make a prefix wrong
    batch: int = 1  # completions a round

    def __post_init__(self) -> None:
        _at_least_one(k=self.k, batch=self.batch)


def bisect(states: Sequence[State], settings: BisectSettings) -> list[list[Ask] | Decision]:
    """Binary search with early stop at every node."""
    node = any_of(settings.k, settings.batch)
    return [_found(state, halve(state, node, middle)) for state in states]


@dataclass(frozen=True)
class SkewSettings:
    """Halving at the cheapest split."""

    k: int = 8  # failures that make a prefix wrong
    error: float | None = None  # instead of k: k per problem, so that a label is wrong with about this chance (k within 2..48)
    least_gain: float | None = None  # instead of k: draw until one more failure would make a wrong label less likely by less than this
    cost: Literal["call", "token"] = "call"  # what is to be saved: completions, or tokens generated
    batch: int = 1  # completions a round

    def __post_init__(self) -> None:
        _at_least_one(k=self.k, batch=self.batch)
        for name, value in (("error", self.error), ("least_gain", self.least_gain)):
            if value is not None and not 0 < value < 1:
                raise ValueError(f"{name}={value} is a chance, between 0 and 1")
        if self.error is not None and self.least_gain is not None:
            raise ValueError(f"error={self.error} and least_gain={self.least_gain}: k follows from one of them")


MOST_FAILURES = 48  # k where it follows from the pass rate


def skew(states: Sequence[State], settings: SkewSettings) -> list[list[Ask] | Decision]:
    """Binary search with early stop, each split chosen by dynamic programming for the unequal costs of the two answers.

    If V >= v before the first error and V = 0 from it on, P(label wrong) <= ceil(log2 T) (1 - v)^k.
    """
    answers: list[list[Ask] | Decision] = []
    for state in states:
        of, k = state.solution, failures_needed(state.solution, settings)
        table = splits(of.tokens if settings.cost == "token" else (1.0,) * of.steps, k, of.root_right, of.root_count)
        answers.append(_found(state, halve(state, any_of(k, settings.batch), lambda lo, hi, table=table: int(table[lo, hi]))))  # type: ignore[misc]
    return answers


def all_fail(right: int, count: int, k: int) -> np.ndarray:
    """P(the first 0, 1, .. k continuations of a good prefix all fail), for a problem of whose other answers `right` of `count` end right.

    E[(1 - v)^k] = prod_{j<k} (b + j) / (a + b + j) with v ~ Beta(a, b), a = right + 1/2, b = count - right + 1/2 (Jeffreys): what few
    other answers leave open makes failures by chance likelier than the mean of v does.

    >>> all_fail(4, 8, 2).round(3).tolist()
    [1.0, 0.5, 0.275]
    """
    j, a, b = np.arange(k), right + 0.5, count - right + 0.5
    return np.concatenate([[1.0], np.cumprod((b + j) / (a + b + j))])


def failures_needed(solution: Solution, settings: SkewSettings) -> int:
    """k; or, of k within 2..48, the least with ceil(log2 T) (1 - v)^k <= error, or with E[v (1 - v)^k] <= least_gain.

    v is the problem's pass rate: its mean for the error level, all that it may be for the gain (`all_fail`). The error level spends most
    on hard problems. The gain spends where a completion buys most, so it is cheaper for a mean accuracy.
    """
    if settings.least_gain is not None:
        gain = -np.diff(all_fail(solution.root_right, solution.root_count, MOST_FAILURES))  # E[v (1 - v)^k], falling in k
        return min(MOST_FAILURES, max(2, int((gain > settings.least_gain).sum())))
    if settings.error is None or solution.steps == 1:
        return settings.k
    v, left = solution.pass_rate, settings.error / math.ceil(math.log2(solution.steps))
    return min(MOST_FAILURES, max(2, math.ceil(math.log(left) / math.log1p(-v))))


@functools.lru_cache(maxsize=1 << 16)
def splits(cost_T: tuple[float, ...], k: int, right: int, count: int) -> np.ndarray:
    """The split m of every interval (lo, hi) that makes the search cheapest; shape (T+1, T+1), 0 where there is none.

    C(lo, hi) = min_m R_m [q k + (1 - q) sum_{j<k} E[(1 - v)^j]] + q C(lo, m) + (1 - q) C(m, hi) with q = (m - lo) / (hi - lo), the chance
    that the error is in (lo, m] if every step is as likely; R_m the cost of a continuation of m steps (`cost_T`: tokens, or 1) and v the
    pass rate of a problem of whose other answers `right` of `count` end right.

    >>> int(splits((40.0, 30.0, 20.0, 10.0), 8, 4, 8)[0, 4])  # a success is seen sooner than 8 failures
    1
    """
    T, good = len(cost_T), all_fail(right, count, k)[:k].sum()
    total, best, R = np.zeros((T + 1, T + 1)), np.zeros((T + 1, T + 1), np.int32), np.asarray(cost_T)
    for d in range(2, T + 1):
        lo = np.arange(T - d + 1)[:, None]
        m = lo + np.arange(1, d)
        bad = np.arange(1, d) / d
        c = R[m] * (bad * k + (1 - bad) * good) + bad * total[lo, m] + (1 - bad) * total[m, lo + d]
        at = c.argmin(1)
        total[lo[:, 0], lo[:, 0] + d] = c[np.arange(len(at)), at]
        best[lo[:, 0], lo[:, 0] + d] = m[np.arange(len(at)), at]
    return best


# --------------------------------------------------------------------------------------------------------------------- with a level


@dataclass(frozen=True)
class CertifiedSettings:
    """Halving with a sequential test at every prefix."""

    alpha: float = 0.1  # P(the answer is no true crossing) is at most this
    p1: float | None = None  # values of at least p1 are good; None: half the problem's pass rate, at least 0.08
    p0: float | None = None  # values of at most p0 are bad; None: a fifth of p1
    batch: int = 1  # completions a round; the level holds for any
    cap: int = 64  # graded completions at one prefix after which the solution abstains

    def __post_init__(self) -> None:
        _at_least_one(batch=self.batch, cap=self.cap)
        if not 0 < self.alpha < 1:
            raise ValueError(f"alpha={self.alpha} is a chance, between 0 and 1")
        if self.p1 is not None and not 0 < self.p1 < 1:
            raise ValueError(f"p1={self.p1} is a value, between 0 and 1")
        if self.p0 is not None and not 0 <= self.p0 < (1 if self.p1 is None else self.p1):
            raise ValueError(f"p0={self.p0} must be at least 0 and below p1={self.p1}")

    def values(self, solution: Solution) -> tuple[float, float]:
        """(p0, p1) of a solution."""
        p1 = max(0.08, solution.pass_rate / 2) if self.p1 is None else self.p1
        p0 = p1 / 5 if self.p0 is None else self.p0
        if p0 >= p1:
            raise ValueError(f"p0={p0} is not below p1={p1:.3f}, half the pass rate of its problem: set p1 as well")
        return p0, p1


def certified(states: Sequence[State], settings: CertifiedSettings) -> list[list[Ask] | Decision]:
    """Binary search, each node by an e-process at level alpha / ceil(log2 T).

    M = prod (p1/p0)^y ((1-p1)/(1-p0))^(1-y) is a non-negative supermartingale under any V <= p0, and 1/M under any V >= p1, so by Ville's
    inequality each goes above 1/a with chance at most a, whenever one looks. With chance at least 1 - alpha, and whatever the values do
    in between, V > p0 before the step that is named and V < p1 after it; if values are >= p1 before the first error and <= p0 after it,
    the step is the first error.
    """
    return [_certified(state, settings) for state in states]


def _certified(state: State, settings: CertifiedSettings) -> list[Ask] | Decision:
    of = state.solution
    if of.steps == 1:
        return decided(of, first_error(of, 1), confidence=1.0)
    p0, p1 = settings.values(of)
    log_a = math.log(settings.alpha / math.ceil(math.log2(of.steps)))
    up, down = math.log(p1 / p0) if p0 else math.inf, math.log((1 - p1) / (1 - p0))

    def node(right: int, wrong: int) -> bool | int:
        evidence = (right * up if right else 0.0) + wrong * down
        if abs(evidence) >= -log_a:
            return evidence > 0
        return min(settings.batch, settings.cap - right - wrong)

    answer = halve(state, node, middle)
    if isinstance(answer, list) and answer[0].times < 1:
        t = answer[0].kept
        return abstain(of, f"unsure: {state.right[t]} of {state.right[t] + state.wrong[t]} right at {t} steps, cap={settings.cap}")
    return _found(state, answer, confidence=1 - settings.alpha)


def _found(state: State, answer: list[Ask] | int, confidence: float | None = None) -> list[Ask] | Decision:
    return answer if isinstance(answer, list) else decided(state.solution, first_error(state.solution, answer), confidence=confidence)


def _at_least_one(**named: int) -> None:
    for name, value in named.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
