"""Run pipelines: the same function over files or parts, here or on Ray Data, and a dataset that appears whole or not at all.

    ingest      files (or any numbered chunks of work) -> rollouts, laid into parts by prompt hash     ingest.py
    transform   the parts of a dataset -> the parts of another, or of several (a split)                transform.py
    export      examples -> files of somebody else's rows                                              export.py
    mix         several datasets of examples -> one, with weights and caps                             mixing.py
    run         do tasks, here or on Ray Data, none of them twice                                      engine.py
    Recipe      what is made, from what; the folder it is made in                                      recipe.py

Since a part holds all records of its prompts (`storage`), labeling, splitting and scoring map over parts and never shuffle. The engine
is a setting: `ray` runs the work on Ray Data, `local` in this process, `auto` takes Ray when a cluster is at hand (RAY_ADDRESS) or
there is more to read than LOCAL_BYTES. Both give the same digest. A run that was killed goes on where it was.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rayward import formats, labels
from rayward.config import suggest
from rayward.dataflow.engine import LOCAL_BYTES, Engine, run
from rayward.dataflow.ingest import ingest
from rayward.dataflow.recipe import Recipe
from rayward.dataflow.transform import Made, Transform, transform
from rayward.errors import DataError, SettingsError
from rayward.records import REJECT_SCHEMA, Rejected, Rollout
from rayward.splits import SIDES, Shares, side
from rayward.storage import Dataset, opened

__all__ = [
    "LOCAL_BYTES",
    "Engine",
    "Made",
    "Recipe",
    "Transform",
    "attribute_names",
    "check_by",
    "formats_of",
    "import_files",
    "ingest",
    "label",
    "run",
    "split",
    "transform",
]


def formats_of(files: Sequence[tuple[str, str]], format_name: str) -> dict[str, str]:
    """The format of every (name, path) by path; `auto` looks at the first rows of every file, and names all that cannot be told."""
    if format_name != "auto":
        formats.make_format(format_name)  # a wrong name is said before any work
        return {path: format_name for _, path in files}
    found: dict[str, str] = {}
    problems: list[DataError] = []
    for name, path in files:
        try:
            found[path] = _recognised(name, path)
        except DataError as error:
            problems.append(error)
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise DataError("; ".join(p.what for p in problems), f"{problems[0].way_out}; or bring the others in without these files")
    return found


def import_files(
    recipe: Recipe, files: Sequence[tuple[str, str]], named: Mapping[str, str] | str, parts: int = 0, without: str = ""
) -> Dataset:
    """Rollouts from (name, path) of files, all in one format, or each in the one that is named for its path.

    `without` names the columns that are given up of what prompts were made from (formats.taken_without).
    """
    given_up = formats.taken_without(without)
    if isinstance(named, str):
        named = formats_of(files, named)
    tasks = [{"format": named[path], "piece": piece._asdict()} for name, path in files for piece in formats.pieces(name, path)]
    size = sum(formats.source_bytes(path) for _, path in files)
    made = ingest(recipe, tasks, partial(_read_piece, without=given_up), unit="pieces", size=size, parts=parts)
    if lost := made.manifest.rejected.get(formats.UNREAD, 0):
        names = ",".join(formats.PROMPT_COLUMNS[:2])
        print(
            f"warning: {lost:,} rows have prompts that were made from more than texts ({names}, ...): see {made.path / 'rejects'}\n"
            f"  -> write that into the messages, as the policy saw it, or take the rows without it: --without {names}",
            file=sys.stderr,
        )
    return made


def _recognised(name: str, path: str, look_at: int = 20) -> str:
    """The format of a file by its first rows, said on stderr with how it was known; of a file without rows, any."""
    rows = list(itertools.islice(formats.read_rows(name, path), look_at))
    if not rows:
        return "rollouts"
    found, why = formats.recognise(rows, name)
    print(f"{name}: format {found}, since {why}", file=sys.stderr)
    return found


def _read_piece(task: dict[str, Any], without: Collection[str]) -> Iterator[list[Rollout] | Rejected | pa.Table]:
    form = formats.make_format(task["format"])
    for item in formats.read_piece(form, formats.Piece(**task["piece"])):
        yield item if isinstance(item, pa.Table) else formats.parse(form, item, without)


def attribute_names(source: Dataset) -> tuple[str, ...]:
    """Every attribute that some rollout is rated on, sorted; DataError where there is none."""
    names: set[str] = set()
    for part in source.parts:
        with opened(part) as file:
            for batch in file.iter_batches(columns=["rewards"]):
                names |= set(pc.unique(batch["rewards"].keys).to_pylist())
    if not names:
        raise DataError(
            f"{source.path} holds no ratings by attribute: `rewards` is empty everywhere",
            "import a set that has some (helpsteer2, ultrafeedback, ...), or label pairs or rankings by reward",
        )
    return tuple(sorted(names))


def check_by(source: Dataset, by: str) -> None:
    """SettingsError where answers are to be compared by an attribute that none of them is rated on."""
    if by not in ("reward", "correct") and by not in (names := attribute_names(source)):
        raise SettingsError(f"by={by}: nobody rated that", suggest(by, ["reward", "correct", *names]))


def label(recipe: Recipe, source: Dataset, labeler: labels.Labeler, settings: Any) -> Dataset:
    """Examples from rollouts."""
    [made] = transform(recipe, source, lambda: partial(_label_part, labeler, settings), kind="examples")
    return made


def _label_part(labeler: labels.Labeler, settings: Any, table: pa.Table) -> Made:
    labelled = labels.label_table(table, labeler, settings)
    return Made({"": labelled.examples}, labelled.rejects, labelled.used)


def split(recipe: Recipe, source: Dataset, shares: Shares) -> list[Dataset]:
    """A dataset in train, validation and test, by hash of the prompt."""
    return transform(recipe, source, lambda: partial(_split_part, shares), kind=source.manifest.kind, sides=SIDES)


def _split_part(shares: Shares, table: pa.Table) -> Made:
    sides = np.array([side(h, shares) for h in table["prompt_id"].to_pylist()], dtype=object)
    return Made({name: table.filter(pa.array(sides == name)) for name in SIDES}, REJECT_SCHEMA.empty_table(), table.num_rows)
