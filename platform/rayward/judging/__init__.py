"""A policy as a judge: rollouts in, rollouts out with what the judge thinks of them, and every word it said in a log.

    verdicts    what is asked, word for word, and how a verdict is read     verdicts.py
    answers     pairs, ratings and rankings of whole answers                answers.py
    steps       right, wrong or neutral, step by step                       steps.py

    rayward run judge_pairs --source store/rollouts --output store/judged \\
        --set judge_settings='{"base_url": "http://localhost:8000/v1", "model": "Qwen/Qwen3-32B", "temperature": 0}'

A run that is killed, or whose budget is spent, is gone on with by the same command: what was answered is in the log. The log stays
beside the output, in `.OUTPUT.verdicts` unless `--log` says where.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from rayward import dataflow, places
from rayward.config import as_dict, choose, parse_settings
from rayward.dataflow import Engine, Made, Recipe
from rayward.errors import SettingsError
from rayward.judging.answers import AnswerSettings, Judged, judge_answers
from rayward.judging.steps import StepJudgeSettings, judge_steps
from rayward.places import Place, at
from rayward.policies import HOW, POLICIES, drawn_by, gpus_of, make_policy
from rayward.policies.asking import Asker, Budget, Spent, Tally, VerdictLog
from rayward.records import rejects_table, rollouts_of, rollouts_table
from rayward.storage import Dataset, open_dataset, sibling

__all__ = ["AnswerSettings", "Budget", "Job", "StepJudgeSettings", "judge_dataset"]


@dataclass(frozen=True)
class Job:
    """Who judges which rollouts, by which settings, and where to."""

    source: str  # folder of rollouts
    output: str  # folder for the judged rollouts
    judge: str  # policies.POLICIES
    judge_settings: str  # JSON of the policy's settings
    how: AnswerSettings | StepJudgeSettings
    budget: Budget
    log: str = ""  # folder of verdicts; "": .OUTPUT.verdicts beside the output
    actors: int = 1  # workers on Ray
    engine: Engine = "auto"
    overwrite: bool = False
    cpus: float = 1.0  # of each of them, as in Recipe
    gpus: float = -1.0
    memory_gib: float = 0.0

    @classmethod
    def of(cls, settings: Any, how: AnswerSettings | StepJudgeSettings) -> Job:
        """The job of a script, whose settings have all the other fields."""
        return cls(how=how, **{f.name: getattr(settings, f.name) for f in fields(cls) if f.name != "how"})

    def __post_init__(self) -> None:
        choose(POLICIES, self.judge, "judge")
        if self.actors < 1:
            raise SettingsError(f"actors={self.actors} must be at least 1")
        parse_settings(self.judge_settings, "judge_settings")

    @property
    def policy_settings(self) -> dict[str, Any]:
        """The settings of the policy that judges."""
        return parse_settings(self.judge_settings, "judge_settings")

    @property
    def name(self) -> str:
        """The judge as annotator: its model, of a path the last part.

        >>> Job("s", "o", "server", '{"model": "Qwen/Qwen3-8B"}', AnswerSettings(), Budget()).name
        'Qwen/Qwen3-8B'
        """
        model = str(self.policy_settings.get("model", self.judge))
        return Path(model).name if Path(model).is_dir() else model

    @property
    def folder(self) -> Place:
        """Where the verdicts are."""
        return at(self.log) if self.log else sibling(at(self.output), "verdicts")

    def told(self) -> dict[str, Any]:
        """The settings that change what is made, as the manifest has them."""
        settings = {name: value for name, value in self.policy_settings.items() if name not in HOW}
        words = json.dumps(settings, sort_keys=True)
        return {"source": self.source, "judge": self.judge, "judge_settings": words, "how": as_dict(self.how)}


def judge_dataset(made_by: str, job: Job) -> Dataset:
    """Judge a dataset of rollouts, and say on stderr what was asked, what came of it, and how far the judge goes by position."""
    rollouts = open_dataset(job.source, "rollouts")
    how = (job.engine, job.overwrite, job.cpus, job.gpus, job.memory_gib)
    recipe = Recipe(made_by, job.output, job.told(), [rollouts.lineage()], *how)
    identity = json.dumps([str(at(job.output).absolute()), job.told(), rollouts.manifest.digest], sort_keys=True)
    tallies = job.folder.absolute() / "tally" / hashlib.blake2b(identity.encode(), digest_size=8).hexdigest()
    log = VerdictLog(job.folder.absolute())
    before = log.spent()
    make = partial(_JudgePart, job, str(log.folder), str(tallies))
    [made] = dataflow.transform(recipe, rollouts, make, kind="rollouts", actors=job.actors, gpus=gpus_of(job.judge, recipe.gpus))
    total: Tally = defaultdict(float)
    for said in places.read_many(tallies, [name for name in places.listing(tallies) if name.endswith(".json")]).values():
        for name, number in json.loads(said).items():
            total[name] += number
    spent = log.spent()
    print(report(total, Spent(spent.requests - before.requests, spent.tokens - before.tokens), log.folder), file=sys.stderr)
    return made


class _JudgePart:
    """One part of a dataset judged; made once per worker, and the policy with it."""

    def __init__(self, job: Job, log: str, tallies: str):
        policy = make_policy(job.judge, job.policy_settings)
        self.how, self.judge, self.tallies = job.how, job.name, at(tallies)
        self.asker = Asker(policy, drawn_by(job.judge, job.policy_settings), VerdictLog(at(log)), job.budget, job.how.seed)

    def __call__(self, table: pa.Table) -> Made:
        rollouts = rollouts_of(table)
        tally: Tally = defaultdict(float)
        if isinstance(self.how, AnswerSettings):
            judged: Judged = judge_answers(rollouts, self.how, self.judge, self.asker, tally)
        else:
            judged = judge_steps(rollouts, self.how, self.judge, self.asker, tally)
        self.asker.log.flush()
        if rollouts:
            places.write(self.tallies / f"{table['prompt_id'][0]}.json", json.dumps(tally, sort_keys=True))
        return Made({"": rollouts_table(judged.rollouts)}, rejects_table(judged.rejects), judged.used)


def report(tally: Mapping[str, float], asked: Spent, log: Place) -> str:
    """What happened, for a person.

    >>> counts = {"questions": 4, "comparisons": 2, "tied": 1, "inconsistent": 1, "verdicts AB": 2, "first AB": 2,
    ...     "verdicts BA": 2, "first BA": 1}
    >>> print(report(counts, Spent(4, 900), Path("log")))
    judge: 4 questions, 4 asked now for 900 tokens, the others from log; 0 unparsable, 0 failed
    judge: 2 comparisons, 1 tied, 1 inconsistent; the answer shown first got 75.0 % (AB 100.0 %, BA 50.0 %) where 50 % is fair
    """
    said = defaultdict(float, tally)
    lines = [
        f"{said['questions']:,.0f} questions, {asked.requests:,} asked now for {asked.tokens:,} tokens, the others from {log}; "
        f"{said['unparsable']:,.0f} unparsable, {said['failed']:,.0f} failed"
    ]
    if said["comparisons"]:
        line = f"{said['comparisons']:,.0f} comparisons, {said['tied']:,.0f} tied, {said['inconsistent']:,.0f} inconsistent"
        orders = [name.partition(" ")[2] for name in sorted(said) if name.startswith("verdicts ")]
        shares = {order: 100 * said[f"first {order}"] / said[f"verdicts {order}"] for order in orders}
        if shares:
            whole = 100 * sum(said[f"first {order}"] for order in orders) / sum(said[f"verdicts {order}"] for order in orders)
            each = " (" + ", ".join(f"{order} {share:.1f} %" for order, share in shares.items()) + ")" if len(shares) > 1 else ""
            line += f"; the answer shown first got {whole:.1f} %{each} where 50 % is fair"
        lines.append(line)
    if said["right"] + said["wrong"] + said["neutral"]:
        lines.append(f"steps: {said['right']:,.0f} right, {said['wrong']:,.0f} wrong, {said['neutral']:,.0f} neutral")
    return "\n".join(f"judge: {line}" for line in lines)
