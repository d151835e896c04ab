"""Prompt text to token ids, with the `tokenizers` library alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers

from closeup.errors import ModelError
from closeup.manifest import Tokenizer


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Encoded:
    """A prompt as the text encoder reads it.

    Attributes:
        ids: (max_tokens,) int64: begin (CLIP), tokens, end, padding.
        truncated: tokens of the prompt that did not fit; 0 when all did.
    """

    ids: npt.NDArray[np.int64]
    truncated: int


class PromptTokenizer:
    """Encodes prompts as transformers' fast tokenizers do with padding and truncation.

    Where `ftfy` is missing, transformers' slow CLIPTokenizer additionally separates Chinese
    characters with spaces and drops control characters; there its ids differ from these, which
    follow the original CLIP. Safe to use from several threads.

    Args:
        tokenizer: the manifest's entry.
        folder: of the manifest.

    Raises:
        ModelError: the file is missing or damaged, or max_tokens leaves no room for a token.
    """

    def __init__(self, tokenizer: Tokenizer, folder: Path) -> None:
        path = folder / tokenizer.path
        self._facts = tokenizer
        self._begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        self._room = tokenizer.max_tokens - 1 - len(self._begin)
        if self._room < 1:
            raise ModelError(
                f"the manifest beside {path} gives max_tokens {tokenizer.max_tokens}, which must "
                "be 3 or more: export the model again."
            )
        self._encoder = _open_tokenizer(path)

    @property
    def room(self) -> int:
        """Tokens of a prompt that fit."""
        return self._room

    def tokens(self, text: str) -> list[int]:
        """Return the ids of all of ``text``, without begin, end and padding."""
        ids: list[int] = self._encoder.encode(text, add_special_tokens=False).ids
        return ids

    def encode(self, text: str, *, ending: str = "") -> Encoded:
        """Return the ids of ``text``, cut and padded to max_tokens.

        Args:
            text: any length.
            ending: the last words of ``text`` that stay when it is cut: the cut is before them.
        """
        tokens = self.tokens(text)
        facts = self._facts
        ids = np.full(facts.max_tokens, facts.pad_token_id, np.int64)
        kept = tokens[: self._room]
        if ending and len(tokens) > self._room:
            last = self.tokens(ending)[-self._room :]
            kept = [*tokens[: self._room - len(last)], *last]
        whole = [*self._begin, *kept, facts.eos_token_id]
        ids[: len(whole)] = whole
        return Encoded(ids=ids, truncated=len(tokens) - len(kept))


def _open_tokenizer(path: Path) -> Any:
    try:
        tokenizer = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{path} is missing: export the model again.") from error
    except Exception as error:  # the library raises bare Exception for a damaged file
        raise ModelError(f"{path} is damaged ({error}): export the model again.") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
