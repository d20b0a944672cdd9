"""Browse the registry, and say which version counts.

rayward models list
rayward models show toy-pairs@champion
rayward models compare toy-pairs/1 toy-pairs/2
rayward models promote toy-pairs 2
rayward models rollback toy-pairs
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Browse the registry: list, show, compare, promote, roll back.", no_args_is_help=True, rich_markup_mode=None)


@app.command("list")
def list_models(as_json: Annotated[bool, typer.Option("--json", help="one JSON array, for scripts")] = False) -> None:
    """Every version of every model."""
    from rayward import registry

    rows = registry.models()
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    if not rows:
        print(
            f"no models yet in {registry.address()}\n"
            "register one: rayward run train_reward_model ... --register NAME, or: rayward quickstart"
        )
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("model", "version", "alias", "labels", "objective", "base", "validation", "data digest", "created"):
        table.add_column(column, no_wrap=True)
    for row in rows:
        tags = row["tags"]
        accuracy = tags.get("best_accuracy")
        table.add_row(
            row["name"],
            row["version"],
            ", ".join(row["aliases"]),
            tags.get("labeler"),
            tags.get("objective"),
            Path(tags.get("base_model") or "").name,
            f"{float(accuracy):.3f}" if accuracy else "",
            (tags.get("data_digest") or "")[:12],
            row["created"],
        )
    width = Console().width
    Console(width=width if sys.stdout.isatty() else max(width, 160)).print(table)


@app.command("show")
def show_model(
    name: Annotated[str, typer.Argument(help="NAME, NAME@ALIAS or NAME/VERSION")],
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object, for scripts")] = False,
) -> None:
    """One version: what it is, how good, what it came from, how to load it."""
    from rayward import registry

    row = registry.find(name)
    if as_json:
        print(json.dumps(row, indent=2))
        return
    print(
        f"{row['name']} version {row['version']}  {' '.join('@' + a for a in row['aliases'])}"
        f"  created {row['created']}  run {row['run_id']}"
    )
    for title, values in (("what it came from and how it did", row["tags"]), ("last metrics of its run", row["metrics"])):
        print(f"\n{title}")
        for key, value in sorted(values.items()):
            print(f"  {key:<34} {value if isinstance(value, str) else round(value, 4)}")
    print(f'\nload it\n  mlflow.set_tracking_uri("{registry.address()}")')
    print(f'  mlflow.pyfunc.load_model("models:/{row["name"]}/{row["version"]}").predict(rows)')


@app.command("compare")
def compare_models(
    names: Annotated[list[str], typer.Argument(help="two or more of NAME, NAME@ALIAS or NAME/VERSION; differences are to the first")],
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object, for scripts")] = False,
) -> None:
    """Versions side by side: figures on the same tests with their intervals, and what differs in settings, labels and code."""
    from rayward import registry

    found = registry.compare(names)
    if as_json:
        print(json.dumps(found, indent=2))
        return
    from rayward.cli import side_by_side

    side_by_side.show(found)


@app.command()
def promote(
    name: Annotated[str, typer.Argument(help="the model")],
    version: Annotated[str, typer.Argument(help="the version that is to carry the alias")],
    alias: Annotated[str, typer.Option(help="the alias; models:/NAME@ALIAS then means this version")] = "champion",
) -> None:
    """Give a version an alias (champion, unless another is named)."""
    from rayward import registry

    done = registry.promote(name, version, alias)
    before = f" (before: version {done['before']})" if done["before"] and done["before"] != done["version"] else ""
    print(f"models:/{done['name']}@{done['alias']} is now version {done['version']}{before}")


@app.command()
def rollback(
    name: Annotated[str, typer.Argument(help="the model")],
    alias: Annotated[str, typer.Option(help="the alias that goes back")] = "champion",
) -> None:
    """Give an alias back to the version that had it before the last promotion."""
    from rayward import registry

    done = registry.rollback(name, alias)
    print(f"models:/{done['name']}@{done['alias']} is version {done['version']} again (was version {done['before']})")
