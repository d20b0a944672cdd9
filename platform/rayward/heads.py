"""Heads: what a model says at a place, and how it becomes one score.

    output_GKC  float32   what the head says at every place, C outputs
    score_GK    float32   what they come to: a reward, or the logit of being right

    scalar       1  score                     the score itself
    two_class    2  wrong, right              right - wrong: the logit of P(right) under a softmax over the two
    three_class  3  wrong, neutral, right     the logit of P(right) + P(neutral) / 2
    attributes   A  one per attribute         their weighted mean, or what net.overall makes of them
    debiased     2  quality, length           quality: what the answer's length explains is left behind (ODIN, arXiv 2402.07319)
    verdict      3  wrong, right, rest        right - wrong: logits of two tokens in a language model's own output layer

A head is linear, or has a hidden layer (`layers=2`). It can start from rows of a language model's output layer (`start_from_rows`): with
two classes, tokens "+ -" and the loss on these two logits alone it is the process reward model of Math-Shepherd (arXiv 2312.08935, eq. 2).
With `scalar` and one token the score starts as that token's logit, as in the verifier of Cobbe et al. (2021, arXiv 2110.14168):
their gain is the length of the row, and their bias is the same for every answer.

`verdict` has no weights: it reads the output layer that the language model goes on having, so that what it learns a plain language
model says too (Zhang et al. 2024, arXiv 2408.15240). rest is the log-sum-exp of all other logits; with it the loss may be that of the
next token (objective `next_token`), without it that of the two tokens alone.

`net.members` puts several heads on one body: their outputs lie side by side, member after member, each member is trained by its own loss
(Objective.of_members), and the score is the mean of theirs. By what they differ a score is uncertain (Osband et al. 2016, arXiv 1602.04621;
in preferences Coste et al. 2023, arXiv 2310.02743). One pass of the body serves all.

>>> import torch
>>> Reading("two_class", ("wrong", "right"))(torch.tensor([[[0.0, 2.0]]]))
tensor([[2.]])
>>> Reading("three_class", ("wrong", "neutral", "right"))(torch.tensor([[[0.0, 5.0, 0.0]]]))
tensor([[0.]])
>>> three = Reading(members=3)
>>> three(torch.tensor([[[0.0, 2.0, 4.0]]])), three.each_score(torch.tensor([[[0.0, 2.0, 4.0]]])).flatten()
(tensor([[2.]]), tensor([0., 2., 4.]))
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from rayward.config import choose, parse_settings
from rayward.errors import ModelError, SettingsError


@dataclass(frozen=True)
class Reading:
    """A head in words: its kind, the names of its outputs, and what a weighted mean weighs."""

    kind: str = "scalar"
    names: tuple[str, ...] = ("score",)
    weights: tuple[float, ...] = ()  # of attributes, summing to 1
    layers: int = 1
    tokens: tuple[int, ...] = ()  # of a tied head: the ids of right and wrong
    output_layer: str = ""  # what the class calls the language model's output layer, where it is kept; or vocabulary.TIED
    overall: str = "mean"  # how attributes become one score: mean, linear or gate (reward_model.overall)
    verbosity: str = ""  # what was taken off the attributes before they are one score: an attribute, or tokens
    taken_off: tuple[float, ...] = ()  # how much of it, per attribute
    members: int = 1  # heads side by side, each with all of the names

    def __call__(self, output_GKC: Tensor) -> Tensor:
        """score_GK: of several members their mean."""
        return KINDS[self.kind].read(output_GKC, self) if self.members == 1 else self.each_score(output_GKC).mean(0)

    def each(self, output_GKC: Tensor) -> tuple[Tensor, ...]:
        """output_GKC of every member by itself."""
        return output_GKC.unflatten(-1, (self.members, -1)).unbind(-2)

    def each_score(self, output_GKC: Tensor) -> Tensor:
        """score_MGK of M members."""
        return torch.stack([self.one(own_GKC) for own_GKC in self.each(output_GKC)])

    @property
    def one(self) -> Reading:
        """How a member is read by itself."""
        return replace(self, members=1)

    def fits(self, other: Reading) -> bool:
        """Whether the weights of one are weights of the other: what a mean weighs is no weight of the model."""
        return (self.kind, self.names, self.layers, self.members) == (other.kind, other.names, other.layers, other.members)

    @property
    def attributes(self) -> tuple[str, ...]:
        """The names that a target may have."""
        return self.names if self.kind == "attributes" else ()

    @property
    def combined(self) -> bool:
        """Whether the model makes the score of the attributes, as one more output: it takes more than fixed weights."""
        return self.overall != "mean" or bool(self.taken_off)

    @property
    def learns_overall(self) -> bool:
        """Whether there are weights that make one score of the attributes, besides those that make the attributes."""
        return self.overall != "mean"

    @property
    def tied(self) -> bool:
        """Whether it reads the language model's output layer, and has no weights of its own."""
        return KINDS[self.kind].tied

    @property
    def labels(self) -> tuple[str, ...]:
        """The outputs that a plain classifier has: of a tied head those of its two tokens, of several members those of each."""
        if self.members > 1:
            return tuple(f"{name} {m}" for m in range(1, self.members + 1) for name in self.names)
        return self.names[:2] if self.tied else self.names

    def pick_each(self, output_GKC: Tensor, column_GK: Tensor) -> Tensor:
        """score_MGK: what each of M members says is picked."""
        return torch.stack([self.one.pick(own_GKC, column_GK) for own_GKC in self.each(output_GKC)])

    def pick(self, output_GKC: Tensor, column_GK: Tensor) -> Tensor:
        """score_GK: the output that a target is about, and the score of all of them where it is about none (-1); the mean of members."""
        if self.members > 1:
            return self.pick_each(output_GKC, column_GK).mean(0)
        score_GK = self(output_GKC)
        if not self.attributes:
            return score_GK
        own_GK = output_GKC.gather(-1, column_GK.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        return torch.where(column_GK < 0, score_GK, own_GK)

    def as_notes(self) -> dict[str, Any]:
        """What is saved with a model."""
        language = {"tokens": list(self.tokens), "output_layer": self.output_layer} if self.output_layer else {}
        overall = {"overall": self.overall} if self.learns_overall else {}
        less = {"verbosity": self.verbosity, "taken_off": list(self.taken_off)} if self.taken_off else {}
        several = {"members": self.members} if self.members > 1 else {}
        plain = {"kind": self.kind, "names": list(self.names), "weights": list(self.weights), "layers": self.layers}
        return {**plain, **several, **language, **overall, **less}

    @classmethod
    def of_notes(cls, notes: Mapping[str, Any] | None) -> Reading:
        """The head that a saved model says it has; one without a word has one score."""
        if not notes:
            return cls()
        choose(KINDS, notes["kind"], "head")
        plain = ("layers", "members", "output_layer", "overall", "verbosity")
        said: dict[str, Any] = {name: notes[name] for name in plain if name in notes}
        said |= {name: tuple(notes[name]) for name in ("tokens", "taken_off") if name in notes}
        return cls(notes["kind"], tuple(notes["names"]), tuple(notes["weights"]), **said)


@dataclass(frozen=True)
class Kind:
    """How a kind of head is read, and what its outputs are called."""

    names: tuple[str, ...]  # (): the attributes of the examples
    read: Callable[[Tensor, Reading], Tensor]
    tokens: tuple[int, ...] = ()  # how many tokens of a language model it can start from, in the order right, (neutral,) wrong
    tied: bool = False  # it reads the output layer itself


def _three_class(output_GKC: Tensor, reading: Reading) -> Tensor:
    wrong, neutral, right = output_GKC.unbind(-1)
    half = neutral - math.log(2)
    return torch.logaddexp(right, half) - torch.logaddexp(wrong, half)


def _one_score(output_GKC: Tensor, reading: Reading) -> Tensor:
    return output_GKC[..., -1] if reading.combined else weighted_mean(output_GKC, reading)


def weighted_mean(rating_GKA: Tensor, reading: Reading) -> Tensor:
    """score_GK: the attributes by their fixed weights; no matrix product, which autocast would round."""
    return (rating_GKA * rating_GKA.new_tensor(reading.weights)).sum(-1)


KINDS: dict[str, Kind] = {
    "scalar": Kind(("score",), lambda output_GKC, reading: output_GKC[..., 0], tokens=(1, 2)),
    "two_class": Kind(("wrong", "right"), lambda output_GKC, reading: output_GKC[..., 1] - output_GKC[..., 0], tokens=(2,)),
    "three_class": Kind(("wrong", "neutral", "right"), _three_class, tokens=(3,)),
    "attributes": Kind((), _one_score),
    "debiased": Kind(("quality", "length"), lambda output_GKC, reading: output_GKC[..., 0]),
    "verdict": Kind(
        ("wrong", "right", "rest"), lambda output_GKC, reading: output_GKC[..., 1] - output_GKC[..., 0], tokens=(2,), tied=True
    ),
}


def make_reading(kind: str, layers: int = 1, attributes: Sequence[str] = (), weights: str = "{}", members: int = 1) -> Reading:
    """The head of that kind; `weights` is JSON of attribute -> weight, those not named weigh nothing, and without any all weigh alike.

    >>> make_reading("attributes", attributes=("helpful", "short"), weights='{"helpful": 3, "short": -1}').weights
    (1.5, -0.5)

    Raises:
        SettingsError: if there are no attributes to name the outputs, or the weights are not numbers of theirs that add up to more than 0;
            or if there are to be several members of a head without weights of its own.
    """
    entry = choose(KINDS, kind, "head")
    if members > 1 and entry.tied:
        raise SettingsError(
            f"members={members}: head={kind} reads the one output layer that the language model has, and all members would be the same",
            "leave net.members out and train with several seeds, --set train.seed=1, or take head=scalar",
        )
    names = entry.names or tuple(attributes)
    if not names:
        raise SettingsError("head=attributes needs examples with named targets", "label them: rayward run label_attributes ...")
    given = parse_settings(weights, "attribute_weights", '{"helpful": 2}')
    unknown = sorted(set(given) - set(names))
    if given and (entry.names or unknown):
        said = f"the attributes are {', '.join(names)}" if not entry.names else f"head={kind} has none"
        raise SettingsError(f"attribute_weights names {', '.join(unknown or given)}, and {said}", "leave it out, or name what there is")
    for name, weight in given.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise SettingsError(f"attribute_weights: {name}={weight!r} is not a number", f'e.g. {{"{name}": 1}}')
    plain = [float(given[name]) if name in given else float(not given) for name in names]
    if not entry.names and sum(plain) <= 0:  # a mean that is divided by less than nothing would turn its signs round
        raise SettingsError(f"attribute_weights={weights} add up to {sum(plain):g}", "give weights that add up to more than 0, e.g. to 1")
    return Reading(kind, names, () if entry.names else tuple(w / sum(plain) for w in plain), layers, members=members)


def make_head(width: int, reading: Reading) -> nn.Module:
    """A fresh head: Normal with standard deviation 1/sqrt(d+1), bias 0 (Stiennon et al. 2020, arXiv 2009.01325, appendix B.1).

    Of several members each has a hidden layer of its own, `width` wide.
    """
    M, C = reading.members, len(reading.names)
    if reading.layers == 1:
        return fresh(nn.Linear(width, M * C, bias=False))
    hidden = fresh(nn.Linear(width, M * width))
    last = [fresh(nn.Linear(width, C)) for _ in range(M)]
    if M == 1:
        return nn.Sequential(hidden, nn.ReLU(), last[0])
    whole = nn.Linear(M * width, M * C)
    with torch.no_grad():
        whole.weight.copy_(torch.block_diag(*(layer.weight for layer in last)))
        whole.bias.zero_()
    return keep_apart(nn.Sequential(hidden, nn.ReLU(), whole), reading)


class Apart(nn.Linear):
    """A linear layer of which every member reads its own inputs: the rest of its weight is 0, and stays so.

    Saved it is a plain linear layer, which says the same.
    """

    members = 1

    def forward(self, hidden: Tensor) -> Tensor:
        """output[..., M * C] of hidden[..., M * H]."""
        M = self.members
        own_CHM = self.weight.unflatten(0, (M, -1)).unflatten(-1, (M, -1)).diagonal(dim1=0, dim2=2)
        said = torch.einsum("...mh,chm->...mc", hidden.unflatten(-1, (M, -1)), own_CHM)
        return said.flatten(-2) + self.bias


def keep_apart(head: nn.Module, reading: Reading) -> nn.Module:
    """A head as it was saved, of which no member will learn to read what another's hidden layer says."""
    if reading.members > 1 and isinstance(head, nn.Sequential):
        plain: Any = head[-1]
        apart = Apart(plain.in_features, plain.out_features, device=plain.weight.device)
        apart.members, apart.weight, apart.bias = reading.members, plain.weight, plain.bias
        head[-1] = apart
    return head


def fresh(layer: nn.Linear) -> nn.Linear:
    """A linear layer with fresh weights."""
    nn.init.normal_(layer.weight, std=(layer.in_features + 1) ** -0.5)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def token_ids(tokenizer: Any, tokens: str, reading: Reading) -> list[int]:
    """The ids of tokens given as text, in the order right, (neutral,) wrong; each must be one token.

    Raises:
        ModelError: if there are not as many as the head has classes, or one is not a single token.
    """
    wanted, words = KINDS[reading.kind].tokens, tokens.split()
    if len(words) not in wanted or reading.layers != 1:
        many = " or ".join(map(str, wanted))
        said = f"takes {many} tokens, right first" if wanted and reading.layers == 1 else "starts from no tokens"
        raise ModelError(f"head_tokens={tokens!r}: head={reading.kind} with layers={reading.layers} {said}", 'e.g. "+ -" for two_class')
    ids = []
    for word in words:
        known = tokenizer.convert_tokens_to_ids(word)
        pieces = [known] if known not in (None, tokenizer.unk_token_id) else tokenizer(word, add_special_tokens=False)["input_ids"]
        if len(pieces) != 1 or pieces[0] == tokenizer.unk_token_id:
            raise ModelError(f"head_tokens: {word!r} is not one token of this tokenizer", "name tokens of its vocabulary")
        ids.append(int(pieces[0]))
    if len(set(ids)) < len(ids):
        raise ModelError(f"head_tokens={tokens!r} are not different tokens", "name a token for right and another for wrong")
    return ids


@torch.no_grad()
def start_from_rows(head: nn.Module, row_ND: Tensor, reading: Reading) -> None:
    """Give a linear head the language model's rows of some tokens, in the order right, (neutral,) wrong: it then says what they say."""
    assert isinstance(head, nn.Linear), f"a head of {reading.layers} layers cannot start from rows"
    rows = row_ND.to(head.weight)
    head.weight.copy_((rows[0] - rows[1:].sum(0)).unsqueeze(0) if reading.kind == "scalar" else rows.flip(0))
    if head.bias is not None:
        nn.init.zeros_(head.bias)
