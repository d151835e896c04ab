"""FLUX.1's denoiser in ONNX Runtime: against plain diffusers, its LoRAs, packing, positions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxPosEmbed
from torch import nn

from export.denoiser import denoiser_graph
from export.flux import PlainRmsNorm, RotaryTables, pack, picture_positions, rotate, unpack
from tests.step_reference import Array, ExportedStep, fuse, reference_step, relative, single
from tests.tiny_pipelines import make_tiny_flux_transformer

TOKENS = 12
SIZES = {
    "batch": 2, "rows": 2, "height": 6, "width": 10, "tokens": TOKENS, "adapters": 3, "rank": 3,
}  # fmt: skip


class Exported(ExportedStep):
    def draw(self, seed: int = 0, **sizes: int) -> dict[str, Array]:
        return self.inputs(seed, {**SIZES, **sizes})

    def reference(self, inputs: dict[str, Array], transformer: Any) -> Array:
        def predict(x: Array, row: dict[str, Array]) -> Array:
            return flux_prediction(transformer, x, row)

        return reference_step(inputs, predict)


def flux_prediction(transformer: FluxTransformer2DModel, x: Array, row: dict[str, Array]) -> Array:
    """The velocity as FluxPipeline computes it, with the pipeline's own packing."""
    channels, height, width = x.shape
    latents = torch.tensor(x)[None]
    packed = FluxPipeline._pack_latents(latents, 1, channels, height, width)
    ids = FluxPipeline._prepare_latent_image_ids(1, height // 2, width // 2, "cpu", torch.float32)
    guided = transformer.config.guidance_embeds
    with torch.no_grad():
        velocity = transformer(
            hidden_states=packed,
            timestep=torch.tensor(row["timestep"])[None] / 1000,
            guidance=torch.tensor(row["guidance_embed"])[None] if guided else None,
            pooled_projections=torch.tensor(row["pooled"])[None],
            encoder_hidden_states=torch.tensor(row["context"])[None],
            txt_ids=torch.zeros(len(row["context"]), 3),
            img_ids=ids,
        ).sample
    unpacked = FluxPipeline._unpack_latents(velocity, height * 8, width * 8, 8)
    result: Array = unpacked[0].numpy()
    return result


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("denoiser") / "model.onnx"
    return Exported(make_tiny_flux_transformer(), path, max_tokens=TOKENS)


# Float32 rounding through the network gives 1e-6; positions off by one, a missing input or a zero
# give more than 1e-2.
CLOSE = 2e-5


@pytest.mark.parametrize(
    ("batch", "height", "width", "tokens"),
    [(3, 6, 10, TOKENS), (1, 4, 4, 3), (2, 16, 2, 40), (2, 2, 18, 512)],
)
def test_flux_denoiser_equals_diffusers_at_every_shape(
    exported: Exported, batch: int, height: int, width: int, tokens: int
) -> None:
    inputs = exported.draw(batch=batch, rows=batch, height=height, width=width, tokens=tokens)
    inputs["lora_row"][:] = 0
    expected = exported.reference(inputs, exported.model)
    assert relative(exported.run(inputs), expected) < CLOSE
    assert relative(np.zeros_like(expected), expected) > 100 * CLOSE


@pytest.mark.parametrize("name", ["pooled", "guidance_embed", "timestep", "context"])
def test_flux_denoiser_follows_its_inputs(exported: Exported, name: str) -> None:
    inputs = exported.draw(seed=1)
    inputs["lora_row"][:] = 0
    changed = {**inputs, name: inputs[name][::-1].copy()}
    expected = exported.reference(changed, exported.model)
    assert relative(exported.run(changed), expected) < CLOSE
    assert relative(exported.run(inputs), expected) > 100 * CLOSE


def test_flux_denoiser_equals_fused_weights_when_a_lora_is_used(exported: Exported) -> None:
    inputs = exported.draw(seed=2)
    inputs["lora_row"][:] = 2
    fused = fuse(exported.model, exported.layers, inputs["lora"][2])
    assert relative(exported.run(inputs), exported.reference(inputs, fused)) < CLOSE
    assert relative(exported.run(inputs), exported.reference(inputs, exported.model)) > 100 * CLOSE


def test_flux_denoiser_adapts_every_linear_layer(exported: Exported) -> None:
    names = [name for name, m in exported.model.named_modules() if isinstance(m, nn.Linear)]
    assert [layer.name for layer in exported.layers] == names
    assert "transformer_blocks.0.attn.to_q" in names
    assert "single_transformer_blocks.1.proj_mlp" in names


def test_flux_denoiser_result_is_the_same_when_batch_mates_change(exported: Exported) -> None:
    inputs = exported.draw(seed=3, batch=3, rows=3)
    together = exported.run(inputs)
    for b in range(3):
        # The same sums in another order of threads and tiles.
        assert relative(together[b : b + 1], exported.run(single(inputs, b))) < 1e-5


def test_flux_denoiser_leaves_mates_untouched_when_a_sample_overflows(
    exported: Exported,
) -> None:
    inputs = exported.draw(seed=4)
    before = exported.run(inputs)
    poisoned = {**inputs, "sample": inputs["sample"].copy()}
    poisoned["sample"][0] = np.inf
    after = exported.run(poisoned)
    assert not np.isfinite(after[0]).all()
    np.testing.assert_array_equal(after[1], before[1])


def test_flux_denoiser_has_no_guidance_input_when_the_model_is_schnell() -> None:
    transformer = make_tiny_flux_transformer(guidance_embeds=False)
    graph = denoiser_graph(
        transformer, max_tokens=TOKENS, max_rank=0, max_batch=2, precision="fp32"
    )
    names = {tensor.name for tensor in graph.inputs}
    assert "pooled" in names
    assert not {"guidance_embed", "time_ids", "lora"} & names


def test_pack_is_the_pipelines_and_unpack_its_inverse() -> None:
    x = torch.randn(2, 16, 6, 10)
    assert torch.equal(pack(x), FluxPipeline._pack_latents(x, 2, 16, 6, 10))
    assert torch.equal(unpack(pack(x), x), x)
    ids = FluxPipeline._prepare_latent_image_ids(1, 3, 5, "cpu", torch.float32)
    assert torch.equal(picture_positions(x), ids)


def test_rotate_equals_diffusers_at_far_positions() -> None:
    ids = torch.tensor([[0.0, 0, 0], [0, 1, 2], [0, 127, 63], [0, 200, 255]])
    x = torch.randn(2, 3, 4, 16)
    expected = apply_rotary_emb(x, FluxPosEmbed(10000, [4, 6, 6])(ids))
    got = rotate(x, RotaryTables(10000, (4, 6, 6))(ids))
    # Angles to 255 rad, rounded to float32: 255 * 2**-24 = 1.5e-5 at most.
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
    shifted = rotate(x, RotaryTables(10000, (4, 6, 6))(ids + torch.tensor([0.0, 1, 0])))
    assert (shifted - expected).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_plain_rms_norm_equals_torch(dtype: torch.dtype) -> None:
    norm = nn.RMSNorm(16, eps=1e-6).to(dtype)
    nn.init.normal_(norm.weight)
    x = 30 * torch.randn(3, 5, 16, dtype=dtype)
    # It stays float32, where torch rounds the result to its type.
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3}[dtype]
    got = PlainRmsNorm(norm)(x)
    assert got.dtype is torch.float32
    torch.testing.assert_close(got, norm(x).float(), rtol=tolerance, atol=tolerance)


def test_flux_denoiser_keeps_timesteps_exact_when_network_is_half() -> None:
    seen: list[torch.Tensor] = []
    transformer = make_tiny_flux_transformer().half()
    graph = denoiser_graph(
        transformer, max_tokens=TOKENS, max_rank=0, max_batch=1, precision="fp16"
    )
    times = transformer.time_text_embed.time_proj.base
    times.register_forward_hook(lambda _, given, __: seen.append(given[0]))
    inputs = graph.draw({**SIZES, "batch": 1, "rows": 1}, 0)
    inputs["timestep"][:], inputs["guidance_embed"][:] = 967.7, 3.3
    with torch.no_grad():
        graph.module(**inputs)
    # Float32's rounding; float16 would be off by 0.2 and 0.3.
    assert [float(value) for value in seen] == pytest.approx([967.7, 3300.0], abs=1e-3)
