"""The demo model's engines in this process: base pictures, and the pass of any method on them."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from benchmarks.likeness.prompts import Prompt
from closeup.conditioning import Conditioning
from closeup.detection import Face, scale_faces
from closeup.enlarge import super_resolve_all
from closeup.face_pass import find_faces
from closeup.graph import encode, open_streams, paint
from closeup.images import pixels_from_floats
from closeup.local import LocalModels
from closeup.manifest import UpscalerManifest
from closeup.run import Run
from closeup.settings import Settings

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
#: Base pictures that are painted side by side; their steps share engine calls.
_TOGETHER = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Tuning:
    """What a sweep changes of the face pass; nothing by default.

    Attributes:
        faces: fields of `closeup.faces.FaceOptions`.
        request: fields of `closeup.request.Request`, for the pass alone.
    """

    faces: dict[str, Any] = field(default_factory=dict)
    request: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A request that holds a ticket of the denoiser.

    Attributes:
        run: of the request.
        conditioning: its prompts, encoded.
        upscaler: of the repository.
    """

    run: Run
    conditioning: Conditioning
    upscaler: UpscalerManifest


@dataclass(frozen=True, kw_only=True, slots=True)
class Base:
    """A picture before any face pass.

    Attributes:
        prompt: what it was painted from.
        original: (H, W, 3) uint8 as generated.
        picture: the same super-resolved.
        faces: found in the original, in coordinates of ``picture``.
    """

    prompt: Prompt
    original: Pixels
    picture: Pixels
    faces: tuple[Face, ...]

    @property
    def enlarged(self) -> float:
        """Side of ``picture`` over that of ``original``."""
        return self.picture.shape[0] / self.original.shape[0]


@dataclass(frozen=True, kw_only=True, slots=True)
class Repainted:
    """What a method made of a base picture.

    Attributes:
        pixels: (H, W, 3) uint8.
        alpha: (H, W) float32 in [0, 1], the share of repainted faces in each pixel.
        faces: how many were repainted.
    """

    pixels: Pixels
    alpha: Floats
    faces: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Timed:
    """A result and what it cost, finding the faces included.

    Attributes:
        wall_s: seconds.
        cpu_s: processor seconds of this process.
    """

    result: Repainted
    wall_s: float
    cpu_s: float


class Method(Protocol):
    """A face pass."""

    async def __call__(self, job: Job, base: Base) -> Repainted:
        """Repaint the faces of a base picture; the picture itself stays as it is."""


class Studio:
    """Paints with the models of a repository.

    Args:
        repository: folder of the exported models.
        lora_dir: folder of LoRAs.
        cache: where base pictures are kept between runs; None keeps none.
    """

    def __init__(self, repository: Path, lora_dir: Path, cache: Path | None) -> None:
        self.models = LocalModels(repository, Settings(lora_dir=lora_dir))
        self.fingerprint = _fingerprint(repository, lora_dir)
        self._cache = cache / self.fingerprint[:12] if cache else None

    def __enter__(self) -> Studio:
        return self

    def __exit__(self, *failure: object) -> None:
        self.models.close()

    @asynccontextmanager
    async def open(self, prompt: Prompt, tuning: Tuning | None = None) -> AsyncIterator[Job]:
        """Open a request with closeup's defaults, and encode its prompts."""
        request = self.models.resolve(
            prompt=prompt.text, seed=prompt.seed, super_resolution=True, inpaint_faces=True
        )
        if tuning:
            faces = dataclasses.replace(request.faces, **tuning.faces)
            request = dataclasses.replace(request, faces=faces, **tuning.request)
        run = self.models.start(request)
        upscaler = self.models.repository.upscaler
        assert upscaler is not None  # resolve refuses super_resolution without one
        async with run.returning_ticket():
            conditioning = await encode(run, self.models.repository.tokenizers(request.model))
            yield Job(run=run, conditioning=conditioning, upscaler=upscaler)
        await run.ticket_returned()

    def paint(self, prompts: Sequence[Prompt]) -> list[Base]:
        """Paint base pictures, or take them from the cache."""

        async def several(part: Iterable[Prompt]) -> list[Base]:
            return list(await asyncio.gather(*map(self._paint_one, part)))

        bases: list[Base] = []
        for first in range(0, len(prompts), _TOGETHER):
            bases += asyncio.run(several(prompts[first : first + _TOGETHER]))
        return bases

    def repaint(self, method: Method, base: Base, tuning: Tuning | None = None) -> Timed:
        """Run a method on a base picture and time it."""

        async def timed() -> Timed:
            async with self.open(base.prompt, tuning) as job:
                wall_s, cpu_s = time.perf_counter(), time.process_time()
                result = await method(job, base)
                return Timed(
                    result=result,
                    wall_s=time.perf_counter() - wall_s,
                    cpu_s=time.process_time() - cpu_s,
                )

        return asyncio.run(timed())

    async def _paint_one(self, prompt: Prompt) -> Base:
        async with self.open(prompt) as job:
            original, picture = self._stored(prompt) or await self._painted(job, prompt)
            factor = picture.shape[0] / original.shape[0]
            faces = scale_faces(await find_faces(job.run, original), factor)
        return Base(prompt=prompt, original=original, picture=picture, faces=tuple(faces))

    async def _painted(self, job: Job, prompt: Prompt) -> tuple[Pixels, Pixels]:
        floats = await paint(job.run, job.conditioning, open_streams(job.run))
        enlarged = await super_resolve_all(job.run, floats, job.upscaler)
        original, picture = pixels_from_floats(floats[0]), pixels_from_floats(enlarged[0])
        if self._cache:
            self._cache.mkdir(parents=True, exist_ok=True)
            np.savez(self._path(prompt), original=original, picture=picture)
        return original, picture

    def _stored(self, prompt: Prompt) -> tuple[Pixels, Pixels] | None:
        if not self._cache or not self._path(prompt).exists():
            return None
        with np.load(self._path(prompt)) as arrays:
            return arrays["original"], arrays["picture"]

    def _path(self, prompt: Prompt) -> Path:
        assert self._cache
        words = hashlib.sha256(prompt.text.encode()).hexdigest()[:8]
        return self._cache / f"{prompt.seed}-{words}.npz"


def _fingerprint(repository: Path, lora_dir: Path) -> str:
    """Digest of all weights that a base picture depends on: not of the face pass, nor of code."""
    digest = hashlib.sha256()
    for path in sorted(repository.glob("*/manifest.json")):
        if path.parent.name != "face_detector":
            # The manifests hold the digests of the engines.
            facts = json.loads(path.read_text(encoding="utf-8"))
            kept = {name: facts[name] for name in facts if "face_" not in name}
            digest.update(json.dumps(kept, sort_keys=True).encode())
    for path in sorted(lora_dir.glob("*")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()
