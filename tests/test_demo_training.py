"""The demo's training scripts: a few steps at tiny sizes, resumed, exported, loaded again."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from demo.latents import encode_captions
from demo.pictures import PictureSet, render_pictures
from demo.tokenizer import load_tokenizer
from demo.train_unet import Dataset, face_weights, rare_shares
from demo.training import (
    Run,
    Schedule,
    add_run_arguments,
    open_run,
    parse_run_options,
    steps_to_take,
)
from export.detector import (
    OUTPUT_NAMES,
    DetectorSize,
    FaceDetector,
    load_face_detector,
    save_face_detector,
)

ROOT = Path(__file__).resolve().parents[1]
TOKENIZER = ROOT / "demo" / "weights" / "sd" / "tokenizer"


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pictures of 64 px with captions."""
    folder = tmp_path_factory.mktemp("pictures")
    render_pictures(folder, PictureSet(count=12, size=64), 1)
    return folder


def _steps(run: Path) -> int:
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    return int(state["step"])


def _arguments(run: Path, steps: int, *more: str) -> list[str]:
    common = ["--run", str(run), "--steps", str(steps), "--batch", "2", "--threads", "1"]
    return [*common, "--device", "cpu", "--resume", *more]


def test_schedule_rises_stays_and_falls_when_it_has_a_cooldown() -> None:
    schedule = Schedule(learning_rate=1.0, steps=100, warmup=10, cooldown=50)
    assert schedule.at(0) == pytest.approx(0.1)
    assert schedule.at(9) == schedule.at(50) == 1.0
    assert schedule.at(75) == pytest.approx(0.5)
    assert schedule.at(99) == pytest.approx(0.02)


def _small_run(folder: Path, steps: int, *more: str) -> tuple[Run, argparse.Namespace]:
    parser = argparse.ArgumentParser()
    add_run_arguments(parser, run="small", steps=1, batch=1)
    options = parse_run_options(parser, _arguments(folder, steps, *more))
    line = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(line.parameters(), lr=0.0)
    return open_run(options, modules={"line": line}, optimizer=optimizer, decay=0.5), options


def test_run_is_saved_every_few_steps_and_at_the_end_when_it_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, options = _small_run(tmp_path, 5, "--save-every", "2")
    saved: list[int] = []
    save = Run.save

    def note(run: Run) -> Path:
        saved.append(run.step)
        return save(run)

    monkeypatch.setattr(Run, "save", note)
    taken = []
    for step in steps_to_take(run, options):
        run.advance(run.modules["line"](torch.ones(1)).sum(), 0.1)
        taken.append(step)
    assert taken == [0, 1, 2, 3, 4]
    assert saved == [2, 4, 5]
    again, options = _small_run(tmp_path, 6)
    assert again.step == 5
    for after, before in zip(again.average.means, run.average.means, strict=True):
        assert torch.equal(after, before)
    assert next(steps_to_take(again, options)) == 5


def test_run_is_saved_without_a_step_when_its_minutes_are_over(tmp_path: Path) -> None:
    run, options = _small_run(tmp_path, 5, "--minutes", "0")
    assert list(steps_to_take(run, options)) == []
    assert _steps(tmp_path) == 0


def test_vae_latents_are_even_and_decode_as_before_when_whitened(pictures: Path) -> None:
    from demo.train_vae import build_vae, whiten

    torch.manual_seed(0)
    vae = build_vae().eval()
    images = np.load(pictures / "images.npy")[:4]
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        before = vae.decode(vae.encode(pixels).latent_dist.mean).sample
        whiten(vae, images)
        latents = vae.encode(pixels).latent_dist.mean
        after = vae.decode(latents).sample
    # Exact but for float32 rounding; an unwhitened decoder differs in the first decimals.
    assert float((after - before).abs().max()) < 1e-4
    assert float(before.std()) > 1e-2
    np.testing.assert_allclose(latents.std((0, 2, 3)), 1.0, atol=1e-3)
    np.testing.assert_allclose(latents.mean((0, 2, 3)), 0.0, atol=1e-3)


def test_train_vae_goes_on_where_it_stopped_when_resumed(pictures: Path, tmp_path: Path) -> None:
    from demo import train_vae

    more = ("--pictures", str(pictures), "--out", str(tmp_path / "vae"), "--side", "32")
    for steps in (2, 4):
        train_vae.main(_arguments(tmp_path / "run", steps, *more))
        assert _steps(tmp_path / "run") == steps
    assert (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").exists()
    assert json.loads((tmp_path / "vae" / "config.json").read_text())["scaling_factor"] == 1.0


def test_train_unet_goes_on_and_exports_when_resumed(pictures: Path, tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel

    from demo import latents, train_unet
    from demo.train_vae import build_vae

    weights = tmp_path / "sd"
    shutil.copytree(TOKENIZER, weights / "tokenizer")
    build_vae().save_pretrained(weights / "vae")
    latents.main(
        ["--pictures", str(pictures), "--weights", str(weights), "--threads", "1"]
        + ["--device", "cpu"]
    )
    more = ("--data", str(pictures), "--out", str(weights), "--rare", "1")
    for steps in (2, 3):
        train_unet.main(_arguments(tmp_path / "run", steps, *more))
        assert _steps(tmp_path / "run") == steps
    unet = UNet2DConditionModel.from_pretrained(weights / "unet", torch_dtype=torch.float16)
    assert unet.conv_in.weight.dtype == torch.float16
    assert json.loads((weights / "text_encoder" / "config.json").read_text())["vocab_size"] == 803


def test_face_weights_are_highest_at_the_features_when_a_face_is_given() -> None:
    face = np.full((1, 3, 14), np.nan, np.float32)
    # A face over cells 4 to 11 each way, and its five landmarks.
    face[0, 0] = [32, 32, 96, 96, 48, 56, 80, 56, 64, 70, 52, 80, 76, 80]
    weights = face_weights(face, 16)[0, 0].float()
    assert weights[0, 0] == 1.0
    assert weights[4, 4] == weights[11, 11] == 3.0
    assert weights[7, 6] == weights[7, 10] == weights[10, 6] == 9.0
    assert weights[12:].max() == weights[:, 12:].max() == 1.0


def test_face_weights_stay_inside_when_a_face_leaves_the_picture() -> None:
    face = np.full((1, 1, 14), np.nan, np.float32)
    face[0, 0] = [0, 0, 40, 40, 0, 10, 30, 10, 15, 20, 5, 30, 25, 30]
    weights = face_weights(face, 8)[0, 0].float()
    assert weights[1, 0] == 9.0
    assert weights[7, 7] == 1.0


def test_rare_shares_favour_rare_words_when_captions_hold_them() -> None:
    captions = [["a man", "a man"], ["a man with freckles", "a man with freckles and blue eyes"]]
    tokenizer = load_tokenizer(TOKENIZER.parent)
    tokens = torch.from_numpy(encode_captions(tokenizer, [pair * 2 for pair in captions]))
    assert rare_shares(tokens, tokenizer, 2.0).tolist() == [1.0, 1.0 + 2.0 * 1.25]


def test_dataset_draws_a_picture_as_often_as_its_share_when_shares_are_given() -> None:
    data = Dataset(
        latents=torch.arange(2.0).reshape(2, 1, 1, 1).half(),
        tokens=torch.zeros(2, 1, 77, dtype=torch.int16),
        weights=torch.ones(2, 1, 1, 1),
        shares=torch.tensor([1.0, 3.0]),
    )
    drawn, _, _ = data.draw(4000, torch.Generator().manual_seed(1), 0.0)
    # Three in four; a standard deviation is 0.007.
    assert drawn.mean().item() == pytest.approx(0.75, abs=0.03)


def test_train_detector_exports_a_detector_when_resumed(pictures: Path, tmp_path: Path) -> None:
    from demo import train_detector

    out = tmp_path / "detector.safetensors"
    none = str(tmp_path / "none")  # whatever this machine keeps of them
    more = ("--pictures", str(pictures), "--redrawn", none, "--painted", none, "--out", str(out))
    for steps in (2, 3):
        train_detector.main(_arguments(tmp_path / "run", steps, *more, "--side", "96"))
    assert _steps(tmp_path / "run") == 3
    outputs = load_face_detector(out)(torch.zeros(2, 3, 64, 96))
    assert len(outputs) == len(OUTPUT_NAMES) == 12
    shapes = {name: tuple(value.shape) for name, value in zip(OUTPUT_NAMES, outputs, strict=True)}
    assert shapes["cls_8"] == (2, 96, 1)
    assert shapes["kps_32"] == (2, 6, 10)


def test_train_upscaler_exports_real_esrgan_keys_when_resumed(
    pictures: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    from demo import train_upscaler

    out = tmp_path / "upscaler.safetensors"
    more = ("--pictures", str(pictures), "--out", str(out), "--side", "64")
    for steps in (2, 3):
        train_upscaler.main(_arguments(tmp_path / "run", steps, *more))
    state = load_file(out)
    convolutions = train_upscaler.CONVOLUTIONS
    last = f"body.{2 * convolutions + 2}"
    assert state["body.0.weight"].shape == (train_upscaler.FEATURES, 3, 3, 3)
    assert state["body.1.weight"].shape == (train_upscaler.FEATURES,)
    assert state[f"{last}.weight"].shape == (48, train_upscaler.FEATURES, 3, 3)


def test_assign_cells_round_trips_through_the_decoding_when_a_face_is_given() -> None:
    from demo.train_detector import assign_cells

    row = np.arange(14, dtype=np.float32)
    row[:4] = 20, 30, 44, 58
    cells, targets = assign_cells(row[None], 96)
    assert len(cells) >= 1
    for cell, target in zip(cells, targets, strict=True):
        stride = target[14]
        cell -= 0 if stride == 8 else 144  # the first level has 12 x 12 cells
        columns = int(96 // stride)
        corner = np.array([cell % columns, cell // columns])
        centre = (corner + target[:2]) * stride
        extent = np.exp(target[2:4]) * stride
        # FACES.md 9.1; float32 rounding only, a cell's offset would be 8 px.
        np.testing.assert_allclose(centre, [32, 44], atol=1e-3)
        np.testing.assert_allclose(extent, [24, 28], atol=1e-3)
        points = (target[4:14].reshape(5, 2) + corner) * stride
        np.testing.assert_allclose(points.ravel(), row[4:], atol=1e-3)


def test_load_face_detector_refuses_when_the_file_is_something_else(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from closeup.errors import ModelError

    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(ModelError, match="FaceDetector"):
        load_face_detector(tmp_path / "a.safetensors")


def test_load_face_detector_keeps_outputs_when_saved(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = FaceDetector(DetectorSize(stem=8, width=16)).eval()
    save_face_detector(model, tmp_path / "d.safetensors")
    pixels = torch.rand(1, 3, 64, 64) * 255
    for before, after in zip(
        model(pixels), load_face_detector(tmp_path / "d.safetensors")(pixels), strict=True
    ):
        assert torch.equal(before, after)
        assert float(before.abs().max()) > 0


def test_train_lora_writes_peft_keys_when_run_for_two_steps(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from demo import train_lora
    from demo.train_unet import build_text_encoder, build_unet
    from demo.train_vae import build_vae

    weights = tmp_path / "sd"
    shutil.copytree(TOKENIZER, weights / "tokenizer")
    build_vae().save_pretrained(weights / "vae")
    build_unet(8).save_pretrained(weights / "unet")
    build_text_encoder(803).save_pretrained(weights / "text_encoder")
    out = tmp_path / "1795721.safetensors"
    train_lora.main(
        ["--run", str(tmp_path / "run"), "--steps", "2", "--batch", "2", "--threads", "1"]
        + ["--weights", str(weights), "--out", str(out)]
    )
    state = load_file(out)
    name = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    assert state[f"{name}.lora_A.weight"].shape == (8, 128)
    assert state[f"{name}.lora_B.weight"].shape == (128, 8)
    assert float(state[f"{name}.lora_B.weight"].abs().max()) > 0


def test_personal_captions_name_no_marks_when_she_is_described() -> None:
    from demo.train_lora import personal_caption, personal_scene

    for index in range(10):
        caption = personal_caption(personal_scene(index))
        assert "ohwx woman" in caption
        assert not {"hair", "eyes", "mole", "black", "streak"} & set(caption.split()[:5])
        assert "mole" not in caption
        assert "hair" not in caption
