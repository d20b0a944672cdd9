"""Terms that a body's own words make: experts in balance, the next token. Held against plain loops and transformers' own functions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from rayward import vocabulary
from rayward.batching import Batch, BatchSettings, collate, micro_batches
from rayward.errors import SettingsError
from rayward.objectives import make_objective
from rayward.rendering import Group
from rayward.reward_model import ModelSettings, RewardModel, load_model, save_model
from rayward.terms import TERMS, Heard, balance, language
from tiny import byte_tokenizer, classifier, language_model, random_group, sequences

torch.set_num_threads(1)
USUAL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
USUAL |= {"vocab_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_experts_per_tok": 2}
EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": {"intermediate_size": 24, "num_local_experts": 4},
    "qwen3_moe": {"head_dim": 8, "moe_intermediate_size": 16, "num_experts": 5, "intermediate_size": 24},
    "gpt_oss": {"head_dim": 8, "intermediate_size": 16, "num_local_experts": 4, "sliding_window": 64},
}


def mixture(kind: str) -> RewardModel:
    """A random model whose tokens go to two of several experts."""
    config = AutoConfig.for_model(kind, **{**USUAL, **EXPERTS[kind], "num_labels": 1})
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim >= 2:
                nn.init.normal_(weight, std=0.25)
    return RewardModel(model.eval())


def some_groups() -> list[Group]:
    rng = np.random.default_rng(0)
    return [random_group(rng, 5, [7, 4, 9]), random_group(rng, 11, [3]), random_group(rng, 4, [6, 12])]


def both_ways(groups: list[Group]) -> list[Batch]:
    """The same examples in packed rows, and every answer a row of its own."""
    return [collate([groups[:2], groups[2:]], shared=True), collate([[g] for g in groups], shared=False)]


def term(model: RewardModel, batch: Batch, name: str, shares: bool) -> torch.Tensor:
    was, model.shares_prefix = model.shares_prefix, shares
    try:
        return model.hear(batch, (name,)).terms[name]
    finally:
        model.shares_prefix = was


# ---------------------------------------------------------------------------------------------------------------- batches


def test_every_token_knows_its_example_its_answer_and_where_its_prompt_ends() -> None:
    groups = some_groups()
    for shared, batch in zip((True, False), both_ways(groups), strict=True):
        token_N, group_N, answer_N = (t.flatten() for t in (batch.token_BT, batch.group_BT, batch.answer_BT))
        for g, group in enumerate(groups):
            prompt, *answers = np.split(group.token_T, np.cumsum(group.length_A)[:-1])
            copies = 1 if shared else len(answers)
            assert token_N[(group_N == g) & (answer_N == 0)].tolist() == prompt.tolist() * copies
            for n, answer in enumerate(answers, 1):
                assert token_N[(group_N == g) & (answer_N == n)].tolist() == answer.tolist()
            for k in range(len(group.place_K)):
                end = int(batch.prompt_GK[g, k])
                assert (int(group_N[end]), int(answer_N[end]), int(token_N[end])) == (g, 0, int(prompt[-1]))
                assert end < int(batch.place_GK[g, k])
                if not shared:
                    assert end // batch.token_BT.shape[1] == int(batch.place_GK[g, k]) // batch.token_BT.shape[1]
        assert ((group_N < 0) == (batch.segment_BT.flatten() < 0)).all()


# ---------------------------------------------------------------------------------------------------------------- balance


def test_balance_is_its_formula_over_the_tokens_of_an_example() -> None:
    groups, E, k = some_groups(), 4, 2
    for shared, batch in zip((True, False), both_ways(groups), strict=True):
        rng = torch.Generator().manual_seed(0)
        of_token: dict[Any, torch.Tensor] = {}  # the same router for the same token of the same segment, wherever it lies
        logit_NE = torch.zeros(batch.token_BT.numel(), E)
        for n in range(len(logit_NE)):
            name = tuple(int(t.flatten()[n]) for t in (batch.group_BT, batch.answer_BT, batch.position_BT))
            of_token.setdefault(name, torch.randn(E, generator=rng) * 2)
            logit_NE[n] = of_token[name]
        term_G = balance(Heard(torch.zeros(0), (logit_NE, 3 * logit_NE), k), batch)
        for g in range(len(groups)):
            per_layer = []
            for scale in (1, 3):
                sent, mean, tokens = [0.0] * E, [0.0] * E, 0
                for (group, _, _), row_E in of_token.items():
                    if group != g:
                        continue
                    tokens += 1
                    chance = (scale * row_E).softmax(-1).tolist()
                    for e in sorted(range(E), key=lambda e: -chance[e])[:k]:
                        sent[e] += 1 / k
                    mean = [m + p for m, p in zip(mean, chance, strict=True)]
                per_layer.append(E * sum(f * p for f, p in zip(sent, mean, strict=True)) / tokens**2)
            assert term_G[g].item() == pytest.approx(sum(per_layer) / 2, rel=1e-5), shared


@pytest.mark.parametrize("kind", list(EXPERTS))
def test_balance_of_one_sequence_is_that_of_transformers(kind: str) -> None:
    """Of one layer: over several, transformers multiplies means over all layers, and Switch adds up what every layer has."""
    model, group = mixture(kind), random_group(np.random.default_rng(0), 5, [9])
    [ids] = sequences(group)
    with torch.no_grad():
        said = model.classifier.base_model(input_ids=ids, output_router_logits=True)
        mine = term(model, collate([[group]], shared=True), "balance", model.shares_prefix)
    each = [load_balancing_loss_func((r.flatten(0, -2),), r.shape[-1], 2) / 2 for r in said.router_logits]
    assert mine.item() == pytest.approx(float(sum(each) / len(each)), rel=1e-5)


@pytest.mark.parametrize("kind", list(EXPERTS))
def test_balance_is_the_same_packed_and_separate_and_however_a_step_is_cut(kind: str) -> None:
    model, groups = mixture(kind), some_groups()
    with torch.no_grad():
        packed, separate = (term(model, b, "balance", shares) for shares, b in zip((True, False), both_ways(groups), strict=True))
        np.testing.assert_allclose(packed, separate, rtol=1e-4)
        alone = [term(model, collate([[g]], shared=True), "balance", True).item() for g in groups]
        np.testing.assert_allclose(packed, alone, rtol=1e-4)
        for settings in (BatchSettings(micro_tokens=1), BatchSettings(row_tokens=20), BatchSettings()):
            for numbers, batch in micro_batches(groups, settings, model.shares_prefix, model.flat):
                np.testing.assert_allclose(model.hear(batch, ("balance",)).terms["balance"], [alone[n] for n in numbers], rtol=1e-4)


def test_experts_in_balance_give_one_and_a_single_expert_gives_all() -> None:
    batch = both_ways(some_groups())[0]
    N, E = batch.token_BT.numel(), 4
    even = torch.eye(E)[torch.arange(N) % E] * 1e-4
    assert balance(Heard(torch.zeros(0), (even,), 1), batch).tolist() == pytest.approx([1.0] * 3, rel=1e-3)
    one = torch.tensor([50.0, 0, 0, 0]).repeat(N, 1)
    assert balance(Heard(torch.zeros(0), (one,), 1), batch).tolist() == pytest.approx([E] * 3)


def test_balance_teaches_routers_to_spread() -> None:
    model = mixture("mixtral")
    with torch.no_grad():
        for module in model.modules():
            if type(module).__name__ == "MixtralTopKRouter":
                module.get_parameter("weight").mul_(4)
    batch, objective = both_ways(some_groups())[0], make_objective("bradley_terry", regularise='{"balance": 1}')
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for _ in range(20):
        said = model.hear(batch, objective.body_terms)
        loss_G = objective.of(batch, model.reading(said.output_GKC), said.output_GKC, 0, said.terms)
        plain_G = replace(objective, terms={}).of(batch, model.reading(said.output_GKC), said.output_GKC)
        torch.testing.assert_close(loss_G, plain_G + said.terms["balance"])
        optimizer.zero_grad()
        loss_G.mean().backward()
        optimizer.step()
        losses.append(said.terms["balance"].mean().item())
    assert losses[-1] < losses[0] - 0.02


# ---------------------------------------------------------------------------------------------------------------- language


def with_language(folder: Path, tied: bool, kind: str = "scalar") -> tuple[RewardModel, Any]:
    plain = language_model(folder, tied=tied)
    return load_model(str(folder), ModelSettings(head=kind, new_head=True, language=True)).model, plain


@pytest.mark.parametrize("chunk", [1, 1 << 25])
@pytest.mark.parametrize("tied", [False, True])
def test_the_next_token_is_that_of_a_plain_language_model(tied: bool, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "CHUNK", chunk)
    model, plain = with_language(tmp_path, tied)
    groups = some_groups()
    for shares, batch in zip((True, False), both_ways(groups), strict=True):
        term_G = term(model, batch, "language", shares)
        for group, mine in zip(groups, term_G, strict=True):
            prompt, lost, tokens = int(group.length_A[0]), 0.0, 0
            for ids in sequences(group):
                with torch.no_grad():
                    logit_TV = plain(input_ids=ids).logits[0]
                lost += F.cross_entropy(logit_TV[prompt - 1 : -1], ids[0, prompt:], reduction="sum").item()
                tokens += ids.shape[1] - prompt
            assert mine.item() == pytest.approx(lost / tokens, rel=1e-4)


def test_chunks_have_the_gradient_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = both_ways(some_groups())[0]
    hidden_BTD, weight_VD = torch.randn(*batch.token_BT.shape, 8), torch.randn(96, 8)
    found = []
    for chunk in (1, 96 * 5, 1 << 25):
        monkeypatch.setattr(vocabulary, "CHUNK", chunk)
        leaves = [t.clone().requires_grad_() for t in (hidden_BTD, weight_VD)]
        language(Heard(leaves[0], weight_VD=leaves[1]), batch).sum().backward()
        found.append([leaf.grad for leaf in leaves])
    for grads in found[1:]:
        torch.testing.assert_close(grads, found[0])


@pytest.mark.parametrize("tied", [False, True])
def test_a_verifier_learns_beside_the_next_token_and_stays_a_language_model(tied: bool, tmp_path: Path) -> None:
    """Cobbe's joint objective: both losses fall, and the folder is a verifier and a language model."""
    model, _ = with_language(tmp_path / "base", tied)
    groups = [replace(g, target_K=(g.target_K > 0.5).astype(np.float32)) for g in some_groups()]
    batch = collate([[g] for g in groups], shared=True)
    objective = make_objective("binary_cross_entropy", regularise='{"language": 0.5}')
    optimizer, seen = torch.optim.AdamW(model.parameters(), lr=5e-3), []
    for _ in range(20):
        said = model.hear(batch, objective.body_terms)
        loss = objective.of(batch, model.reading(said.output_GKC), said.output_GKC, 0, said.terms).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append((loss.item(), said.terms["language"].mean().item()))
    assert all(last < 0.9 * first for first, last in zip(seen[0], seen[-1], strict=True))
    save_model(model, byte_tokenizer(), tmp_path / "saved", {"render": {}})
    again = load_model(str(tmp_path / "saved"), ModelSettings()).model
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    with torch.no_grad():
        torch.testing.assert_close(model.hear(batch, ("language",)), again.hear(batch, ("language",)), rtol=1e-4, atol=1e-5)
        [ids] = sequences(groups[1])
        logit_TV = plain(input_ids=ids).logits[0]
        expected = F.cross_entropy(logit_TV[10:-1], ids[0, 11:])
        assert again.hear(batch, ("language",)).terms["language"][1].item() == pytest.approx(expected.item(), rel=1e-4)


# ---------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(("name", "word"), [("balance", "tells of none"), ("language", "net.language=true")])
@pytest.mark.parametrize("body", ["qwen3", "bert"])
def test_a_body_without_the_ingredients_is_refused(name: str, word: str, body: str) -> None:
    model = RewardModel(classifier(body))
    with pytest.raises(SettingsError, match=word):
        model.hear(collate([some_groups()], shared=model.shares_prefix), (name,))


def test_terms_are_named_and_weighed_as_regularisers_are() -> None:
    assert make_objective("bradley_terry", regularise='{"balance": 0.01, "centre": 1}').body_terms == ("balance",)
    assert set(TERMS) == {"balance", "language"}
    with pytest.raises(SettingsError, match="balanced"):
        make_objective("bradley_terry", regularise='{"balanced": 0.01}')
