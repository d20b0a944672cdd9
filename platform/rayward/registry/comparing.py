"""Versions side by side: what differs in what they learned from and how, and how good they are on the same tests.

    registry.compare(["toy-pairs/1", "toy-pairs/2"])      # a plain dict, as `rayward models compare --json` prints it

A version's settings are the parameters of the run that made it, its labels and validation figures are its tags, and `evaluate_model` has
left tags and a run for every report on it. Two reports are on the same test where the examples have the same digest, or the suite has the
same name.

A difference has an interval where both reports kept what every example adds to the figure: the bootstrap then draws the prompts that both
models scored, and takes both figures from the same draw (paired). Where one of them did not, the two intervals are laid side by side, and
it is said whether they overlap, which is no test. Nothing is called significant.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rayward import metrics
from rayward.errors import RegistryError
from rayward.registry import backend
from rayward.registry.versions import find

ELSEWHERE = {"output", "register", "examples"}  # parameters of a run that are no settings, or are told with the labels
TOTAL, WEIGHT = ".total", ".weight"  # columns of scores.parquet: what a row adds to a figure
Row = Mapping[str, Any]


@backend.explaining()
def compare(references: Sequence[str]) -> dict[str, Any]:
    """Versions (`NAME`, `NAME@ALIAS`, `NAME/VERSION`) side by side; differences are to the first.

    Raises:
        RegistryError: if one is not known, two are the same, or there is one alone.
    """
    rows = [find(reference) for reference in references]
    _check(references, rows)
    return {
        "versions": [
            {**{name: row[name] for name in ("name", "version", "aliases", "created", "run_id")}, "code": row["tags"].get("code_version")}
            for row in rows
        ],
        "settings": _differing([_settings(row) for row in rows]),
        "labels": {"digests": [row["tags"].get("data_digest") for row in rows], "differ": _differing([_labels(row) for row in rows])},
        "validation": _validation(rows),
        "reports": _reports(rows),
        "tests": [[name for name, _ in _tests(row).values()] for row in rows],
    }


def _check(references: Sequence[str], rows: Sequence[Row]) -> None:
    if len(rows) < 2:
        raise RegistryError(f"{references[0]} alone is nothing to compare", "name two versions: rayward models compare NAME/1 NAME/2")
    seen: dict[tuple[str, str], str] = {}
    for reference, row in zip(references, rows, strict=True):
        key = (row["name"], row["version"])
        if key in seen:
            raise RegistryError(f"{seen[key]} and {reference} are the same: {'/'.join(key)}", "rayward models list shows which there are")
        seen[key] = reference


def _differing(each: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What is not the same in all.

    >>> _differing([{"a": "1", "b": "2"}, {"a": "1", "b": "3", "c": "4"}])
    [{'name': 'b', 'values': ['2', '3']}, {'name': 'c', 'values': [None, '4']}]
    """
    names = dict.fromkeys(name for values in each for name in values)
    rows = [{"name": name, "values": [values.get(name) for values in each]} for name in sorted(names)]
    return [row for row in rows if len(set(row["values"])) > 1]


def _settings(row: Row) -> dict[str, Any]:
    """What a version was trained with; `auto` as what it came to."""
    own = {name: value for name, value in row["params"].items() if name not in ELSEWHERE}
    tags = row["tags"]
    return {
        **own,
        **{name: tags[tag] for name, tag in (("objective", "objective"), ("chat template", "chat_template_sha256")) if tag in tags},
    }


def _labels(row: Row) -> dict[str, Any]:
    """What a version learned from: where it lay, how many examples, how they were labeled, and from what."""
    return {n: v for n, v in row["tags"].items() if n in ("labeler", "data_digest") or n.startswith(("label.", "examples."))}


def _validation(rows: Sequence[Row]) -> dict[str, Any]:
    """The figures of the kept weights on validation; `same` where data, share and count are, by which the examples are chosen."""
    best = [{n.removeprefix("best_"): float(v) for n, v in row["tags"].items() if n.startswith("best_")} for row in rows]
    sides = {
        (row["tags"].get("data_digest"), row["params"].get("validation_share"), row["tags"].get("examples.validation")) for row in rows
    }
    names = dict.fromkeys(name for values in best for name in values)
    return {
        "same": len(sides) == 1,
        "examples": [row["tags"].get("examples.validation") for row in rows],
        "figures": [{"name": name, "values": [values.get(name) for values in best]} for name in names],
    }


# ----------------------------------------------------------------------------------------------------------------- reports


def _tests(row: Row) -> dict[str, tuple[str, dict[str, float]]]:
    """The tests a version has a report on: identity -> name and figures. A dataset is its digest, a suite its name."""
    names = sorted((tag.removesuffix(" run") for tag in row["tags"] if tag.endswith(" run")), key=len, reverse=True)
    figures: dict[str, dict[str, float]] = {name: {} for name in names}
    for tag, value in row["tags"].items():
        owner = next((name for name in names if tag.startswith(name + " ")), None)  # the longest: one name may begin another
        if owner and re.fullmatch(r"-?\d+\.\d+", value):
            figures[owner][tag.removeprefix(owner + " ")] = float(value)
    by_digest = {name: re.search(r" ([0-9a-f]{8})$", name) for name in names}
    return {(found[1] if (found := by_digest[name]) else name): (name, figures[name]) for name in names}


def _reports(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The tests that a version shares with another, with the figures of all that have it."""
    tests = [_tests(row) for row in rows]
    names = dict.fromkeys(key for each in tests for key in each)
    found = []
    for key in names:
        there = [n for n, each in enumerate(tests) if key in each]
        if len(there) > 1:
            found.append(_report(tests[there[0]][key][0], there, [tests[n][key] for n in there], [rows[n] for n in there]))
    return found


def _report(name: str, there: list[int], tests: Sequence[tuple[str, dict[str, float]]], rows: Sequence[Row]) -> dict[str, Any]:
    scores = [_scores(row["tags"][f"{test[0]} run"]) for row, test in zip(rows, tests, strict=True)]
    paired = [_pair(scores[0], other) for other in scores[1:]]
    ends = ("_low", "_high")
    names = dict.fromkeys(n for _, figures in tests for n in figures)
    plain = [n for n in names if not (n.endswith(ends) and re.sub("_(low|high)$", "", n) in names)]
    return {
        "on": name,
        "versions": there,
        "paired": [pair if isinstance(pair, str) else len(set(pair[2])) for pair in paired],  # prompts, or why not
        "figures": [_figure(n, [figures for _, figures in tests], paired) for n in plain],
    }


def _figure(name: str, each: Sequence[Mapping[str, float]], paired: Sequence[Any]) -> dict[str, Any]:
    """A figure of every version with its interval, and how far each is from the first."""
    intervals = [[f[f"{name}_low"], f[f"{name}_high"]] if f"{name}_high" in f else None for f in each]
    values, differences = [f.get(name) for f in each], []
    for value, interval, pair in zip(values[1:], intervals[1:], paired, strict=True):
        first, own = intervals[0], interval
        made: dict[str, Any] = {
            "value": None if value is None or values[0] is None else value - values[0],
            "interval": None,
            "overlap": None if first is None or own is None else first[0] <= own[1] and own[0] <= first[1],
        }
        if not isinstance(pair, str) and (found := _difference(name, *pair)):
            made["value"], made["interval"] = found
        differences.append(made)
    return {"name": name, "values": values, "intervals": intervals, "differences": differences}


def _scores(run_id: str) -> pa.Table | None:
    """What an evaluation kept of every example; None where it is gone, or was made before it was kept."""
    mlflow = backend.mlflow()
    try:
        with backend.no_chatter():
            return pq.read_table(Path(mlflow.artifacts.download_artifacts(f"runs:/{run_id}/scores.parquet")))
    except (OSError, mlflow.MlflowException):
        return None


def _pair(first: pa.Table | None, other: pa.Table | None) -> tuple[pa.Table, pa.Table, list[str]] | str:
    """The rows of the examples that both scored, in one order, and their prompts; or why there are none."""
    if first is None or other is None:
        return "a report keeps no scores of single examples: evaluate the model again"
    at = [{name: n for n, name in enumerate(table["id"].to_pylist())} for table in (first, other)]
    if any(len(a) < table.num_rows for a, table in zip(at, (first, other), strict=True)):
        return "two examples have the same id"
    both = [name for name in at[0] if name in at[1]]
    if not both:
        return "the reports are not on the same examples"
    one, two = (table.take([a[name] for name in both]) for a, table in zip(at, (first, other), strict=True))
    if one["targets"] != two["targets"] or one["prompt_id"] != two["prompt_id"]:
        return "the reports are not on the same examples"
    return one, two, one["prompt_id"].to_pylist()


def _difference(name: str, first: pa.Table, other: pa.Table, prompts: Sequence[str]) -> tuple[float, list[float]] | None:
    """other - first of a figure over the same examples, and its 95 % bootstrap interval over their prompts; None if they do not make it."""
    if not all(name + TOTAL in table.column_names and np.any(table[name + WEIGHT].to_numpy()) for table in (first, other)):
        return None
    weight = first[name + WEIGHT].to_numpy()
    gap = other[name + TOTAL].to_numpy() - first[name + TOTAL].to_numpy()
    low, high = metrics.bootstrap(prompts, gap, weight)
    return float(np.sum(gap) / np.sum(weight)), [low, high]
