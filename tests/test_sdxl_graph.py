"""SDXL's denoiser in ONNX Runtime: against plain diffusers, its LoRAs, its extra inputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from export.unet import pooled_width
from tests.step_reference import Array, ExportedStep, fuse, reference_step, relative, single
from tests.tiny_pipelines import POOLED, TOKENS, make_tiny_xl_unet

SIZES = {
    "batch": 2, "rows": 4, "height": 8, "width": 12, "tokens": TOKENS, "adapters": 3, "rank": 3,
}  # fmt: skip


class Exported(ExportedStep):
    def draw(self, seed: int = 0, **sizes: int) -> dict[str, Array]:
        return self.inputs(seed, {**SIZES, **sizes})

    def reference(self, inputs: dict[str, Array], unet: Any) -> Array:
        def predict(x: Array, row: dict[str, Array]) -> Array:
            with torch.no_grad():
                net = unet(
                    torch.tensor(x)[None],
                    torch.tensor(row["timestep"]),
                    torch.tensor(row["context"])[None],
                    added_cond_kwargs={
                        "text_embeds": torch.tensor(row["pooled"])[None],
                        "time_ids": torch.tensor(row["time_ids"])[None],
                    },
                ).sample[0]
            result: Array = net.numpy()
            return result

        return reference_step(inputs, predict)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("denoiser") / "model.onnx"
    return Exported(make_tiny_xl_unet(), path, max_tokens=TOKENS)


# Float32 rounding through the network gives 1e-6; positions off by one, a missing input or a zero
# give more than 1e-2.
CLOSE = 2e-5


@pytest.mark.parametrize(
    ("batch", "rows", "height", "width", "tokens"),
    [(2, 4, 8, 12, TOKENS), (1, 1, 7, 9, TOKENS), (3, 5, 5, 14, 2 * TOKENS)],
)
def test_sdxl_denoiser_equals_diffusers_at_every_shape(
    exported: Exported, batch: int, rows: int, height: int, width: int, tokens: int
) -> None:
    inputs = exported.draw(batch=batch, rows=rows, height=height, width=width, tokens=tokens)
    inputs["lora_row"][:] = 0
    expected = exported.reference(inputs, exported.model)
    assert relative(exported.run(inputs), expected) < CLOSE
    assert relative(np.zeros_like(expected), expected) > 100 * CLOSE


@pytest.mark.parametrize("name", ["pooled", "time_ids"])
def test_sdxl_denoiser_follows_its_extra_inputs(exported: Exported, name: str) -> None:
    inputs = exported.draw(seed=1)
    inputs["lora_row"][:] = 0
    changed = {**inputs, name: inputs[name][::-1].copy()}
    expected = exported.reference(changed, exported.model)
    assert relative(exported.run(changed), expected) < CLOSE
    assert relative(exported.run(inputs), expected) > 100 * CLOSE


def test_sdxl_denoiser_equals_fused_weights_when_a_lora_is_used(exported: Exported) -> None:
    inputs = exported.draw(seed=2)
    inputs["lora_row"][:] = 2
    fused = fuse(exported.model, exported.layers, inputs["lora"][2])
    assert relative(exported.run(inputs), exported.reference(inputs, fused)) < CLOSE
    assert relative(exported.run(inputs), exported.reference(inputs, exported.model)) > 100 * CLOSE


def test_sdxl_denoiser_result_is_the_same_when_batch_mates_change(exported: Exported) -> None:
    inputs = exported.draw(seed=3, batch=3, rows=6)
    together = exported.run(inputs)
    for b in range(3):
        # The same sums in another order of threads and tiles.
        assert relative(together[b : b + 1], exported.run(single(inputs, b))) < 1e-5


def test_pooled_width_is_what_the_time_ids_leave() -> None:
    assert pooled_width(make_tiny_xl_unet()) == POOLED
