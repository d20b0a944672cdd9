"""What a format is, and what readers and writers share; BadRecord where a row cannot be used, or an example cannot be said.

reading     unread, key, as_prompt, as_messages, pair, answers, optional_text, entries
writing     sides, one_user_text, messages, judged_steps
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pyarrow as pa

from rayward.records import BadRecord, Example, Message, Prompt, Rollout, check_prompt, check_text

Reader = Callable[[Mapping[str, Any], str], Sequence[Rollout]]  # (decoded row, id of the row) -> rollouts
Writer = Callable[[Example], Sequence[Mapping[str, Any]]]  # an example -> the rows that say it


@dataclass(frozen=True)
class Format:
    """How rows of a kind are read and, where somebody reads them, written."""

    read: Reader
    about: str  # what it is and who publishes or reads it, one line
    kind: str  # the labeler its rollouts are for: pairs, rankings, outcomes, attributes, steps
    keys: tuple[str, ...] = ()  # keys that every row has
    test: Callable[[Mapping[str, Any]], bool] | None = None  # what else tells it from formats with the same keys
    test_says: str = ""  # that test in words, after "the keys a, b, ..."
    write: Writer | None = None
    columns: Callable[[pa.Table, str, int], Any] | None = None  # `columns.read` where the rows can be read by column
    all_read: bool = False  # it sees to PROMPT_COLUMNS itself; others' rows that have some are rejected
    label: Mapping[str, Any] = field(default_factory=dict)  # settings of the labeler under which reading gives back what was written

    def fits(self, row: Mapping[str, Any]) -> bool:
        """Whether a row looks like one of these."""
        return bool(self.keys or self.test) and all(name in row for name in self.keys) and (self.test is None or bool(self.test(row)))

    @property
    def specific(self) -> int:
        """Of two formats that a row fits, the one with the higher number is meant."""
        return 2 * len(self.keys) + (self.test is not None)


# ----------------------------------------------------------------------------------------------------------------- reading

UNREAD = "unread column"  # the reason of a row whose prompt was made from more than what is read
CALLS = "tool_calls"  # of a message
PROMPT_COLUMNS = ("tools", "chat_template_kwargs", "images", "image", "videos", "audios", CALLS)  # beside texts, in rows of TRL and others


def unread(row: Mapping[str, Any]) -> list[str]:
    """What else than texts the prompt of a row was made from: the columns of PROMPT_COLUMNS that say something; tool_calls in messages.

    >>> unread({"prompt": "2+2?", "tools": [{"name": "add"}], "chat_template_kwargs": {"enable_thinking": None}, "images": "[]"})
    ['tools']
    """
    messages = (m for value in row.values() for m in (value if isinstance(value, list) else [value]) if isinstance(m, Mapping))
    called = any(_says(message.get(CALLS)) for message in messages)
    return [name for name in PROMPT_COLUMNS if _says(row.get(name)) or (called and name == CALLS)]


def _says(value: object) -> bool:
    """Whether a value holds anything; Parquet fills up structures with nulls."""
    if isinstance(value, str):
        return value.strip() not in ("", "[]", "{}", "null")
    if isinstance(value, Mapping | list | tuple):
        return any(map(_says, value.values() if isinstance(value, Mapping) else value))
    return value is not None and value == value


def key(row: Mapping[str, Any], *names: str) -> Any:
    """The value under the first of the names that is there and not null."""
    for name in names:
        if row.get(name) is not None:
            return row[name]
    raise BadRecord(f"missing key: {' or '.join(names)}")


def as_prompt(value: object, what: str = "prompt") -> Prompt:
    """A text (one user message) or a list of {role, content}, which some files hold as JSON text."""
    if isinstance(value, str) and value.startswith('[{"'):
        with contextlib.suppress(ValueError, RecursionError):
            turns = json.loads(value)
            if all(isinstance(t, dict) and {"role", "content"} <= t.keys() for t in turns):
                value = turns
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


def optional_text(row: Mapping[str, Any], name: str) -> str | None:
    """A text or a number under a key, or None."""
    value = row.get(name)
    if value is None or value == "":
        return None
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            value = str(value)
        except ValueError:  # more digits than Python writes out
            raise BadRecord(f"wrong value: {name} is a number of thousands of digits") from None
    return check_text(name, value)


def entries(row: Mapping[str, Any], name: str) -> list[tuple[Any, Any]]:
    """The keys and values of an object under a key (Parquet gives maps as pairs); none where it is missing."""
    value = row.get(name)
    if value is None:
        return []
    if isinstance(value, Mapping):
        return list(value.items())
    if isinstance(value, list) and all(isinstance(p, list | tuple) and len(p) == 2 for p in value):
        return [(p[0], p[1]) for p in value]
    raise BadRecord(f"wrong type: {name} is {type(value).__name__}, not an object with keys")


def answers(
    prompt: Prompt, texts: Sequence[object], rewards: Sequence[float | None], row_id: str, policies: Sequence[str | None] | None = None
) -> list[Rollout]:
    """The answers of one judgement with their rewards (higher is better; None: not ranked), in the order they stand in the row."""
    by = policies or [None] * len(texts)
    return [
        Rollout(
            id=f"{row_id}/{n:02}", prompt=prompt, steps=(check_text(f"answer {n}", text),), reward=reward, judgement=row_id, policy=policy
        )
        for n, (text, reward, policy) in enumerate(zip(texts, rewards, by, strict=True))
    ]


# ----------------------------------------------------------------------------------------------------------------- writing


class Sides(NamedTuple):
    """A pair to be written."""

    chosen: str
    rejected: str
    margin: float  # difference of the targets, above 0


def sides(example: Example) -> Sides:
    """The two answers of an example, the better first, or BadRecord."""
    if len(example.answers) != 2 or any(len(a) != 1 for a in example.answers) or example.attributes:
        raise BadRecord(f"not a pair: {len(example.answers)} answers with {len(example.targets)} targets; make pairs with label_pairs")
    if max(example.counts) > 1:
        raise BadRecord(f"votes: {example.counts[0]} are behind the targets, and this format has no place for them (--no-exact drops them)")
    (first,), (second,) = example.answers
    gap = example.targets[0] - example.targets[1]
    if gap == 0:
        raise BadRecord("a tie: this format has a better and a worse side")
    return Sides(first, second, gap) if gap > 0 else Sides(second, first, -gap)


def one_user_text(example: Example) -> str:
    """The prompt as a single text, or BadRecord where it is a conversation."""
    if len(example.prompt) != 1 or example.prompt[0].role != "user":
        raise BadRecord(f"several turns: the prompt has {len(example.prompt)} messages, and this format holds one text")
    return example.prompt[0].content


def messages(prompt: Prompt, answer: str | None = None) -> list[dict[str, str]]:
    """A prompt, and an answer after it, as a list of {role, content}."""
    turns = [{"role": m.role, "content": m.content} for m in prompt]
    return turns if answer is None else [*turns, {"role": "assistant", "content": answer}]


def judged_steps(example: Example) -> list[tuple[tuple[str, ...], list[float | None]]]:
    """Per answer of a process example its steps and their targets in [0, 1] (None: missing), or BadRecord."""
    if example.attributes or not all(0 <= t <= 1 for t in example.targets):
        raise BadRecord("not steps: targets are not between 0 and 1; make step labels with label_steps")
    judged, at = [], 0
    for answer in example.answers:
        targets, counts = example.targets[at : at + len(answer)], example.counts[at : at + len(answer)]
        judged.append((answer, [t if n else None for t, n in zip(targets, counts, strict=True)]))
        at += len(answer)
    return judged
