"""The plans of an export: one for every graph in its staging folder, with the configs to match.

Needs no torch, so that plans can be built again for another GPU from the graphs that a repository
has.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from closeup.errors import ExportError
from closeup.manifest import (
    MANIFEST_NAME,
    FaceDetectorManifest,
    ModelManifest,
    UpscalerManifest,
    manifest_json,
    read_face_detector,
    read_manifest,
    read_upscaler,
)
from closeup.plans import PLAN_SUFFIX, Flavour, PlanTensor
from closeup.segments import DENOISER_INPUTS, DENOISER_OUTPUTS, PLAIN_NAME
from closeup.tensors import TritonTensor
from export.builder import BuildJob, Toolchain, build_plan, open_toolchain
from export.casts import check_casts
from export.config import (
    DETECTOR_BATCH,
    QUEUE_DELAY_US,
    TritonConfig,
    vae_batch,
)
from export.options import ExportOptions
from export.plan_cache import Obtained, PlanCache, obtain_plan
from export.profiles import (
    Sides,
    Tensors,
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
from export.progress import timed_report
from export.repository import STAMP_NAME, Staging, Stamp, open_staging, read_stamp
from export.scratch import lock_repository
from export.sizes import check_steps, default_sizes, with_native

logger = logging.getLogger(__name__)

_TRITON_TYPES = {
    "float32": "TYPE_FP32",
    "float16": "TYPE_FP16",
    "bfloat16": "TYPE_BF16",
    "int64": "TYPE_INT64",
}
# Tickets, slots and the LoRA bank are one process's, so a pipeline has one GPU: the first there is.
_GPUS = (0,)
_ON_PROFILE_CHANGE = {"execution_context_allocation_strategy": "ON_PROFILE_CHANGE"}
_DETECTOR_AXES = ("batch", "", "height", "width")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Wanted:
    """A plan of an export.

    Attributes:
        model: its name in the manifest.
        graph: the ONNX file in the staging folder.
        precision: of the network.
        sides: of the axes that vary, by profile.
        tensors: of the graph.
        max_batch: for config.pbtxt; None: the denoiser's process opens it, there is no config.
    """

    model: str
    graph: Path
    precision: str
    sides: Mapping[str, Sides]
    tensors: Tensors
    max_batch: int | None = None

    @property
    def plan(self) -> Path:
        """Where the plan goes."""
        return self.graph.with_suffix(PLAN_SUFFIX)


class PlanWriter:
    """Builds what ``--target tensorrt`` and ``tensorrt-rtx`` add to an export."""

    def __init__(self, options: ExportOptions, toolchain: Toolchain) -> None:
        """Take the options and the TensorRT to build with."""
        self._options = options.plans
        self._toolchain = toolchain
        bytes_kept = int(options.plans.cache_gb * 1e9)
        self._cache = (
            PlanCache(folder=options.plans.cache, max_bytes=bytes_kept) if bytes_kept else None
        )

    @property
    def fingerprint(self) -> str:
        """Hash of everything but the graphs that decides what is built."""
        facts = {
            "flavour": self._toolchain.flavour.value,
            "version": self._toolchain.version,
            "sms": self._toolchain.sms,
            "gpu": self._toolchain.gpu,
            "sizes": [str(size) for size in self._options.sizes],
            "lora_rows": self._options.lora_rows,
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def add_pipeline(
        self, staging: Staging, manifest: ModelManifest, stamp: Stamp
    ) -> tuple[ModelManifest, Stamp]:
        """Build the plans of a pipeline whose graphs are in ``staging``.

        Returns:
            The manifest with the plans' limits, and the stamp with their paths.

        Raises:
            ExportError: a plan cannot be built.
        """
        step_px = manifest.facts.size_step_px
        sizes = self._options.sizes or default_sizes(manifest.native_px, step_px)
        check_steps(sizes, step_px)
        limits = limits_of(
            manifest, with_native(sizes, manifest.native_px), self._options.lora_rows
        )
        if limits.lora_rows < self._options.lora_rows:
            logger.info(
                "%s: at most %d LoRA combinations at once, so that the bank can be counted",
                manifest.name,
                limits.lora_rows,
            )
        manifest = dataclasses.replace(manifest, limits=limits)
        wanted = list(self._pipeline_plans(staging, manifest))
        stamp = self._build_all(staging, wanted, stamp)
        staging.write_config(
            TritonConfig(
                name=manifest.denoiser,
                backend="python",
                inputs=DENOISER_INPUTS,
                outputs=DENOISER_OUTPUTS,
                kind="KIND_GPU",
                gpus=_GPUS,
            )
        )
        return manifest, stamp

    def add_upscaler(self, staging: Staging, manifest: UpscalerManifest, stamp: Stamp) -> Stamp:
        """Build the upscaler's plan; see `add_pipeline`."""
        graph = staging.graph_path("upscaler")
        wanted = _Wanted(
            model="upscaler",
            graph=graph,
            precision=manifest.component.precision,
            sides=upscaler_sides(manifest),
            tensors=tensors_of(graph),
            max_batch=manifest.max_batch,
        )
        return self._build_all(staging, [wanted], stamp)

    def add_face_detector(
        self, staging: Staging, manifest: FaceDetectorManifest, stamp: Stamp
    ) -> Stamp:
        """Build the face detector's plan; see `add_pipeline`."""
        graph = staging.graph_path("face_detector")
        tensors = _named_like_ours(tensors_of(graph))
        has_batch = isinstance(tensors.inputs[0].axes[0], str)
        wanted = _Wanted(
            model="face_detector",
            graph=graph,
            precision=manifest.component.precision,
            sides=detector_sides(DETECTOR_BATCH),
            tensors=tensors,
            max_batch=DETECTOR_BATCH if has_batch else 0,
        )
        return self._build_all(staging, [wanted], stamp)

    def rebuild(self, repository: Path, model: str) -> None:
        """Build plans from the graphs that a repository has.

        Args:
            repository: where they are.
            model: whose folder holds the export's stamp.

        Raises:
            ExportError: a plan cannot be built; what is served stays.
        """
        stamp = read_stamp(repository, model)
        if stamp is None:
            raise ExportError(f"{repository / model} has no {STAMP_NAME}: export it with --force.")
        with open_staging(repository) as staging:
            staging.adopt(stamp.models)
            if model == "upscaler":
                upscaler = read_upscaler(repository)
                assert upscaler is not None
                stamp = self.add_upscaler(staging, upscaler, stamp)
            elif model == "face_detector":
                detector = read_face_detector(repository)
                assert detector is not None
                stamp = self.add_face_detector(staging, detector, stamp)
            else:
                manifest = read_manifest(repository / model / MANIFEST_NAME)
                manifest, stamp = self.add_pipeline(staging, manifest, stamp)
                staging.write_text(model, MANIFEST_NAME, manifest_json(manifest))
            staging.write_stamp(model, stamp)
            with lock_repository(repository):
                staging.publish()

    def _pipeline_plans(self, staging: Staging, manifest: ModelManifest) -> Iterator[_Wanted]:
        """The plans of a pipeline, the quick ones first."""
        limits = manifest.limits
        assert limits is not None
        precisions = {one.model: one.precision for one in manifest.components}
        denoiser = staging.graph_path(manifest.denoiser)

        def want(model: str, graph: Path, sides: Mapping[str, Sides], batch: int | None) -> _Wanted:
            return _Wanted(
                model=model,
                graph=graph,
                precision=precisions[model],
                sides=sides,
                tensors=tensors_of(graph),
                max_batch=batch,
            )

        for encoder in manifest.encoders:
            sides = encoder_sides(encoder, manifest, limits)
            if encoder.lora is None:
                model = manifest.encoder_model(encoder)
                yield want(model, staging.graph_path(model), sides, encoder_batch(manifest))
            else:
                graph = denoiser.with_name(f"{encoder.name}.onnx")
                yield want(f"{manifest.denoiser}/{encoder.name}", graph, sides, None)
        pictures = vae_batch(manifest.max_batch, manifest.native_px)
        for model in (manifest.vae_encoder, manifest.vae_decoder):
            sides = vae_sides(manifest, limits, pictures)
            yield want(model, staging.graph_path(model), sides, pictures)
        alone = self._toolchain.flavour is Flavour.TENSORRT
        sides = denoiser_sides(manifest, limits, alone=alone)
        plain = denoiser.with_name(PLAIN_NAME)
        if plain.exists():
            yield want(f"{manifest.denoiser}/plain", plain, sides, None)
        yield want(manifest.denoiser, denoiser, sides, None)

    def _build_all(self, staging: Staging, wanted: list[_Wanted], stamp: Stamp) -> Stamp:
        for number, one in enumerate(wanted, start=1):
            self._build(one, f"{one.model} ({number} of {len(wanted)})")
            if one.max_batch is not None:
                staging.write_config(_plan_config(one, one.max_batch))
        plans = tuple(str(one.plan.relative_to(staging.folder)) for one in wanted)
        return dataclasses.replace(stamp, plans=plans, plans_fingerprint=self.fingerprint)

    def _build(self, wanted: _Wanted, title: str) -> None:
        casts = check_casts(wanted.graph, wanted.precision)
        job = BuildJob(
            model=wanted.model,
            graph=wanted.graph,
            tensors=wanted.tensors,
            profiles=tuple(
                profile_of(name, wanted.tensors.inputs, sides)
                for name, sides in wanted.sides.items()
            ),
            precision=wanted.precision,
        )
        logger.info(
            "%s: %s, %s, profiles %s",
            title,
            wanted.precision,
            casts.describe(),
            "; ".join(profile.name for profile in job.profiles),
        )
        report = timed_report(logger.info, title)
        obtained = obtain_plan(
            job,
            self._toolchain,
            self._cache,
            wanted.plan,
            command=self._options.command,
            build=functools.partial(build_plan, progress=report),
        )
        _report(title, obtained)


def open_plan_writer(options: ExportOptions) -> PlanWriter | None:
    """Return what builds the plans of an export; None when its target is ONNX.

    Raises:
        ExportError: TensorRT is missing, or has no GPU to build for.
    """
    if options.target.value not in list(Flavour):
        return None
    flavour = Flavour(options.target.value)
    cache = options.plans.cache if options.plans.cache_gb else None
    toolchain = open_toolchain(flavour, sms=options.plans.sms, cache_dir=cache)
    logger.info(
        "plans by %s %s for compute capability %s%s",
        flavour.label,
        toolchain.version,
        ", ".join(toolchain.sms),
        f" ({toolchain.gpu})" if toolchain.gpu else "",
    )
    return PlanWriter(options, toolchain)


def _plan_config(wanted: _Wanted, max_batch: int) -> TritonConfig:
    """Return the config of a model that Triton's tensorrt backend serves."""

    def declared(tensors: tuple[PlanTensor, ...]) -> tuple[TritonTensor, ...]:
        return tuple(_triton_tensor(tensor, batched=max_batch > 0) for tensor in tensors)

    profiles = len(wanted.sides)
    return TritonConfig(
        name=wanted.model,
        backend="tensorrt",
        engine_file=wanted.plan.name,
        inputs=declared(wanted.tensors.inputs),
        outputs=declared(wanted.tensors.outputs),
        max_batch_size=max_batch,
        queue_delay_us=QUEUE_DELAY_US if max_batch > 1 else None,
        kind="KIND_GPU",
        gpus=_GPUS,
        profiles=profiles if profiles > 1 else 0,
        # Else Triton makes a context a profile, each with the memory of the hungriest of all.
        parameters=_ON_PROFILE_CHANGE if profiles > 1 else {},
    )


def _triton_tensor(tensor: PlanTensor, *, batched: bool) -> TritonTensor:
    axes = tensor.axes[1:] if batched else tensor.axes
    dims = tuple(-1 if isinstance(axis, str) else axis for axis in axes)
    return TritonTensor(name=tensor.name, data_type=_TRITON_TYPES[tensor.dtype], dims=dims)


def _named_like_ours(tensors: Tensors) -> Tensors:
    """Name the axes of a detector that was taken as ONNX like those of an exported one."""

    def named(tensor: PlanTensor) -> PlanTensor:
        axes = tuple(
            ours if isinstance(axis, str) else axis
            for ours, axis in zip(_DETECTOR_AXES, tensor.axes, strict=True)
        )
        return dataclasses.replace(tensor, axes=axes)

    return dataclasses.replace(tensors, inputs=tuple(named(tensor) for tensor in tensors.inputs))


def _report(title: str, obtained: Obtained) -> None:
    record = obtained.record
    size_mb = record.plan_bytes / 1e6
    if obtained.from_cache:
        logger.info("%s: %.1f MB from the cache, built in %.1f s", title, size_mb, record.build_s)
    else:
        logger.info("%s: %.1f MB, built in %.1f s", title, size_mb, record.build_s)
