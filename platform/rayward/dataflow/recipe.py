"""What is made, from what, and the folder it is made in: kept when a run is killed, gone on with when the same command comes again."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rayward import places
from rayward.config import as_dict, public
from rayward.dataflow.claims import LOCK, claimed
from rayward.dataflow.engine import Engine
from rayward.errors import DataError, SettingsError
from rayward.places import Place, at, is_remote, listing, telling
from rayward.splits import SIDES
from rayward.storage import (
    PUBLISHING,
    Counts,
    Dataset,
    Manifest,
    code_version,
    publish,
    publish_remote,
    read_manifest,
    sibling,
    whole_digest,
)

HOW = ("output", "engine", "overwrite", "parts", "actors", "cpus", "gpus", "memory_gib")  # settings that change where and how, not what


@dataclass(frozen=True)
class Recipe:
    """What is made, and from what: two runs of one recipe make the same dataset."""

    made_by: str
    output: str
    settings: Any  # the pipeline's settings dataclass
    inputs: Sequence[Mapping[str, Any]]
    engine: Engine = "auto"
    overwrite: bool = False
    cpus: float = 1.0  # CPU cores that a task holds on Ray
    gpus: float = -1.0  # GPUs of an actor with a model; -1: one where the cluster has any
    memory_gib: float = 0.0  # GiB of memory that a task holds on Ray; 0: not counted

    def __post_init__(self) -> None:
        gpus = 0.0 if self.gpus == -1 else self.gpus
        if not (0 < self.cpus < math.inf and 0 <= self.memory_gib < math.inf and 0 <= gpus < math.inf):
            raise SettingsError(
                f"cpus={self.cpus:g}, gpus={self.gpus:g}, memory_gib={self.memory_gib:g} is nothing that a task can hold",
                "give some CPUs, 0 or more GiB, and 0 or more GPUs (or -1: one where the cluster has any)",
            )
        output = at(self.output)
        output = Path(os.path.normpath(output)) if isinstance(output, Path) else output
        object.__setattr__(self, "output", str(output))
        for made_from in self.inputs:
            source = made_from.get("path")
            if source and _overlap(at(source), output):
                raise DataError(
                    f"--output {output} and the source {source} are one folder, or one lies in the other", "choose another --output"
                )

    @classmethod
    def of(cls, made_by: str, settings: Any, *inputs: Mapping[str, Any]) -> Recipe:
        """The recipe of a script, whose settings have `output`, and of the recipe's other fields those that the user may set."""
        said = {name: getattr(settings, name) for name in ("engine", "overwrite", "cpus", "gpus", "memory_gib") if hasattr(settings, name)}
        return cls(made_by, settings.output, settings, inputs, **said)

    def how(self, size: int) -> dict[str, Any]:
        """How tasks that read so many bytes are run: where, and what each of them holds there."""
        return {"engine": self.engine, "size": size, "cpus": self.cpus, "memory_gib": self.memory_gib}

    def manifest(self, kind: str, counts: Counts) -> Manifest:
        """The manifest of what was made. Where it was written and how it was run are no part of what it is."""
        counts.check()
        return Manifest(
            kind=kind,
            made_by=self.made_by,
            rows_in=counts.rows_in,
            used=counts.used,
            rejected=dict(sorted(counts.rejected.items())),
            out=counts.out,
            digest=whole_digest(counts.leaves),
            settings=self.content_settings(),
            code_version=code_version(),
            inputs=list(self.inputs),
        )

    def content_settings(self) -> dict[str, Any]:
        """The settings that change what is made."""
        said = {name: value for name, value in as_dict(self.settings).items() if name not in HOW}
        return {name: public(value) if isinstance(value, str) else value for name, value in said.items()}

    def already_made(self) -> bool:
        """Whether OUTPUT holds just this; DataError if it holds something else and may not be replaced."""
        output = at(self.output)
        with telling(output):
            return self._holds_this(output)

    def _holds_this(self, output: Place) -> bool:
        held = _held(output)
        if held is None or (self.overwrite and held.replaceable):
            return False
        for path in held.manifests:
            manifest = read_manifest(path)
            if manifest.made_by == self.made_by and _same(manifest, self):
                print(f"{output}: already made", file=sys.stderr)
                return True
        if self.overwrite:
            raise DataError(f"{output} holds files that no pipeline made, and they are kept", "move them, or choose another --output")
        raise DataError(f"{output} already holds something else", "choose another --output, or replace it with --overwrite")


class _Held(NamedTuple):
    """What OUTPUT holds."""

    manifests: Sequence[Place]
    replaceable: bool  # a file or one dataset or one split, which `--overwrite` may take away; a folder of other things is kept


def _held(output: Place) -> _Held | None:
    """What OUTPUT holds; None where that is nothing."""
    if not isinstance(output, Path):
        return _held_remote(output)
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return None
    manifests = [path for path in (output / "manifest.json", *sorted(output.glob("*/manifest.json"))) if path.is_file()]
    if output.is_file() or (output / "manifest.json").is_file():
        return _Held(manifests, True)
    return _Held(manifests, all(p.name in SIDES and (p / "manifest.json").is_file() for p in output.iterdir()))


def _held_remote(output: Place) -> _Held | None:
    """The same at a URL, with one listing; what was being published when its run was stopped is nothing."""
    names = listing(output, deep=True)
    if not names or PUBLISHING in names:
        return None
    manifests = [name for name in names if name == "manifest.json" or (name.endswith("/manifest.json") and name.count("/") == 1)]
    made = {name.rpartition("/")[0] for name in manifests}
    replaceable = "" in made or all(name.partition("/")[0] in made & set(SIDES) for name in names)
    return _Held([output / name for name in manifests], replaceable)


def _overlap(source: Place, output: Place) -> bool:
    """Whether two folders are one, or one lies in the other."""
    if is_remote(source) != is_remote(output):
        return False
    here, there = (place.resolve() if isinstance(place, Path) else place for place in (source, output))
    return here == there or here in there.parents or there in here.parents


def _same(manifest: Manifest, recipe: Recipe) -> bool:
    """Whether a manifest is of this recipe."""
    return comparable(recipe.content_settings(), recipe.inputs) == comparable(manifest.settings, manifest.inputs)


def comparable(settings: Mapping[str, Any], inputs: Sequence[Mapping[str, Any]]) -> str:
    """Settings and inputs as a text that is equal where what is made is: a path written another way is the same path's content."""

    def content(value: Any) -> Any:
        if isinstance(value, Mapping):
            known_by_content = "digest" in value or "sha256" in value
            left_out = ("path", "source", "code_version") if known_by_content else ("code_version",)
            return {k: content(v) for k, v in value.items() if k not in left_out}
        return [content(v) for v in value] if isinstance(value, list | tuple) else value

    told = {name: value for name, value in settings.items() if name not in ("source", "mixture", *HOW)}  # the inputs say what they hold
    return json.dumps(content([told, inputs]), sort_keys=True)


def announce(dataset: Dataset) -> Dataset:
    """Say on stderr what a dataset holds, and where it is not what anybody wants."""
    manifest = dataset.manifest
    print(f"{dataset.path}: {manifest.summary()}", file=sys.stderr)
    if damaged := manifest.rejected.get("unreadable file", 0):
        print(
            f"warning: {damaged:,} files are damaged, and what follows the damage is missing: see {dataset.path / 'rejects'}",
            file=sys.stderr,
        )
    if manifest.rows_in and not manifest.used:
        why = max(manifest.rejected, key=manifest.rejected.__getitem__)
        print(f"warning: nothing could be used; most often: {why} (see {dataset.path / 'rejects'})", file=sys.stderr)
    return dataset


# ---------------------------------------------------------------------------------------------------------------- the stage

_OURS = ("laid-out", "done", "recipe.json", LOCK)  # what a stage holds beside the dataset, in the order it goes


@contextmanager
def staged(recipe: Recipe, kind: str, parts: int) -> Iterator[Place]:
    """A folder beside the output, on the same disk or in the same store, to make a dataset in; it appears when the block ends well.

    If the block does not, the folder stays where something was done, and the next run of the same recipe, code and number of parts
    finds that in it.
    """
    output = at(recipe.output)
    stage = sibling(output, "partial").absolute()
    with telling(output), claimed(stage, output) as check:
        _begin(recipe, stage, json.dumps(_wanted(recipe, kind, parts)))
        try:
            yield stage
        except BaseException:
            if _done(stage):
                print(f"{output}: what was done is kept in {stage}; the same command goes on from there", file=sys.stderr)
            else:
                _clear(stage)
            raise
        check()
        if isinstance(stage, Path):
            places.tidy(stage)
            publish(stage, Path(output), _OURS)
        else:
            publish_remote(stage, output, _OURS, check)
            _clear(stage)


def _wanted(recipe: Recipe, kind: str, parts: int) -> list[Any]:
    return [recipe.made_by, comparable(recipe.content_settings(), recipe.inputs), code_version(), kind, parts]


def _begin(recipe: Recipe, stage: Place, wanted: str) -> None:
    """Empty a stage that holds something else."""
    begun = stage / "recipe.json"
    try:
        same = places.read(begun).decode() == wanted
    except FileNotFoundError:
        same = False
    if same:
        print(f"{recipe.output}: going on where an earlier run stopped", file=sys.stderr)
        return
    if isinstance(stage, Path):
        for path in stage.iterdir():
            if path.name != LOCK:
                places.remove(path)
    else:
        _clear(stage)
    places.write(begun, wanted)


def _clear(stage: Place) -> None:
    """Take a stage away; a lease goes when it is released."""
    if isinstance(stage, Path):
        places.remove(stage)
    else:
        places.remove_files(stage, [name for name in listing(stage, deep=True) if name != LOCK])


def _done(stage: Place) -> bool:
    """Whether some task of a stage is done. A store that cannot be asked may hold some."""
    try:
        return any(name.endswith(".json") for name in listing(stage / "done", deep=True))
    except Exception:
        return True
