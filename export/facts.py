"""What a model says about itself: its defaults, by flags and by its folder's ``closeup.json``.

Imports nothing heavy, so that an unchanged export is over in a moment.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from closeup.errors import ExportError, RequestError
from closeup.families import Family
from closeup.fields import FIELD_BY_NAME
from closeup.manifest import Defaults
from closeup.sampler_names import resolve_sampler_name

FOLDER_OPTIONS_NAME = "closeup.json"
_NUMBER = (int, float)
# Keys of the file and the types of their values.
_FOLDER_KEYS: Mapping[str, tuple[type, ...]] = {
    "native_px": (int,),
    "face_prompt_suffix": (str,),
    "face_crop_factor": _NUMBER,
    "lost_face_strength": _NUMBER,
    "face_steps": (int,),
}
_FACE_RANGES = {
    "face_crop_factor": (1.2, 4.0),
    "lost_face_strength": (0.0, 1.0),
    "face_steps": (1, 50),
}
_DEFAULT_KEYS: Mapping[str, tuple[type, ...]] = {
    "width": (int,),
    "height": (int,),
    "steps": (int,),
    "cfg_scale": _NUMBER,
    "scheduler": (str,),
}
# Key -> the request field whose limits it has, and the flag that gives it.
_LIMITED: Mapping[str, tuple[str, str]] = {
    "native_px": ("w", "--native-px"),
    "width": ("w", "--w"),
    "height": ("h", "--h"),
    "steps": ("steps", "--steps"),
    "cfg_scale": ("cfg_scale", "--cfg-scale"),
    "scheduler": ("scheduler", "--scheduler"),
}
_SIDES = ("native_px", "width", "height")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFacts:
    """Per-model settings of the manifest; None and empty leave the family's.

    Attributes:
        native_px: side the weights were trained at.
        face_prompt_suffix: added to the prompt in the face pass.
        face_crop_factor: side of the face crop over the face box.
        lost_face_strength: strength for faces of a few latents, 0 to 1.
        face_steps: steps of the face pass, 1 to 50.
        defaults: what a request gets that does not say otherwise.
    """

    native_px: int | None = None
    face_prompt_suffix: str | None = None
    face_crop_factor: float | None = None
    lost_face_strength: float | None = None
    face_steps: int | None = None
    defaults: Defaults = field(default_factory=Defaults)

    def over(self, other: ModelFacts) -> ModelFacts:
        """Return these, with what they leave open taken from ``other``."""

        def first(name: str) -> Any:
            own = getattr(self, name)
            return getattr(other, name) if own is None else own

        def first_default(name: str) -> Any:
            own = getattr(self.defaults, name)
            return getattr(other.defaults, name) if own is None else own

        return ModelFacts(
            native_px=first("native_px"),
            face_prompt_suffix=first("face_prompt_suffix"),
            face_crop_factor=first("face_crop_factor"),
            lost_face_strength=first("lost_face_strength"),
            face_steps=first("face_steps"),
            defaults=Defaults(**{name: first_default(name) for name in _DEFAULT_KEYS}),
        )


def check_facts(facts: ModelFacts, *, flags: ModelFacts, family: Family | None = None) -> None:
    """Refuse defaults that no request could use.

    Args:
        facts: of the model.
        flags: those of the command line; what is in neither comes from the folder.
        family: of the model; None checks only what is wrong in every family.

    Raises:
        ExportError: one sentence that names the flag or the key of ``closeup.json``.
    """
    face_facts(facts)
    for key, (_, flag) in _LIMITED.items():
        value = _fact(facts, key)
        if value is None:
            continue
        check = _scheduler_problem if key == "scheduler" else _number_problem
        problem = check(key, value, family)
        if problem:
            in_file = key if key == "native_px" else f"defaults.{key}"
            source = f"{FOLDER_OPTIONS_NAME}: {in_file}" if _fact(flags, key) is None else flag
            raise ExportError(f"{source} is {value}: {problem}")


def _fact(facts: ModelFacts, key: str) -> Any:
    return facts.native_px if key == "native_px" else getattr(facts.defaults, key)


def _number_problem(key: str, value: float, family: Family | None) -> str:
    """Say what is expected instead; empty when all is well."""
    limits = FIELD_BY_NAME[_LIMITED[key][0]]
    assert limits.minimum is not None
    assert limits.maximum is not None
    expected = f"{limits.minimum:g} to {limits.maximum:g}"
    is_right = limits.minimum <= value <= limits.maximum
    if key in _SIDES:
        step_px = limits.multiple_of if family is None else family.size_step_px
        assert step_px is not None
        is_right = is_right and value % step_px == 0
        expected += f", multiples of {step_px}"
    if key == "cfg_scale" and family is not None and family.cfg_scale_below is not None:
        is_right = is_right and value < family.cfg_scale_below
        expected = f"{limits.minimum:g} to less than {family.cfg_scale_below:g}"
    of_family = "" if family is None else f" for {family.title}"
    return "" if is_right else f"expected {expected}{of_family}."


def _scheduler_problem(key: str, value: str, family: Family | None) -> str:
    """See `_number_problem`; flow matching has a form of every sampler."""
    try:
        resolve_sampler_name(value, flow=family is None or family.flow)
    except RequestError as error:
        return error.problems[key]
    return ""


def face_facts(facts: ModelFacts) -> dict[str, Any]:
    """Return what the model says about the face pass, by its name in the manifest.

    Raises:
        ExportError: a value is out of range.
    """
    given: dict[str, Any] = {}
    for name, (low, high) in _FACE_RANGES.items():
        value = getattr(facts, name)
        if value is None:
            continue
        if not low <= value <= high:
            raise ExportError(f"{name} is {value:g}; expected {low:g} to {high:g}.")
        given[name] = int(value) if name == "face_steps" else float(value)
    return given


def read_folder_facts(folder: Path) -> ModelFacts:
    """Read the folder's ``closeup.json``; all open when it has none.

    Raises:
        ExportError: not JSON, or a key that is not known.
    """
    path = folder / FOLDER_OPTIONS_NAME
    if not path.exists():
        return ModelFacts()
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ExportError(f"{path} is not valid JSON: {error}") from error
    defaults = data.pop("defaults", {}) if isinstance(data, dict) else None
    if not isinstance(data, dict) or not isinstance(defaults, dict):
        raise ExportError(f"{path}: expected a JSON object, with an object under 'defaults'.")
    _check_keys(path, data, _FOLDER_KEYS)
    _check_keys(path, defaults, _DEFAULT_KEYS)
    return ModelFacts(**data, defaults=Defaults(**defaults))


def _check_keys(path: Path, data: Mapping[str, Any], known: Mapping[str, tuple[type, ...]]) -> None:
    for key, value in data.items():
        if key not in known:
            raise ExportError(f"{path}: unknown key {key!r}; expected {', '.join(known)}.")
        if not isinstance(value, known[key]) or isinstance(value, bool):
            names = " or ".join(kind.__name__ for kind in known[key])
            raise ExportError(f"{path}: {key} is {value!r}; expected {names}.")
