"""The glue to Triton, over a fake of Triton's own module."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import numpy as np
import pytest

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
