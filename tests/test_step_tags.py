"""Step tags: one token after every step, in every tokenizer; what cannot be read at one tag per step is left out with the reason."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from driving import done, here
from rayward import fitting, registry
from rayward.batching import BatchSettings
from rayward.config import resolve
from rayward.errors import ModelError
from rayward.fitting import FitSettings
from rayward.records import Example, Message, Rejected
from rayward.rendering import Group, Renderer, RenderSettings, step_tag_id, tag_token
from rayward.reward_model import Loaded, ModelSettings, RewardModel, load_model, register_tag, save_model, score_groups, word_tokenizer
from rayward.scoring import Scorer
from tiny import (
    CHATML,
    byte_tokenizer,
    classifier,
    example,
    question,
    toy_dataset,
    toy_rollouts,
    wordpiece_tokenizer,
)

torch.set_num_threads(1)
TAG = "<extra_0>"
STEPS = ("First 10 + 30 = 40.\n\n", "Then the ones: 2.\n", "So the answer is 42.")


def words() -> Any:
    return word_tokenizer([example(STEPS)], 200)


TOKENIZERS: dict[str, Any] = {
    "bytes, chat template": byte_tokenizer,
    "bytes, plain": lambda: byte_tokenizer(None),
    "bytes, padding is the end": lambda: byte_tokenizer(None, pad_token="</s>"),
    "wordpiece": wordpiece_tokenizer,
    "words": words,
}


def body(tokenizer: Any, **changes: Any) -> RewardModel:
    return RewardModel(classifier("qwen3", vocabulary=len(tokenizer), **changes)).eval()


def tagged(tokenizer: Any, tag: str = TAG) -> Any:
    """The tokenizer with a tag of its own."""
    register_tag(Loaded(body(tokenizer), tokenizer, {}), tag)
    return tokenizer


def render(tokenizer: Any, examples: list[Example], **changes: Any) -> list[Group | Rejected]:
    return list(Renderer(tokenizer, RenderSettings(**{"step_tag": TAG, **changes})).render(examples))


def only(made: list[Group | Rejected]) -> Any:
    [one] = made
    return one


# ----------------------------------------------------------------------------------------------------------- registration


@pytest.mark.parametrize("name", list(TOKENIZERS))
def test_a_tag_becomes_one_token_with_a_row_that_is_the_mean(name: str, tmp_path: Path) -> None:
    tokenizer = TOKENIZERS[name]()
    before, special, model = len(tokenizer), list(tokenizer.all_special_tokens), body(tokenizer)
    rows = model.classifier.get_input_embeddings().weight.detach().clone()
    assert tag_token(tokenizer, TAG) is None
    assert register_tag(Loaded(model, tokenizer, {}), TAG)
    known = step_tag_id(tokenizer, TAG)
    assert known == before
    assert set(special) <= set(tokenizer.all_special_tokens)
    now = model.classifier.get_input_embeddings().weight
    assert now.shape == (before + 1, 32)
    assert model.classifier.config.vocab_size == before + 1
    assert torch.equal(now[:before], rows)
    torch.testing.assert_close(now[known], rows.mean(0))
    assert not register_tag(Loaded(model, tokenizer, {}), TAG)
    save_model(model, tokenizer, tmp_path, {"render": {"step_tag": TAG, "max_length": 90}})
    again = load_model(str(tmp_path), ModelSettings())
    assert step_tag_id(again.tokenizer, TAG) == known
    assert again.tokenizer.get_vocab() == tokenizer.get_vocab()
    texts = ["It is 42." + TAG + " Yes", "<|im_start|>user\nIs it?<|im_end|>"]
    assert again.tokenizer(texts)["input_ids"] == tokenizer(texts)["input_ids"]
    [one] = render(tokenizer, [example(STEPS)])
    assert isinstance(one, Group)
    first = score_groups(model, [one], BatchSettings())[0]
    scorer = Scorer.load(tmp_path)
    assert scorer.renderer.tag == known
    np.testing.assert_allclose(scorer([example(STEPS)])[0], first, rtol=1e-5, atol=1e-6)


def test_a_row_that_was_kept_free_also_starts_as_the_mean() -> None:
    tokenizer = byte_tokenizer()
    model = RewardModel(classifier("qwen3", vocabulary=512))
    rows = model.classifier.get_input_embeddings().weight.detach().clone()
    assert register_tag(Loaded(model, tokenizer, {}), TAG)
    now = model.classifier.get_input_embeddings().weight
    known = step_tag_id(tokenizer, TAG)
    assert now.shape == (512, 32)
    torch.testing.assert_close(now[known], rows[:known].mean(0))
    others = torch.arange(512) != known
    assert torch.equal(now[others], rows[others])


@pytest.mark.parametrize("tag", ["+", "answer", "ки", "<|reward token|>", "##"])
def test_a_tag_that_melts_into_the_text_is_registered(tag: str) -> None:
    tokenizer = tagged(byte_tokenizer(), tag)
    known = step_tag_id(tokenizer, tag)
    for text in ("1{}1", "a{}a", ".{}\n", " {} ", "the{}quick", "\n\n{}\n\n", "({})"):
        assert tokenizer(text.format(tag), add_special_tokens=False)["input_ids"].count(known) == 1


def test_a_tag_that_is_a_word_of_its_own_keeps_its_row() -> None:
    tokenizer = byte_tokenizer()
    model = body(tokenizer)
    rows = model.classifier.get_input_embeddings().weight.detach().clone()
    assert not register_tag(Loaded(model, tokenizer, {}), "<|im_start|>")
    register_tag(Loaded(model, tokenizer, {}), "+")  # in the vocabulary, and beside a digit a token or not
    now = model.classifier.get_input_embeddings().weight
    assert torch.equal(now[: len(rows)], rows)


@pytest.mark.parametrize("tag", ["</s>", "<|pad|>"])
def test_a_tag_that_means_something_else_is_refused(tag: str) -> None:
    with pytest.raises(ModelError, match=r"step_tag=.* is the (eos|pad)_token of this tokenizer"):
        Renderer(byte_tokenizer(), RenderSettings(step_tag=tag))


def test_a_tag_that_nobody_registered_is_refused() -> None:
    with pytest.raises(ModelError, match=r"step_tag=<extra_0> is not one token(.|\n)*registers it"):
        Renderer(byte_tokenizer(), RenderSettings(step_tag=TAG))


@pytest.mark.parametrize("tag", [" <extra_0>", "<extra_0>\n", "\n"])
def test_a_tag_with_white_space_around_it_is_refused(tag: str) -> None:
    with pytest.raises(ValueError, match="must not begin or end with white space"):
        RenderSettings(step_tag=tag)


# -------------------------------------------------------------------------------------------------------------- rendering


def places_read(tokenizer: Any, group: Group) -> list[str]:
    """The text from the start of the answers to each place."""
    return [tokenizer.decode(group.token_T[group.length_A[0] : place + 1]) for place in group.place_K]


@pytest.mark.parametrize("name", list(TOKENIZERS))
def test_every_step_is_read_at_its_own_tag(name: str) -> None:
    tokenizer = tagged(TOKENIZERS[name]())
    known = step_tag_id(tokenizer, TAG)
    one = only(render(tokenizer, [example(STEPS)]))
    assert (one.token_T[one.place_K] == known).all()
    assert (one.token_T == known).sum() == len(one.place_K) == len(STEPS)
    if name.startswith("bytes"):
        assert places_read(tokenizer, one) == [TAG.join(STEPS[:n]) + TAG for n in (1, 2, 3)]
    bare = only(list(Renderer(tokenizer, RenderSettings()).render([example(STEPS)])))
    assert one.length_A[0] == bare.length_A[0]
    assert len(one.token_T) == len(bare.token_T) + len(STEPS)  # nothing but the tags is new
    assert one.token_T[one.token_T != known].tolist() == bare.token_T.tolist()


TEMPLATES = {
    "trims": CHATML.replace("m['content']", "m['content'] | trim"),
    "opens with a thought": CHATML.replace("<|im_start|>assistant\n{%", "<|im_start|>assistant\n<think>\n{%"),
}


@pytest.mark.parametrize("name", list(TEMPLATES))
def test_templates_that_touch_the_answer_keep_the_tags(name: str) -> None:
    tokenizer = tagged(byte_tokenizer(TEMPLATES[name]))
    steps = ("  First.\n\n", "\n Then 42.  \n")
    one = only(render(tokenizer, [example(steps)]))
    read = places_read(tokenizer, one)
    assert [r.count(TAG) for r in read] == [1, 2]
    assert all(r.endswith(TAG) for r in read)


def test_a_template_that_drops_a_tag_is_a_reason() -> None:
    drops = CHATML.replace("m['content']", "m['content'].split('</think>')[-1]")
    made = only(render(tagged(byte_tokenizer(drops)), [example("<think>2 + 2</think>It is 4.")]))
    assert isinstance(made, Group)
    assert len(made.place_K) == 1
    made = only(render(tagged(byte_tokenizer(drops)), [example(("<think>2 + 2", "</think>It is 4."))]))
    assert isinstance(made, Rejected)


@pytest.mark.parametrize(
    ("steps", "tag"),
    [
        (("It is <extra_0> 42.", "Yes."), TAG),
        (("It is 42.", "Yes.<extra_0>"), TAG),
        (("1 + 1", "is 2"), "+"),
        (("x #", "y"), "##"),  # with the tag behind it, a tag one character too early
    ],
)
def test_an_answer_that_contains_the_tag_is_left_out(steps: tuple[str, ...], tag: str) -> None:
    made = render(tagged(byte_tokenizer(), tag), [example(steps), example(("No.", "Never."))], step_tag=tag)
    assert isinstance(made[0], Rejected)
    assert made[0].reason == f"step tag: the answer itself contains {tag}"
    assert isinstance(made[1], Group)


def test_a_tag_in_the_prompt_is_not_read() -> None:
    tokenizer = tagged(byte_tokenizer())
    one = only(render(tokenizer, [example(STEPS, prompt=question(f"What is {TAG}?"))]))
    assert (one.place_K >= one.length_A[0]).all()
    assert len(one.place_K) == len(STEPS)


@pytest.mark.parametrize("how", ["cut_answer", "cut"])
def test_an_answer_whose_tag_would_be_cut_off_is_left_out(how: str) -> None:
    tokenizer = tagged(byte_tokenizer(None))
    whole = only(render(tokenizer, [example(STEPS)]))
    last = int(whole.length_A[1])  # tokens of the answer, the end of text behind the last tag
    fits, prompt = last - 1, int(whole.length_A[0])
    kept = only(render(tokenizer, [example(STEPS)], max_length=prompt + fits, too_long="cut_answer"))
    assert isinstance(kept, Group)
    assert (kept.token_T[kept.place_K] == step_tag_id(tokenizer, TAG)).all()
    assert kept.place_K.tolist() == whole.place_K.tolist()
    limit = prompt + fits - 1 if how == "cut_answer" else fits - 1
    made = only(render(tokenizer, [example(STEPS)], max_length=limit, too_long=how))
    assert isinstance(made, Rejected)
    assert "the end of a step would be cut off" in made.reason


def test_answers_of_one_prompt_and_pairs_have_a_tag_each() -> None:
    tokenizer = tagged(byte_tokenizer())
    known = step_tag_id(tokenizer, TAG)
    several = only(render(tokenizer, [example(STEPS, STEPS[:1], ("No.", "Never."))]))
    assert len(several.place_K) == 6
    pair = only(render(tokenizer, [example("It is 42.", "It is 41.")]))
    assert (pair.token_T[pair.place_K] == known).all()
    assert len(pair.place_K) == 2
    model = body(tokenizer)
    together = score_groups(model, [several], BatchSettings())[0]
    alone = [
        score_groups(model, [g], BatchSettings())[0] for g in render(tokenizer, [example(a) for a in (STEPS, STEPS[:1], ("No.", "Never."))])
    ]
    np.testing.assert_allclose(together, np.concatenate(alone), rtol=1e-4, atol=1e-5)
    assert together[3] == pytest.approx(together[0], rel=1e-5)  # a causal model reads the same first step


def test_a_group_of_messages_with_a_tag_keeps_its_prompt() -> None:
    tokenizer = tagged(byte_tokenizer())
    prompt = (Message("system", "Be brief."), Message("user", "12 + 30?"), Message("assistant", "42"), Message("user", "Sure?"))
    one, bare = (
        only(list(Renderer(tokenizer, s).render([example(STEPS, prompt=prompt)]))) for s in (RenderSettings(step_tag=TAG), RenderSettings())
    )
    assert one.token_T[: one.length_A[0]].tolist() == bare.token_T[: bare.length_A[0]].tolist()


# --------------------------------------------------------------------------------------------------------- by the commands

SMALL = ["net.width=32", "net.layers=1", "render.max_length=200", "train.lr=3e-3", "batch.size=16"]


def trained(examples: Path, output: Path, *words: str) -> Scorer:
    sets = [word for setting in SMALL for word in ("--set", setting)]
    done(here("train_reward_model", "--examples", examples, "--output", output, *sets, *words))
    return Scorer.load(output / "model")


@pytest.mark.slow
def test_a_process_reward_model_with_tags_from_rollouts_to_the_registry(store: Path, tmp_path: Path) -> None:
    sample = ("--set", "sample.answers=1", "--set", "sample.continued=1", "--set", "sample.continuations=8")
    for name, problems in (("train", "toy:600"), ("test", "toy:150:1")):
        done(here("sample_rollouts", "--problems", problems, "--output", tmp_path / f"{name}-rollouts", "--engine", "local", *sample))
        done(here("label_steps", "--source", tmp_path / f"{name}-rollouts", "--output", tmp_path / name, "--engine", "local"))
    job = ["net.head=two_class", f"render.step_tag={TAG}", "train.epochs=6", "net.layers=2"]  # one layer to gather a step at its tag
    scorer = trained(tmp_path / "train", tmp_path / "job", *(w for s in job for w in ("--set", s)), "--register", "tagged")
    assert scorer.model.reading.kind == "two_class"
    assert scorer.renderer.settings.step_tag == TAG
    assert pq.read_table(tmp_path / "job" / "groups" / "rejects.parquet").num_rows == 0

    done(here("evaluate_model", "--model", tmp_path / "job" / "model", "--examples", tmp_path / "test", "--output", tmp_path / "report"))
    report = json.loads((tmp_path / "report" / "report.json").read_text(encoding="utf-8"))
    first_error = report["segments"]["first_error"]
    assert report["segments"]["balanced_accuracy"] > 0.6
    assert first_error["f1"] > max(b["f1"] for b in first_error["baselines"].values())

    asked = [r for same in toy_rollouts(4, seed=5) for r in same[:3]]
    scores = scorer.score_rollouts(asked)
    rows = [{"prompt": r.prompt[0].content, "steps": list(r.steps)} for r in asked]
    told = mlflow_model("models:/tagged/1").predict(rows)
    for score, row in zip(scores, told["step_scores"], strict=True):
        np.testing.assert_allclose(row, score, rtol=1e-5, atol=1e-5)
    without = Scorer(scorer.model, Renderer(scorer.renderer.tokenizer, RenderSettings()), scorer.notes)
    assert any(not np.allclose(a, b, atol=1e-3) for a, b in zip(scores, without.score_rollouts(asked), strict=True))


def mlflow_model(name: str) -> Any:
    import mlflow

    mlflow.set_tracking_uri(registry.tracking_uri())
    return mlflow.pyfunc.load_model(name)


def test_a_tag_on_a_model_that_is_there_is_what_every_worker_starts_from(store: Path, tmp_path: Path) -> None:
    steps = toy_dataset("steps", tmp_path, 24).path
    plain = trained(steps, tmp_path / "plain")
    model = ("--model", str(tmp_path / "plain" / "model"), "--set", f"render.step_tag={TAG}")
    said = json.loads((tmp_path / "plain" / "settings.json").read_text(encoding="utf-8"))
    settings = resolve(FitSettings, {name: value for name, value in said.items() if name != "data_digest"})
    settings = replace(settings, model=str(tmp_path / "plain" / "model"), render=replace(settings.render, step_tag=TAG))
    fitting.prepare(settings, str(tmp_path / "prepared"))
    begun = fitting.load_start(tmp_path / "prepared", settings)  # what every Ray Train worker calls
    known = step_tag_id(begun.tokenizer, TAG)
    assert known == len(plain.renderer.tokenizer)
    rows = plain.model.classifier.get_input_embeddings().weight
    torch.testing.assert_close(begun.model.classifier.get_input_embeddings().weight[:known], rows)
    assert trained(steps, tmp_path / "tagged", *model).renderer.tag == known
    again = trained(steps, tmp_path / "again", "--model", str(tmp_path / "tagged" / "model"), "--set", f"render.step_tag={TAG}")
    assert again.renderer.tag == known
    assert len(again.renderer.tokenizer) == known + 1  # registered once
