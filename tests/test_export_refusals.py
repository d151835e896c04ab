"""What ``python -m export`` refuses before it exports anything, and how it says so."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from closeup.errors import ExportError, ModelError
from closeup.families import FLUX, SD15, Family
from closeup.manifest import INDEX_NAME, MANIFEST_NAME, Defaults, manifest_json, read_models
from closeup.repository import Repository
from export import exporting
from export.__main__ import main
from export.facts import ModelFacts, check_facts
from export.options import resolve_folder
from tests.manifests import make_manifest
from tests.tiny_pipelines import write_tiny_pipeline, write_tiny_upscaler


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_pipeline(tmp_path_factory.mktemp("refusals") / "pipeline")


@pytest.fixture
def exports(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of what was exported; nothing really is."""
    seen: list[str] = []
    for name in ("_export_components", "export_graph"):
        monkeypatch.setattr(exporting, name, lambda *given, name=name: seen.append(name))
    return seen


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run the command, which must fail with one sentence; return it."""
    assert main([str(word) for word in arguments]) == 2
    message = capsys.readouterr().err
    assert message.startswith("export: ")
    assert message.count("\n") == 1
    return message


def facts(native_px: int | None = None, **defaults: object) -> ModelFacts:
    return ModelFacts(native_px=native_px, defaults=dataclasses.replace(Defaults(), **defaults))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "family", "expected"),
    [
        (facts(steps=0), SD15, "--steps is 0: expected 1 to 50"),
        (facts(steps=51), None, "--steps is 51: expected 1 to 50"),
        (facts(cfg_scale=-3.0), SD15, "--cfg-scale is -3.0: expected 0 to 15"),
        (facts(cfg_scale=float("nan")), SD15, "--cfg-scale is nan"),
        (facts(cfg_scale=5.0), FLUX, "--cfg-scale is 5.0: expected 0 to less than 5 for FLUX.1"),
        (facts(width=100), SD15, "--w is 100: expected 64 to 2048, multiples of 8"),
        (facts(height=4096), None, "--h is 4096"),
        (facts(height=520), FLUX, "--h is 520: expected 64 to 2048, multiples of 16 for FLUX.1"),
        (facts(native_px=100), SD15, "--native-px is 100"),
        (facts(scheduler="nonsense"), SD15, "--scheduler is nonsense: 'nonsense' is unknown"),
        (facts(scheduler="nonsense"), None, "--scheduler is nonsense"),
        (facts(scheduler="lcm_karras"), SD15, "has no karras spacing"),
    ],
)
def test_check_facts_refuses_what_no_request_could_use(
    given: ModelFacts, family: Family | None, expected: str
) -> None:
    with pytest.raises(ExportError, match=expected):
        check_facts(given, flags=given, family=family)


@pytest.mark.parametrize("family", [SD15, FLUX, None])
def test_check_facts_takes_both_ends_of_every_limit(family: Family | None) -> None:
    for given in (
        facts(native_px=64, width=64, height=2048, steps=1, cfg_scale=0.0, scheduler="euler"),
        facts(native_px=2048, steps=50, cfg_scale=4.99, scheduler="DPM++ 2M Karras"),
        ModelFacts(),
    ):
        check_facts(given, flags=given, family=family)


def test_check_facts_names_the_key_when_the_folder_says_it() -> None:
    flags = facts(steps=20)
    merged = flags.over(facts(native_px=100, steps=0))
    with pytest.raises(ExportError, match=r"closeup\.json: native_px is 100"):
        check_facts(merged, flags=flags, family=SD15)
    with pytest.raises(ExportError, match=r"closeup\.json: defaults\.steps is 0"):
        check_facts(facts(steps=0), flags=ModelFacts(), family=SD15)


def test_export_refuses_defaults_before_it_exports(
    pipeline: Path, tmp_path: Path, exports: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    common = ("--model", pipeline, "--name", "x", "--repository", tmp_path / "r")
    for flags in (("--steps", 0), ("--scheduler", "lcm_karras"), ("--w", 100)):
        assert flags[0] in refused(capsys, *common, *flags)
    assert exports == []
    assert not (tmp_path / "r").exists()


def test_export_reads_the_shared_models_before_it_exports(
    pipeline: Path, tmp_path: Path, exports: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    pickled = tmp_path / "bad.pt"
    torch.save({"a": torch.zeros(1)}, pickled)
    unsized, other = tmp_path / "unsized.safetensors", tmp_path / "bad.onnx"
    save_file({"a": torch.zeros(1)}, unsized, metadata={"architecture": "FaceDetector"})
    other.write_bytes(b"no graph")
    common = ("--model", pipeline, "--name", "x", "--repository", tmp_path / "r")
    for flag, path, expected in (
        ("--upscaler", pickled, "is not a .safetensors file"),
        ("--upscaler", unsized, "neither SRVGGNetCompact nor RRDBNet"),
        ("--face-detector", pickled, "is no safetensors file"),
        ("--face-detector", unsized, "says size none in its metadata"),
        ("--face-detector", other, "ONNX Runtime cannot open"),
    ):
        assert expected in refused(capsys, *common, flag, path)
    assert exports == []
    assert not (tmp_path / "r").exists()


def test_export_tells_of_a_bad_detector_before_a_good_upscaler_is_exported(
    pipeline: Path, tmp_path: Path, exports: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = tmp_path / "upscaler.safetensors", tmp_path / "bad.pt"
    write_tiny_upscaler(good, scale=2)
    bad.write_bytes(b"x")
    files = ("--upscaler", good, "--face-detector", bad)
    arguments = ("--model", pipeline, "--name", "x", "--repository", tmp_path / "r", *files)
    assert "cannot be read as a face detector" in refused(capsys, *arguments)
    assert exports == []


def test_export_finds_an_unwritable_repository_before_it_exports(
    pipeline: Path, tmp_path: Path, exports: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    for repository in (tmp_path / "file", tmp_path / "file" / "below"):
        message = refused(capsys, "--model", pipeline, "--name", "x", "--repository", repository)
        assert "cannot be written" in message
    assert exports == []


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("my/model.safetensors", "there is no such file"),
        ("here.ckpt", "is a file that is not read"),
    ],
)
def test_resolve_folder_says_what_is_wrong_with_a_file(
    name: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("here.ckpt").touch()
    with pytest.raises(ExportError, match=expected):
        resolve_folder(name)


def write_manifests(repository: Path, *names: str) -> None:
    for name in names:
        folder = repository / f"{name}_denoiser"
        folder.mkdir(parents=True)
        text = manifest_json(make_manifest(name=name))
        (folder / MANIFEST_NAME).write_text(text, encoding="utf-8")
    (repository / INDEX_NAME).write_text(json.dumps({"models": names}), encoding="utf-8")


@pytest.mark.parametrize("damage", [None, "{", "[]", '{"format": 99}', '{"lora": null}', "family"])
def test_read_models_leaves_out_what_is_damaged_and_serves_the_others(
    damage: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_manifests(tmp_path, "first", "second", "third")
    path = tmp_path / "first_denoiser" / MANIFEST_NAME
    if damage is None:
        path.unlink()
    elif damage == "family":
        path.write_text(manifest_json(make_manifest(family="sd9")), encoding="utf-8")
    else:
        path.write_text(damage, encoding="utf-8")
    with caplog.at_level(logging.ERROR):
        assert list(read_models(tmp_path)) == ["second", "third"]
    (record,) = caplog.records
    assert record.getMessage().startswith("first is not served: ")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"models": 5}'])
def test_repository_names_no_path_when_the_index_is_damaged(text: str, tmp_path: Path) -> None:
    write_manifests(tmp_path, "first")
    (tmp_path / INDEX_NAME).write_text(text, encoding="utf-8")
    with pytest.raises(ModelError, match="list of models is damaged") as caught:
        Repository(tmp_path).models()
    assert str(tmp_path) not in str(caught.value)
