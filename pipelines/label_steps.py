"""Step values for a process reward model: P(final answer right) after every step, and whether it is still good.

    rayward run label_steps --source store/toy/stepwise --output store/toy/steps
    rayward run label_steps --source store/toy/rollouts --output store/toy/drawn --policy toy --scheme auto
    rayward run label_steps --source store/prm800k/rollouts --output store/prm800k/steps --neutral unknown

From continuations that are in the source; or drawn here by a policy, where a scheme asks for them (`--policy`): some ten times
fewer completions than every prefix n times, at the same accuracy (docs/montecarlo.md); or from judged steps, as people or a judge left
them. Soft values stay soft all the way to the loss; the number of verdicts behind each is kept.

Which scheme: skew where the policy's errors are final, posterior where it repairs some or soft values are wanted, auto where you do not
know: it measures that on a few wrong answers first. What was drawn lies word for word in `.OUTPUT.verdicts` (or `--log`): the same
command goes on after a kill and draws nothing twice.
"""

from dataclasses import dataclass

from rayward import dataflow, montecarlo
from rayward.config import command
from rayward.dataflow import Engine, Recipe
from rayward.errors import SettingsError
from rayward.labels import LABELERS, StepSettings
from rayward.montecarlo import StepSampling
from rayward.storage import Dataset, open_dataset


@dataclass(frozen=True)
class Settings:
    """What label_steps needs to know."""

    source: str  # folder of rollouts
    output: str  # folder for the examples
    label: StepSettings = StepSettings()
    sampling: StepSampling = StepSampling()
    log: str = ""  # folder that keeps every completion ("": .OUTPUT.verdicts beside the output)
    actors: int = 1  # workers that draw, each with a policy of its own, on engine ray
    gpus: float = -1.0  # GPUs of each of them; -1: one for a model in the worker's own process, where the cluster has any
    engine: Engine = "auto"  # where the work runs
    cpus: float = 1.0  # CPU cores that each task holds on engine ray
    memory_gib: float = 0.0  # GiB of memory that each task holds on engine ray; 0: not counted
    overwrite: bool = False  # replace what OUTPUT holds


def main(settings: Settings) -> Dataset:
    """Label the rollouts of every prompt; say of each that was not used why."""
    rollouts = open_dataset(settings.source, "rollouts")
    recipe = Recipe.of("label_steps", settings, rollouts.lineage())
    if settings.sampling.policy and settings.label != StepSettings():
        raise SettingsError(
            "estimate, min_continuations, neutral and both are about what the source holds, and policy draws anew",
            "leave one of the two out",
        )
    if not settings.sampling.policy and settings.sampling != StepSampling():
        raise SettingsError("settings of drawing are given, and there is no policy to draw with", "name one: --policy server")
    if settings.sampling.policy:
        return montecarlo.label_steps(recipe, rollouts, settings.sampling, settings.log, settings.actors)
    return dataflow.label(recipe, rollouts, LABELERS["steps"], settings.label)


if __name__ == "__main__":
    command(main)
