"""Bank rows against diffusers' own loading of the same files into a small UNet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders import StableDiffusionLoraLoaderMixin

from closeup.lora import combine_loras
from closeup.manifest import LoraLayer, LoraLayout
from export.lora_layers import is_adaptable
from tests.lora_writers import (
    delta_of,
    random_factors,
    read_denoiser,
    tensors_from_factors,
    write_lora,
)

# Two quirks of diffusers 0.39 bound what can be compared: alphas that differ by layer do not reach
# its attention layers, and without alphas it takes the first layer's rank for the alpha of all.
MIXED: dict[str, Any] = {"ranks": (4, 6), "alphas": (3.0,)}
PLAIN: dict[str, Any] = {"ranks": (4,), "alphas": (None,)}


@pytest.fixture(scope="module")
def unet() -> Any:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=12,
        attention_head_dim=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    ).eval()


def _layout(unet: Any) -> LoraLayout:
    layers = []
    for name, module in unet.named_modules():
        if is_adaptable(module):
            out_features, in_features = module.weight.shape[:2]
            layers.append(LoraLayer(name=name, in_features=in_features, out_features=out_features))
    return LoraLayout(max_rank=64, layers=tuple(layers))


def _load_with_diffusers(unet: Any, path: Path) -> None:
    """What `load_lora_weights` of a pipeline does for its UNet."""
    state, alphas, metadata = StableDiffusionLoraLoaderMixin.lora_state_dict(
        path, unet_config=unet.config, return_lora_metadata=True
    )
    StableDiffusionLoraLoaderMixin.load_lora_into_unet(
        state, network_alphas=alphas, unet=unet, adapter_name=path.stem, metadata=metadata
    )


def _predict(unet: Any) -> Any:
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(2, 4, 8, 8, generator=generator)
    context = torch.randn(2, 5, 12, generator=generator)
    with torch.no_grad():
        return unet(sample, torch.tensor([7, 600]), context).sample.numpy()


def _predict_with_rows(unet: Any, weights: Any, layout: LoraLayout) -> Any:
    modules = {layer.name: unet.get_submodule(layer.name) for layer in layout.layers}
    before = {name: module.weight.data.clone() for name, module in modules.items()}
    try:
        for name, module in modules.items():
            delta = torch.from_numpy(delta_of(weights, layout, name))
            module.weight.data += delta.reshape(module.weight.shape)
        return _predict(unet)
    finally:
        for name, module in modules.items():
            module.weight.data = before[name]


def _file(folder: Path, name: str, style: str, layout: LoraLayout, *, seed: int, deal: Any) -> Path:
    layers = layout.layers
    if style == "processor":
        layers = tuple(layer for layer in layers if ".attn" in layer.name)
    factors = random_factors(layers, seed=seed, **deal)
    convolutions = tuple(
        layer.name for layer in layers
        if layer.name.endswith(("proj_in", "proj_out", "conv_shortcut"))
    )  # fmt: skip
    tensors = tensors_from_factors(factors, style, conv_names=convolutions)
    config = None
    if style == "diffusers" and deal is PLAIN:
        config = {
            "unet.r": 4, "unet.lora_alpha": 6, "unet.lora_dropout": 0.0, "unet.use_rslora": True,
            "unet.rank_pattern": {}, "unet.alpha_pattern": {"attn1.to_q": 10},
            "unet.target_modules": [layer.name for layer in layers],
        }  # fmt: skip
    return write_lora(folder / f"{name}.safetensors", tensors, config)


@pytest.mark.parametrize(
    ("style", "deal"),
    [
        ("diffusers", PLAIN),
        ("diffusers_down_up", PLAIN),
        ("processor", PLAIN),
        ("kohya", MIXED),
        ("kohya_original", MIXED),
    ],
    ids=lambda value: value if isinstance(value, str) else ("mixed" if value is MIXED else "plain"),
)
def test_read_lora_equals_load_lora_weights_when_one_or_two_are_set(
    style: str, deal: Any, unet: Any, tmp_path: Path
) -> None:
    layout = _layout(unet)
    paths = [
        _file(tmp_path, name, style, layout, seed=seed, deal=deal)
        for seed, name in enumerate(("one", "two"))
    ]
    plain = _predict(unet)
    loras = [read_denoiser(path, layout) for path in paths]
    ours = [
        _predict_with_rows(unet, combine_loras(parts, layout), layout)
        for parts in ([(loras[0], 1.0)], [(loras[0], 0.6), (loras[1], -0.4)])
    ]
    try:
        for path in paths:
            _load_with_diffusers(unet, path)
        theirs = []
        for adapters, weights in ((["one"], [1.0]), (["one", "two"], [0.6, -0.4])):
            unet.set_adapters(adapters, weights)
            theirs.append(_predict(unet))
    finally:
        unet.unload_lora()
    for mine, reference in zip(ours, theirs, strict=True):
        effect = np.abs(reference - plain).max()
        assert effect > 0.02
        # Merged and unmerged sums round differently in float32, 1e-6 of the effect; a wrong
        # alpha, a missed layer or zeros change it by a tenth or more.
        assert np.abs(mine - reference).max() < 1e-4 * effect
