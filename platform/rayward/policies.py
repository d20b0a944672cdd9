"""Policies: who continues a prompt. Prompts and step prefixes in, completions out, in the same order.

>>> from rayward.records import Message
>>> policy = make_policy("toy")
>>> [done] = policy([Request(prompt=(Message("user", "largest of 13 27 15 ?"),), kept=("13 and 27 keep 27\\n",), seed=1)])
>>> done.finish_reason, done.steps[-1][:2]
('stop', 'A:')

A policy is a callable, so that a language model behind a server and the toy solver are the same to whoever samples. To add one, add a
maker to POLICIES.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rayward.config import choose, resolve
from rayward.errors import DataError
from rayward.records import Prompt
from rayward.toy_world import ToyWorld


@dataclass(frozen=True)
class Request:
    """Continue this prompt after these steps of the answer. The seed makes the draw one of its own, and repeatable."""

    prompt: Prompt
    kept: tuple[str, ...] = ()
    seed: int = 0


@dataclass(frozen=True)
class Completion:
    """The new steps (without the kept ones), why they ended, and what they cost."""

    steps: tuple[str, ...]
    finish_reason: Literal["stop", "length"]  # length: cut off, so its outcome is unknown
    generated_tokens: int


Policy = Callable[[Sequence[Request]], list[Completion]]


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
                    f"policy=toy answers problems of the toy world only, not {request.prompt[-1].content[:60]!r}", "name a policy"
                )
            steps = self.world.continue_steps(numbers, request.kept, request.seed)
            done.append(Completion(steps, "stop", sum(len(s.split()) for s in steps)))
        return done


def _toy(**settings: Any) -> Policy:
    return ToyPolicy(resolve(ToyWorld, settings))


POLICIES: dict[str, Callable[..., Policy]] = {"toy": _toy}


def make_policy(name: str, settings: Mapping[str, Any] | None = None) -> Policy:
    """The policy of that name with these settings."""
    return choose(POLICIES, name, "policy")(**(settings or {}))
