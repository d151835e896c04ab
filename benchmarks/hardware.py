"""What the figures were measured on, without anything that names the machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from pathlib import Path

PACKAGES = (
    "torch", "diffusers", "transformers", "onnxruntime", "numpy", "opencv-python-headless",
    "nvidia-pytriton",
)  # fmt: skip


def describe_machine() -> dict[str, str]:
    """Return processor, cores, memory, load, system and package versions."""
    facts = {
        "processor": processor_name(_read("/proc/cpuinfo")),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{memory_bytes(_read('/proc/meminfo')) / 2**30:.0f} GiB",
        "load at the start": f"{os.getloadavg()[0]:.1f}",
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
    }
    facts |= {package: package_version(package) for package in PACKAGES}
    return facts


def package_version(package: str) -> str:
    """Return an installed package's version, or ``not installed``."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def processor_name(cpuinfo: str) -> str:
    """Return the model's name out of /proc/cpuinfo's text."""
    match = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    return match[1].strip() if match else "unknown"


def memory_bytes(meminfo: str) -> int:
    """Return the total memory out of /proc/meminfo's text, 0 when it does not say."""
    match = re.search(r"^MemTotal:\s+(\d+) kB$", meminfo, re.MULTILINE)
    return int(match[1]) * 1024 if match else 0


def machine_kind(machine: dict[str, str]) -> str:
    """Return a name for files, e.g. ``amd-epyc-2-cores``."""
    words = re.sub(r"[^a-z0-9]+", "-", machine["processor"].lower()).strip("-")
    return f"{words}-{machine['cores']}-cores"


def _read(path: str) -> str:
    return Path(path).read_text(encoding="utf-8", errors="replace")
