"""Heads: each equals its formula, says what a language model says where it starts from one, and is the same after saving and loading.

The references are torch's cross-entropy, plain Python loops, and plain transformers on one unpadded sequence.
"""

from __future__ import annotations

import json
import math
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForSequenceClassification

from driving import RAYWARD, done, here
from rayward import checkpoints, labels
from rayward.batching import BatchSettings, collate
from rayward.errors import ModelError, RaywardError, SettingsError
from rayward.heads import KINDS, Reading, make_head, make_reading, token_ids
from rayward.labels import StepSettings
from rayward.objectives import make_objective
from rayward.records import Example, Rollout, examples_of
from rayward.reward_model import ModelSettings, RewardModel, autocast, load_model, read_notes, save_model, score_groups, tiny_model
from rayward.scoring import Scorer
from rayward.storage import open_dataset
from tiny import (
    WORDS,
    byte_tokenizer,
    classifier,
    dataset_of,
    example,
    language_model,
    question,
    random_group,
    rendered,
    sequences,
    toy_dataset,
    toy_examples,
    toy_rollouts,
    wordpiece_tokenizer,
)

torch.set_num_threads(1)
PROPERTY = settings(deadline=None, max_examples=30)
FREE = [kind for kind, entry in KINDS.items() if not entry.tied]  # those with weights of their own; the others: test_generative.py
HELPFUL = ("helpful", "short", "true")
SMALL = [w for s in ("net.width=32", "net.layers=1", "render.max_length=160", "train.lr=2e-3", "batch.size=16") for w in ("--set", s)]


def reading_of(kind: str, layers: int = 1) -> Reading:
    return make_reading(kind, layers, HELPFUL if kind == "attributes" else ())


def random_outputs(kind: str, seed: int, G: int = 3, K: int = 5) -> tuple[Reading, Tensor, Tensor, Tensor, Tensor]:
    """A reading, output_GKC, soft target_GK, mask_GK, count_GK."""
    generator, reading = torch.Generator().manual_seed(seed), reading_of(kind)
    output_GKC = 4 * torch.randn(G, K, len(reading.names), generator=generator, dtype=torch.float64)
    mask_GK = torch.rand(G, K, generator=generator) < 0.7
    count_GK = torch.randint(0, 17, (G, K), generator=generator).float()
    return reading, output_GKC, torch.rand(G, K, generator=generator, dtype=torch.float64), mask_GK, count_GK


# ---------------------------------------------------------------------------------------------------------------- formulas


@PROPERTY
@given(seed=st.integers(0, 10_000))
def test_two_classes_are_cross_entropy_over_two_logits(seed: int) -> None:
    reading, output_GKC, target_GK, mask_GK, _ = random_outputs("two_class", seed)
    loss_G = make_objective("binary_cross_entropy").loss(reading(output_GKC), target_GK, mask_GK)
    for loss, output_KC, target_K, mask_K in zip(loss_G, output_GKC, target_GK, mask_GK, strict=True):
        share_KC = torch.stack([1 - target_K, target_K], -1)[mask_K]  # wrong first
        expected = F.cross_entropy(output_KC[mask_K], share_KC) if mask_K.any() else torch.zeros(())
        assert loss.item() == pytest.approx(expected.item(), rel=1e-9)


@PROPERTY
@given(seed=st.integers(0, 10_000))
def test_three_classes_are_cross_entropy_over_three_logits(seed: int) -> None:
    _, output_GKC, target_GK, mask_GK, _ = random_outputs("three_class", seed)
    loss_G = make_objective("three_class").loss(torch.zeros(3, 5), target_GK, mask_GK, output_GKC)
    for loss, output_KC, target_K, mask_K in zip(loss_G, output_GKC, target_GK, mask_GK, strict=True):
        shares = [(1 - 2 * t, 2 * t, 0.0) if t <= 0.5 else (0.0, 2 - 2 * t, 2 * t - 1) for t in target_K[mask_K].tolist()]
        assert all(
            neutral / 2 + right == pytest.approx(t) for (_, neutral, right), t in zip(shares, target_K[mask_K].tolist(), strict=True)
        )
        expected = F.cross_entropy(output_KC[mask_K], torch.tensor(shares, dtype=torch.float64)) if shares else torch.zeros(())
        assert loss.item() == pytest.approx(expected.item(), rel=1e-9)


@pytest.mark.parametrize(("target", "name"), [(0.0, 0), (0.5, 1), (1.0, 2)])
def test_a_hard_target_is_one_class(target: float, name: int) -> None:
    output_GKC = torch.tensor([[[0.3, -1.2, 2.0]]])
    loss = make_objective("three_class").loss(torch.zeros(1, 1), torch.full((1, 1), target), torch.ones(1, 1, dtype=torch.bool), output_GKC)
    assert loss.item() == pytest.approx(-output_GKC[0, 0].log_softmax(-1)[name].item(), rel=1e-6)


@PROPERTY
@given(seed=st.integers(0, 10_000))
def test_the_score_of_three_classes_is_the_logit_of_right_and_half_of_neutral(seed: int) -> None:
    reading, output_GKC, *_ = random_outputs("three_class", seed)
    _, neutral, right = output_GKC.softmax(-1).unbind(-1)
    torch.testing.assert_close(reading(output_GKC).sigmoid(), right + neutral / 2)


@pytest.mark.parametrize("objective", ["binary_cross_entropy", "three_class"])
@PROPERTY
@given(seed=st.integers(0, 10_000))
def test_counts_weigh_places(objective: str, seed: int) -> None:
    kind = "three_class" if objective == "three_class" else "two_class"
    reading, output_GKC, target_GK, mask_GK, count_GK = random_outputs(kind, seed)
    more = {"output_GKC": output_GKC} if objective == "three_class" else {}
    loss = make_objective(objective, '{"by_count": 4}').loss
    loss_G = loss(reading(output_GKC), target_GK, mask_GK, count_GK=count_GK, **more)
    for g in range(len(output_GKC)):
        total, places = 0.0, 0
        for k in range(output_GKC.shape[1]):
            if not mask_GK[g, k]:
                continue
            t, logit = float(target_GK[g, k]), output_GKC[g, k].tolist()
            share = [1 - t, t] if kind == "two_class" else [max(0.0, 1 - 2 * t), 1 - abs(2 * t - 1), max(0.0, 2 * t - 1)]
            norm = math.log(sum(map(math.exp, logit)))
            total += float(count_GK[g, k]) * sum(s * (norm - x) for s, x in zip(share, logit, strict=True))
            places += 1
        assert loss_G[g].item() == pytest.approx(total / 4 / places if places else 0.0, rel=1e-6)


@pytest.mark.parametrize("junk", [0.0, 1e30, math.inf, math.nan])
@pytest.mark.parametrize("target", [0.0, 0.3, 0.5, 1.0])
def test_three_classes_stay_finite_and_masked_places_get_no_gradient(target: float, junk: float) -> None:
    output_GKC = torch.tensor([[[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4], [junk, junk, junk]]], requires_grad=True)
    mask_GK = torch.tensor([[True, True, False]])
    target_GK = torch.tensor([[target, target, junk]])
    loss = make_objective("three_class").loss(torch.zeros(1, 3), target_GK, mask_GK, output_GKC)
    loss.sum().backward()
    assert output_GKC.grad is not None
    assert loss.isfinite().all()
    assert output_GKC.grad.isfinite().all()
    assert (output_GKC.grad[0, 2] == 0).all()
    assert output_GKC.grad[0, 0].any() or output_GKC.grad[0, 1].any()


@pytest.mark.parametrize("kind", ["two_class", "three_class"])
def test_large_outputs_give_finite_scores_and_gradients(kind: str) -> None:
    C = len(reading_of(kind).names)
    output_GKC = torch.tensor([1e4, -1e4, 0.0]).repeat(C, 1).T.cumsum(-1).unsqueeze(0).requires_grad_()
    score_GK = reading_of(kind)(output_GKC)
    score_GK.sum().backward()
    assert score_GK.isfinite().all()
    assert output_GKC.grad is not None
    assert output_GKC.grad.isfinite().all()


@pytest.mark.parametrize("kind", list(KINDS))
def test_what_a_kind_is_called_counts_its_outputs(kind: str) -> None:
    reading = reading_of(kind, layers=2)
    head = make_head(16, reading)
    assert head(torch.zeros(2, 16)).shape == (2, len(reading.names))
    assert reading(torch.randn(4, 3, len(reading.names))).shape == (4, 3)
    assert Reading.of_notes(json.loads(json.dumps(reading.as_notes()))) == reading


def test_soft_targets_reach_the_loss_unrounded() -> None:
    steps = ("a\n", "b\n", "c")
    targets = (1 / 3, 0.123456789, 15 / 16)
    [group] = rendered(byte_tokenizer(), [example(steps, targets=targets, counts=(3, 16, 1))])
    batch = collate([[group]], shared=True)
    assert batch.target_GK.dtype == torch.float32
    assert batch.target_GK[0].tolist() == [float(np.float32(t)) for t in targets]
    assert batch.count_GK[0].tolist() == [3, 16, 1]
    score_GK = torch.tensor([[0.2, -1.0, 3.0]])
    with autocast(torch.device("cpu"), "bf16"):
        loss = make_objective("binary_cross_entropy").of(batch, score_GK, score_GK.unsqueeze(-1))
    chance = score_GK[0].double().sigmoid().tolist()
    expected = [-t * math.log(p) - (1 - t) * math.log(1 - p) for t, p in zip(targets, chance, strict=True)]
    assert loss.item() == pytest.approx(sum(expected) / 3, rel=1e-6)


# ------------------------------------------------------------------------------------------------------------- attributes


def test_an_attribute_is_picked_by_its_column_and_the_score_is_their_weighted_mean() -> None:
    reading = make_reading("attributes", attributes=HELPFUL, weights='{"true": 3, "short": -1}')
    output_GKC = torch.tensor([[[1.0, 2.0, 4.0], [5.0, 6.0, 8.0], [0.0, 1.0, 0.0]]])
    assert reading.weights == (0.0, -0.5, 1.5)
    assert reading(output_GKC).tolist() == [[5.0, 9.0, -0.5]]
    assert reading.pick(output_GKC, torch.tensor([[1, 0, -1]])).tolist() == [[2.0, 5.0, -0.5]]


def test_attributes_are_not_rounded_by_autocast() -> None:
    reading = make_reading("attributes", attributes=HELPFUL)
    body = classifier("qwen3")
    body.score = make_head(32, reading)
    model = RewardModel(body, reading=reading).eval()
    groups = [random_group(np.random.default_rng(0), 5, [6, 3])]
    [score] = score_groups(model, groups, BatchSettings(), "bf16")
    assert score.dtype == np.float32
    with torch.no_grad(), autocast(torch.device("cpu"), "bf16"):
        output_GKC = model.outputs(collate([groups], shared=True))
    np.testing.assert_allclose(score, output_GKC[0].double().mean(-1), rtol=1e-6)


@pytest.mark.parametrize(
    ("kind", "weights", "word"),
    [
        ("attributes", '{"helpful": "much"}', "helpful='much' is not a number"),
        ("attributes", '{"helpful": true}', "is not a number"),
        ("attributes", '{"helpful": [1]}', "is not a number"),
        ("attributes", '{"helpful": NaN}', "is not a number"),
        ("attributes", '{"kind": 1}', "attribute_weights names kind, and the attributes are helpful, short, true"),
        ("attributes", '{"short": -1}', "add up to -1"),  # dividing by it would make short good
        ("attributes", '{"short": -1, "true": 1}', "add up to 0"),
        ("scalar", '{"helpful": 1}', "head=scalar has none"),
    ],
)
def test_weights_that_cannot_weigh_are_refused(kind: str, weights: str, word: str) -> None:
    with pytest.raises(SettingsError, match=word):
        make_reading(kind, attributes=HELPFUL, weights=weights)


# -------------------------------------------------------------------------------------------- heads that start from tokens

TOKENS = {"scalar": "+ -", "two_class": "+ -", "three_class": "+ = -"}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("body", ["qwen3", "llama", "gpt2"])
@pytest.mark.parametrize("kind", list(TOKENS))
def test_a_head_from_tokens_says_what_the_language_model_says(kind: str, body: str, tied: bool, tmp_path: Path) -> None:
    language = language_model(tmp_path, body, tied)
    loaded = load_model(str(tmp_path), ModelSettings(head=kind, new_head=True, head_tokens=TOKENS[kind]))
    right, *neutral, wrong = (loaded.tokenizer.get_vocab()[word] for word in TOKENS[kind].split())
    group = random_group(np.random.default_rng(0), 7, [9, 5], [3, 2])
    batch = collate([[group]], shared=True)
    with torch.no_grad():
        output_KC = loaded.model.outputs(batch)[0]
        [score] = score_groups(loaded.model, [group], BatchSettings())
        ends = np.cumsum(group.length_A)
        for k, place in enumerate(group.place_K):
            answer = int(np.searchsorted(ends, place, side="right")) - 1
            logit_V = language(input_ids=sequences(group)[answer]).logits[0, int(place - ends[answer] + group.length_A[0])]
            if kind == "three_class":
                np.testing.assert_allclose(output_KC[k], logit_V[[wrong, neutral[0], right]], rtol=1e-4, atol=1e-4)
            else:
                assert score[k] == pytest.approx(float(logit_V[right] - logit_V[wrong]), rel=1e-4, abs=1e-4)
    assert np.ptp(score) > 0.01


def test_a_head_from_tokens_is_no_other_way_round(tmp_path: Path) -> None:
    language_model(tmp_path, "qwen3")
    group = random_group(np.random.default_rng(0), 7, [9])
    one, other = (
        score_groups(load_model(str(tmp_path), ModelSettings(new_head=True, head_tokens=t)).model, [group], BatchSettings())[0]
        for t in ("+ -", "- +")
    )
    np.testing.assert_allclose(one, -other, rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"head_tokens": "+"}, "takes 2 tokens, right first"),
        ({"head_tokens": "+ = -"}, "takes 2 tokens, right first"),
        ({"head_tokens": "+ +"}, "are not different tokens"),
        ({"head_tokens": "unheard-of -"}, "'unheard-of' is not one token"),
        ({"head_tokens": "+ -", "head_layers": 2}, "starts from no tokens"),
        ({"head_tokens": "+ -", "head": "debiased"}, "starts from no tokens"),
        ({"head_tokens": "+ -", "new_head": False}, "are about a new head"),
        ({"head_layers": 2, "new_head": False}, "are about a new head"),
    ],
)
def test_tokens_that_make_no_head_are_refused(changes: dict[str, Any], word: str, tmp_path: Path) -> None:
    language_model(tmp_path, "qwen3")
    with pytest.raises(ModelError, match=word):
        load_model(str(tmp_path), ModelSettings(**{"head": "two_class", "new_head": True, **changes}))


@pytest.mark.parametrize(("body", "changes"), [("gemma2", {"final_logit_softcapping": 1.0}), ("phi", {})])
def test_an_output_layer_that_is_more_than_rows_is_refused(body: str, changes: dict[str, Any], tmp_path: Path) -> None:
    language_model(tmp_path, body, **changes)  # gemma2 caps its logits, phi has a bias
    with pytest.raises(ModelError, match="more than rows of its output layer"):
        load_model(str(tmp_path), ModelSettings(new_head=True, head_tokens="+ -"))


def test_a_body_without_its_output_layer_lends_no_rows(tmp_path: Path) -> None:
    language_model(tmp_path, "qwen3").model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"without its output layer \(lm_head.weight\)"):
        load_model(str(tmp_path), ModelSettings(new_head=True, head_tokens="+ -"))


def test_an_encoder_lends_no_rows(tmp_path: Path) -> None:
    torch.manual_seed(0)
    AutoModel.from_config(classifier("bert", vocabulary=WORDS).config).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="head_tokens: "):
        load_model(str(tmp_path), ModelSettings(new_head=True, head_tokens="+ -"))


def test_special_tokens_and_pieces_of_words_may_be_named() -> None:
    tokenizer = byte_tokenizer()
    assert token_ids(tokenizer, "<|im_start|> Ġ", reading_of("two_class")) == [tokenizer.get_vocab()[w] for w in ("<|im_start|>", "Ġ")]
    with pytest.raises(ModelError, match="not one token"):
        token_ids(wordpiece_tokenizer(), "the ☃", reading_of("two_class"))


# ---------------------------------------------------------------------------------------------------------- save and load


def base_model(folder: Path, body: str) -> Path:
    """A body without a head, and a tokenizer."""
    torch.manual_seed(0)
    AutoModel.from_config(classifier(body, vocabulary=WORDS).config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def with_head(folder: Path, body: str, kind: str, layers: int = 1, seed: int = 1) -> RewardModel:
    """A model with a fresh head on a base model, saved in FOLDER/saved."""
    torch.manual_seed(seed)
    net = ModelSettings(head=kind, head_layers=layers, new_head=True)
    loaded = load_model(str(base_model(folder, body)), net, attributes=HELPFUL)
    save_model(loaded.model, loaded.tokenizer, folder / "saved", {"objective": "by hand"})
    return loaded.model.eval()


def some_groups(body: str) -> list[Any]:
    rng, places = np.random.default_rng(0), [3, 2] if body in ("qwen3", "gpt2", "llama") else []
    return [random_group(rng, 4, [6, 9], places), random_group(rng, 12, [5]), random_group(rng, 3, [20, 2])]


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("kind", FREE)
@pytest.mark.parametrize("body", ["qwen3", "gpt2", "bert"])
def test_a_saved_head_is_the_same_bit_for_bit(body: str, kind: str, layers: int, tmp_path: Path) -> None:
    model = with_head(tmp_path, body, kind, layers)
    loaded = load_model(str(tmp_path / "saved"), ModelSettings())
    assert loaded.model.reading == model.reading == reading_of(kind, layers)
    assert read_notes(tmp_path / "saved")["head"] == model.reading.as_notes()
    before, after = model.state_dict(), loaded.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    groups = some_groups(body)
    twice = load_model(str(tmp_path / "saved"), ModelSettings()).model
    first, again, repeated = (np.concatenate(score_groups(m, groups, BatchSettings())) for m in (model, loaded.model, twice))
    assert np.array_equal(again, repeated)
    np.testing.assert_allclose(again, first, rtol=1e-5, atol=1e-6)  # where weights lie in memory tells in the last bit
    assert np.ptp(first) > 0
    said = json.loads((tmp_path / "saved" / "config.json").read_text(encoding="utf-8"))
    assert said["id2label"] == {str(n): name for n, name in enumerate(model.reading.names)}
    assert said["label2id"] == {name: n for n, name in enumerate(model.reading.names)}
    if layers == 1:
        plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved").eval()
        group = groups[1]
        with torch.no_grad():
            logits = plain(input_ids=sequences(group)[0]).logits[0]
            np.testing.assert_allclose(loaded.model.outputs(collate([[group]], shared=False))[0, -1], logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("body", ["qwen3", "gpt2"])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("kind", ["two_class", "three_class"])
def test_packed_outputs_are_separate_outputs(body: str, kind: str, layers: int, tmp_path: Path) -> None:
    model = with_head(tmp_path, body, kind, layers)
    groups = some_groups(body)
    assert model.shares_prefix
    with torch.no_grad():
        packed = model.outputs(collate([groups], shared=True))
        model.shares_prefix = False
        separate = model.outputs(collate([[g] for g in groups], shared=False))
    mask_GK = collate([groups], shared=True).mask_GK
    np.testing.assert_allclose(packed[mask_GK], separate[mask_GK], rtol=1e-4, atol=1e-5)


def test_a_head_of_two_layers_is_found_in_shards(tmp_path: Path) -> None:
    model = with_head(tmp_path, "qwen3", "three_class", layers=2)
    model.classifier.save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    byte_tokenizer().save_pretrained(tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    loaded = load_model(str(tmp_path / "shards"), ModelSettings()).model
    before, after = model.state_dict(), loaded.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("shape", ["gone", "other"])
def test_a_head_of_two_layers_with_a_hole_is_an_error(shape: str, tmp_path: Path) -> None:
    with_head(tmp_path, "qwen3", "two_class", layers=2)
    path = tmp_path / "saved" / "model.safetensors"
    weights = load_file(path)
    weights.pop("score.2.weight")
    save_file(weights if shape == "gone" else {**weights, "score.2.weight": torch.zeros(5, 5)}, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="lacks weights of its head of 2 layers"):
        load_model(str(tmp_path / "saved"), ModelSettings())


def test_a_head_that_is_not_linear_takes_more_outputs_but_no_layers(tmp_path: Path) -> None:
    model = with_head(tmp_path, "roberta", "three_class")
    loaded = load_model(str(tmp_path / "saved"), ModelSettings()).model
    one, two = (np.concatenate(score_groups(m, some_groups("roberta"), BatchSettings())) for m in (model, loaded))
    np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-6)
    with pytest.raises(ModelError, match=r"takes the place of a linear head, and Roberta.* has a RobertaClassificationHead"):
        load_model(str(tmp_path), ModelSettings(head="two_class", head_layers=2, new_head=True))


# ------------------------------------------------------------------------------------------------------- going on with one


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("kind", FREE)
@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("new_head", [False, True])
def test_a_model_goes_on_with_its_head(kind: str, layers: int, named: bool, new_head: bool, tmp_path: Path) -> None:
    model = with_head(tmp_path, "qwen3", kind, layers)
    net = ModelSettings(head=kind if named else "auto", new_head=new_head)
    torch.manual_seed(7)
    for attributes in ((), ("short",), HELPFUL):
        loaded = load_model(str(tmp_path / "saved"), net, attributes=attributes).model
        assert loaded.reading == model.reading
        assert all(torch.equal(a, b) for a, b in zip(model.head.parameters(), loaded.head.parameters(), strict=True))


OTHERS = [
    ("scalar", 1, "two_class", 1),
    ("two_class", 1, "debiased", 1),
    ("three_class", 1, "attributes", 1),
    ("two_class", 2, "scalar", 1),
]
OTHERS += [("scalar", 1, "scalar", 2), ("debiased", 2, "two_class", 2), ("attributes", 2, "three_class", 1)]


@pytest.mark.parametrize("body", ["qwen3", "bert", "roberta"])
@pytest.mark.parametrize(("kind", "layers", "other", "more"), OTHERS)
def test_another_head_is_an_error_and_fresh_where_asked_for(
    body: str, kind: str, layers: int, other: str, more: int, tmp_path: Path
) -> None:
    if body == "roberta" and max(layers, more) > 1:
        return
    model = with_head(tmp_path, body, kind, layers)
    net = ModelSettings(head=other, head_layers=more)
    with pytest.raises(ModelError, match=rf"has a head of kind {kind} (.|\n)*not of kind {other}(.|\n)*net.new_head=true"):
        load_model(str(tmp_path / "saved"), net, attributes=HELPFUL)
    torch.manual_seed(7)
    fresh = load_model(str(tmp_path / "saved"), ModelSettings(head=other, head_layers=more, new_head=True), attributes=HELPFUL).model
    assert fresh.reading == reading_of(other, more)
    old = [p for p in model.head.parameters() if p.ndim > 1]
    assert not any(torch.equal(p, o) for p in fresh.head.parameters() if p.ndim > 1 for o in old)
    assert score_groups(fresh, some_groups(body), BatchSettings())[1].shape == (1,)
    kept = {n: p for n, p in fresh.named_parameters() if ".score." not in n and ".classifier." not in n.removeprefix("classifier.")}
    assert kept
    assert all(torch.equal(p, model.state_dict()[n]) for n, p in kept.items() if "classifier.classifier" not in n)


def test_the_weights_of_attributes_may_change(tmp_path: Path) -> None:
    with_head(tmp_path, "qwen3", "attributes")
    loaded = load_model(str(tmp_path / "saved"), ModelSettings(attribute_weights='{"true": 1}')).model
    assert loaded.reading.weights == (0.0, 0.0, 1.0)
    save_model(loaded, byte_tokenizer(), tmp_path / "again", {})
    assert load_model(str(tmp_path / "again"), ModelSettings()).model.reading.weights == (0.0, 0.0, 1.0)
    with pytest.raises(ModelError, match="not of kind attributes"):
        load_model(str(tmp_path / "saved"), ModelSettings(head="attributes"), attributes=("helpful", "polite"))


@pytest.mark.parametrize("outputs", [2, 3])
def test_a_classifier_made_elsewhere_is_read_as_it_is_named(outputs: int, tmp_path: Path) -> None:
    model = classifier("qwen3", vocabulary=WORDS)
    model.config.num_labels = outputs
    model = AutoModelForSequenceClassification.from_config(model.config)
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    kind = {2: "two_class", 3: "three_class"}[outputs]
    loaded = load_model(str(tmp_path), ModelSettings(head=kind)).model
    assert torch.equal(loaded.head.weight, model.score.weight)
    with pytest.raises(ModelError, match=rf"cannot be loaded with head=auto: its own has {outputs} outputs(.|\n)*net.head=two_class"):
        load_model(str(tmp_path), ModelSettings())
    fresh = load_model(str(tmp_path), ModelSettings(new_head=True)).model
    assert fresh.head.weight.shape == (1, 32)


def test_tokens_do_not_replace_a_head_in_silence(tmp_path: Path) -> None:
    with_head(tmp_path, "qwen3", "two_class")
    with pytest.raises(ModelError, match="has a head, and head_tokens starts a new one"):
        load_model(str(tmp_path / "saved"), ModelSettings(new_head=True, head_tokens="+ -"))


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("kind", FREE)
def test_a_model_from_scratch_has_the_head(kind: str, layers: int) -> None:
    examples = toy_examples("pairs", 3)
    made = tiny_model(examples, ModelSettings(width=32, head=kind, head_layers=layers), 96, 0, HELPFUL)
    assert made.model.reading == reading_of(kind, layers)
    assert len(score_groups(made.model, rendered(made.tokenizer, examples[:2]), BatchSettings())) == 2
    with pytest.raises(ModelError, match="from scratch has no language model"):
        tiny_model(examples, ModelSettings(width=32, head_tokens="+ -"), 96, 0)


def test_an_unknown_head_is_refused_with_a_suggestion() -> None:
    with pytest.raises(RaywardError, match=r"head=two_clas(.|\n)*two_class"):
        ModelSettings(head="two_clas")
    with pytest.raises(ValueError, match="head_layers=3"):
        ModelSettings(head_layers=3)


# ---------------------------------------------------------------------------------------------------- from label to report


def train(examples: Path, output: Path, *words: str) -> Scorer:
    """A small model trained by the command."""
    done(here("train_reward_model", "--examples", examples, "--output", output, *SMALL, *words))
    return Scorer.load(output / "model")


def test_neutral_steps_train_three_classes(store: Path, tmp_path: Path) -> None:
    """Steps judged right, wrong and neutral become targets 1, 0 and 1/2, and a model of three classes learns them."""
    said = {"keep": 1.0, "so": None, "drop": 0.0}
    rng = np.random.default_rng(0)
    rollouts = [
        Rollout(id=str(n), prompt=question(f"{n} ?"), steps=tuple(f"{w}\n" for w in order), step_rewards=tuple(said[w] for w in order))
        for n, order in enumerate(rng.choice(list(said), (64, 4)).tolist())
    ]
    made = [e for r in rollouts for e in labels.LABELERS["steps"].label([r], StepSettings(neutral="half"))]
    examples = [e for e in made if isinstance(e, Example)]
    assert {t for e in examples for t in e.targets} == {0.0, 0.5, 1.0}
    dataset_of(examples, tmp_path / "steps", "label_steps")
    job = ("--objective", "three_class", "--set", "train.epochs=8", "--set", "train.lr=1e-2")
    scorer = train(tmp_path / "steps", tmp_path / "job", *job)  # the head follows from the objective
    assert scorer.model.reading == reading_of("three_class")
    chances = 1 / (1 + np.exp(-np.concatenate(scorer(examples))))
    np.testing.assert_allclose(chances, np.concatenate([e.targets for e in examples]), atol=0.15)
    job = ("--objective", "three_class", "--set", "net.head=two_class")
    here("train_reward_model", "--examples", tmp_path / "steps", "--output", tmp_path / "two", *SMALL, *job).mistake(
        "three_class", "two_class"
    )


@pytest.mark.slow
def test_a_head_of_two_layers_survives_a_kill_and_goes_on_in_a_later_stage(store: Path, tmp_path: Path) -> None:
    steps = toy_dataset("steps", tmp_path, 48).path
    often = [w for s in ("train.checkpoint_every=2", "train.log_every=1", "net.head=two_class", "net.head_layers=2") for w in ("--set", s)]
    words = ("train_reward_model", "--examples", steps, *SMALL, *often, "--set", "train.epochs=40")
    with subprocess.Popen([RAYWARD, "run", *map(str, words), "--output", str(tmp_path / "killed")], stdout=subprocess.DEVNULL) as job:
        deadline = time.monotonic() + 120
        while len(checkpoints.steps(tmp_path / "killed" / "run")) < 2 and job.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        job.kill()
    [*_, last] = checkpoints.steps(tmp_path / "killed" / "run")
    assert 0 < checkpoints.read_state(last)["step"] < 120
    assert not (tmp_path / "killed" / "model").exists()
    assert "going on from step" in done(here(*words, "--output", tmp_path / "killed")).out
    done(here(*words, "--output", tmp_path / "whole"))
    killed, whole = (Scorer.load(tmp_path / name / "model") for name in ("killed", "whole"))
    assert killed.model.reading == whole.model.reading == reading_of("two_class", 2)
    assert all(torch.equal(a, b) for a, b in zip(killed.model.head.parameters(), whole.model.head.parameters(), strict=True))
    stage = train(steps, tmp_path / "stage", "--model", str(tmp_path / "whole" / "model"), "--set", "train.lr=1e-9")
    assert stage.model.reading == whole.model.reading
    for a, b in zip(stage.model.head.parameters(), whole.model.head.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    other = ("--model", str(tmp_path / "whole" / "model"), "--set", "net.head=scalar")
    said = here("train_reward_model", "--examples", steps, "--output", tmp_path / "other", *SMALL, *other)
    said.mistake("has a head of kind two_class (wrong, right; 2 layers), not of kind scalar (score; 1 layer)", "net.new_head=true")
    other = (*other, "--set", "net.new_head=true")
    assert train(steps, tmp_path / "fresh", *other).model.reading == Reading()


def test_attributes_train_with_what_nobody_rated_masked(store: Path, tmp_path: Path) -> None:
    """A rating of half the answers is missing; the model learns both attributes, and the score is their weighted mean."""
    lines = []
    for rollout in (r for same in toy_rollouts(60) for r in same):
        rewards = {"right": float(bool(rollout.correct)), "size": len(rollout.text.split()) / 20}
        rewards = {n: v for n, v in rewards.items() if int(rollout.id[-1], 36) % 3 or n == "right"}
        lines.append({"id": rollout.id, "prompt": rollout.prompt[0].content, "answer": rollout.text, "rewards": rewards})
    (tmp_path / "rated.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    done(here("import_rollouts", "--source", tmp_path / "rated.jsonl", "--output", tmp_path / "rated", "--engine", "local"))
    done(here("label_attributes", "--source", tmp_path / "rated", "--output", tmp_path / "examples", "--engine", "local"))
    examples = examples_of(open_dataset(tmp_path / "examples", "examples").table())
    assert {e.attributes for e in examples} == {("right", "size")}
    assert any(0 in e.counts for e in examples)
    words = ("--set", "net.head=attributes", "--set", 'net.attribute_weights={"right": 3, "size": -1}', "--set", "train.epochs=6")
    scorer = train(tmp_path / "examples", tmp_path / "job", *words)
    assert scorer.model.reading == Reading("attributes", ("right", "size"), (1.5, -0.5))
    scores = [np.array(s).reshape(-1, 2) for s in scorer(examples)]
    known = np.array([c for e in examples for c in e.counts]).reshape(-1, 2) > 0
    truth = np.array([t for e in examples for t in e.targets]).reshape(-1, 2)
    for n in range(2):
        told = np.concatenate(scores)[known[:, n], n]
        assert np.corrcoef(told, truth[known[:, n], n])[0, 1] > 0.3
    bare = [
        Example(id=e.id, prompt=e.prompt, answers=e.answers, targets=(0.0,) * len(e.answers), counts=(1,) * len(e.answers))
        for e in examples[:5]
    ]
    for mean, parts in zip(scorer(bare), scores, strict=False):
        np.testing.assert_allclose(mean, parts @ [1.5, -0.5], rtol=1e-4, atol=1e-5)
    words = ("--model", tmp_path / "job" / "model", "--examples", tmp_path / "examples", "--output", tmp_path / "report")
    assert "right_spearman" in done(here("evaluate_model", *words)).out


def test_counts_weigh_examples_too() -> None:
    loss = make_objective("binary_cross_entropy", '{"by_count": 8}').loss
    score, target, mask = torch.ones(2, 1), torch.full((2, 1), 0.5), torch.ones(2, 1, dtype=torch.bool)
    much, little = loss(score, target, mask, count_GK=torch.tensor([[16.0], [2.0]])).tolist()
    assert much == pytest.approx(8 * little)
