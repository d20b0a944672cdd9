"""Completions that each scheme needs for step labels as accurate as exhaustive sampling's, on policies whose values are known.

    python benchmarks/montecarlo.py                         everything, some minutes on one core; JSON on the last line
    python benchmarks/montecarlo.py --quick                 a subset in under a minute
    python benchmarks/montecarlo.py --plots docs/images     and the plots of docs/montecarlo.md

It runs `rayward.schemes.rounds` and the schemes themselves; only the policy is simulated.

    simulated   45 cells: a policy of two states errs at a few key steps, repairs with 0, 3 or 10 % a step; easy, medium, hard problems;
                4, 8, 12, 16, 20 steps. V_t by backward recursion; a verdict is right with chance V_t. Not the posterior scheme's model
    toy         the running maximum of rayward.toy_world with its real solver, V_t in closed form

Wrong solutions; accuracy is exact agreement with the true first error. A verdict is a function of (solution, kept, k), so all schemes
see the same draws. Saved: exhaustive's completions over those at which a scheme's curve (over its parameter, linear in between) has
exhaustive's accuracy. Not charged: 8 other answers to each problem, which exist anyway, and one pilot a policy for the posterior.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rayward.policies import Request, ToyPolicy
from rayward.records import Message
from rayward.schemes import (
    AutoSettings,
    BisectSettings,
    CertifiedSettings,
    Decision,
    Draws,
    ExhaustiveSettings,
    FreeRules,
    PosteriorSettings,
    ScanSettings,
    SkewSettings,
    Solution,
    State,
    fit,
    make_scheme,
    measure,
    rounds,
)
from rayward.toy_world import ToyWorld, seed_of

REPAIR = {"none": (0.0, 0.0), "3 %": (0.03, 0.02), "10 %": (0.10, 0.02)}  # chance to repair a step, chance that a wrong end is right
DIFFICULTY = {"easy": (0.6, 0.95), "medium": (0.25, 0.6), "hard": (0.05, 0.25)}  # range of the pass rate
OTHERS = 8  # other answers to a problem
KAPPA = 0.5
GAINS = (0.06, 0.04, 0.03, 0.025, 0.02, 0.015, 0.01, 0.007, 0.005, 0.0035, 0.0025, 0.0015, 0.001, 0.0006, 0.0003)
ALPHAS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.15, 0.1, 0.05, 0.03, 0.02, 0.01)


# ---------------------------------------------------------------------------------------------------------------------- the policies


class World(NamedTuple):
    """Solutions and the truth about them."""

    solutions: list[Solution]
    values: np.ndarray  # (solutions, most steps): V_t at t kept steps
    first_error: np.ndarray  # the policy's first wrong step, -1: none
    first_drop: np.ndarray  # the first step that leaves less than kappa of the value, -1: none
    seed: int

    def draw(self, draws: list[Draws]) -> list[list[bool]]:
        """Verdicts by hash of (solution, kept, k)."""
        i, kept, first, times = np.array(draws).T
        ends = np.cumsum(times)
        k = np.arange(ends[-1]) - np.repeat(ends - times - first, times)
        i, kept = np.repeat(i, times), np.repeat(kept, times)
        right = (_uniform((i * 64 + kept) * 65536 + k, self.seed) < self.values[i, kept]).tolist()
        return [right[end - n : end] for end, n in zip(ends.tolist(), times.tolist(), strict=True)]


def _uniform(number: np.ndarray, seed: int) -> np.ndarray:
    """Numbers in [0, 1) by hash (splitmix64)."""
    x = number.astype(np.uint64) + np.uint64((seed * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) % 2**64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return ((x ^ (x >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53


def cell(rng: np.random.Generator, count: int, T: int, pass_rate: tuple[float, float], repair: float, lucky: float, right: bool) -> World:
    """Solutions of T steps that end right, or wrong: clean -> err with chance e_t (a few steps hold most of it), err -> clean by repair."""
    v0 = rng.uniform(*pass_rate, count)
    err = 1 - np.exp(np.log(v0)[:, None] * rng.dirichlet(np.full(T, 0.5), count))
    clean, bad = np.ones((count, T + 1)), np.full((count, T + 1), lucky)
    for t in range(T - 1, -1, -1):
        clean[:, t] = (1 - err[:, t]) * clean[:, t + 1] + err[:, t] * bad[:, t + 1]
        bad[:, t] = repair * clean[:, t + 1] + (1 - repair) * bad[:, t + 1]
    wrong = np.zeros((count, T + 1), bool)
    todo = np.arange(count)
    while len(todo):
        path = np.zeros((len(todo), T + 1), bool)
        for t in range(T):
            u = rng.random(len(todo))
            path[:, t + 1] = np.where(path[:, t], u >= repair, u < err[todo, t])
        ends_right = ~path[:, T] | (rng.random(len(todo)) < lucky)
        keep = ends_right == right
        wrong[todo[keep]] = path[keep]
        todo = todo[~keep]
    values = np.where(wrong, bad, clean)
    truth = np.concatenate([values[:, :T], np.full((count, 1), float(right))], 1)
    low = truth[:, 1:] < KAPPA * truth[:, :-1]
    tokens = rng.lognormal(math.log(40) - 0.18, 0.6, (count, T))[:, ::-1].cumsum(1)[:, ::-1]
    root = rng.binomial(OTHERS, values[:, 0])
    solutions = [Solution(T, right, tuple(tokens[i].tolist()), int(root[i]), OTHERS) for i in range(count)]
    return World(
        solutions,
        np.pad(values[:, :T], ((0, 0), (0, 24 - T))),
        np.where(wrong.any(1), wrong.argmax(1) - 1, -1),
        np.where(low.any(1), low.argmax(1), -1),
        int(rng.integers(2**31)),
    )


def world(seed: int, count: int, steps: Sequence[int], repair: str, right: bool = False) -> World:
    """All cells of a policy, `count` solutions each, as one."""
    rng = np.random.default_rng([seed, list(REPAIR).index(repair), int(right)])
    cells = [cell(rng, count, T, DIFFICULTY[d], *REPAIR[repair], right) for d in DIFFICULTY for T in steps]
    return World(
        [s for c in cells for s in c.solutions],
        np.concatenate([c.values for c in cells]),
        np.concatenate([c.first_error for c in cells]),
        np.concatenate([c.first_drop for c in cells]),
        int(rng.integers(2**31)),
    )


class Toy:
    """Wrong answers of the toy world's solver; its continuations are drawn once and remembered by (answer, kept, k)."""

    def __init__(self, toy: ToyWorld, count: int) -> None:
        self.policy = ToyPolicy(toy)
        self.steps: list[tuple[str, ...]] = []
        self.prompts: list[tuple[Message, ...]] = []
        self.gold: list[str] = []
        self.solutions: list[Solution] = []
        self.first_drop: list[int] = []
        self._seen: dict[tuple[int, int, int], bool] = {}
        index = 0
        while len(self.solutions) < count:
            self._add(toy, index)
            index += 1

    def _add(self, toy: ToyWorld, index: int) -> None:
        numbers = toy.problem(index)
        steps, gold = toy.continue_steps(numbers, (), seed_of("labelled", index)), f"A: {max(numbers)}"
        if steps[-1] == gold:
            return
        others = sum(toy.continue_steps(numbers, (), seed_of("other", index, k))[-1] == gold for k in range(OTHERS))
        words = [len(step.split()) for step in steps]
        self.solutions.append(Solution(len(steps), False, tuple(float(sum(words[t:])) for t in range(len(steps))), others, OTHERS))
        value = [toy.value(numbers, steps[:t]) for t in range(len(steps) + 1)]
        self.first_drop.append(next((t for t in range(len(steps)) if value[t + 1] < KAPPA * value[t]), -1))
        self.steps.append(steps)
        self.prompts.append((Message("user", toy.question(numbers)),))
        self.gold.append(gold)

    def draw(self, draws: list[Draws]) -> list[list[bool]]:
        """Verdicts of the real solver."""
        new = [(d.solution, d.kept, k) for d in draws for k in d.numbers if (d.solution, d.kept, k) not in self._seen]
        done = self.policy([Request(self.prompts[i], self.steps[i][:kept], seed_of(i, kept, k)) for i, kept, k in new])
        self._seen.update((key, c.steps[-1] == self.gold[key[0]]) for key, c in zip(new, done, strict=True))
        return [[self._seen[d.solution, d.kept, k] for k in d.numbers] for d in draws]


# ------------------------------------------------------------------------------------------------------------------ curves of schemes


class Point(NamedTuple):
    """A scheme at one setting: what it spent on every solution and what it said."""

    n: int  # exhaustive's n, 0 for others
    completions: np.ndarray
    tokens: np.ndarray
    said: np.ndarray  # first error
    sure: np.ndarray  # confidence, nan where none is stated
    decisions: list[Decision]


def spent(states: Sequence[State]) -> tuple[np.ndarray, np.ndarray]:
    """Completions and tokens of every solution."""
    calls = np.array([s.drawn for s in states], float)
    tokens = [sum((a + b) * c for a, b, c in zip(s.right, s.wrong, s.solution.tokens, strict=True)) for s in states]
    return calls, np.array(tokens)


def curve(of: World | Toy, name: str, sweep: Sequence[Any], nested: bool, rules: FreeRules | None = None) -> list[Point]:
    """A scheme at every setting of a sweep. Nested: each setting goes on from the states of the one before, which is the same run."""
    states: list[State] | None = None
    points = []
    for settings in sweep:
        done = rounds(of.solutions, make_scheme(name, settings, rules), of.draw, states=states if nested else None)
        states = done.states
        said = np.array([-2 if d.first_error is None else d.first_error for d in done.decisions])
        sure = np.array([np.nan if d.confidence is None else d.confidence for d in done.decisions])
        points.append(Point(getattr(settings, "n", 0), *spent(states), said, sure, done.decisions))
    return points


def reread(of: World | Toy, ns: Sequence[int], settings: PosteriorSettings) -> list[Point]:
    """Exhaustive draws, read by the posterior's decoder instead of any-success."""
    states, points = None, []
    for n in ns:
        done = rounds(of.solutions, make_scheme("exhaustive", ExhaustiveSettings(n)), of.draw, states=states)
        states = done.states
        read = make_scheme("posterior", dataclasses.replace(settings, cap=1, if_unsure="guess"))
        decisions = [d for d in read(states) if isinstance(d, Decision)]
        said = np.array([d.first_error for d in decisions])
        points.append(Point(n, *spent(states), said, np.array([d.confidence for d in decisions]), decisions))
    return points


def schemes_of(of: World | Toy, chain: dict[str, float], cap: int, few: bool) -> dict[str, list[Point]]:
    """The curves of all schemes, or of a few."""
    ns = (4, 8, 16, 32, 64) if cap > 64 else (4, 8, 16, 32)
    base = PosteriorSettings(alpha=0.02, cap=cap, if_unsure="guess", **chain)  # type: ignore[arg-type]
    posterior = {
        "posterior, per completion": dataclasses.replace(base, cost="call"),
        "posterior, per token": dataclasses.replace(base, cost="token"),
        "posterior, 4 a round": dataclasses.replace(base, cost="call", batch=4),
    }
    gains = (0.1, 0.07, 0.05, 0.035, 0.025, 0.018, 0.012, 0.008, 0.005)
    curves = {
        "exhaustive": curve(of, "exhaustive", [ExhaustiveSettings(n) for n in ns], True),
        "exhaustive, last success": curve(of, "exhaustive", [ExhaustiveSettings(n, "last") for n in (2, 4, 8, 16)], True),
        "exhaustive, posterior's reading": reread(of, ns, base),
        "scan": curve(of, "scan", [ScanSettings(n) for n in (4, 8, 16, 32)], True),
        "skew": curve(of, "skew", [SkewSettings(least_gain=g) for g in gains], False),
    }
    if not few:
        curves["bisect"] = curve(of, "bisect", [BisectSettings(k) for k in (4, 8, 16, 32)], False)
        curves["skew, per token"] = curve(of, "skew", [SkewSettings(least_gain=g, cost="token") for g in gains], False)
        curves["skew, one k"] = curve(of, "skew", [SkewSettings(k) for k in (3, 4, 6, 8, 12, 16, 24)], False)
        curves["skew, to a level"] = curve(of, "skew", [SkewSettings(error=e) for e in (0.9, 0.4, 0.1, 0.02)], False)
        curves["certified"] = curve(of, "certified", [CertifiedSettings(a, cap=128, batch=2) for a in (0.8, 0.4, 0.1)], False)
    for name, settings in posterior.items():
        if not few or name == "posterior, per completion":
            curves[name] = curve(of, "posterior", [dataclasses.replace(settings, least_gain=g) for g in GAINS], True)
    by_level = [dataclasses.replace(base, cost="call", least_gain=0.0, alpha=a) for a in ALPHAS]
    curves["posterior, to a level"] = curve(of, "posterior", by_level, True)
    return curves


def cost_at(points: Sequence[tuple[float, float]], quality: float) -> float:
    """The least cost at which a curve of (cost, quality) has this quality, linear between its points; nan if it never has."""
    best: tuple[float, float] | None = None
    for cost, value in sorted(points):
        if value >= quality:
            if best is None or value == best[1]:
                return cost
            return best[0] + (quality - best[1]) / (value - best[1]) * (cost - best[0])
        if best is None or value > best[1]:
            best = (cost, value)
    return math.nan


Where = np.ndarray | slice
ALL = slice(None)


def against(points: Sequence[Point], truth: np.ndarray, cost: str, where: Where = ALL) -> list[tuple[float, float]]:
    """(mean cost, accuracy) of a curve's points."""
    return [(float(getattr(p, cost)[where].mean()), float((p.said == truth)[where].mean())) for p in points]


def saved(base: Sequence[Point], n: int, points: Sequence[Point], truth: np.ndarray, cost: str, where: Where = ALL) -> float:
    """How many times less than exhaustive with n a scheme spends at its accuracy."""
    [(spent_n, accuracy)] = against([p for p in base if p.n == n], truth, cost, where)
    return spent_n / cost_at(against(points, truth, cost, where), accuracy)


def table(curves: dict[str, list[Point]], truth: np.ndarray, base: str = "exhaustive") -> None:
    """Savings and points of all curves."""
    print(f"  {'':32} calls saved at exh 8 / 16   tokens saved at exh 8 / 16   points (completions: accuracy)")
    for name, points in curves.items():
        s = [saved(curves[base], n, points, truth, cost) for cost in ("completions", "tokens") for n in (8, 16)]
        dots = "  ".join(f"{c:.0f}:{a:.3f}" for c, a in against(points, truth, "completions"))
        print(f"  {name:32} {s[0]:9.1f} / {s[1]:5.1f} {s[2]:19.1f} / {s[3]:5.1f}          {dots}", flush=True)


# ------------------------------------------------------------------------------------------------------------------- what is measured


def fitted(seed: int, repair: str, quick: bool) -> dict[str, float]:
    """The posterior's chain from a pilot of its own: 135 wrong solutions, every prefix 8 times; and what `auto` says of it."""
    of = world(seed + 77, 5 if quick else 15, (6, 12, 18), repair)
    states = rounds(of.solutions, make_scheme("exhaustive"), of.draw).states
    print(f"  pilot: {measure(states, 'hard', AutoSettings()).says}")
    found = fit(states)
    return {"q0": found.q0, "z0": found.z0}


def calibration(points: Sequence[Point], truth: np.ndarray) -> list[tuple[float, float, int]]:
    """(mean confidence, accuracy, decisions) by confidence, over all levels at which a run was stopped."""
    sure, right = np.concatenate([p.sure for p in points]), np.concatenate([p.said == truth for p in points])
    rows = []
    for lo, hi in zip([0, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98], [0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 1.01], strict=True):
        inside = (sure >= lo) & (sure < hi)
        if inside.sum() > 30:
            rows.append((float(sure[inside].mean()), float(right[inside].mean()), int(inside.sum())))
    return rows


def certified_level(seed: int, count: int, steps: Sequence[int]) -> None:
    """The share of certified labels that are no true crossing, with its stated level."""
    print(f"\ncertified, alpha=0.1, {count} solutions a policy")
    per = count // (len(DIFFICULTY) * len(steps)) + 1
    for repair in ("none", "3 %"):
        of = world(seed + 5, per, steps, repair)
        settings = CertifiedSettings(alpha=0.1, batch=4)
        [point] = curve(of, "certified", [settings], False)
        p0, p1 = np.array([settings.values(s) for s in of.solutions]).T
        row = np.arange(len(point.said))
        last = point.said + 1 == np.array([s.steps for s in of.solutions])
        before = of.values[row, np.maximum(point.said, 0)]
        after = np.where(last, 0.0, of.values[row, np.minimum(point.said + 1, 23)])
        labelled = point.said >= 0
        crossing = (before > p0) & (after < p1)
        print(f"  repair {repair:5} {len(row)} solutions, {labelled.mean():.3f} labelled with {point.completions.mean():.1f} completions")
        print(
            f"    no true crossing: {(labelled & ~crossing).mean():.4f} of all, {(~crossing)[labelled].mean():.4f} of the labelled; "
            f"not the policy's first error: {(point.said != of.first_error)[labelled].mean():.4f} of the labelled"
        )


def soft_labels(seed: int, count: int, steps: Sequence[int], repair: str, chain: dict[str, float]) -> None:
    """Mean absolute error of V_t, t = 1..T-1, over right and wrong solutions alike."""
    of = [world(seed + 9, count, steps, repair, right) for right in (False, True)]
    rules = FreeRules(want="soft")
    base = PosteriorSettings(cap=160, if_unsure="guess", **chain)  # type: ignore[arg-type]
    by = {
        cost: [dataclasses.replace(base, sd=s, cost=cost) for s in (0.2, 0.15, 0.12, 0.1, 0.08, 0.07, 0.06, 0.05)]
        for cost in ("call", "token")
    }
    both = {"exhaustive": [curve(w, "exhaustive", [ExhaustiveSettings(n) for n in (8, 16)], True, rules) for w in of]}
    both |= {cost: [curve(w, "posterior", sds, True, rules) for w in of] for cost, sds in by.items()}

    def error(w: World, p: Point) -> float:
        return float(np.mean([np.abs(w.values[i, 1 : len(d.soft)] - d.soft[:-1]).mean() for i, d in enumerate(p.decisions)]))

    dots: dict[str, list[tuple[float, float, float]]] = {}
    for name, (a, b) in both.items():
        dots[name] = [
            (
                float(p.completions.mean() + q.completions.mean()) / 2,
                float(p.tokens.mean() + q.tokens.mean()) / 2,
                (error(of[0], p) + error(of[1], q)) / 2,
            )
            for p, q in zip(a, b, strict=True)
        ]
    for cost in by:
        for n, (calls, tokens, mae) in zip((8, 16), dots["exhaustive"], strict=True):
            by_calls = calls / cost_at([(c, -e) for c, _, e in dots[cost]], -mae)
            by_tokens = tokens / cost_at([(t, -e) for _, t, e in dots[cost]], -mae)
            saves = f"{by_calls:.1f}x fewer completions, {by_tokens:.1f}x fewer tokens"
            print(f"  repair {repair:5} per {cost:5} at exhaustive n={n}'s error {mae:.3f}: {saves}")


def mixed(curves: dict[str, list[Point]], of: World, right: World) -> float:
    """Half right, half wrong solutions, at exhaustive's accuracy on the wrong ones: the free rules label the right ones for nothing.

    The smaller of the savings at exhaustive 8 and 16, each by the better scheme.
    """
    full = curve(right, "exhaustive", [ExhaustiveSettings(n) for n in (8, 16)], True, FreeRules(right_is_free=False))
    free = [curve(right, name, [None], False)[0].completions.mean() for name in ("skew", "posterior")]
    best = []
    for n, point in zip((8, 16), full, strict=True):
        wrong = next(p for p in curves["exhaustive"] if p.n == n)
        ratio = {}
        for name, on_right in zip(("skew", "posterior, per completion"), free, strict=True):
            cost = cost_at(against(curves[name], of.first_error, "completions"), float((wrong.said == of.first_error).mean()))
            ratio[name] = float((wrong.completions.mean() + point.completions.mean()) / (cost + on_right))
        print(f"  at exhaustive n={n}: " + ", ".join(f"{name} {r:.1f}x" for name, r in ratio.items()))
        best.append(max(ratio.values()))
    return min(best)


def by_length(
    curves: dict[str, list[Point]], of: World, names: Sequence[str], steps: Sequence[int]
) -> dict[str, list[tuple[float, float]]]:
    """Completions saved at exhaustive 8 and 16, by number of steps."""
    T: np.ndarray = np.array([s.steps for s in of.solutions])
    found = {
        name: [
            (
                saved(curves["exhaustive"], 8, curves[name], of.first_error, "completions", np.equal(T, t)),
                saved(curves["exhaustive"], 16, curves[name], of.first_error, "completions", np.equal(T, t)),
            )
            for t in steps
        ]
        for name in names
    }
    for name, rows in found.items():
        print(f"  {name:28} " + "  ".join(f"T={t}: {a:.1f}/{b:.1f}" for t, (a, b) in zip(steps, rows, strict=True)))
    return found


# ------------------------------------------------------------------------------------------------------------------------------ plots


def plots(
    folder: Path, all_curves: dict[str, dict[str, list[Point]]], truths: dict[str, np.ndarray], lengths: Any, steps: Sequence[int]
) -> None:
    """The pictures of docs/montecarlo.md."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def picture(name: str, draw: Callable[[Any], None], x: str, y: str) -> None:
        figure, axes = plt.subplots(figsize=(7, 4.2))
        draw(axes)
        axes.set(xlabel=x, ylabel=y)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
        figure.tight_layout()
        figure.savefig(folder / f"montecarlo-{name}.png", dpi=110)
        plt.close(figure)

    names = ("exhaustive", "exhaustive, last success", "scan", "bisect", "skew", "certified", "posterior, per completion")

    def accuracy(axes: Any) -> None:
        for name in names:
            if name in all_curves["none"]:
                axes.semilogx(*zip(*against(all_curves["none"][name], truths["none"], "completions"), strict=True), "o-", ms=3, label=name)
        axes.set_xticks([5, 10, 20, 50, 100, 200, 500], [5, 10, 20, 50, 100, 200, 500])
        axes.set_ylim(0.5, 1.01)

    def repair(axes: Any) -> None:
        for level, style in (("3 %", "-"), ("10 %", "--")):
            for n, name in enumerate(("exhaustive", "exhaustive, posterior's reading", "posterior, per completion")):
                if level in all_curves:
                    dots = against(all_curves[level][name], truths[level], "completions")
                    axes.semilogx(*zip(*dots, strict=True), f"o{style}", color=f"C{n}", ms=3, label=f"{name}; {level} repair")
        axes.set_xticks([5, 10, 20, 50, 100, 200, 500], [5, 10, 20, 50, 100, 200, 500])
        axes.set(xlim=(4, 1000), ylim=(0, 1.15))

    def length(axes: Any) -> None:
        for n, (name, rows) in enumerate(lengths.items()):
            for at, style, column in ((8, "o--", 0), (16, "o-", 1)):
                axes.plot(steps, [row[column] for row in rows], style, color=f"C{n}", label=f"{name}, at exhaustive n={at}")

    def calibrated(axes: Any) -> None:
        axes.plot([0, 1], [0, 1], "k:", lw=1)
        for level, curves in all_curves.items():
            rows = calibration(curves["posterior, to a level"], truths[level + " drop"])
            axes.plot([r[0] for r in rows], [r[1] for r in rows], "o-", ms=3, label=f"repair {level}")

    folder.mkdir(parents=True, exist_ok=True)
    picture("accuracy", accuracy, "completions per wrong solution", "first error found exactly")
    picture("repair", repair, "completions per wrong solution", "first error found exactly")
    picture("length", length, "steps of the solution", "times fewer completions")
    picture("calibration", calibrated, "stated confidence", "share right (first drop of the value)")


# ------------------------------------------------------------------------------------------------------------------------------- main


def toy_solver(count: int) -> None:
    """The same on the real solver of the toy world; the truth is the first step that leaves less than half of the value."""
    toy = ToyWorld(slip=0.12, least=5, most=17)
    of, pilot = Toy(toy, count), Toy(dataclasses.replace(toy, largest=38), max(40, count // 4))
    states = rounds(pilot.solutions, make_scheme("exhaustive"), pilot.draw).states
    found = measure(states, "hard")
    fits = fit(states)
    print(f"\ntoy solver: {count} wrong answers of {np.mean([s.steps for s in of.solutions]):.1f} steps on average\n  pilot: {found.says}")
    curves = schemes_of(of, {"q0": fits.q0, "z0": fits.z0}, 100, few=True)
    table(curves, np.array(of.first_drop))


def main() -> None:
    """Run, print, and say it in JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a subset in under a minute")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=0, help="solutions a cell (0: 160, quick 80; half of it where errors are repaired)")
    parser.add_argument("--plots", type=Path, help="folder for the plots")
    args = parser.parse_args()
    steps = (4, 12, 20) if args.quick else (4, 8, 12, 16, 20)
    count = args.count or (80 if args.quick else 160)
    all_curves, truths, chains = {}, {}, {}
    for repair in ("none", "3 %") if args.quick else tuple(REPAIR):
        start = time.monotonic()
        print(f"\nrepair {repair}: {len(DIFFICULTY) * len(steps)} cells of {count} wrong solutions")
        of = world(args.seed, count if repair == "none" else count // 2, steps, repair)
        chains[repair] = fitted(args.seed, repair, args.quick)
        all_curves[repair] = schemes_of(of, chains[repair], 64 if repair == "none" else 160, args.quick or repair != "none")
        truths[repair], truths[repair + " drop"] = of.first_error, of.first_drop
        table(all_curves[repair], of.first_error, "exhaustive" if repair == "none" else "exhaustive, posterior's reading")
        print("  calibration of the posterior (stated/right): ", end="")
        print(" ".join(f"{s:.2f}/{r:.2f}" for s, r, _ in calibration(all_curves[repair]["posterior, to a level"], of.first_drop)))
        if repair == "none":
            print("completions saved at exhaustive 8/16 by number of steps")
            lengths = by_length(all_curves["none"], of, ("skew", "posterior, per completion"), steps)
            print("half right, half wrong")
            mix = mixed(all_curves["none"], of, world(args.seed + 3, count // 4, steps, "none", right=True))
        print(f"  ({time.monotonic() - start:.0f} s)", flush=True)
    print("\nsoft labels")
    for repair, chain in chains.items():
        soft_labels(args.seed, max(8, count // 10), steps, repair, chain)
    certified_level(args.seed, 1000 if args.quick else 20_000, steps)
    toy_solver(60 if args.quick else 300)
    if args.plots:
        plots(args.plots, all_curves, truths, lengths, steps)
    result: dict[str, Any] = {
        short: {
            f"saved_at_exh{n}": round(
                saved(all_curves["none"]["exhaustive"], n, all_curves["none"][name], truths["none"], "completions"), 2
            )
            for n in (8, 16)
        }
        for short, name in (("skew", "skew"), ("posterior", "posterior, per completion"))
    }
    at3 = all_curves["3 %"]
    repair3 = saved(at3["exhaustive, posterior's reading"], 8, at3["posterior, per completion"], truths["3 %"], "completions")
    print("\n" + json.dumps({**result, "mixed": round(mix, 2), "repair3": round(repair3, 2)}))


if __name__ == "__main__":
    main()
