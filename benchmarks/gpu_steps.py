"""One denoising step of a family in diffusers: eager, in a CUDA graph, compiled."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.gpu_blocks import NotRun, first_line
from benchmarks.gpu_findings import COMPILED, EAGER, GRAPH, Findings
from benchmarks.gpu_models import BATCHES, Subject, build_network, call_inputs
from benchmarks.gpu_timing import graphed, median_ms


@dataclass(kw_only=True)
class DiffusersSteps:
    """Times a subject's network in PyTorch; the network is made once and kept until `free`.

    Attributes:
        subject: which network, and its calls.
        device: cuda or cpu.
        dtype: of the weights and inputs.
        found: takes the figures.
        batches: pictures in a call.
    """

    subject: Subject
    device: str
    dtype: torch.dtype
    found: Findings
    batches: Sequence[int] = BATCHES
    _network: nn.Module | None = None

    @torch.inference_mode()
    def eager(self) -> None:
        """Time the network as diffusers runs it, then the same replayed from a CUDA graph."""
        network = self._open()
        for batch in self.batches:
            inputs = self._inputs(batch)
            self._keep(EAGER, batch, median_ms(partial(network, **inputs), device=self.device))
            if self.device != "cuda":
                self.found.note(self.subject.name, f"{GRAPH}: not run: there is no CUDA device.")
                continue
            try:
                replay = graphed(network, inputs)
                self._keep(GRAPH, batch, median_ms(replay, device=self.device))
                del replay
            except Exception as error:  # the eager figures stand without it
                self.found.note(self.subject.name, f"{GRAPH}, batch {batch}: {first_line(error)}")
            self._trim()

    @torch.no_grad()
    def compiled(self, batches: Sequence[int], *, regional: bool) -> None:
        """Time the network compiled.

        Args:
            batches: each may compile anew.
            regional: compile one block of each kind, which is quick; else the whole network,
                in CUDA graphs.
        """
        if self.device != "cuda":
            raise NotRun("torch.compile is compared on a CUDA device.")
        network: Any = self._open()
        if regional:
            network.compile_repeated_blocks(fullgraph=True)
            call: Any = network
        else:
            call = torch.compile(network, mode="reduce-overhead", dynamic=False)
        how = "block by block" if regional else "whole, in CUDA graphs"
        self.found.note(self.subject.name, f"torch.compile: {how}.")
        for batch in batches:
            inputs = self._inputs(batch)
            self._keep(COMPILED, batch, median_ms(partial(call, **inputs), device=self.device))
            self._trim()

    def free(self) -> None:
        """Give the device's memory back."""
        self._network = None
        if self.device == "cuda":
            with contextlib.suppress(Exception):
                torch._dynamo.reset()
        self._trim()

    def _open(self) -> nn.Module:
        if self._network is None:
            self._network = build_network(self.subject, device=self.device, dtype=self.dtype)
        return self._network

    def _inputs(self, batch: int) -> dict[str, Any]:
        return call_inputs(self.subject, batch, device=self.device, dtype=self.dtype)

    def _keep(self, side: str, batch: int, ms: float) -> None:
        self.found.step_ms[self.subject.name, side, batch] = ms

    def _trim(self) -> None:
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()
