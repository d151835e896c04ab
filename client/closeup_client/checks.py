"""Check and normalise request fields before anything is sent.

Triton's own JSON parser refuses a wrong type with a 500 that names no field, so types and ranges
are checked here, with the server's table and in the server's style of sentence. What only the
server can know (models, LoRAs, which fields go together) is left to it.
"""

from __future__ import annotations

import difflib
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from closeup_client.errors import InvalidRequest
from closeup_client.fields import FIELD_BY_NAME, FIELDS, Field, Kind
from closeup_client.pictures import bytes_from_picture

Value: TypeAlias = str | bytes | int | float | bool

# What users of other services try first.
_HINTS = {
    "text": "it is called prompt here.",
    "input_image_base64": "it is called input_image here.",
    "input_image_url": "send the picture itself in input_image.",
    "mask_image_url": "send the picture itself in mask_image.",
}


def check_fields(given: Mapping[str, Any]) -> dict[str, Value]:
    """The fields as they are sent.

    Args:
        given: field -> value. Numbers and booleans may be text, as forms send them (``"7"``,
            ``"false"``); pictures may be bytes, a `pathlib.Path`, a PIL image or an array
            (H, W), (H, W, 3) or (H, W, 4) uint8.

    Returns:
        field -> str, int, float or bool; pictures are bytes. In that order.

    Raises:
        InvalidRequest: with one sentence for every field that is wrong; nothing was sent.
    """
    problems: dict[str, str] = {}
    values: dict[str, Value] = {}
    for name, value in given.items():
        field = FIELD_BY_NAME.get(name)
        if field is None:
            problems[name] = _unknown(name)
            continue
        try:
            values[name] = _CHECKS[field.kind](field, value)
        except ValueError as error:
            problems[name] = str(error)
    for field in FIELDS:
        if field.default == "required" and field.name not in given:
            problems[field.name] = f"is missing; expected {expected(field)}."
    if problems:
        raise InvalidRequest(problems)
    return values


def expected(field: Field) -> str:
    """What a field takes, in words: ``"an integer from 1 to 50"``."""
    if field.choices:
        return "one of " + ", ".join(field.choices)
    if field.kind is Kind.BOOL:
        return "true or false"
    if field.kind is Kind.IMAGE:
        return "a picture: bytes, a pathlib.Path, a PIL image or a uint8 array"
    span = ""
    if field.minimum is not None and field.maximum is not None:
        span = f"{field.minimum:g} to {field.maximum:.0f}"
    if field.kind is Kind.STRING:
        return f"text of {span} characters" if span else "text"
    noun = "an integer" if field.kind is Kind.INT else "a number"
    if field.multiple_of:
        noun = f"a multiple of {field.multiple_of}"
    return f"{noun} from {span}" if span else noun


def _unknown(name: str) -> str:
    if name in _HINTS:
        return f"is no request field; {_HINTS[name]}"
    close = difflib.get_close_matches(name, FIELD_BY_NAME, n=1, cutoff=0.6)
    hint = f"did you mean {close[0]!r}?" if close else "see closeup_client.FIELDS for all of them."
    return f"is no request field; {hint}"


def _refusal(field: Field, value: Any) -> ValueError:
    hint = " Leave it out for the default." if value is None else ""
    return ValueError(f"got {_shown(value)}; expected {expected(field)}.{hint}")


def _shown(value: Any) -> str:
    if value is not None and not isinstance(value, (str, int, float, bool)):
        return f"a value of type {type(value).__name__}"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _check_text(field: Field, value: Any) -> str:
    if not isinstance(value, str):
        raise _refusal(field, value)
    if field.choices:
        if value not in field.choices:
            close = difflib.get_close_matches(value, field.choices, n=1, cutoff=0.7)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"{_refusal(field, value)}{hint}")
        return value
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("holds a lone surrogate; expected text that UTF-8 can carry.") from None
    if field.minimum and not value.strip():
        raise ValueError(f"is empty; expected {expected(field)}.")
    if "\0" in value:
        raise ValueError("contains a NUL character; leave it out.")
    if not _in_range(field, len(value)):
        raise ValueError(f"has {len(value)} characters; expected {expected(field)}.")
    return value


def _check_int(field: Field, value: Any) -> int:
    try:
        number = int(value, 10) if isinstance(value, str) else operator.index(value)
    except (TypeError, ValueError):
        raise _refusal(field, value) from None
    off_grid = field.multiple_of is not None and number % field.multiple_of != 0
    if isinstance(value, bool) or off_grid or not _in_range(field, number):
        raise _refusal(field, value)
    return number


def _check_float(field: Field, value: Any) -> float:
    if isinstance(value, bool) or isinstance(value, (bytes, bytearray)):
        raise _refusal(field, value)
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise _refusal(field, value) from None
    if not math.isfinite(number) or not _in_range(field, number):
        raise _refusal(field, value)
    return number


def _check_bool(field: Field, value: Any) -> bool:
    if isinstance(value, str) and value.strip().lower() in ("true", "false"):
        return value.strip().lower() == "true"  # forms send text, and bool("false") is True
    if isinstance(value, bool) or type(value).__name__ in ("bool_", "bool"):  # numpy's too
        return bool(value)
    raise _refusal(field, value)


def _check_picture(field: Field, value: Any) -> bytes:
    try:
        return bytes_from_picture(value)
    except TypeError:
        raise _refusal(field, value) from None


def _in_range(field: Field, number: float) -> bool:
    low = -math.inf if field.minimum is None else field.minimum
    high = math.inf if field.maximum is None else field.maximum
    return low <= number <= high


_CHECKS: Mapping[Kind, Callable[[Field, Any], Value]] = {
    Kind.STRING: _check_text,
    Kind.INT: _check_int,
    Kind.FLOAT: _check_float,
    Kind.BOOL: _check_bool,
    Kind.IMAGE: _check_picture,
}
