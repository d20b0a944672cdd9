"""The training of a fit in this process, and what a run on workers has in common with it: where it stands, and its lines of metrics."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from rayward import checkpoints
from rayward.fitting.memory import measured
from rayward.fitting.settings import FitSettings
from rayward.fitting.working_copy import pull_run
from rayward.mirror import Mirror
from rayward.progress import Progress
from rayward.rendering import Groups
from rayward.training import Report, Run, Team, over, train

STOP = "stop"  # in OUTPUT/run: workers that see it keep a checkpoint and end
SMALL = 2_000_000  # parameters below which one thread is the safer choice (docs/log.md)


@dataclass(frozen=True)
class Work:
    """A fit whose examples and model are ready."""

    folder: Path  # OUTPUT, or this node's copy of it
    mirror: Mirror | None  # OUTPUT where it is a URL
    settings: FitSettings

    def run(self, model: Any = None, team: Team | None = None) -> Run:
        """The run of the training loop; without a model, to look at how far it is."""
        return Run(
            model=model,
            groups=Groups(self.folder / "groups" / "train"),
            validation=held_groups(self.folder),
            objective=self.settings.made_objective(),
            train=self.settings.train,
            batch=self.settings.batch,
            folder=self.folder / "run",
            mirror=self.mirror / "run" if self.mirror is not None else None,
            team=team or Team(),
        )


def held_groups(folder: Path) -> Groups | None:
    """The groups of the validation side, if there is one."""
    held = folder / "groups" / "validation"
    return Groups(held) if held.is_dir() else None


def newest(run: Run) -> dict[str, Any]:
    """The state of the last checkpoint; step 0 where there is none."""
    if run.mirror is None:
        kept = checkpoints.steps(run.folder)
        return checkpoints.read_state(kept[-1]) if kept else {"step": 0}
    names = [name for name in run.mirror.whole() if name.startswith("step-")]
    return checkpoints.read_state(run.mirror.there / names[-1]) if names else {"step": 0}


def ended(run: Run) -> bool:
    """Whether a run has come to its end, and what is left of it is kept."""
    state = newest(run)
    if state["step"] != run.total and not over(state, run.train):
        return False
    return not run.writes_last or (run.place / "last" / "state.json").is_file()


def train_here(work: Work, model: Any, report: Report) -> None:
    """Train in this process, from the last checkpoint if there is one."""
    if work.mirror is not None:
        pull_run(work.mirror / "run")
    run = work.run(model)
    begun = newest(run)["step"]
    sending = run.mirror.following("metrics.jsonl", STOP) if run.mirror is not None else nullcontext()
    with Progress("train", total=run.total, unit="steps", start=begun) as bar, sending:
        if 0 < begun < run.total:
            print(f"going on from step {begun} of {run.total}")
        train(replace(measured(run), report=telling(bar, report)))


def telling(bar: Progress, report: Report) -> Report:
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


def set_threads(model: torch.nn.Module, cores: int) -> None:
    """One thread for small models: two are 1.5 times as fast on an idle machine, and many times slower on a busy one."""
    small = sum(p.numel() for p in model.parameters()) < SMALL
    torch.set_num_threads(1 if small else max(1, cores))
