"""The judge: what a face looks like, and how like two faces are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file

from benchmarks.likeness.crops import CROP_PX
from benchmarks.likeness.network import EYES_MATCH, FACE, HEADS, JudgeNetwork, tensor_from_crops
from benchmarks.likeness.wording import ATTRIBUTES, YES, Values

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

WEIGHTS = Path(__file__).resolve().parent / "judge.safetensors"
#: From this probability on a crop counts as a face, with two eyes to be seen: set by the eye, on
#: pictures of the tune split (README.md). In what is none, no attribute is right and nobody's
#: likeness, whatever its colours would suggest.
FACE_FROM = 0.3
_BATCH = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """What the judge sees in one crop.

    Attributes:
        values: attribute -> its likeliest value.
        face: probability that it is a face, with two eyes to be seen.
        eyes_match: probability that its eyes are a pair.
        embedding: (64,) float32 of length one; the angle between two says how alike they are.
    """

    values: Values
    face: float
    eyes_match: float
    embedding: Floats

    @property
    def is_face(self) -> bool:
        """Whether the judge takes it for a face."""
        return self.face >= FACE_FROM

    def right(self, truth: Values) -> dict[str, bool]:
        """Return for every attribute of ``truth`` whether it is seen as it should be."""
        return {name: self.is_face and self.values[name] == truth[name] for name in truth}

    def cosine(self, reference: Floats) -> float:
        """Return the cosine to another embedding of length one; 0 where there is no face."""
        return float(self.embedding @ reference) if self.is_face else 0.0


class Judge:
    """The trained network.

    Args:
        weights: safetensors file.
    """

    def __init__(self, weights: Path = WEIGHTS) -> None:
        self._network = JudgeNetwork()
        state = load_file(weights)
        self._network.load_state_dict({name: value.float() for name, value in state.items()})
        self._network.eval()

    @torch.no_grad()
    def look(self, crops: Sequence[Pixels]) -> list[Reading]:
        """Judge crops.

        Args:
            crops: (128, 128, 3) uint8 each, as `benchmarks.likeness.crops.cut_face` cuts them.

        Raises:
            ValueError: a crop has another shape.
        """
        for crop in crops:
            if crop.shape != (CROP_PX, CROP_PX, 3):
                raise ValueError(
                    f"a crop has the shape {crop.shape}; expected ({CROP_PX}, {CROP_PX}, 3), "
                    "as cut_face makes them."
                )
        readings: list[Reading] = []
        for first in range(0, len(crops), _BATCH):
            logits, embeddings = self._network(
                tensor_from_crops(np.stack(crops[first : first + _BATCH]))
            )
            shares = {name: values.softmax(1).numpy() for name, values in logits.items()}
            readings += [
                _reading({name: values[row] for name, values in shares.items()}, embedding)
                for row, embedding in enumerate(embeddings.numpy())
            ]
        return readings


def _reading(shares: dict[str, Floats], embedding: Floats) -> Reading:
    yes = HEADS[FACE].index(YES)
    return Reading(
        values={name: HEADS[name][int(shares[name].argmax())] for name in ATTRIBUTES},
        face=float(shares[FACE][yes]),
        eyes_match=float(shares[EYES_MATCH][yes]),
        embedding=embedding,
    )


def mean_embedding(readings: Sequence[Reading]) -> Floats:
    """Return the direction in the middle of several embeddings, of length one."""
    total = np.sum([reading.embedding for reading in readings], axis=0)
    middle: Floats = (total / np.linalg.norm(total)).astype(np.float32)
    return middle
