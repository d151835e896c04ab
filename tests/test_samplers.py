"""closeup.samplers against the schedulers of diffusers, step by step."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import numpy.typing as npt
import pytest
import torch

from closeup.errors import ModelError, RequestError
from closeup.noise import TorchNormal
from closeup.samplers import (
    FALLBACK_SAMPLER,
    SAMPLERS,
    StepTable,
    build_step_table,
    default_sampler,
)

Singles = npt.NDArray[np.float32]

# The reference computes its coefficients in float32, where differences of logarithms lose up to
# seven bits; ours are float64, rounded once. An off-by-one step differs by 1e-2 and more.
TOLERANCE = 1e-5
SHAPE = (1, 4, 3, 5)
SEED = 5

SD15 = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}

# name -> (diffusers class, what from_config is given on top), as DESIGN part 4 names them.
REFERENCES: dict[str, tuple[str, dict[str, Any]]] = {
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "dpm++2m": ("DPMSolverMultistepScheduler", {}),
    "dpm++2m_karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "dpm++sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "dpm++sde_karras": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True},
    ),
    "lcm": ("LCMScheduler", {}),
    "tcd": ("TCDScheduler", {}),
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """A run of a diffusers scheduler as the Stable Diffusion pipelines drive it."""

    scheduler: Any
    timesteps: Any
    image_to_image: bool

    def begin(self, known: Singles, noise: Singles) -> Singles:
        if not self.image_to_image:
            return np.asarray(noise * np.float32(self.scheduler.init_noise_sigma), np.float32)
        return self.add_noise(known, noise, 0)

    def add_noise(self, known: Singles, noise: Singles, k: int) -> Singles:
        level = torch.tensor([self.timesteps[k]])
        noisy = self.scheduler.add_noise(torch.tensor(known), torch.tensor(noise), level)
        return np.asarray(noisy.numpy(), np.float32)

    def step(self, k: int, x: Singles, output: Singles, generator: torch.Generator) -> Any:
        t = self.timesteps[k]
        extra = {} if "eta" not in self.scheduler.step.__code__.co_varnames else {"eta": 0.0}
        return self.scheduler.step(
            torch.tensor(output), t, torch.tensor(x), generator=generator, **extra
        )


def load_scheduler(name: str, config: Mapping[str, Any], folder: Path) -> Any:
    """The reference of a sampler, through a folder as users have it."""
    (folder / "scheduler_config.json").write_text(json.dumps(config))
    source = getattr(diffusers, config["_class_name"]).from_pretrained(folder)
    class_name, overrides = REFERENCES[name]
    return getattr(diffusers, class_name).from_config(source.config, **overrides)


def start_reference(scheduler: Any, steps: int, strength: float | None) -> Reference:
    """Sets the scheduler up as the text-to-image or the image-to-image pipeline does."""
    scheduler.set_timesteps(steps)
    timesteps = scheduler.timesteps
    if strength is not None:
        start = max(steps - min(int(steps * strength), steps), 0) * scheduler.order
        timesteps = timesteps[start:]
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(start)
    return Reference(scheduler=scheduler, timesteps=timesteps, image_to_image=strength is not None)


def relative_error(actual: npt.ArrayLike, expected: npt.ArrayLike) -> float:
    a, b = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert a.shape == b.shape
    return float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-12))


def combine(row: Singles, *terms: Singles) -> Singles:
    return np.asarray(sum(c * term for c, term in zip(row, terms, strict=True)), np.float32)


def errors_of_run(table: StepTable, reference: Reference) -> Iterator[tuple[str, float]]:
    """Every comparison of a run: each step starts from the reference's own sample."""
    draw = np.random.default_rng(0)
    known = draw.standard_normal(SHAPE, np.float32)
    noise, stream = TorchNormal(SEED), TorchNormal(SEED)
    generator = torch.Generator().manual_seed(SEED)
    start = noise.randn(SHAPE)
    stream.randn(SHAPE)
    torch.randn(SHAPE, generator=generator)
    x = reference.begin(known, start)
    yield "init", relative_error(combine(table.init, known, start), x)
    memory = [np.zeros(SHAPE, np.float32)] * 2
    for k, t in enumerate(reference.timesteps):
        scaled = reference.scheduler.scale_model_input(torch.tensor(x), t).numpy()
        yield f"timestep {k}", relative_error(table.timesteps[k], float(t))
        yield f"input {k}", relative_error(x * table.input_scale[k], scaled)
        output = draw.standard_normal(SHAPE, np.float32)
        drawn = noise.randn(SHAPE) if table.draws_noise[k] else np.ones(SHAPE, np.float32)
        result = reference.step(k, x, output, generator)
        terms = (x, output, *memory, drawn)
        rows = [combine(row, *terms) for row in table.step[k]]
        before, x = x, result.prev_sample.numpy()
        yield f"sample {k}", relative_error(rows[0], x)
        denoised = denoised_of(reference.scheduler, result, t, before, output)
        yield f"denoised {k}", relative_error(rows[1], denoised)
        yield f"memory {k}", float(np.abs(rows[2] - memory[0]).max())
        memory = rows[1:]
        last = k == len(reference.timesteps) - 1
        level = known if last else reference.add_noise(known, start, k + 1)
        yield f"known {k}", relative_error(combine(table.known_step[k], known, start), level)
    # Both streams stand at the same place: as many draws, in the same order.
    after = torch.randn(SHAPE, generator=generator).numpy()
    yield "stream", relative_error(noise.randn(SHAPE), after)


def denoised_of(scheduler: Any, result: Any, t: Any, x: Singles, output: Singles) -> Singles:
    """The reference's denoised estimate, wherever its class keeps it."""
    if hasattr(scheduler, "model_outputs"):
        return np.asarray(scheduler.model_outputs[-1].numpy(), np.float32)
    if not hasattr(result, "pred_noised_sample"):
        field = "denoised" if hasattr(result, "denoised") else "pred_original_sample"
        return np.asarray(getattr(result, field).numpy(), np.float32)
    # TCD keeps it to itself.
    bar = float(scheduler.alphas_cumprod[t])
    alpha, sigma = bar**0.5, (1 - bar) ** 0.5
    estimates = {
        "epsilon": (x - sigma * output) / max(alpha, 1e-12),
        "v_prediction": alpha * x - sigma * output,
        "sample": output,
    }
    return np.asarray(estimates[scheduler.config.prediction_type], np.float32)


def worst_of_run(
    name: str, config: Mapping[str, Any], scheduler: Any, steps: int, strength: float | None
) -> tuple[float, str]:
    table = build_step_table(name, config, steps, strength=strength)
    reference = start_reference(scheduler, steps, strength)
    assert len(table.timesteps) == len(reference.timesteps)
    if not len(table.timesteps):
        return 0.0, "empty"
    errors = ((error, what) for what, error in errors_of_run(table, reference))
    return max(errors)


def supports(name: str, prediction: str) -> bool:
    return prediction in SAMPLERS[name].prediction_types


GRID = [
    pytest.param(name, prediction, spacing, id=f"{name}-{prediction}-{spacing}")
    for name in SAMPLERS
    for prediction in ("epsilon", "v_prediction", "sample")
    for spacing in ("leading", "trailing", "linspace")
    # LCM and TCD take their timesteps from the distillation, whatever the spacing.
    if supports(name, prediction) and (spacing == "leading" or name not in ("lcm", "tcd"))
]


@pytest.mark.parametrize(("name", "prediction", "spacing"), GRID)
def test_step_table_equals_diffusers_when_every_step_is_compared(
    name: str, prediction: str, spacing: str, tmp_path: Path
) -> None:
    config = {**SD15, "prediction_type": prediction, "timestep_spacing": spacing}
    scheduler = load_scheduler(name, config, tmp_path)
    for steps in (1, 2, 4, 20, 25, 50):
        for strength in (None, 0.3, 0.6, 1.0):
            error, what = worst_of_run(name, config, scheduler, steps, strength)
            assert error <= TOLERANCE, f"{what} of {steps} steps at {strength}: {error:.2e}"


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
        {**SD15, "_class_name": "DEISMultistepScheduler", "algorithm_type": "deis"},
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
    for name in names:
        scheduler = load_scheduler(name, config, tmp_path)
        for steps in (1, 3, 16, 30):
            for strength in (None, 0.6):
                error, what = worst_of_run(name, config, scheduler, steps, strength)
                assert error <= TOLERANCE, f"{name}: {what} of {steps} at {strength}: {error:.2e}"
