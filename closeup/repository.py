"""The model repository as the graph sees it: what is served, with its tokenizers."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from closeup.manifest import (
    INDEX_NAME,
    FaceDetectorManifest,
    ModelManifest,
    UpscalerManifest,
    read_face_detector,
    read_models,
    read_upscaler,
)
from closeup.tokens import PromptTokenizer


class Repository:
    """Reads manifests once, and again when an export has changed the index."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stamp: int | None = None
        self._models: dict[str, ModelManifest] = {}
        self._tokenizers: dict[str, tuple[PromptTokenizer, ...]] = {}

    def models(self) -> dict[str, ModelManifest]:
        """Return the pipelines by name, the default first.

        Raises:
            ModelError: a manifest is missing or damaged.
        """
        index = self._folder / INDEX_NAME
        stamp = index.stat().st_mtime_ns if index.exists() else None
        if stamp != self._stamp:
            self._models = read_models(self._folder)
            self._tokenizers.clear()
            self._stamp = stamp
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
        """The super-resolution model's manifest, if there is one."""
        return read_upscaler(self._folder)

    @cached_property
    def face_detector(self) -> FaceDetectorManifest | None:
        """The face detector's manifest, if there is one."""
        return read_face_detector(self._folder)
