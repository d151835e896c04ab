"""Which samplers there are: one entry says all that distinguishes a sampler from the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from closeup import (
    sampler_flow,
    sampler_midpoints,
    sampler_multistep,
    sampler_options,
    sampler_schedules,
    sampler_steps,
)
from closeup.errors import RequestError
from closeup.sampler_options import SchedulerOptions
from closeup.sampler_schedules import Schedule
from closeup.sampler_steps import StepFunction


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampler:
    """One sampler: a diffusers scheduler class with what its name fixes.

    Attributes:
        defaults: keys and defaults of the scheduler class.
        overrides: options that the name fixes, whatever the pipeline's file says.
        build_schedule: options and steps -> schedule.
        step: the algorithm.
        prediction_types: what the network may predict.
        spacings: keys of :data:`SPACINGS` that exist for it.
        denoised_in_memory: as in :class:`StepTable`.
    """

    defaults: Mapping[str, Any]
    overrides: Mapping[str, Any] = field(default_factory=dict)
    build_schedule: Callable[[SchedulerOptions, int], Schedule]
    step: StepFunction
    prediction_types: tuple[str, ...] = ("epsilon", "v_prediction", "sample")
    spacings: tuple[str, ...] = ()
    denoised_in_memory: bool = True


# What the end of a name fixes: spacing -> options.
_OWN_SPACING = {
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_lu_lambdas": False,
}
SPACINGS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "karras": {**_OWN_SPACING, "use_karras_sigmas": True},
        "exponential": {
            **_OWN_SPACING,
            "use_exponential_sigmas": True,
            "timestep_spacing": "linspace",
        },
        "beta": {**_OWN_SPACING, "use_beta_sigmas": True, "timestep_spacing": "linspace"},
        "sgm_uniform": {**_OWN_SPACING, "timestep_spacing": "trailing"},
    }
)
"""Spacings of the noise levels: ``<sampler>_<spacing>`` names one, where the sampler has it.

Source: diffusers' documentation, schedulers overview, which names A1111's spacings so.
"""

_ALL = tuple(SPACINGS)
_SIGMAS = ("karras", "exponential", "beta")


def _dpm(algorithm_type: str = "dpmsolver++", **overrides: Any) -> Sampler:
    return Sampler(
        defaults=sampler_options.DPM_MULTISTEP,
        overrides={"algorithm_type": algorithm_type, **overrides},
        build_schedule=sampler_schedules.build_dpm_schedule,
        step=sampler_steps.step_dpm_multistep,
        spacings=() if overrides.get("use_karras_sigmas") else _ALL,
    )


def _deis(order: int) -> Sampler:
    return Sampler(
        defaults=sampler_options.DEIS,
        overrides={"solver_order": order},
        build_schedule=sampler_schedules.build_deis_schedule,
        step=sampler_multistep.step_deis,
        spacings=_ALL,
        denoised_in_memory=order < 3,
    )


SAMPLERS: Mapping[str, Sampler] = MappingProxyType(
    {
        "euler": Sampler(
            defaults=sampler_options.EULER,
            build_schedule=sampler_schedules.build_euler_schedule,
            step=sampler_steps.step_euler,
            spacings=_ALL,
        ),
        "euler_a": Sampler(
            defaults=sampler_options.EULER_ANCESTRAL,
            build_schedule=sampler_schedules.build_euler_schedule,
            step=sampler_steps.step_euler_ancestral,
            prediction_types=("epsilon", "v_prediction"),
            spacings=("sgm_uniform",),
        ),
        "dpm++2m": _dpm(use_karras_sigmas=False),
        "dpm++2m_karras": _dpm(use_karras_sigmas=True),
        "dpm++sde": _dpm("sde-dpmsolver++", use_karras_sigmas=False),
        "dpm++sde_karras": _dpm("sde-dpmsolver++", use_karras_sigmas=True),
        "lcm": Sampler(
            defaults=sampler_options.LCM,
            build_schedule=sampler_schedules.build_consistency_schedule,
            step=sampler_steps.step_lcm,
        ),
        "tcd": Sampler(
            defaults=sampler_options.TCD,
            build_schedule=sampler_schedules.build_consistency_schedule,
            step=sampler_steps.step_ddim,
        ),
        "ddim": Sampler(
            defaults=sampler_options.DDIM,
            overrides={"clip_sample": False},
            build_schedule=sampler_schedules.build_ddim_schedule,
            step=sampler_steps.step_ddim,
            spacings=("sgm_uniform",),
        ),
        "dpm++2m_sde": _dpm("sde-dpmsolver++", solver_order=2),
        "dpm++3m": _dpm(solver_order=3),
        "dpm++3m_sde": _dpm("sde-dpmsolver++", solver_order=3),
        "dpm++2s": Sampler(
            defaults=sampler_options.DPM_SINGLESTEP,
            overrides={"algorithm_type": "dpmsolver++", "solver_order": 2},
            build_schedule=sampler_schedules.build_singlestep_schedule,
            step=sampler_midpoints.step_dpm_singlestep,
            spacings=_SIGMAS,
        ),
        "unipc": Sampler(
            defaults=sampler_options.UNIPC,
            overrides={"solver_order": 2},
            build_schedule=sampler_schedules.build_unipc_schedule,
            step=sampler_multistep.step_unipc,
            spacings=_ALL,
        ),
        "deis": _deis(2),
        "deis3": _deis(3),
        "heun": Sampler(
            defaults=sampler_options.HEUN,
            overrides={"clip_sample": False},
            build_schedule=sampler_midpoints.build_heun_schedule,
            step=sampler_midpoints.step_heun,
            spacings=_ALL,
        ),
        "dpm2": Sampler(
            defaults=sampler_options.KDPM2,
            build_schedule=sampler_midpoints.build_dpm2_schedule,
            step=sampler_midpoints.step_dpm2,
            prediction_types=("epsilon", "v_prediction"),
            spacings=_ALL,
        ),
        "dpm2_a": Sampler(
            defaults=sampler_options.KDPM2,
            build_schedule=sampler_midpoints.build_dpm2_ancestral_schedule,
            step=sampler_midpoints.step_dpm2_ancestral,
            prediction_types=("epsilon", "v_prediction"),
            spacings=_ALL,
        ),
    }
)
"""Samplers by the name that requests use, in the order they are listed to users."""

FLOW_SAMPLERS: Mapping[str, Sampler] = MappingProxyType(
    {
        "euler": Sampler(
            defaults=sampler_options.FLOW_EULER,
            overrides={"prediction_type": "flow_prediction"},
            build_schedule=sampler_flow.build_flow_euler_schedule,
            step=sampler_flow.step_flow_euler,
            prediction_types=("flow_prediction",),
            spacings=_SIGMAS,
        ),
        "heun": Sampler(
            defaults=sampler_options.FLOW_HEUN,
            overrides={"prediction_type": "flow_prediction"},
            build_schedule=sampler_flow.build_flow_heun_schedule,
            step=sampler_midpoints.step_heun,
            prediction_types=("flow_prediction",),
        ),
        "dpm++2m": Sampler(
            defaults=sampler_options.FLOW_DPM,
            overrides={"prediction_type": "flow_prediction", "solver_order": 2},
            build_schedule=sampler_flow.build_flow_dpm_schedule,
            step=sampler_steps.step_dpm_multistep,
            prediction_types=("flow_prediction",),
        ),
    }
)
"""The forms that samplers have for flow-matching models."""


def find_sampler(name: str, *, flow: bool = False) -> Sampler:
    """Looks a sampler up by its canonical name.

    Args:
        name: a key of :data:`SAMPLERS`, or of :data:`FLOW_SAMPLERS`, with or without a spacing.
        flow: for a flow-matching model.

    Returns:
        The sampler; a spacing in the name is among its overrides.

    Raises:
        RequestError: no such sampler, or it has no such spacing.
    """
    samplers = FLOW_SAMPLERS if flow else SAMPLERS
    if name in samplers:
        return samplers[name]
    for spacing, fixed in SPACINGS.items():
        base = samplers.get(name.removesuffix(f"_{spacing}"))
        if base is not None and spacing in base.spacings:
            return replace(base, overrides={**base.overrides, **fixed})
    raise RequestError({"scheduler": f"{name!r} is unknown; use one of {', '.join(samplers)}."})
