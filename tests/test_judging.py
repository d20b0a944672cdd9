"""A judge: verdicts are read from words, position bias cancels, nothing is asked twice, every rollout is used or rejected with a reason."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from chat_server import Body, ChatServer, chance, judge, shown, worth
from driving import Said, done, here
from rayward import judging
from rayward.judging.answers import AnswerSettings, plan
from rayward.judging.verdicts import pair_prompt, rank_prompt, read_choice, read_ranking, read_rating, read_step, read_steps
from rayward.labels import PairSettings
from rayward.labels.pairs import pairs
from rayward.policies.asking import Reply, Spent, VerdictLog
from rayward.records import Message, Rejected, Rollout, rollouts_of, rollouts_table
from rayward.storage import Dataset, open_dataset
from test_policies import causal
from tiny import on_disk

KEY = "sk-secret-0123456789"

# ---------------------------------------------------------------------------------------------------------------- verdicts


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("[[A]]", "A"),
        ("A is better.\n\n[[B]]", "B"),
        ("Not [[A]], not [[B]]: [[C]]", "C"),
        ("[[ b ]]", "B"),
        ("**[[A]]**", "A"),
        ("My final verdict is: [[A]]. Had it been longer, I would have said otherwise.", "A"),
        ("[A]", None),
        ("[[A>B]]", None),
        ("[[D]]", None),
        ("[[]]", None),
        ("[[A] ]", None),
        ("", None),
    ],
)
def test_the_last_verdict_counts(text: str, verdict: str | None) -> None:
    assert read_choice(text) == verdict


@pytest.mark.parametrize(
    ("text", "rating"),
    [("Rating: [[5]]", 5), ("[[3]] no, [[ 8.5 ]]", 8.5), ("[[7/10]]", 7), ("[[10]]", 10), ("[[0]]", None), ("[[11]]", None), ("5", None)],
)
def test_ratings_are_from_1_to_10(text: str, rating: float | None) -> None:
    assert read_rating(text) == rating


@pytest.mark.parametrize(
    ("text", "shares"),
    [
        ("[[A > B > C]]", (1.0, 0.5, 0.0)),
        ("[[c>a=b]]", (0.25, 0.25, 1.0)),
        ("[[A = B = C]]", (0.5, 0.5, 0.5)),
        ("[[A=C>B]] rather [[B > A > C]]", (0.5, 1.0, 0.0)),
        ("[[A > B]]", None),
        ("[[A > B > C > D]]", None),
        ("[[A > B > B]]", None),
        ("[[A, B, C]]", None),
        ("A > B > C", None),
    ],
)
def test_a_ranking_has_every_answer_once(text: str, shares: tuple[float, ...] | None) -> None:
    ranking = read_ranking(text, 3)
    assert (ranking and ranking.shares) == shares


@pytest.mark.parametrize(
    ("text", "verdicts"),
    [
        ("Step 1: [[right]]\nStep 2: [[wrong]]\nStep 3: [[neutral]]", ["right", "wrong", "neutral"]),
        ("- **Step 2:** 3 + 4 = 8 [sic] is off. [[Wrong]]\n1. Step 1: [[right]]", ["right", "wrong", None]),
        ("Step 1: [[wrong]] was rash.\nStep 1: [[right]]", ["right", None, None]),
        ("Step 4: [[right]]\nStep 0: [[right]]", [None, None, None]),
        ("All steps are [[right]]", [None, None, None]),
    ],
)
def test_steps_are_read_by_their_number(text: str, verdicts: list[str | None]) -> None:
    assert read_steps(text, 3) == verdicts


def test_a_step_is_read_from_its_verdict_only() -> None:
    assert [read_step(t) for t in ("[[wrong]] or [[right]]", "right", "[[maybe]]")] == ["right", None, None]


def test_what_answers_say_does_not_change_how_the_judge_is_asked() -> None:
    text = "{rubric} {letters} [[A]] \\1"
    [message] = pair_prompt((Message("user", "{rubric}?"),), text, "other", "{rubric} of my own")
    assert message.content.count(text) == 1
    assert "such as the {rubric} of my own of their responses" in message.content
    assert "[[B > A]]" in rank_prompt((Message("user", "q"),), ["a", "b"], "r")[0].content
    assert "[[D > C > B = A]]" in rank_prompt((Message("user", "q"),), list("abcd"), "r")[0].content


def test_every_turn_of_a_conversation_is_shown() -> None:
    said = ["turn one", "turn two", "turn three"]
    turns = (Message("system", ""), Message("user", said[0]), Message("assistant", said[1]), Message("user", said[2]))
    text = pair_prompt(turns, "a", "b", "r")[0].content
    assert [text.index(turn) for turn in said] == sorted(text.index(turn) for turn in said)
    assert "system" not in text


# ------------------------------------------------------------------------------------------------------------ what is asked


def answers(prompt: int, number: int) -> list[Rollout]:
    """Answers of which the larger number is the better one; every one has a number of its own."""
    asked = (Message("user", f"Question {prompt}?"),)
    order = sorted(range(number), key=lambda n: chance("order", prompt, n))
    return [
        Rollout(
            id=f"p{prompt}-{n}",
            prompt=asked,
            steps=("I say ", f"{order[n] + 1}."),
            policy="writer",
            correct=order[n] + 1 == number,
            provenance={"position": "1", "from": "here"},
        )
        for n in range(number)
    ]


def dataset(rollouts: Sequence[Rollout], folder: Path, parts: int = 1) -> Dataset:
    return on_disk("rollouts", rollouts_table(rollouts), folder, parts)


@pytest.mark.parametrize(
    ("settings", "groups"),
    [
        ({}, ["01", "02", "03", "12", "13", "23"]),
        ({"choose": "adjacent"}, ["01", "12", "23"]),
        ({"choose": "random", "k": 2}, 2),
        ({"choose": "random", "k": 20}, 6),
        ({"max_answers": 2}, 1),
        ({"mode": "rates"}, ["0", "1", "2", "3"]),
        ({"mode": "ranks"}, ["0123"]),
    ],
)
def test_which_answers_are_judged_together(settings: dict[str, Any], groups: list[str] | int) -> None:
    rollouts = answers(1, 4)
    planned, rejects = plan(rollouts, AnswerSettings(**settings))
    found = ["".join(r.id[-1] for r in comparison.answers) for comparison in planned]
    assert found == groups if isinstance(groups, list) else len(found) == len(set(found)) == groups
    assert {r.id for c in planned for r in c.answers} | {r.row for r in rejects} == {r.id for r in rollouts}
    assert planned == plan(rollouts[::-1], AnswerSettings(**settings))[0]


def test_random_pairs_and_orders_go_by_the_seed() -> None:
    drawn = [
        [tuple(r.id for r in c.answers) for c in plan(answers(1, 6), AnswerSettings(choose="random", seed=seed))[0]] for seed in range(5)
    ]
    assert len(set(map(tuple, drawn))) > 1
    single = AnswerSettings(both_orders=False)
    first = Counter(c.orders[0][0] for p in range(40) for c in plan(answers(p, 3), single)[0])
    assert min(first.values()) > 40  # of 120 pairs each answer is shown first about as often


def test_what_is_not_judged_says_why() -> None:
    a, b, c = answers(1, 3)
    again = Rollout(id="z", prompt=a.prompt, steps=(a.text,))
    more = Rollout(id="y", prompt=a.prompt, steps=("I say ", "9."), continues=a.id, kept_steps=1)
    planned, rejects = plan([a, b, c, again, more], AnswerSettings(max_answers=2))
    assert len(planned) == 1
    assert sorted(r.reason.partition(":")[0] for r in rejects) == ["a continuation", "identical answer", "not drawn"]
    assert plan([a, more], AnswerSettings())[1][-1].reason == "alone: its prompt has no other answer"


def test_ranks_are_asked_in_an_order_and_its_reverse() -> None:
    [comparison], _ = plan(answers(1, 5), AnswerSettings(mode="ranks", samples=3))
    orders = [order for order, _ in comparison.orders]
    assert orders[1::2] == [order[::-1] for order in orders[::2]]
    assert len(set(orders)) == 6


# ----------------------------------------------------------------------------------------------------- from words to rollouts


def run(folder: Path, server: ChatServer, *sets: str, script: str = "judge_pairs", output: str = "judged", **policy: Any) -> Said:
    """The pipeline, as its user runs it."""
    settings = {"base_url": server.url, "model": "m", "backoff_s": 0.001, "timeout_s": 20, "concurrency": 4, **policy}
    words = ["--source", folder / "rollouts", "--output", folder / output, "--engine", "local"]
    return here(script, *words, "--set", "judge_settings=" + json.dumps(settings), *[w for s in sets for w in ("--set", s)])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with rollouts of 6 prompts with 4 answers each: 36 pairs, 72 questions."""
    dataset([r for p in range(6) for r in answers(p, 4)], tmp_path / "rollouts", parts=4)
    return tmp_path


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with ChatServer(judge()) as running:
        yield running


def judged(folder: Path, output: str = "judged") -> list[Rollout]:
    return rollouts_of(open_dataset(folder / output, "rollouts").table())


def right_share(rollouts: Sequence[Rollout]) -> float:
    """Of the pairs without a tie, the share that goes to the larger number."""
    by_judgement: dict[tuple[Any, str], list[Rollout]] = {}
    for rollout in rollouts:
        by_judgement.setdefault((rollout.prompt, rollout.judgement), []).append(rollout)
    decided = [sorted(pair, key=lambda r: worth(r.text)) for pair in by_judgement.values() if pair[0].reward != pair[1].reward]
    return sum((high.reward or 0) > (low.reward or 0) for low, high in decided) / len(decided)


def test_pairs_become_judgements_of_two(folder: Path, server: ChatServer) -> None:
    said = done(run(folder, server))
    made = judged(folder)
    source = {(r.prompt, r.id): r for r in rollouts_of(open_dataset(folder / "rollouts").table())}
    assert (server.asked, len(made), len({(r.prompt, r.id) for r in made})) == (72, 72, 72)
    assert right_share(made) == 1
    for rollout in made:
        of = source[rollout.prompt, rollout.provenance["rollout"]]
        assert (rollout.steps, rollout.correct, rollout.policy, rollout.annotator) == (of.steps, of.correct, "writer", "m")
        assert rollout.provenance.keys() == {"from", "judge", "orders", "rollout", "votes"}  # both were shown first: no position
        assert rollout.provenance["votes"] in ("AB:A BA:B", "AB:B BA:A")
    assert sorted(Counter(r.judgement for r in made if r.prompt == made[0].prompt).values()) == [2] * 6
    manifest = open_dataset(folder / "judged").manifest
    assert (manifest.rows_in, manifest.used, manifest.rejected) == (24, 24, {})
    assert "72 questions, 72 asked now for" in said.err
    assert "36 comparisons, 0 tied, 0 inconsistent; the answer shown first got 50.0 % (AB" in said.err


def test_label_pairs_takes_what_judge_pairs_makes(folder: Path, server: ChatServer) -> None:
    done(run(folder, server))
    done(here("label_pairs", "--source", folder / "judged", "--output", folder / "pairs", "--engine", "local"))
    table = open_dataset(folder / "pairs", "examples").table()
    assert table.num_rows == 36
    assert all(worth(better[0]) > worth(worse[0]) for better, worse in table["answers"].to_pylist())
    rollouts = judged(folder)
    made = [e for _, group in itertools.groupby(rollouts, key=lambda r: r.prompt) for e in pairs(list(group), PairSettings())]
    assert len(made) == 36
    assert not [e for e in made if isinstance(e, Rejected)]


def test_both_orders_cancel_a_planted_position_bias(folder: Path) -> None:
    with ChatServer(judge(bias=0.5)) as server:
        said = done(run(folder, server))
        made = judged(folder)
        inconsistent = [r for r in made if r.provenance["orders"] == "inconsistent"]
        assert {r.reward for r in inconsistent} == {0.5}
        assert {r.provenance["votes"] for r in inconsistent} == {"AB:A BA:A"}
        assert 18 < len(inconsistent) < 54
        assert right_share(made) == 1
        assert f"{len(inconsistent) // 2} tied, {len(inconsistent) // 2} inconsistent" in said.err
        first = 50 + 50 * len(inconsistent) / len(made)
        assert f"the answer shown first got {first:.1f} %" in said.err
        done(run(folder, server, "compare.both_orders=false", output="single"))
        single = judged(folder, "single")
        assert right_share(single) < 1
        assert Counter(r.provenance["position"] for r in single) == {"1": 36, "2": 36}


def test_inconsistent_pairs_can_be_rejected(folder: Path) -> None:
    with ChatServer(judge(bias=1.0)) as server:
        done(run(folder, server, "compare.inconsistent=reject"))
    made = open_dataset(folder / "judged")
    assert (made.manifest.out, made.manifest.used, dict(made.manifest.rejected)) == (0, 0, {"inconsistent": 24})
    assert "[[A]]" in made.rejects()["raw"][0].as_py()
    assert made.rejects()["reason"][0].as_py() == "inconsistent: AB:A BA:A"


def test_votes_outdo_noise(folder: Path) -> None:
    with ChatServer(judge(noise=0.6)) as server:
        done(run(folder, server, output="one"))
        done(run(folder, server, "compare.samples=9", output="nine"))
        assert server.asked == 72 + 9 * 72
    one, nine = judged(folder, "one"), judged(folder, "nine")
    assert all(len(r.provenance["votes"].split()) == 18 for r in nine)
    assert right_share(nine) > 0.95
    assert sum(r.reward == 0.5 for r in nine) < sum(r.reward == 0.5 for r in one)


def test_unparsable_verdicts_are_counted_and_kept(folder: Path) -> None:
    with ChatServer(judge(wordless=0.2)) as server:
        said = done(run(folder, server))
        silent = sum(chance("wordless", sorted(shown(body).values()), body["seed"]) < 0.2 for body in server.bodies)
    assert f"{silent} unparsable, 0 failed" in said.err
    made = open_dataset(folder / "judged")
    assert len(judged(folder)) < 72
    assert made.manifest.rows_in == made.manifest.used + sum(made.manifest.rejected.values())
    with ChatServer(judge(wordless=1.0)) as server:
        done(run(folder, server, output="nothing"))
    nothing = open_dataset(folder / "nothing")
    assert dict(nothing.manifest.rejected) == {"unparsable": 24}
    reject = nothing.rejects().to_pylist()[0]
    assert reject["reason"] == "unparsable: no verdict in 2 of 2 replies (AB:? BA:?)"
    assert "I cannot say [A] or [[neither]]" in reject["raw"]


def test_ratings_are_means_and_comparable_in_a_prompt(folder: Path, server: ChatServer) -> None:
    done(run(folder, server, "compare.mode=rates", "compare.samples=3"))
    made = judged(folder)
    assert server.asked == 72
    assert len(made) == 24
    assert all(r.reward == worth(r.text) and r.judgement == "rated/m" for r in made)
    assert all(len(r.provenance["votes"].split()) == 3 for r in made)


def test_rankings_find_their_way_back_from_the_shuffle(folder: Path, server: ChatServer) -> None:
    done(run(folder, server, "compare.mode=ranks", "compare.samples=2"))
    made = judged(folder)
    assert (server.asked, len(made)) == (6 * 4, 24)
    assert all(r.reward == pytest.approx((worth(r.text) - 1) / 3) for r in made)
    assert len({tuple(shown(body).values()) for body in server.bodies if "Question 1?" in body["messages"][0]["content"]}) > 1


def test_a_request_that_fails_costs_its_comparison_only(folder: Path, server: ChatServer) -> None:
    both = ["I say 1.", "I say 4."]
    server.faults = lambda number, body: "500" if sorted(shown(body).values()) == both and "Question 1?" in str(body) else ""
    said = done(run(folder, server, retries=1))
    assert len(judged(folder)) == 70
    assert "0 unparsable, 2 failed" in said.err
    assert server.asked == 72 + 2


def test_ids_that_hold_the_separators_do_not_collide(tmp_path: Path, server: ChatServer) -> None:
    ids = ["a", "a|b", "b|c", "c", "a%7Cb"]
    rollouts = [Rollout(id=name, prompt=(Message("user", "q"),), steps=(str(n),)) for n, name in enumerate(ids)]
    dataset(rollouts, tmp_path / "rollouts")
    done(run(tmp_path, server))
    made = judged(tmp_path)
    assert len({r.id for r in made}) == 20
    assert set(Counter(r.judgement for r in made).values()) == {2}


# ------------------------------------------------------------------------------------------------ the log, and going on with it


def whole(folder: Path, output: str = "judged") -> tuple[str, list[dict[str, Any]]]:
    made = open_dataset(folder / output)
    return made.manifest.digest, made.table().to_pylist()


def lines(folder: Path, output: str = "judged") -> list[dict[str, Any]]:
    return [json.loads(line) for path in sorted((folder / f".{output}.verdicts").glob("*.jsonl")) for line in path.open()]


def test_the_log_keeps_every_word(folder: Path, server: ChatServer) -> None:
    done(run(folder, server))
    kept = lines(folder)
    assert len(kept) == len({row["key"] for row in kept}) == 72
    row = kept[0]
    assert row["text"].endswith("]]")
    assert "[[A]] would be rash.\n\n" in row["text"]
    assert row["mode"] == "pairs"
    assert len(row["answers"]) == 2
    assert row["generated_tokens"] > 0 < row["prompt_tokens"]
    total = sum(row["generated_tokens"] + row["prompt_tokens"] for row in kept)
    assert VerdictLog(folder / ".judged.verdicts").spent() == Spent(72, total)


@pytest.mark.parametrize("ends_at", [0, 1, 30, 71])
def test_a_run_that_ends_midway_is_gone_on_with_and_asks_nothing_twice(folder: Path, server: ChatServer, ends_at: int) -> None:
    done(run(folder, server, output="plain"))
    asked, server.bodies = server.asked, []
    server.served, server.faults = 0, lambda number, body: "404" if number == ends_at else ""
    run(folder, server, concurrency=3).mistake("does not exist", "404")
    assert len(lines(folder)) == server.served
    server.faults = []
    done(run(folder, server, concurrency=3))
    assert server.served == asked == 72
    assert server.asked == 73
    assert whole(folder) == whole(folder, "plain")
    done(run(folder, server))
    assert server.asked == 73


def test_a_torn_line_is_passed_over_and_asked_again(folder: Path, server: ChatServer) -> None:
    done(run(folder, server))
    first = whole(folder)
    torn = 0
    for path in sorted((folder / ".judged.verdicts").glob("*.jsonl")):
        content = path.read_bytes()
        path.write_bytes(content[: len(content) - 15])
        torn += 1
    for _ in range(2):
        said = done(run(folder, server, "overwrite=true"))
        assert server.asked == 72 + torn
        assert whole(folder) == first
    assert "72 questions, 0 asked now" in said.err


def test_other_outputs_share_a_log(folder: Path, server: ChatServer) -> None:
    done(run(folder, server, "compare.choose=adjacent", f"log={folder}/verdicts", output="few"))
    assert server.asked == 36
    done(run(folder, server, f"log={folder}/verdicts", output="all"))
    assert server.asked == 72
    done(run(folder, server, f"log={folder}/verdicts", output="cool", temperature=0))
    assert server.asked == 144


def test_how_fast_and_where_is_no_part_of_what_is_made(folder: Path, server: ChatServer) -> None:
    done(run(folder, server, concurrency=1))
    done(run(folder, server, concurrency=16, output="fast"))
    assert whole(folder) == whole(folder, "fast")
    asked = server.asked
    with ChatServer(judge()) as elsewhere:
        done(run(folder, elsewhere, "budget.max_requests=500", concurrency=2, retries=9))
        assert elsewhere.asked == 0
    assert server.asked == asked


@pytest.mark.parametrize("budget", ["max_requests=20", "max_tokens=6000"])
def test_a_budget_ends_the_run_and_loses_nothing(folder: Path, server: ChatServer, budget: str) -> None:
    done(run(folder, server, output="plain"))
    server.bodies, server.served = [], 0
    message = run(folder, server, "budget." + budget, concurrency=2).mistake("is spent", "run the same command with a larger budget")
    first = server.asked
    assert f"{first} requests" in message
    assert first == 20 if "requests" in budget else 0 < first < 72
    run(folder, server, "budget." + budget).mistake("is spent")
    assert server.asked == first
    done(run(folder, server, "budget.max_requests=72"))
    assert server.asked == 72
    assert whole(folder) == whole(folder, "plain")


def test_the_key_is_nowhere(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with ChatServer(judge(), key=KEY) as server:
        said = [done(run(folder, server, api_key_env="JUDGE_KEY"))]
        server.faults = lambda number, body: "echo key"
        said.append(run(folder, server, output="refused", api_key_env="JUDGE_KEY"))
        said[1].mistake("[key]", "403")
    assert all(KEY not in s.err + s.out for s in said)
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert not [path for path in files if KEY.encode() in path.read_bytes()]


def test_the_log_is_read_line_by_line(tmp_path: Path) -> None:
    log = VerdictLog(tmp_path / "log")
    log.spend(Spent(requests=1))
    path = tmp_path / "log" / "00.jsonl"
    path.write_bytes(b'{"key": "torn", "te\n[1]\n\xff\xfe\n{"key": "k0"}')
    log.add("00ab", "k", Reply("a\rb\n\u2028é", "stop", 1, 2), {"mode": "pairs"})
    fresh = VerdictLog(tmp_path / "log")
    assert fresh.find("00cd", "k") == Reply("a\rb\n\u2028é", "stop", 1, 2)
    assert fresh.find("00cd", "k0") is fresh.find("01cd", "k") is None
    assert fresh.find("00cd", "k") is not None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--judge", "sever"], "did you mean server"),
        (["--set", "judge_settings=nonsense"], "is not JSON"),
        ([], "missing: model"),
        (["--set", "compare.max_answers=30", "--set", "compare.mode=ranks"], "26 letters"),
        (["--set", "compare.samples=0"], "samples=0"),
        (["--set", "budget.max_tokens=-1"], "max_tokens=-1"),
        (["--actors", "0"], "actors=0"),
    ],
)
def test_wrong_settings_are_said(folder: Path, words: list[str], said: str) -> None:
    here("judge_pairs", "--source", folder / "rollouts", "--output", folder / "judged", "--engine", "local", *words).mistake(said)
    assert sorted(path.name for path in folder.iterdir()) == ["rollouts"]


@pytest.mark.usefixtures("ray_cluster")
def test_ray_workers_make_the_same_and_share_the_budget(folder: Path, server: ChatServer) -> None:
    done(run(folder, server))
    settings = json.dumps({"base_url": server.url, "model": "m", "concurrency": 2})
    words = ["--source", folder / "rollouts", "--output", folder / "ray", "--engine", "ray", "--actors", "2"]
    limited = here("judge_pairs", *words, "--set", "judge_settings=" + settings, "--set", "budget.max_requests=30")
    limited.mistake("is spent: 30 requests")
    assert server.asked == 72 + 30
    said = done(here("judge_pairs", *words, "--set", "judge_settings=" + settings))
    assert server.asked == 144
    assert whole(folder, "ray") == whole(folder)
    assert "72 questions, 42 asked now" in said.err


def test_a_local_model_can_judge(folder: Path) -> None:
    settings = {"model": str(causal("qwen3", folder / "model", max_position_embeddings=2048)), "max_new_tokens": 4, "batch_size": 8}
    words = ["--source", folder / "rollouts", "--output", folder / "judged", "--engine", "local", "--judge", "transformers"]
    more = ["--set", "compare.choose=adjacent", "--set", "judge_settings=" + json.dumps(settings)]
    said = done(here("judge_pairs", *words, *more))
    assert "36 questions, 36 asked now" in said.err
    assert dict(open_dataset(folder / "judged").manifest.rejected) == {"unparsable": 24}  # it has not learned to speak
    assert {row["generated_tokens"] for row in lines(folder)} <= {1, 2, 3, 4}


def test_a_judge_named_by_a_folder_is_its_last_part(tmp_path: Path) -> None:
    settings = json.dumps({"model": str(tmp_path)})
    job = judging.Job("s", "o", "transformers", settings, AnswerSettings(), judging.Budget())
    assert job.name == tmp_path.name


# ------------------------------------------------------------------------------------------------------------------- steps


STEPS = {
    "right": ("1 + 1 = 2\n", "2 + 2 = 4\n", "A: 4"),
    "slip": ("1 + 1 = 2\n", "Hm.\n", "2 + 2 = 5\n", "5 + 1 = 6\n", "5 + 1 = 7\n"),
    "short": ("1 + 1 = 3",),
}


@pytest.fixture
def stepwise(tmp_path: Path) -> Path:
    asked = (Message("user", "Add them up."),)
    whole = [Rollout(id=name, prompt=asked, steps=steps, correct=name == "right") for name, steps in STEPS.items()]
    more = [
        Rollout(
            id=f"slip/{kept}/{k}",
            prompt=asked,
            steps=(*STEPS["slip"][:kept], f"so {k}"),
            continues="slip",
            kept_steps=kept,
            correct=kept < 2,
        )
        for kept in range(1, 5)
        for k in range(2)
    ]
    dataset(whole + more, tmp_path / "rollouts")
    return tmp_path


@pytest.mark.parametrize(
    ("sets", "questions", "slip"),
    [
        ((), 6, (1.0, None, 0.0, 0.0, 0.0)),
        (("steps.stop_at_wrong=false",), 8, (1.0, None, 0.0, 1.0, 0.0)),
        (("steps.ask=all",), 3, (1.0, None, 0.0, 0.0, 0.0)),
        (("steps.ask=all", "steps.stop_at_wrong=false", "steps.samples=3"), 9, (1.0, None, 0.0, 1.0, 0.0)),
    ],
)
def test_steps_are_judged_up_to_the_first_wrong_one(
    stepwise: Path, server: ChatServer, sets: tuple[str, ...], questions: int, slip: tuple[float | None, ...]
) -> None:
    said = done(run(stepwise, server, *sets, script="judge_steps"))  # two answers share a first step, which is asked about once
    made = {r.id: r for r in judged(stepwise)}
    assert server.asked == questions
    assert (made["right"].step_rewards, made["slip"].step_rewards, made["short"].step_rewards) == ((1.0, 1.0, None), slip, (0.0,))
    assert made["slip"].annotator == "m"
    assert made["slip/1/0"].step_rewards == ()
    assert len(made) == 11
    assert open_dataset(stepwise / "judged").manifest.used == 11
    assert f"questions, {questions} asked now" in said.err


def test_step_prompts_hold_the_steps_before_and_none_after(stepwise: Path, server: ChatServer) -> None:
    done(run(stepwise, server, script="judge_steps"))
    body = next(b for b in server.bodies if shown(b).get("Step to judge", "").strip() == "Hm.")
    assert shown(body)["Solution so far"] == "1 + 1 = 2\n"
    assert "2 + 2" not in body["messages"][0]["content"]


def test_votes_on_a_step_are_its_reward(stepwise: Path) -> None:
    def unsure(body: Body) -> str:
        return "[[right]]" if chance("sure", body["seed"]) < 0.7 else "[[wrong]]"

    with ChatServer(unsure) as server:
        done(run(stepwise, server, "steps.samples=5", "steps.stop_at_wrong=false", script="judge_steps"))
    for rollout in judged(stepwise):
        if rollout.continues is None:
            votes = [v.split("/") for v in rollout.provenance["step_votes"].split()]
            assert [len(v) for v in votes] == [5] * len(rollout.steps)
            assert rollout.step_rewards == tuple(v.count("right") / 5 for v in votes)


@pytest.mark.parametrize("how", ["one", "all"])
@pytest.mark.parametrize("stop", ["true", "false"])
def test_a_step_without_a_verdict_rejects_its_answer(stepwise: Path, how: str, stop: str) -> None:
    def silent(body: Body) -> str:
        said = judge()(body)
        return str(said).replace("[[neutral]]", "[[perhaps]]")

    with ChatServer(silent) as server:
        done(run(stepwise, server, f"steps.ask={how}", f"steps.stop_at_wrong={stop}", script="judge_steps"))
    made = open_dataset(stepwise / "judged")
    assert {r.id for r in judged(stepwise) if r.continues is None} == {"short"}
    reasons = {r["row"]: r["reason"] for r in made.rejects().to_pylist()}
    assert reasons == {"right": "unparsable: no verdict on step 3", "slip": "unparsable: no verdict on step 2"}
    assert all("[[perhaps]]" in r["raw"] for r in made.rejects().to_pylist())


def test_judge_and_continuations_agree_in_label_steps(stepwise: Path, server: ChatServer) -> None:
    done(run(stepwise, server, "steps.stop_at_wrong=false", script="judge_steps"))
    words = ["--source", stepwise / "judged", "--output", stepwise / "steps", "--engine", "local"]
    done(here("label_steps", *words, "--set", "label.both=agree"))
    table = open_dataset(stepwise / "steps", "examples").table()
    [slip] = [row for row in table.to_pylist() if row["id"] == "steps@slip"]
    # continuations: right after step 1 only; the judge: right, neutral (right), wrong, right, wrong
    assert slip["targets"] == [1.0, 0.0, 0.0, 0.0, 0.0]
    assert slip["counts"] == [2, 0, 2, 0, 1]


def test_steps_go_on_after_a_failure_and_ask_nothing_twice(stepwise: Path, server: ChatServer) -> None:
    server.faults = lambda number, body: "404" if number == 4 else ""
    run(stepwise, server, script="judge_steps", concurrency=1).mistake("404")
    server.faults = []
    done(run(stepwise, server, script="judge_steps"))
    assert server.served == 6
