"""Workers with models hold GPUs where a cluster has any; what cannot be placed is said and not waited for."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from driving import here
from driving import toy as make_toy
from rayward import cluster
from rayward.cluster import placement
from rayward.dataflow.engine import run
from rayward.errors import SettingsError

PRETENDED = """
import functools, json, os, sys, threading
import ray
from ray.experimental.internal_kv import _internal_kv_list
from rayward import cluster
from rayward.cluster import placement
from rayward.dataflow.engine import run

os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"  # as cluster.connect does
ray.init(address="local", num_cpus=2, num_gpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 * 2**20)


def look():
    def seen(task):
        held = ray.get_runtime_context().get_assigned_resources()
        return {"gpus": held.get("GPU") or 0, "visible": os.environ.get("CUDA_VISIBLE_DEVICES")}

    return seen


os.environ["CUDA_VISIBLE_DEVICES"] = "0,1"
asked = [float(x) for x in sys.argv[1:]]
print(json.dumps([run([{}], look, what="t", unit="t", engine="ray", actors=1, gpus=g)[0] for g in asked]))


@ray.remote(num_gpus=2, num_cpus=0)
class Holder:
    def ping(self):
        return 1


holder = Holder.remote()
ray.get(holder.ping.remote())
print(json.dumps(run([{}], look, what="label", unit="t", engine="ray")))
held = lambda: lambda task: ray.get_runtime_context().get_assigned_resources()
print(json.dumps([run([{}], held, what="t", unit="t", engine="ray", actors=a, cpus=2, memory_gib=0.25)[0] for a in (0, 1)]))
watch = placement.watch
placement.watch = functools.partial(watch, after_s=1.0, every_s=1.0)
threading.Timer(4.0, ray.kill, [holder]).start()
print(json.dumps(run([{}], look, what="score", unit="t", engine="ray", actors=1, gpus=1)))
print(placement.situation("fit", {"CPU": 1, "GPU": 1}, 2, 30.0), file=sys.stderr)
print(json.dumps([str(key) for key in _internal_kv_list("rayward-placed")]))
ray.shutdown()
"""


@pytest.fixture(scope="module")
def pretended(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Any], str]:
    """What the script above prints, and what is said on stderr, on a machine that pretends to have two GPUs."""
    script = tmp_path_factory.mktemp("gpus") / "pretended.py"
    script.write_text(PRETENDED)
    command = [sys.executable, str(script), "-1", "0", "0.25", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env={**os.environ, "RAY_ADDRESS": ""})
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")], done.stderr


def test_an_actor_holds_what_was_asked_for_and_by_default_one_where_there_are_any(pretended: tuple[list[Any], str]) -> None:
    assert [seen["gpus"] for seen in pretended[0][0]] == [1, 0, 0.25, 2]


def test_a_stage_without_gpus_neither_holds_nor_sees_one(pretended: tuple[list[Any], str]) -> None:
    actor, actor_without = pretended[0][0][:2]
    [task] = pretended[0][1]
    assert task == actor_without == {"gpus": 0, "visible": ""}
    assert actor["gpus"] == 1
    assert actor["visible"] in ("0", "1")


def test_a_task_and_an_actor_hold_the_cpus_and_the_memory_that_were_asked_for(pretended: tuple[list[Any], str]) -> None:
    for held in pretended[0][2]:
        assert (held["CPU"], held["memory"]) == (2, 2**28)


def test_while_another_job_holds_the_gpus_labels_are_made_and_a_scorer_waits_and_says_so(pretended: tuple[list[Any], str]) -> None:
    (_, labeled, _, scored, left), err = pretended
    assert labeled == [{"gpus": 0, "visible": ""}]
    assert scored[0]["gpus"] == 1
    assert "label: no worker has begun" not in err.partition("score:")[0]
    assert re.search(r"score: no worker has begun for \d+ s. Asked for: 1 x 1 CPU and 1 GPU; free: . of 2 CPUs, 0 of 2 GPUs", err), err
    assert "wait, stop another job, or ask for less" in err
    assert "fit: no worker has begun for 30 s. Asked for: 2 x 1 CPU and 1 GPU; each free: " in err
    assert left == []  # no word is left behind in the cluster's memory


def test_without_gpus_none_are_held_and_more_than_there_are_is_an_error_at_once(ray_cluster: Any) -> None:
    work = {"what": "t", "unit": "t", "engine": "ray", "actors": 1}
    assert run([{}], lambda: lambda task: {}, gpus=-1.0, **work) == [{}]
    with pytest.raises(SettingsError, match=r"gpus=1: no machine of this cluster has more than 0(.|\n)*0 to work on CPUs"):
        run([{}], lambda: lambda task: {}, gpus=1.0, **work)


def test_what_no_machine_can_hold_is_an_error_at_once(ray_cluster: Any) -> None:
    with (
        pytest.raises(SettingsError, match=r"a worker asks for 10000 CPU, and no machine of this cluster has that: the most is \d+ CPU"),
        placement.watch("t", {"CPU": 10_000}),
    ):
        pass


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--memory-gib", "90000"], "asks for 1 CPU and 90000 GiB of memory, and no machine of this cluster has that"),
        (["--cpus", "0"], "cpus=0, gpus=-1, memory_gib=0 is nothing that a task can hold"),
        (["--memory-gib", "-1"], "memory_gib=-1 is nothing that a task can hold"),
    ],
)
def test_a_pipeline_that_cannot_be_placed_says_so(
    ray_cluster: Any, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, words: list[str], said: str
) -> None:
    toy = make_toy(tmp_path_factory.getbasetemp())
    here("label_pairs", "--source", toy.answers, "--output", tmp_path / "pairs", "--engine", "ray", *words).mistake(said)
    assert not (tmp_path / "pairs").exists()


def test_a_scoring_job_that_cannot_be_placed_says_so(ray_cluster: Any, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    toy = make_toy(tmp_path_factory.getbasetemp())
    words = ["--model", toy.pairs_model, "--source", toy.answers, "--output", tmp_path / "scored", "--engine", "ray", "--gpus", "8"]
    here("score_rollouts", *words).mistake("gpus=8: no machine of this cluster has more than 0", "ask for fewer")
    assert not (tmp_path / "scored").exists()


@pytest.fixture
def growing(ray_cluster: Any) -> Iterator[None]:
    """A cluster without GPUs whose autoscaler says that it may add machines with two, and none with three any more."""
    from ray._raylet import GCS_AUTOSCALER_CLUSTER_CONFIG_KEY, GCS_AUTOSCALER_STATE_NAMESPACE
    from ray.core.generated.autoscaler_pb2 import ClusterConfig, NodeGroupConfig
    from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_put

    groups = [NodeGroupConfig(resources={"CPU": 8, "GPU": n}, max_count=most) for n, most in ((2, 4), (3, 0))]
    _internal_kv_put(
        GCS_AUTOSCALER_CLUSTER_CONFIG_KEY,
        ClusterConfig(node_group_configs=groups).SerializeToString(),
        namespace=GCS_AUTOSCALER_STATE_NAMESPACE,
    )
    yield
    _internal_kv_del(GCS_AUTOSCALER_CLUSTER_CONFIG_KEY, namespace=GCS_AUTOSCALER_STATE_NAMESPACE)


def test_gpus_that_an_autoscaler_may_add_count(ray_cluster: Any, growing: None) -> None:
    assert cluster.gpus_each(-1) == 1
    assert cluster.gpus_each(2) == 2
    placement.check_fits({"CPU": 8, "GPU": 2})
    for asked in ({"GPU": 3.0}, {"CPU": 9.0}):
        with pytest.raises(SettingsError, match="no machine of this cluster"):
            placement.check_fits(asked)
    with pytest.raises(SettingsError, match="gpus=3"):
        cluster.gpus_each(3)


def test_without_gpus_and_without_an_autoscaler_cpus_work(ray_cluster: Any) -> None:
    assert cluster.gpus_each(-1) == 0
    assert not placement.autoscaling()
