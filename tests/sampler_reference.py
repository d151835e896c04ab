"""diffusers' schedulers as its pipelines drive them, and step tables compared with them."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import numpy.typing as npt
import torch

from closeup.noise import TorchNormal
from closeup.samplers import SAMPLERS, SPACINGS, StepTable, build_step_table

Singles = npt.NDArray[np.float32]

# The reference computes its coefficients in float32, where differences of logarithms lose up to
# seven bits; ours are float64, rounded once. An off-by-one step differs by 1e-2 and more.
TOLERANCE = 1e-5
# The reference reaches x0 from a sample at sigma 4096 by subtraction in float32.
TOLERANCE_ZERO_SNR = 4096 * 2.0**-23
# DPM2 a of the reference subtracts squares of sigmas in float32 to place its midpoints: on steps
# over a factor of 30 in sigma three digits are lost, and with two steps five.
TOLERANCE_ANCESTRAL = 1e-4
SHAPE = (1, 4, 3, 5)
SEED = 5
IMAGE_TOKENS = 1024

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
FLUX_SCHNELL = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "_diffusers_version": "0.30.0.dev0",
    "num_train_timesteps": 1000,
    "shift": 1.0,
}
FLUX_DEV = {
    **FLUX_SCHNELL,
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "shift": 3.0,
    "use_dynamic_shifting": True,
}

_SDE = {"algorithm_type": "sde-dpmsolver++"}
# name -> (diffusers class, what from_config is given on top).
REFERENCES: dict[str, tuple[str, dict[str, Any]]] = {
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "dpm++2m": ("DPMSolverMultistepScheduler", {}),
    "dpm++2m_karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "dpm++sde": ("DPMSolverMultistepScheduler", _SDE),
    "dpm++sde_karras": ("DPMSolverMultistepScheduler", {**_SDE, "use_karras_sigmas": True}),
    "lcm": ("LCMScheduler", {}),
    "tcd": ("TCDScheduler", {}),
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "dpm++2m_sde": ("DPMSolverMultistepScheduler", {**_SDE, "solver_order": 2}),
    "dpm++3m": ("DPMSolverMultistepScheduler", {"solver_order": 3}),
    "dpm++3m_sde": ("DPMSolverMultistepScheduler", {**_SDE, "solver_order": 3}),
    "dpm++2s": (
        "DPMSolverSinglestepScheduler",
        {"algorithm_type": "dpmsolver++", "solver_order": 2},
    ),
    "unipc": ("UniPCMultistepScheduler", {"solver_order": 2}),
    "deis": ("DEISMultistepScheduler", {"solver_order": 2}),
    "deis3": ("DEISMultistepScheduler", {"solver_order": 3}),
    "heun": ("HeunDiscreteScheduler", {"clip_sample": False}),
    "dpm2": ("KDPM2DiscreteScheduler", {}),
    "dpm2_a": ("KDPM2AncestralDiscreteScheduler", {}),
}
API_NAMES = tuple(REFERENCES)[:9]
"""The samplers of DESIGN part 4; the rest came later."""
LATER_NAMES = tuple(REFERENCES)[9:]
# Where levels are close, float32 differences of their logarithms have few correct digits, and the
# divided differences of these samplers fewer: diffusers is up to 4e-3 from itself in float64.
NEEDS_DOUBLE = ("deis", "deis3", "dpm++3m", "dpm++3m_sde")
# diffusers' FLUX pipelines cannot drive Heun, and DPM-Solver for text-to-image only; the classes
# themselves are the references. What the file calls shift, DPM-Solver calls flow_shift.
FLOW_REFERENCES: dict[str, tuple[str, dict[str, Any]]] = {
    "euler": ("FlowMatchEulerDiscreteScheduler", {}),
    "heun": ("FlowMatchHeunDiscreteScheduler", {}),
    "dpm++2m": (
        "DPMSolverMultistepScheduler",
        {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "solver_order": 2},
    ),
}


def tolerance_of(name: str) -> float:
    return TOLERANCE_ANCESTRAL if name.startswith("dpm2_a") else TOLERANCE


def split_spacing(name: str) -> tuple[str, dict[str, Any]]:
    """The base name and what the spacing in a name fixes."""
    for spacing, fixed in SPACINGS.items():
        if name not in SAMPLERS and name.endswith("_" + spacing):
            return name.removesuffix("_" + spacing), dict(fixed)
    return name, {}


def load_scheduler(name: str, config: Mapping[str, Any], folder: Path) -> Any:
    """The reference of a sampler, through a folder as users have it."""
    (folder / "scheduler_config.json").write_text(json.dumps(config))
    source = getattr(diffusers, config["_class_name"]).from_pretrained(folder)
    base, fixed = split_spacing(name)
    flow = config["_class_name"].startswith("Flow")
    class_name, overrides = (FLOW_REFERENCES if flow else REFERENCES)[base]
    if flow and class_name.startswith("DPM"):
        overrides = {**overrides, "flow_shift": config.get("shift", 1.0)}
    target = getattr(diffusers, class_name)
    known = inspect.signature(target).parameters
    fixed = {key: value for key, value in fixed.items() if key in known}
    return target.from_config(source.config, **overrides, **fixed)


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """A run of a diffusers scheduler as the Stable Diffusion or FLUX pipelines drive it."""

    scheduler: Any
    timesteps: Any
    image_to_image: bool

    def begin(self, known: Singles, noise: Singles) -> Singles:
        if not self.image_to_image:
            sigma = float(getattr(self.scheduler, "init_noise_sigma", 1.0))
            return np.asarray(noise * np.float32(sigma), np.float32)
        return self.add_noise(known, noise, 0)

    def scale(self, x: Singles, k: int) -> Singles:
        if not hasattr(self.scheduler, "scale_model_input"):
            return x
        scaled = self.scheduler.scale_model_input(torch.from_numpy(x), self.timesteps[k])
        return np.asarray(scaled.numpy(), np.float32)

    def add_noise(self, known: Singles, noise: Singles, k: int) -> Singles:
        clean, normal = torch.from_numpy(known), torch.from_numpy(noise)
        level = torch.tensor([self.timesteps[k]])
        if hasattr(self.scheduler, "scale_noise"):
            noisy = self.scheduler.scale_noise(clean, level, normal)
        else:
            noisy = self.scheduler.add_noise(clean, normal, level)
        return np.asarray(noisy.numpy(), np.float32)

    def step(self, k: int, x: Singles, output: Singles, generator: torch.Generator) -> Any:
        # Not inspect.signature: there are thousands of steps.
        accepted = self.scheduler.step.__code__.co_varnames
        extra = {"eta": 0.0, "generator": generator}
        extra = {key: value for key, value in extra.items() if key in accepted}
        return self.scheduler.step(
            torch.from_numpy(output), self.timesteps[k], torch.from_numpy(x), **extra
        )


def set_flow_timesteps(scheduler: Any, steps: int, tokens: int) -> None:
    """As FluxPipeline calls it, where the class takes its arguments."""
    config = scheduler.config
    slope = (config.get("max_shift", 1.15) - config.get("base_shift", 0.5)) / (
        config.get("max_image_seq_len", 4096) - config.get("base_image_seq_len", 256)
    )
    base = config.get("base_shift", 0.5) - slope * config.get("base_image_seq_len", 256)
    mu = tokens * slope + base
    name = type(scheduler).__name__
    if name == "FlowMatchEulerDiscreteScheduler":
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    elif name == "DPMSolverMultistepScheduler" and config.get("use_dynamic_shifting"):
        scheduler.set_timesteps(steps, mu=mu)
    else:
        scheduler.set_timesteps(steps)


def is_flow(scheduler: Any) -> bool:
    return type(scheduler).__name__.startswith("Flow") or bool(
        scheduler.config.get("use_flow_sigmas")
    )


def start_reference(
    scheduler: Any,
    steps: int,
    strength: float | None,
    tokens: int = IMAGE_TOKENS,
    *,
    double: bool = False,
) -> Reference:
    """Sets the scheduler up as the text-to-image or the image-to-image pipeline does.

    With ``double`` its coefficients are float64, from the same noise levels: where two levels are
    close, its float32 differences of logarithms have few correct digits.
    """
    flow = is_flow(scheduler)
    if flow:
        set_flow_timesteps(scheduler, steps, tokens)
    else:
        scheduler.set_timesteps(steps)
    timesteps = scheduler.timesteps
    if double:
        scheduler.sigmas = scheduler.sigmas.double()
    if strength is not None:
        start = int(max(steps - min(steps * strength, steps), 0))
        if not flow:
            start = max(steps - min(int(steps * strength), steps), 0)
        start *= scheduler.order
        timesteps = timesteps[start:]
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(start)
    elif flow or (timesteps == timesteps[0]).sum() > 1:
        # diffusers would start at the second of them and run off its end; we start at the first.
        scheduler.set_begin_index(0)
    return Reference(scheduler=scheduler, timesteps=timesteps, image_to_image=strength is not None)


def relative_error(actual: npt.ArrayLike, expected: npt.ArrayLike) -> float:
    a, b = np.asarray(actual), np.asarray(expected)
    assert a.shape == b.shape
    assert np.isfinite(a).all()
    assert np.isfinite(b).all()
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
        yield abs(float(table.timesteps[k]) - float(t)) / max(float(t), 1.0), "timestep", k
        yield relative_error(x * table.input_scale[k], reference.scale(x, k)), "input", k
        output = draw.standard_normal(SHAPE, np.float32)  # its own array: references keep it
        terms[0], terms[1] = x, output
        terms[4] = noise.randn(SHAPE) if table.draws_noise[k] else 1.0
        result = reference.step(k, x, output, generator)
        rows = np.tensordot(table.step[k], terms, 1)
        before, x = x, np.asarray(result.prev_sample.numpy(), np.float32)
        yield relative_error(rows[0], x), "sample", k
        if table.denoised_in_memory:
            denoised = denoised_of(reference.scheduler, result, t, before, output)
            yield relative_error(rows[1], denoised), "denoised", k
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
    name = type(scheduler).__name__
    if name == "DEISMultistepScheduler":  # keeps the noise estimate
        sigma = scheduler.sigmas[scheduler.step_index - 1].double()
        alpha, sigma = (float(a) for a in scheduler._sigma_to_alpha_sigma_t(sigma))
        return np.asarray((x - sigma * scheduler.model_outputs[-1].numpy()) / alpha, np.float32)
    if hasattr(scheduler, "model_outputs"):
        return np.asarray(scheduler.model_outputs[-1].numpy(), np.float32)
    if name.startswith("Flow"):
        return np.asarray(x - np.float32(t / 1000) * output, np.float32)
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
    name: str,
    config: Mapping[str, Any],
    scheduler: Any,
    steps: int,
    strength: float | None,
    tokens: int = IMAGE_TOKENS,
    *,
    double: bool = False,
) -> tuple[float, str, int]:
    """The worst comparison of a run; the table must have as many rows as the reference steps."""
    table = build_step_table(name, config, steps, strength=strength, image_tokens=tokens)
    reference = start_reference(scheduler, steps, strength, tokens, double=double)
    assert len(table.timesteps) == len(reference.timesteps)
    if not len(table.timesteps):
        return 0.0, "empty", 0
    return max(errors_of_run(table, reference))
