"""Super-resolution networks: key layouts, inferred sizes, refusals."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from closeup.errors import ExportError
from closeup.upscale import super_resolve
from export.upscalers import RRDBNet, SRVGGNetCompact, fold_pixels, load_upscaler
from tests.tiny_pipelines import write_tiny_rrdb, write_tiny_upscaler


@pytest.mark.parametrize("scale", [2, 4])
def test_load_upscaler_infers_compact_network_when_keys_are_prefixed(
    tmp_path: Path, scale: int
) -> None:
    network = write_tiny_upscaler(tmp_path / "up.safetensors", scale=scale)
    loaded = load_upscaler(tmp_path / "up.safetensors")
    picture = torch.rand(2, 3, 12, 10)
    with torch.no_grad():
        result = loaded.network(picture)
        assert torch.equal(result, network(picture))
    assert isinstance(loaded.network, SRVGGNetCompact)
    assert loaded.scale == scale
    assert result.shape == (2, 3, 12 * scale, 10 * scale)


@pytest.mark.parametrize("scale", [2, 4])
def test_load_upscaler_infers_rrdb_network_when_keys_are_prefixed(
    tmp_path: Path, scale: int
) -> None:
    network = write_tiny_rrdb(tmp_path / "up.safetensors", scale=scale)
    loaded = load_upscaler(tmp_path / "up.safetensors")
    picture = torch.rand(2, 3, 12, 10)
    with torch.no_grad():
        result = loaded.network(picture)
        assert torch.equal(result, network(picture))
    assert isinstance(loaded.network, RRDBNet)
    assert (loaded.scale, loaded.tile_px) == (scale, 256)
    assert result.shape == (2, 3, 12 * scale, 10 * scale)


def test_load_upscaler_takes_averaged_weights_when_file_nests_both(tmp_path: Path) -> None:
    path = tmp_path / "up.safetensors"
    write_tiny_upscaler(path)
    plain = load_file(path)
    averaged = {key.replace("params.", "params_ema."): value + 1 for key, value in plain.items()}
    save_file({**plain, **averaged}, path)
    first = load_upscaler(path).network.state_dict()["body.0.weight"]
    assert torch.equal(first, averaged["params_ema.body.0.weight"])


def test_load_upscaler_reads_flat_half_precision_keys_as_float32(tmp_path: Path) -> None:
    path = tmp_path / "up.safetensors"
    network = write_tiny_upscaler(path)
    save_file({key: value.half() for key, value in network.state_dict().items()}, path)
    loaded = load_upscaler(path)
    assert {value.dtype for value in loaded.network.state_dict().values()} == {torch.float32}


def test_networks_have_the_key_names_of_real_esrgan() -> None:
    compact = set(SRVGGNetCompact(features=8, convolutions=1, scale=4).state_dict())
    assert compact == {
        "body.0.weight", "body.0.bias", "body.1.weight", "body.2.weight", "body.2.bias",
        "body.3.weight", "body.4.weight", "body.4.bias",
    }  # fmt: skip
    rrdb = RRDBNet(features=64, growth=32, blocks=23, scale=4)
    assert "body.22.rdb3.conv5.bias" in rrdb.state_dict()
    # FACES.md: RealESRGAN x4plus has 16,697,987 parameters.
    assert sum(value.numel() for value in rrdb.state_dict().values()) == 16_697_987


def test_compact_network_returns_enlarged_picture_when_last_layer_is_zero() -> None:
    network = SRVGGNetCompact(features=4, convolutions=1, scale=2)
    torch.nn.init.zeros_(network.body[-1].weight)  # type: ignore[arg-type]
    torch.nn.init.zeros_(network.body[-1].bias)  # type: ignore[arg-type]
    picture = torch.rand(1, 3, 3, 4)
    with torch.no_grad():
        result = network(picture)
    assert torch.equal(result, picture.repeat_interleave(2, 2).repeat_interleave(2, 3))


def test_fold_pixels_equals_pixel_unshuffle() -> None:
    picture = torch.rand(2, 3, 8, 12)
    assert torch.equal(fold_pixels(picture, 2), F.pixel_unshuffle(picture, 2))
    assert not torch.equal(fold_pixels(picture.flip(3), 2), F.pixel_unshuffle(picture, 2))


def test_load_upscaler_refuses_pickles(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    torch.save({"params": {}}, path)
    with pytest.raises(ExportError, match=r"not a \.safetensors file"):
        load_upscaler(path)


def test_load_upscaler_refuses_damaged_file(tmp_path: Path) -> None:
    path = tmp_path / "up.safetensors"
    path.write_bytes(b"no weights here")
    with pytest.raises(ExportError, match="cannot be read as safetensors"):
        load_upscaler(path)
    with pytest.raises(ExportError, match="there is no upscaler"):
        load_upscaler(tmp_path / "other.safetensors")


def test_load_upscaler_names_the_extra_when_layout_is_unknown(tmp_path: Path) -> None:
    path = tmp_path / "up.safetensors"
    save_file({"layers.0.weight": torch.zeros(3, 3)}, path)
    with pytest.raises(ExportError, match=r"closeup\[upscalers\]|spandrel cannot load"):
        load_upscaler(path)


def test_load_upscaler_says_what_does_not_fit_when_a_key_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "up.safetensors"
    write_tiny_rrdb(path, scale=4)
    weights = load_file(path)
    del weights["params_ema.conv_hr.bias"]
    save_file(weights, path)
    with pytest.raises(ExportError, match="conv_hr.bias"):
        load_upscaler(path)


def test_load_upscaler_refuses_compact_network_of_odd_channels(tmp_path: Path) -> None:
    path = tmp_path / "up.safetensors"
    weights = SRVGGNetCompact(features=4, convolutions=1, scale=2).state_dict()
    weights["body.4.weight"] = weights["body.4.weight"][:11].clone()
    save_file(weights, path)
    with pytest.raises(ExportError, match="11 channels"):
        load_upscaler(path)


def test_super_resolution_takes_odd_sides_when_the_network_folds_pixels(tmp_path: Path) -> None:
    network = write_tiny_rrdb(tmp_path / "up.safetensors", scale=2)

    async def infer(tiles: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.no_grad():
            return np.asarray(network(torch.from_numpy(tiles)).numpy(), np.float32)

    picture = np.random.default_rng(0).random((33, 21, 3), np.float32)
    enlarged = asyncio.run(
        super_resolve(picture, infer=infer, scale=2, factor=2, tile=64, overlap=8, max_batch=4)
    )
    assert enlarged.shape == (66, 42, 3)
    even = np.pad(picture, ((0, 1), (0, 1), (0, 0)), mode="symmetric")
    whole = asyncio.run(infer(even.transpose(2, 0, 1)[None]))[0].transpose(1, 2, 0)
    np.testing.assert_allclose(enlarged, np.clip(whole, 0, 1)[:66, :42], atol=1e-6)
