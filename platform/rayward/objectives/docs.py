"""docs/objectives.md, made from the code: `python -m rayward.objectives.docs` writes it again."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rayward.objectives import OBJECTIVES, Objective, comparisons, pointwise, rankings, settings_of, tokens
from rayward.objectives.regularisers import REGULARISERS
from rayward.terms import TERMS

_FAMILIES = {
    "Comparisons of two places": comparisons,
    "The whole order": rankings,
    "Every place by itself": pointwise,
    "Every token of an answer": tokens,
}

# What the literature calls otherwise: name -> (objective, settings, what to know)
ALSO: dict[str, tuple[str, str, str]] = {
    "log-exp, log-sigmoid": ("bradley_terry", "{}", "`log(1 + exp(s_worse - s_better))`, computed without overflow"),
    "all pairs weighted 1 / C(K, 2)": ("bradley_terry", "{}", "on rankings; InstructGPT's loss where nothing is tied"),
    "label smoothing, conservative": ("bradley_terry", '{"smoothing": 0.1}', "a judgement is wrong with that chance"),
    "contrastive, one pair": ("bradley_terry", '{"temperature": 0.5}', "gaps are divided by the temperature"),
    "contrastive, best against the rest; InfoNCE": ("pick_best", '{"temperature": 0.5}', ""),
    "triplet": ("hinge", '{"margin": 1.0}', "the distance of an answer from its prompt is minus its score"),
    "perceptron": ("hinge", '{"margin": 0.0}', ""),
    "soft labels from votes": ("vote_share", "{}", "targets are shares of votes"),
    "ListMLE": ("plackett_luce", "{}", "ties and unranked tails included"),
    "RankNet without ties": ("bradley_terry", "{}", ""),
    "ODIN": ("debiased", "{}", ""),
    "two-class process reward (Math-Shepherd)": (
        "binary_cross_entropy",
        "{}",
        "with `head=two_class`: the score is the difference of the logits",
    ),
    "Monte-Carlo shares weighted by their counts": ("binary_cross_entropy", '{"by_count": 8}', ""),
    "steps of an answer against each other": ("bradley_terry", "{}", "on steps: pairs are made of steps with different targets"),
    "PQM, Q-value ranking": ("q_ranking", '{"margin": 4.0}', "on steps; the paper's margins are 2 and 4"),
    "generative verifier, GenRM": ("next_token", "{}", "with `render.judge`, `head=verdict` and its `head_tokens`; on outcomes"),
    "yes/no verifier, softmax over two tokens": ("binary_cross_entropy", "{}", "the same head, or `two_class` started from `head_tokens`"),
    "verifier trained jointly with the language-modelling loss": (
        "binary_cross_entropy",
        "{}",
        "`--regularise '{\"language\": 0.5}'` with `net.language=true` (Cobbe et al. 2021)",
    ),
    "DeepSpeed-Chat": ("token_wise", "{}", "an answer that has ended keeps its last score"),
    "verifier with a score at every token": ("token_cross_entropy", "{}", "on outcomes (Cobbe et al. 2021)"),
    "multi-attribute regression": ("squared_error", "{}", "with `head=attributes`; ratings that nobody gave are masked"),
}

_HEAD = """# Objectives

Made from the code by `python -m rayward.objectives.docs`; do not edit.

An objective says what scores should be. `rayward run train_reward_model` takes the one that the labels are for, or
`--objective NAME --objective-settings '{"temperature": 0.5}'`, or your own as `--objective my_module:my_loss`: a function of
`score_GK, target_GK, mask_GK` (G examples, K places in the widest) that gives one loss per example; how is said in
`rayward/objectives/__init__.py`. s is a score, i is better than j: its target is higher. Targets are values, the higher the better;
ranks (1 is best) go in as their negative. Masked places change nothing. What is compared is compared inside one example, and where
targets are about attributes, inside one attribute.
"""


def page() -> str:
    """The whole document."""
    lines = [_HEAD]
    for family, module in _FAMILIES.items():
        named = {name: entry for name, entry in OBJECTIVES.items() if entry.loss.__module__ == module.__name__}
        lines += [f"## {family}", "", "| `--objective` | loss | settings | asks for | right is |", "|---|---|---|---|---|"]
        for name, entry in named.items():
            right = "the order" if entry.accuracy.__name__ == "order_accuracy" else "the side of 0"
            lines.append(f"| `{name}` | {_said(entry.loss)} | {_settings(entry)} | {_needs(entry)} | {right} |")
        lines += ["", *filter(None, (_more(name, entry) for name, entry in named.items())), ""]
    every: dict[str, Callable[..., Any]] = {**REGULARISERS, **TERMS}
    lines += ["## Regularisers", "", "They add to any objective: `--regularise '{\"centre\": 0.01}'` gives the weight.", ""]
    lines += ["| term | per example |", "|---|---|", *(f"| `{name}` | {_said(term)} |" for name, term in every.items()), ""]
    lines += [*(f"* **{name}**: {more}" for name, term in every.items() if (more := _rest(term))), ""]
    lines += ["## Under other names", "", "| known as | `--objective` | `--objective-settings` | |", "|---|---|---|---|"]
    lines += [f"| {known} | `{name}` | {'' if given == '{}' else f'`{given}`'} | {note} |" for known, (name, given, note) in ALSO.items()]
    return "\n".join(lines) + f"\n\n{len(OBJECTIVES)} objectives, {len(every)} regularisers.\n"


def _said(function: Callable[..., Any]) -> str:
    """The first line of a docstring, as a cell."""
    return _text(function).partition("\n")[0].replace("|", "\\|")


def _text(function: Callable[..., Any]) -> str:
    return inspect.getdoc(function) or ""


def _more(name: str, entry: Objective) -> str:
    """The rest of a docstring, if there is more, as an item of a list; its indented formulas stay formulas."""
    more = _rest(entry.loss)
    return f"* **{name}**: {more}" if more else ""


def _rest(function: Callable[..., Any]) -> str:
    """All but the first paragraph of a docstring."""
    paragraphs = _text(function).split("\n\n")[1:]
    return " ".join(f"`{' '.join(p.split())}`" if p.startswith("    ") else " ".join(p.split()) for p in paragraphs)


def _settings(entry: Objective) -> str:
    return ", ".join(f"`{name}` {str(default).lower()}" for name, default in settings_of(entry.loss).items())


def _needs(entry: Objective) -> str:
    """What it asks of examples and of the model."""
    asks = {
        "two different targets in some example": entry.compares,
        "targets in [0, 1]": entry.unit,
        "steps": entry.steps,
        "one target per answer; a decoder": entry.ends,
        f"`head={entry.head}`, so one attribute at most": bool(entry.head),
        "targets that are no chances: neither outcomes nor steps": entry.loss is pointwise.squared_error,
        "room for a whole step in a micro-batch": entry.whole,
    }
    return "; ".join(ask for ask, there in asks.items() if there)


if __name__ == "__main__":
    (Path(__file__).parents[3] / "docs" / "objectives.md").write_text(page(), encoding="utf-8")
