"""A body spread over workers (FSDP2, on gloo): the same curve as one process, checkpoints that any number of workers reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import distribute_tensor

from rayward import adapters, checkpoints
from rayward.adapters import LoraSettings
from rayward.batching import BatchSettings
from rayward.objectives import make_objective
from rayward.rendering import Groups
from rayward.reward_model import ModelSettings, tiny_model
from rayward.sharding import clip, is_sharded, shard
from rayward.training import Run, Team, TrainSettings, train
from tiny import groups_on_disk, toy_examples

torch.set_num_threads(1)

TRAIN = TrainSettings(epochs=2, lr=2e-3, log_every=1, validate_every=4, checkpoint_every=2, average=0.8, shard=True)
CPU = torch.device("cpu")


class Crash(Exception):
    """What stands for a lost machine."""


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("groups")
    examples = toy_examples("pairs", 60)
    tokenizer = tiny_model(examples, ModelSettings(width=32), 128, seed=0).tokenizer
    groups_on_disk(tokenizer, examples[:30], folder / "train")
    groups_on_disk(tokenizer, examples[30:55], folder / "held")
    return folder / "train", folder / "held"


def a_run(sides: tuple[Path, Path], folder: Path, team: Team, rank: int = 0, **changes: Any) -> Run:
    model = tiny_model(toy_examples("pairs", 60), ModelSettings(width=32), 128, seed=0).model
    adapters.add(model.classifier, "score", LoraSettings(rank=rank))
    if team.sharded:
        shard(model.classifier.base_model, CPU, bf16=False)
    run = Run(
        model=model,
        groups=Groups(sides[0]),
        validation=Groups(sides[1]),
        objective=make_objective("bradley_terry"),
        train=TRAIN,
        batch=BatchSettings(size=8, micro_tokens=300),  # steps of several micro-batches, that two workers cannot halve
        folder=folder,
        team=team,
    )
    return replace(run, **changes)


def lines(folder: Path) -> list[dict[str, float]]:
    import json

    read = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{n: v for n, v in line.items() if n != "tokens_per_s"} for line in read]


def _worker(rank: int, world: int, folder: Path, work: Callable[[Team], None]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet-{world}", rank=rank, world_size=world)
    work(Team.here(sharded=True))
    dist.destroy_process_group()


def together(world: int, folder: Path, work: Callable[[Team], None]) -> None:
    (folder / f"meet-{world}").unlink(missing_ok=True)
    mp.spawn(_worker, (world, folder, work), nprocs=world)


class Whole:
    """A run from beginning to end."""

    def __init__(self, sides: tuple[Path, Path], folder: Path, rank: int = 0, crash: int = 0, held: bool = True, **settings: Any):
        self.sides, self.folder, self.rank, self.crash, self.held, self.settings = sides, folder, rank, crash, held, settings

    def __call__(self, team: Team) -> None:
        run = a_run(self.sides, self.folder, team, self.rank, train=replace(TRAIN, **self.settings))
        run = run if self.held else replace(run, validation=None)

        if not self.crash:
            train(run)
            return
        original = checkpoints.Writer.save

        def save(writer: Any, name: str, *rest: Any, **more: Any) -> None:  # every worker is lost at the same moment
            original(writer, name, *rest, **more)
            if name == f"step-{self.crash:08d}":
                raise Crash

        checkpoints.Writer.save = save  # type: ignore[method-assign]
        with pytest.raises(Crash):
            train(run)


def undisturbed(sides: tuple[Path, Path], folder: Path, rank: int = 0) -> Run:
    run = a_run(sides, folder, Team(), rank, train=replace(TRAIN, shard=False))
    train(run)
    return run


@pytest.mark.parametrize("rank", [0, 4])
def test_spread_over_two_workers_the_curve_is_that_of_one(rank: int, sides: tuple[Path, Path], tmp_path: Path) -> None:
    if rank:
        pytest.importorskip("peft")
    undisturbed(sides, tmp_path / "alone", rank)
    together(2, tmp_path, Whole(sides, tmp_path / "spread", rank))
    for there, here in zip(lines(tmp_path / "alone"), lines(tmp_path / "spread"), strict=True):
        assert here == pytest.approx(there, abs=1e-5)
    alone, spread = (load_file(checkpoints.best(tmp_path / f)[0] / "model.safetensors") for f in ("alone", "spread"))
    assert alone.keys() == spread.keys()
    for name in alone:
        torch.testing.assert_close(spread[name], alone[name], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_what_two_workers_wrote_two_or_one_go_on_from(sides: tuple[Path, Path], tmp_path: Path) -> None:
    undisturbed(sides, tmp_path / "alone")
    for world in (2, 1):
        folder = tmp_path / f"then-{world}"
        together(2, tmp_path, Whole(sides, folder, crash=4))
        assert [p.name for p in checkpoints.steps(folder)] == ["step-00000002", "step-00000004"]
        assert (checkpoints.steps(folder)[-1] / "shards" / ".metadata").is_file()
        together(world, tmp_path, Whole(sides, folder, best_by="loss"))
        for there, here in zip(lines(tmp_path / "alone"), lines(folder), strict=True):
            assert here == pytest.approx(there, abs=1e-5)


def test_the_last_weights_are_whole_where_they_are_what_is_kept(sides: tuple[Path, Path], tmp_path: Path) -> None:
    run = undisturbed(sides, tmp_path / "alone")
    together(2, tmp_path, Whole(sides, tmp_path / "spread", best_by="last"))
    kept = load_file(tmp_path / "spread" / "last" / "model.safetensors")
    mean = checkpoints.load_average(checkpoints.steps(run.folder)[-1])
    assert mean is not None
    for name, tensor in mean.items():
        torch.testing.assert_close(kept[name], tensor, rtol=1e-4, atol=1e-5)


class Shares:
    """How much of the weights a worker holds."""

    def __init__(self, sides: tuple[Path, Path], folder: Path):
        self.sides, self.folder = sides, folder

    def __call__(self, team: Team) -> None:
        model = a_run(self.sides, self.folder, team).model
        held = sum((p.to_local() if hasattr(p, "to_local") else p).numel() for p in model.parameters())
        every = sum(p.numel() for p in model.parameters())
        save_file({"held": torch.tensor([held, every])}, self.folder / f"{team.rank}.safetensors")


def test_a_worker_holds_its_share(sides: tuple[Path, Path], tmp_path: Path) -> None:
    together(2, tmp_path, Shares(sides, tmp_path))
    for rank in (0, 1):
        held, every = load_file(tmp_path / f"{rank}.safetensors")["held"].tolist()
        assert held < 0.55 * every


class Clipped:
    """Gradients of the same loss, clipped: spread over workers, and of the whole by torch itself."""

    def __init__(self, sides: tuple[Path, Path], folder: Path):
        self.sides, self.folder = sides, folder

    def __call__(self, team: Team) -> None:
        whole, spread = (a_run(self.sides, self.folder, t).model for t in (Team(), team))
        for model in (whole, spread):
            for name, p in model.classifier.named_parameters():
                seed = sum(map(ord, name))
                grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
                p.grad = distribute_tensor(grad, p.device_mesh, p.placements) if is_sharded(p) else grad
        clip(list(spread.parameters()), 0.5)
        torch.nn.utils.clip_grad_norm_(whole.parameters(), 0.5)
        for a, b in zip(spread.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(a.grad.full_tensor() if is_sharded(a) else a.grad, b.grad)


def test_gradients_in_part_spread_are_clipped_by_their_common_norm(sides: tuple[Path, Path], tmp_path: Path) -> None:
    together(2, tmp_path, Clipped(sides, tmp_path))


OFTEN: dict[str, Any] = {"validate_every": 1, "checkpoint_every": 1000}  # a validation is followed by a step, and by no checkpoint


def test_a_step_after_a_validation_is_taken_with_the_weights_and_not_with_their_average(sides: tuple[Path, Path], tmp_path: Path) -> None:
    train(a_run(sides, tmp_path / "alone", Team(), train=replace(TRAIN, shard=False, **OFTEN)))
    together(2, tmp_path, Whole(sides, tmp_path / "spread", **OFTEN))
    for there, here in zip(lines(tmp_path / "alone"), lines(tmp_path / "spread"), strict=True):
        assert here == pytest.approx(there, abs=1e-4)


def test_without_validation_the_last_weights_are_what_is_left(sides: tuple[Path, Path], tmp_path: Path) -> None:
    together(2, tmp_path, Whole(sides, tmp_path / "spread", held=False))
    assert (tmp_path / "spread" / "last" / "model.safetensors").is_file()
