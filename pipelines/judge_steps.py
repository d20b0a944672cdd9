"""Let a model judge the steps of answers: right, wrong, or neutral.

    rayward run judge_steps --source store/stepwise --output store/judged-steps --judge server \\
        --set judge_settings='{"base_url": "http://localhost:8000/v1", "model": "Qwen/Qwen3-32B", "temperature": 0}'
    rayward run label_steps --source store/judged-steps --output store/steps --set label.both=agree

Steps are asked about one at a time, each with those before it, up to the first wrong one; `steps.ask=all` asks about all of an answer at
once. With several samples a step's reward is the share that calls it right. The output is the same rollouts with their `step_rewards`;
continuations go along, so that `label_steps` can keep what they and the judge agree on. Answers without a verdict lie in OUTPUT/rejects.

Every reply is kept word for word in `.OUTPUT.verdicts` (or `--log`). Stop the run at any time, or by `budget.max_requests` and
`budget.max_tokens`: the same command goes on, and asks nothing twice.
"""

from dataclasses import dataclass

from rayward.config import command
from rayward.dataflow import Engine
from rayward.judging import Budget, Job, StepJudgeSettings, judge_dataset
from rayward.storage import Dataset


@dataclass(frozen=True)
class Settings:
    """What judge_steps needs to know."""

    source: str  # folder of rollouts
    output: str  # folder for the judged rollouts
    judge: str = "server"  # who judges (policies.POLICIES)
    judge_settings: str = "{}"  # JSON of the policy's own settings, e.g. {"model": "Qwen/Qwen3-32B", "temperature": 0}
    steps: StepJudgeSettings = StepJudgeSettings()
    budget: Budget = Budget()
    log: str = ""  # folder that keeps every reply ("": .OUTPUT.verdicts beside the output)
    actors: int = 1  # workers that judge, each with a policy of its own, on engine ray
    gpus: float = -1.0  # GPUs of each of them; -1: one for a model in the worker's own process, where the cluster has any
    engine: Engine = "auto"  # where the work runs
    cpus: float = 1.0  # CPU cores that each task holds on engine ray
    memory_gib: float = 0.0  # GiB of memory that each task holds on engine ray; 0: not counted
    overwrite: bool = False  # replace what OUTPUT holds


def main(settings: Settings) -> Dataset:
    """Ask what the log does not know, and lay the verdicts beside the steps."""
    return judge_dataset("judge_steps", Job.of(settings, settings.steps))


if __name__ == "__main__":
    command(main)
