"""closeup's denoiser as a TensorRT plan: built for this GPU and timed. Not run on a GPU yet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.gpu_blocks import NotRun, first_line
from benchmarks.gpu_findings import PLAN_SIDES, Findings
from benchmarks.gpu_models import Subject
from benchmarks.gpu_onnx import OnnxSteps, missing_cuda_provider
from benchmarks.gpu_plans import find_toolchains, require_toolchains
from benchmarks.gpu_timing import median_ms
from closeup.engines import Array, Engine, EngineOptions, open_engine
from closeup.plans import Flavour, Profile
from export.builder import BuildJob, Toolchain, build_plan
from export.plan_cache import obtain_plan
from export.profiles import Tensors, profile_of, tensors_of
from export.sizes import Side

COMMAND = "make bench-gpu"
Open = Callable[[Path], Engine]


def step_profiles(
    subject: Subject, tensors: Tensors, *, max_batch: int, alone: bool
) -> tuple[Profile, ...]:
    """Return the profiles that an export for pictures of this size has.

    Args:
        subject: whose denoiser.
        tensors: of its graph.
        max_batch: sequences in a call.
        alone: add a profile for one sequence, as exports for the data-centre TensorRT do.
    """
    profiles = []
    for batch in (max_batch, 1) if alone and max_batch > 1 else (max_batch,):
        sides = {
            "batch": Side.up_to(batch),
            "rows": Side.up_to(subject.rows(batch)),
            "height": Side.fixed(subject.side),
            "width": Side.fixed(subject.side),
            "tokens": Side.fixed(subject.tokens),
        }
        profiles.append(profile_of(f"batch {batch}", tensors.inputs, sides))
    return tuple(profiles)


def choose_target() -> tuple[str, str]:
    """Choose what an export for this GPU is served from.

    Returns:
        The export's ``--target``, and what that is, in words: plans where a TensorRT builds for
        this GPU, else the graphs in ONNX Runtime's CUDA provider and why not plans.

    Raises:
        NotRun: neither is there; says why of each.
    """
    toolchains, reasons = find_toolchains()
    if toolchains:
        first = toolchains[0]
        return first.flavour.value, f"{first.flavour.label} {first.version} plans"
    missing = missing_cuda_provider()
    if missing:
        raise NotRun(" ".join([*reasons, missing]))
    return "onnx", f"ONNX Runtime CUDA: {' '.join(reasons)}"


@dataclass(kw_only=True)
class PlanSteps:
    """Builds plans of a subject's exported graph and times them through closeup's engine.

    Attributes:
        graph: exported before (`OnnxSteps.export`).
        found: takes the figures.
        find: finds the TensorRTs that build for this GPU, see `require_toolchains`.
        open: opens a plan.
    """

    graph: OnnxSteps
    found: Findings
    find: Callable[[], tuple[list[Toolchain], list[str]]] = require_toolchains
    open: Open = partial(open_engine, options=EngineOptions(threads=4))

    def time(self, batches: Sequence[int]) -> None:
        """Build with each TensorRT and time each batch, the first row's answer compared.

        Raises:
            NotRun: no TensorRT builds for this GPU, or the graph was not exported.
        """
        toolchains, reasons = self.find()
        if not self.graph.path.is_file():
            raise NotRun("its graph was not exported.")
        for reason in reasons:
            self.found.note(self.graph.subject.name, reason)
        for toolchain in toolchains:
            try:
                self._time(toolchain, batches)
            except Exception as error:  # the other TensorRT is worth knowing all the same
                side = PLAN_SIDES[toolchain.flavour]
                self.found.note(self.graph.subject.name, f"{side}: {first_line(error)}")

    def build(self, toolchain: Toolchain, max_batch: int) -> Path:
        """Build the plan and return it.

        Raises:
            ExportError: it cannot be built.
        """
        subject, graph = self.graph.subject, self.graph.path
        tensors = tensors_of(graph)
        alone = toolchain.flavour is Flavour.TENSORRT
        job = BuildJob(
            model=f"{subject.name}_denoiser",
            graph=graph,
            tensors=tensors,
            profiles=step_profiles(subject, tensors, max_batch=max_batch, alone=alone),
            precision=self.graph.precision,
        )
        # In a folder of its own: two flavours may build the same graph.
        target = graph.with_name(f"{toolchain.flavour}.plan")

        def build(job: BuildJob, toolchain: Toolchain, target: Path) -> float:
            # Told of its steps, so that a block's time limit can stop it.
            return build_plan(job, toolchain, target, progress=lambda done, total: None)

        record = obtain_plan(job, toolchain, None, target, command=COMMAND, build=build).record
        self.found.note(
            subject.name,
            f"{toolchain.flavour.label} {toolchain.version}: plan of "
            f"{record.plan_bytes / 1e9:.2f} GB built in {record.build_s:.0f} s.",
        )
        return target

    def _time(self, toolchain: Toolchain, batches: Sequence[int]) -> None:
        side = PLAN_SIDES[toolchain.flavour]
        engine = self.open(self.build(toolchain, max(batches)))
        try:
            for batch in batches:
                feeds = self.graph.host_inputs(batch)
                if batch == 1:
                    self.graph.compare_reference(engine.run(feeds))
                ms = median_ms(partial(_step, engine, feeds), device="cpu")
                self.found.step_ms[self.graph.subject.name, side, batch] = ms
        finally:
            engine.close()


def _step(engine: Engine, feeds: dict[str, Array]) -> None:
    """One step as the denoiser's process runs it: the latents are the last step's."""
    outputs = engine.run(feeds)
    feeds["sample"] = np.ascontiguousarray(outputs["next_sample"])
    feeds["memory"] = np.ascontiguousarray(outputs["next_memory"])
