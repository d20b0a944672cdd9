"""One pass over the examples, then what needs all of them, then the ids and the cases: the findings.

    source -> chunks of whole prompts -> Summary (adds up), rows with defects, hashes
           -> near-duplicates, prompts on both sides, with files in a temporary folder
           -> findings -> a second pass for the ids and the texts of what was found

Memory: one chunk (some 200 MB with its arrays), and for a pair with a prompt of its own 65 bytes, at the widest moment 200. A
temporary folder holds 64 bytes per text and 4 per word.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from rayward.errors import DataError, ModelError
from rayward.hygiene.findings import WORST, Finding, Severity, order
from rayward.hygiene.near import Near, Sketches, sketch
from rayward.hygiene.overlap import EvaluationSet
from rayward.hygiene.summary import Summary, length_histogram
from rayward.hygiene.survey import Chunk, Hits, chunks
from rayward.hygiene.texts import words_of
from rayward.places import Place, at, telling
from rayward.progress import Progress
from rayward.records import Example, Rejected, examples_of
from rayward.rendering import Renderer, RenderSettings
from rayward.splits import SIDES
from rayward.storage import Dataset, open_dataset, read_table, row_count


@dataclass(frozen=True)
class LintSettings:
    """Where a finding begins."""

    near_empty: int = 3  # characters; an answer of fewer is near-empty
    least_words: int = 12  # words; a shorter answer is never a near-duplicate of another prompt's answer
    low_agreement: float = 0.6  # share of the votes; less for the better answer is low agreement
    bias: float = 0.1  # a share of better-is-longer or better-was-first that is surely farther from one half is a warning
    dominating: float = 0.1  # share of the total weight; more on the heaviest 1 % of the prompts is a warning
    excerpt: int = 300  # characters of a text that are shown


@dataclass(frozen=True)
class TokenSettings:
    """How training will cut texts; without a tokenizer nothing is cut."""

    tokenizer: str = ""  # folder or name of the model to be trained
    max_length: int = 2048  # tokens of a prompt with one answer
    too_long: Literal["reject", "cut_prompt", "cut_answer", "cut"] = "reject"  # as render.too_long of training


@dataclass(frozen=True)
class Source:
    """Examples: one dataset, or the sides of a split in the order train, validation, test."""

    path: str
    sides: Mapping[str, Dataset]  # "" where there is one dataset

    @property
    def trains(self) -> str:
        """The side that is trained on."""
        return next(iter(self.sides))

    def first_rows(self) -> dict[str, int]:
        """The number of the first row of every side."""
        counts = [sum(map(row_count, dataset.parts)) for dataset in self.sides.values()]
        return dict(zip(self.sides, np.cumsum([0, *counts]).tolist(), strict=False))


def open_source(path: str) -> Source:
    """A folder of examples, or of a split of them."""
    place = at(path)
    with telling(place):
        sides = [s for s in SIDES if (place / s / "manifest.json").is_file()]
        alone = not sides or (place / "manifest.json").is_file()
    if alone:
        return Source(path, {"": open_dataset(path, "examples")})
    return Source(path, {s: open_dataset(place / s, "examples") for s in sides})


@dataclass
class Survey:
    """What one pass over the examples leaves."""

    summary: Summary = Summary()
    hits: dict[str, list[Hits]] = field(default_factory=dict)
    outvoted: list[np.ndarray] = field(default_factory=list)  # rows a majority contradicts
    prompt_hash: list[np.ndarray] = field(default_factory=list)  # uint64; 8 bytes a prompt
    prompt_row: list[np.ndarray] = field(default_factory=list)  # its first row; 8 bytes
    prompt_weight: list[np.ndarray] = field(default_factory=list)  # of all its examples; 8 bytes
    prompt_side: list[np.ndarray] = field(default_factory=list)  # 1 byte
    answer_row: list[np.ndarray] = field(default_factory=list)  # of a distinct answer of a prompt; 8 bytes
    rows: int = 0

    def hit(self, name: str, hits: Hits, first_row: int) -> None:
        """More rows with a defect, numbered from `first_row`."""
        self.hits.setdefault(name, []).append(hits.shift(first_row))

    def found(self, name: str) -> Hits:
        """All rows with a defect."""
        every = self.hits[name] if name in self.hits else [Hits.of(np.empty(0, np.int64))]
        return Hits(np.concatenate([h.rows for h in every]), np.concatenate([h.partners for h in every]))


def lint(
    source: Source, settings: LintSettings, tokens: TokenSettings, against: Sequence[EvaluationSet] = ()
) -> tuple[list[Finding], Summary]:
    """Everything that is looked for, the worst first, and what was counted."""
    renderers = _renderers(tokens)
    with tempfile.TemporaryDirectory(prefix="rayward-lint-") as folder:
        asked, answered = Sketches(Path(folder) / "prompts"), Sketches(Path(folder) / "answers")
        survey = _survey(source, settings, renderers, against, asked, answered)
        found = _local(survey, settings, tokens, bool(renderers)) + _global(survey, source, settings, asked, answered)
    for evaluation_set in against:
        found += _overlap(survey, source, evaluation_set)
    return order(_with_cases(source, found, settings.excerpt)), survey.summary


# ------------------------------------------------------------------------------------------------------------ the one pass


def _survey(
    source: Source,
    settings: LintSettings,
    renderers: Sequence[Renderer],
    against: Sequence[EvaluationSet],
    asked: Sketches,
    answered: Sketches,
) -> Survey:
    survey = Survey()
    total = sum(row_count(part) for dataset in source.sides.values() for part in dataset.parts)
    with Progress("lint_examples", total=total, unit="examples") as bar:
        for side, (name, dataset) in enumerate(source.sides.items()):
            for table in chunks(dataset):
                chunk = Chunk(table)
                _look(survey, chunk, settings, side)
                words = words_of(chunk.prompt_text)
                asked.add(sketch(words))
                _look_at_answers(survey, chunk, settings, answered, words, against if name == source.trains else ())
                if renderers:
                    _look_at_tokens(survey, table, renderers)
                survey.rows += chunk.rows
                bar.advance(chunk.rows)
    if not survey.rows:
        raise DataError(f"{source.path} holds no example", "see its rejects/ for the reasons")
    return survey


def _look(survey: Survey, chunk: Chunk, settings: LintSettings, side: int) -> None:
    """What a chunk shows by itself."""
    survey.summary += chunk.summary()
    survey.prompt_hash.append(chunk.prompt_hash)
    survey.prompt_row.append(chunk.first_R + survey.rows)
    survey.prompt_weight.append(np.bincount(chunk.prompt_R, chunk.weight_R))
    survey.prompt_side.append(np.full(len(chunk.first_R), side, np.uint8))
    clash = chunk.contradictions()
    survey.outvoted.append(clash.outvoted + survey.rows)
    for name, hits in (
        ("identical", chunk.identical()),
        ("empty", chunk.empty()),
        ("near_empty", chunk.near_empty(settings.near_empty)),
        ("exact_duplicates", chunk.duplicates()),
        ("contradictions", clash.hits),
        ("low_agreement", chunk.low_agreement(settings.low_agreement)),
        ("mixed_scripts", chunk.mixed_scripts()),
    ):
        survey.hit(name, hits, survey.rows)


def _look_at_answers(
    survey: Survey, chunk: Chunk, settings: LintSettings, answered: Sketches, asked: Any, against: Sequence[EvaluationSet]
) -> None:
    """Every distinct answer of a prompt once: its sketch, and the 13-grams of it."""
    prompt_A = chunk.prompt_R[chunk.row_A]
    _, first, which = np.unique(prompt_A * (chunk.code_A.max(initial=0) + 1) + chunk.code_A, return_index=True, return_inverse=True)
    words = words_of(chunk.text_A.take(pa.array(first)))
    sketched = sketch(words)
    told = np.flatnonzero((chunk.gap_C != 0) & (chunk.code_A[chunk.a_C] != chunk.code_A[chunk.b_C]))
    near = sketched.similar(which[chunk.a_C[told]], which[chunk.b_C[told]])
    survey.hit("near_identical_answers", Hits.of(chunk.row_C[told[near]]), survey.rows)
    long = words.length >= settings.least_words
    answered.add(sketched.take(long))
    survey.answer_row.append(chunk.row_A[first[long]] + survey.rows)
    for evaluation_set in against:
        exact, by_gram, answers = evaluation_set.match(asked, words)
        for name, hits in (
            ("exact", np.flatnonzero(exact[chunk.prompt_R])),
            ("gram", np.flatnonzero(by_gram[chunk.prompt_R])),
            ("answers", chunk.row_A[answers[which]]),
        ):
            survey.hit(f"{name}:{evaluation_set.name}", Hits.of(hits), survey.rows)


def _renderers(tokens: TokenSettings) -> list[Renderer]:
    """How training renders, and how it would if it cut what is too long; none without a tokenizer."""
    if not tokens.tokenizer:
        return []
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(tokens.tokenizer, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        what = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"--tokenizer {tokens.tokenizer} cannot be loaded: {what}", "give the folder or name of a model") from None
    cut: Any = "cut" if tokens.too_long == "reject" else tokens.too_long
    return [Renderer(tokenizer, RenderSettings(tokens.max_length, how)) for how in ("reject", cut)]


def _look_at_tokens(survey: Survey, table: pa.Table, renderers: Sequence[Renderer]) -> None:
    """What becomes of the examples in tokens: as they are, and for what is too long, as cut."""
    whole, cut = renderers
    examples = examples_of(table)
    made = list(whole.render(examples))
    over = [n for n, m in enumerate(made) if isinstance(m, Rejected) and m.category == "too long"]
    for n, again in zip(over, cut.render([examples[n] for n in over]), strict=True):
        made[n] = again
    rejected = {n: m.category for n, m in enumerate(made) if isinstance(m, Rejected)}
    identical = [n for n, category in rejected.items() if category.startswith("identical") and not _alike(examples[n])]
    refused = [n for n, category in rejected.items() if not category.startswith("identical") and n not in set(over)]
    for name, rows in (("over_long", over), ("identical_after_truncation", identical), ("not_renderable", refused)):
        survey.hit(name, Hits.of(np.array(rows, np.int64)), survey.rows)
    lengths = np.array([m.longest for m in made if not isinstance(m, Rejected)], np.int64)
    survey.summary += Summary(tokens=length_histogram(lengths), render_rejects=Counter(rejected.values()))


def _alike(example: Example) -> bool:
    """Whether two answers are the same text, so that no truncation is to blame."""
    return len({"".join(a) for a in example.answers}) < len(example.answers)


# ------------------------------------------------------------------------------------------------------------ the findings

_LOCAL: dict[str, Severity] = {
    "identical": "error",
    "empty": "error",
    "exact_duplicates": "error",
    "contradictions": "error",
    "near_identical_answers": "warning",
    "low_agreement": "warning",
    "near_empty": "note",
    "mixed_scripts": "note",
}


def _local(survey: Survey, settings: LintSettings, tokens: TokenSettings, rendered: bool) -> list[Finding]:
    """What was seen chunk by chunk."""
    s = survey.summary
    severities = dict(_LOCAL)
    if rendered:
        loses = tokens.too_long != "reject"  # rejecting, training never sees a cut pair
        severities |= {"over_long": "warning", "not_renderable": "warning", "identical_after_truncation": "error" if loses else "warning"}
    found = []
    for name, severity in severities.items():
        hits = survey.found(name)
        numbers = dict(s.render_rejects) if name == "not_renderable" else {}
        outvoted = np.concatenate(survey.outvoted) if name == "contradictions" else np.empty(0, np.int64)
        found.append(Finding(name, severity, len(hits.rows), s.examples, "examples", numbers, hits, hits.rows, outvoted))
    masked, places = s.counts[0], sum(s.counts.values())
    found.append(Finding("ties", "note", s.ties, s.comparisons, "comparisons"))
    found.append(Finding("missing_targets", "note", masked, places, "targets"))
    first = round(s.listed_first.total)
    if s.listed_first.total < s.listed_first.weight:  # pairs list the better side first, always: nothing to look at
        found.append(Finding("listed_first", "note", first, round(s.listed_first.weight), "comparisons", _interval(s.listed_first)))
    return [*found, *_biases(s, settings)]


def _interval(ratio: Any) -> dict[str, float]:
    low, high = ratio.interval()
    return {"share": ratio.value, "low": low, "high": high, "prompts": ratio.clusters} if ratio.weight else {}


def _biases(s: Summary, settings: LintSettings) -> list[Finding]:
    """The share of the longer and of the first-shown answer, a warning where it is surely far from one half."""
    found = []
    for name, ratio in (("length_bias", s.longer), ("position_bias", s.shown_first)):
        low, high = ratio.interval()
        far = ratio.weight > 0 and (low > 0.5 + settings.bias or high < 0.5 - settings.bias)
        numbers = _interval(ratio)
        if name == "length_bias" and ratio.weight:
            numbers |= {
                "correlation_of_log_length_ratio_and_preference": s.length_preferred.correlation,
                "correlation_of_log_length_ratio_and_target_difference": s.length_target.correlation,
            }
        severity: Severity = "warning" if far else "note"
        found.append(Finding(name, severity, round(ratio.total), round(ratio.weight), "comparisons, by weight", numbers))
    return found


def _global(survey: Survey, source: Source, settings: LintSettings, asked: Sketches, answered: Sketches) -> list[Finding]:
    """What concerns several prompts."""
    row, side, name, weight = (_joined(a) for a in (survey.prompt_row, survey.prompt_side, survey.prompt_hash, survey.prompt_weight))
    known, number = np.unique(name, return_inverse=True)
    del name
    found = [_dominating(np.bincount(number, weight), settings)]
    near = asked.pairs()
    there = near.texts
    partner = near.partners(side[there], number[there])
    own = partner[np.arange(len(there)), side[there]]
    hits = Hits(row[there[own >= 0]], row[own[own >= 0]])
    found.append(Finding("near_duplicate_prompts", "warning", len(hits.rows), len(row), "prompts", _crowded(near), hits))
    if len(source.sides) > 1:
        found += _across(row, np.r_[row[1:], survey.rows], side, number, near, partner, len(known))
    answer_row = _joined(survey.answer_row)
    near = answered.pairs()
    there = near.texts
    prompt = number[np.searchsorted(row, answer_row[there], side="right") - 1]
    other = near.partners(np.zeros(len(there), np.int64), prompt)[:, 0]
    hits = Hits(answer_row[there[other >= 0]], answer_row[other[other >= 0]])
    severity: Severity = "warning" if len(hits.rows) > 0.05 * len(answer_row) else "note"
    found.append(Finding("near_duplicate_answers", severity, len(hits.rows), len(answer_row), "answers", _crowded(near), hits))
    return found


def _joined(pieces: list[np.ndarray]) -> np.ndarray:
    """The pieces as one array; they are let go."""
    whole = np.concatenate(pieces)
    pieces.clear()
    return whole


def _crowded(near: Near) -> dict[str, int]:
    """How many texts were not compared with all of their bucket, where there are any."""
    return {"crowded": near.crowded} if near.crowded else {}


def _across(
    row: np.ndarray, ends: np.ndarray, side: np.ndarray, number: np.ndarray, near: Near, partner: np.ndarray, prompts: int
) -> list[Finding]:
    """Prompts that are, exactly or nearly, also on a later side; they are taken out of the earlier one, which trains."""
    several = np.flatnonzero(np.bincount(number)[number] > 1)  # on one side a prompt is there once
    same = np.full((prompts, int(side.max()) + 1), -1)
    same[number[several], side[several]] = several
    found = []
    taken = np.zeros(len(row), bool)
    for name, texts, others, numbers in (
        ("prompts_across_sides", several, same[number[several]], {}),
        ("near_duplicates_across_sides", near.texts, partner, _crowded(near)),
    ):
        later = np.where(np.arange(others.shape[1]) > side[texts][:, None], others, -1).max(axis=1)
        new = (later >= 0) & ~taken[texts]
        some = texts[new]
        taken[some] = True
        fix = np.concatenate([np.arange(row[n], ends[n]) for n in some]) if len(some) else np.empty(0, np.int64)
        found.append(Finding(name, "error", len(some), prompts, "prompts", numbers, Hits(row[some], row[later[new]]), fix))
    return found


def _dominating(weight: np.ndarray, settings: LintSettings) -> Finding:
    """How much of the weight lies on the heaviest 1 % of the prompts."""
    top = max(1, len(weight) // 100)
    share = float(np.sort(weight)[-top:].sum() / weight.sum())
    far = len(weight) >= 100 and share > settings.dominating
    numbers = {"share": share, "heaviest": float(weight.max()), "median": float(np.median(weight))}
    return Finding("dominating_prompts", "warning" if far else "note", top, len(weight), "prompts", numbers)


def _overlap(survey: Survey, source: Source, evaluation_set: EvaluationSet) -> list[Finding]:
    """What is trained on and evaluated with."""
    exact, gram, answers = (survey.found(f"{n}:{evaluation_set.name}").rows for n in ("exact", "gram", "answers"))
    rows = np.union1d(exact, gram)
    trained = _rows_of_side(survey, source)
    numbers = {
        "exact": len(exact),
        "by_13_words": len(gram),
        "evaluation_prompts": len(evaluation_set.prompts),
        "evaluation_prompts_in_training": int(evaluation_set.seen.sum()),
        "rows_not_read": evaluation_set.unreadable,
    }
    only = np.setdiff1d(answers, rows)
    return [
        Finding(f"overlap:{evaluation_set.name}", "error", len(rows), trained, "examples", numbers, Hits.of(rows), rows),
        Finding(f"overlap_answers:{evaluation_set.name}", "warning", len(only), trained, "examples", {}, Hits.of(only)),
    ]


def _rows_of_side(survey: Survey, source: Source) -> int:
    return [*source.first_rows().values(), survey.rows][1]


# -------------------------------------------------------------------------------------------------------- ids and the cases


def _with_cases(source: Source, findings: Sequence[Finding], excerpt: int) -> list[Finding]:
    """The findings with the ids of all their rows and the texts of the worst, from a second look at only these."""
    wanted = np.unique(np.concatenate([np.r_[f.hits.rows, f.hits.partners] for f in findings]))
    shown = np.unique(np.concatenate([np.r_[f.hits.rows[:WORST], f.hits.partners[:WORST]] for f in findings]))
    ids: dict[int, str] = {-1: ""}
    texts: dict[int, dict[str, Any]] = {}
    for side, first, path in _numbered_parts(source):
        rows = row_count(path)
        here = wanted[(wanted >= first) & (wanted < first + rows)]
        if not len(here):
            continue
        names = read_table(path, columns=["id"])["id"].take(pa.array(here - first)).to_pylist()
        ids.update(zip(here.tolist(), names, strict=True))
        some = shown[(shown >= first) & (shown < first + rows)]
        if len(some):
            columns = ["prompt_id", "id", "prompt", "answers", "targets"]
            for n, row in zip(some.tolist(), read_table(path, columns=columns).take(pa.array(some - first)).to_pylist(), strict=True):
                texts[n] = _excerpt(row, side, excerpt)
    return [_with_ids(f, ids, texts) for f in findings]


def _with_ids(finding: Finding, ids: Mapping[int, str], texts: Mapping[int, Mapping[str, Any]]) -> Finding:
    rows, partners = finding.hits.rows.tolist(), finding.hits.partners.tolist()
    cases = [
        {**texts[row], "with": texts[partner]} if partner >= 0 else texts[row]
        for row, partner in zip(rows[:WORST], partners[:WORST], strict=True)
    ]
    return replace(finding, cases=cases, ids=[ids[n] for n in rows], partner_ids=[ids[n] for n in partners])


def _numbered_parts(source: Source) -> Iterator[tuple[str, int, Place]]:
    """(side, number of its first row, file) of every part."""
    first = 0
    for side, dataset in source.sides.items():
        for part in dataset.parts:
            yield side, first, part
            first += row_count(part)


def _excerpt(row: Mapping[str, Any], side: str, most: int) -> dict[str, Any]:
    def cut(text: str) -> str:
        return text if len(text) <= most else text[:most] + " ..."

    prompt = "\n".join(f"{m['role']}: {m['content']}" for m in row["prompt"])
    answers = [cut("".join(answer)) for answer in row["answers"][:4]]
    tail = prompt if len(prompt) <= most else "... " + prompt[-most:]
    return {
        "id": row["id"],
        "prompt_id": row["prompt_id"],
        "side": side,
        "prompt": tail,
        "answers": answers,
        "targets": row["targets"][:8],
    }
