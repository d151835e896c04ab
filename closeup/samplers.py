"""Samplers as tables: what each denoising step multiplies, computed before the first one runs.

A sampler of diffusers becomes a :class:`StepTable`: per step one timestep, one input scale and one
3x5 matrix. The denoiser applies matrices and knows no sampler, so sequences with different
samplers share its batches.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from closeup import sampler_flow, sampler_options
from closeup.errors import ModelError, RequestError
from closeup.sampler_options import SchedulerOptions
from closeup.sampler_schedules import Schedule
from closeup.sampler_table import FLOW_SAMPLERS, SAMPLERS, SPACINGS, Sampler, find_sampler

__all__ = [
    "FALLBACK_SAMPLER",
    "FLOW_SAMPLERS",
    "SAMPLERS",
    "SPACINGS",
    "StepTable",
    "build_step_table",
    "default_sampler",
    "find_sampler",
    "recall_step_table",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTable:
    """All network calls of one run; K may be 0 when the strength leaves no step.

    K is the number of steps, or for the samplers that call the network twice a step (Heun, DPM2,
    DPM2 a) twice that less one.

    Attributes:
        timesteps: (K,) float32, what the network gets; for flow matching sigma times the training
            timesteps.
        input_scale: (K,) float32, the network's input is ``sample * input_scale``.
        step: (K, 3, 5) float32; rows next sample, memory 0, memory 1; columns sample, raw network
            output after guidance, memory 0, memory 1, noise. Memory 0 is the denoised estimate
            (see ``denoised_in_memory``), memory 1 the sampler's own. Both start as zeros.
        draws_noise: (K,) bool, the step draws one normal of the latents' shape from the request's
            stream, even where its coefficient is 0.
        known_step: (K, 2) float32, coefficients of (known latents, their noise) that give the
            known picture at the noise level after the step, in the sampler's own space; (1, 0)
            after the last step.
        init: (2,) float32, the first sample is ``init[0] * known + init[1] * noise``.
        init_noise_sigma: the first sample of a run from noise alone is this times noise. Where
            no picture is given it equals ``init[1]``; diffusers' inpainting at strength 1 also
            starts so, unlike its image-to-image at strength 1.
    """

    timesteps: npt.NDArray[np.float32]
    input_scale: npt.NDArray[np.float32]
    step: npt.NDArray[np.float32]
    draws_noise: npt.NDArray[np.bool_]
    known_step: npt.NDArray[np.float32]
    init: npt.NDArray[np.float32]
    init_noise_sigma: float
    denoised_in_memory: bool = True


FALLBACK_SAMPLER = "dpm++2m"
"""Stands in for scheduler classes that are no table, PNDM above all: deterministic, multistep."""

_SAMPLER_OF_CLASS = MappingProxyType(
    {
        "EulerDiscreteScheduler": "euler",
        "EulerAncestralDiscreteScheduler": "euler_a",
        "LCMScheduler": "lcm",
        "TCDScheduler": "tcd",
        "DDIMScheduler": "ddim",
        "DPMSolverSinglestepScheduler": "dpm++2s",
        "UniPCMultistepScheduler": "unipc",
        "HeunDiscreteScheduler": "heun",
        "KDPM2DiscreteScheduler": "dpm2",
        "KDPM2AncestralDiscreteScheduler": "dpm2_a",
        "FlowMatchEulerDiscreteScheduler": "euler",
        "FlowMatchHeunDiscreteScheduler": "heun",
    }
)


def default_sampler(scheduler_config: Mapping[str, Any]) -> str:
    """Names the sampler that a pipeline's own scheduler is, or the nearest one.

    Args:
        scheduler_config: the content of ``scheduler/scheduler_config.json``.

    Returns:
        A key of :data:`SAMPLERS`, for flow matching of :data:`FLOW_SAMPLERS`;
        :data:`FALLBACK_SAMPLER` for classes that have no table.

    Raises:
        ModelError: the class trains on a noise schedule that no sampler here supports.
    """
    sampler_options.check_class(scheduler_config)
    name = str(scheduler_config.get("_class_name"))
    if name == "DEISMultistepScheduler":
        return "deis3" if scheduler_config.get("solver_order") == 3 else "deis"
    if name != "DPMSolverMultistepScheduler":
        return _SAMPLER_OF_CLASS.get(name, FALLBACK_SAMPLER)
    stochastic = str(scheduler_config.get("algorithm_type", "")).startswith("sde-")
    karras = "_karras" if scheduler_config.get("use_karras_sigmas") else ""
    return ("dpm++sde" if stochastic else "dpm++2m") + karras


def build_step_table(
    name: str,
    scheduler_config: Mapping[str, Any],
    num_inference_steps: int,
    *,
    strength: float | None = None,
    image_tokens: int | None = None,
) -> StepTable:
    """Computes every step of a run.

    Args:
        name: a key of :data:`SAMPLERS`, or for a flow-matching scheduler of
            :data:`FLOW_SAMPLERS`, with or without ``_<spacing>``;
            :func:`closeup.sampler_names.resolve_sampler_name` makes one of what users write.
        scheduler_config: the content of the pipeline's ``scheduler/scheduler_config.json``.
        num_inference_steps: steps at strength 1, at least 1.
        strength: None for text-to-image; else 0..1, the part of the steps that image-to-image
            runs, counted from the end: ``int(num_inference_steps * strength)``; flow matching
            rounds up instead.
        image_tokens: length of the packed latents' sequence, for flow-matching schedulers whose
            shift depends on the resolution; others ignore it.

    Returns:
        The table; empty when the strength leaves no step, and then the input is the result.

    Raises:
        RequestError: an unknown name, or steps or strength out of range.
        ModelError: the pipeline's configuration is not supported by this sampler.
        ValueError: ``image_tokens`` is needed and missing.
    """
    flow = sampler_options.is_flow(scheduler_config)
    sampler = find_sampler(name, flow=flow)
    options = _resolve(name, sampler, scheduler_config)
    if flow:
        options = sampler_flow.resolve_shift(options, image_tokens)
    _check_run(options, num_inference_steps, strength)
    schedule = sampler.build_schedule(options, num_inference_steps)
    begin = _begin_index(schedule, num_inference_steps, strength)
    steps = range(begin, len(schedule.timesteps))
    with np.errstate(divide="ignore", invalid="ignore"):  # _finish refuses what is not finite
        done = [sampler.step(schedule, i, i - begin, options) for i in steps]
    rows = np.array([step.rows for step in done]).reshape(-1, 3, 5)
    if not np.isfinite(rows).all():
        raise ModelError(
            f"{name} cannot start or end where scheduler_config.json puts it: prediction_type = "
            f"{options.prediction_type!r} on a noise schedule whose last timestep holds no signal "
            "needs a v_prediction model, and a multistep sampler lower_order_final."
        )
    known = np.concatenate([schedule.levels[begin + 1 : -1], [[1.0, 0.0]]])
    init = (0.0, schedule.init_noise_sigma) if strength is None else schedule.levels[begin]
    return StepTable(
        timesteps=schedule.timesteps[begin:].astype(np.float32),
        input_scale=schedule.input_scale[begin:].astype(np.float32),
        step=rows.astype(np.float32),
        draws_noise=np.array([step.draws_noise for step in done], np.bool_),
        known_step=known[: len(done)].astype(np.float32),
        init=np.array(init if done else (1.0, 0.0), np.float32),
        init_noise_sigma=schedule.init_noise_sigma,
        denoised_in_memory=sampler.denoised_in_memory,
    )


def recall_step_table(
    name: str,
    scheduler_config: Mapping[str, Any],
    num_inference_steps: int,
    *,
    strength: float | None = None,
    image_tokens: int | None = None,
) -> StepTable:
    """Returns :func:`build_step_table`'s table, from memory where it was asked for before.

    A request needs its table when it is checked and when it runs, and the same again for each
    face; requests mostly keep a model's steps and sampler.

    Args:
        name: as there.
        scheduler_config: as there; plain JSON.
        num_inference_steps: as there.
        strength: as there.
        image_tokens: as there.

    Returns:
        The table; its arrays are read-only.

    Raises:
        RequestError, ModelError, ValueError: as there.
    """
    config = json.dumps(scheduler_config, sort_keys=True)
    return _recall(name, config, num_inference_steps, strength, image_tokens)


@lru_cache(maxsize=256)  # a table of 50 steps takes 5 kB
def _recall(
    name: str, config: str, num_inference_steps: int, strength: float | None, tokens: int | None
) -> StepTable:
    table = build_step_table(
        name, json.loads(config), num_inference_steps, strength=strength, image_tokens=tokens
    )
    for array in (table.timesteps, table.input_scale, table.step, table.draws_noise,
                  table.known_step, table.init):  # fmt: skip
        array.setflags(write=False)
    return table


def _resolve(name: str, sampler: Sampler, scheduler_config: Mapping[str, Any]) -> SchedulerOptions:
    options = sampler_options.resolve_options(sampler.defaults, scheduler_config, sampler.overrides)
    if options.prediction_type not in sampler.prediction_types:
        raise ModelError(
            f"scheduler_config.json has prediction_type = {options.prediction_type!r}, which "
            f"{name} does not support; choose another sampler."
        )
    return options


def _check_run(options: SchedulerOptions, n: int, strength: float | None) -> None:
    problems = {}
    if not 1 <= n <= options.num_train_timesteps:
        problems["steps"] = (
            f"{n} was given; expected 1 to {options.num_train_timesteps}, the model's timesteps."
        )
    if strength is not None and not 0 <= strength <= 1:
        problems["denoising_strength"] = f"{strength} was given; expected 0 to 1."
    if problems:
        raise RequestError(problems)


def _begin_index(schedule: Schedule, n: int, strength: float | None) -> int:
    """Index of the first step: image-to-image skips whole steps at the noisy end."""
    if strength is None:
        return 0
    if schedule.counts_up:
        skipped = int(max(n - min(n * strength, n), 0))
    else:
        skipped = n - min(int(n * strength), n)
    return min(skipped * schedule.order, len(schedule.timesteps))
