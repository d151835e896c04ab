"""The Python-based backend for plans, and the check of a repository before it is served."""

from __future__ import annotations

import ctypes
import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest

from closeup import nvinfer, preflight
from closeup.devices import find_gpu
from closeup.errors import ModelError, ServerError
from closeup.onnx_serving import check_config, complete_config
from closeup.plan_engine import describe_plan
from closeup.plans import Flavour, RuntimeFacts, read_record, record_json, record_path
from closeup.server import EmbeddedServer, ServerOptions
from tests.fake_tensorrt import toy_record, write_plan
from tests.triton_fixtures import CPU_INSTANCE

HERE = RuntimeFacts(flavour=Flavour.TENSORRT, version="11.1.0.106", sm="9.0")


def test_config_is_completed_from_the_record_when_there_is_no_gpu(tmp_path: Path) -> None:
    description = describe_plan(read_record(write_plan(tmp_path)))
    completion = complete_config({}, description)
    assert completion.max_batch_size == 4
    assert completion.inputs == (
        {"name": "x", "data_type": "TYPE_FP32", "dims": [-1]},
        {"name": "bank", "data_type": "TYPE_FP32", "dims": [-1]},
        {"name": "row", "data_type": "TYPE_INT64", "dims": [1]},
    )
    listed = [{**tensor, "dims": [-1]} for tensor in completion.inputs]
    whole = {"max_batch_size": 2, "input": listed, "output": list(completion.outputs)}
    check_config(whole, description)
    with pytest.raises(ModelError, match="lists tensors but not row"):
        check_config({**whole, "input": listed[:2]}, description)


@pytest.mark.triton
def test_server_says_one_sentence_when_a_plan_cannot_be_opened(tmp_path: Path) -> None:
    write_plan(tmp_path)
    (tmp_path / "toy" / "config.pbtxt").write_text(f'backend: "tensorrt"\n{CPU_INSTANCE}')
    options = ServerOptions(
        repository=tmp_path, http_port=0, grpc_port=0, metrics_port=0, exit_timeout_s=5
    )
    with pytest.raises(ServerError) as caught:
        EmbeddedServer(options).start()
    first = str(caught.value).splitlines()[0]
    # Without a GPU one of these two, with one the record's version or the plan itself is refused.
    assert "model toy" in first
    assert any(
        text in first for text in ("TensorRT is not installed here", "no GPU", "build it again")
    )


def test_preflight_passes_when_every_plan_is_for_this_machine(tmp_path: Path) -> None:
    write_plan(tmp_path)
    assert preflight.find_problems(tmp_path, lambda flavour: HERE) == []
    assert preflight.main(["--repository", str(tmp_path / "toy" / "1")]) == 0  # no plans


@pytest.mark.parametrize(
    ("facts", "text"),
    [
        (dataclasses.replace(HERE, version="11.2.0.1"), "it was built by TensorRT 11.1.0.106"),
        (dataclasses.replace(HERE, sm="8.9"), "compute capability 9.0"),
    ],
)
def test_preflight_names_plan_and_command_when_a_plan_is_for_another_machine(
    tmp_path: Path, facts: RuntimeFacts, text: str
) -> None:
    plan = write_plan(tmp_path)
    (problem,) = preflight.find_problems(tmp_path, lambda flavour: facts)
    assert problem.startswith(f"{plan}: ")
    assert text in problem
    assert problem.endswith("python -m export --target tensorrt --name toy")


def test_preflight_tells_every_damaged_plan_and_a_missing_runtime_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("one", "two"):
        write_plan(tmp_path / name).parent.rename(tmp_path / name / "1")
    record_path(tmp_path / "two" / "1" / "model.plan").write_text("{")
    third = write_plan(tmp_path)

    def refuse(flavour: Flavour) -> RuntimeFacts:
        raise ModelError("no TensorRT here")

    problems = preflight.find_problems(tmp_path, refuse)
    assert len(problems) == 2
    assert problems[0] == "no TensorRT here"
    assert "is damaged" in problems[1]
    third.write_bytes(b"short")
    assert preflight.main(["--repository", str(tmp_path)], lambda flavour: HERE) == 1
    lines = capsys.readouterr().err.splitlines()
    assert ["truncated" in line for line in lines] == [True, False]
    assert all(line.startswith("preflight: ") for line in lines)
    assert preflight.main(["--repository", str(tmp_path / "absent")]) == 1


def test_runtime_facts_refuse_when_library_and_package_differ(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Module:
        __version__ = "11.1.0.106"

    monkeypatch.setattr(preflight, "import_tensorrt", lambda flavour: Module)
    monkeypatch.setattr(preflight, "library_version", lambda: "11.4.0.106")
    with pytest.raises(ModelError, match=r"Triton loads TensorRT 11\.4\.0\.106 and Python's"):
        preflight.runtime_facts(Flavour.TENSORRT)
    monkeypatch.setattr(preflight, "library_version", lambda: "11.1.0.106")
    if find_gpu() is None:
        with pytest.raises(ModelError, match="there is no NVIDIA GPU"):
            preflight.runtime_facts(Flavour.TENSORRT)


def test_preflight_refuses_plans_of_rtx_whether_its_package_is_there_or_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        preflight, "import_tensorrt", lambda flavour: SimpleNamespace(__version__="1")
    )
    for name in ("one", "two"):
        plan = write_plan(tmp_path / name)
        record = dataclasses.replace(read_record(plan), flavour=Flavour.RTX)
        record_path(plan).write_text(record_json(record), encoding="utf-8")
        plan.parent.rename(tmp_path / name / "1")
    (problem,) = preflight.find_problems(tmp_path)
    assert problem.startswith("NVIDIA's tritonserver cannot serve plans of TensorRT-RTX")
    assert "--target tensorrt" in problem


def test_version_problem_is_told_only_when_versions_differ() -> None:
    assert nvinfer.version_problem("11.1.0.106", "11.1.0.106") == ""
    assert nvinfer.version_problem(None, "11.1.0.106") == ""
    text = nvinfer.version_problem("11.1.0.106", "11.1.0.99")
    assert text.endswith("tensorrt-cu13-bindings==11.1.0.106.* in quotes.")
    assert nvinfer.version_problem("10.14.1.48", "10.14.1.48.post1") == ""
    assert nvinfer.version_problem("10.14.1.4", "10.14.1.48.post1") != ""


@pytest.mark.parametrize("version", ["11.1.0.106.post1", "11.1.0.106"])
def test_preflight_passes_when_only_the_upload_of_the_package_differs(
    tmp_path: Path, version: str
) -> None:
    write_plan(tmp_path)
    facts = dataclasses.replace(HERE, version=version)
    assert preflight.find_problems(tmp_path, lambda flavour: facts) == []


def test_library_version_is_read_from_the_library_and_none_without(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = {"Major": 11, "Minor": 1, "Patch": 0, "Build": 106}

    class Library:
        def __init__(self, name: str) -> None:
            if name != "libnvinfer.so.10":
                raise OSError(name)

        def __getattr__(self, name: str) -> object:
            part = name.removeprefix("getInferLib").removesuffix("Version")
            if part not in parts:
                raise AttributeError(name)
            return lambda: parts[part]

    monkeypatch.setattr(ctypes, "CDLL", Library)
    assert nvinfer.library_version() == "11.1.0.106"
    assert nvinfer.main() == 0
    assert capsys.readouterr().out == "11.1.0.106\n"
    assert nvinfer.library_version(("libnvinfer.so.11",)) is None
    del parts["Build"]
    assert nvinfer.library_version() is None
    monkeypatch.setattr(nvinfer, "library_version", lambda: None)
    assert nvinfer.main() == 1
    assert "expected NVIDIA's tritonserver image" in capsys.readouterr().err


def test_record_of_another_format_is_refused_when_described(tmp_path: Path) -> None:
    plan = write_plan(tmp_path)
    record_path(plan).write_text(record_json(dataclasses.replace(toy_record(), format=9)))
    with pytest.raises(ModelError, match="has format 9"):
        read_record(plan)
