"""Jobs on a cluster: sent, followed, listed, stopped. The only place that speaks Ray's Jobs API.

    target = reach("http://127.0.0.1:8265")                    # cluster.dashboard
    job = describe("label_pairs", script, words, ...)          # what would run, and whether the cluster can see what it names
    job_id, fresh = send(target, job)                          # label_pairs-3f9a1c22-1
    code = follow(target, job_id, print)                       # its log, then its exit code

A job is called after what it does: the script's name, eight hex digits of its content, its arguments and what they mean, and how many times
that has been sent. While one runs, the same command finds it; after it ended, however, the next number is sent, and goes on by what lies
in its output. The entry process holds no CPU unless one is asked for: it waits for Ray's workers, and on a small cluster a core
that it holds is the core they wait for.
"""

from __future__ import annotations

import asyncio
import difflib
import getpass
import os
import re
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayward import places
from rayward.cluster import shipping, visibility
from rayward.cluster.dashboard import Target
from rayward.cluster.shipping import Word
from rayward.config import flatten, public
from rayward.errors import RaywardError, SettingsError, UserError

PATIENCE_S = 40.0  # how long a job may wait for a place before we say why
STOP_S = 60.0  # how long a stop is waited for
UNPLACED_STOP_S = 3.0  # and how long of a job that waits for a place
RETRY_S = 60.0  # how long a lost connection is tried again
GRACE_S = 20  # what a stopped job gets to put its things away before it is killed
PAUSE_S = 0.5
TRAVEL = (  # variables that go along where they are set
    "RAYWARD_STORE",
    "RAYWARD_RAY_LOGS",
    "RAYWARD_TRACEBACK",
    "RAYWARD_TRACKING_WAIT_S",
    "MLFLOW_TRACKING_URI",
    *places.CARRIED,
    "HF_HUB_OFFLINE",
    "OMP_NUM_THREADS",
)
NEEDS_STORE = (  # or what is written would lie in the folder that is sent, and be gone with it
    '[ -n "$RAYWARD_STORE" ] || { echo "error: the command names store:..., and RAYWARD_STORE is set neither on this cluster nor where '
    'the job was sent from; before rayward submit: export RAYWARD_STORE=s3://BUCKET/PREFIX" >&2; exit 2; }; '
)
MEANT = ("RAYWARD_STORE", "MLFLOW_TRACKING_URI")  # those that say what names in a command mean
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
RAYS_WORDS = re.compile(r".*job_manager\.py:\d+ -- Runtime env is setting up\.|Running entrypoint for job ")


@dataclass(frozen=True)
class Request:
    """What a command asks for beyond the script and its words."""

    cpus: float = 0.0  # held by the entry process
    gpus: float = 0.0  # held by the entry process
    memory: float = 0.0  # bytes, held by the entry process
    shared: tuple[Path, ...] = ()  # folders that every node has under the same path
    env: tuple[str, ...] = ()  # names of variables to send unseen
    ship: tuple[Path, ...] = ()  # more files and folders to send
    python: str = ""  # the interpreter on the cluster

    def resources(self) -> dict[str, float]:
        """What the entry process holds, under Ray's names."""
        asked = {"CPU": self.cpus, "GPU": self.gpus, "memory": self.memory}
        return {name: number for name, number in asked.items() if number}


@dataclass(frozen=True)
class Job:
    """What would run."""

    name: str  # of the script, with the digest of what it does
    words: tuple[Word, ...]
    script: str  # its name in the folder that is sent
    files: Mapping[str, Path]  # what is sent, under which name
    folder: str  # where it runs; empty: in the folder that is sent
    python: str
    visible: Mapping[str, str]  # variables that whoever looks at the job may read
    private: Mapping[str, str]  # variables that travel in the folder
    metadata: Mapping[str, str]
    request: Request
    carries: str  # which package runs, in words
    needs_store: bool  # the store of the cluster's own environment is used, so there has to be one

    def entrypoint(self) -> str:
        """The command in the cluster's shell."""
        at = '"$sent"/' if self.folder else ""
        words = " ".join(at + shlex.quote(w.text) if w.sent else shlex.quote(w.text) for w in (Word(self.script, sent=True), *self.words))
        before = f"sent=$PWD; cd {shlex.quote(self.folder)} && " if self.folder else ""
        before = f". ./{shipping.PRIVATE} && {before}" if self.private else before
        before = NEEDS_STORE + before if self.needs_store else before
        return f"{before}exec {shlex.quote(self.python)} {words}"


# ------------------------------------------------------------------------------------------------------------------ describe


def describe(
    script: Path,
    words: Sequence[str],
    request: Request,
    here: bool,
    package: Mapping[str, Path],
    code_version: str,
    resolved: Mapping[str, Any],
) -> Job:
    """The job of a script and its words, or SettingsError if the cluster cannot see something that they name.

    `here` says whether the cluster is this machine: then names mean what they mean in this folder. `package` are the package's files
    (none: the cluster's own runs), `resolved` the script's settings, as far as they could be asked for.
    """
    heard, configs = shipping.take_configs(words)
    if missing := [path for path in configs.values() if not path.is_file()]:
        raise SettingsError(f"--config {missing[0]} cannot be read: there is no such file", "give a file of `name: value` lines")
    visibility.check_public(words)
    shared = tuple(Path(os.path.expanduser(path)).absolute() for path in request.shared)
    environment, private = _environment(request.env, here)
    if not here:
        visibility.check_seen(words, configs.values(), resolved, shared)
        visibility.check_store(environment | private, shared)
    cwd = Path.cwd()
    folder = str(cwd) if here or any(cwd == s or s in cwd.parents for s in shared) else ""
    beside, asked_for = (shipping.extra_files(paths) for paths in (shipping.imported(script), request.ship))
    mine = shipping.joined({script.name: script}, beside, configs, asked_for)
    where = {name: public(value) for name, value in (environment | private).items() if name in MEANT} | {"folder": folder}
    files = {**package, **mine}
    shipping.size_of(files)  # before they are read
    digest = shipping.digest_of(words, mine, where)
    named = [value for _, value in visibility.told(words)] + [str(value) for value in flatten(resolved).values()]
    needs_store = not folder and "RAYWARD_STORE" not in where and any(value.startswith("store:") for value in named)
    carries = code_version if package else f"the cluster's own (here {code_version.partition('+')[0]})"
    return Job(
        name=f"{re.sub(r'[^A-Za-z0-9_]', '_', script.stem)}-{digest}",
        words=tuple(heard),
        script=script.name,
        files=files,
        folder=folder,
        python=request.python or (sys.executable if here else "python"),
        visible=environment,
        private=private,
        metadata=_metadata(script, words, request) | {"settings": digest, "package": carries},
        request=request,
        carries=carries,
        needs_store=needs_store,
    )


def _metadata(script: Path, words: Sequence[str], request: Request) -> dict[str, str]:
    """What whoever lists the job is told: what runs, for whom, of which revision."""
    said = {
        "command": shlex.join([str(script) if script.parent == Path() else script.stem, *words]),
        "script": script.stem,
        "user": f"{_user()}@{socket.gethostname()}",
        "git": git_revision(script.parent),
        "env": " ".join(request.env),
        "asks": ", ".join(f"{name} {number:g}" for name, number in request.resources().items()),
    }
    return {name: value for name, value in said.items() if value}


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container whose user has no name
        return str(os.getuid())


def _environment(asked: Sequence[str], here: bool) -> tuple[dict[str, str], dict[str, str]]:
    """Variables that travel: those that may be seen, and those that may not (asked for by name, or with a password in a URL)."""
    missing = [name for name in asked if name not in os.environ]
    if missing:
        way_out = f"export {missing[0]}=... first"
        if "=" in missing[0]:  # and it may be a secret
            missing, way_out = [missing[0].partition("=")[0] + "=..."], "give the name alone: the value is taken from the environment"
        raise SettingsError(f"--env {missing[0]}: there is no such variable here", way_out)
    if odd := [name for name in asked if not re.fullmatch(r"[A-Za-z_]\w*", name)]:
        raise SettingsError(f"--env {odd[0]} is no name that a shell can set", "use letters, digits and _")
    found = {name: os.environ[name] for name in TRAVEL if os.environ.get(name)}
    if here:  # workers do not stand in this folder, so names must not depend on it
        remote = "://" in found.get("RAYWARD_STORE", "")
        found["RAYWARD_STORE"] = found["RAYWARD_STORE"] if remote else os.path.abspath(found.get("RAYWARD_STORE", "store"))
        if tracking := re.fullmatch(r"sqlite:///([^/].*)", found.get("MLFLOW_TRACKING_URI", "")):
            found["MLFLOW_TRACKING_URI"] = f"sqlite:///{os.path.abspath(tracking[1])}"
    private = {name: value for name, value in found.items() if public(value) != value} | {name: os.environ[name] for name in asked}
    return {name: value for name, value in found.items() if name not in private}, private


def git_revision(folder: Path) -> str:
    """The revision of the repository that a folder is in, `+changes` if it is not all of it; empty outside one."""
    git = ["git", "-C", str(folder.absolute())]
    try:
        revision = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, timeout=20)
        changes = subprocess.run([*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return revision.stdout.strip() + ("+changes" if changes.stdout.strip() else "") if revision.returncode == 0 else ""


# ---------------------------------------------------------------------------------------------------------------------- send


@contextmanager
def _asking(target: Target, job_id: str = "") -> Iterator[None]:
    """What Ray's client raises where the dashboard fails, says no or is away, in our words."""
    from ray.exceptions import AuthenticationError

    try:
        yield
    except UserError:
        raise
    except (RuntimeError, OSError, AuthenticationError) as error:  # a status, a connection, or a token that is another meanwhile
        raise _unanswered(target, job_id, error) from None


def _unanswered(target: Target, job_id: str, error: Exception) -> SettingsError:
    if _unknown(error):
        way_out = "its head was started anew, or the job deleted; rayward submit sends it again, and it goes on by what lies in its output"
        return SettingsError(f"{target.name} does not know {job_id or 'this job'}", way_out)
    said = _first(str(error) or type(error).__name__)
    way_out = f"look again: rayward jobs list {target.options.strip()}"
    return SettingsError(f"{target.name} does not do what it is asked: {said}", way_out)


def _unknown(error: Exception) -> bool:
    """Whether the dashboard answers that there is no such job."""
    return getattr(error, "status", None) == 404 or "status code 404" in str(error)


def send(target: Target, job: Job) -> tuple[str, bool]:
    """Send a job, or find the one that runs already; returns its id and whether it is a new one."""
    with _asking(target):
        before = _numbered(target, job.name)
    running = [info for _, info in before if info.status not in ENDED]
    if running:
        return running[-1].submission_id, False
    if job.python == sys.executable:
        _check_version(target)
    job_id = f"{job.name}-{before[-1][0] + 1 if before else 1}"
    with tempfile.TemporaryDirectory(prefix="rayward-") as folder:
        shipping.pack(Path(folder), job.files, job.private)
        try:
            target.client.submit_job(
                entrypoint=job.entrypoint(),
                submission_id=job_id,
                runtime_env=_runtime_env(job, job_id, folder),
                metadata=dict(job.metadata),
                entrypoint_num_cpus=job.request.cpus,
                entrypoint_num_gpus=job.request.gpus,
                entrypoint_memory=int(job.request.memory) or None,
            )
        except (RuntimeError, OSError) as error:
            if "already exists" in str(error):  # someone else sent the same at the same moment
                return job_id, False
            way_out = f"the same command sends it, or finds it if it did arrive: rayward jobs list {target.options.strip()}"
            raise SettingsError(f"{target.name} did not take the job: {_first(public(str(error)))}", way_out) from None
    return job_id, True


def _runtime_env(job: Job, job_id: str, folder: str) -> dict[str, Any]:
    told = {
        "RAYWARD_SUBMISSION_ID": job_id,
        "RAYWARD_PROGRESS": "log",
        "RAY_JOB_STOP_SIGNAL": "SIGINT",  # a stopped script says what it kept, and closes its run
        "RAY_JOB_STOP_WAIT_TIME_S": str(GRACE_S),
    }
    made: dict[str, Any] = {"working_dir": folder, "env_vars": {**job.visible, **told}}
    if job.private:
        made["worker_process_setup_hook"] = shipping.HOOK
    if job.python != "python":
        made["py_executable"] = job.python  # workers must be what the entry process is
    return made


def _numbered(target: Target, name: str) -> list[tuple[int, Any]]:
    """The jobs of this name, by number."""
    found = []
    for info in target.client.list_jobs():
        stem, _, number = (info.submission_id or "").rpartition("-")
        if stem == name and number.isdecimal():
            found.append((int(number), info))
    return sorted(found, key=lambda pair: pair[0])


def _check_version(target: Target) -> None:
    import ray

    if ray.__version__ != target.ray_version:
        raise SettingsError(
            f"the cluster runs Ray {target.ray_version}, {sys.executable} has {ray.__version__}; a job needs the same",
            "start the cluster with this interpreter's ray, or name the cluster's: --python /path/to/python",
        )


# -------------------------------------------------------------------------------------------------------------------- follow


class Unplaced(RaywardError):
    """A job that no node of the cluster is large enough for."""


def follow(target: Target, job_id: str, say: Callable[[str], None], warn: Callable[[str], None]) -> Any:
    """Give `say` the job's log as it is written, `warn` what has to be known while it waits; returns Ray's details once it ended.

    A lost connection is taken up again where it broke. KeyboardInterrupt leaves the job running.

    Raises:
        Unplaced: if its entry process has waited for PATIENCE_S and no node has, in all, what it asks for.
    """
    import aiohttp

    log = _Log(say)
    lost = 0.0
    while True:
        try:
            asyncio.run(_tail(target, job_id, log, warn))
            info = target.client.get_job_info(job_id)
            if info.status in ENDED:
                log.end()
                return info
        except (RuntimeError, OSError, aiohttp.ClientError) as error:  # a connection that broke
            if _unknown(error):
                raise _unanswered(target, job_id, error) from None
            lost = lost or time.monotonic()
            if time.monotonic() - lost > RETRY_S:
                raise SettingsError(
                    f"{target.name} does not answer any more: {_first(str(error) or type(error).__name__)}",
                    f"the job may well go on; come back with  rayward jobs logs {job_id} -f{target.options}",
                ) from None
            time.sleep(2.0)
        else:
            lost = 0.0
            time.sleep(PAUSE_S)


class _Log:
    """What was said of a log so far: it comes from its beginning whenever the connection does. Ray's first two lines are left out."""

    def __init__(self, say: Callable[[str], None]):
        self.say, self.said, self.came, self.rest = say, 0, 0, ""

    def restart(self) -> None:
        """The log comes again from its beginning."""
        self.came, self.rest = 0, ""

    def take(self, text: str) -> None:
        """More of the log, in pieces as they come."""
        *lines, self.rest = (self.rest + text).split("\n")
        for line in lines:
            self.came += 1
            if self.came > self.said:
                self.said = self.came
                if not RAYS_WORDS.match(line):
                    self.say(line)

    def end(self) -> None:
        """What stands behind the last line break."""
        if self.rest:
            self.take("\n")


async def _tail(target: Target, job_id: str, log: _Log, warn: Callable[[str], None]) -> None:
    async def read() -> None:
        log.restart()
        async for text in target.client.tail_job_logs(job_id):
            log.take(text)

    reading = asyncio.create_task(read())
    try:
        done, _ = await asyncio.wait({reading}, timeout=PATIENCE_S)
        if not done:
            info = await asyncio.to_thread(target.client.get_job_info, job_id)
            if info.status == "PENDING":
                warn(waiting(target, info))
        await reading
    finally:
        reading.cancel()


def waiting(target: Target, info: Any) -> str:
    """Why a job has not begun; Unplaced where no node could take it."""
    asks = (info.metadata or {}).get("asks") or ""
    asked = {name: float(number) for name, _, number in (part.partition(" ") for part in asks.split(", ") if part)}
    words = ", ".join(f"{number / 2**30:.1f} GiB of memory" if name == "memory" else f"{number:g} {name}" for name, number in asked.items())
    stop = f"rayward jobs stop {info.submission_id}{target.options}"
    if asked and not target.room(**asked):
        if target.autoscaling():
            return f"waiting for {words}: no node has that now, and an autoscaler may add one. To give it up: {stop}"
        raise Unplaced(
            f"{info.submission_id} asks for {words} for its entry process, and no node of the cluster has that\n"
            f"  -> it waits for such a node to join; if none will: {stop}  and ask for less"
        )
    if asked:
        return f"waiting for {words}: every node that has it is busy. It begins when one is free; or give it up: {stop}"
    return (
        f"still waiting: {info.message or 'Ray has not begun it'}\n`ray status` on the head shows what the cluster is at; give up: {stop}"
    )


def verdict(info: Any, again: str) -> tuple[int, str]:
    """The exit code of a job that ended, and one line (or a few) that say how; `again` is the command that shows its log."""
    took = f"after {(info.end_time - info.start_time) / 1000:,.0f} s" if info.end_time and info.start_time else ""
    if info.status == "SUCCEEDED":
        return 0, f"{info.submission_id} succeeded {took}"
    goes_on = "the same command goes on where it stopped"  # but for a mistake, which has said what to do about it
    if info.status == "STOPPED":
        return 130, f"{info.submission_id} was stopped {took}; {goes_on}"
    if info.driver_exit_code is None:  # it never began, or whatever ran it died
        return 1, f"{info.submission_id} failed {took}: {public(info.message or '').strip()[:2000]}\n  -> {again}"
    hint = f"{goes_on}; " if info.driver_exit_code != 2 else ""
    if "No module named 'rayward'" in (info.message or ""):
        hint = "the cluster's python does not have rayward: --package sends this one; "
    elif info.driver_exit_code == 127:
        hint = "its shell finds no such python: name it, --python /path/to/python; "
    return info.driver_exit_code or 1, f"{info.submission_id} failed with exit code {info.driver_exit_code} {took}\n  -> {hint}{again}"


# ---------------------------------------------------------------------------------------------------------- list, find, stop


def listed(target: Target) -> list[Any]:
    """Every job that was sent to the cluster, the newest first; programs that joined it by themselves are not among them."""
    with _asking(target):
        jobs = [info for info in target.client.list_jobs() if info.submission_id]
    return sorted(jobs, key=lambda info: -(info.start_time or 0))


def find(target: Target, job_id: str) -> Any:
    """A job by its id, or the newest of those that it begins (`label_pairs-3f9a`, `label`); SettingsError with suggestions."""
    jobs = listed(target)
    for info in jobs:
        if info.submission_id == job_id:
            return info
    for info in jobs:
        if job_id and info.submission_id.startswith(job_id):
            return info
    known = [info.submission_id for info in jobs[:8]]
    close = difflib.get_close_matches(job_id, [*known, *(name.partition("-")[0] for name in known)], n=1)
    way_out = (f"did you mean {close[0]}? " if close else "") + f"The newest: {', '.join(known)}"
    raise SettingsError(
        f"there is no job {job_id!r} at {target.name}", way_out if known else "none was sent to it yet: rayward submit NAME ..."
    )


def stop(target: Target, job_id: str) -> Any:
    """Ask a job to stop and wait for it; returns Ray's details, of a job that has not ended if it would not within STOP_S."""
    began = time.monotonic()
    with _asking(target, job_id):
        target.client.stop_job(job_id)
        while (info := target.client.get_job_info(job_id)).status not in ENDED:
            limit = UNPLACED_STOP_S if info.status == "PENDING" else STOP_S  # it hears of it once it has a place
            if time.monotonic() - began > limit:
                break
            time.sleep(PAUSE_S)
    return info


def log(target: Target, job_id: str) -> str:
    """What a job said so far, without Ray's own first lines."""
    lines: list[str] = []
    said = _Log(lines.append)
    with _asking(target, job_id):
        said.take(target.client.get_job_logs(job_id))
    said.end()
    return "".join(f"{line}\n" for line in lines)


def plain(info: Any) -> dict[str, Any]:
    """A job as plain values: id, state, when (seconds since 1970), exit code, metadata, command; no variable's value."""
    ours = {k: v for k, v in (info.metadata or {}).items() if k not in ("job_submission_id", "job_name")}
    return {
        "id": info.submission_id,
        "state": str(info.status).lower(),
        "started": info.start_time and info.start_time / 1000,
        "ended": info.end_time / 1000 if info.end_time else None,
        "exit_code": info.driver_exit_code,
        "message": "" if info.driver_exit_code is not None else public(info.message or ""),  # else it is the log once more
        "entrypoint": public(info.entrypoint),
        "metadata": ours,
    }


def _first(text: str) -> str:
    return (text.strip().splitlines() or [""])[0]
