"""Room for a group of workers: what they ask for, what the cluster has, and how long to wait for it.

Ray waits for ever for what no node has. Here a group that cannot come to be says so at once, one that waits says every minute for what,
and ends with an error when the time is up.

>>> Resources(cpus=4).places([{"CPU": 8.0}, {"CPU": 6.0, "GPU": 1.0}]), Resources(gpus=1).places([{"CPU": 8.0}, {"CPU": 6.0, "GPU": 1.0}])
(3, 1)
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rayward import cluster
from rayward.cluster import placement
from rayward.errors import RaywardError, SettingsError

BUSY_S = 600.0  # seconds to wait for room that others hold or an autoscaler may bring, where nothing else is said
SAY_S = 60.0  # seconds between two words on what is waited for


@dataclass(frozen=True)
class Resources:
    """What every worker of a group holds, and how long the group waits for it."""

    cpus: float = 1.0  # CPU cores of a worker
    gpus: float = -1.0  # GPUs of a worker; 0: it trains on CPUs; -1: one where the cluster has any or its autoscaler may add some
    wait_s: float = -1.0  # seconds to wait for room; -1: BUSY_S where the cluster is busy or grows by itself, none where it is too small

    def __post_init__(self) -> None:
        if not 0 < self.cpus < math.inf:
            raise SettingsError(f"cpus_per_worker={self.cpus:g} cannot work", "give at least 1")
        if self.gpus != -1 and not 0 <= self.gpus < math.inf:
            raise SettingsError(f"gpus_per_worker={self.gpus:g} is no number of GPUs", "give 0 for CPUs, 1, or -1 for what there is")
        if self.wait_s != -1 and not 0 <= self.wait_s < math.inf:
            raise SettingsError(f"wait_s={self.wait_s:g} is no time to wait", "give seconds, e.g. --wait-s 1800, or leave it out")

    @property
    def bundle(self) -> dict[str, float]:
        """What a worker holds, in Ray's words."""
        return {"CPU": self.cpus, **({"GPU": self.gpus} if self.gpus > 0 else {})}

    def places(self, nodes: Sequence[Mapping[str, float]]) -> int:
        """How many workers fit onto nodes that have so much each."""
        return sum(min(int((node.get(kind) or 0.0) // amount) for kind, amount in self.bundle.items()) for node in nodes)

    def said(self, workers: int) -> str:
        """What a group asks for, in words."""
        each = f"{self.cpus:g} CPU{'s' * (self.cpus != 1)}" + (f" and {self.gpus:g} GPU{'s' * (self.gpus != 1)}" if self.gpus > 0 else "")
        return f"{workers} worker{'s' * (workers != 1)} of {each} each"


def nodes_of(ray: Any) -> list[dict[str, float]]:
    """What every node of the cluster has."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def choose_gpus(ray: Any, per_worker: Resources, least: int) -> Resources:
    """With gpus=-1 decided: one each where the cluster has GPUs or its autoscaler may add some, else none, which is said.

    Raises:
        SettingsError: if there are GPUs and not enough of them, which is rarely meant.
    """
    if per_worker.gpus >= 0:
        return per_worker
    each = cluster.gpus_each(-1)
    gpus = sum(node.get("GPU") or 0.0 for node in nodes_of(ray))
    if each and gpus < least and per_worker.wait_s < 0 and not placement.autoscaling():
        raise SettingsError(
            f"{least} workers need {least} GPUs and this cluster has {gpus:g}",
            "ask for fewer workers, or none on GPUs: --gpus-per-worker 0",
        )
    if not each and not placement.may_surprise():  # which gpus_each says
        print("training on CPUs: this cluster has no GPU", file=sys.stderr, flush=True)
    return replace(per_worker, gpus=each)


def scaling(ray: Any, per_worker: Resources, least: int, most: int) -> dict[str, Any]:
    """The arguments of a ScalingConfig, when there is room for the least of a group; `per_worker` has its GPUs chosen (`choose_gpus`).

    Raises:
        SettingsError: if the cluster is too small and is not said to grow.
        RaywardError: if there is no room after `wait_s` seconds.
    """
    await_room(ray, per_worker, least)
    elastic = {"num_workers": (least, most), "elastic_resize_monitor_interval_s": 30.0} if least < most else {"num_workers": most}
    return {**elastic, "use_gpu": per_worker.gpus > 0, "resources_per_worker": per_worker.bundle}


def await_room(ray: Any, per_worker: Resources, workers: int) -> None:
    """Wait until so many workers can be placed; what was held for the trial is given back.

    Raises:
        SettingsError: if the cluster is too small and is not said to grow.
        RaywardError: if there is no room after `wait_s` seconds.
    """
    from ray.util.placement_group import placement_group, remove_placement_group

    has = per_worker.places(nodes_of(ray))
    if has < workers and per_worker.wait_s < 0:
        if not placement.autoscaling():
            raise SettingsError(f"no room for {per_worker.said(workers)}: {_there(ray)}", _way_out(has, workers))
        placement.check_fits(per_worker.bundle)
    limit, began = per_worker.wait_s if per_worker.wait_s >= 0 else BUSY_S, time.monotonic()
    group = placement_group([per_worker.bundle] * workers)  # an autoscaler sees it and adds nodes
    try:
        while not group.wait(max(1.0, min(SAY_S, limit - (time.monotonic() - began)))):
            waited = time.monotonic() - began
            if waited >= limit:
                free = f"free are {_amounts(ray.available_resources())}; {_there(ray)}"
                raise RaywardError(f"no room for {per_worker.said(workers)} after {waited:.0f} s: {free}\n  -> {_way_out(has, workers)}")
            print(placement.situation("training", per_worker.bundle, workers, waited), file=sys.stderr, flush=True)
    finally:
        remove_placement_group(group)


def _way_out(has: int, workers: int) -> str:
    if has >= workers:
        return "the same command goes on when what holds them has ended; to wait longer: --wait-s 3600"
    fewer = f"ask for {has} workers" if has > 1 else "ask for less: --workers, --cpus-per-worker, --gpus-per-worker"
    return f"{fewer}, or say how long to wait for the cluster to grow: --wait-s 1800"


def _there(ray: Any) -> str:
    nodes = nodes_of(ray)
    return f"this cluster has {len(nodes)} node{'s' * (len(nodes) != 1)} with {'; '.join(map(_amounts, nodes[:4]))}" + "; ..." * (
        len(nodes) > 4
    )


def _amounts(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{resources.get(kind) or 0.0:g} {kind}s" for kind in ("CPU", "GPU") if kind == "CPU" or resources.get(kind))
