"""Plans kept between exports, by everything that decides what a build gives.

Two exports that want the same plan at once build it once: the second waits for the first. A build
that is killed leaves a draft, which the next one under the same lock throws away.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from closeup.cache_files import lock_file, replace_file, try_lock_file
from closeup.errors import ExportError, ModelError
from closeup.plans import (
    PLAN_SUFFIX,
    PlanRecord,
    graph_bytes,
    graph_mtime_ns,
    hash_graph,
    hash_plan,
    read_record,
    record_json,
    record_path,
)
from export.builder import BuildJob, Toolchain, builder_flags

# Part of every key: a change of the builder's code that changes plans must change it.
_BUILD_FORMAT = 1

Build = Callable[[BuildJob, Toolchain, Path], float]


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanCache:
    """A folder of plans.

    Attributes:
        folder: made when it is needed.
        max_bytes: of all plans together; those not used for longest go first.
    """

    folder: Path
    max_bytes: int

    def entry(self, key: str) -> Path:
        """Return where the plan of a key lies."""
        return self.folder / "plans" / f"{key}{PLAN_SUFFIX}"

    def lock(self, key: str) -> Path:
        """Return the lock file of a key."""
        return self.folder / "plans" / f"{key}.lock"


@dataclass(frozen=True, kw_only=True, slots=True)
class Obtained:
    """A plan in its place.

    Attributes:
        record: what lies beside it.
        from_cache: nothing was built.
    """

    record: PlanRecord
    from_cache: bool


def plan_key(job: BuildJob, toolchain: Toolchain, onnx_sha256: str) -> str:
    """Hash everything that decides what a build gives."""
    facts = {
        "build_format": _BUILD_FORMAT,
        "onnx_sha256": onnx_sha256,
        "flavour": toolchain.flavour.value,
        "version": toolchain.version,
        "sms": toolchain.sms,
        "gpu": toolchain.gpu,
        "precision": job.precision,
        "profiles": [dataclasses.asdict(profile) for profile in job.profiles],
        "flags": builder_flags(toolchain, job.precision),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def obtain_plan(
    job: BuildJob,
    toolchain: Toolchain,
    cache: PlanCache | None,
    target: Path,
    *,
    command: str,
    build: Build,
) -> Obtained:
    """Put a plan and its record into place, built or taken from the cache.

    Args:
        job: what is wanted.
        toolchain: with what it is built.
        cache: None: nothing is kept.
        target: ``.../<stem>.plan``; replaced.
        command: for the record: builds it again.
        build: builds a plan into a file and returns the seconds it took.

    Raises:
        ExportError: it cannot be built or written; whatever was at ``target`` stays.
    """
    onnx_sha256 = hash_graph(job.graph)
    if cache is None:
        draft = target.with_name(f"{target.name}.draft")
        record = _build_record(job, toolchain, draft, onnx_sha256, build)
        obtained = Obtained(record=record, from_cache=False)
        _place(job, draft, target, obtained.record, command, move=True)
        return obtained
    key = plan_key(job, toolchain, onnx_sha256)
    entry = cache.entry(key)
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with lock_file(cache.lock(key)):
            found = _find(entry)
            obtained = Obtained(
                record=found or _fill(job, toolchain, entry, onnx_sha256, build),
                from_cache=found is not None,
            )
            os.utime(entry)
            _place(job, entry, target, obtained.record, command, move=False)
    except OSError as error:
        raise _cannot_write(job.model, cache.folder, error) from error
    prune_cache(cache, keep=entry)
    return obtained


def prune_cache(cache: PlanCache, *, keep: Path) -> None:
    """Remove the plans not used for longest until the rest fits; those in use stay."""
    entries = []
    for path in cache.folder.glob(f"plans/*{PLAN_SUFFIX}"):
        with contextlib.suppress(FileNotFoundError):
            status = path.stat()
            entries.append((status.st_mtime_ns, status.st_size, path))
    total = sum(size for _, size, _ in entries)
    for _, size, path in sorted(entries):
        if total <= cache.max_bytes:
            return
        if path == keep:
            continue
        with try_lock_file(cache.lock(path.stem)) as held:
            if held:
                path.unlink(missing_ok=True)
                record_path(path).unlink(missing_ok=True)
                total -= size


def _find(entry: Path) -> PlanRecord | None:
    """The record of a whole entry; None when there is none, or it is damaged."""
    try:
        record = read_record(entry)
        whole = entry.stat().st_size == record.plan_bytes and hash_plan(entry) == record.plan_sha256
    except (ModelError, OSError):
        return None
    return record if whole else None


def _fill(
    job: BuildJob, toolchain: Toolchain, entry: Path, onnx_sha256: str, build: Build
) -> PlanRecord:
    """Build an entry; the lock is held, so whatever else is there is of a build that died."""
    draft = entry.with_name(f"{entry.name}.draft")
    for stale in (entry, record_path(entry), draft):
        stale.unlink(missing_ok=True)
    record = _build_record(job, toolchain, draft, onnx_sha256, build)
    replace_file(record_path(entry), record_json(record).encode())
    os.replace(draft, entry)
    return record


def _build_record(
    job: BuildJob, toolchain: Toolchain, draft: Path, onnx_sha256: str, build: Build
) -> PlanRecord:
    build_s = build(job, toolchain, draft)
    return PlanRecord(
        model=job.model,
        onnx_sha256=onnx_sha256,
        onnx_bytes=graph_bytes(job.graph),
        flavour=toolchain.flavour,
        version=toolchain.version,
        sms=toolchain.sms,
        gpu=toolchain.gpu,
        precision=job.precision,
        inputs=job.tensors.inputs,
        outputs=job.tensors.outputs,
        profiles=job.profiles,
        plan_sha256=hash_plan(draft),
        plan_bytes=draft.stat().st_size,
        build_s=round(build_s, 1),
        command="",
        flags=builder_flags(toolchain, job.precision),
    )


def _place(
    job: BuildJob, source: Path, target: Path, record: PlanRecord, command: str, *, move: bool
) -> None:
    """Put a plan at ``target``: moved, linked, or copied where the file systems differ."""
    draft = target.with_name(f".{target.name}.draft")
    own = dataclasses.replace(
        record, model=job.model, command=command, onnx_mtime_ns=graph_mtime_ns(job.graph)
    )
    try:
        draft.unlink(missing_ok=True)
        if move:
            os.replace(source, draft)
        else:
            try:
                os.link(source, draft)
            except OSError:
                shutil.copyfile(source, draft)
        os.replace(draft, target)
        replace_file(record_path(target), record_json(own).encode())
    except OSError as error:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
        raise _cannot_write(job.model, target.parent, error) from error


def _cannot_write(model: str, folder: Path, error: OSError) -> ExportError:
    return ExportError(
        f"{model}: the plan cannot be written to {folder}: "
        f"{(error.strerror or str(error)).lower()}; make room, or choose other folders with "
        "--repository and --cache. What was there before stays."
    )
