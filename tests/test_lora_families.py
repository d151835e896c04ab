"""Bank rows against diffusers' loading of the same files into small SDXL and FLUX.1 pipelines."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from closeup.lora_read import read_lora
from closeup.manifest import LoraLayer, LoraLayout
from export.lora_layers import is_adaptable
from tests.lora_writers import (
    STYLES,
    LayerFactors,
    delta_of,
    kohya_original_style,
    original_flux_sizes,
    random_factors,
    tensors_from_factors,
    text_style,
    write_lora,
)

# diffusers 0.39 does not bring alphas that differ by layer to every layer: one alpha for all.
DEAL: dict[str, Any] = {"ranks": (4,), "alphas": (3.0,)}
PLAIN: dict[str, Any] = {"ranks": (4,), "alphas": (None,)}
Deltas = dict[str, Any]


def _text_config(width: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=20, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=8, projection_dim=width,
    )  # fmt: skip


@pytest.fixture(scope="module")
def sdxl() -> Any:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16, 32),
        layers_per_block=2,
        norm_num_groups=4,
        cross_attention_dim=20,
        attention_head_dim=2,
        transformer_layers_per_block=(1, 1, 2),
        use_linear_projection=True,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=36,
    )
    return StableDiffusionXLPipeline(
        vae=None, text_encoder=CLIPTextModel(_text_config(8)),
        text_encoder_2=CLIPTextModelWithProjection(_text_config(12)), tokenizer=None,
        tokenizer_2=None, unet=unet, scheduler=EulerDiscreteScheduler(), add_watermarker=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def flux() -> Any:
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=12, pooled_projection_dim=8,
        guidance_embeds=True, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=None,
        text_encoder=CLIPTextModel(_text_config(8)), tokenizer=None, text_encoder_2=None,
        tokenizer_2=None, transformer=transformer,
    )  # fmt: skip


def _layout(network: Any) -> LoraLayout:
    layers = []
    for name, module in network.named_modules():
        if is_adaptable(module):
            out_features, in_features = module.weight.shape[:2]
            layers.append(LoraLayer(name=name, in_features=in_features, out_features=out_features))
    return LoraLayout(max_rank=64, layers=tuple(layers))


def _loaded_deltas(network: Any) -> Deltas:
    """What a network's layers gained by `load_lora_weights`, (out, in) each."""
    deltas = {}
    for name, module in network.named_modules():
        if getattr(module, "lora_A", None):
            delta = module.get_delta_weight("default_0").detach().numpy()
            deltas[name] = delta.reshape(delta.shape[:2])
    return deltas


def _assert_equal(ours: Any, layout: LoraLayout, theirs: Deltas, names: set[str]) -> None:
    assert set(theirs) == names
    for place, layer in enumerate(layout.layers):
        delta = delta_of(ours, layout, layer.name)
        if layer.name not in theirs:
            assert ours.ranks[place] == 0
            assert not delta.any()
            continue
        expected = theirs[layer.name]
        assert np.abs(expected).max() > 1e-3
        # The scale is multiplied in at different places in float32: 1e-6 of the largest value.
        # A wrong alpha, the rows of another part or zeros are off by a tenth or more.
        np.testing.assert_allclose(delta, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("style", "text", "deal"),
    [
        ("diffusers", "diffusers", PLAIN),
        ("diffusers_down_up", "diffusers_linear", PLAIN),
        ("processor", "processor", PLAIN),
        ("kohya", "kohya", DEAL),
        ("kohya_original", "kohya", DEAL),
    ],
)
def test_read_lora_equals_load_lora_weights_when_an_sdxl_file_adapts_all_networks(
    style: str, text: str, deal: Any, sdxl: Any, tmp_path: Path
) -> None:
    networks = {"denoiser": sdxl.unet, "text_encoder": sdxl.text_encoder,
                "text_encoder_2": sdxl.text_encoder_2}  # fmt: skip
    layouts = {name: _layout(network) for name, network in networks.items()}
    tensors: dict[str, Any] = {}
    names = {}
    for seed, (network, layout) in enumerate(layouts.items()):
        layers = layout.layers
        if style == "kohya":  # diffusers finds these two under their original names alone
            layers = tuple(layer for layer in layers if "add_embedding" not in layer.name)
        if style == "processor":  # these styles know attention alone
            layers = tuple(one for one in layers if ".attn" in one.name or "self_attn" in one.name)
        if network != "denoiser":  # the projection of the pooled output has no place in diffusers
            layers = tuple(layer for layer in layers if layer.name != "text_projection")
            chosen = text_style(text, network)
        elif style == "kohya_original":
            chosen = kohya_original_style(2)
        else:
            chosen = STYLES[style]
        factors = random_factors(layers, seed=seed, **deal)
        names[network] = set(factors)
        convolutions = tuple(name for name in factors if name.endswith("conv_shortcut"))
        tensors |= tensors_from_factors(factors, chosen, conv_names=convolutions)
    path = write_lora(tmp_path / "a.safetensors", tensors)
    ours = read_lora(path, layouts)
    assert ours.warnings == ()
    try:
        sdxl.load_lora_weights(str(path), adapter_name="default_0")
        for network, layout in layouts.items():
            theirs = _loaded_deltas(networks[network])
            _assert_equal(ours.networks[network], layout, theirs, names[network])
    finally:
        sdxl.unload_lora_weights()


def _original_tensors(
    sizes: Mapping[str, tuple[int, int]], style: str, *, sparse: bool = False
) -> dict[str, Any]:
    """A file of FLUX.1's own layers; ``sparse``: each joined part has a third of the rank."""
    layers = tuple(
        LoraLayer(name=name, in_features=size[0], out_features=size[1])
        for name, size in sizes.items()
    )
    tensors: dict[str, Any] = {}
    for name, item in random_factors(layers, seed=3, ranks=(6,), alphas=(3.0,)).items():
        up = item.up.copy()
        if sparse and name.endswith("qkv"):
            third = len(up) // 3
            for part in range(3):
                rows = slice(part * third, (part + 1) * third)
                up[rows, : 2 * part] = up[rows, 2 * part + 2 :] = 0
        if style == "kohya":
            stem = "lora_unet_" + name.replace(".", "_")
        elif style == "peft":
            stem = f"base_model.model.{name}"
        else:  # as ComfyUI's converter writes it
            stem = f"diffusion_model.{name}"
        is_peft = style in ("bfl", "peft")
        down_key, up_key = ("lora_A", "lora_B") if is_peft else ("lora_down", "lora_up")
        tensors |= {f"{stem}.{down_key}.weight": item.down, f"{stem}.{up_key}.weight": up}
        # diffusers drops the final layers' alpha; without one both take the scale 1.
        if not name.startswith("final_layer"):
            tensors[f"{stem}.alpha"] = np.array(item.alpha, np.float32)
    return tensors


def _converted_deltas(path: Path, start: str) -> Deltas:
    """B A of each layer in the state dict that diffusers makes of a file."""
    state = FluxPipeline.lora_state_dict(str(path))
    deltas = {}
    for key, down in state.items():
        if key.endswith(".lora_A.weight") and not key.startswith("text_encoder."):
            up = state[key.replace(".lora_A.", ".lora_B.")]
            name = key.removesuffix(".lora_A.weight").removeprefix(start)
            deltas[name] = (up.double() @ down.double()).float().numpy()
    return deltas


@pytest.mark.parametrize("sparse", [False, True], ids=["full", "sparse"])
@pytest.mark.parametrize("style", ["kohya", "comfy", "bfl", "peft"])
def test_read_lora_equals_the_converted_state_when_a_flux_file_has_the_original_layers(
    style: str, sparse: bool, flux: Any, tmp_path: Path
) -> None:
    layout = _layout(flux.transformer)
    sizes = original_flux_sizes(16, 12, 16, 8)
    path = write_lora(tmp_path / "a.safetensors", _original_tensors(sizes, style, sparse=sparse))
    ours = read_lora(path, {"denoiser": layout, "text_encoder": None}).networks["denoiser"]
    reference = path
    if style in ("bfl", "peft"):  # diffusers reads the same tensors under ComfyUI's names only
        tensors = _original_tensors(sizes, "comfy", sparse=sparse)
        reference = write_lora(tmp_path / "b.safetensors", tensors)
    theirs = _converted_deltas(reference, "transformer.")
    qkv = ("to_q", "to_k", "to_v", "proj_mlp")  # of the single blocks: see the next test
    names = {layer.name for layer in layout.layers
             if not (layer.name.startswith("single") and layer.name.endswith(qkv))}  # fmt: skip
    _assert_equal(ours, layout, theirs, names)
    place = [layer.name for layer in layout.layers].index("transformer_blocks.1.attn.to_k")
    assert ours.ranks[place] == (2 if sparse else 6)


def test_read_lora_equals_the_converted_state_when_flux_single_blocks_are_joined(
    tmp_path: Path,
) -> None:
    # The real width, since diffusers' converter has it built in; few inputs keep it small.
    sizes = {"attn.to_q": 3072, "attn.to_k": 3072, "attn.to_v": 3072, "proj_mlp": 12288}
    layers = tuple(LoraLayer(name=f"single_transformer_blocks.0.{name}", in_features=8,
                             out_features=size) for name, size in sizes.items())  # fmt: skip
    layout = LoraLayout(max_rank=8, layers=layers)
    tensors = _original_tensors({"single_blocks.0.linear1": (8, 21504)}, "kohya")
    path = write_lora(tmp_path / "a.safetensors", tensors)
    ours = read_lora(path, {"denoiser": layout}).networks["denoiser"]
    theirs = _converted_deltas(path, "transformer.")
    _assert_equal(ours, layout, theirs, {layer.name for layer in layers})


def test_read_lora_equals_the_converted_state_when_a_flux_file_is_xlabs(
    flux: Any, tmp_path: Path
) -> None:
    sizes = {"qkv_lora1": (16, 48), "qkv_lora2": (16, 48), "proj_lora1": (16, 16),
             "proj_lora2": (16, 16)}  # fmt: skip
    modules = {f"double_blocks.{n}.processor.{leaf}": size
               for n in range(2) for leaf, size in sizes.items()}  # fmt: skip
    modules |= {f"single_blocks.{n}.processor.qkv_lora": (16, 48) for n in range(2)}
    layers = tuple(LoraLayer(name=name, in_features=size[0], out_features=size[1])
                   for name, size in modules.items())  # fmt: skip
    factors = random_factors(layers, seed=4, ranks=(3,))
    tensors = {f"{name}.down.weight": item.down for name, item in factors.items()}
    tensors |= {f"{name}.up.weight": item.up for name, item in factors.items()}
    path = write_lora(tmp_path / "a.safetensors", tensors)
    layout = _layout(flux.transformer)
    names = {layer.name for layer in layout.layers
             if ".attn." in layer.name}  # fmt: skip
    ours = read_lora(path, {"denoiser": layout, "text_encoder": None}).networks["denoiser"]
    _assert_equal(ours, layout, _converted_deltas(path, "transformer."), names)


@pytest.mark.parametrize(
    ("style", "text", "deal"),
    [("transformer", "diffusers", PLAIN), ("lora_transformer", "kohya", DEAL)],
)
def test_read_lora_equals_load_lora_weights_when_a_flux_file_has_diffusers_layers(
    style: str, text: str, deal: Any, flux: Any, tmp_path: Path
) -> None:
    layouts = {"denoiser": _layout(flux.transformer), "text_encoder": _layout(flux.text_encoder)}
    layers = layouts["denoiser"].layers
    if style == "lora_transformer":  # diffusers reads attention and outer layers alone here
        layers = tuple(one for one in layers if ".attn." in one.name or "embedder" in one.name)
    factors = random_factors(layers, seed=5, **deal)
    in_text = random_factors(layouts["text_encoder"].layers, seed=6, **deal)
    tensors = tensors_from_factors(factors, STYLES[style])
    tensors |= tensors_from_factors(in_text, text_style(text, "text_encoder"))
    path = write_lora(tmp_path / "a.safetensors", tensors)
    ours = read_lora(path, layouts)
    try:
        flux.load_lora_weights(str(path), adapter_name="default_0")
        pairs: Any = (("denoiser", flux.transformer, factors),
                      ("text_encoder", flux.text_encoder, in_text))  # fmt: skip
        for network, module, written in pairs:
            theirs = _loaded_deltas(module)
            _assert_equal(ours.networks[network], layouts[network], theirs, set(written))
    finally:
        flux.unload_lora_weights()


def test_layer_factors_delta_is_scaled_by_alpha_over_rank() -> None:
    item = LayerFactors(down=np.ones((2, 3), "f4"), up=np.ones((4, 2), "f4"), alpha=6.0)
    np.testing.assert_array_equal(item.delta, np.full((4, 3), 6.0))
