"""The tiny random pipeline, exported once for all tests that serve it."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler

from closeup.manifest import MANIFEST_NAME
from export.__main__ import main as export_main
from tests.tiny_pipelines import SCHEDULER, write_tiny_pipeline

MAX_BATCH, LORA_RANK, NATIVE_PX = 4, 8, 64
WAIT_S = 300.0


@dataclass(frozen=True, kw_only=True, slots=True)
class TinyExport:
    """A pipeline in diffusers layout and the repository made from it; its name there is tiny."""

    pipeline: Path
    repository: Path


def export_tiny(factory: pytest.TempPathFactory) -> TinyExport:
    """Write and export the pipeline, once for all test files and processes of a run."""
    base = factory.getbasetemp()
    folder = (base.parent if base.name.startswith("popen-") else base) / "tiny_export"
    exported = TinyExport(pipeline=folder / "pipeline", repository=folder / "repository")
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
    write_tiny_pipeline(exported.pipeline)
    facts = json.dumps({"native_px": NATIVE_PX})
    (exported.pipeline / "closeup.json").write_text(facts, encoding="utf-8")
    arguments = {
        "--model": exported.pipeline, "--name": "tiny", "--repository": exported.repository,
        "--lora-rank": LORA_RANK, "--max-batch": MAX_BATCH,
    }  # fmt: skip
    assert export_main([str(word) for pair in arguments.items() for word in pair]) == 0
    torch.set_num_threads(threads)
    (folder / "done").touch()
    return exported


def with_scheduler(exported: TinyExport, folder: Path, **changes: Any) -> TinyExport:
    """Copy an export and give both sides of the copy another scheduler configuration.

    Args:
        exported: what to copy; no graph depends on the scheduler, so none is exported again.
        folder: where to; made.
        changes: arguments of DDIMScheduler that differ from `tiny_pipelines.SCHEDULER`.
    """
    copied = TinyExport(pipeline=folder / "pipeline", repository=folder / "repository")
    shutil.copytree(exported.pipeline, copied.pipeline)
    shutil.copytree(exported.repository, copied.repository)
    DDIMScheduler(**{**SCHEDULER, **changes}).save_pretrained(copied.pipeline / "scheduler")
    config = (copied.pipeline / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8")
    _change_manifest(copied.repository, {"scheduler": json.loads(config)})
    return copied


def _change_manifest(repository: Path, changes: Mapping[str, Any]) -> None:
    path = repository / "tiny_denoiser" / MANIFEST_NAME
    manifest = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**manifest, **changes}), encoding="utf-8")
