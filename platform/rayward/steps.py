"""Cut an answer into steps, and tell the value of a step prefix from its continuations.

>>> cut("Add.\\n2+2=4.\\n\\nA: 4")
('Add.\\n', '2+2=4.\\n\\n', 'A: 4')

The pieces always join back to the answer, and a piece keeps the separator that ends it: with today's tokenizers a line break fuses
with the punctuation before it, so cutting after the break is what leaves the tokens as the model wrote them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass


def cut(answer: str) -> tuple[str, ...]:
    """Cut after every line break or run of blank lines; a blank piece stays with the one before it, or at the start with the one after it.

    >>> cut("one line"), cut("\\n a\\nb\\n")
    (('one line',), ('\\n a\\n', 'b\\n'))
    """
    pieces: list[str] = []
    for line in re.findall(r"[^\n]*\n|[^\n]+", answer):
        if pieces and not (line.strip() and pieces[-1].strip()):
            pieces[-1] += line
        else:
            pieces.append(line)
    return tuple(pieces) or (answer,)


@dataclass(frozen=True)
class Value:
    """What is known of a step prefix: of `count` continuations whose answer could be graded, `right` ended right."""

    right: int = 0
    count: int = 0

    @property
    def share(self) -> float:
        """The Monte-Carlo estimate of P(final answer right | prefix) (Math-Shepherd, soft estimation; arXiv 2312.08935, eq. 4)."""
        return self.right / self.count

    @property
    def any_right(self) -> float:
        """1 if any continuation ended right (Math-Shepherd, hard estimation; arXiv 2312.08935, eq. 3)."""
        return float(self.right > 0)


def prefix_values(outcomes: Iterable[tuple[int, bool | None]]) -> dict[int, Value]:
    """The value of every prefix from (kept steps, ended right) pairs; unknown endings do not count.

    >>> prefix_values([(1, True), (1, False), (2, False), (2, None)])
    {1: Value(right=1, count=2), 2: Value(right=0, count=1)}
    """
    values: dict[int, Value] = {}
    for kept, right in outcomes:
        if right is not None:
            so_far = values.get(kept, Value())
            values[kept] = Value(so_far.right + right, so_far.count + 1)
    return values
