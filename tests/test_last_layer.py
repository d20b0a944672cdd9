"""The last layer at the tokens that are read: scores and gradients of a whole pass, for every body, and nothing left over afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from rayward import adapters
from rayward.adapters import LoraSettings
from rayward.batching import Batch, collate
from rayward.reward_model import RewardModel, last_layer
from rayward.reward_model.bodies import body_of
from rayward.reward_model.last_layer import last_of, parts_of
from rayward.terms import EVERY
from tiny import DECODERS, classifier, random_group

torch.set_num_threads(1)
EXPERTS = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8},
}
USUAL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


def groups(seed: int = 0) -> list[Any]:
    rng = np.random.default_rng(seed)
    shapes: list[tuple[int, Sequence[int], Sequence[int]]] = [(7, (5, 9, 3), (1, 3, 1)), (1, (4,), ()), (12, (6, 6), (2, 2))]
    return [random_group(rng, *shape) for shape in shapes]


@contextmanager
def whole(model: RewardModel) -> Iterator[None]:
    """Every module of the last layer on every token."""
    kept, model.last_layer = model.last_layer, None
    yield
    model.last_layer = kept


def outputs_and_gradients(model: RewardModel, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    output_GKC = model.outputs(batch)[batch.mask_GK]
    (output_GKC * torch.linspace(-1, 1, output_GKC.numel()).view_as(output_GKC)).sum().backward()
    return output_GKC.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def check_equal(model: RewardModel, batch: Batch) -> None:
    some, gradients = outputs_and_gradients(model, batch)
    with whole(model):
        expected, theirs = outputs_and_gradients(model, batch)
    torch.testing.assert_close(some, expected, rtol=2e-5, atol=2e-6)
    assert {n for n, g in gradients.items() if g.any()} == {n for n, g in theirs.items() if g.any()}
    largest = max(g.abs().max() for g in theirs.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=2e-4, atol=float(largest) * 2e-6)


def computed(model: RewardModel, batch: Batch) -> dict[str, int]:
    """Tokens that went through the modules of the last layer with weights of their own."""
    seen: dict[str, int] = {}
    layer = last_of(body_of(model.classifier))
    assert layer is not None
    hooks = [
        module.register_forward_hook(lambda _, args, out, name=name: seen.update({name: args[0][..., 0].numel()}))
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear)
    ]
    model.outputs(batch)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("kind", DECODERS)
def test_scores_and_gradients_are_those_of_a_whole_pass(kind: str, shared: bool) -> None:
    model = RewardModel(classifier(kind)).eval()
    assert model.last_layer is not None
    assert model.last_layer.parts
    model.shares_prefix = shared
    check_equal(model, collate([groups()] if shared else [[g] for g in groups()], shared))


@pytest.mark.parametrize("kind", list(EXPERTS))
def test_experts_too(kind: str) -> None:
    model = RewardModel(moe(kind)).eval()
    assert model.last_layer is not None
    assert "mlp" in model.last_layer.parts
    check_equal(model, collate([groups()], shared=True))


def moe(kind: str) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=96, pad_token_id=0, num_labels=1, **USUAL, **EXPERTS[kind])
    return AutoModelForSequenceClassification.from_config(config).eval()


def test_what_runs_on_few_tokens_is_what_no_other_token_needs() -> None:
    model = RewardModel(classifier("llama")).eval()
    batch = collate([groups()], shared=True)
    read, every = len(batch.read_N), batch.token_BT.numel()
    assert read == len(batch.place_GK[batch.mask_GK].unique()) + 1  # and token 0, of places that are masked
    counts = computed(model, batch)
    assert {n for n, tokens in counts.items() if tokens == every} == {"self_attn.k_proj", "self_attn.v_proj"}
    assert {tokens for tokens in counts.values() if tokens != every} == {read}


def test_many_tokens_are_read_without_a_mask_over_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = RewardModel(classifier("qwen3")).eval(), collate([groups()], shared=True)
    few = outputs_and_gradients(model, batch)
    monkeypatch.setattr(last_layer, "FEW", 0)
    many = outputs_and_gradients(model, batch)
    torch.testing.assert_close(few[0], many[0], rtol=2e-5, atol=2e-6)
    check_equal(model, batch)


def test_hidden_states_of_every_token_are_right_when_asked_for() -> None:
    model, batch = RewardModel(classifier("qwen2")).eval(), collate([groups()], shared=True)
    with torch.no_grad():
        before = model.hidden(batch)
        model.outputs(batch)
        after = model.hidden(batch)
    assert torch.equal(before, after)
    assert (before.norm(dim=-1) > 0).all()


def test_a_pass_that_fails_leaves_nothing_behind() -> None:
    model, batch = RewardModel(classifier("qwen2")).eval(), collate([groups()], shared=True)
    before = model.hidden(batch)
    hook = body_of(model.classifier).norm.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.outputs(batch)
    hook.remove()
    assert torch.equal(model.hidden(batch), before)


def test_layers_that_are_computed_again_give_the_same_gradients() -> None:
    model, batch = RewardModel(classifier("llama")).train(), collate([groups()], shared=True)
    expected = outputs_and_gradients(model, batch)
    model.classifier.activation_checkpointing_enable({"use_reentrant": False})
    again = outputs_and_gradients(model, batch)
    assert torch.equal(again[0], expected[0])
    for name, gradient in again[1].items():
        torch.testing.assert_close(gradient, expected[1][name], rtol=1e-5, atol=1e-7)
    check_equal(model, batch)


def test_adapters_in_the_last_layer_learn_the_same() -> None:
    model = RewardModel(classifier("llama")).eval()
    adapters.add(model.classifier, model.head_name, LoraSettings(rank=4))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    check_equal(model, collate([groups()], shared=True))


def test_a_loss_at_every_token_gets_a_whole_pass() -> None:
    model, batch = RewardModel(classifier("llama")).eval(), collate([groups()], shared=True)
    every_GKT = model.hear(batch, (EVERY,)).terms[EVERY]
    with whole(model):
        torch.testing.assert_close(every_GKT, model.hear(batch, (EVERY,)).terms[EVERY])
    last_GK = every_GKT.gather(-1, (batch.answer_GKT() >= 0).sum(-1, keepdim=True).clamp(min=1) - 1).squeeze(-1)
    ends = batch.mask_GK & (batch.answer_GKT().max(-1).values == batch.place_GK)
    torch.testing.assert_close(last_GK[ends], model(batch)[ends], rtol=2e-5, atol=2e-6)


def test_no_module_is_taken_whose_output_at_other_tokens_is_needed() -> None:
    for kind in DECODERS:
        parts = parts_of(classifier(kind), packed=True)
        assert not {part.split(".")[-1] for part in parts} & {"k_proj", "v_proj", "c_attn", "query_key_value", "input_layernorm", "ln_1"}


def test_an_encoder_is_left_alone() -> None:
    assert RewardModel(classifier("bert")).last_layer is None


def test_two_rewards_of_one_body_do_not_disturb_each_other() -> None:
    body, batch = classifier("qwen2"), collate([groups()], shared=True)
    first, second = RewardModel(body).eval(), RewardModel(body).eval()
    expected = first(batch)
    assert torch.equal(second(batch), expected)
    assert torch.equal(first(batch), expected)
