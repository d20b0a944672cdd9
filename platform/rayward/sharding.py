"""FSDP2: a body's weights, gradients and optimizer state are spread over the workers, for models that do not fit into one device
(Zhao et al. 2023, arXiv 2304.11277; torch's `fully_shard`). The head stays whole on every worker.

Every worker must take part in every forward and backward pass, so a worker that has run out of micro-batches does one more with
weight 0. A checkpoint is written by all workers together, each its own share (torch.distributed.checkpoint), and is read by any number.

No worker needs room for the whole: a model without numbers (torch's meta device) is spread, and then every worker reads its share (`fill`);
weights that are put together go to a file one after another (`write_whole`), or from a file to all workers (`read_whole`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from rayward.errors import ModelError

SHARDS = "shards"  # folder of a checkpoint
NAMES = {  # of types of numbers in a safetensors file
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
LISTS = ("layers", "layer", "h", "blocks")  # what Hugging Face calls a body's layers


def layer_list(body: nn.Module) -> nn.ModuleList | None:
    """The layers of a body, the lowest first; None where they are in no list."""
    lists = (m for name, m in body.named_modules() if isinstance(m, nn.ModuleList) and name.rpartition(".")[2] in LISTS)
    return next(lists, None)


def shard(body: nn.Module, device: torch.device, bf16: bool) -> None:
    """Spread a body over all workers: layer by layer, then what is left. Gradients are added up, not averaged."""
    if not dist.is_initialized():
        raise ModelError("train.shard=true spreads a model over workers, and there is one process", "ask for more: --workers 2")
    layers = layer_list(body)
    if layers is None:
        raise ModelError(f"{type(body).__name__} has no list of layers to spread", "leave train.shard out")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if bf16 else MixedPrecisionPolicy()
    for layer in layers:
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


def all_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, also those buffers that are never saved."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


Rows = tuple[int, int]  # the first, and how many
Read = Callable[[str, Rows | None], Tensor]  # name of a tensor and which of its rows (None: all) -> its numbers


@torch.no_grad()
def fill(module: nn.Module, device: torch.device, read: Read) -> None:
    """Give a module without numbers room on a device, and its numbers: of what is spread over workers the share of this one."""
    module.to_empty(device=device)
    for name, tensor in all_tensors(module).items():
        if not isinstance(tensor, DTensor):
            tensor.copy_(read(name, None))
            continue
        local = tensor.to_local()
        if local.numel():
            local.copy_(read(name, rows_here(tensor)))


def rows_here(tensor: DTensor) -> Rows:
    """Which rows of a spread tensor lie on this worker."""
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    assert tuple(shape[1:]) == tuple(tensor.shape[1:]), f"spread by more than rows: {tensor.placements}"
    return offset[0], shape[0]


def write_whole(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Tensors put together again one after another, into a safetensors file of the first worker. Every worker must call it.

    Raises:
        OSError: on the first worker, when all tensors have been put together: the others would wait for it.
    """
    ordered = dict(sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])))  # so that numbers lie where they may
    with nullcontext() if dist.get_rank() else file.open("wb") as out:
        failed = _put(out, _header(ordered))
        for tensor in ordered.values():
            full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if out is not None and failed is None:
                failed = _put(out, full.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        if failed is not None:
            raise failed


def _put(out: Any, content: Any) -> OSError | None:
    """What came of writing, on the worker that writes."""
    try:
        if out is not None:
            out.write(content)
    except OSError as error:
        return error
    return None


def _header(tensors: Mapping[str, Tensor]) -> bytes:
    """How a safetensors file begins: the length of what follows, then name, type, shape and place of every tensor."""
    said: dict[str, Any] = {}
    at = 0
    for name, tensor in tensors.items():
        end = at + tensor.numel() * tensor.element_size()
        said[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(said).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


@torch.no_grad()
def read_whole(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Give tensors the numbers of a file that the first worker reads, in place; every worker must call it, with the same names."""
    with nullcontext() if dist.get_rank() else safe_open(file, "pt") as stored:
        for name in sorted(tensors):
            tensor = tensors[name]
            here = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            full = torch.empty(tensor.shape, dtype=here.dtype, device=here.device) if stored is None else stored.get_tensor(name).to(here)
            dist.broadcast(full, 0)
            if isinstance(tensor, DTensor) and here.numel():
                full = full.narrow(0, *rows_here(tensor))
            if here.numel():
                here.copy_(full)


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
