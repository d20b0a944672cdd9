"""What a fit ends with: the weights to keep, their temperature, and what the model says of itself.

What takes the model to find out (`Judged`) a whole model says here, and one that is spread over workers on them, when they have trained:
they leave it in OUTPUT/run/judged.json, and the process that started them runs no model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rayward import checkpoints, metrics, places
from rayward.batching import Batch, micro_batches
from rayward.config import as_dict, flatten
from rayward.fitting.running import held_groups
from rayward.fitting.settings import FitSettings, Sides, labeled_by
from rayward.heads import Reading
from rayward.objectives import Objective
from rayward.places import Place
from rayward.rendering import Group, Groups
from rayward.reward_model import Loaded, RewardModel, autocast, forget_verbosity, score_groups, take_off
from rayward.reward_model.positions import readable
from rayward.training import Run

JUDGED = "judged.json"  # in OUTPUT/run
TOGETHER = 1024  # examples that are sorted and held as batches at once
ANSWERED = 4096  # most examples by whose answers verbosity is measured


@dataclass(frozen=True)
class Fitted:
    """What a fit ended with."""

    model: Path  # on this node's disk
    place: Place  # where the model lies for others: the same, or OUTPUT/model at a URL
    notes: dict[str, Any]  # what the model's config says of itself
    metrics: dict[str, float]  # of the kept weights, on validation
    examples: dict[str, int]  # groups trained on, validated on, rejected
    tags: dict[str, Any]  # what a registered version says of where it came from
    best: tuple[Mapping[str, Any], ...] = ()  # weights that are kept, the best first: folder (in OUTPUT), step, loss, accuracy


@dataclass(frozen=True)
class Judged:
    """What a trained model was found out to be, by its scores."""

    temperature: float | None  # None: nothing was held out
    taken_off: tuple[float, ...]  # times a verbosity, off every attribute; empty: none


def notes_of(settings: FitSettings, sides: Sides, loaded: Loaded, calibrated: float | None, base: str) -> dict[str, Any]:
    """What a model's config says of itself; `base` is what it was started from."""
    return {
        "objective": settings.objective,
        "objective_settings": settings.objective_settings,
        "regularise": settings.regularise,
        "labeler": sides.labeler,
        "render": {**as_dict(settings.render), "max_length": readable(loaded.model.classifier, settings.render.max_length)},
        "base_model": base,
        "precision": settings.train.precision,
        "data_digest": sides.dataset.manifest.digest,
        "chat_template_sha256": hashlib.sha256(str(loaded.tokenizer.chat_template).encode()).hexdigest(),
        "temperature": calibrated,
        **({"lora": as_dict(settings.lora)} if settings.lora.rank else {}),
    }


def tags_of(sides: Sides, notes: Mapping[str, Any], kept: Mapping[str, float], counts: Mapping[str, int]) -> dict[str, Any]:
    """What a registered version says of where it came from."""
    labeling = labeled_by(sides.lineage()) or {}
    said = flatten({"label": (labeling.get("settings") or {}).get("label") or {}, "examples": {"path": str(sides.dataset.path), **counts}})
    sources = [i.get("digest") or i.get("sha256") for i in labeling.get("inputs") or ()]
    return {**flatten(notes), **{f"best_{n}": v for n, v in kept.items()}, **said, "label.input_digests": " ".join(filter(None, sources))}


def load_kept(folder: Path, settings: FitSettings, loaded: Loaded) -> dict[str, Any]:
    """Put the weights to keep into the model: the best on validation, or the last."""
    path, best = kept_weights(folder / "run", settings)
    state = checkpoints.load(path, loaded.model.classifier, None)
    if not best and (tensors := checkpoints.load_average(path)) is not None:
        loaded.model.classifier.load_state_dict(tensors, strict=False)
    return state if best else {"step": state["step"]}


def kept_weights(run: Path, settings: FitSettings) -> tuple[Path, bool]:
    """The folder of the weights to keep, and whether they are the best on validation, and not the last."""
    best = next(iter(checkpoints.best(run)), None)
    return best or (run / "last" if settings.train.shard else checkpoints.steps(run)[-1]), best is not None


def judge(folder: Path, settings: FitSettings, loaded: Loaded) -> Judged:
    """What a model is found out to be that is whole in this process; verbosity is off its reading then."""
    held = held_groups(folder)
    if wants_verbosity(settings, loaded.model):
        without_verbosity(settings, loaded, held if held is not None else Groups(folder / "groups" / "train"))
    calibrated = None
    if held is not None:
        groups = _first(held, len(held))
        scores = score_groups(loaded.model, groups, settings.batch, settings.train.precision)
        calibrated = temperature(scores, groups, settings.made_objective())
    return Judged(calibrated, loaded.model.reading.taken_off)


def judge_together(run: Run, settings: FitSettings) -> None:
    """What a model is found out to be that is spread over workers, left in OUTPUT/run/judged.json; every worker must call it.

    It says it with the weights to keep, and is left with them.
    """
    model, held = run.model, run.validation
    path = kept_weights(run.folder, settings)[0] if run.team.rank == 0 else run.folder  # the first worker has it, and alone reads it
    checkpoints.load_whole(path, model.classifier)
    if wants_verbosity(settings, model):
        some = _first(held if held is not None else run.groups, ANSWERED)
        said = ((batch, output_GKC) for _, batch, output_GKC in _said_together(run, some))
        model.reading = take_off(model.reading, settings.net.verbosity, said)
    calibrated = None
    if held is not None:
        groups = _first(held, len(held))
        scores = [np.empty(0)] * len(groups)
        for numbers, batch, output_GKC in _said_together(run, groups):
            score_GK = model.reading.pick(output_GKC, batch.column_GK)
            for n, score_K in zip(numbers, score_GK.cpu().numpy(), strict=True):
                scores[n] = score_K[: len(groups[n].place_K)]
        calibrated = temperature(scores, groups, run.objective)
    if run.team.rank == 0:
        places.write(run.place / JUDGED, json.dumps(asdict(Judged(calibrated, model.reading.taken_off))) + "\n")


def judged(run: Run) -> Judged | None:
    """What workers found out of a model, if they have come to it."""
    try:
        said = json.loads(places.read(run.place / JUDGED))
    except FileNotFoundError:
        return None
    return Judged(said["temperature"], tuple(said["taken_off"]))


def take_judged(loaded: Loaded, settings: FitSettings, found: Judged) -> None:
    """Let a model's reading be as workers found it."""
    if wants_verbosity(settings, loaded.model):
        loaded.model.reading = replace(loaded.model.reading, verbosity=settings.net.verbosity, taken_off=found.taken_off)
        _tell_verbosity(loaded.model.reading)


def _said_together(run: Run, groups: Sequence[Group]) -> Iterator[tuple[list[int], Batch, Tensor]]:
    """Batches of groups, with their numbers and output_GKC: every worker hears its share, and all of them learn all."""
    model, flat = run.model, run.model.flat_in(run.train.precision)
    with model.evaluating(), autocast(model.device, run.train.precision):
        for start in range(0, len(groups), TOGETHER):
            every = list(micro_batches(groups[start : start + TOGETHER], run.batch, model.shares_prefix, flat))
            mine: dict[int, Tensor] = {}
            for n, (_, batch), own in run.team.share(every, model.device):
                output_GKC = model.outputs(batch.to(model.device))
                outputs = output_GKC.shape[-1]
                if own:
                    mine[n] = output_GKC
            for n, (numbers, batch) in enumerate(every):
                here = batch.to(model.device)
                output_GKC = mine[n] if n in mine else torch.zeros(*batch.place_GK.shape, outputs, device=model.device)
                torch.distributed.all_reduce(output_GKC)
                yield [start + number for number in numbers], here, output_GKC


def _first(groups: Groups, most: int) -> list[Group]:
    return [groups[n] for n in range(min(len(groups), most))]


def wants_verbosity(settings: FitSettings, model: RewardModel) -> bool:
    """Whether verbosity is measured at the end: where attributes are learned, and not what they come to."""
    return bool(settings.net.verbosity) and not model.reading.learns_overall


def without_verbosity(settings: FitSettings, loaded: Loaded, groups: Groups) -> None:
    """Take off the attributes what they say of how long an answer is, by the answers that were held out where there are some."""
    some = _first(groups, ANSWERED)
    forget_verbosity(loaded.model, some, settings.net.verbosity, settings.batch, settings.train.precision)
    _tell_verbosity(loaded.model.reading)


def _tell_verbosity(reading: Reading) -> None:
    much = zip(reading.names, reading.taken_off, strict=True)
    print(f"taken off, times {reading.verbosity}: " + ", ".join(f"{name} {share:.4g}" for name, share in much))


def temperature(scores: Sequence[np.ndarray], groups: Sequence[Group], objective: Objective) -> float:
    """The temperature that calibrates the scores (or their differences) of the validation side.

    Targets are drawn in as if one more had been right and one wrong (Platt 1999, section 2.2): a few that are all right are no reason
    to be certain of everything.
    """
    if objective.probabilities:
        logit, target = np.concatenate(scores), np.concatenate([g.target_K for g in groups])
    else:
        gaps = [
            s[i] - s[j]
            for s, g in zip(scores, groups, strict=True)
            for i in range(len(s))
            for j in range(len(s))
            if g.target_K[i] > g.target_K[j] and (g.column_K is None or g.column_K[i] == g.column_K[j])
        ]
        logit, target = np.array(gaps), np.ones(len(gaps))
    return metrics.fit_temperature(logit, (target * len(target) + 1) / (len(target) + 2))


def kept_best(folder: Path) -> tuple[Mapping[str, Any], ...]:
    """The weights that are kept of the best validations, the best first."""
    return tuple({"folder": f"run/{path.name}", **checkpoints.read_state(path)} for path in checkpoints.best(folder / "run"))
