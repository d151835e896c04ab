"""Grow the demo's CLIP tokenizer: every word of the grammar becomes one token.

``python -m demo.tokenizer`` adds what is missing and widens the text encoder by as many rows.
Tokens that exist keep their ids, so trained weights stay valid. (The ids of the start and end
tokens are therefore not the last ones; the configuration names them.)
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPTextModel, CLIPTokenizer

from demo.captions import vocabulary
from demo.training import WEIGHTS


def byte_alphabet() -> list[str]:
    """The 256 characters that stand for bytes in a byte-level BPE, in byte order of CLIP."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = [byte for byte in range(256) if byte not in plain]
    return [chr(code) for code in plain] + [chr(256 + i) for i in range(len(moved))]


def _split(word: str, merges: list[tuple[str, str]]) -> list[str]:
    """A word's pieces under ranked merges."""
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    pieces = [*word[:-1], word[-1] + "</w>"]
    while len(pieces) > 1:
        pairs = list(zip(pieces, pieces[1:], strict=False))
        best = min(pairs, key=lambda pair: ranks.get(pair, len(ranks)))
        if best not in ranks:
            break
        pieces = _merge(pieces, best)
    return pieces


def _merge(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    index = 0
    while index < len(pieces):
        if tuple(pieces[index : index + 2]) == pair:
            merged.append(pieces[index] + pieces[index + 1])
            index += 2
        else:
            merged.append(pieces[index])
            index += 1
    return merged


def learn_merges(words: set[str], merges: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The merges to append until each word is one token, most frequent pair first."""
    merges = list(merges)
    start = len(merges)
    pieces = {word: _split(word, merges) for word in sorted(words)}
    while True:
        counts = Counter(
            pair for parts in pieces.values() for pair in zip(parts, parts[1:], strict=False)
        )
        if not counts:
            return merges[start:]
        best = max(counts.items(), key=lambda item: (item[1], item[0]))[0]
        merges.append(best)
        pieces = {word: _merge(parts, best) for word, parts in pieces.items()}


def grow_tokenizer(folder: Path) -> list[str]:
    """Add the grammar's words to a tokenizer folder in place; returns the new tokens in order."""
    vocab: dict[str, int] = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    merges = [(a, b) for a, _, b in (line.partition(" ") for line in lines)]
    added = learn_merges(vocabulary(), merges)
    fresh: list[str] = []
    for first, second in added:
        if first + second not in vocab:
            vocab[first + second] = len(vocab)
            fresh.append(first + second)
    text = json.dumps(vocab, ensure_ascii=False)
    (folder / "vocab.json").write_text(text, encoding="utf-8")
    rows = "\n".join(f"{a} {b}" for a, b in merges + added)
    (folder / "merges.txt").write_text(f"#version: 0.2\n{rows}\n", encoding="utf-8")
    return fresh


@torch.no_grad()
def grow_text_encoder(encoder: Any, size: int, seed: int = 0) -> None:
    """Give the token embedding ``size`` rows; new ones are small noise around the mean row."""
    old = encoder.text_model.embeddings.token_embedding.weight
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(size - len(old), old.shape[1], generator=generator) * old.std()
    rows = torch.cat([old, old.mean(0) + noise.to(old.dtype)])
    encoder.resize_token_embeddings(size)
    encoder.text_model.embeddings.token_embedding.weight.copy_(rows)


def load_tokenizer(folder: Path) -> Any:
    """The CLIP tokenizer in a pipeline's folder."""
    return CLIPTokenizer.from_pretrained(folder / "tokenizer")


def main(arguments: list[str] | None = None) -> None:
    """Grow a pipeline's tokenizer and text encoder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=Path, default=WEIGHTS / "sd")
    options = parser.parse_args(arguments)
    fresh = grow_tokenizer(options.weights / "tokenizer")
    size = len(load_tokenizer(options.weights))
    encoder = CLIPTextModel.from_pretrained(options.weights / "text_encoder")
    if size > encoder.config.vocab_size:
        grow_text_encoder(encoder, size)
        encoder.save_pretrained(options.weights / "text_encoder")
    print(f"{len(fresh)} tokens added, {size} in all: {' '.join(fresh)}")


if __name__ == "__main__":
    main()
