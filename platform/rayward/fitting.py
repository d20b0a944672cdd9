"""Fit a reward model: from a folder of examples to a folder with a model, in this process or on Ray Train workers.

    OUTPUT/
      settings.json     what was asked for; the same command goes on from the last checkpoint, another one is refused
      groups/           the examples in tokens, memory-mapped by every worker; what did not fit lies in rejects.parquet
      run/              checkpoints, metrics.jsonl
      tracking.json     the tracked run that the metrics go to
      model/            the result: a Hugging Face folder

One worker runs in this process (a group of two costs a quarter of a minute before its first step); more run under a TorchTrainer that
restarts the group when a worker dies, from the checkpoints in OUTPUT, which all workers must see.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from rayward import adapters, checkpoints, cluster, metrics
from rayward.adapters import LoraSettings
from rayward.batching import BatchSettings
from rayward.config import as_dict, flatten, resolve
from rayward.errors import Interrupted, RaywardError, SettingsError
from rayward.heads import Reading
from rayward.labels import LABELERS
from rayward.objectives import Objective, make_objective
from rayward.progress import Progress
from rayward.records import examples_of, rejects_table
from rayward.rendering import Groups, Renderer, RenderSettings, write_groups
from rayward.reward_model import Loaded, ModelSettings, is_bf16, load_model, read_notes, register_tag, save_model, score_groups, tiny_model
from rayward.sharding import shard
from rayward.splits import Shares, side
from rayward.storage import Dataset, open_dataset
from rayward.training import Report, Run, Team, TrainSettings, freeze, over, stop_on_signal, stopped, train

TRACKING = "tracking.json"  # in OUTPUT: which tracked run it belongs to


STOP = "stop"  # in OUTPUT/run: workers that see it keep a checkpoint and end
FAILED = "failed.txt"  # in OUTPUT/run: an error that would come again; workers that see it do not begin
RETRIES = 3  # times a group of workers is started again without a new checkpoint
SMALL = 2_000_000  # parameters below which one thread is the safer choice (docs/log.md)


@dataclass(frozen=True)
class FitSettings:
    """Everything a fit depends on."""

    examples: str  # folder of examples, or of a split with train/ and validation/
    model: str  # folder or hub name of a model, or `tiny` for a small decoder from scratch
    objective: str  # an entry of objectives.OBJECTIVES, module:loss, or auto (what the examples were labeled for)
    net: ModelSettings
    render: RenderSettings
    batch: BatchSettings
    train: TrainSettings
    validation_share: float  # share of prompts held out where the examples have no validation side
    objective_settings: str = "{}"  # JSON of the loss's own settings
    lora: LoraSettings = LoraSettings()
    regularise: str = "{}"  # JSON of regularisers and their weights

    def __post_init__(self) -> None:
        if not 0 <= self.validation_share < 1:
            raise SettingsError(f"validation_share={self.validation_share} is not a share", "give 0 (no validation) to 0.5")
        if self.objective != "auto":
            self.made_objective()
        adapters.check(self.lora)
        if self.lora.bits == 4 and self.train.shard:
            raise SettingsError("a body in 4 bits (lora.bits=4) cannot be spread (train.shard=true)", "leave one of them out")

    @classmethod
    def of(cls, settings: Any, **others: Any) -> FitSettings:
        """The fit that a job's settings speak of: their fields of the same names, but for `others`."""
        own = {field.name: getattr(settings, field.name) for field in fields(cls)}
        return cls(**{**own, **others})

    def made_objective(self) -> Objective:
        """The objective with its settings and regularisers."""
        return make_objective(self.objective, self.objective_settings, self.regularise)


@dataclass(frozen=True)
class Sides:
    """What is trained on and what is validated on: the sides of a split, or a share of the prompts held out by hash."""

    dataset: Dataset  # what is trained on
    validation: Dataset | None  # its own side, or None: a share of `dataset`
    share: float

    def tables(self, which: Literal["train", "validation"]) -> Iterator[pa.Table]:
        """The examples of a side, a part at a time; an example is never on both."""
        if self.validation is not None:
            yield from (self.dataset if which == "train" else self.validation).tables()
            return
        shares = Shares(validation=self.share, test=0.0, salt="validation while training")
        for table in self.dataset.tables():
            mine = np.array([side(h, shares) == which for h in table["prompt_id"].to_pylist()], bool)
            yield table.filter(pa.array(mine))

    @property
    def labeler(self) -> str:
        """The kind of label: pairs, rankings, outcomes or steps; empty if another pipeline made it."""
        return (labeled_by(self.lineage()) or {"made_by": ""})["made_by"].removeprefix("label_")

    def lineage(self) -> dict[str, Any]:
        """The manifest of what is trained on."""
        return self.dataset.lineage()


def labeled_by(manifest: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The manifest of the labeling behind a dataset, through splits and other pipelines in between.

    >>> labeled_by({"made_by": "split_examples", "inputs": [{"made_by": "label_pairs", "inputs": []}]})["made_by"]
    'label_pairs'
    """
    if (manifest.get("made_by") or "").removeprefix("label_") in LABELERS:
        return manifest
    return next((found for i in manifest.get("inputs") or () if (found := labeled_by(i))), None)


def open_sides(examples: str, validation_share: float) -> Sides:
    """The sides of a folder of examples, or of a split."""
    folder = Path(examples)
    if not (folder / "train" / "manifest.json").is_file():
        return Sides(open_dataset(folder, "examples"), None, validation_share)
    validation = open_dataset(folder / "validation", "examples") if (folder / "validation").is_dir() else None
    return Sides(open_dataset(folder / "train", "examples"), validation, validation_share)


@dataclass(frozen=True)
class Fitted:
    """What a fit ended with."""

    model: Path
    notes: dict[str, Any]  # what the model's config says of itself
    metrics: dict[str, float]  # of the kept weights, on validation
    examples: dict[str, int]  # groups trained on, validated on, rejected
    tags: dict[str, Any]  # what a registered version says of where it came from


@dataclass(frozen=True)
class Prepared:
    """A fit that may begin: everything a user can have got wrong has been looked at."""

    folder: Path
    settings: FitSettings
    sides: Sides
    loaded: Loaded
    workers: int
    least: int  # workers that are enough to go on with; less than `workers`: the group is elastic

    def train(self, report: Report = lambda line: None) -> Fitted:
        """Train, or go on training, and leave the model in OUTPUT/model."""
        folder, settings, loaded = self.folder, self.settings, self.loaded
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if self.workers == 1:
            loaded.model.to(device)
            if "OMP_NUM_THREADS" not in os.environ:  # the user's word comes first
                _set_threads(loaded.model, cluster.cores())
            _train_here(folder, settings, loaded.model, report)
        else:
            _train_on_workers(folder, settings, (self.least, self.workers), report)
        state = _load_kept(folder, settings, loaded)
        if not settings.train.shard:  # what is spread over devices need not fit into one
            loaded.model.to(device)
        held, objective = _held_groups(folder), settings.made_objective()
        notes = {
            "objective": settings.objective,
            "objective_settings": settings.objective_settings,
            "regularise": settings.regularise,
            "labeler": self.sides.labeler,
            "render": as_dict(settings.render),
            "base_model": settings.model,
            "precision": settings.train.precision,
            "data_digest": self.sides.dataset.manifest.digest,
            "chat_template_sha256": hashlib.sha256(str(loaded.tokenizer.chat_template).encode()).hexdigest(),
            "temperature": _temperature(loaded, held, objective, settings) if held is not None else None,
            **({"lora": as_dict(settings.lora)} if settings.lora.rank else {}),
        }
        if settings.lora.rank:
            adapters.merge(loaded.model.classifier)
        model = folder / "model"
        own = {"pooling": loaded.model.pooling, "head": loaded.model.reading.as_notes()}
        if not model.is_dir() or read_notes(model) != {**notes, **own}:
            shutil.rmtree(model, ignore_errors=True)
            _save_whole(Loaded(loaded.model, loaded.tokenizer, notes), model)
        rejects = pq.read_table(folder / "groups" / "rejects.parquet").num_rows
        trained = len(Groups(folder / "groups" / "train"))
        counts = {"train": trained, "validation": len(held) if held is not None else 0, "rejected": rejects}
        kept = {n: v for n, v in state.items() if n != "step"}
        return Fitted(model, notes, kept, counts, _tags(self.sides, notes, kept, counts))


def prepare(settings: FitSettings, output: str, workers: int = 1, least: int = 0) -> Prepared:
    """Look at everything that a fit needs, and make what it starts from: the model and the examples in tokens.

    With `least` > 0 the group is elastic: it goes on with as few workers as that when nodes are lost, and grows again up to `workers`.
    """
    if settings.train.shard and workers == 1:
        raise SettingsError("train.shard=true spreads a model over workers, and there is one", "ask for more: --workers 2")
    if workers < 1:
        raise SettingsError(f"workers={workers} cannot train", "1 trains in this process, more on Ray Train workers")
    if not 0 <= least <= workers or (least and workers == 1):
        raise SettingsError(
            f"min_workers={least} and workers={workers} are no range", "give the most as --workers, the fewest as --min-workers"
        )
    folder = Path(output).absolute()
    sides = open_sides(settings.examples, settings.validation_share)
    settings = replace(settings, objective=_objective_name(settings.objective, sides))
    objective = settings.made_objective()
    settings = replace(settings, net=_fit_head(settings.net, objective))
    _claim(folder, settings, sides)
    loaded = _prepare(folder, settings, sides)
    groups = Groups(folder / "groups" / "train")
    _check_head(settings.objective, objective, loaded.model.reading)
    _check_targets(settings.objective, objective, groups)
    if sides.labeler in ("outcomes", "steps") and settings.objective == "squared_error":
        raise SettingsError(
            f"objective=squared_error would learn the chances of {sides.labeler} themselves, and scores of them are read as logits",
            "use binary_cross_entropy, which learns the same chances",
        )
    if settings.train.patience and _held_groups(folder) is None:
        raise SettingsError("train.patience counts validations, and nothing is held out", "--validation-share 0.05, or leave patience out")
    if loaded.model.pooling != "last" and groups.has_steps():
        raise SettingsError(
            f"pooling={loaded.model.pooling} gives one score to a whole answer, and these examples have a target for every step",
            "use a decoder (with --set net.pooling=last)",
        )
    return Prepared(folder, settings, sides, _for_training(loaded, settings), workers, least or workers)


def fit(settings: FitSettings, output: str, workers: int = 1, report: Report = lambda line: None) -> Fitted:
    """Train, or go on training, and leave the model in OUTPUT/model."""
    return prepare(settings, output, workers).train(report)


def _tags(sides: Sides, notes: Mapping[str, Any], kept: Mapping[str, float], counts: Mapping[str, int]) -> dict[str, Any]:
    labeling = labeled_by(sides.lineage()) or {}
    said = flatten({"label": (labeling.get("settings") or {}).get("label") or {}, "examples": {"path": str(sides.dataset.path), **counts}})
    sources = [i.get("digest") or i.get("sha256") for i in labeling.get("inputs") or ()]
    return {**flatten(notes), **{f"best_{n}": v for n, v in kept.items()}, **said, "label.input_digests": " ".join(filter(None, sources))}


# ------------------------------------------------------------------------------------------------------- before the training


def _objective_name(name: str, sides: Sides) -> str:
    if name != "auto":
        return name
    if sides.labeler not in LABELERS:
        raise SettingsError(
            f"objective=auto: {sides.dataset.path} does not say which labeler made it",
            "name one, e.g. --objective bradley_terry",
        )
    return LABELERS[sides.labeler].objective


def _fit_head(net: ModelSettings, objective: Objective) -> ModelSettings:
    """The head that an objective needs, where none is named."""
    return replace(net, head=objective.head) if objective.head and net.head == "auto" else net


def _check_head(name: str, objective: Objective, reading: Reading) -> None:
    if objective.head and reading.kind != objective.head:
        raise SettingsError(
            f"objective={name} needs a head of kind {objective.head}, and the model has {reading.kind}", "leave net.head out"
        )


def _check_targets(name: str, objective: Objective, groups: Groups) -> None:
    low, high = groups.target_range()
    if objective.unit and (low < 0 or high > 1):
        raise SettingsError(
            f"objective={name} needs targets between 0 and 1; these lie between {low:g} and {high:g}",
            "use bradley_terry or plackett_luce for rewards, or label outcomes, steps or votes",
        )
    if objective.steps and not groups.has_steps():
        raise SettingsError(f"objective={name} compares the steps of an answer, and no answer has steps", "label steps, or name another")
    if objective.compares and not groups.has_order():
        raise SettingsError(
            f"objective={name} compares places of one example, and no example has two with different targets",
            "use --objective binary_cross_entropy, or label pairs or rankings",
        )


def _claim(folder: Path, settings: FitSettings, sides: Sides) -> None:
    """Say whose OUTPUT this is; another run's checkpoints are never continued by accident."""
    mine = {**as_dict(settings), "data_digest": sides.dataset.manifest.digest}
    path = folder / "settings.json"
    if path.exists():
        theirs = json.loads(path.read_text(encoding="utf-8"))
        if theirs != mine and not checkpoints.steps(folder / "run"):  # it never took a step: nothing is lost
            for made in ("start", "groups", "run", "model"):
                shutil.rmtree(folder / made, ignore_errors=True)
            (folder / TRACKING).unlink(missing_ok=True)
        elif theirs != mine:
            before, now = flatten(theirs), flatten(mine)
            changed = [f"{n}: {before.get(n)} -> {now.get(n)}" for n in sorted(before.keys() | now.keys()) if before.get(n) != now.get(n)]
            raise SettingsError(
                f"{folder} holds a run with other settings ({'; '.join(changed[:4])}{'; ...' if len(changed) > 4 else ''})",
                "choose another --output, or remove that folder",
            )
    elif folder.is_dir() and any(p.name != TRACKING for p in folder.iterdir()):
        raise SettingsError(f"{folder} is not empty and holds no run of this job", "choose another --output")
    folder.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".partial")
    aside.write_text(json.dumps(mine, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    aside.replace(path)


def _prepare(folder: Path, settings: FitSettings, sides: Sides) -> Loaded:
    """The model to start from and the examples in tokens, once; a run that goes on finds them there."""
    start, ready = folder / "start", folder / "groups" / "rejects.parquet"
    if not start.is_dir():
        fresh = _fresh(settings, sides)
        tagged = bool(settings.render.step_tag) and register_tag(fresh, settings.render.step_tag)
        if settings.model == "tiny" or settings.net.new_head or tagged:
            _save_whole(fresh, start)
    loaded = _load_start(folder, settings)
    if not loaded.model.shares_prefix:
        print("this model cannot share a prompt among its answers: every answer is a sequence of its own, with the prompt in front")
    if not ready.is_file():
        shutil.rmtree(folder / "groups", ignore_errors=True)
        renderer = Renderer(loaded.tokenizer, settings.render, loaded.model.reading.attributes)
        rejects = write_groups(folder / "groups" / "train", sides.tables("train"), renderer)
        if any(table.num_rows for table in sides.tables("validation")):
            rejects += write_groups(folder / "groups" / "validation", sides.tables("validation"), renderer, "validation example")
        pq.write_table(rejects_table(rejects), ready.with_suffix(".partial"))
        ready.with_suffix(".partial").rename(ready)
    reasons = Counter(r.partition(":")[0] for r in pq.read_table(ready)["reason"].to_pylist())
    if reasons:
        said = ", ".join(f"{reason} {n:,}" for reason, n in reasons.most_common())
        print(f"{sum(reasons.values()):,} examples left out ({said}); see {ready}")
    return loaded


def _fresh(settings: FitSettings, sides: Sides) -> Loaded:
    """The model before anything is learned: made from scratch, or loaded, with a new head where one is asked for."""
    first = next((e for table in sides.tables("train") for e in examples_of(table.slice(0, 1))), None)
    attributes = first.attributes if first else ()
    if settings.model == "tiny":
        words = (e for table in sides.tables("train") for e in examples_of(table))
        return tiny_model(words, settings.net, settings.render.max_length, settings.train.seed, attributes)
    torch.manual_seed(settings.train.seed)
    return load_model(settings.model, settings.net, settings.render.max_length, attributes)


def _load_start(folder: Path, settings: FitSettings) -> Loaded:
    """What every worker starts from: what `_fresh` left in OUTPUT/start, or the model that was named, untouched."""
    start = folder / "start"
    how = adapters.quantized(settings.lora)
    if start.is_dir():
        return load_model(str(start), replace(settings.net, new_head=False, head="auto"), settings.render.max_length, how=how)
    return load_model(settings.model, settings.net, settings.render.max_length, how=how)


def _for_training(loaded: Loaded, settings: FitSettings) -> Loaded:
    """The model with what is trained of it: adapters, or the layers that are not frozen."""
    adapters.add(loaded.model.classifier, loaded.model.head_name, settings.lora)
    freeze(loaded.model, settings.train.freeze_layers)
    if settings.lora.rank and not any("lora_" in name and p.requires_grad for name, p in loaded.model.classifier.named_parameters()):
        raise SettingsError(
            f"train.freeze_layers={settings.train.freeze_layers} leaves no layer where lora.rank={settings.lora.rank} could adapt one",
            "leave one of them out",
        )
    if settings.train.offload and not torch.cuda.is_available():
        raise SettingsError("train.offload=true moves activations from a GPU to the host, and there is no GPU", "leave it out")
    if settings.train.recompute:
        try:
            loaded.model.classifier.activation_checkpointing_enable({"use_reentrant": False}, offload=settings.train.offload)
        except ValueError as error:
            raise SettingsError(f"train.recompute=true: {error}", "leave it out") from None
    return loaded


def _save_whole(loaded: Loaded, folder: Path) -> None:
    aside = folder.with_name(folder.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    save_model(loaded.model, loaded.tokenizer, aside, loaded.notes)
    aside.rename(folder)


def _held_groups(folder: Path) -> Groups | None:
    held = folder / "groups" / "validation"
    return Groups(held) if held.is_dir() else None


# ------------------------------------------------------------------------------------------------------------- the training


def _run(folder: Path, settings: FitSettings, loaded_model: Any, report: Report, team: Team) -> Run:
    return Run(
        model=loaded_model,
        groups=Groups(folder / "groups" / "train"),
        validation=_held_groups(folder),
        objective=settings.made_objective(),
        train=settings.train,
        batch=settings.batch,
        folder=folder / "run",
        report=report,
        team=team,
    )


def _train_here(folder: Path, settings: FitSettings, model: Any, report: Report) -> None:
    run = _run(folder, settings, model, lambda line: None, Team())
    kept = checkpoints.steps(run.folder)
    begun = checkpoints.read_state(kept[-1])["step"] if kept else 0
    with Progress("train", total=run.total, unit="steps", start=begun) as bar:
        if 0 < begun < run.total:
            print(f"going on from step {begun} of {run.total}")
        train(replace(run, report=_telling(bar, report)))


def _telling(bar: Progress, report: Report) -> Report:
    """Show a line of metrics behind the bar, and pass it on."""
    said: dict[str, str] = {}

    def tell(line: dict[str, float]) -> None:
        names = {"loss": "loss", "accuracy": "accuracy", "validation_loss": "val-loss", "validation_accuracy": "val-accuracy"}
        said.update({short: f"{line[n]:.3f}" for n, short in names.items() if n in line})
        if "tokens_per_s" in line:
            said["tokens/s"] = f"{line['tokens_per_s']:,.0f}"
        bar.advance(int(line["step"]) - bar.done, **said)
        report(line)

    return tell


def _train_on_workers(folder: Path, settings: FitSettings, workers: tuple[int, int], report: Report) -> None:
    """A TorchTrainer group whose workers read and write OUTPUT; this process shows the progress and passes the metrics on.

    `workers` are the fewest and the most. A group that loses a worker is started again, and given up when it failed more than RETRIES
    times without a new checkpoint, or with an error of ours, which would come again.
    """
    run = _run(folder, settings, None, report, Team())
    if _ended(run):
        return
    _forget(run)
    with cluster.connect() as ray:
        ask = _resources(ray.cluster_resources(), *workers)
        with (
            Progress("train", total=run.total, unit="steps", start=_newest(run)) as bar,
            _following(run.folder / "metrics.jsonl", _telling(bar, report)),
        ):
            while not _ended(run):
                before = _newest(run)
                error = _fit_once(folder, settings, ask)
                if (run.folder / FAILED).exists():
                    raise RaywardError((run.folder / FAILED).read_text(encoding="utf-8"))
                if (run.folder / STOP).exists() and not _ended(run):
                    raise stopped(run.folder, _newest(run), run.total)
                if error is not None and _newest(run) == before:
                    raise RaywardError(f"training failed on the workers: {_innermost(error)}") from error
        _forget(run)
        shutil.rmtree(folder / "ray", ignore_errors=True)


def _forget(run: Run) -> None:
    """No word of an earlier group is left."""
    for name in (STOP, FAILED):
        (run.folder / name).unlink(missing_ok=True)


def _newest(run: Run) -> int:
    """The step of the last checkpoint."""
    kept = checkpoints.steps(run.folder)
    return checkpoints.read_state(kept[-1])["step"] if kept else 0


def _ended(run: Run) -> bool:
    """Whether a run has come to its end, and what is left of it is on disk."""
    kept = checkpoints.steps(run.folder)
    state = checkpoints.read_state(kept[-1]) if kept else {"step": 0}
    whole = not run.writes_last or (run.folder / "last").is_dir()
    return (state["step"] == run.total or over(state, run.train)) and whole


def _resources(there: Mapping[str, float], least: int, most: int) -> dict[str, Any]:
    """The arguments of a ScalingConfig for a cluster; SettingsError if it has not even the least."""
    gpus = there.get("GPU") or 0
    for kind, has in (("CPU", there["CPU"]), ("GPU", gpus)):
        if 0 < has < least:
            raise SettingsError(f"{least} workers need {least} {kind}s and this cluster has {has:g}", "ask for fewer workers")
    elastic = {"num_workers": (least, most), "elastic_resize_monitor_interval_s": 30.0} if least < most else {"num_workers": most}
    return {**elastic, "use_gpu": gpus >= least, "resources_per_worker": {"CPU": 1}}


def _fit_once(folder: Path, settings: FitSettings, ask: Mapping[str, Any]) -> Exception | None:
    """Run a group of workers until it ends; what it failed with.

    It runs in a thread: in the main one Ray answers to Ctrl-C by leaving the process as if all were well. Here the first Ctrl-C asks the
    workers to keep a checkpoint and end, and the second one does not wait for them.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    trainer = TorchTrainer(
        _worker,
        train_loop_config={"folder": str(folder), "settings": as_dict(settings)},
        scaling_config=ScalingConfig(**ask),
        run_config=RunConfig(
            name=f"fit-{time.time_ns()}",  # Ray resumes a name it has seen; ours is the only way to resume
            storage_path=str(folder / "ray"),
            failure_config=FailureConfig(max_failures=RETRIES, controller_failure_limit=3),
        ),
    )
    failed: list[Exception] = []

    def fit_workers() -> None:
        try:
            trainer.fit()
        except Exception as error:  # told by the caller
            failed.append(error)

    thread = threading.Thread(target=fit_workers, daemon=True)
    with stop_on_signal() as stop:
        thread.start()
        while thread.is_alive():
            thread.join(0.2)
            if stop.is_set() and thread.is_alive():
                (folder / "run").mkdir(parents=True, exist_ok=True)
                (folder / "run" / STOP).touch()
    return failed[0] if failed else None


def _innermost(error: BaseException) -> str:
    inner = getattr(error, "worker_failures", None) or {}
    return str(next(iter(inner.values()), error)).strip().splitlines()[-1]


def _worker(config: dict[str, Any]) -> None:
    """What every Ray Train worker does."""
    import ray.train
    import ray.train.torch

    folder, settings = Path(config["folder"]), resolve(FitSettings, config["settings"])
    if (folder / "run" / FAILED).exists():
        return
    device = ray.train.torch.get_device()
    loaded = _for_training(_load_start(folder, settings), settings)
    _set_threads(loaded.model, cluster.cores() // ray.train.get_context().get_local_world_size())
    if settings.train.shard:  # from the host's memory, layer by layer
        shard(loaded.model.classifier.base_model, device, bf16=is_bf16(device, settings.train.precision))
    model = loaded.model.to(device)
    run = _run(folder, settings, model, lambda line: None, Team.here(settings.train.shard))
    try:
        train(replace(run, asked_to_stop=(run.folder / STOP).exists))
    except Interrupted:
        return  # the process that started the group tells the user
    except RaywardError as error:  # another try would end alike
        (run.folder / FAILED).write_text(str(error), encoding="utf-8")
        raise


def _set_threads(model: torch.nn.Module, cores: int) -> None:
    """One thread for small models: two are 1.5 times as fast on an idle machine, and many times slower on a busy one."""
    small = sum(p.numel() for p in model.parameters()) < SMALL
    torch.set_num_threads(1 if small else max(1, cores))


@contextmanager
def _following(path: Path, tell: Report) -> Iterator[None]:
    """Pass on every line of a growing file of metrics, once per step and kind."""
    stop, seen = threading.Event(), set()

    def look() -> None:
        if not path.exists():
            return
        for text in path.read_text(encoding="utf-8").splitlines():
            if text.endswith("}") and text not in seen:
                seen.add(text)
                tell(json.loads(text))

    def follow() -> None:
        while not stop.wait(1.0):
            look()

    if path.exists():
        seen.update(path.read_text(encoding="utf-8").splitlines())
    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        look()


# -------------------------------------------------------------------------------------------------------- after the training


def _load_kept(folder: Path, settings: FitSettings, loaded: Loaded) -> dict[str, Any]:
    """Put the weights to keep into the model: the best on validation, or the last."""
    run = folder / "run"
    best = run / "best"
    path = best if settings.train.best_by != "last" and (best / "state.json").is_file() else checkpoints.steps(run)[-1]
    if settings.train.shard and path != best:
        path = run / "last"
    state = checkpoints.load(path, loaded.model.classifier, None)
    if path != best and (tensors := checkpoints.load_average(path)) is not None:
        loaded.model.classifier.load_state_dict(tensors, strict=False)
    return state if path == best else {"step": state["step"]}


def _temperature(loaded: Loaded, held: Groups, objective: Objective, settings: FitSettings) -> float:
    """The temperature that calibrates the scores (or their differences) on the validation side.

    Targets are drawn in as if one more had been right and one wrong (Platt 1999, section 2.2): a few that are all right are no reason
    to be certain of everything.
    """
    groups = [held[n] for n in range(len(held))]
    scores = score_groups(loaded.model, groups, settings.batch, settings.train.precision)
    if objective.probabilities:
        logit, target = np.concatenate(scores), np.concatenate([g.target_K for g in groups])
    else:
        gaps = [
            s[i] - s[j]
            for s, g in zip(scores, groups, strict=True)
            for i in range(len(s))
            for j in range(len(s))
            if g.target_K[i] > g.target_K[j] and (g.column_K is None or g.column_K[i] == g.column_K[j])
        ]
        logit, target = np.array(gaps), np.ones(len(gaps))
    return metrics.fit_temperature(logit, (target * len(target) + 1) / (len(target) + 2))
