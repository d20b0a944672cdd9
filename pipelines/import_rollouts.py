"""Bring somebody's judgements in: files of a known format become rollouts, every row accounted for.

    rayward run import_rollouts --format hh --source harmless-base/test.jsonl.gz --output store/hh/rollouts

Formats: rollouts (our own JSONL or Parquet), hh (HH-RLHF transcripts), preference (prompt?/chosen/rejected, texts or messages,
optional margin), outcomes (problem, solution, correct). A source is a file, a folder of files, or a set that `datasets` can load.
What cannot be used lies in OUTPUT/rejects with its reason.
"""

from dataclasses import dataclass

from rayward import dataflow, formats
from rayward.config import command
from rayward.dataflow import Engine, Recipe
from rayward.storage import Dataset


@dataclass(frozen=True)
class Settings:
    """What import_rollouts needs to know."""

    source: str  # a .jsonl, .jsonl.gz or .parquet file, a folder of them, or org/name:split of a hub data set
    output: str  # folder for the rollouts
    format: str = "rollouts"  # what the rows are: rollouts, hh, preference, outcomes, or your own as module:function
    parts: int = 0  # parts the output is laid into, a power of two (0: by size)
    engine: Engine = "auto"  # where the work runs
    overwrite: bool = False  # replace what OUTPUT holds


def main(settings: Settings) -> Dataset:
    """Read every file, lay the rollouts into parts by prompt."""
    files = formats.find_files(settings.source)
    recipe = Recipe.of("import_rollouts", settings, *(formats.describe_file(path) for _, path in files))
    return dataflow.import_files(recipe, files, settings.format, settings.parts)


if __name__ == "__main__":
    command(main)
