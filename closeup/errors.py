"""The project's errors: what went wrong, for whom, and the code a client sees.

Every message is one sentence that says what was given, what was expected and what to do. A
client receives ``"<CODE>: <message>"`` and never a traceback.
"""

from __future__ import annotations

from typing import ClassVar


class CloseupError(Exception):
    """Base of all errors raised on purpose by this project."""

    code: ClassVar[str] = "INTERNAL"


class RequestError(CloseupError):
    """A request cannot be served as given; nothing has run for it.

    Attributes:
        problems: field name -> one sentence, in the order found. The field ``"request"`` stands
            for the request as a whole.
    """

    code: ClassVar[str] = "INVALID_ARG"

    def __init__(self, problems: dict[str, str]) -> None:
        self.problems = dict(problems)
        super().__init__(" ".join(f"{field}: {text}" for field, text in self.problems.items()))


class UnavailableError(CloseupError):
    """The server has no free slot; the same request may succeed later."""

    code: ClassVar[str] = "UNAVAILABLE"


class RequestCancelled(CloseupError):  # noqa: N818 - the client's wish, not a fault
    """The client cancelled, closed its stream, or its deadline passed."""

    code: ClassVar[str] = "CANCELLED"


class DeadlineError(CloseupError):
    """The request ran past the server's own time limit."""

    code: ClassVar[str] = "UNAVAILABLE"


class ModelError(CloseupError):
    """A model's files are missing, damaged, or answered with something impossible."""


class FeedError(ModelError):
    """An engine was fed tensors that it does not take: other names, types or shapes."""

    code: ClassVar[str] = "INVALID_ARG"


class ExportError(CloseupError):
    """An export cannot be made or does not agree with the model it was made from."""


class ServerError(CloseupError):
    """The embedded server cannot start or has died."""
