"""Rendering: token ids are the chat template's, specials stand once, a place ends its segment, what does not fit says so."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import ByT5Tokenizer

from rayward.errors import DataError, ModelError, SettingsError
from rayward.fitting import fit
from rayward.records import Example, Message, Rejected, examples_table
from rayward.rendering import Group, Groups, Renderer, RenderSettings, plain, use_template, write_groups
from rayward.reward_model import ModelSettings, word_tokenizer
from rayward.scoring import Scorer
from tiny import CHATML, FIT, WORDS, byte_tokenizer, classifier, example, question, rendered, toy_dataset, wordpiece_tokenizer

DIALOGUE = (
    Message("system", "Be brief."),
    Message("user", "What is 12 plus 30?"),
    Message("assistant", "It is 42.\n\n"),
    Message("user", "Is it so?"),
)
ANSWERS = [
    "Yes, it is so.",
    "  No!\n\nIt is 43.\n",
    "42",
    "première ☃ \U0001f600 done.",
    "<|im_end|>",
    "\n\nSo the answer is 42.",
]


def words(*examples: Example) -> Any:
    return word_tokenizer(examples, 8192)


def parts(group: Group) -> tuple[list[int], list[list[int]]]:
    """The tokens of the prompt, and of every answer."""
    prompt, *answers = np.split(group.token_T, np.cumsum(group.length_A)[:-1])
    return prompt.tolist(), [a.tolist() for a in answers]


def one(tokenizer: Any, of: Example, **settings: Any) -> Group | Rejected:
    [made] = Renderer(tokenizer, RenderSettings(**settings)).render([of])
    return made


def reason(tokenizer: Any, of: Example, **settings: Any) -> str:
    made = one(tokenizer, of, **settings)
    assert isinstance(made, Rejected)
    assert made.row == of.id
    return made.reason


# ------------------------------------------------------------------------------------------- equal to the chat template


def templated(tokenizer: Any, of: Example) -> list[list[int]]:
    """What transformers makes of the prompt with each answer."""
    turns = [{"role": m.role, "content": m.content} for m in of.prompt]
    conversations = [[*turns, {"role": "assistant", "content": "".join(a)}] for a in of.answers]
    return [tokenizer.apply_chat_template(c, tokenize=True, return_dict=False) for c in conversations]


@pytest.mark.parametrize("prompt", [question(), DIALOGUE])
@pytest.mark.parametrize("kind", ["words", "bytes"])
def test_tokens_are_those_of_the_chat_template(kind: str, prompt: tuple[Message, ...]) -> None:
    of = example(*ANSWERS, prompt=prompt)
    tokenizer = words(of) if kind == "words" else byte_tokenizer()
    [group] = rendered(tokenizer, [of])
    start, answers = parts(group)
    assert [start + a for a in answers] == templated(tokenizer, of)
    if kind == "bytes":  # BOS is in the template, and the tokenizer would put another
        assert [(start + a).count(tokenizer.bos_token_id) for a in answers] == [1] * len(answers)


def test_every_example_is_rendered_in_its_place_however_many_there_are() -> None:
    many = [example(f"{n}", "no", id=f"e{n}") for n in range(600)]
    tokenizer = byte_tokenizer()
    for of, group in zip(many, rendered(tokenizer, many), strict=True):
        prompt, answers = parts(group)
        assert [prompt + a for a in answers] == templated(tokenizer, of)


THINKS = CHATML.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n{% endif %}")


@pytest.mark.parametrize("answer", ["42", "<tool>", "<think>\nhm</think>42", "<|im_end|>"])
def test_a_template_whose_opening_differs_from_its_history_keeps_whole_tokens(answer: str) -> None:
    tokenizer = byte_tokenizer(THINKS)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool>"]})
    of = example(answer)
    prompt, [tokens] = parts(rendered(tokenizer, [of])[0])
    assert [prompt + tokens] == templated(tokenizer, of)


# ------------------------------------------------------------------------------------------------- without a chat template


def test_cls_and_sep_stand_once_around_prompt_and_answer() -> None:
    tokenizer, of = wordpiece_tokenizer(), example("Yes, it is so.", "no")
    prompt, answers = parts(rendered(tokenizer, [of])[0])
    for tokens, [answer] in zip(answers, of.answers, strict=True):
        assert prompt + tokens == tokenizer(plain(of.prompt) + answer)["input_ids"]
        assert [(prompt + tokens).index(t) for t in (tokenizer.cls_token_id, tokenizer.sep_token_id)] == [
            0,
            len(prompt + tokens) - 1,
        ]


def test_bos_and_eos_stand_once_around_prompt_and_answer() -> None:
    tokenizer, of = byte_tokenizer(chat_template=None), example("Yes.", "No, it is not.")
    group = rendered(tokenizer, [of])[0]
    prompt, answers = parts(group)
    for tokens, [answer] in zip(answers, of.answers, strict=True):
        bare = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (plain(of.prompt), answer)]
        assert prompt + tokens == [tokenizer.bos_token_id, *bare[0], *bare[1], tokenizer.eos_token_id]
    assert (group.token_T[group.place_K] == tokenizer.eos_token_id).all()


# ------------------------------------------------------------------------------------------------------ where scores are read


@pytest.mark.parametrize("template", [CHATML, None])
@pytest.mark.parametrize("pad", ["<|pad|>", "</s>", "<|im_end|>", None])
def test_a_score_stands_on_the_last_token_whatever_padding_is(template: str | None, pad: str | None) -> None:
    of = example("It is 42.", "43", "It is not so.\n\n")
    group = rendered(byte_tokenizer(template, pad_token=pad), [of])[0]
    assert group.place_K.tolist() == (np.cumsum(group.length_A)[1:] - 1).tolist()
    assert (group.token_T == rendered(byte_tokenizer(template), [of])[0].token_T).all()


@pytest.mark.parametrize("template", [CHATML, None])
@pytest.mark.parametrize(
    "steps",
    [
        ("10 + 30 = 40.\n\n", "So it is 42.\n\n", "The answer is 42."),  # ".\n\n" is one token, and it ends the step
        ("10 + 30 = 40", ".\n\nSo it is 42"),  # the step ends where a token ends
        ("  Indented.\n", "\tDone.  "),
        ("☃ \U0001f600\n", "première\n", "end"),  # several tokens for one character
    ],
)
def test_a_step_ends_on_the_token_that_holds_its_last_character(template: str | None, steps: tuple[str, ...]) -> None:
    tokenizer, of = byte_tokenizer(template), example(steps)
    group = rendered(tokenizer, [of])[0]
    prompt = int(group.length_A[0])
    for n, place in enumerate(group.place_K[:-1], 1):
        assert tokenizer.decode(group.token_T[prompt : place + 1]) == "".join(steps[:n])
    assert group.place_K[-1] == len(group.token_T) - 1


def test_a_step_cut_inside_a_token_ends_on_that_token() -> None:
    tokenizer = byte_tokenizer()
    group = rendered(tokenizer, [example(("10 + 30 = 40.", "\n\nSo it is 42."))])[0]
    assert tokenizer.decode(group.token_T[group.place_K[0]]) == ".\n\n"


def test_two_steps_that_end_in_one_token_are_rejected() -> None:
    assert reason(byte_tokenizer(), example(("40.", "\n", "\nSo."))) == "no token: two steps end in one token"


STRIPS = CHATML.replace("m['content']", "m['content'].strip()")
SHOUTS = CHATML.replace("m['content']", "m['content'].upper()")


def test_a_template_that_strips_answers_still_finds_the_steps() -> None:
    tokenizer = byte_tokenizer(STRIPS)
    of = example(("\n 10 + 30 = 40.\n\n", "So it is 42.\n\n"), "42 \n")
    group = rendered(tokenizer, [of])[0]
    prompt, answers = parts(group)
    assert [prompt + a for a in answers] == templated(tokenizer, of)
    assert tokenizer.decode(group.token_T[len(prompt) : group.place_K[0] + 1]) == "10 + 30 = 40.\n\n"
    assert group.place_K[1:].tolist() == (np.cumsum(group.length_A)[1:] - 1).tolist()


def test_a_template_that_changes_answers_cannot_have_steps_but_may_have_answers() -> None:
    assert reason(byte_tokenizer(SHOUTS), example(("a.\n", "b"))).startswith("chat template changes the answer: ")
    of = example("a", "b")
    prompt, answers = parts(rendered(byte_tokenizer(SHOUTS), [of])[0])
    assert [prompt + a for a in answers] == templated(byte_tokenizer(SHOUTS), of)


def test_a_template_that_refuses_is_a_reason() -> None:
    refuses = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system please') }}{% endif %}" + CHATML
    made = list(Renderer(byte_tokenizer(refuses), RenderSettings()).render([example("a", prompt=DIALOGUE), example("b", "c")]))
    assert isinstance(made[0], Rejected)
    assert made[0].reason == "chat template refuses: no system please"
    assert isinstance(made[1], Group)


def test_a_tokenizer_that_knows_no_characters_is_refused() -> None:
    with pytest.raises(ModelError, match="use the model's fast tokenizer"):
        Renderer(ByT5Tokenizer(), RenderSettings())


# ------------------------------------------------------------------------------------------------------------ what is too long

LONG = "The quick brown fox jumps over the lazy dog! " * 3


def lengths(tokenizer: Any, of: Example) -> list[int]:
    return rendered(tokenizer, [of])[0].length_A.tolist()


def test_too_long_is_rejected_with_both_lengths() -> None:
    tokenizer, of = byte_tokenizer(), example("42", LONG)
    prompt, _, longest = lengths(tokenizer, of)
    limit = prompt + longest
    assert isinstance(one(tokenizer, of, max_length=limit), Group)
    expected = f"too long: {prompt} + {longest} tokens of prompt and answer > {limit - 1}"
    assert reason(tokenizer, of, max_length=limit - 1) == expected
    assert reason(tokenizer, of, max_length=longest, too_long="cut_prompt").startswith("too long: ")  # nothing of it would be left
    assert reason(tokenizer, of, max_length=prompt, too_long="cut_answer").startswith("too long: ")


@pytest.mark.parametrize("kind", ["chat", "cls", "bos"])
def test_cut_prompt_keeps_the_first_token_the_end_of_the_prompt_and_the_answers(kind: str) -> None:
    tokenizer = {"chat": byte_tokenizer, "cls": wordpiece_tokenizer, "bos": lambda: byte_tokenizer(None)}[kind]()
    of = example("42", "43", prompt=question(LONG))
    prompt, answers = parts(rendered(tokenizer, [of])[0])
    longest = max(map(len, answers))
    cut = one(tokenizer, of, max_length=longest + 10, too_long="cut_prompt")
    assert isinstance(cut, Group)
    start, ends = parts(cut)
    assert (start, ends) == (prompt[:1] + prompt[-9:], answers)  # BOS or CLS, and the last nine tokens
    assert cut.place_K.tolist() == (np.cumsum(cut.length_A)[1:] - 1).tolist()


def test_cut_answer_keeps_the_prompt_and_the_start_of_every_answer() -> None:
    tokenizer, of = byte_tokenizer(), example("42", LONG)
    prompt, answers = parts(rendered(tokenizer, [of])[0])
    cut = one(tokenizer, of, max_length=len(prompt) + 12, too_long="cut_answer")
    assert isinstance(cut, Group)
    assert parts(cut) == (prompt, [answers[0][:12], answers[1][:12]])
    assert cut.place_K.tolist() == (np.cumsum(cut.length_A)[1:] - 1).tolist()


def test_a_pair_that_truncation_made_equal_is_rejected_saying_so() -> None:
    tokenizer, of = byte_tokenizer(), example(LONG + "yes", LONG + "no")
    prompt = lengths(tokenizer, of)[0]
    why = reason(tokenizer, of, max_length=prompt + 12, too_long="cut_answer")
    assert why == "identical after truncation: both answers are the same 12 tokens"
    assert reason(byte_tokenizer(STRIPS), example("42", "42 ")).startswith("identical in tokens: ")
    assert isinstance(one(byte_tokenizer(STRIPS), example("42", "42 ", targets=(1.0, 1.0))), Group)  # nobody says they differ


def test_a_step_that_would_be_cut_off_is_rejected() -> None:
    tokenizer, of = byte_tokenizer(), example(("First we add the tens.\n", "Then the ones.\n", LONG))
    group = rendered(tokenizer, [of])[0]
    last_end = int(group.place_K[1]) + 1  # tokens up to the end of the second step
    cut = one(tokenizer, of, max_length=last_end + 1, too_long="cut_answer")
    assert isinstance(cut, Group)
    assert cut.place_K.tolist() == [*group.place_K[:2].tolist(), last_end]
    for limit in (last_end - 1, last_end):  # the second step would lose its end, the third would have no token
        assert "step would be cut off" in reason(tokenizer, of, max_length=limit, too_long="cut_answer")


# ------------------------------------------------------------------------------------------------------------ groups at rest


def equal(a: Group, b: Group) -> bool:
    names = ("token_T", "length_A", "place_K", "target_K")
    return a.weight == b.weight and all(np.array_equal(getattr(a, n), getattr(b, n)) for n in names)


def test_groups_read_back_as_they_were_written_over_several_batches(tmp_path: Path) -> None:
    many = [example(("12.\n", f"So {n}"), f"{n + 1}", id=f"e{n}", weight=1 / (n + 1)) for n in range(5000)]
    too_long = example(LONG * 20, "b", id="long")
    tokenizer = byte_tokenizer()
    renderer = Renderer(tokenizer, RenderSettings(max_length=256))
    tables = [examples_table(many[:4500]), examples_table([]), examples_table([too_long, *many[4500:]])]
    rejects = write_groups(tmp_path, tables, renderer)
    assert [r.row for r in rejects] == ["long"]
    groups = Groups(tmp_path)
    assert groups.ids.to_pylist() == [e.id for e in many]
    for n in (0, 1, 4095, 4096, 4499, 4500, 4999):
        [made] = renderer.render([many[n]])
        assert isinstance(made, Group)
        assert equal(groups[n], made), n
    assert len(groups) == 5000
    assert groups.target_range() == (1.0, 3.0)
    assert groups.has_order()


def test_groups_are_mapped_from_the_file_and_not_read_into_memory(tmp_path: Path) -> None:
    many = [example(LONG, f"{n}", id=f"e{n}") for n in range(4200)]  # more than one record batch
    write_groups(tmp_path, [examples_table(many)], Renderer(byte_tokenizer(), RenderSettings()))
    tracemalloc.start()
    groups = Groups(tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    tokens = sum(len(groups[n].token_T) for n in range(len(groups)))
    assert peak < 4 * tokens / 2  # bytes; a token is four of them


def test_nothing_rendered_is_an_error_with_the_reasons(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"too long(.|\n)*render.max_length"):
        write_groups(tmp_path, [examples_table([example(LONG, "b")])], Renderer(byte_tokenizer(), RenderSettings(max_length=8)))


# ------------------------------------------------------------------------------------------------------- a template of one's own

OWN = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


def test_a_chat_template_of_ones_own_is_used_and_stays_with_the_model(tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text(OWN, encoding="utf-8")
    classifier("qwen3", vocabulary=WORDS).save_pretrained(tmp_path / "base")
    byte_tokenizer(chat_template=None).save_pretrained(tmp_path / "base")
    toy_dataset("pairs", tmp_path, problems=6)
    render = RenderSettings(chat_template=str(tmp_path / "own.jinja"))
    given = {"examples": str(tmp_path / "pairs"), "model": str(tmp_path / "base"), "net": ModelSettings(), "render": render}
    fitted = fit(replace(FIT, **given), str(tmp_path / "fit"))
    (tmp_path / "own.jinja").unlink()
    renderer = Scorer.load(str(fitted.model)).renderer
    [group] = [g for g in renderer.render([example("Yes.")]) if isinstance(g, Group)]
    assert renderer.tokenizer.decode(group.token_T).startswith("<user>")
    assert "<assistant>Yes." in renderer.tokenizer.decode(group.token_T)


@pytest.mark.parametrize(
    ("text", "said"),
    [(None, "cannot be used"), ("{% for m in messages %}", "cannot be used"), ("{{ messages[0]['content'] }}", "leaves out")],
)
def test_a_chat_template_that_is_none_is_refused(text: str | None, said: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "own.jinja").write_text(text, encoding="utf-8")
    tokenizer = byte_tokenizer()
    with pytest.raises(SettingsError, match=said):
        use_template(tokenizer, str(tmp_path / "own.jinja"))
    assert tokenizer.chat_template == byte_tokenizer().chat_template
