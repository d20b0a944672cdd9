"""What goes wrong with Monte-Carlo labels elsewhere, where no other test holds it already: one test each.

The others stand where the thing they are about is tested: `pytest -k pitfall` and, by subject, test_grading_*, test_steps_cut,
test_policies, test_schemes, test_montecarlo, test_rendering, test_metrics and test_hygiene.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from driving import done, here
from rayward import grading
from rayward.grading import symbolic, verdict
from rayward.montecarlo import StepSampling, draw, solutions_of
from rayward.policies import Completion, Request, ToyPolicy
from rayward.policies.asking import Asker, Budget, VerdictLog
from rayward.policies.server import ServerPolicy, ServerSettings
from rayward.records import Message, Rollout, examples_of
from rayward.sampling import Problem, SampleSettings, sample_problems, toy_problem
from rayward.schemes import Budget as DrawBudget
from rayward.schemes import CertifiedSettings, Draws, Solution, make_scheme, rounds
from rayward.storage import open_dataset
from rayward.toy_world import ToyWorld, seed_of

EXHAUSTIVE = StepSampling(policy="toy", scheme="exhaustive", want="soft")


class Recorder:
    """The toy solver, or one that always writes the same, with a memory of what it was asked."""

    def __init__(self, always: tuple[str, ...] = ()):
        self.asked: list[Request] = []
        self.always = always

    def __call__(self, requests: Sequence[Request]) -> list[Completion]:
        self.asked += requests
        if self.always:
            return [Completion(self.always, "stop", 1) for _ in requests]
        return ToyPolicy(ToyWorld(slip=0.3))(requests)


def answers(problems: int, each: int, **more: Any) -> list[Rollout]:
    posed = [toy_problem(n, ToyWorld(), 0) for n in range(problems)]
    made = sample_problems(posed, ToyPolicy(ToyWorld(slip=0.3)), SampleSettings(answers=each, **more))
    return [rollout for rollouts in made.rollouts for rollout in rollouts]


def drawn(rollouts: Sequence[Rollout], policy: Any, folder: Path) -> Any:
    asker = Asker(policy, "who", VerdictLog(folder, hold=256), Budget(), 0)
    return draw(rollouts, EXHAUSTIVE.made_scheme(), asker, "numeric", DrawBudget())


def test_pitfall_2_algebra_is_asked_last_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same characters, and numbers in any form, cost no process; what does is asked once for a pair."""
    asked: list[tuple[str, str]] = []

    class Pool:
        def check(self, gold: str, answer: str) -> str:
            asked.append((gold, answer))
            return "right"

    monkeypatch.setattr(symbolic, "installed", lambda: True)
    monkeypatch.setattr(symbolic, "pool", Pool)
    grading._math.cache_clear()
    plain = [
        ("x^2 - 1", "x^2-1"),
        ("18", "18.0"),
        ("\\frac{1}{2}", "0.5"),
        ("1,234", "\\$1234"),
        ("18", "19"),
        ("\\text{Evelyn}", "evelyn"),
    ]
    assert [verdict(f"\\boxed{{{answer}}}", gold, "math").right for gold, answer in plain] == [True, True, True, True, False, True]
    assert asked == []
    for _ in range(3):
        assert verdict("\\boxed{(x-1)(x+1)}", "x^2-1", "math").right
    assert len(asked) == 1
    grading._math.cache_clear()


def test_pitfall_6_draws_of_one_prefix_stand_side_by_side(tmp_path: Path) -> None:
    """Or an engine's prefix cache is split; every draw is a request of its own, with a seed of its own."""
    sampling, labelling = Recorder(), Recorder()
    posed = [toy_problem(n, ToyWorld(), 0) for n in range(20)]
    sample_problems(posed, sampling, SampleSettings(answers=4, continued=1, continuations=3))
    drawn(answers(20, 2), labelling, tmp_path)
    for policy in (sampling, labelling):
        runs = [prefix for prefix, _ in itertools.groupby((r.prompt, r.kept) for r in policy.asked)]
        whole = {(r.prompt, r.kept) for r in policy.asked}
        assert len(policy.asked) > 2 * len(whole)
        assert len(runs) == len(whole)
        assert len({(r.prompt, r.kept, r.seed) for r in policy.asked}) == len(policy.asked)
    body = ServerPolicy(ServerSettings(model="m")).body(sampling.asked[-1])
    assert "n" not in body  # of several choices all but one would be lost
    assert body["seed"] == sampling.asked[-1].seed


@pytest.mark.parametrize("settings", [SampleSettings, StepSampling])
def test_pitfall_7_temperature_0_is_refused_where_draws_would_be_one(settings: Any) -> None:
    with pytest.raises(ValueError, match=r"temperature 0.*0\.7"):
        settings(policy="server", policy_settings='{"model": "m", "temperature": 0.0}')
    assert settings(policy="server", policy_settings='{"model": "m", "temperature": 0.1}')
    assert SampleSettings(policy="server", policy_settings='{"model": "m", "temperature": 0}', answers=1)


def test_pitfall_7_equal_completions_are_draws_like_any_other(tmp_path: Path) -> None:
    rollout = next(r for r in answers(20, 1) if not r.correct and len(r.steps) > 3)
    policy = Recorder(always=(f"A: {rollout.provenance['gold']}",))
    found = drawn([rollout], policy, tmp_path)
    assert found.tallies[0].right[1:] == [8] * (len(rollout.steps) - 1)
    assert len(policy.asked) == 8 * (len(rollout.steps) - 1)


def test_pitfall_9_the_gold_answer_never_enters_a_prompt(tmp_path: Path) -> None:
    gold = "the gold answer that nobody may read"
    policy = Recorder(always=("Think.\n", "A: 5"))
    problem = Problem("p", (Message("user", "largest of 13 27 15 ?"),), gold)
    settings = SampleSettings(answers=2, continued=1, grader="exact")
    [rollouts] = sample_problems([problem], policy, settings).rollouts
    assert all(r.provenance["gold"] == gold for r in rollouts)
    drawn([r for r in rollouts if r.continues is None], policy, tmp_path)
    assert len(policy.asked) > 10
    for request in policy.asked:
        assert request.prompt == problem.prompt
        assert gold not in "".join(request.kept)
        assert gold not in json.dumps(ServerPolicy(ServerSettings(model="m")).body(request))


def test_pitfall_12_the_pass_rate_of_a_problem_is_that_of_its_other_answers() -> None:
    """An answer that is chosen for its ending would count itself."""
    rollouts = answers(30, 5)
    for rollout, of in zip(rollouts, solutions_of(rollouts), strict=True):
        others = [r.correct for r in rollouts if r.prompt == rollout.prompt and r.id != rollout.id]
        assert (of.root_right, of.root_count) == (sum(map(bool, others)), len(others))
    [alone] = solutions_of(rollouts[:1])
    assert (alone.root_right, alone.root_count) == (0, 0)


def content(answer: str, gold: str) -> bool:
    """A grader that finds everything right."""
    return bool(answer and gold)


def test_pitfall_13_step_labels_are_graded_again_without_drawing(tmp_path: Path) -> None:
    sample = ("--problems", "toy:30", "--output", tmp_path / "rollouts", "--set", "sample.answers=1")
    done(here("sample_rollouts", *sample, "--set", 'sample.policy_settings={"slip": 0.4}'))
    drawing: list[str | Path] = ["--policy", "toy", "--scheme", "exhaustive", "--want", "soft", "--log", tmp_path / "log"]
    spent, labelled = [], []
    for grader in ("numeric", f"{__name__}:content"):
        output = tmp_path / grader.rpartition(":")[2]
        done(here("label_steps", "--source", tmp_path / "rollouts", "--output", output, "--grader", grader, *drawing))
        spent.append(VerdictLog(tmp_path / "log").spent())
        labelled.append(examples_of(open_dataset(output).table()))
    assert spent[0] == spent[1]
    assert spent[0].requests > 0
    assert {target for e in labelled[0] for target in e.targets[:-1]} > {0.0, 1.0}
    assert {target for e in labelled[1] for target in e.targets[:-1]} == {1.0}
    assert [{e.provenance["verifier"] for e in some} for some in labelled] == [{grading.grader_version("numeric")}, {f"{__name__}:content"}]


def test_pitfall_15_answers_that_share_an_id_share_no_verdict(tmp_path: Path) -> None:
    """Whoever names the answers of two files 0, 1, 2, ...: the log goes by what was read and written, not by names."""
    rollouts = answers(12, 1)
    twins = [Rollout(id="0", prompt=r.prompt, steps=r.steps, correct=r.correct, provenance=r.provenance) for r in rollouts]
    apart, together = drawn(rollouts, ToyPolicy(), tmp_path / "apart"), drawn(twins, ToyPolicy(), tmp_path / "together")
    assert together.decisions == apart.decisions
    assert together.tallies == apart.tallies
    again = drawn(twins, Recorder(), tmp_path / "together")
    assert (again.asked, again.decisions) == (0, together.decisions)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 4])
def test_certified_stays_within_its_level_over_20_000_solutions(batch: int) -> None:
    """Values at the very borders p0 and p1, falling or not: no true crossing is named with chance alpha at the most."""
    count, alpha, p0, p1 = 20_000, 0.1, 0.1, 0.3
    rng = random.Random(batch)
    values = []
    for n in range(count):
        T = rng.choice([4, 8, 12, 16, 20])
        error = rng.randint(1, T)
        falling = [rng.choice([p1, 0.5]) if t < error else rng.choice([0.0, p0]) for t in range(T)]
        any_way = [0.9, *(rng.choice([0.0, p0, p1, 0.6]) for _ in range(T - 1))]
        values.append(falling if n % 2 else any_way)
    solutions = [Solution(len(v), False, tuple(40.0 * (len(v) - t) for t in range(len(v))), 4, 8, f"{n}") for n, v in enumerate(values)]

    def verdicts(draws: Sequence[Draws]) -> list[list[bool]]:
        made = []
        for d in draws:
            made.append([random.Random(seed_of(batch, d.solution, d.kept, k)).random() < values[d.solution][d.kept] for k in d.numbers])
        return made

    found = rounds(solutions, make_scheme("certified", CertifiedSettings(alpha, p1, p0, batch, cap=500)), verdicts).decisions
    wrong = labelled = 0
    for decision, row in zip(found, values, strict=True):
        if decision.first_error is None:
            continue
        labelled += 1
        after = 0.0 if decision.first_error + 1 == len(row) else row[decision.first_error + 1]
        wrong += not (row[decision.first_error] > p0 and after < p1)
    assert labelled > count / 2
    assert wrong > 0
    assert wrong / count <= alpha
    print(f"batch={batch}: {wrong} of {labelled:,} labels of {count:,} solutions are no true crossing")
