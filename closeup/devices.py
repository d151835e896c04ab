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
        name: as the driver spells it, e.g. ``NVIDIA H100 80GB HBM3``.
        sm: compute capability, e.g. ``9.0``.
        index: in the driver's order, as CUDA_VISIBLE_DEVICES leaves it.
    """

    name: str
    sm: str
    index: int = 0


def find_gpus() -> tuple[Gpu, ...]:
    """Return the GPUs that the driver lets this process use; none without a driver.

    A GPU of which the driver does not tell name and compute capability is left out.
    """
    driver = _open_driver()
    count = ctypes.c_int()
    if driver is None or driver.cuDeviceGetCount(ctypes.byref(count)):
        return ()
    found = (_describe(driver, index) for index in range(count.value))
    return tuple(gpu for gpu in found if gpu is not None)


def find_gpu(index: int = 0) -> Gpu | None:
    """Return the GPU with this index in the driver's order; None where there is none."""
    driver = _open_driver()
    return None if driver is None else _describe(driver, index)


def _open_driver() -> ctypes.CDLL | None:
    try:
        driver = ctypes.CDLL(DRIVER)
    except OSError:
        return None
    return None if driver.cuInit(0) else driver


def _describe(driver: ctypes.CDLL, index: int) -> Gpu | None:
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    name = ctypes.create_string_buffer(256)
    failed = (
        driver.cuDeviceGet(ctypes.byref(device), index)
        or driver.cuDeviceGetName(name, len(name), device)
        or driver.cuDeviceGetAttribute(ctypes.byref(major), _CAPABILITY_MAJOR, device)
        or driver.cuDeviceGetAttribute(ctypes.byref(minor), _CAPABILITY_MINOR, device)
    )
    if failed:
        return None
    name_text = name.value.decode(errors="replace")
    return Gpu(name=name_text, sm=f"{major.value}.{minor.value}", index=index)
