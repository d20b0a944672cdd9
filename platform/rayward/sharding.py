"""FSDP2: a body's weights, gradients and optimizer state are spread over the workers, for models that do not fit into one device
(Zhao et al. 2023, arXiv 2304.11277; torch's `fully_shard`). The head stays whole on every worker.

Every worker must take part in every forward and backward pass, so a worker that has run out of micro-batches does one more with
weight 0. A checkpoint is written by all workers together, each its own share (torch.distributed.checkpoint), and is read by any number.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from rayward.errors import ModelError

SHARDS = "shards"  # folder of a checkpoint
LISTS = ("layers", "layer", "h", "blocks")  # what Hugging Face calls a body's layers


def shard(body: nn.Module, device: torch.device, bf16: bool) -> None:
    """Spread a body over all workers: layer by layer, then what is left. Gradients are added up, not averaged."""
    if not dist.is_initialized():
        raise ModelError("train.shard=true spreads a model over workers, and there is one process", "ask for more: --workers 2")
    lists = [m for name, m in body.named_modules() if isinstance(m, nn.ModuleList) and name.rpartition(".")[2] in LISTS]
    if not lists:
        raise ModelError(f"{type(body).__name__} has no list of layers to spread", "leave train.shard out")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if bf16 else MixedPrecisionPolicy()
    for layer in lists[0]:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(body, mesh=mesh, mp_policy=policy)
    for module in body.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo scales nothing while it adds


def reshard(model: nn.Module) -> None:
    """Drop what was gathered of weights that have changed since: after a forward without a backward pass torch keeps some of them whole."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is spread over workers."""
    return isinstance(tensor, DTensor)


def clip(parameters: Sequence[nn.Parameter], most: float) -> None:
    """Scale gradients down to a norm of `most` over everything, whatever of it is spread over workers."""
    kinds = [[p for p in parameters if p.grad is not None and is_sharded(p) == spread] for spread in (True, False)]
    norms = [torch.nn.utils.get_total_norm([p.grad for p in kind if p.grad is not None]) for kind in kinds if kind]
    whole = torch.stack([n.full_tensor() if isinstance(n, DTensor) else n for n in norms]).square().sum().sqrt()
    for kind in kinds:
        if kind:
            torch.nn.utils.clip_grads_with_norm_(kind, most, whole)


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors put together again, on the CPU of the first worker; every worker must call it, and the others get nothing."""
    first = dist.get_rank() == 0
    together: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if first:
            together[name] = full.detach().cpu()
    return together


def save(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Every worker writes its share of the tensors."""
    import torch.distributed.checkpoint as dcp

    dcp.save(dict(tensors), checkpoint_id=folder / SHARDS)


def load(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Every worker reads its share into the tensors, in place."""
    import torch.distributed.checkpoint as dcp

    dcp.load(tensors, checkpoint_id=folder / SHARDS)


def meet() -> None:
    """Wait until all workers have come here."""
    dist.barrier()


def states(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimizer's moments by name, made (as zeros) where no step was taken yet, or a parameter never had a gradient."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for p in parameters:
        if not optimizer.state[p]:
            moments = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            optimizer.state[p] = {"step": torch.tensor(0.0, device=p.device), **moments}
    return {f"{n}.{name}": value for n, p in enumerate(parameters) for name, value in optimizer.state[p].items()}
