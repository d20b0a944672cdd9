"""Runs and models in MLflow: what a run keeps, how versions are found and promoted, what they lead back to, and that a registered
model scores as the trained one does: in this process, in one that never heard of Rayward, and over HTTP."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from driving import RAYWARD, Toy, done, here
from driving import toy as make_toy
from rayward import places, registry
from rayward.errors import Interrupted, RegistryError
from rayward.metrics import sigmoid
from rayward.records import Message, Rollout, rollouts_of
from rayward.reward_model import read_notes
from rayward.scoring import Scorer
from rayward.storage import code_version, open_dataset

SETTINGS = {"source": "s", "train": {"lr": 0.1, "epochs": 2}}


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return make_toy(tmp_path_factory.getbasetemp())


@pytest.fixture
def at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path / "home")
    return tmp_path / "home"


@pytest.fixture
def filled(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> Toy:
    """The session's store with toy-pairs and toy-steps; only read."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("RAYWARD_STORE", str(toy.store))
    mlflow.set_tracking_uri(registry.tracking_uri())
    return toy


@pytest.fixture
def own(toy: Toy, store: Path, at_home: Path) -> Path:
    """A copy of it, of the test's own; artifacts stay where they are."""
    return Path(shutil.copytree(toy.store, store))


def client() -> Any:
    return mlflow.MlflowClient(tracking_uri=registry.tracking_uri())


def history(run_id: str, metric: str) -> list[tuple[int, float]]:
    return [(m.step, m.value) for m in client().get_metric_history(run_id, metric)]


# -------------------------------------------------------------------------------------------------------------------- runs


def test_a_run_keeps_settings_metrics_over_time_and_what_went_in(toy: Toy, own: Path, at_home: Path) -> None:
    lines = [{"step": s, "loss": 1 / s, "accuracy": s / 10} for s in range(1, 6)]
    dataset = open_dataset(toy.pairs)
    with registry.run("train", SETTINGS) as run:
        run.dataset(dataset, "training")
        for line in lines:
            run.metrics(line)
        run.summary({"best": 0.5, "missing": None, "undefined": float("nan")})
        (at_home / "note.txt").write_text("kept")
        run.artifact(at_home / "note.txt")
    kept = client().get_run(run.id)
    assert kept.info.status == "FINISHED"
    assert kept.data.params == {"source": "s", "train.lr": "0.1", "train.epochs": "2"}
    assert (kept.data.tags["job"], kept.data.tags["code_version"]) == ("train", code_version())
    assert history(run.id, "loss") == [(line["step"], line["loss"]) for line in lines]
    assert history(run.id, "accuracy") == [(line["step"], line["accuracy"]) for line in lines]
    assert {n for n in kept.data.metrics if n not in ("loss", "accuracy")} == {"best"}
    [went_in] = kept.inputs.dataset_inputs
    assert went_in.dataset.digest == dataset.manifest.digest
    assert json.loads(went_in.dataset.source) == {"uri": str(toy.pairs)}
    assert {t.key: t.value for t in went_in.tags} == {"mlflow.data.context": "training", "made_by": "label_pairs"}
    assert Path(mlflow.artifacts.download_artifacts(f"runs:/{run.id}/note.txt")).read_text() == "kept"


@pytest.mark.parametrize(
    ("error", "status"),
    [(ValueError("mine"), "FAILED"), (Interrupted("stopped"), "KILLED"), (KeyboardInterrupt(), "KILLED"), (SystemExit(3), "FAILED")],
)
def test_a_run_says_how_it_ended(own: Path, tmp_path: Path, error: BaseException, status: str) -> None:
    keep = tmp_path / "tracking.json"

    def job() -> None:
        with registry.run("job", {}, keep=keep) as run:
            run.metrics({"step": 1, "loss": 2.0})
            raise error

    with pytest.raises(type(error)):
        job()
    run_id = json.loads(keep.read_text())["run_id"]
    assert client().get_run(run_id).info.status == status
    assert history(run_id, "loss") == [(1, 2.0)]  # what was measured before is not lost


def test_a_store_that_went_away_does_not_hide_why_a_job_ended(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYWARD_TRACKING_WAIT_S", "0.5")

    def job() -> None:
        with registry.run("job", {}):
            shutil.rmtree(own)
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        job()


def test_a_job_that_goes_on_logs_into_its_run_and_every_step_once(own: Path, tmp_path: Path) -> None:
    keep = tmp_path / "job" / "tracking.json"
    with registry.run("job", SETTINGS, keep=keep) as first:
        for step in range(1, 6):
            first.metrics({"step": step, "loss": float(step)})
    with registry.run("job", SETTINGS, keep=keep) as again:
        assert client().get_run(again.id).info.status == "RUNNING"
        for step in range(3, 9):  # from the last checkpoint
            again.metrics({"step": step, "loss": float(step)})
    assert again.id == first.id
    assert history(first.id, "loss") == [(step, float(step)) for step in range(1, 9)]
    assert client().get_run(first.id).info.status == "FINISHED"


@pytest.mark.parametrize("sent", [0, 1, 2, 3, 4], ids="{} lines sent".format)
def test_a_job_that_was_killed_goes_on_without_a_gap_or_a_repeat(own: Path, tmp_path: Path, sent: int) -> None:
    lines: list[dict[str, float]] = [{"step": 10, "loss": 1.0}, {"step": 20, "loss": 2.0}, {"step": 20, "validation_loss": 2.5}]
    lines += [{"step": 25, "validation_loss": 3.5}, {"step": 30, "loss": 3.0}]
    keep = tmp_path / "tracking.json"
    with registry.run("job", {}, keep=keep) as first:
        for line in lines[:sent]:
            first.metrics(line)
        first.flush()
        with registry.run("job", {}, keep=keep) as again:  # the first never came to its end, as when the machine goes down
            for line in lines:  # from the start: no checkpoint had been written
                again.metrics(line)
        assert again.id == first.id
        assert history(first.id, "loss") == [(10, 1.0), (20, 2.0), (30, 3.0)]
        assert history(first.id, "validation_loss") == [(20, 2.5), (25, 3.5)]


def test_what_mlflow_would_refuse_is_made_to_fit(own: Path) -> None:
    long, url = "x" * 10_000, "s3://KEY:SECRET@bucket/rows"
    with registry.run("job", {"long": long, "source": url, **{f"n{n}": n for n in range(150)}}) as run:
        run.tags({"long": long, "source": url})
        run.metrics({"step": 1, "accuracy (hard)": 0.5, "loss": float("nan")})
        run.metrics({"step": 2, "accuracy (hard)": 0.6, "loss": float("inf")})
    kept = client().get_run(run.id)
    assert len(kept.data.params) == 152
    assert kept.data.params["long"].endswith("... (cut: 10,000 characters)")
    assert kept.data.params["source"] == kept.data.tags["source"] == "s3://bucket/rows"
    assert history(run.id, "accuracy _hard_") == [(1, 0.5), (2, 0.6)]
    assert [step for step, _ in history(run.id, "loss")] == [1, 2]


def test_a_job_whose_run_is_gone_begins_a_new_one(own: Path, tmp_path: Path) -> None:
    keep = tmp_path / "tracking.json"
    with registry.run("job", {}, keep=keep) as first:
        pass
    keep.write_text(json.dumps({**json.loads(keep.read_text()), "run_id": "0" * 32}))
    with registry.run("job", {}, keep=keep) as second:
        pass
    with registry.run("job", {}, keep=keep) as third:
        pass
    assert first.id != second.id == third.id


# ------------------------------------------------------------------------------------------------------------------ models


def test_a_model_is_found_by_name_version_and_alias(own: Path) -> None:
    for reference in ("toy-pairs", "toy-pairs/1", "toy-pairs@champion", "models:/toy-pairs@champion"):
        row = registry.find(reference)
        assert (row["name"], row["version"], row["aliases"]) == ("toy-pairs", "1", ["champion"])
    for reference, way_out in (("toy-pair", "did you mean toy-pairs?"), ("toy-pairs/2", "it has 1"), ("toy-pairs@x", "--alias x")):
        with pytest.raises(RegistryError) as error:
            registry.find(reference)
        assert way_out in error.value.way_out


def test_a_run_registers_one_version_however_often(toy: Toy, own: Path) -> None:
    with registry.run("job", {}) as second:
        assert [registry.register(second, toy.pairs_model, "toy-pairs", {"note": "second"}) for _ in range(2)] == ["2", "2"]
    with registry.run("job", {}) as third:
        assert registry.register(third, toy.pairs_model, "toy-pairs", {}) == "3"
    assert [row["version"] for row in registry.models() if row["name"] == "toy-pairs"] == ["3", "2", "1"]
    assert registry.find("toy-pairs")["version"] == "1"  # a bare name is the champion, not the newest
    assert registry.find("toy-pairs/2")["tags"]["note"] == "second"
    assert registry.find("toy-pairs/2")["run_id"] == second.id

    assert registry.promote("toy-pairs", "2") == {"name": "toy-pairs", "version": "2", "alias": "champion", "before": "1"}
    assert registry.find("toy-pairs@champion")["version"] == registry.find("toy-pairs")["version"] == "2"
    assert "(before: version 2)" in done(here("rayward", "models", "promote", "toy-pairs", "1")).out  # and back
    assert registry.promote("toy-pairs", "3", alias="canary")["before"] is None
    assert registry.find("toy-pairs@champion")["version"] == "1"


def test_an_alias_goes_back_step_by_step(toy: Toy, own: Path) -> None:
    for version in ("2", "3"):
        with registry.run("job", {}) as run:
            assert registry.register(run, toy.pairs_model, "toy-pairs", {}) == version
    here("rayward", "models", "rollback", "toy-pairs").mistake("no version of toy-pairs is known to have had the alias champion before")
    for version in ("2", "2", "3"):  # twice the same is one promotion
        registry.promote("toy-pairs", version)
    assert "models:/toy-pairs@champion is version 2 again (was version 3)" in done(here("rayward", "models", "rollback", "toy-pairs")).out
    assert registry.find("toy-pairs@champion")["version"] == "2"
    assert registry.rollback("toy-pairs") == {"name": "toy-pairs", "version": "1", "alias": "champion", "before": "2"}
    with pytest.raises(RegistryError, match="before version 1"):
        registry.rollback("toy-pairs")
    here("rayward", "models", "rollback", "toy-pair").mistake("did you mean toy-pairs?")


def test_an_unpromoted_model_is_its_newest_version(toy: Toy, own: Path) -> None:
    with registry.run("job", {}) as run:
        registry.register(run, toy.steps_model, "toy-steps", {})
    assert registry.find("toy-steps")["version"] == "2"


def test_a_version_leads_back_to_data_labels_and_code(filled: Toy) -> None:
    row = registry.find("toy-pairs@champion")
    tags = row["tags"]
    assert tags["data_digest"] == open_dataset(filled.pairs).manifest.digest
    assert [v for n, v in tags.items() if n.endswith("label.choose")] == ["adjacent"]
    assert open_dataset(filled.answers).manifest.digest in tags.values()  # the rollouts the examples were made from
    assert tags["code_version"] == code_version()
    assert (tags["labeler"], tags["objective"], tags["base_model"]) == ("pairs", "bradley_terry", "tiny")
    assert row["params"]["train.lr"] == "0.002"
    [went_in] = client().get_run(row["run_id"]).inputs.dataset_inputs
    assert went_in.dataset.digest == tags["data_digest"]
    lines = [json.loads(line) for line in (filled.pairs_model.parent / "run" / "metrics.jsonl").read_text().splitlines()]
    assert history(row["run_id"], "loss") == [(line["step"], line["loss"]) for line in lines if "loss" in line]


def test_a_registered_model_is_trained_on_and_the_next_version_names_it(toy: Toy, own: Path, tmp_path: Path) -> None:
    small = [word for setting in ("render.max_length=160", "train.lr=1e-9", "batch.size=64") for word in ("--set", setting)]
    job: list[str | Path] = ["--examples", toy.pairs, "--validation-share", "0.1", "--register", "toy-pairs", *small]
    done(here("train_reward_model", *job, "--model", "models:/toy-pairs@champion", "--output", tmp_path / "second"))
    first, second = (load_file(folder / "model.safetensors") for folder in (toy.pairs_model, tmp_path / "second" / "model"))
    assert first.keys() == second.keys()
    assert all(torch.allclose(first[name], second[name], atol=1e-6) for name in first)  # it began with all of it, the head too
    registry.promote("toy-pairs", "2")  # the alias moves on, and what a version came from stays
    found = registry.find("toy-pairs@champion")
    assert found["version"] == "2"
    assert found["params"]["model"] == found["tags"]["base_model"] == "models:/toy-pairs/1"
    assert read_notes(tmp_path / "second" / "model")["base_model"] == "models:/toy-pairs/1"


def test_what_leads_back_to_a_model(toy: Toy, own: Path, at_home: Path) -> None:
    (at_home / "mine").mkdir()
    leads = {"models:/toy-pairs": "models:/toy-pairs/1", "models:/toy-pairs@champion": "models:/toy-pairs/1", "tiny": "tiny"}
    leads |= {"models:/toy-steps/1": "models:/toy-steps/1", "mine": str(at_home / "mine"), "org/on-the-hub": "org/on-the-hub"}
    assert {model: registry.pinned(model) for model in leads} == leads


def test_registered_files_hold_no_pickle(filled: Toy) -> None:
    files = [path for path in (filled.store / "artifacts").rglob("*") if path.is_file()]
    assert {"model.safetensors", "pyfunc.py", "MLmodel"} <= {path.name for path in files}
    assert [path for path in files if path.suffix in (".pkl", ".pickle", ".bin", ".pt", ".pth", ".joblib", ".pyc")] == []
    assert [path for path in files if path.read_bytes()[:1] == b"\x80"] == []  # how every pickle of protocol 2 and later begins


def test_a_registered_model_is_a_folder_again(filled: Toy) -> None:
    for reference in ("models:/toy-pairs", "models:/toy-pairs@champion", "models:/toy-pairs/1"):
        folder = registry.model_folder(reference)
        assert (folder / "model.safetensors").read_bytes() == (filled.pairs_model / "model.safetensors").read_bytes()
        assert registry.identity(reference)["model"] == "models:/toy-pairs/1"
    assert registry.model_folder("some/folder") == Path("some/folder")
    with pytest.raises(RegistryError, match="holds no model"):
        registry.identity(str(filled.answers))


# --------------------------------------------------------------------------------------------------------- where things are


def test_the_default_store_is_one_folder_and_the_working_directory_stays_clean(toy: Toy, store: Path, at_home: Path) -> None:
    with registry.run("job", SETTINGS, keep=store / "tracking.json") as run:
        run.metrics({"step": 1, "loss": 1.0})
        registry.register(run, toy.pairs_model, "mine", {})
    registry.model_folder("models:/mine")
    assert registry.tracking_uri() == f"sqlite:///{store / 'mlflow.db'}"
    assert sorted(p.name for p in store.iterdir()) == ["artifacts", "mlflow.db", "tracking.json"]
    assert list((store / "artifacts").rglob("model.safetensors"))
    assert list(at_home.iterdir()) == []
    assert "MLFLOW_TRACKING_URI" not in os.environ


def test_without_any_word_the_store_is_in_the_current_folder(at_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAYWARD_STORE", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert registry.tracking_uri() == f"sqlite:///{at_home / 'store' / 'mlflow.db'}"


def test_mlflow_tracking_uri_is_honoured(toy: Toy, store: Path, at_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = f"sqlite:///{at_home / 'else' / 'where.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", elsewhere)
    with registry.run("job", {}) as run:
        registry.register(run, toy.pairs_model, "mine", {})
    assert registry.tracking_uri() == os.environ["MLFLOW_TRACKING_URI"] == elsewhere
    assert [v.run_id for v in mlflow.MlflowClient(elsewhere).search_model_versions("name = 'mine'")] == [run.id]
    assert (registry.model_folder("models:/mine") / "model.safetensors").is_file()
    assert not store.exists()


def test_a_store_in_the_cloud_needs_a_server(at_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("s3fs", reason="needs the extra s3")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("RAYWARD_STORE", "s3://bucket/team")
    here("rayward", "models", "list").mistake("s3://bucket/team is no place for a database", "export MLFLOW_TRACKING_URI=http://HOST:5000")


@pytest.mark.slow  # an S3 server, and all that speaks to it
def test_artifacts_beside_a_database_go_to_the_store(at_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store on an S3 server, and a database elsewhere: no server of MLflow's in between."""
    for module in ("s3fs", "moto", "boto3"):
        pytest.importorskip(module, reason="needs the extra s3 and moto[server]")
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=free_port(), verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "hidden", "AWS_DEFAULT_REGION": "us-east-1"}
        for name, value in {**keys, "AWS_ENDPOINT_URL": f"http://{host}:{port}", "RAYWARD_STORE": "s3://team/store"}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{at_home / 'mlflow.db'}")
        urllib.request.urlopen(urllib.request.Request(f"http://{host}:{port}/team", method="PUT"), timeout=20)
        (at_home / "note.txt").write_text("kept")
        keep = places.at("store:job/tracking.json")
        with registry.run("job", {}, keep=keep) as run:
            run.artifact(at_home / "note.txt")
        with registry.run("job", {}, keep=keep) as again:
            assert again.id == run.id
        [kept] = [n for n in places.listing(places.at("store:artifacts"), deep=True) if n.endswith("note.txt")]
        assert places.read(places.at(f"store:artifacts/{kept}")) == b"kept"
    finally:
        server.stop()


# ------------------------------------------------------------------------------------------------ the model as others load it


def asked(toy: Toy) -> list[Rollout]:
    """A few answers to a few problems, of different lengths."""
    return rollouts_of(open_dataset(toy.answers).table())[:60:5]


def rows(rollouts: list[Rollout]) -> pd.DataFrame:
    return pd.DataFrame({"prompt": [r.prompt[-1].content for r in rollouts], "answer": [r.text for r in rollouts]})


@pytest.fixture(params=["pickle allowed", "pickle refused"])
def loaded(filled: Toy, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """toy-pairs as anybody loads it."""
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", str(request.param == "pickle allowed").lower())
    return mlflow.pyfunc.load_model("models:/toy-pairs@champion")


@pytest.fixture
def steps_model(filled: Toy) -> Any:
    return mlflow.pyfunc.load_model("models:/toy-steps/1")


def test_pyfunc_scores_as_the_trained_model_does(loaded: Any, toy: Toy) -> None:
    scorer, rollouts = Scorer.load(toy.pairs_model), asked(toy)
    expected = [score for [score] in scorer.score_rollouts(rollouts)]  # type: ignore[misc]
    assert max(expected) - min(expected) > 0.01  # they do differ
    found = loaded.predict(rows(rollouts))
    assert found["score"].tolist() == pytest.approx(expected, abs=1e-5)
    assert found["probability"].tolist() == pytest.approx([float(sigmoid(s / scorer.temperature)) for s in expected], abs=1e-5)
    assert found["step_scores"].tolist() == [[]] * len(rollouts)
    assert loaded.predict(rows(rollouts[3:4]))["score"].tolist() == pytest.approx(expected[3:4], abs=1e-5)  # company changes nothing


def test_pyfunc_scores_steps(steps_model: Any, toy: Toy) -> None:
    rollouts = asked(toy)
    expected = [list(score) for score in Scorer.load(toy.steps_model).score_rollouts(rollouts)]  # type: ignore[arg-type]
    table = pd.DataFrame({"prompt": [r.prompt[-1].content for r in rollouts], "steps": [list(r.steps) for r in rollouts]})
    found = steps_model.predict(table)
    assert [len(s) for s in found["step_scores"]] == [len(r.steps) for r in rollouts]
    for scores, right in zip(found["step_scores"], expected, strict=True):
        assert scores == pytest.approx(right, abs=1e-5)
    assert found["score"].tolist() == pytest.approx([e[-1] for e in expected], abs=1e-5)


def test_pyfunc_takes_a_plain_answer_where_steps_are_scored(steps_model: Any, toy: Toy) -> None:
    [rollout] = asked(toy)[:1]
    table = pd.DataFrame({"prompt": [rollout.prompt[-1].content] * 2, "answer": [rollout.text, None], "steps": [None, list(rollout.steps)]})
    found = steps_model.predict(table)
    assert found["score"][0] == pytest.approx(found["score"][1], abs=1e-5)


def test_pyfunc_reads_chat_messages_from_json(filled: Toy) -> None:
    model = mlflow.pyfunc.load_model("models:/toy-pairs@champion")
    chat = (Message("system", "keep the larger"), Message("user", "largest of 13 27 15 ?"))
    alone, answer = chat[1:], "13 and 27 keep 27\n27 and 15 keep 27\nA: 27"
    made = [Rollout(id=str(n), prompt=prompt, steps=(answer,)) for n, prompt in enumerate((chat, alone, alone))]
    expected = [score for [score] in Scorer.load(filled.pairs_model).score_rollouts(made)]  # type: ignore[misc]
    assert abs(expected[0] - expected[1]) > 1e-4  # the system message does tell
    prompts = [json.dumps([{"role": m.role, "content": m.content} for m in p]) for p in (chat, alone)] + [alone[0].content]
    found = model.predict(pd.DataFrame({"prompt": prompts, "answer": [answer] * 3}))
    assert found["score"].tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"answer": ""}, "empty"),
        ({"answer": "A: 1", "prompt": '[{"role": "systm", "content": "x"}]'}, "wrong role"),
        ({"answer": "so " * 500}, "too long"),
        ({"answer": None}, "answer"),
    ],
)
def test_pyfunc_names_the_row_that_cannot_be_scored(filled: Toy, row: dict[str, Any], said: str) -> None:
    model = mlflow.pyfunc.load_model("models:/toy-pairs@champion")
    good = {"prompt": "largest of 13 27 ?", "answer": "13 and 27 keep 27\nA: 27"}
    with pytest.raises(ValueError, match=f"row 2 cannot be scored: .*{said}"):
        model.predict(pd.DataFrame([good, good, {**good, **row}, good]))


def test_the_code_travels_with_the_model(filled: Toy, tmp_path: Path) -> None:
    """An interpreter without Rayward: isolated, and without the .pth files through which an editable install is found."""
    rollouts = asked(filled)
    rows(rollouts).to_json(tmp_path / "rows.json", orient="records")
    code = f"""
import sys
sys.path += {sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})!r}
try:
    import rayward.scoring
    sys.exit("Rayward is here: " + rayward.scoring.__file__)
except ImportError:
    sys.modules.pop("rayward", None)  # what a wheel's or an editable install's folder of scripts leaves behind
import json, mlflow, pandas
mlflow.set_tracking_uri({registry.tracking_uri()!r})
model = mlflow.pyfunc.load_model("models:/toy-pairs@champion")
scores = model.predict(pandas.read_json("rows.json", orient="records"))["score"].tolist()
import rayward
print(json.dumps([scores, rayward.__file__]))
"""
    ended = subprocess.run([sys.executable, "-I", "-S", "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0, ended.stderr
    scores, came_from = json.loads(ended.stdout.splitlines()[-1])
    assert scores == pytest.approx([s for [s] in Scorer.load(filled.pairs_model).score_rollouts(rollouts)], abs=1e-5)  # type: ignore[misc]
    assert Path(came_from).is_relative_to(filled.store)


# ------------------------------------------------------------------------------------------------------------------ servers


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


@contextmanager
def serving(*words: str, cwd: Path, ready: str, env: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A server in a process group of its own, once `ready` answers; ended whatever happens."""
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    log = cwd / "server.log"
    with log.open("wb") as file:
        server = subprocess.Popen(
            words, cwd=cwd, env={**os.environ, "PATH": path, **env}, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        until = time.monotonic() + 200
        while not answers(ready):
            assert server.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < until, log.read_text()[-3000:]
            time.sleep(0.3)
        yield server
    finally:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
            server.wait(20)
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)


def post(url: str, body: Any) -> tuple[int, str]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.mark.slow  # four server processes, each importing MLflow
def test_the_ui_shows_the_store(filled: Toy, tmp_path: Path) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with serving(RAYWARD, "ui", "--port", str(port), cwd=tmp_path, ready=url, env={}) as server:
        with urllib.request.urlopen(url, timeout=60) as page:
            assert "<html" in page.read().decode().lower()
        with urllib.request.urlopen(f"{url}/api/2.0/mlflow/registered-models/search", timeout=60) as answer:
            assert sorted(m["name"] for m in json.load(answer)["registered_models"]) == ["toy-pairs", "toy-steps"]
        assert f"{url}/#/models" in (tmp_path / "server.log").read_text()
        os.killpg(server.pid, signal.SIGINT)  # Ctrl-C ends it
        server.wait(60)
    assert [p.name for p in tmp_path.iterdir()] == ["server.log"]


@pytest.mark.slow
def test_scores_over_http_are_the_same(filled: Toy, tmp_path: Path) -> None:
    port, rollouts = free_port(), asked(filled)
    url = f"http://127.0.0.1:{port}"
    command = "models serve -m models:/toy-pairs@champion --env-manager local --host 127.0.0.1 --port"
    env = {"MLFLOW_TRACKING_URI": registry.tracking_uri()}
    with serving(sys.executable, "-m", "mlflow", *command.split(), str(port), cwd=tmp_path, ready=f"{url}/ping", env=env):
        table = rows(rollouts)
        split = {"columns": list(table), "data": table.to_numpy().tolist()}
        status, body = post(f"{url}/invocations", {"dataframe_split": split})
        assert status == 200, body
        scores = [row["score"] for row in json.loads(body)["predictions"]]
        assert scores == pytest.approx([s for [s] in Scorer.load(filled.pairs_model).score_rollouts(rollouts)], abs=1e-5)  # type: ignore[misc]
        status, body = post(f"{url}/invocations", {"dataframe_records": [{"prompt": "largest of 13 27 ?", "answer": ""}]})
        assert status >= 400
        assert "row 0 cannot be scored: empty" in body
