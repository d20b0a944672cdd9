"""What is planted in the environment and in addresses turns up nowhere; what comes from outside runs no code and stays in its folder.

Everything a store and its outputs hold is searched, Parquet files unpacked, databases byte by byte.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import gzip
import json
import pickle
import shutil
import sqlite3
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from chat_server import ChatServer, judge
from driving import Said, done, here
from rayward.errors import RegistryError, UserError
from rayward.registry import check_name
from rayward.scoring import Scorer
from rayward.storage import open_dataset

SECRETS = {  # environment variable -> what is planted in it
    "PLANTED_API_KEY": "sk-planted-4f1d77a0c3",
    "OPENAI_API_KEY": "sk-planted-9b20e6d1aa",
    "RAY_AUTH_TOKEN": "planted-ray-token-51c2e0",
    "AWS_ACCESS_KEY_ID": "AKIAPLANTED7Q2M0X",
    "AWS_SECRET_ACCESS_KEY": "planted/aws+secret-88dA31",
    "AWS_SESSION_TOKEN": "planted-aws-session-7e7e7e",
    "MLFLOW_TRACKING_PASSWORD": "planted-mlflow-password-d5",
    "HF_TOKEN": "hf_planted3Kd81mZ",
}
IN_ADDRESSES = {
    "http user": "planted-http-user",
    "http password": "planted-http-pw-1",
    "s3 key": "AKIAINURL55",
    "s3 secret": "s3inurlsecret66",
}
PLANTED = {**SECRETS, **IN_ADDRESSES}


class Ran(NamedTuple):
    """Where all of it lies, what was said, and the trained model."""

    base: Path
    said: list[Said]
    model: Path


class Files(SimpleHTTPRequestHandler):
    """Files of a folder over HTTP, silently, to whoever knows the name and the password."""

    def do_GET(self) -> None:
        word = f"{IN_ADDRESSES['http user']}:{IN_ADDRESSES['http password']}".encode()
        if self.headers.get("Authorization") == "Basic " + base64.b64encode(word).decode():
            super().do_GET()
        else:
            self.send_error(401)

    do_HEAD = do_GET

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A folder and its URL with a name and a password in it."""
    folder = tmp_path_factory.mktemp("served")
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Files, directory=str(folder)))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield folder, f"http://{IN_ADDRESSES['http user']}:{IN_ADDRESSES['http password']}@127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def rollouts(path: Path, ids: list[str]) -> Path:
    rows = [
        {"id": name, "prompt": f"what is {n // 2}?", "answer": f"it is {n % 2}", "rewards": {"r": float(n % 2)}}
        for n, name in enumerate(ids)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


TINY = ["net.width=16", "net.layers=1", "train.epochs=1", "batch.size=8", "render.max_length=160", "train.log_every=1"]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory, served: tuple[Path, str]) -> Ran:
    """From import to registry with all secrets in place, and a few commands that fail beside it."""
    base = tmp_path_factory.mktemp("planted")
    rollouts(served[0] / "rows.jsonl", [f"r{n}" for n in range(40)])
    with pytest.MonkeyPatch.context() as patch, ChatServer(judge(), key=SECRETS["PLANTED_API_KEY"]) as server:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("RAYWARD_STORE", str(base / "store"))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("AWS_MAX_ATTEMPTS", "1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        for name, value in SECRETS.items():
            patch.setenv(name, value)
        patch.chdir(base)
        asked = {"base_url": server.url, "model": "m", "api_key_env": "PLANTED_API_KEY"}
        ask = ["judge_pairs", "--source", base / "rollouts", "--engine", "local"]
        said = [done(here("import_rollouts", "--format", "rollouts", "--source", served[1] + "/rows.jsonl", "--output", base / "rollouts"))]
        said.append(done(here(*ask, "--output", base / "judged", "--set", f"judge_settings={json.dumps(asked)}")))
        said.append(done(here("label_pairs", "--source", base / "judged", "--output", base / "pairs")))
        sets = [word for setting in TINY for word in ("--set", setting)]
        job = ("--examples", base / "pairs", "--output", base / "job", "--register", "planted", "--validation-share", "0.2")
        said.append(done(here("train_reward_model", *job, *sets)))
        said.append(done(here("rayward", "models", "show", "planted")))
        said += failing(base, ask, asked, server, patch)
    return Ran(base, said, base / "job" / "model")


def failing(base: Path, ask: list[Any], asked: dict[str, Any], server: ChatServer, patch: pytest.MonkeyPatch) -> list[Said]:
    """What is said where things go wrong: a server that repeats the key, a store and addresses that cannot be reached."""
    server.faults = ["echo key"] * 100
    said = [here(*ask, "--output", base / "refused", "--set", f"judge_settings={json.dumps(asked)}")]
    for source in (
        f"s3://{IN_ADDRESSES['s3 key']}:{IN_ADDRESSES['s3 secret']}@bucket/rows.jsonl?endpoint_override=http://127.0.0.1:9&scheme=http",
        f"http://{IN_ADDRESSES['http user']}:{IN_ADDRESSES['http password']}@127.0.0.1:9/rows.jsonl",
    ):
        said.append(here("import_rollouts", "--format", "rollouts", "--source", source, "--output", base / "failed"))
    patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    patch.setenv("MLFLOW_TRACKING_URI", f"http://{IN_ADDRESSES['http user']}:{IN_ADDRESSES['http password']}@127.0.0.1:9")
    said.append(here("rayward", "models", "list"))
    assert [s.code for s in said] == [2] * len(said), said
    return said


def contents(base: Path) -> Iterator[tuple[Path, bytes]]:
    """Every file below a folder, unpacked where it is packed."""
    for path in sorted(base.rglob("*")):
        if path.is_file():
            yield path, path.read_bytes()
            if path.suffix == ".parquet":
                table = pq.read_table(path)
                yield path, json.dumps(table.to_pylist(), default=repr, ensure_ascii=False).encode() + repr(table.schema.metadata).encode()
            elif path.suffix == ".gz":
                yield path, gzip.decompress(path.read_bytes())


def forms(secret: str) -> list[bytes]:
    """A secret as it is, and as the middle of what an Authorization header makes of it."""
    return [secret.encode(), *(base64.b64encode(b"x" * n + secret.encode() + b"xx")[4:-8] for n in range(3))]


def holding(base: Path, secret: str) -> list[Path]:
    return [path for path, content in contents(base) if any(form in content for form in forms(secret))]


def test_the_search_finds_what_it_looks_for(tmp_path: Path) -> None:
    secret = PLANTED["PLANTED_API_KEY"]
    (tmp_path / "plain.json").write_text(json.dumps({"key": secret}))
    (tmp_path / "header.txt").write_text("Basic " + base64.b64encode(f"someone:{secret}:more".encode()).decode())
    pq.write_table(pa.table({"a": [{"b": secret * 50}]}), tmp_path / "part.parquet", compression="zstd")
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(secret.encode()))
    with sqlite3.connect(tmp_path / "base.db") as base:
        base.execute("create table t (x text)")
        base.execute("insert into t values (?)", (secret,))
    base.close()
    assert {path.name for path in holding(tmp_path, secret)} == {"plain.json", "header.txt", "part.parquet", "rows.jsonl.gz", "base.db"}


@pytest.mark.parametrize("name", PLANTED)
def test_a_secret_is_in_no_file(ran: Ran, name: str) -> None:
    assert holding(ran.base, PLANTED[name]) == []


@pytest.mark.parametrize("name", PLANTED)
def test_a_secret_is_in_nothing_that_is_said(ran: Ran, name: str) -> None:
    said = "".join(s.out + s.err for s in ran.said).encode()
    assert said
    assert not [form for form in forms(PLANTED[name]) if form in said]


def test_all_that_is_searched_is_there(ran: Ran) -> None:
    assert len(open_dataset(ran.base / "rollouts").table()) == 40
    assert (ran.base / "store" / "mlflow.db").stat().st_size > 10_000
    assert (ran.model / "model.safetensors").is_file()
    assert len({path.suffix for path, _ in contents(ran.base)}) > 4


# ------------------------------------------------------------------------------------------------------------------- code


class Payload:
    """A pickle that leaves a mark where it is opened."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> Any:
        return (Path.touch, (self.mark,))


LOADERS = {
    "train": lambda model, out: here("train_reward_model", "--examples", model.parent / "pairs", "--model", model, "--output", out),
    "evaluate": lambda model, out: here("evaluate_model", "--model", model, "--examples", model.parent / "pairs", "--output", out),
    "score": lambda model, out: here(
        "score_rollouts", "--model", model, "--source", model.parent / "rollouts", "--output", out, "--engine", "local"
    ),
    "sample": lambda model, out: here(
        *("sample_rollouts", "--problems", "toy:2", "--output", out, "--engine", "local", "--set", "sample.policy=transformers"),
        *("--set", f"sample.policy_settings={json.dumps({'model': str(model)})}"),
    ),
}


@pytest.fixture
def copied(ran: Ran, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the trained model that may be spoilt."""
    monkeypatch.setenv("RAYWARD_STORE", str(ran.base / "store"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    copy = ran.base / "other" / "model"
    shutil.copytree(ran.model, copy)
    for name in ("pairs", "rollouts"):
        (copy.parent / name).symlink_to(ran.base / name)
    yield copy
    shutil.rmtree(copy.parent)


def spoil_weights(model: Path, mark: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(mark)))


def bring_code(model: Path, mark: Path) -> None:
    """A body of a kind of its own, whose code lies beside it."""
    (model / "brought.py").write_text(f"import pathlib\npathlib.Path({str(mark)!r}).touch()\nclass C: pass\nclass M: pass\nclass T: pass\n")
    config = json.loads((model / "config.json").read_text())
    autos = {"AutoConfig": "brought.C", "AutoModelForSequenceClassification": "brought.M", "AutoModelForCausalLM": "brought.M"}
    (model / "config.json").write_text(json.dumps({**config, "model_type": "brought", "auto_map": autos}))
    words = json.loads((model / "tokenizer_config.json").read_text())
    brought = {"tokenizer_class": "Brought", "auto_map": {"AutoTokenizer": ["brought.T", None]}}
    (model / "tokenizer_config.json").write_text(json.dumps({**words, **brought}))


@pytest.mark.parametrize("spoil", [spoil_weights, bring_code])
@pytest.mark.parametrize("loader", LOADERS)
def test_a_model_that_brings_a_pickle_or_code_is_refused_and_runs_nothing(copied: Path, tmp_path: Path, loader: str, spoil: Any) -> None:
    mark = tmp_path / "it-ran"
    spoil(copied, mark)
    said = LOADERS[loader](copied, tmp_path / "out")
    assert not mark.exists()
    said.mistake("-> ")
    assert str(copied) in said.err


def test_the_payloads_would_leave_their_mark(copied: Path, tmp_path: Path) -> None:
    spoil_weights(copied, tmp_path / "a")
    pickle.loads((copied / "pytorch_model.bin").read_bytes())
    assert (tmp_path / "a").exists()
    bring_code(copied, tmp_path / "b")
    with contextlib.suppress(UserError, AttributeError):  # the code is no model, but it was run
        Scorer.load(copied, trust_remote_code=True)
    assert (tmp_path / "b").exists()


# ------------------------------------------------------------------------------------------------------------------ paths

HOSTILE = ["../../escaped", "/tmp/escaped", "a/../../../escaped", "..", "con\x00trol", "~/escaped", "$HOME/escaped", "esc\naped"]


def listed(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_names_from_data_are_names_and_no_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = tmp_path / "a" / "b" / "c"
    inside.mkdir(parents=True)
    monkeypatch.chdir(inside)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    rows = [
        {"id": name, "prompt": f"p{n // 2}", "answer": f"{name} {n}", "rewards": {name: n % 2, "r": n % 2}}
        for n, name in enumerate(HOSTILE)
    ]
    (inside / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done(here("import_rollouts", "--format", "rollouts", "--source", "rows.jsonl", "--output", "rollouts"))
    for script in ("label_pairs", "label_attributes", "label_outcomes"):
        here(script, "--source", "rollouts", "--output", script, "--engine", "local")
    done(here("split_examples", "--source", "rollouts", "--output", "split", "--engine", "local"))
    tops = {"rows.jsonl", "rollouts", "label_pairs", "label_attributes", "label_outcomes", "split"}
    assert {name.split("/")[0].removeprefix(".").partition(".partial")[0] for name in listed(inside)} <= tops | {"rows.jsonl"}
    assert {name.split("/")[0] for name in listed(tmp_path)} == {"a"}
    assert not [name for name in listed(inside) if "escaped" in name]
    assert len(open_dataset(inside / "rollouts").table()) + len(open_dataset(inside / "rollouts").rejects()) == len(HOSTILE)


def test_a_name_within_an_archive_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    plain = rollouts(tmp_path / "plain.jsonl", ["a", "b"]).read_bytes()
    with open(folder / "rows.jsonl.gz", "wb") as raw, gzip.GzipFile("../../escaped.jsonl", "wb", fileobj=raw) as packed:
        packed.write(plain)
    done(here("import_rollouts", "--format", "rollouts", "--source", folder, "--output", tmp_path / "out"))
    assert len(open_dataset(tmp_path / "out").table()) == 2
    assert not [name for name in listed(tmp_path) if "escaped" in name]


@pytest.mark.parametrize("name", ["rows.zip", "rows.tar", "rows.tar.gz", "rows.jsonl.pkl", "rows.pt", "rows.npy"])
def test_archives_with_members_and_pickles_are_not_opened(tmp_path: Path, name: str) -> None:
    mark = tmp_path / "it-ran"
    (tmp_path / name).write_bytes(pickle.dumps(Payload(mark)))
    here("import_rollouts", "--source", tmp_path / name, "--output", tmp_path / "out").mistake("is not a kind of file this reads", ".jsonl")
    assert not mark.exists()


@pytest.mark.parametrize("name", ["..", "../escaped", "a/b", "a/../b", "/etc/passwd", "a\nb", "a'; drop table", "models:/x", "a\\b"])
def test_a_model_is_registered_under_a_name_and_no_path(name: str) -> None:
    with pytest.raises(RegistryError, match="is no name for a model"):
        check_name(name)


@pytest.mark.parametrize("word", ["store:../escaped", "store:a/../../escaped", "store:/etc"])
def test_what_lies_below_the_store_stays_there(word: str) -> None:
    from rayward import places

    with pytest.raises(UserError, match="leads out of the store"):
        places.at(word)
