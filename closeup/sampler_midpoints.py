"""Second-order samplers that call the network twice for a step: Heun, DPM2, DPM2 a, DPM++ 2S.

Each table row is one network call. The first call of a pair moves to a second point and remembers
the sample it came from in memory 1; the second call takes the step from there. The last step of a
run that ends at zero noise is a single call.
"""

from __future__ import annotations

import numpy as np

from closeup.sampler_options import SchedulerOptions
from closeup.sampler_schedules import (
    Schedule,
    close_sigmas,
    exploding_levels,
    exploding_noise,
    space_exploding,
    training_sigmas,
)
from closeup.sampler_spacings import Floats, timesteps_from_sigmas
from closeup.sampler_steps import M0, M1, NOISE, Step, X, predict_denoised


def repeat_inner(values: Floats, *, ends: int) -> Floats:
    """Repeats all but the first value and the last ``ends``, which stand alone."""
    stop = len(values) - ends
    return np.concatenate([values[:1], np.repeat(values[1:stop], 2), values[stop:]])


def build_heun_schedule(options: SchedulerOptions, n: int) -> Schedule:
    """Schedule of Heun's method: 2 n - 1 network calls.

    Args:
        options: resolved options.
        n: inference steps, at least 1.

    Returns:
        A schedule whose levels are (1, sigma).
    """
    sigmas, timesteps = space_exploding(options, n, training_sigmas(options))
    levels = exploding_levels(repeat_inner(close_sigmas(sigmas, 0.0), ends=1))
    return Schedule(
        timesteps=repeat_inner(timesteps, ends=0),
        levels=levels,
        targets=levels[1:],
        input_scale=1 / np.sqrt(levels[:-1, 1] ** 2 + 1),
        init_noise_sigma=exploding_noise(options, levels[:, 1]),
        order=2,
    )


def build_dpm2_schedule(options: SchedulerOptions, n: int) -> Schedule:
    """Schedule of DPM2, whose midpoints halve each step in log sigma: 2 n - 1 network calls.

    Args:
        options: resolved options.
        n: inference steps, at least 1.

    Returns:
        A schedule whose levels are (1, sigma); a midpoint has the level of the step's end, as
        which the reference composites it, and its own level in ``seen``.
    """
    training = training_sigmas(options)
    sigmas, timesteps = space_exploding(options, n, training)
    sigmas = close_sigmas(sigmas, 0.0)
    midpoints = np.sqrt(sigmas[1:-1] * sigmas[:-2])
    return _build_midpoints(options, sigmas, timesteps, midpoints)


def build_dpm2_ancestral_schedule(options: SchedulerOptions, n: int) -> Schedule:
    """Schedule of DPM2 a: midpoints towards the lower level before the noise; else as DPM2's."""
    training = training_sigmas(options)
    sigmas, timesteps = space_exploding(options, n, training)
    sigmas = close_sigmas(sigmas, 0.0)
    down = [split_ancestral(s, t)[0] for s, t in zip(sigmas[:-2], sigmas[1:-1], strict=True)]
    return _build_midpoints(options, sigmas, timesteps, np.sqrt(sigmas[:-2] * np.array(down)))


def _build_midpoints(
    options: SchedulerOptions, sigmas: Floats, timesteps: Floats, midpoints: Floats
) -> Schedule:
    """Interleaves n sigmas, their timesteps and n - 1 midpoints."""
    if options.use_karras_sigmas:
        timesteps = timesteps.round()
    log_sigmas = np.log(training_sigmas(options))
    n = len(timesteps)
    calls = np.empty(2 * n - 1)
    calls[::2], calls[1::2] = timesteps, timesteps_from_sigmas(midpoints, log_sigmas)
    seen = np.empty(2 * n - 1)
    seen[::2], seen[1::2] = sigmas[:-1], midpoints
    levels = exploding_levels(repeat_inner(sigmas, ends=1))
    return Schedule(
        timesteps=calls,
        levels=levels,
        targets=levels[1:],
        input_scale=1 / np.sqrt(seen**2 + 1),
        init_noise_sigma=exploding_noise(options, sigmas),
        order=2,
        seen=exploding_levels(seen),
    )


def split_ancestral(sigma: float, sigma_next: float) -> tuple[float, float]:
    """The level that an ancestral step goes down to, and the noise that takes it up again.

    The reference gets the lower level as a difference in float32, which has few correct digits on
    long steps; this is the same in closed form.
    """
    sigma_up = sigma_next * np.sqrt(sigma**2 - sigma_next**2) / sigma
    return sigma_next**2 / sigma, float(sigma_up)


def step_heun(schedule: Schedule, i: int, history: int, options: SchedulerOptions) -> Step:
    """Heun's method on the probability-flow ODE, of variance-exploding and of flow samples.

    Source: Karras et al. 2022 (arXiv 2206.00364), algorithm 1; diffusers HeunDiscreteScheduler
    and FlowMatchHeunDiscreteScheduler.
    """
    denoised = predict_denoised(schedule, i, options.prediction_type)
    (_, sigma), (_, sigma_next) = schedule.level(i), schedule.target(i)
    d = (X - denoised) / sigma
    if history % 2 == 0:
        return _remember(X + d * (sigma_next - sigma), denoised)
    (_, sigma_first) = schedule.level(i - 1)
    d_first = (M1 - M0) / sigma_first
    return _remember(M1 + (sigma - sigma_first) * (d_first + d) / 2, denoised)


def step_dpm2(schedule: Schedule, i: int, history: int, options: SchedulerOptions) -> Step:
    """DPM-Solver-2: the derivative at the midpoint takes the whole step.

    Source: Lu et al. 2022 (arXiv 2206.00927), algorithm 1; diffusers KDPM2DiscreteScheduler.
    """
    denoised = predict_denoised(schedule, i, options.prediction_type)
    (_, sigma) = schedule.seen_level(i)
    d = (X - denoised) / sigma
    if history % 2 == 0:
        return _remember(X + d * (_midpoint(schedule, i) - sigma), denoised)
    (_, sigma_first), (_, sigma_next) = schedule.level(i - 1), schedule.level(i)
    return _remember(M1 + d * (sigma_next - sigma_first), denoised)


def step_dpm2_ancestral(
    schedule: Schedule, i: int, history: int, options: SchedulerOptions
) -> Step:
    """DPM-Solver-2 to a lower noise level, and fresh noise up again.

    Source: k-diffusion ``sample_dpm_2_ancestral`` with eta = 1; diffusers
    KDPM2AncestralDiscreteScheduler.
    """
    if history % 2 == 0:
        return step_dpm2(schedule, i, history, options)
    denoised = predict_denoised(schedule, i, options.prediction_type)
    (_, sigma) = schedule.seen_level(i)
    d = (X - denoised) / sigma
    (_, sigma_first), (_, sigma_next) = schedule.level(i - 1), schedule.level(i)
    sigma_down, sigma_up = split_ancestral(sigma_first, sigma_next)
    x_t = M1 + d * (sigma_down - sigma_first) + sigma_up * NOISE
    return _remember(x_t, denoised, draws_noise=True)


def _midpoint(schedule: Schedule, i: int) -> float:
    """Sigma of the second call; the last step has none and goes all the way."""
    return schedule.seen_level(i + 1)[1] if i + 1 < len(schedule.timesteps) else 0.0


def _remember(next_sample: Floats, denoised: Floats, *, draws_noise: bool = False) -> Step:
    """Memory 1 is the sample that entered, from which the second call steps."""
    return Step(rows=np.stack([next_sample, denoised, X]), draws_noise=draws_noise)


def step_dpm_singlestep(
    schedule: Schedule, i: int, history: int, options: SchedulerOptions
) -> Step:
    """DPM-Solver++ singlestep of order 2: odd steps start again from where even ones started.

    diffusers counts each of its network calls as a step.

    Source: Lu et al. 2022 (arXiv 2211.01095), algorithm 1; diffusers
    DPMSolverSinglestepScheduler.
    """
    m0 = predict_denoised(schedule, i, options.prediction_type)
    second = _is_second(schedule, i, history, options)
    start = i - 1 if second else i
    (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule.target(i), schedule.level(start)
    lambda_s = np.log(alpha_s / sigma_s)
    with np.errstate(divide="ignore"):  # lambda of a clean sample is infinite, exp(-inf) is right
        h = np.log(alpha_t) - np.log(sigma_t) - lambda_s
    scale = -alpha_t * np.expm1(-h)
    if not second:
        return _remember(sigma_t / sigma_s * X + scale * m0, m0)
    (alpha_m, sigma_m) = schedule.level(i)
    d1 = h / (np.log(alpha_m / sigma_m) - lambda_s) * (m0 - M0)
    heun = options.solver_type == "heun"
    factor = alpha_t * (np.expm1(-h) / h + 1) if heun else 0.5 * scale
    return _remember(sigma_t / sigma_s * M1 + scale * M0 + factor * d1, m0)


def _is_second(schedule: Schedule, i: int, history: int, options: SchedulerOptions) -> bool:
    """Odd steps are second; not a run's first, nor the last where the end is of lower order."""
    n = len(schedule.timesteps)
    ends_low = options.lower_order_final or n % 2 == 1 or options.final_sigmas_type == "zero"
    return i % 2 == 1 and history > 0 and not (i == n - 1 and ends_low)
