"""What lies beside a TensorRT plan, ``<name>.plan.json``, and the refusal of a plan that is not it.

A plan runs only on the TensorRT version and the kind of GPU that it was built for, and TensorRT's
own answer to anything else is a null pointer and a line in a log. So the export writes a
`PlanRecord` beside every plan, and whoever opens a plan calls `verify_plan` first, which refuses
with one sentence: what was found, what was expected, and the command that builds it again.

Names: the plan of ``<stem>.onnx`` is ``<stem>.plan`` in the same version folder: ``model.plan``
for every model, and for a denoiser also ``plain.plan`` and ``<text encoder>.plan``. The graph stays
beside its plan. `engine_path` picks the one that a folder is served from.

Imports neither tensorrt nor torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from closeup.errors import ModelError
from closeup.nvinfer import release_of

PLAN_SUFFIX = ".plan"
GRAPH_SUFFIX = ".onnx"
RECORD_FORMAT = 1
_BLOCK_BYTES = 1 << 22


class Flavour(str, Enum):
    """A TensorRT: which package builds and opens a plan. The value is the export's ``--target``."""

    TENSORRT = "tensorrt"
    RTX = "tensorrt-rtx"

    def __str__(self) -> str:
        return self.value

    @property
    def module(self) -> str:
        """The Python module."""
        return {Flavour.TENSORRT: "tensorrt", Flavour.RTX: "tensorrt_rtx"}[self]

    @property
    def label(self) -> str:
        """Its name in messages."""
        return {Flavour.TENSORRT: "TensorRT", Flavour.RTX: "TensorRT-RTX"}[self]


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanTensor:
    """An input or output of a plan.

    Attributes:
        name: of the tensor.
        dtype: ``float32``, ``float16``, ``bfloat16`` or ``int64``; numpy's names, bfloat16 is
            ml_dtypes'.
        axes: an entry an axis: its size, or the name of a size that varies, as in the graph;
            axes of one name have one size in a call.
    """

    name: str
    dtype: str
    axes: tuple[int | str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ShapeRange:
    """The shapes of an input that an optimization profile takes.

    Attributes:
        min: the smallest side of each axis.
        opt: the shape that the kernels were chosen for.
        max: the largest side of each axis.
    """

    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]

    def takes(self, shape: tuple[int, ...]) -> bool:
        """Whether a tensor of this shape is within the range."""
        return len(shape) == len(self.min) and all(
            low <= side <= high for low, side, high in zip(self.min, shape, self.max, strict=True)
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """One optimization profile; its index in the plan is its place in `PlanRecord.profiles`.

    Attributes:
        name: what it is for, e.g. ``512x512``.
        shapes: the range of every input, by name, those of fixed shape included.
    """

    name: str
    shapes: Mapping[str, ShapeRange]

    def takes(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Whether a call whose inputs have these shapes may run in this profile."""
        return all(
            name in shapes and limits.takes(shapes[name]) for name, limits in self.shapes.items()
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanRecord:
    """What a plan was built from and for.

    Attributes:
        model: its name in the manifest: ``portrait_vae_decoder``, ``portrait_denoiser``,
            ``portrait_denoiser/plain``, ``portrait_denoiser/text_encoder``, ``upscaler``.
        onnx_sha256: `hash_graph` of the graph.
        onnx_bytes: of the graph, its external data included.
        onnx_mtime_ns: `graph_mtime_ns` of it, as it lies beside the plan.
        flavour: which TensorRT.
        version: its whole version, e.g. ``11.1.0.106``.
        sms: compute capabilities it runs on, e.g. ``("9.0",)``; TensorRT's own plans have one.
        gpu: name of the GPU it was built on; empty when there was none.
        precision: of the network: ``fp32``, ``fp16`` or ``bf16``. All types are in the graph.
        inputs: in the graph's order.
        outputs: in the graph's order.
        profiles: at least one, the largest size first.
        flags: options of the builder, by name.
        plan_sha256: of the plan.
        plan_bytes: of the plan.
        build_s: seconds the builder took.
        command: builds it again.
        format: of this record.
    """

    model: str
    onnx_sha256: str
    onnx_bytes: int
    flavour: Flavour
    version: str
    sms: tuple[str, ...]
    gpu: str
    precision: str
    inputs: tuple[PlanTensor, ...]
    outputs: tuple[PlanTensor, ...]
    profiles: tuple[Profile, ...]
    plan_sha256: str
    plan_bytes: int
    build_s: float
    command: str
    onnx_mtime_ns: int = 0
    flags: Mapping[str, str] = field(default_factory=dict)
    format: int = RECORD_FORMAT

    def profile_for(self, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
        """Return the index of the narrowest profile that takes these input shapes, if any does."""
        fitting = [i for i, profile in enumerate(self.profiles) if profile.takes(shapes)]
        return min(fitting, key=lambda i: _spread(self.profiles[i]), default=None)


@dataclass(frozen=True, kw_only=True, slots=True)
class RuntimeFacts:
    """What is about to open a plan.

    Attributes:
        flavour: of the installed package.
        version: ``tensorrt.__version__`` (or ``tensorrt_rtx.__version__``).
        sm: compute capability of the GPU, e.g. ``9.0``.
    """

    flavour: Flavour
    version: str
    sm: str


def record_path(plan: Path) -> Path:
    """Return where the record of a plan lies."""
    return plan.with_name(plan.name + ".json")


def engine_path(folder: Path, stem: str = "model") -> Path:
    """Return the engine that a version folder is served from.

    Args:
        folder: ``<repository>/<model>/<version>``.
        stem: ``model``; of a denoiser also ``plain`` or a text encoder's name.

    Returns:
        ``<stem>.plan`` where the export built one, else ``<stem>.onnx`` (which may not exist).
    """
    plan = folder / f"{stem}{PLAN_SUFFIX}"
    return plan if plan.exists() else folder / f"{stem}{GRAPH_SUFFIX}"


def find_plans(repository: Path) -> list[Path]:
    """Return every plan of a model repository, in order."""
    return sorted(repository.glob(f"*/*/*{PLAN_SUFFIX}"))


def hash_graph(path: Path) -> str:
    """SHA-256 of an ONNX file and, after it, of the external data beside it; in hex."""
    digest = hashlib.sha256()
    for file in _graph_files(path):
        _digest_file(digest, file)
    return digest.hexdigest()


def graph_bytes(path: Path) -> int:
    """Bytes of an ONNX file and of the external data beside it."""
    return sum(file.stat().st_size for file in _graph_files(path))


def graph_mtime_ns(path: Path) -> int:
    """When an ONNX file or the external data beside it was last written."""
    return max(file.stat().st_mtime_ns for file in _graph_files(path))


def hash_plan(path: Path) -> str:
    """SHA-256 of a plan, in hex."""
    digest = hashlib.sha256()
    _digest_file(digest, path)
    return digest.hexdigest()


def record_json(record: PlanRecord) -> str:
    """Return the text of ``<name>.plan.json``."""
    return json.dumps(dataclasses.asdict(record), indent=1) + "\n"


def read_record(plan: Path) -> PlanRecord:
    """Read the record of a plan.

    Args:
        plan: ``.../<stem>.plan``; it need not exist.

    Raises:
        ModelError: there is no record, or it is damaged or of another format.
    """
    path = record_path(plan)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(
            f"{plan} has no record {path.name} beside it, so nothing says which TensorRT and GPU "
            "it was built for: write both with `python -m export --target tensorrt`."
        ) from error
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from error
    if not isinstance(data, dict):
        raise _damaged(path, TypeError("not a JSON object"))
    if data.get("format") != RECORD_FORMAT:
        raise ModelError(
            f"{path} has format {data.get('format')!r}, this version reads {RECORD_FORMAT}: build "
            "the plan again with `python -m export --target tensorrt`."
        )
    try:
        return _record(data)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(path, error) from error


def verify_plan(plan: Path, runtime: RuntimeFacts, *, onnx_sha256: str | None = None) -> PlanRecord:
    """Refuse a plan that cannot run here or is not the one its record describes.

    The whole plan is read once. The graph beside it is compared too, where there is one: by its
    size and time, and by its content when the time is another.

    Args:
        plan: ``.../<stem>.plan``.
        runtime: what is about to open it.
        onnx_sha256: hash of the graph as the model's manifest has it; None: not compared.

    Returns:
        Its record.

    Raises:
        ModelError: no plan or no record, a damaged record, another flavour, version or GPU, a
            graph that has changed, or a truncated or swapped file; the message ends with the
            command that builds the plan again.
    """
    if not plan.is_file():
        raise ModelError(f"There is no plan at {plan}; write it with `python -m export`.")
    record = read_record(plan)
    problem = (
        _runtime_problem(record, runtime)
        or _graph_problem(record, plan, onnx_sha256)
        or _file_problem(record, plan)
    )
    if problem:
        raise ModelError(f"{plan}: {problem}; build it again with: {record.command}")
    return record


def _runtime_problem(record: PlanRecord, runtime: RuntimeFacts) -> str:
    if record.flavour is not runtime.flavour:
        return (
            f"it was built by {record.flavour.label} and cannot be opened by "
            f"{runtime.flavour.label}, which is what runs here"
        )
    if release_of(record.version) != release_of(runtime.version):
        return (
            f"it was built by {record.flavour.label} {record.version} and runs only there, this "
            f"is {runtime.version}"
        )
    if runtime.sm not in record.sms:
        built_on = f" ({record.gpu})" if record.gpu else ""
        return (
            f"it was built for GPUs of compute capability {', '.join(record.sms)}{built_on}, this "
            f"one has {runtime.sm}"
        )
    return ""


def _graph_problem(record: PlanRecord, plan: Path, onnx_sha256: str | None) -> str:
    if onnx_sha256 is not None and onnx_sha256 != record.onnx_sha256:
        return "it was built from another graph than the model's manifest names"
    graph = plan.with_suffix(GRAPH_SUFFIX)
    if not graph.is_file():
        return ""
    if graph_bytes(graph) == record.onnx_bytes:
        if graph_mtime_ns(graph) == record.onnx_mtime_ns:
            return ""
        if hash_graph(graph) == record.onnx_sha256:
            return ""
    return f"{graph.name} beside it is not the graph it was built from"


def _file_problem(record: PlanRecord, plan: Path) -> str:
    size = plan.stat().st_size
    if size < record.plan_bytes:
        return f"it is truncated, {size} of {record.plan_bytes} bytes"
    if size != record.plan_bytes or hash_plan(plan) != record.plan_sha256:
        return "it is not the file that its record describes"
    return ""


def _graph_files(path: Path) -> Iterator[Path]:
    """The ONNX file, then its external data; other files beside it are not the graph's."""
    yield path
    data = path.with_name(path.name + "_data")
    if data.exists():
        yield data


def _digest_file(digest: Any, path: Path) -> None:
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)


def _spread(profile: Profile) -> float:
    """How wide a profile is: the product over all sides of max / min."""
    spread = 1.0
    for limits in profile.shapes.values():
        for low, high in zip(limits.min, limits.max, strict=True):
            spread *= high / max(low, 1)
    return spread


def _record(data: dict[str, Any]) -> PlanRecord:
    return PlanRecord(
        flavour=Flavour(data.pop("flavour")),
        sms=tuple(str(sm) for sm in data.pop("sms")),
        inputs=tuple(_tensor(entry) for entry in data.pop("inputs")),
        outputs=tuple(_tensor(entry) for entry in data.pop("outputs")),
        profiles=tuple(_profile(entry) for entry in data.pop("profiles")),
        **data,
    )


def _tensor(data: Mapping[str, Any]) -> PlanTensor:
    return PlanTensor(name=data["name"], dtype=data["dtype"], axes=tuple(data["axes"]))


def _profile(data: Mapping[str, Any]) -> Profile:
    return Profile(
        name=data["name"],
        shapes={
            name: ShapeRange(**{key: tuple(sides) for key, sides in limits.items()})
            for name, limits in data["shapes"].items()
        },
    )


def _damaged(path: Path, error: Exception) -> ModelError:
    return ModelError(
        f"{path} is damaged ({error}): build the plan again with `python -m export --target "
        "tensorrt`."
    )
