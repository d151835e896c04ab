"""Build one TensorRT plan from one ONNX graph, with either TensorRT.

Written for TensorRT 11, whose networks are strongly typed always; 10.x and TensorRT-RTX are told by
the attributes that they have.
"""

from __future__ import annotations

import contextlib
import logging
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from closeup.cache_files import merge_file, read_file
from closeup.devices import find_gpu
from closeup.errors import ExportError, ModelError
from closeup.plans import Flavour, PlanTensor, Profile
from closeup.tensorrt_package import Messages, explain, import_tensorrt, make_logger
from export.profiles import Tensors
from export.progress import Progress, make_monitor

logger = logging.getLogger(__name__)

# What TensorRT-RTX builds for unless told otherwise. Its own default has these too; Turing (7.5)
# must be named, and has no float32 matrix products.
RTX_SMS = ("8.0", "8.6", "8.9", "12.0", "12.1")
_WRITE_BYTES = 1 << 26


@dataclass(frozen=True, kw_only=True, slots=True)
class Toolchain:
    """An installed TensorRT and what it builds for.

    Attributes:
        flavour: which.
        module: the Python module.
        version: its version.
        sms: compute capabilities of the plans.
        gpu: name of the GPU in this machine; empty for plans that depend on none.
        timing_cache: what the builder measured, kept between builds; None: not kept.
    """

    flavour: Flavour
    module: Any
    version: str
    sms: tuple[str, ...]
    gpu: str
    timing_cache: Path | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildJob:
    """A plan to build.

    Attributes:
        model: its name, for messages.
        graph: the ONNX file, its external data beside it.
        tensors: what the network must have.
        profiles: at least one.
        precision: of the network; TF32 is left out of float32 ones.
    """

    model: str
    graph: Path
    tensors: Tensors
    profiles: tuple[Profile, ...]
    precision: str


@dataclass(kw_only=True)
class _Parts:
    """What a build holds; the order of death does not matter to TensorRT, the logger's does."""

    trt: Any
    messages: Messages = field(default_factory=Messages)
    logger: Any = None
    builder: Any = None
    network: Any = None
    parser: Any = None
    config: Any = None


def open_toolchain(
    flavour: Flavour, *, sms: tuple[str, ...] = (), cache_dir: Path | None = None
) -> Toolchain:
    """Find the TensorRT to build with.

    Args:
        flavour: which.
        sms: compute capabilities that TensorRT-RTX builds for; empty: `RTX_SMS`.
        cache_dir: where the timing cache is kept; None: nowhere.

    Raises:
        ExportError: the package is missing, TensorRT finds no GPU, or a compute capability is not
            one that can be built for.
    """
    try:
        module = import_tensorrt(flavour)
    except ModelError as error:
        raise ExportError(f"--target {flavour}: {error}") from error
    version = str(module.__version__)
    if flavour is Flavour.RTX:
        wanted = sms or RTX_SMS
        known = _rtx_sms(module)
        for sm in wanted:
            if sm not in known:
                raise ExportError(
                    f"--sms {','.join(wanted)}: TensorRT-RTX {version} builds for "
                    f"{', '.join(known)}, not for {sm}; take --target tensorrt for other GPUs."
                )
        return Toolchain(flavour=flavour, module=module, version=version, sms=wanted, gpu="")
    if sms:
        raise ExportError(
            "--sms goes with --target tensorrt-rtx: TensorRT builds for the GPU it runs on."
        )
    gpu = find_gpu()
    if gpu is None:
        raise ExportError(
            "--target tensorrt builds on the GPU that the plans are for, and there is none here "
            "(no driver, or no device in this container): run it there, or build for RTX GPUs "
            "with --target tensorrt-rtx, which needs none."
        )
    # By name: GPUs of one compute capability, e.g. L4 and L40S, have timings of their own.
    name = "-".join(re.findall(r"\w+", gpu.name))
    cache = None if cache_dir is None else cache_dir / f"timing-{version}-sm{gpu.sm}-{name}.cache"
    return Toolchain(
        flavour=flavour,
        module=module,
        version=version,
        sms=(gpu.sm,),
        gpu=gpu.name,
        timing_cache=cache,
    )


def builder_flags(toolchain: Toolchain, precision: str) -> dict[str, str]:
    """Return the options of the builder that are not TensorRT's defaults."""
    flags = {"strongly_typed": "on"}
    if precision == "fp32":
        flags["tf32"] = "off"
    if toolchain.flavour is Flavour.RTX:
        flags["compute_capabilities"] = ",".join(toolchain.sms)
        flags["require_user_allocation"] = "on"
    return flags


def build_plan(
    job: BuildJob, toolchain: Toolchain, target: Path, progress: Progress | None = None
) -> float:
    """Build a plan and write it to ``target``; nothing is left there when it fails.

    Args:
        job: what to build.
        toolchain: with what.
        target: a new file.
        progress: told how far it is.

    Returns:
        Seconds it took.

    Raises:
        ExportError: the graph is not what the job says, TensorRT cannot read or build it, or the
            disk is full.
        KeyboardInterrupt: from ``progress`` or the keyboard.
    """
    started_s = time.monotonic()
    parts = _Parts(trt=toolchain.module)
    parts.logger = make_logger(parts.trt, parts.messages)
    parts.builder = parts.trt.Builder(parts.logger)
    if parts.builder is None:
        raise _failure(job, parts, "TensorRT cannot start")
    _parse(job, parts)
    _check_network(job, parts)
    _configure(job, toolchain, parts)
    monitor = None if progress is None else make_monitor(parts.trt, progress)
    if monitor is not None:
        parts.config.progress_monitor = monitor
    try:
        _write_plan(job, parts, target, monitor)
        _check_header(job, parts, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            target.unlink()
        raise
    _keep_timings(toolchain, parts)
    return time.monotonic() - started_s


def _rtx_sms(module: Any) -> tuple[str, ...]:
    """Compute capabilities that an installed TensorRT-RTX builds for."""
    names = [name for name in dir(module.ComputeCapability) if name.startswith("SM")]
    numbers = sorted(int(name[2:]) for name in names)
    return tuple(f"{number // 10}.{number % 10}" for number in numbers)


def _parse(job: BuildJob, parts: _Parts) -> None:
    trt = parts.trt
    creation = trt.NetworkDefinitionCreationFlag
    flags = 0
    if hasattr(creation, "STRONGLY_TYPED"):  # TensorRT 11 has no other networks
        flags = 1 << int(creation.STRONGLY_TYPED)
    parts.network = parts.builder.create_network(flags)
    parts.parser = trt.OnnxParser(parts.network, parts.logger)
    if not parts.parser.parse_from_file(str(job.graph)):
        errors = [parts.parser.get_error(i) for i in range(parts.parser.num_errors)]
        first = errors[0].desc() if errors else explain(parts.messages.errors)
        node = f" at {errors[0].node_name()}" if errors and errors[0].node_name() else ""
        raise ExportError(
            f"{job.model}: TensorRT cannot read {job.graph.name}{node}: {' '.join(first.split())}"
        )


def _check_network(job: BuildJob, parts: _Parts) -> None:
    """Compare what TensorRT read with what it is to build."""
    network = parts.network
    given = [network.get_input(i) for i in range(network.num_inputs)]
    made = [network.get_output(i) for i in range(network.num_outputs)]
    for kind, tensors, expected in (
        ("input", given, job.tensors.inputs),
        ("output", made, job.tensors.outputs),
    ):
        found = {tensor.name: tensor for tensor in tensors}
        if set(found) != {tensor.name for tensor in expected}:
            raise ExportError(
                f"{job.model}: TensorRT reads the {kind}s {sorted(found)}, expected "
                f"{sorted(tensor.name for tensor in expected)}."
            )
        for tensor in expected:
            _check_tensor(job.model, parts.trt, found[tensor.name], tensor)


def _check_tensor(model: str, trt: Any, found: Any, expected: PlanTensor) -> None:
    dtype = _dtype_name(trt, found.dtype)
    axes = tuple(-1 if isinstance(axis, str) else axis for axis in expected.axes)
    got = tuple(found.shape)
    fits = len(got) == len(axes) and all(
        have in (want, -1) for have, want in zip(got, axes, strict=True)
    )
    if dtype != expected.dtype or not fits:
        raise ExportError(
            f"{model}: TensorRT reads {expected.name} as {dtype} {got}, expected "
            f"{expected.dtype} {axes}."
        )


def _dtype_name(trt: Any, dtype: Any) -> str:
    names = {
        trt.DataType.FLOAT: "float32",
        trt.DataType.HALF: "float16",
        trt.DataType.BF16: "bfloat16",
        trt.DataType.INT64: "int64",
    }
    return names.get(dtype, str(dtype))


def _configure(job: BuildJob, toolchain: Toolchain, parts: _Parts) -> None:
    trt = parts.trt
    config = parts.config = parts.builder.create_builder_config()
    if job.precision == "fp32":
        config.clear_flag(trt.BuilderFlag.TF32)
    if toolchain.flavour is Flavour.RTX:
        # Else it may allocate memory while it runs, which no CUDA graph can hold.
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
        config.num_compute_capabilities = len(toolchain.sms)
        for place, sm in enumerate(toolchain.sms):
            kind = getattr(trt.ComputeCapability, f"SM{sm.replace('.', '')}")
            config.set_compute_capability(kind, place)
    for profile in job.profiles:
        if config.add_optimization_profile(make_profile(parts.builder, profile)) < 0:
            raise _failure(job, parts, f"TensorRT refuses the profile {profile.name}")
    if toolchain.timing_cache is not None:
        cache = config.create_timing_cache(read_file(toolchain.timing_cache))
        if cache is None or not config.set_timing_cache(cache, False):
            config.set_timing_cache(config.create_timing_cache(b""), False)


def make_profile(builder: Any, profile: Profile) -> Any:
    """Return a profile as the builder has them."""
    made = builder.create_optimization_profile()
    for name, limits in profile.shapes.items():
        made.set_shape(name, limits.min, limits.opt, limits.max)
    return made


def _write_plan(job: BuildJob, parts: _Parts, target: Path, monitor: Any) -> None:
    built = parts.builder.build_serialized_network(parts.network, parts.config)
    if monitor is not None and monitor.stopped is not None:
        raise monitor.stopped
    if built is None:
        raise _failure(job, parts, "TensorRT cannot build it")
    view = memoryview(built)
    try:
        with target.open("wb") as file:
            for first in range(0, len(view), _WRITE_BYTES):
                file.write(view[first : first + _WRITE_BYTES])
    except OSError as error:
        raise ExportError(
            f"{job.model}: the plan of {len(view) / 1e6:.0f} MB cannot be written to "
            f"{target.parent}: {(error.strerror or str(error)).lower()}; what was there before "
            "stays."
        ) from error


def _check_header(job: BuildJob, parts: _Parts, target: Path) -> None:
    """Have TensorRT-RTX look at the head of the file, which it does without a GPU too."""
    runtime = parts.trt.Runtime(parts.logger)
    if not hasattr(runtime, "get_engine_validity"):
        return
    with target.open("rb") as file:
        head = file.read(int(runtime.engine_header_size))
    _, diagnostics = runtime.get_engine_validity(head)
    problems = header_problems(parts.trt, int(diagnostics))
    if problems:
        raise ExportError(f"{job.model}: the plan's header is not valid: {', '.join(problems)}.")


def header_problems(trt: Any, diagnostics: int) -> list[str]:
    """Return what is wrong with a plan's header whatever GPU it is for.

    Args:
        trt: the module of TensorRT-RTX.
        diagnostics: of its ``get_engine_validity``; 0 too where there is no GPU to compare with.
    """
    kinds = trt.EngineInvalidityDiagnostics
    names = ("MALFORMED_ENGINE", "VERSION_MISMATCH")
    return [
        name.lower().replace("_", " ") for name in names if diagnostics & int(getattr(kinds, name))
    ]


def _keep_timings(toolchain: Toolchain, parts: _Parts) -> None:
    """Add what this build measured to the timing cache; a cache that cannot be kept is no fault."""
    path = toolchain.timing_cache
    if path is None:
        return
    mine = parts.config.get_timing_cache()

    def merge(present: bytes) -> bytes:
        if present:
            other = parts.config.create_timing_cache(present)
            if other is not None:
                mine.combine(other, False)
        return bytes(memoryview(mine.serialize()))

    try:
        merge_file(path, merge)
    except OSError as error:
        logger.warning("the timing cache %s cannot be kept: %s", path, error.strerror or error)


def _failure(job: BuildJob, parts: _Parts, what: str) -> ExportError:
    return ExportError(f"{job.model}: {what}: {explain(parts.messages.errors)}.")
