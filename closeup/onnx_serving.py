"""The Python-based backends without Triton: complete a config, run a batch.

NVIDIA's container serves the same repository with its native backends `onnxruntime` and
`tensorrt`; what is completed here follows the rules of the first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from closeup.engines import (
    Array,
    Described,
    Engine,
    EngineOptions,
    TensorSpec,
    count_threads,
    wanted_device,
)
from closeup.errors import ModelError

MODEL_FILE = "model.onnx"
DEFAULT_MAX_BATCH_SIZE = 4  # the native backend's default too
# The native backend's numbers in optimization { graph { level } }.
_GRAPH_LEVELS = {-1: "basic", 1: "extended", 2: "disabled"}
_TRITON_TYPES = {
    "float16": "TYPE_FP16",
    "float32": "TYPE_FP32",
    "float64": "TYPE_FP64",
    "bool": "TYPE_BOOL",
    "bfloat16": "TYPE_BF16",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """What a short ``config.pbtxt`` leaves out.

    Attributes:
        max_batch_size: 0 when the first axis is no batch axis.
        dynamic_batching: turn it on; False when the config chooses a scheduler itself.
        inputs: tensors to add, each ``{"name", "data_type", "dims"}``, dims without the batch.
        outputs: the same of outputs.
    """

    max_batch_size: int
    dynamic_batching: bool
    inputs: tuple[dict[str, Any], ...]
    outputs: tuple[dict[str, Any], ...]


def triton_type(dtype: np.dtype[Any]) -> str:
    """Triton's config name of an element type, e.g. ``TYPE_FP32``."""
    return _TRITON_TYPES.get(dtype.name, f"TYPE_{dtype.name.upper()}")


def find_engine(model_dir: Path, file_name: str = "") -> Path:
    """The engine file in a model's version folder.

    Args:
        model_dir: ``<repository>/<model>/<version>``.
        file_name: the config's ``default_model_filename``, empty when it has none.

    Raises:
        ModelError: there is none.
    """
    path = model_dir / (file_name or MODEL_FILE)
    if not path.is_file():
        raise ModelError(f"There is no {path.name} in {model_dir}; run `python -m export`.")
    return path


def options_from_config(
    config: Mapping[str, Any], *, use_cuda: bool = False, device_id: int = 0
) -> EngineOptions:
    """Engine options from a model's config, in the native backend's own words.

    Read are the parameters ``intra_op_thread_count`` (0 or absent: ``CLOSEUP_THREADS``) and
    ``memory.enable_memory_arena_shrinkage`` (any value: hand memory back after every run), and
    ``optimization { graph { level } }``.

    Args:
        config: the model's config as a dict.
        use_cuda: run on a GPU.
        device_id: on which.

    Raises:
        ModelError: the thread count is no number of 0 or more.
    """
    parameters = {
        key: value.get("string_value", "") for key, value in config.get("parameters", {}).items()
    }
    threads = parameters.get("intra_op_thread_count", "0")
    if not threads.isdecimal():
        raise ModelError(
            f"The parameter intra_op_thread_count is {threads!r}; expected an integer from 0 on."
        )
    level = int(config.get("optimization", {}).get("graph", {}).get("level", 0))
    return EngineOptions(
        threads=int(threads) or count_threads(),
        graph_optimization=_GRAPH_LEVELS.get(level, "all"),
        keep_memory=not parameters.get("memory.enable_memory_arena_shrinkage"),
        use_cuda=use_cuda,
        device_id=device_id,
    )


def runs_on_cuda(on_gpu: bool) -> bool:
    """Say whether a served model's engine takes a GPU.

    Args:
        on_gpu: whether Triton placed the instance on a GPU, as ``kind: KIND_GPU`` asks it to.

    Returns:
        What ``CLOSEUP_DEVICE`` says, and under ``auto`` what Triton decided.

    Raises:
        ModelError: ``CLOSEUP_DEVICE`` is no device.
    """
    device = wanted_device()
    return on_gpu if device == "auto" else device == "cuda"


def is_complete(config: Mapping[str, Any]) -> bool:
    """Whether a config says enough that the graph need not be opened to complete it."""
    return bool(
        int(config.get("max_batch_size", 0)) > 0 and config.get("input") and config.get("output")
    )


def complete_config(config: Mapping[str, Any], engine: Described) -> Completion:
    """Work out what the config leaves out.

    A batch axis is taken when every tensor's first axis is dynamic and the tensors that the
    config lists leave that axis out.

    Args:
        config: the model's config as a dict.
        engine: its engine.

    Raises:
        ModelError: the config batches, and the graph has a tensor with a fixed first axis.
    """
    size = int(config.get("max_batch_size", 0))
    tensors = (*engine.inputs, *engine.outputs)
    fixed = [spec for spec in tensors if not spec.shape or isinstance(spec.shape[0], int)]
    if size > 0 and fixed:
        raise ModelError(
            f"max_batch_size is {size}, but tensor {fixed[0].name} is {fixed[0].describe()}: its "
            "first axis is fixed; set max_batch_size to 0 or export with a dynamic batch."
        )
    listed = _listed_tensors(config)
    unknown = sorted(set(listed) - {spec.name for spec in tensors})
    if unknown:
        raise ModelError(
            f"config.pbtxt lists a tensor {unknown[0]} that the graph does not have; it has "
            f"{[spec.name for spec in tensors]}."
        )
    full = any(
        spec.name in listed and len(listed[spec.name].get("dims", ())) == len(spec.shape)
        for spec in tensors
    )
    if size == 0 and not fixed and not full:
        size = DEFAULT_MAX_BATCH_SIZE
    return Completion(
        max_batch_size=size,
        dynamic_batching=needs_dynamic_batching(config, size),
        inputs=tuple(_tensor(spec, size) for spec in engine.inputs if spec.name not in listed),
        outputs=tuple(_tensor(spec, size) for spec in engine.outputs if spec.name not in listed),
    )


_SCHEDULERS = ("dynamic_batching", "sequence_batching", "ensemble_scheduling")


def needs_dynamic_batching(config: Mapping[str, Any], max_batch_size: int) -> bool:
    """Whether a model that batches leaves the choice of its scheduler open."""
    chosen = any(config.get(key) is not None for key in _SCHEDULERS)
    return max_batch_size > 1 and not chosen


def check_config(config: Mapping[str, Any], engine: Described) -> None:
    """Compare a completed config with the graph.

    Raises:
        ModelError: a tensor is in one of them only, has other dims in the other, or the config
            batches what the graph does not.
    """
    completion = complete_config(config, engine)
    for tensor in (*completion.inputs, *completion.outputs):
        raise ModelError(
            f"config.pbtxt lists tensors but not {tensor['name']}, which the graph has; list all "
            "or none."
        )
    listed = _listed_tensors(config)
    for spec in (*engine.inputs, *engine.outputs):
        _check_dims(spec, listed[spec.name], completion.max_batch_size)


def _check_dims(spec: TensorSpec, listed: Mapping[str, Any], max_batch_size: int) -> None:
    """Compare a tensor's dims, as the native backend does; the config may allow fewer sizes."""
    if listed.get("reshape"):
        return
    got = [int(side) for side in listed.get("dims", ())]
    expected = _tensor(spec, max_batch_size)["dims"]
    is_scalar = len(spec.shape) == (1 if max_batch_size > 0 else 0)
    sides = [-1] if is_scalar else expected
    if len(got) != len(sides) or any(
        side not in (-1, told) for told, side in zip(got, sides, strict=True)
    ):
        batch = ", without its first axis, the batch" if max_batch_size > 0 else ""
        raise ModelError(
            f"config.pbtxt gives tensor {spec.name} the dims {got}; the graph's is "
            f"{spec.describe()}, so expected {expected}{batch}: export the model again, or mend "
            "config.pbtxt."
        )


def _listed_tensors(config: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return {item["name"]: item for key in ("input", "output") for item in config.get(key, ())}


def _tensor(spec: TensorSpec, max_batch_size: int) -> dict[str, Any]:
    shape = spec.shape[1:] if max_batch_size > 0 else spec.shape
    dims = [axis if isinstance(axis, int) else -1 for axis in shape]
    return {"name": spec.name, "data_type": triton_type(spec.dtype), "dims": dims or [1]}


def run_requests(
    engine: Engine, requests: Sequence[Mapping[str, Array]], *, batched: bool
) -> list[dict[str, Array] | ModelError]:
    """Answer several requests with as few engine runs as their shapes allow.

    Requests whose inputs agree in dtype and in every axis but the first are joined along it.
    When a joined run fails, each of its requests runs alone, so that one of them harms no other.

    Args:
        engine: the engine.
        requests: inputs by name, one mapping a request.
        batched: whether the first axis is a batch; else every request runs alone.

    Returns:
        For each request, in order, its outputs or its own error.
    """
    groups: dict[Any, list[int]] = {}
    for index, feeds in enumerate(requests):
        key = _batch_key(feeds) if batched else index
        groups.setdefault(index if key is None else key, []).append(index)
    answers: dict[int, dict[str, Array] | ModelError] = {}
    for members in groups.values():
        answers.update(
            zip(members, _run_group(engine, [requests[i] for i in members]), strict=True)
        )
    return [answers[index] for index in range(len(requests))]


def _batch_key(feeds: Mapping[str, Array]) -> tuple[Any, ...] | None:
    """What must agree for requests to run together; None for one that can only run alone."""
    if any(not array.ndim for array in feeds.values()):
        return None
    if len({array.shape[0] for array in feeds.values()}) != 1:
        return None
    return tuple((name, feeds[name].dtype.str, feeds[name].shape[1:]) for name in sorted(feeds))


def _run_group(
    engine: Engine, members: Sequence[Mapping[str, Array]]
) -> list[dict[str, Array] | ModelError]:
    if len(members) == 1:
        try:
            return [engine.run(members[0])]
        except ModelError as error:
            return [error]
    sizes = [next(iter(feeds.values())).shape[0] for feeds in members]
    try:
        joined = {name: np.concatenate([feeds[name] for feeds in members]) for name in members[0]}
        outputs = engine.run(joined)
        _check_split(outputs, sum(sizes))
    except ModelError:
        return [_run_group(engine, [feeds])[0] for feeds in members]
    stops = np.cumsum(sizes)
    return [
        {name: array[stop - size : stop] for name, array in outputs.items()}
        for size, stop in zip(sizes, stops, strict=True)
    ]


def _check_split(outputs: Mapping[str, Array], rows: int) -> None:
    for name, array in outputs.items():
        if not array.ndim or array.shape[0] != rows:
            raise ModelError(f"output {name} is {array.shape}; expected {rows} rows.")
