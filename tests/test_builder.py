"""What the builder is told and what its failures say, over a TensorRT that builds nothing."""

from __future__ import annotations

import errno
import importlib
import os
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from closeup import tensorrt_package
from closeup.cache_files import merge_file, read_file, replace_file, try_lock_file
from closeup.devices import Gpu
from closeup.errors import ExportError, ModelError
from closeup.plans import Flavour, PlanTensor
from closeup.tensorrt_package import Messages, explain, import_tensorrt, make_logger
from export import builder
from export.builder import (
    BuildJob,
    Toolchain,
    build_plan,
    builder_flags,
    open_toolchain,
)
from export.profiles import Tensors, profile_of, tensors_of
from export.progress import timed_report
from export.sizes import Side
from tests.fake_builder import BuilderFlag, FakeTensorrt

GPU = Gpu(name="NVIDIA L40S", sm="8.9")


def write_graph(path: Path, *, op: str = "Identity", name: str = "x") -> Path:
    x = helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 3])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3])
    graph = helper.make_graph([helper.make_node(op, [name], ["y"])], "g", [x], [y])
    onnx.save(helper.make_model(graph), path)
    return path


def make_job(graph: Path, *, precision: str = "fp32", largest: int = 4) -> BuildJob:
    tensors = tensors_of(graph)
    sides = {"batch": Side.up_to(largest)}
    return BuildJob(
        model="m_vae_decoder",
        graph=graph,
        tensors=tensors,
        profiles=(profile_of("all", tensors.inputs, sides),),
        precision=precision,
    )


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeTensorrt:
    module = FakeTensorrt("11.4.0.106")
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    monkeypatch.setattr(builder, "find_gpu", lambda: GPU)
    return module


@pytest.fixture
def toolchain(fake: FakeTensorrt, tmp_path: Path) -> Toolchain:
    return open_toolchain(Flavour.TENSORRT, cache_dir=tmp_path / "cache")


def test_toolchain_is_the_gpus_own(toolchain: Toolchain, tmp_path: Path) -> None:
    assert (toolchain.version, toolchain.sms, toolchain.gpu) == ("11.4.0.106", ("8.9",), GPU.name)
    assert (
        toolchain.timing_cache == tmp_path / "cache" / "timing-11.4.0.106-sm8.9-NVIDIA-L40S.cache"
    )


@pytest.mark.parametrize(("has_flag", "flags"), [(True, 2), (False, 0)])
def test_networks_are_strongly_typed_with_and_without_the_flag(
    has_flag: bool, flags: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = FakeTensorrt("12.0.0.1", strongly_typed_flag=has_flag)
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    monkeypatch.setattr(builder, "find_gpu", lambda: GPU)
    job = make_job(write_graph(tmp_path / "model.onnx"))
    build_plan(job, open_toolchain(Flavour.TENSORRT), tmp_path / "model.plan")
    network, _ = module.built[0]
    assert network.flags == flags
    assert (tmp_path / "model.plan").read_bytes() == b"plan of model.onnx"


@pytest.mark.parametrize(("precision", "tf32"), [("fp32", False), ("fp16", True)])
def test_float32_networks_do_not_multiply_in_tf32(
    precision: str, tf32: bool, toolchain: Toolchain, fake: FakeTensorrt, tmp_path: Path
) -> None:
    job = make_job(write_graph(tmp_path / "model.onnx"), precision=precision)
    build_plan(job, toolchain, tmp_path / "model.plan")
    assert (BuilderFlag.TF32 in fake.built[0][1].flags) is tf32
    assert ("tf32" in builder_flags(toolchain, precision)) is not tf32


def test_builder_gets_min_opt_and_max_of_every_input(
    toolchain: Toolchain, fake: FakeTensorrt, tmp_path: Path
) -> None:
    build_plan(make_job(write_graph(tmp_path / "model.onnx")), toolchain, tmp_path / "model.plan")
    _, config = fake.built[0]
    assert [profile.shapes for profile in config.profiles] == [{"x": ((1, 3), (4, 3), (4, 3))}]


def failure(job: BuildJob, toolchain: Toolchain, target: Path) -> str:
    """Return the sentence of a build that fails; nothing is left behind."""
    with pytest.raises(ExportError) as caught:
        build_plan(job, toolchain, target)
    assert not target.exists()
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith("m_vae_decoder: ")
    return text


def test_build_says_which_operation_cannot_be_read(toolchain: Toolchain, tmp_path: Path) -> None:
    job = make_job(write_graph(tmp_path / "model.onnx", op="Wobble"))
    text = failure(job, toolchain, tmp_path / "model.plan")
    assert "cannot read model.onnx at /wobble: no importer for Wobble" in text


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "IBuilder::buildSerializedNetwork: Error Code 1: Cuda Runtime (In f at /_src/a.cpp:25 "
            "(cudaError 35: CUDA driver version is insufficient for CUDA runtime version))",
            "there is no GPU that it can use (CUDA error 35)",
        ),
        (
            "Error Code 2: OutOfMemory (Requested size was 9 bytes.)",
            "the GPU has not enough free memory",
        ),
        (
            "IRuntime::deserializeCudaEngine: Error Code 1: Serialization (Serialization assertion "
            "plan.header.size == blobSize failed. In parsePlan at /_src/runtime.cpp:780)",
            "the file is damaged or of another TensorRT version",
        ),
        (
            "IBuilder::buildSerializedNetwork: Error Code 10: Could not find any implementation "
            "for node X. In g at /_src/b.cpp:9",
            "Error Code 10: Could not find any implementation for node X",
        ),
        ("", "TensorRT gives no reason"),
    ],
)
def test_build_explains_tensorrts_log_in_one_clause(
    line: str, expected: str, toolchain: Toolchain, fake: FakeTensorrt, tmp_path: Path
) -> None:
    fake.error = line or " "
    job = make_job(write_graph(tmp_path / "model.onnx"))
    text = failure(job, toolchain, tmp_path / "model.plan") if line else explain([])
    assert expected in text
    assert "/_src" not in text


def test_build_refuses_a_network_that_is_not_the_jobs(toolchain: Toolchain, tmp_path: Path) -> None:
    job = make_job(write_graph(tmp_path / "model.onnx"))
    x = job.tensors.inputs[0]
    for changed, expected in (
        (PlanTensor(name="x", dtype="float16", axes=x.axes), "x as float32 (-1, 3)"),
        (PlanTensor(name="x", dtype="float32", axes=("batch", 4)), "expected float32 (-1, 4)"),
        (PlanTensor(name="z", dtype="float32", axes=x.axes), "reads the inputs ['x'], expected"),
    ):
        tensors = Tensors(inputs=(changed,), outputs=job.tensors.outputs)
        wrong = BuildJob(
            model=job.model, graph=job.graph, tensors=tensors, profiles=job.profiles,
            precision="fp32",
        )  # fmt: skip
        assert expected in failure(wrong, toolchain, tmp_path / "model.plan")


def test_build_names_the_profile_that_is_refused(toolchain: Toolchain, tmp_path: Path) -> None:
    job = make_job(write_graph(tmp_path / "model.onnx", name="refused"))
    assert "refuses the profile all" in failure(job, toolchain, tmp_path / "model.plan")


def test_build_says_so_when_the_disk_is_full(toolchain: Toolchain, tmp_path: Path) -> None:
    job = make_job(write_graph(tmp_path / "model.onnx"))
    (tmp_path / "full.plan").symlink_to("/dev/full")  # every write to it answers ENOSPC
    text = failure(job, toolchain, tmp_path / "full.plan")
    assert os.strerror(errno.ENOSPC).lower() in text
    assert "what was there before stays" in text


def test_build_stops_and_leaves_nothing_when_it_is_interrupted(
    toolchain: Toolchain, tmp_path: Path
) -> None:
    seen: list[tuple[int, int]] = []

    def progress(done: int, total: int) -> None:
        seen.append((done, total))
        if done == 3:
            raise KeyboardInterrupt

    job = make_job(write_graph(tmp_path / "model.onnx"))
    with pytest.raises(KeyboardInterrupt):
        build_plan(job, toolchain, tmp_path / "model.plan", progress)
    assert seen == [(1, 5), (2, 5), (3, 5)]  # of the outermost phase alone
    assert not (tmp_path / "model.plan").exists()


def test_timed_report_says_a_line_every_half_minute() -> None:
    said: list[str] = []
    now = iter([0.0, 10.0, 31.0, 40.0, 62.0])
    report = timed_report(said.append, "m", clock=lambda: next(now))
    for step in range(1, 5):
        report(step, 9)
    assert said == ["m: building, step 2 of 9, 31 s", "m: building, step 4 of 9, 62 s"]


def test_timings_of_builds_side_by_side_are_all_kept(
    toolchain: Toolchain, fake: FakeTensorrt, tmp_path: Path
) -> None:
    job = make_job(write_graph(tmp_path / "model.onnx"))
    assert toolchain.timing_cache is not None
    fake.word = b"first"
    # Another process finishes while this build runs: what it kept must survive.
    fake.while_building = lambda: replace_file(toolchain.timing_cache, b"other")  # type: ignore[arg-type]
    build_plan(job, toolchain, tmp_path / "a.plan")
    fake.while_building = lambda: None
    fake.word = b"second"
    build_plan(job, toolchain, tmp_path / "b.plan")
    assert read_file(toolchain.timing_cache).split() == [b"first", b"other", b"second"]


def test_damaged_timing_cache_is_begun_anew(toolchain: Toolchain, tmp_path: Path) -> None:
    assert toolchain.timing_cache is not None
    replace_file(toolchain.timing_cache, b"damaged")
    build_plan(make_job(write_graph(tmp_path / "model.onnx")), toolchain, tmp_path / "a.plan")
    assert read_file(toolchain.timing_cache) == b"timed"


def test_merge_file_loses_nothing_when_threads_add_at_once(tmp_path: Path) -> None:
    path = tmp_path / "cache"

    def add(number: int) -> None:
        merge_file(path, lambda present: present + bytes([number]))

    threads = [threading.Thread(target=add, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(read_file(path)) == list(range(20))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "cache.lock"]


def test_replace_file_keeps_the_old_content_when_it_cannot_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cache"
    replace_file(path, b"old")
    assert path.stat().st_mode & 0o777 == 0o644

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        replace_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["cache"]


def test_try_lock_file_tells_whether_somebody_holds_it(tmp_path: Path) -> None:
    with try_lock_file(tmp_path / "lock") as first, try_lock_file(tmp_path / "lock") as second:
        assert (first, second) == (True, False)
    with try_lock_file(tmp_path / "lock") as third:
        assert third


@pytest.mark.parametrize("flavour", list(Flavour))
def test_missing_package_is_named_with_its_extra(
    flavour: Flavour, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, flavour.module, None)
    with pytest.raises(ModelError) as caught:
        import_tensorrt(flavour)
    text = str(caught.value)
    assert f"package {tensorrt_package.PACKAGES[flavour]}" in text
    assert f"'closeup[{flavour.value}]'" in text
    with pytest.raises(ExportError, match=f"--target {flavour.value}: {flavour.label} is not inst"):
        open_toolchain(flavour)


def test_package_whose_libraries_do_not_load_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> Any:
        raise ImportError("libnvinfer.so.11: cannot open shared object file\nmore")

    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(ModelError, match=r"cannot be loaded: libnvinfer.so.11: cannot open shared"):
        import_tensorrt(Flavour.TENSORRT)


def test_tensorrt_without_a_gpu_says_what_to_do(
    fake: FakeTensorrt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builder, "find_gpu", lambda: None)
    with pytest.raises(ExportError, match="there is none here .*--target tensorrt-rtx"):
        open_toolchain(Flavour.TENSORRT)


def test_compute_capabilities_are_an_option_of_rtx_alone(fake: FakeTensorrt) -> None:
    with pytest.raises(ExportError, match="--sms goes with --target tensorrt-rtx"):
        open_toolchain(Flavour.TENSORRT, sms=("8.9",))


def test_extras_and_constraints_name_the_packages() -> None:
    root = Path(__file__).resolve().parent.parent
    project = (root / "pyproject.toml").read_text(encoding="utf-8")
    constraints = (root / "constraints.txt").read_text(encoding="utf-8")
    for flavour, package in tensorrt_package.PACKAGES.items():
        assert f'\n{flavour.value} = ["{package}>=' in project
    for package in ("tensorrt_rtx_cu13", "tensorrt_rtx_cu13_bindings", "tensorrt_rtx_cu13_libs"):
        assert f"\n{package}==" in constraints


@pytest.mark.parametrize("severity", ["INFO", "VERBOSE"])
def test_log_lines_that_nobody_reads_are_dropped_at_once(severity: str) -> None:
    class Refusing(Messages):
        def add(self, severity: str, text: str) -> None:
            raise AssertionError(severity)

    logger = make_logger(SimpleNamespace(ILogger=object), Refusing())
    logger.log(SimpleNamespace(name=severity), "a line")
    with pytest.raises(AssertionError, match="WARNING"):
        logger.log(SimpleNamespace(name="WARNING"), "a line")
