"""Sizes from the command line, and the profiles made of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from closeup.conditioning import ENCODER_ROWS
from closeup.errors import ExportError
from closeup.families import FLUX, SD15, SDXL, Family
from closeup.fields import ASPECT_RATIOS
from closeup.manifest import (
    Component,
    LoraLayer,
    LoraLayout,
    ModelManifest,
    SizeRange,
    UpscalerManifest,
    manifest_json,
    read_manifest,
)
from closeup.plans import PlanTensor, Profile
from export.profiles import (
    MAX_CHUNKS,
    denoiser_sides,
    detector_sides,
    encoder_batch,
    encoder_sides,
    limits_of,
    profile_of,
    tensors_of,
    upscaler_sides,
    vae_sides,
)
from export.sizes import Side, check_steps, default_sizes, parse_sizes, with_native
from tests.manifests import make_manifest


def fixed(width: int, height: int) -> SizeRange:
    return SizeRange(min_width=width, max_width=width, min_height=height, max_height=height)


SQUARE, TALL = fixed(512, 512), fixed(768, 1024)
RANGE = SizeRange(min_width=256, max_width=1024, min_height=320, max_height=768)
DENOISER_INPUTS = (
    PlanTensor(name="sample", dtype="float32", axes=("batch", 4, "height", "width")),
    PlanTensor(name="context", dtype="float32", axes=("rows", "tokens", 32)),
    PlanTensor(name="lora", dtype="bfloat16", axes=("adapters", 10, "rank")),
)


def profiles_of(manifest: ModelManifest, *sizes: SizeRange, alone: bool = False) -> list[Profile]:
    limits = limits_of(manifest, sizes, 16)
    found = denoiser_sides(manifest, limits, alone=alone)
    return [profile_of(name, DENOISER_INPUTS, sides) for name, sides in found.items()]


def test_parse_sizes_reads_lists_and_ranges() -> None:
    assert parse_sizes("512x512, 768x1024") == (SQUARE, TALL)
    assert parse_sizes("256x320-1024x768") == (RANGE,)
    assert parse_sizes("512x512,512x512") == (SQUARE,)
    assert [str(size) for size in (SQUARE, RANGE)] == ["512x512", "256x320 to 1024x768"]


@pytest.mark.parametrize(
    "text", ["", "512", "512x", "512x512;", "56x512", "512x5000", "512x512-256x512", "512x512-"]
)
def test_parse_sizes_refuses_what_is_no_size(text: str) -> None:
    with pytest.raises(ExportError, match=r"--sizes") as caught:
        parse_sizes(text)
    assert "\n" not in str(caught.value)


def test_check_steps_names_the_neighbours_of_an_uneven_size() -> None:
    check_steps((SQUARE,), 16)
    with pytest.raises(ExportError, match=r"520 is no multiple of 16.*take 512 or 528"):
        check_steps((fixed(520, 512),), 16)


@pytest.mark.parametrize("family", [SD15, SDXL, FLUX])
def test_default_sizes_take_every_named_aspect_ratio(family: Family) -> None:
    (size,) = default_sizes(family.native_px, family.size_step_px)
    step, native = family.size_step_px, family.native_px
    check_steps((size,), step)
    for across, down in ASPECT_RATIOS.values():
        width, height = (
            round((native * native * a / b) ** 0.5 / step) * step
            for a, b in ((across, down), (down, across))
        )
        assert size.takes(width, height), (width, height)
    assert not size.takes(2 * native, native)


def test_with_native_adds_the_face_pass_size_only_where_it_is_missing() -> None:
    assert with_native((TALL,), 512) == (TALL, SQUARE)
    assert with_native((RANGE,), 512) == (RANGE,)
    assert with_native((SQUARE, TALL), 512) == (SQUARE, TALL)


def test_denoiser_has_a_profile_a_size_with_the_batch_of_the_model() -> None:
    tall, square = profiles_of(make_manifest(), SQUARE, TALL)
    assert (tall.name, square.name) == ("768x1024", "512x512")
    sample, context, lora = (square.shapes[tensor.name] for tensor in DENOISER_INPUTS)
    assert (sample.min, sample.opt, sample.max) == ((1, 4, 64, 64), (4, 4, 64, 64), (4, 4, 64, 64))
    # Two rows a sequence; one to four chunks of a prompt.
    assert (context.min, context.opt) == ((1, 77, 32), (8, 77, 32))
    assert context.max == (8, 77 * MAX_CHUNKS, 32)
    # The zero row and sixteen adapters; a call without LoRAs has one row of rank 1.
    assert (lora.min, lora.max) == ((1, 10, 1), (17, 10, 8))
    assert tall.shapes["sample"].max == (4, 4, 128, 96)
    assert square.takes({"sample": (1, 4, 64, 64), "context": (2, 77, 32), "lora": (1, 10, 1)})
    assert not square.takes({"sample": (1, 4, 64, 72), "context": (2, 77, 32), "lora": (1, 10, 1)})


def test_denoiser_has_one_profile_more_a_size_for_a_sequence_alone() -> None:
    together, alone = profiles_of(make_manifest(), SQUARE, alone=True)
    assert alone.name == "512x512, alone"
    assert alone.shapes["sample"].opt == (1, 4, 64, 64)
    assert alone.shapes["context"].max[0] == 2
    assert together.shapes["sample"].max[0] == 4
    assert len(profiles_of(make_manifest(max_batch=1), SQUARE, alone=True)) == 1


def test_ranges_are_quickest_at_the_native_size() -> None:
    (profile,) = profiles_of(make_manifest(), RANGE)
    assert profile.shapes["sample"].min == (1, 4, 40, 32)
    assert profile.shapes["sample"].opt == (4, 4, 64, 64)
    assert profile.shapes["sample"].max == (4, 4, 96, 128)


def test_flux_has_one_row_a_sequence_and_prompts_of_one_length() -> None:
    manifest = make_manifest(family="flux", max_batch=3)
    encoders = tuple(
        dataclasses.replace(
            encoder, tokenizer=dataclasses.replace(encoder.tokenizer, max_tokens=512)
        )
        for encoder in manifest.encoders
    )
    (profile,) = profiles_of(dataclasses.replace(manifest, encoders=encoders), SQUARE)
    assert profile.shapes["context"].min == (1, 512, 32)
    assert profile.shapes["context"].max == (3, 512, 32)


def test_limits_leave_room_for_a_bank_that_can_be_counted() -> None:
    rows = 5_000_000  # FLUX.1's bank has about this many
    layers = (LoraLayer(name="a", in_features=rows // 2, out_features=rows // 2),)
    manifest = make_manifest(lora=LoraLayout(max_rank=32, layers=layers))
    limits = limits_of(manifest, (SQUARE,), 16)
    assert limits.lora_rows == (2**31 - 1) // (rows * 32) - 1 == 12
    tensor = PlanTensor(name="lora", dtype="float16", axes=("adapters", rows, "rank"))
    sides = denoiser_sides(manifest, limits, alone=False)["512x512"]
    profile_of("fits", (tensor,), sides)
    more = {**sides, "adapters": Side.up_to(limits.lora_rows + 2)}
    with pytest.raises(ExportError, match=r"lora has up to \d+ elements .*--lora-rank"):
        profile_of("too large", (tensor,), more)


def test_encoders_take_the_prompts_of_a_request_at_once() -> None:
    manifest = make_manifest(max_batch=1)
    sides = encoder_sides(manifest.encoders[0], manifest, limits_of(manifest, (SQUARE,), 4))
    assert sides["prompts"]["batch"] == Side(min=1, opt=3, max=3 * MAX_CHUNKS)
    assert "rank" not in sides["prompts"]
    # What Triton may put into a call is what the plan takes, and weighted prompts fit in.
    assert sides["prompts"]["batch"].max == encoder_batch(manifest) == ENCODER_ROWS
    assert encoder_batch(make_manifest(max_batch=8)) == 16
    encoder = dataclasses.replace(manifest.encoders[0], lora=manifest.lora)
    sides = encoder_sides(encoder, manifest, limits_of(manifest, (SQUARE,), 4))
    assert sides["prompts"]["adapters"].max == 5
    assert sides["prompts"]["rank"].max == 8


def test_vae_upscaler_and_detector_have_sides_for_their_axes() -> None:
    manifest = make_manifest()
    vae = vae_sides(manifest, limits_of(manifest, (TALL, RANGE), 4), 2)
    assert vae["768x1024"]["latent_height"] == Side.fixed(128)
    assert vae["256x320 to 1024x768"]["width"] == Side(min=256, opt=512, max=1024)
    assert vae["768x1024"]["batch"] == Side(min=1, opt=1, max=2)
    component = Component(
        model="upscaler", sha256="", bytes=0, precision="fp32", max_abs_error=0, max_rel_error=0,
        checks=(),
    )  # fmt: skip
    upscaler = UpscalerManifest(
        scale=4, tile_px=256, overlap_px=32, max_batch=4, component=component
    )
    assert upscaler_sides(upscaler)["tiles"]["height"] == Side(min=8, opt=256, max=256)
    detector = detector_sides(8)["pictures"]
    # The second look at a small picture, and the first at a large one.
    assert detector["width"].min <= 512 // 4
    assert detector["width"].max == 1280


def test_profile_of_names_an_axis_that_it_does_not_know() -> None:
    tensor = PlanTensor(name="x", dtype="float32", axes=("batch", "frames"))
    with pytest.raises(ExportError, match=r"input x varies along 'frames'.*expected batch"):
        profile_of("p", (tensor,), {"batch": Side.fixed(1)})


def test_tensors_of_reads_names_types_and_axes(tmp_path: Path) -> None:
    x = helper.make_tensor_value_info("x", TensorProto.BFLOAT16, ["batch", 3])
    y = helper.make_tensor_value_info("y", TensorProto.INT64, ["batch"])
    graph = helper.make_graph([], "g", [x], [y])
    onnx.save(helper.make_model(graph), tmp_path / "g.onnx")
    tensors = tensors_of(tmp_path / "g.onnx")
    assert tensors.inputs == (PlanTensor(name="x", dtype="bfloat16", axes=("batch", 3)),)
    assert tensors.outputs == (PlanTensor(name="y", dtype="int64", axes=("batch",)),)
    bad = helper.make_tensor_value_info("z", TensorProto.STRING, [1])
    onnx.save(helper.make_model(helper.make_graph([], "g", [bad], [])), tmp_path / "bad.onnx")
    with pytest.raises(ExportError, match="tensor z"):
        tensors_of(tmp_path / "bad.onnx")


def test_manifest_keeps_the_limits(tmp_path: Path) -> None:
    manifest = make_manifest()
    manifest = dataclasses.replace(manifest, limits=limits_of(manifest, (SQUARE, RANGE), 5))
    path = tmp_path / "manifest.json"
    path.write_text(manifest_json(manifest), encoding="utf-8")
    found = read_manifest(path)
    assert found.limits == manifest.limits
    assert found.limits is not None
    assert found.limits.takes(1024, 768)
    assert not found.limits.takes(1032, 768)
