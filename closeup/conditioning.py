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
    """The request's prompts, encoded.

    Attributes:
        negatives: the negative prompt at each of the lengths L that the others have.
        prompt: of the picture.
        face_prompts: one for all faces, or one a repainted face; equal ones are one object.
    """

    negatives: Mapping[int, Embedding]
    prompt: Embedding
    face_prompts: tuple[Embedding, ...]

    def face_guides(self, run: Run, *, side: int, faces: int) -> list[Guide]:
        """Return `guide` of the face prompts, for squares of ``side`` px.

        Args:
            run: the request.
            side: of the squares, px.
            faces: how many faces are repainted in a picture at most; no more guides than that.
        """
        made: dict[int, Guide] = {}
        for prompt in self.face_prompts[:faces]:
            if id(prompt) not in made:
                made[id(prompt)] = self._guide(run, prompt, height=side, width=side, given={})
        return [made[id(prompt)] for prompt in self.face_prompts[:faces]]

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
        rows = [self.negatives[len(prompt.context)], prompt] if is_guided(run) else [prompt]
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


@dataclass(frozen=True, kw_only=True, slots=True)
class _Encoded:
    """What one encoder makes of several texts.

    Attributes:
        contexts: of each text (L, D) float32, all of its chunks; empty where the encoder gives
            none.
        weights: of each text (L,) float32; None for plain prompts.
        empty: context of a chunk without words, (L, D) float32; None for plain prompts.
        pooled: (n, P) float32; None where the encoder gives none.
    """

    contexts: Sequence[Floats]
    weights: Sequence[Floats] | None = None
    empty: Floats | None = None
    pooled: Floats | None = None

    def at(self, index: int, length: int) -> Floats:
        """The context of a text, weighted, with empty chunks until it has ``length`` rows.

        Weights come last, since they keep the mean of the whole.
        """
        context = self.contexts[index]
        if self.weights is None or self.empty is None:
            return context
        missing = (length - len(context)) // len(self.empty)
        return apply_weights(
            np.concatenate([context, *[self.empty] * missing]),
            _padded_weights(self.weights[index], length),
        )


async def encode_prompts(run: Run, tokenizers: Sequence[PromptTokenizer]) -> Conditioning:
    """Encode the negative prompt, the prompt and the face prompts.

    The first call takes the request's ticket, so nothing runs without one. Plain prompts longer
    than an encoder reads are cut, with a warning. Of weighted ones each is brought to the length
    of the negative prompt beside it, or that to its: what other prompts there are changes nothing.
    """
    request = run.request
    texts = [(NEGATIVE, request.negative_prompt or ""), ("prompt", request.prompt)]
    faces = list(dict.fromkeys(request.face_prompts)) if request.inpaint_faces else []
    texts += [(FACE, prompt) for prompt in faces]
    encoded = [
        await _encode(run, encoder, tokenizer, texts)
        for encoder, tokenizer in zip(request.model.encoders, tokenizers, strict=True)
    ]
    sources = [one for one in encoded if one.contexts]
    pooled = next((one.pooled for one in reversed(encoded) if one.pooled is not None), None)

    def embedding(index: int, length: int) -> Embedding:
        return Embedding(
            context=np.concatenate([one.at(index, length) for one in sources], axis=-1),
            pooled=None if pooled is None else pooled[index],
        )

    lengths = [max(len(one.contexts[i]) for one in sources) for i in range(len(texts))]
    if is_guided(run):
        lengths = [max(length, lengths[0]) for length in lengths]
    prompts = [embedding(index, lengths[index]) for index in range(1, len(texts))]
    negatives = (
        {length: embedding(0, length) for length in set(lengths[1:])} if is_guided(run) else {}
    )
    if request.negative_prompt is None and request.model.zero_empty_negative:
        negatives = {length: _zeros_like(one) for length, one in negatives.items()}
    by_text = dict(zip(faces, prompts[1:], strict=True))
    face_prompts = [by_text[text] for text in request.face_prompts] if faces else [prompts[0]]
    return Conditioning(negatives=negatives, prompt=prompts[0], face_prompts=tuple(face_prompts))


async def _encode(
    run: Run, encoder: TextEncoder, tokenizer: PromptTokenizer, texts: Sequence[tuple[str, str]]
) -> _Encoded:
    """Encode fields' texts. Long ones are cut, with a warning; a face prompt keeps the suffix."""
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
    states = await _states(run, encoder, np.stack([tokens.ids for tokens in encoded]))
    return _Encoded(contexts=list(states.get("context", ())), pooled=states.get("pooled"))


async def _encode_weighted(
    run: Run, encoder: TextEncoder, tokenizer: PromptTokenizer, texts: Sequence[tuple[str, str]]
) -> _Encoded:
    """The same for weighted prompts: chunks side by side along L.

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
    empty = encode_weighted(tokenizer, encoder.tokenizer, [])
    rows = [*(prompt.ids for prompt in prompts), empty.ids]
    states = await _states(run, encoder, np.concatenate(rows))
    stops = np.cumsum([len(ids) for ids in rows])
    starts = [0, *stops[:-2]]
    contexts: list[Floats] = []
    if "context" in states:
        *contexts, nothing = (
            chunks.reshape(-1, chunks.shape[-1])
            for chunks in np.split(states["context"], stops[:-1])
        )
    return _Encoded(
        contexts=contexts,
        weights=[prompt.weights.ravel() for prompt in prompts],
        empty=nothing if contexts else None,
        # Of each prompt's first chunk.
        pooled=states["pooled"][starts] if "pooled" in states else None,
    )


def _padded_weights(weights: Floats, length: int) -> Floats:
    padded = np.ones(length, np.float32)
    padded[: len(weights)] = weights
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
