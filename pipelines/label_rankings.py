"""Rankings for a Plackett-Luce model: all answers of one judgement, with their rewards as graded relevance.

    rayward run label_rankings --source store/toy/rollouts --output store/toy/rankings
    rayward run label_rankings --source store/toy/rollouts --output store/toy/ranked --scores models:/toy-pairs@champion

A ranking of K answers is one example of K answers, not K(K-1)/2 pairs. Equal rewards are a tie; a judgement in which all answers
tie says nothing and is rejected. With `--scores` a reward model is the judge: its score is the reward of every answer.
"""

from dataclasses import dataclass

from rayward import dataflow
from rayward.config import command
from rayward.dataflow import Engine, Recipe
from rayward.errors import SettingsError
from rayward.labels import LABELERS, RankingSettings
from rayward.storage import Dataset, open_dataset


@dataclass(frozen=True)
class Settings:
    """What label_rankings needs to know."""

    source: str  # folder of rollouts
    output: str  # folder for the examples
    label: RankingSettings = RankingSettings()
    scores: str = ""  # folder of a trained model, or models:/NAME@ALIAS, that ranks the answers of a prompt (empty: their rewards do)
    actors: int = 1  # with scores, most actors at a time, each with a copy of the model
    gpus: float = -1.0  # GPUs of each of them; -1: one for a model in the worker's own process, where the cluster has any
    engine: Engine = "auto"  # where the work runs
    cpus: float = 1.0  # CPU cores that each task holds on engine ray
    memory_gib: float = 0.0  # GiB of memory that each task holds on engine ray; 0: not counted
    overwrite: bool = False  # replace what OUTPUT holds


def main(settings: Settings) -> Dataset:
    """Label the rollouts of every prompt; say of each that was not used why."""
    rollouts = open_dataset(settings.source, "rollouts")
    if not settings.scores:
        dataflow.check_by(rollouts, settings.label.by)
    elif settings.label.by != "reward":
        raise SettingsError(f"by={settings.label.by} does not go with scores, which are the reward", "leave one of the two out")
    if settings.scores:
        from rayward import registry, scoring  # torch and mlflow, only where a model is asked for

        model, judge = registry.model_address(settings.scores), registry.identity(settings.scores)
        recipe = Recipe.of("label_rankings", settings, rollouts.lineage(), judge)
        return scoring.label_by_scores(
            recipe, rollouts, model, f"scores of {settings.scores}", LABELERS["rankings"], settings.label, settings.actors
        )
    recipe = Recipe.of("label_rankings", settings, rollouts.lineage())
    return dataflow.label(recipe, rollouts, LABELERS["rankings"], settings.label)


if __name__ == "__main__":
    command(main)
