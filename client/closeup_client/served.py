"""What a server says about itself."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

_DENOISER = "_denoiser"


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedModel:
    """One entry of the model repository.

    Attributes:
        name: of the model; for a pipeline, the value of the request field `model`.
        state: ``"READY"``, ``"UNAVAILABLE"``, ``"LOADING"``, ... or ``"UNLOADED"``.
        reason: why it is not ready; mostly empty.
    """

    name: str
    state: str
    reason: str = ""

    @property
    def ready(self) -> bool:
        """Whether it answers."""
        return self.state == "READY"


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    """What a server serves.

    Attributes:
        pipelines: what the request field `model` can name.
        parts: every entry of the repository, by its own name.
        upscaler: state of the upscaler, None when there is none (no `super_resolution` then).
        face_detector: state of the face detector, None when there is none.
    """

    pipelines: tuple[ServedModel, ...]
    parts: tuple[ServedModel, ...] = field(repr=False)
    upscaler: str | None
    face_detector: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Health:
    """Whether a server answers and takes work.

    Attributes:
        live: it answers.
        ready: every model is loaded and warmed up.
        server: its name, ``"triton"``.
        version: Triton's version.
        url: the address asked.
    """

    live: bool
    ready: bool
    server: str
    version: str
    url: str


def served_from_index(entries: Iterable[tuple[str, str, str]]) -> Served:
    """Sort out a repository index.

    Args:
        entries: (name, state, reason), one for each version; a ready version wins.
    """
    found: dict[str, ServedModel] = {}
    for name, state, reason in entries:
        known = found.get(name)
        if known is None or not known.ready:
            found[name] = ServedModel(name=name, state=state or "UNLOADED", reason=reason)
    parts = tuple(found[name] for name in sorted(found))
    pipelines = tuple(
        ServedModel(name=part.name.removesuffix(_DENOISER), state=part.state, reason=part.reason)
        for part in parts
        if part.name.endswith(_DENOISER) and part.name != _DENOISER
    )
    states = {part.name: part.state for part in parts}
    return Served(
        pipelines=pipelines,
        parts=parts,
        upscaler=states.get("upscaler"),
        face_detector=states.get("face_detector"),
    )
