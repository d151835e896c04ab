"""Tiny pipelines exported as TensorRT-RTX plans, and what the builder was handed on the way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from closeup.manifest import ModelManifest, read_models
from closeup.plans import Flavour, RuntimeFacts
from export import builder
from export.__main__ import main as export_main

DTYPES = {
    torch.float32: "FLOAT",
    torch.float16: "HALF",
    torch.bfloat16: "BF16",
    torch.int64: "INT64",
}


def runtime_facts() -> RuntimeFacts:
    """Return what would open the plans: this TensorRT-RTX on an RTX GPU of one kind."""
    tensorrt_rtx = pytest.importorskip("tensorrt_rtx")
    return RuntimeFacts(flavour=Flavour.RTX, version=tensorrt_rtx.__version__, sm="8.9")


@dataclass(frozen=True, kw_only=True, slots=True)
class Handed:
    """What TensorRT was handed for one plan, as it has it itself.

    Attributes:
        inputs: name -> (data type, shape with -1 for what varies).
        outputs: the same.
        strongly_typed: the network takes its types from the graph alone.
        tf32: float32 products may be rounded.
        sms: compute capabilities.
        profiles: by index: input -> (min, opt, max).
    """

    inputs: dict[str, tuple[str, tuple[int, ...]]]
    outputs: dict[str, tuple[str, tuple[int, ...]]]
    strongly_typed: bool
    tf32: bool
    sms: tuple[str, ...]
    profiles: tuple[dict[str, tuple[tuple[int, ...], ...]], ...]


@dataclass(kw_only=True)
class EngineExport:
    """An export of plans.

    Attributes:
        pipeline: in diffusers layout.
        repository: what was written.
        arguments: of the command line.
        handed: what the builder got, by model.
    """

    pipeline: Path
    repository: Path
    arguments: list[str]
    handed: dict[str, Handed] = field(default_factory=dict)

    @property
    def manifest(self) -> ModelManifest:
        """Of the pipeline."""
        (manifest,) = read_models(self.repository).values()
        return manifest

    def plan(self, model: str) -> Path:
        """Return where the plan of a model lies."""
        folder, _, stem = model.partition("/")
        return self.repository / folder / "1" / f"{stem or 'model'}.plan"

    def run(self) -> None:
        """Export, noting what the builder is handed."""
        with recorded(self.handed):
            assert export_main(self.arguments) == 0


@contextmanager
def recorded(handed: dict[str, Handed]) -> Iterator[None]:
    """Note what every build hands to TensorRT."""
    write_plan, make_profile = builder._write_plan, builder.make_profile
    profiles: list[Any] = []

    def noting_profile(trt_builder: Any, profile: Any) -> Any:
        profiles.append(make_profile(trt_builder, profile))
        return profiles[-1]

    def noting(job: Any, parts: Any, target: Path, monitor: Any) -> None:
        handed[job.model] = _handed(parts, profiles)
        profiles.clear()
        write_plan(job, parts, target, monitor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "make_profile", noting_profile)
        patch.setattr(builder, "_write_plan", noting)
        yield


def _handed(parts: Any, profiles: list[Any]) -> Handed:
    trt, network, config = parts.trt, parts.network, parts.config
    given = [network.get_input(i) for i in range(network.num_inputs)]
    made = [network.get_output(i) for i in range(network.num_outputs)]
    assert config.num_optimization_profiles == len(profiles)
    return Handed(
        inputs={tensor.name: (tensor.dtype.name, tuple(tensor.shape)) for tensor in given},
        outputs={tensor.name: (tensor.dtype.name, tuple(tensor.shape)) for tensor in made},
        strongly_typed=network.get_flag(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED),
        tf32=config.get_flag(trt.BuilderFlag.TF32),
        sms=tuple(
            config.get_compute_capability(i).name for i in range(config.num_compute_capabilities)
        ),
        profiles=tuple(
            {
                tensor.name: tuple(tuple(shape) for shape in profile.get_shape(tensor.name))
                for tensor in given
            }
            for profile in profiles
        ),
    )
