"""Check what a client is made with, besides the address: the time limit and the headers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from closeup_client.errors import InvalidRequest

MAX_TIMEOUT_S = 1e6  # eleven days; far larger ones overflow sockets and gRPC's clock
_TOKEN = re.compile(r"[0-9A-Za-z!#$%&'*+.^_`|~-]+")  # RFC 9110, section 5.6.2
_GRPC_KEY = re.compile(r"[0-9a-z_.-]+")
# What all four transports carry alike: gRPC refuses the rest, aiohttp sends it as UTF-8 and
# http.client as latin-1.
_VALUE = re.compile(r"[ -~]*")
_FRAMING = ("content-length", "transfer-encoding")


def check_timeout(timeout_s: Any) -> float:
    """The time limit in seconds.

    Raises:
        InvalidRequest: not a number above 0 and up to `MAX_TIMEOUT_S`.
    """
    is_number = isinstance(timeout_s, (int, float)) and not isinstance(timeout_s, bool)
    if not is_number or not 0 < timeout_s <= MAX_TIMEOUT_S:
        takes = f"a number of seconds above 0, to {MAX_TIMEOUT_S:.0f}"
        raise InvalidRequest({"timeout_s": f"got {timeout_s!r}; expected {takes}."})
    return float(timeout_s)


def check_headers(headers: Mapping[str, str] | None, protocol: str) -> dict[str, str]:
    """The headers as they are sent; over gRPC their names are in lower case.

    Args:
        headers: name -> value; None for none.
        protocol: ``"grpc"`` or ``"http"``.

    Raises:
        InvalidRequest: a name or a value that cannot be sent. The text names the header and never
            holds the value, which may be a secret.
    """
    if headers is not None and not isinstance(headers, Mapping):
        problem = f"got a value of type {type(headers).__name__}; expected names with their values."
        raise InvalidRequest({"headers": problem})
    checked: dict[str, str] = {}
    for name, value in (headers or {}).items():
        problem = _name_problem(name, protocol) or _value_problem(value)
        if problem:
            raise InvalidRequest({"headers": f"{str(name)[:60]!r} {problem}"})
        checked[name.lower() if protocol == "grpc" else name] = value
    return checked


def _name_problem(name: Any, protocol: str) -> str:
    if not isinstance(name, str) or not _TOKEN.fullmatch(name):
        return "is no header name; expected letters, digits and hyphens."
    lowered = name.lower()
    if lowered in _FRAMING:
        return "is set by the client itself; leave it out."
    if protocol == "grpc" and (not _GRPC_KEY.fullmatch(lowered) or lowered.endswith("-bin")):
        return (
            "cannot be sent over gRPC; expected letters, digits, '_', '.' and '-', and no '-bin' "
            "at the end."
        )
    return ""


def _value_problem(value: Any) -> str:
    if not isinstance(value, str):
        return f"has a value of type {type(value).__name__}; expected text."
    if _VALUE.fullmatch(value):
        return ""
    if value.strip() != value and _VALUE.fullmatch(value.strip()):
        return "has a value with a line break or a tab at an end; strip it."
    return "has a value with line breaks or other characters than printable ASCII; leave them out."
