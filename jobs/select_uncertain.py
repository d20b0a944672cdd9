"""Choose what to label next from a pool of rollouts: the prompts on which several reward models do not agree.

    rayward run select_uncertain --source store/pool --model models:/my-rm/1,models:/my-rm/2,models:/my-rm/3 --count 500 --output store/next
    rayward run select_uncertain --source store/pool --model models:/my-rm --dropout 0.1 --passes 8 --count 500 --output store/next
    rayward run judge_pairs --source store/next --output store/judged

Several models are an ensemble: the same training with other seeds (`--set train.seed=1`), or other versions. A model that was trained with
`--set net.members=5` is one by itself. One model with `--dropout` is asked several times with a part of its inputs left out at random; one
with a single head can only say where it is undecided between its best two answers. Models of pairs and rankings disagree about differences
of scores within a prompt, models of outcomes and steps about chances.

OUTPUT holds all answers of the chosen prompts as rollouts, each with the reason in its provenance (`selected`: uncertain or random,
`uncertainty`, `uncertainty_rank`), for label_pairs, judge_pairs or people. A share of `--random` is drawn from the whole pool whatever
the models say: judge on it, and on nothing that was chosen. OUTPUT/uncertainty.parquet holds every prompt of the pool by rank,
OUTPUT/rejects what was not chosen, with its rank.
"""

import sys
from dataclasses import dataclass

from rayward import registry, uncertainty
from rayward.config import command
from rayward.dataflow import Engine, Recipe
from rayward.storage import Dataset, open_dataset
from rayward.uncertainty import SelectSettings


@dataclass(frozen=True)
class Settings:
    """What select_uncertain needs to know."""

    source: str  # folder of rollouts: the pool, answers of which no labels are known or used
    model: tuple[str, ...]  # folders of trained models, or models:/NAME@ALIAS, models:/NAME/VERSION; separated by commas
    output: str  # folder for the rollouts of the chosen prompts
    count: int  # prompts to choose
    select: SelectSettings = SelectSettings()
    actors: int = 1  # most actors at a time, each with a copy of a model
    gpus: float = -1.0  # GPUs of an actor on engine ray, e.g. 0.25 for four on one; -1: one where the cluster has any
    engine: Engine = "auto"  # where the work runs
    cpus: float = 1.0  # CPU cores that each task holds on engine ray
    memory_gib: float = 0.0  # GiB of memory that each task holds on engine ray; 0: not counted
    overwrite: bool = False  # replace what OUTPUT holds

    def __post_init__(self) -> None:
        if self.count < 1 or self.actors < 1 or not self.model:
            raise ValueError(f"count={self.count} and actors={self.actors} must be at least 1, and there must be a model")


def main(settings: Settings) -> Dataset:
    """Score the pool with every model, choose, write."""
    pool = open_dataset(settings.source, "rollouts")
    folders = [registry.model_address(model) for model in settings.model]
    recipe = Recipe.of("select_uncertain", settings, pool.lineage(), *map(registry.identity, settings.model))
    made = uncertainty.select(recipe, pool, folders, settings.count, settings.select, settings.actors)
    found = uncertainty.shares(made)
    print(f"{found['uncertain']:,} prompts by uncertainty, {found['random']:,} at random", file=sys.stderr)
    if sum(found.values()) < settings.count:
        print(f"warning: the pool has no {settings.count:,} prompts that can be measured and differ", file=sys.stderr)
    return made


if __name__ == "__main__":
    command(main)
