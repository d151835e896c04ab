"""Unusual scheduler configurations: the same steps as diffusers, or a refusal by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from closeup.errors import ModelError
from closeup.samplers import SAMPLERS, build_step_table, default_sampler
from tests.sampler_reference import (
    API_NAMES,
    NEEDS_DOUBLE,
    REFERENCES,
    SD15,
    TOLERANCE_ZERO_SNR,
    load_scheduler,
    tolerance_of,
    worst_of_run,
)

BETAS = [float(beta) for beta in np.linspace(1e-4, 3e-2, 400)]
DDIM_DEMO = {**SD15, "_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}
ZERO_SNR = {**SD15, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
# (configuration, samplers it is shown for); the sources' own defaults must not leak into targets.
CONFIGS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "empty-pndm": ({"_class_name": "PNDMScheduler"}, tuple(REFERENCES)),
    "empty-ddim": ({"_class_name": "DDIMScheduler"}, tuple(REFERENCES)),
    "empty-lms": ({"_class_name": "LMSDiscreteScheduler"}, tuple(REFERENCES)),
    "empty-lcm": ({"_class_name": "LCMScheduler"}, tuple(REFERENCES)),
    "empty-dpm": ({"_class_name": "DPMSolverMultistepScheduler"}, tuple(REFERENCES)),
    "demo": ({**DDIM_DEMO, "timestep_spacing": "leading"}, tuple(REFERENCES)),
    "alpha-one": ({**DDIM_DEMO, "set_alpha_to_one": True}, ("ddim", "lcm", "tcd")),
    "linear": ({**SD15, "beta_schedule": "linear"}, tuple(REFERENCES)),
    "trained": (
        {**SD15, "trained_betas": BETAS, "num_train_timesteps": 400},
        tuple(REFERENCES),
    ),
    "zero-snr-trailing": ({**ZERO_SNR, "timestep_spacing": "trailing"}, tuple(REFERENCES)),
    "zero-snr-linspace": ({**ZERO_SNR, "timestep_spacing": "linspace"}, tuple(REFERENCES)),
    "cosine": (
        {**SD15, "beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1},
        ("dpm++2m", "dpm++2m_karras", "dpm++sde", "euler_a", "ddim"),
    ),
    "sigma-min": (
        {**SD15, "final_sigmas_type": "sigma_min", "lower_order_final": False},
        ("euler", "dpm++2m", "dpm++sde"),
    ),
    "sigma-min-karras": (
        {**SD15, "final_sigmas_type": "sigma_min"},
        ("dpm++2m_karras", "dpm++sde_karras"),
    ),
    "euler-at-final": (
        {**SD15, "final_sigmas_type": "sigma_min", "euler_at_final": True},
        ("dpm++2m", "dpm++sde"),
    ),
    "first-order": ({**SD15, "solver_order": 1}, ("dpm++2m", "dpm++sde")),
    "third-order": ({**SD15, "solver_order": 3}, ("dpm++2m", "dpm++2m_karras", "dpm++sde")),
    "heun": ({**SD15, "solver_type": "heun"}, ("dpm++2m", "dpm++sde", "dpm++sde_karras")),
    "unipc": (
        {**SD15, "_class_name": "UniPCMultistepScheduler", "solver_type": "heun"},
        ("dpm++2m",),
    ),
    "deis": (
        {**SD15, "_class_name": "DEISMultistepScheduler", "solver_type": "heun"},
        ("dpm++2m", "dpm++sde"),
    ),
    "karras-ends": (
        {**SD15, "_class_name": "EulerDiscreteScheduler", "sigma_min": 0.05, "sigma_max": 9.0},
        ("dpm++2m_karras",),
    ),
    "euler-karras": ({**SD15, "use_karras_sigmas": True}, ("euler",)),
    "exponential": ({**SD15, "use_exponential_sigmas": True}, ("euler", "dpm++2m", "dpm++sde")),
    "lu": ({**SD15, "use_lu_lambdas": True}, ("dpm++2m", "dpm++sde")),
    "students": ({**SD15, "original_inference_steps": 100}, ("lcm", "tcd")),
    "offset": ({**SD15, "steps_offset": 7, "timestep_spacing": "leading"}, tuple(REFERENCES)),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_step_table_equals_diffusers_when_the_configuration_is_unusual(
    case: str, tmp_path: Path
) -> None:
    config, names = CONFIGS[case]
    prediction = config.get("prediction_type", "epsilon")
    for name in (name for name in names if prediction in SAMPLERS[name].prediction_types):
        tolerance = TOLERANCE_ZERO_SNR if case.startswith("zero-snr") else tolerance_of(name)
        scheduler = load_scheduler(name, config, tmp_path)
        counts = (1, 3, 16) if name in API_NAMES else (4, 16)
        for steps in counts:  # 15 steps change the order of DPM-Solver's end
            for strength in (None, 0.6):
                error, what, k = worst_of_run(
                    name, config, scheduler, steps, strength, double=name in NEEDS_DOUBLE
                )
                assert error <= tolerance, (
                    f"{name}: {what} {k} of {steps} at {strength}: {error:.2e}"
                )


@pytest.mark.parametrize(
    ("name", "extra", "key"),
    [
        ("dpm++2m", {"thresholding": True}, "thresholding"),
        ("lcm", {"clip_sample": True}, "clip_sample"),
        ("euler_a", {"prediction_type": "sample"}, "prediction_type"),
        ("euler", {"prediction_type": "flow_prediction"}, "prediction_type"),
        ("euler", {"beta_schedule": "sigmoid"}, "beta_schedule"),
        ("euler", {"timestep_spacing": "karras"}, "timestep_spacing"),
        ("euler", {"interpolation_type": "log_linear"}, "interpolation_type"),
        ("euler_beta", {"sigma_min": "small"}, "sigma_min"),
        ("unipc", {"predict_x0": False}, "predict_x0"),
        ("unipc", {"disable_corrector": [0]}, "disable_corrector"),
        ("dpm2", {"prediction_type": "sample"}, "prediction_type"),
        ("euler", {"use_karras_sigmas": "false"}, "use_karras_sigmas"),
        ("euler", {"steps_offset": 1.5}, "steps_offset"),
        ("euler", {"beta_start": "small"}, "beta_start"),
        ("dpm++2m", {"solver_order": 4}, "solver_order"),
        ("dpm++2m", {"variance_type": "learned_range"}, "variance_type"),
        ("dpm++2m_karras", {"use_exponential_sigmas": True}, "use_exponential_sigmas"),
        ("ddim", {"steps_offset": 60}, "steps_offset"),
        ("ddim", {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, "no signal"),
        ("euler", {"_class_name": "EDMEulerScheduler"}, "_class_name"),
    ],
)
def test_build_step_table_names_the_key_when_the_configuration_is_not_supported(
    name: str, extra: dict[str, Any], key: str
) -> None:
    with pytest.raises(ModelError, match=key):
        build_step_table(name, {**SD15, **extra}, 20)


def test_default_sampler_refuses_when_the_class_has_no_beta_schedule() -> None:
    with pytest.raises(ModelError, match="EDMEulerScheduler"):
        default_sampler({"_class_name": "EDMEulerScheduler"})
