"""Pipelines at an object store: the datasets of the disk, digest for digest, also when a run is killed, twice at once, or refused.

The store is moto's S3 server on loopback: real requests, real answers, and a log of them.
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

import tiny
from chat_server import ChatServer, judge
from rayward import evaluation, places, storage
from rayward.cli import find_script
from rayward.dataflow import Engine, claims
from rayward.dataflow.engine import session
from rayward.errors import DataError
from rayward.fitting import fit, open_sides
from rayward.places import Place, at
from rayward.policies.asking import Budget, Reply, Spent, VerdictLog
from rayward.storage import Dataset, open_dataset
from rayward.training import TrainSettings
from test_dataflow import pipeline, rows_of
from test_dataflow import write as write_rows
from tiny import toy_dataset

pytest.importorskip("s3fs", reason="needs the extra s3")
pytest.importorskip("moto", reason="needs moto[server]")

SIDES = ("train", "validation", "test")


class Bucket:
    """A bucket of its own, and what was asked of it."""

    def __init__(self, url: str, log: list[str]):
        self.url, self.log = url, log

    def asked(self) -> Counter[str]:
        """Requests by kind since the last time."""
        counts = Counter(self.log)
        self.log.clear()
        return counts


@pytest.fixture(scope="module")
def endpoint() -> Iterator[list[str]]:
    """A server on loopback, and the environment that leads there; gives its log."""
    from moto.server import ThreadedMotoServer
    from werkzeug.serving import WSGIRequestHandler

    log: list[str] = []

    def note(self: Any, *_: object) -> None:
        log.append("LIST" if "list-type" in self.path else "DELETE" if self.path.endswith("?delete") else self.command)

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WSGIRequestHandler, "log_request", note)
        server.start()
        host, port = server.get_host_and_port()
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.delenv("AWS_PROFILE", raising=False)
        yield log
        server.stop()


@pytest.fixture
def bucket(endpoint: list[str], request: pytest.FixtureRequest) -> Bucket:
    name = f"b{abs(hash(request.node.name)) % 10**12}"
    place = at(f"s3://{name}/x")
    place.fs.mkdir(name)
    endpoint.clear()
    return Bucket(f"s3://{name}", endpoint)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    for n in range(3):
        write_rows(folder / "in" / f"{n}.jsonl", [*({**row, "id": f"{n}-{row['id']}"} for row in rows_of(8, seed=n)), {"prompt": ""}])
    return folder


def chain(source: str, to: str, engine: str = "local") -> list[Dataset]:
    """Import, label, split: what a user does first."""
    how: dict[str, Any] = {"engine": engine}
    rollouts = pipeline("import_rollouts", source=source, format="rollouts", output=f"{to}/rollouts", parts=4, **how)
    pairs = pipeline("label_pairs", source=f"{to}/rollouts", output=f"{to}/pairs", **how)
    return [rollouts, pairs, *pipeline("split_examples", source=f"{to}/pairs", output=f"{to}/split", **how)]


@pytest.fixture(scope="module")
def on_disk(rows: Path) -> list[Dataset]:
    return chain(str(rows / "in"), str(rows / "out"))


def same(there: list[Dataset], here: list[Dataset]) -> None:
    assert [d.manifest.digest for d in there] == [d.manifest.digest for d in here]
    assert [d.manifest.rejected for d in there] == [d.manifest.rejected for d in here]
    assert [d.table() for d in there] == [d.table() for d in here]
    assert [d.rejects().num_rows for d in there] == [d.rejects().num_rows for d in here]


# -------------------------------------------------------------------------------------------------------------- the same


def test_the_whole_chain_at_a_url_is_that_of_the_disk(bucket: Bucket, rows: Path, on_disk: list[Dataset]) -> None:
    for file in (rows / "in").iterdir():
        places.send(file, f"{bucket.url}/in/{file.name}")
    made = chain(f"{bucket.url}/in", f"{bucket.url}/out")
    same(made, on_disk)
    names = list(places.listing(at(bucket.url + "/out"), deep=True))
    assert "split/train/manifest.json" in names
    assert not [name for name in names if "/." in "/" + name], "nothing is left of the stages"


def test_tasks_on_ray_read_and_write_the_url(bucket: Bucket, rows: Path, on_disk: list[Dataset], ray_cluster: Any) -> None:
    places.send(rows / "out" / "rollouts", f"{bucket.url}/rollouts")
    same([pipeline("label_pairs", source=f"{bucket.url}/rollouts", output=f"{bucket.url}/pairs", engine="ray")], on_disk[1:2])


@pytest.mark.slow
def test_the_whole_chain_on_ray_is_that_of_the_disk(bucket: Bucket, rows: Path, on_disk: list[Dataset], ray_cluster: Any) -> None:
    same(chain(str(rows / "in"), f"{bucket.url}/out", "ray"), on_disk)


def test_store_names_reach_a_store_at_a_url(
    bucket: Bucket, rows: Path, on_disk: list[Dataset], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RAYWARD_STORE", bucket.url + "/mine")
    monkeypatch.chdir(tmp_path)
    made = pipeline("label_pairs", source=str(rows / "out" / "rollouts"), output="store:toy/pairs")
    assert str(made.path) == f"{bucket.url}/mine/toy/pairs"
    same([open_dataset("store:toy/pairs")], on_disk[1:2])
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_what_follows_the_chain_goes_to_a_url_too(bucket: Bucket, rows: Path, on_disk: list[Dataset], tmp_path: Path) -> None:
    for name in ("pairs", "split"):
        places.send(rows / "out" / name, f"{bucket.url}/{name}")
    exported = pipeline("export_examples", source=f"{bucket.url}/pairs", format="preference", output=f"{bucket.url}/trl", compress=True)
    here = pipeline("export_examples", source=str(rows / "out" / "pairs"), format="preference", output=str(tmp_path / "trl"), compress=True)
    assert [places.read(f) for f in exported.files] == [places.read(f) for f in here.files]
    assert exported.manifest.digest == here.manifest.digest
    mixture = "sources: {a: {path: %s, weight: 2.0, cap: 50}}"
    places.write(at(bucket.url + "/mixture.yaml"), mixture % f"{bucket.url}/pairs")
    (tmp_path / "mixture.yaml").write_text(mixture % (rows / "out" / "pairs"))
    mixed = pipeline("mix_examples", mixture=bucket.url + "/mixture.yaml", output=bucket.url + "/mixed")
    same([mixed], [pipeline("mix_examples", mixture=str(tmp_path / "mixture.yaml"), output=str(tmp_path / "mixed"))])
    found = pipeline("lint_examples", source=f"{bucket.url}/split", output=f"{bucket.url}/lint", fix=True)
    lint = pipeline("lint_examples", source=str(rows / "out" / "split"), output=str(tmp_path / "lint"), fix=True)
    assert [(f.name, f.count) for f in found] == [(f.name, f.count) for f in lint]
    fixed = [open_dataset(f"{to}/lint/fixed/train").manifest.digest for to in (bucket.url, tmp_path)]
    assert fixed[0] == fixed[1]
    assert b"<html" in places.read(at(bucket.url + "/lint/index.html"))


def job(name: str, **settings: Any) -> Any:
    """Run a job by name, in this process."""
    script = runpy.run_path(str(find_script(name)))
    return script["main"](script["Settings"](**settings))


def work_with_models(to: str, model: str, engine: Engine) -> None:
    """Draw answers, label their steps by drawing, score them, choose among them, judge them, and the model: prints digests."""
    from rayward.montecarlo import StepSampling

    with session(engine, 0):
        made = [pipeline("sample_rollouts", problems="toy:12", output=f"{to}/rollouts", parts=2, engine=engine)]
        words = {"source": f"{to}/rollouts", "engine": engine}
        made.append(pipeline("label_steps", **words, output=f"{to}/steps", sampling=StepSampling(policy="toy")))
        made.append(pipeline("score_rollouts", **words, model=model, output=f"{to}/scored"))
        made.append(pipeline("select_uncertain", **words, model=(model,), output=f"{to}/chosen", count=4))
        with ChatServer(judge()) as server:
            asked = json.dumps({"base_url": server.url, "model": "m"})
            made.append(pipeline("judge_pairs", **words, output=f"{to}/judged", judge_settings=asked))
        made.append(pipeline("label_pairs", **words, output=f"{to}/pairs"))
    report = job("evaluate_model", model=model, examples=f"{to}/pairs", output=f"{to}/report")
    numbers = {name: value for name, value in report.headline.items() if value == value}
    print("MADE " + json.dumps([*(dataset.manifest.digest for dataset in made), numbers]))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_what_works_with_models_makes_the_same_at_a_url_on_ray(bucket: Bucket, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    settings = replace(tiny.FIT, examples=str(toy_dataset("pairs", tmp_path / "learnt", problems=30).path), train=TrainSettings(epochs=1))
    places.send(fit(settings, str(folder)).model, f"{bucket.url}/model")
    said = []
    for to, model, engine in ((str(tmp_path), str(folder / "model"), "local"), (bucket.url, f"{bucket.url}/model", "ray")):
        folders = {f"RAYWARD_{name.upper()}": str(tmp_path / name) for name in ("cache", "store")}
        own = {**folders, "OMP_NUM_THREADS": "1", "RAY_ADDRESS": ""}
        code = f"import test_object_store as t; t.work_with_models({to!r}, {model!r}, {engine!r})"
        command = [sys.executable, "-c", code]
        done = subprocess.run(
            command, cwd=Path(__file__).parent, env={**os.environ, **own}, capture_output=True, text=True, encoding="utf-8", timeout=500
        )
        assert done.returncode == 0, done.stdout + done.stderr[-4000:]
        said.append(json.loads(done.stdout.rpartition("MADE ")[2]))
    assert said[0] == said[1]
    assert {"report.json", "report.html", "scores.parquet"} == set(places.listing(at(f"{bucket.url}/report")))


def test_a_report_that_was_half_sent_is_replaced_and_what_is_no_report_is_kept(bucket: Bucket) -> None:
    output = f"{bucket.url}/report"
    places.write(at(output) / "scores.parquet", "as a run leaves it that was killed before report.json")
    assert str(evaluation.check_output(output)) == output
    places.write(at(output) / "thesis.tex", "years of work")
    with pytest.raises(DataError, match="already holds something else"):
        evaluation.check_output(output)


# ------------------------------------------------------------------------------------------------------------ what it costs


def test_requests_of_a_pipeline_grow_with_its_parts_and_are_few(bucket: Bucket, rows: Path, on_disk: list[Dataset]) -> None:
    places.send(rows / "out" / "rollouts", f"{bucket.url}/rollouts")
    bucket.asked()
    source = open_dataset(f"{bucket.url}/rollouts")
    assert bucket.asked() == {"HEAD": 1, "GET": 1, "LIST": 1}  # the manifest and the names of the parts
    assert source.bytes > 0
    assert len(source.parts) == 4
    assert not bucket.asked(), "the listing has the sizes"
    list(source.tables())
    assert bucket.asked() == {"HEAD": 4, "GET": 4}  # a part is read in one GET
    pipeline("label_pairs", source=f"{bucket.url}/rollouts", output=f"{bucket.url}/pairs")
    asked = bucket.asked()
    parts = 4
    # of a part: itself, its marker, its copy; then the lease, the recipe, the manifest twice, a note
    assert asked["PUT"] <= 3 * parts + 5, asked
    assert asked["GET"] <= parts + 8, asked
    assert asked["LIST"] <= 12, asked
    assert asked["HEAD"] <= 3 * parts + 14, asked
    pipeline("label_pairs", source=f"{bucket.url}/rollouts", output=f"{bucket.url}/pairs")
    again = bucket.asked()
    assert again["PUT"] == again["DELETE"] == 0, again  # it is already made


# -------------------------------------------------------------------------------------------------- killed, and gone on


def breaking(monkeypatch: pytest.MonkeyPatch, when: Callable[[str], bool]) -> list[str]:
    """Have the run end without a word where it writes an object that `when` names; gives what was written."""
    written: list[str] = []
    write, landing = places.write, places.landing

    def note(place: Place) -> None:
        if when(str(place)):
            raise KeyboardInterrupt
        written.append(str(place))

    def writing(place: Place, content: bytes | str) -> None:
        note(place)
        write(place, content)

    @contextlib.contextmanager
    def sending(place: Place) -> Iterator[Path]:
        with landing(place) as here:
            yield here
            note(place)

    monkeypatch.setattr(places, "write", writing)
    monkeypatch.setattr(places, "landing", sending)
    return written


@pytest.mark.parametrize(
    "at_object",
    [
        "lay-out/000001.json",
        pytest.param("part-002-of-004.parquet", marks=pytest.mark.slow),
        pytest.param("join/000002.json", marks=pytest.mark.slow),
        pytest.param("rollouts.partial/manifest.json", marks=pytest.mark.slow),
    ],
)
def test_a_run_that_was_broken_off_goes_on(
    at_object: str, bucket: Bucket, rows: Path, on_disk: list[Dataset], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words: dict[str, Any] = {"source": str(rows / "in"), "format": "rollouts", "output": f"{bucket.url}/rollouts", "parts": 4}
    with monkeypatch.context() as patch:
        written = breaking(patch, lambda name: name.endswith(at_object))
        with pytest.raises(KeyboardInterrupt):
            pipeline("import_rollouts", **words)
    assert "the same command goes on from there" in capsys.readouterr().err
    with pytest.raises(DataError, match="does not exist"):
        open_dataset(f"{bucket.url}/rollouts")
    done = [name for name in written if "/done/" in name]
    again = breaking(monkeypatch, lambda name: name in done)  # what is done is not done again
    made = pipeline("import_rollouts", **words)
    assert "going on where an earlier run stopped" in capsys.readouterr().err
    assert again
    same([made], on_disk[:1])
    assert {name.split("/")[0] for name in places.listing(at(bucket.url), deep=True)} == {"rollouts"}


def test_a_run_that_was_broken_off_while_it_published_publishes_again(
    bucket: Bucket, rows: Path, on_disk: list[Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    words: dict[str, Any] = {"source": str(rows / "out" / "pairs"), "output": f"{bucket.url}/split"}
    calls = []

    def copy_two(folder: Place, names: list[str], to: Place) -> None:
        calls.append(names)
        real(folder, names[:2], to)
        raise KeyboardInterrupt

    real = places.copy_files
    with monkeypatch.context() as patch:
        patch.setattr(places, "copy_files", copy_two)
        with pytest.raises(KeyboardInterrupt):
            pipeline("split_examples", **words)
    assert calls
    with pytest.raises(DataError, match="is being written, or what wrote it was stopped"):
        open_dataset(f"{bucket.url}/split")
    places.write(at(f"{bucket.url}/split/train/manifest.json"), "one side is there, and the others are not yet")
    with pytest.raises(DataError, match="is being written, or what wrote it was stopped"):
        open_sides(f"{bucket.url}/split", 0.1)
    same(pipeline("split_examples", **words), on_disk[2:])
    assert {name.split("/")[0] for name in places.listing(at(bucket.url), deep=True)} == {"split"}


@pytest.mark.slow
def test_a_process_that_is_killed_leaves_what_the_same_command_goes_on_with(bucket: Bucket, rows: Path, on_disk: list[Dataset]) -> None:
    words = [
        "--source",
        str(rows / "in"),
        "--format",
        "rollouts",
        "--output",
        f"{bucket.url}/rollouts",
        "--parts",
        "4",
        "--engine",
        "local",
    ]
    command = [sys.executable, "-m", "rayward.cli", "run", "import_rollouts", *words]
    stage = at(f"{bucket.url}/.rollouts.partial")
    killed = 0
    for count in (1, 3, 5):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(places.listing(stage / "done", deep=True)) < count:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert killed
    same([open_dataset(f"{bucket.url}/rollouts")], on_disk[:1])


# --------------------------------------------------------------------------------------------- what stands there already


def test_what_stands_there_is_kept_or_replaced_as_on_disk(bucket: Bucket, rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words: dict[str, Any] = {"source": str(rows / "out" / "rollouts"), "output": f"{bucket.url}/pairs"}
    first = pipeline("label_pairs", **words)
    pipeline("label_pairs", **words)
    assert f"{bucket.url}/pairs: already made" in capsys.readouterr().err
    other = {"source": str(rows / "out" / "pairs"), "output": f"{bucket.url}/pairs"}
    with pytest.raises(DataError, match="already holds something else"):
        pipeline("split_examples", **other)
    pipeline("split_examples", **other, overwrite=True)
    assert [open_dataset(f"{bucket.url}/pairs/{side}").manifest.kind for side in SIDES] == ["examples"] * 3
    assert not [name for name in places.listing(at(bucket.url + "/pairs")) if name.startswith("part-")], "the old parts are gone"
    with pytest.raises(DataError, match="holds several datasets: test, train, validation"):
        open_dataset(f"{bucket.url}/pairs")
    assert pipeline("label_pairs", **words, overwrite=True).manifest.digest == first.manifest.digest
    places.write(at(bucket.url + "/mine/notes.txt"), "mine")
    with pytest.raises(DataError, match="files that no pipeline made, and they are kept"):
        pipeline("label_pairs", source=words["source"], output=bucket.url + "/mine", overwrite=True)
    assert places.read(at(bucket.url + "/mine/notes.txt")) == b"mine"
    with pytest.raises(DataError, match="are one folder, or one lies in the other"):
        pipeline("split_examples", source=f"{bucket.url}/pairs", output=f"{bucket.url}/pairs/more")


# ------------------------------------------------------------------------------------------------------- two runs at once


@pytest.fixture
def stage(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setattr(claims, "BEAT_S", 0.2)
    monkeypatch.setattr(claims, "LAPSE_S", 1.5)
    monkeypatch.setattr(claims, "SETTLE_S", 0.1)
    return at(bucket.url + "/.out.partial")


def lease(stage: Place, **words: Any) -> bytes:
    said = {"owner": "another", "beat": 0, "pid": 1, "host": "elsewhere", "machine": "another boot", **words}
    places.write(stage / claims.LOCK, json.dumps(said))
    return places.read(stage / claims.LOCK)


def test_of_two_runs_at_once_the_second_is_told(stage: Place, bucket: Bucket) -> None:
    output = at(bucket.url + "/out")
    with claims.claimed(stage, output) as check:
        elsewhere = json.loads(places.read(stage / claims.LOCK))
        with pytest.raises(DataError, match="another run is making"), claims.claimed(stage, output):
            pass
        check()
        assert json.loads(places.read(stage / claims.LOCK))["owner"] == elsewhere["owner"]
    assert not places.listing(stage)


def test_a_lease_of_a_machine_that_is_lost_runs_out(stage: Place, bucket: Bucket, capsys: pytest.CaptureFixture[str]) -> None:
    lease(stage)
    began = time.monotonic()
    with claims.claimed(stage, at(bucket.url + "/out")) as check:
        check()
    assert time.monotonic() - began >= claims.LAPSE_S
    assert "on elsewhere was at work here; waiting" in capsys.readouterr().err


def test_a_lease_of_a_process_of_this_machine_that_ended_is_void_at_once(
    stage: Place, bucket: Bucket, capsys: pytest.CaptureFixture[str]
) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    lease(stage, pid=ended.pid, machine=claims._machine())
    with claims.claimed(stage, at(bucket.url + "/out")) as check:
        check()
    assert "waiting" not in capsys.readouterr().err


def test_of_two_who_take_a_void_lease_at_once_one_has_it(stage: Place, bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    lease(stage, pid=ended.pid, machine=claims._machine())
    remove = places.remove_files

    def slow(folder: Place, names: list[str]) -> None:
        """The other one removed it too, and wrote its own, after this one looked."""
        remove(folder, names)
        monkeypatch.setattr(claims.time, "sleep", lambda seconds: lease(stage, owner="the other"))

    monkeypatch.setattr(places, "remove_files", slow)
    with pytest.raises(DataError, match="another run is making"), claims.claimed(stage, at(bucket.url + "/out")):
        pass
    assert json.loads(places.read(stage / claims.LOCK))["owner"] == "the other"


def test_a_run_whose_lease_was_taken_publishes_nothing(stage: Place, bucket: Bucket) -> None:
    with claims.claimed(stage, at(bucket.url + "/out")) as check:
        taken = lease(stage)
        with pytest.raises(DataError, match="another one has taken its place"):
            check()
    assert places.read(stage / claims.LOCK) == taken, "the lease of the other is left alone"


# ------------------------------------------------------------------------------------------------------- what is refused


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A store that refuses everybody, and repeats the key in its answer, as S3 does."""

    class Refuse(BaseHTTPRequestHandler):
        def answer(self) -> None:
            body = b"<Error><Code>InvalidAccessKeyId</Code><Message>s3cr3t</Message><AWSAccessKeyId>AKIAs3cr3t</AWSAccessKeyId></Error>"
            self.send_response(403)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_HEAD = do_PUT = do_POST = answer

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Refuse)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    yield
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("way", ["read", "write", "source"])
def test_credentials_that_are_refused_are_said_and_not_shown(
    way: str, refusing: None, rows: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAs3cr3t")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s3cr3t")
    with pytest.raises(DataError, match="refuses the credentials") as error:
        use(way, "s3://bucket", rows)
    said = str(error.value) + "".join(capsys.readouterr())
    assert "s3://bucket" in said
    assert "AWS_ACCESS_KEY_ID" in error.value.way_out
    assert "s3cr3t" not in said


def use(way: str, url: str, rows: Path) -> None:
    if way == "read":
        pipeline("label_pairs", source=f"{url}/rollouts", output=str(rows / "never"))
    elif way == "write":
        pipeline("label_pairs", source=str(rows / "out" / "rollouts"), output=f"{url}/pairs")
    else:
        pipeline("import_rollouts", source=f"{url}/rows.jsonl", output=str(rows / "never"))


@pytest.mark.parametrize("way", ["read", "write", "source"])
def test_a_bucket_that_is_missing_is_said(way: str, endpoint: list[str], rows: Path, on_disk: list[Dataset]) -> None:
    with pytest.raises(DataError, match="there is no such bucket") as error:
        use(way, "s3://no-such-bucket-here", rows)
    assert "s3://no-such-bucket-here" in error.value.what
    assert error.value.way_out


@pytest.mark.parametrize("way", ["read", "write"])
def test_no_credentials_are_said(
    way: str, endpoint: list[str], rows: Path, on_disk: list[Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    import s3fs

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, os.devnull)
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(DataError, match="no credentials were found"):
        use(way, "s3://some-bucket", rows)
    s3fs.S3FileSystem.clear_instance_cache()


def test_a_store_that_is_not_there_is_said(rows: Path, on_disk: list[Dataset], monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free.getsockname()[1]}")
        with pytest.raises(DataError, match="cannot be reached") as error:
            use("write", "s3://some-bucket", rows)
    assert "AWS_ENDPOINT_URL" in error.value.way_out


# ------------------------------------------------------------------------------------------------------------- verdict logs


def reply(text: str) -> Reply:
    return Reply(text, "stop", 3, 7)


def test_a_verdict_log_is_read_by_whoever_comes_next(bucket: Bucket) -> None:
    folder = at(bucket.url + "/verdicts")
    log = VerdictLog(folder)
    for n in range(40):
        log.spend(Spent(requests=1))
        log.add(f"{n:02x}ff", f"key-{n}", reply(f"said {n}"), {"prompt_id": f"{n:02x}ff", "sample": 0})
        log.spend(Spent(tokens=10))
    assert log.find("05ff", "key-5") == reply("said 5")
    log.flush()
    other = VerdictLog(folder, hold=256)
    assert [other.find(f"{n:02x}ff", f"key-{n}") for n in range(40)] == [reply(f"said {n}") for n in range(40)]
    assert other.find("05ff", "another key") is None
    assert other.spent() == Spent(40, 400)


def test_what_was_said_is_sent_in_seconds_and_by_itself(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rayward.policies.remote_log.SEND_S", 0.1)
    folder = at(bucket.url + "/verdicts")
    log = VerdictLog(folder)
    log.add("aaff", "key", reply("said"), {"prompt_id": "aaff", "sample": 0})
    end = time.monotonic() + 20
    while not places.listing(folder / "said") and time.monotonic() < end:
        time.sleep(0.05)
    assert VerdictLog(folder).find("aaff", "key") == reply("said")  # and no one has said that it should be sent


def test_many_small_objects_become_one(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rayward.policies.remote_log.MERGED", 5)
    folder = at(bucket.url + "/verdicts")
    log = VerdictLog(folder)
    for n in range(12):
        log.add(f"{n:02x}ff", f"key-{n}", reply(f"said {n}"), {"prompt_id": f"{n:02x}ff", "sample": 0})
        log.flush()
    assert len(places.listing(folder / "said")) == 4
    other = VerdictLog(folder)
    assert [other.find(f"{n:02x}ff", f"key-{n}") for n in range(12)] == [reply(f"said {n}") for n in range(12)]


def test_a_budget_holds_over_the_runs_of_a_log(bucket: Bucket) -> None:
    folder, budget = at(bucket.url + "/verdicts"), Budget(max_requests=3)
    first = VerdictLog(folder)
    assert [first.spend(Spent(requests=1), budget) for _ in range(2)] == [True, True]
    first.flush()
    second = VerdictLog(folder)
    assert [second.spend(Spent(requests=1), budget) for _ in range(3)] == [True, False, False]


def test_a_store_that_is_away_loses_nothing(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = at(bucket.url + "/verdicts")
    log = VerdictLog(folder)
    log.add("aaff", "key", reply("said"), {"prompt_id": "aaff", "sample": 0})
    with monkeypatch.context() as patch:
        patch.setattr(places, "write", breaks)
        with pytest.raises(OSError, match="away"):
            log.flush()
    log.flush()
    assert VerdictLog(folder).find("aaff", "key") == reply("said")


def breaks(*_: object) -> None:
    raise OSError("away")


def test_steps_that_are_drawn_at_a_url_are_those_of_the_disk_and_nothing_is_drawn_twice(
    bucket: Bucket, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from rayward.montecarlo import StepSampling

    pipeline("sample_rollouts", problems="toy:12", output=str(tmp_path / "rollouts"), parts=2)
    sampling = StepSampling(policy="toy")
    words: dict[str, Any] = {"source": str(tmp_path / "rollouts"), "sampling": sampling}
    here = pipeline("label_steps", **words, output=str(tmp_path / "steps"))
    told = capsys.readouterr().err
    there = pipeline("label_steps", **words, output=bucket.url + "/steps")
    assert paid(capsys.readouterr().err) == paid(told)
    same([there], [here])
    again = pipeline("label_steps", **words, output=bucket.url + "/again", log=bucket.url + "/.steps.verdicts")
    assert paid(capsys.readouterr().err) == paid(told), "all of it was in the log"
    same([again], [here])


def paid(err: str) -> str:
    """What a run says it paid."""
    [line] = [line for line in err.splitlines() if " completions and " in line]
    return line.partition(": ")[2] if not line.startswith("s3:") else line.partition("verdicts: ")[2]


def test_a_manifest_of_the_disk_and_of_a_url_differ_in_nothing_but_paths(bucket: Bucket, rows: Path, on_disk: list[Dataset]) -> None:
    made = pipeline("label_pairs", source=str(rows / "out" / "rollouts"), output=f"{bucket.url}/pairs")
    assert made.manifest == on_disk[1].manifest
    assert storage.read_manifest(made.path / "manifest.json") == made.manifest
