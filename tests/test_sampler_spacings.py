"""Spacings of the noise levels, for every sampler that has them, against diffusers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from closeup.sampler_names import list_sampler_names
from closeup.sampler_spacings import beta_quantile
from closeup.samplers import SAMPLERS, build_step_table
from tests.sampler_reference import (
    NEEDS_DOUBLE,
    SD15,
    load_scheduler,
    split_spacing,
    tolerance_of,
    worst_of_run,
)

SPACED = [name for name in list_sampler_names(flow=False) if name not in SAMPLERS]


@pytest.mark.parametrize("name", SPACED)
def test_spaced_step_table_equals_diffusers_when_every_step_is_compared(
    name: str, tmp_path: Path
) -> None:
    base, _ = split_spacing(name)
    for prediction in SAMPLERS[base].prediction_types[:2]:
        config = {**SD15, "prediction_type": prediction}
        scheduler = load_scheduler(name, config, tmp_path)
        for steps, strength in ((1, None), (4, None), (20, None), (20, 0.6)):
            error, what, k = worst_of_run(
                name, config, scheduler, steps, strength, double=base in NEEDS_DOUBLE
            )
            assert error <= tolerance_of(name), f"{what} {k} of {steps} at {strength}: {error:.2e}"


@pytest.mark.parametrize("name", SPACED)
def test_spacing_changes_the_levels_when_named(name: str) -> None:
    base, _ = split_spacing(name)
    config = {**SD15, "timestep_spacing": "leading"}
    spaced, own = build_step_table(name, config, 8), build_step_table(base, config, 8)
    assert np.abs(spaced.step - own.step).max() > 100 * tolerance_of(name)


def test_spacing_in_the_name_wins_when_the_file_has_another() -> None:
    config = {**SD15, "use_karras_sigmas": True, "use_lu_lambdas": True}
    for name in ("euler_beta", "dpm++2m_exponential", "unipc_sgm_uniform"):
        theirs, ours = build_step_table(name, config, 8), build_step_table(name, SD15, 8)
        assert (theirs.step == ours.step).all()


def test_beta_quantile_equals_scipy() -> None:
    p = np.concatenate([np.linspace(0, 1, 201), 10.0 ** -np.arange(3, 15)])
    for a in (0.6, 0.3, 1.0):
        expected = scipy.stats.beta.ppf(p, a, a)
        # Timesteps are truncated from these; SciPy's own error is 1e-14.
        np.testing.assert_allclose(beta_quantile(p, a), expected, rtol=1e-12, atol=1e-15)


def test_beta_quantile_is_the_arcsine_law_when_both_shapes_are_a_half() -> None:
    p = np.linspace(0, 1, 33)
    np.testing.assert_allclose(beta_quantile(p, 0.5), np.sin(np.pi * p / 2) ** 2, atol=1e-14)
