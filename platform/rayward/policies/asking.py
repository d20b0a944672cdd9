"""Asking a policy, and keeping what it said: nothing is asked twice, whenever and however a run ends.

    LOG/3f.jsonl       verdicts on prompts whose hash begins with 3f, a line each, in the order they came: key, text, tokens, what was asked
    LOG/spent.json     requests and tokens of every run with this log; the budget is held against them
    LOG/tally/         what the finished parts of a run counted

A line is written when its answer comes in, whole or not at all for whoever reads it: one that is torn by a kill is passed over. The key
is a hash of who judges, with the settings that change what it says, of what it reads, word for word, and of the seed of the sample. So
other answers, another order, rubric, model or temperature are other questions, and another output that asks the same ones may share the
log. Failed requests are not kept: they are asked again. A part of a dataset has the hashes that no other part has, so its worker alone
writes to its files. At a URL a log is objects of lines instead (`remote_log`).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rayward.errors import SettingsError
from rayward.places import Place, naming, telling
from rayward.policies import Completion, Policy, Request, stream
from rayward.policies.remote_log import LOOK_S, RemoteLog
from rayward.progress import Progress
from rayward.records import Prompt
from rayward.toy_world import seed_of


@dataclass(frozen=True)
class Budget:
    """How much may be asked, over all runs with one log."""

    max_requests: int = 0  # most questions, tries again not counted (0: no limit)
    max_tokens: int = 0  # most tokens, read and written together; what is in the air when they are spent comes on top (0: no limit)

    def __post_init__(self) -> None:
        if min(self.max_requests, self.max_tokens) < 0:
            raise ValueError(f"max_requests={self.max_requests} and max_tokens={self.max_tokens} must be at least 0 (no limit)")


Tally = defaultdict[str, float]  # what happened, by name; adds up


class Question(NamedTuple):
    """One thing that is asked, once."""

    prompt_id: str  # of the prompt that it is about
    reads: Prompt
    sample: int  # its number among the draws of one question
    about: Mapping[str, Any]  # for who reads the log
    kept: tuple[str, ...] = ()  # steps of the answer that stand already


class Reply(NamedTuple):
    """What the judge said, or why it said nothing."""

    text: str
    finish_reason: str
    generated_tokens: int
    prompt_tokens: int
    error: str = ""


class Spent(NamedTuple):
    """What was used up."""

    requests: int = 0
    tokens: int = 0


class VerdictLog:
    """What was said, by key, in a folder or at a URL."""

    def __init__(self, folder: Place, hold: int = 1):
        self.folder, self.hold = folder, hold
        self._leaves: dict[str, dict[str, Reply]] = {}
        self._remote = None if isinstance(folder, Path) else RemoteLog(folder)
        self._here = folder if self._remote is None else self._remote.here
        self._brought: set[str] = set()  # leaves that were looked for in the store

    def find(self, prompt_id: str, key: str) -> Reply | None:
        """What was said to a question before. Questions that come in order of prompt_id need one file at a time (`hold`)."""
        leaf = prompt_id[:2]
        self._bring(leaf)
        if leaf not in self._leaves:
            while len(self._leaves) >= self.hold:
                del self._leaves[next(iter(self._leaves))]
            self._leaves[leaf] = dict(self._lines(leaf))
        return self._leaves[leaf].get(key)

    def forget(self) -> None:
        """Let go of what was read; the files stay."""
        self._leaves.clear()

    def flush(self) -> None:
        """Have all that was said where it is kept."""
        if self._remote is not None:
            with telling(self.folder):
                self._remote.flush()

    def _bring(self, leaf: str) -> None:
        """What others have sent, laid into the files here, when a leaf is looked at for the first time."""
        if self._remote is None or leaf in self._brought:
            return
        self._brought.add(leaf)
        with telling(self.folder):
            for line in self._remote.lines(leaf):
                with contextlib.suppress(ValueError, LookupError, TypeError):
                    of = str(json.loads(line)["prompt_id"])[:2]
                    self._append(of, line)
                    self._leaves.pop(of, None)

    def _lines(self, leaf: str) -> Iterator[tuple[str, Reply]]:
        path = self._path(leaf)
        for line in path.read_bytes().split(b"\n") if path.is_file() else ():
            try:
                row = json.loads(line)
                yield str(row["key"]), Reply(*(row[name] for name in Reply._fields[:4]))
            except (ValueError, LookupError, TypeError):  # torn by a kill
                continue

    def _path(self, leaf: str) -> Path:
        return self._here / f"{leaf}.jsonl"

    def add(self, prompt_id: str, key: str, reply: Reply, about: Mapping[str, Any]) -> None:
        """Keep an answer."""
        row = {"key": key, **about, **{name: getattr(reply, name) for name in Reply._fields[:4]}}
        line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
        self._append(prompt_id[:2], line)
        if self._remote is not None:
            self._remote.put(prompt_id[:2], line)
        if prompt_id[:2] in self._leaves:
            self._leaves[prompt_id[:2]][key] = reply

    def _append(self, leaf: str, line: bytes) -> None:
        with naming(self._path(leaf)), open(self._path(leaf), "a+b") as file:
            end = file.seek(0, os.SEEK_END)
            torn = end > 0 and (file.seek(end - 1), file.read(1))[1] != b"\n"
            file.write(b"\n" * torn + line)

    def spend(self, more: Spent, budget: Budget | None = None) -> bool:
        """Add to what was spent; with a budget, only if that allows it, and say so."""
        if self._remote is not None:
            if budget is not None and any(vars(budget).values()) and not _allows(budget, Spent(*self._remote.spent(LOOK_S))):
                return False
            self._remote.spend(*more)
            return True
        self._here.mkdir(parents=True, exist_ok=True)
        file = os.open(self._here / "spent.json", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)
            so_far = _spent(os.pread(file, 200, 0))
            if budget is not None and not _allows(budget, so_far):
                return False
            total = Spent(so_far.requests + more.requests, so_far.tokens + more.tokens)
            with naming(self._here):
                os.pwrite(file, f"{json.dumps(total._asdict()):<99}\n".encode(), 0)  # of one length: never half of an old one
            return True
        finally:
            os.close(file)

    def spent(self) -> Spent:
        """What all runs spent so far."""
        if self._remote is not None:
            with telling(self.folder):
                return Spent(*self._remote.spent())
        path = self._here / "spent.json"
        return _spent(path.read_bytes()) if path.is_file() else Spent()


def _spent(text: bytes) -> Spent:
    return Spent(**json.loads(text)) if text.strip() else Spent()


def _allows(budget: Budget, so_far: Spent) -> bool:
    requests_left = not budget.max_requests or so_far.requests < budget.max_requests
    return requests_left and (not budget.max_tokens or so_far.tokens < budget.max_tokens)


class Asker:
    """A policy with a log and a budget."""

    def __init__(self, policy: Policy, who: str, log: VerdictLog, budget: Budget, seed: int):
        self.policy, self.who, self.log, self.budget, self.seed = policy, who, log, budget, seed

    def ask(self, questions: Sequence[Question], bar: Progress | None = None) -> list[Reply]:
        """The replies, in order: from the log where they are in it, else asked and kept. SettingsError when the budget is spent."""
        requests = [self.request(q) for q in questions]
        keys = [self._key(request) for request in requests]
        said: dict[str, Reply] = {}
        todo: dict[str, tuple[Question, Request]] = {}
        for question, request, key in zip(questions, requests, keys, strict=True):
            reply = said.get(key) or self.log.find(question.prompt_id, key)
            if reply is None:
                todo[key] = question, request
            else:
                said[key] = reply
        if bar is not None:
            bar.advance(len(keys) - len(todo))
        names = list(todo)
        over = False

        def affordable() -> Iterator[Request]:
            nonlocal over
            for key in names:
                if not self.log.spend(Spent(requests=1), self.budget):
                    over = True
                    return
                yield todo[key][1]

        with self._kept():
            for place, completion in stream(self.policy, affordable()):
                key = names[place]
                said[key] = self._keep(key, todo[key][0], completion)
                if bar is not None:
                    bar.advance()
        if over:
            self.log.flush()
            raise self._budget_is_spent()
        return [said[key] for key in keys]

    def request(self, question: Question) -> Request:
        """What the policy is given: its seed is a hash of the run's seed, what it reads, and the number of the draw."""
        names = (question.reads, question.kept, question.sample) if question.kept else (question.reads, question.sample)
        return Request(question.reads, question.kept, seed_of(self.seed, *names))

    def known(self, question: Question) -> Reply | None:
        """What was said to a question before."""
        return self.log.find(question.prompt_id, self._key(self.request(question)))

    def flow(self, questions: Iterator[Question | None]) -> Iterator[tuple[Question, Reply]]:
        """Replies as they come to questions that are not in the log; None among them: nothing to ask before another reply is in.

        SettingsError when the budget is spent, after what is in the air has come back.
        """
        asked: list[str] = []  # keys of the requests, by place
        air: dict[str, list[Question]] = {}  # who waits for what is being written: two answers may begin alike
        over = False

        def requests() -> Iterator[Request | None]:
            nonlocal over
            for question in questions:
                if question is None:
                    asked.append("")
                    yield None
                    continue
                request = self.request(question)
                key = self._key(request)
                if key in air:
                    air[key].append(question)
                    continue
                over = not self.log.spend(Spent(requests=1), self.budget)
                if over:
                    return
                asked.append(key)
                air[key] = [question]
                yield request

        with self._kept():
            for place, completion in stream(self.policy, requests()):
                waiting = air.pop(asked[place])
                reply = self._keep(asked[place], waiting[0], completion)
                for question in waiting:
                    yield question, reply
        if over:
            self.log.flush()
            raise self._budget_is_spent()

    @contextlib.contextmanager
    def _kept(self) -> Iterator[None]:
        """Where asking is broken off, what was said until then is kept."""
        try:
            yield
        except BaseException:
            with contextlib.suppress(Exception):  # why it ended comes first
                self.log.flush()
            raise

    def _key(self, request: Request) -> str:
        content = json.dumps([self.who, request.prompt, request.kept, request.seed], ensure_ascii=False)
        return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()

    def _keep(self, key: str, question: Question, done: Completion) -> Reply:
        reply = Reply(done.text, done.finish_reason, done.generated_tokens, done.prompt_tokens, done.error)
        self.log.spend(Spent(tokens=done.generated_tokens + done.prompt_tokens))
        if done.finish_reason != "error":
            self.log.add(question.prompt_id, key, reply, {"prompt_id": question.prompt_id, "sample": question.sample, **question.about})
        return reply

    def _budget_is_spent(self) -> SettingsError:
        limits = [f"{name}={value:,}" for name, value in vars(self.budget).items() if value]
        spent = self.log.spent()
        return SettingsError(
            f"the budget {' '.join(limits)} is spent: {spent.requests:,} requests and {spent.tokens:,} tokens so far",
            f"every answer is kept in {self.log.folder}: run the same command with a larger budget, and it goes on from there",
        )
