"""Evidence: examples and their scores become numbers with intervals, plots, and the worst cases, as report.json and report.html.

Which numbers there are follows from the examples:

    several attributes per answer     for each: correlation with the ratings, and all of the following
    answers that differ in target     accuracy, calibration of score differences, the length baseline beside them, best-of-K
    segments with probabilities       step accuracy, calibration of scores
    answers of several segments       also first-error F1, PRMScore, where the least score lies, best-of-K by every aggregation

Accuracy weighs a judgement's comparisons 1 together and counts a tie of scores as wrong; it is given with a tie counted as half beside
it. Intervals are 95 % bootstraps over prompts. A calibrated number is cross-fitted: the temperature of one half of the prompts, by
hash, is applied to the other.

What every example adds to a figure lies in scores.parquet, so that two models' figures can be compared example by example
(`rayward models compare`).
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rayward import metrics, places
from rayward.errors import DataError
from rayward.places import Place, at, telling
from rayward.records import Example, Rejected, prompt_id
from rayward.storage import publish, sibling

Array = np.ndarray


@dataclass(frozen=True)
class Figure:
    """One number of a report: how much, how sure, and of how many."""

    name: str
    value: float
    n: int  # things it was taken over
    of: str  # what they are
    low: float = math.nan  # ends of its 95 % interval; NaN where none is computed
    high: float = math.nan


@dataclass(frozen=True)
class Report:
    """What was found; `numbers` is what report.json holds."""

    numbers: dict[str, Any]
    plots: dict[str, str]  # title -> SVG
    worst: list[dict[str, Any]]  # the most confident mistakes
    shares: dict[str, tuple[Array, Array]] = field(default_factory=dict)  # figure -> what each example adds to its total and its weight

    @property
    def figures(self) -> list[Figure]:
        """The few numbers that stand for the whole."""
        found: list[Figure] = []
        if order := self.numbers.get("order"):
            found += _order_figures(order)
        if segments := self.numbers.get("segments"):
            found += _segment_figures(segments)
        for name, said in (self.numbers.get("attributes") or {}).items():
            found += [Figure(f"{name}_{how}", said[how], said["ratings"], "ratings") for how in ("spearman", "rmse")]
            if "order" in said:
                found.append(_sure(f"{name}_accuracy", said["order"]["accuracy"], said["order"]["comparisons"], "comparisons"))
        if best := self.numbers.get("best_of"):
            found += [Figure(f"best_of_{what}", best[key], best["examples"], "examples") for what, key in BEST_OF]
        return [figure for figure in found if figure.value == figure.value]

    @property
    def headline(self) -> dict[str, float]:
        """The figures, flat: NAME, and NAME_low and NAME_high where there is an interval."""
        flat: dict[str, float] = {}
        for f in self.figures:
            flat |= {f.name: f.value, f"{f.name}_low": f.low, f"{f.name}_high": f.high}
        return {name: value for name, value in flat.items() if value == value}

    @property
    def counts(self) -> dict[str, int]:
        """How many prompts and examples stand behind the figures."""
        return {name: self.numbers[name] for name in ("prompts", "examples_in", "examples_scored")}


SHARE = (".total", ".weight")  # columns of scores.parquet: what a row adds to a figure, which is the sum of the one over that of the other
BEST_OF = (("picked", "picked"), ("mean", "mean_answer"))


def _sure(name: str, found: dict[str, float], n: int, of: str) -> Figure:
    return Figure(name, found["value"], n, of, found["low"], found["high"])


def _order_figures(order: dict[str, Any]) -> list[Figure]:
    n, of = order["comparisons"], "comparisons"
    plain = {**{name: order[name] for name in ("nll", "brier", "ece")}, "ece_calibrated": order["calibrated"]["ece"]}
    return [
        *(_sure(name, order[name], n, of) for name in ("accuracy", "length_baseline")),
        *(Figure(name, value, n, of) for name, value in {**plain, "temperature": order["temperature"]}.items()),
    ]


def _segment_figures(segments: dict[str, Any]) -> list[Figure]:
    n, of = segments["segments"], "segments"
    found = [
        _sure("segment_accuracy", segments["accuracy"], n, of),
        Figure("segment_ece", segments["ece"], n, of),
        Figure("segment_ece_calibrated", segments["calibrated"]["ece"], n, of),
    ]
    if first := segments.get("first_error"):
        answers = first["erroneous"] + first["clean"]
        found += [
            Figure("first_error_f1", first["f1"], answers, "answers", first["f1_low"], first["f1_high"]),
            Figure("prm_score", segments["prm_score"]["prm_score"], n, of),
            Figure("least_on_last", segments["least_on_last"]["share"], segments["least_on_last"]["answers"], "answers"),
        ]
    if best := segments.get("best_of"):
        found += [Figure(f"best_of_{how}", value, best["prompts"], "prompts") for how, value in best["picked"].items()]
    return found


def lines(report: Report) -> list[str]:
    """A report for a terminal: a line per figure with its 95 % interval, and what it was taken over.

    >>> numbers = {"name": "mine", "examples_scored": 8, "examples_in": 9, "prompts": 8, "left_out": {"too long": 1}}
    >>> best = {"picked": 0.75, "mean_answer": 0.5, "examples": 8}
    >>> print("\\n".join(lines(Report({**numbers, "best_of": best}, {}, []))))
    mine: 8 of 9 examples scored, of 8 prompts; left out: too long 1
                      value  95 % interval      n
    best_of_picked   0.7500                     8 examples
    best_of_mean     0.5000                     8 examples
    """
    said, figures = report.numbers, report.figures
    left = ", ".join(f"{reason} {n:,}" for reason, n in said["left_out"].items())
    scored = f"{said['examples_scored']:,} of {said['examples_in']:,} examples scored, of {said['prompts']:,} prompts"
    head = f"{said['name']}: {scored}{f'; left out: {left}' if left else ''}"
    if not figures:
        return [head, "nothing to judge: no two answers differ in their targets, and no segment has a chance as its target"]
    wide, long = max(len(f.name) for f in figures), max(3, *(len(f"{f.n:,}") for f in figures))
    rows = [f"{'':<{wide}}  {'value':>7}  {'95 % interval':<15}  {'n':>{long}}"]
    for f in figures:
        interval = f"{f.low:.4f}-{f.high:.4f}" if f.low == f.low else ""
        rows.append(f"{f.name:<{wide}}  {f.value:>7.4f}  {interval:<15}  {f.n:>{long},} {f.of}")
    return [head, *rows]


def evaluate(
    examples: Sequence[Example], score: Callable[[Sequence[Example]], list[tuple[float, ...] | Rejected]], name: str, model: str
) -> tuple[Report, pa.Table]:
    """Score examples and judge the scores; also one row per example with everything needed to compute the numbers again."""
    scores = score(examples)
    kept = [(e, s) for e, s in zip(examples, scores, strict=True) if not isinstance(s, Rejected)]
    left_out: dict[str, int] = {}
    for s in scores:
        if isinstance(s, Rejected):
            left_out[s.category] = left_out.get(s.category, 0) + 1
    named = any(len(e.attributes) > 1 for e in examples)
    report = (_judge_attributes if named else judge)([e for e, _ in kept], [s for _, s in kept])
    head = {"name": name, "model": model, "examples_in": len(examples), "examples_scored": len(kept), "left_out": left_out}
    rows = pa.table(
        {
            "id": [e.id for e, _ in kept],
            "prompt_id": [prompt_id(e.prompt) for e, _ in kept],
            "targets": pa.array([list(e.targets) for e, _ in kept], pa.list_(pa.float64())),
            "scores": pa.array([list(s) for _, s in kept], pa.list_(pa.float64())),
            "characters": pa.array([[len("".join(a)) for a in e.answers] for e, _ in kept], pa.list_(pa.int64())),
            "segments": pa.array([[len(a) for a in e.answers] for e, _ in kept], pa.list_(pa.int64())),  # of each answer
            "weight": [e.weight for e, _ in kept],
            **{f"{name}{SHARE[n]}": share[n] for name, share in report.shares.items() for n in range(2)},
        }
    )
    return Report({**head, **report.numbers}, report.plots, report.worst, report.shares), rows


def judge(examples: Sequence[Example], scores: metrics.Scores, ratings: bool = False) -> Report:
    """Everything that can be said of these scores; `ratings` are no chances, also where they lie between 0 and 1."""
    numbers: dict[str, Any] = {"prompts": len({e.prompt for e in examples})}
    plots: dict[str, str] = {}
    worst: list[dict[str, Any]] = []
    shares: dict[str, tuple[Array, Array]] = {}
    every = np.array([s for score in scores for s in score], float)
    if len(every):
        q = np.quantile(every, [0, 0.05, 0.5, 0.95, 1])
        numbers["score"] = {
            "mean": float(every.mean()),
            "std": float(every.std()),
            **dict(zip(("min", "q05", "median", "q95", "max"), map(float, q), strict=True)),
        }
    compared = metrics.comparisons(examples, scores)
    if len(compared.logit):
        prompts = [prompt_id(examples[n].prompt) for n in compared.example]
        numbers["order"] = _order(compared, prompts)
        shares |= _order_shares(compared, len(examples))
        plots |= _order_plots(examples, scores, compared, prompts)
        worst = _worst(examples, scores, compared)
    if best := metrics.best_of(examples, scores):
        numbers["best_of"] = best
        tau = metrics.kendall_tau(examples, scores)
        if tau == tau:
            numbers["kendall_tau"] = tau
    segmented = [] if ratings else [n for n, e in enumerate(examples) if _has_probabilities(e)]
    if segmented:
        part, part_scores = [examples[n] for n in segmented], [scores[n] for n in segmented]
        numbers["segments"] = _segments(part, part_scores)
        plots |= _segment_plots(part, part_scores)
        owner = np.repeat(segmented, [sum(n > 0 for n in e.counts) for e in part])
        total, weight = (np.bincount(owner, x, len(examples)) for x in _segments_right(*_known_segments(part, part_scores)[:2]))
        shares["segment_accuracy"] = (total, weight)
    return Report(numbers, plots, worst, shares)


def _judge_attributes(examples: Sequence[Example], scores: metrics.Scores) -> Report:
    """What can be said of every attribute by itself, of the answers that were rated on it."""
    numbers: dict[str, Any] = {"prompts": len({e.prompt for e in examples}), "attributes": {}}
    plots: dict[str, str] = {}
    worst: list[dict[str, Any]] = []
    shares: dict[str, tuple[Array, Array]] = {}
    for name in dict.fromkeys(name for e in examples for name in e.attributes):
        part: list[Example] = []
        part_scores: list[tuple[float, ...]] = []
        owner: list[int] = []
        for n, (example, score) in enumerate(zip(examples, scores, strict=True)):
            if (rated := _rated_on(example, name)) is not None:
                owner.append(n)
                part.append(rated[0])
                part_scores.append(tuple(score[k] for k in rated[1]))
        if part:
            said = judge(part, part_scores, ratings=True)
            flat = [np.array([v for values in every for v in values], float) for every in (part_scores, [e.targets for e in part])]
            numbers["attributes"][name] = {**metrics.rating_agreement(*flat), **said.numbers}
            plots |= {f"{name}: {title}": plot for title, plot in said.plots.items()}
            worst += said.worst
            if "accuracy" in said.shares:
                total, weight = (np.bincount(owner, x, len(examples)) for x in said.shares["accuracy"])
                shares[f"{name}_accuracy"] = (total, weight)
    return Report(numbers, plots, sorted(worst, key=lambda w: w["gap"])[:5], shares)


def _rated_on(example: Example, name: str) -> tuple[Example, list[int]] | None:
    """The answers that were rated on an attribute, as an example of that rating alone, and where its targets were; None if none was."""
    names = example.attributes
    at = [k for k, count in enumerate(example.counts) if count and names[k % len(names)] == name]
    if not at:
        return None
    answers = tuple(example.answers[k // len(names)] for k in at)
    targets, counts = tuple(example.targets[k] for k in at), tuple(example.counts[k] for k in at)
    return replace(example, answers=answers, targets=targets, counts=counts, attributes=()), at


def _has_probabilities(example: Example) -> bool:
    """Segments with chances as targets: the steps of a process, or outcomes."""
    alone = len(example.answers) == 1 or any(len(a) > 1 for a in example.answers) or example.id.startswith("outcomes@")
    return alone and all(0 <= t <= 1 for t in example.targets)


# ---------------------------------------------------------------------------------------------------------------- the order


def _order(compared: metrics.Comparisons, prompts: Sequence[str]) -> dict[str, Any]:
    logit, weight, longer = compared.logit, compared.weight, compared.longer
    ones = np.ones(len(logit))
    right = (logit > 0) * weight
    ties = int((logit == 0).sum())
    baseline = _with_interval(prompts, ((longer > 0) + 0.5 * (longer == 0)) * weight, weight)
    by_length = {}
    for name, sign in (("longer", 1), ("shorter", -1), ("equal", 0)):
        mask = longer == sign
        mean = metrics.Mean(float(right[mask].sum()), float(weight[mask].sum()))
        by_length[f"better_side_{name}"] = {"accuracy": mean.value if mask.any() else None, "comparisons": int(mask.sum())}
    return {
        "comparisons": len(logit),
        "accuracy": _with_interval(prompts, right, weight),
        "tie_policy": "a tie of scores is wrong",
        "score_ties": ties,
        "accuracy_ties_half": float((right + 0.5 * (logit == 0) * weight).sum() / weight.sum()),
        "nll": metrics.log_loss(logit, ones),
        "brier": metrics.brier(logit, ones),
        "ece": metrics.reliability(logit, ones).ece,
        "temperature": metrics.fit_temperature(logit, ones),
        "calibrated": _calibrated(logit, ones, prompts),
        **by_length,
        "length_baseline": {"rule": "the longer answer is better; equal lengths count half", **baseline},
    }


def _order_shares(compared: metrics.Comparisons, examples: int) -> dict[str, tuple[Array, Array]]:
    """What every example adds to the figures that are means over comparisons."""
    logit, ones = compared.logit, np.ones(len(compared.logit))
    each = {
        "accuracy": ((logit > 0) * compared.weight, compared.weight),
        "nll": (np.logaddexp(0.0, -logit), ones),
        "brier": ((metrics.sigmoid(logit) - 1) ** 2, ones),
    }
    return {
        name: (np.bincount(compared.example, total, examples), np.bincount(compared.example, weight, examples))
        for name, (total, weight) in each.items()
    }


def _with_interval(prompts: Sequence[str], total: Array, weight: Array) -> dict[str, float]:
    low, high = metrics.bootstrap(prompts, total, weight)
    return {"value": metrics.Mean(float(total.sum()), float(weight.sum())).value, "low": low, "high": high}


def _cross_fitted(logit: Array, target: Array, prompts: Sequence[str]) -> Array:
    """Logits divided by the temperature that the other half of the prompts asks for."""
    half = np.array([hashlib.blake2b(b"half" + p.encode(), digest_size=1).digest()[0] & 1 for p in prompts])
    scaled = np.array(logit, float)
    for side in (0, 1):
        scaled[half == side] /= metrics.fit_temperature(logit[half != side], target[half != side])
    return scaled


def _calibrated(logit: Array, target: Array, prompts: Sequence[str]) -> dict[str, float]:
    scaled = _cross_fitted(logit, target, prompts)
    return {
        "nll": metrics.log_loss(scaled, target),
        "brier": metrics.brier(scaled, target),
        "ece": metrics.reliability(scaled, target).ece,
    }


def _worst(examples: Sequence[Example], scores: metrics.Scores, compared: metrics.Comparisons, most: int = 5) -> list[dict[str, Any]]:
    """The most confident mistakes, one per example."""
    rows: list[dict[str, Any]] = []
    seen: set[int] = set()
    for n in np.argsort(compared.logit):
        at = int(compared.example[n])
        if compared.logit[n] >= 0 or len(rows) == most:
            break
        if at in seen:
            continue
        seen.add(at)
        example, score = examples[at], scores[at]
        order = sorted(range(len(score)), key=lambda k: -example.targets[k])
        answers = [{"target": example.targets[k], "score": score[k], "text": "".join(example.answers[k])[:2000]} for k in order]
        rows.append({"id": example.id, "prompt": [list(m) for m in example.prompt], "answers": answers, "gap": float(compared.logit[n])})
    return rows


# -------------------------------------------------------------------------------------------------------------- the segments


def _known_segments(examples: Sequence[Example], scores: metrics.Scores) -> tuple[Array, Array, list[str]]:
    """Logit, target and prompt of every segment whose target is known."""
    logit = np.array([s for e, score in zip(examples, scores, strict=True) for s, n in zip(score, e.counts, strict=True) if n])
    target = np.array([t for e in examples for t, n in zip(e.targets, e.counts, strict=True) if n])
    return logit, target, [prompt_id(e.prompt) for e in examples for n in e.counts if n]


def _segments(examples: Sequence[Example], scores: metrics.Scores) -> dict[str, Any]:
    logit, target, prompts = _known_segments(examples, scores)
    right, decided = _segments_right(logit, target)
    found: dict[str, Any] = {
        "segments": len(logit),
        "accuracy": _with_interval(prompts, right.astype(float), decided.astype(float)),
        "balanced_accuracy": float(np.mean([right[m].mean() for m in (target > 0.5, target < 0.5) if m.any()] or [np.nan])),
        "majority_baseline": float(max((target > 0.5).sum(), (target < 0.5).sum()) / max(1, decided.sum())),
        "nll": metrics.log_loss(logit, target),
        "brier": metrics.brier(logit, target),
        "ece": metrics.reliability(logit, target).ece,
        "temperature": metrics.fit_temperature(logit, target),
        "calibrated": _calibrated(logit, target, prompts),
    }
    if any(len(a) > 1 for e in examples for a in e.answers):
        found |= _processes(_answers(examples, scores))
        found["prm_score"] = {
            "rule": "mean F1 of steps with target above and below one half, by sigma(score) > 0.5; steps of all answers together",
            **metrics.prm_score(target[decided] > 0.5, logit[decided] > 0),
            "always_right_baseline": metrics.prm_score(target[decided] > 0.5, np.ones(int(decided.sum()), bool))["prm_score"],
        }
    return found


@dataclass(frozen=True)
class _Answer:
    """An answer in steps, as it was labelled and scored."""

    prompt: str  # prompt_id
    targets: tuple[float, ...]  # of its steps; where nobody said: right
    scores: tuple[float, ...]
    outcome: float | None  # target of the last step: P(the final answer is right); None where nobody said


def _segments_right(logit: Array, target: Array) -> tuple[Array, Array]:
    """Which segments are judged right, and which can be: those whose target is not one half."""
    decided = target != 0.5
    return ((logit > 0) == (target > 0.5)) & decided, decided


def _answers(examples: Sequence[Example], scores: metrics.Scores) -> list[_Answer]:
    made = []
    for example, score in zip(examples, scores, strict=True):
        known, name, at = _known(example), prompt_id(example.prompt), 0
        for answer in example.answers:
            end = at + len(answer)
            outcome = example.targets[end - 1] if example.counts[end - 1] else None
            made.append(_Answer(name, tuple(known[at:end]), tuple(score[at:end]), outcome))
            at = end
    return made


def _processes(answers: Sequence[_Answer]) -> dict[str, Any]:
    """First errors, where the least score lies, and best-of-K."""
    truth = [metrics.first_below(a.targets) for a in answers]
    guess = [metrics.first_below([float(p) for p in metrics.sigmoid(np.array(a.scores))]) for a in answers]
    chances = [1 / len(a.targets) for a, t in zip(answers, truth, strict=True) if t >= 0]
    found: dict[str, Any] = {
        "first_error": {
            "rule": "the first step with sigma(score) < 0.5, against the first with target < 0.5",
            **metrics.first_error_f1(truth, guess),
            **dict(zip(("f1_low", "f1_high"), _f1_interval(truth, guess, [a.prompt for a in answers]), strict=True)),
            "always_clean_baseline_f1": 0.0,
            "random_step_baseline": float(np.mean(chances)) if chances else float("nan"),  # of an answer that has a wrong step
            "baselines": metrics.first_error_baselines(truth, [len(a.targets) for a in answers]),
        },
        "least_on_last": metrics.least_on_last([a.scores for a in answers]),
    }
    graded = [(a.prompt, a.scores, a.outcome) for a in answers if a.outcome is not None]
    best = metrics.best_of_steps([p for p, _, _ in graded], [s for _, s, _ in graded], [o for _, _, o in graded])
    return {**found, "best_of": best} if best else found


def _known(example: Example) -> list[float]:
    """Targets, where nobody said: right."""
    return [target if count else 1.0 for target, count in zip(example.targets, example.counts, strict=True)]


def _f1_interval(truth: Sequence[int], guess: Sequence[int], owner: Sequence[str], draws: int = 1000) -> tuple[float, float]:
    names = {o: n for n, o in enumerate(dict.fromkeys(owner))}
    at = np.array([names[o] for o in owner])
    hit = np.array([t == g for t, g in zip(truth, guess, strict=True)], float)
    wrong = np.array([t >= 0 for t in truth], float)
    sums = [np.bincount(at, x, len(names)) for x in (hit * wrong, wrong, hit * (1 - wrong), 1 - wrong)]
    rng, values = np.random.default_rng(0), []
    for _ in range(draws):
        times = np.bincount(rng.integers(0, len(names), len(names)), minlength=len(names))
        error_hit, errors, clean_hit, cleans = ((times * s).sum() for s in sums)
        if errors and cleans:
            error, clean = error_hit / errors, clean_hit / cleans
            values.append(2 * error * clean / (error + clean) if error + clean else 0.0)
    return (float(np.quantile(values, 0.025)), float(np.quantile(values, 0.975))) if values else (float("nan"), float("nan"))


# ------------------------------------------------------------------------------------------------------------------- plots

BLUE, ORANGE, GREY = "#2563eb", "#ea580c", "#9ca3af"


def _svg(draw: Callable[[Any], None]) -> str:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    with matplotlib.rc_context(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": "rayward",
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
        }
    ):
        figure = Figure(figsize=(4.2, 3.0), layout="constrained")
        draw(figure.subplots())
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()[out.getvalue().index("<svg") :]


def _reliability_plot(logit: Array, target: Array, prompts: Sequence[str]) -> str:
    def draw(ax: Any) -> None:
        ax.plot([0.5, 1], [0.5, 1], color=GREY, lw=1, ls="--")
        for values, color, label in (
            (logit, ORANGE, "as scored"),
            (_cross_fitted(logit, target, prompts), BLUE, "with temperature"),
        ):
            r = metrics.reliability(values, target)
            ax.plot(r.confidence, r.accuracy, "o-", ms=4, lw=1.2, color=color, label=f"{label}: ECE {r.ece:.3f}")
        ax.set(xlabel="confidence", ylabel="share right", xlim=(0.49, 1.01), ylim=(0, 1.02))
        ax.legend(frameon=False, loc="lower right")

    return _svg(draw)


def _order_plots(
    examples: Sequence[Example], scores: metrics.Scores, compared: metrics.Comparisons, prompts: Sequence[str]
) -> dict[str, str]:
    top: list[float] = []
    rest: list[float] = []
    for example, score in zip(examples, scores, strict=True):
        if len(score) == len(example.answers):
            for t, s in zip(example.targets, score, strict=True):
                (top if t == max(example.targets) else rest).append(s)

    def distribution(ax: Any) -> None:
        bins = np.histogram_bin_edges([*top, *rest], bins=40)
        ax.hist(rest, bins, color=ORANGE, alpha=0.6, label="other answers")
        ax.hist(top, bins, color=BLUE, alpha=0.6, label="best answers")
        ax.set(xlabel="score", ylabel="answers")
        ax.legend(frameon=False)

    def lengths(ax: Any) -> None:
        groups = [("better side\nlonger", 1), ("better side\nshorter", -1), ("equal\nlength", 0)]
        shares, counts = [], []
        for _, sign in groups:
            mask = compared.longer == sign
            counts.append(int(mask.sum()))
            shares.append(float(((compared.logit > 0) * compared.weight)[mask].sum() / compared.weight[mask].sum()) if mask.any() else 0.0)
        bars = ax.bar([name for name, _ in groups], shares, color=[BLUE, ORANGE, GREY], width=0.6)
        ax.bar_label(bars, [f"{s:.2f}\nn={n:,}" if n else "none" for s, n in zip(shares, counts, strict=True)], padding=2)
        ax.axhline(0.5, color=GREY, lw=1, ls="--")
        ax.set(ylabel="accuracy", ylim=(0, 1.25))

    return {
        "Calibration of preferences": _reliability_plot(compared.logit, np.ones(len(compared.logit)), prompts),
        "Scores": _svg(distribution),
        "Accuracy by length": _svg(lengths),
    }


def _segment_plots(examples: Sequence[Example], scores: metrics.Scores) -> dict[str, str]:
    logit, target, prompts = _known_segments(examples, scores)

    def distribution(ax: Any) -> None:
        bins = np.linspace(0, 1, 31)
        p = metrics.sigmoid(logit)
        ax.hist(p[target < 0.5], bins, color=ORANGE, alpha=0.6, label="target below one half")
        ax.hist(p[target >= 0.5], bins, color=BLUE, alpha=0.6, label="above")
        ax.set(xlabel="sigma(score)", ylabel="segments")
        ax.legend(frameon=False)

    return {"Calibration of segments": _reliability_plot(logit, target, prompts), "Segment scores": _svg(distribution)}


# ------------------------------------------------------------------------------------------------------------------- files


FILES = ("report.json", "report.html", "scores.parquet")  # of a report


def write_report(output: str, report: Report, rows: pa.Table) -> Place:
    """OUTPUT/report.json, report.html and scores.parquet, whole or not at all; a report that stood there is replaced."""
    folder = check_output(output)
    if not isinstance(folder, Path):
        with tempfile.TemporaryDirectory(prefix="rayward-report-") as here:
            return places.send(write_report(f"{here}/report", report, rows), folder)
    stage = sibling(folder, "partial")
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir(parents=True)
    try:
        (stage / "report.json").write_text(json.dumps(_no_nan(report.numbers), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        (stage / "report.html").write_text(to_html(report), encoding="utf-8")
        pq.write_table(rows, stage / "scores.parquet")
        publish(stage, folder)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    return folder


def check_output(output: str) -> Place:
    """The folder of a report: one that is not there yet, is empty, or holds a report that may be replaced; else a DataError."""
    folder = at(output)
    sibling(folder, "partial")
    if not isinstance(folder, Path):
        with telling(folder):
            held = places.listing(folder, deep=True)
        if not set(held) <= set(FILES):
            raise DataError(f"{folder} already holds something else", "choose another --output")
        return folder
    taken = folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not (folder / "report.json").is_file())
    if taken:
        raise DataError(f"{folder} already holds something else", "choose another --output")
    return folder


def _no_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _no_nan(v) for k, v in value.items()}
    return None if isinstance(value, float) and value != value else value


def to_html(report: Report) -> str:
    """The report as one page that needs nothing else."""
    from jinja2 import Environment

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((Path(__file__).parent / "report.html.jinja").read_text(encoding="utf-8"))
    return template.render(n=report.numbers, plots=report.plots, worst=report.worst)
