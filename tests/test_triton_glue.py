"""The glue to Triton, over a fake of Triton's own module."""

from __future__ import annotations

import asyncio

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
