"""Policies: the same interface for a server, a local model and the toy solver; a draw depends on its request and seed alone."""

from __future__ import annotations

import email.utils
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from chat_server import Body, ChatServer, chance
from rayward.errors import ModelError, SettingsError
from rayward.policies import POLICIES, Completion, Request, drawn_by, make_policy, stream
from rayward.policies.local import LocalPolicy, choose
from rayward.policies.server import MANY, ServerPolicy
from rayward.records import Message
from tiny import BODIES, byte_tokenizer, classifier, question

KEY = "sk-secret-0123456789"


def say(body: Body) -> str:
    """What the server says: text that tells the prompt and the seed apart."""
    return f"first\n{body['messages'][0]['content']} with {body['seed']}\nlast"


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with ChatServer(say) as running:
        yield running


def at(server: ChatServer, **settings: Any) -> ServerPolicy:
    usual = {"base_url": server.url, "model": "m", "backoff_s": 0.001, "timeout_s": 20, "concurrency": 4}
    policy = make_policy("server", {**usual, **settings})
    assert isinstance(policy, ServerPolicy)
    return policy


def asked(number: int, prompt: str = "p") -> list[Request]:
    return [Request((Message("user", f"{prompt}{n // 3}"),), (), n) for n in range(number)]


# ---------------------------------------------------------------------------------------------------------------- any policy


def test_toy_and_a_plain_callable_stream_in_order() -> None:
    toy = make_policy("toy")
    requests_ = [Request(question("largest of 13 27 15 ?"), ("13 and 27 keep 27\n",), seed) for seed in range(5)]
    assert dict(stream(toy, iter(requests_))) == dict(enumerate(toy(requests_)))
    assert toy(requests_)[0].prompt_tokens == 11


def test_a_completion_stays_what_samplers_make() -> None:
    assert Completion(("a",), "stop", 3) == Completion(("a",), "stop", 3, prompt_tokens=0, error="")


def test_who_draws_does_not_depend_on_where_and_how_fast() -> None:
    fast = {"model": "m", "concurrency": 99, "base_url": "http://a", "api_key_env": "K", "batch_size": 3, "retries": 1, "timeout_s": 1}
    assert drawn_by("server", fast) == drawn_by("server", {"model": "m"}) != drawn_by("server", {"model": "m", "temperature": 0})


@pytest.mark.parametrize("name", ["server", "transformers"])
def test_unknown_and_missing_settings_are_said(name: str) -> None:
    with pytest.raises(SettingsError, match="did you mean temperature"):
        make_policy(name, {"model": "m", "temprature": 1})
    with pytest.raises(SettingsError, match="missing: model"):
        make_policy(name)
    with pytest.raises(SettingsError, match=r"top_p=2\.0"):
        make_policy(name, {"model": "m", "top_p": 2})


def test_every_policy_is_made_by_name() -> None:
    assert set(POLICIES) == {"toy", "server", "transformers", "vllm"}


# ---------------------------------------------------------------------------------------------------------------- a server


def test_a_completion_has_steps_reason_and_tokens(server: ChatServer) -> None:
    settings = {"temperature": 0.5, "top_p": 0.9, "max_tokens": 7, "stop": ["\n\n"], "extra_body": {"top_k": 5, "max_tokens": None}}
    [done] = at(server, **settings)([Request((Message("system", "Be brief."), Message("user", "p")), (), 12)])
    assert done == Completion(("first\n", "Be brief. with 12\n", "last"), "stop", 6, 3)
    assert server.bodies == [
        {
            "model": "m",
            "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "p"}],
            "temperature": 0.5,
            "top_p": 0.9,
            "seed": 12,
            "stop": ["\n\n"],
            "top_k": 5,
        }
    ]
    assert "Authorization" not in server.headers[0]


def test_kept_steps_are_the_assistants_own_turn_to_be_continued(server: ChatServer) -> None:
    at(server)([Request(question("p"), ("one\n", "two\n"), 1)])
    [body] = server.bodies
    assert body["messages"][-1] == {"role": "assistant", "content": "one\ntwo\n"}
    assert (body["continue_final_message"], body["add_generation_prompt"]) == (True, False)


@pytest.mark.parametrize("concurrency", [1, 3, 16])
def test_completions_come_in_order_whatever_the_concurrency(server: ChatServer, concurrency: int) -> None:
    server.faults = lambda number, body: "slow" if chance(number) < 0.2 else ""
    done = at(server, concurrency=concurrency)(asked(24))
    assert [c.steps[1] for c in done] == [f"p{n // 3} with {n}\n" for n in range(24)]
    assert server.asked == 24


@pytest.mark.parametrize(
    ("choice", "wanted"),
    [
        ({"message": {"content": "a"}, "finish_reason": "length"}, Completion(("a",), "length", 1, 1)),
        ({"message": {"content": ""}, "finish_reason": "stop"}, Completion((), "stop", 0, 1)),
        ({"message": {"content": " \n"}, "finish_reason": "stop"}, Completion((), "stop", 0, 1)),
        ({"message": {"content": None}, "finish_reason": "length"}, Completion((), "length", 0, 1)),
        ({"message": {"content": "a b"}, "finish_reason": None}, Completion(("a b",), "length", 2, 1)),
        ({"message": {"content": "a"}, "finish_reason": None}, Completion(("a",), "stop", 1, 1)),
        ({"message": {"content": "\ud83d"}, "finish_reason": "stop"}, Completion(("?",), "stop", 1, 1)),
        ({"message": {"content": "a"}, "finish_reason": "content_filter"}, Completion((), "error", 1, 1, "ended by content_filter")),
    ],
)
def test_how_a_completion_can_end(choice: Body, wanted: Completion) -> None:
    with ChatServer(lambda body: choice) as server:
        assert at(server, max_tokens=2)([Request(question("p"))]) == [wanted]


PASSING = ["429", "429 bare", "408", "500", "503", "close", "invalid", "empty", "list", "null"]


@pytest.mark.parametrize("fault", PASSING)
def test_what_passes_is_asked_again(server: ChatServer, fault: str) -> None:
    server.faults = [fault, fault]
    [done] = at(server)([Request(question("p"), (), 1)])
    assert done.finish_reason == "stop"
    assert server.asked == 3


def test_a_hanging_request_is_given_up_and_asked_again(server: ChatServer) -> None:
    server.faults = ["hang"]
    [done] = at(server, timeout_s=0.3)([Request(question("p"))])
    assert (done.finish_reason, server.asked) == ("stop", 2)


@pytest.mark.parametrize(
    ("fault", "said"), [("500", "Bad Gateway the engine is gone"), ("empty", "no chat completion"), ("close", "no con")]
)
@pytest.mark.parametrize("retries", [0, 2])
def test_one_request_that_never_works_is_one_error(server: ChatServer, fault: str, said: str, retries: int) -> None:
    server.faults = lambda number, body: fault if body["seed"] == 1 else ""
    done = at(server, retries=retries)(asked(4))
    assert [c.finish_reason for c in done] == ["stop", "error", "stop", "stop"]
    assert said in done[1].error
    assert f"({retries + 1} tries)" in done[1].error
    assert server.asked == 3 + 1 + retries


@pytest.mark.parametrize("fault", ["500", "400"])
def test_a_server_that_refuses_everything_ends_the_run(server: ChatServer, fault: str) -> None:
    server.faults = lambda number, body: fault
    with pytest.raises(ModelError, match="engine is gone" if fault == "500" else "unknown field `sede`"):
        at(server, retries=1, concurrency=1)(asked(50))
    assert server.asked == MANY * (2 if fault == "500" else 1)
    with pytest.raises(ModelError, match="2 of 2 requests failed"):
        at(server, retries=0)(asked(2))


def test_a_prompt_that_is_too_long_is_its_own_fault(server: ChatServer) -> None:
    server.faults = lambda number, body: "400 too long"
    done = at(server)(asked(2 * MANY))
    assert {c.finish_reason for c in done} == {"error"}
    assert "maximum context length is 2048" in done[0].error
    assert server.asked == 2 * MANY


@pytest.mark.parametrize(("fault", "said"), [("404", "does not exist"), ("429 for long", "asks to wait 86,400 s: 429")])
def test_what_no_request_can_mend_ends_the_run(server: ChatServer, fault: str, said: str) -> None:
    server.faults = lambda number, body: fault
    with pytest.raises(ModelError, match=said):
        at(server, concurrency=1)(asked(5))
    assert server.asked == 1


def test_nobody_listens() -> None:
    with ChatServer(say) as server:
        url = server.url
    with pytest.raises(ModelError, match="no connection"):
        make_policy("server", {"base_url": url, "model": "m", "retries": 1, "backoff_s": 0.001})([Request(question("p"))])


def test_what_was_in_the_air_is_handed_over_when_the_run_ends(server: ChatServer) -> None:
    server.faults = lambda number, body: "404" if body["seed"] == 5 else "slow"
    got: list[int] = []
    with pytest.raises(ModelError, match="404"):  # noqa: PT012
        for place, _ in at(server, concurrency=4).stream(asked(40)):
            got.append(place)
    assert len(got) == server.served == server.asked - 1
    assert server.asked < 40


def test_the_rate_limit_spreads_requests(server: ChatServer) -> None:
    began = time.monotonic()
    at(server, requests_per_minute=1200)(asked(7))
    assert time.monotonic() - began >= 6 * 60 / 1200  # a wait is never shorter than it is asked for


@pytest.mark.parametrize(
    ("header", "least", "most"),
    [("7", 7, 7), ("0", 0, 0), ("1.5", 1.5, 1.5), ("soon", None, None), ("", None, None), ("date", 50, 60), ("past", 0, 0)],
)
def test_retry_after_is_a_number_or_a_date(server: ChatServer, header: str, least: float | None, most: float | None) -> None:
    answer = requests.Response()
    moment = {"date": 60, "past": -60}.get(header)
    answer.headers["Retry-After"] = header if moment is None else email.utils.formatdate(time.time() + moment, usegmt=True)
    wait_s = at(server)._retry_after(answer)
    assert wait_s is None if least is None or most is None else wait_s is not None and least <= wait_s <= most


# ----------------------------------------------------------------------------------------------------------------- the key


def test_the_key_is_sent_and_never_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login someone password else\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("MY_KEY", KEY + "\n")
    with ChatServer(say, key=KEY) as server:
        policy = at(server, api_key_env="MY_KEY")
        assert policy([Request(question("p"))])[0].finish_reason == "stop"
        server.faults = ["", "echo key"]
        with pytest.raises(ModelError) as caught:
            policy([Request(question("p"))])
        assert "may not use this model" in str(caught.value)
        assert "MY_KEY" in str(caught.value)
        assert KEY not in str(caught.value) + repr(policy.settings)
        monkeypatch.setenv("MY_KEY", "sk-wrong")
        with pytest.raises(ModelError, match=r"401 Unauthorized: Incorrect API key provided: \[key\]"):
            at(server, api_key_env="MY_KEY")([Request(question("p"))])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"api_key_env": KEY}, "api_key_env is not the name of an environment variable"),
        ({"base_url": f"https://me:{KEY}@host/v1"}, "base_url is not"),
        ({"api_key": KEY}, "api_key is not a setting"),
    ],
)
def test_a_key_among_the_settings_is_refused_without_saying_it(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError) as caught:
        make_policy("server", {"model": "m", **settings})
    assert said in str(caught.value)
    assert KEY not in str(caught.value)


def test_a_missing_key_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_KEY", raising=False)
    with pytest.raises(ModelError, match="NO_KEY holds no key"):
        make_policy("server", {"model": "m", "api_key_env": "NO_KEY"})


# ------------------------------------------------------------------------------------------------------------- a local model


def causal(kind: str, folder: Path, chat: bool = True, **changes: Any) -> Path:
    """A random causal model with weights large enough that every token tells, and its tokenizer, saved."""
    tokenizer = byte_tokenizer() if chat else byte_tokenizer(None)
    config = AutoConfig.for_model(kind, vocab_size=len(tokenizer), **{**BODIES[kind], "eos_token_id": tokenizer.eos_token_id, **changes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim >= 2:
                nn.init.normal_(weight, std=0.25)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    made: dict[str, Path] = {}

    def of(kind: str, **changes: Any) -> Path:
        name = kind + json.dumps(changes)
        if name not in made:
            made[name] = causal(kind, tmp_path_factory.mktemp(kind), **changes)
        return made[name]

    return of


def local(path: Path, **settings: Any) -> LocalPolicy:
    policy = make_policy("transformers", {"model": str(path), "max_new_tokens": 12, "dtype": "float32", **settings})
    assert isinstance(policy, LocalPolicy)
    return policy


def mixed(number: int) -> list[Request]:
    """Prompts and kept steps of different lengths, some of them shared."""
    prompts = ["What is 12 plus 30?", "Hi", "The quick brown fox jumps over the lazy dog! Is it so?"]
    kept: list[tuple[str, ...]] = [(), ("First we add the tens.\n",), ()]
    return [Request(question(prompts[n % 3]), kept[n // 2 % 3], 1000 + n) for n in range(number)]


@pytest.mark.parametrize("kind", ["qwen3", "llama", "mistral", "gemma2", "gpt_neox", "gpt2", "bloom"])
def test_greedy_draws_are_those_of_transformers(folder: Callable[..., Path], kind: str) -> None:
    policy = local(folder(kind), temperature=0, batch_size=4)
    for request, done in zip(mixed(6), policy(mixed(6)), strict=True):
        ids = torch.tensor([policy.render(request)])
        options = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0}
        out = policy.model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, ids.shape[1] :].tolist()
        assert done.generated_tokens == len(out)
        assert done.prompt_tokens == ids.shape[1]
        assert done.finish_reason == ("stop" if out[-1] in policy.stops else "length")
        before, whole = (policy.tokenizer.decode(t, skip_special_tokens=True) for t in (ids[0].tolist(), ids[0].tolist() + out))
        assert before + done.text == whole or (done.text == "" and whole[len(before) :].isspace())


@pytest.mark.parametrize("kind", ["qwen3", "mistral", "gemma2", "gpt2"])
@pytest.mark.parametrize("how", [{"temperature": 0}, {"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.8}], ids=str)
def test_a_draw_does_not_depend_on_its_batch(folder: Callable[..., Path], kind: str, how: dict[str, float]) -> None:
    alone = local(folder(kind), batch_size=1, **how)(mixed(11))
    assert local(folder(kind), batch_size=5, **how)(mixed(11)) == alone
    backwards = local(folder(kind), batch_size=16, **how)(mixed(11)[::-1])
    assert backwards[::-1] == alone
    assert len({c.text for c in alone}) > (3 if how["temperature"] else 1)


def test_the_seed_makes_the_draw(folder: Callable[..., Path]) -> None:
    policy = local(folder("qwen3"))
    draws = policy([Request(question(), (), seed) for seed in (1, 2, 1, 2**63 - 1)])
    assert draws[0] == draws[2]
    assert len({d.text for d in draws}) == 3


def test_draws_follow_the_models_probabilities() -> None:
    share = torch.tensor([[0.5, 0.2, 0.2, 0.1]])
    chance_B = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    for temperature, top_p, wanted in [
        (1.0, 1.0, [0.5, 0.2, 0.2, 0.1]),
        (0.5, 1.0, [25 / 34, 4 / 34, 4 / 34, 1 / 34]),
        (1.0, 0.5, [1.0, 0, 0, 0]),
        (1.0, 0.6, [5 / 9, 2 / 9, 2 / 9, 0]),  # equally likely: both are in
        (1.0, 0.95, [0.5, 0.2, 0.2, 0.1]),
        (0.0, 0.1, [1.0, 0, 0, 0]),
    ]:
        token_B = choose(share.log().expand(1000, 4), chance_B, temperature, top_p)
        assert token_B.bincount(minlength=4).div(1000).tolist() == pytest.approx(wanted, abs=2e-3)


def test_kept_steps_are_continued_as_the_chat_template_would(folder: Callable[..., Path]) -> None:
    policy = local(folder("qwen3"))
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "First.\nThen"}]
    wanted = policy.tokenizer.apply_chat_template(turns, continue_final_message=True, tokenize=False)
    ids = policy.render(Request(question("Hi"), ("First.\n", "Then")))
    assert policy.tokenizer.decode(ids) == wanted
    assert ids.count(policy.tokenizer.bos_token_id) == 1


def test_without_a_chat_template_the_prompt_is_plain(folder: Callable[..., Path]) -> None:
    policy = local(folder("gpt2", chat=False))
    ids = policy.render(Request(question("Hi"), ("So",)))
    assert policy.tokenizer.decode(ids) == "<s>Human: Hi\n\nAssistant: So"
    assert policy([Request(question("Hi"))])[0].generated_tokens > 0


class Fixed(LocalPolicy):
    """A policy whose model says given tokens, whatever it reads."""

    def says(self, text: str) -> Fixed:
        tokens = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        self.script = torch.full((len(tokens), len(self.tokenizer)), -1e9)
        self.script[torch.arange(len(tokens)), tokens] = 0.0
        return self

    def _forward(self, token_BT: Any, mask_BT: Any, cache: Any) -> Any:
        cache, logit_BV = super()._forward(token_BT, mask_BT, cache)
        self.at = 0 if token_BT.shape[1] > 1 else self.at + 1
        return cache, self.script[min(self.at, len(self.script) - 1)].expand_as(logit_BV)


@pytest.mark.parametrize(
    ("says", "stop", "wanted"),
    [
        ("So it is.\nYes</s>more", (), Completion(("So it is.\n", "Yes"), "stop", 0)),
        ("</s>", (), Completion((), "stop", 1)),
        ("\n\n</s>", (), Completion((), "stop", 0)),
        ("So it is. Then more and more", ("Then",), Completion(("So it is. ",), "stop", 0)),
        ("So it is. Then more and more", ("never", "it is", "So"), Completion((), "stop", 0)),
        ("So it is<|im_end|> more", ("<|im_end|>",), Completion(("So it is",), "stop", 0)),
        ("x" * 60, (), Completion(("x" * 20,), "length", 20)),
    ],
)
def test_where_an_answer_ends(folder: Callable[..., Path], says: str, stop: tuple[str, ...], wanted: Completion) -> None:
    made = local(folder("qwen3"), max_new_tokens=20, stop=list(stop))
    policy = Fixed(made.settings).says(says)
    for done in policy([Request(question("Hi")), Request(question("Hello"), ("So",))]):
        assert (done.steps, done.finish_reason) == (wanted.steps, wanted.finish_reason)
        assert done.generated_tokens == (wanted.generated_tokens or done.generated_tokens) > 0


def test_a_prompt_that_leaves_no_room_is_one_error_and_a_window_cuts(folder: Callable[..., Path]) -> None:
    policy = local(folder("qwen3", max_position_embeddings=64), max_new_tokens=60, batch_size=4)
    done = policy([Request(question("Hi")), Request(question("x " * 200)), Request(question("Hi there, so it is"))])
    assert [c.finish_reason for c in done] == ["length", "error", "length"]
    assert "too long" in done[1].error
    assert [c.generated_tokens + c.prompt_tokens for c in (done[0], done[2])] == [64, 64]


def test_models_that_do_not_write_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be loaded"):
        make_policy("transformers", {"model": str(tmp_path / "nothing")})
    tokenizer = byte_tokenizer()
    classifier("qwen3", vocabulary=len(tokenizer)).save_pretrained(tmp_path)  # type: ignore[operator]
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"lacks weights for lm_head\.weight"):
        make_policy("transformers", {"model": str(tmp_path)})
