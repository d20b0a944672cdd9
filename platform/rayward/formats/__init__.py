"""Formats: a raw row of somebody's file becomes rollouts, or Rejected with a reason; an example becomes rows of somebody's file.

>>> [good] = parse(FORMATS["preference"], RawRow("pairs.jsonl", 1, b'{"prompt": "2+2?", "chosen": "4", "rejected": "5"}'))[:1]
>>> good.text, good.reward
('4', 1.0)
>>> parse(FORMATS["preference"], RawRow("pairs.jsonl", 2, b'{"prompt": "2+2?", "chosen": "4"}')).reason
'missing key: rejected'

    columns.py       our own rows by column, where a Parquet file holds them
    sources.py       where rows come from: files, folders, URLs, sets that `datasets` loads
    own.py           our own rows
    trainers.py      what trainers read: TRL, OpenRLHF, NeMo, LLaMA-Factory, axolotl, ms-swift
    judgements.py    data sets of preferences, rankings, ratings and votes
    process.py       data sets of judged steps
    benchmarks.py    evaluation sets
    fields.py        what readers and writers share

What a prompt was made from beside its messages (`tools`, `chat_template_kwargs`, images: fields.PROMPT_COLUMNS) is read by no format; rows
that have some are rejected before they come to a reader, unless the user gives it up.

A reader is a function from one decoded row to the rollouts in it; it raises BadRecord("category: detail") where the row cannot be used.
A writer is a function from one example to the rows that say the same; it raises BadRecord where the format cannot say it. Index bases
(first wrong step 0/-1, 0/null, 1) are converted in the reader and the writer, nowhere else.

To add a format: write the reader in the file of its kind, with `>>> row = {...}`, a raw row, as the first line of its doctest, and enter
it into that file's FORMATS. The row is then tested with all the others: recognised, read, fuzzed, written and read back.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from rayward.config import choose, suggest
from rayward.errors import DataError, SettingsError
from rayward.formats import benchmarks, columns, judgements, own, process, trainers
from rayward.formats.fields import PROMPT_COLUMNS, UNREAD, Format, as_prompt, key, unread
from rayward.formats.sources import (
    SUFFIXES,
    Piece,
    RawRow,
    Unreadable,
    bare,
    decode,
    describe_file,
    dicts,
    find_files,
    pieces,
    read_rows,
    read_tables,
    row_reason,
    source_bytes,
)
from rayward.records import BadRecord, Rejected, Rollout

__all__ = [
    "FORMATS",
    "PROMPT_COLUMNS",
    "SUFFIXES",
    "UNREAD",
    "Format",
    "Piece",
    "RawRow",
    "Unreadable",
    "as_prompt",
    "decode",
    "describe_file",
    "find_files",
    "key",
    "make_format",
    "parse",
    "pieces",
    "read_piece",
    "read_rows",
    "recognise",
    "source_bytes",
    "taken_without",
]

FORMATS: dict[str, Format] = {
    **own.FORMATS,
    **trainers.FORMATS,
    **judgements.FORMATS,
    **process.FORMATS,
    **benchmarks.FORMATS,
}


ALIASES = {
    "trl": "preference",
    "trl_preference": "preference",
    "hh_rlhf": "hh",
    "alpaca": "llama_factory",
    "sharegpt": "llama_factory_sharegpt",
}


def make_format(name: str) -> Format:
    """The format of that name; a bare function of the user's own is a reader."""
    plain = name.lower().replace("-", "_")
    plain = ALIASES.get(plain, plain)
    if plain not in FORMATS and ":" not in name:
        close = difflib.get_close_matches(plain, FORMATS, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise SettingsError(f"format={name} is not known", hint + "docs/formats.md lists all; or your own as module:name, or auto")
    entry: Format | Callable[..., Any] = FORMATS[plain] if plain in FORMATS else choose(FORMATS, name, "format")
    return entry if isinstance(entry, Format) else Format(entry, about=name, kind="", all_read=True)


def taken_without(names: str) -> frozenset[str]:
    """The columns of PROMPT_COLUMNS that a user gives up, from their names with commas between; SettingsError for others.

    >>> sorted(taken_without("tools, tool_calls")), taken_without("")
    (['tool_calls', 'tools'], frozenset())
    """
    given = [name.strip() for name in names.split(",") if name.strip()]
    for name in given:
        if name not in PROMPT_COLUMNS:
            raise SettingsError(f"without={name} is no column that a prompt is made from", suggest(name, PROMPT_COLUMNS))
    return frozenset(given)


def parse(form: Format, row: RawRow | Unreadable, without: Collection[str] = ()) -> list[Rollout] | Rejected:
    """One raw row as records, or the reason it was left out. Never an exception, never a silent drop.

    A row whose prompt was made from a column that is not read (`tools`, ...) is left out, but for those that it may be read `without`.
    """
    if isinstance(row, Unreadable):
        return Rejected(source=row.source, row=str(row.number), reason=row.reason)
    try:
        said = decode(row.content)
        lost = [] if form.all_read else [name for name in unread(said) if name not in without]
        if lost:
            raise BadRecord(f"{UNREAD}: the prompt was made from {', '.join(lost)} too, and a model would be shown another")
        rollouts = form.read(said, row.id)
        if not rollouts:
            raise BadRecord("empty: the row holds no answer")
        came_from = {"source": row.source, "row": str(row.number)}
        for rollout in rollouts:  # in place: the rollouts are ours, and were checked when they were made
            object.__setattr__(rollout, "provenance", {**rollout.provenance, **came_from})
        return list(rollouts)
    except BadRecord as error:
        reason = str(error)
    except RecursionError:
        reason = "broken JSON: nested too deeply"
    return Rejected(source=row.source, row=str(row.number), reason=storable(reason), raw=storable(row.text))


def read_piece(form: Format, piece: Piece) -> Iterator[RawRow | Unreadable | pa.Table]:
    """The rows of a piece, to be parsed; where the format can be read by column, good rows come as tables of rollouts."""
    if form.columns is None or not bare(piece.path).endswith(".parquet"):
        yield from read_rows(*piece)
        return
    for at, batch in read_tables(*piece):
        if isinstance(batch, Unreadable):
            yield batch
        elif not columns.readable(batch.schema):
            yield from _raw(piece.name, range(at, at + batch.num_rows), batch)
        else:
            found = form.columns(batch, piece.name, at)
            yield found.rollouts
            left = np.flatnonzero(~found.good)
            yield from _raw(piece.name, (at + left).tolist(), batch.take(left))


def _raw(name: str, numbers: Iterable[int], batch: pa.Table) -> Iterator[RawRow | Unreadable]:
    for number, row in zip(numbers, dicts(batch), strict=True):
        yield RawRow(name, number, row) if isinstance(row, Mapping) else Unreadable(name, number, row_reason(row))


def storable(text: str) -> str:
    """The text as far as UTF-8 can hold it: half a surrogate pair becomes its escape."""
    return text.encode("utf-8", "backslashreplace").decode()


def recognise(rows: Iterable[RawRow | Unreadable], source: str) -> tuple[str, str]:
    """The format of some rows by their keys, and how that was known; DataError where none or several fit.

    >>> recognise([RawRow("f", 1, b'{"prompt": "2+2?", "chosen": "4", "rejected": "5"}')], "f")[0]
    'preference'
    """
    seen: list[Mapping[str, Any]] = []
    for row in rows:
        if isinstance(row, RawRow):
            try:
                seen.append(decode(row.content))
            except BadRecord:
                continue
    if not seen:
        raise DataError(f"the format of {source} cannot be told: it holds no row that can be read", "look at the file, or say --format")
    fits = {name: sum(form.fits(row) for row in seen) for name, form in FORMATS.items()}
    most = max(fits.values())
    if 2 * most <= len(seen):  # a format that fewer than half of the rows have is none
        raise _unknown(seen, source)
    fit = [name for name in FORMATS if fits[name] == most]
    highest = max(FORMATS[name].specific for name in fit)
    best = [name for name in fit if FORMATS[name].specific == highest]
    if len(best) > 1:
        raise DataError(f"{source} fits several formats: {', '.join(best)}", f"say which, e.g. --format {best[0]}")
    form = FORMATS[best[0]]
    what = ", ".join(filter(None, ["the keys " + ", ".join(form.keys) if form.keys else "", form.test_says]))
    which = f"its first {most} rows" if most == len(seen) else f"{most} of its first {len(seen)} rows"
    others = [name for name in fit if name not in best]
    return best[0], f"{which} have {what}" + (f"; less specific: {', '.join(others)}" if others else "")


def _unknown(seen: Sequence[Mapping[str, Any]], source: str) -> DataError:
    """The error of a file whose format cannot be told: what keys it has, and which format is nearest."""
    keys = sorted(set.intersection(*(set(map(str, row)) for row in seen)))
    what = f"the format of {source} cannot be told: all of its first {len(seen)} rows have the keys {', '.join(keys) or '(none)'}"
    if {"question", "problem", "prompt"} & set(keys) and {"answer", "solution", "gold", "reference"} & set(keys):
        return DataError(
            what,
            "these look like problems, not judged answers: sample_rollouts --problems FILE answers and grades them; or say --format NAME",
        )
    named = {name: form for name, form in FORMATS.items() if form.keys}
    near = max(named, key=lambda name: len(set(named[name].keys) & set(keys)) - len(set(named[name].keys) - set(keys)))
    way_out = (
        f"nearest is {near}, which has {', '.join(named[near].keys)}; say --format NAME (docs/formats.md), or your own as module:function"
    )
    return DataError(what, way_out)
