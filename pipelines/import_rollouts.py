"""Bring somebody's judgements in: files of a known format become rollouts, every row accounted for.

    rayward run import_rollouts --source harmless-base/test.jsonl.gz --output store/hh/rollouts
    rayward run import_rollouts --source s3://bucket/votes/ --format votes --output store/votes/rollouts

A source is a .jsonl, .json, .csv (each also .gz, .zst) or .parquet file, a folder of them, a URL of either (s3://, gs://, hf://), or a
set that `datasets` loads. `--format auto` tells the format of every file by the keys of its first rows, and says how it knew;
docs/formats.md lists the formats. What cannot be used lies in OUTPUT/rejects with its reason. So do rows whose prompt was made from more
than texts (`tools`, `chat_template_kwargs`, images): no format reads that, and `--without tools` takes them without it.
"""

from dataclasses import dataclass

from rayward import dataflow, formats
from rayward.config import command
from rayward.dataflow import Engine, Recipe
from rayward.storage import Dataset


@dataclass(frozen=True)
class Settings:
    """What import_rollouts needs to know."""

    source: str  # a file, a folder of files, a URL of either, or org/name:split of a hub data set
    output: str  # folder for the rollouts
    format: str = "auto"  # what the rows are: a name from docs/formats.md, your own as module:function, or auto: by their keys
    without: str = ""  # what the prompts were made from and no format reads, to take such rows without it, e.g. tools,chat_template_kwargs
    parts: int = 0  # parts the output is laid into, a power of two (0: by size)
    engine: Engine = "auto"  # where the work runs
    cpus: float = 1.0  # CPU cores that each task holds on engine ray
    memory_gib: float = 0.0  # GiB of memory that each task holds on engine ray; 0: not counted
    overwrite: bool = False  # replace what OUTPUT holds


def main(settings: Settings) -> Dataset:
    """Read every file, lay the rollouts into parts by prompt."""
    files = formats.find_files(settings.source)
    named = dataflow.formats_of(files, settings.format)
    recipe = Recipe.of("import_rollouts", settings, *({**formats.describe_file(path), "format": named[path]} for _, path in files))
    return dataflow.import_files(recipe, files, named, settings.parts, settings.without)


if __name__ == "__main__":
    command(main)
