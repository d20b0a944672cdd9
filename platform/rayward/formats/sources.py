"""Where rows come from: a file, a folder of files, a URL of an object store, a set that `datasets` loads.

    a.jsonl  a.ndjson  a.jsonl.gz  a.jsonl.zst     a row a line
    a.json  a.json.gz  a.json.zst                  one array of rows, or one object after the other
    a.csv   a.csv.gz   a.csv.zst                   a row a record, the first one names the columns
    a.parquet                                      a row a record
    folder/                                        all of these in it and below it
    s3://bucket/path  store:NAME  hf://datasets/...  the same at a URL: as `places` reaches it, or pyarrow.fs, or fsspec
    org/name  org/name:split                       a data set of the Hugging Face hub; or a folder that `datasets` saved

A large file is cut into pieces, so that several workers read one file; a row keeps its number in the file whatever the pieces.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import gzip
import hashlib
import io
import itertools
import json
import os
import re
import urllib.parse
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from rayward import places
from rayward.config import public
from rayward.errors import DataError, SettingsError
from rayward.records import BadRecord

PIECE_BYTES = 64 * 2**20  # a file larger than this is read in pieces of about this size, where its kind allows it
TABLE_ROWS = 2**16  # rows of Parquet that are read by column at a time, at most
TABLE_BYTES = 2**26  # the same in bytes, unpacked
PIECE_ROWS = 50_000  # the same for a set that `datasets` loads
_KINDS = (".jsonl", ".ndjson", ".json", ".csv")
SUFFIXES = (*(kind + packed for kind in _KINDS for packed in ("", ".gz", ".zst")), ".parquet")
_HUB_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(?::(?P<split>[\w\[\]:%]+))?")  # org/name or org/name:split
_URL = re.compile(r"[a-z][a-z0-9+]*://")
_UNREADABLE = (OSError, EOFError, zlib.error, pa.ArrowException, ValueError, OverflowError, RecursionError, csv.Error)


class RawRow(NamedTuple):
    """One row as it was found: a line of bytes, or the columns of a Parquet row."""

    source: str  # file, relative to what was asked for
    number: int  # 1 is the first row
    content: bytes | Mapping[str, Any]

    @property
    def text(self) -> str:
        """The row as far as text can hold it."""
        if isinstance(self.content, bytes):
            return self.content.decode("utf-8", "backslashreplace")
        return json.dumps(self.content, ensure_ascii=True, default=repr)

    @property
    def id(self) -> str:
        """Names the row wherever its rollouts go: file, row, and a digest, so that two files of one name do not collide."""
        content = self.content if isinstance(self.content, bytes) else self.text.encode()
        return f"{self.source}:{self.number}:{hashlib.blake2b(content, digest_size=4).hexdigest()}"


class Unreadable(NamedTuple):
    """A place where a file could not be read on."""

    source: str
    number: int
    reason: str


class Piece(NamedTuple):
    """A part of a file: bytes of lines, row groups of Parquet, rows of a loaded set; `end` None is the whole file."""

    name: str  # file, relative to what was asked for
    path: str  # where it lies: a path, a URL, or `datasets:...`
    start: int = 0
    end: int | None = None
    first: int = 1  # number of its first row


def decode(content: bytes | Mapping[str, Any]) -> Mapping[str, Any]:
    """The keys and values of a raw row, or BadRecord."""
    if isinstance(content, bytes):
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise BadRecord(f"invalid UTF-8: byte {content[error.start]:#04x} at {error.start}") from None
        if not text.strip():
            raise BadRecord("blank line")
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            raise BadRecord(f"broken JSON: {error.msg} at character {error.pos}") from None
        except ValueError as error:  # an integer of thousands of digits
            raise BadRecord(f"broken JSON: {error}") from None
        except RecursionError:
            raise BadRecord("broken JSON: nested too deeply") from None
    if isinstance(content, Mapping) and None in content:
        raise BadRecord(f"wrong length: the record has more values than the {len(content) - 1} names of the file")
    if not isinstance(content, Mapping):
        raise BadRecord(f"wrong type: the row is {type(content).__name__}, not an object with keys")
    return content


# ------------------------------------------------------------------------------------------------------------- finding them


def find_files(source: str) -> list[tuple[str, str]]:
    """(name, path) of every file of a source: a file, a folder of files, a URL of either, or a set that `datasets` can load."""
    if source.startswith("store:"):
        source = str(places.at(source))
    if _URL.match(source):
        return _find_at_url(source)
    path = Path(source)
    if path.is_file():
        if not path.name.endswith(SUFFIXES):
            raise DataError(f"{source} is not a kind of file this reads", f"files end in {', '.join(SUFFIXES)}")
        return [(path.name, str(path))]
    if ((path / "state.json").is_file() and (path / "dataset_info.json").is_file()) or (path / "dataset_dict.json").is_file():
        return [(path.name, f"datasets:{source}")]
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and _wanted(p, path))
        if not files:
            raise DataError(f"{source} holds no file that ends in {', '.join(SUFFIXES)}")
        for file in files:
            if not file.name.isprintable():
                raise DataError(f"{str(file)!r} has a name that is not UTF-8", "rename the file")
        return [(str(p.relative_to(path)), str(p)) for p in files]
    if _HUB_NAME.fullmatch(source) and not source.startswith((".", "/")) and not path.parent.is_dir():
        return [(source, f"datasets:{source}")]
    raise DataError(f"{source} does not exist", "give a file, a folder of files, or a data set's name on the hub: org/name:split")


_NO_ROWS = ("manifest.json", "dataset_info.json", "dataset_infos.json")


def _wanted(file: Path | PurePosixPath, folder: Path | PurePosixPath) -> bool:
    """Whether a file below a folder holds rows: none that is hidden, none that tells of others, none that a pipeline rejected."""
    parts = file.relative_to(folder).parts
    hidden, rejected = any(part.startswith(".") for part in parts), "rejects" in parts[:-1]
    return file.name.endswith(SUFFIXES) and file.name not in _NO_ROWS and not hidden and not rejected


def _filesystem(url: str) -> tuple[Any, str]:
    """The file system of a URL and the path in it, or DataError."""
    if (place := _place(url)) is not None:
        return pafs.PyFileSystem(pafs.FSSpecHandler(place.fs)), place.path
    try:
        return pafs.FileSystem.from_uri(url)
    except (pa.ArrowException, OSError, ImportError) as error:
        reason = str(error).splitlines()[0]
    try:
        if "?" in url:
            raise ValueError("its options are pyarrow's")
        import fsspec

        fs, path = fsspec.core.url_to_fs(url)
        return pafs.PyFileSystem(pafs.FSSpecHandler(fs)), path
    except (ImportError, ValueError, OSError):
        raise DataError(
            f"{public(url)} cannot be reached: {public(reason)}", "check the address, the credentials and the network"
        ) from None


def _place(url: str) -> Any:
    """The place of a URL, where it is one that `places` knows and what reaches it is installed; one with options in it is none."""
    if url.partition("://")[0] not in places.DRIVERS or "?" in url or public(url) != url:
        return None
    try:
        return places.at(url)
    except SettingsError:
        return None


def _find_at_url(source: str) -> list[tuple[str, str]]:
    with places.telling(_place(source) or public(bare(source))):
        return _files_at(source)


def _files_at(source: str) -> list[tuple[str, str]]:
    fs, path = _filesystem(source)
    place = _place(source)
    try:
        info = fs.get_file_info(path)
        if info.type == pafs.FileType.File:
            found = [info]
        elif info.type == pafs.FileType.Directory:
            inside = fs.get_file_info(pafs.FileSelector(path, recursive=True))
            below = [f for f in inside if f.type == pafs.FileType.File and _wanted(PurePosixPath(f.path), PurePosixPath(path))]
            found = sorted(below, key=lambda f: f.path)
        else:
            if place is not None and places.no_bucket(place):
                raise FileNotFoundError(source)
            raise DataError(f"{public(source)} does not exist", "check the address")
    except DataError:
        raise
    except (OSError, pa.ArrowException, ValueError, NotImplementedError) as error:
        if place is not None:
            raise
        raise DataError(
            f"{public(source)} cannot be reached: {public(str(error))}", "check the address, the credentials and the network"
        ) from None
    if not found or not all(f.base_name.endswith(SUFFIXES) for f in found):
        raise DataError(f"{public(source)} holds no file that ends in {', '.join(SUFFIXES)}")
    base, query = source.partition("?")[::2]
    urls = []
    for file in found:
        name = file.path.removeprefix(path).lstrip("/")
        if place is not None and set(name) & set("?#*[]"):
            raise DataError(f"{public(source)} holds {name!r}: one of ? # * [ ] in a name is read as something else", "rename it")
        url = f"{base.rstrip('/')}/{name if place is not None else urllib.parse.quote(name)}" if name else base
        urls.append((name or file.base_name, url + ("?" + query if query else "")))
    return urls


def bare(path: str) -> str:
    """A path as it is, a URL without its query."""
    return path.partition("?")[0] if _URL.match(path) else path


def source_bytes(path: str) -> int:
    """About how many bytes of rows a file holds, unpacked; of a loaded set as far as it is known."""
    if path.startswith("datasets:"):
        loaded = _load(path.removeprefix("datasets:"))
        return int(loaded.dataset_size or 0) or loaded.num_rows * 1000
    if _URL.match(path):
        fs, inside = _filesystem(path)
        size = fs.get_file_info(inside).size or 0
    else:
        size = os.path.getsize(path) if os.path.exists(path) else 0
        with contextlib.suppress(*_UNREADABLE):
            if path.endswith(".parquet"):
                metadata = pq.read_metadata(path)
                return sum(metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups))
    return size * (4 if bare(path).endswith((".gz", ".zst", ".parquet")) else 1)


def pieces(name: str, path: str, piece_bytes: int = PIECE_BYTES) -> list[Piece]:
    """A file cut into pieces that can be read apart: a local file of lines, a Parquet file, a loaded set. Others are one piece."""
    whole = [Piece(name, path)]
    if path.startswith("datasets:"):
        rows = _load(path.removeprefix("datasets:")).num_rows
        return [Piece(name, path, at, min(at + PIECE_ROWS, rows), at + 1) for at in range(0, rows, PIECE_ROWS)] or whole
    if _URL.match(path):
        return whole
    with contextlib.suppress(*_UNREADABLE):  # what cannot be read is said by whoever reads it
        if path.endswith(".parquet"):
            return _row_group_pieces(name, path, piece_bytes)
        if path.endswith((".jsonl", ".ndjson")) and os.path.getsize(path) > piece_bytes:
            return _line_pieces(name, path, piece_bytes)
    return whole


def _row_group_pieces(name: str, path: str, piece_bytes: int) -> list[Piece]:
    found: list[Piece] = []
    start = size = rows = 0
    first = 1
    metadata = pq.read_metadata(path)
    for group in range(metadata.num_row_groups):
        size += metadata.row_group(group).total_byte_size
        rows += metadata.row_group(group).num_rows
        if size >= piece_bytes or group + 1 == metadata.num_row_groups:
            found.append(Piece(name, path, start, group + 1, first))
            start, first, size, rows = group + 1, first + rows, 0, 0
    return found or [Piece(name, path)]


def _line_pieces(name: str, path: str, piece_bytes: int) -> list[Piece]:
    """Cut after the first line break past every `piece_bytes`; lines are counted, so that every piece knows its first row's number."""
    found: list[Piece] = []
    with open(path, "rb") as file:
        start, first, lines, at = 0, 1, 0, 0
        while block := file.read(2**20):
            full = at + len(block) - start >= piece_bytes
            end = block.find(b"\n", max(0, start + piece_bytes - at - 1)) if full else -1
            if end < 0:
                lines += block.count(b"\n")
                at += len(block)
                continue
            found.append(Piece(name, path, start, at + end + 1, first))
            first += lines + block.count(b"\n", 0, end + 1)
            start = at = at + end + 1
            lines = 0
            file.seek(at)
        if start < at:
            found.append(Piece(name, path, start, at, first))
    return found


def describe_file(path: str) -> dict[str, Any]:
    """Size and SHA-256 of a source file, for the manifest; at a URL size and time of change; of a data set of the hub, its name."""
    if path.startswith("datasets:"):
        return {"source": path}
    if _URL.match(path):
        if (place := _place(path)) is not None:
            said = places.stat(place)
            return {"source": path, "bytes": said.bytes, "changed": said.stamp}
        fs, inside = _filesystem(path)
        info = fs.get_file_info(inside)
        return {"source": public(bare(path)), "bytes": info.size, "changed": str(info.mtime)}
    digest = hashlib.sha256()
    with contextlib.suppress(OSError), open(path, "rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return {"source": path, "bytes": os.path.getsize(path), "sha256": digest.hexdigest()}


# ------------------------------------------------------------------------------------------------------------- reading them


def _load(source: str) -> Any:
    """What `datasets` loads: a folder it saved, or a name on the hub with an optional split."""
    import datasets

    if Path(source).is_dir():
        loaded = datasets.load_from_disk(source)
        if isinstance(loaded, dict):
            raise DataError(f"{source} holds several splits: {', '.join(loaded)}", f"name one, e.g. {source}/{next(iter(loaded))}")
        return loaded
    match = _HUB_NAME.fullmatch(source)
    assert match is not None
    try:
        return datasets.load_dataset(match["name"], split=match["split"] or "train")
    except (OSError, ValueError) as error:  # not there, no such split, no network
        raise DataError(f"{source} cannot be loaded: {error}", "check the name and the network, or give a local file") from None


def _open(path: str, stack: contextlib.ExitStack) -> Any:
    """The bytes of a file, unpacked; `stack` closes what was opened."""
    packed = bare(path)
    raw: Any
    if _URL.match(path):
        fs, inside = _filesystem(path)
        raw = stack.enter_context(fs.open_input_file(inside))
    else:
        raw = stack.enter_context(open(path, "rb"))  # noqa: SIM115 - the stack closes it
    if packed.endswith(".gz"):
        return stack.enter_context(gzip.GzipFile(fileobj=raw))
    if packed.endswith(".zst"):
        return stack.enter_context(io.BufferedReader(stack.enter_context(pa.CompressedInputStream(raw, "zstd"))))
    return stack.enter_context(io.BufferedReader(raw)) if isinstance(raw, pa.NativeFile) else raw


def read_rows(name: str, path: str, start: int = 0, end: int | None = None, first: int = 1) -> Iterator[RawRow | Unreadable]:
    """Every row of a file or of a piece of it (the fields of Piece), in order, and where it could not be read on, that."""
    number = first - 1
    try:
        for content in _contents(path, start, end):
            number += 1
            if isinstance(content, Exception):
                yield Unreadable(name, number, row_reason(content))
                continue
            if number == 1 and isinstance(content, bytes):
                content = content.removeprefix(codecs.BOM_UTF8)
            yield RawRow(name, number, content)
    except DataError:
        raise
    except _UNREADABLE as error:
        yield Unreadable(name, number + 1, f"unreadable file: {type(error).__name__}: {error}; nothing after this row was read")


def row_reason(error: Exception) -> str:
    """Why a row could not be read."""
    return f"unreadable row: {type(error).__name__}: {error}"


def read_tables(
    name: str, path: str, start: int = 0, end: int | None = None, first: int = 1
) -> Iterator[tuple[int, pa.Table] | tuple[int, Unreadable]]:
    """A Parquet file or a piece of it as tables, each with the number of its first row."""
    number = first
    try:
        for batch in _batches(path, start, end, TABLE_ROWS):
            yield number, pa.Table.from_batches([batch])
            number += batch.num_rows
    except _UNREADABLE as error:
        reason = f"unreadable file: {type(error).__name__}: {error}; nothing after this row was read"
        yield number, Unreadable(name, number, reason)


def _batches(path: str, start: int, end: int | None, rows: int) -> Iterator[pa.RecordBatch]:
    """Batches of a Parquet file, none across two row groups (so that damage costs one) and none of more than TABLE_BYTES or so."""
    fs, inside = _filesystem(path) if _URL.match(path) else (None, path)
    with pq.ParquetFile(inside, filesystem=fs) as file:
        for group in range(start, file.num_row_groups if end is None else end):
            metadata = file.metadata.row_group(group)
            most = max(1, TABLE_BYTES * metadata.num_rows // max(1, metadata.total_byte_size))
            yield from file.iter_batches(batch_size=min(rows, most), row_groups=[group])


def dicts(batch: pa.RecordBatch | pa.Table) -> Iterator[Mapping[str, Any] | Exception]:
    """The rows of a batch as Python values, or what is wrong with one that Python cannot hold."""
    try:
        yield from batch.to_pylist()
    except _UNREADABLE:  # before any was yielded
        for n in range(batch.num_rows):
            try:
                yield from batch.slice(n, 1).to_pylist()
            except _UNREADABLE as error:
                yield error


def _contents(path: str, start: int, end: int | None) -> Iterator[bytes | Mapping[str, Any] | Exception]:
    if path.startswith("datasets:"):
        loaded = _load(path.removeprefix("datasets:"))
        yield from loaded if end is None else loaded.select(range(start, end))
        return
    kind = bare(path).removesuffix(".gz").removesuffix(".zst")
    if kind.endswith(".parquet"):
        for batch in _batches(path, start, end, 1024):
            yield from dicts(batch)
        return
    with contextlib.ExitStack() as stack:
        file = _open(path, stack)
        if kind.endswith((".json", ".csv")):
            yield from _values(file) if kind.endswith(".json") else _records(file, stack)
        elif end is None:
            for line in file:
                yield line.rstrip(b"\r\n")
        else:
            file.seek(start)
            while file.tell() < end:
                yield file.readline().rstrip(b"\r\n")


def _values(file: Any) -> Iterator[bytes]:
    """The values of one JSON array, or of a file with one JSON value after the other, as they stand; memory holds little more than one."""
    decoder, texts = json.JSONDecoder(), _texts(file)
    buffer, at, inside, more = "", 0, False, True
    broken: Exception | None = None
    while True:
        at = _SKIPPED[inside].match(buffer, at).end()  # type: ignore[union-attr]
        if at < len(buffer) and buffer[at] == "[" and not inside:
            inside, at = True, at + 1
            continue
        if at < len(buffer) and buffer[at] == "]" and inside:
            inside, at = False, at + 1
            continue
        if at < len(buffer):
            try:
                _, end = decoder.raw_decode(buffer, at)
            except json.JSONDecodeError as error:
                if not more:
                    raise broken or ValueError(f"broken JSON: {error.msg}") from None
            else:
                if end < len(buffer) or not more:  # a number may go on in what was not read yet
                    yield buffer[at:end].encode("utf-8", "surrogateescape")
                    at = end
                    continue
        if not more:
            if broken or inside:
                raise broken or EOFError("the array has no end")
            return
        new, wanted = [buffer[at:]], max(2**16, len(buffer) - at)
        try:
            while wanted > 0 and (text := next(texts, None)) is not None:
                new.append(text)
                wanted -= len(text)
            more = wanted <= 0
        except _UNREADABLE as error:  # what was read before counts
            broken, more = error, False
        buffer, at = "".join(new), 0


def _texts(file: Any) -> Iterator[str]:
    """A file's text as it comes; where it breaks off, what came before is given first."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
    while data := file.read1(2**16):
        yield decoder.decode(data)
    yield decoder.decode(b"", final=True)


_SKIPPED = {False: re.compile(r"[ \t\r\n]*"), True: re.compile(r"[, \t\r\n]*")}  # between values; inside an array commas too
_NUMBER = re.compile(r"-?\d+(\.\d+)?([eE][+-]?\d+)?")
_TRUTH = {"true": True, "false": False}


def _records(file: Any, stack: contextlib.ExitStack) -> Iterator[Mapping[str, Any]]:
    """The records of a CSV file by the names in its first one.

    A column whose first values are all numbers, or all true and false, is read as such, unless its name is that of a text; what is empty
    in it is null.
    """
    csv.field_size_limit(2**28)
    text = io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="")
    stack.callback(text.detach)  # or it would close what `stack` closes
    records = csv.DictReader(text)
    first: list[dict[str, Any]] = []
    broken: Exception | None = None
    try:
        first += itertools.islice(records, 100)
    except _UNREADABLE as error:  # what was read before counts
        broken = error
    names = [name for name in records.fieldnames or () if isinstance(name, str) and not _TEXT_NAME.fullmatch(name)]
    values = {name: [r[name] for r in first if isinstance(r.get(name), str) and r[name]] for name in names}
    plain = {name for name, said in values.items() if said and (_all_numbers(said) or all(v.lower() in _TRUTH for v in said))}
    for record in itertools.chain(first, () if broken else records):
        yield {name: _plain(value) if name in plain else value for name, value in record.items()}
    if broken:
        raise broken


_TEXT_NAME = re.compile(
    r"(id|prompt|chosen|rejected|answer|response|completion|question|solution|problem|text|instruction|input|output|gold|reference|history"
    r"|human_ref|final_answer|content|system|context)(_?[a-zA-Z0-9])?"
)


def _all_numbers(texts: list[str]) -> bool:
    return all(_NUMBER.fullmatch(text) for text in texts)


def _plain(text: str | None) -> Any:
    """A number or a truth value; what is neither stays text, for the reader to reject."""
    if not text:
        return None
    if _NUMBER.fullmatch(text) and len(text) < 400:
        return json.loads(text) if not re.match(r"-?0\d", text) else text
    return _TRUTH.get(text.lower(), text)
