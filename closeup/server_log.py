"""Read a tritonserver log: what went wrong, and the lines worth showing."""

from __future__ import annotations

import json
import re

_ERROR_LINE = re.compile(r"^E\d{4} \S+ \d+ [^\]]+\] (?P<text>.*)$", re.MULTILINE)
_LOAD_FAILED = re.compile(r"failed to load '(?P<model>[^']+)' version \S+: (?P<text>.*)", re.DOTALL)
_POLL_FAILED = re.compile(
    r"Poll failed for model directory '(?P<model>[^']+)': (?P<text>.*)", re.DOTALL
)
_SOCKET = re.compile(r"Socket '[^']+' already in use")
_FINAL = re.compile(r"^error: creating server: (?P<text>.*)$", re.MULTILINE)
_HARMLESS = "CudaDriverHelper"  # said at every start without a GPU
# What Triton and its Python backend put before a model's own words.
_PREFIXES = ("Internal: ", "Invalid argument: ", "TritonModelException: ")


def find_reason(log: str) -> str:
    """Why a server did not start, as one line.

    Args:
        log: the log's text.
    """
    socket = _SOCKET.search(log)
    if socket:
        return f"{socket.group()}."
    found = [_unquote(match["text"]) for match in _ERROR_LINE.finditer(log)]
    errors = [text for text in found if _HARMLESS not in text]
    for pattern in (_LOAD_FAILED, _POLL_FAILED):
        for error in errors:
            match = pattern.search(error)
            if match:
                return f"model {match['model']}: {_clean(match['text'])}"
    if errors:
        return _clean(errors[0])
    final = _FINAL.search(log)
    if final:
        return _clean(final["text"])
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return lines[-1] if lines else "it ended without a word."


def cut_tail(log: str, lines: int = 25) -> str:
    """The last lines of a log without its tables and empty lines.

    Args:
        log: the log's text.
        lines: how many to keep.
    """
    kept = [line for line in log.splitlines() if line.strip() and line[0] not in "|+"]
    return "\n".join(kept[-lines:])


def _unquote(text: str) -> str:
    """A log message without the quotes and escapes that Triton's log format adds."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, str) else text


def _clean(text: str) -> str:
    """The first line of a message, without what others put before it."""
    text = text.strip().splitlines()[0] if text.strip() else "no reason given."
    changed = True
    while changed:
        changed = False
        for prefix in _PREFIXES:
            if text.startswith(prefix):
                text, changed = text[len(prefix) :], True
    return text
