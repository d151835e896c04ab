"""The judge's network: a crop of a face to logits of every attribute and an embedding."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.likeness.wording import ATTRIBUTES, NO, YES

FACE, EYES_MATCH = "face", "eyes match"
HEADS: dict[str, tuple[str, ...]] = {**ATTRIBUTES, FACE: (NO, YES), EYES_MATCH: (NO, YES)}
"""Attributes, whether it is a face at all, and whether its two eyes are a pair."""
EMBEDDING = 64
_WIDTHS = (24, 32, 56, 80)
_FEATURES = 128


def _convolution(inputs: int, outputs: int, *, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


class JudgeNetwork(nn.Module):
    """Convolutions down to a grid of 8x8, which keeps left and right eye apart.

    `forward` takes (B, 3, 128, 128) float32 RGB in [-1, 1].
    """

    def __init__(self) -> None:
        super().__init__()
        first, second, third, fourth = _WIDTHS
        self.trunk = nn.Sequential(
            _convolution(3, first, stride=2),
            _convolution(first, second, stride=2),
            _convolution(second, second),
            _convolution(second, third, stride=2),
            _convolution(third, third),
            _convolution(third, fourth, stride=2),
            _convolution(fourth, fourth),
            _convolution(fourth, 16, kernel=1),
        )
        self.features = nn.Sequential(
            nn.Flatten(), nn.Dropout(0.1), nn.Linear(16 * 64, _FEATURES), nn.ReLU(inplace=True)
        )
        self.heads = nn.Linear(_FEATURES, sum(map(len, HEADS.values())))
        self.embedding = nn.Linear(_FEATURES, EMBEDDING)

    def forward(self, crops: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Return logits (B, values) by head, and embeddings (B, 64) of length one."""
        features = self.features(self.trunk(crops)).float()
        parts = self.heads(features).split([len(values) for values in HEADS.values()], 1)
        return dict(zip(HEADS, parts, strict=True)), F.normalize(self.embedding(features))


def tensor_from_crops(crops: npt.NDArray[np.uint8]) -> torch.Tensor:
    """Return (B, 3, S, S) float32 in [-1, 1] of crops (B, S, S, 3) uint8."""
    return torch.from_numpy(np.ascontiguousarray(crops)).permute(0, 3, 1, 2).float() / 127.5 - 1
