"""What a denoiser counts, as metrics for a monitoring system."""

from __future__ import annotations

from dataclasses import dataclass

from closeup.denoiser import Denoiser


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricSpec:
    """One metric.

    Attributes:
        name: what monitoring systems call it.
        description: its help text.
        is_total: it only ever grows; otherwise it is a present state.
    """

    name: str
    description: str
    is_total: bool


def _total(name: str, description: str) -> MetricSpec:
    return MetricSpec(name=f"closeup_{name}_total", description=description, is_total=True)


def _state(name: str, description: str) -> MetricSpec:
    return MetricSpec(name=f"closeup_{name}", description=description, is_total=False)


METRICS: tuple[MetricSpec, ...] = (
    _total("engine_calls", "Denoiser engine calls"),
    _total("sequence_steps", "Denoising steps of sequences"),
    _total("engine_seconds", "Seconds in the denoiser's and the text encoders' engines"),
    _state("slots_in_use", "Pictures in flight"),
    _total("lora_hits", "LoRA files answered from memory"),
    _total("lora_misses", "LoRA files read from disk"),
    _total("lora_evictions", "LoRA files dropped from memory for lack of room"),
    _state("lora_files", "LoRA files in memory"),
    _state("lora_bytes", "Bytes of the LoRA files in memory"),
    _total("lora_row_hits", "Requests whose LoRAs were resident in the bank"),
    _total("lora_row_misses", "Requests whose LoRAs had to be put into the bank"),
    _state("lora_rows", "Rows of the LoRA bank"),
    _state("lora_rows_resident", "Rows of the LoRA bank that hold LoRAs"),
    _state("lora_rows_in_use", "Rows of the LoRA bank that running requests use"),
    _state("lora_bank_bytes", "Bytes of the LoRA bank's arrays"),
)


def metric_values(denoiser: Denoiser) -> dict[str, float]:
    """Return the values now, by name; those of LoRAs only where a network takes them."""
    counters = denoiser.counters
    values: dict[str, float] = {
        "closeup_engine_calls_total": counters.engine_calls,
        "closeup_sequence_steps_total": counters.sequence_steps,
        "closeup_engine_seconds_total": denoiser.engine_s,
        "closeup_slots_in_use": denoiser.slots_in_use,
    }
    loras = denoiser.lora_counters()
    if loras is None:
        return values
    store, bank = loras.store, loras.bank
    return values | {
        "closeup_lora_hits_total": store.hits,
        "closeup_lora_misses_total": store.misses,
        "closeup_lora_evictions_total": store.evictions,
        "closeup_lora_files": store.held,
        "closeup_lora_bytes": store.held_bytes,
        "closeup_lora_row_hits_total": bank.hits,
        "closeup_lora_row_misses_total": bank.misses,
        "closeup_lora_rows": bank.rows,
        "closeup_lora_rows_resident": bank.resident,
        "closeup_lora_rows_in_use": bank.in_use,
        "closeup_lora_bank_bytes": bank.array_bytes,
    }
