"""Ratings per attribute (helpfulness, verbosity, ...): one target per answer and attribute, missing ones masked.

    rayward run label_attributes --source store/helpsteer/rollouts --output store/helpsteer/attributes
    rayward run label_attributes ... --attributes helpfulness      one of them: what a model of one score learns

Several ratings of one answer become their mean, with how many they were. To compare answers by an attribute instead, see label_pairs
and label_rankings with --by helpfulness.
"""

from dataclasses import dataclass, replace

from rayward import dataflow
from rayward.config import command
from rayward.dataflow import Engine, Recipe
from rayward.labels import LABELERS, AttributeSettings
from rayward.storage import Dataset, open_dataset


@dataclass(frozen=True)
class Settings:
    """What label_attributes needs to know."""

    source: str  # folder of rollouts
    output: str  # folder for the examples
    label: AttributeSettings = AttributeSettings()
    engine: Engine = "auto"  # where the work runs
    cpus: float = 1.0  # CPU cores that each task holds on engine ray
    memory_gib: float = 0.0  # GiB of memory that each task holds on engine ray; 0: not counted
    overwrite: bool = False  # replace what OUTPUT holds


def main(settings: Settings) -> Dataset:
    """Find the attributes there are, label the rollouts of every prompt."""
    rollouts = open_dataset(settings.source, "rollouts")
    names = settings.label.attributes or dataflow.attribute_names(rollouts)
    for name in names:
        dataflow.check_by(rollouts, name)
    settings = replace(settings, label=AttributeSettings(names))
    recipe = Recipe.of("label_attributes", settings, rollouts.lineage())
    return dataflow.label(recipe, rollouts, LABELERS["attributes"], settings.label)


if __name__ == "__main__":
    command(main)
