"""The Triton model `<model>_denoiser`: `closeup.denoiser.Denoiser` behind late answers.

Non-decoupled: `execute` hands segments to the batcher's thread and returns; each answer is sent
when its segment is done.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils

from closeup.cuda_device import lost_device
from closeup.denoiser import LEASE_MARGIN_S, Answer, Denoiser
from closeup.denoiser_metrics import METRICS, metric_values
from closeup.run import Array
from closeup.settings import read_settings
from closeup.triton_glue import Reply, Watchdog, configure_logging, request_inputs


class TritonPythonModel:
    """See the module."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Open the engine and run one step to warm up."""
        configure_logging()
        _check_alone(args)
        settings = read_settings()
        self._limit_s = settings.request_timeout_s + LEASE_MARGIN_S
        self._watchdog = Watchdog()
        self._denoiser = Denoiser(
            Path(args["model_repository"]),
            version=args["model_version"],
            settings=settings,
            device_id=_device_id(args),
        )
        self._metrics = _Metrics(args["model_name"], self._denoiser)

    def execute(self, requests: Sequence[Any]) -> None:
        """Start every request; answers come later."""
        for request in requests:
            reply = self._watchdog.guard(Reply(request, self._limit_s))
            try:
                future = self._denoiser.start(_frozen(request_inputs(request)))
            except BaseException as error:
                reply.fail(error)
            else:
                future.add_done_callback(partial(self._answer, reply))

    def is_ready(self) -> bool:
        """Whether a request can still succeed; Triton asks from 26.03 on."""
        return not lost_device()

    def finalize(self) -> None:
        """Answer what is still open and release the engine."""
        self._denoiser.close()
        self._watchdog.close()

    def _answer(self, reply: Reply, done: Future[Answer]) -> None:
        error = done.exception()
        if error is not None:
            reply.fail(error)
        else:
            reply.finish(done.result())
        self._metrics.publish()


def _device_id(args: Mapping[str, str]) -> int:
    """The GPU that Triton put this instance on; 0 for one on the CPU."""
    return int(args["model_instance_device_id"]) if args["model_instance_kind"] == "GPU" else 0


def _check_alone(args: Mapping[str, str]) -> None:
    """Refuse to be one of several: a ticket is known to the process that gave it alone."""
    groups = json.loads(args["model_config"]).get("instance_group", ())
    count = sum(group.get("count", 1) * max(1, len(group.get("gpus", ()))) for group in groups)
    if count > 1:
        raise pb_utils.TritonModelException(
            f"{args['model_name']} would run as {count} processes, and each request's parts must "
            "meet the same one: give the container one GPU (--gpus device=0), or write "
            "instance_group { count: 1 kind: KIND_GPU gpus: [ 0 ] } into its config.pbtxt."
        )


def _frozen(inputs: dict[str, Array]) -> dict[str, Array]:
    """Make the copies of a request's inputs read-only: engines on a GPU then take each once."""
    for array in inputs.values():
        array.setflags(write=False)
    return inputs


class _Metrics:
    """The denoiser's counters on Triton's metrics endpoint.

    Every change crosses to Triton's process, at a few tenths of a millisecond each, so values
    are published with the answers, not at every tick, and only those that changed.
    """

    def __init__(self, model: str, denoiser: Denoiser) -> None:
        self._denoiser = denoiser
        self._lock = threading.Lock()
        self._stale = False
        self._families: list[Any] = []  # Triton drops a metric with its family
        self._metrics: dict[str, Any] = {}
        self._published = {spec.name: 0.0 for spec in METRICS}
        kinds = pb_utils.MetricFamily
        for spec in METRICS:
            family = pb_utils.MetricFamily(
                name=spec.name,
                description=spec.description,
                kind=kinds.COUNTER if spec.is_total else kinds.GAUGE,
            )
            self._families.append(family)
            self._metrics[spec.name] = family.Metric(labels={"model": model})
        self.publish()

    def publish(self) -> None:
        """Bring Triton's values up to date.

        Answers come from several threads, that of the denoising steps among them: a thread that
        meets another at work leaves it to that one.
        """
        self._stale = True
        while self._stale and self._lock.acquire(blocking=False):
            try:
                self._stale = False
                self._publish_changes()
            finally:
                self._lock.release()

    def _publish_changes(self) -> None:
        values = metric_values(self._denoiser)
        for spec in METRICS:
            value = values.get(spec.name, 0.0)
            change = value - self._published[spec.name]
            if change and spec.is_total:
                self._metrics[spec.name].increment(change)
            elif change:
                self._metrics[spec.name].set(value)
            self._published[spec.name] = value
