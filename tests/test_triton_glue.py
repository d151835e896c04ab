"""The glue to Triton, over a fake of Triton's own module."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from closeup.engines import EngineOptions, TensorSpec
from closeup.errors import CloseupError, ModelError, RequestError, UnavailableError
from tests.fake_pb_utils import imported, make_module


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
