"""What a fit ends with: the weights to keep, their temperature, and what the model says of itself."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rayward import checkpoints, metrics
from rayward.config import as_dict, flatten
from rayward.fitting.settings import FitSettings, Sides, labeled_by
from rayward.objectives import Objective
from rayward.places import Place
from rayward.rendering import Groups
from rayward.reward_model import Loaded, forget_verbosity, score_groups

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


def notes_of(settings: FitSettings, sides: Sides, loaded: Loaded, held: Groups | None) -> dict[str, Any]:
    """What a model's config says of itself."""
    return {
        "objective": settings.objective,
        "objective_settings": settings.objective_settings,
        "regularise": settings.regularise,
        "labeler": sides.labeler,
        "render": as_dict(settings.render),
        "base_model": settings.model,
        "precision": settings.train.precision,
        "data_digest": sides.dataset.manifest.digest,
        "chat_template_sha256": hashlib.sha256(str(loaded.tokenizer.chat_template).encode()).hexdigest(),
        "temperature": temperature(loaded, held, settings.made_objective(), settings) if held is not None else None,
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
    run = folder / "run"
    best = next(iter(checkpoints.best(run)), None)
    path = best or checkpoints.steps(run)[-1]
    if settings.train.shard and path != best:
        path = run / "last"
    state = checkpoints.load(path, loaded.model.classifier, None)
    if path != best and (tensors := checkpoints.load_average(path)) is not None:
        loaded.model.classifier.load_state_dict(tensors, strict=False)
    return state if path == best else {"step": state["step"]}


def without_verbosity(settings: FitSettings, loaded: Loaded, groups: Groups) -> None:
    """Take off the attributes what they say of how long an answer is, by the answers that were held out where there are some."""
    some = [groups[n] for n in range(min(len(groups), ANSWERED))]
    much = forget_verbosity(loaded.model, some, settings.net.verbosity, settings.batch, settings.train.precision)
    print(f"taken off, times {settings.net.verbosity}: " + ", ".join(f"{name} {share:.4g}" for name, share in much.items()))


def temperature(loaded: Loaded, held: Groups, objective: Objective, settings: FitSettings) -> float:
    """The temperature that calibrates the scores (or their differences) on the validation side.

    Targets are drawn in as if one more had been right and one wrong (Platt 1999, section 2.2): a few that are all right are no reason
    to be certain of everything.
    """
    groups = [held[n] for n in range(len(held))]
    scores = score_groups(loaded.model, groups, settings.batch, settings.train.precision)
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
