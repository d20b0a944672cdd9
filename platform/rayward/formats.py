"""Formats: a raw row of somebody's file becomes rollouts, or Rejected with a reason. Never an exception, never a silent drop.

>>> [good] = parse(FORMATS["preference"], RawRow("pairs.jsonl", 1, b'{"prompt": "2+2?", "chosen": "4", "rejected": "5"}'))[:1]
>>> good.text, good.reward
('4', 1.0)
>>> parse(FORMATS["preference"], RawRow("pairs.jsonl", 2, b'{"prompt": "2+2?", "chosen": "4"}')).reason
'missing key: rejected'

A format is a function from one decoded row to the rollouts in it; it raises BadRecord("category: detail") where the row cannot be
used. To add one: write the function, with a raw row as doctest, and enter it into FORMATS.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from rayward.errors import DataError
from rayward.records import BadRecord, Message, Prompt, Rejected, Rollout, check_number, check_prompt, check_text
from rayward.steps import cut


class RawRow(NamedTuple):
    """One row as it was found: a line of bytes, or the columns of a Parquet row."""

    source: str  # file, relative to what was asked for
    number: int  # 1 is the first row
    content: bytes | Mapping[str, Any]

    @property
    def text(self) -> str:
        """The row as far as text can hold it."""
        if isinstance(self.content, bytes):
            return self.content.decode("utf-8", "backslashreplace")
        return json.dumps(self.content, ensure_ascii=True, default=repr)

    @property
    def id(self) -> str:
        """Names the row wherever its rollouts go: file, row, and a digest, so that two files of one name do not collide."""
        content = self.content if isinstance(self.content, bytes) else self.text.encode()
        return f"{self.source}:{self.number}:{hashlib.blake2b(content, digest_size=4).hexdigest()}"


class Unreadable(NamedTuple):
    """A place where a file could not be read on."""

    source: str
    number: int
    reason: str


Format = Callable[[Mapping[str, Any], str], Sequence[Rollout]]  # (decoded row, id of the row) -> rollouts, or BadRecord


def parse(read: Format, row: RawRow | Unreadable) -> list[Rollout] | Rejected:
    """One raw row as records, or the reason it was left out."""
    if isinstance(row, Unreadable):
        return Rejected(source=row.source, row=str(row.number), reason=row.reason)
    try:
        rollouts = read(decode(row.content), row.id)
        if not rollouts:
            raise BadRecord("empty: the row holds no answer")
        came_from = {"source": row.source, "row": str(row.number)}
        return [replace(r, provenance={**r.provenance, **came_from}) for r in rollouts]
    except BadRecord as error:
        reason = str(error)
    except RecursionError:
        reason = "broken JSON: nested too deeply"
    return Rejected(source=row.source, row=str(row.number), reason=storable(reason), raw=storable(row.text))


def storable(text: str) -> str:
    """The text as far as UTF-8 can hold it: half a surrogate pair becomes its escape."""
    return text.encode("utf-8", "backslashreplace").decode()


def decode(content: bytes | Mapping[str, Any]) -> Mapping[str, Any]:
    """The keys and values of a raw row, or BadRecord."""
    if isinstance(content, bytes):
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise BadRecord(f"invalid UTF-8: byte {content[error.start]:#04x} at {error.start}") from None
        if not text.strip():
            raise BadRecord("blank line")
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            raise BadRecord(f"broken JSON: {error.msg} at character {error.pos}") from None
        except ValueError as error:  # an integer of thousands of digits
            raise BadRecord(f"broken JSON: {error}") from None
        except RecursionError:
            raise BadRecord("broken JSON: nested too deeply") from None
    if not isinstance(content, Mapping):
        raise BadRecord(f"wrong type: the row is {type(content).__name__}, not an object with keys")
    return content


# ----------------------------------------------------------------------------------------------------------------- helpers


def key(row: Mapping[str, Any], *names: str) -> Any:
    """The value under the first of the names that is there and not null."""
    for name in names:
        if row.get(name) is not None:
            return row[name]
    raise BadRecord(f"missing key: {' or '.join(names)}")


def as_prompt(value: object, what: str = "prompt") -> Prompt:
    """A text (one user message) or a list of {role, content}."""
    if isinstance(value, str):
        prompt: Prompt = (Message("user", check_text(what, value)),)
    else:
        prompt = as_messages(value, what)
    check_prompt(prompt)
    return prompt


def as_messages(value: object, what: str) -> Prompt:
    """A list of {role, content} with texts in it."""
    if not isinstance(value, list):
        raise BadRecord(f"wrong type: {what} is {type(value).__name__}, neither text nor a list of messages")
    messages = []
    for n, message in enumerate(value):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise BadRecord(f"wrong type: message {n} of {what} is not {{role, content}}")
        content = message.get("content")
        blank = message["role"] == "system" and content == ""
        messages.append(Message(message["role"], "" if blank else check_text(f"message {n} of {what}", content)))
    return tuple(messages)


def pair(prompt: Prompt, chosen: str, rejected: str, row_id: str, margin: float = 1.0) -> list[Rollout]:
    """Two rollouts of one judgement, of which the first was preferred."""
    sides = (("chosen", chosen, margin), ("rejected", rejected, 0.0))
    for side, text, _ in sides:
        check_text(side, text)
    if chosen == rejected:
        raise BadRecord("identical answers: chosen and rejected are the same text")
    return [Rollout(id=f"{row_id}/{side}", prompt=prompt, steps=(text,), reward=reward, judgement=row_id) for side, text, reward in sides]


# ----------------------------------------------------------------------------------------------------------------- formats

_TURN = re.compile(r"\n\n(Human|Assistant): ?")


def hh(row: Mapping[str, Any], row_id: str) -> list[Rollout]:
    r"""Anthropic's HH-RLHF transcripts (arXiv 2204.05862): both sides whole, alike up to the last answer.

    >>> row = {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello!", "rejected": "\n\nHuman: Hi\n\nAssistant: Go away."}
    >>> [(r.prompt[0].content, r.text, r.reward) for r in hh(row, "x")]
    [('Hi', 'Hello!', 1.0), ('Hi', 'Go away.', 0.0)]
    """
    sides = []
    for side in ("chosen", "rejected"):
        transcript = key(row, side)
        if not isinstance(transcript, str):
            raise BadRecord(f"wrong type: {side} is {type(transcript).__name__}, not text")
        pieces = _TURN.split(transcript)
        if len(pieces) < 3 or pieces[0].strip():
            raise BadRecord(f"not a transcript: {side} does not begin with a Human or Assistant turn")
        roles = {"Human": "user", "Assistant": "assistant"}
        sides.append([Message(roles[r], t.strip()) for r, t in zip(pieces[1::2], pieces[2::2], strict=True)])
    chosen, rejected = sides
    if chosen[:-1] != rejected[:-1] or chosen[-1].role != rejected[-1].role:
        at = next((n for n, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), min(map(len, sides)))
        raise BadRecord(f"diverging prefix: turn {at + 1} of {len(chosen)} and {len(rejected)} differs before the last answer")
    if chosen[-1].role != "assistant":
        raise BadRecord("not a transcript: the last turn is not the Assistant's")
    prompt = tuple(chosen[:-1])
    check_prompt(prompt)
    return pair(prompt, chosen[-1].content, rejected[-1].content, row_id)


def preference(row: Mapping[str, Any], row_id: str) -> list[Rollout]:
    """TRL's preference rows: `prompt?`, `chosen`, `rejected`, texts or messages, and an optional positive `margin`.

    Without a prompt, what both sides share at their start is the prompt: whole messages, or text up to a word boundary.

    >>> row = {"chosen": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}],
    ...        "rejected": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Go away."}], "margin": 2}
    >>> [(r.prompt[0].content, r.text, r.reward) for r in preference(row, "x")]
    [('Hi', 'Hello!', 2.0), ('Hi', 'Go away.', 0.0)]
    >>> [r.text for r in preference({"chosen": "The sky is blue.", "rejected": "The sky is green."}, "x")]
    ['blue.', 'green.']
    """
    margin = 1.0
    if row.get("margin") is not None:
        margin = check_number("the margin", row["margin"])
        if margin <= 0:
            raise BadRecord(f"margin not positive: {margin:g} does not say that chosen is the better side")
    chosen, rejected = key(row, "chosen"), key(row, "rejected")
    if isinstance(chosen, str) and isinstance(rejected, str):
        if row.get("prompt") is not None:
            return pair(as_prompt(row["prompt"]), chosen, rejected, row_id, margin)
        shared = os.path.commonprefix([check_text("chosen", chosen), check_text("rejected", rejected)])
        cut_at = max((m.end() for m in re.finditer(r"\s+", shared)), default=0)
        if cut_at == 0:
            raise BadRecord("diverging prefix: there is no prompt, and chosen and rejected share no first word")
        prompt = as_prompt(chosen[:cut_at].rstrip(), "the shared start of chosen and rejected")
        return pair(prompt, chosen[cut_at:], rejected[cut_at:], row_id, margin)
    sides = [as_messages(chosen, "chosen"), as_messages(rejected, "rejected")]
    if not sides[0] or not sides[1]:
        raise BadRecord("empty: chosen or rejected has no message")
    before = as_prompt(row["prompt"]) if row.get("prompt") is not None else ()
    if before and all(len(side) > len(before) and side[: len(before)] == before for side in sides):
        before = ()  # the prompt is given on its own and once more in front of the answers
    if sides[0][:-1] != sides[1][:-1]:
        raise BadRecord("diverging prefix: chosen and rejected differ before their last message")
    for side, name in zip(sides, ("chosen", "rejected"), strict=True):
        if side[-1].role != "assistant":
            raise BadRecord(f"wrong role: the last message of {name} is by {side[-1].role!r}, not by 'assistant'")
    prompt = before + sides[0][:-1]
    check_prompt(prompt)
    return pair(prompt, sides[0][-1].content, sides[1][-1].content, row_id, margin)


def outcomes(row: Mapping[str, Any], row_id: str) -> list[Rollout]:
    r"""Graded solutions: a problem, a solution, and whether it is right. One grader saw them all, so they compare inside a problem.

    >>> [r] = outcomes({"problem": "2+2?", "solution": "2+2=4\nA: 4", "correct": True}, "x")
    >>> r.steps, r.reward, r.correct
    (('2+2=4\n', 'A: 4'), 1.0, True)
    """
    correct = key(row, "correct", "is_correct")
    if not isinstance(correct, bool) and not (isinstance(correct, int | float) and correct in (0, 1)):
        raise BadRecord(f"wrong type: correct is {correct!r}, not true or false")
    text = check_text("the solution", key(row, "solution", "response", "completion"))
    provenance = {n: str(row[n]) for n in ("problem_id", "reference", "gold") if row.get(n) is not None}
    return [
        Rollout(
            id=row_id,
            prompt=as_prompt(key(row, "problem", "question", "prompt"), "the problem"),
            steps=cut(text),
            reward=float(correct),
            correct=bool(correct),
            judgement="graded",
            policy=optional_text(row, "model") or optional_text(row, "policy"),
            provenance=provenance,
        )
    ]


def rollouts(row: Mapping[str, Any], row_id: str) -> list[Rollout]:
    """Our own rows: the fields of Rollout by name. `prompt` may be a text, `answer` may stand for `steps`; what is not a field is kept.

    Without a `judgement`, rewards are taken as one grader's, comparable among all answers of a prompt.

    >>> [r] = rollouts({"prompt": "2+2?", "answer": "4", "reward": 0.5, "temperature": 0.7}, "x")
    >>> r.id, r.steps, r.judgement, r.provenance
    ('x', ('4',), 'graded', {'temperature': '0.7'})
    """
    steps = row.get("steps")
    if steps is None:
        steps = [check_text("the answer", key(row, "steps", "answer", "response", "completion"))]
    if not isinstance(steps, list):
        raise BadRecord(f"wrong type: steps is {type(steps).__name__}, not a list of texts")
    correct = row.get("correct")
    if correct is not None and not isinstance(correct, bool):
        raise BadRecord(f"wrong type: correct is {correct!r}, not true, false or null")
    kept = row.get("kept_steps") or 0
    if isinstance(kept, bool) or not isinstance(kept, int):
        raise BadRecord(f"wrong type: kept_steps is {kept!r}, not a whole number")
    used = {*Rollout.__dataclass_fields__, "prompt_id", "answer", "response", "completion"}
    extra = {str(n): v if isinstance(v, str) else json.dumps(v, default=repr) for n, v in row.items() if n not in used and v is not None}
    return [
        Rollout(
            id=optional_text(row, "id") or row_id,
            prompt=as_prompt(key(row, "prompt")),
            steps=tuple(steps),
            reward=None if row.get("reward") is None else check_number("the reward", row["reward"]),
            rewards={str(n): check_number(f"the reward for {n}", v) for n, v in _pairs(row, "rewards") if v is not None},
            correct=correct,
            judgement=optional_text(row, "judgement") or "graded",
            annotator=optional_text(row, "annotator"),
            policy=optional_text(row, "policy"),
            continues=optional_text(row, "continues"),
            kept_steps=kept,
            provenance={**{str(n): str(v) for n, v in _pairs(row, "provenance")}, **extra},
        )
    ]


def optional_text(row: Mapping[str, Any], name: str) -> str | None:
    """A text or a number under a key, or None."""
    value = row.get(name)
    if value is None or value == "":
        return None
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    return check_text(name, value)


def _pairs(row: Mapping[str, Any], name: str) -> list[tuple[Any, Any]]:
    value = row.get(name)
    if value is None:
        return []
    if isinstance(value, Mapping):
        return list(value.items())
    if isinstance(value, list) and all(isinstance(p, list | tuple) and len(p) == 2 for p in value):
        return [(p[0], p[1]) for p in value]
    raise BadRecord(f"wrong type: {name} is {type(value).__name__}, not an object with keys")


FORMATS: dict[str, Format] = {"rollouts": rollouts, "hh": hh, "preference": preference, "outcomes": outcomes}

# ----------------------------------------------------------------------------------------------------------------- sources

SUFFIXES = (".jsonl", ".jsonl.gz", ".ndjson", ".parquet")
_HUB_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(?::(?P<split>[\w\[\]:%]+))?")  # org/name or org/name:split


def find_files(source: str) -> list[tuple[str, str]]:
    """(name, path) of every file of a source: a file, a folder of files, or a set that `datasets` can load."""
    path = Path(source)
    if path.is_file():
        if not path.name.endswith(SUFFIXES):
            raise DataError(f"{source} is not a kind of file this reads", f"files end in {', '.join(SUFFIXES)}")
        return [(path.name, str(path))]
    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        return [(path.name, f"datasets:{source}")]
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and p.name.endswith(SUFFIXES) and not p.name.startswith("."))
        if not files:
            raise DataError(f"{source} holds no file that ends in {', '.join(SUFFIXES)}")
        for file in files:
            if not file.name.isprintable():
                raise DataError(f"{str(file)!r} has a name that is not UTF-8", "rename the file")
        return [(str(p.relative_to(path)), str(p)) for p in files]
    if _HUB_NAME.fullmatch(source) and not source.startswith((".", "/")) and not path.parent.is_dir():
        return [(source, f"datasets:{source}")]
    raise DataError(f"{source} does not exist", "give a file, a folder of files, or a data set's name on the hub: org/name:split")


def _hub_rows(source: str) -> Iterator[Mapping[str, Any]]:
    """Rows of what `datasets` loads: a folder it saved, or a name on the hub with an optional split."""
    import datasets

    if Path(source).is_dir():
        loaded = datasets.load_from_disk(source)
        if isinstance(loaded, dict):
            raise DataError(f"{source} holds several splits: {', '.join(loaded)}", f"name one, e.g. {source}/{next(iter(loaded))}")
    else:
        match = _HUB_NAME.fullmatch(source)
        assert match is not None
        try:
            loaded = datasets.load_dataset(match["name"], split=match["split"] or "train")
        except (OSError, ValueError) as error:  # not there, no such split, no network
            raise DataError(f"{source} cannot be loaded: {error}", "check the name and the network, or give a local file") from None
    yield from loaded


def read_rows(name: str, path: str) -> Iterator[RawRow | Unreadable]:
    """Every row of a file, in order, and where it could not be read on, that."""
    number = 0
    try:
        if path.startswith("datasets:"):
            for row in _hub_rows(path.removeprefix("datasets:")):
                number += 1
                yield RawRow(name, number, row)
            return
        if path.endswith(".parquet"):
            with pq.ParquetFile(path) as file:
                for batch in file.iter_batches(batch_size=1024):
                    for row in batch.to_pylist():
                        number += 1
                        yield RawRow(name, number, row)
            return
        with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as file:
            for line in file:
                number += 1
                yield RawRow(name, number, line.rstrip(b"\r\n"))
    except DataError:
        raise
    except (OSError, EOFError, zlib.error, pa.ArrowException, ValueError, OverflowError) as error:  # the last two: a value of a column
        yield Unreadable(name, number + 1, f"unreadable file: {type(error).__name__}: {error}; nothing after this row was read")


def describe_file(path: str) -> dict[str, Any]:
    """Size and SHA-256 of a source file, for the manifest; of a data set of the hub, its name."""
    if path.startswith("datasets:"):
        return {"source": path}
    digest = hashlib.sha256()
    with contextlib.suppress(OSError), open(path, "rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return {"source": path, "bytes": os.path.getsize(path), "sha256": digest.hexdigest()}
