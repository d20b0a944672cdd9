"""`rayward submit` and `rayward jobs`, against a real cluster on loopback whose dashboard asks for a token."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

from driving import RAYWARD, ROOT, Said, done, rayward
from rayward import cli
from rayward.cluster import jobs, shipping
from rayward.cluster.dashboard import Address, _get, check_url, find_address, reach
from rayward.cluster.jobs import Request
from rayward.errors import SettingsError

SECRET = "planted-5ecret"
TOKEN = "0123456789abcdef0123456789abcdef"  # of the cluster of these tests
ELSEWHERE = {"here": False, "package": {}, "code_version": "0.1.0+ab", "resolved": {}}
SCRIPT = '''"""Count, and say what the job sees."""
import os, sys, time
import beside
print(beside.WORD, *sys.argv[1:], flush=True)
print("seen", os.environ.get("RAYWARD_SUBMISSION_ID"), bool(os.environ.get("RAY_ADDRESS")), os.environ.get("RAYWARD_STORE"), flush=True)
print("secret of", len(os.environ.get("PLANTED", "")), flush=True)
if "sleep" in sys.argv:
    try:
        time.sleep(200)
    except KeyboardInterrupt:
        print("put away", flush=True)
sys.exit(int(sys.argv[1]))
'''


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A script of the user's own in a folder of its own, with a module beside it; the working folder."""
    (tmp_path / "mine.py").write_text(SCRIPT)
    (tmp_path / "beside.py").write_text("WORD = 'first'\n")
    for name in (*jobs.TRAVEL, "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "mine.py"


# ----------------------------------------------------------------------------------------------------------------- addresses


@pytest.mark.parametrize(
    ("address", "way_out"),
    [
        ("10.0.0.1:6379", "http://10.0.0.1:8265"),
        ("head", "http://head:8265"),
        ("head:8265", "write http://head:8265"),
        ("ray://head:10001", "http://head:8265"),
        ("auto", "http://127.0.0.1:8265"),
        ("http://", "http://"),
        ("http://:8265", "http://HOST"),
        ("http://head:port", "http://HOST"),
        ("[fd00::2]:6379", "http://[fd00::2]:8265"),
        (f"ray://me:{SECRET}@head:10001", "http://head:8265"),
        (f"http://me:{SECRET}@head:8265", "RAY_AUTH_TOKEN"),
    ],
)
def test_an_address_that_is_no_dashboard_is_explained(address: str, way_out: str) -> None:
    with pytest.raises(SettingsError) as error:
        check_url(address, "RAY_ADDRESS")
    assert way_out in error.value.way_out
    assert SECRET not in str(error.value)


def test_a_cluster_is_said_or_in_the_environment_or_in_the_launchers_file(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match="which cluster"):
        find_address()
    Path("cluster.yaml").touch()
    assert find_address() == Address(launcher_file="cluster.yaml")
    assert find_address(cluster_file="my other.yaml") == Address(launcher_file="my other.yaml", options=" --cluster 'my other.yaml'")
    monkeypatch.setenv("RAY_ADDRESS", "http://env:8265")
    assert find_address() == Address("http://env:8265")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://[fd00::2]:8265")
    assert find_address() == Address("http://[fd00::2]:8265")
    assert find_address("https://said:1/") == Address("https://said:1", options=" --address https://said:1")
    with pytest.raises(SettingsError, match="two ways"):
        find_address("https://said:1/", "cluster.yaml")


SSH = '''#!{python}
"""A stand-in for ssh: no machine to log in to is here. It refuses, or carries its one -L to a port of this machine."""
import socket, sys, threading
words = sys.argv[1:]
if "refused@10.1.2.3" in words:
    sys.exit("refused@10.1.2.3: Permission denied (publickey).")
listens = socket.create_server(("127.0.0.1", int(words[words.index("-L") + 1].split(":")[0])))

def carry(one, other):
    while data := one.recv(65536):
        other.sendall(data)
    other.close()

while True:
    near, far = listens.accept()[0], socket.create_connection(("127.0.0.1", {port}))
    for pair in ((near, far), (far, near)):
        threading.Thread(target=carry, args=pair, daemon=True).start()
'''


def launcher_file(user: str) -> str:
    Path(f"{user}.yaml").write_text(
        f"cluster_name: c\nprovider: {{type: local, head_ip: 10.1.2.3, worker_ips: []}}\nauth: {{ssh_user: {user}, ssh_private_key: ~/k}}\n"
    )
    return f"{user}.yaml"


def test_a_launchers_file_that_leads_nowhere_says_what_to_run(mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("empty.yaml").write_text("rows: 3\n")
    for file in ("empty.yaml", "missing.yaml"):
        with pytest.raises(SettingsError, match=re.escape(file)):
            reach(cluster_file=file)
    put_ssh(tmp_path, 9, monkeypatch)
    with pytest.raises(SettingsError, match="Permission denied") as error:
        reach(cluster_file=launcher_file("refused"))
    assert "ssh -N -o ExitOnForwardFailure=yes -L 8265:127.0.0.1:8265 -i" in error.value.way_out
    assert "and then --address http://127.0.0.1:8265" in error.value.way_out


def put_ssh(folder: Path, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "bin").mkdir()
    (folder / "bin" / "ssh").write_text(SSH.format(python=sys.executable, port=port))
    (folder / "bin" / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")


# -------------------------------------------------------------------------------------------------------- what a cluster sees


def describe(script: Path, *words: str, request: Request | None = None, **over: Any) -> jobs.Job:
    return jobs.describe(script, words, request or Request(), **{**ELSEWHERE, **over})


@pytest.mark.parametrize(
    ("words", "refused"),
    [
        ("--source s3://bucket/rows --output s3://bucket/out", ""),
        ("--source store:rows --output store:out", ""),
        ("--model Qwen/Qwen3-0.6B-Base --problems toy:40", ""),
        ("--source /data/on/the/cluster", ""),
        ("--source SHARED/rows --output SHARED/out", ""),
        ("--source rows", "--source rows"),
        ("--source=rows", "--source rows"),
        ("--set a.b=rows", "--a.b rows"),
        ("--sources hh=rows,s3://b/x", "--sources rows"),
        ("--source file:///etc", "--source file:///etc"),
        ("rows", "argument rows"),
        ("--output store/out", "--output store/out"),
        ("--output /data/out", "--output /data/out"),
        ("--source SHARED/../rows", "rows"),
        ("--config local.yaml", "--source rows"),
        ("--config cloud.yaml", ""),
        (f"--source s3://KEY:{SECRET}@bucket/rows", "--env"),
        (f"--set url=https://me:{SECRET}@host/", "--env"),
    ],
)
def test_what_only_this_machine_has_is_refused_before_anything_is_sent(mine: Path, words: str, refused: str) -> None:
    for folder in ("rows", "nfs/rows"):
        Path(folder).mkdir(parents=True)
    Path("local.yaml").write_text("source: rows\n")
    Path("cloud.yaml").write_text("source: s3://bucket/rows\n")
    given = words.replace("SHARED", str(mine.parent / "nfs")).split()
    request = Request(shared=(Path("nfs"),))
    if not refused:
        assert describe(mine, *given, request=request).folder == ""
        return
    with pytest.raises(SettingsError) as error:
        describe(mine, *given, request=request)
    assert refused in str(error.value)
    assert error.value.way_out
    assert SECRET not in str(error.value)
    if SECRET not in words:
        describe(mine, *given, request=request, here=True)  # on this machine it means what it means


@pytest.mark.parametrize("name", ["output", "log"])
def test_what_a_script_makes_by_default_is_looked_at_too(mine: Path, name: str) -> None:
    with pytest.raises(SettingsError, match=f"--{name} store/made would be made"):
        describe(mine, resolved={name: "store/made"})


def test_a_store_that_nobody_names_is_an_error_there_and_not_a_folder_that_is_lost(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shell = describe(mine, resolved={"output": "store:quickstart"}).entrypoint()
    plain = {name: value for name, value in os.environ.items() if name != "RAYWARD_STORE"}
    said = subprocess.run(["sh", "-c", shell], env=plain, capture_output=True, text=True)
    assert (said.returncode, said.stdout) == (2, "")
    assert "export RAYWARD_STORE" in said.stderr
    there = subprocess.run(
        ["sh", "-c", shell.replace("exec python", "echo")], env={**plain, "RAYWARD_STORE": "s3://b/p"}, capture_output=True
    )
    assert there.stdout == b"mine.py\n"
    monkeypatch.setenv("RAYWARD_STORE", "s3://bucket/store")
    assert not describe(mine, resolved={"output": "store:quickstart"}).needs_store


def test_two_files_of_one_name_are_refused(mine: Path) -> None:
    for folder in ("a", "b"):
        (mine.parent / folder).mkdir()
        (mine.parent / folder / "util.py").write_text(folder)
    with pytest.raises(SettingsError, match=r"both be sent as util\.py"):
        describe(mine, request=Request(ship=(Path("a/util.py"), Path("b/util.py"))))


def test_a_link_is_sent_under_its_own_name(mine: Path) -> None:
    (mine.parent / "beside.py").rename(mine.parent / "beside_v2.py")
    (mine.parent / "beside.py").symlink_to("beside_v2.py")
    assert sorted(describe(mine).files) == ["beside.py", "mine.py"]


@pytest.mark.parametrize("name", [f"PLANTED={SECRET}", "NOT_THERE", "BASH_FUNC_f%%"])
def test_a_variable_that_cannot_be_sent_is_refused(mine: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("BASH_FUNC_f%%", "() { :; }")
    with pytest.raises(SettingsError, match="--env") as error:
        describe(mine, request=Request(env=(name,)))
    assert SECRET not in str(error.value)


@pytest.mark.parametrize(
    ("name", "value", "refused"),
    [
        ("RAYWARD_STORE", "store", True),
        ("RAYWARD_STORE", "s3://bucket/store", False),
        ("MLFLOW_TRACKING_URI", "http://mlflow.internal:5000", False),
        ("MLFLOW_TRACKING_URI", "http://localhost:5000", True),
        ("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000", True),
        ("MLFLOW_TRACKING_URI", "sqlite:////tmp/mlflow.db", True),
        ("MLFLOW_TRACKING_URI", "mlruns", True),
    ],
)
def test_a_store_the_cluster_cannot_reach_is_refused(
    mine: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, refused: bool
) -> None:
    monkeypatch.setenv(name, value)
    if refused:
        with pytest.raises(SettingsError, match=name):
            describe(mine)
    else:
        assert describe(mine).visible[name] == value


def test_here_relative_names_mean_what_they_mean_here(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///runs.db")
    job = describe(mine, "--output", "o", here=True)
    assert job.visible["RAYWARD_STORE"] == str(mine.parent / "store")
    assert job.visible["MLFLOW_TRACKING_URI"] == f"sqlite:///{mine.parent / 'runs.db'}"
    assert job.folder == str(mine.parent)
    assert job.python == sys.executable
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert describe(mine).python == "python"


# ------------------------------------------------------------------------------------------------------------- what is sent


def test_what_is_sent_is_the_script_what_it_imports_and_its_files(mine: Path) -> None:
    (mine.parent / "sub" / "__pycache__").mkdir(parents=True)
    (mine.parent / "sub" / "__init__.py").write_text("import third\n")
    (mine.parent / "sub" / "__pycache__" / "x.pyc").write_text("")
    (mine.parent / "third.py").write_text("import torch, mine\n")
    (mine.parent / "unused.py").write_text("")
    mine.write_text("from sub import y\nimport os\n")
    (mine.parent / "a.yaml").write_text("{}\n")
    job = describe(mine, "--config=a.yaml", "--x", "it's", request=Request(ship=(Path("unused.py"),)))
    assert sorted(job.files) == ["configs/0/a.yaml", "mine.py", "sub/__init__.py", "third.py", "unused.py"]
    assert job.entrypoint() == "exec python mine.py --config configs/0/a.yaml --x 'it'\"'\"'s'"


def test_the_package_travels_without_what_lies_around_it() -> None:
    from rayward.cli.jobs import _package

    names = set(_package(cli.script_folders()))
    assert {"rayward/__init__.py", "rayward/report.html.jinja", "rayward/scripts/pipelines/label_pairs.py"} <= names
    assert not [name for name in names if re.search(r"__pycache__|\.git|\.venv|/store/", name)]


def test_too_much_is_refused_and_named(mine: Path) -> None:
    (mine.parent / "data").mkdir()
    with open(mine.parent / "data" / "weights.bin", "wb") as file:
        file.truncate(shipping.MOST_BYTES + 1)
    with pytest.raises(SettingsError, match=r"data/weights\.bin"):
        describe(mine, request=Request(ship=(Path("data"),)))


def test_a_job_is_called_after_what_it_does(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (mine.parent / "a.yaml").write_text("x: 1\n")
    words = ("--config", "a.yaml")
    names = [describe(mine, *words).name, describe(mine, *words, request=Request(cpus=1)).name]
    assert re.fullmatch(r"mine-[0-9a-f]{8}", names[0])
    assert names[0] == names[1]
    (mine.parent / "a.yaml").write_text("x: 2\n")
    names = [names[0], describe(mine, *words).name]
    names.append(describe(mine, *words, "--y").name)
    monkeypatch.setenv("RAYWARD_STORE", "s3://bucket/store")
    names.append(describe(mine, *words).name)
    monkeypatch.setenv("RAYWARD_STORE", f"s3://KEY:{SECRET}@bucket/store")
    assert describe(mine, *words).name == names[-1]  # who may read it is no part of what it does
    (mine.parent / "beside.py").write_text("WORD = 'second'\n")
    names.append(describe(mine, *words).name)
    assert len(set(names)) == len(names)


def test_private_variables_come_back_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    value = 'it\'s "a" secret = $HOME\nof two lines \\ '
    shipping.pack(tmp_path, {}, {"PLANTED": value})
    assert (tmp_path / shipping.PRIVATE).stat().st_mode & 0o077 == 0
    shell = subprocess.run(["sh", "-c", f'. ./{shipping.PRIVATE} && printf %s "$PLANTED"'], cwd=tmp_path, capture_output=True, text=True)
    assert shell.stdout == value
    monkeypatch.delenv("PLANTED", raising=False)
    monkeypatch.setenv("PYTHONPATH", f"/nowhere:{tmp_path}")
    shipping.take_environment()
    assert os.environ.pop("PLANTED") == value


@pytest.mark.parametrize("pieces", [["a\nb", "\nc"], ["a\n", "b\nc\n"], ["a\nb\nc"]])
def test_a_log_that_comes_again_is_said_once(pieces: list[str]) -> None:
    lines: list[str] = []
    log = jobs._Log(lines.append)
    first = "2026-01-01 INFO job_manager.py:5 -- Runtime env is setting up.\nRunning entrypoint for job x: y\n"
    for piece in (first, *pieces[:1]):
        log.take(piece)
    log.restart()
    for piece in (first, *pieces):
        log.take(piece)
    log.end()
    assert lines == ["a", "b", "c"]


# ------------------------------------------------------------------------------------------------------------ a real cluster


class Head(NamedTuple):
    """A cluster of one node with two CPUs on this machine, and what a command needs in its environment to reach it."""

    url: str
    env: dict[str, str]
    folder: Path  # of the session: logs

    def rayward(self, *words: str, env: Mapping[str, str] | None = None) -> Said:
        return rayward(*words, cwd=Path.cwd(), env={**self.env, **(env or {})})


def free_ports(number: int) -> list[int]:
    """Ports of this machine that nobody listens on."""
    sockets = [socket.socket() for _ in range(number)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def end_session(leader: int) -> None:
    """End a process and all of its session at once: nothing of such a cluster has to be put away."""
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.getsid(int(entry.name)) == leader:
                os.kill(int(entry.name), signal.SIGKILL)


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """`ray start --head` with a dashboard that asks for a token, ended with all its processes."""
    base = Path(tempfile.mkdtemp(prefix="sub", dir="/tmp"))  # short: the paths of its sockets are limited
    names = ("port", "dashboard-port", "ray-client-server-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port")
    names += ("runtime-env-agent-port", "metrics-export-port", "node-manager-port", "object-manager-port")
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--num-cpus", "2", "--object-store-memory"]
    command += [
        "80000000",
        "--dashboard-host",
        "127.0.0.1",
        "--temp-dir",
        str(base),
        "--include-dashboard",
        "true",
        "--min-worker-port",
        "0",
    ]
    command += ["--max-worker-port", "0", *(w for name, port in ports.items() for w in (f"--{name}", str(port)))]
    env = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "HOME": str(base), "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "RAYWARD_", "MLFLOW_"))}
    with open(base / "head.log", "wb") as log:
        process = subprocess.Popen(command, env={**plain, **env}, stdout=log, stderr=log, start_new_session=True)
    url = f"http://127.0.0.1:{ports['dashboard-port']}"
    asking = {"RAY_AUTH_TOKEN": TOKEN, "HOME": str(base), "RAY_ADDRESS": url, "RAY_AUTH_MODE": "", "PYTHONPATH": ""}
    try:
        until = time.monotonic() + 150
        while time.monotonic() < until and process.poll() is None:
            with contextlib.suppress(OSError, ValueError, KeyError):
                if len((_get(url, "/nodes?view=summary", {"authorization": f"Bearer {TOKEN}"}).get("data") or {})["summary"]) == 1:
                    break
            time.sleep(0.5)
        else:
            pytest.fail(f"the cluster of these tests did not start: {(base / 'head.log').read_text(errors='replace')[-2000:]}")
        yield Head(url, asking, base)
    finally:
        end_session(process.pid)
        process.wait(30)
        shutil.rmtree(base, ignore_errors=True)


def test_a_script_runs_there_as_it_would_here(mine: Path, head: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way, once: sent, followed, its exit code, and nothing of what it was given in secret where somebody looks."""
    monkeypatch.setenv("PLANTED", SECRET)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"https://me:{SECRET}@mlflow.internal")
    said = head.rayward("submit", "--env", "PLANTED", "mine.py", "3", "--name", "it's")
    job_id = said.err.split()[0]
    assert said.out.splitlines() == [
        "first 3 --name it's",
        f"seen {job_id} True {mine.parent / 'store'}",
        f"secret of {len(SECRET)}",
    ]
    assert said.code == 3, said.err
    assert f"{job_id} failed with exit code 3" in said.err
    row = json.loads(done(head.rayward("jobs", "status", "mine", "--json")).out)
    assert (row["id"], row["state"], row["exit_code"], row["metadata"]["env"]) == (job_id, "failed", 3, "PLANTED")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in head.env.items():
            patch.setenv(name, value)
        target = reach()
    assert jobs.log(target, job_id) == said.out
    whole = target.client.get_job_info(job_id)
    assert SECRET not in str(whole) + said.err + json.dumps(row)
    logs = [path for path in head.folder.glob("session_2*/logs/**/*") if path.is_file()]
    assert logs
    assert not [path.name for path in logs if SECRET in path.read_text(errors="replace") or TOKEN in path.read_text(errors="replace")]


def test_what_stands_in_the_way_is_said(mine: Path, head: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in head.env.items():
        monkeypatch.setenv(name, value)
    for env, words, said in (
        ({"RAY_AUTH_TOKEN": "wrong"}, "", "does not accept the token"),
        ({"RAY_AUTH_TOKEN": "", "HOME": "/nowhere"}, "", "RAY_AUTH_TOKEN_PATH"),
        ({"RAY_AUTH_MODE": "disabled"}, "", "asks for a token"),
        ({"RAY_AUTH_TOKEN": "", "RAY_AUTH_TOKEN_PATH": "/nowhere/token"}, "", "cannot be read"),
        ({}, head.url.replace("http:", "https:"), "speaks http"),
        ({}, f"http://127.0.0.1:{free_ports(1)[0]}", "no Ray cluster answers"),
    ):
        with monkeypatch.context() as patch:
            for name, value in env.items():
                patch.setenv(name, value)
            with pytest.raises(SettingsError) as error:
                reach(words)
            assert said in str(error.value)
            assert TOKEN not in str(error.value)
    target = reach()
    assert target.here
    assert target.room(CPU=2)
    assert not target.room(CPU=3)
    for job_id in ("mien", ""):
        with pytest.raises(SettingsError, match=f"no job '{job_id}'"):
            jobs.find(target, job_id)
    assert not target.autoscaling()
    for ask in (
        lambda: jobs.stop(target, "gone-1"),
        lambda: jobs.log(target, "gone-1"),
        lambda: jobs.follow(target, "gone-1", print, print),
    ):
        with pytest.raises(SettingsError, match="does not know gone-1"):
            ask()


def test_a_launchers_file_is_reached_through_ssh(mine: Path, head: Head, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The token of this cluster goes through the tunnel, and the tunnel ends with the command."""
    put_ssh(tmp_path, int(head.url.rpartition(":")[2]), monkeypatch)
    said = head.rayward("jobs", "list", "--json", "--cluster", launcher_file("me"), env={"HTTP_PROXY": "http://127.0.0.1:9"})
    assert isinstance(json.loads(done(said).out), list)
    assert said.err == ""
    left = [path for path in Path("/proc").glob("[0-9]*/cmdline") if str(tmp_path / "bin" / "ssh").encode() in read(path)]
    assert left == []


def read(path: Path) -> bytes:
    """All of a file, nothing of one that is gone."""
    try:
        return path.read_bytes()
    except OSError:
        return b""


@contextlib.contextmanager
def broken_dashboard() -> Iterator[str]:
    """A dashboard whose version answers and whose jobs fail."""

    class Broken(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            works = {"/api/version": {"ray_version": "2.60.0", "version": "4"}, "/nodes?view=summary": {"data": {"summary": []}}}
            self.send_response(200 if self.path in works else 500)
            self.end_headers()
            self.wfile.write(json.dumps(works.get(self.path)).encode() if self.path in works else b"the head is out of memory")

        do_POST = do_PUT = do_GET

        def log_message(self, *_: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Broken) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_a_dashboard_that_fails_is_one_message(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    with broken_dashboard() as url:
        target = reach(url)
        for ask in (lambda: jobs.listed(target), lambda: jobs.send(target, describe(mine)), lambda: jobs.stop(target, "x-1")):
            with pytest.raises(SettingsError, match="500") as error:
                ask()
            assert "rayward jobs list --address" in error.value.way_out


@pytest.mark.parametrize(
    ("status", "exit_code", "code"), [("SUCCEEDED", 0, 0), ("FAILED", 3, 3), ("FAILED", 0, 1), ("FAILED", None, 1), ("STOPPED", None, 130)]
)
def test_the_exit_code_of_a_job_that_failed_is_never_zero(status: str, exit_code: int | None, code: int) -> None:
    info = SimpleNamespace(
        submission_id="a-1", status=status, driver_exit_code=exit_code, start_time=1, end_time=2, message=f"at s3://K:{SECRET}@b"
    )
    assert jobs.verdict(info, "look")[0] == code
    assert SECRET not in jobs.verdict(info, "look")[1]


def test_a_token_in_the_clear_is_said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    monkeypatch.setattr("rayward.cluster.dashboard.ANSWER_S", 0.2)
    with pytest.raises(SettingsError, match="no Ray cluster answers"):
        reach("http://192.0.2.1:8265")
    said = capsys.readouterr().err
    assert "unencrypted to http://192.0.2.1:8265" in said
    assert TOKEN not in said


def test_run_says_that_a_dashboard_is_not_where_programs_join(monkeypatch: pytest.MonkeyPatch) -> None:
    from rayward import cluster

    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    with pytest.raises(SettingsError, match="programs do not join") as error, cluster.connect():
        pass
    assert "rayward submit" in error.value.way_out


# ----------------------------------------------------------------------------------------------------------- a real cluster, slow


@pytest.mark.slow
def test_the_same_command_attaches_detaches_stops_and_is_sent_again(mine: Path, head: Head) -> None:
    first = done(head.rayward("submit", "--no-wait", "mine.py", "0", "sleep"))
    job_id = first.out.strip()
    assert f"rayward jobs logs {job_id} -f" in first.err
    watching = subprocess.Popen(
        [RAYWARD, "submit", "mine.py", "0", "sleep"],
        env={**os.environ, **head.env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert watching.stdout is not None
    assert watching.stdout.readline() == "first 0 sleep\n"
    watching.send_signal(signal.SIGINT)
    _, err = watching.communicate(timeout=30)
    assert watching.returncode == 130
    assert f"{job_id} is the same command" in err
    assert f"rayward jobs stop {job_id}" in err
    assert json.loads(head.rayward("jobs", "status", job_id, "--json").out)["state"] == "running"
    assert "the same command goes on" in done(head.rayward("jobs", "stop", job_id)).out
    assert "has ended already: stopped" in done(head.rayward("jobs", "stop", job_id)).out
    followed = head.rayward("jobs", "logs", job_id, "-f")
    assert followed.code == 130
    assert followed.out.endswith("put away\n")
    again = done(head.rayward("submit", "--no-wait", "mine.py", "0", "sleep")).out.strip()
    assert again == job_id.removesuffix("1") + "2"
    done(head.rayward("jobs", "stop", again))
    rows = json.loads(done(head.rayward("jobs", "list", "--json")).out)
    assert [row["id"] for row in rows][:2] == [again, job_id]


@pytest.mark.slow
def test_edited_code_is_what_runs(mine: Path, head: Head) -> None:
    """The script, a module beside it, and the package of a checkout, whose version did not change."""
    checkout = mine.parent / "checkout"
    for folder in ("platform", "pipelines", "jobs"):
        shutil.copytree(ROOT / folder, checkout / folder, ignore=shutil.ignore_patterns("__pycache__"))
    mine.write_text("import beside, rayward\nprint(beside.WORD, rayward.MARK, rayward.__file__)\n")
    for mark in ("one", "two"):
        init = checkout / "platform" / "rayward" / "__init__.py"
        init.write_text(re.sub(r"\nMARK.*\n", "", init.read_text()) + f"\nMARK = {mark!r}\n")
        (mine.parent / "beside.py").write_text(f"WORD = {mark!r}\n")
        run = "import sys; from rayward.cli import main; sys.argv[0] = 'rayward'; main()"
        said = subprocess.run(
            [sys.executable, "-c", run, "submit", "mine.py"],
            env={**os.environ, **head.env, "PYTHONPATH": str(checkout / "platform")},
            capture_output=True,
            text=True,
        )
        assert said.returncode == 0, said.stderr
        assert said.stdout.startswith(f"{mark} {mark} ")
        assert str(checkout) not in said.stdout
        assert "runtime_resources" in said.stdout


@pytest.mark.slow
def test_a_job_that_fits_nowhere_is_said_within_a_minute(mine: Path, head: Head) -> None:
    said = head.rayward("submit", "--cpus", "64", "mine.py", "5")
    assert said.code == 1
    assert "asks for 64 CPU" in said.err
    assert "rayward jobs stop mine-" in said.err
    assert json.loads(head.rayward("jobs", "status", "mine", "--json").out)["state"] == "pending"


@pytest.mark.slow
def test_as_from_elsewhere_with_a_shared_folder(mine: Path, head: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is sent to a cluster that does not see this machine's files: nothing of this folder is used; and a python that is not there."""
    for name, value in head.env.items():
        monkeypatch.setenv(name, value)
    target = reach()
    (mine.parent / "a.yaml").write_text("x: 1\n")
    (mine.parent / "nfs" / "rows").mkdir(parents=True)
    rows = str(mine.parent / "nfs" / "rows")
    mine.write_text("import os, sys\nprint(*map(os.path.exists, (sys.argv[2], sys.argv[4])), 'runtime_resources' in os.getcwd())\n")
    for python, code, line in ((sys.executable, 0, "True True True"), ("no-such-python", 127, "not found")):
        job = describe(mine, "--config", "a.yaml", "--source", rows, request=Request(python=python, shared=(Path("nfs"),)))
        monkeypatch.setattr(jobs, "_runtime_env", lambda job, name, folder: {"working_dir": folder})  # a python for the entry process only
        job_id, fresh = jobs.send(target, job)
        assert fresh
        lines: list[str] = []
        info = jobs.follow(target, job_id, lines.append, lines.append)
        assert line in "\n".join(lines)
        assert jobs.verdict(info, "")[0] == code
    assert "--python" in jobs.verdict(info, "")[1]


@pytest.mark.slow
def test_a_pipeline_and_a_training_make_there_what_they_make_here(mine: Path, head: Head) -> None:
    """Relative names, the store, the registry: as `rayward run` in this folder."""
    from rayward.storage import open_dataset

    sets = ("net.width=16", "net.layers=1", "batch.size=64", "render.max_length=160", "train.epochs=1")
    small = [word for setting in sets for word in ("--set", setting)]
    done(head.rayward("submit", "sample_rollouts", "--problems", "toy:40", "--output", "toy/rollouts", "--engine", "local"))
    done(head.rayward("submit", "label_pairs", "--source", "toy/rollouts", "--output", "toy/there", "--engine", "ray"))
    done(
        head.rayward("run", "label_pairs", "--source", "toy/rollouts", "--output", "toy/here", "--engine", "local", env={"RAY_ADDRESS": ""})
    )
    assert open_dataset("toy/there").manifest.digest == open_dataset("toy/here").manifest.digest
    said = done(head.rayward("submit", "train_reward_model", "--examples", "toy/there", "--output", "toy/model", "--register", "m", *small))
    assert "registered: models:/m/1" in said.out
    assert (mine.parent / "store" / "mlflow.db").is_file()
    assert "m " in done(head.rayward("models", "list")).out
    head.rayward("submit", "label_pairs", "--sorce", "x").mistake("--source")
