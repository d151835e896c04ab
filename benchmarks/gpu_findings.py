"""Milliseconds a step by model, side and batch, and the tables made of them. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from benchmarks.results import Section
from closeup.plans import Flavour

EAGER = "diffusers, eager, bf16"
GRAPH = "the same in a CUDA graph"
COMPILED = "diffusers, torch.compile, bf16"
# FLUX.1's graph is bf16 where it becomes a plan.
PLAN_SIDES: Mapping[Flavour, str] = {
    flavour: f"closeup's engine, {flavour.label} plan" for flavour in Flavour
}
ORT = "closeup's graph, ONNX Runtime CUDA, fp16"
ORT_GRAPH = "the same in a CUDA graph, fp16"
ORT_ENGINE = "the same through closeup's engine, fp16"
FLOOR = "arithmetic floor"
SIDES = (EAGER, GRAPH, COMPILED, *PLAN_SIDES.values(), ORT, ORT_GRAPH, ORT_ENGINE, FLOOR)


@dataclass(kw_only=True)
class Findings:
    """What was measured so far.

    Attributes:
        step_ms: (model, side, batch) -> milliseconds of a step of the whole batch.
        flops: model -> operations of one step of one picture.
        matmul_flops_per_s: measured.
        notes: model -> sentences below its table.
        sections: other tables.
    """

    step_ms: dict[tuple[str, str, int], float] = field(default_factory=dict)
    flops: dict[str, float] = field(default_factory=dict)
    matmul_flops_per_s: float | None = None
    notes: dict[str, list[str]] = field(default_factory=dict)
    sections: list[Section] = field(default_factory=list)

    def note(self, model: str, sentence: str) -> None:
        """Add a sentence below a model's table."""
        self.notes.setdefault(model, []).append(sentence)

    def floor_ms(self, model: str, batch: int) -> float | None:
        """Milliseconds that the counted operations take at the measured rate."""
        if self.matmul_flops_per_s is None or model not in self.flops:
            return None
        return 1000 * batch * self.flops[model] / self.matmul_flops_per_s


def model_section(
    found: Findings,
    model: str,
    title: str,
    *,
    steps: int,
    batches: Sequence[int],
    reasons: Mapping[str, str] | None = None,
) -> Section:
    """Return a model's table: one row a side, milliseconds and pictures a second by batch.

    Args:
        found: the figures.
        model: whose.
        title: of the table.
        steps: of a picture.
        batches: columns.
        reasons: block -> why it was not run or not to its end; those whose name begins with the
            model's go below the table.
    """
    rows = []
    for side in SIDES:
        times = {batch: _step_ms(found, model, side, batch) for batch in batches}
        known = {batch: ms for batch, ms in times.items() if ms is not None}
        rows.append((side, *_cells(known, batches, steps)))
    notes = list(found.notes.get(model, []))
    notes += [
        f"{block}: {reason}"
        for block, reason in (reasons or {}).items()
        if block.partition(" ")[0] == model
    ]
    if model in found.flops:
        notes.append(
            f"{found.flops[model] / 1e12:.2f} TFLOP a step of one picture, counted. Pictures a "
            f"second are those of {steps} denoising steps alone."
        )
    columns = [f"ms a step, batch {batch}" for batch in batches]
    columns += [f"pictures/s, batch {batch}" for batch in batches]
    return Section(title=title, columns=("", *columns), rows=tuple(rows), notes=tuple(notes))


def _step_ms(found: Findings, model: str, side: str, batch: int) -> float | None:
    if side == FLOOR:
        return found.floor_ms(model, batch)
    return found.step_ms.get((model, side, batch))


def _cells(known: Mapping[int, float], batches: Sequence[int], steps: int) -> list[str]:
    times = [f"{known[batch]:.3g}" if batch in known else "not run" for batch in batches]
    rates = [
        f"{1000 * batch / (steps * known[batch]):.3g}" if batch in known else "not run"
        for batch in batches
    ]
    return [*times, *rates]


def blocks_section(seconds: Mapping[str, float], reasons: Mapping[str, str]) -> Section:
    """Return what ran, how long it took, and why something did not."""
    names = [*seconds, *(name for name in reasons if name not in seconds)]
    return Section(
        title="Blocks",
        columns=("block", "s", "outcome"),
        rows=tuple(
            (name, f"{seconds[name]:.1f}" if name in seconds else "-", reasons.get(name, "done"))
            for name in names
        ),
    )
