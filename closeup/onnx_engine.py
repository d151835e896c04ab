"""ONNX graphs in ONNX Runtime: on CUDA where its build has that provider, else on the CPU."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from closeup.devices import find_gpu
from closeup.engines import (
    DEVICE_VARIABLE,
    Array,
    EngineOptions,
    TensorSpec,
    check_feeds,
    name_from_path,
    wanted_device,
)
from closeup.errors import ModelError
from closeup.heap import trim_heap

log = logging.getLogger(__name__)

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


class OnnxEngine:
    """An ONNX graph in ONNX Runtime (an :class:`Engine`).

    Attributes:
        provider: ONNX Runtime's name of where the graph runs, e.g. ``CUDAExecutionProvider``.
    """

    def __init__(self, path: Path, options: EngineOptions) -> None:
        self._name = name_from_path(path)
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


def _session_from_onnx(path: Path, options: EngineOptions) -> Any:
    """An InferenceSession of ``path``; imported here so that importing this module stays light."""
    import onnxruntime as ort

    ort.set_default_logger_severity(3)  # errors only: warnings name nodes, not what to do
    available = ort.get_available_providers()
    providers: list[str | tuple[str, dict[str, str]]] = ["CPUExecutionProvider"]
    if options.use_cuda and CUDA_PROVIDER in available:
        if hasattr(ort, "preload_dlls"):  # CUDA's libraries from pip are found after this alone
            ort.preload_dlls()
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
    trim_heap()
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
    """Tell of the CPU where CUDA was to be had; ONNX Runtime falls back without a word.

    Raises:
        ModelError: CUDA was demanded.
    """
    import onnxruntime as ort

    if not options.use_cuda or provider == CUDA_PROVIDER:
        return
    if wanted_device() == "cuda":
        raise ModelError(
            f"{path} would run on {provider} though {DEVICE_VARIABLE} is 'cuda': install "
            f"onnxruntime-gpu and its CUDA libraries, or set {DEVICE_VARIABLE} to 'auto'."
        )
    has_cuda = CUDA_PROVIDER in ort.get_available_providers()
    if has_cuda or find_gpu(options.device_id) is not None:
        reason = (
            "does not find a GPU or its CUDA and cuDNN libraries" if has_cuda else "has no CUDA"
        )
        log.warning(
            "%s runs on the CPU: this onnxruntime %s; install onnxruntime-gpu[cuda,cudnn], or set "
            "%s to 'cpu' where that is meant.", path, reason, DEVICE_VARIABLE,
        )  # fmt: skip


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
