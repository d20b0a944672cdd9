"""What a fit starts from: OUTPUT claimed, the examples in tokens, the model before anything is learned, and no mistake of the user's."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import torch

from rayward import adapters, checkpoints, places
from rayward.config import as_dict, flatten
from rayward.dataflow.claims import claimed
from rayward.errors import SettingsError
from rayward.fitting.settings import FitSettings, Sides
from rayward.fitting.working_copy import PREPARED, SETTINGS, SPREAD, TRACKED, TRACKING, push
from rayward.heads import Reading
from rayward.labels import LABELERS
from rayward.mirror import Mirror
from rayward.objectives import Objective
from rayward.records import examples_of, rejects_table
from rayward.rendering import Groups, Renderer, use_template, write_groups
from rayward.reward_model import Loaded, ModelSettings, Seen, load_model, register_tag, save_model, tiny_model
from rayward.reward_model.positions import readable, tell_length
from rayward.storage import write_table
from rayward.toy_world import seed_of
from rayward.training import freeze
from rayward.vocabulary import TIED


def objective_name(name: str, sides: Sides) -> str:
    """The objective that is meant: the one named, or what the examples were labeled for."""
    if name != "auto":
        return name
    if sides.labeler not in LABELERS:
        raise SettingsError(
            f"objective=auto: {sides.dataset.path} does not say which labeler made it",
            "name one, e.g. --objective bradley_terry",
        )
    return LABELERS[sides.labeler].objective


def fit_head(net: ModelSettings, objective: Objective) -> ModelSettings:
    """The head that an objective needs, where none is named."""
    return replace(net, head=objective.head) if objective.head and net.head == "auto" else net


def check(settings: FitSettings, sides: Sides, loaded: Loaded, groups: Groups, held: Groups | None) -> None:
    """SettingsError for what does not go together: objective, head, targets, body."""
    objective = settings.made_objective()
    _check_head(settings.objective, objective, loaded.model.reading)
    loaded.model.check_terms(objective.body_terms)
    if settings.train.shard and loaded.model.reading.output_layer == TIED:
        raise SettingsError(
            "train.shard=true spreads the embeddings over workers, and this model reads them as its output layer, of which it needs all",
            "leave train.shard out, or net.language; instead of head=verdict: head=two_class with head_tokens",
        )
    if settings.train.bootstrap and loaded.model.reading.members == 1:
        raise SettingsError(
            "train.bootstrap=true gives each member of a model examples of its own, and this one has a single head",
            "ask for several, e.g. --set net.members=5 (with --set net.new_head=true), or leave it out",
        )
    _check_overall(loaded.model.reading, groups)
    _check_targets(settings.objective, objective, groups)
    if objective.ends and settings.render.judge:
        raise SettingsError(
            f"objective={settings.objective} reads every token of an answer, and render.judge puts a question behind it",
            "leave one of them out",
        )
    if sides.labeler in ("outcomes", "steps") and settings.objective == "squared_error":
        raise SettingsError(
            f"objective=squared_error would learn the chances of {sides.labeler} themselves, and scores of them are read as logits",
            "use binary_cross_entropy, which learns the same chances",
        )
    if settings.train.patience and held is None:
        raise SettingsError("train.patience counts validations, and nothing is held out", "--validation-share 0.05, or leave patience out")
    if loaded.model.pooling != "last" and groups.has_steps():
        raise SettingsError(
            f"pooling={loaded.model.pooling} gives one score to a whole answer, and these examples have a target for every step",
            "use a decoder (with --set net.pooling=last)",
        )


def _check_head(name: str, objective: Objective, reading: Reading) -> None:
    if objective.head and reading.kind != objective.head:
        raise SettingsError(
            f"objective={name} needs a head of kind {objective.head}, and the model has {reading.kind}", "leave net.head out"
        )


def _check_overall(reading: Reading, groups: Groups) -> None:
    if reading.learns_overall and all((c := groups[n].column_K) is not None and (c >= 0).all() for n in range(len(groups))):
        raise SettingsError(
            f"net.overall={reading.overall} learns what attributes come to, and all of these targets are about attributes themselves",
            "train the attributes first (net.overall=mean), then give comparisons or an overall rating",
        )


def _check_targets(name: str, objective: Objective, groups: Groups) -> None:
    low, high = groups.target_range()
    if objective.unit and (low < 0 or high > 1):
        raise SettingsError(
            f"objective={name} needs targets between 0 and 1; these lie between {low:g} and {high:g}",
            "use bradley_terry or plackett_luce for rewards, or label outcomes, steps or votes",
        )
    if objective.ends and groups.has_steps():
        raise SettingsError(
            f"objective={name} gives an answer's target to all of its tokens, and these answers have a target for every step",
            "use bradley_terry or binary_cross_entropy, or label whole answers",
        )
    if objective.steps and not groups.has_steps():
        raise SettingsError(f"objective={name} compares the steps of an answer, and no answer has steps", "label steps, or name another")
    if objective.compares and not groups.has_order():
        raise SettingsError(
            f"objective={name} compares places of one example, and no example has two with different targets",
            "use --objective binary_cross_entropy, or label pairs or rankings",
        )


def claim(folder: Path, mirror: Mirror | None, settings: FitSettings, sides: Sides) -> None:
    """Say whose OUTPUT this is; another run's checkpoints are never continued by accident."""
    mine = {**as_dict(settings), "data_digest": sides.dataset.manifest.digest}
    path, named = folder / SETTINGS, folder if mirror is None else mirror.there
    if path.exists():
        theirs = json.loads(path.read_text(encoding="utf-8"))
        if theirs != mine and not _stepped(folder, mirror):  # it never took a step: nothing is lost
            with claimed(named, named):  # or it is about to take its first, and keeps what it works with
                for made in (PREPARED, "start", "groups", SPREAD, "run", "model", TRACKING):
                    places.remove(folder / made)
                    if mirror is not None:
                        mirror.remove(made)
        elif theirs != mine:
            before, now = flatten(theirs), flatten(mine)
            changed = [f"{n}: {before.get(n)} -> {now.get(n)}" for n in sorted(before.keys() | now.keys()) if before.get(n) != now.get(n)]
            raise SettingsError(
                f"{named} holds a run with other settings ({'; '.join(changed[:4])}{'; ...' if len(changed) > 4 else ''})",
                "choose another --output, or remove that folder",
            )
    elif any(not name.startswith(TRACKED) for name in _names(folder, mirror)):
        raise SettingsError(f"{named} is not empty and holds no run of this job", "choose another --output")
    for left in folder.glob(f"{places.ASIDE}*"):  # half written when a process was killed
        places.remove(left)
    places.write(path, json.dumps(mine, indent=2, sort_keys=True) + "\n")
    if mirror is not None:
        mirror.send(path.name)


def _names(folder: Path, mirror: Mirror | None) -> set[str]:
    """What OUTPUT holds, but for what a write that was cut off left."""
    if mirror is not None:
        return mirror.names()
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")} if folder.is_dir() else set()


def _stepped(folder: Path, mirror: Mirror | None) -> bool:
    """Whether a run has left a checkpoint to go on from."""
    return bool(checkpoints.steps(folder / "run") if mirror is None else [n for n in (mirror / "run").whole() if n.startswith("step-")])


def make_ready(folder: Path, mirror: Mirror | None, settings: FitSettings, sides: Sides) -> Loaded:
    """The model to start from and the examples in tokens, once; a run that goes on finds them there."""
    start, ready = folder / "start", folder / "groups" / "rejects.parquet"
    if not start.is_dir() and not (folder / PREPARED).is_file():
        fresh = _fresh(settings, sides)
        tagged = bool(settings.render.step_tag) and register_tag(fresh, settings.render.step_tag)
        use_template(fresh.tokenizer, settings.render.chat_template)
        fresh_part = settings.net.new_head or settings.net.overall in ("linear", "gate") or bool(settings.render.chat_template)
        if settings.model == "tiny" or fresh_part or tagged or (mirror is not None and Path(settings.model).is_dir()):
            save_whole(fresh, start)
    loaded = load_start(folder, settings)
    if not loaded.model.shares_prefix:
        print("this model cannot share a prompt among its answers: every answer is a sequence of its own, with the prompt in front")
    if mirror is not None and not (folder / PREPARED).is_file():
        shutil.rmtree(folder / "groups", ignore_errors=True)
    if not ready.is_file():
        shutil.rmtree(folder / "groups", ignore_errors=True)
        render = replace(settings.render, max_length=readable(loaded.model.classifier, settings.render.max_length))
        renderer = Renderer(loaded.tokenizer, render, loaded.model.reading.attributes)
        rejects = write_groups(folder / "groups" / "train", sides.tables("train"), renderer)
        if any(table.num_rows for table in sides.tables("validation")):
            rejects += write_groups(folder / "groups" / "validation", sides.tables("validation"), renderer, "validation example")
        write_table(rejects_table(rejects), ready)
        if mirror is not None:
            push(mirror, "start", "groups")
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
    loaded = load_model(model_files(settings.model), settings.net, settings.render.max_length, attributes)
    tell_length(loaded.model.classifier, settings.render.max_length)
    return loaded


def load_start(folder: Path, settings: FitSettings, known: Seen | None = None) -> Loaded:
    """What every worker starts from: what `_fresh` left in OUTPUT/start, or the model that was named, untouched.

    With what is `known` of it, it is built without its numbers.
    """
    net = replace(settings.net, new_head=False, head="auto") if (folder / "start").is_dir() else settings.net
    return load_model(start_of(folder, settings), net, settings.render.max_length, how=adapters.quantized(settings.lora), known=known)


def start_of(folder: Path, settings: FitSettings) -> str:
    """Where the model lies that a fit starts from."""
    return str(folder / "start") if (folder / "start").is_dir() else model_files(settings.model)


def model_files(model: str) -> str:
    """What a model is loaded from: a copy on this disk of one at a URL, else as it was named."""
    return str(places.fetch(model)) if model.startswith("store:") or places.is_remote(model) else model


def for_training(loaded: Loaded, settings: FitSettings) -> Loaded:
    """The model with what is trained of it: adapters, or the layers that are not frozen. Fresh adapters are a function of the seed."""
    torch.manual_seed(seed_of("adapters", settings.train.seed))
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


def save_whole(loaded: Loaded, folder: Path) -> None:
    """Save a model so that its folder is there whole or not at all."""
    aside = folder.with_name(folder.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    save_model(loaded.model, loaded.tokenizer, aside, loaded.notes)
    aside.rename(folder)
