"""Where a fit's files lie: in OUTPUT, or, where that is a URL, in a folder of this node's cache that says what the URL says.

    CACHE/fits/NAME-<digest of the URL>/     as OUTPUT; NAME-<digest>.lock beside it, for workers of one node

`prepared.json` names the preparation that groups/ and start/ belong to. A folder that does not know the one at the URL is of another run,
or of one that was never sent, and is emptied.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rayward import places
from rayward.mirror import Mirror

SPREAD = "spread"  # in OUTPUT, with train.shard: what workers begin with beside the model's files
PREPARED = "prepared.json"  # in OUTPUT at a URL: the folders that were made before training, and a name for their making
TRACKING = "tracking.json"  # in OUTPUT: which tracked run it belongs to
TRACKED = "tracking."  # files of OUTPUT that begin so are the tracked run's, and may be there before the fit
SETTINGS = "settings.json"  # in OUTPUT: what was asked for


def working_copy(output: str) -> tuple[Path, Mirror | None]:
    """The folder that a fit works in, and what it is a copy of where OUTPUT is a URL."""
    place = places.at(output)
    if isinstance(place, Path):
        return place.absolute(), None
    digest = hashlib.blake2b(str(place).encode(), digest_size=6).hexdigest()
    folder = places.cache() / "fits" / f"{place.name}-{digest}"
    return folder, Mirror(folder, place)


def pull(mirror: Mirror) -> None:
    """Let this node's folder hold what was prepared at the URL, and nothing of another run."""
    with _alone(mirror.here):
        said = mirror.read(PREPARED)
        mine = mirror.here / PREPARED
        if said is None or not mine.is_file() or mine.read_bytes() != said:
            places.remove(mirror.here)
            if said is not None:
                mirror.fetch(*json.loads(said)["folders"])
                places.write(mine, said)
        settings = mirror.read(SETTINGS)
        places.remove(mirror.here / SETTINGS) if settings is None else places.write(mirror.here / SETTINGS, settings)


def push(mirror: Mirror, *names: str) -> None:
    """Send folders that were prepared, and name all that were, under a name that no other preparation has."""
    folders = [name for name in ("start", "groups", SPREAD) if (mirror.here / name).is_dir()]
    mirror.send(*(name for name in folders if name in names))
    places.write(mirror.here / PREPARED, json.dumps({"folders": folders, "made": secrets.token_hex(8)}) + "\n")
    mirror.send(PREPARED)


def pull_run(run: Mirror, newest: str = "") -> None:
    """Let this node's folder hold what a run goes on from: one checkpoint (the newest, or the one named), the best weights, the metrics."""
    with _alone(run.here.parent):
        whole = run.whole()
        steps = [name for name in whole if name.startswith("step-")]
        kept = {newest} & set(steps) if newest else set(steps[-1:])
        kept |= {name for name in whole if not name.startswith("step-")}
        for path in run.here.iterdir() if run.here.is_dir() else ():
            if path.name not in kept:
                places.remove(path)
        lines = run.read("metrics.jsonl")
        if lines is not None:
            places.write(run.here / "metrics.jsonl", lines)
        run.fetch(*sorted(kept))


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process of this node at a time."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
