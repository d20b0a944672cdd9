"""Rendering: an example becomes token ids and the places where its scores are read. The only user of a tokenizer.

    prompt                 answer 1                answer 2
    <|user|> 2+2? <|end|>  4 <|end|>               5 <|end|>
    \\___ encoded once ___/         ^ place                ^ place

Every token id is produced once: a text is rendered by the tokenizer's chat template where it has one and plainly where not, cut into
the prompt and what follows it, and each piece is tokenized without special tokens being added (so no doubled BOS). A place is the
last token of its segment, computed from character offsets and lengths, not searched by token id (pad == eos does not matter); a step tag
is, after it was checked to be one token. With `judge` a question follows every answer, and the place is where its reply would begin:

    prompt         answer 1       question to a judge                       its reply
    ... <|end|>    4 <|end|>      <|user|> Is it correct? Yes or No <|end|>  <|assistant|>
                                                                                  ^ place

Training, batch scoring, pyfunc and HTTP all come through here, so they see the same ids.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from jinja2 import TemplateError

from rayward import places
from rayward.errors import DataError, ModelError, RaywardError, SettingsError
from rayward.records import Example, Message, Prompt, Rejected, examples_of

CHUNK = 256  # examples that one call of the tokenizer takes


@dataclass(frozen=True)
class RenderSettings:
    """How texts become tokens."""

    max_length: int = 2048  # tokens of a prompt with one answer
    too_long: Literal["reject", "cut_prompt", "cut_answer", "cut"] = "reject"  # what is done with more: left out with both lengths said,
    # the start of the prompt cut off, the end of the answer, or the prompt down to a quarter of max_length and then the answer
    step_tag: str = ""  # a token put after every step, whose place is read instead of the step's last token, e.g. <extra_0>
    judge: str = ""  # a question put after every answer, whose reply is read, e.g. "Is the answer correct? Reply Yes or No."; with
    # {answer}, and {prompt}, in it, it is all that the model is shown
    judge_reply: str = ""  # how that reply begins, before its verdict, e.g. "Verdict:"
    chat_template: str = ""  # FILE of Jinja that turns messages into text, instead of the model's own or where it has none; kept with it

    def __post_init__(self) -> None:
        if self.max_length < 2:
            raise ValueError(f"max_length={self.max_length} must be at least 2 tokens")
        if self.step_tag != self.step_tag.strip():
            raise ValueError(f"step_tag={self.step_tag!r} must not begin or end with white space: it would not be a token of its own")
        if self.judge and self.step_tag:
            raise ValueError(f"judge is asked about whole answers, and step_tag={self.step_tag} about their steps: leave one of them out")
        if self.judge_reply and not self.judge:
            raise ValueError(f"judge_reply={self.judge_reply!r} begins the reply to a judge, and there is none: give judge too")
        if self.judge.count("{answer}") > 1 or ("{prompt}" in self.judge and "{answer}" not in self.judge):
            raise ValueError(
                f"judge={self.judge!r} must have {{answer}} once where it has it or {{prompt}}; without both it follows the answer"
            )


@dataclass(frozen=True)
class Group:
    """An example in tokens: the prompt, then its answers, one after the other."""

    token_T: np.ndarray  # int32; prompt and all answers
    length_A: np.ndarray  # int32; of the prompt, of answer 1, of answer 2, ...
    place_K: np.ndarray  # int32; where in token_T a score is read, one per target
    target_K: np.ndarray  # float32
    weight: float
    count_K: np.ndarray | None = None  # float32; verdicts behind each target; None: one
    column_K: np.ndarray | None = None  # int32; which attribute each target is about; None: the targets have no names

    @property
    def answers(self) -> int:
        """How many answers it has."""
        return len(self.length_A) - 1

    @property
    def longest(self) -> int:
        """Tokens of the prompt with its longest answer."""
        return int(self.length_A[0] + self.length_A[1:].max())


def use_template(tokenizer: Any, file: str) -> None:
    """Let a tokenizer have the chat template in a file of Jinja; nothing is done where none is named.

    Raises:
        SettingsError: if the file cannot be read, or makes no text of a question and its answer.
    """
    if not file:
        return
    try:
        template = places.read(places.at(file)).decode()
        turns = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "It is four."}]
        text = tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False)
    except (OSError, UnicodeDecodeError, RaywardError, TemplateError) as error:
        raise SettingsError(f"render.chat_template={file} cannot be used: {error}", "give a file of Jinja over `messages`") from None
    if "2 + 2?" not in text or "It is four." not in text:
        raise SettingsError(f"render.chat_template={file} leaves out what is said", "it is to write the content of all `messages`")
    tokenizer.chat_template = template


class Renderer:
    """A tokenizer and how it is used; `attributes` are the named outputs of the model that reads what is rendered."""

    def __init__(self, tokenizer: Any, settings: RenderSettings, attributes: Sequence[str] = ()):
        if not getattr(tokenizer, "is_fast", False):
            raise ModelError(
                f"{type(tokenizer).__name__} does not tell which characters a token covers, so step ends cannot be placed",
                "use the model's fast tokenizer (tokenizer.json)",
            )
        self.tokenizer = tokenizer
        self.settings = settings
        self.attributes = tuple(attributes)
        self.templated = bool(getattr(tokenizer, "chat_template", None))
        self.before, self.after = ([], []) if self.templated else _special_tokens(tokenizer)
        if settings.judge:
            self.after = []  # a reply is to begin there
        self.tag = step_tag_id(tokenizer, settings.step_tag) if settings.step_tag else None

    def render(self, examples: Iterable[Example]) -> Iterator[Group | Rejected]:
        """Each example as a group, or why it cannot be one, in the same order."""
        chunk: list[Example] = []
        for example in examples:
            chunk.append(example)
            if len(chunk) == CHUNK:
                yield from self._render(chunk)
                chunk = []
        yield from self._render(chunk)

    def _render(self, examples: Sequence[Example]) -> Iterator[Group | Rejected]:
        texts: list[_Texts | str] = [self._texts(e) for e in examples]
        pieces = [piece for t in texts if isinstance(t, _Texts) for piece in (t.prompt, *t.answers)]
        encoded: Iterator[Any] = iter(())
        if pieces:
            batch = self.tokenizer(
                pieces, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False, verbose=False
            )
            encoded = iter(zip(batch["input_ids"], batch["offset_mapping"], strict=True))
        for example, text in zip(examples, texts, strict=True):
            if isinstance(text, str):
                yield _reject(example, text)
            else:
                prompt = self.before + next(encoded)[0]
                answers = [next(encoded) for _ in text.answers]
                group = self._group(example, prompt, answers, text)
                yield _reject(example, group) if isinstance(group, str) else group

    def _texts(self, example: Example) -> _Texts | str:
        """The pieces to tokenize, and where in each answer's piece its segments end; or a reason."""
        if self.settings.judge:
            return self._judged(example)
        tag = self.settings.step_tag
        if tag and any((segment + tag).find(tag) < len(segment) for answer in example.answers for segment in answer):
            return f"step tag: the answer itself contains {tag}"
        pieces = [[segment + tag for segment in answer] for answer in example.answers]
        answers = ["".join(answer) for answer in pieces]
        if self.templated:
            from jinja2.exceptions import TemplateError

            try:
                prompt = self._template(example.prompt, open_answer=True)
                wholes = [self._template((*example.prompt, Message("assistant", a)), open_answer=False) for a in answers]
            except (TemplateError, ValueError) as error:
                return f"chat template refuses: {error}"
            if not all(whole.startswith(prompt) for whole in wholes):  # it opens an answer in another way than it shows a given one
                history = self._template(example.prompt, open_answer=False)
                prompt = history if all(w.startswith(history) for w in wholes) else os.path.commonprefix([prompt, *wholes])
            tails = [whole[len(prompt) :] for whole in wholes]
        else:
            prompt, tails = plain(example.prompt), answers
        ends = []
        for answer, segments, tail in zip(answers, pieces, tails, strict=True):
            stripped = answer.strip()
            at = tail.rfind(stripped) - (len(answer) - len(answer.lstrip()))
            if len(segments) > 1 and stripped not in tail:
                return "chat template changes the answer: its steps cannot be found in what is rendered"
            sizes = np.cumsum([len(segment) for segment in segments])
            ends.append([int(size) + at for size in sizes])
        return _Texts(prompt, tails, ends)

    def _judged(self, example: Example) -> _Texts | str:
        """The pieces where a judge is asked: what comes before, and every answer with the question and the opening of a reply."""
        from jinja2.exceptions import TemplateError

        if any(len(answer) > 1 for answer in example.answers):
            return "judge: its verdict is on whole answers, and these have a target for every step"
        answers = [answer[0] for answer in example.answers]
        try:
            opening, *closing = self._asked(example.prompt, _ANSWER).split(_ANSWER)
            wholes = [self._asked(example.prompt, answer) for answer in answers]
        except (TemplateError, ValueError) as error:
            return f"chat template refuses: {error}"
        middles = [whole[len(opening) : len(whole) - len(closing[-1])] for whole in wholes] if len(closing) == 1 else []
        for answer, whole, middle in zip(answers, wholes, middles, strict=False):
            if whole != opening + middle + closing[0] or middle.strip() != answer.strip():
                middles = []
        if not middles:  # it leaves out the thoughts of earlier turns, say
            return "chat template changes an answer that a question follows: show it in the question, with {answer} in render.judge"
        return _Texts(opening, [middle + closing[0] for middle in middles], [[len(middle)] for middle in middles])

    def _asked(self, prompt: Prompt, answer: str) -> str:
        """A judge's question about an answer, up to where its verdict would stand."""
        judge, turns = self.settings.judge, (*prompt, Message("assistant", answer))
        if "{answer}" in judge:
            question = prompt[0].content if len(prompt) == 1 else plain(prompt).removesuffix("\n\nAssistant: ")
            said = {"{prompt}": question, "{answer}": answer}
            judge, turns = re.sub(r"\{prompt\}|\{answer\}", lambda place: said[place[0]], judge), ()
        turns = (*turns, Message("user", judge))
        return (self._template(turns, open_answer=True) if self.templated else plain(turns).rstrip()) + self.settings.judge_reply

    def _template(self, messages: Prompt, open_answer: bool) -> str:
        turns = [{"role": m.role, "content": m.content} for m in messages]
        return str(self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=open_answer))

    def _group(
        self, example: Example, prompt: list[int], answers: list[tuple[list[int], list[tuple[int, int]]]], text: _Texts
    ) -> Group | str:
        ids: list[list[int]] = []
        places: list[list[int]] = []
        closing: list[int] = []  # tokens of every answer that are never cut off
        for (tokens, offsets), ends in zip(answers, text.ends, strict=True):
            tokens = list(tokens) + self.after
            starts = np.array([start for start, _ in offsets])
            at = [int(np.searchsorted(starts, end, side="left")) - 1 for end in ends[:-1]] + [len(tokens) - 1]
            if self.tag is not None:
                at = [n for n, token in enumerate(tokens) if token == self.tag]
                if len(at) != len(ends):
                    return f"step tag: {len(ends)} steps were rendered with {len(at)} tokens {self.settings.step_tag}"
            if not tokens or at[0] < 0:
                return "no token: a segment has none of its own"
            if len(set(at)) < len(at):
                return "no token: two steps end in one token"
            ids.append(tokens)
            places.append(at)
            closing.append(int((starts >= ends[-1]).sum()) if self.settings.judge else 0)
        before = len(prompt)
        cut = self._fit(prompt, ids, places, closing)
        if isinstance(cut, str):
            return cut
        prompt, ids = cut
        if len(ids) == 2 and ids[0] == ids[1] and example.targets[0] != example.targets[1]:
            was = (
                "after truncation"
                if len(prompt) < before or any(len(i) < len(a[0]) for i, a in zip(ids, answers, strict=True))
                else "in tokens"
            )
            return f"identical {was}: both answers are the same {len(ids[0])} tokens"
        starts = np.cumsum([len(prompt), *map(len, ids)])
        place_K = np.array([start + p for start, at in zip(starts, places, strict=False) for p in at], np.int32)
        names = max(1, len(example.attributes))
        return Group(
            token_T=np.array(prompt + [t for i in ids for t in i], np.int32),
            length_A=np.array([len(prompt), *map(len, ids)], np.int32),
            place_K=np.repeat(place_K, names),
            target_K=np.array(example.targets, np.float32),
            weight=example.weight,
            count_K=np.array(example.counts, np.float32),
            column_K=np.tile(columns, len(place_K)) if len(columns := self._columns(example)) else None,
        )

    def _columns(self, example: Example) -> np.ndarray:
        """Which output of the model each named target is about; nothing where there is one output or the targets have no names."""
        missing = [name for name in example.attributes if name not in self.attributes]
        if self.attributes and not missing:
            return np.array([self.attributes.index(name) for name in example.attributes], np.int32)
        if len(example.attributes) > 1:
            raise DataError(
                f"example {example.id} has targets called {', '.join(example.attributes)}, and the model "
                + (f"knows {', '.join(self.attributes)}" if self.attributes else "gives one score"),
                "label one of them (rayward run label_attributes ... --attributes NAME), or train with --set net.head=attributes",
            )
        return np.empty(0, np.int32)

    def _fit(
        self, prompt: list[int], ids: list[list[int]], places: list[list[int]], closing: list[int]
    ) -> tuple[list[int], list[list[int]]] | str:
        """What fits into max_length, cut as the settings say, with the `closing` tokens of every answer; or a reason with both lengths."""
        limit, longest, how = self.settings.max_length, max(map(len, ids)), self.settings.too_long
        if len(prompt) + longest <= limit:
            return prompt, ids
        too_long = f"too long: {len(prompt):,} + {longest:,} tokens of prompt and answer > {limit:,}"
        fixed = len(self.before) or int(bool(prompt) and prompt[0] == self.tokenizer.bos_token_id)  # BOS or CLS stays
        least = {"reject": limit, "cut_prompt": fixed + 1, "cut_answer": len(prompt), "cut": max(fixed + 1, limit // 4)}[how]
        keep = min(len(prompt), max(least, limit - longest))
        room = limit - keep
        if how == "reject" or room < 1 + max(closing) or (how == "cut_prompt" and room < longest):
            return too_long
        if any(p >= room for at in places for p in (at if self.tag is not None else at[:-1])):
            return too_long + ", and the end of a step would be cut off"
        prompt = prompt[:fixed] + prompt[len(prompt) - (keep - fixed) :]
        for n, tokens in enumerate(ids):
            kept = min(room, len(tokens)) - closing[n]
            ids[n] = tokens[:kept] + tokens[len(tokens) - closing[n] :]
            places[n][-1] = min(places[n][-1], room - 1)
            if len(set(places[n])) < len(places[n]):
                return too_long + ", and a step would be cut off"
        return prompt, ids


_ANSWER = "\ue000answer\ue000"  # stands for an answer, to see where a template puts it


@dataclass(frozen=True)
class _Texts:
    prompt: str
    answers: list[str]  # everything after the prompt
    ends: list[list[int]]  # per answer, the character after each of its segments


def _reject(example: Example, reason: str) -> Rejected:
    return Rejected(source="examples", row=example.id, reason=reason)


def plain(prompt: Prompt) -> str:
    r"""A prompt for tokenizers without a chat template.

    >>> plain((Message("system", "Be brief."), Message("user", "Hi")))
    'System: Be brief.\n\nHuman: Hi\n\nAssistant: '
    """
    names = {"system": "System", "user": "Human", "assistant": "Assistant", "tool": "Tool"}
    return "".join(f"{names[m.role]}: {m.content}\n\n" for m in prompt) + "Assistant: "


def opened(tokenizer: Any, prompt: Prompt, kept: Sequence[str]) -> list[int]:
    """What a policy is to go on from: the tokens of a prompt, the opening of an answer, and the kept steps; no end of text behind them."""
    begun = "".join(kept)
    if getattr(tokenizer, "chat_template", None):
        turns = [{"role": m.role, "content": m.content} for m in prompt]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) + begun
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    tokens = list(tokenizer(plain(prompt) + begun)["input_ids"])
    return tokens[:-1] if tokens[-1:] == [tokenizer.eos_token_id] else tokens


def _special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after a text (CLS and SEP, BOS); an end-of-text token where it puts nothing after."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    dressed = tokenizer("a")["input_ids"]
    at = next((n for n in range(len(dressed)) if dressed[n : n + len(bare)] == bare), 0)
    before, after = list(dressed[:at]), list(dressed[at + len(bare) :])
    if not after and tokenizer.eos_token_id is not None:
        after = [tokenizer.eos_token_id]
    return before, after


def tag_token(tokenizer: Any, tag: str) -> int | None:
    """The one token that a tag is wherever it stands; None if it is several, unknown, or melts into the text beside it."""
    beside = [("", ""), ("1", "1"), ("a", "a"), (".", "\n"), (" ", " "), ("\n\n", "S")]
    rows = tokenizer([before + tag + after for before, after in beside], add_special_tokens=False)["input_ids"]
    alone = rows[0][0] if len(rows[0]) == 1 else None
    return alone if alone not in (None, tokenizer.unk_token_id) and all(row.count(alone) == 1 for row in rows) else None


def step_tag_id(tokenizer: Any, tag: str) -> int:
    """The one token that a step tag is; a tag that is none is an error (training registers it: reward_model.register_tag).

    Raises:
        ModelError: if the tag is not one token wherever it stands, or a token that means something else (end of text, padding).
    """
    known = tag_token(tokenizer, tag)
    if known is None:
        raise ModelError(
            f"step_tag={tag} is not one token of this tokenizer wherever it stands",
            "train with it: render.step_tag registers it as a token",
        )
    if taken := [name for name, text in tokenizer.special_tokens_map.items() if text == tag]:
        raise ModelError(
            f"step_tag={tag} is the {taken[0]} of this tokenizer, which stands elsewhere too", "choose another, e.g. <extra_0>"
        )
    return known


# -------------------------------------------------------------------------------------------------------- groups at rest

_FILE = "groups.arrow"
_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("token_T", pa.list_(pa.int32())),
        ("length_A", pa.list_(pa.int32())),
        ("place_K", pa.list_(pa.int32())),
        ("target_K", pa.list_(pa.float32())),
        ("weight", pa.float64()),
        ("count_K", pa.list_(pa.float32())),
        ("column_K", pa.list_(pa.int32())),  # empty where the targets have no names
    ]
)


class Groups:
    """Rendered examples in an Arrow file, memory-mapped: read by position, shared by all workers of a machine, never held in memory."""

    def __init__(self, folder: Path):
        self.folder = folder
        with pa.memory_map(str(folder / _FILE)) as source:
            table = pa.ipc.open_file(source).read_all()
        self._batches = [_Columns(batch) for batch in table.to_batches() if batch.num_rows]
        self.ids = table["id"]
        self._starts = np.cumsum([0, *(len(b.weight) for b in self._batches)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, n: int) -> Group:
        batch = int(np.searchsorted(self._starts, n, side="right")) - 1
        return self._batches[batch].group(n - int(self._starts[batch]))

    def has_steps(self) -> bool:
        """Whether some answer has more places than its end."""
        return any(len(np.unique(self[n].place_K)) > self[n].answers for n in range(len(self)))

    def has_order(self) -> bool:
        """Whether some example has two different targets, which is what comparing objectives learn from."""
        return any(_differs(self[n]) for n in range(len(self)))

    def target_range(self) -> tuple[float, float]:
        """The least and the largest target."""
        every = [batch.values["target_K"] for batch in self._batches]
        return float(min(v.min() for v in every)), float(max(v.max() for v in every))


def _differs(group: Group) -> bool:
    """Whether two targets about one thing differ."""
    if group.column_K is None:
        return bool(np.ptp(group.target_K) > 0)
    return any(np.ptp(group.target_K[group.column_K == column]) > 0 for column in np.unique(group.column_K))


class _Columns:
    """One record batch as numpy views of the mapped file: nothing is copied."""

    def __init__(self, batch: pa.RecordBatch):
        names = ("token_T", "length_A", "place_K", "target_K", "count_K", "column_K")
        self.offsets = {name: batch[name].offsets.to_numpy() for name in names}
        self.values = {name: batch[name].values.to_numpy() for name in names}
        self.weight = batch["weight"].to_numpy()

    def group(self, n: int) -> Group:
        """Row `n`."""
        parts = {name: self.values[name][at[n] : at[n + 1]] for name, at in self.offsets.items()}
        if not len(parts["column_K"]):
            parts["column_K"] = None
        return Group(**parts, weight=float(self.weight[n]))


def _known(example: Example, group: Group) -> Group | Rejected:
    """The group without the places of which nobody knows the target."""
    if all(example.counts):
        return group
    known = np.array(example.counts) > 0
    if not known.any():
        return _reject(example, "no target: nobody judged any of its segments")
    assert group.count_K is not None
    column_K = None if group.column_K is None else group.column_K[known]
    return replace(group, place_K=group.place_K[known], target_K=group.target_K[known], count_K=group.count_K[known], column_K=column_K)


def write_groups(folder: Path, tables: Iterable[pa.Table], renderer: Renderer, what: str = "example") -> list[Rejected]:
    """Render tables of examples into `folder`; returns what did not become a group."""
    folder.mkdir(parents=True, exist_ok=True)
    rejects: list[Rejected] = []
    written = 0
    with pa.OSFile(str(folder / _FILE), "wb") as sink, pa.ipc.new_file(sink, _SCHEMA) as writer:
        for table in tables:
            for start in range(0, table.num_rows, 4096):
                examples = examples_of(table.slice(start, 4096))
                rows = []
                for example, made in zip(examples, renderer.render(examples), strict=True):
                    made = made if isinstance(made, Rejected) else _known(example, made)
                    if isinstance(made, Rejected):
                        rejects.append(made)
                    else:
                        rows.append({"id": example.id, **made.__dict__})
                written += len(rows)
                if rows:
                    writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=_SCHEMA))
    if not written:
        reasons = ", ".join(sorted({r.category for r in rejects})) or "there were none"
        raise DataError(
            f"no {what} could be rendered ({reasons})",
            "if they are too long: --set render.max_length=... or render.too_long=cut_prompt",
        )
    return rejects
