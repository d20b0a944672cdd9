"""How many tokens go through a model at once: the most that fits is found, kept with the run, and the same for all workers.

No GPU is needed: what fits is said by a function.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given
from hypothesis import strategies as st

from rayward.batching import AT_ONCE, BatchSettings, micro_batches
from rayward.errors import SettingsError
from rayward.fitting import FitSettings, fit
from rayward.fitting.memory import FOUND, full_rows, largest, longest_row, measured, through
from rayward.objectives import make_objective
from rayward.rendering import Groups, RenderSettings
from rayward.reward_model import ModelSettings, tiny_model, word_tokenizer
from rayward.training import Run, Team, TrainSettings
from tiny import dataset_of, groups_on_disk, toy_examples

torch.set_num_threads(1)


@given(room=st.integers(0, 3000), most=st.integers(1, 2000))
def test_the_largest_number_that_fits_is_found_within_an_eighth(room: int, most: int) -> None:
    asked: list[int] = []

    def fits(n: int) -> bool:
        asked.append(n)
        return n <= room

    found = largest(fits, most)
    assert found <= min(room, most)
    assert found >= min(room, most) - max(0, found // 8)
    assert max(asked) <= most
    assert len(asked) == len(set(asked)) <= 16


def a_run(folder: Path, batch: BatchSettings, **changes: Any) -> Run:
    """A run of some rankings."""
    examples = toy_examples("rankings", 24, answers=4)[:20]
    tokenizer = word_tokenizer(examples, 8192)
    groups = folder / "groups"
    usual = Run(
        model=tiny_model(examples, ModelSettings(width=16, layers=1), 128, seed=0).model,
        groups=Groups(groups) if groups.exists() else groups_on_disk(tokenizer, examples, groups),
        validation=None,
        objective=make_objective("plackett_luce"),
        train=TrainSettings(),
        batch=batch,
        folder=folder / "run",
    )
    return replace(usual, **changes)


def longest(run: Run) -> int:
    return max(len(run.groups[n].token_T) for n in range(len(run.groups)))


def test_what_was_found_is_kept_and_a_run_that_goes_on_asks_no_more(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = a_run(tmp_path, BatchSettings(size=8, row_tokens=10, micro_tokens=0))
    row = longest(run)
    assert longest_row(run) == (row, 8)
    made = measured(run, lambda rows: rows <= 3)
    assert made.batch == replace(run.batch, micro_tokens=3 * row)
    assert made.total == run.total
    assert f"{3 * row:,} tokens go through the model at once (3 rows of {row:,})" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / FOUND).read_text()) == {"micro_tokens": 3 * row}
    again = measured(run, lambda rows: pytest.fail("asked again"))
    assert again.batch == made.batch
    assert capsys.readouterr().out == ""


def test_a_number_that_is_given_is_taken(tmp_path: Path) -> None:
    run = a_run(tmp_path, BatchSettings(size=8, micro_tokens=700))
    assert measured(run, lambda rows: pytest.fail("asked")) is run
    assert not (tmp_path / "run").exists()


def test_without_a_gpu_it_is_the_default(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = measured(a_run(tmp_path, BatchSettings(size=8, micro_tokens=0)))
    assert made.batch.micro_tokens == AT_ONCE == BatchSettings().micro_tokens
    assert "without a GPU there is nothing to measure" in capsys.readouterr().out


def test_a_row_that_does_not_fit_is_said_with_a_way_out(tmp_path: Path) -> None:
    run = a_run(tmp_path, BatchSettings(size=8, micro_tokens=0))
    with pytest.raises(SettingsError, match=r"not one row of \d+ tokens fits(.|\n)*train.recompute=true"):
        measured(run, lambda rows: False)
    assert not (tmp_path / "run" / FOUND).exists()


def test_no_more_is_tried_than_a_step_can_fill(tmp_path: Path) -> None:
    run = a_run(tmp_path, BatchSettings(size=5, micro_tokens=0))
    asked: list[int] = []
    made = measured(run, lambda rows: asked.append(rows) is None)
    assert max(asked) <= 5
    assert made.batch.micro_tokens == 5 * max(320, longest(run))
    run.model.shares_prefix = False  # every answer a row
    assert longest_row(run) == (max(run.groups[n].longest for n in range(len(run.groups))), 20)


@pytest.mark.parametrize("shared", [True, False])
def test_a_trial_is_full_rows_and_leaves_the_weights_alone(shared: bool, tmp_path: Path) -> None:
    run = a_run(tmp_path, BatchSettings(size=8, micro_tokens=0))
    run.model.shares_prefix = shared
    before = {name: p.clone() for name, p in run.model.named_parameters()}
    batch = full_rows(3, 20, 40, shared)
    assert batch.token_BT.shape == (3, 20)
    assert batch.tokens == 60
    assert int(batch.token_BT.max()) < 40
    run.model.eval()
    through(run.model, batch, run)
    assert not run.model.training
    gradients = [p.grad for p in run.model.parameters()]
    assert all(g is not None and g.isfinite().all() for g in gradients)
    assert all(torch.equal(before[name], p) for name, p in run.model.named_parameters())


def test_batches_of_what_was_not_measured_are_of_the_default(tmp_path: Path) -> None:
    kept = a_run(tmp_path, BatchSettings()).groups
    groups = [kept[n] for n in range(len(kept))]
    one, two = ([n for n, _ in micro_batches(groups, BatchSettings(row_tokens=64, micro_tokens=m), True)] for m in (0, AT_ONCE))
    assert one == two
    assert sorted(np.concatenate(one)) == list(range(len(groups)))


def fit_settings(examples: Path, **changes: Any) -> FitSettings:
    net, render = ModelSettings(width=16, layers=1), RenderSettings(max_length=128)
    usual = FitSettings(str(examples), "tiny", "bradley_terry", net, render, BatchSettings(8, micro_tokens=0), TrainSettings(), 0.2)
    return replace(usual, **changes)


def test_the_same_command_goes_on_and_another_number_is_another_run(tmp_path: Path) -> None:
    dataset_of(toy_examples("pairs", 12, answers=4), tmp_path / "pairs", "label_pairs")
    settings = fit_settings(tmp_path / "pairs")
    first = fit(settings, str(tmp_path / "fit"))
    assert fit(settings, str(tmp_path / "fit")).metrics == first.metrics
    with pytest.raises(SettingsError, match="holds a run with other settings"):
        fit(replace(settings, batch=BatchSettings(8, micro_tokens=500)), str(tmp_path / "fit"))


def test_a_spread_model_wants_a_number() -> None:
    with pytest.raises(SettingsError, match=r"train.shard=true waiting(.|\n)*give a number"):
        fit_settings(Path("e"), train=TrainSettings(shard=True))
    with pytest.raises(ValueError, match="micro_tokens=-1 must be at least 0"):
        BatchSettings(micro_tokens=-1)


def _worker(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    run = a_run(folder, BatchSettings(size=8, row_tokens=10, micro_tokens=0), team=Team.here())
    (folder / f"{rank}").write_text(str(measured(run, lambda rows: rows <= (5, 2)[rank]).batch.micro_tokens))
    dist.destroy_process_group()


@pytest.mark.slow
def test_the_smallest_device_decides_for_all(tmp_path: Path) -> None:
    row = longest(a_run(tmp_path, BatchSettings()))
    mp.spawn(_worker, (tmp_path,), nprocs=2)
    assert [(tmp_path / f"{rank}").read_text() for rank in (0, 1)] == [str(2 * row)] * 2
    assert json.loads((tmp_path / "run" / FOUND).read_text()) == {"micro_tokens": 2 * row}
