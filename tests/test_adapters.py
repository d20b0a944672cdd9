"""LoRA on every body that tests have: what is adapted, what is merged, and what is refused before anything is learned."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import tiny
from rayward import adapters, checkpoints
from rayward.adapters import LoraSettings
from rayward.batching import BatchSettings, collate
from rayward.errors import ModelError, UserError
from rayward.fitting import fit
from rayward.rendering import Group, RenderSettings
from rayward.reward_model import ModelSettings, RewardModel, load_model, save_model, score_groups
from rayward.training import TrainSettings
from test_bodies import MORE, mixed_groups
from tiny import byte_tokenizer, classifier, toy_dataset

pytest.importorskip("peft", reason="adapters need peft: pip install 'rayward[lora]'")
torch.set_num_threads(1)
pytestmark = pytest.mark.usefixtures("one_thread")

BODIES = list(tiny.BODIES | MORE)
MIXTURES = ["mixtral", "qwen3_moe", "gpt_oss", "jamba", "qwen3_next"]
UNCALLED = {"jamba": "dt_proj"}  # a matrix that a body multiplies with by itself, without calling its layer


def scores(model: RewardModel, groups: list[Group]) -> np.ndarray:
    return np.concatenate(score_groups(model.eval(), groups, BatchSettings()))


def adapted(kind: str, **changes: Any) -> RewardModel:
    """A random body with adapters, none of them trained."""
    model = RewardModel(classifier(kind, vocabulary=tiny.WORDS), max_length=64)
    torch.manual_seed(0)
    adapters.add(model.classifier, model.head_name, LoraSettings(**{"rank": 2, **changes}))
    return model


def stepped(model: RewardModel, groups: list[Group]) -> set[str]:
    """Take three large steps; returns which parameters got no gradient."""
    trained = {name: p for name, p in model.classifier.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    batch = collate([groups] if model.shares_prefix else [[g] for g in groups], shared=model.shares_prefix)
    for _ in range(3):
        optimizer.zero_grad()
        model.train()(batch).square().sum().backward()
        optimizer.step()
    return {name for name, p in trained.items() if p.grad is None}


@pytest.mark.parametrize("kind", BODIES)
def test_what_is_merged_scores_as_what_was_adapted(kind: str, tmp_path: Path) -> None:
    groups = mixed_groups(places=False)
    model = adapted(kind)
    before, head = scores(model, groups), [p.detach().clone() for p in model.head.parameters()]
    idle = stepped(model, groups)
    assert all(UNCALLED.get(kind, "nothing") in name for name in idle), "an adapter that nothing reads"
    after = scores(model, groups)
    assert np.abs(after - before).max() > 0.1
    assert not any(torch.equal(was, now) for was, now in zip(head, model.head.parameters(), strict=True))
    adapters.merge(model.classifier)
    assert not [name for name, _ in model.classifier.named_modules() if "lora" in name or "base_layer" in name]
    np.testing.assert_allclose(scores(model, groups), after, rtol=1e-5, atol=1e-5)
    save_model(model, byte_tokenizer(), tmp_path, {})
    np.testing.assert_allclose(scores(load_model(str(tmp_path), ModelSettings(), 64).model, groups), after, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", MIXTURES)
def test_all_linear_is_every_matrix_but_routers_embeddings_and_head(kind: str) -> None:
    plain, model = classifier(kind, vocabulary=tiny.WORDS), adapted(kind)
    stepped(model, mixed_groups(places=False))
    adapters.merge(model.classifier)
    now = dict(model.classifier.named_parameters())
    changed = {name for name, was in plain.named_parameters() if not torch.equal(was, now[name])}
    left = {name for name, was in plain.named_parameters() if was.ndim > 1} - changed
    allowed = ("embed_tokens.", "gate.weight", "router.", "conv1d.", "A_log", "experts.gate_up_proj_bias", "experts.down_proj_bias")
    assert all(any(word in name for word in (*allowed, UNCALLED.get(kind, "nothing"))) for name in left), left
    assert not [name for name in left if "shared_expert" in name]
    assert {name.rpartition(".")[2] for name in changed if ".experts." in name} == {"gate_up_proj", "down_proj"}
    for name in changed - {"score.weight"}:
        delta = (now[name] - dict(plain.named_parameters())[name]).detach()
        assert (torch.linalg.matrix_rank(delta, atol=1e-4) <= 2).all(), name


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("q_proj,v_proj", {"q_proj", "v_proj"}),
        ("experts", {"gate_up_proj", "down_proj"}),
        ("self_attn.q_proj, experts.down_proj", {"q_proj", "down_proj"}),
    ],
)
def test_targets_name_layers_and_experts(targets: str, expected: set[str]) -> None:
    plain, model = classifier("qwen3_moe", vocabulary=tiny.WORDS), adapted("qwen3_moe", targets=targets)
    stepped(model, mixed_groups(places=False))
    adapters.merge(model.classifier)
    now = dict(model.classifier.named_parameters())
    changed = {name for name, was in plain.named_parameters() if not torch.equal(was, now[name])} - {"score.weight"}
    assert {name.removesuffix(".weight").rpartition(".")[2] for name in changed} == expected


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dropout": 0.1}, r"lora.dropout=0.1(.|\n)*experts.gate_up_proj(.|\n)*--set lora.targets=k_proj,o_proj,q_proj,v_proj"),
        ({"targets": "q_proj,wq"}, r"lora.targets=wq fits nothing(.|\n)*it has down_proj, gate_up_proj, k_proj"),
        ({"targets": "mlp.gate"}, r"mlp.gate fits nothing"),  # a router
        ({"targets": "score"}, r"score fits nothing"),  # the head is trained itself
    ],
)
def test_what_cannot_be_adapted_is_refused_with_a_way_out(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        adapted("qwen3_moe", **changes)


def test_dropout_beside_a_mixtures_attention_is_no_mistake() -> None:
    model, groups = adapted("qwen3_moe", dropout=0.1, targets="q_proj,o_proj"), mixed_groups(places=False)
    assert not stepped(model, groups)
    after = scores(model, groups)
    adapters.merge(model.classifier)
    np.testing.assert_allclose(scores(model, groups), after, rtol=1e-5, atol=1e-5)


def test_a_matrix_of_another_kind_of_number_is_refused_before_training() -> None:
    model = RewardModel(classifier("qwen3"))
    layer = model.classifier.get_submodule("model.layers.0.mlp.up_proj")
    layer.weight = nn.Parameter(layer.weight.detach().round().to(torch.int8), requires_grad=False)
    with pytest.raises(ModelError, match=r"up_proj is kept in torch.int8(.|\n)*take a model in bfloat16"):
        adapters.add(model.classifier, "score", LoraSettings(rank=2))


class Crash(Exception):
    """What stands for a lost machine."""


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_a_mixture_is_fitted_goes_on_after_a_crash_and_is_a_plain_model_at_the_end(kind: str, tmp_path: Path) -> None:
    tiny.language_model(tmp_path / "base", kind)
    pairs = toy_dataset("pairs", tmp_path / "data", 24)
    settings = replace(
        tiny.FIT,
        examples=str(pairs.path),
        model=str(tmp_path / "base"),
        net=ModelSettings(new_head=True),
        lora=LoraSettings(rank=2),
        batch=BatchSettings(size=4),
        train=TrainSettings(lr=5e-3, validate_every=2, checkpoint_every=2, log_every=1, recompute=True),
        render=RenderSettings(max_length=192),
    )
    whole = fit(settings, str(tmp_path / "whole"))

    def crash(line: dict[str, float]) -> None:
        if line["step"] == 3:
            raise Crash

    with pytest.raises(Crash):
        fit(settings, str(tmp_path / "broken"), report=crash)
    done = fit(settings, str(tmp_path / "broken"))
    assert done.metrics == whole.metrics
    kept, again, start = (load_file(f / "model.safetensors") for f in (whole.model, done.model, tmp_path / "whole" / "start"))
    assert kept.keys() == again.keys() == start.keys()
    assert all(torch.equal(kept[name], again[name]) for name in kept)
    assert {"score.weight"} < {name for name in kept if not torch.equal(kept[name], start[name])}
    names = load_file(checkpoints.steps(tmp_path / "whole" / "run")[-1] / "model.safetensors").keys()
    assert {name for name in names if "lora_" not in name} == {"score.weight"}
    assert sum(".experts." in name for name in names) == 8  # two factors of two matrices in two layers
