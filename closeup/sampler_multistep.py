"""UniPC and DEIS as linear maps: solvers that look back at earlier steps.

A solver that needs more of its past than the two memories hold is still a table when the next step
needs only a weighted sum of that past: the weights are known before the run, so the sum itself is
what is remembered.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from closeup.sampler_options import SchedulerOptions
from closeup.sampler_schedules import Schedule
from closeup.sampler_spacings import Floats
from closeup.sampler_steps import M0, M1, Step, X, predict_denoised, predict_noise


def _log_snr(level: tuple[float, float]) -> float:
    alpha, sigma = level
    with np.errstate(divide="ignore"):  # infinite for a clean sample, and exp(-inf) is right
        return float(np.log(alpha) - np.log(sigma))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Update:
    """One update of UniPC, from a level to the next: its numbers in the paper's symbols."""

    sigma_ratio: float
    alpha_t: float
    h_phi_1: float
    B_h: float  # noqa: N815
    r: float
    b: tuple[float, float]


def _unipc_update(schedule: Schedule, i: int, options: SchedulerOptions) -> _Update:
    """The update that step i starts; ``r`` is about the level before it, 0 where there is none."""
    (alpha_t, sigma_t), (_, sigma_s) = schedule.target(i), schedule.level(i)
    lambda_s = _log_snr(schedule.level(i))
    h = _log_snr(schedule.target(i)) - lambda_s
    h_phi_1 = float(np.expm1(-h))
    B_h = -h if options.solver_type == "bh1" else h_phi_1  # noqa: N806
    h_phi_2 = -h_phi_1 / h - 1
    h_phi_3 = -h_phi_2 / h - 0.5
    return _Update(
        sigma_ratio=sigma_t / sigma_s,
        alpha_t=alpha_t,
        h_phi_1=h_phi_1,
        B_h=B_h,
        r=(_log_snr(schedule.level(i - 1)) - lambda_s) / h if i else 0.0,
        b=(h_phi_2 / B_h, 2 * h_phi_3 / B_h),
    )


def _unipc_order(schedule: Schedule, i: int, history: int, options: SchedulerOptions) -> int:
    left = len(schedule.timesteps) - i
    order = min(options.solver_order, left) if options.lower_order_final else options.solver_order
    return min(order, history + 1)


def _corrector(
    schedule: Schedule, i: int, history: int, options: SchedulerOptions
) -> tuple[float, float, float, float]:
    """UniC over the update that step i started, applied when step i + 1 knows its estimate.

    Returns:
        Coefficients of step i's sample and of the denoised estimates of steps i, i - 1, i + 1.
    """
    u = _unipc_update(schedule, i, options)
    scale = -u.alpha_t * u.B_h
    m0 = -u.alpha_t * u.h_phi_1
    if _unipc_order(schedule, i, history, options) == 1:
        return u.sigma_ratio, m0 - 0.5 * scale, 0.0, 0.5 * scale
    # The paper's linear system for (rho_1, rho_t): rows (1, 1) and (r, 1), right side b.
    rho_1 = (u.b[1] - u.b[0]) / (u.r - 1)
    before = scale * rho_1 / u.r
    ahead = scale * (u.b[0] - rho_1)
    return u.sigma_ratio, m0 - before - ahead, before, ahead


def step_unipc(schedule: Schedule, i: int, history: int, options: SchedulerOptions) -> Step:
    """UniPC of order 1 or 2 on the denoised estimate: correct the sample, then predict the next.

    Memory 1 holds what the next step's corrector needs of the sample and the estimate before the
    last, already weighted; so composited samples enter through the network only, as they do there.

    Source: Zhao et al. 2023 (arXiv 2302.04867), algorithms 1 and 2; diffusers
    UniPCMultistepScheduler.
    """
    m0 = predict_denoised(schedule, i, options.prediction_type)
    x = X
    if history:
        _, last, _, this = _corrector(schedule, i - 1, history - 1, options)
        x = M1 + last * M0 + this * m0
    u = _unipc_update(schedule, i, options)
    x_t = u.sigma_ratio * x - u.alpha_t * u.h_phi_1 * m0
    if _unipc_order(schedule, i, history, options) == 2:
        x_t = x_t - u.alpha_t * u.B_h * 0.5 * (M0 - m0) / u.r
    kept = 0 * X
    if i + 1 < len(schedule.timesteps):
        sample, _, before, _ = _corrector(schedule, i, history, options)
        kept = sample * x + before * M0
    return Step(rows=np.stack([x_t, m0, kept]), draws_noise=False)


def step_deis(schedule: Schedule, i: int, history: int, options: SchedulerOptions) -> Step:
    """DEIS of order 1 to 3 in log-rho: Adams-Bashforth on the noise estimate.

    At order 3 both memories hold noise estimates, so that no denoised estimate is remembered.

    Source: Zhang and Chen 2022 (arXiv 2204.13902), section 3.3; diffusers DEISMultistepScheduler.
    """
    prediction = options.prediction_type
    denoised = predict_denoised(schedule, i, prediction)
    noise = predict_noise(schedule, i, prediction)
    third = options.solver_order == 3
    past = [noise, M0, M1] if third else [noise, M1]
    (alpha_t, sigma_t), (alpha_s, _) = schedule.target(i), schedule.level(i)
    order = _deis_order(schedule, i, history, options)
    levels = schedule.levels[i - order + 1 : i + 1][::-1]
    nodes = np.log(levels[:, 1] / levels[:, 0])
    end = float(np.log(sigma_t / alpha_t))
    weights = [_integrate_basis(nodes, j, end) for j in range(order)]
    x_t = X / alpha_s + sum((w * e for w, e in zip(weights, past, strict=False)), 0 * X)
    memory = (noise, M0) if third else (denoised, noise)
    return Step(rows=np.stack([alpha_t * x_t, *memory]), draws_noise=False)


def _deis_order(schedule: Schedule, i: int, history: int, options: SchedulerOptions) -> int:
    n = len(schedule.timesteps)
    order = min(options.solver_order, history + 1)
    return min(order, n - i) if options.lower_order_final and n < 15 else order


def _integrate_basis(nodes: Floats, j: int, end: float) -> float:
    """Integral over rho, from nodes[0] to end in log rho, of Lagrange's polynomial j in log rho."""
    others = [float(node) for k, node in enumerate(nodes) if k != j]
    scale = math.prod(float(nodes[j]) - node for node in others)

    def antiderivative(u: float) -> float:
        """Of p(u) e^u, which is (p - p' + p'') e^u for p of degree 2 at most."""
        factors = [u - node for node in others]
        slope, bend = [(0.0, 0.0), (1.0, 0.0), (sum(factors), 2.0)][len(factors)]
        return (math.prod(factors) - slope + bend) * math.exp(u)

    return (antiderivative(end) - antiderivative(float(nodes[0]))) / scale
