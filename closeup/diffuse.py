"""Pictures to latents and back, and the denoising of one sequence."""

from __future__ import annotations

import numpy as np

from closeup.conditioning import Guide
from closeup.images import encode_image, pixels_from_floats, resize
from closeup.noise import TorchNormal
from closeup.request import Request
from closeup.run import SEGMENT_S, Array, Floats, Run, text_tensor
from closeup.samplers import StepTable, recall_step_table
from closeup.segments import SEGMENT

SEGMENT_OUTPUTS = ("next_sample", "next_memory", "steps_done")
PREVIEW_SIDE_PX = 256
# The encoder's log-variance is clamped to this range before it is used.
# Source: diffusers, models/autoencoders/vae.py, DiagonalGaussianDistribution.
LOGVAR_RANGE = (-30.0, 20.0)


def step_table(
    request: Request,
    *,
    height: int,
    width: int,
    strength: float | None = None,
    steps: int | None = None,
) -> StepTable:
    """Return the steps of a picture of this size, px; see `closeup.samplers.recall_step_table`.

    ``steps`` is the length of the schedule; None for the request's.
    """
    packed = request.model.facts.size_step_px
    return recall_step_table(
        request.scheduler,
        request.model.scheduler,
        request.steps if steps is None else steps,
        strength=strength,
        image_tokens=(height // packed) * (width // packed) if request.model.facts.flow else None,
    )


def latent_shape(request: Request, height: int, width: int) -> tuple[int, int, int]:
    """Return (C, h, w) of a picture's latents."""
    scale = request.model.vae_scale_factor
    return request.model.facts.latent_channels, height // scale, width // scale


async def encode_picture(run: Run, picture: Floats) -> tuple[Floats, Floats]:
    """Return the VAE's mean and standard deviation of a picture, unscaled.

    Args:
        run: the request.
        picture: (H, W, 3) in [0, 1].

    Returns:
        mean, std: each (C, H/8, W/8) float32.
    """
    pixels = np.ascontiguousarray((picture * 2 - 1).transpose(2, 0, 1)[None], np.float32)
    encoder = run.request.model.vae_encoder
    answer = await run.infer_floats(encoder, {"image": pixels}, ["moments"])
    moments = answer["moments"]
    mean, logvar = np.split(moments[0], 2)
    return mean, np.exp(np.float32(0.5) * np.clip(logvar, *LOGVAR_RANGE))


def sample_posterior(run: Run, moments: tuple[Floats, Floats], stream: TorchNormal) -> Floats:
    """Draw latents from a picture's moments, in the denoiser's scale."""
    mean, std = moments
    model = run.request.model
    latents = mean + std * stream.randn(mean.shape)
    return np.asarray((latents - model.shift_factor) * model.scaling_factor, np.float32)


async def decode_latents(run: Run, latents: Floats) -> Floats:
    """Return the picture (H, W, 3) in [0, 1] of denoised latents (C, h, w)."""
    decoder = run.request.model.vae_decoder
    answer = await run.infer_floats(decoder, {"latents": latents[None]}, ["image"])
    images = answer["image"]
    picture = images[0].transpose(1, 2, 0)
    clipped: Floats = np.clip(picture * np.float32(0.5) + np.float32(0.5), 0, 1)
    return clipped


async def denoise(
    run: Run,
    *,
    sample: Floats,
    guide: Guide,
    table: StepTable,
    stream: TorchNormal,
    image: int,
    mask: Floats | None = None,
    known: Floats | None = None,
    known_noise: Floats | None = None,
) -> Floats:
    """Run all steps of a table on one sequence, segment by segment.

    Args:
        run: the request; its current stage is advanced by each step.
        sample: (C, h, w) starting latents in the sampler's space.
        guide: what it is conditioned on.
        table: K steps.
        stream: where the stochastic steps' noise is drawn from.
        image: index of the picture, for progress.
        mask: (1 or K, 1, h, w); 1 is repainted.
        known: (C, h, w) what stays elsewhere; needed with a mask.
        known_noise: (C, h, w) its noise.

    Returns:
        Denoised latents (C, h, w).

    Raises:
        RequestCancelled, DeadlineError: between segments.
        ModelError: the latents are no longer finite.
    """
    fixed = {"context": guide.context, **guide.extras}
    if mask is not None and known is not None and known_noise is not None:
        fixed |= {"known": known, "known_noise": known_noise}
    if run.segment_steps is None:
        fixed["budget_s"] = np.array([SEGMENT_S], np.float32)
    first, total = 0, len(table.timesteps)
    step_bytes = sample.nbytes * bool(table.draws_noise.any())
    step_bytes += 0 if mask is None else mask[0].nbytes
    state: dict[str, Array] = {"sample": sample}  # the sampler's memory starts as zeros
    drawn = np.zeros((0, *sample.shape), np.float32)  # noise of the steps from `first` on
    while first < total:
        part = slice(first, min(first + run.segment_length(step_bytes), total))
        missing = table.draws_noise[first + len(drawn) : part.stop]
        drawn = np.concatenate([drawn, _draw_noise(missing, sample.shape, stream)])
        inputs = {
            "operation": text_tensor(SEGMENT),
            "ticket": np.array([run.ticket], np.int64),
            **state,
            **fixed,
            **_table_inputs(run, table, part, mask),
        }
        if table.draws_noise[part].any():
            inputs["noise"] = drawn
        answer = await run.infer(run.request.model.denoiser, inputs, SEGMENT_OUTPUTS)
        state = {"sample": answer["next_sample"], "memory": answer["next_memory"]}
        steps = int(answer["steps_done"][0])
        first, drawn = first + steps, drawn[steps:]
        run.count("denoiser_steps", steps)
        estimate = state["memory"][0] if table.denoised_in_memory else state["sample"]
        run.advance(steps, image=image, preview=await _preview(run, estimate))
    return state["sample"]


def _table_inputs(run: Run, table: StepTable, part: slice, mask: Floats | None) -> dict[str, Array]:
    """Return the segment's inputs that differ from step to step."""
    inputs: dict[str, Array] = {
        "guidance": np.array([run.request.cfg_scale], np.float32),
        "timestep": table.timesteps[part],
        "input_scale": table.input_scale[part],
        "step": table.step[part],
    }
    if mask is not None:
        inputs["mask"] = mask[part] if len(mask) > 1 else mask
        inputs["known_step"] = table.known_step[part]
    return inputs


def _draw_noise(draws: Array, shape: tuple[int, ...], stream: TorchNormal) -> Floats:
    drawn = stream.randn_each(int(draws.sum()), shape)
    if len(drawn) == len(draws):
        return drawn
    noise = np.zeros((len(draws), *shape), np.float32)
    noise[np.flatnonzero(draws)] = drawn
    return noise


async def _preview(run: Run, denoised: Floats) -> bytes | None:
    if not run.request.previews:
        return None
    picture = await decode_latents(run, denoised)
    shrink = PREVIEW_SIDE_PX / max(picture.shape[:2])
    if shrink < 1:
        height, width = (max(1, round(side * shrink)) for side in picture.shape[:2])
        picture = resize(picture, (height, width))
    return encode_image(pixels_from_floats(picture), format="jpeg", quality=80, metadata={})
