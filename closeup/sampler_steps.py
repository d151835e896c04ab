"""Samplers as linear maps: one step of each, written as its paper writes it.

Every algorithm here is an expression over five symbols: the sample x, the network's output, two
memories and a draw of noise. The symbols are the unit vectors of R^5, so evaluating the expression
yields its coefficients: one row of a step matrix. Memory 0 receives the denoised estimate at every
step of every sampler here (previews read it), memory 1 what memory 0 held before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, cast

import numpy as np

from closeup.sampler_options import SchedulerOptions
from closeup.sampler_schedules import Schedule
from closeup.sampler_spacings import Floats

X, EPS, M0, M1, NOISE = cast("list[Floats]", list(np.eye(5)))
"""The symbols: sample, raw network output (after guidance), memories, standard normal noise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One step of a sampler.

    Attributes:
        rows: (3, 5) float64, rows next sample, memory 0, memory 1; columns as the symbols.
        draws_noise: whether the reference draws noise at this step, even if it then ignores it.
    """

    rows: Floats
    draws_noise: bool


class StepFunction(Protocol):
    """The one signature of every algorithm."""

    def __call__(
        self, schedule: Schedule, i: int, history: int, options: SchedulerOptions, /
    ) -> Step:
        """Computes one step.

        Args:
            schedule: the whole run.
            i: index of the step in the schedule.
            history: steps already done in this run, which is less than i in image-to-image.
            options: resolved options of the sampler.
        """


def _step(next_sample: Floats, denoised: Floats, *, draws_noise: bool = False) -> Step:
    return Step(rows=np.stack([next_sample, denoised, M0]), draws_noise=draws_noise)


def predict_denoised(schedule: Schedule, i: int, prediction_type: str) -> Floats:
    """The estimate of x0 from the sample and the network's output.

    Args:
        schedule: gives the level and the input scale of step i.
        i: index of the step.
        prediction_type: ``epsilon``, ``v_prediction`` (Salimans and Ho 2022, arXiv 2202.00512,
            appendix D), ``flow_prediction`` (Liu et al. 2022, arXiv 2209.03003: the network
            predicts noise - x0) or ``sample``.

    Returns:
        (5,) float64 coefficients.
    """
    scale = float(schedule.input_scale[i])
    x = scale * X
    alpha, sigma = (scale * level for level in schedule.seen_level(i))
    if prediction_type == "epsilon":
        return (x - sigma * EPS) / alpha
    if prediction_type == "flow_prediction":
        return x - sigma * EPS
    if prediction_type == "v_prediction":
        return alpha * x - sigma * EPS
    return EPS


def predict_noise(schedule: Schedule, i: int, prediction_type: str) -> Floats:
    """The estimate of the noise in a variance-preserving sample, (5,) coefficients."""
    alpha, sigma = schedule.level(i)
    if prediction_type == "epsilon":
        return EPS
    if prediction_type == "v_prediction":
        return alpha * EPS + sigma * X
    return (X - alpha * EPS) / sigma


def step_euler(schedule: Schedule, i: int, history: int, options: SchedulerOptions) -> Step:
    """Euler's method on the probability-flow ODE.

    Source: Karras et al. 2022 (arXiv 2206.00364), algorithm 2 without churn; diffusers
    EulerDiscreteScheduler.
    """
    (_, sigma), (_, sigma_next) = schedule.level(i), schedule.target(i)
    denoised = predict_denoised(schedule, i, options.prediction_type)
    d = (X - denoised) / sigma
    return _step(X + d * (sigma_next - sigma), denoised)


def step_euler_ancestral(
    schedule: Schedule, i: int, history: int, options: SchedulerOptions
) -> Step:
    """Euler's method to a lower noise level, and fresh noise up again.

    Source: k-diffusion ``sample_euler_ancestral`` with eta = 1; diffusers
    EulerAncestralDiscreteScheduler.
    """
    (_, sigma), (_, sigma_next) = schedule.level(i), schedule.target(i)
    denoised = predict_denoised(schedule, i, options.prediction_type)
    sigma_up = sigma_next * np.sqrt(sigma**2 - sigma_next**2) / sigma
    sigma_down = np.sqrt(sigma_next**2 - sigma_up**2)
    d = (X - denoised) / sigma
    return _step(X + d * (sigma_down - sigma) + sigma_up * NOISE, denoised, draws_noise=True)


def _choose_order(schedule: Schedule, i: int, history: int, options: SchedulerOptions) -> int:
    """Order of a DPM-Solver step: short histories and the run's end lower it."""
    n = len(schedule.timesteps)
    few = options.lower_order_final and n < 15
    ends_low = options.euler_at_final or few or options.final_sigmas_type == "zero"
    if i == n - 1 and ends_low:
        return 1
    order = min(options.solver_order, history + 1)
    return min(order, 2) if i == n - 2 and few else order


def step_dpm_multistep(schedule: Schedule, i: int, history: int, options: SchedulerOptions) -> Step:
    """DPM-Solver++ multistep of order 1 to 3, as an ODE or as an SDE.

    With H = h for the ODE and H = 2h for the SDE both are
    ``x_t = σ_t/σ_s e^(h-H) x + α_t (1 - e^-H) D0 + correction(D1, D2) + noise``.

    Source: Lu et al. 2022 (arXiv 2211.01095), algorithm 2 and appendix; for the SDE its section 5
    and diffusers DPMSolverMultistepScheduler.
    """
    stochastic = options.algorithm_type == "sde-dpmsolver++"
    m0 = predict_denoised(schedule, i, options.prediction_type)
    alpha_t, sigma_t = schedule.target(i)
    alpha_s, sigma_s = schedule.level(i)
    with np.errstate(divide="ignore"):  # lambda of a clean sample is infinite, exp(-inf) is right
        h = np.log(alpha_t) - np.log(sigma_t) - np.log(alpha_s / sigma_s)
    H = 2 * h if stochastic else h  # noqa: N806 - the docstring's symbol
    x_t = sigma_t / sigma_s * (np.exp(-h) if stochastic else 1.0) * X
    x_t = x_t - alpha_t * np.expm1(-H) * m0
    order = _choose_order(schedule, i, history, options)
    if order > 1:
        x_t = x_t + alpha_t * _correction(schedule, i, order, m0, h, H, options)
    if stochastic:
        # Between two equal levels h is 0, or by rounding a little below.
        x_t = x_t + sigma_t * np.sqrt(max(0.0, -np.expm1(-2 * h))) * NOISE
    return _step(x_t, m0, draws_noise=stochastic)


def _correction(
    schedule: Schedule,
    i: int,
    order: int,
    m0: Floats,
    h: float,
    H: float,  # noqa: N803 - the caller's symbol
    options: SchedulerOptions,
) -> Floats:
    """The terms of D1 and D2 over α_t, (5,) coefficients; the memories hold m1 and m2."""
    lam = [float(np.log(a / b)) for a, b in schedule.levels[i - order + 1 : i + 1]][::-1]
    d1_0 = h / (lam[0] - lam[1]) * (m0 - M0)
    heun = np.expm1(-H) / H + 1
    if order == 2:
        factor = heun if options.solver_type == "heun" else -0.5 * np.expm1(-H)
        second: Floats = factor * d1_0
        return second
    r0, r1 = (lam[0] - lam[1]) / h, (lam[1] - lam[2]) / h
    d1_1 = (M0 - M1) / r1
    d1 = d1_0 + r0 / (r0 + r1) * (d1_0 - d1_1)
    d2 = (d1_0 - d1_1) / (r0 + r1)
    # The reference's SDE form subtracts the half that its ODE form adds.
    half = -0.5 if options.algorithm_type == "sde-dpmsolver++" else 0.5
    third: Floats = heun * d1 + ((-np.expm1(-H) - H) / H**2 + half) * d2
    return third


def step_lcm(schedule: Schedule, i: int, history: int, options: SchedulerOptions) -> Step:
    """Latent consistency model: jump to x0, then noise to the next timestep.

    Source: Luo et al. 2023 (arXiv 2310.04378), algorithm 3; diffusers LCMScheduler.
    """
    sigma_data = 0.5
    t = schedule.timesteps[i] * options.timestep_scaling
    c_skip = sigma_data**2 / (t**2 + sigma_data**2)
    c_out = t / np.sqrt(t**2 + sigma_data**2)
    denoised = c_out * predict_denoised(schedule, i, options.prediction_type) + c_skip * X
    if i == len(schedule.timesteps) - 1:
        return _step(denoised, denoised)
    alpha_t, sigma_t = schedule.target(i)
    return _step(alpha_t * denoised + sigma_t * NOISE, denoised, draws_noise=True)


def step_ddim(schedule: Schedule, i: int, history: int, options: SchedulerOptions) -> Step:
    """DDIM without noise; also TCD with γ = 0, which differs in its schedule only.

    Source: Song et al. 2020 (arXiv 2010.02502), eq. 12 with σ = 0, diffusers DDIMScheduler; Zheng
    et al. 2024 (arXiv 2402.19159), diffusers TCDScheduler with eta = 0, as the pipelines pass it.
    """
    alpha_t, sigma_t = schedule.target(i)
    denoised = predict_denoised(schedule, i, options.prediction_type)
    noise_pred = predict_noise(schedule, i, options.prediction_type)
    return _step(alpha_t * denoised + sigma_t * noise_pred, denoised)
