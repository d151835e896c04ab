"""The whole export, step by step: load, write, check, publish."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import onnx
from onnx import TensorProto

from closeup.errors import CloseupError, ExportError
from closeup.families import SD15
from closeup.manifest import (
    MANIFEST_NAME,
    Component,
    FaceDetectorManifest,
    LoraLayout,
    ModelManifest,
    Tokenizer,
    UpscalerManifest,
    manifest_json,
)
from closeup.segments import DENOISER_INPUTS, DENOISER_OUTPUTS
from export.components import (
    face_detector_graph,
    face_detector_tensors,
    text_encoder_graph,
    upscaler_graph,
    vae_decoder_graph,
    vae_encoder_graph,
    vae_factor,
)
from export.config import ONNXRUNTIME_PARAMETERS, QUEUE_DELAY_US, TritonConfig
from export.denoiser import DenoiserStep, denoiser_graph
from export.graphs import Graph, GraphTensor, export_graph, open_session
from export.options import ExportOptions, ModelFacts, Precision, hash_file
from export.pipelines import TOKENIZER_NAME, LoadedPipeline, load_pipeline, write_tokenizer
from export.repository import (
    DENOISER_MODEL,
    STAMP_NAME,
    Staging,
    add_to_index,
    lock_repository,
    open_staging,
    stamp_text,
)
from export.upscalers import load_upscaler

logger = logging.getLogger(__name__)

UPSCALER_BATCH = 4
DETECTOR_BATCH = 8
# Pictures in one VAE call: their activations, not the weights, are what fills the memory.
VAE_PIXELS = 512 * 512


def export_pipeline(
    options: ExportOptions, folder: Path, facts: ModelFacts, fingerprint: str
) -> ModelManifest:
    """Export the pipeline in ``folder`` into the repository.

    Raises:
        ExportError: it cannot be exported or does not agree with PyTorch; the repository is as
            it was.
    """
    pipeline = load_pipeline(folder)
    draft = _draft_manifest(options, pipeline, facts)
    with open_staging(options.repository) as staging:
        tokenizer = write_tokenizer(folder, staging.folder / draft.denoiser / TOKENIZER_NAME)
        draft = dataclasses.replace(draft, tokenizer=tokenizer)
        manifest = _export_components(options, pipeline, draft, staging)
        models = (
            manifest.denoiser, manifest.text_encoder, manifest.vae_encoder, manifest.vae_decoder,
        )  # fmt: skip
        staging.write_text(manifest.denoiser, MANIFEST_NAME, manifest_json(manifest))
        staging.write_text(manifest.denoiser, STAMP_NAME, stamp_text(fingerprint, models))
        with lock_repository(options.repository):
            staging.publish()
            add_to_index(options.repository, options.name)
    return manifest


def export_upscaler(path: Path, repository: Path, fingerprint: str) -> UpscalerManifest:
    """Export a super-resolution network as the repository's ``upscaler``.

    Raises:
        ExportError: it cannot be read, exported, or does not agree with PyTorch.
    """
    loaded = load_upscaler(path)
    graph = upscaler_graph(loaded.network)
    with open_staging(repository) as staging:
        component = _export(staging, graph, "upscaler", max_batch=UPSCALER_BATCH)
        manifest = UpscalerManifest(
            scale=loaded.scale,
            tile_px=loaded.tile_px,
            overlap_px=loaded.overlap_px,
            max_batch=UPSCALER_BATCH,
            component=component,
        )
        _publish_shared(staging, "upscaler", manifest, fingerprint)
    return manifest


def export_face_detector(path: Path, repository: Path, fingerprint: str) -> FaceDetectorManifest:
    """Export a face detector in YuNet's layout as the repository's ``face_detector``.

    Raises:
        ExportError: it cannot be read, exported, does not agree with PyTorch, or (an ONNX file)
            has other tensors.
    """
    from export.detector import OUTPUT_NAMES, load_face_detector

    with open_staging(repository) as staging:
        if path.suffix.lower() == ".onnx":
            component = _adopt_detector(staging, path, OUTPUT_NAMES)
        else:
            try:
                graph = face_detector_graph(load_face_detector(path), OUTPUT_NAMES)
            except (CloseupError, OSError, RuntimeError, ValueError) as error:
                raise ExportError(f"{path} cannot be read as a face detector: {error}") from error
            component = _export(staging, graph, "face_detector", max_batch=DETECTOR_BATCH)
        manifest = FaceDetectorManifest(component=component)
        _publish_shared(staging, "face_detector", manifest, fingerprint)
    return manifest


def _draft_manifest(
    options: ExportOptions, pipeline: LoadedPipeline, facts: ModelFacts
) -> ModelManifest:
    """The manifest, but for the tokenizer, the LoRA layout and the components."""
    factor = vae_factor(pipeline.vae)
    config = pipeline.vae.config
    manifest = ModelManifest(
        name=options.name,
        family=SD15.name,
        native_px=facts.native_px or int(pipeline.unet.config.sample_size) * factor,
        vae_scale_factor=factor,
        scaling_factor=float(config.scaling_factor),
        shift_factor=float(getattr(config, "shift_factor", None) or 0.0),
        scheduler=pipeline.scheduler,
        tokenizer=Tokenizer(path="", max_tokens=0, bos_token_id=0, eos_token_id=0, pad_token_id=0),
        precision=options.precision.value,
        max_batch=options.max_batch,
        lora=None,
        defaults=facts.defaults,
        face_prompt_suffix=facts.face_prompt_suffix or "",
    )
    if facts.face_crop_factor is None:
        return manifest
    return dataclasses.replace(manifest, face_crop_factor=float(facts.face_crop_factor))


def _export_components(
    options: ExportOptions, pipeline: LoadedPipeline, draft: ModelManifest, staging: Staging
) -> ModelManifest:
    half = options.precision is Precision.FP16
    tokens = draft.tokenizer.max_tokens
    pictures = max(1, min(options.max_batch, VAE_PIXELS // draft.native_px**2))
    text_encoder = pipeline.text_encoder.half() if half else pipeline.text_encoder
    components = [
        _export(
            staging,
            text_encoder_graph(text_encoder, max_tokens=tokens, precision=options.precision),
            draft.text_encoder,
            max_batch=2 * options.max_batch,
        ),
        _export(staging, vae_encoder_graph(pipeline.vae), draft.vae_encoder, max_batch=pictures),
        _export(staging, vae_decoder_graph(pipeline.vae), draft.vae_decoder, max_batch=pictures),
    ]
    graph = denoiser_graph(
        pipeline.unet.half() if half else pipeline.unet,
        max_tokens=tokens,
        max_rank=options.lora_rank,
        max_batch=options.max_batch,
        precision=options.precision,
    )
    components.append(_export_denoiser(staging, graph, draft.denoiser))
    assert isinstance(graph.module, DenoiserStep)
    layers = graph.module.layers
    return dataclasses.replace(
        draft,
        lora=LoraLayout(max_rank=options.lora_rank, layers=layers) if layers else None,
        components=tuple(components),
    )


def _export(staging: Staging, graph: Graph, model: str, *, max_batch: int) -> Component:
    """Write, check and configure one graph that Triton's onnxruntime backend serves."""
    component = export_graph(graph, staging.graph_path(model), model)
    staging.write_config(_served_config(model, graph.inputs, graph.outputs, max_batch))
    _report(graph.title, component)
    return component


def _export_denoiser(staging: Staging, graph: Graph, model: str) -> Component:
    component = export_graph(graph, staging.graph_path(model), model)
    staging.write_config(
        TritonConfig(name=model, backend="python", inputs=DENOISER_INPUTS, outputs=DENOISER_OUTPUTS)
    )
    staging.write_text(model, "1/model.py", DENOISER_MODEL)
    _report(graph.title, component)
    return component


def _adopt_detector(staging: Staging, path: Path, names: tuple[str, ...]) -> Component:
    """Take a detector that is ONNX already; there is no PyTorch to compare it with."""
    target = staging.graph_path("face_detector")
    target.write_bytes(path.read_bytes())
    try:
        session = open_session(target)
    except Exception as error:
        raise ExportError(f"ONNX Runtime cannot open {path}: {error}") from error
    inputs = [tensor.name for tensor in session.get_inputs()]
    outputs = {tensor.name for tensor in session.get_outputs()}
    if inputs != ["input"] or not outputs.issuperset(names):
        raise ExportError(
            f"{path} has inputs {inputs} and outputs {sorted(outputs)}; expected YuNet's: "
            f"input, and {', '.join(names)}."
        )
    has_batch = isinstance(session.get_inputs()[0].shape[0], str)
    image, tensors = face_detector_tensors(names)
    config = _served_config("face_detector", (image,), tensors, DETECTOR_BATCH if has_batch else 0)
    staging.write_config(config)
    return Component(
        model="face_detector",
        sha256=hash_file(target),
        bytes=target.stat().st_size,
        precision=_onnx_precision(target),
        max_abs_error=0.0,
        max_rel_error=0.0,
        checks=("taken as ONNX, not compared with PyTorch",),
    )


def _onnx_precision(path: Path) -> str:
    weights = onnx.load(path).graph.initializer
    return "fp16" if any(w.data_type == TensorProto.FLOAT16 for w in weights) else "fp32"


def _served_config(
    model: str,
    inputs: tuple[GraphTensor, ...],
    outputs: tuple[GraphTensor, ...],
    max_batch: int,
) -> TritonConfig:
    return TritonConfig(
        name=model,
        backend="onnxruntime",
        inputs=tuple(tensor.triton() for tensor in inputs),
        outputs=tuple(tensor.triton() for tensor in outputs),
        max_batch_size=max_batch,
        queue_delay_us=QUEUE_DELAY_US if max_batch > 1 else None,
        parameters=ONNXRUNTIME_PARAMETERS,
    )


def _publish_shared(
    staging: Staging,
    model: str,
    manifest: UpscalerManifest | FaceDetectorManifest,
    fingerprint: str,
) -> None:
    staging.write_text(model, MANIFEST_NAME, manifest_json(manifest))
    staging.write_text(model, STAMP_NAME, stamp_text(fingerprint, (model,)))
    with lock_repository(staging.repository):
        staging.publish()


def _report(title: str, component: Component) -> None:
    logger.info(
        "%s: %s, %.1f MB, differs from PyTorch by at most %.1e (relative %.1e) over %d checks",
        component.model,
        title,
        component.bytes / 1e6,
        component.max_abs_error,
        component.max_rel_error,
        len(component.checks),
    )
