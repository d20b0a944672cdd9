"""The nodes of a cluster that is there already: which they are, and what each of them says when it is asked the same question.

    with cluster.connect():
        for node, said in on_each(alive(), probes.facts, 30.0, packages=["ray"], gpus=0).items(): ...

A node that does not answer within the limit is an answer too (a `Silence`), and never a hang. The questions (`probes`) travel with their
code, so that a node on which this package is missing can still say so. No secret travels: a node uses the token it has.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from rayward.cluster import probes

KNOCK_S = 20.0  # how long a head may take to answer, and the program that asks it to start
KNOCK = """
import sys
from ray._raylet import GcsClient
from ray.exceptions import AuthenticationError
try:
    GcsClient(address=sys.argv[1]).internal_kv_keys(b"", b"dashboard", timeout=5)
    print("answered")
except AuthenticationError:
    print("refused")
except Exception as error:
    print(type(error).__name__)
"""  # the way in is chosen once per process, so each try is a process of its own


@dataclass(frozen=True)
class Node:
    """A node that is alive."""

    id: str
    name: str  # its address, and where several share one, the beginning of its id
    address: str
    head: bool
    cpus: float
    gpus: float
    memory_bytes: float  # for tasks, as Ray counts it
    agent_port: int  # of its agent, which takes jobs too


class Silence(NamedTuple):
    """What stands for the answer of a node that gave none."""

    why: str


def last_started() -> str:
    """The address of the cluster that `ray start` started last on this machine, or nothing."""
    from ray._private.services import find_bootstrap_address

    return find_bootstrap_address(None) or ""


def knock(address: str, mode: str) -> str:
    """What the head at an address (host:port) says to a client with or without a token (mode `token` or `disabled`).

    `answered`, `refused` for a token that is missing or wrong, or the name of another error.
    """
    env = {**os.environ, "RAY_AUTH_MODE": mode}
    try:
        done = subprocess.run([sys.executable, "-c", KNOCK, address], env=env, capture_output=True, text=True, timeout=KNOCK_S)
    except subprocess.TimeoutExpired:
        return f"no answer within {KNOCK_S:g} s"
    nothing = "refused" if mode == "token" else f"the program that asks ended with exit code {done.returncode}"
    return done.stdout.strip() or nothing  # without any token Ray ends the process


def alive() -> list[Node]:
    """The nodes that are alive, the head first."""
    import ray

    rows = [row for row in ray.nodes() if row["Alive"]]
    addresses = [row["NodeManagerAddress"] for row in rows]
    found = []
    for row in rows:
        resources, address = row["Resources"], row["NodeManagerAddress"]
        name = address if addresses.count(address) == 1 else f"{address}#{row['NodeID'][:4]}"
        head = "node:__internal_head__" in resources
        cpus, gpus, memory = (resources.get(kind) or 0.0 for kind in ("CPU", "GPU", "memory"))
        found.append(Node(row["NodeID"], name, address, head, cpus, gpus, memory, row["DashboardAgentListenPort"]))
    return sorted(found, key=lambda node: (not node.head, node.name))


def dashboard_url() -> str:
    """host:port of the dashboard and its Jobs API (nothing where there is none)."""
    from ray.experimental.internal_kv import _internal_kv_get

    return str((_internal_kv_get("webui:url", namespace="dashboard") or b"").decode())


def on_each(
    asked: Sequence[Node],
    question: Callable[..., Any],
    limit_s: float,
    said: Mapping[str, Mapping[str, Any]] | None = None,
    env: Mapping[str, str] | None = None,
    **always: Any,
) -> dict[str, Any]:
    """What every node answers to a question (a function of `probes`), by the node's name; a Silence where it gives none in time.

    `always` is said to all of them, `said` to each by its name; `env` are variables of its environment.
    """
    if not asked:
        return {}
    import ray
    from ray import cloudpickle
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    cloudpickle.register_pickle_by_value(probes)  # or a node without this package could not even say so
    task, environment = ray.remote(question), {"env_vars": dict(env)} if env else None
    waiting = {}
    for node in asked:
        pinned = NodeAffinitySchedulingStrategy(node.id, soft=False)
        there = task.options(num_cpus=0, max_retries=0, runtime_env=environment, scheduling_strategy=pinned)
        waiting[there.remote(**always, **((said or {}).get(node.name) or {}))] = node.name
    ray.wait(list(waiting), num_returns=len(waiting), timeout=limit_s)
    answers: dict[str, Any] = {}
    for reference, name in waiting.items():
        ready, _ = ray.wait([reference], timeout=0)
        if not ready:
            ray.cancel(reference, force=True)
            answers[name] = Silence(f"no answer within {limit_s:g} s")
            continue
        try:
            answers[name] = ray.get(reference)
        except ray.exceptions.RayError as error:
            answers[name] = Silence(_shortly(error))
    return answers


def clock_offsets(asked: Sequence[Node], limit_s: float, rounds: int = 5) -> dict[str, tuple[float, float]]:
    """(seconds a node's clock is ahead of this one, bound of the error in seconds), of the nodes that answer.

    The node's clock is read between two readings of ours and compared with their middle; it is off by half the way there and back at most.
    """
    best: dict[str, tuple[float, float]] = {}
    for node in asked:
        for _ in range(rounds):
            before = time.time()
            there = on_each([node], probes.clock, limit_s)[node.name]
            after = time.time()
            if isinstance(there, Silence):
                break
            measured = (there - (before + after) / 2, (after - before) / 2)
            if node.name not in best or measured[1] < best[node.name][1]:
                best[node.name] = measured
    return best


def _shortly(error: Exception) -> str:
    """The last line of an error that came home from a worker."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
