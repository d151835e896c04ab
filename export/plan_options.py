"""What the command line says about plans."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from closeup.cache_files import CACHE_VARIABLE, cache_folder
from closeup.errors import ExportError
from closeup.manifest import SizeRange
from export.sizes import parse_sizes

DEFAULT_LORA_ROWS = 16
_SM = re.compile(r"\d+\.\d")


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanOptions:
    """How plans are built.

    Attributes:
        sizes: of the pictures; empty: a range around the model's native size.
        sms: compute capabilities that TensorRT-RTX builds for; empty: its usual ones.
        lora_rows: LoRA combinations resident at once.
        cache: folder of built plans and timings.
        cache_gb: of plans kept there; 0 keeps none.
        command: what the user typed, for the records.
        given: flags that were typed.
    """

    sizes: tuple[SizeRange, ...] = ()
    sms: tuple[str, ...] = ()
    lora_rows: int = DEFAULT_LORA_ROWS
    cache: Path = field(default_factory=cache_folder)
    cache_gb: float = 64.0
    command: str = "python -m export"
    given: tuple[str, ...] = ()


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of plans to a command line."""
    add = parser.add_argument_group("plans: --target tensorrt and tensorrt-rtx").add_argument
    add("--sizes", help="pictures that plans are built for, WIDTHxHEIGHT px: a list, e.g. "
        "512x512,768x1024, each as quick as can be, or a range, e.g. 512x512-1024x1024; the "
        "native square is always added; default: a range around it")  # fmt: skip
    add("--lora-rows", type=int, help=f"LoRA combinations resident at once ({DEFAULT_LORA_ROWS})")
    add("--sms", help="compute capabilities that tensorrt-rtx builds for, e.g. 8.9,12.0")
    add("--cache", type=Path, help=f"folder of built plans and timings; default: {CACHE_VARIABLE}"
        " or the user's cache")  # fmt: skip
    add("--cache-gb", type=float, help="of plans kept in the cache (64); 0 keeps none")


def plan_options(parsed: argparse.Namespace, arguments: Sequence[str]) -> PlanOptions:
    """Return the options of plans from a parsed command line.

    Args:
        parsed: by the parser of `add_plan_arguments`.
        arguments: the command line itself.

    Raises:
        ExportError: sizes that are none.
    """
    names = ("sizes", "lora_rows", "sms", "cache", "cache_gb")
    given = {name: getattr(parsed, name) for name in names if getattr(parsed, name) is not None}
    flags = tuple(f"--{name.replace('_', '-')}" for name in given)
    if "sizes" in given:
        given["sizes"] = parse_sizes(given["sizes"])
    if "sms" in given:
        given["sms"] = tuple(sm.strip() for sm in given["sms"].split(","))
    command = shlex.join(["python", "-m", "export", *arguments])
    return PlanOptions(**given, command=command, given=flags)


def check_plan_options(options: PlanOptions, *, has_plans: bool) -> None:
    """Refuse options that cannot be right.

    Raises:
        ExportError: with one sentence.
    """
    if options.given and not has_plans:
        raise ExportError(
            f"{options.given[0]} is an option of plans: give --target tensorrt or tensorrt-rtx, or "
            "leave it out."
        )
    if not 1 <= options.lora_rows <= 256:
        raise ExportError(f"--lora-rows {options.lora_rows}: expected 1 to 256.")
    if not 0 <= options.cache_gb <= 1e6:
        raise ExportError(f"--cache-gb {options.cache_gb:g}: expected 0 to 1000000.")
    for sm in options.sms:
        if not _SM.fullmatch(sm):
            raise ExportError(f"--sms {sm}: expected compute capabilities like 8.9,12.0.")
