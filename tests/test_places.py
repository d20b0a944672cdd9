"""Places: what names one, what is refused and how it is said, and the same words on disk and at a URL (fsspec's memory)."""

from __future__ import annotations

import os
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from rayward import places
from rayward.errors import DataError, SettingsError
from rayward.places import Place, at

pytest.importorskip("upath", reason="needs the extra s3")


@pytest.fixture(params=["disk", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    return tmp_path / "made" if request.param == "disk" else at(f"memory://{uuid.uuid4().hex}/made")


@pytest.mark.parametrize(
    ("text", "path"),
    [("a/b", "a/b"), ("/a/b", "/a/b"), ("a/", "a"), ("file:///a/b", "/a/b"), ("./store:x", "store:x"), ("c:d", "c:d")],
)
def test_a_path_is_a_path(text: str, path: str) -> None:
    assert at(text) == Path(path)
    assert not places.is_remote(text)
    assert not places.is_remote(at(text))


@pytest.mark.parametrize(
    ("text", "url"),
    [("memory://a/b", "memory://a/b"), ("memory://a//b/./c/", "memory://a/b/c"), ("s3://bucket/runs/x/", "s3://bucket/runs/x")],
)
def test_a_url_is_what_it_says(text: str, url: str) -> None:
    place = at(text)
    assert str(place) == url
    assert place.name == url.rpartition("/")[2]
    assert at(str(place)) == place == at(place)
    assert str(place / "x") == url + "/x"
    assert places.is_remote(text)
    assert places.is_remote(place)


def test_the_store_is_a_folder_or_a_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAYWARD_STORE", raising=False)
    assert at("store:a/b") == tmp_path / "store" / "a" / "b"
    assert at("store:") == places.store() == tmp_path / "store"
    monkeypatch.setenv("RAYWARD_STORE", "memory://far/away")
    assert str(at("store:a/b")) == "memory://far/away/a/b"
    assert places.is_remote("store:a/b")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("store:../x", "leads out of the store"),
        ("store:a/../../x", "leads out of the store"),
        ("store:/etc", "leads out of the store"),
        ("s3://bucket/a/../../x", "is no address"),
        ("s3://", "is no address"),
        ("s3://bucket/run[1]", "take for a pattern"),
        ("s4://bucket/x", "nothing here reaches s4://"),
        ("https://host/x", "nothing here reaches https://"),
        ("s3://bucket/x?endpoint_override=somewhere", "AWS_ENDPOINT_URL"),
        ("s3://somebody:s3cr3t@bucket/x", "put credentials into the environment"),
    ],
)
def test_what_is_no_place_is_said_with_the_way_out_and_without_secrets(text: str, words: str) -> None:
    with pytest.raises(SettingsError) as error:
        at(text)
    assert words in str(error.value)
    assert error.value.way_out
    assert "s3cr3t" not in str(error.value)


@pytest.mark.parametrize(("missing", "url", "way_out"), [("upath", "s3://bucket/x", "rayward[s3]"), ("gcsfs", "gs://bucket/x", "gcsfs")])
def test_what_is_not_installed_is_said(missing: str, url: str, way_out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(SettingsError) as error:
        at(url)
    assert f"pip install {way_out}" in error.value.way_out.replace("'", "") or way_out in error.value.way_out


def test_files_are_written_whole_listed_once_and_taken_away(folder: Place) -> None:
    assert places.listing(folder) == {}
    places.write(folder / "b.txt", "two")
    places.write(folder / "a" / "c.bin", b"\0")
    places.write(folder / "b.txt", "three")
    assert places.read(folder / "b.txt") == b"three"
    assert list(places.listing(folder)) == ["b.txt"]
    files = places.listing(folder, deep=True)
    assert {name: file.bytes for name, file in files.items()} == {"a/c.bin": 1, "b.txt": 5}
    assert files["b.txt"].bytes == places.stat(folder / "b.txt").bytes
    assert places.read_many(folder, ["b.txt", "gone.txt"]) == {"b.txt": b"three"}
    places.remove_files(folder, ["b.txt"])
    assert list(places.listing(folder, deep=True)) == ["a/c.bin"]
    places.remove(folder)
    places.remove(folder)
    assert places.listing(folder, deep=True) == {}
    with pytest.raises(FileNotFoundError):
        places.read(folder / "b.txt")


def test_a_file_is_created_once(tmp_path: Path) -> None:
    assert places.create(tmp_path / "a", b"1")
    assert not places.create(tmp_path / "a", b"2")
    assert (tmp_path / "a").read_bytes() == b"1"


class Refusal(OSError):
    """What a store says of a conditional write, as s3fs passes it on."""

    def __init__(self, code: str):
        super().__init__("refused")
        self.response = {"Error": {"Code": code}}


@pytest.mark.parametrize(
    ("code", "makes"), [("NotImplemented", True), ("PreconditionFailed", False), ("ConditionalRequestConflict", False)]
)
def test_a_file_is_created_once_also_in_a_store_of_other_words(code: str, makes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    place = at(f"memory://{uuid.uuid4().hex}/lock")
    real = type(place.fs).pipe_file

    def refusing(self: object, path: str, value: bytes, **how: object) -> None:
        if "mode" in how:
            raise Refusal(code)
        real(self, path, value)

    monkeypatch.setattr(type(place.fs), "pipe_file", refusing)
    assert places.create(place, b"1") == makes
    assert place.exists() == makes
    assert not places.create(place, b"2")
    code = "SlowDown"
    with pytest.raises(Refusal):
        places.create(place, b"3")


def test_a_file_lands_where_it_belongs_when_it_is_whole(folder: Place) -> None:
    with places.landing(folder / "x.txt") as path:
        path.write_text("whole")
    assert places.read(folder / "x.txt") == b"whole"
    with pytest.raises(KeyError), places.landing(folder / "y.txt") as path:  # noqa: PT012 - it breaks inside
        path.write_text("half")
        raise KeyError
    assert isinstance(folder, Path) or list(places.listing(folder)) == ["x.txt"]


def test_a_folder_goes_there_and_comes_back(folder: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYWARD_CACHE", str(tmp_path / "cache"))
    local = tmp_path / "local"
    for name in ("manifest.json", "part.bin", "deep/state.json", "deep/weights.bin"):
        places.write(local / name, name)
    places.write(folder / "old.bin", "goes")
    places.send(local, folder)
    assert list(places.listing(folder, deep=True)) == ["deep/state.json", "deep/weights.bin", "manifest.json", "part.bin"]
    here = places.fetch(folder)
    assert here.name == folder.name
    assert {str(p.relative_to(here)): p.read_text() for p in here.rglob("*") if p.is_file()} == {
        name: name for name in places.listing(local, deep=True)
    }
    assert places.fetch(str(folder)) == here
    alone = places.fetch(folder / "part.bin")
    assert (alone.name, alone.read_text()) == ("part.bin", "part.bin")


def test_another_content_is_another_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYWARD_CACHE", str(tmp_path / "cache"))
    folder = at(f"memory://{uuid.uuid4().hex}/model")
    places.write(folder / "a.bin", "one")
    first = places.fetch(folder)
    places.write(folder / "a.bin", "other")
    second = places.fetch(folder)
    assert (first / "a.bin").read_text() == "one"
    assert (second / "a.bin").read_text() == "other"
    with pytest.raises(DataError, match="does not exist"):
        places.fetch(folder / "nothing")
    assert not [p for p in (tmp_path / "cache").iterdir() if p.name.startswith(".")]


def test_of_two_who_fetch_at_once_the_first_one_s_copy_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYWARD_CACHE", str(tmp_path / "cache"))

    def writes(text: str, meanwhile: Callable[[], object] = lambda: None) -> Callable[[Path], bool]:
        def download(aside: Path) -> bool:
            meanwhile()
            aside.mkdir()
            (aside / "weights.bin").write_text(text)
            return True

        return download

    here = places.fetched("content", "model", writes("slow", lambda: places.fetched("content", "model", writes("quick"))))
    assert here is not None
    assert (here / "weights.bin").read_text() == "quick"
    assert places.fetched("other", "model", lambda aside: False) is None
    assert list((tmp_path / "cache").iterdir()) == [here.parent]


def test_what_changes_while_it_is_fetched_is_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYWARD_CACHE", str(tmp_path / "cache"))
    folder = at(f"memory://{uuid.uuid4().hex}/model")
    for name in ("a.bin", "b.bin"):
        places.write(folder / name, "old")
    real, changes = type(folder.fs).get, ["newer!"]

    def changing(self: object, *paths: object, **how: object) -> None:
        real(self, *paths, **how)
        for name in ("a.bin", "b.bin") if changes else ():
            places.write(folder / name, changes[0])
        del changes[:1]

    monkeypatch.setattr(type(folder.fs), "get", changing)
    here = places.fetch(folder)
    assert [(here / name).read_text() for name in ("a.bin", "b.bin")] == ["newer!", "newer!"]
    places.write(folder / "a.bin", "0")
    changes += ["1" * n for n in range(2, 6)]
    with pytest.raises(DataError, match="changes while it is read"):
        places.fetch(folder)
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_cache_with_a_limit_lets_go_of_what_was_used_longest_ago(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYWARD_CACHE", str(tmp_path / "cache"))
    folder = at(f"memory://{uuid.uuid4().hex}/models")
    fetched = {}
    for days, name in ((5, "a"), (3, "b"), (4, "c"), (0, "d")):
        places.write(folder / name / "weights.bin", b"x" * 1000)
        fetched[name] = places.fetch(folder / name)
        then = time.time() - days * 86_400
        for path in (fetched[name].parent, fetched[name], fetched[name] / "weights.bin"):
            os.utime(path, (then, then))
    assert places.fetch(folder / "c") == fetched["c"], "used now"
    monkeypatch.setenv("RAYWARD_CACHE_GB", "0.000001")  # a kilobyte
    places.write(folder / "e" / "weights.bin", b"x" * 1000)
    fetched["e"] = places.fetch(folder / "e")
    assert {name for name, path in fetched.items() if path.exists()} == {"c", "d", "e"}, "what was used within a day stays"
    monkeypatch.setenv("RAYWARD_CACHE_GB", "much")
    with pytest.raises(SettingsError, match="RAYWARD_CACHE_GB=much is no number"):
        places.fetch(folder / "a")


def test_what_makes_a_folder_whole_is_sent_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = at(f"memory://{uuid.uuid4().hex}/made")
    for name in ("manifest.json", "a.bin", "z.bin", "deep/state.json"):
        places.write(tmp_path / "local" / name, name)
    sent: list[str] = []
    for word in ("put", "put_file"):
        real: Callable[..., None] = getattr(type(folder.fs), word)

        def noted(
            self: object, here: object, there: str | list[str], *more: object, real: Callable[..., None] = real, **how: object
        ) -> None:
            sent.extend(path.partition("made/")[2] for path in ([there] if isinstance(there, str) else there))
            real(self, here, there, *more, **how)

        monkeypatch.setattr(type(folder.fs), word, noted)
    places.send(tmp_path / "local", folder)
    order = list(dict.fromkeys(sent))
    assert set(order[:2]) == {"a.bin", "z.bin"}
    assert order[2:] == ["deep/state.json", "manifest.json"]


def test_workers_are_told_where_and_never_with_what(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://localhost:9000")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s3cr3t")
    assert places.carried()["AWS_ENDPOINT_URL"] == "http://localhost:9000"
    assert "s3cr3t" not in str(places.carried())
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://me:s3cr3t@localhost:9000")
    assert "s3cr3t" not in str(places.carried())
