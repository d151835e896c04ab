"""The Triton repository on disk: folders that appear whole, and the index of pipelines."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from closeup.errors import ModelError
from closeup.manifest import INDEX_NAME, read_index
from export.config import MODEL_FILE, TritonConfig, config_text

STAMP_NAME = "export.json"
DENOISER_MODEL = '''"""The denoiser behind Triton; `closeup.denoiser_model` does the work."""

from closeup.denoiser_model import TritonPythonModel  # noqa: F401
'''


@dataclass(frozen=True, kw_only=True, slots=True)
class Staging:
    """An export in the making, beside the repository and on the same file system.

    Attributes:
        repository: where the folders go at the end.
        folder: holds one folder a model until then.
    """

    repository: Path
    folder: Path

    def graph_path(self, model: str) -> Path:
        """Where the graph of ``model`` is to be written."""
        path = self.folder / model / "1" / MODEL_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def write_text(self, model: str, name: str, text: str) -> None:
        """Write a text file into the folder of ``model``."""
        path = self.folder / model / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")

    def write_config(self, config: TritonConfig) -> None:
        """Write the ``config.pbtxt`` of a model."""
        self.write_text(config.name, "config.pbtxt", config_text(config))

    def write_stamp(self, model: str, fingerprint: str) -> None:
        """Note in the folder of ``model`` what the export was made from and every file it wrote.

        To be called last, before :meth:`publish`.
        """
        files = sorted(
            str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path.is_file()
        )
        stamp = {"fingerprint": fingerprint, "files": files}
        self.write_text(model, STAMP_NAME, json.dumps(stamp, indent=1) + "\n")

    def publish(self) -> list[str]:
        """Move every folder into the repository, replacing what was there; returns their names."""
        old = Path(tempfile.mkdtemp(prefix="old-", dir=self.folder))
        models = sorted(path.name for path in self.folder.iterdir() if path != old)
        for model in models:
            target = self.repository / model
            if target.exists():
                os.rename(target, old / model)
            os.rename(self.folder / model, target)
        return models


@contextlib.contextmanager
def open_staging(repository: Path) -> Iterator[Staging]:
    """Give a staging folder that is gone afterwards, whatever happened."""
    repository.mkdir(parents=True, exist_ok=True)
    parent = repository.resolve().parent
    folder = Path(tempfile.mkdtemp(prefix=f".{repository.resolve().name}-", dir=parent))
    try:
        yield Staging(repository=repository, folder=folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def lock_repository(repository: Path) -> Iterator[None]:
    """Hold the repository against other exports; they wait."""
    repository.mkdir(parents=True, exist_ok=True)
    with FileLock(repository / ".export.lock"):
        yield


def add_to_index(repository: Path, name: str) -> None:
    """List ``name`` in ``models.json``, at the end unless it is there already.

    The file is replaced even when nothing changes in it: servers look at its time.
    """
    try:
        names = read_index(repository)
    except (ModelError, KeyError):
        names = []
    if name not in names:
        names.append(name)
    draft = repository / f"{INDEX_NAME}.draft"
    draft.write_text(json.dumps({"models": names}, indent=1) + "\n", encoding="utf-8")
    os.replace(draft, repository / INDEX_NAME)


def is_unchanged(repository: Path, model: str, fingerprint: str) -> bool:
    """Whether the folder of ``model`` came from these inputs and all it wrote is still there."""
    try:
        stamp = json.loads((repository / model / STAMP_NAME).read_text(encoding="utf-8"))
        complete = all((repository / name).is_file() for name in stamp["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return complete and bool(stamp["fingerprint"] == fingerprint)
