"""The embedded server's options: checked, and turned into a command line and an environment."""

from __future__ import annotations

import argparse
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path

from closeup.errors import ServerError

_PORTS = ("http_port", "grpc_port", "metrics_port")


class ModelControl(str, Enum):
    """Triton's ``--model-control-mode``: load everything once, or on request."""

    NONE = "none"
    EXPLICIT = "explicit"
    POLL = "poll"


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerOptions:
    """What to serve and how.

    Attributes:
        repository: folder of models.
        host: IPv4 address, or its name, to listen on. The default answers this machine only.
        http_port: 0 takes a free one, as with the other ports.
        grpc_port: see ``http_port``.
        metrics_port: see ``http_port``.
        lora_dir: folder of ``<id>.safetensors``; models read it as ``CLOSEUP_LORA_DIR``.
        request_timeout_s: the longest a request may take (``CLOSEUP_REQUEST_TIMEOUT_S``).
        slots: pictures in flight at most (``CLOSEUP_SLOTS``).
        max_pixels: width times height of a request at most, before super-resolution
            (``CLOSEUP_MAX_PIXELS``).
        lora_rows: LoRA combinations resident at once (``CLOSEUP_LORA_ROWS``).
        lora_cache_bytes: LoRA files kept in memory (``CLOSEUP_LORA_CACHE_BYTES``).
        threads: threads of one engine call (``CLOSEUP_THREADS``).
        model_control: when models are loaded.
        log_verbose: Triton's verbosity, 0 is off.
        log_path: where the log is kept; None: a temporary file, removed when the server stops.
        start_timeout_s: how long loading may take.
        exit_timeout_s: how long running requests may take to finish at the end; new ones are
            refused from then on.
        shm_bytes: shared memory that each Python model starts with; it grows by the same.
        environment: further variables for the server's processes.
        arguments: further arguments of ``tritonserver``.
    """

    repository: Path
    host: str = "127.0.0.1"
    http_port: int = 8000
    grpc_port: int = 8001
    metrics_port: int = 8002
    lora_dir: Path | None = None
    request_timeout_s: float | None = None
    slots: int | None = None
    max_pixels: int | None = None
    lora_rows: int | None = None
    lora_cache_bytes: int | None = None
    threads: int | None = None
    model_control: ModelControl = ModelControl.NONE
    log_verbose: int = 0
    log_path: Path | None = None
    start_timeout_s: float = 600.0
    exit_timeout_s: int = 30
    shm_bytes: int = 4 << 20
    environment: Mapping[str, str] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()


def check_options(options: ServerOptions) -> None:
    """Refuse what can be known to be wrong before anything starts.

    Raises:
        ServerError: one sentence that names the option.
    """
    repository = options.repository
    if not repository.is_dir():
        raise ServerError(
            f"There is no model repository at {repository}; write one with `python -m export` or "
            "name another with --repository."
        )
    explicit = options.model_control is not ModelControl.NONE
    if not explicit and not any(repository.glob("*/[0-9]*/*")):
        raise ServerError(
            f"The model repository {repository} holds no model; expected folders like "
            "NAME/1/model.onnx (`python -m export` writes them)."
        )
    if options.lora_dir is not None and not options.lora_dir.is_dir():
        raise ServerError(f"There is no folder of LoRAs at {options.lora_dir} (--lora-dir).")
    positive = (
        "threads",
        "slots",
        "request_timeout_s",
        "max_pixels",
        "lora_rows",
        "lora_cache_bytes",
    )
    for name in positive:
        value = getattr(options, name)
        if value is not None and value <= 0:
            flag = name.replace("_", "-")
            raise ServerError(f"--{flag} is {value}; expected a number above 0.")
    for name in _PORTS:
        if not 0 <= getattr(options, name) <= 65535:
            flag, port = name.replace("_", "-"), getattr(options, name)
            raise ServerError(f"--{flag} is {port}; expected 0 to 65535 (0 takes a free one).")
    _check_host(options.host)
    if options.log_path is not None:
        _check_log_path(options.log_path)


def _check_host(host: str) -> None:
    try:
        if not host:  # would listen everywhere
            raise OSError("it is empty")
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
            listener.bind((host, 0))
    except (OSError, UnicodeError) as error:
        raise ServerError(
            f"--host {host!r} is no IPv4 address of this machine ({_reason(error)}); expected one, "
            "such as 127.0.0.1, or 0.0.0.0 for all of them."
        ) from error


def _check_log_path(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()
    except OSError as error:
        raise ServerError(
            f"--log-path {path} cannot be written ({_reason(error)}); expected a file, in a folder "
            "that you may write to."
        ) from error


def _reason(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error)).lower()


def choose_ports(options: ServerOptions) -> ServerOptions:
    """Replace each port 0 by a free one.

    Raises:
        ServerError: ports are taken; it names all of them, and the options that change them.
    """
    held: list[socket.socket] = []
    chosen: dict[str, int] = {}
    taken: list[str] = []
    try:
        for name in _PORTS:
            port = getattr(options, name)
            listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            held.append(listener)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind((options.host, port))
                listener.listen(1)  # with SO_REUSEADDR only listening shows that it is taken
                chosen[name] = listener.getsockname()[1]
            except OSError as error:
                flag = name.replace("_", "-")
                taken.append(f"--{flag} {port} ({_reason(error)})")
    finally:
        for listener in held:
            listener.close()
    if taken:
        raise ServerError(
            f"The server cannot listen on {options.host} at {' and '.join(taken)}; stop what "
            "listens there or choose another (0 takes a free one)."
        )
    return replace(options, **chosen)  # type: ignore[arg-type]


def make_command(
    options: ServerOptions, binary: Path, backends: Path, region_name: str
) -> list[str]:
    """The command line of ``tritonserver``.

    Args:
        options: with every port chosen.
        binary: the program.
        backends: the backend folder.
        region_name: prefix of its shared-memory files.
    """
    shm = options.shm_bytes
    return [
        str(binary),
        f"--model-repository={options.repository.resolve()}",
        f"--backend-directory={backends}",
        f"--model-control-mode={options.model_control.value}",
        f"--http-address={options.host}",
        f"--http-port={options.http_port}",
        f"--grpc-address={options.host}",
        f"--grpc-port={options.grpc_port}",
        f"--metrics-address={options.host}",
        f"--metrics-port={options.metrics_port}",
        f"--backend-config=python,shm-region-prefix-name={region_name}_",
        f"--backend-config=python,shm-default-byte-size={shm}",
        f"--backend-config=python,shm-growth-byte-size={shm}",
        f"--exit-timeout-secs={options.exit_timeout_s}",
        f"--log-verbose={options.log_verbose}",
        f"--allow-gpu-metrics={str(Path('/dev/nvidiactl').exists()).lower()}",
        *options.arguments,
    ]


def variables_from_options(options: ServerOptions) -> dict[str, str]:
    """The environment variables through which models read the options; none for an unset one."""
    values = {
        "CLOSEUP_LORA_DIR": options.lora_dir and options.lora_dir.resolve(),
        "CLOSEUP_REQUEST_TIMEOUT_S": options.request_timeout_s,
        "CLOSEUP_SLOTS": options.slots,
        "CLOSEUP_THREADS": options.threads,
        "CLOSEUP_MAX_PIXELS": options.max_pixels,
        "CLOSEUP_LORA_ROWS": options.lora_rows,
        "CLOSEUP_LORA_CACHE_BYTES": options.lora_cache_bytes,
    }
    return {name: str(value) for name, value in values.items() if value is not None}


def parse_arguments(arguments: Sequence[str]) -> ServerOptions:
    """Options from a command line."""
    parser = argparse.ArgumentParser(
        prog="python -m closeup.server", description="Serve a model repository until interrupted."
    )
    parser.add_argument("--repository", type=Path, default=Path("model_repository"))
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 answers other machines too")
    parser.add_argument("--http-port", type=int, default=8000, help="0 takes a free one")
    parser.add_argument("--grpc-port", type=int, default=8001)
    parser.add_argument("--metrics-port", type=int, default=8002)
    parser.add_argument("--lora-dir", type=Path, help="folder of <id>.safetensors")
    parser.add_argument("--request-timeout-s", type=float, help="longest a request may take")
    parser.add_argument("--slots", type=int, help="pictures in flight at most (16)")
    parser.add_argument("--max-pixels", type=int, help="w times h of a request at most (2048x2048)")
    parser.add_argument("--lora-rows", type=int, help="LoRA combinations resident at once (16)")
    parser.add_argument("--lora-cache-bytes", type=int, help="LoRA files kept in memory (1 GiB)")
    parser.add_argument("--threads", type=int, help="threads of one engine call")
    controls = [control.value for control in ModelControl]
    parser.add_argument("--model-control", choices=controls, default="none")
    parser.add_argument("--log-verbose", type=int, default=0)
    parser.add_argument("--log-path", type=Path, help="keep the log here")
    parser.add_argument(
        "--exit-timeout-s",
        type=int,
        default=os.environ.get("CLOSEUP_EXIT_TIMEOUT_S", "30"),
        help="how long running requests may take to finish at the end (CLOSEUP_EXIT_TIMEOUT_S)",
    )
    values = vars(parser.parse_args(arguments))
    return ServerOptions(**{**values, "model_control": ModelControl(values["model_control"])})
