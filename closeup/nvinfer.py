"""Which TensorRT library a process would load, and whether Python's package is of that version.

Triton's native backend and the package ``tensorrt`` open the same plans, and a plan runs on one
version only. The container's build reads the image's library here and installs the package of that
version; `closeup.preflight` compares both again at every start.

Imports nothing but the standard library: the build runs this file before anything is installed.
``python closeup/nvinfer.py`` prints the version.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

LIBRARIES = ("libnvinfer.so.11", "libnvinfer.so.10", "libnvinfer.so")
_PARTS = ("Major", "Minor", "Patch", "Build")


def library_version(names: tuple[str, ...] = LIBRARIES) -> str | None:
    """Return the whole version of TensorRT's library, e.g. ``11.1.0.106``.

    Args:
        names: tried in order, as the dynamic linker finds them.

    Returns:
        None where there is none, or one that does not tell its build number.
    """
    for name in names:
        try:
            library: Any = ctypes.CDLL(name)
        except OSError:
            continue
        try:
            return ".".join(str(getattr(library, f"getInferLib{part}Version")()) for part in _PARTS)
        except AttributeError:
            return None
    return None


def release_of(package: str) -> str:
    """Return a package's version without what tells its uploads apart, ``.post1``."""
    return package.split(".post")[0]


def version_problem(library: str | None, package: str) -> str:
    """Say why Triton's native backend and Python's package cannot open the same plans.

    Args:
        library: `library_version`.
        package: ``tensorrt.__version__``.

    Returns:
        A sentence; empty when both agree or there is no library to disagree with.
    """
    if library is None or library == release_of(package):
        return ""
    return (
        f"Triton loads TensorRT {library} and Python's package tensorrt is {package}, and a plan "
        "runs on one version only: build the image again, or install "
        f"tensorrt-cu13=={library}.* and tensorrt-cu13-bindings=={library}.* in quotes."
    )


def main() -> int:
    """Print the library's version; 1 with a sentence where there is none."""
    version = library_version()
    if version is None:
        sys.stderr.write(
            f"There is no TensorRT library here (tried {', '.join(LIBRARIES)}): expected NVIDIA's "
            "tritonserver image.\n"
        )
        return 1
    sys.stdout.write(f"{version}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
