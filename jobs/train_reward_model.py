"""Train a reward model from labeled examples, and register it with everything it came from.

    rayward run train_reward_model --examples store/toy/pairs --output store/toy/pairs-model --set train.lr=2e-3
    rayward run train_reward_model --examples E --model Qwen/Qwen3-0.6B-Base --set net.new_head=true --workers 4 --output M --register my-rm
    rayward run train_reward_model --examples store:pairs --output s3://bucket/rm --workers 8 --gpus-per-worker 1 --cpus-per-worker 8

Pairs, rankings, outcomes and steps go through the same loop; the objective follows from the labels unless one is named. Stop it with
Ctrl-C, kill a worker, lose the machine: the same command goes on from the last checkpoint and ends with the same weights. Where the nodes
of a cluster share no disk, OUTPUT is a URL or store:NAME.
"""

from dataclasses import dataclass, replace

from rayward import fitting, registry
from rayward.adapters import LoraSettings
from rayward.batching import BatchSettings
from rayward.config import as_dict, command
from rayward.fitting import FitSettings, Fitted, Resources
from rayward.rendering import RenderSettings
from rayward.reward_model import ModelSettings
from rayward.training import TrainSettings


@dataclass(frozen=True)
class Settings:
    """What train_reward_model needs to know."""

    examples: str  # folder, URL or store:NAME of examples, or of a split with train/ and validation/
    output: str  # folder, URL or store:NAME for the run and the model; all workers must see it
    model: str = "tiny"  # folder, URL or hub name of a model, models:/NAME@ALIAS, or tiny: a small decoder from scratch
    objective: str = "auto"  # a loss (objectives.OBJECTIVES, docs/objectives.md), module:loss, or auto: what the labels are for
    objective_settings: str = "{}"  # JSON of the loss's own settings, e.g. '{"by_count": 8}' for binary_cross_entropy
    regularise: str = "{}"  # JSON of terms that add to the loss and their weights, e.g. '{"centre": 0.01}'
    workers: int = 1  # 1 trains in this process, more on a group of Ray Train workers
    min_workers: int = 0  # fewest workers to go on with while nodes come and go, up to `workers` (0: always that many)
    cpus_per_worker: float = 1.0  # CPU cores that each of several workers holds
    gpus_per_worker: float = -1.0  # GPUs that each of them holds; 0: none, -1: one where the cluster has any or its autoscaler may add some
    wait_s: float = -1.0  # seconds to wait for room; -1: 600 where the cluster is busy or has an autoscaler, none where it is too small
    register: str = ""  # name to register the model under
    validation_share: float = 0.05  # share of prompts held out for validation where the examples have no validation side
    net: ModelSettings = ModelSettings()
    lora: LoraSettings = LoraSettings()
    render: RenderSettings = RenderSettings()
    batch: BatchSettings = BatchSettings()
    train: TrainSettings = TrainSettings()


def main(settings: Settings) -> Fitted:
    """Fit, log, register."""
    settings = replace(settings, model=registry.pinned(settings.model))
    fit = FitSettings.of(settings, model=registry.model_address(settings.model))
    registry.check_name(settings.register)
    per_worker = Resources(settings.cpus_per_worker, settings.gpus_per_worker, settings.wait_s)
    prepared = fitting.prepare(fit, settings.output, settings.workers, settings.min_workers, per_worker, settings.model)
    with registry.run("train_reward_model", as_dict(settings), keep=prepared.place / fitting.TRACKING) as run:
        run.dataset(prepared.sides.dataset, "training")
        fitted = prepared.train(run.metrics)
        run.summary({**{f"best_{n}": v for n, v in fitted.metrics.items()}, "temperature": fitted.notes["temperature"]})
        print(f"model: {fitted.place}    trained on {fitted.examples['train']:,} examples, validated on {fitted.examples['validation']:,}")
        if len(fitted.best) > 1:
            print("kept: " + "; ".join(f"{b['folder']} (loss {b['loss']:.4f}, accuracy {b['accuracy']:.4f})" for b in fitted.best))
        if settings.register:
            version = registry.register(run, fitted.model, settings.register, fitted.tags)
            print(f"registered: models:/{settings.register}/{version}")
    return fitted


if __name__ == "__main__":
    command(main)
