"""What users call samplers: names of Astria, diffusers, AUTOMATIC1111, ComfyUI and k-diffusion.

A name is a sampler and, behind it, perhaps a spacing of the noise levels. Case, spaces and
punctuation do not matter: "DPM++ 2M Karras", "dpmpp_2m_karras" and "dpm++2m-karras" are one.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from types import MappingProxyType

from closeup.errors import RequestError
from closeup.sampler_table import FLOW_SAMPLERS, SAMPLERS, SPACINGS

ALIASES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "euler": ("k_euler", "EulerDiscrete", "FlowMatchEulerDiscrete", "FlowMatchEuler", "flow"),
        "euler_a": ("euler_ancestral", "k_euler_a", "k_euler_ancestral", "EulerAncestralDiscrete"),
        "dpm++2m": ("dpmpp", "k_dpmpp_2m", "DPMSolverMultistep", "DPMSolver++"),
        "dpm++sde": ("k_dpmpp_sde",),
        "dpm++2m_sde": ("k_dpmpp_2m_sde", "dpmpp_2m_sde_gpu", "sde-dpmsolver++"),
        "dpm++3m": ("k_dpmpp_3m",),
        "dpm++3m_sde": ("k_dpmpp_3m_sde", "dpmpp_3m_sde_gpu"),
        "dpm++2s": ("k_dpmpp_2s", "DPMSolverSinglestep"),
        "unipc": ("uni_pc", "uni_pc_bh2", "UniPCMultistep"),
        "deis": ("deis2", "DEISMultistep"),
        "deis3": (),
        "heun": ("k_heun", "HeunDiscrete", "FlowMatchHeunDiscrete", "FlowMatchHeun"),
        "dpm2": ("k_dpm_2", "KDPM2Discrete"),
        "dpm2_a": ("dpm2_ancestral", "k_dpm_2_a", "k_dpm_2_ancestral", "KDPM2AncestralDiscrete"),
        "lcm": ("k_lcm",),
        "tcd": (),
        "ddim": (),
    }
)
"""Canonical sampler -> other names; a trailing "Scheduler" or "Sampler" is dropped before."""

# Names of samplers that are none of ours, and the one that stands in: name -> (sampler, why).
_STAND_INS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        name: (sampler, why)
        for sampler, why, names in (
            (
                "dpm++2s",
                "its ancestral noise is not implemented",
                ("dpmpp_2s_a", "dpmpp_2s_ancestral", "k_dpmpp_2s_a", "k_dpmpp_2s_ancestral"),
            ),
            ("dpm++sde", "its noise does not come from the seed", ("DPMSolverSDE",)),
            ("dpm++2m", "it looks back further than a step here can", ("PNDM", "PLMS")),
        )
        for name in names
    }
)
SPACING_ALIASES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "karras": (),
        "exponential": ("exp",),
        "beta": (),
        "sgm_uniform": ("sgm", "trailing", "simple"),
        "": ("linear", "default", "automatic", "normal"),
    }
)
"""Spacing -> other names of it; "" is the model's own spacing."""


_LONGEST = 64  # of what is searched for and repeated in messages


def _normalize(text: str) -> str:
    """Letters and digits alone, "++" spelled "pp", without the word scheduler or sampler."""
    plain = re.sub(r"[^a-z0-9]", "", text.lower().replace("++", "pp"))
    return re.sub(r"(scheduler|sampler)$", "", plain)


_SAMPLER_OF = {
    _normalize(name): sampler for sampler, names in ALIASES.items() for name in (sampler, *names)
}
_STAND_IN_OF = {_normalize(name): stand_in for name, stand_in in _STAND_INS.items()}
_SPACING_OF = {
    _normalize(name): spacing
    for spacing, names in SPACING_ALIASES.items()
    for name in (spacing, *names)
}


def resolve_sampler_name(text: str, *, flow: bool) -> tuple[str, str | None]:
    """Finds the sampler that a user means.

    Args:
        text: what the request says.
        flow: the model is one of flow matching. Every sampler has then a stand-in at least.

    Returns:
        name: what :func:`closeup.samplers.build_step_table` takes, and its table records.
        note: one sentence for the user where another sampler or spacing than named will run,
            else None.

    Raises:
        RequestError: no such sampler, naming the nearest; or it does not have this spacing.
    """
    text = text[:_LONGEST]
    sampler, spacing, note = _parse(text)
    if flow:
        return _flow_form(text, sampler, spacing, note)
    name = f"{sampler}_{spacing}" if spacing else sampler
    if name in SAMPLERS or not spacing or spacing in SAMPLERS[sampler].spacings:
        return name, note
    having = [sampler, *(f"{sampler}_{spacing}" for spacing in SAMPLERS[sampler].spacings)]
    raise RequestError(
        {"scheduler": f"{text!r}: {sampler} has no {spacing} spacing; use {' or '.join(having)}."}
    )


def _parse(text: str) -> tuple[str, str, str | None]:
    """The sampler, its spacing ("" if none is named) and a note."""
    plain = _normalize(text)
    for suffix in sorted(_SPACING_OF, key=len, reverse=True):
        base = plain.removesuffix(suffix)
        if not plain.endswith(suffix):
            continue
        if base in _SAMPLER_OF:
            return _SAMPLER_OF[base], _SPACING_OF[suffix], None
        if base in _STAND_IN_OF:
            sampler, why = _STAND_IN_OF[base]
            return sampler, _SPACING_OF[suffix], f"{text!r} was run as {sampler}: {why}."
    raise RequestError(
        {
            "scheduler": f"{text!r} is unknown; the nearest are {', '.join(_nearest(plain))}; "
            f"allowed are {', '.join(SAMPLERS)}, and their spacings."
        }
    )


def _flow_form(text: str, sampler: str, spacing: str, note: str | None) -> tuple[str, str | None]:
    if sampler not in FLOW_SAMPLERS:
        return "euler", f"{text!r} has no form for flow matching: flow Euler was used."
    if spacing in ("", "sgm_uniform"):  # flow matching spaces its levels evenly by itself
        return sampler, note
    if spacing in FLOW_SAMPLERS[sampler].spacings:
        return f"{sampler}_{spacing}", note
    return sampler, (
        f"{text!r}: flow matching has no {spacing} spacing for {sampler}; the model's own was used."
    )


def _nearest(plain: str) -> list[str]:
    """Three canonical names at most, nearest first."""
    names = {**_SAMPLER_OF, **{name: sampler for name, (sampler, _) in _STAND_IN_OF.items()}}
    for sampler, entry in SAMPLERS.items():
        names |= {_normalize(f"{sampler}_{s}"): f"{sampler}_{s}" for s in entry.spacings}
    close = difflib.get_close_matches(plain, names, n=12, cutoff=0.0)
    return list(dict.fromkeys(names[name] for name in close))[:3]


def list_sampler_names(*, flow: bool) -> tuple[str, ...]:
    """Lists every canonical name, with the spacings each sampler has."""
    samplers = FLOW_SAMPLERS if flow else SAMPLERS
    spaced = [f"{name}_{s}" for name, entry in samplers.items() for s in entry.spacings]
    return tuple(dict.fromkeys([*samplers, *spaced]))


__all__ = ["ALIASES", "SPACINGS", "SPACING_ALIASES", "list_sampler_names", "resolve_sampler_name"]
