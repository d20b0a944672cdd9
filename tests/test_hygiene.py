"""Hygiene: planted defects are found, each with its exact count; what is clean is called clean; what is fixed stays fixed."""

from __future__ import annotations

import importlib.util
import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

import tiny
from rayward import dataflow, formats, hygiene, metrics
from rayward.dataflow import Recipe
from rayward.errors import DataError, RaywardError, SettingsError
from rayward.hygiene import Finding, FixSettings, LintSettings, TokenSettings
from rayward.hygiene.near import BUCKET, Near, Sketches, sketch
from rayward.hygiene.overlap import TEMPLATE
from rayward.hygiene.page import LINES
from rayward.hygiene.summary import Ratio, Summary, length_histogram, length_quantile
from rayward.hygiene.survey import Chunk, chunks
from rayward.hygiene.texts import fingerprints, grams, script_names, words_of
from rayward.labels import LABELERS
from rayward.records import Example, Message, examples_of, examples_table
from rayward.storage import Dataset, open_dataset

NONE = TokenSettings()


def text(seed: int, words: int = 20) -> str:
    """Words that no other seed gives in this order."""
    rng = np.random.default_rng(seed)
    return " ".join(f"word{n}" for n in rng.integers(0, 5000, words))


def pair(n: int, better: str | None = None, worse: str | None = None, prompt: str | None = None, **changes: Any) -> Example:
    """A clean pair, the n-th, but for what is given; odd ones list the worse answer first."""
    sides = (better if better is not None else text(3 * n + 1), worse if worse is not None else text(3 * n + 2))
    targets = (1.0, 0.0)
    if n % 2:
        sides, targets = sides[::-1], targets[::-1]
    asked = (Message("user", prompt if prompt is not None else text(3 * n)),)
    return tiny.example(*sides, prompt=asked, **{"id": f"e{n:03d}", "targets": targets, **changes})


CLEAN = [pair(n) for n in range(40)]


def dataset(examples: Sequence[Example], folder: Path, parts: int = 1) -> Dataset:
    """Examples on disk in some parts."""
    return tiny.on_disk("examples", examples_table(examples), folder, parts)


def split(folder: Path, **sides: Sequence[Example]) -> str:
    """A split on disk."""
    for name, examples in sides.items():
        (folder / name).mkdir(parents=True)
        dataset(examples, folder / name)
    return str(folder)


def findings_in(path: str | Path, tokens: TokenSettings = NONE, against: Sequence[str] = (), **settings: Any) -> dict[str, Finding]:
    """What lint finds, by name."""
    sets = [hygiene.load(str(name)) for name in against]
    found, _ = hygiene.lint(hygiene.open_source(str(path)), LintSettings(**settings), tokens, sets)
    return {f.name: f for f in found}


def errors_of(found: dict[str, Finding]) -> dict[str, int]:
    return {name: f.count for name, f in found.items() if f.severity == "error" and f.count}


@pytest.fixture(scope="module")
def script() -> Any:
    """pipelines/lint_examples.py as a module."""
    path = Path(__file__).parents[1] / "pipelines" / "lint_examples.py"
    spec = importlib.util.spec_from_file_location("lint_examples", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["lint_examples"] = module
    spec.loader.exec_module(module)
    return module


# ------------------------------------------------------------------------------------------------------------------- texts


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("What is it?", "what  is\nit", True),
        ("“Well”, he said.", "well he said", True),
        ("a b", "b a", False),
        ("2+2", "2-2", False),
        ("2+2", "2 + 2", True),
        ("3 * 4 = 12", "3 / 4 = 12", False),
        ("你好吗", "你 好 吗?", True),
        ("你好吗", "吗好你", False),
        ("naïve", "naive", False),
        ("x", "", False),
    ],
)
def test_prompts_are_the_same_by_their_words(one: str, other: str, same: bool) -> None:
    a, b = fingerprints(words_of(pa.array([one, other])))
    assert (a == b) == same


def test_grams_are_those_of_the_text_and_no_other() -> None:
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(list("abc"), n)) for n in (0, 1, 2, 3, 4, 7, 30)] + ["", "?!"]
    gram, owner = grams(words_of(pa.array(texts)), 3)
    by_text = [[tuple(w[n : n + 3]) for n in range(len(w) - 2)] for w in (t.replace("?!", "").split() for t in texts)]
    assert owner.tolist() == [n for n, found in enumerate(by_text) for _ in found]
    flat = [g for found in by_text for g in found]
    for i, j in itertools.combinations(range(len(flat)), 2):
        assert (gram[i] == gram[j]) == (flat[i] == flat[j])


@pytest.mark.parametrize(
    ("given", "name"),
    [
        *(("été", "Latin"), ("мир", "Cyrillic"), ("日本語", "Han and kana"), ("안녕", "Hangul"), ("سلام", "Arabic"), ("שלום", "Hebrew")),
        *(("नमस्ते", "Indic"), ("สวัสดี", "Thai"), ("1 + 1 = 2", "none"), ("", "none"), ("x = мир", "Cyrillic"), ("😀😀 ok", "Latin")),
    ],
)
def test_scripts(given: str, name: str) -> None:
    assert script_names(pa.array([given])) == [name]


# --------------------------------------------------------------------------------------------------------- near-duplicates


def shingles(given: str) -> set[tuple[str, ...]]:
    words = given.split()
    return {tuple(words[n : n + 5]) for n in range(len(words) - 4)} or {tuple(words)}


def brute_force(texts: Sequence[str], least: float = 0.8) -> set[tuple[int, int]]:
    sets = [shingles(t) for t in texts]
    return {
        (i, j) for i, j in itertools.combinations(range(len(texts)), 2) if len(sets[i] & sets[j]) / len(sets[i] | sets[j]) >= least - 1e-9
    }


def near(texts: Sequence[str], folder: Path, cut: int = 0) -> Near:
    sketches = Sketches(folder)
    for piece in [texts[:cut], texts[cut:]] if cut else [texts]:
        sketches.add(sketch(words_of(pa.array(piece, pa.string()))))
    return sketches.pairs()


def as_pairs(found: Near) -> set[tuple[int, int]]:
    """All pairs that the classes and the similar classes stand for."""
    members: dict[int, list[int]] = {}
    for n, first in enumerate(found.first.tolist()):
        members.setdefault(first, []).append(n)
    pairs = {p for m in members.values() for p in itertools.combinations(m, 2)}
    for a, b in zip(found.a.tolist(), found.b.tolist(), strict=True):
        pairs |= {(min(x, y), max(x, y)) for x in members[a] for y in members[b]}
    return pairs


def mutated() -> list[str]:
    """120 texts, and each again with 0 to 7 of its words changed, some short."""
    rng = np.random.default_rng(1)
    texts = []
    for n in range(120):
        words = text(n, int(rng.integers(2, 120))).split()
        again = list(words)
        for at in rng.choice(len(words), min(len(words), n % 8), replace=False):
            again[at] = "changed"
        texts += [" ".join(words), " ".join(again)]
    return texts


def test_near_duplicates_are_those_of_brute_force(tmp_path: Path) -> None:
    texts = mutated()
    expected = brute_force(texts)
    assert 20 < len(expected) < 100
    found = near(texts, tmp_path / "whole")
    assert as_pairs(found) <= expected  # verified: never one too many
    assert len(expected - as_pairs(found)) <= 1  # one in a hundred may be missed at 0.8
    assert brute_force(texts, 0.9) <= as_pairs(found)
    assert as_pairs(near(texts, tmp_path / "cut", cut=77)) == as_pairs(found)


def test_near_duplicates_leave_no_files_and_empty_texts_are_none(tmp_path: Path) -> None:
    assert as_pairs(near(["", " ", "?", "!", "a b", "a  B"], tmp_path)) == {(4, 5)}
    assert list(tmp_path.iterdir()) == []
    assert as_pairs(Sketches(tmp_path).pairs()) == set()


def test_a_crowded_bucket_is_linked_and_said(tmp_path: Path) -> None:
    base = text(0, 200).split()
    texts = [" ".join([*base, f"end{n}"]) for n in range(5 * BUCKET)]
    found = near(texts, tmp_path)
    assert found.crowded == len(texts)
    assert len(found.texts) == len(texts)
    other = found.partners(np.zeros(len(texts), np.int64), np.arange(len(texts)))[:, 0]
    assert (other >= 0).all()
    assert (other != np.arange(len(texts))).all()


def test_partners_are_of_another_owner_on_the_side_asked_for() -> None:
    found = Near(first=np.array([0, 0, 2, 3, 4]), a=np.array([0, 2]), b=np.array([2, 3]), similarity=np.ones(2), crowded=0)
    assert found.texts.tolist() == [0, 1, 2, 3]  # 4 is alone
    side, owner = np.array([0, 1, 0, 1]), np.array([0, 1, 2, 2])  # 2 is like 3, but they have one owner
    assert found.partners(side, owner).tolist() == [[2, 1], [0, -1], [0, 1], [-1, -1]]


def test_near_duplicates_of_real_prompts(shared_data: Path, hh: Path) -> None:
    table = open_dataset(hh).table()
    texts = list(dict.fromkeys("\n".join(m.content for m in e.prompt) for e in examples_of(table)))
    words = [t.lower() for t in pc.replace_substring_regex(pa.array(texts), r"[^\p{L}\p{M}\p{N}+\-*/=<>^%]+", " ").to_pylist()]
    words = pc.replace_substring_regex(pa.array(words), r"([+\-*/=<>^%])", r" \1 ").to_pylist()
    by_first: dict[tuple[str, ...], list[int]] = {}
    sets = [shingles(t) for t in words]
    for n, s in enumerate(sets):
        for shingle in s:
            by_first.setdefault(shingle, []).append(n)
    candidates = {p for some in by_first.values() for p in itertools.combinations(sorted(set(some)), 2)}
    expected = {i for p in candidates if len(sets[p[0]] & sets[p[1]]) >= 0.8 * len(sets[p[0]] | sets[p[1]]) for i in p}
    found = findings_in(hh)["near_duplicate_prompts"]
    assert found.count == len(expected) > 0
    assert found.of == len(texts)


# ------------------------------------------------------------------------------------------------------------------ counts


def test_sums_add_up_however_they_are_cut() -> None:
    rng = np.random.default_rng(0)
    cluster, total, weight = np.sort(rng.integers(0, 50, 300)), rng.random(300), rng.random(300) + 1
    whole = Ratio.of(cluster, total, weight)
    for cut in (7, 30):
        left = cluster < cut
        both = Ratio.of(cluster[left], total[left], weight[left]) + Ratio.of(cluster[~left], total[~left], weight[~left])
        assert both.value == pytest.approx(whole.value)
        assert both.interval() == pytest.approx(whole.interval())
    assert Ratio() + whole == whole
    assert np.isnan(Ratio().interval()).all()


@pytest.mark.parametrize("each", [1, 5])
def test_interval_is_that_of_a_bootstrap_over_prompts(each: int) -> None:
    rng = np.random.default_rng(each)
    cluster = np.repeat(np.arange(400), each)
    total = np.repeat(rng.random(400) < 0.3, each).astype(float)  # comparisons of a prompt agree, so they are worth one
    weight = np.ones(len(cluster))
    low, high = Ratio.of(cluster, total, weight).interval()
    assert (low, high) == pytest.approx(metrics.bootstrap(cluster.tolist(), total, weight), abs=0.006)


def test_interval_of_a_share_of_one_is_wilsons() -> None:
    low, high = Ratio.of(np.arange(100), np.ones(100), np.ones(100)).interval()
    assert (low, high) == (pytest.approx(100 / (100 + 1.959964**2)), pytest.approx(1.0))


def test_lengths_in_bins() -> None:
    lengths = np.random.default_rng(0).integers(0, 3000, 5000)
    assert length_histogram(lengths).sum() == 5000
    for share in (0.5, 0.95):
        assert np.quantile(lengths, share) <= length_quantile(length_histogram(lengths), share) <= 1.2 * np.quantile(lengths, share)


def test_biases_are_those_of_the_evaluation(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    examples = [
        tiny.example(
            *(text(100 * n + k, int(rng.integers(1, 30))) for k in range(n % 4 + 2)),
            prompt=(Message("user", text(n % 23)),),
            id=f"{n}",
            weight=float(rng.random() + 0.1),
            targets=tuple(rng.integers(0, 3, n % 4 + 2).astype(float)),
        )
        for n in range(150)
    ]
    compared = metrics.comparisons(examples, [e.targets for e in examples])
    _, summary = hygiene.lint(hygiene.open_source(str(dataset(examples, tmp_path).path)), LintSettings(), NONE)
    expected = ((compared.longer + 1) / 2 * compared.weight).sum() / compared.weight.sum()
    assert summary.longer.value == pytest.approx(expected)
    assert summary.longer.weight == pytest.approx(compared.weight.sum())
    sizes = [len(e.targets) for e in examples]
    assert summary.comparisons == sum(n * (n - 1) // 2 for n in sizes)
    assert summary.comparisons - summary.ties == len(compared.logit)


def test_correlation_of_length_and_preference(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    examples = [pair(n, text(n, int(rng.integers(5, 60))), text(n + 999, int(rng.integers(1, 30)))) for n in range(60)]
    table = open_dataset(dataset(examples, tmp_path).path).table()
    x, y, gap = [], [], []
    for e in examples_of(table):
        (a,), (b,) = e.answers
        for one, other, sign in ((a, b, 1), (b, a, -1)):
            x.append(np.log((len(one) + 1) / (len(other) + 1)))
            gap.append(sign * (e.targets[0] - e.targets[1]))
            y.append(np.sign(gap[-1]))
    numbers = findings_in(tmp_path)["length_bias"].numbers
    assert numbers["correlation_of_log_length_ratio_and_preference"] == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert numbers["correlation_of_log_length_ratio_and_target_difference"] == pytest.approx(np.corrcoef(x, gap)[0, 1])


def test_chunks_hold_whole_prompts_and_every_row_once(tmp_path: Path) -> None:
    examples = [pair(n, prompt=text(n % 9), id=f"{n:03d}") for n in range(60)]
    whole = dataset(examples, tmp_path, parts=4)
    tables = list(chunks(whole, rows=5))
    assert len(tables) > 4
    assert pa.concat_tables(tables).to_pylist() == whole.table().to_pylist()
    for one, other in itertools.pairwise(tables):
        assert one["prompt_id"][-1] != other["prompt_id"][0]
    summed = sum((Chunk(t).summary() for t in tables), Summary())
    once = Chunk(whole.table().combine_chunks()).summary()
    assert (summed.examples, summed.prompts, summed.targets, summed.counts) == (once.examples, once.prompts, once.targets, once.counts)
    assert summed.longer.value == pytest.approx(once.longer.value)


# --------------------------------------------------------------------------------------------------------- planted defects


def outcome(id: str, prompt: str, *graded: tuple[str, float]) -> Example:
    answers, targets = zip(*graded, strict=True)
    return tiny.example(*answers, prompt=(Message("user", prompt),), id=f"outcomes@{id}", targets=targets, counts=(1,) * len(targets))


PLANTED: dict[str, tuple[Callable[[], list[Example]], str, set[str]]] = {  # what is added to CLEAN, the finding, the ids it must name
    "identical": (lambda: [pair(50, "the same", "the same"), pair(51, "the same", "the same ")], "identical", {"e050"}),
    "identical, tied": (lambda: [pair(50, "the same", "the same", targets=(0.5, 0.5))], "identical", {"e050"}),
    "identical in a ranking": (
        lambda: [
            tiny.example("x y", "x y", "z", prompt=tiny.question("r1"), id="r1", targets=(2.0, 1.0, 0.0)),
            tiny.example("x y", "x y", "z", prompt=tiny.question("r2"), id="r2", targets=(2.0, 2.0, 0.0)),  # a tie of equals is no harm
        ],
        "identical",
        {"r1"},
    ),
    "empty": (lambda: [pair(50, ""), pair(51, worse=" \n\t "), pair(52, prompt="  ")], "empty", {"e050", "e051", "e052"}),
    "near-empty": (lambda: [pair(50, "ok"), pair(51, "yes"), pair(52, " b ")], "near_empty", {"e050", "e052"}),
    "duplicates": (
        lambda: [
            pair(50, id="a"),
            pair(50, id="b"),
            tiny.example(*(text(3 * 50 + k) for k in (2, 1)), prompt=(Message("user", text(150)),), id="c", targets=(0.2, 0.9)),
            pair(50, text(999), id="d"),  # another better answer
        ],
        "exact_duplicates",
        {"b", "c"},
    ),
    "duplicates in graded answers": (
        lambda: [outcome("a", "q", ("x", 1.0)), outcome("b", "q", ("x", 1.0)), outcome("c", "q", ("y", 1.0))],
        "exact_duplicates",
        {"outcomes@b"},
    ),
    "contradictions": (
        lambda: [
            pair(50, "a a", "b b", prompt="q", id="one"),
            pair(50, "b b", "a a", prompt="q", id="two"),
            pair(50, "a a", "c c", prompt="q", id="three"),
            pair(50, "b b", "a a", prompt="another", id="four"),
        ],
        "contradictions",
        {"one", "two"},
    ),
    "contradictions in rankings": (
        lambda: [
            tiny.example("a", "b", "c", prompt=tiny.question("r"), id="r1", targets=(2.0, 1.0, 0.0)),
            tiny.example("c", "a", "d", prompt=tiny.question("r"), id="r2", targets=(2.0, 1.0, 0.0)),
            tiny.example("a", "c", prompt=tiny.question("r"), id="r3", targets=(1.0, 1.0)),
            tiny.example("b", "d", prompt=tiny.question("r"), id="r4", targets=(1.0, 0.0)),
        ],
        "contradictions",
        {"r1", "r2"},
    ),
    "contradictory verdicts": (
        lambda: [
            outcome("a", "q", ("x", 1.0), ("y", 0.0)),
            outcome("b", "q", ("x", 0.0)),
            outcome("c", "p", ("x", 1.0), ("x", 0.0)),
            outcome("d", "o", ("x", 1.0), ("x", 1.0)),
        ],
        "contradictions",
        {"outcomes@a", "outcomes@b", "outcomes@c"},
    ),
    "low agreement": (
        lambda: [
            pair(50, targets=(5 / 9, 4 / 9), counts=(9, 9)),
            pair(52, targets=(2 / 3, 1 / 3), counts=(3, 3)),
            pair(54, targets=(0.55, 0.45), counts=(1, 1)),
        ],
        "low_agreement",
        {"e050"},
    ),
    "near-identical answers": (
        lambda: [pair(50, text(7, 60), text(7, 60) + " end"), pair(51, text(7, 60), text(7, 30))],
        "near_identical_answers",
        {"e050"},
    ),
    "near-duplicate prompts": (
        lambda: [pair(50, prompt=text(7, 60)), pair(51, prompt=text(7, 60) + " end"), pair(52, prompt=text(7, 60).upper() + " !")],
        "near_duplicate_prompts",
        {"e050", "e051", "e052"},
    ),
    "near-duplicate answers": (
        lambda: [pair(50, text(7, 60)), pair(51, text(7, 60) + " end"), pair(52, "no, sorry"), pair(53, "no, sorry")],
        "near_duplicate_answers",
        {"e050", "e051"},
    ),
    "mixed scripts": (lambda: [pair(50, "да, конечно"), pair(51, "42")], "mixed_scripts", {"e050"}),
}


@pytest.mark.parametrize("name", list(PLANTED))
@pytest.mark.parametrize("parts", [1, 4])
def test_a_planted_defect_is_found_and_nothing_else(name: str, parts: int, tmp_path: Path) -> None:
    plant, finding, ids = PLANTED[name]
    found = findings_in(dataset([*CLEAN, *plant()], tmp_path, parts).path)
    assert set(found[finding].ids) == ids
    assert found[finding].count == len(found[finding].ids) == len(ids)
    assert {c["id"] for c in found[finding].cases} <= ids
    errors = {finding} if found[finding].severity == "error" else set()
    assert set(errors_of(found)) == errors


def test_clean_examples_are_clean(tmp_path: Path) -> None:
    found = findings_in(dataset(CLEAN, tmp_path).path)
    assert {n for n, f in found.items() if f.count and f.severity != "note"} == set()
    assert found["listed_first"].share == 0.5


@pytest.mark.parametrize("kind", ["pairs", "rankings", "outcomes", "steps"])
def test_the_toy_world_is_clean(kind: str, tmp_path: Path) -> None:
    more = {"answers": 1, "continued": 1, "continuations": 8} if kind == "steps" else {"answers": 8}
    settings = LABELERS[kind].settings(**({"choose": "best_worst"} if kind == "pairs" else {}))
    made = [e for rollouts in tiny.toy_rollouts(80, **more) for e in LABELERS[kind].label(rollouts, settings)]
    examples = [e for e in made if isinstance(e, Example)]
    found = findings_in(dataset(examples, tmp_path).path)
    assert len(examples) > 60
    assert errors_of(found) == {}
    assert found["length_bias"].severity == "note"


def test_counts_of_ties_masks_and_weights(tmp_path: Path) -> None:
    many = [pair(200 + n, prompt="the heavy one", weight=50.0) for n in range(4)]
    more = [pair(n) for n in range(300, 420)]
    tied = [pair(60, targets=(1.0, 1.0)), pair(61, targets=(0.0, 0.0), counts=(1, 0))]
    found = findings_in(dataset([*CLEAN, *many, *more, *tied], tmp_path).path)
    assert found["ties"].count == 1
    assert found["missing_targets"].count == 1
    dominating = found["dominating_prompts"]
    assert dominating.severity == "warning"
    assert dominating.share == pytest.approx(200 / (200 + 162))


@pytest.mark.parametrize(("longer", "severity"), [(0.5, "note"), (0.9, "warning"), (0.1, "warning")])
def test_length_bias_is_a_warning_where_it_is_sure(longer: float, severity: str, tmp_path: Path) -> None:
    examples = [pair(n, text(n, 10), text(n + 999, 5 if n < longer * 100 else 20)) for n in range(100)]
    found = findings_in(dataset(examples, tmp_path).path)["length_bias"]
    assert found.severity == severity
    assert found.share == pytest.approx(longer)


def test_position_bias_is_of_what_was_shown_first(tmp_path: Path) -> None:
    first_won = [n < 27 for n in range(30)]
    examples = [
        pair(n, provenance={"position": "1" if won == (n % 2 == 0) else "2"}) for n, won in enumerate(first_won)
    ]  # the place of the answer that is listed first, which is the better one where n is even
    found = findings_in(dataset([*examples, *CLEAN[30:]], tmp_path).path)["position_bias"]
    assert (found.share, found.of, found.severity) == (0.9, 30, "warning")


# ------------------------------------------------------------------------------------------------------- sides and overlap


def test_prompts_on_two_sides(tmp_path: Path) -> None:
    shared = [pair(5), pair(6, text(1000)), pair(6, text(1001), id="again")]
    almost = pair(77, prompt=text(3 * 7, 20) + "?!")  # example 7's prompt with other signs
    source = split(tmp_path, train=[*CLEAN[:30], *shared[1:]], validation=[*CLEAN[30:35], almost], test=[*CLEAN[35:], shared[0]])
    found = findings_in(source)
    assert set(found["prompts_across_sides"].ids) == {"e005"}
    assert found["prompts_across_sides"].of == 41
    assert set(found["near_duplicates_across_sides"].ids) == {"e007"}
    assert found["near_duplicates_across_sides"].partner_ids == ["e077"]
    assert found["near_duplicate_prompts"].count == 0
    [case] = found["prompts_across_sides"].cases
    assert (case["side"], case["with"]["side"]) == ("train", "test")


def test_the_later_side_keeps_a_prompt(tmp_path: Path) -> None:
    source = hygiene.open_source(split(tmp_path, train=CLEAN[:10], validation=CLEAN[5:12], test=CLEAN[8:]))
    findings, _ = hygiene.lint(source, LintSettings(), NONE)
    reasons = hygiene.plan(findings, FixSettings())
    assert list(source.sides) == ["train", "validation", "test"]
    table = pa.concat_tables([d.table() for d in source.sides.values()])
    assert sorted(table["id"][n].as_py() for n in reasons) == sorted([f"e{n:03d}" for n in (5, 6, 7, 8, 9, 8, 9, 10, 11)])


def test_overlap_with_an_evaluation_set(tmp_path: Path) -> None:
    long = text(900, 40)
    system = Message("system", text(901, 30))
    evaluation = [
        pair(100, prompt="What is the capital of France?"),
        pair(101, prompt=long),
        tiny.example(text(902, 30), text(903), prompt=(system, Message("user", "hello there")), id="s"),
    ]
    training = [
        pair(50, prompt="what is the capital of France"),
        pair(51, prompt="what is the capital of Spain"),
        pair(52, prompt=text(904, 9) + " " + " ".join(long.split()[10:23]) + " and so on"),  # 13 words
        pair(53, prompt=text(905, 9) + " " + " ".join(long.split()[10:22]) + " and so on"),  # 12 words
        tiny.example(text(906), text(907), prompt=(system, Message("user", text(908))), id="e054"),  # shares its system message only
        pair(55, text(902, 30)),
    ]
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "training").mkdir()
    dataset(evaluation, tmp_path / "evaluation")
    source = dataset([*CLEAN, *training], tmp_path / "training").path
    name = str(tmp_path / "evaluation")
    found = findings_in(source, against=[name, "toy_steps"])
    assert set(found[f"overlap:{name}"].ids) == {"e050", "e052"}
    numbers = found[f"overlap:{name}"].numbers
    assert (numbers["exact"], numbers["by_13_words"], numbers["evaluation_prompts"]) == (1, 1, 3)
    assert numbers["evaluation_prompts_in_training"] == 1
    assert set(found[f"overlap_answers:{name}"].ids) == {"e055"}
    assert found["overlap:toy_steps"].count == 0


def test_a_template_of_the_evaluation_set_is_no_overlap(tmp_path: Path) -> None:
    template = text(900, 15)
    training = [pair(1, prompt=f"{template} {text(901)}")]
    source = dataset(training, tmp_path).path
    for prompts, count in ((TEMPLATE, 1), (TEMPLATE + 1, 0)):
        folder = tmp_path / f"with-{prompts}"
        folder.mkdir()
        dataset([pair(n, prompt=f"{template} {text(3 * n)}") for n in range(100, 100 + prompts)], folder)
        assert findings_in(source, against=[str(folder)])[f"overlap:{folder}"].count == count


def test_evaluation_sets_come_from_files_and_suites_too(tmp_path: Path) -> None:
    rows = [{"prompt": text(3 * n), "chosen": "a", "rejected": "b"} for n in range(3)] + [{"prompt": "x", "chosen": 3, "rejected": "b"}]
    file = tmp_path / "set.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "examples").mkdir()
    numbers = findings_in(dataset(CLEAN, tmp_path / "examples").path, against=[str(file)])[f"overlap:{file}"].numbers
    assert (numbers["exact"], numbers["evaluation_prompts"], numbers["rows_not_read"]) == (3, 3, 1)
    assert len(hygiene.load("toy_steps").prompts) == 600
    with pytest.raises(DataError, match="neither a suite nor a file"):
        hygiene.load("toy_stepz")
    file.write_text('{"nothing": 1}\n')
    with pytest.raises(DataError, match="import_rollouts"):
        hygiene.load(str(file))


def test_only_what_is_trained_on_is_held_against_evaluation_sets(tmp_path: Path) -> None:
    source = split(tmp_path / "split", train=CLEAN[:20], validation=CLEAN[20:22], test=CLEAN[22:])
    name = str(tmp_path / "split" / "test")
    assert findings_in(source, against=[name])[f"overlap:{name}"].count == 0


# ------------------------------------------------------------------------------------------------------------------ tokens


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.byte_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(("too_long", "severity"), [("reject", "warning"), ("cut_answer", "error"), ("cut", "error")])
def test_what_is_too_long_and_what_truncation_makes_identical(too_long: Any, severity: str, tokenizer: str, tmp_path: Path) -> None:
    same = "yes, " * 200
    planted = [pair(50, same + "and so", same + "but no"), pair(51, text(1, 300), text(2, 300)), pair(52, "the same", "the same")]
    source = dataset([*CLEAN, *planted], tmp_path).path
    found = findings_in(source, TokenSettings(tokenizer, 600, too_long))
    assert set(found["over_long"].ids) == {"e050", "e051"}
    assert set(found["identical_after_truncation"].ids) == {"e050"}
    assert found["identical_after_truncation"].severity == severity
    assert found["identical"].count == 1
    assert "over_long" not in findings_in(source)


def test_the_tokenizer_that_cannot_be_loaded_is_said(tmp_path: Path) -> None:
    with pytest.raises(RaywardError, match=r"--tokenizer .*nowhere cannot be loaded"):
        findings_in(dataset(CLEAN, tmp_path).path, TokenSettings(str(tmp_path / "nowhere")))


# --------------------------------------------------------------------------------------------------------------------- fix


def everything_wrong(folder: Path) -> str:
    """A split with every kind of defect."""
    planted = [e for n, (plant, _, _) in enumerate(PLANTED.values()) for e in plant_apart(plant(), n)]
    return split(folder, train=[*CLEAN[:30], *planted, pair(32)], validation=[*CLEAN[30:34], pair(36)], test=CLEAN[34:])


def plant_apart(examples: Sequence[Example], n: int) -> list[Example]:
    """The same under prompts of their own."""
    blank = [e for e in examples if not e.prompt[0].content.strip()]
    moved = [replace(e, prompt=(Message("user", f"{n} {n} {n} {n} {e.prompt[0].content}"),), id=f"{n}-{e.id}") for e in examples]
    return [e for e, was in zip(moved, examples, strict=True) if was not in blank] + blank


def test_what_is_fixed_is_clean(tmp_path: Path, script: Any) -> None:
    source = everything_wrong(tmp_path / "source")
    (tmp_path / "eval").mkdir()
    evaluation = str(dataset([CLEAN[3], CLEAN[4]], tmp_path / "eval").path)
    settings = script.Settings(source=source, against=(evaluation,), output=str(tmp_path / "lint"), fix=True, engine="local")
    before = {f.name: f for f in script.main(settings)}
    assert set(errors_of(before)) == {
        *("identical", "empty", "exact_duplicates", "contradictions", "prompts_across_sides"),
        f"overlap:{evaluation}",
    }
    fixed = tmp_path / "lint" / "fixed"
    assert errors_of(findings_in(fixed, against=[evaluation])) == {}
    train = open_dataset(fixed / "train", "examples")
    reasons = train.rejects()["reason"].to_pylist()
    assert {r.partition(":")[0] for r in reasons} == {
        *("identical", "empty", "overlap", "prompts across sides", "contradictions", "exact duplicates")
    }
    assert train.manifest.rows_in == train.manifest.used + len(reasons) == train.manifest.out + len(reasons)
    assert len(train.manifest.inputs) == 4
    rejected = set(train.rejects()["row"].to_pylist())
    assert {"e003", "e004", "e032"} <= rejected
    assert set(open_dataset(fixed / "validation").rejects()["row"].to_pylist()) == {"e036"}
    digest = train.manifest.digest
    script.main(settings)  # the same command again
    assert open_dataset(fixed / "train").manifest.digest == digest


@pytest.mark.parametrize("parts", [1, 4])
def test_one_of_the_duplicates_stays(parts: int, tmp_path: Path, script: Any) -> None:
    copies = [pair(n, id=f"e{n:03d}-{k}") for n in range(20) for k in range(n % 3 + 1)]
    source = dataset(copies, tmp_path / "source", parts).path
    script.main(script.Settings(source=str(source), output=str(tmp_path / "lint"), fix=True, engine="local"))
    kept = open_dataset(tmp_path / "lint" / "fixed", "examples").table()
    assert sorted(kept["id"].to_pylist()) == [f"e{n:03d}-0" for n in range(20)]


@pytest.mark.parametrize(("how", "kept"), [("both", {"d"}), ("minority", {"a", "b", "d"}), ("keep", {"a", "b", "c", "d"})])
def test_contradictions_are_left_out_as_asked(how: Any, kept: set[str], tmp_path: Path) -> None:
    votes = [
        pair(50, "x x", "y y", prompt="q", id="a", counts=(3, 3)),
        pair(50, "x x", "y y", prompt="q", id="b", targets=(2.0, 0.0)),
        pair(50, "y y", "x x", prompt="q", id="c", counts=(2, 2)),
        pair(50, "y y", "z z", prompt="q", id="d"),
    ]
    source = hygiene.open_source(str(dataset(votes, tmp_path).path))
    findings, _ = hygiene.lint(source, LintSettings(), NONE)
    reasons = hygiene.plan(findings, FixSettings(contradictions=how, exact_duplicates=False))
    names = source.sides[""].table()["id"].to_pylist()
    assert {name for n, name in enumerate(names) if n not in reasons} == kept
    assert all(r.startswith("contradictions: it contradicts ") for r in reasons.values())


def test_tied_contradictions_have_no_majority(tmp_path: Path) -> None:
    votes = [pair(50, "x x", "y y", prompt="q", id="a"), pair(50, "y y", "x x", prompt="q", id="b")]
    findings, _ = hygiene.lint(hygiene.open_source(str(dataset(votes, tmp_path).path)), LintSettings(), NONE)
    assert len(hygiene.plan(findings, FixSettings(contradictions="minority"))) == 2


def test_a_fix_can_be_left_away(tmp_path: Path) -> None:
    source = hygiene.open_source(str(dataset([*CLEAN, pair(50, "same", "same"), pair(51, "")], tmp_path).path))
    findings, _ = hygiene.lint(source, LintSettings(), NONE)
    assert len(hygiene.plan(findings, FixSettings())) == 2
    assert [r.partition(":")[0] for r in hygiene.plan(findings, FixSettings(identical=False)).values()] == ["empty"]


# ------------------------------------------------------------------------------------------------------- screen and files


def test_the_screen_holds_everything_that_matters(tmp_path: Path, script: Any, capsys: pytest.CaptureFixture[str]) -> None:
    names = []
    for n in range(30):
        (tmp_path / f"set-{n}").mkdir()
        names.append(str(dataset([CLEAN[n]], tmp_path / f"set-{n}").path))
    source = everything_wrong(tmp_path / "source")
    script.main(script.Settings(source=source, against=tuple(names)))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= LINES
    assert "error" in lines[2]
    assert "more" in "".join(lines)
    assert "--output" in lines[-1]


def test_files_hold_all_ids_and_need_nothing_else(tmp_path: Path, script: Any) -> None:
    many = [pair(n, "<b>same</b>", "<b>same</b>") for n in range(100, 120)]
    (tmp_path / "source").mkdir()
    source = dataset([*CLEAN, *many], tmp_path / "source").path
    script.main(script.Settings(source=str(source), output=str(tmp_path / "lint")))
    found = {f["name"]: f for f in json.loads((tmp_path / "lint" / "findings.json").read_text())["findings"]}
    assert sorted(found["identical"]["ids"]) == [e.id for e in many]
    assert len(found["identical"]["cases"]) == 5
    page = (tmp_path / "lint" / "index.html").read_text()
    assert page.count("<svg") >= 4
    assert "&lt;b&gt;same" in page
    assert "<b>same" not in page
    assert 'src="' not in page
    assert "<link" not in page


def test_an_output_that_holds_something_else_is_kept(tmp_path: Path, script: Any) -> None:
    (tmp_path / "source").mkdir()
    source = str(dataset(CLEAN, tmp_path / "source").path)
    with pytest.raises(DataError, match="already holds something else"):
        script.main(script.Settings(source=source, output=source))
    with pytest.raises(SettingsError, match="--output"):
        script.main(script.Settings(source=source, fix=True))


def test_strict_fails_on_errors_only(tmp_path: Path, script: Any) -> None:
    (tmp_path / "bad").mkdir()
    bad = str(dataset([*CLEAN, pair(50, "")], tmp_path / "bad").path)
    good = str(dataset(CLEAN, tmp_path).path)
    script.main(script.Settings(source=good, strict=True))
    script.main(script.Settings(source=bad))
    with pytest.raises(RaywardError, match="errors were found: empty") as raised:
        script.main(script.Settings(source=bad, strict=True))
    assert not isinstance(raised.value, ValueError)  # exit code 1, not 2


def test_no_examples_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no example"):
        findings_in(dataset([], tmp_path).path)


def test_a_side_may_be_empty(tmp_path: Path) -> None:
    found = findings_in(split(tmp_path, train=[], validation=CLEAN[:3], test=CLEAN[3:]), against=["toy_steps"])
    assert (found["overlap:toy_steps"].count, found["overlap:toy_steps"].of) == (0, 0)


def test_transformers_is_imported_only_for_a_tokenizer(tmp_path: Path) -> None:
    source = dataset(CLEAN, tmp_path).path
    code = (
        "import sys; from rayward.hygiene import *; "
        f"lint(open_source({str(source)!r}), LintSettings(), TokenSettings()); "
        "sys.exit(bool({'transformers', 'torch', 'mlflow'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --------------------------------------------------------------------------------------------------------------- real data


@pytest.fixture(scope="module")
def hh(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The HH file as pairs."""
    folder = tmp_path_factory.mktemp("hh")
    files = formats.find_files(str(shared_data / "raw" / "hh_harmless-base.test.jsonl.gz"))
    rollouts = dataflow.import_files(Recipe("import_rollouts", str(folder / "rollouts"), NONE, [], "local"), files, "hh")
    settings = LABELERS["pairs"].settings()
    recipe = Recipe("label_pairs", str(folder / "pairs"), settings, [rollouts.lineage()], "local")
    return dataflow.label(recipe, rollouts, LABELERS["pairs"], settings).path


def test_real_pairs(hh: Path, shared_data: Path) -> None:
    found = findings_in(hh, against=[str(shared_data / "eval" / "hhh.parquet")])
    examples = examples_of(open_dataset(hh).table())
    assert found["length_bias"].of == len(examples) == 2303
    longer = [np.sign(len(e.answers[0][0]) - len(e.answers[1][0])) for e in examples]
    assert found["length_bias"].share == pytest.approx((np.array(longer) + 1).mean() / 2)
    near_empty = {e.id for e in examples if any(0 < len(a[0].strip()) < 3 for a in e.answers)}
    assert set(found["near_empty"].ids) == near_empty
    same_prompt = [g for g in by_prompt(examples).values() if len(g) > 1]
    assert found["exact_duplicates"].count == sum(len(g) - len({frozenset(a[0] for a in e.answers) for e in g}) for g in same_prompt)
    assert errors_of(found) == {}


def by_prompt(examples: Sequence[Example]) -> dict[Any, list[Example]]:
    groups: dict[Any, list[Example]] = {}
    for e in examples:
        groups.setdefault(e.prompt, []).append(e)
    return groups
