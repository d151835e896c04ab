"""What the embedded server needs on disk: the wheel's files, a backend folder, an environment.

The wheel nvidia-pytriton carries ``tritonserver`` with its Python backend. Its files are copied
into a folder per server, beside this project's own backends.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from closeup.errors import ServerError

OTHER_WAYS = (
    "serve the same model repository with NVIDIA's Triton container instead (see README, platforms)"
)
_PYTHONS = ((3, 11), (3, 12))
_GLIBC = (2, 35)
_IGNORED = shutil.ignore_patterns("__pycache__")
_INSTALL = "run: pip install 'closeup[embedded]'"


@dataclass(frozen=True, kw_only=True, slots=True)
class Installation:
    """Where the wheel's files lie.

    Attributes:
        binary: the ``tritonserver`` program.
        backend: the folder of the Python backend.
        stub: the program that hosts Python models, for this Python's version.
        libraries: the folder of the wheel's shared libraries.
        libpython: the shared libpython that the stub links to.
    """

    binary: Path
    backend: Path
    stub: Path
    libraries: Path
    libpython: Path


def check_platform(
    *,
    system: str | None = None,
    machine: str | None = None,
    glibc: str | None = None,
    python: tuple[int, int] | None = None,
    numpy: str | None = None,
) -> None:
    """Refuse where the embedded server cannot run; what is not given is read from this process.

    Raises:
        ServerError: one sentence that says what was found, what is needed and what to do.
    """
    found = f"{system or platform.system()} {machine or platform.machine()}"
    if found != "Linux x86_64":
        raise ServerError(f"The embedded server runs on Linux x86_64, not {found}; {OTHER_WAYS}.")
    glibc = platform.libc_ver()[1] if glibc is None else glibc
    parts = tuple(int(part) for part in glibc.split(".")[:2] if part.isdecimal())
    if parts < _GLIBC:
        raise ServerError(
            f"The embedded server needs glibc 2.35 or newer, not {glibc or 'another C library'}; "
            f"{OTHER_WAYS}."
        )
    python = python or sys.version_info[:2]
    if python not in _PYTHONS:
        raise ServerError(
            f"The embedded server needs Python 3.11 or 3.12, not {python[0]}.{python[1]}; "
            "make the environment with one of those."
        )
    version = numpy or metadata.version("numpy")
    if int(version.split(".")[0]) >= 2:
        raise ServerError(
            f"numpy {version} is installed, and with numpy 2 the embedded server's Python models "
            "crash; run: pip install 'numpy<2'"
        )


def find_installation() -> Installation:
    """Find the files of the wheel nvidia-pytriton.

    Raises:
        ServerError: the wheel is not installed or not complete, there is no shared libpython, or
            this Python cannot be found by the name ``python3``.
    """
    spec = importlib.util.find_spec("pytriton")
    if spec is None or not spec.submodule_search_locations:
        raise ServerError(f"The embedded server (wheel nvidia-pytriton) is missing; {_INSTALL}")
    package = Path(next(iter(spec.submodule_search_locations)))
    root = package / "tritonserver"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    installation = Installation(
        binary=root / "bin" / "tritonserver",
        backend=root / "backends" / "python",
        stub=root / "python_backend_stubs" / version / "triton_python_backend_stub",
        libraries=package.parent / "nvidia_pytriton.libs",
        libpython=_find_libpython(version),
    )
    # The stub finds its packages through the first python3 on PATH.
    python3 = Path(sys.executable).parent / "python3"
    if not python3.exists() or not python3.samefile(sys.executable):
        raise ServerError(
            f"There is no python3 beside {sys.executable}, by which the embedded server finds its "
            "packages; run from a virtual environment (python -m venv)."
        )
    for path in (installation.binary, installation.backend, installation.stub):
        if not path.exists():
            raise ServerError(f"The wheel nvidia-pytriton lacks {path.name}; {_INSTALL}")
    return installation


def _find_libpython(version: str) -> Path:
    """The shared libpython of this Python's version: its own, else the system's."""
    name = f"libpython{version}.so.1.0"
    for variable in ("LIBDIR", "LIBPL"):
        folder = sysconfig.get_config_var(variable)
        if folder and (Path(folder) / name).is_file():
            return Path(folder) / name
    # Tried in another process: a second libpython has no place in this one.
    probe = "import ctypes, sys; ctypes.CDLL(sys.argv[1])"
    command = [sys.executable, "-I", "-S", "-c", probe, name]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        raise ServerError(
            f"The embedded server needs {name}, which neither this Python nor the system has; "
            f"install it (Debian, Ubuntu: apt install libpython{version}) or use a Python built "
            "with --enable-shared."
        )
    return Path(name)


def lay_out_backends(
    installation: Installation, folder: Path, own_backends: Path | None = None
) -> Path:
    """Make the folder that ``--backend-directory`` names.

    Args:
        installation: the wheel's files.
        folder: an existing folder of this server alone.
        own_backends: the folder of Python-based backends; by default ``backends/`` beside the
            package ``closeup``.

    Returns:
        The backend folder, inside ``folder``.

    Raises:
        ServerError: ``own_backends`` is missing.
    """
    own = own_backends or Path(__file__).resolve().parents[1] / "backends"
    if not own.is_dir():
        raise ServerError(
            f"There is no folder of backends at {own}; run from a checkout (pip install -e .)."
        )
    backends = folder / "backends"
    # Copied, not linked: Triton refuses a library whose real path lies outside the folder.
    shutil.copytree(installation.backend, backends / "python", ignore=_IGNORED)
    shutil.copy(installation.stub, backends / "python")
    # The stubs ignore PYTHONPATH, but this folder is on their path.
    (backends / "python" / "closeup").symlink_to(Path(__file__).resolve().parent)
    for source in sorted(own.iterdir()):
        if (source / "model.py").is_file():
            shutil.copytree(source, backends / source.name, ignore=_IGNORED)
    libraries = folder / "lib"
    libraries.mkdir()
    if installation.libpython.is_absolute():
        (libraries / installation.libpython.name).symlink_to(installation.libpython)
    return backends


def make_environment(
    installation: Installation, folder: Path, base: Mapping[str, str], threads: int | None
) -> dict[str, str]:
    """The environment of the server's processes, such that they import what this one can.

    Args:
        installation: the wheel's files.
        folder: the server's own folder, as laid out.
        base: the environment to start from.
        threads: cap for the numeric libraries' own pools where ``base`` sets none.

    Returns:
        ``base`` with PATH, LD_LIBRARY_PATH and thread counts changed.
    """
    front = {
        "PATH": [os.path.dirname(sys.executable)],
        "LD_LIBRARY_PATH": [str(folder / "lib"), str(installation.libraries)],
    }
    environment = dict(base)
    environment.pop("PYTHONHOME", None)
    for name, entries in front.items():
        old = [entry for entry in base.get(name, "").split(os.pathsep) if entry]
        environment[name] = os.pathsep.join(dict.fromkeys(entries + old))
    environment.setdefault("PYTHONUNBUFFERED", "1")
    if threads is not None:
        for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
            environment.setdefault(name, str(threads))
    return environment
