"""`make bench-gpu`'s plans, whole requests and what it says where one cannot be run."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import gpu_pipelines, gpu_plan_steps, gpu_requests
from benchmarks.gpu import Bench, Options
from benchmarks.gpu_blocks import NotRun
from benchmarks.gpu_findings import EAGER, PLAN_SIDES, Findings, model_section
from benchmarks.gpu_models import make_subject
from benchmarks.gpu_onnx import OnnxSteps
from benchmarks.gpu_pipelines import require_space, write_pipeline, write_sure_detector
from benchmarks.gpu_plan_steps import PlanSteps, choose_target, step_profiles
from benchmarks.gpu_requests import DiffusersRequests, Requests, Seconds, requests_section
from benchmarks.gpu_whole import serve_options
from benchmarks.torch_networks import enlarge
from closeup.detection import OUTPUT_NAMES, decode_detections, detector_input
from closeup.engines import Array, EngineOptions, open_engine
from closeup.plans import Flavour, RuntimeFacts, verify_plan
from export.builder import Toolchain
from export.detector import load_face_detector
from export.profiles import tensors_of
from export.upscalers import LoadedUpscaler
from tests.fake_builder import FakeTensorrt

RTX = Toolchain(flavour=Flavour.RTX, module=None, version="1.7.1.116", sms=("8.9", "12.0"), gpu="")
REASON = "TensorRT-RTX 1.7.1.116 builds for compute capability 8.9, and NVIDIA H100 has 9.0."


def toolchain() -> Toolchain:
    """TensorRT for one GPU, with a builder that builds a plan of bytes."""
    return Toolchain(
        flavour=Flavour.TENSORRT, module=FakeTensorrt("11.1.0.106"), version="11.1.0.106",
        sms=("9.0",), gpu="NVIDIA H100",
    )  # fmt: skip


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> OnnxSteps:
    steps = OnnxSteps(
        subject=make_subject("sd15", use_tiny=True),
        device="cpu",
        dtype=torch.float32,
        rank=0,
        folder=tmp_path_factory.mktemp("steps"),
        found=Findings(),
    )
    steps.export()
    return steps


class GraphEngine:
    """A plan's engine that answers as the graph beside it does, or twice that."""

    def __init__(self, plan: Path, factor: float = 1.0) -> None:
        assert plan.read_bytes().startswith(b"plan of model.onnx")
        # As `PlanEngine` does before it opens one.
        verify_plan(plan, RuntimeFacts(flavour=Flavour.TENSORRT, version="11.1.0.106", sm="9.0"))
        self._engine = open_engine(plan.with_name("model.onnx"), options=EngineOptions(threads=1))
        self._factor = factor
        self.samples: list[Array] = []
        self.closed = False
        self.inputs, self.outputs = self._engine.inputs, self._engine.outputs

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        self.samples.append(feeds["sample"])
        outputs = self._engine.run(feeds)
        return {name: np.float32(self._factor) * value for name, value in outputs.items()}

    def close(self) -> None:
        self.closed = True


def test_plan_is_built_compared_and_timed_when_a_tensorrt_builds_for_the_gpu(
    steps: OnnxSteps,
) -> None:
    found, opened = Findings(), []

    def open_plan(plan: Path) -> GraphEngine:
        opened.append(GraphEngine(plan))
        return opened[-1]

    made = toolchain()
    PlanSteps(
        graph=steps, found=found, find=lambda: ([made], ["TensorRT-RTX is not here."]),
        open=open_plan,
    ).time((1, 4))  # fmt: skip
    side = PLAN_SIDES[Flavour.TENSORRT]
    assert sorted(found.step_ms) == [("sd15", side, 1), ("sd15", side, 4)]
    assert min(found.step_ms.values()) > 0
    ((_, config),) = made.module.built
    rows = [profile.shapes["context"] for profile in config.profiles]
    assert rows == [((1, 9, 32), (8, 9, 32), (8, 9, 32)), ((1, 9, 32), (2, 9, 32), (2, 9, 32))]
    assert "TensorRT-RTX is not here." in found.notes["sd15"]
    assert opened[0].closed
    # Steps go on from each other's latents, as in the denoiser's process.
    assert len({sample.tobytes() for sample in opened[0].samples}) > 3


def test_plan_has_no_figure_when_its_answer_is_not_pytorchs(steps: OnnxSteps) -> None:
    found = Findings()
    PlanSteps(
        graph=steps, found=found, find=lambda: ([toolchain()], []),
        open=lambda plan: GraphEngine(plan, factor=2.0),
    ).time((1,))  # fmt: skip
    assert found.step_ms == {}
    # Twice the answer differs by all of it, relative to what is expected.
    assert any("relative error 1.0e+00 against PyTorch" in note for note in found.notes["sd15"])


def test_plan_is_not_run_when_no_tensorrt_builds_for_the_gpu(
    steps: OnnxSteps, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find() -> tuple[list[Toolchain], list[str]]:
        raise NotRun(REASON)

    with pytest.raises(NotRun, match=r"NVIDIA H100 has 9\.0"):
        PlanSteps(graph=steps, found=Findings(), find=find).time((1,))
    monkeypatch.setattr(gpu_plan_steps, "find_toolchains", lambda: ([], [REASON]))
    monkeypatch.setattr(gpu_plan_steps, "missing_cuda_provider", lambda: "")
    assert choose_target() == ("onnx", f"ONNX Runtime CUDA: {REASON}")
    monkeypatch.setattr(gpu_plan_steps, "missing_cuda_provider", lambda: "no CUDA provider.")
    with pytest.raises(NotRun, match=r"has 9\.0\. no CUDA provider\."):
        choose_target()
    monkeypatch.setattr(gpu_plan_steps, "find_toolchains", lambda: ([RTX], []))
    assert choose_target() == ("tensorrt-rtx", "TensorRT-RTX 1.7.1.116 plans")


def test_profiles_hold_every_timed_batch_when_the_graph_is_bound(steps: OnnxSteps) -> None:
    tensors = tensors_of(steps.path)
    (profile,) = step_profiles(steps.subject, tensors, max_batch=8, alone=False)
    for batch in (1, 4, 8):
        shapes = {name: array.shape for name, array in steps.host_inputs(batch).items()}
        assert profile.takes(shapes)
    shapes = {name: array.shape for name, array in steps.host_inputs(9).items()}
    assert not profile.takes(shapes)


def test_table_gives_the_reason_when_a_side_was_not_run() -> None:
    found = Findings()
    found.step_ms["flux", EAGER, 1] = 40.0
    reasons = {"flux plan": f"not run: {REASON}", "sdxl plan": "failed: x", "matmul": "failed: y"}
    section = model_section(found, "flux", "F", steps=28, batches=(1, 4), reasons=reasons)
    rows = {row[0]: row[1:] for row in section.rows}
    assert rows[PLAN_SIDES[Flavour.RTX]] == ("not run",) * 4
    assert section.notes == (f"flux plan: not run: {REASON}",)


def test_bench_runs_every_family_on_every_side_when_nothing_is_left_out(tmp_path: Path) -> None:
    options = Options(out=tmp_path, device="cpu", minutes=1, use_tiny=True)
    blocks = [name for name, _, _ in Bench(options=options, scratch=tmp_path)._blocks()]
    assert len(set(blocks)) == len(blocks)
    for family in ("sd15", "sdxl", "flux"):
        for side in ("eager", "compile", "export", "onnxruntime", "plan",
                     "request", "request, eager", "request, compile"):  # fmt: skip
            assert f"{family} {side}" in blocks
    # A plan and a session need the graph.
    assert blocks.index("flux export") < blocks.index("flux plan")


def test_sure_detector_finds_faces_in_noise_of_any_size(tmp_path: Path) -> None:
    write_sure_detector(tmp_path / "sure.safetensors")
    detector = load_face_detector(tmp_path / "sure.safetensors")
    picture = np.random.default_rng(0).integers(0, 256, (96, 64, 3)).astype(np.uint8)
    tensor, scale = detector_input(picture, long_side=192)
    with torch.inference_mode():
        outputs = [output.numpy() for output in detector(torch.from_numpy(tensor))]
    faces = decode_detections(
        dict(zip(OUTPUT_NAMES, outputs, strict=True)), scale=scale, size=(96, 64)
    )
    assert len(faces) == 6 * 4  # a cell of 32 px each
    # 24 px at twice the picture's scale.
    assert {(round(face.width, 3), round(face.height, 3)) for face in faces} == {(12.0, 12.0)}
    right, left = faces[0].landmarks[:2]
    assert right[1] == pytest.approx(left[1])
    assert right[0] < left[0]


def test_pipeline_is_not_written_when_the_disk_is_too_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 101e9

    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage)
    require_space(tmp_path, "sdxl")
    with pytest.raises(NotRun, match="take 102 GB of scratch space and 101 GB are free"):
        require_space(tmp_path, "flux")


def test_picture_is_enlarged_exactly_when_the_network_repeats_pixels() -> None:
    network = torch.nn.Upsample(scale_factor=2, mode="nearest")
    upscaler = LoadedUpscaler(network=network, scale=2, tile_px=32, overlap_px=4)
    picture = np.random.default_rng(0).random((72, 40, 3), np.float32)  # several tiles
    enlarged = enlarge(picture, 2, upscaler=upscaler)
    # Where tiles overlap, float32 weights add up to 1; a pixel's shift would be some 0.3.
    np.testing.assert_allclose(enlarged, picture.repeat(2, 0).repeat(2, 1), atol=1e-6)


@pytest.mark.parametrize("name", ["sd15", "sdxl", "flux"])
def test_diffusers_side_repaints_one_face_of_every_family(name: str, tmp_path: Path) -> None:
    subject = make_subject(name, use_tiny=True)
    write_pipeline(subject, tmp_path / "pipeline", device="cpu", use_tiny=True)
    write_sure_detector(tmp_path / "sure.safetensors")
    side = DiffusersRequests(
        tmp_path / "pipeline", detector=tmp_path / "sure.safetensors", device="cpu",
        native_px=64, compiled=False,
    )  # fmt: skip
    fields = {**gpu_pipelines.request_fields(subject, native_px=64), "steps": 4}
    picture = side.paint(fields)
    assert picture.shape == (64, 64, 3)
    assert picture.std() > 0.01  # neither black nor grey
    assert side.repaint(fields) == 1


def make_requests(folder: Path, device: str = "cpu") -> Requests:
    return Requests(
        subject=make_subject("sd15", use_tiny=True), folder=folder, device=device, use_tiny=True,
        find_target=lambda: ("tensorrt-rtx", "plans"), found=Findings(),
    )  # fmt: skip


def test_export_is_the_users_own_command_when_plans_are_served(tmp_path: Path) -> None:
    command = make_requests(tmp_path, "cuda").export_command("tensorrt-rtx", tmp_path / "out")
    from export.__main__ import parse_options

    options = parse_options(command[3:])
    assert options.precision.value == "fp16"
    assert [str(size) for size in options.plans.sizes] == ["64x64"]
    assert options.lora_rank == 32  # as served: with LoRA inputs
    assert options.face_detector is not None
    assert options.face_detector.is_file()


def test_compiled_side_is_not_run_when_there_is_no_gpu(tmp_path: Path) -> None:
    with pytest.raises(NotRun, match="compared on a CUDA device"):
        make_requests(tmp_path).theirs(compiled=True)


def test_requests_table_says_not_run_when_a_side_has_no_figure() -> None:
    section = requests_section(
        "t", {gpu_requests.OURS: Seconds(plain_s=1.25, faces_s=2.5, how="plans")}
    )
    assert section.rows[0] == (gpu_requests.OURS, "1.250", "2.500", "plans")
    assert section.rows[1] == (gpu_requests.EAGER, "not run", "not run", "")


def test_server_gets_the_device_when_a_whole_request_is_served(tmp_path: Path) -> None:
    assert serve_options(tmp_path, "cuda").environment == {"CLOSEUP_DEVICE": "cuda"}


@pytest.mark.triton
def test_both_sides_of_a_whole_request_are_timed_when_it_is_served(tmp_path: Path) -> None:
    requests = make_requests(tmp_path)
    requests.find_target = lambda: ("onnx", "ONNX Runtime, CPU")
    requests.ours()
    requests.theirs(compiled=False)
    (section,) = requests.found.sections
    rows = {row[0]: row[1:] for row in section.rows}
    for side in (gpu_requests.OURS, gpu_requests.EAGER):
        plain_s, faces_s = map(float, rows[side][:2])
        assert 0 < plain_s < faces_s  # the face pass is extra work
    assert rows[gpu_requests.COMPILED][0] == "not run"
