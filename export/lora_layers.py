"""LoRA as an input of the graph: adapted layers take their factors from one bank.

A LoRA adds ``B(Ax)`` to a linear layer ``Wx + b``. The factors of all layers of one adapter lie
in one slice ``(M, r)`` of the bank ``(S, M, r)``; ``lora_row`` says which slice each network row
uses. A layer owns ``in + out`` consecutive rows of a slice: A transposed, then B. Neighbouring
layers gather theirs together, and only for the slices in use, so a call's cost grows with the
network rows and the rank, not with the number of resident adapters.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from closeup.manifest import LoraLayer

# Layers that share one Gather and one Split. Engine builders generate code for every Gather of
# computed rows: a tiny SD 1.5 UNet took TensorRT-RTX 76 s of CPU time with one a layer, 23 s with
# one for 16 and 14 s with a single one, which would hold all factors of a call at once.
GROUP_LAYERS = 32
# Rows of an adapter that a group gathers at most: 8 MB a network row in float16 at rank 32.
GROUP_ROWS = 1 << 17


@dataclass(kw_only=True, slots=True)
class LoraBank:
    """The bank of the call being traced; the adapted layers share one instance.

    Attributes:
        rows: (S*M, r) network dtype, the bank with its first two dimensions joined; None outside
            a call, when the layers are plain.
        starts: (R, 1) int64, first bank row of each network row's adapter.
        gathered: factors that a layer's neighbour has gathered for it, by the layer's first row.
    """

    rows: Tensor | None = None
    starts: Tensor | None = None
    gathered: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def open(self, lora: Tensor, lora_row: Tensor) -> None:
        """Set the bank ``lora`` (S, M, r) and ``lora_row`` (R,) int64 of a call."""
        self.rows = lora.flatten(0, 1)
        self.starts = (lora_row * lora.shape[1]).unsqueeze(1)

    def close(self) -> None:
        """Forget the call's tensors."""
        self.rows = self.starts = None
        self.gathered.clear()


class LoraGroup(nn.Module):
    """Consecutive layers of the bank that gather together.

    Args:
        bank: what they read.
        layers: their part of the layout.
        offset: first row of the first of them within an adapter's slice.
    """

    places: Tensor

    def __init__(self, bank: LoraBank, layers: tuple[LoraLayer, ...], offset: int) -> None:
        super().__init__()
        self.bank = bank
        self.sizes = [size for one in layers for size in (one.in_features, one.out_features)]
        sums = [one.in_features + one.out_features for one in layers]
        self.offsets = [offset + sum(sums[:number]) for number in range(len(layers))]
        places = torch.arange(offset, offset + sum(sums), dtype=torch.int64)
        self.register_buffer("places", places)

    def factors(self, number: int) -> tuple[Tensor, Tensor]:
        """Return A transposed (R, in, r) and B (R, out, r) of the layer ``number`` of the group.

        The first layer asked for gathers for all; each takes its own, so nothing is held longer
        than it is needed.
        """
        bank = self.bank
        if bank.rows is None or bank.starts is None:
            raise RuntimeError("the LoRA bank is used outside a call")
        if self.offsets[number] not in bank.gathered:
            parts = F.embedding(bank.starts + self.places, bank.rows).split(self.sizes, dim=1)
            pairs = zip(parts[::2], parts[1::2], strict=True)
            bank.gathered.update(zip(self.offsets, pairs, strict=True))
        return bank.gathered.pop(self.offsets[number])


class LoraLinear(nn.Module):
    """``y = Wx + b + B(Ax)`` for x (R, ..., in)."""

    def __init__(self, base: nn.Linear, group: LoraGroup, number: int) -> None:
        super().__init__()
        self.base = base
        self.group = group
        self.number = number

    def forward(self, x: Tensor) -> Tensor:
        """Map x (R, in) or (R, n, in) to (R, out) or (R, n, out)."""
        y: Tensor = self.base(x)
        if self.group.bank.rows is None:
            return y
        a, b = self.group.factors(self.number)
        if x.dim() == 2:
            return y + ((x.unsqueeze(1) @ a) @ b.transpose(1, 2)).squeeze(1)
        return y + (x @ a) @ b.transpose(1, 2)


class LoraPointwise(nn.Module):
    """A 1x1 convolution with ``B(Ax)`` added, for x (R, in, h, w)."""

    def __init__(self, base: nn.Conv2d, group: LoraGroup, number: int) -> None:
        super().__init__()
        self.base = base
        self.group = group
        self.number = number

    def forward(self, x: Tensor) -> Tensor:
        """Map x (R, in, h, w) to (R, out, h, w)."""
        y: Tensor = self.base(x)
        if self.group.bank.rows is None:
            return y
        a, b = self.group.factors(self.number)
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
    layers = tuple(_layer(name, network.get_submodule(name)) for name in names)
    offset = 0
    for members in _grouped(layers):
        group = LoraGroup(bank, members, offset)
        for number, layer in enumerate(members):
            parent_name, _, leaf = layer.name.rpartition(".")
            base = network.get_submodule(layer.name)
            setattr(network.get_submodule(parent_name), leaf, _adapted(base, group, number))
        offset += bank_rows(members)
    return layers


def bank_rows(layers: tuple[LoraLayer, ...]) -> int:
    """M: the rows of one adapter in the bank."""
    return sum(layer.in_features + layer.out_features for layer in layers)


def _grouped(layers: tuple[LoraLayer, ...]) -> list[tuple[LoraLayer, ...]]:
    """Cut a layout into runs of at most `GROUP_LAYERS` layers and, but for one, `GROUP_ROWS`."""
    groups: list[tuple[LoraLayer, ...]] = []
    for layer in layers:
        joined = (*groups[-1], layer) if groups else (layer,)
        if groups and len(joined) <= GROUP_LAYERS and bank_rows(joined) <= GROUP_ROWS:
            groups[-1] = joined
        else:
            groups.append((layer,))
    return groups


def _layer(name: str, base: nn.Module) -> LoraLayer:
    if isinstance(base, nn.Conv2d):
        sizes = base.in_channels, base.out_channels
    elif isinstance(base, nn.Linear):
        sizes = base.in_features, base.out_features
    else:
        raise TypeError(f"a LoRA cannot adapt {type(base).__name__}")
    return LoraLayer(name=name, in_features=sizes[0], out_features=sizes[1])


def _adapted(base: nn.Module, group: LoraGroup, number: int) -> LoraLinear | LoraPointwise:
    if isinstance(base, nn.Conv2d):
        return LoraPointwise(base, group, number)
    assert isinstance(base, nn.Linear)
    return LoraLinear(base, group, number)
