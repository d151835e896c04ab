"""LoRA as an input of the graph: every adapted layer gathers its factors from one bank.

A LoRA adds ``B(Ax)`` to a linear layer ``Wx + b``. The factors of all layers of one adapter lie
in one slice ``(M, r)`` of the bank ``(S, M, r)``; ``lora_row`` says which slice each network row
uses. A layer owns ``in + out`` consecutive rows of a slice: A transposed, then B. It gathers only
those, and only for the slices in use, so a call's cost grows with the network rows and the rank,
not with the number of resident adapters.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from closeup.manifest import LoraLayer


@dataclass(kw_only=True, slots=True)
class LoraBank:
    """The bank of the call being traced; the adapted layers share one instance.

    Attributes:
        rows: (S*M, r) network dtype, the bank with its first two dimensions joined; None outside
            a call, when the layers are plain.
        starts: (R, 1) int64, first bank row of each network row's adapter.
    """

    rows: Tensor | None = None
    starts: Tensor | None = None

    def open(self, lora: Tensor, lora_row: Tensor) -> None:
        """Set the bank ``lora`` (S, M, r) and ``lora_row`` (R,) int64 of a call."""
        self.rows = lora.flatten(0, 1)
        self.starts = (lora_row * lora.shape[1]).unsqueeze(1)

    def close(self) -> None:
        """Forget the call's tensors."""
        self.rows = self.starts = None

    def factors(self, places: Tensor, in_features: int) -> tuple[Tensor, Tensor]:
        """Return A transposed (R, in, r) and B (R, out, r) of the layer that owns ``places``.

        Args:
            places: (in + out,) int64, the layer's rows within an adapter's slice.
            in_features: how many of them belong to A.
        """
        if self.rows is None or self.starts is None:
            raise RuntimeError("the LoRA bank is used outside a call")
        both = F.embedding(self.starts + places, self.rows)
        return both[:, :in_features], both[:, in_features:]


class LoraLinear(nn.Module):
    """``y = Wx + b + B(Ax)`` for x (R, ..., in)."""

    places: Tensor

    def __init__(self, base: nn.Linear, bank: LoraBank, offset: int) -> None:
        super().__init__()
        self.base = base
        self.bank = bank
        self.in_features, self.out_features = base.in_features, base.out_features
        self.register_buffer("places", _places(offset, base.in_features + base.out_features))

    def forward(self, x: Tensor) -> Tensor:
        """Map x (R, in) or (R, n, in) to (R, out) or (R, n, out)."""
        y: Tensor = self.base(x)
        if self.bank.rows is None:
            return y
        a, b = self.bank.factors(self.places, self.in_features)
        if x.dim() == 2:
            return y + ((x.unsqueeze(1) @ a) @ b.transpose(1, 2)).squeeze(1)
        return y + (x @ a) @ b.transpose(1, 2)


class LoraPointwise(nn.Module):
    """A 1x1 convolution with ``B(Ax)`` added, for x (R, in, h, w)."""

    places: Tensor

    def __init__(self, base: nn.Conv2d, bank: LoraBank, offset: int) -> None:
        super().__init__()
        self.base = base
        self.bank = bank
        self.in_features, self.out_features = base.in_channels, base.out_channels
        self.register_buffer("places", _places(offset, base.in_channels + base.out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """Map x (R, in, h, w) to (R, out, h, w)."""
        y: Tensor = self.base(x)
        if self.bank.rows is None:
            return y
        a, b = self.bank.factors(self.places, self.in_features)
        return y + (b @ (a.transpose(1, 2) @ x.flatten(2))).reshape(y.shape)


def is_adaptable(module: nn.Module) -> bool:
    """Whether a LoRA can adapt ``module``: linear, or a plain 1x1 convolution."""
    if isinstance(module, nn.Conv2d):
        plain = module.groups == 1 and tuple(module.stride) == (1, 1)
        return plain and tuple(module.kernel_size) == (1, 1) and tuple(module.padding) == (0, 0)
    return isinstance(module, nn.Linear)


def adapt_layers(network: nn.Module, bank: LoraBank, *, under: str = "") -> tuple[LoraLayer, ...]:
    """Replace every adaptable layer of ``network`` in place by one that reads ``bank``.

    Args:
        network: whose layers.
        bank: what they read.
        under: beginning of the names of the layers to replace.

    Returns:
        The bank's layout, in order of the module names as they were before.
    """
    names = [
        name
        for name, module in network.named_modules()
        if is_adaptable(module) and name.startswith(under)
    ]
    layers: list[LoraLayer] = []
    offset = 0
    for name in names:
        parent_name, _, leaf = name.rpartition(".")
        parent = network.get_submodule(parent_name)
        base = network.get_submodule(name)
        adapted = _adapted(base, bank, offset)
        setattr(parent, leaf, adapted)
        layers.append(
            LoraLayer(name=name, in_features=adapted.in_features, out_features=adapted.out_features)
        )
        offset += adapted.in_features + adapted.out_features
    return tuple(layers)


def bank_rows(layers: tuple[LoraLayer, ...]) -> int:
    """M: the rows of one adapter in the bank."""
    return sum(layer.in_features + layer.out_features for layer in layers)


def _adapted(base: nn.Module, bank: LoraBank, offset: int) -> LoraLinear | LoraPointwise:
    if isinstance(base, nn.Conv2d):
        return LoraPointwise(base, bank, offset)
    if isinstance(base, nn.Linear):
        return LoraLinear(base, bank, offset)
    raise TypeError(f"a LoRA cannot adapt {type(base).__name__}")


def _places(offset: int, count: int) -> Tensor:
    return torch.arange(offset, offset + count, dtype=torch.int64)
