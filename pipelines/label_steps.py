"""Step values for a process reward model: the share of continuations of every step prefix that end right.

    rayward run label_steps --source store/toy/stepwise --output store/toy/steps

The last step's value is the answer's own outcome, known without sampling. Soft values stay soft all the way to the loss; the number
of continuations behind each is kept. An answer with too few graded continuations somewhere is rejected.
"""

from dataclasses import dataclass

from rayward import dataflow
from rayward.config import command
from rayward.dataflow import Engine, Recipe
from rayward.labels import LABELERS, StepSettings
from rayward.storage import Dataset, open_dataset


@dataclass(frozen=True)
class Settings:
    """What label_steps needs to know."""

    source: str  # folder of rollouts
    output: str  # folder for the examples
    label: StepSettings = StepSettings()
    engine: Engine = "auto"  # where the work runs
    overwrite: bool = False  # replace what OUTPUT holds


def main(settings: Settings) -> Dataset:
    """Label the rollouts of every prompt; say of each that was not used why."""
    rollouts = open_dataset(settings.source, "rollouts")
    recipe = Recipe.of("label_steps", settings, rollouts.lineage())
    return dataflow.label(recipe, rollouts, LABELERS["steps"], settings.label)


if __name__ == "__main__":
    command(main)
