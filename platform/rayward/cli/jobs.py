"""rayward submit and rayward jobs: the same words on a cluster.

rayward submit NAME --help            what the script needs to know; its words follow its name, our options stand before it
rayward jobs list                     what was sent, the newest first
rayward jobs logs label_pairs -f      the log of the newest label_pairs, as it is written
rayward jobs stop ID                  stop it; the same `rayward submit` goes on where it stopped
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rayward.errors import SettingsError

if TYPE_CHECKING:
    from rayward.cluster.dashboard import Target
    from rayward.cluster.jobs import Job

LEAST_COMMAND = 16  # characters; a shorter piece of a command says nothing

app = typer.Typer(help="Jobs on a cluster: list, status, logs, stop.", no_args_is_help=True, rich_markup_mode=None)

Address = Annotated[
    str,
    typer.Option(
        metavar="URL", help="of the cluster's dashboard [default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS, cluster.yaml]", show_default=False
    ),
]
ClusterFile = Annotated[
    str, typer.Option("--cluster", metavar="FILE", help="file of Ray's cluster launcher: through ssh to its head", show_default=False)
]
JobId = Annotated[str, typer.Argument(metavar="ID", help="a job's id, or how it begins: the newest of those")]
AsJson = Annotated[bool, typer.Option("--json", help="JSON, for scripts")]


def _warn(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _say(line: str) -> None:
    print(line, flush=True)


# -------------------------------------------------------------------------------------------------------------------- submit


def submit_with(find_script: Callable[[str], Path], folders: Callable[[], list[Path]]) -> Callable[..., None]:
    """The submit command, over the scripts that the command line knows."""

    def submit(
        context: typer.Context,
        name: Annotated[str, typer.Argument(metavar="NAME", help="a script's name (rayward ls) or a path; its own words follow")],
        address: Address = "",
        cluster_file: ClusterFile = "",
        no_wait: Annotated[bool, typer.Option("--no-wait", help="print the id and return, instead of following the log")] = False,
        shared: Annotated[
            list[Path] | None, typer.Option(metavar="FOLDER", help="a folder that every node has under the same path (repeatable)")
        ] = None,
        env: Annotated[
            list[str] | None, typer.Option(metavar="VARIABLE", help="name of a variable to send; its value cannot be seen (repeatable)")
        ] = None,
        ship: Annotated[
            list[Path] | None, typer.Option(metavar="PATH", help="a file or folder to send beside the script (repeatable)")
        ] = None,
        python: Annotated[
            str, typer.Option(metavar="PATH", help="interpreter on the cluster [default: python; here: this one]", show_default=False)
        ] = "",
        package: Annotated[
            bool | None, typer.Option("--package/--no-package", help="send this rayward too [default: from a checkout]", show_default=False)
        ] = None,
        cpus: Annotated[
            float, typer.Option(min=0, metavar="NUMBER", help="CPU cores that the entry process holds; Ray's workers have their own")
        ] = 0.0,
        gpus: Annotated[
            float, typer.Option(min=0, metavar="NUMBER", help="GPUs that the entry process holds, e.g. to train with --workers 1")
        ] = 0.0,
        memory: Annotated[float, typer.Option(min=0, metavar="GIB", help="memory that the entry process holds, in GiB")] = 0.0,
    ) -> None:
        """Run a pipeline or a job on a cluster: rayward submit [OPTIONS] NAME [the script's options]."""
        from rayward.cluster import jobs

        if math.inf in (cpus, gpus, memory):
            raise SettingsError("no machine has endlessly much", "give --cpus, --gpus and --memory (GiB) as numbers")
        script = find_script(name)
        words = context.args
        if {"--help", "-h", "--dry-run"} & set(words):
            sys.exit(subprocess.run([sys.executable, str(script), *words]).returncode)
        resolved = _resolve(script, words)
        from rayward.cluster.dashboard import reach

        target = reach(address, cluster_file)
        request = jobs.Request(cpus, gpus, memory * 2**30, tuple(shared or ()), tuple(env or ()), tuple(ship or ()), python)
        from rayward.storage import code_version

        files = _package(folders()) if package or (package is None and _checkout(folders())) else {}
        job = jobs.describe(script, words, request, target.here, files, code_version(), resolved)
        _submit(target, job, wait=not no_wait)

    return submit


def _submit(target: Target, job: Job, *, wait: bool) -> None:
    """Send, say where it went, and follow it or leave it."""
    from rayward.cluster import jobs, shipping

    job_id, fresh = jobs.send(target, job)
    if fresh:
        size = shipping.size_of(job.files) / 2**20
        _warn(f"{job_id} sent to {target.name}{' (this machine)' if target.here else ''}: {len(job.files)} files, {size:.1f} MB")
        _warn(f"rayward {job.carries}, python {job.python}")
    else:
        _warn(f"{job_id} is the same command, and it runs already: not sent again")
    if not wait:
        print(job_id)
        _warn(_way_back(job_id, target))
        return
    _follow(target, job_id)


def _way_back(job_id: str, target: Target) -> str:
    return f"come back: rayward jobs logs {job_id} -f{target.options}\nstop it:   rayward jobs stop {job_id}{target.options}"


def _follow(target: Target, job_id: str) -> None:
    """Its log, then its exit code; Ctrl-C leaves it running."""
    from rayward.cluster import jobs

    try:
        info = jobs.follow(target, job_id, _say, _warn)
    except KeyboardInterrupt:
        _warn(f"\n{job_id} runs on without being watched\n{_way_back(job_id, target)}")
        sys.exit(130)
    code, words = jobs.verdict(info, f"rayward jobs logs {job_id}{target.options}")
    _warn(words)
    sys.exit(code)


def _resolve(script: Path, words: list[str]) -> dict[str, Any]:
    """The settings that the script makes of its words, before anything is sent: its own mistakes are said here."""
    import yaml

    if b"command(main)" not in script.read_bytes():
        return {}  # not one of ours, and not made like one
    said = subprocess.run([sys.executable, str(script), *words, "--dry-run"], capture_output=True, text=True)
    if said.returncode:
        sys.stdout.write(said.stdout)
        sys.stderr.write(said.stderr)
        sys.exit(said.returncode)
    try:
        settings = yaml.safe_load(said.stdout)
    except yaml.YAMLError:  # a script that says more than its settings
        return {}
    return settings if isinstance(settings, dict) else {}


def _checkout(folders: list[Path]) -> bool:
    """Whether the package lies beside its scripts, as in a checkout, and not inside an installation."""
    return folders[0].parent.name != "scripts"


def _package(folders: list[Path]) -> dict[str, Path]:
    from rayward.cluster import shipping

    return shipping.package_files(Path(__file__).resolve().parent.parent, {f.name: sorted(f.glob("*.py")) for f in folders})


# ---------------------------------------------------------------------------------------------------------------------- jobs


def _when(seconds: float | None) -> str:
    return time.strftime("%m-%d %H:%M", time.localtime(seconds)) if seconds else ""


def _took(row: dict[str, Any]) -> str:
    """How long a job ran, or has run so far."""
    if not row["started"]:
        return ""
    seconds = int((row["ended"] or time.time()) - row["started"])
    hours, minutes = seconds // 3600, seconds // 60 % 60
    return f"{hours} h {minutes:02d}" if hours else f"{minutes} min {seconds % 60:02d}" if minutes else f"{seconds} s"


@app.command("list")
def list_jobs(address: Address = "", cluster_file: ClusterFile = "", as_json: AsJson = False) -> None:
    """What was sent to the cluster, the newest first."""
    from rayward.cluster import jobs
    from rayward.cluster.dashboard import reach

    target = reach(address, cluster_file)
    rows = [jobs.plain(info) for info in jobs.listed(target)]
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    if not rows:
        print(f"no jobs yet at {target.name}\nsend one: rayward submit NAME ...  (rayward ls)")
        return
    _print_table(rows)


def _print_table(rows: list[dict[str, Any]]) -> None:
    """A line a job; the command gets what room the terminal leaves, and none where that is little."""
    from rich.console import Console
    from rich.table import Table

    width = Console().width if sys.stdout.isatty() else max(Console().width, 120)
    lines = []
    for row in rows:
        state = row["state"] + (f" ({row['exit_code']})" if row["exit_code"] else "")
        lines.append([row["id"], state, _when(row["started"]), _took(row), row["metadata"].get("user") or ""])
    columns = ["id", "state", "started", "took", "user"]
    room = width - sum(2 + max(len(line[at]) for line in [columns, *lines]) for at in range(len(columns)))
    if room >= LEAST_COMMAND:
        columns.append("command")
        for line, row in zip(lines, rows, strict=True):
            command = row["metadata"].get("command") or row["entrypoint"]
            line.append(command if len(command) <= room else command[: room - 1] + "…")
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, no_wrap=column not in ("id", "user"), overflow="fold")
    for line in lines:
        table.add_row(*line)
    Console(width=width, highlight=False, markup=False).print(table)


@app.command(short_help="One job: how it stands, what it is, its run.")
def status(job_id: JobId, address: Address = "", cluster_file: ClusterFile = "", as_json: AsJson = False) -> None:
    """One job: how it stands, what it is, which run of the registry it writes."""
    from rayward.cluster import jobs
    from rayward.cluster.dashboard import reach

    target = reach(address, cluster_file)
    info = jobs.find(target, job_id)
    row = jobs.plain(info) | _run_of(info.submission_id)
    if as_json:
        print(json.dumps(row, indent=2))
        return
    code = f" with exit code {row['exit_code']}" if row["exit_code"] else ""
    print(f"{row['id']}  {row['state']}{code}  started {_when(row['started'])}, {_took(row)}")
    mine = row["metadata"] or {"command": row["entrypoint"]}
    for name, value in [*mine.items(), ("run", _run_in_words(row))]:
        if value:
            print(f"  {name:<10} {value}")
    if row["state"] in ("pending", "failed") and row["message"].strip():
        print(f"  {'message':<10} {row['message'].strip()[:2000]}")
    print(f"  {'log':<10} rayward jobs logs {row['id']}{target.options}")


def _run_of(job_id: str) -> dict[str, Any]:
    """The MLflow run that carries this job's id, as plain values; `run_unknown` says why it cannot be asked for."""
    from rayward import registry
    from rayward.errors import RegistryError

    try:
        ran = registry.run_of_submission(job_id)
    except RegistryError as error:
        return {"run": None, "run_unknown": error.what}
    return {"run": asdict(ran) if ran else None}


def _run_in_words(row: dict[str, Any]) -> str:
    if row["run"] is None:
        return f"not known: {row['run_unknown']}" if "run_unknown" in row else ""
    return " ".join(filter(None, (row["run"]["run_id"], row["run"]["status"].lower(), row["run"]["url"])))


@app.command()
def logs(
    job_id: JobId,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="go on while it is written, and end with the job's exit code")] = False,
    address: Address = "",
    cluster_file: ClusterFile = "",
) -> None:
    """What a job said so far."""
    from rayward.cluster import jobs
    from rayward.cluster.dashboard import reach

    target = reach(address, cluster_file)
    info = jobs.find(target, job_id)
    if follow:
        _follow(target, info.submission_id)
    else:
        sys.stdout.write(jobs.log(target, info.submission_id))


@app.command(short_help="Stop a job and wait until it has stopped.")
def stop(job_id: JobId, address: Address = "", cluster_file: ClusterFile = "") -> None:
    """Stop a job and wait until it has; the same `rayward submit` goes on where it stopped."""
    from rayward.cluster import jobs
    from rayward.cluster.dashboard import reach

    target = reach(address, cluster_file)
    info = jobs.find(target, job_id)
    if info.status in jobs.ENDED:
        print(f"{info.submission_id} has ended already: {str(info.status).lower()}")
        return
    info = jobs.stop(target, info.submission_id)
    if info.status in jobs.ENDED:
        print(jobs.verdict(info, "")[1])
    elif info.status == "PENDING":
        print(f"{info.submission_id} has no place yet; it ends as soon as it gets one, and Ray gives it up after 15 minutes")
    else:
        print(f"{info.submission_id} still runs; look again: rayward jobs status {info.submission_id}{target.options}")
        sys.exit(1)
