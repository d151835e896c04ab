"""Noise schedules: at which timesteps a sampler calls the network, and how noisy each one is.

A schedule says of every index i that the sample is ``a_i * x0 + b_i * noise`` in the sampler's own
space: variance preserving for DDIM, LCM, TCD and the multistep solvers (a² + b² = 1), variance
exploding for the Euler family (a = 1, b = σ), interpolating for flow matching (a + b = 1). The
network sees ``input_scale * sample``, which is variance preserving except for flow matching.

Tables that diffusers keeps in float32 are rounded to float32 at the same places, because a
rounding of the training schedule is carried into every step; all else is float64.

Source: diffusers 0.39, ``set_timesteps`` of each scheduler.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from closeup.errors import ModelError, RequestError
from closeup.sampler_options import SchedulerOptions
from closeup.sampler_spacings import Floats, Singles, space_sigmas, timesteps_from_sigmas


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """All steps of a run at strength 1; an image-to-image run uses its tail.

    Attributes:
        timesteps: (N,) what the network gets, descending.
        levels: (N+1, 2) float64, the coefficients (a_i, b_i) of x0 and noise in the sample that
            enters step i; the last row is what the sigmas end at.
        targets: (N, 2) float64, (a, b) of the sample that step i produces. The same as
            ``levels[1:]`` for sigma samplers; DDIM, LCM and TCD aim at timesteps of their own.
        input_scale: (N,) float64.
        init_noise_sigma: standard deviation of the noise that text-to-image starts from.
        order: network calls a step; image-to-image skips whole steps.
        seen: (N, 2) float64, the level that the network is told step i's sample has, where that is
            not ``levels[:N]``: DPM2 lets the known picture enter its midpoints at another level.
        counts_up: image-to-image rounds the steps it runs up, as the flow-matching pipelines do.
    """

    timesteps: Floats
    levels: Floats
    targets: Floats
    input_scale: Floats
    init_noise_sigma: float
    order: int = 1
    seen: Floats | None = None
    counts_up: bool = False

    def level(self, i: int) -> tuple[float, float]:
        """The coefficients of x0 and noise in the sample that enters step i."""
        return float(self.levels[i, 0]), float(self.levels[i, 1])

    def seen_level(self, i: int) -> tuple[float, float]:
        """The coefficients of x0 and noise in the sample that the network sees at step i."""
        rows = self.levels if self.seen is None else self.seen
        return float(rows[i, 0]), float(rows[i, 1])

    def target(self, i: int) -> tuple[float, float]:
        """The coefficients of x0 and noise in the sample that step i produces."""
        return float(self.targets[i, 0]), float(self.targets[i, 1])


@lru_cache(maxsize=64)
def compute_alphas_cumprod(options: SchedulerOptions) -> Singles:
    """The cumulative product of 1 - beta over the training timesteps.

    Args:
        options: beta schedule and zero-terminal-SNR rescaling (arXiv 2305.08891, algorithm 1).

    Returns:
        (num_train_timesteps,) float32, descending, read-only; with rescaling the last is 0.
    """
    betas = _compute_betas(options)
    if options.rescale_betas_zero_snr:
        betas = _rescale_zero_terminal_snr(betas)
    alphas_cumprod = _cumprod(np.float32(1) - betas)
    alphas_cumprod.setflags(write=False)
    return alphas_cumprod


def _compute_betas(options: SchedulerOptions) -> Singles:
    start, end, n = options.beta_start, options.beta_end, options.num_train_timesteps
    if options.trained_betas is not None:
        return np.asarray(options.trained_betas, np.float32)
    if options.beta_schedule == "linear":
        return _linspace(start, end, n)
    if options.beta_schedule == "scaled_linear":
        roots = _linspace(start**0.5, end**0.5, n)
        return roots * roots
    # squaredcos_cap_v2: Nichol and Dhariwal 2021 (arXiv 2102.09672), eq. 17
    t = np.arange(n + 1) / n
    alpha_bar = np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2
    betas: Singles = np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999).astype(np.float32)
    return betas


def _linspace(start: float, end: float, n: int) -> Singles:
    """``torch.linspace`` in float32: counted from both ends, each product-sum rounded once."""
    first, last = np.float32(start), np.float32(end)
    step = np.float64((last - first) / np.float32(n - 1)) if n > 1 else np.float64(0)
    i = np.arange(n)
    values = np.where(i < n // 2, first + step * i, last - step * (n - 1 - i))
    return values.astype(np.float32)


def _cumprod(alphas: Singles) -> Singles:
    """``torch.cumprod`` on the CPU: float32 values, accumulated in float64."""
    return np.cumprod(alphas, dtype=np.float64).astype(np.float32)


def _rescale_zero_terminal_snr(betas: Singles) -> Singles:
    sqrt_bar = np.sqrt(_cumprod(np.float32(1) - betas))
    shifted = sqrt_bar - sqrt_bar[-1]
    alphas_bar = (shifted * (sqrt_bar[0] / (sqrt_bar[0] - sqrt_bar[-1]))) ** 2
    alphas = np.concatenate([alphas_bar[:1], alphas_bar[1:] / alphas_bar[:-1]])
    rescaled: Singles = np.float32(1) - alphas
    return rescaled


def training_sigmas(options: SchedulerOptions) -> Singles:
    """The (num_train_timesteps,) float32 noise-to-signal ratios, ascending and finite."""
    alphas_cumprod = compute_alphas_cumprod(options)
    if options.rescale_betas_zero_snr:
        alphas_cumprod = alphas_cumprod.copy()
        alphas_cumprod[-1] = 2.0**-24  # keeps the first sigma finite: 4096
    sigmas: Singles = np.sqrt((np.float32(1) - alphas_cumprod) / alphas_cumprod)
    return sigmas


def space_timesteps(options: SchedulerOptions, n: int, *, last: int, points: int) -> Floats:
    """The first n of ``points`` timesteps spread over [0, last), descending, unrounded.

    Source: table 2 of arXiv 2305.08891.
    """
    if options.timestep_spacing == "linspace":
        return np.linspace(0, last - 1, points)[::-1][:n]
    if options.timestep_spacing == "leading":
        return (np.arange(points) * (last // points))[::-1][:n] + float(options.steps_offset)
    return np.arange(last, 0, -options.num_train_timesteps / n).round() - 1


def close_sigmas(sigmas: Floats, final: float) -> Floats:
    """Appends the sigma a run ends at and rounds as diffusers stores them, (n + 1,)."""
    return np.append(sigmas, final).astype(np.float32).astype(np.float64)


def _final_sigma(training: Singles, options: SchedulerOptions) -> float:
    return 0.0 if options.final_sigmas_type == "zero" else float(training[0])


def build_euler_schedule(options: SchedulerOptions, n: int) -> Schedule:
    """Schedule of the Euler family: variance exploding, fractional timesteps allowed.

    Args:
        options: resolved options.
        n: inference steps, at least 1.

    Returns:
        A schedule whose levels are (1, sigma).
    """
    training = training_sigmas(options)
    sigmas, timesteps = space_exploding(options, n, training)
    sigmas = close_sigmas(sigmas, _final_sigma(training, options))
    return Schedule(
        timesteps=timesteps,
        levels=exploding_levels(sigmas),
        targets=exploding_levels(sigmas[1:]),
        input_scale=1 / np.sqrt(sigmas[:-1] ** 2 + 1),
        init_noise_sigma=exploding_noise(options, sigmas),
    )


def space_exploding(options: SchedulerOptions, n: int, training: Singles) -> tuple[Floats, Floats]:
    """Returns (n,) sigmas and (n,) fractional timesteps of the samplers that start at n points."""
    spread = space_timesteps(options, n, last=options.num_train_timesteps, points=n)
    timesteps = spread.astype(np.float32).astype(np.float64)
    sigmas: Floats = np.interp(timesteps, np.arange(len(training)), training)
    log_sigmas = np.log(training)
    spaced = space_sigmas(sigmas, options, n, log_sigmas)
    if spaced is None:
        return sigmas, timesteps
    return spaced, timesteps_from_sigmas(spaced, log_sigmas).astype(np.float32).astype(np.float64)


def exploding_levels(sigmas: Floats) -> Floats:
    """Levels (1, sigma) of variance-exploding samples, (N, 2)."""
    return np.stack([np.ones_like(sigmas), sigmas], 1)


def exploding_noise(options: SchedulerOptions, sigmas: Floats) -> float:
    """The standard deviation of the noise that a variance-exploding run starts from."""
    sigma_max = float(sigmas.max())
    return (sigma_max**2 + 1) ** 0.5 if options.timestep_spacing == "leading" else sigma_max


def build_dpm_schedule(options: SchedulerOptions, n: int) -> Schedule:
    """Schedule of the multistep DPM-Solver: variance preserving, whole timesteps.

    Args:
        options: resolved options.
        n: inference steps, at least 1.

    Returns:
        A schedule whose levels are (alpha_t, sigma_t).
    """
    training = training_sigmas(options)
    whole = options.beta_schedule != "squaredcos_cap_v2"
    sigmas, timesteps = _space_preserving(options, n, training, whole=whole)
    return _build_preserving(timesteps, close_sigmas(sigmas, _final_sigma(training, options)))


def build_singlestep_schedule(options: SchedulerOptions, n: int) -> Schedule:
    """Schedule of the singlestep DPM-Solver; arguments and result as build_dpm_schedule."""
    training = training_sigmas(options)
    sigmas, timesteps = _space_preserving(options, n, training)
    return _build_preserving(timesteps, close_sigmas(sigmas, _final_sigma(training, options)))


def build_unipc_schedule(options: SchedulerOptions, n: int) -> Schedule:
    """Schedule of UniPC; arguments and result as build_dpm_schedule."""
    training = training_sigmas(options)
    sigmas, timesteps = _space_preserving(options, n, training)
    least = float(sigmas[-1]) if _spaces_sigmas(options) else float(training[0])
    final = 0.0 if options.final_sigmas_type == "zero" else least
    return _build_preserving(timesteps, close_sigmas(sigmas, final))


def build_deis_schedule(options: SchedulerOptions, n: int) -> Schedule:
    """Schedule of DEIS, which never ends at zero; arguments and result as build_dpm_schedule."""
    training = training_sigmas(options)
    sigmas, timesteps = _space_preserving(options, n, training)
    final = float(sigmas[-1]) if _spaces_sigmas(options) else float(training[0])
    return _build_preserving(timesteps, close_sigmas(sigmas, final))


def _spaces_sigmas(options: SchedulerOptions) -> bool:
    return options.use_karras_sigmas or options.use_exponential_sigmas or options.use_beta_sigmas


def _space_preserving(
    options: SchedulerOptions, n: int, training: Singles, *, whole: bool = True
) -> tuple[Floats, Floats]:
    """(n,) sigmas and whole timesteps of the multistep family, which starts at n of n + 1 points.

    With ``whole`` the Karras and log-SNR spacings round their timesteps instead of truncating.
    """
    log_sigmas = np.log(training)
    last = options.num_train_timesteps - int((-log_sigmas < options.lambda_min_clipped).sum())
    timesteps = space_timesteps(options, n, last=last, points=n + 1).round()
    sigmas = space_sigmas(training[::-1], options, n, log_sigmas)
    if sigmas is None:
        return np.interp(timesteps, np.arange(len(training)), training), np.trunc(timesteps)
    timesteps = timesteps_from_sigmas(sigmas, log_sigmas)
    if whole and (options.use_karras_sigmas or options.use_lu_lambdas):
        timesteps = timesteps.round()
    return sigmas, np.trunc(timesteps)


def _build_preserving(timesteps: Floats, sigmas: Floats) -> Schedule:
    alpha = 1 / np.sqrt(sigmas**2 + 1)
    levels = np.stack([alpha, sigmas * alpha], 1)
    return Schedule(
        timesteps=timesteps,
        levels=levels,
        targets=levels[1:],
        input_scale=np.ones(len(timesteps)),
        init_noise_sigma=1.0,
    )


def _levels_from_alphas_cumprod(alphas_cumprod: npt.ArrayLike) -> Floats:
    bar = np.asarray(alphas_cumprod, np.float64)
    return np.stack([np.sqrt(bar), np.sqrt(1 - bar)], -1)


def _build_discrete_schedule(timesteps: Floats, bars: Singles, target_bars: Singles) -> Schedule:
    """A schedule on training timesteps: ``bars`` are theirs, ``target_bars`` those aimed at."""
    levels = _levels_from_alphas_cumprod(bars)
    return Schedule(
        timesteps=timesteps,
        levels=np.concatenate([levels, [[1.0, 0.0]]]),
        targets=_levels_from_alphas_cumprod(target_bars),
        input_scale=np.ones(len(timesteps)),
        init_noise_sigma=1.0,
    )


def build_ddim_schedule(options: SchedulerOptions, n: int) -> Schedule:
    """Schedule of DDIM: each step aims a fixed number of training timesteps lower.

    Args:
        options: resolved options.
        n: inference steps, at least 1.

    Returns:
        A variance-preserving schedule.

    Raises:
        ModelError: the offset puts a timestep outside the training schedule.
    """
    last = options.num_train_timesteps
    alphas_cumprod = compute_alphas_cumprod(options)
    timesteps = space_timesteps(options, n, last=last, points=n).round()
    if timesteps.max() >= last:
        raise ModelError(
            f"scheduler_config.json has steps_offset = {options.steps_offset}, which puts "
            f"timestep {timesteps.max():.0f} outside the {last} of the training schedule; lower it."
        )
    index = timesteps.astype(np.int64)
    final = np.float32(1) if options.set_alpha_to_one else alphas_cumprod[0]
    previous = index - last // n
    target_bars = np.where(previous >= 0, alphas_cumprod[previous], final)
    return _build_discrete_schedule(timesteps, alphas_cumprod[index], target_bars)


def build_consistency_schedule(options: SchedulerOptions, n: int) -> Schedule:
    """Schedule of LCM and TCD: n of the timesteps that the student was distilled on.

    Args:
        options: resolved options.
        n: inference steps, at least 1 and at most ``original_inference_steps``.

    Returns:
        A variance-preserving schedule whose last target is training timestep 0.

    Raises:
        RequestError: more steps than the student knows.
    """
    original = options.original_inference_steps
    if n > original:
        raise RequestError(
            {"steps": f"{n} steps were asked of a sampler that knows {original}; ask for fewer."}
        )
    alphas_cumprod = compute_alphas_cumprod(options)
    k = options.num_train_timesteps // original
    taught = (np.arange(original, 0, -1) * k - 1).astype(np.int64)
    index = taught[np.floor(np.linspace(0, original, n, endpoint=False)).astype(np.int64)]
    bars = alphas_cumprod[index]
    target_bars = np.append(bars[1:], alphas_cumprod[:1])
    return _build_discrete_schedule(index.astype(np.float64), bars, target_bars)
