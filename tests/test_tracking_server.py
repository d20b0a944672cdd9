"""A team's tracking server: a real `mlflow server` with proxied artifacts, behind a gate that asks for a password as a team's gateway
does, and that can hang up. What is logged arrives once whatever happens in between; what cannot go on without the server says so."""

from __future__ import annotations

import http.server
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from base64 import b64encode
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlflow
import pytest
import requests

from driving import RAYWARD, Toy, done, here
from driving import toy as make_toy
from rayward import places, registry, sweeping
from rayward.batching import BatchSettings
from rayward.errors import RegistryError
from rayward.fitting import FitSettings
from rayward.records import Rollout, rollouts_of
from rayward.registry.buffer import read
from rayward.rendering import RenderSettings
from rayward.reward_model import ModelSettings
from rayward.scoring import Scorer
from rayward.storage import open_dataset
from rayward.training import Report, TrainSettings

PASSWORD = "open-sesame-4711"
SMALL = ["net.width=32", "net.layers=1", "render.max_length=160", "train.lr=2e-3", "batch.size=16", "train.log_every=1"]


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return make_toy(tmp_path_factory.getbasetemp())


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def ended(process: subprocess.Popen[bytes], how: signal.Signals = signal.SIGTERM) -> None:
    """End a process and its children."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, how)
    with suppress(subprocess.TimeoutExpired):
        process.wait(20)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(20)


@dataclass
class Tracking:
    """An `mlflow server` and its folder."""

    folder: Path
    backend: str
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        words = [
            "--artifacts-destination",
            str(self.folder / "artifacts"),
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
            "--workers",
            "1",
        ]
        env = {
            **{name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")},
            "MLFLOW_BACKEND_STORE_URI": self.backend,
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # four processes fewer
        }
        with (self.folder / "server.log").open("ab") as log:
            command = [sys.executable, "-m", "mlflow", "server", *words]
            self.process = subprocess.Popen(command, cwd=self.folder, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        until = time.monotonic() + 240
        while not self.answers():
            assert self.process.poll() is None, (self.folder / "server.log").read_text()[-3000:]
            assert time.monotonic() < until, (self.folder / "server.log").read_text()[-3000:]
            time.sleep(0.3)

    def answers(self) -> bool:
        try:
            return requests.get(f"{self.url}/health", timeout=5).ok
        except requests.RequestException:
            return False

    def end(self, how: signal.Signals = signal.SIGTERM) -> None:
        assert self.process is not None
        ended(self.process, how)


class Gate(http.server.ThreadingHTTPServer):
    """Passes requests with the right password on to a server. `shut`: hang up on everybody; `shut_at`: from such a request on;
    `deaf_to`: pass such requests on, and lose the answers."""

    daemon_threads = True

    def __init__(self, behind: str):
        super().__init__(("127.0.0.1", 0), Passing)
        self.behind = behind
        self.reset()

    def reset(self) -> None:
        self.shut, self.shut_at, self.deaf_to = False, "", ""

    def uri(self, who: str = f"team:{PASSWORD}@") -> str:
        return f"http://{who}127.0.0.1:{self.server_port}"


class Passing(http.server.BaseHTTPRequestHandler):
    """One connection through the gate."""

    server: Gate
    protocol_version = "HTTP/1.1"

    def handle_one(self) -> None:
        gate, self.close_connection = self.server, True
        body = self.rfile.read(int(self.headers["Content-Length"] or 0)) if self.headers["Content-Length"] else self.chunks()
        if gate.shut_at and gate.shut_at in self.path:
            gate.shut = True
        if gate.shut:
            return
        right = "Basic " + b64encode(f"team:{PASSWORD}".encode()).decode()
        if self.headers["Authorization"] != right and self.path != "/health":
            self.answer(401, b"who are you?", {})
            return
        drop = ("host", "authorization", "connection", "transfer-encoding", "content-length")
        headers = {name: value for name, value in self.headers.items() if name.lower() not in drop}
        got = requests.request(self.command, gate.behind + self.path, headers=headers, data=body, timeout=120)
        if gate.deaf_to and gate.deaf_to in self.path:
            gate.deaf_to = ""
            return
        self.answer(got.status_code, got.content, got.headers)

    def chunks(self) -> bytes:
        body = b""
        if self.headers["Transfer-Encoding"] == "chunked":
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        return body

    def answer(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name in ("Content-Type", "Content-Disposition"):
            if name in headers:
                self.send_header(name, headers[name])
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = handle_one

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def tracking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tracking]:
    """One server for the module, over SQLite."""
    folder = tmp_path_factory.mktemp("tracking")
    made = Tracking(folder, f"sqlite:///{folder / 'mlflow.db'}")
    made.start()
    yield made
    made.end()


@pytest.fixture(scope="module")
def gates(tracking: Tracking) -> Iterator[Gate]:
    gate = Gate(tracking.url)
    threading.Thread(target=gate.serve_forever, daemon=True).start()
    yield gate
    gate.shutdown()
    gate.server_close()


def at_work(monkeypatch: pytest.MonkeyPatch, folder: Path, uri: str) -> None:
    """An empty working directory, and a registry at `uri`."""
    folder.mkdir()
    monkeypatch.chdir(folder)
    for name in ("USERNAME", "PASSWORD"):
        monkeypatch.setenv(f"MLFLOW_TRACKING_{name}", "")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("RAYWARD_STORE", str(folder / "store"))
    monkeypatch.setenv("RAYWARD_TRACKING_WAIT_S", "60")
    monkeypatch.setenv("RAYWARD_CACHE", str(folder / "cache"))


@pytest.fixture
def gate(gates: Gate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """The gate, open, and the environment of one who is let through."""
    gates.reset()
    at_work(monkeypatch, tmp_path / "home", gates.uri())
    yield gates
    gates.reset()


def client() -> Any:
    return mlflow.MlflowClient(tracking_uri=registry.tracking_uri())


def history(run_id: str, metric: str) -> list[tuple[int, float]]:
    return [(m.step, m.value) for m in client().get_metric_history(run_id, metric)]


def lines(steps: range) -> list[dict[str, float]]:
    return [{"step": step, "loss": 1 / step, "accuracy": step / 100} for step in steps]


def train(toy: Toy, output: str, *words: str) -> tuple[str, ...]:
    sets = [word for setting in SMALL for word in ("--set", setting)]
    return ("train_reward_model", "--examples", str(toy.pairs), "--output", output, "--validation-share", "0.1", *sets, *words)


def asked(toy: Toy) -> list[Rollout]:
    return rollouts_of(open_dataset(toy.answers).table())[:30:5]


# ------------------------------------------------------------------------------------------------------------- the whole way


def test_from_training_to_a_model_that_others_load_and_no_password_on_the_way(toy: Toy, tracking: Tracking, gate: Gate) -> None:
    said = [done(here(*train(toy, "o", "--register", "team-rm")))]
    assert "registered: models:/team-rm/1" in said[0].out
    said += [done(here("rayward", "models", *words)) for words in (("promote", "team-rm", "1"), ("list",), ("show", "team-rm@champion"))]
    assert "team-rm" in said[2].out
    row = registry.find("team-rm@champion")
    logged = [json.loads(line) for line in Path("o/run/metrics.jsonl").read_text().splitlines()]
    assert history(row["run_id"], "loss") == [(line["step"], line["loss"]) for line in logged if "loss" in line]
    found = client().get_run(row["run_id"])
    assert (found.info.status, found.data.params["train.lr"]) == ("FINISHED", "0.002")
    assert found.info.artifact_uri.startswith("mlflow-artifacts:/")
    assert list((tracking.folder / "artifacts").rglob("model.safetensors"))  # through the server, by nobody else
    assert not Path("store").exists()

    assert PASSWORD not in "".join(s.out + s.err for s in said)
    files = [path for folder in (tracking.folder, Path()) for path in folder.rglob("*") if path.is_file()]
    assert {"mlflow.db", "tracking.json", "MLmodel", "server.log"} <= {path.name for path in files}
    assert [path for path in files if PASSWORD.encode() in path.read_bytes()] == []


@pytest.mark.slow  # a process that imports MLflow and torch
def test_another_process_loads_a_registered_model(toy: Toy, gate: Gate) -> None:
    with registry.run("job", {}) as run:
        registry.register(run, toy.pairs_model, "shared-rm", {})
    rollouts = asked(toy)
    Path("rows.json").write_text(json.dumps([{"prompt": r.prompt[-1].content, "answer": r.text} for r in rollouts]))
    code = (
        "import json, mlflow, pandas\n"
        'model = mlflow.pyfunc.load_model("models:/shared-rm/1")\n'
        'print(json.dumps(model.predict(pandas.read_json("rows.json", orient="records"))["score"].tolist()))'
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert other.returncode == 0, other.stderr
    expected = [score for [score] in Scorer.load(toy.pairs_model).score_rollouts(rollouts)]  # type: ignore[misc]
    assert json.loads(other.stdout.splitlines()[-1]) == pytest.approx(expected, abs=1e-5)


def test_who_is_not_let_in_is_told_what_to_set(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", gate.uri(""))
    here("rayward", "models", "list").mistake("refuses this user (HTTP 401)", "MLFLOW_TRACKING_PASSWORD")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", gate.uri("team:wrong@"))
    said = here("rayward", "models", "list")
    said.mistake("HTTP 401")
    assert "wrong" not in said.err + said.out
    with pytest.raises(RegistryError, match="HTTP 401"), registry.run("job", {}, keep=Path("tracking.json")):
        pytest.fail("a job must not begin")
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "team")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
    done(here("rayward", "models", "list"))


def test_without_a_server_nothing_begins(toy: Toy, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://team:{PASSWORD}@127.0.0.1:{free_port()}")
    for words in (train(toy, "o"), ("rayward", "models", "list"), ("rayward", "ui", "--no-open")):
        said = here(*words).mistake("does not answer: Connection refused", "MLFLOW_TRACKING_URI")
        assert PASSWORD not in said
    assert not Path("o/model").exists()
    assert not Path("o/run").exists()


def test_the_ui_is_the_server_s(gate: Gate) -> None:
    said = done(here("rayward", "ui", "--no-open"))
    assert f"{gate.uri('')}/#/models" in said.out
    assert PASSWORD not in said.out


# ------------------------------------------------------------------------------------------------------ models on this disk


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_registered_model_is_fetched_once_and_leaves_nothing_else(
    toy: Toy, gate: Gate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    for model in (toy.pairs_model, toy.steps_model):
        with registry.run("job", {}) as run:
            registry.register(run, model, "kept-rm", {})
    registry.promote("kept-rm", "1")
    before = contents(tmp_path / "scratch")  # a registration's own
    gate.shut_at = "model.safetensors"
    with pytest.raises(RegistryError, match="cannot be used"):
        registry.model_folder("models:/kept-rm/1")
    assert list(places.cache().iterdir()) == [], "half a model is none"
    gate.reset()
    folder = registry.model_folder("models:/kept-rm@champion")
    assert contents(folder) == contents(toy.pairs_model)
    gate.shut_at = "mlflow-artifacts"  # what is here is not asked for again
    assert registry.model_folder("models:/kept-rm/1") == folder
    assert registry.model_address("models:/kept-rm@champion") == str(folder)
    gate.reset()
    newer = registry.model_folder("models:/kept-rm/2")
    assert contents(newer) == contents(toy.steps_model)
    assert sorted(places.cache().iterdir()) == sorted((folder.parent, newer.parent))
    assert contents(tmp_path / "scratch") == before


@pytest.mark.slow  # processes that import MLflow
def test_two_processes_fetch_one_model(toy: Toy, gate: Gate) -> None:
    with registry.run("job", {}) as run:
        registry.register(run, toy.pairs_model, "wanted-rm", {})
    code = 'from rayward import registry\nprint(registry.model_folder("models:/wanted-rm/1"))'
    jobs = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    said = [job.communicate(timeout=240) for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0, 0], said
    [folder] = {Path(out.splitlines()[-1]) for out, _ in said}
    assert contents(folder) == contents(toy.pairs_model)
    assert list(places.cache().iterdir()) == [folder.parent]


def test_a_sweep_from_a_registered_model_goes_on_where_the_cache_is_another(toy: Toy, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    with registry.run("job", {}) as run:
        registry.register(run, toy.pairs_model, "begun-rm", {})
    registry.promote("begun-rm", "1")
    parts = (ModelSettings(), RenderSettings(max_length=160), BatchSettings(size=4), TrainSettings(checkpoint_every=4, log_every=1))
    base = FitSettings(str(toy.pairs), "models:/begun-rm@champion", "auto", *parts, validation_share=0.1)
    steps: list[float] = []

    def prepared() -> sweeping.Sweep:
        return sweeping.prepare(base, {"train.seed": (0,)}, "s", 0, 0, sweeping.Rules())

    @contextmanager
    def followed(trial: sweeping.Trial) -> Iterator[Report]:
        def tell(line: dict[str, float]) -> None:
            steps.append(line["step"])
            if len(steps) == 15:
                raise KeyboardInterrupt

        yield tell

    with pytest.raises(KeyboardInterrupt):
        sweeping.run(prepared(), followed)
    monkeypatch.setenv("RAYWARD_CACHE", "another-cache")
    [result] = sweeping.run(sweep := prepared(), followed)
    assert 4 < steps[15] <= steps[14], "from a checkpoint"
    assert (result["status"], result["tags"]["base_model"]) == ("finished", "models:/begun-rm/1")
    assert Path(sweep.trials[0].address).is_relative_to(places.cache())


def test_what_is_registered_and_no_model_of_ours(gate: Gate) -> None:
    with registry.run("job", {}, keep=Path("tracking.json")) as run:
        Path("model").write_text("a file")
        client().log_artifact(run.id, "model", "x/artifacts")
    client().create_registered_model("foreign")
    client().create_model_version("foreign", f"{client().get_run(run.id).info.artifact_uri}/x", run.id)
    with pytest.raises(RegistryError, match="models:/foreign/1 holds no model of Rayward's"):
        registry.model_folder("models:/foreign")
    assert list(places.cache().iterdir()) == []


# --------------------------------------------------------------------------------------------------------- while it is away


def test_what_is_logged_while_the_server_is_away_arrives_once(gate: Gate, capfd: pytest.CaptureFixture[str]) -> None:
    pending = Path("tracking.pending.jsonl")
    with registry.run("job", {"a": 1}, keep=Path("tracking.json")) as run:
        for line in lines(range(1, 4)):
            run.metrics(line)
        assert run.flush() == 0
        gate.shut = True
        for line in lines(range(4, 1200)):  # more than MLflow takes at once
            run.metrics(line)
        run.metrics({"step": 1200, "loss": math.nan, "accuracy": math.inf})
        run.tags({"note": "written down"})
        Path("note.txt").write_text("kept")
        run.artifact(Path("note.txt"))
        assert run.buffer.drain(0.5) > 1000
        assert len(read(pending)) == len(run.buffer.waiting)
        gate.reset()
        gate.deaf_to = "log-batch"  # it takes the first lines, and its answer gets lost
    assert not pending.exists()
    assert history(run.id, "loss")[:-1] == [(line["step"], line["loss"]) for line in lines(range(1, 1200))]
    assert [step for step, _ in history(run.id, "accuracy")] == list(range(1, 1201))
    found = client().get_run(run.id)
    assert (found.info.status, found.data.tags["note"]) == ("FINISHED", "written down")
    assert Path(mlflow.artifacts.download_artifacts(f"runs:/{run.id}/note.txt")).read_text() == "kept"
    said = capfd.readouterr().err
    assert "does not take what is logged, and the job goes on" in said
    assert "is back after" in said


@pytest.mark.parametrize("back", ["before", "during"], ids="the server is back {} the second time".format)
def test_a_job_killed_while_the_server_is_away_loses_nothing(gate: Gate, back: str, monkeypatch: pytest.MonkeyPatch) -> None:
    keep, pending = Path("tracking.json"), Path("tracking.pending.jsonl")
    first = registry.run("job", {}, keep=keep)
    log = first.__enter__()
    for line in lines(range(1, 4)):
        log.metrics(line)
    assert log.flush() == 0
    gate.shut = True
    for line in lines(range(4, 9)):
        log.metrics(line)
    log.buffer.closed = True  # killed: nobody comes to the end of the block
    log.buffer.wake.set()
    with pending.open("a") as file:
        file.write('{"metrics": [["loss", 0.1')  # in the middle of a line
    gate.shut = back == "during"
    with registry.run("job", {}, keep=keep) as again:
        assert again.id == log.id
        for line in lines(range(2, 20)):  # from the last checkpoint
            again.metrics(line)
        gate.reset()
    assert not pending.exists()
    for metric in ("loss", "accuracy"):
        assert history(log.id, metric) == [(line["step"], line[metric]) for line in lines(range(1, 20))]
    assert client().get_run(log.id).info.status == "FINISHED"
    monkeypatch.setenv("RAYWARD_TRACKING_WAIT_S", "0")  # the first block ends with this test, and would wait


def test_a_server_that_does_not_come_back_costs_no_training(toy: Toy, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    gate.shut_at = "log-batch"  # the run is there, nothing of it is
    monkeypatch.setenv("RAYWARD_TRACKING_WAIT_S", "1")
    said = here(*train(toy, "o", "--register", "late-rm")).mistake("did not come back within 1 s", "o/model", "the same command")
    assert "o/tracking.pending.jsonl; deliver them with: rayward run " in said
    assert PASSWORD not in said
    weights, logged = Path("o/model/model.safetensors"), Path("o/run/metrics.jsonl").read_text()
    written = weights.stat().st_mtime_ns
    assert Path("o/tracking.pending.jsonl").exists()
    gate.reset()
    assert "registered: models:/late-rm/1" in done(here(*train(toy, "o", "--register", "late-rm"))).out
    assert weights.stat().st_mtime_ns == written  # not trained again
    assert Path("o/run/metrics.jsonl").read_text() == logged
    run_id = registry.find("late-rm")["run_id"]
    measured = [json.loads(line) for line in logged.splitlines()]
    assert history(run_id, "loss") == [(line["step"], line["loss"]) for line in measured if "loss" in line]
    assert client().get_run(run_id).info.status == "FINISHED"
    assert not Path("o/tracking.pending.jsonl").exists()


def test_a_run_without_a_home_says_what_is_lost(gate: Gate, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RAYWARD_TRACKING_WAIT_S", "0.5")
    with registry.run("job", {}) as run:
        run.flush()
        gate.shut = True
        run.summary({"accuracy": 0.5})
    assert "2 record(s) of run" in (said := capfd.readouterr().err)
    assert "are lost" in said


def test_the_run_of_a_submitted_job_is_found(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    assert registry.run_of_submission("train-abc-1") is None
    monkeypatch.setenv("RAYWARD_SUBMISSION_ID", "train-abc-1")
    with registry.run("job", {}) as run:
        run.flush()
        assert registry.run_of_submission("train-abc-1").status == "RUNNING"  # type: ignore[union-attr]
    found = registry.run_of_submission("train-abc-1")
    assert found is not None
    assert (found.run_id, found.status) == (run.id, "FINISHED")
    assert found.url is not None
    assert found.url.startswith(f"{gate.uri('')}/#/experiments/")
    assert PASSWORD not in found.url


# ------------------------------------------------------------------------------------------------------- servers that are killed


@contextmanager
def training(words: tuple[str, ...], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A `rayward run` in a process of its own."""
    with log.open("ab") as file:
        process = subprocess.Popen([RAYWARD, "run", *words], stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        yield process
    finally:
        ended(process, signal.SIGKILL)


def when(path: Path, count: int, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until a growing file has as many lines."""
    until = time.monotonic() + 200
    while not path.exists() or len(path.read_text().splitlines()) < count:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < until, log.read_text()
        time.sleep(0.05)


@pytest.mark.slow  # two servers' starts and a training
@pytest.mark.parametrize("job", ["goes on", "is killed too"], ids="the job {}".format)
def test_a_server_killed_in_the_middle_of_a_training(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: str) -> None:
    folder = tmp_path / "tracking"
    folder.mkdir()
    server = Tracking(folder, f"sqlite:///{folder / 'mlflow.db'}")
    server.start()
    at_work(monkeypatch, tmp_path / "home", server.url)
    words, log, metrics = train(toy, "o", "--register", "rm", "--set", "train.epochs=20"), Path("log"), Path("o/run/metrics.jsonl")
    try:
        with training(words, log) as process:
            when(metrics, 20, process, log)
            server.end(signal.SIGKILL)
            when(metrics, 60, process, log)
            if job == "is killed too":
                ended(process, signal.SIGKILL)
                assert read(Path("o/tracking.pending.jsonl"))
            else:
                server.start()
                assert process.wait(240) == 0, log.read_text()
        if job == "is killed too":
            server.start()
            with training(words, log) as process:
                assert process.wait(240) == 0, log.read_text()
        row = registry.find("rm/1")
        measured = {line["step"]: line["loss"] for line in map(json.loads, metrics.read_text().splitlines()) if "loss" in line}
        assert history(row["run_id"], "loss") == sorted(measured.items())
        assert client().get_run(row["run_id"]).info.status == "FINISHED"
        assert not Path("o/tracking.pending.jsonl").exists()
    finally:
        server.end(signal.SIGKILL)


# ---------------------------------------------------------------------------------------------------------------- databases


@pytest.mark.slow  # two processes that import MLflow
def test_two_jobs_are_the_first_in_one_new_store(tmp_path: Path) -> None:
    code = (
        'from rayward import registry\nwith registry.run("job", {"a": 1}) as run:\n    run.metrics({"step": 1, "loss": 0.5})\nprint(run.id)'
    )
    env = {**{n: v for n, v in os.environ.items() if not n.startswith("MLFLOW_")}, "RAYWARD_STORE": str(tmp_path / "store")}
    jobs = [
        subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    said = [job.communicate(timeout=240) for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0, 0], said
    found = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'store' / 'mlflow.db'}")
    for out, _ in said:
        run = found.get_run(out.strip())
        assert (run.info.status, run.data.metrics) == ("FINISHED", {"loss": 0.5})


@pytest.mark.slow  # a new database, a registration
def test_without_a_server_a_model_stays_where_it_is(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_work(monkeypatch, tmp_path / "a home", "")
    with registry.run("job", {}) as run:
        registry.register(run, toy.pairs_model, "rm", {})
    before = contents(Path("store/artifacts"))
    folder = registry.model_folder("models:/rm")
    assert folder.is_relative_to(Path("store/artifacts").absolute())
    assert contents(folder) == contents(toy.pairs_model)
    assert contents(Path("store/artifacts")) == before
    assert not places.cache().exists()
    Path("store/artifacts").rename("elsewhere")
    with pytest.raises(RegistryError, match="that folder is not here"):
        registry.model_folder("models:/rm")


def as_nobody() -> list[str]:
    """Words that run a command as a user whom Postgres does not refuse."""
    if os.getuid() != 0:
        return []
    if shutil.which("setpriv") is None:
        pytest.skip("Postgres refuses root, and there is no setpriv")
    return ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]


@pytest.fixture
def postgres() -> Iterator[str]:
    """A Postgres of the test's own; its address. Skipped where it or its driver is not installed."""
    pytest.importorskip("psycopg2", reason="needs the extra server")
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    initdb = shutil.which("initdb") or (str(found[-1]) if found else None)
    if initdb is None:
        pytest.skip("needs Postgres (initdb), which is not here")
    programs, user, port = Path(initdb).resolve().parent, as_nobody(), free_port()
    folder = Path(tempfile.mkdtemp(prefix="rw-pg-", dir="/tmp"))  # pytest's folders are closed to other users
    (folder / "password").write_text(PASSWORD)
    if user:
        for path in (folder, folder / "password"):
            os.chown(path, 65534, 65534)
    initdb_words = ["-D", str(folder / "data"), "-U", "team", "-A", "scram-sha-256", "--pwfile", str(folder / "password"), "-E", "UTF8"]
    subprocess.run([*user, str(programs / "initdb"), *initdb_words], check=True, capture_output=True, cwd=folder)
    words = ["-D", str(folder / "data"), "-h", "127.0.0.1", "-p", str(port), "-c", "unix_socket_directories=", "-c", "fsync=off"]
    process = subprocess.Popen(
        [*user, str(programs / "postgres"), *words],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        until = time.monotonic() + 60
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.2)
        yield f"postgresql+psycopg2://team:{PASSWORD}@127.0.0.1:{port}/postgres"
    finally:
        ended(process, signal.SIGINT)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow  # a database, a server
def test_postgres_behind_a_server_and_alone(toy: Toy, postgres: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "tracking"
    folder.mkdir()
    server = Tracking(folder, postgres)
    server.start()
    try:
        at_work(monkeypatch, tmp_path / "home", server.url)
        with registry.run("job", {"a": "b" * 10_000}, keep=Path("server.json")) as first:
            for line in lines(range(1, 700)):
                first.metrics(line)
            first.metrics({"step": 700, "loss": math.nan})
            assert registry.register(first, toy.pairs_model, "rm", {"note": "x"}) == "1"
        assert registry.promote("rm", "1")["before"] is None
        assert (registry.model_folder("models:/rm@champion") / "model.safetensors").is_file()
    finally:
        server.end()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", postgres)  # the same database, without a server
    assert history(first.id, "loss")[:-1] == [(line["step"], line["loss"]) for line in lines(range(1, 700))]
    with registry.run("job", {}, keep=Path("alone.json")) as second:
        second.metrics({"step": 1, "loss": 1.0})
    assert client().get_run(second.id).info.status == "FINISHED"
    done(here("rayward", "models", "show", "rm@champion"))
    assert PASSWORD not in Path("alone.json").read_text() + here("rayward", "models", "show", "rm").out
    mistake = here("rayward", "models", "show", "other").mistake("no model other in postgresql+psycopg2://127.0.0.1")
    assert PASSWORD not in mistake
