"""What every training script of the demo shares: options, schedule, averages, checkpoints, log."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

DEMO = Path(__file__).resolve().parent
CACHE = DEMO / "cache"
RUNS = DEMO / "runs"
WEIGHTS = DEMO / "weights"


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """Warm-up, plateau, linear cool-down: the end can be moved while a run is under way.

    Attributes:
        learning_rate: at the plateau.
        steps: the last optimizer step.
        warmup: steps from zero up to the plateau.
        cooldown: steps before the end over which the rate falls to zero.
    """

    learning_rate: float
    steps: int
    warmup: int = 50
    cooldown: int = 0

    def at(self, step: int) -> float:
        """Learning rate of optimizer step ``step`` (counted from 0)."""
        up = min(1.0, (step + 1) / max(1, self.warmup))
        down = min(1.0, (self.steps - step) / max(1, self.cooldown)) if self.cooldown else 1.0
        return self.learning_rate * up * max(0.0, down)


def mixed_precision(device: str) -> torch.autocast:
    """Autocast to bfloat16 where the device computes in it.

    A CPU without such instructions emulates them, many times slower than float32.
    """
    able = torch.cpu.get_capabilities()
    fast = device != "cpu" or bool(able.get("avx512_bf16") or able.get("amx_bf16"))
    return torch.autocast(device, torch.bfloat16, enabled=fast)


class Average:
    """An exponential moving average of parameters, with a short memory at the start.

    Attributes:
        decay: share kept at each step once the start is over.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float) -> None:
        self.parameters = list(parameters)
        self.decay = decay
        self.means = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the parameters as they are after optimizer step ``step``."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.means, [p.detach() for p in self.parameters], 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the parameters with their averages; a second call changes them back."""
        for parameter, mean in zip(self.parameters, self.means, strict=True):
            held = parameter.detach().clone()
            parameter.copy_(mean)
            mean.copy_(held)


@dataclass(slots=True)
class Run:
    """A resumable training run: modules, optimizer, average, step count and random stream.

    Attributes:
        folder: holds ``checkpoint.pt`` and ``log.jsonl``.
        modules: name -> module, saved and restored by name.
        step: optimizer steps done so far.
    """

    folder: Path
    modules: Mapping[str, nn.Module]
    optimizer: torch.optim.Optimizer
    average: Average
    generator: torch.Generator
    step: int = 0
    _sums: dict[str, float] = field(default_factory=dict)
    _count: int = 0
    _since_s: float = field(default_factory=time.monotonic)

    def save(self) -> Path:
        """Write ``checkpoint.pt``, whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        state = {
            "modules": {name: module.state_dict() for name, module in self.modules.items()},
            "optimizer": self.optimizer.state_dict(),
            "means": self.average.means,
            "generator": self.generator.get_state(),
            "step": self.step,
        }
        path = self.folder / "checkpoint.pt"
        part = path.with_suffix(".part")
        torch.save(state, part)
        part.replace(path)
        return path

    def resume(self) -> bool:
        """Go on from ``checkpoint.pt`` when there is one; returns whether there was."""
        path = self.folder / "checkpoint.pt"
        if not path.exists():
            return False
        state = torch.load(path, map_location="cpu", weights_only=True)
        for name, module in self.modules.items():
            module.load_state_dict(state["modules"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        for mean, saved in zip(self.average.means, state["means"], strict=True):
            mean.copy_(saved)
        self.generator.set_state(state["generator"])
        self.step = int(state["step"])
        return True

    def advance(self, loss: torch.Tensor, learning_rate: float, max_norm: float = 1.0) -> None:
        """One optimizer step down ``loss`` at ``learning_rate``, gradients clipped."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.average.parameters, max_norm)
        self.optimizer.step()
        self.average.update(self.step)
        self.step += 1

    def note(self, values: Mapping[str, float], every: int, samples: int) -> None:
        """Add to the running means; every ``every`` steps print and log them.

        Args:
            values: figures of this step, finite.
            every: steps between two lines.
            samples: pictures in a step, for the rate.
        """
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._count += 1
        if self.step % every:
            return
        elapsed = time.monotonic() - self._since_s
        line = {name: round(total / self._count, 5) for name, total in self._sums.items()}
        line |= {"step": self.step, "samples_per_s": round(self._count * samples / elapsed, 1)}
        print(json.dumps(line), flush=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps(line) + "\n")
        self._sums, self._count, self._since_s = {}, 0, time.monotonic()


def add_run_arguments(parser: argparse.ArgumentParser, *, run: str, steps: int, batch: int) -> None:
    """Add the options that every training script takes; checkpoints go to demo/runs/``run``."""
    parser.add_argument("--run", type=Path, default=RUNS / run, help="folder of checkpoints")
    parser.add_argument("--steps", type=int, default=steps, help="optimizer steps in all")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop and save after these")
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save-every", type=int, default=500, help="steps between checkpoints")
    parser.add_argument("--resume", action="store_true", help="go on from the run's checkpoint")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def parse_run_options(
    parser: argparse.ArgumentParser, arguments: list[str] | None
) -> argparse.Namespace:
    """Parse the options of `add_run_arguments`; set PyTorch's threads and global seed by them.

    Args:
        parser: has those options, and the script's own.
        arguments: of the command line; None for the process's.
    """
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    return options


def open_run(
    options: argparse.Namespace,
    *,
    modules: Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    decay: float,
) -> Run:
    """The run that the options name, gone on with when they say ``--resume``.

    Args:
        options: of `parse_run_options`.
        modules: see `Run`; on their device.
        optimizer: of the parameters that are trained; the same are averaged.
        decay: of `Average`.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    run = Run(
        folder=options.run,
        modules=modules,
        optimizer=optimizer,
        average=Average(parameters, decay),
        generator=torch.Generator().manual_seed(options.seed),
    )
    if options.resume:
        run.resume()
    return run


def steps_to_take(run: Run, options: argparse.Namespace) -> Iterator[int]:
    """Yield the steps that are left, for the loop's body to `Run.advance` by one each.

    Ends at the last step or when the minutes are over, which count from the first one on. Saves
    every ``--save-every`` steps and at the end; not when the body raises.
    """
    end_s = time.monotonic() + 60 * options.minutes
    while run.step < options.steps and time.monotonic() < end_s:
        yield run.step
        if run.step % options.save_every == 0:
            run.save()
    run.save()


def save_half(state: Mapping[str, torch.Tensor], path: Path, metadata: dict[str, Any]) -> None:
    """Write tensors as fp16 safetensors; ``metadata`` goes into the header as strings."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().half().cpu().contiguous() for name, value in state.items()}
    save_file(tensors, path, metadata={key: str(value) for key, value in metadata.items()})


def size_of(module: nn.Module) -> str:
    """A module's parameter count in words."""
    return f"{sum(p.numel() for p in module.parameters()) / 1e6:.2f} M parameters"
