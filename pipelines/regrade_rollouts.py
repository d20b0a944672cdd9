"""Grade answers again, with another grader or after its rules have changed; nothing is sampled.

    rayward run regrade_rollouts --source store/math/rollouts --grader math --output store/math/regraded

Every rollout needs the gold answer of its problem in its provenance (`gold` or `reference`), as `sample_rollouts` and the formats that have
one leave it; those without lie in OUTPUT/rejects. How many outcomes are now another is said at the end. An answer that was cut off stays
unknown. Labels are made from the output as they were from the source.
"""

from dataclasses import dataclass

from rayward import sampling
from rayward.config import command
from rayward.dataflow import Engine, Recipe
from rayward.grading import grader_version
from rayward.storage import Dataset, open_dataset


@dataclass(frozen=True)
class Settings:
    """What regrade_rollouts needs to know."""

    source: str  # folder of rollouts
    output: str  # folder for the same rollouts with other outcomes
    grader: str = "numeric"  # how a final answer is held against the gold one (grading.GRADERS)
    engine: Engine = "auto"  # where the work runs
    cpus: float = 1.0  # CPU cores that each task holds on engine ray
    memory_gib: float = 0.0  # GiB of memory that each task holds on engine ray; 0: not counted
    overwrite: bool = False  # replace what OUTPUT holds


def main(settings: Settings) -> Dataset:
    """Grade every rollout by its text."""
    rollouts = open_dataset(settings.source, "rollouts")
    recipe = Recipe.of("regrade_rollouts", settings, rollouts.lineage(), {"graded_by": grader_version(settings.grader)})
    return sampling.regrade(recipe, rollouts, settings.grader)


if __name__ == "__main__":
    command(main)
