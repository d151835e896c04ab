"""The Triton models `generate` and `generate_stream`: the graph behind the public fields."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import sys
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from closeup.errors import DeadlineError, RequestCancelled
from closeup.fields import FIELD_BY_NAME, FIELDS, Kind
from closeup.graph import Outcome, generate
from closeup.heap import keep_freed_memory
from closeup.images import encode_image
from closeup.info import build_info, picture_parameters
from closeup.lora_store import LoraStore
from closeup.repository import Repository
from closeup.request import Limits, Request, Served, parse_options, resolve_request
from closeup.run import Array, Progress, Run, text_tensor
from closeup.settings import read_settings
from closeup.triton_glue import (
    Reply,
    TritonModels,
    Watchdog,
    configure_logging,
    request_inputs,
)

log = logging.getLogger(__name__)

WATCHDOG_MARGIN_S = 30.0
BLS_THREADS = 64
LOOK_INTERVAL_S = 0.05  # between looks at whether the client is still there
# How long a thread that computes may keep the others from running, those that carry calls to the
# engines among them; Python's own is 5 ms.
SWITCH_INTERVAL_S = 0.0005
PICTURE_FIELDS = {field.name for field in FIELDS if field.kind is Kind.IMAGE}


class GenerateModel:
    """A Triton Python model; `streaming` says which of the two."""

    streaming = False

    def initialize(self, args: Mapping[str, str]) -> None:
        """Read the repository and start the event loop that runs the requests."""
        configure_logging()
        keep_freed_memory()
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        self._settings = read_settings()
        self._repository = Repository(Path(args["model_repository"]).parent)
        self._loras = LoraStore(self._settings.lora_dir)
        self._models = TritonModels()
        self._watchdog = Watchdog()
        self._loop = asyncio.new_event_loop()
        # Each BLS call in flight holds a thread; the default pool has cores + 4 of them.
        self._loop.set_default_executor(ThreadPoolExecutor(BLS_THREADS))
        self._thread = threading.Thread(target=self._loop.run_forever, name="graph", daemon=True)
        self._thread.start()

    def execute(self, requests: Sequence[Any]) -> None:
        """Start every request; answers come later."""
        for request in requests:
            limit_s = self._settings.request_timeout_s + WATCHDOG_MARGIN_S
            reply = self._watchdog.guard(Reply(request, limit_s))
            try:
                inputs = request_inputs(request)
                parameters = json.loads(request.parameters() or "{}")
            except BaseException as error:
                reply.fail(error)
                continue
            asyncio.run_coroutine_threadsafe(self._serve(inputs, parameters, reply), self._loop)

    def finalize(self) -> None:
        """Answer what is still open and stop the loop."""
        self._watchdog.close()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=5)

    async def _serve(
        self, inputs: dict[str, Array], parameters: Mapping[str, Any], reply: Reply
    ) -> None:
        try:
            if any(
                FIELD_BY_NAME[name].kind is Kind.IMAGE for name in inputs.keys() & FIELD_BY_NAME
            ):
                request = await asyncio.to_thread(self._resolve, inputs, parameters)
            else:  # a fraction of a millisecond
                request = self._resolve(inputs, parameters)
            run = self._start_run(request, reply)
            outcome = await generate(
                run,
                tokenizers=self._repository.tokenizers(request.model),
                upscaler=self._repository.upscaler,
            )
            run.check()
            request_id = uuid.uuid4().hex[:12]
            answer = await asyncio.to_thread(self._answer, run, outcome, request_id)
            await run.ticket_returned()
            reply.finish(answer)
            _log_request(request_id, run)
        except BaseException as error:
            reply.fail(error)

    def _resolve(self, inputs: dict[str, Array], parameters: Mapping[str, Any]) -> Request:
        values = {
            name: array.reshape(-1)[0] for name, array in inputs.items() if name in FIELD_BY_NAME
        }
        repository = self._repository
        return resolve_request(
            parse_options(values, parameters),
            served=Served(
                models=repository.models(),
                known_lora=self._loras.known,
                has_upscaler=repository.upscaler is not None,
                has_face_detector=repository.face_detector is not None,
                limits=Limits(max_pixels=self._settings.max_pixels),
            ),
            streaming=self.streaming,
        )

    def _start_run(self, request: Request, reply: Reply) -> Run:
        now_s = time.monotonic()
        due_s, look_s = now_s + self._settings.request_timeout_s, now_s

        def check() -> None:
            nonlocal look_s
            now_s = time.monotonic()
            if reply.closed or (now_s >= look_s and reply.cancelled):
                raise RequestCancelled("the client cancelled the request or went away.")
            if now_s >= look_s:  # each look is a question to Triton's process
                look_s = now_s + LOOK_INTERVAL_S
            if now_s > due_s:
                raise DeadlineError(
                    "the request ran past the server's limit of "
                    f"{self._settings.request_timeout_s:g} s; ask for less or raise the limit."
                )

        def report(progress: Progress) -> None:
            # Sending is also how this Triton notices that a client has closed its stream.
            if self.streaming:
                reply.send_event(_event(progress, request.raw))

        return Run(
            request=request,
            models=self._models,
            check=check,
            report=report,
            segment_steps=self._settings.segment_steps,
            warnings=list(request.warnings),
        )

    def _answer(self, run: Run, outcome: Outcome, request_id: str) -> dict[str, Array]:
        request = run.request
        with run.stage("files", len(outcome.pictures)):
            files = [
                encode_image(
                    pixels,
                    format=request.image_format,
                    quality=None if request.image_format == "png" else request.image_quality,
                    metadata=picture_parameters(request, seed),
                )
                for pixels, seed in zip(outcome.pictures, request.seeds, strict=True)
            ]
            stage_files = [
                encode_image(pixels, format="png")
                for pictures in outcome.stages.values()
                for pixels in pictures
            ]
        info = build_info(run, outcome, request_id)
        outputs = {
            "image": _file_tensor(files, request.raw),
            "info": text_tensor(json.dumps(info)),
        }
        if request.stages:
            outputs["stage_image"] = _file_tensor(stage_files, request.raw)
        if self.streaming:
            outputs["event"] = text_tensor(json.dumps({"type": "result"}))
        return outputs


def _file_tensor(files: list[bytes], raw: bool) -> Array:
    return np.array(files if raw else [base64.b64encode(data) for data in files], np.object_)


def _event(progress: Progress, raw: bool) -> dict[str, Array]:
    event = {
        "type": "progress",
        "stage": progress.stage,
        "step": progress.step,
        "steps": progress.steps,
        "elapsed_s": round(progress.elapsed_s, 3),
        "eta_s": None if progress.eta_s is None else round(progress.eta_s, 3),
        "image": progress.image,
    }
    outputs = {"event": text_tensor(json.dumps(event))}
    if progress.preview is not None:
        outputs["preview"] = _file_tensor([progress.preview], raw)
    return outputs


def _log_request(request_id: str, run: Run) -> None:
    request = run.request
    stages = ", ".join(f"{name} {ms:.0f}" for name, ms in run.timings_ms.items())
    log.info(
        "request %s: %s, %d x %dx%d, %d steps, seed %d, ms: %s",
        request_id, request.model.name, request.num_images, request.width, request.height,
        request.steps, request.seed, stages,
    )  # fmt: skip
