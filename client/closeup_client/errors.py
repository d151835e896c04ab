"""What can go wrong with a request, seen from the client.

Every error's text is one sentence (or one a field). `code` is the server's code when it gave one
and the nearest of the same names otherwise, so a program can tell errors apart without parsing.
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Mapping

_CODE = re.compile(r"^\s*([A-Z][A-Z_]{3,}): +(.*)$", re.DOTALL)
_FIELD = re.compile(r"(?:^|(?<=[.;!?)] ))([a-z][a-z_]*): ")
# What gRPC writes when there was no connection.
_NO_CONNECTION = ("failed to connect", "resolution", "resolving", "refused")
_GRPC_TLS_REASON = re.compile(r"OPENSSL_internal:(?:CERTIFICATE_VERIFY_FAILED: )?([^:]+)")
_HUNG_UP = "the server hung up"
_OPENSSL_REASON = re.compile(r"[A-Z0-9_]+")
_BY_GRPC_STATUS = {
    "INVALID_ARGUMENT": "INVALID_ARG",
    "UNIMPLEMENTED": "UNSUPPORTED",
    "RESOURCE_EXHAUSTED": "UNAVAILABLE",
}
_BY_HTTP_STATUS = {
    400: "INVALID_ARG",
    404: "NOT_FOUND",
    408: "DEADLINE_EXCEEDED",
    413: "INVALID_ARG",
    429: "UNAVAILABLE",
    499: "CANCELLED",
    501: "UNSUPPORTED",
    502: "UNAVAILABLE",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}


class ClientError(Exception):
    """Base of every error this package raises.

    Attributes:
        code: ``INVALID_ARG``, ``UNAVAILABLE``, ``CANCELLED``, ``DEADLINE_EXCEEDED``,
            ``NOT_FOUND``, ``INTERNAL`` or another of Triton's codes.
        message: the sentence, without the code.
    """

    def __init__(self, message: str, code: str = "INTERNAL") -> None:
        self.message = message
        self.code = code
        super().__init__(message)


class InvalidRequest(ClientError):  # noqa: N818 - named for what it says
    """The request cannot be served as given; nothing has run for it.

    Attributes:
        problems: field -> one sentence, as far as the message tells them apart; ``"request"``
            stands for the request as a whole.
    """

    def __init__(self, problems: Mapping[str, str]) -> None:
        self.problems = dict(problems)
        text = " ".join(f"{field}: {why}" for field, why in self.problems.items())
        super().__init__(text, "INVALID_ARG")


class Unavailable(ClientError):  # noqa: N818
    """The server has no free slot or is not ready; the same request may succeed later."""

    def __init__(self, message: str) -> None:
        super().__init__(message, "UNAVAILABLE")


class Unreachable(Unavailable):
    """No server answers at the address, not in this protocol, or the connection broke."""


class Cancelled(ClientError):  # noqa: N818
    """The request was cancelled, by the caller or by the server."""

    def __init__(self, message: str) -> None:
        super().__init__(message, "CANCELLED")


class DeadlineExceeded(ClientError):  # noqa: N818
    """The client's own time limit passed before the answer came."""

    def __init__(self, message: str) -> None:
        super().__init__(message, "DEADLINE_EXCEEDED")


class ServerFailure(ClientError):  # noqa: N818
    """The server failed, lacks the model, or answered with something that is no closeup answer."""


def error_from_message(message: str, code: str = "INTERNAL") -> ClientError:
    """The error that a server's message stands for.

    Args:
        message: the text; a leading ``"CODE: "`` wins over `code`.
        code: the transport's own code, for messages that carry none.
    """
    match = _CODE.match(message)
    if match:
        code, message = match[1], match[2]
    message = message.strip() or "the server gave no reason."
    if match is None and "unknown model" in message.lower():
        code, message = "NOT_FOUND", f"{message} Is this a closeup server?"
    if code == "INVALID_ARG":
        return InvalidRequest(problems_from_message(message))
    if code in ("UNAVAILABLE", "CANCELLED", "DEADLINE_EXCEEDED"):
        kinds = {"UNAVAILABLE": Unavailable, "CANCELLED": Cancelled}
        return kinds.get(code, DeadlineExceeded)(message)
    return ServerFailure(message, code)


def problems_from_message(message: str) -> dict[str, str]:
    """Field -> sentence, from ``"steps: got 51; ... w: got 7; ..."``."""
    marks = list(_FIELD.finditer(message))
    if not marks or marks[0].start() != 0:
        return {"request": message.removeprefix("request: ")}
    ends = [*(mark.start() for mark in marks[1:]), len(message)]
    problems: dict[str, str] = {}
    for mark, end in zip(marks, ends, strict=True):
        text = message[mark.end() : end].strip()
        known = problems.get(mark[1])
        problems[mark[1]] = f"{known} {text}" if known else text
    return problems


def error_from_grpc(status: str, details: str, url: str, timeout_s: float) -> ClientError:
    """The error for a failed gRPC call.

    Args:
        status: name of the status code, such as ``"UNAVAILABLE"``.
        details: its text.
        url: the address asked.
        timeout_s: the limit the call had, seconds.
    """
    if _CODE.match(details or ""):
        return error_from_message(details)
    if status == "DEADLINE_EXCEEDED":
        return deadline(url, timeout_s)
    if status == "UNAVAILABLE":
        lowered = details.lower()
        if any(sign in lowered for sign in _NO_CONNECTION):
            return _unconnected(details, url)
        if "exceeds maximum queue" not in lowered and "not ready" not in lowered:
            return broken(url)
    return error_from_message(details or "", _BY_GRPC_STATUS.get(status, status))


def _unconnected(details: str, url: str) -> Unreachable:
    lowered = details.lower()
    if "handshake" in lowered or "hostname verification" in lowered or "peer name" in lowered:
        match = _GRPC_TLS_REASON.search(details)
        if match is None and "reset" in lowered:
            return tls_failed(url, _HUNG_UP)
        return tls_failed(url, match[1] if match else details.rpartition("last error: ")[2])
    if "http/2" in lowered or "http1" in lowered:
        return wrong_protocol(url)
    return unreachable(url)


def error_from_connect(error: BaseException, url: str, tls: bool) -> Unreachable:
    """The error for a connection that could not be made.

    Args:
        error: an `OSError`; `ssl.SSLError` is one.
        url: the address asked.
        tls: whether the connection was to be encrypted.
    """
    if isinstance(error, ssl.SSLCertVerificationError):
        return tls_failed(url, error.verify_message or str(error))
    if isinstance(error, ssl.SSLError):
        return tls_failed(url, error.reason or str(error))
    if tls and isinstance(error, ConnectionResetError):  # after the connection was made
        return tls_failed(url, _HUNG_UP)
    return unreachable(url)


def error_from_http(status: int, body: str, url: str) -> ClientError:
    """The error for an HTTP answer other than 200; `body` is the ``error`` text or the page."""
    known = _BY_HTTP_STATUS.get(status, "INTERNAL")
    text = body.strip() or f"the server at {url} answered with HTTP status {status}."
    return error_from_message(text[:2000], known)


def closed() -> Cancelled:
    """The client was closed while a request ran."""
    return Cancelled("the request was cancelled, since its client was closed.")


def unreachable(url: str) -> Unreachable:
    """Nobody listens there."""
    return Unreachable(
        f"no server answers at {url}: start it with `make serve` or check the URL and protocol."
    )


def tls_failed(url: str, reason: str) -> Unreachable:
    """Somebody listens there, and the encrypted connection was not agreed on."""
    why = reason.rstrip(". ")
    if _OPENSSL_REASON.fullmatch(why):
        why = why.lower().replace("_", " ")
    return Unreachable(
        f"TLS to {url} failed ({why}); check the certificate, or use http:// or grpc:// for a "
        "server without TLS."
    )


def wrong_protocol(url: str) -> Unreachable:
    """Somebody listens there and speaks something else."""
    return Unreachable(
        f"what answers at {url} does not speak that protocol; check the port: by default 8000 is "
        "for HTTP and 8001 for gRPC."
    )


def broken(url: str) -> Unreachable:
    """The connection was lost while a request ran."""
    return Unreachable(f"the connection to {url} broke before the answer came; try again.")


def deadline(url: str, timeout_s: float) -> DeadlineExceeded:
    """The client's limit passed."""
    return DeadlineExceeded(
        f"no answer from {url} within {timeout_s:g} s; the request was given up."
    )
