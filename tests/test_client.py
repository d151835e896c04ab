"""The client package against fake servers of both protocols."""

from __future__ import annotations

import asyncio
import base64
import importlib.util
import io
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import aclosing
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from closeup_client import (
    FIELDS,
    Cancelled,
    Client,
    ClientError,
    DeadlineExceeded,
    InvalidRequest,
    Kind,
    Progress,
    Result,
    Served,
    ServedLora,
    ServedModel,
    ServerFailure,
    Unavailable,
    wire,
)
from closeup_client.checks import check_fields
from closeup_client.errors import error_from_message, problems_from_message
from closeup_client.pictures import png_from_array
from closeup_client.served import denoiser_from_served, loras_from_outputs
from PIL import Image

from tests.client_calls import (
    PROTOCOLS,
    both,
    connect,
    connect_async,
    run_generate,
    run_stream,
    unused_port,
)
from tests.fake_triton import EVENTS, LORAS, REFUSALS, FakeTriton, picture, serve_grpc, serve_http

CLIENT = Path(__file__).parents[1] / "client"


@pytest.fixture
def fake(request: pytest.FixtureRequest) -> Iterator[FakeTriton]:
    yield from (serve_grpc() if request.param == "grpc" else serve_http())


# --- generate and stream ----------------------------------------------------------------------


@both
def test_generate_returns_pictures_and_info_when_served(fake: FakeTriton, protocol: str) -> None:
    with connect(fake, protocol) as client:
        result = client.generate(prompt="Ă naïve 漢", num_images=2, seed=7, cfg_scale=7, steps="9")
    assert result.images == [picture(7), picture(8)]
    assert result.seeds == [7, 8]
    assert result.stages == []
    assert result.before_faces() is None
    model, fields = fake.requests[0]
    assert model == "generate"
    assert fields == {
        "prompt": "Ă naïve 漢".encode(),
        "num_images": 2,
        "seed": 7,
        "cfg_scale": 7.0,
        "steps": 9,
        "response_encoding": b"raw",
    }
    assert fake.headers[0]["authorization"] == "Bearer x"


@both
def test_stream_yields_progress_then_result_when_served(fake: FakeTriton, protocol: str) -> None:
    with connect(fake, protocol) as client:
        events = list(
            client.stream(prompt="a", seed=9, inpaint_faces=True, stages=True, previews=True)
        )
    progress = [event for event in events if isinstance(event, Progress)]
    assert [(event.stage, event.step, event.steps) for event in progress] == list(EVENTS)
    assert [event.eta_s for event in progress] == [1.5, None, None, None]
    assert progress[0].preview == b"\xff\xd8\xff small"
    assert progress[2].preview is None
    result = events[-1]
    assert isinstance(result, Result)
    assert len(events) == len(EVENTS) + 1
    assert result.images == [picture(9)]
    assert [stage.stage for stage in result.stages] == ["generated", "super_resolution"]
    assert result.before_faces() == picture(1)
    assert [face["action"] for face in result.faces()] == ["repaint", "skip"]
    assert fake.requests[0][0] == "generate_stream"


@both
def test_pictures_arrive_unchanged_when_sent_by_either_protocol(
    fake: FakeTriton, protocol: str
) -> None:
    data = bytes(range(256)) * 3
    with connect(fake, protocol) as client:
        client.generate(prompt="a", input_image=data)
        list(client.stream(prompt="a", input_image=data))
    assert fake.requests[0][1]["input_image"] == data
    streamed = fake.requests[1][1]["input_image"]
    assert (base64.b64decode(streamed) if protocol == "http" else streamed) == data


@both
def test_response_encoding_is_honoured_when_base64_is_asked(
    fake: FakeTriton, protocol: str
) -> None:
    with connect(fake, protocol) as client:
        result = client.generate(prompt="a", seed=3, response_encoding="base64", stages=True)
    assert fake.requests[0][1]["response_encoding"] == b"base64"
    assert result.images == [picture(3)]
    assert result.stages[0].data == picture(0)


@both
def test_client_serves_threads_when_shared(fake: FakeTriton, protocol: str) -> None:
    found: dict[int, bytes] = {}
    with connect(fake, protocol) as client:

        def work(seed: int) -> None:
            for event in client.stream(prompt="a", seed=seed):
                if isinstance(event, Result):
                    found[seed] = event.images[0]

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
    assert found == {seed: picture(seed) for seed in range(6)}


# --- errors -----------------------------------------------------------------------------------

REFUSED = [
    ("full", Unavailable, "UNAVAILABLE", "all 4 slots are taken; try again."),
    ("bad", InvalidRequest, "INVALID_ARG", "w: got 72; the demo takes up to 64. lora: is unknown."),
    ("broken", ServerFailure, "INTERNAL", "the server failed; its log names the cause under ab12."),
    ("lost model", ServerFailure, "NOT_FOUND", "Is this a closeup server?"),
]


@both
@pytest.mark.parametrize("run", [run_generate, run_stream])
@pytest.mark.parametrize(("prompt", "kind", "code", "text"), REFUSED)
def test_client_raises_the_servers_error_when_refused(
    fake: FakeTriton,
    protocol: str,
    run: Callable[[Client, str], Any],
    prompt: str,
    kind: type[ClientError],
    code: str,
    text: str,
) -> None:
    with connect(fake, protocol) as client, pytest.raises(ClientError) as caught:
        run(client, prompt)
    assert type(caught.value) is kind
    assert caught.value.code == code
    assert str(caught.value).endswith(text)


@both
def test_stream_fails_when_it_ends_without_a_result(fake: FakeTriton, protocol: str) -> None:
    with (
        connect(fake, protocol) as client,
        pytest.raises(ServerFailure, match="without a result"),
    ):
        list(client.stream(prompt="mute"))


@both
def test_generate_gives_up_when_the_time_limit_passes(fake: FakeTriton, protocol: str) -> None:
    with (
        connect(fake, protocol, timeout_s=0.3) as client,
        pytest.raises(DeadlineExceeded, match=r"within 0\.3 s"),
    ):
        client.generate(prompt="slow")
    if protocol == "grpc":  # a closed /infer connection is not reported by Triton, nor by the fake
        assert fake.left.wait(5)


@both
def test_stream_gives_up_when_the_time_limit_passes(fake: FakeTriton, protocol: str) -> None:
    with connect(fake, protocol, timeout_s=0.4) as client, pytest.raises(DeadlineExceeded):
        list(client.stream(prompt="slow"))
    assert fake.left.wait(5)


@both
def test_request_is_cancelled_when_the_iterator_is_closed(fake: FakeTriton, protocol: str) -> None:
    with connect(fake, protocol) as client:
        events = client.stream(prompt="slow")
        assert isinstance(next(events), Progress)
        assert not fake.left.is_set()
        events.close()
        assert fake.left.wait(5)


def test_problems_are_told_apart_when_a_message_names_fields() -> None:
    assert problems_from_message("steps: got 51; allowed are 1 to 50. w: got 7: no.") == {
        "steps": "got 51; allowed are 1 to 50.",
        "w": "got 7: no.",
    }
    assert problems_from_message("something: else") == {"something": "else"}
    assert problems_from_message("Bad input") == {"request": "Bad input"}
    assert type(error_from_message("CANCELLED: gone.")) is Cancelled
    assert error_from_message("TEAPOT_ERROR: hot.").code == "TEAPOT_ERROR"


# --- health and models ------------------------------------------------------------------------


@both
def test_models_lists_pipelines_when_asked(fake: FakeTriton, protocol: str) -> None:
    with connect(fake, protocol) as client:
        served = client.models()
    assert [(model.name, model.state) for model in served.pipelines] == [
        ("broken", "UNAVAILABLE"),
        ("demo", "READY"),
    ]
    assert served.pipelines[0].reason == "engine made elsewhere"
    assert (served.upscaler, served.face_detector) == ("READY", None)


@both
def test_health_tells_live_from_ready_when_models_load(fake: FakeTriton, protocol: str) -> None:
    with connect(fake, protocol) as client:
        ready = client.health()
        fake.is_ready = False
        loading = client.health()
    assert (ready.live, ready.ready, ready.server, ready.version) == (
        True,
        True,
        "triton",
        "2.51.0",
    )
    assert (loading.live, loading.ready) == (True, False)


# --- LoRAs ------------------------------------------------------------------------------------

SERVED_LORAS = (
    ServedLora(id="1795721", size_bytes=641_816, networks=("denoiser", "text_encoder")),
    ServedLora(id=str(LORAS[1]["id"]), size_bytes=12, networks=None),
)


def list_loras(fake: FakeTriton, protocol: str, model: str | None) -> tuple[ServedLora, ...]:
    with connect(fake, protocol) as client:
        return client.loras(model)


def list_loras_async(fake: FakeTriton, protocol: str, model: str | None) -> tuple[ServedLora, ...]:
    async def work() -> tuple[ServedLora, ...]:
        async with connect_async(fake, protocol) as client:
            return await client.loras(model)

    return asyncio.run(work())


both_kinds = pytest.mark.parametrize("lister", [list_loras, list_loras_async])
Lister = Callable[[FakeTriton, str, str | None], tuple[ServedLora, ...]]


@both
@both_kinds
@pytest.mark.parametrize("model", [None, "demo"])
def test_loras_lists_the_folder_when_asked(
    fake: FakeTriton, protocol: str, lister: Lister, model: str | None
) -> None:
    assert lister(fake, protocol, model) == SERVED_LORAS
    assert fake.requests == [("demo_denoiser", {"operation": b"loras"})]
    assert fake.headers[0]["authorization"] == "Bearer x"


@both
@both_kinds
@pytest.mark.parametrize(
    ("model", "kind", "sentence"),
    [
        ("nope", InvalidRequest, "model: got 'nope'; served are broken, demo."),
        ("broken", Unavailable, "the model broken is not ready: engine made elsewhere."),
    ],
)
def test_loras_says_one_sentence_when_the_model_is_not_served(
    fake: FakeTriton,
    protocol: str,
    lister: Lister,
    model: str,
    kind: type[ClientError],
    sentence: str,
) -> None:
    with pytest.raises(kind) as caught:
        lister(fake, protocol, model)
    assert str(caught.value) == sentence
    assert fake.requests == []


@both
@both_kinds
def test_loras_fails_when_no_pipeline_is_served(
    fake: FakeTriton, protocol: str, lister: Lister
) -> None:
    fake.index = (("upscaler", "READY", ""),)
    with pytest.raises(ServerFailure, match="serves no pipeline") as caught:
        lister(fake, protocol, None)
    assert caught.value.code == "NOT_FOUND"


@both
@both_kinds
def test_loras_passes_the_servers_error_on_when_the_model_has_gone(
    fake: FakeTriton, protocol: str, lister: Lister
) -> None:
    fake.refused = REFUSALS["broken"]
    with pytest.raises(ServerFailure) as caught:
        lister(fake, protocol, None)
    assert str(caught.value) == "the server failed; its log names the cause under ab12."


@pytest.mark.parametrize(
    "text", ["", "{", "{}x", "3", '["a"]', '[{"id": "a"}]', '[{"id": "a", "bytes": "many"}]']
)
def test_lora_list_is_refused_when_it_is_damaged(text: str) -> None:
    with pytest.raises(ServerFailure, match="no list of LoRAs"):
        loras_from_outputs({"loras": [text.encode()]})
    with pytest.raises(ServerFailure, match="no list of LoRAs"):
        loras_from_outputs({"ticket": []})


def test_lora_list_is_empty_when_the_folder_is() -> None:
    assert loras_from_outputs({"loras": [b"[]"]}) == ()


def test_first_ready_pipeline_is_asked_when_no_model_is_given() -> None:
    loading, ready, other = (
        ServedModel(name=name, state=state)
        for name, state in (("a", "LOADING"), ("b", "READY"), ("c", "READY"))
    )
    served = Served(pipelines=(loading, ready, other), parts=(), upscaler=None, face_detector=None)
    assert denoiser_from_served(served, None) == "b_denoiser"
    assert denoiser_from_served(served, "c") == "c_denoiser"
    alone = Served(pipelines=(loading,), parts=(), upscaler=None, face_detector=None)
    with pytest.raises(Unavailable, match=r"^the model a is not ready: LOADING\.$"):
        denoiser_from_served(alone, None)


# --- asyncio ----------------------------------------------------------------------------------


@both
def test_async_client_does_the_same_when_awaited(fake: FakeTriton, protocol: str) -> None:
    async def work() -> tuple[list[Result], list[Progress | Result], bool, int]:
        async with connect_async(fake, protocol) as client:
            many = await asyncio.gather(*(client.generate(prompt="a", seed=s) for s in range(4)))
            events = [event async for event in client.stream(prompt="a", seed=9, num_images=2)]
            served = await client.models()
            return many, events, (await client.health()).ready, len(served.pipelines)

    many, events, ready, pipelines = asyncio.run(work())
    assert [result.images for result in many] == [[picture(seed)] for seed in range(4)]
    assert [type(event) for event in events] == [Progress] * len(EVENTS) + [Result]
    assert isinstance(events[-1], Result)
    assert events[-1].images == [picture(9), picture(10)]
    assert ready
    assert pipelines == 2
    assert fake.headers[0]["authorization"] == "Bearer x"


@both
@pytest.mark.parametrize(("prompt", "kind", "code", "text"), REFUSED)
def test_async_client_raises_the_servers_error_when_refused(
    fake: FakeTriton, protocol: str, prompt: str, kind: type[ClientError], code: str, text: str
) -> None:
    async def work() -> list[ClientError]:
        caught = []
        async with connect_async(fake, protocol) as client:
            try:
                await client.generate(prompt=prompt)
            except ClientError as error:
                caught.append(error)
            try:
                async for _ in client.stream(prompt=prompt):
                    pass
            except ClientError as error:
                caught.append(error)
        return caught

    caught = asyncio.run(work())
    assert [(type(error), error.code) for error in caught] == [(kind, code)] * 2
    assert all(str(error).endswith(text) for error in caught)


@both
def test_async_stream_fails_when_it_ends_without_a_result(fake: FakeTriton, protocol: str) -> None:
    async def work() -> None:
        async with connect_async(fake, protocol) as client:
            async for event in client.stream(prompt="mute"):
                assert isinstance(event, Progress)

    with pytest.raises(ServerFailure, match="without a result"):
        asyncio.run(work())


@both
def test_async_stream_is_cancelled_when_closed(fake: FakeTriton, protocol: str) -> None:
    async def work() -> bool:
        async with connect_async(fake, protocol) as client:
            async with aclosing(client.stream(prompt="slow")) as events:
                async for _ in events:
                    break
            return await asyncio.to_thread(fake.left.wait, 5)

    assert asyncio.run(work())


@both
def test_async_generate_gives_up_when_the_time_limit_passes(
    fake: FakeTriton, protocol: str
) -> None:
    async def work() -> None:
        async with connect_async(fake, protocol, timeout_s=0.3) as client:
            await client.generate(prompt="slow")

    with pytest.raises(DeadlineExceeded):
        asyncio.run(work())


def test_async_generate_is_cancelled_when_its_task_is() -> None:
    async def work(fake: FakeTriton) -> bool:
        async with connect_async(fake, "grpc") as client:
            task = asyncio.create_task(client.generate(prompt="slow"))
            while not fake.requests:
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            return await asyncio.to_thread(fake.left.wait, 5)

    for fake in serve_grpc():
        assert asyncio.run(work(fake))


# --- checks -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("steps", "abc", "got 'abc'; expected an integer from 1 to 50."),
        ("steps", 2.5, "got 2.5; expected an integer from 1 to 50."),
        ("steps", True, "got True; expected an integer from 1 to 50."),
        ("steps", 0, "got 0; expected an integer from 1 to 50."),
        ("steps", 51, "got 51; expected an integer from 1 to 50."),
        (
            "steps",
            None,
            "got None; expected an integer from 1 to 50. Leave it out for the default.",
        ),
        ("steps", [4], "got a value of type list; expected an integer from 1 to 50."),
        ("w", 250, "got 250; expected a multiple of 8 from 64 to 2048."),
        ("h", 2056, "got 2056; expected a multiple of 8 from 64 to 2048."),
        ("num_images", 9, "got 9; expected an integer from 1 to 8."),
        ("seed", 2**32, "got 4294967296; expected an integer from 0 to 4294967295."),
        ("cfg_scale", 15.5, "got 15.5; expected a number from 0 to 15."),
        ("cfg_scale", float("nan"), "got nan; expected a number from 0 to 15."),
        ("cfg_scale", False, "got False; expected a number from 0 to 15."),
        ("super_resolution", 1, "got 1; expected true or false."),
        ("super_resolution", "yes", "got 'yes'; expected true or false."),
        ("face_order", "size", "got 'size'; expected one of area, left_right, center, score."),
        ("prompt", 7, "got 7; expected text of 1 to 4000 characters."),
        ("prompt", "  ", "is empty; expected text of 1 to 4000 characters."),
        ("prompt", "a" * 4001, "has 4001 characters; expected text of 1 to 4000 characters."),
        ("prompt", "a\0", "contains a NUL character; leave it out."),
        ("prompt", "\udcff", "holds a lone surrogate; expected text that UTF-8 can carry."),
        ("input_image", b"", "is an empty picture; expected PNG, JPEG or WebP."),
        ("step", 4, "is no request field; did you mean 'steps'?"),
        ("input_image_url", "x", "is no request field; send the picture itself in input_image."),
    ],
)
def test_check_names_field_and_range_when_a_value_is_wrong(
    field: str, value: Any, sentence: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_fields({"prompt": "a", field: value})
    assert caught.value.problems == {field: sentence}
    assert str(caught.value) == f"{field}: {sentence}"
    assert caught.value.code == "INVALID_ARG"


def test_check_reports_every_problem_when_there_are_several() -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_fields({"steps": 0, "response_encoding": "base46", "model": "m"})
    assert list(caught.value.problems) == ["steps", "response_encoding", "prompt"]
    assert caught.value.problems["response_encoding"].endswith("Did you mean 'base64'?")


def test_check_accepts_both_sides_when_a_field_has_limits() -> None:
    for field in FIELDS:
        if field.kind not in (Kind.INT, Kind.FLOAT):
            continue
        assert field.minimum is not None
        assert field.maximum is not None
        step = field.multiple_of or 1
        for bound, outside in ((field.minimum, -step), (field.maximum, step)):
            value = int(bound) if field.kind is Kind.INT else bound
            assert check_fields({"prompt": "a", field.name: value})[field.name] == value
            with pytest.raises(InvalidRequest, match=field.name):
                check_fields({"prompt": "a", field.name: value + outside})


def test_check_reads_text_and_numpy_when_forms_or_arrays_send_them() -> None:
    given = {
        "prompt": "a",
        "super_resolution": "false",
        "inpaint_faces": "True",
        "stages": np.bool_(True),
        "seed": np.int64(5),
        "steps": "12",
        "cfg_scale": "7.1",
        "denoising_strength": np.float32(0.5),
    }
    values = check_fields(given)
    assert values["super_resolution"] is False
    assert values["inpaint_faces"] is True
    assert values["stages"] is True
    assert (values["seed"], values["steps"], values["cfg_scale"]) == (5, 12, 7.1)
    assert values["denoising_strength"] == 0.5


def test_check_takes_pictures_when_given_as_file_pil_or_array(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    path = tmp_path / "a.png"
    Image.fromarray(pixels).save(path)
    for given in (path.read_bytes(), path, Image.fromarray(pixels), pixels):
        data = check_fields({"prompt": "a", "input_image": given})["input_image"]
        assert isinstance(data, bytes)
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), pixels)
    refused: list[tuple[Any, str]] = [
        (tmp_path / "none.png", "no such file"),
        (str(path), "expected a picture"),
        (pixels.astype(np.float32), "float32; expected"),
        (pixels[..., :2], "expected"),
        (pixels[:0], "expected"),
    ]
    for wrong, why in refused:
        with pytest.raises(InvalidRequest, match=rf"mask_image: .*{why}"):
            check_fields({"prompt": "a", "mask_image": wrong})


@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 1), (3, 4, 3), (3, 4, 4)])
def test_png_holds_the_pixels_when_made_from_an_array(shape: tuple[int, ...]) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, shape, np.uint8)
    read = np.asarray(Image.open(io.BytesIO(png_from_array(pixels))))
    assert np.array_equal(read, pixels.squeeze() if shape[-1] == 1 else pixels)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_nothing_is_sent_when_a_field_is_wrong(protocol: str) -> None:
    client = Client(f"127.0.0.1:{unused_port()}", protocol)
    with pytest.raises(InvalidRequest):
        client.generate(prompt="a", steps="abc")
    with pytest.raises(InvalidRequest):
        client.stream(prompt="a", steps="abc")


def test_stream_refuses_raw_when_the_protocol_is_text() -> None:
    with pytest.raises(InvalidRequest, match="response_encoding: got 'raw'"):
        Client(protocol="http").stream(prompt="a", response_encoding="raw")


# --- bytes and files --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "length"),
    [
        (b"<html>", None),
        (b"[]", None),
        (b"{}", None),
        (
            b'{"outputs": [{"name": "image", "parameters": {"binary_data_size": 9}}]}\x05\0\0\0ab',
            71,
        ),
        (
            b'{"outputs": [{"name": "image", "parameters": {"binary_data_size": 6}}]}\x05\0\0\0ab',
            71,
        ),
    ],
)
def test_answer_is_refused_when_it_is_damaged(body: bytes, length: int | None) -> None:
    with pytest.raises(ServerFailure):
        wire.outputs_from_http(body, length)


def test_save_names_every_file_when_there_are_stages(tmp_path: Path) -> None:
    for fake in serve_grpc():
        with connect(fake, "grpc") as client:
            one = client.generate(prompt="a", stages=True, inpaint_faces=True)
            two = client.generate(prompt="a", stages=True, num_images=2)
    names = [path.name for path in one.save(tmp_path / "one")]
    assert names == ["picture.png", "generated.png", "before_faces.png", "info.json"]
    assert (tmp_path / "one/before_faces.png").read_bytes() == picture(1)
    assert json.loads((tmp_path / "one/info.json").read_text()) == one.info
    names = [path.name for path in two.save(tmp_path / "two")]
    assert names[:4] == ["picture_0.png", "picture_1.png", "generated_0.png", "generated_1.png"]
    assert names[4:] == ["super_resolution_0.png", "super_resolution_1.png", "info.json"]
    assert (tmp_path / "two/super_resolution_1.png").read_bytes() == picture(3)
    assert [image.size for image in two.pil()] == [(32, 40), (32, 40)]


# --- the package ------------------------------------------------------------------------------


def _generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_fields", CLIENT / "generate_fields.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_fields_equal_the_servers_when_generated_again() -> None:
    written = (CLIENT / "closeup_client" / "fields.py").read_text(encoding="utf-8")
    assert written == _generator().source_from_fields(), "run python client/generate_fields.py"


def test_package_loads_neither_server_nor_pillow_when_imported() -> None:
    code = (
        "import sys, closeup_client, closeup_client.cli; "
        "print([m for m in ('closeup', 'torch', 'PIL', 'cv2', 'gevent') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert run.stdout.strip() == "[]", run.stderr
