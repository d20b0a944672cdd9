"""Several heads on one body: scores and losses by their formulas, members that stay apart, and what is made of their differences.

The references are plain transformers on one unpadded sequence, models of one head each, and numbers worked out by hand.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

from driving import done, here
from rayward.adapters import LoraSettings
from rayward.batching import Batch, BatchSettings, collate
from rayward.errors import ModelError, SettingsError
from rayward.fitting import FitSettings, fit, prepare
from rayward.heads import KINDS, Reading, make_head, make_reading
from rayward.objectives import OBJECTIVES, bootstrap, make_objective
from rayward.records import Rollout, prompt_id, rollouts_table
from rayward.rendering import Group
from rayward.reward_model import Loaded, ModelSettings, RewardModel, load_model, save_model, score_groups, tiny_model
from rayward.scoring import Scorer
from rayward.storage import open_dataset
from rayward.terms import EVERY
from rayward.training import TrainSettings
from rayward.uncertainty import Members, SelectSettings, measure_prompts
from tiny import FIT, byte_tokenizer, classifier, on_disk, question, random_group, sequences, toy_dataset, toy_examples, toy_rollouts

torch.set_num_threads(1)
M = 3
NAMES = ("helpful", "short")
FREE = [kind for kind, entry in KINDS.items() if not entry.tied]
LENGTHS = [(5, [6, 9]), (12, [4]), (3, [20, 2])]
GROUPS = [random_group(np.random.default_rng(n), prompt, answers) for n, (prompt, answers) in enumerate(LENGTHS)]


def made(folder: Path, kind: str = "scalar", layers: int = 1, body: str = "qwen3", seed: int = 3, **changes: Any) -> Loaded:
    """A random body with a fresh head of M members."""
    if not folder.exists():
        classifier(body, vocabulary=420).save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
    torch.manual_seed(seed)
    settings = ModelSettings(**{"head": kind, "head_layers": layers, "members": M, "new_head": True, **changes})
    return load_model(str(folder), settings, attributes=NAMES if kind == "attributes" else ())


def saved(loaded: Loaded, folder: Path, **notes: Any) -> str:
    save_model(loaded.model, loaded.tokenizer, folder, notes)
    return str(folder)


def weights_of(head: Iterable[torch.Tensor], m: int, outputs: int = 1) -> list[torch.Tensor]:
    """What of the weights of a head, or of their gradients, is one member's: (outputs, width), or two layers with their biases."""
    first, *more = head
    rows = slice(m * outputs, (m + 1) * outputs)
    if not more:
        return [first[rows]]
    bias, last, last_bias = more
    own = slice(m * first.shape[1], (m + 1) * first.shape[1])
    return [first[own], bias[own], last[rows, own], last_bias[rows]]


def alone(model: RewardModel, m: int) -> nn.Module:
    """One member as a head by itself, in torch's own layers."""
    C = len(model.reading.names)
    head = make_head(model.classifier.config.hidden_size, model.reading.one)
    with torch.no_grad():
        for mine, its in zip(head.parameters(), weights_of(model.head.parameters(), m, C), strict=True):
            mine.copy_(its)
    return head


def one_score(kind: str, said: list[float]) -> float:
    """What the outputs of one member come to."""
    if kind == "two_class":
        return said[1] - said[0]
    if kind == "three_class":
        wrong, neutral, right = (math.exp(x) for x in said)
        return math.log((right + neutral / 2) / (wrong + neutral / 2))
    return float(np.mean(said)) if kind == "attributes" else said[0]


@torch.no_grad()
def by_hand(model: RewardModel, group: Group) -> np.ndarray:
    """score_KM of a group, answer by answer, member by member."""
    heads = [alone(model, m) for m in range(M)]
    hidden = [model.classifier.base_model(input_ids=ids).last_hidden_state[0, -1] for ids in sequences(group)]
    return np.array([[one_score(model.reading.kind, head(h).tolist()) for head in heads] for h in hidden])


# -------------------------------------------------------------------------------------------------------------- the score


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("kind", FREE)
def test_the_score_is_the_mean_of_members_packed_and_reloaded(kind: str, layers: int, tmp_path: Path) -> None:
    model = made(tmp_path / "base", kind, layers).model
    again = load_model(saved(made(tmp_path / "base", kind, layers), tmp_path / "saved"), ModelSettings()).model
    for one in (model, again):
        assert one.reading.members == M
        means, each = (score_groups(one, GROUPS, BatchSettings(), each=e) for e in (False, True))
        for group, score_K, score_KM in zip(GROUPS, means, each, strict=True):
            expected_KM = by_hand(one, group)
            assert np.ptp(expected_KM, axis=1).min() > 0.01  # they do differ
            np.testing.assert_allclose(score_KM, expected_KM, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(score_K, expected_KM.mean(1), rtol=1e-4, atol=1e-5)
    for a, b in zip(model.head.state_dict().items(), again.head.state_dict().items(), strict=True):
        assert a[0] == b[0]
        assert torch.equal(a[1], b[1])


def test_plain_transformers_says_what_every_member_says(tmp_path: Path) -> None:
    folder = saved(made(tmp_path / "base"), tmp_path / "saved")
    model, plain = load_model(folder, ModelSettings()).model, AutoModelForSequenceClassification.from_pretrained(folder)
    assert [*plain.config.id2label.values()] == ["score 1", "score 2", "score 3"]
    for group in GROUPS:
        logit_KM = torch.cat([plain(input_ids=ids).logits for ids in sequences(group)])
        np.testing.assert_allclose(logit_KM.detach(), by_hand(model, group), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("body", ["bert", "roberta"])
def test_an_encoders_own_head_gives_members_too(body: str, tmp_path: Path) -> None:
    loaded = made(tmp_path / "base", body=body)
    again = load_model(saved(loaded, tmp_path / "saved"), ModelSettings()).model
    for group in GROUPS:
        logit_KM = torch.cat([loaded.model.classifier.eval()(input_ids=ids).logits for ids in sequences(group)]).detach().numpy()
        [score_K], [score_KM] = (score_groups(again, [group], BatchSettings(), each=e) for e in (False, True))
        np.testing.assert_allclose(score_KM, logit_KM, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(score_K, logit_KM.mean(1), rtol=1e-4, atol=1e-5)


def test_a_target_about_an_attribute_is_the_mean_of_what_members_say_of_it() -> None:
    reading = make_reading("attributes", 1, NAMES, '{"helpful": 3, "short": -1}', members=2)
    output_GKC = torch.tensor([[[1.0, 2.0, 5.0, 10.0]]]).repeat(1, 3, 1)  # helpful and short of one member, then of the other
    column_GK = torch.tensor([[0, 1, -1]])
    assert reading.pick(output_GKC, column_GK).tolist() == [[3.0, 6.0, (0.5 + 2.5) / 2]]
    assert reading.pick_each(output_GKC, column_GK).tolist() == [[[1.0, 2.0, 0.5]], [[5.0, 10.0, 2.5]]]


@pytest.mark.parametrize("layers", [1, 2])
def test_every_member_starts_as_a_head_by_itself_would(layers: int) -> None:
    torch.manual_seed(0)
    D, head = 64, make_head(64, Reading(layers=layers, members=200))
    own = [weights_of(head.parameters(), m)[0] for m in range(200)]
    for mine in own if layers == 2 else [torch.cat(own)]:
        assert mine.std().item() == pytest.approx((D + 1) ** -0.5, rel=0.05)
    assert len({tuple(w.flatten()[:3].tolist()) for w in own}) == 200
    if layers == 2:
        last = torch.cat([weights_of(head.parameters(), m)[2] for m in range(200)])
        assert last.std().item() == pytest.approx((D + 1) ** -0.5, rel=0.05)


# ---------------------------------------------------------------------------------------------------------------- learning


def batch_of(objective: str, seed: int = 0) -> Batch:
    """Random groups with targets that any objective takes."""
    rng = np.random.default_rng(seed)
    steps = OBJECTIVES[objective].steps
    groups = [random_group(rng, 4, [7, 5], [3, 2] if steps else ()) for _ in range(4)]
    return collate([[replace(g, target_K=rng.permutation(len(g.target_K)).astype(np.float32) / len(g.target_K))] for g in groups], True)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("name", [name for name, entry in OBJECTIVES.items() if entry.head != "verdict"])
def test_the_loss_is_the_mean_of_those_of_models_of_one_head(name: str, layers: int, tmp_path: Path) -> None:
    entry = make_objective(name, regularise='{"centre": 0.1}')
    model = made(tmp_path / "base", entry.head or "scalar", layers).model
    batch = batch_of(name)
    output_GKC, terms = model.hear(batch, entry.body_terms)
    loss_G = entry.of_members(batch, model.reading, output_GKC, terms)
    whole = loss_G.sum()
    gradient = torch.autograd.grad(whole, [*model.head.parameters()])
    total_G = torch.zeros_like(loss_G)
    hidden_BTD = model.hidden(batch).detach()
    for m in range(M):
        head, reading = alone(model, m), model.reading.one
        own_GKC = head(hidden_BTD.flatten(0, 1)[batch.place_GK])
        own_terms = dict(terms)
        if EVERY in terms:
            index_GKT = batch.answer_GKT()
            own_terms[EVERY] = torch.where(index_GKT >= 0, reading(head(hidden_BTD.flatten(0, 1)))[index_GKT.clamp(min=0)], 0.0)
        own_G = entry.of(batch, reading.pick(own_GKC, batch.column_GK), own_GKC, 0, own_terms)
        total_G = total_G + own_G.detach()
        alike = zip(torch.autograd.grad(own_G.sum(), [*head.parameters()]), weights_of(gradient, m, len(model.reading.names)), strict=True)
        for expected, found in alike:  # what a member learns it learns from its own loss alone
            torch.testing.assert_close(found, expected / M, rtol=1e-3, atol=1e-5)
        assert max(g.abs().max().item() for g in weights_of(gradient, m, len(model.reading.names))) > 1e-4
    torch.testing.assert_close(loss_G, total_G / M, rtol=1e-4, atol=1e-5)


def test_it_is_not_the_loss_of_the_mean() -> None:
    batch, reading = batch_of("bradley_terry"), Reading(members=2)
    entry = make_objective("bradley_terry")
    output_GKC = torch.stack([torch.tensor([3.0, 0.0]), torch.tensor([-3.0, 0.0])], -1).expand(4, 2, 2)
    assert reading(output_GKC).abs().max() == 0  # a mean that is undecided, of members that are not
    each = [math.log1p(math.exp(x)) for x in (3, -3)]
    torch.testing.assert_close(entry.of_members(batch, reading, output_GKC), torch.full((4,), np.mean(each)))


def test_a_second_layer_reads_no_other_members_first(tmp_path: Path) -> None:
    """Also after it was saved, loaded and trained."""
    loaded = load_model(saved(made(tmp_path / "base", layers=2), tmp_path / "saved"), ModelSettings())
    model, entry, batch = loaded.model, make_objective("bradley_terry"), batch_of("bradley_terry")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    before = [w.detach().clone() for w in model.head.parameters()]
    for _ in range(5):
        optimizer.zero_grad()
        entry.of_members(batch, model.reading, model.outputs(batch)).mean().backward()
        optimizer.step()
    width = model.head[0].in_features
    between = torch.block_diag(*[torch.ones(1, width)] * M) == 0
    assert (model.head[-1].weight[between] == 0).all()
    for weight, was in [*zip(model.head.parameters(), before, strict=True)][:3]:  # comparisons say nothing of the last bias
        assert not torch.equal(weight, was)
    with pytest.raises(ModelError, match="3 members\\), not of"):
        load_model(str(tmp_path / "saved"), ModelSettings(members=2))


# --------------------------------------------------------------------------------------------------------------- bootstrap


def test_bootstrap_draws_are_of_the_example_alone() -> None:
    share_MG = bootstrap(range(4000), 5, seed=1)
    assert torch.equal(bootstrap([7, 3999, 7], 5, seed=1), share_MG[:, [7, 3999, 7]])
    assert not torch.equal(bootstrap(range(4000), 5, seed=2), share_MG)
    assert share_MG.mean(1).tolist() == pytest.approx([1.0] * 5, abs=0.08)
    assert (share_MG == 0).float().mean(1).tolist() == pytest.approx([math.exp(-1)] * 5, abs=0.04)  # left out of a draw with replacement
    np.testing.assert_allclose(np.corrcoef(share_MG) - np.eye(5), 0, atol=0.07)


def test_a_member_learns_from_what_it_drew(tmp_path: Path) -> None:
    model, entry, batch = made(tmp_path / "base").model, make_objective("bradley_terry"), batch_of("bradley_terry")
    share_MG = torch.tensor([[0.0, 0.0, 0.0, 0.0], [2.0, 0.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    output_GKC = model.outputs(batch)
    loss_G = entry.of_members(batch, model.reading, output_GKC, share_MG=share_MG)
    score_MGK = model.reading.pick_each(output_GKC, batch.column_GK)
    each_MG = torch.stack([entry.of(batch, score_GK, score_GK.unsqueeze(-1)) for score_GK in score_MGK])
    torch.testing.assert_close(loss_G, (each_MG * share_MG).sum(0) / M)
    [gradient] = torch.autograd.grad(loss_G.sum(), [*model.head.parameters()])
    assert gradient[0].abs().max() == 0
    assert gradient[1:].abs().amax(1).min() > 0


# ------------------------------------------------------------------------------------------------------------- whole fits


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return toy_dataset("pairs", tmp_path_factory.mktemp("pairs"), 24)


def fit_settings(examples: Any, **changes: Any) -> FitSettings:
    net = {"width": 32, "layers": 1, "members": M, **changes.pop("net", {})}
    train = TrainSettings(lr=3e-3, **changes.pop("train", {}))
    return replace(FIT, examples=str(examples.path), net=ModelSettings(**net), train=train, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"net": {"head_layers": 2}, "train": {"bootstrap": True, "average": 0.9}},
        {"lora": LoraSettings(rank=4)},
        {"objective": "token_wise", "train": {"freeze_layers": -1}},
    ],
    ids=["two layers, bootstrap", "adapters", "at every token, head alone"],
)
def test_a_fit_trains_every_member_and_says_what_it_scores(changes: dict[str, Any], pairs: Any, tmp_path: Path) -> None:
    if "lora" in changes:
        pytest.importorskip("peft")
    result = fit(fit_settings(pairs, **changes), str(tmp_path))
    start, scorer = load_model(str(tmp_path / "start"), ModelSettings()).model, Scorer.load(result.model)
    assert scorer.members == start.reading.members == M
    for m in range(M):
        its, were = (weights_of(h.parameters(), m)[:3] for h in (scorer.model.head, start.head))  # comparisons say nothing of the last bias
        for weight, was in zip(its, were, strict=True):
            assert not torch.equal(weight, was)
    rollouts = [Rollout(id=str(n), prompt=question(), steps=(text,)) for n, text in enumerate(("1 keep", "2 keep 3", "4"))]
    by_member = np.stack([np.asarray(s) for s in scorer.score_by_member(rollouts)])
    assert by_member.shape == (3, 1, M)
    np.testing.assert_allclose([s for [s] in scorer.score_rollouts(rollouts)], by_member.mean(-1)[:, 0], rtol=1e-5)  # type: ignore[misc]
    assert 0 <= result.metrics["accuracy"] <= 1
    assert scorer.temperature > 0


def test_bootstrap_is_the_same_however_a_step_is_cut(pairs: Any, tmp_path: Path) -> None:
    heads = []
    for n, tokens in enumerate((4096, 150)):
        settings = replace(fit_settings(pairs, train={"bootstrap": True, "best_by": "last"}), batch=BatchSettings(8, micro_tokens=tokens))
        heads.append(Scorer.load(fit(settings, str(tmp_path / str(n))).model).model.head.weight.detach())
    torch.testing.assert_close(heads[0], heads[1], rtol=1e-3, atol=1e-4)
    plain = Scorer.load(fit(fit_settings(pairs, train={"best_by": "last"}), str(tmp_path / "plain")).model).model.head.weight.detach()
    assert (plain - heads[0]).abs().max() > 1e-3


def test_training_goes_on_with_all_members_or_with_fresh_ones(pairs: Any, tmp_path: Path) -> None:
    first = saved(made(tmp_path / "base"), tmp_path / "saved")
    assert load_model(first, ModelSettings(head="scalar")).model.reading.members == M
    with pytest.raises(ModelError, match=r"kind scalar \(score; 1 layer; 3 members\), not of kind scalar \(score; 1 layer\)"):
        load_model(first, ModelSettings(members=1))
    fewer = load_model(first, ModelSettings(members=1, new_head=True)).model
    assert fewer.reading == Reading()
    assert fewer.head.weight.shape == (1, 32)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"head": "verdict", "head_tokens": "yes no"}, "members=3: head=verdict reads the one output layer"),
        ({"head": "two_class", "head_tokens": "+ -"}, "would all start from the rows of head_tokens"),
        ({"head": "attributes", "overall": "linear"}, "net.overall makes one score of one set of attributes"),
        ({"head": "attributes", "verbosity": "tokens"}, "net.verbosity makes one score"),
        ({"head": "attributes", "take_off": '{"tokens": 0.01}'}, "net.take_off makes one score"),
        ({"new_head": False}, "head_layers, head_tokens and members are about a new head"),
    ],
)
def test_what_cannot_have_members_is_refused(changes: dict[str, Any], word: str, tmp_path: Path) -> None:
    with pytest.raises((ModelError, SettingsError), match=word.replace("+", r"\+")):
        made(tmp_path / "base", changes.pop("head", "scalar"), **changes)


def test_bootstrap_without_members_is_refused(pairs: Any, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"train\.bootstrap=true gives each member"):
        prepare(fit_settings(pairs, net={"members": 1}, train={"bootstrap": True}), str(tmp_path))
    with pytest.raises(ValueError, match="members=-1"):
        ModelSettings(members=-1)


# ------------------------------------------------------------------------------------------------------------- uncertainty


@pytest.fixture(scope="module")
def divided(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[Rollout], str]:
    """A model of two members that agree on the two answers of every prompt but one, its pool, and that prompt's id."""
    folder = tmp_path_factory.mktemp("divided")
    by_text = [{r.text: r for r in of} for of in toy_rollouts(20, answers=4)]
    pool = [r for of in [[*of.values()][:2] for of in by_text if len(of) > 1][:8] for r in of]
    examples = toy_examples("pairs", 20)
    loaded = tiny_model(examples, ModelSettings(width=32, members=2), 128, seed=0)
    with torch.no_grad():
        for weight in loaded.model.classifier.base_model.parameters():
            weight += 0.3 * torch.randn_like(weight)
    scorer = Scorer.load(saved(loaded, folder / "first", labeler="pairs", objective="bradley_terry"))
    with torch.no_grad():
        scorer.model.head.weight.copy_(torch.randn(2, 32))
        rows = []
        for d in range(32):  # what the body says, read by unit vectors
            scorer.model.head.weight[0] = torch.eye(32)[d]
            rows.append([s[0, 0] for s in scorer.score_by_member(pool)])
        state_ND = torch.tensor(np.array(rows).T, dtype=torch.float64)
        gap_PD = state_ND[0::2] - state_ND[1::2]
        assert torch.linalg.matrix_rank(gap_PD) == 8
        one_P = torch.tensor([1.0, -2.0, 3.0, 4.0, -1.0, 2.0, 0.5, -3.0], dtype=torch.float64)
        other_P = torch.where(torch.arange(8) == 3, -4.0, one_P)
        for m, gaps_P in enumerate((one_P, other_P)):
            loaded.model.head.weight[m] = (torch.linalg.pinv(gap_PD) @ gaps_P).float()
    return saved(loaded, folder / "model", labeler="pairs", objective="bradley_terry"), pool, prompt_id(pool[6].prompt)


@pytest.mark.parametrize("measure", ["auto", "mutual_information", "deviation", "probability_deviation"])
def test_one_model_of_several_heads_is_uncertain_where_they_disagree(measure: Any, divided: tuple[str, list[Rollout], str]) -> None:
    folder, pool, split_on = divided
    measured = measure_prompts(pool, Members((folder,), SelectSettings(measure=measure))).prompts.to_pylist()
    found = {row["prompt_id"]: row["uncertainty"] for row in measured}
    p = 1 / (1 + math.exp(-4))
    by_hand = {
        "mutual_information": math.log(2) + p * math.log(p) + (1 - p) * math.log(1 - p),
        "deviation": 8 / math.sqrt(2),
        "probability_deviation": (2 * p - 1) / math.sqrt(2),
    }
    assert found.pop(split_on) == pytest.approx(by_hand["mutual_information" if measure == "auto" else measure], abs=1e-3)
    assert max(found.values()) < 1e-3


def test_heads_models_and_passes_are_members_together(divided: tuple[str, list[Rollout], str]) -> None:
    folder, pool, _ = divided
    scores, compares = Members((folder, folder), SelectSettings()).score(pool)
    assert compares
    assert len(scores) == 4
    np.testing.assert_allclose(np.concatenate(scores[2]), np.concatenate(scores[0]))
    assert len(Members((folder,), SelectSettings(dropout=0.1, passes=3)).score(pool)[0]) == 6


def test_the_command_selects_by_one_model(divided: tuple[str, list[Rollout], str], tmp_path: Path) -> None:
    folder, pool, split_on = divided
    on_disk("rollouts", rollouts_table(pool), tmp_path / "pool")
    words = ["--model", folder, "--count", "1", "--set", "select.random=0", "--measure", "deviation", "--engine", "local"]
    done(here("select_uncertain", "--source", tmp_path / "pool", *words, "--output", tmp_path / "next"))
    ranked = pq.read_table(tmp_path / "next" / "uncertainty.parquet").to_pylist()
    assert (ranked[0]["prompt_id"], ranked[0]["selected"]) == (split_on, "uncertain")


def test_scores_of_members_and_a_cautious_one(divided: tuple[str, list[Rollout], str], tmp_path: Path) -> None:
    folder, pool, _ = divided
    on_disk("rollouts", rollouts_table(pool), tmp_path / "pool")
    tables = []
    for name, words in (("plain", []), ("cautious", ["--caution", "1.5"])):
        given = ["--source", tmp_path / "pool", "--model", folder, "--output", tmp_path / name, "--engine", "local", *words]
        done(here("score_rollouts", *given))
        tables.append({row["id"]: row for row in open_dataset(tmp_path / name, "scores").table().to_pylist()})
    by_member: Any = Scorer.load(folder).score_by_member(pool)
    for n, rollout in enumerate(pool):
        plain, cautious = (table[rollout.id] for table in tables)
        each = by_member[n][0].astype(float)
        assert plain["member_scores"] == cautious["member_scores"] == pytest.approx(each.tolist(), abs=1e-5)
        assert plain["score"] == pytest.approx(each.mean(), abs=1e-5)
        assert cautious["score"] == pytest.approx(each.mean() - 1.5 * each.std(ddof=1), abs=1e-5)
        assert plain["step_scores"] is None


def test_caution_with_one_head_is_refused(divided: tuple[str, list[Rollout], str], tmp_path: Path) -> None:
    _, pool, _ = divided
    on_disk("rollouts", rollouts_table(pool), tmp_path / "pool")
    single = saved(tiny_model(toy_examples("pairs", 3), ModelSettings(width=16), 128, 0), tmp_path / "single")
    given = ["--source", tmp_path / "pool", "--model", single, "--output", tmp_path / "out", "--engine", "local"]
    here("score_rollouts", *given, "--caution", "1").mistake("caution=1 takes off what the heads of a model differ by", "net.members=5")
    here("score_rollouts", *given, "--caution", "-1").mistake("caution=-1.0 must be at least 0")
    here("select_uncertain", *given, "--count", "3", "--measure", "deviation").mistake("there is one", "net.members")


def test_steps_of_every_member_are_told_by_the_model_that_mlflow_loads(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    from rayward.registry.pyfunc import RewardModelPyfunc

    loaded = tiny_model(toy_examples("steps", 6), ModelSettings(width=16, members=2), 128, 0)
    folder = saved(loaded, tmp_path / "model", labeler="steps", objective="binary_cross_entropy")
    served = RewardModelPyfunc()
    served.load_context(SimpleNamespace(artifacts={"model": folder}))
    found = served.predict(None, pd.DataFrame({"prompt": ["12 plus 30 ?"], "steps": [["12 keep", "30 keep 4"]]})).iloc[0]
    rollout = Rollout(id="r", prompt=question("12 plus 30 ?"), steps=("12 keep", "30 keep 4"))
    score_KM: Any = Scorer.load(folder).score_by_member([rollout])[0]
    assert score_KM.shape == (2, 2)
    assert found["member_scores"] == pytest.approx(score_KM[-1].tolist())
    assert found["step_scores"] == pytest.approx(score_KM.mean(-1).tolist())
    assert found["score"] == found["step_scores"][-1]
