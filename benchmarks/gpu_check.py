"""`make gpu-check`: every kind of engine and a whole request on the GPU, against the CPU.

Small graphs of all families with random weights, the demo model's whole request through Triton
(the embedded server), and which parts of the GPU path this machine lacks. Ends with 0 when
everything agrees, 1 when something does not, 2 with one sentence where there is no GPU to check,
4 with one sentence where all that could be checked agrees but there is no TensorRT.
"""

from __future__ import annotations

import argparse
import datetime
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

from benchmarks.gpu_blocks import Budget, NotRun, cut_off, first_line, last_line
from benchmarks.gpu_findings import blocks_section
from benchmarks.gpu_graphs import Case, Job, plan_jobs, try_job
from benchmarks.gpu_onnx import describe_onnxruntime, missing_cuda_provider
from benchmarks.gpu_plans import require_toolchains, worst_error
from benchmarks.gpu_whole import WholeRun, run_served, whole_section
from benchmarks.hardware import describe_machine, machine_kind
from benchmarks.results import Section, Verdict, report_markdown, section_markdown
from benchmarks.subjects import add_python_models
from closeup.devices import find_gpus
from closeup.engines import DEVICE_VARIABLE, open_engine
from demo.default_request import DEFAULT_REQUEST
from demo.run import ROOT, WEIGHTS, export_command
from export.graphs import compare
from export.precisions import Precision

# Relative 2-norm against ONNX Runtime on the CPU. float32 sums in another order give 1e-6 to
# 1e-5; float16 products give 1e-3; a wrong kernel or layout gives 1e-1 and more.
LIMITS = {"fp32": 1e-3, "fp16": 2e-2, "bf16": 2e-2}
WORKERS = 8
DEFAULT_MINUTES = 10.0
REHEARSAL_SLACK = 5
FAILED_CODE, NO_GPU_CODE, NO_TENSORRT_CODE = 1, 2, 4
TENSORRT = "TensorRT"


class Check:
    """The blocks of the check, and what they found.

    Args:
        device: ``cuda``, or ``cpu`` to try the script.
        scratch: folder for graphs and the demo model.
        budget: the time.
    """

    def __init__(self, device: str, scratch: Path, budget: Budget) -> None:
        self._device = device
        self._scratch = scratch
        self.budget = budget
        self._rows: list[tuple[str, ...]] = []
        self._worst: dict[str, float] = {}
        self._failures: list[str] = []
        self._notes: list[str] = []
        self._sections: list[Section] = []
        self._ready: list[tuple[Job, Sequence[Case]]] = []
        self._export: subprocess.Popen[str] | None = None
        self._no_onnx = missing_cuda_provider() if device == "cuda" else ""
        self._cpu: WholeRun | None = None

    def run(self) -> None:
        """Run every block."""
        self._begin_export()
        try:
            # A rehearsal may be slow: no GPU is held for it.
            slack = 1 if self._device == "cuda" else REHEARSAL_SLACK
            self.budget.run("engines", self._engines, limit_s=150 * slack)
            self.budget.run("whole request through Triton", self._whole, limit_s=180 * slack)
            self.budget.run(TENSORRT, self._tensorrt, limit_s=240)
            self.budget.run("whole request through Triton, plans", self._whole_plans, limit_s=240)
        finally:
            if self._export is not None and self._export.poll() is None:
                self._export.kill()
                self._export.wait()

    @property
    def failed(self) -> bool:
        """Whether something on the GPU did not agree or did not run to its end."""
        verdicts = [verdict for section in self.sections() for verdict in section.verdicts]
        broken = [text for text in self.budget.reasons.values() if not text.startswith("not run")]
        return bool(self._failures or broken) or not all(verdict.met for verdict in verdicts)

    def sections(self) -> list[Section]:
        """The report's tables."""
        verdicts = tuple(
            Verdict(name=f"worst relative error, {precision}", value=worst, limit=LIMITS[precision])
            for precision, worst in sorted(self._worst.items())
        )
        engines = Section(
            title="Engines against ONNX Runtime on the CPU",
            columns=("engine", "precision", "relative error", "calls", "runs on"),
            rows=tuple(sorted(self._rows)),
            verdicts=verdicts,
            notes=(*self._failures, *self._notes),
        )
        blocks = blocks_section(self.budget.seconds, self.budget.reasons)
        return [engines, *self._sections, blocks]

    def _engines(self) -> None:
        """Write the graphs in other processes; run each on the device as it comes."""
        if self._no_onnx:
            self._notes.append(f"No graph was run on the GPU: {self._no_onnx}")
        jobs = plan_jobs(self._scratch)
        workers = max(1, min(WORKERS, len(os.sched_getaffinity(0)) // 2))
        with get_context("spawn").Pool(workers) as pool:  # its end stops what still runs
            for job, answer in pool.imap_unordered(try_job, jobs):
                try:
                    if isinstance(answer, str):
                        raise NotRun(answer)
                    self._ready.append((job, answer))
                    # ONNX Runtime has too few kernels for bfloat16.
                    if job.precision != Precision.BF16 and not self._no_onnx:
                        self._compare(job, answer)
                except Exception as error:  # the other engines are worth knowing all the same
                    self._failures.append(f"{job.title}, {job.precision}: {first_line(error)}")

    def _compare(self, job: Job, cases: Sequence[Case]) -> None:
        with _device_variable(self._device):
            engine = open_engine(job.path)
        try:
            worst = 0.0
            for case in cases:
                got = engine.run(case.inputs)
                errors = [compare(case.outputs[name], got[name])[1] for name in case.outputs]
                worst = max(worst, *errors)
        finally:
            engine.close()
        provider = getattr(engine, "provider", "").removesuffix("ExecutionProvider")
        self._note(job, worst, len(cases), provider)

    def _note(self, job: Job, worst: float, calls: int, runs_on: str) -> None:
        precision = job.precision.value
        self._worst[precision] = max(self._worst.get(precision, 0.0), worst)
        self._rows.append((job.title, precision, f"{worst:.1e}", str(calls), runs_on))

    def _begin_export(self) -> None:
        if not (WEIGHTS / "sd" / "unet").is_dir():
            return
        self._export = subprocess.Popen(
            export_command(self._scratch / "demo"),
            cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def _whole(self) -> None:
        if self._export is None:
            raise NotRun("there are no demo weights.")
        _, complaints = self._export.communicate()
        if self._export.returncode:
            raise RuntimeError(f"the demo model's export: {last_line(complaints)}")
        add_python_models(self._scratch / "demo")
        sides = {"cpu": self._serve(self._scratch / "demo", "cpu")}
        self._cpu = sides["cpu"]
        if self._no_onnx:
            raise NotRun(self._no_onnx)
        if self._device != "cpu":
            sides = {self._device: self._serve(self._scratch / "demo", self._device), **sides}
        self._sections.append(
            whole_section("Whole request through Triton, demo model, face pass included", sides)
        )

    def _serve(self, repository: Path, device: str) -> WholeRun:
        (run,) = run_served(repository, [DEFAULT_REQUEST], device=device, repeats=2)
        return run

    def _tensorrt(self) -> None:
        """Build a plan of every graph and run it; in the order in which they came."""
        if self._device != "cuda":
            raise NotRun("plans are opened on a GPU only.")
        toolchains, reasons = require_toolchains()
        self._notes += reasons
        for toolchain in toolchains:
            label = f"{toolchain.flavour.label} {toolchain.version}"
            for job, cases in self._ready:
                try:
                    self._note(job, worst_error(job, cases, toolchain), 2 * len(cases), label)
                except Exception as error:  # the other engines are worth knowing all the same
                    title = f"{job.title}, {job.precision}, {label}"
                    self._failures.append(f"{title}: {first_line(error)}")

    def _whole_plans(self) -> None:
        """The demo model as plans, built here in float32, against its graphs on the CPU."""
        if self._export is None or self._export.poll() != 0:
            raise NotRun("the demo model was not exported.")
        if self._device != "cuda":
            raise NotRun("plans are opened on a GPU only.")
        if self._cpu is None:
            raise NotRun("there is no picture of the CPU's to compare with.")
        for toolchain in require_toolchains()[0]:
            flavour = toolchain.flavour
            folder = self._scratch / f"demo-{flavour}"
            size = f"{DEFAULT_REQUEST['w']}x{DEFAULT_REQUEST['h']}"
            command = [*export_command(folder, target=flavour.value), "--sizes", size]
            done = subprocess.run(
                [*command, "--cache-gb", "0"], cwd=ROOT, capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise RuntimeError(f"the demo model's plans: {last_line(done.stderr)}")
            add_python_models(folder)
            sides = {flavour.label: self._serve(folder, "cuda"), "cpu": self._cpu}
            title = f"Whole request through Triton, {flavour.label} plans of the demo model"
            self._sections.append(whole_section(title, sides))

    @property
    def without_tensorrt(self) -> str:
        """Why no plan was run; empty when plans were."""
        reason = self.budget.reasons.get(TENSORRT, "")
        return reason.removeprefix("not run: ") if reason.startswith("not run") else ""


@contextmanager
def _device_variable(device: str) -> Iterator[None]:
    """Set ``CLOSEUP_DEVICE`` for what is opened inside."""
    before = os.environ.get(DEVICE_VARIABLE)
    os.environ[DEVICE_VARIABLE] = device
    try:
        yield
    finally:
        if before is None:
            del os.environ[DEVICE_VARIABLE]
        else:
            os.environ[DEVICE_VARIABLE] = before


def describe(device: str) -> dict[str, str]:
    """Return the machine's facts for the report."""
    facts = {"GPU": "none"}
    gpus = find_gpus() if device == "cuda" else ()
    if gpus:
        facts = {"GPU": gpus[0].name, "compute capability": gpus[0].sm}
    facts["ONNX Runtime"] = describe_onnxruntime()
    return facts | describe_machine()


def write_report(check: Check, device: str, out: Path) -> None:
    """Write the report as it stands."""
    machine = describe(device)
    out.mkdir(parents=True, exist_ok=True)
    day = datetime.datetime.now(tz=datetime.timezone.utc).date()
    command = " ".join(["python -m benchmarks.gpu_check", *sys.argv[1:]])
    kind = machine_kind({**machine, "processor": machine["GPU"]})
    text = report_markdown(check.sections(), machine, command, day)
    (out / f"{day.isoformat()}-gpu-check-{kind}.md").write_text(text, encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="folder of a report in Markdown")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--minutes",
        type=float,
        help=f"of everything; default {DEFAULT_MINUTES:g}, without a GPU five times that",
    )
    given = parser.parse_args(arguments)
    if given.minutes is not None and given.minutes <= 0:
        parser.error(f"--minutes is {given.minutes}; expected more than 0.")
    slack = 1 if given.device == "cuda" else REHEARSAL_SLACK
    minutes = given.minutes or slack * DEFAULT_MINUTES
    if given.device == "cuda" and not find_gpus():
        print(
            "gpu-check: there is no NVIDIA GPU that this process may use (no driver, or none is "
            "visible); run it on a machine with one, or try the script with --device cpu.",
            file=sys.stderr,
        )
        return NO_GPU_CODE
    started_s = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        check = Check(given.device, Path(scratch), Budget(total_s=60 * minutes))

        def write() -> None:
            if given.out is not None:
                write_report(check, given.device, given.out)

        with cut_off(check.budget, write):
            check.run()
        write()
    print("\n\n".join(section_markdown(section) for section in check.sections()))
    print(f"\n{'FAILED' if check.failed else 'ok'} after {time.perf_counter() - started_s:.0f} s")
    if check.failed:
        return FAILED_CODE
    if given.device == "cuda" and check.without_tensorrt:
        print(f"gpu-check: no TensorRT plan was checked: {check.without_tensorrt}", file=sys.stderr)
        return NO_TENSORRT_CODE
    return 0


if __name__ == "__main__":
    sys.exit(main())
