"""Whole requests at the families' real sizes: served by Triton, and the same in diffusers.

Two requests a side: the picture alone, and with super-resolution and the face pass (one face,
`benchmarks.gpu_pipelines.write_sure_detector`). Not run on a GPU yet.
"""

from __future__ import annotations

import gc
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch

from benchmarks.gpu_blocks import NotRun, last_line
from benchmarks.gpu_findings import Findings
from benchmarks.gpu_models import Subject
from benchmarks.gpu_pipelines import (
    describe_request,
    request_fields,
    require_space,
    write_pipeline,
    write_sure_detector,
)
from benchmarks.gpu_timing import synchronize
from benchmarks.gpu_whole import run_served
from benchmarks.results import Section
from benchmarks.subjects import ROOT, WEIGHTS, add_python_models
from benchmarks.torch_networks import enlarge, find_faces
from closeup.detection import scale_faces
from closeup.face_blend import blend_faces, face_mask, find_place
from closeup.face_geometry import extract
from closeup.faces import FaceAction, FaceOptions, plan_faces
from closeup.images import Floats, floats_from_pixels, pixels_from_floats
from closeup.upscale import sr_factor
from export.detector import load_face_detector
from export.upscalers import load_upscaler

EAGER, COMPILED = "diffusers, eager, bf16", "diffusers, torch.compile, bf16"
OURS = "closeup through Triton"
SIDES = (OURS, EAGER, COMPILED)
FACE_FIELDS: Mapping[str, Any] = {"super_resolution": True, "inpaint_faces": True, "max_faces": 1}
REPEATS = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Seconds:
    """One side's medians.

    Attributes:
        plain_s: of the request without the face pass.
        faces_s: of the one with it.
        how: what ran, for the table.
    """

    plain_s: float
    faces_s: float
    how: str


@dataclass(kw_only=True)
class Requests:
    """Times the whole requests of one family.

    Attributes:
        subject: its denoiser.
        folder: scratch.
        device: cuda, or cpu for a trial.
        use_tiny: the tests' tiny networks.
        find_target: chooses what is served, see `benchmarks.gpu_plan_steps.choose_target`.
        found: takes the table.
    """

    subject: Subject
    folder: Path
    device: str
    use_tiny: bool
    find_target: Callable[[], tuple[str, str]]
    found: Findings
    seconds: dict[str, Seconds] = field(default_factory=dict)

    @property
    def native_px(self) -> int:
        """Side of the pictures."""
        return 64 if self.use_tiny else 8 * self.subject.side

    @property
    def fields(self) -> dict[str, Any]:
        """The request without the face pass; a trial takes few steps."""
        fields = request_fields(self.subject, native_px=self.native_px)
        return {**fields, "steps": 4} if self.use_tiny else fields

    @property
    def pipeline(self) -> Path:
        """The pipeline's folder; written at the first use."""
        folder = self.folder / f"{self.subject.name}-pipeline"
        if not (folder / "model_index.json").is_file():
            if not self.use_tiny:
                require_space(self.folder, self.subject.name)
            write_pipeline(self.subject, folder, device=self.device, use_tiny=self.use_tiny)
            if self.device == "cuda":
                torch.cuda.empty_cache()
        return folder

    @property
    def detector(self) -> Path:
        """The face detector's weights; written at the first use."""
        path = self.folder / "sure_detector.safetensors"
        if not path.is_file():
            write_sure_detector(path)
        return path

    def ours(self) -> None:
        """Export the pipeline as its users would, serve it, send both requests.

        Raises:
            NotRun: nothing here can run it on the device.
            RuntimeError: the export failed.
        """
        target, how = self.find_target()
        repository = self.folder / f"{self.subject.name}-{target}"
        done = subprocess.run(
            self.export_command(target, repository),
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"the export: {last_line(done.stderr)}")
        add_python_models(repository)
        requests = [self.fields, {**self.fields, **FACE_FIELDS}]
        plain, faces = run_served(repository, requests, device=self.device, repeats=REPEATS)
        if faces.faces != 1:
            raise ValueError(f"{faces.faces} faces were repainted; expected 1.")
        self._keep(OURS, Seconds(plain_s=plain.seconds, faces_s=faces.seconds, how=how))

    def export_command(self, target: str, repository: Path) -> list[str]:
        """Return the export's command line."""
        size = f"{self.native_px}x{self.native_px}"
        command = [
            sys.executable, "-m", "export", "--model", str(self.pipeline),
            "--name", self.subject.name, "--target", target, "--repository", str(repository),
            "--upscaler", str(WEIGHTS / "upscaler.safetensors"),
            "--face-detector", str(self.detector),
        ]  # fmt: skip
        if self.device == "cuda":
            in_plans = "bf16" if self.subject.is_flux else "fp16"
            command += ["--precision", "fp16" if target == "onnx" else in_plans]
        return command if target == "onnx" else [*command, "--sizes", size, "--cache-gb", "0"]

    def theirs(self, *, compiled: bool) -> None:
        """Run both requests in diffusers, after one of each to warm up.

        Raises:
            NotRun: torch.compile is asked for without a GPU.
        """
        if compiled and self.device != "cuda":
            raise NotRun("torch.compile is compared on a CUDA device.")
        try:
            self._theirs(compiled=compiled)
        finally:
            gc.collect()
            if self.device == "cuda":  # what comes next may be another process's
                torch._dynamo.reset()
                torch.cuda.empty_cache()

    def _theirs(self, *, compiled: bool) -> None:
        side = DiffusersRequests(
            self.pipeline, detector=self.detector, device=self.device,
            native_px=self.native_px, compiled=compiled,
        )  # fmt: skip
        plain_s = median_s(lambda: side.paint(self.fields), self.device)
        faces: list[int] = []
        faces_s = median_s(lambda: faces.append(side.repaint(self.fields)), self.device)
        if set(faces) != {1}:
            raise ValueError(f"{faces} faces were repainted; expected 1 each time.")
        how = "block by block" if compiled else ""
        self._keep(
            COMPILED if compiled else EAGER, Seconds(plain_s=plain_s, faces_s=faces_s, how=how)
        )

    def _keep(self, side: str, seconds: Seconds) -> None:
        self.seconds[side] = seconds
        self.found.sections = [
            section for section in self.found.sections if section.title != self.title
        ]
        self.found.sections.append(requests_section(self.title, self.seconds))

    @property
    def title(self) -> str:
        """Of the table."""
        return f"Whole request, {self.subject.title}: {describe_request(self.fields)}"


def requests_section(title: str, seconds: Mapping[str, Seconds]) -> Section:
    """Return the table of the sides; one that was not run says so."""
    rows = []
    for side in SIDES:
        known = seconds.get(side)
        if known is None:
            rows.append((side, "not run", "not run", ""))
        else:
            rows.append((side, f"{known.plain_s:.3f}", f"{known.faces_s:.3f}", known.how))
    return Section(
        title=title,
        columns=("", "s without face pass", "s with it", "how"),
        rows=tuple(rows),
        notes=(
            "With the face pass: super-resolution, detection, one face repainted and blended. "
            f"Medians of {REPEATS} requests after one to warm up; closeup's seconds are those its "
            "client waits, PNG file included.",
        ),
    )


def median_s(call: Callable[[], object], device: str) -> float:
    """Return the median seconds of `REPEATS` calls after one to warm up."""
    call()
    times = []
    for _ in range(REPEATS):
        synchronize(device)
        started_s = time.perf_counter()
        call()
        synchronize(device)
        times.append(time.perf_counter() - started_s)
    return float(np.median(times))


class DiffusersRequests:
    """A family's pipeline in diffusers, with the face pass that one writes around it.

    Text-to-image, then image-to-image over the crop with the same pipeline's networks; tiles,
    geometry and blending are closeup's numpy, on both sides the same.

    Args:
        pipeline: folder in diffusers layout.
        detector: weights of the face detector.
        device: cuda (bf16) or cpu (float32).
        native_px: side of the square that a crop is repainted at.
        compiled: compile the denoiser's repeated blocks.
    """

    def __init__(
        self, pipeline: Path, *, detector: Path, device: str, native_px: int, compiled: bool
    ) -> None:
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self._device, self._native_px = device, native_px
        self._pipe: Any = diffusers.DiffusionPipeline.from_pretrained(pipeline, torch_dtype=dtype)
        self._pipe.to(device)
        self._pipe.set_progress_bar_config(disable=True)
        self._repainter: Any = diffusers.AutoPipelineForImage2Image.from_pipe(self._pipe)
        self._repainter.set_progress_bar_config(disable=True)
        if compiled:
            denoiser = getattr(self._pipe, "transformer", None) or self._pipe.unet
            denoiser.compile_repeated_blocks(fullgraph=True)
        self._upscaler = load_upscaler(WEIGHTS / "upscaler.safetensors")
        self._upscaler.network.to(device)
        self._detector = load_face_detector(detector).to(device)

    @torch.no_grad()
    def paint(self, fields: Mapping[str, Any]) -> Floats:
        """Return the picture, (H, W, 3) float32 in [0, 1]."""
        picture: Floats = self._pipe(
            fields["prompt"], width=fields["w"], height=fields["h"], output_type="np",
            **self._common(fields, fields["seed"]),
        ).images[0]  # fmt: skip
        return picture

    @torch.no_grad()
    def repaint(self, fields: Mapping[str, Any]) -> int:
        """Paint, super-resolve, find the faces, repaint the first one; return how many."""
        picture = self.paint(fields)
        original = pixels_from_floats(picture)
        factor = sr_factor(*picture.shape[:2])
        pixels = pixels_from_floats(
            enlarge(picture, factor, upscaler=self._upscaler, device=self._device)
        )
        faces = find_faces(original, detector=self._detector, device=self._device)
        plans = plan_faces(
            scale_faces(faces, factor),
            image_size=(pixels.shape[0], pixels.shape[1]),
            work_px=self._native_px,
            options=FaceOptions(max_faces=1),
            seed=fields["seed"],
            enlarged=factor,
        )
        enlarged, repaints = floats_from_pixels(pixels), []
        for plan in plans:
            if plan.action is not FaceAction.REPAINT:
                continue
            crop = extract(enlarged, plan.crop, plan.work_px)
            patch = self._repainter(
                fields["prompt"],
                image=torch.from_numpy(np.ascontiguousarray(crop.transpose(2, 0, 1)))[None],
                width=plan.work_px, height=plan.work_px, strength=plan.strength,
                output_type="np", **self._common(fields, plan.seed),
            ).images[0]  # fmt: skip
            mask = face_mask(plan)
            repaints.append((patch, find_place(pixels, plan.crop, mask)))
        if repaints:
            blend_faces(pixels, repaints)
        return len(repaints)

    def _common(self, fields: Mapping[str, Any], seed: int) -> dict[str, Any]:
        return {
            "num_inference_steps": fields["steps"],
            "guidance_scale": fields["cfg_scale"],
            "generator": torch.Generator("cpu").manual_seed(seed),
        }
