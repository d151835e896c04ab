"""``python -m benchmarks.export_memory``: what the export of large denoisers needs.

Writes random weights of the real sizes, exports them in float16 in a process of its own and
prints that process's peak resident set, which counts the pages of the weights' file too. FLUX.1
is measured at a few depths; a line through them predicts the whole model.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

LIMIT = 2.2  # peak over the weights, the project's target
FULL_DEPTH = 19
_RANK = 32
_BLOCK = (1 << 20) + 7  # odd, so that the rows of a layer differ
SDXL_CONFIG: Mapping[str, Any] = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [320, 640, 1280],
    "layers_per_block": 2,
    "cross_attention_dim": 2048,
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
FLUX_CONFIG: Mapping[str, Any] = {
    "in_channels": 64,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": [16, 56, 56],
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A denoiser to export.

    Attributes:
        name: for the table and the command line.
        family: ``sdxl`` or ``flux``.
        config: of the denoiser.
        depth: of FLUX.1: its double blocks, half as many as the single ones; 0 for SDXL.
    """

    name: str
    family: str
    config: Mapping[str, Any]
    depth: int = 0


def flux_case(depth: int) -> Case:
    """Return FLUX.1's real layers, ``depth`` of its 19 double blocks, 2 * depth single ones."""
    config = {**FLUX_CONFIG, "num_layers": depth, "num_single_layers": 2 * depth}
    return Case(name=f"flux-{depth}", family="flux", config=config, depth=depth)


CASES: tuple[Case, ...] = (
    Case(name="sdxl", family="sdxl", config=SDXL_CONFIG),
    *(flux_case(depth) for depth in (2, 4, 8)),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 1 when a peak is past the limit."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.export_memory", description=__doc__)
    parser.add_argument("cases", nargs="*", help=", ".join(case.name for case in CASES))
    parser.add_argument(
        "--folder", type=Path, help="scratch space, up to 20 GB; default: a new one"
    )
    parser.add_argument("--check", action="store_true", help="compare with PyTorch too (minutes)")
    parser.add_argument("--stage", choices=("write", "export", "check"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    chosen = [case for case in CASES if not options.cases or case.name in options.cases]
    if options.stage:
        print(json.dumps(_run_stage(options.stage, chosen[0], options.folder)))
        return 0
    results = {}
    for case in chosen:
        folder = Path(tempfile.mkdtemp(prefix=f"{case.name}-", dir=options.folder))
        try:
            results[case.name] = _measure(case, folder, check=options.check)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        _print_row(case, results[case.name])
    _print_fit([(case, results[case.name]) for case in chosen if case.depth])
    return 0 if all(row["ratio"] <= LIMIT for row in results.values()) else 1


def _measure(case: Case, folder: Path, *, check: bool) -> dict[str, Any]:
    """Run the stages, each in a process of its own."""
    row: dict[str, Any] = {}
    for stage in ("write", "export", *(("check",) if check else ())):
        command = [sys.executable, "-m", "benchmarks.export_memory", case.name]
        command += ["--stage", stage, "--folder", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{case.name}, {stage}: {done.stderr[-2000:]}")
        row[stage] = json.loads(done.stdout.splitlines()[-1])
    row["ratio"] = row["export"]["peak_bytes"] / row["write"]["weight_bytes"]
    return row


def _print_row(case: Case, row: Mapping[str, Any]) -> None:
    export, weights = row["export"], row["write"]["weight_bytes"]
    print(
        f"{case.name}: {row['write']['parameters'] / 1e9:.2f} B parameters, weights "
        f"{weights / 1e9:.2f} GB, export's peak {export['peak_bytes'] / 1e9:.2f} GB "
        f"({row['ratio']:.2f} x, before it began {export['base_bytes'] / 1e9:.2f} GB), "
        f"{export['seconds']:.0f} s",
        flush=True,
    )
    if "check" in row:
        found = row["check"]
        print(
            f"{case.name}: check in a second process: relative difference {found['error']:.1e}, "
            f"peak {found['peak_bytes'] / 1e9:.2f} GB, {found['seconds']:.0f} s",
            flush=True,
        )


def _print_fit(rows: Sequence[tuple[Case, Mapping[str, Any]]]) -> None:
    if len(rows) < 2:
        return
    depths = [case.depth for case, _ in rows]
    peaks = np.polyfit(depths, [row["export"]["peak_bytes"] / 1e9 for _, row in rows], 1)
    weights = np.polyfit(depths, [row["write"]["weight_bytes"] / 1e9 for _, row in rows], 1)
    peak, weight = np.polyval(peaks, FULL_DEPTH), np.polyval(weights, FULL_DEPTH)
    print(
        f"flux: peak = {peaks[1]:.2f} + {peaks[0]:.3f} GB a depth; at {FULL_DEPTH} (the whole "
        f"model, {weight:.1f} GB of weights): {peak:.1f} GB, {peak / weight:.2f} x"
    )


def _run_stage(stage: str, case: Case, folder: Path) -> dict[str, Any]:
    if stage == "write":
        return write_pipeline(case, folder / "pipeline")
    started, base = time.monotonic(), _peak_bytes()
    result = _export(folder) if stage == "export" else _check(folder)
    seconds = time.monotonic() - started
    return {"peak_bytes": _peak_bytes(), "base_bytes": base, "seconds": seconds, **result}


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _part(folder: Path) -> Any:
    import torch

    from export.parts import Part
    from export.precisions import DENOISER, Precision

    torch.set_num_threads(2)
    return Part(
        folder=folder / "pipeline",
        name=DENOISER,
        precision=Precision.FP16,
        max_rank=_RANK,
        max_batch=8,
        max_tokens=77,
    )


def _export(folder: Path) -> dict[str, Any]:
    from export.graphs import write_graph
    from export.parts import build_graph

    write_graph(build_graph(_part(folder)), folder / "model.onnx")
    return {"bytes": sum(path.stat().st_size for path in folder.glob("model.onnx*"))}


def _check(folder: Path) -> dict[str, Any]:
    from export.parts import check_large_part

    return {"error": check_large_part(_part(folder), folder / "model.onnx").max_rel_error}


def write_pipeline(case: Case, folder: Path) -> dict[str, Any]:
    """Write a pipeline's index and its denoiser with random float16 weights, tensor by tensor."""
    import diffusers
    import torch

    from export.layouts import LAYOUTS

    layout = next(layout for layout in LAYOUTS if layout.family.name == case.family)
    index: dict[str, Any] = {"_class_name": layout.pipelines[0]}
    index[layout.denoiser] = ["diffusers", layout.denoiser_class]
    index |= {entry.name: ["transformers", entry.class_name] for entry in layout.encoders}
    target = folder / layout.denoiser
    target.mkdir(parents=True)
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    kind = getattr(diffusers, layout.denoiser_class)
    with torch.device("meta"):
        module = kind(**case.config)
    module.save_config(target)
    shapes = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    parameters = sum(int(np.prod(shape)) for shape in shapes.values())
    _write_safetensors(target / "diffusion_pytorch_model.safetensors", shapes)
    return {"parameters": parameters, "weight_bytes": 2 * parameters}


def _write_safetensors(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        end = offset + 2 * int(np.prod(shape))
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [offset, end]}  # type: ignore[dict-item]
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for values in _random_tensors(shapes):
            file.write(values.tobytes())


def _random_tensors(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[np.ndarray[Any, Any]]:
    """Weights whose layers neither fade nor grow: norms 1, biases 0, 1/sqrt(inputs) else.

    One block of random values is repeated, turned a little for every tensor so that no two are
    equal: drawing billions would take longer than the export.
    """
    block = np.random.default_rng(0).random(_BLOCK, dtype=np.float32) - 0.5
    for name, shape in shapes.items():
        block = np.roll(block, 1009)
        if len(shape) == 1:
            value = 1.0 if name.endswith("weight") else 0.0
            yield np.full(shape, value, np.float16)
            continue
        spread = (12.0 / float(np.prod(shape[1:]))) ** 0.5
        yield np.resize((block * spread).astype(np.float16), shape)


if __name__ == "__main__":
    sys.exit(main())
