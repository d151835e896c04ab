"""Open a compiled network and run it: one small interface over ONNX Runtime and TensorRT.

The file's suffix chooses the runtime. ``.onnx`` opens in ONNX Runtime (`closeup.onnx_engine`): on
CUDA where the installed build has that provider and a device, else on the CPU. ``.plan`` opens in
the TensorRT that built it (`closeup.plan_engine`). Neither is imported before it is needed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from closeup.errors import FeedError, ModelError

Array: TypeAlias = npt.NDArray[Any]

THREADS_VARIABLE = "CLOSEUP_THREADS"
DEVICE_VARIABLE = "CLOSEUP_DEVICE"
DEVICES = ("auto", "cpu", "cuda")
GRAPHS_VARIABLE = "CLOSEUP_CUDA_GRAPHS"
DEFAULT_CUDA_GRAPHS = 8


def count_threads() -> int:
    """Threads one engine call may use: ``CLOSEUP_THREADS``, else the cores this process may use.

    A container's share of the processor time counts as so many cores, rounded up.

    Raises:
        ModelError: ``CLOSEUP_THREADS`` is not a positive integer.
    """
    text = os.environ.get(THREADS_VARIABLE, "")
    if not text:
        cores = len(os.sched_getaffinity(0))
        return min(cores, quota_cores() or cores)
    if not text.isdecimal() or int(text) < 1:
        raise ModelError(
            f"{THREADS_VARIABLE} is {text!r}; expected a positive integer, the number of threads "
            "of one engine call."
        )
    return int(text)


def quota_cores(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Cores' worth of processor time that the control group allows, rounded up.

    Args:
        root: where control groups are mounted (version 2, else 1).

    Returns:
        At least 1; None where there is no limit.
    """
    try:
        if (root / "cpu.max").exists():
            quota, period = (root / "cpu.max").read_text(encoding="ascii").split()
        else:
            quota, period = (
                (root / "cpu" / f"cpu.cfs_{name}_us").read_text(encoding="ascii")
                for name in ("quota", "period")
            )
        return max(1, math.ceil(int(quota) / int(period))) if int(quota) > 0 else None
    except (OSError, ValueError):  # no control groups; or "max", no limit
        return None


def count_cuda_graphs() -> int:
    """Shapes whose CUDA graph an engine keeps: ``CLOSEUP_CUDA_GRAPHS``, else 8.

    Raises:
        ModelError: ``CLOSEUP_CUDA_GRAPHS`` is no integer from 0 on.
    """
    text = os.environ.get(GRAPHS_VARIABLE, "")
    if not text:
        return DEFAULT_CUDA_GRAPHS
    if not text.isdecimal():
        raise ModelError(
            f"{GRAPHS_VARIABLE} is {text!r}; expected an integer from 0 on, the number of input "
            "shapes for which a TensorRT engine keeps a CUDA graph."
        )
    return int(text)


def wanted_device() -> str:
    """Where ONNX graphs run: ``CLOSEUP_DEVICE``, else ``auto``, a GPU where there is one.

    Returns:
        ``auto``, ``cpu``, or ``cuda``: the CPU is then an error.

    Raises:
        ModelError: ``CLOSEUP_DEVICE`` is something else.
    """
    device = os.environ.get(DEVICE_VARIABLE) or "auto"
    if device not in DEVICES:
        raise ModelError(f"{DEVICE_VARIABLE} is {device!r}; expected one of {', '.join(DEVICES)}.")
    return device


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """One input or output of an engine.

    Attributes:
        name: the tensor's name in the graph.
        dtype: element type.
        shape: one entry an axis; an int is fixed, a string is the name of a dynamic axis (empty
            when the graph gives it none).
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str, ...]

    def describe(self) -> str:
        """The spec as text, e.g. ``float32 (B, 4, h, w)``."""
        axes = ", ".join(str(axis) or "?" for axis in self.shape)
        return f"{self.dtype} ({axes})"


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineOptions:
    """How an engine runs.

    Attributes:
        threads: threads of one call; by default :func:`count_threads`.
        spinning: keep idle threads busy-waiting for the next operator. A little faster for one
            engine alone on its cores, slower as soon as several processes share them.
        graph_optimization: ONNX Runtime's level: ``disabled``, ``basic``, ``extended`` or ``all``.
        optimized_model_path: where ONNX Runtime writes the graph it made; None writes nothing.
        use_cuda: take the CUDA provider where it is present; by default unless `wanted_device`
            is ``cpu``.
        device_id: which CUDA device.
        keep_memory: keep the memory of one call for the next. False hands it back after every
            call, a smaller process for engines that run seldom and need much: 12 convolutions at
            512x512 peaked at 298 MB instead of 486 and kept 43 instead of 294.
        cuda_graphs: of a plan: combinations of input shapes whose CUDA graph is kept; 0 uses no
            graphs. By default :func:`count_cuda_graphs`.
    """

    threads: int = field(default_factory=count_threads)
    spinning: bool = False
    graph_optimization: str = "all"
    optimized_model_path: Path | None = None
    use_cuda: bool = field(default_factory=lambda: wanted_device() != "cpu")
    device_id: int = 0
    keep_memory: bool = True
    cuda_graphs: int = field(default_factory=count_cuda_graphs)


class Described(Protocol):
    """A network whose tensors are known."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What it is fed, in the graph's order."""
        ...

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What it answers, in the graph's order."""
        ...


class Engine(Described, Protocol):
    """A network that is loaded and ready to run; ``run`` may be called from several threads."""

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run once.

        Args:
            feeds: every input by name, with the dtype and shape of its spec.

        Returns:
            Every output by name.

        Raises:
            ModelError: an input is missing, unknown or of another dtype or shape, or the run
                failed. The engine stays usable.
        """
        ...

    def close(self) -> None:
        """Free the engine's memory; ``run`` raises ModelError from then on."""
        ...


def open_engine(path: Path, *, options: EngineOptions | None = None) -> Engine:
    """Open the engine in ``path``.

    Args:
        path: a ``.onnx`` file (its external data beside it) or a ``.plan`` (its record beside it).
        options: None stands for ``EngineOptions()``.

    Raises:
        ModelError: no such file, a file that the runtime refuses, a missing runtime, a plan for
            another GPU or TensorRT, or no engine.
    """
    path = Path(path)
    if not path.is_file():
        raise ModelError(f"There is no engine at {path}; run `python -m export` to write it.")
    if path.suffix == ".onnx":
        from closeup.onnx_engine import OnnxEngine

        return OnnxEngine(path, options or EngineOptions())
    if path.suffix == ".plan":
        from closeup.plan_engine import PlanEngine

        return PlanEngine(path, options or EngineOptions())
    raise ModelError(f"{path.name} is no engine; expected a name that ends in .onnx or .plan.")


def check_feeds(model: str, specs: Sequence[TensorSpec], feeds: Mapping[str, Array]) -> None:
    """Compare an engine's inputs with what it is fed.

    Args:
        model: the engine's name, for the message.
        specs: the engine's inputs.
        feeds: arrays by input name.

    Raises:
        FeedError: the first difference, as model, tensor, got and expected.
    """
    names = [spec.name for spec in specs]
    unknown = sorted(set(feeds) - set(names))
    if unknown:
        raise FeedError(f"{model}: got an unknown input {unknown[0]}; expected {names}.")
    for spec in specs:
        if spec.name not in feeds:
            raise FeedError(f"{model}: input {spec.name} is missing; expected {spec.describe()}.")
        got = feeds[spec.name]
        if got.dtype != spec.dtype or not _fits(got.shape, spec.shape):
            raise FeedError(
                f"{model}: input {spec.name} is {got.dtype} {got.shape}; "
                f"expected {spec.describe()}."
            )


def _fits(shape: tuple[int, ...], expected: tuple[int | str, ...]) -> bool:
    return len(shape) == len(expected) and all(
        isinstance(want, str) or got == want for got, want in zip(shape, expected, strict=True)
    )


def name_from_path(path: Path) -> str:
    """``vae_decoder`` of ``vae_decoder/1/model.onnx``, else the file's own name."""
    version = path.parent
    return version.parent.name if version.name.isdecimal() and version.parent.name else path.stem
