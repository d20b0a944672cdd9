"""Datasets: the same rows are the same digest, a dataset appears whole or not at all, nothing is made twice, counts add up.

The pipelines run as their users run them, script and all, but in this process.
"""

from __future__ import annotations

import hashlib
import json
import random
import runpy
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rayward import dataflow
from rayward.cli import find_script
from rayward.dataflow import Recipe
from rayward.errors import DataError, SettingsError
from rayward.labels import PairSettings
from rayward.records import Message, Rejected, Rollout, prompt_id
from rayward.splits import SIDES, Shares, side
from rayward.storage import Dataset, leaf_digests, open_dataset, part_of, sort_rows

Row = dict[str, Any]


def pipeline(name: str, **settings: Any) -> Any:
    """Run a pipeline by name: `rayward run NAME` without the process."""
    script = runpy.run_path(str(find_script(name)))
    return script["main"](script["Settings"](**{"engine": "local", **settings}))


def rows_of(prompts: int, answers: int = 4, seed: int = 0) -> list[Row]:
    """Rows of our own format with ids of their own."""
    rng = random.Random(seed)
    return [
        {"id": f"p{p}-{a}", "prompt": f"Question {p}?", "steps": [f"step {a}\n", "é"], "reward": rng.choice([0.0, 0.5, 1.0]), "who": "me"}
        for p in range(prompts)
        for a in range(answers)
    ]


def write(path: Path, rows: list[Row]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def imported(source: Path, output: Path, **settings: Any) -> Dataset:
    made = pipeline("import_rollouts", source=str(source), output=str(output), **settings)
    assert made.manifest.rows_in == made.manifest.used + sum(made.manifest.rejected.values())
    assert made.manifest.out == made.table().num_rows
    return made


def without_provenance(dataset: Dataset) -> list[Row]:
    return dataset.table().drop_columns(["provenance"]).to_pylist()


# ------------------------------------------------------------------------------------------------- the same rows, the same digest


def test_the_digest_does_not_depend_on_parts(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", rows_of(60))
    made = [imported(source, tmp_path / f"out{parts}", parts=parts) for parts in (1, 2, 8)]
    assert [len(d.parts) for d in made] == [1, 2, 8]
    assert len({d.manifest.digest for d in made}) == 1
    assert made[0].table().equals(made[1].table())
    assert made[0].table().equals(made[2].table())
    examples = [pipeline("label_pairs", source=str(d.path), output=str(tmp_path / f"pairs{n}")) for n, d in enumerate(made)]
    assert len({d.manifest.digest for d in examples}) == 1
    assert examples[0].manifest.out > 50


@pytest.mark.parametrize("parts", [1, 4])
def test_the_digest_does_not_depend_on_files_or_order(parts: int, tmp_path: Path) -> None:
    rows = rows_of(40)
    one = imported(write(tmp_path / "rows.jsonl", rows), tmp_path / "one")
    again = random.Random(1).sample(rows, len(rows))
    for n in range(7):
        write(tmp_path / "files" / f"{n}.jsonl", again[n::7])
    several = imported(tmp_path / "files", tmp_path / "several", parts=parts)
    assert without_provenance(several) == without_provenance(one)
    assert several.manifest.digest == one.manifest.digest
    assert {r["source"] for r in map(dict, several.table()["provenance"].to_pylist())} == {f"{n}.jsonl" for n in range(7)}


def test_ray_and_this_process_make_the_same(ray_cluster: Any, tmp_path: Path) -> None:
    for n in range(3):
        write(tmp_path / "files" / f"{n}.jsonl", [*rows_of(60)[n::3], {"prompt": "no answer"}])
    made = {}
    for engine in ("local", "ray"):
        folder = tmp_path / engine
        rollouts = imported(tmp_path / "files", folder / "rollouts", parts=4, engine=engine)
        kinds = ["pairs", "rankings", "outcomes", "steps"]
        made[engine] = [rollouts] + [
            pipeline(f"label_{kind}", source=str(rollouts.path), output=str(folder / kind), engine=engine) for kind in kinds
        ]
        made[engine] += pipeline("split_examples", source=str(folder / "pairs"), output=str(folder / "split"), engine=engine)
    for local, on_ray in zip(made["local"], made["ray"], strict=True):
        assert local.manifest.digest == on_ray.manifest.digest
        assert local.manifest.rejected == on_ray.manifest.rejected
        assert (local.manifest.rows_in, local.manifest.used, local.manifest.out) == (
            on_ray.manifest.rows_in,
            on_ray.manifest.used,
            on_ray.manifest.out,
        )
        assert local.table().equals(on_ray.table())
    assert made["ray"][0].manifest.rejected == {"missing key": 3}


def test_a_mistake_that_a_ray_worker_finds_is_the_users_message(ray_cluster: Any, tmp_path: Path) -> None:
    write(tmp_path / "problems.jsonl", [{"question": "largest of 12 13 ?", "answer": "13"}])
    script = runpy.run_path(str(find_script("sample_rollouts")))
    sample = script["SampleSettings"](policy="tyo")
    with pytest.raises(SettingsError, match="did you mean toy"):
        pipeline("sample_rollouts", problems=str(tmp_path), output=str(tmp_path / "out"), sample=sample, engine="ray")
    assert [p.name for p in tmp_path.iterdir()] == ["problems.jsonl"]


@pytest.mark.parametrize(
    "change",
    [{"steps": ["step 1\né"]}, {"reward": None}, {"reward": 0.25}, {"correct": True}, {"rewards": {"kind": 1}}, {"prompt": "Other?"}],
)
def test_a_changed_cell_changes_the_digest(change: Row, tmp_path: Path) -> None:
    rows = rows_of(5)
    one = imported(write(tmp_path / "rows.jsonl", rows), tmp_path / "one")
    rows[7] = {**rows[7], **change}
    other = imported(write(tmp_path / "rows.jsonl", rows), tmp_path / "other")
    assert one.manifest.digest != other.manifest.digest


# ----------------------------------------------------------------------------------------------------------------- digests

TEXTS = st.none() | st.text(max_size=4)
COLUMNS: dict[str, tuple[pa.DataType, st.SearchStrategy[Any]]] = {
    "text": (pa.string(), TEXTS),
    "number": (pa.float64(), st.none() | st.floats(allow_nan=False)),
    "whole": (pa.int32(), st.none() | st.integers(-5, 5)),
    "flag": (pa.bool_(), st.none() | st.booleans()),
    "texts": (pa.list_(pa.string()), st.none() | st.lists(TEXTS, max_size=3)),
    "deep": (pa.list_(pa.list_(pa.string())), st.none() | st.lists(st.none() | st.lists(TEXTS, max_size=2), max_size=2)),
    "map": (pa.map_(pa.string(), pa.float64()), st.none() | st.dictionaries(st.text(max_size=2), st.none() | st.floats(0, 1)).map(sorted_items)),
    "structs": (
        pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())])),
        st.none() | st.lists(st.none() | st.fixed_dictionaries({"role": TEXTS, "content": TEXTS}), max_size=2),
    ),
}
