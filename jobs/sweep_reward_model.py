"""Search over the settings of train_reward_model: many trials, the best one kept, judged once on the test split, registered.

    rayward run sweep_reward_model --examples store/toy/split --output store/toy/sweep --trials 16 --register my-rm \\
        --space '{"train.lr": ["log", 1e-4, 1e-2], "net.head_layers": [1, 2]}'
    rayward run sweep_reward_model --examples E --output O --space '{"train.lr": [1e-5, 3e-5], "train.epochs": [1, 2]}' --concurrency 4

--space is JSON: by the dotted name of a setting of train_reward_model a list of values, or a range: ["log", low, high],
["uniform", low, high], ["integer", low, high]. --trials draws so many at random; without it every combination is a trial. What the space
leaves out is set as for train_reward_model. Trials are compared on the validation examples alone (--by). Where EXAMPLES is a split with
test/, the winner is judged on it at the end, once: OUTPUT/report. --halve 3 ends bad trials early: after its 1st, 3rd, 9th ... validation
a trial goes on if it is among the best third of those that came that far.

Every trial is a fit in OUTPUT/trials/NAME and an MLflow run below the run of the sweep. Stop it, kill it: the same command repeats no trial
that ended, and goes on with the others from their checkpoints; a larger --trials adds to them.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from rayward import evaluation, fitting, places, registry, sweeping
from rayward.adapters import LoraSettings
from rayward.batching import BatchSettings
from rayward.config import as_dict, command
from rayward.fitting import FitSettings
from rayward.records import examples_of
from rayward.rendering import RenderSettings
from rayward.reward_model import ModelSettings
from rayward.scoring import Scorer
from rayward.storage import open_dataset
from rayward.sweeping import Rules, Sweep, Trial
from rayward.training import Report, TrainSettings


@dataclass(frozen=True)
class Settings:
    """What sweep_reward_model needs to know."""

    examples: str  # folder, URL or store:NAME of examples, or of a split with train/, validation/ and test/
    output: str  # folder for the trials and the model of the best, which all nodes see
    space: str  # JSON: setting -> list of values, or ["log", low, high], ["uniform", low, high], ["integer", low, high]
    trials: int = 0  # trials to draw from the space at random; 0: every combination
    by: sweeping.By = "loss"  # what is best on validation; loss where all trials have one objective
    halve: int = 0  # 3: after validation 1, 3, 9 ... a trial goes on only if it is among the best third so far; 0: none ends early
    concurrency: int = 1  # 1 runs trials in this process, one after the other; more as Ray tasks, so many at a time, a GPU each
    cpus: int = 1  # CPUs of each Ray task
    keep_models: bool = False  # keep the models of all trials, e.g. as an ensemble, and not only the winner's
    seed: int = 0  # another seed is another draw from the space
    register: str = ""  # name to register the winner under
    model: str = "tiny"  # folder, URL or hub name of a model, models:/NAME@ALIAS, or tiny: a small decoder from scratch
    objective: str = "auto"  # a loss (objectives.OBJECTIVES, docs/objectives.md), module:loss, or auto: what the labels are for
    objective_settings: str = "{}"  # JSON of the loss's own settings, e.g. '{"by_count": 8}' for binary_cross_entropy
    regularise: str = "{}"  # JSON of terms that add to the loss and their weights, e.g. '{"centre": 0.01}'
    validation_share: float = 0.1  # share of prompts held out for validation where the examples have no validation side
    net: ModelSettings = ModelSettings()
    lora: LoraSettings = LoraSettings()
    render: RenderSettings = RenderSettings()
    batch: BatchSettings = BatchSettings()
    train: TrainSettings = TrainSettings()

    def __post_init__(self) -> None:
        if self.concurrency < 1 or self.cpus < 1:
            raise ValueError(f"concurrency={self.concurrency} and cpus={self.cpus} must be at least 1")


def main(settings: Settings) -> dict[str, Any]:
    """Run the trials, keep the best, judge it on the test split, register it."""
    registry.check_name(settings.register)
    base = FitSettings.of(settings)
    rules = Rules(settings.by, settings.halve, settings.keep_models)
    space = sweeping.parse_space(settings.space)
    sweep = sweeping.prepare(base, space, settings.output, settings.trials, settings.seed, rules)
    settings = replace(settings, model=sweep.base.model)
    with registry.run("sweep_reward_model", as_dict(settings), keep=sweep.folder / fitting.TRACKING) as run:
        run.dataset(sweep.dataset, "training")
        results = sweeping.run(sweep, tracking(run.id), settings.concurrency, settings.cpus)
        winner = sweeping.crown(sweep, results)
        sweeping.show(results)
        best = results[0]
        run.artifact(sweep.folder / "trials.json")
        run.summary({f"best_{name}": best[name] for name in ("loss", "accuracy")})
        tested = judge(sweep, winner, run)
        print(f"model: {sweep.folder / 'model'}    {winner.name} of {len(results)}: {best['given']}")
        if settings.register:
            with registry.run("train_reward_model", as_dict(winner.fit), keep=winner.folder / fitting.TRACKING) as own:
                tags = {**best["tags"], **tested, "sweep": run.id, "sweep_trials": len(results), "sweep_trial": winner.name}
                version = registry.register(own, sweep.folder / "model", settings.register, tags)
            print(f"registered: models:/{settings.register}/{version}")
    return best


def tracking(parent: str) -> Callable[[Trial], AbstractContextManager[Report]]:
    """An MLflow run for a trial, below that of the sweep."""

    @contextmanager
    def tracked(trial: Trial) -> Iterator[Report]:
        with registry.run("train_reward_model", as_dict(trial.fit), keep=trial.folder / fitting.TRACKING) as run:
            run.tags({"mlflow.parentRunId": parent, "mlflow.runName": trial.name, **{f"space.{n}": v for n, v in trial.given.items()}})
            yield run.metrics

    return tracked


def judge(sweep: Sweep, winner: Trial, run: registry.RunLog) -> dict[str, float]:
    """What the winner is worth on the test split, where there is one; each winner is shown it once."""
    test = places.at(winner.fit.examples) / "test"
    seen = sweeping.shown(sweep)
    if winner.name in seen or not (test / "manifest.json").is_file():
        return seen.get(winner.name) or {}
    dataset = open_dataset(test, "examples")
    scorer = Scorer.load(sweep.folder / "model", trust_remote_code=winner.fit.net.trust_remote_code)
    report, rows = evaluation.evaluate(examples_of(dataset.table()), scorer.try_score, str(test), str(sweep.folder / "model"))
    page = evaluation.write_report(str(sweep.folder / "report"), report, rows) / "report.html"
    found = {f"test_{name}": value for name, value in report.headline.items()}
    sweeping.record_test(sweep, winner, found)
    run.dataset(dataset, "evaluation")
    run.artifact(page)
    run.summary(found)
    print(f"on the test split: {'  '.join(f'{name} {value:.4f}' for name, value in report.headline.items())}\nreport: {page}")
    if seen:
        print(f"warning: {len(seen) + 1} winners have been shown the test split; its numbers are no longer of one look")
    return found


if __name__ == "__main__":
    command(main)
