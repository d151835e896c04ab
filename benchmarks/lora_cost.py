"""What LoRAs cost: a step's time by rank, the wait for one on disk, batches with many of them.

All in this process, without a server. LoRAs have random factors for every layer that takes them.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.lora_tables import (
    BASELINE,
    NO_LORA,
    Sample,
    mix_section,
    step_section,
    turns,
    wait_section,
)
from benchmarks.random_loras import write_random_lora
from benchmarks.results import Section
from benchmarks.subjects import CACHE, Subject
from benchmarks.throughput import context_width, segment_inputs
from closeup.denoiser import Denoiser
from closeup.local import LocalModels
from closeup.lora_read import layouts_from_manifest
from closeup.manifest import MANIFEST_NAME, read_manifest
from closeup.run import Array, text_tensor
from closeup.segments import ACQUIRE, RELEASE
from closeup.settings import Settings

RANKS = (16, 64)
COMMON_RANK = 16  # of the LoRAs where the rank is not the question
REQUESTS = 8
# Steps in a sample of the step time, and steps of a request of the batches.
SAMPLE_STEPS = {"demo": 10, "sd15": 1}
REQUEST_STEPS = {"demo": 8, "sd15": 1}


def measure_lora_cost(subject: Subject, *, repeats: int) -> Iterator[Section]:
    """Export what is lacking, then yield each table as it is found."""
    title = subject.title.partition(",")[0]  # without the request, which is another here
    without, with_inputs = (_exported(subject, rank) for rank in (0, max(RANKS)))
    with tempfile.TemporaryDirectory(dir=CACHE / subject.name) as folder:
        loras = Path(folder)
        yield step_section(title, _step_times(without, with_inputs, loras, repeats))
        yield wait_section(title, COMMON_RANK, _waits(with_inputs, loras, repeats))
        yield mix_section(title, REQUESTS, *_batches(with_inputs, loras, repeats))


def _exported(subject: Subject, rank: int) -> Subject:
    repository = CACHE / subject.name / f"lora_{rank}"
    exported = dataclasses.replace(subject, repository=repository, lora_rank=rank)
    exported.export()
    return exported


def _write(subject: Subject, folder: Path, name: str, *, rank: int, seed: int) -> str:
    """Write a LoRA for the subject and return its id."""
    manifest = read_manifest(_denoiser_folder(subject) / MANIFEST_NAME)
    layouts = layouts_from_manifest(manifest)
    write_random_lora(folder / f"{name}.safetensors", layouts, rank=rank, seed=seed)
    return name


def _denoiser_folder(subject: Subject) -> Path:
    return subject.repository / f"{subject.name}_denoiser"


def _open(subject: Subject, folder: Path | None = None) -> Denoiser:
    """One LoRA resident at a time, so the bank is as wide as the one that is used."""
    settings = Settings(lora_dir=folder, lora_rows=1)
    return Denoiser(_denoiser_folder(subject), settings=settings)


def _acquire(denoiser: Denoiser, *loras: str) -> Array:
    inputs = {
        "operation": text_tensor(ACQUIRE),
        "slots": np.array([1], np.int64),
        "loras": text_tensor(json.dumps([[name, 1.0] for name in loras])),
    }
    return denoiser.start(inputs).result()["ticket"]


def _release(denoiser: Denoiser, ticket: Array) -> None:
    denoiser.start({"operation": text_tensor(RELEASE), "ticket": ticket}).result()


def _step_times(
    without: Subject, with_inputs: Subject, folder: Path, repeats: int
) -> dict[str, list[Sample]]:
    """Samples of one step, by side, taken in turns."""
    steps = SAMPLE_STEPS[without.name]
    ids = {rank: _write(with_inputs, folder, f"rank-{rank}", rank=rank, seed=rank)
           for rank in RANKS}  # fmt: skip
    width = context_width(without)
    with closing(_open(without)) as plain, closing(_open(with_inputs, folder)) as ours:
        sides: dict[str, Callable[[], Sample]] = {
            BASELINE: partial(_step_time, plain, (), width, steps),
            NO_LORA: partial(_step_time, ours, (), width, steps),
        }
        for rank, lora in ids.items():
            sides[f"rank {rank}"] = partial(_step_time, ours, (lora,), width, steps)
        return _in_turns(sides, repeats)


def _step_time(denoiser: Denoiser, loras: Sequence[str], width: int, steps: int) -> Sample:
    ticket = _acquire(denoiser, *loras)
    try:
        inputs = segment_inputs(denoiser, ticket, width, steps)
        sample = _timed(lambda: denoiser.start(inputs).result())
        return Sample(wall_s=sample.wall_s / steps, cpu_s=sample.cpu_s / steps)
    finally:
        _release(denoiser, ticket)


def _waits(subject: Subject, folder: Path, repeats: int) -> dict[str, list[Sample]]:
    """Samples from the LoRA's id to the end of the first step with it, by where it was."""
    width = context_width(subject)
    found: dict[str, list[Sample]] = {}
    with closing(_open(subject, folder)) as denoiser:
        other = _write(subject, folder, "other", rank=COMMON_RANK, seed=1000)

        def measure(name: str, *loras: str) -> None:
            found.setdefault(name, []).append(_wait(denoiser, loras, width))

        for repeat in range(-1, repeats):
            if repeat == 0:
                found.clear()  # the first round warmed up
            new = _write(subject, folder, f"new-{repeat}", rank=COMMON_RANK, seed=2000 + repeat)
            measure("on disk only", new)
            _release(denoiser, _acquire(denoiser, other))  # takes the bank's only row
            measure("in the store", new)
            measure("in the engine's bank", new)
            measure(NO_LORA)
    return found


def _wait(denoiser: Denoiser, loras: Sequence[str], width: int) -> Sample:
    tickets = []

    def work() -> None:
        tickets.append(_acquire(denoiser, *loras))
        denoiser.start(segment_inputs(denoiser, tickets[0], width, 1)).result()

    sample = _timed(work)
    _release(denoiser, tickets[0])
    return sample


def _batches(subject: Subject, folder: Path, repeats: int) -> tuple[list[Sample], list[Sample]]:
    """Samples of the requests at once: each with its own LoRA, all with the same."""
    ids = [_write(subject, folder, f"mix-{index}", rank=COMMON_RANK, seed=3000 + index)
           for index in range(REQUESTS)]  # fmt: skip
    settings = Settings(lora_dir=folder, lora_rows=REQUESTS, slots=REQUESTS)
    with LocalModels(subject.repository, settings) as models:
        sides: dict[str, Callable[[], Sample]] = {
            "different": partial(_batch, models, subject, ids),
            "same": partial(_batch, models, subject, ids[:1] * REQUESTS),
        }
        samples = _in_turns(sides, repeats)
    return samples["different"], samples["same"]


def _batch(models: LocalModels, subject: Subject, loras: Sequence[str]) -> Sample:
    async def work() -> None:
        runs = []
        for seed, lora in enumerate(loras):
            request = models.resolve(
                model=subject.name,
                prompt=f"<lora:{lora}:1> a photo of a woman",
                seed=seed,
                steps=REQUEST_STEPS[subject.name],
            )
            runs.append(models.run(models.start(request)))
        await asyncio.gather(*runs)

    return _timed(lambda: asyncio.run(work()))


def _timed(work: Callable[[], object]) -> Sample:
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    work()
    return Sample(wall_s=time.perf_counter() - wall_s, cpu_s=time.process_time() - cpu_s)


def _in_turns(sides: Mapping[str, Callable[[], Sample]], repeats: int) -> dict[str, list[Sample]]:
    """Measure the sides in turns, after one round that is not counted."""
    samples: dict[str, list[Sample]] = {name: [] for name in sides}
    for name in sides:
        sides[name]()
    for order in turns(tuple(sides), repeats):
        for name in order:
            samples[name].append(sides[name]())
    return samples
