"""``triton_python_backend_utils`` where there is no Triton: what `closeup` asks of it."""

from __future__ import annotations

import contextlib
import importlib
import sys
import types
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from closeup.engines import Array

CPU, GPU = "cpu memory", "gpu memory"
OURS = ("closeup.triton_glue", "closeup.denoiser_model", "closeup.engine_backend")


class PreferredMemory:
    """Where a caller wants the outputs."""

    def __init__(self, kind: str, device_id: int) -> None:
        self.kind = kind
        self.device_id = device_id


class Tensor:
    """A tensor in CPU memory, or on the GPU, where it has no numpy form."""

    def __init__(self, name: str, array: Array, *, memory: str = CPU) -> None:
        self._name, self._array, self._memory = name, array, memory

    def name(self) -> str:
        """The tensor's name."""
        return self._name

    def as_numpy(self) -> Array:
        """The array; raises as the real one does where it is on the GPU."""
        if self._memory == GPU:
            raise RuntimeError("Tensor is stored in GPU and cannot be converted to NumPy.")
        return self._array


class InferenceRequest:
    """A BLS call of a model that doubles ``x``, whose backend prefers its outputs on the GPU."""

    def __init__(
        self,
        *,
        model_name: str,
        inputs: Sequence[Tensor],
        requested_output_names: Sequence[str],
        preferred_memory: PreferredMemory | None = None,
    ) -> None:
        self._inputs = {tensor.name(): tensor.as_numpy() for tensor in inputs}
        self._names = requested_output_names
        self._memory = GPU if preferred_memory is None else preferred_memory.kind

    async def async_exec(self) -> Any:
        """Run."""
        doubled = np.multiply(self._inputs["x"], 2)
        tensors = [Tensor(name, doubled, memory=self._memory) for name in self._names]
        return SimpleNamespace(has_error=lambda: False, output_tensors=lambda: tensors)


class TritonModelException(Exception):  # noqa: N818 - Triton's name
    """What `initialize` raises."""


class TritonError:
    """An answer's error; as the real one it takes no halves of characters."""

    INTERNAL, INVALID_ARG, UNAVAILABLE, CANCELLED = "INTERNAL", "INVALID_ARG", "UNAVAILABLE", "X"

    def __init__(self, message: str, code: str = INTERNAL) -> None:
        message.encode()
        self.text, self.code = message, code


class InferenceResponse:
    """What is sent."""

    def __init__(
        self, output_tensors: Sequence[Tensor] = (), error: TritonError | None = None
    ) -> None:
        self.tensors, self.error = output_tensors, error


class Sender:
    """A response sender with room for so many bytes of tensors."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.sent: list[tuple[InferenceResponse, int]] = []

    def is_cancelled(self) -> bool:
        """Never."""
        return False

    def send(self, response: InferenceResponse, flags: int = 0) -> None:
        """Keep a response, or raise as the real one does when shared memory is full."""
        if sum(tensor.as_numpy().nbytes for tensor in response.tensors) > self.room:
            raise RuntimeError("Failed to increase the shared memory pool size")
        self.sent.append((response, flags))


def make_module() -> Any:
    """Return the module."""
    module: Any = types.ModuleType("triton_python_backend_utils")
    module.PreferredMemory = PreferredMemory
    module.TRITONSERVER_MEMORY_CPU, module.TRITONSERVER_MEMORY_GPU = CPU, GPU
    module.Tensor = Tensor
    module.InferenceRequest = InferenceRequest
    module.InferenceResponse = InferenceResponse
    module.TritonError = TritonError
    module.TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1
    module.TritonModelException = TritonModelException
    module.Logger = SimpleNamespace(log_info=print, log_warn=print, log_error=print)
    return module


@contextlib.contextmanager
def imported(name: str, module: Any) -> Iterator[Any]:
    """A module of ours that imports ``module`` as Triton's; afterwards none is kept."""
    kept = {key: sys.modules.pop(key) for key in OURS if key in sys.modules}
    sys.modules["triton_python_backend_utils"] = module
    try:
        yield importlib.import_module(name)
    finally:
        for key in (*OURS, "triton_python_backend_utils"):
            sys.modules.pop(key, None)
        sys.modules.update(kept)
