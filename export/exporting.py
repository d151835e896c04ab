"""The whole export, step by step: load, write, check, publish."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

from closeup.errors import ExportError, ModelError
from closeup.families import SDXL
from closeup.manifest import (
    MANIFEST_NAME,
    Component,
    FaceDetectorManifest,
    LoraLayout,
    ModelManifest,
    TextEncoder,
    UpscalerManifest,
    manifest_json,
)
from closeup.segments import DENOISER_INPUTS, DENOISER_OUTPUTS, PLAIN_NAME
from export.adopting import adopt_detector, read_detector
from export.components import (
    face_detector_graph,
    face_detector_tensors,
    upscaler_graph,
)
from export.config import (
    DETECTOR_BATCH,
    ONNXRUNTIME_PARAMETERS,
    QUEUE_DELAY_US,
    UPSCALER_BATCH,
    TritonConfig,
    vae_batch,
)
from export.detector import OUTPUT_NAMES, FaceDetector, load_face_detector
from export.engines import PlanWriter
from export.facts import ModelFacts, check_facts, face_facts
from export.graphs import Graph, GraphTensor, export_graph, torch_dtype
from export.layouts import INDEX_NAME, EncoderLayout, PipelineLayout, layout_of, read_json
from export.options import ExportOptions
from export.parts import Part, WrittenPart, export_part
from export.pipelines import VAE, component_config, refuse_pickles
from export.precisions import (
    DENOISER,
    TEXT_ENCODER,
    TEXT_ENCODER_2,
    VAE_DECODER,
    VAE_ENCODER,
    Precision,
)
from export.profiles import encoder_batch
from export.repository import (
    DENOISER_MODEL,
    Staging,
    Stamp,
    add_to_index,
    open_staging,
)
from export.scratch import lock_repository
from export.single_file import converted_folder, family_of_file
from export.tokenizing import write_tokenizer
from export.upscalers import load_upscaler

logger = logging.getLogger(__name__)

# A denoiser this small is exported without LoRA inputs as well, for calls that use none: its steps
# are so short that unused LoRA operators cost a quarter of them. Weights are then there twice.
PLAIN_BYTES = 256 << 20


def export_pipeline(
    options: ExportOptions,
    folder: Path,
    facts: ModelFacts,
    fingerprint: str,
    plans: PlanWriter | None = None,
) -> ModelManifest:
    """Export the pipeline in ``folder`` into the repository.

    Args:
        options: of the export.
        folder: of the pipeline.
        facts: for the manifest.
        fingerprint: of all these.
        plans: builds the plans; None: the graphs themselves are served.

    Raises:
        ExportError: it cannot be exported or does not agree with PyTorch; the repository is as
            it was.
    """
    layout = layout_of(folder)
    check_facts(facts, flags=options.facts, family=layout.family)
    refuse_pickles(folder, layout)
    _refuse_absent_parts(options, layout)
    draft = _draft_manifest(options, folder, layout, facts)
    with open_staging(options.repository) as staging:
        manifest = _export_components(options, folder, layout, draft, staging)
        models = (manifest.denoiser, *_served_models(manifest))
        stamp = Stamp(fingerprint=fingerprint, models=models)
        if plans is not None:
            manifest, stamp = plans.add_pipeline(staging, manifest, stamp)
        staging.write_text(manifest.denoiser, MANIFEST_NAME, manifest_json(manifest))
        staging.write_stamp(manifest.denoiser, stamp)
        with lock_repository(options.repository):
            staging.publish()
            add_to_index(options.repository, options.name)
    return manifest


def export_single_file(
    options: ExportOptions,
    facts: ModelFacts,
    fingerprint: str,
    plans: PlanWriter | None = None,
) -> ModelManifest:
    """Export a checkpoint that is one file into the repository; see `export_pipeline`.

    Raises:
        ExportError: as `export_pipeline`, or it cannot be converted.
    """
    path = Path(options.model)
    layout = family_of_file(path) if options.config is None else layout_of(options.config)
    check_facts(facts, flags=options.facts, family=layout.family)
    denoiser = options.precision_of(DENOISER)
    encoders = {options.precision_of(name) for name in (TEXT_ENCODER, TEXT_ENCODER_2)}
    others = encoders.pop() if len(encoders) == 1 else Precision.FP32
    with converted_folder(path, options.config, denoiser, others, options.repository) as folder:
        return export_pipeline(options, folder, facts, fingerprint, plans)


def export_upscaler(
    path: Path,
    repository: Path,
    fingerprint: str,
    precision: Precision = Precision.FP32,
    plans: PlanWriter | None = None,
) -> UpscalerManifest:
    """Export a super-resolution network as the repository's ``upscaler``.

    Raises:
        ExportError: it cannot be read, exported, or does not agree with PyTorch.
    """
    loaded = load_upscaler(path)
    network = loaded.network.to(torch_dtype(precision))
    graph = upscaler_graph(network, precision=precision.value)
    with open_staging(repository) as staging:
        component = _export(staging, graph, "upscaler", max_batch=UPSCALER_BATCH)
        manifest = UpscalerManifest(
            scale=loaded.scale,
            tile_px=loaded.tile_px,
            overlap_px=loaded.overlap_px,
            max_batch=UPSCALER_BATCH,
            component=component,
        )
        stamp = Stamp(fingerprint=fingerprint, models=("upscaler",))
        if plans is not None:
            stamp = plans.add_upscaler(staging, manifest, stamp)
        _publish_shared(staging, "upscaler", manifest, stamp)
    return manifest


def export_face_detector(
    path: Path, repository: Path, fingerprint: str, plans: PlanWriter | None = None
) -> FaceDetectorManifest:
    """Export a face detector in YuNet's layout as the repository's ``face_detector``.

    Raises:
        ExportError: it cannot be read, exported, does not agree with PyTorch, or (an ONNX file)
            has other tensors.
    """
    with open_staging(repository) as staging:
        if _is_onnx(path):
            component = adopt_detector(path, staging.graph_path("face_detector"), OUTPUT_NAMES)
            image, tensors = face_detector_tensors(OUTPUT_NAMES)
            config = _served_config("face_detector", (image,), tensors, DETECTOR_BATCH)
            staging.write_config(config)
        else:
            graph = face_detector_graph(_load_detector(path), OUTPUT_NAMES)
            component = _export(staging, graph, "face_detector", max_batch=DETECTOR_BATCH)
        manifest = FaceDetectorManifest(component=component)
        stamp = Stamp(fingerprint=fingerprint, models=("face_detector",))
        if plans is not None:
            stamp = plans.add_face_detector(staging, manifest, stamp)
        _publish_shared(staging, "face_detector", manifest, stamp)
    return manifest


def check_shared(*, upscaler: Path | None, face_detector: Path | None) -> None:
    """Read the models that pipelines share, so that wrong files are told before a long export.

    Raises:
        ExportError: a file is no such model.
    """
    if upscaler is not None:
        load_upscaler(upscaler)
    if face_detector is not None:
        if _is_onnx(face_detector):
            read_detector(face_detector, OUTPUT_NAMES)
        else:
            _load_detector(face_detector)


def _is_onnx(path: Path) -> bool:
    return path.suffix.lower() == ".onnx"


def _load_detector(path: Path) -> FaceDetector:
    try:
        return load_face_detector(path)
    except (ModelError, OSError) as error:
        raise ExportError(f"{path} cannot be read as a face detector: {error}") from error


def _draft_manifest(
    options: ExportOptions, folder: Path, layout: PipelineLayout, facts: ModelFacts
) -> ModelManifest:
    """The manifest, but for the text encoders, the LoRA layout and the components."""
    vae = component_config(folder, layout, VAE)
    denoiser = component_config(folder, layout, layout.denoiser)
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    trained = int(denoiser.get("sample_size") or 0) * factor
    is_xl = layout.family is SDXL
    manifest = ModelManifest(
        name=options.name,
        family=layout.family.name,
        native_px=facts.native_px or trained or layout.family.native_px,
        vae_scale_factor=factor,
        scaling_factor=float(vae["scaling_factor"]),
        shift_factor=float(vae.get("shift_factor") or 0.0),
        scheduler=read_json(folder / "scheduler" / "scheduler_config.json"),
        encoders=(),
        precision=options.precision_of(DENOISER).value,
        max_batch=options.max_batch,
        lora=None,
        zero_empty_negative=is_xl and _forces_zeros(folder),
        guidance_embeds=bool(denoiser.get("guidance_embeds", False)),
        defaults=facts.defaults,
        face_prompt_suffix=facts.face_prompt_suffix or "",
    )
    given: dict[str, Any] = dict(face_facts(facts))
    return dataclasses.replace(manifest, **given)


def _refuse_absent_parts(options: ExportOptions, layout: PipelineLayout) -> None:
    names = {encoder.name for encoder in layout.encoders}
    for part in {TEXT_ENCODER, TEXT_ENCODER_2} & set(options.component_precision) - names:
        raise ExportError(
            f"--component-precision {part}: {layout.family.title} has no {part}; leave it out."
        )


def _forces_zeros(folder: Path) -> bool:
    # diffusers' default is True.
    return bool(read_json(folder / INDEX_NAME).get("force_zeros_for_empty_prompt", True))


def _export_components(
    options: ExportOptions,
    folder: Path,
    layout: PipelineLayout,
    draft: ModelManifest,
    staging: Staging,
) -> ModelManifest:
    components, encoders = [], []
    part = Part(
        folder=folder,
        name=DENOISER,
        precision=options.precision_of(DENOISER),
        max_rank=options.lora_rank,
        max_batch=options.max_batch,
        max_tokens=0,
    )
    for entry in layout.encoders:
        encoder, component = _export_encoder(options, entry, draft, part, staging)
        encoders.append(encoder)
        components.append(component)
    pictures = vae_batch(options.max_batch, draft.native_px)
    for name, model in ((VAE_ENCODER, draft.vae_encoder), (VAE_DECODER, draft.vae_decoder)):
        precision = options.precision_of(name)
        job = dataclasses.replace(part, name=name, precision=precision, max_rank=0)
        components.append(_export_served(staging, job, model, max_batch=pictures))
    tokens = next(e.tokenizer.max_tokens for e in encoders if "context" in e.outputs)
    job = dataclasses.replace(part, max_tokens=tokens)
    written = export_part(job, staging.graph_path(draft.denoiser), draft.denoiser)
    _write_denoiser(staging, draft.denoiser)
    _report(DENOISER, written.component)
    components.append(written.component)
    if written.layers and written.component.bytes < PLAIN_BYTES:
        path = staging.graph_path(draft.denoiser).with_name(PLAIN_NAME)
        plain = export_part(dataclasses.replace(job, max_rank=0), path, f"{draft.denoiser}/plain")
        _report("denoiser without LoRA inputs", plain.component)
        components.append(plain.component)
    return dataclasses.replace(
        draft,
        encoders=tuple(encoders),
        lora=_lora_layout(options, written),
        components=tuple(components),
    )


def _export_encoder(
    options: ExportOptions,
    entry: EncoderLayout,
    draft: ModelManifest,
    part: Part,
    staging: Staging,
) -> tuple[TextEncoder, Component]:
    """Export a text encoder with its tokenizer.

    With LoRA inputs its graph lies beside the denoiser's, whose process runs it.
    """
    denoiser = staging.folder / draft.denoiser
    tokenizer = write_tokenizer(part.folder, entry, denoiser, max_tokens=options.max_tokens)
    rank = options.lora_rank if entry.takes_lora else 0
    encoder = TextEncoder(name=entry.name, tokenizer=tokenizer, outputs=entry.outputs)
    job = dataclasses.replace(
        part,
        name=entry.name,
        precision=options.precision_of(entry.name, is_t5=not entry.takes_lora),
        max_rank=rank,
        max_tokens=tokenizer.max_tokens,
    )
    if not rank:
        model = draft.encoder_model(encoder)
        return encoder, _export_served(staging, job, model, max_batch=encoder_batch(draft))
    path = staging.graph_path(draft.denoiser).with_name(f"{entry.name}.onnx")
    written = export_part(job, path, f"{draft.denoiser}/{entry.name}")
    _report(entry.name, written.component)
    lora = _lora_layout(options, written)
    return dataclasses.replace(encoder, lora=lora), written.component


def _lora_layout(options: ExportOptions, written: WrittenPart) -> LoraLayout | None:
    if not written.layers:
        return None
    return LoraLayout(max_rank=options.lora_rank, layers=written.layers)


def _served_models(manifest: ModelManifest) -> tuple[str, ...]:
    """The pipeline's models that Triton's onnxruntime backend serves."""
    encoders = [manifest.encoder_model(e) for e in manifest.encoders if e.lora is None]
    return (*encoders, manifest.vae_encoder, manifest.vae_decoder)


def _export_served(staging: Staging, part: Part, model: str, *, max_batch: int) -> Component:
    """Export a part of a pipeline that Triton's onnxruntime backend serves."""
    written = export_part(part, staging.graph_path(model), model)
    staging.write_config(_served_config(model, written.inputs, written.outputs, max_batch))
    _report(part.name, written.component)
    return written.component


def _export(staging: Staging, graph: Graph, model: str, *, max_batch: int) -> Component:
    """Write, check and configure one graph that Triton's onnxruntime backend serves."""
    component = export_graph(graph, staging.graph_path(model), model)
    staging.write_config(_served_config(model, graph.inputs, graph.outputs, max_batch))
    _report(graph.title, component)
    return component


def _write_denoiser(staging: Staging, model: str) -> None:
    staging.write_config(
        TritonConfig(name=model, backend="python", inputs=DENOISER_INPUTS, outputs=DENOISER_OUTPUTS)
    )
    staging.write_text(model, "1/model.py", DENOISER_MODEL)


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
    stamp: Stamp,
) -> None:
    staging.write_text(model, MANIFEST_NAME, manifest_json(manifest))
    staging.write_stamp(model, stamp)
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
