"""``python -m export`` for SDXL and FLUX.1: manifests, text encoders, tokenizers, large weights."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline, StableDiffusionXLPipeline
from google.protobuf import text_format
from transformers import CLIPTokenizer, T5TokenizerFast
from tritonclient.grpc import model_config_pb2

from closeup.errors import ExportError
from closeup.manifest import ModelManifest, read_models
from closeup.tokens import PromptTokenizer
from export import graphs, parts
from export.__main__ import main, parse_options
from export.facts import ModelFacts
from export.graphs import open_session
from export.layouts import FLUX_LAYOUT, SD15_LAYOUT, SDXL_LAYOUT, layout_of
from export.options import (
    hash_file,
    pipeline_fingerprint,
    resolve_folder,
)
from export.parts import Part, build_graph, check_large_part, export_part
from export.pipelines import load_component
from export.precisions import DENOISER, Precision
from tests.step_reference import fuse, relative
from tests.tiny_pipelines import T5_CONTEXT, write_tiny_flux, write_tiny_pipeline, write_tiny_sdxl

PROMPT = "a photo of the woman, close up of the face, red coat, 42!"
RANK = 4
# Float32 rounding gives 1e-6; another layer's output or zeros give more than 1e-2.
CLOSE = 1e-5


@dataclasses.dataclass(frozen=True)
class Exported:
    pipeline: Path
    repository: Path

    @property
    def manifest(self) -> ModelManifest:
        return read_models(self.repository)["tiny"]

    def encode(self, name: str, ids: torch.Tensor) -> dict[str, npt.NDArray[Any]]:
        """Run a text encoder without a LoRA, wherever its graph lies."""
        manifest = self.manifest
        encoder = next(entry for entry in manifest.encoders if entry.name == name)
        inputs = {"input_ids": ids.numpy()}
        if encoder.lora is None:
            path = self.repository / manifest.encoder_model(encoder) / "1" / "model.onnx"
        else:
            path = self.repository / manifest.denoiser / "1" / f"{name}.onnx"
            inputs["lora"] = np.zeros((1, encoder.lora.rows, 1), np.float32)
            inputs["lora_row"] = np.zeros(len(ids), np.int64)
        results = open_session(path).run(list(encoder.outputs), inputs)
        return dict(zip(encoder.outputs, results, strict=True))


def export(pipeline: Path, repository: Path) -> Exported:
    torch.set_num_threads(1)
    arguments = ["--model", str(pipeline), "--name", "tiny", "--repository", str(repository)]
    assert main([*arguments, "--lora-rank", str(RANK), "--max-batch", "2"]) == 0
    return Exported(pipeline=pipeline, repository=repository)


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    root = tmp_path_factory.mktemp("sdxl")
    return export(write_tiny_sdxl(root / "pipeline"), root / "repository")


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    root = tmp_path_factory.mktemp("flux")
    return export(write_tiny_flux(root / "pipeline"), root / "repository")


def test_sdxl_manifest_says_what_the_pipeline_is(sdxl: Exported) -> None:
    manifest = sdxl.manifest
    assert (manifest.family, manifest.native_px, manifest.vae_scale_factor) == ("sdxl", 64, 8)
    assert manifest.scaling_factor == 0.13025
    assert manifest.zero_empty_negative
    assert not manifest.guidance_embeds
    assert [(e.name, e.outputs) for e in manifest.encoders] == [
        ("text_encoder", ("context",)),
        ("text_encoder_2", ("context", "pooled")),
    ]
    first, second = (encoder.tokenizer for encoder in manifest.encoders)
    assert (first.path, second.path) == ("tokenizer.json", "tokenizer_2.json")
    assert first.pad_token_id == first.eos_token_id
    assert second.pad_token_id == ord("!")
    for encoder in manifest.encoders:
        assert encoder.lora is not None
        names = [layer.name for layer in encoder.lora.layers]
        assert names[0] == "text_model.encoder.layers.0.self_attn.k_proj"
        assert "text_model.encoder.layers.1.mlp.fc2" in names
        assert len(names) % 6 == 0


def test_flux_manifest_says_what_the_pipeline_is(flux: Exported) -> None:
    manifest = flux.manifest
    assert (manifest.family, manifest.native_px) == ("flux", 64)
    assert (manifest.scaling_factor, manifest.shift_factor) == (0.3611, 0.1159)
    assert manifest.guidance_embeds
    assert not manifest.zero_empty_negative
    clip, t5 = manifest.encoders
    assert (clip.outputs, t5.outputs) == (("pooled",), ("context",))
    assert clip.lora is not None
    assert t5.lora is None
    assert (t5.tokenizer.max_tokens, t5.tokenizer.bos_token_id) == (512, None)
    assert manifest.lora is not None
    assert manifest.scheduler["_class_name"] == "FlowMatchEulerDiscreteScheduler"


@pytest.mark.parametrize("prompt", [PROMPT, "", "Red   COAT"])
def test_sdxl_encoders_give_the_pipelines_embeddings(sdxl: Exported, prompt: str) -> None:
    pipeline = StableDiffusionXLPipeline.from_pretrained(sdxl.pipeline)
    with torch.no_grad():
        context, _, pooled, _ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False)
    found = [sdxl.encode(e.name, ids_of(sdxl, e.name, prompt)) for e in sdxl.manifest.encoders]
    joined = np.concatenate([result["context"] for result in found], -1)
    assert relative(joined, context.numpy()) < CLOSE
    assert relative(found[1]["pooled"], pooled.numpy()) < CLOSE


def ids_of(exported: Exported, name: str, prompt: str) -> torch.Tensor:
    manifest = exported.manifest
    encoder = next(entry for entry in manifest.encoders if entry.name == name)
    tokenizer = PromptTokenizer(encoder.tokenizer, exported.repository / manifest.denoiser)
    return torch.tensor(tokenizer.encode(prompt).ids)[None]


@pytest.mark.parametrize("prompt", [PROMPT, "", "Red   COAT"])
def test_flux_encoders_give_the_pipelines_embeddings(flux: Exported, prompt: str) -> None:
    pipeline = FluxPipeline.from_pretrained(flux.pipeline)
    with torch.no_grad():
        context, pooled, _ = pipeline.encode_prompt(prompt, prompt_2=None)
    found = {
        e.name: flux.encode(e.name, ids_of(flux, e.name, prompt)) for e in flux.manifest.encoders
    }
    assert context.shape == (1, 512, T5_CONTEXT)
    assert relative(found["text_encoder_2"]["context"], context.numpy()) < CLOSE
    assert relative(found["text_encoder"]["pooled"], pooled.numpy()) < CLOSE


@pytest.mark.parametrize("prompt", [PROMPT, "", "Red   COAT", "zürich " * 300])
def test_flux_tokenizers_give_the_pipelines_ids(flux: Exported, prompt: str) -> None:
    options = {"padding": "max_length", "truncation": True}
    clip = CLIPTokenizer.from_pretrained(flux.pipeline / "tokenizer")
    t5 = T5TokenizerFast.from_pretrained(flux.pipeline / "tokenizer_2")
    expected = [
        clip(prompt, max_length=77, **options).input_ids,
        t5(prompt, max_length=512, **options).input_ids,
    ]
    for encoder, ids in zip(flux.manifest.encoders, expected, strict=True):
        assert ids_of(flux, encoder.name, prompt)[0].tolist() == ids


def test_text_encoder_equals_fused_weights_when_a_lora_is_used(sdxl: Exported) -> None:
    manifest = sdxl.manifest
    encoder = manifest.encoders[1]
    assert encoder.lora is not None
    model = load_component(sdxl.pipeline, SDXL_LAYOUT, encoder.name, torch.float32)
    draw = np.random.default_rng(0)
    bank = 0.1 * draw.standard_normal((3, encoder.lora.rows, 2)).astype(np.float32)
    ids = torch.cat([ids_of(sdxl, encoder.name, text) for text in (PROMPT, "a man")])
    rows = np.array([2, 1])
    session = open_session(sdxl.repository / manifest.denoiser / "1" / "text_encoder_2.onnx")
    inputs = {"input_ids": ids.numpy(), "lora": bank, "lora_row": rows}
    context, pooled = session.run(["context", "pooled"], inputs)
    for b, row in enumerate(rows):
        fused = fuse(model, encoder.lora.layers, bank[row])
        with torch.no_grad():
            expected = fused(ids[b : b + 1], output_hidden_states=True)
            plain = model(ids[b : b + 1], output_hidden_states=True)
        assert relative(context[b : b + 1], expected.hidden_states[-2].numpy()) < CLOSE
        assert relative(pooled[b : b + 1], expected.text_embeds.numpy()) < CLOSE
        assert relative(pooled[b : b + 1], plain.text_embeds.numpy()) > 1e-2


def part_of(pipeline: Path, name: str, precision: Precision = Precision.FP32) -> Part:
    return Part(
        folder=pipeline, name=name, precision=precision, max_rank=RANK, max_batch=2, max_tokens=16
    )


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        (DENOISER, Precision.FP32),
        (DENOISER, Precision.FP16),
        ("text_encoder_2", Precision.FP32),
        ("text_encoder_2", Precision.FP16),
    ],
)
def test_streamed_file_agrees_with_pytorch_when_weights_are_large(
    flux: Exported,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    precision: Precision,
) -> None:
    monkeypatch.setattr(graphs, "STREAM_BYTES", 0)
    part = part_of(flux.pipeline, name, precision)
    graph = build_graph(part)
    path = tmp_path / "model.onnx"
    graphs.write_graph(graph, path)
    agreement = check_large_part(part, path)
    assert agreement.max_rel_error < graphs.LIMITS[precision.value]
    data = path.with_name("model.onnx_data")
    # Nearly every weight lies outside, and none twice.
    weights = sum(value.nbytes for value in graph.module.parameters())
    assert 0.8 * weights < data.stat().st_size < 1.3 * weights + 4096 * 40
    model = onnx.load(path, load_external_data=False)
    assert len({tensor.name for tensor in model.graph.initializer}) == len(model.graph.initializer)
    assert [value.name for value in model.graph.input] == [tensor.name for tensor in graph.inputs]


@pytest.mark.slow
def test_streamed_denoiser_of_sdxl_agrees_with_pytorch(
    sdxl: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "STREAM_BYTES", 0)
    part = dataclasses.replace(part_of(sdxl.pipeline, DENOISER), max_tokens=77)
    graphs.write_graph(build_graph(part), tmp_path / "model.onnx")
    assert check_large_part(part, tmp_path / "model.onnx").max_rel_error < CLOSE


@pytest.mark.slow
def test_export_part_checks_in_a_second_process_when_weights_are_large(
    flux: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "APART_BYTES", 0)
    part = part_of(flux.pipeline, "text_encoder")
    written = export_part(part, tmp_path / "model.onnx", "tiny")
    assert 0 < written.component.max_rel_error < CLOSE
    assert len(written.component.checks) == 3


def test_check_large_part_refuses_when_the_file_has_other_weights(
    flux: Exported, tmp_path: Path
) -> None:
    part = part_of(flux.pipeline, "text_encoder")
    graphs.write_graph(build_graph(part), tmp_path / "model.onnx")
    other = write_tiny_flux(tmp_path / "other", seed=7)
    with pytest.raises(ExportError, match="does not agree with PyTorch"):
        check_large_part(dataclasses.replace(part, folder=other), tmp_path / "model.onnx")


@pytest.mark.parametrize(
    ("kind", "family"),
    [
        ("StableDiffusionInpaintPipeline", "sd15"),
        ("StableDiffusionXLImg2ImgPipeline", "sdxl"),
        ("FluxInpaintPipeline", "flux"),
    ],
)
def test_layout_of_knows_every_form_of_a_pipeline(tmp_path: Path, kind: str, family: str) -> None:
    layouts = {"sd15": SD15_LAYOUT, "sdxl": SDXL_LAYOUT, "flux": FLUX_LAYOUT}
    write_index(tmp_path, family, kind)
    assert layout_of(tmp_path) is layouts[family]


def test_layout_of_names_the_part_when_it_is_missing(tmp_path: Path) -> None:
    write_index(tmp_path, "sdxl", "StableDiffusionXLImg2ImgPipeline", text_encoder=[None, None])
    with pytest.raises(ExportError, match="has no text_encoder"):
        layout_of(tmp_path)
    write_index(tmp_path, "flux", "FluxPipeline", transformer=["diffusers", "OtherModel"])
    with pytest.raises(ExportError, match="transformer is a OtherModel; expected Flux"):
        layout_of(tmp_path)


def write_index(folder: Path, family: str, kind: str, **changes: Any) -> None:
    layouts = {"sd15": SD15_LAYOUT, "sdxl": SDXL_LAYOUT, "flux": FLUX_LAYOUT}
    layout = layouts[family]
    index: dict[str, Any] = {
        "_class_name": kind,
        layout.denoiser: ["diffusers", layout.denoiser_class],
    }
    index |= {entry.name: ["transformers", entry.class_name] for entry in layout.encoders}
    (folder / "model_index.json").write_text(json.dumps({**index, **changes}), encoding="utf-8")


def test_load_component_takes_the_only_variant_there_is(tmp_path: Path) -> None:
    folder = write_tiny_pipeline(tmp_path / "pipeline")
    for part in ("unet", "text_encoder"):
        file = next((folder / part).glob("*.safetensors"))
        shutil.move(file, file.with_name(f"{file.stem}.fp16.safetensors"))
        module = load_component(folder, SD15_LAYOUT, part, torch.float32)
        assert next(module.parameters()).dtype == torch.float32


def test_load_component_refuses_when_weights_overflow_float16(tmp_path: Path) -> None:
    folder = write_tiny_pipeline(tmp_path / "pipeline")
    unet = load_component(folder, SD15_LAYOUT, "unet", torch.float32)
    unet.get_parameter("conv_in.weight").fill_(1e5)
    unet.save_pretrained(folder / "unet")  # type: ignore[operator]
    with pytest.raises(ExportError, match=r"conv_in.weight has values that float16 cannot hold"):
        load_component(folder, SD15_LAYOUT, "unet", torch.float16)


def test_served_text_encoders_config_names_its_tensors(flux: Exported) -> None:
    text = (flux.repository / "tiny_text_encoder_2" / "config.pbtxt").read_text(encoding="utf-8")
    config = text_format.Parse(text, model_config_pb2.ModelConfig())
    assert (config.backend, config.max_batch_size) == ("onnxruntime", 4)
    assert [(t.name, list(t.dims)) for t in config.input] == [("input_ids", [512])]
    assert [(t.name, list(t.dims)) for t in config.output] == [("context", [512, T5_CONTEXT])]
    assert not (flux.repository / "tiny_text_encoder").exists()


def test_export_takes_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_tiny_pipeline(tmp_path / "pipeline")
    snapshot = write_hub_cache(folder, tmp_path / "hub" / "models--owner--name")
    monkeypatch.setattr(DiffusionPipeline, "download", lambda *_, **__: str(snapshot))
    found = resolve_folder("owner/name")
    options = parse_options(["--model", "owner/name", "--name", "tiny"])
    assert layout_of(found) is SD15_LAYOUT
    assert pipeline_fingerprint(options, found, ModelFacts()) == pipeline_fingerprint(
        options, folder, ModelFacts()
    )
    for part in SD15_LAYOUT.components:
        load_component(found, SD15_LAYOUT, part, torch.float32)


def write_hub_cache(folder: Path, cache: Path) -> Path:
    """Lay a folder out as the hub's cache does: blobs, and a snapshot of links to them."""
    snapshot = cache / "snapshots" / "0123abcd"
    (cache / "blobs").mkdir(parents=True)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            blob = cache / "blobs" / hash_file(path)
            shutil.copy(path, blob)
            link = snapshot / path.relative_to(folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot
