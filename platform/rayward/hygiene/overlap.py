"""Overlap with evaluation sets: what a model trains on must not be what it is judged by.

    exact      the prompt's words are an evaluation prompt's words, all of them in their order
    13-gram    13 words in a row of a prompt are also in an evaluation prompt (or of an answer, in an evaluation answer)

That is the rule of GPT-3 (Brown et al. 2020, arXiv 2005.14165, appendix C: lower case, punctuation ignored, N = 13), with words as in
`texts`. It is applied to fewer things: system messages are left out, and 13 words that more than 10 prompts of the evaluation set share
are its template and do not count. Prompts of fewer than 13 words overlap exactly or not at all.

An evaluation set is held as 8 bytes per prompt and per 13-gram of it, whatever it is compared with.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rayward import formats
from rayward.errors import DataError
from rayward.hygiene.survey import prompt_texts
from rayward.hygiene.texts import Words, fingerprints, grams, mix, words_of
from rayward.places import Place, at, telling
from rayward.records import Example, Prompt, Rejected
from rayward.storage import open_dataset, opened
from rayward.suites import SUITES

GRAM = 13  # words
TEMPLATE = 10  # prompts of a set that may share a 13-gram; more, and it is taken for their template
_ROWS = 4096


class Texts(NamedTuple):
    """Some prompts and answers."""

    prompts: pa.Array
    answers: pa.Array


@dataclass(frozen=True)
class EvaluationSet:
    """The prompts and 13-grams of an evaluation set, sorted hashes."""

    name: str
    came_from: dict[str, Any]  # what a manifest says of it
    prompts: np.ndarray  # uint64: fingerprint of every prompt
    prompt_grams: np.ndarray  # uint64
    answer_grams: np.ndarray  # uint64
    unreadable: int = 0  # rows that are no record
    seen: np.ndarray = field(default_factory=lambda: np.empty(0, bool))  # which of the prompts were met

    def match(self, prompts: Words, answers: Words) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Which prompts are in it exactly, which share 13 words with one of its prompts, which answers with one of its answers."""
        marks = fingerprints(prompts)
        exact = _among(marks, self.prompts) & (prompts.length > 0)
        self.seen[np.searchsorted(self.prompts, marks[exact])] = True
        return exact, _any_among(prompts, self.prompt_grams), _any_among(answers, self.answer_grams)


def _among(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    if not len(known):
        return np.zeros(len(values), bool)
    return np.asarray(known[np.minimum(np.searchsorted(known, values), len(known) - 1)] == values)


def _any_among(words: Words, known: np.ndarray) -> np.ndarray:
    """Which texts hold one of the known 13-grams."""
    if not len(known):
        return np.zeros(len(words.length), bool)
    gram, owner = grams(words, GRAM)
    return np.bincount(owner[_among(gram, known)], minlength=len(words.length)) > 0


def load(source: str) -> EvaluationSet:
    """An evaluation set by the name of a suite, a folder that a pipeline wrote, or a file or folder in a format that is recognised."""
    unreadable: list[Rejected] = []
    prompts: list[np.ndarray] = [np.empty(0, np.uint64)]
    prompt_grams: list[np.ndarray] = [np.empty(0, np.uint64)]
    answer_grams: list[np.ndarray] = [np.empty(0, np.uint64)]
    came_from, texts = _open(source, unreadable)
    for piece in texts:
        asked = words_of(piece.prompts)
        marks = fingerprints(asked)
        _, first = np.unique(marks, return_index=True)
        new = np.zeros(len(marks), bool)
        new[first] = True
        new &= ~np.isin(marks, np.concatenate(prompts)) & (asked.length > 0)
        prompts.append(marks[new])
        gram, owner = grams(asked, GRAM)
        gram, owner = gram[new[owner]], owner[new[owner]]
        _, each = np.unique(mix(gram) + owner.astype(np.uint64), return_index=True)  # once per prompt
        prompt_grams.append(gram[each])
        answer_grams.append(np.unique(grams(words_of(piece.answers), GRAM)[0]))
    if sum(map(len, prompts)) == 0:
        raise DataError(f"--against {source} holds no prompt" + (f" ({unreadable[0].reason})" if unreadable else ""), "look at the file")
    found, times = np.unique(np.concatenate(prompt_grams), return_counts=True)
    known = np.unique(np.concatenate(prompts))
    answers = np.unique(np.concatenate(answer_grams))
    return EvaluationSet(source, came_from, known, found[times <= TEMPLATE], answers, len(unreadable), np.zeros(len(known), bool))


def _open(source: str, unreadable: list[Rejected]) -> tuple[dict[str, Any], Iterator[Texts]]:
    if source in SUITES:
        return {"suite": source}, _of_examples(SUITES[source]())
    folder = at(source)
    with telling(folder):
        sides = [folder] if (folder / "manifest.json").is_file() else sorted(p.parent for p in folder.glob("*/manifest.json"))
    if sides:
        datasets = [open_dataset(side) for side in sides]
        digests = {d.path.name: d.manifest.digest for d in datasets}
        return {"path": source, "digest": digests}, (t for d in datasets for part in d.parts for t in _of_part(part))
    if not folder.exists() and "/" not in source and "." not in source:
        raise DataError(f"--against {source} is neither a suite nor a file", f"suites: {', '.join(SUITES)}; or give a path")
    files = formats.find_files(source)
    return {"files": [formats.describe_file(path) for _, path in files]}, _of_files(source, files, unreadable)


def _texts(prompts: Sequence[Prompt], answers: Sequence[str]) -> Texts:
    asked = ["\n".join(m.content for m in prompt if m.role != "system") for prompt in prompts]
    return Texts(pa.array(asked, pa.string()), pa.array(answers, pa.string()))


def _of_examples(examples: Sequence[Example]) -> Iterator[Texts]:
    yield _texts([e.prompt for e in examples], ["".join(a) for e in examples for a in e.answers])


def _of_part(part: Place) -> Iterator[Texts]:
    with opened(part) as file:
        column = "steps" if "steps" in file.schema_arrow.names else "answers"
        for batch in file.iter_batches(batch_size=_ROWS, columns=["prompt", column]):
            answers = batch[column] if column == "steps" else batch[column].flatten()
            yield Texts(prompt_texts(batch["prompt"]), pc.binary_join(answers, ""))


def _of_files(source: str, files: Sequence[tuple[str, str]], unreadable: list[Rejected]) -> Iterator[Texts]:
    try:
        name, _ = formats.recognise(itertools.islice(formats.read_rows(*files[0]), 20), source)
    except DataError as error:
        way_out = "bring it in with  rayward run import_rollouts --format F --source FILE --output DIR   # then --against DIR"
        raise DataError(error.what, way_out) from None
    rows = (row for file in files for row in formats.read_rows(*file))
    while some := list(itertools.islice(rows, _ROWS)):
        made = [formats.parse(formats.FORMATS[name], row, formats.PROMPT_COLUMNS) for row in some]
        unreadable += [m for m in made if isinstance(m, Rejected)]
        rollouts = [r for m in made if not isinstance(m, Rejected) for r in m]
        if rollouts:
            yield _texts([r.prompt for r in rollouts], [r.text for r in rollouts])
