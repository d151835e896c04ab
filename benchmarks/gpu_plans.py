"""The graphs of `make gpu-check` as TensorRT plans, built and run where TensorRT is present."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu_blocks import NotRun
from benchmarks.gpu_graphs import Case, Job
from closeup.devices import find_gpu
from closeup.engines import Engine, EngineOptions, open_engine
from closeup.errors import ExportError, ModelError
from closeup.plan_engine import PlanEngine
from closeup.plans import Flavour, Profile, ShapeRange
from export.builder import BuildJob, Toolchain, build_plan, open_toolchain
from export.graphs import compare
from export.plan_cache import obtain_plan
from export.profiles import tensors_of

COMMAND = "make gpu-check"
_ROUNDS = 4


def find_toolchains() -> tuple[list[Toolchain], list[str]]:
    """Return each TensorRT that can build plans for this GPU, and a sentence for each other."""
    gpu = find_gpu()
    found, reasons = [], []
    for flavour in Flavour:
        try:
            toolchain = open_toolchain(flavour)
        except ExportError as error:
            reasons.append(str(error))
            continue
        if gpu is None:
            reasons.append(f"{flavour.label}: there is no GPU to open plans on.")
        elif gpu.sm not in toolchain.sms:
            reasons.append(
                f"{flavour.label} {toolchain.version} builds for compute capability "
                f"{', '.join(toolchain.sms)}, and {gpu.name} has {gpu.sm}."
            )
        else:
            found.append(toolchain)
    return found, reasons


def require_toolchains() -> tuple[list[Toolchain], list[str]]:
    """`find_toolchains`.

    Raises:
        NotRun: none; says why of each.
    """
    found, reasons = find_toolchains()
    if not found:
        raise NotRun(" ".join(reasons))
    return found, reasons


def cover(cases: Sequence[Case]) -> Profile:
    """Return the profile that takes exactly these calls and what lies between them."""
    shapes = {}
    for name, first in cases[0].inputs.items():
        sides = list(zip(*(case.inputs[name].shape for case in cases), strict=True))
        shapes[name] = ShapeRange(
            min=tuple(min(side) for side in sides),
            opt=first.shape,
            max=tuple(max(side) for side in sides),
        )
    return Profile(name="check", shapes=shapes)


def plan_path(job: Job, flavour: Flavour) -> Path:
    """Return where the plan of a job goes: in a folder of its own, away from other flavours."""
    folder = job.path.parent.parent
    return folder.with_name(f"{folder.name}-{flavour}") / "1" / "model.plan"


def worst_error(job: Job, cases: Sequence[Case], toolchain: Toolchain) -> float:
    """Build a job's plan, run its cases four times and compare them with ONNX Runtime on the CPU.

    In turn: buffers grow in the first round, the second runs at their last addresses, the third
    records CUDA graphs and launches them, the fourth launches them again.

    Returns:
        The largest relative error of an output.

    Raises:
        CloseupError: the plan cannot be built, opened or run, or TensorRT's runs of the last two
            rounds did not go through graphs (TensorRT-RTX keeps its own and does not say).
    """
    target = plan_path(job, toolchain.flavour)
    target.parent.mkdir(parents=True, exist_ok=True)
    built = BuildJob(
        model=job.title,
        graph=job.path,
        tensors=tensors_of(job.path),
        profiles=(cover(cases),),
        precision=job.precision.value,
    )
    obtain_plan(built, toolchain, None, target, command=COMMAND, build=build_plan)
    engine = open_engine(target, options=EngineOptions(cuda_graphs=len(cases)))
    try:
        worst = 0.0
        for case in (*cases,) * _ROUNDS:
            got = engine.run(case.inputs)
            worst = max(worst, *(compare(case.outputs[n], got[n])[1] for n in case.outputs))
        if toolchain.flavour is Flavour.TENSORRT:
            _check_graphs(job, engine, 2 * len(cases))
        return worst
    finally:
        engine.close()


def _check_graphs(job: Job, engine: Engine, expected: int) -> None:
    assert isinstance(engine, PlanEngine)  # what open_engine makes of a plan
    launches = engine.counters.graph_launches
    if launches < expected:
        raise ModelError(
            f"{job.title}: {launches} runs went through CUDA graphs, expected {expected}: the "
            "plan's answers were compared, the way it is served was not."
        )
