"""Step-level batching: sharing, isolation, fairness, failure."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from closeup.batching import SegmentResult, StepBatcher
from closeup.errors import ModelError, UnavailableError
from closeup.feeds import Segment
from tests.numpy_engine import run_numpy_engine

Array = npt.NDArray[Any]

# Every operation of the toy engine is elementwise per row except the einsum over five columns,
# whose order of summation does not depend on the batch: equal to the last bit or nearly.
TOLERANCE = 1e-6


def assert_same(actual: Array, expected: Array) -> None:
    np.testing.assert_allclose(actual, expected, rtol=TOLERANCE, atol=TOLERANCE)


class TwoLoras:
    """A bank of three rows: none, a mild adapter, one that overflows."""

    def __init__(self) -> None:
        self.bank = np.zeros((3, 4, 2), np.float32)
        self.bank[1] = 0.01
        self.bank[2] = 3e38

    def array(self, rows: Sequence[int]) -> Array:
        return self.bank


class GatedEngine:
    """The toy engine, held back until `gate` opens; remembers its batches."""

    def __init__(self, *, open_at_once: bool = True) -> None:
        self.gate = threading.Event()
        self.batches: list[int] = []
        self.starts: list[float] = []
        self.fail_above: int | None = None
        if open_at_once:
            self.gate.set()

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        self.gate.wait(5)
        self.batches.append(len(feeds["sample"]))
        if self.fail_above is not None and len(feeds["sample"]) > self.fail_above:
            raise RuntimeError("out of memory")
        time.sleep(0.005)
        return run_numpy_engine(feeds)


@contextmanager
def batcher(engine: GatedEngine, max_batch: int = 8) -> Iterator[StepBatcher]:
    made = StepBatcher(engine.run, max_batch=max_batch, loras=TwoLoras())
    try:
        yield made
    finally:
        engine.gate.set()
        made.close()


def segment(seed: int, *, steps: int = 4, rows: int = 2, side: int = 4, lora_row: int = 0,
            masked: bool = False) -> Segment:  # fmt: skip
    r = np.random.default_rng(seed)

    def normal(*shape: int) -> Array:
        return r.normal(size=shape).astype(np.float32)

    inpainting: dict[str, Any] = {}
    if masked:
        inpainting = {
            "mask": r.random((steps, 1, side, side), np.float32),
            "known": normal(3, side, side),
            "known_noise": normal(3, side, side),
            "known_step": normal(steps, 2),
        }
    return Segment(
        sample=normal(3, side, side),
        memory=normal(2, 3, side, side),
        context=normal(rows, 5, 6),
        guidance=float(r.uniform(1, 9)),
        timestep=r.uniform(0, 999, steps).astype(np.float32),
        input_scale=r.uniform(0.2, 1, steps).astype(np.float32),
        step=0.4 * normal(steps, 3, 5),
        noise=normal(steps, 3, side, side) if seed % 2 else None,
        lora_row=lora_row,
        **inpainting,
    )


def alone(one: Segment) -> SegmentResult:
    engine = GatedEngine()
    with batcher(engine) as made:
        return made.submit(one).result(10)


def by_hand(one: Segment) -> tuple[Array, Array]:
    """The segment worked step by step without the batcher or its feeds."""
    sample, memory = one.sample, one.memory
    for k in range(len(one.timestep)):
        noise = np.zeros_like(sample) if one.noise is None else one.noise[k]
        feeds = {
            "sample": sample[None], "memory": memory[None], "noise": noise[None],
            "known": np.zeros_like(sample)[None] if one.known is None else one.known[None],
            "known_noise": np.zeros_like(sample)[None] if one.known_noise is None
            else one.known_noise[None],
            "mask": np.ones((1, 1, *sample.shape[1:])) if one.mask is None else one.mask[k][None],
            "rows": np.zeros(len(one.context), np.int64),
            "timestep": np.full(len(one.context), one.timestep[k]),
            "context": one.context,
            "pick": np.array([[1, 0]] if len(one.context) == 2 else [[0, 0]]),
            "guidance": np.array([[one.guidance, 1 - one.guidance]] if len(one.context) == 2
                                 else [[1.0, 0.0]], np.float32),
            "input_scale": one.input_scale[k : k + 1],
            "step": one.step[k][None],
            "known_step": np.zeros((1, 2)) if one.known_step is None else one.known_step[k][None],
            "lora": TwoLoras().bank,
            "lora_row": np.full(len(one.context), one.lora_row),
        }  # fmt: skip
        out = run_numpy_engine(feeds)
        sample, memory = out["next_sample"][0], out["next_memory"][0]
    return sample, memory


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("rows", [1, 2])
def test_segment_equals_its_steps_worked_by_hand(rows: int, masked: bool) -> None:
    one = segment(3, rows=rows, masked=masked)
    result = alone(one)
    sample, memory = by_hand(one)
    assert_same(result.sample, sample)
    assert_same(result.memory, memory)
    assert np.abs(sample).max() > 0.01  # the comparison is not between zeros
    short = by_hand(segment(3, rows=rows, masked=masked, steps=3))[0]
    assert not np.allclose(
        result.sample, short, rtol=TOLERANCE, atol=TOLERANCE
    )  # one step too few is noticed


def test_sequences_share_calls_and_keep_their_results_when_they_arrive_at_different_times() -> None:
    segments = [segment(seed, steps=6, rows=1 + seed % 2, masked=seed == 2) for seed in range(4)]
    engine = GatedEngine()
    with batcher(engine) as made:
        futures = []
        for one in segments:
            futures.append(made.submit(one))
            time.sleep(0.008)  # later than the tick before it began
        results = [future.result(10) for future in futures]
        counters = made.counters
    assert counters.sequence_steps == 24
    assert counters.engine_calls < 24
    assert counters.largest_batch >= 2
    for one, result in zip(segments, results, strict=True):
        assert_same(result.sample, alone(one).sample)


def test_mates_are_unchanged_when_a_lora_drives_one_sequence_to_nan() -> None:
    healthy, sick = segment(1, lora_row=1), segment(5, lora_row=2)
    engine = GatedEngine(open_at_once=False)
    with batcher(engine) as made:
        futures = [made.submit(one) for one in (sick, healthy)]
        engine.gate.set()
        with pytest.raises(ModelError, match="no longer finite after step 1"):
            futures[0].result(10)
        result = futures[1].result(10)
        assert made.counters.failed_sequences == 1
    assert 2 in engine.batches  # they did share a call
    np.testing.assert_array_equal(result.sample, alone(healthy).sample)


def test_newcomer_steps_within_two_ticks_when_the_batch_is_full() -> None:
    engine = GatedEngine()
    with batcher(engine, max_batch=2) as made:
        busy = [made.submit(segment(seed, steps=30)) for seed in range(4)]
        while made.counters.engine_calls < 5:
            time.sleep(0.001)
        before = made.counters.engine_calls
        made.submit(segment(9, steps=1)).result(10)
        assert made.counters.engine_calls - before <= 3  # two whole ticks and the one under way
        for future in busy:
            future.result(10)


def test_groups_take_turns_when_shapes_differ() -> None:
    engine = GatedEngine()
    with batcher(engine) as made:
        long = made.submit(segment(1, steps=60, side=4))
        short = made.submit(segment(2, steps=3, side=8))
        short.result(10)
        assert not long.done()
        long.result(10)
    assert set(engine.batches) == {1}


def test_no_group_is_kept_out_when_others_come_back_after_every_step() -> None:
    engine = GatedEngine(open_at_once=False)
    sides: list[int] = []
    run = engine.run

    def remember(feeds: Mapping[str, Array]) -> dict[str, Array]:
        sides.append(feeds["sample"].shape[-1])
        return run(feeds)

    engine.run = remember  # type: ignore[method-assign]
    with batcher(engine) as made:
        patient = made.submit(segment(1, steps=40, side=4))

        def come_back(side: int) -> None:
            while not patient.done():
                again = replace(segment(2, steps=1, side=side), is_first=False)
                made.submit(again).result(10)

        others = [threading.Thread(target=come_back, args=(side,)) for side in (8, 12)]
        for thread in others:
            thread.start()
        engine.gate.set()
        patient.result(10)
        for thread in others:
            thread.join(10)
    middle = sides[10:60]
    # A third of the turns is its own; a turn or two goes by while the others submit again.
    assert middle.count(4) >= 15
    assert middle.count(8) >= 10
    assert middle.count(12) >= 10


def test_each_sequence_runs_alone_when_the_shared_call_fails() -> None:
    engine = GatedEngine(open_at_once=False)
    engine.fail_above = 1
    with batcher(engine) as made:
        futures = [made.submit(segment(seed)) for seed in range(3)]
        engine.gate.set()
        for seed, future in enumerate(futures):
            assert_same(future.result(10).sample, alone(segment(seed)).sample)


def test_submit_is_refused_when_closed() -> None:
    engine = GatedEngine()
    with batcher(engine) as made:
        pass
    with pytest.raises(UnavailableError, match="shutting down"):
        made.submit(segment(1))


def test_sequence_leaves_when_its_future_is_cancelled() -> None:
    engine = GatedEngine()
    with batcher(engine) as made:
        doomed = made.submit(segment(1, steps=10_000))
        other = made.submit(segment(2, steps=20))
        assert doomed.cancel()
        other.result(10)
        calls = made.counters.engine_calls
        time.sleep(0.05)
        assert made.counters.engine_calls == calls


def test_segment_ends_with_the_step_under_way_when_its_time_is_up() -> None:
    one = segment(3, steps=40, masked=True)
    rest = one
    done = 0
    with batcher(GatedEngine()) as made:
        while done < 40:
            result = made.submit(replace(rest, budget_s=0.03)).result(10)
            assert 1 <= result.steps <= 8  # a step takes 5 ms and more
            done += result.steps
            rest = from_step(one, done, result)
    assert_same(result.sample, alone(one).sample)
    assert_same(result.memory, alone(one).memory)


def test_segment_does_one_step_when_it_has_no_time_at_all() -> None:
    one = segment(3, steps=4)
    with batcher(GatedEngine()) as made:
        result = made.submit(replace(one, budget_s=0.0)).result(10)
    assert result.steps == 1
    assert_same(result.sample, by_hand(segment_start(one, 1))[0])


def test_segment_does_all_its_steps_when_there_is_time() -> None:
    one = segment(3, steps=4)
    assert alone(one).steps == 4
    assert alone(replace(one, budget_s=60.0)).steps == 4


def from_step(one: Segment, first: int, state: SegmentResult) -> Segment:
    """The rest of a segment, from the state after its first steps."""
    return replace(
        segment_start(one, len(one.timestep), first), sample=state.sample, memory=state.memory
    )


def segment_start(one: Segment, stop: int, first: int = 0) -> Segment:
    """The steps from `first` to `stop` of a segment."""
    by_step = ("timestep", "input_scale", "step", "noise", "mask", "known_step")
    cut = {
        name: getattr(one, name)[first:stop] for name in by_step if getattr(one, name) is not None
    }
    return replace(one, **cut)


def test_plain_engine_runs_calls_in_which_nobody_uses_a_lora() -> None:
    engine = GatedEngine()
    plain_calls: list[set[str]] = []

    def run_plain(feeds: Mapping[str, Array]) -> dict[str, Array]:
        plain_calls.append(set(feeds))
        rows = len(feeds["rows"])
        bank: dict[str, Array] = {
            "lora": TwoLoras().bank, "lora_row": np.zeros(rows, np.int64)
        }  # fmt: skip
        return run_numpy_engine({**feeds, **bank})

    made = StepBatcher(engine.run, max_batch=4, loras=TwoLoras(), run_plain=run_plain)
    try:
        without = made.submit(segment(1)).result(10)
        assert len(plain_calls) == 4
        assert not plain_calls[0] & {"lora", "lora_row"}
        assert engine.batches == []
        assert_same(without.sample, alone(segment(1)).sample)
        made.submit(segment(2, lora_row=1)).result(10)
        assert engine.batches == [1] * 4
    finally:
        made.close()
