"""Plans kept between exports: hits, misses, two builds at once, and builds that die."""

from __future__ import annotations

import dataclasses
import errno
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from closeup.errors import ExportError
from closeup.plans import Flavour, RuntimeFacts, hash_plan, read_record, record_path, verify_plan
from export import plan_cache
from export.builder import BuildJob, Toolchain
from export.plan_cache import Obtained, PlanCache, obtain_plan, plan_key
from export.profiles import profile_of
from export.sizes import Side
from tests.test_builder import make_job, write_graph

RUNTIME = RuntimeFacts(flavour=Flavour.RTX, version="1.7.1.116", sm="8.9")
TOOLCHAIN = Toolchain(
    flavour=Flavour.RTX, module=None, version="1.7.1.116", sms=("8.6", "8.9"), gpu=""
)
COMMAND = "python -m export --target tensorrt-rtx"


class CountingBuild:
    """Writes a plan that names its job; counts."""

    def __init__(self, size: int = 1000) -> None:
        self.size = size
        self.count = 0

    def __call__(self, job: BuildJob, toolchain: Toolchain, target: Path) -> float:
        self.count += 1
        name = f"{job.graph.read_bytes().hex()} {job.profiles} ".encode()
        target.write_bytes((name * self.size)[: self.size])
        return 12.34


@pytest.fixture
def cache(tmp_path: Path) -> PlanCache:
    return PlanCache(folder=tmp_path / "cache", max_bytes=10**6)


@pytest.fixture
def job(tmp_path: Path) -> BuildJob:
    return make_job(write_graph(tmp_path / "model.onnx"))


def obtain(
    job: BuildJob, cache: PlanCache | None, build: Any, target: Path | None = None
) -> Obtained:
    target = target or job.graph.with_suffix(".plan")
    return obtain_plan(job, TOOLCHAIN, cache, target, command=COMMAND, build=build)


def test_second_export_of_the_same_takes_the_plan_from_the_cache(
    job: BuildJob, cache: PlanCache, tmp_path: Path
) -> None:
    build = CountingBuild()
    first = obtain(job, cache, build)
    other = dataclasses.replace(job, model="another")  # the same graph under another name
    (tmp_path / "other").mkdir()
    second = obtain(other, cache, build, tmp_path / "other" / "model.plan")
    assert build.count == 1
    assert (first.from_cache, second.from_cache) == (False, True)
    assert second.record.build_s == 12.3
    plan = job.graph.with_suffix(".plan")
    record = verify_plan(plan, RUNTIME)
    assert (record.model, record.command) == ("m_vae_decoder", COMMAND)
    assert read_record(tmp_path / "other" / "model.plan").model == "another"
    assert plan.stat().st_ino == (tmp_path / "other" / "model.plan").stat().st_ino  # no copy
    assert record_path(plan).stat().st_mode & 0o777 == 0o644


def _other_graph(job: BuildJob) -> BuildJob:
    graph = write_graph(job.graph.with_name("other.onnx"), op="Neg")
    return dataclasses.replace(job, graph=graph)


def _other_profiles(job: BuildJob) -> BuildJob:
    profile = profile_of("all", job.tensors.inputs, {"batch": Side.up_to(5)})
    return dataclasses.replace(job, profiles=(profile,))


def _other_precision(job: BuildJob) -> BuildJob:
    return dataclasses.replace(job, precision="fp16")


@pytest.mark.parametrize("change", [_other_graph, _other_profiles, _other_precision])
def test_another_job_has_another_key(job: BuildJob, change: Callable[[BuildJob], BuildJob]) -> None:
    def key(one: BuildJob) -> str:
        return plan_key(one, TOOLCHAIN, hash_plan(one.graph))

    assert key(change(job)) != key(job) == key(dataclasses.replace(job, model="x"))


@pytest.mark.parametrize(
    "changes",
    [
        {"flavour": Flavour.TENSORRT},
        {"version": "1.7.1.117"},
        {"sms": ("8.9",)},
        {"gpu": "NVIDIA L4"},
    ],
)
def test_another_toolchain_has_another_key(job: BuildJob, changes: dict[str, Any]) -> None:
    other = dataclasses.replace(TOOLCHAIN, **changes)
    assert plan_key(job, other, "") != plan_key(job, TOOLCHAIN, "")


@pytest.mark.parametrize("harm", ["truncate", "swap", "record"])
def test_damaged_entry_is_built_again(job: BuildJob, cache: PlanCache, harm: str) -> None:
    build = CountingBuild()
    obtain(job, cache, build)
    entry = next(cache.folder.glob("plans/*.plan"))
    whole = entry.read_bytes()
    if harm == "truncate":
        os.truncate(entry, 10)
    elif harm == "swap":
        entry.write_bytes(whole[::-1])
    else:
        record_path(entry).write_text("{", encoding="utf-8")
    assert not obtain(job, cache, build).from_cache
    assert build.count == 2
    assert entry.read_bytes() == whole
    verify_plan(job.graph.with_suffix(".plan"), RUNTIME)


def test_without_a_cache_every_export_builds(job: BuildJob, tmp_path: Path) -> None:
    build = CountingBuild()
    obtain(job, None, build)
    assert not obtain(job, None, build).from_cache
    assert build.count == 2
    verify_plan(job.graph.with_suffix(".plan"), RUNTIME)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["model.onnx", "model.plan", "model.plan.json"]


def test_failed_build_leaves_the_old_plan(job: BuildJob, cache: PlanCache) -> None:
    obtain(job, cache, CountingBuild())
    plan = job.graph.with_suffix(".plan")
    before = plan.read_bytes()

    def fail(job: BuildJob, toolchain: Toolchain, target: Path) -> float:
        target.write_bytes(b"half")
        raise ExportError("m: TensorRT cannot build it: no reason.")

    for kept in (cache, None):
        with pytest.raises(ExportError, match="cannot build it"):
            obtain(_other_profiles(job), kept, fail)
        assert plan.read_bytes() == before
        verify_plan(plan, RUNTIME)


def test_full_disk_is_one_sentence_and_leaves_the_old_plan(
    job: BuildJob, cache: PlanCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    obtain(job, cache, CountingBuild())
    plan = job.graph.with_suffix(".plan")
    before = plan.read_bytes()

    def full(*given: Any, **named: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "link", full)
    monkeypatch.setattr(plan_cache.shutil, "copyfile", full)  # type: ignore[attr-defined]
    with pytest.raises(ExportError) as caught:
        obtain(_other_profiles(job), cache, CountingBuild())
    text = str(caught.value)
    assert "no space left on device; make room, or choose other folders" in text
    assert "\n" not in text
    assert plan.read_bytes() == before
    verify_plan(plan, RUNTIME)


def test_plans_are_copied_where_links_are_not_possible(
    job: BuildJob, cache: PlanCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*given: Any, **named: Any) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", refuse)
    obtain(job, cache, CountingBuild())
    verify_plan(job.graph.with_suffix(".plan"), RUNTIME)


def test_cache_drops_what_was_not_used_for_longest(tmp_path: Path) -> None:
    small = PlanCache(folder=tmp_path / "cache", max_bytes=2500)
    build = CountingBuild(size=1000)
    jobs = [
        make_job(write_graph(tmp_path / f"{name}.onnx"), largest=size)
        for name, size in (("a", 2), ("b", 3), ("c", 4))
    ]
    for age, one in enumerate(jobs[:2]):
        obtain(one, small, build)
        entry = small.entry(plan_key(one, TOOLCHAIN, hash_plan(one.graph)))
        os.utime(entry, (age, age))
    obtain(jobs[0], small, build)  # used again: the second is the older one now
    obtain(jobs[2], small, build)
    assert build.count == 3
    kept = {path.stem for path in small.folder.glob("plans/*.plan")}
    keys = [plan_key(one, TOOLCHAIN, hash_plan(one.graph)) for one in jobs]
    assert kept == {keys[0], keys[2]}
    assert not record_path(small.entry(keys[1])).exists()
    verify_plan(jobs[1].graph.with_suffix(".plan"), RUNTIME)  # what is served stays


class SlowBuild:
    """Notes its start in a file and takes its time; for other processes."""

    def __init__(self, log: Path, seconds: float) -> None:
        self.log = log
        self.seconds = seconds

    def __call__(self, job: BuildJob, toolchain: Toolchain, target: Path) -> float:
        target.write_bytes(b"half of a plan")
        with self.log.open("a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(self.seconds)
        target.write_bytes(b"a whole plan")
        return self.seconds


def _obtain_in_process(graph: Path, folder: Path, target: Path, seconds: float) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    cache = PlanCache(folder=folder, max_bytes=10**6)
    obtain(make_job(graph), cache, SlowBuild(folder.parent / "log", seconds), target)


def start(
    job: BuildJob, cache: PlanCache, target: Path, seconds: float
) -> multiprocessing.process.BaseProcess:
    context = multiprocessing.get_context("spawn")
    process = context.Process(
        target=_obtain_in_process, args=(job.graph, cache.folder, target, seconds)
    )
    process.start()
    return process


def wait_for(path: Path) -> None:
    due_s = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < due_s, f"{path} does not appear"
        time.sleep(0.02)


def test_two_exports_at_once_build_a_plan_once(
    job: BuildJob, cache: PlanCache, tmp_path: Path
) -> None:
    targets = [tmp_path / name / "model.plan" for name in ("first", "second")]
    processes = [start(job, cache, target, 1.0) for target in targets]
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    assert len((tmp_path / "log").read_text().split()) == 1
    for target in targets:
        assert target.read_bytes() == b"a whole plan"
        assert read_record(target).plan_sha256 == hash_plan(target)


def test_killed_build_leaves_the_old_plan_and_the_next_one_starts_afresh(
    job: BuildJob, cache: PlanCache, tmp_path: Path
) -> None:
    target = tmp_path / "served" / "model.plan"
    target.parent.mkdir()
    obtain(_other_profiles(job), cache, CountingBuild(), target)
    before = target.read_bytes()
    process = start(job, cache, target, 300.0)
    wait_for(tmp_path / "log")
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert target.read_bytes() == before
    record = read_record(target)
    assert record.plan_sha256 == hash_plan(target)
    drafts = list(cache.folder.glob("plans/*.draft"))
    assert [draft.read_bytes() for draft in drafts] == [b"half of a plan"]
    build = CountingBuild()
    assert not obtain(job, cache, build, target).from_cache
    assert build.count == 1
    assert not list(cache.folder.glob("plans/*.draft"))
    assert target.read_bytes() != before
