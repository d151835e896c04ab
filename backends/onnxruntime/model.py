"""Python-based Triton backend ``onnxruntime``, for servers that lack the native one.

Triton runs this class for every model with ``backend: "onnxruntime"``; see
:mod:`closeup.onnx_serving` for what it does.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils

from closeup.engines import Engine, EngineOptions, open_engine
from closeup.errors import CloseupError
from closeup.onnx_serving import (
    check_config,
    complete_config,
    find_engine,
    is_complete,
    needs_dynamic_batching,
    options_from_config,
    run_requests,
)


def _open(config: dict[str, Any], options: EngineOptions) -> Engine:
    path = find_engine(Path(pb_utils.get_model_dir()), config.get("default_model_filename", ""))
    return open_engine(path, options=options)


class TritonPythonModel:
    """One model of the repository, in its own process."""

    @staticmethod
    def auto_complete_config(auto_complete_model_config: Any) -> Any:
        """Fill in what the config leaves out, from the graph."""
        config = auto_complete_model_config.as_dict()
        if is_complete(config):
            if needs_dynamic_batching(config, config["max_batch_size"]):
                auto_complete_model_config.set_dynamic_batching()
            return auto_complete_model_config
        try:
            # Nothing runs here, so nothing is optimised.
            quick = EngineOptions(graph_optimization="disabled", use_cuda=False)
            completion = complete_config(config, _open(config, quick))
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
        try:
            options = options_from_config(
                config,
                use_cuda=args["model_instance_kind"] == "GPU",
                device_id=int(args["model_instance_device_id"]),
            )
            self._engine = _open(config, options)
            check_config(config, self._engine)
        except CloseupError as error:
            raise pb_utils.TritonModelException(str(error)) from None
        self._batched = int(config["max_batch_size"]) > 0
        if sum(group.get("count", 1) for group in config.get("instance_group", ())) > 1:
            pb_utils.Logger.log_warn(
                f"{args['model_instance_name']}: every instance is a process with its own copy of "
                "the weights; write instance_group [ { count: 1 } ] to have one."
            )

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

    def finalize(self) -> None:
        """Free the engine."""
        self._engine.close()


def _respond(answer: Any, wanted: set[str]) -> Any:
    if isinstance(answer, CloseupError):
        error = pb_utils.TritonError(f"INVALID_ARG: {answer}", pb_utils.TritonError.INVALID_ARG)
        return pb_utils.InferenceResponse(error=error)
    return pb_utils.InferenceResponse(
        [pb_utils.Tensor(name, array) for name, array in answer.items() if name in wanted]
    )
