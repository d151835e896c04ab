"""The CUDA runtime behind `Device`: with a fake of it, and what of the real one is here."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from closeup import cuda_device
from closeup.cuda_device import CudaDevice
from closeup.devices import find_gpu
from closeup.errors import ModelError
from tests.fake_pb_utils import imported, make_module

# What the plans' code asks of TensorRT's objects.
TENSORRT_NAMES = {
    "Runtime": ("deserialize_cuda_engine",),
    "ICudaEngine": (
        "create_execution_context", "get_device_memory_size_for_profile_v2", "get_tensor_name",
        "num_io_tensors", "get_tensor_dtype", "get_tensor_mode", "is_shape_inference_io",
    ),
    "IExecutionContext": (
        "execute_async_v3", "get_tensor_shape", "set_device_memory", "set_input_shape",
        "set_optimization_profile_async", "set_tensor_address",
    ),
    "ExecutionContextAllocationStrategy": ("USER_MANAGED",),
    "TensorIOMode": ("INPUT", "OUTPUT"),
    "DataType": ("FLOAT", "HALF", "BF16", "INT64"),
}  # fmt: skip


class FakeRuntime:
    """``cuda.bindings.runtime``: every function notes its call and answers (0, result).

    Attributes:
        calls: names, in order.
        errors: name of a function -> the error that it answers.
    """

    cudaStreamNonBlocking = 1  # noqa: N815 - CUDA's own names
    cudaMemcpyKind = SimpleNamespace(  # noqa: N815
        cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2, cudaMemcpyDeviceToDevice=3
    )
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)  # noqa: N815

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.errors: dict[str, int] = {}

    def cudaGetErrorString(self, error: int) -> tuple[int, bytes]:  # noqa: N802
        return 0, b"out of memory"

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: object) -> tuple[int, ...]:
            self.calls.append(name)
            results = {
                "cudaStreamCreateWithFlags": 5,
                "cudaMalloc": 4096,
                "cudaStreamEndCapture": 6,
                "cudaGraphInstantiate": 7,
            }
            error = self.errors.get(name, 0)
            return (error, results[name]) if name in results else (error,)

        return call


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> FakeRuntime:
    fake = FakeRuntime()
    monkeypatch.setattr(cuda_device, "_import_cuda", lambda: fake)
    return fake


def test_capture_gives_a_graph_that_can_be_launched_and_dropped(runtime: FakeRuntime) -> None:
    device = CudaDevice()
    del runtime.calls[:]
    graph = device.capture(lambda: True)
    assert runtime.calls == [
        "cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaGraphInstantiate",
        "cudaGraphDestroy",
    ]  # fmt: skip
    assert graph == 7
    device.launch(graph)
    device.drop(graph)
    assert runtime.calls[-2:] == ["cudaGraphLaunch", "cudaGraphExecDestroy"]
    with pytest.raises(KeyError):
        device.launch(graph)


def test_capture_gives_none_and_leaves_the_stream_usable_when_it_fails(
    runtime: FakeRuntime,
) -> None:
    device = CudaDevice()
    assert device.capture(lambda: False) is None
    assert runtime.calls[-2:] == ["cudaStreamEndCapture", "cudaGraphDestroy"]
    runtime.errors["cudaStreamEndCapture"] = 901
    assert device.capture(lambda: True) is None

    def fail() -> bool:
        raise RuntimeError("TensorRT threw")

    with pytest.raises(RuntimeError, match="TensorRT threw"):
        device.capture(fail)
    assert runtime.calls[-2:] == ["cudaStreamEndCapture", "cudaGetLastError"]


def test_capture_gives_none_when_there_is_no_memory_for_the_graph(runtime: FakeRuntime) -> None:
    device = CudaDevice()
    runtime.errors["cudaGraphInstantiate"] = 2
    assert device.capture(lambda: True) is None
    # The graph is gone, and the error with it: TensorRT would take it for one of its own.
    assert runtime.calls[-3:] == ["cudaGraphInstantiate", "cudaGetLastError", "cudaGraphDestroy"]


def test_errors_name_the_function_and_the_reason(runtime: FakeRuntime) -> None:
    device = CudaDevice()
    runtime.errors["cudaMalloc"] = 2
    with pytest.raises(ModelError) as caught:
        device.allocate(1 << 40)
    assert str(caught.value) == "CUDA: cudaMalloc failed with error 2, out of memory."


@pytest.mark.parametrize(("error", "is_lost"), [(700, True), (719, True), (214, True), (2, False)])
def test_gpu_is_lost_after_an_error_that_stays_and_its_models_are_not_ready(
    runtime: FakeRuntime, monkeypatch: pytest.MonkeyPatch, error: int, is_lost: bool
) -> None:
    monkeypatch.setattr(cuda_device, "_devices", {})
    device = cuda_device.open_device(0)
    with imported("closeup.denoiser_model", make_module()) as model:
        assert model.TritonPythonModel().is_ready()
        runtime.errors["cudaStreamSynchronize"] = error
        with pytest.raises(ModelError, match=f"failed with error {error}"):
            device.synchronize()
        del runtime.errors["cudaStreamSynchronize"]
        assert model.TritonPythonModel().is_ready() is not is_lost
    assert bool(device.lost) is is_lost


def test_one_device_and_one_workspace_are_opened_by_threads_at_once(
    runtime: FakeRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_device, "_devices", {})
    monkeypatch.setattr(cuda_device, "_workspaces", {})
    make = cuda_device.CudaDevice

    def make_slowly(device_id: int) -> CudaDevice:
        time.sleep(0.05)  # long enough for every thread to find none
        return make(device_id)

    monkeypatch.setattr(cuda_device, "CudaDevice", make_slowly)
    with ThreadPoolExecutor(4) as pool:
        workspaces = list(pool.map(cuda_device.shared_workspace, [0] * 4))
        devices = list(pool.map(cuda_device.open_device, [0] * 4))
    assert len(set(map(id, workspaces))) == len(set(map(id, devices))) == 1
    assert cuda_device.shared_workspace(1) is not workspaces[0]
    assert runtime.calls.count("cudaStreamCreateWithFlags") == 2


def test_free_waits_for_what_is_queued(runtime: FakeRuntime) -> None:
    device = CudaDevice()
    device.free(device.allocate(1))
    assert runtime.calls[-2:] == ["cudaStreamSynchronize", "cudaFree"]


def test_copies_of_nothing_are_left_out(runtime: FakeRuntime) -> None:
    device = CudaDevice()
    del runtime.calls[:]
    device.upload(4096, np.zeros((0, 3), np.float32))
    assert runtime.calls == []
    device.upload(4096, np.zeros(3, np.float32))
    assert runtime.calls == ["cudaMemcpyAsync"]


def test_real_runtime_has_every_function_and_refuses_in_one_sentence_without_a_gpu() -> None:
    real = pytest.importorskip("cuda.bindings.runtime")
    names = (
        "cudaSetDevice", "cudaMalloc", "cudaFree", "cudaMemcpyAsync", "cudaStreamCreateWithFlags",
        "cudaStreamNonBlocking", "cudaStreamSynchronize", "cudaStreamBeginCapture",
        "cudaStreamEndCapture", "cudaGraphInstantiate", "cudaGraphDestroy", "cudaGraphLaunch",
        "cudaGraphExecDestroy", "cudaGetErrorString", "cudaGetLastError",
    )  # fmt: skip
    assert [name for name in names if not hasattr(real, name)] == []
    assert real.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal is not None
    if find_gpu() is None:
        with pytest.raises(ModelError, match=r"^CUDA: cuda\w+ failed with error \d+, [^\n]+\.$"):
            CudaDevice()


@pytest.mark.parametrize("module", ["tensorrt", "tensorrt_rtx"])
def test_tensorrt_has_every_name_that_plans_are_run_with(module: str) -> None:
    trt = pytest.importorskip(module)
    missing = [
        f"{kind}.{name}"
        for kind, names in TENSORRT_NAMES.items()
        for name in names
        if not hasattr(getattr(trt, kind), name)
    ]
    assert missing == []


@pytest.mark.gpu
def test_memory_comes_back_as_it_was_when_it_went_through_the_gpu() -> None:
    if find_gpu() is None:
        pytest.skip("there is no GPU")
    device = CudaDevice()
    values = np.arange(1000, dtype=np.float32)
    one, other = device.allocate(values.nbytes), device.allocate(values.nbytes)
    device.upload(one, values)
    device.copy(other, one, values.nbytes)
    back = np.empty_like(values)
    device.download(back, other)
    device.synchronize()
    np.testing.assert_array_equal(back, values)
    device.free(one)
    device.free(other)
