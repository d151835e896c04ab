"""A GPU as the plans of one process share it: a stream, memory, CUDA graphs.

Not run on a GPU yet: everything above `Device` is tested against a fake of it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any, Protocol

from closeup.engines import Array
from closeup.errors import ModelError

log = logging.getLogger(__name__)

# cudaMalloc gives addresses that are multiples of this; so are TensorRT's needs.
_BLOCK_BYTES = 512
# Errors after which every call of the process fails: uncorrectable memory and link errors, a kernel
# that hung, trapped or touched what is not its own, and what the driver does not know.
_FATAL = frozenset({214, 220, 700, 702, 710, *range(714, 720), 999})


class Device(Protocol):
    """One GPU's memory and one stream; copies and launches are queued on the stream in order.

    Only the holder of ``lock`` may call anything.
    """

    lock: threading.RLock
    stream: int

    def enter(self) -> None:
        """Make the GPU current in this thread."""

    def allocate(self, size_bytes: int) -> int:
        """Return the address of new device memory."""
        ...

    def free(self, address: int) -> None:
        """Give device memory back, once what is queued is done."""

    def upload(self, address: int, array: Array) -> None:
        """Copy a contiguous host array to the device; it must stay as it is until `synchronize`."""

    def download(self, array: Array, address: int) -> None:
        """Copy from the device into a contiguous host array, whole after `synchronize`."""

    def copy(self, target: int, source: int, size_bytes: int) -> None:
        """Copy within the device."""

    def synchronize(self) -> None:
        """Wait until all that is queued is done."""

    def capture(self, enqueue: Callable[[], bool]) -> int | None:
        """Record what ``enqueue`` queues; return the graph, or None where it cannot be recorded."""
        ...

    def launch(self, graph: int) -> None:
        """Queue a recorded graph."""

    def drop(self, graph: int) -> None:
        """Destroy a graph that is not running."""


class Buffer:
    """Device memory that grows and never shrinks; nothing is allocated before its first use.

    Attributes:
        address: 0 before the first use; changes when the buffer grows.
        size_bytes: what is allocated.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self.address = 0
        self.size_bytes = 0

    def reserve(self, size_bytes: int) -> bool:
        """Make room for ``size_bytes``; returns whether the content was lost with the address."""
        if size_bytes <= self.size_bytes:
            return False
        self.release()
        size_bytes = -(-size_bytes // _BLOCK_BYTES) * _BLOCK_BYTES
        self.address = self._device.allocate(size_bytes)
        self.size_bytes = size_bytes
        return True

    def release(self) -> None:
        """Give the memory back."""
        address, self.address, self.size_bytes = self.address, 0, 0
        if address:
            self._device.free(address)


class CudaDevice:
    """A `Device` through the CUDA runtime (package ``cuda-bindings``).

    Args:
        device_id: which GPU.

    Attributes:
        lost: the error after which no call of this process will succeed; empty before it.

    Raises:
        ModelError: the package is missing, or CUDA refuses.
    """

    def __init__(self, device_id: int = 0) -> None:
        self._cuda = _import_cuda()
        self._device_id = device_id
        self.lock = threading.RLock()
        self.lost = ""
        self.enter()
        handle = self._call("cudaStreamCreateWithFlags", self._cuda.cudaStreamNonBlocking)
        self._stream = handle
        self.stream = int(handle)
        self._graphs: dict[int, Any] = {}

    def enter(self) -> None:
        """See `Device.enter`."""
        self._call("cudaSetDevice", self._device_id)

    def allocate(self, size_bytes: int) -> int:
        """See `Device.allocate`."""
        return int(self._call("cudaMalloc", size_bytes))

    def free(self, address: int) -> None:
        """See `Device.free`."""
        self.synchronize()
        self._call("cudaFree", address)

    def upload(self, address: int, array: Array) -> None:
        """See `Device.upload`; where the GPU reads pageable memory itself, nothing is staged."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._copy(address, array.ctypes.data, array.nbytes, kind)

    def download(self, array: Array, address: int) -> None:
        """See `Device.download`."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._copy(array.ctypes.data, address, array.nbytes, kind)

    def copy(self, target: int, source: int, size_bytes: int) -> None:
        """See `Device.copy`."""
        self._copy(target, source, size_bytes, self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice)

    def synchronize(self) -> None:
        """See `Device.synchronize`."""
        self._call("cudaStreamSynchronize", self._stream)

    def capture(self, enqueue: Callable[[], bool]) -> int | None:
        """See `Device.capture`."""
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", self._stream, mode)
        done = False
        try:
            done = enqueue()
        finally:
            # Always ended, or the stream is lost; an error here only means that there is no graph.
            graph = self._try("cudaStreamEndCapture", self._stream)
        if not graph:
            return None
        executable = self._try("cudaGraphInstantiate", graph, 0) if done else 0
        self._call("cudaGraphDestroy", graph)
        if not executable:
            return None
        self._graphs[int(executable)] = executable
        return int(executable)

    def launch(self, graph: int) -> None:
        """See `Device.launch`."""
        self._call("cudaGraphLaunch", self._graphs[graph], self._stream)

    def drop(self, graph: int) -> None:
        """See `Device.drop`."""
        self._call("cudaGraphExecDestroy", self._graphs.pop(graph))

    def _copy(self, target: int, source: int, size_bytes: int, kind: Any) -> None:
        if size_bytes:
            self._call("cudaMemcpyAsync", target, source, size_bytes, kind, self._stream)

    def _try(self, name: str, *arguments: Any) -> Any:
        """Call what may fail, e.g. for want of memory; returns its handle, 0 where it did.

        The runtime keeps the error for whoever asks next: it is taken away here, or TensorRT would
        find it after a launch of its own.
        """
        error, handle = getattr(self._cuda, name)(*arguments)
        if int(error):
            self._cuda.cudaGetLastError()
            return 0
        return handle if handle is not None and int(handle) else 0

    def _call(self, name: str, *arguments: Any) -> Any:
        """Call a function of the runtime; it returns (error, result) or (error,)."""
        error, *results = getattr(self._cuda, name)(*arguments)
        if int(error):
            text = self._cuda.cudaGetErrorString(error)[1].decode()
            sentence = f"CUDA: {name} failed with error {int(error)}, {text}."
            if int(error) in _FATAL and not self.lost:
                self.lost = sentence
                log.error("%s The GPU is lost to this process: start the server again.", sentence)
            raise ModelError(sentence)
        return results[0] if results else None


_devices: dict[int, CudaDevice] = {}
_workspaces: dict[int, Buffer] = {}
_opening = threading.Lock()  # engines are opened by several threads


def open_device(device_id: int) -> CudaDevice:
    """Return the process's device of that number: one stream for all its plans."""
    with _opening:
        if device_id not in _devices:
            _devices[device_id] = CudaDevice(device_id)
        return _devices[device_id]


def shared_workspace(device_id: int) -> Buffer:
    """Return the activation memory that the plans on that device share, each while it runs."""
    device = open_device(device_id)
    with _opening:
        if device_id not in _workspaces:
            _workspaces[device_id] = Buffer(device)
        return _workspaces[device_id]


def lost_device() -> str:
    """Return why no GPU of this process will work again; empty while they do."""
    return next((device.lost for device in list(_devices.values()) if device.lost), "")


def _import_cuda() -> Any:
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise ModelError(
            "TensorRT plans need the package cuda-bindings: install it, or this project with the "
            "extra tensorrt, pip install 'closeup[tensorrt]'."
        ) from error
    return runtime
