"""Votes out of rollouts: who preferred which of two answers, as arrays that add up.

>>> from rayward.records import Message, Rollout, rollouts_table
>>> sides = [
...     Rollout(id=text, prompt=(Message("user", "2+2?"),), steps=(text,), reward=reward, judgement="j", annotator="eve")
...     for text, reward in (("5", 0.0), ("4", 1.0))]
>>> votes = votes_of(rollouts_table(sides))
>>> [(votes.annotators[who], VERDICTS[said]) for who, said in zip(votes.annotator_N, votes.verdict_N)]
[('eve', 'a')]

    N   votes     I   items: a prompt and an unordered pair of answers     A   annotators     C   VERDICTS     K   (item, annotator)
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rayward.errors import DataError
from rayward.storage import Dataset, read_table

Array = Any  # a numpy array
VERDICTS = ("a", "tie", "b")  # `a` is the text that sorts first; a tie lies between, which is the order that ordinal measures use
COLUMNS = ("prompt_id", "steps", "reward", "judgement", "annotator", "continues", "provenance")  # what votes are read from
CARRY_VOTES = ("votes", "pandalm", "helpsteer3", "summarize", "arena_conversations", "alpaca_eval")  # formats whose rows name annotators


@dataclass(frozen=True, eq=False)
class Votes:
    """Who preferred what, sorted by (item, annotator, verdict); votes of several parts add up."""

    items: Array = field(default_factory=lambda: np.empty(0, "S32"))  # (I,) sorted; BLAKE2b of the prompt's id and both texts, in hex
    annotators: tuple[str, ...] = ()  # A of them, sorted
    item_N: Array = field(default_factory=lambda: np.empty(0, np.int64))  # place in `items`
    annotator_N: Array = field(default_factory=lambda: np.empty(0, np.int64))  # place in `annotators`
    verdict_N: Array = field(default_factory=lambda: np.empty(0, np.int8))  # place in VERDICTS
    first_N: Array = field(
        default_factory=lambda: np.empty(0, np.int8)
    )  # 1: what was shown first is preferred, 0: second, -1: unknown, tie
    left_out: Mapping[str, int] = field(default_factory=dict)  # judgements that are no votes, by reason

    def __len__(self) -> int:
        return len(self.item_N)

    def __add__(self, other: Votes) -> Votes:
        return gather([self, other])

    def count_IC(self) -> Array:
        """How many votes every item has for every verdict, (I, C)."""
        C = len(VERDICTS)
        return np.bincount(self.item_N * C + self.verdict_N, minlength=len(self.items) * C).reshape(-1, C)


def gather(parts: Iterable[Votes]) -> Votes:
    """The votes of many parts, put together in one step; it does not matter in which order they come."""
    parts = list(parts)
    if not parts:
        return Votes()
    names = tuple(sorted({name for part in parts for name in part.annotators}))
    place = {name: n for n, name in enumerate(names)}
    places = [np.array([place[name] for name in part.annotators], np.int64) for part in parts]
    items, at = np.unique(np.concatenate([part.items for part in parts]), return_inverse=True)
    starts = np.cumsum([0, *(len(part.items) for part in parts)])
    return _sorted(
        items,
        names,
        np.concatenate([at[part.item_N + start] for part, start in zip(parts, starts, strict=False)]),
        np.concatenate([new[part.annotator_N] for part, new in zip(parts, places, strict=True)]),
        np.concatenate([part.verdict_N for part in parts]),
        np.concatenate([part.first_N for part in parts]),
        dict(sum((Counter(part.left_out) for part in parts), Counter())),
    )


def _sorted(
    items: Array, names: tuple[str, ...], item: Array, annotator: Array, verdict: Array, first: Array, out: dict[str, int]
) -> Votes:
    order = np.lexsort((first, verdict, annotator, item))
    return Votes(items, names, item[order], annotator[order], verdict[order], first[order], out)


def votes_of(table: pa.Table) -> Votes:
    """The votes in a table of rollouts (COLUMNS of ROLLOUT_SCHEMA): one per judgement of exactly two whole answers with rewards.

    Higher reward is preferred, equal rewards are a tie. An item is a prompt and two texts, whichever was shown first and under whatever
    ids. Judgements that are no votes are counted in `left_out`; continuations are no answers and belong to no judgement here.
    """
    table = table.select(COLUMNS).combine_chunks()
    table = table.filter(pc.is_null(table["continues"])).combine_chunks()
    _, judgement, size = np.unique(
        _joint(_codes(table["prompt_id"]), _codes(pc.fill_null(table["judgement"], ""))), return_inverse=True, return_counts=True
    )
    order = np.argsort(judgement, kind="stable")
    starts = np.cumsum(size) - size
    rows = order[starts[size == 2][:, None] + np.arange(2)]  # (judgements, 2)
    left_out = Counter({f"{n} answer{'s' * (n > 1)}": int((size == n).sum()) for n in set(size[size != 2].tolist())})

    def keep(good: Array, otherwise: str) -> None:
        nonlocal rows
        left_out[otherwise] += int((~good).sum())
        rows = rows[good]

    reward = pc.fill_null(table["reward"], math.nan).to_numpy()
    keep(~np.isnan(reward[rows]).any(1), "no reward")
    named = np.asarray(pc.is_valid(table["annotator"]))
    keep(named[rows].all(1), "no annotator")
    who = _codes(pc.fill_null(table["annotator"], ""))
    keep(who[rows[:, 0]] == who[rows[:, 1]], "two annotators")
    text = pc.binary_join(table["steps"].combine_chunks(), "")
    if isinstance(text, pa.ChunkedArray):
        text = text.combine_chunks()
    code = _codes(text)
    keep(code[rows[:, 0]] != code[rows[:, 1]], "identical answers")
    swap = np.asarray(pc.greater(text.take(pa.array(rows[:, 0])), text.take(pa.array(rows[:, 1]))))
    rows = np.where(swap[:, None], rows[:, ::-1], rows)  # the text that sorts first stands first
    gap = np.sign(reward[rows[:, 1]] - reward[rows[:, 0]]).astype(np.int64)  # -1: a is preferred, 1: b
    items, item = _items(table["prompt_id"], text, code, rows)
    names, annotator = np.unique(np.array(table["annotator"].take(pa.array(rows[:, 0])).to_pylist(), dtype=object), return_inverse=True)
    first = _shown_first(table["provenance"], rows, gap)
    return _sorted(items, tuple(names.tolist()), item, annotator, (gap + 1).astype(np.int8), first, dict(+left_out))


def _codes(column: Any) -> Array:
    """Whole numbers that are equal where the texts are."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return array.dictionary_encode().indices.to_numpy().astype(np.int64)


def _joint(left: Array, right: Array) -> Array:
    """Whole numbers below their count that are equal where both are."""
    return np.unique(left * (right.max(initial=0) + 1) + right, return_inverse=True)[1]


def _items(prompt_ids: Any, text: pa.Array, code: Array, rows: Array) -> tuple[Array, Array]:
    """The names of the items of some votes, sorted, and the place of each vote's item among them."""
    if not len(rows):
        return np.empty(0, "S32"), np.empty(0, np.int64)
    same = _joint(_codes(prompt_ids)[rows[:, 0]], _joint(code[rows[:, 0]], code[rows[:, 1]]))
    one = rows[np.unique(same, return_index=True)[1]]  # one vote of every item
    prompts = prompt_ids.take(pa.array(one[:, 0])).to_pylist()
    sides = (text.take(pa.array(one[:, side])).to_pylist() for side in (0, 1))
    names = np.array([_item(*said) for said in zip(prompts, *sides, strict=True)], "S32")
    order = np.argsort(names)
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    return names[order], place[same]


def _item(prompt: str, a: str, b: str) -> bytes:
    said = [part.encode() for part in (prompt, a, b)]
    digest = hashlib.blake2b(",".join(str(len(part)) for part in said).encode(), digest_size=16)
    for part in said:
        digest.update(part)
    return digest.hexdigest().encode()


def _shown_first(provenance: Any, rows: Array, gap: Array) -> Array:
    """1 where the preferred answer has position 1 or the other has position 2, 0 the other way round, -1 where neither is said."""
    found = pc.fill_null(pc.map_lookup(provenance, "position", "first"), "")
    place = np.zeros(len(found), np.int8)
    for n in (1, 2):
        place[np.asarray(pc.equal(found, str(n)))] = n
    a, b = place[rows].T
    a = np.where(a == b, 0, np.where(a > 0, a, (3 - b) % 3))  # both unknown, or both the same: unknown
    preferred = np.where(gap == 0, 0, np.where(gap < 0, a, (3 - a) % 3))
    return np.array([-1, 1, 0], np.int8)[preferred]


def read_votes(dataset: Dataset) -> Votes:
    """The votes in a dataset of rollouts, read part by part; DataError where it holds none."""
    votes = gather(votes_of(read_table(part, columns=COLUMNS)) for part in dataset.parts)
    if not len(votes):
        why = ", ".join(f"{reason} {n:,}" for reason, n in sorted(votes.left_out.items())) or "it holds no judgement"
        raise DataError(
            f"{dataset.path} holds no votes: {why}",
            "a vote is a judgement of two answers with rewards that names its annotator; bring votes in with import_rollouts --format "
            f"{', '.join(CARRY_VOTES)}; or --format rollouts with the keys `judgement` and `annotator`",
        )
    return votes


def one_voice(votes: Votes) -> Votes:
    """Every annotator once per item, with the verdict given most often; left out where there is no such one. Positions are forgotten."""
    if not len(votes):
        return votes
    start_K, count_KC = by_annotator(votes)
    clear_K = (count_KC == count_KC.max(1, keepdims=True)).sum(1) == 1
    kept = start_K[clear_K]
    left_out = Counter(votes.left_out) + Counter({"contradicts itself": int((~clear_K).sum())})
    return Votes(
        votes.items,
        votes.annotators,
        votes.item_N[kept],
        votes.annotator_N[kept],
        count_KC[clear_K].argmax(1).astype(np.int8),
        np.full(len(kept), -1, np.int8),
        dict(left_out),
    )


def by_annotator(votes: Votes) -> tuple[Array, Array]:
    """Where the votes of every annotator on every item start, (K,), and how many there are for every verdict, (K, C)."""
    new = (np.diff(votes.item_N, prepend=-1) != 0) | (np.diff(votes.annotator_N, prepend=-1) != 0)
    group, C = np.cumsum(new) - 1, len(VERDICTS)
    return np.flatnonzero(new), np.bincount(group * C + votes.verdict_N, minlength=int(new.sum()) * C).reshape(-1, C)
