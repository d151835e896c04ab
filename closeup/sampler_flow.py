"""Flow matching: noise levels of FLUX, shifted by the picture's size, and its Euler step.

A sample is ``(1 - sigma) * x0 + sigma * noise`` and the network predicts ``noise - x0``.

Source: Esser et al. 2024 (arXiv 2403.03206), section 5.3.2 for the shift; diffusers 0.39,
FluxPipeline and the scheduler that each builder names.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from closeup.sampler_midpoints import repeat_inner
from closeup.sampler_options import SchedulerOptions
from closeup.sampler_schedules import Schedule, close_sigmas
from closeup.sampler_spacings import Floats, Singles, space_sigmas
from closeup.sampler_steps import EPS, M0, Step, X, predict_denoised


def resolve_shift(options: SchedulerOptions, image_tokens: int | None) -> SchedulerOptions:
    """Replaces a resolution-dependent shift by the one of a picture.

    Args:
        options: resolved options.
        image_tokens: length of the packed latents' sequence, (width / 16) * (height / 16) pixels.

    Returns:
        Options whose ``shift`` is mu, the logarithm of the shift where it is exponential.

    Raises:
        ValueError: the model's shift depends on the picture and no length was given.
    """
    if not options.use_dynamic_shifting:
        return options
    if image_tokens is None:
        raise ValueError("This model's noise levels depend on the picture's size: image_tokens.")
    slope = (options.max_shift - options.base_shift) / (
        options.max_image_seq_len - options.base_image_seq_len
    )
    mu = image_tokens * slope + options.base_shift - slope * options.base_image_seq_len
    return replace(options, shift=mu)


def _shift_sigmas(sigmas: Singles, options: SchedulerOptions) -> Singles:
    """In float32, as the reference computes it."""
    shift = options.shift
    if options.use_dynamic_shifting:
        weight = math.exp(shift) if options.time_shift_type == "exponential" else shift
        shifted: Singles = weight / (weight + (1 / sigmas - 1))
    else:
        shifted = shift * sigmas / (1 + (shift - 1) * sigmas)
    if options.shift_terminal:
        rest = 1 - shifted
        shifted = 1 - rest / (rest[-1] / (1 - options.shift_terminal))
    return shifted


def _build(sigmas: Floats, timesteps: Floats, *, order: int = 1) -> Schedule:
    levels = np.stack([1 - sigmas, sigmas], 1)
    return Schedule(
        timesteps=timesteps,
        levels=levels,
        targets=levels[1:],
        input_scale=np.ones(len(timesteps)),
        init_noise_sigma=1.0,
        order=order,
        counts_up=True,
    )


def build_flow_euler_schedule(options: SchedulerOptions, n: int) -> Schedule:
    """Schedule of FlowMatchEulerDiscreteScheduler as FluxPipeline sets it.

    Args:
        options: resolved options, after :func:`resolve_shift`.
        n: inference steps, at least 1.

    Returns:
        A schedule whose levels are (1 - sigma, sigma) and whose timesteps are those of the
        scheduler, 0 to ``num_train_timesteps``.
    """
    shifted = _shift_sigmas(np.linspace(1, 1 / n, n).astype(np.float32), options)
    spaced = space_sigmas(shifted, options, n)
    sigmas = (shifted if spaced is None else spaced).astype(np.float32)
    timesteps = sigmas * np.float32(options.num_train_timesteps)
    return _build(close_sigmas(sigmas.astype(np.float64), 0.0), timesteps.astype(np.float64))


def build_flow_heun_schedule(options: SchedulerOptions, n: int) -> Schedule:
    """Schedule of FlowMatchHeunDiscreteScheduler: 2 n - 1 network calls.

    That scheduler knows no resolution-dependent shift, and applies the fixed one to its range and
    once more to the levels within. Arguments and result as build_flow_euler_schedule.
    """
    last, shift = options.num_train_timesteps, options.shift
    ends = np.array([last, 1], np.float32) / np.float32(last)
    ends = shift * ends / (1 + (shift - 1) * ends)
    even = np.linspace(float(ends[0]) * last, float(ends[1]) * last, n) / last
    sigmas = (shift * even / (1 + (shift - 1) * even)).astype(np.float32)
    timesteps = (sigmas * np.float32(last)).astype(np.float64)
    levels = repeat_inner(close_sigmas(sigmas.astype(np.float64), 0.0), ends=1)
    return _build(levels, repeat_inner(timesteps, ends=0), order=2)


def build_flow_dpm_schedule(options: SchedulerOptions, n: int) -> Schedule:
    """Schedule of DPMSolverMultistepScheduler with ``use_flow_sigmas``: whole timesteps.

    Arguments and result as build_flow_euler_schedule.
    """
    last = options.num_train_timesteps
    shift = options.shift
    if options.use_dynamic_shifting and options.time_shift_type == "exponential":
        shift = float(np.exp(shift))
    even = 1.0 - np.linspace(1, 1 / last, n + 1)
    sigmas = (shift * even / (1 + (shift - 1) * even))[::-1][:-1]
    return _build(close_sigmas(sigmas, 0.0), np.trunc(sigmas * last))


def step_flow_euler(schedule: Schedule, i: int, history: int, options: SchedulerOptions) -> Step:
    """Euler's method along the predicted velocity.

    Source: Liu et al. 2022 (arXiv 2209.03003), eq. 1; diffusers FlowMatchEulerDiscreteScheduler.
    """
    (_, sigma), (_, sigma_next) = schedule.level(i), schedule.target(i)
    denoised = predict_denoised(schedule, i, options.prediction_type)
    rows = np.stack([X + (sigma_next - sigma) * EPS, denoised, M0])
    return Step(rows=rows, draws_noise=False)
