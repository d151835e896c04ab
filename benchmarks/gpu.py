"""`make bench-gpu`: what denoising steps and requests cost on a GPU, at the families' real sizes.

Random weights made on the device, nothing to download. Compares closeup's graph, as TensorRT plans
and in ONNX Runtime, with diffusers in PyTorch (bf16: eager, in a CUDA graph, compiled) and with the
arithmetic floor: operations counted over the measured rate of matrix products. Blocks run in the
order of their value, each with a time limit; the report is rewritten after each.
"""

from __future__ import annotations

import argparse
import datetime
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from multiprocessing.pool import AsyncResult, Pool
from pathlib import Path

import torch

from benchmarks.gpu_blocks import Budget, NotRun, cut_off, last_line
from benchmarks.gpu_findings import Findings, blocks_section, model_section
from benchmarks.gpu_models import BATCHES, SUBJECTS, make_subject
from benchmarks.gpu_onnx import OnnxSteps, describe_onnxruntime
from benchmarks.gpu_plan_steps import PlanSteps, choose_target
from benchmarks.gpu_plans import find_toolchains
from benchmarks.gpu_requests import Requests
from benchmarks.gpu_steps import DiffusersSteps
from benchmarks.gpu_timing import MATMUL_SIDE, count_flops, matmul_flops_per_s
from benchmarks.gpu_whole import run_served, whole_section
from benchmarks.hardware import describe_machine, machine_kind, package_version
from benchmarks.results import Section, report_markdown, section_markdown
from benchmarks.subjects import add_python_models
from demo.default_request import DEFAULT_REQUEST
from demo.run import ROOT, WEIGHTS, export_command

QUICK_MINUTES = 2.5
FULL_MINUTES = 60.0
NO_GPU_CODE = 2


@dataclass(kw_only=True)
class Options:
    """The command line.

    Attributes:
        out: folder of the report.
        device: cuda, or cpu for a trial with tiny networks.
        minutes: of the whole benchmark.
        use_tiny: tiny networks.
        only: names of blocks; empty: all.
    """

    out: Path
    device: str
    minutes: float
    use_tiny: bool
    only: tuple[str, ...] = ()


@dataclass(kw_only=True)
class Bench:
    """The blocks of one benchmark, and what they share.

    Attributes:
        options: of the command line.
        scratch: folder for graphs.
        found: the figures.
        budget: the time.
    """

    options: Options
    scratch: Path
    found: Findings = field(default_factory=Findings)
    budget: Budget = field(init=False)
    _flops: dict[str, AsyncResult[float]] = field(default_factory=dict)
    _export: subprocess.Popen[str] | None = None

    def __post_init__(self) -> None:
        self.budget = Budget(total_s=60 * self.options.minutes)
        self.subjects = {name: make_subject(name, self.options.use_tiny) for name in SUBJECTS}
        on_gpu = self.options.device == "cuda"
        dtype = torch.bfloat16 if on_gpu else torch.float32
        in_plans = on_gpu and bool(find_toolchains()[0])
        half = torch.float16 if on_gpu else torch.float32
        self.steps = {
            name: DiffusersSteps(
                subject=subject, device=self.options.device, dtype=dtype, found=self.found
            )
            for name, subject in self.subjects.items()
        }
        self.onnx = {
            name: OnnxSteps(
                subject=subject,
                device=self.options.device,
                # Real weights of FLUX.1 pass float16's range, so its plans are bf16.
                dtype=torch.bfloat16 if in_plans and subject.is_flux else half,
                rank=0,
                folder=self.scratch,
                found=self.found,
            )
            for name, subject in self.subjects.items()
        }
        self.plans = {
            name: PlanSteps(graph=graph, found=self.found) for name, graph in self.onnx.items()
        }
        self.requests = {
            name: Requests(
                subject=subject,
                folder=self.scratch,
                device=self.options.device,
                use_tiny=self.options.use_tiny,
                find_target=choose_target if on_gpu else lambda: ("onnx", "ONNX Runtime, CPU"),
                found=self.found,
            )
            for name, subject in self.subjects.items()
        }

    def run(self) -> None:
        """Run the blocks that are wanted, and write the report after each."""
        with get_context("spawn").Pool(1) as pool:  # its end stops what still runs
            self._begin(pool)
            try:
                with cut_off(self.budget, self.write):
                    for name, limit_s, block in self._blocks():
                        if self.options.only and name not in self.options.only:
                            continue
                        self.budget.run(name, block, limit_s=limit_s)
                        self._collect_flops()
                        outcome = self.budget.reasons.get(name, "done")
                        seconds = self.budget.seconds.get(name, 0.0)
                        print(f"[{seconds:5.1f} s] {name}: {outcome}", flush=True)
                        self.write()
            finally:
                self._end()

    def write(self) -> None:
        """Write the report as it stands."""
        self.options.out.mkdir(parents=True, exist_ok=True)
        machine = describe_gpu_machine(self.options.device)
        day = datetime.datetime.now(tz=datetime.timezone.utc).date()
        command = " ".join(["python -m benchmarks.gpu", *sys.argv[1:]])
        text = report_markdown(self.sections(), machine, command, day)
        name = f"{day.isoformat()}-gpu-{machine_kind({**machine, 'processor': machine['GPU']})}.md"
        (self.options.out / name).write_text(text, encoding="utf-8")

    def sections(self) -> list[Section]:
        """The report's tables."""
        rate = self.found.matmul_flops_per_s
        measured = "not run" if rate is None else f"{rate / 1e12:.0f}"
        sections = [
            Section(
                title="Matrix products",
                columns=("", "TFLOP/s"),
                rows=((f"bf16, {MATMUL_SIDE} a side, random data", measured),),
            )
        ]
        for name, subject in self.subjects.items():
            title = f"Denoising step, {subject.title}"
            sections.append(
                model_section(
                    self.found,
                    name,
                    title,
                    steps=subject.steps,
                    batches=BATCHES,
                    reasons=self.budget.reasons,
                )
            )
        blocks = blocks_section(self.budget.seconds, self.budget.reasons)
        return [*sections, *self.found.sections, blocks]

    def _blocks(self) -> list[tuple[str, float, Callable[[], None]]]:
        """Name, limit in seconds and work of each block, most valuable first."""
        sd, xl, fl = (self.steps[name] for name in ("sd15", "sdxl", "flux"))
        nn_sd, nn_xl, nn_fl = (self.onnx[name] for name in ("sd15", "sdxl", "flux"))
        plans = {name: partial(steps.time, BATCHES) for name, steps in self.plans.items()}
        session = partial(nn_sd.time_session, nhwc=True, use_graph=False)
        return [
            ("matmul", 15, self._matmul),
            ("sd15 eager", 40, sd.eager),
            ("sd15 export", 60, nn_sd.export),
            ("sd15 onnxruntime", 60, partial(session, BATCHES)),
            ("demo request", 60, self._whole),
            ("sd15 plan", 240, plans["sd15"]),
            ("sd15 engine", 45, partial(nn_sd.time_engine, (1,))),
            ("sd15 onnxruntime, CUDA graph", 40,
             partial(nn_sd.time_session, (1,), nhwc=True, use_graph=True)),
            ("flux eager", 45, fl.eager),
            ("flux compile", 60, _then(partial(fl.compiled, (1,), regional=True), fl.free)),
            ("sdxl eager", 40, xl.eager),
            ("sd15 compile", 75, _then(partial(sd.compiled, (1,), regional=False), sd.free)),
            ("sdxl export", 90, nn_xl.export),
            ("sdxl onnxruntime", 90, partial(
                nn_xl.time_session, BATCHES, nhwc=True, use_graph=False)),
            ("sdxl plan", 480, plans["sdxl"]),
            ("sdxl compile", 120, _then(partial(xl.compiled, (1,), regional=False), xl.free)),
            ("sd15 onnxruntime, channels first", 40,
             partial(nn_sd.time_session, (1,), nhwc=False, use_graph=False)),
            ("sd15 compile, batch 4 and 8", 150,
             _then(partial(sd.compiled, (4, 8), regional=False), sd.free)),
            ("flux compile, batch 4 and 8", 150,
             _then(partial(fl.compiled, (4, 8), regional=True), fl.free)),
            ("sdxl compile, batch 4 and 8", 240,
             _then(partial(xl.compiled, (4, 8), regional=False), xl.free)),
            *self._request_blocks("sd15", 420),
            ("flux export", 240, nn_fl.export),
            ("flux onnxruntime", 180, partial(
                nn_fl.time_session, BATCHES, nhwc=True, use_graph=False)),
            ("flux plan", 900, plans["flux"]),
            *self._request_blocks("sdxl", 900),
            *self._request_blocks("flux", 1800),
        ]  # fmt: skip

    def _request_blocks(
        self, name: str, export_s: float
    ) -> list[tuple[str, float, Callable[[], None]]]:
        """The blocks of a family's whole requests; ``export_s`` limits ours."""
        requests = self.requests[name]
        return [
            (f"{name} request, eager", 240, partial(requests.theirs, compiled=False)),
            (f"{name} request", export_s, requests.ours),
            (f"{name} request, compile", 240, partial(requests.theirs, compiled=True)),
        ]

    def _begin(self, pool: Pool) -> None:
        """Start what needs no GPU beside it: counting operations, exporting the demo model."""
        self._flops = {
            name: pool.apply_async(count_flops, (name, self.options.use_tiny))
            for name in self.subjects
        }
        if (WEIGHTS / "sd" / "unet").is_dir():
            self._export = subprocess.Popen(
                export_command(self.scratch / "demo"),
                cwd=ROOT,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )

    def _end(self) -> None:
        if self._export is not None and self._export.poll() is None:
            self._export.kill()
            self._export.wait()

    def _collect_flops(self) -> None:
        for name, answer in self._flops.items():
            if answer.ready() and answer.successful():
                self.found.flops[name] = answer.get()

    def _matmul(self) -> None:
        tiny_side = 256 if self.options.use_tiny else MATMUL_SIDE
        dtype = torch.bfloat16 if self.options.device == "cuda" else torch.float32
        self.found.matmul_flops_per_s = matmul_flops_per_s(
            device=self.options.device, dtype=dtype, side=tiny_side
        )

    def _whole(self) -> None:
        """The demo model's whole request on the GPU and on the CPU."""
        if self._export is None:
            raise NotRun("there are no demo weights.")
        _, complaints = self._export.communicate()
        if self._export.returncode:
            raise RuntimeError(f"the demo model's export: {last_line(complaints)}")
        devices = ("cuda", "cpu") if self.options.device == "cuda" else ("cpu",)
        repository = self.scratch / "demo"
        add_python_models(repository)
        sides = {}
        for device in devices:
            (run,) = run_served(repository, [DEFAULT_REQUEST], device=device, repeats=2)
            sides[device] = run
        title = "Whole request through Triton, demo model, face pass included"
        self.found.sections.append(whole_section(title, sides))


def _then(first: Callable[[], None], second: Callable[[], None]) -> Callable[[], None]:
    """Both in turn; the second also when the first failed."""

    def both() -> None:
        try:
            first()
        finally:
            second()

    return both


def describe_gpu_machine(device: str) -> dict[str, str]:
    """Return the machine's facts for the report, the GPU's and its libraries' first."""
    facts = {"GPU": "none", "ONNX Runtime": describe_onnxruntime()}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts["GPU"] = properties.name
        facts["GPU memory"] = f"{properties.total_memory / 2**30:.0f} GiB"
        facts["compute capability"] = f"{properties.major}.{properties.minor}"
        facts["CUDA, cuDNN"] = f"{torch.version.cuda}, {torch.backends.cudnn.version()}"
    for package in ("tensorrt-cu13", "tensorrt-rtx-cu13"):
        facts[package] = package_version(package)
    return facts | describe_machine()


def parse_options(arguments: Sequence[str] | None = None) -> Options:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--minutes", type=float, help=f"of everything; default {FULL_MINUTES:g}")
    parser.add_argument("--quick", action="store_true", help=f"--minutes {QUICK_MINUTES}")
    parser.add_argument("--tiny", action="store_true", help="tiny networks: tries the script")
    parser.add_argument("--only", action="append", default=[], help="a block's name; repeatable")
    given = parser.parse_args(arguments)
    if given.device == "cpu" and not given.tiny:
        parser.error("--device cpu takes --tiny: the real sizes need a GPU.")
    if given.minutes is not None and given.minutes <= 0:
        parser.error(f"--minutes is {given.minutes}; expected more than 0.")
    return Options(
        out=given.out,
        device=given.device,
        minutes=given.minutes or (QUICK_MINUTES if given.quick else FULL_MINUTES),
        use_tiny=given.tiny,
        only=tuple(given.only),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; 0, or 2 with one sentence where there is no GPU."""
    options = parse_options(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print(
            "bench-gpu: PyTorch finds no CUDA device; run it on a machine with an NVIDIA GPU and "
            "a CUDA build of torch, or try the script with --device cpu --tiny.",
            file=sys.stderr,
        )
        return NO_GPU_CODE
    torch.backends.cuda.matmul.allow_tf32 = False
    if options.device == "cpu":
        torch.set_num_threads(1)  # a trial: others use these cores
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(options=options, scratch=Path(scratch))
        bench.run()
        print("\n\n".join(section_markdown(section) for section in bench.sections()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
