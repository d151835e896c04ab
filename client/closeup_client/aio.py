"""The client's asyncio twin: the same methods, awaited."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from types import TracebackType
from typing import Any, Protocol

import aiohttp
import grpc  # type: ignore[import-untyped]
from tritonclient.grpc import service_pb2, service_pb2_grpc

from closeup_client import errors, wire
from closeup_client.arguments import check_headers, check_timeout
from closeup_client.checks import Value
from closeup_client.client import (
    CONTROL_TIMEOUT_S,
    DEFAULT_TIMEOUT_S,
    MODEL,
    STREAM_MODEL,
    channel_options,
    error_from_call,
)
from closeup_client.result import Progress, Result, event_from_outputs, result_from_outputs
from closeup_client.served import (
    Health,
    Served,
    ServedLora,
    denoiser_from_served,
    loras_from_outputs,
    served_from_index,
)


class AsyncClient:
    """A closeup server, seen from asyncio. Use it in one event loop.

    Cancelling the task that waits for `generate` cancels the request.

    Example:
        >>> async with AsyncClient("localhost:8001") as client:
        ...     result = await client.generate(prompt="a lighthouse keeper", inpaint_faces=True)
    """

    def __init__(
        self,
        url: str | None = None,
        protocol: str | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Keep the address; arguments and errors as in `closeup_client.Client`."""
        self.timeout_s = check_timeout(timeout_s)
        self.address = wire.address_from_url(url, protocol)
        checked = check_headers(headers, self.address.protocol)
        kind = _GrpcTransport if self.address.protocol == "grpc" else _HttpTransport
        self._transport: _Transport = kind(self.address, checked)

    async def generate(self, **fields: Any) -> Result:
        """Make pictures and wait for them; fields and errors as in `Client.generate`."""
        request = wire.prepare(fields, json_stream=False)
        outputs = await self._transport.infer(MODEL, request.values, self.timeout_s)
        return result_from_outputs(outputs, encoding=request.encoding, face_pass=request.face_pass)

    def stream(self, **fields: Any) -> AsyncGenerator[Progress | Result, None]:
        """Make pictures and watch: progress events, then the result as the last item.

        The fields are checked at once. ``aclose()`` before the result, or cancelling the task,
        cancels the request; leave the loop early inside ``contextlib.aclosing``.
        """
        request = wire.prepare(fields, json_stream=self.address.protocol == "http")
        return self._events(request)

    async def _events(self, request: wire.Prepared) -> AsyncGenerator[Progress | Result, None]:
        done = False
        answers = self._transport.stream(request.values, self.timeout_s)
        async with contextlib.aclosing(answers):
            try:
                async for outputs in answers:
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

    async def models(self) -> Served:
        """What the server serves."""
        index = await self._transport.index(min(self.timeout_s, CONTROL_TIMEOUT_S))
        return served_from_index(index)

    async def loras(self, model: str | None = None) -> tuple[ServedLora, ...]:
        """What the server's LoRA folder holds; arguments and errors as in `Client.loras`."""
        name = denoiser_from_served(await self.models(), model)
        limit_s = min(self.timeout_s, CONTROL_TIMEOUT_S)
        return loras_from_outputs(await self._transport.infer(name, wire.LIST_LORAS, limit_s))

    async def health(self) -> Health:
        """Whether the server answers and takes work.

        Raises:
            Unreachable: nobody answers.
        """
        return await self._transport.health(min(self.timeout_s, CONTROL_TIMEOUT_S))

    async def close(self) -> None:
        """Close the connection; running requests are cancelled, in whichever task they wait."""
        await self._transport.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()


class _Transport(Protocol):
    async def infer(
        self, model: str, values: Mapping[str, Value], timeout_s: float
    ) -> dict[str, list[bytes]]: ...

    def stream(
        self, values: Mapping[str, Value], timeout_s: float
    ) -> AsyncGenerator[dict[str, list[bytes]], None]: ...

    async def index(self, timeout_s: float) -> list[tuple[str, str, str]]: ...

    async def health(self, timeout_s: float) -> Health: ...

    async def close(self) -> None: ...


class _GrpcTransport:
    def __init__(self, address: wire.Address, headers: Mapping[str, str]) -> None:
        self._address = address
        self._metadata = tuple(headers.items())
        self._channel: Any = None
        self._closed = False

    async def infer(
        self, model: str, values: Mapping[str, Value], timeout_s: float
    ) -> dict[str, list[bytes]]:
        answer = await self._call("ModelInfer", wire.grpc_request(model, values), timeout_s)
        return wire.outputs_from_grpc(answer)

    async def stream(
        self, values: Mapping[str, Value], timeout_s: float
    ) -> AsyncGenerator[dict[str, list[bytes]], None]:
        request = wire.grpc_request(STREAM_MODEL, values)
        method = self._stub().ModelStreamInfer
        call = method(iter([request]), timeout=timeout_s, metadata=self._metadata)
        try:
            async for answer in call:
                if answer.error_message:
                    raise errors.error_from_message(answer.error_message)
                yield wire.outputs_from_grpc(answer.infer_response)
        except (grpc.RpcError, asyncio.CancelledError) as error:
            raise self._error(error, timeout_s) from None
        finally:
            call.cancel()  # nothing happens when it is over

    async def index(self, timeout_s: float) -> list[tuple[str, str, str]]:
        request = service_pb2.RepositoryIndexRequest()
        answer = await self._call("RepositoryIndex", request, timeout_s)
        return [(model.name, model.state, model.reason) for model in answer.models]

    async def health(self, timeout_s: float) -> Health:
        live = await self._call("ServerLive", service_pb2.ServerLiveRequest(), timeout_s)
        ready = await self._call("ServerReady", service_pb2.ServerReadyRequest(), timeout_s)
        about = await self._call("ServerMetadata", service_pb2.ServerMetadataRequest(), timeout_s)
        return Health(
            live=live.live,
            ready=ready.ready,
            server=about.name,
            version=about.version,
            url=str(self._address),
        )

    async def close(self) -> None:
        self._closed = True
        if self._channel is not None:
            await self._channel.close()

    def _stub(self) -> Any:
        if self._closed:
            raise errors.ClientError("this client is closed; make a new one.")
        if self._channel is None:  # made here, since it belongs to the running loop
            options = channel_options(self._address)
            if self._address.tls:
                credentials = grpc.ssl_channel_credentials()
                self._channel = grpc.aio.secure_channel(
                    self._address.netloc, credentials, options=options
                )
            else:
                self._channel = grpc.aio.insecure_channel(self._address.netloc, options=options)
        return service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    def _error(self, error: BaseException, timeout_s: float) -> BaseException:
        if isinstance(error, asyncio.CancelledError):
            # Closing the channel looks like a cancelled task to the task that waits.
            return errors.closed() if self._closed and not _is_task_cancelled() else error
        return error_from_call(error, self._address, timeout_s, is_closed=self._closed)

    async def _call(self, method: str, request: Any, timeout_s: float) -> Any:
        call = getattr(self._stub(), method)
        try:
            return await call(request, timeout=timeout_s, metadata=self._metadata)
        except (grpc.RpcError, asyncio.CancelledError) as error:
            raise self._error(error, timeout_s) from None


class _HttpTransport:
    def __init__(self, address: wire.Address, headers: Mapping[str, str]) -> None:
        self._address = address
        self._headers = headers
        self._session: aiohttp.ClientSession | None = None
        self._running: set[aiohttp.ClientResponse] = set()
        self._closed = False

    async def infer(
        self, model: str, values: Mapping[str, Value], timeout_s: float
    ) -> dict[str, list[bytes]]:
        body, header_length = wire.http_body(values)
        headers = {
            "Content-Type": "application/octet-stream",
            wire.HEADER_LENGTH: str(header_length),
        }
        path = f"/v2/models/{model}/infer"
        async with self._open("POST", path, body, headers, timeout_s) as answer:
            length = answer.headers.get(wire.HEADER_LENGTH)
            content = await answer.read()
        return wire.outputs_from_http(content, None if length is None else int(length))

    async def stream(
        self, values: Mapping[str, Value], timeout_s: float
    ) -> AsyncGenerator[dict[str, list[bytes]], None]:
        path = f"/v2/models/{STREAM_MODEL}/generate_stream"
        headers = {"Content-Type": "application/json"}
        body = wire.json_body(values)
        async with self._open("POST", path, body, headers, timeout_s) as answer:
            async for line in _lines(answer.content):
                outputs = wire.outputs_from_event(line)
                if outputs:
                    yield outputs

    async def index(self, timeout_s: float) -> list[tuple[str, str, str]]:
        path = "/v2/repository/index"
        async with self._open("POST", path, b"{}", {}, timeout_s) as answer:
            return wire.index_from_json(await answer.read())

    async def health(self, timeout_s: float) -> Health:
        live = await self._answers("/v2/health/live", timeout_s)
        ready = await self._answers("/v2/health/ready", timeout_s)
        async with self._open("GET", "/v2", None, {}, timeout_s) as answer:
            server, version = wire.metadata_from_json(await answer.read())
        url = str(self._address)
        return Health(live=live, ready=ready, server=server, version=version, url=url)

    async def close(self) -> None:
        self._closed = True
        for answer in self._running:  # closing the session would leave their readers waiting
            answer.content.set_exception(aiohttp.ClientConnectionError("closed"))
        if self._session is not None:
            await self._session.close()

    async def _answers(self, path: str, timeout_s: float) -> bool:
        try:
            async with self._open("GET", path, None, {}, timeout_s):
                return True
        except (errors.Unreachable, errors.Cancelled):
            raise
        except errors.ClientError:
            return False

    @contextlib.asynccontextmanager
    async def _open(
        self, method: str, path: str, body: bytes | None, headers: dict[str, str], timeout_s: float
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """An answer with status 200; what goes wrong inside the block is translated too."""
        if self._closed:
            raise errors.ClientError("this client is closed; make a new one.")
        if self._session is None:
            self._session = aiohttp.ClientSession(headers=self._headers)
        scheme = "https" if self._address.tls else "http"
        full = f"{scheme}://{self._address.netloc}{self._address.path}{path}"
        limit = aiohttp.ClientTimeout(total=timeout_s)
        try:
            async with self._session.request(
                method, full, data=body, headers=headers, timeout=limit
            ) as answer:
                if answer.status != 200:
                    text = wire.error_text(await answer.read())
                    raise errors.error_from_http(answer.status, text, str(self._address))
                self._running.add(answer)
                try:
                    yield answer
                finally:
                    self._running.discard(answer)
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError) as error:
            raise self._error(error, timeout_s) from None

    def _error(self, error: Exception, timeout_s: float) -> errors.ClientError:
        url = str(self._address)
        if self._closed:
            return errors.closed()
        if isinstance(error, asyncio.TimeoutError):
            return errors.deadline(url, timeout_s)
        if isinstance(error, aiohttp.ClientConnectorCertificateError):
            return errors.error_from_connect(error.certificate_error, url, tls=True)
        if isinstance(error, aiohttp.ClientConnectorError):
            return errors.error_from_connect(error.os_error, url, self._address.tls)
        if isinstance(error, aiohttp.ClientResponseError):  # no HTTP at all
            return errors.wrong_protocol(url)
        return errors.broken(url)


def _is_task_cancelled() -> bool:
    """Whether someone cancelled the running task; Python 3.10 cannot tell, and says no."""
    cancelling = getattr(asyncio.current_task(), "cancelling", None)
    return cancelling is not None and cancelling() > 0


async def _lines(content: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    """Lines of any length; the reader's own iterator refuses those past its buffer."""
    held = bytearray()
    async for chunk in content.iter_any():
        start = len(held)
        held += chunk
        while (end := held.find(b"\n", start)) >= 0:
            yield bytes(held[:end])
            del held[: end + 1]
            start = 0
    if held:
        yield bytes(held)
