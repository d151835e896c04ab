"""Weighted prompts of any length: ``(word:1.2)``, ``[word]``, and chunks of what an encoder reads.

The syntax is the one that users of Stable Diffusion web interfaces know: round brackets multiply
the weight of what they hold by 1.1 or by the number behind a colon, square brackets divide it by
1.1, brackets nest, and a backslash makes the next bracket or backslash an ordinary character.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from closeup.errors import RequestError
from closeup.manifest import Tokenizer
from closeup.tokens import PromptTokenizer

ROUND, SQUARE = 1.1, 1 / 1.1
MAX_WEIGHT = 10.0
MAX_DEPTH = 50

_TOKEN = re.compile(r"\\[\\()\[\]]|[()\[\]]|[^\\()\[\]]+|\\")
_NUMBER = re.compile(r":\s*([+-]?\d*\.?\d+)\s*$")
#: A weight stands within so many characters of its bracket: a search through a whole prompt, once
#: a bracket, takes time that grows with the square of its length.
_NUMBER_REACH = 40

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class WeightedTokens:
    """A prompt cut into chunks.

    Attributes:
        ids: (chunks, max_tokens) int64, each chunk with its own begin, end and padding.
        weights: (chunks, max_tokens) float32; 1 for begin, end and padding.
    """

    ids: npt.NDArray[np.int64]
    weights: Floats


@dataclass(slots=True)
class _Open:
    bracket: str
    first: int  # index of the first part inside


def parse_weights(text: str, *, field_name: str = "prompt") -> list[tuple[str, float]]:
    """Take a weighted prompt apart.

    Brackets that are never closed count to the end of the text; one that closes nothing is an
    ordinary character. Neighbours of equal weight are joined.

    Args:
        text: as typed.
        field_name: request field that errors name.

    Returns:
        (text, weight) in order.

    Raises:
        RequestError: brackets nested deeper than MAX_DEPTH, or a weight past MAX_WEIGHT.
    """
    parts: list[tuple[str, float]] = []
    stack: list[_Open] = []
    for match in _TOKEN.finditer(text):
        token = match[0]
        if token in "([":
            stack.append(_Open(token, len(parts)))
            if len(stack) > MAX_DEPTH:
                raise RequestError({field_name: f"nests more than {MAX_DEPTH} brackets."})
        elif token in ")]" and stack and stack[-1].bracket == "(["[")]".index(token)]:
            _close(parts, stack.pop())
        else:
            parts.append((token[1:] if len(token) == 2 and token[0] == "\\" else token, 1.0))
    while stack:
        _close(parts, stack.pop(), explicit=False)
    for _, weight in parts:
        if not abs(weight) <= MAX_WEIGHT:
            raise RequestError(
                {field_name: f"a part has weight {weight:g}; weights lie within {MAX_WEIGHT:g}."}
            )
    return _joined(parts)


def _close(parts: list[tuple[str, float]], opened: _Open, *, explicit: bool = True) -> None:
    """Multiply the weight of what a bracket holds."""
    factor = ROUND if opened.bracket == "(" else SQUARE
    if explicit and opened.bracket == "(" and len(parts) > opened.first:
        text, weight = parts[-1]
        number = _NUMBER.search(text, max(0, len(text) - _NUMBER_REACH))
        if number is not None:
            factor = float(number[1])
            parts[-1] = (text[: number.start()], weight)
    for index in range(opened.first, len(parts)):
        text, weight = parts[index]
        parts[index] = (text, weight * factor)


def _joined(parts: list[tuple[str, float]]) -> list[tuple[str, float]]:
    joined: list[tuple[str, float]] = []
    for text, weight in parts:
        if not text:
            continue
        if joined and joined[-1][1] == weight:
            joined[-1] = (joined[-1][0] + text, weight)
        else:
            joined.append((text, weight))
    return joined


def encode_weighted(
    tokenizer: PromptTokenizer, facts: Tokenizer, parts: list[tuple[str, float]]
) -> WeightedTokens:
    """Return the chunks of a weighted prompt; at least one, even for an empty prompt.

    Args:
        tokenizer: of a CLIP encoder.
        facts: the same tokenizer's entry in the manifest.
        parts: from `parse_weights`.
    """
    ids: list[int] = []
    weights: list[float] = []
    for text, weight in parts:
        tokens = tokenizer.tokens(text)
        ids += tokens
        weights += [weight] * len(tokens)
    begin = [] if facts.bos_token_id is None else [facts.bos_token_id]
    room = facts.max_tokens - 1 - len(begin)
    chunks = max(1, -(-len(ids) // room))
    all_ids = np.full((chunks, facts.max_tokens), facts.pad_token_id, np.int64)
    all_weights = np.ones((chunks, facts.max_tokens), np.float32)
    for chunk in range(chunks):
        part = slice(chunk * room, (chunk + 1) * room)
        whole = [*begin, *ids[part], facts.eos_token_id]
        all_ids[chunk, : len(whole)] = whole
        all_weights[chunk, len(begin) : len(whole) - 1] = weights[part]
    return WeightedTokens(ids=all_ids, weights=all_weights)


def apply_weights(context: Floats, weights: Floats) -> Floats:
    """Weigh the states of a prompt and keep their mean.

    Args:
        context: (L, D) float32.
        weights: (L,) float32.

    Returns:
        (L, D) float32; `context` itself when every weight is 1.

    Source: diffusers, examples/community/lpw_stable_diffusion.py, get_weighted_text_embeddings.
    """
    if (weights == 1).all():
        return context
    weighed = context * weights[:, None]
    before, after = float(context.mean()), float(weighed.mean())
    if after == 0:
        return weighed
    return np.asarray(weighed * (before / after), np.float32)
