"""Open a compiled network and run it: one small interface over ONNX Runtime and TensorRT.

The file's suffix chooses the runtime. ``.onnx`` opens in ONNX Runtime: on CUDA where the installed
build has that provider and a device, else on the CPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from closeup.errors import ModelError

Array: TypeAlias = npt.NDArray[Any]

THREADS_VARIABLE = "CLOSEUP_THREADS"
DEVICE_VARIABLE = "CLOSEUP_DEVICE"
DEVICES = ("auto", "cpu", "cuda")
CUDA_PROVIDER = "CUDAExecutionProvider"

# ONNX Runtime's names of element types -> numpy.
_ONNX_DTYPES: dict[str, np.dtype[Any]] = {
    f"tensor({name})": np.dtype(dtype)
    for name, dtype in (
        ("float", np.float32),
        ("float16", np.float16),
        ("double", np.float64),
        ("int8", np.int8),
        ("int16", np.int16),
        ("int32", np.int32),
        ("int64", np.int64),
        ("uint8", np.uint8),
        ("uint16", np.uint16),
        ("uint32", np.uint32),
        ("uint64", np.uint64),
        ("bool", np.bool_),
    )
}


def count_threads() -> int:
    """Threads one engine call may use: ``CLOSEUP_THREADS``, else this process's cores.

    Raises:
        ModelError: ``CLOSEUP_THREADS`` is not a positive integer.
    """
    text = os.environ.get(THREADS_VARIABLE, "")
    if not text:
        return len(os.sched_getaffinity(0))
    if not text.isdecimal() or int(text) < 1:
        raise ModelError(
            f"{THREADS_VARIABLE} is {text!r}; expected a positive integer, the number of threads "
            "of one engine call."
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
    """

    threads: int = field(default_factory=count_threads)
    spinning: bool = False
    graph_optimization: str = "all"
    optimized_model_path: Path | None = None
    use_cuda: bool = field(default_factory=lambda: wanted_device() != "cpu")
    device_id: int = 0
    keep_memory: bool = True


class Engine(Protocol):
    """A network that is loaded and ready to run; ``run`` may be called from several threads."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What ``run`` must be fed, in the graph's order."""
        ...

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What ``run`` returns, in the graph's order."""
        ...

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
        path: a ``.onnx`` file (its external data beside it).
        options: None stands for ``EngineOptions()``.

    Raises:
        ModelError: no such file, a file that the runtime refuses, or a kind of engine that this
            version does not open.
    """
    path = Path(path)
    if not path.is_file():
        raise ModelError(f"There is no engine at {path}; run `python -m export` to write it.")
    if path.suffix == ".onnx":
        return OnnxEngine(path, options or EngineOptions())
    if path.suffix == ".plan":
        raise ModelError(f"{path.name} is a TensorRT plan, which this version cannot open.")
    raise ModelError(f"{path.name} is no engine; expected a name that ends in .onnx or .plan.")


def check_feeds(model: str, specs: Sequence[TensorSpec], feeds: Mapping[str, Array]) -> None:
    """Compare an engine's inputs with what it is fed.

    Args:
        model: the engine's name, for the message.
        specs: the engine's inputs.
        feeds: arrays by input name.

    Raises:
        ModelError: the first difference, as model, tensor, got and expected.
    """
    names = [spec.name for spec in specs]
    unknown = sorted(set(feeds) - set(names))
    if unknown:
        raise ModelError(f"{model}: got an unknown input {unknown[0]}; expected {names}.")
    for spec in specs:
        if spec.name not in feeds:
            raise ModelError(f"{model}: input {spec.name} is missing; expected {spec.describe()}.")
        got = feeds[spec.name]
        if got.dtype != spec.dtype or not _fits(got.shape, spec.shape):
            raise ModelError(
                f"{model}: input {spec.name} is {got.dtype} {got.shape}; "
                f"expected {spec.describe()}."
            )


def _fits(shape: tuple[int, ...], expected: tuple[int | str, ...]) -> bool:
    return len(shape) == len(expected) and all(
        isinstance(want, str) or got == want for got, want in zip(shape, expected, strict=True)
    )


class OnnxEngine:
    """An ONNX graph in ONNX Runtime (an :class:`Engine`).

    Attributes:
        provider: ONNX Runtime's name of where the graph runs, e.g. ``CUDAExecutionProvider``.
    """

    def __init__(self, path: Path, options: EngineOptions) -> None:
        self._name = _name_from_path(path)
        self._session: Any = _session_from_onnx(path, options)
        self.provider: str = self._session.get_providers()[0]
        self._run_options = _make_run_options(options, self._session.get_providers())
        self._inputs = tuple(_spec_from_node(self._name, n) for n in self._session.get_inputs())
        self._outputs = tuple(_spec_from_node(self._name, n) for n in self._session.get_outputs())
        self._output_names = [spec.name for spec in self._outputs]

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What ``run`` must be fed, in the graph's order."""
        return self._inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What ``run`` returns, in the graph's order."""
        return self._outputs

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run once; see :meth:`Engine.run`."""
        session = self._session
        if session is None:
            raise ModelError(f"{self._name}: the engine is closed.")
        check_feeds(self._name, self._inputs, feeds)
        try:
            values = session.run(self._output_names, dict(feeds), self._run_options)
        except Exception as error:  # ONNX Runtime's classes have no common base but this
            shapes = ", ".join(f"{name} {array.shape}" for name, array in feeds.items())
            raise ModelError(f"{self._name}: the run failed on {shapes}: {_tell(error)}") from error
        return dict(zip(self._output_names, values, strict=True))

    def close(self) -> None:
        """Free the session; see :meth:`Engine.close`."""
        self._session = None


def _name_from_path(path: Path) -> str:
    """``vae_decoder`` of ``vae_decoder/1/model.onnx``, else the file's own name."""
    version = path.parent
    return version.parent.name if version.name.isdecimal() and version.parent.name else path.stem


def _session_from_onnx(path: Path, options: EngineOptions) -> Any:
    """An InferenceSession of ``path``; imported here so that importing this module stays light."""
    import onnxruntime as ort

    ort.set_default_logger_severity(3)  # errors only: warnings name nodes, not what to do
    available = ort.get_available_providers()
    providers: list[str | tuple[str, dict[str, str]]] = ["CPUExecutionProvider"]
    if options.use_cuda and CUDA_PROVIDER in available:
        providers.insert(0, (CUDA_PROVIDER, _cuda_options(options)))
    try:
        session = ort.InferenceSession(
            str(path), sess_options=_make_session_options(options), providers=providers
        )
    except Exception as error:  # ONNX Runtime's classes have no common base but this
        text = _tell(error)
        if "external" in text.lower():
            raise ModelError(
                f"{path} keeps its weights in a file beside it that cannot be read: {text}"
            ) from error
        raise ModelError(f"ONNX Runtime cannot open {path}: {text}") from error
    _check_device(path, session.get_providers()[0], options)
    _trim_heap()
    return session


def _cuda_options(options: EngineOptions) -> dict[str, str]:
    return {
        "device_id": str(options.device_id),
        # The default tries every algorithm anew for each size of picture and batch.
        "cudnn_conv_algo_search": "HEURISTIC",
        # float32 graphs stay float32: the face detector and the VAE are exported so on purpose.
        "use_tf32": "0",
    }


def _check_device(path: Path, provider: str, options: EngineOptions) -> None:
    """Refuse the CPU where CUDA was demanded; ONNX Runtime falls back without a word."""
    if options.use_cuda and wanted_device() == "cuda" and provider != CUDA_PROVIDER:
        raise ModelError(
            f"{path} would run on {provider} though {DEVICE_VARIABLE} is 'cuda': install "
            f"onnxruntime-gpu and its CUDA libraries, or set {DEVICE_VARIABLE} to 'auto'."
        )


def _trim_heap() -> None:
    """Hand freed memory back to the system, with glibc; elsewhere nothing happens.

    While a session is made, weights lie in the file's buffer and in the layout that the kernels
    want. The former are freed, but stay with the process: without this an engine keeps twice the
    size of its weights.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _make_session_options(options: EngineOptions) -> Any:
    import onnxruntime as ort

    levels = {
        "disabled": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
        "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
        "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
        "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
    }
    if options.graph_optimization not in levels:
        raise ModelError(
            f"graph_optimization is {options.graph_optimization!r}; expected one of {list(levels)}."
        )
    session_options = ort.SessionOptions()
    session_options.log_severity_level = 3
    session_options.intra_op_num_threads = options.threads
    session_options.inter_op_num_threads = 1
    # Plans of one shape's memory; with shapes that vary they only enlarge the arena.
    session_options.enable_mem_pattern = False
    session_options.graph_optimization_level = levels[options.graph_optimization]
    spinning = "1" if options.spinning else "0"
    session_options.add_session_config_entry("session.intra_op.allow_spinning", spinning)
    session_options.add_session_config_entry("session.inter_op.allow_spinning", spinning)
    if options.optimized_model_path is not None:
        session_options.optimized_model_filepath = str(options.optimized_model_path)
    return session_options


def _make_run_options(options: EngineOptions, providers: Sequence[str]) -> Any:
    import onnxruntime as ort

    run_options = ort.RunOptions()
    run_options.log_severity_level = 3
    if not options.keep_memory:
        arenas = "cpu:0"
        if CUDA_PROVIDER in providers:  # naming an arena that is not there fails the run
            arenas += f";gpu:{options.device_id}"
        run_options.add_run_config_entry("memory.enable_memory_arena_shrinkage", arenas)
    return run_options


def _spec_from_node(model: str, node: Any) -> TensorSpec:
    dtype = _ONNX_DTYPES.get(node.type)
    if dtype is None:
        raise ModelError(
            f"{model}: tensor {node.name} is {node.type}; expected one of {list(_ONNX_DTYPES)}."
        )
    shape = tuple(axis if isinstance(axis, int) else (axis or "") for axis in node.shape)
    return TensorSpec(name=node.name, dtype=dtype, shape=shape)


def _tell(error: Exception) -> str:
    """The one line of an ONNX Runtime error that says something, cut to 400 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    text = text.split(" : ", 3)[-1] if text.startswith("[ONNXRuntimeError]") else text
    return text if len(text) <= 400 else text[:397] + "..."
