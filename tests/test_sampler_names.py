"""What users call samplers."""

from __future__ import annotations

import pytest

from closeup.errors import RequestError
from closeup.sampler_names import (
    ALIASES,
    SPACING_ALIASES,
    list_sampler_names,
    resolve_sampler_name,
)
from closeup.samplers import FLOW_SAMPLERS, SAMPLERS, SPACINGS, build_step_table
from tests.sampler_reference import FLUX_DEV, LATER_NAMES, REFERENCES, SD15

API = ("euler", "euler_a", "dpm++2m_karras", "dpm++sde_karras", "dpm++2m", "dpm++sde", "lcm", "tcd")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("DPM++ 2M Karras", "dpm++2m_karras"),
        ("dpmpp_2m_karras", "dpm++2m_karras"),
        ("DPMSolverMultistepScheduler", "dpm++2m"),
        ("Euler a", "euler_a"),
        ("euler_ancestral", "euler_a"),
        ("EulerAncestralDiscreteScheduler", "euler_a"),
        ("EULER", "euler"),
        ("k_euler", "euler"),
        ("Euler Normal", "euler"),
        ("Euler SGM Uniform", "euler_sgm_uniform"),
        ("euler simple", "euler_sgm_uniform"),
        ("DPM++ SDE", "dpm++sde"),
        ("DPM++ 2M SDE Exponential", "dpm++2m_sde_exponential"),
        ("dpmpp_2m_sde_gpu", "dpm++2m_sde"),
        ("DPM++ 3M SDE Karras", "dpm++3m_sde_karras"),
        ("UniPC", "unipc"),
        ("uni_pc", "unipc"),
        ("UniPCMultistepScheduler", "unipc"),
        ("DPM2 a Karras", "dpm2_a_karras"),
        ("KDPM2AncestralDiscreteScheduler", "dpm2_a"),
        ("dpm_2", "dpm2"),
        ("Heun Beta", "heun_beta"),
        ("DEISMultistepScheduler", "deis"),
        ("DDIM trailing", "ddim_sgm_uniform"),
        ("LCM Sampler", "lcm"),
    ],
)
def test_resolve_sampler_name_finds_the_sampler_when_users_write_it_their_way(
    text: str, expected: str
) -> None:
    assert resolve_sampler_name(text, flow=False) == (expected, None)


@pytest.mark.parametrize("flow", [False, True])
def test_resolve_sampler_name_keeps_every_canonical_name(flow: bool) -> None:
    for name in list_sampler_names(flow=flow):
        assert resolve_sampler_name(name, flow=flow) == (name, None)
        config = FLUX_DEV if flow else SD15
        assert len(build_step_table(name, config, 4, image_tokens=64).timesteps) in (4, 7)


def test_alias_table_covers_every_sampler_and_spacing() -> None:
    listed = {name for name in SAMPLERS if not name.endswith("_karras")}
    assert set(ALIASES) == listed
    assert set(SPACING_ALIASES) == {*SPACINGS, ""}
    assert set(FLOW_SAMPLERS) <= set(ALIASES)
    assert set(REFERENCES) == set(SAMPLERS)
    assert set(LATER_NAMES).isdisjoint(API)


@pytest.mark.parametrize("text", [*API, "UniPC", "DPM++ 2S a Karras", "lcm karras", "PNDM"])
def test_resolve_sampler_name_finds_a_form_when_the_model_is_one_of_flow(text: str) -> None:
    name, note = resolve_sampler_name(text, flow=True)
    build_step_table(name, FLUX_DEV, 4, image_tokens=64)
    assert (note is None) == (text in FLOW_SAMPLERS)
    assert note is None or text in note


def test_resolve_sampler_name_keeps_the_form_when_only_the_spacing_is_missing() -> None:
    name, note = resolve_sampler_name("dpm++2m_karras", flow=True)
    assert name == "dpm++2m"
    assert note is not None
    assert "karras" in note
    assert resolve_sampler_name("Euler Simple", flow=True) == ("euler", None)
    assert resolve_sampler_name("Euler Beta", flow=True) == ("euler_beta", None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("DPM++ 2S a Karras", "dpm++2s_karras"), ("PNDMScheduler", "dpm++2m"), ("plms", "dpm++2m")],
)
def test_resolve_sampler_name_says_so_when_another_sampler_stands_in(
    text: str, expected: str
) -> None:
    name, note = resolve_sampler_name(text, flow=False)
    assert name == expected
    assert note is not None
    assert text in note


@pytest.mark.parametrize(
    ("text", "nearest"),
    [
        ("dpm++2m_sde_karas", "dpm++2m_sde_karras"),
        ("uler", "euler"),
        ("unpic", "unipc"),
        ("", "lcm"),
        ("x" * 100_000, "lcm"),
    ],
)
@pytest.mark.parametrize("flow", [False, True])
def test_resolve_sampler_name_names_the_nearest_when_unknown(
    text: str, nearest: str, flow: bool
) -> None:
    with pytest.raises(RequestError) as caught:
        resolve_sampler_name(text, flow=flow)
    (sentence,) = caught.value.problems.values()
    assert list(caught.value.problems) == ["scheduler"]
    assert len(sentence) < 450
    told, allowed = sentence.split("; allowed are ")
    if nearest != "lcm":
        assert f" {nearest}" in told
    assert set(allowed.removesuffix(", and their spacings.").split(", ")) == set(SAMPLERS)


def test_resolve_sampler_name_lists_the_spacings_when_the_sampler_lacks_one() -> None:
    with pytest.raises(RequestError, match="no karras spacing; use euler_a or euler_a_sgm_uniform"):
        resolve_sampler_name("Euler a Karras", flow=False)
