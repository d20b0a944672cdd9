"""Sweep: many fits of the same examples with other settings, compared on the same validation examples; the best one is kept.

    OUTPUT/
      sweep.json            what was asked for; the same command goes on, also with more trials, another one is refused
      trials/trial-003/     a fit like any other (`fitting`); trial.json says how it ended, rungs.json how it stood on the way
      trials.json           all of it as a table, the best first
      model/                the winner's

Which settings trial n has is a function of (space, seed, n). A trial that ended is never run again; one that was killed goes on from its
last checkpoint; one that failed is tried again by the same command.

Bad trials can be ended early by asynchronous successive halving (ASHA; Li et al. 2020, arXiv 1810.05934) with validations as its
resource: after validation 1, eta, eta^2, ... a trial goes on if it is among the best 1/eta of those that have come that far. It reads how
they stood from their folders, so there is no scheduler whose state could be lost.

>>> space = parse_space('{"train.lr": ["log", 1e-4, 1e-2], "net.head_layers": [1, 2]}')
>>> draw(space, 2, seed=0) == draw(space, 3, seed=0)[:2]
True
>>> draw(parse_space('{"train.lr": [0.1, 0.2], "net.layers": [1, 2]}'), 0, seed=0)[1]
{'train.lr': 0.1, 'net.layers': 2}
"""

from __future__ import annotations

import itertools
import json
import math
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from rayward import cluster, fitting, places, registry
from rayward.config import as_dict, flatten, merge, parse_sets, parse_settings, resolve
from rayward.errors import DataError, Interrupted, RaywardError, SettingsError
from rayward.fitting import FitSettings
from rayward.progress import Progress
from rayward.rendering import Groups
from rayward.storage import Dataset, publish, sibling
from rayward.toy_world import seed_of
from rayward.training import Report

By = Literal["loss", "accuracy"]
FIXED = {
    "examples": "trials are compared on the same examples",
    "validation_share": "trials are compared on the same validation examples",
    "train.best_by": "the weights of a trial are kept by what trials are compared by: --by",
}
LOSSES = ("objective", "objective_settings", "regularise")  # settings that change what a loss means
ENDED = ("finished", "stopped")


# ------------------------------------------------------------------------------------------------------------------- space


@dataclass(frozen=True)
class Range:
    """Numbers between two, drawn evenly, or evenly on a logarithmic scale; or whole numbers, both ends among them."""

    kind: str  # uniform, log, integer
    low: float
    high: float

    def at(self, u: float) -> float | int:
        """The number at share u in [0, 1) of the range, to three digits.

        >>> Range("log", 1e-4, 1e-2).at(0.5), Range("uniform", 0, 1).at(0.25), Range("integer", 1, 4).at(0.99)
        (0.001, 0.25, 4)
        """
        if self.kind == "integer":
            return math.floor(self.low + u * (self.high - self.low + 1))
        if self.kind == "log":
            return float(f"{self.low * (self.high / self.low) ** u:.3g}")
        return float(f"{self.low + u * (self.high - self.low):.3g}")


Space = dict[str, Range | tuple[Any, ...]]


def parse_space(text: str) -> Space:
    """The search space from JSON text: by the dotted name of a setting a list of values, or a range as ["log", low, high].

    Raises:
        SettingsError: if it is not JSON, empty, names what all trials share, or holds a range that is none.
    """
    space: Space = {}
    for name, said in parse_settings(text, "space").items():
        if name in FIXED:
            raise SettingsError(f"space: {name} cannot differ between trials", FIXED[name])
        if not isinstance(said, list) or not said:
            raise SettingsError(
                f"space: {name}={said!r} is no list", f'write e.g. {{"{name}": ["log", 1e-4, 1e-2]}} or {{"{name}": [1, 2]}}'
            )
        space[name] = _range(name, said) if said[0] in ("uniform", "log", "integer") else tuple(said)
    if not space:
        raise SettingsError("space={} varies nothing", """write e.g. --space '{"train.lr": ["log", 1e-4, 1e-2]}'""")
    return space


def _range(name: str, said: list[Any]) -> Range:
    kind, *ends = said
    numbers = len(ends) == 2 and all(isinstance(e, int | float) and not isinstance(e, bool) and math.isfinite(e) for e in ends)
    whole = kind != "integer" or all(e == int(e) for e in ends if numbers)
    if not numbers or not ends[0] < ends[1] or (kind == "log" and ends[0] <= 0) or not whole:
        raise SettingsError(
            f"space: {name}={said} is no range", f'write ["{kind}", low, high] with low < high' + (", both above 0" * (kind == "log"))
        )
    return Range(kind, *ends)


def draw(space: Space, trials: int, seed: int) -> list[dict[str, Any]]:
    """The settings of so many trials, all different; with 0 trials every combination, where the space is lists of values.

    Trial n does not depend on how many there are.

    Raises:
        SettingsError: for every combination of a range, or more trials than there are combinations.
    """
    ranges = [name for name, values in space.items() if isinstance(values, Range)]
    if trials == 0:
        if ranges:
            raise SettingsError(f"space: {', '.join(ranges)} is a range, which has no end of values", "say how many to draw: --trials 16")
        values = [v for v in space.values() if not isinstance(v, Range)]
        return [dict(zip(space, combination, strict=True)) for combination in itertools.product(*values)]
    made: list[dict[str, Any]] = []
    for n in range(100 * trials):
        given = {name: _drawn(values, seed_of("trial", seed, n, name) / 2**63) for name, values in space.items()}
        if given not in made:
            made.append(given)
        if len(made) == trials:
            return made
    raise SettingsError(
        f"trials={trials}, and the space has no more than {len(made)} combinations", "ask for fewer, or leave --trials out for all"
    )


def _drawn(values: Range | tuple[Any, ...], u: float) -> Any:
    return values.at(u) if isinstance(values, Range) else values[int(u * len(values))]


# ------------------------------------------------------------------------------------------------------------------- sweep


@dataclass(frozen=True)
class Rules:
    """What trials are compared by, and which of them are ended early."""

    by: By = "loss"  # of the best weights on validation
    halve: int = 0  # after validation 1, N, N^2 ... of a trial it goes on only if it is among the best 1/N so far; 0: all to the end
    keep_models: bool = False  # keep the models of all trials, e.g. as an ensemble, and not only the winner's

    def __post_init__(self) -> None:
        if self.halve == 1 or self.halve < 0:
            raise SettingsError(f"halve={self.halve} ends no trial early", "3 lets the best third go on at every rung, 0 all of them")

    def better(self, a: float, b: float) -> bool:
        """Whether a value is better than another."""
        return a < b if self.by == "loss" else a > b


@dataclass(frozen=True)
class Trial:
    """One fit of a sweep."""

    name: str
    folder: Path
    given: Mapping[str, Any]  # what it has of the space
    fit: FitSettings  # the model by the name that leads back to it
    rules: Rules
    address: str  # what workers load that model by

    def result(self) -> dict[str, Any] | None:
        """How it ended, if it did: name, status, given, loss, accuracy, step, reason, tags."""
        path = self.folder / "trial.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    @property
    def ended(self) -> bool:
        """Whether there is nothing left to do."""
        return (self.result() or {"status": ""})["status"] in ENDED


@dataclass(frozen=True)
class Sweep:
    """A sweep that may begin."""

    folder: Path
    base: FitSettings  # what trials share, where the space does not say otherwise
    trials: Sequence[Trial]
    rules: Rules
    dataset: Dataset  # what is trained on


def prepare(base: FitSettings, space: Space, output: str, trials: int, seed: int, rules: Rules) -> Sweep:
    """Draw the trials, and look at everything that a user can have got wrong before any of them begins.

    Raises:
        SettingsError: if a setting of the space is unknown or wrong, nothing is held out, losses of several objectives would be compared,
            or OUTPUT holds another sweep.
    """
    if trials < 0:
        raise SettingsError(f"trials={trials} is no number of trials", "leave it out for every combination of the space")
    if rules.by == "loss" and (varied := [name for name in LOSSES if name in space]):
        raise SettingsError(f"space: losses with another {varied[0]} cannot be compared", "add --by accuracy")
    folder = places.at(output).absolute()
    if not isinstance(folder, Path):
        raise SettingsError(
            f"--output {folder} is a URL, and the trials of a sweep are compared in a folder",
            "name one that all nodes see; a fit of its own may go to a URL",
        )
    sides = fitting.open_sides(base.examples, base.validation_share)
    if sides.validation is None and not base.validation_share:
        raise SettingsError("trials are compared on validation examples, and validation_share=0 holds out none", "leave it out")
    base = replace(
        base,
        examples=str(places.at(base.examples).absolute()),
        model=registry.pinned(base.model),
        train=replace(base.train, best_by=rules.by),
    )
    space = _pinned(space)
    given = draw(space, trials, seed)
    fits = [_settled(base, one) for one in given]
    address = {model: registry.model_address(model) for model in {fit.model for fit in fits}}
    drawn = [
        Trial(name := f"trial-{n:03d}", folder / "trials" / name, one, fit, rules, address[fit.model])
        for n, (one, fit) in enumerate(zip(given, fits, strict=True))
    ]
    _claim(
        folder, {"base": as_dict(base), "space": as_dict(space), "seed": seed, "rules": as_dict(rules), "grid": trials == 0}, sides.dataset
    )
    return Sweep(folder, base, drawn, rules, sides.dataset)


def _pinned(space: Space) -> Space:
    """A space whose models are versions and not aliases, which move on."""
    models = space.get("model")
    if not isinstance(models, tuple):
        return space
    return {**space, "model": tuple(registry.pinned(model) if isinstance(model, str) else model for model in models)}


def _settled(base: FitSettings, given: Mapping[str, Any]) -> FitSettings:
    """The settings of a trial."""
    return resolve(FitSettings, merge(as_dict(base), parse_sets([f"{name}={json.dumps(value)}" for name, value in given.items()])))


def _claim(folder: Path, what: dict[str, Any], dataset: Dataset) -> None:
    """Say whose OUTPUT this is."""
    mine = json.loads(json.dumps({**what, "data_digest": dataset.manifest.digest}))
    path = folder / "sweep.json"
    if path.is_file():
        before, now = flatten(json.loads(path.read_text(encoding="utf-8"))), flatten(mine)
        changed = [f"{n}: {before.get(n)} -> {now.get(n)}" for n in sorted(before.keys() | now.keys()) if before.get(n) != now.get(n)]
        if changed:
            raise SettingsError(
                f"{folder} holds a sweep with other settings ({'; '.join(changed[:4])}{'; ...' if len(changed) > 4 else ''})",
                "choose another --output, or remove that folder",
            )
    elif folder.is_dir() and any(not p.name.startswith(fitting.TRACKED) for p in folder.iterdir()):
        raise SettingsError(f"{folder} is not empty and holds no sweep", "choose another --output")
    folder.mkdir(parents=True, exist_ok=True)
    _write(path, mine)


def _write(path: Path, what: Any) -> None:
    places.write(path, json.dumps(what, indent=2) + "\n")


# ----------------------------------------------------------------------------------------------------------------- a trial


class Outdone(RaywardError):
    """Raised within a trial that is not among the best that came as far."""


def run_trial(trial: Trial, report: Report = lambda line: None) -> dict[str, Any]:
    """Fit a trial to its end, or until it is outdone; how it ended is in trial.json, and is what comes back.

    What goes wrong within it is a result too: a loss that is no number, memory that does not suffice, a fault in a loss of the user's own.
    """
    began = time.monotonic()
    said: dict[str, Any] = {"reason": "", "tags": {}}

    def tell(line: dict[str, float]) -> None:
        report(line)
        if f"validation_{trial.rules.by}" in line and trial.rules.halve:
            _stand(trial, line)

    try:
        fit = replace(trial.fit, model=trial.address)
        fitted = fitting.prepare(fit, str(trial.folder), base=trial.fit.model).train(tell)
        said |= {"status": "finished", "tags": fitted.tags}
    except Interrupted:
        raise
    except Outdone as outdone:
        said |= {"status": "stopped", "reason": str(outdone)}
    except Exception as error:  # anything a model, a kernel or somebody's own loss can raise
        said |= {"status": "failed", "reason": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
    best = _best(trial)
    if said["status"] == "finished" and not best:
        said |= {"status": "failed", "reason": "no validation example: hold out more, --validation-share 0.2"}
    result = {"name": trial.name, "given": dict(trial.given), **said, **best, "seconds": round(time.monotonic() - began, 1)}
    trial.folder.mkdir(parents=True, exist_ok=True)
    _write(trial.folder / "trial.json", result)
    if said["status"] in ENDED:
        _tidy(trial.folder)
    return result


def _lines(trial: Trial) -> list[dict[str, float]]:
    path = trial.folder / "run" / "metrics.jsonl"
    said = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [json.loads(line) for line in said if line.endswith("}")]


def _best(trial: Trial) -> dict[str, float]:
    """Loss, accuracy and step of the best validation so far; the first of several that are equal, as the one whose weights are kept."""
    best: dict[str, float] = {}
    for line in _lines(trial):
        if "validation_loss" in line:
            values = {name: line[f"validation_{name}"] for name in ("loss", "accuracy") if f"validation_{name}" in line}
            if not best or trial.rules.better(values[trial.rules.by], best[trial.rules.by]):
                best = {**values, "step": line["step"]}
    return best


def _stand(trial: Trial, line: Mapping[str, float]) -> None:
    """Write down how a trial stands at a rung, and end it if it is not among the best 1/eta of those that came to it."""
    rules, by = trial.rules, f"validation_{trial.rules.by}"
    rung = sum(by in earlier and earlier["step"] <= line["step"] for earlier in _lines(trial))
    steps = trial.fit.train.epochs * math.ceil(len(Groups(trial.folder / "groups" / "train")) / trial.fit.batch.size)
    if line["step"] >= steps or rung not in (rules.halve**k for k in range(32)):
        return
    path = trial.folder / "rungs.json"
    mine = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    _write(path, {**mine, str(rung): line[by]})
    others = [json.loads(p.read_text(encoding="utf-8")) for p in sorted(trial.folder.parent.glob("*/rungs.json"))]
    came = [values[str(rung)] for values in others if str(rung) in values]
    ahead, room = sum(rules.better(value, line[by]) for value in came), max(1, len(came) // rules.halve)
    if ahead >= room:
        raise Outdone(f"{ahead} of the {len(came)} trials that came to validation {rung} were better")


def _tidy(folder: Path) -> None:
    """Take away what a fit needs to go on."""
    for made in (folder / "groups", folder / "start", folder / "spread", *(p for p in (folder / "run").glob("*") if p.is_dir())):
        shutil.rmtree(made, ignore_errors=True)


# -------------------------------------------------------------------------------------------------------------- all trials

Track = Callable[[Trial], AbstractContextManager[Report]]  # a tracked run of a trial: where its lines of metrics go


def run(sweep: Sweep, track: Track, concurrency: int = 1, cpus: int = 1) -> list[dict[str, Any]]:
    """Run every trial that has not ended; the results of all, the best first.

    With a concurrency of 1 they run in this process, one after the other; with more as Ray tasks of `cpus` CPUs each, and one GPU each
    where the cluster has any.

    Raises:
        RaywardError: if all trials failed, with the reason of the first.
    """
    todo = [trial for trial in sweep.trials if not trial.ended]
    with Progress("sweep", len(sweep.trials), "trials", start=len(sweep.trials) - len(todo)) as bar:
        for _ in _on_ray(todo, track, concurrency, cpus) if concurrency > 1 and todo else _here(todo, track):
            best = next((r for r in ranked(sweep) if r["status"] == "finished"), None)
            bar.advance(1, **({f"best-{sweep.rules.by}": f"{best[sweep.rules.by]:.4f}"} if best else {}))
    results = ranked(sweep)
    _write(sweep.folder / "trials.json", [{k: v for k, v in r.items() if k != "tags"} for r in results])
    if all(r["status"] == "failed" for r in results):
        raise RaywardError(f"all {len(results)} trials failed; {results[0]['name']}: {results[0]['reason']}")
    return results


def ranked(sweep: Sweep) -> list[dict[str, Any]]:
    """The results there are: finished trials by their value, then stopped ones by theirs, then failed ones."""
    results = [result for trial in sweep.trials if (result := trial.result()) is not None]
    sign = 1 if sweep.rules.by == "loss" else -1
    order = ("finished", "stopped", "failed")
    return sorted(results, key=lambda r: (order.index(r["status"]), sign * r[sweep.rules.by] if sweep.rules.by in r else 0.0, r["name"]))


def _here(todo: Sequence[Trial], track: Track) -> Iterator[dict[str, Any]]:
    for trial in todo:
        tracked = track(trial)
        tell = tracked.__enter__()
        try:
            result = run_trial(trial, tell)
        except BaseException as error:
            tracked.__exit__(type(error), error, error.__traceback__)
            raise
        _close(tracked, result)
        yield result


def _close(tracked: AbstractContextManager[Report], result: Mapping[str, Any]) -> None:
    """End a tracked run as its trial ended."""
    if result["status"] != "failed":
        tracked.__exit__(None, None, None)
        return
    error = RaywardError(result["reason"])
    try:
        tracked.__exit__(RaywardError, error, None)
    except RaywardError as same:
        if same is not error:
            raise


@dataclass
class _Running:
    """A trial on Ray: its run, what of its metrics has been passed on, and the task."""

    trial: Trial
    tracked: AbstractContextManager[Report]
    tell: Report
    seen: set[str]

    def follow(self) -> None:
        """Pass on the lines of metrics that are new."""
        for line in _lines(self.trial):
            if (text := json.dumps(line)) not in self.seen:
                self.seen.add(text)
                self.tell(line)


def _on_ray(todo: Sequence[Trial], track: Track, concurrency: int, cpus: int) -> Iterator[dict[str, Any]]:
    """Trials as Ray tasks, `concurrency` at a time; this process passes their metrics on. A task that lost its worker is tried again."""
    with cluster.connect() as ray:
        most = max(node["Resources"].get("CPU") or 0 for node in ray.nodes() if node["Alive"])
        if cpus > most:
            raise SettingsError(f"cpus={cpus}: no machine of this cluster has more than {most:g}", "ask for fewer")
        how = {"num_cpus": cpus, "num_gpus": cluster.gpus_each(-1), "max_retries": 2, "retry_exceptions": [Interrupted]}
        task = ray.remote(**how)(run_trial)
        waiting = deque(todo)
        running: dict[Any, _Running] = {}
        try:
            while waiting or running:
                while waiting and len(running) < concurrency:
                    trial = waiting.popleft()
                    tracked = track(trial)
                    running[task.remote(trial)] = _Running(trial, tracked, tracked.__enter__(), set())
                ended, _ = ray.wait(list(running), timeout=1.0)
                for one in running.values():
                    one.follow()
                for ref in ended:
                    one = running[ref]
                    result = _fetch(ray, ref, one.trial)
                    one.follow()
                    del running[ref]
                    _close(one.tracked, result)
                    yield result
        except BaseException as error:
            for ref, one in running.items():
                ray.cancel(ref, force=True)
                one.tracked.__exit__(type(error), error, error.__traceback__)
            raise


def _fetch(ray: Any, ref: Any, trial: Trial) -> dict[str, Any]:
    """How a task ended; a worker that was lost for good is a trial that failed."""
    try:
        return ray.get(ref)
    except ray.exceptions.RayError as error:
        result = {"name": trial.name, "given": dict(trial.given), "status": "failed", "reason": str(error).splitlines()[0], "tags": {}}
        trial.folder.mkdir(parents=True, exist_ok=True)
        _write(trial.folder / "trial.json", result)
        return result


# -------------------------------------------------------------------------------------------------------------- the winner


def crown(sweep: Sweep, results: Sequence[Mapping[str, Any]]) -> Trial:
    """The best finished trial; its model is copied to OUTPUT/model, and those of the others go unless they are to be kept."""
    best = next((r for r in results if r["status"] == "finished"), None)
    if best is None:
        raise DataError(f"no trial of {sweep.folder} finished", "leave --halve out, or ask for more trials")
    winner = next(trial for trial in sweep.trials if trial.name == best["name"])
    stage = sibling(sweep.folder / "model", "partial")
    shutil.rmtree(stage, ignore_errors=True)
    shutil.copytree(winner.folder / "model", stage)
    publish(stage, sweep.folder / "model")
    for trial in sweep.trials:
        if trial != winner and trial.ended and not sweep.rules.keep_models:
            shutil.rmtree(trial.folder / "model", ignore_errors=True)
    return winner


def shown(sweep: Sweep) -> dict[str, dict[str, float]]:
    """Which winners have been shown the test split, by trial, and what was found.

    It is looked at once. Where a sweep goes on with more trials and another wins, that is a second look, and is on record.
    """
    path = sweep.folder / "tested.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def record_test(sweep: Sweep, winner: Trial, found: Mapping[str, float]) -> None:
    """Write down that a winner has been shown the test split."""
    _write(sweep.folder / "tested.json", {**shown(sweep), winner.name: dict(found)})


def show(results: Sequence[Mapping[str, Any]]) -> None:
    """All trials as a table, the best first."""
    from rich.console import Console
    from rich.table import Table

    names = list(results[0]["given"])
    table = Table(title="On the validation examples", title_justify="left", header_style="bold", box=None)
    for column in ("trial", "", "loss", "accuracy", "at step", "seconds", *names):
        table.add_column(column, no_wrap=True)
    for r in results:
        numbers = [
            f"{r[n]:{how}}" if n in r else "–" for n, how in (("loss", ".4f"), ("accuracy", ".4f"), ("step", ".0f"), ("seconds", ".1f"))
        ]
        table.add_row(r["name"], r["status"], *numbers, *(str(r["given"][n]) for n in names))
    Console(width=max(110, Console().width)).print(table)
    for r in results:
        if r["status"] == "failed":
            print(f"{r['name']} failed: {r['reason']}")
