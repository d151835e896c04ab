"""Many requests at once: throughput, and how soon a newcomer takes its first step."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from benchmarks.results import Section, Verdict
from benchmarks.serving import Serving
from benchmarks.subjects import Subject
from closeup.denoiser import Denoiser
from closeup.run import Array, text_tensor
from closeup.segments import ACQUIRE, SEGMENT
from closeup.settings import Settings

REQUESTS = 8
TICKS_LIMIT = 2
NEWCOMERS = 16
LONG_STEPS = 100


def measure_throughput(subject: Subject, server: Serving, *, repeats: int) -> Section:
    """Compare eight requests at once with eight one after the other, in turns."""
    one_by_one: list[float] = []
    at_once: list[float] = []
    shared: list[float] = []
    server.run(subject.fields)
    for _ in range(repeats):
        started_s = time.perf_counter()
        for seed in range(REQUESTS):
            server.run({**subject.fields, "seed": seed})
        one_by_one.append(time.perf_counter() - started_s)
        before = server.counters()
        started_s = time.perf_counter()
        with ThreadPoolExecutor(REQUESTS) as pool:
            list(pool.map(lambda seed: server.run({**subject.fields, "seed": seed}),
                          range(REQUESTS)))  # fmt: skip
        at_once.append(time.perf_counter() - started_s)
        spent = server.counters().since(before)
        shared.append(spent.sequence_steps / spent.calls[f"{subject.name}_denoiser"])
    gain = statistics.median(one / both for one, both in zip(one_by_one, at_once, strict=True))
    ticks = newcomer_ticks(subject)
    return Section(
        title=f"{REQUESTS} requests at once: {subject.title}",
        columns=("", "s"),
        rows=(
            ("one after the other", f"{statistics.median(one_by_one):.2f}"),
            ("at once", f"{statistics.median(at_once):.2f}"),
        ),
        verdicts=(
            Verdict(name="throughput, at once / one after the other", value=gain, limit=1.0,
                    at_least=True),
            Verdict(name="first step of a newcomer after at most (ticks)", value=max(ticks),
                    limit=TICKS_LIMIT),
        ),
        notes=(
            f"Medians of {repeats} rounds, seeds 0 to {REQUESTS - 1}. At once an engine call "
            f"held {statistics.median(shared):.1f} sequences on average. Newcomers: "
            f"{NEWCOMERS} sequences joined a denoiser that was busy with another; their first "
            f"step was in tick {min(ticks)} to {max(ticks)} after their arrival.",
        ),
    )  # fmt: skip


def newcomer_ticks(subject: Subject) -> list[int]:
    """Let sequences join a busy denoiser; return the ticks until each had taken its first step.

    The tick that runs when a sequence arrives counts as the first.
    """
    folder = subject.repository / f"{subject.name}_denoiser"
    denoiser = Denoiser(folder, settings=Settings(slots=2 * NEWCOMERS))
    try:
        return asyncio.run(_join(denoiser, context_width(subject)))
    finally:
        denoiser.close()


async def _join(denoiser: Denoiser, width: int) -> list[int]:
    acquire = {
        "operation": text_tensor(ACQUIRE),
        "slots": np.array([1], np.int64),
        "loras": text_tensor("[]"),
    }
    ticket = (await asyncio.wrap_future(denoiser.start(acquire)))["ticket"]

    async def run(steps: int) -> None:
        await asyncio.wrap_future(denoiser.start(segment_inputs(denoiser, ticket, width, steps)))

    long = asyncio.ensure_future(run(LONG_STEPS))
    ticks: list[int] = []
    random = np.random.default_rng(0)
    while len(ticks) < NEWCOMERS and not long.done():
        await asyncio.sleep(random.uniform(0, 0.05))
        before = denoiser.counters.engine_calls
        await run(1)
        ticks.append(denoiser.counters.engine_calls - before)
    await long
    return ticks


def context_width(subject: Subject) -> int:
    """Return the width of the text encoder's embeddings."""
    config = subject.pipeline / "text_encoder" / "config.json"
    return int(json.loads(config.read_text(encoding="utf-8"))["hidden_size"])


def segment_inputs(
    denoiser: Denoiser, ticket: Array, context_width: int, steps: int
) -> dict[str, Array]:
    """Return a segment of zeros with guidance, at the model's native size."""
    manifest = denoiser.manifest
    side = manifest.native_px // manifest.vae_scale_factor
    shape = (manifest.facts.latent_channels, side, side)
    tokens = manifest.encoders[0].tokenizer.max_tokens
    return {
        "operation": text_tensor(SEGMENT),
        "ticket": ticket,
        "sample": np.zeros(shape, np.float32),
        "context": np.zeros((2, tokens, context_width), np.float32),
        "guidance": np.full(1, 2.0, np.float32),
        "timestep": np.ones(steps, np.float32),
        "input_scale": np.ones(steps, np.float32),
        "step": np.zeros((steps, 3, 5), np.float32),
    }
