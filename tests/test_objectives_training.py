"""Objectives on a model: every entry of the table learns from each kind of label that it accepts.

The others it refuses with the way out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rayward.batching import BatchSettings, collate
from rayward.errors import RaywardError
from rayward.fitting import FitSettings, prepare
from rayward.objectives import OBJECTIVES, Objective
from rayward.records import Example, examples_table
from rayward.rendering import Groups, Renderer, RenderSettings, write_groups
from rayward.reward_model import ModelSettings, tiny_model
from rayward.training import TrainSettings
from tiny import dataset_of, example, question, toy_examples

torch.set_num_threads(1)
STEPS = 20


def rated() -> list[Example]:
    """Answers with a rating on two attributes, some of them missing."""
    made = []
    for n, ranked in enumerate(toy_examples("rankings", 4, answers=4)):
        values = [v for k, t in enumerate(ranked.targets) for v in (t, float(k % 3))]
        counts = tuple(int((n + k) % 5 > 0) for k in range(len(values)))
        made.append(replace(ranked, targets=tuple(values), counts=counts, attributes=("right", "short")))
    return made


def with_rewards() -> list[Example]:
    """Rankings by a reward that is no probability."""
    return [replace(e, targets=tuple(4 * t - 1 for t in e.targets)) for e in toy_examples("rankings", 4, answers=4)]


KINDS = {
    "pairs": lambda: toy_examples("pairs", 3, answers=4),
    "rankings": lambda: toy_examples("rankings", 4, answers=4),
    "rewards": with_rewards,
    "outcomes": lambda: toy_examples("outcomes", 4, answers=3),
    "single outcomes": lambda: [example(f"A: {n}", prompt=question(f"{n} + 0?"), targets=(float(n % 2),), id=str(n)) for n in range(12)],
    "attributes": rated,
    "steps": lambda: toy_examples("steps", 6),
}


@pytest.fixture(scope="module")
def labelled() -> dict[str, list[Example]]:
    return {kind: make() for kind, make in KINDS.items()}


def targets_of(examples: list[Example]) -> Iterator[list[float]]:
    """The known targets of every example."""
    for e in examples:
        yield [t for t, n in zip(e.targets, e.counts, strict=True) if n]


def refusal(entry: Objective, kind: str, examples: list[Example]) -> str:
    """What must be said of this kind of label; empty if it is accepted."""
    if entry.head and kind == "attributes":
        return "short"  # the attribute that such a head has no output for
    if entry.ends and kind == "attributes":
        return "a head that is not of attributes"
    if entry.unit and not all(0 <= t <= 1 for targets in targets_of(examples) for t in targets):
        return "needs targets between 0 and 1"
    if entry.ends and kind == "steps":
        return "gives an answer's target to all of its tokens"
    if entry.compares and not any(len(set(targets)) > 1 for targets in targets_of(examples)):
        return "compares places of one example"
    return ""


def tokens_of(entry: Objective) -> str:
    """The words that a verdict is read from, where the head is one."""
    return "yes no" if entry.head == "verdict" else ""


def fit_settings(name: str, examples: Path) -> FitSettings:
    """A fit of a model of a few thousand weights."""
    net = ModelSettings(width=16, layers=1, head_tokens=tokens_of(OBJECTIVES[name]))
    return FitSettings(str(examples), "tiny", name, net, RenderSettings(max_length=128), BatchSettings(), TrainSettings(), 0.0)


def losses(entry: Objective, examples: list[Example], folder: Path) -> tuple[float, float]:
    """The loss before and after some steps of a fresh small model on all examples at once."""
    net = ModelSettings(width=16, layers=1, head=entry.head or "auto", head_tokens=tokens_of(entry))
    loaded = tiny_model(examples, net, 128, 0, examples[0].attributes)
    model = loaded.model
    assert write_groups(folder, [examples_table(examples)], Renderer(loaded.tokenizer, RenderSettings(), model.reading.attributes)) == []
    groups = Groups(folder)
    batch = collate([[groups[n]] for n in range(len(groups))], shared=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def loss() -> torch.Tensor:
        output_GKC, terms = model.hear(batch, entry.body_terms)
        return entry.of(batch, model.reading.pick(output_GKC, batch.column_GK), output_GKC, len(model.reading.attributes), terms).mean()

    before = loss().item()
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    return before, loss().item()


@pytest.mark.parametrize(("name", "kind"), [(n, k) for n, entry in OBJECTIVES.items() for k in KINDS if k == "steps" or not entry.steps])
def test_it_learns_from_the_labels_it_accepts_and_refuses_the_others(
    name: str, kind: str, labelled: dict[str, list[Example]], tmp_path: Path
) -> None:
    entry, examples = OBJECTIVES[name], labelled[kind]
    says = refusal(entry, kind, examples)
    if says:
        dataset_of(examples, tmp_path / "examples", f"label_{kind}")
        with pytest.raises(RaywardError, match=re.escape(says)) as refused:
            prepare(fit_settings(name, tmp_path / "examples"), str(tmp_path / "fit"))
        assert name in str(refused.value) or kind == "attributes"
        assert "->" in str(refused.value)
    else:
        before, after = losses(entry, examples, tmp_path / "groups")
        assert before > 0
        assert after < 0.98 * before


def test_every_kind_is_accepted_by_some_and_every_objective_accepts_some(labelled: dict[str, list[Example]]) -> None:
    accepted = {(n, k) for n, entry in OBJECTIVES.items() for k, e in labelled.items() if not refusal(entry, k, e)}
    assert {n for n, _ in accepted} == set(OBJECTIVES)
    assert {k for _, k in accepted} == set(KINDS)
