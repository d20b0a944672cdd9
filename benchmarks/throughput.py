"""How much of a device a training step uses: tokens per second, memory, and the share of the matrix rate that the device was seen to reach.

    python benchmarks/throughput.py                             # on a GPU: a Qwen3-0.6B; without one: a small model, and it says so
    python benchmarks/throughput.py --shape 4b --recompute --steps 20
    python benchmarks/throughput.py --attention mask            # what the kernel that is taken by itself gains: run both

Random weights of a shape, pairs of log-normal lengths, packed rows, the step of `training.train` itself: forward, loss, backward, clip,
AdamW. The device's rate is measured first, with square products of 8,192 (1,024 without a GPU) in the same precision. A step needs 6 FLOPs
per weight of the body and token (2 forward, 4 backward; what --recompute does again is not counted), and 12 per layer, width and pair of
tokens that attend to each other (PaLM, arXiv 2204.02311, appendix B). The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path
from typing import Any, NamedTuple, cast, get_args

import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForSequenceClassification

from rayward import attention, training
from rayward.batching import BatchSettings
from rayward.objectives import make_objective
from rayward.rendering import Group, Groups
from rayward.reward_model import RewardModel
from rayward.training import Run, TrainSettings


class Shape(NamedTuple):
    """A Qwen3 of that many layers."""

    width: int
    inner: int
    layers: int
    heads: int
    shared_heads: int  # of keys and values
    head: int
    words: int


SHAPES = {
    "small": Shape(256, 768, 4, 4, 2, 64, 8192),
    "0.6b": Shape(1024, 3072, 28, 16, 8, 128, 151_936),
    "4b": Shape(2560, 9728, 36, 32, 8, 128, 151_936),
}


def make_model(shape: Shape, device: torch.device, attend_by: attention.Choice) -> RewardModel:
    """Random weights in float32."""
    config = Qwen3Config(
        vocab_size=shape.words,
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.shared_heads,
        head_dim=shape.head,
        num_labels=1,
        pad_token_id=0,
    )
    with device:
        classifier = Qwen3ForSequenceClassification(config)
    return RewardModel(classifier.to(device), attend_by=attend_by).to(device)


def pairs(count: int, words: int, scale: float, seed: int = 0) -> list[Group]:
    """Prompts of about 120 `scale` tokens with two answers of about 240."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        lengths = np.clip(np.exp(rng.normal(np.log([120 * scale, 240 * scale, 240 * scale]), 0.6)), 8, 2000 * scale).astype(np.int32)
        ends = np.cumsum(lengths)[1:] - 1
        tokens = rng.integers(1, words, int(lengths.sum()), dtype=np.int32)
        made.append(Group(tokens, lengths, ends.astype(np.int32), np.array([1, 0], np.float32), 1.0))
    return made


def flops(model: RewardModel, groups: list[Group]) -> float:
    """Useful FLOPs of a step over these examples."""
    config = model.classifier.config
    body = sum(p.numel() for n, p in model.named_parameters() if "embed_tokens" not in n)
    tokens = sum(len(g.token_T) for g in groups)
    seen = 0.0  # pairs of tokens that attend to each other
    for g in groups:
        prompt, answers = float(g.length_A[0]), g.length_A[1:].astype(float)
        seen += prompt * prompt / 2 + float((answers * prompt + answers * answers / 2).sum())
    return 6.0 * body * tokens + 12.0 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * seen


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of square products on this device, the best of five."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = 0.0
    for _ in range(6):  # the first one warms up
        synchronize(device)
        start = time.perf_counter()
        for _ in range(4):
            a @ b
        synchronize(device)
        best = max(best, 4 * 2 * size**3 / (time.perf_counter() - start))
    return best


def attends_by(model: RewardModel, precision: torch.dtype) -> str:
    """The name of the kernel that a step attends with."""
    kernel = model.kernel_in(precision) if model.segmented else None
    return next((name for name, way in attention.KERNELS.items() if way.attend is kernel), "mask")


def measure(shape_name: str, steps: int, size: int, recompute: bool, device: torch.device, attend_by: attention.Choice) -> dict[str, Any]:
    """Steps over different examples, after two that warm up."""
    shape = SHAPES[shape_name]
    precision = "bf16" if device.type == "cuda" else "fp32"
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    rate = matrix_rate(device, dtype)
    model = make_model(shape, device, attend_by)
    if recompute:
        model.classifier.gradient_checkpointing_enable({"use_reentrant": False})
    groups = pairs((steps + 2) * size, shape.words, 1.0 if device.type == "cuda" else 0.3)
    settings = TrainSettings(lr=1e-5, precision=cast(Any, precision), recompute=recompute)
    batch = BatchSettings(size=size, micro_tokens=16_384 if device.type == "cuda" else 4096)
    run = Run(model, cast(Groups, groups), None, make_objective("bradley_terry"), settings, batch, Path())
    optimizer = training.make_optimizer(model, settings)
    parameters = [p for p in model.parameters() if p.requires_grad]
    tally = training._Tally()
    model.train()
    took, tokens, useful = 0.0, 0, 0.0
    for step in range(steps + 2):
        mine = groups[step * size : (step + 1) * size]
        synchronize(device)
        start = time.perf_counter()
        training._step(run, optimizer, parameters, step, range(step * size, (step + 1) * size), tally)
        synchronize(device)
        if step >= 2:
            took += time.perf_counter() - start
            tokens += sum(len(g.token_T) for g in mine)
            useful += flops(model, mine)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "shape": shape_name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "precision": precision,
        "attention": attends_by(model, dtype),
        "tokens_per_s": round(tokens / took),
        "peak_gib": round(peak / 2**30, 2),
        "matrix_tflops": round(rate / 1e12, 3),
        "share_of_matrix_rate": round(useful / took / rate, 3),
    }


def main() -> None:
    """Measure and tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), help="default: 0.6b on a GPU, small without")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--size", type=int, default=32, help="pairs in a step")
    parser.add_argument("--attention", choices=get_args(attention.Choice), default="auto", help="as net.attention")
    parser.add_argument("--recompute", action="store_true", help="keep no activations")
    said = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        print("no GPU here: a small model on the CPU in float32, which says nothing about a GPU")
    shape = said.shape or ("0.6b" if device.type == "cuda" else "small")
    found = measure(shape, said.steps, said.size, said.recompute, device, said.attention)
    for name, value in found.items():
        print(f"{name:22} {value}")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
