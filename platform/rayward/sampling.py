"""Sample answers to problems, and continuations of every step prefix of an answer, with any policy; grade what comes back.

A problem is a prompt with the gold answer it is graded by. Seeds are hashes of (seed, problem, answer, kept steps, number), so a draw
is the same wherever and whenever it is made.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from rayward import dataflow
from rayward.config import choose
from rayward.dataflow import Recipe
from rayward.errors import DataError
from rayward.formats import Unreadable, as_prompt, decode, find_files, key, read_rows
from rayward.grading import GRADERS, check_gold
from rayward.policies import POLICIES, Policy, Request, make_policy
from rayward.records import BadRecord, Message, Prompt, Rejected, Rollout, check_text
from rayward.storage import Dataset
from rayward.toy_world import ToyWorld, seed_of

CHUNK = 64  # problems of one task


@dataclass(frozen=True)
class SampleSettings:
    """What is sampled."""

    policy: str = "toy"  # who answers (policies.POLICIES)
    policy_settings: str = "{}"  # JSON of the policy's own settings, e.g. '{"slip": 0.3}' for the toy solver
    answers: int = 8  # answers per problem
    continued: int = 0  # of these, how many have every step prefix continued, for step labels
    continuations: int = 8  # completions per step prefix of a continued answer
    grader: str = "numeric"  # how a final answer is held against the gold one (grading.GRADERS)
    seed: int = 0  # another seed is another sample

    def __post_init__(self) -> None:
        if self.answers < 1 or self.continuations < 1 or not 0 <= self.continued <= self.answers:
            raise ValueError(f"answers={self.answers}, continued={self.continued}, continuations={self.continuations} do not go together")
        choose(GRADERS, self.grader, "grader")
        choose(POLICIES, self.policy, "policy")
        try:
            settings = json.loads(self.policy_settings)
        except ValueError as error:
            raise ValueError(f"policy_settings={self.policy_settings!r} is not JSON: {error}") from None
        if not isinstance(settings, dict):
            raise ValueError(f"policy_settings={self.policy_settings!r} is not a JSON object of settings")


@dataclass(frozen=True)
class Problem:
    """A prompt and the gold answer."""

    id: str
    prompt: Prompt
    gold: str


def problem_of(row: Mapping[str, Any], row_id: str) -> Problem:
    """A problem from a row: `prompt` (or `problem`, `question`) and `gold` (or `answer`, `reference`).

    >>> problem_of({"question": "2+2?", "answer": "#### 4"}, "p").gold
    '#### 4'
    """
    gold = key(row, "gold", "answer", "reference")
    gold = check_gold(check_text("the gold answer", str(gold) if isinstance(gold, int | float) else gold))
    return Problem(row_id, as_prompt(key(row, "prompt", "problem", "question"), "the problem"), gold)


def toy_problem(index: int, world: ToyWorld, seed: int) -> Problem:
    """Problem `index` of the toy world."""
    numbers = world.problem(index, seed)
    return Problem(f"toy-{seed}-{index}", (Message("user", world.question(numbers)),), str(max(numbers)))


def sample(recipe: Recipe, problems: str, settings: SampleSettings, parts: int = 0) -> Dataset:
    """Rollouts of `problems`: a file or folder of rows with prompt and gold, or `toy:N` (N problems of the toy world)."""
    produce = partial(_sample_chunk, settings)
    tasks: list[dict[str, Any]]
    toy = re.fullmatch(r"toy:(\d+)(?::(\d+))?", problems)
    if toy:
        count, seed = int(toy[1]), int(toy[2] or 0)
        if count == 0:
            raise DataError(f"problems={problems} are none", "ask for some, e.g. toy:400")
        tasks = [{"toy": [start, min(start + CHUNK, count), seed]} for start in range(0, count, CHUNK)]
    elif problems.startswith("toy:"):
        raise DataError(f"problems={problems} is not toy:COUNT or toy:COUNT:SEED", "e.g. toy:400")
    else:
        tasks = [{"name": name, "path": path} for name, path in find_files(problems)]
    return dataflow.ingest(recipe, tasks, produce, unit="chunks", size=0, parts=parts)


def _sample_chunk(settings: SampleSettings, task: dict[str, Any]) -> Iterator[list[Rollout] | Rejected]:
    policy = make_policy(settings.policy, json.loads(settings.policy_settings))
    chunk: list[Problem] = []
    for item in _problems(task):
        if isinstance(item, Rejected):
            yield item
            continue
        chunk.append(item)
        if len(chunk) == CHUNK:
            yield from sample_problems(chunk, policy, settings)
            chunk = []
    yield from sample_problems(chunk, policy, settings)


def _problems(task: dict[str, Any]) -> Iterator[Problem | Rejected]:
    if "toy" in task:
        start, end, seed = task["toy"]
        for index in range(start, end):
            yield toy_problem(index, ToyWorld(), seed)
        return
    for row in read_rows(task["name"], task["path"]):
        if isinstance(row, Unreadable):
            yield Rejected(source=row.source, row=str(row.number), reason=row.reason)
            continue
        try:
            yield problem_of(decode(row.content), row.id)
        except BadRecord as error:
            yield Rejected(source=row.source, row=str(row.number), reason=str(error), raw=row.text)


def sample_problems(problems: Sequence[Problem], policy: Policy, settings: SampleSettings) -> list[list[Rollout]]:
    """The rollouts of each problem: its answers, then the continuations of the first `continued` of them, prefix by prefix."""
    asked = [(p, n) for p in problems for n in range(settings.answers)]
    answers = policy([Request(p.prompt, (), seed_of(settings.seed, p.id, n)) for p, n in asked])
    made: dict[str, list[Rollout]] = {p.id: [] for p in problems}
    prefixes: list[tuple[Problem, str, tuple[str, ...], int]] = []
    for (problem, n), done in zip(asked, answers, strict=True):
        made[problem.id].append(_rollout(problem, f"{problem.id}/{n}", done.steps, done.finish_reason, settings))
        if n < settings.continued:
            for length in range(1, len(done.steps)):
                prefixes += [(problem, f"{problem.id}/{n}", done.steps[:length], k) for k in range(settings.continuations)]
    more = policy([Request(p.prompt, kept, seed_of(settings.seed, parent, len(kept), k)) for p, parent, kept, k in prefixes])
    for (problem, parent, kept, k), done in zip(prefixes, more, strict=True):
        made[problem.id].append(
            _rollout(
                problem,
                f"{parent}/{len(kept)}/{k}",
                kept + done.steps,
                done.finish_reason,
                settings,
                continues=parent,
                kept_steps=len(kept),
            )
        )
    return list(made.values())


def _rollout(
    problem: Problem, rollout_id: str, steps: tuple[str, ...], finish_reason: str, settings: SampleSettings, **more: Any
) -> Rollout:
    grade = choose(GRADERS, settings.grader, "grader")
    correct = grade("".join(steps), problem.gold) if finish_reason == "stop" else None
    return Rollout(
        id=rollout_id,
        prompt=problem.prompt,
        steps=steps,
        reward=None if correct is None else float(correct),
        correct=correct,
        judgement="graded",
        policy=settings.policy,
        provenance={
            "finish_reason": finish_reason,
            "gold": problem.gold,
            "grader": settings.grader,
            "seed": str(settings.seed),
        },
        **more,
    )
