"""Server options as the Python models read them: environment variables, one place."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from closeup.errors import ModelError


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Options of a running server; `closeup.server` sets them from its command line.

    Attributes:
        lora_dir: folder of ``<id>.safetensors``; None for no LoRAs.
        request_timeout_s: seconds a request may take from its acceptance to its answer.
        slots: pictures in flight; more are refused with UNAVAILABLE.
        max_pixels: width times height of a request, before super-resolution.
        max_batch: sequences a denoiser call holds; None takes the engine's limit.
        segment_steps: denoising steps between two looks at cancellation and progress; None sizes
            segments by time (`closeup.run.SEGMENT_S`).
        lora_rows: LoRA combinations resident at once.
        lora_cache_bytes: LoRA files kept in memory.
    """

    lora_dir: Path | None = None
    request_timeout_s: float = 600.0
    slots: int = 16
    max_pixels: int = 2048 * 2048
    max_batch: int | None = None
    segment_steps: int | None = None
    lora_rows: int = 16
    lora_cache_bytes: int = 1 << 30


def read_settings(environment: dict[str, str] | None = None) -> Settings:
    """Read the settings from ``CLOSEUP_*`` variables; what is not set keeps its default.

    Raises:
        ModelError: a value is not a number.
    """
    values = dict(os.environ if environment is None else environment)
    base = Settings()
    lora_dir = values.get("CLOSEUP_LORA_DIR")

    def number(name: str, default: float) -> float:
        text = values.get(name)
        if not text:
            return default
        try:
            return float(text)
        except ValueError as error:
            raise ModelError(f"{name} is {text!r}; expected a number.") from error

    max_batch = int(number("CLOSEUP_MAX_BATCH", 0))
    return Settings(
        lora_dir=Path(lora_dir) if lora_dir else None,
        request_timeout_s=number("CLOSEUP_REQUEST_TIMEOUT_S", base.request_timeout_s),
        slots=int(number("CLOSEUP_SLOTS", base.slots)),
        max_pixels=int(number("CLOSEUP_MAX_PIXELS", base.max_pixels)),
        max_batch=max_batch or None,
        segment_steps=int(number("CLOSEUP_SEGMENT_STEPS", 0)) or None,
        lora_rows=int(number("CLOSEUP_LORA_ROWS", base.lora_rows)),
        lora_cache_bytes=int(number("CLOSEUP_LORA_CACHE_BYTES", base.lora_cache_bytes)),
    )
