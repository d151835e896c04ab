"""The real server: the golden request, errors over every protocol, limits, cancellation."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpc_client
import tritonclient.http as http_client
from closeup_client import Client, InvalidRequest
from PIL import Image
from tritonclient.utils import InferenceServerException

from closeup.fields import FIELD_BY_NAME, Kind
from closeup.local import LocalModels
from closeup.server import EmbeddedServer, ServerOptions
from tests.golden import GOLDEN_BODY
from tests.paths import DEMO_LORAS
from tests.pictures import png, png_bomb

pytestmark = pytest.mark.triton

SLOTS = 8
SMALL = {"prompt": "a portrait of a woman with red hair", "steps": 4, "w": 64, "h": 64, "seed": 3}
LONG = {**SMALL, "steps": 50, "w": 256, "h": 256}
TYPES = {Kind.STRING: "BYTES", Kind.IMAGE: "BYTES", Kind.INT: "INT64", Kind.FLOAT: "FP64",
         Kind.BOOL: "BOOL"}  # fmt: skip


@pytest.fixture(scope="module")
def server(demo_repository: Path) -> Iterator[EmbeddedServer]:
    options = ServerOptions(
        repository=demo_repository, lora_dir=DEMO_LORAS, slots=SLOTS, request_timeout_s=300,
        http_port=0, grpc_port=0, metrics_port=0,
    )  # fmt: skip
    with EmbeddedServer(options) as running:
        yield running


def grpc_inputs(fields: dict[str, Any]) -> list[Any]:
    inputs = []
    for name, value in fields.items():
        kind = FIELD_BY_NAME[name].kind
        dtype = {"INT64": np.int64, "FP64": np.float64, "BOOL": np.bool_, "BYTES": np.object_}
        data = value.encode() if isinstance(value, str) else value
        tensor = grpc_client.InferInput(name, [1], TYPES[kind])
        tensor.set_data_from_numpy(np.array([data], dtype[TYPES[kind]]))
        inputs.append(tensor)
    return inputs


def ask_grpc(server: EmbeddedServer, fields: dict[str, Any], **arguments: Any) -> Any:
    with grpc_client.InferenceServerClient(server.grpc_url) as client:
        return client.infer("generate", grpc_inputs(fields), **arguments)


def post(server: EmbeddedServer, path: str, body: str) -> tuple[int, dict[str, Any]]:
    request = urllib.request.Request(f"http://{server.http_url}/v2/models/{path}", body.encode())
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def infer_body(fields: dict[str, Any]) -> str:
    inputs = [
        {"name": name, "shape": [1], "datatype": TYPES[FIELD_BY_NAME[name].kind], "data": [value]}
        for name, value in fields.items()
    ]
    return json.dumps({"inputs": inputs})


def picture(data: bytes) -> Any:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def metric(server: EmbeddedServer, name: str) -> float:
    with urllib.request.urlopen(server.metrics_url, timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    values = [float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name + "{")]
    assert values, f"no metric {name}"
    return sum(values)


def wait_until_idle(server: EmbeddedServer, limit_s: float = 10) -> None:
    end_s = time.monotonic() + limit_s
    while metric(server, "closeup_slots_in_use") > 0:
        assert time.monotonic() < end_s, "slots are still in use"
        time.sleep(0.05)


@pytest.mark.slow
def test_golden_request_answers_with_the_picture(server: EmbeddedServer) -> None:
    status, answer = post(server, "generate/generate", GOLDEN_BODY)
    assert status == 200, answer
    pixels = picture(answer["image"])
    assert pixels.shape == (2304, 1792, 3)
    assert pixels.std() > 10
    info = json.loads(answer["info"])
    assert info["loras"] == [{"id": "1795721", "weight": 1.0}]
    assert info["warnings"]  # the prompt is longer than 77 tokens: cut, and said so


def test_server_gives_the_picture_of_the_graph_in_this_process(
    server: EmbeddedServer, demo_repository: Path
) -> None:
    with LocalModels(demo_repository) as local:
        expected = local.generate(**SMALL).pictures[0]
    answer = ask_grpc(server, {**SMALL, "response_encoding": "raw"})
    served = np.asarray(Image.open(io.BytesIO(answer.as_numpy("image")[0])))
    np.testing.assert_array_equal(served, expected)
    for path, body in (("generate/generate", json.dumps(SMALL)),):
        status, answer = post(server, path, body)
        assert status == 200
        np.testing.assert_array_equal(picture(answer["image"]), expected)
    status, answer = post(server, "generate/infer", infer_body(SMALL))
    assert status == 200
    data = {output["name"]: output["data"] for output in answer["outputs"]}
    np.testing.assert_array_equal(picture(data["image"][0]), expected)


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


BAD_INPUT: list[tuple[dict[str, Any], str]] = [
    ({"prompt": ""}, "prompt: is empty"),
    ({"prompt": "x" * 10_000}, "prompt: has 10000 characters"),
    ({"w": 100}, "w: got 100; allowed are 64 to 2048, multiples of 8"),
    ({"h": 4096}, "h: got 4096"),
    ({"num_images": 0}, "num_images: got 0; allowed are 1 to 8"),
    ({"num_images": 9}, "num_images: got 9"),
    ({"steps": 51}, "steps: got 51; allowed are 1 to 50"),
    ({"cfg_scale": 16.0}, "cfg_scale: got 16; allowed are 0 to 15"),
    ({"scheduler": "nope"}, "scheduler: 'nope' is unknown; the nearest are "),
    ({"prompt": "<lora:missing:1> a"}, "prompt: there is no LoRA 'missing'"),
    ({"prompt": "<lora:../x:1> a"}, "prompt: '../x' cannot be a LoRA id"),
    ({"input_image": encoded(png_bomb(40_000))}, "input_image: declares 1,600,000,000 pixels; "),
    ({"input_image": encoded(b"\x89PNG\r\n")}, "input_image: holds 6 bytes that are no picture"),
    ({"input_image": encoded(png(64, 64)[:100])}, "input_image: is damaged or cut short"),
    (
        {"input_image": encoded(png(64, 64)), "mask_image": encoded(png(72, 72))},
        "mask_image: is 72x72, input_image is 64x64; send them in the same size",
    ),
]


@pytest.mark.parametrize(("fields", "sentence"), BAD_INPUT)
def test_bad_input_is_refused_over_every_protocol_before_any_engine_runs(
    server: EmbeddedServer, fields: dict[str, Any], sentence: str
) -> None:
    fields = {**SMALL, **fields}
    calls = metric(server, "closeup_engine_calls_total")
    with pytest.raises(InferenceServerException) as caught:
        ask_grpc(server, fields)
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"
    for path, body in (
        ("generate/infer", infer_body(fields)),
        ("generate/generate", json.dumps(fields)),
    ):
        status, answer = post(server, path, body)
        assert status == 400
        assert answer["error"].startswith(f"INVALID_ARG: {sentence}"), answer
        assert "Traceback" not in answer["error"]
    assert str(caught.value.message()) == answer["error"]
    assert metric(server, "closeup_engine_calls_total") == calls


UNKNOWN = "INVALID_ARG: stepz: is not a field of this server; did you mean steps?"
MISSING = "INVALID_ARG: prompt: is missing; every request needs one."


def test_unknown_field_is_refused_over_every_protocol(server: EmbeddedServer) -> None:
    # What is no tensor of the model arrives as a parameter of the request.
    with pytest.raises(InferenceServerException) as caught:
        ask_grpc(server, SMALL, parameters={"stepz": 3})
    assert (caught.value.status(), caught.value.message()) == (
        "StatusCode.INVALID_ARGUMENT", UNKNOWN,
    )  # fmt: skip
    body = json.dumps({**json.loads(infer_body(SMALL)), "parameters": {"stepz": 3}})
    assert post(server, "generate/infer", body) == (400, {"error": UNKNOWN})
    body = json.dumps({**SMALL, "stepz": 3})
    assert post(server, "generate/generate", body) == (400, {"error": UNKNOWN})


def test_unknown_tensor_is_refused_by_triton_by_its_name(server: EmbeddedServer) -> None:
    tensor = grpc_client.InferInput("stepz", [1], "INT64")
    tensor.set_data_from_numpy(np.array([3]))
    with (
        grpc_client.InferenceServerClient(server.grpc_url) as client,
        pytest.raises(InferenceServerException, match="stepz") as caught,
    ):
        client.infer("generate", [*grpc_inputs(SMALL), tensor])
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"
    body = json.loads(infer_body(SMALL))
    body["inputs"].append({"name": "stepz", "shape": [1], "datatype": "INT64", "data": [3]})
    status, answer = post(server, "generate/infer", json.dumps(body))
    assert status == 400
    assert "stepz" in answer["error"]


def test_missing_prompt_is_refused_over_every_protocol(server: EmbeddedServer) -> None:
    with pytest.raises(InferenceServerException) as caught:
        ask_grpc(server, {"steps": 3})
    assert (caught.value.status(), caught.value.message()) == (
        "StatusCode.INVALID_ARGUMENT", MISSING,
    )  # fmt: skip
    body = infer_body({"steps": 3})
    assert post(server, "generate/infer", body) == (400, {"error": MISSING})
    assert post(server, "generate/generate", '{"steps": 3}') == (400, {"error": MISSING})


def test_invalid_utf8_is_refused_over_grpc_and_binary_http(server: EmbeddedServer) -> None:
    words = "prompt: is not valid UTF-8"
    with pytest.raises(InferenceServerException, match=f"INVALID_ARG: {words}") as caught:
        ask_grpc(server, {**SMALL, "prompt": b"caf\xe9"})
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"
    tensor = http_client.InferInput("prompt", [1], "BYTES")
    tensor.set_data_from_numpy(np.array([b"caf\xe9"], np.object_), binary_data=True)
    with (
        http_client.InferenceServerClient(server.http_url) as client,
        pytest.raises(InferenceServerException, match=f"INVALID_ARG: {words}") as caught,
    ):
        client.infer("generate", [tensor])
    assert caught.value.status() == "400"
    assert ask_grpc(server, SMALL).as_numpy("image").shape == (1,)  # the server still answers


def test_wrong_json_types_are_refused_by_tritons_parser(server: EmbeddedServer) -> None:
    for wrong in ({"steps": "abc"}, {"steps": 2.5}, {"super_resolution": "false"}):
        status, answer = post(server, "generate/generate", json.dumps({**SMALL, **wrong}))
        assert status == 500, answer  # as the README says
        assert "Traceback" not in answer["error"]
    assert ask_grpc(server, SMALL).as_numpy("image").shape == (1,)


def test_more_pictures_than_slots_are_refused_with_unavailable(server: EmbeddedServer) -> None:
    with grpc_client.InferenceServerClient(server.grpc_url) as client:
        inputs = grpc_inputs({**LONG, "num_images": SLOTS})
        call = client.async_infer("generate", inputs, lambda result, error: None)
        while metric(server, "closeup_slots_in_use") < SLOTS:
            time.sleep(0.02)
        with pytest.raises(InferenceServerException) as caught:
            ask_grpc(server, SMALL)
        assert caught.value.status() == "StatusCode.UNAVAILABLE"
        assert "UNAVAILABLE: 8 of 8 slots are taken" in caught.value.message()
        status, answer = post(server, "generate/infer", infer_body(SMALL))
        assert status == 503, answer
        call.cancel()
    wait_until_idle(server)
    assert ask_grpc(server, SMALL).as_numpy("image").shape == (1,)


def test_concurrent_requests_share_engine_calls(server: EmbeddedServer) -> None:
    before = [
        metric(server, f"closeup_{name}_total") for name in ("engine_calls", "sequence_steps")
    ]
    with ThreadPoolExecutor(SLOTS) as pool:
        seeds = range(SLOTS)
        answers = list(pool.map(lambda seed: ask_grpc(server, {**SMALL, "seed": seed,
                                                               "steps": 12}), seeds))  # fmt: skip
    after = [metric(server, f"closeup_{name}_total") for name in ("engine_calls", "sequence_steps")]
    calls, steps = after[0] - before[0], after[1] - before[1]
    assert steps == 12 * SLOTS
    assert calls < steps / 1.5
    assert len({answer.as_numpy("image")[0] for answer in answers}) == SLOTS


def engine_is_quiet(server: EmbeddedServer) -> bool:
    calls = metric(server, "closeup_engine_calls_total")
    time.sleep(0.4)  # several ticks of these sizes
    return metric(server, "closeup_engine_calls_total") == calls


@pytest.mark.parametrize("how", ["cancel", "deadline"])
def test_work_stops_when_a_grpc_client_gives_up(server: EmbeddedServer, how: str) -> None:
    with grpc_client.InferenceServerClient(server.grpc_url) as client:
        done = threading.Event()
        call = client.async_infer(
            "generate", grpc_inputs(LONG), lambda result, error: done.set(),
            client_timeout=1.0 if how == "deadline" else None,
        )  # fmt: skip
        while metric(server, "closeup_slots_in_use") == 0:
            time.sleep(0.02)
        if how == "cancel":
            call.cancel()
        assert done.wait(10)
    wait_until_idle(server)
    assert engine_is_quiet(server)


def test_work_stops_when_a_stream_is_closed(server: EmbeddedServer) -> None:
    body = json.dumps(LONG).encode()
    url = f"http://{server.http_url}/v2/models/generate_stream/generate_stream"
    with urllib.request.urlopen(urllib.request.Request(url, body), timeout=60) as stream:
        assert stream.readline().startswith(b"data:")
    wait_until_idle(server)
    assert engine_is_quiet(server)


def test_stream_reports_progress_and_ends_with_the_picture(server: EmbeddedServer) -> None:
    body = json.dumps({**SMALL, "steps": 12, "previews": True}).encode()
    url = f"http://{server.http_url}/v2/models/generate_stream/generate_stream"
    with urllib.request.urlopen(urllib.request.Request(url, body), timeout=60) as stream:
        lines = [line for line in stream.read().split(b"\n") if line.startswith(b"data: ")]
    events = [json.loads(line[6:]) for line in lines]
    progress = [json.loads(event["event"]) for event in events[:-1]]
    painting = [event for event in progress if event["stage"] == "generate"]
    steps = [event["step"] for event in painting]
    assert steps[0] == 0
    assert steps == sorted(steps)
    assert steps[-1] == 12
    assert all(event["steps"] == 12 for event in painting)
    previews = [event for event in events if "preview" in event]
    assert len(previews) == len(painting) - 1
    assert picture(previews[0]["preview"]).shape == (64, 64, 3)
    assert json.loads(events[-1]["event"]) == {"type": "result"}
    assert picture(events[-1]["image"]).shape == (64, 64, 3)


def test_previews_are_bytes_when_the_answer_is_raw(server: EmbeddedServer) -> None:
    fields = {**SMALL, "steps": 6, "previews": True}
    for encoding, starts in (("raw", b"\xff\xd8"), ("base64", b"/9j/")):
        found: list[bytes] = []
        done = threading.Event()

        def keep(
            result: Any, error: Any, found: list[bytes] = found, done: threading.Event = done
        ) -> None:
            if error is not None or result.as_numpy("image") is not None:
                done.set()
            elif result.as_numpy("preview") is not None:
                found.append(result.as_numpy("preview")[0])

        with grpc_client.InferenceServerClient(server.grpc_url) as client:
            client.start_stream(keep)
            client.async_stream_infer(
                "generate_stream", grpc_inputs({**fields, "response_encoding": encoding})
            )
            assert done.wait(60)
        assert found
        assert all(preview.startswith(starts) for preview in found)
    with Client(server.grpc_url) as client:
        events = list(client.stream(**fields))
    assert any(getattr(event, "preview", None) for event in events)


def test_server_limit_ends_a_request_whose_client_is_gone(
    demo_repository: Path,
) -> None:
    options = ServerOptions(
        repository=demo_repository, lora_dir=DEMO_LORAS, request_timeout_s=1,
        http_port=0, grpc_port=0, metrics_port=0,
    )  # fmt: skip
    with EmbeddedServer(options) as short:
        status, answer = post(short, "generate/infer", infer_body(LONG))
        assert status == 503
        assert "UNAVAILABLE: the request ran past the server's limit of 1 s" in answer["error"]
        wait_until_idle(short)


def test_client_lists_the_lora_folder_when_asked(server: EmbeddedServer) -> None:
    (path,) = DEMO_LORAS.glob("*.safetensors")
    ask_grpc(server, {**SMALL, "prompt": f"<lora:{path.stem}:1> a woman"})  # has it read
    for url in (f"grpc://{server.grpc_url}", f"http://{server.http_url}"):
        with Client(url) as client:
            for model in (None, "demo"):
                (lora,) = client.loras(model)
                assert (lora.id, lora.size_bytes) == (path.stem, path.stat().st_size)
                assert lora.networks is not None
                assert "denoiser" in lora.networks
            with pytest.raises(InvalidRequest, match=r"^model: got 'nope'; served are demo\.$"):
                client.loras("nope")
