"""How jobs grow with nodes: weak and strong scaling on 1 to 3 Ray nodes of this machine, and a model of what 100 nodes cost.

    python benchmarks/scaling.py                      label_pairs and score_rollouts on 1, 2 and 3 nodes of one CPU each
    python benchmarks/scaling.py --rows 20000 --nodes 1 2
    python benchmarks/scaling.py --model              the tables of docs/scaling.md, computed from assumptions in one place

Strong: the same rows on more nodes. Weak: as many rows per node. Every line is wall clock and CPU-seconds of the driver and of all that
runs on the nodes, so it can be seen what was work and what was waiting: on a machine with fewer cores than nodes the last nodes cannot
help the wall clock. Starting Ray's job (some ten seconds) is in every line; `beyond the start` is without what a job of 32 rows takes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

PARTS = 32  # of every dataset: more than nodes, so that no node waits for a last large part
NOTHING = 32  # rows of the job that shows what starting costs


# ------------------------------------------------------------------------------------------------------------------ measuring


def rayward(script: str, *words: str | Path) -> None:
    """A command here, without Ray."""
    command = [sys.executable, "-m", "rayward.cli", "run", script, *map(str, words)]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def make_rollouts(folder: Path, rows: int) -> Path:
    """Rollouts of 4 answers a prompt, some 350 bytes each, in PARTS parts."""
    rng = random.Random(rows)
    said = (
        {"id": f"{n}", "prompt": f"Question {n // 4}? " + "why " * 20, "answer": f"Answer {n} " * 20, "reward": rng.random()}
        for n in range(rows)
    )
    source = folder.with_suffix(".jsonl")
    source.write_text("\n".join(map(json.dumps, said)))
    rayward("import_rollouts", "--source", source, "--format", "rollouts", "--parts", str(PARTS), "--output", folder, "--engine", "local")
    return folder


def make_model(work: Path) -> Path:
    """A small trained model, to score with."""
    rayward("sample_rollouts", "--problems", "toy:60", "--output", work / "toy", "--engine", "local")
    rayward("label_pairs", "--source", work / "toy", "--output", work / "toy-pairs", "--engine", "local")
    small = [w for s in ("net.width=64", "net.layers=2", "render.max_length=160", "train.epochs=1") for w in ("--set", s)]
    rayward("train_reward_model", "--examples", work / "toy-pairs", "--output", work / "fit", *small)
    return work / "fit" / "model"


@contextmanager
def counting_cpu() -> Iterator[dict[int, float]]:
    """CPU-seconds since now of everything this process started (nodes, workers, driver), by process; looked at five times a second."""
    import psutil  # comes with ray

    used: dict[int, float] = {}
    first: dict[int, float] = {}
    done = threading.Event()

    def look(begin: bool = False) -> None:
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                now = times.user + times.system
                first.setdefault(process.pid, now if begin else 0.0)
                used[process.pid] = now - first[process.pid]

    look(begin=True)

    def follow() -> None:
        while not done.wait(0.2):
            look()

    thread = threading.Thread(target=follow)
    thread.start()
    try:
        yield used
    finally:
        done.set()
        thread.join()


@dataclass(frozen=True)
class Line:
    """One run."""

    job: str
    kind: str  # strong, weak or start
    nodes: int
    rows: int
    wall_s: float
    cpu_s: float


def measure(nodes: int, work: Path, sizes: dict[str, int], jobs: list[str]) -> list[Line]:
    """All runs on so many nodes."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    from ray_nodes import cluster

    lines = []
    with cluster(nodes) as ray:
        for job in jobs:
            for kind, rows in [("cold", NOTHING), *sizes.items()]:  # the first job of a cluster also warms it up, and is not told
                output = work / f"{job}-{kind}-{nodes}"
                words = ["--source", str(work / f"rollouts-{rows}"), "--output", str(output), "--engine", "ray"]
                if job == "score_rollouts":
                    words += ["--model", str(work / "fit" / "model"), "--actors", str(nodes)]
                began = time.monotonic()
                with counting_cpu() as used:
                    driver = ray.start([sys.executable, "-m", "rayward.cli", "run", job, *words], work / "log.txt", work)
                    if driver.wait(timeout=280):
                        raise RuntimeError((work / "log.txt").read_text()[-3000:])
                    wall = time.monotonic() - began
                    time.sleep(0.3)
                ray.stop(driver)
                shutil.rmtree(output)
                lines.append(Line(job, kind, nodes, rows, round(wall, 1), round(sum(used.values()), 1)))
                print(lines[-1], file=sys.stderr, flush=True)
    return [line for line in lines if line.kind != "cold"]


def show(lines: list[Line]) -> None:
    """A table, with every run beside that on the fewest nodes and beyond what starting costs."""
    print(f"{'job':16}{'kind':8}{'nodes':>6}{'rows':>11}{'wall s':>8}{'CPU s':>8}{'wall beyond the start':>24}{'CPU beyond the start':>23}")
    for line in lines:
        if line.kind == "start":
            continue
        start = next(s for s in lines if (s.job, s.kind, s.nodes) == (line.job, "start", line.nodes))
        print(
            f"{line.job:16}{line.kind:8}{line.nodes:6}{line.rows:11,}{line.wall_s:8.1f}{line.cpu_s:8.1f}"
            f"{line.wall_s - start.wall_s:24.1f}{line.cpu_s - start.cpu_s:23.1f}"
        )


# ------------------------------------------------------------------------------------------------------------------ modelling


@dataclass(frozen=True)
class Assumed:
    """What the model of a large cluster rests on; figures of ours are measured (docs/results.md, docs/montecarlo.md), others are stated."""

    nodes: int = 100
    cores: int = 16  # per node
    gpus: int = 8  # per node
    rows: int = 10**9  # rollouts
    row_bytes: int = 350  # of text, before compression
    laid_share: float = 94 / 350  # LZ4 bytes on the disk per raw byte: 119 MB a million rows at most, of which 25 are finished parts
    part_share: float = 25 / 350  # zstd bytes of a finished part per raw byte
    rows_per_cpu_s: float = 51_269  # import and label on Ray, 10 million rows
    piece_bytes: int = 64 * 2**20  # formats.sources.PIECE_BYTES
    part_bytes: int = 64 * 2**20  # storage.PART_BYTES
    most_parts: int = 256  # storage.LEAVES
    store_bytes_s: float = 20e9  # of the shared store, all nodes together
    listed: int = 1000  # names that one listing of an object store gives
    puts_per_s: float = 3_500.0  # objects that S3 takes a second under one prefix
    network_bytes_s: float = 50e9  # per node: 400 Gbit/s
    slow_network_bytes_s: float = 3.125e9  # per node: 25 Gbit/s
    checkpoint_bytes_s: float = 2e9  # one worker writes a checkpoint
    node_mtbf_h: float = 54 * 24 * 2048 / 419  # 419 unexpected interruptions of 2,048 nodes (16,384 GPUs) in 54 days
    restart_s: float = 60.0  # a group of workers is back
    flops: float = 4e14  # per GPU in use, of 9.9e14
    slots: int = 64  # requests that a GPU's engine works on
    completion_s: float = 20.0  # of one completion
    fed_per_s: float = 400.0  # completions a second that one process asks for
    chain: float = 25.0  # completions, one after the other, in the tail of a part: fitted to an occupancy of .701 with 500 answers


def data(a: Assumed) -> dict[str, float]:
    """Bytes, objects and requests of import_rollouts and label_pairs."""
    raw = a.rows * a.row_bytes
    parts = min(a.most_parts, 2 ** math.ceil(math.log2(max(1, raw / a.part_bytes))))
    pieces = math.ceil(raw / a.piece_bytes)
    laid, whole = raw * a.laid_share, raw * a.part_share
    moved = raw + 2 * laid + whole  # read, written aside, read, written
    objects = pieces * parts
    return {
        "raw TB": raw / 1e12,
        "parts": parts,
        "raw GB of a part": raw / parts / 1e9,
        "cores of the cluster": a.nodes * a.cores,
        "pieces": pieces,
        "TB read and written": moved / 1e12,
        "minutes at the store's speed": moved / a.store_bytes_s / 60,
        "GB through a node's NIC": moved / a.nodes / 1e9,
        "minutes of CPU on all cores": a.rows / a.rows_per_cpu_s / (a.nodes * a.cores) / 60,
        "the same on as many cores as parts": a.rows / a.rows_per_cpu_s / min(parts, a.nodes * a.cores) / 60,
        "objects laid out": objects,
        "KB of one": laid / objects / 1e3,
        "PUT, COPY": objects + 2 * pieces + 4 * parts,
        "minutes of them under one prefix": (objects + 2 * pieces + 4 * parts) / a.puts_per_s / 60,
        "GET": objects + pieces + parts,
        "LIST": parts * math.ceil(pieces / a.listed),
    }


def checkpoints(a: Assumed, billions: float, share: float = 1.0) -> dict[str, float]:
    """How often to keep a checkpoint, after Young (1974) and Daly (2006): sqrt(2 x time to write x time between failures)."""
    size = billions * 1e9 * 4 * 3 * share  # weights and AdamW's two moments in float32
    write = size / a.checkpoint_bytes_s
    between = a.node_mtbf_h * 3600 / a.nodes
    every = math.sqrt(2 * write * between)
    lost = write / every + (every / 2 + a.restart_s) / between
    return {
        "GB": size / 1e9,
        "s to write": write,
        "hours between failures": between / 3600,
        "best interval min": every / 60,
        "share of time lost %": 100 * lost,
        "lost with one an hour %": 100 * (write / 3600 + (1800 + a.restart_s) / between),
        "lost with ten a day %": 100 * (write / 8640 + (4320 + a.restart_s) / between),
    }


def gradients(a: Assumed, billions: float, trained: float) -> dict[str, float]:
    """The sum of gradients, once a step after all micro-batches and not beside them, against the arithmetic of the step.

    A ring goes through a node's network once, however many GPUs the node has.
    """
    workers = a.nodes * a.gpus
    through = 2 * (workers - 1) / workers * trained * 1e9 * 4  # float32
    fast, slow = through / (a.gpus * a.network_bytes_s), through / a.slow_network_bytes_s
    per_token = (6 if trained == billions else 4) * billions * 1e9 / a.flops  # frozen weights need no gradients of their own
    return {
        "GB through every node": through / 1e9,
        "ms with 400 Gbit/s for each GPU": 1e3 * fast,
        "ms with 25 Gbit/s a node": 1e3 * slow,
        "tokens a worker and step for 10 % at most, 400 Gbit/s": 9 * fast / per_token,
        "the same, 25 Gbit/s a node": 9 * slow / per_token,
    }


def engines(a: Assumed, answers: int, wrong: float = 0.5, each: float = 15.0) -> dict[str, float]:
    """How full engines are while `answers` to a part are labelled: the work over the work and the tail."""
    work = answers * wrong * each / a.slots
    return {
        "answers of a part and engine": answers,
        "occupancy": work / (work + a.chain),
        "hours of 100 nodes for 1e6 answers": 1e6
        * wrong
        * each
        * a.completion_s
        / (a.slots * a.nodes * a.gpus)
        / 3600
        * (work + a.chain)
        / work,
        "controller processes": math.ceil(a.slots * a.nodes * a.gpus / a.completion_s / a.fed_per_s),
    }


def table(title: str, columns: dict[str, dict[str, float]]) -> None:
    """Quantities down, cases across, in Markdown."""
    print(f"\n| {title} | {' | '.join(columns)} |\n|---|{'---:|' * len(columns)}")
    for name in next(iter(columns.values())):
        values = (column[name] for column in columns.values())
        print(f"| {name} | {' | '.join(f'{v:,.0f}' if abs(v) >= 100 else f'{v:.3g}' for v in values)} |")


def model() -> None:
    """All tables."""
    a = Assumed()
    print(json.dumps(asdict(a)))
    sizes = {"10^7 rows": Assumed(rows=10**7), "10^8": Assumed(rows=10**8), "10^9": a, "10^10": Assumed(rows=10**10)}
    table("import and label", {name: data(one) for name, one in sizes.items()})
    table("checkpoints, 100 nodes", {f"{b}B": checkpoints(a, b) for b in (0.6, 4.0, 14.0)})
    table(
        "gradients, 100 nodes of 8 GPUs",
        {"0.6B": gradients(a, 0.6, 0.6), "4B": gradients(a, 4.0, 4.0), "LoRA of 0.02B on 4B": gradients(a, 4.0, 0.02)},
    )
    table("drawing step labels", {f"{n:,}": engines(a, n) for n in (200, 1_000, 10_000, 50_000)})


def main() -> None:
    """Measure, or model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="store_true", help="compute the tables for 100 nodes, and measure nothing")
    parser.add_argument("--rows", type=int, default=200_000, help="rollouts to label on one node; a twentieth of them are scored")
    parser.add_argument("--nodes", type=int, nargs="*", default=[1, 2, 3])
    parser.add_argument("--jobs", nargs="*", default=["label_pairs", "score_rollouts"], choices=["label_pairs", "score_rollouts"])
    options = parser.parse_args()
    if options.model:
        model()
        return
    work = Path(tempfile.mkdtemp(prefix="scaling-"))
    lines: list[Line] = []
    try:
        if "score_rollouts" in options.jobs:
            make_model(work)
        for job in options.jobs:
            rows = options.rows if job == "label_pairs" else options.rows // 20
            for size in {NOTHING, rows, *(rows * n for n in options.nodes)}:
                make_rollouts(work / f"rollouts-{size}", size)
        for nodes in options.nodes:
            for job in options.jobs:
                rows = options.rows if job == "label_pairs" else options.rows // 20
                sizes = {"start": NOTHING, "strong": rows, **({"weak": rows * nodes} if nodes > 1 else {})}
                lines += measure(nodes, work, sizes, [job])
    finally:
        shutil.rmtree(work, ignore_errors=True)
    show(lines)
    print(json.dumps({"cores": os.cpu_count(), "lines": [asdict(line) for line in lines]}))


if __name__ == "__main__":
    main()
