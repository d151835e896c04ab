"""The graph over numpy models: order, bytes, counters, progress, and how it stops."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from closeup.detection import Face, scale_faces
from closeup.errors import CloseupError, ModelError, RequestCancelled, RequestError
from closeup.face_blend import face_mask
from closeup.face_geometry import paste
from closeup.face_pass import MAX_FACTOR
from closeup.faces import FacePlan, plan_faces
from closeup.info import build_info
from closeup.repository import Repository
from closeup.run import Array, Progress, Run
from closeup.settings import Settings
from tests.drawn_faces import make_face
from tests.toy_models import Outputs, Pixels, ToyModels, png, waves
from tests.toy_requests import FACES, FACTOR, FIELDS, GRID, SEED, SIDE, STEPS, MakeToy


def assert_picture(pixels: Pixels, size: tuple[int, int]) -> None:
    """Right in form, and no plain colour."""
    assert pixels.shape == (*size, 3)
    assert pixels.dtype == np.uint8
    assert pixels.std() > 20


def plans_of(run: Run, faces: list[Face]) -> list[FacePlan]:
    """Plan again what the graph planned, from the detector's faces clipped to the picture."""
    clipped = [
        replace(face, box=tuple(min(max(v, 0.0), float(SIDE)) for v in face.box))  # type: ignore[arg-type]
        for face in faces
    ]
    return plan_faces(
        scale_faces(clipped, FACTOR),
        image_size=(SIDE * FACTOR, SIDE * FACTOR),
        work_px=run.request.model.native_px,
        options=run.request.faces,
        seed=run.request.seeds[0],
        defaults=run.request.model.face_defaults,
        enlarged=FACTOR,
    )


def under_masks(plans: list[FacePlan]) -> Any:
    """Where the masks of the repainted faces are, (H, W) bool."""
    size = (SIDE * FACTOR, SIDE * FACTOR)
    covered = np.zeros(size, bool)
    for plan in plans:
        if plan.action.value == "repaint":
            patch_px = plan.work_px  # the painted face is enlarged to fill its crop
            while patch_px < min(plan.crop.side, MAX_FACTOR * plan.work_px):
                patch_px *= 2
            mask = face_mask(replace(plan, work_px=patch_px))
            alpha, region = paste(mask, plan.crop, size)
            covered[region] |= alpha > 0
    return covered


#: Of these hires_fix paints fewer pixels than the face pass does.
SMALL = [make_face(30, 30, 5), make_face(90, 90, 6)]
SCENES: Mapping[str, tuple[list[Face], int]] = {  # faces, and how many of them are repainted
    "one": ([make_face(60, 50, 24)], 1),
    "tilted": ([make_face(60, 50, 24, tilt_deg=35)], 1),
    "left": ([make_face(5, 60, 24)], 1),
    "right": ([make_face(124, 60, 24)], 1),
    "top": ([make_face(60, 6, 24)], 1),
    "bottom": ([make_face(60, 123, 24)], 1),
    "corner": ([make_face(124, 122, 24)], 1),
    "overlapping": ([make_face(50, 60, 26), make_face(66, 64, 26)], 2),
    "tiny": ([make_face(70, 40, 3)], 1),
    "tiny_beside_large": ([make_face(70, 40, 28), make_face(20, 100, 2.5)], 1),
    "huge": ([make_face(64, 64, 100)], 0),
    "huge_and_small": ([make_face(50, 64, 80), make_face(113, 20, 16)], 1),
    "thirty": (GRID, 30),
}


@pytest.mark.parametrize("scene", SCENES)
def test_faces_change_and_every_other_byte_stays(make_toy: MakeToy, scene: str) -> None:
    faces, repainted = SCENES[scene]
    toy = make_toy(faces=faces, call_s=0.0)
    run, outcome, _ = toy.paint(**FACES)
    before, after = outcome.stages["super_resolution"][0], outcome.pictures[0]
    assert_picture(after, (SIDE * FACTOR, SIDE * FACTOR))
    reports = outcome.faces[0]
    assert len(reports) == len(faces)
    assert run.usage.get("faces_repainted", 0) == repainted
    assert [report["action"] for report in reports].count("repaint") == repainted
    assert all(bool(report["reason"]) == (report["action"] == "skip") for report in reports)
    changed = (before != after).any(2)
    assert not changed[~under_masks(plans_of(run, faces))].any()
    assert not changed[~near_faces(reports)].any()  # the same by rule of thumb, without our masks
    for report in reports:
        x0, y0, x1, y1 = (int(value) for value in report["box"])
        share = changed[y0:y1, x0:x1].mean()
        if report["action"] == "repaint":
            # A toy face is coarser than its picture: nearly all its bytes differ.
            assert share > 0.5
        elif scene != "huge_and_small":
            assert share == 0


def near_faces(reports: list[dict[str, Any]]) -> Any:
    """Boxes of the repainted faces, twice as large."""
    near = np.zeros((SIDE * FACTOR, SIDE * FACTOR), bool)
    for report in reports:
        if report["action"] == "repaint":
            x0, y0, x1, y1 = report["box"]
            reach = max(x1 - x0, y1 - y0)
            x, y = (x0 + x1) / 2, (y0 + y1) / 2
            rows = slice(max(0, int(y - reach)), int(y + reach) + 1)
            near[rows, max(0, int(x - reach)) : int(x + reach) + 1] = True
    return near


def test_huge_face_is_skipped_with_its_reason(make_toy: MakeToy) -> None:
    _, outcome, _ = make_toy(faces=SCENES["huge"][0]).paint(**FACES)
    (report,) = outcome.faces[0]
    assert report["action"] == "skip"
    assert "add no detail" in report["reason"]


def test_picture_without_faces_is_the_super_resolved_one(toy: ToyModels) -> None:
    run, outcome, _ = toy.paint(**FACES)
    plain = toy.paint(**FIELDS, super_resolution=True)[1]
    assert np.array_equal(outcome.pictures[0], outcome.stages["super_resolution"][0])
    assert np.array_equal(outcome.pictures[0], plain.pictures[0])
    assert outcome.faces == [[]]
    assert run.usage == {"inference_cycles": 1, "denoiser_steps": STEPS, "faces_repainted": 0}


def test_face_strength_zero_changes_nothing(make_toy: MakeToy) -> None:
    toy = make_toy(faces=SCENES["one"][0])
    _, outcome, _ = toy.paint(**FACES, face_denoising_strength=0.0)
    assert np.array_equal(outcome.pictures[0], outcome.stages["super_resolution"][0])
    assert outcome.faces[0][0]["reason"] == "Strength 0 changes nothing."


def test_stages_run_in_order_and_leave_their_pictures(make_toy: MakeToy) -> None:
    toy = make_toy(faces=SMALL)
    run, outcome, _ = toy.paint(**FACES, hires_fix=True)
    order = ["encode", "generate", "super_resolution", "hires_fix", "detect", "faces"]
    assert list(run.timings_ms) == order
    assert all(milliseconds > 0 for milliseconds in run.timings_ms.values())
    assert list(outcome.stages) == ["generated", "super_resolution", "hires_fix"]
    generated, enlarged, fixed = (outcome.stages[name][0] for name in outcome.stages)
    assert_picture(generated, (SIDE, SIDE))
    assert np.array_equal(enlarged, generated.repeat(FACTOR, 0).repeat(FACTOR, 1))  # toy upscaler
    assert fixed.shape == enlarged.shape
    assert (fixed != enlarged).mean() > 0.2
    assert (outcome.pictures[0] != fixed).any()
    names = [name for name, _ in toy.calls]
    firsts = [names.index(name) for name in
              ("toy_text_encoder", "toy_vae_decoder", "upscaler", "toy_vae_encoder",
               "face_detector")]  # fmt: skip
    assert firsts == sorted(firsts)
    assert toy.calls[0] == ("toy_denoiser", "acquire")
    assert toy.calls[-1] == ("toy_denoiser", "release")
    info = build_info(run, outcome, "an-id")
    json.dumps(info, allow_nan=False)
    assert info["size"] == [SIDE * FACTOR] * 2
    assert info["generated_size"] == [SIDE] * 2
    assert [entry["stage"] for entry in info["stage_images"]] == list(outcome.stages)


def test_faces_are_those_of_the_repainted_picture_when_hires_fix_has_repainted_it(
    make_toy: MakeToy,
) -> None:
    toy = make_toy(faces=SCENES["one"][0])
    looked_at: list[Array] = []

    def keep(inputs: Mapping[str, Array], outputs: Outputs) -> Outputs:
        looked_at.append(inputs["input"])
        return outputs

    toy.faults["face_detector"] = keep
    plain = toy.paint(**FACES)[1]
    fixed = toy.paint(**FACES, hires_fix=True, hires_denoising_strength=0.9)[1]
    assert plain.faces[0][0]["action"] == "repaint"
    # The crop, 192 px, has just been painted with as many: 64 would be fewer.
    assert fixed.faces[0][0]["action"] == "skip"
    assert "192x192" in fixed.faces[0][0]["reason"]
    first, second = (array for array in looked_at if array.shape[-1] == 512)
    assert np.abs(first - second).mean() > 5  # of 255: another picture
    # A hires_fix of no step has repainted nothing.
    idle = toy.paint(**FACES, hires_fix=True, hires_denoising_strength=0.1)[1]
    assert idle.faces[0][0]["action"] == "repaint"


def test_no_stage_pictures_are_kept_when_not_asked_for(toy: ToyModels) -> None:
    assert toy.paint(**FIELDS)[1].stages == {}


def test_denoising_strength_zero_returns_the_input(toy: ToyModels) -> None:
    picture = waves(SIDE, SIDE)
    run, outcome, _ = toy.paint(
        **FIELDS, input_image=png(picture), denoising_strength=0.0, num_images=2
    )
    assert all(np.array_equal(pixels, picture) for pixels in outcome.pictures)
    assert run.usage["denoiser_steps"] == 0
    assert run.warnings == []


@pytest.mark.parametrize("size", [(128, 128), (61, 83)])
def test_only_upscale_enlarges_the_input_and_repaints_its_faces(
    make_toy: MakeToy, size: tuple[int, int]
) -> None:
    toy = make_toy()
    picture = waves(*size)
    run, outcome, _ = toy.paint(
        prompt="word5", steps=4, only_upscale=True, inpaint_faces=True, input_image=png(picture)
    )
    assert np.array_equal(outcome.pictures[0], picture.repeat(FACTOR, 0).repeat(FACTOR, 1))
    assert "generate" not in run.timings_ms
    assert run.usage["inference_cycles"] == 0


@pytest.mark.parametrize("size", [(128, 96), (61, 83)])
def test_hires_fix_keeps_the_size_when_the_picture_is_of_any_size(
    toy: ToyModels, size: tuple[int, int]
) -> None:
    _, outcome, _ = toy.paint(
        prompt="word5", steps=8, only_upscale=True, hires_fix=True, stages=True,
        input_image=png(waves(*size)),
    )  # fmt: skip
    assert_picture(outcome.pictures[0], (size[0] * FACTOR, size[1] * FACTOR))
    assert (outcome.pictures[0] != outcome.stages["super_resolution"][0]).mean() > 0.2


def test_each_picture_of_a_request_is_that_of_its_seed(make_toy: MakeToy) -> None:
    toy = make_toy(faces=SCENES["one"][0])
    run, outcome, _ = toy.paint(**{**FACES, "seed": 2**32 - 2, "num_images": 3})
    assert run.request.seeds == [2**32 - 2, 2**32 - 1, 0]
    for seed, pixels in zip(run.request.seeds, outcome.pictures, strict=True):
        alone = toy.paint(**{**FACES, "seed": seed})[1].pictures[0]
        assert np.array_equal(pixels, alone)
    assert not np.array_equal(outcome.pictures[0], outcome.pictures[1])


def test_same_seed_gives_the_same_bytes_and_another_seed_another_face(make_toy: MakeToy) -> None:
    toy = make_toy(faces=SCENES["one"][0])
    fields = {**FACES, "input_image": png(waves(SIDE, SIDE)), "denoising_strength": 0.0}
    first, second, other = (
        toy.paint(**{**fields, "seed": seed})[1] for seed in (SEED, SEED, SEED + 1)
    )
    assert np.array_equal(first.pictures[0], second.pictures[0])
    assert first.faces == second.faces
    # The same picture went into the face pass, so only the face's own noise can differ.
    assert np.array_equal(first.stages["super_resolution"][0], other.stages["super_resolution"][0])
    assert first.faces[0][0]["seed"] != other.faces[0][0]["seed"]
    x0, y0, x1, y1 = (int(value) for value in first.faces[0][0]["box"])
    face, other_face = (outcome.pictures[0][y0:y1, x0:x1] for outcome in (first, other))
    assert (face != other_face).mean() > 0.5


def test_max_faces_repaints_the_largest(make_toy: MakeToy) -> None:
    faces = [make_face(30, 30, 16), make_face(90, 30, 24), make_face(30, 90, 20)]
    run, outcome, _ = make_toy(faces=faces).paint(**FACES, max_faces=2)
    assert [report["action"] for report in outcome.faces[0]] == ["repaint", "repaint", "skip"]
    assert "max_faces=2" in outcome.faces[0][2]["reason"]
    sides = [report["box"][3] - report["box"][1] for report in outcome.faces[0]]
    assert sides == sorted(sides, reverse=True)
    assert run.usage["faces_repainted"] == 2


def test_usage_counts_cycles_steps_and_faces(make_toy: MakeToy) -> None:
    toy = make_toy(faces=SMALL)
    before = toy.denoiser().counters.sequence_steps
    run, outcome, _ = toy.paint(**FACES, num_images=2, face_denoising_strength=0.5, hires_fix=True)
    hires = int(STEPS * 0.3)
    # A picture: its own cycle, hires_fix, one for all its faces.
    assert run.usage == {
        "inference_cycles": 2 * 3,
        "denoiser_steps": 2 * (STEPS + hires + 2 * 3),
        "faces_repainted": 4,
    }
    assert toy.denoiser().counters.sequence_steps - before == run.usage["denoiser_steps"]


def test_faces_of_a_picture_share_engine_calls(make_toy: MakeToy) -> None:
    toy = make_toy(faces=GRID[:8])
    toy.paint(**{**FACES, "stages": False}, face_denoising_strength=0.5)  # opens the engine
    counters = toy.denoiser().counters
    calls, steps = counters.engine_calls, counters.sequence_steps
    toy.paint(**FIELDS, inpaint_faces=True, face_denoising_strength=0.5)
    calls, steps = counters.engine_calls - calls, counters.sequence_steps - steps
    assert steps == STEPS + 8 * 3
    # Ideally 3 calls for all faces; those that arrive while a call runs wait for the next, so on
    # a busy machine there are more. One face at a time would take 24.
    assert calls <= STEPS + 16
    assert counters.largest_batch >= 3


def test_long_prompt_is_cut_with_a_warning(toy: ToyModels) -> None:
    run, _, _ = toy.paint(**{**FIELDS, "prompt": "word4 " * 80})
    assert run.warnings == [
        "prompt is 5 tokens longer than the 75 that text_encoder reads; its end was cut."
    ]
    run, _, _ = toy.paint(**{**FIELDS, "prompt": "word4 " * 75})
    assert run.warnings == []
    run, _, _ = toy.paint(**FIELDS, inpaint_faces=True, face_prompt="word4 " * 76)
    assert run.warnings == [
        "face_prompt is 1 tokens longer than the 75 that text_encoder reads; its end was cut."
    ]
    run, _, _ = toy.paint(**{**FIELDS, "negative_prompt": "word4 " * 80})
    assert run.warnings == [
        "negative_prompt is 5 tokens longer than the 75 that text_encoder reads; its end was cut."
    ]


def test_face_steps_and_strength_say_how_many_run_when_a_face_is_repainted(
    make_toy: MakeToy,
) -> None:
    toy = make_toy(faces=GRID[:1])
    for face_steps, strength, expected in ((10, 0.5, 5), (3, 0.9, 2), (STEPS, 1.0, STEPS)):
        run, outcome, _ = toy.paint(
            **FACES, face_steps=face_steps, face_denoising_strength=strength
        )
        assert run.usage["denoiser_steps"] == STEPS + expected
        assert outcome.faces[0][0]["action"] == "repaint"
    _, outcome, _ = toy.paint(**FACES, face_steps=3, face_denoising_strength=0.3)
    assert outcome.faces[0][0]["reason"] == "Its strength times face_steps is below one step."


def test_progress_is_monotone_and_complete(make_toy: MakeToy) -> None:
    toy = make_toy(faces=SMALL)
    run, _, events = toy.paint(**FACES, num_images=2, hires_fix=True)
    by_stage: dict[str, list[Progress]] = {}
    for event in events:
        by_stage.setdefault(event.stage, []).append(event)
    assert list(by_stage) == list(run.timings_ms)
    assert [event.elapsed_s for event in events] == sorted(event.elapsed_s for event in events)
    for stage, told in by_stage.items():
        assert events.index(told[-1]) - events.index(told[0]) == len(told) - 1, "stages mingle"
        steps = [event.step for event in told]
        assert steps[0] == 0
        assert steps == sorted(steps)
        assert told[-1].step == told[-1].steps > 0, stage
        shares = [event.step / event.steps for event in told if event.steps]
        assert shares == sorted(shares), stage
        assert told[0].eta_s is None
        assert all(event.eta_s is not None and event.eta_s >= 0 for event in told if event.step)
        assert told[-1].eta_s == 0


@pytest.mark.parametrize("mask", [False, True])
def test_picture_is_the_same_when_time_cuts_its_segments_short(
    make_toy: MakeToy, mask: bool
) -> None:
    fields = {**FIELDS, "steps": 30}
    if mask:
        half = np.zeros((SIDE, SIDE, 3), np.uint8)
        half[:, SIDE // 2 :] = 255
        fields |= {"input_image": png(waves(SIDE, SIDE)), "mask_image": png(half)}
    whole = make_toy(settings=Settings(segment_steps=50), call_s=0.0)
    expected = whole.paint(**fields)[1].pictures[0]
    assert whole.count("toy_denoiser", "segment") == 1
    # Each of the 30 or 24 calls takes 30 ms, so the 0.4 s of a segment end after 14 or sooner.
    slow = make_toy(settings=Settings(), call_s=0.03)
    run, outcome, events = slow.paint(**fields)
    np.testing.assert_array_equal(outcome.pictures[0], expected)
    assert 2 <= slow.count("toy_denoiser", "segment") <= 24
    steps = run.usage["denoiser_steps"]
    assert steps == (24 if mask else 30)
    # The warm-up's step apart, none was done twice.
    assert slow.denoiser().counters.sequence_steps == 1 + steps
    told = [event.step for event in events if event.stage == "generate"]
    assert told == sorted(set(told))
    assert told[-1] == steps


def test_segments_carry_bounded_noise_when_latents_are_large(make_toy: MakeToy) -> None:
    run = make_toy().start(make_toy().resolve(**FIELDS))
    run.segment_steps = None
    assert run.segment_length(1 << 20) == 4  # 4 MiB
    assert run.segment_length(5 << 20) == 1
    assert run.segment_length(0) > 50


def test_ticket_is_back_when_a_request_has_its_pictures(make_toy: MakeToy) -> None:
    toy = make_toy()
    toy.paint(**FIELDS)
    assert toy.denoiser().slots_in_use == 0
    assert toy.count("toy_denoiser", "release") == toy.count("toy_denoiser", "acquire") == 1


def test_previews_are_small_pictures_of_the_estimate(toy: ToyModels) -> None:
    _, outcome, events = toy.paint(**FIELDS, previews=True)
    previews = [event for event in events if event.preview]
    assert [event.step for event in previews] == [4, 6]
    assert all(event.preview is not None and event.preview[:2] == b"\xff\xd8" for event in previews)
    assert_picture(outcome.pictures[0], (SIDE, SIDE))


class Stop:
    """A `check` that raises from the moment the graph has come to some stage and step."""

    def __init__(self, stage: str, step: int, error: CloseupError) -> None:
        self.stage, self.step, self.error = stage, step, error
        self.stopped_at: tuple[int, int] | None = None
        self.reached = False

    def report(self, progress: Progress) -> None:
        self.reached |= progress.stage == self.stage and progress.step >= self.step

    def check(self) -> None:
        if self.reached:
            raise self.error


@pytest.mark.parametrize(
    ("stage", "step"),
    [("encode", 0), ("generate", 4), ("super_resolution", 1), ("hires_fix", 0), ("detect", 0),
     ("faces", 0)],
)  # fmt: skip
def test_cancelled_request_stops_within_one_segment(
    make_toy: MakeToy, stage: str, step: int
) -> None:
    toy = make_toy(faces=SMALL)
    stop = Stop(stage, step, RequestCancelled("the client went away."))
    request = toy.resolve(**{**FACES, "steps": 40, "hires_fix": True})
    run = toy.start(request, report=stop.report, check=stop.check)
    with pytest.raises(RequestCancelled, match="went away"):
        asyncio.run(toy.run(run))
    segments = toy.count("toy_denoiser", "segment")
    assert segments == {"generate": 1, "encode": 0}.get(stage, segments)
    if stage == "encode":
        assert toy.calls == []  # not even a ticket was taken
    else:
        assert toy.calls[-1] == ("toy_denoiser", "release")
    assert toy.denoiser().slots_in_use == 0
    # Nothing of it runs on, and the next request is served.
    assert toy.denoiser().counters.sequence_steps == 1 + run.usage["denoiser_steps"]
    assert_picture(toy.paint(**FIELDS)[1].pictures[0], (SIDE, SIDE))


def test_cancelled_task_takes_its_sequence_out_of_the_batch(make_toy: MakeToy) -> None:
    toy = make_toy(call_s=0.05)
    request = toy.resolve(**{**FIELDS, "steps": 40, "num_images": 2})

    async def cancel_soon() -> None:
        task = asyncio.create_task(toy.run(toy.start(request)))
        while toy.count("toy_denoiser", "segment") < 2:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel_soon())
    assert toy.denoiser().slots_in_use == 0
    done = toy.denoiser().counters.sequence_steps
    assert done <= 1 + 2 * 4
    assert_picture(toy.paint(**FIELDS)[1].pictures[0], (SIDE, SIDE))


def spoil(name: str, value: float, after: int = 0) -> Callable[[Any, Outputs], Outputs]:
    """Return a fault that puts one value into an output, from the call `after` on."""
    seen = [0]

    def fault(inputs: Mapping[str, Array], outputs: Outputs) -> Outputs:
        seen[0] += 1
        if name in outputs and seen[0] > after:
            spoilt = outputs[name].copy()
            spoilt.reshape(-1)[3] = value
            return {**outputs, name: spoilt}
        return outputs

    return fault


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    ("model", "output"),
    [("toy_vae_decoder", "image"), ("upscaler", "upscaled"), ("toy_vae_encoder", "moments"),
     ("toy_text_encoder", "context")],
)  # fmt: skip
def test_network_output_that_is_not_finite_is_an_error(
    make_toy: MakeToy, model: str, output: str, value: float
) -> None:
    toy = make_toy(faces=SCENES["one"][0])
    toy.faults[model] = spoil(output, value)
    with pytest.raises(ModelError, match=r"not finite|no longer finite|not numbers"):
        toy.paint(**FACES)
    assert toy.denoiser().slots_in_use == 0


def test_broken_face_patch_is_an_error_and_no_black_square(make_toy: MakeToy) -> None:
    toy = make_toy(faces=SCENES["one"][0])
    toy.faults["toy_vae_decoder"] = spoil("image", np.nan, after=1)  # the second is the face's
    with pytest.raises(ModelError):
        toy.paint(**FACES)


def test_error_in_one_picture_stops_its_mates(make_toy: MakeToy) -> None:
    toy = make_toy()

    answered = []

    def fail_second(inputs: Mapping[str, Array], outputs: Outputs) -> Outputs:
        if inputs["operation"][0] == b"segment":
            answered.append(outputs)
            if len(answered) == 2:
                raise ModelError("the second picture's step failed.")
        return outputs

    toy.faults["toy_denoiser"] = fail_second
    with pytest.raises(ModelError, match="second picture"):
        toy.paint(**{**FIELDS, "steps": 40, "num_images": 3})
    # Three first segments were under way; of what was answered before the failure one may have
    # begun its second. Left alone, the mates would have sent 10 segments each.
    assert toy.count("toy_denoiser", "segment") <= 4
    assert toy.calls[-1] == ("toy_denoiser", "release")
    assert toy.denoiser().slots_in_use == 0


def test_the_first_error_is_told_when_the_ticket_cannot_be_returned_either(
    make_toy: MakeToy,
) -> None:
    toy = make_toy()

    def fail_release(inputs: Mapping[str, Array], outputs: Outputs) -> Outputs:
        if inputs["operation"][0] == b"release":
            raise ModelError("the denoiser is gone.")
        return outputs

    toy.faults["toy_vae_decoder"] = spoil("image", np.nan)
    toy.faults["toy_denoiser"] = fail_release
    with pytest.raises(ModelError, match="toy_vae_decoder"):
        toy.paint(**FIELDS)


def test_what_is_served_stays_when_an_export_comes_later(
    toy_repository: Path, tmp_path: Path
) -> None:
    served = shutil.copytree(toy_repository, tmp_path / "served")
    repository = Repository(served)
    (served / "models.json").write_text(json.dumps({"models": []}), encoding="utf-8")
    shutil.rmtree(served / "upscaler")
    assert list(repository.models()) == ["toy"]
    assert repository.upscaler is not None
    assert Repository(served).models() == {}
    assert Repository(served).upscaler is None


def test_requests_without_super_resolution_are_served_when_the_upscaler_is_damaged(
    toy_repository: Path, tmp_path: Path
) -> None:
    served = shutil.copytree(toy_repository, tmp_path / "served")
    (served / "upscaler" / "manifest.json").write_text("{", encoding="utf-8")
    toy = ToyModels(served)
    try:
        assert_picture(toy.paint(**FIELDS)[1].pictures[0], (SIDE, SIDE))
        with pytest.raises(RequestError, match="super_resolution: this server has no upscaler"):
            toy.paint(**FIELDS, super_resolution=True)
    finally:
        toy.close()


def test_request_beyond_the_slots_is_refused_before_any_engine_runs(make_toy: MakeToy) -> None:
    toy = make_toy(settings=Settings(slots=2))
    with pytest.raises(RequestError, match="num_images: got 3; this server works on 1 to 2"):
        toy.paint(**FIELDS, num_images=3)
    assert toy.calls == [("toy_denoiser", "acquire")]
    assert_picture(toy.paint(**FIELDS, num_images=2)[1].pictures[1], (SIDE, SIDE))


def test_strength_below_one_step_keeps_the_input_with_a_warning(toy: ToyModels) -> None:
    picture = waves(SIDE, SIDE)
    run, outcome, _ = toy.paint(**FIELDS, input_image=png(picture), denoising_strength=0.1)
    assert np.array_equal(outcome.pictures[0], picture)
    assert len(run.warnings) == 1
