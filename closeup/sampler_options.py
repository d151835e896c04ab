"""What a pipeline's ``scheduler_config.json`` means to one of our samplers.

diffusers builds a sampler for a pipeline with
``Target.from_config(Source.from_pretrained(folder).config)``. A key that the file does not hold
is filled with the source class's default, remembered as such, and dropped again on the way to
the target: so a missing key always takes the *target's* default, and every key that is in the
file reaches the target if the target knows it. :func:`resolve_options` does the same without
diffusers.

Source: diffusers 0.39 ``ConfigMixin.extract_init_dict`` and the ``__init__`` defaults of each
scheduler named below.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from closeup.errors import ModelError


@dataclass(frozen=True, kw_only=True, slots=True)
class SchedulerOptions:
    """The resolved options of one sampler; keys its scheduler class lacks keep these defaults.

    The names are those of diffusers' scheduler configurations. Hashable, so that what is
    computed from it can be cached.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: tuple[float, ...] | None = None
    prediction_type: str = "epsilon"
    timestep_spacing: str = "linspace"
    steps_offset: int = 0
    rescale_betas_zero_snr: bool = False
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_lu_lambdas: bool = False
    sigma_min: float | None = None
    sigma_max: float | None = None
    final_sigmas_type: str = "zero"
    algorithm_type: str = "dpmsolver++"
    solver_order: int = 2
    solver_type: str = "midpoint"
    lower_order_final: bool = True
    euler_at_final: bool = False
    lambda_min_clipped: float = -float("inf")
    set_alpha_to_one: bool = True
    original_inference_steps: int = 50
    timestep_scaling: float = 10.0


_SHARED = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "timestep_spacing": "linspace",
    "steps_offset": 0,
    "rescale_betas_zero_snr": False,
}
_SIGMA_SPACING = {
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "sigma_min": None,
    "sigma_max": None,
    "final_sigmas_type": "zero",
}
_CONSISTENCY = {
    **_SHARED,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "original_inference_steps": 50,
    "clip_sample": False,
    "thresholding": False,
    "timestep_scaling": 10.0,
}

# One record a diffusers scheduler class: the keys that change what it computes, and its defaults.
EULER = MappingProxyType(
    {**_SHARED, **_SIGMA_SPACING, "interpolation_type": "linear", "timestep_type": "discrete"}
)
EULER_ANCESTRAL = MappingProxyType(_SHARED)
# sigma_min and sigma_max are no arguments of DPMSolverMultistep, yet its Karras and exponential
# spacings use them when the pipeline's file holds them.
DPM_MULTISTEP = MappingProxyType(
    {
        **_SHARED,
        **_SIGMA_SPACING,
        "algorithm_type": "dpmsolver++",
        "solver_order": 2,
        "solver_type": "midpoint",
        "lower_order_final": True,
        "euler_at_final": False,
        "use_lu_lambdas": False,
        "use_flow_sigmas": False,
        "thresholding": False,
        "lambda_min_clipped": -float("inf"),
        "variance_type": None,
    }
)
LCM = MappingProxyType(_CONSISTENCY)
TCD = MappingProxyType(_CONSISTENCY)
DDIM = MappingProxyType(
    {
        **_SHARED,
        "clip_sample": True,
        "set_alpha_to_one": True,
        "thresholding": False,
        "timestep_spacing": "leading",
    }
)

# Keys whose other values make a step nonlinear or need what is not built: key -> refused values.
_REFUSED: Mapping[str, tuple[object, ...]] = MappingProxyType(
    {
        "clip_sample": (True,),
        "thresholding": (True,),
        "use_beta_sigmas": (True,),
        "use_flow_sigmas": (True,),
        "variance_type": ("learned", "learned_range"),
    }
)
# Keys with a closed list of values: key -> the values that are supported.
_ALLOWED: Mapping[str, tuple[object, ...]] = MappingProxyType(
    {
        "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
        "prediction_type": ("epsilon", "v_prediction", "sample"),
        "timestep_spacing": ("linspace", "leading", "trailing"),
        "final_sigmas_type": ("zero", "sigma_min"),
        "interpolation_type": ("linear",),
        "timestep_type": ("discrete",),
        "solver_order": (1, 2, 3),
        "solver_type": ("midpoint", "heun", "logrho", "bh1", "bh2"),
    }
)
# Scheduler classes whose training noise follows betas; others (flow matching, EDM) do not, and
# reading their files with these keys would silently sample from the wrong schedule.
_BETA_CLASSES = frozenset(
    f"{stem}Scheduler"
    for stem in (
        "DDIM DDIMParallel DDPM DDPMParallel PNDM LMSDiscrete EulerDiscrete HeunDiscrete "
        "EulerAncestralDiscrete DPMSolverMultistep DPMSolverSinglestep KDPM2Discrete "
        "KDPM2AncestralDiscrete DEISMultistep UniPCMultistep DPMSolverSDE SASolver LCM TCD"
    ).split()
)


def resolve_options(
    defaults: Mapping[str, Any], scheduler_config: Mapping[str, Any], overrides: Mapping[str, Any]
) -> SchedulerOptions:
    """Fills a scheduler class's options from a pipeline's configuration file.

    Args:
        defaults: the target class's keys and defaults, one of this module's records.
        scheduler_config: the content of ``scheduler/scheduler_config.json``.
        overrides: what the sampler's name fixes, e.g. ``{"use_karras_sigmas": True}``.

    Returns:
        Options whose every value is supported.

    Raises:
        ModelError: the file names a scheduler class, key or value that is not supported.
    """
    check_class(scheduler_config)
    dropped = scheduler_config.get("_use_default_values", ())
    given = {k: v for k, v in scheduler_config.items() if k in defaults and k not in dropped}
    values = {**defaults, **_undo_solver_type(scheduler_config, given), **overrides}
    for key, value in values.items():
        _check_value(key, value)
    known = SchedulerOptions.__dataclass_fields__
    options = {k: _typed(k, v, known[k].default) for k, v in values.items() if k in known}
    _check_spacings(options)
    return SchedulerOptions(**options)


def check_class(scheduler_config: Mapping[str, Any]) -> None:
    """Refuses a configuration whose scheduler class trains on no beta schedule.

    Raises:
        ModelError: naming the class.
    """
    name = scheduler_config.get("_class_name")
    if name is not None and name not in _BETA_CLASSES:
        raise ModelError(
            f"scheduler_config.json has _class_name {name!r}, whose noise schedule is not "
            "supported; use a pipeline with one of "
            f"{', '.join(sorted(_BETA_CLASSES))}."
        )


def _undo_solver_type(scheduler_config: Mapping[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Loading DEIS or UniPC replaces ``solver_type`` by their own, which DPM reads as midpoint."""
    if scheduler_config.get("_class_name") in ("DEISMultistepScheduler", "UniPCMultistepScheduler"):
        return {k: v for k, v in given.items() if k != "solver_type"}
    return given


def _check_value(key: str, value: object) -> None:
    allowed = _ALLOWED.get(key)
    if value in _REFUSED.get(key, ()) or (allowed is not None and value not in allowed):
        expected = f"use one of {allowed}" if allowed else "leave the key out"
        raise ModelError(
            f"scheduler_config.json has {key} = {value!r}, which this sampler does not support; "
            f"{expected}."
        )


def _check_spacings(options: Mapping[str, Any]) -> None:
    exclusive = ("use_karras_sigmas", "use_exponential_sigmas")
    chosen = [key for key in exclusive if options.get(key)]
    if len(chosen) > 1:
        raise ModelError(
            f"scheduler_config.json together with this sampler asks for {' and '.join(chosen)}; "
            "keep one of them."
        )


def _typed(key: str, value: Any, default: object) -> Any:
    """The value as the option's type, or a ModelError: a string "false" must not become true."""
    if key == "trained_betas":
        return None if value is None else tuple(float(beta) for beta in value)
    if key == "solver_type":
        return value if value == "heun" else "midpoint"
    if default is None or isinstance(default, float):
        accepted = isinstance(value, (int, float)) and not isinstance(value, bool)
        accepted = accepted or (value is None and default is None)
    elif isinstance(default, bool):
        value = False if value is None else value
        accepted = isinstance(value, bool)
    else:
        accepted = isinstance(value, type(default)) and not isinstance(value, bool)
    if not accepted:
        raise ModelError(
            f"scheduler_config.json has {key} = {value!r}; expected a value like {default!r}."
        )
    return value
