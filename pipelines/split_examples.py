"""Train, validation and test by hash of the prompt: no prompt is on two sides, today or when more data comes.

    rayward run split_examples --source store/toy/pairs --output store/toy/pairs-split

OUTPUT holds three datasets: train, validation, test. Rollouts can be split too, before they are labeled.
"""

from dataclasses import dataclass

from rayward import dataflow
from rayward.config import command
from rayward.dataflow import Engine, Recipe
from rayward.splits import Shares
from rayward.storage import Dataset, open_dataset


@dataclass(frozen=True)
class Settings:
    """What split_examples needs to know."""

    source: str  # folder of examples or rollouts
    output: str  # folder for train/, validation/ and test/
    shares: Shares = Shares()
    engine: Engine = "auto"  # where the work runs
    cpus: float = 1.0  # CPU cores that each task holds on engine ray
    memory_gib: float = 0.0  # GiB of memory that each task holds on engine ray; 0: not counted
    overwrite: bool = False  # replace what OUTPUT holds


def main(settings: Settings) -> list[Dataset]:
    """Send every record to the side of its prompt."""
    source = open_dataset(settings.source)
    recipe = Recipe.of("split_examples", settings, source.lineage())
    return dataflow.split(recipe, source, settings.shares)


if __name__ == "__main__":
    command(main)
