"""Fixtures that several test files share."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.paths import ROOT

if TYPE_CHECKING:
    from tests.toy_models import ToyModels
    from tests.toy_requests import MakeToy


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


@pytest.fixture(scope="session")
def toy_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy pipeline's repository; for reading only."""
    from tests.toy_models import write_toy_repository

    return write_toy_repository(tmp_path_factory.mktemp("toy"))


@pytest.fixture
def make_toy(toy_repository: Path) -> Iterator[MakeToy]:
    """Open `ToyModels` with the options given; they are closed after the test."""
    from tests.toy_models import ToyModels

    made: list[ToyModels] = []

    def open_models(**options: Any) -> ToyModels:
        made.append(ToyModels(toy_repository, **options))
        return made[-1]

    yield open_models
    for models in made:
        models.close()


@pytest.fixture
def toy(make_toy: MakeToy) -> ToyModels:
    """The toy pipeline as it comes: no faces, no faults."""
    return make_toy()
