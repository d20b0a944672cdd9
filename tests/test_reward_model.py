"""Reward models: packed scores are separate scores, padding changes nothing, what is saved is what plain transformers loads.

The reference is the body itself, called by plain transformers on one unpadded sequence.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForSequenceClassification

from rayward.batching import BatchSettings, collate
from rayward.errors import ModelError
from rayward.rendering import Group
from rayward.reward_model import (
    SCALAR,
    ModelSettings,
    RewardModel,
    Traits,
    autocast,
    examine,
    load_model,
    read_notes,
    save_model,
    score_groups,
    tiny_model,
)
from tiny import (
    DECODERS,
    ENCODERS,
    byte_tokenizer,
    classifier,
    example,
    plain_scores,
    random_group,
    rendered,
    sequences,
    toy_examples,
    wordpiece_tokenizer,
)

torch.set_num_threads(1)

WORDS = 420  # of byte_tokenizer


def wrapped(kind: str, pooling: Any = "auto", max_length: int = 0, **changes: Any) -> RewardModel:
    return RewardModel(classifier(kind, **changes), pooling, max_length).eval()


def mixed_groups(seed: int = 0) -> list[Group]:
    """Groups of quite different lengths."""
    rng = np.random.default_rng(seed)
    return [
        random_group(rng, 3, [2, 9]),
        random_group(rng, 25, [4]),
        random_group(rng, 1, [1, 14, 3], [1, 4, 2]),
        random_group(rng, 9, [30, 2]),
    ]


def check(model: RewardModel, groups: list[Group], pooling: str = "last", sizes: BatchSettings | None = None) -> None:
    scores = score_groups(model, groups, sizes or BatchSettings(row_tokens=40))
    for score, group in zip(scores, groups, strict=True):
        np.testing.assert_allclose(score, plain_scores(model.classifier, group, pooling), rtol=1e-5, atol=1e-5)
    assert np.ptp(np.concatenate(scores)) > 0.1  # scores that are all alike would show nothing


# ------------------------------------------------------------------------------------------------------------ packed rows


@pytest.mark.parametrize("kind", DECODERS)
def test_packed_scores_are_separate_scores(kind: str) -> None:
    model = wrapped(kind)
    assert model.traits == Traits(causal=True, shares_prefix=True)
    assert model.shares_prefix
    check(model, mixed_groups())


QWEN3 = wrapped("qwen3")
ANSWER = st.tuples(st.integers(1, 12), st.integers(1, 4)).map(lambda a: (a[0], min(a)))


@settings(deadline=None, max_examples=25)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 20), st.lists(ANSWER, min_size=1, max_size=5)), min_size=1, max_size=4),
    row_tokens=st.integers(1, 90),
    seed=st.integers(0, 99),
)
def test_packed_scores_are_separate_scores_whatever_the_shape(
    shapes: list[tuple[int, list[tuple[int, int]]]], row_tokens: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    groups = [random_group(rng, p, [length for length, _ in a], [places for _, places in a]) for p, a in shapes]
    for score, group in zip(score_groups(QWEN3, groups, BatchSettings(row_tokens=row_tokens)), groups, strict=True):
        np.testing.assert_allclose(score, plain_scores(QWEN3.classifier, group), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_scores_are_separate_scores_in_every_attention(attention: str) -> None:
    model = classifier("llama")
    model.set_attn_implementation(attention)
    rewarding = RewardModel(model).eval()
    assert rewarding.shares_prefix
    check(rewarding, mixed_groups())


@pytest.mark.parametrize("kind", ENCODERS)
def test_encoders_are_seen_to_look_ahead(kind: str) -> None:
    assert examine(classifier(kind)) == Traits(causal=False, shares_prefix=False)
    assert wrapped(kind).pooling == "own"


def test_a_body_without_positions_falls_back_to_separate_rows() -> None:
    model = wrapped("bloom")  # alibi: distances are counted in the row
    assert model.traits == Traits(causal=True, shares_prefix=False)
    check(model, mixed_groups())


WINDOWS = [("mistral", "sliding_window"), ("gemma2", "sliding_window"), ("gpt_neo", "window_size")]


@pytest.mark.parametrize(("kind", "name"), WINDOWS)
def test_a_window_that_texts_outgrow_is_kept(kind: str, name: str) -> None:
    narrow = wrapped(kind, **{name: 4})
    assert narrow.traits == Traits(causal=True, shares_prefix=False)
    check(narrow, mixed_groups())
    longer = wrapped(kind, max_length=64, **{name: 16})
    check(longer, mixed_groups())
    assert not longer.shares_prefix


@pytest.mark.parametrize(("kind", "name"), WINDOWS[:2])
def test_a_window_wider_than_any_text_may_be_shared(kind: str, name: str) -> None:
    wide = wrapped(kind, max_length=40, **{name: 40})
    assert wide.shares_prefix
    check(wide, mixed_groups(), sizes=BatchSettings(row_tokens=120))


def test_examining_leaves_the_mode_as_it_was() -> None:
    model = classifier("qwen3").train()
    examine(model)
    assert model.training


# ---------------------------------------------------------------------------------------------------------------- padding


@pytest.mark.parametrize("pooling", ["own", "mean", "first"])
@pytest.mark.parametrize("kind", ["bert", "deberta-v2", "modernbert"])
def test_scores_of_encoders_do_not_depend_on_padding(kind: str, pooling: Any) -> None:
    check(wrapped(kind, pooling), mixed_groups(), pooling)


def test_scores_of_an_encoder_with_a_head_of_its_own_do_not_depend_on_padding() -> None:
    check(wrapped("roberta"), mixed_groups(), "own")


@pytest.mark.parametrize("pad", [0, 2, 95])
@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_scores_of_decoders_do_not_depend_on_padding(pooling: Any, pad: int) -> None:
    groups = [g for g in mixed_groups() if len(g.target_K) == g.answers]
    check(wrapped("llama", pooling, pad_token_id=pad), groups, pooling)


# ---------------------------------------------------------------------------------------------------- poolings that cannot be


def test_the_last_token_of_an_encoder_is_refused() -> None:
    with pytest.raises(ModelError, match="this body is not causal"):
        wrapped("bert", "last")


def test_a_decoder_is_not_read_at_the_last_token_that_is_no_padding() -> None:
    with pytest.raises(ModelError, match=r"by its id(.|\n)*net.pooling=last"):
        wrapped("llama", "own")


def test_a_pooling_beside_a_head_that_pools_itself_is_refused() -> None:
    with pytest.raises(ModelError, match=r"pooling=mean needs a linear head(.|\n)*net.pooling=own"):
        wrapped("roberta", "mean")


# --------------------------------------------------------------------------------------------------------- in half precision


def test_the_head_works_in_float32_under_autocast() -> None:
    model = wrapped("llama")
    batch = collate([mixed_groups()], shared=True)
    read: list[torch.Tensor] = []
    assert isinstance(model.head, nn.Linear)
    model.head.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    with torch.no_grad(), autocast(torch.device("cpu"), "bf16"):
        score_GK = model(batch)
    [pooled_GKD] = read
    assert score_GK.dtype == torch.float32
    expected = F.linear(pooled_GKD.float(), model.head.weight)[..., 0]
    rounded = F.linear(pooled_GKD.bfloat16(), model.head.weight.bfloat16())[..., 0].float()
    assert torch.equal(score_GK, expected)
    assert not torch.equal(score_GK, rounded)


# ----------------------------------------------------------------------------------------------------------- save and load


def saved(kind: str, folder: Path, tokenizer: Any = None, **changes: Any) -> RewardModel:
    model = wrapped(kind, vocabulary=WORDS, **changes)
    save_model(model, tokenizer or byte_tokenizer(), folder, {"objective": "bradley_terry"})
    return model


@pytest.mark.parametrize("kind", ["qwen3", "gpt2", "gemma2", "bert", "deberta-v2", "modernbert", "roberta"])
def test_a_saved_model_is_the_same_bit_for_bit_and_in_plain_transformers(kind: str, tmp_path: Path) -> None:
    model = saved(kind, tmp_path)
    loaded = load_model(str(tmp_path), ModelSettings())
    assert loaded.notes == {"objective": "bradley_terry", "pooling": model.pooling, "head": SCALAR.as_notes()}
    weights, before = loaded.model.state_dict(), model.state_dict()
    assert weights.keys() == before.keys()
    assert all(torch.equal(weights[name], before[name]) for name in weights)
    again = load_model(str(tmp_path), ModelSettings()).model
    scores, repeated, first = (score_groups(m, mixed_groups(), BatchSettings()) for m in (loaded.model, again, model))
    assert all(np.array_equal(a, b) for a, b in zip(scores, repeated, strict=True))
    np.testing.assert_allclose(np.concatenate(scores), np.concatenate(first), rtol=1e-6, atol=1e-6)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    for group, score in zip(mixed_groups(), scores, strict=True):
        if len(score) == group.answers:
            logits = [plain(input_ids=ids).logits.item() for ids in sequences(group)]
            np.testing.assert_allclose(score, logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pad", ["<|pad|>", "</s>", None])
def test_plain_transformers_reads_the_same_token_also_where_padding_is_the_end_of_text(pad: str | None, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(None, pad_token=pad)
    saved("llama", tmp_path, tokenizer, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)
    loaded = load_model(str(tmp_path), ModelSettings())
    [group] = rendered(loaded.tokenizer, [example("It is 42.", "No.")])
    assert (group.token_T[group.place_K] == tokenizer.eos_token_id).all()
    [score] = score_groups(loaded.model, [group], BatchSettings())
    save_model(loaded.model, loaded.tokenizer, tmp_path / "again", loaded.notes)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "again")
    np.testing.assert_allclose(score, [plain(input_ids=ids).logits.item() for ids in sequences(group)], rtol=1e-5, atol=1e-5)


def test_a_saved_model_holds_no_pickle(tmp_path: Path) -> None:
    saved("qwen3", tmp_path)
    files = sorted(p.name for p in tmp_path.rglob("*") if p.is_file())
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(files)
    assert {Path(f).suffix for f in files} <= {".json", ".safetensors", ".jinja"}


def test_notes_are_added_to_what_a_config_says(tmp_path: Path) -> None:
    saved("qwen3", tmp_path)
    assert read_notes(tmp_path) == {"objective": "bradley_terry", "pooling": "last", "head": SCALAR.as_notes()}
    assert load_model(str(tmp_path), ModelSettings()).notes == read_notes(tmp_path)


def test_a_chosen_pooling_is_loaded_again(tmp_path: Path) -> None:
    model = wrapped("bert", "mean", vocabulary=WORDS)
    save_model(model, wordpiece_tokenizer(), tmp_path, {})
    loaded = load_model(str(tmp_path), ModelSettings())
    assert loaded.model.pooling == "mean"
    check(loaded.model, mixed_groups(), "mean")


# ------------------------------------------------------------------------------------------------------------------ heads


def base_model(folder: Path, kind: str, **changes: Any) -> None:
    """A body without a head, as base models come."""
    torch.manual_seed(0)
    config = classifier(kind, vocabulary=WORDS, **changes).config
    AutoModel.from_config(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def drop(folder: Path, *names: str) -> None:
    weights = load_file(folder / "model.safetensors")
    for name in names:
        del weights[name]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_missing_head_is_an_error_that_names_the_way_out(tmp_path: Path) -> None:
    base_model(tmp_path, "qwen3")
    with pytest.raises(ModelError, match=r"lacks weights for score.weight(.|\n)*--set net.new_head=true"):
        load_model(str(tmp_path), ModelSettings())


@pytest.mark.parametrize("kind", ["qwen3", "bert"])
def test_a_fresh_head_is_as_large_as_the_literature_says(kind: str, tmp_path: Path) -> None:
    base_model(tmp_path, kind, hidden_size=512, num_hidden_layers=1)
    torch.manual_seed(1)
    head = load_model(str(tmp_path), ModelSettings(new_head=True)).model.head
    assert isinstance(head, nn.Linear)
    assert head.weight.std().item() == pytest.approx((512 + 1) ** -0.5, rel=0.15)
    assert head.weight.mean().item() == pytest.approx(0.0, abs=0.01)
    assert head.bias is None or (head.bias == 0).all()


def test_a_head_that_is_there_is_kept_though_a_new_one_was_asked_for(tmp_path: Path) -> None:
    model = saved("bert", tmp_path)
    kept = load_model(str(tmp_path), ModelSettings(new_head=True)).model.head
    assert torch.equal(kept.weight, model.head.weight)
    drop(tmp_path, "bert.pooler.dense.weight", "bert.pooler.dense.bias")  # something else is missing, not the head
    kept = load_model(str(tmp_path), ModelSettings(new_head=True)).model.head
    assert torch.equal(kept.weight, model.head.weight)


def test_a_new_head_excuses_no_hole_in_the_body(tmp_path: Path) -> None:
    base_model(tmp_path, "qwen3")
    drop(tmp_path, "layers.1.mlp.up_proj.weight")
    with pytest.raises(ModelError, match="up_proj"):
        load_model(str(tmp_path), ModelSettings(new_head=True))


def test_a_model_of_two_outputs_is_refused(tmp_path: Path) -> None:
    config = classifier("qwen3", vocabulary=WORDS).config
    config.num_labels = 2
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(str(tmp_path), ModelSettings())


def test_what_is_no_model_is_an_error_with_a_way_out(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"cannot be loaded(.|\n)*config.json, model.safetensors and a tokenizer"):
        load_model(str(tmp_path), ModelSettings())


# ---------------------------------------------------------------------------------------------------------------- dropout

DROPOUTS = {
    "qwen3": ["attention_dropout"],
    "gpt2": ["resid_pdrop", "embd_pdrop", "attn_pdrop"],
    "gpt_neox": ["attention_dropout", "hidden_dropout"],
    "bert": ["hidden_dropout_prob", "attention_probs_dropout_prob"],
    "deberta-v2": ["hidden_dropout_prob", "attention_probs_dropout_prob"],
    "modernbert": ["attention_dropout", "embedding_dropout", "mlp_dropout", "classifier_dropout"],
}


@pytest.mark.parametrize("kind", list(DROPOUTS))
def test_dropout_is_off_while_training_unless_asked_for(kind: str, tmp_path: Path) -> None:
    saved(kind, tmp_path, **dict.fromkeys(DROPOUTS[kind], 0.5))

    def differs(dropout: bool) -> bool:
        model = load_model(str(tmp_path), ModelSettings(dropout=dropout)).model
        batch = collate([mixed_groups()], shared=model.shares_prefix)
        with torch.no_grad():
            return not torch.equal(model.train()(batch), model.eval()(batch))

    assert not differs(dropout=False)
    assert differs(dropout=True)


# ------------------------------------------------------------------------------------------------------------ from scratch


def test_a_model_from_scratch_is_made_of_its_seed_and_its_words() -> None:
    examples = toy_examples("pairs", 10)
    first, again, other = (tiny_model(examples, ModelSettings(width=32), 128, seed) for seed in (0, 0, 1))
    assert first.model.shares_prefix
    assert first.tokenizer.get_vocab() == again.tokenizer.get_vocab()
    weights = [m.model.state_dict() for m in (first, again, other)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not torch.equal(weights[0]["classifier.score.weight"], weights[2]["classifier.score.weight"])
    few = tiny_model(examples, ModelSettings(width=32, words=20), 128, 0)
    assert len(few.tokenizer) == 20
    assert few.tokenizer.unk_token_id in few.tokenizer("largest of never seen ?")["input_ids"]


def test_a_class_that_reads_its_own_way_has_its_head_in_float32_too() -> None:
    model = wrapped("bert", "own", vocabulary=WORDS)
    with torch.no_grad():
        model.head.bias.fill_(3.0)  # near 3 bfloat16 knows every 64th
    scores = np.concatenate(score_groups(model, mixed_groups(), BatchSettings(), "bf16"))
    assert len(np.unique(scores)) > len(np.unique(torch.tensor(scores).bfloat16().float().numpy()))
