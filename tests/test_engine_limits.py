"""Requests and server options against what a model's plans were built for."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from closeup.conditioning import encode_prompts
from closeup.manifest import EngineLimits, SizeRange, Tokenizer
from closeup.run import Run
from export.profiles import encoder_batch
from tests.manifests import make_manifest
from tests.pictures import png
from tests.test_request import refused, resolve

LIMITS = EngineLimits(
    sizes=(
        SizeRange(min_width=512, max_width=512, min_height=512, max_height=512),
        SizeRange(min_width=640, max_width=1024, min_height=640, max_height=1024),
    ),
    max_chunks=2,
    lora_rows=3,
)
MODELS = {"toy": make_manifest(limits=LIMITS)}


@pytest.mark.parametrize("size", [(512, 512), (640, 1024), (1024, 640), (768, 768)])
def test_sizes_that_the_engines_have_are_taken(size: tuple[int, int]) -> None:
    request = resolve(models=MODELS, prompt="x", w=size[0], h=size[1])
    assert (request.width, request.height) == size


@pytest.mark.parametrize("size", [(512, 520), (632, 640), (1032, 640), (1024, 512)])
def test_sizes_that_the_engines_lack_are_refused_with_those_they_have(
    size: tuple[int, int],
) -> None:
    problems = refused(models=MODELS, prompt="x", w=size[0], h=size[1])
    text = problems["w"]
    assert f"would be {size[0]}x{size[1]}" in text
    assert "built for 512x512, 640x640 to 1024x1024" in text
    # The same request to graphs, which take any shape.
    assert resolve(prompt="x", w=size[0], h=size[1]).width == size[0]


def test_hires_fix_is_refused_when_the_enlarged_picture_is_no_size_of_the_engines() -> None:
    small: dict[str, Any] = {"prompt": "x", "super_resolution": True, "hires_fix": True}
    problems = refused(models=MODELS, w=512, h=512, **small)
    assert "would repaint 2048x2048" in problems["hires_fix"]
    assert resolve(w=512, h=512, **small).hires_fix
    sizes = (*LIMITS.sizes, SizeRange(min_width=2048, max_width=2048, min_height=2048,
                                      max_height=2048))  # fmt: skip
    large = EngineLimits(sizes=sizes, max_chunks=2, lora_rows=3)
    models = {"toy": make_manifest(limits=large)}
    assert resolve(models=models, w=512, h=512, **small).hires_fix


def test_only_upscale_takes_pictures_of_any_size() -> None:
    picture = png(56, 40)
    request = resolve(models=MODELS, prompt="x", only_upscale=True, input_image=picture)
    assert (request.width, request.height) == (56, 40)


class LetterTokenizer:
    """One token a letter."""

    room = 6

    def tokens(self, text: str) -> list[int]:
        return [ord(letter) - ord("a") for letter in text if letter.isalpha()]


class RecordingEncoder:
    """Answers each token id with itself; keeps what it was sent."""

    def __init__(self) -> None:
        self.ids: Any = None
        self.rows: list[int] = []

    async def infer(
        self, name: str, inputs: Mapping[str, Any], outputs: Sequence[str]
    ) -> dict[str, Any]:
        if "ticket" in outputs:
            return {"ticket": np.array([1]), "warnings": np.array([b"[]"], np.object_)}
        ids = inputs["input_ids"]
        self.rows.append(len(ids))
        self.ids = ids if self.ids is None else np.concatenate([self.ids, ids])
        return {"context": np.repeat(ids[..., None], 3, 2).astype(np.float32)}


@pytest.mark.parametrize(("limits", "chunks"), [(LIMITS, 2), (None, 4)])
def test_weighted_prompts_are_cut_to_the_engines_chunks_with_a_warning(
    limits: EngineLimits | None, chunks: int
) -> None:
    manifest = make_manifest(limits=limits)
    facts = Tokenizer(path="", max_tokens=8, bos_token_id=90, eos_token_id=91, pad_token_id=92)
    encoder = type(manifest.encoders[0])(name="text_encoder", tokenizer=facts)
    models = {"toy": make_manifest(limits=limits, encoders=(encoder,), lora=None)}
    request = resolve(models=models, prompt="abcdefghijklmnopqrstuvw", use_lpw=True, w=512, h=512)
    engine = RecordingEncoder()
    run = Run(request=request, models=engine, check=lambda: None, report=lambda event: None)
    tokenizer: Any = LetterTokenizer()
    found = asyncio.run(encode_prompts(run, [tokenizer]))
    # The negative prompt's chunk, the prompt's, and an empty one to bring them to one length.
    assert engine.ids.shape == (1 + chunks + 1, 8)
    assert found.prompt.context.shape == (8 * chunks, 3)
    # The first chunks are whole: begin, six letters, end.
    assert engine.ids[1].tolist() == [90, 0, 1, 2, 3, 4, 5, 91]
    assert engine.rows == [chunks + 2]
    (negative,) = found.negatives.values()
    assert negative.context.shape == found.prompt.context.shape
    warned = [text for text in run.warnings if "longer than 2 chunks of 6 tokens" in text]
    assert len(warned) == (1 if limits else 0)


def test_weighted_prompts_come_in_calls_that_the_served_encoder_takes_when_nothing_cuts_them() -> (
    None
):
    facts = Tokenizer(path="", max_tokens=8, bos_token_id=90, eos_token_id=91, pad_token_id=92)
    manifest = make_manifest()
    encoder = type(manifest.encoders[0])(name="text_encoder", tokenizer=facts)
    models = {"toy": make_manifest(encoders=(encoder,), lora=None, max_batch=1)}
    request = resolve(models=models, prompt="abcdefghij" * 8, use_lpw=True, w=512, h=512)
    engine = RecordingEncoder()
    run = Run(request=request, models=engine, check=lambda: None, report=lambda event: None)
    tokenizer: Any = LetterTokenizer()
    found = asyncio.run(encode_prompts(run, [tokenizer]))
    assert engine.rows == [12, 4]  # the negative prompt, fourteen chunks, an empty one
    assert max(engine.rows) <= encoder_batch(models["toy"])
    letters = [ord(letter) - ord("a") for letter in "abcdefghij" * 8]
    # Each chunk is begin, six letters, end; the last has two letters.
    got = found.prompt.context[:, 0].reshape(14, 8)[:, 1:7].ravel()[:80].tolist()
    assert got == letters
