"""The command line of the export."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from closeup.errors import CloseupError
from closeup.manifest import Defaults
from export.facts import ModelFacts, read_folder_facts
from export.options import (
    ExportOptions,
    check_options,
    file_fingerprint,
    is_single_file,
    pipeline_fingerprint,
    resolve_folder,
    upscaler_fingerprint,
)
from export.plan_options import add_plan_arguments, plan_options
from export.precisions import UPSCALER, Precision, Target, parse_component_precisions
from export.repository import has_plans, is_unchanged, remove_pipeline

if TYPE_CHECKING:
    from export.engines import PlanWriter

_REPOSITORY = Path("model_repository")


def parse_options(arguments: Sequence[str]) -> ExportOptions:
    """Read the command line.

    Raises:
        ExportError: a value that argparse cannot tell to be wrong.
    """
    parser = argparse.ArgumentParser(
        prog="python -m export",
        description="Export a diffusers pipeline for serving.",
        epilog="python -m export --remove NAME [--repository DIR]: take a pipeline out again.",
    )
    add = parser.add_argument
    add("--model", required=True, help="pipeline folder in diffusers layout, hub id, or one "
        ".safetensors checkpoint in the original key layout")  # fmt: skip
    add("--config", type=Path, help="folder with the configs of a one-file checkpoint; for FLUX.1 "
        "with its other components; default: from the hub")  # fmt: skip
    add("--name", required=True, help="what requests call it")
    add("--target", type=Target, choices=list(Target), default=Target.ONNX, help="what is "
        "served: the graphs, or plans built from them by TensorRT (on the GPU they are for) or "
        "TensorRT-RTX (needs no GPU)")  # fmt: skip
    add("--repository", type=Path, default=_REPOSITORY)
    add("--lora-rank", type=int, default=32, help="largest LoRA rank; 0: no LoRA inputs")
    add("--precision", type=Precision, choices=list(Precision), default=Precision.FP32,
        help="of the denoiser and the text encoders; in plans of the upscaler too, and the VAE is "
        "bf16 unless this is fp32")  # fmt: skip
    add("--component-precision", nargs="+", default=[], metavar="COMPONENT=PRECISION",
        help="of single components, e.g. vae=fp32 text_encoder=fp32")  # fmt: skip
    add("--max-batch", type=int, default=8, help="sequences in an engine call")
    add("--max-tokens", type=int, default=512, help="prompt length of FLUX.1's T5")
    add("--upscaler", type=Path, help="weights (.safetensors) of the repository's upscaler")
    add("--face-detector", type=Path, help="YuNet-style detector, .safetensors or .onnx")
    add("--force", action="store_true", help="export even when nothing changed")
    add_plan_arguments(parser)
    facts = parser.add_argument_group("per-model defaults; they win over the folder's closeup.json")
    facts.add_argument("--native-px", type=int)
    facts.add_argument("--steps", type=int)
    facts.add_argument("--cfg-scale", type=float)
    facts.add_argument("--scheduler")
    facts.add_argument("--w", type=int)
    facts.add_argument("--h", type=int)
    facts.add_argument("--face-prompt-suffix")
    facts.add_argument("--face-crop-factor", type=float)
    facts.add_argument("--lost-face-strength", type=float)
    facts.add_argument("--face-steps", type=int)
    given = parser.parse_args(arguments)
    return ExportOptions(
        model=given.model,
        name=given.name,
        repository=given.repository,
        lora_rank=given.lora_rank,
        precision=given.precision,
        component_precision=parse_component_precisions(given.component_precision),
        target=given.target,
        plans=plan_options(given, arguments),
        max_batch=given.max_batch,
        max_tokens=given.max_tokens,
        config=given.config,
        upscaler=given.upscaler,
        face_detector=given.face_detector,
        facts=ModelFacts(
            native_px=given.native_px,
            face_prompt_suffix=given.face_prompt_suffix,
            face_crop_factor=given.face_crop_factor,
            lost_face_strength=given.lost_face_strength,
            face_steps=given.face_steps,
            defaults=Defaults(
                width=given.w,
                height=given.h,
                steps=given.steps,
                cfg_scale=given.cfg_scale,
                scheduler=given.scheduler,
            ),
        ),
        force=given.force,
    )


def run_export(options: ExportOptions) -> None:
    """Export what changed since the last time.

    Raises:
        ExportError: something cannot be exported; what was finished before stays.
    """
    check_options(options)
    single = is_single_file(options.model)
    folder = options.config if single else resolve_folder(options.model)
    facts = options.facts if folder is None else options.facts.over(read_folder_facts(folder))
    jobs = [(f"{options.name}_denoiser", pipeline_fingerprint(options, folder, facts))]
    if options.upscaler is not None:
        jobs.append(("upscaler", upscaler_fingerprint(options, options.upscaler)))
    if options.face_detector is not None:
        jobs.append(("face_detector", file_fingerprint(options, options.face_detector)))
    plans = _open_plan_writer(options)
    unchanged = {
        model
        for model, fingerprint in jobs
        if not options.force and is_unchanged(options.repository, model, fingerprint)
    }
    if len(unchanged) < len(jobs):
        # Imported late: an unchanged export must not wait for torch.
        from export import exporting

        exporting.check_shared(
            upscaler=None if "upscaler" in unchanged else options.upscaler,
            face_detector=None if "face_detector" in unchanged else options.face_detector,
        )
    for model, fingerprint in jobs:
        if model in unchanged:
            if plans is None or has_plans(options.repository, model, plans.fingerprint):
                print(f"{model}: unchanged")
            else:
                plans.rebuild(options.repository, model)
            continue
        if model == "upscaler":
            assert options.upscaler is not None
            precision = options.precision_of(UPSCALER)
            exporting.export_upscaler(
                options.upscaler, options.repository, fingerprint, precision, plans
            )
        elif model == "face_detector":
            assert options.face_detector is not None
            exporting.export_face_detector(
                options.face_detector, options.repository, fingerprint, plans
            )
        elif single:
            exporting.export_single_file(options, facts, fingerprint, plans)
        else:
            assert folder is not None
            exporting.export_pipeline(options, folder, facts, fingerprint, plans)


def _open_plan_writer(options: ExportOptions) -> PlanWriter | None:
    """Imported late: an export of graphs that has nothing to do is over in a moment."""
    if options.target is Target.ONNX:
        return None
    from export.engines import open_plan_writer

    return open_plan_writer(options)


def remove(arguments: Sequence[str]) -> bool:
    """Take a pipeline out when ``--remove`` is given.

    Returns:
        Whether it was given.

    Raises:
        ExportError: there is no such pipeline, or the repository cannot be written.
    """
    parser = argparse.ArgumentParser(prog="python -m export", add_help=False, allow_abbrev=False)
    parser.add_argument("--remove", metavar="NAME")
    parser.add_argument("--repository", type=Path, default=_REPOSITORY)
    given, others = parser.parse_known_args(arguments)
    if given.remove is None:
        return False
    if others:
        parser.error(f"--remove NAME goes with --repository alone, not with {others[0]}")
    folders = remove_pipeline(given.repository, given.remove)
    print(f"{given.remove} is no longer in {given.repository} ({len(folders)} folders removed)")
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0 when all is well, 2 with one sentence when not."""
    arguments = sys.argv[1:] if arguments is None else arguments
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log = logging.getLogger("export")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    started = time.monotonic()
    try:
        if remove(arguments):
            return 0
        options = parse_options(arguments)
        run_export(options)
    except CloseupError as error:
        print(f"export: {error}", file=sys.stderr)
        return 2
    finally:
        log.removeHandler(handler)
    print(f"{options.name} is in {options.repository} ({time.monotonic() - started:.1f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
