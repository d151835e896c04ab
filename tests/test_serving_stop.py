"""A server that is stopped finishes what runs and refuses what is new."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
from closeup_client import Client, Unavailable

from closeup.server import EmbeddedServer, ServerOptions
from tests.test_serving import LONG, SMALL, metric


@pytest.mark.triton
def test_running_requests_end_well_and_new_ones_are_refused_when_a_server_stops(
    demo_repository: Path,
) -> None:
    options = ServerOptions(
        repository=demo_repository, http_port=0, grpc_port=0, metrics_port=0, exit_timeout_s=120,
    )  # fmt: skip
    done: dict[str, Any] = {}
    with EmbeddedServer(options) as server, Client(server.grpc_url, timeout_s=200) as client:
        client.generate(**SMALL)  # opens the engines

        def ask() -> None:
            done["result"] = client.generate(**LONG)

        running = threading.Thread(target=ask)
        running.start()
        deadline = time.monotonic() + 60
        while not metric(server, "closeup_slots_in_use") and time.monotonic() < deadline:
            time.sleep(0.02)
        stopping = threading.Thread(target=server.stop)
        stopping.start()
        while not server._drain_file.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert running.is_alive()
        with pytest.raises(Unavailable, match="shutting down"):
            client.generate(**SMALL)
        running.join(200)
        stopping.join(200)
    assert done["result"].info["steps"] == LONG["steps"]
