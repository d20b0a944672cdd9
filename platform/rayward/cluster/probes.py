"""What a node can be asked: plain functions that a task runs there. They need nothing of this package, except where they say so.

>>> reach("127.0.0.1", 9)  # doctest: +ELLIPSIS
'...refused...'
"""

from __future__ import annotations

import glob
import importlib.metadata
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from http.client import HTTPException
from typing import Any

COUNT_GPUS = "import torch; print(torch.cuda.device_count())"


def clock() -> float:
    """Seconds since the epoch, as this node has them."""
    return time.time()


def facts(packages: list[str], gpus: float) -> dict[str, Any]:
    """Versions, GPUs (as torch sees them; -1 where Ray has none, and as devices), and the disk that Ray writes to, in bytes."""
    import ray

    seen = -1
    if gpus:
        env = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}  # Ray hides them from this task
        done = subprocess.run([sys.executable, "-c", COUNT_GPUS], env=env, capture_output=True, text=True)
        seen = int(done.stdout) if done.stdout.strip().isdigit() else 0
    disk = shutil.disk_usage(ray._private.worker.global_worker.node.get_session_dir_path())
    return {
        "versions": {"python": platform.python_version(), **{package: version(package) for package in packages}},
        "gpus_seen": seen,
        "devices": len(glob.glob("/dev/nvidia[0-9]*")),
        "disk_total": disk.total,
        "disk_free": disk.free,
    }


def version(package: str) -> str:
    """The version of an installed package, or `none`.

    >>> version("no-such-package")
    'none'
    """
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def doors(host: str, port: int, path: str) -> dict[str, Any]:
    """Of a server on this node: at which addresses it listens, and what it says without and with this node's token (0: nothing)."""
    from ray._private.authentication.http_token_authentication import get_auth_headers_if_auth_enabled

    hosts = ["127.0.0.1", host]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as outward:  # sends nothing: says which of our addresses would be used
        try:
            outward.connect(("192.0.2.1", 9))
            hosts.append(outward.getsockname()[0])
        except OSError:
            pass
    listens = [host for host in dict.fromkeys(hosts) if reach(host, port) == "200"]
    if not listens:
        return {"listens": [], "without": 0, "with": 0}
    named = f"[{listens[0]}]" if ":" in listens[0] else listens[0]
    url = f"http://{named}:{port}{path}"
    return {"listens": listens, "without": _status(url, {}), "with": _status(url, get_auth_headers_if_auth_enabled({}))}


def _status(url: str, headers: dict[str, str]) -> int:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        return int(opener.open(urllib.request.Request(url, headers=headers), timeout=5).status)
    except urllib.error.HTTPError as error:
        return int(error.code)
    except (OSError, HTTPException):  # nothing, or no HTTP
        return 0


def write(place: str, name: str) -> str:
    """Leave a word in a shared place; needs this package there."""
    from rayward import places

    places.write(places.at(place) / name, name)
    return name


def read(place: str, names: list[str]) -> list[str]:
    """Which of some words are in a shared place; needs this package there."""
    from rayward import places

    found: list[str] = []
    for attempt in range(10):  # a network file system may take a moment to see what others wrote
        time.sleep(0.5 if attempt else 0)
        found = [name for name in names if _there(places, place, name)]
        if len(found) == len(names):
            break
    return found


def _there(places: Any, place: str, name: str) -> bool:
    try:
        return bool(places.read(places.at(place) / name) == name.encode())
    except FileNotFoundError:
        return False


def forget(place: str) -> None:
    """Take a shared place away, where it is seen; needs this package there."""
    from rayward import places

    places.remove(places.at(place))


def get(url: str) -> str:
    """What an HTTP server says to a GET: its status, or why there is none."""
    try:
        return str(urllib.request.urlopen(url, timeout=10).status)
    except urllib.error.HTTPError as error:
        return str(error.code)
    except (OSError, HTTPException, UnicodeError) as error:
        return str(getattr(error, "reason", error))


def reach(host: str, port: int) -> str:
    """`200` where a TCP port takes connections, or why it does not."""
    try:
        socket.create_connection((host, port), timeout=3).close()
    except (OSError, OverflowError, UnicodeError) as error:  # the last two: of a name or a port that is none
        return str(error)
    return "200"
