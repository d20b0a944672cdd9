"""Which objective learns most from the same judgements: the toy world and real rankings, the same budget for all, several seeds.

    python benchmarks/objectives.py --shared ../shared             5 seeds; some minutes on two cores; JSON on the last line
    python benchmarks/objectives.py --shared ../shared --quick     2 seeds and fewer steps
    python benchmarks/objectives.py                                the toy world alone

    toy        rankings of 8 answers by the share of steps before the first slip; a decoder of two layers from scratch reads them
    oasst      people's rankings of 2 to 9 answers (Open-Assistant, 212 prompts); a linear score of words and length
    squality   summaries by 3 writers, rated 1 to 100 by several people each (100 questions); the same linear score

All objectives see the same examples, the same split, the same start and the same number of steps with the same learning rate; the
weights kept are those with the best pair accuracy on the validation prompts. Targets are scaled to [0, 1], so that all accept them. A seed
is another split and another start. Judged on prompts that were not seen:

    accuracy   share of pairs with different targets that are ordered right, every prompt weighing the same
    tau        Kendall's rank correlation, mean over prompts of 3 answers or more
    best       the target of the answer that scores best, mean over prompts
    ECE, NLL   of sigma(gap) against "the better one is preferred", behind a temperature fitted on the validation prompts

Every figure is a mean over seeds with a 95 % t-interval; `vs BT` is the accuracy beside bradley_terry's of the same seed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from rayward import metrics
from rayward.batching import Batch, BatchSettings, collate, micro_batches, plan
from rayward.formats import as_prompt
from rayward.heads import make_reading
from rayward.labels import LABELERS
from rayward.objectives import OBJECTIVES, Objective, make_objective
from rayward.policies import ToyPolicy
from rayward.records import Example, Rollout
from rayward.rendering import Group, Renderer, RenderSettings
from rayward.reward_model import ModelSettings, score_groups, tiny_model
from rayward.sampling import SampleSettings, sample_problems, toy_problem
from rayward.toy_world import ToyWorld

VARIANTS = [("bradley_terry", '{"smoothing": 0.1}'), ("listnet", '{"temperature": 0.2}'), ("margin", '{"scale": 3.0}')]
RUNS: dict[str, Objective] = {
    **{name: entry for name, entry in OBJECTIVES.items() if not entry.steps and entry.head != "verdict"},
    **{f"{name} {given}": make_objective(name, given) for name, given in VARIANTS},
}
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 8: 2.365, 10: 2.262}  # Student's t, two-sided, by number of seeds

Scores = list[list[float]]
Sides = dict[str, list[Example]]  # train, validation, test


@dataclass(frozen=True)
class Budget:
    """What every objective may use."""

    seeds: int = 5
    problems: int = 60  # of the toy world, to train on
    epochs: int = 4  # over them
    steps: int = 240  # of the linear score, over all examples at once


# ---------------------------------------------------------------------------------------------------------------- the data


def share(rollout: Rollout) -> float:
    """The share of an answer's steps before the first slip."""
    slip = ToyWorld.first_slip(ToyWorld.numbers(rollout.prompt[0].content), rollout.steps)
    return 1.0 if slip < 0 else slip / len(rollout.steps)


def toy(seed: int, problems: int) -> Sides:
    """Rankings of toy answers; other problems on every side."""
    world = ToyWorld()

    def side(start: int, count: int) -> list[Example]:
        asked = [toy_problem(start + n, world, seed) for n in range(count)]
        rolled = sample_problems(asked, ToyPolicy(world), SampleSettings(answers=8, seed=seed)).rollouts
        labeler = LABELERS["rankings"]
        graded = [[replace(r, reward=share(r)) for r in rollouts] for rollouts in rolled]
        return [e for rollouts in graded for e in labeler.label(rollouts, labeler.settings()) if isinstance(e, Example)]

    return {"train": side(0, problems), "validation": side(10_000, 40), "test": side(20_000, 120)}


def real(parquet: Path) -> list[Example]:
    """Rankings with targets in [0, 1]: the share of ranks below, or the mean rating of 1 to 100."""
    examples = []
    for row in pq.read_table(parquet).to_pylist():
        said = row["responses"]
        if any(r["score"] is None for r in said):
            last = max(r["rank"] for r in said)
            targets = [1 - r["rank"] / last if last else 0.0 for r in said]
        else:
            targets = [r["score"] / 100 for r in said]
        if len(set(targets)) > 1:
            answers = tuple((r["text"],) for r in said)
            prompt = as_prompt(row["prompt"], "the prompt")
            examples.append(Example(id=row["prompt_id"], prompt=prompt, answers=answers, targets=tuple(targets), counts=(1,) * len(said)))
    return examples


def split(examples: Sequence[Example], seed: int) -> Sides:
    """60 % of the prompts to train on, 15 % to validate on, 25 % to judge on."""
    order = np.random.default_rng(seed).permutation(len(examples))
    ends = [int(0.6 * len(order)), int(0.75 * len(order))]
    return {name: [examples[n] for n in part] for name, part in zip(("train", "validation", "test"), np.split(order, ends), strict=True)}


# -------------------------------------------------------------------------------------------------------------- the models


def accuracy(examples: Sequence[Example], scores: Scores) -> float:
    """Share of pairs ordered right, every prompt weighing the same."""
    c = metrics.comparisons(examples, scores)
    return float(np.average(c.logit > 0, weights=c.weight))


def decoder(sides: Sides, entry: Objective, seed: int, budget: Budget) -> dict[str, Scores]:
    """Scores of the validation and the test side by a small decoder trained from scratch."""
    net = ModelSettings(width=32, layers=2, head=entry.head or "auto")
    loaded = tiny_model(sides["train"], net, 128, seed)
    model, batching = loaded.model, BatchSettings(size=16)
    renderer = Renderer(loaded.tokenizer, RenderSettings(max_length=128))
    groups = {name: [g for g in renderer.render(examples) if isinstance(g, Group)] for name, examples in sides.items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.01)
    total = budget.epochs * -(-len(groups["train"]) // batching.size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=total, pct_start=0.1)

    def scored(side: str) -> Scores:
        return [list(map(float, s)) for s in score_groups(model, groups[side], batching, "fp32")]

    best: tuple[float, dict[str, Scores]] = (-1.0, {})
    for epoch in range(budget.epochs):
        model.train()
        for numbers in plan(len(groups["train"]), batching.size, seed, epoch):
            for _, batch in micro_batches([groups["train"][n] for n in numbers], replace(batching, micro_tokens=1 << 16), True):
                output_GKC, terms = model.hear(batch, entry.body_terms)
                score_GK = model.reading.pick(output_GKC, batch.column_GK)
                (entry.of(batch, score_GK, output_GKC, terms=terms).sum() / len(numbers)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        held = scored("validation")
        if (now := accuracy(sides["validation"], held)) > best[0]:
            best = now, {"validation": held, "test": scored("test")}
    return best[1]


_WORD = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True)
class Words:
    """Answers as features: which words of the training side they hold, weighed by rarity, and how long they are."""

    column: dict[str, int]
    rarity: np.ndarray  # log(N / n) of every word

    @classmethod
    def of(cls, examples: Sequence[Example], most: int = 3000) -> Words:
        """The words that at least two training answers hold."""
        texts = [set(_WORD.findall(a[0].lower())) for e in examples for a in e.answers]
        held = Counter(w for text in texts for w in text)
        kept = [w for w, n in sorted(held.items(), key=lambda c: (-c[1], c[0])) if n > 1][:most]
        return cls({w: n for n, w in enumerate(kept)}, np.log(len(texts) / np.array([held[w] for w in kept])))

    def features(self, examples: Sequence[Example]) -> Tensor:
        """feature_GKD, and what is beyond an example's answers is 0."""
        K = max(len(e.answers) for e in examples)
        made = np.zeros((len(examples), K, len(self.column) + 1), np.float32)
        for g, e in enumerate(examples):
            for k, (text,) in enumerate(e.answers):
                words = _WORD.findall(text.lower())
                for word in words:
                    if word in self.column:
                        made[g, k, self.column[word]] = self.rarity[self.column[word]]
                made[g, k] /= max(1.0, float(np.linalg.norm(made[g, k])))
                made[g, k, -1] = np.log1p(len(words)) - 5
        return torch.from_numpy(made)


def as_batch(examples: Sequence[Example]) -> Batch:
    """Targets, masks and lengths in words; the tokens themselves are never read."""
    groups = []
    for e in examples:
        length = np.array([1, *(1 + len(_WORD.findall(a[0])) for a in e.answers)], np.int32)
        tokens = np.zeros(int(length.sum()), np.int32)
        groups.append(Group(tokens, length, length.cumsum()[1:].astype(np.int32) - 1, np.array(e.targets, np.float32), 1.0))
    return collate([[g] for g in groups], shared=True)


def linear(sides: Sides, entry: Objective, seed: int, budget: Budget) -> dict[str, Scores]:
    """Scores of the validation and the test side by a linear function of words and length."""
    words = Words.of(sides["train"])
    feature = {name: words.features(examples) for name, examples in sides.items()}
    batch, reading = as_batch(sides["train"]), make_reading(entry.head or "scalar")
    torch.manual_seed(seed)
    head = nn.Linear(feature["train"].shape[-1], len(reading.names), bias=not entry.compares)
    nn.init.normal_(head.weight, std=0.01)
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.02, weight_decay=0.1)

    def scored(side: str) -> Scores:
        with torch.no_grad():
            score_GK = reading(head(feature[side]))
        return [row[: len(e.answers)].tolist() for row, e in zip(score_GK, sides[side], strict=True)]

    best: tuple[float, dict[str, Scores]] = (-1.0, {})
    for step in range(1, budget.steps + 1):
        output_GKC = head(feature["train"])
        optimizer.zero_grad()
        entry.of(batch, reading(output_GKC), output_GKC).mean().backward()
        optimizer.step()
        if step & (step - 1) == 0 or step == budget.steps:  # 1, 2, 4, ...
            held = scored("validation")
            if (now := accuracy(sides["validation"], held)) > best[0]:
                best = now, {"validation": held, "test": scored("test")}
    return best[1]


# ------------------------------------------------------------------------------------------------------------- the figures


def judge(sides: Sides, scores: dict[str, Scores]) -> dict[str, float]:
    """How good the scores of the test side are."""
    held, seen = (metrics.comparisons(sides[s], scores[s]) for s in ("validation", "test"))
    n = len(held.logit)
    temperature = metrics.fit_temperature(held.logit, np.full(n, (n + 1) / (n + 2)))
    logit, ones = seen.logit / temperature, np.ones(len(seen.logit))
    return {
        "accuracy": accuracy(sides["test"], scores["test"]),
        "tau": metrics.kendall_tau(sides["test"], scores["test"]),
        "best": metrics.best_of(sides["test"], scores["test"])["picked"],
        "ece": metrics.reliability(logit, ones).ece,
        "nll": metrics.log_loss(logit, ones),
    }


def baselines(sides: Sides) -> dict[str, dict[str, float]]:
    """What needs no learning: the longer answer, and the mean answer of best-of-K."""
    length = [[float(len(a[0])) for a in e.answers] for e in sides["test"]]
    told = metrics.best_of(sides["test"], length)
    return {
        "the longer answer": {
            "accuracy": accuracy(sides["test"], length),
            "tau": metrics.kendall_tau(sides["test"], length),
            "best": told["picked"],
        },
        "any answer": {"accuracy": 0.5, "tau": 0.0, "best": told["mean_answer"]},
        "the best there is": {"accuracy": 1.0, "tau": 1.0, "best": told["best_answer"]},
    }


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % t-interval."""
    return float(np.mean(values)), T95[len(values)] * float(np.std(values, ddof=1)) / len(values) ** 0.5


def table(world: str, found: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Print a world's figures, best accuracy first, and give them back."""
    columns = ["accuracy", "tau", "best", "ece", "nll"]
    print(f"\n{world}\n\n| objective | " + " | ".join(columns) + " | vs BT |\n|---|" + "---:|" * (len(columns) + 1))
    rows: dict[str, Any] = {}
    for name, seeds in sorted(found.items(), key=lambda f: -np.mean([s["accuracy"] for s in f[1]])):
        rows[name] = {c: [round(v, 4) for v in interval([s[c] for s in seeds])] for c in columns if c in seeds[0]}
        if name in RUNS:
            gains = [s["accuracy"] - plain["accuracy"] for s, plain in zip(seeds, found["bradley_terry"], strict=True)]
            rows[name]["vs_bt"] = [round(v, 4) for v in interval(gains)]
        cells = [f"{rows[name][c][0]:.3f} ± {rows[name][c][1]:.3f}" if c in rows[name] else "" for c in (*columns, "vs_bt")]
        print(f"| {name} | " + " | ".join(cells) + " |")
    return rows


FILES = {"oasst": "oasst_en100", "squality": "squality"}


def one_seed(world: str, seed: int, budget: Budget, shared: Path | None) -> dict[str, dict[str, float]]:
    """The figures of every objective in a world, for one seed."""
    torch.set_num_threads(1)
    sides = toy(seed, budget.problems) if shared is None else split(real(shared / f"data/rankings/{FILES[world]}.parquet"), seed)
    learn = decoder if shared is None else linear
    runs = {name: entry for name, entry in RUNS.items() if shared is None or not entry.body_terms}  # a linear score has no tokens
    return {**baselines(sides), **{name: judge(sides, learn(sides, entry, seed, budget)) for name, entry in runs.items()}}


def main() -> None:
    """Every world, every seed, every objective, on as many processes as cores; a table per world and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, help="folder with data/rankings; without it the toy world alone")
    parser.add_argument("--quick", action="store_true", help="2 seeds, fewer problems and steps")
    parser.add_argument("--only", nargs="*", default=["toy", *FILES], choices=["toy", *FILES])
    options = parser.parse_args()
    budget = Budget(seeds=2, problems=40, epochs=2, steps=64) if options.quick else Budget()
    folders = {"toy": None, **(dict.fromkeys(FILES, options.shared) if options.shared else {})}
    began, rows = time.monotonic(), {}
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        asked = {
            world: [pool.submit(one_seed, world, seed, budget, folder) for seed in range(budget.seeds)]
            for world, folder in folders.items()
            if world in options.only
        }
        for world, futures in asked.items():
            seeds = [future.result() for future in futures]
            rows[world] = table(world, {name: [seen[name] for seen in seeds] for name in seeds[0]})
    print(json.dumps({"seeds": budget.seeds, "quick": options.quick, "wall_s": round(time.monotonic() - began), "worlds": rows}))


if __name__ == "__main__":
    main()
