"""Stable Diffusion 1.5 and the shared models as plans, really compiled; no GPU needed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from closeup.devices import find_gpu
from closeup.errors import ModelError
from closeup.plans import find_plans, read_record, verify_plan
from closeup.tensorrt_package import Messages, explain, make_logger
from export import engines
from export.__main__ import main as export_main
from export.builder import RTX_SMS, BuildJob, Toolchain, header_problems
from export.casts import check_casts
from export.components import face_detector_graph, upscaler_graph
from export.detector import OUTPUT_NAMES, load_face_detector
from export.graphs import Graph
from export.parts import Part, build_graph
from export.precisions import Precision
from export.repository import read_stamp
from export.upscalers import load_upscaler
from tests.engine_exports import DTYPES, EngineExport, runtime_facts
from tests.paths import DEMO_WEIGHTS, ROOT
from tests.tiny_pipelines import write_tiny_pipeline, write_tiny_upscaler

tensorrt_rtx = pytest.importorskip(
    "tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install -e '.[tensorrt-rtx]'"
)

MAX_BATCH, RANK, LORA_ROWS = 3, 8, 4
PARTS = {
    "sd_denoiser/text_encoder": ("text_encoder", Precision.FP16, RANK),
    "sd_vae_encoder": ("vae_encoder", Precision.BF16, 0),
    "sd_vae_decoder": ("vae_decoder", Precision.BF16, 0),
    "sd_denoiser/plain": ("denoiser", Precision.FP16, 0),
    "sd_denoiser": ("denoiser", Precision.FP16, RANK),
}
MODELS = (*PARTS, "upscaler", "face_detector")
# What the command line below asks for, by axis: smallest and largest.
PIXELS_HIGH, PIXELS_WIDE = (64, 128), (64, 96)
LIMITS = {
    "batch": (1, MAX_BATCH),
    "rows": (1, 2 * MAX_BATCH),
    "height": (PIXELS_HIGH[0] // 8, PIXELS_HIGH[1] // 8),
    "width": (PIXELS_WIDE[0] // 8, PIXELS_WIDE[1] // 8),
    "tokens": (77, 4 * 77),
    "adapters": (1, LORA_ROWS + 1),
    "rank": (1, RANK),
}
PIXELS = {"height": PIXELS_HIGH, "width": PIXELS_WIDE}
LATENTS = {f"latent_{name}": LIMITS[name] for name in ("height", "width")}
LIMITS_OF = {
    "sd_denoiser/text_encoder": {**LIMITS, "batch": (1, 12)},  # three prompts of four chunks
    "sd_vae_encoder": {**LIMITS, **PIXELS},
    "sd_vae_decoder": {**LIMITS, **LATENTS},
    "sd_denoiser/plain": LIMITS,
    "sd_denoiser": LIMITS,
    "upscaler": {"batch": (1, 4), "height": (8, 512), "width": (8, 512)},
    "face_detector": {"batch": (1, 8), "height": (32, 1280), "width": (32, 1280)},
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> EngineExport:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("engines")
    pipeline = write_tiny_pipeline(root / "pipeline")
    (pipeline / "closeup.json").write_text(json.dumps({"native_px": 64}), encoding="utf-8")
    write_tiny_upscaler(root / "upscaler.safetensors")
    export = EngineExport(
        pipeline=pipeline,
        repository=root / "repository",
        arguments=[
            "--model", str(pipeline), "--name", "sd", "--target", "tensorrt-rtx",
            "--precision", "fp16", "--component-precision", "upscaler=fp32",
            "--sizes", "64x64-96x128", "--max-batch", str(MAX_BATCH), "--lora-rank", str(RANK),
            "--lora-rows", str(LORA_ROWS), "--repository", str(root / "repository"),
            "--upscaler", str(root / "upscaler.safetensors"),
            "--face-detector", str(DEMO_WEIGHTS / "face_detector.safetensors"),
            "--cache", str(root / "cache"),
        ],
    )  # fmt: skip
    export.run()
    return export


def specification(export: EngineExport, model: str) -> Graph:
    """Describe a model's graph anew, from the pipeline and not from what was exported."""
    if model == "upscaler":
        return upscaler_graph(
            load_upscaler(export.pipeline.parent / "upscaler.safetensors").network
        )
    if model == "face_detector":
        detector = load_face_detector(DEMO_WEIGHTS / "face_detector.safetensors")
        return face_detector_graph(detector, OUTPUT_NAMES)
    name, precision, rank = PARTS[model]
    return build_graph(
        Part(
            folder=export.pipeline, name=name, precision=precision, max_rank=rank,
            max_batch=MAX_BATCH, max_tokens=77,
        )
    )  # fmt: skip


def read_config(export: EngineExport, model: str) -> Any:
    text = (export.repository / model / "config.pbtxt").read_text(encoding="utf-8")
    return text_format.Parse(text, pb.ModelConfig())


def test_every_component_is_compiled_and_can_be_told_from_any_other(exported: EngineExport) -> None:
    assert set(exported.handed) == set(MODELS)
    assert find_plans(exported.repository) == sorted(map(exported.plan, MODELS))
    for model in MODELS:
        record = verify_plan(exported.plan(model), runtime_facts())
        assert record.model == model
        assert record.sms == RTX_SMS
        assert record.plan_bytes > 100_000
        assert record.command.startswith("python -m export --model")
        assert "--sizes 64x64-96x128" in record.command


@pytest.mark.parametrize("model", MODELS)
def test_network_and_profiles_handed_to_the_builder_are_the_specification(
    exported: EngineExport, model: str
) -> None:
    handed, graph = exported.handed[model], specification(exported, model)
    for got, tensors in ((handed.inputs, graph.inputs), (handed.outputs, graph.outputs)):
        assert got == {
            tensor.name: (
                DTYPES[tensor.dtype],
                tuple(-1 if isinstance(axis, str) else axis for axis in tensor.axes),
            )
            for tensor in tensors
        }
    (profile,) = handed.profiles
    limits = LIMITS_OF[model]
    for tensor in graph.inputs:
        low, best, high = profile[tensor.name]
        for axis, *sides in zip(tensor.axes, low, best, high, strict=True):
            smallest, largest = limits[axis] if isinstance(axis, str) else (axis, axis)
            assert (sides[0], sides[2]) == (smallest, largest), (tensor.name, axis)
            assert smallest <= sides[1] <= largest
    assert handed.strongly_typed
    assert handed.sms == tuple(f"SM{sm.replace('.', '')}" for sm in RTX_SMS)


def test_only_float32_networks_have_tf32_switched_off(exported: EngineExport) -> None:
    found = {model: handed.tf32 for model, handed in exported.handed.items()}
    assert found == {model: model not in ("upscaler", "face_detector") for model in MODELS}


@pytest.mark.parametrize("model", MODELS)
def test_graphs_have_no_casts_inside_the_network(exported: EngineExport, model: str) -> None:
    record = read_record(exported.plan(model))
    report = check_casts(exported.plan(model).with_suffix(".onnx"), record.precision)
    assert report.stretches == ()
    wanted = {"sd_denoiser": 3, "sd_denoiser/plain": 3, "upscaler": 0, "face_detector": 0}
    # The denoiser's sample, context and time; else the one input that is no token id.
    assert report.narrowing == wanted.get(model, 1)
    assert report.widening == min(1, report.narrowing)


@pytest.mark.parametrize("model", MODELS)
def test_headers_are_valid_and_damaged_ones_are_not(exported: EngineExport, model: str) -> None:
    messages = Messages()
    runtime = tensorrt_rtx.Runtime(make_logger(tensorrt_rtx, messages))
    head = exported.plan(model).read_bytes()[: runtime.engine_header_size]
    _, diagnostics = runtime.get_engine_validity(head)
    assert header_problems(tensorrt_rtx, int(diagnostics)) == []
    _, diagnostics = runtime.get_engine_validity(b"?" * len(head))
    assert header_problems(tensorrt_rtx, int(diagnostics)) == ["malformed engine"]


@pytest.mark.skipif(find_gpu() is not None, reason="there is a GPU here")
def test_opening_a_plan_without_a_gpu_says_so_in_one_sentence(exported: EngineExport) -> None:
    from closeup.engines import open_engine

    messages = Messages()
    runtime = tensorrt_rtx.Runtime(make_logger(tensorrt_rtx, messages))
    plan = exported.plan("face_detector")
    assert runtime.deserialize_cuda_engine(plan.read_bytes()) is None
    text = explain(messages.errors)
    assert "there is no GPU that it can use (CUDA error 35)" in text
    assert "\n" not in text
    with pytest.raises(ModelError) as caught:
        open_engine(plan)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("model", "batch"),
    [("sd_vae_encoder", 3), ("sd_vae_decoder", 3), ("upscaler", 4), ("face_detector", 8)],
)
def test_configs_are_for_tritons_tensorrt_backend_and_agree_with_the_plans(
    exported: EngineExport, model: str, batch: int
) -> None:
    config, record = read_config(exported, model), read_record(exported.plan(model))
    assert (config.name, config.backend, config.max_batch_size) == (model, "tensorrt", batch)
    assert config.default_model_filename == "model.plan"
    assert config.instance_group[0].kind == pb.ModelInstanceGroup.KIND_GPU
    assert list(config.instance_group[0].gpus) == [0]
    assert list(config.instance_group[0].profile) == []  # one profile, the default
    assert not config.parameters
    assert config.HasField("dynamic_batching")
    largest = record.profiles[0].shapes[record.inputs[0].name].max
    assert largest[0] == batch  # a batch that Triton makes is one that the plan takes
    for declared, tensors in ((config.input, record.inputs), (config.output, record.outputs)):
        assert [tensor.name for tensor in declared] == [tensor.name for tensor in tensors]
        for told, real in zip(declared, tensors, strict=True):
            assert real.axes[0] == "batch"
            assert list(told.dims) == [-1 if isinstance(a, str) else a for a in real.axes[1:]]
            assert (told.data_type, real.dtype) == (pb.TYPE_FP32, "float32")


def test_denoiser_runs_on_the_gpu_and_the_manifest_says_what_its_plans_take(
    exported: EngineExport,
) -> None:
    config = read_config(exported, "sd_denoiser")
    assert (config.backend, config.max_batch_size) == ("python", 0)
    (group,) = config.instance_group
    # One process whatever GPUs there are: it alone knows the tickets that it gave.
    assert (group.kind, list(group.gpus)) == (pb.ModelInstanceGroup.KIND_GPU, [0])
    assert group.count == 1
    limits = exported.manifest.limits
    assert limits is not None
    assert (limits.lora_rows, limits.max_chunks) == (LORA_ROWS, 4)
    assert [str(size) for size in limits.sizes] == ["64x64 to 96x128"]
    precisions = {one.model: one.precision for one in exported.manifest.components}
    assert precisions == {model: precision.value for model, (_, precision, _) in PARTS.items()}


class CountingBuild:
    """Stands in for TensorRT where only what is built matters."""

    def __init__(self) -> None:
        self.models: list[str] = []

    def __call__(
        self, job: BuildJob, toolchain: Toolchain, target: Path, progress: Any = None
    ) -> float:
        self.models.append(job.model)
        target.write_bytes(f"{job.model} {job.profiles}".encode())
        return 0.0


@pytest.fixture
def copy(exported: EngineExport, tmp_path: Path) -> EngineExport:
    """The export once more, where a test may change it."""
    shutil.copytree(exported.repository, tmp_path / "repository")
    old, new = str(exported.repository), str(tmp_path / "repository")
    arguments = [new if word == old else word for word in exported.arguments]
    return EngineExport(
        pipeline=exported.pipeline, repository=tmp_path / "repository", arguments=arguments
    )


def with_sizes(export: EngineExport, sizes: str) -> list[str]:
    return [sizes if word == "64x64-96x128" else word for word in export.arguments]


def state(repository: Path) -> dict[str, tuple[int, bytes]]:
    """Every file's size and content."""
    files = [path for path in sorted(repository.rglob("*")) if path.is_file()]
    return {
        str(path.relative_to(repository)): (path.stat().st_size, path.read_bytes())
        for path in files
        if path.name != ".export.lock"
    }


def test_second_export_of_the_same_changes_nothing(
    copy: EngineExport, capsys: pytest.CaptureFixture[str]
) -> None:
    before = state(copy.repository)
    assert export_main(copy.arguments) == 0
    assert capsys.readouterr().out.count(": unchanged") == 3
    assert state(copy.repository) == before


def test_forced_export_of_the_same_takes_every_plan_from_the_cache(
    copy: EngineExport, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    build = CountingBuild()
    monkeypatch.setattr(engines, "build_plan", build)
    plans = {model: copy.plan(model).read_bytes() for model in MODELS}
    assert export_main([*copy.arguments, "--force"]) == 0
    assert build.models == []
    assert capsys.readouterr().out.count("MB from the cache, built in") == len(MODELS)
    assert {model: copy.plan(model).read_bytes() for model in MODELS} == plans


def test_other_sizes_build_plans_from_the_graphs_that_are_there(
    copy: EngineExport, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = CountingBuild()
    monkeypatch.setattr(engines, "build_plan", build)
    before = state(copy.repository)
    assert export_main(with_sizes(copy, "64x64,96x128")) == 0
    # The sizes are not the shared models' concern, and the text encoder's profile is the same.
    assert set(build.models) == set(PARTS) - {"sd_denoiser/text_encoder"}
    after = state(copy.repository)
    graphs = [name for name in before if name.endswith((".onnx", "tokenizer.json"))]
    assert len(graphs) == len(MODELS) + 1
    assert all(before[name] == after[name] for name in graphs)
    assert {str(size) for size in copy.manifest.limits.sizes} == {"64x64", "96x128"}  # type: ignore[union-attr]
    config = read_config(copy, "sd_vae_decoder")
    assert list(config.instance_group[0].profile) == ["0", "1"]
    strategy = config.parameters["execution_context_allocation_strategy"].string_value
    assert strategy == "ON_PROFILE_CHANGE"
    for model in MODELS:
        assert verify_plan(copy.plan(model), runtime_facts()).model == model
    assert export_main(with_sizes(copy, "64x64,96x128")) == 0
    assert len(build.models) == len(PARTS) - 1  # unchanged now


def test_missing_plan_is_built_again(copy: EngineExport, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "build_plan", CountingBuild())
    copy.plan("sd_denoiser/plain").unlink()
    assert export_main(copy.arguments) == 0
    verify_plan(copy.plan("sd_denoiser/plain"), runtime_facts())


def test_graphs_are_served_again_after_an_export_to_onnx(
    copy: EngineExport, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [
        "--model", str(copy.pipeline), "--name", "sd", "--repository", str(copy.repository),
        "--lora-rank", "0", "--max-batch", "2",
    ]  # fmt: skip
    assert export_main(arguments) == 0
    assert [path.parts[-3] for path in find_plans(copy.repository)] == ["face_detector", "upscaler"]
    assert copy.manifest.limits is None
    assert read_config(copy, "sd_vae_decoder").backend == "onnxruntime"


def command(arguments: list[str]) -> list[str]:
    return [sys.executable, "-m", "export", *arguments]


def test_killed_export_leaves_what_is_served_and_the_next_one_clears_up(
    copy: EngineExport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = state(copy.repository)
    arguments = with_sizes(copy, "64x72,72x64")
    process = subprocess.Popen(
        command(arguments), cwd=ROOT, stdout=subprocess.PIPE, text=True, stderr=subprocess.DEVNULL
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "sd_vae_encoder" in line:  # the second plan of five is begun
            break
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL
    process.stdout.close()
    assert state(copy.repository) == before
    stale = list(tmp_path.glob(".repository-*"))
    assert len(stale) == 1
    monkeypatch.setattr(engines, "build_plan", CountingBuild())
    assert export_main(arguments) == 0
    assert not list(tmp_path.glob(".repository-*"))
    for model in MODELS:
        verify_plan(copy.plan(model), runtime_facts())


def test_full_disk_leaves_what_is_served(
    copy: EngineExport,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    before = state(copy.repository)
    (tmp_path / "cache" / "plans").mkdir(parents=True)

    class FullDisk(CountingBuild):
        def __call__(self, job: BuildJob, toolchain: Toolchain, target: Path, *a: Any, **n: Any
        ) -> float:  # fmt: skip
            if job.model == "sd_vae_decoder":
                target.symlink_to("/dev/full")  # every write to it answers ENOSPC
            return super().__call__(job, toolchain, target)

    monkeypatch.setattr(engines, "build_plan", FullDisk())
    arguments = [*with_sizes(copy, "64x80"), "--cache", str(tmp_path / "cache")]
    assert export_main(arguments) == 2
    text = capsys.readouterr().err
    assert "sd_vae_decoder: the plan cannot be written" in text
    assert "no space left on device" in text
    assert text.count("\n") == 1
    assert state(copy.repository) == before
    assert not list(tmp_path.glob(".repository-*"))


def test_two_exports_at_once_leave_one_whole_repository(
    copy: EngineExport, monkeypatch: pytest.MonkeyPatch
) -> None:
    class SlowBuild(CountingBuild):
        def __call__(self, *given: Any, **named: Any) -> float:
            time.sleep(0.2)
            return super().__call__(*given, **named)

    monkeypatch.setattr(engines, "build_plan", SlowBuild())
    answers: dict[str, int] = {}

    def export(sizes: str) -> None:
        answers[sizes] = export_main(with_sizes(copy, sizes))

    threads = [threading.Thread(target=export, args=(f"64x{side}",)) for side in (88, 104)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(answers.values()) == {0}
    limits = copy.manifest.limits
    assert limits is not None
    (tall,) = (size for size in limits.sizes if size.max_height > 64)
    for model in PARTS:
        record = verify_plan(copy.plan(model), runtime_facts())
        if model != "sd_denoiser/text_encoder":
            assert record.profiles[0].name == str(tall)
    stamp = read_stamp(copy.repository, "sd_denoiser")
    assert stamp is not None
    assert len(stamp.plans) == len(PARTS)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--sizes", "64x64"], "--sizes is an option of plans"),
        (["--sms", "8.9"], "--sms is an option of plans"),
        (["--target", "tensorrt-rtx", "--sizes", "64"], "'64' is no size"),
        (["--target", "tensorrt-rtx", "--sizes", "64x68"], "68 is no multiple of 8"),
        (["--target", "tensorrt-rtx", "--sms", "9.0"], "not for 9.0; take --target tensorrt"),
        (["--target", "tensorrt-rtx", "--sms", "nine"], "--sms nine"),
        (["--target", "tensorrt-rtx", "--lora-rows", "0"], "--lora-rows 0"),
        (["--target", "tensorrt-rtx", "--cache-gb", "-1"], "--cache-gb -1"),
        (["--precision", "bf16"], "bf16 is for TensorRT plans only"),
        (["--component-precision", "vae=fp16"], "black pictures"),
        (["--component-precision", "upscaler=fp16"], "needs --upscaler FILE"),
        (["--component-precision", "text_encoder_2=fp32"], "Stable Diffusion 1.5 has no text_enc"),
    ],
)
def test_options_of_plans_that_cannot_be_right_are_refused(
    exported: EngineExport,
    flags: list[str],
    expected: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    common = ["--model", str(exported.pipeline), "--name", "x", "--repository", str(tmp_path / "r")]
    assert export_main([*common, *flags]) == 2
    text = capsys.readouterr().err
    assert expected in text
    assert text.count("\n") == 1
    assert not (tmp_path / "r" / "models.json").exists()
