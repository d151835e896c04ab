"""What the step batcher's inputs cost on a GPU: which of them are copied at each step."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np

from closeup.batching import StepBatcher
from closeup.cuda_device import Buffer
from closeup.device_inputs import InputSlot, Produced
from closeup.engines import Array
from closeup.feeds import Segment
from tests.fake_tensorrt import FakeDevice

SHAPE = (4, 8, 8)
STEPS = 4


class ResidentEngine:
    """Brings its inputs to a fake GPU as a plan does, and answers with the latents plus one.

    Attributes:
        uploads: for each call, the bytes of each input that came from the host.
    """

    def __init__(self) -> None:
        self.device = FakeDevice()
        self.uploads: list[dict[str, int]] = []
        self._slots: dict[str, InputSlot] = {}
        self._results = {name: Buffer(self.device) for name in ("next_sample", "next_memory")}
        self._produced: list[Produced] = []

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        call = {}
        for name, array in feeds.items():
            slot = self._slots.setdefault(name, InputSlot(self.device))
            call[name] = slot.fill(array, self._produced)
        self.uploads.append(call)
        self._produced = []
        outputs = {}
        for name, source in (("next_sample", "sample"), ("next_memory", "memory")):
            address = self._slots[source].buffer.address
            value = self.device.array(address, feeds[source].shape, "f4") + np.float32(1)
            result = self._results[name]
            result.reserve(value.nbytes)
            self.device.memory(result.address, value.nbytes)[:] = value.tobytes()
            value.setflags(write=False)
            outputs[name] = value
            self._produced.append(
                Produced(weakref.ref(value), value.ctypes.data, result.address, value.nbytes)
            )
        return outputs


def make_segment() -> Segment:
    """As the denoiser gets it from Triton: copies of its own, read-only."""
    arrays: dict[str, Any] = {
        "sample": np.zeros(SHAPE, np.float32),
        "memory": np.zeros((2, *SHAPE), np.float32),
        "context": np.ones((2, 5, 6), np.float32),
        "mask": np.ones((1, 1, *SHAPE[1:]), np.float32),
        "known": np.ones(SHAPE, np.float32),
        "known_noise": np.ones(SHAPE, np.float32),
        "noise": np.ones((STEPS, *SHAPE), np.float32),
        "timestep": np.ones(STEPS, np.float32),
        "input_scale": np.ones(STEPS, np.float32),
        "step": np.ones((STEPS, 3, 5), np.float32),
        "known_step": np.ones((STEPS, 2), np.float32),
    }
    for array in arrays.values():
        array.setflags(write=False)
    return Segment(guidance=2.0, **arrays)


def test_lone_sequence_stays_on_the_gpu_when_steps_follow_each_other() -> None:
    engine = ResidentEngine()
    batcher = StepBatcher(engine.run, max_batch=4)
    try:
        result = batcher.submit(make_segment()).result(timeout=20)
    finally:
        batcher.close()
    # Through the device at each step: a copy that went wrong would show here.
    np.testing.assert_array_equal(result.sample, np.full(SHAPE, STEPS, np.float32))
    np.testing.assert_array_equal(result.memory, np.full((2, *SHAPE), STEPS, np.float32))
    first, *later = engine.uploads
    assert len(later) == STEPS - 1
    for name in ("sample", "memory", "context", "mask", "known", "known_noise"):
        assert first[name] > 0
        assert [call[name] for call in later] == [0] * len(later), name
    for call in later:  # a step's own noise must come
        assert call["noise"] == first["noise"] > 0
