"""Train, validation and test by hash of the prompt, so that no prompt is on two sides, today or when more data comes.

>>> side("1c0fd9bd", Shares()) == side("1c0fd9bd", Shares())
True
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

SIDES = ("train", "validation", "test")


@dataclass(frozen=True)
class Shares:
    """What share of the prompts each side gets; the rest trains."""

    validation: float = 0.05  # share of prompts
    test: float = 0.2  # share of prompts
    salt: str = ""  # another salt is another split

    def __post_init__(self) -> None:
        if not (self.validation >= 0 and self.test >= 0 and self.validation + self.test < 1):
            raise ValueError(f"validation={self.validation} and test={self.test} must be at least 0 and leave something to train on")


def side(prompt_id: str, shares: Shares) -> str:
    """The side of a prompt: a hash of its own, so that it is independent of the order and the parts a dataset lies in."""
    draw = int.from_bytes(hashlib.blake2b(f"{shares.salt}|{prompt_id}".encode(), digest_size=8).digest(), "big") / 2**64
    if draw < shares.test:
        return "test"
    return "validation" if draw < shares.test + shares.validation else "train"
