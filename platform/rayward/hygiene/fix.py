"""Findings turned into rejects: a cleaned dataset beside the findings, with the reason for every example that was left out.

    OUTPUT/fixed/             the dataset, or train/ validation/ test/ as the source has them
    OUTPUT/fixed/rejects/     examples with `exact duplicates: it says what EXAMPLE says`, ...

The first reason in the order of FixSettings is the one that is written. What overlaps is taken out of the side that trains: out of train
where validation or test has it too, out of validation where test has it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from rayward import dataflow
from rayward.dataflow import Made, Recipe
from rayward.hygiene.findings import Finding
from rayward.hygiene.lint import Source
from rayward.places import at
from rayward.records import Rejected, rejects_table
from rayward.storage import Dataset, opened


@dataclass(frozen=True)
class FixSettings:
    """Which findings are turned into rejects."""

    identical: bool = True  # compared answers of one text
    identical_after_truncation: bool = True  # compared answers of the same tokens
    empty: bool = True  # an answer or a prompt of whitespace
    overlap: bool = True  # trained on, and in an evaluation set of --against
    prompts_across_sides: bool = True  # the prompt is on a later side
    near_duplicates_across_sides: bool = True  # a prompt like it is on a later side
    contradictions: Literal["both", "minority", "keep"] = "both"  # leave out all that contradict, only the outvoted (or tied), or none
    exact_duplicates: bool = True  # all but the first by id


REASONS = {
    "identical": "two of its answers are the same text",
    "identical_after_truncation": "its answers are the same tokens",
    "empty": "an answer or the prompt has no text",
    "overlap": "its prompt is in {set}",
    "prompts_across_sides": "its prompt is on another side too",
    "near_duplicates_across_sides": "a prompt like it is on another side",
    "contradictions": "it contradicts {other}",
    "exact_duplicates": "it says what {other} says",
}


def plan(findings: Sequence[Finding], settings: FixSettings) -> dict[int, str]:
    """Which rows are left out, and why: the reason by the number of the row."""
    reasons: dict[int, str] = {}
    for name in (f.name for f in fields(FixSettings)):
        how = getattr(settings, name)
        for finding in findings if how not in (False, "keep") else ():
            kind, _, evaluation_set = finding.name.partition(":")
            if kind != name:
                continue
            other = dict(zip(finding.hits.rows.tolist(), finding.partner_ids, strict=True))
            for row in (finding.outvoted if how == "minority" else finding.fix).tolist():
                words = REASONS[name].format(set=evaluation_set, other=other.get(row) or "itself")
                reasons.setdefault(row, f"{name.replace('_', ' ')}: {words}")
    return reasons


def fix(source: Source, reasons: Mapping[int, str], recipe: Recipe) -> list[Dataset]:
    """The source without these rows; the recipe's output is the folder that `fixed` lies in."""
    made = []
    for side, dataset in source.sides.items():
        output = at(recipe.output) / "fixed" / side if side else at(recipe.output) / "fixed"
        if isinstance(output, Path):
            output.parent.mkdir(parents=True, exist_ok=True)
        starts = _starts(dataset, source.first_rows()[side])
        leave_out = partial(_leave_out, dict(reasons), starts)
        of_side = replace(recipe, output=str(output), made_by=f"lint_examples{' ' + side if side else ''}")
        made += dataflow.transform(of_side, dataset, lambda leave_out=leave_out: leave_out, kind="examples")  # type: ignore[misc]
    return made


def _starts(dataset: Dataset, first: int) -> dict[str, int]:
    """The number of the first row of every part, by the prompt it starts with (no other part has it)."""
    starts = {}
    for part in dataset.parts:
        with opened(part) as file:
            for batch in file.iter_batches(batch_size=1, columns=["prompt_id"]):
                starts[batch["prompt_id"][0].as_py()] = first
                break
            first += file.metadata.num_rows
    return starts


def _leave_out(reasons: Mapping[int, str], starts: Mapping[str, int], table: pa.Table) -> Made:
    """One part without the rows that have a reason."""
    if not table.num_rows:
        return Made({"": table}, rejects_table([]), 0)
    first = starts[table["prompt_id"][0].as_py()]
    out = np.array([first + n in reasons for n in range(table.num_rows)])
    rejects = [
        Rejected(source="examples", row=row["id"], reason=reasons[first + n], raw=_raw(row))
        for n, row in zip(np.flatnonzero(out).tolist(), table.filter(pa.array(out)).to_pylist(), strict=True)
    ]
    kept = table.filter(pa.array(~out))
    return Made({"": kept}, rejects_table(rejects), kept.num_rows)


def _raw(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, default=repr)
