"""Runs that are hindered: killed, stopped, out of room, on groups that shrink; and settings beside one another."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tiny
from rayward import adapters, checkpoints
from rayward.adapters import LoraSettings
from rayward.batching import BatchSettings
from rayward.checkpoints import Writer
from rayward.errors import RaywardError, SettingsError
from rayward.fitting import FitSettings, fit, prepare
from rayward.optimizers import head_parts
from rayward.rendering import RenderSettings
from rayward.reward_model import ModelSettings, RewardModel, load_model
from rayward.storage import Dataset
from rayward.training import TrainSettings, freeze
from test_bodies import MORE
from tiny import classifier, language_model, toy_dataset

torch.set_num_threads(1)
pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parents[1]
TRAIN = TrainSettings(epochs=2, lr=2e-3, log_every=1, validate_every=2, checkpoint_every=2)
LORA = LoraSettings(rank=4)


class Crash(Exception):
    """What stands for a lost machine."""


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return toy_dataset("pairs", tmp_path_factory.mktemp("pairs"), problems=60)


def settings_of(examples: Dataset, **changes: Any) -> FitSettings:
    return replace(tiny.FIT, **{"examples": str(examples.path), "train": TRAIN, **changes})


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "model" / "model.safetensors")


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def lines(output: Path) -> list[dict[str, float]]:
    read = [json.loads(line) for line in (output / "run" / "metrics.jsonl").read_text().splitlines()]
    return [{n: v for n, v in line.items() if n != "tokens_per_s"} for line in read]


def hidden(output: Path) -> list[str]:
    """What a run left half done."""
    return [str(p) for p in output.rglob("*") if p.name.startswith(".") or "partial" in p.name]


# ------------------------------------------------------------------------------------------------- settings beside one another

BESIDE: list[tuple[str, dict[str, Any]]] = [
    ("recompute", {"train": replace(TRAIN, recompute=True)}),
    ("everything", {"train": replace(TRAIN, schedule="wsd", layer_decay=0.9, freeze_layers=1, average=0.9, patience=5, recompute=True)}),
    ("adapters", {"lora": replace(LORA, dropout=0.1), "train": replace(TRAIN, average=0.9, freeze_layers=1, recompute=True)}),
    ("deep head", {"lora": LORA, "net": ModelSettings(width=32, head_layers=2), "train": replace(TRAIN, layer_decay=0.8, average=0.9)}),
    ("head alone", {"train": replace(TRAIN, freeze_layers=-1, average=0.5, schedule="linear", recompute=True)}),
    ("last", {"lora": LORA, "train": replace(TRAIN, average=0.9, best_by="last")}),
]


@pytest.mark.parametrize(("name", "changes"), BESIDE)
def test_settings_beside_one_another_go_on_after_a_crash(name: str, changes: dict[str, Any], pairs: Dataset, tmp_path: Path) -> None:
    if "lora" in changes:
        pytest.importorskip("peft")
    settings = settings_of(pairs, **changes)
    whole = fit(settings, str(tmp_path / "whole"))

    def crash(line: dict[str, float]) -> None:
        if line["step"] == 5:
            raise Crash

    with pytest.raises(Crash):
        fit(settings, str(tmp_path / "broken"), report=crash)
    done = fit(settings, str(tmp_path / "broken"))
    assert done.metrics == whole.metrics
    assert equal(weights(tmp_path / "broken"), weights(tmp_path / "whole"))
    assert lines(tmp_path / "broken") == lines(tmp_path / "whole")
    assert not hidden(tmp_path / "broken")
    assert fit(settings, str(tmp_path / "broken")) == done


def test_recomputing_changes_no_bit(pairs: Dataset, tmp_path: Path) -> None:
    fit(settings_of(pairs), str(tmp_path / "plain"))
    fit(settings_of(pairs, train=replace(TRAIN, recompute=True)), str(tmp_path / "again"))
    assert equal(weights(tmp_path / "plain"), weights(tmp_path / "again"))


def test_adapters_that_would_all_be_frozen_are_refused(pairs: Dataset, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    with pytest.raises(SettingsError, match=r"freeze_layers=-1 leaves no layer where lora.rank=4(.|\n)*leave one"):
        fit(settings_of(pairs, lora=LORA, train=replace(TRAIN, freeze_layers=-1)), str(tmp_path))


def test_offloading_what_is_not_kept_or_already_there_is_refused(pairs: Dataset, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="offload=true is about what recompute=true keeps"):
        TrainSettings(offload=True)
    if not torch.cuda.is_available():
        with pytest.raises(SettingsError, match=r"there is no GPU(.|\n)*leave it out"):
            fit(settings_of(pairs, train=replace(TRAIN, recompute=True, offload=True)), str(tmp_path))


def test_a_run_with_another_of_the_new_settings_is_refused(pairs: Dataset, tmp_path: Path) -> None:
    fit(settings_of(pairs), str(tmp_path))
    with pytest.raises(SettingsError, match=r"train.average: 0.0 -> 0.5; train.schedule: cosine -> wsd"):
        fit(settings_of(pairs, train=replace(TRAIN, average=0.5, schedule="wsd")), str(tmp_path))


# ------------------------------------------------------------------------------------------------------ from a language model


def from_base(pairs: Dataset, base: Path, **changes: Any) -> FitSettings:
    """A fit that puts a fresh head on what lies in `base`."""
    once = replace(TRAIN, epochs=1)
    usual = {"model": str(base), "net": ModelSettings(new_head=True), "render": RenderSettings(max_length=256), "train": once}
    return settings_of(pairs, **{**usual, **changes})


@pytest.fixture
def bodies(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bodies that test_bodies has besides."""
    for kind, body in MORE.items():
        monkeypatch.setitem(tiny.BODIES, kind, body)


def test_a_fresh_head_is_a_function_of_the_seed_alone(pairs: Dataset, tmp_path: Path) -> None:
    language_model(tmp_path / "base")
    starts = []
    for n, seed in enumerate((3, 3, 4)):
        torch.manual_seed(n)  # whatever was drawn before in this process
        prepare(from_base(pairs, tmp_path / "base", train=replace(TRAIN, seed=seed)), str(tmp_path / f"{n}"))
        starts.append(load_file(tmp_path / f"{n}" / "start" / "model.safetensors"))
    assert equal(starts[0], starts[1])
    assert {name for name in starts[0] if not torch.equal(starts[0][name], starts[2][name])} == {"score.weight"}


@pytest.mark.usefixtures("bodies")
@pytest.mark.parametrize(
    ("kind", "changes", "times"), [("mistral", {"sliding_window": 16}, 1), ("jamba", {}, 1), ("mistral", {}, 0), ("qwen3", {}, 0)]
)
def test_a_body_that_cannot_share_a_prompt_says_so_in_one_line(
    kind: str, changes: dict[str, Any], times: int, pairs: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    language_model(tmp_path / "base", kind, **changes)
    fit(from_base(pairs, tmp_path / "base", batch=BatchSettings(size=64)), str(tmp_path / "fit"))
    said = capsys.readouterr()
    lines = [line for line in (said.out + said.err).splitlines() if "cannot share a prompt" in line]
    assert len(lines) == times


@pytest.mark.usefixtures("bodies")
def test_a_mixture_of_experts_gets_a_head_and_is_trained_whole(pairs: Dataset, tmp_path: Path) -> None:
    language_model(tmp_path / "base", "qwen3_moe")
    fit(from_base(pairs, tmp_path / "base", regularise='{"balance": 0.01}'), str(tmp_path / "fit"))
    before, after = (load_file(tmp_path / "fit" / name / "model.safetensors") for name in ("start", "model"))
    assert before.keys() == after.keys()
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert {name for name in after if "experts" in name or "gate" in name or name.startswith("score")} <= moved
    curve = [line["loss"] for line in lines(tmp_path / "fit") if "loss" in line]
    assert curve[-1] < curve[0]


def test_a_checkpoint_in_half_precision_is_trained_and_kept_in_float32(pairs: Dataset, tmp_path: Path) -> None:
    halved = language_model(tmp_path / "base").to(torch.bfloat16)
    halved.save_pretrained(tmp_path / "base")
    stored = load_file(tmp_path / "base" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    settings = from_base(pairs, tmp_path / "base", train=replace(TRAIN, epochs=1, lr=1e-5))
    prepared = prepare(settings, str(tmp_path / "fit"))
    assert {p.dtype for p in prepared.loaded.model.parameters()} == {torch.float32}
    assert prepared.train().metrics
    for name in ("start", "model"):
        kept = load_file(tmp_path / "fit" / name / "model.safetensors")
        assert {tensor.dtype for tensor in kept.values()} == {torch.float32}
        assert json.loads((tmp_path / "fit" / name / "config.json").read_text())["dtype"] == "float32"
        same = [torch.equal(kept[n], stored[n].float()) for n in kept if n in stored]
        assert all(same) if name == "start" else not any(same)  # steps that bfloat16 would have rounded away


# ------------------------------------------------------------------------------------------------------------ what is frozen

PARTS = [
    ("qwen3", {"score"}),
    ("gpt2", {"score"}),
    ("bert", {"classifier", "bert.pooler"}),
    ("roberta", {"classifier"}),
    ("deberta-v2", {"classifier", "pooler"}),
    ("modernbert", {"classifier", "head"}),
]


@pytest.mark.parametrize(("kind", "parts"), PARTS)
def test_what_is_new_with_a_head_is_never_frozen(kind: str, parts: set[str]) -> None:
    pytest.importorskip("peft")
    for how in ("frozen", "adapted"):
        model = RewardModel(classifier(kind))
        assert set(head_parts(model.classifier, model.head_name)) == parts
        if how == "frozen":
            freeze(model, -1)
        else:
            adapters.add(model.classifier, model.head_name, LoraSettings(rank=2))
        trained = {n for n, p in model.classifier.named_parameters() if p.requires_grad and "lora_" not in n}
        assert trained == {n for n, _ in model.classifier.named_parameters() if any(n.startswith(p + ".") for p in parts)}
        assert not [n for n, _ in model.classifier.named_parameters() if "lora_" in n and any(n.startswith(p + ".") for p in parts)]


# ----------------------------------------------------------------------------------------------------------- writing checkpoints


def stepped(width: int = 64) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A layer and its optimizer after a step."""
    torch.manual_seed(0)
    model = torch.nn.Linear(width, width)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, width)).sum().backward()
    optimizer.step()
    return model, optimizer


def save(folder: Path, step: int, width: int = 64, error: Exception | None = None, most: int = 0) -> torch.nn.Module:
    """Write a checkpoint, with an error at once after it began, or on a disk with room for files of `most` bytes."""
    model, optimizer = stepped(width)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most or soft, hard))
    try:
        with Writer(folder) as writer:
            writer.save(f"step-{step:08d}", model, optimizer, {"step": step})
            if error is not None:
                raise error
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    return model


def test_an_error_while_a_checkpoint_is_written_leaves_it_whole(tmp_path: Path) -> None:
    with pytest.raises(Crash):
        save(tmp_path, 1, width=1500, error=Crash())  # 27 MB: still being written when the error comes
    [kept] = checkpoints.steps(tmp_path)
    other, its = stepped(1500)
    torch.nn.init.zeros_(other.weight)  # type: ignore[arg-type]
    assert checkpoints.load(kept, other, its)["step"] == 1
    assert torch.equal(other.weight, stepped(1500)[0].weight)  # type: ignore[arg-type]
    assert not hidden(tmp_path)


def test_what_is_not_copied_is_the_same_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = stepped()
    average = {name: p.detach() * 0.5 for name, p in model.named_parameters()}
    for name, most in (("copied", 2**30), ("waited", 0)):
        monkeypatch.setattr(checkpoints, "COPIED", most)
        with Writer(tmp_path / name) as writer:
            writer.save("step-00000001", model, optimizer, {"step": 1}, average)
            if not most:
                assert checkpoints.steps(tmp_path / name)  # it is there when training goes on
    copied, waited = ({p.name: p.read_bytes() for p in (tmp_path / n / "step-00000001").iterdir()} for n in ("copied", "waited"))
    assert copied == waited
    assert len(copied) == 4


def test_a_full_disk_ends_the_run_and_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 1, width=300)
    with pytest.raises(RaywardError, match=r"step-00000002 cannot be written(.|\n)*make room(.|\n)*goes on from step-00000001"):
        save(tmp_path, 2, width=300, most=100_000)
    assert [p.name for p in checkpoints.steps(tmp_path)] == ["step-00000001"]
    assert not hidden(tmp_path)


def test_both_errors_are_told_where_there_are_two(tmp_path: Path) -> None:
    with pytest.raises(Crash) as caught:
        save(tmp_path, 1, width=300, error=Crash(), most=100_000)
    assert "step-00000001 cannot be written" in caught.value.__notes__[0]


def test_what_a_killed_run_left_is_tidied_and_the_best_comes_back(tmp_path: Path) -> None:
    model, _ = stepped()
    with Writer(tmp_path) as writer:
        writer.save("best-00000003", model, None, {"step": 3}, best=[3])
    (tmp_path / "best-00000003").rename(tmp_path / ".best-00000003.old")  # killed between the two renames
    (tmp_path / ".best-00000003.partial").mkdir()
    (tmp_path / ".step-00000007.partial").mkdir()
    Writer(tmp_path, rank=1)
    assert not (tmp_path / "best-00000003").exists()  # the first worker alone does it
    Writer(tmp_path)
    assert checkpoints.read_state(tmp_path / "best-00000003") == {"step": 3}
    assert not hidden(tmp_path)


# --------------------------------------------------------------------------------------------------------- kill -9 and Ctrl-C

LONG = replace(TRAIN, epochs=100, log_every=5, validate_every=50, checkpoint_every=10, average=0.9)
LONG_STEPS = 500  # at least; of fewer, five random kills would leave too little behind the last


def job(pairs: Dataset, output: Path, *words: str) -> subprocess.Popen[str]:
    """The command of `settings_of(pairs, train=LONG)`, as a process group of its own that Ctrl-C reaches."""
    said = f"--examples {pairs.path} --output {output} --validation-share 0.2 --set net.width=32 --set render.max_length=128"
    said += " --set batch.size=8 --set train.lr=2e-3 --set train.epochs=100 --set train.log_every=5 --set train.validate_every=50"
    said += " --set train.checkpoint_every=10 --set train.average=0.9"
    env = {**os.environ, "RAYWARD_STORE": str(output.parent / "store"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "jobs" / "train_reward_model.py"), *said.split(), *words]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def step_of(output: Path) -> int:
    """The step of the last line of metrics."""
    metrics = output / "run" / "metrics.jsonl"
    whole = [line for line in metrics.read_text().splitlines() if line.endswith("}")] if metrics.exists() else []
    return int(json.loads(whole[-1])["step"]) if whole else 0


def wait_until(there: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    while process.poll() is None and not there():
        time.sleep(0.005)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_killed_five_times_at_random_ends_with_the_same_weights(pairs: Dataset, tmp_path: Path) -> None:
    fit(settings_of(pairs, train=LONG), str(tmp_path / "whole"))
    assert step_of(tmp_path / "whole") >= LONG_STEPS
    output, rng = tmp_path / "killed", random.Random(0)
    for _ in range(5):
        process, begun, more = job(pairs, output), step_of(output), rng.randint(10, 90)
        wait_until(lambda begun=begun, more=more: step_of(output) >= begun + more, process)  # type: ignore[misc]
        time.sleep(rng.random() * 0.05)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    process = job(pairs, output)
    _, said = process.communicate()
    assert process.returncode == 0, said
    assert equal(weights(output), weights(tmp_path / "whole"))
    assert lines(output) == lines(tmp_path / "whole")
    assert not hidden(output)


def worker_pids() -> list[int]:
    """The training workers among the processes below this one."""
    import psutil  # comes with ray

    return [p.pid for p in psutil.Process().children(recursive=True) if "TrainWorker" in " ".join(p.cmdline())]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_worker_killed_five_times_at_random_changes_no_bit(ray_cluster: Any, pairs: Dataset, tmp_path: Path) -> None:
    settings = settings_of(pairs, train=LONG, batch=BatchSettings(size=8, micro_tokens=400))
    fit(settings, str(tmp_path / "whole"), workers=2)
    assert step_of(tmp_path / "whole") >= LONG_STEPS
    output, rng, done = tmp_path / "killed", random.Random(0), threading.Event()
    killed: list[int] = []

    def kill() -> None:
        due = rng.randint(40, 110)
        while not done.wait(0.02) and len(killed) < 5:
            if step_of(output) >= due and (pids := worker_pids()):
                os.kill(rng.choice(pids), signal.SIGKILL)
                killed.append(step_of(output))
                due = killed[-1] + rng.randint(40, 110)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        fit(settings, str(output), workers=2)
    finally:
        done.set()
        killer.join()
    assert len(killed) == 5
    assert equal(weights(output), weights(tmp_path / "whole"))
    assert lines(output) == lines(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ctrl_c_on_workers_keeps_the_step_and_the_same_command_goes_on(pairs: Dataset, tmp_path: Path) -> None:
    output = tmp_path / "out"
    process = job(pairs, output, "--workers", "2")
    wait_until(lambda: step_of(output) >= 15, process)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert process.returncode == 130, said
    step = checkpoints.read_state(checkpoints.steps(output / "run")[-1])["step"]
    assert f"stopped: step {step} of" in said
    assert step >= 15
    process = job(pairs, output)  # on one worker, in a process
    out, said = process.communicate()
    assert process.returncode == 0, said
    assert f"going on from step {step} of" in out


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_error_that_would_come_again_is_told_at_once(ray_cluster: Any, pairs: Dataset, tmp_path: Path) -> None:
    with pytest.raises(RaywardError, match=r"loss is nan at step 2(.|\n)*lower the learning rate"):
        fit(settings_of(pairs, train=replace(TRAIN, lr=1e30)), str(tmp_path), workers=2)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_elastic_group_takes_what_there_is(ray_cluster: Any, pairs: Dataset, tmp_path: Path) -> None:
    settings = settings_of(pairs)
    fit(settings, str(tmp_path / "alone"))
    from rayward.fitting import prepare

    most = int(ray_cluster.cluster_resources()["CPU"]) + 2
    prepare(settings, str(tmp_path / "elastic"), workers=most, least=1).train()
    for here, there in zip(lines(tmp_path / "elastic"), lines(tmp_path / "alone"), strict=True):
        assert here == pytest.approx(there, abs=1e-5)


@pytest.mark.parametrize(("workers", "least"), [(2, 3), (1, 1), (2, -1)])
def test_a_group_of_no_range_is_refused(workers: int, least: int, pairs: Dataset, tmp_path: Path) -> None:
    from rayward.fitting import prepare

    with pytest.raises(SettingsError, match=f"min_workers={least} and workers={workers} are no range"):
        prepare(settings_of(pairs), str(tmp_path), workers, least)


@pytest.mark.parametrize(
    ("net", "changed", "workers", "said"),
    [
        ({}, {"regularise": '{"balance": 0.1}'}, 1, "balance is about experts"),
        ({}, {"regularise": '{"language": 0.1}'}, 1, "net.language=true"),
        ({"language": True}, {"train": replace(TRAIN, shard=True)}, 2, "reads them as its output layer"),
    ],
)
def test_what_a_body_lacks_is_said_before_the_first_step(
    net: dict[str, Any], changed: dict[str, Any], workers: int, said: str, pairs: Dataset, tmp_path: Path
) -> None:
    from rayward.fitting import prepare

    language_model(tmp_path / "base", tied=True)
    settings = replace(settings_of(pairs), model=str(tmp_path / "base"), net=ModelSettings(new_head=True, **net), **changed)
    with pytest.raises(SettingsError, match=said):
        prepare(settings, str(tmp_path / "fit"), workers)


def test_a_head_without_weights_of_its_own_cannot_be_all_that_is_trained(tmp_path: Path) -> None:
    language_model(tmp_path, tied=True)
    model = load_model(str(tmp_path), ModelSettings(head="verdict", head_tokens="+ -", new_head=True)).model
    with pytest.raises(SettingsError, match="freeze_layers=-1 leaves nothing to train"):
        freeze(model, -1)
