"""Some whole prompts as flat arrays, and what is wrong with them that can be seen without looking at other prompts.

    R rows (examples)    A answers of all of them    C comparisons: two answers of one row that compares answers

Duplicates and contradictions are about one prompt, and all examples of a prompt lie next to each other (`storage`); so they need no
memory beyond a chunk of rows. What concerns several prompts is in `near` and `overlap`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rayward.hygiene.summary import Moments, Ratio, Summary, length_histogram
from rayward.hygiene.texts import SCRIPTS, mix, scripts, sum_by
from rayward.storage import Dataset, opened

ROWS = 4096  # examples that are looked at together, and the rest of the last prompt


def chunks(dataset: Dataset, rows: int = ROWS) -> Iterator[pa.Table]:
    """A dataset in tables of about so many rows that hold whole prompts."""
    for part in dataset.parts:
        left: pa.Table | None = None
        with opened(part) as file:
            for batch in file.iter_batches(batch_size=rows):
                table = pa.Table.from_batches([batch])
                table = table if left is None else pa.concat_tables([left, table])
                names = table["prompt_id"]
                last = int(pc.index(names, names[-1]).as_py())  # sorted: where the last prompt starts
                left = table.slice(last)
                if last:
                    yield table.slice(0, last).combine_chunks()
        if left is not None and left.num_rows:
            yield left.combine_chunks()


def prompt_texts(prompts: pa.Array) -> pa.Array:
    """What is asked, in words: the messages of a prompt but for the system's, a line each."""
    messages = prompts.flatten()
    said = pc.if_else(pc.equal(messages.field("role"), "system"), "", messages.field("content"))
    offsets = np.r_[0, np.cumsum(pc.list_value_length(prompts).to_numpy())].astype(np.int32)
    return pc.binary_join(pa.ListArray.from_arrays(pa.array(offsets), said), "\n")


class Hits(NamedTuple):
    """Rows with a defect; the partner is the other row of it, -1 where there is none. Rows are numbered over the whole source."""

    rows: np.ndarray
    partners: np.ndarray

    @classmethod
    def of(cls, rows: np.ndarray, partners: np.ndarray | None = None) -> Hits:
        """Rows, each once, with one of their partners."""
        unique, at = np.unique(rows, return_index=True)
        return cls(unique, np.full(len(unique), -1) if partners is None else partners[at])

    def shift(self, by: int) -> Hits:
        """The same, with `by` rows before."""
        return Hits(self.rows + by, np.where(self.partners < 0, -1, self.partners + by))


class Clash(NamedTuple):
    """Rows that contradict another row or themselves, and which of them a majority of the votes is against (or not for)."""

    hits: Hits
    outvoted: np.ndarray  # rows


@dataclass(frozen=True)
class Chunk:
    """A table of whole prompts, and its rows' number in the source."""

    table: pa.Table

    def _one(self, name: str) -> pa.Array:
        column = self.table[name]
        return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()

    # ------------------------------------------------------------------------------------------------ rows and prompts

    @cached_property
    def rows(self) -> int:
        """How many rows."""
        return int(self.table.num_rows)

    @cached_property
    def first_R(self) -> np.ndarray:
        """The first row of every prompt, ascending."""
        codes = pc.dictionary_encode(self._one("prompt_id")).indices.to_numpy()
        return np.flatnonzero(np.r_[True, codes[1:] != codes[:-1]])

    @cached_property
    def prompt_R(self) -> np.ndarray:
        """Which prompt of the chunk every row is of."""
        starts = np.zeros(self.rows, np.int64)
        starts[self.first_R[1:]] = 1
        return np.cumsum(starts)

    @cached_property
    def prompt_hash(self) -> np.ndarray:
        """The first 64 bits of the id of every prompt, as uint64."""
        names = self._one("prompt_id").take(pa.array(self.first_R)).to_pylist()
        return np.array([int(name[:16], 16) for name in names], np.uint64)

    @cached_property
    def prompt_text(self) -> pa.Array:
        """What every prompt asks."""
        return prompt_texts(self._one("prompt").take(pa.array(self.first_R)))

    @cached_property
    def weight_R(self) -> np.ndarray:
        """Weights of the rows."""
        return np.asarray(self._one("weight").to_numpy())

    # --------------------------------------------------------------------------------------------------------- answers

    @cached_property
    def answers_R(self) -> np.ndarray:
        """How many answers a row has."""
        return np.asarray(pc.list_value_length(self._one("answers")).to_numpy()).astype(np.int64)

    @cached_property
    def row_A(self) -> np.ndarray:
        """Which row an answer is of."""
        return np.repeat(np.arange(self.rows), self.answers_R)

    @cached_property
    def text_A(self) -> pa.Array:
        """The whole answers."""
        return pc.binary_join(self._one("answers").flatten(), "")

    @cached_property
    def code_A(self) -> np.ndarray:
        """Numbers that are equal where texts are equal."""
        return np.asarray(pc.dictionary_encode(self.text_A).indices.to_numpy()).astype(np.int64)

    @cached_property
    def length_A(self) -> np.ndarray:
        """Characters of an answer."""
        return np.asarray(pc.utf8_length(self.text_A).to_numpy()).astype(np.int64)

    @cached_property
    def filled_A(self) -> np.ndarray:
        """Characters of an answer without the whitespace around it."""
        return np.asarray(pc.utf8_length(pc.utf8_trim_whitespace(self.text_A)).to_numpy()).astype(np.int64)

    @cached_property
    def _segments_A(self) -> np.ndarray:
        return np.asarray(pc.list_value_length(self._one("answers").flatten()).to_numpy()).astype(np.int64)

    @cached_property
    def attributes_R(self) -> np.ndarray:
        """How many attributes a row rates; 0 where its targets have no name."""
        return np.asarray(pc.fill_null(pc.list_value_length(self._one("attributes")), 0).to_numpy()).astype(np.int64)

    @cached_property
    def compared_R(self) -> np.ndarray:
        """Rows whose answers are compared with each other: several whole answers, one target each, not outcomes."""
        outcome = pc.starts_with(self._one("id"), "outcomes@").to_numpy(zero_copy_only=False)
        pieces = np.bincount(self.row_A, self._segments_A, self.rows)
        return (self.answers_R > 1) & (pieces == self.answers_R) & (self.attributes_R == 0) & ~outcome

    @cached_property
    def _last_A(self) -> np.ndarray:
        return np.cumsum(self._segments_A * np.maximum(1, self.attributes_R[self.row_A])) - 1

    @cached_property
    def target_A(self) -> np.ndarray:
        """The target at the end of an answer."""
        return np.asarray(self._one("targets").flatten().to_numpy())[self._last_A]

    @cached_property
    def count_A(self) -> np.ndarray:
        """Judgements behind the target at the end of an answer."""
        return np.asarray(self._one("counts").flatten().to_numpy())[self._last_A].astype(np.int64)

    # ----------------------------------------------------------------------------------------------------- comparisons

    @cached_property
    def _ab_C(self) -> tuple[np.ndarray, np.ndarray]:
        starts = np.cumsum(self.answers_R) - self.answers_R
        a, b = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for size in np.unique(self.answers_R[self.compared_R]):
            i, j = np.triu_indices(int(size), 1)
            rows = np.flatnonzero(self.compared_R & (self.answers_R == size))
            a.append((starts[rows][:, None] + i).ravel())
            b.append((starts[rows][:, None] + j).ravel())
        first, second = np.concatenate(a), np.concatenate(b)
        judged = (self.count_A[first] > 0) & (self.count_A[second] > 0)
        return first[judged], second[judged]

    @property
    def a_C(self) -> np.ndarray:
        """The answer of a comparison that is listed first."""
        return self._ab_C[0]

    @property
    def b_C(self) -> np.ndarray:
        """The other one."""
        return self._ab_C[1]

    @cached_property
    def gap_C(self) -> np.ndarray:
        """Target of a less that of b."""
        with np.errstate(over="ignore"):
            return np.asarray(self.target_A[self.a_C] - self.target_A[self.b_C])

    @cached_property
    def row_C(self) -> np.ndarray:
        """Which row a comparison is of."""
        return np.asarray(self.row_A[self.a_C])

    # --------------------------------------------------------------------------------------------------------- defects

    def identical(self) -> Hits:
        """Rows that prefer a text to itself, or hold nothing but one text twice."""
        same = (self.code_A[self.a_C] == self.code_A[self.b_C]) & ((self.gap_C != 0) | (self.answers_R[self.row_C] == 2))
        return Hits.of(self.row_C[same])

    def empty(self) -> Hits:
        """Rows with an answer, or a prompt, of whitespace only."""
        silent = pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(self.prompt_text)), 0).to_numpy(zero_copy_only=False)
        return Hits.of(np.r_[self.row_A[self.filled_A == 0], np.flatnonzero(silent[self.prompt_R])])

    def near_empty(self, characters: int) -> Hits:
        """Rows with an answer of some, but fewer, characters."""
        return Hits.of(self.row_A[(self.filled_A > 0) & (self.filled_A < characters)])

    def duplicates(self) -> Hits:
        """Rows that repeat an earlier row of the prompt: the same answers, in the same order of preference or with the same verdict."""
        verdict = (self.target_A >= 0.5).astype(np.int64)
        verdict[self.compared_R[self.row_A]] = 0
        verdict[self.attributes_R[self.row_A] > 0] = 0
        wins = np.bincount(np.r_[self.a_C[self.gap_C > 0], self.b_C[self.gap_C < 0]], minlength=len(verdict))
        said = mix(self.code_A.astype(np.uint64) * np.uint64(2) + mix(((wins + verdict) * 2 + 1).astype(np.uint64)))
        content = sum_by(self.row_A, said, self.rows) + mix(self.prompt_R.astype(np.uint64) + np.uint64(1))
        _, first, which = np.unique(content, return_index=True, return_inverse=True)
        again = np.flatnonzero(first[which] != np.arange(self.rows))
        return Hits.of(again, first[which][again])

    def contradictions(self) -> Clash:
        """Rows that prefer a to b where another prefers b to a, or call an answer right where another calls it wrong."""
        texts = int(self.code_A.max(initial=0)) + 1
        a, b = self.code_A[self.a_C], self.code_A[self.b_C]
        told = np.flatnonzero((self.gap_C != 0) & (a != b))
        pair = (self.prompt_R[self.row_C] * texts + np.minimum(a, b)) * texts + np.maximum(a, b)
        forward = (self.gap_C > 0) == (a < b)
        compared = _clash(pair[told], forward[told], self.count_A[self.a_C][told], self.row_C[told])
        graded = ~self.compared_R[self.row_A] & (self.attributes_R[self.row_A] == 0) & (self.count_A > 0)
        told = np.flatnonzero(graded & (self.target_A >= 0) & (self.target_A <= 1) & (self.target_A != 0.5))
        answer = self.prompt_R[self.row_A] * texts + self.code_A
        verdicts = _clash(answer[told], self.target_A[told] > 0.5, self.count_A[told], self.row_A[told])
        hits = Hits.of(np.r_[compared.hits.rows, verdicts.hits.rows], np.r_[compared.hits.partners, verdicts.hits.partners])
        return Clash(hits, np.union1d(compared.outvoted, verdicts.outvoted))

    def low_agreement(self, share: float) -> Hits:
        """Rows of two answers on which several people voted, and fewer than this share of them for the better one."""
        best = np.maximum(self.target_A[self.a_C], self.target_A[self.b_C])
        total = self.target_A[self.a_C] + self.target_A[self.b_C]
        voted = (self.answers_R[self.row_C] == 2) & (self.count_A[self.a_C] > 1) & (np.abs(total - 1) < 1e-6)
        return Hits.of(self.row_C[voted & (best < share)])

    def mixed_scripts(self) -> Hits:
        """Rows with an answer in another script than the prompt."""
        asked = self.prompt_script[self.prompt_R[self.row_A]]
        return Hits.of(self.row_A[(asked > 0) & (self.answer_script > 0) & (asked != self.answer_script)])

    @cached_property
    def prompt_script(self) -> np.ndarray:
        """Script of every prompt."""
        return scripts(self.prompt_text)

    @cached_property
    def answer_script(self) -> np.ndarray:
        """Script of every answer."""
        return scripts(self.text_A)

    # ---------------------------------------------------------------------------------------------------------- counts

    def summary(self) -> Summary:
        """What is counted."""
        graded = ~self.compared_R & (self.attributes_R == 0)
        kinds = {"compared": self.compared_R.sum(), "graded": graded.sum(), "attributes": (self.attributes_R > 0).sum()}
        with np.errstate(divide="ignore"):
            targets = np.asarray(self._one("targets").flatten().to_numpy())
            digits = 10.0 ** (np.floor(np.log10(np.maximum(np.abs(targets), 1e-300))) - 2)
        return Summary(
            examples=self.rows,
            answers=len(self.row_A),
            prompts=len(self.first_R),
            kinds=Counter({k: int(n) for k, n in kinds.items() if n}),
            answers_of_example=_counter(self.answers_R),
            comparisons=len(self.gap_C),
            ties=int((self.gap_C == 0).sum()),
            targets=_counter(np.where(targets == 0, 0.0, np.round(targets / digits) * digits)),
            counts=_counter(self._one("counts").flatten().to_numpy()),
            prompt_scripts=Counter({SCRIPTS[n]: c for n, c in _counter(self.prompt_script).items()}),
            answer_scripts=Counter({SCRIPTS[n]: c for n, c in _counter(self.answer_script).items()}),
            prompt_characters=length_histogram(np.asarray(pc.utf8_length(self.prompt_text).to_numpy())),
            answer_characters=length_histogram(self.length_A),
            **self._biases(),
        )

    def _biases(self) -> dict[str, Any]:
        strict = np.flatnonzero((self.gap_C != 0) & np.isfinite(self.gap_C))
        a, b, gap, row = self.a_C[strict], self.b_C[strict], self.gap_C[strict], self.row_C[strict]
        weight = (self.weight_R / np.maximum(1, np.bincount(row, minlength=self.rows)))[row]
        prompt = self.prompt_R[row]
        sign = np.sign(gap)
        difference = np.sign(self.length_A[a] - self.length_A[b]) * sign
        ratio = np.log((self.length_A[a] + 1) / (self.length_A[b] + 1))
        place_R = self._shown_place()
        shown = (place_R[row] > 0) & (self.answers_R[row] == 2)
        first_won = np.where(place_R[row] == 1, sign > 0, sign < 0)
        return {
            "longer": Ratio.of(prompt, (difference + 1) / 2 * weight, weight),
            "length_preferred": Moments.of(ratio, sign),
            "length_target": Moments.of(ratio, gap),
            "shown_first": Ratio.of(prompt[shown], (first_won * weight)[shown], weight[shown]),
            "listed_first": Ratio.of(prompt, (sign > 0) * weight, weight),
        }

    def _shown_place(self) -> np.ndarray:
        """1 where the first listed answer of a row was shown first, 2 where it was shown second, 0 where nobody said."""
        said = pc.map_lookup(self._one("provenance"), pa.scalar("position"), "first")
        return np.select([pc.fill_null(pc.equal(said, n), False).to_numpy(zero_copy_only=False) for n in ("1", "2")], [1, 2], 0)


def _counter(values: np.ndarray) -> Counter[Any]:
    unique, counts = np.unique(values, return_counts=True)
    return Counter(dict(zip(unique.tolist(), counts.tolist(), strict=True)))


def _clash(group: np.ndarray, forward: np.ndarray, votes: np.ndarray, row: np.ndarray) -> Clash:
    """Rows of groups in which some say forward and some say not."""
    if not len(group):
        return Clash(Hits.of(np.empty(0, np.int64)), np.empty(0, np.int64))
    _, at = np.unique(group, return_inverse=True)
    side = at * 2 + forward
    total = np.bincount(side, votes, 2 * (int(at.max()) + 1))
    other = at * 2 + ~forward
    clashes = total[other] > 0
    first = np.full(len(total), np.iinfo(np.int64).max)
    np.minimum.at(first, side, row)
    rows = row[clashes]
    outvoted = rows[(total[side] <= total[other])[clashes]]
    return Clash(Hits.of(rows, first[other][clashes]), np.unique(outvoted))
