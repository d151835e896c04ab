"""What the Python-based backends share: a model of the repository behind Triton, in its process.

See :mod:`closeup.onnx_serving` for how configs are completed and requests joined.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import triton_python_backend_utils as pb_utils

from closeup.cuda_device import lost_device
from closeup.engines import Described, Engine, EngineOptions, open_engine
from closeup.errors import CloseupError, FeedError
from closeup.onnx_serving import (
    check_config,
    complete_config,
    find_engine,
    is_complete,
    needs_dynamic_batching,
    options_from_config,
    run_requests,
    runs_on_cuda,
)
from closeup.plans import GRAPH_SUFFIX


class EngineBackend:
    """One model, in its own process; a backend says how its engine is described unopened."""

    model_file: ClassVar[str]

    @classmethod
    def describe(cls, path: Path) -> Described:
        """Return the engine's tensors, as cheaply as can be.

        Raises:
            CloseupError: it cannot be told.
        """
        raise NotImplementedError

    @classmethod
    def auto_complete_config(cls, auto_complete_model_config: Any) -> Any:
        """Fill in what the config leaves out, from the engine."""
        config = auto_complete_model_config.as_dict()
        if is_complete(config):
            if needs_dynamic_batching(config, config["max_batch_size"]):
                auto_complete_model_config.set_dynamic_batching()
            return auto_complete_model_config
        try:
            completion = complete_config(config, cls.describe(cls._path(config)))
        except CloseupError as error:
            raise pb_utils.TritonModelException(str(error)) from None
        auto_complete_model_config.set_max_batch_size(completion.max_batch_size)
        if completion.dynamic_batching:
            auto_complete_model_config.set_dynamic_batching()
        for tensor in completion.inputs:
            auto_complete_model_config.add_input(tensor)
        for tensor in completion.outputs:
            auto_complete_model_config.add_output(tensor)
        return auto_complete_model_config

    def initialize(self, args: dict[str, str]) -> None:
        """Open the engine."""
        config = json.loads(args["model_config"])
        on_gpu = args["model_instance_kind"] == "GPU"
        try:
            path = self._path(config)
            options = options_from_config(
                config,
                use_cuda=runs_on_cuda(on_gpu) if path.suffix == GRAPH_SUFFIX else on_gpu,
                device_id=int(args["model_instance_device_id"]) if on_gpu else 0,
            )
            self._engine = self.open(path, options)
            check_config(config, self._engine)
        except CloseupError as error:
            raise pb_utils.TritonModelException(str(error)) from None
        self._batched = int(config["max_batch_size"]) > 0
        if sum(group.get("count", 1) for group in config.get("instance_group", ())) > 1:
            pb_utils.Logger.log_warn(
                f"{args['model_instance_name']}: every instance is a process with its own copy of "
                "the weights; write instance_group [ { count: 1 } ] to have one."
            )

    def open(self, path: Path, options: EngineOptions) -> Engine:
        """Open the engine."""
        return open_engine(path, options=options)

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer all requests, together where their shapes agree."""
        feeds = [
            {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
            for request in requests
        ]
        answers = run_requests(self._engine, feeds, batched=self._batched)
        return [
            _respond(answer, set(request.requested_output_names()))
            for request, answer in zip(requests, answers, strict=True)
        ]

    def is_ready(self) -> bool:
        """Whether a request can still succeed; Triton asks from 26.03 on."""
        return not lost_device()

    def finalize(self) -> None:
        """Free the engine."""
        self._engine.close()

    @classmethod
    def _path(cls, config: dict[str, Any]) -> Path:
        name = config.get("default_model_filename", "") or cls.model_file
        return find_engine(Path(pb_utils.get_model_dir()), name)


def _respond(answer: Any, wanted: set[str]) -> Any:
    if isinstance(answer, CloseupError):
        if answer.code != FeedError.code:  # the machine's fault, not the sender's
            pb_utils.Logger.log_error(str(answer))
        code = getattr(pb_utils.TritonError, answer.code)
        error = pb_utils.TritonError(f"{answer.code}: {answer}", code)
        return pb_utils.InferenceResponse(error=error)
    return pb_utils.InferenceResponse(
        [pb_utils.Tensor(name, array) for name, array in answer.items() if name in wanted]
    )
