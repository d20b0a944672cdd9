"""A world small enough to know the truth of: the running maximum.

A problem is a list of numbers; an answer keeps the larger of the value so far and the next number, step by step:

    largest of 13 27 15 ?      13 and 27 keep 27
                               so 27 and 15 keep 27
                               A: 27

The solver is a stochastic policy. In a step it slips with a known chance: it writes another number of the problem. It can catch a
slip by re-reading with a known chance, and a larger number later repairs one by itself. So the chance that a step prefix ends right
(`value`) has a closed form, and labels, objectives and models can be held against the truth. Filler words come and go at random for
a whole answer, so the length of an answer says nothing about it.

>>> world = ToyWorld(slip=0.0)
>>> numbers = world.problem(0)
>>> steps = world.continue_steps(numbers, (), seed=0)
>>> steps[-1] == f"A: {max(numbers)}" and world.value(numbers, steps[:1])
1.0

Chained arithmetic was tried as the world before this and is not learned by small decoders in minutes; this is, in seconds.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

_STEP = re.compile(r"(\d+) and (\d+) keep (\d+)")
_FILLERS = ("so ", "then ", "well ", "now ", "next ")


def seed_of(*parts: object) -> int:
    """A 63-bit seed by hash: the same parts give the same seed on every machine, in every order of work.

    >>> seed_of("problem", 3) == seed_of("problem", 3) != seed_of("problem", 4)
    True
    """
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1


@dataclass(frozen=True)
class ToyWorld:
    """The running maximum and its solver."""

    slip: float = 0.12  # chance that a step writes another number of the problem
    repair: float = 0.0  # chance that a step without a slip also makes good an earlier slip
    least: int = 4  # numbers in the shortest problem
    most: int = 7  # numbers in the longest problem
    largest: int = 39  # numbers are 10 .. largest: two digits each, or a right answer, which holds larger ones, would be longer

    def __post_init__(self) -> None:
        if not (0 <= self.slip <= 1 and 0 <= self.repair <= 1):
            raise ValueError(f"slip={self.slip} and repair={self.repair} are chances, between 0 and 1")
        if not 2 <= self.least <= self.most <= self.largest - 9:
            raise ValueError(f"least={self.least}, most={self.most}, largest={self.largest}: there are no such problems")

    def problem(self, index: int, seed: int = 0) -> tuple[int, ...]:
        """The numbers of problem `index`, all different."""
        rng = random.Random(seed_of("toy problem", seed, index))
        return tuple(rng.sample(range(10, self.largest + 1), rng.randint(self.least, self.most)))

    @staticmethod
    def question(numbers: Sequence[int]) -> str:
        """The problem in words.

        >>> ToyWorld.question((13, 27, 15)), ToyWorld.numbers("largest of 13 27 15 ?")
        ('largest of 13 27 15 ?', (13, 27, 15))
        """
        return f"largest of {' '.join(map(str, numbers))} ?"

    @staticmethod
    def numbers(question: str) -> tuple[int, ...]:
        """The problem's numbers from its words."""
        return tuple(map(int, re.findall(r"\d+", question)))

    def continue_steps(self, numbers: Sequence[int], kept: Sequence[str], seed: int) -> tuple[str, ...]:
        """Sample the steps that follow the kept ones, up to the answer; empty if the answer is already there."""
        rng = random.Random(seed_of("toy answer", seed))
        if kept and kept[-1].startswith("A:"):
            return ()
        value = _written(kept[-1]) if kept else numbers[0]
        wordy = rng.random() < 0.5
        new: list[str] = []
        for n in range(len(kept) + 1, len(numbers)):
            right = max(value, numbers[n])
            if rng.random() < self.slip:
                kept_value = rng.choice([y for y in numbers if y != right])
            elif rng.random() < self.repair:
                kept_value = max(numbers[: n + 1])
            else:
                kept_value = right
            filler = rng.choice(_FILLERS) if wordy and rng.random() < 0.7 else ""
            new.append(f"{filler}{value} and {numbers[n]} keep {kept_value}\n")
            value = kept_value
        return (*new, f"A: {value}")

    def value(self, numbers: Sequence[int], kept: Sequence[str]) -> float:
        """P(the final answer is right | the kept steps), in closed form: a chain over the value written last, summed backwards."""
        best = max(numbers)
        ends_right = {v: float(v == best) for v in numbers}  # chance to end right with v written after the last number
        if kept and kept[-1].startswith("A:"):
            return float(int(kept[-1][2:]) == best)
        for n in range(len(numbers) - 1, len(kept), -1):
            before: dict[int, float] = {}
            for v in numbers:
                right = max(v, numbers[n])
                slipped = [ends_right[y] for y in numbers if y != right]
                caught = ends_right[max(numbers[: n + 1])]
                before[v] = self.slip * sum(slipped) / len(slipped) + (1 - self.slip) * (
                    self.repair * caught + (1 - self.repair) * ends_right[right]
                )
            ends_right = before
        return ends_right[_written(kept[-1]) if kept else numbers[0]]

    @staticmethod
    def first_slip(numbers: Sequence[int], steps: Sequence[str]) -> int:
        """Index of the first step that does not keep the larger of its two numbers, or -1."""
        for n, step in enumerate(steps):
            match = _STEP.search(step)
            if match and int(match[3]) != max(int(match[1]), int(match[2])):
                return n
        return -1


def _written(step: str) -> int:
    match = _STEP.search(step)
    if match is None:
        raise ValueError(f"not a step of the toy world: {step!r}")
    return int(match[3])
