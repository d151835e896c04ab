"""The client's command line, its display and its sheet."""

from __future__ import annotations

import argparse
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from closeup_client import FIELDS, Kind, Progress, Result, StageImage
from closeup_client.cli import build_parser, main
from closeup_client.progress import ProgressDisplay, eta_text
from closeup_client.sheet import MAX_FACES, crop_region, sheet_from_result
from PIL import Image

from tests.fake_triton import FACES, LORAS, FakeTriton, serve_grpc, serve_http


@pytest.fixture
def fake(request: pytest.FixtureRequest) -> Iterator[FakeTriton]:
    is_http = getattr(request, "param", "grpc") == "http"
    yield from (serve_http() if is_http else serve_grpc())


def run(fake: FakeTriton, *arguments: str, scheme: str = "grpc") -> int:
    return main([*arguments, "--url", f"{scheme}://127.0.0.1:{fake.port}"])


# --- generate ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fake", "scheme"), [("grpc", "grpc"), ("http", "http")], indirect=["fake"]
)
def test_generate_leaves_every_file_when_a_sheet_is_asked(
    fake: FakeTriton, scheme: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    code = run(
        fake, "generate", "two friends", "--seed", "7", "--steps", "20", "--scheduler", "euler_a",
        "--w", "256", "--h", "384", "--super-resolution", "--inpaint-faces", "--sheet",
        "--out", str(out), scheme=scheme,
    )  # fmt: skip
    assert code == 0
    names = {"picture.png", "generated.png", "before_faces.png", "sheet.png", "info.json"}
    assert {path.name for path in out.iterdir()} == names
    assert Image.open(out / "sheet.png").size[0] > 600
    text = capsys.readouterr()
    for expected in (
        "32 x 40 px",
        "seed 7",
        "super resolution",
        "12",
        "face",
        "10 x 12",
        "repainted",
        "0.61",
        "sheet.png",
    ):
        assert expected in text.out
    assert "skipped: is smaller than" in " ".join(text.out.split())
    assert "generate 4/4" in text.err
    fields = fake.requests[0][1]
    assert (fields["w"], fields["h"], fields["steps"], fields["stages"]) == (256, 384, 20, True)


def test_generate_prints_only_json_when_asked(
    fake: FakeTriton, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(fake, "generate", "a", "--seed", "13", "--json", "--out", str(tmp_path)) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["info"]["seeds"] == [13]
    assert answer["files"] == [str(tmp_path / "picture.png"), str(tmp_path / "info.json")]


def test_generate_sends_every_field_when_given_as_option(fake: FakeTriton, tmp_path: Path) -> None:
    path = tmp_path / "in.png"
    Image.new("RGB", (8, 8)).save(path)
    arguments, sent = ["generate", "a prompt"], {"prompt": b"a prompt"}
    for field in FIELDS[1:]:
        flag = f"--{field.name.replace('_', '-')}"
        if field.kind is Kind.BOOL:
            arguments.append(f"--no-{flag[2:]}")
            value: Any = False
        elif field.kind is Kind.IMAGE:
            arguments += [flag, str(path)]
            value = path.read_bytes()
        elif field.kind is Kind.STRING:
            text = field.choices[-1] if field.choices else "text"
            arguments += [flag, text]
            value = text.encode()
        else:
            arguments += [flag, f"{field.minimum:g}"]
            value = field.minimum
        sent[field.name] = value
    assert run(fake, *arguments, "--out", str(tmp_path / "out")) == 0
    assert fake.requests[0][1] == sent


def test_generate_writes_the_preview_when_previews_are_on(fake: FakeTriton, tmp_path: Path) -> None:
    assert run(fake, "generate", "a", "--previews", "--out", str(tmp_path)) == 0
    assert (tmp_path / "preview.jpg").read_bytes().startswith(b"\xff\xd8\xff")


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["a", "--steps", "abc"], 2, "steps: got 'abc'; expected an integer from 1 to 50."),
        (["a", "--w", "250", "--seed", "-1"], 2, "w: got '250'; expected a multiple of 8"),
        (["a", "--input-image", "none.png"], 2, "input_image: cannot read none.png"),
        (["a", "--sheet"], 2, "--sheet: shows what the face pass did; add --inpaint-faces."),
        (["a", "--sheet", "--inpaint-faces", "--no-stages", "--timeout-s", "0"], 2, "timeout_s"),
        (["a", "--timeout-s", "inf"], 2, "timeout_s: got inf; expected a number of seconds"),
        (["bad"], 2, "w: got 72; the demo takes up to 64."),
        (["full"], 3, "all 4 slots are taken"),
        (["broken"], 1, "its log names the cause"),
        (["mute"], 1, "without a result"),
        (["slow", "--timeout-s", "0.3"], 1, "within 0.3 s"),
    ],
)
def test_generate_exits_with_a_sentence_when_it_fails(
    fake: FakeTriton,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    sentence: str,
) -> None:
    assert run(fake, "generate", *arguments, "--out", str(tmp_path)) == code
    text = capsys.readouterr()
    assert sentence in text.err
    assert text.out == ""


def test_failure_is_json_too_when_json_is_asked(
    fake: FakeTriton, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(fake, "generate", "bad", "--json", "--out", str(tmp_path)) == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["code"] == "INVALID_ARG"
    assert list(error["problems"]) == ["w", "lora"]


def test_unknown_option_exits_2_when_given(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["generate", "a", "--step", "4"])
    assert caught.value.code == 2
    assert "--step" in capsys.readouterr().err


def test_every_command_exits_3_when_nobody_listens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"127.0.0.1:{probe.getsockname()[1]}"
        for command in (
            ["generate", "a", "--out", str(tmp_path)],
            ["models"],
            ["loras"],
            ["health"],
        ):
            for protocol in ("grpc", "http"):
                assert main([*command, "--url", url, "--protocol", protocol]) == 3
                assert f"no server answers at {url}" in capsys.readouterr().err


def test_generate_exits_1_when_the_folder_cannot_be_made(
    fake: FakeTriton, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert run(fake, "generate", "a", "--out", str(tmp_path / "file" / "out")) == 1
    assert "cannot write the files" in capsys.readouterr().err
    assert fake.requests == []


def test_ctrl_c_cancels_the_request_when_it_runs(fake: FakeTriton, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "closeup_client.cli", "generate", "slow"]
    command += ["--url", f"127.0.0.1:{fake.port}", "--out", str(tmp_path)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        limit_s = time.monotonic() + 60
        while not fake.requests and time.monotonic() < limit_s:
            time.sleep(0.02)
        time.sleep(0.1)
        os.kill(process.pid, signal.SIGINT)
        try:
            _, text = process.communicate(timeout=5)
        except subprocess.TimeoutExpired:
            # An interrupt that arrives inside one of gRPC's callbacks is lost; users press again.
            os.kill(process.pid, signal.SIGINT)
            _, text = process.communicate(timeout=60)
    assert process.returncode == 1
    assert text.splitlines()[-1] == "closeup-client: cancelled."
    assert "Traceback" not in text
    assert fake.left.wait(5)


# --- models, health ---------------------------------------------------------------------------


def test_models_says_what_is_served_when_asked(
    fake: FakeTriton, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(fake, "models") == 0
    text = capsys.readouterr().out
    assert "demo" in text
    assert "UNAVAILABLE engine made elsewhere" in " ".join(text.split())
    assert "missing" in text  # the face detector
    assert run(fake, "models", "--json") == 0
    served = json.loads(capsys.readouterr().out)
    assert [model["name"] for model in served["pipelines"]] == ["broken", "demo"]


def test_loras_prints_the_folder_when_asked(
    fake: FakeTriton, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(fake, "loras") == 0
    text = capsys.readouterr().out
    rows = [line.split() for line in text.splitlines()]
    assert ["1795721", "627", "denoiser,", "text_encoder"] in rows  # 641816 bytes
    assert "not loaded yet" in text
    assert str(LORAS[1]["id"]) in "".join(text.split()).replace("1notloadedyet", "")  # folded
    assert run(fake, "loras", "--model", "demo", "--json") == 0
    assert json.loads(capsys.readouterr().out) == [
        {"id": one["id"], "size_bytes": one["bytes"], "networks": one["networks"]} for one in LORAS
    ]
    fake.loras = "[]"
    assert run(fake, "loras") == 0
    assert capsys.readouterr().out == (
        "The server has no LoRAs; it takes their folder as --lora-dir.\n"
    )


@pytest.mark.parametrize(
    ("model", "code", "line"),
    [
        ("nope", 2, "closeup-client: model: got 'nope'; served are broken, demo.\n"),
        ("broken", 3, "closeup-client: the model broken is not ready: engine made elsewhere.\n"),
    ],
)
def test_loras_exits_with_a_sentence_when_the_model_is_not_served(
    fake: FakeTriton, capsys: pytest.CaptureFixture[str], model: str, code: int, line: str
) -> None:
    assert run(fake, "loras", "--model", model) == code
    assert capsys.readouterr().err == line


def test_health_exits_by_readiness_when_asked(
    fake: FakeTriton, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(fake, "health") == 0
    assert capsys.readouterr().out == f"127.0.0.1:{fake.port} (grpc): ready (triton 2.51.0)\n"
    fake.is_ready = False
    assert run(fake, "health", "--json") == 3
    assert json.loads(capsys.readouterr().out)["ready"] is False


# --- options, progress ------------------------------------------------------------------------


def test_parser_offers_every_field_when_built() -> None:
    commands = next(
        action
        for action in build_parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    )
    generate = commands.choices["generate"]
    assert {field.name for field in FIELDS} <= {action.dest for action in generate._actions}
    assert "pathlib" not in generate.format_help()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_display_names_stage_step_and_eta_when_updated(stream: io.StringIO) -> None:
    with ProgressDisplay(stream) as display:
        display.update(Progress(stage="generate", step=5, steps=20, eta_s=12.2, elapsed_s=4.0))
        if display._bars:
            display._bars.refresh()
        display.update(Progress(stage="face_pass", step=0, steps=0))
    text = stream.getvalue()
    assert "generate" in text
    assert "5/20" in text
    assert "12 s left" in text
    assert "face pass" in text


def test_eta_is_readable_when_long_or_unknown() -> None:
    times = [(125.0, "2:05 left"), (59.4, "59 s left"), (None, ""), (-1.0, "0 s left")]
    for eta_s, text in times:
        assert eta_text(Progress(stage="a", step=1, steps=9, eta_s=eta_s)) == text
    assert eta_text(Progress(stage="a", step=9, steps=9, eta_s=3.0)) == ""


# --- sheet ------------------------------------------------------------------------------------


def png(pixels: np.ndarray[Any, Any]) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG")
    return stream.getvalue()


def result_with_faces(size: tuple[int, int], boxes: list[list[float]]) -> Result:
    before = np.full((size[1], size[0], 3), (200, 0, 0), np.uint8)
    after = np.full((size[1], size[0], 3), (0, 0, 200), np.uint8)
    faces = [{**FACES[0], "index": i, "box": box} for i, box in enumerate(boxes)]
    return Result(
        images=[png(after)],
        info={"seeds": [1], "images": [{"faces": faces}], "size": list(size)},
        stages=[StageImage(image=0, stage="generated", data=png(before))],
        face_pass=True,
    )


@pytest.mark.parametrize("count", [0, 1, 2, 3, 5, 6, 30])
@pytest.mark.parametrize("size", [(64, 96), (640, 300)])
def test_sheet_shows_both_pictures_when_there_are_faces(size: tuple[int, int], count: int) -> None:
    rng = np.random.default_rng(count)
    corners = rng.uniform(0, 1, (count, 2)) * (size[0] - 12, size[1] - 12)
    boxes = [[x, y, x + 8 + i / 9, y + 10] for i, (x, y) in enumerate(corners.tolist())]
    sheet = np.asarray(Image.open(io.BytesIO(sheet_from_result(result_with_faces(size, boxes)))))
    red = np.all(sheet == (200, 0, 0), axis=2)
    blue = np.all(sheet == (0, 0, 200), axis=2)
    # Same scale on both sides, and hairlines and numbers cost both sides the same.
    assert red.sum() == pytest.approx(blue.sum(), rel=0.01)
    # Whole pictures: at least 1.9 times as large a side here, less a tenth for the hairlines.
    assert red.sum() > 0.9 * size[0] * size[1] * min(1.9, 660 / size[0]) ** 2
    columns = np.flatnonzero(red.any(0)), np.flatnonzero(blue.any(0))
    assert columns[0][0] < columns[1][0]
    assert sheet.shape[0] < 4000


def test_sheet_keeps_the_largest_faces_when_there_are_many() -> None:
    few = result_with_faces((400, 300), [[i * 40.0, 10, i * 40 + 30, 40] for i in range(MAX_FACES)])
    many = result_with_faces(
        (400, 300),
        [[i * 40.0, 10, i * 40 + 30, 40] for i in range(MAX_FACES)]
        + [[i * 10.0, 200, i * 10 + 5, 205] for i in range(24)],
    )
    sizes = [Image.open(io.BytesIO(sheet_from_result(result))).size for result in (few, many)]
    assert sizes[0] == sizes[1]


def test_sheet_crops_are_the_faces_when_enlarged() -> None:
    result = result_with_faces((200, 200), [[90.0, 90.0, 110.0, 110.0]])
    pixels = np.zeros((200, 200, 3), np.uint8)
    pixels[80:120, 80:120] = (0, 255, 0)  # exactly the crop: twice the face
    marked = Result(images=[png(pixels)], info=result.info, stages=result.stages, face_pass=True)
    sheet = np.asarray(Image.open(io.BytesIO(sheet_from_result(marked))))
    # Lanczos rings by a tenth inside an edge and is halfway at it.
    green = (sheet[..., 1] > 200) & (sheet[..., 0] < 60) & (sheet[..., 2] < 60)
    rows = np.flatnonzero(green.sum(1) > 250)  # wider than the square in the overview, 96 px
    columns = np.flatnonzero(green[rows[0] : rows[-1] + 1].all(0))
    # The tile is all of the panel's width, 480 px, less half a source pixel (6 px) on each side.
    assert abs(rows.size - columns.size) <= 6  # corners: both edges at once
    assert 480 - 2 * 8 <= rows.size <= 480


@pytest.mark.parametrize(
    ("box", "region"),
    [
        ((40.0, 40.0, 60.0, 50.0), (30.0, 25.0, 70.0, 65.0)),
        ((0.0, 0.0, 20.0, 20.0), (0.0, 0.0, 40.0, 40.0)),
        ((90.0, 70.0, 100.0, 80.0), (80.0, 60.0, 100.0, 80.0)),
        ((0.0, 0.0, 100.0, 80.0), (10.0, 0.0, 90.0, 80.0)),
    ],
)
def test_crop_region_stays_inside_when_a_face_is_at_the_border(
    box: tuple[float, float, float, float], region: tuple[float, float, float, float]
) -> None:
    assert crop_region(box, (100, 80)) == region


def test_sheet_is_refused_when_there_is_no_picture_from_before() -> None:
    result = result_with_faces((64, 64), [])
    bare = Result(images=result.images, info=result.info, stages=[], face_pass=True)
    with pytest.raises(ValueError, match="needs `stages`"):
        sheet_from_result(bare)
