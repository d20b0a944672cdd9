"""A folder at a URL that one node works in: what it wrote is sent there, and what another node wrote is fetched from there.

The URL is the truth, and the folder on this node's disk a copy to work with: what is not at the URL did not happen. So a node that is
lost takes nothing with it, a kill between writing and sending costs one checkpoint, and all workers of a group go on from the same one,
whatever lies on their own disks.

>>> import tempfile; folder = Path(tempfile.mkdtemp())
>>> one, two = (Mirror(folder / name, folder / "url") for name in ("one", "two"))
>>> (one.here / "step-1").mkdir(parents=True); _ = (one.here / "step-1" / "state.json").write_text("{}")
>>> one.send("step-1"); two.fetch("step-1"); (two.here / "step-1" / "state.json").read_text()
'{}'
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

from rayward import places
from rayward.errors import RaywardError
from rayward.places import Place

PATIENCE_S = 120.0  # seconds that a store may be away before a run ends over it
BETWEEN_S = 3.0  # seconds between two looks at what has grown here, and at whether somebody there asked to stop

T = TypeVar("T")


@dataclass(frozen=True)
class Mirror:
    """A folder on this node's disk, and the same folder at a URL."""

    here: Path
    there: Place
    _one: threading.Lock = field(default_factory=threading.Lock, compare=False, repr=False)  # or an old file could arrive after a new one

    def __truediv__(self, name: str) -> Mirror:
        return Mirror(self.here / name, self.there / name)

    def send(self, *names: str) -> None:
        """Send files or folders, in this order; what is not here is passed over.

        Raises:
            RaywardError: if the store did not take them for PATIENCE_S seconds.
        """
        for name in names:
            with self._one:
                if (self.here / name).exists():
                    patiently(partial(places.send, self.here / name, self.there / name), self.there / name)

    def fetch(self, *names: str) -> None:
        """Fetch files or folders as they are there; each appears whole or not at all, a checkpoint that is here already stays."""
        for name in names:
            patiently(partial(self._fetch, name), self.there / name)

    def _fetch(self, name: str) -> None:
        here, there = self.here / name, self.there / name
        if (here / "state.json").is_file() and (here / "state.json").read_bytes() == places.read(there / "state.json"):
            return
        copy = places.fetch(there)
        here.parent.mkdir(parents=True, exist_ok=True)
        if not places.is_remote(there):
            places.send(copy, here)
            return
        places.remove(here)
        os.rename(copy, here)  # out of the cache, which would keep every checkpoint
        with suppress(OSError):
            copy.parent.rmdir()

    def remove(self, name: str) -> None:
        """Delete a file or a folder there; what makes a folder whole goes first."""

        def gone() -> None:
            if places.is_remote(self.there):
                for marker in places.LAST:
                    places.remove(self.there / name / marker)
            places.remove(self.there / name)

        patiently(gone, self.there / name)

    def whole(self) -> list[str]:
        """The names of the folders there that hold a state.json, in order."""
        files = patiently(lambda: places.listing(self.there, deep=True), self.there)
        return sorted(name.removesuffix("/state.json") for name in files if name.endswith("/state.json") and name.count("/") == 1)

    def names(self) -> set[str]:
        """The names of what is there."""
        return {name.partition("/")[0] for name in patiently(lambda: places.listing(self.there, deep=True), self.there)}

    def read(self, name: str) -> bytes | None:
        """A file there, or None."""

        def content() -> bytes | None:
            with places.telling(self.there), suppress(FileNotFoundError):
                return places.read(self.there / name)
            return None

        return patiently(content, self.there / name)

    @contextmanager
    def following(self, growing: str, stop: str) -> Iterator[Callable[[], bool]]:
        """Send a growing file now and then; gives what says whether a file `stop` has come to be there."""
        ended, asked = threading.Event(), threading.Event()

        def look() -> None:
            size = 0
            while not ended.wait(BETWEEN_S):
                path = self.here / growing
                now = path.stat().st_size if path.exists() else 0
                with suppress(Exception):  # it goes with every checkpoint too, and that says what is wrong
                    if now != size:
                        with self._one:
                            places.send(path, self.there / growing)
                        size = now
                    if (self.there / stop).exists():
                        asked.set()

        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        try:
            yield asked.is_set
        finally:
            ended.set()
            thread.join()


def patiently(work: Callable[[], T], place: Place) -> T:
    """What `work` returns, tried again for PATIENCE_S seconds while the store of a place does not answer.

    Raises:
        RaywardError: with what the store said last.
    """
    began, pause = time.monotonic(), 0.5
    while True:
        try:
            with places.telling(place):
                return work()
        except (OSError, RaywardError) as error:
            if not places.is_remote(place) or isinstance(error, FileNotFoundError) or time.monotonic() - began > PATIENCE_S:
                raise
            time.sleep(pause)
            pause = min(2 * pause, 15.0)
