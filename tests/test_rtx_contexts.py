"""TensorRT-RTX's own CUDA graphs and its cache of kernels, over a fake of it."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from closeup.engines import EngineOptions
from closeup.plan_engine import PlanEngine
from tests.fake_tensorrt import FakeContext, FakeDevice, FakeEngine, plan_parts, write_plan

FEEDS = {
    "x": np.ones((2, 4), np.float32),
    "bank": np.arange(16, dtype=np.float32).reshape(4, 4),
    "row": np.array([0, 3]),
}


class Kernels:
    """``IRuntimeCache``: a context that runs first compiles a kernel."""

    def __init__(self) -> None:
        self.content = b""

    def serialize(self) -> bytes:
        return self.content

    def deserialize(self, blob: bytes) -> bool:
        if blob.startswith(b"another GPU"):
            return False
        self.content = bytes(blob)
        return True


class RuntimeConfig:
    """``IRuntimeConfig``."""

    def __init__(self) -> None:
        self.memory = "static"
        self.cuda_graph_strategy = "none set"
        self.kernels: Kernels | None = None

    def create_runtime_cache(self) -> Kernels:
        return Kernels()

    def set_runtime_cache(self, kernels: Kernels) -> bool:
        self.kernels = kernels
        return True

    def set_execution_context_allocation_strategy(self, strategy: str) -> None:
        self.memory = strategy


class RtxEngine(FakeEngine):
    """An engine whose contexts are made of a config."""

    def __init__(self, device: FakeDevice) -> None:
        super().__init__(device)
        self.configs: list[RuntimeConfig] = []

    def create_runtime_config(self) -> RuntimeConfig:
        return RuntimeConfig()

    def create_execution_context(self, strategy: Any) -> FakeContext:
        assert isinstance(strategy, RuntimeConfig)
        assert strategy.kernels is not None
        strategy.kernels.content += b"kernel;"
        self.configs.append(strategy)
        return FakeContext(self._device)


def open_rtx(folder: Path, kernels: Path | None, graphs: int = 2) -> tuple[PlanEngine, RtxEngine]:
    device = FakeDevice()
    engine = RtxEngine(device)
    parts = plan_parts(device)
    parts.kernels = kernels
    parts.trt.CudaGraphStrategy = SimpleNamespace(WHOLE_GRAPH_CAPTURE="whole", DISABLED="disabled")
    parts.trt.Runtime = lambda logger: SimpleNamespace(deserialize_cuda_engine=lambda view: engine)
    options = EngineOptions(cuda_graphs=graphs)
    return PlanEngine(write_plan(folder), options, parts=parts), engine


@pytest.mark.parametrize(("graphs", "strategy"), [(2, "whole"), (0, "disabled")])
def test_rtx_captures_by_itself_and_nothing_is_captured_here(
    tmp_path: Path, graphs: int, strategy: str
) -> None:
    plan, engine = open_rtx(tmp_path, None, graphs)
    for _ in range(4):
        outputs = plan.run(FEEDS)
        np.testing.assert_array_equal(outputs["y"], FEEDS["x"] + FEEDS["bank"][FEEDS["row"]])
    (config,) = engine.configs
    assert (config.memory, config.cuda_graph_strategy) == ("user managed", strategy)
    assert plan.counters.graph_launches == 0
    plan.close()


def test_kernels_are_kept_for_the_next_process(tmp_path: Path) -> None:
    kernels = tmp_path / "cache" / "kernels"
    for content in (b"kernel;", b"kernel;kernel;"):
        plan, engine = open_rtx(tmp_path, kernels)
        plan.run(FEEDS)
        assert engine.configs[0].kernels is not None
        assert engine.configs[0].kernels.content == content
        plan.close()
        assert kernels.read_bytes() == content


def test_kernels_of_another_gpu_are_replaced(tmp_path: Path) -> None:
    kernels = tmp_path / "kernels"
    kernels.write_bytes(b"another GPU's")
    plan, _ = open_rtx(tmp_path, kernels)
    plan.run(FEEDS)
    plan.close()
    assert kernels.read_bytes() == b"kernel;"


def test_serving_goes_on_when_the_kernels_cannot_be_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    plan, _ = open_rtx(tmp_path, tmp_path / "file" / "kernels")
    plan.run(FEEDS)
    with caplog.at_level(logging.WARNING):
        plan.close()
    assert "CLOSEUP_PLAN_CACHE names a folder" in caplog.text


def test_rtx_has_every_name_that_its_contexts_are_made_with() -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    names = {
        trt.ICudaEngine: ("create_runtime_config", "create_execution_context"),
        trt.IRuntimeConfig: (
            "create_runtime_cache", "set_runtime_cache", "cuda_graph_strategy",
            "set_execution_context_allocation_strategy",
        ),
        trt.IRuntimeCache: ("serialize", "deserialize"),
        trt.CudaGraphStrategy: ("WHOLE_GRAPH_CAPTURE", "DISABLED"),
        trt.BuilderFlag: ("REQUIRE_USER_ALLOCATION",),
    }  # fmt: skip
    assert [
        name for kind, all_of in names.items() for name in all_of if not hasattr(kind, name)
    ] == []
