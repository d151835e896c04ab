"""Parameters of closeup's face pass that a sweep can set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.likeness.studio import Tuning

DEFAULT = "default"


def _switch(text: str) -> bool:
    if text not in ("on", "off"):
        raise ValueError(f"got {text!r}; expected on or off.")
    return text == "on"


PARAMETERS: dict[str, tuple[str, str, Callable[[str], Any]]] = {
    "face_crop_factor": ("faces", "crop_factor", float),
    "face_denoising_strength": ("faces", "strength", float),
    "feather": ("faces", "feather", float),
    "margin": ("faces", "margin", float),
    "upright": ("faces", "upright", _switch),
    "face_steps": ("request", "face_steps", int),
    "cfg_scale": ("request", "cfg_scale", float),
    "scheduler": ("request", "scheduler", str),
}
"""Parameter -> whose field (the face options' or the request's), its name, how to read a value."""


def make_tuning(parameter: str, text: str) -> Tuning:
    """Return the change that sets a parameter for the face pass alone.

    Args:
        parameter: of `PARAMETERS`.
        text: a value, or ``default`` for no change.

    Raises:
        ValueError: the text is no value of this parameter.
    """
    if text == DEFAULT:
        return Tuning()
    owner, name, read = PARAMETERS[parameter]
    try:
        change = {name: read(text)}
    except ValueError as error:
        raise ValueError(f"{parameter}: {error}") from None
    return Tuning(faces=change) if owner == "faces" else Tuning(request=change)
