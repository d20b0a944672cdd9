"""What trainers read: columns mean what each trainer takes them to mean, and what a format cannot say is refused with the reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from driving import done, here
from rayward.formats import FORMATS, PROMPT_COLUMNS, UNREAD, RawRow, make_format, parse, recognise
from rayward.formats.trainers import HELPSTEER_ATTRIBUTES, STEERLM_ATTRIBUTES, STEERLM_SYSTEM
from rayward.labels import AttributeSettings, attributes
from rayward.records import BadRecord, Example, Message, Rejected, Rollout

Row = dict[str, Any]


def user(text: str) -> Row:
    return {"role": "user", "content": text}


def assistant(text: str) -> Row:
    return {"role": "assistant", "content": text}


def system(text: str) -> Row:
    return {"role": "system", "content": text}


def human(text: str) -> Row:
    return {"from": "human", "value": text}


def gpt(text: str) -> Row:
    return {"from": "gpt", "value": text}


def read(name: str, row: object) -> list[Rollout]:
    found = parse(FORMATS[name], RawRow("f.jsonl", 1, json.dumps(row).encode()))
    assert not isinstance(found, Rejected), found.reason
    return found


def said(rollout: Rollout) -> str:
    """The prompt in one line: `s`, `u`, `a`, `t` and the text of every turn."""
    return " ".join(f"{m.role[0]}:{m.content}" for m in rollout.prompt)


def pair(prompt: tuple[tuple[str, str], ...] = (("user", "2+2?"),), targets: tuple[float, ...] = (3.0, 1.0), **more: Any) -> Example:
    fields: dict[str, Any] = {"answers": (("4",), ("5",)), "counts": (1, 1)} | more
    return Example(id="e", prompt=tuple(Message(*m) for m in prompt), targets=targets, **fields)


# ------------------------------------------------------------------------------------------------------------------ reading

TALK = [user("Hi"), assistant("Hello!"), user("2+2?")]
PAIRS: dict[str, tuple[str, Row, str, list[tuple[str, float]]]] = {
    "openrlhf, a margin": (
        "openrlhf",
        {"prompt": TALK, "chosen": [assistant("4")], "rejected": [assistant("5")], "margin": 0.5},
        "u:Hi a:Hello! u:2+2?",
        [("4", 0.5), ("5", 0.0)],
    ),
    "openrlhf, whole conversations, margin 0 is none": (
        "openrlhf",
        {"chosen": [*TALK, assistant("4")], "rejected": [*TALK, assistant("5")], "margin": 0},
        "u:Hi a:Hello! u:2+2?",
        [("4", 1.0), ("5", 0.0)],
    ),
    "openrlhf, texts": ("openrlhf", {"prompt": "2+2?", "chosen": "4", "rejected": "5"}, "u:2+2?", [("4", 1.0), ("5", 0.0)]),
    "ms_swift, a text": (
        "ms_swift",
        {"messages": [system("Be brief."), *TALK, assistant("4")], "rejected_response": "5", "margin": 2},
        "s:Be brief. u:Hi a:Hello! u:2+2?",
        [("4", 2.0), ("5", 0.0)],
    ),
    "ms_swift, a message": (
        "ms_swift",
        {"messages": [user("2+2?"), assistant("4")], "rejected_response": [assistant("5")]},
        "u:2+2?",
        [("4", 1.0), ("5", 0.0)],
    ),
    "ms_swift, conversations": (
        "ms_swift",
        {"messages": [user("2+2?"), assistant("4")], "rejected_messages": [user("2+2?"), assistant("5")], "rejected_response": None},
        "u:2+2?",
        [("4", 1.0), ("5", 0.0)],
    ),
    "llama_factory, all columns": (
        "llama_factory",
        {"instruction": "Add:", "input": "2 2", "chosen": "4", "rejected": "5", "system": "Be brief.", "history": [["Hi", "Hello!"]]},
        "s:Be brief. u:Hi a:Hello! u:Add:\n2 2",
        [("4", 1.0), ("5", 0.0)],
    ),
    "llama_factory, few columns": (
        "llama_factory",
        {"instruction": "2+2?", "input": "", "chosen": "4", "rejected": "5", "system": None},
        "u:2+2?",
        [("4", 1.0), ("5", 0.0)],
    ),
    "llama_factory_sharegpt, a tool": (
        "llama_factory_sharegpt",
        {
            "conversations": [human("2+2?"), {"from": "function_call", "value": "add(2, 2)"}, {"from": "observation", "value": "4.0"}],
            "chosen": gpt("4"),
            "rejected": gpt("5"),
            "system": "Be brief.",
        },
        "s:Be brief. u:2+2? a:add(2, 2) t:4.0",
        [("4", 1.0), ("5", 0.0)],
    ),
    "llama_factory_sharegpt, the message is the system's, not the column": (
        "llama_factory_sharegpt",
        {
            "conversations": [{"from": "system", "value": "Be brief."}, human("2+2?")],
            "chosen": gpt("4"),
            "rejected": gpt("5"),
            "system": "Be long.",
        },
        "s:Be brief. u:2+2?",
        [("4", 1.0), ("5", 0.0)],
    ),
    "llama_factory_sharegpt, openai tags": (
        "llama_factory_sharegpt",
        {"messages": [user("2+2?")], "chosen": assistant("4"), "rejected": assistant("5")},
        "u:2+2?",
        [("4", 1.0), ("5", 0.0)],
    ),
    "axolotl": (
        "axolotl",
        {"system": "Be brief.", "input": "2+2?", "chosen": "4", "rejected": "5", "generations": ["4", "5"]},
        "s:Be brief. u:2+2?",
        [("4", 1.0), ("5", 0.0)],
    ),
    "axolotl, no system": ("axolotl", {"system": "", "input": "2+2?", "chosen": "4", "rejected": "5"}, "u:2+2?", [("4", 1.0), ("5", 0.0)]),
}


@pytest.mark.parametrize("case", PAIRS)
def test_a_pair_is_read(case: str) -> None:
    name, row, prompt, expected = PAIRS[case]
    found = read(name, row)
    assert [(r.text, r.reward) for r in found] == expected
    assert {said(r) for r in found} == {prompt}
    assert len({r.judgement for r in found}) == 1


def completions(*ranked: tuple[Any, ...]) -> list[Row]:
    names = ("rank", "completion", "reward")
    return [dict(zip(names, (c[0], [assistant(c[1])], *c[2:]), strict=False)) for c in ranked]


@pytest.mark.parametrize(
    ("ranked", "rewards"),
    [
        (((1, "b"), (0, "a")), [-1.0, 0.0]),  # the order of the row is kept
        (((0, "a"), (0, "b"), (2, "c")), [0.0, 0.0, -2.0]),  # a tie
        (((0, "a", 0.9), (1, "b", 0.9), (2, "c", -3)), [0.9, 0.9, -3.0]),  # all have rewards
        (((0, "a", 0.9), (1, "b", None)), [0.0, -1.0]),  # not all have: one scale for all
    ],
)
def test_nemo_rl_ranks_and_rewards(ranked: tuple[tuple[Any, ...], ...], rewards: list[float]) -> None:
    found = read("nemo_rl", {"context": [user("2+2?")], "completions": completions(*ranked)})
    assert [r.reward for r in found] == rewards
    assert [r.text for r in found] == [c[1] for c in ranked]
    assert len({r.judgement for r in found}) == 1


@pytest.mark.parametrize(("label", "correct"), [(True, True), (False, False), (1, True), (0, False)])
def test_trl_unpaired_labels_are_outcomes(label: object, correct: bool) -> None:
    [rollout] = read("trl_unpaired", {"prompt": "2+2?", "completion": "4", "label": label})
    assert (rollout.text, rollout.correct, rollout.reward, rollout.judgement) == ("4", correct, float(correct), "graded")


def nemo_text(*turns: str) -> str:
    return "".join(f"<extra_id_{int(who != 'System')}>{who}\n{text}\n" for who, text in zip(turns[::2], turns[1::2], strict=True))


ONE_TURN = nemo_text("System", STEERLM_SYSTEM, "User", "2+2?", "Assistant", "4") + "<extra_id_2>"


@pytest.mark.parametrize(
    ("label", "rewards"),
    [
        ([4, 3, 2, 1, 0], dict(zip(HELPSTEER_ATTRIBUTES, [4.0, 3.0, 2.0, 1.0, 0.0], strict=True))),
        ([-100, 1, -100, -100, 4, -100, -100, -100, -100], {"toxicity": 1.0, "helpfulness": 4.0}),
        ([0.5, -100.0, -3], {"attribute_0": 0.5, "attribute_2": -3.0}),
    ],
)
def test_nemo_aligner_labels_name_attributes_by_their_number(label: list[float], rewards: dict[str, float]) -> None:
    [rollout] = read("nemo_aligner_regression", {"text": ONE_TURN, "label": label})
    assert rollout.rewards == rewards
    assert rollout.reward is None


@pytest.mark.parametrize(
    ("text", "prompt", "answer"),
    [
        (ONE_TURN, "u:2+2?", "4"),  # SteerLM's own system prompt belongs to the template
        (nemo_text("System", "Be brief.", "User", "2+2?", "Assistant", "4"), "s:Be brief. u:2+2?", "4"),
        (nemo_text("User", "a\n\nb\n", "Assistant", "c", "User", "d", "Assistant", "4\n"), "u:a\n\nb\n a:c u:d", "4\n"),
    ],
)
def test_nemo_aligner_texts_are_cut_into_turns(text: str, prompt: str, answer: str) -> None:
    [rollout] = read("nemo_aligner_regression", {"text": text, "label": [1.0]})
    assert (said(rollout), rollout.text) == (prompt, answer)


def test_every_rated_turn_of_a_steerlm_row_is_an_answer() -> None:
    turns = [
        {"from": "prompter", "value": "Hi", "label": "quality:0"},
        {"from": "Assistant", "value": "Hello!", "label": "quality:3.5,toxicity:0"},
        {"from": "prompter", "value": "2+2?"},
        {"from": "Assistant", "value": "4", "label": ""},
        {"from": "prompter", "value": "Sure?"},
        {"from": "Assistant", "value": "Yes.", "label": "humor:1"},
    ]
    found = read("steerlm", {"conversations": turns, "system": STEERLM_SYSTEM, "mask": "prompter", "type": "TEXT_TO_VALUE"})
    assert [(said(r), r.text, r.rewards) for r in found] == [
        ("u:Hi", "Hello!", {"quality": 3.5, "toxicity": 0.0}),
        ("u:Hi a:Hello! u:2+2? a:4 u:Sure?", "Yes.", {"humor": 1.0}),
    ]


SWIFT: Row = {"messages": [user("2+2?"), assistant("4")], "rejected_response": "5"}
ALPACA: Row = {"instruction": "2+2?", "chosen": "4", "rejected": "5"}
SHAREGPT: Row = {"conversations": [human("2+2?")], "chosen": gpt("4"), "rejected": gpt("5")}
AXOLOTL: Row = {"system": "", "input": "2+2?", "chosen": "4", "rejected": "5"}
NEMO: Row = {"context": [user("2+2?")], "completions": completions((0, "4"), (1, "5"))}
UNPAIRED: Row = {"prompt": "2+2?", "completion": "4", "label": True}
REGRESSION: Row = {"text": ONE_TURN, "label": [4, 3, 2, 1, 0]}
STEERLM: Row = {
    "conversations": [{"from": "User", "value": "2+2?"}, {"from": "Assistant", "value": "4", "label": "quality:4"}],
    "system": "Be brief.",
    "mask": "User",
}
BAD: list[tuple[str, Row, str]] = [
    ("openrlhf", {"prompt": "2+2?", "chosen": "4", "rejected": "5", "margin": -1}, "margin not positive"),
    ("openrlhf", {"prompt": "2+2?", "chosen": "4", "rejected": "5", "margin": "0"}, "wrong type"),
    ("openrlhf", {"prompt": "2+2?", "chosen": "4", "rejected": "4"}, "identical answers"),
    ("ms_swift", SWIFT | {"rejected_response": None}, "missing key"),
    ("ms_swift", SWIFT | {"rejected_response": "4"}, "identical answers"),
    ("ms_swift", SWIFT | {"rejected_response": [user("5")]}, "wrong role"),
    ("ms_swift", SWIFT | {"rejected_response": [assistant("5"), user("Why?")]}, "several turns"),
    ("ms_swift", SWIFT | {"rejected_messages": [user("3+3?"), assistant("5")]}, "diverging prefix"),
    ("ms_swift", SWIFT | {"messages": [user("2+2?")]}, "wrong role"),
    ("ms_swift", SWIFT | {"messages": []}, "empty"),
    ("ms_swift", SWIFT | {"margin": 0}, "margin not positive"),
    ("llama_factory", ALPACA | {"instruction": ""}, "empty"),
    ("llama_factory", ALPACA | {"chosen": ["4", "5"]}, "wrong type"),
    ("llama_factory", ALPACA | {"history": [["Hi"]]}, "wrong type"),
    ("llama_factory", ALPACA | {"history": [["Hi", 3]]}, "wrong type"),
    ("llama_factory", ALPACA | {"history": "Hi"}, "wrong type"),
    ("llama_factory", ALPACA | {"system": 3}, "wrong type"),
    ("llama_factory_sharegpt", SHAREGPT | {"chosen": "4"}, "wrong type"),
    ("llama_factory_sharegpt", SHAREGPT | {"chosen": human("4")}, "wrong role"),
    ("llama_factory_sharegpt", SHAREGPT | {"conversations": []}, "empty"),
    ("llama_factory_sharegpt", SHAREGPT | {"conversations": [{"from": "narrator", "value": "x"}]}, "wrong role"),
    ("llama_factory_sharegpt", SHAREGPT | {"conversations": [{"from": ["human"], "value": "x"}]}, "wrong type"),
    ("llama_factory_sharegpt", SHAREGPT | {"conversations": [{"from": "human"}]}, "wrong type"),
    ("axolotl", AXOLOTL | {"input": None}, "missing key"),
    ("axolotl", AXOLOTL | {"input": [user("2+2?")]}, "wrong type"),
    ("nemo_rl", NEMO | {"completions": completions((0, "4"))}, "too few answers"),
    ("nemo_rl", NEMO | {"completions": completions((0, "4", -1.0), (1, "5", 1.0))}, "contradiction"),
    ("nemo_rl", NEMO | {"completions": completions((None, "4"), (1, "5"))}, "missing key"),
    ("nemo_rl", NEMO | {"completions": completions(("best", "4"), (1, "5"))}, "wrong type"),
    ("nemo_rl", NEMO | {"completions": [{"rank": 0, "completion": [user("Why?"), assistant("4")]}, *NEMO["completions"]]}, "several turns"),
    ("nemo_rl", NEMO | {"completions": ["4", "5"]}, "wrong type"),
    ("nemo_rl", NEMO | {"context": []}, "empty"),
    ("trl_unpaired", UNPAIRED | {"label": None}, "missing key"),
    ("trl_unpaired", UNPAIRED | {"label": "yes"}, "wrong type"),
    ("trl_unpaired", UNPAIRED | {"label": 0.5}, "wrong type"),
    ("trl_unpaired", UNPAIRED | {"completion": ""}, "empty"),
    ("nemo_aligner_regression", REGRESSION | {"label": [-100.0] * 9}, "no reward"),
    ("nemo_aligner_regression", REGRESSION | {"label": []}, "no reward"),
    ("nemo_aligner_regression", REGRESSION | {"label": [1, "2"]}, "wrong type"),
    ("nemo_aligner_regression", REGRESSION | {"label": {"quality": 1}}, "wrong type"),
    ("nemo_aligner_regression", REGRESSION | {"text": "User: 2+2?"}, "not a transcript"),
    ("nemo_aligner_regression", REGRESSION | {"text": nemo_text("User", "2+2?")}, "not a transcript"),
    ("nemo_aligner_regression", REGRESSION | {"text": nemo_text("Assistant", "Hi", "User", "2+2?")}, "wrong role"),
    ("steerlm", STEERLM | {"conversations": [{"from": "User", "value": "2+2?", "label": "quality:4"}]}, "no reward"),
    ("steerlm", STEERLM | {"conversations": [*STEERLM["conversations"], {"from": "User", "value": None}]}, "wrong type"),
    *(
        ("steerlm", STEERLM | {"conversations": [human("2+2?"), {"from": "Assistant", "value": "4", "label": label}]}, category)
        for label, category in (
            ("quality", "wrong value"),
            ("quality:good", "wrong value"),
            (":4", "empty"),
            ("quality:nan", "not finite"),
            ({"quality": 4}, "wrong type"),
        )
    ),
]


@pytest.mark.parametrize(("name", "row", "category"), BAD)
def test_a_bad_row_is_rejected(name: str, row: Row, category: str) -> None:
    found = parse(FORMATS[name], RawRow("f.jsonl", 1, json.dumps(row).encode()))
    assert isinstance(found, Rejected), found
    assert found.category == category


# ------------------------------------------------------------------------------------------------------------------ writing

THREE_TURNS = (("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello!"), ("user", "2+2?"))
K_WISE = pair(answers=(("4",), ("5",), ("four",), ("?",)), targets=(1.0, -0.5, 1.0, -7.0), counts=(1,) * 4)
RATED = pair(
    answers=(("4",), ("5",)), targets=(4.0, 0.0, 1.5, 2.0), counts=(3, 0, 1, 1), attributes=("helpfulness", "verbosity"), prompt=THREE_TURNS
)
WRITTEN: list[tuple[str, Example, list[Row]]] = [
    (
        "openrlhf",
        pair(THREE_TURNS),
        [
            {
                "chosen": [system("Be brief."), *TALK, assistant("4")],
                "rejected": [system("Be brief."), *TALK, assistant("5")],
                "margin": 2.0,
            }
        ],
    ),
    ("ms_swift", pair(targets=(0.0, 0.5)), [{"messages": [user("2+2?"), assistant("5")], "rejected_response": "4", "margin": 0.5}]),
    (
        "llama_factory",
        pair(THREE_TURNS),
        [{"instruction": "2+2?", "input": "", "chosen": "4", "rejected": "5", "system": "Be brief.", "history": [["Hi", "Hello!"]]}],
    ),
    (
        "llama_factory_sharegpt",
        pair(THREE_TURNS),
        [{"conversations": [human("Hi"), gpt("Hello!"), human("2+2?")], "chosen": gpt("4"), "rejected": gpt("5"), "system": "Be brief."}],
    ),
    (
        "llama_factory_sharegpt",
        pair((("user", "2+2?"), ("assistant", "add(2, 2)"), ("tool", "4.0"))),
        [
            {
                "conversations": [human("2+2?"), gpt("add(2, 2)"), {"from": "observation", "value": "4.0"}],
                "chosen": gpt("4"),
                "rejected": gpt("5"),
                "system": "",
            }
        ],
    ),
    ("axolotl", pair(), [{"system": "", "input": "2+2?", "chosen": "4", "rejected": "5"}]),
    (
        "nemo_rl",
        K_WISE,
        [
            {
                "context": [user("2+2?")],
                "completions": completions((0, "4", 1.0), (1, "5", -0.5), (0, "four", 1.0), (2, "?", -7.0)),
                "task_name": "preference",
            }
        ],
    ),
    (
        "trl_unpaired",
        pair(targets=(1.0, 0.0)),
        [
            {"prompt": [user("2+2?")], "completion": [assistant("4")], "label": True},
            {"prompt": [user("2+2?")], "completion": [assistant("5")], "label": False},
        ],
    ),
    (
        "nemo_aligner_regression",
        RATED,
        [
            {
                "text": nemo_text("System", "Be brief.", "User", "Hi", "Assistant", "Hello!", "User", "2+2?", "Assistant", text)
                + "<extra_id_2>",
                "label": label,
            }
            for text, label in (("4", [4.0, -100.0, -100.0, -100.0, -100.0]), ("5", [1.5, -100.0, -100.0, -100.0, 2.0]))
        ],
    ),
    (
        "nemo_aligner_regression",
        pair(answers=(("4",),), targets=(2.0, 1.0), attributes=("humor", "helpfulness")),
        [{"text": ONE_TURN, "label": [-100.0, -100.0, 2.0, -100.0, 1.0, -100.0, -100.0, -100.0, -100.0]}],
    ),
    (
        "nemo_aligner_regression",
        pair(answers=(("4",),), targets=(2.0, 1.0), attributes=("attribute_1", "attribute_0")),
        [{"text": ONE_TURN, "label": [1.0, 2.0]}],
    ),
    (
        "steerlm",
        pair(answers=(("4",),), targets=(4.0, 0.5), attributes=("helpfulness", "verbosity")),
        [
            {
                "conversations": [
                    {"from": "User", "value": "2+2?", "label": None},
                    {"from": "Assistant", "value": "4", "label": "helpfulness:4.0,verbosity:0.5"},
                ],
                "system": STEERLM_SYSTEM,
                "mask": "User",
                "type": "VALUE_TO_TEXT",
            }
        ],
    ),
]


@pytest.mark.parametrize(("name", "example", "rows"), WRITTEN)
def test_an_example_is_written_as_the_trainer_reads_it(name: str, example: Example, rows: list[Row]) -> None:
    write = FORMATS[name].write
    assert write is not None
    assert write(example) == rows
    found = [r for row in rows for r in read(name, row)]
    assert {r.prompt for r in found} == {example.prompt}
    assert {r.text for r in found} == {answer[0] for answer in example.answers}


@pytest.mark.parametrize(
    ("name", "example", "category"),
    [
        *(
            (name, pair(targets=(1.0, 1.0)), "a tie")
            for name in ("openrlhf", "ms_swift", "llama_factory", "llama_factory_sharegpt", "axolotl")
        ),
        *((name, K_WISE, "not a pair") for name in ("openrlhf", "ms_swift", "llama_factory", "llama_factory_sharegpt", "axolotl")),
        *((name, RATED, "not a pair") for name in ("openrlhf", "ms_swift", "llama_factory", "llama_factory_sharegpt", "axolotl")),
        ("axolotl", pair(THREE_TURNS), "several turns"),
        ("axolotl", pair((("tool", "4.0"),)), "wrong role"),
        ("axolotl", pair((("system", ""), ("user", "2+2?"))), "empty"),
        ("llama_factory", pair((("system", ""), ("user", "2+2?"))), "empty"),
        ("llama_factory", pair((("user", "a"), ("user", "b"))), "wrong role"),
        ("llama_factory", pair((("user", "a"), ("assistant", "b"), ("tool", "c"))), "wrong role"),
        ("llama_factory", pair((("system", "a"),)), "wrong role"),
        ("llama_factory_sharegpt", pair((("user", "a"), ("assistant", "b"))), "wrong role"),
        ("llama_factory_sharegpt", pair((("user", "a"), ("system", "b"), ("user", "c"))), "wrong role"),
        ("nemo_rl", RATED, "attributes"),
        ("nemo_rl", pair(answers=(("2+2",), ("4", "!")), targets=(1.0, 1.0, 0.0), counts=(1, 1, 1)), "steps"),
        ("nemo_rl", pair(counts=(1, 0)), "no target"),
        ("nemo_rl", pair(answers=(("4",),), targets=(1.0,), counts=(1,)), "too few answers"),
        ("trl_unpaired", pair(targets=(0.5, 1.0)), "not outcomes"),
        ("trl_unpaired", RATED, "attributes"),
        ("trl_unpaired", pair(targets=(1.0, 0.0), counts=(1, 0)), "no target"),
        ("nemo_aligner_regression", pair(), "not ratings"),
        ("nemo_aligner_regression", pair(attributes=("quality", "wit"), answers=(("4",),)), "attributes"),
        ("nemo_aligner_regression", pair(attributes=("quality",), targets=(-100.0, 1.0)), "no reward"),
        ("nemo_aligner_regression", pair(attributes=("quality",), counts=(0, 1)), "no reward"),
        ("nemo_aligner_regression", pair((("user", "<extra_id_1>?"),), attributes=("quality",)), "invalid text"),
        ("nemo_aligner_regression", pair((("tool", "4.0"),), attributes=("quality",)), "wrong role"),
        ("steerlm", pair(attributes=("quality:overall",)), "attributes"),
        ("steerlm", pair((("system", ""), ("user", "2+2?")), attributes=("quality",)), "empty"),
        ("steerlm", K_WISE, "not ratings"),
    ],
)
def test_what_a_format_cannot_say_is_refused(name: str, example: Example, category: str) -> None:
    write = FORMATS[name].write
    assert write is not None
    with pytest.raises(BadRecord, match=f"^{category}:"):
        write(example)


def test_turns_that_end_in_line_breaks_come_back_whole() -> None:
    example = pair((("system", ""), ("user", "2+2?\n\n")), answers=((" 4\n",),), targets=(1.0,), counts=(1,), attributes=("quality",))
    write = FORMATS["nemo_aligner_regression"].write
    assert write is not None
    [rollout] = read("nemo_aligner_regression", write(example)[0])
    assert (rollout.prompt, rollout.text) == (example.prompt, " 4\n")


@pytest.mark.parametrize("name", ["nemo_aligner_regression", "steerlm"])
def test_ratings_come_back_with_the_missing_ones_masked(name: str) -> None:
    settings = AttributeSettings(STEERLM_ATTRIBUTES)
    ratings = [{"quality": 3.0, "verbosity": 0.1}, {"humor": 1 / 3}]
    rollouts = [
        Rollout(id=str(n), prompt=(Message("user", "2+2?"),), steps=(f"answer {n}",), rewards=r, judgement="graded")
        for n, r in enumerate(ratings)
    ]
    [example] = attributes(rollouts, settings)
    write = FORMATS[name].write
    assert isinstance(example, Example)
    assert write is not None
    found = [r for n, row in enumerate(write(example)) for r in FORMATS[name].read(row, str(n))]
    [again] = attributes(found, settings)
    assert isinstance(again, Example)
    assert (again.prompt, again.answers, again.targets, again.counts) == (example.prompt, example.answers, example.targets, example.counts)


# -------------------------------------------------------------------------------------------------------------- recognition


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("preference", {"chosen": [*TALK, assistant("4")], "rejected": [*TALK, assistant("5")], "margin": 0.0}),  # openrlhf: by name only
        ("preference", {"prompt": "2+2?", "chosen": "4", "rejected": "5"}),
        ("ms_swift", SWIFT),
        ("llama_factory", ALPACA),
        ("llama_factory", ALPACA | {"input": "", "system": "", "history": []}),
        ("llama_factory_sharegpt", SHAREGPT),
        ("axolotl", AXOLOTL),
        ("nemo_rl", NEMO),
        ("trl_unpaired", UNPAIRED),
        ("nemo_aligner_regression", REGRESSION),
        ("steerlm", STEERLM),
    ],
)
def test_rows_are_recognised(name: str, row: Row) -> None:
    assert recognise([RawRow("f.jsonl", 1, json.dumps(row).encode())], "f.jsonl")[0] == name


# ----------------------------------------------------------------------------------- prompts that were made from more than texts

TOOL = {"type": "function", "function": {"name": "add", "description": "Add numbers.", "parameters": {}}}
CALLED = {"role": "assistant", "content": "Wait.", "tool_calls": [{"function": {"name": "add", "arguments": {}}}]}
PAIR = {"prompt": TALK, "chosen": [assistant("4")], "rejected": [assistant("5")]}
ASIDE: dict[str, tuple[str, Row, str]] = {
    "TRL, tools": ("preference", {**PAIR, "tools": [TOOL]}, "tools"),
    "TRL, tools as JSON text": ("preference", {**PAIR, "tools": json.dumps([TOOL])}, "tools"),
    "TRL, settings of the template": ("preference", {**PAIR, "chat_template_kwargs": {"enable_thinking": False}}, "chat_template_kwargs"),
    "TRL, both": ("preference", {**PAIR, "tools": [TOOL], "chat_template_kwargs": {"x": 1}}, "tools, chat_template_kwargs"),
    "TRL, an image": ("preference", {**PAIR, "images": ["a.png"]}, "images"),
    "a call among the messages": ("preference", {**PAIR, "prompt": [user("Hi"), CALLED, user("2+2?")]}, "tool_calls"),
    "a call in an answer": ("preference", {**PAIR, "chosen": [{**assistant("4"), "tool_calls": [{"name": "add"}]}]}, "tool_calls"),
    "ms-swift": ("ms_swift", {"messages": [*TALK, assistant("4")], "rejected_response": "5", "tools": json.dumps([TOOL])}, "tools"),
    "LLaMA-Factory": (
        "llama_factory_sharegpt",
        {"conversations": [human("2+2?")], "chosen": gpt("4"), "rejected": gpt("5"), "tools": "add: adds numbers"},
        "tools",
    ),
    "our own": ("rollouts", {"prompt": "2+2?", "answer": "4", "tools": [TOOL]}, "tools"),
}


@pytest.mark.parametrize("case", ASIDE)
def test_a_prompt_that_was_made_from_more_than_texts_is_rejected_or_taken_knowingly(case: str) -> None:
    name, row, said_of = ASIDE[case]
    raw = RawRow("f.jsonl", 1, json.dumps(row).encode())
    found = parse(FORMATS[name], raw)
    assert isinstance(found, Rejected)
    assert found.reason.startswith(f"{UNREAD}: the prompt was made from {said_of} too")
    taken = parse(FORMATS[name], raw, said_of.split(", "))
    bare = {key: value for key, value in row.items() if key not in said_of.split(", ")}
    assert not isinstance(taken, Rejected)
    assert [(r.prompt, r.text, r.reward) for r in taken] == [(r.prompt, r.text, r.reward) for r in parse_without_calls(name, bare)]


def parse_without_calls(name: str, row: Row) -> list[Rollout]:
    """The rollouts of a row, with no calls in its messages."""
    plain = {k: [{n: v for n, v in m.items() if n != "tool_calls"} for m in v] if isinstance(v, list) else v for k, v in row.items()}
    return read(name, plain)


@pytest.mark.parametrize("empty", [None, "", "[]", "{}", "null", [], {}, {"enable_thinking": None}, [{"name": None}], float("nan")])
@pytest.mark.parametrize("column", PROMPT_COLUMNS)
def test_a_column_that_says_nothing_is_no_reason(column: str, empty: object) -> None:
    assert [(r.prompt, r.text) for r in read("preference", {**PAIR, column: empty})] == [
        (r.prompt, r.text) for r in read("preference", PAIR)
    ]


def test_a_reader_of_the_users_own_sees_such_rows() -> None:
    form = make_format(f"{__name__}:tools_as_system")
    found = parse(form, RawRow("f.jsonl", 1, json.dumps({"prompt": "2+2?", "answer": "4", "tools": ["add"]}).encode()))
    assert not isinstance(found, Rejected)
    assert said(found[0]) == "s:add u:2+2?"


def tools_as_system(row: Row, row_id: str) -> list[Rollout]:
    return [Rollout(id=row_id, prompt=(Message("system", row["tools"][0]), Message("user", row["prompt"])), steps=(row["answer"],))]


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_an_import_says_what_it_left_out_and_how_to_take_it(ending: str, tmp_path: Path) -> None:
    rows = [{"id": f"r{n}", "prompt": f"{n}+{n}?", "answer": str(2 * n), "tools": "add" if n == 1 else ""} for n in range(3)]
    if ending == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    else:
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    words = ("import_rollouts", "--source", tmp_path / f"rows.{ending}", "--engine", "local", "--output")
    told = done(here(*words, tmp_path / "strict")).err
    assert "3 in = 2 used + 1 rejected (unread column 1)" in told
    assert "--without tools,chat_template_kwargs" in told
    told = done(here(*words, tmp_path / "knowing", "--without", "tools")).err
    assert "3 in = 3 used" in told
    assert "--without" not in told
    here(*words, tmp_path / "wrong", "--without", "tool").mistake("without=tool is no column", "did you mean tools?")
