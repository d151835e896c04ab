"""The client's connection: what it is made with, why there is none, and closing it."""

from __future__ import annotations

import asyncio
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from closeup_client import (
    AsyncClient,
    Cancelled,
    Client,
    ClientError,
    InvalidRequest,
    Progress,
    Result,
    Unreachable,
    wire,
)
from closeup_client.errors import error_from_grpc

from tests.client_calls import (
    PROTOCOLS,
    both,
    connect,
    connect_async,
    run_generate,
    run_stream,
    unused_port,
)
from tests.fake_triton import FakeTriton, picture, serve_grpc, serve_http


@pytest.fixture
def fake(request: pytest.FixtureRequest) -> Iterator[FakeTriton]:
    yield from (serve_grpc() if request.param == "grpc" else serve_http())


# --- arguments -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "protocol", "shown", "tls"),
    [
        (None, None, "localhost:8001 (grpc)", False),
        (None, "http", "localhost:8000 (http)", False),
        ("gpu-box", None, "gpu-box:8001 (grpc)", False),
        ("http://gpu-box", None, "gpu-box:8000 (http)", False),
        ("https://gpu-box/closeup/", None, "gpu-box:443/closeup (http)", True),
        ("grpcs://gpu-box:9", "grpc", "gpu-box:9 (grpc)", True),
        ("[::1]:8001", None, "[::1]:8001 (grpc)", False),
    ],
)
def test_address_is_read_when_the_url_is_good(
    url: str | None, protocol: str | None, shown: str, tls: bool
) -> None:
    address = wire.address_from_url(url, protocol)
    assert (str(address), address.tls) == (shown, tls)


@pytest.mark.parametrize(
    ("url", "protocol"),
    [("", None), ("ftp://x", None), ("x:port", None), ("x", "tcp"), ("http://x", "grpc")],
)
def test_client_refuses_the_address_when_it_is_none(url: str, protocol: str | None) -> None:
    with pytest.raises(InvalidRequest, match=r"^(url|protocol): got"):
        Client(url, protocol)


ClientKind = type[Client] | type[AsyncClient]


both_clients = pytest.mark.parametrize("client", [Client, AsyncClient])


@both_clients
@pytest.mark.parametrize(
    "timeout_s",
    [0, -1, "5", None, True, float("nan"), float("inf"), 1e12, 10**400, 1_000_001],
)
def test_client_refuses_the_time_limit_when_it_is_none(client: ClientKind, timeout_s: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"^timeout_s: got .* above 0, to 1000000\.$"):
        client(timeout_s=timeout_s)


@both
def test_client_waits_when_the_time_limit_is_the_longest(fake: FakeTriton, protocol: str) -> None:
    async def work() -> Result:
        async with connect_async(fake, protocol, timeout_s=1e6) as client:
            return await client.generate(prompt="a", seed=3)

    assert asyncio.run(work()).images == [picture(3)]
    with connect(fake, protocol, timeout_s=1e6) as client:
        assert client.generate(prompt="a", seed=4).images == [picture(4)]


@both_clients
@pytest.mark.parametrize(
    ("protocol", "name", "value"),
    [
        ("both", "Authorization", "secret\n"),
        ("both", "Authorization", "secret\r\nX-Other: 1"),
        ("both", "Authorization", "secret\0"),
        ("both", "Authorization", "secret\u6f22"),
        ("both", "Authorization", "secr\xe9t secret"),
        ("both", "Authorization", b"secret"),
        ("both", "Authorization", None),
        ("both", "two words", "secret"),
        ("both", "name:", "secret"),
        ("both", "line\n", "secret"),
        ("both", "", "secret"),
        ("both", 7, "secret"),
        ("both", "Content-Length", "secret"),
        ("grpc", "x!y", "secret"),
        ("grpc", "Token-Bin", "secret"),
    ],
)
def test_client_names_the_header_and_not_its_value_when_it_cannot_be_sent(
    client: ClientKind, protocol: str, name: Any, value: Any
) -> None:
    for spoken in PROTOCOLS if protocol == "both" else (protocol,):
        with pytest.raises(InvalidRequest) as caught:
            client(protocol=spoken, headers={name: value})
        assert str(caught.value).startswith(f"headers: {str(name)!r} ")
        assert "secr" not in str(caught.value)
        assert list(caught.value.problems) == ["headers"]


@both_clients
def test_client_refuses_headers_when_they_are_no_mapping(client: ClientKind) -> None:
    with pytest.raises(InvalidRequest, match=r"^headers: got a value of type list"):
        client(headers=[("a", "b")])  # type: ignore[arg-type]


@both
def test_headers_arrive_unchanged_when_they_are_good(fake: FakeTriton, protocol: str) -> None:
    headers = {"X-Mixed_Case.1": "~ all printable: \"q\", 'p' !", "empty": ""}

    async def work() -> None:
        async with AsyncClient(f"127.0.0.1:{fake.port}", protocol, headers=headers) as client:
            await client.generate(prompt="a")

    asyncio.run(work())
    with Client(f"127.0.0.1:{fake.port}", protocol, headers=headers) as client:
        client.generate(prompt="a")
    lowered = {name.lower(): value for name, value in headers.items()}
    assert [lowered.items() <= got.items() for got in fake.headers] == [True, True]


# --- no connection ---------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_client_says_what_to_do_when_nobody_listens(protocol: str) -> None:
    client = Client(f"127.0.0.1:{unused_port()}", protocol, 5.0)
    for ask in (client.health, client.models, lambda: client.generate(prompt="a")):
        with pytest.raises(Unreachable, match=r"no server answers at 127.*make serve"):
            ask()
    with pytest.raises(Unreachable):
        list(client.stream(prompt="a"))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_async_client_says_what_to_do_when_nobody_listens(protocol: str) -> None:
    async def work() -> None:
        async with AsyncClient(f"127.0.0.1:{unused_port()}", protocol, 5.0) as client:
            await client.health()

    with pytest.raises(Unreachable, match="make serve"):
        asyncio.run(work())


def test_client_reports_a_broken_connection_when_the_server_hangs_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def hang_up() -> None:
            for _ in range(2):
                connection, _ = server.accept()
                connection.recv(65536)
                connection.close()

        threading.Thread(target=hang_up, daemon=True).start()
        client = Client(f"http://127.0.0.1:{server.getsockname()[1]}", timeout_s=5.0)
        with pytest.raises(Unreachable, match="broke before the answer came"):
            client.generate(prompt="a")


@contextmanager
def listen(answer: Callable[[socket.socket], None]) -> Iterator[int]:
    """A port where `answer` treats every connection, which is then closed."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def work() -> None:
            with suppress(OSError):  # the server was closed
                while True:
                    connection, _ = server.accept()
                    with connection, suppress(OSError):
                        answer(connection)

        threading.Thread(target=work, daemon=True).start()
        yield server.getsockname()[1]


def failure(url: str) -> str:
    """What the client says, and its asyncio twin too."""

    async def work() -> None:
        async with AsyncClient(url, timeout_s=10) as client:
            await client.models()

    with Client(url, timeout_s=10) as client, pytest.raises(Unreachable) as caught:
        client.models()
    with pytest.raises(Unreachable) as caught_async:
        asyncio.run(work())
    assert str(caught.value) == str(caught_async.value)
    return str(caught.value)


@both
@pytest.mark.parametrize("scheme", ["https", "grpcs"])
def test_client_says_that_tls_failed_when_the_port_is_plain(
    fake: FakeTriton, protocol: str, scheme: str
) -> None:
    text = failure(f"{scheme}://127.0.0.1:{fake.port}")
    assert text.startswith(f"TLS to 127.0.0.1:{fake.port} ({scheme[:4]}) failed (wrong version")
    assert text.endswith("use http:// or grpc:// for a server without TLS.")


@pytest.mark.parametrize("scheme", ["https", "grpcs"])
def test_client_says_that_tls_failed_when_the_server_hangs_up(scheme: str) -> None:
    def hang_up(connection: socket.socket) -> None:
        connection.recv(1)  # with more unread, closing resets

    with listen(hang_up) as port:
        assert "failed (the server hung up)" in failure(f"{scheme}://127.0.0.1:{port}")


@pytest.fixture
def certificate(tmp_path: Path) -> ssl.SSLContext:
    """A server's context, with a certificate that nobody trusts."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl makes the certificate")
    key, file = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
    command += ["-nodes", "-subj", "/CN=localhost", "-keyout", str(key), "-out", str(file)]
    subprocess.run(command, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file, key)
    return context


@pytest.mark.parametrize("scheme", ["https", "grpcs"])
def test_client_says_that_tls_failed_when_the_certificate_is_not_trusted(
    certificate: ssl.SSLContext, scheme: str
) -> None:
    def answer(connection: socket.socket) -> None:
        certificate.wrap_socket(connection, server_side=True)

    with listen(answer) as port:
        text = failure(f"{scheme}://localhost:{port}").replace("self-signed", "self signed")
    assert f"TLS to localhost:{port} ({scheme[:4]}) failed (self signed certificate)" in text


@pytest.mark.parametrize(
    ("fake", "scheme"), [("grpc", "http"), ("http", "grpc")], indirect=["fake"]
)
def test_client_says_to_check_the_port_when_it_speaks_the_other_protocol(
    fake: FakeTriton, scheme: str
) -> None:
    text = failure(f"{scheme}://127.0.0.1:{fake.port}")
    assert "does not speak that protocol; check the port" in text


@pytest.mark.parametrize(
    ("details", "text"),
    [
        ("errors resolving nowhere.invalid:80: Domain name not found", "no server answers at x"),
        ("failed to connect to all addresses; last error: refused", "no server answers at x"),
        ("Socket closed", "the connection to x broke"),
        (
            "failed to connect to all addresses; last error: UNKNOWN: ipv4:1.2.3.4:1: Tls handshake"
            " failed (TSI_PROTOCOL_FAILURE): SSL_ERROR_SSL: error:1000007d:SSL routines:"
            "OPENSSL_internal:CERTIFICATE_VERIFY_FAILED: unable to get local issuer certificate",
            "TLS to x failed (unable to get local issuer certificate); check the certificate",
        ),
        (
            "failed to connect to all addresses; last error: UNAUTHENTICATED: ipv4:1.2.3.4:1: "
            "Hostname Verification Check failed.",
            "TLS to x failed (UNAUTHENTICATED: ipv4:1.2.3.4:1: Hostname Verification Check failed)",
        ),
    ],
)
def test_grpc_details_are_told_apart_when_there_is_no_connection(details: str, text: str) -> None:
    error = error_from_grpc("UNAVAILABLE", details, "x", 5.0)
    assert type(error) is Unreachable
    assert str(error).startswith(text)


# --- closing ---------------------------------------------------------------------------------


def test_closing_is_quick_when_nothing_ran() -> None:
    started_s = time.perf_counter()
    for protocol in PROTOCOLS:
        Client(protocol=protocol).close()
    assert time.perf_counter() - started_s < 2  # seconds; no wait for a connection


@both
def test_client_refuses_work_when_closed(fake: FakeTriton, protocol: str) -> None:
    client = connect(fake, protocol)
    client.generate(prompt="a")
    client.close()
    with pytest.raises(ClientError, match="this client is closed"):
        client.generate(prompt="a")


def wait_for_request(fake: FakeTriton) -> None:
    limit_s = time.monotonic() + 10
    while not fake.requests and time.monotonic() < limit_s:
        time.sleep(0.01)
    time.sleep(0.1)  # so that it waits for the answer, or for the second event


@both
@pytest.mark.parametrize("run", [run_generate, run_stream])
def test_running_request_is_cancelled_when_another_thread_closes_the_client(
    fake: FakeTriton, protocol: str, run: Callable[[Client, str], Any]
) -> None:
    client, caught = connect(fake, protocol), []

    def work() -> None:
        try:
            run(client, "slow")
        except ClientError as error:
            caught.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    wait_for_request(fake)
    started_s = time.perf_counter()
    client.close()
    thread.join(15)
    assert time.perf_counter() - started_s < 5  # seconds; a slow stream lasts 10
    assert [type(error) for error in caught] == [Cancelled]
    assert "its client was closed" in str(caught[0])


@both
def test_stream_is_cancelled_when_its_client_was_closed_meanwhile(
    fake: FakeTriton, protocol: str
) -> None:
    client = connect(fake, protocol)
    events = client.stream(prompt="slow")
    next(events)
    client.close()
    with pytest.raises(Cancelled):
        list(events)


@both
def test_stream_ends_well_when_the_client_is_closed_with_the_result_in_hand(
    fake: FakeTriton, protocol: str
) -> None:
    client = connect(fake, protocol)
    for event in client.stream(prompt="a"):
        if isinstance(event, Result):
            client.close()
    assert isinstance(event, Result)

    async def work() -> Progress | Result:
        client = connect_async(fake, protocol)
        async for event in client.stream(prompt="a"):
            if isinstance(event, Result):
                await client.close()
        return event

    assert isinstance(asyncio.run(work()), Result)


async def drain(client: AsyncClient, prompt: str) -> None:
    async for _ in client.stream(prompt=prompt):
        pass


async def ask(client: AsyncClient, prompt: str) -> None:
    await client.generate(prompt=prompt)


Asked = Callable[[AsyncClient, str], Coroutine[Any, Any, None]]


@both
@pytest.mark.parametrize("run", [ask, drain])
def test_async_request_is_cancelled_when_another_task_closes_the_client(
    fake: FakeTriton, protocol: str, run: Asked
) -> None:
    async def work() -> float:
        client = connect_async(fake, protocol)
        task = asyncio.create_task(run(client, "slow"))
        await asyncio.to_thread(wait_for_request, fake)
        started_s = time.perf_counter()
        await client.close()
        with pytest.raises(Cancelled, match="its client was closed"):
            await task
        return time.perf_counter() - started_s

    assert asyncio.run(work()) < 5  # seconds; a slow stream lasts 10


@both
def test_async_stream_is_cancelled_when_its_client_was_closed_meanwhile(
    fake: FakeTriton, protocol: str
) -> None:
    async def work() -> None:
        client = connect_async(fake, protocol)
        events = client.stream(prompt="slow")
        await anext(events)
        await client.close()
        with pytest.raises(Cancelled):
            await anext(events)

    asyncio.run(work())


@both
def test_async_task_stays_cancelled_when_the_client_is_closed_too(
    fake: FakeTriton, protocol: str
) -> None:
    async def work() -> None:
        client = connect_async(fake, protocol)
        task = asyncio.create_task(ask(client, "slow"))
        await asyncio.to_thread(wait_for_request, fake)
        task.cancel()
        await client.close()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(work())
