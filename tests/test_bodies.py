"""Bodies beyond those of test_reward_model, every pooling, and checkpoints as other projects write them.

The references are the body itself, called by plain transformers on one unpadded sequence, and heads worked out in plain torch.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoModelForTokenClassification

import tiny
from driving import done, here
from rayward import models_docs
from rayward.batching import BatchSettings, collate
from rayward.errors import ModelError
from rayward.pooling import POOLINGS, width_of
from rayward.rendering import Group
from rayward.reward_model import Loaded, ModelSettings, RewardModel, load_model, save_model, score_groups, tiny_model
from tiny import byte_tokenizer, classifier, plain_scores, random_group, rendered, sequences, toy_dataset, toy_examples

torch.set_num_threads(1)

WORDS = 420  # of byte_tokenizer
_USUAL, _GROUPED = tiny.BODIES["bert"], tiny.BODIES["llama"]
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
MORE: dict[str, dict[str, Any]] = {  # bodies that test_reward_model does not have
    "gemma3_text": {**_GROUPED, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 64},
    "phi3": _GROUPED,
    "opt": {**_USUAL, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "mixtral": {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen3_moe": {**_GROUPED, **_EXPERTS, "head_dim": 8},
    "gpt_oss": {**_GROUPED, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 64},
    "jamba": {  # Mamba and attention
        **_GROUPED,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
    },
    "qwen3_next": {  # gated delta rule and attention
        **_GROUPED,
        **_EXPERTS,
        "head_dim": 8,
        "shared_expert_intermediate_size": 24,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
    },
}
tiny.BODIES.update({kind: body for kind, body in MORE.items() if kind not in tiny.BODIES})


def mixed_groups(places: bool = True) -> list[Group]:
    """Groups of quite different lengths, within windows of 64 tokens."""
    rng = np.random.default_rng(0)
    three = random_group(rng, 1, [1, 14, 3], [1, 4, 2] if places else [])
    return [random_group(rng, 3, [2, 9]), random_group(rng, 25, [4]), three, random_group(rng, 9, [30, 2])]


def scores_of(model: RewardModel, groups: list[Group]) -> np.ndarray:
    return np.concatenate(score_groups(model.eval(), groups, BatchSettings(row_tokens=60)))


# ----------------------------------------------------------------------------------------------------------------- bodies


@pytest.mark.parametrize("kind", list(MORE))
def test_packed_scores_are_separate_scores_and_a_saved_model_gives_them_again(kind: str, tmp_path: Path) -> None:
    model = RewardModel(classifier(kind, vocabulary=WORDS), max_length=64).eval()
    assert model.pooling == "last"
    groups = mixed_groups()
    plain = np.concatenate([plain_scores(model.classifier, group) for group in groups])
    scores = scores_of(model, groups)
    np.testing.assert_allclose(scores, plain, rtol=1e-4, atol=2e-5)
    assert np.ptp(scores) > 0.1
    save_model(model, byte_tokenizer(), tmp_path, {})
    loaded = load_model(str(tmp_path), ModelSettings(), 64).model
    np.testing.assert_allclose(scores_of(loaded, groups), scores, rtol=1e-5, atol=1e-5)
    elsewhere = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        logits = [elsewhere(input_ids=ids).logits.item() for ids in sequences(groups[0])]
    np.testing.assert_allclose(scores[: len(logits)], logits, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("kind", list(models_docs.BODIES))
def test_the_documented_bodies_do_what_is_said_of_them(kind: str) -> None:
    assert kind in tiny.BODIES, "a body that no test has is not to be documented"
    model = RewardModel(classifier(kind))
    said = models_docs.BODIES[kind]
    assert (model.traits.causal, model.shares_prefix) == (said != "looks ahead", said == "shared")


@pytest.mark.parametrize("kind", ["qwen3", "opt", "mixtral", "jamba"])
def test_padding_changes_nothing(kind: str, tmp_path: Path) -> None:
    groups, scores = mixed_groups(), []
    for side, pad in (("right", "<|pad|>"), ("left", "</s>"), ("left", None)):
        tokenizer = byte_tokenizer(pad_token=pad, padding_side=side)
        model = RewardModel(classifier(kind, vocabulary=WORDS, pad_token_id=1), max_length=64)  # OPT's position of padding counts
        model.classifier.config.pad_token_id = tokenizer.pad_token_id
        save_model(model, tokenizer, tmp_path / f"{side}-{pad is None}", {})
        scores.append(scores_of(load_model(str(tmp_path / f"{side}-{pad is None}"), ModelSettings(), 64).model, groups))
    assert np.ptp(scores[0]) > 0.1
    np.testing.assert_allclose(scores[1:], [scores[0]] * 2, rtol=1e-5, atol=1e-5)


def test_a_body_without_a_sequence_classifier_is_an_error_that_says_so(tmp_path: Path) -> None:
    config = AutoConfig.for_model("mamba", vocab_size=WORDS, hidden_size=32, num_hidden_layers=1, state_size=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"no sequence classifier for bodies of type mamba(.|\n)*take a body that has one"):
        load_model(str(tmp_path), ModelSettings(new_head=True))


# --------------------------------------------------------------------------------------------------------------- poolings

REFERENCES: dict[str, Callable[[Tensor], Tensor]] = {
    "first": lambda hidden_TD: hidden_TD[0],
    "mean": lambda hidden_TD: hidden_TD.mean(0),
    "max": lambda hidden_TD: hidden_TD.max(0).values,
    "mean_max": lambda hidden_TD: torch.cat([hidden_TD.mean(0), hidden_TD.max(0).values]),
}


def with_head(kind: str, pooling: Any) -> RewardModel:
    """A body whose head is as wide as what the pooling gives."""
    made = classifier(kind, vocabulary=WORDS)
    torch.manual_seed(7)
    head = nn.Linear(32 * width_of(pooling), 1, bias=False)
    setattr(made, "score" if hasattr(made, "score") else "classifier", head)
    return RewardModel(made, pooling).eval()


@torch.no_grad()
def pooled_scores(model: RewardModel, groups: list[Group]) -> list[float]:
    body, read = model.classifier.base_model, REFERENCES[model.pooling]
    return [model.head(read(body(input_ids=ids).last_hidden_state[0])).item() for group in groups for ids in sequences(group)]


def test_every_pooling_has_a_reference() -> None:
    assert POOLINGS.keys() == REFERENCES.keys()


@pytest.mark.parametrize("kind", ["bert", "modernbert", "qwen3"])
@pytest.mark.parametrize("pooling", list(POOLINGS))
def test_a_pooling_reads_real_tokens_and_is_loaded_again(kind: str, pooling: str, tmp_path: Path) -> None:
    model, groups = with_head(kind, pooling), mixed_groups(places=False)
    assert not model.shares_prefix
    scores = scores_of(model, groups)
    np.testing.assert_allclose(scores, pooled_scores(model, groups), rtol=1e-5, atol=1e-5)
    if (kind, pooling) != ("qwen3", "first"):  # the first token of a decoder has seen nothing
        assert np.ptp(scores) > 0.1
    save_model(model, byte_tokenizer(), tmp_path, {})
    loaded = load_model(str(tmp_path), ModelSettings()).model
    assert loaded.pooling == pooling
    np.testing.assert_allclose(scores_of(loaded, groups), scores, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("pooling", list(POOLINGS))
def test_masked_tokens_get_no_gradient(pooling: str) -> None:
    hidden_BTD = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    real_BT = torch.tensor([[True, True, True], [True, True, False]])
    POOLINGS[pooling](hidden_BTD, real_BT).sum().backward()
    assert hidden_BTD.grad is not None
    assert not hidden_BTD.grad[~real_BT].any()
    assert hidden_BTD.grad[real_BT].any()


@pytest.mark.parametrize("layers", [1, 2])
def test_a_wide_head_is_made_fresh_and_trains_from_where_it_was(layers: int, tmp_path: Path) -> None:
    examples = toy_examples("pairs", 3)
    net = ModelSettings(width=32, pooling="mean_max", head_layers=layers, new_head=True)
    made = tiny_model(examples, net, 96, 0)
    groups = rendered(made.tokenizer, examples[:3])
    save_model(made.model, made.tokenizer, tmp_path, {})
    loaded = load_model(str(tmp_path), ModelSettings())
    assert np.array_equal(scores_of(loaded.model, groups), scores_of(made.model, groups))
    with pytest.raises(
        ModelError, match=r"has a head for pooling=mean_max, which is not as wide as one for pooling=mean(.|\n)*new_head=true"
    ):
        load_model(str(tmp_path), ModelSettings(pooling="mean"))
    fresh = load_model(str(tmp_path), ModelSettings(pooling="mean", new_head=True, head_layers=layers)).model
    assert next(m for m in fresh.head.modules() if isinstance(m, nn.Linear)).in_features == 32


@pytest.mark.parametrize("kind", ["bert", "qwen3"])
def test_a_head_made_elsewhere_is_not_widened_in_silence(kind: str, tmp_path: Path) -> None:
    classifier(kind, vocabulary=WORDS).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"pooling=mean_max reads 64 numbers per sequence, and the head takes 32(.|\n)*new_head=true"):
        load_model(str(tmp_path), ModelSettings(pooling="mean_max"))
    assert load_model(str(tmp_path), ModelSettings(pooling="mean_max", new_head=True)).model.head.in_features == 64


def test_tokens_start_no_wide_head(tmp_path: Path) -> None:
    language_model(tmp_path)
    with pytest.raises(ModelError, match=r"starts a head that reads one token, and not pooling=mean_max"):
        load_model(str(tmp_path), ModelSettings(new_head=True, head_tokens="+", pooling="mean_max"))


def test_a_head_of_one_token_starts_as_that_tokens_logit(tmp_path: Path) -> None:
    language, _ = language_model(tmp_path)
    loaded = load_model(str(tmp_path), ModelSettings(new_head=True, head_tokens="+"))
    token, groups = loaded.tokenizer.get_vocab()["+"], mixed_groups(places=False)
    with torch.no_grad():
        logits = [language(input_ids=ids).logits[0, -1, token].item() for group in groups for ids in sequences(group)]
    np.testing.assert_allclose(scores_of(loaded.model, groups), logits, rtol=1e-4, atol=1e-4)
    assert np.ptp(logits) > 0.1


# ------------------------------------------------------------------------------------------- checkpoints that others wrote


def language_model(folder: Path, **changes: Any) -> tuple[nn.Module, dict[str, Any]]:
    """A causal language model on disk, and its config."""
    config = AutoConfig.for_model("qwen2", vocab_size=WORDS, **{**tiny.BODIES["qwen2"], **changes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                nn.init.normal_(weight, std=0.25)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return model, json.loads((folder / "config.json").read_text(encoding="utf-8"))


def rewrite(folder: Path, said: dict[str, Any], weights: dict[str, Tensor], drop: str = "lm_head.") -> None:
    """Other weights beside the body's, and another config."""
    (folder / "config.json").write_text(json.dumps(said), encoding="utf-8")
    body = {n: w for n, w in load_file(folder / "model.safetensors").items() if not n.startswith(drop)}
    save_file({**body, **weights}, folder / "model.safetensors", metadata={"format": "pt"})


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def trl_classifier(folder: Path) -> Callable[[Tensor], Tensor]:
    """RewardTrainer.save_model: a sequence classifier, with the training arguments as a pickle beside it."""
    _, said = language_model(folder)
    head = normal(1, 32)
    said |= {"architectures": ["Qwen2ForSequenceClassification"], "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    rewrite(folder, said, {"score.weight": head})
    (folder / "training_args.bin").write_bytes(b"a pickle that nobody opens")
    return lambda hidden_TD: hidden_TD @ head.T


def trl_token_classifier(folder: Path) -> Callable[[Tensor], Tensor]:
    """PRMTrainer: a token classifier of two labels, whose head has a bias."""
    language_model(folder)
    model = AutoModelForTokenClassification.from_pretrained(folder, num_labels=2)
    with torch.no_grad():
        model.score.weight.copy_(normal(2, 32))
        model.score.bias.copy_(torch.tensor([0.5, -1.5]))
    model.save_pretrained(folder)
    return lambda hidden_TD: model.score(hidden_TD)


def openrlhf(prefix: str) -> Callable[[Path], Callable[[Tensor], Tensor]]:
    """Its RewardModel: a linear head under a name of its own, mean and deviation in the config, two labels by default."""

    def write(folder: Path) -> Callable[[Tensor], Tensor]:
        _, said = language_model(folder)
        head = normal(1, 32)
        said |= {"architectures": ["RewardModel"], "value_head_prefix": prefix, "normalize_reward": False, "mean": 1.25, "std": 3.0}
        rewrite(folder, said, {f"{prefix}.weight": head})
        return lambda hidden_TD: hidden_TD @ head.T

    return write


def value_head(beside: bool) -> Callable[[Path], Callable[[Tensor], Tensor]]:
    """TRL's value head on a language model: in model.safetensors (TRL), or beside it (LLaMA-Factory)."""

    def write(folder: Path) -> Callable[[Tensor], Tensor]:
        _, said = language_model(folder)
        weights = {"v_head.summary.weight": normal(1, 32), "v_head.summary.bias": torch.tensor([0.75])}
        if beside:
            save_file(weights, folder / "value_head.safetensors", metadata={"format": "pt"})
        else:
            rewrite(folder, said, weights, drop="nothing")
        return lambda hidden_TD: hidden_TD @ weights["v_head.summary.weight"].T + 0.75

    return write


def qwen_math(outputs: int, shards: bool = False) -> Callable[[Path], Callable[[Tensor], Tensor]]:
    """Qwen2.5-Math-PRM and -RM: two layers with a ReLU between them, and code of their own beside the weights."""

    def write(folder: Path) -> Callable[[Tensor], Tensor]:
        _, said = language_model(folder)
        head = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, outputs))
        with torch.no_grad():
            for n, weight in enumerate(head.parameters()):
                weight.copy_(normal(*weight.shape, seed=n))
        code = "modeling_qwen2_rm.Qwen2ForProcessRewardModel"
        said |= {"architectures": ["Qwen2ForProcessRewardModel"], "auto_map": {"AutoModel": code}}
        weights = {f"score.{name}": weight.detach().clone() for name, weight in head.state_dict().items()}
        rewrite(folder, said, weights)
        if shards:
            cut(folder)
        return head

    return write


def cut(folder: Path) -> None:
    """The weights in two files with an index, as large models come."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    where: dict[str, str] = {}
    for n, half in enumerate((sorted(weights)[::2], sorted(weights)[1::2]), 1):
        name = f"model-{n:05}-of-00002.safetensors"
        save_file({k: weights[k] for k in half}, folder / name, metadata={"format": "pt"})
        where |= dict.fromkeys(half, name)
    index = {"metadata": {"total_size": 0}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


TWO = {"head": "two_class"}
FOREIGN: dict[str, tuple[Callable[[Path], Callable[[Tensor], Tensor]], dict[str, Any]]] = {
    "TRL RewardTrainer": (trl_classifier, {}),
    "TRL PRMTrainer": (trl_token_classifier, TWO),
    "OpenRLHF": (openrlhf("score"), {}),
    "OpenRLHF, value_head": (openrlhf("value_head"), {}),
    "TRL value head": (value_head(beside=False), {}),
    "LLaMA-Factory": (value_head(beside=True), {}),
    "Qwen2.5-Math-PRM": (qwen_math(2), {**TWO, "head_layers": 2}),
    "Qwen2.5-Math-PRM, layers found": (qwen_math(2, shards=True), TWO),
    "Qwen2.5-Math-RM": (qwen_math(1), {}),
}


def expected(loaded: Loaded, head: Callable[[Tensor], Tensor], group: Group) -> list[float]:
    """What the head, worked out by hand, says at the last tokens."""
    scores = []
    for ids in sequences(group):
        with torch.no_grad():
            output_C = head(loaded.model.classifier.base_model(input_ids=ids).last_hidden_state[0, -1])
        scores.append((output_C[-1] - (output_C[0] if len(output_C) == 2 else 0)).item())
    return scores


@pytest.mark.parametrize("name", list(FOREIGN))
def test_a_checkpoint_of_another_project_comes_with_its_head(name: str, tmp_path: Path) -> None:
    write, chosen = FOREIGN[name]
    head = write(tmp_path / "theirs")
    loaded = load_model(str(tmp_path / "theirs"), ModelSettings(**chosen))
    groups = mixed_groups(places=False)
    said = np.concatenate([expected(loaded, head, group) for group in groups])
    scores = scores_of(loaded.model, groups)
    np.testing.assert_allclose(scores, said, rtol=1e-4, atol=1e-4)
    assert np.ptp(scores) > 0.1
    save_model(loaded.model, loaded.tokenizer, tmp_path / "ours", {})
    again = load_model(str(tmp_path / "ours"), ModelSettings())
    np.testing.assert_allclose(scores_of(again.model, groups), scores, rtol=1e-5, atol=1e-5)
    config = json.loads((tmp_path / "ours" / "config.json").read_text(encoding="utf-8"))
    assert not {"mean", "std", "normalize_reward", "value_head_prefix"} & set(config)


@pytest.mark.parametrize("name", ["TRL PRMTrainer", "Qwen2.5-Math-PRM"])
def test_two_outputs_are_not_read_as_one(name: str, tmp_path: Path) -> None:
    FOREIGN[name][0](tmp_path)
    with pytest.raises(ModelError, match=r"with head=auto: its own has 2 outputs(.|\n)*net.head=two_class"):
        load_model(str(tmp_path), ModelSettings())
    fresh = load_model(str(tmp_path), ModelSettings(new_head=True)).model.head
    assert isinstance(fresh, nn.Linear)
    assert fresh.out_features == 1


def no_head(folder: Path) -> None:
    language_model(folder, tie_word_embeddings=False)


def gated(folder: Path) -> None:
    _, said = language_model(folder)
    rewrite(folder, said, {"regression_layer.weight": normal(19, 32), "gating.layers.0.weight": normal(8, 32)})


def pickled(folder: Path) -> None:
    language_model(folder)
    (folder / "value_head.bin").write_bytes(b"a pickle")


def adapter(folder: Path) -> None:
    byte_tokenizer().save_pretrained(folder)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "nowhere"}', encoding="utf-8")
    save_file({"base_model.model.score.modules_to_save.weight": normal(1, 32)}, folder / "adapter_model.safetensors")


def test_a_fresh_head_may_take_the_place_of_one_that_cannot_be_loaded(tmp_path: Path) -> None:
    pickled(tmp_path)
    head = load_model(str(tmp_path), ModelSettings(new_head=True)).model.head
    assert head.weight.std().item() == pytest.approx(33**-0.5, rel=0.5)


def test_a_class_that_pools_by_itself_gets_no_other_pooling(tmp_path: Path) -> None:
    classifier("roberta", vocabulary=WORDS).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"pooling=max needs a linear head(.|\n)*net.pooling=own"):
        load_model(str(tmp_path), ModelSettings(pooling="max"))
    with pytest.raises(ModelError, match="pooling=mean_max takes the place of a linear head, and Roberta"):
        load_model(str(tmp_path), ModelSettings(pooling="mean_max", new_head=True))


@pytest.mark.parametrize(
    ("write", "word"),
    [
        (no_head, r"lacks weights for score.weight and has some that its class has no place for: lm_head.weight\b(.|\n)*new_head=true"),
        (gated, r"no place for: gating.layers.0.weight, regression_layer.weight(.|\n)*new_head=true"),
        (pickled, r"value_head.bin, a pickle(.|\n)*save it again as safetensors"),
        (adapter, r"an adapter without the model that it adapts(.|\n)*merge it"),
    ],
)
def test_what_cannot_be_loaded_says_what_it_is_and_the_way_out(write: Callable[[Path], None], word: str, tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(ModelError, match=word):
        load_model(str(tmp_path), ModelSettings())


def test_a_bias_is_part_of_what_is_trained(tmp_path: Path) -> None:
    FOREIGN["LLaMA-Factory"][0](tmp_path)
    model = load_model(str(tmp_path), ModelSettings()).model
    model(collate([mixed_groups()], shared=True)).sum().backward()
    assert model.head.bias.grad.abs().item() > 0


# --------------------------------------------------------------------------------------------------------- the whole way


def test_a_head_made_elsewhere_is_trained_on(store: Path, tmp_path: Path) -> None:
    steps = toy_dataset("steps", tmp_path, 12).path
    FOREIGN["TRL PRMTrainer"][0](tmp_path / "theirs")
    theirs = load_file(tmp_path / "theirs" / "model.safetensors")
    usual = ["--model", tmp_path / "theirs", "--set", "net.head=two_class", "--set", "render.max_length=120"]
    for lr, name in (("1e-9", "kept"), ("1e-2", "moved")):
        done(here("train_reward_model", "--examples", steps, "--output", tmp_path / name, *usual, "--set", f"train.lr={lr}"))
    kept, moved = (load_model(str(tmp_path / name / "model"), ModelSettings()).model.head for name in ("kept", "moved"))
    for part in ("weight", "bias"):
        torch.testing.assert_close(getattr(kept, part).data, theirs[f"score.{part}"], rtol=0, atol=1e-6)
        assert not torch.allclose(getattr(moved, part), theirs[f"score.{part}"], rtol=0, atol=1e-4)


def test_a_wide_head_is_trained_and_goes_on_in_a_later_stage(store: Path, tmp_path: Path) -> None:
    pairs = toy_dataset("pairs", tmp_path, 12).path
    small = [w for s in ("net.width=32", "net.layers=1", "render.max_length=120", "net.pooling=mean_max") for w in ("--set", s)]
    done(here("train_reward_model", "--examples", pairs, "--output", tmp_path / "first", *small))
    first = load_model(str(tmp_path / "first" / "model"), ModelSettings()).model
    assert (first.pooling, first.head.in_features) == ("mean_max", 64)
    later = ("--model", tmp_path / "first" / "model", "--set", "train.lr=1e-9", "--set", "render.max_length=120")
    done(here("train_reward_model", "--examples", pairs, "--output", tmp_path / "later", *later))
    second = load_model(str(tmp_path / "later" / "model"), ModelSettings()).model
    assert second.pooling == "mean_max"
    torch.testing.assert_close(second.head.weight, first.head.weight, rtol=0, atol=1e-6)


# ------------------------------------------------------------------------------------------------------------------- docs


def test_the_document_is_made_from_the_code() -> None:
    path = Path(models_docs.__file__).parents[2] / "docs" / "models.md"
    assert path.read_text(encoding="utf-8") == models_docs.page(), f"write it again: {sys.executable} -m rayward.models_docs"


def test_every_head_and_pooling_is_in_the_document() -> None:
    said = {row[0] for row in models_docs.drawn(models_docs.heads)}
    assert set(models_docs.heads.KINDS) <= said
    assert {row[0] for row in models_docs.drawn(models_docs.pooling)} == {*POOLINGS, "last", "own"}
