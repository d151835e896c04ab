"""Toy models and a toy repository for tests that start the embedded server."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import tritonclient.grpc as grpcclient
from onnx import TensorProto, helper, numpy_helper

from closeup.engines import Array

CPU_INSTANCE = "instance_group [ { kind: KIND_CPU count: 1 } ]\n"

# Answers late, from its own event loop, and calls `double` through BLS.
LATE_MODEL = """
import asyncio, json, os, threading, time
import numpy as np
import triton_python_backend_utils as pb_utils

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


class TritonPythonModel:
    def initialize(self, args):
        self.cancelled_after_s = {}
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()

    def execute(self, requests):
        for request in requests:
            inputs = {t.name(): np.array(t.as_numpy(), copy=True) for t in request.inputs()}
            job = self.answer(inputs, request.parameters(), request.request_id(),
                              request.get_response_sender())
            asyncio.run_coroutine_threadsafe(job, self.loop)
        return None

    async def answer(self, inputs, parameters, request_id, sender):
        try:
            info = await self.work(inputs, json.loads(parameters), request_id, sender)
            text = np.array([json.dumps(info).encode()], dtype=object)
            response = pb_utils.InferenceResponse([pb_utils.Tensor("info", text)])
        except BaseException as error:
            code = pb_utils.TritonError.UNAVAILABLE
            response = pb_utils.InferenceResponse(
                error=pb_utils.TritonError(f"UNAVAILABLE: {error}", code)
            )
        sender.send(response, flags=FINAL)

    async def work(self, inputs, parameters, request_id, sender):
        mode = inputs["mode"][0].decode() if "mode" in inputs else ""
        if mode == "sleep":
            await asyncio.sleep(0.5)
        if mode == "fail":
            raise ValueError("told to fail")
        if mode == "wait":
            started = time.monotonic()
            while not sender.is_cancelled() and time.monotonic() - started < 5:
                await asyncio.sleep(0.02)
            self.cancelled_after_s[request_id] = time.monotonic() - started
        if mode == "x":
            child = pb_utils.InferenceRequest(
                model_name="double", requested_output_names=["y"],
                inputs=[pb_utils.Tensor("x", inputs["x"])],
            )
            answer = await child.async_exec()
            if answer.has_error():
                raise ValueError(answer.error().message())
            return pb_utils.get_output_tensor_by_name(answer, "y").as_numpy().tolist()
        return {
            "inputs": sorted(inputs),
            "parameters": parameters,
            "cancelled_after_s": self.cancelled_after_s,
            "environment": {k: v for k, v in os.environ.items() if k.startswith("CLOSEUP_")},
        }

    def finalize(self):
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
"""
LATE_CONFIG = (
    """
backend: "python"
input [
  { name: "mode" data_type: TYPE_STRING dims: [1] optional: true },
  { name: "x" data_type: TYPE_FP32 dims: [-1, 3] optional: true }
]
output [ { name: "info" data_type: TYPE_STRING dims: [1] } ]
"""
    + CPU_INSTANCE
)


def save_graph(
    path: Path,
    node: str,
    x: tuple[int, list[int | str]],
    y: tuple[int, list[int | str]],
    constant: Array,
    *,
    constant_first: bool = False,
) -> None:
    """Write a graph of one node over the input ``x`` and a constant; its output is ``y``."""
    names = ["constant", "x"] if constant_first else ["x", "constant"]
    graph = helper.make_graph(
        [helper.make_node(node, names, ["y"])],
        "toy",
        [helper.make_tensor_value_info("x", *x)],
        [helper.make_tensor_value_info("y", *y)],
        [numpy_helper.from_array(constant, "constant")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)


def save_double(path: Path) -> None:
    """Write y = 2x over float32 (B, 3)."""
    shape: tuple[int, list[int | str]] = (TensorProto.FLOAT, ["B", 3])
    save_graph(path, "Mul", shape, shape, np.array(2, dtype=np.float32))


def save_lookup(path: Path) -> None:
    """Write y = (10, 11, 12, 13, 14)[x] over int64 (B, 1); an x past the table fails the run."""
    table = np.arange(10, 15, dtype=np.float32)
    shapes: list[int | str] = ["B", 1]
    save_graph(
        path,
        "Gather",
        (TensorProto.INT64, shapes),
        (TensorProto.FLOAT, shapes),
        table,
        constant_first=True,
    )


def make_repository(folder: Path) -> Path:
    """Write a repository with the models ``double``, ``lookup`` and ``late``."""
    repository = folder / "repository"
    batching = "dynamic_batching { max_queue_delay_microseconds: 200000 }\n"
    short = f'backend: "onnxruntime"\n{CPU_INSTANCE}'
    shrink = (
        'parameters { key: "memory.enable_memory_arena_shrinkage" '
        'value: { string_value: "cpu:0" } }\n'
    )
    for name, save, config in (
        ("double", save_double, short + shrink),
        ("lookup", save_lookup, f"{short}max_batch_size: 8\n{batching}"),
    ):
        save(repository / name / "1" / "model.onnx")
        (repository / name / "config.pbtxt").write_text(config)
    late = repository / "late" / "1" / "model.py"
    late.parent.mkdir(parents=True)
    late.write_text(LATE_MODEL)
    (repository / "late" / "config.pbtxt").write_text(LATE_CONFIG)
    return repository


def make_input(name: str, array: Array) -> Any:
    """A gRPC input tensor."""
    kinds = {"float32": "FP32", "int64": "INT64", "object": "BYTES"}
    tensor = grpcclient.InferInput(name, list(array.shape), kinds[array.dtype.name])
    tensor.set_data_from_numpy(array)
    return tensor


def make_mode(mode: str) -> Any:
    """The input ``mode`` of the model ``late``."""
    return make_input("mode", np.array([mode.encode()], dtype=object))


def post_json(url: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """POST JSON; the status and the JSON answered, for errors too."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)
