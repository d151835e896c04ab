"""The GPU scripts' budget, tables and devices, without a GPU."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import gpu_check, gpu_plans
from benchmarks.gpu import parse_options
from benchmarks.gpu_blocks import Budget, NotRun, first_line, last_line
from benchmarks.gpu_findings import (
    COMPILED,
    EAGER,
    FLOOR,
    SIDES,
    Findings,
    blocks_section,
    model_section,
)
from benchmarks.gpu_graphs import Case, Job
from benchmarks.gpu_models import SUBJECTS, build_network, call_inputs, make_subject
from benchmarks.gpu_onnx import OnnxSteps
from benchmarks.gpu_plans import cover
from benchmarks.gpu_timing import count_flops, median_ms
from benchmarks.gpu_whole import LEAST_PSNR_DB, WholeRun, whole_section
from closeup.devices import Gpu, find_gpu, find_gpus
from closeup.engines import Array, wanted_device
from closeup.errors import ExportError, ModelError
from closeup.onnx_engine import OnnxEngine
from closeup.plan_engine import PlanCounters, PlanEngine
from closeup.plans import Flavour
from export.builder import Toolchain
from export.precisions import Precision
from tests.paths import ROOT
from tests.triton_fixtures import save_double


def test_budget_goes_on_when_a_block_fails_or_takes_too_long() -> None:
    budget = Budget(total_s=60)
    ran: list[str] = []

    def hang() -> None:
        ran.append("started")
        while True:
            try:
                time.sleep(0.01)
            except Exception:  # as libraries do; the time limit is no Exception
                pytest.fail("a library could swallow the time limit")

    def fail() -> None:
        raise ValueError("first\nsecond")

    def refuse() -> None:
        raise NotRun("there is\nno wheel.")

    assert not budget.run("hangs", hang, limit_s=3.1)
    assert not budget.run("fails", fail, limit_s=10)
    assert not budget.run("refuses", refuse, limit_s=10)
    assert budget.run("works", lambda: ran.append("worked"), limit_s=10)
    assert ran == ["started", "worked"]
    assert budget.reasons == {
        "hangs": "stopped after 3 s, its time limit",
        "fails": "failed: ValueError: first",
        "refuses": "not run: there is no wheel.",
    }
    assert 3.1 <= budget.seconds["hangs"] < 6


def test_budget_runs_nothing_when_it_is_spent() -> None:
    budget = Budget(total_s=1)
    assert not budget.run("late", lambda: pytest.fail("it ran"), limit_s=10)
    assert budget.reasons["late"] == "not run: the budget of 1 s was spent"
    assert blocks_section(budget.seconds, budget.reasons).rows[0][1] == "-"


def test_process_is_cut_off_with_its_report_when_a_block_hangs_in_foreign_code() -> None:
    code = (
        "import ctypes, signal\n"
        "import benchmarks.gpu_blocks as blocks\n"
        "blocks.GRACE_S = 0.5\n"
        "budget = blocks.Budget(total_s=4)\n"
        # A blocked signal is what a block in foreign code amounts to.
        "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])\n"
        "with blocks.cut_off(budget, lambda: print('written', flush=True)):\n"
        "    budget.run('hang', lambda: ctypes.CDLL(None).sleep(60), limit_s=3.5)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (3, "written\n"), done.stderr


def test_lines_are_cut_from_errors_and_outputs() -> None:
    assert first_line(ValueError("\n a \n b")) == "ValueError: a"
    assert first_line(KeyError()) == "KeyError"
    assert len(first_line(ValueError("x" * 999))) == 300
    assert last_line("a\nexport: no such file\n\n") == "export: no such file"


def test_table_divides_operations_by_the_measured_rate_when_both_are_known() -> None:
    found = Findings(flops={"m": 2e12}, matmul_flops_per_s=500e12)
    found.step_ms["m", EAGER, 4] = 40.0
    section = model_section(found, "m", "M", steps=10, batches=(1, 4))
    rows = {row[0]: row[1:] for row in section.rows}
    assert rows[FLOOR] == ("4", "16", "25", "25")  # 2 TFLOP at 500 TFLOP/s; 1 / (10 * 4 ms)
    assert rows[EAGER] == ("not run", "40", "not run", "10")  # 4 / (10 * 40 ms)
    assert rows[COMPILED] == ("not run",) * 4
    assert len(rows) == len(SIDES)


def test_floor_is_not_run_when_no_rate_was_measured() -> None:
    assert Findings(flops={"m": 2e12}).floor_ms("m", 1) is None
    assert Findings(matmul_flops_per_s=1e12).floor_ms("m", 1) is None


def test_counted_operations_are_those_of_the_real_sizes() -> None:
    # Published: about 0.8 TFLOP a UNet call of SD 1.5 at 512x512; guidance makes two.
    assert count_flops("sd15", use_tiny=False) == pytest.approx(1.607e12, rel=0.01)


@pytest.mark.parametrize("name", list(SUBJECTS))
def test_tiny_networks_take_the_calls_of_their_family(name: str) -> None:
    subject = make_subject(name, use_tiny=True)
    network = build_network(subject, device="cpu", dtype=torch.float32)
    with torch.inference_mode():
        (out,) = network(**call_inputs(subject, 2, device="cpu", dtype=torch.float32))
    assert len(out) == subject.rows(2)
    assert torch.isfinite(out).all()
    assert out.std() > 0


def test_median_waits_for_warm_ups_when_calls_are_timed() -> None:
    calls: list[int] = []

    def call() -> None:
        calls.append(1)
        time.sleep(0.4)

    ms = median_ms(call, device="cpu", warm_ups=1)
    assert len(calls) == 1 + 1 + 3  # the warm-up, the first, the least number of samples
    assert ms >= 400


def test_exported_graph_is_timed_and_compared_when_it_runs_bound_to_torch(tmp_path: Path) -> None:
    found = Findings()
    steps = OnnxSteps(
        subject=make_subject("sd15", use_tiny=True),
        device="cpu",
        dtype=torch.float32,
        rank=4,
        folder=tmp_path,
        found=found,
    )
    steps.export()
    steps.time_session((1,), nhwc=False, use_graph=False)
    steps.time_engine((1,))
    assert all(ms > 0 for ms in found.step_ms.values())
    assert len(found.step_ms) == 2
    assert any(note.startswith("Relative error against PyTorch") for note in found.notes["sd15"])
    # A wrong reference must not pass: the check compares, it does not only print.
    steps._reference = {name: 2 * value for name, value in steps._reference.items()}
    with pytest.raises(ValueError, match="relative error 5"):
        steps.time_session((1,), nhwc=False, use_graph=False)


def test_whole_section_misses_its_bar_when_the_pictures_differ() -> None:
    picture = np.full((8, 8, 3), 100, np.uint8)

    def run(values: np.ndarray, faces: int = 1) -> WholeRun:  # type: ignore[type-arg]
        timings_ms = {"generate": 900.0}
        return WholeRun(picture=values, seconds=1, first_s=2, timings_ms=timings_ms, faces=faces)

    same = whole_section("t", {"cuda": run(picture), "cpu": run(picture + 1)})
    assert all(verdict.met for verdict in same.verdicts)
    black = whole_section("t", {"cuda": run(0 * picture), "cpu": run(picture)})
    faces, agreement = black.verdicts
    assert faces.met
    assert agreement.value < LEAST_PSNR_DB
    assert not agreement.met
    (faceless,) = whole_section("t", {"cpu": run(picture, faces=0)}).verdicts
    assert not faceless.met


@pytest.mark.parametrize("module", ["benchmarks.gpu", "benchmarks.gpu_check"])
def test_scripts_answer_one_sentence_when_there_is_no_gpu(module: str) -> None:
    if find_gpus():
        pytest.skip("there is a GPU")
    done = subprocess.run(
        [sys.executable, "-m", module], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 2
    sentence = done.stderr.strip().splitlines()[-1]
    assert sentence.startswith(
        ("bench-gpu: PyTorch finds no CUDA", "gpu-check: there is no NVIDIA")
    )
    assert "Traceback" not in done.stderr


def test_options_are_refused_when_the_cpu_would_get_real_sizes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        parse_options(["--device", "cpu"])
    assert "--device cpu takes --tiny" in capsys.readouterr().err
    assert parse_options(["--quick"]).minutes == 2.5
    assert parse_options(["--quick", "--minutes", "4"]).minutes == 4


class _Driver:
    """libcuda.so.1 of a machine with one H100."""

    def cuInit(self, flags: int) -> int:  # noqa: N802
        return 0

    def cuDeviceGetCount(self, count: object) -> int:  # noqa: N802
        count._obj.value = 1  # type: ignore[attr-defined]
        return 0

    def cuDeviceGet(self, device: object, index: int) -> int:  # noqa: N802
        return int(index != 0)

    def cuDeviceGetName(self, name: object, size: int, device: object) -> int:  # noqa: N802
        name.value = b"NVIDIA H100"  # type: ignore[attr-defined]
        return 0

    def cuDeviceGetAttribute(self, value: object, attribute: int, device: object) -> int:  # noqa: N802
        value._obj.value = {75: 9, 76: 0}[attribute]  # type: ignore[attr-defined]
        return 0


def test_gpus_are_those_the_driver_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: _Driver())
    assert find_gpus() == (Gpu(name="NVIDIA H100", sm="9.0"),)
    assert find_gpu() == find_gpus()[0]
    assert find_gpu(1) is None


def test_no_gpus_are_found_when_there_is_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> ctypes.CDLL:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert find_gpus() == ()
    assert find_gpu() is None


def test_engine_refuses_the_cpu_when_cuda_is_demanded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if find_gpus():
        pytest.skip("there is a GPU")
    from closeup.engines import open_engine

    path = tmp_path / "double.onnx"
    save_double(path)
    monkeypatch.setenv("CLOSEUP_DEVICE", "cuda")
    with pytest.raises(ModelError, match="would run on CPUExecutionProvider"):
        open_engine(path)
    monkeypatch.setenv("CLOSEUP_DEVICE", "cpu")
    engine = open_engine(path)
    assert isinstance(engine, OnnxEngine)
    assert engine.provider == "CPUExecutionProvider"


def test_wanted_device_raises_when_the_environment_is_no_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CLOSEUP_DEVICE", "gpu")
    with pytest.raises(
        ModelError, match="CLOSEUP_DEVICE is 'gpu'; expected one of auto, cpu, cuda"
    ):
        wanted_device()
    monkeypatch.delenv("CLOSEUP_DEVICE")
    assert wanted_device() == "auto"


def test_plan_profile_covers_every_case_and_no_more() -> None:
    shapes = ((2, 4, 8), (5, 4, 6), (1, 4, 12))
    cases = [Case(inputs={"x": np.zeros(shape)}, outputs={}) for shape in shapes]
    (limits,) = cover(cases).shapes.values()
    assert (limits.min, limits.opt, limits.max) == ((1, 4, 6), (2, 4, 8), (5, 4, 12))
    assert all(limits.takes(shape) for shape in shapes)


def test_gpu_check_fails_with_a_sentence_when_there_is_no_gpu_or_no_tensorrt(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_check, "find_gpus", lambda: ())
    assert gpu_check.main([]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("gpu-check: there is no NVIDIA GPU")

    gpu = Gpu(name="NVIDIA H100", sm="9.0")
    monkeypatch.setattr(gpu_check, "find_gpus", lambda: (gpu,))
    for block in ("_engines", "_whole", "_begin_export"):
        monkeypatch.setattr(gpu_check.Check, block, lambda self: None)

    def refuse(flavour: Flavour) -> Toolchain:
        raise ExportError(f"{flavour.label} is not installed here.")

    monkeypatch.setattr(gpu_plans, "open_toolchain", refuse)
    assert gpu_check.main([]) == 4
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        "gpu-check: no TensorRT plan was checked: TensorRT is not installed here. TensorRT-RTX is "
        "not installed here."
    )


def _served(picture: np.ndarray) -> WholeRun:  # type: ignore[type-arg]
    return WholeRun(picture=picture, seconds=1.0, first_s=9.0, timings_ms={}, faces=1)


@pytest.mark.parametrize(("cuda", "met"), [(0, True), (40, False)])
def test_gpu_check_serves_the_graph_and_the_plans_and_compares_the_pictures(
    cuda: int, met: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = np.full((8, 8, 3), 100, np.uint8)
    served: list[tuple[str, str]] = []
    exported: list[list[str]] = []

    def run_served(
        repository: Path, requests: list[dict[str, object]], *, device: str, repeats: int
    ) -> list[WholeRun]:
        (fields,) = requests
        assert fields["inpaint_faces"] is True
        assert (repository / "generate" / "config.pbtxt").is_file()
        served.append((repository.name, device))
        return [_served(picture + np.uint8(cuda if device == "cuda" else 0))]

    def export(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        exported.append(command)
        return subprocess.CompletedProcess(command, 0, "", "")

    rtx = Toolchain(flavour=Flavour.RTX, module=None, version="1.7.1.116", sms=("8.9",), gpu="")
    monkeypatch.setattr(gpu_check, "run_served", run_served)
    monkeypatch.setattr(gpu_check, "missing_cuda_provider", lambda: "")
    monkeypatch.setattr(gpu_check, "require_toolchains", lambda: ([rtx], []))
    monkeypatch.setattr(gpu_check.Check, "_engines", lambda self: None)
    check = gpu_check.Check("cuda", tmp_path, Budget(total_s=600))
    done = subprocess.Popen(["true"], stderr=subprocess.PIPE, text=True)
    monkeypatch.setattr(check, "_begin_export", lambda: setattr(check, "_export", done))
    monkeypatch.setattr(subprocess, "run", export)
    check.run()
    assert check.budget.reasons == {}
    assert served == [("demo", "cpu"), ("demo", "cuda"), ("demo-tensorrt-rtx", "cuda")]
    assert [command[command.index("--target") + 1] for command in exported] == ["tensorrt-rtx"]
    titles = [section.title for section in check.sections()]
    assert titles[1:3] == [
        "Whole request through Triton, demo model, face pass included",
        "Whole request through Triton, TensorRT-RTX plans of the demo model",
    ]
    assert check.failed is not met
    assert check.without_tensorrt == ""


def test_gpu_check_runs_no_graph_on_the_gpu_when_onnxruntime_cannot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check, "missing_cuda_provider", lambda: "install onnxruntime-gpu.")
    monkeypatch.setattr(gpu_check, "run_served", lambda *a, **k: [_served(np.zeros((8, 8, 3)))])
    check = gpu_check.Check("cuda", tmp_path, Budget(total_s=600))
    check._export = subprocess.Popen(["true"], stderr=subprocess.PIPE, text=True)
    check.budget.run("whole", check._whole, limit_s=60)
    assert check.budget.reasons == {"whole": "not run: install onnxruntime-gpu."}
    assert not check.failed  # what is not there cannot disagree


def test_toolchain_is_refused_with_its_gpus_when_it_does_not_build_for_this_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def rtx_only(flavour: Flavour) -> Toolchain:
        if flavour is Flavour.TENSORRT:
            raise ExportError("no TensorRT")
        return Toolchain(
            flavour=flavour, module=None, version="1.7.1.116", sms=("8.9", "12.0"), gpu=""
        )

    monkeypatch.setattr(gpu_plans, "open_toolchain", rtx_only)
    for sm, count in (("9.0", 0), ("8.9", 1)):
        gpu = Gpu(name="a GPU", sm=sm)
        monkeypatch.setattr(gpu_plans, "find_gpu", lambda gpu=gpu: gpu)
        found, reasons = gpu_plans.find_toolchains()
        assert len(found) == count
        assert reasons[0] == "no TensorRT"
        if not count:
            assert reasons[1] == (
                "TensorRT-RTX 1.7.1.116 builds for compute capability 8.9, 12.0, and a GPU has 9.0."
            )


def test_a_block_ends_when_what_it_calls_swallows_its_limit_once() -> None:
    budget = Budget(total_s=60)

    def build() -> None:
        try:
            time.sleep(10)
        except BaseException:  # TensorRT loses what is raised in its log's callback
            time.sleep(10)

    started_s = time.monotonic()
    assert not budget.run("a build", build, limit_s=3.1)
    assert time.monotonic() - started_s < 8  # 3.1 s and the next ring


@pytest.mark.parametrize(
    ("flavour", "launches", "accepted"),
    [(Flavour.TENSORRT, 4, True), (Flavour.TENSORRT, 3, False), (Flavour.RTX, 0, True)],
)
def test_plan_check_wants_cuda_graphs_where_we_record_them(
    flavour: Flavour, launches: int, accepted: bool,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    calls: list[int] = []

    class Engine(PlanEngine):
        def __init__(self) -> None:
            self.counters = PlanCounters(graph_launches=launches)

        def run(self, inputs: object, outputs: object = None) -> dict[str, Array]:
            calls.append(1)
            return {"y": np.full(2, 1.001, np.float32)}

        def close(self) -> None:
            calls.append(0)

    monkeypatch.setattr(gpu_plans, "obtain_plan", lambda *a, **k: None)
    monkeypatch.setattr(gpu_plans, "tensors_of", lambda path: ())
    monkeypatch.setattr(gpu_plans, "open_engine", lambda path, options: Engine())
    job = Job(family="sd15", part="vae_encoder", precision=Precision.FP16, folder=tmp_path)
    tools = Toolchain(flavour=flavour, module=None, version="11", sms=("9.0",), gpu="a GPU")
    ones = np.ones(2, np.float32)
    cases = [Case(inputs={"x": ones}, outputs={"y": ones})] * 2
    if accepted:
        assert gpu_plans.worst_error(job, cases, tools) == pytest.approx(0.001, rel=0.01)
    else:
        with pytest.raises(ModelError, match="3 runs went through CUDA graphs, expected 4"):
            gpu_plans.worst_error(job, cases, tools)
    assert calls == [1] * 8 + [0]
