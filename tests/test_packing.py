"""Attention over segments, and packing: the same numbers as masks give, forward and backward, on rows of any make."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rayward.attention import KERNELS, NAME, row_of
from rayward.batching import BatchSettings, collate, micro_batches, pack
from rayward.rendering import Group
from rayward.reward_model import RewardModel, save_model, score_groups
from tiny import DECODERS, byte_tokenizer, classifier, plain_scores, random_group

torch.set_num_threads(1)
PROPERTY = settings(deadline=None, max_examples=40)
SHAPE = st.tuples(st.integers(1, 9), st.lists(st.integers(1, 7), min_size=1, max_size=4))  # tokens of a prompt and of its answers
SHAPES = st.lists(SHAPE, min_size=1, max_size=5)


def groups_of(shapes: list[tuple[int, list[int]]]) -> list[Group]:
    rng = np.random.default_rng(0)
    return [random_group(rng, prompt, answers) for prompt, answers in shapes]


def mixed(seed: int = 1) -> list[Group]:
    rng = np.random.default_rng(seed)
    return [random_group(rng, int(p), [int(a), 3, int(p)], [2, 1, 1]) for p, a in rng.integers(2, 20, (9, 2))]


# -------------------------------------------------------------------------------------------------------------- attention


@PROPERTY
@given(shapes=SHAPES)
def test_a_row_shows_its_tokens_what_a_mask_of_its_batch_shows(shapes: list[tuple[int, list[int]]]) -> None:
    batch = collate([groups_of(shapes)], shared=True)
    assert batch.row is not None
    assert torch.equal(batch.row.mask_TT(), batch.mask_BTT()[0])


def test_rows_of_several_and_separate_sequences_keep_masks() -> None:
    groups = groups_of([(3, [2, 2]), (2, [4])])
    assert collate([[groups[0]], [groups[1]]], shared=True).row is None
    assert collate([[groups[1]]], shared=False).row is None


@PROPERTY
@given(shapes=SHAPES)
def test_segments_attend_as_a_mask_has_it_forward_and_backward(shapes: list[tuple[int, list[int]]]) -> None:
    batch = collate([groups_of(shapes)], shared=True)
    mask = batch.mask_BTT()[:, None]
    torch.manual_seed(len(shapes))
    T = batch.token_BT.shape[1]
    q, k, v, weight = (3 * torch.randn(1, 2, T, 8, dtype=torch.float64) for _ in range(4))
    made = []
    for how in ("mask", "segments"):
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        if how == "mask":
            out = torch.nn.functional.scaled_dot_product_attention(leaves[0], leaves[1], leaves[2], attn_mask=mask, scale=0.4)
        else:
            assert batch.row is not None
            out = KERNELS["segments"].attend(*leaves, batch.row, 0.4).transpose(1, 2)
        (out * weight).sum().backward()
        made.append([out, *(t.grad for t in leaves)])
    for a, b in zip(*made, strict=True):
        assert torch.allclose(a, b, atol=1e-10, rtol=1e-8)


def test_an_answer_without_a_prompt_attends_to_itself() -> None:
    row = row_of([(0, 2, 3), (1, 1)])
    assert row.own.queries == ((0, 2), (2, 5), (5, 7))
    assert not row.across.queries
    q, k, v = torch.randn(3, 1, 2, 7, 4).unbind()
    out = KERNELS["segments"].attend(q, k, v, row, 0.5).transpose(1, 2)
    own = slice(2, 5)
    alone = torch.nn.functional.scaled_dot_product_attention(q[:, :, own], k[:, :, own], v[:, :, own], is_causal=True, scale=0.5)
    assert torch.allclose(out[:, :, 2:5], alone, atol=1e-6)


def test_large_logits_stay_finite_and_right() -> None:
    batch = collate([groups_of([(4, [3, 2])])], shared=True)
    assert batch.row is not None
    q, k, v = (t * 100 for t in torch.randn(3, 1, 2, 9, 8).unbind())
    out = KERNELS["segments"].attend(q, k, v, batch.row, 1.0).transpose(1, 2)
    whole = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=batch.mask_BTT()[:, None], scale=1.0)
    assert torch.allclose(out, whole, rtol=1e-4, atol=1e-3)


# ----------------------------------------------------------------------------------------------------------------- bodies


@pytest.mark.parametrize("kind", DECODERS)
def test_bodies_score_a_flat_row_as_separate_sequences(kind: str) -> None:
    quiet = {name: 0.0 for name in ("attn_pdrop", "embd_pdrop", "resid_pdrop") if kind == "gpt2"}
    body = classifier(kind, **quiet)
    model = RewardModel(body)
    assert model.flat == (kind != "gemma2")  # which caps its logits: it keeps its masks
    groups = mixed()
    for score, group in zip(score_groups(model, groups, BatchSettings()), groups, strict=True):
        assert score.tolist() == pytest.approx(plain_scores(body, group), abs=1e-5)


@pytest.mark.parametrize("micro_tokens", [1, 60, 4096])
def test_flat_rows_give_the_gradients_of_masked_rows(micro_tokens: int) -> None:
    model = RewardModel(classifier("qwen3"))
    groups, sizes = mixed(), BatchSettings(row_tokens=64, micro_tokens=micro_tokens)
    gradients = []
    for flat in (False, True):
        model.zero_grad()
        for _, batch in micro_batches(groups, sizes, shared=True, flat=flat):
            (model(batch).tanh() * batch.mask_GK).sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for masked, segments in zip(*gradients, strict=True):
        assert (masked - segments).abs().max() <= 1e-4 * masked.abs().max().clamp(min=1e-2)


def test_gradient_checkpointing_computes_the_same_over_segments() -> None:
    model = RewardModel(classifier("llama"))
    [(_, batch)] = micro_batches(mixed(), BatchSettings(), shared=True, flat=True)
    gradients = []
    for wanted in (False, True):
        model.train()
        model.zero_grad()
        if wanted:
            model.classifier.gradient_checkpointing_enable()
        model(batch).sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1])
    assert all(torch.allclose(a, b, atol=1e-5, rtol=1e-4) for a, b in zip(*gradients, strict=True))


def test_dropout_inside_attention_keeps_the_masks() -> None:
    assert not RewardModel(classifier("llama", attention_dropout=0.5)).flat


def test_a_body_with_eager_attention_keeps_the_masks() -> None:
    body = classifier("llama")
    body.set_attn_implementation("eager")
    assert not RewardModel(body).flat
    assert body.config._attn_implementation == "eager"


def test_bf16_goes_over_segments() -> None:
    model = RewardModel(classifier("qwen3"))
    groups = mixed()
    exact, rounded = (score_groups(model, groups, BatchSettings(), precision) for precision in ("fp32", "bf16"))
    gap = np.concatenate(exact) - np.concatenate(rounded)
    assert 0 < np.abs(gap).max() < 0.1 * np.concatenate(exact).std() + 0.1


def test_what_is_saved_does_not_name_our_attention(tmp_path: Path) -> None:
    model = RewardModel(classifier("qwen3"))
    assert model.classifier.config._attn_implementation == NAME
    save_model(model, byte_tokenizer(), tmp_path, {})
    assert NAME not in (tmp_path / "config.json").read_text(encoding="utf-8")


def test_a_body_in_flat_rows_still_takes_plain_calls() -> None:
    body = classifier("qwen2")
    [group] = mixed()[:1]
    before = plain_scores(body, group)
    RewardModel(body)
    assert body.config._attn_implementation == NAME
    assert plain_scores(body, group) == pytest.approx(before, abs=1e-6)


# ---------------------------------------------------------------------------------------------------------------- packing


@PROPERTY
@given(shapes=SHAPES, micro_tokens=st.integers(1, 80))
def test_flat_micro_batches_hold_every_group_once_without_padding(shapes: list[tuple[int, list[int]]], micro_tokens: int) -> None:
    groups = groups_of(shapes)
    batches = list(micro_batches(groups, BatchSettings(micro_tokens=micro_tokens), shared=True, flat=True))
    assert sorted(n for numbers, _ in batches for n in numbers) == list(range(len(groups)))
    for numbers, batch in batches:
        assert batch.token_BT.shape[0] == 1
        assert batch.tokens == batch.token_BT.numel() == sum(len(groups[n].token_T) for n in numbers)
        assert batch.tokens <= micro_tokens or len(numbers) == 1


@PROPERTY
@given(lengths=st.lists(st.integers(1, 40), max_size=60), capacity=st.integers(1, 50))
def test_packing_is_first_fit_decreasing(lengths: list[int], capacity: int) -> None:
    """Against the definition: the longest first, each into the first row with room."""
    rows: list[list[int]] = []
    for n in sorted(range(len(lengths)), key=lambda n: (-lengths[n], n)):
        fits = (row for row in rows if sum(lengths[m] for m in row) + lengths[n] <= capacity)
        row = next(fits, None)
        if row is None:
            rows.append([n])
        else:
            row.append(n)
    assert pack(lengths, capacity) == rows
