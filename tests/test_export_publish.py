"""What an export does to a repository at its end: all of it or nothing, whatever stops it."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from closeup.errors import ExportError
from closeup.manifest import read_index
from closeup.server import EmbeddedServer, ServerOptions
from export.__main__ import main
from export.repository import (
    Stamp,
    add_to_index,
    is_unchanged,
    open_staging,
    read_stamp,
    remove_pipeline,
)
from export.scratch import lock_repository, open_scratch
from tests.triton_fixtures import CPU_INSTANCE, save_double

PARTS = ("denoiser", "text_encoder", "vae_decoder", "vae_encoder")
ROOT = Path(__file__).resolve().parents[1]


def export(
    repository: Path, content: str, *, name: str = "toy", parts: tuple[str, ...] = PARTS
) -> None:
    """Publish folders that hold ``content``, with the stamp of a real export."""
    models = tuple(f"{name}_{part}" for part in parts)
    with open_staging(repository) as staging:
        for model in models:
            staging.write_text(model, "1/model.onnx", content)
        staging.write_stamp(models[0], Stamp(fingerprint=content, models=models))
        with lock_repository(repository):
            staging.publish()
            add_to_index(repository, name)


def contents(repository: Path) -> dict[str, str]:
    return {
        path.parts[-3]: path.read_text(encoding="utf-8")
        for path in sorted(repository.glob("*/1/model.onnx"))
    }


def leftovers(repository: Path) -> list[str]:
    """Names of working folders, wherever they may lie."""
    places = (repository.parent, repository, repository / "generate")
    return [path.name for place in places for path in place.glob(".*") if path.is_dir()]


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "repository"
    export(folder, "old")
    return folder


def test_publish_takes_out_folders_that_the_new_export_does_not_name(repository: Path) -> None:
    export(repository, "other", name="second")
    export(repository, "new", parts=("denoiser", "vae_decoder"))
    assert contents(repository) == {
        "second_denoiser": "other", "second_text_encoder": "other", "second_vae_decoder": "other",
        "second_vae_encoder": "other", "toy_denoiser": "new", "toy_vae_decoder": "new",
    }  # fmt: skip
    assert leftovers(repository) == []


def test_publish_leaves_what_a_damaged_stamp_may_not_name(repository: Path) -> None:
    (repository / "generate").mkdir()
    stamp = Stamp(fingerprint="x", models=("toy_denoiser", "generate", "..", "../elsewhere", ""))
    (repository / "toy_denoiser" / "export.json").write_text(stamp.text(), encoding="utf-8")
    (repository.parent / "elsewhere").mkdir()
    export(repository, "new", parts=("denoiser",))
    assert (repository / "generate").is_dir()
    assert (repository.parent / "elsewhere").is_dir()


@pytest.mark.parametrize("number", range(1, 9))
@pytest.mark.parametrize("kind", [KeyboardInterrupt, OSError])
def test_publish_puts_everything_back_when_it_is_stopped(
    repository: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[BaseException]
) -> None:
    real, calls = os.rename, iter(range(1, 99))

    def stopped(source: Path, target: Path) -> None:
        is_model = Path(source).name.startswith("toy_")  # not the probe, which comes first
        if is_model and next(calls) == number:
            raise kind("stopped")
        real(source, target)

    monkeypatch.setattr(os, "rename", stopped)
    with pytest.raises(ExportError if kind is OSError else kind):
        export(repository, "new")
    assert contents(repository) == {f"toy_{part}": "old" for part in PARTS}
    assert is_unchanged(repository, "toy_denoiser", "old")
    assert leftovers(repository) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.test_export_publish import export
real, left = os.rename, int(sys.argv[2])
def rename(source, target):
    global left
    if Path(source).name.startswith("toy_"):
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
    real(source, target)
os.rename = rename
export(Path(sys.argv[1]), "new")
"""


@pytest.mark.parametrize("number", [2, 4])  # a target is missing; and some folders are new
def test_next_export_restores_what_a_killed_one_had_moved_away(
    repository: Path, number: int
) -> None:
    command = [sys.executable, "-c", KILLED, str(repository), str(number)]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == -9
    assert contents(repository) != {f"toy_{part}": "old" for part in PARTS}
    assert len(leftovers(repository)) == 1
    with open_staging(repository):
        assert contents(repository) == {f"toy_{part}": "old" for part in PARTS}
    assert leftovers(repository) == []


def test_a_living_export_is_not_taken_for_a_dead_one(repository: Path) -> None:
    with open_scratch(repository) as first:
        with open_scratch(repository) as second:
            assert first.is_dir()
            assert second.is_dir()
    assert leftovers(repository) == []


def test_dead_folders_of_a_repository_with_a_longer_name_are_left_alone(
    repository: Path,
) -> None:
    other = repository.with_name(f".{repository.name}-two-abcdefgh")
    own = repository.with_name(f".{repository.name}-abcdefgh")
    for folder in (other, own):
        folder.mkdir()
    with open_scratch(repository):
        assert other.is_dir()
        assert not own.exists()


@pytest.fixture
def mounted(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository that is a mount of its own: nothing beside it can be renamed into it."""
    real = os.rename

    def rename(source: Path, target: Path) -> None:
        if Path(source).is_relative_to(repository) != Path(target).is_relative_to(repository):
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    return repository


@pytest.mark.parametrize("host", ["generate", "."])
def test_export_works_inside_the_repository_when_it_is_a_mount(mounted: Path, host: str) -> None:
    (mounted / host).mkdir(exist_ok=True)
    with open_staging(mounted) as staging:
        assert staging.folder.parent == mounted / host
        assert staging.folder.name.startswith(".")
    export(mounted, "new")
    assert set(contents(mounted).values()) == {"new"}
    assert leftovers(mounted) == []


@pytest.mark.triton
def test_server_starts_while_an_export_works_inside_its_repository(mounted: Path) -> None:
    for path in mounted.glob("toy_*"):
        shutil.rmtree(path)  # they are no real models
    save_double(mounted / "generate" / "1" / "model.onnx")
    (mounted / "generate" / "config.pbtxt").write_text(f'backend: "onnxruntime"\n{CPU_INSTANCE}')
    with open_staging(mounted) as staging:
        assert staging.folder.parent == mounted / "generate"
        staging.write_text("half_done", "1/model.onnx", "half done")
        options = ServerOptions(
            repository=mounted, http_port=0, grpc_port=0, metrics_port=0, exit_timeout_s=5
        )
        with EmbeddedServer(options) as server:
            assert server.http_url


def test_export_works_inside_the_repository_when_its_parent_is_not_writable(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = tempfile.mkdtemp

    def make(*, prefix: str, dir: Path) -> str:
        if dir == repository.parent:
            raise PermissionError(errno.EACCES, "Permission denied", str(dir))
        return str(real(prefix=prefix, dir=dir))

    monkeypatch.setattr(tempfile, "mkdtemp", make)
    export(repository, "new")
    assert set(contents(repository).values()) == {"new"}


def test_open_staging_says_one_sentence_when_nothing_can_be_written(
    repository: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ExportError, match="cannot be written: file exists"):
        with open_staging(tmp_path / "file"):
            pass

    def full(**given: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "mkdtemp", full)
    with pytest.raises(ExportError, match="cannot be written: no space left on device"):
        with open_staging(repository):
            pass


def test_remove_takes_a_pipeline_out_and_leaves_the_others(
    repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export(repository, "other", name="second")
    assert main(["--remove", "toy", "--repository", str(repository)]) == 0
    assert "4 folders removed" in capsys.readouterr().out
    assert read_index(repository) == ["second"]
    assert set(contents(repository)) == {f"second_{part}" for part in PARTS}
    assert leftovers(repository) == []
    assert main(["--remove", "toy", "--repository", str(repository)]) == 2
    message = capsys.readouterr().err
    assert "--remove toy: " in message
    assert "has no such pipeline; it has second." in message


@pytest.mark.parametrize("name", ["../repository/toy", "upscaler", "generate", ""])
def test_remove_refuses_names_of_no_pipeline(repository: Path, name: str) -> None:
    with pytest.raises(ExportError, match="no such pipeline"):
        remove_pipeline(repository, name)
    assert len(contents(repository)) == len(PARTS)


def test_remove_takes_out_what_has_lost_its_stamp(repository: Path) -> None:
    (repository / "toy_denoiser" / "export.json").write_text("{", encoding="utf-8")
    assert read_stamp(repository, "toy_denoiser") is None
    assert remove_pipeline(repository, "toy") == tuple(sorted(f"toy_{part}" for part in PARTS))
    assert read_index(repository) == []


def test_remove_refuses_other_flags(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--remove", "toy", "--repository", str(repository), "--force"])
    assert "goes with --repository alone, not with --force" in capsys.readouterr().err
    assert main(["--remove", "toy", "--repository", str(repository / "nothing")]) == 2
    assert "there is no repository" in capsys.readouterr().err
