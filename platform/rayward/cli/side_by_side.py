"""What `rayward models compare` shows: versions as columns A, B, ..., the figures of shared tests first, then what differs.

rayward models compare toy-pairs/1 toy-pairs/2
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from string import ascii_uppercase
from typing import Any

Found = Mapping[str, Any]  # what registry.compare gives, or a part of it


def show(found: Found) -> None:
    """Print versions side by side."""
    versions = found["versions"]
    letters = [ascii_uppercase[n] if n < 26 else str(n + 1) for n in range(len(versions))]
    for letter, v in zip(letters, versions, strict=True):
        aliases = "".join(f" @{alias}" for alias in v["aliases"])
        print(f"{letter}  {v['name']}/{v['version']}{aliases}  made {v['created']}  code {v['code'] or 'unknown'}")
    for report in found["reports"]:
        _report(report, letters)
    _what_lacks_a_report(found, letters)
    validation, digests = found["validation"], found["labels"]["digests"]
    if validation["figures"]:
        same = f"the same {validation['examples'][0]} examples" if validation["same"] else "not the same examples, so no comparison"
        print(f"\nkept weights on validation, {same}")
        _table([[f["name"], *(_number(v) for v in f["values"])] for f in validation["figures"]], ["", *letters])
    print(f"\nlabels: the same examples, digest {_word(digests[0])}" if len(set(digests)) == 1 else "\nlabels: not the same examples")
    _table([[row["name"], *(_word(v) for v in row["values"])] for row in found["labels"]["differ"]], ["", *letters])
    print("\nsettings that differ" if found["settings"] else "\nno setting differs")
    _table([[row["name"], *(_word(v) for v in row["values"])] for row in found["settings"]], ["", *letters])


def _report(report: Found, letters: Sequence[str]) -> None:
    """A test that several versions have a report on."""
    here = [letters[n] for n in report["versions"]]
    rows = []
    for f in report["figures"]:
        cells = [_sure(v, i, ".3f") for v, i in zip(f["values"], f["intervals"], strict=True)]
        rows.append([f["name"], *cells, *(_difference(d) for d in f["differences"])])
    print(f"\non {report['on']}, with 95 % intervals")
    _table(rows, ["", *here, *(f"{other} - {here[0]}" for other in here[1:])])
    for other, paired in zip(here[1:], report["paired"], strict=True):
        if isinstance(paired, str):
            print(f"{other} - {here[0]}: not paired: {paired}; whether two intervals overlap is no test")
        else:
            print(f"{other} - {here[0]}: paired over {paired:,} prompts; an interval that holds 0 shows no difference")


def _sure(value: float | None, interval: Sequence[float] | None, form: str) -> str:
    if value is None:
        return "-"
    return format(value, form) + (f" [{interval[0]:{form}},{interval[1]:{form}}]" if interval else "")


def _difference(d: Found) -> str:
    beside = {None: "", True: " overlap", False: " apart"}[None if d["interval"] else d["overlap"]]
    return _sure(d["value"], d["interval"], "+.3f") + beside


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _word(value: str | None) -> str:
    """A setting; of a digest its beginning."""
    return "-" if value is None else re.sub(r"\b([0-9a-f]{12})[0-9a-f]{20,}\b", r"\1", value) or "''"


def _what_lacks_a_report(found: Found, letters: Sequence[str]) -> None:
    """The way to figures that can be compared, where there are none."""
    shared = {n for report in found["reports"] for n in report["versions"]}
    lacking = [n for n in range(len(letters)) if n not in shared]
    if not lacking:
        return
    said = "; ".join(f"{letters[n]}: {', '.join(found['tests'][n]) or 'none'}" for n in range(len(letters)))
    print(f"\nno report on a test that another has too (tests of {said}); judge them on the same one:")
    for v in (found["versions"][n] for n in lacking):
        print(f"  rayward run evaluate_model --model models:/{v['name']}/{v['version']} --examples TEST --output REPORT")


def _table(rows: Sequence[Sequence[str]], heads: Sequence[str]) -> None:
    """A table as wide as the terminal; for a program that reads it, as wide as it gets."""
    from rich.console import Console
    from rich.table import Table

    if not rows:
        return
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    for head in heads:
        table.add_column(head, overflow="fold")
    for row in rows:
        table.add_row(*row)
    width = Console().width
    Console(width=width if sys.stdout.isatty() else max(width, 160), markup=False, highlight=False).print(table)
