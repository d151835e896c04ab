"""The Python-based onnxruntime backend, without and with the server."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpcclient
from tritonclient.utils import InferenceServerException

from closeup.engines import Array, TensorSpec, open_engine
from closeup.errors import ModelError
from closeup.onnx_serving import (
    check_config,
    complete_config,
    find_engine,
    is_complete,
    options_from_config,
    run_requests,
    runs_on_cuda,
    triton_type,
)
from closeup.server import EmbeddedServer, ServerOptions
from tests.triton_fixtures import make_input, make_repository, save_double, save_lookup


class CountingEngine:
    """y = 2x for every input, and how many rows each run had."""

    def __init__(self, *, first_axis: int | str = "B", fail_above: float = np.inf) -> None:
        self.inputs = (TensorSpec(name="x", dtype=np.dtype(np.float32), shape=(first_axis, "n")),)
        self.outputs = (TensorSpec(name="y", dtype=np.dtype(np.float16), shape=("B", 2, "n")),)
        self.fail_above = fail_above
        self.runs: list[tuple[int, ...]] = []

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        self.runs.append(feeds["x"].shape)
        if (feeds["x"] > self.fail_above).any():
            raise ModelError("too large")
        return {"y": 2 * feeds["x"]}

    def close(self) -> None:
        pass


def feeds_from(*shapes: tuple[int, ...]) -> list[dict[str, Array]]:
    rng = np.random.default_rng(0)
    return [{"x": rng.random(shape, dtype=np.float32)} for shape in shapes]


def test_run_requests_makes_one_run_when_shapes_agree() -> None:
    engine = CountingEngine()
    requests = feeds_from((1, 3), (2, 3), (1, 3))
    answers = run_requests(engine, requests, batched=True)
    assert engine.runs == [(4, 3)]
    for feeds, answer in zip(requests, answers, strict=True):
        assert isinstance(answer, dict)
        np.testing.assert_array_equal(answer["y"], 2 * feeds["x"])


def test_run_requests_groups_by_shape_when_shapes_differ() -> None:
    engine = CountingEngine()
    requests = feeds_from((1, 3), (1, 4), (2, 3))
    answers = run_requests(engine, requests, batched=True)
    assert sorted(engine.runs) == [(1, 4), (3, 3)]
    for feeds, answer in zip(requests, answers, strict=True):
        assert isinstance(answer, dict)
        np.testing.assert_array_equal(answer["y"], 2 * feeds["x"])


def test_run_requests_runs_each_alone_when_not_batched() -> None:
    engine = CountingEngine()
    run_requests(engine, feeds_from((1, 3), (1, 3)), batched=False)
    assert engine.runs == [(1, 3), (1, 3)]


def test_run_requests_fails_one_alone_when_it_breaks_the_batch() -> None:
    engine = CountingEngine(fail_above=5)
    requests = feeds_from((1, 3), (1, 3), (1, 3))
    requests[1]["x"][:] = 9
    answers = run_requests(engine, requests, batched=True)
    assert isinstance(answers[1], ModelError)
    for index in (0, 2):
        answer = answers[index]
        assert isinstance(answer, dict)
        np.testing.assert_array_equal(answer["y"], 2 * requests[index]["x"])


def test_run_requests_runs_alone_when_inputs_of_one_request_disagree_on_the_batch() -> None:
    engine = CountingEngine()
    odd = {"x": np.ones((2, 3), np.float32), "z": np.ones((1, 3), np.float32)}
    run_requests(engine, [odd, odd], batched=True)
    assert engine.runs == [(2, 3), (2, 3)]


def test_complete_config_follows_the_native_backend_when_the_config_is_empty() -> None:
    completion = complete_config({}, CountingEngine())
    assert completion.max_batch_size == 4
    assert completion.dynamic_batching
    assert completion.inputs == ({"name": "x", "data_type": "TYPE_FP32", "dims": [-1]},)
    assert completion.outputs == ({"name": "y", "data_type": "TYPE_FP16", "dims": [2, -1]},)


def test_complete_config_keeps_what_the_config_says_when_it_says_it() -> None:
    config = {
        "max_batch_size": 7,
        "dynamic_batching": {},
        "input": [{"name": "x", "data_type": "TYPE_FP32", "dims": [-1]}],
    }
    completion = complete_config(config, CountingEngine())
    assert completion.max_batch_size == 7
    assert not completion.dynamic_batching
    assert completion.inputs == ()
    assert len(completion.outputs) == 1


def test_complete_config_does_not_batch_when_the_first_axis_is_fixed_or_listed() -> None:
    fixed = complete_config({}, CountingEngine(first_axis=1))
    assert (fixed.max_batch_size, fixed.dynamic_batching) == (0, False)
    assert fixed.inputs[0]["dims"] == [1, -1]
    listed = {"input": [{"name": "x", "data_type": "TYPE_FP32", "dims": [-1, -1]}]}
    assert complete_config(listed, CountingEngine()).max_batch_size == 0


def test_complete_config_raises_when_config_and_graph_contradict() -> None:
    with pytest.raises(ModelError, match="max_batch_size is 8, but tensor x is float32"):
        complete_config({"max_batch_size": 8}, CountingEngine(first_axis=1))
    with pytest.raises(ModelError, match="lists a tensor q that the graph does not have"):
        complete_config({"input": [{"name": "q", "dims": [1]}]}, CountingEngine())


def test_check_config_raises_when_only_some_tensors_are_listed() -> None:
    x = {"name": "x", "data_type": "TYPE_FP32", "dims": [-1]}
    y = {"name": "y", "data_type": "TYPE_FP16", "dims": [2, -1]}
    whole = {"max_batch_size": 2, "input": [x], "output": [y]}
    check_config(whole, CountingEngine())
    assert is_complete(whole)
    assert not is_complete({"max_batch_size": 2, "input": [x]})
    with pytest.raises(ModelError, match="lists tensors but not y"):
        check_config({"max_batch_size": 2, "input": [x]}, CountingEngine())


def test_options_from_config_speak_the_native_backends_words_when_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CLOSEUP_THREADS", "5")
    plain = options_from_config({})
    assert (plain.threads, plain.keep_memory, plain.graph_optimization) == (5, True, "all")
    assert not plain.use_cuda
    parameters = {
        "intra_op_thread_count": {"string_value": "3"},
        "memory.enable_memory_arena_shrinkage": {"string_value": "cpu:0"},
    }
    config = {"parameters": parameters, "optimization": {"graph": {"level": 1}}}
    full = options_from_config(config, use_cuda=True, device_id=2)
    assert (full.threads, full.keep_memory, full.graph_optimization) == (3, False, "extended")
    assert (full.use_cuda, full.device_id) == (True, 2)
    with pytest.raises(ModelError, match="intra_op_thread_count is '-2'"):
        options_from_config({"parameters": {"intra_op_thread_count": {"string_value": "-2"}}})


@pytest.mark.parametrize(
    ("device", "on_gpu", "wanted"),
    [("auto", True, True), ("auto", False, False), ("cuda", False, True), ("cpu", True, False)],
)
def test_served_engine_takes_the_gpu_when_the_variable_or_triton_says_so(
    device: str, on_gpu: bool, wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLOSEUP_DEVICE", device)
    assert runs_on_cuda(on_gpu) is wanted


def test_triton_type_names_every_dtype_when_asked() -> None:
    dtypes = (np.float16, np.float32, np.float64, np.bool_, np.int64, np.uint8)
    names = [triton_type(np.dtype(dtype)) for dtype in dtypes]
    assert names == ["TYPE_FP16", "TYPE_FP32", "TYPE_FP64", "TYPE_BOOL", "TYPE_INT64", "TYPE_UINT8"]


def test_find_engine_raises_when_there_is_no_model_onnx(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"There is no model\.onnx in"):
        find_engine(tmp_path)


def test_run_requests_equals_single_runs_when_the_engine_is_real(tmp_path: Path) -> None:
    save_double(tmp_path / "double.onnx")
    save_lookup(tmp_path / "lookup.onnx")
    lookup = open_engine(tmp_path / "lookup.onnx")
    requests: list[dict[str, Array]] = [{"x": np.array([[i]])} for i in (0, 9, 4)]
    answers = run_requests(lookup, requests, batched=True)
    assert isinstance(answers[1], ModelError)
    assert [float(a["y"].item()) for a in answers if isinstance(a, dict)] == [10, 14]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    repository = make_repository(tmp_path_factory.mktemp("backend"))
    options = ServerOptions(
        repository=repository, http_port=0, grpc_port=0, metrics_port=0, exit_timeout_s=5
    )
    with EmbeddedServer(options) as server:
        yield grpcclient.InferenceServerClient(server.grpc_url)


def infer_together(client: Any, model: str, values: list[Array]) -> list[Any]:
    """Send all at once; each answer is an array or the exception."""
    answers: list[Any] = [None] * len(values)

    def infer(index: int) -> None:
        try:
            answers[index] = client.infer(model, [make_input("x", values[index])]).as_numpy("y")
        except InferenceServerException as error:
            answers[index] = error

    threads = [threading.Thread(target=infer, args=(i,)) for i in range(len(values))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


def count_inferences(client: Any, model: str) -> tuple[int, int]:
    stats = client.get_inference_statistics(model).model_stats[0]
    return stats.inference_count, stats.execution_count


@pytest.mark.triton
def test_backend_completes_the_config_when_it_is_one_line(client: Any) -> None:
    config = client.get_model_config("double").config
    assert config.max_batch_size == 4
    assert config.HasField("dynamic_batching")
    assert [(i.name, i.data_type, list(i.dims)) for i in config.input] == [("x", 11, [3])]
    assert [(o.name, o.data_type, list(o.dims)) for o in config.output] == [("y", 11, [3])]


@pytest.mark.triton
def test_backend_answers_eight_in_fewer_executions_when_they_come_together(client: Any) -> None:
    before = count_inferences(client, "lookup")
    answers = infer_together(client, "lookup", [np.array([[i % 5]]) for i in range(8)])
    inferences, executions = np.subtract(count_inferences(client, "lookup"), before)
    assert [answer.item() for answer in answers] == [10 + i % 5 for i in range(8)]
    # The queue waits 0.2 s for a full batch of 8; a slow machine may need a second one.
    assert inferences == 8
    assert executions <= 2


@pytest.mark.triton
def test_backend_fails_one_alone_when_it_breaks_its_batch(client: Any) -> None:
    before = count_inferences(client, "lookup")
    answers = infer_together(client, "lookup", [np.array([[i]]) for i in (0, 1, 99, 3)])
    executions = count_inferences(client, "lookup")[1] - before[1]
    assert isinstance(answers[2], InferenceServerException)
    assert answers[2].status() == "StatusCode.INTERNAL"
    assert "lookup: the run failed" in answers[2].message()
    assert [answers[i].item() for i in (0, 1, 3)] == [10, 11, 13]
    assert executions <= 2


@pytest.mark.triton
def test_backend_refuses_one_and_serves_mates_when_its_shape_is_wrong(client: Any) -> None:
    good = np.ones((1, 3), np.float32)
    answers = infer_together(client, "double", [good, np.ones((1, 4), np.float32), good])
    assert isinstance(answers[1], InferenceServerException)
    assert "[-1,3]" in answers[1].message()
    np.testing.assert_array_equal(answers[0], 2 * good)
    np.testing.assert_array_equal(answers[2], 2 * good)
