"""Outcomes for an outcome reward model: right or wrong for every answer of a prompt.

    rayward run label_outcomes --source store/toy/rollouts --output store/toy/outcomes

Answers whose outcome is unknown are rejected, never counted as wrong.
"""

from dataclasses import dataclass

from rayward import dataflow
from rayward.config import command
from rayward.dataflow import Engine, Recipe
from rayward.labels import LABELERS, OutcomeSettings
from rayward.storage import Dataset, open_dataset


@dataclass(frozen=True)
class Settings:
    """What label_outcomes needs to know."""

    source: str  # folder of rollouts
    output: str  # folder for the examples
    label: OutcomeSettings = OutcomeSettings()
    engine: Engine = "auto"  # where the work runs
    cpus: float = 1.0  # CPU cores that each task holds on engine ray
    memory_gib: float = 0.0  # GiB of memory that each task holds on engine ray; 0: not counted
    overwrite: bool = False  # replace what OUTPUT holds


def main(settings: Settings) -> Dataset:
    """Label the rollouts of every prompt; say of each that was not used why."""
    rollouts = open_dataset(settings.source, "rollouts")
    recipe = Recipe.of("label_outcomes", settings, rollouts.lineage())
    return dataflow.label(recipe, rollouts, LABELERS["outcomes"], settings.label)


if __name__ == "__main__":
    command(main)
