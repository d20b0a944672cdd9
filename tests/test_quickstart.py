"""The quickstart as a user runs it, in a process of its own and on a Ray cluster of its own: what it makes is as good as it promises on
problems it has never seen, and running it again does nothing twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from driving import Said, done, rayward
from rayward import registry, suites
from rayward.records import prompt_id
from rayward.storage import open_dataset

KINDS = ("pairs", "rankings", "steps")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quickstart")


def quickstart(home: Path) -> Said:
    """A little more than half the problems of the real one."""
    return done(rayward("quickstart", "--problems", "600", cwd=home, env={"RAYWARD_STORE": str(home / "store")}, timeout=540))


@pytest.fixture(scope="module")
def said(home: Path) -> Said:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        return quickstart(home)


@pytest.fixture
def reports(home: Path, said: Said) -> dict[str, dict[str, Any]]:
    folder = home / "store" / "quickstart"
    return {kind: json.loads((folder / f"{kind}-report" / "report.json").read_text(encoding="utf-8")) for kind in KINDS}


@pytest.fixture
def models(home: Path, said: Said, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("RAYWARD_STORE", str(home / "store"))
    return registry.models()


pytestmark = pytest.mark.timeout(600)


def test_it_shows_one_table_and_leaves_one_folder(home: Path, said: Said, reports: dict[str, dict[str, Any]]) -> None:
    for kind in KINDS:
        [line] = [line for line in said.out.splitlines() if f"models:/toy-{kind}/1" in line]
        main = reports[kind].get("order") or reports[kind]["segments"]
        assert line.split()[0] == kind
        assert f"{main['accuracy']['value']:.3f} [{main['accuracy']['low']:.3f}, {main['accuracy']['high']:.3f}]" in line
    assert "rayward ui" in said.out
    assert "Traceback" not in said.err
    assert [path.name for path in home.iterdir()] == ["store"]
    assert {path.name for path in (home / "store").iterdir()} == {"mlflow.db", "artifacts", "quickstart"}


def test_three_champions_lead_back_to_their_data(home: Path, models: list[dict[str, Any]], reports: dict[str, dict[str, Any]]) -> None:
    assert [(m["name"], m["version"], m["aliases"]) for m in models] == [(f"toy-{kind}", "1", ["champion"]) for kind in KINDS]
    for kind, model in zip(KINDS, models, strict=True):
        made = open_dataset(home / "store" / "quickstart" / kind, "examples").manifest
        assert model["tags"]["data_digest"] == made.digest
        assert model["tags"]["labeler"] == kind
        assert made.rows_in == made.used + sum(made.rejected.values())
        accuracy = (reports[kind].get("order") or reports[kind]["segments"])["accuracy"]["value"]
        assert float(model["tags"]["segment_accuracy" if kind == "steps" else "accuracy"]) == pytest.approx(accuracy, abs=1e-4)


def test_what_it_promises_holds_on_unseen_problems(reports: dict[str, dict[str, Any]]) -> None:
    order = reports["pairs"]["order"]
    assert order["accuracy"]["value"] >= 0.90
    assert 0.45 <= order["length_baseline"]["value"] <= 0.55
    assert reports["rankings"]["best_of"]["picked"] > reports["rankings"]["best_of"]["mean_answer"] + 0.2
    first = reports["steps"]["segments"]["first_error"]
    assert first["f1"] >= 3 * first["random_step_baseline"]
    assert min(reports[kind]["examples_scored"] for kind in KINDS) >= 300


def test_the_problems_of_the_reports_are_unseen(home: Path, said: Said) -> None:
    parts = [part for name in ("answers", "stepwise") for part in open_dataset(home / "store" / "quickstart" / name).parts]
    trained = {prompt for part in parts for prompt in pq.read_table(part, columns=["prompt_id"])["prompt_id"].to_pylist()}
    judged = {prompt_id(example.prompt) for suite in suites.SUITES.values() for example in suite()}
    assert len(trained) > 1000
    assert len(judged) > 500
    assert len(trained & judged) <= 3  # by chance, in a small world


def test_running_it_again_does_nothing_twice(home: Path, said: Said, models: list[dict[str, Any]]) -> None:
    folder = home / "store" / "quickstart"

    def times() -> dict[str, int]:
        files = [*folder.rglob("*.safetensors"), *folder.rglob("part-*.parquet"), *folder.rglob("groups.arrow")]
        return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in files}

    before = times()
    assert len([name for name in before if name.endswith("model/model.safetensors")]) == 3
    again = quickstart(home)
    assert {name: time for name, time in times().items() if before.get(name) != time} == {}
    assert registry.models() == models
    assert again.out == said.out
