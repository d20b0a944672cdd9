"""Is the cluster well? One finding a line, with the way out where it is not. Nothing is started, and what is written is taken away again.

    rayward cluster check --address 10.0.0.4:6379 --store s3://bucket/rayward

`look` asks; the functions below it judge what was said, and need no cluster:

    >>> print(versions({"a": {"versions": {"torch": "2.13"}}, "b": {"versions": {"torch": "2.12"}}}).says)
    torch 2.13 on a, 2.12 on b
    >>> door("Jobs API", 8265, {"head": {"listens": ["127.0.0.1", "10.0.0.4"], "without": 200, "with": 200}}).verdict
    'red'
"""

from __future__ import annotations

import base64
import contextlib
import os
import secrets
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from http.client import HTTPException
from typing import Any, Literal

from rayward import cluster, places, registry
from rayward.cluster import nodes, probes
from rayward.cluster.dashboard import host_of, loopback
from rayward.cluster.nodes import Node, Silence
from rayward.config import public
from rayward.errors import RaywardError, RegistryError

Verdict = Literal["green", "yellow", "red"]
Answers = Mapping[str, Any]  # of every node by its name; a Silence where it gave none

LIMIT_S = 30.0  # how long a node may take to answer
PACKAGES = ["ray", "rayward", "torch", "transformers", "pyarrow", "mlflow"]
SKEW_S = 1.0  # clocks farther apart than this are worth a word: logs and metrics of two nodes no longer line up
SKEW_BAD_S = 60.0  # and farther than this are wrong: signatures and tokens of object stores run out early
DISK_USED = 0.95  # above this Ray refuses to spill objects to the disk
DISK_LOW_BYTES = 10 * 2**30
START = "export RAY_AUTH_MODE=token; ray get-auth-token --generate >/dev/null; ray start --head"
CLOSE = "restart every node with RAY_AUTH_MODE=token in its environment and the token of the head in RAY_AUTH_TOKEN or ~/.ray/auth_token"
REFUSED = (401, 403)
PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}  # of databases, where an address names none


@dataclass(frozen=True)
class Finding:
    """A line of the check: green is well, yellow wants a look, red is broken or open to strangers."""

    what: str
    verdict: Verdict
    says: str
    way_out: str = ""


@dataclass(frozen=True)
class Report:
    """What was found at an address (host:port of the head; nothing where no cluster is named)."""

    address: str
    findings: list[Finding]
    nodes: list[dict[str, Any]] = field(default_factory=list)

    @property
    def well(self) -> bool:
        """Whether nothing is red."""
        return all(finding.verdict != "red" for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """For scripts."""
        return {**asdict(self), "well": self.well}


def look(address: str = "", store: str = "", limit_s: float = LIMIT_S) -> Report:
    """Check the cluster at an address (host:port; empty: RAY_ADDRESS, or the one that `ray start` started last on this machine)."""
    address = address or os.environ.get("RAY_ADDRESS") or ""
    if address in ("", "auto"):
        address = nodes.last_started()
    if store:
        os.environ["RAYWARD_STORE"] = store
    where = str(places.store())
    reached = _reach(address)
    if reached.verdict == "red":
        return Report(address, [reached, *_from_here(where)])
    os.environ["RAY_ADDRESS"] = address
    with contextlib.ExitStack() as joined:
        try:
            joined.enter_context(cluster.connect())
        except Exception as error:  # Ray has many kinds for this, also plain ones
            said = (str(error) or type(error).__name__).splitlines()[0]
            way_out = "use the Python and the Ray of the cluster here" if "ersion mismatch" in said else "see the log of the head"
            return Report(address, [Finding("Ray", "red", f"{address} cannot be joined: {said}", way_out), *_from_here(where)])
        return _on_cluster(address, where, limit_s)


def _reach(address: str) -> Finding:
    """Whether the head answers, and lets us in. What it needs for that is set: RAY_AUTH_MODE."""
    if not address:
        return Finding("Ray", "red", "no cluster is named, and none was started on this machine", START + "  (a laptop alone needs none)")
    if "://" in address:
        way_out = f"name the head: rayward cluster check --address {host_of(address.partition('://')[2]) or 'HOST'}:6379"
        return Finding("Ray", "red", f"{public(address)}: nodes are asked through the head, not the Jobs API or Ray Client", way_out)
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        return Finding("Ray", "red", f"{address} is no address", "write HOST:PORT, e.g. 10.0.0.4:6379")
    said = probes.reach(host.strip("[]"), int(port))
    if said != "200":
        way_out = f"is the head running, and may this machine reach it? Start one: {START}"
        return Finding("Ray", "red", f"nothing answers at {address} ({said})", way_out)
    mode = os.environ.get("RAY_AUTH_MODE") or "token"
    said = nodes.knock(address, mode)
    if said == "refused":
        way_out = "put the token of the head into RAY_AUTH_TOKEN or ~/.ray/auth_token, with RAY_AUTH_MODE=token"
        return Finding("Ray", "red", f"{address} refuses this machine: no token, or a wrong one (RAY_AUTH_MODE={mode})", way_out)
    if said != "answered":
        return Finding(
            "Ray", "red", f"{address} is no head of a Ray cluster ({said})", "give the port of the head, 6379 unless another was chosen"
        )
    os.environ["RAY_AUTH_MODE"] = mode
    return Finding("Ray", "green", "answers")


def _from_here(store: str) -> list[Finding]:
    """What can be checked without a cluster."""
    return [storage(store, *_exchange(store, [], LIMIT_S)), _tracking([], LIMIT_S)]


def _tracking(awake: Sequence[Node], limit_s: float) -> Finding:
    """Ask the tracking server from here and from every node."""
    try:
        uri = registry.tracking_uri()
        return tracking(uri, {"here": _ask_tracking(uri), **_ask_tracking_from(uri, awake, limit_s)})
    except RegistryError as error:
        return Finding("MLflow", "red", error.what, error.way_out)


def _on_cluster(address: str, store: str, limit_s: float) -> Report:
    """Ask every node, and judge."""
    found = nodes.alive()
    with ThreadPoolExecutor(1) as pool:
        stranger = pool.submit(nodes.knock, address, "disabled")
        gpus = {node.name: {"gpus": node.gpus} for node in found}
        facts = nodes.on_each(found, probes.facts, limit_s, gpus, packages=PACKAGES)
        awake = [node for node in found if not isinstance(facts[node.name], Silence)]
        offsets = nodes.clock_offsets(awake, limit_s)
        findings = [
            _ray(found, facts),
            versions(facts),
            graphics(found, facts),
            disks(facts),
            clocks(offsets),
            storage(store, *_exchange(store, awake, limit_s)),
            _tracking(awake, limit_s),
            *_doors(address, awake, stranger.result(), limit_s),
        ]
    rows = [{**asdict(node), "said": facts[node.name], "clock": offsets.get(node.name)} for node in found]
    return Report(address, findings, rows)


def _ray(found: Sequence[Node], facts: Answers) -> Finding:
    cpus, gpus, memory = (sum(getattr(node, kind) for node in found) for kind in ("cpus", "gpus", "memory_bytes"))
    nodes_ = f"{len(found)} node{'s' if len(found) > 1 else ''}"
    says = f"{nodes_}, {cpus:g} CPUs, {gpus:g} GPUs, {memory / 2**30:,.0f} GiB of memory for tasks"
    silent = {name: said.why for name, said in facts.items() if isinstance(said, Silence)}
    if silent:
        lost = "; ".join(f"{name}: {why}" for name, why in silent.items())
        return Finding("Ray", "red", f"{says}; of these {lost}", "restart Ray on that node, or take it away: ray status")
    return Finding("Ray", "green", says)


# ------------------------------------------------------------------------------------------------------------- judgements


def versions(facts: Answers) -> Finding:
    """Whether all nodes have the same versions of what must be the same."""
    known = {name: said["versions"] for name, said in facts.items() if not isinstance(said, Silence)}
    differing, same = [], []
    for package in next(iter(known.values()), {}):
        homes: dict[str, list[str]] = {}
        for name, installed in known.items():
            homes.setdefault(installed[package], []).append(name)
        if len(homes) > 1:
            differing.append(package + " " + ", ".join(f"{v} on {' and '.join(ns)}" for v, ns in homes.items()))
        else:
            same.append(f"{package} {next(iter(homes))}")
    if differing:
        return Finding("versions", "red", "; ".join(differing), "install the same image or the same constraints.txt on every node")
    if same and all(installed["rayward"] == "none" for installed in known.values()):
        return Finding("versions", "yellow", ", ".join(same), "no node has this package: rayward submit NAME sends it along with every job")
    return Finding("versions", "green" if same else "red", ", ".join(same) or "no node answered")


def graphics(found: Sequence[Node], facts: Answers) -> Finding:
    """Whether torch sees as many GPUs as Ray counts on, and no card lies idle because Ray was not told of it."""
    bad, odd, total = [], [], 0.0
    for node in found:
        said = facts[node.name]
        if isinstance(said, Silence):
            continue
        total += node.gpus
        if node.gpus and said["gpus_seen"] < node.gpus:
            bad.append(f"{node.name}: Ray counts on {node.gpus:g}, torch sees {said['gpus_seen']}")
        elif max(said["gpus_seen"], said["devices"]) > node.gpus:
            odd.append(f"{node.name}: {max(said['gpus_seen'], said['devices'])} there, Ray was told of {node.gpus:g}")
    if bad:
        return Finding("GPUs", "red", "; ".join(bad), "install the torch of your CUDA and check the driver with nvidia-smi on that node")
    if odd:
        return Finding("GPUs", "yellow", "; ".join(odd), "ray start --num-gpus N on that node, if jobs are to use them")
    return Finding("GPUs", "green", f"torch sees all {total:g}" if total else "none, and none are counted on")


def disks(facts: Answers) -> Finding:
    """Whether every node can still spill objects to its disk."""
    known = {name: said for name, said in facts.items() if not isinstance(said, Silence)}
    free = {name: said["disk_free"] for name, said in known.items()}
    full = [name for name, said in known.items() if 1 - said["disk_free"] / said["disk_total"] > DISK_USED]
    low = [name for name in free if free[name] < DISK_LOW_BYTES and name not in full]
    shown = {name: f"{name} {size / 2**30:,.1f} GiB" for name, size in free.items()}
    if full:
        says = f"full by more than {DISK_USED:.0%}: {', '.join(shown[name] for name in full)} free"
        return Finding("disks", "red", says, "Ray stops spilling there: make room, or start Ray with --temp-dir on a larger disk")
    if low:
        return Finding("disks", "yellow", f"{', '.join(shown[name] for name in low)} free", "large datasets may spill more than that")
    least = min(shown, key=lambda name: free[name], default="")
    return Finding("disks", "green", f"least free: {shown[least]}") if least else Finding("disks", "red", "no node answered")


def clocks(offsets: Mapping[str, tuple[float, float]]) -> Finding:
    """Whether the clocks of the nodes and of this machine agree, with the bound of what was measured."""
    if not offsets:
        return Finding("clocks", "red", "no node answered")
    ahead = {"here": (0.0, 0.0), **offsets}
    first, last = min(ahead, key=lambda name: ahead[name][0]), max(ahead, key=lambda name: ahead[name][0])
    apart, bound = ahead[last][0] - ahead[first][0], ahead[last][1] + ahead[first][1]
    bound = max(bound, max(b for _, b in ahead.values()))
    if apart - bound > SKEW_S:
        says = f"{last} is {apart:.2f} s ahead of {first} (give or take {bound:.3f} s)"
        return Finding(
            "clocks",
            "red" if apart - bound > SKEW_BAD_S else "yellow",
            says,
            "run a time service (chrony, systemd-timesyncd) on every node",
        )
    return Finding("clocks", "green", f"within {apart * 1000:.1f} ms of each other (give or take {bound * 1000:.1f} ms)")


def storage(store: str, trouble: Mapping[str, str], asked: int) -> Finding:
    """Whether what one node writes into the store is read on every other; `trouble` says what went wrong, by the node's name."""
    shown = public(store)
    if trouble:
        says = f"{shown}: " + "; ".join(f"{name}: {why}" for name, why in trouble.items())
        way_out = (
            "give a folder that every node mounts, or an object store: RAYWARD_STORE=s3://BUCKET/PREFIX, with credentials on every node"
        )
        return Finding("storage", "red", says, way_out)
    return Finding("storage", "green", f"{shown}: written and read here" + (f" and on {asked} of {asked} nodes" if asked else ""))


def tracking(uri: str, answers: Answers) -> Finding:
    """Whether MLflow answers everywhere; what lies on this machine's disk is for this machine alone."""
    shown, elsewhere = public(uri), len(answers) > 2  # here, the head, and others
    if uri.partition("://")[0] in ("sqlite", "file") or "://" not in uri:
        if elsewhere:
            way_out = "run a server and name it on every node: MLFLOW_TRACKING_URI=http://HOST:5000"
            return Finding("MLflow", "red", f"{shown} is on this machine: the other nodes do not see it", way_out)
        return Finding("MLflow", "green", f"{shown}, for this machine alone")
    failing = {name: said.why if isinstance(said, Silence) else said for name, said in answers.items() if not _answered(name, said)}
    if set(failing.values()) & {"401", "403"}:
        way_out = "check MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
        return Finding("MLflow", "red", f"{shown} refuses: " + _each(failing), way_out)
    if failing:
        return Finding("MLflow", "red", f"{shown} does not answer: " + _each(failing), "is it running, and may every node reach it?")
    return Finding("MLflow", "green", f"{shown} answers here" + (f" and on {len(answers) - 1} nodes" if len(answers) > 1 else ""))


def _answered(name: str, said: Any) -> bool:
    """Whether a server is there for whoever asked; nodes ask without credentials, so a refusal is an answer too."""
    return said == "200" or (name != "here" and said in ("401", "403"))


def _each(failing: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {why}" for name, why in failing.items())


def door(what: str, port: int, answers: Answers) -> Finding:
    """Whether a server that runs code for whoever asks wants a token; red where it does not and others than this machine can ask."""
    known = {name: said for name, said in answers.items() if not isinstance(said, Silence) and said["listens"]}
    if not known:
        return Finding(what, "yellow", f"nothing listens at port {port}", "start the head with --include-dashboard=true to submit jobs")
    beyond = {name: [host for host in said["listens"] if not loopback(host)] for name, said in known.items()}
    if mute := [name for name, said in known.items() if not said["without"]]:
        return Finding(what, "yellow", f"port {port} takes connections on {', '.join(mute)} and says nothing", "see the log of the head")
    open_ = [name for name, said in known.items() if said["without"] not in REFUSED]
    exposed = [host for name in open_ for host in beyond[name]]
    if exposed:
        says = f"{', '.join(f'{host}:{port}' for host in dict.fromkeys(exposed))} asks for no token: whoever reaches it runs code as you"
        return Finding(what, "red", says, CLOSE)
    if open_:
        return Finding(what, "yellow", f"127.0.0.1:{port} asks for no token: all users of this machine can run code as you", CLOSE)
    deaf = [name for name, said in known.items() if said["with"] in REFUSED]
    if deaf:
        return Finding(what, "red", f"port {port} refuses the token of {', '.join(deaf)} itself", CLOSE)
    reachable = "reachable from outside" if any(beyond.values()) else "on loopback alone"
    on = f" on {len(known)} nodes" if len(known) > 1 else ""
    return Finding(what, "green", f"port {port}{on}, {reachable}: refuses without the token, answers with it")


def head_door(address: str, stranger: str, listens: Sequence[str]) -> Finding:
    """The same for the head itself, through which tasks are started; `stranger` is what it says to one without a token."""
    beyond = [host for host in listens if not loopback(host)] or not listens  # unheard is not safe
    if stranger == "refused":
        return Finding("head", "green", f"{address}: refuses without the token")
    if stranger != "answered":
        return Finding("head", "yellow", f"{address}: could not be tried without a token ({stranger})")
    if beyond:
        return Finding("head", "red", f"{address} asks for no token: whoever reaches it runs code as you", CLOSE)
    return Finding("head", "yellow", f"{address} asks for no token: all users of this machine can run code as you", CLOSE)


# ----------------------------------------------------------------------------------------------------------------- asking


def _doors(address: str, awake: Sequence[Node], stranger: str, limit_s: float) -> list[Finding]:
    """The Jobs API, the agents that take jobs on every node, and the head."""
    url = nodes.dashboard_url()
    head = [node for node in awake if node.head]
    told = {node.name: {"host": node.address} for node in awake}
    port = int(url.rpartition(":")[2] or 8265)
    jobs = nodes.on_each(head, probes.doors, limit_s, told, port=port, path="/api/jobs/") if url else {}
    agents: dict[int, dict[str, Any]] = {}
    for agent_port in {node.agent_port for node in awake}:
        group = [node for node in awake if node.agent_port == agent_port]
        agents[agent_port] = nodes.on_each(group, probes.doors, limit_s, told, port=agent_port, path="/api/jobs/")
    listens = nodes.on_each(head, probes.doors, limit_s, told, port=int(address.rpartition(":")[2]), path="/")
    heard = [host for said in listens.values() if not isinstance(said, Silence) for host in said["listens"]]
    return [
        door("Jobs API", port, jobs),
        *_worst([door("agents", agent_port, said) for agent_port, said in agents.items() if _any(said)]),
        head_door(address, stranger, heard),
    ]


def _any(answers: Answers) -> bool:
    return any(not isinstance(said, Silence) and said["listens"] for said in answers.values())


def _worst(findings: Sequence[Finding]) -> list[Finding]:
    """One line for the agents, where nodes have them at several ports."""
    return sorted(findings, key=lambda finding: ("red", "yellow", "green").index(finding.verdict))[:1]


def _exchange(store: str, awake: Sequence[Node], limit_s: float) -> tuple[dict[str, str], int]:
    """Write a word here and on every node, read all of them everywhere, take them away; what went wrong, by the node's name."""
    base = places.at(store) if places.is_remote(store) else places.at(store).absolute()
    new = not places.is_remote(store) and not base.exists()
    folder = base / f".check-{secrets.token_hex(6)}"
    place, env = str(folder), places.carried() if places.is_remote(store) else {}
    trouble: dict[str, str] = {}
    try:
        try:
            with places.telling(folder):
                words = [probes.write(place, "here")]
        except (RaywardError, OSError) as error:
            return {"here": getattr(error, "what", "") or f"cannot be written: {error}"}, len(awake)
        told = {node.name: {"name": node.id} for node in awake}
        for name, said in nodes.on_each(awake, probes.write, limit_s, told, env, place=place).items():
            if isinstance(said, Silence):
                trouble[name] = f"cannot write: {said.why}"
            else:
                words.append(said)
        readers = {"here": probes.read(place, words)} | nodes.on_each(awake, probes.read, limit_s, None, env, place=place, names=words)
        names = {"here": "here", **{node.id: node.name for node in awake}}
        for name, said in readers.items():
            if isinstance(said, Silence):
                trouble.setdefault(name, f"cannot read: {said.why}")
            elif missing := [names[word] for word in words if word not in said]:
                trouble.setdefault(name, f"does not see what {', '.join(missing)} wrote")
        return trouble, len(awake)
    finally:
        nodes.on_each(awake, probes.forget, limit_s, None, env, place=place)
        with contextlib.suppress(OSError, RaywardError):
            places.remove(folder)
            if new:
                base.rmdir()


def _ask_tracking(uri: str) -> str:
    """What the tracking server says to this machine, with its credentials; they are not sent anywhere else."""
    if not registry.is_server(uri):
        host, port = _database(uri)
        return probes.reach(host, port) if host else "200"
    user, password = (os.environ.get(f"MLFLOW_TRACKING_{name}") or "" for name in ("USERNAME", "PASSWORD"))
    token = os.environ.get("MLFLOW_TRACKING_TOKEN")
    words = "Bearer " + token if token else "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()
    url = public(uri).rstrip("/") + "/api/2.0/mlflow/experiments/search?max_results=1"
    asked = urllib.request.Request(url, headers={"Authorization": words} if token or user else {})
    try:
        return str(urllib.request.urlopen(asked, timeout=10).status)
    except urllib.error.HTTPError as error:
        return str(error.code)
    except (OSError, HTTPException, UnicodeError) as error:
        return str(getattr(error, "reason", error))


def _database(uri: str) -> tuple[str, int]:
    """Host and port of a database; no host where it is a file.

    >>> _database("mysql+pymysql://u:p/w@db/mlflow"), _database("postgresql://db:5433/mlflow"), _database("sqlite:///mlflow.db")
    (('db', 3306), ('db', 5433), ('', 5432))
    """
    parts = urllib.parse.urlsplit(public(uri))
    try:
        port = parts.port
    except ValueError:
        raise RegistryError(f"{public(uri)} names no port that can be", "write HOST:PORT with a number, or leave the port out") from None
    return parts.hostname or "", port or PORTS.get(parts.scheme.partition("+")[0], 5432)


def _ask_tracking_from(uri: str, awake: Sequence[Node], limit_s: float) -> dict[str, Any]:
    """What it says to every node."""
    if registry.is_server(uri):
        return nodes.on_each(awake, probes.get, limit_s, url=public(uri).rstrip("/") + "/health")
    host, port = _database(uri)
    if host:
        return nodes.on_each(awake, probes.reach, limit_s, host=host, port=port)
    return {node.name: "200" for node in awake}
