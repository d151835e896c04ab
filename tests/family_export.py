"""Tiny SDXL and FLUX.1 pipelines, exported once into one repository for all tests that use them."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from closeup.lora_read import Layouts, layouts_from_manifest
from closeup.manifest import read_models
from export.__main__ import main as export_main
from tests.paths import DEMO_WEIGHTS
from tests.tiny_pipelines import write_tiny_flux, write_tiny_sdxl, write_tiny_upscaler

FAMILY_PIPELINES = ("sdxl", "flux_dev", "flux_schnell")
MAX_BATCH, LORA_RANK, NATIVE_PX, DEFAULT_STEPS = 4, 8, 64, 2
WAIT_S = 400.0


@dataclass(frozen=True, kw_only=True, slots=True)
class FamilyExport:
    """Pipelines in diffusers layout, one folder each, and the repository made from them."""

    pipelines: Path
    repository: Path

    def layouts(self, name: str) -> Layouts:
        """Return the LoRA layouts of a pipeline by network, those that take LoRAs alone."""
        layouts = layouts_from_manifest(read_models(self.repository)[name])
        return {network: layout for network, layout in layouts.items() if layout is not None}


def export_families(factory: pytest.TempPathFactory) -> FamilyExport:
    """Write and export the pipelines, once for all test files and processes of a run."""
    base = factory.getbasetemp()
    folder = (base.parent if base.name.startswith("popen-") else base) / "family_export"
    exported = FamilyExport(pipelines=folder / "pipelines", repository=folder / "repository")
    try:
        folder.mkdir()
    except FileExistsError:
        due_s = time.monotonic() + WAIT_S
        while not (folder / "done").exists():  # another process is at it
            assert time.monotonic() < due_s, f"nobody finished {folder}"
            time.sleep(0.1)
        return exported
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more only get in each other's way at this size
    write_tiny_sdxl(exported.pipelines / "sdxl")
    write_tiny_flux(exported.pipelines / "flux_dev")
    write_tiny_flux(exported.pipelines / "flux_schnell", guidance_embeds=False)
    write_tiny_upscaler(folder / "upscaler.safetensors")
    for name in FAMILY_PIPELINES:
        facts = json.dumps({"native_px": NATIVE_PX, "defaults": {"steps": DEFAULT_STEPS}})
        (exported.pipelines / name / "closeup.json").write_text(facts, encoding="utf-8")
        arguments = {
            "--model": exported.pipelines / name, "--name": name,
            "--repository": exported.repository, "--lora-rank": LORA_RANK,
            "--max-batch": MAX_BATCH, "--upscaler": folder / "upscaler.safetensors",
            "--face-detector": DEMO_WEIGHTS / "face_detector.safetensors",
        }  # fmt: skip
        assert export_main([str(word) for pair in arguments.items() for word in pair]) == 0
    torch.set_num_threads(threads)
    (folder / "done").touch()
    return exported
