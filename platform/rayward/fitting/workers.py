"""The training of a fit on a group of Ray Train workers, which share OUTPUT: a folder that all nodes see, or a URL.

The process that starts the group trains nothing: it shows the progress, asks the workers to stop, and starts the group again when it
was lost. Workers that need a checkpoint find it in OUTPUT; at a URL each node fetches what it lacks into a folder of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import torch

from rayward import cluster, places
from rayward.config import as_dict, resolve
from rayward.errors import Interrupted, RaywardError
from rayward.fitting.home import home, pull, pull_run
from rayward.fitting.placement import Resources, scaling
from rayward.fitting.running import FAILED, STOP, Work, ended, newest, set_threads, telling
from rayward.fitting.settings import FitSettings
from rayward.fitting.starting import for_training, load_start
from rayward.progress import Progress
from rayward.reward_model import is_bf16
from rayward.sharding import meet, shard
from rayward.training import Report, Run, Team, stop_on_signal, stopped, train

RETRIES = 3  # times a group of workers is started again without a new checkpoint
PLACED_S = 20.0  # seconds that Ray waits for the places of a group before it looks again at which nodes there are; its own default is 60


def train_on_workers(work: Work, output: str, workers: tuple[int, int], each: Resources, report: Report) -> None:
    """Run groups of workers until the training has ended; `workers` are the fewest and the most.

    A group that loses a worker is started again, and given up when it failed more than RETRIES times without a new checkpoint, or with an
    error of ours, which would come again.

    Raises:
        Interrupted: if the user stopped it; a checkpoint is kept.
        RaywardError: if there is no room for the group, or it fails.
    """
    run = work.run()
    if ended(run):
        return
    _forget(run)
    with cluster.connect() as ray:
        scaled = scaling(ray, each, *workers)
        with Progress("train", total=run.total, unit="steps", start=newest(run)["step"]) as bar, _following(run, telling(bar, report)):
            while not ended(run):
                before = newest(run)["step"]
                error = _fit_once(work, output, scaled, each)
                if (told := _word(run, FAILED)) is not None:
                    raise RaywardError(told)
                if _word(run, STOP) is not None and not ended(run):
                    raise stopped(run.place, newest(run)["step"], run.total)
                if error is not None and _unplaced(error):
                    scaled = scaling(ray, each, *workers)  # says what is waited for, and for how long
                elif error is not None and newest(run)["step"] == before:
                    raise RaywardError(f"training failed on the workers: {_innermost(error)}") from error
        _forget(run)
        shutil.rmtree(work.folder / "ray", ignore_errors=True)


def _word(run: Run, name: str) -> str | None:
    """What STOP or FAILED says, if it is there."""
    if run.away is not None:
        content = run.away.read(name)
        return None if content is None else content.decode()
    return (run.folder / name).read_text(encoding="utf-8") if (run.folder / name).exists() else None


def _forget(run: Run) -> None:
    """No word of an earlier group is left."""
    for name in (STOP, FAILED):
        places.remove(run.place / name)


def _fit_once(work: Work, output: str, scaled: Mapping[str, Any], each: Resources) -> Exception | None:
    """Run a group of workers until it ends; what it failed with.

    It runs in a thread: in the main one Ray answers to Ctrl-C by leaving the process as if all were well. Here the first Ctrl-C asks the
    workers to keep a checkpoint and end, and the second one does not wait for them.
    """
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", f"{PLACED_S:g}")
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    trainer = TorchTrainer(
        _worker,
        train_loop_config={"output": output, "settings": as_dict(work.settings), "each": asdict(each), "env": places.carried()},
        scaling_config=ScalingConfig(**scaled),
        run_config=RunConfig(
            name=f"fit-{time.time_ns()}",  # Ray resumes a name it has seen; ours is the only way to resume
            storage_path=str(work.folder / "ray"),  # for its own notes, written where this process runs
            failure_config=FailureConfig(max_failures=RETRIES, controller_failure_limit=3),
        ),
    )
    failed: list[Exception] = []

    def fit_workers() -> None:
        try:
            trainer.fit()
        except Exception as error:  # told by the caller
            failed.append(error)

    thread = threading.Thread(target=fit_workers, daemon=True)
    with stop_on_signal() as stop:
        thread.start()
        asked = False
        while thread.is_alive():
            thread.join(0.2)
            if stop.is_set() and thread.is_alive() and not asked:
                places.write(work.run().place / STOP, "asked to stop\n")
                asked = True
    return failed[0] if failed else None


def _unplaced(error: Exception) -> bool:
    """Whether a group could not be placed again: a node that is gone, and none in its stead."""
    cause = getattr(error, "controller_failure", None)
    return type(cause).__name__ == "WorkerGroupStartupTimeoutError"


def _innermost(error: BaseException) -> str:
    inner = getattr(error, "worker_failures", None) or {}
    return str(next(iter(inner.values()), error)).strip().splitlines()[-1]


def _worker(config: dict[str, Any]) -> None:
    """What every Ray Train worker does."""
    import ray.train
    import ray.train.torch

    for name, value in config["env"].items():
        os.environ.setdefault(name, value)
    settings, each = resolve(FitSettings, config["settings"]), Resources(**config["each"])
    work = Work(*home(config["output"]), settings)
    device = ray.train.torch.get_device()
    if _seen(work, FAILED):
        return
    _fetched(work, device)
    loaded = for_training(load_start(work.folder, settings), settings)
    cores = int(each.cpus) if each.cpus > 1 else cluster.cores() // ray.train.get_context().get_local_world_size()
    set_threads(loaded.model, cores)
    if settings.train.shard:  # from the host's memory, layer by layer
        shard(loaded.model.classifier.base_model, device, bf16=is_bf16(device, settings.train.precision))
    run = work.run(loaded.model.to(device), Team.here(settings.train.shard))
    try:
        with _asked_to_stop(run) as asked:
            train(replace(run, asked_to_stop=asked))
    except Interrupted:
        return  # the process that started the group tells the user
    except RaywardError as error:  # another try would end alike
        places.write(run.place / FAILED, str(error))
        raise


def _seen(work: Work, name: str) -> bool:
    place = work.folder if work.away is None else work.away.there
    return (place / "run" / name).exists()


def _fetched(work: Work, device: torch.device) -> None:
    """Let this node have what the group begins with: all workers go on from the checkpoint that the first of them finds newest."""
    if work.away is None:
        return
    pull(work.away)
    run = work.away / "run"
    steps = [name for name in run.whole() if name.startswith("step-")]
    newest_step = torch.tensor([int(steps[-1].removeprefix("step-")) if steps else -1], device=device)
    torch.distributed.broadcast(newest_step, 0)
    step = int(newest_step.item())
    pull_run(run, f"step-{step:08d}" if step >= 0 else "none")
    meet()  # nobody writes while another one of this node still looks


@contextmanager
def _asked_to_stop(run: Run) -> Iterator[Callable[[], bool]]:
    """What tells a worker that the user asked to stop; at a URL the first one looks, and tells the others."""
    if run.away is None:
        yield (run.folder / STOP).exists
    elif run.team.rank:
        yield lambda: False
    else:
        with run.away.following("metrics.jsonl", STOP) as asked:
            yield asked


@contextmanager
def _following(run: Run, tell: Report) -> Iterator[None]:
    """Pass on every line of a growing file of metrics, once per step and kind."""
    stop, seen = threading.Event(), set()

    def read() -> list[str]:
        try:
            text = places.read(run.place / "metrics.jsonl").decode()
        except (OSError, RaywardError):  # not there yet, or a store that does not answer: the next look sees it
            return []
        return [line for line in text.splitlines() if line.endswith("}")]

    def look() -> None:
        for line in read():
            if line not in seen:
                seen.add(line)
                tell(json.loads(line))

    def follow() -> None:
        while not stop.wait(1.0 if run.away is None else 3.0):
            look()

    seen.update(read())
    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        look()
