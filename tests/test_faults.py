"""Nothing is lost when something dies: jobs on three real Ray nodes, disturbed in the middle, end with what they make undisturbed.

The cases are those of benchmarks/faults.py, which prints what each costs; a table there is the list here. Minutes each, so all but the
first test are slow.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest

import ray_nodes
from driving import ROOT
from rayward.dataflow import Recipe, engine, import_files
from rayward.storage import Dataset


def _benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("faults", ROOT / "benchmarks" / "faults.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["faults"] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


faults = _benchmark()
CASES = [(job, fault) for job in faults.JOBS for fault in faults.FAULTS]


# ------------------------------------------------------------------------------------------------ without a cluster


@dataclasses.dataclass(frozen=True)
class Settings:
    source: str


def brought_in(source: Path, output: Path) -> Dataset:
    recipe = Recipe("import_rollouts", str(output), Settings(str(source)), [{"path": str(source), "sha256": "x"}], "local")
    return import_files(recipe, [(source.name, str(source))], "rollouts", parts=4)


def test_a_task_that_is_done_twice_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray does a task again whose result was lost with its node, or whose worker died after it had marked the task done."""
    source = tmp_path / "rows.jsonl"
    rows = [{"id": str(n), "prompt": f"Question {n // 4}?", "answer": f"Answer {n}", "reward": float(n)} for n in range(64)]
    source.write_text("\n".join(map(json.dumps, rows)))
    once = brought_in(source, tmp_path / "once")
    do = engine._once

    def twice(work: engine.Work, task: dict[str, Any]) -> dict[str, Any]:
        do(work, task)
        return do(work, task)

    monkeypatch.setattr(engine, "_once", twice)
    again = brought_in(source, tmp_path / "again")
    assert once.manifest.out == 64
    assert (again.manifest.digest, again.manifest.out) == (once.manifest.digest, 64)


# --------------------------------------------------------------------------------------------------- on three nodes


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("faults")
    faults.prepare(folder)
    return folder


@pytest.fixture(scope="module")
def nodes() -> Iterator[ray_nodes.Cluster]:
    with ray_nodes.cluster() as made:
        yield made


@pytest.fixture(scope="module")
def references() -> dict[str, Any]:
    return {}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("job", "fault"), CASES)
def test_a_disturbed_job_ends_with_the_undisturbed_result(
    job: str, fault: str, nodes: ray_nodes.Cluster, work: Path, references: dict[str, Any]
) -> None:
    if why := faults.skipped(job, fault):
        pytest.skip(why)
    if job not in references:
        references[job] = faults.undisturbed(nodes, faults.JOBS[job], work)
    outcome = faults.disturbed(nodes, faults.JOBS[job], fault, work, references[job])
    assert outcome.good, outcome


@pytest.mark.slow
def test_a_cluster_leaves_nothing_behind_when_its_process_is_killed(tmp_path: Path) -> None:
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r}); import ray_nodes, time\n"
    code += "with ray_nodes.cluster(2) as ray: print(ray.folder, ray.mark, flush=True); time.sleep(600)"
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    folder, mark = owner.stdout.readline().split()
    started = psutil.Process(owner.pid).children(recursive=True)
    owner.kill()
    owner.wait()
    by = time.monotonic() + 60
    while time.monotonic() < by and (Path(folder).exists() or any(p.is_running() for p in started)):
        time.sleep(0.2)
    assert not [p for p in started if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert not Path(folder).exists()
    assert f"rw{mark}" not in (subprocess.run(["ip", "link"], capture_output=True, text=True).stdout if shutil.which("ip") else "")
