"""The short tables a finished request ends with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from closeup_client.progress import stage_title
from closeup_client.result import Result
from closeup_client.served import Served, ServedLora

_ACTIONS = {"repaint": "repainted", "skip": "skipped"}


def print_result(console: Console, result: Result, files: Sequence[Path]) -> None:
    """Stages with milliseconds, one row a face, files written, warnings."""
    console.print(escape(summary(result)), highlight=False)
    console.print()
    console.print(stage_table(result.info.get("timings_ms") or {}))
    console.print()
    faces = [(i, face) for i in range(len(result.images)) for face in result.faces(i)]
    if faces:
        console.print(face_table(faces, several=len(result.images) > 1))
        console.print()
    elif result.face_pass:
        console.print("No faces were found.\n")
    for path in files:
        size = path.stat().st_size
        console.print(
            f"{escape(str(path))}  {max(size / 1024, 1):.0f} KiB", highlight=False, soft_wrap=True
        )
    for warning in result.warnings:
        console.print(f"warning: {escape(warning)}", style="yellow", soft_wrap=True)


def summary(result: Result) -> str:
    """One line: model, sizes, steps, sampler, seeds; what it takes to make the picture again."""
    info = result.info
    sizes = [info.get("generated_size"), info.get("size")]
    texts = [f"{size[0]} x {size[1]}" for size in sizes if size]
    parts = [
        str(info.get("model", "")),
        f"{' -> '.join(dict.fromkeys(texts))} px" if texts else "",
        f"{info['steps']} steps" if "steps" in info else "",
        str(info.get("scheduler", "")),
        f"cfg {info['cfg_scale']:g}" if "cfg_scale" in info else "",
        f"seed {', '.join(map(str, result.seeds))}" if result.seeds else "",
    ]
    return ", ".join(part for part in parts if part)


def stage_table(timings_ms: Mapping[str, float]) -> Table:
    """Milliseconds of each stage, and their sum."""
    table = _table("stage", ">ms")
    for stage, ms in timings_ms.items():
        table.add_row(escape(stage_title(stage)), f"{ms:.0f}")
    table.add_row("sum", f"{sum(timings_ms.values()):.0f}")
    return table


def face_result(face: Mapping[str, Any]) -> tuple[str, float | None]:
    """What was done to a face, in words, and how strongly; None where nothing was."""
    action = str(face.get("action") or "")
    words = _ACTIONS.get(action, action)
    if face.get("reason"):
        words = f"{words}: {face['reason']}" if words else str(face["reason"])
    strength = face.get("strength")
    return words, None if strength is None or action == "skip" else float(strength)


def face_table(faces: Sequence[tuple[int, Mapping[str, Any]]], *, several: bool) -> Table:
    """One row a face; `several` says whether the picture's index is worth a column."""
    heads = ["face", ">at", ">size", ">score", ">strength", "result"]
    table = _table(*(["picture", *heads] if several else heads))
    for image, face in faces:
        x0, y0, x1, y1 = (float(edge) for edge in face["box"])
        number = int(face.get("index", 0))
        words, strength = face_result(face)
        cells = [
            str(number),
            f"{x0:.0f}, {y0:.0f}",
            f"{x1 - x0:.0f} x {y1 - y0:.0f}",
            f"{float(face.get('score') or 0):.2f}",
            "" if strength is None else f"{strength:.2f}",
            escape(words),
        ]
        table.add_row(*([str(image), *cells] if several else cells))
    return table


def served_table(served: Served) -> Table:
    """Pipelines first, then the parts that all of them share."""
    table = _table("name", "what", "state")
    for model in served.pipelines:
        text = model.state if model.ready else f"{model.state} {model.reason}".strip()
        table.add_row(escape(model.name), "pipeline", escape(text))
    for name, state, use in (
        ("upscaler", served.upscaler, "super_resolution"),
        ("face_detector", served.face_detector, "inpaint_faces"),
    ):
        table.add_row(name, f"for {use}", escape(state or "missing"))
    return table


def lora_table(loras: Sequence[ServedLora]) -> Table:
    """One row a LoRA; what it adapts is known of those that the server has read."""
    table = _table("id", ">KiB", "adapts")
    table.columns[0].overflow = "fold"  # an id that is cut cannot be copied
    for lora in loras:
        adapts = "not loaded yet" if lora.networks is None else ", ".join(lora.networks)
        table.add_row(escape(lora.id), f"{max(lora.size_bytes / 1024, 1):.0f}", escape(adapts))
    return table


def _table(*heads: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="")
    for head in heads:
        table.add_column(head.lstrip(">"), justify="right" if head.startswith(">") else "left")
    return table
