"""What an array is known to hold without looking at it, so that nothing is copied to a GPU twice.

It is known in two cases:

- the array that owns the memory is read-only, so its content does not change while it lives;
- its owner said so: `declare_versions` gives each entry of the first axis a number that changes
  with the content (the LoRA bank).
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]
Reference: TypeAlias = "weakref.ref[Any]"


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """Consecutive bytes of an input, and what is in them; keeps no array alive.

    Attributes:
        offset: of the piece in the input, bytes.
        start: its address on the host.
        size_bytes: of the piece.
        owner: the array that owns its memory; None: nothing is known of its content.
        version: of the content.
    """

    offset: int
    start: int
    size_bytes: int
    owner: Reference | None
    version: int = 0

    def same_as(self, other: Piece) -> bool:
        """Whether both are known to hold the same bytes at the same offset."""
        return (
            is_same_array(self.owner, other.owner)
            and self.start == other.start
            and self.size_bytes == other.size_bytes
            and self.offset == other.offset
            and self.version == other.version
        )


# Owner's id -> (the owner, a version for each entry of its first axis).
_VERSIONS: dict[int, tuple[Reference, tuple[int, ...]]] = {}


def declare_versions(array: Array, versions: Sequence[int]) -> None:
    """Say which content each entry of an array's first axis has now.

    Called after every change, before anybody relies on it; entries whose number stays are taken
    to be unchanged.

    Args:
        array: C-contiguous, and owns its memory.
        versions: a number for each entry.

    Raises:
        ValueError: a view, or not a number for each entry.
    """
    flags = array.flags
    if not (flags.owndata and flags.c_contiguous) or len(versions) != len(array):
        raise ValueError("versions belong to the entries of an array that owns its memory")
    key = id(array)
    reference = weakref.ref(array, lambda _: _VERSIONS.pop(key, None))
    _VERSIONS[key] = reference, tuple(versions)


def find_pieces(array: Array) -> list[Piece]:
    """Divide a C-contiguous input into pieces of known or unknown content."""
    owner = _owner(array)
    start = array.ctypes.data
    known = _VERSIONS.get(id(owner))
    if known is not None and known[0]() is owner and array.nbytes == owner.nbytes:
        reference, versions = known
        size = array.nbytes // max(len(versions), 1)
        return [
            Piece(index * size, start + index * size, size, reference, version)
            for index, version in enumerate(versions)
        ]
    frozen = owner.flags.owndata and not owner.flags.writeable
    return [Piece(0, start, array.nbytes, weakref.ref(owner) if frozen else None)]


def _owner(array: Array) -> Array:
    """The array at the end of a chain of views."""
    while isinstance(array.base, type(array)):
        array = array.base
    return array


def is_same_array(one: Reference | None, other: Reference | None) -> bool:
    """Whether both refer to one array that is still alive."""
    if one is None or other is None:
        return False
    array = one()
    return array is not None and array is other()
