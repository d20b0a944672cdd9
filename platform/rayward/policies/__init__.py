"""Policies: who continues a prompt. Prompts and step prefixes in, completions out, in the same order.

>>> from rayward.records import Message
>>> policy = make_policy("toy")
>>> [done] = policy([Request(prompt=(Message("user", "largest of 13 27 15 ?"),), kept=("13 and 27 keep 27\\n",), seed=1)])
>>> done.finish_reason, done.steps[-1][:2]
('stop', 'A:')

    toy             the solver of the toy world, whose true values are known                    here
    server          any OpenAI-compatible server: vLLM, SGLang, llama.cpp, OpenAI               server.py
    transformers    a causal language model in this process                                     local.py
    vllm            vLLM inside Ray Data, on the GPUs at hand (extra `vllm`)                    engine.py

A policy is a callable, so that a language model behind a server and the toy solver are the same to whoever samples. To add one, add a
maker to POLICIES, or name your own as module:maker. One that has a method `stream` hands completions over as they are finished;
`capacity` says how many it works on at once.

A draw depends on its request and its seed alone, never on what is asked beside it. Requests that share a prompt should stand side by
side: then an engine's prefix cache has it once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rayward.config import choose, resolve
from rayward.errors import DataError
from rayward.records import Prompt
from rayward.steps import cut
from rayward.toy_world import ToyWorld

HOW = (
    *("api_key_env", "backoff_s", "base_url", "batch_size", "concurrency", "device", "requests_per_minute", "retries", "timeout_s"),
    *("accelerator_type", "gpu_memory_utilization", "processor", "tensor_parallel_size"),
)
"""Settings of any policy that say where and how fast it draws, not what."""


TOGETHER = 256  # requests that a policy without a stream of its own is given at a time


@dataclass(frozen=True)
class Request:
    """Continue this prompt after these steps of the answer. The seed makes the draw one of its own, and repeatable."""

    prompt: Prompt
    kept: tuple[str, ...] = ()
    seed: int = 0


@dataclass(frozen=True)
class Completion:
    """The new steps (without the kept ones), why they ended, and what they cost."""

    steps: tuple[str, ...]  # () where nothing was written: after kept steps the answer ended with them, else there is no answer
    finish_reason: Literal["stop", "length", "error"]  # length: cut off; error: never drawn; in both the outcome is unknown
    generated_tokens: int  # 0 where the engine does not say
    prompt_tokens: int = 0  # tokens of the prompt and the kept steps; 0 where the engine does not say
    error: str = ""  # why there is no completion, where finish_reason is error

    @property
    def text(self) -> str:
        """What was written."""
        return "".join(self.steps)


Policy = Callable[[Sequence[Request]], list[Completion]]


def written(text: str) -> tuple[str, ...]:
    """What a model wrote, cut into steps; nothing but white space is nothing.

    >>> written("Add.\\nA: 4"), written("\\n")
    (('Add.\\n', 'A: 4'), ())
    """
    return cut(text) if text.strip() else ()


def stream(policy: Policy, requests: Iterable[Request | None]) -> Iterator[tuple[int, Completion]]:
    """(place among the requests, completion) as they are finished, in any order; requests are taken as they can be worked on.

    None among the requests says that there is nothing to ask before another completion is handed over; it has a place of its own.

    >>> [place for place, _ in stream(lambda asked: [Completion((), "stop", 0) for _ in asked], [Request(())] * 2)]
    [0, 1]
    """
    own = getattr(policy, "stream", None)
    if own is not None:
        yield from own(requests)
        return
    for batch in batches(requests, TOGETHER):  # a callable hands over nothing before it is through with all it was given
        yield from zip([place for place, _ in batch], policy([request for _, request in batch]), strict=True)


def batches(requests: Iterable[Request | None], most: int) -> Iterator[list[tuple[int, Request]]]:
    """Requests with their places, up to `most` at a time, and no more of them taken than are handed over; None ends a batch.

    >>> [[place for place, _ in batch] for batch in batches([Request(()), None, *[Request(())] * 3], 2)]
    [[0], [2, 3], [4]]
    """
    todo = enumerate(requests)
    more = True
    while more:
        batch: list[tuple[int, Request]] = []
        while len(batch) < most and (more := (item := next(todo, None)) is not None):
            place, request = item
            if request is None:
                break
            batch.append((place, request))
        if batch:
            yield batch


@dataclass(frozen=True)
class ToyPolicy:
    """The solver of the toy world; its tokens are words."""

    world: ToyWorld = ToyWorld()

    def __call__(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion per request."""
        done = []
        for request in requests:
            numbers = self.world.numbers(request.prompt[-1].content)
            if len(numbers) < 2:
                raise DataError(
                    f"policy=toy answers problems like 'largest of 13 27 15 ?', not {request.prompt[-1].content[:60]!r}",
                    "name another policy: server, transformers or vllm",
                )
            steps = self.world.continue_steps(numbers, request.kept, request.seed)
            prompt_tokens = sum(len(text.split()) for text in (request.prompt[-1].content, *request.kept))
            done.append(Completion(steps, "stop", sum(len(s.split()) for s in steps), prompt_tokens))
        return done


def _toy(**settings: Any) -> Policy:
    return ToyPolicy(resolve(ToyWorld, settings))


def _server(**settings: Any) -> Policy:
    from rayward.policies.server import ServerPolicy, ServerSettings

    return ServerPolicy(resolve(ServerSettings, settings))


def _transformers(**settings: Any) -> Policy:
    from rayward.policies.local import LocalPolicy, LocalSettings

    return LocalPolicy(resolve(LocalSettings, settings))


def _vllm(**settings: Any) -> Policy:
    from rayward.policies.engine import VllmPolicy, VllmSettings

    return VllmPolicy(resolve(VllmSettings, settings))


POLICIES: dict[str, Callable[..., Policy]] = {"toy": _toy, "server": _server, "transformers": _transformers, "vllm": _vllm}


def gpus_of(name: str, asked: float = -1.0) -> float:
    """The GPUs that a worker with such a policy holds: as asked; or one, where there are any (-1), if the model is in its process."""
    return asked if asked >= 0 else -1.0 if name == "transformers" else 0.0


def make_policy(name: str, settings: Mapping[str, Any] | None = None) -> Policy:
    """The policy of that name with these settings. Made once per process: a model is loaded here."""
    return choose(POLICIES, name, "policy")(**(settings or {}))


def drawn_by(name: str, settings: Mapping[str, Any]) -> str:
    """Who draws, as a text that is equal where the draws are the same: the settings without those that only say where and how fast.

    >>> drawn_by("server", {"model": "m", "timeout_s": 9, "temperature": 0})
    '{"model": "m", "policy": "server", "temperature": 0}'
    """
    return json.dumps({"policy": name, **{k: v for k, v in settings.items() if k not in HOW}}, sort_keys=True)
