"""What a fit depends on, and which examples are trained on and which validated on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from rayward import adapters, places
from rayward.adapters import LoraSettings
from rayward.batching import BatchSettings
from rayward.errors import SettingsError
from rayward.labels import LABELERS
from rayward.objectives import Objective, make_objective
from rayward.rendering import RenderSettings
from rayward.reward_model import ModelSettings
from rayward.splits import Shares, side
from rayward.storage import PUBLISHING, Dataset, open_dataset
from rayward.training import TrainSettings


@dataclass(frozen=True)
class FitSettings:
    """Everything a fit depends on."""

    examples: str  # folder of examples, or of a split with train/ and validation/
    model: str  # folder or hub name of a model, or `tiny` for a small decoder from scratch
    objective: str  # an entry of objectives.OBJECTIVES, module:loss, or auto (what the examples were labeled for)
    net: ModelSettings
    render: RenderSettings
    batch: BatchSettings
    train: TrainSettings
    validation_share: float  # share of prompts held out where the examples have no validation side
    objective_settings: str = "{}"  # JSON of the loss's own settings
    lora: LoraSettings = LoraSettings()
    regularise: str = "{}"  # JSON of regularisers and their weights

    def __post_init__(self) -> None:
        if not 0 <= self.validation_share < 1:
            raise SettingsError(f"validation_share={self.validation_share} is not a share", "give 0 (no validation) to 0.5")
        if self.objective != "auto":
            self.made_objective()
        adapters.check(self.lora)
        if self.lora.bits == 4 and self.train.shard:
            raise SettingsError("a body in 4 bits (lora.bits=4) cannot be spread (train.shard=true)", "leave one of them out")
        if not self.batch.micro_tokens and self.train.shard:
            raise SettingsError(
                "batch.micro_tokens=0 tries what fits, and one worker that has no room would leave the others of train.shard=true waiting",
                "give a number of tokens",
            )

    @classmethod
    def of(cls, settings: Any, **others: Any) -> FitSettings:
        """The fit that a job's settings speak of: their fields of the same names, but for `others`."""
        own = {field.name: getattr(settings, field.name) for field in fields(cls)}
        return cls(**{**own, **others})

    def made_objective(self) -> Objective:
        """The objective with its settings and regularisers."""
        return make_objective(self.objective, self.objective_settings, self.regularise)


@dataclass(frozen=True)
class Sides:
    """What is trained on and what is validated on: the sides of a split, or a share of the prompts held out by hash."""

    dataset: Dataset  # what is trained on
    validation: Dataset | None  # its own side, or None: a share of `dataset`
    share: float

    def tables(self, which: Literal["train", "validation"]) -> Iterator[pa.Table]:
        """The examples of a side, a part at a time; an example is never on both."""
        if self.validation is not None:
            yield from (self.dataset if which == "train" else self.validation).tables()
            return
        shares = Shares(validation=self.share, test=0.0, salt="validation while training")
        for table in self.dataset.tables():
            mine = np.array([side(h, shares) == which for h in table["prompt_id"].to_pylist()], bool)
            yield table.filter(pa.array(mine))

    @property
    def labeler(self) -> str:
        """The kind of label: pairs, rankings, outcomes or steps; empty if another pipeline made it."""
        return (labeled_by(self.lineage()) or {"made_by": ""})["made_by"].removeprefix("label_")

    def lineage(self) -> dict[str, Any]:
        """The manifest of what is trained on."""
        return self.dataset.lineage()


def labeled_by(manifest: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The manifest of the labeling behind a dataset, through splits and other pipelines in between.

    >>> labeled_by({"made_by": "split_examples", "inputs": [{"made_by": "label_pairs", "inputs": []}]})["made_by"]
    'label_pairs'
    """
    if (manifest.get("made_by") or "").removeprefix("label_") in LABELERS:
        return manifest
    return next((found for i in manifest.get("inputs") or () if (found := labeled_by(i))), None)


def open_sides(examples: str, validation_share: float) -> Sides:
    """The sides of a folder of examples, or of a split, here or at a URL."""
    folder = places.at(examples)
    with places.telling(folder):
        publishing = places.is_remote(folder) and (folder / PUBLISHING).exists()  # one side may be there already, and another not yet
        if publishing or not (folder / "train" / "manifest.json").is_file():
            return Sides(open_dataset(folder, "examples"), None, validation_share)
        held = (folder / "validation" / "manifest.json").is_file() or (folder / "validation").is_dir()
    validation = open_dataset(folder / "validation", "examples") if held else None
    return Sides(open_dataset(folder / "train", "examples"), validation, validation_share)
