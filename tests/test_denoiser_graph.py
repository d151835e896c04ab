"""The denoiser's graph in ONNX Runtime: against plain diffusers, its LoRAs, its batch mates."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel

from closeup.errors import ExportError
from export.denoiser import denoiser_graph
from export.unet import refuse_other_unets
from tests.step_reference import Array, ExportedStep, fuse, reference_step, relative, single
from tests.tiny_pipelines import CONTEXT, TOKENS, make_tiny_unet

SIZES = {
    "batch": 2, "rows": 4, "height": 8, "width": 12, "tokens": TOKENS, "adapters": 3, "rank": 3,
}  # fmt: skip


class Exported(ExportedStep):
    """A tiny denoiser in ONNX Runtime beside the UNet it came from."""

    def draw(self, seed: int = 0, **sizes: int) -> dict[str, Array]:
        return self.inputs(seed, {**SIZES, **sizes})

    def reference(self, inputs: dict[str, Array], unet: Any) -> Array:
        def predict(x: Array, row: dict[str, Array]) -> Array:
            with torch.no_grad():
                net = unet(
                    torch.tensor(x)[None],
                    torch.tensor(row["timestep"]),
                    torch.tensor(row["context"])[None],
                ).sample[0]
            result: Array = net.numpy()
            return result

        return reference_step(inputs, predict)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("denoiser") / "model.onnx"
    return Exported(make_tiny_unet(), path, max_tokens=TOKENS)


# Float32 rounding through the network gives 1e-6; a step whose matrix row is off by one, a mask
# left out or a zero gives more than 1e-1.
CLOSE = 2e-5


@pytest.mark.parametrize(("height", "width"), [(8, 12), (7, 9), (8, 8), (5, 14)])
def test_denoiser_equals_diffusers_when_no_lora_is_used(
    exported: Exported, height: int, width: int
) -> None:
    inputs = exported.draw(height=height, width=width)
    inputs["lora_row"][:] = 0
    expected = exported.reference(inputs, exported.model)
    assert relative(exported.run(inputs), expected) < CLOSE
    shifted = {**inputs, "step": np.roll(inputs["step"], 1, axis=2)}
    assert relative(exported.run(shifted), expected) > 100 * CLOSE
    assert relative(np.zeros_like(expected), expected) > 100 * CLOSE


def test_denoiser_equals_fused_weights_when_a_lora_is_used(exported: Exported) -> None:
    inputs = exported.draw(seed=1)
    inputs["lora_row"][:] = 2
    fused = fuse(exported.model, exported.layers, inputs["lora"][2])
    expected = exported.reference(inputs, fused)
    got = exported.run(inputs)
    assert relative(got, expected) < CLOSE
    # The LoRA is not a matter of rounding.
    assert relative(got, exported.reference(inputs, exported.model)) > 100 * CLOSE


def test_denoiser_adapts_every_linear_and_pointwise_layer(exported: Exported) -> None:
    expected = [
        name
        for name, module in exported.model.named_modules()
        if isinstance(module, torch.nn.Linear)
        or (isinstance(module, torch.nn.Conv2d) and module.kernel_size == (1, 1))
    ]
    assert [layer.name for layer in exported.layers] == expected
    assert any(name.endswith("proj_in") for name in expected)
    assert any(name.endswith("conv_shortcut") for name in expected)


def test_denoiser_result_is_the_same_when_batch_mates_change(exported: Exported) -> None:
    inputs = exported.draw(seed=2, batch=3, rows=6)
    together = exported.run(inputs)
    for b in range(3):
        alone = exported.run(single(inputs, b))
        # The same sums in another order of threads and tiles.
        assert relative(together[b : b + 1], alone) < 1e-5
    assert relative(together[:1], together[1:2]) > 1e-2


def test_denoiser_leaves_mates_untouched_when_a_lora_gives_nan(exported: Exported) -> None:
    inputs = exported.draw(seed=3, batch=3, rows=6)
    inputs["lora_row"] = np.array([0, 1, 2, 0, 1, 2])
    before = exported.run(inputs)
    poisoned = {**inputs, "lora": inputs["lora"].copy()}
    poisoned["lora"][1] = np.nan
    after = exported.run(poisoned)
    assert np.isfinite(before).all()
    assert np.isnan(after[1, 0]).any()
    np.testing.assert_array_equal(after[[0, 2]], before[[0, 2]])


def test_denoiser_leaves_mates_untouched_when_a_sample_overflows(exported: Exported) -> None:
    inputs = exported.draw(seed=4, batch=2, rows=4)
    before = exported.run(inputs)
    poisoned = {**inputs, "sample": inputs["sample"].copy(), "memory": inputs["memory"].copy()}
    poisoned["sample"][0] = np.inf
    poisoned["memory"][0] = np.nan
    after = exported.run(poisoned)
    assert not np.isfinite(after[0]).all()
    np.testing.assert_array_equal(after[1], before[1])


def test_denoiser_keeps_known_latents_when_the_mask_is_zero(exported: Exported) -> None:
    inputs = exported.draw(seed=5)
    inputs["mask"][:] = 0
    weights = inputs["known_step"][:, :, None, None, None]
    expected = weights[:, 0] * inputs["known"] + weights[:, 1] * inputs["known_noise"]
    # Two products and a sum in float32.
    np.testing.assert_allclose(exported.run(inputs)[:, 0], expected, rtol=0, atol=1e-6)


def test_export_graph_records_its_checks(exported: Exported) -> None:
    component = exported.component
    assert 0 < component.max_rel_error < 1e-4
    assert any("height 17, width 22" in check for check in component.checks)
    assert len(component.checks) >= 4


def test_denoiser_has_no_lora_inputs_when_rank_is_zero() -> None:
    graph = denoiser_graph(
        make_tiny_unet(), max_tokens=TOKENS, max_rank=0, max_batch=2, precision="fp32"
    )
    assert not {"lora", "lora_row"} & {tensor.name for tensor in graph.inputs}
    with torch.no_grad():
        out = graph.module(**graph.draw(graph.cases[0], 0))
    assert torch.isfinite(out["next_sample"]).all()


def test_denoiser_keeps_the_samplers_maths_in_float32_when_network_is_half() -> None:
    graph = denoiser_graph(
        make_tiny_unet().half(), max_tokens=TOKENS, max_rank=2, max_batch=2, precision="fp16"
    )
    inputs = graph.draw(graph.cases[0], 0)
    inputs["guidance"][:] = 0
    with torch.no_grad():
        result = graph.module(**inputs)["next_memory"]
    state = torch.cat([inputs["sample"][:, None], inputs["memory"], inputs["noise"][:, None]], 1)
    expected = torch.einsum("bij,bjchw->bichw", inputs["step"][:, 1:, [0, 2, 3, 4]], state)
    assert inputs["lora"].dtype == torch.float16
    assert result.dtype == torch.float32
    # Float16 anywhere in this sum would leave 1e-3.
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)


def test_refuse_other_unets_names_the_reason_when_unet_is_an_inpainting_one() -> None:
    unet = UNet2DConditionModel(
        in_channels=9,
        block_out_channels=(8, 8),
        norm_num_groups=8,
        cross_attention_dim=CONTEXT,
        attention_head_dim=1,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    with pytest.raises(ExportError, match="9 to 4 channels"):
        refuse_other_unets(unet)
