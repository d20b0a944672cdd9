"""A buffer between a job and a server that may be away: nothing waits for the server, and nothing is lost.

Records (plain JSON) are put into a queue and appended to a file; a thread hands them to `send` in order, again and again with growing
pauses until they arrive. When all have arrived the file goes; a process that is killed before that leaves it to the next one. A record
whose answer got lost is sent twice, so `send` must be one that may be repeated.

>>> arrived = []
>>> buffer = Buffer(arrived.extend, lambda error: False, "the server")
>>> buffer.put({"tags": {"a": "1"}})
>>> buffer.close(wait_s=10)
0
>>> arrived
[{'tags': {'a': '1'}}]
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from rayward.config import public

Record = dict[str, Any]

EVERY_S = 2.0  # seconds between two deliveries
LONGEST_S = 15.0  # seconds between two attempts at a server that is away
MANY = 500  # points of metrics in one delivery; MLflow takes 1000


def read(file: Path) -> list[Record]:
    """The records that an earlier process left; a last line that was cut off is not one."""
    records = []
    with contextlib.suppress(FileNotFoundError):
        for line in file.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):
                records.append(json.loads(line))
    return records


class Buffer:
    """Records on their way. `refused(error)` tells an error that would come again, for which a record is dropped, from a passing one."""

    def __init__(
        self,
        send: Callable[[Sequence[Record]], None],
        refused: Callable[[Exception], bool],
        where: str,
        file: Path | None = None,
        before: Iterable[Record] = (),
    ):
        self.send, self.refused, self.where, self.file = send, refused, where, file
        self.waiting = deque(before)
        self.changed = threading.Condition()
        self.wake = threading.Event()
        self.closed = False
        self.away_since: float | None = None  # monotonic seconds
        self.said: set[str] = set()
        if file is not None:
            self._on_disk(lambda f: _rewrite(f, self.waiting))
        threading.Thread(target=self._work, name="tracking", daemon=True).start()

    def put(self, record: Record) -> None:
        """One more, at the end of the queue; returns at once."""
        with self.changed:
            self.waiting.append(record)
            if self.file is not None:
                self._on_disk(lambda f: _append(f, [record]))
        if len(self.waiting) > MANY and self.away_since is None:
            self.wake.set()

    def drain(self, wait_s: float) -> int:
        """Deliver now; the number of records that still wait after so many seconds."""
        self.wake.set()
        with self.changed:
            self.changed.wait_for(lambda: not self.waiting, wait_s)
            return len(self.waiting)

    def close(self, wait_s: float) -> int:
        """Deliver what waits, and end; the number of records that could not be delivered and stay in the file."""
        left = self.drain(wait_s)
        self.closed = True
        self.wake.set()
        return left

    # ------------------------------------------------------------------------------------------------------------ the thread

    def _work(self) -> None:
        pause = EVERY_S
        while not self.closed:
            self.wake.wait(pause)
            self.wake.clear()
            pause = EVERY_S if self._deliver() else min(1.6 * pause, LONGEST_S)

    def _deliver(self) -> bool:
        """Send everything; False if the other side is away."""
        while batch := self._batch():
            try:
                self.send(batch)
            except Exception as error:  # a network, a server, a database, a disk: each has its own
                if not self.refused(error):
                    self._away(error)
                    return False
                self._say(f"{self.where} refuses a record of the run: {_first_line(error)}")
            with self.changed:
                for _ in batch:
                    self.waiting.popleft()
                if not self.waiting and self.file is not None:
                    self._on_disk(lambda f: f.unlink(missing_ok=True))
                self.changed.notify_all()
        if self.away_since is not None:
            self._say(f"{self.where} is back after {time.monotonic() - self.away_since:.0f} s; what waited has arrived", again=True)
            self.away_since = None
        return True

    def _batch(self) -> list[Record]:
        """What goes out next: one record, or as many lines of metrics as one delivery takes."""
        with self.changed:
            batch: list[Record] = []
            points = 0
            for record in self.waiting:
                points += len(record["metrics"]) if "metrics" in record else MANY + 1
                if batch and points > MANY:
                    break
                batch.append(record)
            return batch

    def _away(self, error: Exception) -> None:
        if self.away_since is None:
            self.away_since = time.monotonic()
            self._say(f"{self.where} does not take what is logged, and the job goes on: {_first_line(error)}", again=True)

    def _say(self, text: str, again: bool = False) -> None:
        if again or text not in self.said:
            self.said.add(text)
            print(f"tracking: {text}", file=sys.stderr, flush=True)

    def _on_disk(self, change: Callable[[Path], None]) -> None:
        """Change the file; a disk that is full must not end a training."""
        assert self.file is not None
        try:
            change(self.file)
        except OSError as error:
            self._say(f"{self.file} cannot be written ({error.strerror}): what {self.where} has not taken is kept in memory only")


def _append(file: Path, records: Iterable[Record]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as out:
        out.writelines(json.dumps(record) + "\n" for record in records)


def _rewrite(file: Path, records: Sequence[Record]) -> None:
    """Begin a file anew with what is left of it; a process that is killed meanwhile leaves the old one."""
    if not records:
        file.unlink(missing_ok=True)
        return
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    _append(aside, records)
    os.replace(aside, file)


def _first_line(error: Exception) -> str:
    """What is the matter; of a database its own words, which SQLAlchemy says after a hint to programmers.

    >>> _first_line(RuntimeError("(raised as a result of Query-invoked autoflush)\\n(sqlite3.OperationalError) database or disk is full"))
    '(sqlite3.OperationalError) database or disk is full'
    """
    lines = (str(error) or type(error).__name__).splitlines()
    return public(next((line for line in lines if not line.startswith("(raised as a result of")), lines[0]))[:300]
