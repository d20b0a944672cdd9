"""A cluster's dashboard, whose Jobs API takes jobs: its address, the token, and an error with the way out when it does not answer.

    --address http://head:8265                 said in the command
    RAY_API_SERVER_ADDRESS=http://head:8265    or in the environment (or RAY_ADDRESS)
    cluster.yaml                               or, through ssh, the cluster that the launcher's file in the current folder describes

The Jobs API runs code for whoever reaches it, so clusters ask for a token. Ray keeps it in RAY_AUTH_TOKEN, in the file that
RAY_AUTH_TOKEN_PATH names or in ~/.ray/auth_token, and its own client sends it only where RAY_AUTH_MODE=token is set; this one sends it
wherever Ray finds one (RAY_AUTH_MODE=disabled keeps it at home). It is never printed, and where it would travel unencrypted over a
network a word is said.

>>> check_url("http://head:8265/", "--address")
'http://head:8265'
>>> check_url("head:6379", "RAY_ADDRESS")
Traceback (most recent call last):
rayward.errors.SettingsError: RAY_ADDRESS=head:6379 is where programs join a cluster; jobs are sent to its dashboard
  -> give its URL: --address http://head:8265
"""

from __future__ import annotations

import ipaddress
import logging
import os
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rayward.cluster.tunnel import DASHBOARD_PORT, dashboard_through_ssh
from rayward.config import public
from rayward.errors import SettingsError

ANSWER_S = 15.0  # how long an address may take to answer
ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")  # the first that is set counts, as it does for Ray


@dataclass(frozen=True)
class Target:
    """A cluster that answers."""

    url: str  # of the dashboard, without a slash at the end
    client: Any  # ray.job_submission.JobSubmissionClient
    nodes: tuple[dict[str, Any], ...]  # what the dashboard says of every node that is alive
    ray_version: str
    options: str  # what a command has to say to find this cluster again; starts with a blank, or is empty
    name: str  # what messages call it

    @property
    def here(self) -> bool:
        """Whether every node runs on this machine and sees its files: a loopback address says nothing, it may be an ssh tunnel."""
        sockets = [node.get("objectStoreSocketName") for node in self.nodes]
        return bool(sockets) and all(socket and Path(socket).exists() for socket in sockets)

    def autoscaling(self) -> bool:
        """Whether an autoscaler may add nodes: it names their kinds; a head without one names each node by its id."""
        status = (_get(self.url, "/api/cluster_status", headers()).get("data") or {}).get("clusterStatus") or {}
        kinds = (status.get("autoscalerReport") or {}).get("nodeTypeMapping")
        return kinds is None or any(not kind.startswith("node_") for kind in kinds.values())

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
        try:
            named = bool((urlsplit(address).hostname or "").encode("idna")) and urlsplit(address).port != 0
        except ValueError:
            named = False
        if named:
            return address
        raise SettingsError(f"{said_by}={address} names no machine", f"write http://HOST:{DASHBOARD_PORT}")
    shown = public(address)
    host = host_of(rest if found else address)
    if not found and re.fullmatch(r"(\[[0-9A-Fa-f:]+\]|[^:/]+)(:\d+)?", address) and address not in ("auto", "local"):
        if address.endswith(f":{DASHBOARD_PORT}"):
            raise SettingsError(f"{said_by}={shown} does not say how to speak to it", f"write http://{address}")
        raise SettingsError(
            f"{said_by}={shown} is where programs join a cluster; jobs are sent to its dashboard",
            f"give its URL: --address http://{host}:{DASHBOARD_PORT}",
        )
    where = f"http://{host}:{DASHBOARD_PORT}" if found and host else f"http://127.0.0.1:{DASHBOARD_PORT}"
    raise SettingsError(f"{said_by}={shown} is not the URL of a dashboard", f"jobs are sent over http(s)://, e.g. --address {where}")


def host_of(address: str) -> str:
    """The machine of an address, as it stands in a URL.

    >>> host_of("head:6379"), host_of("[fd00::2]:6379"), host_of("me:word@head:10001/x")
    ('head', '[fd00::2]', 'head')
    """
    where = address.partition("/")[0].rpartition("@")[2]
    return where.partition("]")[0] + "]" if where.startswith("[") else where.partition(":")[0]


@dataclass(frozen=True)
class Address:
    """Where a dashboard is: at a URL, or behind the ssh of a launcher's file."""

    url: str = ""
    launcher_file: str = ""
    options: str = ""  # with which the next command finds it


def find_address(address: str = "", cluster_file: str = "") -> Address:
    """The dashboard that was said, that of RAY_API_SERVER_ADDRESS or RAY_ADDRESS, or that of the launcher's file in this folder."""
    if address and cluster_file:
        raise SettingsError(f"--address {public(address)} and --cluster {cluster_file} are two ways to one cluster", "give one of them")
    if address:
        url = check_url(address, "--address")
        return Address(url, options=f" --address {url}")
    if cluster_file:
        return Address(launcher_file=cluster_file, options=f" --cluster {shlex.quote(cluster_file)}")
    for name in ADDRESS_VARIABLES:
        if os.environ.get(name):
            return Address(check_url(os.environ[name], name))
    if Path("cluster.yaml").is_file():
        return Address(launcher_file="cluster.yaml")
    raise SettingsError(
        "which cluster? There is no --address, no RAY_API_SERVER_ADDRESS and no cluster.yaml in this folder",
        f"ray start --head on this machine answers at --address http://127.0.0.1:{DASHBOARD_PORT}; or name its file with --cluster FILE",
    )


def headers() -> dict[str, str]:
    """The token that Ray finds, as what a request carries; empty where there is none or RAY_AUTH_MODE=disabled."""
    if _kept_at_home():
        return {}
    import ray  # noqa: F401  (the token loader is compiled into it)
    from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]
    from ray.exceptions import AuthenticationError

    loader = AuthenticationTokenLoader.instance()
    loader.reset_cache()
    try:
        found = dict(loader.get_token_for_http_header(ignore_auth_mode=True))
    except AuthenticationError as error:
        raise SettingsError(
            f"the cluster's token cannot be read: {str(error).splitlines()[0]}",
            "put it into the file that RAY_AUTH_TOKEN_PATH names, or into ~/.ray/auth_token",
        ) from None
    finally:
        loader.reset_cache()  # or a cluster that this process starts later would be met with this token
    if not all(value.isascii() and value.isprintable() for value in found.values()):
        raise SettingsError(
            "the cluster's token holds characters that no request can carry", "copy it again: one line of plain letters and digits"
        )
    return found


def _kept_at_home() -> bool:
    return (os.environ.get("RAY_AUTH_MODE") or "").lower() == "disabled"


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
    found = find_address(address, cluster_file)
    carried = headers()
    url = found.url or dashboard_through_ssh(found.launcher_file)
    _past_proxies(url)
    if carried and not _protected(url):
        print(
            f"the token travels unencrypted to {url}; through ssh it does not: {_ssh_to(url)}  and then --address "
            f"http://127.0.0.1:{DASHBOARD_PORT}",
            file=sys.stderr,
        )
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
    name = found.url or f"the head of {found.launcher_file}"
    return Target(url, client, tuple(nodes), version["ray_version"], found.options, name)


def _protected(url: str) -> bool:
    """Whether what is sent to a URL is encrypted, or never leaves this machine.

    >>> [_protected(url) for url in ("https://head", "http://127.0.0.1:8265", "http://[::1]:8265", "http://localhost", "http://head:8265")]
    [True, True, True, True, False]
    """
    return url.startswith("https://") or loopback(urlsplit(url).hostname or "")


def loopback(host: str) -> bool:
    """Whether a host is this machine, and what is sent there never leaves it.

    >>> loopback("127.0.0.2"), loopback("::1"), loopback("localhost"), loopback("10.0.0.4")
    (True, True, True, False)
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return host == "localhost"


def _past_proxies(url: str) -> None:
    """What goes to this machine goes there itself: a proxy of the environment could not find it, and would read the token."""
    if _protected(url) and url.startswith("http://"):
        past = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
        os.environ.update(dict.fromkeys(("no_proxy", "NO_PROXY"), ",".join(filter(None, (past, urlsplit(url).hostname)))))


def _ssh_to(url: str) -> str:
    return f"ssh -N -L {DASHBOARD_PORT}:127.0.0.1:{urlsplit(url).port or DASHBOARD_PORT} USER@{urlsplit(url).hostname}"


def _get(url: str, path: str, carried: dict[str, str]) -> dict[str, Any]:
    """A JSON object of the dashboard, or SettingsError that says what stands in the way."""
    import requests

    try:
        answer = requests.get(url + path, headers=carried, timeout=ANSWER_S, allow_redirects=False)
    except (requests.exceptions.SSLError, requests.exceptions.InvalidURL) as error:
        plain = f"http://{host_of(url.partition('://')[2])}:{urlsplit(url).port or DASHBOARD_PORT}"
        way_out = f"Ray's own dashboard speaks http: --address {plain}"
        raise SettingsError(f"{url} cannot be spoken to: {type(error).__name__}", way_out) from None
    except requests.exceptions.RequestException:
        way_out = (
            "is a cluster running here (ray start --head), with this dashboard port (--dashboard-port), or is the ssh tunnel down?"
            if _protected(url)
            else f"a dashboard listens on its own machine only: {_ssh_to(url)}  and then --address http://127.0.0.1:{DASHBOARD_PORT}"
        )
        raise SettingsError(f"no Ray cluster answers at {url}", way_out) from None
    _check_status(url, answer.status_code)
    try:
        found = answer.json()
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise SettingsError(f"what answers at {url} is not Ray's dashboard", _PORTS)
    return found


_PORTS = f"its port is {DASHBOARD_PORT} unless --dashboard-port said otherwise; `ray start --head` prints the address"


def _check_status(url: str, status: int) -> None:
    """SettingsError for an answer that is none."""
    if status == 401:
        raise SettingsError(
            f"{url} asks for a token, and none was sent",
            "set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to a file with the cluster's token (`ray get-auth-token` on the head shows it)"
            + ("; RAY_AUTH_MODE=disabled keeps it from being sent" if _kept_at_home() else ""),
        )
    if status == 403:
        raise SettingsError(
            f"{url} does not accept the token that was sent",
            "it is looked for in RAY_AUTH_TOKEN, then in the file RAY_AUTH_TOKEN_PATH, then in ~/.ray/auth_token: which one is old?",
        )
    if status >= 500:
        raise SettingsError(f"{url} cannot serve (status {status})", "is the head still starting? `ray status` there says how it is")
    if status != 200:
        raise SettingsError(f"what answers at {url} is not Ray's dashboard (status {status})", _PORTS)
