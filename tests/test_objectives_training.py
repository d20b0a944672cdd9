"""Objectives in a fit: every entry of the table learns from each kind of label that it accepts, and refuses the others with the way out.

`REFUSALS` says by hand which it refuses, and docs/objectives.md must ask for what they lack.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rayward.batching import BatchSettings
from rayward.errors import RaywardError
from rayward.fitting import FitSettings, fit, prepare
from rayward.labels import LABELERS, PairSettings
from rayward.objectives import OBJECTIVES
from rayward.objectives.docs import page
from rayward.records import Example
from rayward.rendering import Groups, RenderSettings
from rayward.reward_model import ModelSettings, load_model, score_groups
from rayward.training import TrainSettings
from test_objectives_formulas import TERMS_OF_SCORES
from tiny import dataset_of, example, question, toy_examples, toy_rollouts

torch.set_num_threads(1)
pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 20


def voted() -> list[Example]:
    """Two answers each that four annotators compared, of one mind or not."""
    made = []
    for n, (a, b, *_) in enumerate(toy_rollouts(4, answers=2)):
        names = [f"annotator {k}" for k in range(4)]
        said = [
            replace(r, id=f"{r.id} {name}", judgement=name, annotator=name, reward=float((r is a) == (k >= n)))
            for k, name in enumerate(names)
            for r in (a, b)
        ]
        made += [e for e in LABELERS["pairs"].label(said, PairSettings(votes=True)) if isinstance(e, Example)]
    return made


def with_rewards() -> list[Example]:
    """Rankings by a reward that is no probability."""
    return [replace(e, targets=tuple(4 * t - 1 for t in e.targets)) for e in toy_examples("rankings", 4, answers=4)]


def rated() -> list[Example]:
    """Answers with a rating on two attributes, some of them missing."""
    made = []
    for n, ranked in enumerate(toy_examples("rankings", 4, answers=4)):
        values = [v for k, t in enumerate(ranked.targets) for v in (t, float(k % 3))]
        counts = tuple(int((n + k) % 5 > 0) for k in range(len(values)))
        made.append(replace(ranked, targets=tuple(values), counts=counts, attributes=("right", "short")))
    return made


KINDS = {  # kind of label -> the labeler that makes such examples, and some of them
    "pairs": ("pairs", lambda: toy_examples("pairs", 3, answers=4)),
    "votes": ("pairs", voted),
    "rankings": ("rankings", lambda: toy_examples("rankings", 4, answers=4)),
    "rewards": ("rankings", with_rewards),
    "outcomes": ("outcomes", lambda: toy_examples("outcomes", 4, answers=3)),
    "single outcomes": (
        "outcomes",
        lambda: [example(f"A: {n}", prompt=question(f"{n} + 0?"), targets=(float(n % 2),), id=str(n)) for n in range(12)],
    ),
    "attributes": ("attributes", rated),
    "steps": ("steps", lambda: toy_examples("steps", 6)),
}

# What an objective says of a kind that it refuses -> what docs/objectives.md says it asks for
ASKS = {
    "compares places of one example": "two different targets in some example",
    "needs targets between 0 and 1": "targets in [0, 1]",
    "compares the steps of an answer": "steps",
    "gives an answer's target to all of its tokens": "one target per answer",
    "a head that is not of attributes": "one target per answer",
    "targets called right, short, and the model gives one score": "one attribute at most",
    "would learn the chances of": "no chances",
}
COMPARES, UNIT, STEPWISE, ENDS, WHOLE, ONE, CHANCES = ASKS
ALONE = {"single outcomes": COMPARES}
RATINGS = {"rewards": UNIT, "attributes": UNIT}
AT_ENDS = {"attributes": WHOLE, "steps": ENDS}
REFUSALS: dict[str, dict[str, str]] = {
    **dict.fromkeys(["bradley_terry", "margin", "scaled", "hinge", "focal", "adjacent", "ranknet"], ALONE),
    "vote_share": {**ALONE, **RATINGS},
    "debiased": {**ALONE, "attributes": ONE},
    **dict.fromkeys(["plackett_luce", "pick_best", "listnet", "lambdarank"], ALONE),
    "q_ranking": {**{kind: STEPWISE for kind in KINDS if kind != "steps"}, **RATINGS},
    "binary_cross_entropy": RATINGS,
    "three_class": {**RATINGS, "attributes": ONE},
    "next_token": {**RATINGS, "attributes": ONE},
    "token_wise": {**ALONE, **AT_ENDS},
    "token_cross_entropy": {**RATINGS, **AT_ENDS},
    "squared_error": dict.fromkeys(["outcomes", "single outcomes", "steps"], CHANCES),
}


LEARNS = {name: [kind for kind in KINDS if kind not in refused] for name, refused in REFUSALS.items()}
QUICK = {(name, kinds[n % len(kinds)]) for n, (name, kinds) in enumerate(LEARNS.items())}  # a diagonal: one kind each; the rest is slow


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Examples of every kind on disk, as its labeler leaves them."""
    folder = tmp_path_factory.mktemp("labelled")
    return {kind: dataset_of(make(), folder / kind, f"label_{labeler}").path for kind, (labeler, make) in KINDS.items()}


def settings_of(name: str, examples: Path) -> FitSettings:
    """A fit of a model of a few thousand weights, all examples in every step."""
    net = ModelSettings(width=16, layers=1, head_tokens="yes no" if OBJECTIVES[name].head == "verdict" else "")
    train = TrainSettings(epochs=STEPS, lr=1e-2, log_every=1)
    return FitSettings(str(examples), "tiny", name, net, RenderSettings(max_length=128), BatchSettings(size=64), train, 0.0)


def losses(output: Path) -> list[float]:
    """The loss at every step of a fit."""
    said = [json.loads(line) for line in (output / "run" / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in said if "loss" in line]


def test_every_objective_is_here_and_every_kind_is_tried_quickly() -> None:
    assert REFUSALS.keys() == OBJECTIVES.keys() == {name for name, _ in QUICK}
    assert {kind for _, kind in QUICK} == set(KINDS)


@pytest.mark.parametrize(
    ("name", "kind"),
    [pytest.param(name, kind, marks=[] if (name, kind) in QUICK else [pytest.mark.slow]) for name in LEARNS for kind in LEARNS[name]],
)
def test_it_learns_from_the_labels_it_accepts(name: str, kind: str, labelled: dict[str, Path], tmp_path: Path) -> None:
    done = fit(settings_of(name, labelled[kind]), str(tmp_path))
    curve = losses(tmp_path)
    assert len(curve) == STEPS
    assert curve[0] > 0
    assert curve[-1] < 0.98 * curve[0]
    assert (done.notes["objective"], done.notes["labeler"]) == (name, KINDS[kind][0])
    assert done.examples["rejected"] == 0


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name in REFUSALS for kind in REFUSALS[name]])
def test_it_refuses_the_others_and_says_what_it_asks_for(name: str, kind: str, labelled: dict[str, Path], tmp_path: Path) -> None:
    says = REFUSALS[name][kind]
    with pytest.raises(RaywardError, match=re.escape(says)) as refused:
        prepare(settings_of(name, labelled[kind]), str(tmp_path))
    assert name in str(refused.value) or kind == "attributes"
    assert "->" in str(refused.value)
    [row] = [line for line in page().splitlines() if line.startswith(f"| `{name}` |") and line.count(" | ") > 3]
    asks = re.split(r"(?<!\\)\|", row)[4]
    assert ASKS[says] in asks


def test_votes_are_shares_that_are_not_all_of_one_mind() -> None:
    shares = {target for e in voted() for target in e.targets}
    assert {0.0, 0.25, 0.5, 0.75, 1.0} >= shares > {0.0, 1.0}


# ---------------------------------------------------------------------------------------------------------- regularisers


def regularised(name: str, weight: float, examples: Path, folder: Path) -> tuple[list[float], float, float]:
    """Of a fit with so much of a regulariser: its losses, and the term by hand, averaged over examples, at the start and at the end."""
    settings = replace(settings_of("bradley_terry", examples), regularise=json.dumps({name: weight}))
    end = fit(settings, str(folder)).model
    groups = Groups(folder / "groups" / "train")
    every = [groups[n] for n in range(len(groups))]
    means = []
    for path in (folder / "start", end):
        scores = score_groups(load_model(str(path), ModelSettings()).model, every, settings.batch)
        terms = [g.weight * TERMS_OF_SCORES[name](score_K.tolist()) for g, score_K in zip(every, scores, strict=True)]
        means.append(sum(terms) / sum(g.weight for g in every))
    return losses(folder), means[0], means[1]


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n == "centre" else [pytest.mark.slow]) for n in TERMS_OF_SCORES])
def test_a_regulariser_adds_its_weight_of_its_term_and_a_fit_ends_with_less_of_it(
    name: str, labelled: dict[str, Path], tmp_path: Path
) -> None:
    plain, _, left_to_itself = regularised(name, 0.0, labelled["rankings"], tmp_path / "plain")
    more, begun_with, held = regularised(name, 0.1, labelled["rankings"], tmp_path / "held")
    assert more[0] - plain[0] == pytest.approx(0.1 * begun_with, abs=1e-6)
    assert held < 0.5 * left_to_itself
