"""TensorRT plans, of both flavours, as an `Engine`.

An execution context is kept for each combination of input shapes (`PlanBuckets`), the least
recently used goes first: TensorRT wants a context a CUDA graph, and a context whose shapes never
change needs no set-up at a call. The contexts have no activation memory of their own: all plans of
a process share one block, as large as the hungriest needs, and so run one at a time, on one
stream. Buffers of inputs and outputs belong to the engine, grow to the largest shape and stay.

Not run on a GPU yet: the logic is tested against a fake TensorRT (`tests/fake_tensorrt.py`).
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from closeup.cache_files import cache_folder
from closeup.cuda_device import Buffer, open_device, shared_workspace
from closeup.device_inputs import InputSlot, Produced
from closeup.devices import find_gpu
from closeup.engines import Array, EngineOptions, TensorSpec, check_feeds, name_from_path
from closeup.errors import FeedError, ModelError
from closeup.plan_buckets import PlanBuckets, PlanParts
from closeup.plans import PlanRecord, PlanTensor, RuntimeFacts, read_record, verify_plan
from closeup.tensorrt_package import Messages, explain, import_tensorrt, make_logger

# numpy's names of element types -> TensorRT's.
_DTYPES = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16", "int64": "INT64"}

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanDescription:
    """A plan's tensors as its record has them; opens nothing and needs no GPU.

    Attributes:
        inputs: in the graph's order.
        outputs: in the graph's order.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def describe_plan(record: PlanRecord) -> PlanDescription:
    """Return the tensors of a plan.

    Raises:
        ModelError: an element type that numpy has not.
    """
    return PlanDescription(
        inputs=tuple(_spec(tensor) for tensor in record.inputs),
        outputs=tuple(_spec(tensor) for tensor in record.outputs),
    )


@dataclass(slots=True)
class PlanCounters:
    """What an engine did since it was opened.

    Attributes:
        runs: calls.
        graph_launches: of those, by a CUDA graph.
        uploaded_bytes: of inputs that came from the host.
        contexts_made: execution contexts.
    """

    runs: int = 0
    graph_launches: int = 0
    uploaded_bytes: int = 0
    contexts_made: int = 0


def open_parts(path: Path, record: PlanRecord, options: EngineOptions) -> PlanParts:
    """Find TensorRT and the GPU for a plan, and refuse a plan that is not for them.

    Raises:
        ModelError: no package, no GPU, or `verify_plan` refuses; one sentence.
    """
    trt = import_tensorrt(record.flavour)
    gpu = find_gpu(options.device_id)
    if gpu is None:
        raise ModelError(
            f"{path} is a plan of {record.flavour.label} and there is no GPU {options.device_id} "
            "that this process may use: run it on a machine with an NVIDIA GPU and its driver, in "
            f"a container with --gpus all, or delete the plan to serve {path.stem}.onnx."
        )
    verify_plan(path, RuntimeFacts(flavour=record.flavour, version=trt.__version__, sm=gpu.sm))
    warn_of_other_gpu(path, record, gpu.name)
    device = open_device(options.device_id)
    messages = Messages()
    return PlanParts(
        trt=trt,
        device=device,
        workspace=shared_workspace(options.device_id),
        messages=messages,
        logger=make_logger(trt, messages),
        kernels=cache_folder() / f"kernels-{trt.__version__}-{record.plan_sha256[:16]}.cache",
    )


def warn_of_other_gpu(path: Path, record: PlanRecord, gpu: str) -> None:
    """Log where a plan was built on another GPU; one of its compute capability runs it."""
    if record.gpu and record.gpu != gpu:
        log.warning(
            "%s was built on %s and runs on %s: it may be slower or need more memory than there "
            "is; build it for this one with: %s", path, record.gpu, gpu, record.command,
        )  # fmt: skip


class PlanEngine:
    """A TensorRT plan (an :class:`closeup.engines.Engine`).

    Arrays that `run` returns are read-only: where one is fed back, whole or in part, it is copied
    within the GPU (see `closeup.device_inputs`).

    Args:
        path: ``<name>.plan``, its record beside it.
        options: ``device_id`` and ``cuda_graphs`` are used.
        parts: found by default.

    Raises:
        ModelError: one sentence that says what is missing or what to build again.
    """

    def __init__(
        self, path: Path, options: EngineOptions, *, parts: PlanParts | None = None
    ) -> None:
        self._name = name_from_path(path)
        self._record = read_record(path)
        self._parts = parts or open_parts(path, self._record, options)
        description = describe_plan(self._record)
        self._inputs, self._outputs = description.inputs, description.outputs
        self.provider = self._record.flavour.label
        self.counters = PlanCounters()
        self._device = self._parts.device
        with self._device.lock:
            self._device.enter()
            self._engine = _open_plan(path, self._parts)
        _check_tensors(path, self._record, self._engine, self._parts.trt)
        with self._device.lock:
            self._buckets = PlanBuckets(self._engine, self._parts, options.cuda_graphs)
            self._reserve_workspace(path)
        self._slots = {spec.name: InputSlot(self._device) for spec in self._inputs}
        self._results = {spec.name: Buffer(self._device) for spec in self._outputs}
        self._produced: list[Produced] = []
        self._closed = False

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What ``run`` must be fed, in the graph's order."""
        return self._inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What ``run`` returns, in the graph's order."""
        return self._outputs

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run once; see :meth:`closeup.engines.Engine.run`."""
        check_feeds(self._name, self._inputs, feeds)
        arrays = {spec.name: _contiguous(feeds[spec.name]) for spec in self._inputs}
        shapes = {name: array.shape for name, array in arrays.items()}
        profile = self._record.profile_for(shapes)
        if profile is None:
            raise FeedError(f"{self._name}: {_misfit(self._record, shapes)}")
        with self._device.lock:
            if self._closed:
                raise ModelError(f"{self._name}: the engine is closed.")
            self._device.enter()
            try:
                return self._run(arrays, profile, shapes)
            except BaseException:
                self._produced = []
                with contextlib.suppress(ModelError):  # copies of arrays that are about to be freed
                    self._device.synchronize()
                raise

    def close(self) -> None:
        """Free contexts, buffers and the engine; see :meth:`closeup.engines.Engine.close`."""
        with self._device.lock:
            if self._closed:
                return
            self._closed = True
            self._device.enter()
            self._device.synchronize()
            self._produced = []
            self._buckets.close()
            for slot in self._slots.values():
                slot.release()
            for buffer in self._results.values():
                buffer.release()
            self._engine = None

    def _reserve_workspace(self, path: Path) -> None:
        """Take the activation memory of the hungriest profile now, not under a request."""
        need = self._buckets.workspace_bytes(len(self._record.profiles))
        try:
            self._device.enter()
            self._buckets.reserve(need)
        except ModelError as error:
            raise ModelError(
                f"{path} needs {-(-need // 10**6)} MB of the GPU for the largest call that it "
                f"takes, beside what is there: {error} Lower --max-batch or --sizes and build it "
                f"again: {self._record.command}"
            ) from error

    def _run(
        self, arrays: Mapping[str, Array], profile: int, shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, Array]:
        bucket = self._buckets.get(profile, shapes)
        for name, array in arrays.items():
            self.counters.uploaded_bytes += self._slots[name].fill(array, self._produced)
        self._produced = []  # the buffers they lie in are written again from here on
        outputs = {
            spec.name: np.empty(bucket.output_shapes[spec.name], spec.dtype)
            for spec in self._outputs
        }
        for name, array in outputs.items():
            self._results[name].reserve(max(array.nbytes, 1))
        buffers = {name: slot.buffer.address for name, slot in self._slots.items()}
        buffers |= {name: buffer.address for name, buffer in self._results.items()}
        launched = self._buckets.execute(bucket, buffers)
        for name, array in outputs.items():
            self._device.download(array, self._results[name].address)
        self._device.synchronize()
        self.counters.runs += 1
        self.counters.graph_launches += launched
        self.counters.contexts_made = self._buckets.made
        self._produced = [self._keep(name, array) for name, array in outputs.items()]
        return outputs

    def _keep(self, name: str, array: Array) -> Produced:
        array.setflags(write=False)
        address = self._results[name].address
        return Produced(weakref.ref(array), array.ctypes.data, address, array.nbytes)


def _open_plan(path: Path, parts: PlanParts) -> Any:
    """Deserialise a plan; mapped, so that the process never holds a copy of the file."""
    runtime = parts.trt.Runtime(parts.logger)
    with path.open("rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        with memoryview(content) as view:
            engine = runtime.deserialize_cuda_engine(view)
        content.close()
    if engine is None:
        reason = explain(parts.messages.errors)
        raise ModelError(f"TensorRT cannot open {path}: {reason}.")
    return _Opened(runtime, engine)


def _check_tensors(path: Path, record: PlanRecord, engine: Any, trt: Any) -> None:
    """Hold a plan's tensors against its record: what differs would be read as other bytes.

    Raises:
        ModelError: a name, a direction or a type differs, or an input's values are shapes, which
            TensorRT reads on the host.
    """
    modes = trt.TensorIOMode
    expected = {tensor.name: (modes.INPUT, _DTYPES[tensor.dtype]) for tensor in record.inputs}
    expected |= {tensor.name: (modes.OUTPUT, _DTYPES[tensor.dtype]) for tensor in record.outputs}
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    found = {
        name: (engine.get_tensor_mode(name), engine.get_tensor_dtype(name).name) for name in names
    }
    wrong = sorted(
        name for name in {*found, *expected}
        if found.get(name) != expected.get(name) or engine.is_shape_inference_io(name)
    )  # fmt: skip
    if wrong:
        raise ModelError(
            f"{path}: the plan's tensor {wrong[0]} is not what its record says; build it again "
            f"with: {record.command}"
        )


@dataclass(slots=True)
class _Opened:
    """TensorRT's engine with the runtime that must outlive it."""

    runtime: Any
    engine: Any = field()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)


def _spec(tensor: PlanTensor) -> TensorSpec:
    return TensorSpec(name=tensor.name, dtype=_dtype(tensor), shape=tensor.axes)


def _dtype(tensor: PlanTensor) -> np.dtype[Any]:
    name: Any = tensor.dtype
    if name == "bfloat16":
        try:
            import ml_dtypes
        except ImportError as error:
            raise ModelError(
                f"tensor {tensor.name} is bfloat16, which numpy has not: install ml_dtypes."
            ) from error
        name = ml_dtypes.bfloat16
    try:
        return np.dtype(name)
    except TypeError as error:
        raise ModelError(
            f"tensor {tensor.name} is {tensor.dtype!r}; expected a numpy type or bfloat16."
        ) from error


def _contiguous(array: Array) -> Array:
    """The array itself where it is C-contiguous, so that its owner is still known."""
    return array if array.flags.c_contiguous else np.ascontiguousarray(array)


def _misfit(record: PlanRecord, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Say which input no profile takes, and what the nearest to general one takes."""
    first = record.profiles[0]
    for name, limits in first.shapes.items():
        if not any(profile.shapes[name].takes(shapes[name]) for profile in record.profiles):
            return (
                f"input {name} is {shapes[name]}, which the plan was not built for (its profile "
                f"{first.name} takes {limits.min} to {limits.max}); ask for another size or batch, "
                f"or build it with those: {record.command}"
            )
    names = ", ".join(profile.name for profile in record.profiles)
    return (
        f"no profile of the plan ({names}) takes the inputs together, {dict(shapes)}; ask for "
        f"another size or batch, or build it with those: {record.command}"
    )
