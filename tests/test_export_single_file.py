"""``python -m export`` of a checkpoint that is one file in the original key layout."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file

from closeup.errors import ExportError
from export import exporting, single_file
from export.__main__ import main, parse_options, run_export
from export.facts import ModelFacts
from export.layouts import SD15_LAYOUT, layout_of
from export.options import pipeline_fingerprint
from export.pipelines import load_component
from export.precisions import Precision
from export.single_file import converted_folder, family_of_file
from tests.original_layout import write_original_checkpoint
from tests.tiny_pipelines import write_tiny_pipeline


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_pipeline(tmp_path_factory.mktemp("single") / "pipeline")


@pytest.fixture(scope="module")
def checkpoint(pipeline: Path) -> Path:
    path = pipeline.parent / "checkpoint.safetensors"
    write_original_checkpoint(
        StableDiffusionPipeline.from_pretrained(pipeline, safety_checker=None), path
    )
    return path


@pytest.fixture(scope="module")
def configs(pipeline: Path) -> Path:
    """The pipeline's folder without its weights."""
    folder = pipeline.parent / "configs"
    shutil.copytree(pipeline, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "closeup.json").write_text(json.dumps({"native_px": 96}), encoding="utf-8")
    return folder


def test_converted_folder_has_the_weights_of_the_file(
    pipeline: Path, checkpoint: Path, configs: Path, tmp_path: Path
) -> None:
    beside = tmp_path / "repository"
    with converted_folder(checkpoint, configs, Precision.FP32, Precision.FP32, beside) as folder:
        assert layout_of(folder) is SD15_LAYOUT
        for part in SD15_LAYOUT.components:
            expected = load_component(pipeline, SD15_LAYOUT, part, torch.float32).state_dict()
            got = load_component(folder, SD15_LAYOUT, part, torch.float32).state_dict()
            assert got.keys() == expected.keys()
            assert all(torch.equal(got[key], expected[key]) for key in expected)
        for name in ("scheduler/scheduler_config.json", "tokenizer/vocab.json", "closeup.json"):
            assert (folder / name).is_file()
    assert not folder.exists()


def test_converted_folder_of_a_killed_export_is_cleared_by_the_next(
    checkpoint: Path, configs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(single_file, "_convert", lambda *given: None)
    repository = tmp_path / "repository"

    def open_folder() -> AbstractContextManager[Path]:
        return converted_folder(checkpoint, configs, Precision.FP32, Precision.FP32, repository)

    child = os.fork()
    if not child:
        manager = open_folder()
        manager.__enter__()
        os._exit(0)  # as a kill: nothing is cleaned up
    os.waitpid(child, 0)
    (left,) = tmp_path.glob(".repository-*")
    with open_folder() as folder:
        assert not left.exists()
        assert folder.is_dir()
    assert list(tmp_path.glob(".*")) == []


def test_export_takes_a_checkpoint_and_its_configs(
    checkpoint: Path, configs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, ModelFacts]] = []

    def fake(
        options: object, folder: Path, facts: ModelFacts, fingerprint: str, plans: object
    ) -> None:
        assert plans is None
        seen.append((layout_of(folder).family.name, facts))

    monkeypatch.setattr(exporting, "export_pipeline", fake)
    arguments = ["--model", str(checkpoint), "--config", str(configs), "--name", "x"]
    run_export(parse_options([*arguments, "--repository", str(tmp_path / "r")]))
    assert [(name, facts.native_px) for name, facts in seen] == [("sd15", 96)]


def test_fingerprint_changes_when_the_checkpoint_changes(
    checkpoint: Path, configs: Path, tmp_path: Path
) -> None:
    copied = tmp_path / "copy.safetensors"
    data = bytearray(checkpoint.read_bytes())
    data[-1] ^= 1
    copied.write_bytes(bytes(data))
    prints = {
        pipeline_fingerprint(parse_options(["--model", str(path), "--name", "x"]), configs,
                             ModelFacts())
        for path in (checkpoint, copied)
    }  # fmt: skip
    assert len(prints) == 2


def test_family_of_file_reads_the_keys(checkpoint: Path, tmp_path: Path) -> None:
    assert family_of_file(checkpoint) is SD15_LAYOUT
    other = tmp_path / "other.safetensors"
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(2, 2)}, other)
    with pytest.raises(ExportError, match="no checkpoint of Stable Diffusion"):
        family_of_file(other)
    other.write_bytes(b"no safetensors")
    with pytest.raises(ExportError, match="cannot be read as safetensors"):
        family_of_file(other)


def test_export_says_what_is_wrong_when_a_file_is_no_checkpoint(
    configs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.safetensors"
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(2, 2)}, other)
    common = ["--model", str(other), "--name", "x", "--repository", str(tmp_path / "r")]
    for flags, expected in (
        (["--config", str(configs)], "cannot be read as a checkpoint"),
        (["--config", str(tmp_path)], "no model_index.json"),
        ([], "no checkpoint of Stable Diffusion"),
    ):
        assert main([*common, *flags]) == 2
        message = capsys.readouterr().err
        assert expected in message
        assert message.count("\n") == 1
    assert main(["--model", str(configs), "--config", str(configs), "--name", "x"]) == 2
    assert "--config goes with" in capsys.readouterr().err


def test_flux_checkpoint_asks_for_the_other_components(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "flux.safetensors"
    save_file({
        "double_blocks.0.img_attn.norm.key_norm.scale": torch.zeros(2),
        "model.diffusion_model.double_blocks.0.img_attn.norm.key_norm.scale": torch.zeros(2),
    }, path)  # fmt: skip
    assert main(["--model", str(path), "--name", "x", "--repository", str(tmp_path / "r")]) == 2
    assert "holds FLUX.1's transformer alone: give --config" in capsys.readouterr().err
