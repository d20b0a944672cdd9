"""Workers with models hold GPUs where a cluster has any; what cannot be placed is said and not waited for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from driving import here
from driving import toy as make_toy
from rayward.dataflow.engine import run
from rayward.errors import SettingsError

PRETENDED = """
import json, os, sys
import ray
from rayward.dataflow.engine import run

ray.init(num_cpus=2, num_gpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 * 2**20)


def make():
    held = ray.get_runtime_context().get_assigned_resources()
    return lambda task: {"gpus": held.get("GPU") or 0}


asked = [float(x) for x in sys.argv[1:]]
print(json.dumps([run([{}], make, what="t", unit="t", engine="ray", actors=1, gpus=g)[0]["gpus"] for g in asked]))
ray.shutdown()
"""


def test_an_actor_holds_what_was_asked_for_and_by_default_one_where_there_are_any(tmp_path: Path) -> None:
    (tmp_path / "pretended.py").write_text(PRETENDED)
    command = [sys.executable, str(tmp_path / "pretended.py"), "-1", "0", "0.25", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env={**os.environ, "RAY_ADDRESS": ""})
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == [1, 0, 0.25, 2]


def test_without_gpus_none_are_held_and_more_than_there_are_is_an_error_at_once(ray_cluster: Any) -> None:
    work = {"what": "t", "unit": "t", "engine": "ray", "actors": 1}
    assert run([{}], lambda: lambda task: {}, gpus=-1.0, **work) == [{}]
    with pytest.raises(SettingsError, match=r"gpus=1: no machine of this cluster has more than 0(.|\n)*0 to work on CPUs"):
        run([{}], lambda: lambda task: {}, gpus=1.0, **work)


def test_a_scoring_job_that_cannot_be_placed_says_so(ray_cluster: Any, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    toy = make_toy(tmp_path_factory.getbasetemp())
    words = ["--model", toy.pairs_model, "--source", toy.answers, "--output", tmp_path / "scored", "--engine", "ray", "--gpus", "8"]
    here("score_rollouts", *words).mistake("gpus=8: no machine of this cluster has more than 0", "ask for fewer")
    assert not (tmp_path / "scored").exists()
