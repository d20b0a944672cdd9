"""Labels by drawing: the truth of a known world comes out, every completion is accounted for, and no way of running changes a label."""

from __future__ import annotations

import importlib
import itertools
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from chat_server import Body, ChatServer, chance
from driving import Said, done, here
from rayward.montecarlo import VERDICTS, Drawn, StepSampling, draw, solutions_of
from rayward.policies import Completion, Request, ToyPolicy
from rayward.policies.asking import Asker, Budget, Spent, VerdictLog
from rayward.records import Example, Message, Rollout, examples_of, rollouts_table
from rayward.sampling import SampleSettings, sample_problems, toy_problem
from rayward.schemes import Budget as DrawBudget
from rayward.schemes import CertifiedSettings, Solution
from rayward.schemes.search import splits
from rayward.storage import Dataset, open_dataset
from rayward.toy_world import ToyWorld, seed_of
from tiny import on_disk

# ------------------------------------------------------------------------------------------------------------------ a policy

LOST = 0.06  # share of completions that are cut off, and as many that state no answer
DRAWN: list[Request] = []  # what the policies of this process were asked for
FAULT: dict[str, Any] = {}  # `at`: the number of the draw that raises `error`
USUAL = ToyWorld()


class Solver:
    """The toy solver. It keeps `concurrency` draws in the air and hands them over in an order by chance (`retries` seeds it), or
    (`device="call"`) is a plain callable. Some of its draws are cut off, some end without an answer."""

    def __init__(self, lost: float = 0.0, slip: float = 0.12, concurrency: int = 8, retries: int = 0, device: str = "stream"):
        self.lost, self.most, self.order = lost, concurrency, random.Random(retries)
        self.toy = ToyPolicy(ToyWorld(slip=slip))
        if device == "stream":
            self.stream = self.in_any_order

    def __call__(self, requests: Sequence[Request]) -> list[Completion]:
        return [self.one(request) for request in requests]

    def in_any_order(self, requests: Iterable[Request | None]) -> Iterator[tuple[int, Completion]]:
        todo = enumerate(requests)
        air: list[tuple[int, Request]] = []
        while True:
            while len(air) < self.most and (item := next(todo, None)) is not None:
                place, request = item
                if request is None:
                    break
                air.append((place, request))
            if not air:
                return
            place, request = air.pop(self.order.randrange(len(air)))
            yield place, self.one(request)

    def one(self, request: Request) -> Completion:
        if FAULT and len(DRAWN) == FAULT["at"]:
            raise FAULT["error"]
        DRAWN.append(request)
        [made] = self.toy([request])
        fate = chance("fate", request.seed)
        if fate < self.lost:
            return Completion(made.steps[:-1], "length", made.generated_tokens, made.prompt_tokens)
        if fate < 2 * self.lost:
            return Completion((*made.steps[:-1], "Who knows?"), "stop", made.generated_tokens, made.prompt_tokens)
        return made


SOLVER = f"{__name__}:Solver"


@pytest.fixture(autouse=True)
def nothing_drawn() -> Iterator[None]:
    DRAWN.clear()
    FAULT.clear()
    yield
    FAULT.clear()


# ------------------------------------------------------------------------------------------------------------- what is labelled


KINDS = [("hard", "skew"), ("soft", "exhaustive"), ("soft", "posterior")]


def answers(problems: int, each: int, world: ToyWorld = USUAL, seed: int = 0) -> list[Rollout]:
    """Answers to problems of the toy world by its solver."""
    posed = [toy_problem(n, world, seed) for n in range(problems)]
    made = sample_problems(posed, ToyPolicy(world), SampleSettings(answers=each))
    return [rollout for rollouts in made.rollouts for rollout in rollouts]


def dataset(rollouts: Sequence[Rollout], folder: Path, parts: int = 1) -> Path:
    """A folder of rollouts."""
    return on_disk("rollouts", rollouts_table(rollouts), folder, parts).path


def label(folder: Path, output: str, *sets: str, source: str = "rollouts", policy: str = SOLVER, engine: str = "local", **how: Any) -> Said:
    """The pipeline, as its user runs it."""
    settings = {"lost": LOST, **how} if policy == SOLVER else how
    drawn_by = [f"sampling.policy={policy}", *(["sampling.policy_settings=" + json.dumps(settings)] if settings else [])]
    words: list[str | Path] = ["--source", folder / source, "--output", folder / output, "--engine", engine]
    return here("label_steps", *words, *[word for one in (*drawn_by, *sets) for word in ("--set", one)])


def made(folder: Path, output: str) -> Dataset:
    return open_dataset(folder / output, "examples")


def examples(folder: Path, output: str) -> list[Example]:
    return examples_of(made(folder, output).table())


def digest(folder: Path, output: str) -> str:
    return made(folder, output).manifest.digest


def log_of(folder: Path, output: str) -> list[dict[str, Any]]:
    """Every line of a verdict log that is whole."""
    lines = []
    for path in sorted((folder / f".{output}.verdicts").glob("??.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:
                continue
    return lines


def keys_of(folder: Path, output: str) -> list[str]:
    return [line["key"] for line in log_of(folder, output)]


def drawn_now(rollouts: Sequence[Rollout], settings: StepSampling, folder: Path, policy: Any = None) -> Drawn:
    """The loop itself."""
    asker = Asker(policy or ToyPolicy(), "solver", VerdictLog(folder, hold=256), Budget(), settings.seed)
    return draw(rollouts, settings.made_scheme(), asker, settings.grader, DrawBudget(settings.most_per_solution))


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> list[Rollout]:
    """Answers of which many share their first steps."""
    return answers(12, 4)


@pytest.fixture
def folder(tmp_path: Path, shared: list[Rollout]) -> Path:
    dataset(shared, tmp_path / "rollouts", parts=4)
    return tmp_path


# ------------------------------------------------------------------------------------------------------------------- the truth


def truth(rollout: Rollout, world: ToyWorld = USUAL) -> list[float]:
    """V_0 .. V_T of an answer, in closed form."""
    numbers = world.numbers(rollout.prompt[0].content)
    return [world.value(numbers, rollout.steps[:t]) for t in range(len(rollout.steps) + 1)]


def within(observed: float, expected: float, variance: float, sigmas: float = 4.0) -> None:
    assert abs(observed - expected) <= sigmas * math.sqrt(variance), (observed, expected, math.sqrt(variance))


@pytest.mark.parametrize(("repair", "lost"), [(0.0, 0.0), (0.2, 0.1)])
def test_soft_labels_are_unbiased_and_as_noisy_as_they_should_be(repair: float, lost: float, tmp_path: Path) -> None:
    world, n = ToyWorld(slip=0.2, repair=repair), 8
    rollouts = answers(110, 1, world)
    solver = Solver(lost=lost)
    solver.toy = ToyPolicy(world)
    settings = StepSampling(policy="toy", scheme="exhaustive", scheme_settings=json.dumps({"n": n}), want="soft")
    off = spread = variance = 0.0
    places = 0
    for rollout, decision in zip(rollouts, drawn_now(rollouts, settings, tmp_path, solver).decisions, strict=True):
        for estimate, value in zip(decision.soft[:-1], truth(rollout, world)[1:-1], strict=True):
            assert estimate is not None
            off += estimate - value
            variance += value * (1 - value) / n
            if 0 < value < 1:
                places += 1
                spread += (estimate - value) ** 2 / (value * (1 - value) / n)
        assert decision.soft[-1] == float(rollout.correct is True)
    within(off, 0.0, variance)
    within(spread, places, places * 6)  # a share of few draws with a rare success has heavier tails than a normal one


def split_of(scheme: str, of: Solution, k: int) -> Callable[[int, int], int]:
    """Where a search looks next between a good prefix and a bad one."""
    if scheme in ("scan", "exhaustive"):
        return lambda lo, hi: lo + 1
    if scheme == "bisect":
        return lambda lo, hi: (lo + hi) // 2
    return lambda lo, hi: int(splits((1.0,) * of.steps, k, of.root_right, of.root_count)[lo, hi])


def chance_of(first_bad: int, values: Sequence[float], k: int, split: Callable[[int, int], int]) -> float:
    """P(the search ends with this prefix), where a prefix of value v is called bad with chance (1 - v)^k."""
    lo, hi, likely = 0, len(values) - 1, 1.0
    while hi - lo > 1:
        t = split(lo, hi)
        bad = (1 - values[t]) ** k
        if t >= first_bad:
            hi, likely = t, likely * bad
        else:
            lo, likely = t, likely * (1 - bad)
    return likely if hi == first_bad else 0.0


@pytest.mark.parametrize("scheme", ["exhaustive", "scan", "bisect", "skew"])
def test_searches_find_what_the_known_values_say_they_find(scheme: str, tmp_path: Path) -> None:
    """Every place of the first error comes out as often as the closed form says, over wrong answers to many problems."""
    k, world = 4, ToyWorld(slip=0.25)
    rollouts = [r for r in answers(300, 1, world) if not r.correct]
    name = {"exhaustive": "n", "scan": "n"}.get(scheme, "k")
    settings = StepSampling(policy="toy", scheme=scheme, scheme_settings=json.dumps({name: k}))
    found = drawn_now(rollouts, settings, tmp_path, Solver(slip=0.25)).decisions
    known = [(truth(rollout, world), split_of(scheme, of, k)) for rollout, of in zip(rollouts, solutions_of(rollouts), strict=True)]
    for place in range(7):
        expected = variance = observed = 0.0
        for (values, split), decision in zip(known, found, strict=True):
            likely = chance_of(place + 1, values, k, split) if place < len(values) - 1 else 0.0
            expected += likely
            variance += likely * (1 - likely)
            observed += decision.first_error == place
        within(observed, expected, variance + 0.25)
    for rollout, decision in zip(rollouts, found, strict=True):
        assert decision.first_error is not None
        assert decision.hard == tuple(float(i < decision.first_error) for i in range(len(rollout.steps)))


def test_certified_names_true_crossings(tmp_path: Path) -> None:
    world, level = ToyWorld(slip=0.25), CertifiedSettings(alpha=0.1)
    rollouts = [r for r in answers(200, 1, world) if not r.correct]
    settings = StepSampling(policy="toy", scheme="certified", scheme_settings='{"alpha": 0.1}')
    decisions = drawn_now(rollouts, settings, tmp_path, Solver(slip=0.25)).decisions
    wrong = decided = 0
    for rollout, of, decision in zip(rollouts, solutions_of(rollouts), decisions, strict=True):
        if decision.first_error is not None:
            (p0, p1), values, at = level.values(of), truth(rollout, world), decision.first_error
            decided += 1
            wrong += not ((at == 0 or values[at] > p0) and values[at + 1] < p1)
    assert decided > 0.8 * len(rollouts)
    assert wrong <= 0.1 * len(rollouts) + 4 * math.sqrt(0.09 * len(rollouts))


def test_the_posterior_finds_drops_of_value(tmp_path: Path) -> None:
    world = ToyWorld(slip=0.15)
    rollouts = [r for r in answers(250, 1, world) if not r.correct]
    settings = StepSampling(
        policy="toy", scheme="posterior", scheme_settings='{"q0": 0.85, "z0": 0.1}'
    )  # a slip may be lucky: losses are not total
    decisions = drawn_now(rollouts, settings, tmp_path, Solver(slip=0.15)).decisions
    right = decided = 0
    for rollout, decision in zip(rollouts, decisions, strict=True):
        if decision.first_error is not None:
            values = truth(rollout, world)
            decided += 1
            right += decision.first_error == next(t for t in range(len(rollout.steps)) if values[t + 1] < 0.5 * values[t])
    assert decided > 0.5 * len(rollouts)
    assert right >= 0.9 * decided - 4 * math.sqrt(0.09 * decided)


@pytest.mark.parametrize("scheme", ["exhaustive", "scan", "bisect", "skew", "certified", "posterior"])
def test_right_answers_cost_nothing_and_their_steps_are_good(scheme: str, tmp_path: Path) -> None:
    rollouts = [r for r in answers(20, 2) if r.correct]
    found = drawn_now(rollouts, StepSampling(policy="toy", scheme=scheme), tmp_path, Solver())
    assert not DRAWN
    assert all(set(d.hard) == {1.0} and d.first_error == -1 for d in found.decisions)


# --------------------------------------------------------------------------------------------- what comes in, what comes out


def test_every_rollout_is_used_or_rejected_with_a_reason(tmp_path: Path) -> None:
    wrong = [r for r in answers(60, 1, ToyWorld(slip=0.3)) if not r.correct and len(r.steps) > 3]
    a, b, c, d, e = wrong[:5]
    more = Rollout(id="more", prompt=a.prompt, steps=a.steps, continues=a.id, kept_steps=1, correct=False, provenance=a.provenance)
    unknown = Rollout(id="unknown", prompt=b.prompt, steps=b.steps, provenance=b.provenance)
    no_gold = Rollout(id="no gold", prompt=c.prompt, steps=c.steps, correct=False)
    empty = Rollout(id="empty", prompt=d.prompt, steps=d.steps, correct=True, provenance={"gold": "\\boxed{}"})
    reference = Rollout(id="reference", prompt=e.prompt, steps=e.steps[:1], correct=False, provenance={"reference": e.provenance["gold"]})
    dataset([*wrong, more, unknown, no_gold, empty, reference], tmp_path / "rollouts")
    done(label(tmp_path, "steps", "sampling.most_per_solution=12"))
    manifest = made(tmp_path, "steps").manifest
    assert manifest.rows_in == manifest.used + sum(manifest.rejected.values()) == len(wrong) + 5
    abstained = manifest.rejected["abstained"]
    assert dict(manifest.rejected) == {"a continuation": 1, "no outcome": 1, "no gold answer": 1, "empty": 1, "abstained": abstained}
    assert 0 < abstained < len(wrong)
    reasons = {row["row"]: row["reason"] for row in made(tmp_path, "steps").rejects().to_pylist()}
    used = {rollout for example in examples(tmp_path, "steps") for rollout in example.rollouts}
    assert used.isdisjoint(reasons)
    assert used | set(reasons) == {r.id for r in wrong} | {"more", "unknown", "no gold", "empty", "reference"}
    assert sum(reason.startswith("abstained: budget: ") for reason in reasons.values()) == abstained
    spent = Counter(line["rollout"] for line in log_of(tmp_path, "steps"))
    assert max(spent.values()) <= 12
    [short] = [example for example in examples(tmp_path, "steps") if example.rollouts == ("reference",)]
    assert (short.targets, short.counts) == ((0.0,), (1,))  # of one step: the outcome says all


@pytest.mark.parametrize(("want", "scheme"), [("hard", "skew"), ("soft", "exhaustive"), ("soft", "posterior"), ("hard", "posterior")])
def test_what_an_example_holds(want: str, scheme: str, tmp_path: Path) -> None:
    rollouts = {r.id: r for r in answers(40, 1, ToyWorld(slip=0.3))}
    dataset(list(rollouts.values()), tmp_path / "rollouts")
    done(label(tmp_path, "steps", f"sampling.want={want}", f"sampling.scheme={scheme}", slip=0.3))
    log = log_of(tmp_path, "steps")
    assert len(log) == len(DRAWN) == len({line["key"] for line in log})
    assert all(1 <= line["kept"] < len(rollouts[line["rollout"]].steps) for line in log)  # the end says itself what it is worth
    verdicts: Counter[str] = Counter()
    for example in examples(tmp_path, "steps"):
        [rollout] = [rollouts[name] for name in example.rollouts]
        said = {name: json.loads(example.provenance[name]) for name in ("hard", "soft", "sd", *VERDICTS)}
        mine = [line for line in log if line["rollout"] == rollout.id]
        assert (example.id, example.prompt, example.answers) == (f"steps@{rollout.id}", rollout.prompt, (rollout.steps,))
        assert all(len(values) == len(rollout.steps) for values in said.values())
        assert example.targets == tuple(0.0 if value is None else value for value in said[want])
        graded = [r + w for r, w in zip(said["right"], said["wrong"], strict=True)]
        for place, (value, count) in enumerate(zip(said[want], example.counts, strict=True)):
            behind = graded[place + 1] if place + 1 < len(graded) else 0
            assert count == (0 if value is None else max(1, behind))
        texts = {kept: {line["text"] for line in mine if line["kept"] == kept} for kept in range(len(rollout.steps))}
        assert json.loads(example.provenance["distinct"]) == [len(texts[kept]) for kept in range(len(rollout.steps))]
        for name in VERDICTS:
            verdicts[name] += sum(said[name])
        by_kept = Counter(line["kept"] for line in mine)
        for kept in range(len(rollout.steps)):
            assert by_kept[kept] == sum(said[name][kept] for name in VERDICTS)
            assert said["truncated"][kept] == sum(line["kept"] == kept and line["finish_reason"] == "length" for line in mine)
        assert json.loads(example.provenance["generated_tokens"]) == sum(line["generated_tokens"] for line in mine)
        assert json.loads(example.provenance["prompt_tokens"]) == sum(line["prompt_tokens"] for line in mine)
        assert json.loads(example.provenance["policy"]) == {"policy": SOLVER, "lost": LOST, "slip": 0.3}
        assert example.provenance["verifier"].startswith("numeric ")
        assert (example.provenance["estimate"], example.targets[-1]) == (scheme, float(rollout.correct is True))
    if not made(tmp_path, "steps").manifest.rejected:
        assert verdicts.total() == len(log)
    assert min(verdicts[name] for name in ("right", "wrong", "unparsed", "truncated")) > 0
    assert VerdictLog(tmp_path / ".steps.verdicts").spent() == Spent(
        len(log), sum(line["generated_tokens"] + line["prompt_tokens"] for line in log)
    )


def test_draws_that_answers_share_are_made_once(folder: Path) -> None:
    """Two answers with the same first steps have the same prefixes, and the same draws."""
    done(label(folder, "steps", "sampling.want=soft", "sampling.scheme=exhaustive"))
    assert len({(r.prompt, r.kept, r.seed) for r in DRAWN}) == len(DRAWN)
    keys = keys_of(folder, "steps")
    assert len(set(keys)) == len(keys) == VerdictLog(folder / ".steps.verdicts").spent().requests


def test_what_was_drawn_is_told_to_every_answer_that_shares_it(tmp_path: Path) -> None:
    """Labels of an answer do not depend on whether others that share its steps are labelled with it."""
    rollouts = answers(6, 4, ToyWorld(slip=0.3))
    settings = StepSampling(policy="toy", scheme="exhaustive", want="soft")
    together = drawn_now(rollouts, settings, tmp_path / "together", Solver(lost=LOST))
    for rollout, decision, tally in zip(rollouts, together.decisions, together.tallies, strict=True):
        alone = drawn_now([rollout], settings, tmp_path / f"alone {rollout.id.replace('/', '-')}", Solver(lost=LOST))
        assert (alone.decisions, alone.tallies) == ([decision], [tally])


def test_what_follows_the_stated_answer_is_never_continued(tmp_path: Path) -> None:
    """Pitfall 9: completions of a prefix that states the answer could only copy it."""
    kinds = [("hard", "bisect"), ("soft", "exhaustive")]  # neither goes by the length of what is left
    plain = [r for r in answers(60, 1, ToyWorld(slip=0.3)) if len(r.steps) == 5]
    talkative = [
        Rollout(id=f"more {r.id}", prompt=r.prompt, steps=(*r.steps[:-1], r.steps[-1] + "\n", "I am sure.\n", "Ask me more."),
                correct=r.correct, provenance=r.provenance)
        for r in plain
    ]  # fmt: skip
    for output, rollouts in (("plain", plain), ("talkative", talkative)):
        dataset(rollouts, tmp_path / output)
        for want, scheme in kinds:
            done(label(tmp_path, f"{output}-{want}-{scheme}", f"sampling.want={want}", f"sampling.scheme={scheme}", source=output))
    assert {len(r.kept) for r in DRAWN} <= {1, 2, 3, 4}
    for want, scheme in kinds:
        short, long = ({e.prompt: e for e in examples(tmp_path, f"{output}-{want}-{scheme}")} for output in ("plain", "talkative"))
        assert short.keys() == long.keys()
        for prompt, example in short.items():
            more = long[prompt]
            assert more.targets == (*example.targets, example.targets[-1], example.targets[-1])
            assert more.counts == (*example.counts, 1, 1)
            assert len({len(json.loads(more.provenance[name])) for name in ("hard", "soft", "sd", *VERDICTS)}) == 1


# -------------------------------------------------------------------------------------------- stopped, and gone on with


@pytest.mark.parametrize(("want", "scheme"), KINDS)
@pytest.mark.parametrize(
    ("at", "error"), [(0, RuntimeError("gone")), (1, KeyboardInterrupt()), (41, RuntimeError("gone")), (60, KeyboardInterrupt())]
)
def test_a_run_that_was_stopped_ends_as_if_it_had_not_been(folder: Path, want: str, scheme: str, error: BaseException, at: int) -> None:
    sets = (f"sampling.want={want}", f"sampling.scheme={scheme}")
    done(label(folder, "whole", *sets))
    uninterrupted = len(DRAWN)
    DRAWN.clear()
    FAULT.update(at=at, error=error)
    stopped = label(folder, "steps", *sets)
    assert stopped.code != 0
    assert len(DRAWN) == at == len(log_of(folder, "steps"))
    FAULT.clear()
    done(label(folder, "steps", *sets))
    assert digest(folder, "steps") == digest(folder, "whole")
    assert len(DRAWN) == uninterrupted
    assert len(set(keys_of(folder, "steps"))) == len(keys_of(folder, "steps")) == uninterrupted


def test_a_plain_callable_that_fails_late_goes_on(folder: Path) -> None:
    sets = ("sampling.want=soft", "sampling.scheme=exhaustive")
    done(label(folder, "whole", *sets))
    uninterrupted = len(DRAWN)
    DRAWN.clear()
    FAULT.update(at=uninterrupted - 1, error=RuntimeError("the engine is gone"))
    assert label(folder, "steps", *sets, device="call").code != 0
    kept = len(log_of(folder, "steps"))
    assert kept > uninterrupted / 2  # what was asked in one go is lost, and no more
    FAULT.clear()
    DRAWN.clear()
    done(label(folder, "steps", *sets, device="call"))
    assert len(DRAWN) == uninterrupted - kept
    assert digest(folder, "steps") == digest(folder, "whole")


SLOW = """
import time
from rayward.policies import ToyPolicy

class Slow:
    def __init__(self, timeout_s=0.0):
        self.toy, self.wait_s = ToyPolicy(), timeout_s

    def __call__(self, requests):
        return [done for _, done in self.stream(iter(requests))]

    def stream(self, requests):
        for place, request in enumerate(requests):
            if request is not None:
                time.sleep(self.wait_s)
                yield place, self.toy([request])[0]
"""


def killed_at(words: Sequence[str], folder: Path, output: str, lines: int, env: dict[str, str]) -> None:
    """Run a command, and kill it as soon as its log has so many lines."""
    with open(folder / "said.txt", "w", encoding="utf-8") as said:
        process = subprocess.Popen(words, stdout=said, stderr=said, env=env, start_new_session=True)
    try:
        while process.poll() is None and len(log_of(folder, output)) < lines:
            time.sleep(0.01)
    finally:
        process.kill()
        code = process.wait()
    assert code == -signal.SIGKILL, (folder / "said.txt").read_text()
    assert not (folder / output).exists()


def kill_and_finish(folder: Path, monkeypatch: pytest.MonkeyPatch, kill_at: Sequence[int]) -> None:
    code = folder / "code"
    code.mkdir()
    (code / "slow_solver.py").write_text(SLOW, encoding="utf-8")
    monkeypatch.syspath_prepend(str(code))
    importlib.invalidate_caches()
    sets = ("sampling.want=soft", "sampling.scheme=exhaustive")
    policy: dict[str, Any] = {"policy": "slow_solver:Slow"}
    done(label(folder, "whole", *sets, **policy))
    words = ["--source", folder / "rollouts", "--output", folder / "steps", "--engine", "local"]
    all_sets = ["sampling.policy=slow_solver:Slow", 'sampling.policy_settings={"timeout_s": 0.002}', *sets]
    words += [word for one in all_sets for word in ("--set", one)]
    env = {**os.environ, "PYTHONPATH": str(code), "OMP_NUM_THREADS": "1", "RAYWARD_PROGRESS": "log"}
    for lines in kill_at:
        killed_at([sys.executable, "-m", "rayward.cli", "run", "label_steps", *map(str, words)], folder, "steps", lines, env)
    done(label(folder, "steps", *sets, timeout_s=0.0, **policy))
    assert digest(folder, "steps") == digest(folder, "whole")
    keys, whole = keys_of(folder, "steps"), keys_of(folder, "whole")
    assert len(set(keys)) == len(keys)
    assert set(keys) == set(whole)
    spent = [VerdictLog(folder / f".{name}.verdicts").spent().requests for name in ("steps", "whole")]
    assert spent[1] <= spent[0] <= spent[1] + len(kill_at)  # one was in the air at every kill


def test_a_killed_process_is_gone_on_with(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kill_and_finish(folder, monkeypatch, [150])


@pytest.mark.slow
def test_a_process_killed_again_and_again_is_gone_on_with(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kill_and_finish(folder, monkeypatch, [1, 60, 200, 420])


def test_a_torn_line_is_drawn_again(folder: Path) -> None:
    done(label(folder, "whole"))
    DRAWN.clear()
    log = folder / ".whole.verdicts"
    torn = max(log.glob("??.jsonl"), key=lambda path: path.stat().st_size)
    torn.write_bytes(torn.read_bytes()[:-30])
    done(label(folder, "steps", source="rollouts", policy=SOLVER))
    DRAWN.clear()
    said = here(
        "label_steps", "--source", folder / "rollouts", "--output", folder / "again", "--log", log, "--engine", "local",
        "--set", f"sampling.policy={SOLVER}", "--set", "sampling.policy_settings=" + json.dumps({"lost": LOST}),
    )  # fmt: skip
    done(said)
    assert len(DRAWN) == 1
    assert digest(folder, "again") == digest(folder, "whole") == digest(folder, "steps")


def test_another_seed_scheme_or_output_shares_a_log_and_no_labels_by_chance(folder: Path) -> None:
    done(label(folder, "whole"))
    first = len(DRAWN)
    log = f"log={folder / '.whole.verdicts'}"
    done(label(folder, "same", log))
    assert len(DRAWN) == first
    done(label(folder, "other", log, "sampling.seed=1"))
    assert not {r.seed for r in DRAWN[:first]} & {r.seed for r in DRAWN[first:]}
    assert digest(folder, "same") == digest(folder, "whole")


# ------------------------------------------------------------------------------------------------------------- in any order

WAYS: list[dict[str, Any]] = [
    {"concurrency": 1},
    {"concurrency": 3, "retries": 1},
    {"concurrency": 200, "retries": 2},
    {"device": "call"},
]


@pytest.mark.parametrize(("want", "scheme"), [*KINDS, ("hard", "posterior"), ("hard", "scan"), ("hard", "certified")])
def test_no_order_of_completions_changes_a_label(tmp_path: Path, shared: list[Rollout], want: str, scheme: str) -> None:
    sets = (f"sampling.want={want}", f"sampling.scheme={scheme}")
    digests, drawn = set(), set()
    for number, (parts, how) in enumerate(itertools.zip_longest([1, 2, 8, 1], WAYS)):
        dataset(shared, tmp_path / f"rollouts-{number}", parts)
        DRAWN.clear()
        done(label(tmp_path, f"steps-{number}", *sets, source=f"rollouts-{number}", **how))
        digests.add(digest(tmp_path, f"steps-{number}"))
        drawn.add(len(DRAWN))
    assert len(digests) == 1
    assert len(drawn) == 1


@pytest.mark.usefixtures("ray_cluster")
def test_ray_makes_the_same(folder: Path) -> None:
    sets = ("sampling.scheme=skew", "actors=2")
    done(label(folder, "here", *sets, policy="toy"))
    done(label(folder, "ray", *sets, policy="toy", engine="ray"))
    assert digest(folder, "ray") == digest(folder, "here")
    assert sorted(keys_of(folder, "ray")) == sorted(keys_of(folder, "here"))


# -------------------------------------------------------------------------------------------------------- behind a server


def solve(body: Body) -> str | Body:
    """The toy solver as a server has it; some completions are cut off, some empty, by their seed."""
    question, kept = body["messages"][0]["content"], ()
    if body["messages"][-1]["role"] == "assistant":
        assert body["continue_final_message"]
        kept = tuple(body["messages"][-1]["content"].splitlines(keepends=True))
    steps = ToyWorld().continue_steps(ToyWorld.numbers(question), kept, body["seed"])
    fate = chance("server", body["seed"])
    if fate < 0.05:
        return {"message": {"role": "assistant", "content": "".join(steps[:-1])}, "finish_reason": "length"}
    if fate < 0.1:
        return {"message": {"role": "assistant", "content": None if fate < 0.07 else ""}, "finish_reason": "stop"}
    return "".join(steps)


def served(folder: Path, output: str, server: ChatServer, *sets: str, **how: Any) -> Said:
    settings = {"base_url": server.url, "model": "m", "backoff_s": 0.001, "timeout_s": 20, "concurrency": 4, **how}
    return label(folder, output, *sets, policy="server", **settings)


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with ChatServer(solve) as running:
        yield running


def counted(folder: Path, output: str, name: str) -> int:
    return sum(sum(json.loads(example.provenance[name])) for example in examples(folder, output))


@pytest.mark.parametrize(
    "faults",
    [["429", "500", "close", "503", "invalid", "empty", "list", "null", "408", "429 bare"], ["", "", "hang", "500", "500"]],
    ids=["all", "hung"],
)
def test_what_a_server_does_wrong_changes_no_label(folder: Path, server: ChatServer, faults: list[str]) -> None:
    done(served(folder, "calm", server))
    calm = server.served
    assert server.asked == calm == len(log_of(folder, "calm"))
    server.faults = [""] * calm + faults
    timeout = {"timeout_s": 0.5} if "hang" in faults else {}
    done(served(folder, "steps", server, retries=20, **timeout))  # on a busy machine one request may meet all of the faults
    assert server.asked == 2 * calm + sum(map(bool, faults))  # each was asked again, once
    assert digest(folder, "steps") == digest(folder, "calm")
    assert counted(folder, "steps", "truncated") >= sum(line["finish_reason"] == "length" for line in log_of(folder, "steps")) > 0
    assert (
        counted(folder, "steps", "unparsed")
        >= sum(line["finish_reason"] == "stop" and not line["text"] for line in log_of(folder, "steps"))
        > 0
    )
    assert counted(folder, "steps", "failed") == 0


def test_a_request_that_the_server_refuses_is_unknown_and_the_rest_goes_on(folder: Path, server: ChatServer) -> None:
    """One draw of a wrong answer is refused: another is made in its place, and the job ends."""
    done(served(folder, "calm", server))
    refused = server.bodies[len(server.bodies) // 2]
    server.faults = lambda _, body: "400" if body == refused else ""
    done(served(folder, "steps", server))
    calm, steps = ({e.id: e for e in examples(folder, name)} for name in ("calm", "steps"))
    assert calm.keys() == steps.keys()
    changed = [name for name in calm if calm[name].provenance != steps[name].provenance]
    assert changed
    assert all(steps[name].prompt[0].content == refused["messages"][0]["content"] for name in changed)
    assert VerdictLog(folder / ".steps.verdicts").spent().requests > len(log_of(folder, "steps"))
    assert counted(folder, "steps", "failed") > 0


def test_an_answer_that_no_server_takes_abstains_and_the_reason_is_said(folder: Path, server: ChatServer) -> None:
    victim = next(r for r in answers(12, 4) if not r.correct and len(r.steps) > 3)
    question = victim.prompt[0].content
    server.faults = lambda _, body: "400 too long" if body["messages"][0]["content"] == question else ""
    done(served(folder, "steps", server))
    rejected = made(folder, "steps").rejects().to_pylist()
    assert {r["row"] for r in rejected} == {r.id for r in answers(12, 4) if r.prompt == victim.prompt and not r.correct}
    assert all(r["reason"].startswith("abstained: unknown") for r in rejected)
    assert all("maximum context length" in r["reason"] for r in rejected)


def test_a_server_that_is_gone_ends_the_run_and_what_was_drawn_is_kept(folder: Path, server: ChatServer) -> None:
    done(served(folder, "calm", server))
    calm = server.served
    server.faults = lambda number, _: "404" if number >= calm + 20 else ""
    served(folder, "steps", server).mistake("404", "does not exist")
    kept = len(log_of(folder, "steps"))
    assert 20 - 4 <= kept <= 20
    server.faults = []
    before = server.served
    done(served(folder, "steps", server))
    assert server.served - before == calm - kept
    assert digest(folder, "steps") == digest(folder, "calm")


def test_an_answer_that_hangs_the_verifier_is_unknown_and_never_wrong(tmp_path: Path) -> None:
    pytest.importorskip("math_verify")

    def tower(body: Body) -> str:
        return "So \\boxed{9^{9^{9^9}}}." if body["seed"] % 2 else f"So \\boxed{{{max(ToyWorld.numbers(body['messages'][0]['content']))}}}."

    wrong = [r for r in answers(60, 1, ToyWorld(slip=0.4)) if not r.correct][:1]
    dataset(wrong, tmp_path / "rollouts")
    with ChatServer(tower) as server:
        sets = ("sampling.grader=math", "sampling.scheme=exhaustive", "sampling.want=soft", 'sampling.scheme_settings={"n": 3}')
        done(served(tmp_path, "steps", server, *sets))
    [example] = examples(tmp_path, "steps")
    told = {name: json.loads(example.provenance[name]) for name in VERDICTS}
    assert set(example.targets[:-1]) == {1.0}
    assert sum(told["wrong"]) == 0
    hung = sum("9^" in line["text"] for line in log_of(tmp_path, "steps"))
    assert sum(told["timeouts"]) == hung > 0


# --------------------------------------------------------------------------------------------------------------- budgets


@pytest.mark.parametrize("limit", ["max_requests=30", "max_tokens=700"])
@pytest.mark.parametrize("how", [{"concurrency": 1}, {"concurrency": 5}, {"device": "call"}])
def test_a_budget_that_is_spent_says_so_and_a_larger_one_goes_on(folder: Path, limit: str, how: dict[str, Any]) -> None:
    done(label(folder, "whole", **how))
    uninterrupted = len(DRAWN)
    DRAWN.clear()
    said = label(folder, "steps", f"sampling.{limit}", **how).mistake("is spent", "larger budget", str(folder / ".steps.verdicts"))
    name, most = limit.split("=")
    assert f"{name}={most}" in said
    spent = VerdictLog(folder / ".steps.verdicts").spent()
    if name == "max_requests":
        assert len(DRAWN) == spent.requests == 30
    elif how == {"concurrency": 1}:
        assert 700 <= spent.tokens < 700 + 60
    assert len(log_of(folder, "steps")) == len(DRAWN)
    label(folder, "steps", f"sampling.{limit}", **how).mistake("is spent")
    done(label(folder, "steps", f"sampling.{name}={100 * int(most)}", **how))
    assert len(DRAWN) == uninterrupted
    assert digest(folder, "steps") == digest(folder, "whole")
    assert VerdictLog(folder / ".steps.verdicts").spent().requests == uninterrupted


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        (["sampling.scheme=skew", "sampling.want=soft"], ["hard labels only", "exhaustive, posterior"]),
        (["sampling.scheme=skwe"], ["did you mean skew"]),
        (['sampling.scheme_settings={"kk": 3}'], ["kk is not a setting"]),
        (["sampling.scheme_settings=3"], ["not a JSON object"]),
        (["sampling.grader=maths"], ["did you mean math"]),
        (["sampling.max_requests=-1"], ["at least 0"]),
        (["sampling.most_per_solution=-1"], ["at least 0"]),
    ],
)
def test_wrong_settings_are_said_before_anything_is_drawn(folder: Path, sets: list[str], words: list[str]) -> None:
    label(folder, "steps", *sets).mistake(*words)
    assert not DRAWN
    assert [path.name for path in folder.iterdir()] == ["rollouts"]


# ---------------------------------------------------------------------------------------------------------------- going out

FORMATS = ["math_shepherd", "trl_stepwise", "openrlhf_prm", "rlhflow_prm", "qwen_prm", "prm800k"]
KEEP_SHARES = ["trl_stepwise", "openrlhf_prm", "qwen_prm"]


def told(folder: Path, output: str) -> dict[tuple[str, str], tuple[float, ...]]:
    """Targets by problem and answer, however the format spaces it."""
    words = {(e.prompt[-1].content, "".join("".join(e.answers[0]).split())): e.targets for e in examples(folder, output)}
    return {key: tuple(round(value, 12) for value in targets) for key, targets in words.items()}


@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize("want", ["hard", "soft"])
def test_labels_go_out_in_every_process_format_and_come_back(folder: Path, format_name: str, want: str) -> None:
    done(label(folder, "steps", f"sampling.want={want}", f"sampling.scheme={'skew' if want == 'hard' else 'exhaustive'}"))
    done(here("export_examples", "--source", folder / "steps", "--format", format_name, "--output", folder / "out", "--engine", "local"))
    done(here("import_rollouts", "--source", folder / "out", "--format", format_name, "--output", folder / "in", "--engine", "local"))
    done(here("label_steps", "--source", folder / "in", "--output", folder / "back", "--engine", "local"))
    made_of, back = told(folder, "steps"), told(folder, "back")
    if want == "soft" and format_name not in KEEP_SHARES:
        made_of = {key: targets for key, targets in made_of.items() if set(targets) <= {0.0, 1.0}}
    assert made_of
    assert back == made_of


def test_without_a_policy_continuations_in_the_source_are_counted(tmp_path: Path) -> None:
    prompt, gold = (Message("user", "1 + 2 + 3?"),), {"gold": "6"}
    answer = Rollout(id="a", prompt=prompt, steps=("1 + 2 = 4\n", "A: 7"), correct=False, provenance=gold)
    ends = [True, False, None, False]
    more = [
        Rollout(id=f"a/1/{k}", prompt=prompt, steps=("1 + 2 = 4\n", f"A: {k}"), correct=end, continues="a", kept_steps=1, provenance=gold)
        for k, end in enumerate(ends)
    ]
    dataset([answer, *more], tmp_path / "rollouts")
    done(here("label_steps", "--source", tmp_path / "rollouts", "--output", tmp_path / "steps", "--engine", "local"))
    [example] = examples(tmp_path, "steps")
    assert (example.targets, example.counts) == ((1 / 3, 0.0), (3, 1))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rollouts", "steps"]


def test_seeds_are_hashes_of_what_is_continued(folder: Path) -> None:
    done(label(folder, "steps", "sampling.seed=7"))
    for line, request in zip(log_of(folder, "steps"), sorted(DRAWN, key=str), strict=False):
        assert line["sample"] >= 0
        assert request.kept
    wanted = {seed_of(7, r.prompt, r.kept, k) for r in DRAWN for k in range(64)}
    assert {r.seed for r in DRAWN} <= wanted
