"""How good is a reward model, and how sure is that: numbers with intervals, calibration, plots, trivial baselines beside them.

    rayward run evaluate_model --model store/toy/pairs-model/model --examples store/toy/split/test --output store/toy/report
    rayward run evaluate_model --model models:/toy-pairs@champion --suite toy_pairs --output store/toy/report

Writes OUTPUT/report.json, report.html and scores.parquet (one row per example, so every number can be computed again).
"""

from dataclasses import dataclass

from rayward import evaluation, registry, suites
from rayward.config import as_dict, choose, command
from rayward.errors import SettingsError
from rayward.evaluation import Report
from rayward.places import fetch
from rayward.records import examples_of
from rayward.scoring import Scorer
from rayward.storage import open_dataset


@dataclass(frozen=True)
class Settings:
    """What evaluate_model needs to know."""

    model: str  # folder of a trained model, or models:/NAME@ALIAS
    output: str  # folder for the report
    examples: str = ""  # folder of examples that the model has not seen
    suite: str = ""  # or a built-in suite: toy_pairs, toy_best_of_8, toy_steps, or your own as module:function
    trust_remote_code: bool = False  # run code that comes with the model


def main(settings: Settings) -> Report:
    """Score the examples, judge the scores, write the report, log it."""
    if bool(settings.examples) == bool(settings.suite):
        raise SettingsError("give either --examples or --suite", f"suites: {', '.join(suites.SUITES)}")
    evaluation.check_output(settings.output)
    if settings.examples:
        dataset = open_dataset(settings.examples, "examples")
        examples, name = examples_of(dataset.table()), str(dataset.path)
    else:
        dataset, examples, name = None, choose(suites.SUITES, settings.suite, "suite")(), settings.suite
    scorer = Scorer.load(registry.model_folder(settings.model), trust_remote_code=settings.trust_remote_code)
    report, rows = evaluation.evaluate(examples, scorer.try_score, name, settings.model)
    folder = evaluation.write_report(settings.output, report, rows)
    with registry.run("evaluate_model", as_dict(settings)) as run:
        if dataset is not None:
            run.dataset(dataset, "evaluation")
        run.summary({**report.headline, **report.counts})
        for file in evaluation.FILES:
            run.artifact(fetch(folder / file))
        if settings.model.startswith("models:/"):
            row = registry.find(settings.model)
            short = f"{dataset.path.name} {dataset.manifest.digest[:8]}" if dataset else settings.suite
            found = {f"{short} {n}": f"{v:.4f}" for n, v in report.headline.items()}
            registry.tag(row["name"], row["version"], {**found, f"{short} run": run.id})
    print("\n".join(evaluation.lines(report)))
    print(f"report: {folder / 'report.html'}")
    return report


if __name__ == "__main__":
    command(main)
