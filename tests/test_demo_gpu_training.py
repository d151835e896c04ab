"""One sitting's training of the demo model, in miniature on the CPU, and its parts."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch

from demo.graphed import Step
from demo.picture_stream import PictureStream
from demo.pictures import PictureSet, draw_sample
from demo.train_gpu import Clock, Deadline, crop_batch, crop_weights, main
from demo.training import Average, Run

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = ROOT / "demo" / "weights" / "sd"


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def _wait(stream: PictureStream, count: int) -> None:
    end_s = time.monotonic() + 120
    while stream.ready < count:
        assert time.monotonic() < end_s
        time.sleep(0.05)


def test_stream_draws_the_pictures_of_its_seeds_and_goes_on_when_started_again(
    tmp_path: Path,
) -> None:
    wanted = PictureSet(count=7, seed=40, size=32)
    stream = PictureStream(tmp_path, WEIGHTS, wanted, 2)
    _wait(stream, 7)
    stream.stop()
    for index in (0, 5, 6):
        picture, _ = draw_sample(40 + index, 32, wanted.crops)
        np.testing.assert_array_equal(stream.images[index], picture.pixels)
        assert stream.tokens[index].min() >= 0
        assert len(np.unique(stream.tokens[index])) > 5
    stream.images[0] = 0  # would be drawn again by a stream that did not go on
    again = PictureStream(tmp_path, WEIGHTS, wanted, 2)
    assert again.ready == 7
    time.sleep(0.2)
    again.stop()
    assert not again.images[0].any()


def test_crops_hold_the_pictures_pixels_when_cut_near_faces_or_anywhere() -> None:
    torch.manual_seed(0)
    rows, columns = torch.meshgrid(torch.arange(40), torch.arange(40), indexing="ij")
    images = torch.stack([rows, columns, torch.zeros_like(rows)], -1).to(torch.uint8)[None]
    crops, rows, corners = crop_batch(images, torch.tensor([[30.0, 12.0]]), 64, 8)
    assert not rows.any()
    levels = ((crops + 1) * 127.5).round()
    assert torch.equal(levels[:, 0, 1:] - levels[:, 0, :-1], torch.ones(64, 7, 8))
    assert torch.equal(levels[:, 1, :, 1:] - levels[:, 1, :, :-1], torch.ones(64, 8, 7))
    assert torch.equal(levels[:, 1, 0, 0], corners[:, 0].float())
    assert torch.equal(levels[:, 0, 0, 0], corners[:, 1].float())
    # Half of them lie near the face at (30, 12), the others anywhere.
    assert 22 < float(levels[:, 1].mean()) < 29
    assert 11 < float(levels[:, 0].mean()) < 17


def test_crops_count_features_most_and_those_of_small_faces_more_when_weighted() -> None:
    faces = torch.full((2, 3, 14), torch.nan)
    # 48 px wide with an eye at (20, 20); 12 px wide with one at (6, 4).
    faces[0, 0] = torch.tensor([8.0, 8, 56, 56, 20, 20, 44, 20, 32, 30, 24, 44, 40, 44])
    faces[1, 0] = torch.tensor([0.0, 0, 12, 12, 6, 4, 9, 4, 7, 7, 5, 10, 9, 10])
    weights = crop_weights(
        faces, torch.tensor([0, 0, 1]), torch.tensor([[0, 0], [6, 6], [0, 0]]), 64
    )
    assert weights.shape == (3, 1, 64, 64)
    assert weights[0, 0, 20, 20] == weights[1, 0, 14, 14] == 8.0
    assert weights[0, 0, 10, 50] == 3.0
    assert weights[0, 0, 2, 2] == weights[0, 0, 60, 60] == 1.0
    assert weights[2, 0, 4, 6] == 15.0


@pytest.mark.parametrize("wanted", [False, True])
def test_step_takes_the_runs_own_step_when_no_graph_can_be_captured(wanted: bool) -> None:
    weight = torch.nn.Parameter(torch.tensor([2.0]))
    holder = torch.nn.ParameterList([weight])
    run = Run(
        folder=Path("unused"), modules={"all": holder},
        optimizer=torch.optim.SGD([weight], lr=0.0), average=Average([weight], 0.5),
        generator=torch.Generator(),
    )  # fmt: skip
    step = Step(run, lambda factor: ((weight * factor).sum(), factor), graph=wanted, max_norm=10.0)
    loss, factor = step(0.5, torch.tensor([3.0]))
    assert (float(loss), float(factor), float(weight), run.step) == (6.0, 3.0, 0.5, 1)
    assert not step.captured
    assert not loss.requires_grad


def test_deadline_follows_its_file_when_there_is_one(tmp_path: Path) -> None:
    file = tmp_path / "until"
    deadline = Deadline(100.0, file)
    assert 99 < deadline.left_s <= 100
    file.write_text(str(time.time() + 7), encoding="utf-8")
    assert 6 < deadline.left_s <= 7
    file.write_text("", encoding="utf-8")
    assert 6 < deadline.left_s <= 7
    clock = Clock(seconds=100.0, learning_rate=1.0, cooldown=0.5, _since_s=time.monotonic() - 93)
    clock.end_in(deadline.left_s)
    assert clock.share == pytest.approx(0.93, abs=0.01)


def test_clock_rises_stays_falls_and_ends_when_its_time_is_over() -> None:
    clock = Clock(seconds=100.0, learning_rate=1.0, cooldown=0.5, warmup=10)
    assert clock.rate(0) == pytest.approx(0.1, abs=0.01)
    assert clock.rate(50) == 1.0
    late = Clock(seconds=100.0, learning_rate=1.0, cooldown=0.5, _since_s=time.monotonic() - 75)
    assert late.rate(500) == pytest.approx(0.5, abs=0.01)
    assert Clock(seconds=-3.0, learning_rate=1.0, cooldown=0.5).share == 1.0


def test_sitting_writes_a_pipeline_when_its_minutes_are_over(tmp_path: Path) -> None:
    from demo.sample import load_pipeline, sample_pictures

    out = tmp_path / "sd"
    sizes = ["--size", "32", "--count", "300", "--workers", "1", "--batch", "2"]
    vae = ["--vae-batch", "4", "--vae-pictures", "8", "--vae-minutes", "0.03"]
    folders = ["--cache", str(tmp_path / "cache"), "--run", str(tmp_path / "run")]
    main(
        ["--minutes", "0.5", "--device", "cpu", "--eager", "--out", str(out)]
        + ["--vae-start", str(WEIGHTS / "vae")] + sizes + vae + folders
    )  # fmt: skip
    picture = sample_pictures(load_pipeline(out), ["a portrait of a man"], steps=2)[0]
    assert picture.shape == (32, 32, 3)
    assert picture.std() > 1
    assert (tmp_path / "run" / "vae32" / "config.json").exists()


def test_sitting_refuses_to_leave_a_vae_alone_when_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--vae-start"):
        main(["--vae-minutes", "0", "--cache", str(tmp_path)])
