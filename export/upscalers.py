"""Super-resolution networks in Real-ESRGAN's key layouts, read from safetensors.

Sizes (features, depth, scale) are inferred from the weights' shapes. Anything else is left to the
optional extra ``upscalers`` (spandrel). Pickled checkpoints (.pth, .pt, .ckpt) are refused: opening
one runs code from the file.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from closeup.errors import ExportError

_PREFIXES = ("params_ema.", "params.")


class SRVGGNetCompact(nn.Module):
    """A plain chain of 3x3 convolutions and PReLUs at low resolution, then a pixel shuffle.

    Source: Wang et al. 2021, "Real-ESRGAN", the compact network of the official repository.

    Args:
        features: channels of the hidden convolutions.
        convolutions: hidden convolutions between the first and the last.
        scale: output pixels per input pixel.
    """

    def __init__(self, *, features: int, convolutions: int, scale: int) -> None:
        super().__init__()
        self.scale = scale
        layers: list[nn.Module] = [nn.Conv2d(3, features, 3, padding=1), nn.PReLU(features)]
        for _ in range(convolutions):
            layers += [nn.Conv2d(features, features, 3, padding=1), nn.PReLU(features)]
        layers.append(nn.Conv2d(features, 3 * scale * scale, 3, padding=1))
        self.body = nn.ModuleList(layers)

    def forward(self, image: Tensor) -> Tensor:
        """Map (B, 3, H, W) in [0, 1] to (B, 3, sH, sW)."""
        x = image
        for layer in self.body:
            x = layer(x)
        shuffled = F.pixel_shuffle(x, self.scale)
        return shuffled + F.interpolate(image, scale_factor=float(self.scale), mode="nearest")


class _DenseBlock(nn.Module):
    """Five convolutions, each fed with the outputs of all before it."""

    def __init__(self, features: int, growth: int) -> None:
        super().__init__()
        for number in range(1, 6):
            outputs = growth if number < 5 else features
            inputs = features + (number - 1) * growth
            self.add_module(f"conv{number}", nn.Conv2d(inputs, outputs, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        known = [x]
        for number in range(1, 5):
            conv = self.get_submodule(f"conv{number}")
            known.append(F.leaky_relu(conv(torch.cat(known, 1)), 0.2))
        last: Tensor = self.get_submodule("conv5")(torch.cat(known, 1))
        return x + 0.2 * last


class _Rrdb(nn.Module):
    """Three dense blocks with a scaled residual around them."""

    def __init__(self, features: int, growth: int) -> None:
        super().__init__()
        self.rdb1 = _DenseBlock(features, growth)
        self.rdb2 = _DenseBlock(features, growth)
        self.rdb3 = _DenseBlock(features, growth)

    def forward(self, x: Tensor) -> Tensor:
        inner: Tensor = self.rdb3(self.rdb2(self.rdb1(x)))
        return x + 0.2 * inner


class RRDBNet(nn.Module):
    """ESRGAN's generator: residual-in-residual dense blocks and two nearest upsamplings.

    The network itself multiplies the side by 4; scale 2 folds 2x2 pixels into channels first.
    Source: Wang et al. 2018, "ESRGAN"; key names of the Real-ESRGAN repository.

    Args:
        features: channels of the trunk.
        growth: channels that each dense layer adds.
        blocks: number of residual blocks.
        scale: output pixels per input pixel, 2 or 4. Scale 2 needs even sides.
    """

    def __init__(self, *, features: int, growth: int, blocks: int, scale: int) -> None:
        super().__init__()
        self.scale = scale
        self.fold = 4 // scale
        self.conv_first = nn.Conv2d(3 * self.fold**2, features, 3, padding=1)
        self.body = nn.Sequential(*(_Rrdb(features, growth) for _ in range(blocks)))
        self.conv_body = nn.Conv2d(features, features, 3, padding=1)
        self.conv_up1 = nn.Conv2d(features, features, 3, padding=1)
        self.conv_up2 = nn.Conv2d(features, features, 3, padding=1)
        self.conv_hr = nn.Conv2d(features, features, 3, padding=1)
        self.conv_last = nn.Conv2d(features, 3, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        """Map (B, 3, H, W) in [0, 1] to (B, 3, sH, sW)."""
        first = self.conv_first(fold_pixels(image, self.fold))
        x = first + self.conv_body(self.body(first))
        for conv in (self.conv_up1, self.conv_up2):
            x = F.leaky_relu(conv(F.interpolate(x, scale_factor=2.0, mode="nearest")), 0.2)
        result: Tensor = self.conv_last(F.leaky_relu(self.conv_hr(x), 0.2))
        return result


def fold_pixels(image: Tensor, factor: int) -> Tensor:
    """Move blocks of factor x factor pixels into channels: (B, C, H, W) -> (B, C f f, H/f, W/f).

    The order is `torch.nn.functional.pixel_unshuffle`'s; written as reshape and transpose, which
    every engine builder reads.
    """
    if factor == 1:
        return image
    batch, channels, height, width = image.shape
    split = image.reshape(batch, channels, height // factor, factor, width // factor, factor)
    moved = split.permute(0, 1, 3, 5, 2, 4)
    return moved.reshape(batch, channels * factor**2, height // factor, width // factor)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedUpscaler:
    """A network ready for export, and how it is to be tiled.

    Attributes:
        network: (B, 3, H, W) float32 RGB in [0, 1] -> (B, 3, sH, sW).
        scale: s.
        tile_px: longest side of a tile.
        overlap_px: input pixels that neighbouring tiles share.
    """

    network: nn.Module
    scale: int
    tile_px: int
    overlap_px: int


def load_upscaler(path: Path) -> LoadedUpscaler:
    """Read a super-resolution network from ``path`` (safetensors).

    Raises:
        ExportError: not safetensors, damaged, or of an architecture that is not known here
            while the extra ``upscalers`` is missing.
    """
    if path.suffix.lower() != ".safetensors":
        raise ExportError(
            f"{path} is not a .safetensors file: pickled checkpoints can run code when opened, "
            "so convert it with its own project's tools first."
        )
    if not path.is_file():
        raise ExportError(f"there is no upscaler at {path}.")
    try:
        weights = strip_prefix(load_file(path))
    except (SafetensorError, OSError) as error:
        raise ExportError(f"{path} cannot be read as safetensors: {error}") from error
    try:
        network = network_from_weights(weights, path)
    except (KeyError, IndexError, ValueError) as error:
        raise ExportError(f"{path} has weights of other names or shapes: {error}.") from error
    if network is None:
        return _spandrel_upscaler(path)
    # The compact network works at low resolution throughout; RRDB's last layers hold all features
    # at full size, 64 x 4 bytes for each of 16 output pixels.
    is_compact = isinstance(network, SRVGGNetCompact)
    return LoadedUpscaler(
        network=network.eval(),
        scale=int(network.scale),
        tile_px=512 if is_compact else 256,
        overlap_px=32,
    )


def strip_prefix(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of the averaged network where the file nests two, else all of them."""
    for prefix in _PREFIXES:
        inner = {
            key[len(prefix) :]: value for key, value in weights.items() if key.startswith(prefix)
        }
        if inner:
            return inner
    return dict(weights)


def network_from_weights(
    weights: Mapping[str, Tensor], path: Path
) -> SRVGGNetCompact | RRDBNet | None:
    """Build the network that ``weights`` belong to; None when neither layout fits.

    Raises:
        ExportError: the layout is known but keys or shapes do not fit together.
    """
    if "conv_first.weight" in weights and "conv_last.weight" in weights:
        network: SRVGGNetCompact | RRDBNet = _rrdb_from_shapes(weights, path)
    elif "body.0.weight" in weights and "body.1.weight" in weights:
        network = _compact_from_shapes(weights, path)
    else:
        return None
    try:
        network.load_state_dict({key: value.float() for key, value in weights.items()})
    except RuntimeError as error:
        raise ExportError(
            f"{path} looks like {type(network).__name__} but its weights do not fit: {error}"
        ) from error
    return network


def _compact_from_shapes(weights: Mapping[str, Tensor], path: Path) -> SRVGGNetCompact:
    last = max(
        int(match[1]) for key in weights if (match := re.fullmatch(r"body\.(\d+)\.weight", key))
    )
    outputs = weights[f"body.{last}.weight"].shape[0]
    scale = round((outputs / 3) ** 0.5)
    if 3 * scale * scale != outputs or weights["body.0.weight"].shape[1] != 3:
        raise ExportError(
            f"{path}: the last layer has {outputs} channels; expected 3 x scale x scale of an "
            "RGB network."
        )
    features = weights["body.0.weight"].shape[0]
    return SRVGGNetCompact(features=features, convolutions=last // 2 - 1, scale=scale)


def _rrdb_from_shapes(weights: Mapping[str, Tensor], path: Path) -> RRDBNet:
    features, inputs = weights["conv_first.weight"].shape[:2]
    if inputs not in (3, 12):
        raise ExportError(
            f"{path}: the first layer reads {inputs} channels; expected 3 (scale 4) or 12 "
            "(scale 2)."
        )
    blocks = {
        int(match[1]) for key in weights if (match := re.match(r"body\.(\d+)\.rdb1\.conv1\.", key))
    }
    if not blocks:
        raise ExportError(f"{path}: an RRDBNet without body.N.rdb1.conv1 has no blocks.")
    growth = weights["body.0.rdb1.conv1.weight"].shape[0]
    return RRDBNet(
        features=features, growth=growth, blocks=max(blocks) + 1, scale=4 if inputs == 3 else 2
    )


def _spandrel_upscaler(path: Path) -> LoadedUpscaler:
    try:
        spandrel = importlib.import_module("spandrel")
    except (ImportError, RuntimeError, AttributeError) as error:
        raise ExportError(
            f"{path} is neither SRVGGNetCompact nor RRDBNet; for other networks install the "
            f"extra: pip install 'closeup[upscalers]' ({error})."
        ) from error
    try:
        model = spandrel.ModelLoader(device="cpu").load_from_file(path)
    except Exception as error:
        raise ExportError(f"spandrel cannot load {path}: {error}") from error
    if (model.input_channels, model.output_channels) != (3, 3) or model.scale not in (2, 4):
        raise ExportError(
            f"{path} maps {model.input_channels} to {model.output_channels} channels at scale "
            f"{model.scale}; expected RGB to RGB at scale 2 or 4."
        )
    network = model.model.float().eval()
    return LoadedUpscaler(network=network, scale=int(model.scale), tile_px=256, overlap_px=32)
