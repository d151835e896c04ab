"""LoRA files to bank rows: key styles, scales, refusals, sums, approximation."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from closeup.errors import RequestError
from closeup.lora import balanced_rows, combine_loras, layer_starts
from closeup.manifest import LoraLayer, LoraLayout
from tests.lora_writers import (
    STYLES,
    Factors,
    LayerFactors,
    delta_of,
    random_factors,
    read_denoiser,
    tensors_from_factors,
    write_lora,
)

ATTENTION = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"
SHAPES: dict[str, tuple[int, int]] = {
    "time_embedding.linear_1": (8, 24),
    "down_blocks.0.resnets.0.time_emb_proj": (24, 8),
    "down_blocks.1.resnets.0.conv_shortcut": (8, 16),
    "down_blocks.1.attentions.0.proj_in": (16, 16),
    f"{ATTENTION}.to_q": (16, 16),
    f"{ATTENTION}.to_out.0": (16, 16),
    "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k": (12, 16),
    "down_blocks.1.attentions.0.transformer_blocks.0.ff.net.0.proj": (16, 128),
    "down_blocks.1.attentions.0.transformer_blocks.0.ff.net.2": (64, 16),
    "mid_block.resnets.1.time_emb_proj": (24, 16),
    "mid_block.attentions.0.transformer_blocks.0.attn1.to_v": (16, 16),
    "up_blocks.0.attentions.1.proj_out": (16, 16),
}
CONVOLUTIONS = tuple(name for name in SHAPES if "proj_in" in name or "proj_out" in name
                     or "shortcut" in name)  # fmt: skip


def _layout(max_rank: int = 64) -> LoraLayout:
    layers = tuple(
        LoraLayer(name=name, in_features=size[0], out_features=size[1])
        for name, size in SHAPES.items()
    )
    return LoraLayout(max_rank=max_rank, layers=layers)


LAYOUT = _layout()


def _assert_deltas(
    weights: Any, expected: dict[str, Any], layout: LoraLayout = LAYOUT, rtol: float = 1e-6
) -> None:
    # Folding the scale into B rounds once in float32 (6e-8); 1e-6 of the largest value leaves
    # room for sums. A wrong scale, a missing layer or zeros are off by 1e-1 or more.
    for name, delta in expected.items():
        assert np.abs(delta).max() > 0
        got = delta_of(weights, layout, name)
        np.testing.assert_allclose(got, delta, rtol=0, atol=rtol * np.abs(delta).max())


@pytest.mark.parametrize("style", STYLES)
def test_read_lora_equals_the_dense_sum_when_written_in_each_style(
    style: str, tmp_path: Path
) -> None:
    layers = LAYOUT.layers
    if style == "processor":
        layers = tuple(layer for layer in layers if ".attn" in layer.name)
    alphas = (3.0, None, 16.0) if style.startswith(("kohya", "diffusers")) else (None,)
    factors = random_factors(layers, seed=1, ranks=(4, 2, 7), alphas=alphas)
    tensors = tensors_from_factors(factors, style, conv_names=CONVOLUTIONS)
    weights = read_denoiser(write_lora(tmp_path / "a.safetensors", tensors), LAYOUT)
    assert weights.rows.shape == (LAYOUT.rows, 7)
    assert weights.rows.dtype == np.float32
    assert weights.warnings == ()
    _assert_deltas(weights, {name: layer.delta for name, layer in factors.items()})


def test_read_lora_leaves_zeros_when_layers_are_missing(tmp_path: Path) -> None:
    factors = random_factors(LAYOUT.layers[3:5], seed=2)
    path = write_lora(tmp_path / "a.safetensors", tensors_from_factors(factors, "kohya"))
    weights = read_denoiser(path, LAYOUT)
    starts = layer_starts(LAYOUT)
    assert weights.ranks == tuple(4 if place in (3, 4) else 0 for place in range(len(SHAPES)))
    assert not weights.rows[: starts[6]].any()
    assert not weights.rows[starts[10] :].any()
    _assert_deltas(weights, {name: layer.delta for name, layer in factors.items()})


@pytest.mark.parametrize("kind", ["F16", "BF16", "F64"])
def test_read_lora_rounds_only_as_the_file_does_when_stored_in(kind: str, tmp_path: Path) -> None:
    factors = random_factors(LAYOUT.layers, seed=3, alphas=(2.0,))
    path = tmp_path / "a.safetensors"
    tensors = tensors_from_factors(factors, "kohya")
    rounded: Factors = {}
    for name, layer in factors.items():
        rounded[name] = LayerFactors(
            down=_rounded(layer.down, kind), up=_rounded(layer.up, kind), alpha=layer.alpha
        )
    _write_as(path, tensors, kind)
    weights = read_denoiser(path, LAYOUT)
    _assert_deltas(weights, {name: layer.delta for name, layer in rounded.items()})


def _rounded(values: Any, kind: str) -> Any:
    if kind == "BF16":  # truncation is a rounding too, and exact to undo
        return (values.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    return values.astype({"F16": np.float16, "F64": np.float64}[kind]).astype(np.float32)


def _write_as(path: Path, tensors: dict[str, Any], kind: str) -> None:
    header: dict[str, Any] = {}
    body = b""
    for name, values in tensors.items():
        if kind == "BF16":
            data = (np.atleast_1d(values).view(np.uint32) >> 16).astype("<u2").tobytes()
        else:
            data = values.astype({"F16": "<f2", "F64": "<f8"}[kind]).tobytes()
        header[name] = {
            "dtype": kind,
            "shape": list(values.shape),
            "data_offsets": [len(body), len(body) + len(data)],
        }
        body += data
    _write_raw(path, header, body)


def _write_raw(path: Path, header: Any, body: bytes = b"") -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)
    return path


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"unet.r": 4, "unet.lora_alpha": 8}, 2.0),
        ({"r": 4, "lora_alpha": 2}, 0.5),
        ({"unet.lora_alpha": 8, "unet.use_rslora": True}, 4.0),
        ({"unet.lora_alpha": 8, "unet.alpha_pattern": {"attn1.to_q": 12}}, 3.0),
        ({"unet.lora_alpha": 8, "unet.alpha_pattern": {f"^{ATTENTION}.to_q": 12}}, 3.0),
        ({"unet.lora_alpha": 8, "unet.alpha_pattern": {"^attn1.to_q": 12}}, 2.0),
        ({"unet.lora_alpha": "much"}, 1.0),
        ({"unet.lora_alpha": 10**400}, 1.0),
        ({"unet.lora_alpha": float("nan")}, 1.0),
        (["not", "a", "table"], 1.0),
    ],
)
def test_read_lora_takes_the_scale_from_the_header_when_there_is_no_alpha(
    config: Any, scale: float, tmp_path: Path
) -> None:
    layer = next(layer for layer in LAYOUT.layers if layer.name == f"{ATTENTION}.to_q")
    factors = random_factors((layer,), seed=4)
    tensors = tensors_from_factors(factors, "diffusers")
    weights = read_denoiser(write_lora(tmp_path / "a.safetensors", tensors, config), LAYOUT)
    _assert_deltas(weights, {layer.name: scale * factors[layer.name].delta})


Q_DOWN, Q_UP, Q_ALPHA = STYLES["kohya"](f"{ATTENTION}.to_q")
CONV_DOWN, CONV_UP, _ = STYLES["kohya"]("down_blocks.1.resnets.0.conv1")
ONE = np.ones((2, 16), np.float32)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({Q_DOWN: ONE, Q_UP: ONE.T, "lora_unet_x.hada_w1_a": ONE}, r"LoHa weights .*hada_w1_a"),
        ({"lora_unet_x.lokr_w1": ONE}, "LoKr weights"),
        ({Q_DOWN: ONE, Q_UP: ONE.T, Q_ALPHA.replace("alpha", "dora_scale"): ONE}, "DoRA weights"),
        ({"unet.x.to_q.lora_magnitude_vector": ONE}, "DoRA weights"),
        ({"lora_unet_x.diff": ONE}, "full-difference weights"),
        (
            {CONV_DOWN: np.ones((2, 8, 3, 3), "f4"), CONV_UP: np.ones((16, 2, 1, 1), "f4")},
            r"3x3 convolution lora_unet_down_blocks_1_resnets_0_conv1 \(LoCon\)",
        ),
        ({Q_DOWN: ONE}, r"incomplete: .*attn1_to_q has no up \(B\) tensor"),
        ({Q_UP: ONE.T}, r"has no down \(A\) tensor"),
        ({Q_DOWN: ONE, Q_UP: np.ones((16, 3), "f4")}, "have ranks 2 and 3"),
        ({Q_DOWN: np.ones((2, 320), "f4"), Q_UP: np.ones((320, 2), "f4")},
         r"another model: its layer \S+to_q maps 320 to 320 features, this model's maps 16 to 16"),
        ({"transformer.double_blocks.0.img_attn.proj.lora_A.weight": np.ones((2, 30), "f4"),
          "transformer.double_blocks.0.img_attn.proj.lora_B.weight": np.ones((20, 2), "f4")},
         r"another model: its layer \S+double_blocks\S+ \(30 to 20 features\) is not one"),
        ({"model.weight": ONE}, "'model.weight' that is not part of a LoRA"),
        ({Q_DOWN: ONE, Q_UP: ONE.T * np.nan}, r"\S+to_q holds values that are not finite"),
        ({Q_DOWN: ONE * np.inf, Q_UP: ONE.T}, "values that are not finite"),
        ({Q_DOWN: ONE, Q_UP: ONE.T, Q_ALPHA: np.array(np.nan, "f4")}, "one finite number"),
        ({Q_DOWN: ONE, Q_UP: ONE.T, Q_ALPHA: np.ones(3, "f4")}, "one finite number"),
        ({Q_DOWN: ONE.astype(bool), Q_UP: ONE.T}, "stores values as BOOL; save it as F32"),
        ({}, "holds no tensors"),
    ],
)  # fmt: skip
def test_read_lora_refuses_in_one_sentence_when_the_file_is_no_plain_lora(
    tensors: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(RequestError, match=words) as caught:
        read_denoiser(write_lora(tmp_path / "bad.safetensors", tensors), LAYOUT)
    sentence = caught.value.problems["prompt"]
    assert sentence.startswith("the LoRA 'bad' ")
    assert sentence.endswith(".")
    assert str(tmp_path) not in sentence


def test_read_lora_refuses_when_two_spellings_adapt_one_layer(tmp_path: Path) -> None:
    factors = random_factors(LAYOUT.layers[4:5], seed=6)
    tensors = tensors_from_factors(factors, "kohya") | tensors_from_factors(factors, "peft")
    with pytest.raises(RequestError, match="to_q twice"):
        read_denoiser(write_lora(tmp_path / "a.safetensors", tensors), LAYOUT)


def _damaged_files() -> dict[str, tuple[bytes, str]]:
    whole = save({Q_DOWN: ONE, Q_UP: np.ascontiguousarray(ONE.T)})
    size = int.from_bytes(whole[:8], "little")
    entry = {"dtype": "F32", "shape": [2, 16], "data_offsets": [0, 128]}

    def raw(header: Any, body: bytes = bytes(128)) -> bytes:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + body

    return {
        "empty": (b"", "no safetensors file: it has 0 bytes"),
        "pickle": (b"\x80\x04\x95" + bytes(100), "other formats are not read"),
        "zip": (b"PK\x03\x04" + bytes(100), "other formats are not read"),
        "huge header": ((1 << 60).to_bytes(8, "little") + b"{}", "no safetensors file"),
        "cut in the header": (whole[: 8 + size // 2], "truncated: its header"),
        "cut in the data": (whole[:-1], "truncated: .* ends 1 bytes past its end"),
        "no JSON": (raw(b"{" * 5000), "header is no JSON"),
        "no UTF-8": (raw(b"{\xff}"), "header is no JSON"),
        "overlong number": (raw(b'{"a": ' + b"1" * 5000 + b"}"), "damaged"),
        "entry no table": (raw({Q_DOWN: 3}), "describes .* wrongly"),
        "negative": (raw({Q_DOWN: {**entry, "shape": [-2, -16]}}), "describes .* wrongly"),
        "floats": (raw({Q_DOWN: {**entry, "shape": [2.0, 16]}}), "describes .* wrongly"),
        "wrong size": (raw({Q_DOWN: {**entry, "shape": [2, 17]}}), "does not fit its shape"),
        "backwards": (raw({Q_DOWN: {**entry, "data_offsets": [128, 0]}}), "does not fit"),
        "vast shape": (raw({Q_DOWN: {**entry, "shape": [1 << 40, 1 << 40]}}), "does not fit"),
        "unhashable dtype": (raw({Q_DOWN: {**entry, "dtype": []}}), "describes .* wrongly"),
        "unknown dtype": (raw({Q_DOWN: {**entry, "dtype": "Q4_K"}}), "stores .* as Q4_K"),
        "metadata": (raw({"__metadata__": 3}), "__metadata__ is no table"),
    }


@pytest.mark.parametrize("kind", _damaged_files())
def test_read_lora_refuses_in_one_sentence_when_the_file_is_damaged(
    kind: str, tmp_path: Path
) -> None:
    content, words = _damaged_files()[kind]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(RequestError, match=words):
        read_denoiser(path, LAYOUT)


def test_read_lora_refuses_when_the_file_is_missing_or_a_folder(tmp_path: Path) -> None:
    (tmp_path / "folder.safetensors").mkdir()
    for name in ("missing", "folder"):
        with pytest.raises(RequestError, match="cannot be read"):
            read_denoiser(tmp_path / f"{name}.safetensors", LAYOUT)


def test_read_lora_accepts_values_when_they_are_huge_but_finite(tmp_path: Path) -> None:
    huge = np.full((2, 16), 3e38, np.float32)
    tensors = {Q_DOWN: huge, Q_UP: np.ascontiguousarray(huge.T), Q_ALPHA: np.array(64.0, "f4")}
    weights = read_denoiser(write_lora(tmp_path / "a.safetensors", tensors), LAYOUT)
    assert weights.rank == 2
    narrow = read_denoiser(tmp_path / "a.safetensors", _layout(max_rank=1))
    assert narrow.rank == 1
    assert not np.isnan(narrow.rows).any()


def _true_error(exact: dict[str, Any], weights: Any, layout: LoraLayout) -> float:
    lost = sum(((delta_of(weights, layout, name) - delta).astype(np.float64) ** 2).sum()
               for name, delta in exact.items())  # fmt: skip
    return float(np.sqrt(lost / sum((d.astype(np.float64) ** 2).sum() for d in exact.values())))


def _stated_error(weights: Any) -> float:
    (warning,) = weights.warnings
    match = re.search(r"relative error of its weights is ([\d.e-]+)\.$", warning)
    assert match is not None
    return float(match[1])


@pytest.mark.parametrize(("ranks", "limit"), [((12,), 5), ((12, 3, 40), 8), ((6,), 1)])
def test_read_lora_states_the_true_error_when_it_reduces_the_rank(
    ranks: tuple[int, ...], limit: int, tmp_path: Path
) -> None:
    layout = _layout(max_rank=limit)
    factors = random_factors(layout.layers, seed=7, ranks=ranks, alphas=(2.0,))
    path = write_lora(tmp_path / "a.safetensors", tensors_from_factors(factors, "kohya"))
    weights = read_denoiser(path, layout)
    assert weights.rank == limit
    assert f"rank {max(ranks)} was reduced to {limit}" in weights.warnings[0]
    exact = {name: layer.delta for name, layer in factors.items()}
    error = _true_error(exact, weights, layout)
    # Stated with three digits: half a unit of the third is 0.5 % at most.
    assert _stated_error(weights) == pytest.approx(error, rel=5e-3)
    assert 0.05 < error < 1
    for name, delta in exact.items():  # and no approximation of this rank is better
        values = np.linalg.svd(delta.astype(np.float64), compute_uv=False)
        best = np.sqrt((values[limit:] ** 2).sum())
        lost = np.linalg.norm(delta_of(weights, layout, name).astype(np.float64) - delta)
        # float32 rows: rounding of 1e-7 a value beside an error of a tenth of the norm.
        assert lost == pytest.approx(best, rel=1e-4, abs=1e-6 * float(np.linalg.norm(delta)))


def test_read_lora_states_no_loss_when_a_wide_file_is_of_low_rank(tmp_path: Path) -> None:
    layout = _layout(max_rank=4)
    factors = random_factors(layout.layers, seed=8, ranks=(4,))
    doubled = {
        name: LayerFactors(
            down=np.concatenate([layer.down] * 3), up=np.concatenate([layer.up] * 3, 1), alpha=None
        )
        for name, layer in factors.items()
    }
    path = write_lora(tmp_path / "a.safetensors", tensors_from_factors(doubled, "peft"))
    weights = read_denoiser(path, layout)
    assert _stated_error(weights) < 1e-7
    _assert_deltas(weights, {name: 3 * layer.delta for name, layer in factors.items()}, layout)


def _two(tmp_path: Path, layout: LoraLayout = LAYOUT) -> tuple[Any, Any, Factors, Factors]:
    first = random_factors(layout.layers[:8], seed=9, ranks=(4, 2), alphas=(3.0,))
    second = random_factors(layout.layers[5:], seed=10, ranks=(3, 5), alphas=(None, 8.0))
    paths = [
        write_lora(tmp_path / f"{name}.safetensors", tensors_from_factors(factors, "kohya"))
        for name, factors in (("one", first), ("two", second))
    ]
    return read_denoiser(paths[0], layout), read_denoiser(paths[1], layout), first, second


def _weighted(first: Factors, a: float, second: Factors, b: float) -> dict[str, Any]:
    total: dict[str, Any] = {name: a * layer.delta for name, layer in first.items()}
    for name, layer in second.items():
        total[name] = total.get(name, 0) + b * layer.delta
    return total


def test_combine_loras_equals_the_weighted_sum_when_given_two(tmp_path: Path) -> None:
    one, two, first, second = _two(tmp_path)
    both = combine_loras([(one, 0.7), (two, -1.5)], LAYOUT)
    assert both.rank == max(a + b for a, b in zip(one.ranks, two.ranks, strict=True))
    assert both.warnings == ()
    _assert_deltas(both, _weighted(first, 0.7, second, -1.5))


def test_combine_loras_states_the_true_error_when_the_sum_is_too_wide(tmp_path: Path) -> None:
    one, two, first, second = _two(tmp_path)
    both = combine_loras([(one, 0.7), (two, -1.5)], LAYOUT, max_rank=4)
    assert both.rank == 4
    exact = _weighted(first, 0.7, second, -1.5)
    error = _true_error(exact, both, LAYOUT)
    assert _stated_error(both) == pytest.approx(error, rel=5e-3)  # three digits, as above
    assert "'one + two'" in both.warnings[0]


def test_combine_loras_shares_or_scales_when_only_one_counts(tmp_path: Path) -> None:
    one, two, first, _ = _two(tmp_path)
    assert combine_loras([(one, 1.0), (two, 0.0)], LAYOUT).rows is one.rows
    half = combine_loras([(one, 0.5)], LAYOUT)
    _assert_deltas(half, {name: 0.5 * layer.delta for name, layer in first.items()})
    _assert_deltas(one, {name: layer.delta for name, layer in first.items()})  # unchanged


def test_combine_loras_gives_a_narrow_zero_when_nothing_counts(tmp_path: Path) -> None:
    one, _, _, _ = _two(tmp_path)
    for parts in ([], [(one, 0.0)]):
        nothing = combine_loras(parts, LAYOUT)
        assert nothing.rows.shape == (LAYOUT.rows, 1)
        assert not nothing.rows.any()


def test_balanced_rows_keep_the_product_and_more_of_half_precision_when_b_is_tiny(
    tmp_path: Path,
) -> None:
    factors = random_factors(LAYOUT.layers, seed=11, alphas=(1e-5,))
    path = write_lora(tmp_path / "a.safetensors", tensors_from_factors(factors, "kohya"))
    weights = read_denoiser(path, LAYOUT)
    balanced = balanced_rows(weights.rows, LAYOUT)
    assert balanced.dtype == np.float32
    errors = []
    for rows in (balanced, balanced.astype(np.float16), weights.rows.astype(np.float16)):
        worst = 0.0
        for name, layer in factors.items():
            as_floats = type(weights)(name="", rows=rows.astype(np.float32), ranks=())
            lost = delta_of(as_floats, LAYOUT, name) - layer.delta
            worst = max(worst, float(np.abs(lost).max() / np.abs(layer.delta).max()))
        errors.append(worst)
    assert errors[0] < 1e-6  # powers of two are exact; what is left is the scale's rounding
    assert errors[1] < 2e-3  # half precision has 11 bits: 5e-4 a factor
    assert errors[2] > 1e-2  # unbalanced, B is subnormal there
