"""What a cluster can see of what a command names: local paths and addresses that mean something on this machine only.

>>> told(["--source", "s3://bucket/rows", "--set", "label.k=4", "--votes"])
[('source', 's3://bucket/rows'), ('label.k', '4')]
>>> seen("s3://bucket/rows", ()), seen("store:toy/rollouts", ()), seen("/etc", ()), seen("/mnt/nfs/rows", (Path("/mnt/nfs"),))
(True, True, False, True)
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from rayward.config import flatten, public, read_file
from rayward.errors import SettingsError

MADE = ("output", "log")  # settings that name what the command is to make
WAY_OUT = (
    "put it into an object store (s3://...) or a folder that every node has, and vouch for that folder: --shared /mnt/nfs (docs/cluster.md)"
)


def told(words: Sequence[str]) -> list[tuple[str, str]]:
    """(name, value) of everything the words say, also what --set says; a value without a name is called `argument`."""
    pairs: list[tuple[str, str]] = []
    for before, word in pairwise(["", *words]):
        if before == "--set" or word.startswith("--"):
            name, equals, value = word.partition("=")
            pairs += [(name.lstrip("-"), value)] if equals else []
        else:
            pairs.append((before[2:] if before.startswith("--") and "=" not in before else "argument", word))
    return pairs


def seen(value: str, shared: Sequence[Path], *, made: bool = False) -> bool:
    """Whether a value means on the cluster what it means here; `made` is of a folder that the command is to make."""
    if value.startswith("store:") or (re.match(r"\w+://", value) and not value.startswith("file://")):
        return True
    path = Path(os.path.abspath(os.path.expanduser(value.removeprefix("file://"))))
    if any(path == folder or folder in path.parents for folder in shared):
        return True
    return not (made or value.startswith("file://") or os.path.exists(path))  # of a text too long for a name: no


def check_seen(words: Sequence[str], configs: Iterable[Path], resolved: Mapping[str, Any], shared: Sequence[Path]) -> None:
    """SettingsError if the words, the files of settings or the script's own defaults name something only this machine has."""
    pairs = told(words)
    for file in configs:
        pairs += [(name, str(part)) for name, value in flatten(read_file(str(file))).items() for part in _parts(value)]
    pairs += [(name, str(resolved[name])) for name in MADE if resolved.get(name)]
    for name, value in pairs:
        made = name.rpartition(".")[2] in MADE
        for part in dict.fromkeys((value, *value.split(","), *(p.partition("=")[2] for p in value.split(",")))):
            if name != "config" and part and not seen(part, shared, made=made):
                what = "would be made on a disk of the cluster that is gone with the job" if made else "lies on this machine"
                raise SettingsError(f"{'' if name == 'argument' else '--'}{name} {part} {what}; the cluster cannot see it here", WAY_OUT)


def _parts(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def check_public(words: Sequence[str]) -> None:
    """SettingsError if a word carries a password: whoever may look at a job reads its command."""
    for word in words:
        if public(word) != word:
            raise SettingsError(
                f"{public(word)} came with a user and a password in it, and a job's command can be read by whoever sees the dashboard",
                "leave them out; credentials go into the cluster's environment, or by --env NAME into this job's",
            )


def check_store(environment: Mapping[str, str], shared: Sequence[Path]) -> None:
    """SettingsError if the store or the tracking server of this environment cannot be reached from a cluster elsewhere."""
    store = environment.get("RAYWARD_STORE")
    if store and not seen(store, shared, made=True):
        raise SettingsError(f"RAYWARD_STORE={store} lies on this machine; the cluster cannot see it", f"{WAY_OUT}; unset, its own counts")
    tracking = environment.get("MLFLOW_TRACKING_URI") or ""
    file = re.match(r"(?:sqlite://|file:(?://)?)(/.*)", tracking)
    local = (file and not seen(re.sub("^/+", "/", file[1]), shared, made=True)) or (tracking and ":" not in tracking)
    if local or re.match(r"https?://([^/@]*@)?(localhost|127\.|\[::1\])", tracking):
        raise SettingsError(
            f"MLFLOW_TRACKING_URI={public(tracking)} means this machine; the cluster cannot see it",
            "name a server that its nodes reach, http://mlflow.internal:5000; unset, the cluster's own counts",
        )
