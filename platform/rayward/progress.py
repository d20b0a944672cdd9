"""One progress bar for all long work: a bar in a terminal, a line now and then in a log.

>>> with Progress("label_pairs", total=2, unit="parts") as bar:
...     bar.advance(1, loss="0.69")
...     bar.advance(1, loss="0.42")
"""

from __future__ import annotations

import os
import sys
import time
from functools import cache
from types import TracebackType
from typing import Any

BAR = 24  # characters
LOG_EVERY_S = 30.0  # seconds between two lines where there is no terminal


@cache
def _terminal() -> Any:
    """One for all bars: two of their own would write over each other."""
    from rich.console import Console

    return Console(stderr=True)


class Progress:
    """Counts towards a total; whatever else is said (`loss="0.42"`) stands behind the bar."""

    def __init__(self, what: str, total: int, unit: str, start: int = 0):
        self.what, self.total, self.unit = what, total, unit
        self.done = self.start = start
        self.started = self.spoke = time.monotonic()
        self.words = ""
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        if sys.stderr.isatty() and os.environ.get("RAYWARD_PROGRESS") != "log":
            from rich import progress

            self._bar = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(bar_width=BAR),
                progress.MofNCompleteColumn(),
                progress.TextColumn("{task.fields[unit]}"),
                progress.TimeRemainingColumn(compact=True),
                progress.TextColumn("{task.fields[words]}"),
                console=_terminal(),
            )
            self._bar.start()
            self._task = self._bar.add_task(self.what, total=self.total, completed=self.done, unit=self.unit, words="")
        return self

    def advance(self, by: int = 1, **words: str) -> None:
        """So much more is done."""
        self.done += by
        self.words = "  ".join(f"{name} {value}" for name, value in words.items()) or self.words
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, words=self._that_fit())
        elif time.monotonic() - self.spoke > LOG_EVERY_S:
            self._say()

    def _that_fit(self) -> str:
        """As many of the words as the terminal has room for behind the bar: what does not fit would take the bar's own place."""
        room = _terminal().width - BAR - len(f"{self.what}  {self.total:,}/{self.total:,} {self.unit} 00:00:00    ")
        words = self.words.split("  ")
        while words and len("  ".join(words)) > room:
            words.pop()
        return "  ".join(words)

    def _say(self) -> None:
        self.spoke = time.monotonic()
        took, did = self.spoke - self.started, self.done - self.start
        left = f", {took / did * (self.total - self.done):,.0f} s left" if did and self.done < self.total else ""
        print(
            f"{self.what}: {self.done:,} of {self.total:,} {self.unit} in {took:,.0f} s{left}  {self.words}",
            file=sys.stderr,
            flush=True,
        )

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif time.monotonic() - self.started > 1.0:
            self._say()
