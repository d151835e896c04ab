"""LoRA files for several networks: which network a key belongs to, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from closeup.errors import RequestError
from closeup.lora import Lora
from closeup.lora_bank import LoraBank
from closeup.lora_read import layouts_from_manifest, read_lora
from closeup.lora_store import LoraStore
from closeup.manifest import LoraLayer, LoraLayout
from tests.lora_writers import delta_of, random_factors, write_lora
from tests.manifests import make_manifest

Q_PROJ = "text_model.encoder.layers.0.self_attn.q_proj"


def _layout(**sizes: tuple[int, int]) -> LoraLayout:
    layers = tuple(
        LoraLayer(name=name, in_features=size[0], out_features=size[1])
        for name, size in sizes.items()
    )
    return LoraLayout(max_rank=16, layers=layers)


TEXT = _layout(**{Q_PROJ: (6, 10), "text_model.encoder.layers.0.mlp.fc1": (6, 12)})
WIDE_TEXT = _layout(**{Q_PROJ: (8, 14), "text_projection": (8, 8)})
UNET = _layout(**{"mid_block.attentions.0.proj_in": (6, 6)})
SDXL = {"denoiser": UNET, "text_encoder": TEXT, "text_encoder_2": WIDE_TEXT}
FLUX = {
    "denoiser": _layout(
        **{f"transformer_blocks.0.attn.{leaf}": (6, 4) for leaf in ("to_q", "to_k", "to_v")}
    ),
    "text_encoder": TEXT,
    "text_encoder_2": None,
}


def _read(folder: Path, tensors: dict[str, Any], layouts: Any, config: Any = None) -> Lora:
    return read_lora(write_lora(folder / "my.safetensors", tensors, config), layouts)


def _pair(module: str, inner: int, outer: int, rank: int = 2) -> dict[str, Any]:
    """A module in kohya's spelling of the factors, which all prefixes may have."""
    return {
        f"{module}.lora_down.weight": np.ones((rank, inner), np.float32),
        f"{module}.lora_up.weight": np.ones((outer, rank), np.float32),
    }


@pytest.mark.parametrize(
    ("module", "network"),
    [
        (f"text_encoder.{Q_PROJ}", "text_encoder"),
        ("lora_te_" + Q_PROJ.replace(".", "_"), "text_encoder"),
        ("lora_te1_" + Q_PROJ.replace(".", "_"), "text_encoder"),
        (f"text_encoders.clip_l.transformer.{Q_PROJ}", "text_encoder"),
        (f"base_model.model.text_encoder.{Q_PROJ}", "text_encoder"),
        (f"base_model.model.{Q_PROJ}", "text_encoder"),
        (f"cond_stage_model.transformer.{Q_PROJ}", "text_encoder"),
        (f"text_encoder.{Q_PROJ.replace('q_proj', 'to_q')}", "text_encoder"),
        (f"text_encoder_2.{Q_PROJ}", "text_encoder_2"),
        ("lora_te2_" + Q_PROJ.replace(".", "_"), "text_encoder_2"),
        ("lora_te2_text_projection", "text_encoder_2"),
        (f"text_encoders.clip_g.transformer.{Q_PROJ}", "text_encoder_2"),
        ("unet.mid_block.attentions.0.proj_in", "denoiser"),
        ("lora_unet_middle_block_1_proj_in", "denoiser"),
        ("base_model.model.mid_block.attentions.0.proj_in", "denoiser"),
    ],
)
def test_read_lora_finds_the_network_when_a_key_names_it(
    module: str, network: str, tmp_path: Path
) -> None:
    layout = SDXL[network]
    place = 1 if "projection" in module else 0
    layer = layout.layers[place]
    lora = _read(tmp_path, _pair(module, layer.in_features, layer.out_features), SDXL)
    assert set(lora.networks) == {network}
    assert lora.networks[network].ranks[place] == 2
    assert lora.warnings == ()
    assert (delta_of(lora.networks[network], layout, layer.name) == 2).all()


@pytest.mark.parametrize(
    "module",
    [
        "lora_te3_encoder_block_0_layer_0_SelfAttention_q",
        "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q",
        "lora_te2_encoder_block_0_layer_1_DenseReluDense_wi_0",
        "text_encoder_3.encoder.block.0.layer.0.SelfAttention.q",
        "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q",
    ],
)
def test_read_lora_refuses_by_name_when_a_file_adapts_t5(module: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=rf"a T5 text encoder \({module}\)"):
        _read(tmp_path, _pair(module, 6, 6), FLUX)


@pytest.mark.parametrize(
    ("layouts", "module", "sizes", "words"),
    [
        (FLUX, "lora_unet_input_blocks_4_1_proj_in", (6, 6),
         r"another model: its layer lora_unet_input_blocks_4_1_proj_in \(6 to 6 features\)"),
        (SDXL, "diffusion_model.double_blocks.0.img_attn.qkv", (6, 12),
         r"another model: its layer diffusion_model\.double_blocks\.0\.img_attn\.qkv"),
        (FLUX, "diffusion_model.double_blocks.0.img_attn.qkv", (6, 13),
         "img_attn.qkv maps 6 to 13 features, this model's maps 6 to 12"),
        (FLUX, "diffusion_model.double_blocks.0.img_attn.qkv", (5, 12), "maps 5 to 12 features"),
        (FLUX, "diffusion_model.single_blocks.0.linear1", (6, 28), "single_blocks.0.linear1 "),
        (SDXL, f"lora_te1_{Q_PROJ.replace('.', '_')}", (9, 9),
         r"q_proj maps 9 to 9 features, this model's maps 6 to 10"),
        (SDXL, "text_encoder.text_model.encoder.layers.7.mlp.fc1", (6, 12),
         r"layers\.7\.mlp\.fc1 \(6 to 12 features\) is not one of those that this model's "
         "text_encoder adapts"),
        ({"denoiser": UNET, "text_encoder": TEXT}, "lora_te2_text_projection", (8, 8),
         "lora_te2_text_projection belongs to a text_encoder_2, which this model does not have"),
    ],
)  # fmt: skip
def test_read_lora_names_the_first_layer_when_a_file_is_for_another_model(
    layouts: Any, module: str, sizes: tuple[int, int], words: str, tmp_path: Path
) -> None:
    with pytest.raises(RequestError, match=words):
        _read(tmp_path, _pair(module, *sizes), layouts)


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1.hada_w1_a", "LoHa"),
        ("lora_te2_text_model_encoder_layers_0_mlp_fc1.lokr_w1", "LoKr"),
        ("lora_unet_double_blocks_0_img_attn_qkv.dora_scale", "DoRA"),
    ],
)
def test_read_lora_refuses_other_methods_when_they_adapt_any_network(
    key: str, words: str, tmp_path: Path
) -> None:
    with pytest.raises(RequestError, match=words):
        _read(tmp_path, {key: np.ones((2, 2), np.float32)}, FLUX)


def test_read_lora_refuses_when_a_joined_and_a_single_layer_meet(tmp_path: Path) -> None:
    tensors = _pair("diffusion_model.double_blocks.0.img_attn.qkv", 6, 12)
    tensors |= _pair("transformer.transformer_blocks.0.attn.to_k", 6, 4)
    with pytest.raises(RequestError, match=r"adapts the layer \S+attn.to_k twice"):
        _read(tmp_path, tensors, FLUX)


def test_read_lora_warns_when_a_network_has_no_lora_inputs(tmp_path: Path) -> None:
    tensors = _pair("lora_unet_mid_block_attentions_0_proj_in", 6, 6)
    for layer in ("mlp_fc1", "mlp_fc2"):
        tensors |= _pair(f"lora_te1_text_model_encoder_layers_0_{layer}", 5, 5)
    layouts = {"denoiser": UNET, "text_encoder": None}
    lora = _read(tmp_path, tensors, layouts)
    assert set(lora.networks) == {"denoiser"}
    assert lora.warnings == (
        "LoRA 'my': its 2 layers for text_encoder are ignored, since that network was exported "
        "without LoRA inputs.",
    )
    bank = LoraBank(LoraStore(tmp_path, layouts, 1 << 20), {"denoiser": UNET}, rows=1)
    assert bank.acquire([("my", 1.0)]).warnings == lora.warnings
    only_text = {name: value for name, value in tensors.items() if "te1" in name}
    with pytest.raises(RequestError, match="adapts only text_encoder, which this model was"):
        _read(tmp_path, only_text, layouts)


@pytest.mark.parametrize(
    ("config", "scales"),
    [
        ({"text_encoder.lora_alpha": 6, "unet.lora_alpha": 1}, (0.5, 3.0, 1.0)),
        ({"lora_alpha": 4, "text_encoder_2.lora_alpha": 2}, (2.0, 2.0, 1.0)),
        ({"text_encoder.alpha_pattern": {"q_proj": 8}}, (1.0, 4.0, 1.0)),
    ],
)
def test_read_lora_takes_each_networks_scale_when_the_header_has_several(
    config: Any, scales: tuple[float, ...], tmp_path: Path
) -> None:
    tensors = _pair("unet.mid_block.attentions.0.proj_in", 6, 6)
    tensors |= _pair(f"text_encoder.{Q_PROJ}", 6, 10) | _pair(f"text_encoder_2.{Q_PROJ}", 8, 14)
    lora = _read(tmp_path, tensors, SDXL, config)
    for (network, layout), scale in zip(SDXL.items(), scales, strict=True):
        delta = delta_of(lora.networks[network], layout, layout.layers[0].name)
        assert (delta == 2 * scale).all()


def test_read_lora_refuses_when_the_header_calls_a_text_encoder_dora(tmp_path: Path) -> None:
    tensors = _pair(f"text_encoder.{Q_PROJ}", 6, 10)
    with pytest.raises(RequestError, match="trained as DoRA"):
        _read(tmp_path, tensors, SDXL, {"text_encoder.use_dora": True})


def test_read_lora_tells_the_network_when_it_reduces_a_text_encoders_rank(tmp_path: Path) -> None:
    factors = random_factors(TEXT.layers[:1], seed=1, ranks=(20,))
    item = factors[Q_PROJ]
    tensors = {f"text_encoder.{Q_PROJ}.lora_A.weight": item.down,
               f"text_encoder.{Q_PROJ}.lora_B.weight": item.up}  # fmt: skip
    lora = _read(tmp_path, tensors, SDXL)
    (warning,) = lora.networks["text_encoder"].warnings
    assert warning.startswith("LoRA 'my (text_encoder)': rank 20 was reduced to 16")


def test_bank_sums_each_network_apart_when_files_adapt_different_ones(tmp_path: Path) -> None:
    write_lora(tmp_path / "u.safetensors", _pair("unet.mid_block.attentions.0.proj_in", 6, 6))
    write_lora(tmp_path / "t.safetensors", _pair(f"text_encoder.{Q_PROJ}", 6, 10, rank=9))
    bank = LoraBank(
        LoraStore(tmp_path, SDXL, 1 << 20), SDXL, rows=2, dtypes={"text_encoder": np.float16}
    )
    both = bank.acquire([("u", 0.5), ("t", 2.0)])
    alone = bank.acquire([("t", 1.0)])
    assert [both.row_in(network) > 0 for network in SDXL] == [True, True, False]
    assert [alone.row_in(network) > 0 for network in SDXL] == [False, True, False]
    unet = bank.view("denoiser").array([both.row])
    text = bank.view("text_encoder").array([both.row])
    assert unet.shape == (3, UNET.rows, 8)
    assert unet.dtype == np.float32
    assert text.shape == (3, TEXT.rows, 16)
    assert text.dtype == np.float16
    assert (unet[both.row, 6:12] @ unet[both.row, :6].T == 0.5 * 2).all()
    assert (text[both.row, 6:16] @ text[both.row, :6].T == 2.0 * 9).all()
    assert not bank.view("text_encoder_2").array([both.row]).any()
    assert bank.view("text_encoder_2").array([0]).shape == (1, WIDE_TEXT.rows, 1)


def test_layouts_from_manifest_names_every_network() -> None:
    manifest = make_manifest()
    assert layouts_from_manifest(manifest) == {"denoiser": manifest.lora, "text_encoder": None}
