"""A policy that brings its engine along: vLLM inside Ray Data (`ray.data.llm`), on the GPUs of the machine or cluster it runs on.

    pip install 'rayward[vllm]'      # on machines with GPUs; with it come the vLLM that this Ray was built for, and its torch
    rayward run sample_rollouts --problems problems.jsonl --output store/rollouts --engine local --policy vllm \\
        --policy-settings '{"model": "Qwen/Qwen3-8B", "max_tokens": 2048, "concurrency": 2}'

Ray Data makes the actors of a dataset anew whenever it is executed, so the model is loaded once per call, and a call takes up to TOGETHER
requests. That is right for few large calls. Where decisions wait for answers, in label_steps above all, let the engine stay: start
`vllm serve MODEL` (or Ray Serve's LLM app) and take `--policy server`, which asks on as answers come in. The processor of `ray.data.llm`
for Serve deployments would keep an engine too, but only one that has this very address already.

What is known of Ray 2.60 and shapes the code:

  - Its vLLM stage keeps the first of `n` completions, so every completion is a row of its own, with its own seed.
  - It drops the finish reason. A completion is whole if its last token is one that ends an answer, or if it holds a stop text, which
    is asked for and cut off here; any other was cut short.
  - Its chat template stage may trim the end of kept steps and fails the whole dataset with one prompt; its tokenizer stage puts a second
    BOS in front; its detokenizer stage brings stop texts back. So prompts become tokens here, and the engine writes the text.
  - A row whose prompt is refused is marked, and the others go on. An engine that dies is started again.

The tests run Ray's own processor and engine stage, over a package that stands in for vLLM.

Rows of one prefix stand side by side: the engine's prefix cache then has it once.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rayward import cluster
from rayward.errors import ModelError, SettingsError
from rayward.policies import Completion, Request, batches, written
from rayward.rendering import opened

TOGETHER = 2**14  # requests of one call at the most: every call loads the model
OWN_ENGINE = ("model", "tensor_parallel_size", "max_model_len", "gpu_memory_utilization", "trust_remote_code", "task_type", "seed")
OWN_PROCESSOR = (
    *("model_source", "engine_kwargs", "batch_size", "concurrency", "accelerator_type", "should_continue_on_error", "task_type"),
    *("chat_template_stage", "tokenize_stage", "detokenize_stage", "prepare_multimodal_stage"),
)


@dataclass(frozen=True)
class VllmSettings:
    """Which model, what is drawn, and on how many GPUs."""

    model: str  # folder or name on the hub
    temperature: float = 1.0  # 0: the likeliest token
    top_p: float = 1.0  # share of the likeliest tokens that is drawn from
    max_tokens: int = 1024  # most tokens of a completion
    stop: tuple[str, ...] = ()  # texts that end a completion, left out of it; one that is a token of its own ends it as that token
    max_model_len: int = 0  # most tokens of prompt and completion (0: as the model has it)
    trust_remote_code: bool = False  # run code that comes with the model
    engine_kwargs: Mapping[str, Any] = field(default_factory=dict)  # more of vLLM's engine arguments, e.g. {"quantization": "fp8"}
    concurrency: int = 1  # engines side by side, each with a copy of the model
    tensor_parallel_size: int = 1  # GPUs of an engine
    gpu_memory_utilization: float = 0.9  # share of a GPU's memory that an engine takes
    accelerator_type: str = ""  # kind of GPU in Ray's words, e.g. H100 ("": any)
    batch_size: int = 32  # requests that are handed to an engine at a time
    processor: Mapping[str, Any] = field(default_factory=dict)  # more of vLLMEngineProcessorConfig, e.g. {"max_concurrent_batches": 32}

    def __post_init__(self) -> None:
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"temperature={self.temperature} must be at least 0 and top_p={self.top_p} above 0 and at most 1")
        if min(self.max_tokens, self.concurrency, self.tensor_parallel_size, self.batch_size) < 1:
            raise ValueError("max_tokens, concurrency, tensor_parallel_size and batch_size must be at least 1")
        if self.max_model_len < 0 or not 0 < self.gpu_memory_utilization <= 1:
            raise ValueError(
                f"max_model_len={self.max_model_len} must be at least 0, "
                f"gpu_memory_utilization={self.gpu_memory_utilization} above 0 and at most 1"
            )
        for name, given, own in (("engine_kwargs", self.engine_kwargs, OWN_ENGINE), ("processor", self.processor, OWN_PROCESSOR)):
            if not isinstance(given, Mapping):
                raise ValueError(f"{name}={given!r} is not an object of fields")
            if taken := sorted(set(given) & set(own)):
                raise ValueError(f"{name} has {', '.join(taken)}, which is set by this policy: take its own settings")
        limit = self.processor.get("max_pending_requests")
        if limit is not None and int(limit) < 1:
            raise ValueError(f"processor: max_pending_requests={limit} must be at least 1: Ray 2.60's engine does not start without one")

    def config(self) -> dict[str, Any]:
        """The fields of Ray's vLLMEngineProcessorConfig."""
        engine: dict[str, Any] = {
            "enable_prefix_caching": True,
            "tensor_parallel_size": self.tensor_parallel_size,
            "gpu_memory_utilization": self.gpu_memory_utilization,
            "trust_remote_code": self.trust_remote_code,
            **({"max_model_len": self.max_model_len} if self.max_model_len else {}),
            **self.engine_kwargs,
        }
        return {
            "model_source": self.model,
            "engine_kwargs": engine,
            "batch_size": self.batch_size,
            "concurrency": (self.concurrency, self.concurrency),  # a number alone would be an upper bound
            "accelerator_type": self.accelerator_type or None,
            "should_continue_on_error": True,
            "chat_template_stage": False,
            "tokenize_stage": False,
            "detokenize_stage": False,
            **self.processor,
        }


class VllmPolicy:
    """A model, its tokenizer here, and engines that are started for every call."""

    def __init__(self, settings: VllmSettings):
        if importlib.util.find_spec("vllm") is None:
            raise SettingsError(
                "policy=vllm needs vLLM, which is not installed here",
                "pip install 'rayward[vllm]' on a machine with a GPU; or start vllm serve on one, and take policy=server",
            )
        self.settings, self.capacity = settings, TOGETHER
        self.tokenizer = _tokenizer(settings)
        self.ends = _ends(settings, self.tokenizer)
        as_tokens = {self.tokenizer.decode([token]) for token in self.ends}
        self.stop_texts = tuple(text for text in settings.stop if text not in as_tokens)
        self._config()  # what Ray refuses is said now

    def __call__(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion per request, in order."""
        done = dict(self.stream(requests))
        return [done[place] for place in range(len(requests))]

    def stream(self, requests: Iterable[Request | None]) -> Iterator[tuple[int, Completion]]:
        """(place, completion) as they come out of Ray Data; the model is loaded for every TOGETHER requests, and after every None."""
        for batch in batches(requests, TOGETHER):
            rows, refused = self.rows(batch)
            yield from refused.items()
            if rows:
                yield from self._run(rows)

    def rows(self, batch: Sequence[tuple[int, Request]]) -> tuple[list[dict[str, Any]], dict[int, Completion]]:
        """A row per request, those of one prefix side by side; and the completions of requests that the chat template refuses."""
        from jinja2.exceptions import TemplateError

        groups: dict[tuple[Any, ...], list[tuple[int, Request]]] = {}
        for place, request in batch:
            groups.setdefault((request.prompt, request.kept), []).append((place, request))
        rows: list[dict[str, Any]] = []
        refused: dict[int, Completion] = {}
        for group in groups.values():
            try:
                tokens = opened(self.tokenizer, group[0][1].prompt, group[0][1].kept)
            except (TemplateError, ValueError) as error:
                refused |= {place: Completion((), "error", 0, error=f"chat template refuses: {error}") for place, _ in group}
            else:
                rows += [{"place": p, "tokenized_prompt": tokens, "sampling_params": self.sampling(r.seed)} for p, r in group]
        return rows, refused

    def sampling(self, seed: int) -> dict[str, Any]:
        """vLLM's SamplingParams of one row; all rows have the same names, since they share a column."""
        settings = self.settings
        params: dict[str, Any] = {
            "n": 1,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "max_tokens": settings.max_tokens,
            "seed": seed,
            "stop_token_ids": sorted(self.ends),
        }
        if self.stop_texts:
            params |= {"stop": list(self.stop_texts), "include_stop_str_in_output": True}
        return params

    def completion(self, row: Mapping[str, Any]) -> Completion:
        """What a row of the engine stage says."""
        if row["__inference_error__"]:
            return Completion((), "error", 0, error=str(row["__inference_error__"]))
        text = str(row["generated_text"]).encode(errors="replace").decode()  # half a surrogate pair cannot be stored
        last = int(row["generated_tokens"][-1]) if len(row["generated_tokens"]) else None
        if last in self.ends:
            text = text.removesuffix(self.ends[last])
        found = [at for stop in self.stop_texts if (at := text.find(stop)) >= 0]
        whole = bool(found) or last in self.ends
        new = written(text[: min(found)] if found else text)
        return Completion(new, "stop" if whole else "length", int(row["num_generated_tokens"]), int(row["num_input_tokens"]))

    # --------------------------------------------------------------------------------------------------------- on Ray Data

    def _config(self) -> Any:
        from ray.data.llm import vLLMEngineProcessorConfig

        try:
            return vLLMEngineProcessorConfig(**self.settings.config())
        except ValueError as error:
            raise SettingsError(
                f"processor is refused by Ray: {' '.join(str(error).split())[:300]}",
                "fields of vLLMEngineProcessorConfig belong there, and vLLM's own into engine_kwargs",
            ) from None

    def _run(self, rows: Sequence[dict[str, Any]]) -> Iterator[tuple[int, Completion]]:
        """Load the model, draw, let go of it."""
        import ray.data
        from ray.data.llm import build_processor

        with cluster.connect():
            if ray.get_runtime_context().worker.mode == ray.WORKER_MODE:
                raise SettingsError("policy=vllm spreads its work over Ray itself, and is asked from within a worker", "add --engine local")
            cluster.quiet("ray.data", "ray.llm")
            ray.data.DataContext.get_current().enable_progress_bars = False
            processor = build_processor(self._config(), postprocess=_kept)
            blocks = -(-len(rows) // self.settings.batch_size)
            dataset = processor(ray.data.from_items(list(rows), override_num_blocks=blocks))
            worked, why = False, ""
            try:
                for row in dataset.iter_rows():
                    done = self.completion(row)
                    worked, why = worked or done.finish_reason != "error", done.error or why
                    yield int(row["place"]), done
            except ray.exceptions.RayError as error:
                raise ModelError(f"model={self.settings.model}: the engine failed: {_said(error)}", WAY_OUT) from error
            if not worked and len(rows) > 1:
                raise ModelError(f"model={self.settings.model}: all {len(rows):,} requests failed, the last one with: {why}", WAY_OUT)


WAY_OUT = "RAYWARD_RAY_LOGS=1 shows the engine's own words; the same command goes on where this one stopped"


def _kept(row: dict[str, Any]) -> dict[str, Any]:
    """The columns that are read; a row with an error comes back whole, past this."""
    return {name: row[name] for name in ("place", "generated_text", "generated_tokens", "num_generated_tokens", "num_input_tokens")}


def _tokenizer(settings: VllmSettings) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(settings.model, trust_remote_code=settings.trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(
            f"model={settings.model} has no tokenizer that can be loaded: {why}",
            "give a folder with config.json, model.safetensors and a tokenizer, or a name on the hub",
        ) from None


def _ends(settings: VllmSettings, tokenizer: Any) -> dict[int, str]:
    """Tokens that end an answer, as vLLM takes them from the tokenizer and generation_config.json, with what they are in a text."""
    from transformers import GenerationConfig

    given = [tokenizer.eos_token_id]
    with contextlib.suppress(OSError):  # there is none
        given.append(GenerationConfig.from_pretrained(settings.model).eos_token_id)
    ends = {int(token) for one in given if one is not None for token in (one if isinstance(one, list) else [one])}
    for text in settings.stop:
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(tokens) == 1 and not tokenizer.decode(tokens, skip_special_tokens=True):  # the text that is searched would not show it
            ends.add(int(tokens[0]))
    if not ends:
        raise ModelError(f"model={settings.model} names no token that ends an answer", "put eos_token_id into its generation_config.json")
    return {token: str(tokenizer.decode([token], skip_special_tokens=True)) for token in sorted(ends)}


def _said(error: BaseException) -> str:
    """The last line: above it stands where in Ray it came from."""
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__
