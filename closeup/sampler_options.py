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
    use_beta_sigmas: bool = False
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
    shift: float = 1.0
    use_dynamic_shifting: bool = False
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    shift_terminal: float | None = None
    time_shift_type: str = "exponential"


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


def _without(record: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in keys}


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
# sigma_min and sigma_max are no arguments of most classes, yet their Karras, exponential and beta
# spacings use them when the pipeline's file holds them.
_SOLVER = {
    "algorithm_type": "dpmsolver++",
    "solver_order": 2,
    "solver_type": "midpoint",
    "lower_order_final": True,
    "use_flow_sigmas": False,
    "thresholding": False,
}
DPM_MULTISTEP = MappingProxyType(
    {
        **_SHARED,
        **_SIGMA_SPACING,
        **_SOLVER,
        "euler_at_final": False,
        "use_lu_lambdas": False,
        "lambda_min_clipped": -float("inf"),
        "variance_type": None,
    }
)
DPM_SINGLESTEP = MappingProxyType(
    {
        **_without(_SHARED, "timestep_spacing", "steps_offset", "rescale_betas_zero_snr"),
        **_SIGMA_SPACING,
        **_SOLVER,
        "lower_order_final": False,
        "lambda_min_clipped": -float("inf"),
        "variance_type": None,
    }
)
UNIPC = MappingProxyType(
    {
        **_SHARED,
        **_SIGMA_SPACING,
        **_without(_SOLVER, "algorithm_type"),
        "solver_type": "bh2",
        "predict_x0": True,
        "disable_corrector": [],
        "solver_p": None,
    }
)
DEIS = MappingProxyType(
    {
        **_without(_SHARED, "rescale_betas_zero_snr"),
        **_without(_SIGMA_SPACING, "final_sigmas_type"),
        **_without(_SOLVER, "algorithm_type", "solver_type"),
    }
)
KDPM2 = MappingProxyType(
    {
        **_without(_SHARED, "rescale_betas_zero_snr"),
        **_without(_SIGMA_SPACING, "final_sigmas_type"),
        "beta_start": 0.00085,
        "beta_end": 0.012,
    }
)
HEUN = MappingProxyType({**KDPM2, "clip_sample": False})
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

# Flow matching: the file is always one of flow Euler, and DPM-Solver and Heun borrow from it. The
# pipelines read the four keys of the resolution-dependent shift whatever the class.
FLOW_EULER = MappingProxyType(
    {
        "num_train_timesteps": 1000,
        "shift": 1.0,
        "use_dynamic_shifting": False,
        "base_shift": 0.5,
        "max_shift": 1.15,
        "base_image_seq_len": 256,
        "max_image_seq_len": 4096,
        "time_shift_type": "exponential",
        "shift_terminal": None,
        "use_karras_sigmas": False,
        "use_exponential_sigmas": False,
        "use_beta_sigmas": False,
        "invert_sigmas": False,
        "stochastic_sampling": False,
    }
)
FLOW_HEUN = MappingProxyType({"num_train_timesteps": 1000, "shift": 1.0})
FLOW_DPM = MappingProxyType(
    {
        **{key: value for key, value in FLOW_EULER.items() if "sigmas" not in key},
        **_without(_SOLVER, "use_flow_sigmas"),
        "euler_at_final": False,
        "final_sigmas_type": "zero",
        "use_lu_lambdas": False,
    }
)

# Keys whose other values make a step nonlinear or need what is not built: key -> refused values.
_REFUSED: Mapping[str, tuple[object, ...]] = MappingProxyType(
    {
        "clip_sample": (True,),
        "thresholding": (True,),
        "use_flow_sigmas": (True,),
        "predict_x0": (False,),
        "invert_sigmas": (True,),
        "stochastic_sampling": (True,),
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
        "disable_corrector": ([], None),
        "solver_p": (None,),
        "time_shift_type": ("exponential", "linear"),
    }
)
_SOLVER_TYPES = {
    "DPMSolverMultistepScheduler": ("midpoint", "heun"),
    "DPMSolverSinglestepScheduler": ("midpoint", "heun"),
    "DEISMultistepScheduler": ("logrho",),
    "UniPCMultistepScheduler": ("bh2", "bh1"),
}
_FLOW_CLASSES = frozenset({"FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"})
# Scheduler classes whose training noise follows betas; others (EDM) do not, and reading their files
# with these keys would silently sample from the wrong schedule.
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
    given = _undo_solver_type(scheduler_config, given)
    fixed = {k: v for k, v in overrides.items() if k in SchedulerOptions.__dataclass_fields__}
    values = {**defaults, **given, **fixed}
    for key, value in values.items():
        if key not in overrides:
            _check_value(key, value)
    known = SchedulerOptions.__dataclass_fields__
    options = {k: _typed(k, v, known[k].default) for k, v in values.items() if k in known}
    options["solver_type"] = _solver_type(defaults, values)
    _check_spacings(options)
    return SchedulerOptions(**options)


def check_class(scheduler_config: Mapping[str, Any]) -> None:
    """Refuses a configuration whose scheduler class trains on a noise schedule not known here.

    Raises:
        ModelError: naming the class.
    """
    name = scheduler_config.get("_class_name")
    known = _BETA_CLASSES | _FLOW_CLASSES
    if name is not None and name not in known:
        raise ModelError(
            f"scheduler_config.json has _class_name {name!r}, whose noise schedule is not "
            f"supported; use a pipeline with one of {', '.join(sorted(known))}."
        )


def is_flow(scheduler_config: Mapping[str, Any]) -> bool:
    """Tells whether a pipeline's scheduler is one of flow matching."""
    return scheduler_config.get("_class_name") in _FLOW_CLASSES


def _undo_solver_type(scheduler_config: Mapping[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Loading a solver replaces the ``solver_type`` of another solver by its own default."""
    kept = _SOLVER_TYPES.get(str(scheduler_config.get("_class_name")), ())
    foreign = kept and given.get("solver_type") in _ALLOWED["solver_type"]
    if not foreign or given["solver_type"] in kept:
        return given
    return {**given, "solver_type": kept[0]}


def _solver_type(defaults: Mapping[str, Any], values: Mapping[str, Any]) -> str:
    """The target's solver type: a value that belongs to another class takes the target's own."""
    default = str(defaults.get("solver_type", "midpoint"))
    own = ("bh1", "bh2") if default == "bh2" else ("midpoint", "heun")
    value = str(values.get("solver_type"))
    return value if value in own else default


def _check_value(key: str, value: object) -> None:
    allowed = _ALLOWED.get(key)
    if value in _REFUSED.get(key, ()) or (allowed is not None and value not in allowed):
        expected = f"use one of {allowed}" if allowed else "leave the key out"
        raise ModelError(
            f"scheduler_config.json has {key} = {value!r}, which this sampler does not support; "
            f"{expected}."
        )


def _check_spacings(options: Mapping[str, Any]) -> None:
    exclusive = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
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
