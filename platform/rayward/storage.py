"""Datasets at rest: sorted Parquet parts, what was rejected, and a manifest whose counts add up.

    OUTPUT/
      manifest.json                 in = used + rejected, out, digest, settings, inputs, code version
      part-000-of-004.parquet       records whose prompt_id lies in the first quarter of all hashes, sorted by (prompt_id, id)
      rejects/part-000.parquet      what was left out: source, row, reason, raw

A part holds a *range* of prompt hashes, so all records of one prompt lie together in one part and the parts, read in order, are one
sorted table, whatever their number. That makes three things cheap: grouping by prompt (nothing is ever shuffled again), the
digest (the same rows give the same digest, however they were cut or who worked on them), and carrying on part by part.

A dataset appears whole or not at all. On disk it is built in a folder beside OUTPUT and renamed when its manifest is written. At a URL
(`places`) nothing can be renamed: the parts are copied by the store, the manifest last, and without a manifest there is no dataset.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rayward import __version__, places
from rayward.errors import DataError
from rayward.places import File, Place, at, listing, telling
from rayward.records import EXAMPLE_SCHEMA, ROLLOUT_SCHEMA

LEAVES = 256  # a digest is taken over each of 256 ranges of prompt hashes; a dataset has 1, 2, 4, ... or 256 parts
PART_BYTES = 64 * 2**20  # what one part should hold at most, before compression
PUBLISHING = ".publishing"  # an object in an output at a URL while its dataset is being copied there


@dataclass(frozen=True)
class Counts:
    """What happened to some rows. Counts add up, however the work was cut; `leaves` maps a hash range to the digest of its rows."""

    rows_in: int = 0
    used: int = 0
    rejected: Mapping[str, int] = field(default_factory=dict)
    out: int = 0
    leaves: Mapping[str, str] = field(default_factory=dict)

    def __add__(self, other: Counts) -> Counts:
        both = self.leaves.keys() & other.leaves.keys()
        assert not both, f"two parts hold rows of the same hash ranges {sorted(both)[:3]}"
        return Counts(
            self.rows_in + other.rows_in,
            self.used + other.used,
            dict(Counter(self.rejected) + Counter(other.rejected)),
            self.out + other.out,
            {**self.leaves, **other.leaves},
        )

    def check(self) -> None:
        """Nothing is dropped in silence: in = used + rejected."""
        lost = self.rows_in - self.used - sum(self.rejected.values())
        assert lost == 0, f"{lost} of {self.rows_in} rows are neither used nor rejected"


@dataclass(frozen=True)
class Manifest:
    """What a dataset is and what it came from; `manifest.json` holds exactly this."""

    kind: str  # rollouts | examples | scores
    made_by: str  # the pipeline
    rows_in: int
    used: int
    rejected: Mapping[str, int]
    out: int
    digest: str  # of the content: the same rows give the same digest
    settings: Mapping[str, Any]
    code_version: str
    inputs: Sequence[Mapping[str, Any]] = ()  # manifests of the inputs, or {source, bytes, sha256} of files

    def to_json(self) -> str:
        """The manifest as it lies on disk."""
        words = dict(self.__dict__)
        words["in"] = words.pop("rows_in")
        return json.dumps(words, indent=2, sort_keys=True, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """The manifest that `to_json` wrote."""
        words = json.loads(text)
        words["rows_in"] = words.pop("in")
        return cls(**words)

    def summary(self) -> str:
        """One line for a person.

        >>> Manifest("rollouts", "import_rollouts", 5, 4, {"empty": 1}, 8, "ab", {}, "0").summary()
        '5 in = 4 used + 1 rejected (empty 1); 8 out'
        """
        reasons = ", ".join(f"{reason} {n:,}" for reason, n in sorted(self.rejected.items(), key=lambda r: (-r[1], r[0])))
        return (
            f"{self.rows_in:,} in = {self.used:,} used + {sum(self.rejected.values()):,} rejected"
            + (f" ({reasons})" if reasons else "")
            + f"; {self.out:,} out"
        )


@cache
def code_version() -> str:
    """The package's version and a digest of its sources, so that a manifest names the code that made it."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        if "scripts" not in path.parts:
            digest.update(path.read_bytes())
    return f"{__version__}+{digest.hexdigest()[:12]}"


# ------------------------------------------------------------------------------------------------------------------ parts


def part_count(bytes_in: int) -> int:
    """How many parts a dataset of so many bytes gets: the least power of two that keeps a part under PART_BYTES.

    >>> part_count(10), part_count(PART_BYTES + 1), part_count(10**15)
    (1, 2, 256)
    """
    parts = 1
    while parts < LEAVES and bytes_in > parts * PART_BYTES:
        parts *= 2
    return parts


def part_of(prompt_ids: pa.ChunkedArray | pa.Array, parts: int) -> Any:
    """Which part each prompt hash belongs to, as a numpy array.

    >>> part_of(pa.array(["00ab", "7fff", "ffff"]), 2).tolist()
    [0, 0, 1]
    """
    leaf = np.frombuffer(bytes.fromhex("".join(pc.utf8_slice_codeunits(prompt_ids, 0, 2).to_pylist())), np.uint8)
    return leaf.astype(np.int64) * parts // LEAVES


def part_name(part: int, parts: int) -> str:
    """The file name of a part."""
    return f"part-{part:03d}-of-{parts:03d}.parquet"


def sort_rows(table: pa.Table) -> pa.Table:
    """Rows by (prompt_id, id): the order of every dataset."""
    return table.sort_by([("prompt_id", "ascending"), ("id", "ascending")])


def _sorted(table: pa.Table) -> bool:
    if table.num_rows < 2:
        return True
    prompt, name = (table[n].combine_chunks() for n in ("prompt_id", "id"))
    rows = len(table) - 1
    above, same = pc.greater(prompt.slice(1), prompt.slice(0, rows)), pc.equal(prompt.slice(1), prompt.slice(0, rows))
    return bool(pc.all(pc.or_(above, pc.and_(same, pc.greater_equal(name.slice(1), name.slice(0, rows))))).as_py())


def leaf_digests(table: pa.Table) -> dict[str, str]:
    """The digest of the rows of every hash range of a sorted table; equal tables give equal digests, whatever their chunks.

    >>> t = pa.table({"prompt_id": ["00", "01", "01"], "id": ["a", "b", "c"]})
    >>> leaf_digests(t) == leaf_digests(pa.concat_tables([t.slice(0, 1), t.slice(1)])) and len(leaf_digests(t))
    2
    """
    if table.num_rows == 0:
        return {}
    leaves = pc.utf8_slice_codeunits(table["prompt_id"], 0, 2).to_pylist()
    starts = [i for i in range(len(leaves)) if i == 0 or leaves[i] != leaves[i - 1]] + [len(leaves)]
    digests: dict[str, str] = {}
    for start, end in pairwise(starts):
        digest = hashlib.blake2b(digest_size=16)
        for name in table.column_names:
            if name == "provenance":  # where a row stood is no part of what it is
                continue
            digest.update(name.encode() + b"\0")
            _update(digest, pa.concat_arrays(table[name].slice(start, end - start).chunks))
        digests[leaves[start]] = digest.hexdigest()
    return digests


def _update(digest: Any, array: pa.Array) -> None:
    """Feed an array's values, and nothing of how Arrow happens to lay them out."""
    kind = array.type
    name = type(array).__name__ if pa.types.is_nested(kind) else kind  # a nested type names its parts, and Parquet renames them
    digest.update(f"{name}:{len(array)}:{array.null_count};".encode())
    if array.null_count:
        digest.update(pc.is_null(array).cast(pa.uint8()).to_numpy().tobytes())
    if pa.types.is_map(kind):
        offsets = array.offsets.to_numpy()
        digest.update((offsets - offsets[0]).tobytes())
        for child in (array.keys, array.items):
            _update(digest, child.slice(offsets[0], offsets[-1] - offsets[0]))
    elif pa.types.is_list(kind):
        digest.update(pc.fill_null(pc.list_value_length(array), 0).to_numpy().tobytes())
        _update(digest, array.flatten())
    elif pa.types.is_struct(kind):
        for child in array.flatten():
            _update(digest, child)
    elif pa.types.is_string(kind):
        filled = pc.fill_null(array, "")
        digest.update(pc.binary_length(filled).to_numpy().tobytes())
        _, offsets_buffer, data = filled.buffers()
        if data is not None and len(filled):
            ends = np.frombuffer(offsets_buffer, dtype=np.int32)
            digest.update(memoryview(data)[ends[filled.offset] : ends[filled.offset + len(filled)]])
    elif pa.types.is_boolean(kind):
        digest.update(pc.fill_null(array, False).cast(pa.uint8()).to_numpy().tobytes())
    else:
        digest.update(pc.fill_null(array, 0).to_numpy().tobytes())


def whole_digest(leaves: Mapping[str, str]) -> str:
    """The digest of a dataset from the digests of its hash ranges."""
    return hashlib.blake2b("".join(k + leaves[k] for k in sorted(leaves)).encode(), digest_size=16).hexdigest()


# --------------------------------------------------------------------------------------------------------- read and write


@dataclass(frozen=True)
class Dataset:
    """A dataset at rest, on disk or at a URL."""

    path: Place
    manifest: Manifest

    @cached_property
    def _files(self) -> dict[str, File]:
        """Its Parquet files by name, looked up once."""
        return {n: file for n, file in listing(self.path).items() if n.startswith("part-") and n.endswith(".parquet")}

    @property
    def parts(self) -> list[Place]:
        """Its Parquet files, in order."""
        return [self.path / name for name in self._files]

    def tables(self) -> Iterator[pa.Table]:
        """Its parts, one table at a time."""
        for part in self.parts:
            yield read_table(part)

    def table(self) -> pa.Table:
        """All of it, sorted by (prompt_id, id)."""
        tables = list(self.tables())
        return pa.concat_tables(tables) if tables else schema_of(self.manifest.kind).empty_table()

    def rejects(self) -> pa.Table:
        """What was left out when it was made."""
        from rayward.records import REJECT_SCHEMA

        folder = self.path / "rejects"
        files = [folder / name for name in listing(folder) if name.endswith(".parquet")]
        return pa.concat_tables([read_table(f) for f in files]) if files else REJECT_SCHEMA.empty_table()

    @property
    def bytes(self) -> int:
        """Size of its parts at rest, in bytes."""
        return sum(file.bytes for file in self._files.values())

    def lineage(self) -> dict[str, Any]:
        """What the manifest of a dataset made from this one says about it."""
        return {"path": str(self.path), **json.loads(self.manifest.to_json())}


def schema_of(kind: str) -> pa.Schema:
    """The schema of a kind of dataset."""
    several = pa.list_(pa.float64())
    scores = [*ROLLOUT_SCHEMA, pa.field("score", pa.float64()), pa.field("step_scores", several), pa.field("member_scores", several)]
    return {"rollouts": ROLLOUT_SCHEMA, "examples": EXAMPLE_SCHEMA, "scores": pa.schema(scores)}[kind]


def read_manifest(path: Place) -> Manifest:
    """The manifest in a file, or DataError."""
    try:
        return Manifest.from_json(places.read(path).decode())
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{path} cannot be read: {error}", "build the dataset again") from None


def open_dataset(path: str | Place, kind: str | None = None) -> Dataset:
    """A dataset that a Rayward pipeline wrote, at a path, a URL or store:NAME, or DataError with the way out."""
    place = at(path)
    with telling(place):
        return _open(place, kind)


def _no_dataset(path: Place, kind: str | None) -> DataError:
    """Why there is no dataset at a place."""
    if not path.exists():
        return DataError(f"{path} does not exist", f"make it first: rayward ls  shows the pipelines that write {kind or 'datasets'}")
    if (path / PUBLISHING).exists():
        return DataError(f"{path} is being written, or what wrote it was stopped then", "wait for it, or run the same command again")
    sides = sorted(p.parent.name for p in path.glob("*/manifest.json"))
    if sides:
        return DataError(f"{path} holds several datasets: {', '.join(sides)}", f"name one, e.g. {path / sides[0]}")
    return DataError(
        f"{path} is not a dataset of Rayward: it has no manifest.json",
        "bring your file in with  rayward run import_rollouts --format F --source FILE --output DIR",
    )


def _open(path: Place, kind: str | None) -> Dataset:
    try:
        manifest = read_manifest(path / "manifest.json")
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        if places.no_bucket(path):
            raise
        raise _no_dataset(path, kind) from None
    if kind is not None and manifest.kind != kind:
        raise DataError(
            f"{path} holds {manifest.kind} (made by {manifest.made_by}), not {kind}",
            {
                "examples": "make examples from rollouts first, e.g.  rayward run label_pairs --source ROLLOUTS --output EXAMPLES",
                "rollouts": "give the folder of rollouts that import_rollouts or sample_rollouts wrote",
            }.get(kind, ""),
        )
    dataset = Dataset(path, manifest)
    whole = int(dataset.parts[0].stem.rpartition("-")[2]) if dataset.parts else 0
    if not dataset.parts or len(dataset.parts) != whole:
        raise DataError(f"{path} has {len(dataset.parts)} of {whole} parts", "build the dataset again")
    return dataset


def sibling(path: Place, suffix: str) -> Place:
    """A hidden folder beside a path (or prefix beside a URL), on the same disk, so that a rename is atomic."""
    if path.name in ("", ".."):
        raise DataError(f"--output {str(path)!r} is this folder or one above it", "name a folder of its own")
    for above in path.absolute().parents if isinstance(path, Path) else ():
        if above.exists() and not above.is_dir():
            raise DataError(f"--output {path} lies below {above}, which is a file", "name a folder that can be made")
    return path.with_name(f".{path.name}.{suffix}")


def read_table(path: str | Place, columns: Sequence[str] | None = None) -> pa.Table:
    """A Parquet file as a table; at a URL it is read in one request."""
    place = at(path)
    wanted = None if columns is None else list(columns)
    return pq.read_table(place if isinstance(place, Path) else pa.BufferReader(places.read(place)), columns=wanted)


@contextmanager
def opened(path: str | Place) -> Iterator[pq.ParquetFile]:
    """A Parquet file to be read batch by batch; at a URL its bytes are held, which are those of one part."""
    place = at(path)
    with pq.ParquetFile(place if isinstance(place, Path) else pa.BufferReader(places.read(place))) as file:
        yield file


def row_count(path: Place) -> int:
    """Rows of a Parquet file, by its last bytes."""
    if isinstance(path, Path):
        return int(pq.read_metadata(path).num_rows)
    with path.fs.open(path.path, "rb", cache_type="none") as file:
        return int(pq.read_metadata(file).num_rows)


def write_table(table: pa.Table, path: Place, **options: Any) -> None:
    """Write a Parquet file, which appears whole."""
    with places.landing(path) as here:
        pq.write_table(table, here, **options)


def write_part(folder: Place, part: int, parts: int, table: pa.Table, schema: pa.Schema) -> dict[str, str]:
    """Write one sorted part; returns the digests of its hash ranges."""
    table = table.select(schema.names).cast(schema)
    if not _sorted(table):
        table = sort_rows(table)
    write_table(table, folder / part_name(part, parts), compression="zstd", row_group_size=20_000)
    return leaf_digests(table)


def write_rejects(folder: Place, name: str, rejects: pa.Table) -> Counter[str]:
    """Write what was left out, and count it by category."""
    if rejects.num_rows == 0:
        return Counter()
    write_table(rejects, folder / "rejects" / name, compression="zstd")
    categories = pc.value_counts(pc.replace_substring_regex(rejects["reason"], r"(?s):.*", ""))
    return Counter({c["values"]: c["counts"] for c in categories.to_pylist()})


def publish(stage: Path, output: Path, leave: Sequence[str] = ()) -> None:
    """Let a finished folder appear under its name, in one step and to stay; what stood there before goes after that.

    What is named in `leave` goes too, and last: whoever is killed while the disk is written to finds the stage as it was.
    """
    for folder, below, names in os.walk(stage):
        below[:] = [name for name in below if name not in leave]
        for name in names:
            _to_disk(Path(folder) / name)
        _to_disk(Path(folder))
    old = sibling(output, "old")
    places.remove(old)
    if output.exists():
        os.rename(output, old)
    os.rename(stage, output)
    _to_disk(output.parent)
    for gone in (*(output / name for name in leave), old):
        places.remove(gone)


def _to_disk(path: Path) -> None:
    """Have a file or folder written through, so that a machine that loses its power keeps what was renamed."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF):  # of a file system that cannot
            raise
    finally:
        os.close(number)


def publish_remote(stage: Place, output: Place, leave: Sequence[str], check: Callable[[], None]) -> None:
    """Let a finished dataset appear at a URL: the store copies all but what is named in `leave`, manifests last.

    While it does, the object PUBLISHING stands in the output. Whoever finds it there may begin again: the stage is as it was. `check`
    raises when another run has taken this one's place; it is asked before anything is taken away, and before the manifests.
    """
    names = [name for name in listing(stage, deep=True) if name.partition("/")[0] not in leave]
    places.write(output / PUBLISHING, b"")
    before = [name for name in listing(output, deep=True) if name != PUBLISHING]
    manifests = [name for name in names if name.endswith("manifest.json")]
    check()
    places.remove_files(output, [name for name in before if name.endswith("manifest.json")])
    places.remove_files(output, [name for name in before if not name.endswith("manifest.json")])
    places.copy_files(stage, [name for name in names if name not in manifests], output)
    check()
    places.copy_files(stage, manifests, output)
    places.remove_files(output, [PUBLISHING])
