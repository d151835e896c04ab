"""Plans behind the engine interface, over a fake TensorRT and a fake GPU."""

from __future__ import annotations

import dataclasses
import gc
from pathlib import Path

import numpy as np
import pytest

from closeup import plan_buckets
from closeup.array_content import declare_versions, find_pieces
from closeup.cuda_device import Buffer
from closeup.engines import Array, count_cuda_graphs, open_engine
from closeup.errors import ModelError
from closeup.plan_engine import PlanEngine, describe_plan, warn_of_other_gpu
from closeup.plans import PlanTensor, ShapeRange, record_json, record_path
from tests.fake_tensorrt import WORKSPACE_BYTES, FakeDevice, open_toy, toy_record, write_plan


@pytest.fixture
def device() -> FakeDevice:
    return FakeDevice()


@pytest.fixture
def engine(tmp_path: Path, device: FakeDevice) -> PlanEngine:
    return open_toy(write_plan(tmp_path), device)


def make_feeds(rows: int = 2, width: int = 4, start: float = 1.0) -> dict[str, Array]:
    x = np.arange(rows * width, dtype=np.float32).reshape(rows, width) + np.float32(start)
    bank = np.arange(4 * width, dtype=np.float32).reshape(4, width) * 100
    return {"x": x, "bank": bank, "row": np.arange(rows, dtype=np.int64) % 4}


def expected(feeds: dict[str, Array]) -> Array:
    y: Array = feeds["x"] + feeds["bank"][feeds["row"]]
    return y


def test_run_computes_anew_each_time_when_arrays_are_changed_in_place(engine: PlanEngine) -> None:
    feeds = make_feeds()
    for call in range(4):  # the third and fourth by the graph
        feeds["x"] += 1
        feeds["bank"] *= 2
        outputs = engine.run(feeds)
        np.testing.assert_array_equal(outputs["y"], expected(feeds))
        np.testing.assert_array_equal(outputs["twice"], 2 * feeds["x"])
        assert engine.counters.graph_launches == max(0, call)


def test_run_keeps_answers_of_earlier_calls_when_buffers_are_reused(engine: PlanEngine) -> None:
    first_feeds = make_feeds()
    first = engine.run(first_feeds)["y"]
    engine.run(make_feeds(start=50))
    np.testing.assert_array_equal(first, expected(first_feeds))


def test_run_takes_no_new_memory_when_shapes_repeat(engine: PlanEngine, device: FakeDevice) -> None:
    engine.run(make_feeds())
    blocks = dict(device.blocks)
    assert len(blocks) == 6  # three inputs, two outputs, the workspace
    engine.run(make_feeds(start=9))
    engine.run(make_feeds(rows=1))  # smaller: fits what is there
    assert device.blocks.keys() == blocks.keys()


def test_contexts_are_bounded_and_the_least_recent_goes_when_shapes_vary(
    engine: PlanEngine, device: FakeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_buckets, "CONTEXTS", 2)
    for rows in (3, 2, 3, 2):  # the largest first, so that no address changes
        engine.run(make_feeds(rows=rows))
    assert engine.counters.contexts_made == 2
    assert len(device.graphs) == 2
    engine.run(make_feeds(rows=1))  # 3 was used before 2
    assert engine.counters.contexts_made == 3
    assert len(device.graphs) == 1
    launches = engine.counters.graph_launches
    engine.run(make_feeds(rows=2))
    assert engine.counters.graph_launches == launches + 1
    feeds = make_feeds(rows=3)
    np.testing.assert_array_equal(engine.run(feeds)["y"], expected(feeds))
    assert engine.counters.contexts_made == 4


@pytest.mark.parametrize("graphs", [0, 2])
def test_no_context_is_made_again_when_there_are_more_shapes_than_graphs(
    tmp_path: Path, device: FakeDevice, graphs: int
) -> None:
    engine = open_toy(write_plan(tmp_path), device, cuda_graphs=graphs)
    for _ in range(4):
        for rows in (5, 4, 3, 1):
            feeds = make_feeds(rows=rows)
            np.testing.assert_array_equal(engine.run(feeds)["y"], expected(feeds))
    assert engine.counters.contexts_made == 4
    assert len(device.graphs) == graphs
    assert engine.counters.graph_launches == graphs * 3  # the first graphs stay while they serve


def test_graph_goes_to_other_shapes_when_it_was_idle_for_long(
    engine: PlanEngine, device: FakeDevice
) -> None:
    for rows in (5, 4, 5, 4):  # both graphs
        engine.run(make_feeds(rows=rows))
    first = set(device.graphs)
    for _ in range(plan_buckets.IDLE_CALLS - 1):  # with the call in between
        engine.run(make_feeds(rows=1))
    assert set(device.graphs) == first
    engine.run(make_feeds(rows=1))
    assert len(set(device.graphs) & first) == 1
    assert len(device.graphs) == 2
    feeds = make_feeds(rows=5)
    np.testing.assert_array_equal(engine.run(feeds)["y"], expected(feeds))


def test_nothing_is_captured_before_a_run_has_succeeded(
    engine: PlanEngine, device: FakeDevice
) -> None:
    device.can_run = False
    for _ in range(2):
        with pytest.raises(ModelError, match="a run in TensorRT failed: a kernel is missing"):
            engine.run(make_feeds())
    assert device.graphs == {}
    assert device.unfinished == 0  # nothing still reads the arrays of a call that failed
    device.can_run = True
    for launches in (0, 1, 2):
        engine.run(make_feeds())
        assert engine.counters.graph_launches == launches


def test_graph_is_captured_again_when_a_buffer_grows(
    engine: PlanEngine, device: FakeDevice
) -> None:
    small, large = make_feeds(rows=2), make_feeds(rows=8, width=64)
    for feeds in (small, small, large, small, small, small):
        np.testing.assert_array_equal(engine.run(feeds)["y"], expected(feeds))
    # small: plain, graph; large: plain; small again: plain, graph, graph.
    assert engine.counters.graph_launches == 3
    assert len(device.graphs) == 1


@pytest.mark.parametrize(("graphs", "can_capture"), [(0, True), (2, False)])
def test_run_goes_without_a_graph_when_none_is_wanted_or_none_can_be(
    tmp_path: Path, device: FakeDevice, graphs: int, can_capture: bool
) -> None:
    device.can_capture = can_capture
    engine = open_toy(write_plan(tmp_path), device, cuda_graphs=graphs)
    for start in range(4):
        feeds = make_feeds(start=start)
        np.testing.assert_array_equal(engine.run(feeds)["y"], expected(feeds))
    assert (engine.counters.graph_launches, device.graphs) == (0, {})
    assert engine.counters.contexts_made == 1


def test_failure_has_its_own_reason_when_a_capture_had_failed_before(
    engine: PlanEngine, device: FakeDevice
) -> None:
    device.can_capture = False
    for _ in range(3):
        engine.run(make_feeds())
    device.can_run = False
    with pytest.raises(ModelError, match="a run in TensorRT failed: a kernel is missing"):
        engine.run(make_feeds())
    device.can_run = True
    np.testing.assert_array_equal(engine.run(make_feeds())["y"], expected(make_feeds()))


def test_narrowest_profile_is_taken_when_several_fit(tmp_path: Path, device: FakeDevice) -> None:
    engine = open_toy(write_plan(tmp_path), device)
    engine.run(make_feeds(rows=2, width=4))
    engine.run(make_feeds(rows=2, width=3))
    assert device.profiles == [0, 1]


def test_workspace_of_the_hungriest_profile_is_taken_when_the_plan_is_opened(
    tmp_path: Path, device: FakeDevice
) -> None:
    workspace = Buffer(device)
    engine = open_toy(write_plan(tmp_path), device, workspace=workspace)
    before = (workspace.address, workspace.size_bytes)
    assert before[1] == max(WORKSPACE_BYTES)
    for width in (4, 3, 4):  # the narrow profile needs all of it, the wide one less
        engine.run(make_feeds(width=width))
    assert (workspace.address, workspace.size_bytes) == before


def test_opening_names_the_options_when_the_gpu_has_not_the_memory(
    tmp_path: Path, device: FakeDevice
) -> None:
    device.free_bytes = max(WORKSPACE_BYTES) - 1
    path = write_plan(tmp_path)
    with pytest.raises(ModelError) as caught:
        open_toy(path, device)
    assert str(caught.value) == (
        f"{path} needs 1 MB of the GPU for the largest call that it takes, beside what is there: "
        "CUDA: cudaMalloc failed with error 2, out of memory. Lower --max-batch or --sizes and "
        "build it again: python -m export --target tensorrt --name toy"
    )
    assert device.blocks == {}


def test_engines_share_one_workspace_when_they_are_of_one_process(
    tmp_path: Path, device: FakeDevice
) -> None:
    workspace = Buffer(device)
    one = open_toy(write_plan(tmp_path / "one"), device, workspace=workspace)
    wide, narrow = make_feeds(width=4), make_feeds(width=3)
    one.run(wide)
    one.run(wide)
    before = workspace.address
    # Another engine that needs more: the address changes under the first's graph.
    workspace.reserve(2 * max(WORKSPACE_BYTES))
    other = open_toy(write_plan(tmp_path / "other"), device, workspace=workspace)
    assert workspace.address != before
    np.testing.assert_array_equal(one.run(wide)["y"], expected(wide))
    np.testing.assert_array_equal(other.run(narrow)["y"], expected(narrow))
    assert len(device.blocks) == 11  # five buffers each and the workspace


def test_outputs_are_copied_within_the_device_when_they_are_fed_back(
    engine: PlanEngine, device: FakeDevice
) -> None:
    feeds = make_feeds()
    state = engine.run(feeds)["twice"]
    for step in range(2, 5):
        del device.uploads[:], device.copies[:]
        # As the step batcher does with one sequence: rows of the answer, joined again.
        state = engine.run({**feeds, "x": state[0:2][None][0]})["twice"]
        assert device.copies == [state.nbytes]
        assert state.nbytes not in device.uploads
        np.testing.assert_array_equal(state, 2**step * feeds["x"])


def test_part_of_an_output_is_copied_from_its_place_when_fed_back(
    engine: PlanEngine, device: FakeDevice
) -> None:
    feeds = make_feeds()
    answer = engine.run(feeds)["twice"]
    one = {**make_feeds(rows=1), "x": answer[1:2]}
    np.testing.assert_array_equal(engine.run(one)["twice"], 4 * feeds["x"][1:2])
    assert device.copies == [answer.nbytes // 2]


def test_older_output_comes_from_the_host_when_the_device_has_moved_on(
    engine: PlanEngine, device: FakeDevice
) -> None:
    feeds = make_feeds()
    old = engine.run(feeds)["twice"]
    engine.run(make_feeds(start=30))
    np.testing.assert_array_equal(engine.run({**feeds, "x": old})["twice"], 2 * old)
    assert device.copies == []


def test_outputs_are_read_only_so_that_nobody_changes_what_is_on_the_device(
    engine: PlanEngine,
) -> None:
    answer = engine.run(make_feeds())["y"]
    with pytest.raises(ValueError, match="read-only"):
        answer[0, 0] = 1


def test_read_only_inputs_are_copied_once_when_they_repeat(
    engine: PlanEngine, device: FakeDevice
) -> None:
    feeds = make_feeds()
    feeds["bank"].setflags(write=False)
    engine.run(feeds)
    del device.uploads[:]
    engine.run({**feeds, "bank": feeds["bank"][:]})  # a view of the same
    assert device.uploads == [feeds["x"].nbytes, feeds["row"].nbytes]
    other = make_feeds(start=3)
    other["bank"] = feeds["bank"] + 1
    other["bank"].setflags(write=False)
    np.testing.assert_array_equal(engine.run(other)["y"], expected(other))


def test_input_is_copied_again_when_its_memory_went_to_another_array(
    engine: PlanEngine,
) -> None:
    for start in range(20):
        feeds = make_feeds()
        feeds["bank"] = feeds["bank"] * 0 + start
        feeds["bank"].setflags(write=False)
        np.testing.assert_array_equal(engine.run(feeds)["y"], expected(feeds))
        del feeds
        gc.collect()  # the next array is likely to lie where this one lay


def test_only_changed_rows_are_copied_when_an_array_has_versions(
    engine: PlanEngine, device: FakeDevice
) -> None:
    feeds = make_feeds()
    bank = feeds["bank"] = feeds["bank"].copy()
    declare_versions(bank, [0, 0, 0, 0])
    engine.run(feeds)
    bank[1] += 5
    declare_versions(bank, [0, 1, 0, 0])
    del device.uploads[:]
    np.testing.assert_array_equal(engine.run(feeds)["y"], expected(feeds))
    assert device.uploads == [feeds["x"].nbytes, bank[1].nbytes, feeds["row"].nbytes]


def test_declare_versions_refuses_a_view_and_a_wrong_count() -> None:
    array = np.zeros((4, 2))
    with pytest.raises(ValueError, match="entries of an array that owns its memory"):
        declare_versions(array[:2], [0, 0])
    with pytest.raises(ValueError, match="entries of an array that owns its memory"):
        declare_versions(array, [0, 0])
    declare_versions(array, [3, 4, 5, 6])
    assert [piece.version for piece in find_pieces(array)] == [3, 4, 5, 6]
    assert find_pieces(array[1:])[0].owner is None  # a part is not known


def test_run_names_the_input_and_the_command_when_no_profile_takes_it(
    engine: PlanEngine,
) -> None:
    with pytest.raises(ModelError) as caught:
        engine.run(make_feeds(rows=9))
    assert str(caught.value) == (
        "toy: input x is (9, 4), which the plan was not built for (its profile any takes (1, 1) to "
        "(8, 64)); ask for another size or batch, or build it with those: python -m export "
        "--target tensorrt --name toy"
    )
    with pytest.raises(ModelError, match="toy: input row is missing"):
        engine.run({name: array for name, array in make_feeds().items() if name != "row"})
    feeds = make_feeds()
    np.testing.assert_array_equal(engine.run(feeds)["y"], expected(feeds))  # stays usable


def test_run_says_that_inputs_do_not_go_together_when_each_fits_alone(
    tmp_path: Path, device: FakeDevice
) -> None:
    path = write_plan(tmp_path)
    wide, narrow = toy_record().profiles
    # One profile takes one row alone, the other two rows alone.
    one = ShapeRange(min=(1,), opt=(1,), max=(1,))
    single = dataclasses.replace(wide, shapes={**wide.shapes, "row": one})
    changed = dataclasses.replace(toy_record(), profiles=(single, narrow))
    record_path(path).write_text(record_json(changed), encoding="utf-8")
    with pytest.raises(ModelError, match=r"no profile of the plan \(any, 2x3\) takes the inputs"):
        open_toy(path, device).run(make_feeds(rows=2, width=4))


def test_close_gives_everything_back_and_refuses_runs(
    engine: PlanEngine, device: FakeDevice
) -> None:
    for _ in range(3):
        engine.run(make_feeds())
    engine.close()
    engine.close()
    assert len(device.blocks) == 1  # the workspace, which is the process's
    assert device.graphs == {}
    with pytest.raises(ModelError, match="toy: the engine is closed"):
        engine.run(make_feeds())


def test_open_explains_when_tensorrt_refuses_the_file(tmp_path: Path, device: FakeDevice) -> None:
    path = write_plan(tmp_path, b"another plan")
    with pytest.raises(ModelError, match="TensorRT cannot open .*model.plan: the file is damaged"):
        open_toy(path, device)


@pytest.mark.parametrize(
    ("name", "dtype", "shape_tensor", "wrong"),
    [
        ("x", "float16", "", "x"),
        ("other", "float32", "", "other"),
        ("x", "float32", "row", "row"),
    ],
)
def test_open_refuses_a_plan_whose_tensors_are_not_the_records(
    tmp_path: Path, device: FakeDevice, name: str, dtype: str, shape_tensor: str, wrong: str
) -> None:
    device.shape_tensor = shape_tensor
    path = write_plan(tmp_path)
    record = toy_record()
    first = PlanTensor(name=name, dtype=dtype, axes=("B", "w"))
    changed = dataclasses.replace(record, inputs=(first, *record.inputs[1:]))
    record_path(path).write_text(record_json(changed), encoding="utf-8")
    with pytest.raises(ModelError, match=f"the plan's tensor {wrong} is not what its record says"):
        open_toy(path, device)


def test_open_engine_says_one_sentence_when_tensorrt_is_not_here(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        open_engine(write_plan(tmp_path))
    text = str(caught.value)
    assert "TensorRT is not installed here" in text or "there is no GPU" in text
    assert "\n" not in text


def test_describe_plan_tells_the_tensors_without_opening_the_plan() -> None:
    record = toy_record()
    description = describe_plan(record)
    assert [spec.describe() for spec in description.inputs] == [
        "float32 (B, w)", "float32 (S, w)", "int64 (B)",
    ]  # fmt: skip
    odd = PlanTensor(name="x", dtype="float7", axes=())
    with pytest.raises(ModelError, match="tensor x is 'float7'; expected a numpy type"):
        describe_plan(dataclasses.replace(record, inputs=(odd,)))
    half = PlanTensor(name="x", dtype="bfloat16", axes=("B",))
    assert describe_plan(dataclasses.replace(record, inputs=(half,))).inputs[0].dtype.itemsize == 2


def test_count_cuda_graphs_refuses_what_is_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CLOSEUP_CUDA_GRAPHS", raising=False)
    assert count_cuda_graphs() == 8
    monkeypatch.setenv("CLOSEUP_CUDA_GRAPHS", "0")
    assert count_cuda_graphs() == 0
    monkeypatch.setenv("CLOSEUP_CUDA_GRAPHS", "many")
    with pytest.raises(ModelError, match="CLOSEUP_CUDA_GRAPHS is 'many'; expected an integer"):
        count_cuda_graphs()


@pytest.mark.parametrize(
    ("gpu", "built_on", "is_told"),
    [
        ("NVIDIA L4", "NVIDIA L40S", True),
        ("NVIDIA L4", "NVIDIA L4", False),
        ("NVIDIA L4", "", False),
    ],
)
def test_plan_of_another_gpu_is_told_of_when_it_runs_all_the_same(
    gpu: str, built_on: str, is_told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    record = dataclasses.replace(toy_record(), gpu=built_on)
    warn_of_other_gpu(Path("model.plan"), record, gpu)
    expected_text = "model.plan was built on NVIDIA L40S and runs on NVIDIA L4"
    assert (expected_text in caplog.text) is is_told
    assert bool(caplog.records) is is_told
