"""The whole story on the built-in toy world: sample, grade, label three ways on Ray Data, train three models, judge, register.

    rayward quickstart

A policy answers problems whose truth is known (the running maximum, `rayward/toy_world.py`). From its answers come pairs, rankings of
eight, and Monte-Carlo step values; the same loop trains a small decoder on each. Unseen problems say how good they are. Takes minutes
on a laptop, downloads nothing; run it again and what is done is not done twice.
"""

import os
import shutil
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayward import cluster, dataflow, evaluation, fitting, labels, places, registry, sampling, suites
from rayward.batching import BatchSettings
from rayward.config import as_dict, command
from rayward.dataflow import Engine, Recipe
from rayward.evaluation import Report
from rayward.fitting import FitSettings, Fitted
from rayward.places import Place
from rayward.rendering import RenderSettings
from rayward.reward_model import ModelSettings
from rayward.sampling import SampleSettings
from rayward.scoring import Scorer
from rayward.storage import Dataset
from rayward.training import TrainSettings

SUITE = {"pairs": "toy_pairs", "rankings": "toy_best_of_8", "steps": "toy_steps"}


@dataclass(frozen=True)
class Settings:
    """What quickstart needs to know."""

    output: str = "store:quickstart"  # place for everything it makes, here below the store (RAYWARD_STORE), whose registry it uses
    problems: int = 1000  # problems that are sampled for each kind of label
    engine: Engine = "ray"  # where labels are built; local starts no cluster
    overwrite: bool = False  # forget an earlier quickstart in OUTPUT


@dataclass(frozen=True)
class Story:
    """One kind of label from rollouts to a registered model."""

    kind: str
    examples: Dataset
    fitted: Fitted
    report: Report
    version: str


def main(settings: Settings) -> None:
    """Three kinds of labels, three models, one table."""
    output = places.at(settings.output)
    if settings.overwrite:
        for name in ("answers", "stepwise", *SUITE, *(f"{k}-{what}" for k in SUITE for what in ("model", "report"))):
            places.remove(output / name)
    made = label(settings, output)
    stories = [train_and_judge(kind, examples, output) for kind, examples in made.items()]
    show(stories, output)


def label(settings: Settings, output: Place) -> dict[str, Dataset]:
    """Sample answers (and continuations of step prefixes), and make all three kinds of examples of them."""

    def recipe(made_by: str, name: str, what: dict[str, Any], *inputs: Dataset) -> Recipe:
        return Recipe(made_by, str(output / name), what, [i.lineage() for i in inputs], settings.engine)

    def sampled(name: str, problems: str, sample: SampleSettings) -> Dataset:
        return sampling.sample(recipe("sample_rollouts", name, {"problems": problems, "sample": sample}), problems, sample)

    print("\n1. A policy answers problems; the answers are graded and labeled on Ray Data", file=sys.stderr)
    made = {}
    with nullcontext() if settings.engine == "local" or (output / "steps").is_dir() else cluster.connect():
        answers = sampled("answers", f"toy:{settings.problems}", SampleSettings(answers=8))
        continued = sampled("stepwise", f"toy:{settings.problems}:1", SampleSettings(answers=1, continued=1, continuations=8))
        for kind, source in (("pairs", answers), ("rankings", answers), ("steps", continued)):
            labeler = labels.LABELERS[kind]
            chosen = labels.PairSettings("adjacent") if kind == "pairs" else labeler.settings()
            made[kind] = dataflow.label(recipe(f"label_{kind}", kind, {"label": chosen}, source), source, labeler, chosen)
    return made


def train_and_judge(kind: str, examples: Dataset, output: Place) -> Story:
    """One kind of label: train, evaluate on unseen problems, register, promote."""
    print(f"\n{2 + list(SUITE).index(kind)}. A reward model from {kind}", file=sys.stderr)
    folder = output / f"{kind}-model"
    fit = FitSettings(
        examples=str(examples.path),
        model="tiny",
        objective="auto",
        net=ModelSettings(),
        render=RenderSettings(max_length=256),
        batch=BatchSettings(size=16),
        train=TrainSettings(lr=2e-3, epochs={"pairs": 6, "rankings": 4, "steps": 12}[kind]),
        validation_share=0.1,
    )
    with registry.run("quickstart", as_dict(fit), keep=folder / fitting.TRACKING) as run:
        run.dataset(examples, "training")
        fitted = fitting.fit(fit, str(folder), report=run.metrics)
        suite = SUITE[kind]
        scorer = Scorer.load(fitted.model)
        report, rows = evaluation.evaluate(suites.SUITES[suite](), scorer.try_score, f"{suite}: unseen problems", f"toy-{kind}")
        page = evaluation.write_report(str(output / f"{kind}-report"), report, rows) / "report.html"
        run.summary(report.headline)
        run.artifact(places.fetch(page))
        version = registry.register(run, fitted.model, f"toy-{kind}", {**fitted.tags, **report.headline})
    registry.promote(f"toy-{kind}", version)
    return Story(kind, examples, fitted, report, version)


def show(stories: list[Story], output: Place) -> None:
    """The table, and what to do next."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="On unseen problems", title_justify="left", header_style="bold", box=None)
    for column in ("labels", "built", "accuracy [95 %]", "longer wins", "ECE before → after", "registered as"):
        table.add_column(column, no_wrap=True)
    also = []
    for story in stories:
        n = story.report.numbers
        main_part = n.get("order") or n["segments"]
        accuracy = main_part["accuracy"]
        longer = n["order"]["length_baseline"]["value"] if "order" in n else None
        if "first_error" in n.get("segments", {}):
            first = n["segments"]["first_error"]
            also.append(
                f"steps: finds the first wrong step with F1 {first['f1']:.3f}; a random step is it {first['random_step_baseline']:.3f}"
            )
        elif story.kind == "rankings":
            best = n["best_of"]
            also.append(f"rankings: the best of 8 by score is right {best['picked']:.3f}, the mean answer {best['mean_answer']:.3f}")
        table.add_row(
            story.kind,
            f"{story.examples.manifest.out:,}",
            f"{accuracy['value']:.3f} [{accuracy['low']:.3f}, {accuracy['high']:.3f}]",
            f"{longer:.3f}" if longer is not None else "–",
            f"{main_part['ece']:.3f} → {main_part['calibrated']['ece']:.3f}",
            f"models:/toy-{story.kind}/{story.version}",
        )
    console = Console(width=max(110, Console().width))
    console.print()
    console.print(table)
    print("\n" + "\n".join(also))
    shown = os.path.relpath(output) if isinstance(output, Path) else output
    print(f"\nreports: {shown}/*-report/report.html\n\ntry next:")
    here = "rayward" if shutil.which("rayward") else os.path.relpath(Path(sys.executable).parent / "rayward")
    print(f"  {here} ui                                   # opens the registry and the runs in a browser")
    print(f"  {here} models show toy-steps@champion       # what a model is and what it came from")
    print(f"  {here} run evaluate_model --model models:/toy-pairs@champion --suite toy_best_of_8 --output store:report")


if __name__ == "__main__":
    command(main)
