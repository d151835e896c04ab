"""Clients of the fake servers, and what they are asked, for the client's test files."""

from __future__ import annotations

import socket
from typing import Any

import pytest
from closeup_client import AsyncClient, Client

from tests.fake_triton import FakeTriton

PROTOCOLS = ("grpc", "http")

both = pytest.mark.parametrize(
    ("fake", "protocol"), [(name, name) for name in PROTOCOLS], indirect=["fake"]
)


def connect(fake: FakeTriton, protocol: str, timeout_s: float = 20.0) -> Client:
    return Client(f"127.0.0.1:{fake.port}", protocol, timeout_s, {"Authorization": "Bearer x"})


def connect_async(fake: FakeTriton, protocol: str, timeout_s: float = 20.0) -> AsyncClient:
    return AsyncClient(f"127.0.0.1:{fake.port}", protocol, timeout_s, {"Authorization": "Bearer x"})


def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_generate(client: Client, prompt: str) -> Any:
    return client.generate(prompt=prompt)


def run_stream(client: Client, prompt: str) -> Any:
    return list(client.stream(prompt=prompt))
