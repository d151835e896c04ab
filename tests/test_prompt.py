"""LoRA tags and flags inside a prompt."""

from __future__ import annotations

import time

import pytest

from closeup.errors import RequestError
from closeup.prompt import LoraTag, is_lora_id, parse_prompt

GOLDEN = (
    "<lora:1795721:1.0> Surrounded by the natural beauty of a serene, wooded environment, the "
    "ohwx woman exudes a sense of tranquility and connection with her surroundings."
)


def test_parse_prompt_finds_the_lora_when_given_the_golden_request() -> None:
    parsed = parse_prompt(GOLDEN)
    assert parsed.loras == (LoraTag(id="1795721", weight=1.0),)
    assert parsed.text == GOLDEN.removeprefix("<lora:1795721:1.0> ")
    assert dict(parsed.flags) == {}


def test_parse_prompt_changes_nothing_when_there_is_no_tag() -> None:
    prompt = "  (a  woman:1.2), <b>, -- a--b\n\tin a [park] --fix_bindi 3 "
    assert parse_prompt(prompt).text == prompt


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("a woman <lora:x:1> in a park", "a woman in a park"),
        ("a woman, <lora:x:1>, in a park", "a woman, in a park"),
        ("a woman<lora:x:1>, in a park", "a woman, in a park"),
        ("a woman <lora:x:1>, in a park", "a woman, in a park"),
        ("a woman<lora:x:1>in a park", "a woman in a park"),
        ("a woman <lora:x:1>", "a woman"),
        ("a woman, <lora:x:1>", "a woman"),
        ("<lora:x:1>, a woman", "a woman"),
        ("<lora:x:1> <lora:y:1>  a woman <lora:z> ", "a woman"),
        ("<lora:x:1>, <lora:y:1> a woman", "a woman"),
        ("a (<lora:x:1> red:1.2) hat <lora:x:1>.", "a (red:1.2) hat."),
        ("a woman\n<lora:x:1>\nin a park", "a woman\nin a park"),
        ("a  woman <lora:x:1> in  a park", "a  woman in  a park"),
        ("<lora:x:1>", ""),
    ],
)
def test_parse_prompt_leaves_the_text_one_would_type_when_tags_go(prompt: str, text: str) -> None:
    assert parse_prompt(prompt).text == text


@pytest.mark.parametrize(
    ("tag", "expected"),
    [
        ("<lora:a>", LoraTag(id="a", weight=1.0)),
        ("<LoRA: a.b-c_d : -0.5 >", LoraTag(id="a.b-c_d", weight=-0.5)),
        ("<lora:a:1e-2>", LoraTag(id="a", weight=0.01)),
        ("<lora:a:.5>", LoraTag(id="a", weight=0.5)),
        ("<lora:a:10>", LoraTag(id="a", weight=10.0)),
        ("<lora:a:0>", LoraTag(id="a", weight=0.0)),
    ],
)
def test_parse_prompt_reads_the_tag_when_spelled_like_this(tag: str, expected: LoraTag) -> None:
    assert parse_prompt(f"a {tag} b").loras == (expected,)


def test_parse_prompt_adds_the_weights_when_an_id_is_repeated() -> None:
    parsed = parse_prompt("<lora:b:0.25> <lora:a:1> x <lora:b:0.5>")
    assert parsed.loras == (LoraTag(id="b", weight=0.75), LoraTag(id="a", weight=1.0))


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("<lora:../../etc/passwd:1>", "cannot be a LoRA id"),
        ("<lora:a/b:1>", "cannot be a LoRA id"),
        ("<lora:a\\b:1>", "cannot be a LoRA id"),
        ("<lora:..:1>", "cannot be a LoRA id"),
        ("<lora:a..b:1>", "cannot be a LoRA id"),
        ("<lora:.hidden:1>", "cannot be a LoRA id"),
        ("<lora::1>", "cannot be a LoRA id"),
        ("<lora:a\nb:1>", "cannot be a LoRA id"),
        ("<lora:a\x00:1>", "cannot be a LoRA id"),
        ("<lora:" + "a" * 129 + ":1>", "cannot be a LoRA id"),
        ("<lora:é:1>", "cannot be a LoRA id"),
        ("<lora:a:>", "must be a number"),
        ("<lora:a:nan>", "must be a number"),
        ("<lora:a:inf>", "must be a number"),
        ("<lora:a:1_0>", "must be a number"),
        ("<lora:a:1e999>", "from -10 to 10"),
        ("<lora:a:10.1>", "from -10 to 10"),
        ("<lora:a:-10.1>", "from -10 to 10"),
        ("<lora:a:1:2>", "is not a LoRA tag"),
        ("<lora:a:1", "is not a LoRA tag"),
        ("<lora>", "is not a LoRA tag"),
        ("<lora1795721:1.0>", "is not a LoRA tag"),
        ("<lora:a:6><lora:a:6>", "add up to 12"),
        (" ".join(f"<lora:a{index}>" for index in range(17)), "17 different LoRAs"),
    ],
)
def test_parse_prompt_refuses_in_one_sentence_when_a_tag_is_malformed(
    prompt: str, words: str
) -> None:
    with pytest.raises(RequestError) as caught:
        parse_prompt("a woman " + prompt)
    assert list(caught.value.problems) == ["prompt"]
    assert words in caught.value.problems["prompt"]
    assert caught.value.problems["prompt"].endswith(".")
    assert len(caught.value.problems["prompt"]) < 250


def test_parse_prompt_names_the_field_when_told_which_it_reads() -> None:
    with pytest.raises(RequestError) as caught:
        parse_prompt("<lora:..>", field_name="face_prompt")
    assert list(caught.value.problems) == ["face_prompt"]


@pytest.mark.parametrize(
    ("prompt", "text", "flags"),
    [
        ("a --hires_denoising_strength 0.3 b", "a b", {"hires_denoising_strength": "0.3"}),
        ("a --hires_denoising_strength=0.3, b", "a, b", {"hires_denoising_strength": "0.3"}),
        ("--face_inpaint_denoising .5", "", {"face_denoising_strength": ".5"}),
        ("a woman --only_upscale", "a woman", {"only_upscale": "true"}),
        ("a --only_upscale=false woman", "a woman", {"only_upscale": "false"}),
        ("a --only_upscale <lora:x> woman", "a woman", {"only_upscale": "true"}),
        ("a --only_upscaled woman", "a --only_upscaled woman", {}),
        ("a--only_upscale woman", "a--only_upscale woman", {}),
        ("a --unknown 3", "a --unknown 3", {}),
        (
            "--face_inpaint_denoising 0.5 --only_upscale a --face_inpaint_denoising 0.6",
            "a",
            {"face_denoising_strength": "0.6", "only_upscale": "true"},
        ),
    ],
)
def test_parse_prompt_takes_known_flags_when_they_stand_alone(
    prompt: str, text: str, flags: dict[str, str]
) -> None:
    parsed = parse_prompt(prompt)
    assert (parsed.text, dict(parsed.flags)) == (text, flags)


@pytest.mark.parametrize("value", ["", " high", " nan", " --only_upscale", " 0.3.1"])
def test_parse_prompt_refuses_when_a_flag_lacks_its_number(value: str) -> None:
    with pytest.raises(RequestError, match="--face_inpaint_denoising needs a number"):
        parse_prompt("a --face_inpaint_denoising" + value)


@pytest.mark.parametrize(
    "prompt",
    [
        "<lora:" + " " * 20_000,
        "<" * 20_000,
        "<lora:a:1>" * 2_000,
        "--only_upscale " * 1_500,
        "--hires_denoising_strength" + " " * 20_000,
    ],
)
def test_parse_prompt_is_quick_when_the_prompt_is_hostile(prompt: str) -> None:
    start = time.perf_counter()
    try:
        parse_prompt(prompt)
    except RequestError:
        pass
    # A linear scan takes milliseconds; backtracking over 20,000 characters takes minutes.
    assert time.perf_counter() - start < 2.0


def test_is_lora_id_refuses_when_a_newline_ends_it() -> None:
    assert is_lora_id("1795721")
    assert not is_lora_id("1795721\n")
