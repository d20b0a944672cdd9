"""A fit whose OUTPUT is a URL: the weights of a local one bit for bit, also when the node that trained is lost and another one goes on.

The object store is moto's S3 server on loopback; a node that is lost is its cache folder deleted.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tiny
from rayward import checkpoints, places
from rayward.errors import RaywardError, SettingsError
from rayward.fitting import FitSettings, Fitted, fit, prepare
from rayward.mirror import Mirror
from rayward.storage import Dataset
from rayward.training import TrainSettings
from tiny import toy_dataset

pytest.importorskip("s3fs", reason="needs the extra s3")
pytest.importorskip("moto", reason="needs moto[server]")
torch.set_num_threads(1)
pytestmark = pytest.mark.usefixtures("one_thread")

FIT = replace(tiny.FIT, train=TrainSettings(epochs=2, lr=2e-3, log_every=1, validate_every=2, checkpoint_every=3, keep_best=2))


class Crash(Exception):
    """What stands for a lost machine."""


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """An empty bucket of an S3 server on loopback, and the environment that leads there."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "somebody")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.delenv("AWS_PROFILE", raising=False)
        place = places.at("s3://fits/made")
        assert not isinstance(place, Path)
        place.fs.mkdir("fits")
        yield "s3://fits"
    server.stop()


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Makes this process one on another node: with a cache of its own."""

    def on(name: str) -> Path:
        monkeypatch.setenv("RAYWARD_CACHE", str(tmp_path / name))
        return tmp_path / name

    on("first")
    return on


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return toy_dataset("pairs", tmp_path_factory.mktemp("pairs"), problems=60)


@pytest.fixture(scope="module")
def settings(pairs: Dataset) -> FitSettings:
    return replace(FIT, examples=str(pairs.path))


@pytest.fixture(scope="module")
def undisturbed(settings: FitSettings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("local")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        fit(settings, str(output))
    return output


def listed(url: str) -> set[str]:
    return set(places.listing(places.at(url), deep=True))


def weights(folder: Any) -> dict[str, torch.Tensor]:
    return load_file(places.fetch(folder / "model.safetensors"))


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def lines(output: Any) -> list[dict[str, float]]:
    read = [json.loads(line) for line in places.read(output / "run" / "metrics.jsonl").splitlines()]
    return [{n: v for n, v in line.items() if n != "tokens_per_s"} for line in read]


def same_run(url: str, undisturbed: Path) -> None:
    """The run at a URL ended as the local one: model, last checkpoint, best weights, metrics."""
    place = places.at(url)
    assert equal(weights(place / "model"), weights(undisturbed / "model"))
    last = checkpoints.steps(undisturbed / "run")[-1]
    assert equal(weights(place / "run" / last.name), weights(last))
    for best in checkpoints.best(undisturbed / "run"):
        assert equal(weights(place / "run" / best.name), weights(best))
    assert lines(place) == lines(undisturbed)


def crashing(step: int) -> Callable[[dict[str, float]], None]:
    def report(line: dict[str, float]) -> None:
        if line["step"] == step:
            raise Crash

    return report


def test_a_fit_at_a_url_leaves_what_a_local_one_does(bucket: str, node: Any, settings: FitSettings, undisturbed: Path) -> None:
    done = fit(settings, f"{bucket}/whole")
    same_run(f"{bucket}/whole", undisturbed)
    there = listed(f"{bucket}/whole")
    here = set(places.listing(undisturbed, deep=True))
    assert there == here | {"prepared.json"}
    assert str(done.place) == f"{bucket}/whole/model"
    assert done.model.is_relative_to(node("first"))
    assert [entry["folder"] for entry in done.best] == [f"run/{path.name}" for path in checkpoints.best(undisturbed / "run")]
    again: Fitted = fit(settings, f"{bucket}/whole")  # an ended run is not begun again
    assert again == done


@pytest.mark.parametrize("lost", ["before the first checkpoint", "node", "while sending"])
def test_a_run_whose_node_is_lost_goes_on_elsewhere(lost: str, bucket: str, node: Any, settings: FitSettings, undisturbed: Path) -> None:
    url = f"{bucket}/lost-{lost.split()[0]}"
    with pytest.raises(Crash):
        fit(settings, url, report=crashing(2 if lost.startswith("before") else 8))
    if lost == "while sending":
        newest = [name for name in Mirror(Path("none"), places.at(url) / "run").whole() if name.startswith("step-")][-1]
        assert newest == "step-00000006"
        places.remove(places.at(url) / "run" / newest / "state.json")
    shutil.rmtree(node("first"))
    node("second")
    begun: list[float] = []
    fit(settings, url, report=lambda line: begun.append(line["step"]))
    assert begun[0] == {"b": 1, "n": 7, "w": 4}[lost[0]]
    same_run(url, undisturbed)
    assert listed(url) == {*places.listing(undisturbed, deep=True), "prepared.json"}  # nothing is left of what was lost


def test_what_lies_here_and_not_at_the_url_did_not_happen(
    bucket: str, node: Any, settings: FitSettings, undisturbed: Path, pairs: Dataset
) -> None:
    url = f"{bucket}/emptied"
    with pytest.raises(Crash):
        fit(settings, url, report=crashing(8))
    places.remove(places.at(url))
    begun: list[float] = []
    fit(settings, url, report=lambda line: begun.append(line["step"]))
    assert begun[0] == 1
    same_run(url, undisturbed)
    with pytest.raises(SettingsError, match=rf"{url} holds a run with other settings \(train.lr: 0.002 -> 0.1\)"):
        prepare(replace(settings, train=replace(settings.train, lr=0.1)), url)
    with pytest.raises(SettingsError, match=f"{url}/run is not empty and holds no run of this job"):
        prepare(settings, f"{url}/run")


def test_a_model_and_examples_at_a_url(bucket: str, node: Any, settings: FitSettings, undisturbed: Path, tmp_path: Path) -> None:
    model = places.send(undisturbed / "model", f"{bucket}/models/one")
    begun = fit(replace(settings, model=str(model)), f"{bucket}/second")
    local = fit(replace(settings, model=str(undisturbed / "model")), str(tmp_path / "second"))
    assert equal(weights(begun.model), weights(local.model))
    examples = places.send(Path(settings.examples), f"{bucket}/examples")
    there = fit(replace(settings, examples=str(examples)), str(tmp_path / "third"))
    assert equal(weights(there.model), weights(undisturbed / "model"))


def test_a_store_that_is_away_ends_a_run_with_the_way_on(
    bucket: str, node: Any, settings: FitSettings, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rayward import mirror

    url = f"{bucket}/away"
    monkeypatch.setattr(mirror, "PATIENCE_S", 0.0)
    sent = places.send

    def refusing(local: Path, to: Any) -> Any:
        if local.name == "step-00000006":
            raise RaywardError(f"{to} cannot be reached\n  -> check the network")
        return sent(local, to)

    monkeypatch.setattr(places, "send", refusing)
    with pytest.raises(RaywardError, match=r"step-00000006 cannot be reached"):
        fit(settings, url)
    monkeypatch.setattr(places, "send", sent)
    begun: list[float] = []
    fit(settings, url, report=lambda line: begun.append(line["step"]))
    assert begun[0] == 4
    same_run(url, undisturbed)


# ------------------------------------------------------------------------------------------- workers on nodes that share no disk


def on_nodes(examples: str, url: str, folder: str, losing: str, **train: Any) -> None:
    """In a process of its own: two workers on two nodes with a cache each; `losing` a node, another one comes.

    The head has no CPUs, so that what is lost is never the process that started the group.
    """
    from ray.cluster_utils import Cluster

    settings = replace(FIT, examples=examples, train=replace(FIT.train, **train))
    head = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, "temp_dir": folder})
    caches = {name: Path(folder, name) for name in ("a", "b", "c")}

    def joined(name: str) -> Any:
        return head.add_node(num_cpus=1, env_vars={"RAYWARD_CACHE": str(caches[name])})

    nodes = {name: joined(name) for name in ("a", "b")}
    os.environ |= {"RAY_ADDRESS": head.address, "RAYWARD_CACHE": str(Path(folder, "driver"))}
    failed: list[BaseException] = []

    def run() -> None:
        try:
            fit(settings, url, workers=2)
        except BaseException as error:
            failed.append(error)

    training = threading.Thread(target=run)
    training.start()
    while losing and training.is_alive():
        first = [n for n in nodes if list(caches[n].glob("fits/*/run/step-*"))]  # where the first worker is
        if first:
            lost = first[0] if losing == "first" else next(n for n in nodes if n != first[0])
            head.remove_node(nodes[lost], allow_graceful=False)
            shutil.rmtree(caches[lost], ignore_errors=True)
            joined("c")
            print(f"lost {lost}", flush=True)
            break
        time.sleep(0.05)
    training.join()
    print(f"ended after {sum(1 for c in caches.values() if c.is_dir())} nodes", flush=True)
    head.shutdown()
    if failed:
        raise failed[0]


def in_a_process(*words: str, **train: Any) -> str:
    folder = tempfile.mkdtemp(prefix="rw-")  # short: a socket's path may have 107 characters
    code = f"import test_fitting_remote as t; t.on_nodes({words[0]!r}, {words[1]!r}, {folder!r}, {words[2]!r}, **{train!r})"
    try:
        said = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=280)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    assert said.returncode == 0, said.stdout + said.stderr[-4000:]
    return said.stdout


@pytest.mark.slow
@pytest.mark.parametrize("shard", [False, True])
def test_two_workers_that_share_no_disk_have_the_curve_of_one(shard: bool, bucket: str, settings: FitSettings, undisturbed: Path) -> None:
    url = f"{bucket}/two-{shard}"
    in_a_process(settings.examples, url, "", shard=shard)
    for both, alone in zip(lines(places.at(url)), lines(undisturbed), strict=True):
        assert both == pytest.approx(alone, abs=1e-5)
    for name, tensor in weights(undisturbed / "model").items():
        torch.testing.assert_close(weights(places.at(url) / "model")[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("losing", "shard"), [("first", False), ("other", False), ("first", True)])
def test_a_lost_node_takes_nothing_with_it(losing: str, shard: bool, bucket: str, settings: FitSettings) -> None:
    url, long = f"{bucket}/{losing}-{shard}", {"epochs": 8, "shard": shard}
    if not listed(f"{bucket}/calm-{shard}"):
        in_a_process(settings.examples, f"{bucket}/calm-{shard}", "", **long)
    assert "lost" in in_a_process(settings.examples, url, losing, **long)
    calm, lost = places.at(f"{bucket}/calm-{shard}"), places.at(url)
    assert equal(weights(lost / "model"), weights(calm / "model"))
    assert lines(lost) == lines(calm)
