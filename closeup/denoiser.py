"""The denoiser as a service: tickets, LoRAs, prompts, segments; no Triton in here.

`closeup.denoiser_model` puts it behind Triton, the tests and benchmarks call it directly.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from closeup.batching import BatchCounters, SegmentResult, StepBatcher
from closeup.engines import Engine, EngineOptions, open_engine
from closeup.errors import FeedError, ModelError
from closeup.feeds import Segment
from closeup.futures import chained, finished, mapped
from closeup.lora_bank import BankCounters, LoraBank, LoraLease
from closeup.lora_encoders import LoraEncoders, lora_dtype
from closeup.lora_keys import DENOISER
from closeup.lora_read import layouts_from_manifest
from closeup.lora_store import LoraStore, StoreCounters
from closeup.manifest import MANIFEST_NAME, ModelManifest, read_manifest
from closeup.plans import engine_path
from closeup.run import Array
from closeup.segments import ACQUIRE, ENCODE, LORAS, NEEDED, PLAIN_NAME, RELEASE, SEGMENT
from closeup.settings import Settings
from closeup.tickets import TicketDesk

log = logging.getLogger(__name__)

LEASE_MARGIN_S = 60.0
LORA_LOADERS = 4

Answer = dict[str, Array]


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraCounters:
    """What a pipeline's LoRAs did since the start, and what of them is held now."""

    store: StoreCounters
    bank: BankCounters


class Denoiser:
    """Holds the denoiser engine of one pipeline, its batches, its LoRA bank and the slots.

    Text encoders with LoRA inputs run here too, since LoRA vectors never leave this process.

    Args:
        folder: the model's folder in the repository (manifest.json, <version>/model.onnx and,
            for each text encoder with LoRA inputs, <version>/<encoder>.onnx); a .plan of the same
            name goes before each.
        version: name of the version folder.
        settings: server options.
        device_id: the GPU of every engine.
    """

    def __init__(
        self, folder: Path, *, version: str = "1", settings: Settings, device_id: int = 0
    ) -> None:
        self.manifest = manifest = read_manifest(folder / MANIFEST_NAME)
        options = EngineOptions(device_id=device_id)
        self._engine = open_engine(engine_path(folder / version), options=options)
        plain = engine_path(folder / version, Path(PLAIN_NAME).stem)
        self._plain = open_engine(plain, options=options) if plain.exists() else None
        self._encoders = LoraEncoders(manifest.encoders, folder / version, options)
        self._limit_s = settings.request_timeout_s + LEASE_MARGIN_S
        self._loader = ThreadPoolExecutor(LORA_LOADERS, thread_name_prefix="lora")
        self._store = LoraStore(
            settings.lora_dir,
            layouts_from_manifest(manifest),
            byte_limit=settings.lora_cache_bytes,
        )
        self._bank = self._open_bank(settings.lora_rows)
        self._desk = _open_desk(manifest, self._bank, settings.slots, self._limit_s)
        self._row_extras = _row_extras(manifest)
        self._batcher = StepBatcher(
            self._engine.run,
            max_batch=min(manifest.max_batch, settings.max_batch or manifest.max_batch),
            loras=None if self._bank is None or manifest.lora is None
            else self._bank.view(DENOISER),
            run_plain=None if self._plain is None else self._plain.run,
        )  # fmt: skip
        self._warm_up()

    @property
    def counters(self) -> BatchCounters:
        """Totals of the engine calls, the warm-up's included."""
        return self._batcher.counters

    @property
    def engine_s(self) -> float:
        """Seconds inside engines, the text encoders' included."""
        return self.counters.engine_s + self._encoders.engine_s

    @property
    def slots_in_use(self) -> int:
        """Pictures in flight."""
        return self._desk.slots_in_use

    def lora_counters(self) -> LoraCounters | None:
        """Return the LoRA counters; None when no network has LoRA inputs."""
        if self._bank is None:
            return None
        return LoraCounters(store=self._store.counters(), bank=self._bank.counters())

    def start(self, inputs: Mapping[str, Array]) -> Future[Answer]:
        """Start one operation (see `closeup.segments`) and return its future answer.

        Raises:
            ModelError: an unknown operation, ticket or text encoder, or malformed inputs.
            UnavailableError: shutting down.
        """
        operation = _text(inputs, "operation")
        for name in NEEDED.get(operation, ()):
            if name not in inputs or inputs[name].shape == (0,):
                raise FeedError(f"the operation {operation} needs the input {name}.")
        if operation == SEGMENT:
            return mapped(self._batcher.submit(self._segment(inputs)), _segment_answer)
        if operation == ENCODE:
            return self._encode(inputs)
        if operation == ACQUIRE:
            return self._admit(inputs)
        if operation == RELEASE:
            number = int(inputs["ticket"][0])
            self._desk.release(number)
            return finished({"ticket": np.array([number], np.int64)})
        if operation == LORAS:
            return self._loader.submit(self._list_loras)
        raise ModelError(f"the denoiser knows no operation {operation!r}.")

    def close(self) -> None:
        """Fail what still runs with UnavailableError and release the engine."""
        self._batcher.close()
        self._loader.shutdown(wait=False, cancel_futures=True)
        self._encoders.close()
        self._engine.close()
        if self._plain is not None:
            self._plain.close()

    def _admit(self, inputs: Mapping[str, Array]) -> Future[Answer]:
        """Grant a ticket and, where token ids came with it, encode them."""
        loras = [(str(name), float(weight)) for name, weight in json.loads(_text(inputs, "loras"))]
        slots = int(inputs["slots"][0])
        if loras:  # they may have to be read
            granted = self._loader.submit(self._acquire, slots, loras)
        else:
            granted = finished(self._acquire(slots, loras))
        if "input_ids" not in inputs:
            return granted

        def encode(ticket: Answer) -> Future[Answer]:
            encoded = self._encode({**inputs, "ticket": ticket["ticket"]})
            return mapped(encoded, lambda outputs: {**ticket, **outputs})

        # Nobody knows the ticket's number before the prompts are encoded.
        return chained(granted, encode, lambda ticket: self._desk.release(int(ticket["ticket"][0])))

    def _acquire(self, slots: int, loras: Sequence[tuple[str, float]]) -> Answer:
        number, warnings = self._desk.acquire(slots, loras)
        return {
            "ticket": np.array([number], np.int64),
            "warnings": np.array([json.dumps(warnings).encode()], np.object_),
        }

    def _list_loras(self) -> Answer:
        entries = [
            {"id": entry.id, "bytes": entry.size_bytes, "networks": entry.networks}
            for entry in self._store.entries()
        ]
        return {"loras": np.array([json.dumps(entries).encode()], np.object_)}

    def _encode(self, inputs: Mapping[str, Array]) -> Future[Answer]:
        name = _text(inputs, "encoder")
        row = self._desk.lora_row(int(inputs["ticket"][0]), name)
        if self._bank is None:
            raise ModelError(f"the model {self.manifest.name} has no LoRA inputs.")
        encoded = self._encoders.submit(
            name, inputs["input_ids"], lora_row=row, array=self._bank.array
        )
        return mapped(encoded, _encoded_answer)

    def _segment(self, inputs: Mapping[str, Array]) -> Segment:
        sample = inputs["sample"]
        memory = inputs.get("memory")
        return Segment(
            sample=sample,
            memory=np.zeros((2, *sample.shape), np.float32) if memory is None else memory,
            is_first=memory is None,
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
            budget_s=float(inputs["budget_s"][0]) if "budget_s" in inputs else None,
            extras=self._extras(inputs),
        )

    def _extras(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        rows = len(inputs["context"])
        for name in self._row_extras:
            if name not in inputs:
                raise ModelError(f"the segment lacks {name}, which {self.manifest.name} needs.")
            if len(inputs[name]) != rows:
                raise ModelError(f"{name} has {len(inputs[name])} rows, context has {rows}.")
        return {name: inputs[name] for name in self._row_extras}

    def _open_bank(self, rows: int) -> LoraBank | None:
        layouts = {
            network: layout
            for network, layout in layouts_from_manifest(self.manifest).items()
            if layout is not None
        }
        if not layouts:
            return None
        if self.manifest.limits is not None:
            rows = min(rows, self.manifest.limits.lora_rows)
        dtypes = self._encoders.lora_dtypes()
        if DENOISER in layouts:
            dtypes[DENOISER] = lora_dtype(self._engine)
        return LoraBank(self._store, layouts, rows=rows, dtypes=dtypes)

    def _warm_up(self) -> None:
        """Run every engine once, at the sizes of a plain request."""
        if self._bank is not None:
            self._encoders.warm_up(self._bank.array)
        manifest = self.manifest
        side = manifest.native_px // manifest.vae_scale_factor
        shape = (manifest.facts.latent_channels, side, side)
        rows = 2 if manifest.facts.negative_prompt else 1
        once = Segment(
            sample=np.zeros(shape, np.float32),
            memory=np.zeros((2, *shape), np.float32),
            context=np.zeros((rows, *self._context_shape()), np.float32),
            guidance=1.0,
            timestep=np.ones(1, np.float32),
            input_scale=np.ones(1, np.float32),
            step=np.zeros((1, 3, 5), np.float32),
            extras={
                name: np.zeros((rows, *_fixed_shape(self._engine, name)), np.float32)
                for name in self._row_extras
            },
        )
        self._batcher.submit(once).result(timeout=self._limit_s)

    def _context_shape(self) -> tuple[int, int]:
        """Tokens and width of a context, (L, D)."""
        tokens = max(encoder.tokenizer.max_tokens for encoder in self.manifest.encoders
                     if "context" in encoder.outputs)  # fmt: skip
        width = next(spec.shape[-1] for spec in self._engine.inputs if spec.name == "context")
        if not isinstance(width, int):  # the graph leaves it open
            width = self._encoders.context_width
        return tokens, width


def _row_extras(manifest: ModelManifest) -> tuple[str, ...]:
    """The model's inputs by network row beside the context."""
    names = manifest.facts.row_extras
    if manifest.guidance_embeds:
        return names
    return tuple(name for name in names if name != "guidance_embed")


def _fixed_shape(engine: Engine, name: str) -> tuple[int, ...]:
    """Sides of an input by network row, the rows left out."""
    for spec in engine.inputs:
        if spec.name == name:
            sides = tuple(side for side in spec.shape[1:] if isinstance(side, int))
            if len(sides) == len(spec.shape) - 1:
                return sides
    raise ModelError(f"the denoiser has no input {name} of known width: export the model again.")


def _open_desk(
    manifest: ModelManifest, bank: LoraBank | None, slots: int, lease_s: float
) -> TicketDesk:
    def acquire(loras: Sequence[tuple[str, float]]) -> LoraLease:
        if bank is None:
            raise ModelError(f"the model {manifest.name} has no LoRA inputs.")
        return bank.acquire(loras)

    def release(row: int) -> None:
        if bank is not None:
            bank.release(row)

    return TicketDesk(capacity=slots, lease_s=lease_s, acquire_loras=acquire, release_loras=release)


def _segment_answer(result: SegmentResult) -> Answer:
    return {
        "next_sample": result.sample,
        "next_memory": result.memory,
        "steps_done": np.array([result.steps], np.int64),
    }


def _encoded_answer(outputs: Answer) -> Answer:
    return {f"encoded_{name}": array for name, array in outputs.items()}


def _text(inputs: Mapping[str, Array], name: str) -> str:
    return bytes(inputs[name][0]).decode("utf-8")
