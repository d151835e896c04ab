"""closeup.samplers against the schedulers of diffusers, step by step."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from closeup.errors import RequestError
from closeup.noise import TorchNormal
from closeup.samplers import (
    FALLBACK_SAMPLER,
    SAMPLERS,
    build_step_table,
    default_sampler,
    recall_step_table,
)
from tests.sampler_reference import (
    API_NAMES,
    REFERENCES,
    SD15,
    SEED,
    SHAPE,
    errors_of_run,
    load_scheduler,
    relative_error,
    start_reference,
    tolerance_of,
    worst_of_run,
)


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
    # Two steps of a second-order sampler end at a sigma by which float32 cannot divide.
    counts = (1, 2, 4, 20, 50) if name in API_NAMES else (1, 4, 16)
    strengths = (None, 0.3, 0.6, 1.0) if name in API_NAMES else (None, 0.6)
    for steps in counts:
        for strength in strengths:
            error, what, k = worst_of_run(
                name, config, scheduler, steps, strength, double=name == "deis3"
            )
            assert error <= tolerance_of(name), (
                f"{what} {k} of {steps} steps at {strength}: {error:.2e}"
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
        assert max(samples) > 100 * tolerance_of(name)


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
    assert relative_error(terms[0], x) <= tolerance_of(name)


@pytest.mark.parametrize("name", REFERENCES)
def test_composited_run_stays_with_diffusers_when_a_part_is_known(
    name: str, tmp_path: Path
) -> None:
    """Second-order samplers and UniPC step from samples that they remembered before or after it."""
    reference = start_reference(load_scheduler(name, SD15, tmp_path), 12, 0.7)
    table = build_step_table(name, SD15, 12, strength=0.7)
    noise, generator = TorchNormal(SEED), torch.Generator().manual_seed(SEED)
    known = np.linspace(-1, 1, int(np.prod(SHAPE)), dtype=np.float32).reshape(SHAPE)
    mask = np.array([0, 0.25, 1, 0.5, 1], np.float32)
    start = noise.randn(SHAPE)
    torch.randn(SHAPE, generator=generator)
    x = reference.begin(known, start)
    terms = np.zeros((5, *SHAPE), np.float32)
    terms[0] = x
    for k in range(len(reference.timesteps)):
        x = reference.step(k, x, np.tanh(x), generator).prev_sample.numpy()
        last = k == len(reference.timesteps) - 1
        level = known if last else reference.add_noise(known, start, k + 1)
        x = np.asarray(mask * x + (1 - mask) * level, np.float32)
        terms[1] = np.tanh(terms[0])
        terms[4] = noise.randn(SHAPE) if table.draws_noise[k] else 0
        rows = np.tensordot(table.step[k], terms, 1)
        ours = table.known_step[k, 0] * known + table.known_step[k, 1] * start
        terms[0], terms[2:4] = mask * rows[0] + (1 - mask) * ours, rows[1:]
    assert relative_error(terms[0], x) <= tolerance_of(name)


@pytest.mark.parametrize("name", REFERENCES)
def test_step_table_has_the_contract_shapes_when_built(name: str) -> None:
    table = build_step_table(name, SD15, 4, strength=0.5)
    k = 3 if name in ("heun", "dpm2", "dpm2_a") else 2
    assert table.timesteps.shape == table.input_scale.shape == table.draws_noise.shape == (k,)
    assert (table.step.shape, table.known_step.shape, table.init.shape) == ((k, 3, 5), (k, 2), (2,))
    arrays = (table.timesteps, table.input_scale, table.step, table.known_step, table.init)
    assert {array.dtype for array in arrays} == {np.dtype(np.float32)}
    assert table.draws_noise.dtype == np.bool_
    assert (table.step[0, :2, 2:4] == 0).all()  # no history yet
    assert table.denoised_in_memory == (name != "deis3")
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
        ("LMSDiscreteScheduler", {}, FALLBACK_SAMPLER),
        ("UniPCMultistepScheduler", {}, "unipc"),
        ("DPMSolverSinglestepScheduler", {}, "dpm++2s"),
        ("DEISMultistepScheduler", {}, "deis"),
        ("DEISMultistepScheduler", {"solver_order": 3}, "deis3"),
        ("HeunDiscreteScheduler", {}, "heun"),
        ("KDPM2DiscreteScheduler", {}, "dpm2"),
        ("KDPM2AncestralDiscreteScheduler", {}, "dpm2_a"),
        ("FlowMatchEulerDiscreteScheduler", {}, "euler"),
    ],
)
def test_default_sampler_names_the_pipelines_own_when_it_is_a_table(
    class_name: str, extra: dict[str, Any], expected: str
) -> None:
    assert default_sampler({"_class_name": class_name, **extra}) == expected
    assert expected in SAMPLERS


@pytest.mark.parametrize(
    ("name", "steps", "strength", "field"),
    [
        ("nonsense", 20, None, "scheduler"),
        ("lcm_karras", 20, None, "scheduler"),
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


@pytest.mark.parametrize("name", ["dpm++sde_karras", "unipc", "deis3", "dpm2_a"])
def test_build_step_table_is_fast_when_50_steps_are_asked_for(name: str) -> None:
    build_step_table(name, SD15, 50)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        build_step_table(name, SD15, 50)
        seconds.append(time.perf_counter() - start)
    # 1 to 6 ms on a quiet core; a request runs for seconds.
    assert min(seconds) < 0.05


@pytest.mark.parametrize("strength", [None, 0.6])
def test_recalled_table_is_the_built_one_and_read_only_when_asked_for_twice(
    strength: float | None,
) -> None:
    built = build_step_table("euler_a", SD15, 9, strength=strength)
    tables = [recall_step_table("euler_a", dict(SD15), 9, strength=strength) for _ in range(2)]
    assert tables[0] is tables[1]
    for field in dataclasses.fields(built):
        np.testing.assert_array_equal(getattr(tables[0], field.name), getattr(built, field.name))
    with pytest.raises(ValueError, match="read-only"):
        tables[0].step[0] = 0
    other = recall_step_table("euler_a", {**SD15, "beta_end": 0.013}, 9, strength=strength)
    assert not np.array_equal(other.input_scale, tables[0].input_scale)


def test_recalled_table_is_refused_each_time_when_the_request_is_out_of_range() -> None:
    for _ in range(2):
        with pytest.raises(RequestError, match="denoising_strength"):
            recall_step_table("euler_a", SD15, 9, strength=1.5)
