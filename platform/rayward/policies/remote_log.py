"""A verdict log (`asking`) at a URL: what was said is on this disk at once, and in the store a few seconds later.

    LOG/said/00-3f-9b1c...-0.jsonl   lines of one worker on prompts whose hash begins with 00 to 3f, as many as came within SEND_S
    LOG/said/00-3f-9b1c...-50.jsonl  the same, MERGED of them put together
    LOG/spent/9b1c....json           requests and tokens of that worker; what was spent is the sum

Nothing can be appended to an object, so a worker keeps a log of its own on its disk, and a thread of it sends what is new every SEND_S. A
node that is lost takes what came in its last SEND_S, and what was on its way, with it; a worker that is killed no more than that. All is
sent when a part is done and when a run ends, but by SIGKILL. A worker that begins with a part reads what was sent on its prompts. The
price: two PUTs per SEND_S and worker while answers come in.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

from rayward import places
from rayward.places import Place

SEND_S = 2.0  # seconds between two sendings: what is lost with a node, and one PUT each
LOOK_S = 10.0  # seconds between two looks at what other workers have spent: a budget is overspent by what they ask in this time
MERGED = 50  # sendings that are put together to one object, so that a later run has few to read


class RemoteLog:
    """Sends lines that were said, and what was spent; brings what others have sent."""

    def __init__(self, far: Place):
        self.far, self.name = far, uuid.uuid4().hex[:16]
        self._scratch = tempfile.TemporaryDirectory(prefix="rayward-said-")
        self.here = Path(self._scratch.name)
        self._lock = threading.Lock()  # of what waits
        self._sending = threading.Lock()  # held while the store is written to, when others may go on to add
        self._waiting: list[tuple[str, bytes]] = []
        self._small: list[str] = []  # objects that were not put together yet
        self._since: list[tuple[str, bytes]] = []  # the lines in them
        self._spent, self._spent_sent = (0, 0), (0, 0)
        self._others, self._looked = (0, 0), float("-inf")
        self._read: set[str] = set()
        self._sent = 0
        self._thread: threading.Thread | None = None

    def put(self, leaf: str, line: bytes) -> None:
        """A line to send soon, on a prompt whose hash begins with `leaf`."""
        with self._lock:
            self._waiting.append((leaf, line))
            self._go()

    def spend(self, requests: int, tokens: int) -> None:
        """Add to what this worker spent."""
        with self._lock:
            self._spent = (self._spent[0] + requests, self._spent[1] + tokens)
            self._go()

    def _go(self) -> None:
        """Have the thread run, which ends when there has been nothing to send for a while."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._ship_on, name="rayward-said", daemon=True)
            self._thread.start()

    def _ship_on(self) -> None:
        idle = 0
        while True:
            time.sleep(SEND_S)
            with contextlib.suppress(Exception):  # the store is away: what waits is sent later, and whoever calls flush is told
                idle = 0 if self.flush() else idle + 1
            with self._lock:
                if idle > 5 and not self._waiting and self._spent == self._spent_sent:
                    self._thread = None
                    return

    def flush(self) -> bool:
        """Send what waits, and say whether there was anything; an error of the store where that fails, and it waits on."""
        with self._sending:
            with self._lock:
                lines, spent = list(self._waiting), self._spent
            if lines:
                self._small.append(self._write(lines))
                self._since += lines
                with self._lock:
                    del self._waiting[: len(lines)]
            if new := spent != self._spent_sent:
                places.write(self.far / "spent" / f"{self.name}.json", json.dumps(spent))
                self._spent_sent = spent
            if len(self._small) >= MERGED:
                self._merge()
            return bool(lines) or new

    def _write(self, lines: Sequence[tuple[str, bytes]]) -> str:
        """Lines as a new object; returns its name."""
        leaves = [leaf for leaf, _ in lines]
        name = f"{min(leaves)}-{max(leaves)}-{self.name}-{self._sent}.jsonl"
        places.write(self.far / "said" / name, b"".join(line for _, line in lines))
        self._sent += 1
        return name

    def _merge(self) -> None:
        """Put small objects together. Who is killed in between leaves lines twice, and they are the same."""
        self._write(self._since)
        places.remove_files(self.far / "said", self._small)
        self._small.clear()
        self._since.clear()

    def lines(self, leaf: str) -> Iterator[bytes]:
        """Lines that others have sent, those of a leaf and what lies in one object with them, and that were not brought before."""
        folder = self.far / "said"
        names = [n for n in places.listing(folder) if n[:2] <= leaf <= n[3:5] and n not in self._read and self.name not in n]
        for at in range(0, len(names), 200):
            for name, content in places.read_many(folder, names[at : at + 200]).items():
                self._read.add(name)
                yield from content.splitlines(keepends=True)

    def spent(self, age: float = 0.0) -> tuple[int, int]:
        """Requests and tokens of all workers of all runs; those of others as they were up to `age` seconds ago."""
        if time.monotonic() - self._looked >= age:
            folder = self.far / "spent"
            names = [name for name in places.listing(folder) if name != f"{self.name}.json"]
            said = [json.loads(content) for content in places.read_many(folder, names).values()]
            self._others = (sum(requests for requests, _ in said), sum(tokens for _, tokens in said))
            self._looked = time.monotonic()
        return self._spent[0] + self._others[0], self._spent[1] + self._others[1]
