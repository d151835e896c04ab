"""The tables of what LoRAs cost, from samples. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.measuring import compare_pairs
from benchmarks.results import Section, Verdict

BASELINE = "exported without LoRA inputs"
NO_LORA = "no LoRA"
MIX_LIMIT = 0.95


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One measurement.

    Attributes:
        wall_s: seconds that passed.
        cpu_s: of this process's threads in sum; what else the machine does changes it less.
    """

    wall_s: float
    cpu_s: float


def turns(names: Sequence[str], rounds: int) -> list[tuple[str, ...]]:
    """Return the order of each round: every name once, each round begins with the next name."""
    starts = (index % len(names) for index in range(rounds))
    return [(*names[start:], *names[:start]) for start in starts]


def step_section(title: str, samples: Mapping[str, Sequence[Sample]]) -> Section:
    """Compare every side's step time with that of `BASELINE`.

    Args:
        title: of the subject.
        samples: side -> of one step, one of each round, `BASELINE` among them.
    """
    return Section(
        title=f"Step time by LoRA rank: {title}",
        columns=("", "ms a step", "ratio", "quartiles", "CPU ratio"),
        rows=_rows(samples, BASELINE),
        notes=(
            f"Medians of {_rounds(samples)} rounds in turns; one sequence with guidance, two "
            "network rows. Ratios to the export without LoRA inputs, quartiles over the rounds.",
        ),
    )


def wait_section(title: str, rank: int, samples: Mapping[str, Sequence[Sample]]) -> Section:
    """Compare the time to the first step by where the LoRA is.

    Args:
        title: of the subject.
        rank: of the LoRAs.
        samples: place -> from id to step, one of each round, `NO_LORA` among them.
    """
    return Section(
        title=f"From a LoRA's id to the end of its first step: {title}",
        columns=("the LoRA is", "ms", "ratio", "quartiles", "CPU ratio"),
        rows=_rows(samples, NO_LORA),
        notes=(
            f"Medians of {_rounds(samples)} rounds, rank {rank} in every layer, float16 files. "
            "Ratios to a first step without a LoRA. On disk only: written, then dropped from the "
            "system's cache. In the store: read before, but another LoRA has its row of the bank.",
        ),
    )


def mix_section(
    title: str, requests: int, different: Sequence[Sample], same: Sequence[Sample]
) -> Section:
    """Compare the throughput of requests with different LoRAs with that of one LoRA for all.

    Args:
        title: of the subject.
        requests: at once.
        different: of all requests when each has its own LoRA.
        same: when all have the same, each from the same round.
    """
    speed = compare_pairs(_walls(same), _walls(different))
    work = compare_pairs(_cpus(different), _cpus(same))
    return Section(
        title=f"{requests} requests at once with LoRAs: {title}",
        columns=("", "s", "CPU s"),
        rows=(
            ("the same LoRA in all", f"{speed.ours:.2f}", f"{work.theirs:.2f}"),
            ("a different LoRA in each", f"{speed.theirs:.2f}", f"{work.ours:.2f}"),
        ),
        verdicts=(
            Verdict(name="throughput, different LoRAs / the same", value=speed.ratio,
                    limit=MIX_LIMIT, at_least=True),
        ),
        notes=(
            f"Medians of {len(same)} rounds in turns; all LoRAs resident. Quartiles of the "
            f"throughput's ratio: {speed.spread[0]:.2f} to {speed.spread[1]:.2f}. CPU seconds, "
            f"different / same: {work.ratio:.3f}.",
        ),
    )  # fmt: skip


def _rows(samples: Mapping[str, Sequence[Sample]], baseline: str) -> tuple[tuple[str, ...], ...]:
    rows = []
    for name, values in samples.items():
        found = compare_pairs(_walls(values), _walls(samples[baseline]))
        work = compare_pairs(_cpus(values), _cpus(samples[baseline]))
        low, high = found.spread
        rows.append(
            (
                name,
                f"{1000 * found.ours:.1f}",
                f"{found.ratio:.2f}",
                f"{low:.2f} to {high:.2f}",
                f"{work.ratio:.2f}",
            )
        )
    return tuple(rows)


def _walls(samples: Sequence[Sample]) -> list[float]:
    return [sample.wall_s for sample in samples]


def _cpus(samples: Sequence[Sample]) -> list[float]:
    return [sample.cpu_s for sample in samples]


def _rounds(samples: Mapping[str, Sequence[Sample]]) -> int:
    return min(map(len, samples.values()))
