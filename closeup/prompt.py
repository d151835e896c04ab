"""What a prompt carries besides its words: LoRA tags and flags.

``<lora:ID:WEIGHT>`` may stand anywhere and as often as one likes; ``--flag value`` sets a request
field from inside the text. Both are taken out, and the text that remains is what its author would
have typed without them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from closeup.errors import RequestError

MAX_LORA_WEIGHT = 10.0
MAX_LORAS = 16
MAX_LORA_ID_CHARACTERS = 128

_ID = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", re.ASCII)
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?", re.ASCII)
_TAG = re.compile(r"<\s*lora\s*:([^<>:]*)(?::([^<>:]*))?>", re.IGNORECASE)
_BROKEN_TAG = re.compile(r"<\s*lora[^<>\n]{0,40}>?", re.IGNORECASE)
_VALUE_FLAGS: Mapping[str, str] = {
    "hires_denoising_strength": "hires_denoising_strength",
    "face_inpaint_denoising": "face_denoising_strength",
}
_SWITCH_FLAGS: Mapping[str, str] = {"only_upscale": "only_upscale"}
_FLAG = re.compile(
    rf"(?<!\S)--(?:(?P<name>{'|'.join(_VALUE_FLAGS)})"
    r"(?:(?:\s*=\s*|\s+)(?P<value>[^\s,]+)|(?=[\s,]|$))"
    rf"|(?P<switch>{'|'.join(_SWITCH_FLAGS)})(?:=(?P<state>true|false))?(?=[\s,]|$))"
)
_NO_SPACE_BEFORE = frozenset(",.;:!?)]}")
_NO_SPACE_AFTER = frozenset("([{")


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraTag:
    """One LoRA of a request.

    Attributes:
        id: name of its file without ``.safetensors``.
        weight: factor of its effect, within +-MAX_LORA_WEIGHT.
    """

    id: str
    weight: float


@dataclass(frozen=True, kw_only=True, slots=True)
class ParsedPrompt:
    """A prompt taken apart.

    Attributes:
        text: the words, without tags and flags.
        loras: one entry an id, in order of first mention; the weights of repeated tags are added,
            which is what applying the LoRA that often would do. May hold weight 0.
        flags: request field -> value as typed (numbers) or ``"true"``/``"false"``; of a repeated
            flag the last one counts.
    """

    text: str
    loras: tuple[LoraTag, ...] = ()
    flags: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))


def is_lora_id(text: str) -> bool:
    """Whether ``text`` may name a LoRA: ``[A-Za-z0-9._-]+``, no leading dot, no ``..``."""
    return (
        len(text) <= MAX_LORA_ID_CHARACTERS and ".." not in text and _ID.fullmatch(text) is not None
    )


def parse_prompt(prompt: str, *, field_name: str = "prompt") -> ParsedPrompt:
    """Take tags and flags out of a prompt.

    Args:
        prompt: as the user typed it.
        field_name: request field that errors name.

    Returns:
        The text and what was found. A prompt without tags and flags comes back unchanged.

    Raises:
        RequestError: a tag that starts with ``<lora`` but is malformed, an id that is no file
            name, a weight that is no number within +-MAX_LORA_WEIGHT, more than MAX_LORAS
            different LoRAs, or a flag without its number.
    """
    try:
        weights: dict[str, float] = {}
        flags: dict[str, str] = {}
        text = _cut(prompt, _TAG, lambda match: _add_tag(weights, match))
        broken = _BROKEN_TAG.search(text)
        if broken:
            raise _PromptError(
                f"{broken.group().strip()!r} is not a LoRA tag; write <lora:ID:WEIGHT>, "
                "such as <lora:1795721:0.8>."
            )
        text = _cut(text, _FLAG, lambda match: flags.update([_flag(match)]))
        _check_loras(weights)
    except _PromptError as error:
        raise RequestError({field_name: str(error)}) from None
    loras = tuple(LoraTag(id=name, weight=weight) for name, weight in weights.items())
    return ParsedPrompt(text=text, loras=loras, flags=MappingProxyType(flags))


class _PromptError(Exception):
    """One sentence, still without the field it belongs to."""


def _add_tag(weights: dict[str, float], match: re.Match[str]) -> None:
    name, weight = match[1].strip(), match[2]
    if not is_lora_id(name):
        raise _PromptError(
            f"{name[:40]!r} cannot be a LoRA id; ids are 1 to {MAX_LORA_ID_CHARACTERS} letters, "
            "digits and . _ - without a leading dot or two dots in a row."
        )
    weights[name] = weights.get(name, 0.0) + (
        1.0 if weight is None else _weight(name, weight.strip())
    )


def _weight(name: str, text: str) -> float:
    value = float(text) if _NUMBER.fullmatch(text) else None
    if value is None or not abs(value) <= MAX_LORA_WEIGHT:
        raise _PromptError(
            f"the weight {text[:20]!r} of LoRA {name!r} must be a number from "
            f"{-MAX_LORA_WEIGHT:g} to {MAX_LORA_WEIGHT:g}."
        )
    return value


def _check_loras(weights: Mapping[str, float]) -> None:
    if len(weights) > MAX_LORAS:
        raise _PromptError(
            f"{len(weights)} different LoRAs are named; a request may use {MAX_LORAS}."
        )
    for name, weight in weights.items():
        if abs(weight) > MAX_LORA_WEIGHT:
            raise _PromptError(
                f"the weights of LoRA {name!r} add up to {weight:g}; the sum must lie within "
                f"{-MAX_LORA_WEIGHT:g} to {MAX_LORA_WEIGHT:g}."
            )


def _flag(match: re.Match[str]) -> tuple[str, str]:
    if match["switch"]:
        return _SWITCH_FLAGS[match["switch"]], match["state"] or "true"
    value = match["value"]
    if value is None or not _NUMBER.fullmatch(value):
        raise _PromptError(
            f"--{match['name']} needs a number from 0 to 1 behind it"
            + (f", not {value[:20]!r}." if value else ".")
        )
    return _VALUE_FLAGS[match["name"]], value


def _cut(text: str, pattern: re.Pattern[str], found: Callable[[re.Match[str]], None]) -> str:
    """Report every match of ``pattern`` to ``found`` and return the text without them."""
    spans = []
    for match in pattern.finditer(text):
        found(match)
        spans.append(match.span())
    if not spans:
        return text
    runs = list(_runs(text, spans))
    kept = text[: runs[0][0]]
    for (_, end), (start, _) in zip(runs, runs[1:], strict=False):
        kept = _join(kept, text[end:start])
    return _join(kept, text[runs[-1][1] :], last=True).strip()


def _runs(text: str, spans: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Join spans that only white space separates."""
    start, stop = spans[0]
    for next_start, next_stop in spans[1:]:
        if text[stop:next_start].strip():
            yield start, stop
            start = next_start
        stop = next_stop
    yield start, stop


def _join(left: str, right: str, *, last: bool = False) -> str:
    """Join what stood on both sides of a cut as if nothing had stood between."""
    head, tail = left.rstrip(), right.lstrip()
    gap = left[len(head) :] + right[: len(right) - len(tail)]
    if tail.startswith(",") and (not head or head.endswith(",")):
        tail = tail[1:].lstrip()
        gap = " "
    if not tail and last:
        return head.removesuffix(",").rstrip()
    if not head:
        return tail
    if not tail:
        return head + gap
    return head + _separator(head[-1], gap, tail[0]) + tail


def _separator(before: str, gap: str, after: str) -> str:
    if "\n" in gap:
        return "\n"
    if before in _NO_SPACE_AFTER or after in _NO_SPACE_BEFORE:
        return ""
    touching_words = before.isalnum() and after.isalnum()
    return " " if gap or touching_words else ""
