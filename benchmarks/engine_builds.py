"""``python -m benchmarks.engine_builds``: what TensorRT-RTX needs to build large denoisers.

SDXL's and FLUX.1's real layers and real numbers of tokens at reduced depth, and Stable Diffusion
1.5 whole, with random weights and LoRA inputs of rank 32, are exported and compiled in a process
of their own each; no GPU is needed. Printed are the graph's size, the builder's seconds of wall
and processor time, the peak of the build's resident set, which counts the pages of the weights'
file too, and the plan's size.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.export_memory import SDXL_CONFIG, Case, flux_case, write_pipeline
from benchmarks.hardware import describe_machine, machine_kind, package_version
from benchmarks.results import (
    Section,
    report_data,
    report_json,
    report_markdown,
    section_markdown,
)

ROOT = Path(__file__).resolve().parent.parent
RANK, MAX_BATCH, LORA_ROWS = 32, 4, 8
SD15_CONFIG: Mapping[str, Any] = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Build:
    """A denoiser to compile.

    Attributes:
        case: its configuration.
        words: what of the real model it is.
        precision: of its network.
        native_px: side of the pictures.
        tokens: of the prompt.
    """

    case: Case
    words: str
    precision: str
    native_px: int
    tokens: int


def _sdxl(name: str, layers: int, transformers: list[int], words: str) -> Build:
    changes = {"layers_per_block": layers, "transformer_layers_per_block": transformers}
    case = Case(name=name, family="sdxl", config={**SDXL_CONFIG, **changes})
    return Build(case=case, words=words, precision="fp16", native_px=1024, tokens=77)


def _flux(depth: int) -> Build:
    words = f"{depth} of 19 double and {2 * depth} of 38 single blocks"
    case = flux_case(depth)
    return Build(case=case, words=words, precision="bf16", native_px=1024, tokens=512)


BUILDS: tuple[Build, ...] = (
    _sdxl("sdxl-small", 1, [1, 1, 1], "one transformer layer where SDXL has 2 and 10"),
    _flux(1),
    _sdxl("sdxl-half", 2, [1, 1, 4], "70 % of its residual layers, 1 and 4 transformer layers"),
    _flux(2),
    Build(
        case=Case(name="sd15", family="sd15", config=SD15_CONFIG), words="whole",
        precision="fp16", native_px=512, tokens=77,
    ),
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine_builds", description=__doc__)
    names = [build.case.name for build in BUILDS]
    parser.add_argument("cases", nargs="*", help=", ".join(names))
    parser.add_argument("--folder", type=Path, help="scratch space, 10 GB; default: a new one")
    parser.add_argument("--no-write", action="store_true", help="print only")
    parser.add_argument("--stage", choices=("write", "export", "build"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.cases) - set(names))
    if unknown:
        parser.error(f"unknown case {unknown[0]!r}; expected {', '.join(names)}")
    chosen = [build for build in BUILDS if not options.cases or build.case.name in options.cases]
    if options.stage:
        print(json.dumps(run_stage(options.stage, chosen[0], options.folder)))
        return 0
    machine = machine_facts()  # before the builds: they are load themselves
    rows = []
    for build in chosen:
        rows.append((build, measure(build, options.folder)))
        section = builds_section(rows)
        if not options.no_write:
            _write(section, machine)  # after each: a run that is cut short leaves the others
    print(section_markdown(section))
    return 0


def machine_facts() -> dict[str, str]:
    """Return the machine's facts for the report, its load now and the builder's version."""
    facts = describe_machine()
    return facts | {"tensorrt-rtx-cu13": package_version("tensorrt-rtx-cu13")}


def measure(build: Build, folder: Path | None = None) -> dict[str, Any]:
    """Run the stages of a build, each in a process of its own.

    Args:
        build: what to compile.
        folder: for scratch files, which are gone afterwards; None: the system's.

    Returns:
        parameters, weight_bytes, nodes, layers (of the LoRA inputs), export_peak_bytes, casts,
        load (mean number of running threads over the minute before the build), build_s,
        build_cpu_s, peak_bytes (the builder's process and its children), plan_bytes.

    Raises:
        SystemExit: a stage failed; says why.
    """
    scratch = Path(tempfile.mkdtemp(prefix=f"{build.case.name}-", dir=folder))
    found: dict[str, Any] = {}
    try:
        for stage in ("write", "export", "build"):
            command = [sys.executable, "-m", "benchmarks.engine_builds", build.case.name]
            command += ["--stage", stage, "--folder", str(scratch)]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"{build.case.name}, {stage}: {done.stderr[-2000:]}")
            found |= json.loads(done.stdout.splitlines()[-1])
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return found


def run_stage(stage: str, build: Build, folder: Path) -> dict[str, Any]:
    """Run ``write``, ``export`` or ``build`` in this process; returns its part of `measure`'s."""
    if stage == "write":
        return write_pipeline(build.case, folder / "pipeline")
    return _export(build, folder) if stage == "export" else _build(build, folder)


def peak_bytes() -> int:
    """Largest resident set of this process so far plus that of its largest ended child, bytes."""
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(resource.getrusage(kind).ru_maxrss for kind in kinds) * 1024


def _export(build: Build, folder: Path) -> dict[str, Any]:
    import dataclasses

    import onnx

    from export.denoiser import DenoiserStep
    from export.graphs import write_graph
    from export.parts import Part, build_graph
    from export.precisions import DENOISER, Precision

    part = Part(
        folder=folder / "pipeline",
        name=DENOISER,
        precision=Precision(build.precision),
        max_rank=RANK,
        max_batch=MAX_BATCH,
        max_tokens=build.tokens,
    )
    graph = build_graph(part)
    assert isinstance(graph.module, DenoiserStep)
    layers = [dataclasses.asdict(layer) for layer in graph.module.layers]
    write_graph(graph, folder / "model.onnx")
    (folder / "layers.json").write_text(json.dumps(layers), encoding="utf-8")
    nodes = onnx.load(folder / "model.onnx", load_external_data=False).graph.node
    return {"nodes": len(nodes), "layers": len(layers), "export_peak_bytes": peak_bytes()}


def _build(build: Build, folder: Path) -> dict[str, Any]:
    from closeup.plans import Flavour
    from export.builder import BuildJob, build_plan, open_toolchain
    from export.casts import check_casts
    from export.profiles import profile_of, tensors_of

    graph = folder / "model.onnx"
    tensors = tensors_of(graph)
    job = BuildJob(
        model=build.case.name,
        graph=graph,
        tensors=tensors,
        profiles=tuple(
            profile_of(name, tensors.inputs, sides)
            for name, sides in _sides(build, folder / "layers.json").items()
        ),
        precision=build.precision,
    )
    casts = check_casts(graph, build.precision).describe()
    shutil.rmtree(folder / "pipeline")
    load = os.getloadavg()[0]
    started_s, cpu_s = time.perf_counter(), time.process_time()
    build_plan(job, open_toolchain(Flavour.RTX), folder / "model.plan")
    return {
        "build_s": time.perf_counter() - started_s,
        "build_cpu_s": time.process_time() - cpu_s,
        "peak_bytes": peak_bytes(),
        "load": load,
        "plan_bytes": (folder / "model.plan").stat().st_size,
        "casts": casts,
    }


def _sides(build: Build, layers: Path) -> Mapping[str, Any]:
    """Profiles as an export of the whole model would have them, for the native square."""
    from closeup.families import FAMILIES
    from closeup.manifest import (
        LoraLayer,
        LoraLayout,
        ModelManifest,
        SizeRange,
        TextEncoder,
        Tokenizer,
    )
    from export.profiles import denoiser_sides, limits_of

    names = json.loads(layers.read_text(encoding="utf-8"))
    tokenizer = Tokenizer(
        path="", max_tokens=build.tokens, bos_token_id=None, eos_token_id=1, pad_token_id=0
    )
    manifest = ModelManifest(
        name=build.case.name,
        family=FAMILIES[build.case.family].name,
        native_px=build.native_px,
        vae_scale_factor=8,
        scaling_factor=1.0,
        shift_factor=0.0,
        scheduler={},
        encoders=(TextEncoder(name="text_encoder", tokenizer=tokenizer),),
        precision=build.precision,
        max_batch=MAX_BATCH,
        lora=LoraLayout(max_rank=RANK, layers=tuple(LoraLayer(**name) for name in names)),
    )
    side = build.native_px
    square = SizeRange(min_width=side, max_width=side, min_height=side, max_height=side)
    return denoiser_sides(manifest, limits_of(manifest, (square,), LORA_ROWS), alone=False)


def builds_section(rows: Sequence[tuple[Build, Mapping[str, Any]]]) -> Section:
    """Return the table of `measure`'s figures."""
    from closeup.plans import Flavour
    from closeup.tensorrt_package import import_tensorrt

    version = import_tensorrt(Flavour.RTX).__version__
    return Section(
        title=f"Denoisers compiled by TensorRT-RTX {version}, LoRA inputs of rank {RANK}, no GPU",
        columns=(
            "model", "precision", "weights GB", "LoRA layers", "graph nodes", "export peak GB",
            "build s", "processor s", "load", "build peak GB", "plan GB",
        ),
        rows=tuple(
            (
                build.case.name,
                build.precision,
                f"{found['weight_bytes'] / 1e9:.2f}",
                str(found["layers"]),
                str(found["nodes"]),
                f"{found['export_peak_bytes'] / 1e9:.2f}",
                f"{found['build_s']:.0f}",
                f"{found['build_cpu_s']:.0f}",
                f"{found['load']:.1f}",
                f"{found['peak_bytes'] / 1e9:.2f}",
                f"{found['plan_bytes'] / 1e9:.2f}",
            )
            for build, found in rows
        ),
        notes=(
            f"Pictures of the native size, up to {MAX_BATCH} sequences in a call, one profile. "
            "Weights: the network's own, 2 bytes each. Peaks are resident sets, the pages of the "
            "weights' file included. Load: running threads in the minute before a build, by which "
            "its seconds of wall time are longer than on an idle machine.",
            *(f"- {build.case.name}: {build.words}; {found['casts']}." for build, found in rows),
        ),
    )  # fmt: skip


def _write(section: Section, machine: dict[str, str]) -> None:
    day = datetime.date.today()
    command = " ".join(["python -m benchmarks.engine_builds", *sys.argv[1:]])
    stem = ROOT / "benchmarks" / "results" / f"{day.isoformat()}-{machine_kind(machine)}-builds"
    text = report_markdown([section], machine, command, day)
    stem.with_suffix(".md").write_text(text, encoding="utf-8")
    data = report_data([section], machine, command, day)
    stem.with_suffix(".json").write_text(report_json(data) + "\n", encoding="utf-8")
    print(f"written to {stem.relative_to(ROOT)}.md", flush=True)


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    sys.exit(main())
