"""Fit a reward model: from a folder of examples to a folder with a model, in this process or on Ray Train workers.

    OUTPUT/
      settings.json     what was asked for; the same command goes on from the last checkpoint, another one is refused
      groups/           the examples in tokens, memory-mapped by every worker; what did not fit lies in rejects.parquet
      start/            the model before anything is learned, where it is not the one that was named
      spread/           with train.shard: what workers begin with beside the model's files
      run/              checkpoints, metrics.jsonl
      tracking.json     the tracked run that the metrics go to
      model/            the result: a Hugging Face folder

One worker runs in this process (a group of two costs a quarter of a minute before its first step); more run under a TorchTrainer that
restarts the group when a worker dies, from the checkpoints in OUTPUT. OUTPUT is a folder that all workers see, or a URL: then every node
works on its own disk (`working_copy`), and nothing that matters lies there alone.

    settings       what a fit depends on, the examples of both sides
    working_copy   where its files lie
    starting       what it starts from
    spreading      what a worker of a spread model reads of it
    running        the training in this process
    placement      room for workers
    workers        the training on them
    memory         how many tokens at once
    result         what it ends with
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

from rayward import adapters, cluster, places
from rayward.dataflow.claims import claimed
from rayward.errors import SettingsError
from rayward.fitting.placement import Resources
from rayward.fitting.result import Fitted, judge, judged, kept_best, load_kept, notes_of, tags_of, take_judged
from rayward.fitting.running import Work, held_groups, set_threads, train_here
from rayward.fitting.settings import FitSettings, Sides, labeled_by, open_sides
from rayward.fitting.spreading import make_spread
from rayward.fitting.starting import check, claim, fit_head, for_training, load_start, make_ready, objective_name, save_whole
from rayward.fitting.working_copy import TRACKED, TRACKING, pull, pull_run, working_copy
from rayward.mirror import Mirror
from rayward.places import Place
from rayward.rendering import Groups
from rayward.reward_model import Loaded, read_notes
from rayward.training import Report

__all__ = [
    "TRACKED",
    "TRACKING",
    "FitSettings",
    "Fitted",
    "Prepared",
    "Resources",
    "Sides",
    "fit",
    "labeled_by",
    "load_start",
    "open_sides",
    "prepare",
]


@dataclass(frozen=True)
class Prepared:
    """A fit that may begin: everything a user can have got wrong has been looked at."""

    folder: Path  # OUTPUT, or this node's copy of it
    mirror: Mirror | None  # OUTPUT where it is a URL
    settings: FitSettings
    sides: Sides
    loaded: Loaded
    workers: int
    least: int  # workers that are enough to go on with; less than `workers`: the group is elastic
    per_worker: Resources  # of a worker
    base: str = ""  # what the model is called that it starts from, where that is not its address

    @property
    def place(self) -> Place:
        """OUTPUT, as all nodes reach it."""
        return self.folder if self.mirror is None else self.mirror.there

    def train(self, report: Report = lambda line: None) -> Fitted:
        """Train, or go on training, and leave the model in OUTPUT/model. DataError while another run does so."""
        with claimed(self.place, self.place):
            return self._train(report)

    def _train(self, report: Report) -> Fitted:
        folder, mirror, settings, loaded = self.folder, self.mirror, self.settings, self.loaded
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        work = Work(folder, mirror, settings)
        if self.workers == 1:
            loaded.model.to(device)
            if "OMP_NUM_THREADS" not in os.environ:  # the user's word comes first
                set_threads(loaded.model, cluster.cores())
            train_here(work, loaded.model, report)
        else:
            from rayward.fitting.workers import train_on_workers

            train_on_workers(work, str(self.place), (self.least, self.workers), self.per_worker, report)
            if mirror is not None:
                pull_run(mirror / "run")
        state = load_kept(folder, settings, loaded)
        held = held_groups(folder)
        if settings.train.shard:  # what is spread over devices need not fit into one, and has said what is asked for
            found = judged(work.run())
            assert found is not None, f"{self.place} ended without run/judged.json"
            take_judged(loaded, settings, found)
        else:
            loaded.model.to(device)
            found = judge(folder, settings, loaded)
        notes = notes_of(settings, self.sides, loaded, found.temperature, self.base or settings.model)
        if settings.lora.rank:
            adapters.merge(loaded.model.classifier)
        model = self._save(notes)
        rejects = pq.read_table(folder / "groups" / "rejects.parquet").num_rows
        trained = len(Groups(folder / "groups" / "train"))
        counts = {"train": trained, "validation": len(held) if held is not None else 0, "rejected": rejects}
        kept = {n: v for n, v in state.items() if n != "step"}
        return Fitted(model, self.place / "model", notes, kept, counts, tags_of(self.sides, notes, kept, counts), kept_best(folder))

    def _save(self, notes: dict[str, Any]) -> Path:
        """Leave the model in OUTPUT/model, unless it is there."""
        loaded, model = self.loaded, self.folder / "model"
        own = {"pooling": loaded.model.pooling, "head": loaded.model.reading.as_notes()}
        fresh = not model.is_dir() or read_notes(model) != {**notes, **own}
        if fresh:
            shutil.rmtree(model, ignore_errors=True)
            save_whole(Loaded(loaded.model, loaded.tokenizer, notes), model)
        if self.mirror is not None and (fresh or self.mirror.read("model/config.json") != (model / "config.json").read_bytes()):
            self.mirror.send("model")
        return model


def prepare(
    settings: FitSettings, output: str, workers: int = 1, least: int = 0, per_worker: Resources | None = None, base: str = ""
) -> Prepared:
    """Look at everything that a fit needs, and make what it starts from: the model and the examples in tokens.

    With `least` > 0 the group is elastic: it goes on with as few workers as that when nodes are lost, and grows again up to `workers`.
    OUTPUT is a folder, a URL or store:NAME; `base` is what the model is called that it starts from, where that is not its address.
    """
    if settings.train.shard and workers == 1:
        raise SettingsError("train.shard=true spreads a model over workers, and there is one", "ask for more: --workers 2")
    if workers < 1:
        raise SettingsError(f"workers={workers} cannot train", "1 trains in this process, more on Ray Train workers")
    if not 0 <= least <= workers or (least and workers == 1):
        raise SettingsError(
            f"min_workers={least} and workers={workers} are no range", "give the most as --workers, the fewest as --min-workers"
        )
    folder, mirror = working_copy(output)
    sides = open_sides(settings.examples, settings.validation_share)
    settings = replace(settings, objective=objective_name(settings.objective, sides))
    settings = replace(settings, net=fit_head(settings.net, settings.made_objective()))
    if mirror is not None:
        with places.telling(mirror.there):  # a mistake in the address is told at once, and not waited out
            places.listing(mirror.there)
        pull(mirror)
    claim(folder, mirror, replace(settings, model=base or settings.model), sides)  # a version lies elsewhere each time it is fetched
    loaded = make_ready(folder, mirror, settings, sides)
    check(settings, sides, loaded, Groups(folder / "groups" / "train"), held_groups(folder))
    loaded = for_training(loaded, settings)
    if settings.train.shard:
        make_spread(folder, mirror, settings, loaded)
    return Prepared(folder, mirror, settings, sides, loaded, workers, least or workers, per_worker or Resources(), base)


def fit(settings: FitSettings, output: str, workers: int = 1, report: Report = lambda line: None) -> Fitted:
    """Train, or go on training, and leave the model in OUTPUT/model."""
    return prepare(settings, output, workers).train(report)
