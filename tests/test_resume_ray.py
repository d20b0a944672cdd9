"""Training on Ray Train workers: the curve of one worker, and the same weights though a worker was killed."""

from __future__ import annotations

import json
import os
import signal
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tiny
from rayward.batching import BatchSettings
from rayward.errors import RaywardError
from rayward.fitting import Resources, fit
from rayward.fitting.placement import choose_gpus, scaling
from rayward.storage import Dataset
from rayward.training import TrainSettings
from tiny import toy_dataset

torch.set_num_threads(1)
pytestmark = pytest.mark.usefixtures("one_thread")

FIT = replace(
    tiny.FIT,
    batch=BatchSettings(size=8, micro_tokens=400),
    train=TrainSettings(epochs=3, lr=2e-3, log_every=1, validate_every=5, checkpoint_every=4),
)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return toy_dataset("pairs", tmp_path_factory.mktemp("pairs"), problems=60)


def lines(output: Path) -> list[dict[str, float]]:
    read = [json.loads(line) for line in (output / "run" / "metrics.jsonl").read_text().splitlines()]
    return [{n: v for n, v in line.items() if n != "tokens_per_s"} for line in read]


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "model" / "model.safetensors")


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def two_workers(ray_cluster: Any, pairs: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("two")
    told: list[dict[str, float]] = []
    fit(replace(FIT, examples=str(pairs.path)), str(output), workers=2, report=told.append)
    assert [{n: v for n, v in line.items() if n != "tokens_per_s"} for line in told] == lines(output)
    return output


def test_two_workers_have_the_curve_of_one(two_workers: Path, pairs: Dataset, tmp_path: Path) -> None:
    fit(replace(FIT, examples=str(pairs.path)), str(tmp_path))
    for both, alone in zip(lines(two_workers), lines(tmp_path), strict=True):
        assert both == pytest.approx(alone, abs=1e-5)


@pytest.mark.parametrize(
    ("each", "workers", "said"),
    [
        (Resources(cpus=64), 2, "no room for 2 workers of 64 CPUs each: this cluster has 1 node with .* CPUs"),
        (Resources(gpus=1), 2, "no room for 2 workers of 1 CPU and 1 GPU each"),
        (Resources(cpus=64, wait_s=0), 1, "no room for 1 worker of 64 CPUs each after .* s: free are"),
    ],
)
def test_a_group_that_cannot_be_placed_says_so(ray_cluster: Any, each: Resources, workers: int, said: str) -> None:
    with pytest.raises(RaywardError, match=said):
        scaling(ray_cluster, each, workers, workers)


def test_workers_train_on_cpus_where_there_is_no_gpu_and_say_so(ray_cluster: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert choose_gpus(ray_cluster, Resources(cpus=2), 2) == Resources(cpus=2, gpus=0)
    assert "training on CPUs: this cluster has no GPU" in capsys.readouterr().err
    assert choose_gpus(ray_cluster, Resources(gpus=1), 2) == Resources(gpus=1)


def test_a_group_waits_for_what_others_hold_and_no_longer(ray_cluster: Any, capsys: pytest.CaptureFixture[str]) -> None:
    cpus = int(ray_cluster.cluster_resources()["CPU"])
    held = ray_cluster.util.placement_group([{"CPU": cpus}])
    assert held.wait(60)
    try:
        with pytest.raises(RaywardError, match=r"no room for 1 worker of 1 CPU each after (.|\n)*goes on when what holds them has ended"):
            scaling(ray_cluster, Resources(gpus=0, wait_s=1), 1, 1)
    finally:
        ray_cluster.util.remove_placement_group(held)
    asked = scaling(ray_cluster, Resources(gpus=0, wait_s=60), 1, cpus)
    assert asked["resources_per_worker"] == {"CPU": 1.0}
    assert not asked["use_gpu"]


def worker_pids() -> list[int]:
    """The training workers among the processes below this one."""
    import psutil  # comes with ray

    below = psutil.Process().children(recursive=True)
    return [p.pid for p in below if "TrainWorker" in " ".join(p.cmdline())]


@pytest.mark.slow
def test_a_killed_worker_changes_no_bit(ray_cluster: Any, two_workers: Path, pairs: Dataset, tmp_path: Path) -> None:
    killed: list[int] = []

    def kill_one() -> None:
        metrics = tmp_path / "run" / "metrics.jsonl"
        while not done.wait(0.01):
            if metrics.exists() and len(metrics.read_text().splitlines()) > 6:  # a checkpoint is there, and steps after it
                killed.append(worker_pids()[-1])
                os.kill(killed[0], signal.SIGKILL)
                return

    done = threading.Event()
    killer = threading.Thread(target=kill_one)
    killer.start()
    try:
        fit(replace(FIT, examples=str(pairs.path)), str(tmp_path), workers=2)
    finally:
        done.set()
        killer.join()
    assert len(killed) == 1
    assert equal(weights(tmp_path), weights(two_workers))
    assert lines(tmp_path) == lines(two_workers)
