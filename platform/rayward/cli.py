"""The command line. It runs scripts, it does not import them; heavy things are imported inside commands, so `--help` answers at once.

rayward ls                           pipelines and jobs, a line each
rayward run label_pairs --help       what a script needs to know
rayward run mine.py --source S       a script of your own
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from rayward.config import guarded, public, suggest
from rayward.errors import SettingsError

app = typer.Typer(
    name="rayward",
    help="Rollouts and judgements in, calibrated and registered reward models out.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)
models_app = typer.Typer(help="Browse the registry: list, show, promote.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(models_app, name="models")


def script_folders() -> list[Path]:
    """Where the scripts lie: beside the source root in a checkout, inside the package in a wheel."""
    package = Path(__file__).resolve().parent
    root = package.parent.parent
    if (root / "pipelines").is_dir() and (root / "jobs").is_dir():
        return [root / "pipelines", root / "jobs"]
    return [package / "scripts" / "pipelines", package / "scripts" / "jobs"]


def scripts() -> dict[str, Path]:
    """Every script by name."""
    return {path.stem: path for folder in script_folders() for path in sorted(folder.glob("*.py"))}


def find_script(name: str) -> Path:
    """A script by its name, or the user's own by its path."""
    known = scripts()
    if name in known:
        return known[name]
    if name.endswith(".py") and Path(name).is_file():
        return Path(name)
    raise SettingsError(f"no script {name}", suggest(name, list(known)) + "; or give the path of your own")


def first_line(path: Path) -> str:
    """The first line of a script's docstring."""
    text = path.read_text(encoding="utf-8")
    return text.split('"""')[1].strip().splitlines()[0] if '"""' in text else ""


def execute(path: Path, arguments: list[str]) -> None:
    """Become the script: its exit code, its signals, its output."""
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, str(path), *arguments])


_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@app.command(context_settings=_PASS_ON)
def run(context: typer.Context, name: Annotated[str, typer.Argument(help="a script's name (rayward ls) or a path")] = "--help") -> None:
    """Run a pipeline or a job here: rayward run NAME [its options]. `rayward run NAME --help` lists them."""
    if name in ("--help", "-h"):
        print(
            "Usage: rayward run NAME [OPTIONS OF THE SCRIPT]\n\nRun a pipeline or a job here. rayward run NAME --help lists its options.\n"
        )
        ls()
        return
    execute(find_script(name), context.args)


@app.command()
def ls() -> None:
    """Pipelines and jobs, a line each."""
    for folder in script_folders():
        print(f"{folder.name}:")
        for path in sorted(folder.glob("*.py")):
            print(f"  {path.stem:<20} {first_line(path)}")


@app.command()
def cp(
    name: Annotated[str, typer.Argument(help="a script's name (rayward ls)")],
    to: Annotated[Path, typer.Argument(help="where to put it: a file or a folder")] = Path("."),
) -> None:
    """Take a script home and change it: rayward cp train_reward_model mine.py."""
    source = find_script(name)
    target = to / source.name if to.is_dir() else to
    if target.exists():
        raise SettingsError(f"{target} is there already", "choose another name")
    if not target.parent.is_dir():
        raise SettingsError(f"there is no folder {target.parent}", f"make it first: mkdir -p {target.parent}")
    target.write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    print(f"{target}\nrun it with: rayward run {target}")


@app.command(context_settings=_PASS_ON)
def quickstart(context: typer.Context) -> None:
    """The whole story on the built-in toy world: minutes on a laptop, nothing downloaded."""
    execute(find_script("quickstart"), context.args)


@app.command()
def ui(
    port: Annotated[int, typer.Option(help="port on this machine")] = 5000,
    host: Annotated[str, typer.Option(help="address to listen on; the server has no password")] = "127.0.0.1",
    browse: Annotated[bool, typer.Option("--open/--no-open", help="open it in a browser")] = True,
) -> None:
    """The MLflow UI over the store: runs, metrics, reports, models."""
    from rayward import registry

    registry.ui(host, port, browse)


@models_app.command("list")
def list_models(as_json: Annotated[bool, typer.Option("--json", help="one JSON array, for scripts")] = False) -> None:
    """Every version of every model."""
    from rayward import registry

    rows = registry.models()
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    if not rows:
        print(
            f"no models yet in {registry.tracking_uri()}\n"
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


@models_app.command("show")
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
    print(f'\nload it\n  mlflow.set_tracking_uri("{public(registry.tracking_uri())}")')
    print(f'  mlflow.pyfunc.load_model("models:/{row["name"]}/{row["version"]}").predict(rows)')


@models_app.command()
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


def main() -> None:
    """The `rayward` command."""
    guarded(app)


if __name__ == "__main__":
    main()
