"""Rankings for a Plackett-Luce model: all answers of one judgement, with their rewards as graded relevance.

    rayward run label_rankings --source store/toy/rollouts --output store/toy/rankings

A ranking of K answers is one example of K answers, not K(K-1)/2 pairs. Equal rewards are a tie; a judgement in which all answers
tie says nothing and is rejected.
"""

from dataclasses import dataclass

from rayward import dataflow
from rayward.config import command
from rayward.dataflow import Engine, Recipe
from rayward.labels import LABELERS, RankingSettings
from rayward.storage import Dataset, open_dataset


@dataclass(frozen=True)
class Settings:
    """What label_rankings needs to know."""

    source: str  # folder of rollouts
    output: str  # folder for the examples
    label: RankingSettings = RankingSettings()
    engine: Engine = "auto"  # where the work runs
    overwrite: bool = False  # replace what OUTPUT holds


def main(settings: Settings) -> Dataset:
    """Label the rollouts of every prompt; say of each that was not used why."""
    rollouts = open_dataset(settings.source, "rollouts")
    recipe = Recipe.of("label_rankings", settings, rollouts.lineage())
    return dataflow.label(recipe, rollouts, LABELERS["rankings"], settings.label)


if __name__ == "__main__":
    command(main)
