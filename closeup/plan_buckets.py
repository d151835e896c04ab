"""A plan's execution contexts and CUDA graphs; see `closeup.plan_engine`. Not run on a GPU yet."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from closeup.cuda_device import Buffer, Device
from closeup.errors import ModelError
from closeup.rtx_contexts import RtxContexts, captures_by_itself
from closeup.tensorrt_package import Messages, explain

Shapes = tuple[tuple[int, ...], ...]

# Execution contexts that an engine keeps: cheap, their activation memory is the process's.
CONTEXTS = 16
# Calls after which a graph that none of them launched gives way to another.
IDLE_CALLS = 64


@dataclass(kw_only=True, slots=True)
class PlanParts:
    """What a plan needs of its surroundings; tests give their own.

    Attributes:
        trt: the module ``tensorrt`` or ``tensorrt_rtx``.
        device: the GPU.
        workspace: activation memory, shared by the process.
        messages: TensorRT's log.
        logger: writes into them; lives as long as the engine.
        kernels: file in which TensorRT-RTX keeps what it compiles; None: nowhere.
    """

    trt: Any
    device: Device
    workspace: Buffer
    messages: Messages
    logger: Any
    kernels: Path | None = None


@dataclass(kw_only=True, slots=True, eq=False)
class Bucket:
    """An execution context for one combination of input shapes.

    Attributes:
        context: TensorRT's, with its profile and input shapes set.
        output_shapes: by name.
        workspace_bytes: activation memory that it needs.
        addresses: of the buffers that it was given last, the workspace first.
        has_run: with those addresses, without a graph: TensorRT finishes there what a change of
            shapes or addresses left to do.
        can_capture: no capture with those addresses has failed.
        graph: of a run with those addresses, if there is one.
        last_call: number of the engine's call that used it last.
    """

    context: Any
    output_shapes: Mapping[str, tuple[int, ...]]
    workspace_bytes: int
    addresses: tuple[int, ...] = ()
    has_run: bool = False
    can_capture: bool = True
    graph: int | None = None
    last_call: int = 0


class PlanBuckets:
    """A plan's execution contexts, one for each combination of input shapes, and their graphs.

    `CONTEXTS` contexts are kept, or as many as graphs where those are more; the least recently used
    goes first. Where every graph that may be kept is in use, other shapes run without one.
    TensorRT-RTX captures by itself (`closeup.rtx_contexts`), nothing is captured here then.

    Args:
        engine: TensorRT's.
        parts: its surroundings.
        graphs: CUDA graphs kept; 0: none are made.
    """

    def __init__(self, engine: Any, parts: PlanParts, graphs: int) -> None:
        self._engine = engine
        self._parts = parts
        self._rtx: RtxContexts | None = None
        if captures_by_itself(parts.trt):
            self._rtx = RtxContexts(engine, parts.trt, has_graphs=graphs > 0, cache=parts.kernels)
            graphs = 0
        self._graphs = graphs
        self._calls = 0
        self._buckets: OrderedDict[tuple[int, Shapes], Bucket] = OrderedDict()
        self.made = 0

    def __len__(self) -> int:
        """Contexts that are kept."""
        return len(self._buckets)

    def workspace_bytes(self, profiles: int) -> int:
        """Activation memory of the hungriest of the plan's profiles, at its largest shapes."""
        return max(_workspace_bytes(self._engine, profile) for profile in range(profiles))

    def reserve(self, size_bytes: int) -> None:
        """Make the process's workspace as large as that, once nothing runs in it.

        Raises:
            ModelError: the GPU has not enough free memory; the workspace is empty then.
        """
        workspace = self._parts.workspace
        if workspace.size_bytes < size_bytes:
            self._parts.device.synchronize()
            workspace.reserve(size_bytes)

    def get(self, profile: int, shapes: Mapping[str, tuple[int, ...]]) -> Bucket:
        """Return the context for these shapes, made when it is not there.

        Args:
            profile: index of the optimization profile.
            shapes: of every input.

        Raises:
            ModelError: TensorRT refuses.
        """
        key = profile, tuple(shapes.values())
        bucket = self._buckets.get(key)
        if bucket is None:
            while len(self._buckets) >= max(self._graphs, CONTEXTS):
                self._forget(next(iter(self._buckets)))
            bucket = self._buckets[key] = self._make(profile, shapes)
            self.made += 1
        self._buckets.move_to_end(key)
        return bucket

    def execute(self, bucket: Bucket, buffers: Mapping[str, int]) -> bool:
        """Queue one run, by a graph where there is one.

        The first run with given addresses goes without, the second is captured.

        Args:
            bucket: of `get`.
            buffers: device addresses of all inputs and outputs.

        Returns:
            Whether a graph was launched.

        Raises:
            ModelError: TensorRT refuses.
        """
        self._place(bucket, buffers)
        self._calls += 1
        bucket.last_call = self._calls
        if bucket.graph is None and bucket.has_run and bucket.can_capture and self._has_room():
            self._capture(bucket)
        if bucket.graph is not None:
            self._parts.device.launch(bucket.graph)
            return True
        if not self._enqueue(bucket):
            raise ModelError(f"a run in TensorRT failed: {self._reason()}.")
        bucket.has_run = True
        return False

    def close(self) -> None:
        """Destroy every graph and context."""
        for key in list(self._buckets):
            self._forget(key)
        if self._rtx is not None:
            self._rtx.save()
        self._engine = self._rtx = None

    def _enqueue(self, bucket: Bucket) -> bool:
        return bool(bucket.context.execute_async_v3(self._parts.device.stream))

    def _has_room(self) -> bool:
        """Whether one more graph may be kept; one that is no longer in use goes for it."""
        holders = [bucket for bucket in self._buckets.values() if bucket.graph is not None]
        if len(holders) < self._graphs:
            return True
        oldest = min(holders, key=lambda bucket: bucket.last_call, default=None)
        if oldest is None or self._calls - oldest.last_call <= IDLE_CALLS:
            return False
        self._drop_graph(oldest)
        return True

    def _capture(self, bucket: Bucket) -> None:
        bucket.can_capture = False  # should TensorRT raise, this is not tried again
        bucket.graph = self._parts.device.capture(lambda: self._enqueue(bucket))
        bucket.can_capture = bucket.graph is not None
        if bucket.graph is None:  # what TensorRT said of it is no reason of a later failure
            self._parts.messages.errors.clear()

    def _make(self, profile: int, shapes: Mapping[str, tuple[int, ...]]) -> Bucket:
        context = self._make_context()
        stream = self._parts.device.stream
        if context is None or not context.set_optimization_profile_async(profile, stream):
            raise ModelError(f"TensorRT gives no execution context: {self._reason()}.")
        for name, shape in shapes.items():
            if not context.set_input_shape(name, shape):
                raise ModelError(f"TensorRT refuses {name} {shape}: {self._reason()}.")
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        outputs = {
            name: tuple(int(side) for side in context.get_tensor_shape(name))
            for name in names
            if name not in shapes
        }
        if any(side < 0 for shape in outputs.values() for side in shape):
            raise ModelError(f"the plan's outputs {outputs} depend on values; expected shapes.")
        need = _workspace_bytes(self._engine, profile)
        return Bucket(context=context, output_shapes=outputs, workspace_bytes=need)

    def _make_context(self) -> Any:
        if self._rtx is not None:
            return self._rtx.make()
        strategy = self._parts.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        return self._engine.create_execution_context(strategy)

    def _place(self, bucket: Bucket, buffers: Mapping[str, int]) -> None:
        """Give the context its buffers where they are others than at its last run."""
        workspace = self._parts.workspace
        self.reserve(bucket.workspace_bytes)  # there since the start, unless an engine found none
        addresses = (workspace.address, *buffers.values())
        if addresses == bucket.addresses:
            return
        self._drop_graph(bucket)
        bucket.has_run, bucket.can_capture = False, True
        bucket.addresses = ()
        if bucket.workspace_bytes:
            _give_workspace(bucket.context, workspace)
        for name, address in buffers.items():
            if not bucket.context.set_tensor_address(name, address):
                raise ModelError(f"TensorRT refuses the buffer of {name}: {self._reason()}.")
        bucket.addresses = addresses

    def _forget(self, key: tuple[int, Shapes]) -> None:
        self._parts.device.synchronize()
        bucket = self._buckets.pop(key)
        self._drop_graph(bucket)
        bucket.context = None

    def _drop_graph(self, bucket: Bucket) -> None:
        graph, bucket.graph = bucket.graph, None
        if graph is not None:
            self._parts.device.drop(graph)

    def _reason(self) -> str:
        reason = explain(self._parts.messages.errors)
        self._parts.messages.errors.clear()  # the next failure has its own
        return reason


def _workspace_bytes(engine: Any, profile: int) -> int:
    """Activation memory of a profile; TensorRT 10's first releases have the older name alone."""
    ask = getattr(engine, "get_device_memory_size_for_profile_v2", None)
    return int((ask or engine.get_device_memory_size_for_profile)(profile))


def _give_workspace(context: Any, workspace: Buffer) -> None:
    if hasattr(context, "set_device_memory"):
        context.set_device_memory(workspace.address, workspace.size_bytes)
    else:
        context.device_memory = workspace.address
