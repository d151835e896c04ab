"""Prompts to what the denoiser is conditioned on, for every family."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from closeup.manifest import TextEncoder
from closeup.run import Array, Floats, Run, checked_floats, text_tensor
from closeup.segments import ENCODE
from closeup.tokens import PromptTokenizer
from closeup.weighted_prompt import (
    WeightedTokens,
    apply_weights,
    encode_weighted,
    parse_weights,
)

NEGATIVE, FACE = "negative_prompt", "face_prompt"
# Rows of token ids in one call: every export's text encoders for weighted prompts take as many.
ENCODER_ROWS = 12


@dataclass(frozen=True, kw_only=True, slots=True)
class Embedding:
    """One encoded prompt.

    Attributes:
        context: (L, D) float32, every text encoder's states joined along D.
        pooled: (P,) float32; None for families without.
    """

    context: Floats
    pooled: Floats | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Guide:
    """What conditions one sequence, one entry a network row.

    Attributes:
        context: (rows, L, D) float32; negative and prompt, or the prompt alone.
        extras: the family's further inputs, name -> (rows, ...) float32.
    """

    context: Floats
    extras: dict[str, Floats]


@dataclass(frozen=True, kw_only=True, slots=True)
class Conditioning:
    """The request's prompts, encoded."""

    negative: Embedding
    prompt: Embedding
    face_prompts: tuple[Embedding, ...]

    def face_guides(self, run: Run, *, side: int) -> list[Guide]:
        """Return `guide` of every face prompt, for squares of ``side`` px."""
        return [
            self._guide(run, prompt, height=side, width=side, given={})
            for prompt in self.face_prompts
        ]

    def guide(self, run: Run, *, height: int, width: int) -> Guide:
        """Return the rows of one sequence.

        Args:
            run: the request.
            height: of the picture that the sequence paints, px.
            width: the same.
        """
        given = run.request.size_ids
        return self._guide(run, self.prompt, height=height, width=width, given=given)

    def _guide(
        self, run: Run, prompt: Embedding, *, height: int, width: int, given: Mapping[str, int]
    ) -> Guide:
        request = run.request
        facts = request.model.facts
        rows = [self.negative, prompt] if is_guided(run) else [prompt]
        extras: dict[str, Floats] = {}
        if "pooled" in facts.row_extras:
            extras["pooled"] = np.stack([row.pooled for row in rows if row.pooled is not None])
        if "time_ids" in facts.row_extras:
            ids = _time_ids(height, width, given)
            extras["time_ids"] = np.array([ids] * len(rows), np.float32)
        if "guidance_embed" in facts.row_extras and request.model.guidance_embeds:
            extras["guidance_embed"] = np.full(len(rows), request.cfg_scale, np.float32)
        return Guide(context=np.stack([row.context for row in rows]), extras=extras)


def _time_ids(height: int, width: int, given: Mapping[str, int]) -> tuple[int, ...]:
    """Original size, crop offset and target size, with the pipelines' defaults.

    Source: diffusers, StableDiffusionXLPipeline._get_add_time_ids.
    """
    return (
        given.get("original_h", height),
        given.get("original_w", width),
        given.get("crop_y", 0),
        given.get("crop_x", 0),
        given.get("target_h", height),
        given.get("target_w", width),
    )


async def encode_prompts(run: Run, tokenizers: Sequence[PromptTokenizer]) -> Conditioning:
    """Encode the negative prompt, the prompt and the face prompts.

    The first call takes the request's ticket, so nothing runs without one. Prompts longer than an
    encoder reads are cut, with a warning.
    """
    request = run.request
    texts = [(NEGATIVE, request.negative_prompt or ""), ("prompt", request.prompt)]
    if request.inpaint_faces:
        texts += [(FACE, prompt) for prompt in request.face_prompts]
    contexts: list[Floats] = []
    pooled: Floats | None = None
    for encoder, tokenizer in zip(request.model.encoders, tokenizers, strict=True):
        states = await _encode(run, encoder, tokenizer, texts)
        if "context" in states:
            contexts.append(states["context"])
        pooled = states.get("pooled", pooled)
    joined = np.concatenate(contexts, axis=-1)
    embeddings = [
        Embedding(context=context, pooled=None if pooled is None else pooled[index])
        for index, context in enumerate(joined)
    ]
    negative = embeddings[0]
    if request.negative_prompt is None and request.model.zero_empty_negative:
        negative = _zeros_like(negative)
    faces = tuple(embeddings[2:]) or (embeddings[1],)
    return Conditioning(negative=negative, prompt=embeddings[1], face_prompts=faces)


async def _encode(
    run: Run, encoder: TextEncoder, tokenizer: PromptTokenizer, texts: Sequence[tuple[str, str]]
) -> dict[str, Floats]:
    """Return an encoder's outputs for fields' texts: context (n, L, D), pooled (n, P).

    Long texts are cut, with a warning; a face prompt keeps the model's suffix.
    """
    if run.request.use_lpw:
        return await _encode_weighted(run, encoder, tokenizer, texts)
    suffix = run.request.model.face_prompt_suffix
    encoded = [
        tokenizer.encode(text, ending=suffix if field == FACE and text.endswith(suffix) else "")
        for field, text in texts
    ]
    for (field, _), tokens in zip(texts, encoded, strict=True):
        if tokens.truncated and _is_worth_telling(run, field):
            run.warn(
                f"{field} is {tokens.truncated} tokens longer than the {tokenizer.room} that "
                f"{encoder.name} reads; its end was cut."
            )
    return await _states(run, encoder, np.stack([tokens.ids for tokens in encoded]))


async def _encode_weighted(
    run: Run, encoder: TextEncoder, tokenizer: PromptTokenizer, texts: Sequence[tuple[str, str]]
) -> dict[str, Floats]:
    """The same for weighted prompts: chunks side by side along L, all texts of equal length.

    TensorRT plans take a number of chunks at most; what is longer is cut, with a warning.
    """
    limits = run.request.model.limits
    prompts = []
    for field, text in texts:
        prompt = encode_weighted(tokenizer, encoder.tokenizer, parse_weights(text))
        if limits is not None and len(prompt.ids) > limits.max_chunks:
            most = limits.max_chunks
            prompt = WeightedTokens(ids=prompt.ids[:most], weights=prompt.weights[:most])
            if _is_worth_telling(run, field):
                run.warn(
                    f"{field} is longer than {most} chunks of {tokenizer.room} tokens, which the "
                    f"engines of {run.request.model.name} take; its end was cut."
                )
        prompts.append(prompt)
    chunks = max(len(prompt.ids) for prompt in prompts)
    empty = encode_weighted(tokenizer, encoder.tokenizer, [])
    ids = [
        np.concatenate([prompt.ids, *[empty.ids] * (chunks - len(prompt.ids))])
        for prompt in prompts
    ]
    states = await _states(run, encoder, np.concatenate(ids))
    if "pooled" in states:
        states["pooled"] = states["pooled"][::chunks]  # of each prompt's first chunk
    if "context" in states:
        joined = states["context"].reshape(len(texts), -1, states["context"].shape[-1])
        states["context"] = np.stack(
            [
                apply_weights(context, _padded_weights(prompt.weights, joined.shape[1]))
                for context, prompt in zip(joined, prompts, strict=True)
            ]
        )
    return states


def _padded_weights(weights: Floats, length: int) -> Floats:
    padded = np.ones(length, np.float32)
    padded[: weights.size] = weights.ravel()
    return padded


async def _states(run: Run, encoder: TextEncoder, ids: Array) -> dict[str, Floats]:
    """Run an encoder on token ids (n, L); the first call of a request also takes its ticket."""
    answers = [
        await _some_states(run, encoder, ids[first : first + ENCODER_ROWS])
        for first in range(0, len(ids), ENCODER_ROWS)
    ]
    return {name: np.concatenate([one[name] for one in answers]) for name in encoder.outputs}


async def _some_states(run: Run, encoder: TextEncoder, ids: Array) -> dict[str, Floats]:
    """The same for as many rows as one call takes."""
    model = run.request.model
    if encoder.lora is None:
        if not run.ticket:
            await run.admit()
        name = model.encoder_model(encoder)
        return await run.infer_floats(name, {"input_ids": ids}, encoder.outputs)
    inputs = {"encoder": text_tensor(encoder.name), "input_ids": ids}
    wanted = [f"encoded_{output}" for output in encoder.outputs]
    if run.ticket:
        inputs |= {"operation": text_tensor(ENCODE), "ticket": np.array([run.ticket], np.int64)}
        answer = await run.infer(model.denoiser, inputs, wanted)
    else:
        answer = await run.admit(inputs, wanted)
    states = checked_floats(model.denoiser, answer, wanted)
    return {name.removeprefix("encoded_"): array for name, array in states.items()}


def _is_worth_telling(run: Run, field: str) -> bool:
    request = run.request
    if field == NEGATIVE:
        return is_guided(run)
    usual = request.prompt + request.model.face_prompt_suffix
    return field != FACE or request.face_prompts != (usual,)


def is_guided(run: Run) -> bool:
    """Whether the request uses classifier-free guidance: two network rows a sequence."""
    return run.request.model.facts.negative_prompt and run.request.cfg_scale > 1


def _zeros_like(embedding: Embedding) -> Embedding:
    pooled = embedding.pooled
    return Embedding(
        context=np.zeros_like(embedding.context),
        pooled=None if pooled is None else np.zeros_like(pooled),
    )
