"""SDXL and FLUX.1 as plans, really compiled with TensorRT-RTX; no GPU needed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from closeup.plans import find_plans, read_record, verify_plan
from export.casts import check_casts
from export.parts import Part, build_graph
from export.precisions import Precision
from tests.engine_exports import DTYPES, EngineExport, runtime_facts
from tests.tiny_pipelines import write_tiny_flux, write_tiny_sdxl

pytest.importorskip(
    "tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install -e '.[tensorrt-rtx]'"
)

MAX_BATCH, RANK, LORA_ROWS, T5_TOKENS = 2, 8, 3, 24
BF16, FP16, FP32 = Precision.BF16, Precision.FP16, Precision.FP32
# Part of the pipeline, precision, and rank of its LoRA inputs, by model.
Parts = dict[str, tuple[str, Precision, int]]
SDXL: Parts = {
    "xl_denoiser/text_encoder": ("text_encoder", BF16, RANK),
    "xl_denoiser/text_encoder_2": ("text_encoder_2", FP32, RANK),
    "xl_vae_encoder": ("vae_encoder", BF16, 0),
    "xl_vae_decoder": ("vae_decoder", FP32, 0),
    "xl_denoiser/plain": ("denoiser", BF16, 0),
    "xl_denoiser": ("denoiser", BF16, RANK),
}
FLUX: Parts = {
    "flux_denoiser/text_encoder": ("text_encoder", FP16, RANK),
    "flux_text_encoder_2": ("text_encoder_2", BF16, 0),  # T5: not in float16
    "flux_vae_encoder": ("vae_encoder", BF16, 0),
    "flux_vae_decoder": ("vae_decoder", BF16, 0),
    "flux_denoiser/plain": ("denoiser", FP16, 0),
    "flux_denoiser": ("denoiser", FP16, RANK),
}
PARTS = SDXL | FLUX
# Float32 inside the network: T5's norms, its softmax and the table of its positions; FLUX.1's
# norms and rotations, one for the queries and one for the keys of each of four blocks.
STRETCHES = {"flux_text_encoder_2": 7, "flux_denoiser": 8, "flux_denoiser/plain": 8}


def export(root: Path, name: str, *flags: str) -> EngineExport:
    torch.set_num_threads(1)
    pipeline = root / "pipeline"
    if name == "xl":
        write_tiny_sdxl(pipeline)
        (pipeline / "closeup.json").write_text(json.dumps({"native_px": 64}), encoding="utf-8")
    else:
        write_tiny_flux(pipeline)
    exported = EngineExport(
        pipeline=pipeline,
        repository=root / "repository",
        arguments=[
            "--model", str(pipeline), "--name", name, "--target", "tensorrt-rtx",
            "--max-batch", str(MAX_BATCH), "--lora-rank", str(RANK),
            "--lora-rows", str(LORA_ROWS), "--max-tokens", str(T5_TOKENS),
            "--repository", str(root / "repository"), "--cache", str(root / "cache"), *flags,
        ],
    )  # fmt: skip
    exported.run()
    return exported


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> EngineExport:
    mixed = ("--component-precision", "text_encoder_2=fp32", "vae_decoder=fp32")
    root = tmp_path_factory.mktemp("sdxl_engines")
    return export(root, "xl", "--precision", "bf16", *mixed, "--sizes", "64x64-128x96")


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> EngineExport:
    root = tmp_path_factory.mktemp("flux_engines")
    sizes = ("--sizes", "64x64,96x128", "--sms", "8.9,12.0")
    return export(root, "flux", "--precision", "fp16", *sizes)


@pytest.fixture
def exported(request: pytest.FixtureRequest, model: str) -> EngineExport:
    """The export that a model belongs to."""
    found: EngineExport = request.getfixturevalue("sdxl" if model in SDXL else "flux")
    return found


def limits_of(model: str) -> list[dict[str, tuple[int, int]]]:
    """Smallest and largest size of every axis by profile, as the command lines ask for them."""
    if model in SDXL:
        sizes = [((64, 96), (64, 128))]
    else:
        sizes = [((128, 128), (96, 96)), ((64, 64), (64, 64))]
    part, *_ = PARTS[model]
    rows, tokens = (2, (77, 4 * 77)) if model in SDXL else (1, (T5_TOKENS, T5_TOKENS))
    found = []
    for high, wide in sizes:
        latents = {
            name: (side[0] // 8, side[1] // 8) for name, side in (("height", high), ("width", wide))
        }
        limits = {
            "batch": (1, MAX_BATCH),
            "rows": (1, rows * MAX_BATCH),
            "tokens": tokens,
            "adapters": (1, LORA_ROWS + 1),
            "rank": (1, RANK),
            **(latents if part == "denoiser" else {"height": high, "width": wide}),
            **{f"latent_{name}": side for name, side in latents.items()},
        }
        if part.startswith("text_encoder"):
            # Three prompts, of four chunks with weights.
            return [{**limits, "batch": (1, 12 if model in SDXL else 2 * MAX_BATCH)}]
        found.append(limits)
    return found


@pytest.mark.parametrize("name", ["sdxl", "flux"])
def test_every_component_is_compiled(name: str, request: pytest.FixtureRequest) -> None:
    exported: EngineExport = request.getfixturevalue(name)
    models = SDXL if name == "sdxl" else FLUX
    assert set(exported.handed) == set(models)
    assert find_plans(exported.repository) == sorted(map(exported.plan, models))
    precisions = {one.model: one.precision for one in exported.manifest.components}
    assert precisions == {model: precision.value for model, (_, precision, _) in models.items()}


@pytest.mark.parametrize("model", PARTS)
def test_network_and_profiles_handed_to_the_builder_are_the_specification(
    exported: EngineExport, model: str
) -> None:
    name, precision, rank = PARTS[model]
    is_t5 = model == "flux_text_encoder_2"
    handed = exported.handed[model]
    graph = build_graph(
        Part(
            folder=exported.pipeline, name=name, precision=precision, max_rank=rank,
            max_batch=MAX_BATCH, max_tokens=T5_TOKENS if is_t5 else 77,
        )
    )  # fmt: skip
    for got, tensors in ((handed.inputs, graph.inputs), (handed.outputs, graph.outputs)):
        assert got == {
            tensor.name: (
                DTYPES[tensor.dtype],
                tuple(-1 if isinstance(axis, str) else axis for axis in tensor.axes),
            )
            for tensor in tensors
        }
    wanted = limits_of(model)
    assert len(handed.profiles) == len(wanted)
    for profile, limits in zip(handed.profiles, wanted, strict=True):
        for tensor in graph.inputs:
            low, best, high = profile[tensor.name]
            for axis, *sides in zip(tensor.axes, low, best, high, strict=True):
                ends = limits[axis] if isinstance(axis, str) else (axis, axis)
                assert (sides[0], sides[2]) == ends, (tensor.name, axis)
                assert ends[0] <= sides[1] <= ends[1]
    assert handed.strongly_typed
    assert handed.tf32 is (precision is not FP32)


@pytest.mark.parametrize("model", PARTS)
def test_plans_are_for_the_gpus_that_were_asked_for(exported: EngineExport, model: str) -> None:
    record = verify_plan(exported.plan(model), runtime_facts())
    assert record.precision == PARTS[model][1].value
    if model in FLUX:
        assert record.sms == ("8.9", "12.0")
        assert exported.handed[model].sms == ("SM89", "SM120")


@pytest.mark.parametrize("model", [m for m, (_, p, _) in PARTS.items() if p is not FP32])
def test_float32_inside_the_networks_is_norms_softmaxes_and_rotations_alone(
    exported: EngineExport, model: str
) -> None:
    record = read_record(exported.plan(model))
    report = check_casts(exported.plan(model).with_suffix(".onnx"), record.precision)
    assert len(report.stretches) == STRETCHES.get(model, 0)
    assert report.narrowing >= 1
    assert report.widening >= 1


def test_served_t5_has_the_batch_and_the_length_of_its_plan(flux: EngineExport) -> None:
    text = (flux.repository / "flux_text_encoder_2" / "config.pbtxt").read_text(encoding="utf-8")
    config = text_format.Parse(text, pb.ModelConfig())
    record = read_record(flux.plan("flux_text_encoder_2"))
    assert (config.backend, config.max_batch_size) == ("tensorrt", 2 * MAX_BATCH)
    assert [list(tensor.dims) for tensor in config.input] == [[T5_TOKENS]]
    assert config.input[0].data_type == pb.TYPE_INT64
    assert record.profiles[0].shapes["input_ids"].max == (2 * MAX_BATCH, T5_TOKENS)
    text = (flux.repository / "flux_vae_decoder" / "config.pbtxt").read_text(encoding="utf-8")
    config = text_format.Parse(text, pb.ModelConfig())
    assert list(config.instance_group[0].profile) == ["0", "1"]
    strategy = config.parameters["execution_context_allocation_strategy"].string_value
    assert strategy == "ON_PROFILE_CHANGE"
