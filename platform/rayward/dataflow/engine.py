"""Do many tasks, here or on Ray Data, and none of them twice.

A task and what comes of it are plain JSON. Where a `done` folder is given, what came of a task is written there when it is finished, so
that a run that was killed goes on with what is missing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal

from rayward import cluster, errors, places
from rayward.cluster import placement
from rayward.errors import RaywardError, UserError
from rayward.places import Place
from rayward.progress import Progress
from rayward.storage import PART_BYTES

Engine = Literal["auto", "local", "ray"]
LOCAL_BYTES = 4 * PART_BYTES  # above this, `auto` works on Ray

Work = Callable[[dict[str, Any]], dict[str, Any]]  # one task -> what came of it; both are plain JSON


class _Worker:
    """What Ray Data calls: JSON in, JSON out, with the work made once per process (a model is loaded once)."""

    def __init__(self, make: Callable[[], Work]):
        self.work = make()

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        task = json.loads(row["task"])
        try:
            return {"number": task["number"], "done": json.dumps(_once(self.work, task)), "error": ""}
        except UserError as error:  # the user's to mend: carried home as it is, not as a stack trace of a worker
            return {"number": task["number"], "done": "", "error": json.dumps([type(error).__name__, error.what, error.way_out])}


def _once(work: Work, task: dict[str, Any]) -> dict[str, Any]:
    """Do a task, and leave word that it is done. Ray does a task again whose result was lost with its node: then the word counts.

    At a URL, where each look costs, it is done again: nothing that it reads is taken away there before all is done.
    """
    with places.telling():
        marker = places.at(task["marker"]) if task["marker"] else None
        if isinstance(marker, Path) and marker.is_file():
            return json.loads(marker.read_text(encoding="utf-8"))
        result = work(task["task"])
        if marker is not None:
            places.write(marker, json.dumps(result))
    return result


def _made(make: Callable[[], Work], words: dict[str, str]) -> Work:
    """The work, made where places are reached as they are here."""
    os.environ.update(words)
    return make()


def on_ray(engine: Engine, size: int) -> bool:
    """Whether the work is done on Ray Data; `size` is what there is to read, in bytes."""
    return engine == "ray" or (engine == "auto" and (cluster.on_cluster() or size > LOCAL_BYTES))


@contextmanager
def session(engine: Engine, size: int) -> Iterator[None]:
    """Keep Ray for several runs, where they take it at all: to start it costs some ten CPU-seconds."""
    with cluster.connect() if on_ray(engine, size) else nullcontext():
        yield


def run(
    tasks: Sequence[dict[str, Any]],
    make: Callable[[], Work],
    *,
    what: str,
    unit: str,
    engine: Engine,
    size: int = 0,
    actors: int = 0,
    gpus: float = 0.0,
    cpus: float = 1.0,
    memory_gib: float = 0.0,
    done: Place | None = None,
) -> list[dict[str, Any]]:
    """What came of every task, in order; `make` makes the function that does one. With `actors` Ray keeps so many, each made once.

    On Ray each of them holds so many CPU cores, GiB of memory (0: they are not counted) and, of actors, GPUs: a number, or -1 for one where
    the cluster has any. SettingsError if no machine has as many.

    In a `done` folder lies what came of tasks of an earlier run.
    """
    results: dict[int, dict[str, Any]] = {}
    todo: list[dict[str, Any]] = []
    earlier = places.read_many(done, [n for n in places.listing(done) if n.endswith(".json")]) if done is not None else {}
    for number, task in enumerate(tasks):
        marker = done / f"{number:06d}.json" if done is not None else None
        if marker is not None and marker.name in earlier:
            results[number] = json.loads(earlier[marker.name])
        else:
            todo.append({"number": number, "task": task, "marker": str(marker.absolute()) if marker else ""})
    with Progress(what, total=len(tasks), unit=unit, start=len(results)) as bar:
        if not on_ray(engine, size):
            work = make() if todo else None
            for task in todo:
                assert work is not None
                results[task["number"]] = _once(work, task)
                bar.advance()
        elif todo:
            with cluster.connect():
                held = {"CPU": cpus, "memory": memory_gib * 2**30, "GPU": cluster.gpus_each(gpus) if actors else 0.0}
                made = partial(_made, make, places.carried())
                for row in _ray_rows(what, todo, made, actors, {kind: much for kind, much in held.items() if much}):
                    if row["error"]:
                        kind, words, way_out = json.loads(row["error"])
                        raise getattr(errors, kind)(words, way_out)
                    results[row["number"]] = json.loads(row["done"])
                    bar.advance()
    return [results[number] for number in range(len(tasks))]


def _ray_rows(
    what: str, tasks: Sequence[dict[str, Any]], make: Callable[[], Work], actors: int, held: Mapping[str, float]
) -> Iterator[dict[str, Any]]:
    """What comes of every task, as it comes; each holds what is said. What cannot be placed is told (cluster.placement)."""
    import ray.data

    cluster.quiet("ray.data")
    ray.data.DataContext.get_current().enable_progress_bars = False
    dataset = ray.data.from_items([{"task": json.dumps(task)} for task in tasks], override_num_blocks=max(1, len(tasks)))
    ask = {"num_cpus": held["CPU"], "num_gpus": held.get("GPU"), "memory": held.get("memory")}
    workers = min(actors or len(tasks), len(tasks))
    try:
        with placement.watch(what, held, workers=workers) as key:
            made = partial(placement.begin, key, make)
            if actors:
                pool = ray.data.ActorPoolStrategy(min_size=1, max_size=workers)
                dataset = dataset.map(_Worker, fn_constructor_args=(made,), compute=pool, **ask)
            else:
                dataset = dataset.map(lambda row: _Worker(made)(row), **ask)
            yield from dataset.iter_rows()
    except ray.exceptions.RayError as error:
        cause = error.__cause__ or error
        raise RaywardError(f"a worker failed: {cause}") from error
