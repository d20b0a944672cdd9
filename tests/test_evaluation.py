"""Reports: every number is computed a second time from scores.parquet by other means; ties, intervals, calibration; the page; edges."""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pyarrow.parquet as pq
import pytest

from driving import Toy, done, here
from driving import toy as make_toy
from rayward import evaluation, metrics, registry, suites
from rayward.evaluation import Report, evaluate, write_report
from rayward.records import Example, Message, Rejected, examples_of
from rayward.scoring import Scorer
from rayward.storage import open_dataset

Scored = list[tuple[Example, tuple[float, ...]]]


def example(
    n: int, targets: Sequence[float], answers: Sequence[Sequence[str]] = (), prompt: int | None = None, weight: float = 1.0
) -> Example:
    """Example `n` with these targets; by default of as many answers, each of one segment."""
    cut = tuple(map(tuple, answers)) or tuple((f"answer {k}",) for k in range(len(targets)))
    question = (Message("user", f"question {n if prompt is None else prompt}"),)
    return Example(id=f"e{n}", prompt=question, answers=cut, targets=tuple(targets), counts=(1,) * len(targets), weight=weight)


def scorer(scored: Scored) -> Callable[[Sequence[Example]], list[tuple[float, ...] | Rejected]]:
    """Gives every example the scores that were settled beforehand."""
    table = {e.id: s for e, s in scored}
    return lambda examples: [table[e.id] for e in examples]


def report_of(scored: Scored, folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What lies on disk after an evaluation: report.json and the rows of scores.parquet."""
    write_report(str(folder), *evaluate([e for e, _ in scored], scorer(scored), "a test", "a model"))

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    numbers = json.loads((folder / "report.json").read_text(encoding="utf-8"), parse_constant=refuse)
    return numbers, pq.read_table(folder / "scores.parquet").to_pylist()


def rankings(seed: int, count: int = 120) -> Scored:
    """Two to five answers of random lengths, graded targets, weights and scores, with ties everywhere."""
    rng = np.random.default_rng(seed)
    made = []
    for n in range(count):
        k = int(rng.integers(2, 6))
        targets = rng.choice([0.0, 0.5, 1.0, 3.0], k).tolist()
        answers = [("x" * int(rng.integers(1, 6)),) for _ in range(k)]
        scores = np.round(1.5 * np.array(targets) + rng.normal(0, 1.5, k), 1)
        prompt = n // 2  # every prompt has two examples
        made.append((example(n, targets, answers, prompt, float(rng.uniform(0.2, 2))), tuple(scores.tolist())))
    return made


def processes(seed: int, count: int = 80, answers: int = 1) -> Scored:
    """Answers of one to six steps with soft targets, some of exactly one half."""
    rng = np.random.default_rng(seed)
    made = []
    for n in range(count):
        cut = [[f"step {i}\n" for i in range(int(rng.integers(1, 7)))] for _ in range(answers)]
        targets = [float(rng.choice([0.1, 0.5, 0.7, 0.9, 1.0])) for answer in cut for _ in answer]
        scores = tuple(float(4 * (t - 0.45) + rng.normal(0, 1.2)) for t in targets)
        made.append((example(n, targets, cut), scores))
    return made


# ------------------------------------------------------------------------------------------------- the numbers, once more


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


def ece(logits: Sequence[float], targets: Sequence[float]) -> float:
    """Ten bins of confidence in the predicted side; mean distance of confidence and share right, by count."""
    bins: dict[int, list[tuple[float, float]]] = {}
    for logit, target in zip(logits, targets, strict=True):
        p = sigmoid(logit)
        confidence, right = (p, target) if p >= 0.5 else (1 - p, 1 - target)
        bins.setdefault(min(int((confidence - 0.5) / 0.05), 9), []).append((confidence, right))
    return sum(abs(sum(c - r for c, r in found)) for found in bins.values()) / len(logits)


def nll(logits: Sequence[float], targets: Sequence[float]) -> float:
    return mean(-t * math.log(sigmoid(x)) - (1 - t) * math.log(1 - sigmoid(x)) for x, t in zip(logits, targets, strict=True))


def brier(logits: Sequence[float], targets: Sequence[float]) -> float:
    return mean((sigmoid(x) - t) ** 2 for x, t in zip(logits, targets, strict=True))


def comparisons(rows: list[dict[str, Any]]) -> list[tuple[float, int, float]]:
    """(score difference, length difference, weight) of every two answers of a row of which one is better."""
    found = []
    for row in rows:
        answers = list(zip(row["targets"], row["scores"], row["characters"], strict=True))
        better = [(a, b) for a, b in itertools.permutations(answers, 2) if a[0] > b[0]]
        found += [(a[1] - b[1], a[2] - b[2], row["weight"] / len(better)) for a, b in better]
    return found


@pytest.mark.parametrize("seed", range(3))
def test_order_numbers_can_be_computed_again(tmp_path: Path, seed: int) -> None:
    numbers, rows = report_of(rankings(seed), tmp_path / "report")
    order, compared = numbers["order"], comparisons(rows)
    gaps, ones, total = [gap for gap, _, _ in compared], [1.0] * len(compared), sum(w for _, _, w in compared)
    assert order["comparisons"] == len(compared)
    assert order["score_ties"] == gaps.count(0) > 0
    assert order["accuracy"]["value"] == pytest.approx(sum(w for gap, _, w in compared if gap > 0) / total)
    halves = sum(w * (1 if gap > 0 else 0.5) for gap, _, w in compared if gap >= 0) / total
    assert order["accuracy_ties_half"] == pytest.approx(halves)
    assert order["nll"] == pytest.approx(nll(gaps, ones))
    assert order["brier"] == pytest.approx(brier(gaps, ones))
    assert order["ece"] == pytest.approx(ece(gaps, ones))
    longer = sum(w * (1 if length > 0 else 0.5) for _, length, w in compared if length >= 0) / total
    assert order["length_baseline"]["value"] == pytest.approx(longer)
    for name, sign in (("longer", 1), ("shorter", -1), ("equal", 0)):
        side = [(gap, w) for gap, length, w in compared if (length > 0) - (length < 0) == sign]
        assert order[f"better_side_{name}"]["comparisons"] == len(side)
        accuracy = sum(w for gap, w in side if gap > 0) / sum(w for _, w in side)
        assert order[f"better_side_{name}"]["accuracy"] == pytest.approx(accuracy)


def test_best_of_k_and_kendalls_tau_can_be_computed_again(tmp_path: Path) -> None:
    numbers, rows = report_of(rankings(5), tmp_path / "report")
    picked, taus = [], []
    for row in rows:
        best = [t for t, s in zip(row["targets"], row["scores"], strict=True) if s == max(row["scores"])]
        picked.append(mean(best))
        answers = list(zip(row["targets"], row["scores"], strict=True))
        ordered = [(a[1] > b[1]) - (a[1] < b[1]) for a, b in itertools.permutations(answers, 2) if a[0] > b[0]]
        if len(answers) > 2 and ordered:
            taus.append(mean(ordered))
    assert numbers["best_of"]["picked"] == pytest.approx(mean(picked))
    assert numbers["best_of"]["mean_answer"] == pytest.approx(mean(mean(row["targets"]) for row in rows))
    assert numbers["best_of"]["best_answer"] == pytest.approx(mean(max(row["targets"]) for row in rows))
    assert numbers["kendall_tau"] == pytest.approx(mean(taus))


def first_wrong(values: Sequence[float]) -> int:
    return min((n for n, value in enumerate(values) if value < 0.5), default=-1)


def harmonic(truth: Sequence[int], guess: Sequence[int]) -> float:
    """ProcessBench: exact hits among answers with an error, and among those without, harmonic mean."""
    error = mean(t == g for t, g in zip(truth, guess, strict=True) if t >= 0)
    clean = mean(t == g for t, g in zip(truth, guess, strict=True) if t < 0)
    return 2 / (1 / error + 1 / clean) if error and clean else 0.0


@pytest.mark.parametrize("seed", range(3))
def test_step_numbers_can_be_computed_again(tmp_path: Path, seed: int) -> None:
    numbers, rows = report_of(processes(seed), tmp_path / "report")
    segments = numbers["segments"]
    logits = [s for row in rows for s in row["scores"]]
    targets = [t for row in rows for t in row["targets"]]
    decided = [(x > 0) == (t > 0.5) for x, t in zip(logits, targets, strict=True) if t != 0.5]
    assert segments["segments"] == len(logits)
    assert segments["accuracy"]["value"] == pytest.approx(mean(decided))
    assert segments["nll"] == pytest.approx(nll(logits, targets))
    assert segments["brier"] == pytest.approx(brier(logits, targets))
    assert segments["ece"] == pytest.approx(ece(logits, targets))
    above = mean(t > 0.5 for t in targets if t != 0.5)
    assert segments["majority_baseline"] == pytest.approx(max(above, 1 - above))
    first = segments["first_error"]
    truth = [first_wrong(row["targets"]) for row in rows]
    guess = [first_wrong([sigmoid(s) for s in row["scores"]]) for row in rows]
    assert first["f1"] == pytest.approx(harmonic(truth, guess))
    assert 0 < first["f1_low"] <= first["f1"] <= first["f1_high"] < 1
    assert (first["erroneous"], first["clean"]) == (sum(t >= 0 for t in truth), truth.count(-1))
    drawn = [mean(n == t for n in range(len(row["targets"]))) for row, t in zip(rows, truth, strict=True) if t >= 0]
    assert first["random_step_baseline"] == pytest.approx(mean(drawn))


def test_step_numbers_of_several_answers_can_be_computed_again(tmp_path: Path) -> None:
    scored = processes(7, answers=3)
    numbers, rows = report_of(scored, tmp_path / "report")
    truth, guess = [], []
    for row in rows:
        ends = np.cumsum(row["segments"])[:-1]  # where one answer's targets end and the next one's begin
        truth += [first_wrong(part) for part in np.split(row["targets"], ends)]
        guess += [first_wrong([sigmoid(s) for s in part]) for part in np.split(row["scores"], ends)]
    assert len(truth) == 3 * len(scored)
    assert numbers["segments"]["first_error"]["f1"] == pytest.approx(harmonic(truth, guess))


def test_a_perfect_and_a_blind_model_get_the_first_error_they_deserve() -> None:
    steps = list(suites.toy_steps(problems=60))
    perfect = evaluation.judge(steps, [tuple(20 * (t - 0.5) for t in e.targets) for e in steps]).numbers["segments"]["first_error"]
    blind = evaluation.judge(steps, [(1.0,) * len(e.targets) for e in steps]).numbers["segments"]["first_error"]
    assert perfect["f1"] == 1.0
    assert (blind["f1"], blind["correct_accuracy"]) == (blind["always_clean_baseline_f1"], 1.0)


# ------------------------------------------------------------------------------------------------- ties, intervals, calibration


def test_a_tie_of_scores_is_wrong_and_half_beside_it(tmp_path: Path) -> None:
    scored = [(example(n, (1.0, 0.0)), ((2.0, 1.0), (1.0, 2.0), (1.0, 1.0), (0.0, 0.0))[n]) for n in range(4)]
    order = report_of(scored, tmp_path / "report")[0]["order"]
    assert (order["accuracy"]["value"], order["accuracy_ties_half"], order["score_ties"]) == (0.25, 0.5, 2)
    assert order["tie_policy"] == "a tie of scores is wrong"


def test_equal_targets_are_no_comparison_and_a_judgement_weighs_once(tmp_path: Path) -> None:
    one_pair = (example(0, (1.0, 0.0)), (1.0, 0.0))  # right
    ranking = (example(1, (1.0, 1.0, 0.0, 0.0, 0.0)), (0.0, 0.0, 1.0, 1.0, 1.0))  # six comparisons, all wrong
    order = report_of([one_pair, ranking], tmp_path / "report")[0]["order"]
    assert (order["comparisons"], order["accuracy"]["value"]) == (7, pytest.approx(0.5))


@pytest.mark.parametrize("seed", range(5))
def test_intervals_hold_their_value(seed: int) -> None:
    for scored, part in ((rankings(seed, 30), "order"), (processes(seed, 30), "segments")):
        numbers = evaluation.judge([e for e, _ in scored], [s for _, s in scored]).numbers[part]
        for name in ("accuracy", "length_baseline"):
            if name in numbers:
                assert 0 <= numbers[name]["low"] < numbers[name]["value"] < numbers[name]["high"] <= 1


def test_an_interval_is_as_wide_as_its_prompts_allow() -> None:
    rng = np.random.default_rng(0)
    right = rng.random(400) < 0.7

    def accuracy(copies: int) -> dict[str, float]:
        made = [(example(copies * n + c, (1.0, 0.0), prompt=n), float(r) - 0.5) for n, r in enumerate(right) for c in range(copies)]
        found: dict[str, float] = evaluation.judge([e for e, _ in made], [(s, 0.0) for _, s in made]).numbers["order"]["accuracy"]
        return found

    once = accuracy(1)
    normal = 2 * 1.96 * math.sqrt(once["value"] * (1 - once["value"]) / 400)
    assert once["high"] - once["low"] == pytest.approx(normal, rel=0.15)
    assert accuracy(5) == pytest.approx(once)  # five times the same prompt is no more evidence than once


def halves(scaled: np.ndarray, logit: np.ndarray) -> list[np.ndarray]:
    """Which rows share a temperature."""
    temperatures = np.round(logit / scaled, 9)
    return [temperatures == t for t in np.unique(temperatures)]


def test_calibration_never_sees_the_half_it_is_judged_on() -> None:
    rng = np.random.default_rng(3)
    logit = 4 * rng.normal(0, 1, 400)
    target = (rng.random(400) < metrics.sigmoid(logit / 3)).astype(float)
    prompts = [f"prompt {n // 4}" for n in range(400)]
    before = evaluation._cross_fitted(logit, target, prompts)
    first, second = halves(before, logit)
    assert 100 < first.sum() < 300
    for prompt in set(prompts):
        assert len({bool(first[n]) for n in range(400) if prompts[n] == prompt}) == 1  # a prompt is never on both sides
    for mine, other in ((first, second), (second, first)):
        after = evaluation._cross_fitted(logit, np.where(mine, 1 - target, target), prompts)
        assert after[mine] == pytest.approx(before[mine])  # my labels do not change my temperature
        assert (np.abs(after[other] - before[other]) > 1e-6).all()  # but the other half's


def test_the_temperature_mends_overconfidence(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    gaps = 5 * rng.normal(0, 1, 800)  # five times too sure
    scored = [(example(n, (1.0, 0.0) if rng.random() < sigmoid(g / 5) else (0.0, 1.0)), (float(g), 0.0)) for n, g in enumerate(gaps)]
    numbers, rows = report_of(scored, tmp_path / "report")
    order, compared = numbers["order"], [gap for gap, _, _ in comparisons(rows)]
    ones = [1.0] * len(compared)
    best = min(np.geomspace(1, 20, 400), key=lambda t: nll([gap / t for gap in compared], ones))
    assert order["temperature"] == pytest.approx(best, rel=0.01)
    assert order["calibrated"]["ece"] < order["ece"] / 2
    assert order["calibrated"]["nll"] < order["nll"]
    assert order["calibrated"]["nll"] >= nll([gap / best for gap in compared], ones)  # honest: not the fit on the same rows


# ------------------------------------------------------------------------------------------------------------------- edges


@pytest.mark.filterwarnings("error::RuntimeWarning")  # nobody wants to read that numpy met an empty slice
@pytest.mark.parametrize(
    "scored",
    [
        [],
        [(example(0, (1.0, 0.0)), (2.0, 1.0))],
        [(example(0, (1.0,)), (2.0,))],
        [(example(n, (1.0, 1.0)), (2.0, 1.0)) for n in range(3)],
        [(example(n, (1.0, 0.0)), (0.5, 0.5)) for n in range(3)],
        [(example(n, (1.0, 0.0)), (1e4, -1e4)) for n in range(3)],
        [(example(0, (0.9, 0.8), [("a", "b")]), (1.0, 2.0))],
        [(example(n, (0.5, 0.5), [("a", "b")]), (1.0, 2.0)) for n in range(3)],
        [(example(n, (0.1,), [("a",)]), (1.0,)) for n in range(3)],
    ],
    ids=["none", "one pair", "one answer", "equal targets", "equal scores", "huge scores", "clean steps", "undecided", "one segment"],
)
def test_a_report_can_be_made_of_anything(tmp_path: Path, scored: Scored) -> None:
    numbers, rows = report_of(scored, tmp_path / "report")
    assert (numbers["examples_in"], numbers["examples_scored"], len(rows)) == (len(scored),) * 3
    assert "a test" in (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert ("order" in numbers) == any(len(set(e.targets)) > 1 and len(e.answers) > 1 for e, _ in scored)


def test_what_cannot_be_scored_is_counted_with_its_reason(tmp_path: Path) -> None:
    scored = rankings(0, 10)
    reasons = {0: "too long: 5,210 > 4,096 tokens", 3: "too long: 9,999 > 4,096 tokens", 7: "no template: it has none"}
    table: list[tuple[float, ...] | Rejected] = [
        Rejected(source="examples", row=e.id, reason=reasons[n]) if n in reasons else s for n, (e, s) in enumerate(scored)
    ]
    report, rows = evaluate([e for e, _ in scored], lambda _: table, "n", "m")
    assert report.numbers["left_out"] == {"too long": 2, "no template": 1}
    assert (report.numbers["examples_in"], report.numbers["examples_scored"], rows.num_rows) == (10, 7, 7)
    assert rows["id"].to_pylist() == [e.id for n, (e, _) in enumerate(scored) if n not in reasons]
    rest = [(e, s) for n, (e, s) in enumerate(scored) if n not in reasons]
    assert report.numbers["order"] == report_of(rest, tmp_path / "rest")[0]["order"]
    assert "left out: too long 2, no template 1" in evaluation.to_html(report)


def test_the_worst_cases_are_the_most_confident_mistakes() -> None:
    scored = [(example(n, (0.0, 1.0)), (float(n), 3.5)) for n in range(12)] + [(example(12, (0.0, 0.0, 1.0)), (9.2, 9.1, 3.5))]
    report = evaluation.judge([e for e, _ in scored], [s for _, s in scored])
    assert [w["id"] for w in report.worst] == ["e11", "e10", "e12", "e9", "e8"]
    assert report.worst[0]["gap"] == 3.5 - 11
    assert [a["target"] for a in report.worst[0]["answers"]] == [1.0, 0.0]  # the better answer first


# ---------------------------------------------------------------------------------------------------------------- the page


class Page(HTMLParser):
    """What a browser would do with a page: the elements it makes, and what it would fetch or run."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: set[str] = set()
        self.fetched: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.add(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "action", "data", "poster", "srcset") and not (value or "").startswith("#"):
                self.fetched.append(f"{tag} {name}={value}")
            if name.startswith("on"):
                self.fetched.append(f"{tag} {name}={value}")

    def handle_data(self, data: str) -> None:
        self.text += data


NASTY = "<script>alert('x')</script><img src=x onerror=alert(1)>&amp; \"quoted\" </pre>"


@pytest.mark.parametrize("made", [rankings(0, 40), processes(0, 40)], ids=["order", "steps"])
def test_the_page_needs_nothing_else(tmp_path: Path, made: Scored) -> None:
    report_of(made, tmp_path / "report")
    text = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.fetched == []
    assert not page.elements & {"script", "link", "iframe", "object", "embed", "img", "base"}
    assert not re.search(r"@import|url\(\s*['\"]?\w+:", text)
    assert {"svg", "table", "style"} <= page.elements


def test_the_page_shows_texts_and_runs_none(tmp_path: Path) -> None:
    bad = Example(id=NASTY, prompt=(Message("user", NASTY),), answers=((NASTY + "a",), (NASTY + "b",)), targets=(1.0, 0.0), counts=(1, 1))
    report, rows = evaluate([bad], lambda _: [(0.0, 5.0)], NASTY, NASTY)
    page = Page((write_report(str(tmp_path / "report"), report, rows) / "report.html").read_text(encoding="utf-8"))
    assert not page.elements & {"script", "img"}
    assert page.fetched == []
    assert page.text.count(NASTY) >= 6  # name twice, model, id, prompt, both answers


def test_a_report_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    scored = rankings(0, 10)
    report, rows = evaluate([e for e, _ in scored], scorer(scored), "first", "m")
    broken = Report({**report.numbers, "cannot be JSON": object()}, report.plots, report.worst)
    with pytest.raises(TypeError):
        write_report(str(tmp_path / "report"), broken, rows)
    assert list(tmp_path.iterdir()) == []
    write_report(str(tmp_path / "report"), report, rows)
    with pytest.raises(TypeError):
        write_report(str(tmp_path / "report"), broken, rows)
    assert [p.name for p in tmp_path.iterdir()] == ["report"]
    assert sorted(p.name for p in (tmp_path / "report").iterdir()) == ["report.html", "report.json", "scores.parquet"]
    assert json.loads((tmp_path / "report" / "report.json").read_text())["name"] == "first"


def test_the_same_scores_make_the_same_report(tmp_path: Path) -> None:
    for name in ("one", "two"):
        report_of(rankings(4, 30), tmp_path / name)
    for file in ("report.json", "report.html", "scores.parquet"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


# --------------------------------------------------------------------------------------------------------------- a real model


# ------------------------------------------------------------------------------------------------------------ the terminal


@pytest.mark.parametrize("made", [rankings(0, 40), processes(0, 40), processes(1, 40, answers=2)], ids=["order", "steps", "best of steps"])
def test_every_figure_is_said_with_its_interval_and_what_it_was_taken_over(made: Scored) -> None:
    report, _ = evaluate([e for e, _ in made], scorer(made), "a test", "a model")
    head, columns, *rows = evaluation.lines(report)
    assert head == f"a test: 40 of 40 examples scored, of {report.numbers['prompts']} prompts"
    assert [row.split()[0] for row in rows] == [f.name for f in report.figures]
    sure = {f.name: f for f in report.figures if f.low == f.low}
    assert sure
    for row, figure in zip(rows, report.figures, strict=True):
        at = columns.index("95 % interval")
        assert row[at : at + 15].strip() == (f"{figure.low:.4f}-{figure.high:.4f}" if figure.name in sure else "")
        assert row.split()[1] == f"{figure.value:.4f}"
        assert row.endswith(f" {figure.n:,} {figure.of}")
        assert len(row) < 80
    for name, figure in sure.items():
        assert (report.headline[f"{name}_low"], report.headline[f"{name}_high"]) == (figure.low, figure.high)


def test_a_report_of_nothing_says_so() -> None:
    made = [(example(0, (3.0,)), (1.0,))]
    [head, why] = evaluation.lines(evaluate([made[0][0]], scorer(made), "a test", "a model")[0])
    assert "1 of 1 examples scored" in head
    assert "no two answers differ" in why


@pytest.mark.parametrize("made", [rankings(0), processes(0)], ids=["order", "steps"])
def test_what_rows_add_makes_the_figures(made: Scored) -> None:
    report, rows = evaluate([e for e, _ in made], scorer(made), "a test", "a model")
    assert report.shares
    figures = {f.name: f for f in report.figures}
    for name in report.shares:
        total, weight = (rows[f"{name}{end}"].to_numpy() for end in evaluation.SHARE)
        assert total.sum() / weight.sum() == pytest.approx(figures[name].value)
        assert (total <= weight).all() or name == "nll"
    alone = evaluate([made[3][0]], scorer(made), "a test", "a model")[1]
    assert all(alone[c][0].as_py() == pytest.approx(rows[c][3].as_py()) for c in alone.column_names if c.endswith(evaluation.SHARE))


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return make_toy(tmp_path_factory.getbasetemp())


def test_examples_a_model_cannot_read_are_left_out_by_name(toy: Toy) -> None:
    examples = examples_of(open_dataset(toy.pairs).table())[:6]
    long = example(0, (1.0, 0.0), [("so " * 500,), ("A: 1",)])
    report, rows = evaluate([*examples, long], Scorer.load(toy.pairs_model).try_score, "n", "m")
    assert report.numbers["left_out"] == {"too long": 1}
    assert rows.num_rows == 6


def test_the_job_writes_the_report_logs_it_and_tags_the_version(toy: Toy, store: Path, tmp_path: Path) -> None:
    shutil.copytree(toy.store, store)
    output = tmp_path / "report"
    said = done(here("evaluate_model", "--model", "models:/toy-pairs@champion", "--examples", toy.pairs, "--output", output))
    numbers = json.loads((output / "report.json").read_text())
    accuracy = numbers["order"]["accuracy"]["value"]
    assert f"{accuracy:.4f}" in said.out
    compared = comparisons(pq.read_table(output / "scores.parquet").to_pylist())
    assert accuracy == pytest.approx(sum(w for gap, _, w in compared if gap > 0) / sum(w for _, _, w in compared))

    client = mlflow.MlflowClient(registry.tracking_uri())
    [run] = [
        r for r in client.search_runs([client.get_experiment_by_name("rayward").experiment_id]) if r.data.tags["job"] == "evaluate_model"
    ]
    assert run.data.metrics["accuracy"] == pytest.approx(accuracy)
    assert {f.path for f in client.list_artifacts(run.info.run_id)} == {"report.html", "report.json", "scores.parquet"}
    assert run.data.metrics["prompts"] == numbers["prompts"]
    [went_in] = run.inputs.dataset_inputs
    assert went_in.dataset.digest == open_dataset(toy.pairs).manifest.digest
    tags = registry.find("toy-pairs@champion")["tags"]
    assert run.info.run_id in tags.values()
    assert f"{accuracy:.4f}" in tags.values()
