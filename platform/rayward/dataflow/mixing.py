"""Mix datasets of examples: each source with a weight and a cap. Parts are ranges of hashes, so a part is mixed of the same ranges.

A cap keeps the examples with the least draws of (seed, source, example): the same ones however the source is cut into parts.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rayward import places
from rayward.config import read_file, resolve
from rayward.dataflow.engine import run
from rayward.dataflow.recipe import Recipe, announce, staged
from rayward.errors import DataError, SettingsError
from rayward.places import at
from rayward.records import EXAMPLE_SCHEMA, REJECT_SCHEMA
from rayward.storage import Counts, Dataset, open_dataset, opened, part_of, read_table, sort_rows, write_part, write_rejects

MIXTURE = "mixture.yaml names sources, e.g.  sources: {hh: {path: store/hh/pairs, weight: 1.0, cap: 10000}}"


@dataclass(frozen=True)
class SourceSettings:
    """A source in mixture.yaml."""

    path: str  # folder of examples
    weight: float = 1.0  # what the weight of each of its examples is multiplied by
    cap: int = 0  # at most so many examples, drawn by hash (0: all)

    def __post_init__(self) -> None:
        if not 0 < self.weight < float("inf") or self.cap < 0:
            raise ValueError(f"weight={self.weight} must be above 0, and cap={self.cap} at least 0")


@dataclass(frozen=True)
class Source:
    """A source that was opened."""

    name: str
    settings: SourceSettings
    dataset: Dataset


@dataclass(frozen=True)
class Mixture:
    """What mixture.yaml says."""

    sources: tuple[Source, ...]
    seed: int

    def describe(self) -> dict[str, Any]:
        """Weights and caps, for the manifest."""
        said = {s.name: {**asdict(s.settings), "path": None, "digest": s.dataset.manifest.digest} for s in self.sources}
        return {"seed": self.seed, "mixed": said}


def read_mixture(path: str) -> Mixture:
    """The mixture in a YAML file, with its sources open; UserError where it cannot be mixed."""
    here = places.fetch(path)
    if not here.is_file():
        raise SettingsError(f"--mixture {path} does not exist", MIXTURE)
    said = read_file(str(here))
    named, seed = said.get("sources"), said.get("seed", 0)
    if not isinstance(named, dict) or not named or set(said) - {"sources", "seed"} or not isinstance(seed, int):
        raise SettingsError(f"{path} is not a mixture: it holds {', '.join(map(str, said)) or 'nothing'}", MIXTURE)
    sources = []
    for name, given in named.items():
        if not isinstance(given, dict):
            raise SettingsError(f"{path}: source {name} is {given!r}, not a path with weight and cap", MIXTURE)
        settings = resolve(SourceSettings, given, f"sources.{name}.")
        sources.append(Source(str(name), settings, open_dataset(settings.path, "examples")))
    labels = {s.name: _labeled_by(s.dataset.lineage()) for s in sources}
    if len({"pairs" if kind == "rankings" else kind for kind in labels.values() if kind}) > 1:
        told = ", ".join(f"{name} {kind}" for name, kind in labels.items())
        raise DataError(f"{path}: sources are labeled for different objectives: {told}", "mix examples of one kind (pairs and rankings go)")
    kinds = {s.name: _attributes(s.dataset) for s in sources if s.dataset.manifest.out}
    if len(set(kinds.values())) > 1:
        raise DataError(f"{path}: sources differ in what their targets are called: {kinds}", "mix examples of the same attributes")
    return Mixture(tuple(sources), seed)


def _labeled_by(manifest: Mapping[str, Any]) -> str:
    """The labeler behind a dataset, through splits and mixtures in between; empty where nobody says."""
    name = str(manifest.get("made_by") or "")
    if name.startswith("label_"):
        return name.removeprefix("label_")
    return next((found for given in manifest.get("inputs") or () if (found := _labeled_by(given))), "")


def _attributes(dataset: Dataset) -> tuple[str, ...]:
    for part in dataset.parts:
        with opened(part) as file:
            for batch in file.iter_batches(batch_size=1, columns=["attributes"]):
                return tuple(batch["attributes"][0].as_py())
    return ()


def draw(table: pa.Table, seed: int, name: str) -> np.ndarray:
    """A random 64-bit number per example, of (seed, source, prompt, id): the same wherever the example lies."""
    start = hashlib.blake2b(f"{seed}|{name}|".encode(), digest_size=8)
    draws = []
    for prompt, row in zip(table["prompt_id"].to_pylist(), table["id"].to_pylist(), strict=True):
        digest = start.copy()
        digest.update(f"{prompt}/{row}".encode())
        draws.append(digest.digest())
    return np.frombuffer(b"".join(draws), ">u8").astype(np.uint64)


def mix(recipe: Recipe, mixture: Mixture) -> Dataset:
    """All sources as one dataset of examples."""
    if recipe.already_made():
        return announce(open_dataset(recipe.output, "examples"))
    parts = max(len(s.dataset.parts) for s in mixture.sources)
    size = sum(s.dataset.bytes for s in mixture.sources)
    with staged(recipe, "examples", parts) as stage:
        sources = [
            {
                "name": s.name,
                "weight": s.settings.weight,
                "cap": s.settings.cap,
                "highest": _highest_draw(s, mixture.seed),
                "files": [str(p.absolute()) for p in s.dataset.parts],
            }
            for s in mixture.sources
        ]
        work = partial(_mix_part, sources=sources, seed=mixture.seed, stage=str(stage), parts=parts)
        done = run(
            [{"part": p} for p in range(parts)],
            lambda: work,
            what=recipe.made_by,
            unit="parts",
            done=stage / "done" / "parts",
            **recipe.how(size),
        )
        counts = sum((Counts(d["rows_in"], d["used"], d["rejected"], d["out"], d["leaves"]) for d in done), Counts())
        places.write(stage / "manifest.json", recipe.manifest("examples", counts).to_json())
    return announce(open_dataset(recipe.output, "examples"))


def _highest_draw(source: Source, seed: int) -> int:
    """The greatest draw that the cap lets in: 8 bytes an example are held to find it."""
    if not source.settings.cap or source.settings.cap >= source.dataset.manifest.out:
        return 2**64 - 1
    columns = (read_table(part, columns=["prompt_id", "id"]) for part in source.dataset.parts)
    every = np.concatenate([draw(table, seed, source.name) for table in columns])
    return int(np.partition(every, source.settings.cap - 1)[source.settings.cap - 1])


def _mix_part(task: dict[str, Any], *, sources: list[dict[str, Any]], seed: int, stage: str, parts: int) -> dict[str, Any]:
    """One part of the mixture: the same range of hashes of every source."""
    part = task["part"]
    taken, left = [], []
    rows_in = 0
    for source in sources:
        files = source["files"]
        table = read_table(files[part * len(files) // parts])
        table = table.filter(pa.array(part_of(table["prompt_id"], parts) == part))
        rows_in += table.num_rows
        kept = draw(table, seed, source["name"]) <= np.uint64(source["highest"])
        left.append(_left_out(table.filter(pa.array(~kept)), source))
        taken.append(_weighted(table.filter(pa.array(kept)), source))
    table = sort_rows(pa.concat_tables(taken))
    leaves = write_part(at(stage), part, parts, table, EXAMPLE_SCHEMA)
    rejected: Counter[str] = write_rejects(at(stage), f"part-{part:03d}.parquet", pa.concat_tables(left))
    return {"rows_in": rows_in, "used": table.num_rows, "rejected": dict(rejected), "out": table.num_rows, "leaves": leaves}


def _weighted(table: pa.Table, source: dict[str, Any]) -> pa.Table:
    """The examples with their weight multiplied, the source in front of their id and in their provenance."""
    ids = pc.binary_join_element_wise(pa.scalar(source["name"]), table["id"].cast(pa.string()), "/")
    mixed = [
        sorted([*((k, v) for k, v in entries if k != "mixed_from"), ("mixed_from", source["name"])])
        for entries in table["provenance"].to_pylist()
    ]
    table = table.set_column(table.schema.get_field_index("id"), "id", ids)
    table = table.set_column(table.schema.get_field_index("weight"), "weight", pc.multiply(table["weight"], source["weight"]))
    at = table.schema.get_field_index("provenance")
    return table.set_column(at, "provenance", pa.array(mixed, EXAMPLE_SCHEMA.field("provenance").type)).cast(EXAMPLE_SCHEMA)


def _left_out(table: pa.Table, source: dict[str, Any]) -> pa.Table:
    rows = [
        {"source": source["name"], "row": name, "reason": f"over the cap: {source['cap']:,} of {source['name']} were drawn", "raw": ""}
        for name in table["id"].to_pylist()
    ]
    return pa.Table.from_pylist(rows, schema=REJECT_SCHEMA)
