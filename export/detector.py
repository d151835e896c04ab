"""A face detector in YuNet's layout: raw BGR in, twelve tensors out, plain convolutions inside.

The structure is YuNet's (depthwise-separable units, a small top-down pyramid, one head a level), so
that the real YuNet and this network are interchangeable behind the same decoding.
Source: Wu, Peng & Yu 2023, "YuNet: A Tiny Millisecond-level Face Detector".
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from closeup.errors import ModelError

STRIDES = (8, 16, 32)
OUTPUT_NAMES = tuple(
    f"{kind}_{stride}" for kind in ("cls", "obj", "bbox", "kps") for stride in STRIDES
)
_CHANNELS = {"cls": 1, "obj": 1, "bbox": 4, "kps": 10}


@dataclass(frozen=True, kw_only=True, slots=True)
class DetectorSize:
    """Hyperparameters of a `FaceDetector`, kept in the weights file's metadata.

    Attributes:
        stem: channels after the first convolution.
        width: channels everywhere else.
    """

    stem: int = 16
    width: int = 64


class SeparableUnit(nn.Module):
    """A 1x1 convolution, a depthwise 3x3 one, then batch norm and ReLU unless ``plain``."""

    def __init__(self, inputs: int, outputs: int, plain: bool = False) -> None:
        super().__init__()
        self.pointwise = nn.Conv2d(inputs, outputs, 1)
        self.depthwise = nn.Conv2d(outputs, outputs, 3, padding=1, groups=outputs)
        self.norm = None if plain else nn.BatchNorm2d(outputs)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(B, inputs, h, w) to (B, outputs, h, w)."""
        mixed: torch.Tensor = self.depthwise(self.pointwise(features))
        return mixed if self.norm is None else F.relu(self.norm(mixed))


class FaceDetector(nn.Module):
    """Faces of about 10 to 300 px, with five landmarks each.

    Attributes:
        size: its hyperparameters.
    """

    def __init__(self, size: DetectorSize | None = None) -> None:
        super().__init__()
        self.size = size or DetectorSize()
        stem, width = self.size.stem, self.size.width
        self.stem = nn.Conv2d(3, stem, 3, stride=2, padding=1)
        self.stem_norm = nn.BatchNorm2d(stem)
        self.stem_unit = SeparableUnit(stem, stem)
        self.body = nn.Sequential(
            SeparableUnit(stem, width), SeparableUnit(width, width), SeparableUnit(width, width)
        )
        self.levels = nn.ModuleList(
            nn.Sequential(SeparableUnit(width, width), SeparableUnit(width, width)) for _ in STRIDES
        )
        self.laterals = nn.ModuleList(SeparableUnit(width, width) for _ in STRIDES)
        self.shared = nn.ModuleList(SeparableUnit(width, width) for _ in STRIDES)
        self.heads = nn.ModuleDict(
            {
                kind: nn.ModuleList(SeparableUnit(width, count, plain=True) for _ in STRIDES)
                for kind, count in _CHANNELS.items()
            }
        )

    def forward(self, input: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Find faces.

        Args:
            input: (B, 3, H, W) float32, raw 0-255, BGR; H and W multiples of 32.

        Returns:
            In the order of `OUTPUT_NAMES`, for each stride with n = H * W / stride**2 cells, row by
            row: cls and obj (B, n, 1) in 0 to 1, bbox (B, n, 4) as (dx, dy, log w, log h) and kps
            (B, n, 10), both in strides from the cell's upper left corner.
        """
        features = F.relu(self.stem_norm(self.stem(input)))
        features = F.max_pool2d(self.stem_unit(features), 2)
        features = self.body(features)
        pyramid: list[torch.Tensor] = []
        for level in self.levels:
            features = level(F.max_pool2d(features, 2))
            pyramid.append(features)
        merged = self._merge(pyramid)
        rows: list[torch.Tensor] = []
        for kind in _CHANNELS:
            for index, level_features in enumerate(merged):
                cells = self.get_submodule(f"heads.{kind}.{index}")(level_features)
                cells = cells.permute(0, 2, 3, 1).reshape(input.shape[0], -1, _CHANNELS[kind])
                rows.append(cells.sigmoid() if kind in ("cls", "obj") else cells)
        return tuple(rows)

    def start_objectness(self, share: float) -> None:
        """Let an untrained detector expect a face in this share of the cells."""
        for stride in range(len(STRIDES)):
            unit = self.get_submodule(f"heads.obj.{stride}.depthwise")
            assert isinstance(unit, nn.Conv2d)
            assert unit.bias is not None
            nn.init.constant_(unit.bias, math.log(share / (1 - share)))

    def _merge(self, pyramid: list[torch.Tensor]) -> list[torch.Tensor]:
        """Top-down: each level plus the coarser one, then the level's shared unit."""
        merged = [self.laterals[-1](pyramid[-1])]
        for index in (1, 0):
            coarse = F.interpolate(merged[0], scale_factor=2.0, mode="nearest")
            merged.insert(0, self.laterals[index](pyramid[index] + coarse))
        return [unit(level) for unit, level in zip(self.shared, merged, strict=True)]


def save_face_detector(model: FaceDetector, path: Path) -> None:
    """Write weights (float32) and hyperparameters to one safetensors file."""
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"architecture": "FaceDetector", "size": json.dumps(asdict(model.size))}
    save_file(state, path, metadata=metadata)


def load_face_detector(path: Path) -> FaceDetector:
    """A detector in evaluation mode from `save_face_detector`'s file.

    Raises:
        ModelError: no safetensors file, its metadata names no FaceDetector, or its tensors do not
            fit.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{path.name} is no safetensors file ({error}); pickled weights are not loaded, since "
            "opening them can run code."
        ) from error
    if metadata.get("architecture") != "FaceDetector":
        raise ModelError(
            f"{path.name} says architecture {metadata.get('architecture')!r}, expected "
            "'FaceDetector': give a file written by demo.train_detector."
        )
    try:
        model = FaceDetector(DetectorSize(**json.loads(metadata["size"])))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        given = metadata.get("size", "none")
        raise ModelError(
            f"{path.name} says size {given} in its metadata, expected JSON like "
            f"{json.dumps(asdict(DetectorSize()))}: give a file written by demo.train_detector."
        ) from error
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ModelError(f"{path.name} does not fit its own metadata: {error}") from error
    return model.eval()
