"""The policy `vllm`: Ray's own processor and engine stage over a package that stands in for vLLM, since none is here.

Real: the settings, the rows, Ray Data, `vLLMEngineProcessorConfig`, `build_processor`, and Ray's engine stage with all it does to a row.
Stood in for: the package `vllm` that the stage imports, by an engine that says what it was asked, by the same names.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from driving import rayward
from rayward.errors import ModelError, SettingsError
from rayward.policies import Completion, Request, drawn_by, make_policy
from rayward.policies import engine as vllm_policy
from rayward.policies.engine import VllmPolicy, VllmSettings
from rayward.records import Message
from rayward.rendering import opened
from tiny import byte_tokenizer, question

STAND_IN = """
import json, os, sys, types
from dataclasses import dataclass, field

def module(name, **names):
    made = types.ModuleType(name)
    made.__dict__.update(names)
    made.__path__ = []
    sys.modules[name] = made
    parent, _, last = name.rpartition(".")
    setattr(sys.modules[parent], last, made)

def note(**what):
    with open(os.environ["STAND_IN_LOG"], "a") as file:
        file.write(json.dumps(what) + "\\n")

@dataclass
class Said:
    text: str
    token_ids: list
    finish_reason: str
    logprobs: object = None

@dataclass
class RequestOutput:
    prompt_token_ids: list
    outputs: list
    prompt: object = None
    finished: bool = True
    metrics: object = None
    prompt_logprobs: object = None

class PoolingRequestOutput: ...
class EngineDeadError(Exception): ...

@dataclass
class SamplingParams:
    n: int
    temperature: float
    top_p: float
    max_tokens: int
    seed: int
    stop_token_ids: list
    stop: list = field(default_factory=list)
    include_stop_str_in_output: bool = False
    structured_outputs: object = None

class AsyncEngineArgs:
    def __init__(self, **given):
        self.given = given
    def create_engine_config(self):
        if self.given["model"].endswith("broken"):
            raise ValueError("No available memory for the cache blocks")
        return types.SimpleNamespace(
            scheduler_config=types.SimpleNamespace(max_num_seqs=64), parallel_config=types.SimpleNamespace(pipeline_parallel_size=1)
        )

class AsyncLLMEngine:
    def __init__(self, args):
        from transformers import AutoTokenizer
        self.tokenizer = AutoTokenizer.from_pretrained(args.given["model"])
        note(made=os.getpid(), given={k: v for k, v in args.given.items() if isinstance(v, (str, int, float, bool))})
    @classmethod
    def from_engine_args(cls, args, stat_loggers=None):
        return cls(args)
    async def generate(self, request_id, prompt, sampling_params, lora_request=None):
        ids, params = prompt["prompt_token_ids"], sampling_params
        read = self.tokenizer.decode(ids)
        note(read=read, seed=params.seed)
        if "refuse" in read:
            raise ValueError(f"The decoder prompt (length {len(ids)}) is longer than the maximum model length of 8")
        text, end = f"one {params.seed}\\nA: 4", [params.stop_token_ids[-1]]
        if "nothing" in read:
            text = ""
        if "STOP" in params.stop and "halt" in read:
            text, end = text + "STOP" * params.include_stop_str_in_output, []
        tokens = self.tokenizer(text, add_special_tokens=False)["input_ids"] + end
        if "long" in read:
            tokens = (tokens * 9)[: params.max_tokens]
            tokens = [t for t in tokens if t not in params.stop_token_ids][: params.max_tokens]
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        yield RequestOutput(ids, [Said(text, tokens, "stop")])
    async def do_log_stats(self): ...
    def shutdown(self): ...

here = sys.modules[__name__]
module("vllm.outputs", RequestOutput=RequestOutput, PoolingRequestOutput=PoolingRequestOutput)
module("vllm.inputs", TokensPrompt=dict, TextPrompt=dict)
module("vllm.v1")
module("vllm.v1.engine")
module("vllm.v1.engine.exceptions", EngineDeadError=EngineDeadError)
module("vllm.v1.metrics")
module("vllm.v1.metrics.ray_wrappers", RayPrometheusStatLogger=object)
"""

TRIMMING = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content | trim }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

COLUMNS = {"place": 0, "generated_text": "", "generated_tokens": [], "num_generated_tokens": 0, "num_input_tokens": 5}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer that has a chat template and puts BOS before a text."""
    folder = tmp_path_factory.mktemp("model")
    byte_tokenizer(eos_token="<|im_end|>").save_pretrained(folder)
    return folder


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Settings with which Ray's engine stage finds the stand-in, and takes a CPU for it."""
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text(STAND_IN, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    seen = {"PYTHONPATH": str(tmp_path), "STAND_IN_LOG": str(tmp_path / "log.jsonl"), "HF_HUB_OFFLINE": "1"}
    return {"placement_group_config": {"bundles": [{"CPU": 1}]}, "runtime_env": {"env_vars": seen}}


def made(model: Path, processor: dict[str, Any], **settings: Any) -> VllmPolicy:
    policy = make_policy("vllm", {"model": str(model), "processor": processor, "batch_size": 4, **settings})
    assert isinstance(policy, VllmPolicy)
    return policy


def notes(processor: dict[str, Any], name: str) -> list[dict[str, Any]]:
    lines = Path(processor["runtime_env"]["env_vars"]["STAND_IN_LOG"]).read_text(encoding="utf-8").splitlines()
    return [line for line in map(json.loads, lines) if name in line]


# --------------------------------------------------------------------------------------------------------------- before vLLM


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is here")
def test_without_vllm_the_way_out_is_said(model: Path) -> None:
    with pytest.raises(SettingsError, match=r"(?s)vLLM, which is not installed here.*pip install 'rayward\[vllm\]'.*policy=server"):
        make_policy("vllm", {"model": str(model)})


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is here")
def test_a_run_without_vllm_writes_nothing(tmp_path: Path) -> None:
    given = ("--policy", "vllm", "--policy-settings", '{"model": "m"}', "--engine", "local")
    said = rayward("run", "sample_rollouts", "--problems", "toy:2", "--output", str(tmp_path / "store" / "rollouts"), *given, cwd=tmp_path)
    assert said.code == 2
    assert "rayward[vllm]" in said.err
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "missing: model"),
        ({"temprature": 1}, "did you mean temperature"),
        ({"top_p": 2}, r"top_p=2\.0"),
        ({"concurrency": 0}, "at least 1"),
        ({"gpu_memory_utilization": 1.5}, r"gpu_memory_utilization=1\.5"),
        ({"engine_kwargs": {"max_model_len": 9}}, "engine_kwargs has max_model_len"),
        ({"processor": {"should_continue_on_error": False}}, "processor has should_continue_on_error"),
        ({"processor": {"max_pending_requests": 0}}, "max_pending_requests=0"),
        ({"processor": {"max_pending_requests": -1}}, "max_pending_requests=-1"),
    ],
)
def test_wrong_settings_are_said(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        make_policy("vllm", {**({"model": "m"} if settings else {}), **settings})


def test_who_draws_does_not_depend_on_the_machine() -> None:
    fast = {"concurrency": 4, "tensor_parallel_size": 8, "gpu_memory_utilization": 0.5, "accelerator_type": "H100", "batch_size": 99}
    assert drawn_by("vllm", {"model": "m", **fast, "processor": {"max_concurrent_batches": 32}}) == drawn_by("vllm", {"model": "m"})
    assert drawn_by("vllm", {"model": "m", "engine_kwargs": {"quantization": "fp8"}}) != drawn_by("vllm", {"model": "m"})


def test_the_installed_ray_takes_the_config_as_it_is_meant() -> None:
    from ray.data.llm import vLLMEngineProcessorConfig

    settings = VllmSettings("m", tensor_parallel_size=2, concurrency=3, max_model_len=4096, engine_kwargs={"quantization": "fp8"})
    config = vLLMEngineProcessorConfig(**settings.config())
    assert config.get_concurrency() == {"min_size": 3, "max_size": 3}
    assert config.should_continue_on_error
    assert (config.chat_template_stage, config.tokenize_stage, config.detokenize_stage) == (False, False, False)
    assert config.engine_kwargs == {
        "enable_prefix_caching": True,
        "tensor_parallel_size": 2,
        "gpu_memory_utilization": 0.9,
        "trust_remote_code": False,
        "max_model_len": 4096,
        "quantization": "fp8",
        "task_type": "generate",
    }


def test_what_ray_refuses_is_said_when_the_policy_is_made(model: Path, stand_in: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=r"processor is refused by Ray: .*max_batches Extra inputs are not permitted"):
        made(model, {**stand_in, "max_batches": 3})


# ------------------------------------------------------------------------------------------------------------ rows in and out


def test_a_row_per_completion_with_its_seed_and_prefixes_side_by_side(model: Path, stand_in: dict[str, Any]) -> None:
    policy = made(model, stand_in)
    asked = [Request(question(f"p{n % 3}"), ("kept.\n\n",) * (n % 2), 100 + n) for n in range(12)]
    rows, refused = policy.rows(list(enumerate(asked)))
    assert refused == {}
    assert sorted(row["place"] for row in rows) == list(range(12))
    assert all(row["sampling_params"]["n"] == 1 and row["sampling_params"]["seed"] == 100 + row["place"] for row in rows)
    prefixes = [tuple(row["tokenized_prompt"]) for row in rows]
    changes = sum(a != b for a, b in itertools.pairwise(prefixes))
    assert changes == len(set(prefixes)) - 1 == 5


def test_kept_steps_continue_the_answer_with_the_separator_at_their_end_and_one_bos(model: Path, stand_in: dict[str, Any]) -> None:
    tokenizer = made(model, stand_in).tokenizer
    opening, going_on = (opened(tokenizer, question("p"), kept) for kept in ((), ("One.\n\n", "Two.\n\n")))
    text = tokenizer.decode(going_on)
    assert text == tokenizer.decode(opening) + "One.\n\nTwo.\n\n"
    assert text.count("<s>") == 1  # the template's; the tokenizer by itself puts another in front
    assert tokenizer.decode(tokenizer(text)["input_ids"]).count("<s>") == 2
    assert going_on[: len(opening)] == opening


def test_a_template_that_trims_leaves_kept_steps_whole(model: Path, stand_in: dict[str, Any]) -> None:
    tokenizer = made(model, stand_in).tokenizer
    tokenizer.chat_template = TRIMMING
    kept = [{"role": "user", "content": "p"}, {"role": "assistant", "content": "One.\n\n"}]
    rays = tokenizer.apply_chat_template(kept, tokenize=False, add_generation_prompt=False, continue_final_message=True)
    assert rays.endswith("assistant\nOne.")  # as Ray's chat template stage calls it: the separator is lost, and with it its token
    assert tokenizer.decode(opened(tokenizer, question("p"), ("One.\n\n",))).endswith("assistant\nOne.\n\n")


def test_the_models_own_ends_are_those_of_vllm(model: Path, stand_in: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "ends"
    shutil.copytree(model, folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": [4, 0]}', encoding="utf-8")
    assert set(made(folder, stand_in).ends) == {4, 0}
    assert made(model, stand_in).sampling(1)["stop_token_ids"] == [4]


def test_a_prompt_that_the_chat_template_refuses_is_one_error(model: Path, stand_in: dict[str, Any]) -> None:
    policy = made(model, stand_in)
    policy.tokenizer.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}hm"
    system = (Message("system", "s"), Message("user", "u"))
    rows, refused = policy.rows([(0, Request(question("p"))), (1, Request(system)), (2, Request(question("p")))])
    assert [row["place"] for row in rows] == [0, 2]
    assert refused == {1: Completion((), "error", 0, error="chat template refuses: no system")}


def test_how_a_row_can_end(model: Path, stand_in: dict[str, Any]) -> None:
    policy = made(model, stand_in, stop=["STOP", "</s>"], max_tokens=3)
    [end, other] = [policy.tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "</s>")]
    table: list[tuple[dict[str, Any], Completion]] = [
        ({"generated_text": "a\nb", "generated_tokens": [7, 8, end]}, Completion(("a\n", "b"), "stop", 3, 5)),  # whole in the last token
        ({"generated_text": "a", "generated_tokens": [7, other]}, Completion(("a",), "stop", 2, 5)),
        ({"generated_text": "a", "generated_tokens": [7, 8, 9]}, Completion(("a",), "length", 3, 5)),  # max_tokens
        ({"generated_text": "a", "generated_tokens": [7, 8]}, Completion(("a",), "length", 2, 5)),  # the model's window
        ({"generated_text": "aSTOP", "generated_tokens": [7, 8, 9]}, Completion(("a",), "stop", 3, 5)),
        ({"generated_text": "", "generated_tokens": [end]}, Completion((), "stop", 1, 5)),
        ({"generated_text": " \n", "generated_tokens": [7, end]}, Completion((), "stop", 2, 5)),
        ({"generated_text": "a\ud83d", "generated_tokens": [7, end]}, Completion(("a?",), "stop", 2, 5)),
    ]
    for row, wanted in table:
        whole = {**COLUMNS, **row, "num_generated_tokens": len(row["generated_tokens"]), "__inference_error__": ""}
        assert policy.completion(whole) == wanted
    assert policy.completion({"place": 0, "__inference_error__": "ValueError: too long"}) == Completion(
        (), "error", 0, error="ValueError: too long"
    )
    assert policy.sampling(7)["stop_token_ids"] == sorted([end, other])
    assert (policy.sampling(7)["stop"], policy.sampling(7)["include_stop_str_in_output"]) == (["STOP"], True)


def test_the_columns_are_those_of_the_installed_rays_stage() -> None:
    from ray.llm._internal.batch.stages.vllm_engine_stage import vLLMOutputData

    names = set(vLLMOutputData.model_fields)
    assert set(COLUMNS) - {"place"} <= names
    assert "finish_reason" not in names  # once it is there it should be read, and the rule of the last token go


# ---------------------------------------------------------------------------------------------------------- through Ray Data


def test_every_way_to_end_comes_back_through_rays_own_stage(ray_cluster: Any, model: Path, stand_in: dict[str, Any]) -> None:
    words = ["add", "refuse", "nothing", "long", "halt", "add", "add", "halt", "refuse", "long", "nothing", "add"]
    asked = [Request(question(word), ("kept.\n\n",) * (n > 5), 2**62 + n) for n, word in enumerate(words)]
    policy = made(model, stand_in, stop=["STOP"], max_tokens=6)
    done = policy(asked)
    ends = {"add": "stop", "refuse": "error", "nothing": "stop", "long": "length", "halt": "stop"}
    assert [c.finish_reason for c in done] == [ends[word] for word in words]
    for request, word, completion in zip(asked, words, done, strict=True):
        if word in ("add", "halt"):
            assert completion.text == f"one {request.seed}\nA: 4"  # 63 bits of the seed, and no stop text
        if word == "refuse":
            assert "ValueError" in completion.error
            assert "longer than the maximum model length" in completion.error
        else:
            assert completion.prompt_tokens == len(opened(policy.tokenizer, request.prompt, request.kept))
    assert [c.generated_tokens for c, word in zip(done, words, strict=True) if word in ("nothing", "long")] == [1, 6, 6, 1]
    read = [note["read"] for note in notes(stand_in, "read")]
    assert len(read) == len(words)
    assert {text.endswith("kept.\n\n") for text in read} == {True, False}
    assert {text.count("<s>") for text in read} == {1}


@pytest.mark.slow
def test_every_call_loads_the_model_once_and_draws_the_same(ray_cluster: Any, model: Path, stand_in: dict[str, Any]) -> None:
    policy = made(model, stand_in, concurrency=1)
    asked = [Request(question(f"p{n // 2}"), (), n) for n in range(6)]
    first = policy(asked)
    assert len(notes(stand_in, "made")) == 1
    assert dict(policy.stream([*asked[:3], None, *asked[3:]])) == {n + (n > 2): c for n, c in enumerate(first)}
    assert len(notes(stand_in, "made")) == 3
    [given, *_] = [note["given"] for note in notes(stand_in, "made")]
    assert given["enable_prefix_caching"] is True


def test_where_all_requests_fail_the_run_ends(ray_cluster: Any, model: Path, stand_in: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=r"all 3 requests failed.*longer than the maximum"):
        made(model, stand_in)([Request(question("refuse"), (), n) for n in range(3)])


def test_a_model_that_does_not_load_is_said(ray_cluster: Any, model: Path, stand_in: dict[str, Any], tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.symlink_to(model)
    with pytest.raises(ModelError, match=r"the engine failed: .*No available memory"):
        made(broken, stand_in)([Request(question("add"))])


def test_it_is_not_asked_from_within_a_worker(ray_cluster: Any, model: Path, stand_in: dict[str, Any]) -> None:
    def ask(folder: str) -> str:
        from rayward.errors import SettingsError
        from rayward.policies import Request, make_policy
        from rayward.records import Message

        try:
            make_policy("vllm", {"model": folder})([Request((Message("user", "add"),))])
        except SettingsError as error:
            return str(error)
        return ""

    asking = ray_cluster.remote(ask).options(runtime_env=stand_in["runtime_env"])
    assert "--engine local" in ray_cluster.get(asking.remote(str(model)))


def test_nothing_is_asked_where_nothing_is_to_be_asked(model: Path, stand_in: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_policy, "TOGETHER", 1)
    assert made(model, stand_in)([]) == []
    assert list(made(model, stand_in).stream([None, None])) == []
