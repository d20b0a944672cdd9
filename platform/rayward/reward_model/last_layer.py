"""The last layer of a decoder, at the tokens that are read alone: scores equal those of a whole pass, and most of a layer is not computed.

Of a last layer only the keys and values are about tokens that nobody reads. What lies behind them (its queries, the projection of what
was attended to, its norms, its MLP or experts) says of one token something that only this token's hidden state will hold. A reward model
reads one token of an answer, or one of a step, so these parts run on the tokens that are read, and the others get zeros. That is most of
the work of one layer: a fifth of a small model of 4 layers, and 3 % of one of 28.

Which modules these are is found out by trying each of them on a probe, not by its name: `parts_of`.

Shape letters: B rows, T tokens, D width, N tokens that are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rayward.attention import Read
from rayward.batching import Batch, collate
from rayward.reward_model.bodies import body_of, close, inputs_of, probe
from rayward.sharding import layer_list

FEW = 128  # tokens that are read, up to which a mask over all tokens of a row is less work than attention over its segments


class LastLayer:
    """The last layer of a body, which runs on some tokens where `reading` says so."""

    def __init__(self, layer: nn.Module, parts: Sequence[str]):
        """`parts` are names of modules in the layer, of which none holds another."""
        self.layer, self.parts = layer, tuple(parts)
        self._read: Read | None = None
        self._rows = torch.Size()
        self._hooks: list[Any] = [layer.register_forward_pre_hook(self._tell_attention, with_kwargs=True)]
        for module in map(layer.get_submodule, self.parts):
            self._hooks += [module.register_forward_pre_hook(self._select), module.register_forward_hook(self._spread)]

    def remove(self) -> None:
        """Leave the layer as it was."""
        for hook in self._hooks:
            hook.remove()

    @contextmanager
    def reading(self, batch: Batch, prompts: bool = False) -> Iterator[None]:
        """Inside, the hidden states of the tokens that are read of this batch are right, and the others are not.

        `prompts`: those where prompts end are read too.

        The layer then keeps what its gradient needs, also where other layers compute it again: it is little, and is needed first.
        """
        if getattr(self.layer, "gradient_checkpointing", False):
            self.layer.gradient_checkpointing = False  # type: ignore[assignment]
        read_N = torch.cat([batch.read_N, batch.prompt_GK.flatten().clamp(min=0)]).unique() if prompts else batch.read_N
        self._read = Read(read_N, batch.row.mask_NT(read_N) if batch.row is not None and len(read_N) <= FEW else None)
        try:
            yield
        finally:
            self._read = None

    def _tell_attention(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        if self._read is None or self._read.sees_NT is None or "spans" not in kwargs:
            return None
        return args, {**kwargs, "read": self._read}

    def _select(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self._read is None:
            return None
        self._rows = args[0].shape[:2]
        return (args[0].flatten(0, 1).index_select(0, self._read.at_N).unsqueeze(0), *args[1:])

    def _spread(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if self._read is None:
            return None
        B, T = self._rows
        return output.new_zeros(B * T, *output.shape[2:]).index_copy(0, self._read.at_N, output.squeeze(0)).unflatten(0, (B, T))


def last_of(body: nn.Module) -> nn.Module | None:
    """The last layer of a body; None where it has no list of them."""
    layers = layer_list(body)
    return layers[-1] if layers is not None else None


@torch.no_grad()
def parts_of(classifier: Any, packed: bool) -> tuple[str, ...]:
    """The modules of the last layer that can run on the tokens that are read alone: those that, so run, change nothing there."""
    body = body_of(classifier)
    batch = collate([[probe(classifier.config)]], shared=packed).to(next(body.parameters()).device)
    layer, was = last_of(body), classifier.training
    if layer is None:
        return ()
    given: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    hook = layer.register_forward_pre_hook(lambda _, args, kwargs: given.append((args, kwargs)), with_kwargs=True)
    classifier.eval()
    try:
        body(**inputs_of(body, batch, packed=packed))
        hook.remove()
        if len(given) != 1:
            return ()
        args, kwargs = given[0]
        whole_ND = _read(layer(*args, **kwargs), batch)

        def fits(parts: Sequence[str]) -> bool:
            some = LastLayer(layer, parts)
            try:
                with some.reading(batch):
                    return close(_read(layer(*args, **kwargs), batch), whole_ND)
            except (RuntimeError, IndexError, TypeError, AttributeError, ValueError):  # it takes or gives something else
                return False
            finally:
                some.remove()

        found: list[str] = []
        for name, module in layer.named_modules():
            inside = any(name.startswith(f"{part}.") for part in found)
            if name and not inside and any(True for _ in module.parameters()) and fits([name]):
                found.append(name)
        return tuple(found) if found and fits(found) else ()
    finally:
        hook.remove()
        classifier.train(was)


def _read(said: Any, batch: Batch) -> Tensor:
    hidden_BTD = said if isinstance(said, Tensor) else said[0]
    return hidden_BTD.float().flatten(0, 1)[batch.read_N]
