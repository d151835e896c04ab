"""A segment of one sequence, and what the engine is fed for a step of several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """K steps of one sequence. Arrays are float32; shapes without a batch dimension.

    Attributes:
        sample: (C, h, w), in the sampler's space.
        memory: (2, C, h, w), the sampler's memory; slot 0 is the denoised estimate.
        context: (rows, L, D); rows is 1 (no guidance) or 2 (negative, prompt).
        guidance: scale s of ``negative + s * (prompt - negative)``; unused with one row.
        timestep: (K,) what the network is told.
        input_scale: (K,) factor of the network's input.
        step: (K, 3, 5) sampler matrices (see `closeup.samplers.StepTable`).
        noise: (K, C, h, w) or None for zeros.
        mask: (1 or K, 1, h, w) in [0, 1], 1 is repainted; None repaints everything.
        known: (C, h, w) what stays where the mask is 0; needed with a mask.
        known_noise: (C, h, w) the noise that brings `known` to a step's level.
        known_step: (K, 2) coefficients of known and known_noise after each step.
        lora_row: row of the LoRA bank, 0 for none.
        budget_s: the first step that ends this long after the segment was submitted is its last,
            though steps are left; None does them all.
        extras: the family's further inputs by network row: name -> (rows, ...).
        is_first: the sequence begins with it.
    """

    sample: Array
    memory: Array
    context: Array
    guidance: float
    timestep: Array
    input_scale: Array
    step: Array
    noise: Array | None = None
    mask: Array | None = None
    known: Array | None = None
    known_noise: Array | None = None
    known_step: Array | None = None
    lora_row: int = 0
    budget_s: float | None = None
    extras: Mapping[str, Array] = field(default_factory=dict)
    is_first: bool = True

    @property
    def group(self) -> tuple[object, ...]:
        """Segments with equal groups can share an engine call."""
        extras = sorted((name, array.shape[1:]) for name, array in self.extras.items())
        return self.sample.shape, self.context.shape[1:], tuple(extras)


class SequenceFeeds:
    """One sequence's share of the engine's inputs, step by step (state and LoRA bank apart).

    Everything that can be is made once a segment: between two engine calls nothing is left but to
    take slices, which matters where a step takes ten milliseconds.

    Args:
        segment: of the sequence.
    """

    def __init__(self, segment: Segment) -> None:
        self.rows = len(segment.context)
        nothing = np.zeros((1, *segment.sample.shape), np.float32)
        everywhere = np.ones((1, 1, *segment.sample.shape[1:]), np.float32)
        guidance = (segment.guidance, 1.0 - segment.guidance) if self.rows > 1 else (1.0, 0.0)
        # What does not change during the segment.
        self._fixed: dict[str, Array] = {
            "known": nothing if segment.known is None else _floats(segment.known[None]),
            "known_noise": nothing if segment.known_noise is None
            else _floats(segment.known_noise[None]),
            "context": _floats(segment.context),
            "guidance": np.array([guidance], np.float32),
            "lora_row": np.full(self.rows, segment.lora_row, np.int64),
            "rows": np.zeros(self.rows, np.int64),  # these two as if it were alone
            "pick": np.array([[self.rows - 1, 0]], np.int64),
            **{name: _floats(array) for name, array in segment.extras.items()},
        }  # fmt: skip
        # One entry a step, or a single one for all of them.
        self._by_step: dict[str, Array] = {
            "noise": nothing if segment.noise is None else _floats(segment.noise),
            "mask": everywhere if segment.mask is None else _floats(segment.mask),
            "input_scale": _floats(segment.input_scale),
            "step": _floats(segment.step),
            "known_step": np.zeros((1, 2), np.float32) if segment.known_step is None
            else _floats(segment.known_step),
        }  # fmt: skip
        self._timestep = _floats(np.repeat(segment.timestep[:, None], self.rows, axis=1))

    def at(self, step: int) -> dict[str, Array]:
        """Return the inputs for one step: (1, ...) by sequence, (rows, ...) by network row."""
        feeds = dict(self._fixed)
        for name, entries in self._by_step.items():
            index = min(step, len(entries) - 1)
            feeds[name] = entries[index : index + 1]
        feeds["timestep"] = self._timestep[step]
        return feeds


def join_feeds(
    sequences: Sequence[SequenceFeeds],
    *,
    samples: Sequence[Array],
    memories: Sequence[Array],
    steps: Sequence[int],
) -> dict[str, Array]:
    """Return the engine's inputs for one step of each sequence (the LoRA bank apart).

    Args:
        sequences: B sequences of one group.
        samples: their current latents, each (C, h, w) float32.
        memories: their current sampler memory, each (2, C, h, w) float32.
        steps: the row of its table that each takes now.

    Returns:
        Every input named in DESIGN's table, B sequences and R network rows.
    """
    parts = [sequence.at(step) for sequence, step in zip(sequences, steps, strict=True)]
    for part, sample, memory in zip(parts, samples, memories, strict=True):
        part["sample"], part["memory"] = sample[None], memory[None]
    if len(parts) == 1:  # the usual case of an idle server, and no copy
        return parts[0]
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    rows_of = [sequence.rows for sequence in sequences]
    first = np.cumsum([0, *rows_of[:-1]])
    joined["rows"] = np.repeat(np.arange(len(parts), dtype=np.int64), rows_of)
    joined["pick"] += first[:, None]
    return joined


def _floats(array: Array) -> Array:
    return np.ascontiguousarray(array, np.float32)
