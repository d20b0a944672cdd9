"""Batching: packed rows hold every token once and let it see its own prompt and answer only; plans depend on inputs only."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rayward.batching import Batch, BatchSettings, collate, micro_batches, pack, plan
from rayward.rendering import Group
from tiny import random_group

torch.set_num_threads(1)
PROPERTY = settings(deadline=None, max_examples=60)

ANSWER = st.tuples(st.integers(1, 7), st.integers(1, 3)).map(lambda a: (a[0], min(a)))  # tokens, places
SHAPE = st.tuples(st.integers(1, 9), st.lists(ANSWER, min_size=1, max_size=4))  # prompt, answers
SHAPES = st.lists(SHAPE, min_size=1, max_size=7)


def groups_of(shapes: list[tuple[int, list[tuple[int, int]]]]) -> list[Group]:
    rng = np.random.default_rng(0)
    return [random_group(rng, prompt, [a[0] for a in answers], [a[1] for a in answers]) for prompt, answers in shapes]


def rows_of(groups: list[Group]) -> st.SearchStrategy[list[list[Group]]]:
    """The groups, cut into rows anywhere."""
    cuts = st.lists(st.integers(0, len(groups)), max_size=3).map(lambda c: [0, *sorted(c), len(groups)])
    return cuts.map(lambda c: [groups[a:b] for a, b in itertools.pairwise(c) if a < b])


def answers_of(group: Group) -> tuple[list[int], list[list[int]]]:
    prompt, *answers = np.split(group.token_T, np.cumsum(group.length_A)[:-1])
    return prompt.tolist(), [a.tolist() for a in answers]


def check_places(batch: Batch, groups: list[Group]) -> None:
    """Every place of a batch is on the token that the group has there; targets, weights and the mask go with it."""
    T = batch.token_BT.shape[1]
    flat = batch.token_BT.flatten()
    for g, group in enumerate(groups):
        k = len(group.target_K)
        assert batch.mask_GK[g].tolist() == [True] * k + [False] * (batch.mask_GK.shape[1] - k)
        assert flat[batch.place_GK[g, :k]].tolist() == group.token_T[group.place_K].tolist()
        assert batch.target_GK[g, :k].tolist() == group.target_K.tolist()
        assert batch.weight_G[g].item() == pytest.approx(group.weight)
        assert (batch.segment_BT.flatten()[batch.place_GK[g, :k]] >= 0).all()
        assert (batch.place_GK[g] < batch.token_BT.shape[0] * T).all()


# ------------------------------------------------------------------------------------------------------------ packed rows


@PROPERTY
@given(shapes=SHAPES, data=st.data())
def test_a_packed_row_holds_every_token_once_and_the_prompt_once(
    shapes: list[tuple[int, list[tuple[int, int]]]], data: st.DataObject
) -> None:
    groups = groups_of(shapes)
    rows = data.draw(rows_of(groups))
    batch = collate(rows, shared=True)
    check_places(batch, groups)
    assert batch.tokens == sum(len(g.token_T) for g in groups)
    for b, row in enumerate(rows):
        real = batch.segment_BT[b] >= 0
        assert batch.token_BT[b][real].tolist() == [t for g in row for t in g.token_T.tolist()]
        position = []
        for group in row:
            prompt, answers = answers_of(group)
            position += range(len(prompt))
            for answer in answers:  # every answer goes on where the prompt ends
                position += range(len(prompt), len(prompt) + len(answer))
        assert batch.position_BT[b][real].tolist() == position
        assert not real[len(position) :].any()


@PROPERTY
@given(shapes=SHAPES, data=st.data())
def test_a_token_sees_its_prompt_and_the_start_of_its_own_answer(
    shapes: list[tuple[int, list[tuple[int, int]]]], data: st.DataObject
) -> None:
    rows = data.draw(rows_of(groups_of(shapes)))
    batch = collate(rows, shared=True)
    B, T = batch.token_BT.shape
    expected = torch.zeros(B, T, T, dtype=torch.bool)
    for b, row in enumerate(rows):
        who: list[tuple[int, int]] = []  # of every token: its group, and its answer (0: the prompt)
        for g, group in enumerate(row):
            who += [(g, a) for a, length in enumerate(group.length_A) for _ in range(length)]
        for i in range(T):
            for j in range(T):
                if i >= len(who) or j >= len(who):
                    expected[b, i, j] = i == j  # padding sees itself
                else:
                    expected[b, i, j] = j <= i and who[i][0] == who[j][0] and who[j][1] in (0, who[i][1])
    assert (batch.mask_BTT() == expected).all()


# ---------------------------------------------------------------------------------------------------------- separate rows


@PROPERTY
@given(shapes=SHAPES)
def test_separate_rows_hold_the_prompt_with_one_answer_each(shapes: list[tuple[int, list[tuple[int, int]]]]) -> None:
    groups = groups_of(shapes)
    batch = collate([groups], shared=False)
    check_places(batch, groups)
    wholes = [(g, prompt + answer) for g, group in enumerate(groups) for prompt, answers in [answers_of(group)] for answer in answers]
    assert batch.token_BT.shape == (len(wholes), max(len(w) for _, w in wholes))
    for b, (g, whole) in enumerate(wholes):
        n = len(whole)
        assert batch.token_BT[b, :n].tolist() == whole
        assert batch.position_BT[b, :n].tolist() == list(range(n))
        assert (batch.segment_BT[b, :n] == 0).all()
        assert (batch.segment_BT[b, n:] == -1).all()
        rows = batch.place_GK[g][batch.mask_GK[g]] // batch.token_BT.shape[1]
        assert b in rows.tolist()  # every answer has a place, in its own row


@PROPERTY
@given(shapes=SHAPES)
def test_a_separate_place_is_as_far_into_its_answer_as_a_packed_one(shapes: list[tuple[int, list[tuple[int, int]]]]) -> None:
    groups = groups_of(shapes)
    packed, separate = collate([groups], shared=True), collate([groups], shared=False)
    positions = [b.position_BT.flatten()[b.place_GK][b.mask_GK].tolist() for b in (packed, separate)]
    assert positions[0] == positions[1]


# ------------------------------------------------------------------------------------------------- which go where, and when


@PROPERTY
@given(lengths=st.lists(st.integers(1, 30), max_size=40), capacity=st.integers(1, 25))
def test_packing_holds_every_item_once_and_never_overfills(lengths: list[int], capacity: int) -> None:
    rows = pack(lengths, capacity)
    assert sorted(n for row in rows for n in row) == list(range(len(lengths)))
    assert all(sum(lengths[n] for n in row) <= capacity or len(row) == 1 for row in rows)
    half_empty = [row for row in rows if sum(lengths[n] for n in row) * 2 <= capacity]
    assert len(half_empty) <= 1  # two rows that are half empty would have been one


@pytest.mark.parametrize("shared", [True, False])
@PROPERTY
@given(shapes=SHAPES, row_tokens=st.integers(1, 60), micro_tokens=st.integers(1, 120))
def test_micro_batches_cover_every_group_once_within_their_size(
    shared: bool, shapes: list[tuple[int, list[tuple[int, int]]]], row_tokens: int, micro_tokens: int
) -> None:
    groups, sizes = groups_of(shapes), BatchSettings(row_tokens=row_tokens, micro_tokens=micro_tokens)
    batches = list(micro_batches(groups, sizes, shared))
    assert sorted(n for numbers, _ in batches for n in numbers) == list(range(len(groups)))
    for numbers, batch in batches:
        check_places(batch, [groups[n] for n in numbers])
        one_row = batch.token_BT.shape[0] == 1 if shared else len(numbers) == 1
        assert batch.token_BT.numel() <= micro_tokens or one_row


@pytest.mark.parametrize("shared", [True, False])
def test_micro_batches_depend_on_nothing_but_their_inputs(shared: bool) -> None:
    rng = np.random.default_rng(3)
    groups = [random_group(rng, int(p), [int(a), 3]) for p, a in rng.integers(1, 20, (12, 2))]
    sizes = BatchSettings(row_tokens=40, micro_tokens=100)
    first = list(micro_batches(groups, sizes, shared))
    np.random.default_rng().random(5)
    torch.manual_seed(7)
    again = list(micro_batches(groups, sizes, shared))
    assert [n for n, _ in first] == [n for n, _ in again]
    for (_, a), (_, b) in zip(first, again, strict=True):
        assert all(torch.equal(getattr(a, name), getattr(b, name)) for name in a.__dict__ if name != "row")


def test_no_groups_make_no_batches() -> None:
    assert list(micro_batches([], BatchSettings(), shared=True)) == []


@PROPERTY
@given(examples=st.integers(1, 60), size=st.integers(1, 20), seed=st.integers(0, 5), epoch=st.integers(0, 5))
def test_every_epoch_sees_every_example_once(examples: int, size: int, seed: int, epoch: int) -> None:
    steps = plan(examples, size, seed, epoch)
    assert sorted(int(n) for step in steps for n in step) == list(range(examples))
    assert [len(step) for step in steps[:-1]] == [size] * (len(steps) - 1)
    assert 1 <= len(steps[-1]) <= size
    assert [s.tolist() for s in plan(examples, size, seed, epoch)] == [s.tolist() for s in steps]


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = {tuple(np.concatenate(plan(50, 8, seed, epoch))) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
