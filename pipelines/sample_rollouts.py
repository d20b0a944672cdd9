"""Let a policy answer problems, grade the answers, and continue step prefixes where step labels are wanted.

    rayward run sample_rollouts --problems toy:400 --output store/toy/rollouts
    rayward run sample_rollouts --problems toy:300 --set sample.answers=1 --set sample.continued=1 --output store/toy/stepwise

Problems are rows with `prompt` (or `question`) and `gold` (or `answer`), or `toy:N`: N problems of the built-in world.
"""

from dataclasses import dataclass

from rayward import formats, sampling
from rayward.config import command
from rayward.dataflow import Engine, Recipe
from rayward.sampling import SampleSettings
from rayward.storage import Dataset


@dataclass(frozen=True)
class Settings:
    """What sample_rollouts needs to know."""

    problems: str  # a file or folder of problems, or toy:N (toy:N:SEED for other problems)
    output: str  # folder for the rollouts
    sample: SampleSettings = SampleSettings()
    parts: int = 0  # parts the output is laid into, a power of two (0: by size)
    actors: int = 0  # workers that draw on engine ray, each with a policy of its own (0: every core, or one where it is a model)
    gpus: float = -1.0  # GPUs of each of them; -1: one for a model in the worker's own process, where the cluster has any
    engine: Engine = "auto"  # where the work runs
    cpus: float = 1.0  # CPU cores that each task holds on engine ray
    memory_gib: float = 0.0  # GiB of memory that each task holds on engine ray; 0: not counted
    overwrite: bool = False  # replace what OUTPUT holds


def main(settings: Settings) -> Dataset:
    """Sample, grade, lay the rollouts into parts by prompt."""
    toy = settings.problems.startswith("toy:")
    files = [] if toy else formats.find_files(settings.problems)
    recipe = Recipe.of("sample_rollouts", settings, *(formats.describe_file(path) for _, path in files))
    return sampling.sample(recipe, settings.problems, settings.sample, settings.parts, settings.actors)


if __name__ == "__main__":
    command(main)
