"""Let running requests finish before a server is told to stop.

Once Triton has been told, it refuses the calls between models, and a request that is on its way
dies at its next one. So first no new request gets a ticket (the denoisers look for a file), then
the running ones return theirs, and only then Triton is told.

``python -m closeup.drain --file /tmp/closeup-draining --limit-s 30`` does the first two.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

DRAIN_VARIABLE = "CLOSEUP_DRAIN_FILE"
_IN_USE = re.compile(r"^closeup_slots_in_use\{[^}]*\}\s+(\S+)", re.MULTILINE)
_POLL_S = 0.1
#: After the last ticket is back a request still writes its files and answers.
_SETTLE_S = 0.5
_LOOK_TIMEOUT_S = 5.0


def is_draining() -> bool:
    """Whether this server takes no new requests: the file of ``CLOSEUP_DRAIN_FILE`` is there."""
    path = os.environ.get(DRAIN_VARIABLE)
    return bool(path) and os.path.exists(str(path))


def slots_in_use(metrics: str) -> float:
    """Pictures in flight, of all denoisers, by the text of Triton's metrics."""
    return sum(float(value) for value in _IN_USE.findall(metrics))


def drain(file: Path, metrics_url: str, limit_s: float) -> bool:
    """Refuse new requests and wait for the running ones.

    Args:
        file: what the denoisers look for; made here.
        metrics_url: Triton's metrics.
        limit_s: the longest to wait, seconds.

    Returns:
        Whether all requests have finished. A server that does not answer has none.
    """
    file.touch()
    deadline = time.monotonic() + limit_s
    # No proxy: the server is this machine's own.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    busy = False
    while True:
        try:
            with opener.open(metrics_url, timeout=_LOOK_TIMEOUT_S) as answer:
                in_use = slots_in_use(answer.read().decode())
        except (OSError, urllib.error.URLError):
            return not busy
        if not in_use:
            if busy:
                time.sleep(_SETTLE_S)
            return True
        if time.monotonic() >= deadline:
            return False
        busy = True
        time.sleep(_POLL_S)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns 1 when the limit cut requests short."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--file", type=Path, required=True)
    parser.add_argument("--metrics-url", default="http://127.0.0.1:8002/metrics")
    parser.add_argument("--limit-s", type=float, default=30.0)
    options = parser.parse_args(arguments)
    return 0 if drain(options.file, options.metrics_url, options.limit_s) else 1


if __name__ == "__main__":
    sys.exit(main())
