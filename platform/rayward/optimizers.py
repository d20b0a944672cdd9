"""What moves weights, and how fast: learning-rate schedules, parameter groups, an average of the weights.

Everything is a function of the step and the settings, so a run that is resumed needs nothing but the step, the optimizer's
moments, and the average where there is one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rayward.sharding import LISTS, is_sharded, reshard

Schedule = Literal["cosine", "linear", "constant", "wsd"]
FLOOR = 0.05  # of the peak learning rate, where a schedule ends
DECAY = 0.2  # share of steps over which `wsd` falls
_LAYER = re.compile(rf"(?:^|\.)(?:{'|'.join(LISTS)})\.(\d+)\.")
_EMBEDDING = re.compile(r"embed|(?:^|\.)w[tp]e\.")


def lr_share(step: int, total: int, warmup: float, schedule: Schedule) -> float:
    """The share of the peak learning rate at a step: a linear rise over `warmup`, then the schedule down to a twentieth.

    `wsd` is warm-up, stable, decay (Hu et al. 2024, arXiv 2404.06395, section 4): constant, and a linear fall over the last fifth.

    >>> [round(lr_share(n, 10, 0.2, "cosine"), 2) for n in (0, 1, 2, 9)], [round(lr_share(n, 10, 0.0, "wsd"), 2) for n in (0, 7, 8, 9)]
    ([0.5, 1.0, 1.0, 0.09], [1.0, 1.0, 1.0, 0.53])
    """
    rise = max(1, round(warmup * total))
    if step < rise:
        return (step + 1) / rise
    along = (step - rise) / max(1, total - rise)
    stable = max(rise, (1 - DECAY) * total)  # until here wsd is constant
    fall = {
        "cosine": 0.5 * (1 + math.cos(math.pi * along)),
        "linear": 1 - along,
        "constant": 1.0,
        "wsd": 1.0 - max(0.0, (step - stable) / max(1.0, total - stable)),
    }[schedule]
    return FLOOR + (1 - FLOOR) * fall


def layers_of(model: nn.Module) -> int:
    """How many layers a body has, by the names of its parameters."""
    return 1 + max((int(found[1]) for name, _ in model.named_parameters() if (found := _LAYER.search(name))), default=-1)


def head_parts(model: Any, head: str) -> tuple[str, ...]:
    """What stands behind the layers of a body and is new with the head: the modules that a frozen body does not freeze.

    `head` is the last of them; some classes have a pooler or a dense layer before it.
    """
    body = model.base_model
    prefix = next((f"{name}." for name, module in model.named_children() if module is body), "")
    before = [
        name for name, module in model.named_children() if module is not body and name != head and any(True for _ in module.parameters())
    ]
    return (head, *before, *(f"{prefix}{name}" for name, _ in body.named_children() if name == "pooler"))


def is_part(name: str, parts: tuple[str, ...]) -> bool:
    """Whether a parameter or module belongs to one of these modules.

    >>> is_part("score.weight", ("score",)), is_part("scores.weight", ("score",))
    (True, False)
    """
    return any(name == part or name.startswith(part + ".") for part in parts)


def depth_of(name: str, layers: int, head: bool) -> int:
    """Where a parameter lies: 0 embeddings, 1 to `layers` the layers, `layers` + 1 what comes after them, last norm and head.

    >>> [depth_of(n, 4, head=n.startswith("score")) for n in ("model.embed_tokens.weight", "model.layers.2.mlp.w", "model.norm.weight")]
    [0, 3, 5]
    """
    found = _LAYER.search(name)
    if found:
        return int(found[1]) + 1
    return 0 if not head and _EMBEDDING.search(name) else layers + 1


def parameter_groups(model: nn.Module, head: str, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    """Groups for an optimizer: weight decay on matrices only, and with each group the `scale` of its learning rate.

    `layer_decay` multiplies the learning rate once per layer below the head (Howard & Ruder 2018, arXiv 1801.06146, section 3.2).
    `head` is the prefix of the head's parameters.
    """
    layers = layers_of(model)
    groups: dict[tuple[float, float, bool], list[nn.Parameter]] = {}  # what is spread over workers is not mixed with what is not
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            below = layers + 1 - depth_of(name, layers, head=name.startswith(head))
            decay = weight_decay if parameter.ndim >= 2 else 0.0
            groups.setdefault((layer_decay**below, decay, is_sharded(parameter)), []).append(parameter)
    ordered = sorted(groups.items(), key=lambda g: (-g[0][0], -g[0][1], g[0][2]))
    return [{"params": params, "weight_decay": decay, "scale": scale} for (scale, decay, _), params in ordered]


class Average:
    """The exponential moving average of trained weights: a steadier model than the last step's (Polyak & Juditsky 1992).

    The decay grows to its full value, min(decay, (1 + n) / (10 + n)) after n steps, so that the start is soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.live = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.mean = {name: p.detach().clone() for name, p in self.live.items()}
        self.model = model

    @torch.no_grad()
    def update(self, done: int) -> None:
        """Take in the weights after `done` steps."""
        keep = min(self.decay, (1 + done) / (10 + done))
        for name, mean in self.mean.items():
            mean.lerp_(self.live[name].detach().to(mean), 1 - keep)

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from an average that was kept."""
        for name, mean in self.mean.items():
            mean.copy_(tensors[name])

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model is the average inside, and itself again after."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self.live.items():
            own = parameter.detach().clone()
            parameter.copy_(self.mean[name])
            self.mean[name].copy_(own)
        reshard(self.model)
