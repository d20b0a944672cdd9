"""The toy world: its closed-form values are the truth that labels and models are held against, so they are held against counts here."""

from __future__ import annotations

import math
import random
import subprocess
import sys
from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayward.grading import numeric
from rayward.records import Message
from rayward.sampling import toy_problem
from rayward.steps import cut
from rayward.toy_world import ToyWorld, seed_of

WORLDS = [
    ToyWorld(),
    ToyWorld(slip=0.0),
    ToyWorld(slip=0.3),
    ToyWorld(slip=0.2, repair=0.5),
    ToyWorld(slip=0.5, repair=0.2),
    ToyWorld(slip=1.0, repair=1.0),
]
NUMBERS = [(13, 27, 15, 22), (39, 10, 11, 12, 13), (10, 20, 30, 25, 15, 35), (12, 31)]

some_world = st.builds(ToyWorld, slip=st.floats(0, 1), repair=st.floats(0, 1))
some_index = st.integers(0, 10_000)
some_seed = st.integers(0, 2**63)


def is_right(numbers: tuple[int, ...], steps: tuple[str, ...]) -> bool:
    return steps[-1] == f"A: {max(numbers)}"


@pytest.mark.parametrize("world", WORLDS, ids=str)
def test_the_value_of_a_prefix_is_how_often_it_ends_right(world: ToyWorld) -> None:
    draws = 2_000
    errors = []
    for numbers in NUMBERS:
        whole = world.continue_steps(numbers, (), seed=1)
        for kept in range(len(whole)):
            value = world.value(numbers, whole[:kept])
            right = sum(is_right(numbers, (*whole[:kept], *world.continue_steps(numbers, whole[:kept], seed))) for seed in range(draws))
            spread = math.sqrt(value * (1 - value) / draws)
            if spread == 0:
                assert right == value * draws
            else:
                errors.append((right / draws - value) / spread)
    assert all(abs(e) < 4.5 for e in errors)  # standard errors


def next_steps(world: ToyWorld, numbers: tuple[int, ...], kept: tuple[str, ...]) -> dict[str, float]:
    """What the next step can be and its chance, without filler words: the solver's rules, written out once more."""
    written = int(kept[-1].split()[-1]) if kept else numbers[0]
    n = len(kept) + 1
    if n == len(numbers):
        return {f"A: {written}": 1.0}
    right = max(written, numbers[n])
    chances = dict.fromkeys(numbers, 0.0)
    for other in numbers:
        if other != right:
            chances[other] += world.slip / (len(numbers) - 1)
    chances[right] += (1 - world.slip) * (1 - world.repair)
    chances[max(numbers[: n + 1])] += (1 - world.slip) * world.repair
    return {f"{written} and {numbers[n]} keep {kept_value}\n": chance for kept_value, chance in chances.items()}


@settings(max_examples=100, deadline=None, derandomize=True)
@given(some_world, some_index, some_seed, st.data())
def test_the_value_now_is_the_mean_of_the_values_next(world: ToyWorld, index: int, seed: int, data: st.DataObject) -> None:
    numbers = world.problem(index)
    whole = world.continue_steps(numbers, (), seed)
    kept = whole[: data.draw(st.integers(0, len(whole) - 1))]
    following = next_steps(world, numbers, kept)
    assert math.isclose(sum(following.values()), 1.0)
    mean = sum(chance * world.value(numbers, (*kept, step)) for step, chance in following.items())
    assert math.isclose(world.value(numbers, kept), mean, abs_tol=1e-12)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(some_world, some_index, some_seed)
def test_an_answer_parses_and_is_graded_by_the_largest_number(world: ToyWorld, index: int, seed: int) -> None:
    numbers = world.problem(index)
    assert world.least <= len(numbers) == len(set(numbers)) <= world.most
    assert world.numbers(world.question(numbers)) == numbers
    steps = world.continue_steps(numbers, (), seed)
    assert len(steps) == len(numbers)
    assert cut("".join(steps)) == steps
    assert numeric("".join(steps), str(max(numbers))) is is_right(numbers, steps)
    assert world.value(numbers, steps) == float(is_right(numbers, steps))
    assert world.value(numbers, steps[:-1]) == world.value(numbers, steps)
    assert all(0 <= world.value(numbers, steps[:kept]) <= 1 for kept in range(len(steps)))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(some_world, some_index, some_seed, some_seed)
def test_a_complete_answer_has_nothing_to_continue(world: ToyWorld, index: int, seed: int, other: int) -> None:
    numbers = world.problem(index)
    whole = world.continue_steps(numbers, (), seed)
    assert world.continue_steps(numbers, whole, other) == ()
    for kept in range(len(whole)):
        assert len(whole[:kept]) + len(world.continue_steps(numbers, whole[:kept], other)) == len(numbers)


def test_a_seed_is_a_draw_and_the_same_on_every_machine() -> None:
    world = ToyWorld()
    numbers = world.problem(3)
    draws = [world.continue_steps(numbers, (), seed) for seed in range(200)]
    assert draws == [world.continue_steps(numbers, (), seed) for seed in range(200)]
    assert len(set(draws)) > 50
    assert len({world.problem(n) for n in range(500)}) == 500
    assert world.problem(3, seed=1) != numbers
    code = "from rayward.toy_world import *; w = ToyWorld(); print(seed_of('a', 1), w.problem(3), w.continue_steps(w.problem(3), (), 7))"
    elsewhere = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout
    assert elsewhere.strip() == f"{seed_of('a', 1)} {numbers} {draws[7]}"


def test_parts_of_a_seed_do_not_run_together() -> None:
    parts = [("a", 1), ("a1",), ("a", "1"), ("a", 1, ""), (1, "a"), (("a", 1),)]
    assert len({seed_of(*p) for p in parts}) == len(parts)
    assert all(0 <= seed_of(*p) < 2**63 for p in parts)


@pytest.mark.parametrize("world", [ToyWorld(), ToyWorld(slip=0.3, repair=0.3)], ids=str)
@pytest.mark.parametrize("measure", ["characters", "words"])
def test_length_says_nothing_about_who_is_right(world: ToyWorld, measure: str) -> None:
    won = lost = 0
    for index in range(1_500):
        numbers = world.problem(index)
        answers = [world.continue_steps(numbers, (), seed_of(index, n)) for n in range(8)]
        right, wrong = ([a for a in answers if is_right(numbers, a) is wanted] for wanted in (True, False))
        for a, b in zip(right, wrong, strict=False):
            lengths = [len("".join(s)) if measure == "characters" else len("".join(s).split()) for s in (a, b)]
            won += lengths[0] > lengths[1]
            lost += lengths[0] < lengths[1]
    assert won + lost >= 2_000
    assert 0.45 < won / (won + lost) < 0.55


def test_the_first_slip_is_the_first_step_that_keeps_the_smaller() -> None:
    numbers = (13, 27, 15, 30)
    assert ToyWorld.first_slip(numbers, ("13 and 27 keep 27\n", "so 27 and 15 keep 27\n", "27 and 30 keep 30\n", "A: 30")) == -1
    assert ToyWorld.first_slip(numbers, ("13 and 27 keep 27\n", "so 27 and 15 keep 15\n", "15 and 30 keep 13\n", "A: 13")) == 1


def test_without_a_slip_every_prefix_is_worth_one_and_a_slip_costs() -> None:
    sure, unsure = ToyWorld(slip=0.0), ToyWorld(slip=0.2)
    for index in range(50):
        numbers = sure.problem(index)
        steps = sure.continue_steps(numbers, (), seed=index)
        assert sure.first_slip(numbers, steps) == -1
        assert [sure.value(numbers, steps[:kept]) for kept in range(len(steps) + 1)] == [1.0] * (len(steps) + 1)
        values = [unsure.value(numbers, steps[:kept]) for kept in range(len(steps) + 1)]
        assert all(before <= after + 1e-12 for before, after in pairwise(values))  # no slip, no loss


@settings(max_examples=50, deadline=None, derandomize=True)
@given(some_index, st.integers(0, 20))
def test_a_problem_of_the_world_is_a_prompt_and_its_gold(index: int, seed: int) -> None:
    problem = toy_problem(index, ToyWorld(), seed)
    numbers = ToyWorld().problem(index, seed)
    assert problem.prompt == (Message("user", ToyWorld.question(numbers)),)
    assert problem.gold == str(max(numbers))


def test_problems_of_two_seeds_hardly_meet() -> None:
    seen = [{ToyWorld().problem(n, seed) for n in range(1_000)} for seed in (0, 1, 2)]
    assert all(len(a & b) < 20 for a, b in combinations(seen, 2))


@pytest.mark.parametrize(
    "bad", [{"slip": 1.5}, {"slip": -0.1}, {"repair": 2.0}, {"least": 0}, {"least": 8, "most": 7}, {"most": 31}, {"largest": 15}]
)
def test_a_world_that_cannot_be_is_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        ToyWorld(**bad)


def test_random_state_of_others_is_left_alone() -> None:
    random.seed(5)
    before = random.getstate()
    ToyWorld().continue_steps(ToyWorld().problem(1), (), seed=3)
    assert random.getstate() == before
