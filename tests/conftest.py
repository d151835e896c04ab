"""Fixtures that several test files share."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tests.paths import ROOT


def _export_once(folder: Path) -> Path:
    """Export the demo model into ``folder``, once for all test processes."""
    done, busy = folder / "done", folder / "busy"
    repository = folder / "model_repository"
    try:
        busy.touch(exist_ok=False)
    except FileExistsError:
        while not done.exists():
            time.sleep(0.2)
        return repository
    from demo.run import export_demo

    export_demo(repository)
    for name in ("generate", "generate_stream"):
        (repository / name).symlink_to(ROOT / "model_repository" / name)
    done.touch()
    return repository


@pytest.fixture(scope="session")
def demo_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model exported to ONNX, with `generate` and `generate_stream` beside it.

    ``CLOSEUP_TEST_REPOSITORY`` names one that exists already, for quick runs while developing.
    """
    existing = os.environ.get("CLOSEUP_TEST_REPOSITORY")
    if existing:
        return Path(existing)
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if base.name.startswith("popen-") else base  # under pytest-xdist
    folder = shared / "demo_export"
    folder.mkdir(exist_ok=True)
    return _export_once(folder)
