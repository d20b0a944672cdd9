"""Mix examples of several sources, each with a weight and a cap, as one mixture.yaml says.

    rayward run mix_examples --mixture mixture.yaml --output store/mixed

    # mixture.yaml
    seed: 0
    sources:
      hh:     {path: store/hh/pairs}
      oasst:  {path: store/oasst/pairs, cap: 10000}          # at most so many examples, drawn by hash
      judged: {path: store/judged/pairs, weight: 0.25}       # each counts a quarter in the loss

The source's name is in front of every id and in the provenance. What a cap leaves out lies in OUTPUT/rejects.
"""

from dataclasses import dataclass

from rayward.config import command
from rayward.dataflow import Engine, Recipe
from rayward.dataflow.mixing import mix, read_mixture
from rayward.storage import Dataset


@dataclass(frozen=True)
class Settings:
    """What mix_examples needs to know."""

    mixture: str  # YAML file: the sources with their weights and caps
    output: str  # folder for the examples
    engine: Engine = "auto"  # where the work runs
    cpus: float = 1.0  # CPU cores that each task holds on engine ray
    memory_gib: float = 0.0  # GiB of memory that each task holds on engine ray; 0: not counted
    overwrite: bool = False  # replace what OUTPUT holds


def main(settings: Settings) -> Dataset:
    """Open every source, draw what its cap allows, lay all of it together."""
    mixture = read_mixture(settings.mixture)
    inputs = [mixture.describe(), *(source.dataset.lineage() for source in mixture.sources)]
    return mix(Recipe.of("mix_examples", settings, *inputs), mixture)


if __name__ == "__main__":
    command(main)
