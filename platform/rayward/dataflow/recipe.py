"""What is made, from what, and the folder it is made in: kept when a run is killed, gone on with when the same command comes again."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayward.config import as_dict, public
from rayward.dataflow.engine import Engine
from rayward.errors import DataError
from rayward.splits import SIDES
from rayward.storage import Counts, Dataset, Manifest, code_version, publish, read_manifest, sibling, whole_digest

HOW = ("output", "engine", "overwrite", "parts", "actors", "gpus")  # settings that change where and how, not what


@dataclass(frozen=True)
class Recipe:
    """What is made, and from what: two runs of one recipe make the same dataset."""

    made_by: str
    output: str
    settings: Any  # the pipeline's settings dataclass
    inputs: Sequence[Mapping[str, Any]]
    engine: Engine = "auto"
    overwrite: bool = False

    def __post_init__(self) -> None:
        output = Path(os.path.normpath(self.output))
        object.__setattr__(self, "output", str(output))
        for made_from in self.inputs:
            source = made_from.get("path")
            if (
                source
                and (here := Path(source).resolve())
                and (here == (there := output.resolve()) or here in there.parents or there in here.parents)
            ):
                raise DataError(
                    f"--output {output} and the source {source} are one folder, or one lies in the other", "choose another --output"
                )

    @classmethod
    def of(cls, made_by: str, settings: Any, *inputs: Mapping[str, Any]) -> Recipe:
        """The recipe of a script, whose settings have `output`, `engine` and `overwrite`."""
        return cls(made_by, settings.output, settings, inputs, settings.engine, settings.overwrite)

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
        output = Path(self.output)
        if not output.exists() or (self.overwrite and _replaceable(output)):
            return False
        manifests = [output / "manifest.json", *sorted(output.glob("*/manifest.json"))]
        for path in filter(Path.is_file, manifests):
            manifest = read_manifest(path)
            if manifest.made_by == self.made_by and _same(manifest, self):
                print(f"{output}: already made", file=sys.stderr)
                return True
        if output.is_dir() and not any(output.iterdir()):
            return False
        if self.overwrite:
            raise DataError(f"{output} holds files that no pipeline made, and they are kept", "move them, or choose another --output")
        raise DataError(f"{output} already holds something else", "choose another --output, or replace it with --overwrite")


def _replaceable(output: Path) -> bool:
    """Whether OUTPUT is a file or one dataset or one split, which `--overwrite` may take away; a folder of other things is kept."""
    if output.is_file() or (output / "manifest.json").is_file():
        return True
    return all(p.name in SIDES and (p / "manifest.json").is_file() for p in output.iterdir())


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

_OURS = ("laid-out", "done", "recipe.json", ".lock")  # what a stage holds beside the dataset, in the order it goes


@contextmanager
def staged(recipe: Recipe, kind: str, parts: int) -> Iterator[Path]:
    """A folder beside the output, on the same disk, to make a dataset in; it appears under its name when the block ends well.

    If the block does not, the folder stays where something was done, and the next run of the same recipe, code and number of parts
    finds that in it.
    """
    output = Path(recipe.output)
    stage = sibling(output, "partial").absolute()
    stage.mkdir(parents=True, exist_ok=True)
    with open(stage / ".lock", "w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"another run is making {output} at this moment", "wait for it, or choose another --output") from None
        except OSError:
            pass  # a file system without locks
        wanted = json.dumps([recipe.made_by, comparable(recipe.content_settings(), recipe.inputs), code_version(), kind, parts])
        begun = stage / "recipe.json"
        if not begun.is_file() or begun.read_text(encoding="utf-8") != wanted:
            _empty(stage)
            begun.write_text(wanted, encoding="utf-8")
        else:
            print(f"{output}: going on where an earlier run stopped", file=sys.stderr)
        try:
            yield stage
        except BaseException:
            if any(stage.glob("done/*/*.json")):
                print(f"{output}: what was done is kept in {stage}; the same command goes on from there", file=sys.stderr)
            else:
                shutil.rmtree(stage, ignore_errors=True)
            raise
        for name in _OURS:
            path = stage / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        publish(stage, output)


def _empty(stage: Path) -> None:
    for path in stage.iterdir():
        if path.name != ".lock":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
