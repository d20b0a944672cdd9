"""The cluster: is it well?

rayward cluster check
rayward cluster check --address 10.0.0.4:6379 --json
"""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from typing import Annotated

import typer

app = typer.Typer(help="Look after a cluster: check.", no_args_is_help=True, rich_markup_mode=None)

WORDS = {"green": ("ok", "32"), "yellow": ("look", "33"), "red": ("FAILS", "1;31")}  # what stands for a verdict, and its colour


@app.callback()
def group() -> None:
    """Look after a cluster."""


@app.command()
def check(
    address: Annotated[
        str,
        typer.Option(
            metavar="HOST:PORT", help="where the head is [default: RAY_ADDRESS, then the cluster started last here]", show_default=False
        ),
    ] = "",
    store: Annotated[
        str, typer.Option(metavar="PLACE", help="folder or URL that all nodes share [default: RAYWARD_STORE]", show_default=False)
    ] = "",
    limit: Annotated[float, typer.Option(min=1, metavar="SECONDS", help="how long a node may take to answer")] = 30.0,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object, for scripts")] = False,
) -> None:
    """Versions, GPUs, disks, clocks, storage, MLflow and open doors on every node; exit code 1 if anything fails."""
    from rayward import checkup

    report = checkup.look(address, store, limit)
    if as_json:
        print(json.dumps(report.as_dict(), indent=2))
    else:
        print(f"{'the cluster at ' + report.address if report.address else 'no cluster'}\n")
        said = ""
        for finding in report.findings:
            print(line(finding.what, finding.verdict, finding.says, "as above" if finding.way_out == said else finding.way_out))
            said = finding.way_out or said
    if not report.well:
        raise typer.Exit(1)


def line(what: str, verdict: str, says: str, way_out: str) -> str:
    """A finding in as many lines as the terminal needs for it, the way out below it.

    >>> print(line("clocks", "green", "within 2 ms", ""))
      ok     clocks    within 2 ms
    """
    word, colour = WORDS[verdict]
    indent = " " * 19
    width = max(60, min(shutil.get_terminal_size((80, 24)).columns, 120)) - 1
    rows = textwrap.wrap(says, width - len(indent), break_on_hyphens=False)
    if way_out and verdict != "green":
        rows += textwrap.wrap("-> " + way_out, width - len(indent), subsequent_indent="   ", break_on_hyphens=False)
    shown = f"\033[{colour}m{word:<7}\033[0m" if sys.stdout.isatty() else f"{word:<7}"
    return f"  {shown}{what:<10}" + f"\n{indent}".join(rows)
