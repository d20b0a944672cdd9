"""Score: examples (or rollouts) in, scores out, with a model from a folder. The same code as in training, so the same numbers.

>>> # scorer = Scorer.load("store/toy/pairs-model/model")
>>> # scorer([example])[0]        one score per target of the example, in the same order
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from rayward import dataflow, metrics, places
from rayward.batching import BatchSettings
from rayward.config import resolve
from rayward.dataflow import Made, Recipe
from rayward.errors import DataError, ModelError, SettingsError
from rayward.heads import Reading
from rayward.labels import Labeler, label_table
from rayward.places import Place, at, fetch
from rayward.records import ROLLOUT_SCHEMA, Example, Rejected, Rollout, rejects_table, rollouts_of
from rayward.rendering import Group, Renderer, RenderSettings
from rayward.reward_model import ModelSettings, RewardModel, load_model, score_groups
from rayward.reward_model.positions import readable
from rayward.storage import Dataset

TOGETHER = 16  # most answers of a prompt that are scored in one group


@dataclass(frozen=True)
class Scorer:
    """A model ready to score."""

    model: RewardModel
    renderer: Renderer
    notes: dict[str, Any]
    batch: BatchSettings = BatchSettings()

    @classmethod
    def load(cls, folder: str | Place, *, trust_remote_code: bool = False) -> Scorer:
        """A trained model from its folder (at a URL: a copy in the cache), on a GPU if there is one, rendering as it did in training."""
        loaded = load_model(str(fetch(folder)), ModelSettings(trust_remote_code=trust_remote_code))
        render = resolve(RenderSettings, loaded.notes.get("render") or {})
        model = loaded.model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        render = replace(render, max_length=readable(model.classifier, render.max_length))
        return cls(model, Renderer(loaded.tokenizer, render, model.reading.attributes), loaded.notes)

    @property
    def reads_steps(self) -> bool:
        """Whether the model was trained to score the steps of an answer."""
        return self.notes.get("labeler") == "steps"

    @property
    def temperature(self) -> float:
        """What its scores (or their differences) are divided by to be calibrated; 1 if none was fitted."""
        return self.notes.get("temperature") or 1.0

    @property
    def members(self) -> int:
        """How many heads a score is the mean of."""
        return self.model.reading.members

    def try_score(self, examples: Sequence[Example]) -> list[tuple[float, ...] | Rejected]:
        """One score per target for every example, or why there is none."""
        return [s if isinstance(s, Rejected) else tuple(map(float, s)) for s in self._try(examples)]

    def _try(self, examples: Sequence[Example], each: bool = False) -> list[Any]:
        """score_K of every example, with `each` score_KM of M members, or why there is none."""
        made = list(self.renderer.render(examples))
        groups = [g for g in made if isinstance(g, Group)]
        scores = iter(score_groups(self.model, groups, self.batch, self.notes.get("precision") or "auto", each))
        return [m if isinstance(m, Rejected) else next(scores) for m in made]

    def __call__(self, examples: Sequence[Example]) -> list[tuple[float, ...]]:
        """One score per target for every example; an example that cannot be scored is a DataError."""
        scores = self.try_score(examples)
        for score in scores:
            if isinstance(score, Rejected):
                raise DataError(f"example {score.row} cannot be scored: {score.reason}", "leave it out, or load with another max_length")
        return scores  # type: ignore[return-value]

    def score_rollouts(self, rollouts: Sequence[Rollout]) -> list[tuple[float, ...] | Rejected]:
        """Per rollout the scores of its steps (one, unless the model reads steps); answers of one prompt share its encoding."""
        return [s if isinstance(s, Rejected) else tuple(map(float, s)) for s in self._of_rollouts(rollouts, self._try)]

    def score_by_member(self, rollouts: Sequence[Rollout]) -> list[np.ndarray | Rejected]:
        """score_KM of every rollout: what each of M heads says of its K steps; `score_rollouts` gives the means."""
        return [s if isinstance(s, Rejected) else np.stack(s) for s in self._of_rollouts(rollouts, partial(self._try, each=True))]

    def _of_rollouts(self, rollouts: Sequence[Rollout], score: Callable[[list[Example]], list[Any]]) -> list[Any]:
        """Per rollout a list of what `score` says of its steps, or why it says nothing."""
        first: dict[Any, int] = {}  # answers of one text are scored once, so that their scores are equal to the last bit
        same_as = [first.setdefault((r.prompt, self._segments(r)), n) for n, r in enumerate(rollouts)]
        together: dict[Any, list[int]] = {}
        for n in first.values():
            together.setdefault(rollouts[n].prompt, []).append(n)
        chunks = [same[at : at + TOGETHER] for same in together.values() for at in range(0, len(same), TOGETHER)]
        scores: list[Any] = [()] * len(rollouts)
        alone: list[int] = []
        for chunk, said in zip(chunks, score([self._example([rollouts[n] for n in c]) for c in chunks]), strict=True):
            if isinstance(said, Rejected):  # one of them does not fit; the others may
                alone += chunk
                continue
            parts = iter(said)
            for n in chunk:
                scores[n] = [next(parts) for _ in self._segments(rollouts[n])]
        for n, said in zip(alone, score([self._example([rollouts[n]]) for n in alone]), strict=True):
            scores[n] = Rejected(source="rollouts", row=rollouts[n].id, reason=said.reason) if isinstance(said, Rejected) else list(said)
        return [self._of(scores[n], rollout) for n, rollout in zip(same_as, rollouts, strict=True)]

    @staticmethod
    def _of(score: Any, rollout: Rollout) -> Any:
        return replace(score, row=rollout.id) if isinstance(score, Rejected) else score

    def _segments(self, rollout: Rollout) -> tuple[str, ...]:
        return rollout.steps if self.reads_steps else (rollout.text,)

    def _example(self, rollouts: Sequence[Rollout]) -> Example:
        answers = tuple(self._segments(r) for r in rollouts)
        places = sum(map(len, answers))
        return Example(id=rollouts[0].id, prompt=rollouts[0].prompt, answers=answers, targets=(0.0,) * places, counts=(0,) * places)


@contextmanager
def dropping(model: nn.Module, rate: float, seed: int) -> Iterator[None]:
    """Scores inside are draws of Monte-Carlo dropout: before every weight layer a share `rate` of the inputs is zero, the others grow.

    Gal and Ghahramani 2016 (arXiv 1506.02142, section 3). It does not ask for dropout in training, which most decoders have none of, nor
    for layers that hold some: the inputs of every linear layer of body and head are dropped. `seed` makes a draw repeatable.
    """
    from transformers.pytorch_utils import Conv1D  # the linear layer of GPT-2

    def drop(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (nn.functional.dropout(inputs[0], rate), *inputs[1:])

    layers = [m for m in model.modules() if isinstance(m, nn.Linear | Conv1D)]
    hooks = [layer.register_forward_pre_hook(drop) for layer in layers]
    try:
        with torch.random.fork_rng([d.index or 0 for d in {p.device for p in model.parameters()} if d.type == "cuda"]):
            torch.manual_seed(seed)
            yield
    finally:
        for hook in hooks:
            hook.remove()


def members_in(folder: str | Place) -> int:
    """How many heads a saved model has, by its config alone.

    Raises:
        ModelError: if it has no config.
    """
    try:
        config = json.loads(places.read(at(folder) / "config.json"))
    except FileNotFoundError:
        raise ModelError(f"--model {folder} cannot be loaded: it has no config.json", "give the folder of a trained model") from None
    return Reading.of_notes((config.get("rayward") or {}).get("head")).members


def score_dataset(
    recipe: Recipe, source: Dataset, folder: str, actors: int, aggregate: metrics.Aggregation = "last", caution: float = 0.0
) -> Dataset:
    """The rollouts of a dataset with a `score` each, and `step_scores` where steps are scored, by a pool of actors.

    `aggregate` says how the scores of steps become that of the answer (metrics.AGGREGATIONS); each is a logit. What each of several
    heads says of the answer is in `member_scores`, and `caution` times their standard deviation is taken off the score.

    Raises:
        SettingsError: if there is caution, and a single head.
    """
    if caution and members_in(folder) == 1:
        raise SettingsError(
            f"caution={caution:g} takes off what the heads of a model differ by, and {folder} has one",
            "train one with several, --set net.members=5, or leave it out",
        )
    score = partial(_PartScorer, folder, aggregate, caution)
    [made] = dataflow.transform(recipe, source, score, kind="scores", actors=actors, gpus=recipe.gpus)
    return made


def label_by_scores(recipe: Recipe, source: Dataset, folder: str, judge: str, labeler: Labeler, settings: Any, actors: int) -> Dataset:
    """Examples of rollouts that a model has judged: its score is the reward, and all whole answers of a prompt are one judgement."""
    make = partial(_PartLabeler, folder, judge, labeler, settings)
    [made] = dataflow.transform(recipe, source, make, kind="examples", actors=actors, gpus=recipe.gpus)
    return made


class _PartScorer:
    """Loads the model once, scores part after part."""

    def __init__(self, folder: str, aggregate: metrics.Aggregation = "last", caution: float = 0.0):
        self.scorer, self.aggregate, self.caution = Scorer.load(folder), aggregate, caution

    def __call__(self, table: pa.Table) -> Made:
        rejects: list[Rejected] = []
        final: list[float] = []
        steps: list[list[float] | None] = []
        members: list[list[float] | None] = []
        keep = np.ones(table.num_rows, bool)
        for start in range(0, table.num_rows, 4096):
            for n, score_KM in enumerate(self.scorer.score_by_member(rollouts_of(table.slice(start, 4096))), start):
                if isinstance(score_KM, Rejected):
                    rejects.append(score_KM)
                    keep[n] = False
                    continue
                score_K, each = score_KM.mean(-1), [metrics.aggregate(own_K, self.aggregate) for own_K in score_KM.T]
                final.append(
                    metrics.aggregate(score_K, self.aggregate) - (self.caution * float(np.std(each, ddof=1)) if self.caution else 0)
                )
                steps.append(score_K.tolist() if self.scorer.reads_steps else None)
                members.append(each if len(each) > 1 else None)
        kept = table.filter(pa.array(keep))
        kept = kept.append_column("score", pa.array(final, pa.float64()))
        kept = kept.append_column("step_scores", pa.array(steps, pa.list_(pa.float64())))
        kept = kept.append_column("member_scores", pa.array(members, pa.list_(pa.float64())))
        return Made({"": kept}, rejects_table(rejects), kept.num_rows)


class _PartLabeler:
    """Loads the model once, scores and labels part after part."""

    def __init__(self, folder: str, judge: str, labeler: Labeler, settings: Any):
        self.score, self.judge, self.labeler, self.settings = _PartScorer(folder), judge, labeler, settings

    def __call__(self, table: pa.Table) -> Made:
        scored = self.score(table)
        judged = scored.tables[""]
        judgement = pa.array([self.judge] * judged.num_rows, pa.string())
        for name, values in (("reward", judged["score"]), ("judgement", judgement)):
            judged = judged.set_column(judged.schema.get_field_index(name), name, values)
        labelled = label_table(judged.select(ROLLOUT_SCHEMA.names), self.labeler, self.settings)
        return Made({"": labelled.examples}, pa.concat_tables([scored.rejects, labelled.rejects]), labelled.used)
