"""Requests and answers on the wire: the KServe v2 protocol's bytes, and nothing that does I/O.

Every field is a tensor of shape [1]; every output is BYTES.
"""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from tritonclient.grpc import service_pb2

from closeup_client.checks import Value, check_fields
from closeup_client.errors import InvalidRequest, ServerFailure, error_from_message
from closeup_client.fields import FIELDS

HEADER_LENGTH = "Inference-Header-Content-Length"
LIST_LORAS: Mapping[str, Value] = {"operation": "loras"}  # what a pipeline's denoiser is asked
DEFAULT_PORTS = {"grpc": 8001, "http": 8000}
_SCHEMES = {"": None, "grpc": "grpc", "grpcs": "grpc", "http": "http", "https": "http"}
_DATATYPES = {field.name: field.datatype for field in FIELDS} | {"operation": "BYTES"}
_NUMBER_FORMATS = {"INT64": "<q", "FP64": "<d", "BOOL": "<?"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Address:
    """Where the server is.

    Attributes:
        protocol: ``"grpc"`` or ``"http"``.
        host: name or number; IPv6 without brackets.
        port: TCP port.
        tls: whether the connection is encrypted (``https://``, ``grpcs://``).
        path: prefix of HTTP paths, ``""`` or ``"/prefix"``.
    """

    protocol: str
    host: str
    port: int
    tls: bool = False
    path: str = ""

    @property
    def netloc(self) -> str:
        """``host:port``, IPv6 in brackets."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    def __str__(self) -> str:
        return f"{self.netloc}{self.path} ({self.protocol})"


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """A checked request.

    Attributes:
        values: field -> value, `response_encoding` included.
        encoding: ``"raw"`` or ``"base64"``.
        face_pass: whether `inpaint_faces` is on.
    """

    values: Mapping[str, Value]
    encoding: str
    face_pass: bool


def address_from_url(url: str | None, protocol: str | None) -> Address:
    """The address from ``host[:port]`` or ``http[s]://`` / ``grpc[s]://host[:port][/prefix]``.

    The protocol is the URL's scheme, else `protocol`, else gRPC.

    Raises:
        InvalidRequest: the URL or the protocol is none of these, or they contradict each other.
    """
    if protocol not in (None, "grpc", "http"):
        raise InvalidRequest({"protocol": f"got {protocol!r}; expected 'grpc' or 'http'."})
    text = "localhost" if url is None else url
    scheme, _, rest = text.partition("://") if "://" in text else ("", "", text)
    bad = InvalidRequest({"url": f"got {text!r}; expected host:port, http://host or grpc://host."})
    try:
        parts = urlsplit(f"//{rest}")
        host, port = parts.hostname, parts.port
    except ValueError:
        raise bad from None
    if scheme not in _SCHEMES or not host:
        raise bad
    spoken = _SCHEMES[scheme] or protocol or "grpc"
    if protocol not in (None, spoken):
        raise InvalidRequest(
            {"protocol": f"got {protocol!r} with the URL {text!r}; leave one out."}
        )
    tls = scheme in ("grpcs", "https")
    default = 443 if tls else DEFAULT_PORTS[spoken]
    path = parts.path.rstrip("/") if spoken == "http" else ""
    return Address(protocol=spoken, host=host, port=port or default, tls=tls, path=path)


def prepare(fields: Mapping[str, Any], *, json_stream: bool) -> Prepared:
    """Check the fields and choose how pictures come back.

    Args:
        fields: as the caller gave them.
        json_stream: whether the answer is JSON events (HTTP streaming), which carry text only.

    Raises:
        InvalidRequest: see `closeup_client.checks.check_fields`.
    """
    values = check_fields(fields)
    asked = values.get("response_encoding")
    if json_stream and asked == "raw":
        problem = "got 'raw'; expected base64, since HTTP streams carry text. Use gRPC for raw."
        raise InvalidRequest({"response_encoding": problem})
    encoding = str(asked or ("base64" if json_stream else "raw"))
    face_pass = values.get("inpaint_faces") is True
    values["response_encoding"] = encoding
    return Prepared(values=values, encoding=encoding, face_pass=face_pass)


def raw_from_value(name: str, value: Value) -> bytes:
    """One field's tensor as bytes: little-endian numbers, strings after a 4-byte length."""
    datatype = _DATATYPES[name]
    if datatype == "BYTES":
        data = value if isinstance(value, bytes) else str(value).encode("utf-8")
        return struct.pack("<I", len(data)) + data
    return struct.pack(_NUMBER_FORMATS[datatype], value)


def grpc_request(model: str, values: Mapping[str, Value]) -> Any:
    """A ``ModelInferRequest`` for a model."""
    request = service_pb2.ModelInferRequest(model_name=model)
    for name, value in values.items():
        tensor = request.inputs.add()
        tensor.name, tensor.datatype = name, _DATATYPES[name]
        tensor.shape.append(1)
        request.raw_input_contents.append(raw_from_value(name, value))
    return request


def outputs_from_grpc(response: Any) -> dict[str, list[bytes]]:
    """The output tensors of a ``ModelInferResponse``."""
    raws = response.raw_output_contents
    return {
        tensor.name: _strings(raws[i]) if raws else list(tensor.contents.bytes_contents)
        for i, tensor in enumerate(response.outputs)
    }


def http_body(values: Mapping[str, Value]) -> tuple[bytes, int]:
    """Body of ``POST .../infer`` with binary tensors, and the length of its JSON header."""
    raws = {name: raw_from_value(name, value) for name, value in values.items()}
    inputs = [
        {
            "name": name,
            "shape": [1],
            "datatype": _DATATYPES[name],
            "parameters": {"binary_data_size": len(raw)},
        }
        for name, raw in raws.items()
    ]
    header = json.dumps({"inputs": inputs, "parameters": {"binary_data_output": True}}).encode()
    return header + b"".join(raws.values()), len(header)


def outputs_from_http(body: bytes, header_length: int | None) -> dict[str, list[bytes]]:
    """The output tensors of an ``/infer`` answer, binary or JSON.

    Raises:
        ServerFailure: the body is damaged.
    """
    end = len(body) if header_length is None else header_length
    outputs: dict[str, list[bytes]] = {}
    try:
        for tensor in json.loads(body[:end])["outputs"]:
            size = tensor.get("parameters", {}).get("binary_data_size")
            if size is None:
                outputs[tensor["name"]] = [str(item).encode() for item in tensor["data"]]
                continue
            if end + size > len(body):
                raise ValueError("tensor past the end")
            outputs[tensor["name"]] = _strings(body[end : end + size])
            end += size
    except (KeyError, TypeError, ValueError):
        raise ServerFailure("the answer is no inference response; is this Triton?") from None
    return outputs


def json_body(values: Mapping[str, Value]) -> bytes:
    """Body of ``POST .../generate_stream``; pictures as base64."""
    return json.dumps(
        {
            name: base64.b64encode(value).decode() if isinstance(value, bytes) else value
            for name, value in values.items()
        }
    ).encode()


def outputs_from_event(line: bytes) -> dict[str, list[bytes]] | None:
    """The output tensors of one server-sent line; None for lines that carry no data.

    Raises:
        ServerFailure: the data is no JSON object.
        ClientError: the server sent an error in the event.
    """
    if not line.startswith(b"data:"):
        return None
    try:
        event = json.loads(line[5:])
    except ValueError:
        event = None
    if not isinstance(event, dict):
        raise ServerFailure("the stream holds an event that is not a JSON object.")
    if "error" in event:
        raise error_from_message(str(event["error"]))
    names = ("event", "preview", "image", "info", "stage_image")
    return {
        name: [str(item).encode() for item in _listed(event[name])]
        for name in names
        if event.get(name) is not None
    }


def error_text(body: bytes) -> str:
    """The sentence in the body of a failed HTTP answer.

    Triton writes a refused stream's error as an event, though the status is 400.
    """
    text = body.decode("utf-8", "replace").strip().removeprefix("data:").lstrip()
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return str(value["error"]) if isinstance(value, dict) and "error" in value else text


def index_from_json(body: bytes) -> list[tuple[str, str, str]]:
    """(name, state, reason) of every entry of a repository index.

    Raises:
        ServerFailure: the body is no index.
    """
    try:
        return [
            (str(entry["name"]), str(entry.get("state", "")), str(entry.get("reason", "")))
            for entry in json.loads(body)
        ]
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ServerFailure("the answer is no repository index; is this Triton?") from None


def metadata_from_json(body: bytes) -> tuple[str, str]:
    """The server's name and version.

    Raises:
        ServerFailure: the body is no server metadata.
    """
    try:
        value = json.loads(body)
        return str(value["name"]), str(value["version"])
    except (KeyError, TypeError, ValueError):
        raise ServerFailure("the answer is no server metadata; is this Triton?") from None


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list) else [value]


def _strings(raw: bytes) -> list[bytes]:
    items: list[bytes] = []
    start = 0
    while start < len(raw):
        if start + 4 > len(raw):
            raise ServerFailure("a tensor in the answer is cut short.")
        (length,) = struct.unpack_from("<I", raw, start)
        start += 4
        if start + length > len(raw):
            raise ServerFailure("a tensor in the answer is cut short.")
        items.append(bytes(raw[start : start + length]))
        start += length
    return items
