"""Options of the label pipelines, from the words of the command to the examples, and what a fit makes of votes and ratings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from driving import done, here
from rayward.batching import BatchSettings
from rayward.fitting import FitSettings, fit
from rayward.records import Example, examples_of, rejects_of, rollouts_of
from rayward.rendering import RenderSettings
from rayward.reward_model import Loaded, ModelSettings, read_notes
from rayward.scoring import Scorer
from rayward.storage import Dataset, open_dataset
from rayward.training import TrainSettings
from test_dataflow import imported, write
from test_scoring import trained
from tiny import dataset_of, example, question, toy_rollouts

torch.set_num_threads(1)
pytestmark = pytest.mark.usefixtures("one_thread")

Row = dict[str, Any]


def label(kind: str, rows: list[Row] | Dataset, tmp_path: Path, *words: str | Path) -> Dataset:
    """The examples of `rayward run label_KIND ROWS WORDS`, whose counts add up."""
    if isinstance(rows, list):
        rows = imported(write(tmp_path / "rows.jsonl", rows), tmp_path / "rollouts", format="rollouts", parts=2, overwrite=True)
    output = tmp_path / "-".join(["out", kind, *(str(w).rpartition("/")[2] for w in words)])
    done(here(f"label_{kind}", "--source", rows.path, "--output", output, "--engine", "local", *words))
    made = open_dataset(output, "examples")
    examples, rejects = examples_of(made.table()), rejects_of(made.rejects())
    assert made.manifest.rows_in == rows.manifest.out == made.manifest.used + sum(made.manifest.rejected.values())
    assert made.manifest.out == len(examples)
    used = {(e.prompt, r) for e in examples for r in e.rollouts}
    assert len(used) == made.manifest.used
    assert len(rejects) == rows.manifest.out - len(used)
    return made


def examples(made: Dataset) -> list[Example]:
    return examples_of(made.table())


def reasons(made: Dataset) -> dict[str, str]:
    return {r.row: r.reason for r in rejects_of(made.rejects())}


# ------------------------------------------------------------------------------------------------------------------- votes


def votes(prompt: str, said: str) -> list[Row]:
    """Rows of an annotator per letter: a or b was better, = neither; every second one saw b first."""
    return [
        {
            "id": f"{prompt}/{n}/{side}",
            "prompt": prompt,
            "answer": f"{side} of {prompt}",
            "reward": 0.5 if vote == "=" else float(side == vote),
            "judgement": f"{prompt}/{n}",
            "annotator": f"w{n}",
        }
        for n, vote in enumerate(said)
        for side in ("ab" if n % 2 else "ba")
    ]


VOTED = {"all": "aaa", "most": "aab", "split": "aabb", "mixed": "ab=", "leaning": "bb=", "ties": "===", "one": "b"}
ROWS = [row for prompt, said in VOTED.items() for row in votes(prompt, said)]
SHARES = {"all": (1.0, 0.0, 3), "most": (2 / 3, 1 / 3, 3), "leaning": (5 / 6, 1 / 6, 3), "one": (1.0, 0.0, 1)}  # by hand
TIED = {"split": (0.5, 0.5, 4), "mixed": (0.5, 0.5, 3), "ties": (0.5, 0.5, 3)}


@pytest.mark.parametrize(
    ("words", "made"),
    [
        (["--votes"], set(SHARES)),
        (["--votes", "--min-agreement", "0.6"], set(SHARES)),
        (["--votes", "--min-agreement", "0.7"], {"all", "one"}),
        (["--votes", "--ties", "keep"], set(SHARES | TIED)),
        (["--votes", "--ties", "keep", "--min-agreement", "0.6"], {*SHARES, "ties"}),
        (["--votes", "--min-gap", "0.5"], {"all", "leaning", "one"}),
    ],
    ids=lambda words: " ".join(sorted(words)) if isinstance(words, set) else " ".join(words),
)
def test_votes_are_counted_and_agreement_is_asked_for(words: list[str], made: set[str], tmp_path: Path) -> None:
    dataset = label("pairs", ROWS, tmp_path, *words)
    found = {e.prompt[0].content: e for e in examples(dataset)}
    assert set(found) == made
    for name, e in found.items():
        high, low, count = (SHARES | TIED)[name]
        assert e.targets == pytest.approx((high, low))
        assert e.counts == (count, count)
        better = {"leaning": "b", "one": "b"}.get(name, "a")
        assert name in TIED or e.answers[0] == (f"{better} of {name}",)
        assert len(e.rollouts) == 2 * count
        assert e.provenance["annotators"] == ", ".join(f"w{n}" for n in range(count))
    for row, reason in reasons(dataset).items():
        name = row.partition("/")[0]
        assert name not in made
        low = "--min-agreement" in words and max(map(VOTED[name].count, "ab=")) / len(VOTED[name]) < float(words[-1])
        assert reason.partition(":")[0] == (
            "low agreement" if low else "no majority" if "--min-gap" in words and name == "most" else "tied votes"
        )


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--min-agreement", "0.6"], "votes"),
        (["--votes", "--min-agreement", "1.5"], "min_agreement=1.5"),
        (["--votes", "--choose", "adjacent"], "choose=adjacent"),
        (["--choose", "randon"], "random"),
        (["--min-gap", "-1"], "min_gap=-1"),
        (["--choose", "random", "--k", "0"], "k=0"),
        (["--max-answers", "1"], "max_answers=1"),
    ],
    ids=" ".join,
)
def test_options_that_do_not_go_together_are_refused_before_any_work(words: list[str], says: str, tmp_path: Path) -> None:
    rollouts = imported(write(tmp_path / "rows.jsonl", ROWS), tmp_path / "rollouts", format="rollouts")
    here("label_pairs", "--source", rollouts.path, "--output", tmp_path / "out", *words).mistake(says)
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------------ by and choose

RATED = [
    {"id": f"{p}/{n}", "prompt": f"Q{p}", "answer": f"{n} of {p}", "reward": float(n), "correct": correct, "rewards": rewards}
    for p in range(3)
    for n, (correct, rewards) in enumerate(
        [(True, {"helpful": 1.0, "short": 4.0}), (False, {"helpful": 3.0}), (None, {"helpful": 2.0, "short": 4.0}), (False, {})]
    )
]


@pytest.mark.parametrize(
    ("by", "order", "without"),
    [
        ("reward", "32 31 30 21 20 10", ""),
        ("correct", "01 03", "2"),
        ("helpful", "12 10 20", "3"),
        ("short", "", "13"),  # 0 and 2 tie
    ],
)
def test_answers_are_compared_by_what_was_asked_for(by: str, order: str, without: str, tmp_path: Path) -> None:
    made = label("pairs", RATED, tmp_path, "--by", by)
    for p in range(3):
        pairs = [(a[0], b[0]) for (a,), (b,) in (e.answers for e in examples(made) if e.prompt[0].content == f"Q{p}")]
        assert sorted(f"{a}{b}" for a, b in pairs) == sorted(order.split())
        for n in without:
            assert reasons(made)[f"{p}/{n}"].startswith("no outcome" if by == "correct" else f"no reward: nobody rated its {by}")


def test_random_pairs_are_k_of_all_and_another_seed_draws_others(tmp_path: Path) -> None:
    rows = [{"id": f"{p}/{n}", "prompt": f"Q{p}", "answer": f"{n} of {p}", "reward": float(n)} for p in range(20) for n in range(8)]
    drawn = {}
    for seed in ("0", "1"):
        made = examples(label("pairs", rows, tmp_path, "--choose", "random", "--k", "5", "--set", f"label.seed={seed}"))
        assert len(made) == 100
        assert {e.weight for e in made} == {0.2}
        assert all(e.targets[0] > e.targets[1] for e in made)
        drawn[seed] = {e.id for e in made}
    every = {e.id for e in examples(label("pairs", rows, tmp_path))}
    assert len(every) == 20 * 28
    assert drawn["0"] < every
    assert drawn["1"] < every
    assert len(drawn["0"] & drawn["1"]) < 40  # 18 by chance


def test_the_best_and_any_other(tmp_path: Path) -> None:
    rows = [{"id": f"{p}/{n}", "prompt": f"Q{p}", "answer": f"{n} of {p}", "reward": float(n)} for p in range(30) for n in range(4)]
    made = examples(label("pairs", rows, tmp_path, "--choose", "best_random"))
    assert len(made) == 30
    assert {e.targets[0] for e in made} == {3.0}
    assert {e.targets[1] for e in made} == {0.0, 1.0, 2.0}


# ---------------------------------------------------------------------------------------------------------------- rankings

RANKED = [
    {"id": f"{p}/{n}", "prompt": f"Q{p}", "answer": f"{n}", "reward": reward, "judgement": "j"}
    for p in range(4)
    for n, reward in enumerate([1.0, 5.0, 3.0, 3.0, None])
]


@pytest.mark.parametrize(
    ("words", "targets"),
    [
        ([], {"0": 1, "1": 5, "2": 3, "3": 3}),
        (["--top", "1"], {"0": 1, "1": 5, "2": 1, "3": 1}),
        (["--top", "2"], {"0": 1, "1": 5, "2": 3, "3": 3}),  # 3 ties with the second
        (["--unranked", "bottom"], {"0": 1, "1": 5, "2": 3, "3": 3, "4": 0}),
        (["--unranked", "bottom", "--top", "1"], {"0": 0, "1": 5, "2": 0, "3": 0, "4": 0}),
    ],
    ids=" ".join,
)
def test_the_top_of_a_ranking_and_those_without_a_rank(words: list[str], targets: dict[str, float], tmp_path: Path) -> None:
    made = label("rankings", RANKED, tmp_path, *words)
    found = examples(made)
    assert len(found) == 4
    for e in found:
        assert {a: t for (a,), t in zip(e.answers, e.targets, strict=True)} == targets
        assert e.counts == (1,) * len(targets)
    assert reasons(made) == ({} if "--unranked" in words else {f"{p}/4": "no reward" for p in range(4)})


# -------------------------------------------------------------------------------------------------------------- attributes


def test_ratings_are_named_by_what_is_there_or_by_what_is_asked_for(tmp_path: Path) -> None:
    made = label("attributes", RATED, tmp_path)
    assert made.manifest.settings["label"] == {"attributes": ["helpful", "short"]}
    [e, *_] = examples(made)
    assert e.attributes == ("helpful", "short")
    assert {a: (e.targets[2 * n : 2 * n + 2], e.counts[2 * n : 2 * n + 2]) for n, (a,) in enumerate(e.answers)} == {
        f"0 of {e.prompt[0].content[1:]}": ((1.0, 4.0), (1, 1)),
        f"1 of {e.prompt[0].content[1:]}": ((3.0, 0.0), (1, 0)),
        f"2 of {e.prompt[0].content[1:]}": ((2.0, 4.0), (1, 1)),
    }
    assert set(reasons(made)) == {"0/3", "1/3", "2/3"}
    one = examples(label("attributes", RATED, tmp_path, "--attributes", "short"))
    assert [(e.attributes, e.targets, e.counts) for e in one] == [(("short",), (4.0, 4.0), (1, 1))] * 3
    turned = examples(label("attributes", RATED, tmp_path, "--attributes", "short,helpful"))
    assert turned[0].attributes == ("short", "helpful")


def test_rollouts_without_ratings_say_so(tmp_path: Path) -> None:
    rollouts = imported(write(tmp_path / "rows.jsonl", ROWS), tmp_path / "rollouts", format="rollouts")
    said = here("label_attributes", "--source", rollouts.path, "--output", tmp_path / "out")
    said.mistake("holds no ratings by attribute", "import a set that has some")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("kind", "words"), [("attributes", ["--attributes", "helpfull"]), ("pairs", ["--by", "helpfull"])])
def test_an_attribute_that_nobody_rated_is_a_mistake_with_a_suggestion(kind: str, words: list[str], tmp_path: Path) -> None:
    rollouts = imported(write(tmp_path / "rows.jsonl", RATED), tmp_path / "rollouts", format="rollouts")
    said = here(f"label_{kind}", "--source", rollouts.path, "--output", tmp_path / "out", *words)
    said.mistake("helpfull", "did you mean helpful")
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------- a reward model as the judge


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> tuple[Loaded, Path]:
    folder = tmp_path_factory.mktemp("judge")
    return trained(folder, "pairs"), folder


def test_the_scores_of_a_model_rank_the_answers_of_a_prompt(judge: tuple[Loaded, Path], tmp_path: Path) -> None:
    rows = [
        {"id": r.id, "prompt": r.prompt[0].content, "steps": list(r.steps), "reward": 1.0, "judgement": f"{n % 2}"}
        for of in toy_rollouts(6, answers=6)
        for n, r in enumerate(of)
    ]
    long = {**rows[0], "id": "long", "steps": [rows[0]["steps"][0] * 60]}
    rollouts = imported(write(tmp_path / "rows.jsonl", [*rows, long]), tmp_path / "rollouts", format="rollouts", parts=2)
    made = label("rankings", rollouts, tmp_path, "--scores", judge[1])
    by_id = {r.id: r for r in rollouts_of(rollouts.table())}
    scorer = Scorer.load(judge[1])
    assert made.manifest.out == 6
    for e in examples(made):
        scores = [s[0] for s in scorer.score_rollouts([by_id[r] for r in e.rollouts]) if isinstance(s, tuple)]
        assert [a for (a,) in e.answers] == [by_id[r].text for r in e.rollouts]
        np.testing.assert_allclose(e.targets, scores, atol=1e-5)
        of_text: dict[str, set[float]] = {}
        for (text,), target in zip(e.answers, e.targets, strict=True):
            of_text.setdefault(text, set()).add(target)
        assert all(len(said) == 1 for said in of_text.values()), "answers of one text are tied"
        assert len({by_id[r].judgement for r in e.rollouts}) == 2, "a model compares answers that no person compared"
        assert len(set(e.targets)) > 1
        assert e.id.startswith(f"scores of {judge[1]}@")
    told = reasons(made)
    assert set(told) == {"long"}
    assert told["long"].startswith("too long: ")
    assert sorted(r for e in examples(made) for r in e.rollouts) == sorted(row["id"] for row in rows)
    top = label("rankings", rollouts, tmp_path, "--scores", judge[1], "--top", "1")
    for e in examples(top):
        best = {a for (a,), t in zip(e.answers, e.targets, strict=True) if t > min(e.targets)}
        assert len(best) == 1


def test_a_judge_that_is_asked_to_rank_by_something_else_is_a_mistake(judge: tuple[Loaded, Path], tmp_path: Path) -> None:
    rollouts = imported(write(tmp_path / "rows.jsonl", RATED), tmp_path / "rollouts", format="rollouts")
    said = here("label_rankings", "--source", rollouts.path, "--output", tmp_path / "out", "--scores", judge[1], "--by", "correct")
    said.mistake("correct", "scores")


@pytest.mark.parametrize("scores", ["nowhere", "models:/nobody@champion"])
def test_a_judge_that_is_not_there_is_a_mistake(scores: str, store: Path, tmp_path: Path) -> None:
    rollouts = imported(write(tmp_path / "rows.jsonl", RATED), tmp_path / "rollouts", format="rollouts")
    here("label_rankings", "--source", rollouts.path, "--output", tmp_path / "out", "--scores", scores).mistake(
        scores.removeprefix("models:/").partition("@")[0]
    )
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------------- training

FIT = FitSettings(
    examples="",
    model="tiny",
    objective="auto",
    net=ModelSettings(width=32, layers=1),
    render=RenderSettings(max_length=64),
    batch=BatchSettings(size=8),
    train=TrainSettings(epochs=2, lr=2e-3, log_every=1),
    validation_share=0.0,
)


def losses(dataset: Dataset, output: Path, **changes: Any) -> list[float]:
    """The loss of every step of a fit."""
    told: list[dict[str, float]] = []
    fit(replace(FIT, examples=str(dataset.path), **changes), str(output), report=told.append)
    return [line["loss"] for line in told]


def test_several_attributes_are_learned_side_by_side_and_one_alone(tmp_path: Path) -> None:
    both = label("attributes", RATED, tmp_path)
    told = losses(both, tmp_path / "both-fit")
    assert told[-1] < told[0]
    assert read_notes(tmp_path / "both-fit" / "model")["head"]["names"] == ["helpful", "short"]
    one = label("attributes", RATED, tmp_path, "--attributes", "helpful")
    told = losses(one, tmp_path / "one-fit")
    assert read_notes(tmp_path / "one-fit" / "model")["objective"] == "squared_error"
    before = Scorer.load(tmp_path / "one-fit" / "start")(examples(one))
    squares = [(s - t) ** 2 for score, e in zip(before, examples(one), strict=True) for s, t in zip(score, e.targets, strict=True)]
    assert told[0] == pytest.approx(np.mean(squares), rel=1e-4)
    assert told[-1] < told[0]


def rated(masked: float, count: int) -> list[Example]:
    """Answers with one rating each, and a third one that has `count` of them."""
    return [
        example(
            f"yes {n}", f"no {n}", "maybe so", id=f"e{n}", prompt=question(f"Is it {n}?"), targets=(1.0, -1.0, masked), counts=(1, 1, count)
        )
        for n in range(12)
    ]


@pytest.mark.parametrize("objective", ["squared_error", "bradley_terry", "plackett_luce"])
def test_what_a_missing_target_says_changes_nothing(objective: str, tmp_path: Path) -> None:
    curves = {
        name: losses(dataset_of(rated(masked, count), tmp_path / name), tmp_path / f"{name}-fit", objective=objective)
        for name, masked, count in (("low", -40.0, 0), ("high", 40.0, 0), ("said", 40.0, 1))
    }
    assert curves["low"] == curves["high"]
    assert curves["said"][0] != curves["low"][0]


def test_an_example_of_which_nothing_is_known_is_left_out(tmp_path: Path) -> None:
    some = [*rated(0.0, 0)[:8], replace(rated(0.0, 0)[9], counts=(0, 0, 0))]
    assert losses(dataset_of(some, tmp_path / "some"), tmp_path / "fit", objective="squared_error")
    [left] = pq.read_table(tmp_path / "fit" / "groups" / "rejects.parquet").to_pylist()
    assert (left["row"], left["reason"].partition(":")[0]) == ("e9", "no target")


def test_votes_are_learned_as_shares(tmp_path: Path) -> None:
    rows = [row for n in range(16) for row in votes(f"is it {n}", "aaab")]
    pairs = label("pairs", rows, tmp_path, "--votes")
    assert {e.targets for e in examples(pairs)} == {(0.75, 0.25)}
    told = losses(pairs, tmp_path / "fit", objective="vote_share", train=replace(FIT.train, epochs=30, lr=5e-3))
    entropy = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))  # the least there is
    assert told[0] == pytest.approx(np.log(2), abs=0.1)
    assert entropy - 1e-4 < told[-1] < entropy + 0.02
    scores = Scorer.load(tmp_path / "fit" / "model")(examples(pairs))
    assert np.mean([a - b for a, b in scores]) == pytest.approx(np.log(3), abs=0.3)  # sigma(log 3) = 3/4
