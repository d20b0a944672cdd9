"""Workers of a spread model (`train.shard`) read their shares alone: every number is the one that reading the whole would give.

Two processes on gloo build each model both ways. What workers find out of the trained one is held against the model put together.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification

import tiny
from rayward import adapters
from rayward.adapters import LoraSettings
from rayward.batching import BatchSettings
from rayward.fitting import FitSettings, fit, load_start, prepare
from rayward.fitting.result import judge, judge_together, judged, load_kept
from rayward.fitting.running import Work, held_groups
from rayward.fitting.spreading import load_spread, make_spread
from rayward.fitting.starting import for_training
from rayward.records import Example
from rayward.reward_model import OVERALL, Loaded, ModelSettings, load_model, score_groups
from rayward.sharding import all_tensors, is_sharded, shard
from rayward.storage import Dataset
from rayward.training import Team, TrainSettings, train
from tiny import byte_tokenizer, classifier, dataset_of, example, question, toy_dataset

torch.set_num_threads(1)
CPU = torch.device("cpu")
TRAIN = TrainSettings(lr=2e-3, log_every=1, validate_every=2, checkpoint_every=2, shard=True)
NAMES = ("helpful", "short")

Job = Callable[[Team], None]


def _worker(rank: int, world: int, folder: Path, work: Job) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    work(Team.here(sharded=True))
    dist.destroy_process_group()


def together(folder: Path, work: Job, world: int = 2) -> None:
    (folder / "meet").unlink(missing_ok=True)
    mp.spawn(_worker, (world, folder, work), nprocs=world)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return toy_dataset("pairs", tmp_path_factory.mktemp("pairs"), problems=30)


def judged_by_hand(count: int) -> list[Example]:
    """Ratings of two attributes: how often an answer agrees, and how short it is."""
    made = []
    for n in range(count):
        answers = ("yes " * (1 + n % 3) + "no", "no " * (1 + n % 5))
        targets = tuple(v for a in answers for v in (a.count("yes") / 3, 1 / len(a)))
        asked = example(*answers, prompt=question(f"What is {n} plus {n % 7}?"), id=f"r{n}")
        made.append(replace(asked, targets=targets, counts=(1,) * 4, attributes=NAMES))
    return made


@pytest.fixture(scope="module")
def rated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rated")
    dataset_of(judged_by_hand(40), folder / "ratings", "label_attributes")
    return folder / "ratings"


@pytest.fixture(scope="module")
def liked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the same answers which one is better."""
    folder = tmp_path_factory.mktemp("liked")
    pairs = [replace(e, targets=(1.0, 0.0), counts=(1, 1), attributes=()) for e in judged_by_hand(48)]
    dataset_of(pairs, folder / "pairs", "label_pairs")
    return folder / "pairs"


@pytest.fixture(scope="module")
def rating(tmp_path_factory: pytest.TempPathFactory, rated: Path) -> Path:
    """A model that has learned these attributes."""
    folder = tmp_path_factory.mktemp("rating")
    settings = a_rated(rated, train=replace(TRAIN, shard=False))
    return fit(replace(settings, net=replace(settings.net, verbosity="")), str(folder / "fit")).model


def a_rated(ratings: Path, **changes: Any) -> FitSettings:
    net = ModelSettings(width=32, layers=1, head="attributes", verbosity="tokens")
    return settings_of(ratings, **{"model": "tiny", "net": net, "objective": "squared_error", "validation_share": 0.3, **changes})


def a_body(folder: Path, kind: str, **changes: Any) -> str:
    """A random classifier in several files, as it comes from the hub."""
    classifier(kind, vocabulary=tiny.WORDS, max_position_embeddings=512, **changes).save_pretrained(folder, max_shard_size="40KB")
    byte_tokenizer().save_pretrained(folder)
    assert (folder / "model.safetensors.index.json").is_file()
    return str(folder)


def settings_of(examples: Path | Dataset, **changes: Any) -> FitSettings:
    path = examples if isinstance(examples, Path) else examples.path
    usual = {"net": ModelSettings(), "train": TRAIN, "render": replace(tiny.FIT.render, max_length=256)}
    return replace(tiny.FIT, **{"examples": str(path), "batch": BatchSettings(size=8, micro_tokens=300), **usual, **changes})


# ------------------------------------------------------------------------------------------------------------- both ways alike


def experts(folder: Path) -> str:
    """A mixture of experts: a class holds together what lies apart in its files."""
    few = {"num_local_experts": 4, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model("mixtral", vocab_size=tiny.WORDS, num_key_value_heads=2, pad_token_id=0, num_labels=1, **few)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


def in_half(folder: Path) -> None:
    """The weights in bf16, as they are published."""
    for file in folder.glob("*.safetensors"):
        save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file, {"format": "pt"})


def renamed(folder: Path, before: str, after: str) -> None:
    """A weight of another name, in the files and their index."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    file = folder / index["weight_map"].pop(before)
    index["weight_map"][after] = file.name
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({after if name == before else name: t for name, t in load_file(file).items()}, file, {"format": "pt"})


def a_case(name: str, pairs: Dataset, folder: Path) -> FitSettings:
    """The settings of a fit, with its model in the folder."""
    here = folder / "body"
    if name == "value head":  # OpenRLHF's, which no class knows
        settings = settings_of(pairs, model=a_body(here, "qwen3"))
        renamed(here, "score.weight", "value_head.weight")
        return settings
    if name == "experts":
        return settings_of(pairs, model=experts(here))
    if name == "halves":
        settings = settings_of(pairs, model=a_body(here, "qwen3"))
        in_half(here)
        return settings
    deep = ModelSettings(new_head=True, head_layers=2)
    changes: dict[str, dict[str, Any]] = {
        "from scratch": {"net": ModelSettings(width=32)},
        "deep head": {"net": deep},
        "adapters": {"lora": LoraSettings(rank=4)},
        "frozen": {"train": replace(TRAIN, freeze_layers=1, recompute=True)},
        "step tag": {"render": replace(tiny.FIT.render, max_length=256, step_tag="<extra_0>")},
    }
    kind = name if name in tiny.BODIES else "qwen3"
    model = "tiny" if name == "from scratch" else a_body(here, kind)
    return settings_of(pairs, model=model, **(changes.get(name) or {}))


FEW = ["gemma2", "deep head", "adapters"]
MORE = ["qwen3", "value head", "experts", "bert", "gpt2", "modernbert", "from scratch", "halves", "frozen", "step tag"]


class Compared:
    """Every case built both ways: what differs goes into a file, which is to be empty."""

    def __init__(self, folder: Path, cases: dict[str, FitSettings]):
        self.folder, self.cases = folder, cases

    def __call__(self, team: Team) -> None:
        wrong = [
            f"{name}: {why}" for name, settings in self.cases.items() for why in self.differences(self.folder / name / "fit", settings)
        ]
        (self.folder / f"wrong-{team.rank}").write_text("\n".join(wrong))

    def differences(self, output: Path, settings: FitSettings) -> list[str]:
        assert json.loads((output / "spread" / "seen.json").read_text())["whole"] == ""
        whole = for_training(load_start(output, settings), settings).model
        shard(whole.classifier.base_model, CPU, bf16=False)
        for p in whole.parameters():  # mapped from a file they may lie askew in memory, which costs a last bit of a sum
            if not is_sharded(p):
                p.data = p.data.clone()
        mine = load_spread(output, settings, CPU).model
        a, b = all_tensors(whole.classifier), all_tensors(mine.classifier)
        wrong = [f"{name} differs" for name in a if not torch.equal(local(a[name]), local(b[name]))]
        wrong += [f"{name} is in one only" for name in a.keys() ^ b.keys()]
        wrong += [f"{name} is trained otherwise" for name in a if a[name].requires_grad != b[name].requires_grad]
        facts = [(m.traits, m.seen, m.flat, m.pooling, m.reading, m.training) for m in (whole, mine)]
        batch = [held_groups(output)[0]]  # type: ignore[index]
        scores = [tiny_scores(m, batch) for m in (whole, mine)]
        return wrong + ["another model"] * (facts[0] != facts[1]) + ["other scores"] * (not torch.equal(*scores))


def local(tensor: Tensor) -> Tensor:
    return (tensor.to_local() if is_sharded(tensor) else tensor).detach()  # type: ignore[attr-defined]


def tiny_scores(model: Any, groups: list[Any]) -> Tensor:
    return torch.tensor(score_groups(model, groups, BatchSettings())[0])


@pytest.mark.parametrize("names", [FEW, pytest.param(MORE, marks=pytest.mark.slow)], ids=["few", "more"])
def test_shares_read_alone_are_those_of_the_whole(names: list[str], pairs: Dataset, tmp_path: Path) -> None:
    cases = {}
    for name in names:
        if name == "adapters":
            pytest.importorskip("peft")
        (tmp_path / name).mkdir()
        cases[name] = prepare(a_case(name, pairs, tmp_path / name), str(tmp_path / name / "fit"), workers=2).settings
    together(tmp_path, Compared(tmp_path, cases))
    assert [(tmp_path / f"wrong-{rank}").read_text() for rank in (0, 1)] == ["", ""]


def test_weights_in_another_form_than_in_their_files_are_kept_beside(tmp_path: Path, pairs: Dataset) -> None:
    prepare(settings_of(pairs, model=experts(tmp_path / "body")), str(tmp_path / "fit"), workers=2)
    rest = load_file(tmp_path / "fit" / "spread" / "rest.safetensors")
    assert {f"model.layers.{n}.mlp.experts.{name}" for n in (0, 1) for name in ("gate_up_proj", "down_proj")} <= rest.keys()
    assert not any("self_attn" in name or "embed_tokens" in name for name in rest)


def test_a_model_that_cannot_be_built_without_its_weights_is_read_whole_and_that_is_said(
    pairs: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    body = a_body(tmp_path / "body", "qwen3")
    ready = prepare(settings_of(pairs, model=body), str(tmp_path / "fit"), workers=2)
    classifier: Any = ready.loaded.model.classifier
    classifier.model.layers[1].mlp = classifier.model.layers[0].mlp  # one layer under two names, as some classes have it
    make_spread(tmp_path, None, ready.settings, ready.loaded)
    assert "every worker reads the whole model into the host's memory: it has weights of two names" in capsys.readouterr().out


# -------------------------------------------------------------------------------------------------------- what is found out


class Trained:
    """A fit's training and what comes after it, without Ray."""

    def __init__(self, output: Path, settings: FitSettings):
        self.output, self.settings = output, settings

    def __call__(self, team: Team) -> None:
        loaded = load_spread(self.output, self.settings, CPU)
        run = Work(self.output, None, self.settings).run(loaded.model, team)
        train(run)
        judge_together(run, self.settings)


def put_together(output: Path, settings: FitSettings) -> Loaded:
    loaded = for_training(load_start(output, settings), settings)
    load_kept(output, settings, loaded)
    return loaded


ENDS: dict[str, dict[str, Any]] = {
    "the best": {},
    "an average, the last": {"train": replace(TRAIN, average=0.8, best_by="last")},
    "ended early": {"train": replace(TRAIN, epochs=6, lr=1e-9, validate_every=1, patience=2, best_by="accuracy")},
    "nothing held out": {"validation_share": 0.0},
    "adapters": {"lora": LoraSettings(rank=4)},
}


@pytest.mark.parametrize("end", [name if name == "the best" else pytest.param(name, marks=pytest.mark.slow) for name in ENDS])
def test_workers_find_out_what_the_whole_model_says(end: str, pairs: Dataset, tmp_path: Path) -> None:
    settings = settings_of(pairs, model="tiny", **{"net": ModelSettings(width=32), **ENDS[end]})
    settings = prepare(settings, str(tmp_path / "fit"), workers=2).settings
    together(tmp_path, Trained(tmp_path / "fit", settings))
    found = judged(Work(tmp_path / "fit", None, settings).run())
    assert found is not None
    expected = judge(tmp_path / "fit", settings, put_together(tmp_path / "fit", settings))
    assert found.temperature == (None if expected.temperature is None else pytest.approx(expected.temperature, abs=1e-6))
    assert found.taken_off == ()


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.3, 0.0])
def test_workers_measure_how_much_verbosity_is_to_be_taken_off(share: float, rated: Path, tmp_path: Path) -> None:
    settings = a_rated(rated, validation_share=share)
    settings = prepare(settings, str(tmp_path / "fit"), workers=2).settings
    together(tmp_path, Trained(tmp_path / "fit", settings))
    found = judged(Work(tmp_path / "fit", None, settings).run())
    assert found is not None
    loaded = put_together(tmp_path / "fit", settings)
    expected = judge(tmp_path / "fit", settings, loaded)
    assert found.taken_off == pytest.approx(expected.taken_off, rel=1e-5, abs=1e-7)
    assert len(found.taken_off) == 2
    assert found.temperature == (None if share == 0 else pytest.approx(expected.temperature, abs=1e-6))


# ------------------------------------------------------------------------------------------------------ one score of several

WAYS = ["linear", "gate"]


def combining(liked: Path, rating: Path, way: str, **changes: Any) -> FitSettings:
    """Comparisons teach a model what its attributes come to."""
    net = ModelSettings(overall=way)  # type: ignore[arg-type]
    train = replace(TRAIN, **{"shard": False, "lr": 5e-3, **changes.get("train", {})})
    return settings_of(liked, **{"model": str(rating), "net": net, "validation_share": 0.25, **changes, "train": train})


@pytest.mark.parametrize("way", WAYS)
def test_weights_of_attributes_are_learned_beside_adapters(way: str, liked: Path, rating: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    settings = combining(liked, rating, way, lora=LoraSettings(rank=4))
    fitted = fit(settings, str(tmp_path / "fit"))
    begun, ended = load_file(tmp_path / "fit" / "start" / "model.safetensors"), load_file(fitted.model / "model.safetensors")
    assert begun.keys() == ended.keys()
    moved = {name for name in begun if not torch.equal(begun[name], ended[name])}
    assert {name for name in begun if name.startswith((f"{OVERALL}.", "score."))} <= moved
    assert any(name.endswith("q_proj.weight") for name in moved)
    assert not any("embed" in name or "norm" in name for name in moved)
    groups = list(held_groups(tmp_path / "fit") or ())
    trained = prepare(settings, str(tmp_path / "fit")).loaded  # the same command again: with its adapters, not merged
    load_kept(tmp_path / "fit", settings, trained)
    merged = load_model(str(fitted.model), ModelSettings()).model
    for a, b in zip(*(score_groups(m, groups, BatchSettings()) for m in (trained.model, merged)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


class Curve:
    """Runs on two workers, one after another."""

    def __init__(self, runs: dict[str, FitSettings], folder: Path):
        self.runs, self.folder = runs, folder

    def __call__(self, team: Team) -> None:
        for name, settings in self.runs.items():
            output = self.folder / name
            if settings.train.shard:
                Trained(output, settings)(team)
            else:
                model = for_training(load_start(output, settings), settings).model
                train(Work(output, None, settings).run(model, Team(team.rank, team.size)))


TOLD: dict[str, dict[str, Any]] = {
    "spread": {"train": {"shard": True}},
    "spread, alone": {"train": {"shard": True, "freeze_layers": -1}},
    "spread, adapters": {"train": {"shard": True, "average": 0.8}, "lora": LoraSettings(rank=4)},
    "two workers": {},
    "two workers, adapters": {"lora": LoraSettings(rank=4)},
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_weights_of_attributes_are_learned_alike_on_any_workers(way: str, liked: Path, rating: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    asked = {name: combining(liked, rating, way, **changes) for name, changes in TOLD.items()}
    runs = {name: prepare(s, str(tmp_path / name), workers=2).settings for name, s in asked.items()}
    together(tmp_path, Curve(runs, tmp_path))
    for name, settings in runs.items():
        alone = replace(settings, train=replace(settings.train, shard=False))
        fitted = fit(alone, str(tmp_path / "alone" / name))
        for there, here in zip(lines(tmp_path / "alone" / name), lines(tmp_path / name), strict=True):
            assert here == pytest.approx(there, abs=1e-5), name
        loaded = put_together(tmp_path / name, settings)
        if settings.train.shard:
            found = judged(Work(tmp_path / name, None, settings).run())
            assert found is not None
            assert found.temperature == pytest.approx(judge(tmp_path / name, settings, loaded).temperature, abs=1e-6)
        adapters.merge(loaded.model.classifier)
        theirs = dict(load_model(str(fitted.model), ModelSettings()).model.named_parameters())
        assert dict(loaded.model.named_parameters()).keys() == theirs.keys()
        for part, tensor in loaded.model.named_parameters():
            added = part.endswith(
                f"{OVERALL}.bias"
            )  # to every score: comparisons give it rounding for a gradient, and Adam takes steps by it
            torch.testing.assert_close(tensor, theirs[part], rtol=1e-4, atol=1e-3 if added else 1e-5)


def lines(output: Path) -> list[dict[str, float]]:
    read = [json.loads(line) for line in (output / "run" / "metrics.jsonl").read_text().splitlines()]
    return [{n: v for n, v in line.items() if n != "tokens_per_s"} for line in read]
