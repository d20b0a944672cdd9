"""Losses at every token: what a batch says is at a token is what the answer alone has there, and DeepSpeed-Chat's own loop says the same.

The references are plain transformers on one unpadded sequence, and the loop of DeepSpeed-Chat as it is written.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from rayward.batching import BatchSettings, collate
from rayward.errors import SettingsError
from rayward.fitting import FitSettings, fit, prepare
from rayward.objectives import OBJECTIVES, make_objective
from rayward.rendering import Group, RenderSettings
from rayward.reward_model import ModelSettings, RewardModel
from rayward.scoring import Scorer
from rayward.training import TrainSettings
from tiny import classifier, dataset_of, random_group, sequences, toy_examples

torch.set_num_threads(1)
EVERY = ("every_token",)
GROUPS = [
    random_group(np.random.default_rng(n), prompt, answers) for n, (prompt, answers) in enumerate([(5, [6, 9]), (12, [4]), (3, [9, 2])])
]


def token_scores(model: RewardModel, group: Group) -> list[torch.Tensor]:
    """score_T of every answer, each a sequence of its own."""
    body, prompt = model.classifier.base_model, int(group.length_A[0])
    return [model.head(body(input_ids=ids).last_hidden_state[0, prompt:])[:, 0] for ids in sequences(group)]


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("body", ["qwen3", "gpt2"])
def test_every_token_of_every_answer_is_read(body: str, shared: bool) -> None:
    model = RewardModel(classifier(body)).eval()
    model.shares_prefix = shared
    batch = collate([GROUPS] if shared else [[g] for g in GROUPS], shared)
    index_GKT = batch.answer_GKT()
    with torch.no_grad():
        output_GKC, terms = model.hear(batch, EVERY)
        every_GKT = terms["every_token"]
        for g, group in enumerate(GROUPS):
            ends = np.cumsum(group.length_A)
            for k, score_T in enumerate(token_scores(model, group)):
                T = len(score_T)
                np.testing.assert_allclose(every_GKT[g, k, :T], score_T, rtol=2e-4, atol=2e-5)
                assert every_GKT[g, k, T - 1].item() == pytest.approx(output_GKC[g, k, 0].item(), rel=1e-5)
                assert (index_GKT[g, k, T:] == -1).all()
                said = batch.token_BT.flatten()[index_GKT[g, k, :T]]
                assert said.tolist() == group.token_T[ends[k] : ends[k + 1]].tolist()
    assert (index_GKT[~batch.mask_GK] == -1).all()


def test_tokens_of_steps_are_those_of_their_answer() -> None:
    group = random_group(np.random.default_rng(0), 4, [7, 5], [3, 2])
    index_GKT = collate([[group]], shared=True).answer_GKT()
    assert index_GKT[0].tolist() == [[*range(4, 11)]] * 3 + [[*range(11, 16), -1, -1]] * 2


def deepspeed_chat(chosen_id: torch.Tensor, rejected_id: torch.Tensor, chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """One pair of DeepSpeed-Chat's RewardModel.forward, for answers of one length, which have no padding."""
    divergence = int((chosen_id != rejected_id).nonzero()[0])
    return -F.logsigmoid(chosen[divergence:] - rejected[divergence:]).mean()


@pytest.mark.parametrize("same", [0, 1, 5])
def test_it_is_the_loop_of_deepspeed_chat(same: int) -> None:
    model = RewardModel(classifier("qwen3")).eval()
    group = random_group(np.random.default_rng(same), 6, [8, 8])
    group.token_T[14 : 14 + same] = group.token_T[6 : 6 + same]
    group.token_T[14 + same] = 3 + (group.token_T[6 + same] - 2) % 90
    group.target_K[:] = 1.0, 0.0
    batch, entry = collate([[group]], shared=True), make_objective("token_wise")
    output_GKC, terms = model.hear(batch, entry.body_terms)
    loss = entry.of(batch, output_GKC[..., 0], output_GKC, 0, terms)
    (chosen, rejected), (a, b) = token_scores(model, group), (s[0, 6:] for s in sequences(group))
    expected = deepspeed_chat(a, b, chosen, rejected)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    parts = [torch.autograd.grad(x.sum(), list(model.parameters()), retain_graph=True) for x in (loss, expected)]
    for one, two in zip(*parts, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5)


def test_one_token_each_is_the_comparison_at_the_end() -> None:
    model = RewardModel(classifier("qwen3")).eval()
    batch = collate([[random_group(np.random.default_rng(5), 6, [1, 1, 1])]], shared=True)
    entry, plain = make_objective("token_wise"), make_objective("bradley_terry")
    output_GKC, terms = model.hear(batch, entry.body_terms)
    one, two = (e.of(batch, output_GKC[..., 0], output_GKC, 0, terms) for e in (entry, plain))
    assert one.item() == pytest.approx(two.item(), rel=1e-5)


def test_answers_of_the_same_tokens_teach_nothing() -> None:
    every = torch.tensor([[[0.3, 2.0], [-1.0, 5.0]]], requires_grad=True)
    token = torch.tensor([[[4, 5], [4, 5]]])
    loss = OBJECTIVES["token_wise"].loss(
        every[..., -1], torch.tensor([[1.0, 0.0]]), torch.ones(1, 2).bool(), every_GKT=every, token_GKT=token
    )
    loss.sum().backward()
    assert loss.item() == 0
    assert every.grad is not None
    assert not every.grad.any()


# ---------------------------------------------------------------------------------------------------------------- a whole fit


def fit_settings(examples: Path, objective: str, net: ModelSettings, render: RenderSettings, **train: Any) -> FitSettings:
    return FitSettings(str(examples), "tiny", objective, net, render, BatchSettings(16), TrainSettings(lr=5e-3, **train), 0.1)


@pytest.mark.parametrize(("kind", "objective"), [("pairs", "token_wise"), ("outcomes", "token_cross_entropy")])
def test_a_model_trained_at_every_token_is_validated_and_scored_at_the_end(kind: str, objective: str, tmp_path: Path) -> None:
    examples = toy_examples(kind, 40, answers=4)
    dataset_of(examples, tmp_path / "examples", f"label_{kind}")
    net = ModelSettings(width=32, layers=1)
    settings = fit_settings(tmp_path / "examples", objective, net, RenderSettings(max_length=160), epochs=2)
    done = fit(settings, str(tmp_path / "fit"))
    scorer = Scorer.load(done.model)
    assert all(len(s) == len(e.targets) for s, e in zip(scorer(examples[:9]), examples[:9], strict=True))
    assert 0 <= done.metrics["accuracy"] <= 1
    assert scorer.temperature > 0


@pytest.mark.parametrize(
    ("kind", "net", "render", "word"),
    [
        ("steps", {}, {}, "have a target for every step"),
        ("pairs", {}, {"judge": "Is it right? Yes or No."}, "render.judge puts a question behind it"),
    ],
)
def test_what_has_no_target_for_its_tokens_is_refused(kind: str, net: Any, render: Any, word: str, tmp_path: Path) -> None:
    dataset_of(toy_examples(kind, 4), tmp_path / "examples", f"label_{kind}")
    settings = fit_settings(tmp_path / "examples", "token_wise", ModelSettings(width=16, **net), RenderSettings(**render))
    with pytest.raises(SettingsError, match=word):
        prepare(settings, str(tmp_path / "fit"))


def test_a_body_that_looks_ahead_is_refused() -> None:
    model = RewardModel(classifier("bert")).eval()
    with pytest.raises(SettingsError, match="a decoder, and a head that is not of attributes"):
        model.hear(collate([[g] for g in GROUPS], shared=False), EVERY)
