"""The training of a fit on a group of Ray Train workers, which share OUTPUT: a folder that all nodes see, or a URL.

The process that starts the group trains nothing: it shows the progress, asks the workers to stop, and starts the group again when it
was lost. Workers that need a checkpoint find it in OUTPUT; at a URL each node fetches what it lacks into a folder of its own.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch

from rayward import cluster, places
from rayward.config import as_dict, resolve
from rayward.errors import Interrupted, RaywardError
from rayward.fitting.memory import measured
from rayward.fitting.placement import Resources, choose_gpus, scaling
from rayward.fitting.result import judge_together, judged
from rayward.fitting.running import STOP, Work, ended, newest, set_threads, telling
from rayward.fitting.settings import FitSettings
from rayward.fitting.spreading import load_spread
from rayward.fitting.starting import for_training, load_start
from rayward.fitting.working_copy import pull, pull_run, working_copy
from rayward.mirror import patiently
from rayward.progress import Progress
from rayward.sharding import meet
from rayward.training import Report, Run, Team, stop_on_signal, stopped, train

RETRIES = 3  # times a group of workers is started again without a new checkpoint
PLACED_S = 20.0  # seconds that Ray waits for the places of a group before it looks again at which nodes there are; its own default is 60


def train_on_workers(work: Work, output: str, workers: tuple[int, int], per_worker: Resources, report: Report) -> None:
    """Run groups of workers until the training has ended; `workers` are the fewest and the most.

    A group that loses a worker is started again, and given up when it failed more than RETRIES times without a new checkpoint, or with an
    error of ours, which would come again.

    Raises:
        Interrupted: if the user stopped it; a checkpoint is kept.
        RaywardError: if there is no room for the group, or it fails.
    """
    run = work.run()
    if _done(run):
        return
    _forget(run)
    word = f"rayward-failed-{secrets.token_hex(8)}"
    with cluster.connect() as ray:
        from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get

        per_worker = choose_gpus(ray, per_worker, workers[0])  # once: a run that began on GPUs does not go on without
        scaled = scaling(ray, per_worker, *workers)
        with Progress("train", total=run.total, unit="steps", start=newest(run)["step"]) as bar, _following(run, telling(bar, report)):
            while not _done(run):
                before = newest(run)["step"]
                error = _fit_once(work, output, scaled, per_worker, word)
                if (told := _internal_kv_get(word)) is not None:
                    _internal_kv_del(word)
                    raise RaywardError(told.decode())
                if _asked(run) and not _done(run):
                    raise stopped(run.place, newest(run)["step"], run.total)
                if error is not None and _unplaced(error):
                    scaled = scaling(ray, per_worker, *workers)  # says what is waited for, and for how long
                elif error is not None and newest(run)["step"] == before:
                    raise RaywardError(f"training failed on the workers: {_innermost(error)}") from error
        _forget(run)
        shutil.rmtree(work.folder / "ray", ignore_errors=True)


def _done(run: Run) -> bool:
    """Whether nothing is left to do: a spread model has also said what its end needs of it."""
    return ended(run) and (not run.train.shard or judged(run) is not None)


def _asked(run: Run) -> bool:
    """Whether the user asked the workers to stop."""
    return (run.folder / STOP).exists() if run.mirror is None else run.mirror.read(STOP) is not None


def _forget(run: Run) -> None:
    """No word to an earlier group is left."""
    patiently(partial(places.remove, run.place / STOP), run.place)


def _fit_once(work: Work, output: str, scaled: Mapping[str, Any], per_worker: Resources, word: str) -> Exception | None:
    """Run a group of workers until it ends; what it failed with.

    An error of ours, which would come again, the workers leave in the cluster's memory under the key `word` (a disk may be full); workers
    that see it there do not begin.

    It runs in a thread: in the main one Ray answers to Ctrl-C by leaving the process as if all were well. Here the first Ctrl-C asks the
    workers to keep a checkpoint and end, and the second one does not wait for them.
    """
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", f"{PLACED_S:g}")
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    trainer = TorchTrainer(
        _worker,
        train_loop_config={
            "output": output,
            "settings": as_dict(work.settings),
            "per_worker": asdict(per_worker),
            "env": places.carried(),
            "word": word,
        },
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
                place = work.run().place / STOP
                patiently(partial(places.write, place, "asked to stop\n"), place)
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
    from ray.experimental.internal_kv import _internal_kv_exists, _internal_kv_put

    for name, value in config["env"].items():
        os.environ.setdefault(name, value)
    settings, per_worker = resolve(FitSettings, config["settings"]), Resources(**config["per_worker"])
    work = Work(*working_copy(config["output"]), settings)
    device = ray.train.torch.get_device()
    if _internal_kv_exists(config["word"]):
        return
    _fetched(work, device)
    if settings.train.shard:
        loaded = load_spread(work.folder, settings, device)
    else:
        loaded = for_training(load_start(work.folder, settings), settings)
        loaded.model.to(device)
    cores = int(per_worker.cpus) if per_worker.cpus > 1 else cluster.cores() // ray.train.get_context().get_local_world_size()
    set_threads(loaded.model, cores)
    run = work.run(loaded.model, Team.here(settings.train.shard))
    try:
        with _asked_to_stop(run) as asked:
            run = replace(measured(run), asked_to_stop=asked)
            train(run)
        if settings.train.shard:
            judge_together(run, settings)
    except Interrupted:
        return  # the process that started the group tells the user
    except RaywardError as error:  # another try would end alike
        _internal_kv_put(config["word"], str(error).encode())
        raise


def _fetched(work: Work, device: torch.device) -> None:
    """Let this node have what the group begins with: all workers go on from the checkpoint that the first of them finds newest."""
    if work.mirror is None:
        return
    pull(work.mirror)
    run = work.mirror / "run"
    steps = [name for name in run.whole() if name.startswith("step-")]
    newest_step = torch.tensor([int(steps[-1].removeprefix("step-")) if steps else -1], device=device)
    torch.distributed.broadcast(newest_step, 0)
    step = int(newest_step.item())
    pull_run(run, f"step-{step:08d}" if step >= 0 else "none")
    meet()  # nobody writes while another one of this node still looks


@contextmanager
def _asked_to_stop(run: Run) -> Iterator[Callable[[], bool]]:
    """What tells a worker that the user asked to stop; at a URL the first one looks, and tells the others."""
    if run.mirror is None:
        yield (run.folder / STOP).exists
    elif run.team.rank:
        yield lambda: False
    else:
        with run.mirror.following("metrics.jsonl", STOP) as asked:
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
        while not stop.wait(1.0 if run.mirror is None else 3.0):
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
