"""LoRA: few weights are trained beside a body that is frozen (Hu et al. 2021, arXiv 2106.09685), with a body in 4 bits if asked for (QLoRA,
arXiv 2305.14314). The head is never one of the frozen.

A mixture of experts keeps a matrix of every expert in one parameter; each expert gets two factors of its own beside it, which are added to
the parameter as its layer runs. Routers stay as they are.

What is saved is a whole model: the adapters are merged into the weights they stand beside, so that nothing needs peft to load it, and
no head is lost on the way. A body in 4 bits is unpacked first; its scores are those that were seen in training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rayward.errors import ModelError, SettingsError
from rayward.optimizers import head_parts, is_part

WIDE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # what an adapter can be added to


@dataclass(frozen=True)
class LoraSettings:
    """Which weights are trained instead of the body's own."""

    rank: int = 0  # of the two factors beside every adapted matrix, e.g. 16; 0: no LoRA, the body itself is trained
    alpha: float = 0.0  # the product of the factors is scaled by alpha / rank; 0: twice the rank
    dropout: float = 0.0  # of what goes into the factors, while training; not for experts
    targets: str = "all-linear"  # which matrices: names separated by commas, e.g. q_proj,v_proj,experts; all-linear: linear layers and
    # experts, but not the head, routers or embeddings
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
    """Put adapters into a model and freeze all else but the head (what `head` names, and what is new with it).

    Raises:
        ModelError: if a name in `targets` fits no matrix, or an adapter could not be merged at the end.
        SettingsError: if there is dropout, and experts are among the targets.
    """
    if not settings.rank:
        return
    from peft import LoraConfig, inject_adapter_in_model
    from transformers.pytorch_utils import Conv1D

    parts = head_parts(classifier, head)
    layers, experts = _chosen(classifier, parts, settings.targets)
    if experts and settings.dropout:
        raise SettingsError(
            f"lora.dropout={settings.dropout} drops what goes into an adapter, and one of experts ({experts[0]}) is added to their weights",
            f"leave lora.dropout out, or the experts: --set lora.targets={','.join(_last(layers)) or 'q_proj,v_proj'}",
        )
    holder = nn.Module()  # without a config: of mixtures that peft knows by it, it would adapt the routers and not the shared experts
    holder.add_module("model", classifier)
    holder.is_loaded_in_4bit = getattr(classifier, "is_loaded_in_4bit", False)  # type: ignore[assignment]
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha or 2 * settings.rank,
        lora_dropout=settings.dropout,
        target_modules=[f"model.{name}" for name in layers],
        target_parameters=[f"model.{name}" for name in experts] or None,
        fan_in_fan_out=any(isinstance(m, Conv1D) for m in classifier.modules()),  # GPT-2 keeps its matrices the other way round
    )
    try:
        inject_adapter_in_model(config, holder)
    except ValueError as error:
        raise ModelError(f"lora.targets={settings.targets}: {str(error)[:200]}", "name others, e.g. lora.targets=q_proj,v_proj") from None
    _check_merged(classifier)
    for name, parameter in classifier.named_parameters():
        if is_part(name, parts):
            parameter.requires_grad_(True)


def _chosen(classifier: nn.Module, parts: tuple[str, ...], targets: str) -> tuple[list[str], list[str]]:
    """Names of the linear layers, and of the experts' matrices, that get adapters: all but the head, or those that `targets` names."""
    layers, experts = ([name for name in names if not is_part(name, parts)] for names in matrices(classifier))
    if targets == "all-linear":
        return layers, experts
    ways = {**{name: (name,) for name in layers}, **{name: (name, name.rpartition(".")[0]) for name in experts}}  # to say it, at their ends
    fits = {t: {n for n, said in ways.items() if any(f".{w}".endswith(f".{t}") for w in said)} for t in map(str.strip, targets.split(","))}
    unknown = [target for target, found in fits.items() if not found]
    if unknown:
        raise ModelError(f"lora.targets={','.join(unknown)} fits nothing", f"it has {', '.join(_last([*layers, *experts]))}")
    chosen = set().union(*fits.values())
    return [name for name in layers if name in chosen], [name for name in experts if name in chosen]


def matrices(classifier: nn.Module) -> tuple[list[str], list[str]]:
    """Names of what adapters can stand beside: linear layers, and the parameters in which a mixture keeps a matrix of every expert.

    Routers, embeddings and convolutions are neither.
    """
    from transformers.pytorch_utils import Conv1D

    layers = [name for name, module in classifier.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
    experts = [
        f"{name}.{own}"
        for name, module in classifier.named_modules()
        if "Expert" in type(module).__name__
        for own, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3
    ]
    return layers, experts


def _last(names: list[str]) -> list[str]:
    """The last part of each name, once."""
    return sorted({name.rpartition(".")[2] for name in names})


def _check_merged(classifier: nn.Module) -> None:
    """ModelError where a matrix cannot take up its adapter, which is better said before anything is learned."""
    for name, adapter in _adapters(classifier):
        weight = _beside(adapter)
        if weight.dtype not in WIDE and not hasattr(weight, "quant_state"):
            raise ModelError(
                f"{name} is kept in {weight.dtype}, and an adapter cannot be merged into that",
                "take a model in bfloat16 or float32; lora.bits=4 makes a frozen body small",
            )


def _adapters(classifier: nn.Module) -> list[tuple[str, Any]]:
    """Every adapter with its name; of several around one module the outermost first."""
    from peft.tuners.lora import LoraLayer

    return [(name, module) for name, module in classifier.named_modules() if isinstance(module, LoraLayer)]


def _beside(adapter: Any) -> torch.Tensor:
    """The weight that an adapter is added to."""
    weight: torch.Tensor = getattr(adapter.get_base_layer(), getattr(adapter, "parameter_name", "weight"))
    return weight


@torch.no_grad()
def merge(classifier: nn.Module) -> None:
    """Add every adapter to the matrix it stands beside, and take it away; a matrix in 4 bits becomes one of float32."""
    adapters = _adapters(classifier)
    for name, adapter in adapters:
        if hasattr(_beside(adapter), "quant_state"):
            base: Any = _unpacked(adapter.get_base_layer())
            base.weight += adapter.get_delta_weight("default").to(base.weight)
        else:
            base, weight = adapter.get_base_layer(), _beside(adapter)
            weight += adapter.get_delta_weight("default").to(weight)
        if not name.endswith(".base_layer"):  # one around the same module goes with the module
            _put(classifier, name, base)
    for name, module in list(classifier.named_modules()):
        if hasattr(getattr(module, "weight", None), "quant_state"):  # a matrix that no adapter stands beside
            _put(classifier, name, _unpacked(module))
    if getattr(classifier, "is_quantized", False):
        classifier.is_quantized = False  # type: ignore[assignment]
        classifier.hf_quantizer = None  # type: ignore[assignment]
        del classifier.config.quantization_config  # type: ignore[union-attr]


def _put(classifier: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(classifier.get_submodule(parent), child, module)


def _unpacked(layer: Any) -> nn.Linear:
    from bitsandbytes.functional import dequantize_4bit

    weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device=weight.device)
    plain.weight.copy_(weight)
    if layer.bias is not None:
        plain.bias.copy_(layer.bias)
    return plain
