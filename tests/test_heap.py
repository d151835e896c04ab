"""What the C library does with freed memory; each in a process of its own."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import numpy as np
from closeup.heap import keep_freed_memory

if sys.argv[1] == "kept":
    keep_freed_memory()

def use():
    for array in [np.empty(1 << 20, np.float32) for _ in range(4)]:
        array[:] = 1

use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def count_faults(how: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no mallopt")
def test_arrays_are_not_faulted_in_again_when_freed_memory_is_kept() -> None:
    # Five times 16 MB are 20,480 pages of 4 KiB; what remains is the interpreter's own.
    assert count_faults("kept") < 1000
    assert count_faults("default") > 10_000
