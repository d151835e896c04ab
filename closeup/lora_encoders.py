"""The text encoders that take LoRAs, run beside the denoiser in a thread of their own."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from closeup.engines import Engine, EngineOptions, open_engine
from closeup.errors import ModelError, UnavailableError
from closeup.manifest import TextEncoder
from closeup.plans import engine_path

Array = npt.NDArray[Any]
BankArray = Callable[[Sequence[int], str], Array]


class LoraEncoders:
    """Engines of a pipeline's text encoders with LoRA inputs.

    One thread runs them, apart from the one that runs denoising steps, so sequences under way
    lose no tick to a new request's prompts.

    Args:
        encoders: of the manifest; those without a LoRA layout are left out.
        folder: with ``<name>.plan`` or ``<name>.onnx`` of each.
        options: of the engines; None stands for ``EngineOptions()``.

    Raises:
        ModelError: a file is missing or unusable, or an engine lacks an input.
    """

    def __init__(
        self,
        encoders: Sequence[TextEncoder],
        folder: Path,
        options: EngineOptions | None = None,
    ) -> None:
        self._encoders = {one.name: one for one in encoders if one.lora is not None}
        self._engines: dict[str, Engine] = {}
        self.engine_s = 0.0  # seconds inside the engines, written by the worker only
        try:
            for name in self._encoders:
                engine = open_engine(engine_path(folder, name), options=options or EngineOptions())
                self._engines[name] = engine
                _check_specs(name, engine)
        except BaseException:
            self._close_engines()
            raise
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="encoder")

    def __contains__(self, name: str) -> bool:
        """Whether the encoder ``name`` is run here."""
        return name in self._engines

    @property
    def context_width(self) -> int:
        """Widths of these encoders' contexts in sum; 0 where the graphs do not say."""
        shapes = [spec.shape[-1] for engine in self._engines.values()
                  for spec in engine.outputs if spec.name == "context"]  # fmt: skip
        return sum(width for width in shapes if isinstance(width, int))

    def lora_dtypes(self) -> dict[str, np.dtype[Any]]:
        """Return the element type of each engine's input ``lora``."""
        return {name: lora_dtype(engine) for name, engine in self._engines.items()}

    def submit(
        self, name: str, input_ids: Array, *, lora_row: int, array: BankArray
    ) -> Future[dict[str, Array]]:
        """Encode prompts with one adapter.

        Args:
            name: of the encoder.
            input_ids: (n, L) int64.
            lora_row: of the ticket in this encoder's bank, 0 for none.
            array: `closeup.lora_bank.LoraBank.array`.

        Returns:
            Of the encoder's outputs: ``context`` (n, L, D), ``pooled`` (n, P), float32.

        Raises:
            ModelError: no such encoder here, or input_ids is no (n, L) array, n >= 1.
            UnavailableError: closed.
        """
        if name not in self:
            known = ", ".join(self._engines) or "none"
            raise ModelError(
                f"the denoiser runs no text encoder {name!r} (those with LoRA inputs: {known})."
            )
        if input_ids.ndim != 2 or 0 in input_ids.shape:
            raise ModelError(
                f"input_ids has the shape {input_ids.shape}; expected (prompts, tokens)."
            )
        try:
            return self._worker.submit(self._encode, name, input_ids, lora_row, array)
        except RuntimeError as error:
            raise UnavailableError("the denoiser is shutting down; try another server.") from error

    def warm_up(self, array: BankArray) -> None:
        """Run every engine once."""
        for name, encoder in self._encoders.items():
            input_ids = np.zeros((1, encoder.tokenizer.max_tokens), np.int64)
            self.submit(name, input_ids, lora_row=0, array=array).result()

    def close(self) -> None:
        """Cancel what waits, finish what runs, release the engines."""
        self._worker.shutdown(wait=True, cancel_futures=True)
        self._close_engines()

    def _encode(self, name: str, input_ids: Array, row: int, array: BankArray) -> dict[str, Array]:
        feeds: Mapping[str, Array] = {
            "input_ids": np.ascontiguousarray(input_ids, np.int64),
            "lora": array([row], name),
            "lora_row": np.full(len(input_ids), row, np.int64),
        }
        started_s = time.perf_counter()
        outputs = self._engines[name].run(feeds)
        self.engine_s += time.perf_counter() - started_s
        wanted = self._encoders[name].outputs
        return {output: np.asarray(outputs[output], np.float32) for output in wanted}

    def _close_engines(self) -> None:
        for engine in self._engines.values():
            engine.close()


def lora_dtype(engine: Engine) -> np.dtype[Any]:
    """Return the element type of an engine's input ``lora``.

    Raises:
        ModelError: it has none.
    """
    for spec in engine.inputs:
        if spec.name == "lora":
            return spec.dtype
    raise ModelError("an engine has no input 'lora', which its manifest names: export it again.")


def _check_specs(name: str, engine: Engine) -> None:
    expected = {"input_ids", "lora", "lora_row"}
    given = {spec.name for spec in engine.inputs}
    if given != expected:
        raise ModelError(
            f"the text encoder {name} has the inputs {sorted(given)}; expected {sorted(expected)}: "
            "export the model again."
        )
