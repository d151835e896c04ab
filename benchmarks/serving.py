"""The server side: started for a subject, asked through the client, its counters read."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from closeup_client import Client, Result

from benchmarks.subjects import Subject
from closeup.server import EmbeddedServer, ServerOptions

ENGINE_SECONDS = "closeup_engine_seconds_total"
ENGINE_CALLS = "closeup_engine_calls_total"
SEQUENCE_STEPS = "closeup_sequence_steps_total"
_METRIC = re.compile(r'^(\w+)\{model="([^"]*)"\} (\S+)$', re.MULTILINE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Counters:
    """Totals since the server's start.

    Attributes:
        engine_s: Triton model -> seconds inside its engine.
        calls: Triton model -> engine runs (a batch of requests counts once).
        sequence_steps: steps of single sequences, over all denoisers.
    """

    engine_s: Mapping[str, float]
    calls: Mapping[str, float]
    sequence_steps: float

    def since(self, earlier: Counters) -> Counters:
        """Return what was added since ``earlier``."""

        def added(now: Mapping[str, float], then: Mapping[str, float]) -> dict[str, float]:
            return {name: value - then.get(name, 0) for name, value in now.items()}

        return Counters(
            engine_s=added(self.engine_s, earlier.engine_s),
            calls=added(self.calls, earlier.calls),
            sequence_steps=self.sequence_steps - earlier.sequence_steps,
        )


def counters_from(statistics: Mapping[str, Any], metrics: str) -> Counters:
    """Read the counters.

    Args:
        statistics: the answer of ``/v2/models/stats``. The engines behind the ``onnxruntime``
            backend are read from it: the time of each execution in the model's process.
        metrics: the text of the metrics endpoint, where the denoisers count their engine calls.
    """
    engine_s: dict[str, float] = {}
    calls: dict[str, float] = {}
    for model in statistics["model_stats"]:
        runs = model.get("batch_stats", ())
        engine_s[model["name"]] = sum(run["compute_infer"]["ns"] for run in runs) / 1e9
        calls[model["name"]] = float(sum(run["compute_infer"]["count"] for run in runs))
    steps = 0.0
    for metric, model, value in _METRIC.findall(metrics):
        if metric == ENGINE_SECONDS:
            engine_s[model] = float(value)
        elif metric == ENGINE_CALLS:
            calls[model] = float(value)
        elif metric == SEQUENCE_STEPS:
            steps += float(value)
    for entry in ("generate", "generate_stream"):  # they run no engine
        engine_s.pop(entry, None)
        calls.pop(entry, None)
    return Counters(engine_s=engine_s, calls=calls, sequence_steps=steps)


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerRun:
    """One answered request: the client's wall seconds, and the answer."""

    wall_s: float
    result: Result


class Serving:
    """A running server with a client."""

    def __init__(self, server: EmbeddedServer, client: Client) -> None:
        self.server = server
        self.client = client

    @property
    def pid(self) -> int:
        """Root of the server's process tree."""
        assert self.server.pid is not None
        return self.server.pid

    def run(self, fields: Mapping[str, Any]) -> ServerRun:
        """Run one request over gRPC, pictures as raw bytes."""
        started_s = time.perf_counter()
        result = self.client.generate(**fields)
        return ServerRun(wall_s=time.perf_counter() - started_s, result=result)

    def counters(self) -> Counters:
        """Read the totals now."""
        statistics = json.loads(_read(f"http://{self.server.http_url}/v2/models/stats"))
        return counters_from(statistics, _read(self.server.metrics_url).decode())


@contextmanager
def serving(subject: Subject, **options: Any) -> Iterator[Serving]:
    """Serve a subject on free ports.

    Args:
        subject: exported before.
        options: further `ServerOptions`.
    """
    settings = ServerOptions(
        repository=subject.repository, http_port=0, grpc_port=0, metrics_port=0, **options
    )
    with EmbeddedServer(settings) as server, Client(server.grpc_url) as client:
        yield Serving(server, client)


def _read(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=20) as answer:
        data: bytes = answer.read()
        return data
