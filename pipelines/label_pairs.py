"""Pairs for a Bradley-Terry model: of two answers of one judgement, the one with the higher reward comes first.

    rayward run label_pairs --source store/toy/rollouts --output store/toy/pairs
    rayward run label_pairs --source store/pandalm/rollouts --output store/pandalm/pairs --votes --min-agreement 0.6
    rayward run label_pairs --source store/helpsteer/rollouts --output store/hs/pairs --by helpfulness --min-gap 1

Rewards are compared inside a judgement only. A judgement's pairs weigh 1 together, so a prompt with many answers does not
outvote the others. With `--votes` the judgements of several annotators on the same two texts become one example with the shares of
votes as targets (train it with --objective vote_share). Rollouts that no pair was made of lie in OUTPUT/rejects with the reason.
"""

from dataclasses import dataclass

from rayward import dataflow
from rayward.config import command
from rayward.dataflow import Engine, Recipe
from rayward.labels import LABELERS, PairSettings
from rayward.storage import Dataset, open_dataset


@dataclass(frozen=True)
class Settings:
    """What label_pairs needs to know."""

    source: str  # folder of rollouts
    output: str  # folder for the examples
    label: PairSettings = PairSettings()
    engine: Engine = "auto"  # where the work runs
    cpus: float = 1.0  # CPU cores that each task holds on engine ray
    memory_gib: float = 0.0  # GiB of memory that each task holds on engine ray; 0: not counted
    overwrite: bool = False  # replace what OUTPUT holds


def main(settings: Settings) -> Dataset:
    """Label the rollouts of every prompt; say of each that was not used why."""
    rollouts = open_dataset(settings.source, "rollouts")
    dataflow.check_by(rollouts, settings.label.by)
    recipe = Recipe.of("label_pairs", settings, rollouts.lineage())
    return dataflow.label(recipe, rollouts, LABELERS["pairs"], settings.label)


if __name__ == "__main__":
    command(main)
