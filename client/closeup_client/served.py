"""What a server says about itself."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from closeup_client.errors import InvalidRequest, ServerFailure, Unavailable

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
class ServedLora:
    """One file of the server's LoRA folder.

    Attributes:
        id: what prompts call it: ``<lora:ID:WEIGHT>``.
        size_bytes: of the file.
        networks: what it adapts, such as ``"denoiser"``; None while the server does not hold it
            in memory, since only then has the file been read.
    """

    id: str
    size_bytes: int
    networks: tuple[str, ...] | None


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


def denoiser_from_served(served: Served, model: str | None) -> str:
    """The repository's name of a pipeline's denoiser.

    Args:
        served: what there is.
        model: as the request field `model`; None for the first that is ready.

    Raises:
        InvalidRequest: no such pipeline is served.
        Unavailable: it is not ready.
        ServerFailure: the server serves no pipeline at all.
    """
    if not served.pipelines:
        raise ServerFailure("the server serves no pipeline; is this a closeup server?", "NOT_FOUND")
    if model is None:
        found = next((one for one in served.pipelines if one.ready), served.pipelines[0])
    else:
        by_name = {one.name: one for one in served.pipelines}
        if model not in by_name:
            raise InvalidRequest({"model": f"got {model!r}; served are {', '.join(by_name)}."})
        found = by_name[model]
    if not found.ready:
        reason = found.reason or found.state
        raise Unavailable(f"the model {found.name} is not ready: {reason.rstrip('.')}.")
    return f"{found.name}{_DENOISER}"


def loras_from_outputs(outputs: Mapping[str, list[bytes]]) -> tuple[ServedLora, ...]:
    """The LoRA folder, from a denoiser's answer.

    Raises:
        ServerFailure: the answer holds no such list.
    """
    try:
        return tuple(_lora_from_entry(entry) for entry in json.loads(outputs["loras"][0]))
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        raise ServerFailure("the answer is no list of LoRAs; is this a closeup server?") from None


def _lora_from_entry(entry: Mapping[str, Any]) -> ServedLora:
    networks = entry.get("networks")
    return ServedLora(
        id=str(entry["id"]),
        size_bytes=int(entry["bytes"]),
        networks=None if networks is None else tuple(str(name) for name in networks),
    )
