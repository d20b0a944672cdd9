"""The only place that starts or joins Ray.

with connect():      # joins RAY_ADDRESS if it is set, else a cluster of its own on this machine's cores
    ...
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rayward.cluster import placement
from rayward.config import public
from rayward.errors import SettingsError

OBJECT_STORE_BYTES = 512 * 2**20  # of a cluster of our own: what passes through it are names of files and counts, never the rows


def cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def on_cluster() -> bool:
    """Whether this process is told of a cluster, or already on one."""
    return bool(os.environ.get("RAY_ADDRESS"))


def gpus_each(asked: float) -> float:
    """The GPUs that a worker holds: as many as asked for, or, for -1, one where the cluster has any or its autoscaler may add some.

    Raises:
        SettingsError: if no machine of the cluster has as many, and no autoscaler might bring one; Ray would wait for ever.
    """
    most = max((kind.get("GPU") or 0.0 for kind in placement.machines()), default=0.0)
    if asked < 0:
        if not most and placement.may_surprise():
            print("no GPU is there now, and the autoscaler does not say what it may add: CPUs are used (gpus=1 waits)", file=sys.stderr)
        return min(1.0, most)
    if asked > most and not placement.may_surprise():
        raise SettingsError(f"gpus={asked:g}: no machine of this cluster has more than {most:g}", "ask for fewer, or 0 to work on CPUs")
    return asked


def quiet(*loggers: str) -> None:
    """Our own bar speaks; Ray's lines about plans and hints do not. RAYWARD_RAY_LOGS=1 lets them, and what workers print."""
    if not os.environ.get("RAYWARD_RAY_LOGS"):
        for name in loggers:
            logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def connect() -> Iterator[Any]:
    """Ray, started or joined; what was started here is stopped at the end, what was there before stays."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no telemetry unless the user asks for it
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")  # or every line of a worker stands twice
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # the coming default, which spares a warning
    import ray

    quiet("ray._private.authentication.authentication_token_setup")
    address = os.environ.get("RAY_ADDRESS")
    if "://" in (address or ""):
        raise SettingsError(
            f"RAY_ADDRESS={public(address or '')} takes jobs, and programs do not join a cluster there",
            "send the command as a job: rayward submit NAME ...; or, on a machine of the cluster, RAY_ADDRESS=HOST:6379",
        )
    if ray.is_initialized():
        yield ray
        return
    spoken = bool(os.environ.get("RAYWARD_RAY_LOGS"))  # what workers print; their errors come home in any case
    if address:
        _join(ray, address, log_to_driver=spoken, logging_level=logging.WARNING)
    else:
        print(f"starting Ray on {cores()} cores", file=sys.stderr)
        ray.init(
            address="local",  # also where `ray start` left word of a cluster on this machine
            num_cpus=cores(),
            object_store_memory=OBJECT_STORE_BYTES,
            include_dashboard=False,
            log_to_driver=spoken,
            logging_level=logging.WARNING,
        )
    try:
        yield ray
    finally:
        ray.shutdown()


def _join(ray: Any, address: str, **how: Any) -> None:
    """Join the cluster at an address; SettingsError with the way out where that cannot be."""
    try:
        ray.init(address=address, **how)
    except ConnectionError as error:
        raise SettingsError(
            f"no Ray cluster answers at RAY_ADDRESS={address}: {error}",
            "start one with  ray start --head  or unset RAY_ADDRESS",
        ) from None
    except ray.exceptions.AuthenticationError as error:
        raise SettingsError(
            f"the cluster at RAY_ADDRESS={address} refuses this machine: {str(error).splitlines()[0]}",
            "RAY_AUTH_MODE=token, with the token of the head in RAY_AUTH_TOKEN or ~/.ray/auth_token; more: rayward cluster check",
        ) from None
    except RuntimeError as error:
        if "ersion mismatch" not in str(error):
            raise
        said = " ".join(line.strip() for line in str(error).splitlines())
        raise SettingsError(f"the cluster at RAY_ADDRESS={address} has another Ray or Python: {said}", "use the same here") from None
