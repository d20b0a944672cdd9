"""Write examples as somebody else's rows: TRL, OpenRLHF, NeMo, LLaMA-Factory, Math-Shepherd, PRM800K, ... (docs/formats.md).

    rayward run export_examples --source store/hh/pairs --format preference --output store/hh/trl

OUTPUT holds a .jsonl file per part, rejects/ with the examples that the format cannot say (a tie, a conversation, soft labels) and
why, and a manifest whose counts add up. What is written reads back as the same examples: import_rollouts, then the same label.
"""

from dataclasses import dataclass

from rayward.config import command
from rayward.dataflow import Engine, Recipe
from rayward.dataflow.export import Exported, export
from rayward.storage import open_dataset


@dataclass(frozen=True)
class Settings:
    """What export_examples needs to know."""

    source: str  # folder of examples
    format: str  # what the rows are to be: preference, openrlhf, nemo_rl, hh, trl_stepwise, ... or your own as module:function
    output: str  # folder for the files
    exact: bool = True  # reject votes where the format has no place for how many they were; otherwise that is dropped
    compress: bool = False  # write .jsonl.gz
    engine: Engine = "auto"  # where the work runs
    cpus: float = 1.0  # CPU cores that each task holds on engine ray
    memory_gib: float = 0.0  # GiB of memory that each task holds on engine ray; 0: not counted
    overwrite: bool = False  # replace what OUTPUT holds


def main(settings: Settings) -> Exported:
    """Write every part of the examples."""
    examples = open_dataset(settings.source, "examples")
    recipe = Recipe.of("export_examples", settings, examples.lineage())
    return export(recipe, examples, settings.format, settings.compress, settings.exact)


if __name__ == "__main__":
    command(main)
