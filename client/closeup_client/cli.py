"""The command line: ``closeup-client generate | models | loras | health``.

Exit codes: 0 done, 2 bad input, 3 no server or a full one, 1 anything else.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from closeup_client import errors
from closeup_client.checks import expected
from closeup_client.client import DEFAULT_TIMEOUT_S, Client
from closeup_client.fields import FIELDS, Field, Kind
from closeup_client.progress import ProgressDisplay
from closeup_client.report import lora_table, print_result, served_table
from closeup_client.result import Progress, Result

OK, FAILED, BAD_INPUT, NO_SERVER = 0, 1, 2, 3


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code and prints no traceback."""
    options = build_parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], int] = options.command
    pressed: list[int] = []

    def interrupt(number: int, frame: object) -> None:
        pressed.append(number)  # gRPC may swallow what is raised here
        raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, interrupt)
    try:
        return command(options)
    except KeyboardInterrupt:
        return _fail(options, errors.Cancelled("cancelled."))
    except BrokenPipeError:  # the reader of our output has left, as `| head` does
        sys.stderr.close()
        return FAILED
    except errors.ClientError as error:
        return _fail(options, errors.Cancelled("cancelled.") if pressed else error)
    except OSError as error:
        return _fail(options, errors.ClientError(f"cannot write the files: {error}."))


def build_parser() -> argparse.ArgumentParser:
    """The options; those of `generate` are made from the request fields."""
    parser = argparse.ArgumentParser(
        prog="closeup-client", description="Pictures with repainted faces, from a closeup server."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_generate(commands)
    models = commands.add_parser("models", help="what the server serves", allow_abbrev=False)
    loras = commands.add_parser("loras", help="what its LoRA folder holds", allow_abbrev=False)
    loras.add_argument("--model", metavar="NAME", help="default: the first that is ready")
    health = commands.add_parser("health", help="whether it takes work", allow_abbrev=False)
    for command, run in ((models, run_models), (loras, run_loras), (health, run_health)):
        command.set_defaults(command=run)
        _add_server(command.add_argument_group("server"))
    return parser


def _add_generate(commands: Any) -> None:
    parser = commands.add_parser(
        "generate",
        help="make pictures",
        description="Make pictures. Every request field is an option.",
        allow_abbrev=False,
    )
    parser.set_defaults(command=run_generate)
    fields = parser.add_argument_group("request")
    for field in FIELDS:
        _add_field(fields, field)
    out = parser.add_argument_group("output")
    out.add_argument("--out", type=Path, default=Path("out"), help="folder for the files (out)")
    out.add_argument(
        "--sheet",
        action="store_true",
        help="also write sheet.png, before and after the face pass; turns --stages on",
    )
    _add_server(parser.add_argument_group("server"))


def _add_field(group: Any, field: Field) -> None:
    takes = "PNG, JPEG or WebP" if field.kind is Kind.IMAGE else expected(field)
    default = "" if field.default == "required" else f"; default: {field.default}"
    text = f"{field.doc} {takes[0].upper()}{takes[1:]}{default}."
    text = text.replace("`", "").replace("%", "%%")
    if field.name == "prompt":
        group.add_argument("prompt", metavar="PROMPT", help=text)
        return
    flag = f"--{field.name.replace('_', '-')}"
    # Values stay text: checks.py turns them into numbers, with one sentence for what it refuses.
    if field.kind is Kind.BOOL:
        boolean = argparse.BooleanOptionalAction
        group.add_argument(flag, dest=field.name, action=boolean, default=None, help=text)
    elif field.kind is Kind.IMAGE:
        group.add_argument(flag, dest=field.name, type=Path, metavar="FILE", help=text)
    else:
        metavar = {Kind.INT: "N", Kind.FLOAT: "X"}.get(field.kind, "TEXT")
        group.add_argument(flag, dest=field.name, metavar=metavar, help=text)


def _add_server(group: Any) -> None:
    group.add_argument("--url", help="host:port or a URL (localhost:8001, or :8000 for http)")
    group.add_argument("--protocol", choices=("grpc", "http"), help="default: the URL's, or grpc")
    group.add_argument(
        "--timeout-s",
        type=float,
        default=DEFAULT_TIMEOUT_S,
        metavar="S",
        help=f"longest wait, seconds ({DEFAULT_TIMEOUT_S:g})",
    )
    group.add_argument("--json", action="store_true", help="only JSON on standard output")


def run_generate(options: argparse.Namespace) -> int:
    """Send one request, show its progress, write its files."""
    fields = {
        field.name: getattr(options, field.name)
        for field in FIELDS
        if getattr(options, field.name) is not None
    }
    if options.sheet:
        fields["stages"] = True
        _check_sheet(fields)
    options.out.mkdir(parents=True, exist_ok=True)  # before the work, lest it be for nothing
    result = _watched(options, fields)
    files = result.save(options.out)
    if options.sheet:
        files += _write_sheets(result, options.out)
    if options.json:
        _print_json({"info": result.info, "files": [str(path) for path in files]})
    else:
        print_result(Console(), result, files)
    return OK


def _watched(options: argparse.Namespace, fields: dict[str, Any]) -> Result:
    with (
        Client(options.url, options.protocol, options.timeout_s) as client,
        closing(client.stream(**fields)) as events,
        ProgressDisplay(sys.stderr) as display,
    ):
        for event in events:
            if isinstance(event, Progress):
                display.update(event)
                if event.preview:
                    (options.out / "preview.jpg").write_bytes(event.preview)
            else:
                result = event
    return result


def _check_sheet(fields: dict[str, Any]) -> None:
    if not fields.get("inpaint_faces"):
        problem = "shows what the face pass did; add --inpaint-faces."
        raise errors.InvalidRequest({"--sheet": problem})
    try:
        import closeup_client.sheet  # noqa: F401
    except ImportError:
        problem = "needs Pillow: pip install 'closeup-client[sheet]'."
        raise errors.InvalidRequest({"--sheet": problem}) from None


def _write_sheets(result: Result, folder: Path) -> list[Path]:
    from closeup_client.sheet import sheet_from_result

    paths = []
    for index in range(len(result.images)):
        name = f"sheet_{index}.png" if len(result.images) > 1 else "sheet.png"
        (folder / name).write_bytes(sheet_from_result(result, index))
        paths.append(folder / name)
    return paths


def run_models(options: argparse.Namespace) -> int:
    """Say what is served."""
    with Client(options.url, options.protocol, options.timeout_s) as client:
        served = client.models()
    if options.json:
        _print_json(asdict(served))
    else:
        Console().print(served_table(served))
    return OK


def run_loras(options: argparse.Namespace) -> int:
    """Say what the LoRA folder holds."""
    with Client(options.url, options.protocol, options.timeout_s) as client:
        loras = client.loras(options.model)
    if options.json:
        _print_json([asdict(lora) for lora in loras])
    elif loras:
        Console().print(lora_table(loras))
    else:
        print("The server has no LoRAs; it takes their folder as --lora-dir.")
    return OK


def run_health(options: argparse.Namespace) -> int:
    """Say whether the server takes work."""
    with Client(options.url, options.protocol, options.timeout_s) as client:
        health = client.health()
    if options.json:
        _print_json(asdict(health))
    else:
        state = "ready" if health.ready else "live, not ready" if health.live else "not live"
        print(f"{health.url}: {state} ({health.server} {health.version})")
    return OK if health.ready else NO_SERVER


def _fail(options: argparse.Namespace, error: errors.ClientError) -> int:
    problems = error.problems if isinstance(error, errors.InvalidRequest) else {}
    lines = [f"{field}: {text}" for field, text in problems.items()] or [error.message]
    for line in lines:
        print(f"closeup-client: {line}", file=sys.stderr)
    if options.json:
        body: dict[str, Any] = {"code": error.code, "message": error.message}
        if problems:
            body["problems"] = problems
        _print_json({"error": body})
    if isinstance(error, errors.InvalidRequest):
        return BAD_INPUT
    return NO_SERVER if isinstance(error, errors.Unavailable) else FAILED


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


if __name__ == "__main__":
    sys.exit(main())
