"""`python -m benchmarks.engine_builds` on denoisers of toy width, without minutes or gigabytes."""

from __future__ import annotations

import dataclasses
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks.engine_builds import BUILDS, Build, builds_section, main, measure, run_stage
from benchmarks.export_memory import SDXL_CONFIG, flux_case
from benchmarks.gpu_models import SUBJECTS
from closeup.plans import Flavour
from export import builder
from export.builder import Toolchain
from tests.fake_builder import FakeTensorrt

NARROW_UNET = {
    "block_out_channels": [32, 32, 32],
    "attention_head_dim": [2, 2, 2],
    "transformer_layers_per_block": [1, 1, 1],
    "layers_per_block": 1,
    "cross_attention_dim": 32,
    "projection_class_embeddings_input_dim": 32 + 6 * 256,
    "norm_num_groups": 8,
}
NARROW_FLUX = {
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 24,
    "axes_dims_rope": [4, 6, 6],
}


def narrow(build: Build, changes: dict[str, Any]) -> Build:
    case = dataclasses.replace(build.case, config={**build.case.config, **changes})
    return dataclasses.replace(build, case=case)


@pytest.mark.parametrize(
    ("build", "changes", "shapes"),
    [
        # MAX_BATCH sequences, two rows each, the native size over 8, four chunks of 77 tokens.
        (BUILDS[0], NARROW_UNET, {"sample": (4, 4, 128, 128), "context": (8, 4 * 77, 32)}),
        (BUILDS[1], NARROW_FLUX, {"sample": (4, 16, 128, 128), "context": (4, 512, 32)}),
    ],
    ids=["sdxl", "flux"],
)
def test_stages_hand_the_builder_the_real_sizes_when_only_the_width_is_a_toy(
    build: Build,
    changes: dict[str, Any],
    shapes: dict[str, tuple[int, ...]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake = FakeTensorrt("11.1.0.106")
    toolchain = Toolchain(
        flavour=Flavour.TENSORRT, module=fake, version="11.1.0.106", sms=("9.0",), gpu="a GPU"
    )
    asked: list[Flavour] = []

    def open_fake(flavour: Flavour) -> Toolchain:
        asked.append(flavour)
        return toolchain

    monkeypatch.setattr(builder, "open_toolchain", open_fake)
    toy = narrow(build, changes)
    found: dict[str, Any] = {}
    for stage in ("write", "export", "build"):
        found |= run_stage(stage, toy, tmp_path)
    assert asked == [Flavour.RTX]
    assert found["weight_bytes"] == 2 * found["parameters"]
    assert found["layers"] > 10
    assert found["plan_bytes"] == (tmp_path / "model.plan").stat().st_size > 0
    # More than the interpreter with torch, and in bytes, not in kilobytes.
    assert 1e8 < found["peak_bytes"] < 1e11
    ((_, config),) = fake.built
    largest = {name: limits[2] for name, limits in config.profiles[0].shapes.items()}
    assert {name: largest[name] for name in shapes} == shapes
    section = builds_section([(toy, found)])
    row = dict(zip(section.columns, section.rows[0], strict=True))
    assert row["model"] == build.case.name
    assert float(row["load"]) >= 0
    assert "inside" in section.notes[1] or "no casts" in section.notes[1]


def test_large_builds_have_the_published_widths_when_their_depth_is_reduced() -> None:
    builds = {build.case.name: build for build in BUILDS}
    for name in ("sdxl-small", "sdxl-half"):
        config = builds[name].case.config
        for key in ("block_out_channels", "cross_attention_dim", "attention_head_dim"):
            assert config[key] == SDXL_CONFIG[key]
        assert (builds[name].native_px, builds[name].precision) == (1024, "fp16")
    for name, depth in (("flux-1", 1), ("flux-2", 2)):
        assert builds[name].case == flux_case(depth)
        assert (builds[name].tokens, builds[name].precision) == (512, "bf16")
    for name, family in (("sdxl-small", "sdxl"), ("flux-1", "flux"), ("sd15", "sd15")):
        subject = SUBJECTS[family]()
        assert builds[name].tokens == subject.tokens
        assert builds[name].native_px == 8 * subject.side


def test_stages_are_measured_in_processes_of_their_own_and_scratch_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages: list[str] = []

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        stages.append(command[command.index("--stage") + 1])
        assert Path(command[command.index("--folder") + 1]).is_dir()
        return subprocess.CompletedProcess(command, 0, f'a warning\n{{"{stages[-1]}": 1}}\n', "")

    monkeypatch.setattr(subprocess, "run", run)
    assert measure(BUILDS[0], tmp_path) == {"write": 1, "export": 1, "build": 1}
    assert stages == ["write", "export", "build"]
    assert list(tmp_path.iterdir()) == []


def test_failed_stage_ends_with_its_reason_and_scratch_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "export: no space left on device")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(SystemExit, match="sdxl-small, write: export: no space left on device"):
        measure(BUILDS[0], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_unknown_case_is_refused_with_the_names(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["sdxl-huge", "--no-write"])
    assert "unknown case 'sdxl-huge'; expected sdxl-small, flux-1" in capsys.readouterr().err
