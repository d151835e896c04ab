"""An engine's input buffers on the GPU, which remember what lies in them.

A denoising step's inputs are mostly those of the step before: the prompt's embedding, the mask,
the LoRA bank; and its latents are the output of the step before, which still lies on the GPU.
What `closeup.array_content` knows to be there already is not copied; what is known to lie in an
output is copied within the GPU. Any other array is copied at every call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from closeup.array_content import Array, Piece, Reference, find_pieces, is_same_array
from closeup.cuda_device import Buffer, Device


@dataclass(frozen=True, slots=True, eq=False)
class Produced:
    """An output that still lies on the device.

    Attributes:
        owner: the host array that the caller got of it, read-only.
        start: its address on the host.
        address: on the device.
        size_bytes: of both.
    """

    owner: Reference
    start: int
    address: int
    size_bytes: int

    def holds(self, piece: Piece) -> bool:
        """Whether the piece is a part of this output."""
        end = self.start + self.size_bytes - piece.size_bytes
        return is_same_array(self.owner, piece.owner) and self.start <= piece.start <= end


class InputSlot:
    """The device buffer of one input, which remembers its content.

    Args:
        device: where.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self.buffer = Buffer(device)
        self._pieces: list[Piece] = []

    def fill(self, array: Array, produced: Sequence[Produced] = ()) -> int:
        """Bring an input into the buffer.

        Args:
            array: C-contiguous.
            produced: outputs on the device, copied from there where the input is part of one.

        Returns:
            Bytes that came from the host.
        """
        pieces = find_pieces(array)
        old, self._pieces = self._pieces, []  # a copy that fails leaves nothing known
        if self.buffer.reserve(max(array.nbytes, 1)) or len(pieces) != len(old):
            old = []
        uploaded = 0
        flat = array.reshape(-1).view("u1")
        for index, piece in enumerate(pieces):
            if old and piece.same_as(old[index]):
                continue
            uploaded += self._bring(piece, flat, produced)
        self._pieces = pieces
        return uploaded

    def release(self) -> None:
        """Give the memory back."""
        self._pieces = []
        self.buffer.release()

    def _bring(self, piece: Piece, flat: Array, produced: Sequence[Produced]) -> int:
        target = self.buffer.address + piece.offset
        for output in produced:
            if output.holds(piece):
                source = output.address + piece.start - output.start
                self._device.copy(target, source, piece.size_bytes)
                return 0
        self._device.upload(target, flat[piece.offset : piece.offset + piece.size_bytes])
        return piece.size_bytes
