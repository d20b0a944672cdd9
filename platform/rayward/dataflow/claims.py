"""One run at a time on an output: a lock on disk, and at a URL, where nothing can be locked, a lease.

A lease is the object `.lock` in the stage. It is written on condition that there is none (S3 and Google Storage keep to that; where a
store does not, two runs that begin within one request both hold it until one of them looks), and its owner renews it every BEAT_S. Whoever
finds one of a process of this machine that is gone takes it; of any other it watches whether it is renewed: if so, another run is at work;
if it stays as it is for LAPSE_S, that run is lost, and its lease is taken. Clocks are not compared.

What a lease cannot do: a run that was cut off from the store for longer than LAPSE_S may come back and find its lease taken. It looks
before it publishes, and stops. The parts it wrote until then are those of the same recipe, the same byte for byte; or of another recipe,
whose stage the new run has emptied for its own: give every recipe an output of its own.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from rayward import places
from rayward.errors import DataError
from rayward.places import Place

LOCK = ".lock"
BEAT_S = 10.0  # seconds between two renewals of a lease: one GET and one PUT
SETTLE_S = 2.0  # seconds after which a lease that was taken from another run is looked at again
LAPSE_S = 35.0  # seconds after which a lease that nobody renews is void


@contextlib.contextmanager
def claimed(stage: Place, output: Place) -> Iterator[Callable[[], None]]:
    """Hold the stage of an output; DataError where another run does. What is yielded raises DataError when it is held no longer."""
    if isinstance(stage, Path):
        with _locked(stage, output):
            yield lambda: None
        return
    lease = _Lease(stage / LOCK, output)
    lease.take()
    try:
        yield lease.check
    finally:
        lease.release()


@contextlib.contextmanager
def _locked(stage: Path, output: Place) -> Iterator[None]:
    stage.mkdir(parents=True, exist_ok=True)
    with open(stage / LOCK, "w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _taken(output) from None
        except OSError:
            pass  # a file system without locks
        if not (stage / LOCK).exists() or not os.path.samestat(os.fstat(lock.fileno()), (stage / LOCK).stat()):
            raise _taken(output)  # whoever held it has let go of it, and this file went along
        try:
            yield
        finally:
            (stage / LOCK).unlink(missing_ok=True)


def _taken(output: Place) -> DataError:
    return DataError(f"another run is making {output} at this moment", "wait for it, or choose another --output")


class _Lease:
    """The object that says who works on an output, and the thread that renews it."""

    def __init__(self, path: Place, output: Place):
        self.path, self.output = path, output
        self.owner, self.beats, self.lost = uuid.uuid4().hex, 0, False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="rayward-lease", daemon=True)

    def take(self) -> None:
        """Make it this run's, or DataError."""
        void = False
        while not places.create(self.path, self._words()):
            found = self._found()
            if found is None:
                continue
            if not _gone(found):
                self._watch(found)
            if self._found() == found:
                places.remove_files(self.path.parent, [LOCK])
                void = True
        if void:  # of two who found it void at once, the second may have removed what the first had written
            time.sleep(SETTLE_S)
            if not self._mine():
                raise _taken(self.output)
        self._thread.start()

    def _watch(self, found: bytes) -> None:
        """Wait until a lease is void; DataError when it is renewed."""
        said = json.loads(found)
        print(
            f"{self.output}: a run of process {said['pid']} on {said['host']} was at work here; waiting {LAPSE_S:.0f} s for a sign of it",
            file=sys.stderr,
        )
        end = time.monotonic() + LAPSE_S
        while time.monotonic() < end:
            time.sleep(BEAT_S / 4)
            now = self._found()
            if now is None:
                return
            if now != found:
                raise _taken(self.output)

    def _found(self) -> bytes | None:
        with contextlib.suppress(FileNotFoundError):
            return places.read(self.path)
        return None

    def _words(self) -> bytes:
        about = {"owner": self.owner, "beat": self.beats, "pid": os.getpid(), "host": platform.node(), "machine": _machine()}
        return json.dumps(about).encode()

    def _renew(self) -> None:
        while not self._ended.wait(BEAT_S):
            with contextlib.suppress(Exception):  # the store is away: try again
                if not self._mine():
                    self.lost = True
                    return
                self.beats += 1
                places.write(self.path, self._words())

    def _mine(self) -> bool:
        found = self._found()
        return found is not None and json.loads(found)["owner"] == self.owner

    def check(self) -> None:
        """DataError where another run has taken the lease."""
        if self.lost or not self._mine():
            raise DataError(
                f"{self.output}: this run was out of reach for too long, and another one has taken its place", "let that one finish"
            )

    def release(self) -> None:
        """Let go of it."""
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(Exception):  # it runs out by itself
            if not self.lost and self._mine():
                places.remove_files(self.path.parent, [LOCK])


def _machine() -> str:
    """Where a process id means the same process: this boot of this machine, and the same container."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    return ""


def _gone(found: bytes) -> bool:
    """Whether the owner of a lease was a process of this machine that has ended."""
    said = json.loads(found)
    if not said["machine"] or said["machine"] != _machine():
        return False
    try:
        os.kill(said["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
