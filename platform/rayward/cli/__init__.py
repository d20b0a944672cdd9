"""The command line. It runs scripts, it does not import them; heavy things are imported inside commands, so `--help` answers at once.

rayward ls                           pipelines and jobs, a line each
rayward run label_pairs --help       what a script needs to know
rayward run mine.py --source S       a script of your own
rayward --store S run NAME           before any command: the store of this one, a folder or a URL
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from rayward.cli import cluster, jobs, models
from rayward.config import guarded, suggest
from rayward.errors import SettingsError

app = typer.Typer(
    name="rayward",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)
app.add_typer(models.app, name="models")
app.add_typer(jobs.app, name="jobs")
app.add_typer(cluster.app, name="cluster")


def script_folders() -> list[Path]:
    """Where the scripts lie: beside the source root in a checkout, inside the package in a wheel."""
    package = Path(__file__).resolve().parent.parent
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


@app.callback()
def options(
    store: Annotated[
        str, typer.Option(metavar="PLACE", help="folder or URL of the store [default: RAYWARD_STORE, then ./store]", show_default=False)
    ] = "",
) -> None:
    """Rollouts and judgements in, calibrated and registered reward models out."""
    if store.startswith("store:"):
        raise SettingsError(f"--store {store} names itself", "give a folder or a URL")
    if store:
        os.environ["RAYWARD_STORE"] = store


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


_SUBMIT = {"allow_extra_args": True, "allow_interspersed_args": False}  # ours stand before NAME, what follows is the script's
_submit = app.command(context_settings=_SUBMIT, short_help="Run a pipeline or a job on a cluster, as a Ray job.")
_submit(jobs.submit_with(find_script, script_folders))


@app.command()
def ls() -> None:
    """Pipelines and jobs, a line each."""
    for folder in script_folders():
        print(f"{folder.name}:")
        for path in sorted(folder.glob("*.py")):
            print(f"  {path.stem:<20} {first_line(path)}")


@app.command(short_help="Take a script home and change it.")
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


@app.command(context_settings=_PASS_ON, short_help="The whole story on the built-in toy world.")
def quickstart(context: typer.Context) -> None:
    """The whole story on the built-in toy world: minutes on a laptop, nothing downloaded."""
    execute(find_script("quickstart"), context.args)


@app.command(short_help="The MLflow UI: runs, metrics, reports, models.")
def ui(
    port: Annotated[int, typer.Option(min=1, max=65535, help="port on this machine")] = 5000,
    host: Annotated[str, typer.Option(help="address to listen on; the server has no password")] = "127.0.0.1",
    browse: Annotated[bool, typer.Option("--open/--no-open", help="open it in a browser")] = True,
) -> None:
    """The MLflow UI over the store: runs, metrics, reports, models; with MLFLOW_TRACKING_URI set to a server, that server's own."""
    from rayward import registry

    registry.ui(host, port, browse)


def main() -> None:
    """The `rayward` command."""
    guarded(app)
