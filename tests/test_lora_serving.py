"""LoRAs from a request's prompt to its picture: against diffusers, and beside other requests."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from closeup.errors import CloseupError, ModelError, RequestError
from closeup.graph import Outcome
from closeup.local import LocalModels
from closeup.manifest import LoraLayer
from closeup.settings import Settings
from tests.diffusers_reference import DiffusersReference, Pixels, psnr_db
from tests.lora_writers import Factors, random_factors, tensors_from_factors, write_lora
from tests.tiny_export import TinyExport, export_tiny

BAR_DB = 65.0  # as in test_parity: rounding gives more, a LoRA at another weight far less (tested)
STEPS = 4
FIELDS: Mapping[str, Any] = {
    "negative_prompt": "forest", "seed": 5, "steps": STEPS, "cfg_scale": 3.0,
    "scheduler": "euler_a", "w": 72, "h": 64,
}  # fmt: skip
WORDS = "a photo of the woman"
LORAS: Mapping[str, int] = {"one": 4, "two": 4, "three": 2}  # id -> rank; two fit LORA_RANK


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyExport:
    return export_tiny(tmp_path_factory)


@pytest.fixture(scope="module")
def folder(tiny: TinyExport, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loras")
    layers = layers_of(tiny)
    for seed, (name, rank) in enumerate(LORAS.items()):
        save(folder, name, random_factors(layers, seed=seed, ranks=(rank,), alphas=(3.0,)))
    # 1e30 is finite, its product with an activation in the next layer is not.
    save(folder, "huge", random_factors(layers, seed=9, alphas=(4.0,), scale=1e15))
    wide = [replace(layer, in_features=layer.in_features + 8) for layer in layers]
    save(folder, "wide", random_factors(tuple(wide), seed=8, alphas=(4.0,)))
    return folder


@pytest.fixture(scope="module")
def served(tiny: TinyExport, folder: Path) -> Iterator[LocalModels]:
    with LocalModels(tiny.repository, Settings(lora_dir=folder)) as models:
        yield models


def layers_of(tiny: TinyExport) -> tuple[LoraLayer, ...]:
    manifest = json.loads((tiny.repository / "tiny_denoiser" / "manifest.json").read_text())
    return tuple(LoraLayer(**entry) for entry in manifest["lora"]["layers"])


def save(folder: Path, name: str, factors: Factors) -> Path:
    """Write a kohya file; what are 1x1 convolutions in the network are in the file too."""
    convolutions = tuple(
        layer for layer in factors if layer.endswith(("proj_in", "proj_out", "conv_shortcut"))
    )
    tensors = tensors_from_factors(factors, "kohya", conv_names=convolutions)
    return write_lora(folder / f"{name}.safetensors", tensors)


def tags(loras: Mapping[str, float]) -> str:
    return "".join(f"<lora:{name}:{weight}> " for name, weight in loras.items()) + WORDS


def paint(served: LocalModels, loras: Mapping[str, float], **changes: Any) -> Pixels:
    return served.generate(**{**FIELDS, "prompt": tags(loras), **changes}).pictures[0]


def paint_together(
    served: LocalModels, requests: list[dict[str, Any]]
) -> list[Outcome | BaseException]:
    """Run requests at the same time, in one process, as the server does."""

    async def run() -> list[Outcome | BaseException]:
        runs = [served.start(served.resolve(**{**FIELDS, **fields})) for fields in requests]
        return await asyncio.gather(*map(served.run, runs), return_exceptions=True)

    return asyncio.run(run())


@pytest.fixture(scope="module")
def theirs(tiny: TinyExport, folder: Path) -> Iterator[DiffusersReference]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    reference = DiffusersReference(tiny.pipeline)
    for name in LORAS:
        reference.pipeline("text-to-image").load_lora_weights(
            folder, weight_name=f"{name}.safetensors", adapter_name=name
        )
    yield reference
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "loras", [{"one": 0.8}, {"two": -0.5}, {"one": 0.7, "two": 0.4}], ids="+".join
)
def test_picture_with_loras_equals_diffusers(
    served: LocalModels, theirs: DiffusersReference, loras: dict[str, float]
) -> None:
    theirs.pipeline("text-to-image").set_adapters(list(loras), list(loras.values()))
    expected = theirs.paint(
        "text-to-image", "euler_a", seed=5, prompt=WORDS, negative_prompt="forest",
        num_inference_steps=STEPS, guidance_scale=3.0, width=72, height=64,
    )  # fmt: skip
    assert psnr_db(paint(served, loras), expected) >= BAR_DB
    # The bar tells this LoRA from none, from another and from another weight.
    first, weight = next(iter(loras.items()))
    for wrong in ({}, {"three": 0.8}, {**loras, first: weight + 0.1}):
        assert psnr_db(paint(served, wrong), expected) < BAR_DB - 15


def test_weight_zero_equals_no_lora(served: LocalModels) -> None:
    plain = paint(served, {})
    assert plain.std() > 5
    assert np.array_equal(paint(served, {"one": 0.0}), plain)
    assert np.array_equal(paint(served, {"one": 0.0, "two": 0.0}), plain)


MIXED: list[dict[str, Any]] = [
    {"prompt": tags({"one": 0.8}), "seed": 1},
    {"prompt": tags({}), "seed": 2, "scheduler": "dpm++2m"},
    {"prompt": tags({"two": 0.6}), "seed": 3, "cfg_scale": 1.0},
    {"prompt": tags({"one": -0.4, "three": 0.9}), "seed": 4, "scheduler": "lcm"},
]


def test_requests_with_different_loras_share_engine_calls_and_equal_themselves_alone(
    served: LocalModels,
) -> None:
    alone = [served.generate(**{**FIELDS, **fields}).pictures[0] for fields in MIXED]
    counters = served.denoiser("tiny_denoiser").counters
    calls, steps = counters.engine_calls, counters.sequence_steps
    together = paint_together(served, [{**fields} for fields in MIXED])
    calls, steps = counters.engine_calls - calls, counters.sequence_steps - steps
    assert steps == len(MIXED) * STEPS
    assert calls < steps  # shared; how many depends on when each arrived
    assert counters.largest_batch >= 2
    for outcome, expected in zip(together, alone, strict=True):
        assert isinstance(outcome, Outcome)
        # A larger batch rounds its matrix products differently: no byte differs by more than 1.
        # The mates' LoRAs, seeds and samplers differ by dozens.
        difference = np.abs(outcome.pictures[0].astype(int) - expected)
        assert difference.max() <= 1
    for one in range(len(alone)):
        for other in range(one):
            assert np.abs(alone[one].astype(int) - alone[other]).max() > 20


def test_four_sequences_with_four_loras_run_in_one_engine_call(served: LocalModels) -> None:
    # 40 steps a request leave time for all to be there at once.
    counters = served.denoiser("tiny_denoiser").counters
    calls = counters.engine_calls
    outcomes = paint_together(served, [{**fields, "steps": 40} for fields in MIXED])
    assert all(isinstance(outcome, Outcome) for outcome in outcomes)
    assert counters.largest_batch == 4
    assert counters.engine_calls - calls < 2 * 40


def test_lora_that_overflows_fails_its_own_request_alone(served: LocalModels) -> None:
    mates = [{**MIXED[0], "steps": 12}, {**MIXED[1], "steps": 12}]
    alone = [served.generate(**{**FIELDS, **fields}).pictures[0] for fields in mates]
    bad = {"prompt": tags({"huge": 1.0}), "steps": 12}
    denoiser = served.denoiser("tiny_denoiser")
    failed = denoiser.counters.failed_sequences
    first, failure, second = paint_together(served, [mates[0], bad, mates[1]])
    assert isinstance(failure, ModelError)
    assert "no longer finite" in str(failure)
    assert "LoRA" in str(failure)
    for outcome, expected in zip((first, second), alone, strict=True):
        assert isinstance(outcome, Outcome)
        assert np.abs(outcome.pictures[0].astype(int) - expected).max() <= 1  # as above
    assert denoiser.counters.failed_sequences == failed + 1
    assert denoiser.slots_in_use == 0


@pytest.mark.parametrize("name", ["wide", "damaged", "empty"])
def test_lora_that_does_not_fit_is_refused_before_any_engine_call(
    served: LocalModels, folder: Path, name: str
) -> None:
    if name != "wide":
        (folder / f"{name}.safetensors").write_bytes(b"no file" if name == "damaged" else b"")
    denoiser = served.denoiser("tiny_denoiser")
    calls = denoiser.counters.engine_calls
    with pytest.raises(RequestError) as caught:
        paint(served, {name: 1.0})
    assert caught.value.code == "INVALID_ARG"
    assert list(caught.value.problems) == ["prompt"]
    assert name in str(caught.value)
    assert denoiser.counters.engine_calls == calls
    assert denoiser.slots_in_use == 0
    assert paint(served, {"one": 0.5}).std() > 5


def test_replaced_file_is_noticed_by_the_next_request(
    served: LocalModels, tiny: TinyExport, folder: Path
) -> None:
    layers = layers_of(tiny)
    save(folder, "mine", random_factors(layers, seed=20, alphas=(4.0,)))
    first = paint(served, {"mine": 1.0})
    assert np.array_equal(paint(served, {"mine": 1.0}), first)
    save(folder, "next", random_factors(layers, seed=21, alphas=(4.0,)))
    os.replace(folder / "next.safetensors", folder / "mine.safetensors")
    second = paint(served, {"mine": 1.0})
    assert np.abs(second.astype(int) - first).max() > 20
    (folder / "mine.safetensors").unlink()
    with pytest.raises(CloseupError, match="mine"):
        paint(served, {"mine": 1.0})


def test_wide_lora_is_compressed_with_a_warning(
    served: LocalModels, tiny: TinyExport, folder: Path
) -> None:
    save(folder, "rank12", random_factors(layers_of(tiny), seed=30, ranks=(12,), alphas=(12.0,)))
    run = served.start(served.resolve(**FIELDS, prompt=tags({"rank12": 1.0})))
    asyncio.run(served.run(run))
    assert len(run.warnings) == 1
    assert "rank" in run.warnings[0]
