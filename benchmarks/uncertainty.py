"""Does labelling what models disagree about beat labelling at random? The toy world, the same number of labels for all, several seeds.

    python benchmarks/uncertainty.py            6 seeds, two pools; a quarter of an hour each on two busy cores; JSON last
    python benchmarks/uncertainty.py --quick    2 seeds, smaller ensembles

A pool holds problems with two answers each. `decided`: one is right and one is wrong, so a label is a pair to learn from. `any`: two
answers as the policy gave them; where both are right or both wrong the label is a tie, which costs as much and teaches nothing.

Some prompts are labelled at random to start with, and an ensemble of small decoders from scratch is trained on them. Every arm then
chooses as many more from the pool, and fresh models are trained on all labels. Judged by pair accuracy on problems that
nobody has seen. An arm of one model uses the first of the ensemble; `heads` are one more model with as many heads (net.members), without
and with a bootstrap draw of the labels for each (train.bootstrap): one pass of one body instead of several. Every figure is a mean over
seeds (of pool, start and models) with a 95 % t-interval; `vs random` is the difference from the random arm of the same seed;
`uncertainty` is the mean over the pool, as the arm measures it.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rayward import fitting, metrics
from rayward.batching import BatchSettings
from rayward.fitting import FitSettings
from rayward.labels import PairSettings, pairs
from rayward.policies import ToyPolicy
from rayward.records import EXAMPLE_SCHEMA, Example, Rollout, examples_table, prompt_id
from rayward.rendering import RenderSettings
from rayward.reward_model import ModelSettings
from rayward.sampling import SampleSettings, sample_problems, toy_problem
from rayward.scoring import Scorer
from rayward.storage import Manifest, sort_rows, whole_digest, write_part
from rayward.toy_world import ToyWorld, seed_of
from rayward.training import TrainSettings
from rayward.uncertainty import Members, SelectSettings, choose, measure_prompts

ARMS = {  # name -> (settings, who scores: seeds, the whole ensemble; one, its first model; or a model with heads)
    "mutual_information": (SelectSettings(measure="mutual_information", random=0), "seeds"),
    "deviation": (SelectSettings(measure="deviation", random=0), "seeds"),
    "entropy": (SelectSettings(measure="entropy", random=0), "seeds"),
    "mutual_information, heads": (SelectSettings(measure="mutual_information", random=0), "heads"),
    "the same, bootstrapped": (SelectSettings(measure="mutual_information", random=0), "bootstrapped"),
    "entropy, one model": (SelectSettings(measure="entropy", random=0), "one"),
    "dropout 0.1 x 8, one model": (SelectSettings(measure="mutual_information", dropout=0.1, random=0), "one"),
}
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 8: 2.365, 10: 2.262}  # Student's t, two-sided, by number of seeds


@dataclass(frozen=True)
class Budget:
    """What every arm may use."""

    seeds: int = 6
    pool: int = 800  # prompts
    start: int = 60  # labels before anything is chosen
    more: int = 60  # labels that are chosen
    members: int = 4  # models of the ensemble, heads of the model with several
    fits: int = 2  # models that an arm is judged by
    epochs: int = 8


Prompts = dict[str, list[Rollout]]  # by prompt_id its two answers


def toy_prompts(seed: int, start: int, count: int, decided: bool) -> Prompts:
    """Problems with two answers of different text each; if `decided`, one right and one wrong."""
    world, made = ToyWorld(), {}
    for first in range(start, start + 100 * count, count):
        problems = [toy_problem(n, world, seed) for n in range(first, first + count)]
        for rollouts in sample_problems(problems, ToyPolicy(world), SampleSettings(answers=8, seed=seed)).rollouts:
            by_text = list({r.text: r for r in rollouts}.values())
            two = by_text[:2]
            if decided:
                two = [next((r for r in by_text if r.correct is want), None) for want in (True, False)]  # type: ignore[misc]
            if len(two) == 2 and None not in two and len(made) < count:
                made[prompt_id(two[0].prompt)] = two
        if len(made) == count:
            break
    return made


def write_examples(folder: Path, chosen: list[list[Rollout]]) -> int:
    """The pairs of some prompts as a dataset; returns how many there are (a tie makes none)."""
    examples = [e for two in chosen for e in pairs(two, PairSettings()) if isinstance(e, Example)]
    leaves = write_part(folder, 0, 1, sort_rows(examples_table(examples)), EXAMPLE_SCHEMA)
    n = len(examples)
    (folder / "manifest.json").write_text(Manifest("examples", "label_pairs", n, n, {}, n, whole_digest(leaves), {}, "0").to_json())
    return n


def fit(examples: Path, output: Path, seed: int, budget: Budget, heads: int = 1, bootstrap: bool = False) -> Path:
    """A small decoder from scratch; a tenth of the labels is held out for the temperature, and the last weights are kept."""
    settings = FitSettings(
        examples=str(examples),
        model="tiny",
        objective="auto",
        net=ModelSettings(members=heads),
        render=RenderSettings(max_length=256),
        batch=BatchSettings(size=16),
        train=TrainSettings(lr=2e-3, epochs=budget.epochs, best_by="last", seed=seed, bootstrap=bootstrap),
        validation_share=0.1,
    )
    return fitting.fit(settings, str(output)).model


def accuracy(model: Path, test: Prompts) -> float:
    """The share of right answers that score above the wrong one beside them."""
    examples = [e for two in test.values() for e in pairs(two, PairSettings()) if isinstance(e, Example)]
    compared = metrics.comparisons(examples, Scorer.load(model)(examples))
    return float((compared.logit > 0).mean())


def one_seed(seed: int, decided: bool, budget: Budget) -> dict[str, Any]:
    """Accuracy and pairs of every arm, and of the start."""
    torch.set_num_threads(1)
    pool, test = toy_prompts(seed, 0, budget.pool, decided), toy_prompts(seed + 10_000, 0, 600, True)
    ids = sorted(pool, key=lambda name: seed_of("order", seed, name))
    begun, rest = ids[: budget.start], sorted(ids[budget.start :])
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_examples(folder / "start", [pool[name] for name in begun])
        ensemble = [str(fit(folder / "start", folder / f"member-{n}", n, budget)) for n in range(budget.members)]
        who = {"seeds": ensemble, "one": ensemble[:1]}
        for name, drawn in (("heads", False), ("bootstrapped", True)):
            who[name] = [str(fit(folder / "start", folder / name, 0, budget, budget.members, drawn))]
        found: dict[str, Any] = {"start": {"accuracy": float(np.mean([accuracy(Path(m), test) for m in ensemble])), "pairs": budget.start}}
        felt: dict[str, float] = {}
        picks = {"random": ids[budget.start : budget.start + budget.more]}
        rollouts = [r for name in rest for r in pool[name]]
        for arm, (settings, scorers) in ARMS.items():
            measured = measure_prompts(rollouts, Members(tuple(who[scorers]), settings))
            felt[arm] = float(np.mean(measured.prompts["uncertainty"].to_numpy()))
            made = choose(measured.prompts, budget.more, settings)
            picks[arm] = [name for name, choice in made.items() if choice.how == "uncertain"]
        for arm, names in picks.items():
            assert len(names) == budget.more, f"{arm} chose {len(names)}"
            labelled = folder / f"arm-{list(picks).index(arm)}"
            count = write_examples(labelled, [pool[name] for name in [*begun, *names]])
            models = [fit(labelled, folder / f"{labelled.name}-model-{n}", 100 + n, budget) for n in range(budget.fits)]
            found[arm] = {
                "accuracy": float(np.mean([accuracy(m, test) for m in models])),
                "pairs": count,
                **({"uncertainty": felt[arm]} if arm in felt else {}),
            }
    return found


def summary(seeds: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Means over seeds with half-widths of their intervals."""
    made = {}
    for arm in seeds[0]:
        mine = np.array([s[arm]["accuracy"] for s in seeds])
        gap = mine - np.array([s["random"]["accuracy"] for s in seeds])
        half = T95[len(seeds)] / len(seeds) ** 0.5
        made[arm] = {
            "accuracy": float(mine.mean()),
            "accuracy_half": float(half * mine.std(ddof=1)),
            "vs_random": float(gap.mean()),
            "vs_random_half": float(half * gap.std(ddof=1)),
            "pairs": float(np.mean([s[arm]["pairs"] for s in seeds])),
        }
        if "uncertainty" in seeds[0][arm]:
            made[arm]["uncertainty"] = float(np.mean([s[arm]["uncertainty"] for s in seeds]))
    return made


def main() -> None:
    """Run both pools, print a table each, and JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2 seeds, smaller ensembles")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--pool", choices=("decided", "any"), help="one pool alone")
    arguments = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "RAYWARD_PROGRESS": "log"}
    budget = Budget(seeds=2, pool=400, start=60, more=60, members=3, fits=1) if arguments.quick else Budget()
    began, told = time.monotonic(), {}
    for name in [arguments.pool] if arguments.pool else ["decided", "any"]:
        with ProcessPoolExecutor(arguments.workers, mp_context=get_context("spawn")) as workers:
            jobs = [workers.submit(one_seed, seed, name == "decided", budget) for seed in range(budget.seeds)]
            told[name] = summary([job.result() for job in jobs])
        print(f"\npool {name}: {budget.start} labels at random, {budget.more} more by\n")
        print(f"{'':<28}{'accuracy':<20}{'vs random':<22}{'uncertainty':<14}pairs to learn from")
        for arm, n in told[name].items():
            gap = f"{n['vs_random']:+.3f} ± {n['vs_random_half']:.3f}" if arm not in ("start", "random") else ""
            felt = f"{n['uncertainty']:.4f}" if "uncertainty" in n else ""
            print(f"{arm:<28}{n['accuracy']:.3f} ± {n['accuracy_half']:.3f}{'':<7}{gap:<22}{felt:<14}{n['pairs']:.0f}")
    print(json.dumps({"budget": asdict(budget), "seconds": round(time.monotonic() - began), "pools": told}))


if __name__ == "__main__":
    main()
