"""What the C library does with memory that was freed."""

from __future__ import annotations

import contextlib
import ctypes

# Parameters of mallopt, from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
# The largest block that glibc can keep, the most that a heap keeps unused, and how many heaps the
# threads share (glibc's own limit is eight for each core).
KEPT_BLOCK_BYTES = 32 << 20
KEPT_BYTES = 64 << 20
HEAPS = 2


def keep_freed_memory() -> None:
    """Keep freed memory for the next picture, with glibc; elsewhere nothing happens.

    By default arrays of megabytes go back to the system one by one, and each new one is faulted
    in again, page by page: the arrays of one detector input took 6.6 ms of its 8 (3040 faults).
    At most `KEPT_BYTES` stay unused in each of `HEAPS` heaps. To be called before threads start.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, KEPT_BLOCK_BYTES)
        mallopt(_M_ARENA_MAX, HEAPS)
        mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES)


def trim_heap() -> None:
    """Hand freed memory back to the system, with glibc; elsewhere nothing happens.

    While an ONNX Runtime session is made, weights lie in the file's buffer and in the layout that
    the kernels want. The former are freed, but stay with the process: without this an engine
    keeps twice the size of its weights.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
