"""Safetensors files, read and validated without any framework; never pickle.

The whole file is read at once and tensors are views of it: a memory map would kill the process
when someone overwrites the file in place while it is read.

Source: the format's description in huggingface/safetensors, README.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

MAX_FILE_BYTES = 4 << 30
MAX_HEADER_BYTES = 100_000_000

# F8 and the quantised types are missing on purpose: no LoRA trainer writes them.
_FLOATS: Mapping[str, str] = {"F16": "<f2", "F32": "<f4", "F64": "<f8", "BF16": "<u2"}
_INTEGERS: Mapping[str, str] = {"I8": "i1", "U8": "u1", "I16": "<i2", "I32": "<i4", "I64": "<i8"}
_DTYPES: Mapping[str, str] = {**_FLOATS, **_INTEGERS}
_ITEM_BYTES: Mapping[str, int] = {
    **{name: np.dtype(kind).itemsize for name, kind in _DTYPES.items()},
    **{"BOOL": 1, "U16": 2, "U32": 4, "U64": 8, "C64": 8},
    **{"F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1},
}


class FileError(Exception):
    """What is wrong with a file, as the end of a sentence that starts with its name."""


class UnreadableError(FileError):
    """The file system gave no content."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StoredTensor:
    """One tensor of a file.

    Attributes:
        dtype: as the file names it, such as ``BF16``.
        shape: its sizes.
        data: its bytes, a view of the file's.
    """

    dtype: str
    shape: tuple[int, ...]
    data: memoryview

    def floats(self) -> npt.NDArray[np.float32]:
        """Return the values as float32; F64 beyond its range becomes infinite.

        Raises:
            FileError: the type is no number type of a LoRA.
        """
        if self.dtype not in _DTYPES:
            raise FileError(f"stores values as {self.dtype}; save it as F32, F16 or BF16.")
        raw = np.frombuffer(self.data, _DTYPES[self.dtype])
        if self.dtype == "BF16":  # the upper half of a float32
            values = (raw.astype(np.uint32) << np.uint32(16)).view(np.float32)
        else:
            with np.errstate(over="ignore"):
                values = raw.astype(np.float32)
        return values.reshape(self.shape)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StoredTensors:
    """A file's content.

    Attributes:
        tensors: by name, in the file's order.
        metadata: the header's free text entries.
    """

    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str]


def read_safetensors(path: Path) -> StoredTensors:
    """Read a safetensors file.

    Raises:
        UnreadableError: missing or unreadable.
        FileError: too large, truncated or damaged.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise UnreadableError(f"cannot be read ({error.strerror}).") from error
    if len(data) > MAX_FILE_BYTES:
        raise FileError(f"is larger than {MAX_FILE_BYTES >> 30} GiB, too large for a LoRA.")
    return _parse(memoryview(data))


def _parse(data: memoryview) -> StoredTensors:
    header, body = _split(data)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise FileError("is damaged: its __metadata__ is no table.")
    tensors = {name: _tensor(name, entry, body) for name, entry in header.items()}
    texts = {str(key): value for key, value in metadata.items() if isinstance(value, str)}
    return StoredTensors(tensors=tensors, metadata=texts)


def _split(data: memoryview) -> tuple[dict[str, Any], memoryview]:
    if len(data) < 8:
        raise FileError(f"is no safetensors file: it has {len(data)} bytes.")
    size = int.from_bytes(data[:8], "little")
    if size > MAX_HEADER_BYTES or bytes(data[8:9]) not in (b"{", b""):
        raise FileError(
            "is no safetensors file (its header is missing); other formats are not read, "
            "since they can run code."
        )
    if 8 + size > len(data):
        raise FileError(f"is truncated: its header of {size} bytes does not end within the file.")
    try:
        header = json.loads(bytes(data[8 : 8 + size]).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise FileError("is damaged: its header is no JSON.") from error
    if not isinstance(header, dict):
        raise FileError("is damaged: its header is no table.")
    return header, data[8 + size :]


def _tensor(name: str, entry: Any, body: memoryview) -> StoredTensor:
    try:
        dtype, shape = entry["dtype"], tuple(entry["shape"])
        begin, end = entry["data_offsets"]
        sizes = (*shape, begin, end)
        if not all(type(size) is int and size >= 0 for size in sizes):
            raise TypeError("sizes must be whole numbers")
        item_bytes = _ITEM_BYTES.get(dtype)
    except (KeyError, TypeError, ValueError) as error:
        raise FileError(f"is damaged: its header describes {name[:80]!r} wrongly.") from error
    if item_bytes is None:
        raise FileError(f"stores {name[:80]!r} as {str(dtype)[:20]}; save it as F32, F16 or BF16.")
    if end > len(body):
        raise FileError(f"is truncated: {name[:80]!r} ends {end - len(body)} bytes past its end.")
    if end - begin != math.prod(shape) * item_bytes:
        raise FileError(f"is damaged: the size of {name[:80]!r} does not fit its shape.")
    return StoredTensor(dtype=dtype, shape=shape, data=body[begin:end])
