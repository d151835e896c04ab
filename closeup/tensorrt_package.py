"""The TensorRT packages: imported when needed, their log, and their failures in one sentence.

TensorRT tells what went wrong in its log alone, in several lines with its own file names; a failed
call returns None. `MessageLog` keeps those lines, `explain` turns them into a sentence.
"""

from __future__ import annotations

import importlib
import logging
import re
from collections.abc import Sequence
from typing import Any

from closeup.errors import ModelError
from closeup.plans import Flavour

log = logging.getLogger(__name__)

# What pip installs; this project's extras have the flavours' names.
PACKAGES = {Flavour.TENSORRT: "tensorrt-cu13", Flavour.RTX: "tensorrt-rtx-cu13"}
_SOURCES = {Flavour.TENSORRT: ", whose libraries are in NVIDIA's own package index or image"}
_KEPT_MESSAGES = 20
_CUDA_ERROR = re.compile(r"cuda ?error:? ?(\d+)", re.IGNORECASE)
_NO_DEVICE, _OLD_DRIVER, _OUT_OF_MEMORY = 100, 35, 2


def import_tensorrt(flavour: Flavour) -> Any:
    """Return the module of a flavour.

    Raises:
        ModelError: the package is missing or cannot be loaded; names it and the extra.
    """
    package = PACKAGES[flavour]
    try:
        return importlib.import_module(flavour.module)
    except ModuleNotFoundError as error:
        raise ModelError(
            f"{flavour.label} is not installed here (no module {error.name}): install the package "
            f"{package}, or this project with its extra, pip install 'closeup[{flavour.value}]'"
            f"{_SOURCES.get(flavour, '')}."
        ) from error
    except (ImportError, OSError, RuntimeError) as error:
        raise ModelError(
            f"{flavour.label}, package {package}, cannot be loaded: {_first_line(error)}"
        ) from error


class Messages:
    """The last errors and warnings of one TensorRT object.

    Attributes:
        errors: lines of severity error and worse, oldest first.
        warnings: lines of severity warning.
    """

    def __init__(self) -> None:
        self.errors: list[str] = []
        self.warnings: list[str] = []

    def add(self, severity: str, text: str) -> None:
        """Keep a line, and pass it on to this module's logger at the matching level.

        Args:
            severity: TensorRT's name: INTERNAL_ERROR, ERROR, WARNING, INFO or VERBOSE.
            text: the line.
        """
        if "ERROR" in severity:
            self._keep(self.errors, text)
            log.debug("TensorRT: %s", text)  # the sentence made of it is raised
        elif severity == "WARNING":
            self._keep(self.warnings, text)
            log.debug("TensorRT: %s", text)

    @staticmethod
    def _keep(lines: list[str], text: str) -> None:
        lines.append(text)
        del lines[:-_KEPT_MESSAGES]


def make_logger(trt: Any, messages: Messages) -> Any:
    """Return an ``ILogger`` of the module ``trt`` that writes into ``messages``.

    It must live as long as what was made with it.
    """
    base: Any = trt.ILogger

    class MessageLog(base):  # type: ignore[misc]
        def __init__(self) -> None:
            base.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            if severity.name in ("INFO", "VERBOSE"):  # thousands a build
                return
            messages.add(severity.name, text)

    return MessageLog()


def explain(errors: Sequence[str]) -> str:
    """Say in one clause why a TensorRT call failed.

    Args:
        errors: its log's lines of severity error, oldest first.

    Returns:
        A clause without a full stop: about the driver, the memory or the file where the lines
        tell that, else the first line, without TensorRT's own file names.
    """
    text = " ".join(errors)
    codes = {int(match[1]) for match in _CUDA_ERROR.finditer(text)}
    if codes & {_NO_DEVICE, _OLD_DRIVER}:
        code = min(codes & {_NO_DEVICE, _OLD_DRIVER})
        return (
            f"there is no GPU that it can use (CUDA error {code}): run it on a machine with an "
            "NVIDIA GPU and a driver for CUDA 13, in a container with --gpus all"
        )
    if _OUT_OF_MEMORY in codes or "out of memory" in text.lower() or "OutOfMemory" in text:
        return "the GPU has not enough free memory for it"
    if "Serialization" in text or "magic" in text.lower():
        return "the file is damaged or of another TensorRT version"
    return _without_places(errors[0]) if errors else "TensorRT gives no reason"


def _without_places(line: str) -> str:
    """Cut ``In f at /_src/...`` and `IBuilder::...` out of a line of TensorRT's log."""
    text = re.sub(r"\(?In \w+ at \S+", "", line)
    text = re.sub(r"^\S+::\S+: ", "", text)
    text = " ".join(text.split()).rstrip(" .)(")
    return text if len(text) <= 400 else f"{text[:397]}..."


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
