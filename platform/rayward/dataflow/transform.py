"""A dataset from the parts of another, or of several that are laid into the same ranges of hashes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa

from rayward import places
from rayward.dataflow.engine import run
from rayward.dataflow.recipe import Recipe, announce, staged
from rayward.places import at
from rayward.storage import Counts, Dataset, open_dataset, read_table, schema_of, write_part, write_rejects


@dataclass(frozen=True)
class Made:
    """What a part became: a table for every side of the output (`""` where there is one), what was left out, and rows used."""

    tables: Mapping[str, pa.Table]
    rejects: pa.Table
    used: int


Transform = Callable[[pa.Table], Made]


def transform(
    recipe: Recipe,
    source: Dataset,
    make: Callable[[], Transform],
    *,
    kind: str,
    sides: Sequence[str] = ("",),
    actors: int = 0,
    gpus: float = 0.0,
) -> list[Dataset]:
    """Another dataset from every part of `source` (or one per side, in folders of OUTPUT by that name)."""
    output = at(recipe.output)
    if not recipe.already_made():
        parts = len(source.parts)
        tasks = [{"part": n, "file": str(path.absolute())} for n, path in enumerate(source.parts)]
        with staged(recipe, kind, parts) as stage:
            work = partial(_PartWork, make, str(stage), parts, kind)
            how = {**recipe.how(source.bytes), "actors": actors, "gpus": gpus}
            done = run(tasks, work, what=recipe.made_by, unit="parts", done=stage / "done" / "parts", **how)
            rejected = sum((Counter(d["rejected"]) for d in done), Counter())
            whole = Counts(sum(d["rows_in"] for d in done), sum(d["used"] for d in done), rejected)
            whole.check()
            for side in sides:
                counts = sum((Counts(0, 0, {}, d["out"][side], d["leaves"][side]) for d in done if side in d["out"]), Counts())
                counts += whole if side == "" else Counts(counts.out, counts.out)
                places.write(stage / side / "manifest.json", recipe.manifest(kind, counts).to_json())
    return [announce(open_dataset(output / side, kind)) for side in sides]


class _PartWork:
    """One task of a transform: read a part, make what it becomes, write that."""

    def __init__(self, make: Callable[[], Transform], stage: str, parts: int, kind: str):
        self.transform, self.stage, self.parts, self.kind = make(), at(stage), parts, kind

    def __call__(self, task: dict[str, Any]) -> dict[str, Any]:
        part = task["part"]
        table = read_table(task["file"])
        made = self.transform(table)
        leaves = {side: write_part(self.stage / side, part, self.parts, rows, schema_of(self.kind)) for side, rows in made.tables.items()}
        rejected = write_rejects(self.stage, f"part-{part:03d}.parquet", made.rejects)
        out = {side: rows.num_rows for side, rows in made.tables.items()}
        return {"rows_in": table.num_rows, "used": made.used, "rejected": dict(rejected), "out": out, "leaves": leaves}
