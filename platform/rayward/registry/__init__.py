"""The registry: MLflow keeps the runs, and the models that passed with what they came from. The only place that knows MLflow.

Runs and models live in MLFLOW_TRACKING_URI, or in SQLite and a folder under the store (RAYWARD_STORE, `store/` by default):

    store/mlflow.db     runs, metrics, versions, aliases, tags
    store/artifacts/    reports and models

A version leads back: its tags name the data digest, the label settings and the code; its run holds settings, metrics over time, the
data sets and the report. A model is a pyfunc whose code is a file of this package and whose weights are safetensors: no pickle.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import socket
import subprocess
import sys
import time
import warnings
import webbrowser
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rayward.config import flatten, suggest
from rayward.errors import Interrupted, RegistryError
from rayward.storage import Dataset, code_version

EXPERIMENT = "rayward"
CHAMPION = "champion"


def store() -> Path:
    """The store folder: RAYWARD_STORE, or `store` in the current folder."""
    return Path(os.environ.get("RAYWARD_STORE") or "store").absolute()


def tracking_uri() -> str:
    """Where runs and models live."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{store() / 'mlflow.db'}"


def _mlflow() -> Any:
    """MLflow, pointed at the store and kept from chatting."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    warnings.filterwarnings("ignore", module="mlflow.*")
    import mlflow

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if tracking_uri().startswith("sqlite:///"):
        Path(tracking_uri().removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    given = os.environ.get("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(tracking_uri())
    if given is None:  # it writes the variable itself, which would make our default look like the user's choice
        os.environ.pop("MLFLOW_TRACKING_URI", None)
    return mlflow


def _client() -> Any:
    """A client of a store that answers, or RegistryError."""
    try:
        client = _mlflow().MlflowClient()
        client.get_experiment_by_name(EXPERIMENT)
    except Exception as error:  # a database, a server, a disk: each has errors of its own
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise RegistryError(f"the store {tracking_uri()} cannot be used: {first}", "check RAYWARD_STORE and MLFLOW_TRACKING_URI") from None
    return client


def _experiment(client: Any) -> str:
    found = client.get_experiment_by_name(EXPERIMENT)
    if found is not None:
        return found.experiment_id
    return client.create_experiment(EXPERIMENT, artifact_location=_artifacts())


def _artifacts() -> str | None:
    """Where artifacts go: beside the database, or where a server says."""
    uri = tracking_uri()
    return (Path(uri.removeprefix("sqlite:///")).absolute().parent / "artifacts").as_uri() if uri.startswith("sqlite:///") else None


# -------------------------------------------------------------------------------------------------------------------- runs


@dataclass
class RunLog:
    """An open run. Metrics are sent in batches, each step once, also by a job that goes on after it was stopped."""

    id: str
    client: Any
    last_step: dict[str, int] = field(default_factory=dict)  # of each metric
    waiting: list[Any] = field(default_factory=list)
    sent: float = field(default_factory=time.monotonic)

    def metrics(self, line: Mapping[str, float]) -> None:
        """A line of metrics over time; `step` says when."""
        from mlflow.entities import Metric

        step, now = int(line["step"]), int(time.time() * 1000)
        for name, value in line.items():
            if name != "step" and step > self.last_step.get(name, -1):
                self.waiting.append(Metric(name, float(value), now, step))
                self.last_step[name] = step
        if time.monotonic() - self.sent > 2.0 or len(self.waiting) > 500:
            self.flush()

    def flush(self) -> None:
        """Send what waits."""
        if self.waiting:
            self.client.log_batch(self.id, metrics=self.waiting)
        self.waiting, self.sent = [], time.monotonic()

    def summary(self, values: Mapping[str, float | None]) -> None:
        """Metrics of the whole run."""
        for name, value in values.items():
            if value is not None and value == value:
                self.client.log_metric(self.id, name, float(value))

    def tags(self, tags: Mapping[str, Any]) -> None:
        """Words about the run."""
        for name, value in tags.items():
            self.client.set_tag(self.id, name, str(value))

    def artifact(self, path: Path, folder: str = "") -> None:
        """A file to keep."""
        self.client.log_artifact(self.id, str(path), folder or None)

    def dataset(self, dataset: Dataset, context: str) -> None:
        """What went in, by name and digest."""
        from mlflow.entities import Dataset as Entity
        from mlflow.entities import DatasetInput, InputTag

        manifest = dataset.manifest
        profile = json.dumps({"in": manifest.rows_in, "used": manifest.used, "out": manifest.out})
        source = json.dumps({"uri": str(dataset.path.absolute())})
        entity = Entity(dataset.path.name or manifest.kind, manifest.digest, "local", source, profile=profile)
        tags = [InputTag("mlflow.data.context", context), InputTag("made_by", manifest.made_by)]
        self.client.log_inputs(self.id, [DatasetInput(entity, tags)])


@contextmanager
def run(job: str, settings: Mapping[str, Any], *, keep: Path | None = None) -> Iterator[RunLog]:
    """A run of a job; with `keep`, a file that remembers it, the same run goes on when the job does."""
    client = _client()
    log = _open_run(client, job, settings, keep)
    status = "FAILED"
    try:
        yield log
        status = "FINISHED"
    except (Interrupted, KeyboardInterrupt):
        status = "KILLED"
        raise
    finally:
        with contextlib.suppress(Exception):  # a store that went away must not hide why the job ended
            log.flush()
            client.set_terminated(log.id, status)


def _open_run(client: Any, job: str, settings: Mapping[str, Any], keep: Path | None) -> RunLog:
    if keep is not None and keep.exists():
        before = json.loads(keep.read_text(encoding="utf-8"))
        with contextlib.suppress(Exception):  # another store, or a run that was deleted: begin a new one
            if before["tracking_uri"] == tracking_uri():
                run_id = before["run_id"]
                logged = client.get_run(run_id).data.metrics
                client.update_run(run_id, status="RUNNING")
                return RunLog(run_id, client, {n: max(m.step for m in client.get_metric_history(run_id, n)) for n in logged})
    tags = {"mlflow.runName": f"{job}-{time.strftime('%Y%m%d-%H%M%S')}", "job": job, "code_version": code_version()}
    created = client.create_run(_experiment(client), tags=tags)
    for name, value in flatten(settings).items():
        client.log_param(created.info.run_id, name, str(value)[:6000])
    if keep is not None:
        keep.parent.mkdir(parents=True, exist_ok=True)
        keep.write_text(json.dumps({"tracking_uri": tracking_uri(), "run_id": created.info.run_id}) + "\n", encoding="utf-8")
    return RunLog(created.info.run_id, client)


# ------------------------------------------------------------------------------------------------------------------ models


def check_name(name: str) -> None:
    """A name a model can be registered under, or RegistryError: said before the training, not after it."""
    if name and not re.fullmatch(r"[\w.-]+( [\w.-]+)*", name):
        raise RegistryError(f"--register {name!r} is no name for a model", "use letters, digits, . - and _")


def register(log: RunLog, folder: Path, name: str, tags: Mapping[str, Any]) -> str:
    """Put the model of a run into the registry under `name`; returns its version. Registering the same run twice gives one version."""
    mlflow = _mlflow()
    before = [str(v.version) for v in _versions(log.client, name) if v.run_id == log.id]
    version = before[0] if before else _log_model(mlflow, log, folder, name)
    tag(name, version, {**tags, "code_version": code_version()})  # also where a run was killed between the two
    log.client.update_model_version(name, version, description=_card(name, version, tags))
    return version


def _log_model(mlflow: Any, log: RunLog, folder: Path, name: str) -> str:
    """Log the model under its run, and register it; returns the version."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema
    from mlflow.types.schema import Array

    text, number = DataType.string, DataType.double
    signature = ModelSignature(
        inputs=Schema(
            [
                ColSpec(text, "prompt"),
                ColSpec(text, "answer", required=False),
                ColSpec(Array(text), "steps", required=False),
            ]
        ),
        outputs=Schema([ColSpec(number, "score"), ColSpec(number, "probability"), ColSpec(Array(number), "step_scores")]),
    )
    package = Path(__file__).parent.parent
    with mlflow.start_run(run_id=log.id), _no_chatter():
        info = mlflow.pyfunc.log_model(
            name="model",
            python_model=str(Path(__file__).parent / "pyfunc.py"),
            artifacts={"model": str(folder)},
            code_paths=[str(package)],
            signature=signature,
            pip_requirements=_requirements(),
            registered_model_name=name,
        )
    return str(info.registered_model_version)


def _card(name: str, version: str, tags: Mapping[str, Any]) -> str:
    """A few lines of Markdown for who browses the registry."""
    said = {key: value for key, value in tags.items() if key.startswith("best_") and isinstance(value, float)}
    scores = ", ".join(f"{key.removeprefix('best_')} {value:.3f}" for key, value in sorted(said.items()))
    counts = f"{tags.get('examples.train')} examples" if tags.get("examples.train") else "examples"
    return (
        f"A reward model trained on {counts} of **{tags.get('labeler') or 'judgements'}** with `{tags.get('objective')}`"
        f" from `{tags.get('base_model')}`" + (f"; on validation: {scores}" if scores else "") + ".\n\n"
        f"Data digest `{tags.get('data_digest')}`. Temperature `{tags.get('temperature')}`.\n\n"
        f'```python\nmlflow.pyfunc.load_model("models:/{name}/{version}").predict(rows)  # prompt, answer -> score\n```'
    )


def _requirements() -> list[str]:
    from importlib.metadata import version

    names = ("torch", "transformers", "safetensors", "tokenizers", "pyarrow", "numpy", "jinja2", "mlflow")
    return [f"{n}=={version(n).partition('+')[0]}" for n in names]


@contextmanager
def _no_chatter() -> Iterator[None]:
    """MLflow prints progress bars and advice around a registration; what matters is said by us."""
    with (
        open(os.devnull, "w", encoding="utf-8") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


def _versions(client: Any, name: str) -> list[Any]:
    found = client.search_model_versions(f"name = '{name}'")
    return sorted(found, key=lambda v: int(v.version), reverse=True)


def models() -> list[dict[str, Any]]:
    """Every version of every model, newest first: name, version, aliases, tags, run, when."""
    client = _client()
    rows = []
    found = client.search_registered_models()
    every = list(found)
    while found.token:  # MLflow gives a hundred at a time
        found = client.search_registered_models(page_token=found.token)
        every += found
    for registered in sorted(every, key=lambda m: m.name):
        aliases: dict[str, list[str]] = {}
        for alias, number in client.get_registered_model(registered.name).aliases.items():
            aliases.setdefault(str(number), []).append(alias)
        rows += [
            {
                "name": v.name,
                "version": str(v.version),
                "aliases": sorted(aliases.get(str(v.version)) or []),
                "created": time.strftime("%Y-%m-%d %H:%M", time.localtime(v.creation_timestamp / 1000)),
                "run_id": v.run_id,
                "tags": dict(v.tags),
            }
            for v in _versions(client, registered.name)
        ]
    return rows


def find(reference: str) -> dict[str, Any]:
    """One version by `NAME`, `NAME@ALIAS` or `NAME/VERSION`, with or without `models:/`; a bare name is its champion, or its newest."""
    reference = reference.removeprefix("models:/")
    name, at, alias = reference.partition("@")
    name, slash, number = name.partition("/")
    every = models()
    mine = [row for row in every if row["name"] == name]
    if not mine:
        known = sorted({row["name"] for row in every})
        raise RegistryError(
            f"no model {name} in {tracking_uri()}",
            suggest(name, known) if known else "register one: train_reward_model --register NAME",
        )
    if at:
        found = [row for row in mine if alias in row["aliases"]]
        way_out = f"rayward models promote {name} {mine[0]['version']} --alias {alias}"
    elif slash:
        found = [row for row in mine if row["version"] == number]
        way_out = f"it has {', '.join(row['version'] for row in mine)}"
    else:
        found = [row for row in mine if CHAMPION in row["aliases"]] or mine
        way_out = ""
    if not found:
        raise RegistryError(f"{name} has no {'alias ' + alias if at else 'version ' + number}", way_out)
    run_ = _client().get_run(found[0]["run_id"])
    return {**found[0], "params": dict(run_.data.params), "metrics": dict(run_.data.metrics)}


def promote(name: str, version: str, alias: str = CHAMPION) -> dict[str, str | None]:
    """Give a version an alias; returns which version had it before."""
    if "@" in name or "/" in name:
        raise RegistryError(f"{name} is not the bare name of a model", "write: promote NAME VERSION")
    row = find(f"{name}/{version}")
    before = [r["version"] for r in models() if r["name"] == row["name"] and alias in r["aliases"]]
    try:
        _client().set_registered_model_alias(row["name"], alias, row["version"])
    except _mlflow().MlflowException as error:
        raise RegistryError(f"alias {alias!r} cannot be given: {error.message}", "use letters, digits, - and _, e.g. champion") from None
    return {"name": row["name"], "version": row["version"], "alias": alias, "before": before[0] if before else None}


def tag(name: str, version: str, tags: Mapping[str, Any]) -> None:
    """Add words to a version."""
    client = _client()
    for key, value in tags.items():
        client.set_model_version_tag(name, version, re.sub(r"[^\w. -]", "_", key), str(value)[:5000])


def model_folder(model: str) -> Path:
    """The folder of a model named by a path or by models:/NAME@ALIAS, models:/NAME/VERSION, models:/NAME."""
    if not model.startswith("models:/"):
        return Path(model)
    row = find(model)
    with _no_chatter():
        here = _mlflow().artifacts.download_artifacts(f"models:/{row['name']}/{row['version']}")
    return Path(here) / "artifacts" / "model"


def identity(model: str) -> dict[str, Any]:
    """What a manifest says about a model: its name, and the version or the digest of its weights."""
    if model.startswith("models:/"):
        row = find(model)
        return {"model": f"models:/{row['name']}/{row['version']}", "run_id": row["run_id"]}
    weights = sorted(Path(model).glob("*.safetensors"))
    if not weights:
        raise RegistryError(
            f"{model} holds no model", "give the folder that train_reward_model wrote (OUTPUT/model), or models:/NAME@ALIAS"
        )
    digest = hashlib.sha256()
    for path in weights:
        digest.update(path.read_bytes())
    return {"model": model, "sha256": digest.hexdigest()}


def ui(host: str, port: int, browse: bool) -> None:
    """Serve the MLflow UI over the store until it is stopped, and open it in a browser."""
    _mlflow()
    page = f"http://{host}:{port}/#/models"
    arguments = ["-m", "mlflow", "ui", "--backend-store-uri", tracking_uri(), "--host", host, "--port", str(port)]
    if (artifacts := _artifacts()) is not None:
        arguments += ["--default-artifact-root", artifacts]
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise RegistryError(
                f"cannot listen on {host}:{port}: {error.strerror}", "choose another port: rayward ui --port 5001"
            ) from None
    print(f"models: {page}    runs: http://{host}:{port}/#/experiments    (Ctrl-C ends it)", flush=True)
    server = subprocess.Popen([sys.executable, *arguments])
    try:
        if browse:
            while server.poll() is None and not _answers(host, port):
                time.sleep(0.3)
            webbrowser.open(page)
        server.wait()
    except KeyboardInterrupt:
        print("stopped", flush=True)
    finally:
        server.terminate()
        server.wait()


def _answers(host: str, port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((host, port)) == 0
