"""Rollouts from files or other chunks of work, whatever their size, in two phases that are both maps.

    lay out   every task writes its rollouts into the parts that their prompts belong to: laid-out/PART/TASK.arrow
    join      every part is put together from these files, sorted and written; its files then go

So memory holds a chunk of a file or one part, and the disk holds the rollouts twice at most (once of it in LZ4), however much there is.
"""

from __future__ import annotations

import contextlib
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rayward import places
from rayward.dataflow.engine import run, session
from rayward.dataflow.recipe import Recipe, announce, staged
from rayward.errors import DataError, SettingsError
from rayward.places import Place, at
from rayward.records import ROLLOUT_SCHEMA, Rejected, Rollout, rejects_table, rollouts_table
from rayward.storage import LEAVES, Counts, Dataset, open_dataset, part_count, part_of, sort_rows, write_part, write_rejects

CHUNK_ROWS = 10_000  # rollouts that are held as records at a time

# one task -> per raw row its rollouts or the reason it was left out; or a table of rollouts, of a row each
Produce = Callable[[dict[str, Any]], Iterator[list[Rollout] | Rejected | pa.Table]]


def ingest(
    recipe: Recipe,
    tasks: Sequence[dict[str, Any]],
    produce: Produce,
    *,
    unit: str,
    size: int,
    parts: int = 0,
    actors: int = 0,
    gpus: float = 0.0,
) -> Dataset:
    """Rollouts of all tasks as a dataset in `parts` parts (0: by `size`, the bytes there are to read).

    `actors` and `gpus` are for those who produce (engine.run); what is produced is put together on CPUs.
    """
    if parts and (parts < 0 or LEAVES % parts):
        raise SettingsError(f"parts={parts} is not a power of two up to {LEAVES}", "leave it out: 0 goes by size")
    if recipe.already_made():
        return announce(open_dataset(recipe.output, "rollouts"))
    parts = parts or part_count(size)
    with staged(recipe, "rollouts", parts) as stage, session(recipe.engine, size):
        lay = partial(_lay_out, produce=produce, stage=str(stage), parts=parts)
        numbered = [{"number": number, "task": task} for number, task in enumerate(tasks)]
        how = recipe.how(size)
        laid = run(numbered, lambda: lay, what=recipe.made_by, unit=unit, done=stage / "done" / "lay-out", actors=actors, gpus=gpus, **how)
        counts = sum((Counts(d["rows_in"], d["used"], d["rejected"]) for d in laid), Counts())
        join = partial(_join_part, stage=str(stage), parts=parts)
        rows = sum((Counter(d["laid"]) for d in laid), Counter())
        todo = [{"part": p, "rows": rows[f"{p:03d}"]} for p in range(parts)]
        joined = run(todo, lambda: join, what="sort", unit="parts", done=stage / "done" / "join", **how)
        counts = sum((Counts(0, d["used"], d["rejected"], d["out"], d["leaves"]) for d in joined), counts)
        places.write(stage / "manifest.json", recipe.manifest("rollouts", counts).to_json())
    return announce(open_dataset(recipe.output, "rollouts"))


class _Layer:
    """Lays tables of rollouts into one file per part; what goes to a URL is put together on this disk, and sent when it is whole."""

    def __init__(self, folder: Place, name: str, parts: int, stack: contextlib.ExitStack):
        self.folder, self.name, self.parts, self.stack = folder, name, parts, stack
        self.files: dict[int, Any] = {}
        self.rows: Counter[str] = Counter()  # of every part

    def lay(self, table: pa.Table) -> None:
        """Every row into the file of its part."""
        if table.num_rows == 0:
            return
        which = part_of(table["prompt_id"], self.parts)
        order = np.argsort(which, kind="stable")
        table, which = table.take(pa.array(order)), which[order]
        starts = np.flatnonzero(np.r_[True, which[1:] != which[:-1]])
        for start, end in zip(starts, np.r_[starts[1:], len(which)], strict=True):
            part = int(which[start])
            if part not in self.files:
                path = self.stack.enter_context(places.landing(self.folder / _laid(part, self.name)))
                options = pa.ipc.IpcWriteOptions(compression="lz4")
                self.files[part] = self.stack.enter_context(pa.ipc.new_stream(str(path), ROLLOUT_SCHEMA, options=options))
            self.rows[f"{part:03d}"] += int(end - start)
            self.files[part].write_table(table.slice(start, end - start).combine_chunks())


def _laid(part: int, name: str) -> str:
    return f"{part:03d}/{name}.arrow"


def _lay_out(numbered: dict[str, Any], produce: Produce, stage: str, parts: int) -> dict[str, Any]:
    """One task of phase one."""
    name = f"{numbered['number']:06d}"
    folder, laid = at(stage), at(stage) / "laid-out"
    places.remove_files(laid, [_laid(part, name) for part in range(parts)])  # of a run that was killed at this task
    rows_in = used = reject_files = 0
    rejects: list[Rejected] = []
    rejected: Counter[str] = Counter()
    chunk: list[Rollout] = []

    def flush() -> None:
        nonlocal reject_files
        layer.lay(rollouts_table(chunk))
        chunk.clear()
        if rejects:
            rejected.update(write_rejects(folder, f"rows-{name}-{reject_files:06d}.parquet", rejects_table(rejects)))
            reject_files += 1
            rejects.clear()

    with contextlib.ExitStack() as stack:
        layer = _Layer(laid, name, parts, stack)
        for item in produce(numbered["task"]):
            if isinstance(item, pa.Table):
                rows_in, used = rows_in + item.num_rows, used + item.num_rows
                layer.lay(item)
                continue
            rows_in += 1
            if isinstance(item, Rejected):
                rejects.append(item)
            else:
                used += 1
                chunk += item
            if len(chunk) >= CHUNK_ROWS or len(rejects) >= CHUNK_ROWS:
                flush()
        flush()
    return {"rows_in": rows_in, "used": used, "rejected": dict(rejected), "laid": dict(layer.rows)}


def _join_part(task: dict[str, Any], stage: str, parts: int) -> dict[str, Any]:
    """One task of phase two: put a part together. Of two rollouts of one prompt with one id, the first by content stays.

    DataError where fewer rows lie there than were laid out: somebody else, taken for dead, has joined this part and given its files back.
    """
    part = task["part"]
    folder = at(stage)
    if isinstance(folder, Path):  # parts that are done give their place on the disk back
        for marker in folder.glob("done/join/*.json"):
            shutil.rmtree(folder / "laid-out" / f"{int(marker.stem):03d}", ignore_errors=True)
    laid = folder / "laid-out" / f"{part:03d}"
    tables = [_read_laid(laid / name) for name in places.listing(laid) if name.endswith(".arrow")]
    if (there := sum(table.num_rows for table in tables)) != task["rows"]:
        raise DataError(
            f"{laid} holds {there:,} of {task['rows']:,} rows", f"run the same command again; if it says so again, remove {stage}"
        )
    table, repeated = _one_of_each(sort_rows(pa.concat_tables(tables) if tables else ROLLOUT_SCHEMA.empty_table()))
    rejects = rejects_table(
        Rejected(source="rollouts", row=row["id"], reason="duplicate id: another rollout of its prompt has it", raw=repr(row))
        for row in repeated
    )
    rejected = write_rejects(folder, f"part-{part:03d}.parquet", rejects)
    leaves = write_part(folder, part, parts, table, ROLLOUT_SCHEMA)
    return {"used": -len(repeated), "rejected": dict(rejected), "out": table.num_rows, "leaves": leaves}


def _read_laid(file: Place) -> pa.Table:
    with pa.ipc.open_stream(str(file) if isinstance(file, Path) else pa.BufferReader(places.read(file))) as stream:
        return stream.read_all()


def _one_of_each(table: pa.Table) -> tuple[pa.Table, list[dict[str, Any]]]:
    """The sorted table with one rollout per (prompt, id), the first by content, and the others."""
    if table.num_rows < 2:
        return table, []
    same = np.ones(table.num_rows - 1, bool)
    for name in ("id", "prompt_id"):
        column = table[name]
        same &= pc.equal(column.slice(1), column.slice(0, len(column) - 1)).to_numpy()
    if not same.any():
        return table, []
    several = np.flatnonzero(np.r_[False, same] | np.r_[same, False])
    by_name: dict[tuple[str, str], list[tuple[str, int, dict[str, Any]]]] = {}
    for place, row in zip(several.tolist(), table.take(pa.array(several)).to_pylist(), strict=True):
        by_name.setdefault((row["prompt_id"], row["id"]), []).append((repr(row), place, row))
    extra = [again for found in by_name.values() for again in sorted(found, key=lambda f: f[:2])[1:]]
    keep = np.ones(table.num_rows, bool)
    keep[[place for _, place, _ in extra]] = False
    return table.filter(pa.array(keep)), [row for _, _, row in extra]
