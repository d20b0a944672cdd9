"""`scheme=auto`: a pilot finds whether the policy repairs its errors; its draws are the job's own, and one finding serves all who draw."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from driving import done
from rayward.montecarlo import LOOK_AT, LOOK_IN, StepSampling, capacity
from rayward.policies import POLICIES, Completion, Request, make_policy
from rayward.policies.asking import VerdictLog
from rayward.records import Message, Rollout
from rayward.schemes import AutoSettings
from rayward.toy_world import ToyWorld
from test_montecarlo import DRAWN, FAULT, KINDS, SOLVER, answers, dataset, digest, examples, keys_of, label, made

AUTO = ("sampling.scheme=auto", 'sampling.scheme_settings={"share": 0.5, "n": 6}')


@pytest.fixture(autouse=True)
def nothing_drawn() -> Iterator[None]:
    DRAWN.clear()
    FAULT.clear()
    yield
    FAULT.clear()


@pytest.fixture(scope="module")
def many() -> list[Rollout]:
    return answers(40, 3)


@pytest.fixture
def folder(tmp_path: Path, many: list[Rollout]) -> Path:
    dataset(many, tmp_path / "rollouts", parts=4)
    return tmp_path


def finding(folder: Path, output: str) -> dict[str, Any]:
    [path] = (folder / f".{output}.verdicts").glob("pilot-*.json")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize("want", ["hard", "soft"])
def test_a_pilot_chooses_and_its_draws_are_the_jobs_own(folder: Path, want: str) -> None:
    said = done(label(folder, "steps", *AUTO, f"sampling.want={want}"))
    found = finding(folder, "steps")
    chosen = found["finding"]
    assert chosen["says"] in said.err
    assert "solutions" in said.err
    assert (found["about"]["want"], chosen["scheme"] in ("skew", "posterior")) == (want, True)
    assert {e.provenance["estimate"] for e in examples(folder, "steps")} == {chosen["scheme"]}
    [short] = {e.provenance["pilot"] for e in examples(folder, "steps")}
    assert short.startswith(f"{chosen['recovered']} of {chosen['solutions']} wrong answers recover")
    assert len(set(keys_of(folder, "steps"))) == len(keys_of(folder, "steps")) == len(DRAWN)
    with_pilot = len(DRAWN)
    direct = (f"sampling.want={want}", f"sampling.scheme={chosen['scheme']}", "sampling.scheme_settings=" + json.dumps(chosen["settings"]))
    DRAWN.clear()
    done(label(folder, "direct", *direct))
    assert digest(folder, "direct") == digest(folder, "steps")
    assert with_pilot < len(DRAWN) + found["completions"]  # some of the pilot's draws are used again
    assert set(keys_of(folder, "direct")) <= set(keys_of(folder, "steps"))


class Chain:
    """A policy of two states: a step errs with chance 0.12, an error is noticed with chance `temperature`; 8 steps and the answer."""

    def __init__(self, temperature: float):
        self.repair = temperature

    def __call__(self, requests: Sequence[Request]) -> list[Completion]:
        return [Completion(self.go_on(request.kept, request.seed), "stop", 1) for request in requests]

    def go_on(self, kept: tuple[str, ...], seed: int) -> tuple[str, ...]:
        rng, wrong, steps = random.Random(seed), kept[-1:] == ("bad\n",), []
        for _ in range(len(kept), 8):
            wrong = rng.random() >= self.repair if wrong else rng.random() < 0.12
            steps.append("bad\n" if wrong else "good\n")
        return (*steps, f"The answer is {int(not wrong)}")


@pytest.mark.parametrize(("repair", "scheme"), [(1e-9, "skew"), (0.1, "posterior")])
def test_the_scheme_follows_the_policy(tmp_path: Path, repair: float, scheme: str) -> None:
    policy, rollouts = Chain(repair), []
    for n in range(120):
        steps = policy.go_on((), n)
        right = steps[-1].endswith("1")
        rollouts.append(Rollout(id=str(n), prompt=(Message("user", f"q{n // 2}"),), steps=steps, correct=right, provenance={"gold": "1"}))
    dataset(rollouts, tmp_path / "rollouts")
    sets = ("sampling.scheme=auto", 'sampling.scheme_settings={"share": 1}')
    done(label(tmp_path, "steps", *sets, policy=f"{__name__}:Chain", temperature=repair))
    found = finding(tmp_path, "steps")["finding"]
    assert found["scheme"] == scheme, found["says"]
    assert found["solutions"] == sum(r.correct is False for r in rollouts)


@pytest.mark.parametrize("at", [0, 5, 100, -1])
def test_a_run_that_was_stopped_reads_the_finding_and_ends_the_same(folder: Path, at: int) -> None:
    done(label(folder, "whole", *AUTO))
    whole, pilots = len(DRAWN), finding(folder, "whole")["completions"]
    assert 100 < pilots < whole
    DRAWN.clear()
    FAULT.update(at=at % whole, error=RuntimeError("gone"))
    assert label(folder, "steps", *AUTO).code != 0
    assert any((folder / ".steps.verdicts").glob("pilot-*.json")) == (at == -1)
    FAULT.clear()
    done(label(folder, "steps", *AUTO))
    assert len(DRAWN) == whole
    assert finding(folder, "steps") == finding(folder, "whole")
    assert digest(folder, "steps") == digest(folder, "whole")


def test_another_output_with_the_log_draws_no_pilot(folder: Path) -> None:
    done(label(folder, "steps", *AUTO))
    drawn = len(DRAWN)
    log = f"log={folder / '.steps.verdicts'}"
    done(label(folder, "again", log, *AUTO))
    assert len(DRAWN) == drawn
    assert digest(folder, "again") == digest(folder, "steps")
    assert "already made" in done(label(folder, "steps", *AUTO)).err
    done(label(folder, "other", log, *AUTO, "sampling.seed=1"))
    assert len(list((folder / ".steps.verdicts").glob("pilot-*.json"))) == 2


def test_budgets_count_the_pilot(folder: Path) -> None:
    label(folder, "steps", *AUTO, "sampling.max_requests=20").mistake("is spent", "larger budget")
    assert len(DRAWN) == 20
    assert VerdictLog(folder / ".steps.verdicts").spent().requests == 20
    done(label(folder, "steps", *AUTO))
    assert len(DRAWN) == VerdictLog(folder / ".steps.verdicts").spent().requests
    done(label(folder, "few", *AUTO, "sampling.most_per_solution=6"))
    assert finding(folder, "few")["finding"]["solutions"] == 0  # of three steps and more every prefix 6 times is more than 6


def test_without_a_wrong_answer_there_is_no_pilot(tmp_path: Path) -> None:
    dataset([r for r in answers(10, 1) if r.correct], tmp_path / "rollouts")
    assert "no wrong answer of three steps or more" in done(label(tmp_path, "steps", *AUTO)).err
    assert not DRAWN
    assert made(tmp_path, "steps").manifest.used


@pytest.mark.usefixtures("ray_cluster")
def test_ray_finds_the_same(folder: Path) -> None:
    done(label(folder, "here", *AUTO, policy="toy"))
    done(label(folder, "ray", *AUTO, "actors=2", policy="toy", engine="ray"))
    assert finding(folder, "ray") == finding(folder, "here")
    assert digest(folder, "ray") == digest(folder, "here")
    assert sorted(keys_of(folder, "ray")) == sorted(keys_of(folder, "here"))


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        (['sampling.scheme_settings={"share": 2}'], ["share=2"]),
        (['sampling.scheme_settings={"k": 2}'], ["k is not a setting"]),
        (["sampling.min_pass_rate=0.5", "sampling.max_pass_rate=0.2"], ["min_pass_rate=0.5", "max_pass_rate=0.2"]),
        (["sampling.max_unknown=0"], ["max_unknown=0"]),
    ],
)
@pytest.mark.parametrize("scheme", ["auto", "skew"])
def test_wrong_settings_are_said_before_anything_is_drawn(folder: Path, scheme: str, sets: list[str], words: list[str]) -> None:
    if not (scheme == "skew" and "scheme_settings" in sets[0]):
        label(folder, "steps", f"sampling.scheme={scheme}", *sets).mistake(*words)
        assert not DRAWN
        assert [path.name for path in folder.iterdir()] == ["rollouts"]


# ------------------------------------------------------------------------------------------------------------ free rules by setting


@pytest.mark.parametrize(("least", "most"), [(0.0, 1.0), (0.4, 1.0), (0.0, 0.6), (0.5, 0.5)])
@pytest.mark.parametrize(("want", "scheme"), KINDS)
def test_problems_beyond_the_pass_rates_are_skipped_and_counted(
    folder: Path, many: list[Rollout], want: str, scheme: str, least: float, most: float
) -> None:
    sets = (f"sampling.want={want}", f"sampling.scheme={scheme}", f"sampling.min_pass_rate={least}", f"sampling.max_pass_rate={most}")
    done(label(folder, "steps", *sets))
    skipped = set()
    for answer in many:
        others = [r.correct for r in many if r.prompt == answer.prompt and r.id != answer.id]
        if others and not least <= sum(map(bool, others)) / len(others) <= most:
            skipped.add(answer.id)
    rejected = {row["row"]: row["reason"] for row in made(folder, "steps").rejects().to_pylist() if "pass rate" in row["reason"]}
    assert set(rejected) == skipped
    assert bool(skipped) == ((least, most) != (0.0, 1.0))
    assert not {r.rollouts[0] for r in examples(folder, "steps")} & skipped


def test_a_prefix_that_cannot_be_graded_is_given_up_after_max_unknown(tmp_path: Path) -> None:
    wrong = [r for r in answers(40, 1) if not r.correct and len(r.steps) > 2]
    dataset(wrong, tmp_path / "rollouts")
    drawn = []
    for most in (2, 5):
        DRAWN.clear()
        done(label(tmp_path, f"steps-{most}", f"sampling.max_unknown={most}", "sampling.scheme=bisect", lost=0.5))
        rejected = made(tmp_path, f"steps-{most}").rejects().to_pylist()
        assert len(rejected) == len(wrong)
        assert all(row["reason"].startswith(f"abstained: unknown: {most} of {most}") for row in rejected)
        drawn.append(len(DRAWN))
    assert drawn == [2 * len(wrong), 5 * len(wrong)]


# ------------------------------------------------------------------------------------------------------------------- the size of it


@pytest.mark.parametrize(("wrong", "size"), [(0, 0), (1, 1), (20, 1), (21, 2), (600, 30), (10**9, 100)])
def test_the_pilot_is_a_small_part_of_the_job(wrong: int, size: int) -> None:
    assert AutoSettings().size(wrong) == size
    assert AutoSettings(share=1.0).size(wrong) == min(100, wrong)


def test_of_a_large_source_a_pilot_reads_the_heads_of_some_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rollouts = [r for r in answers(900, 1, ToyWorld(slip=0.3)) if not r.correct and len(r.steps) > 3]
    dataset(rollouts, tmp_path / "rollouts", parts=64)
    monkeypatch.setattr("rayward.montecarlo.LOOK_AT", 64)
    done(label(tmp_path, "steps", "sampling.scheme=auto", 'sampling.scheme_settings={"n": 1, "share": 0.05}'))
    found = finding(tmp_path, "steps")
    assert (LOOK_AT, LOOK_IN) == (20_000, 16)
    assert 32 < found["looked_at"] <= 64
    assert found["finding"]["solutions"] == math.ceil(0.05 * len(rollouts)) < 64  # of all, though few were looked at


@pytest.mark.parametrize(
    ("policy", "settings", "most"),
    [("toy", {}, 256), ("server", {"model": "m", "concurrency": 7}, 7), (SOLVER, {}, 0)],
)
def test_the_progress_bar_knows_how_many_requests_a_policy_works_on(policy: str, settings: dict[str, Any], most: int) -> None:
    assert capacity(make_policy(policy, settings)) == most


def test_the_progress_bar_says_what_was_spent(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rayward.progress.LOG_EVERY_S", 0.0)
    said = done(label(folder, "steps", *AUTO, policy="toy")).err
    for bar in ("pilot: ", "draw: "):
        lines = [line for line in said.splitlines() if line.startswith(bar) and "completions" in line]
        assert lines, said
        assert all(word in lines[-1] for word in ("solutions in", "completions ", "tokens ", "in flight ", "/256", "unknown "))
    assert any(" s left" in line for line in said.splitlines())


def test_the_help_names_what_there_is() -> None:
    from rayward.config import field_help
    from rayward.schemes import SCHEMES

    told = field_help(StepSampling)
    assert all(name in told["scheme"] for name in (*SCHEMES, "auto"))
    assert all(name in told["policy"] for name in POLICIES)
