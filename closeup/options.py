"""What a client sent, checked field by field: names, types, ranges. No model is known here."""

from __future__ import annotations

import base64
import binascii
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from closeup.errors import RequestError
from closeup.fields import FIELD_BY_NAME, FIELDS, Field, Kind

Value = str | bytes | int | float | bool
Options = Mapping[str, Value]

# Triton keeps these for itself; they are no fields of ours.
RESERVED_PARAMETERS = (
    "binary_data_output",
    "headers",
    "priority",
    "sequence_",
    "timeout",
    "triton_",
)
REQUEST_ID = "id"  # the request's own id arrives as a parameter too
_FILE_STARTS = (b"\x89PNG", b"\xff\xd8", b"RIFF")
_NO_URL = "is not fetched by this server: send the picture itself in {}."
_HINTS = {
    "input_image_url": _NO_URL.format("input_image"),
    "input_image_base64": "is called input_image here, which takes base64 as well.",
    "mask_image_url": _NO_URL.format("mask_image"),
    "text": "is called prompt here.",
}


@dataclass(slots=True)
class Problems:
    """What is wrong with a request, collected before it is refused."""

    found: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, sentence: str) -> None:
        """Note the first sentence about a field."""
        self.found.setdefault(name, sentence)

    def raise_if_any(self) -> None:
        """Raise a RequestError of all that was noted."""
        if self.found:
            raise RequestError(self.found)


def parse_options(values: Mapping[str, Any], parameters: Mapping[str, Any]) -> Options:
    """Check names, types and ranges of what arrived.

    Args:
        values: field name -> the tensor's one element (bytes for strings, numpy scalars).
        parameters: request parameters; anything Triton does not reserve is an unknown field.

    Returns:
        Field name -> str, bytes (pictures), int, float or bool; only the fields given.

    Raises:
        RequestError: one sentence for each field that is wrong.
    """
    problems = Problems()
    for name in parameters:
        if name != REQUEST_ID and not name.startswith(RESERVED_PARAMETERS):
            problems.add(name, _unknown_field(name))
    options: dict[str, Value] = {}
    for name, raw in values.items():
        spec = FIELD_BY_NAME[name]
        try:
            options[name] = _checked(spec, _converted(spec, raw))
        except ValueError as error:
            problems.add(name, str(error))
    if "prompt" not in values:
        problems.add("prompt", "is missing; every request needs one.")
    problems.raise_if_any()
    return options


def _unknown_field(name: str) -> str:
    if name in _HINTS:
        return _HINTS[name]
    near = difflib.get_close_matches(name, [spec.name for spec in FIELDS], n=1)
    hint = f"did you mean {near[0]}?" if near else "leave it out."
    return f"is not a field of this server; {hint}"


def _converted(spec: Field, raw: Any) -> Value:
    if spec.kind is Kind.IMAGE:
        return _file_bytes(bytes(raw))
    if spec.kind is Kind.STRING:
        try:
            return raw.decode("utf-8") if isinstance(raw, bytes) else str(raw)
        except UnicodeDecodeError as error:
            raise ValueError(
                f"is not valid UTF-8 (byte {error.start}); send text encoded as UTF-8."
            ) from error
    if spec.kind is Kind.BOOL:
        return bool(raw)
    return int(raw) if spec.kind is Kind.INT else float(raw)


def _file_bytes(data: bytes) -> bytes:
    """Return a picture file's bytes, given as they are, as base64 or as a data URI."""
    if data.startswith(_FILE_STARTS) or not data:
        return data
    text = data.partition(b",")[2] if data.startswith(b"data:") else data
    try:
        return base64.b64decode(b"".join(text.split()), validate=True)
    except binascii.Error as error:
        raise ValueError("is neither a PNG, JPEG or WebP file nor base64 of one.") from error


def _checked(spec: Field, value: Value) -> Value:
    if spec.choices:
        if value not in spec.choices:
            near = difflib.get_close_matches(str(value), spec.choices, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise ValueError(f"got {shown(value)}{hint}; allowed are {spec.allowed}.")
        return value
    if isinstance(value, bytes):
        if not value:
            raise ValueError(f"is empty; expected {spec.allowed}.")
        return value
    if spec.minimum is None or spec.maximum is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _checked_text(spec, value)
    if not (math.isfinite(value) and spec.minimum <= value <= spec.maximum):
        raise ValueError(f"got {value:.10g}; allowed are {spec.allowed}.")
    if spec.multiple_of and value % spec.multiple_of:
        nearest = round(value / spec.multiple_of) * spec.multiple_of
        raise ValueError(f"got {value}; allowed are {spec.allowed}; the nearest is {nearest}.")
    return value


def _checked_text(spec: Field, value: str) -> str:
    assert spec.minimum is not None
    assert spec.maximum is not None
    if spec.minimum and not value.strip():
        raise ValueError(f"is empty; expected {spec.allowed}.")
    if len(value) > spec.maximum:
        raise ValueError(f"has {len(value)} characters; allowed are {spec.allowed}.")
    if "\0" in value:
        raise ValueError("contains a NUL character; leave it out.")
    return value


def shown(value: Value) -> str:
    """Return a value as messages show it: quoted, and not too long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def parse_flags(flags: Mapping[str, str]) -> dict[str, Value]:
    """Check flags from inside the prompt like the fields that they stand for.

    Raises:
        RequestError: one sentence for each flag that is wrong.
    """
    problems = Problems()
    typed: dict[str, Value] = {}
    for name, text in flags.items():
        spec = FIELD_BY_NAME[name]
        try:
            raw: Value = text.lower() not in ("false", "0") if spec.kind is Kind.BOOL else text
            typed[name] = _checked(spec, _converted(spec, raw))
        except ValueError as error:
            problems.add(name, f"(in the prompt) {error}")
    problems.raise_if_any()
    return typed
