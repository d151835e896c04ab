"""Running requests end before a server is told to stop."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from closeup.drain import drain, is_draining, main, slots_in_use

METRICS = """# HELP closeup_slots_in_use Pictures in flight
# TYPE closeup_slots_in_use gauge
closeup_slots_in_use{{model="a"}} {0}
closeup_slots_in_use{{model="b"}} 0
nv_cpu_utilization 0.5
"""


@contextmanager
def metrics(values: list[float]) -> Iterator[str]:
    """A server whose slots are the values in turn; the last one stays."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            value = values.pop(0) if len(values) > 1 else values[0]
            self.send_response(200)
            self.end_headers()
            self.wfile.write(METRICS.format(value).encode())

        def log_message(self, format: str, *args: object) -> None:
            """Nothing."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/metrics"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_slots_of_all_denoisers_are_counted() -> None:
    assert slots_in_use(METRICS.format(3)) == 3
    assert slots_in_use("nv_cpu_utilization 0.5") == 0


def test_drain_waits_until_no_slot_is_in_use(tmp_path: Path) -> None:
    values = [2.0, 1.0, 1.0, 0.0]
    with metrics(values) as url:
        assert drain(tmp_path / "draining", url, limit_s=30)
    assert values == [0.0]
    assert (tmp_path / "draining").exists()


def test_drain_gives_up_at_its_limit(tmp_path: Path) -> None:
    with metrics([1.0]) as url:
        assert not drain(tmp_path / "draining", url, limit_s=0.25)
        arguments = ["--file", str(tmp_path / "draining"), "--metrics-url", url, "--limit-s", "0"]
        assert main(arguments) == 1


def test_drain_is_over_at_once_when_no_server_answers(tmp_path: Path) -> None:
    with metrics([1.0]) as url:
        pass
    assert drain(tmp_path / "draining", url, limit_s=30)


def test_server_is_draining_while_its_file_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CLOSEUP_DRAIN_FILE", raising=False)
    assert not is_draining()
    monkeypatch.setenv("CLOSEUP_DRAIN_FILE", str(tmp_path / "draining"))
    assert not is_draining()
    (tmp_path / "draining").touch()
    assert is_draining()
