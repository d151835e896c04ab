"""A stand-in for a closeup server: the two protocols, and answers chosen by the prompt.

``full``, ``bad``, ``broken`` and ``lost model`` are refused with a code, ``slow`` works until the
client leaves, ``mute`` ends a stream without a result, and every other prompt gets a picture.
The denoiser lists LoRAs.
"""

from __future__ import annotations

import base64
import json
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import grpc  # type: ignore[import-untyped]
import numpy as np
from closeup_client.pictures import png_from_array
from tritonclient.grpc import service_pb2, service_pb2_grpc

REFUSALS = {
    "full": (503, "UNAVAILABLE", "UNAVAILABLE: all 4 slots are taken; try again."),
    "bad": (
        400,
        "INVALID_ARGUMENT",
        "INVALID_ARG: w: got 72; the demo takes up to 64. lora: is unknown.",
    ),
    "broken": (500, "INTERNAL", "INTERNAL: the server failed; its log names the cause under ab12."),
    "lost model": (404, "NOT_FOUND", "Request for unknown model: 'generate' is not found"),
}
INDEX: tuple[tuple[str, str, str], ...] = (
    ("demo_denoiser", "READY", ""),
    ("demo_vae_decoder", "READY", ""),
    ("broken_denoiser", "UNAVAILABLE", "engine made elsewhere"),
    ("generate", "READY", ""),
    ("upscaler", "READY", ""),
)
LORAS = [
    {"id": "1795721", "bytes": 641_816, "networks": ["denoiser", "text_encoder"]},
    {"id": "long-" + "x" * 90, "bytes": 12, "networks": None},
]
FACES = [
    {
        "index": 0,
        "box": [4.0, 6.0, 14.0, 18.0],
        "score": 0.93,
        "landmarks": [],
        "action": "repaint",
        "strength": 0.61,
        "seed": 5,
        "reason": None,
    },
    {
        "index": 1,
        "box": [20.0, 6.0, 24.0, 11.0],
        "score": 0.71,
        "landmarks": [],
        "action": "skip",
        "strength": 0.0,
        "seed": 6,
        "reason": "is smaller than min_face_ratio allows.",
    },
]
EVENTS = (("generate", 0, 4), ("generate", 4, 4), ("super_resolution", 1, 1), ("faces", 2, 2))
SLOW_LIMIT_S = 10.0


class FakeTriton:
    """What both protocols share: the record of requests, and the answers.

    Attributes:
        requests: (model, fields) in order of arrival; BYTES stay bytes, or text over JSON.
        headers: of the requests, lower-case keys.
        left: set when the client left a slow request.
        index: the repository's entries.
        loras: what the denoiser answers, JSON.
        refused: how it refuses instead, one of REFUSALS.
    """

    def __init__(self) -> None:
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.headers: list[dict[str, str]] = []
        self.left = threading.Event()
        self.port = 0
        self.is_ready = True
        self.index = INDEX
        self.loras = json.dumps(LORAS)
        self.refused: tuple[int, str, str] | None = None

    def note(self, model: str, fields: dict[str, Any], headers: Mapping[str, str]) -> str:
        """Record a request; returns its prompt."""
        self.requests.append((model, fields))
        self.headers.append({key.lower(): value for key, value in headers.items()})
        prompt = fields.get("prompt", b"")
        return prompt.decode() if isinstance(prompt, bytes) else str(prompt)

    def refusal(self, prompt: str) -> tuple[int, str, str] | None:
        """HTTP status, gRPC status and sentence; None when the request is served."""
        return self.refused or REFUSALS.get(prompt)

    def outputs(self, model: str, fields: Mapping[str, Any]) -> dict[str, list[bytes]]:
        """What a model answers."""
        if model == "generate":
            return result_outputs(fields)
        assert (model, fields) == ("demo_denoiser", {"operation": b"loras"})
        return {"loras": [self.loras.encode()]}

    def wait_until_left(self, is_there: Callable[[], bool]) -> None:
        """Work slowly until the client is gone."""
        limit_s = time.monotonic() + SLOW_LIMIT_S
        while is_there() and time.monotonic() < limit_s:
            time.sleep(0.01)
        if not is_there():
            self.left.set()


def picture(shade: int) -> bytes:
    """A PNG, 32 x 40 px."""
    return png_from_array(np.full((40, 32, 3), shade, np.uint8))


def result_outputs(fields: Mapping[str, Any]) -> dict[str, list[bytes]]:
    """The result's tensors: one picture of a shade for each seed."""
    count, seed = int(fields.get("num_images", 1)), int(fields.get("seed", 100))
    has_stages = bool(fields.get("stages"))
    faces = FACES if fields.get("inpaint_faces") else []
    labels = [
        {"image": image, "stage": stage}
        for stage in ("generated", "super_resolution")
        for image in range(count)
    ]
    info = {
        "id": "7f",
        "model": "demo",
        "seeds": [seed + i for i in range(count)],
        "images": [
            {"seed": seed + i, "width": 32, "height": 40, "faces": faces} for i in range(count)
        ],
        "size": [32, 40],
        "steps": 4,
        "scheduler": "euler",
        "timings_ms": {"generate": 40.0, "super_resolution": 12.5, "faces": 30.0},
        "usage": {"inference_cycles": 2},
        "warnings": ["the prompt was cut."] if fields.get("seed") == 13 else [],
        "stage_images": labels if has_stages else [],
    }
    files = [picture((seed + i) % 256) for i in range(count)]
    stages = [picture(i) for i in range(len(labels))]
    encoding = fields.get("response_encoding")
    if encoding not in (b"raw", "raw"):
        files = [base64.b64encode(data) for data in files]
        stages = [base64.b64encode(data) for data in stages]
    outputs = {"image": files, "info": [json.dumps(info).encode()]}
    if has_stages:
        outputs["stage_image"] = stages
    return outputs


def stream_outputs(prompt: str, fields: Mapping[str, Any]) -> Iterator[dict[str, list[bytes]]]:
    """Progress events, then the result unless the prompt is ``mute``."""
    for stage, step, steps in EVENTS:
        event = {"type": "progress", "stage": stage, "step": step, "steps": steps}
        event |= {"image": None, "eta_s": 1.5 if step < steps else None, "elapsed_s": 0.25}
        outputs = {"event": [json.dumps(event).encode()]}
        if fields.get("previews") and stage == "generate":
            small = b"\xff\xd8\xff small"
            is_raw = fields.get("response_encoding") in (b"raw", "raw")
            outputs["preview"] = [small if is_raw else base64.b64encode(small)]
        yield outputs
    yield {"event": [b'{"type": "heartbeat"}']}  # a kind this client does not know
    if prompt != "mute":
        yield {**result_outputs(fields), "event": [b'{"type": "result"}']}


def _strings(items: list[bytes]) -> bytes:
    return b"".join(struct.pack("<I", len(item)) + item for item in items)


def _value(datatype: str, raw: bytes) -> Any:
    if datatype == "BYTES":
        (length,) = struct.unpack_from("<I", raw)
        assert len(raw) == 4 + length
        return raw[4:]
    (value,) = struct.unpack({"INT64": "<q", "FP64": "<d", "BOOL": "<?"}[datatype], raw)
    return value


class _Servicer(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    def __init__(self, fake: FakeTriton) -> None:
        self._fake = fake

    def ServerLive(self, request: Any, context: Any) -> Any:  # noqa: N802
        return service_pb2.ServerLiveResponse(live=True)

    def ServerReady(self, request: Any, context: Any) -> Any:  # noqa: N802
        return service_pb2.ServerReadyResponse(ready=self._fake.is_ready)

    def ServerMetadata(self, request: Any, context: Any) -> Any:  # noqa: N802
        return service_pb2.ServerMetadataResponse(name="triton", version="2.51.0")

    def RepositoryIndex(self, request: Any, context: Any) -> Any:  # noqa: N802
        answer = service_pb2.RepositoryIndexResponse()
        for name, state, reason in self._fake.index:
            answer.models.add(name=name, version="1", state=state, reason=reason)
        return answer

    def ModelInfer(self, request: Any, context: Any) -> Any:  # noqa: N802
        fields, prompt = self._read(request, context)
        refusal = self._fake.refusal(prompt)
        if refusal is not None:
            _, status, message = refusal
            context.abort(getattr(grpc.StatusCode, status), message)
        if prompt == "slow":
            context.add_callback(self._fake.left.set)
            self._fake.wait_until_left(context.is_active)
        return self._response(self._fake.outputs(request.model_name, fields))

    def ModelStreamInfer(self, requests: Any, context: Any) -> Any:  # noqa: N802
        for request in requests:
            fields, prompt = self._read(request, context)
            if prompt in REFUSALS:
                yield service_pb2.ModelStreamInferResponse(error_message=REFUSALS[prompt][2])
                continue
            if prompt == "slow":  # the callback sees a client leave before the first event, too
                context.add_callback(self._fake.left.set)
            for outputs in stream_outputs(prompt, fields):
                yield service_pb2.ModelStreamInferResponse(infer_response=self._response(outputs))
                if prompt == "slow":
                    self._fake.wait_until_left(context.is_active)
                    return
            yield service_pb2.ModelStreamInferResponse(infer_response=self._response({}))

    def _read(self, request: Any, context: Any) -> tuple[dict[str, Any], str]:
        assert all(list(tensor.shape) == [1] for tensor in request.inputs)
        pairs = zip(request.inputs, request.raw_input_contents, strict=True)
        fields = {tensor.name: _value(tensor.datatype, raw) for tensor, raw in pairs}
        headers = dict(context.invocation_metadata())
        return fields, self._fake.note(request.model_name, fields, headers)

    def _response(self, outputs: Mapping[str, list[bytes]]) -> Any:
        response = service_pb2.ModelInferResponse(model_name="generate")
        for name, items in outputs.items():
            response.outputs.add(name=name, datatype="BYTES", shape=[len(items)])
            response.raw_output_contents.append(_strings(items))
        return response


def serve_grpc() -> Iterator[FakeTriton]:
    """A fake over gRPC, for a fixture to yield from."""
    fake = FakeTriton()
    server = grpc.server(ThreadPoolExecutor(8))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(_Servicer(fake), server)
    fake.port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield fake
    server.stop(grace=0).wait(5)


def serve_http() -> Iterator[FakeTriton]:
    """A fake over HTTP, for a fixture to yield from."""
    fake = FakeTriton()
    handler = type("Handler", (_Handler,), {"fake": fake})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    fake.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield fake
    server.shutdown()
    server.server_close()
    thread.join(5)


class _Handler(BaseHTTPRequestHandler):
    fake: FakeTriton
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:  # noqa: N802
        if self.path == "/v2":
            self._send(200, json.dumps({"name": "triton", "version": "2.51.0"}).encode())
        elif self.path == "/v2/health/ready":
            self._send(200 if self.fake.is_ready else 400, b"")
        else:
            self._send(200 if self.path == "/v2/health/live" else 404, b"")

    def do_POST(self) -> None:  # noqa: N802
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/v2/repository/index":
            index = [{"name": n, "state": s, "reason": r} for n, s, r in self.fake.index]
            self._send(200, json.dumps(index).encode())
        elif self.path in ("/v2/models/generate/infer", "/v2/models/demo_denoiser/infer"):
            self._infer(self.path.split("/")[3], body)
        elif self.path == "/v2/models/generate_stream/generate_stream":
            self._stream(json.loads(body))
        else:
            self._send(404, b"")

    def _infer(self, model: str, body: bytes) -> None:
        end = int(self.headers["Inference-Header-Content-Length"])
        fields = {}
        for tensor in json.loads(body[:end])["inputs"]:
            size = tensor["parameters"]["binary_data_size"]
            assert tensor["shape"] == [1]
            fields[tensor["name"]] = _value(tensor["datatype"], body[end : end + size])
            end += size
        assert end == len(body)
        prompt = self.fake.note(model, fields, dict(self.headers))
        if self._refused(prompt):
            return
        if prompt == "slow":
            time.sleep(1)
        raws = {name: _strings(items) for name, items in self.fake.outputs(model, fields).items()}
        outputs = [
            {
                "name": name,
                "datatype": "BYTES",
                "shape": [1],
                "parameters": {"binary_data_size": len(raw)},
            }
            for name, raw in raws.items()
        ]
        head = json.dumps({"model_name": model, "outputs": outputs}).encode()
        self._send(200, head + b"".join(raws.values()), header_length=len(head))

    def _stream(self, fields: dict[str, Any]) -> None:
        prompt = self.fake.note("generate_stream", fields, dict(self.headers))
        if prompt in REFUSALS and prompt != "broken":
            # As the embedded Triton does: 400 for every error of a model, and an event's form.
            text = json.dumps({"error": REFUSALS[prompt][2]})
            self._send(400, f"data: {text}\n\n".encode())
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        if prompt == "broken":  # fails after the stream has begun
            self._event({"error": REFUSALS[prompt][2]})
        else:
            for outputs in stream_outputs(prompt, fields):
                texts = {name: [item.decode() for item in items] for name, items in outputs.items()}
                # Triton unwraps tensors of one element.
                self._event({n: t[0] if len(t) == 1 else t for n, t in texts.items()})
                if prompt == "slow":
                    self.fake.wait_until_left(self._is_there)
                    return
        self.wfile.write(b"0\r\n\r\n")

    def _event(self, value: dict[str, Any]) -> None:
        line = f"data: {json.dumps(value)}\n\n".encode()
        self.wfile.write(f"{len(line):x}\r\n".encode() + line + b"\r\n")

    def _is_there(self) -> bool:
        try:
            self._event({"event": '{"type": "heartbeat"}'})
        except OSError:
            self.close_connection = True
            return False
        return True

    def _refused(self, prompt: str) -> bool:
        refusal = self.fake.refusal(prompt)
        if refusal is None:
            return False
        status, _, message = refusal
        self._send(status, json.dumps({"error": message}).encode())
        return True

    def _send(self, status: int, body: bytes, header_length: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if header_length is not None:
            self.send_header("Inference-Header-Content-Length", str(header_length))
        self.end_headers()
        self.wfile.write(body)
