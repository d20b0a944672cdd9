"""Sample answers to problems, and continuations of every step prefix of an answer, with any policy; grade what comes back.

A problem is a prompt with the gold answer it is graded by. Seeds are hashes of (seed, problem, answer, kept steps, number), so a draw
is the same wherever and whenever it is made.

>>> problem = toy_problem(1, ToyWorld(), seed=0)
>>> [[rollout]] = sample_problems([problem], make_policy("toy"), SampleSettings(answers=1)).rollouts
>>> rollout.correct, rollout.provenance["answer"], rollout.provenance["gold"]
(True, '38', '38')

An outcome that is unknown (no answer stated, none that can be read, a check that took too long, a text cut short) is never wrong:
`correct` and `reward` are None and provenance says `why`. The text and the gold answer stay with the rollout, so that `regrade` needs no
sampling.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import islice
from typing import Any, NamedTuple

import pyarrow as pa

from rayward import dataflow
from rayward.config import choose, parse_settings
from rayward.dataflow import Made, Recipe
from rayward.errors import DataError
from rayward.formats import Piece, Unreadable, as_prompt, decode, find_files, key, pieces, read_rows, source_bytes
from rayward.grading import Verdict, check_gold, grader_version, make_grader, verdict
from rayward.labels.judgements import reject
from rayward.montecarlo import gold_of
from rayward.places import Place
from rayward.policies import POLICIES, Completion, Policy, Request, gpus_of, make_policy, stream
from rayward.progress import Progress
from rayward.records import BadRecord, Message, Prompt, Rejected, Rollout, check_text, rejects_table, rollouts_of, rollouts_table
from rayward.storage import Dataset, read_table
from rayward.toy_world import ToyWorld, seed_of

CHUNK = 64  # problems of one task: what is lost, at the most, when a run is killed
MOST_TASKS = 1024  # of a piece of a file: each reads the piece from its start
TOY_BYTES = 300  # about, of a problem of the toy world with an answer


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
        make_grader(self.grader)  # what it needs must be here before anything is drawn
        choose(POLICIES, self.policy, "policy")
        greedy = parse_settings(self.policy_settings, "policy_settings").get("temperature") == 0
        if greedy and (self.answers > 1 or self.continued):
            raise ValueError(
                f"policy_settings: with temperature 0 all answers={self.answers} to a problem are one; take e.g. 0.7, or answers=1"
            )


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


def sample(recipe: Recipe, problems: str, settings: SampleSettings, parts: int = 0, actors: int = 0) -> Dataset:
    """Rollouts of `problems`: a file or folder of rows with prompt and gold, or `toy:N` (N problems of the toy world).

    On Ray `actors` workers draw, each with a policy of its own; 0: a task at a time on every core, but one worker where the policy is a
    model in its process.
    """
    produce = partial(_sample_chunk, settings)
    tasks: list[dict[str, Any]]
    toy = re.fullmatch(r"toy:(\d+)(?::(\d+))?", problems)
    if toy:
        count, seed = int(toy[1]), int(toy[2] or 0)
        if count == 0:
            raise DataError(f"problems={problems} are none", "ask for some, e.g. toy:400")
        tasks = [{"toy": [start, min(start + CHUNK, count), seed]} for start in range(0, count, CHUNK)]
        size = count * TOY_BYTES
    elif problems.startswith("toy:"):
        raise DataError(f"problems={problems} is not toy:COUNT or toy:COUNT:SEED", "e.g. toy:400")
    else:
        files = find_files(problems)
        tasks = [task for name, path in files for piece in pieces(name, path, piece_bytes=2**20) for task in _tasks(piece)]
        size = sum(source_bytes(path) for _, path in files)
    size *= settings.answers + settings.continued * settings.continuations * 4  # a guess: an answer as long as its problem, of 4 steps
    gpus = gpus_of(settings.policy, recipe.gpus)
    made = dataflow.ingest(recipe, tasks, produce, unit="chunks", size=size, parts=parts, actors=actors or int(gpus != 0), gpus=gpus)
    outcomes = Counter(said for part in made.parts for said in read_table(part, columns=["correct"])["correct"].to_pylist())
    told = ", ".join(
        f"{outcomes[value]:,} {name}" for value, name in ((True, "right"), (False, "wrong"), (None, "unknown")) if outcomes[value]
    )
    print(f"{grader_version(settings.grader)}: {told}", file=sys.stderr)
    return made


def _tasks(piece: Piece) -> list[dict[str, Any]]:
    """A piece of a file in tasks of some CHUNK rows."""
    rows = sum(1 for _ in read_rows(*piece))
    step = max(CHUNK, -(-rows // MOST_TASKS))
    return [{"piece": piece._asdict(), "rows": [start, start + step]} for start in range(0, rows, step)]


def _sample_chunk(settings: SampleSettings, task: dict[str, Any]) -> Iterator[list[Rollout] | Rejected]:
    make_grader(settings.grader)  # here too: this may be another machine
    policy = _policy(settings.policy, settings.policy_settings)
    chunk: list[Problem] = []
    for item in _problems(task):
        if isinstance(item, Rejected):
            yield item
            continue
        chunk.append(item)
        if len(chunk) == CHUNK:
            yield from _sampled(chunk, policy, settings)
            chunk = []
    yield from _sampled(chunk, policy, settings)


@cache
def _policy(name: str, settings: str) -> Policy:
    """Made once per process: a policy may be a model."""
    return make_policy(name, parse_settings(settings, "policy_settings"))


def _sampled(problems: Sequence[Problem], policy: Policy, settings: SampleSettings) -> Iterator[list[Rollout] | Rejected]:
    made = sample_problems(problems, policy, settings)
    for problem, rollouts in zip(problems, made.rollouts, strict=True):
        none = Rejected(source="problems", row=problem.id, reason=f"no answer: all {settings.answers} completions were lost")
        yield rollouts or none
    yield from made.lost


def _problems(task: dict[str, Any]) -> Iterator[Problem | Rejected]:
    if "toy" in task:
        start, end, seed = task["toy"]
        for index in range(start, end):
            yield toy_problem(index, ToyWorld(), seed)
        return
    for row in islice(read_rows(**task["piece"]), *task["rows"]):
        if isinstance(row, Unreadable):
            yield Rejected(source=row.source, row=str(row.number), reason=row.reason)
            continue
        try:
            yield problem_of(decode(row.content), row.id)
        except BadRecord as error:
            yield Rejected(source=row.source, row=str(row.number), reason=str(error), raw=row.text)


class Sampled(NamedTuple):
    """What a policy made of some problems."""

    rollouts: list[list[Rollout]]  # of each problem: its answers, then the continuations of the first `continued` of them
    lost: list[Rejected]  # completions that are no rollout: nothing was written, or the policy failed


def sample_problems(problems: Sequence[Problem], policy: Policy, settings: SampleSettings) -> Sampled:
    """Answers to every problem, and continuations of every step prefix of some of them, prefix by prefix."""
    asked = [(p, n) for p in problems for n in range(settings.answers)]
    answers = _completions(policy, [Request(p.prompt, (), seed_of(settings.seed, p.id, n)) for p, n in asked], "answers")
    made: dict[str, list[Rollout]] = {p.id: [] for p in problems}
    lost: list[Rejected] = []
    prefixes: list[tuple[Problem, str, tuple[str, ...], int]] = []
    for (problem, n), done in zip(asked, answers, strict=True):
        name = f"{problem.id}/{n}"
        if done.finish_reason == "error" or not done.steps:
            lost.append(_lost(name, done))
            continue
        made[problem.id].append(_rollout(problem, name, done.steps, done.finish_reason, settings))
        if n < settings.continued:
            for length in range(1, len(done.steps)):
                prefixes += [(problem, name, done.steps[:length], k) for k in range(settings.continuations)]
    asked_on = [Request(p.prompt, kept, seed_of(settings.seed, parent, len(kept), k)) for p, parent, kept, k in prefixes]
    more = _completions(policy, asked_on, "continuations")
    for (problem, parent, kept, k), done in zip(prefixes, more, strict=True):
        name, family = f"{parent}/{len(kept)}/{k}", {"continues": parent, "kept_steps": len(kept)}
        if done.finish_reason == "error":
            lost.append(_lost(name, done))
        else:  # nothing more was written: the answer ends with what was kept
            made[problem.id].append(_rollout(problem, name, kept + done.steps, done.finish_reason, settings, **family))
    return Sampled(list(made.values()), lost)


def _completions(policy: Policy, requests: Sequence[Request], what: str) -> list[Completion]:
    """One per request, in order; what is finished shows as it comes in."""
    if not requests:
        return []
    done: dict[int, Completion] = {}
    with Progress(what, total=len(requests), unit="completions") as bar:
        for place, completion in stream(policy, requests):
            done[place] = completion
            bar.advance()
    return [done[place] for place in range(len(requests))]


def _lost(name: str, done: Completion) -> Rejected:
    failed = done.finish_reason == "error"
    return Rejected(source="policy", row=name, reason=f"policy failed: {done.error}" if failed else "empty completion: nothing was written")


def _rollout(
    problem: Problem, rollout_id: str, steps: tuple[str, ...], finish_reason: str, settings: SampleSettings, **more: Any
) -> Rollout:
    said = _verdict("".join(steps), finish_reason, problem.gold, settings.grader)
    return Rollout(
        id=rollout_id,
        prompt=problem.prompt,
        steps=steps,
        reward=None if said.right is None else float(said.right),
        correct=said.right,
        judgement="graded",
        policy=settings.policy,
        provenance={
            "finish_reason": finish_reason,
            "gold": problem.gold,
            "seed": str(settings.seed),
            **_told(said, settings.grader),
        },
        **more,
    )


def _verdict(text: str, finish_reason: str | None, gold: str, grader: str) -> Verdict:
    """Of a text that was cut off nothing is known, whatever it states."""
    return Verdict(None, why="truncated") if finish_reason == "length" else verdict(text, gold, grader)


def _told(said: Verdict, grader: str) -> dict[str, str]:
    """What stands behind an outcome: the stated answer, why it is unknown, and by what it was graded."""
    told = {"grader": grader, "grader_version": grader_version(grader)}
    if said.answer is not None:
        told["answer"] = said.answer
    return told | ({"why": said.why} if said.why else {})


# ------------------------------------------------------------------------------------------------------------ grading again


def regrade(recipe: Recipe, source: Dataset, grader: str) -> Dataset:
    """The same rollouts, with outcomes by another grader or by newer rules; says on stderr how many are now another."""
    make_grader(grader)
    [made] = dataflow.transform(recipe, source, lambda: partial(_regrade_part, grader), kind="rollouts")
    changes = sum((_changes(*parts) for parts in zip(source.parts, made.parts, strict=True)), Counter[str]())
    print(f"{grader_version(grader)}: " + (", ".join(f"{n:,} {what}" for what, n in sorted(changes.items())) or "nothing"), file=sys.stderr)
    return made


def _regrade_part(grader: str, table: pa.Table) -> Made:
    make_grader(grader)
    graded: list[Rollout] = []
    rejects: list[Rejected] = []
    for rollout in rollouts_of(table):
        try:
            graded.append(_regraded(rollout, check_gold(gold_of(rollout)), grader))
        except BadRecord as error:
            rejects.append(reject(rollout, str(error)))
    return Made({"": rollouts_table(graded)}, rejects_table(rejects), len(graded))


def _regraded(rollout: Rollout, gold: str, grader: str) -> Rollout:
    """A rollout with another verdict; a reward that was the outcome follows it, any other stays."""
    said = _verdict(rollout.text, rollout.provenance.get("finish_reason"), gold, grader)
    was = None if rollout.correct is None else float(rollout.correct)
    now = None if said.right is None else float(said.right)
    follows = rollout.judgement == "graded" and rollout.reward == was
    kept = {name: text for name, text in rollout.provenance.items() if name not in ("answer", "why")}
    return replace(rollout, correct=said.right, reward=now if follows else rollout.reward, provenance={**kept, **_told(said, grader)})


def _outcomes(part: Place) -> pa.Table:
    return read_table(part, columns=["id", "correct"])


def _changes(before: Place, after: Place) -> Counter[str]:
    """How many outcomes of a part are what they were, or became another."""
    names = {True: "right", False: "wrong", None: "unknown"}
    was, now = (dict(zip(*(table[c].to_pylist() for c in ("id", "correct")), strict=True)) for table in map(_outcomes, (before, after)))
    return Counter(names[o] if o is was[i] else f"{names[was[i]]} that became {names[o]}" for i, o in now.items())
