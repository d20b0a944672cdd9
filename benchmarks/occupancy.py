"""How full an inference engine is kept while steps are labelled adaptively: rounds in lockstep, the flowing driver, controller actors.

    python benchmarks/occupancy.py                          all of it, some minutes on one core; JSON on the last line
    python benchmarks/occupancy.py --quick                  a subset in under a minute
    python benchmarks/occupancy.py --no-ray                 virtual time alone

It runs the pipeline's own `rayward.schemes.Rounds`, `montecarlo.draw` and `policies.asking.Asker`; only the engine is simulated.

    engine      slots; a completion takes prefill (tokens that are not in the prefix cache, whole blocks of 16) and then decoding, at a
                fixed speed a slot; its length is what the solution has left, times a lognormal spread; its verdict is right with
                chance V_t of the solution (benchmarks/montecarlo.py, errors final, 4 to 20 steps); both by hash of the request's seed
    lockstep    rounds: all asks of all solutions are drawn, waited for, decided
    flowing     montecarlo.draw: asks are handed out as verdicts come in
    controllers C controllers with a share of the solutions each, E engines, requests routed by problem: real Ray actors on the wall
                clock; and the same in virtual time, where sizes, windows and parts can be varied without Python's speed in the figures

Half of the solutions end right and need nothing. Occupancy is busy slot-time over slots x makespan, so makespan over ideal (work / slots)
is its reciprocal. Drain is the time from when a slot first stays empty to the end. Chain is the makespan with endless slots: the
solution whose draws, one after the other, take longest. Labels are checked to be equal whatever the execution.
"""

from __future__ import annotations

import argparse
import asyncio
import heapq
import json
import math
import multiprocessing
import tempfile
import time
import zlib
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count as counting
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from montecarlo import world

from rayward import cluster
from rayward.grading import verdict
from rayward.montecarlo import DIGITS, StepSampling, draw, gold_of, solutions_of
from rayward.policies import Completion, Request
from rayward.policies.asking import Asker, Budget, Question, VerdictLog
from rayward.policies.server import ServerPolicy, ServerSettings
from rayward.records import Message, Rollout, prompt_id
from rayward.schemes import Budget as DrawBudget
from rayward.schemes import Decision, Draws, Rounds, Scheme, rounds

STEPS = (4, 8, 12, 16, 20)
SCHEMES = ("skew", "posterior", "exhaustive")
PROMPT_TOKENS = 150
CHARACTERS = 4  # of a token, as the pipeline guesses
BLOCK = 16  # tokens of a block of the prefix cache
CACHED = 20_000  # prefixes that an engine remembers

# ------------------------------------------------------------------------------------------------------------------- what is labelled


class Answers(NamedTuple):
    """Answers to problems, one each, and the truth about them."""

    rollouts: list[Rollout]
    values: dict[str, tuple[float, ...]]  # by problem: V_t at t kept steps
    tokens: dict[str, tuple[float, ...]]  # by problem: tokens that are left after t kept steps


def answers_of(count: int, seed: int) -> Answers:
    """Half right and half wrong, 4 to 20 steps, easy to hard; in an order by chance."""
    each = -(-count // (2 * 3 * len(STEPS)))
    made: list[tuple[Rollout, tuple[float, ...], tuple[float, ...]]] = []
    for right in (False, True):
        of = world(seed, each, STEPS, "none", right)
        for i in np.random.default_rng([seed, right]).permutation(len(of.solutions))[: count // 2].tolist():
            solution, name = of.solutions[i], f"{int(right)}-{i}"
            left = (*solution.tokens, 0.0)
            steps = tuple("x" * max(1, round(CHARACTERS * (a - b)) - 1) + "\n" for a, b in pairwise(left))
            prompt = (Message("user", f"problem {name} {'y' * CHARACTERS * PROMPT_TOKENS}"),)
            rollout = Rollout(id=name, prompt=prompt, steps=steps, correct=right, provenance={"gold": "1"})
            made.append((rollout, tuple(of.values[i].tolist()), solution.tokens))
    made = [made[i] for i in np.random.default_rng(seed).permutation(len(made))]
    names = [_problem(rollout.prompt) for rollout, _, _ in made]
    return Answers(
        [m[0] for m in made],
        {n: m[1] for n, m in zip(names, made, strict=True)},
        {n: m[2] for n, m in zip(names, made, strict=True)},
    )


def _problem(prompt: Sequence[Message]) -> str:
    return prompt[-1].content.split(" ", 2)[1]


# -------------------------------------------------------------------------------------------------------------------------- the engine


@dataclass(frozen=True)
class Server:
    """An inference engine."""

    slots: int = 256  # completions that are written at once
    decode_s: float = 100.0  # tokens a second and slot
    prefill_s: float = 10_000.0  # tokens a second and slot
    spread: float = 0.6  # standard deviation of the logarithm of a length
    most_tokens: int = 2048  # of a completion, which is then cut off
    scale: float = 1.0  # seconds of the clock in a second of the engine


class Served:
    """What requests cost one engine, with its prefix cache, and what it writes."""

    def __init__(self, answers: Answers, server: Server):
        self.server, self.values, self.tokens = server, answers.values, answers.tokens
        self.cache: OrderedDict[str, int] = OrderedDict()  # problem -> tokens of the longest prefix that was read
        self.work = 0.0  # seconds of one slot
        self.completions = 0

    def one(self, request: Request) -> tuple[float, Completion]:
        """Seconds that a slot is taken, and what is written."""
        name, kept, rng = _problem(request.prompt), len(request.kept), np.random.Generator(np.random.PCG64(request.seed))
        left = self.tokens[name]
        length = max(1, round(left[kept] * math.exp(rng.normal(-(self.server.spread**2) / 2, self.server.spread))))
        right = rng.random() < self.values[name][kept]
        cut = length > self.server.most_tokens
        length = min(length, self.server.most_tokens)
        reads = PROMPT_TOKENS + round(left[0] - left[kept])
        known = min(self.cache.pop(name, 0), reads) // BLOCK * BLOCK
        self.cache[name] = max(reads, known)
        if len(self.cache) > CACHED:
            self.cache.popitem(last=False)
        seconds = ((reads - known) / self.server.prefill_s + length / self.server.decode_s) * self.server.scale
        self.work += seconds
        self.completions += 1
        return seconds, Completion((f"A: {int(right)}",), "length" if cut else "stop", length, reads)


class VirtualPolicy:
    """A policy on an event queue: the driver takes no time. It takes requests as `ServerPolicy.stream` does."""

    def __init__(self, answers: Answers, server: Server):
        self.served, self.slots = Served(answers, server), server.slots
        self.now = self.last_full = 0.0

    def __call__(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion per request, in order."""
        done = dict(self.stream(requests))
        return [done[place] for place in range(len(requests))]

    def stream(self, requests: Iterable[Request | None]) -> Iterator[tuple[int, Completion]]:
        """(place, completion) in the order of the engine's clock."""
        todo = enumerate(requests)
        air: list[tuple[float, int, Completion]] = []
        while True:
            while len(air) < self.slots and (item := next(todo, None)) is not None:
                place, request = item
                if request is None:
                    break
                seconds, completion = self.served.one(request)
                heapq.heappush(air, (self.now + seconds, place, completion))
            if not air:
                return
            full = len(air) == self.slots
            self.now, place, completion = heapq.heappop(air)
            self.last_full = self.now if full else self.last_full
            yield place, completion


# ---------------------------------------------------------------------------------------------------------------------- the executions


class Measured(NamedTuple):
    """One run."""

    decisions: dict[str, Decision]  # by rollout
    completions: int
    work_s: float  # of one slot
    makespan_s: float
    slots: int  # of all engines
    drain_s: float = math.nan
    cpu_s: float = math.nan  # of the driver, the engine's simulation within it

    @property
    def occupancy(self) -> float:
        """Busy slot-time over all slot-time."""
        return self.work_s / (self.slots * self.makespan_s)


Execution = Callable[[Sequence[Rollout], Scheme, Asker], tuple[list[Decision], int]]


def lockstep(rollouts: Sequence[Rollout], scheme: Scheme, asker: Asker) -> tuple[list[Decision], int]:
    """Decisions and completions: every round is drawn whole before anything is decided."""

    def drawn(draws: list[Draws]) -> list[list[bool | None]]:
        replies = iter(asker.ask([question(rollouts[d.solution], d.kept, k) for d in draws for k in d.numbers]))
        return [[graded(rollouts[d.solution], next(replies)) for _ in d.numbers] for d in draws]

    done = rounds(solutions_of(rollouts), scheme, drawn)
    return done.decisions, done.counters.completions


def flowing(rollouts: Sequence[Rollout], scheme: Scheme, asker: Asker) -> tuple[list[Decision], int]:
    """Decisions and completions of the pipeline's driver."""
    done = draw(rollouts, scheme, asker, "numeric", DrawBudget())
    return done.decisions, done.completions


EXECUTIONS: dict[str, Execution] = {"lockstep": lockstep, "flowing": flowing}


def question(rollout: Rollout, kept: int, k: int) -> Question:
    """The k-th continuation of the first steps of an answer."""
    return Question(prompt_id(rollout.prompt), rollout.prompt, k, {"rollout": rollout.id}, rollout.steps[:kept])


def graded(rollout: Rollout, said: Any) -> bool | None:
    """The verdict on a completion or a reply, as the pipeline comes to it."""
    return verdict(said.text, gold_of(rollout)).right if said.finish_reason == "stop" else None


@contextmanager
def asker_of(policy: Any) -> Iterator[Asker]:
    """An asker with an empty log."""
    with tempfile.TemporaryDirectory() as folder:
        yield Asker(policy, "simulated", VerdictLog(Path(folder), hold=256), Budget(), seed=0)


def virtual(how: str, answers: Answers, scheme: str, server: Server, parts: int = 1) -> Measured:
    """One process with one engine, part after part."""
    policy, size = VirtualPolicy(answers, server), -(-len(answers.rollouts) // parts)
    decisions: dict[str, Decision] = {}
    completions, start = 0, time.process_time()
    with asker_of(policy) as asker:
        for at in range(0, len(answers.rollouts), size):
            part = answers.rollouts[at : at + size]
            said, drawn = EXECUTIONS[how](part, StepSampling(scheme=scheme).made_scheme(), asker)
            decisions |= {rollout.id: decision for rollout, decision in zip(part, said, strict=True)}
            completions += drawn
    cpu = time.process_time() - start
    return Measured(decisions, completions, policy.served.work, policy.now, server.slots, policy.now - policy.last_full, cpu)


# ------------------------------------------------------------------------------------------ controllers and engines, in virtual time


@dataclass(frozen=True)
class Layout:
    """Who asks whom."""

    controllers: int = 1
    engines: int = 1
    window: float = 1.0  # completions that all controllers together have in the air, over slots; above 1 they queue at the engines
    parts: int = 1  # of all solutions; a controller takes the next one that nobody has
    overlap: bool = False  # take the next part as soon as there is nothing to ask, not when all is decided
    longest_first: bool = False  # within a part
    ahead: int = 0  # draws of a prefix that may be made before they are asked for, where slots are free


class Part:
    """Some solutions and what is still to be asked of them."""

    def __init__(self, rollouts: Sequence[Rollout], scheme: str):
        self.rollouts = rollouts
        self.rounds = Rounds(solutions_of(rollouts), StepSampling(scheme=scheme).made_scheme())
        self.out: deque[tuple[int, int, int]] = deque()  # handed out by Rounds: solution, kept, number
        self.open: dict[int, tuple[int, int]] = {}  # solution -> prefix and number drawn last
        self.early: dict[tuple[int, int, int], bool | None] = {}  # drawn before it was asked for
        self.air: dict[tuple[int, int, int], bool] = {}  # being written; was it asked for

    def asked(self) -> tuple[int, int, int] | None:
        """The next draw that is asked for and neither known nor in the air."""
        while True:
            while self.out:
                key = self.out.popleft()
                self.open[key[0]] = max(self.open[key[0]], key[1:]) if self.open.get(key[0], (-1,))[0] == key[1] else key[1:]
                if key in self.early:
                    self.rounds.tell(*key, [self.early.pop(key)])
                elif key in self.air:
                    self.air[key] = True
                else:
                    return key
            draws = self.rounds.asks(room=256)
            if not draws:
                return None
            self.out.extend((d.solution, d.kept, k) for d in draws for k in d.numbers)

    def guessed(self, ahead: int) -> tuple[int, int, int] | None:
        """A draw that is likely to be asked for next: the next number of a prefix that is being drawn from."""
        self.open = {i: at for i, at in self.open.items() if self.rounds.decisions[i] is None} if ahead else self.open
        likely = ((i, kept, k + by) for by in range(1, ahead + 1) for i, (kept, k) in self.open.items())
        return next((key for key in likely if key not in self.air and key not in self.early), None)

    def told(self, key: tuple[int, int, int], said: bool | None) -> None:
        """A draw is back."""
        if self.air.pop(key):
            self.rounds.tell(*key, [said])
        else:
            self.early[key] = said


def laid_out(answers: Answers, scheme: str, server: Server, layout: Layout) -> Measured:
    """Controllers and engines on one event queue; `server.slots` are those of each engine."""
    rollouts, size = answers.rollouts, -(-len(answers.rollouts) // max(layout.parts, layout.controllers))
    waiting = deque(rollouts[at : at + size] for at in range(0, len(rollouts), size))
    engines = [Served(answers, server) for _ in range(layout.engines)]
    free, queues = [server.slots] * layout.engines, [deque[Any]() for _ in engines]
    slots = server.slots * layout.engines
    window = max(1, round(layout.window * slots / layout.controllers))
    held: list[list[Part]] = [[] for _ in range(layout.controllers)]
    flying, events, order = [0] * layout.controllers, list[Any](), counting()
    parts: list[Part] = []
    now = last_full = 0.0
    with asker_of(None) as asker:

        def begin(e: int, job: Any) -> None:
            c, part, key = job
            seconds, completion = engines[e].one(asker.request(question(part.rollouts[key[0]], *key[1:])))
            free[e] -= 1
            heapq.heappush(events, (now + seconds, next(order), e, c, part, key, graded(part.rollouts[key[0]], completion)))

        def wanted(c: int) -> tuple[Part, tuple[int, int, int], bool] | None:
            while True:
                for part in held[c]:
                    if key := part.asked():
                        return part, key, True
                held[c] = [part for part in held[c] if not part.rounds.done]
                if not waiting or (held[c] and not layout.overlap):
                    break
                todo = waiting.popleft()
                todo = sorted(todo, key=lambda r: -len(r.text)) if layout.longest_first else todo
                parts.append(Part(todo, scheme))
                held[c].append(parts[-1])
            return next(((part, key, False) for part in held[c] if (key := part.guessed(layout.ahead))), None)

        def fill(c: int) -> None:
            while flying[c] < window and (found := wanted(c)):
                part, key, asked = found
                part.air[key] = asked
                flying[c] += 1
                e = zlib.crc32(_problem(part.rollouts[key[0]].prompt).encode()) % layout.engines
                if free[e]:
                    begin(e, (c, part, key))
                else:
                    queues[e].append((c, part, key))

        for c in range(layout.controllers):
            fill(c)
        while events:
            last_full = events[0][0] if not any(free) else last_full
            now, _, e, c, part, key, said = heapq.heappop(events)
            free[e] += 1
            flying[c] -= 1
            if queues[e]:
                begin(e, queues[e].popleft())
            part.told(key, said)
            fill(c)
    decisions = {r.id: d for part in parts for r, d in zip(part.rollouts, part.rounds.decisions, strict=True) if d is not None}
    work, completions = sum(e.work for e in engines), sum(e.completions for e in engines)
    return Measured(decisions, completions, work, now, slots, now - last_full)


# ------------------------------------------------------------------------------------- controllers and engines that are actors of Ray


class Engine:
    """An actor: its slots sleep instead of writing."""

    def __init__(self, answers: Answers, server: Server):
        self.served, self.free = Served(answers, server), asyncio.Semaphore(server.slots)

    async def ask(self, request: Request) -> Completion:
        """One completion, when a slot was free and has slept."""
        async with self.free:
            seconds, completion = self.served.one(request)
            await asyncio.sleep(seconds)
        return completion

    async def work(self) -> tuple[float, int]:
        """Seconds of one slot, and completions."""
        return self.served.work, self.served.completions


class ActorPolicy:
    """A policy that hands requests to engine actors, by problem; `most` are in the air."""

    def __init__(self, engines: Sequence[Any], most: int):
        self.engines, self.most = engines, most

    def __call__(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion per request, in order."""
        done = dict(self.stream(requests))
        return [done[place] for place in range(len(requests))]

    def stream(self, requests: Iterable[Request | None]) -> Iterator[tuple[int, Completion]]:
        """(place, completion) as they come back."""
        import ray

        todo, air = enumerate(requests), dict[Any, int]()
        while True:
            while len(air) < self.most and (item := next(todo, None)) is not None:
                place, request = item
                if request is None:
                    break
                engine = self.engines[zlib.crc32(_problem(request.prompt).encode()) % len(self.engines)]
                air[engine.ask.remote(request)] = place
            if not air:
                return
            ray.wait(list(air), num_returns=1)
            landed, _ = ray.wait(list(air), num_returns=len(air), timeout=0)
            for ref, completion in zip(landed, ray.get(landed), strict=True):
                yield air.pop(ref), completion


def on_actors(ray: Any, how: str, answers: Answers, scheme: str, server: Server, layout: Layout) -> Measured:
    """Controllers that are actors feed engines that are actors, on the wall clock."""
    seed = answers._replace(rollouts=[])
    engines = [ray.remote(Engine).options(num_cpus=0, max_concurrency=10_000).remote(seed, server) for _ in range(layout.engines)]
    slots = server.slots * layout.engines
    most = max(1, round(layout.window * slots / layout.controllers))
    controller = ray.remote(Controller).options(num_cpus=0)
    controllers = [controller.remote(answers.rollouts[c :: layout.controllers]) for c in range(layout.controllers)]
    ray.get([actor.ready.remote() for actor in controllers] + [engine.work.remote() for engine in engines])
    start = time.monotonic()
    done = ray.get([actor.run.remote(how, scheme, engines, most) for actor in controllers])
    makespan = time.monotonic() - start
    work, completions = (sum(column) for column in zip(*ray.get([engine.work.remote() for engine in engines]), strict=True))
    for actor in (*controllers, *engines):
        ray.kill(actor)
    decisions = {name: decision for said, _ in done for name, decision in said.items()}
    return Measured(decisions, completions, work, makespan, slots, cpu_s=sum(cpu for _, cpu in done))


class Controller:
    """An actor with a share of the solutions."""

    def __init__(self, rollouts: Sequence[Rollout]):
        self.rollouts = rollouts

    def ready(self) -> bool:
        """It is there."""
        return True

    def run(self, how: str, scheme: str, engines: Sequence[Any], most: int) -> tuple[dict[str, Decision], float]:
        """Decisions by rollout, and CPU-seconds of this process."""
        start = time.process_time()
        with asker_of(ActorPolicy(engines, most)) as asker:
            said, _ = EXECUTIONS[how](self.rollouts, StepSampling(scheme=scheme).made_scheme(), asker)
        return {r.id: decision for r, decision in zip(self.rollouts, said, strict=True)}, time.process_time() - start


# --------------------------------------------------------------------------------------------------------- a server on a loopback port


def serve(answers: Answers, server: Server, port: Any) -> None:
    """A chat completions server in a process of its own; says its port."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while not reader.at_eof():
            try:
                head = await reader.readuntil(b"\r\n\r\n")
            except asyncio.IncompleteReadError:  # the driver has hung up
                break
            length = next(int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length"))
            body = json.loads(await reader.readexactly(length))
            prompt, *rest = (message["content"] for message in body["messages"])
            kept = ("",) * sum(text.count("\n") for text in rest)
            async with free:
                seconds, done = served.one(Request((Message("user", prompt),), kept, body["seed"]))
                await asyncio.sleep(seconds)
            choice = {"index": 0, "message": {"role": "assistant", "content": done.text}, "finish_reason": done.finish_reason}
            usage = {"completion_tokens": done.generated_tokens, "prompt_tokens": done.prompt_tokens}
            said = json.dumps({"choices": [choice], "usage": usage}).encode()
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(said) + said)

    async def main() -> None:
        listening = await asyncio.start_server(talk, "127.0.0.1", 0)
        port.put(listening.sockets[0].getsockname()[1])
        async with listening:
            await listening.serve_forever()

    served, free = Served(answers, server), asyncio.Semaphore(server.slots)
    asyncio.run(main())


def over_http(answers: Answers, scheme: str, server: Server, in_the_air: int) -> Measured:
    """The flowing driver with `ServerPolicy`, on the wall clock."""
    context = multiprocessing.get_context("spawn")
    port = context.Queue()
    process = context.Process(target=serve, args=(answers._replace(rollouts=[]), server, port), daemon=True)
    process.start()
    try:
        settings = ServerSettings(model="simulated", base_url=f"http://127.0.0.1:{port.get(timeout=60)}/v1", concurrency=in_the_air)
        with asker_of(ServerPolicy(settings)) as asker:
            start, cpu = time.monotonic(), time.process_time()
            said, completions = flowing(answers.rollouts, StepSampling(scheme=scheme).made_scheme(), asker)
            makespan, cpu = time.monotonic() - start, time.process_time() - cpu
    finally:
        process.terminate()
        process.join()
    decisions = {r.id: d for r, d in zip(answers.rollouts, said, strict=True)}
    return Measured(decisions, completions, math.nan, makespan, server.slots, cpu_s=cpu)


# ------------------------------------------------------------------------------------------------------------------- what is measured


def labels_of(decisions: Mapping[str, Decision]) -> list[Any]:
    """What a label holds, as the pipeline rounds it: the last bits of a posterior depend on what is computed beside it."""

    def rounded(values: Sequence[float | None]) -> tuple[float | None, ...]:
        return tuple(None if v is None else round(v, DIGITS) for v in values)

    return [(n, d.hard, rounded(d.soft), rounded(d.sd), d.first_error, d.abstained) for n, d in sorted(decisions.items())]


class Table:
    """Prints runs, keeps them for the last line, and holds their labels against each other."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, float]] = {}
        self.labels: dict[tuple[int, str], list[Any]] = {}
        self.equal = True

    def add(self, size: int, scheme: str, name: str, run: Measured) -> None:
        """One run; runs of one size and scheme must have the same labels."""
        labels = labels_of(run.decisions)
        same = self.labels.setdefault((size, scheme), labels) == labels
        self.equal &= same
        cpu = run.cpu_s / run.completions * 1000
        row = {"occupancy": run.occupancy, "makespan_s": run.makespan_s, "drain_s": run.drain_s, "driver_cpu_s_per_1000": cpu}
        kept = {n: round(v, 3) for n, v in row.items() if not math.isnan(v)} | {"completions": run.completions}
        self.rows[f"{scheme} {size} {run.slots} {name}"] = kept
        print(
            f"{scheme:10} {size:6,} {run.slots:5} {name:44} {run.occupancy:8.3f} {1 / run.occupancy:7.2f} {run.makespan_s:10.1f}"
            f" {run.drain_s:8.1f} {run.completions:9,} {cpu:9.2f}  {'same' if same else 'OTHER LABELS'}",
            flush=True,
        )

    @staticmethod
    def head(title: str) -> None:
        """A new table."""
        columns = f"{'scheme':10} {'answers':>6} {'slots':>5} {'execution':44} occupied  /ideal makespan_s  drain_s  complet. CPU-s/1000"
        print(f"\n{title}\n{columns}", flush=True)


def by_size(table: Table, sizes: Sequence[int], slots: Sequence[int], schemes: Sequence[str], seed: int) -> None:
    """Lockstep and flowing, on one engine, in virtual time."""
    table.head("one process, one engine, virtual time (through montecarlo.draw and the verdict log)")
    for size in sizes:
        answers = answers_of(size, seed)
        for scheme in schemes:
            if scheme == "exhaustive" and size > 1000:
                continue  # one round: as full as with a tenth of the answers
            for n in slots if size <= 1000 else slots[-1:]:
                for how in EXECUTIONS:
                    table.add(size, scheme, how, virtual(how, answers, scheme, Server(n)))
            if size <= 1000:
                print(f"{scheme:10} {size:6,} chain: {laid_out(answers, scheme, Server(10**6), Layout()).makespan_s:.1f} s", flush=True)


LAYOUTS = {
    "1 controller, 1 engine": (1.0, Layout()),
    "1 controller, 2 engines": (0.5, Layout(engines=2)),
    "1 controller, 2 engines, window 1.25": (0.5, Layout(engines=2, window=1.25)),
    "4 controllers, 2 engines": (0.5, Layout(4, 2)),
    "4 controllers, 2 engines, window 1.25": (0.5, Layout(4, 2, window=1.25)),
    "4 controllers, 2 engines, window 2": (0.5, Layout(4, 2, window=2.0)),
    "longest first": (1.0, Layout(longest_first=True)),
    "1 draw ahead": (1.0, Layout(ahead=1)),
    "3 draws ahead": (1.0, Layout(ahead=3)),
    "7 draws ahead": (1.0, Layout(ahead=7)),
    "3 draws ahead, longest first": (1.0, Layout(longest_first=True, ahead=3)),
}


def layouts(table: Table, sizes: Sequence[int], slots: Sequence[int], schemes: Sequence[str], seed: int) -> None:
    """Controllers, engines and orders, in virtual time."""
    table.head("controllers and engines, virtual time (through schemes.Rounds)")
    for size in sizes:
        answers = answers_of(size, seed)
        for scheme in schemes:
            for n in slots:
                for name, (share, layout) in LAYOUTS.items():
                    table.add(size, scheme, name, laid_out(answers, scheme, Server(round(n * share)), layout))


def parts(table: Table, count: int, size: int, slots: int, schemes: Sequence[str], seed: int) -> None:
    """Part after part, and what helps."""
    table.head(f"{count} parts of {size:,} answers, virtual time")
    answers = answers_of(count * size, seed)
    ways = {
        "all in one part": Layout(),
        "part after part": Layout(parts=count),
        "2 controllers, slots shared out": Layout(2, parts=count),
        "2 controllers, all slots each": Layout(2, parts=count, window=2.0),
        "the next part begun early": Layout(parts=count, overlap=True),
        "part after part, 3 draws ahead": Layout(parts=count, ahead=3),
        "the next part begun early, 3 draws ahead": Layout(parts=count, overlap=True, ahead=3),
    }
    for scheme in schemes:
        for name, layout in ways.items():
            table.add(count * size, scheme, name, laid_out(answers, scheme, Server(slots), layout))


def actors(table: Table, size: int, server: Server, schemes: Sequence[str], seed: int) -> None:
    """The three executions on the same engines, which are actors of Ray."""
    table.head(f"actors of Ray, 2 engines of {server.slots} slots, wall clock: an engine's second takes {server.scale:g} s")
    answers = answers_of(size, seed)
    one = Layout(1, 2)
    with cluster.connect() as ray:
        on_actors(ray, "flowing", answers_of(20, seed), "skew", server, Layout(4, 2))  # the workers are started
        for scheme in schemes:
            for how, layout in (("lockstep", one), ("flowing", one), ("flowing", Layout(4, 2)), ("flowing", Layout(4, 2, window=2.0))):
                name = f"{how}, {layout.controllers} controllers, window {layout.window:g}"
                table.add(size, scheme, name, on_actors(ray, how, answers, scheme, server, layout))


def http(table: Table, size: int, server: Server, seed: int) -> None:
    """What the driver itself takes, with `ServerPolicy` and a verdict log."""
    table.head(f"ServerPolicy and a server on a loopback port, {server.slots} slots, wall clock, scale {server.scale:g}")
    answers = answers_of(size, seed)
    for scheme in ("skew", "posterior"):
        table.add(size, scheme, "flowing, ServerPolicy", over_http(answers, scheme, server, server.slots))


MEASURED = ("sizes", "layouts", "parts", "actors", "http")


def main() -> None:
    """Run, print, and say it in JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a subset in under a minute")
    parser.add_argument("--no-ray", action="store_true", help="virtual time alone")
    parser.add_argument("--only", nargs="+", default=list(MEASURED), help=f"of: {' '.join(MEASURED)}")
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES), help=f"of: {' '.join(SCHEMES)}")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    table, adaptive = Table(), [s for s in args.schemes if s != "exhaustive"]
    small = bool(args.quick)
    if "sizes" in args.only:
        by_size(table, (20, 100) if small else (50, 500, 5000), (64,) if small else (64, 256), args.schemes, args.seed)
    if "layouts" in args.only:
        layouts(table, (100,) if small else (50, 500), (64,) if small else (64, 256), adaptive[:1] if small else adaptive, args.seed)
    if "parts" in args.only:
        parts(table, 3 if small else 5, 60 if small else 1000, 64 if small else 256, adaptive[:1] if small else adaptive, args.seed)
    if "actors" in args.only and not args.no_ray:
        actors(table, 20 if small else 200, Server(slots=16, scale=0.03), adaptive[:1] if small else args.schemes, args.seed)
    if "http" in args.only:
        http(table, 20 if small else 200, Server(slots=64, scale=0.001), args.seed)
    print("\n" + json.dumps({"labels_equal": table.equal, "runs": table.rows}))


if __name__ == "__main__":
    main()
