"""What arrives, what is refused and with which sentence, what is filled in."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import pytest

from closeup.errors import RequestError
from closeup.faces import FaceOrder
from closeup.fields import FIELDS, MAX_PROMPT_CHARACTERS, Field, Kind
from closeup.request import Limits, Mode, Request, Served, parse_options, resolve_request
from closeup.request_rules import SIZE_ID_FIELDS
from tests.manifests import make_manifest
from tests.pictures import png, png_bomb

GOLDEN: dict[str, Any] = {
    "prompt": "<lora:1795721:1.0> Surrounded by the natural beauty of a serene, wooded "
    "environment, the ohwx woman exudes a sense of tranquility.",
    "num_images": 1,
    "super_resolution": True,
    "inpaint_faces": True,
    "w": 896,
    "h": 1152,
    "scheduler": "euler_a",
    "ar": "1:1",
}


def resolve(
    *,
    models: Any = None,
    parameters: dict[str, Any] | None = None,
    has_upscaler: bool = True,
    has_face_detector: bool = True,
    streaming: bool = False,
    limits: Limits | None = None,
    **fields: Any,
) -> Request:
    """Send fields as Triton hands them over: strings as bytes."""
    values = {
        name: value.encode() if isinstance(value, str) else value for name, value in fields.items()
    }
    return resolve_request(
        parse_options(values, parameters or {}),
        served=Served(
            models={"toy": make_manifest()} if models is None else models,
            known_lora=lambda name: name in ("1795721", "style"),
            has_upscaler=has_upscaler,
            has_face_detector=has_face_detector,
            limits=limits or Limits(),
        ),
        streaming=streaming,
    )


def refused(**fields: Any) -> dict[str, str]:
    with pytest.raises(RequestError) as caught:
        resolve(**fields)
    return caught.value.problems


def test_faces_get_prompts_of_their_own_from_left_to_right_when_they_are_separated() -> None:
    both: dict[str, Any] = {"prompt": "a couple", "inpaint_faces": True}
    request = resolve(**both, face_prompt=" a woman [SEP] [SEP]a man")
    usual = "a couple, close up of the face"
    assert request.face_prompts == ("a woman", usual, "a man")
    assert request.faces.order is FaceOrder.LEFT_RIGHT
    ordered = resolve(**both, face_prompt="a woman[SEP]a man", face_order="score")
    assert ordered.faces.order is FaceOrder.SCORE
    alone = resolve(**both, face_prompt=" a woman")
    assert alone.face_prompts == (" a woman",)  # as given, as ever
    assert alone.faces.order is FaceOrder.AREA
    assert list(refused(**both, use_lpw=True, face_prompt="a [SEP]" + "(" * 99)) == ["face_prompt"]


def test_face_pass_takes_the_models_steps_but_no_more_than_the_picture_when_none_are_given() -> (
    None
):
    quick = {"toy": make_manifest(face_steps=8)}

    def face_steps(models: Any, **fields: Any) -> int:
        return resolve(models=models, prompt="a man", inpaint_faces=True, **fields).face_steps

    assert face_steps(None, steps=20) == 20
    assert face_steps(quick, steps=20) == 8
    assert face_steps(quick, steps=4) == 4
    assert face_steps(quick, steps=4, face_steps=12) == 12
    assert list(refused(prompt="a man", face_steps=12)) == ["face_steps"]  # needs inpaint_faces


@pytest.mark.parametrize(
    ("fields", "field"), [({"steps": 12}, "steps"), ({"steps": 8, "face_steps": 12}, "face_steps")]
)
def test_steps_are_refused_under_their_own_name_when_the_sampler_knows_fewer(
    fields: dict[str, int], field: str
) -> None:
    config = {**make_manifest().scheduler, "original_inference_steps": 10}
    problems = refused(
        models={"toy": make_manifest(scheduler=config)}, prompt="a man", scheduler="lcm",
        inpaint_faces=True, **fields,
    )  # fmt: skip
    assert problems == {
        field: "12 steps were asked of a sampler that knows 10; ask for fewer."
    }  # fmt: skip


def test_golden_request_resolves_word_for_word() -> None:
    request = resolve(**GOLDEN)
    assert (request.width, request.height) == (896, 1152)  # explicit sides win over ar
    assert [(tag.id, tag.weight) for tag in request.loras] == [("1795721", 1.0)]
    assert request.prompt.startswith("Surrounded by the natural beauty")
    assert request.face_prompts[0].endswith("tranquility., close up of the face")
    assert request.super_resolution
    assert request.inpaint_faces
    assert request.mode is Mode.TEXT
    assert (request.steps, request.cfg_scale, request.scheduler) == (25, 7.5, "euler_a")


@pytest.mark.parametrize(
    ("fields", "field", "sentence"),
    [
        ({"prompt": ""}, "prompt", "is empty; expected 1 to 4000 characters."),
        ({"prompt": "  \n"}, "prompt", "is empty"),
        ({"prompt": "<lora:style:1>"}, "prompt", "has no words beside its tags"),
        ({"prompt": "x" * 10_000}, "prompt", "has 10000 characters; allowed are 1 to 4000"),
        ({"prompt": b"caf\xe9"}, "prompt", "is not valid UTF-8 (byte 3)"),
        ({"prompt": "a\0b"}, "prompt", "contains a NUL character"),
        ({"w": 100}, "w", "got 100; allowed are 64 to 2048, multiples of 8; the nearest is 96."),
        ({"h": 2056}, "h", "got 2056; allowed are 64 to 2048, multiples of 8."),
        ({"w": 56}, "w", "got 56; allowed are 64 to 2048"),
        ({"num_images": 0}, "num_images", "got 0; allowed are 1 to 8."),
        ({"num_images": 9}, "num_images", "got 9; allowed are 1 to 8."),
        ({"steps": 51}, "steps", "got 51; allowed are 1 to 50."),
        ({"steps": 0}, "steps", "got 0; allowed are 1 to 50."),
        ({"cfg_scale": 16.0}, "cfg_scale", "got 16; allowed are 0 to 15."),
        ({"cfg_scale": float("nan")}, "cfg_scale", "got nan; allowed are 0 to 15."),
        ({"seed": -1}, "seed", "got -1; allowed are 0 to 4294967295."),
        ({"seed": 2**32}, "seed", "allowed are 0 to 4294967295."),
        ({"scheduler": "lcm", "steps": 50, "cfg_scale": 16.0}, "cfg_scale", "got 16"),
        ({"scheduler": "euler_b"}, "scheduler", "euler"),
        ({"aspect_ratio": "2:1"}, "aspect_ratio", "allowed are 1:1, 16:9"),
        ({"ar": "1:1", "aspect_ratio": "1:1"}, "ar", "older spelling"),
        ({"model": "nope"}, "model", "got 'nope'; served are toy."),
        ({"prompt": "a <lora:unknown:1>"}, "prompt", "there is no LoRA 'unknown'"),
        ({"prompt": "a <lora:../../etc/passwd:1>"}, "prompt", "cannot be a LoRA id"),
        ({"prompt": "a <lora:a/b:1>"}, "prompt", "cannot be a LoRA id"),
        ({"prompt": "a <lora:.hidden:1>"}, "prompt", "cannot be a LoRA id"),
        ({"prompt": "a <lora:style:abc>"}, "prompt", "must be a number"),
        ({"hires_fix": True}, "hires_fix", "needs super_resolution"),
        ({"max_faces": 3}, "max_faces", "needs inpaint_faces"),
        ({"previews": True}, "previews", "needs generate_stream"),
        ({"denoising_strength": 0.5}, "denoising_strength", "needs input_image"),
        ({"mask_image": b"\x89PNG"}, "mask_image", "needs input_image"),
        ({"only_upscale": True}, "only_upscale", "needs input_image"),
        ({"input_image": b""}, "input_image", "is empty"),
        ({"input_image": b"!!not base64!!"}, "input_image", "neither a PNG, JPEG or WebP"),
        ({"input_image": png(64, 64)[:90]}, "input_image", "cut short"),
        ({"input_image": png_bomb(40_000)}, "input_image", "1,600,000,000 pixels"),
        ({"input_image": base64.b64encode(b"hello world, no picture")}, "input_image", "no"),
        ({"input_image": png(64, 64), "mask_image": png(64, 72, "L")}, "mask_image",
         "is 64x72, input_image is 64x64"),
        ({"prompt": "a --face_inpaint_denoising 1.5 b", "inpaint_faces": True},
         "face_denoising_strength", "(in the prompt) got 1.5; allowed are 0 to 1."),
        ({"face_prompt": "a <lora:style:1>", "inpaint_faces": True}, "face_prompt",
         "takes no tags"),
        ({"negative_prompt": "b <lora:style:1>"}, "negative_prompt", "takes no tags"),
        ({"crop_x": 5}, "crop_x", "Stable Diffusion 1.5 is told no sizes"),
        ({"face_crop_factor": 9.0, "inpaint_faces": True}, "face_crop_factor", "1.2 to 4"),
    ],
)  # fmt: skip
def test_request_is_refused_with_a_sentence_when_a_field_is_wrong(
    fields: dict[str, Any], field: str, sentence: str
) -> None:
    problems = refused(**{"prompt": "a woman", **fields})
    assert list(problems) == [field]
    assert sentence in problems[field]
    assert "\n" not in problems[field]


def test_every_wrong_field_is_named_when_several_are() -> None:
    assert set(refused(prompt="", steps=51, w=3)) == {"prompt", "steps", "w"}


def test_missing_prompt_is_named() -> None:
    assert refused(steps=3) == {"prompt": "is missing; every request needs one."}


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("stepz", "did you mean steps?"),
        ("input_image_url", "send the picture itself in input_image"),
        ("text", "is called prompt here"),
        ("qqqqqq", "leave it out"),
    ],
)
def test_unknown_field_is_refused_with_the_nearest_name(name: str, hint: str) -> None:
    problems = refused(prompt="a", parameters={name: 1})
    assert hint in problems[name]


def test_parameters_that_triton_reserves_are_no_fields() -> None:
    parameters = {"priority": 1, "timeout": 5, "id": "abc", "triton_x": 1, "binary_data_output": 1}
    assert resolve(prompt="a", parameters=parameters).prompt == "a"


def as_given(field: Field, value: float) -> float:
    return int(value) if field.kind is Kind.INT else value


def test_both_sides_of_every_number_range_are_as_documented() -> None:
    extra: dict[str, dict[str, Any]] = {
        "hires_denoising_strength": {"hires_fix": True, "super_resolution": True},
        "denoising_strength": {"input_image": png(64, 64)},
    }
    checked = 0
    for field in FIELDS:
        if field.minimum is None or field.maximum is None or field.kind.value == "string":
            continue
        step = field.multiple_of or (1 if field.kind.value == "int" else 0.01)
        with_it = extra.get(field.name, {"inpaint_faces": True})
        if field.name in SIZE_ID_FIELDS:
            with_it = {"models": {"toy": make_manifest(family="sdxl")}}
        for value in (field.minimum, field.maximum):
            given: dict[str, Any] = {field.name: as_given(field, value)}
            resolve(prompt="a", **given, **with_it)
        for value in (field.minimum - step, field.maximum + step):
            given = {field.name: as_given(field, value)}
            assert list(refused(prompt="a", **given, **with_it)) == [field.name]
        checked += 1
    assert checked >= 12
    resolve(prompt="x" * MAX_PROMPT_CHARACTERS)


@pytest.mark.parametrize(
    ("fields", "size"),
    [
        ({}, (512, 512)),
        ({"aspect_ratio": "16:9"}, (680, 384)),
        ({"ar": "portrait"}, (416, 624)),
        ({"w": 640}, (640, 512)),
        ({"w": 640, "aspect_ratio": "1:1"}, (640, 640)),
        ({"h": 512, "aspect_ratio": "16:9"}, (912, 512)),
        ({"w": 640, "h": 512, "aspect_ratio": "1:1"}, (640, 512)),
        ({"input_image": png(203, 101)}, (200, 104)),
        ({"input_image": png(203, 101), "w": 128, "h": 64}, (128, 64)),
        ({"input_image": png(500, 1000), "w": 256}, (256, 512)),
        ({"input_image": png(500, 1000), "h": 256}, (128, 256)),
        ({"input_image": png(3000, 1000)}, (2048, 680)),
        ({"input_image": png(2500, 2000)}, (2048, 1640)),
        ({"input_image": png(40, 60)}, (64, 96)),
        ({"input_image": png(400, 400), "aspect_ratio": "1:1"}, (400, 400)),
    ],
)
def test_size_comes_from_sides_then_ratio_then_picture_then_model(
    fields: dict[str, Any], size: tuple[int, int]
) -> None:
    request = resolve(prompt="a", **fields)
    assert (request.width, request.height) == size
    if request.image is not None:
        assert request.image.shape == (size[1], size[0], 3)
        assert not any("stretched" in sentence for sentence in request.warnings)


def test_a_picture_is_shrunk_in_its_shape_when_the_server_paints_fewer_pixels() -> None:
    request = resolve(prompt="a", input_image=png(1000, 600), limits=Limits(max_pixels=256 * 256))
    assert request.width * request.height <= 256 * 256
    assert (request.width, request.height) == (328, 192)
    assert request.warnings == ()


def test_client_is_told_when_its_picture_was_stretched() -> None:
    for fields, size in (
        ({"w": 64, "h": 64}, "64x64"),
        ({"aspect_ratio": "2:3"}, "232x344"),
        ({"w": 64, "ar": "1:1"}, "64x64"),
    ):
        request = resolve(prompt="a", input_image=png(400, 200), **fields)
        (sentence,) = request.warnings
        assert "400x200" in sentence
        assert size in sentence


def test_pixels_of_the_enlarged_picture_count_when_hires_fix_repaints_them() -> None:
    fields: dict[str, Any] = {"prompt": "a", "w": 512, "h": 512, "super_resolution": True}
    limits = Limits(max_pixels=512 * 512)
    assert resolve(**fields, limits=limits).width == 512
    problems = refused(**fields, hires_fix=True, limits=limits)
    assert list(problems) == ["hires_fix"]
    assert "2048x2048" in problems["hires_fix"]
    upscale: dict[str, Any] = {"prompt": "a", "input_image": png(600, 500), "only_upscale": True}
    assert list(refused(**upscale, limits=limits)) == ["input_image"]


def test_pictures_that_a_file_format_cannot_hold_are_refused() -> None:
    wide: dict[str, Any] = {"prompt": "a", "input_image": png(5000, 64), "only_upscale": True}
    assert resolve(**wide).width == 5000
    problems = refused(**wide, image_format="webp")
    assert list(problems) == ["image_format"]
    assert "20000x256" in problems["image_format"]
    assert resolve(**wide, image_format="jpeg").image_format == "jpeg"


def test_more_face_prompts_than_faces_may_be_repainted_are_refused() -> None:
    both: dict[str, Any] = {"prompt": "a", "inpaint_faces": True}
    assert len(resolve(**both, face_prompt="[SEP]" * 31).face_prompts) == 32
    assert list(refused(**both, face_prompt="[SEP]" * 32)) == ["face_prompt"]
    assert "3 prompts" in refused(**both, face_prompt="a[SEP]b[SEP]c", max_faces=2)["face_prompt"]
    assert resolve(**both, face_prompt="a", max_faces=0).face_prompts == ("a",)


def test_the_separator_is_plain_text_when_it_stands_in_the_prompt_itself() -> None:
    request = resolve(prompt="a [SEP] b", inpaint_faces=True)
    assert request.face_prompts == ("a [SEP] b, close up of the face",)
    assert request.faces.order is FaceOrder.AREA


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"steps": 9, "cfg_scale": 3.0}, ["steps", "cfg_scale"]),
        ({"negative_prompt": "b", "scheduler": "ddim"}, ["negative_prompt", "scheduler"]),
        ({"steps": 9, "inpaint_faces": True}, []),
        ({"super_resolution": False}, ["super_resolution on"]),
    ],
)
def test_client_is_told_what_has_no_effect_when_a_picture_is_only_upscaled(
    fields: dict[str, Any], told: list[str]
) -> None:
    request = resolve(prompt="a", input_image=png(64, 64), only_upscale=True, **fields)
    assert len(request.warnings) == bool(told)
    assert all(word in request.warnings[0] for word in told)


def test_client_is_told_when_guidance_does_nothing_on_a_model_without_it() -> None:
    for embeds in (False, True):
        models = {"flux": make_manifest(family="flux", guidance_embeds=embeds)}
        request = resolve(models=models, prompt="a", cfg_scale=4.0)
        assert any("cfg_scale" in sentence for sentence in request.warnings) != embeds


def test_model_defaults_win_over_the_family_and_fields_over_both() -> None:
    from closeup.manifest import Defaults

    models = {
        "own": make_manifest(
            name="own", defaults=Defaults(width=128, height=192, steps=9, cfg_scale=3.5,
                                          scheduler="lcm"),
        )
    }  # fmt: skip
    request = resolve(models=models, prompt="a", cfg_scale=4.0)
    assert (request.width, request.height, request.steps) == (128, 192, 9)
    assert (request.cfg_scale, request.scheduler) == (4.0, "lcm")


def test_picture_may_be_bytes_base64_or_a_data_uri() -> None:
    data = png(72, 64)
    forms = [
        data,
        base64.b64encode(data),
        b"data:image/png;base64," + base64.b64encode(data),
        base64.encodebytes(data),
    ]
    images = [resolve(prompt="a", input_image=form).image for form in forms]
    first = images[0]
    assert first is not None
    assert first.max() > 200
    for image in images[1:]:
        assert image is not None
        np.testing.assert_array_equal(image, first)


def test_mask_and_picture_make_an_inpainting_request() -> None:
    request = resolve(prompt="a", input_image=png(64, 64), mask_image=png(64, 64, "L"))
    assert request.mode is Mode.INPAINT
    assert request.mask is not None
    assert request.mask.shape == (64, 64)
    assert request.strength == 0.8


def test_flags_in_the_prompt_set_fields_and_fields_win() -> None:
    text = "a woman --face_inpaint_denoising 0.5"
    request = resolve(prompt=text, inpaint_faces=True)
    assert request.faces.strength == 0.5
    assert request.prompt == "a woman"
    request = resolve(prompt=text, inpaint_faces=True, face_denoising_strength=0.3)
    assert request.faces.strength == 0.3


def test_inpaint_faces_turns_super_resolution_on_and_says_so_when_it_was_off() -> None:
    assert resolve(prompt="a", inpaint_faces=True).super_resolution
    request = resolve(prompt="a", inpaint_faces=True, super_resolution=False)
    assert request.super_resolution
    assert request.warnings == ("inpaint_faces turned super_resolution on.",)


def test_seeds_wrap_and_differ_when_none_is_given() -> None:
    assert resolve(prompt="a", seed=2**32 - 1, num_images=3).seeds == [2**32 - 1, 0, 1]
    drawn = {resolve(prompt="a").seed for _ in range(8)}
    assert len(drawn) > 1


def test_loras_are_refused_when_the_model_has_no_inputs_for_them() -> None:
    models = {"toy": make_manifest(lora=None)}
    problems = refused(models=models, prompt="a <lora:style:1>")
    assert "without LoRA inputs" in problems["prompt"]


def test_super_resolution_and_faces_are_refused_when_the_repository_lacks_the_models() -> None:
    assert (
        "no upscaler"
        in refused(prompt="a", super_resolution=True, has_upscaler=False)["super_resolution"]
    )
    assert (
        "no face detector"
        in refused(prompt="a", inpaint_faces=True, has_face_detector=False)["inpaint_faces"]
    )


def test_pixels_are_limited_by_the_server_option() -> None:
    problems = refused(prompt="a", w=1024, h=1024, limits=Limits(max_pixels=1024 * 512))
    assert "1024x1024 are more than this server's limit of 524288 pixels" in problems["w"]


def flux_models() -> dict[str, Any]:
    scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True}
    return {"toy": make_manifest(family="flux", native_px=1024, scheduler=scheduler)}


@pytest.mark.parametrize(
    ("fields", "field", "sentence"),
    [
        ({"negative_prompt": "blurry"}, "negative_prompt", "FLUX.1 takes none; leave it out."),
        ({"cfg_scale": 5.0}, "cfg_scale", "got 5; FLUX.1 allows 0 to less than 5."),
    ],
)
def test_flux_refuses_what_it_does_not_take(
    fields: dict[str, Any], field: str, sentence: str
) -> None:
    assert refused(models=flux_models(), prompt="a", **fields) == {field: sentence}


def test_flux_sides_are_rounded_to_its_own_multiple_and_it_says_so() -> None:
    request = resolve(models=flux_models(), prompt="a", w=904, h=1152)
    assert (request.width, request.height) == (912, 1152)
    assert request.warnings == ("rounded to multiples of 16, as FLUX.1 needs: w.",)
    assert request.cfg_scale == 3.5


def test_sampler_may_be_named_as_other_tools_name_it() -> None:
    assert resolve(prompt="a", scheduler="DPM++ 2M Karras").scheduler == "dpm++2m_karras"
    request = resolve(models=flux_models(), prompt="a", scheduler="euler_a")
    assert request.scheduler == "euler"
    assert len(request.warnings) == 1
    assert "euler_a" in request.warnings[0]


def test_negative_prompt_that_is_not_given_is_not_an_empty_one() -> None:
    assert resolve(prompt="a").negative_prompt is None
    assert resolve(prompt="a", negative_prompt="").negative_prompt == ""
