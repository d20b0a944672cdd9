"""Generative verifiers: a question after every answer, and the verdict that a language model would give.

The reference is plain transformers: the chat template's own text, tokenized, through `AutoModelForCausalLM`, its logits at the last token.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from driving import done, here
from rayward import registry, vocabulary
from rayward.batching import BatchSettings, collate
from rayward.errors import ModelError
from rayward.objectives import make_objective
from rayward.records import Example, Message, Rejected
from rayward.rendering import Group, Renderer, RenderSettings
from rayward.reward_model import ModelSettings, load_model, register_tag, save_model, score_groups
from rayward.scoring import Scorer
from tiny import (
    CHATML,
    WORDS,
    byte_tokenizer,
    example,
    language_model,
    question,
    rendered,
    sequences,
    toy_dataset,
    toy_rollouts,
    wordpiece_tokenizer,
)

torch.set_num_threads(1)
ASKED = "Is the answer correct? Yes or No."
WHOLE = "Question: {prompt}\n\nSolution: {answer}\n\nIs it right? + or -"
THOUGHTLESS = CHATML.replace("m['content']", "(m['content'].split('</think>')[-1] if not loop.last else m['content'])")


def answers(count: int = 3) -> Example:
    return example(*(f"10 + {n} = {10 + n}." for n in range(count)))


# --------------------------------------------------------------------------------------------------------------- rendering


@pytest.mark.parametrize("reply", ["", "Verdict:"])
def test_a_question_follows_every_answer_as_the_template_shows_it(reply: str) -> None:
    tokenizer, asked = byte_tokenizer(), answers()
    [group] = rendered(tokenizer, [asked], RenderSettings(judge=ASKED, judge_reply=reply))
    for (text,), ids in zip(asked.answers, sequences(group), strict=True):
        turns = [("user", "What is 12 plus 30?"), ("assistant", text), ("user", ASKED)]
        shown = tokenizer.apply_chat_template([{"role": r, "content": c} for r, c in turns], tokenize=False, add_generation_prompt=True)
        assert tokenizer.decode(ids[0]) == shown + reply
    assert group.place_K.tolist() == (np.cumsum(group.length_A)[1:] - 1).tolist()


def test_a_judge_may_be_shown_one_text_of_question_and_answer() -> None:
    tokenizer, asked = byte_tokenizer(), answers()
    [group] = rendered(tokenizer, [asked], RenderSettings(judge=WHOLE))
    for (text,), ids in zip(asked.answers, sequences(group), strict=True):
        said = f"Question: What is 12 plus 30?\n\nSolution: {text}\n\nIs it right? + or -"
        assert tokenizer.decode(ids[0]) == f"<s><|im_start|>user\n{said}<|im_end|>\n<|im_start|>assistant\n"
    several = (Message("system", "Be brief."), Message("user", "1 + 1?"), Message("assistant", "2"), Message("user", "2 + {answer}?"))
    [group] = rendered(tokenizer, [example("4", "5", prompt=several)], RenderSettings(judge=WHOLE))
    said = "Question: System: Be brief.\n\nHuman: 1 + 1?\n\nAssistant: 2\n\nHuman: 2 + {answer}?\n\nSolution: 5"
    assert said in tokenizer.decode(sequences(group)[1][0])


def test_without_a_template_the_reply_begins_where_its_first_word_would() -> None:
    tokenizer = byte_tokenizer(None)
    [group] = rendered(tokenizer, [answers(1)], RenderSettings(judge=ASKED))
    text = f"<s>Human: What is 12 plus 30?\n\nAssistant: 10 + 0 = 10.\n\nHuman: {ASKED}\n\nAssistant:"
    assert tokenizer.decode(sequences(group)[0][0]) == text


@pytest.mark.parametrize("companions", [1, 2, 5])
def test_what_a_judge_is_shown_does_not_depend_on_other_answers(companions: int) -> None:
    for settings in (RenderSettings(judge=ASKED), RenderSettings(judge=WHOLE)):
        alone, beside = rendered(byte_tokenizer(), [answers(1), answers(companions)], settings)
        assert torch.equal(sequences(alone)[0], sequences(beside)[0])


def test_a_template_that_forgets_earlier_thoughts_is_found_out_and_a_whole_text_is_the_way_out() -> None:
    thought = example("<think>12 + 30 = 42</think>42")
    assert len(rendered(byte_tokenizer(), [thought], RenderSettings())) == 1
    [said] = Renderer(byte_tokenizer(THOUGHTLESS), RenderSettings(judge=ASKED)).render([thought])
    assert isinstance(said, Rejected)
    assert "{answer}" in said.reason
    [group] = rendered(byte_tokenizer(THOUGHTLESS), [thought], RenderSettings(judge=WHOLE))
    assert "<think>12 + 30 = 42</think>42" in byte_tokenizer().decode(group.token_T)


@pytest.mark.parametrize("how", ["cut_answer", "cut", "cut_prompt", "reject"])
@pytest.mark.parametrize("judge", [ASKED, WHOLE])
def test_the_question_is_never_cut_off(how: Any, judge: str) -> None:
    tokenizer, long = byte_tokenizer(), example("the lazy dog " * 30, "42", prompt=question("quick " * 20))
    [whole] = rendered(tokenizer, [long], RenderSettings(judge=judge))
    for limit in range(10, len(sequences(whole)[0][0]), 7):
        [made] = Renderer(tokenizer, RenderSettings(judge=judge, max_length=limit, too_long=how)).render([long])
        if isinstance(made, Rejected):
            assert made.reason.startswith("too long")
            continue
        assert isinstance(made, Group)
        for place, ids in zip(np.cumsum(made.length_A)[1:] - 1, sequences(made), strict=True):
            text = tokenizer.decode(ids[0])
            assert len(ids[0]) <= limit
            assert text.endswith(("or No." if judge == ASKED else "right? + or -") + "<|im_end|>\n<|im_start|>assistant\n")
            assert place in made.place_K


def test_steps_get_no_verdict_of_their_own() -> None:
    [said] = Renderer(byte_tokenizer(), RenderSettings(judge=ASKED)).render([example(("a\n", "b"))])
    assert isinstance(said, Rejected)
    assert said.category == "judge"


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"judge": ASKED, "step_tag": "<extra_0>"}, "leave one of them out"),
        ({"judge_reply": "Verdict:"}, "give judge too"),
        ({"judge": "{prompt} ?"}, "must have {answer} once"),
        ({"judge": "{answer} {answer}"}, "must have {answer} once"),
    ],
)
def test_questions_that_cannot_be_asked_are_refused(changes: dict[str, str], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        RenderSettings(**changes)  # type: ignore[arg-type]


def test_a_tokenizer_with_marks_of_its_own_keeps_those_before_the_text() -> None:
    tokenizer = wordpiece_tokenizer()
    [group] = rendered(tokenizer, [answers(1)], RenderSettings(judge=ASKED))
    assert group.token_T[0] == tokenizer.cls_token_id
    assert group.token_T[-1] != tokenizer.sep_token_id


# ---------------------------------------------------------------------------------------------------------------- verdicts


VERDICTS = {"two_class": "+ -", "verdict": "+ -", "three_class": "+ = -"}
UNTIED = [("qwen3", False), ("qwen3", True), ("llama", False), ("gpt2", True), ("gpt_neox", False)]


def groups_of(tokenizer: Any, judge: str = ASKED) -> list[Group]:
    asked = [answers(3), example("12 + 30 = 42.", "41", prompt=question("What is 12 plus 30? First we add the tens."))]
    return rendered(tokenizer, asked, RenderSettings(judge=judge))


@torch.no_grad()
def said_by(language: Any, group: Group) -> torch.Tensor:
    """logit_AV of plain transformers after each answer and its question, a sequence at a time."""
    return torch.stack([language(input_ids=ids).logits[0, -1] for ids in sequences(group)])


@pytest.mark.parametrize(("body", "tied"), UNTIED)
@pytest.mark.parametrize("kind", list(VERDICTS))
def test_a_score_is_what_the_language_model_gives_the_verdicts(kind: str, body: str, tied: bool, tmp_path: Path) -> None:
    language = language_model(tmp_path, body, tied)
    loaded = load_model(str(tmp_path), ModelSettings(head=kind, new_head=True, head_tokens=VERDICTS[kind]))
    words = [loaded.tokenizer.get_vocab()[word] for word in VERDICTS[kind].split()]
    groups = groups_of(loaded.tokenizer)
    scores = score_groups(loaded.model, groups, BatchSettings())
    assert loaded.model.shares_prefix
    for group, score_K in zip(groups, scores, strict=True):
        logit_AV = said_by(language, group)
        if kind == "three_class":
            right, neutral, wrong = logit_AV[:, words].softmax(-1).unbind(-1)
            expected = torch.logit(right / (right + neutral + wrong) + neutral / 2)
        else:
            expected = logit_AV[:, words[0]] - logit_AV[:, words[1]]
        np.testing.assert_allclose(score_K, expected, rtol=1e-4, atol=1e-4)
        assert np.ptp(score_K) > 1e-3


@pytest.mark.parametrize("chunk", [1, 1000, 1 << 25])
def test_the_rest_is_all_other_tokens_whatever_a_chunk_holds(chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "CHUNK", chunk)
    language = language_model(tmp_path)
    loaded = load_model(str(tmp_path), ModelSettings(head="verdict", new_head=True, head_tokens="+ -"))
    right, wrong = (loaded.tokenizer.get_vocab()[word] for word in "+-")
    [group, _] = groups_of(loaded.tokenizer)
    batch = collate([[group]], shared=True)
    with torch.no_grad():
        output_KC = loaded.model.outputs(batch)[0]
    logit_AV = said_by(language, group)
    others = [n for n in range(WORDS) if n not in (right, wrong)]
    expected = torch.stack([logit_AV[:, wrong], logit_AV[:, right], logit_AV[:, others].exp().sum(-1).log()], -1)
    np.testing.assert_allclose(output_KC, expected, rtol=1e-4, atol=1e-4)
    target_GK, mask_GK = torch.tensor([[1.0, 0.0, 0.25]]), torch.ones(1, 3, dtype=torch.bool)
    loss = make_objective("next_token").loss(torch.zeros(1, 3), target_GK, mask_GK, output_KC.unsqueeze(0))
    share_KV = torch.zeros(3, WORDS)
    share_KV[range(3), right], share_KV[range(3), wrong] = target_GK[0], 1 - target_GK[0]
    assert loss.item() == pytest.approx(torch.nn.functional.cross_entropy(logit_AV, share_KV).item(), rel=1e-5)
    two = make_objective("binary_cross_entropy").loss(loaded.model.reading(output_KC).unsqueeze(0), target_GK, mask_GK)
    either = logit_AV.softmax(-1)[:, [right, wrong]].sum(-1)
    assert loss.item() - two.item() == pytest.approx(-either.log().mean().item(), rel=1e-4)


@pytest.mark.parametrize(("body", "tied"), UNTIED)
def test_what_a_verdict_learns_a_plain_language_model_says(body: str, tied: bool, tmp_path: Path) -> None:
    """Some steps of training, saved: the folder is a reward model, a classifier of two, and a language model, with one score."""
    language_model(tmp_path / "base", body, tied)
    loaded = load_model(str(tmp_path / "base"), ModelSettings(head="verdict", new_head=True, head_tokens="+ -"))
    groups, objective = groups_of(loaded.tokenizer), make_objective("next_token")
    batch = collate([[g] for g in groups], shared=True)
    target_GK = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    optimizer = torch.optim.AdamW(loaded.model.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        output_GKC = loaded.model.outputs(batch)
        loss = objective.loss(torch.zeros(2, 3), target_GK, batch.mask_GK, output_GKC).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    first = score_groups(loaded.model, groups, BatchSettings())
    save_model(loaded.model, loaded.tokenizer, tmp_path / "saved", {"render": {"judge": ASKED}})
    again = load_model(str(tmp_path / "saved"), ModelSettings()).model
    assert again.reading == loaded.model.reading
    state = again.state_dict()
    assert all(torch.equal(p, state[n]) for n, p in loaded.model.state_dict().items())
    language, info = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not info["missing_keys"]
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved").eval()
    assert plain.config.id2label == {0: "wrong", 1: "right"}
    right, wrong = (loaded.tokenizer.get_vocab()[word] for word in "+-")
    scorer = Scorer.load(tmp_path / "saved")
    served = scorer([answers(3)])[0]
    for group, score_K, again_K in zip(groups, first, score_groups(again, groups, BatchSettings()), strict=True):
        logit_AV = said_by(language.eval(), group)
        np.testing.assert_allclose(again_K, score_K, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(logit_AV[:, right] - logit_AV[:, wrong], score_K, rtol=1e-3, atol=1e-3)
        for ids, score in zip(sequences(group), score_K, strict=True):
            with torch.no_grad():
                logits = plain(input_ids=ids).logits[0]
            assert float(logits[1] - logits[0]) == pytest.approx(score, rel=1e-3, abs=1e-3)
    np.testing.assert_allclose(served, first[0][:3], rtol=1e-4, atol=1e-4)


def test_a_tied_head_has_no_weights_of_its_own(tmp_path: Path) -> None:
    language_model(tmp_path, tied=True)
    tied = load_model(str(tmp_path), ModelSettings(head="verdict", new_head=True, head_tokens="+ -"))
    assert not list(tied.model.head.parameters())
    assert not any("lm_head" in name for name, _ in tied.model.named_parameters())
    register_tag(tied, "<extra_0>")  # the embedding is another module now
    assert score_groups(tied.model, groups_of(tied.tokenizer), BatchSettings())[0].shape == (3,)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"head_tokens": ""}, "reads a language model's logits of two tokens"),
        ({"head_tokens": "+ = -"}, "takes 2 tokens"),
        ({"head_layers": 2}, "starts from no tokens"),
        ({"pooling": "mean"}, "logits are of one token"),
    ],
)
def test_verdicts_that_cannot_be_read_are_refused(changes: dict[str, Any], word: str, tmp_path: Path) -> None:
    language_model(tmp_path)
    with pytest.raises(ModelError, match=word):
        load_model(str(tmp_path), ModelSettings(**{"head": "verdict", "new_head": True, "head_tokens": "+ -", **changes}))


def test_an_output_layer_that_was_not_kept_cannot_come_back(tmp_path: Path) -> None:
    language_model(tmp_path)
    loaded = load_model(str(tmp_path), ModelSettings(head="two_class", new_head=True, head_tokens="+ -"))
    save_model(loaded.model, loaded.tokenizer, tmp_path / "saved", {"render": {}})
    with pytest.raises(ModelError, match="no output layer of a language model"):
        load_model(str(tmp_path / "saved"), ModelSettings(language=True))


# ------------------------------------------------------------------------------------------------- from label to language model


@pytest.mark.slow
@pytest.mark.parametrize("adapted", [False, True])
def test_a_verifier_from_outcomes_to_the_registry_and_back_to_a_language_model(adapted: bool, store: Path, tmp_path: Path) -> None:
    language_model(tmp_path / "base", tied=False)
    examples = toy_dataset("outcomes", tmp_path, 24).path
    job = [f"render.judge={ASKED}", "net.head=verdict", "net.head_tokens=+ -", "net.new_head=true", "train.epochs=2", "train.lr=3e-3"]
    job += ["render.max_length=500", *(["lora.rank=4"] if adapted else [])]
    words = [w for s in job for w in ("--set", s)]
    named = ("--examples", examples, "--output", tmp_path / "job", "--model", tmp_path / "base", "--objective", "next_token")
    done(here("train_reward_model", *named, *words, "--register", "verifier"))
    scorer = Scorer.load(tmp_path / "job" / "model")
    assert scorer.renderer.settings.judge == ASKED
    assert scorer.model.reading.kind == "verdict"
    rollouts = [r for same in toy_rollouts(3, seed=5) for r in same[:3]]
    scores = [float(s[0]) for s in scorer.score_rollouts(rollouts) if not isinstance(s, Rejected)]
    plain, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path / "job" / "model").eval(), scorer.renderer.tokenizer
    right, wrong = (tokenizer.get_vocab()[word] for word in "+-")
    first = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    for rollout, score in zip(rollouts, scores, strict=True):
        [group] = rendered(tokenizer, [example(rollout.text, prompt=rollout.prompt)], RenderSettings(judge=ASKED))
        [logit_V], [before_V] = said_by(plain, group), said_by(first, group)
        assert float(logit_V[right] - logit_V[wrong]) == pytest.approx(score, rel=1e-3, abs=1e-3)
        assert abs(float(before_V[right] - before_V[wrong]) - score) > 1e-2  # it has learned something
    import mlflow

    mlflow.set_tracking_uri(registry.tracking_uri())
    rows = [{"prompt": r.prompt[0].content, "answer": r.text} for r in rollouts]
    told = mlflow.pyfunc.load_model("models:/verifier/1").predict(rows)
    np.testing.assert_allclose(told["score"], scores, rtol=1e-5, atol=1e-5)
