"""The Triton repository on disk: folders that appear whole, and the index of pipelines."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from closeup.cache_files import replace_file
from closeup.errors import ExportError, ModelError
from closeup.manifest import INDEX_NAME, read_index
from closeup.plans import PLAN_SUFFIX, record_path
from export.config import MODEL_FILE, TritonConfig, config_text
from export.precisions import COMPONENTS, DENOISER
from export.scratch import (
    HOSTS,
    clear_dead,
    explained,
    lock_repository,
    open_scratch,
    swap_folders,
)

STAMP_NAME = "export.json"
DENOISER_MODEL = '''"""The denoiser behind Triton; `closeup.denoiser_model` does the work."""

from closeup.denoiser_model import TritonPythonModel  # noqa: F401
'''


@dataclass(frozen=True, kw_only=True, slots=True)
class Staging:
    """An export in the making, on the repository's file system.

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
        """Write a text file into the folder of ``model``.

        Raises:
            ExportError: it cannot be written.
        """
        path = self.folder / model / name
        with explained(self.repository):
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
            and path.parent != self.folder
            and path.name != STAMP_NAME
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
        """Move every folder into the repository, in place of what was there.

        Folders that the last export by the same name wrote and this one does not are taken out:
        Triton would load them for nothing. The repository is locked by the caller.

        Returns:
            The names of the folders.

        Raises:
            ExportError: they cannot be moved; the repository is as it was.
        """
        with explained(self.repository):
            clear_dead(self.repository)  # before its leftovers could undo what comes now
            models = sorted(path.name for path in self.folder.glob("[!.]*") if path.is_dir())
            stamps = [read_stamp(self.repository, model) for model in models]
            before = {name for stamp in stamps if stamp is not None for name in stamp.models}
            gone = _folders(self.repository, before - set(models))
            swap_folders(self.folder, self.repository, new=models, gone=gone)
        return models


@contextlib.contextmanager
def open_staging(repository: Path) -> Iterator[Staging]:
    """Give a staging folder that is gone afterwards, whatever happened.

    Raises:
        ExportError: the repository cannot be written.
    """
    with open_scratch(repository) as folder:
        yield Staging(repository=repository, folder=folder)


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


def add_to_index(repository: Path, name: str) -> None:
    """List ``name`` in ``models.json``, at the end unless it is there already.

    The repository is locked by the caller.

    Raises:
        ExportError: it cannot be written.
    """
    names = _listed(repository)
    _write_index(repository, names if name in names else [*names, name])


def remove_pipeline(repository: Path, name: str) -> tuple[str, ...]:
    """Take a pipeline out of the index and its folders out of the repository.

    Returns:
        The folders that were removed.

    Raises:
        ExportError: there is no such pipeline, or the repository cannot be written.
    """
    if not repository.is_dir():
        raise ExportError(f"--remove {name}: there is no repository {repository}.")
    with open_scratch(repository) as folder, lock_repository(repository):
        names = _listed(repository)
        denoiser = f"{name}_{DENOISER}"
        stamp = read_stamp(repository, denoiser) if _is_plain(name) else None
        if name not in names and stamp is None:
            known = f"it has {', '.join(names)}" if names else "it has none"
            raise ExportError(f"--remove {name}: {repository} has no such pipeline; {known}.")
        own = {f"{name}_{part}" for part in COMPONENTS} if stamp is None else {*stamp.models}
        models = _folders(repository, own)
        _write_index(repository, [other for other in names if other != name])
        with explained(repository):
            clear_dead(repository)
            swap_folders(folder, repository, new=(), gone=models)
    return tuple(models)


def _listed(repository: Path) -> list[str]:
    try:
        return read_index(repository)
    except ModelError:
        return []


def _write_index(repository: Path, names: Sequence[str]) -> None:
    text = json.dumps({"models": list(names)}, indent=1) + "\n"
    with explained(repository):
        replace_file(repository / INDEX_NAME, text.encode())


def _folders(repository: Path, names: set[str]) -> list[str]:
    """Those names that are folders of the repository; a damaged stamp may hold anything."""
    return sorted(name for name in names if _is_plain(name) and (repository / name).is_dir())


def _is_plain(name: str) -> bool:
    """Whether this may be the name of an export's folder."""
    return Path(name).name == name != "" and not name.startswith(".") and name not in HOSTS


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
