"""Datasets: the same rows are the same digest, a dataset appears whole or not at all, nothing is made twice, counts add up.

The pipelines run as their users run them, script and all, but in this process.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import runpy
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rayward import dataflow, storage
from rayward.cli import find_script
from rayward.config import as_dict
from rayward.dataflow import Recipe, claims
from rayward.errors import DataError, SettingsError
from rayward.labels import PairSettings
from rayward.policies import POLICIES, Completion, Request
from rayward.records import Message, Rejected, Rollout, prompt_id
from rayward.sampling import SampleSettings
from rayward.splits import SIDES, Shares, side
from rayward.storage import Dataset, leaf_digests, open_dataset, part_of, sort_rows, whole_digest

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
    sample = runpy.run_path(str(find_script("sample_rollouts")))["SampleSettings"]
    where = {"problems": "toy:10", "output": str(tmp_path / "out"), "engine": "ray"}
    with pytest.raises(SettingsError, match="did you mean slip"):
        pipeline("sample_rollouts", **where, sample=sample(policy_settings='{"slipp": 0.3}'))
    assert list(tmp_path.iterdir()) == []


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


def test_the_digest_can_be_taken_again_from_the_files(tmp_path: Path) -> None:
    rollouts = imported(write(tmp_path / "rows.jsonl", rows_of(30)), tmp_path / "rollouts", parts=4)
    examples = pipeline("label_pairs", source=str(rollouts.path), output=str(tmp_path / "pairs"))
    for dataset in (rollouts, examples):
        assert whole_digest(leaf_digests(dataset.table())) == dataset.manifest.digest


# ----------------------------------------------------------------------------------------------------------------- digests

TEXTS = st.none() | st.text(max_size=4)
SHARES = st.none() | st.floats(0, 1)
COLUMNS: dict[str, tuple[pa.DataType, st.SearchStrategy[Any]]] = {
    "text": (pa.string(), TEXTS),
    "number": (pa.float64(), SHARES),
    "whole": (pa.int32(), st.none() | st.integers(-5, 5)),
    "flag": (pa.bool_(), st.none() | st.booleans()),
    "texts": (pa.list_(pa.string()), st.none() | st.lists(TEXTS, max_size=3)),
    "deep": (pa.list_(pa.list_(pa.string())), st.none() | st.lists(st.none() | st.lists(TEXTS, max_size=2), max_size=2)),
    "map": (pa.map_(pa.string(), pa.float64()), st.none() | st.lists(st.tuples(st.text(max_size=2), SHARES), max_size=2)),
    "structs": (
        pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())])),
        st.none() | st.lists(st.none() | st.fixed_dictionaries({"role": TEXTS, "content": TEXTS}), max_size=2),
    ),
}
NESTED = pa.schema([("prompt_id", pa.string()), ("id", pa.string()), *((name, kind) for name, (kind, _) in COLUMNS.items())])
PROMPT_IDS = st.sampled_from(["00a", "00b", "7f1", "ff2"])
NESTED_ROWS = st.lists(
    st.fixed_dictionaries({"prompt_id": PROMPT_IDS, "id": st.text(max_size=2), **{name: values for name, (_, values) in COLUMNS.items()}}),
    min_size=1,
    max_size=4,
)


def nested_table(rows: list[Row]) -> pa.Table:
    return sort_rows(pa.Table.from_pylist(rows, schema=NESTED))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(rows=NESTED_ROWS, others=NESTED_ROWS, data=st.data())
def test_digests_do_not_depend_on_how_arrow_lays_a_table_out(rows: list[Row], others: list[Row], data: st.DataObject) -> None:
    table, other = nested_table(rows), nested_table(others)
    cut = data.draw(st.integers(0, len(rows)))
    mask = pa.array([False] * len(others) + [True] * len(rows))
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    layouts = [
        pa.concat_tables([table.slice(0, cut), table.slice(cut)]),
        pa.concat_tables([other, table, other]).combine_chunks().slice(len(others), len(rows)),
        pa.concat_tables([other, table]).filter(mask),
        table.take(pa.array(range(len(rows)))),
        pq.read_table(pa.BufferReader(sink.getvalue())),
    ]
    assert all(layout.equals(table) for layout in layouts)
    assert all(leaf_digests(layout) == leaf_digests(table) for layout in layouts)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(rows=NESTED_ROWS, data=st.data())
def test_a_changed_cell_changes_the_digest_of_its_range_only(rows: list[Row], data: st.DataObject) -> None:
    before = nested_table(rows).to_pylist()
    at = data.draw(st.integers(0, len(rows) - 1))
    name = data.draw(st.sampled_from(list(COLUMNS)))
    after = [*before[:at], {**before[at], name: data.draw(COLUMNS[name][1])}, *before[at + 1 :]]
    one, other = (pa.Table.from_pylist(made, schema=NESTED) for made in (before, after))
    assume(not one.equals(other))
    digests, changed = leaf_digests(one), leaf_digests(other)
    assert {leaf for leaf in digests if digests[leaf] != changed[leaf]} == {before[at]["prompt_id"][:2]}


def test_lists_that_hold_the_same_words_differently_have_different_digests() -> None:
    columns: list[list[Any]] = [
        [["ab"], []],
        [[], ["ab"]],
        [["a", "b"], []],
        [["a"], ["b"]],
        [["ab", ""], []],
        [["", "ab"], []],
        [["ab", None], []],
        [["ab"], None],
        [["ab"], [None]],
        [["ab"], [""]],
    ]
    base = {"prompt_id": ["00", "00"], "id": ["a", "b"]}
    tables = [pa.table({**base, "texts": pa.array(column, pa.list_(pa.string()))}) for column in columns]
    assert len({leaf_digests(table)["00"] for table in tables}) == len(tables)


@pytest.mark.parametrize(
    ("kind", "nothing"),
    [(pa.string(), ""), (pa.float64(), 0.0), (pa.bool_(), False), (pa.list_(pa.string()), []), (pa.map_(pa.string(), pa.float64()), [])],
    ids=str,
)
def test_a_null_is_not_nothing_and_stands_where_it_stands(kind: pa.DataType, nothing: object) -> None:
    columns = [[None, None], [None, nothing], [nothing, None], [nothing, nothing]]
    tables = [pa.table({"prompt_id": ["00", "00"], "id": ["a", "b"], "x": pa.array(column, kind)}) for column in columns]
    assert len({leaf_digests(table)["00"] for table in tables}) == 4


# ---------------------------------------------------------------------------------------------------- whole or not at all


@dataclass(frozen=True)
class SomeSettings:
    seed: int = 0


def recipe(output: Path, overwrite: bool = False, seed: int = 0) -> Recipe:
    return Recipe(made_by="a test", output=str(output), settings=SomeSettings(seed), inputs=[], engine="local", overwrite=overwrite)


def some_rollout(name: str) -> Rollout:
    return Rollout(id=name, prompt=(Message("user", f"Question {name}?"),), steps=("Yes.",))


def whole(task: dict[str, Any]) -> Iterator[list[Rollout] | Rejected]:
    yield [some_rollout("a"), some_rollout("b")]
    yield Rejected(source="s", row="2", reason="empty: nothing")


def breaks_off(task: dict[str, Any]) -> Iterator[list[Rollout] | Rejected]:
    yield from whole(task)
    raise {"the power": RuntimeError, "the user": KeyboardInterrupt}[task["by"]]


def state(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file below a folder, with when it was written and what it holds."""
    return {str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("by", ["the power", "the user"])
def test_a_run_that_breaks_off_leaves_nothing(by: str, tmp_path: Path) -> None:
    with pytest.raises((RuntimeError, KeyboardInterrupt)):
        dataflow.ingest(recipe(tmp_path / "out"), [{"by": by}], breaks_off, unit="files", size=0, parts=2)
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_breaks_off_leaves_what_was_there(tmp_path: Path) -> None:
    made = dataflow.ingest(recipe(tmp_path / "out"), [{}], whole, unit="files", size=0, parts=2)
    assert (made.manifest.rows_in, made.manifest.used, made.manifest.out) == (2, 1, 2)
    before = state(tmp_path)
    again = recipe(tmp_path / "out", overwrite=True)
    with pytest.raises(RuntimeError):
        dataflow.ingest(again, [{"by": "the power"}], breaks_off, unit="files", size=0)
    assert state(tmp_path) == before


@pytest.mark.parametrize("breaks_at", [1, 2, 3, 4])
def test_a_transform_that_broke_off_goes_on_with_the_parts_that_are_missing(tmp_path: Path, breaks_at: int) -> None:
    source = imported(write(tmp_path / "rows.jsonl", rows_of(60)), tmp_path / "in", parts=4)
    calls = []

    def work(table: pa.Table, breaks_at: int = 0) -> dataflow.Made:
        calls.append(table.num_rows)
        if len(calls) == breaks_at:
            raise RuntimeError
        return dataflow.Made({"": table}, source.rejects(), table.num_rows)

    with pytest.raises(RuntimeError):
        dataflow.transform(recipe(tmp_path / "out"), source, lambda: partial(work, breaks_at=breaks_at), kind="rollouts")
    assert not (tmp_path / "out").exists()
    assert (tmp_path / ".out.partial").exists() == (breaks_at > 1)  # where nothing was done, nothing is kept
    calls.clear()
    [made] = dataflow.transform(recipe(tmp_path / "out"), source, lambda: work, kind="rollouts")
    assert len(calls) == 4 - (breaks_at - 1)
    assert made.manifest.digest == source.manifest.digest
    assert made.manifest.rows_in == made.manifest.out == 240
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out", "rows.jsonl"]
    assert sorted(p.name for p in made.path.iterdir()) == ["manifest.json", *(p.name for p in made.parts)]


def test_a_kill_while_a_dataset_is_published_costs_nothing_that_was_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = imported(write(tmp_path / "rows.jsonl", rows_of(60)), tmp_path / "in", parts=4)
    calls: list[int] = []

    def work(table: pa.Table) -> dataflow.Made:
        calls.append(0)
        return dataflow.Made({"": table}, source.rejects(), table.num_rows)

    def dies(path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(storage, "_to_disk", dies)
        with pytest.raises(KeyboardInterrupt):
            dataflow.transform(recipe(tmp_path / "out"), source, lambda: work, kind="rollouts")
    [made] = dataflow.transform(recipe(tmp_path / "out"), source, lambda: work, kind="rollouts")
    assert len(calls) == 4
    assert made.manifest.digest == source.manifest.digest
    assert sorted(p.name for p in made.path.iterdir()) == ["manifest.json", *(p.name for p in made.parts)]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out", "rows.jsonl"]


def test_a_lock_that_was_published_with_its_stage_is_held_by_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = tmp_path / ".out.partial"
    monkeypatch.setattr("rayward.dataflow.claims.fcntl.flock", lambda file, how: stage.rename(tmp_path / "out"))
    with pytest.raises(DataError, match="another run is making"), claims.claimed(stage, tmp_path / "out"):
        pass


@pytest.mark.parametrize("killed_at", ["lay-out/000001", "join/000000", "join/000002"])
def test_an_import_that_was_killed_goes_on_and_gives_the_same_digest(
    tmp_path: Path, killed_at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    for n in range(3):
        write(source / f"{n}.jsonl", [*({**row, "id": f"{n}-{row['id']}"} for row in rows_of(40, seed=n)), {"prompt": ""}])
    clean = imported(source, tmp_path / "clean", parts=4)
    replace, seen = os.replace, []

    def dies(aside: Path, marker: Path) -> None:
        name = f"{marker.parent.name}/{marker.stem}"
        if name == killed_at:
            raise KeyboardInterrupt
        if marker.parent.parent.name == "done":
            seen.append(name)
        replace(aside, marker)

    monkeypatch.setattr("rayward.dataflow.engine.os.replace", dies)
    with pytest.raises(KeyboardInterrupt):
        imported(source, tmp_path / "out", parts=4)
    before, killed_at = list(seen), "never"
    made = imported(source, tmp_path / "out", parts=4)
    assert len(seen) == len(set(seen)) == 3 + 4, seen  # every task was finished once
    assert before
    assert made.manifest.digest == clean.manifest.digest
    assert made.manifest.rejected == clean.manifest.rejected == {"missing key": 3}
    assert made.rejects().num_rows == 3
    assert made.table().equals(clean.table())


def test_what_a_run_with_other_settings_left_is_no_part_of_the_next(tmp_path: Path) -> None:
    source = imported(write(tmp_path / "rows.jsonl", rows_of(60)), tmp_path / "in", parts=4)
    calls = []

    def breaks_off(table: pa.Table) -> dataflow.Made:
        calls.append(0)
        if len(calls) == 3:
            raise RuntimeError
        return dataflow.Made({"": table.slice(1)}, source.rejects(), table.num_rows)

    with pytest.raises(RuntimeError):
        dataflow.transform(recipe(tmp_path / "out", seed=1), source, lambda: breaks_off, kind="rollouts")
    [made] = dataflow.transform(
        recipe(tmp_path / "out", seed=2), source, lambda: lambda t: dataflow.Made({"": t}, source.rejects(), len(t)), kind="rollouts"
    )
    assert made.manifest.digest == source.manifest.digest


def test_two_runs_cannot_make_one_output_at_a_time(tmp_path: Path) -> None:
    def second(_: dict[str, Any]) -> Iterator[list[Rollout] | Rejected]:
        with pytest.raises(DataError, match="another run is making"):
            dataflow.ingest(recipe(tmp_path / "out"), [{}], whole, unit="files", size=0)
        yield from whole({})

    dataflow.ingest(recipe(tmp_path / "out"), [{}], second, unit="files", size=0)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_replacing_a_file_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    dataflow.ingest(recipe(tmp_path / "out", overwrite=True), [{}], whole, unit="files", size=0)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


# -------------------------------------------------------------------------------------------------------- nothing made twice


def test_a_second_identical_run_does_nothing(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", rows_of(20))

    def everything() -> None:
        imported(source, tmp_path / "rollouts")
        pipeline("label_pairs", source=str(tmp_path / "rollouts"), output=str(tmp_path / "pairs"))
        pipeline("split_examples", source=str(tmp_path / "pairs"), output=str(tmp_path / "split"))

    everything()
    before = state(tmp_path)
    everything()
    assert state(tmp_path) == before


def test_another_run_into_the_same_folder_is_refused_unless_it_may_overwrite(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", rows_of(20))
    rollouts = imported(source, tmp_path / "rollouts")
    where = {"source": str(rollouts.path), "output": str(tmp_path / "pairs")}
    pipeline("label_pairs", **where)
    before = state(tmp_path)
    other = PairSettings(min_gap=0.75)
    with pytest.raises(DataError, match=r"pairs already holds something else\n.*--overwrite"):
        pipeline("label_pairs", **where, label=other)
    with pytest.raises(DataError, match="already holds something else"):
        pipeline("label_rankings", **where)
    assert state(tmp_path) == before
    assert pipeline("label_pairs", **where, label=other, overwrite=True).manifest.settings["label"]["min_gap"] == 0.75
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pairs", "rollouts", "rows.jsonl"]


def test_other_rows_in_the_source_are_another_run(tmp_path: Path) -> None:
    imported(write(tmp_path / "rows.jsonl", rows_of(20)), tmp_path / "out")
    write(tmp_path / "rows.jsonl", rows_of(21))
    with pytest.raises(DataError, match="already holds something else"):
        imported(tmp_path / "rows.jsonl", tmp_path / "out")


def test_other_rows_in_a_saved_set_are_another_run(tmp_path: Path) -> None:
    for name, prompts in (("one", 20), ("other", 21)):
        datasets.Dataset.from_list(rows_of(prompts)).save_to_disk(tmp_path / name)
    assert imported(tmp_path / "one", tmp_path / "out").manifest.out == 80
    with pytest.raises(DataError, match="already holds something else"):
        imported(tmp_path / "other", tmp_path / "out")


def test_the_same_files_by_another_path_are_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "rows.jsonl", rows_of(20))
    imported(source, tmp_path / "out")
    before = state(tmp_path)
    monkeypatch.chdir(tmp_path)
    imported(Path("rows.jsonl"), Path("out"))
    assert state(tmp_path) == before


@pytest.mark.parametrize("content", ["", "{", "{}", "[]", "null", '"text"', '{"in": 1}'])
def test_a_folder_of_somebody_elses_is_never_written_to(content: str, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "manifest.json").write_text(content)
    before = state(tmp_path)
    with pytest.raises(DataError):
        dataflow.ingest(recipe(tmp_path / "out"), [{}], whole, unit="files", size=0)
    with pytest.raises(DataError, match=r"manifest\.json cannot be read"):
        open_dataset(tmp_path / "out")
    assert state(tmp_path) == before


# -------------------------------------------------------------------------------------------------------------- counts add up


@pytest.mark.parametrize("parts", [1, 4])
def test_of_rows_with_one_id_one_is_kept_whatever_their_order(parts: int, tmp_path: Path) -> None:
    rows = rows_of(10)
    doubles = [{**rows[3], "steps": ["Other."]}, {**rows[3], "reward": 0.75}, rows[8], {**rows[5], "prompt": "Another question?"}]
    made = []
    for n in range(6):
        mixed = random.Random(n).sample(rows + doubles, len(rows) + len(doubles))
        made.append(imported(write(tmp_path / f"{n}.jsonl", mixed), tmp_path / f"out{n}", parts=parts))
        assert (made[n].manifest.rows_in, made[n].manifest.used, made[n].manifest.out) == (44, 41, 41)
        assert made[n].manifest.rejected == {"duplicate id": 3}
        assert Counter(r["row"] for r in made[n].rejects().to_pylist()) == {rows[3]["id"]: 2, rows[8]["id"]: 1}
    assert all(without_provenance(d) == without_provenance(made[0]) for d in made)


def test_no_file_and_no_row_are_counted_too(tmp_path: Path) -> None:
    write(tmp_path / "in" / "empty.jsonl", [])
    write(tmp_path / "in" / "bad.jsonl", [{"prompt": "no answer"}])
    made = imported(tmp_path / "in", tmp_path / "out", format="rollouts")
    assert (made.manifest.rows_in, made.manifest.used, made.manifest.out) == (1, 0, 0)
    labelled = pipeline("label_pairs", source=str(tmp_path / "out"), output=str(tmp_path / "pairs"))
    assert labelled.manifest.out == labelled.table().num_rows == 0
    assert [d.manifest.out for d in pipeline("split_examples", source=str(labelled.path), output=str(tmp_path / "split"))] == [0, 0, 0]


@pytest.mark.parametrize("parts", [-1, 3, 512])
def test_a_number_of_parts_that_cannot_be_is_refused(parts: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="parts"):
        imported(write(tmp_path / "rows.jsonl", rows_of(3)), tmp_path / "out", parts=parts)


def test_bad_problems_are_rejected_and_good_ones_sampled(tmp_path: Path) -> None:
    good = b'{"question": "largest of 12 13 11 ?", "gold": 13}'
    bad = [b"", b"{", b"[]", b"[" * 5_000, b"\xff", b'{"question": "a"}', b'{"question": "a", "gold": " "}', b'{"question": "", "gold": 1}']
    (tmp_path / "problems.jsonl").write_bytes(b"\n".join([good, *bad, good]))
    made = pipeline("sample_rollouts", problems=str(tmp_path / "problems.jsonl"), output=str(tmp_path / "out"))
    assert (made.manifest.rows_in, made.manifest.used, made.manifest.out) == (10, 2, 16)
    assert sorted(int(r["row"]) for r in made.rejects().to_pylist()) == list(range(2, 10))


@pytest.mark.parametrize("policy_settings", ["[1]", "3", '"slip"', "{"])
def test_policy_settings_that_are_no_settings_are_refused(policy_settings: str) -> None:
    with pytest.raises(ValueError, match="policy_settings"):
        SampleSettings(policy_settings=policy_settings)


# ------------------------------------------------------------------------------------------------------------------- split


def prompts_of(dataset: Dataset) -> set[str]:
    return set(dataset.table()["prompt_id"].to_pylist())


def test_a_split_sends_every_prompt_to_one_side(tmp_path: Path) -> None:
    rollouts = imported(write(tmp_path / "rows.jsonl", rows_of(200)), tmp_path / "rollouts", parts=2)
    sides = pipeline("split_examples", source=str(rollouts.path), output=str(tmp_path / "split"))
    assert [d.path.name for d in sides] == list(SIDES)
    assert sum(d.manifest.out for d in sides) == rollouts.manifest.out == 800
    assert sum(len(prompts_of(d)) for d in sides) == len(prompts_of(rollouts)) == 200
    assert all(d.manifest.rows_in == d.manifest.out == d.table().num_rows > 0 for d in sides)
    assert sort_rows(pa.concat_tables([d.table() for d in sides])).equals(rollouts.table())


def test_more_data_moves_no_prompt_to_another_side(tmp_path: Path) -> None:
    rows = rows_of(100)
    for name, some in (("few", rows[:150]), ("all", rows[::-1])):
        rollouts = imported(write(tmp_path / f"{name}.jsonl", some), tmp_path / name, parts=len(name) - 2)
        pipeline("split_examples", source=str(rollouts.path), output=str(tmp_path / f"{name}-split"))
    few, every = ({s: prompts_of(open_dataset(tmp_path / f"{name}-split" / s)) for s in SIDES} for name in ("few", "all"))
    assert all(few[s] <= every[s] for s in SIDES)
    assert sum(map(len, few.values())) == 38


def test_the_shares_of_a_split_are_about_right_and_salt_is_another_split() -> None:
    ids = [prompt_id((Message("user", str(n)),)) for n in range(10_000)]
    shares = Shares(validation=0.1, test=0.2)
    sides = Counter(side(i, shares) for i in ids)
    assert abs(sides["test"] - 2_000) < 4 * 40  # four standard deviations
    assert abs(sides["validation"] - 1_000) < 4 * 30
    again = sum(side(i, shares) == side(i, Shares(validation=0.1, test=0.2, salt="2")) for i in ids) / len(ids)
    assert abs(again - (0.7**2 + 0.2**2 + 0.1**2)) < 0.02  # as two independent draws agree
    assert {side(i, Shares(validation=0, test=0)) for i in ids} == {"train"}


@pytest.mark.parametrize("shares", [{"test": -0.1}, {"test": 1.0}, {"test": 0.6, "validation": 0.4}, {"test": float("nan")}])
def test_shares_that_leave_nothing_to_train_on_are_refused(shares: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be at least 0"):
        Shares(**shares)


@given(st.lists(st.text("0123456789abcdef", min_size=32, max_size=32), min_size=1), st.sampled_from([1, 2, 8, 256]))
def test_parts_are_ranges_of_prompt_hashes(ids: list[str], parts: int) -> None:
    which = part_of(pa.array(sorted(ids)), parts).tolist()
    assert which == sorted(which)
    assert 0 <= which[0] <= which[-1] < parts


# --------------------------------------------------------------------------------------------------------------- manifests


def test_manifests_name_what_a_dataset_was_made_from(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", rows_of(30))
    rollouts = imported(source, tmp_path / "rollouts")
    content = source.read_bytes()
    assert rollouts.manifest.inputs == [
        {"source": str(source), "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest(), "format": "rollouts"},
    ]
    examples = pipeline("label_pairs", source=str(rollouts.path), output=str(tmp_path / "pairs"), label=PairSettings(min_gap=0.5))
    [made_from] = examples.manifest.inputs
    assert (made_from["path"], made_from["digest"]) == (str(rollouts.path), rollouts.manifest.digest)
    assert made_from["inputs"] == rollouts.manifest.inputs
    assert examples.manifest.settings == {"source": str(rollouts.path), "label": as_dict(PairSettings(min_gap=0.5))}
    train = pipeline("split_examples", source=str(examples.path), output=str(tmp_path / "split"))[0]
    assert train.manifest.inputs[0]["inputs"] == examples.manifest.inputs
    assert train.manifest.settings["shares"] == {"validation": 0.05, "test": 0.2, "salt": ""}
    words = json.loads((train.path / "manifest.json").read_text())
    assert words["in"] == words["used"] + sum(words["rejected"].values())


def test_what_is_no_dataset_says_so_and_what_to_do(tmp_path: Path) -> None:
    rollouts = imported(write(tmp_path / "rows.jsonl", rows_of(30)), tmp_path / "rollouts")
    examples = pipeline("label_pairs", source=str(rollouts.path), output=str(tmp_path / "pairs"))
    pipeline("split_examples", source=str(examples.path), output=str(tmp_path / "split"))
    (tmp_path / "bare").mkdir()
    cases = [
        ("missing", None, "missing does not exist", "rayward ls"),
        ("bare", None, "no manifest.json", "import_rollouts"),
        ("rows.jsonl", None, "no manifest.json", "import_rollouts"),
        ("split", None, "several datasets: test, train, validation", str(tmp_path / "split" / "test")),
        ("rollouts", "examples", "holds rollouts (made by import_rollouts), not examples", "label_pairs"),
        ("pairs", "rollouts", "holds examples (made by label_pairs), not rollouts", "import_rollouts"),
    ]
    for name, kind, what, way_out in cases:
        with pytest.raises(DataError) as error:
            open_dataset(tmp_path / name, kind)
        assert what in error.value.what
        assert way_out in error.value.way_out


def test_a_dataset_that_lost_a_part_is_refused(tmp_path: Path) -> None:
    rollouts = imported(write(tmp_path / "rows.jsonl", rows_of(30)), tmp_path / "rollouts", parts=4)
    rollouts.parts[1].unlink()
    with pytest.raises(DataError, match="part"):
        pipeline("label_pairs", source=str(rollouts.path), output=str(tmp_path / "pairs"))


# ------------------------------------------------------------------------------------------------- what a policy did not write


def silent(**settings: Any) -> Any:
    """A policy that writes nothing half of the time, and fails on every third problem."""

    def policy(requests: list[Request]) -> list[Completion]:
        made = []
        for n, request in enumerate(requests):
            fails = "3?" in request.prompt[0].content
            made.append(Completion((), "error", 0, error="HTTP 400") if fails else Completion(("A: 4",) if n % 2 else (), "stop", 1))
        return made

    return policy


def test_completions_that_are_no_answer_are_counted_with_their_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(POLICIES, "silent", silent)
    source = write(tmp_path / "problems.jsonl", [{"question": f"{n}?", "answer": "4"} for n in range(4)])
    made = pipeline(
        "sample_rollouts", problems=str(source), output=str(tmp_path / "out"), sample=SampleSettings(policy="silent", answers=4)
    )
    assert made.manifest.rejected == {"empty completion": 6, "policy failed": 4, "no answer": 1}
    assert made.manifest.used == 3
    assert made.manifest.out == 6
    assert "HTTP 400" in made.rejects()["reason"].to_pylist()[-1]
