"""A posterior over the whole path of values V_0 .. V_{T-1} of a solution, and the completions that tell most about it.

Where the solution was written by the policy that completes it, E[V_t+1 | first t steps] = V_t: the values are a martingale. The model is a
Markov chain on 19 levels of value that keeps this exactly: stay with chance q0, else pick a level below and one above and go to one of
them with the chances that keep the mean; the level below is 0 with chance z0 (an error that nothing repairs). 0 and 1 are final.
The first error is the first step that loses more than a share of the value: V_t < kappa V_t-1. This is relative to the difficulty of
the problem, and it holds for policies that repair their own errors, with which "any success" calls every step good in the end.

    hard    draw where the expected information about the first error per completion (or token) is largest, until it is sure enough
    soft    draw where the expected fall of the posterior variances is largest, until the values are known well enough

>>> from rayward.schemes.states import Solution, State
>>> solution = Solution(4, outcome=False, tokens=(40.0, 30.0, 20.0, 10.0), root_right=5, root_count=8)
>>> posterior([State(solution, (0, 0, 0, 0), (0, 0, 0, 0), (0, 0, 0, 0))], PosteriorSettings(), "hard")
[[Ask(kept=3, times=1)]]
>>> [decision] = posterior([State(solution, (0, 1, 2, 0), (0, 0, 0, 4), (0, 0, 0, 0))], PosteriorSettings(), "hard")
>>> decision.first_error, decision.confidence > 0.9, [round(v, 2) for v in decision.soft]
(2, True, [0.65, 0.67, 0.04, 0.0])

Shapes: B solutions of one number of steps T, G levels, t = 0..T-1 kept steps, S = T places of the first error (s = 1..T: prefix s is the
first bad one; s = T: only the end is left, so a right answer has no error).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from rayward.schemes.search import first_error
from rayward.schemes.states import Ask, Decision, State, abstain, decided

LEVELS = np.array([0, 0.01, 0.02, 0.04, 0.07, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 1.0])
_MOST = 256  # solutions handled at once: more does not fit the caches
_FLOOR = -250.0  # least log likelihood of a level that is possible, beside the best: keeps products in the range of floats


@dataclass(frozen=True)
class PosteriorSettings:
    """When to stop, what a completion costs, and what the policy's values are like."""

    alpha: float = 0.1  # hard: stop when the first error is known with posterior chance 1 - alpha
    sd: float = 0.1  # soft: stop when the mean posterior standard deviation of the values is at most this
    kappa: float = 0.5  # a step is the first error if it leaves less than this share of the value before it
    cost: Literal["call", "token"] = "call"  # what is to be saved: completions, or tokens generated
    batch: int = 1  # completions a round: two on each of the best prefixes
    cap: int = 64  # completions after which the solution abstains
    least_gain: float = 0.002  # hard: stop, unsure, when one more completion would make a wrong label less likely by less than about this
    if_unsure: Literal["abstain", "guess"] = "abstain"  # guess: the likeliest first error, however unsure
    q0: float = 0.75  # chance that a step leaves the value as it was; 0.85 fits policies that repair their errors
    z0: float = 0.995  # chance that a loss is total; 0.1 fits policies that repair their errors

    def __post_init__(self) -> None:
        for name, value in (("alpha", self.alpha), ("kappa", self.kappa), ("sd", self.sd)):
            if not 0 < value < 1:
                raise ValueError(f"{name}={value} must be between 0 and 1")
        if not (0 <= self.q0 < 1 and 0 <= self.z0 <= 1):
            raise ValueError(f"q0={self.q0} and z0={self.z0} are chances, and q0 is below 1")
        if self.least_gain < 0:
            raise ValueError(f"least_gain={self.least_gain} must be at least 0")
        if self.batch < 1 or self.cap < 1:
            raise ValueError(f"batch={self.batch} and cap={self.cap} must be at least 1")


# -------------------------------------------------------------------------------------------------------------------------- the model


class Chain(NamedTuple):
    """Chances of going from level to level, shape (G, G), split by whether the step is a first error."""

    all_GG: np.ndarray
    keep_GG: np.ndarray  # to at least kappa of the value
    drop_GG: np.ndarray  # below


@functools.lru_cache(maxsize=128)
def chain(q0: float, z0: float, kappa: float) -> Chain:
    """The martingale chain on LEVELS: from v stay with chance q0, else go to b > v with chance (v - a) / (b - a), or to a < v.

    >>> bool(np.allclose(chain(0.75, 0.9, 0.5).all_GG @ LEVELS, LEVELS))
    True
    """
    G = len(LEVELS)
    all_GG = np.eye(G)
    for i in range(1, G - 1):
        below, above, v = LEVELS[:i, None], LEVELS[None, i + 1 :], LEVELS[i]
        chance_below = np.full((i, 1), (1 - z0) / max(1, i - 1))
        chance_below[0] = z0 if i > 1 else 1.0  # below the lowest level there is only 0
        chance = (1 - q0) * chance_below / (G - 1 - i)
        up = (v - below) / (above - below)
        all_GG[i, i] = q0
        all_GG[i, i + 1 :] = (chance * up).sum(0)
        all_GG[i, :i] = (chance * (1 - up)).sum(1)
    keep = LEVELS[None, :] >= kappa * LEVELS[:, None]
    return Chain(all_GG, all_GG * keep, all_GG * ~keep)


class Evidence(NamedTuple):
    """What was seen of B solutions of T steps."""

    like_TBG: np.ndarray  # P(verdicts at prefix t | level), up to a constant
    end_BG: np.ndarray  # P(outcome | level of prefix T-1)


def evidence(states: Sequence[State]) -> Evidence:
    """The likelihood v^right (1-v)^wrong of every prefix; at the root the problem's other answers count too."""
    right_BT = np.array([s.right for s in states], float)
    wrong_BT = np.array([s.wrong for s in states], float)
    right_BT[:, 0] += [s.solution.root_right for s in states]
    wrong_BT[:, 0] += [s.solution.root_count - s.solution.root_right for s in states]
    with np.errstate(divide="ignore"):
        log_v, log_1v = np.maximum(np.log(LEVELS), -1e300), np.maximum(np.log1p(-LEVELS), -1e300)  # 0 * -1e300 is 0; twice it is -inf
    with np.errstate(over="ignore"):
        x = right_BT.T[..., None] * log_v + wrong_BT.T[..., None] * log_1v
    x -= x.max(-1, keepdims=True)
    like_TBG = np.exp(np.where(x < -1e290, -np.inf, np.maximum(x, _FLOOR)))
    ends = {True: LEVELS, False: 1 - LEVELS, None: np.ones_like(LEVELS)}
    return Evidence(like_TBG, np.stack([ends[s.solution.outcome] for s in states]))


class Messages(NamedTuple):
    """Forward and backward messages, scaled so that their product is the posterior of the level at prefix t."""

    ahead_TBG: np.ndarray
    back_TBG: np.ndarray
    like_TBG: np.ndarray  # divided by P(verdicts at t | those before)
    log_evidence_B: np.ndarray


def messages(seen: Evidence, all_GG: np.ndarray) -> Messages:
    """Forward-backward, started at even chances of all levels but 0 and 1."""
    like_TBG, end_BG = seen
    T, B, G = like_TBG.shape
    scale_TB = np.empty((T, B))
    ahead_TBG, back_TBG = np.empty((T, B, G)), np.empty((T, B, G))
    prior_G = np.where((LEVELS > 0) & (LEVELS < 1), 1 / (G - 2), 0.0)
    for t in range(T):
        ahead = (prior_G if t == 0 else ahead_TBG[t - 1] @ all_GG) * like_TBG[t]
        scale_TB[t] = ahead.sum(-1)
        ahead_TBG[t] = ahead / scale_TB[t, :, None]
    scaled_TBG = like_TBG / scale_TB[..., None]
    end_B = (ahead_TBG[-1] * end_BG).sum(-1)
    back_TBG[-1] = end_BG / end_B[:, None]
    for t in range(T - 2, -1, -1):
        back_TBG[t] = (scaled_TBG[t + 1] * back_TBG[t + 1]) @ all_GG.T
    return Messages(ahead_TBG, back_TBG, scaled_TBG, np.log(scale_TB).sum(0) + np.log(end_B))


def _times(x_SBG: np.ndarray, matrix_GG: np.ndarray) -> np.ndarray:
    """x @ matrix as one product of matrices, which is many times faster than S small ones."""
    return (x_SBG.reshape(-1, x_SBG.shape[-1]) @ matrix_GG).reshape(x_SBG.shape)


class Drop(NamedTuple):
    """Where the first error is."""

    place_BS: np.ndarray  # P(prefix s is the first bad one | verdicts), s = 1..T
    with_value_BtS: np.ndarray  # E[V_t ; s is the first bad one | verdicts], t = 1..T-1


def first_drop(m: Messages, kernel: Chain) -> Drop:
    """The exact posterior of the first drop, and its joint with every value: O(T^2 G^2) a solution.

    Forward messages without a drop, one edge with the drop at s, then the free chain.
    """
    T, B, G = m.ahead_TBG.shape
    kept_TBG, new_TBG = np.empty((T, B, G)), np.zeros((T, B, G))
    kept_TBG[0] = m.ahead_TBG[0]
    for t in range(1, T):
        new_TBG[t] = (kept_TBG[t - 1] @ kernel.drop_GG) * m.like_TBG[t]
        kept_TBG[t] = (kept_TBG[t - 1] @ kernel.keep_GG) * m.like_TBG[t]
    place_SB = np.empty((T, B))
    place_SB[:-1] = (new_TBG[1:] * m.back_TBG[1:]).sum(-1)
    place_SB[-1] = (kept_TBG[-1] * m.back_TBG[-1]).sum(-1)
    joint_tSB = np.empty((T - 1, T, B))
    to_come_SBG = np.empty((T, B, G))  # [s-1]: P(no drop before s, a drop at s, verdicts after t | V_t)
    for t in range(T - 1, 0, -1):
        to_come_SBG[t + 1 :] = _times(m.like_TBG[t + 1] * to_come_SBG[t + 1 :], kernel.keep_GG.T) if t < T - 1 else 0.0
        to_come_SBG[t] = m.back_TBG[t] if t == T - 1 else (m.like_TBG[t + 1] * m.back_TBG[t + 1]) @ kernel.drop_GG.T
        joint_tSB[t - 1, t:] = np.einsum("sbg,bg->sb", to_come_SBG[t:], kept_TBG[t] * LEVELS)
    past_SBG = np.empty((T, B, G))  # [s-1]: P(a drop at s, verdicts up to t, V_t)
    for t in range(1, T):
        past_SBG[: t - 1] = _times(past_SBG[: t - 1], kernel.all_GG) * m.like_TBG[t]
        past_SBG[t - 1] = new_TBG[t]
        joint_tSB[t - 1, :t] = np.einsum("sbg,bg->sb", past_SBG[:t], m.back_TBG[t] * LEVELS)
    return Drop(np.ascontiguousarray(place_SB.T), np.ascontiguousarray(joint_tSB.transpose(2, 0, 1)))


class Values(NamedTuple):
    """Posterior of the values V_t, t = 1..T-1."""

    mean_Bt: np.ndarray
    sd_Bt: np.ndarray


def values(m: Messages) -> Values:
    """Posterior means and standard deviations."""
    post_TBG = m.ahead_TBG[1:] * m.back_TBG[1:]
    mean_tB = post_TBG @ LEVELS
    variance_tB = post_TBG @ LEVELS**2 - mean_tB**2
    return Values(mean_tB.T, np.sqrt(np.maximum(variance_tB, 0)).T)


def covariance(m: Messages, kernel: Chain) -> np.ndarray:
    """Posterior Cov(V_s, V_t), s and t = 1..T-1, shape (B, T-1, T-1)."""
    T, B, G = m.ahead_TBG.shape
    both_Btt = np.empty((B, T - 1, T - 1))
    pushed_SBG = np.empty((T - 1, B, G))  # [s-1]: E[V_s ; V_t = level], pushed forward to t
    for t in range(1, T):
        pushed_SBG[: t - 1] = _times(pushed_SBG[: t - 1], kernel.all_GG) * m.like_TBG[t]
        pushed_SBG[t - 1] = m.ahead_TBG[t] * LEVELS
        both_Btt[:, :t, t - 1] = both_Btt[:, t - 1, :t] = np.einsum("sbg,bg->bs", pushed_SBG[:t], m.back_TBG[t] * LEVELS)
    mean_Bt = values(m).mean_Bt
    return both_Btt - mean_Bt[:, :, None] * mean_Bt[:, None, :]


# ------------------------------------------------------------------------------------------------------------------- what to draw next


def information(drop: Drop) -> np.ndarray:
    """Bits that one more completion of prefix t = 1..T-1 is expected to tell about the first error, shape (B, T-1).

    H(s) - p_t H(s | success) - (1 - p_t) H(s | failure), with p_t = E[V_t].
    """
    p_BS, with_value_BtS = drop
    p_Bt = np.clip(with_value_BtS.sum(-1), 1e-9, 1 - 1e-9)
    without_BtS = np.maximum(p_BS[:, None, :] - with_value_BtS, 0)
    after = p_Bt * _entropy(with_value_BtS / p_Bt[..., None]) + (1 - p_Bt) * _entropy(without_BtS / (1 - p_Bt)[..., None])
    return _entropy(p_BS)[:, None] - after


def error_fall(place_BS: np.ndarray, information_Bt: np.ndarray) -> np.ndarray:
    """About how far the best next completion brings down P(label wrong), shape (B,): its share of the bits that are missing.

    The exact expectation of one completion is often 0 where two would change the answer. Stopping by it puts completions where they
    buy most: many solutions that are sure at a little cost, rather than one of a hard problem.
    """
    return information_Bt.max(1) * (1 - place_BS.max(1)) / np.maximum(_entropy(place_BS), 1e-12)


def variance_fall(mean_Bt: np.ndarray, covariance_Btt: np.ndarray) -> np.ndarray:
    """How far one more completion of prefix t brings down the sum of variances, on average: sum_s Cov(V_s, V_t)^2 / (p_t (1 - p_t))."""
    p_Bt = np.clip(mean_Bt, 1e-3, 1 - 1e-3)
    return (covariance_Btt**2).sum(1) / (p_Bt * (1 - p_Bt))


def _entropy(p: np.ndarray) -> np.ndarray:
    return -(p * np.log2(np.maximum(p, 1e-300))).sum(-1)


def posterior(states: Sequence[State], settings: PosteriorSettings, want: Literal["hard", "soft"]) -> list[list[Ask] | Decision]:
    """What to draw next, or the decision, for many solutions at once; solutions of the same number of steps share the arithmetic."""
    answers: list[list[Ask] | Decision] = [[]] * len(states)
    for part in alike(states):
        for i, answer in zip(part, _posterior([states[i] for i in part], settings, want), strict=True):
            answers[i] = answer
    return answers


def alike(states: Sequence[State]) -> Iterator[list[int]]:
    """Indices of states in parts that have the same number of steps."""
    by_steps: dict[int, list[int]] = {}
    for i, state in enumerate(states):
        by_steps.setdefault(state.solution.steps, []).append(i)
    for group in by_steps.values():
        for start in range(0, len(group), _MOST):
            yield group[start : start + _MOST]


def _posterior(states: Sequence[State], settings: PosteriorSettings, want: str) -> list[list[Ask] | Decision]:
    kernel = chain(settings.q0, settings.z0, settings.kappa)
    m = messages(evidence(states), kernel.all_GG)
    drop, known = first_drop(m, kernel), values(m)
    sure = _sure(drop, known, settings, want)
    go_on = [b for b, state in enumerate(states) if not sure[b] and state.drawn < settings.cap]
    asks: dict[int, list[Ask]] = {}
    if go_on:
        if want == "hard":
            gain = np.maximum(information(Drop(drop.place_BS[go_on], drop.with_value_BtS[go_on])), 1e-12)
            worth = error_fall(drop.place_BS[go_on], gain) >= settings.least_gain
            go_on, gain = [b for b, yes in zip(go_on, worth, strict=True) if yes], gain[worth]
        else:
            some = Messages(m.ahead_TBG[:, go_on], m.back_TBG[:, go_on], m.like_TBG[:, go_on], m.log_evidence_B[go_on])
            gain = np.maximum(variance_fall(known.mean_Bt[go_on], covariance(some, kernel)), 1e-12)
        if settings.cost == "token" and go_on:
            gain = gain / np.maximum(1e-9, np.array([states[b].solution.tokens[1:] for b in go_on]))
        # float32: ties stay ties whatever solutions are decided together, though products of other shapes round differently
        best = np.argsort(-gain.astype(np.float32), axis=1, kind="stable") + 1
        asks = {b: _asks(best[n], min(settings.batch, settings.cap - states[b].drawn)) for n, b in enumerate(go_on)}
    return [
        asks[b] if b in asks else _decide(state, drop.place_BS[b], known.mean_Bt[b], known.sd_Bt[b], bool(sure[b]), settings, want)
        for b, state in enumerate(states)
    ]


def _sure(drop: Drop, known: Values, settings: PosteriorSettings, want: str) -> np.ndarray:
    if want == "hard":
        return drop.place_BS.max(-1) >= 1 - settings.alpha
    return known.sd_Bt.sum(-1) <= settings.sd * known.sd_Bt.shape[1]


def _asks(best: np.ndarray, batch: int) -> list[Ask]:
    """Two completions on each of the best prefixes, until the batch is full; what is left over goes to the best."""
    times = dict.fromkeys(best[: (batch + 1) // 2].tolist(), 2)
    last = next(reversed(times))
    times[last] -= sum(times.values()) - batch if sum(times.values()) > batch else 0
    times[int(best[0])] += max(0, batch - sum(times.values()))
    return [Ask(t, n) for t, n in times.items()]


def _decide(
    state: State, place_S: np.ndarray, mean_t: np.ndarray, sd_t: np.ndarray, sure: bool, settings: PosteriorSettings, want: str
) -> Decision:
    of = state.solution
    soft, sd = mean_t.tolist(), sd_t.tolist()
    tau, confidence = int(place_S.argmax()) + 1, min(1.0, float(place_S.max()))
    if not sure and settings.if_unsure == "abstain":
        how = f"the first error is known to {confidence:.2f}" if want == "hard" else f"mean sd {float(sd_t.mean()):.3f}"
        why = f"cap={settings.cap}" if state.drawn >= settings.cap else f"least_gain={settings.least_gain}"
        return abstain(of, f"unsure: {how} after {state.drawn} completions; {why}", soft, sd)
    if of.outcome is not None and (want == "hard" or confidence >= 1 - settings.alpha):
        return decided(of, first_error(of, tau), soft, sd, confidence)
    bad = np.cumsum(place_S)[: len(soft)]  # P(prefix t or one before it is the first bad one): each step by itself may be sure
    level = 1 - settings.alpha
    hard = [0.0 if b >= level else 1.0 if 1 - b >= level else None for b in bad.tolist()]
    end = None if of.outcome is None else float(of.outcome)
    return Decision((*hard, end), (*soft, end), (*sd, None if end is None else 0.0), None)


# ------------------------------------------------------------------------------------------------------------------------- fitting it


class Fit(NamedTuple):
    """The settings of the chain under which a pilot is likeliest."""

    q0: float
    z0: float
    log_evidence: float
    log_evidence_final: float  # of the best chain whose losses are nearly all total (z0 = 0.995): an error that nothing repairs


def fit(pilot: Sequence[State], kappa: float = 0.5) -> Fit:
    """q0 and z0 by evidence (empirical Bayes) on a grid. The pilot's prefixes should have been drawn evenly, as `exhaustive` does.

    Raises:
        ValueError: if the pilot is empty.
    """
    if not pilot:
        raise ValueError("no pilot: the chain is fitted to the verdicts of some solutions")
    parts = [evidence([pilot[i] for i in part]) for part in alike(pilot)]
    found = {
        (q0, z0): float(sum(messages(part, chain(q0, z0, kappa).all_GG).log_evidence_B.sum() for part in parts))
        for q0 in (0.3, 0.45, 0.6, 0.75, 0.85, 0.93)
        for z0 in (0.1, 0.3, 0.5, 0.7, 0.9, 0.97, 0.995)
    }
    q0, z0 = max(found, key=lambda key: found[key])
    return Fit(q0, z0, found[q0, z0], max(value for (_, z), value in found.items() if z == 0.995))
