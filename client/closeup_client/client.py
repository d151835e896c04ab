"""The client: one small class, over gRPC or HTTP."""

from __future__ import annotations

import contextlib
import http.client
import socket
import ssl
import threading
import time
from collections.abc import Generator, Iterator, Mapping
from types import TracebackType
from typing import Any, Protocol

import grpc  # type: ignore[import-untyped]
from tritonclient.grpc import service_pb2, service_pb2_grpc

from closeup_client import errors, wire
from closeup_client.arguments import check_headers, check_timeout
from closeup_client.checks import Value
from closeup_client.result import Progress, Result, event_from_outputs, result_from_outputs
from closeup_client.served import (
    Health,
    Served,
    ServedLora,
    denoiser_from_served,
    loras_from_outputs,
    served_from_index,
)

MODEL = "generate"
STREAM_MODEL = "generate_stream"
CONTROL_TIMEOUT_S = 20.0
DEFAULT_TIMEOUT_S = 900.0


class Client:
    """A closeup server, seen from Python.

    Safe to use from several threads at once. Opens its connection with the first call.

    Example:
        >>> with Client("localhost:8001") as client:
        ...     result = client.generate(prompt="a lighthouse keeper", inpaint_faces=True)
        ...     result.save("out")
    """

    def __init__(
        self,
        url: str | None = None,
        protocol: str | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Keep the address.

        Args:
            url: ``host[:port]`` or with a scheme: ``http://``, ``https://``, ``grpc://``,
                ``grpcs://``. Default: localhost with the protocol's own port, 8001 or 8000.
            protocol: ``"grpc"`` (default) or ``"http"``, where the URL has no scheme.
            timeout_s: longest wait for one answer, seconds, to a million; a stream counts as one.
            headers: sent with every request, for instance an authorization; printable ASCII.

        Raises:
            InvalidRequest: the URL, protocol or time limit is not one, or a header cannot be sent.
        """
        self.timeout_s = check_timeout(timeout_s)
        self.address = wire.address_from_url(url, protocol)
        checked = check_headers(headers, self.address.protocol)
        kind = _GrpcTransport if self.address.protocol == "grpc" else _HttpTransport
        self._transport: _Transport = kind(self.address, checked)

    def generate(self, **fields: Any) -> Result:
        """Make pictures and wait for them.

        Args:
            **fields: the request fields, see `closeup_client.FIELDS`; `prompt` is required.

        Raises:
            InvalidRequest: a field is wrong; found here or by the server.
            Unavailable: the server is full or (`Unreachable`) does not answer.
            DeadlineExceeded: `timeout_s` passed.
            ServerFailure: anything else the server reports.
        """
        request = wire.prepare(fields, json_stream=False)
        outputs = self._transport.infer(MODEL, request.values, self.timeout_s)
        return result_from_outputs(outputs, encoding=request.encoding, face_pass=request.face_pass)

    def stream(self, **fields: Any) -> Generator[Progress | Result, None, None]:
        """Make pictures and watch: progress events, then the result as the last item.

        The fields are checked at once; the request is sent with the first ``next()``. Closing
        the iterator (or leaving it, as garbage) before the result cancels the request.

        Raises:
            As `generate`; `ServerFailure` also when the stream ends without a result.
        """
        request = wire.prepare(fields, json_stream=self.address.protocol == "http")
        return self._events(request)

    def _events(self, request: wire.Prepared) -> Generator[Progress | Result, None, None]:
        done = False
        with contextlib.closing(self._transport.stream(request.values, self.timeout_s)) as answers:
            try:
                for outputs in answers:
                    event = event_from_outputs(
                        outputs, encoding=request.encoding, face_pass=request.face_pass
                    )
                    if event is not None:
                        done = isinstance(event, Result)
                        yield event
            except errors.Cancelled:
                if not done:  # closing the client with the result in hand loses nothing
                    raise
        if not done:
            raise errors.ServerFailure("the stream ended without a result.")

    def models(self) -> Served:
        """What the server serves."""
        return served_from_index(self._transport.index(min(self.timeout_s, CONTROL_TIMEOUT_S)))

    def loras(self, model: str | None = None) -> tuple[ServedLora, ...]:
        """What the server's LoRA folder holds, sorted by id.

        Args:
            model: whose memory `ServedLora.networks` tells of, as the request field `model`;
                None for the first pipeline that is ready. The folder is the same for all.

        Raises:
            InvalidRequest: no such model is served.
            Unavailable: the model is not ready, or (`Unreachable`) nobody answers.
            ServerFailure: anything else the server reports.
        """
        name = denoiser_from_served(self.models(), model)
        limit_s = min(self.timeout_s, CONTROL_TIMEOUT_S)
        return loras_from_outputs(self._transport.infer(name, wire.LIST_LORAS, limit_s))

    def health(self) -> Health:
        """Whether the server answers and takes work.

        Raises:
            Unreachable: nobody answers.
        """
        return self._transport.health(min(self.timeout_s, CONTROL_TIMEOUT_S))

    def close(self) -> None:
        """Close the connection; running requests are cancelled, in whichever thread they wait."""
        self._transport.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class _Transport(Protocol):
    """What `Client` needs of a protocol; every method raises only `ClientError`."""

    def infer(
        self, model: str, values: Mapping[str, Value], timeout_s: float
    ) -> dict[str, list[bytes]]:
        """One request to a model, one answer."""

    def stream(
        self, values: Mapping[str, Value], timeout_s: float
    ) -> Generator[dict[str, list[bytes]], None, None]:
        """One request, many answers; a generator, whose `close` cancels."""

    def index(self, timeout_s: float) -> list[tuple[str, str, str]]:
        """(name, state, reason) of every model version."""

    def health(self, timeout_s: float) -> Health:
        """Live, ready, version."""

    def close(self) -> None:
        """Drop the connection."""


def channel_options(address: wire.Address) -> list[tuple[str, int]]:
    """Options of a gRPC channel: pictures have no size limit here, and localhost needs no proxy."""
    options = [
        ("grpc.max_send_message_length", -1),
        ("grpc.max_receive_message_length", -1),
        ("grpc.use_local_subchannel_pool", 1),  # a refused connection is not remembered by others
    ]
    if address.host in ("localhost", "127.0.0.1", "::1"):
        options.append(("grpc.enable_http_proxy", 0))
    return options


def error_from_call(
    error: Any, address: wire.Address, timeout_s: float, *, is_closed: bool
) -> errors.ClientError:
    """The client's error for a `grpc.RpcError`; `is_closed`: whether the client was closed."""
    if is_closed:
        return errors.closed()
    status, details = error.code(), error.details() or ""
    name = "UNKNOWN" if status is None else status.name
    return errors.error_from_grpc(name, details, str(address), timeout_s)


class _GrpcTransport:
    def __init__(self, address: wire.Address, headers: Mapping[str, str]) -> None:
        self._address = address
        self._metadata = tuple(headers.items())
        self._closed = False
        options = channel_options(address)
        if address.tls:
            credentials = grpc.ssl_channel_credentials()
            self._channel = grpc.secure_channel(address.netloc, credentials, options=options)
        else:
            self._channel = grpc.insecure_channel(address.netloc, options=options)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    def infer(
        self, model: str, values: Mapping[str, Value], timeout_s: float
    ) -> dict[str, list[bytes]]:
        return wire.outputs_from_grpc(
            self._call(self._stub.ModelInfer, wire.grpc_request(model, values), timeout_s)
        )

    def stream(
        self, values: Mapping[str, Value], timeout_s: float
    ) -> Generator[dict[str, list[bytes]], None, None]:
        request = wire.grpc_request(STREAM_MODEL, values)
        call = self._start(self._stub.ModelStreamInfer, iter([request]), timeout_s)
        try:
            for answer in call:
                if answer.error_message:
                    raise errors.error_from_message(answer.error_message)
                yield wire.outputs_from_grpc(answer.infer_response)
        except grpc.RpcError as error:
            raise self._error(error, timeout_s) from None
        finally:
            call.cancel()  # nothing happens when it is over

    def index(self, timeout_s: float) -> list[tuple[str, str, str]]:
        request = service_pb2.RepositoryIndexRequest()
        answer = self._call(self._stub.RepositoryIndex, request, timeout_s)
        return [(model.name, model.state, model.reason) for model in answer.models]

    def health(self, timeout_s: float) -> Health:
        stub = self._stub
        live = self._call(stub.ServerLive, service_pb2.ServerLiveRequest(), timeout_s)
        ready = self._call(stub.ServerReady, service_pb2.ServerReadyRequest(), timeout_s)
        about = self._call(stub.ServerMetadata, service_pb2.ServerMetadataRequest(), timeout_s)
        return Health(
            live=live.live,
            ready=ready.ready,
            server=about.name,
            version=about.version,
            url=str(self._address),
        )

    def close(self) -> None:
        self._closed = True
        self._channel.close()

    def _error(self, error: grpc.RpcError, timeout_s: float) -> errors.ClientError:
        return error_from_call(error, self._address, timeout_s, is_closed=self._closed)

    def _call(self, method: Any, request: Any, timeout_s: float) -> Any:
        # A future, not a blocking call: Ctrl-C then reaches us, and cancels the server's work.
        call = self._start(method.future, request, timeout_s)
        try:
            return call.result()
        except grpc.RpcError as error:
            raise self._error(error, timeout_s) from None
        except grpc.FutureCancelledError:
            raise errors.closed() from None
        finally:
            call.cancel()

    def _start(self, method: Any, request: Any, timeout_s: float) -> Any:
        try:
            return method(request, timeout=timeout_s, metadata=self._metadata)
        except ValueError:  # "Cannot invoke RPC on closed channel!"
            raise errors.ClientError("this client is closed; make a new one.") from None


class _HttpTransport:
    """One connection a request: inference takes seconds, and threads share nothing this way."""

    def __init__(self, address: wire.Address, headers: Mapping[str, str]) -> None:
        self._address = address
        self._headers = headers
        self._lock = threading.Lock()  # over the two below
        self._sockets: set[socket.socket] = set()
        self._closed = False

    def infer(
        self, model: str, values: Mapping[str, Value], timeout_s: float
    ) -> dict[str, list[bytes]]:
        body, header_length = wire.http_body(values)
        headers = {
            "Content-Type": "application/octet-stream",
            wire.HEADER_LENGTH: str(header_length),
        }
        path = f"/v2/models/{model}/infer"
        with self._open("POST", path, body, headers, timeout_s) as answer:
            length = answer.headers.get(wire.HEADER_LENGTH)
            content = answer.read()
        return wire.outputs_from_http(content, None if length is None else int(length))

    def stream(
        self, values: Mapping[str, Value], timeout_s: float
    ) -> Generator[dict[str, list[bytes]], None, None]:
        path = f"/v2/models/{STREAM_MODEL}/generate_stream"
        headers = {"Content-Type": "application/json"}
        limit_s = time.monotonic() + timeout_s
        with self._open("POST", path, wire.json_body(values), headers, timeout_s) as answer:
            for line in answer:
                if time.monotonic() > limit_s:
                    raise TimeoutError
                outputs = wire.outputs_from_event(line)
                if outputs:
                    yield outputs
            if self._closed:  # a broken stream of chunks ends without an error
                raise errors.closed()

    def index(self, timeout_s: float) -> list[tuple[str, str, str]]:
        path = "/v2/repository/index"
        with self._open("POST", path, b"{}", {}, timeout_s) as answer:
            return wire.index_from_json(answer.read())

    def health(self, timeout_s: float) -> Health:
        live = self._answers("/v2/health/live", timeout_s)
        ready = self._answers("/v2/health/ready", timeout_s)
        with self._open("GET", "/v2", None, {}, timeout_s) as answer:
            server, version = wire.metadata_from_json(answer.read())
        url = str(self._address)
        return Health(live=live, ready=ready, server=server, version=version, url=url)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            for connected in self._sockets:
                with contextlib.suppress(OSError):
                    # Wakes whoever reads. Not the TLS socket's own, which swaps what they read.
                    socket.socket.shutdown(connected, socket.SHUT_RDWR)

    def _answers(self, path: str, timeout_s: float) -> bool:
        try:
            with self._open("GET", path, None, {}, timeout_s):
                return True
        except (errors.Unreachable, errors.Cancelled):
            raise
        except errors.ClientError:
            return False

    @contextlib.contextmanager
    def _open(
        self, method: str, path: str, body: bytes | None, headers: dict[str, str], timeout_s: float
    ) -> Iterator[http.client.HTTPResponse]:
        """An answer with status 200; what goes wrong inside the block is translated too."""
        if self._closed:
            raise errors.ClientError("this client is closed; make a new one.")
        kind = http.client.HTTPSConnection if self._address.tls else http.client.HTTPConnection
        connection = kind(self._address.host, self._address.port, timeout=timeout_s)
        try:
            with self._connected(connection):
                merged = {**self._headers, **headers}
                connection.request(method, f"{self._address.path}{path}", body, merged)
                answer = connection.getresponse()
                if answer.status != 200:
                    text = wire.error_text(answer.read())
                    raise errors.error_from_http(answer.status, text, str(self._address))
                yield answer
        except (OSError, http.client.HTTPException) as error:
            raise self._error(error, timeout_s) from None
        finally:
            connection.close()

    @contextlib.contextmanager
    def _connected(self, connection: http.client.HTTPConnection) -> Iterator[None]:
        """Connect; inside the block `close` breaks the connection."""
        try:
            connection.connect()
        except TimeoutError:
            raise
        except OSError as error:
            url, tls = str(self._address), self._address.tls
            raise errors.error_from_connect(error, url, tls) from None
        # Kept here, since the connection lets go of it when the answer is to be its last.
        connected: socket.socket = connection.sock
        with self._lock:
            if self._closed:
                raise errors.closed()
            self._sockets.add(connected)
        try:
            yield
        finally:
            with self._lock:
                self._sockets.discard(connected)

    def _error(self, error: Exception, timeout_s: float) -> errors.ClientError:
        url = str(self._address)
        if self._closed:
            return errors.closed()
        if isinstance(error, TimeoutError):
            return errors.deadline(url, timeout_s)
        if isinstance(error, ssl.SSLError) and not isinstance(error, ssl.SSLEOFError):
            return errors.error_from_connect(error, url, tls=True)  # our certificate was refused
        hung_up = isinstance(error, http.client.RemoteDisconnected)
        if isinstance(error, http.client.BadStatusLine) and not hung_up:
            return errors.wrong_protocol(url)
        return errors.broken(url)
