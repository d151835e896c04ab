"""The model repository as the graph sees it: what is served, with its tokenizers."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from closeup.errors import ModelError
from closeup.manifest import (
    FaceDetectorManifest,
    ModelManifest,
    UpscalerManifest,
    read_face_detector,
    read_models,
    read_upscaler,
)
from closeup.tokens import PromptTokenizer

_LOGGER = logging.getLogger(__name__)
T = TypeVar("T")


class Repository:
    """What is served. Manifests are read once, since Triton opens the engines once.

    An export that comes later is seen by a server that is started later, or whose models are all
    loaded anew. What cannot be read at first is tried again.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._models: dict[str, ModelManifest] | None = None
        self._tokenizers: dict[str, tuple[PromptTokenizer, ...]] = {}
        with suppress(ModelError):
            self.models()
        _ = self.upscaler, self.face_detector

    def models(self) -> dict[str, ModelManifest]:
        """Return the pipelines by name, the default first.

        A pipeline without a readable manifest is not among them; see `read_models`.

        Raises:
            ModelError: the index is damaged.
        """
        if self._models is None:
            try:
                self._models = read_models(self._folder)
            except ModelError as error:
                _LOGGER.error("%s", error)
                raise ModelError(
                    "the server's list of models is damaged: export a model again."
                ) from None  # clients learn no paths
        return self._models

    def tokenizers(self, model: ModelManifest) -> tuple[PromptTokenizer, ...]:
        """Return the tokenizers of the model's text encoders, opened at their first use."""
        if model.name not in self._tokenizers:
            folder = self._folder / model.denoiser
            self._tokenizers[model.name] = tuple(
                PromptTokenizer(encoder.tokenizer, folder) for encoder in model.encoders
            )
        return self._tokenizers[model.name]

    @cached_property
    def upscaler(self) -> UpscalerManifest | None:
        """The super-resolution model's manifest, if there is one that can be read."""
        return _readable(read_upscaler, self._folder)

    @cached_property
    def face_detector(self) -> FaceDetectorManifest | None:
        """The face detector's manifest, if there is one that can be read."""
        return _readable(read_face_detector, self._folder)


def _readable(read: Callable[[Path], T | None], folder: Path) -> T | None:
    """What can be read; a damaged one is told of in the log and is as good as none."""
    try:
        return read(folder)
    except ModelError as error:
        _LOGGER.error("%s", error)
        return None
