"""Start and stop the embedded Triton server (the ``tritonserver`` of the wheel nvidia-pytriton).

``python -m closeup.server`` serves a model repository until it is interrupted; in a program::

    with EmbeddedServer(ServerOptions(repository=Path("model_repository"))) as server:
        client = tritonclient.grpc.InferenceServerClient(server.grpc_url)
"""

from __future__ import annotations

import argparse
import http.client
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from types import FrameType, TracebackType
from typing import TextIO

from closeup import server_guard
from closeup.errors import ServerError
from closeup.server_layout import (
    Installation,
    check_platform,
    find_installation,
    lay_out_backends,
    make_environment,
)
from closeup.server_regions import Region, clear_dead_regions, create_region

_LOGGER = logging.getLogger(__name__)
_POLL_S = 0.05
_PORT_TRIES = 3
_TAIL_LINES = 25


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
        host: address to listen on. The default answers this machine only.
        http_port: 0 takes a free one, as with the other ports.
        grpc_port: see ``http_port``.
        metrics_port: see ``http_port``.
        lora_dir: folder of ``<id>.safetensors``; models read it as ``CLOSEUP_LORA_DIR``.
        request_timeout_s: the longest a request may take (``CLOSEUP_REQUEST_TIMEOUT_S``).
        slots: requests in flight at most (``CLOSEUP_SLOTS``).
        threads: threads of one engine call (``CLOSEUP_THREADS``).
        model_control: when models are loaded.
        log_verbose: Triton's verbosity, 0 is off.
        log_path: where the log is kept; None: a temporary file, removed when the server stops.
        start_timeout_s: how long loading may take.
        exit_timeout_s: how long running requests may take to finish at the end.
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
    threads: int | None = None
    model_control: ModelControl = ModelControl.NONE
    log_verbose: int = 0
    log_path: Path | None = None
    start_timeout_s: float = 600.0
    exit_timeout_s: int = 30
    shm_bytes: int = 4 << 20
    environment: Mapping[str, str] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()


class EmbeddedServer:
    """A running server; a context manager that starts on entry and stops on exit.

    Attributes:
        options: the options it was made with.
        http_url: ``host:port`` of the HTTP endpoint, once started.
        grpc_url: the same of gRPC.
        metrics_url: ``http://host:port/metrics``.
        log_path: the server's log, while it runs.
    """

    def __init__(self, options: ServerOptions) -> None:
        self.options = options
        self.http_url = ""
        self.grpc_url = ""
        self.metrics_url = ""
        self.log_path = Path()
        self._guard: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> EmbeddedServer:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int | None:
        """Process id of the guard, the parent of ``tritonserver``; None when not running."""
        return self._guard.pid if self._guard is not None else None

    def start(self) -> None:
        """Start and wait until every model is ready.

        Raises:
            ServerError: one sentence that says why not; nothing is left running.
        """
        if self._guard is not None:
            raise ServerError("This server is already running.")
        check_platform()
        installation = find_installation()
        _check_options(self.options)
        clear_dead_regions()
        for attempt in range(1, _PORT_TRIES + 1):
            try:
                return self._start_once(installation)
            except _PortLostError:
                # A free port, chosen a moment ago, went to someone else.
                if attempt == _PORT_TRIES:
                    raise
        return None

    def stop(self) -> None:
        """Stop and wait until nothing of the server is left; does nothing when not running."""
        guard, self._guard = self._guard, None
        if guard is None:
            return
        if guard.stdin is not None:
            guard.stdin.close()
        guard.wait()

    def wait(self) -> int:
        """Wait until the server ends by itself.

        Returns:
            Its exit status.
        """
        return self._guard.wait() if self._guard is not None else 0

    def _start_once(self, installation: Installation) -> None:
        options = _choose_ports(self.options)
        region = create_region()
        self.log_path = options.log_path or region.folder / "server.log"
        try:
            self._guard = _spawn_guard(options, installation, region, self.log_path)
        except BaseException:
            server_guard.remove_folder(region.folder)
            server_guard.remove_shared_memory(region.name)
            raise
        finally:
            region.close()
        self.http_url = f"{options.host}:{options.http_port}"
        self.grpc_url = f"{options.host}:{options.grpc_port}"
        self.metrics_url = f"http://{options.host}:{options.metrics_port}/metrics"
        # Opened now: the guard removes the server's folder before its end can be told.
        with self.log_path.open(encoding="utf-8", errors="replace") as log:
            try:
                self._wait_until_ready(options, log)
            except BaseException:
                self.stop()
                raise

    def _wait_until_ready(self, options: ServerOptions, log: TextIO) -> None:
        started = time.monotonic()
        guard = self._guard
        while guard is not None and guard.poll() is None:
            if _is_ready(options):
                _LOGGER.info("ready after %.1f s", time.monotonic() - started)
                return
            if time.monotonic() - started > options.start_timeout_s:
                raise ServerError(
                    f"The server was not ready after {options.start_timeout_s:g} s; the end of its "
                    f"log:\n{_tail(log.read())}"
                )
            time.sleep(_POLL_S)
        raise _error_from_log(log.read())


class _PortLostError(ServerError):
    """The server found a port taken that was free when it was chosen."""


def _check_options(options: ServerOptions) -> None:
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
    for name in ("threads", "slots", "request_timeout_s"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            flag = name.replace("_", "-")
            raise ServerError(f"--{flag} is {value}; expected a number above 0.")


def _choose_ports(options: ServerOptions) -> ServerOptions:
    """Replace each port 0 by a free one.

    Raises:
        ServerError: ports are taken; it names all of them, and the options that change them.
    """
    held: list[socket.socket] = []
    chosen: dict[str, int] = {}
    taken: list[str] = []
    try:
        for name in ("http_port", "grpc_port", "metrics_port"):
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
                taken.append(f"--{flag} {port} ({error.strerror.lower()})")
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
        *options.arguments,
    ]


def _spawn_guard(
    options: ServerOptions, installation: Installation, region: Region, log_path: Path
) -> subprocess.Popen[bytes]:
    backends = lay_out_backends(installation, region.folder)
    base = {**os.environ, **_variables_from_options(options), **options.environment}
    job = {
        "command": make_command(options, installation.binary, backends, region.name),
        "region": region.name,
        "folder": str(region.folder),
        "lock_fds": region.lock_fds,
        "grace_s": options.exit_timeout_s + 5,
    }
    log_path.parent.mkdir(parents=True, exist_ok=True)
    with log_path.open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-I", "-S", str(Path(server_guard.__file__)), json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=make_environment(installation, region.folder, base, options.threads),
            pass_fds=region.lock_fds,
            start_new_session=True,
        )


def _variables_from_options(options: ServerOptions) -> dict[str, str]:
    values = {
        "CLOSEUP_LORA_DIR": options.lora_dir and options.lora_dir.resolve(),
        "CLOSEUP_REQUEST_TIMEOUT_S": options.request_timeout_s,
        "CLOSEUP_SLOTS": options.slots,
        "CLOSEUP_THREADS": options.threads,
    }
    return {name: str(value) for name, value in values.items() if value is not None}


def _is_ready(options: ServerOptions) -> bool:
    host = "127.0.0.1" if options.host == "0.0.0.0" else options.host
    connection = http.client.HTTPConnection(host, options.http_port, timeout=5)
    try:
        connection.request("GET", "/v2/health/ready")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _tail(log: str) -> str:
    return "\n".join(log.splitlines()[-_TAIL_LINES:])


def _error_from_log(log: str) -> ServerError:
    """The error of a server that ended while it was to start."""
    reason = find_reason(log)
    kind = _PortLostError if "already in use" in reason else ServerError
    return kind(f"The server did not start: {reason}\nThe end of its log:\n{_tail(log)}")


def find_reason(log: str) -> str:
    """The most telling line of a failed start's log, as one sentence.

    Args:
        log: the log's text.
    """
    patterns = (
        r"failed to load '(?P<model>[^']+)' version [^:]*: (?P<text>[^\"\n]+)",
        r"(?P<text>Socket '[^']+' already in use)",
        r"error: creating server: (?P<text>[^\n]+)",
        r"^E\d+ [^\]]+\] \"?(?P<text>[^\"\n]+)",
    )
    for pattern in patterns:
        match = re.search(pattern, log, re.MULTILINE)
        if match:
            model = match.groupdict().get("model")
            text = match["text"].strip()
            return f"model {model}: {text}" if model else text
    lines = [line for line in log.splitlines() if line.strip()]
    return lines[-1] if lines else "it ended without a word."


def _follow_log(path: Path, write: Callable[[str], object], stopped: threading.Event) -> None:
    """Copy a growing file until ``stopped`` is set and its end is reached."""
    with path.open(encoding="utf-8", errors="replace") as file:
        while True:
            last = stopped.is_set()
            text = file.read()
            if text:
                write(text)
            elif last:
                return
            else:
                stopped.wait(0.2)


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
    parser.add_argument("--slots", type=int, help="requests in flight at most")
    parser.add_argument("--threads", type=int, help="threads of one engine call")
    parser.add_argument(
        "--model-control", type=ModelControl, choices=list(ModelControl), default="none"
    )
    parser.add_argument("--log-verbose", type=int, default=0)
    parser.add_argument("--log-path", type=Path, help="keep the log here")
    parser.add_argument("--exit-timeout-s", type=int, default=30)
    return ServerOptions(**vars(parser.parse_args(arguments)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    asked = threading.Event()

    def ask(number: int, frame: FrameType | None) -> None:
        asked.set()
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, ask)
    server = EmbeddedServer(options)
    stopped = threading.Event()
    follower: threading.Thread | None = None
    try:
        server.start()
        follower = threading.Thread(
            target=_follow_log, args=(server.log_path, sys.stderr.write, stopped), daemon=True
        )
        follower.start()
        sys.stdout.write(
            f"ready: HTTP http://{server.http_url}  gRPC {server.grpc_url}  "
            f"metrics {server.metrics_url}\n"
        )
        sys.stdout.flush()
        return server.wait()
    except KeyboardInterrupt:
        return 0
    except ServerError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    finally:
        server.stop()
        stopped.set()
        if follower is not None:
            follower.join()


if __name__ == "__main__":
    sys.exit(main())
