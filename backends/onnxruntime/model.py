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
from closeup.onnx_serving import complete_config, find_engine, run_requests


def _open(config: dict[str, Any], *, quick: bool = False) -> Engine:
    path = find_engine(Path(pb_utils.get_model_dir()), config.get("default_model_filename", ""))
    options = EngineOptions(graph_optimization="disabled") if quick else EngineOptions()
    return open_engine(path, options=options)


class TritonPythonModel:
    """One model of the repository, in its own process."""

    @staticmethod
    def auto_complete_config(auto_complete_model_config: Any) -> Any:
        """Fill in what the config leaves out, from the graph."""
        config = auto_complete_model_config.as_dict()
        try:
            completion = complete_config(config, _open(config, quick=True))
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
            self._engine = _open(config)
        except CloseupError as error:
            raise pb_utils.TritonModelException(str(error)) from None
        self._batched = int(config["max_batch_size"]) > 0

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
