"""Score rollouts with a reward model: a pool of actors on Ray Data, each with the model loaded once.

    rayward run score_rollouts --model models:/toy-pairs@champion --source store/toy/rollouts --output store/toy/scored

OUTPUT holds the rollouts with a `score` each, and `step_scores` where the model reads steps. Answers of one prompt share its encoding.
Of a model with several heads (`net.members`) `member_scores` are what each says of the answer; `--caution 1` takes one standard deviation
of them off the score, so that optimising against it does not seek what they disagree about (Coste et al. 2023, arXiv 2310.02743).
What cannot be scored lies in OUTPUT/rejects with its reason.
"""

from dataclasses import dataclass

from rayward import metrics, registry, scoring
from rayward.config import command
from rayward.dataflow import Engine, Recipe
from rayward.storage import Dataset, open_dataset


@dataclass(frozen=True)
class Settings:
    """What score_rollouts needs to know."""

    model: str  # folder or URL of a trained model, or models:/NAME@ALIAS
    source: str  # folder of rollouts
    output: str  # folder for the scored rollouts
    aggregate: metrics.Aggregation = "last"  # how the scores of steps become the answer's, where the model reads steps
    caution: float = 0.0  # standard deviations over the heads of a model (net.members) that are taken off its score, e.g. 1
    actors: int = 1  # most actors at a time, each with a copy of the model
    gpus: float = -1.0  # GPUs of an actor on engine ray, e.g. 0.25 for four on one; -1: one where the cluster has any
    engine: Engine = "auto"  # where the work runs
    cpus: float = 1.0  # CPU cores that each task holds on engine ray
    memory_gib: float = 0.0  # GiB of memory that each task holds on engine ray; 0: not counted
    overwrite: bool = False  # replace what OUTPUT holds

    def __post_init__(self) -> None:
        if self.actors < 1:
            raise ValueError(f"actors={self.actors} must be at least 1")
        if self.caution < 0:
            raise ValueError(f"caution={self.caution} must be at least 0")


def main(settings: Settings) -> Dataset:
    """Score every part of the rollouts."""
    rollouts = open_dataset(settings.source, "rollouts")
    model = registry.model_address(settings.model)
    recipe = Recipe.of("score_rollouts", settings, rollouts.lineage(), registry.identity(settings.model))
    return scoring.score_dataset(recipe, rollouts, model, settings.actors, settings.aggregate, settings.caution)


if __name__ == "__main__":
    command(main)
