"""Start and stop the embedded Triton server (the ``tritonserver`` of the wheel nvidia-pytriton).

``python -m closeup.server`` serves a model repository until it is interrupted; in a program::

    with EmbeddedServer(ServerOptions(repository=Path("model_repository"))) as server:
        client = tritonclient.grpc.InferenceServerClient(server.grpc_url)
"""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import TextIO

from closeup import server_guard
from closeup.drain import DRAIN_VARIABLE, drain
from closeup.errors import ServerError
from closeup.server_layout import (
    Installation,
    check_platform,
    find_installation,
    lay_out_backends,
    make_environment,
)
from closeup.server_log import cut_tail, find_reason
from closeup.server_options import (
    ServerOptions,
    check_options,
    choose_ports,
    make_command,
    parse_arguments,
    variables_from_options,
)
from closeup.server_regions import Region, clear_dead_regions, create_region, region_exists

__all__ = ["EmbeddedServer", "ServerOptions", "error_from_log", "main"]

_LOGGER = logging.getLogger(__name__)
_POLL_S = 0.05
_PORT_TRIES = 3
_CLEAR_S = 5.0
_DRAIN_NAME = "draining"


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
        self._region_name = ""
        self._drain_file = Path()

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
        check_options(self.options)
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
        """Stop and wait until nothing of the server is left; does nothing when not running.

        Running requests have ``exit_timeout_s`` to finish; new ones are refused meanwhile.
        """
        guard, self._guard = self._guard, None
        if guard is None:
            return
        if guard.poll() is None and self._drain_file.parent.exists():
            drain(self._drain_file, self.metrics_url, self.options.exit_timeout_s)
        with contextlib.suppress(BrokenPipeError):
            guard.communicate(b"stop")
        # Does something only where the guard was killed; then the server's processes end within
        # a second or two, and until then hold their locks.
        deadline = time.monotonic() + _CLEAR_S
        while region_exists(self._region_name) and time.monotonic() < deadline:
            clear_dead_regions()
            time.sleep(_POLL_S)

    def wait(self) -> int:
        """Wait until the server ends by itself.

        Returns:
            Its exit status.
        """
        return self._guard.wait() if self._guard is not None else 0

    def _start_once(self, installation: Installation) -> None:
        options = choose_ports(self.options)
        region = create_region()
        self._region_name = region.name
        self._drain_file = region.folder / _DRAIN_NAME
        self.log_path = options.log_path or region.folder / "server.log"
        try:
            log = self._spawn_guard(options, installation, region)
        except BaseException as error:
            server_guard.remove_folder(region.folder)
            server_guard.remove_shared_memory(region.name)
            if isinstance(error, OSError):
                raise ServerError(f"The server did not start: {error}.") from error
            raise
        finally:
            region.close()
        with log:
            try:
                self._wait_until_ready(options, log)
            except BaseException:
                self.stop()
                raise

    def _spawn_guard(
        self, options: ServerOptions, installation: Installation, region: Region
    ) -> TextIO:
        """Start the guard; returns the log, open, since the guard may remove it at its end."""
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        self.log_path.write_bytes(b"")
        log = self.log_path.open(encoding="utf-8", errors="replace")
        try:
            self._guard = _spawn_guard(options, installation, region, self.log_path)
        except BaseException:
            log.close()
            raise
        self.http_url = f"{options.host}:{options.http_port}"
        self.grpc_url = f"{options.host}:{options.grpc_port}"
        self.metrics_url = f"http://{options.host}:{options.metrics_port}/metrics"
        return log

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
                    f"log:\n{cut_tail(log.read())}"
                )
            time.sleep(_POLL_S)
        raise error_from_log(log.read())


class _PortLostError(ServerError):
    """The server found a port taken that was free when it was chosen."""


def _spawn_guard(
    options: ServerOptions, installation: Installation, region: Region, log_path: Path
) -> subprocess.Popen[bytes]:
    backends = lay_out_backends(installation, region.folder)
    base = {
        **os.environ,
        **variables_from_options(options),
        DRAIN_VARIABLE: str(region.folder / _DRAIN_NAME),
        **options.environment,
    }
    job = {
        "command": make_command(options, installation.binary, backends, region.name),
        "region": region.name,
        "folder": str(region.folder),
        "lock_fds": region.lock_fds,
        "grace_s": options.exit_timeout_s + 5,
    }
    with log_path.open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-I", "-S", str(Path(server_guard.__file__)), json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=make_environment(installation, region.folder, base, options.threads),
            pass_fds=region.lock_fds,
            start_new_session=True,
        )


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


def error_from_log(log: str) -> ServerError:
    """The error of a server that ended while it was to start, made from its log's text."""
    reason = find_reason(log)
    kind = _PortLostError if "already in use" in reason else ServerError
    return kind(f"The server did not start: {reason}\nThe end of its log:\n{cut_tail(log)}")


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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status.

    The first SIGINT or SIGTERM stops the server. Later ones do nothing: the running requests have
    ``--exit-timeout-s`` to finish, and this process does not end before the server has.
    """
    options = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    stopping = threading.Event()

    def ask(number: int, frame: FrameType | None) -> None:
        if not stopping.is_set():
            stopping.set()
            raise KeyboardInterrupt

    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # a script's background job
        signal.signal(signal.SIGINT, ask)
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
        status = server.wait()
        sys.stderr.write(f"The server ended by itself with status {status}; see its log above.\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write(f"Stopping; running requests have {options.exit_timeout_s} s to finish.\n")
        return 0
    except ServerError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    finally:
        stopping.set()
        server.stop()
        stopped.set()
        if follower is not None:
            follower.join()


if __name__ == "__main__":
    sys.exit(main())
