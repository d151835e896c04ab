"""The tokenizer against transformers, with a vocabulary made here and with the demo's."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from transformers import CLIPTokenizer, CLIPTokenizerFast

from closeup.errors import ModelError
from closeup.manifest import Tokenizer
from closeup.tokens import PromptTokenizer

DEMO = Path(__file__).parents[2] / "shared" / "data" / "demo" / "tokenizer"
TEXTS = [
    "",
    "a woman in a park",
    "A  Woman,\n\tin a PARK!!  ",
    "it's the woman's 2,304x1792 photo, 85mm f/1.4; (she'll smile:1.2)",
    "café naïve Ünïcode ĳ 🙂 — “quotes” and\u00a0spaces",
    "e\u0301 composed",
    "<|endoftext|> a woman <|startoftext|>",
    "woman " * 75,
    "woman " * 76,
    "woman " * 500,
]


def _bytes_to_unicode() -> list[str]:
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {byte: chr(byte) for byte in printable}
    table.update({byte: chr(256 + index) for index, byte in enumerate(others)})
    return [table[byte] for byte in [*printable, *others]]


@pytest.fixture(scope="module")
def small_vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP vocabulary of the 256 bytes and a few merges."""
    folder = tmp_path_factory.mktemp("tokenizer")
    merges = ["w o", "m a", "wo ma", "woma n</w>", "i n</w>", "p a", "r k</w>", "pa rk</w>"]
    letters = _bytes_to_unicode()
    words = [*letters, *(letter + "</w>" for letter in letters)]
    words += [merge.replace(" ", "") for merge in merges]
    words += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    return folder


def _wrapped(source: Path, folder: Path, max_tokens: int = 77) -> PromptTokenizer:
    fast = CLIPTokenizerFast.from_pretrained(source)
    fast.backend_tokenizer.save(str(folder / "tokenizer.json"))
    facts = Tokenizer(
        path="tokenizer.json",
        max_tokens=max_tokens,
        bos_token_id=fast.bos_token_id,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
    )
    return PromptTokenizer(facts, folder)


@pytest.mark.parametrize("source", ["small", "demo"])
def test_prompt_tokenizer_equals_transformers_when_padding_and_cutting(
    source: str, small_vocabulary: Path, tmp_path: Path
) -> None:
    if source == "demo" and not DEMO.exists():
        pytest.skip("shared/ is not here")
    folder = DEMO if source == "demo" else small_vocabulary
    ours = _wrapped(folder, tmp_path)
    options = {"padding": "max_length", "truncation": True, "max_length": 77}
    for reference in (CLIPTokenizer, CLIPTokenizerFast):
        theirs = reference.from_pretrained(folder)
        for text in TEXTS:
            encoded = ours.encode(text)
            assert encoded.ids.dtype == np.int64
            assert encoded.ids.tolist() == theirs(text, **options).input_ids, (reference, text)
            assert len(ours.tokens(text)) == len(theirs(text).input_ids) - 2


def test_encode_reports_the_tokens_cut_off_when_the_prompt_is_long(
    small_vocabulary: Path, tmp_path: Path
) -> None:
    ours = _wrapped(small_vocabulary, tmp_path)
    assert ours.encode("woman " * 75).truncated == 0
    assert ours.encode("woman " * 76).truncated == 1
    assert ours.encode("woman " * 500).truncated == 425


def test_encode_fills_to_max_tokens_when_another_length_is_asked(
    small_vocabulary: Path, tmp_path: Path
) -> None:
    ours = _wrapped(small_vocabulary, tmp_path, max_tokens=5)
    ids = ours.encode("woman in woman in park").ids
    assert ids.shape == (5,)
    assert ours.encode("woman in woman in park").truncated == 2


@pytest.mark.parametrize("content", [None, "{}", "not json", "\ud800"])
def test_prompt_tokenizer_says_export_again_when_the_file_is_damaged(
    content: str | None, tmp_path: Path
) -> None:
    if content is not None:
        data = content.encode("utf-8", "surrogatepass")
        (tmp_path / "tokenizer.json").write_bytes(data)
    facts = Tokenizer(
        path="tokenizer.json", max_tokens=77, bos_token_id=0, eos_token_id=1, pad_token_id=1
    )
    with pytest.raises(ModelError, match="export the model again"):
        PromptTokenizer(facts, tmp_path)


def test_prompt_tokenizer_refuses_when_max_tokens_leaves_no_room(tmp_path: Path) -> None:
    facts = Tokenizer(path="x.json", max_tokens=2, bos_token_id=0, eos_token_id=1, pad_token_id=1)
    with pytest.raises(ModelError, match="must be 3 or more"):
        PromptTokenizer(facts, tmp_path)
