"""Is this final answer right? Right, wrong, or unknown: an answer that cannot be read is never counted as wrong.

>>> numeric("... so 9 * 2 = 18.\\nA: 18", "18"), numeric("A: 17", "18"), numeric("I give up", "18")
(True, False, None)

The answer is looked for where answers are stated, and nowhere else: the last of `\\boxed{..}`, `#### ..`, `A: ..`, `The answer is ..`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction

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


LONGEST = 1000  # characters of a stated number; an exponent has three digits at most, so nothing takes long to compare
_NUMBER = r"[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,3}(?!\d))?"
_FRACTION = re.compile(rf"\\[dt]?frac\s*\{{\s*({_NUMBER})\s*\}}\s*\{{\s*({_NUMBER})\s*\}}|({_NUMBER})\s*/\s*({_NUMBER})|({_NUMBER})")
_OPERATORS = re.compile(r"[\d=^*/+]|(?<!\w)-(?!\w)")


def number(text: str) -> Fraction | None:
    """A text as a number, exactly; None unless there is just one number (or fraction) in it. Currency, commas and units are left out.

    >>> number("$1,234.50"), number("18 eggs"), number("\\\\frac{1}{2}"), number("-3"), number("x"), number("3 or 4"), number("2x + 1")
    (Fraction(2469, 2), Fraction(18, 1), Fraction(1, 2), Fraction(-3, 1), None, None, None)
    """
    for mark in ("\\$", "$", "\\%", "\\,", "**", "`"):
        text = text.replace(mark, "")
    text = text.replace("\N{MINUS SIGN}", "-")
    found = list(_FRACTION.finditer(text))
    if len(found) != 1 or len(text) > LONGEST:
        return None
    match = found[0]
    around = text[: match.start()] + " " + text[match.end() :]
    if _OPERATORS.search(around) or re.match(r"[A-Za-z_(]", text[match.end() :]) or text[: match.start()].rstrip().endswith("-"):
        return None
    above, below = match[1] or match[3] or match[5], match[2] or match[4] or "1"
    try:
        return Fraction(above.replace(",", "")) / Fraction(below.replace(",", ""))
    except (ValueError, ZeroDivisionError):
        return None


def exact(answer: str, gold: str) -> bool | None:
    """The stated answer is the gold answer, up to white space and case."""
    gold, stated = check_gold(gold), stated_answer(answer)
    return None if stated is None else " ".join(stated.split()).casefold() == " ".join(gold.split()).casefold()


def numeric(answer: str, gold: str) -> bool | None:
    """The stated answer is the number of the gold answer.

    Unknown where no number is stated, where the gold answer is not one number, and where what is stated is not one number but has the
    gold one in it. Numbers of which none is the gold one are wrong.

    >>> numeric("A: 10 + x", "10"), numeric("A: 10 + x", "28")
    (None, False)
    """
    gold, stated = check_gold(gold), stated_answer(answer)
    wanted = number(stated_answer(gold) or gold)
    if stated is None or wanted is None:
        return None
    value = number(stated)
    if value is None:
        among = [number(match.group()) for match in _FRACTION.finditer(stated)]
        return None if not among or wanted in among else False
    return value == wanted


def check_gold(gold: str) -> str:
    """A gold answer with something in it: an empty one would match anything."""
    if not gold.strip():
        raise BadRecord("empty: the gold answer has no text")
    return gold


GRADERS: dict[str, Grader] = {"exact": exact, "numeric": numeric}
