"""Client of a closeup server: pictures with repainted faces, over gRPC or HTTP.

The pieces: `Client` and `AsyncClient`, what they return (`Result`, `Progress`, `Served`,
`ServedLora`, `Health`), the request fields as data (`FIELDS`), and one error tree under
`ClientError`.
"""

from closeup_client.aio import AsyncClient
from closeup_client.client import Client
from closeup_client.errors import (
    Cancelled,
    ClientError,
    DeadlineExceeded,
    InvalidRequest,
    ServerFailure,
    Unavailable,
    Unreachable,
)
from closeup_client.fields import FIELDS, Field, Kind
from closeup_client.result import Progress, Result, StageImage
from closeup_client.served import Health, Served, ServedLora, ServedModel

__version__ = "0.1.0"
__all__ = [
    "FIELDS",
    "AsyncClient",
    "Cancelled",
    "Client",
    "ClientError",
    "DeadlineExceeded",
    "Field",
    "Health",
    "InvalidRequest",
    "Kind",
    "Progress",
    "Result",
    "Served",
    "ServedLora",
    "ServedModel",
    "ServerFailure",
    "StageImage",
    "Unavailable",
    "Unreachable",
]
