"""Examples as files of somebody else's rows: a .jsonl file per part, what could not be said in rejects/, and a manifest."""

from __future__ import annotations

import gzip
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rayward import places
from rayward.config import choose
from rayward.dataflow.engine import run
from rayward.dataflow.recipe import Recipe, staged
from rayward.errors import SettingsError
from rayward.formats import FORMATS, make_format
from rayward.formats.fields import Writer
from rayward.places import Place, at
from rayward.records import BadRecord, Rejected, examples_of, rejects_table
from rayward.storage import Counts, Dataset, Manifest, opened, read_manifest, write_rejects


@dataclass(frozen=True)
class Exported:
    """Files of rows on disk."""

    path: Place
    manifest: Manifest

    @property
    def files(self) -> list[Place]:
        """The files, in order."""
        return [self.path / name for name in places.listing(self.path) if name.startswith("part-") and ".jsonl" in name]


def export(recipe: Recipe, source: Dataset, format_name: str, compress: bool, exact: bool = True) -> Exported:
    """Write the examples of `source` in a format; what it cannot say is rejected with the reason, or, if not `exact`, votes are dropped."""
    write = _writer(format_name)
    output = at(recipe.output)
    if not recipe.already_made():
        tasks = [{"part": n, "file": str(path.absolute())} for n, path in enumerate(source.parts)]
        drop = () if format_name not in FORMATS or _has_margins(source) else ("margin",)  # a column of ones would be taken for margins of 1
        with staged(recipe, "export", len(tasks)) as stage:
            work = partial(_export_part, write=write, stage=str(stage), parts=len(tasks), compress=compress, drop=drop, exact=exact)
            done = run(tasks, lambda: work, what=recipe.made_by, unit="parts", done=stage / "done" / "parts", **recipe.how(source.bytes))
            counts = sum((Counts(d["rows_in"], d["used"], d["rejected"], d["out"], d["leaves"]) for d in done), Counts())
            places.write(stage / "manifest.json", recipe.manifest("export", counts).to_json())
    made = Exported(output, read_manifest(output / "manifest.json"))
    print(f"{output}: {made.manifest.summary()} rows in {len(made.files)} files", file=sys.stderr)
    return made


def _writer(name: str) -> Writer:
    if ":" in name:
        mine: Writer = choose(FORMATS, name, "format")  # type: ignore[assignment]
        return mine
    form = make_format(name)
    if form.write is None:
        able = ", ".join(sorted(known for known, other in FORMATS.items() if other.write is not None))
        raise SettingsError(f"format={name} is read, and not written", f"formats that are: {able}")
    return form.write


def _has_margins(source: Dataset) -> bool:
    """Whether some pair's targets differ by another number than 1."""
    for part in source.parts:
        for batch in _batches(part, columns=["targets"]):
            pairs = batch["targets"].filter(pc.equal(pc.list_value_length(batch["targets"]), 2)).flatten().to_numpy().reshape(-1, 2)
            if not np.isin(np.abs(pairs[:, 0] - pairs[:, 1]), (0.0, 1.0)).all():
                return True
    return False


def _export_part(
    task: dict[str, Any], *, write: Writer, stage: str, parts: int, compress: bool, drop: Sequence[str], exact: bool
) -> dict[str, Any]:
    name = f"part-{task['part']:03d}-of-{parts:03d}.jsonl" + (".gz" if compress else "")
    rejects: list[Rejected] = []
    rows_in = out = 0
    digest = hashlib.blake2b(digest_size=16)
    folder = at(stage)
    with places.landing(folder / name) as path, gzip.GzipFile(path, "wb", mtime=0) if compress else open(path, "wb") as file:
        for made in _rows(task["file"], write, exact):
            rows_in += 1
            if isinstance(made, Rejected):
                rejects.append(made)
                continue
            for row in made:
                line = json.dumps({k: v for k, v in row.items() if k not in drop}, ensure_ascii=False).encode() + b"\n"
                digest.update(line)
                file.write(line)
                out += 1
    rejected: Counter[str] = write_rejects(folder, f"part-{task['part']:03d}.parquet", rejects_table(rejects))
    leaves = {f"{task['part']:03d}": digest.hexdigest()}
    return {"rows_in": rows_in, "used": rows_in - len(rejects), "rejected": dict(rejected), "out": out, "leaves": leaves}


def _batches(file: str | Place, **options: Any) -> Iterator[pa.RecordBatch]:
    with opened(file) as parquet:
        yield from parquet.iter_batches(**options)


def _rows(file: str, write: Writer, exact: bool) -> Iterator[list[dict[str, Any]] | Rejected]:
    for batch in _batches(file, batch_size=1024):
        for example in examples_of(pa.Table.from_batches([batch])):
            if not exact:
                example = replace(example, counts=tuple(min(count, 1) for count in example.counts))
            try:
                yield [dict(row) for row in write(example)]
            except BadRecord as error:
                yield Rejected(source="examples", row=example.id, reason=str(error))
