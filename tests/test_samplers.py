"""closeup.samplers against the schedulers of diffusers, step by step."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
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
# The reference reaches x0 from a sample at sigma 4096 by subtraction in float32.
TOLERANCE_ZERO_SNR = 4096 * 2.0**-23
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
        noisy = self.scheduler.add_noise(torch.from_numpy(known), torch.from_numpy(noise), level)
        return np.asarray(noisy.numpy(), np.float32)

    def step(self, k: int, x: Singles, output: Singles, generator: torch.Generator) -> Any:
        t = self.timesteps[k]
        extra = {} if "eta" not in self.scheduler.step.__code__.co_varnames else {"eta": 0.0}
        return self.scheduler.step(
            torch.from_numpy(output), t, torch.from_numpy(x), generator=generator, **extra
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
    elif (timesteps == timesteps[0]).sum() > 1:
        # diffusers would start at the second of them and run off its end; we start at the first.
        scheduler.set_begin_index(0)
    return Reference(scheduler=scheduler, timesteps=timesteps, image_to_image=strength is not None)


def relative_error(actual: npt.ArrayLike, expected: npt.ArrayLike) -> float:
    a, b = np.asarray(actual), np.asarray(expected)
    assert a.shape == b.shape
    return float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-12))


def errors_of_run(table: StepTable, reference: Reference) -> Iterator[tuple[float, str, int]]:
    """Every comparison of a run as (error, what, step).

    Each step starts from the reference's own sample, and from the memories of the table.
    """
    draw = np.random.default_rng(0)
    known = draw.standard_normal(SHAPE, np.float32)
    noise, generator = TorchNormal(SEED), torch.Generator().manual_seed(SEED)
    start = noise.randn(SHAPE)
    torch.randn(SHAPE, generator=generator)
    x = reference.begin(known, start)
    yield relative_error(table.init[0] * known + table.init[1] * start, x), "init", 0
    terms = np.zeros((5, *SHAPE), np.float32)  # sample, output, memory 0, memory 1, noise
    for k, t in enumerate(reference.timesteps):
        scaled = reference.scheduler.scale_model_input(torch.from_numpy(x), t).numpy()
        yield relative_error(table.timesteps[k], float(t)), "timestep", k
        yield relative_error(x * table.input_scale[k], scaled), "input", k
        output = draw.standard_normal(SHAPE, np.float32)  # its own array: references keep it
        terms[0], terms[1] = x, output
        terms[4] = noise.randn(SHAPE) if table.draws_noise[k] else 1.0
        result = reference.step(k, x, output, generator)
        rows = np.tensordot(table.step[k], terms, 1)
        before, x = x, result.prev_sample.numpy()
        yield relative_error(rows[0], x), "sample", k
        denoised = denoised_of(reference.scheduler, result, t, before, output)
        yield relative_error(rows[1], denoised), "denoised", k
        yield float(np.abs(rows[2] - terms[2]).max()), "memory", k
        terms[2:4] = rows[1:]
        if reference.image_to_image:  # what is known is only composited there
            last = k == len(reference.timesteps) - 1
            level = known if last else reference.add_noise(known, start, k + 1)
            ours = table.known_step[k, 0] * known + table.known_step[k, 1] * start
            yield relative_error(ours, level), "known", k
    # Both streams stand at the same place: as many draws, in the same order.
    after = torch.randn(SHAPE, generator=generator).numpy()
    yield relative_error(noise.randn(SHAPE), after), "stream", len(table.timesteps)


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
) -> tuple[float, str, int]:
    table = build_step_table(name, config, steps, strength=strength)
    reference = start_reference(scheduler, steps, strength)
    assert len(table.timesteps) == len(reference.timesteps)
    if not len(table.timesteps):
        return 0.0, "empty", 0
    return max(errors_of_run(table, reference))


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
            error, what, k = worst_of_run(name, config, scheduler, steps, strength)
            assert error <= TOLERANCE, f"{what} {k} of {steps} steps at {strength}: {error:.2e}"


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
    tolerance = TOLERANCE_ZERO_SNR if case.startswith("zero-snr") else TOLERANCE
    for name in names:
        scheduler = load_scheduler(name, config, tmp_path)
        for steps in (1, 3, 16):  # 15 steps change the order of DPM-Solver's end
            for strength in (None, 0.6):
                error, what, k = worst_of_run(name, config, scheduler, steps, strength)
                assert error <= tolerance, (
                    f"{name}: {what} {k} of {steps} at {strength}: {error:.2e}"
                )


@pytest.mark.parametrize("name", REFERENCES)
def test_tolerance_rejects_zeros_and_an_off_by_one_step(name: str, tmp_path: Path) -> None:
    scheduler = load_scheduler(name, SD15, tmp_path)
    table = build_step_table(name, SD15, 20)
    longer = build_step_table(name, SD15, 21)
    zeros = replace(table, step=np.zeros_like(table.step))
    # One matrix of 20 taken from the next step, and a schedule of 21 steps without its first.
    late = replace(table, step=np.concatenate([table.step[1:], table.step[-1:]]))
    other = replace(table, step=longer.step[1:], timesteps=longer.timesteps[1:])
    for wrong in (zeros, late, other):
        errors = errors_of_run(wrong, start_reference(scheduler, 20, None))
        samples = [error for error, what, _ in errors if what == "sample"]
        assert max(samples) > 100 * TOLERANCE


@pytest.mark.parametrize("name", REFERENCES)
def test_free_run_stays_with_diffusers_when_errors_may_add_up(name: str, tmp_path: Path) -> None:
    scheduler = load_scheduler(name, SD15, tmp_path)
    reference = start_reference(scheduler, 25, None)
    table = build_step_table(name, SD15, 25)
    noise, generator = TorchNormal(SEED), torch.Generator().manual_seed(SEED)
    x = reference.begin(noise.randn(SHAPE), torch.randn(SHAPE, generator=generator).numpy())
    terms = np.zeros((5, *SHAPE), np.float32)
    terms[0] = x
    for k in range(25):
        # A network that depends on its input, so that an error would be fed back.
        x = reference.step(k, x, np.tanh(x), generator).prev_sample.numpy()
        terms[1] = np.tanh(terms[0])
        terms[4] = noise.randn(SHAPE) if table.draws_noise[k] else 0
        rows = np.tensordot(table.step[k], terms, 1)
        terms[0], terms[2:4] = rows[0], rows[1:]
    assert relative_error(terms[0], x) <= TOLERANCE


@pytest.mark.parametrize("name", REFERENCES)
def test_step_table_has_the_contract_shapes_when_built(name: str) -> None:
    table = build_step_table(name, SD15, 4, strength=0.5)
    assert table.timesteps.shape == table.input_scale.shape == table.draws_noise.shape == (2,)
    assert (table.step.shape, table.known_step.shape, table.init.shape) == ((2, 3, 5), (2, 2), (2,))
    arrays = (table.timesteps, table.input_scale, table.step, table.known_step, table.init)
    assert {array.dtype for array in arrays} == {np.dtype(np.float32)}
    assert table.draws_noise.dtype == np.bool_
    assert (table.step[0, :, 2:4] == [[0, 0], [0, 0], [1, 0]]).all()  # no history yet
    assert (table.known_step[-1] == (1, 0)).all()


@pytest.mark.parametrize("name", REFERENCES)
def test_step_table_is_empty_when_the_strength_leaves_no_step(name: str) -> None:
    for strength in (0.0, 0.04):
        table = build_step_table(name, SD15, 20, strength=strength)
        assert table.step.shape == (0, 3, 5)
        assert table.known_step.shape == (0, 2)
        assert table.timesteps.shape == table.draws_noise.shape == (0,)
        assert (table.init == (1, 0)).all()


@pytest.mark.parametrize("name", REFERENCES)
def test_text_to_image_is_image_to_image_at_strength_1_when_only_the_start_differs(
    name: str,
) -> None:
    plain, full = build_step_table(name, SD15, 7), build_step_table(name, SD15, 7, strength=1.0)
    assert (plain.step == full.step).all()
    assert (plain.known_step == full.known_step).all()
    assert (plain.init == np.array([0, plain.init_noise_sigma], np.float32)).all()
    assert full.init_noise_sigma == plain.init_noise_sigma
    assert full.init[0] > 0


def test_euler_step_is_the_hand_worked_one_when_one_step_ends_at_zero() -> None:
    config = {**SD15, "timestep_spacing": "trailing"}
    table = build_step_table("euler", config, 1)
    # One step from sigma_max to 0 is the denoised estimate itself: x - 14.6146 * eps.
    assert table.timesteps.tolist() == [999]
    assert table.init[1] == pytest.approx(14.6146, abs=1e-4)
    assert table.step[0, 0].tolist() == pytest.approx([1, -14.6146, 0, 0, 0], abs=1e-4)
    assert table.input_scale[0] == pytest.approx(1 / (14.6146**2 + 1) ** 0.5, rel=1e-5)


def test_lcm_draws_noise_at_every_step_but_the_last_when_run() -> None:
    assert build_step_table("lcm", SD15, 4).draws_noise.tolist() == [True, True, True, False]


@pytest.mark.parametrize(
    ("class_name", "extra", "expected"),
    [
        ("EulerDiscreteScheduler", {}, "euler"),
        ("EulerAncestralDiscreteScheduler", {}, "euler_a"),
        ("DPMSolverMultistepScheduler", {}, "dpm++2m"),
        ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}, "dpm++2m_karras"),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, "dpm++sde"),
        ("LCMScheduler", {}, "lcm"),
        ("TCDScheduler", {}, "tcd"),
        ("DDIMScheduler", {}, "ddim"),
        ("PNDMScheduler", {}, FALLBACK_SAMPLER),
        ("UniPCMultistepScheduler", {}, FALLBACK_SAMPLER),
    ],
)
def test_default_sampler_names_the_pipelines_own_when_it_is_a_table(
    class_name: str, extra: dict[str, Any], expected: str
) -> None:
    assert default_sampler({"_class_name": class_name, **extra}) == expected
    assert expected in SAMPLERS


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
        ("euler", {"use_beta_sigmas": True}, "use_beta_sigmas"),
        ("euler", {"use_karras_sigmas": "false"}, "use_karras_sigmas"),
        ("euler", {"steps_offset": 1.5}, "steps_offset"),
        ("euler", {"beta_start": "small"}, "beta_start"),
        ("dpm++2m", {"solver_order": 4}, "solver_order"),
        ("dpm++2m", {"variance_type": "learned_range"}, "variance_type"),
        ("dpm++2m_karras", {"use_exponential_sigmas": True}, "use_exponential_sigmas"),
        ("ddim", {"steps_offset": 60}, "steps_offset"),
        ("ddim", {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, "no signal"),
        ("euler", {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "_class_name"),
    ],
)
def test_build_step_table_names_the_key_when_the_configuration_is_not_supported(
    name: str, extra: dict[str, Any], key: str
) -> None:
    with pytest.raises(ModelError, match=key):
        build_step_table(name, {**SD15, **extra}, 20)


def test_default_sampler_refuses_when_the_class_has_no_beta_schedule() -> None:
    with pytest.raises(ModelError, match="FlowMatchEulerDiscreteScheduler"):
        default_sampler({"_class_name": "FlowMatchEulerDiscreteScheduler"})


@pytest.mark.parametrize(
    ("name", "steps", "strength", "field"),
    [
        ("heun", 20, None, "scheduler"),
        ("euler", 0, None, "steps"),
        ("euler", 1001, None, "steps"),
        ("lcm", 51, None, "steps"),
        ("euler", 20, 1.01, "denoising_strength"),
        ("euler", 20, -0.01, "denoising_strength"),
        ("euler", 20, float("nan"), "denoising_strength"),
    ],
)
def test_build_step_table_names_the_field_when_the_request_is_out_of_range(
    name: str, steps: int, strength: float | None, field: str
) -> None:
    with pytest.raises(RequestError) as caught:
        build_step_table(name, SD15, steps, strength=strength)
    assert list(caught.value.problems) == [field]


def test_build_step_table_is_fast_when_50_steps_are_asked_for() -> None:
    build_step_table("dpm++sde_karras", SD15, 50)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        build_step_table("dpm++sde_karras", SD15, 50)
        seconds.append(time.perf_counter() - start)
    # 3 ms on a quiet core; a request runs for seconds.
    assert min(seconds) < 0.05
