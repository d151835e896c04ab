"""Which NVIDIA GPUs this machine has, asked of the driver itself: no CUDA toolkit, no torch."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

DRIVER = "libcuda.so.1"
# CUdevice_attribute in cuda.h.
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """A GPU.

    Attributes:
        index: in the driver's order, as CUDA_VISIBLE_DEVICES leaves it.
        name: as the driver spells it.
        capability: compute capability, e.g. (9, 0).
    """

    index: int
    name: str
    capability: tuple[int, int]

    @property
    def sm(self) -> str:
        """The architecture as compilers spell it, e.g. ``sm_90``."""
        return f"sm_{self.capability[0]}{self.capability[1]}"


def find_gpus() -> tuple[Gpu, ...]:
    """Return the GPUs that the driver lets this process use; none without a driver."""
    try:
        driver = ctypes.CDLL(DRIVER)
    except OSError:
        return ()
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return ()
    return tuple(_describe(driver, index) for index in range(count.value))


def _describe(driver: ctypes.CDLL, index: int) -> Gpu:
    device = ctypes.c_int()
    driver.cuDeviceGet(ctypes.byref(device), index)
    name = ctypes.create_string_buffer(256)
    driver.cuDeviceGetName(name, len(name), device)
    values = []
    for attribute in (_CAPABILITY_MAJOR, _CAPABILITY_MINOR):
        value = ctypes.c_int()
        driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        values.append(value.value)
    return Gpu(index=index, name=name.value.decode(), capability=(values[0], values[1]))
