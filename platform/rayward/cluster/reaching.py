"""Reaching a cluster's Jobs API: its address, the token, and an error with the way out when it does not answer.

    --address http://head:8265      said in the command
    RAY_ADDRESS=http://head:8265    or in the environment
    cluster.yaml                    or the head of the cluster that the launcher's file in the current folder describes

The Jobs API runs code for whoever reaches it, so clusters ask for a token. Ray keeps it in RAY_AUTH_TOKEN, in the file that
RAY_AUTH_TOKEN_PATH names or in ~/.ray/auth_token, and its own client sends it only where RAY_AUTH_MODE=token is set; this one sends it
wherever Ray finds one (RAY_AUTH_MODE=disabled keeps it at home). It is never printed.

>>> check_url("http://head:8265/", "--address")
'http://head:8265'
>>> check_url("head:6379", "RAY_ADDRESS")
Traceback (most recent call last):
rayward.errors.SettingsError: RAY_ADDRESS=head:6379 is where programs join a cluster; jobs are sent to its dashboard
  -> give its URL: --address http://head:8265
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayward.config import public
from rayward.errors import SettingsError

DASHBOARD_PORT = 8265
ANSWER_S = 15.0  # how long an address may take to answer
ADDRESS_VARIABLES = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")


@dataclass(frozen=True)
class Target:
    """A cluster that answers."""

    url: str  # of the dashboard, without a slash at the end
    client: Any  # ray.job_submission.JobSubmissionClient
    nodes: tuple[dict[str, Any], ...]  # what the dashboard says of every node that is alive
    ray_version: str
    options: str  # what a command has to say to find this cluster again; starts with a blank, or is empty

    @property
    def here(self) -> bool:
        """Whether every node runs on this machine and sees its files: a loopback address says nothing, it may be an ssh tunnel."""
        sockets = [node.get("objectStoreSocketName") for node in self.nodes]
        return bool(sockets) and all(socket and Path(socket).exists() for socket in sockets)

    def room(self, **asked: float) -> bool:
        """Whether some node has as much in all, busy or not: `room(CPU=2, GPU=1, memory=2**30)`."""
        return any(all((node["resourcesTotal"].get(name) or 0.0) >= n for name, n in asked.items()) for node in self.nodes)


def check_url(address: str, said_by: str) -> str:
    """The address as the URL of a dashboard, or SettingsError."""
    address = address.strip().rstrip("/")
    scheme, found, rest = address.partition("://")
    if found and scheme in ("http", "https") and rest:
        if "@" in rest.partition("/")[0]:
            raise SettingsError(f"{said_by}={public(address)} came with a password", "leave it out; tokens go into RAY_AUTH_TOKEN")
        return address
    host = (rest if found else address).partition("/")[0].partition(":")[0]
    if not found and re.fullmatch(r"[^:/]+(:\d+)?", address) and address not in ("auto", "local"):
        if address.endswith(f":{DASHBOARD_PORT}"):
            raise SettingsError(f"{said_by}={address} does not say how to speak to it", f"write http://{address}")
        raise SettingsError(
            f"{said_by}={address} is where programs join a cluster; jobs are sent to its dashboard",
            f"give its URL: --address http://{host}:{DASHBOARD_PORT}",
        )
    where = f"http://{host}:{DASHBOARD_PORT}" if found and host else f"http://127.0.0.1:{DASHBOARD_PORT}"
    raise SettingsError(
        f"{said_by}={address} is not the URL of a dashboard", f"jobs are sent over http:// or https://, e.g. --address {where}"
    )


def find_address(address: str = "", cluster_file: str = "") -> tuple[str, str]:
    """The dashboard's URL, and the options with which the next command finds it: said, of RAY_ADDRESS, or of the launcher's file."""
    if address:
        url = check_url(address, "--address")
        return url, f" --address {url}"
    if cluster_file:
        return _of_launcher(cluster_file), f" --cluster {cluster_file}"
    for name in reversed(ADDRESS_VARIABLES):
        if os.environ.get(name):
            return check_url(os.environ[name], name), ""
    if Path("cluster.yaml").is_file():
        return _of_launcher("cluster.yaml"), ""
    raise SettingsError(
        "which cluster? There is no --address, no RAY_ADDRESS and no cluster.yaml in this folder",
        f"ray start --head on this machine answers at --address http://127.0.0.1:{DASHBOARD_PORT}; or name its file with --cluster FILE",
    )


def _of_launcher(file: str) -> str:
    """The dashboard of the cluster that a file of Ray's cluster launcher describes."""
    import yaml

    try:
        with open(file, encoding="utf-8") as opened:
            config = yaml.safe_load(opened)
        provider = config["provider"]
        kind = provider["type"]
    except OSError as error:
        raise SettingsError(f"--cluster {file} cannot be read: {error.strerror}", "give the file that `ray up` took") from None
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError):
        raise SettingsError(f"{file} is not a file of Ray's cluster launcher: it names no provider.type", "see cluster.yaml") from None
    if kind == "local" and provider.get("head_ip"):
        return f"http://{provider['head_ip']}:{DASHBOARD_PORT}"
    from ray.autoscaler.sdk import get_head_node_ip

    logging.getLogger("ray.autoscaler").setLevel(logging.ERROR)
    try:
        return f"http://{get_head_node_ip(file)}:{DASHBOARD_PORT}"
    except Exception as error:  # every cloud has errors of its own, and libraries that may be missing
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise SettingsError(
            f"the head of {file} cannot be found: {first}",
            f"is it up (ray up {file})? Or forward its dashboard (ray dashboard {file}) and say --address http://127.0.0.1:{DASHBOARD_PORT}",
        ) from None


def headers() -> dict[str, str]:
    """The token that Ray finds, as what a request carries; empty where there is none or RAY_AUTH_MODE=disabled."""
    if (os.environ.get("RAY_AUTH_MODE") or "").lower() == "disabled":
        return {}
    import ray  # noqa: F401  (the token loader is compiled into it)
    from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]
    from ray.exceptions import AuthenticationError

    loader = AuthenticationTokenLoader.instance()
    loader.reset_cache()
    try:
        return dict(loader.get_token_for_http_header(ignore_auth_mode=True))
    except AuthenticationError as error:
        raise SettingsError(
            f"the cluster's token cannot be read: {str(error).splitlines()[0]}",
            "put it into the file that RAY_AUTH_TOKEN_PATH names, or into ~/.ray/auth_token",
        ) from None


@contextmanager
def _as_said() -> Iterator[None]:
    """Ray lets RAY_ADDRESS overrule the address that its client is given; we have decided already."""
    kept = {name: os.environ.pop(name) for name in ADDRESS_VARIABLES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


def reach(address: str = "", cluster_file: str = "") -> Target:
    """The cluster, once it answers; SettingsError with the way out where it does not."""
    url, options = find_address(address, cluster_file)
    carried = headers()
    version = _get(url, "/api/version", carried)
    if "ray_version" not in version:
        raise SettingsError(f"what answers at {url} is not Ray's dashboard", "`ray start --head` prints the dashboard's address")
    from ray.job_submission import JobSubmissionClient

    for name in ("ray.dashboard.modules.job.sdk", "ray.dashboard.modules.dashboard_sdk", "ray._private.runtime_env.packaging"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with _as_said():
        client = JobSubmissionClient(url, headers=carried)
    summary = (_get(url, "/nodes?view=summary", carried).get("data") or {}).get("summary") or []
    nodes = [node["raylet"] for node in summary if (node.get("raylet") or {}).get("state") == "ALIVE"]
    return Target(url, client, tuple(nodes), version["ray_version"], options)


def _get(url: str, path: str, carried: dict[str, str]) -> dict[str, Any]:
    """A JSON object of the dashboard, or SettingsError that says what stands in the way."""
    import requests

    host, _, port = url.partition("://")[2].partition("/")[0].partition(":")
    tunnel = f"ssh -N -L {DASHBOARD_PORT}:127.0.0.1:{port or DASHBOARD_PORT} USER@{host}"
    local = host in ("127.0.0.1", "localhost", "[::1]")
    try:
        answer = requests.get(url + path, headers=carried, timeout=ANSWER_S, allow_redirects=False)
    except (requests.exceptions.SSLError, requests.exceptions.InvalidURL) as error:
        way_out = f"Ray's own dashboard speaks http: --address http://{host}:{port or DASHBOARD_PORT}"
        raise SettingsError(f"{url} cannot be spoken to: {type(error).__name__}", way_out) from None
    except requests.exceptions.RequestException:
        way_out = (
            "is a cluster running here (ray start --head), with this dashboard port (--dashboard-port), or is the ssh tunnel down?"
            if local
            else f"a dashboard listens on its own machine only: {tunnel}  and then --address http://127.0.0.1:{DASHBOARD_PORT}"
        )
        raise SettingsError(f"no Ray cluster answers at {url}", way_out) from None
    if answer.status_code == 401:
        raise SettingsError(
            f"{url} asks for a token, and none was sent",
            "set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to a file with the cluster's token (`ray get-auth-token` on the head shows it)"
            + ("; RAY_AUTH_MODE=disabled keeps it from being sent" if os.environ.get("RAY_AUTH_MODE") else ""),
        )
    if answer.status_code == 403:
        raise SettingsError(
            f"{url} does not accept the token that was sent",
            "it is looked for in RAY_AUTH_TOKEN, then in the file RAY_AUTH_TOKEN_PATH, then in ~/.ray/auth_token: which one is old?",
        )
    try:
        found = answer.json()
    except ValueError:
        found = None
    if answer.status_code != 200 or not isinstance(found, dict):
        raise SettingsError(
            f"what answers at {url} is not Ray's dashboard (status {answer.status_code})",
            f"its port is {DASHBOARD_PORT} unless --dashboard-port said otherwise; `ray start --head` prints the address",
        )
    return found
