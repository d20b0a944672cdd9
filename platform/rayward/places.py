"""Where things lie: a folder, or a prefix of an object store, named in one way and used with the same words.

    runs/pairs               a folder
    s3://bucket/runs/pairs   an object store: s3, gs, az; an endpoint other than Amazon's is in AWS_ENDPOINT_URL
    store:runs/pairs         runs/pairs below the store, which RAYWARD_STORE names (default: the folder `store`), a folder or a URL

`at` makes a `Place` of any of them: a pathlib.Path on disk, and at a URL a UPath, which has the same words (`/`, name, parent, open).

    >>> at("runs/pairs"), is_remote("runs/pairs"), is_remote("s3://bucket/runs/pairs")
    (PosixPath('runs/pairs'), False, True)

What differs is here and nowhere else. An object appears whole or not at all, so `write` needs no rename; every look costs a request and
is paid for, so `listing` asks once for names and sizes; what must be a file (weights that are mapped into memory) is had by `fetch`,
and goes back by `send`. Credentials come from the environment, a profile or the machine's role, and never stand in a URL.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from rayward.config import public, suggest
from rayward.errors import DataError, RaywardError, SettingsError

if TYPE_CHECKING:
    from upath import UPath

Place: TypeAlias = "Path | UPath"  # a UPath is no Path, but has its words

DRIVERS = {"s3": "s3fs", "gs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "memory": ""}  # what reaches a URL, by its scheme
LAST = ("manifest.json", "state.json", "report.json", "config.json")  # files that make a folder whole: they are sent after all others
CARRIED = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_DEFAULT_REGION", "AWS_REGION")  # what workers are told: no secrets
ASIDE = ".landing-"  # folders that files are written in before they are renamed
UNUSED_S = 24 * 3600.0  # seconds for which a copy stays in the cache, however full that is
_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+]*://")


class File(NamedTuple):
    """A file of a listing."""

    bytes: int
    stamp: str  # another one when the content changes: ETag or time of change


# ------------------------------------------------------------------------------------------------------------------- names


def is_remote(path: str | Place) -> bool:
    """Whether a path lies in an object store, and not on a disk."""
    if not isinstance(path, str):
        return not isinstance(path, Path)
    if path.startswith("store:"):
        return is_remote(store())
    return bool(_URL.match(path)) and not path.startswith("file://")


def at(text: str | Place) -> Place:
    """The place that a path, a URL or store:NAME names; SettingsError where it names none.

    >>> at("store:../../etc")
    Traceback (most recent call last):
    rayward.errors.SettingsError: 'store:../../etc' leads out of the store
      -> name what lies below it: store:NAME
    """
    if not isinstance(text, str):
        return text
    if text.startswith("store:"):
        name = text.removeprefix("store:")
        if ".." in name.split("/") or name.startswith("/"):
            raise SettingsError(f"{text!r} leads out of the store", "name what lies below it: store:NAME")
        return store() / name.rstrip("/") if name else store()
    if not is_remote(text):
        return Path(text.removeprefix("file://"))
    return _remote(text)


def store() -> Place:
    """The folder or URL that everything of a user's lies below by default: RAYWARD_STORE, or `store` in this folder."""
    named = os.environ.get("RAYWARD_STORE") or "store"
    if named.startswith("store:"):
        raise SettingsError(f"RAYWARD_STORE={named} names itself", "give a folder or a URL")
    return at(named).absolute()


def _remote(url: str) -> Place:
    scheme, _, rest = url.partition("://")
    shown = public(url).partition("?")[0]
    if scheme not in DRIVERS:
        raise SettingsError(f"{shown}: nothing here reaches {scheme}://", suggest(scheme, list(DRIVERS)))
    if public(url) != url or "?" in url or "#" in url:
        raise SettingsError(
            f"{shown} was given with a user, a password or options in it",
            "put credentials into the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, or AWS_PROFILE), an endpoint into "
            "AWS_ENDPOINT_URL, and give the address alone",
        )
    names = [name for name in rest.split("/") if name not in ("", ".")]
    if ".." in names or not names:
        raise SettingsError(f"{shown} is no address", f"write {scheme}://BUCKET/NAME")
    if set("*[]") & set(rest):
        raise SettingsError(f"{shown} holds one of * [ ], which stores take for a pattern", "choose a name without them")
    options: dict[str, Any] = {} if scheme == "memory" else {"use_listings_cache": False}  # others write there too
    if scheme == "s3":
        options["endpoint_url"] = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None
    try:
        from upath import UPath

        place = UPath(f"{scheme}://{'/'.join(names)}", **options)
        _ = place.fs
    except ImportError:
        driver = DRIVERS[scheme]
        way_out = "pip install 'rayward[s3]'" if scheme in ("s3", "memory") else f"pip install universal-pathlib {driver}"
        raise SettingsError(f"{shown} needs {' and '.join(filter(None, ('universal-pathlib', driver)))}", way_out) from None
    return place


def carried() -> dict[str, str]:
    """What a worker on another node needs to reach the same places: never credentials, which its node has of its own."""
    return {name: value for name in CARRIED if (value := os.environ.get(name)) and public(value) == value}


# ------------------------------------------------------------------------------------------------------------ whole files


def read(place: Place) -> bytes:
    """All of a file; FileNotFoundError where there is none."""
    if isinstance(place, Path):
        return place.read_bytes()
    return bytes(place.fs.cat_file(place.path))


def read_many(folder: Place, names: Sequence[str]) -> dict[str, bytes]:
    """All of some files of a folder, at a URL many at a time; what is gone by then is left out."""
    if isinstance(folder, Path):
        return {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}
    said = folder.fs.cat([(folder / name).path for name in names], on_error="return") if names else {}
    if isinstance(said, bytes):  # of one file fsspec gives the content
        return {names[0]: said}
    found: dict[str, bytes] = {}
    for name in names:
        content = said[(folder / name).path]
        if isinstance(content, bytes):
            found[name] = content
        elif not isinstance(content, FileNotFoundError):
            raise content
    return found


def write(place: Place, content: bytes | str) -> None:
    """Write a file so that whoever reads it sees all of it or what stood there before."""
    data = content.encode() if isinstance(content, str) else content
    if not isinstance(place, Path):
        place.fs.pipe_file(place.path, data)
        return
    with landing(place) as here:
        here.write_bytes(data)


def create(place: Place, content: bytes) -> bool:
    """Write a file only if there is none, and say whether: of two who try, one succeeds.

    In a store without conditional writes both may, if they try within one request; the one whose file it is shows when it is read.
    """
    if isinstance(place, Path):
        place.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError), open(place, "xb") as file:
            file.write(content)
            return True
        return False
    try:
        place.fs.pipe_file(place.path, content, mode="create")
    except FileExistsError:
        return False
    except OSError as error:
        code = _code(error)
        if code in ("PreconditionFailed", "412", "ConditionalRequestConflict", "409"):
            return False
        if code not in ("NotImplemented", "501"):
            raise
        if place.exists():
            return False
        write(place, content)
    return True


def listing(folder: Place, *, deep: bool = False) -> dict[str, File]:
    """The files of a folder by name (with `deep` those below it too, by their path in it), in order; none where there is no folder.

    At a URL this is one request per thousand files.
    """
    if isinstance(folder, Path):
        files = folder.rglob("*") if deep else folder.glob("*")
        found = {str(p.relative_to(folder)): p.stat() for p in files if p.is_file()}
        return {name: File(stat.st_size, str(stat.st_mtime_ns)) for name, stat in sorted(found.items())}
    said = folder.fs.find(folder.path, maxdepth=None if deep else 1, detail=True)
    below = folder.path.rstrip("/") + "/"
    return {path.removeprefix(below): _file(said[path]) for path in sorted(said) if path.startswith(below) and not path.endswith("/")}


def stat(place: Place) -> File:
    """Size and stamp of a file; FileNotFoundError where there is none."""
    if isinstance(place, Path):
        said = place.stat()
        return File(said.st_size, str(said.st_mtime_ns))
    return _file(place.fs.info(place.path))


def _file(info: Mapping[str, Any]) -> File:
    stamps = (info.get(name) for name in ("ETag", "etag", "LastModified", "last_modified", "mtime", "created"))
    return File(int(info["size"]), str(next((stamp for stamp in stamps if stamp), "")))


def remove(place: Place) -> None:
    """Take away a file or a folder with all that is in it; nothing where there is none. At a URL one request per thousand files."""
    if isinstance(place, Path):
        shutil.rmtree(place, ignore_errors=True) if place.is_dir() and not place.is_symlink() else place.unlink(missing_ok=True)
        return
    with contextlib.suppress(FileNotFoundError):
        place.fs.rm(place.path, recursive=True)


def remove_files(folder: Place, names: Sequence[str]) -> None:
    """Take away some files of a folder."""
    if isinstance(folder, Path):
        for name in names:
            (folder / name).unlink(missing_ok=True)
    elif names:
        folder.fs.rm([(folder / name).path for name in names])


def copy_files(folder: Place, names: Sequence[str], to: Place) -> None:
    """Copy files of one remote folder into another of the same store: the store does it, and nothing comes through here."""
    assert not isinstance(folder, Path)
    assert not isinstance(to, Path)
    if names:
        folder.fs.copy([(folder / name).path for name in names], [(to / name).path for name in names], on_error="raise")


# ------------------------------------------------------------------------------------------------------- there and back


def cache() -> Path:
    """Where copies of remote files are kept: RAYWARD_CACHE, or ~/.cache/rayward. It may be deleted when nothing runs.

    It holds every model and file that was read from a URL or from a tracking server, and of every fit at a URL what OUTPUT holds. It grows
    without an end, or up to RAYWARD_CACHE_GB: then what was used longest ago goes when something is fetched, but nothing that was used
    within a day.
    """
    return Path(os.environ.get("RAYWARD_CACHE") or "~/.cache/rayward").expanduser().absolute()


def fetch(path: str | Place) -> Path:
    """A file or folder as it is now on this disk: itself where it lies here, else a copy in the cache, read once per content.

    Raises:
        DataError: if a URL holds nothing, or is written to all the time.
    """
    place = at(path)
    if isinstance(place, Path):
        return place
    with telling(place):
        for _ in range(3):
            files = listing(place, deep=True) or _alone(place)
            if not files:
                raise DataError(f"{place} does not exist", "check the address")
            told = "".join(f"{name}\0{file.bytes}\0{file.stamp}\n" for name, file in files.items())
            here = fetched(f"{place}\n{told}", place.name or "bucket", partial(_download, place, files))
            if here is not None:
                return here
    raise DataError(f"{place} changes while it is read", "wait until whoever writes it has ended")


def fetched(content: str, name: str, download: Callable[[Path], bool]) -> Path | None:
    """The copy in the cache of what `content` tells apart from all else: CACHE/<digest>/`name`.

    Where there is none, `download` is to make it at the path that it is given, in a folder that is there, or to say that it could not: then
    None. The copy appears whole; of two who fetch at once, the first one's stays.
    """
    here = cache() / hashlib.blake2b(content.encode(), digest_size=12).hexdigest() / name
    with contextlib.suppress(FileNotFoundError):
        os.utime(here.parent)
    if here.exists():
        return here
    cache().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache(), prefix=".fetch-") as scratch:
        aside = Path(scratch) / "files" / name
        aside.parent.mkdir()
        if not download(aside):
            return None
        try:
            os.rename(aside.parent, here.parent)
        except OSError:
            if not here.exists():  # or somebody else was faster
                raise
    _make_room()
    return here


def _alone(place: Place) -> dict[str, File]:
    """The listing of a path that is one file: its name is empty."""
    assert not isinstance(place, Path)
    with contextlib.suppress(FileNotFoundError):
        info = place.fs.info(place.path)
        return {"": _file(info)} if info["type"] == "file" else {}
    return {}


def _download(place: Place, files: Mapping[str, File], aside: Path) -> bool:
    """Copy files to a path on this disk. False if they changed meanwhile."""
    assert not isinstance(place, Path)
    names = list(files)
    to = [aside / name if name else aside for name in names]
    for path in to:
        if not path.resolve().is_relative_to(aside.resolve()):
            raise DataError(f"{place} holds an object whose name leads out of its folder: {path.name!r}", "remove it")
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        place.fs.get([(place / name).path if name else place.path for name in names], [str(path) for path in to])
    except FileNotFoundError:
        return False
    return (listing(place, deep=True) or _alone(place)) == files


def _make_room() -> None:
    """Hold the cache to RAYWARD_CACHE_GB. A copy goes in one step, and a process that has opened its files keeps them."""
    limit = os.environ.get("RAYWARD_CACHE_GB")
    if not limit:
        return
    try:
        most = float(limit) * 1e9
    except ValueError:
        raise SettingsError(f"RAYWARD_CACHE_GB={limit} is no number", "give gigabytes, e.g. 200, or nothing for no limit") from None
    copies: list[tuple[float, int, Path]] = []
    for folder in (*cache().glob("?" * 24), *cache().glob("fits/*/")):
        with contextlib.suppress(FileNotFoundError):  # somebody else makes room
            stats = [path.stat() for path in (folder, *folder.rglob("*"))]
            copies.append((max(s.st_mtime for s in stats), sum(s.st_size for s in stats), folder))
    held = sum(size for _, size, _ in copies)
    for used, size, folder in sorted(copies):
        if held <= most or time.time() - used < UNUSED_S:
            return
        aside = cache() / f".gone-{secrets.token_hex(8)}"
        with contextlib.suppress(FileNotFoundError):
            os.rename(folder, aside)
            held -= size
        shutil.rmtree(aside, ignore_errors=True)


def send(local: Path, to: str | Place) -> Place:
    """Copy a file or a folder to a place, in which nothing else stays; the files of `LAST` go when all others are there.

    A reader who waits for them sees what was there before, nothing, or all of what is sent.
    """
    place = at(to)
    if isinstance(place, Path):
        return _copy_here(local, place)
    with telling(place):
        if local.is_file():
            place.fs.put_file(str(local), place.path)
            return place
        before = listing(place, deep=True)
        names = list(listing(local, deep=True))
        remove_files(place, [name for name in before if _makes_whole(name)])
        others = [name for name in names if not _makes_whole(name)]
        if others:
            place.fs.put([str(local / name) for name in others], [(place / name).path for name in others])
        remove_files(place, [name for name in before if name not in names])
        for name in sorted((name for name in names if _makes_whole(name)), key=lambda name: -name.count("/")):
            place.fs.put_file(str(local / name), (place / name).path)
    return place


@contextlib.contextmanager
def landing(place: Place) -> Iterator[Path]:
    """A path to write a file at; it is at its place when the block ends well, whole: renamed on disk, sent to a URL.

    So of two processes that write the same file at once, also one that was taken for dead, neither ever shows half of it.
    """
    if isinstance(place, Path):
        place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent if isinstance(place, Path) else None, prefix=ASIDE) as folder:
        here = Path(folder) / place.name
        with naming(place.parent if isinstance(place, Path) else Path(folder)):
            yield here
        if isinstance(place, Path):
            os.replace(here, place)
        else:
            place.fs.put_file(str(here), place.path)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name what an OSError leaves unnamed: where a disk is full, neither Python nor Arrow say which one."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def tidy(folder: Path) -> None:
    """Take away what processes that were killed left half written below a folder."""
    for left in folder.rglob(f"{ASIDE}*"):
        shutil.rmtree(left, ignore_errors=True)


def _makes_whole(name: str) -> bool:
    return name.rpartition("/")[2] in LAST


def _copy_here(local: Path, place: Path) -> Path:
    place.parent.mkdir(parents=True, exist_ok=True)
    aside = place.with_name(f".{place.name}.partial")
    remove(aside)
    shutil.copytree(local, aside) if local.is_dir() else shutil.copyfile(local, aside)
    if place.is_dir():
        remove(place)
    os.replace(aside, place)
    return place


# ------------------------------------------------------------------------------------------------------------------ errors

_CREDENTIALS = (
    "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN, or AWS_PROFILE, and what they are allowed there; "
    "on a cluster every node needs its own (a role of the machine is best)"
)
_NETWORK = "check the network and AWS_ENDPOINT_URL; the same command goes on where it stopped"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REFUSED = {"403", "Forbidden", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"}
_NONE_GIVEN = {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "CredentialRetrievalError", "TokenRetrievalError"}
_STORES = ("botocore", "aiobotocore", "s3fs", "gcsfs", "adlfs", "azure", "google", "aiohttp")  # whose errors are translated


@contextlib.contextmanager
def telling(place: Place | str = "") -> Iterator[None]:
    """Say what an object store refuses in one message, with the way out and without credentials; other errors pass as they are."""
    try:
        yield
    except RaywardError:
        raise
    except Exception as error:
        told = _told(error, place)
        if told is None:
            raise
        raise told from None


def _told(error: Exception, place: Place | str) -> DataError | None:
    """The error of an object store in our words, or None for any other. The store's own words may hold keys: only its codes are said."""
    if isinstance(error, OSError) and error.errno in _FULL:
        disk = public(str(place or error.filename or "the disk that is written to"))
        return DataError(f"{disk}: {os.strerror(error.errno)}", "make room there; the same command goes on where it stopped")
    cause = error if type(error).__module__.startswith(_STORES) else error.__cause__ or error
    where = public(str(place)) or "an object store"
    if not type(cause).__module__.startswith(_STORES):
        if isinstance(error, FileNotFoundError) and place and no_bucket(place):
            return DataError(f"{where}: there is no such bucket", "make the bucket, or check its name")
        return None
    kind, code = type(cause).__name__, _code(error) or type(cause).__name__
    if code == "NoSuchBucket":
        return DataError(f"{where}: there is no such bucket", "make the bucket, or check its name")
    if kind in _NONE_GIVEN:
        return DataError(f"{where}: no credentials were found ({kind})", _CREDENTIALS)
    if code in _REFUSED or isinstance(error, PermissionError):
        return DataError(f"{where}: the store refuses the credentials ({code})", _CREDENTIALS)
    if any(word in kind for word in ("Connect", "Timeout", "Connection", "SSL", "HTTPClient", "Closed")):
        endpoint = public(os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "its endpoint")
        return DataError(f"{where}: {endpoint} cannot be reached ({kind})", _NETWORK)
    return DataError(f"{where}: the store answered {code}", "see what its operator says of that; the same command goes on where it stopped")


def _code(error: BaseException) -> str:
    """What an S3 store calls its error; empty where that is not known."""
    said = getattr(error, "response", None) or getattr(error.__cause__, "response", None) or {}
    return str((said.get("Error") or {}).get("Code") or "")


def no_bucket(place: Place | str) -> bool:
    """Whether the bucket of an S3 place is missing: for a store, a file in it is missing just the same."""
    if isinstance(place, str | Path) or place.protocol != "s3":
        return False
    try:
        place.fs.call_s3("head_bucket", Bucket=place.path.partition("/")[0])
    except FileNotFoundError:
        return True
    except Exception:
        return False
    return False
