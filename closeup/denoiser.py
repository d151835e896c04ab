"""The denoiser as a service: tickets, LoRAs, segments; no Triton in here.

`closeup.denoiser_model` puts it behind Triton, the tests and benchmarks call it directly.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from closeup.batching import BatchCounters, Segment, SegmentResult, StepBatcher
from closeup.engines import EngineOptions, open_engine
from closeup.errors import ModelError
from closeup.lora_bank import LoraBank
from closeup.lora_store import LoraStore
from closeup.manifest import MANIFEST_NAME, ModelManifest, read_manifest
from closeup.run import Array
from closeup.segments import ACQUIRE, RELEASE, SEGMENT
from closeup.settings import Settings
from closeup.tickets import TicketDesk

log = logging.getLogger(__name__)

LEASE_MARGIN_S = 60.0
LORA_LOADERS = 4

Answer = dict[str, Array]


class Denoiser:
    """Holds the denoiser engine of one pipeline, its batches, its LoRA bank and the slots.

    Args:
        folder: the model's folder in the repository (manifest.json, <version>/model.onnx).
        version: name of the version folder.
        settings: server options.
        on_tick: called after each engine call with (sequences, seconds).
    """

    def __init__(
        self,
        folder: Path,
        *,
        version: str = "1",
        settings: Settings,
        on_tick: Callable[[int, float], None] | None = None,
    ) -> None:
        self.manifest = read_manifest(folder / MANIFEST_NAME)
        self._engine = open_engine(folder / version / "model.onnx", options=EngineOptions())
        self._limit_s = settings.request_timeout_s + LEASE_MARGIN_S
        self._loader = ThreadPoolExecutor(LORA_LOADERS, thread_name_prefix="lora")
        bank = _open_bank(self.manifest, settings)
        self._desk = _open_desk(self.manifest, settings, bank, self._limit_s)
        limit = self.manifest.max_batch
        self._batcher = StepBatcher(
            self._engine.run,
            max_batch=min(limit, settings.max_batch or limit),
            loras=bank,
            on_tick=on_tick,
        )
        self._warm_up()

    @property
    def counters(self) -> BatchCounters:
        """Totals of the engine calls, the warm-up's included."""
        return self._batcher.counters

    @property
    def slots_in_use(self) -> int:
        """Pictures in flight."""
        return self._desk.slots_in_use

    def start(self, inputs: Mapping[str, Array]) -> Future[Answer]:
        """Start one operation (see `closeup.segments`) and return its future answer.

        Raises:
            ModelError: an unknown operation, ticket or a malformed segment.
            UnavailableError: shutting down.
        """
        operation = _text(inputs, "operation")
        if operation == SEGMENT:
            return _mapped(self._batcher.submit(self._segment(inputs)))
        if operation == ACQUIRE:
            return self._loader.submit(self._acquire, inputs)
        if operation == RELEASE:
            number = int(inputs["ticket"][0])
            self._desk.release(number)
            answer: Future[Answer] = Future()
            answer.set_result({"ticket": np.array([number], np.int64)})
            return answer
        raise ModelError(f"the denoiser knows no operation {operation!r}.")

    def close(self) -> None:
        """Fail what still runs with UnavailableError and release the engine."""
        self._batcher.close()
        self._loader.shutdown(wait=False, cancel_futures=True)
        self._engine.close()

    def _acquire(self, inputs: Mapping[str, Array]) -> Answer:
        loras = [(str(name), float(weight)) for name, weight in json.loads(_text(inputs, "loras"))]
        number, warnings = self._desk.acquire(int(inputs["slots"][0]), loras)
        return {
            "ticket": np.array([number], np.int64),
            "warnings": np.array([json.dumps(warnings).encode()], np.object_),
        }

    def _segment(self, inputs: Mapping[str, Array]) -> Segment:
        sample = inputs["sample"]
        memory = inputs.get("memory")
        return Segment(
            sample=sample,
            memory=np.zeros((2, *sample.shape), np.float32) if memory is None else memory,
            context=inputs["context"],
            guidance=float(inputs["guidance"][0]) if "guidance" in inputs else 1.0,
            timestep=inputs["timestep"],
            input_scale=inputs["input_scale"],
            step=inputs["step"],
            noise=inputs.get("noise"),
            mask=inputs.get("mask"),
            known=inputs.get("known"),
            known_noise=inputs.get("known_noise"),
            known_step=inputs.get("known_step"),
            lora_row=self._desk.lora_row(int(inputs["ticket"][0])),
        )

    def _warm_up(self) -> None:
        side = self.manifest.native_px // self.manifest.vae_scale_factor
        shape = (self.manifest.facts.latent_channels, side, side)
        width = next(spec.shape[2] for spec in self._engine.inputs if spec.name == "context")
        assert isinstance(width, int)
        context = np.zeros((2, self.manifest.tokenizer.max_tokens, width), np.float32)
        once = Segment(
            sample=np.zeros(shape, np.float32),
            memory=np.zeros((2, *shape), np.float32),
            context=context,
            guidance=1.0,
            timestep=np.ones(1, np.float32),
            input_scale=np.ones(1, np.float32),
            step=np.zeros((1, 3, 5), np.float32),
        )
        self._batcher.submit(once).result(timeout=self._limit_s)


def _open_bank(manifest: ModelManifest, settings: Settings) -> LoraBank | None:
    if manifest.lora is None:
        return None
    store = LoraStore(settings.lora_dir, manifest.lora, byte_limit=settings.lora_cache_bytes)
    dtype = np.float16 if manifest.precision == "fp16" else np.float32
    return LoraBank(store, manifest.lora, rows=settings.lora_rows, dtype=dtype)


def _open_desk(
    manifest: ModelManifest, settings: Settings, bank: LoraBank | None, lease_s: float
) -> TicketDesk:
    def acquire_row(loras: Sequence[tuple[str, float]]) -> tuple[int, list[str]]:
        if bank is None:
            raise ModelError(f"the model {manifest.name} has no LoRA inputs.")
        lease = bank.acquire(loras)
        return lease.row, list(lease.warnings)

    def release_row(row: int) -> None:
        if bank is not None:
            bank.release(row)

    return TicketDesk(
        capacity=settings.slots,
        lease_s=lease_s,
        acquire_row=acquire_row,
        release_row=release_row,
    )


def _mapped(segment: Future[SegmentResult]) -> Future[Answer]:
    answer: Future[Answer] = Future()

    def finish(done: Future[SegmentResult]) -> None:
        error = done.exception()
        if error is not None:
            answer.set_exception(error)
        else:
            result = done.result()
            answer.set_result({"next_sample": result.sample, "next_memory": result.memory})

    segment.add_done_callback(finish)
    return answer


def _text(inputs: Mapping[str, Array], name: str) -> str:
    return bytes(inputs[name][0]).decode("utf-8")
