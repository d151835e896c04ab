"""A GPU and a TensorRT that are not there: memory in a dict, a plan that computes with numpy.

The network is ``y = x * scale + bank[row]`` and ``twice = 2 * x``; addresses, profiles, the
workspace and graphs are checked as the real thing would need them.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from closeup.cuda_device import Buffer
from closeup.engines import Array, EngineOptions
from closeup.errors import ModelError
from closeup.plan_buckets import PlanParts
from closeup.plan_engine import PlanEngine
from closeup.plans import (
    Flavour,
    PlanRecord,
    PlanTensor,
    Profile,
    ShapeRange,
    hash_plan,
    record_json,
    record_path,
)
from closeup.tensorrt_package import Messages

WORKSPACE_BYTES = (4096, 65536)  # of the two profiles
CONTENT = b"a plan"


class FakeDevice:
    """`closeup.cuda_device.Device` in host memory, which counts what it is asked for.

    Attributes:
        uploads: bytes of each copy from the host.
        unfinished: copies that were queued since the last `synchronize`.
        copies: bytes of each copy within the device.
        blocks: address -> memory that is allocated.
        graphs: recorded and not dropped.
        profiles: of each run, in order.
        free_bytes: what can still be allocated.
        can_capture: False: TensorRT complains within a capture, which gives no graph.
        shape_tensor: name of an input whose values are shapes.
        can_run: False: TensorRT refuses to run.
        messages: TensorRT's log.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.stream = 77
        self.uploads: list[int] = []
        self.unfinished = 0
        self.copies: list[int] = []
        self.blocks: dict[int, bytearray] = {}
        self.graphs: dict[int, Callable[[], bool]] = {}
        self.launches = 0
        self.can_capture = True
        self.can_run = True
        self.shape_tensor = ""
        self.messages = Messages()
        self.profiles: list[int] = []
        self.free_bytes = 1 << 40
        self.recording: list[Callable[[], bool]] | None = None
        self._numbers = itertools.count(1)

    def enter(self) -> None:
        pass

    def allocate(self, size_bytes: int) -> int:
        if sum(map(len, self.blocks.values())) + size_bytes > self.free_bytes:
            raise ModelError("CUDA: cudaMalloc failed with error 2, out of memory.")
        address = next(self._numbers) << 32
        self.blocks[address] = bytearray(b"\xaa" * size_bytes)  # never zeros, as on a GPU
        return address

    def free(self, address: int) -> None:
        del self.blocks[address]

    def upload(self, address: int, array: Array) -> None:
        self.uploads.append(array.nbytes)
        self.unfinished += 1
        self.memory(address, array.nbytes)[:] = array.tobytes()

    def download(self, array: Array, address: int) -> None:
        array.reshape(-1).view("u1")[:] = np.frombuffer(self.memory(address, array.nbytes), "u1")

    def copy(self, target: int, source: int, size_bytes: int) -> None:
        self.copies.append(size_bytes)
        self.memory(target, size_bytes)[:] = bytes(self.memory(source, size_bytes))

    def synchronize(self) -> None:
        self.unfinished = 0

    def capture(self, enqueue: Callable[[], bool]) -> int | None:
        self.recording = []
        try:
            done = enqueue()
            work = self.recording[0]
        finally:
            self.recording = None
        if not (done and self.can_capture):
            return None
        graph = next(self._numbers)
        self.graphs[graph] = work
        return graph

    def launch(self, graph: int) -> None:
        self.launches += 1
        self.graphs[graph]()

    def drop(self, graph: int) -> None:
        del self.graphs[graph]

    def memory(self, address: int, size_bytes: int) -> memoryview:
        """A part of one allocated block; a KeyError or AssertionError where there is none."""
        block = self.blocks[address >> 32 << 32]
        offset = address & 0xFFFFFFFF
        assert offset + size_bytes <= len(block)
        return memoryview(block)[offset : offset + size_bytes]

    def array(self, address: int, shape: tuple[int, ...], dtype: str) -> Array:
        """A tensor in device memory."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return np.frombuffer(self.memory(address, size), dtype).reshape(shape)


class FakeContext:
    """An execution context."""

    def __init__(self, device: FakeDevice) -> None:
        self._device = device
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._workspace = (0, 0)
        self._profile = -1

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        assert stream == self._device.stream
        self._profile = profile
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert self._profile >= 0
        self._shapes[name] = shape
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self._shapes["x"] if name in ("y", "twice") else self._shapes[name]

    def set_device_memory(self, address: int, size: int) -> None:
        self._workspace = (address, size)

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == self._device.stream
        shapes, addresses = dict(self._shapes), dict(self._addresses)
        address, size = self._workspace

        def work() -> bool:
            self._device.memory(address, size)  # the workspace is still there
            assert size >= WORKSPACE_BYTES[self._profile]
            self._device.profiles.append(self._profile)
            tensors = {
                name: self._device.array(addresses[name], shapes[name], dtype)
                for name, dtype in (("x", "f4"), ("bank", "f4"), ("row", "i8"))
            }
            y = tensors["x"] + tensors["bank"][tensors["row"]]
            for name, value in (("y", y), ("twice", 2 * tensors["x"])):
                self._device.memory(addresses[name], value.nbytes)[:] = value.tobytes()
            return True

        if self._device.recording is not None:
            if not self._device.can_capture:
                self._device.messages.add("ERROR", "operation not permitted when capturing")
            self._device.recording.append(work)
            return True
        if not self._device.can_run:
            self._device.messages.add("ERROR", "a kernel is missing")
            return False
        return work()


class FakeEngine:
    """``ICudaEngine``."""

    num_io_tensors = 5

    def __init__(self, device: FakeDevice) -> None:
        self._device = device

    def get_tensor_mode(self, name: str) -> str:
        return "output" if name in ("y", "twice") else "input"

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name="INT64" if name == "row" else "FLOAT")

    def is_shape_inference_io(self, name: str) -> bool:
        return name == self._device.shape_tensor

    def get_tensor_name(self, index: int) -> str:
        return ("x", "bank", "row", "y", "twice")[index]

    def create_execution_context(self, strategy: str) -> FakeContext:
        assert strategy == "user managed"
        return FakeContext(self._device)

    def get_device_memory_size_for_profile_v2(self, profile: int) -> int:
        return WORKSPACE_BYTES[profile]


def fake_module(device: FakeDevice, messages: Messages) -> Any:
    """The module ``tensorrt``."""

    class Runtime:
        def __init__(self, logger: object) -> None:
            pass

        def deserialize_cuda_engine(self, content: memoryview) -> FakeEngine | None:
            if bytes(content) != CONTENT:
                messages.add("ERROR", "Serialization assertion magicTag failed")
                return None
            return FakeEngine(device)

    return SimpleNamespace(
        Runtime=Runtime,
        ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED="user managed"),
        TensorIOMode=SimpleNamespace(INPUT="input", OUTPUT="output"),
    )


def toy_record() -> PlanRecord:
    """A plan with a wide profile and a narrow one for two rows of three."""

    def profile(name: str, rows: tuple[int, int, int], sides: tuple[int, int, int]) -> Profile:
        ranges = zip(rows, sides, strict=True)
        low, best, high = ranges
        bank = tuple((4, side) for side in sides)
        shapes = {
            "x": ShapeRange(min=low, opt=best, max=high),
            "bank": ShapeRange(min=bank[0], opt=bank[1], max=bank[2]),
            "row": ShapeRange(min=rows[:1], opt=rows[1:2], max=rows[2:]),
        }
        return Profile(name=name, shapes=shapes)

    return PlanRecord(
        model="toy",
        onnx_sha256="",
        onnx_bytes=0,
        flavour=Flavour.TENSORRT,
        version="11.1.0.106",
        sms=("9.0",),
        gpu="a GPU",
        precision="fp32",
        inputs=(
            PlanTensor(name="x", dtype="float32", axes=("B", "w")),
            PlanTensor(name="bank", dtype="float32", axes=("S", "w")),
            PlanTensor(name="row", dtype="int64", axes=("B",)),
        ),
        outputs=(
            PlanTensor(name="y", dtype="float32", axes=("B", "w")),
            PlanTensor(name="twice", dtype="float32", axes=("B", "w")),
        ),
        profiles=(profile("any", (1, 2, 8), (1, 4, 64)), profile("2x3", (2, 2, 2), (3, 3, 3))),
        plan_sha256="",
        plan_bytes=len(CONTENT),
        build_s=1.0,
        command="python -m export --target tensorrt --name toy",
    )


def write_plan(folder: Path, content: bytes = CONTENT) -> Path:
    """Write the toy plan and its record; returns the plan."""
    import dataclasses

    path = folder / "toy" / "1" / "model.plan"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    record = dataclasses.replace(toy_record(), plan_sha256=hash_plan(path), plan_bytes=len(content))
    record_path(path).write_text(record_json(record), encoding="utf-8")
    return path


def plan_parts(device: FakeDevice, workspace: Buffer | None = None) -> PlanParts:
    """What a plan finds around it, on a fake device."""
    return PlanParts(
        trt=fake_module(device, device.messages),
        device=device,
        workspace=workspace or Buffer(device),
        messages=device.messages,
        logger=None,
    )


def open_toy(
    path: Path,
    device: FakeDevice,
    *,
    cuda_graphs: int = 2,
    workspace: Buffer | None = None,
) -> PlanEngine:
    """Open the toy plan on a fake device."""
    parts = plan_parts(device, workspace)
    return PlanEngine(path, EngineOptions(cuda_graphs=cuda_graphs), parts=parts)
