"""Let a model judge answers: which of two is better, how good one is from 1 to 10, or which order several have.

    rayward run judge_pairs --source store/rollouts --output store/judged --judge server \\
        --set judge_settings='{"base_url": "http://localhost:8000/v1", "model": "Qwen/Qwen3-32B", "temperature": 0}'
    rayward run label_pairs --source store/judged --output store/pairs --set label.ties=keep

The judge is any policy: an OpenAI-compatible server (a key is read from the environment variable that `api_key_env` names), or a
`transformers` model. Of every prompt the whole answers are judged; a pair is asked about in both orders, and what the orders do not
agree on is a tie (`compare.inconsistent=reject` leaves it out). The output is rollouts again: for each comparison its answers with
reward 1 and 0 (a tie: 0.5 each) as a judgement of their own, the votes in the provenance. Answers that no verdict was reached on lie in
OUTPUT/rejects with the reason and the judge's words.

Every reply is kept word for word in `.OUTPUT.verdicts` (or `--log`). Stop the run at any time, or by `budget.max_requests` and
`budget.max_tokens`: the same command goes on, and asks nothing twice.
"""

from dataclasses import dataclass

from rayward.config import command
from rayward.dataflow import Engine
from rayward.judging import AnswerSettings, Budget, Job, judge_dataset
from rayward.storage import Dataset


@dataclass(frozen=True)
class Settings:
    """What judge_pairs needs to know."""

    source: str  # folder of rollouts
    output: str  # folder for the judged rollouts
    judge: str = "server"  # who judges (policies.POLICIES)
    judge_settings: str = "{}"  # JSON of the policy's own settings, e.g. {"model": "Qwen/Qwen3-32B", "temperature": 0}
    compare: AnswerSettings = AnswerSettings()
    budget: Budget = Budget()
    log: str = ""  # folder that keeps every reply ("": .OUTPUT.verdicts beside the output)
    actors: int = 1  # workers that judge, each with a policy of its own, on engine ray
    gpus: float = -1.0  # GPUs of each of them; -1: one for a model in the worker's own process, where the cluster has any
    engine: Engine = "auto"  # where the work runs
    cpus: float = 1.0  # CPU cores that each task holds on engine ray
    memory_gib: float = 0.0  # GiB of memory that each task holds on engine ray; 0: not counted
    overwrite: bool = False  # replace what OUTPUT holds


def main(settings: Settings) -> Dataset:
    """Ask what the log does not know, reach verdicts, and say how far the judge went by position."""
    return judge_dataset("judge_pairs", Job.of(settings, settings.compare))


if __name__ == "__main__":
    command(main)
