"""Runs: settings, metrics over time, what went in, files to keep. Only the process that runs the job logs, never a worker.

    with registry.run("train_reward_model", settings, keep=OUTPUT / "tracking.json") as run:
        run.metrics({"step": 10, "loss": 0.61})      # returns at once; a thread delivers
        run.summary({"best_accuracy": 0.71})

A group of Ray Train workers writes OUTPUT/run/metrics.jsonl on rank 0; the job that started it reads along and logs. What a server has
not taken yet lies in OUTPUT/tracking.pending.jsonl, and the same command delivers it. Steps that are repeated after a restart are
logged once. A job begins with a server that answers (a wrong address would show only at the end otherwise); one that goes on does not
wait for it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rayward import places
from rayward.config import flatten, public
from rayward.errors import Interrupted
from rayward.places import Place
from rayward.registry import backend
from rayward.registry.buffer import Buffer, Record, read
from rayward.storage import Dataset, code_version

SUBMISSION = "ray.submission_id"  # the tag of a run that a submitted job made
LONGEST_PARAM = 6000  # characters MLflow takes
LONGEST_TAG = 5000
AT_ONCE = 100  # params or tags in one call
BRIEFLY_S = 5.0  # seconds to wait for a server at the end of a job that failed or was stopped


@dataclass
class RunLog:
    """An open run. Nothing here waits for the server; each step arrives once, also from a job that goes on after it was stopped."""

    id: str
    client: Any
    buffer: Buffer
    last_step: dict[str, int] = field(default_factory=dict)  # of each metric

    def metrics(self, line: Mapping[str, float]) -> None:
        """A line of metrics over time; `step` says when."""
        step, now = int(line["step"]), int(time.time() * 1000)
        values = [(_key(name), float(value)) for name, value in line.items() if name != "step"]
        new = [(name, value) for name, value in values if step > self.last_step.get(name, -1)]
        self.last_step.update((name, step) for name, _ in new)
        if new:
            self.buffer.put({"metrics": [[name, value, now, step] for name, value in new]})

    def flush(self) -> int:
        """Send what waits, now; how many records a server that is away has not taken."""
        return self.buffer.drain(backend.wait_s())

    def summary(self, values: Mapping[str, float | None]) -> None:
        """Metrics of the whole run; None and NaN are left out."""
        found = {_key(name): float(value) for name, value in values.items() if value is not None and value == value}
        if found:
            self.buffer.put({"summary": found, "at": int(time.time() * 1000)})

    def tags(self, tags: Mapping[str, Any]) -> None:
        """Words about the run."""
        self.buffer.put({"tags": {_key(name): _short(value, LONGEST_TAG) for name, value in tags.items()}})

    def artifact(self, path: Path, folder: str = "") -> None:
        """A file to keep; it is read when it is sent, at the end of the run at the latest."""
        self.buffer.put({"artifact": str(Path(path).absolute()), "folder": folder})

    def dataset(self, dataset: Dataset, context: str) -> None:
        """What went in, by name and digest."""
        manifest = dataset.manifest
        self.buffer.put(
            {
                "dataset": dataset.path.name or manifest.kind,
                "digest": manifest.digest,
                "source": json.dumps({"uri": public(str(dataset.path.absolute()))}),
                "profile": json.dumps({"in": manifest.rows_in, "used": manifest.used, "out": manifest.out}),
                "tags": {"mlflow.data.context": context, "made_by": manifest.made_by},
            }
        )

    def end(self, status: str) -> None:
        """Say how the job ended, deliver, and tell what could not be delivered."""
        self.buffer.put({"status": status, "at": int(time.time() * 1000)})
        patience = backend.wait_s() if status == "FINISHED" else min(BRIEFLY_S, backend.wait_s())
        left = self.buffer.drain(min(BRIEFLY_S, patience))
        if left and patience > BRIEFLY_S:
            print(f"tracking: waiting up to {patience:.0f} s for {self.buffer.where}", file=sys.stderr, flush=True)
        left = self.buffer.close(max(0.0, patience - BRIEFLY_S))
        if left:
            kept = f"lie in {self.buffer.file}; deliver them with: {_this_command()}" if self.buffer.file else "are lost"
            print(f"tracking: {left} record(s) of run {self.id} did not reach {self.buffer.where} and {kept}", file=sys.stderr, flush=True)


def _this_command() -> str:
    """The command that is running, as it can be given again."""
    script = Path(sys.argv[0])
    words = ["rayward", "run", str(script)] if script.suffix == ".py" else [script.name]
    return public(shlex.join([*words, *sys.argv[1:]]))


def _key(name: str) -> str:
    """A name that MLflow takes.

    >>> _key("accuracy (hard)")
    'accuracy _hard_'
    """
    return re.sub(r"[^\w./: -]", "_", name)[:250]


def _short(value: Any, longest: int) -> str:
    """A text that MLflow takes, without passwords; one that is cut says so."""
    text = public(str(value))
    return text if len(text) <= longest else f"{text[: longest - 40]} ... (cut: {len(text):,} characters)"


@contextmanager
def run(job: str, settings: Mapping[str, Any], *, keep: Place | None = None) -> Iterator[RunLog]:
    """A run of a job; with `keep`, a file (or object) that remembers it, the same run goes on when the job does.

    Raises:
        RegistryError: before anything is done, if the store cannot be used. Later a store that is away stops nothing.
    """
    log = _open_run(job, settings, keep)
    status = "FAILED"
    try:
        yield log
        status = "FINISHED"
    except (Interrupted, KeyboardInterrupt):
        status = "KILLED"
        raise
    finally:
        log.end(status)


def _open_run(job: str, settings: Mapping[str, Any], keep: Place | None) -> RunLog:
    """The run that `keep` remembers, or a new one."""
    backend.wait_s()  # a wrong number is said before the work
    journal = _journal(keep)
    waiting = [record for record in (read(journal) if journal else []) if "status" not in record]
    before = _remembered(keep)
    log = _go_on(before, journal, waiting) if before else None
    if log is None:
        log = _begin(job, settings, keep, journal, [record for record in waiting if "params" not in record])
    if submission := os.environ.get("RAYWARD_SUBMISSION_ID"):
        log.tags({SUBMISSION: submission})
    return log


def _journal(keep: Place | None) -> Path | None:
    """Where records lie that have not arrived: beside the file that remembers the run, or in the cache where that is at a URL."""
    if keep is None or isinstance(keep, Path):
        return keep and keep.with_suffix(".pending.jsonl")
    digest = hashlib.blake2b(str(keep).encode(), digest_size=12).hexdigest()
    return places.cache() / "tracking" / f"{digest}.pending.jsonl"


def _remembered(keep: Place | None) -> str | None:
    """The id of the run that a file remembers, if it is in the store of today."""
    if keep is None:
        return None
    try:
        with places.telling(keep):
            kept = places.read(keep)
    except FileNotFoundError:
        return None
    here = backend.address()
    try:
        before = json.loads(kept)
        return str(before["run_id"]) if before["tracking_uri"] == here else None
    except (ValueError, KeyError, TypeError):  # one that was cut off by a full disk
        return None


def _go_on(run_id: str, journal: Path | None, waiting: list[Record]) -> RunLog | None:
    """The run with this id, open again; None if it is gone. A server that is away is not waited for."""
    steps = {name: int(step) for record in waiting for name, _, _, step in record.get("metrics") or ()}
    client, why = backend.mlflow().MlflowClient(backend.tracking_uri()), backend.unreachable()
    if why is None:
        backend.client()
        try:
            found = client.get_run(run_id)
        except backend.mlflow().MlflowException as error:
            if backend.refusal(error) in (401, 403):
                raise backend.explained(error) from None
            if backend.refusal(error) is not None:
                return None  # deleted: begin a new one
            why = backend.explained(error).what
    if why is not None:
        print(f"tracking: {backend.named()} is away ({why}); the job goes on, and logs to {journal}", file=sys.stderr, flush=True)
        log = RunLog(run_id, client, _buffer(client, run_id, None, journal, waiting), steps)
        log.buffer.put({"status": "RUNNING"})
        return log
    if found.info.lifecycle_stage != "active":
        return None
    known = _logged(found)
    steps = {name: max(steps.get(name, -1), known.get(name, UNKNOWN)[0]) for name in {*steps, *known}}
    log = RunLog(run_id, client, _buffer(client, run_id, known, journal, waiting), steps)
    log.buffer.put({"status": "RUNNING"})
    log.buffer.drain(BRIEFLY_S)
    return log


def _begin(job: str, settings: Mapping[str, Any], keep: Place | None, journal: Path | None, waiting: list[Record]) -> RunLog:
    """A new run."""
    client = backend.client()
    tags = {"mlflow.runName": f"{job}-{time.strftime('%Y%m%d-%H%M%S')}", "job": job, "code_version": code_version()}
    with backend.explaining():  # the server may go away between two calls, or refuse to write
        run_id = client.create_run(backend.experiment(client), tags=tags).info.run_id
    if keep is not None:
        with places.telling(keep):
            places.write(keep, json.dumps({"tracking_uri": backend.address(), "run_id": run_id}) + "\n")
    log = RunLog(run_id, client, _buffer(client, run_id, {}, journal, waiting))
    log.last_step.update({name: int(step) for record in waiting for name, _, _, step in record.get("metrics") or ()})
    log.buffer.put({"params": {_key(name): _short(value, LONGEST_PARAM) for name, value in flatten(settings).items()}})
    return log


# ---------------------------------------------------------------------------------------------------------------- delivery

Logged = dict[str, tuple[int, float]]  # last step and value of each metric
UNKNOWN = (-1, float("nan"))


def _logged(found: Any) -> Logged:
    """What a run holds already."""
    return {metric.key: (int(metric.step), float(metric.value)) for metric in found.data.to_proto().metrics}


def _buffer(client: Any, run_id: str, known: Logged | None, journal: Path | None, waiting: list[Record]) -> Buffer:
    """A buffer in front of a run. `known` is what the run held when it was opened; None: to be asked for when the server is back."""
    held: list[Logged] = [] if known is None else [known]

    def send(batch: Sequence[Record]) -> None:
        if not held:
            held.append(_logged(client.get_run(run_id)))
        _send(client, run_id, held[0], batch)

    def refused(error: Exception) -> bool:
        return isinstance(error, FileNotFoundError) or backend.refusal(error) not in (None, 401, 403)

    return Buffer(send, refused, backend.named(), journal, waiting)


def _send(client: Any, run_id: str, known: Logged, batch: Sequence[Record]) -> None:
    """Deliver a batch: lines of metrics, or one other record. It may be delivered twice: a point keeps its time, and MLflow knows it."""
    entities, first = backend.mlflow().entities, batch[0]
    if "metrics" in first:
        points = [point for record in batch for point in record["metrics"] if point[3] > known.get(point[0], UNKNOWN)[0]]
        client.log_batch(run_id, metrics=[entities.Metric(*point) for point in points], synchronous=True)
    elif "summary" in first:
        new = {name: value for name, value in first["summary"].items() if known.get(name, UNKNOWN)[1] != value}
        client.log_batch(run_id, metrics=[entities.Metric(name, value, first["at"], 0) for name, value in new.items()], synchronous=True)
    elif "dataset" in first:
        dataset = entities.Dataset(first["dataset"], first["digest"], "local", first["source"], profile=first["profile"])
        tags = [entities.InputTag(name, value) for name, value in first["tags"].items()]
        client.log_inputs(run_id, [entities.DatasetInput(dataset, tags)])
    elif "artifact" in first:
        if not Path(first["artifact"]).exists():
            raise FileNotFoundError(f"{first['artifact']} is gone")
        client.log_artifact(run_id, first["artifact"], first["folder"] or None)
    elif "params" in first:
        for part in _parts(entities.Param, first["params"]):
            client.log_batch(run_id, params=part, synchronous=True)
    elif "tags" in first:
        for part in _parts(entities.RunTag, first["tags"]):
            client.log_batch(run_id, tags=part, synchronous=True)
    elif first["status"] == "RUNNING":
        client.update_run(run_id, status="RUNNING")
    else:
        client.set_terminated(run_id, first["status"], first["at"])


def _parts(made: Callable[[str, str], Any], words: Mapping[str, str]) -> Iterator[list[Any]]:
    """Params or tags, as many at once as MLflow takes."""
    every = [made(name, value) for name, value in words.items()]
    for start in range(0, len(every), AT_ONCE):
        yield every[start : start + AT_ONCE]


# ------------------------------------------------------------------------------------------------------------- submissions


@dataclass(frozen=True)
class Ran:
    """The run that a submitted job made."""

    run_id: str
    status: str  # RUNNING, FINISHED, FAILED or KILLED
    url: str | None  # its page on the tracking server; None where runs are kept without one


@backend.explaining()
def run_of_submission(submission_id: str) -> Ran | None:
    """The run of a job submitted to a cluster; of several (the trials of a sweep) the first. None: it has not begun one.

    Raises:
        RegistryError: if the registry cannot be reached.
    """
    if not backend.is_there():
        return None
    client = backend.client()
    quoted = submission_id.replace("'", "")
    found = client.get_experiment_by_name(backend.EXPERIMENT)
    if found is None:
        return None
    mine = f"tags.`{SUBMISSION}` = '{quoted}'"
    runs = client.search_runs([found.experiment_id], mine, max_results=1, order_by=["attributes.start_time ASC"])
    if not runs:
        return None
    info, uri = runs[0].info, backend.address()
    url = f"{uri.rstrip('/')}/#/experiments/{info.experiment_id}/runs/{info.run_id}" if backend.is_server(uri) else None
    return Ran(info.run_id, info.status, url)
