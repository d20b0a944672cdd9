"""LoRA: few weights are trained beside a body that is frozen (Hu et al. 2021, arXiv 2106.09685), with a body in 4 bits if asked for (QLoRA,
arXiv 2305.14314). The head is never one of the frozen.

What is saved is a whole model: the adapters are merged into the weights they stand beside, so that nothing needs peft to load it, and
no head is lost on the way. A body in 4 bits is unpacked first; its scores are those that were seen in training.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rayward.errors import ModelError, SettingsError
from rayward.optimizers import head_parts, is_part


@dataclass(frozen=True)
class LoraSettings:
    """Which weights are trained instead of the body's own."""

    rank: int = 0  # of the two factors beside every adapted matrix, e.g. 16; 0: no LoRA, the body itself is trained
    alpha: float = 0.0  # the product of the factors is scaled by alpha / rank; 0: twice the rank
    dropout: float = 0.0  # of what goes into the factors, while training
    targets: str = "all-linear"  # which matrices: names separated by commas, e.g. q_proj,v_proj; all-linear: all but the head
    bits: int = 16  # 4: the frozen body in 4-bit NormalFloat, to fit a large one (QLoRA)

    def __post_init__(self) -> None:
        for name, fits, wanted in (
            ("rank", self.rank >= 0, "at least 0"),
            ("alpha", self.alpha >= 0, "at least 0"),
            ("dropout", 0 <= self.dropout < 1, "from 0 up and below 1"),
        ):
            if not fits:
                raise ValueError(f"{name}={getattr(self, name)} must be {wanted}")
        if not self.rank and (self.alpha, self.dropout, self.targets, self.bits) != (0.0, 0.0, "all-linear", 16):
            raise ValueError("alpha, dropout, targets and bits are about adapters, and rank=0 means none")
        if self.bits not in (4, 16):
            raise ValueError(f"bits={self.bits} must be 4 or 16")


def check(settings: LoraSettings) -> None:
    """SettingsError if what the adapters need is not installed."""
    needs = [name for name, used in (("peft", settings.rank > 0), ("bitsandbytes", settings.bits == 4)) if used]
    for name in needs:
        try:
            __import__(name)
        except ImportError as error:
            raise SettingsError(f"lora needs {name}: {error}", "install it: pip install 'rayward[lora]'") from None


def quantized(settings: LoraSettings) -> dict[str, Any]:
    """What `from_pretrained` is told to load a body in 4 bits; nothing for a body as it is."""
    if settings.bits == 16:
        return {}
    from transformers import BitsAndBytesConfig

    how = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["score", "classifier", "pooler", "head"],
    )
    return {"quantization_config": how}


def add(classifier: nn.Module, head: str, settings: LoraSettings) -> None:
    """Put adapters into a model and freeze all else but the head (what `head` names, and what is new with it)."""
    if not settings.rank:
        return
    from peft import LoraConfig, TaskType, inject_adapter_in_model
    from transformers.pytorch_utils import Conv1D

    parts = head_parts(classifier, head)
    targets: Any = settings.targets if settings.targets == "all-linear" else [t.strip() for t in settings.targets.split(",")]
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha or 2 * settings.rank,
        lora_dropout=settings.dropout,
        target_modules=targets,
        exclude_modules=rf"({'|'.join(map(re.escape, parts))})(\..*)?",
        fan_in_fan_out=any(isinstance(m, Conv1D) for m in classifier.modules()),  # GPT-2 keeps its matrices the other way round
        task_type=TaskType.SEQ_CLS,
    )
    try:
        inject_adapter_in_model(config, classifier)
    except ValueError as error:
        names = sorted({n.rpartition(".")[2] for n, m in classifier.named_modules() if isinstance(m, nn.Linear) and not is_part(n, parts)})
        raise ModelError(f"lora.targets={settings.targets} fits nothing: {str(error)[:200]}", f"it has {', '.join(names)}") from None
    for name, parameter in classifier.named_parameters():
        if is_part(name, parts):
            parameter.requires_grad_(True)


@torch.no_grad()
def merge(classifier: nn.Module) -> None:
    """Add every adapter to the matrix it stands beside, and take it away; a matrix in 4 bits becomes one of float32."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(classifier.named_modules()):
        if isinstance(module, LoraLayer):
            base: Any = module.get_base_layer()
            if hasattr(base.weight, "quant_state"):
                base = _unpacked(base)
            base.weight += module.get_delta_weight("default").to(base.weight)
            parent, _, child = name.rpartition(".")
            setattr(classifier.get_submodule(parent), child, base)
    for name, module in list(classifier.named_modules()):
        if hasattr(getattr(module, "weight", None), "quant_state"):  # a matrix that no adapter stands beside
            parent, _, child = name.rpartition(".")
            setattr(classifier.get_submodule(parent), child, _unpacked(module))
    if getattr(classifier, "is_quantized", False):
        classifier.is_quantized = False  # type: ignore[assignment]
        classifier.hf_quantizer = None  # type: ignore[assignment]
        del classifier.config.quantization_config  # type: ignore[union-attr]


def _unpacked(layer: Any) -> nn.Linear:
    from bitsandbytes.functional import dequantize_4bit

    weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device=weight.device)
    plain.weight.copy_(weight)
    if layer.bias is not None:
        plain.bias.copy_(layer.bias)
    return plain
