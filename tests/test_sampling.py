"""Answers are sampled once: what becomes of a run that ends early, of an outcome that is unknown, and of a grader that changes."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from driving import done, here
from rayward import grading
from rayward.errors import UserError
from rayward.policies import POLICIES, Completion, Request, ToyPolicy
from rayward.records import rollouts_of
from rayward.sampling import CHUNK, SampleSettings, sample_problems, toy_problem
from rayward.storage import open_dataset
from rayward.toy_world import ToyWorld

GOLD = r"\frac{1}{2}"
SAID = {  # a problem -> what is answered, how it ends; by numeric and by math: outcome and why it is unknown
    "a box": ((r"So \boxed{\frac{1}{2}}.", "stop"), (True, ""), (True, "")),
    "a decimal": (("The answer is 0.5.", "stop"), (True, ""), (True, "")),
    "wrong": ((r"\boxed{2}", "stop"), (False, ""), (False, "")),
    "another form": ((r"\boxed{2^{-1}}", "stop"), (None, "unparsed"), (True, "")),
    "a wrong form": ((r"\boxed{2^{-2}}", "stop"), (None, "unparsed"), (False, "")),
    "nothing stated": (("There are 7 days.", "stop"), (None, "unstated"), (None, "unstated")),
    "cut off": ((r"So \boxed{\frac{1}{2}} or", "length"), (None, "truncated"), (None, "truncated")),
}
ASKED: list[Request] = []


@pytest.fixture(autouse=True)
def policy(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that says what SAID says."""
    ASKED.clear()

    def said(requests: Sequence[Request]) -> list[Completion]:
        ASKED.extend(requests)
        return [Completion((text,), reason, 1) for text, reason in (SAID[r.prompt[0].content][0] for r in requests)]  # type: ignore[arg-type]

    monkeypatch.setitem(POLICIES, "said", lambda: said)


@pytest.fixture
def problems(tmp_path: Path) -> Path:
    path = tmp_path / "problems.jsonl"
    path.write_text("\n".join(json.dumps({"question": question, "gold": GOLD}) for question in SAID), encoding="utf-8")
    return path


def outcomes(folder: Path) -> dict[str, tuple[bool | None, str]]:
    """Of every problem the outcome and why it is unknown, with what must hold of any rollout."""
    found = {}
    for rollout in rollouts_of(open_dataset(folder).table()):
        assert rollout.reward == (None if rollout.correct is None else float(rollout.correct))
        why = rollout.provenance.get("why", "")
        assert bool(why) == (rollout.correct is None)
        found[rollout.prompt[0].content] = rollout.correct, why
    return found


def sample(problems: Path, output: Path, *sets: str) -> None:
    words = [word for one in ("sample.policy=said", "sample.answers=1", *sets) for word in ("--set", one)]
    done(here("sample_rollouts", "--problems", problems, "--output", output, "--engine", "local", *words))


# ------------------------------------------------------------------------------------------------------------------ grading


@pytest.mark.parametrize("grader", ["numeric", "math"])
def test_an_outcome_is_right_wrong_or_unknown_and_says_why(grader: str, problems: Path, tmp_path: Path) -> None:
    pytest.importorskip("math_verify")
    sample(problems, tmp_path / "out", f"sample.grader={grader}")
    assert outcomes(tmp_path / "out") == {question: by[1 + (grader == "math")] for question, by in SAID.items()}


def test_what_was_stated_is_kept_as_it_was_written(problems: Path, tmp_path: Path) -> None:
    sample(problems, tmp_path / "out")
    by = {r.prompt[0].content: r.provenance for r in rollouts_of(open_dataset(tmp_path / "out").table())}
    assert {question: told.get("answer") for question, told in by.items()} == {
        "a box": r"\frac{1}{2}", "a decimal": "0.5", "wrong": "2", "another form": "2^{-1}", "a wrong form": "2^{-2}",
        "nothing stated": None, "cut off": None,
    }  # fmt: skip
    for told in by.values():
        assert (told["gold"], told["grader"], told["grader_version"]) == (GOLD, "numeric", grading.grader_version("numeric"))
        assert grading.regrade(told.get("answer"), told["gold"], told["grader"]).right in (True, False, None)


def test_a_grader_that_cannot_work_is_said_before_anything_is_drawn(
    problems: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grading.symbolic, "installed", lambda: False)
    with pytest.raises(UserError, match=r"math-verify(?s:.*)pip install"):
        SampleSettings(grader="math")
    words = ["--set", "sample.policy=said", "--set", "sample.grader=math"]
    here("sample_rollouts", "--problems", problems, "--output", tmp_path / "out", *words).mistake("math-verify", "pip install")
    assert not ASKED
    assert [path.name for path in tmp_path.iterdir()] == ["problems.jsonl"]


# ------------------------------------------------------------------------------------------------------------ grading again


def test_outcomes_are_made_again_by_another_grader_without_sampling(problems: Path, tmp_path: Path) -> None:
    pytest.importorskip("math_verify")
    sample(problems, tmp_path / "numeric")
    sample(problems, tmp_path / "math", "sample.grader=math")
    asked = len(ASKED)
    said = done(here("regrade_rollouts", "--source", tmp_path / "numeric", "--grader", "math", "--output", tmp_path / "again"))
    assert len(ASKED) == asked
    assert rollouts_of(open_dataset(tmp_path / "again").table()) == rollouts_of(open_dataset(tmp_path / "math").table())
    assert "2 right, 2 unknown, 1 unknown that became right, 1 unknown that became wrong, 1 wrong" in said.err
    assert "math 1, math-verify" in said.err
    back = done(here("regrade_rollouts", "--source", tmp_path / "again", "--output", tmp_path / "back"))
    assert "1 right that became unknown" in back.err
    assert rollouts_of(open_dataset(tmp_path / "back").table()) == rollouts_of(open_dataset(tmp_path / "numeric").table())


def test_what_has_no_gold_answer_is_rejected_and_a_reward_that_is_no_outcome_stays(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"id": "outcome", "prompt": "q", "answer": "A: 4", "reward": 0, "correct": False, "provenance": {"gold": "4"}},
        {"id": "rating", "prompt": "q", "answer": "A: 5", "reward": 0.7, "correct": True, "provenance": {"gold": "4"}},
        {"id": "silent", "prompt": "q", "answer": "A: 4", "provenance": {"gold": "4"}},
        {"id": "empty", "prompt": "q", "answer": "A: 4", "correct": True, "provenance": {"gold": "\\boxed{}"}},
        {"id": "none", "prompt": "q", "answer": "A: 4", "correct": True},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    done(here("import_rollouts", "--source", tmp_path / "rows.jsonl", "--format", "rollouts", "--output", tmp_path / "in"))
    done(here("regrade_rollouts", "--source", tmp_path / "in", "--output", tmp_path / "out"))
    made = open_dataset(tmp_path / "out")
    assert {r.id: (r.correct, r.reward) for r in rollouts_of(made.table())} == {
        "outcome": (True, 1.0), "rating": (False, 0.7), "silent": (True, 1.0),
    }  # fmt: skip
    assert made.manifest.rejected == {"empty": 1, "no gold answer": 1}


def test_a_newer_rule_is_another_recipe(problems: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sample(problems, tmp_path / "in")
    words = ("regrade_rollouts", "--source", tmp_path / "in", "--output", tmp_path / "out")
    done(here(*words))
    assert "already made" in done(here(*words)).err
    monkeypatch.setitem(grading._RULES, "numeric", 99)
    here(*words).mistake("overwrite")


# ---------------------------------------------------------------------------------------------------------------- running


def write_problems(path: Path, count: int) -> Path:
    world = ToyWorld()
    rows = [toy_problem(n, world, 0) for n in range(count)]
    text = "\n".join(json.dumps({"question": p.prompt[0].content, "gold": p.gold}) for p in rows)
    (gzip.open if path.suffix == ".gz" else open)(path, "wt").write(text)
    return path


COUNTING = """
import os
from rayward.policies import ToyPolicy

def make():
    def policy(requests):
        with open(os.environ["ASKED"], "a") as file:
            file.write("".join(f"{request.seed}\\n" for request in requests))
        return ToyPolicy()(requests)
    return policy
"""


def run(words: list[str], folder: Path, until: int | None = None) -> list[str]:
    """Run a command, or kill it when so many tasks are done; the seeds of all that was asked in its folder so far."""
    folder.mkdir(exist_ok=True)
    (folder / "counting.py").write_text(COUNTING, encoding="utf-8")
    env = {**os.environ, "PYTHONPATH": str(folder), "ASKED": str(folder / "asked.txt"), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(words, env=env, stderr=subprocess.PIPE, text=True)
    done_tasks = folder / ".out.partial" / "done" / "lay-out"
    try:
        while until is not None and process.poll() is None:
            if done_tasks.is_dir() and len(list(done_tasks.iterdir())) >= until:
                process.kill()
                break
            time.sleep(0.002)
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == (0 if until is None else -signal.SIGKILL), err
    return (folder / "asked.txt").read_text(encoding="utf-8").split()


@pytest.mark.parametrize("name", ["toy", "problems.jsonl", "problems.jsonl.gz"])
def test_a_killed_run_goes_on_and_samples_no_chunk_twice(name: str, tmp_path: Path) -> None:
    """Kill it after some tasks, twice; every task is a chunk of problems, however they are stored."""
    chunks, each, kills = 20, 2, [2, 11]
    source = f"toy:{chunks * CHUNK}" if name == "toy" else str(write_problems(tmp_path / name, chunks * CHUNK))
    asked, digests = {}, set()
    for folder in (tmp_path / "whole", tmp_path / "killed"):
        how = ["--engine", "local", "--parts", "4", "--policy", "counting:make", "--answers", str(each)]
        words = [sys.executable, "-m", "rayward.cli", "run", "sample_rollouts", "--problems", source, "--output", str(folder / "out"), *how]
        for until in kills if folder.name == "killed" else ():
            run(words, folder, until)
            assert not (folder / "out").exists()
        asked[folder.name] = run(words, folder)
        digests.add(open_dataset(folder / "out").manifest.digest)
    assert len(digests) == 1
    assert len(asked["whole"]) == len(set(asked["whole"])) == chunks * CHUNK * each
    assert set(asked["killed"]) == set(asked["whole"])
    assert len(asked["killed"]) - len(asked["whole"]) <= len(kills) * CHUNK * each  # the chunk that was in the air at a kill


def test_the_size_of_a_task_changes_no_rollout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, digests = write_problems(tmp_path / "problems.jsonl", 50), set()
    for chunk, most in ((64, 1024), (7, 1024), (1, 3)):
        monkeypatch.setattr("rayward.sampling.CHUNK", chunk)
        monkeypatch.setattr("rayward.sampling.MOST_TASKS", most)
        out = tmp_path / f"{chunk}-{most}"
        done(here("sample_rollouts", "--problems", source, "--output", out, "--engine", "local", "--set", "sample.answers=2"))
        digests.add(open_dataset(out).manifest.digest)
        assert open_dataset(out).manifest.out == 100
    assert len(digests) == 1


def test_no_problems_are_no_rollouts(tmp_path: Path) -> None:
    (tmp_path / "problems.jsonl").write_bytes(b"")
    done(here("sample_rollouts", "--problems", tmp_path / "problems.jsonl", "--output", tmp_path / "out", "--engine", "local"))
    assert open_dataset(tmp_path / "out").manifest.out == 0


def test_completions_are_told_apart_by_place_whatever_the_order_they_come_in() -> None:
    """A policy that hands over the last first, and fails on one problem, gives what the plain one gives for the others."""
    toy, world = ToyPolicy(), ToyWorld()
    posed = [toy_problem(n, world, 0) for n in range(6)]

    class Backwards:
        def __call__(self, requests: Sequence[Request]) -> list[Completion]:
            raise AssertionError("it has a stream")

        def stream(self, requests: Any) -> Iterator[tuple[int, Completion]]:
            for place, request in reversed(list(enumerate(requests))):
                failed = request.prompt == posed[2].prompt
                yield place, Completion((), "error", 0, error="HTTP 500") if failed else toy([request])[0]

    settings = SampleSettings(answers=2, continued=1, continuations=2)
    plain, other = sample_problems(posed, toy, settings), sample_problems(posed, Backwards(), settings)
    assert [r for n, r in enumerate(other.rollouts) if n != 2] == [r for n, r in enumerate(plain.rollouts) if n != 2]
    assert other.rollouts[2] == []
    assert Counter(lost.row for lost in other.lost) == {f"{posed[2].id}/{n}": 1 for n in range(2)}


def test_progress_counts_completions(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rayward.progress.LOG_EVERY_S", 0.0)
    sample_problems([toy_problem(0, ToyWorld(), 0)], ToyPolicy(), SampleSettings(answers=3))
    assert "answers: 3 of 3 completions" in capfd.readouterr().err
