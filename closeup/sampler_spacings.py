"""Where a run's noise levels lie between the noisiest and the cleanest: Karras, beta and others.

Source: Karras et al. 2022 (arXiv 2206.00364) eq. 5; Lu et al. 2022 (arXiv 2206.00927) for uniform
log-SNR; Lee et al. 2024 (arXiv 2407.12173) for beta; diffusers 0.39, ``_convert_to_*``.
"""

from __future__ import annotations

import math
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from closeup.sampler_options import SchedulerOptions

Floats: TypeAlias = npt.NDArray[np.float64]
Singles: TypeAlias = npt.NDArray[np.float32]

_RHO = 7.0
_BETA = 0.6


def space_sigmas(
    sigmas: npt.ArrayLike, options: SchedulerOptions, n: int, log_sigmas: Singles | None = None
) -> Floats | None:
    """Spaces sigmas by their own values.

    Args:
        sigmas: (M,) descending; its ends are the ends of the result unless the options name them.
        options: says which spacing.
        n: inference steps.
        log_sigmas: (T,) of the training schedule, for uniform log-SNR.

    Returns:
        (n,) float64, descending; None when the options ask for no such spacing.
    """
    values = np.asarray(sigmas, np.float64)
    sigma_max = values[0] if options.sigma_max is None else options.sigma_max
    sigma_min = values[-1] if options.sigma_min is None else options.sigma_min
    ramp = np.linspace(0, 1, n)
    if options.use_karras_sigmas:
        high, low = sigma_max ** (1 / _RHO), sigma_min ** (1 / _RHO)
        spaced: Floats = (high + ramp * (low - high)) ** _RHO
    elif options.use_lu_lambdas and log_sigmas is not None:
        low, high = float(log_sigmas[0]), float(log_sigmas[-1])
        spaced = np.exp(high + ramp * (low - high))
    elif options.use_exponential_sigmas:
        spaced = np.exp(np.linspace(np.log(sigma_max), np.log(sigma_min), n))
    elif options.use_beta_sigmas:
        spaced = sigma_min + beta_quantile(1 - ramp, _BETA) * (sigma_max - sigma_min)
    else:
        return None
    return spaced


def beta_quantile(p: npt.ArrayLike, a: float) -> Floats:
    """The quantile function of the symmetric beta distribution Beta(a, a).

    Newton's method on the incomplete beta function's power series in ``y = x**a``, which is nearly
    straight; the upper half by symmetry.

    Args:
        p: (n,) probabilities in [0, 1].
        a: both shape parameters, 0 < a <= 1.

    Returns:
        (n,) float64 in [0, 1], with an error of a few units in the last place.

    Source: NIST Digital Library of Mathematical Functions, 8.17.7.
    """
    probability = np.asarray(p, np.float64)
    lower = np.minimum(probability, 1 - probability)
    complete = math.gamma(a) ** 2 / math.gamma(2 * a)
    k = np.arange(80)  # the terms fall as 2**-k
    terms = np.cumprod(np.concatenate([[1.0], (k[1:] - a) / k[1:]])) / (a + k)
    y = lower * complete * a
    for _ in range(8):
        x = y ** (1 / a)
        value = y * (x[:, None] ** k @ terms)
        slope = (1 - x) ** (a - 1) / a
        y = np.clip(y - (value - lower * complete) / slope, 0, 0.5**a)
    x = y ** (1 / a)
    return np.where(probability > 0.5, 1 - x, x)


def timesteps_from_sigmas(sigmas: npt.ArrayLike, log_sigmas: Singles) -> Floats:
    """Finds the fractional training timesteps whose sigmas these are, linear in log sigma.

    In float32, as NumPy 1 does it for the reference: where the caller truncates the result to whole
    timesteps, the last bit decides.

    Args:
        sigmas: (n,) noise-to-signal ratios.
        log_sigmas: (T,) ascending, of the training schedule.

    Returns:
        (n,) within [0, T - 1].
    """
    log_sigma = np.log(np.maximum(sigmas, 1e-10)).astype(np.float32)
    below = np.searchsorted(log_sigmas, log_sigma, side="right") - 1
    below = below.clip(0, len(log_sigmas) - 2)
    low, high = log_sigmas[below], log_sigmas[below + 1]
    w: Singles = np.clip((low - log_sigma) / (low - high), 0, 1)
    timesteps: Floats = (1 - w) * below + w * (below + 1)
    return timesteps
