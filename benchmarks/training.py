"""Training speed on a CPU, beside TRL and beside a bare loop: the same tokens, weights, threads and optimizer on every side.

    pip install -e '.[bench]'
    OMP_NUM_THREADS=1 python benchmarks/training.py --task pairs|rankings|steps [--quick] [--threads 1] [--rounds 3]
    ... --task steps --process-python /tmp/trl113/bin/python      # an interpreter with TRL 1.13, the last one with a PRMTrainer

Every measurement is a process of its own (so that its peak memory is its own), and the sides take turns, round after round. A side reports
CPU-seconds of its training loop alone, all threads of it together: not of imports, of making tokens or of evaluation. Before it is
timed it computes the loss and the gradient of one fixed batch: the loss must agree on all sides to 1e-4, and the process is warm. After the
same examples the accuracies on held-out ones must agree within their 95 % intervals (the orders of the examples differ).

What is compared is the work done per CPU-second, in examples: pairs, prompts with 8 ranked answers, problems with 8 solutions in steps.
Real tokens are counted as plain training counts them, a prompt once for every answer behind it, so that not computing a token twice is no
loss of tokens; the ratio of real tokens per CPU-second is then the ratio of examples. TRL learns rankings as all 28 pairs of 8 answers.

    rayward          the loop of this project, `training.train`
    bare             the same micro-batches, made beforehand, through forward, loss, backward, clip and step, in ten lines of torch
    separate         this project without sharing: every answer a row of its own, with its prompt in front
    fewer            this project on the first examples only, as many as TRL is given where it is slow; for its accuracy, not its speed
    trl              TRL's RewardTrainer (PRMTrainer for steps) with batches of 8, gradient checkpointing off
    trl_best         TRL at its best of several sizes of micro-batch, with and without grouping by length, at the same size of step
    padded           for steps without TRL 1.13 at hand: what its PRMTrainer computes, in a bare loop

The model is a random Qwen2 (256 wide, 4 layers, vocabulary 4,096, 3.9 million parameters, float32), the lengths are log-normal. The last
line is JSON: median ratios with their least and greatest, and the peak memory of every side in MiB.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TRL_EXPERIMENTAL_SILENCE="1", TOKENIZERS_PARALLELISM="false")

import numpy as np

VOCABULARY, PAD, END, GOOD, BAD = 4096, 0, 1, range(10, 70), range(70, 130)
LR, BETA2, DECAY, CLIP = 3e-4, 0.98, 0.01, 1.0


@dataclass(frozen=True)
class Problem:
    """One example in tokens: a prompt, its answers, where each answer is judged, and what is said there."""

    prompt: list[int]
    answers: list[list[int]]
    places: list[list[int]]  # per answer, offsets into it
    targets: list[list[float]]

    @property
    def tokens(self) -> int:
        """Real tokens, the prompt once per answer."""
        return sum(len(self.prompt) + len(a) for a in self.answers)


@dataclass(frozen=True)
class Task:
    """What is learned, how much of it, and with what."""

    make: Callable[[np.random.Generator], Problem]
    train: int  # examples; a side may take the first of them only (`least`)
    held: int
    size: int  # examples in a step of this project
    objective: str
    outputs: int = 1  # of the head
    least: int = 0  # examples for the sides that are slow, 0: all


# ------------------------------------------------------------------------------------------------------------------- data


def _length(rng: np.random.Generator, median: float, low: int, high: int) -> int:
    return int(np.clip(median * math.exp(0.8 * rng.standard_normal()), low, high))


def _text(rng: np.random.Generator, length: int, good: float) -> list[int]:
    """Tokens of which some tell: `good` of them from one list, 0.16 - good from the other."""
    kind = rng.random(length)
    plain = rng.integers(130, VOCABULARY, length)
    told = np.where(kind < good, rng.integers(GOOD.start, GOOD.stop, length), rng.integers(BAD.start, BAD.stop, length))
    return np.where(kind < 0.16, told, plain).tolist()


def _prompt(rng: np.random.Generator, length: int) -> list[int]:
    return rng.integers(130, VOCABULARY, length).tolist()


def _pair(rng: np.random.Generator) -> Problem:
    answers = [[*_text(rng, _length(rng, 53, 6, 400), good), END] for good in (0.12, 0.04)]
    return Problem(_prompt(rng, _length(rng, 14, 4, 110)), answers, [[len(a) - 1] for a in answers], [[1.0], [0.0]])


def _ranking(rng: np.random.Generator) -> Problem:
    quality = rng.permutation(8) / 7
    answers = [[*_text(rng, _length(rng, 40, 6, 400), 0.16 * q), END] for q in quality]
    return Problem(_prompt(rng, int(rng.integers(256, 513))), answers, [[len(a) - 1] for a in answers], [[float(q)] for q in quality])


def _steps(rng: np.random.Generator) -> Problem:
    answers, places, targets = [], [], []
    for _ in range(8):
        right = (rng.random(int(rng.integers(4, 11))) < 0.6).astype(float).tolist()
        steps = [[*_text(rng, int(rng.integers(8, 41)), 0.14 if r else 0.02), END] for r in right]
        answers.append(list(itertools.chain(*steps)))
        places.append((np.cumsum([len(s) for s in steps]) - 1).tolist())
        targets.append(right)
    return Problem(_prompt(rng, int(rng.integers(64, 257))), answers, places, targets)


TASKS = {
    "pairs": Task(_pair, 512, 128, 8, "bradley_terry"),
    "rankings": Task(_ranking, 32, 16, 4, "bradley_terry", least=3),
    "steps": Task(_steps, 96, 32, 1, "binary_cross_entropy", outputs=2, least=64),
}


def problems(task: Task, seed: int, count: int) -> list[Problem]:
    """The same on every side."""
    rng = np.random.default_rng(seed)
    return [task.make(rng) for _ in range(count)]


def make_model(folder: Path, outputs: int) -> None:
    """Random weights and a tokenizer of numbered words, saved once for all sides."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForSequenceClassification

    words = Tokenizer(models.WordLevel({"<pad>": PAD, "<end>": END, **{f"w{n}": n for n in range(2, VOCABULARY)}}, unk_token="<end>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>").save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        num_labels=outputs,
        pad_token_id=PAD,
        eos_token_id=END,
        bos_token_id=None,
        tie_word_embeddings=False,
    )
    Qwen2ForSequenceClassification(config).save_pretrained(folder)


# ------------------------------------------------------------------------------------------------------------------ sides


@dataclass
class Measured:
    """What one process says of its side."""

    loss: float  # of the first example
    examples: int
    tokens: int  # real ones
    cpu_s: float
    wall_s: float
    peak_mib: float
    accuracy: float  # on held-out examples: pairs or steps judged right
    error: float  # half the width of its 95 % interval, over examples


def _peak_mib() -> float:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024


def _timed(work: Callable[[], Any]) -> tuple[float, float, float]:
    """CPU-seconds, seconds, and the peak memory of the process in MiB from here on."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak so far was of checking the loss
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - cpu, time.perf_counter() - wall, _peak_mib()


def _groups(made: Sequence[Problem]) -> list[Any]:
    from rayward.rendering import Group

    groups = []
    for p in made:
        starts = np.cumsum([len(p.prompt), *map(len, p.answers)])
        groups.append(
            Group(
                np.array(p.prompt + list(itertools.chain(*p.answers)), np.int32),
                np.array([len(p.prompt), *map(len, p.answers)], np.int32),
                np.array([s + at for s, places in zip(starts, p.places, strict=False) for at in places], np.int32),
                np.array(list(itertools.chain(*p.targets)), np.float32),
                1.0,
            )
        )
    return groups


def _right(scores: Sequence[Sequence[float]], made: Sequence[Problem]) -> tuple[float, float]:
    """Which share of the pairs of answers, or of the steps, is judged right; and half the width of its 95 % interval over problems."""
    shares = []
    for score, p in zip(scores, made, strict=True):
        target = list(itertools.chain(*p.targets))
        if len(p.targets[0]) > 1 or len(target) > len(p.answers):
            shares.append(statistics.mean((s > 0) == (t > 0.5) for s, t in zip(score, target, strict=True)))
        else:
            ordered = [(a, b) for a in range(len(target)) for b in range(len(target)) if target[a] > target[b]]
            shares.append(statistics.mean(score[a] > score[b] for a, b in ordered))
    return statistics.mean(shares), 1.96 * statistics.stdev(shares) / math.sqrt(len(shares))


def own_side(side: str, task: Task, folder: Path, made: list[Problem], held: list[Problem], choice: dict[str, Any]) -> Measured:
    """This project's loop, or the bare one on its micro-batches."""
    import torch

    from rayward.batching import BatchSettings, micro_batches, plan
    from rayward.objectives import make_objective
    from rayward.rendering import Groups
    from rayward.reward_model import ModelSettings, load_model, score_groups
    from rayward.training import Run, TrainSettings, make_optimizer, train

    two = task.outputs == 2
    model = load_model(str(folder), ModelSettings(new_head=two, head="two_class" if two else "auto")).model
    if two:
        _head_of(folder, model)
    if side == "separate":
        model.shares_prefix = False
    settings = BatchSettings(size=task.size, **choice)
    objective = make_objective(task.objective)
    groups = _groups(made)
    train_settings = TrainSettings(
        lr=LR, beta2=BETA2, weight_decay=DECAY, clip=CLIP, warmup=0.0, schedule="constant", precision="fp32", checkpoint_every=10**9
    )

    def loss_of(batch: Any) -> torch.Tensor:
        output_GKC = model.outputs(batch)
        return (objective.of(batch, model.reading.pick(output_GKC, batch.column_GK), output_GKC) * batch.weight_G).sum()

    steps = [[groups[n] for n in step] for step in plan(len(groups), task.size, 0, 0)]
    [(_, first)] = micro_batches(groups[:1], settings, model.shares_prefix, model.flat)
    loss = loss_of(first)
    loss.backward()
    model.zero_grad()
    if side == "bare":
        optimizer = make_optimizer(model, train_settings)
        parameters = list(model.parameters())
        ready = [[batch for _, batch in micro_batches(step, settings, model.shares_prefix, model.flat)] for step in steps]

        def work() -> None:
            for step, batches in zip(steps, ready, strict=True):
                for batch in batches:
                    (loss_of(batch) / len(step)).backward()
                torch.nn.utils.clip_grad_norm_(parameters, CLIP)
                optimizer.step()
                optimizer.zero_grad()
    else:
        with tempfile.TemporaryDirectory() as out:
            run = Run(model, cast(Groups, groups), None, objective, train_settings, settings, Path(out))
            cpu_s, wall_s, peak = _timed(lambda: train(run))
    if side == "bare":
        cpu_s, wall_s, peak = _timed(work)
    right, error = _right([s.tolist() for s in score_groups(model, _groups(held), settings, "fp32")], held)
    return Measured(loss.item(), len(made), sum(p.tokens for p in made), cpu_s, wall_s, peak, right, error)


def _head_of(folder: Path, model: Any) -> None:
    """The head that was saved, where a fresh one was asked for to have two classes."""
    import torch
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as tensors, torch.no_grad():
        model.head.weight.copy_(tensors.get_tensor("score.weight"))


def _arguments(choice: dict[str, Any], size: int, folder: str) -> dict[str, Any]:
    """What both of TRL's trainers are given."""
    batch = choice.get("batch", size)
    return {
        "output_dir": folder,
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": max(1, size // batch),
        "learning_rate": LR,
        "adam_beta2": BETA2,
        "weight_decay": DECAY,
        "max_grad_norm": CLIP,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "num_train_epochs": 1,
        "max_length": 1024,
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 10,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **({"train_sampling_strategy": "group_by_length", "remove_unused_columns": False} if choice.get("grouped") else {}),
    }


def trl_side(side: str, task: Task, folder: Path, made: list[Problem], held: list[Problem], choice: dict[str, Any]) -> Measured:
    """TRL's RewardTrainer; a ranking is all its pairs."""
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import RewardConfig, RewardTrainer

    def pairs_of(p: Problem) -> list[dict[str, Any]]:
        order = sorted(range(len(p.answers)), key=lambda n: -p.targets[n][0])
        return [
            {"chosen_ids": p.prompt + p.answers[a], "rejected_ids": p.prompt + p.answers[b]} for a, b in itertools.combinations(order, 2)
        ]

    rows: list[dict[str, Any]] = [pair for p in made for pair in pairs_of(p)]
    if choice.get("grouped"):
        rows = [{**r, "length": max(len(r["chosen_ids"]), len(r["rejected_ids"]))} for r in rows]
    with tempfile.TemporaryDirectory() as out:
        trainer = RewardTrainer(
            model=str(folder),
            args=RewardConfig(**_arguments(choice, 8, out)),
            processing_class=AutoTokenizer.from_pretrained(folder),
            train_dataset=Dataset.from_list(rows),
        )
        model = trainer.model
        first = trainer.data_collator([{k: r[k] for k in ("chosen_ids", "rejected_ids")} for r in pairs_of(made[0])])
        loss = trainer.compute_loss(model, first)
        loss.backward()
        model.zero_grad()
        cpu_s, wall_s, peak = _timed(trainer.train)
    model.eval()
    with torch.no_grad():
        scores = [[float(model(input_ids=torch.tensor([p.prompt + a])).logits[0, 0]) for a in p.answers] for p in held]
    right, error = _right(scores, held)
    return Measured(loss.item(), len(made), sum(p.tokens for p in made), cpu_s, wall_s, peak, right, error)


def process_side(side: str, task: Task, folder: Path, made: list[Problem], held: list[Problem], choice: dict[str, Any]) -> Measured:
    """TRL 1.13's PRMTrainer, or (`padded`) the same in a bare loop: every solution a padded row, cross-entropy at the ends of steps."""
    import torch
    from transformers import AutoModelForTokenClassification, AutoTokenizer

    rows: list[dict[str, Any]] = []
    for p in made:
        for answer, places, targets in zip(p.answers, p.places, p.targets, strict=True):
            labels = np.full(len(p.prompt) + len(answer), -100)
            labels[np.array(places) + len(p.prompt)] = np.array(targets, int)
            rows.append({"input_ids": p.prompt + answer, "labels": labels.tolist()})
    if choice.get("grouped"):
        rows = [{**r, "length": len(r["input_ids"])} for r in rows]
    model = AutoModelForTokenClassification.from_pretrained(folder, num_labels=2, dtype=torch.float32)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    with torch.no_grad():
        model.score.bias.zero_()
    first = _padded([{k: r[k] for k in ("input_ids", "labels")} for r in rows[: len(made[0].answers)]])
    loss = model(**first).loss
    loss.backward()
    model.zero_grad()
    if side == "padded":
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, BETA2), weight_decay=DECAY, fused=True)
        order = np.random.default_rng(0).permutation(len(rows))

        def work() -> None:
            for start in range(0, len(rows), 8):
                model(**_padded([rows[n] for n in order[start : start + 8]])).loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
                optimizer.step()
                optimizer.zero_grad()

        cpu_s, wall_s, peak = _timed(work)
    else:
        from datasets import Dataset
        from trl.experimental.prm import PRMConfig, PRMTrainer

        with tempfile.TemporaryDirectory() as out:
            trainer = PRMTrainer(
                model=model,
                args=PRMConfig(**_arguments(choice, 8, out)),
                processing_class=AutoTokenizer.from_pretrained(folder),
                train_dataset=Dataset.from_list(rows),
            )
            cpu_s, wall_s, peak = _timed(trainer.train)
    model.eval()
    scores: list[list[float]] = []
    with torch.no_grad():
        for p in held:
            said: list[float] = []
            for answer, places in zip(p.answers, p.places, strict=True):
                logit_TC = model(input_ids=torch.tensor([p.prompt + answer])).logits[0]
                said += (logit_TC[:, 1] - logit_TC[:, 0])[torch.tensor(places) + len(p.prompt)].tolist()
            scores.append(said)
    right, error = _right(scores, held)
    return Measured(loss.item(), len(made), sum(p.tokens for p in made), cpu_s, wall_s, peak, right, error)


def _padded(rows: Sequence[dict[str, list[int]]]) -> dict[str, Any]:
    import torch

    T = max(len(r["input_ids"]) for r in rows)
    fill = {"input_ids": PAD, "labels": -100}
    batch = {name: torch.tensor([r[name] + [value] * (T - len(r[name])) for r in rows]) for name, value in fill.items()}
    batch["attention_mask"] = torch.tensor([[1] * len(r["input_ids"]) + [0] * (T - len(r["input_ids"])) for r in rows])
    return batch


SIDES = {
    "rayward": own_side,
    "bare": own_side,
    "separate": own_side,
    "fewer": own_side,
    "trl": trl_side,
    "trl_best": trl_side,
    "prm": process_side,
    "prm_best": process_side,
    "padded": process_side,
}


def measure_here(arguments: argparse.Namespace) -> None:
    """One side in this process; the last line is its JSON."""
    import torch

    torch.set_num_threads(arguments.threads)
    task = TASKS[arguments.task]
    made = problems(task, 1, task.train)[: arguments.examples or None]
    choice = json.loads(arguments.choice)
    print(json.dumps(asdict(SIDES[arguments.side](arguments.side, task, arguments.folder, made, problems(task, 2, task.held), choice))))


# ------------------------------------------------------------------------------------------------------------- comparison


def measure(arguments: argparse.Namespace, side: str, examples: int, choice: dict[str, Any]) -> Measured:
    """One side in a process of its own."""
    python = arguments.process_python if side.startswith("prm") else sys.executable
    command = [python, __file__, "--task", arguments.task, "--side", side, "--folder", str(arguments.folder)]
    command += ["--threads", str(arguments.threads), "--examples", str(examples), "--choice", json.dumps(choice)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": str(arguments.threads)})
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stderr[-3000:]}")
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


def best_choice(arguments: argparse.Namespace, side: str, examples: int) -> dict[str, Any]:
    """The size of micro-batch and the order that are fastest for TRL on a few examples."""
    found = {}
    for batch, grouped in itertools.product((4, 2) if arguments.quick else (8, 4, 2, 1), (True,) if arguments.quick else (False, True)):
        choice = {"batch": batch, "grouped": grouped}
        found[json.dumps(choice)] = measure(arguments, side, examples, choice).cpu_s
        print(f"  {side} with {choice}: {found[json.dumps(choice)]:.1f} CPU-s for {examples} examples", flush=True)
    return json.loads(min(found, key=lambda c: found[c]))


def compare(arguments: argparse.Namespace) -> None:
    """All sides in turn; a table, and the JSON line."""
    task = TASKS[arguments.task]
    make_model(arguments.folder, task.outputs)
    few = task.least or task.train
    other = "trl" if arguments.task != "steps" else "prm" if arguments.process_python else "padded"
    scale = 4 if arguments.quick else 1
    counts = {"rayward": task.train, "bare": task.train, other: max(1, few // scale)}
    if arguments.task == "rankings":
        counts["separate"] = task.train
    if counts[other] < task.train:
        counts["fewer"] = counts[other]
    choices: dict[str, dict[str, Any]] = {side: {} for side in counts}
    if other != "padded":
        best = f"{other}_best"
        choices[best] = best_choice(arguments, best, 1 if arguments.task == "rankings" else max(1, few // (16 if arguments.quick else 8)))
        counts[best] = counts[other]
    runs: dict[str, list[Measured]] = {side: [] for side in counts}
    for turn in range(1 if arguments.quick else arguments.rounds):
        for side in sorted(counts, reverse=bool(turn % 2)):
            if side == "fewer" and turn:
                continue
            runs[side].append(measure(arguments, side, counts[side], choices[side]))
            print(f"  round {turn + 1}, {side}: {runs[side][-1]}", flush=True)
    report(arguments, runs, choices)


def report(arguments: argparse.Namespace, runs: dict[str, list[Measured]], choices: dict[str, dict[str, Any]]) -> None:
    """The table and the JSON line; losses that differ end it."""
    losses = {side: made[0].loss for side, made in runs.items()}
    if max(losses.values()) - min(losses.values()) > 1e-4:
        raise SystemExit(f"the sides do not compute the same loss: {losses}")
    rates = {side: [m.tokens / m.cpu_s for m in made] for side, made in runs.items()}
    print(f"\n{arguments.task}, {arguments.threads} thread(s): loss of the first example {losses['rayward']:.6f} on every side")
    print(f"{'side':10} {'examples':>8} {'real tokens/CPU-s':>18} {'CPU-s':>7} {'peak MiB':>9} {'accuracy':>9} +-95 %")
    for side, made in runs.items():
        m = made[0]
        rate, cpu = statistics.median(rates[side]), statistics.median(x.cpu_s for x in made)
        print(
            f"{side:10} {m.examples:8} {rate:18,.0f} {cpu:7.1f} {m.peak_mib:9,.0f} {m.accuracy:9.3f} {m.error:.3f}  {choices[side] or ''}"
        )
    result: dict[str, Any] = {"task": arguments.task, "threads": arguments.threads, "rounds": len(rates["rayward"])}
    names = {"bare": "vs_bare_loop", "separate": "vs_separate", "padded": "vs_padded_loop"}
    names |= {"trl": "vs_trl", "prm": "vs_trl", "trl_best": "vs_trl_best", "prm_best": "vs_trl_best"}
    for side in runs:
        if side in names:
            ratios = [ours / theirs for ours, theirs in zip(rates["rayward"], rates[side], strict=True)]
            result[names[side]] = round(statistics.median(ratios), 3)
            result[f"{names[side]}_range"] = [round(min(ratios), 3), round(max(ratios), 3)]
    result["peak_mib"] = {side: round(max(m.peak_mib for m in made)) for side, made in runs.items()}
    result["accuracy"] = {side: round(made[0].accuracy, 4) for side, made in runs.items()}
    result["best_choice"] = next((c for side, c in choices.items() if side.endswith("_best")), None)
    result["accuracy_agrees"] = agreement = {side: _agree(made[0], runs) for side, made in runs.items() if "vs_trl" in names.get(side, "")}
    print(json.dumps(result))
    if not all(agreement.values()):
        raise SystemExit("after the same examples the accuracies lie further apart than their intervals allow")


def _agree(theirs: Measured, runs: dict[str, list[Measured]]) -> bool:
    """Whether this project's accuracy after as many examples lies within the interval of the difference."""
    ours = next(runs[side][0] for side in ("rayward", "fewer") if runs[side][0].examples == theirs.examples)
    return abs(ours.accuracy - theirs.accuracy) <= math.hypot(ours.error, theirs.error)


def main() -> None:
    """Compare, or (in a process that a comparison starts) measure one side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=sorted(TASKS), required=True)
    parser.add_argument("--quick", action="store_true", help="one round, fewer examples on the slow sides")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--process-python", default="", help="an interpreter with TRL 1.13")
    parser.add_argument("--side", choices=sorted(SIDES), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--examples", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--choice", default="{}", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        measure_here(arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        arguments.folder = Path(folder)
        compare(arguments)


if __name__ == "__main__":
    main()
