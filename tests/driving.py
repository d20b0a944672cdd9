"""What tests of commands share: running a command, here or in a process of its own, and a store with two small trained models.

Everything is made by the commands themselves, from the toy world, without a network.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import runpy
import subprocess
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

from rayward import cli

ROOT = Path(__file__).resolve().parents[1]
RAYWARD = str(Path(sys.executable).with_name("rayward"))


class Said(NamedTuple):
    """What a command said, and how it ended."""

    code: int
    out: str
    err: str

    def mistake(self, *words: str) -> str:
        """Holds the command to the manners of a user's mistake: exit code 2, one message on stderr, no traceback; returns the message."""
        assert self.code == 2, self.out + self.err[-600:]
        assert "Traceback" not in self.out + self.err
        assert self.err.lower().count("error: ") == 1, self.err
        for word in words:
            assert word in self.err, f"{word!r} is not in: {self.err}"
        return self.err


def rayward(*words: str, cwd: Path, env: Mapping[str, str] | None = None, timeout: float = 240) -> Said:
    """The `rayward` command in a process of its own."""
    done = subprocess.run(
        [RAYWARD, *words], cwd=cwd, env={**os.environ, **(env or {})}, capture_output=True, text=True, encoding="utf-8", timeout=timeout
    )
    return Said(done.returncode, done.stdout, done.stderr)


def here(script: str, *words: str | Path) -> Said:
    """`rayward WORDS`, or `rayward run SCRIPT WORDS`, from its words to its exit code in this process, where imports cost nothing."""
    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    code: object = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            sys.argv = [script, *map(str, words)]
            if script == "rayward":
                cli.main()
            else:
                runpy.run_path(str(cli.find_script(script)), run_name="__main__")
        except SystemExit as ended:
            code = ended.code or 0
        except Exception:  # what the interpreter does with it
            traceback.print_exc()
            code = 1
        finally:
            sys.argv = argv
    assert isinstance(code, int)
    return Said(code, out.getvalue(), err.getvalue())


def done(said: Said) -> Said:
    """What a command said that had to go well."""
    assert said.code == 0, f"{said.out}\n{said.err}"
    return said


class Toy(NamedTuple):
    """Datasets of the toy world, and two models trained on them and registered as toy-pairs (champion) and toy-steps."""

    store: Path
    answers: Path  # rollouts
    pairs: Path
    steps: Path
    pairs_model: Path
    steps_model: Path


@functools.cache
def toy(base: Path) -> Toy:
    """The one Toy of a test session, under pytest's folder for it."""
    made = Toy(*(base / "toy" / name for name in ("store", "answers", "pairs", "steps", "pairs-job/model", "steps-job/model")))
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setenv("RAYWARD_STORE", str(made.store))
        stepwise = base / "toy" / "stepwise"
        sample = ("--set", "sample.answers=1", "--set", "sample.continued=1", "--set", "sample.continuations=2")
        done(here("sample_rollouts", "--problems", "toy:80", "--output", made.answers, "--engine", "local"))
        done(here("sample_rollouts", "--problems", "toy:40:1", "--output", stepwise, "--engine", "local", *sample))
        done(here("label_pairs", "--source", made.answers, "--output", made.pairs, "--set", "label.choose=adjacent"))
        done(here("label_steps", "--source", stepwise, "--output", made.steps))
        for examples, model, name in ((made.pairs, made.pairs_model, "toy-pairs"), (made.steps, made.steps_model, "toy-steps")):
            small = ["net.width=32", "net.layers=1", "render.max_length=160", "train.lr=2e-3", "batch.size=16", "train.log_every=1"]
            sets = [word for setting in small for word in ("--set", setting)]
            job = ("--examples", examples, "--output", model.parent, "--register", name, "--validation-share", "0.1")
            done(here("train_reward_model", *job, *sets))
        done(here("rayward", "models", "promote", "toy-pairs", "1"))
    return made
