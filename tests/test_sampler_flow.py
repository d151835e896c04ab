"""Samplers of flow-matching models against diffusers, step by step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from closeup.errors import ModelError, RequestError
from closeup.sampler_names import list_sampler_names
from closeup.samplers import build_step_table, default_sampler
from tests.sampler_reference import (
    FLUX_DEV,
    FLUX_SCHNELL,
    IMAGE_TOKENS,
    TOLERANCE,
    errors_of_run,
    load_scheduler,
    start_reference,
    worst_of_run,
)

CONFIGS: dict[str, dict[str, Any]] = {
    "dev": FLUX_DEV,
    "schnell": FLUX_SCHNELL,
    "linear": {**FLUX_DEV, "time_shift_type": "linear"},
    "terminal": {**FLUX_DEV, "shift_terminal": 0.02},
    "empty": {"_class_name": "FlowMatchEulerDiscreteScheduler"},
    "shift": {**FLUX_SCHNELL, "shift": 3.0},
    "heun": {"_class_name": "FlowMatchHeunDiscreteScheduler", "shift": 2.0},
}
GRID = [
    pytest.param(name, case, id=f"{name}-{case}")
    for name in list_sampler_names(flow=True)
    for case in CONFIGS
    # DPM-Solver asserts that a dynamic shift is exponential, and knows no terminal level.
    if not (name == "dpm++2m" and case in ("linear", "terminal"))
]


@pytest.mark.parametrize(("name", "case"), GRID)
def test_flow_step_table_equals_diffusers_when_every_step_is_compared(
    name: str, case: str, tmp_path: Path
) -> None:
    config = CONFIGS[case]
    # 0.33 of 20 steps are 7 in the FLUX pipelines, 6 in the others.
    for steps, strength in ((1, None), (4, None), (20, None), (20, 0.33), (20, 1.0)):
        for tokens in (64, 4096):
            if case == "terminal" and steps == 1:  # its only level is stretched away: 0 / 0
                continue
            scheduler = load_scheduler(name, config, tmp_path)
            error, what, k = worst_of_run(name, config, scheduler, steps, strength, tokens)
            assert error <= TOLERANCE, f"{what} {k} of {steps} at {strength}: {error:.2e}"


@pytest.mark.parametrize("name", list_sampler_names(flow=True))
def test_tolerance_rejects_zeros_and_an_off_by_one_step(name: str, tmp_path: Path) -> None:
    table = build_step_table(name, FLUX_DEV, 20, image_tokens=IMAGE_TOKENS)
    late = replace(table, step=np.concatenate([table.step[1:], table.step[-1:]]))
    for wrong in (late, replace(table, step=np.zeros_like(table.step))):
        reference = start_reference(load_scheduler(name, FLUX_DEV, tmp_path), 20, None)
        samples = [e for e, what, _ in errors_of_run(wrong, reference) if what == "sample"]
        assert max(samples) > 100 * TOLERANCE


def test_flow_steps_are_counted_as_the_flux_pipelines_count_when_the_product_is_no_integer(
    tmp_path: Path,
) -> None:
    for name, calls in (("euler", 7), ("heun", 13), ("dpm++2m", 7)):
        table = build_step_table(name, FLUX_DEV, 20, strength=0.33, image_tokens=64)
        scheduler = load_scheduler(name, FLUX_DEV, tmp_path)
        assert len(table.timesteps) == len(start_reference(scheduler, 20, 0.33).timesteps) == calls


def test_flow_euler_is_the_hand_worked_one_when_nothing_is_shifted() -> None:
    table = build_step_table("euler", FLUX_SCHNELL, 4)
    assert table.timesteps.tolist() == [1000, 750, 500, 250]
    assert table.step[0].tolist() == [[1, -0.25, 0, 0, 0], [1, -1, 0, 0, 0], [0, 0, 1, 0, 0]]
    assert table.known_step.tolist() == [[0.25, 0.75], [0.5, 0.5], [0.75, 0.25], [1, 0]]
    assert table.init.tolist() == [0, 1]


def test_shift_grows_with_the_picture_when_it_is_dynamic() -> None:
    small, large = (
        build_step_table("euler", FLUX_DEV, 4, image_tokens=tokens) for tokens in (256, 4096)
    )
    # mu is 0.5 at 256 tokens and 1.15 at 4096: sigma = 1 / (1 + e**-mu) half way.
    assert small.timesteps[2] == pytest.approx(1000 / (1 + np.exp(-0.5)), rel=1e-6)
    assert large.timesteps[2] == pytest.approx(1000 / (1 + np.exp(-1.15)), rel=1e-6)


def test_build_step_table_needs_the_picture_when_the_shift_is_dynamic() -> None:
    with pytest.raises(ValueError, match="image_tokens"):
        build_step_table("euler", FLUX_DEV, 4)


@pytest.mark.parametrize(
    ("extra", "key"),
    [
        ({"invert_sigmas": True}, "invert_sigmas"),
        ({"stochastic_sampling": True}, "stochastic_sampling"),
        ({"time_shift_type": "cubic"}, "time_shift_type"),
        ({"shift": "3"}, "shift"),
        ({"use_karras_sigmas": True, "use_beta_sigmas": True}, "use_beta_sigmas"),
    ],
)
def test_build_step_table_names_the_key_when_the_flow_configuration_is_not_supported(
    extra: dict[str, Any], key: str
) -> None:
    with pytest.raises(ModelError, match=key):
        build_step_table("euler", {**FLUX_SCHNELL, **extra}, 4)


def test_build_step_table_refuses_when_a_sampler_has_no_flow_form() -> None:
    with pytest.raises(RequestError, match="euler_a"):
        build_step_table("euler_a", FLUX_SCHNELL, 4)


def test_default_sampler_is_the_flow_models_own() -> None:
    assert default_sampler(FLUX_DEV) == "euler"
    assert default_sampler(CONFIGS["heun"]) == "heun"
