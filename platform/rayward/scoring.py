"""Score: examples (or rollouts) in, scores out, with a model from a folder. The same code as in training, so the same numbers.

>>> # scorer = Scorer.load("store/toy/pairs-model/model")
>>> # scorer([example])[0]        one score per target of the example, in the same order
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from rayward import dataflow, metrics
from rayward.batching import BatchSettings
from rayward.config import resolve
from rayward.dataflow import Made, Recipe
from rayward.errors import DataError
from rayward.labels import Labeler, label_table
from rayward.places import Place, fetch
from rayward.records import ROLLOUT_SCHEMA, Example, Rejected, Rollout, rejects_table, rollouts_of
from rayward.rendering import Group, Renderer, RenderSettings
from rayward.reward_model import ModelSettings, RewardModel, load_model, score_groups
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
        return cls(model, Renderer(loaded.tokenizer, render, model.reading.attributes), loaded.notes)

    @property
    def reads_steps(self) -> bool:
        """Whether the model was trained to score the steps of an answer."""
        return self.notes.get("labeler") == "steps"

    @property
    def temperature(self) -> float:
        """What its scores (or their differences) are divided by to be calibrated; 1 if none was fitted."""
        return self.notes.get("temperature") or 1.0

    def try_score(self, examples: Sequence[Example]) -> list[tuple[float, ...] | Rejected]:
        """One score per target for every example, or why there is none."""
        made = list(self.renderer.render(examples))
        groups = [g for g in made if isinstance(g, Group)]
        scores = iter(score_groups(self.model, groups, self.batch, self.notes.get("precision") or "auto"))
        return [m if isinstance(m, Rejected) else tuple(map(float, next(scores))) for m in made]

    def __call__(self, examples: Sequence[Example]) -> list[tuple[float, ...]]:
        """One score per target for every example; an example that cannot be scored is a DataError."""
        scores = self.try_score(examples)
        for score in scores:
            if isinstance(score, Rejected):
                raise DataError(f"example {score.row} cannot be scored: {score.reason}", "leave it out, or load with another max_length")
        return scores  # type: ignore[return-value]

    def score_rollouts(self, rollouts: Sequence[Rollout]) -> list[tuple[float, ...] | Rejected]:
        """Per rollout the scores of its steps (one, unless the model reads steps); answers of one prompt share its encoding."""
        first: dict[Any, int] = {}  # answers of one text are scored once, so that their scores are equal to the last bit
        same_as = [first.setdefault((r.prompt, self._segments(r)), n) for n, r in enumerate(rollouts)]
        together: dict[Any, list[int]] = {}
        for n in first.values():
            together.setdefault(rollouts[n].prompt, []).append(n)
        chunks = [same[at : at + TOGETHER] for same in together.values() for at in range(0, len(same), TOGETHER)]
        scores: list[tuple[float, ...] | Rejected] = [()] * len(rollouts)
        alone: list[int] = []
        for chunk, score in zip(chunks, self.try_score([self._example([rollouts[n] for n in c]) for c in chunks]), strict=True):
            if isinstance(score, Rejected):  # one of them does not fit; the others may
                alone += chunk
                continue
            parts = iter(score)
            for n in chunk:
                scores[n] = tuple(next(parts) for _ in self._segments(rollouts[n]))
        for n, score in zip(alone, self.try_score([self._example([rollouts[n]]) for n in alone]), strict=True):
            scores[n] = Rejected(source="rollouts", row=rollouts[n].id, reason=score.reason) if isinstance(score, Rejected) else score
        return [self._of(scores[n], rollout) for n, rollout in zip(same_as, rollouts, strict=True)]

    @staticmethod
    def _of(score: tuple[float, ...] | Rejected, rollout: Rollout) -> tuple[float, ...] | Rejected:
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


def score_dataset(recipe: Recipe, source: Dataset, folder: str, actors: int, aggregate: metrics.Aggregation = "last") -> Dataset:
    """The rollouts of a dataset with a `score` each, and `step_scores` where steps are scored, by a pool of actors.

    `aggregate` says how the scores of steps become that of the answer (metrics.AGGREGATIONS); each is a logit.
    """
    [made] = dataflow.transform(recipe, source, partial(_PartScorer, folder, aggregate), kind="scores", actors=actors, gpus=recipe.gpus)
    return made


def label_by_scores(recipe: Recipe, source: Dataset, folder: str, judge: str, labeler: Labeler, settings: Any, actors: int) -> Dataset:
    """Examples of rollouts that a model has judged: its score is the reward, and all whole answers of a prompt are one judgement."""
    make = partial(_PartLabeler, folder, judge, labeler, settings)
    [made] = dataflow.transform(recipe, source, make, kind="examples", actors=actors, gpus=recipe.gpus)
    return made


class _PartScorer:
    """Loads the model once, scores part after part."""

    def __init__(self, folder: str, aggregate: metrics.Aggregation = "last"):
        self.scorer, self.aggregate = Scorer.load(folder), aggregate

    def __call__(self, table: pa.Table) -> Made:
        rejects: list[Rejected] = []
        final: list[float] = []
        steps: list[list[float] | None] = []
        keep = np.ones(table.num_rows, bool)
        for start in range(0, table.num_rows, 4096):
            for n, score in enumerate(self.scorer.score_rollouts(rollouts_of(table.slice(start, 4096))), start):
                if isinstance(score, Rejected):
                    rejects.append(score)
                    keep[n] = False
                else:
                    final.append(metrics.aggregate(score, self.aggregate))
                    steps.append(list(score) if self.scorer.reads_steps else None)
        kept = table.filter(pa.array(keep))
        kept = kept.append_column("score", pa.array(final, pa.float64()))
        kept = kept.append_column("step_scores", pa.array(steps, pa.list_(pa.float64())))
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
