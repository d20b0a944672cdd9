"""A pipeline that is killed: the same command goes on where it was, does nothing twice, leaves nothing behind, and makes the same dataset.

The commands run in processes of their own and get SIGKILL, which they cannot notice.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from rayward.storage import Manifest, leaf_digests, open_dataset, whole_digest

Markers = dict[str, int]  # what is done, with when it was written


class Run(NamedTuple):
    """How a command ended, and all that was ever marked done while it ran."""

    code: int
    err: str
    markers: Markers
    twice: set[str]  # marked again at another time


def command(script: str, *words: str | Path) -> list[str]:
    return [sys.executable, "-m", "rayward.cli", "run", script, *map(str, words)]


def markers_of(output: Path) -> Markers:
    found = {}
    with contextlib.suppress(FileNotFoundError):  # the run has just ended
        for path in (output.parent / f".{output.name}.partial").glob("done/*/*.json"):
            found[f"{path.parent.name}/{path.stem}"] = path.stat().st_mtime_ns
    return found


def run(words: Sequence[str], output: Path, kill_when: Callable[[Markers], bool] = lambda _: False) -> Run:
    """Run a command to its end, or kill it when `kill_when` says so of what is marked done."""
    env = {**os.environ, "RAYWARD_PROGRESS": "log", "OMP_NUM_THREADS": "1"}
    log = output.parent / "log.txt"
    seen = markers_of(output)
    twice: set[str] = set()
    with open(log, "w") as err:
        process = subprocess.Popen(words, stdout=err, stderr=err, env=env, start_new_session=True)
        try:
            while process.poll() is None:
                now = markers_of(output)
                twice |= {name for name in now.keys() & seen.keys() if now[name] != seen[name]}
                seen |= now
                if kill_when(now):
                    process.kill()
                    break
                time.sleep(0.002)
        finally:
            process.kill()
            process.wait()
    after = markers_of(output)
    twice |= {name for name in after.keys() & seen.keys() if after[name] != seen[name]}
    return Run(process.returncode, log.read_text(), seen | after, twice)


def killed_and_finished(words: Sequence[str], output: Path, kill_at: Sequence[int]) -> Run:
    """Kill a command when so many tasks are done, again and again, then let it finish; no task is done twice."""
    killed = 0
    for count in kill_at:
        one = run(words, output, lambda now, count=count: len(now) >= count)  # type: ignore[misc]
        assert not one.twice
        if one.code == 0:
            break
        assert one.code == -signal.SIGKILL, one.err
        assert not output.exists()
        assert len(one.markers) >= count
        killed += 1
    assert killed, "it was never killed: there is too little to do"
    last = run(words, output)
    assert last.code == 0, last.err
    assert not last.twice
    assert "going on where an earlier run stopped" in last.err or killed < len(kill_at)
    return last


def write_rows(folder: Path, files: int, rows: int) -> Path:
    """Files of pairs of answers with long texts, and some bad rows."""
    rng = random.Random(0)
    folder.mkdir(parents=True)
    for n in range(files):
        lines = []
        for row in range(rows):
            p = n * rows + row
            said = {"id": f"{p}", "prompt": f"Question {p // 2}? " + "why " * 20, "answer": f"Answer {p} " * 15, "reward": rng.random()}
            lines.append(json.dumps(said if row % 97 else {"prompt": f"nothing {p}"}))
        (folder / f"{n:02}.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("source") / "files", files=12, rows=2_500)


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All that the commands make when nobody kills them."""
    folder = tmp_path_factory.mktemp("whole")
    for name in ("import_rollouts", "label_pairs", "export_examples"):
        done = run(words_of(name, folder if name != "import_rollouts" else source, folder / name), folder / name)
        assert done.code == 0, done.err
    return folder


def words_of(name: str, source: Path, output: Path, engine: str = "local") -> list[str]:
    """The command of a pipeline, on what is in the folder `whole`."""
    how = ["--output", output, "--engine", engine]
    if name == "import_rollouts":
        return command(name, "--source", source, "--format", "rollouts", "--parts", "16", *how)
    if name == "label_pairs":
        return command(name, "--source", source / "import_rollouts", *how)
    return command(name, "--source", source / "label_pairs", "--format", "preference", *how)


def manifest_of(folder: Path) -> Manifest:
    return Manifest.from_json((folder / "manifest.json").read_text())


def same_dataset(made: Path, expected: Path) -> None:
    """The same digest, the same counts, the same files; nothing else in the folder or beside it."""
    one, other = manifest_of(made), manifest_of(expected)
    assert one.digest == other.digest
    assert (one.rows_in, one.used, one.rejected, one.out) == (other.rows_in, other.used, other.rejected, other.out)
    assert one.rows_in == one.used + sum(one.rejected.values())
    names = [sorted(str(p.relative_to(folder)) for p in folder.rglob("*")) for folder in (made, expected)]
    assert names[0] == names[1]
    assert sorted(p.name for p in made.parent.iterdir()) == sorted([made.name, "log.txt"])
    if one.kind == "export":
        assert all((made / name).read_bytes() == (expected / name).read_bytes() for name in names[0] if name.endswith(".jsonl"))
    else:
        dataset = open_dataset(made)
        assert whole_digest(leaf_digests(dataset.table())) == one.digest
        assert dataset.table().equals(open_dataset(expected).table())
        assert dataset.rejects().num_rows == sum(one.rejected.values())


@pytest.mark.parametrize(
    ("name", "kill_at"),
    [
        ("import_rollouts", [1, 7, 12, 13, 25]),  # of 12 files and 16 parts
        ("label_pairs", [1, 3, 11]),
        ("export_examples", [2, 9]),
    ],
)
def test_a_killed_pipeline_goes_on_and_makes_the_same(name: str, kill_at: list[int], source: Path, whole: Path, tmp_path: Path) -> None:
    words = words_of(name, source if name == "import_rollouts" else whole, tmp_path / "out")
    killed_and_finished(words, tmp_path / "out", kill_at)
    same_dataset(tmp_path / "out", whole / name)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_killed_at_any_moment(seed: int, source: Path, whole: Path, tmp_path: Path) -> None:
    rng = random.Random(seed)
    words = words_of("import_rollouts", source, tmp_path / "out")
    for _ in range(4):
        end = time.monotonic() + rng.uniform(0.3, 4.0)
        one = run(words, tmp_path / "out", lambda _, end=end: time.monotonic() > end)
        assert not one.twice
        if (tmp_path / "out").exists():  # killed in its last moment, or not at all
            break
    assert run(words, tmp_path / "out").code == 0
    same_dataset(tmp_path / "out", whole / "import_rollouts")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["import_rollouts", "label_pairs"])
def test_a_pipeline_that_is_killed_on_ray_goes_on_and_makes_the_same(name: str, source: Path, whole: Path, tmp_path: Path) -> None:
    words = words_of(name, source if name == "import_rollouts" else whole, tmp_path / "out", engine="ray")
    killed_and_finished(words, tmp_path / "out", [2, 14] if name == "import_rollouts" else [3])
    same_dataset(tmp_path / "out", whole / name)


def test_a_run_with_another_setting_begins_anew_and_takes_nothing_of_the_killed_one(source: Path, whole: Path, tmp_path: Path) -> None:
    words = words_of("label_pairs", whole, tmp_path / "out")
    assert run([*words, "--set", "label.min_gap=0.9"], tmp_path / "out", lambda now: len(now) >= 5).code == -signal.SIGKILL
    done = run(words, tmp_path / "out")
    assert done.code == 0
    assert "going on" not in done.err
    same_dataset(tmp_path / "out", whole / "label_pairs")


def test_an_output_that_is_replaced_stands_until_the_new_one_is_whole(source: Path, whole: Path, tmp_path: Path) -> None:
    words = words_of("label_pairs", whole, tmp_path / "out")
    assert run([*words, "--set", "label.min_gap=0.9"], tmp_path / "out").code == 0
    before = manifest_of(tmp_path / "out")
    again = [*words, "--overwrite"]
    assert run(again, tmp_path / "out", lambda now: len(now) >= 5).code == -signal.SIGKILL
    assert manifest_of(tmp_path / "out") == before
    assert open_dataset(tmp_path / "out").table().num_rows == before.out
    last = run(again, tmp_path / "out")
    assert last.code == 0
    assert "going on" in last.err
    same_dataset(tmp_path / "out", whole / "label_pairs")


def test_of_two_runs_at_once_one_is_told_and_the_other_makes_it(source: Path, whole: Path, tmp_path: Path) -> None:
    words = words_of("import_rollouts", source, tmp_path / "out")
    first = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        while not markers_of(tmp_path / "out") and first.poll() is None:
            time.sleep(0.005)
        os.kill(first.pid, signal.SIGSTOP)
        second = subprocess.run(words, capture_output=True, text=True)
        os.kill(first.pid, signal.SIGCONT)
        said, _ = first.communicate(timeout=100)
    finally:
        first.kill()
        first.wait()
    assert second.returncode == 2, second.stderr
    assert "another run is making" in second.stderr
    assert "->" in second.stderr
    assert "Traceback" not in second.stderr
    assert first.returncode == 0, said
    (tmp_path / "log.txt").touch()
    same_dataset(tmp_path / "out", whole / "import_rollouts")


def test_a_run_that_is_made_already_does_nothing(source: Path, whole: Path) -> None:
    output = whole / "import_rollouts"
    before = {p: p.stat().st_mtime_ns for p in whole.rglob("*") if p.name != "log.txt"}
    done = run(words_of("import_rollouts", source, output), output)
    assert done.code == 0
    assert done.markers == {}
    assert {p: p.stat().st_mtime_ns for p in whole.rglob("*") if p.name != "log.txt"} == before
