"""rayward cluster check: judgements by hand-made answers, and real clusters: open, closed, silent, gone."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from driving import here, rayward
from rayward import checkup
from rayward.checkup import Finding
from rayward.cli.cluster import line
from rayward.cluster import nodes, probes
from rayward.cluster.nodes import Node, Silence

GIB = 2**30
SAME = {
    "versions": {"python": "3.11.7", "rayward": "0.1", "torch": "2.13"},
    "gpus_seen": -1,
    "devices": 0,
    "disk_total": 100 * GIB,
    "disk_free": 50 * GIB,
}


def facts(**of_b: Any) -> dict[str, Any]:
    return {"a": SAME, "b": {**SAME, **of_b}}


def node(name: str, gpus: float = 0.0) -> Node:
    return Node(name * 8, name, "10.0.0.1", name == "a", 4.0, gpus, GIB, 52365)


def opened(*listens: str, without: int = 200, given: int = 200) -> dict[str, Any]:
    return {"listens": list(listens), "without": without, "with": given}


@pytest.mark.parametrize(
    ("finding", "verdict", "words"),
    [
        (checkup.versions(facts()), "green", "python 3.11.7, rayward 0.1, torch 2.13"),
        (checkup.versions(facts(versions={"python": "3.11.7", "rayward": "0.1", "torch": "2.12"})), "red", "torch 2.13 on a, 2.12 on b"),
        (checkup.versions({"a": Silence("asleep")}), "red", "no node answered"),
        (checkup.versions({"a": {"versions": {"rayward": "none"}}}), "yellow", "rayward none"),
        (checkup.graphics([node("a"), node("b")], facts()), "green", "none"),
        (checkup.graphics([node("a"), node("b", 2)], facts(gpus_seen=2)), "green", "all 2"),
        (checkup.graphics([node("a"), node("b", 2)], facts(gpus_seen=1)), "red", "b: Ray counts on 2, torch sees 1"),
        (checkup.graphics([node("a"), node("b")], facts(devices=4)), "yellow", "b: 4 there, Ray was told of 0"),
        (checkup.disks(facts()), "green", "least free: a 50.0 GiB"),
        (checkup.disks(facts(disk_free=4 * GIB)), "red", "b 4.0 GiB"),
        (checkup.disks(facts(disk_free=9 * GIB)), "yellow", "b 9.0 GiB"),
        (checkup.clocks({"a": (0.002, 0.001), "b": (-0.001, 0.001)}), "green", "within 3.0 ms"),
        (checkup.clocks({"a": (0.0, 0.001), "b": (5.0, 0.5)}), "yellow", "b is 5.00 s ahead of"),
        (checkup.clocks({"a": (0.0, 0.001), "b": (5.0, 4.9)}), "green", "within 5000.0 ms of each other (give or take 4900.0 ms)"),
        (checkup.clocks({"a": (-3600.0, 0.5)}), "red", "here is 3600.00 s ahead of a"),
        (checkup.clocks({}), "red", "no node answered"),
        (checkup.storage("s3://k:secret@b/x", {}, 3), "green", "s3://b/x: written and read here and on 3 of 3 nodes"),
        (checkup.storage("/data", {"b": "does not see what a wrote"}, 2), "red", "/data: b: does not see what a wrote"),
        (checkup.tracking("sqlite:////data/mlflow.db", {"here": "200", "a": "200"}), "green", "for this machine alone"),
        (checkup.tracking("sqlite:////data/mlflow.db", {"here": "200", "a": "200", "b": "200"}), "red", "the other nodes do not see it"),
        (checkup.tracking("http://u:secret@h:5000", {"here": "200", "a": "200"}), "green", "http://h:5000 answers here and on 1 node"),
        (checkup.tracking("http://h", {"here": "200", "a": Silence("asleep")}), "red", "a: asleep"),
        (checkup.tracking("http://h", {"here": "401", "a": "200"}), "red", "refuses: here: 401"),
        (checkup.tracking("http://h", {"here": "200", "a": "401"}), "green", "answers here and on 1 node"),
        (checkup.tracking("http://h", {"here": "200", "a": "502"}), "red", "does not answer: a: 502"),
        (checkup.door("Jobs API", 8265, {}), "yellow", "nothing listens"),
        (checkup.door("Jobs API", 8265, {"a": opened("127.0.0.1", "10.0.0.1")}), "red", "10.0.0.1:8265 asks for no token"),
        (checkup.door("Jobs API", 8265, {"a": opened("127.0.0.1")}), "yellow", "127.0.0.1:8265 asks for no token"),
        (checkup.door("Jobs API", 8265, {"a": opened("127.0.0.1", "10.0.0.1", without=401)}), "green", "reachable from outside: refuses"),
        (checkup.door("Jobs API", 8265, {"a": opened("127.0.0.1", without=401)}), "green", "on loopback alone: refuses"),
        (checkup.door("Jobs API", 8265, {"a": opened("10.0.0.1", without=403, given=403)}), "red", "refuses the token of a itself"),
        (checkup.door("agents", 1, {"a": opened("10.0.0.1", without=401), "b": opened("10.0.0.2")}), "red", "10.0.0.2:1 asks"),
        (checkup.door("agents", 1, {"a": opened("fd00::2")}), "red", "fd00::2:1 asks"),
        (checkup.door("agents", 1, {"a": opened("head.local", without=200)}), "red", "head.local:1 asks for no token"),
        (checkup.door("Jobs API", 1, {"a": opened("10.0.0.1", without=0, given=0)}), "yellow", "says nothing"),
        (checkup.head_door("h:1", "refused", ["127.0.0.1", "10.0.0.1"]), "green", "refuses without the token"),
        (checkup.head_door("h:1", "answered", ["127.0.0.1", "10.0.0.1"]), "red", "asks for no token"),
        (checkup.head_door("h:1", "answered", []), "red", "asks for no token"),
        (checkup.head_door("h:1", "answered", ["127.0.0.1"]), "yellow", "asks for no token"),
        (checkup.head_door("h:1", "RpcError", ["10.0.0.1"]), "yellow", "RpcError"),
    ],
)
def test_judgements(finding: Finding, verdict: str, words: str) -> None:
    assert finding.verdict == verdict, finding
    assert words in finding.says
    assert "secret" not in finding.says + finding.way_out
    assert finding.way_out or verdict != "red" or finding.says == "no node answered"


def test_a_line_fits_a_terminal_and_says_its_verdict_without_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    said = line("versions", "red", "torch " + "2.13 on 10.0.0.4, " * 9, "install the same " * 8)
    assert said.startswith("  FAILS  versions  torch")
    assert "\n                   -> install" in said
    assert max(map(len, said.splitlines())) <= 80
    assert "\033" not in said
    assert line("GPUs", "green", "all 2", "never shown") == "  ok     GPUs      all 2"


@pytest.fixture
def alone(store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store, and nothing that leads to a cluster."""
    monkeypatch.setenv("RAY_ADDRESS", "")
    monkeypatch.setenv("RAY_AUTH_MODE", "")
    monkeypatch.setattr(nodes, "last_started", lambda: "")  # this machine may run one
    return store


def test_without_a_cluster_it_says_what_to_do_and_checks_the_rest(alone: Path) -> None:
    said = here("rayward", "cluster", "check")
    assert said.code == 1
    assert "no cluster is named, and none was started" in said.out
    assert "ray start --head" in said.out
    assert "ok     storage" in said.out
    assert "ok     MLflow" in said.out
    assert not alone.exists()  # what was written is taken away again


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("127.0.0.1:9", "nothing answers at 127.0.0.1:9"),
        ("nonsense", "nonsense is no address"),
        ("http://u:secret@h:8265", "name the head: rayward cluster check --address h:6379"),
    ],
)
def test_an_address_that_leads_nowhere(alone: Path, address: str, words: str) -> None:
    report = json.loads(here("rayward", "cluster", "check", "--address", address, "--json").out)
    assert not report["well"]
    first = report["findings"][0]
    assert words in first["says"] + first["way_out"]
    assert "secret" not in first["says"] + first["way_out"]


def test_what_listens_there_and_is_no_ray(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "KNOCK_S", 2.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        said = checkup.look(f"127.0.0.1:{server.getsockname()[1]}").findings[0]
    assert said.verdict == "red"
    assert "is no head of a Ray cluster" in said.says


def test_a_store_that_cannot_be_written(alone: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    finding = next(f for f in checkup.look(store=str(tmp_path / "file" / "store")).findings if f.what == "storage")
    assert finding.verdict == "red"
    assert "here: cannot be written" in finding.says
    monkeypatch.setenv("RAYWARD_STORE", "")


def test_a_cluster_of_one(ray_cluster: Any, alone: Path) -> None:
    address = ray_cluster.get_runtime_context().gcs_address
    report = checkup.look(address)
    found = {finding.what: finding for finding in report.findings}
    assert list(found)[:7] == ["Ray", "versions", "GPUs", "disks", "clocks", "storage", "MLflow"]
    assert {found[name].verdict for name in ("Ray", "versions", "GPUs", "clocks", "storage", "MLflow")} == {"green"}, found
    assert "1 node" in found["Ray"].says
    assert "written and read here and on 1 of 1 nodes" in found["storage"].says
    assert found["Jobs API"].says.startswith("nothing listens")
    assert report.nodes[0]["cpus"] == ray_cluster.cluster_resources()["CPU"]
    assert json.loads(json.dumps(report.as_dict()))["address"] == address


def test_a_node_that_does_not_answer_is_an_answer(ray_cluster: Any) -> None:
    def asleep() -> None:
        time.sleep(60)

    def broken() -> None:
        raise ValueError("the disk is gone")

    [only] = nodes.alive()
    began = time.monotonic()
    assert nodes.on_each([only], asleep, 1.0) == {only.name: Silence("no answer within 1 s")}
    assert time.monotonic() - began < 30
    assert "the disk is gone" in nodes.on_each([only], broken, 30.0)[only.name].why


def test_the_questions_need_nothing_of_this_package_on_the_node() -> None:
    from ray import cloudpickle

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        code = f"import ray, sys, pickle; sys.modules['rayward'] = None; print(pickle.load(sys.stdin.buffer)('127.0.0.1', {port}))"
        cloudpickle.register_pickle_by_value(probes)
        by_value = cloudpickle.dumps(probes.reach)
        cloudpickle.unregister_pickle_by_value(probes)
        by_name = cloudpickle.dumps(probes.reach)
        runs = [subprocess.run([sys.executable, "-c", code], input=sent, capture_output=True, timeout=60) for sent in (by_value, by_name)]
    assert runs[0].stdout.split() == [b"200"], runs[0].stderr
    assert b"ModuleNotFoundError" in runs[1].stderr


# -------------------------------------------------------------------------------------------------------- real clusters


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.fixture
def started() -> Iterator[Any]:
    """Starts nodes with `ray start`, and ends them."""
    running: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory(prefix="rw", dir="/tmp", ignore_cleanup_errors=True) as folder:

        def start(*words: str, **env: str) -> None:
            command = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--disable-usage-stats", *words]
            command += ["--num-cpus", "1", "--num-gpus", "0", "--object-store-memory", "80000000", "--temp-dir", folder]
            command += ["--dashboard-agent-listen-port", str(free_port())]
            quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            running.append(subprocess.Popen(command, env={**os.environ, **env}, start_new_session=True, **quiet))  # type: ignore[call-overload]

        yield start
        for process in reversed(running):
            process.terminate()
        for process in running:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def checked(address: str, tmp_path: Path, nodes_: int, **env: str) -> dict[str, Any]:
    """What the check says of a cluster, when it has so many nodes."""
    words = ("cluster", "check", "--address", address, "--store", str(tmp_path / "store"), "--json")
    for _ in range(30):
        said = rayward(*words, cwd=tmp_path, env=env)
        assert said.out.startswith("{"), said.err[-1500:]
        report = json.loads(said.out)
        if len(report["nodes"]) == nodes_ and "Jobs API" in {f["what"] for f in report["findings"]}:
            break
        time.sleep(2)
    return {**{f["what"]: f for f in report["findings"]}, "code": said.code, "said": said.out + said.err}


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_a_closed_cluster_of_two_nodes_is_well(started: Any, tmp_path: Path) -> None:
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "planted-token-of-the-test"}
    head, dashboard = free_port(), free_port()
    started("--head", "--port", str(head), "--dashboard-port", str(dashboard), "--ray-client-server-port", str(free_port()), **token)
    checked(f"127.0.0.1:{head}", tmp_path, 1, **token)
    started("--address", f"127.0.0.1:{head}", **token)
    found = checked(f"127.0.0.1:{head}", tmp_path, 2, **token)
    assert {name: found[name]["verdict"] for name in ("Ray", "storage", "Jobs API", "agents", "head")} == dict.fromkeys(
        ("Ray", "storage", "Jobs API", "agents", "head"), "green"
    ), found
    assert "on 2 of 2 nodes" in found["storage"]["says"]
    assert found["MLflow"]["verdict"] == "red"  # SQLite, which one machine sees
    assert "planted-token" not in found["said"]
    stranger = checkup_says(f"127.0.0.1:{head}", tmp_path, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="another-token-of-somebody")
    assert "refuses this machine: no token, or a wrong one" in stranger
    assert "another-token" not in stranger


def checkup_says(address: str, tmp_path: Path, **env: str) -> str:
    said = rayward("cluster", "check", "--address", address, cwd=tmp_path, env=env)
    assert said.code == 1
    return " ".join((said.out + said.err).split())


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_an_open_cluster_is_red(started: Any, tmp_path: Path) -> None:
    head, dashboard = free_port(), free_port()
    ports = ("--port", str(head), "--dashboard-port", str(dashboard), "--ray-client-server-port", str(free_port()))
    started("--head", *ports, "--dashboard-host", "0.0.0.0", RAY_AUTH_MODE="disabled")
    found = checked(f"127.0.0.1:{head}", tmp_path, 1, RAY_AUTH_MODE="disabled")
    assert found["code"] == 1
    address = checkup_outward()
    if address == "127.0.0.1":
        pytest.skip("this machine has no address but loopback")
    for name in ("Jobs API", "agents", "head"):
        assert found[name]["verdict"] == "red", found[name]
        assert "asks for no token" in found[name]["says"]
    assert f"{address}:{dashboard}" in found["Jobs API"]["says"]
    assert found["MLflow"]["verdict"] == "green"


def checkup_outward() -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as outward:
        try:
            outward.connect(("192.0.2.1", 9))
        except OSError:
            return "127.0.0.1"
        return str(outward.getsockname()[0])
