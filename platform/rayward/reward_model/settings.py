"""Which model, and how a score is read from it: the settings `net.*`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rayward import heads
from rayward.attention import Choice
from rayward.config import choose, parse_settings
from rayward.heads import Reading
from rayward.pooling import Pooling

SCALAR = Reading()


@dataclass(frozen=True)
class ModelSettings:
    """Which model, and how a score is read from it."""

    pooling: Pooling = "auto"  # last: at the place; first, mean, max, mean_max: of the sequence; own: the class's way; auto: last if causal
    new_head: bool = False  # put a fresh head on a model that has none (a base model); without it, a missing head is an error
    head: str = "auto"  # scalar, two_class, three_class, attributes, debiased or verdict; auto: the model's own, else by the labels
    head_layers: int = 1  # 2: a hidden layer before the outputs of a new head
    members: int = 0  # heads of a new head, each with weights and a loss of its own, the score being their mean; 0: the model's own, else 1
    head_tokens: str = ""  # a new head starts from (verdict: reads) the language model's rows of these tokens, right first, e.g. "+ -"
    language: bool = False  # keep the language model's output layer too, for --regularise '{"language": 0.1}'
    attribute_weights: str = "{}"  # JSON of attribute -> weight in the score; without any all weigh alike
    overall: Literal["auto", "mean", "linear", "gate"] = "auto"  # how attributes make one score: by attribute_weights, learned weights,
    # or weights learned from the prompt; auto: the model's own way
    verbosity: str = ""  # taken off every attribute before they are one score, until it says nothing of it: an attribute's name, or tokens
    take_off: str = "{}"  # JSON of what to take off by hand instead: '{"tokens": 0.01}', or by attribute '{"tokens": {"helpful": 0.01}}'
    attention: Choice = "auto"  # of packed rows. mask: by masks, which cost the square of a row; segments: on a CPU; varlen: on a
    # GPU in bf16; flex: on a GPU, compiled at first; auto: the first of the last three that runs and says what masks say, else mask
    dropout: bool = False  # keep the model's dropout on while training
    trust_remote_code: bool = False  # run code that comes with the model
    width: int = 64  # hidden size of a model from scratch (--model tiny)
    layers: int = 2  # layers of a model from scratch
    words: int = 8192  # most words in the vocabulary of a model from scratch

    def __post_init__(self) -> None:
        if self.width % 16 or self.width < 16:
            raise ValueError(f"width={self.width} must be a multiple of 16")
        if self.layers < 1:
            raise ValueError(f"layers={self.layers} must be at least 1")
        if self.head != "auto":
            choose(heads.KINDS, self.head, "head")
        if self.head_layers not in (1, 2):
            raise ValueError(f"head_layers={self.head_layers} must be 1 or 2")
        if self.members < 0:
            raise ValueError(f"members={self.members} must be at least 0")
        parse_settings(self.attribute_weights, "attribute_weights", '{"helpful": 2}')
        if len(parse_settings(self.take_off, "take_off", '{"tokens": 0.01}')) > 1:
            raise ValueError(f"take_off={self.take_off} names more than one verbosity")
        if self.verbosity and self.take_off != "{}":
            raise ValueError(f"verbosity={self.verbosity} measures what take_off={self.take_off} says by hand: leave one of them out")
