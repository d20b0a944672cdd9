"""Labelers: all rollouts of one prompt in, examples out, and for every rollout that none was made from, the reason.

>>> from rayward.records import Message
>>> q = (Message("user", "2+2?"),)
>>> said = [Rollout(id=i, prompt=q, steps=(i,), reward=r, judgement="j") for i, r in (("4", 1.0), ("5", 0.0), ("four", 1.0))]
>>> [(e.answers, e.targets, e.weight) for e in pairs(said, PairSettings())]
[((('4',), ('5',)), (1.0, 0.0), 0.5), ((('four',), ('5',)), (1.0, 0.0), 0.5)]

Answers are compared inside a judgement only: from a > b and c > d no labeler makes a > d.

A labeler is a readable function on the rollouts of one prompt. Where it is hot it has a twin that does the same for a whole sorted
table at once (`VECTORISED`); a test holds the two equal on random rollouts. To add a labeler: write the function and its settings,
and enter them into LABELERS.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rayward.records import (
    EXAMPLE_SCHEMA,
    Example,
    Rejected,
    Rollout,
    examples_table,
    prompt_id,
    rejects_table,
    rollouts_of,
)
from rayward.steps import Value, prefix_values

CONTINUATION = "a continuation: it shares its start with {}"
NO_REWARD = "no reward"
ALONE = "alone in its judgement"
NO_PARTNER = "no partner: no answer of its judgement differs in text and, by {} or more, in reward"
ALL_TIED = "all tied: {} answers of its judgement share reward {:g}"


def _reject(rollout: Rollout, reason: str) -> Rejected:
    return Rejected(source="rollouts", row=rollout.id, reason=reason)


def _judgements(rollouts: Iterable[Rollout]) -> Iterator[list[Rollout] | Rejected]:
    """Whole graded answers by judgement, in order of id; what cannot be compared is rejected."""
    by_judgement: dict[str, list[Rollout]] = {}
    for rollout in sorted(rollouts, key=lambda r: r.id):
        if rollout.continues is not None:
            yield _reject(rollout, CONTINUATION.format(rollout.continues))
        elif rollout.reward is None:
            yield _reject(rollout, NO_REWARD)
        else:
            by_judgement.setdefault(rollout.judgement, []).append(rollout)
    for judgement in sorted(by_judgement):
        if len(by_judgement[judgement]) == 1:
            yield _reject(by_judgement[judgement][0], ALONE)
        else:
            yield by_judgement[judgement]


# ------------------------------------------------------------------------------------------------------------------- pairs


@dataclass(frozen=True)
class PairSettings:
    """Which pairs are made of a judgement."""

    choose: Literal["all", "best_worst", "adjacent"] = "all"  # of the answers sorted by reward: every two, the ends, neighbours
    min_gap: float = 0.0  # least difference of rewards between the two sides; equal rewards never make a pair

    def __post_init__(self) -> None:
        if not self.min_gap >= 0:
            raise ValueError(f"min_gap={self.min_gap} must be at least 0")

    def places(self, answers: int) -> list[tuple[int, int]]:
        """Which places of a sorted list of answers make a pair.

        >>> PairSettings().places(3), PairSettings("best_worst").places(3), PairSettings("adjacent").places(3)
        ([(0, 1), (0, 2), (1, 2)], [(0, 2)], [(0, 1), (1, 2)])
        """
        if self.choose == "best_worst":
            return [(0, answers - 1)]
        if self.choose == "adjacent":
            return [(i, i + 1) for i in range(answers - 1)]
        return list(itertools.combinations(range(answers), 2))


def pairs(rollouts: Sequence[Rollout], settings: PairSettings) -> Iterator[Example | Rejected]:
    """The better answer first; targets are the rewards, so their difference is the margin; a judgement's pairs weigh 1 together."""
    for answers in _judgements(rollouts):
        if isinstance(answers, Rejected):
            yield answers
            continue
        answers = sorted(answers, key=lambda r: -_reward(r))
        made = [
            (answers[i], answers[j])
            for i, j in settings.places(len(answers))
            if _reward(answers[i]) - _reward(answers[j]) >= max(settings.min_gap, 1e-300) and answers[i].text != answers[j].text
        ]
        for better, worse in made:
            yield Example(
                id=f"{better.id}>{worse.id}",
                prompt=better.prompt,
                answers=((better.text,), (worse.text,)),
                targets=(_reward(better), _reward(worse)),
                counts=(1, 1),
                weight=1 / len(made),
                rollouts=(better.id, worse.id),
                provenance={"judgement": better.judgement},
            )
        used = {r.id for pair in made for r in pair}
        for answer in answers:
            if answer.id not in used:
                yield _reject(answer, NO_PARTNER.format(settings.min_gap))


def _reward(rollout: Rollout) -> float:
    assert rollout.reward is not None
    return rollout.reward


class Labelled(NamedTuple):
    """What a labeler made of a table of rollouts."""

    examples: pa.Table  # EXAMPLE_SCHEMA
    rejects: pa.Table  # REJECT_SCHEMA
    used: int  # rollouts that some example was made from


def pairs_table(table: pa.Table, settings: PairSettings) -> Labelled:
    """`pairs` for a whole table sorted by (prompt_id, id), without a Python step per row."""
    groups = _Groups.of(table)
    better, worse = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for size in np.unique(groups.sizes[groups.sizes > 1]):
        places = np.array(settings.places(int(size))).reshape(-1, 2)
        rows = groups.rows_of_size(int(size))  # (groups, size)
        better.append(rows[:, places[:, 0]].ravel())
        worse.append(rows[:, places[:, 1]].ravel())
    a, b = np.concatenate(better), np.concatenate(worse)
    with np.errstate(over="ignore"):
        keep = (groups.reward[a] - groups.reward[b] >= max(settings.min_gap, 1e-300)) & (groups.text_code[a] != groups.text_code[b])
    a, b = a[keep], b[keep]
    of_group = groups.group_of_row[a]
    weight = 1.0 / np.bincount(of_group, minlength=1)[of_group] if len(a) else np.empty(0)
    used = np.zeros(table.num_rows, bool)
    used[a] = used[b] = True
    both = np.column_stack([a, b]).ravel()
    ids = table["id"]
    examples = _examples(
        table.take(a),
        ids=pc.binary_join_element_wise(ids.take(a), ids.take(b), ">"),
        answers=groups.text.take(both),
        answer_count=np.full(len(a), 2),
        targets=groups.reward[both],
        weight=weight,
        rollouts=ids.take(both),
    )
    return Labelled(examples, groups.rejects(used, lambda row: NO_PARTNER.format(settings.min_gap)), int(used.sum()))


# ---------------------------------------------------------------------------------------------------------------- rankings


@dataclass(frozen=True)
class RankingSettings:
    """Which rankings are made."""

    max_answers: int = 64  # a judgement of more answers is rejected: split it, or raise this

    def __post_init__(self) -> None:
        if self.max_answers < 2:
            raise ValueError(f"max_answers={self.max_answers} must be at least 2")


def rankings(rollouts: Sequence[Rollout], settings: RankingSettings) -> Iterator[Example | Rejected]:
    """One example per judgement with all its answers, in order of id; targets are the rewards, equal ones are a tie."""
    for answers in _judgements(rollouts):
        if isinstance(answers, Rejected):
            yield answers
        elif len({_reward(r) for r in answers}) == 1:
            yield from (_reject(r, ALL_TIED.format(len(answers), _reward(r))) for r in answers)
        elif len(answers) > settings.max_answers:
            yield from (_reject(r, _too_many(len(answers), settings)) for r in answers)
        else:
            yield Example(
                id=f"{answers[0].judgement}@{prompt_id(answers[0].prompt)[:16]}",
                prompt=answers[0].prompt,
                answers=tuple((r.text,) for r in answers),
                targets=tuple(map(_reward, answers)),
                counts=(1,) * len(answers),
                rollouts=tuple(r.id for r in answers),
                provenance={"judgement": answers[0].judgement},
            )


def _too_many(answers: int, settings: RankingSettings) -> str:
    return f"too many answers: {answers} > max_answers={settings.max_answers}"


def rankings_table(table: pa.Table, settings: RankingSettings) -> Labelled:
    """`rankings` for a whole table sorted by (prompt_id, id)."""
    groups = _Groups.of(table, by_reward=False)
    starts = groups.starts
    if len(starts):
        ordered = groups.reward[groups.order]
        tied = np.maximum.reduceat(ordered, starts) == np.minimum.reduceat(ordered, starts)
    else:
        tied = np.empty(0, bool)
    kept = ~tied & (groups.sizes <= settings.max_answers) & (groups.sizes > 1)
    rows = groups.order[np.repeat(kept, groups.sizes)]
    first = groups.order[starts[kept]]
    used = np.zeros(table.num_rows, bool)
    used[rows] = True
    ids = table["id"]
    judgement, prompt = table["judgement"].take(first), pc.utf8_slice_codeunits(table["prompt_id"].take(first), 0, 16)
    examples = _examples(
        table.take(first),
        ids=pc.binary_join_element_wise(judgement, prompt, "@"),
        answers=groups.text.take(rows),
        answer_count=groups.sizes[kept],
        targets=groups.reward[rows],
        weight=np.ones(len(first)),
        rollouts=ids.take(rows),
    )

    def why(row: int) -> str:
        group = groups.group_of_row[row]
        size = int(groups.sizes[group])
        return ALL_TIED.format(size, groups.reward[row]) if tied[group] else _too_many(size, settings)

    return Labelled(examples, groups.rejects(used, why), int(used.sum()))


# --------------------------------------------------------------------------------------------------------- what twins share


@dataclass(frozen=True)
class _Groups:
    """The comparable rows of a table by (prompt, judgement): `order` lists them group after group."""

    table: pa.Table
    text: pa.Array  # the whole answer of every row
    text_code: np.ndarray  # equal where texts are equal
    reward: np.ndarray  # NaN where there is none
    order: np.ndarray  # rows that can be compared
    starts: np.ndarray  # of each group in `order`
    sizes: np.ndarray
    group_of_row: np.ndarray  # -1 where a row cannot be compared

    @classmethod
    def of(cls, table: pa.Table, by_reward: bool = True) -> _Groups:
        """Group rows; inside a group by falling reward and then id, or by id alone."""
        text = pc.binary_join(_one_chunk(table["steps"]), "")
        reward = pc.fill_null(_one_chunk(table["reward"]), float("nan")).to_numpy()
        able = np.flatnonzero(~np.isnan(reward) & _one_chunk(table["continues"]).is_null().to_numpy(zero_copy_only=False))
        prompt, judgement = (_codes(_one_chunk(table[name])) for name in ("prompt_id", "judgement"))
        group = prompt * (judgement.max(initial=0) + 1) + judgement
        keys = (able, -reward[able], group[able]) if by_reward else (able, group[able])
        order = able[np.lexsort(keys)]
        starts = np.flatnonzero(np.r_[True, group[order][1:] != group[order][:-1]]) if len(order) else np.empty(0, np.int64)
        sizes = np.diff(np.r_[starts, len(order)]).astype(np.int64)
        group_of_row = np.full(table.num_rows, -1, np.int64)
        group_of_row[order] = np.repeat(np.arange(len(starts)), sizes)
        return cls(table, text, _codes(text), reward, order, starts, sizes, group_of_row)

    def rows_of_size(self, size: int) -> np.ndarray:
        """The groups of one size as a matrix of row numbers, (groups, size)."""
        return self.order[self.starts[self.sizes == size][:, None] + np.arange(size)]

    def rejects(self, used: np.ndarray, why: Callable[[int], str]) -> pa.Table:
        """What is left over, with its reason; `why` speaks for comparable rows of groups of two or more."""
        left = np.flatnonzero(~used)
        ids, continues = self.table["id"].take(left).to_pylist(), self.table["continues"].take(left).to_pylist()
        rejects = []
        for row, row_id, parent in zip(left.tolist(), ids, continues, strict=True):
            group = int(self.group_of_row[row])
            if parent is not None:
                reason = CONTINUATION.format(parent)
            elif group < 0:
                reason = NO_REWARD
            else:
                reason = ALONE if self.sizes[group] == 1 else why(row)
            rejects.append(Rejected(source="rollouts", row=row_id, reason=reason))
        return rejects_table(rejects)


def _one_chunk(column: pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)


def _codes(array: pa.Array) -> np.ndarray:
    return pc.fill_null(array, "").dictionary_encode().indices.to_numpy().astype(np.int64)


def _examples(
    first: pa.Table, *, ids: Any, answers: Any, answer_count: np.ndarray, targets: np.ndarray, weight: np.ndarray, rollouts: Any
) -> pa.Table:
    """One-segment examples from flat arrays: `answer_count` answers each, and what else a row has from its first rollout."""
    n, total = len(first), len(targets)
    offsets = pa.array(np.r_[0, np.cumsum(answer_count)].astype(np.int32))
    segments = pa.ListArray.from_arrays(pa.array(np.arange(total + 1, dtype=np.int32)), answers)
    columns = {
        "prompt_id": first["prompt_id"],
        "id": ids,
        "prompt": first["prompt"],
        "answers": pa.ListArray.from_arrays(offsets, segments),
        "targets": pa.ListArray.from_arrays(offsets, pa.array(targets, pa.float64())),
        "counts": pa.ListArray.from_arrays(offsets, pa.array(np.ones(total, np.int32))),
        "weight": pa.array(weight, pa.float64()),
        "rollouts": pa.ListArray.from_arrays(offsets, _one_chunk(rollouts)),
        "provenance": pa.MapArray.from_arrays(
            pa.array(np.arange(n + 1, dtype=np.int32)), pa.array(["judgement"] * n, pa.string()), _one_chunk(first["judgement"])
        ),
    }
    return pa.table(columns, schema=EXAMPLE_SCHEMA)


# ---------------------------------------------------------------------------------------------------------------- outcomes


@dataclass(frozen=True)
class OutcomeSettings:
    """Which outcome examples are made."""


def outcomes(rollouts: Sequence[Rollout], settings: OutcomeSettings) -> Iterator[Example | Rejected]:
    """Right or wrong per answer: one example with all graded answers of a prompt (they are never compared, so judgements mix)."""
    known = []
    for rollout in sorted(rollouts, key=lambda r: r.id):
        if rollout.continues is not None:
            yield _reject(rollout, CONTINUATION.format(rollout.continues))
        elif rollout.correct is None:
            yield _reject(rollout, "no outcome")
        else:
            known.append(rollout)
    if known:
        yield Example(
            id=f"outcomes@{prompt_id(known[0].prompt)[:16]}",
            prompt=known[0].prompt,
            answers=tuple((r.text,) for r in known),
            targets=tuple(float(bool(r.correct)) for r in known),
            counts=(1,) * len(known),
            rollouts=tuple(r.id for r in known),
        )


# ------------------------------------------------------------------------------------------------------------------- steps


@dataclass(frozen=True)
class StepSettings:
    """How step values are estimated from continuations."""

    estimate: Literal["soft", "hard"] = "soft"  # share of continuations that end right, or 1 if any does
    min_continuations: int = 2  # graded continuations that every step but the last must have

    def __post_init__(self) -> None:
        if self.min_continuations < 1:
            raise ValueError(f"min_continuations={self.min_continuations} must be at least 1")


def steps(rollouts: Sequence[Rollout], settings: StepSettings) -> Iterator[Example | Rejected]:
    """The value of every step prefix from what continued it; the last step's is the answer's own outcome, known without sampling."""
    by_id = sorted(rollouts, key=lambda r: r.id)
    continuations: dict[str, list[Rollout]] = {}
    for rollout in by_id:
        if rollout.continues is not None:
            continuations.setdefault(rollout.continues, []).append(rollout)
    for answer in by_id:
        if answer.continues is not None:
            continue
        mine = []
        for c in continuations.pop(answer.id, []):
            if 1 <= c.kept_steps < len(answer.steps) and c.steps[: c.kept_steps] == answer.steps[: c.kept_steps]:
                mine.append(c)
            else:
                yield _reject(
                    c, f"not a continuation: it does not keep the first {c.kept_steps} of {len(answer.steps)} steps of {answer.id}"
                )
        values = prefix_values((c.kept_steps, c.correct) for c in mine)
        short = [n for n in range(1, len(answer.steps)) if values.get(n, Value()).count < settings.min_continuations]
        if answer.correct is None:
            reason = "no outcome"
        elif not mine and len(answer.steps) > 1:
            reason = "no continuations"
        elif short:
            have = values.get(short[0], Value()).count
            reason = f"too few continuations: {have} < {settings.min_continuations} graded ones after step {short[0]}"
        else:
            reason = ""
        if reason:
            yield _reject(answer, reason)
            yield from (_reject(c, "its answer was rejected: " + reason) for c in mine)
            continue
        known = [values[n] for n in range(1, len(answer.steps))]
        yield Example(
            id=f"steps@{answer.id}",
            prompt=answer.prompt,
            answers=(answer.steps,),
            targets=(*(v.share if settings.estimate == "soft" else v.any_right for v in known), float(bool(answer.correct))),
            counts=(*(v.count for v in known), 1),
            rollouts=(answer.id, *(c.id for c in mine)),
            provenance={"estimate": settings.estimate},
        )
    for parent, orphans in sorted(continuations.items()):
        yield from (_reject(c, f"no such answer: what it continues, {parent}, is not here") for c in orphans)


# ------------------------------------------------------------------------------------------------------------------- table


class Labeler(NamedTuple):
    """A labeler, its settings class, and the objective that its examples are trained with unless another is named."""

    label: Callable[[Sequence[Rollout], Any], Iterator[Example | Rejected]]
    settings: type
    objective: str


LABELERS: dict[str, Labeler] = {
    "pairs": Labeler(pairs, PairSettings, "bradley_terry"),
    "rankings": Labeler(rankings, RankingSettings, "plackett_luce"),
    "outcomes": Labeler(outcomes, OutcomeSettings, "binary_cross_entropy"),
    "steps": Labeler(steps, StepSettings, "binary_cross_entropy"),
}
VECTORISED: dict[Callable[..., Any], Callable[[pa.Table, Any], Labelled]] = {pairs: pairs_table, rankings: rankings_table}


def label_table(table: pa.Table, labeler: Labeler, settings: Any) -> Labelled:
    """Examples of a table of rollouts sorted by (prompt_id, id), by the fast twin where there is one."""
    if labeler.label in VECTORISED:
        return VECTORISED[labeler.label](table, settings)
    return label_by_prompt(table, labeler, settings)


def label_by_prompt(table: pa.Table, labeler: Labeler, settings: Any) -> Labelled:
    """Examples of a table of rollouts sorted by (prompt_id, id), one prompt after the other; every rollout is accounted for."""
    examples: list[Example] = []
    rejects: list[Rejected] = []
    used_in_all = 0
    hashes = table["prompt_id"].to_pylist()
    start = 0
    for end in range(1, len(hashes) + 1):
        if end < len(hashes) and hashes[end] == hashes[start]:
            continue
        rollouts = rollouts_of(table.slice(start, end - start))
        start = end
        used: set[str] = set()
        left_out: dict[str, Rejected] = {}
        for item in labeler.label(rollouts, settings):
            if isinstance(item, Rejected):
                left_out[item.row] = item
            else:
                examples.append(item)
                used.update(item.rollouts)
        for rollout in rollouts:
            if rollout.id not in used:
                rejects.append(left_out.get(rollout.id) or _reject(rollout, "passed over: the labeler made nothing of it"))
        used_in_all += len(used)
    return Labelled(examples_table(examples), rejects_table(rejects), used_in_all)
