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
#: Side of the middle of a crop that holds the face itself, px.
_MIDDLE_PX = 76


def _convolution(inputs: int, outputs: int, *, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


class JudgeNetwork(nn.Module):
    """One look at the whole square at half size, one at its middle at full size.

    Hair, skin and clothes are large; eyes, freckles and a mole are a few pixels in the middle. Both
    looks end in a grid rather than a mean, which keeps left and right eye apart.

    `forward` takes (B, 3, 128, 128) float32 RGB in [-1, 1].
    """

    def __init__(self) -> None:
        super().__init__()
        self.whole = nn.Sequential(
            nn.AvgPool2d(2),
            _convolution(3, 24, stride=2),
            _convolution(24, 40, stride=2),
            _convolution(40, 40),
            _convolution(40, 56, stride=2),
            _convolution(56, 12, kernel=1),
            nn.Flatten(),
            nn.Linear(12 * 8 * 8, 64),
            nn.ReLU(inplace=True),
        )
        self.middle = nn.Sequential(
            _convolution(3, 24),
            _convolution(24, 32, stride=2),
            _convolution(32, 32),
            _convolution(32, 48, stride=2),
            _convolution(48, 48),
            _convolution(48, 56, stride=2),
            _convolution(56, 16, kernel=1),
            nn.Flatten(),
            nn.Linear(16 * 10 * 10, 80),
            nn.ReLU(inplace=True),
        )
        self.heads = nn.Linear(144, sum(map(len, HEADS.values())))
        self.embedding = nn.Linear(144, EMBEDDING)

    def forward(self, crops: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Return logits (B, values) by head, and embeddings (B, 64) of length one."""
        edge = (crops.shape[-1] - _MIDDLE_PX) // 2
        middle = crops[:, :, edge : edge + _MIDDLE_PX, edge : edge + _MIDDLE_PX]
        features = torch.cat([self.whole(crops), self.middle(middle)], 1).float()
        parts = self.heads(features).split([len(values) for values in HEADS.values()], 1)
        return dict(zip(HEADS, parts, strict=True)), F.normalize(self.embedding(features))


def tensor_from_crops(crops: npt.NDArray[np.uint8]) -> torch.Tensor:
    """Return (B, 3, S, S) float32 in [-1, 1] of crops (B, S, S, 3) uint8."""
    return torch.from_numpy(np.ascontiguousarray(crops)).permute(0, 3, 1, 2).float() / 127.5 - 1
