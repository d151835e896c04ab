"""The engine wrapper over ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from closeup import onnx_engine
from closeup.devices import Gpu
from closeup.engines import (
    Array,
    EngineOptions,
    TensorSpec,
    count_threads,
    open_engine,
    quota_cores,
)
from closeup.errors import ModelError
from tests.triton_fixtures import save_double, save_lookup


@pytest.fixture
def double_path(tmp_path: Path) -> Path:
    path = tmp_path / "double" / "1" / "model.onnx"
    save_double(path)
    return path


def test_engine_tells_its_tensors_when_opened(double_path: Path) -> None:
    engine = open_engine(double_path)
    spec = TensorSpec(name="x", dtype=np.dtype(np.float32), shape=("B", 3))
    assert engine.inputs == (spec,)
    assert [output.name for output in engine.outputs] == ["y"]
    assert spec.describe() == "float32 (B, 3)"


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize(
    "options",
    [
        EngineOptions(threads=1),
        EngineOptions(threads=2, spinning=True, graph_optimization="basic", keep_memory=False),
    ],
)
def test_run_doubles_when_graph_doubles(
    double_path: Path, batch: int, options: EngineOptions
) -> None:
    x = np.arange(3 * batch, dtype=np.float32).reshape(batch, 3)
    y = open_engine(double_path, options=options).run({"x": x})["y"]
    np.testing.assert_array_equal(y, 2 * x)  # exact: doubling rounds nothing


@pytest.mark.parametrize(
    ("feeds", "text"),
    [
        ({}, "double: input x is missing; expected float32 (B, 3)."),
        ({"x": np.ones((1, 4), np.float32)}, "double: input x is float32 (1, 4); expected"),
        ({"x": np.ones(3, np.float32)}, "double: input x is float32 (3,); expected"),
        ({"x": np.ones((1, 3))}, "double: input x is float64 (1, 3); expected float32 (B, 3)."),
        ({"x": np.ones((1, 3), np.float32), "z": np.ones(1)}, "double: got an unknown input z"),
    ],
)
def test_run_names_model_tensor_and_shapes_when_feeds_are_wrong(
    double_path: Path,
    feeds: dict[str, Array],
    text: str,
) -> None:
    engine = open_engine(double_path)
    with pytest.raises(ModelError) as caught:
        engine.run(feeds)
    assert str(caught.value).startswith(text)


def test_run_raises_model_error_and_engine_stays_usable_when_the_graph_fails(
    tmp_path: Path,
) -> None:
    path = tmp_path / "lookup.onnx"
    save_lookup(path)
    engine = open_engine(path)
    with pytest.raises(ModelError, match=r"lookup: the run failed on x \(1, 1\): .*out of"):
        engine.run({"x": np.array([[99]])})
    assert engine.run({"x": np.array([[4]])})["y"] == 14


def test_run_raises_when_closed(double_path: Path) -> None:
    engine = open_engine(double_path)
    engine.close()
    with pytest.raises(ModelError, match="double: the engine is closed"):
        engine.run({"x": np.ones((1, 3), np.float32)})


def test_open_engine_raises_one_sentence_when_the_file_is_no_engine(tmp_path: Path) -> None:
    broken = tmp_path / "model.onnx"
    broken.write_bytes(b"not a graph")
    plan = tmp_path / "model.plan"
    plan.touch()
    other = tmp_path / "model.bin"
    other.touch()
    for path, text in (
        (tmp_path / "absent.onnx", "There is no engine at"),
        (broken, "ONNX Runtime cannot open"),
        (plan, r"model\.plan has no record model\.plan\.json"),
        (other, r"expected a name that ends in \.onnx or \.plan"),
    ):
        with pytest.raises(ModelError, match=text) as caught:
            open_engine(path)
        assert "\n" not in str(caught.value)


def test_open_engine_names_the_weights_file_when_it_is_missing(
    double_path: Path, tmp_path: Path
) -> None:
    path = tmp_path / "split.onnx"
    onnx.save(
        onnx.load(double_path),
        path,
        save_as_external_data=True,
        location="split.data",
        size_threshold=0,
    )
    x = np.ones((1, 3), np.float32)
    np.testing.assert_array_equal(open_engine(path).run({"x": x})["y"], 2 * x)
    (tmp_path / "split.data").unlink()
    with pytest.raises(ModelError, match="keeps its weights in a file beside it") as caught:
        open_engine(path)
    assert "split.data" in str(caught.value)


def test_open_engine_raises_when_an_option_is_unknown(double_path: Path) -> None:
    with pytest.raises(ModelError, match="graph_optimization is 'most'"):
        open_engine(double_path, options=EngineOptions(graph_optimization="most"))


def test_open_engine_writes_the_optimised_graph_when_asked(
    double_path: Path, tmp_path: Path
) -> None:
    written = tmp_path / "optimised.onnx"
    open_engine(double_path, options=EngineOptions(optimized_model_path=written))
    y = open_engine(written).run({"x": np.ones((2, 3), np.float32)})["y"]
    np.testing.assert_array_equal(y, np.full((2, 3), 2))


def test_count_threads_reads_the_environment_when_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLOSEUP_THREADS", "3")
    assert count_threads() == 3
    assert EngineOptions().threads == 3
    monkeypatch.delenv("CLOSEUP_THREADS")
    assert count_threads() >= 1


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "400000 100000\n"}, 4),
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "1000 100000\n"}, 1),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "250000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({}, None),
    ],
)
def test_quota_cores_reads_what_a_containers_control_group_allows(
    tmp_path: Path, files: dict[str, str], cores: int | None
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert quota_cores(tmp_path) == cores


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5"])
def test_count_threads_raises_when_the_environment_is_no_count(
    monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv("CLOSEUP_THREADS", text)
    with pytest.raises(ModelError, match="CLOSEUP_THREADS is"):
        count_threads()


@pytest.mark.parametrize(
    ("providers", "has_gpu", "told"),
    [
        (["CUDAExecutionProvider", "CPUExecutionProvider"], False, "does not find a GPU or its"),
        (["CPUExecutionProvider"], True, "this onnxruntime has no CUDA"),
        (["CPUExecutionProvider"], False, ""),
    ],
)
def test_graph_on_the_cpu_is_told_of_when_cuda_was_to_be_had(
    double_path: Path, providers: list[str], has_gpu: bool, told: str,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    import onnxruntime as ort

    calls: list[str] = []
    gpu = Gpu(name="a GPU", sm="9.0", index=0) if has_gpu else None
    make = ort.InferenceSession

    def make_session(path: str, **options: Any) -> Any:
        calls.append("session")
        return make(path, sess_options=options["sess_options"], providers=["CPUExecutionProvider"])

    monkeypatch.setattr(ort, "get_available_providers", lambda: providers)
    monkeypatch.setattr(ort, "preload_dlls", lambda: calls.append("preload"), raising=False)
    monkeypatch.setattr(ort, "InferenceSession", make_session)
    monkeypatch.setattr(onnx_engine, "find_gpu", lambda device_id: gpu)
    monkeypatch.setenv("CLOSEUP_DEVICE", "auto")
    open_engine(double_path).close()
    # pip's CUDA libraries are found only when they are loaded before the session is made.
    assert calls == (["preload", "session"] if len(providers) == 2 else ["session"])
    assert told in caplog.text
    assert bool(caplog.records) == bool(told)
    monkeypatch.setenv("CLOSEUP_DEVICE", "cpu")
    caplog.clear()
    open_engine(double_path).close()
    assert not caplog.records
