"""The Triton repository on disk: folders that appear whole, and the index of pipelines."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from filelock import FileLock

from closeup.cache_files import lock_file, try_lock_file
from closeup.errors import ExportError, ModelError
from closeup.manifest import INDEX_NAME, read_index
from closeup.plans import PLAN_SUFFIX, record_path
from export.config import MODEL_FILE, TritonConfig, config_text

STAMP_NAME = "export.json"
_ALIVE = ".alive"
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
        path.unlink(missing_ok=True)  # it may be a link to what is served
        path.write_text(text, encoding="utf-8")

    def write_config(self, config: TritonConfig) -> None:
        """Write the ``config.pbtxt`` of a model."""
        self.write_text(config.name, "config.pbtxt", config_text(config))

    def write_stamp(self, model: str, stamp: Stamp) -> None:
        """Note in the folder of ``model`` what the export was made from and every file it wrote.

        To be called last, before :meth:`publish`. Plans are not among the files: `Stamp.plans`.
        """
        files = sorted(
            str(path.relative_to(self.folder))
            for path in self.folder.rglob("*")
            if path.is_file()
            and PLAN_SUFFIX not in path.suffixes
            and path.name not in (STAMP_NAME, _ALIVE)
        )
        self.write_text(model, STAMP_NAME, replace(stamp, files=tuple(files)).text())

    def adopt(self, models: tuple[str, ...]) -> None:
        """Begin with what is served now, without its plans; large files are linked.

        Raises:
            ExportError: it cannot be read or copied.
        """
        for model in models:
            try:
                _copy_folder(self.repository / model, self.folder / model)
            except OSError as error:
                raise ExportError(
                    f"{self.repository / model} cannot be copied to {self.folder}: "
                    f"{(error.strerror or str(error)).lower()}."
                ) from error

    def publish(self) -> list[str]:
        """Move every folder into the repository, replacing what was there; returns their names."""
        models = sorted(path.name for path in self.folder.iterdir() if path.is_dir())
        old = Path(tempfile.mkdtemp(prefix="old-", dir=self.folder))
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
    prefix = f".{repository.resolve().name}-"
    with contextlib.ExitStack() as stack:
        with lock_repository(repository):  # so that nobody takes the new folder for a dead one
            _remove_dead(parent, prefix)
            folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            stack.enter_context(lock_file(folder / _ALIVE))
        yield Staging(repository=repository, folder=folder)


def _remove_dead(parent: Path, prefix: str) -> None:
    """Remove the staging folders of exports that were killed: nobody holds their lock."""
    for alive in parent.glob(f"{prefix}*/{_ALIVE}"):
        with try_lock_file(alive) as held:
            if held:
                shutil.rmtree(alive.parent, ignore_errors=True)


def _copy_folder(source: Path, target: Path) -> None:
    for path in sorted(source.rglob("*")):
        if path.is_dir() or PLAN_SUFFIX in path.suffixes or path.name == STAMP_NAME:
            continue
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path, copy)
        except OSError:
            shutil.copy2(path, copy)


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Stamp:
    """The content of ``export.json``: what an export was made from and what it wrote.

    Attributes:
        fingerprint: of the graphs.
        models: folders that were written.
        files: all that were written but plans, relative to the repository.
        plans_fingerprint: of what decides the plans; empty when there are none.
        plans: their paths, relative to the repository.
    """

    fingerprint: str
    models: tuple[str, ...]
    files: tuple[str, ...] = ()
    plans_fingerprint: str = ""
    plans: tuple[str, ...] = ()

    def text(self) -> str:
        """Return the file's text."""
        return json.dumps(asdict(self), indent=1) + "\n"


def read_stamp(repository: Path, model: str) -> Stamp | None:
    """Read the stamp in the folder of ``model``; None when there is no good one."""
    try:
        data = json.loads((repository / model / STAMP_NAME).read_text(encoding="utf-8"))
        models, files, plans = (tuple(data.pop(name)) for name in ("models", "files", "plans"))
        return Stamp(models=models, files=files, plans=plans, **data)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def is_unchanged(repository: Path, model: str, fingerprint: str) -> bool:
    """Whether the folder of ``model`` came from these inputs and all it wrote is still there."""
    stamp = read_stamp(repository, model)
    if stamp is None or stamp.fingerprint != fingerprint:
        return False
    return all((repository / name).is_file() for name in stamp.files)


def has_plans(repository: Path, model: str, fingerprint: str) -> bool:
    """Whether the plans of ``model`` are those of this fingerprint, and all still there."""
    stamp = read_stamp(repository, model)
    if stamp is None or stamp.plans_fingerprint != fingerprint:
        return False
    plans = [repository / plan for plan in stamp.plans]
    return all(plan.is_file() and record_path(plan).is_file() for plan in plans)
