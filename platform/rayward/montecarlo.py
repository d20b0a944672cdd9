"""Label the steps of answers with a policy: continuations of step prefixes are drawn where a scheme asks for them, graded, and counted.

    rayward run label_steps --source store/rollouts --output store/steps --policy server --scheme skew \\
        --policy-settings '{"base_url": "http://localhost:8000/v1", "model": "Qwen/Qwen3-8B"}'

Decisions are made in rounds over all solutions of a part at once (`schemes.Rounds`), and the policy is kept busy: as soon as the verdicts
on one solution are in, its next draws are handed out, while others are still being written. Every completion lies word for word in a
verdict log (`policies.asking`), so a run that is killed, or whose budget is spent, goes on with the same command, draws nothing twice, and
decides the same; and labels can be graded again without drawing.

With `scheme=auto` a pilot tells whether the policy repairs its own errors: every prefix of some wrong answers is drawn, the finding is
said and lies beside the log as `pilot-*.json`, and the scheme that it names goes on with the draws of the pilot among its own.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from typing import Any, Literal

import pyarrow as pa

from rayward import dataflow, places
from rayward.config import choose, parse_settings, resolve
from rayward.dataflow import Made, Recipe
from rayward.dataflow.engine import run, session
from rayward.dataflow.recipe import announce
from rayward.grading import Verdict, check_gold, grader_version, make_grader, verdict
from rayward.labels.judgements import CONTINUATION, reject
from rayward.places import Place, at
from rayward.policies import POLICIES, TOGETHER, Policy, drawn_by, gpus_of, make_policy
from rayward.policies.asking import Asker, Budget, Question, Reply, VerdictLog
from rayward.progress import Progress
from rayward.records import BadRecord, Example, Rejected, Rollout, examples_table, prompt_id, rejects_table, rollouts_of
from rayward.schemes import (
    SCHEMES,
    AutoSettings,
    Decision,
    ExhaustiveSettings,
    Finding,
    FreeRules,
    Rounds,
    Scheme,
    Solution,
    State,
    fresh,
    make_scheme,
    measure,
    pilot,
)
from rayward.schemes import Budget as DrawBudget
from rayward.steps import is_terminal
from rayward.storage import Dataset, open_dataset, opened, sibling

VERDICTS = ("right", "wrong", "unparsed", "timeouts", "truncated", "failed")
DIGITS = 9  # of an estimate that are kept: the last bits depend on what is computed beside it
GOLD = ("gold", "reference")  # where provenance may hold the gold answer
CHARACTERS = 4  # of a token, about
AUTO = "auto"  # the scheme that a pilot chooses
LOOK_AT, LOOK_IN = 20_000, 16  # rollouts that a pilot is chosen from, and parts of the source that they are read from


@dataclass(frozen=True)
class StepSampling:
    """How step values are found by drawing."""

    policy: str = ""  # who continues the prefixes: toy, server, transformers, vllm or module:maker; empty: nobody, continuations in
    # the source are counted
    policy_settings: str = "{}"  # JSON of the policy's own settings
    scheme: str = "skew"  # which prefix is drawn next: exhaustive, scan, bisect, skew, certified, posterior; auto: a pilot on up to 100
    # wrong answers finds whether the policy repairs its errors, and chooses skew or posterior
    scheme_settings: str = "{}"  # JSON of the scheme's own settings
    want: Literal["hard", "soft"] = "hard"  # hard: is a prefix still good; soft: P(final answer right), by exhaustive, posterior or auto
    grader: str = "numeric"  # how a final answer is held against the gold one (grading.GRADERS)
    min_pass_rate: float = 0.0  # problems whose other answers end right less often are skipped: their steps cost most and tell least
    max_pass_rate: float = 1.0  # problems whose other answers end right more often are skipped
    max_unknown: int = 16  # draws of one prefix that cannot be graded after which its solution has no label
    most_per_solution: int = 0  # completions of one solution, beyond which it has no label (0: no limit)
    max_requests: int = 0  # completions of all runs with one log, a pilot's among them (0: no limit)
    max_tokens: int = 0  # tokens of all runs with one log, read and written (0: no limit)
    seed: int = 0  # another seed is another draw

    def __post_init__(self) -> None:
        if self.policy:
            choose(POLICIES, self.policy, "policy")
        if parse_settings(self.policy_settings, "policy_settings").get("temperature") == 0:
            raise ValueError("policy_settings: with temperature 0 all continuations of a prefix are one; take e.g. 0.7")
        if self.scheme == AUTO:
            self.rules()
            self.pilot()
        else:
            self.made_scheme()
        self.budgets()

    def budgets(self) -> tuple[Budget, DrawBudget]:
        """What all runs with one log may ask, and what one solution may."""
        return Budget(self.max_requests, self.max_tokens), DrawBudget(solution=self.most_per_solution)

    def rules(self) -> FreeRules:
        """What needs no completion, and what is not worth any."""
        return FreeRules(self.want, min_pass_rate=self.min_pass_rate, max_pass_rate=self.max_pass_rate, max_unknown=self.max_unknown)

    def pilot(self) -> AutoSettings:
        """The pilot of scheme=auto."""
        settings: AutoSettings = resolve(AutoSettings, parse_settings(self.scheme_settings, "scheme_settings"), "scheme_settings.")
        return settings

    def made_scheme(self) -> Scheme:
        """The scheme with its settings and the free rules around it."""
        entry = choose(SCHEMES, self.scheme, "scheme")
        settings: Any = resolve(entry.settings, parse_settings(self.scheme_settings, "scheme_settings"), "scheme_settings.")
        return make_scheme(self.scheme, settings, self.rules())

    def who(self) -> str:
        """Who draws, as logs and labels name it."""
        return drawn_by(self.policy, parse_settings(self.policy_settings, "policy_settings"))

    def asker(self, log: Place) -> Asker:
        """The policy with its log and budget."""
        return Asker(_policy(self.policy, self.policy_settings), self.who(), VerdictLog(log, hold=256), self.budgets()[0], self.seed)


@lru_cache(maxsize=1)
def _policy(name: str, settings: str) -> Policy:
    """The policy of this process: a model is loaded once, for the pilot and for what follows."""
    return make_policy(name, parse_settings(settings, "policy_settings"))


def label_steps(recipe: Recipe, source: Dataset, settings: StepSampling, log: str = "", actors: int = 1) -> Dataset:
    """Step examples of the answers of a dataset of rollouts, by drawing."""
    folder = (at(log) if log else sibling(at(recipe.output), "verdicts")).absolute()
    name = at(recipe.output).name
    if recipe.already_made():
        made = announce(open_dataset(recipe.output, "examples"))
    else:
        try:
            with session(recipe.engine, source.bytes):
                finding = find_out(recipe, source, settings, folder) if settings.scheme == AUTO else None
                make = partial(_PartLabeler, settings, finding, str(folder), name)
                [made] = dataflow.transform(
                    recipe, source, make, kind="examples", actors=actors, gpus=gpus_of(settings.policy, recipe.gpus)
                )
        finally:
            _policy.cache_clear()
    spent, counts = VerdictLog(folder).spent(), Counter[str]()
    tallies = folder / "tally" / name
    for tally in places.read_many(tallies, [n for n in places.listing(tallies) if n.endswith(".json")]).values():
        counts += Counter(json.loads(tally))
    said = ", ".join(f"{name} {n:,}" for name, n in counts.items() if name != "abstained")
    print(f"{folder}: {spent.requests:,} completions and {spent.tokens:,} tokens paid so far, pilots among them", file=sys.stderr)
    print(f"verdicts: {said or 'none'} (a draw that answers share counts for each)", file=sys.stderr)
    print(f"{counts['abstained']:,} answers abstained", file=sys.stderr)
    return made


# -------------------------------------------------------------------------------------------------------------------- the pilot


def find_out(recipe: Recipe, source: Dataset, settings: StepSampling, log: Place) -> Finding:
    """What a pilot says of the policy, in words on stderr: from beside the log, where an earlier run left it, or drawn now."""
    told = {**asdict(settings.rules()), **asdict(settings.pilot())}
    told |= {name: getattr(settings, name) for name in ("grader", "most_per_solution", "seed")}
    about = {"source": source.manifest.digest, "policy": settings.who(), **told}
    path = log / f"pilot-{hashlib.blake2b(json.dumps(about, sort_keys=True).encode(), digest_size=6).hexdigest()}.json"
    if path.is_file():
        found = json.loads(places.read(path))
    else:
        parts = source.parts
        few = [parts[n * len(parts) // LOOK_IN] for n in range(LOOK_IN)] if len(parts) > LOOK_IN else parts
        task = {"files": [str(file.absolute()) for file in few], "rows": source.manifest.out}
        [found] = run(
            [task],
            partial(_Pilot, settings, str(log)),
            what="pilot",
            unit="pilots",
            actors=1,
            gpus=gpus_of(settings.policy, recipe.gpus),
            **recipe.how(source.bytes),
        )
        places.write(path, json.dumps({**found, "about": about}, indent=2) + "\n")
    print(f"{path}: {found['finding']['says']}; {found['completions']:,} completions", file=sys.stderr)
    return Finding(**found["finding"])


class _Pilot:
    """Draws every prefix of some wrong answers, and measures."""

    def __init__(self, settings: StepSampling, log: str):
        self.settings = settings
        make_grader(settings.grader)
        self.asker = settings.asker(at(log))

    def __call__(self, task: Mapping[str, Any]) -> dict[str, Any]:
        rollouts = _first_rows(task["files"], LOOK_AT)
        answers, solutions, chosen = self._choose(rollouts, task["rows"])
        settings, (_, budget) = self.settings, self.settings.budgets()
        every = make_scheme("exhaustive", ExhaustiveSettings(settings.pilot().n), settings.rules())
        drawn = draw([answers[i] for i in chosen], every, self.asker, settings.grader, budget, [solutions[i] for i in chosen], "pilot")
        self.asker.log.flush()
        states = [tally.state(solutions[i]) for i, tally in zip(chosen, drawn.tallies, strict=True)]
        finding = measure(states, settings.want, settings.pilot())
        return {"finding": asdict(finding), "completions": drawn.completions, "looked_at": len(rollouts)}

    def _choose(self, rollouts: Sequence[Rollout], rows: int) -> tuple[list[Rollout], list[Solution], list[int]]:
        """Answers that can be labelled, what the schemes are told of them, and which of them are the pilot: some that end wrong."""
        rules, auto, most = self.settings.rules(), self.settings.pilot(), self.settings.most_per_solution
        answers = [rollout for rollout in rollouts if not unfit(rollout)]
        solutions = solutions_of(answers)
        may = [
            i for i, s in enumerate(solutions) if rules.known(fresh(s)) is None and not (most and auto.n * (s.steps - 1) > most)
        ]  # fmt: skip
        wrong = sum(solutions[i].outcome is False for i in may) * rows / max(1, len(rollouts))
        size = auto.size(wrong)
        return answers, solutions, [may[n] for n in pilot([solutions[i] for i in may], replace(auto, pilot=size))] if size else []


def _first_rows(files: Sequence[str], rows: int) -> list[Rollout]:
    """So many rollouts, as many from the head of each file; parts are sorted by hash, so these are some by chance."""
    found: list[Rollout] = []
    for file in files:
        with opened(file) as part:
            batch = next(part.iter_batches(batch_size=max(1, rows // len(files))), None)
            if batch is not None:
                found += rollouts_of(pa.Table.from_batches([batch]))
    return found


# -------------------------------------------------------------------------------------------------------------------- the parts


class _PartLabeler:
    """Makes the policy once, labels part after part."""

    def __init__(self, settings: StepSampling, finding: Finding | None, log: str, name: str):
        if finding is not None:
            settings = replace(settings, scheme=finding.scheme, scheme_settings=json.dumps(finding.settings))
        self.settings, self.finding, self.name = settings, finding, name
        make_grader(settings.grader)  # what it needs must be here before anything is drawn
        self.scheme = settings.made_scheme()
        self.budget = settings.budgets()[1]
        self.asker = settings.asker(at(log))

    def __call__(self, table: pa.Table) -> Made:
        rollouts = rollouts_of(table)
        answers: list[Rollout] = []
        rejects: list[Rejected] = []
        for rollout in rollouts:
            reason = unfit(rollout)
            if reason:
                rejects.append(reject(rollout, reason))
            else:
                answers.append(rollout)
        drawn = draw(answers, self.scheme, self.asker, self.settings.grader, self.budget)
        self.asker.log.flush()
        self.asker.log.forget()
        self._keep_tally(table, drawn)
        examples = []
        for answer, decision, tally in zip(answers, drawn.decisions, drawn.tallies, strict=True):
            made = self._example(answer, decision, tally)
            if isinstance(made, Rejected):
                rejects.append(made)
            else:
                examples.append(made)
        return Made({"": examples_table(examples)}, rejects_table(rejects), len(examples))

    def _keep_tally(self, table: pa.Table, drawn: Drawn) -> None:
        """What the verdicts of a part were, beside the log: a part that is done again writes the same file again."""
        if table.num_rows:
            folder = self.asker.log.folder / "tally" / self.name
            counts = {name: sum(sum(getattr(t, name)) for t in drawn.tallies) for name in VERDICTS}
            counts["abstained"] = sum(bool(d.abstained) for d in drawn.decisions)
            places.write(folder / f"{table['prompt_id'][0].as_py()[:16]}.json", json.dumps(counts))

    def _example(self, answer: Rollout, decision: Decision, tally: Tally) -> Example | Rejected:
        values = list(decision.hard if self.settings.want == "hard" else decision.soft)
        if decision.abstained or all(value is None for value in values):
            why = f"; the last failure: {tally.failure}" if tally.failure else ""
            return reject(answer, f"abstained: {decision.abstained or 'nothing is known of its steps'}{why}")
        stated = [float(bool(answer.correct))] * (len(answer.steps) - len(values))  # after the answer is stated nothing is drawn
        values = [*(None if value is None else round(value, DIGITS) for value in values), *stated]
        open_steps = len(decision.hard)
        behind = (*(max(1, n) for n in tally.graded[1:open_steps]), 1, *(1 for _ in stated))  # what a rule decides has one reason behind it
        return Example(
            id=f"steps@{answer.id}",
            prompt=answer.prompt,
            answers=(answer.steps,),
            targets=tuple(0.0 if value is None else float(value) for value in values),
            counts=tuple(0 if value is None else n for value, n in zip(values, behind, strict=True)),
            rollouts=(answer.id,),
            provenance={**self._told(decision, tally), "first_error": str(decision.first_error)},
        )

    def _told(self, decision: Decision, tally: Tally) -> dict[str, str]:
        """What stands behind a label: how it was found, with which verdicts, and what it cost."""
        numbers = {
            **{name: _rounded(getattr(decision, name), len(tally.right)) for name in ("hard", "soft", "sd")},
            "confidence": None if decision.confidence is None else round(decision.confidence, DIGITS),
            **{name: getattr(tally, name) for name in (*VERDICTS, "distinct")},
            "generated_tokens": tally.generated_tokens,
            "prompt_tokens": tally.prompt_tokens,
        }
        said = {name: json.dumps(value) for name, value in numbers.items()}
        said |= {"estimate": self.settings.scheme, "policy": self.asker.who, "verifier": grader_version(self.settings.grader)}
        return said if self.finding is None else {**said, "pilot": self.finding.short}


def unfit(rollout: Rollout) -> str:
    """Why a rollout cannot be labelled, or nothing."""
    if rollout.continues is not None:
        return CONTINUATION.format(rollout.continues)
    if rollout.correct is None:
        return "no outcome"
    try:
        check_gold(gold_of(rollout))
    except BadRecord as error:
        return str(error)
    return ""


def _rounded(values: Sequence[float | None], steps: int) -> list[float | None]:
    """Estimates of the first steps without their last bits, and nothing for those after the answer was stated."""
    return [*(None if value is None else round(value, DIGITS) for value in values), *(None for _ in range(steps - len(values)))]


@dataclass
class Tally:
    """What was drawn of one solution, by kept steps t = 0..T-1, and what it cost."""

    right: list[int]
    wrong: list[int]
    unparsed: list[int]  # whole, and it states no answer that can be read
    timeouts: list[int]  # whole, and the verifier did not come to an end
    truncated: list[int]  # cut off, so its outcome is unknown
    failed: list[int]  # never written: the policy failed
    texts: list[set[int]]  # hashes of what was written
    failure: str = ""  # the last one, in the policy's words
    generated_tokens: int = 0
    prompt_tokens: int = 0

    @classmethod
    def of(cls, steps: int) -> Tally:
        """Nothing drawn yet of a solution of so many steps."""
        return cls(*([0] * steps for _ in VERDICTS), texts=[set() for _ in range(steps)])  # type: ignore[arg-type,misc]

    @property
    def distinct(self) -> list[int]:
        """Different texts among what was written: where there are fewer than draws, the policy repeats itself, and they tell less."""
        return [len(texts) for texts in self.texts]

    @property
    def graded(self) -> list[int]:
        """Verdicts that are known."""
        return [r + w for r, w in zip(self.right, self.wrong, strict=True)]

    def state(self, of: Solution) -> State:
        """The counts as the schemes have them: of the steps before the answer is stated."""
        unknown = [sum(n) for n in zip(self.unparsed, self.timeouts, self.truncated, self.failed, strict=True)]
        return State(of, *(tuple(n[: of.steps]) for n in (self.right, self.wrong, unknown)))


@dataclass(frozen=True)
class Drawn:
    """What became of some answers."""

    decisions: list[Decision]
    tallies: list[Tally]
    completions: int  # handed out, those that the log knew among them
    asked: int  # of these, by the policy in this run


def gold_of(rollout: Rollout) -> str:
    """The gold answer of its problem, or BadRecord."""
    for name in GOLD:
        if name in rollout.provenance:
            return rollout.provenance[name]
    raise BadRecord("no gold answer: its provenance has none, and continuations cannot be graded")


def solutions_of(answers: Sequence[Rollout]) -> list[Solution]:
    """What the schemes are told of answers: outcome, cost of a continuation, and how the other answers to the same problem ended.

    A prefix that states the final answer is the end of its solution: continuations could only copy it.
    """
    right, count = Counter[str](), Counter[str]()
    names = [prompt_id(a.prompt) for a in answers]
    for answer, name in zip(answers, names, strict=True):
        right[name] += bool(answer.correct)
        count[name] += 1
    made = []
    for answer, name in zip(answers, names, strict=True):
        open_steps = next((t for t in range(1, len(answer.steps)) if is_terminal(answer.steps[:t])), len(answer.steps))
        left = [max(1.0, sum(map(len, answer.steps[t:open_steps])) / CHARACTERS) for t in range(open_steps)]
        others = right[name] - bool(answer.correct)
        made.append(Solution(open_steps, answer.correct, tuple(left), others, count[name] - 1, name))
    return made


def capacity(policy: Policy) -> int:
    """Requests that a policy works on at once; 0 where it does not say.

    >>> from rayward.policies import ToyPolicy
    >>> capacity(ToyPolicy())
    256
    """
    return int(getattr(policy, "capacity", 0 if hasattr(policy, "stream") else TOGETHER))


def draw(
    answers: Sequence[Rollout],
    scheme: Scheme,
    asker: Asker,
    grader: str,
    budget: DrawBudget,
    solutions: Sequence[Solution] | None = None,
    what: str = "draw",
) -> Drawn:
    """Draw, grade and decide until every answer is decided.

    Args:
        answers: what is to be labelled.
        scheme: decides.
        asker: draws, or knows.
        grader: name in grading.GRADERS.
        budget: most completions.
        solutions: what the scheme is told of the answers; None: what they say of each other (`solutions_of`).
        what: what the progress bar calls it. Behind it stand completions, tokens spent by this run, requests in flight of those that
            the policy works on at once, and unknown verdicts.
    """
    rounds = Rounds(solutions_of(answers) if solutions is None else solutions, scheme, budget)
    tallies = [Tally.of(len(a.steps)) for a in answers]
    golds = [gold_of(a) for a in answers]
    asked = flying = 0

    def told(n: int, question: Question, reply: Reply) -> None:
        kept, tally = len(question.kept), tallies[n]
        said = Verdict(None, why="truncated")
        if reply.finish_reason == "stop":
            said = verdict("".join(question.kept) + reply.text, golds[n], grader)
        which = {True: tally.right, False: tally.wrong, None: tally.timeouts if said.why == "timeout" else tally.unparsed}[said.right]
        if reply.finish_reason != "stop":
            which = tally.failed if reply.finish_reason == "error" else tally.truncated
            tally.failure = reply.error or tally.failure
        if reply.finish_reason != "error":
            tally.texts[kept].add(hash(reply.text))
        which[kept] += 1
        tally.generated_tokens += reply.generated_tokens
        tally.prompt_tokens += reply.prompt_tokens
        rounds.tell(n, kept, question.sample, [said.right])

    def questions() -> Iterator[Question | None]:
        nonlocal asked, flying
        while True:
            draws = rounds.asks(room=256)
            if not draws:
                if not flying:
                    return
                yield None  # nothing to draw before another verdict is in
                continue
            for todo in draws:
                for k in todo.numbers:
                    question = _question(answers[todo.solution], todo.solution, todo.kept, k)
                    reply = asker.known(question)
                    if reply is not None:
                        told(todo.solution, question, reply)
                        continue
                    asked, flying = asked + 1, flying + 1
                    yield question

    room, tokens, last = capacity(asker.policy), 0, None
    with Progress(what, total=len(answers), unit="solutions") as bar:
        for question, reply in asker.flow(questions()):
            flying -= 1
            tokens += 0 if reply is last else reply.generated_tokens + reply.prompt_tokens  # one draw may be told to several answers
            last = reply
            told(int(question.about["solution"]), question, reply)
            counters = rounds.counters
            words = {"completions": f"{counters.completions:,}", "tokens": f"{tokens:,}", "in flight": str(flying)}
            words["in flight"] += f"/{room}" if room else ""
            bar.advance(counters.decided - bar.done, **words, unknown=f"{counters.unknown:,}")
        bar.advance(rounds.counters.decided - bar.done)
    decisions = [decision for decision in rounds.decisions if decision is not None]
    assert len(decisions) == len(answers), f"{len(answers) - len(decisions)} answers are undecided, and nothing is left to draw"
    return Drawn(decisions, tallies, rounds.counters.completions, asked)


def _question(answer: Rollout, number: int, kept: int, k: int) -> Question:
    about: Mapping[str, Any] = {"rollout": answer.id, "kept": kept, "solution": number}
    return Question(prompt_id(answer.prompt), answer.prompt, k, about, answer.steps[:kept])
