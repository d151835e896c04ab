"""The eager side in a process of its own: started once, asked by lines of JSON.

``python -m benchmarks.eager_process`` reads one request a line (the fields, and ``out`` where to
put the picture) and answers one line. Its memory is its own, so it can be measured.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.subjects import ROOT, Subject

WAIT_POLICIES = ("passive", "active")


@dataclass(frozen=True, kw_only=True, slots=True)
class EagerRun:
    """One answer: wall seconds of the whole request, and the stages' milliseconds."""

    wall_s: float
    timings_ms: dict[str, float]
    faces: int


class EagerProcess:
    """The child process; a context manager that starts and ends it.

    Args:
        subject: what to load.
        threads: of PyTorch.
        wait_policy: how its threads wait for each other, ``active`` or ``passive``; active, the
            default of the OpenMP library, is the faster on idle cores and far slower on busy ones.
    """

    def __init__(self, subject: Subject, *, threads: int, wait_policy: str) -> None:
        self.wait_policy = wait_policy
        self._process = subprocess.Popen(
            [
                sys.executable, "-m", "benchmarks.eager_process",
                "--pipeline", str(subject.pipeline), "--upscaler", str(subject.upscaler),
                "--face-detector", str(subject.face_detector),
                "--repository", str(subject.repository), "--threads", str(threads),
            ],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "OMP_WAIT_POLICY": wait_policy,
                "TRANSFORMERS_VERBOSITY": "error",
                "DIFFUSERS_VERBOSITY": "error",
                "TQDM_DISABLE": "1",
            },
        )  # fmt: skip
        self._answer()

    @property
    def pid(self) -> int:
        """Of the child."""
        return self._process.pid

    def run(self, fields: dict[str, Any], out: Path) -> EagerRun:
        """Run one request and write its picture to ``out``."""
        assert self._process.stdin is not None
        self._process.send_signal(signal.SIGCONT)
        self._process.stdin.write(json.dumps({"fields": fields, "out": str(out)}) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        return EagerRun(
            wall_s=answer["wall_s"], timings_ms=answer["timings_ms"], faces=answer["faces"]
        )

    def pause(self) -> None:
        """Hold the process until its next turn: threads that wait actively take a core else."""
        self._process.send_signal(signal.SIGSTOP)

    def __enter__(self) -> EagerProcess:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.terminate()
        self._process.send_signal(signal.SIGCONT)  # were it held, it would not end
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the eager process ended; its error is above.")
        answer: dict[str, Any] = json.loads(line)
        return answer


def faster_wait_policy(subject: Subject, *, threads: int, out: Path) -> str:
    """Try both ways of waiting on one step, after a warm-up each; return the faster one's name.

    The eager side gets it, so that a busy machine does not make us look good.
    """
    wall_s = {}
    fields = {**subject.fields, "steps": 1}
    for policy in WAIT_POLICIES:
        with EagerProcess(subject, threads=threads, wait_policy=policy) as eager:
            eager.run(fields, out)
            wall_s[policy] = eager.run(fields, out).wall_s
    return min(WAIT_POLICIES, key=lambda policy: wall_s[policy])


def main() -> None:
    """Load, then answer until the input ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pipeline", type=Path, required=True)
    parser.add_argument("--upscaler", type=Path, required=True)
    parser.add_argument("--face-detector", type=Path, required=True)
    parser.add_argument("--repository", type=Path, required=True)
    parser.add_argument("--threads", type=int, required=True)
    options = parser.parse_args()
    # torch is loaded here and not with this module, which the parent imports too.
    from benchmarks.eager import EagerGraph
    from closeup.local import LocalModels

    graph = EagerGraph(
        options.pipeline,
        upscaler=options.upscaler,
        face_detector=options.face_detector,
        threads=options.threads,
    )
    resolver = LocalModels(options.repository)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        started_s = time.perf_counter()
        answer = graph.run(resolver.resolve(**job["fields"]))
        wall_s = time.perf_counter() - started_s
        Path(job["out"]).write_bytes(answer.files[0])
        reply = {"wall_s": wall_s, "timings_ms": answer.timings_ms, "faces": answer.faces}
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main()
