"""What waits for a place says so: what it asks for, what is free, and who holds the rest.

    with watch("score_rollouts", {"CPU": 1, "GPU": 1}) as key:
        ...                          # start workers, each of which says begun(key) before anything else
        ...                          # until the first does, a word on stderr after 30 s and every minute

Ray waits in silence, for a minute or for ever. What no machine of the cluster can hold is an error at once, unless an autoscaler is there
that might bring a larger one.
"""

from __future__ import annotations

import json
import os
import secrets
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from rayward.config import public
from rayward.errors import SettingsError

T = TypeVar("T")

AFTER_S = 30.0  # how long a worker may take to begin before a word is said
EVERY_S = 60.0  # and how long until the next
LOOK_S = 1.0  # between two looks
UNITS = {"CPU": "CPUs", "GPU": "GPUs", "memory": "GiB of memory"}


def autoscaling() -> bool:
    """Whether an autoscaler may add nodes: it names the kinds of nodes it knows, and a head without one names each node by its id."""
    import ray
    from ray.experimental.internal_kv import _internal_kv_get

    if ray._private.state.state.get_cluster_config() is not None:
        return True
    status = json.loads(_internal_kv_get("__autoscaling_status") or b"{}")
    kinds = (status.get("autoscaler_report") or {}).get("active_nodes") or {}
    return any(not kind.startswith("node_") for kind in kinds)


def addable() -> list[dict[str, float]]:
    """What one machine has, of every kind that an autoscaler may add, as far as it says (KubeRay's does, the launcher's does not)."""
    import ray

    config = ray._private.state.state.get_cluster_config()
    groups = config.node_group_configs if config is not None else ()
    return [{kind: float(much) for kind, much in group.resources.items()} for group in groups if group.max_count]


def machines() -> list[dict[str, float]]:
    """What one machine has in all, of those that are there and of every kind that may come."""
    import ray

    return [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]] + addable()


def may_surprise() -> bool:
    """Whether an autoscaler may add machines and does not say of which kinds."""
    return autoscaling() and not addable()


def check_fits(asked: Mapping[str, float]) -> None:
    """SettingsError if no machine of the cluster has as much as one worker asks for, and none can come."""
    known = machines()
    if any(all((has.get(kind) or 0.0) >= much for kind, much in asked.items()) for has in known) or may_surprise():
        return
    most = {kind: max(((has.get(kind) or 0.0) for has in known), default=0.0) for kind in asked}
    raise SettingsError(
        f"a worker asks for {_words(asked)}, and no machine of this cluster has that: the most is {_words(most)}",
        "ask for less, or add a machine that has it",
    )


@contextmanager
def watch(what: str, asked: Mapping[str, float], *, workers: int = 1, after_s: float = AFTER_S, every_s: float = EVERY_S) -> Iterator[str]:
    """Speak while none of the workers has begun; `asked` is what one of them asks for (CPU, GPU, memory in bytes).

    Gives the key that a worker hands to `begun`. SettingsError if no machine can ever hold one.
    """
    check_fits(asked)
    key, over = f"rayward-placed-{secrets.token_hex(8)}", threading.Event()
    watcher = threading.Thread(target=_speak, args=(key, over, what, dict(asked), workers, after_s, every_s), daemon=True)
    watcher.start()
    try:
        yield key
    finally:
        over.set()
        watcher.join(5.0)
        _forget(key)


def begun(key: str) -> None:
    """A worker says that it has its place."""
    from ray.experimental.internal_kv import _internal_kv_put

    _internal_kv_put(key, b"1")


def begin(key: str, make: Callable[[], T]) -> T:
    """What a worker does first: it says that it has its place, and closes its eyes to GPUs that are not its own; then it goes on.

    Ray hides the GPUs of others only from workers that hold some (RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0, the coming default).
    """
    import ray

    if not ray.get_runtime_context().get_assigned_resources().get("GPU"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    begun(key)
    return make()


def _forget(key: str) -> None:
    import ray
    from ray.experimental.internal_kv import _internal_kv_del

    if ray.is_initialized():
        _internal_kv_del(key)


def _speak(key: str, over: threading.Event, what: str, asked: dict[str, float], workers: int, after_s: float, every_s: float) -> None:
    """The watcher's thread: until a worker has begun or all is over."""
    from ray.experimental.internal_kv import _internal_kv_exists

    waited, next_word = 0.0, after_s
    while not over.wait(min(LOOK_S, after_s)):
        waited += min(LOOK_S, after_s)
        try:
            if _internal_kv_exists(key):
                return
            if waited >= next_word:
                next_word += every_s
                print(situation(what, asked, workers, waited), file=sys.stderr, flush=True)
        except Exception:  # the cluster went away: whoever works there says so better
            return


def situation(what: str, asked: Mapping[str, float], workers: int, waited_s: float) -> str:
    """What is asked for, what is free, and who holds the rest."""
    import ray

    free = list(ray._private.state.available_resources_per_node().values())
    room = any(all((has.get(kind) or 0.0) >= much for kind, much in asked.items()) for has in free)
    total = ray.cluster_resources()
    left = ray.available_resources()
    shown = ", ".join(f"{_in_units(kind, left.get(kind))} of {_in_units(kind, total.get(kind))} {UNITS.get(kind, kind)}" for kind in asked)
    each = "each " if workers > 1 else ""
    said = f"{what}: no worker has begun for {waited_s:.0f} s. Asked for: {workers} x {_words(asked)}; {each}free: {shown}"
    if room:
        return said + "; there is room for one, and Ray is starting it"
    others = holders()
    if others:
        said += "; held by " + ", ".join(others)
    return said + ("; an autoscaler may add a machine" if autoscaling() else "") + "\n  -> wait, stop another job, or ask for less"


def holders() -> list[str]:
    """The jobs that are on the cluster beside this one, with how many actors each keeps."""
    import ray

    mine = ray.get_runtime_context().get_job_id()
    actors: dict[str, int] = {}
    for actor in ray._private.state.actors(actor_state_name="ALIVE").values():
        actors[actor["JobID"]] = actors.get(actor["JobID"], 0) + 1
    found = []
    for job in ray._private.state.jobs():
        if job["IsDead"] or job["JobID"] == mine:
            continue
        words = [os.path.basename(word) for word in (job["Entrypoint"] or "").split()[:3]]  # no more: arguments are its user's own
        kept = actors.get(job["JobID"], 0)
        where = f"process {job['DriverPid']} on {job['DriverIPAddress']}"
        found.append(f"{public(' '.join(words))[:60] or 'a driver'} ({where}{f', {kept} actors' if kept else ''})")
    return found


def _words(asked: Mapping[str, Any]) -> str:
    """Resources in words.

    >>> _words({"CPU": 1, "GPU": 0.5}), _words({"CPU": 2, "memory": 3 * 2**29})
    ('1 CPU and 0.5 GPU', '2 CPU and 1.5 GiB of memory')
    """
    return " and ".join(f"{_in_units(kind, much)} {UNITS[kind] if kind == 'memory' else kind}" for kind, much in asked.items())


def _in_units(kind: str, much: float | None) -> str:
    """An amount in the unit of UNITS; Ray counts memory in bytes."""
    return f"{round((much or 0.0) / (2**30 if kind == 'memory' else 1), 2):g}"
