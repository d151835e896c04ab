"""The graph in this process, without a server: tests and benchmarks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from closeup.denoiser import Denoiser
from closeup.engines import Engine, EngineOptions, open_engine
from closeup.graph import Outcome, generate
from closeup.lora_store import LoraStore
from closeup.plans import engine_path
from closeup.repository import Repository
from closeup.request import Limits, Request, Served, parse_options, resolve_request
from closeup.run import Array, Progress, Run
from closeup.settings import Settings


class LocalModels:
    """`closeup.run.Models` over engines opened in this process, each at its first use.

    Args:
        repository: the model repository's folder.
        settings: as a server would have them.
    """

    def __init__(self, repository: Path, settings: Settings | None = None) -> None:
        self.repository = Repository(repository)
        self.settings = settings or Settings()
        self.loras = LoraStore(self.settings.lora_dir)
        self._folder = repository
        self._engines: dict[str, Engine] = {}
        self._denoisers: dict[str, Denoiser] = {}

    def __enter__(self) -> LocalModels:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release every engine."""
        for denoiser in self._denoisers.values():
            denoiser.close()
        for engine in self._engines.values():
            engine.close()
        self._denoisers.clear()
        self._engines.clear()

    def denoiser(self, name: str) -> Denoiser:
        """Return the denoiser of the Triton model ``name``."""
        if name not in self._denoisers:
            self._denoisers[name] = Denoiser(self._folder / name, settings=self.settings)
        return self._denoisers[name]

    async def infer(
        self, name: str, inputs: Mapping[str, Array], outputs: Sequence[str]
    ) -> dict[str, Array]:
        """Run a model; see `closeup.run.Models`."""
        if name.endswith("_denoiser"):
            answer = await asyncio.wrap_future(self.denoiser(name).start(inputs))
        else:
            answer = await asyncio.to_thread(self._engine(name).run, inputs)
        return {output: answer[output] for output in outputs if output in answer}

    def resolve(self, **fields: Any) -> Request:
        """Check and resolve request fields given as Python values."""
        values = {
            name: value.encode() if isinstance(value, str) else value
            for name, value in fields.items()
        }
        return resolve_request(
            parse_options(values, {}),
            served=Served(
                models=self.repository.models(),
                known_lora=self.loras.known,
                has_upscaler=self.repository.upscaler is not None,
                has_face_detector=self.repository.face_detector is not None,
                limits=Limits(max_pixels=self.settings.max_pixels),
            ),
            streaming=True,
        )

    def start(
        self,
        request: Request,
        *,
        report: Callable[[Progress], None] = lambda progress: None,
        check: Callable[[], None] = lambda: None,
    ) -> Run:
        """Return the run of a request, not yet begun."""
        return Run(
            request=request,
            models=self,
            check=check,
            report=report,
            segment_steps=self.settings.segment_steps,
            warnings=list(request.warnings),
        )

    async def run(self, run: Run) -> Outcome:
        """Run the graph."""
        outcome = await generate(
            run,
            tokenizers=self.repository.tokenizers(run.request.model),
            upscaler=self.repository.upscaler,
        )
        await run.ticket_returned()
        return outcome

    def generate(self, **fields: Any) -> Outcome:
        """Resolve and run a request, and wait for it.

        Raises:
            CloseupError: refused, or a model failed.
        """
        return asyncio.run(self.run(self.start(self.resolve(**fields))))

    def _engine(self, name: str) -> Engine:
        if name not in self._engines:
            path = engine_path(self._folder / name / "1")
            self._engines[name] = open_engine(path, options=EngineOptions())
        return self._engines[name]
