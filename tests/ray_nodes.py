"""Real Ray nodes on one machine: raylets of their own that can be killed, cut off the network, and filled up.

    with cluster(nodes=3) as ray:
        driver = ray.start(["python", "-m", "rayward.cli", "run", ...], log=tmp_path / "log.txt", cwd=tmp_path)
        ray.kill_node("n2")
        ray.add("n2")

Node n0 is the head, where drivers run. Every node has one CPU, a temporary folder of its own, and where the machine allows (root, `ip`) a
network namespace with an address of its own, so that it can be cut off (`cut`, `mend`) and all its processes are known. Elsewhere nodes
share the loopback and `cut` is not to be had (`can_cut`). Where tmpfs can be mounted, a node's folder is a disk of its own, which can be
full.

Ray asks for a token. What was started ends with the block; if this process is killed, a watchdog of its own session does the same.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil  # comes with ray

from rayward.policies import Completion, Policy, Request, ToyPolicy

HERE = Path(__file__).resolve().parent
STORE_BYTES = 80 * 2**20  # of a node's object store; Ray's least is 75 MiB
DISK = "192m"  # of a node's temporary folder, and of what they share, where these are disks of their own
IDLE = ("ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent")  # processes of a node that do no work of a user
START_S = 180.0  # a node has joined after so long, or never will


# ----------------------------------------------------------------------------------------------------- a policy with a pace


@dataclass(frozen=True)
class SlowToy:
    """The toy solver, one completion after the other, each of which takes its time."""

    seconds: float  # per completion
    capacity: int = 4  # taken up at once
    policy: Policy = ToyPolicy()

    def __call__(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion per request."""
        return [done for _, done in self.stream(iter(requests))]

    def stream(self, requests: Iterator[Request | None]) -> Iterator[tuple[int, Completion]]:
        """(place, completion), in order."""
        for place, request in enumerate(requests):
            if request is not None:
                time.sleep(self.seconds)
                yield place, self.policy([request])[0]


def slow_toy(seconds: float = 0.01) -> Policy:
    """For `--policy ray_nodes:slow_toy`."""
    return SlowToy(seconds)


# ---------------------------------------------------------------------------------------------------------------- processes


def _ran(*words: str) -> str:
    """What a command said that must go well."""
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


def can_cut() -> bool:
    """Whether network namespaces can be made here."""
    if os.geteuid() or not shutil.which("ip"):
        return False
    name = f"rwtry{os.getpid()}"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode == 0
    if tried:
        _ran("ip", "netns", "del", name)
    return tried


def can_mount() -> bool:
    """Whether this process may mount disks of its own."""
    return os.geteuid() == 0 and shutil.which("mount") is not None and subprocess.run(["unshare", "-m", "true"]).returncode == 0


def mount(folder: Path, size: str) -> bool:
    """Make a folder a small disk of its own, in memory; False where that is not allowed."""
    folder.mkdir(parents=True, exist_ok=True)
    return (
        can_mount() and subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True).returncode == 0
    )


def fill(folder: Path) -> Path:
    """Take all the room on a disk; the file that takes it."""
    filler = folder / "filler"
    with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
        while True:
            file.write(b"\0" * 65536)
    with contextlib.suppress(OSError), open(filler, "ab", buffering=0) as file:  # and the last bytes of it
        while True:
            file.write(b"\0" * 512)
    return filler


def below(pid: int) -> list[psutil.Process]:
    """A process and all it started that still hang together."""
    try:
        top = psutil.Process(pid)
        return [top, *top.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def free_port() -> int:
    """A port nobody listens on now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def end(processes: Sequence[psutil.Process]) -> None:
    """Kill processes as one: none of them runs on while the others die."""
    for sent in (signal.SIGSTOP, signal.SIGKILL):
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(sent)
    psutil.wait_procs(processes, timeout=10)


# -------------------------------------------------------------------------------------------------------------- the cluster


@dataclass
class Cluster:
    """Nodes n0 (the head), n1, ... of one CPU each."""

    folder: Path  # short: Ray's sockets lie in it
    mark: str  # names what belongs to this cluster
    spaces: bool  # every node has a network namespace
    settings: Mapping[str, str] = field(default_factory=dict)  # more of the environment of every node
    tops: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)  # `ray start --block` of every node
    others: list[subprocess.Popen[bytes]] = field(default_factory=list)
    port: int = 0

    def ip(self, node: str) -> str:
        """Its address."""
        return f"10.{66 + int(self.mark[:1], 16)}.{int(self.mark[1:3], 16)}.{10 + int(node[1:])}" if self.spaces else "127.0.0.1"

    @property
    def address(self) -> str:
        """What RAY_ADDRESS is."""
        return f"{self.ip('n0')}:{self.port}"

    @property
    def disk(self) -> Path:
        """A small disk that all nodes see, where one can be mounted (before they start: theirs is another space of mounts)."""
        return self.folder / "disk"

    def space(self, node: str) -> str:
        """The name of a node's network namespace."""
        return f"rw{self.mark}{node}"

    def inside(self, node: str) -> list[str]:
        """What stands before a command that is to run on a node."""
        return ["ip", "netns", "exec", self.space(node)] if self.spaces else []

    def env(self) -> dict[str, str]:
        """The environment of nodes and drivers."""
        paths = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
        return {
            **{name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"},
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.folder / "token"),
            "RAY_ADDRESS": self.address,  # Ray Train's cleaner looks for every cluster of the machine otherwise, and gives up
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_raylet_start_wait_time_s": f"{START_S:.0f}",
            "RAY_TMPDIR": str(self.folder),
            "PYTHONPATH": os.pathsep.join(paths),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "RAYWARD_PROGRESS": "log",
            **({"GLOO_SOCKET_IFNAME": "e0"} if self.spaces else {}),  # the name of the machine is not the address of the node
            **self.settings,
        }

    # ------------------------------------------------------------------------------------------------------ nodes

    def add(self, node: str) -> None:
        """Start a node and wait until it has joined; on a busy machine Ray itself may give up, so it is tried again."""
        for _ in range(2):
            with contextlib.suppress(RuntimeError):
                return self._add(node)
            self.kill_node(node)
        return self._add(node)

    def _add(self, node: str) -> None:
        place = self.folder / node
        if not mount(place, DISK):
            place.mkdir(exist_ok=True)
        ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=1", f"--object-store-memory={STORE_BYTES}"]
        ray += [f"--node-ip-address={self.ip(node)}", f"--temp-dir={place}", "--disable-usage-stats"]
        ray += ["--min-worker-port=0", "--max-worker-port=0"]
        ray += ["--head", f"--port={self.port}", f"--dashboard-port={free_port()}"] if node == "n0" else [f"--address={self.address}"]
        log = self.folder / f"{node}.log"
        with open(log, "wb") as out:
            self.tops[node] = subprocess.Popen(
                [*self.inside(node), *ray],
                env=self.env(),
                cwd=self.folder,
                stdout=out,
                stderr=out,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        by = time.monotonic() + START_S
        while b"Ray runtime started" not in log.read_bytes():
            if self.tops[node].poll() is not None or time.monotonic() > by:
                raise RuntimeError(f"node {node} does not start: {log.read_text()}")
            time.sleep(0.1)

    def open(self, nodes: int) -> None:
        """Make the network, start the head, then the others together."""
        self.port = 6390 if self.spaces else free_port()
        token = self.folder / "token"
        token.touch(0o600)
        token.write_text(secrets.token_hex(32))
        mount(self.disk, DISK)
        if self.spaces:
            self._network(nodes)
        for n in range(nodes):
            self.add(f"n{n}")

    def _network(self, nodes: int) -> None:
        bridge = f"rw{self.mark}"
        _ran("ip", "link", "add", bridge, "type", "bridge")
        _ran("ip", "link", "set", bridge, "up")
        for node in (f"n{n}" for n in range(nodes)):
            space, cable = self.space(node), f"rw{self.mark}{node}"
            _ran("ip", "netns", "add", space)
            _ran("ip", "link", "add", cable, "type", "veth", "peer", "name", "e0", "netns", space)
            _ran("ip", "link", "set", cable, "master", bridge)
            _ran("ip", "link", "set", cable, "up")
            _ran("ip", "-n", space, "addr", "add", f"{self.ip(node)}/24", "dev", "e0")
            for device in ("lo", "e0"):
                _ran("ip", "-n", space, "link", "set", device, "up")

    def processes(self, node: str) -> list[psutil.Process]:
        """Everything that runs on a node, but for drivers."""
        found = {p.pid: p for p in below(self.tops[node].pid)} if node in self.tops else {}
        if self.spaces:
            drivers = {p.pid for other in self.others for p in below(other.pid)}
            for pid in map(int, _ran("ip", "netns", "pids", self.space(node)).split()):
                if pid not in drivers and psutil.pid_exists(pid):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        found.setdefault(pid, psutil.Process(pid))
        return list(found.values())

    def busy(self, node: str) -> list[psutil.Process]:
        """The worker processes on a node that were given work."""
        found = []
        for process in self.processes(node):
            with contextlib.suppress(psutil.NoSuchProcess):
                title = " ".join(process.cmdline())
                if title.startswith("ray::") and not title.startswith(IDLE):
                    found.append(process)
        return found

    def kill_node(self, node: str) -> None:
        """Every process of a node at once, as a machine that loses its power."""
        end(self.processes(node))
        self.tops.pop(node).wait()
        if os.path.ismount(self.folder / node):
            _ran("umount", "-l", str(self.folder / node))
        shutil.rmtree(self.folder / node, ignore_errors=True)

    def kill_raylet(self, node: str) -> None:
        """The raylet of a node, and with it the objects that lie there; what else runs there finds out for itself."""
        end([p for p in self.processes(node) if p.name() == "raylet"])

    def cut(self, node: str) -> None:
        """Pull the cable."""
        _ran("ip", "link", "set", f"rw{self.mark}{node}", "down")

    def mend(self, node: str) -> None:
        """Put the cable back."""
        _ran("ip", "link", "set", f"rw{self.mark}{node}", "up")

    # ----------------------------------------------------------------------------------------------------- drivers

    def start(self, words: Sequence[str | Path], log: Path, cwd: Path, **env: str) -> subprocess.Popen[bytes]:
        """A command on the head, told of the cluster."""
        with open(log, "ab") as out:
            made = subprocess.Popen(
                [*self.inside("n0"), *map(str, words)],
                env={**self.env(), **env},
                cwd=cwd,
                stdout=out,
                stderr=out,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        self.others.append(made)
        return made

    def stop(self, driver: subprocess.Popen[bytes]) -> None:
        """Kill a command and all it started."""
        end(below(driver.pid))
        driver.wait()
        self.others.remove(driver)

    def close(self) -> None:
        """Leave nothing behind."""
        for driver in list(self.others):
            self.stop(driver)
        for node in list(self.tops):
            self.kill_node(node)
        clean(self.folder, self.mark)


def clean(folder: Path, mark: str) -> None:
    """Take away what a cluster left: processes in its namespaces, the namespaces, the bridge, mounted disks, the folder."""
    for space in (line.split()[0] for line in _ran("ip", "netns", "list").splitlines() if line) if shutil.which("ip") else ():
        if space.startswith(f"rw{mark}"):
            pids = map(int, _ran("ip", "netns", "pids", space).split())
            end([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)])
            subprocess.run(["ip", "link", "del", space], capture_output=True)
            _ran("ip", "netns", "del", space)
    if shutil.which("ip"):
        subprocess.run(["ip", "link", "del", f"rw{mark}"], capture_output=True)
    for line in Path("/proc/mounts").read_text().splitlines():
        if line.split()[1].startswith(f"{folder}/"):
            subprocess.run(["umount", "-l", line.split()[1]], capture_output=True)
    shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def cluster(nodes: int = 3, **settings: str) -> Iterator[Cluster]:
    """A cluster; `settings` go into the environment of every node."""
    folder = Path(tempfile.mkdtemp(prefix="rw"))
    made = Cluster(folder, secrets.token_hex(2)[:3], can_cut(), settings)
    guard = subprocess.Popen([sys.executable, __file__, str(os.getpid()), str(folder), made.mark], start_new_session=True)
    try:
        made.open(nodes)
        yield made
    finally:
        made.close()
        guard.kill()
        guard.wait()


def watch(pid: int, folder: Path, mark: str) -> None:
    """Clean up when a process is gone that did not."""
    tops: dict[int, psutil.Process] = {}
    while psutil.pid_exists(pid):
        for process in below(pid):
            tops.setdefault(process.pid, process)
        time.sleep(1)
    end([p for top in tops.values() if top.pid not in (pid, os.getpid()) and top.is_running() for p in below(top.pid)])
    clean(folder, mark)


if __name__ == "__main__":
    watch(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
