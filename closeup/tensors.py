"""A Triton tensor's declaration, the common source of code, config.pbtxt and tests."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class TritonTensor:
    """One input or output of a Triton model.

    Attributes:
        name: the tensor's name.
        data_type: as config.pbtxt spells it, e.g. ``TYPE_FP32``.
        dims: sides without the batch dimension; -1 where the size varies.
        optional: a request may leave it out (inputs only).
    """

    name: str
    data_type: str
    dims: tuple[int, ...]
    optional: bool = False
