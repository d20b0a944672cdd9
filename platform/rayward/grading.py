"""Is this final answer right? Right, wrong, or unknown: an answer that cannot be read is never counted as wrong.

>>> numeric("... so 9 * 2 = 18.\\nA: 18", "18"), numeric("A: 17", "18"), numeric("I give up", "18")
(True, False, None)

The answer is looked for where answers are stated, and nowhere else: the last of `\\boxed{..}`, `#### ..`, `A: ..`, `The answer is ..`.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from rayward.records import BadRecord

Grader = Callable[[str, str], bool | None]  # (answer, gold) -> right, wrong, unknown

_STATED = re.compile(r"(?:####|^A:|\bthe (?:final )?answer is:?)[ \t]*([^\n]+)", re.IGNORECASE | re.MULTILINE)
_BOXED = "\\boxed{"


def stated_answer(answer: str) -> str | None:
    """The final answer an answer states, or None.

    >>> stated_answer("first \\\\boxed{1}, then \\\\boxed{\\\\frac{1}{2}}"), stated_answer("A: 3\\nA: 4 "), stated_answer("7 days")
    ('\\\\frac{1}{2}', '4', None)
    """
    found: tuple[int, str] | None = None
    start = answer.rfind(_BOXED)
    if start >= 0:
        depth, begin = 1, start + len(_BOXED)
        for end in range(begin, len(answer)):
            depth += (answer[end] == "{") - (answer[end] == "}")
            if depth == 0:
                found = (start, answer[begin:end])
                break
    for match in _STATED.finditer(answer):
        if found is None or match.start() > found[0]:
            found = (match.start(), match.group(1))
    if found is None or not found[1].strip():
        return None
    return found[1].strip().rstrip(".").strip()


def number(text: str) -> float | None:
    """A text as a number: currency signs, thousands separators, percent signs and units around it are left out.

    >>> number("$1,234.50"), number("18 eggs"), number("-3"), number("x")
    (1234.5, 18.0, -3.0, None)
    """
    match = re.search(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+", text.replace("$", ""))
    return float(match.group().replace(",", "")) if match else None


def exact(answer: str, gold: str) -> bool | None:
    """The stated answer is the gold answer, up to white space and case."""
    stated = stated_answer(answer)
    return None if stated is None else " ".join(stated.split()).casefold() == " ".join(check_gold(gold).split()).casefold()


def numeric(answer: str, gold: str) -> bool | None:
    """The stated answer is the number of the gold answer."""
    stated = stated_answer(answer)
    value, wanted = number(stated) if stated is not None else None, number(check_gold(gold))
    return None if value is None or wanted is None else abs(value - wanted) < 1e-9 * max(1.0, abs(wanted))


def check_gold(gold: str) -> str:
    """A gold answer with something in it: an empty one would match anything."""
    if not gold.strip():
        raise BadRecord("empty: the gold answer has no text")
    return gold


GRADERS: dict[str, Grader] = {"exact": exact, "numeric": numeric}
