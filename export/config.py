"""``config.pbtxt``, written from the declarations that also name the graph's tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from closeup.tensors import TritonTensor

MODEL_FILE = "model.onnx"
# A delay is paid by every lone request. Without one, requests that arrive while a call runs still
# share the next.
QUEUE_DELAY_US = 0
# Pictures in one VAE call: their activations, not the weights, are what fills the memory.
VAE_PIXELS = 512 * 512
UPSCALER_BATCH = 4
DETECTOR_BATCH = 8
# The native backend's own options, as strings. 0 intra-op threads: as many as there are cores,
# or what the server's option says.
ONNXRUNTIME_PARAMETERS: Mapping[str, str] = {
    "intra_op_thread_count": "0",
    "inter_op_thread_count": "1",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class TritonConfig:
    """A model's configuration.

    Attributes:
        name: the model's folder.
        backend: ``onnxruntime``, ``tensorrt`` or ``python``.
        inputs: declarations without the batch dimension when ``max_batch_size`` is not 0.
        outputs: the same.
        max_batch_size: 0: the model sees tensors as they are.
        queue_delay_us: how long a request may wait for others to share its call; None: no
            dynamic batching.
        instances: processes or sessions per device.
        kind: where they run; KIND_CPU keeps a Python model from holding a CUDA context.
        gpus: which, by their number in the container; empty: one group of instances for each. For
            ``KIND_GPU`` alone: Triton refuses them where KIND_AUTO becomes KIND_CPU.
        parameters: the backend's options.
        decoupled: a request may have any number of responses.
        engine_file: the file in the version folder that is served; empty: the backend's default.
        profiles: optimization profiles of a plan that calls may run in.
    """

    name: str
    backend: str
    inputs: tuple[TritonTensor, ...]
    outputs: tuple[TritonTensor, ...]
    max_batch_size: int = 0
    queue_delay_us: int | None = None
    instances: int = 1
    kind: str = "KIND_AUTO"
    gpus: tuple[int, ...] = ()
    parameters: Mapping[str, str] = field(default_factory=dict)
    decoupled: bool = False
    engine_file: str = ""
    profiles: int = 0


def vae_batch(max_batch: int, native_px: int) -> int:
    """Return how many pictures of the native size a VAE call holds."""
    return max(1, min(max_batch, VAE_PIXELS // native_px**2))


def config_text(config: TritonConfig) -> str:
    """Return the content of ``config.pbtxt``."""
    lines = [
        f"name: {json.dumps(config.name)}",
        f"backend: {json.dumps(config.backend)}",
        f"max_batch_size: {config.max_batch_size}",
    ]
    if config.engine_file:
        lines.append(f"default_model_filename: {json.dumps(config.engine_file)}")
    lines += [_tensor("input", tensor) for tensor in config.inputs]
    lines += [_tensor("output", tensor) for tensor in config.outputs]
    # The native backend uses profile 0 alone unless it is told of the others.
    profiles = "".join(f' profile: "{number}"' for number in range(config.profiles))
    gpus = f" gpus: [ {', '.join(map(str, config.gpus))} ]" if config.gpus else ""
    group = f"count: {config.instances} kind: {config.kind}{gpus}{profiles}"
    lines.append(f"instance_group {{ {group} }}")
    if config.decoupled:
        lines.append("model_transaction_policy { decoupled: true }")
    if config.queue_delay_us is not None:
        lines.append(
            f"dynamic_batching {{ max_queue_delay_microseconds: {config.queue_delay_us} }}"
        )
    lines += [
        f"parameters {{ key: {json.dumps(key)} value {{ string_value: {json.dumps(value)} }} }}"
        for key, value in config.parameters.items()
    ]
    return "\n".join(lines) + "\n"


def _tensor(kind: str, tensor: TritonTensor) -> str:
    dims = ", ".join(str(size) for size in tensor.dims)
    optional = " optional: true" if tensor.optional else ""
    return (
        f"{kind} {{ name: {json.dumps(tensor.name)} data_type: {tensor.data_type} "
        f"dims: [ {dims} ]{optional} }}"
    )
