"""A training step that a GPU replays as one CUDA graph, so that launching kernels costs nothing.

A network of a few million parameters runs a thousand short kernels a step: launched one by one from
Python, beside rendering processes that want the same cores, they leave most of the GPU idle.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from demo.training import Run

Losses = tuple[torch.Tensor, ...]
#: Steps at a rate of zero before the capture: kernels are chosen and compiled, moments laid out.
_REHEARSALS = 3


class Step:
    """One optimizer step: as `Run.advance` takes it, or captured once and replayed.

    A graph reads its inputs from the same memory at every replay, so they are copied there; it
    averages with the full decay from the first step on. Its optimizer must be capturable.

    Args:
        run: modules, optimizer and average; its step count goes up.
        losses_of: inputs -> the loss to go down, and figures beside it; no input may be read on
            the CPU inside.
        graph: capture at the first call, where the inputs lie on a GPU. A capture that fails is
            printed, and the steps run as they are.
        max_norm: of the gradient.
    """

    def __init__(
        self, run: Run, losses_of: Callable[..., Losses], *, graph: bool, max_norm: float = 1.0
    ) -> None:
        self._run, self._losses_of, self._max_norm = run, losses_of, max_norm
        self._wanted = graph
        self._graph: Any = None
        self._held: tuple[torch.Tensor, ...] = ()
        self._rate = torch.zeros(())
        self._results: Losses = ()

    @property
    def captured(self) -> bool:
        """Whether a graph is replayed."""
        return self._graph is not None

    def __call__(self, learning_rate: float, *inputs: torch.Tensor) -> Losses:
        """Take a step; what it returns is overwritten by the next one.

        Args:
            learning_rate: of this step.
            inputs: of ``losses_of``, of the same shapes, dtypes and device every time.
        """
        if self._wanted and not self.captured:
            self.prepare(*inputs)
        if not self.captured:
            results = self._losses_of(*inputs)
            self._run.advance(results[0], learning_rate, self._max_norm)
            return tuple(result.detach() for result in results)
        for held, given in zip(self._held, inputs, strict=True):
            held.copy_(given)
        self._rate.fill_(learning_rate)
        self._graph.replay()
        self._run.step += 1
        return self._results

    def prepare(self, *inputs: torch.Tensor) -> None:
        """Capture the graph, when one is wanted; parameters stay as they are."""
        if not self._wanted or self.captured:
            return
        self._wanted = False
        if not inputs[0].is_cuda:
            return
        self._held = tuple(given.clone() for given in inputs)
        self._rate = torch.zeros((), device=inputs[0].device)
        for group in self._run.optimizer.param_groups:
            group["lr"] = self._rate
        side, here = torch.cuda.Stream(), torch.cuda.current_stream()
        side.wait_stream(here)
        with torch.cuda.stream(side):
            for _ in range(_REHEARSALS):
                self._advance()
        here.wait_stream(side)
        self._run.optimizer.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._results = self._advance()
        except Exception as error:  # training goes on without a graph, whatever it was
            print(f"not captured: {type(error).__name__}: {str(error)[:600]}", flush=True)
            torch.cuda.synchronize()
            self._run.optimizer.zero_grad(set_to_none=True)
            return
        self._graph = graph

    def _advance(self) -> Losses:
        run = self._run
        run.optimizer.zero_grad(set_to_none=True)
        results = self._losses_of(*self._held)
        results[0].backward()
        nn.utils.clip_grad_norm_(run.average.parameters, self._max_norm)
        run.optimizer.step()
        run.average.update(_LATE)
        return tuple(result.detach() for result in results)


_LATE = 10**9
"""A step at which an average has its full decay."""
