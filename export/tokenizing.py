"""A pipeline's tokenizers, each written as one file of the `tokenizers` library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import CLIPTokenizer, CLIPTokenizerFast, T5TokenizerFast

from closeup.errors import ExportError
from closeup.manifest import Tokenizer
from export.layouts import EncoderLayout

# Both CLIP tokenizers must give the same ids for these: case, punctuation, digits, accents,
# repeated spaces, a long word, an empty prompt.
_SAMPLE_TEXTS = (
    "a photo of an ohwx woman, full body, standing in a forest",
    "Hello, WORLD!  It's 3.14159 -- don't    stop (really)",
    "café naïve señor über",
    "pneumonoultramicroscopicsilicovolcanoconiosis",
    "blurry, low quality\nworst",
    "",
)


def write_tokenizer(
    folder: Path, encoder: EncoderLayout, target: Path, *, max_tokens: int
) -> Tokenizer:
    """Write the tokenizer of ``encoder``.

    Args:
        folder: of the pipeline.
        encoder: whose tokenizer.
        target: the folder to write ``tokenizer.json`` or ``tokenizer_2.json`` into.
        max_tokens: length of T5's prompts; CLIP's is its own.

    Returns:
        The manifest's entry.

    Raises:
        ExportError: it is missing, or its ids differ from transformers' own tokenizer.
    """
    source = folder / encoder.tokenizer
    is_t5 = encoder.class_name.startswith("T5")
    fast = _load_t5(source) if is_t5 else _load_clip(source)
    fast.backend_tokenizer.no_truncation()
    fast.backend_tokenizer.no_padding()
    path = target / f"{encoder.tokenizer}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    fast.backend_tokenizer.save(str(path))
    return Tokenizer(
        path=path.name,
        max_tokens=max_tokens if is_t5 else int(fast.model_max_length),
        bos_token_id=None if is_t5 else int(fast.bos_token_id),
        eos_token_id=int(fast.eos_token_id),
        pad_token_id=int(fast.pad_token_id),
    )


def _load_clip(source: Path) -> Any:
    slow = _load(CLIPTokenizer, source, "CLIP")
    fast = _load(CLIPTokenizerFast, source, "CLIP")
    for text in _SAMPLE_TEXTS:
        expected = slow(text, truncation=True, max_length=slow.model_max_length).input_ids
        got = fast(text, truncation=True, max_length=slow.model_max_length).input_ids
        if got != expected:
            raise ExportError(
                f"{source}: the tokenizers library reads {text!r} as {got}, transformers' "
                f"CLIPTokenizer as {expected}."
            )
    # Only the slow one always knows these two as the files of the pipeline say.
    fast.model_max_length, fast.pad_token = slow.model_max_length, slow.pad_token
    return fast


def _load_t5(source: Path) -> Any:
    if not (source / "tokenizer.json").is_file():
        raise ExportError(
            f"{source} has no tokenizer.json: convert T5's tokenizer with "
            "T5TokenizerFast.from_pretrained(...).save_pretrained(...)."
        )
    fast = _load(T5TokenizerFast, source, "T5")
    ids = fast(_SAMPLE_TEXTS[0]).input_ids
    plain = fast.backend_tokenizer.encode(_SAMPLE_TEXTS[0], add_special_tokens=False).ids
    if ids != [*plain, fast.eos_token_id]:
        raise ExportError(f"{source}: expected T5's prompts to end with one end token.")
    return fast


def _load(kind: Any, source: Path, title: str) -> Any:
    try:
        return kind.from_pretrained(source, local_files_only=True)
    except (OSError, ValueError, TypeError, ImportError) as error:
        reason = " ".join(str(error).split())
        raise ExportError(f"{source} cannot be loaded as a {title} tokenizer: {reason}") from error
