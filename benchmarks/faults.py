"""What a fault costs: jobs on three Ray nodes of this machine, each disturbed in one way, each held against the undisturbed run.

    python benchmarks/faults.py
    python benchmarks/faults.py --jobs train_reward_model --faults worker node

Every job ends with the same digest (datasets) or the same bytes of weights (a fit) as without the fault: by itself, or with one error
and the same command once more. What does not is marked BAD. Prints a table (fault, where, outcome, seconds lost, work repeated), and a line
of JSON. Seconds lost are wall clock beyond the undisturbed run, with the restart of the command where one was needed; an outage that a
job sits out (20 s of network, 20 s of MLflow) counts as lost.

The jobs run as users run them, one command each; nodes have one CPU, an address and a disk of their own (tests/ray_nodes.py). Where the
machine allows no network namespaces, no node is cut off, and where it allows no mounts, no disk is filled.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from ray_nodes import Cluster, can_cut, can_mount, cluster, end, fill
from rayward import places

OUTAGE_S = 20.0  # how long a node is cut off, and MLflow is down
LIMIT_S = 600.0  # a command that takes longer hangs
POLL_S = 0.02
PIECES = 8  # files that are imported
MLFLOW = "http://127.0.0.1:5055"  # inside the head's namespace


# ------------------------------------------------------------------------------------------------------------------ the jobs


def _parts(output: Path) -> dict[str, int]:
    """The tasks that are marked done, with when."""
    found = {}
    with contextlib.suppress(FileNotFoundError):
        for path in (output.parent / f".{output.name}.partial").glob("done/*/*.json"):
            found[f"{path.parent.name}/{path.stem}"] = path.stat().st_mtime_ns
    return found


def _steps(output: Path) -> int:
    """The step of the last whole line of metrics: a full disk tears one."""
    try:
        lines = (output / "run" / "metrics.jsonl").read_text().splitlines()
    except OSError:
        return 0
    return next((int(json.loads(line)["step"]) for line in reversed(lines) if line.endswith("}")), 0)


def _drawn(output: Path) -> int:
    """The completions that all runs with this output paid for."""
    try:
        return int(json.loads((output.parent / f".{output.name}.verdicts" / "spent.json").read_text())["requests"])
    except (OSError, ValueError):
        return 0


def _digest(output: Path) -> str:
    return str(json.loads((output / "manifest.json").read_text())["digest"])


def _weights(output: Path) -> str:
    return hashlib.sha256((output / "model" / "model.safetensors").read_bytes()).hexdigest()


@dataclass(frozen=True)
class Job:
    """A command, when it is in the middle of its work, and what it made."""

    title: str  # the script, and the phase that is disturbed where it has several
    words: tuple[str, ...]  # {work} is the folder of prepared data
    worker: str  # what the title of a process holds while it does this work
    ready: Callable[[Path], bool]  # work is under way, some of it is done, some is not
    made: Callable[[Path], str]  # what is equal where the result is
    unit: str  # of what is repeated

    @property
    def script(self) -> str:
        """The script that runs."""
        return self.title.partition(":")[0]


_ON_RAY = ("--engine", "ray")
_IMPORT = ("--source", "{work}/rows", "--format", "rollouts", "--parts", "32", *_ON_RAY)
_TRAIN = (
    *("net.width=32", "net.layers=1", "render.max_length=128", "train.lr=2e-3", "batch.size=8", "batch.micro_tokens=400"),
    *("train.epochs=4", "train.log_every=1", "train.checkpoint_every=10", "train.validate_every=20"),
)

JOBS = {
    job.title: job
    for job in (
        Job("import_rollouts", _IMPORT, "ray::Map", lambda output: len(_parts(output)) >= 3, _digest, "tasks"),
        Job("import_rollouts:sort", _IMPORT, "ray::Map", lambda output: len(_parts(output)) >= PIECES + 3, _digest, "tasks"),
        Job(
            "label_pairs", ("--source", "{work}/rollouts", *_ON_RAY), "ray::Map", lambda output: len(_parts(output)) >= 3, _digest, "tasks"
        ),
        Job(
            "label_steps",
            ("--source", "{work}/toy", "--policy", "ray_nodes:slow_toy", "--actors", "3", *_ON_RAY),
            "MapWorker(Map(_Worker)).submit",
            lambda output: _drawn(output) >= 300 and len(_parts(output)) >= 1,
            _digest,
            "completions",
        ),
        Job(
            "train_reward_model",
            ("--examples", "{work}/pairs", "--workers", "2", "--validation-share", "0.1", *(w for s in _TRAIN for w in ("--set", s))),
            "TrainWorker",
            lambda output: _steps(output) >= 24,
            _weights,
            "steps",
        ),
    )
}


def prepare(work: Path) -> None:
    """The data that the jobs work on, made here without Ray."""
    rng = random.Random(0)
    (work / "rows").mkdir(parents=True)
    for file in range(PIECES):
        lines = []
        for n in range(file * 4000, file * 4000 + 4000):
            said = {"id": f"{n}", "prompt": f"Question {n // 4}? " + "why " * 20, "answer": f"Answer {n} " * 30, "reward": rng.random()}
            lines.append(json.dumps(said if n % 97 else {"prompt": f"nothing {n}"}))
        (work / "rows" / f"{file:02}.jsonl").write_text("\n".join(lines))
    commands = (
        ("import_rollouts", "--source", work / "rows", "--format", "rollouts", "--parts", "32", "--output", work / "rollouts"),
        ("sample_rollouts", "--problems", "toy:160", "--parts", "16", "--output", work / "toy"),
        ("label_pairs", "--source", work / "toy", "--set", "label.choose=adjacent", "--output", work / "pairs"),
    )
    for words in commands:
        command = [sys.executable, "-m", "rayward.cli", "run", *map(str, words), "--engine", "local"]
        subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


# ---------------------------------------------------------------------------------------------------------------- the faults


@dataclass
class Scene:
    """A job that runs on a cluster, and what a fault needs to know of it."""

    ray: Cluster
    job: Job
    folder: Path  # of this case alone; a disk of its own where the fault is about that
    work: Path
    driver: subprocess.Popen[bytes] | None = None
    server: subprocess.Popen[bytes] | None = None  # MLflow
    undo: list[tuple[float, Callable[[], object]]] = field(default_factory=list)  # what ends the fault, at which time

    @property
    def output(self) -> Path:
        """The job's OUTPUT."""
        return self.folder / "out"

    @property
    def log(self) -> Path:
        """What the command said: not on the disk that is filled."""
        return self.work / f"{self.folder.name}.txt"

    def node(self) -> str:
        """A node besides the head that works on the job."""
        by = time.monotonic() + 30
        while time.monotonic() < by:
            for name in ("n2", "n1"):
                if any(self.job.worker in " ".join(p.cmdline()) for p in self.ray.busy(name)):
                    return name
        raise RuntimeError(f"no node besides the head works on {self.job.title}")

    def later(self, what: Callable[[], object]) -> None:
        """End the fault after OUTAGE_S."""
        self.undo.append((time.monotonic() + OUTAGE_S, what))

    def serve(self) -> None:
        """Start MLflow on the head."""
        words = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", MLFLOW.rpartition(":")[2], "--workers", "1"]
        words += ["--backend-store-uri", f"sqlite:///{self.work}/served.db", "--artifacts-destination", f"{self.work}/served"]
        self.server = self.ray.start(words, self.work / "mlflow.txt", self.work)
        asks = f"import urllib.request as u; u.urlopen('{MLFLOW}/health', timeout=2)"
        by = time.monotonic() + 90
        while subprocess.run([*self.ray.inside("n0"), sys.executable, "-c", asks], capture_output=True).returncode:
            if time.monotonic() > by:
                raise RuntimeError(f"MLflow does not start: see {self.work / 'mlflow.txt'}")
            time.sleep(0.5)

    def silence(self) -> None:
        """Kill MLflow."""
        if self.server is not None:
            self.ray.stop(self.server)
            self.server = None


def _kill_worker(scene: Scene) -> str:
    name = scene.node()
    end([p for p in scene.ray.busy(name) if scene.job.worker in " ".join(p.cmdline())][:1])
    return f"a worker on {name}"


def _kill_controller(scene: Scene) -> str:
    for name in scene.ray.tops:
        found = [p for p in scene.ray.busy(name) if "TrainController" in " ".join(p.cmdline())]
        if found:
            end(found)
            return f"Ray Train's controller on {name}"
    raise RuntimeError("there is no controller")


def _kill_node(scene: Scene) -> str:
    name = scene.node()
    scene.ray.kill_node(name)
    return name


def _kill_raylet(scene: Scene) -> str:
    name = scene.node()
    scene.ray.kill_raylet(name)
    return f"raylet and objects of {name}"


def _kill_driver(scene: Scene) -> str:
    assert scene.driver is not None
    scene.driver.kill()
    scene.driver.wait()
    return "the command, on the head"


def _cut(scene: Scene) -> str:
    name = scene.node()
    scene.ray.cut(name)
    scene.later(lambda: scene.ray.mend(name))
    return f"{name} for {OUTAGE_S:.0f} s"


def _fill_output(scene: Scene) -> str:
    filler = fill(scene.ray.disk)
    scene.undo.append((float("inf"), filler.unlink))
    return "the disk of OUTPUT"


def _fill_node(scene: Scene) -> str:
    name = scene.node()
    filler = fill(scene.ray.folder / name)
    scene.undo.append((float("inf"), lambda: filler.unlink(missing_ok=True)))
    return f"the disk of {name}"


def _stop_mlflow(scene: Scene) -> str:
    scene.silence()
    scene.later(scene.serve)
    return f"the server, for {OUTAGE_S:.0f} s"


FAULTS: dict[str, Callable[[Scene], str]] = {
    "worker": _kill_worker,
    "controller": _kill_controller,
    "node": _kill_node,
    "objects": _kill_raylet,
    "driver": _kill_driver,
    "network": _cut,
    "disk": _fill_output,
    "node disk": _fill_node,
    "mlflow": _stop_mlflow,
}


def skipped(job: str, fault: str) -> str:
    """Why a fault cannot be had here, or nothing."""
    if fault == "controller" and job != "train_reward_model":
        return "only a fit has a controller"
    if fault == "network" and not can_cut():
        return "no network namespaces here (root and `ip` are needed)"
    if "disk" in fault and not can_mount():
        return "no mounts here (root is needed)"
    return ""


# ----------------------------------------------------------------------------------------------------------------- one case


@dataclass(frozen=True)
class Ran:
    """How a command went."""

    code: int | None  # None: it did not end
    seconds: float
    repeated: int  # tasks or steps that were done again, as far as they can be seen
    where: str


@dataclass(frozen=True)
class Outcome:
    """What became of a job under a fault."""

    job: str
    fault: str
    where: str
    outcome: str  # "by itself", "same command again", or BAD: why
    error: str  # what it said where it did not go on by itself
    lost_s: float
    repeated: int
    unit: str

    @property
    def good(self) -> bool:
        """Whether the result is that of the undisturbed run, and nobody was left with a stack trace."""
        return not self.outcome.startswith("BAD")


def run(scene: Scene, fault: Callable[[Scene], str] | None) -> Ran:
    """Run a job's command on the head, with or without a fault in its middle."""
    words = [w.format(work=scene.work) for w in scene.job.words]
    command = [sys.executable, "-m", "rayward.cli", "run", scene.job.script, "--output", str(scene.output), *words]
    env = {"MLFLOW_TRACKING_URI": MLFLOW} if scene.server else {}
    began, where, repeated, step, tasks = time.monotonic(), "", 0, 0, _parts(scene.output)
    scene.driver = scene.ray.start(command, scene.log, scene.folder, RAYWARD_STORE=str(scene.folder / "store"), **env)
    while scene.driver.poll() is None and time.monotonic() - began < LIMIT_S:
        if fault is not None and scene.job.ready(scene.output):
            where, fault = fault(scene), None
        for due in [u for u in scene.undo if time.monotonic() >= u[0]]:
            due[1]()
            scene.undo.remove(due)
        now, seen = _steps(scene.output), _parts(scene.output)
        repeated += max(0, step - now) + sum(name in tasks and tasks[name] != at for name, at in seen.items())
        step, tasks = now, {**tasks, **seen}
        time.sleep(POLL_S)
    code = scene.driver.poll()
    scene.ray.stop(scene.driver)
    if fault is not None:
        raise RuntimeError(f"{scene.job.title} ended ({code}) before it could be disturbed:\n{scene.log.read_text()[-3000:]}")
    return Ran(code, time.monotonic() - began, repeated, where)


def heal(scene: Scene) -> None:
    """End the fault: room on the disk, cables in, nodes as many as there were."""
    for _, what in scene.undo:
        what()
    scene.undo.clear()
    for name in ("n1", "n2"):
        top = scene.ray.tops.get(name)
        if top is None or top.poll() is not None or not any(p.name() == "raylet" for p in scene.ray.processes(name)):
            if top is not None:
                scene.ray.kill_node(name)
            scene.ray.add(name)


@dataclass(frozen=True)
class Reference:
    """The undisturbed run of a job."""

    made: str
    seconds: float
    drawn: int  # completions


def scene_of(ray: Cluster, job: Job, work: Path, name: str, disk: bool = False) -> Scene:
    """A folder for a case, on the small disk where asked for."""
    folder = (ray.disk if disk else work / "cases") / name
    folder.mkdir(parents=True)
    scene = Scene(ray, job, folder, work)
    scene.log.unlink(missing_ok=True)
    return scene


def undisturbed(ray: Cluster, job: Job, work: Path) -> Reference:
    """Run a job in peace."""
    scene = scene_of(ray, job, work, f"{job.title}-alone".replace(":", "-"))
    ran = run(scene, None)
    if ran.code != 0:
        raise RuntimeError(f"{job.title} fails without a fault:\n{scene.log.read_text()[-3000:]}")
    return Reference(job.made(scene.output), ran.seconds, _drawn(scene.output))


def disturbed(ray: Cluster, job: Job, fault: str, work: Path, reference: Reference) -> Outcome:
    """Run a job with a fault in its middle; once more where it ends with an error; then hold the result against the reference."""
    scene = scene_of(ray, job, work, f"{job.title}-{fault}".replace(" ", "-").replace(":", "-"), disk=fault == "disk")
    if fault == "mlflow":
        scene.serve()
    try:
        first = last = run(scene, FAULTS[fault])
        said = scene.log.read_text(errors="replace")
        heal(scene)
        if first.code != 0:
            last = run(scene, None)
        problem = _problem(job, fault, scene, first, last, said, reference)
        errors = [line for line in said.splitlines() if line.lower().startswith("error:")]
        again = (
            (_drawn(scene.output) - reference.drawn) if job.unit == "completions" else first.repeated + (last is not first) * last.repeated
        )
        return Outcome(
            job=job.title,
            fault=fault,
            where=first.where,
            outcome=f"BAD: {problem}" if problem else "by itself" if first.code == 0 else "same command again",
            error=errors[-1] if errors and first.code else "",
            lost_s=round(first.seconds + (last.seconds if last is not first else 0) - reference.seconds, 1),
            repeated=again,
            unit=job.unit,
        )
    finally:
        scene.silence()
        heal(scene)
        if fault == "disk":
            shutil.rmtree(scene.folder)


def _problem(job: Job, fault: str, scene: Scene, first: Ran, last: Ran, said: str, reference: Reference) -> str:
    """What is not as it should be, or nothing."""
    if first.code is None:
        return f"hangs for more than {LIMIT_S:.0f} s"
    if last.code is None:
        return f"the same command hangs for more than {LIMIT_S:.0f} s"
    if last.code != 0:
        tail = scene.log.read_text(errors="replace").strip().splitlines()[-1:]
        return f"the same command fails: {' '.join(tail)}"
    if job.made(scene.output) != reference.made:
        return "another result"
    if left := [str(path.relative_to(scene.output)) for path in scene.output.rglob(f"{places.ASIDE}*")]:
        return f"half-written files are left in the result: {left[0]}"
    if first.code not in (0, -signal.SIGKILL) and any(line.startswith(('  File "', "Traceback (most")) for line in said.splitlines()):
        return "a stack trace instead of an error"
    if first.code not in (0, -signal.SIGKILL) and said.lower().count("error: ") != 1:
        return f"{said.lower().count('error: ')} errors instead of one"
    return ""


def show(found: Sequence[Outcome]) -> None:
    """The table."""
    rows = [("job", "fault", "where", "outcome", "lost s", "repeated")]
    rows += [(o.job, o.fault, o.where, o.outcome, f"{o.lost_s:.1f}", f"{o.repeated:,} {o.unit}") for o in found]
    widths = [max(len(row[n]) for row in rows) for n in range(6)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def main() -> None:
    """Every fault on every job."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", nargs="*", default=list(JOBS), choices=JOBS)
    parser.add_argument("--faults", nargs="*", default=list(FAULTS), choices=FAULTS)
    parser.add_argument("--work", default="", help="where data, outputs and logs go; kept if named")
    options = parser.parse_args()
    work = Path(options.work or tempfile.mkdtemp(prefix="faults-")).absolute()
    found: list[Outcome] = []
    try:
        if not (work / "pairs" / "manifest.json").is_file():
            prepare(work)
        shutil.rmtree(work / "cases", ignore_errors=True)
        with cluster() as ray:
            for name in options.jobs:
                reference = undisturbed(ray, JOBS[name], work)
                print(f"{name}: undisturbed {reference.seconds:.1f} s", file=sys.stderr, flush=True)
                for fault in options.faults:
                    if why := skipped(name, fault):
                        print(f"{name}, {fault}: skipped, {why}", file=sys.stderr)
                        continue
                    try:
                        found.append(disturbed(ray, JOBS[name], fault, work, reference))
                    except RuntimeError as error:
                        found.append(Outcome(name, fault, "", f"BAD: {str(error).splitlines()[0]}", "", 0.0, 0, JOBS[name].unit))
                    print(found[-1], file=sys.stderr, flush=True)
    finally:
        if not options.work:
            shutil.rmtree(work, ignore_errors=True)
    show(found)
    print(json.dumps({"cores": os.cpu_count(), "bad": sum(not o.good for o in found), "outcomes": [asdict(o) for o in found]}))


if __name__ == "__main__":
    main()
