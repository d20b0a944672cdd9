"""Our own rows column by column: what `own.rollouts` does row by row, for a whole Parquet batch at once.

A row that is plainly good is taken as it lies in its columns; every other one is left to the reader, which says what is wrong with it.
So there is one truth about what a row means, and a test holds both equal.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rayward.formats.fields import PROMPT_COLUMNS
from rayward.records import ROLES, ROLLOUT_SCHEMA, hash_messages, map_column

_TEXT = r"[!-~\pL\pN]"  # whoever holds one of these is not blank
_USED = {"id", "prompt", "steps", "answer", "reward", "correct", "judgement", "annotator", "policy", "continues", "kept_steps"}
_NAMES = ("judgement", "annotator", "policy", "continues")


class Read(NamedTuple):
    """What could be read by column."""

    rollouts: pa.Table  # ROLLOUT_SCHEMA, of the rows that are plainly good, in order
    good: np.ndarray  # which rows they are


def readable(schema: pa.Schema) -> bool:
    """Whether every column is one that is known here by name and type; others than these are texts, kept as provenance."""
    names = set(schema.names)
    if len(names) < len(schema.names) or not {"id", "prompt"} <= names or len({"steps", "answer"} & names) != 1:
        return False
    kinds = {"reward": pa.types.is_floating, "correct": pa.types.is_boolean, "kept_steps": pa.types.is_integer}
    kinds |= {"steps": lambda t: pa.types.is_list(t) and pa.types.is_string(t.value_type), "prompt": _is_prompt}
    reserved = {*ROLLOUT_SCHEMA.names, "response", "completion"} - _USED
    reserved |= set(PROMPT_COLUMNS)
    return not reserved & set(schema.names) and all(kinds.get(f.name, pa.types.is_string)(f.type) for f in schema)


def _is_prompt(kind: pa.DataType) -> bool:
    if pa.types.is_string(kind):
        return True
    message = kind.value_type if pa.types.is_list(kind) else None
    return message is not None and message == pa.struct([("role", pa.string()), ("content", pa.string())])


def read(table: pa.Table, source: str, first: int) -> Read:
    """The plainly good rows of a table whose schema is `readable`; `first` is the number of its first row in `source`."""
    table = table.combine_chunks()
    try:
        table.validate(full=True)  # texts are UTF-8
    except pa.ArrowInvalid:
        return Read(ROLLOUT_SCHEMA.empty_table(), np.zeros(len(table), bool))
    columns = {name: _flat(table[name]) for name in table.column_names}
    steps = columns["steps"] if "steps" in columns else _lists_of_one(columns["answer"])
    good = _has_text(columns["id"]) & _good_prompts(columns["prompt"]) & _good_steps(steps)
    if "reward" in columns:
        good &= _true(pc.fill_null(pc.is_finite(columns["reward"]), True))
    for name in _NAMES:
        if name in columns:
            good &= _has_text(columns[name]) | _true(pc.fill_null(pc.equal(columns[name], ""), True))
    if "kept_steps" in columns:
        kept = pc.fill_null(columns["kept_steps"], 0).cast(pa.float64(), safe=False)
        good &= _true(pc.fill_null(pc.and_(pc.greater_equal(kept, 0), pc.less_equal(kept, pc.list_value_length(steps))), False))
        columns["kept_steps"] = pc.if_else(pa.array(good), kept, 0.0)  # others may be too large for their column
    if pa.types.is_string(columns["prompt"].type):
        columns["prompt"] = _lists_of_one(
            pa.StructArray.from_arrays([pa.array(["user"] * len(table), pa.string()), columns["prompt"]], ["role", "content"])
        )
    numbers = pa.array(np.arange(first, first + len(table))).cast(pa.string())
    extra = {name: columns[name] for name in columns if name not in _USED}
    made = {
        "prompt_id": prompt_ids(columns["prompt"], good),
        "steps": steps,
        "rewards": _no_entries(len(table), ROLLOUT_SCHEMA.field("rewards").type),
        "step_rewards": _no_entries(len(table), ROLLOUT_SCHEMA.field("step_rewards").type),
        "provenance": map_column({**extra, "source": pa.array([source] * len(table), pa.string()), "row": numbers}),
    }
    for field in ROLLOUT_SCHEMA:
        if field.name not in made:
            made[field.name] = columns[field.name].cast(field.type) if field.name in columns else pa.nulls(len(table), field.type)
    made["kept_steps"] = pc.fill_null(made["kept_steps"], 0)
    made["judgement"] = _or_nothing(made["judgement"], "graded")
    for name in ("annotator", "policy", "continues"):
        made[name] = _or_nothing(made[name], None)
    whole = pa.table([made[name] for name in ROLLOUT_SCHEMA.names], schema=ROLLOUT_SCHEMA)
    return Read(whole if good.all() else whole.filter(pa.array(good)), good)


def prompt_ids(prompts: pa.Array, wanted: np.ndarray) -> pa.Array:
    """`records.prompt_id` of every wanted prompt; each different prompt is hashed once."""
    roles, contents = (prompts.flatten().field(name) for name in ("role", "content"))
    contents = pc.fill_null(contents, "")
    message = pc.binary_join_element_wise(pc.fill_null(roles, ""), pc.binary_length(contents).cast(pa.string()), contents, "\x01")
    offsets = prompts.offsets.to_numpy() - prompts.offsets[0].as_py()
    joined = pc.binary_join(pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), message), "\x02")
    coded = joined.dictionary_encode()
    which = coded.indices.to_numpy()
    first = np.full(len(coded.dictionary), -1, np.int64)
    rows = np.flatnonzero(wanted)[::-1]
    first[which[rows]] = rows  # the last one written is the first row
    used = np.flatnonzero(first >= 0)
    hashes = np.full(len(first), "", object)
    different = prompts.take(pa.array(first[used]))
    ends = np.cumsum(pc.list_value_length(different).to_numpy()).tolist()
    said = list(zip(*(different.flatten().field(name).to_pylist() for name in ("role", "content")), strict=True))
    hashes[used] = [hash_messages(said[start:end]) for start, end in zip([0, *ends], ends, strict=False)]
    return pa.DictionaryArray.from_arrays(coded.indices, pa.array(hashes, pa.string())).dictionary_decode()


def _flat(column: pa.ChunkedArray) -> pa.Array:
    return (
        column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    )


def _true(array: pa.Array) -> np.ndarray:
    return array.to_numpy(zero_copy_only=False).astype(bool)


def _has_text(array: pa.Array) -> np.ndarray:
    return _true(pc.fill_null(pc.match_substring_regex(array, _TEXT), False))


def _good_prompts(prompts: pa.Array) -> np.ndarray:
    if pa.types.is_string(prompts.type):
        return _has_text(prompts)
    messages = prompts.flatten()
    fine = _has_text(messages.field("content")) & _true(pc.fill_null(pc.is_in(messages.field("role"), pa.array(ROLES)), False))
    return _all_of_each(prompts, fine)


def _good_steps(steps: pa.Array) -> np.ndarray:
    pieces = steps.flatten()
    whole = _true(pc.fill_null(pc.greater(pc.binary_length(pieces), 0), False))
    return _all_of_each(steps, whole) & _has_text(pc.binary_join(steps, ""))


def _all_of_each(lists: pa.Array, fine: np.ndarray) -> np.ndarray:
    """Which lists are there, are not empty, and hold only fine values."""
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy()
    ends = np.cumsum(lengths)
    bad = np.r_[0, np.cumsum(~fine)]
    return (lengths > 0) & (bad[ends] == bad[ends - lengths])


def _lists_of_one(values: pa.Array) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array(np.arange(len(values) + 1), pa.int32()), values)


def _no_entries(rows: int, kind: pa.DataType) -> pa.Array:
    offsets = pa.array(np.zeros(rows + 1), pa.int32())
    if pa.types.is_map(kind):
        return pa.MapArray.from_arrays(offsets, pa.array([], kind.key_type), pa.array([], kind.item_type))
    return pa.ListArray.from_arrays(offsets, pa.array([], kind.value_type))


def _or_nothing(texts: pa.Array, instead: str | None) -> pa.Array:
    """Texts, with something else where one is missing or empty."""
    return pc.if_else(pc.fill_null(pc.equal(texts, ""), True), pa.scalar(instead, pa.string()), texts)
