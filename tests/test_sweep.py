"""Sweeps: what is drawn, trials that are plain fits, what ends early, what is not repeated, and a test split that is looked at once."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from driving import done, here
from rayward import fitting, registry, sweeping
from rayward.batching import BatchSettings
from rayward.errors import RaywardError, SettingsError
from rayward.fitting import FitSettings
from rayward.rendering import RenderSettings
from rayward.reward_model import ModelSettings, read_notes
from rayward.scoring import Scorer
from rayward.storage import Dataset
from rayward.sweeping import Rules, Sweep, Trial, crown, draw, parse_space, prepare, run, run_trial
from rayward.training import Report, TrainSettings
from tiny import toy_dataset, toy_examples

torch.set_num_threads(1)


# ------------------------------------------------------------------------------------------------------------------- space


@pytest.mark.parametrize(
    ("space", "said"),
    [
        ("[1]", "not a JSON object"),
        ("{}", "varies nothing"),
        ('{"train.lr": 0.1}', "train.lr=0.1 is no list"),
        ('{"train.lr": []}', r"train.lr=\[\] is no list"),
        ('{"train.lr": ["log", 0, 1]}', "is no range"),
        ('{"train.lr": ["log", 1]}', "is no range"),
        ('{"train.lr": ["uniform", 2, 1]}', "is no range"),
        ('{"net.layers": ["integer", 1, 2.5]}', "is no range"),
        ('{"examples": ["a", "b"]}', "cannot differ between trials"),
        ('{"validation_share": [0.1, 0.2]}', "cannot differ between trials"),
        ('{"train.best_by": ["loss", "accuracy"]}', "cannot differ between trials"),
    ],
)
def test_what_is_no_space_is_refused(space: str, said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        parse_space(space)


def test_ranges_are_drawn_evenly_on_their_scale() -> None:
    space = parse_space('{"a": ["log", 1e-4, 1], "b": ["uniform", -1, 3], "c": ["integer", 1, 4], "d": ["x", "y"]}')
    drawn = draw(space, 2000, seed=0)
    assert all(1e-4 <= d["a"] <= 1 and -1 <= d["b"] <= 3 for d in drawn)
    for values, low, high in (([math.log10(d["a"]) for d in drawn], -4, 0), ([d["b"] for d in drawn], -1, 3)):
        share = (np.sort(values) - low) / (high - low)
        assert np.abs(share - np.arange(2000) / 2000).max() < 1.95 / math.sqrt(2000)  # Kolmogorov-Smirnov at 0.001
    for name, least in (("c", 400), ("d", 900)):
        values, counts = np.unique([d[name] for d in drawn], return_counts=True)
        assert list(values) in ([1, 2, 3, 4], ["x", "y"])
        assert counts.min() > least


def test_a_trial_does_not_depend_on_how_many_there_are_or_on_the_other_settings() -> None:
    space = parse_space('{"a": ["log", 1e-4, 1], "b": [1, 2]}')
    assert draw(space, 9, seed=3)[:4] == draw(space, 4, seed=3)
    assert draw(space, 9, seed=4) != draw(space, 9, seed=3)
    assert [d["a"] for d in draw(parse_space('{"a": ["log", 1e-4, 1]}'), 4, seed=3)] == [d["a"] for d in draw(space, 4, seed=3)]


def test_no_combination_comes_twice() -> None:
    space = parse_space('{"a": [1, 2, 3], "b": [true, false]}')
    grid = draw(space, 0, seed=0)
    assert grid == [{"a": a, "b": b} for a in (1, 2, 3) for b in (True, False)]
    assert sorted(draw(space, 6, seed=0), key=str) == sorted(grid, key=str)
    with pytest.raises(SettingsError, match="no more than 6 combinations"):
        draw(space, 7, seed=0)
    with pytest.raises(SettingsError, match="no end of values"):
        draw(parse_space('{"a": ["log", 1, 2]}'), 0, seed=0)


# --------------------------------------------------------------------------------------------------------------- preparing


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return toy_dataset("pairs", tmp_path_factory.mktemp("examples"), 60)


def base(examples: Dataset, **changes: Any) -> FitSettings:
    settings = FitSettings(
        examples=str(examples.path),
        model="tiny",
        objective="auto",
        net=ModelSettings(width=16, layers=1),
        render=RenderSettings(max_length=160),
        batch=BatchSettings(size=8),
        train=TrainSettings(lr=3e-3, epochs=2, log_every=1),
        validation_share=0.2,
    )
    return replace(settings, **changes)


def prepared(examples: Dataset, folder: Path, space: str, trials: int = 0, rules: Rules | None = None, **changes: Any) -> Sweep:
    return prepare(base(examples, **changes), parse_space(space), str(folder), trials, 0, rules or Rules())


@pytest.mark.parametrize(
    ("space", "changes", "said"),
    [
        ('{"train.lrr": [1]}', {}, "lrr is not a setting"),
        ('{"train.epochs": [1, "x"]}', {}, "not a whole number"),
        ('{"train.warmup": [0.1, 7]}', {}, "warmup=7.0 must be from 0 up and below 1"),
        ('{"objective": ["bradley_terry", "hinge"]}', {}, "cannot be compared"),
        ('{"regularise": [{"centre": 0.1}]}', {}, "cannot be compared"),
        ('{"train.lr": [0.1]}', {"validation_share": 0.0}, "holds out none"),
    ],
)
def test_mistakes_are_said_before_any_trial(space: str, changes: dict[str, Any], said: str, examples: Dataset, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=said):
        prepared(examples, tmp_path / "sweep", space, **changes)
    assert not (tmp_path / "sweep").exists()


def test_a_json_object_is_a_value(examples: Dataset, tmp_path: Path) -> None:
    sweep = prepared(examples, tmp_path / "s", '{"regularise": [{"centre": 0.1}, "{}"]}', rules=Rules(by="accuracy"))
    assert [json.loads(t.fit.regularise) for t in sweep.trials] == [{"centre": 0.1}, {}]
    assert {t.fit.train.best_by for t in sweep.trials} == {"accuracy"}


def test_an_output_belongs_to_one_sweep(examples: Dataset, tmp_path: Path) -> None:
    lr = '{"train.lr": ["log", 1e-4, 1e-2]}'
    few = prepared(examples, tmp_path / "s", lr, 2)
    more = prepared(examples, tmp_path / "s", lr, 3)
    assert more.trials[:2] == few.trials
    with pytest.raises(SettingsError, match="other settings"):
        prepared(examples, tmp_path / "s", '{"train.lr": ["log", 1e-4, 1e-1]}', 2)
    with pytest.raises(SettingsError, match=r"train.epochs: 2 -> 3"):
        prepared(examples, tmp_path / "s", lr, 2, train=TrainSettings(lr=3e-3, epochs=3, log_every=1))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("x")
    with pytest.raises(SettingsError, match="holds no sweep"):
        prepared(examples, tmp_path / "mine", lr, 2)


# ----------------------------------------------------------------------------------------------------------------- running


class Runs:
    """The tracked runs of a sweep: every line by trial, and how each run ended."""

    def __init__(self) -> None:
        self.lines: dict[str, list[dict[str, float]]] = {}
        self.ended: dict[str, str] = {}

    @contextmanager
    def __call__(self, trial: Trial) -> Iterator[Report]:
        self.lines[trial.name] = []
        self.ended[trial.name] = "failed"
        yield self.lines[trial.name].append
        self.ended[trial.name] = "well"


@pytest.fixture(scope="module")
def swept(examples: Dataset, tmp_path_factory: pytest.TempPathFactory) -> tuple[Sweep, list[dict[str, Any]], Runs]:
    sweep = prepared(examples, tmp_path_factory.mktemp("swept") / "s", '{"train.lr": [1e-5, 3e-3], "net.layers": [1, 2]}')
    runs = Runs()
    return sweep, run(sweep, runs), runs


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def test_a_trial_is_a_plain_fit(swept: tuple[Sweep, list[dict[str, Any]], Runs], examples: Dataset, tmp_path: Path) -> None:
    sweep, results, runs = swept
    assert [r["given"] for r in sorted(results, key=lambda r: r["name"])] == [t.given for t in sweep.trials]
    trial = sweep.trials[3]
    assert (trial.fit.train.lr, trial.fit.net.layers) == (3e-3, 2)
    own = base(examples, net=ModelSettings(width=16, layers=2))
    lines: list[dict[str, float]] = []
    fitted = fitting.fit(own, str(tmp_path / "plain"), report=lines.append)
    result = next(r for r in results if r["name"] == trial.name)
    assert {n: result[n] for n in ("loss", "accuracy")} == fitted.metrics
    assert equal(weights(fitted.model), weights(trial.folder / "model"))
    untimed = [{n: v for n, v in line.items() if n != "tokens_per_s"} for line in lines]
    assert [{n: v for n, v in line.items() if n != "tokens_per_s"} for line in runs.lines[trial.name]] == untimed


def test_results_are_sorted_and_kept(swept: tuple[Sweep, list[dict[str, Any]], Runs]) -> None:
    sweep, results, runs = swept
    assert [r["loss"] for r in results] == sorted(r["loss"] for r in results)
    assert {r["status"] for r in results} == {"finished"}
    assert set(runs.ended.values()) == {"well"}
    kept = json.loads((sweep.folder / "trials.json").read_text())
    assert [k["name"] for k in kept] == [r["name"] for r in results]
    left = {p.name for p in sweep.trials[0].folder.iterdir()}
    assert left == {"model", "run", "settings.json", "trial.json"}
    assert [p.name for p in (sweep.trials[0].folder / "run").iterdir()] == ["metrics.jsonl"]


def test_what_ended_is_not_run_again(swept: tuple[Sweep, list[dict[str, Any]], Runs]) -> None:
    sweep, results, _ = swept
    again = Runs()
    assert run(sweep, again) == results
    assert again.lines == {}


def test_ray_finds_what_this_process_finds(
    ray_cluster: Any, swept: tuple[Sweep, list[dict[str, Any]], Runs], examples: Dataset, tmp_path: Path
) -> None:
    _, here_results, here_runs = swept
    sweep, runs = prepared(examples, tmp_path / "s", '{"train.lr": [1e-5, 3e-3], "net.layers": [1, 2]}'), Runs()
    results = run(sweep, runs, concurrency=2)
    assert [r["name"] for r in results] == [r["name"] for r in here_results]
    np.testing.assert_allclose([r["loss"] for r in results], [r["loss"] for r in here_results], rtol=1e-5)
    assert {n: [line["step"] for line in lines] for n, lines in runs.lines.items()} == {
        n: [line["step"] for line in lines] for n, lines in here_runs.lines.items()
    }
    assert set(runs.ended.values()) == {"well"}


def test_more_cpus_than_there_are_would_wait_for_ever(ray_cluster: Any, examples: Dataset, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="cpus=1000"):
        run(prepared(examples, tmp_path / "s", '{"train.lr": [1e-5, 3e-3]}'), Runs(), concurrency=2, cpus=1000)


def test_the_winner_is_copied_and_the_others_go(examples: Dataset, tmp_path: Path) -> None:
    space = '{"train.lr": [1e-5, 3e-3]}'
    for keep in (True, False):
        sweep = prepared(examples, tmp_path / str(keep), space, rules=Rules(keep_models=keep))
        winner = crown(sweep, run(sweep, Runs()))
        assert winner.given == {"train.lr": 3e-3}
        assert equal(weights(sweep.folder / "model"), weights(winner.folder / "model"))
        assert (sweep.trials[0].folder / "model").is_dir() == keep
        assert len(Scorer.load(sweep.folder / "model")(toy_examples("pairs", 5))) > 0


# ------------------------------------------------------------------------------------------------- what fails, what is stopped


def test_a_trial_that_fails_ends_nothing_but_itself(examples: Dataset, tmp_path: Path) -> None:
    sweep, runs = prepared(examples, tmp_path / "s", '{"train.lr": [1e30, 3e-3]}'), Runs()
    results = run(sweep, runs)
    assert [r["status"] for r in results] == ["finished", "failed"]
    assert "is nan" in results[1]["reason"] or "is inf" in results[1]["reason"]
    assert runs.ended == {"trial-000": "failed", "trial-001": "well"}
    again = Runs()
    run(sweep, again)
    assert set(again.lines) == {"trial-000"}  # a failure may have been the machine's


def test_where_all_fail_the_first_reason_is_said(examples: Dataset, tmp_path: Path) -> None:
    sweep = prepared(examples, tmp_path / "s", '{"net.pooling": ["own"], "train.lr": [1e-3, 1e-2]}')
    with pytest.raises(RaywardError, match=r"all 2 trials failed; trial-000: ModelError: pooling=own"):
        run(sweep, Runs())


def test_a_trial_that_is_killed_goes_on(examples: Dataset, tmp_path: Path) -> None:
    space, train = '{"train.lr": [1e-3, 3e-3]}', TrainSettings(epochs=3, log_every=1, checkpoint_every=4)
    whole = prepared(examples, tmp_path / "whole", space, train=train)
    expected = run(whole, Runs())
    sweep = prepared(examples, tmp_path / "killed", space, train=train)

    @contextmanager
    def killing(trial: Trial) -> Iterator[Report]:
        def tell(line: dict[str, float]) -> None:
            if trial.name == "trial-001" and line["step"] == 10:
                raise KeyboardInterrupt

        yield tell

    with pytest.raises(KeyboardInterrupt):
        run(sweep, killing)
    assert [t.ended for t in sweep.trials] == [True, False]
    runs = Runs()
    results = run(sweep, runs)
    assert set(runs.lines) == {"trial-001"}
    assert runs.lines["trial-001"][0]["step"] == 9
    assert [(r["name"], r["loss"]) for r in results] == [(r["name"], r["loss"]) for r in expected]
    for one, other in zip(whole.trials, sweep.trials, strict=True):
        assert equal(weights(one.folder / "model"), weights(other.folder / "model"))


def test_bad_trials_end_early(examples: Dataset, tmp_path: Path) -> None:
    rules = Rules(halve=2)
    sweep, runs = prepared(examples, tmp_path / "s", '{"train.lr": [3e-3, 1e-6, 2e-6, 4e-3]}', rules=rules), Runs()
    results = {r["given"]["train.lr"]: r for r in run(sweep, runs)}
    assert {lr: r["status"] for lr, r in results.items() if lr < 1e-3} == {1e-6: "stopped", 2e-6: "stopped"}
    assert results[3e-3]["status"] == "finished"
    assert set(runs.ended.values()) == {"well"}
    last = runs.lines["trial-000"][-1]["step"]
    assert runs.lines["trial-001"][-1]["step"] < last / 2
    assert results[1e-6]["reason"] == "1 of the 2 trials that came to validation 1 were better"
    assert not [p for t in sweep.trials for p in t.folder.glob("run/*/")]
    again = Runs()
    run(sweep, again)
    assert again.lines == {}


@pytest.mark.parametrize("eta", [2, 3])
def test_rungs_are_those_of_successive_halving(eta: int, examples: Dataset, tmp_path: Path) -> None:
    """Nine trials come to the first rung one after the other: who goes on is what ASHA's rule says of those so far."""
    values = [5.0, 6.0, 4.0, 4.5, 3.0, 9.0, 2.0, 2.5, 1.0]
    goes_on = [v in sorted(values[: n + 1])[: max(1, (n + 1) // eta)] for n, v in enumerate(values)]
    sweep = prepared(examples, tmp_path / "s", f'{{"train.seed": {list(range(9))}}}', rules=Rules(halve=eta))
    fitting.prepare(sweep.trials[0].fit, str(sweep.trials[0].folder))
    for trial, value, expected in zip(sweep.trials, values, goes_on, strict=True):
        (trial.folder / "run").mkdir(parents=True)
        if trial != sweep.trials[0]:
            (trial.folder / "groups").symlink_to(sweep.trials[0].folder / "groups")
        line = {"step": 1, "validation_loss": value, "validation_accuracy": 0.5}
        (trial.folder / "run" / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        if expected:
            sweeping._stand(trial, line)
        else:
            with pytest.raises(sweeping.Outdone):
                sweeping._stand(trial, line)


def test_the_only_trial_is_never_outdone(examples: Dataset, tmp_path: Path) -> None:
    sweep = prepared(examples, tmp_path / "s", '{"train.lr": [3e-3]}', rules=Rules(halve=3))
    assert run_trial(sweep.trials[0])["status"] == "finished"


# ------------------------------------------------------------------------------------------------------------- the command


def test_the_command_from_a_split_to_the_registry(store: Path, tmp_path: Path, examples: Dataset) -> None:
    split, output = tmp_path / "split", tmp_path / "sweep"
    shares = ("--set", "shares.validation=0.2", "--set", "shares.test=0.3")
    done(here("split_examples", "--source", examples.path, "--output", split, *shares))
    small = ["net.width=16", "net.layers=1", "render.max_length=160", "batch.size=8", "train.epochs=2"]
    words = ["--examples", split, "--output", output, "--space", '{"train.lr": ["log", 1e-6, 1e-2]}', "--register", "swept", "--seed", "1"]
    words += [word for setting in small for word in ("--set", setting)]
    first = done(here("sweep_reward_model", *words, "--trials", "2"))
    assert "on the test split: accuracy" in first.out
    assert "registered: models:/swept/1" in first.out
    report = json.loads((output / "report" / "report.json").read_text())
    row = registry.find("swept/1")
    assert float(row["tags"]["test_accuracy"]) == report["order"]["accuracy"]["value"]
    assert row["tags"]["sweep_trials"] == "2"
    client = registry._client()
    runs = client.search_runs([client.get_experiment_by_name("rayward").experiment_id])
    below = [r for r in runs if r.data.tags.get("mlflow.parentRunId") == row["tags"]["sweep"]]
    assert {r.data.tags["mlflow.runName"] for r in below} == {"trial-000", "trial-001"}
    assert {r.info.status for r in runs} == {"FINISHED"}
    assert row["run_id"] in {r.info.run_id for r in below}
    assert all("validation_loss" in r.data.metrics for r in below)

    when = (output / "report" / "report.json").stat().st_mtime_ns
    again = done(here("sweep_reward_model", *words, "--trials", "2"))
    assert "on the test split" not in again.out
    assert (output / "report" / "report.json").stat().st_mtime_ns == when
    assert "registered: models:/swept/1" in again.out
    assert len(client.search_runs([client.get_experiment_by_name("rayward").experiment_id])) == len(runs)

    tested = json.loads((output / "tested.json").read_text())
    more = done(here("sweep_reward_model", *words, "--trials", "4"))
    won = json.loads((output / "trials.json").read_text())[0]["name"]
    assert ("2 winners have been shown the test split" in more.out) == (won not in tested)


def tracked(job: str) -> list[dict[str, str]]:
    """Tags and params of every run of a job."""
    client = registry._client()
    runs = client.search_runs([client.get_experiment_by_name("rayward").experiment_id])
    return [{**run.data.tags, **run.data.params} for run in runs if run.data.tags["job"] == job]


def begun_twice(examples: Dataset, tmp_path: Path) -> fitting.Fitted:
    """A model that is registered as two versions of `begun`, the first of them the champion."""
    first = fitting.fit(base(examples, train=TrainSettings(epochs=1)), str(tmp_path / "first"))
    for _ in range(2):
        with registry.run("job", {}) as made:
            registry.register(made, first.model, "begun", {})
    registry.promote("begun", "1")
    return first


def test_a_sweep_from_a_registered_model_names_the_version(store: Path, tmp_path: Path, examples: Dataset) -> None:
    first = begun_twice(examples, tmp_path)
    words: list[str | Path] = ["--examples", examples.path, "--output", tmp_path / "s", "--register", "swept", "--set", "train.epochs=1"]
    words += ["--set", "render.max_length=160", "--set", "batch.size=8", "--validation-share", "0.2"]
    words += ["--space", '{"train.lr": [1e-9]}', "--model", "models:/begun@champion"]
    done(here("sweep_reward_model", *words))
    row = registry.find("swept/1")
    assert row["tags"]["base_model"] == row["params"]["model"] == "models:/begun/1"
    assert read_notes(tmp_path / "s" / "model")["base_model"] == "models:/begun/1"
    assert [run["model"] for job in ("sweep_reward_model", "train_reward_model") for run in tracked(job)] == ["models:/begun/1"] * 2
    began, ended = weights(first.model), weights(tmp_path / "s" / "model")
    assert all(torch.allclose(began[name], ended[name], atol=1e-6) for name in began)
    registry.promote("begun", "2")
    here("sweep_reward_model", *words).mistake("holds a sweep with other settings", "model: models:/begun/1 -> models:/begun/2")
    words[-1] = "models:/begun/1"
    assert "registered: models:/swept/1" in done(here("sweep_reward_model", *words)).out


def test_a_space_of_registered_models_holds_versions(store: Path, tmp_path: Path, examples: Dataset) -> None:
    begun_twice(examples, tmp_path)
    space = '{"model": ["models:/begun@champion", "tiny", "models:/begun/2"], "train.lr": [1e-3, 1e-2]}'
    sweep = prepared(examples, tmp_path / "s", space)
    names = ["models:/begun/1", "tiny", "models:/begun/2"]
    assert (
        [trial.given["model"] for trial in sweep.trials] == [trial.fit.model for trial in sweep.trials] == [n for n in names for _ in "12"]
    )
    assert [Path(trial.address, "model.safetensors").is_file() for trial in sweep.trials] == [True, True, False, False, True, True]
    registry.promote("begun", "2")
    with pytest.raises(SettingsError, match="other settings"):
        prepared(examples, tmp_path / "s", space)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--space", '{"train.lrr": [1]}'], ["lrr is not a setting", "did you mean lr?"]),
        (["--space", '{"train.lr": ["log", 1, 2]}'], ["train.lr is a range", "--trials 16"]),
        (["--space", '{"train.lr": [1]}', "--halve", "1"], ["halve=1"]),
        (["--space", '{"train.lr": [1]}', "--concurrency", "0"], ["concurrency=0"]),
        (["--space", '{"train.lr": [1]}', "--register", "a/b"], ["no name for a model"]),
    ],
)
def test_mistakes_of_the_command_are_said(words: list[str], said: list[str], store: Path, examples: Dataset, tmp_path: Path) -> None:
    here("sweep_reward_model", "--examples", examples.path, "--output", tmp_path / "s", *words).mistake(*said)
    assert not (tmp_path / "s").exists()
