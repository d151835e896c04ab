"""Every kind of engine as a small graph on disk, with ONNX Runtime's answers on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnxruntime as ort
import torch

from benchmarks.gpu_blocks import first_line
from export.components import face_detector_graph, upscaler_graph
from export.detector import OUTPUT_NAMES, FaceDetector
from export.float_twin import write_float_twin
from export.graphs import Graph, open_session, write_graph
from export.layouts import layout_of
from export.parts import Part, build_graph
from export.precisions import DENOISER, VAE_DECODER, VAE_ENCODER, Precision
from export.upscalers import SRVGGNetCompact
from tests.tiny_pipelines import TOKENS, write_tiny_flux, write_tiny_pipeline, write_tiny_sdxl

WRITERS: Mapping[str, Callable[[Path], Path]] = {
    "sd15": write_tiny_pipeline,
    "sdxl": write_tiny_sdxl,
    "flux": write_tiny_flux,
}
SHARED_PARTS = ("upscaler", "face_detector")
RANK, BATCH, T5_TOKENS = 8, 4, 40


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One graph to write.

    Attributes:
        family: sd15, sdxl, flux, or empty for what all share.
        part: name of the component.
        precision: of the weights.
        folder: where everything goes.
    """

    family: str
    part: str
    precision: Precision
    folder: Path

    @property
    def title(self) -> str:
        """For tables."""
        return f"{self.family} {self.part}".strip()

    @property
    def path(self) -> Path:
        """The ONNX file."""
        return self.folder / f"{self.precision}-{self.family}-{self.part}" / "1" / "model.onnx"


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One call of a graph, answered on the CPU.

    Attributes:
        inputs: by name.
        outputs: by name.
    """

    inputs: Mapping[str, np.ndarray[Any, Any]]
    outputs: Mapping[str, np.ndarray[Any, Any]]


def plan_jobs(folder: Path) -> list[Job]:
    """Write the tiny pipelines into ``folder`` and list every graph of theirs, denoisers first."""
    jobs = []
    for family, write in WRITERS.items():
        pipeline = write(folder / family)
        encoders = [entry.name for entry in layout_of(pipeline).encoders]
        for precision in Precision:
            for part in (*encoders, DENOISER):
                jobs.append(Job(family=family, part=part, precision=precision, folder=folder))
        for part in (VAE_ENCODER, VAE_DECODER):  # float32 always
            jobs.append(Job(family=family, part=part, precision=Precision.FP32, folder=folder))
    for part in SHARED_PARTS:
        jobs.append(Job(family="", part=part, precision=Precision.FP32, folder=folder))
    return sorted(jobs, key=lambda job: job.part != DENOISER)


def try_job(job: Job) -> tuple[Job, tuple[Case, ...] | str]:
    """`write_job` for a pool of processes: a failure comes back as a sentence."""
    try:
        return job, write_job(job)
    except Exception as error:
        return job, f"the graph could not be written: {first_line(error)}"


def write_job(job: Job) -> tuple[Case, ...]:
    """Write a job's graph; returns its cases with ONNX Runtime's answers on the CPU.

    Raises:
        ExportError: it cannot be exported.
    """
    torch.set_num_threads(1)  # there is a process for every two cores
    graph = _graph(job)
    write_graph(graph, job.path)
    # ONNX Runtime has no bfloat16 on a CPU: its answers are those of the graph in float32.
    is_bfloat = job.precision == Precision.BF16
    session = open_session(write_float_twin(job.path) if is_bfloat else job.path)
    return tuple(_answer(graph, session, number) for number in range(len(graph.cases)))


def _answer(graph: Graph, session: ort.InferenceSession, number: int) -> Case:
    drawn = graph.draw(graph.cases[number], 2000 + number)
    inputs = {name: _array(value) for name, value in drawn.items()}
    names = [tensor.name for tensor in graph.outputs]
    readable = {name: _widened(array) for name, array in inputs.items()}
    outputs = dict(zip(names, session.run(names, readable), strict=True))
    return Case(inputs=inputs, outputs=outputs)


def _array(value: torch.Tensor) -> np.ndarray[Any, Any]:
    if value.dtype == torch.bfloat16:
        return value.float().numpy().astype(ml_dtypes.bfloat16)
    return value.numpy()


def _widened(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return array.astype(np.float32) if array.dtype == ml_dtypes.bfloat16 else array


def _graph(job: Job) -> Graph:
    torch.manual_seed(5)
    if job.part == "upscaler":
        return upscaler_graph(SRVGGNetCompact(features=8, convolutions=2, scale=4).eval())
    if job.part == "face_detector":
        return face_detector_graph(FaceDetector().eval(), OUTPUT_NAMES)
    pipeline = job.folder / job.family
    encoders = {entry.name: entry for entry in layout_of(pipeline).encoders}
    takes_lora = job.part == DENOISER or job.part in encoders and encoders[job.part].takes_lora
    is_t5 = job.part in encoders and not takes_lora
    return build_graph(
        Part(
            folder=pipeline,
            name=job.part,
            precision=job.precision,
            max_rank=RANK if takes_lora else 0,
            max_batch=BATCH,
            max_tokens=T5_TOKENS if is_t5 else TOKENS,
        )
    )
