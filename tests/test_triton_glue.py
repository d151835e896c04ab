"""The glue to Triton, over a fake of Triton's own module."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from closeup.engines import EngineOptions, TensorSpec
from closeup.errors import CloseupError, ModelError, RequestError, UnavailableError
from tests.fake_pb_utils import Sender, imported, make_module


def test_answers_of_a_model_on_the_gpu_come_in_memory_that_numpy_reads() -> None:
    module = make_module()
    with imported("closeup.triton_glue", module) as glue:
        call = glue.TritonModels().infer("vae", {"x": np.arange(3, dtype=np.float32)}, ["y"])
        answers = asyncio.run(call)
    np.testing.assert_array_equal(answers["y"], np.array([0, 2, 4], np.float32))
    # The model itself would leave them where numpy cannot read them.
    request = module.InferenceRequest(
        model_name="vae",
        inputs=[module.Tensor("x", np.zeros(1, np.float32))],
        requested_output_names=["y"],
    )
    (left,) = asyncio.run(request.async_exec()).output_tensors()
    with pytest.raises(RuntimeError, match="stored in GPU"):
        left.as_numpy()


def instance(kind: str, device: int, **group: Any) -> dict[str, str]:
    """What Triton gives to `initialize`."""
    return {
        "model_name": "portrait_denoiser",
        "model_instance_kind": kind,
        "model_instance_device_id": str(device),
        "model_config": json.dumps({"instance_group": [{"count": 1, "gpus": [], **group}]}),
    }


def test_denoiser_runs_on_the_gpu_that_triton_names_and_on_one_alone() -> None:
    module = make_module()
    with imported("closeup.denoiser_model", module) as model:
        assert model._device_id(instance("GPU", 2)) == 2
        assert model._device_id(instance("CPU", 0)) == 0
        model._check_alone(instance("GPU", 2, gpus=[2]))
        model._check_alone(instance("CPU", 0))
        for group in ({"gpus": [0, 1]}, {"count": 2}):
            with pytest.raises(
                module.TritonModelException,
                match="portrait_denoiser would run as 2 processes.*give the container one GPU",
            ):
                model._check_alone(instance("GPU", 0, **group))


@pytest.mark.parametrize(
    ("file", "kind", "device", "expected"),
    [
        ("model.onnx", "GPU", "auto", True),
        ("model.onnx", "GPU", "cpu", False),
        ("model.onnx", "GPU", "cuda", True),
        ("model.onnx", "CPU", "auto", False),
        ("model.onnx", "CPU", "cuda", True),  # the embedded server places everything on the CPU
        ("model.plan", "GPU", "cpu", True),  # a plan runs on a GPU only
    ],
)
def test_served_graph_runs_where_the_environment_says(
    file: str, kind: str, device: str, expected: bool,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    (tmp_path / file).touch()
    monkeypatch.setenv("CLOSEUP_DEVICE", device)
    opened = open_backend(file, kind, tmp_path)
    assert [(options.use_cuda, options.device_id) for options in opened] == [
        (expected, 1 if kind == "GPU" else 0)
    ]


def open_backend(file: str, kind: str, folder: Path) -> list[EngineOptions]:
    """Have a backend open its engine; returns the options that it opened it with."""
    module = make_module()
    module.get_model_dir = lambda: str(folder)
    opened: list[EngineOptions] = []
    listed = [{"name": "x", "data_type": "TYPE_FP32", "dims": [2]}]
    spec = TensorSpec(name="x", dtype=np.dtype(np.float32), shape=("B", 2))
    engine = SimpleNamespace(inputs=(spec,), outputs=(spec,))
    with imported("closeup.engine_backend", module) as backends:

        class Backend(backends.EngineBackend):  # type: ignore[misc, name-defined]
            model_file = file

            def open(self, path: Path, options: EngineOptions) -> Any:
                opened.append(options)
                return engine

        arguments = {
            "model_config": json.dumps({"max_batch_size": 2, "input": listed, "output": listed}),
            "model_instance_kind": kind,
            "model_instance_device_id": "1",
            "model_instance_name": "vae_0",
        }
        backend = Backend()
        backend.initialize(arguments)
    return opened


@pytest.mark.parametrize(
    ("message", "kind", "text"),
    [
        ("INVALID_ARG: prompt: the LoRA 'x' is damaged.", RequestError, "prompt: the LoRA"),
        ("INVALID_ARG: num_images: got 9; ask for fewer.", RequestError, "num_images: got 9"),
        ("INVALID_ARG: vae: input x is float32 (1,); expected (2,).", ModelError, "vae failed"),
        ("INTERNAL: vae: the run failed on x (1, 4).", ModelError, "the run failed"),
        ("UNAVAILABLE: 16 of 16 slots are taken.", UnavailableError, "slots"),
        ("Triton's own words", ModelError, "Triton's own words"),
    ],
)
def test_an_engines_refusal_is_the_clients_fault_only_when_it_names_a_request_field(
    message: str, kind: type[CloseupError], text: str
) -> None:
    with imported("closeup.triton_glue", make_module()) as glue:
        error = glue.error_from_message("vae", message)
    assert type(error) is kind
    assert text in str(error)


def test_client_is_answered_when_its_pictures_find_no_room() -> None:
    sender = Sender(room=100)
    request = SimpleNamespace(get_response_sender=lambda: sender)
    with imported("closeup.triton_glue", make_module()) as glue:
        reply = glue.Reply(request, limit_s=60)
        reply.finish({"image": np.zeros(1000, np.uint8)})
        reply.fail(RuntimeError("again"))  # the one answer was sent
    ((response, flags),) = sender.sent
    assert flags == 1
    assert response.error is not None
    assert response.error.text.startswith("INTERNAL: the server failed; its log names the cause")
    assert reply.closed


def test_client_is_answered_when_the_sentence_holds_half_a_character() -> None:
    sender = Sender(room=100)
    request = SimpleNamespace(get_response_sender=lambda: sender)
    with imported("closeup.triton_glue", make_module()) as glue:
        glue.Reply(request, limit_s=60).fail(RequestError({"prompt": "the LoRA \ud800 is odd."}))
    ((response, _),) = sender.sent
    assert response.error is not None
    assert response.error.text == "INVALID_ARG: prompt: the LoRA ? is odd."


def test_watchdog_answers_the_others_when_one_cannot_be_answered() -> None:
    good, broken = Sender(room=100), Sender(room=-1)  # not even an error goes through
    with imported("closeup.triton_glue", make_module()) as glue:
        glue.WATCH_INTERVAL_S = 0.01
        watchdog = glue.Watchdog()
        for sender in (broken, good):
            request = SimpleNamespace(get_response_sender=lambda sender=sender: sender)
            watchdog.guard(glue.Reply(request, limit_s=0))
        deadline = time.monotonic() + 10
        while not good.sent and time.monotonic() < deadline:
            time.sleep(0.01)
        late = glue.Reply(SimpleNamespace(get_response_sender=lambda: good), limit_s=0)
        watchdog.guard(late)
        while len(good.sent) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        watchdog.close()
    assert len(good.sent) == 2


def test_a_call_between_models_is_unavailable_when_triton_is_stopping() -> None:
    with imported("closeup.triton_glue", make_module()) as glue:
        error = glue.error_from_message(
            "demo_denoiser", "Model demo_denoiser - Error when running inference: Server not ready"
        )
    assert type(error) is UnavailableError
