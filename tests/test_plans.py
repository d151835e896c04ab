"""The record beside a plan, and every reason to refuse a plan."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from closeup import plans
from closeup.errors import ModelError
from closeup.plans import (
    Flavour,
    PlanRecord,
    PlanTensor,
    Profile,
    RuntimeFacts,
    ShapeRange,
    engine_path,
    find_plans,
    graph_bytes,
    graph_mtime_ns,
    hash_graph,
    hash_plan,
    read_record,
    record_json,
    record_path,
    verify_plan,
)

COMMAND = "python -m export --model weights --name m --target tensorrt"
HERE = RuntimeFacts(flavour=Flavour.TENSORRT, version="11.1.0.106", sm="9.0")
IMAGE = PlanTensor(name="image", dtype="float32", axes=("batch", 3, "height", "width"))


def range_of(low: tuple[int, ...], high: tuple[int, ...]) -> ShapeRange:
    return ShapeRange(min=low, opt=high, max=high)


def profile(name: str, low: tuple[int, ...], high: tuple[int, ...]) -> Profile:
    return Profile(name=name, shapes={"image": range_of(low, high)})


def write_plan(folder: Path, **changes: Any) -> Path:
    """Write a graph with external data, a plan and its record."""
    folder.mkdir(parents=True, exist_ok=True)
    graph, plan = folder / "model.onnx", folder / "model.plan"
    graph.write_bytes(b"graph")
    (folder / "model.onnx_data").write_bytes(b"weights")
    plan.write_bytes(bytes(range(200)))
    record = PlanRecord(
        model="m_vae_encoder",
        onnx_sha256=hash_graph(graph),
        onnx_bytes=graph_bytes(graph),
        flavour=Flavour.TENSORRT,
        version=HERE.version,
        sms=(HERE.sm,),
        gpu="NVIDIA H100 80GB HBM3",
        precision="bf16",
        inputs=(IMAGE,),
        outputs=(PlanTensor(name="moments", dtype="float32", axes=("batch", 8, "h", "w")),),
        profiles=(profile("256x256 to 512x512", (1, 3, 256, 256), (4, 3, 512, 512)),),
        plan_sha256=hash_plan(plan),
        plan_bytes=200,
        build_s=3.5,
        command=COMMAND,
        flags={"strongly_typed": "on"},
    )
    record_path(plan).write_text(
        record_json(dataclasses.replace(record, **changes)), encoding="utf-8"
    )
    return plan


def refusal(plan: Path, runtime: RuntimeFacts = HERE, **more: Any) -> str:
    """Return the sentence that a plan is refused with."""
    with pytest.raises(ModelError) as caught:
        verify_plan(plan, runtime, **more)
    text = str(caught.value)
    assert "\n" not in text
    assert str(plan.parent) in text
    return text


def test_record_survives_its_file(tmp_path: Path) -> None:
    plan = write_plan(tmp_path)
    record = verify_plan(plan, HERE, onnx_sha256=hash_graph(tmp_path / "model.onnx"))
    assert record == read_record(plan)
    assert record.inputs == (IMAGE,)
    assert record.profiles[0].shapes["image"].max == (4, 3, 512, 512)
    assert record.flags == {"strongly_typed": "on"}
    assert record.flavour is Flavour.TENSORRT


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"flavour": Flavour.RTX}, ["TensorRT-RTX", "cannot be opened by TensorRT"]),
        ({"version": "11.1.0.107"}, ["TensorRT 11.1.0.107", "this is 11.1.0.106"]),
        ({"sms": ("8.9",)}, ["compute capability 8.9", "H100", "this one has 9.0"]),
    ],
)
def test_verify_plan_refuses_a_plan_for_another_machine(
    tmp_path: Path, changes: dict[str, Any], expected: list[str]
) -> None:
    text = refusal(write_plan(tmp_path, **changes))
    assert text.endswith(f"build it again with: {COMMAND}")
    for words in expected:
        assert words in text


def _truncate(plan: Path) -> None:
    os.truncate(plan, 120)


def _swap(plan: Path) -> None:
    plan.write_bytes(bytes(range(199)) + b"?")


def _lengthen(plan: Path) -> None:
    plan.write_bytes(plan.read_bytes() + b"?")


def _change_graph(plan: Path) -> None:
    plan.with_name("model.onnx").write_bytes(b"Graph")


def _change_weights(plan: Path) -> None:
    plan.with_name("model.onnx_data").write_bytes(b"Weights")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (_truncate, "truncated, 120 of 200 bytes"),
        (_swap, "not the file that its record describes"),
        (_lengthen, "not the file that its record describes"),
        (_change_graph, "model.onnx beside it is not the graph it was built from"),
        (_change_weights, "model.onnx beside it is not the graph it was built from"),
    ],
)
def test_verify_plan_refuses_files_that_changed(
    tmp_path: Path, change: Callable[[Path], None], expected: str
) -> None:
    plan = write_plan(tmp_path)
    change(plan)
    text = refusal(plan)
    assert expected in text
    assert text.endswith(COMMAND)


def test_verify_plan_refuses_a_graph_that_the_manifest_does_not_name(tmp_path: Path) -> None:
    assert "another graph" in refusal(write_plan(tmp_path), onnx_sha256="0" * 64)


def test_verify_plan_reads_the_graph_only_when_its_time_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = write_plan(tmp_path)
    graph = plan.with_name("model.onnx")
    record = dataclasses.replace(read_record(plan), onnx_mtime_ns=graph_mtime_ns(graph))
    record_path(plan).write_text(record_json(record), encoding="utf-8")
    read: list[Path] = []

    def noting(path: Path) -> str:
        read.append(path)
        return hash_graph(path)

    monkeypatch.setattr(plans, "hash_graph", noting)
    verify_plan(plan, HERE)
    assert read == []
    os.utime(graph, ns=(0, graph_mtime_ns(graph) + 1))  # copied elsewhere: the same content
    verify_plan(plan, HERE)
    assert read == [graph]


def test_verify_plan_needs_no_graph_beside_the_plan(tmp_path: Path) -> None:
    plan = write_plan(tmp_path)
    plan.with_name("model.onnx").unlink()
    assert verify_plan(plan, HERE).model == "m_vae_encoder"


@pytest.mark.parametrize("text", ["{", "[1]", '{"format": 1}', '{"format": 1, "flavour": "x"}'])
def test_read_record_refuses_a_damaged_file(tmp_path: Path, text: str) -> None:
    plan = write_plan(tmp_path)
    record_path(plan).write_text(text, encoding="utf-8")
    assert "is damaged" in refusal(plan)


def test_read_record_refuses_another_format(tmp_path: Path) -> None:
    plan = write_plan(tmp_path)
    data = json.loads(record_path(plan).read_text(encoding="utf-8"))
    record_path(plan).write_text(json.dumps({**data, "format": 2}), encoding="utf-8")
    assert "has format 2, this version reads 1" in refusal(plan)


def test_verify_plan_says_what_is_missing(tmp_path: Path) -> None:
    plan = write_plan(tmp_path)
    record_path(plan).unlink()
    assert "no record model.plan.json beside it" in refusal(plan)
    plan.unlink()
    assert "There is no plan at" in refusal(plan)


def test_hash_graph_covers_external_data_and_equals_the_file_without(tmp_path: Path) -> None:
    plan = write_plan(tmp_path)
    graph = plan.with_name("model.onnx")
    with_data = hash_graph(graph)
    assert graph_bytes(graph) == 12
    plan.with_name("model.onnx_data").unlink()
    assert hash_graph(graph) == hash_plan(graph) != with_data


def test_profile_for_takes_the_narrowest_that_fits() -> None:
    wide = profile("wide", (1, 3, 64, 64), (8, 3, 512, 512))
    narrow = profile("narrow", (1, 3, 256, 256), (1, 3, 256, 256))
    record = _record_with((wide, narrow))
    assert record.profile_for({"image": (1, 3, 256, 256)}) == 1
    assert record.profile_for({"image": (2, 3, 256, 256)}) == 0
    assert record.profile_for({"image": (8, 3, 512, 512)}) == 0
    # Both sides of the limits, another rank, another name.
    assert record.profile_for({"image": (9, 3, 512, 512)}) is None
    assert record.profile_for({"image": (1, 3, 63, 64)}) is None
    assert record.profile_for({"image": (1, 3, 64)}) is None
    assert record.profile_for({"picture": (1, 3, 64, 64)}) is None


def _record_with(profiles: tuple[Profile, ...]) -> PlanRecord:
    return PlanRecord(
        model="m", onnx_sha256="", onnx_bytes=0, flavour=Flavour.RTX, version="1", sms=("8.9",),
        gpu="", precision="fp16", inputs=(IMAGE,), outputs=(), profiles=profiles, plan_sha256="",
        plan_bytes=0, build_s=0, command="",
    )  # fmt: skip


def test_engine_path_prefers_the_plan(tmp_path: Path) -> None:
    plan = write_plan(tmp_path / "m_denoiser" / "1")
    folder = plan.parent
    assert engine_path(folder) == plan
    assert engine_path(folder, "plain") == folder / "plain.onnx"
    assert find_plans(tmp_path) == [plan]
    plan.unlink()
    assert engine_path(folder) == folder / "model.onnx"
    assert find_plans(tmp_path) == []


def test_plans_module_imports_neither_tensorrt_nor_torch() -> None:
    code = (
        "import sys, closeup.plans, closeup.tensorrt_package; "
        "print([m for m in ('torch', 'tensorrt', 'tensorrt_rtx', 'onnx') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
