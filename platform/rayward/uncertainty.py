"""What to label next: the prompts of a pool on which several models, or several draws of one, do not agree.

    rollouts -> scores of every member -> logits of what would be labelled -> one uncertainty per prompt -> which prompts

A member is a model of an ensemble, a head of a model with several (`net.members`), or a pass of Monte-Carlo dropout. What would be labelled
of a prompt, its K places, is

    the order of two answers    by models of comparisons: every two answers, by the difference of their scores
    right or wrong              by models of chances (outcomes, steps): every answer, every step, by its score

since scores of comparisons are known up to a shift per prompt only. Members are brought to one scale by their temperatures, so that
sigma(logit) is the chance that each gives. A prompt's uncertainty is the mean over its places.

>>> logit_MK = np.array([[3.0, 0.0], [-3.0, 0.0]])  # two members contradict each other on one place, and both toss a coin on the other
>>> mutual_information(logit_MK).round(3).tolist(), entropy(logit_MK).round(3).tolist()
([0.502, 0.0], [0.693, 0.693])
"""

from __future__ import annotations

import itertools
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rayward import dataflow, places
from rayward.dataflow import Recipe
from rayward.dataflow.recipe import announce, staged
from rayward.errors import DataError, SettingsError
from rayward.hygiene.near import Sketches, sketch
from rayward.hygiene.texts import words_of
from rayward.objectives import make_objective
from rayward.places import at
from rayward.progress import Progress
from rayward.records import ROLLOUT_SCHEMA, Rejected, Rollout, prompt_id, rejects_table, rollouts_of
from rayward.scoring import Scorer, dropping, members_in
from rayward.storage import Counts, Dataset, open_dataset, read_table, write_part, write_rejects, write_table
from rayward.toy_world import seed_of

Array = np.ndarray
CHUNK = 4096  # rollouts that are held as records at a time, at least whole prompts


# ---------------------------------------------------------------------------------------------------------------- measures


def mutual_information(logit_MK: Array) -> Array:
    """H(mean of p) - mean of H(p): what a label would tell about which member is right, in nats, 0 to ln 2, for each of K places.

    BALD (Houlsby et al. 2011, arXiv 1112.5745, equation 2), there for preferences too. A place that is a coin toss to every member has
    none: nothing can be learned there.
    """
    return np.maximum(0.0, entropy(logit_MK) - _entropy(_sigma(logit_MK)).mean(0))


def deviation(logit_MK: Array) -> Array:
    """The standard deviation of the logits over members, for each of K places; 0 with one member.

    Christiano et al. 2017 (arXiv 1706.03741, section 2.2.4) ask about the pairs with the largest variance over an ensemble.
    """
    return np.std(logit_MK, axis=0, ddof=1) if len(logit_MK) > 1 else np.zeros(logit_MK.shape[1])


def probability_deviation(logit_MK: Array) -> Array:
    """The standard deviation of sigma(logit) over members, 0 to 0.71, for each of K places: `deviation` of chances."""
    return deviation(_sigma(logit_MK))


def entropy(logit_MK: Array) -> Array:
    """H(mean of p) in nats, 0 to ln 2, for each of K places: how near to one half the members are together.

    Uncertainty sampling (Lewis and Gale 1994, arXiv cmp-lg/9407020). It cannot tell what is not known from what is a coin toss.
    """
    return _entropy(_sigma(logit_MK).mean(0))


Measure = Callable[[Array], Array]  # logit_MK -> uncertainty_K
MEASURES: dict[str, Measure] = {
    "mutual_information": mutual_information,
    "deviation": deviation,
    "probability_deviation": probability_deviation,
    "entropy": entropy,
}


def _sigma(logit: Array) -> Array:
    return 0.5 * (1 + np.tanh(0.5 * np.asarray(logit, float)))


def _entropy(p: Array) -> Array:
    q = np.clip(p, 1e-12, 1 - 1e-12)
    return -(q * np.log(q) + (1 - q) * np.log(1 - q))


def comparisons(score_MA: Array, best_two: bool) -> Array:
    """logit_MK: the differences of every two of A answers, or of the two alone that have the highest mean scores.

    >>> comparisons(np.array([[1.0, 4.0, 2.0]]), best_two=False).tolist(), comparisons(np.array([[1.0, 4.0, 2.0]]), best_two=True).tolist()
    ([[-3.0, -1.0, 2.0]], [[2.0]])
    """
    answers = range(score_MA.shape[1])
    of = sorted(answers, key=lambda a: -score_MA[:, a].mean())[:2] if best_two else answers
    i, j = np.array(list(itertools.combinations(of, 2)), np.int64).reshape(-1, 2).T
    return score_MA[:, i] - score_MA[:, j]


# ---------------------------------------------------------------------------------------------------------------- settings


@dataclass(frozen=True)
class SelectSettings:
    """How uncertainty is measured, and what is chosen by it."""

    measure: Literal["auto", "mutual_information", "deviation", "probability_deviation", "entropy"] = (
        "auto"  # auto: mutual_information with several members; with one the entropy, of the best two answers where answers are compared
    )
    dropout: float = 0.0  # Monte-Carlo dropout: share of the inputs of every linear layer that is dropped, e.g. 0.1
    passes: int = 8  # members that dropout makes of each model
    random: float = 0.1  # share of the prompts that are drawn at random from the whole pool, for a check without bias
    distinct: bool = True  # at most one prompt of several that are near-duplicates (Jaccard similarity 0.8 of 5-word shingles)
    seed: int = 0  # another seed is another draw, of prompts and of what is dropped

    def __post_init__(self) -> None:
        if not 0 <= self.dropout < 1 or not 0 <= self.random <= 1:
            raise ValueError(f"dropout={self.dropout} and random={self.random} are shares, from 0 to 1")
        if self.dropout and self.passes < 2:
            raise ValueError(f"passes={self.passes}: dropout needs 2 passes or more")

    def chosen_measure(self, members: int) -> str:
        """The measure by name; SettingsError where it needs several members (heads of all models) and there is one."""
        several = members > 1 or self.dropout > 0
        if self.measure == "auto":
            return "mutual_information" if several else "entropy"
        if self.measure != "entropy" and not several:
            raise SettingsError(
                f"measure={self.measure} is about how members differ, and there is one",
                "name several models, --model A,B,C, or one with several heads (net.members); add --dropout 0.1, or take --measure entropy",
            )
        return self.measure


@dataclass(frozen=True)
class Members:
    """Who scores: models by folder, all heads of each, once or in several passes of dropout."""

    folders: tuple[str, ...]
    settings: SelectSettings

    def score(self, rollouts: Sequence[Rollout]) -> tuple[list[list[Any]], bool]:
        """Per member and rollout its scores over the temperature, or a Rejected; and whether answers are compared by them.

        Models are loaded one after the other, so memory holds one. SettingsError where some read steps or compare and others do not.
        """
        made: list[list[Any]] = []
        kinds = set()
        for n, folder in enumerate(self.folders):
            scorer = Scorer.load(folder)
            kinds.add((scorer.reads_steps, _compares(scorer)))
            if len(kinds) > 1:
                raise SettingsError(
                    f"{folder} was trained on {scorer.notes.get('labeler')} with {scorer.notes.get('objective')}, and its scores mean"
                    f" something else than those of {self.folders[0]}",
                    "put models of one kind of label together",
                )
            passes = self.settings.passes if self.settings.dropout else 1
            with Progress(f"model {n + 1} of {len(self.folders)}", passes * len(rollouts), "scores") as bar:
                made += [one for number in range(passes) for one in self._score_once(scorer, rollouts, n, number, bar)]
        return made, kinds.pop()[1]

    def _score_once(self, scorer: Scorer, rollouts: Sequence[Rollout], model: int, one: int, bar: Progress) -> list[list[Any]]:
        """Per head and rollout, of one pass."""
        scores: list[Any] = []
        for start, end in whole_prompts(rollouts):
            some = rollouts[start:end]
            if self.settings.dropout:
                seed = seed_of("dropout", self.settings.seed, model, one, some[0].id, prompt_id(some[0].prompt))
                with dropping(scorer.model, self.settings.dropout, seed):
                    scores += scorer.score_by_member(some)
            else:
                scores += scorer.score_by_member(some)
            bar.advance(end - start)
        T = scorer.temperature
        return [[s if isinstance(s, Rejected) else s[:, m].astype(float) / T for s in scores] for m in range(scorer.members)]


def _compares(scorer: Scorer) -> bool:
    """Whether scores mean something by their differences alone, as what they were trained with says."""
    if scorer.reads_steps or not scorer.notes.get("objective"):
        return not scorer.reads_steps
    said = [scorer.notes.get(name) or "{}" for name in ("objective_settings", "regularise")]
    return not make_objective(scorer.notes["objective"], *said).probabilities


def whole_prompts(rollouts: Sequence[Rollout]) -> Iterator[tuple[int, int]]:
    """Ranges of some CHUNK rollouts that end where a prompt does; answers of a prompt lie together."""
    start = 0
    for n in range(1, len(rollouts) + 1):
        if n == len(rollouts) or (n - start >= CHUNK and rollouts[n].prompt != rollouts[n - 1].prompt):
            yield start, n
            start = n


# --------------------------------------------------------------------------------------------------------------- measuring

_PROMPTS = pa.schema([("prompt_id", pa.string()), ("text", pa.string()), ("answers", pa.int64()), ("uncertainty", pa.float64())])


@dataclass(frozen=True)
class Measured:
    """The prompts of some rollouts with their uncertainties (_PROMPTS), and why rollouts had no part in that, by their place."""

    prompts: pa.Table
    left_out: dict[int, str]


def measure_prompts(rollouts: Sequence[Rollout], members: Members) -> Measured:
    """The uncertainty of every prompt; rollouts of one prompt lie together.

    Answers of one text are one answer. A prompt of which nothing could be labelled is not measured: where answers are compared, it has
    one answer that can be scored.
    """
    if not rollouts:
        return Measured(_PROMPTS.empty_table(), {})
    scores, compares = members.score(rollouts)
    measure = members.settings.chosen_measure(len(scores))
    rows: list[tuple[str, str, int, float]] = []
    left_out: dict[int, str] = {}
    for prompt, of in itertools.groupby(range(len(rollouts)), key=lambda n: rollouts[n].prompt):
        answers: dict[str, list[int]] = {}
        for n in of:
            bad = next((of_member[n] for of_member in scores if isinstance(of_member[n], Rejected)), None)
            if bad is not None:
                left_out[n] = bad.reason
            else:
                answers.setdefault(rollouts[n].text, []).append(n)
        if len(answers) < (2 if compares else 1):
            alone = "alone: its prompt has no other answer to compare it with"
            left_out |= {n: alone for same in answers.values() for n in same}
            continue
        first = [same[0] for same in answers.values()]
        logit_MK = np.stack([np.concatenate([of_member[n] for n in first]) for of_member in scores])
        if compares:
            logit_MK = comparisons(logit_MK, best_two=measure == "entropy")
        text = "\n".join(message.content for message in prompt)
        rows.append((prompt_id(prompt), text, len(first), float(MEASURES[measure](logit_MK).mean())))
    columns: Any = zip(*rows, strict=True) if rows else [[]] * len(_PROMPTS)
    return Measured(pa.table([pa.array(c, f.type) for c, f in zip(columns, _PROMPTS, strict=True)], schema=_PROMPTS), left_out)


# ---------------------------------------------------------------------------------------------------------------- choosing


@dataclass(frozen=True)
class Choice:
    """Why a prompt was chosen, or was not."""

    how: str  # uncertain, random; of the others: near-duplicate, not selected
    rank: int  # 1: the most uncertain of the pool
    uncertainty: float


def choose(prompts: pa.Table, count: int, settings: SelectSettings) -> dict[str, Choice]:
    """What becomes of every prompt: some at random, then the most uncertain of the others, of near-duplicates one.

    A draw is a hash of the prompt, so a larger count chooses the same prompts and more, near-duplicates aside.
    """
    ids, value = prompts["prompt_id"].to_pylist(), prompts["uncertainty"].to_numpy()
    order = sorted(range(len(ids)), key=lambda n: (-value[n], ids[n]))
    rank = {n: place for place, n in enumerate(order, 1)}
    drawn = sorted(range(len(ids)), key=lambda n: seed_of("random prompt", settings.seed, ids[n]))
    by_chance = math.floor(count * settings.random + 0.5)
    made = dict.fromkeys(_distinct(prompts, drawn, by_chance, (), settings.distinct)[0], "random")
    rest = [n for n in order if n not in made]
    uncertain, alike = _distinct(prompts, rest, count - len(made), tuple(made), settings.distinct)
    made |= dict.fromkeys(uncertain, "uncertain")
    return {ids[n]: Choice(made.get(n) or ("near-duplicate" if n in alike else "not selected"), rank[n], float(value[n])) for n in order}


def _distinct(prompts: pa.Table, order: Sequence[int], count: int, taken: tuple[int, ...], distinct: bool) -> tuple[list[int], set[int]]:
    """The first `count` of an order of which none is like one before it, or like one that is taken; and those passed over."""
    if not distinct:
        return list(order[:count]), set()
    look_at = 2 * count
    while True:
        head = [*taken, *order[:look_at]]
        class_of, like = _alike(prompts["text"].take(pa.array(head, pa.int64())).combine_chunks())
        kept = set(class_of[: len(taken)])
        chosen: list[int] = []
        passed: set[int] = set()
        for n, own in zip(head[len(taken) :], class_of[len(taken) :], strict=True):
            if len(chosen) == count:
                break
            if kept.isdisjoint(like[own]):
                kept.add(own)
                chosen.append(n)
            else:
                passed.add(n)
        if len(chosen) == count or look_at >= len(order):
            return chosen, passed
        look_at *= 4


def _alike(texts: pa.Array) -> tuple[list[int], dict[int, set[int]]]:
    """The class of every text, those of one set of words in a row being one class; and of every class those like it, itself among them."""
    with tempfile.TemporaryDirectory() as folder:
        sketches = Sketches(Path(folder))
        sketches.add(sketch(words_of(texts)))
        near = sketches.pairs()
    class_of = near.first.tolist()
    like = {own: {own} for own in class_of}
    for a, b in zip(near.a.tolist(), near.b.tolist(), strict=True):
        like[a].add(b)
        like[b].add(a)
    return class_of, like


# ------------------------------------------------------------------------------------------------------------- the dataset


def select(recipe: Recipe, source: Dataset, folders: Sequence[str], count: int, settings: SelectSettings, actors: int = 1) -> Dataset:
    """The rollouts of the prompts of `source` that are to be labelled next; every rollout says why its prompt was chosen.

    OUTPUT/uncertainty.parquet holds all prompts that were measured, by rank. A run that was killed goes on with the part it was at.

    Raises:
        SettingsError: if the measure needs several members, or the models are of different kinds.
        DataError: if no prompt can be measured.
    """
    named = settings.chosen_measure(sum(map(members_in, folders)))
    if recipe.already_made():
        return announce(open_dataset(recipe.output, "rollouts"))
    parts = len(source.parts)
    members = Members(tuple(folders), settings)
    with staged(recipe, "rollouts", parts) as stage:
        how = recipe.how(source.bytes)
        tasks = [{"part": n, "file": str(path.absolute())} for n, path in enumerate(source.parts)]
        measure = partial(_MeasurePart, members, str(stage / "done" / "measured"))
        done = stage / "done" / "measured"
        dataflow.run(tasks, measure, what="measure", unit="parts", done=done, actors=actors, gpus=recipe.gpus, **how)
        prompts = pa.concat_tables([read_table(done / f"{n:06d}.prompts.parquet") for n in range(parts)])
        if not prompts.num_rows:
            raise DataError(f"no prompt of {source.path} can be measured", "where answers are compared, a prompt needs two that differ")
        chosen = choose(prompts, count, settings)
        write = partial(_write_part, stage=str(stage), parts=parts, chosen=chosen, measure=named)
        written = [write(task) for task in tasks]
        counts = sum((Counts(d["rows_in"], d["out"], d["rejected"], d["out"], d["leaves"]) for d in written), Counts())
        write_table(_ranked(prompts, chosen), stage / "uncertainty.parquet")
        places.write(stage / "manifest.json", recipe.manifest("rollouts", counts).to_json())
    return announce(open_dataset(recipe.output, "rollouts"))


def _ranked(prompts: pa.Table, chosen: Mapping[str, Choice]) -> pa.Table:
    """Every measured prompt, the most uncertain first."""
    mine = [chosen[name] for name in prompts["prompt_id"].to_pylist()]
    table = prompts.drop_columns(["text"]).append_column("rank", pa.array([c.rank for c in mine], pa.int64()))
    return table.append_column("selected", pa.array([c.how for c in mine])).sort_by("rank")


class _MeasurePart:
    """Measures one part after the other, into files of a folder."""

    def __init__(self, members: Members, folder: str):
        self.members, self.folder = members, at(folder)

    def __call__(self, task: dict[str, Any]) -> dict[str, Any]:
        measured = measure_prompts(rollouts_of(read_table(task["file"])), self.members)
        name = f"{task['part']:06d}"
        write_table(measured.prompts, self.folder / f"{name}.prompts.parquet")
        left_out = pa.table({"place": pa.array(measured.left_out, pa.int64()), "reason": pa.array(measured.left_out.values(), pa.string())})
        write_table(left_out, self.folder / f"{name}.left-out.parquet")
        return {"prompts": measured.prompts.num_rows}


def _write_part(task: dict[str, Any], stage: str, parts: int, chosen: Mapping[str, Choice], measure: str) -> dict[str, Any]:
    """The rollouts of one part whose prompts were chosen, with the reason in their provenance; the others as rejects."""
    table = read_table(task["file"])
    unmeasured = read_table(at(stage) / "done" / "measured" / f"{task['part']:06d}.left-out.parquet").to_pylist()
    why = {row["place"]: row["reason"] for row in unmeasured}
    names = table["prompt_id"].to_pylist()
    keep = np.array([n not in why and chosen[name].how in ("uncertain", "random") for n, name in enumerate(names)], bool)
    ids = table["id"]
    rejects = [
        Rejected(source="rollouts", row=ids[n].as_py(), reason=why.get(n) or _not_chosen(chosen[names[n]], len(chosen)))
        for n in np.flatnonzero(~keep).tolist()
    ]
    out = table.filter(pa.array(keep))
    provenance = [
        sorted({**dict(said or ()), **_why(chosen[name], len(chosen), measure)}.items())
        for name, said in zip(out["prompt_id"].to_pylist(), out["provenance"].to_pylist(), strict=True)
    ]
    column = out.schema.get_field_index("provenance")
    out = out.set_column(column, "provenance", pa.array(provenance, ROLLOUT_SCHEMA.field("provenance").type))
    leaves = write_part(at(stage), task["part"], parts, out, ROLLOUT_SCHEMA)
    rejected = write_rejects(at(stage), f"part-{task['part']:03d}.parquet", rejects_table(rejects))
    return {"rows_in": table.num_rows, "out": out.num_rows, "rejected": dict(rejected), "leaves": leaves}


def _why(choice: Choice, prompts: int, measure: str) -> dict[str, str]:
    return {"selected": choice.how, "uncertainty": f"{measure} {choice.uncertainty:.6g}", "uncertainty_rank": f"{choice.rank} of {prompts}"}


def _not_chosen(choice: Choice, prompts: int) -> str:
    place = f"its uncertainty has rank {choice.rank} of {prompts}"
    return f"near-duplicate: a prompt like its own was chosen; {place}" if choice.how == "near-duplicate" else f"not selected: {place}"


def shares(dataset: Dataset) -> dict[str, int]:
    """How many prompts of a selection were chosen, by why."""
    table = read_table(dataset.path / "uncertainty.parquet", columns=["selected"])
    counts = {c["values"]: c["counts"] for c in pc.value_counts(table["selected"]).to_pylist()}
    return {how: counts.get(how) or 0 for how in ("uncertain", "random")}
