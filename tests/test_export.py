"""``python -m export``: what lies in the repository afterwards, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from google.protobuf import text_format
from torch import Tensor, nn
from transformers import CLIPTokenizer
from tritonclient.grpc import model_config_pb2

from closeup.errors import ExportError
from closeup.faces import FaceDefaults
from closeup.manifest import Defaults, ModelManifest, read_index, read_models, read_upscaler
from closeup.segments import DENOISER_INPUTS
from closeup.tokens import PromptTokenizer
from export import graphs
from export.__main__ import main, parse_options
from export.config import TritonConfig, config_text
from export.detector import OUTPUT_NAMES, FaceDetector, save_face_detector
from export.exporting import export_face_detector
from export.facts import ModelFacts, face_facts, read_folder_facts
from export.graphs import Graph, GraphTensor, check_graph, normal_inputs, open_session, write_graph
from export.options import check_options, hash_file, pipeline_fingerprint
from export.repository import add_to_index, is_unchanged
from tests.tiny_pipelines import write_tiny_pipeline, write_tiny_upscaler

PROMPT = "a photo of the woman, close up of the face, red coat, 42!"


@dataclasses.dataclass(frozen=True)
class Exported:
    pipeline: Path
    repository: Path

    @property
    def arguments(self) -> list[str]:
        return [
            "--model", str(self.pipeline), "--name", "tiny",
            "--repository", str(self.repository), "--lora-rank", "4", "--max-batch", "2",
            "--upscaler", str(self.pipeline / "upscaler.safetensors"), "--steps", "7",
        ]  # fmt: skip

    @property
    def manifest(self) -> ModelManifest:
        return read_models(self.repository)["tiny"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("export")
    result = Exported(
        pipeline=write_tiny_pipeline(root / "pipeline"), repository=root / "repository"
    )
    write_tiny_upscaler(result.pipeline / "upscaler.safetensors", scale=2)
    facts = {
        "native_px": 96,
        "face_crop_factor": 1.6,
        "lost_face_strength": 0.8,
        "face_steps": 9,
        "defaults": {"steps": 5, "cfg_scale": 4.0},
    }
    (result.pipeline / "closeup.json").write_text(json.dumps(facts), encoding="utf-8")
    assert main(result.arguments) == 0
    return result


def graph_path(repository: Path, model: str) -> Path:
    """The ONNX file of a component; LoRA text encoders lie beside the denoiser's."""
    folder, _, encoder = model.partition("/")
    return repository / folder / "1" / f"{encoder or 'model'}.onnx"


def read_config(repository: Path, model: str) -> Any:
    text = (repository / model / "config.pbtxt").read_text(encoding="utf-8")
    return text_format.Parse(text, model_config_pb2.ModelConfig())


@pytest.mark.parametrize(
    ("model", "batch"),
    [("tiny_vae_encoder", 2), ("tiny_vae_decoder", 2), ("upscaler", 4)],
)
def test_export_writes_configs_that_name_the_graphs_tensors(
    exported: Exported, model: str, batch: int
) -> None:
    config = read_config(exported.repository, model)
    session = open_session(exported.repository / model / "1" / "model.onnx")
    assert (config.name, config.backend, config.max_batch_size) == (model, "onnxruntime", batch)
    assert config.HasField("dynamic_batching")
    assert config.dynamic_batching.max_queue_delay_microseconds == 0  # lone requests do not wait
    for declared, real in (
        (config.input, session.get_inputs()),
        (config.output, session.get_outputs()),
    ):
        assert [tensor.name for tensor in declared] == [tensor.name for tensor in real]
        for tensor, found in zip(declared, real, strict=True):
            fixed = [-1 if isinstance(side, str) else side for side in found.shape]
            assert fixed[0] == -1
            for told, side in zip(tensor.dims, fixed[1:], strict=True):
                assert told == side or side == -1
    assert config.input[0].data_type == model_config_pb2.TYPE_FP32


def test_export_writes_the_denoisers_config_from_its_interface(exported: Exported) -> None:
    config = read_config(exported.repository, "tiny_denoiser")
    assert (config.backend, config.max_batch_size) == ("python", 0)
    assert [(tensor.name, list(tensor.dims), tensor.optional) for tensor in config.input] == [
        (tensor.name, list(tensor.dims), tensor.optional) for tensor in DENOISER_INPUTS
    ]
    code = exported.repository / "tiny_denoiser" / "1" / "model.py"
    compile(code.read_text(encoding="utf-8"), str(code), "exec")


def test_config_text_survives_protobuf_when_a_name_needs_quoting() -> None:
    config = TritonConfig(
        name='a"b\\c', backend="python", inputs=(), outputs=(), parameters={"k": "v\n"}
    )
    parsed = text_format.Parse(config_text(config), model_config_pb2.ModelConfig())
    assert parsed.name == 'a"b\\c'
    assert parsed.parameters["k"].string_value == "v\n"
    assert list(parsed.instance_group[0].gpus) == []


def test_config_text_names_the_gpus_when_there_are_some() -> None:
    config = TritonConfig(
        name="a",
        backend="tensorrt",
        inputs=(),
        outputs=(),
        kind="KIND_GPU",
        gpus=(0, 2),
        profiles=2,
    )
    (group,) = text_format.Parse(config_text(config), model_config_pb2.ModelConfig()).instance_group
    assert (list(group.gpus), list(group.profile), group.count) == ([0, 2], ["0", "1"], 1)


def test_export_stores_evidence_in_the_manifest(exported: Exported) -> None:
    manifest = exported.manifest
    assert [component.model for component in manifest.components] == [
        "tiny_denoiser/text_encoder", "tiny_vae_encoder", "tiny_vae_decoder", "tiny_denoiser",
        "tiny_denoiser/plain",
    ]  # fmt: skip
    for component in manifest.components:
        path = graph_path(exported.repository, component.model)
        assert component.sha256 == hash_file(path)
        assert component.bytes == path.stat().st_size
        assert 0 < component.max_rel_error < graphs.LIMITS["fp32"]
        assert len(component.checks) >= 3
    upscaler = read_upscaler(exported.repository)
    assert upscaler is not None
    assert (upscaler.scale, upscaler.max_batch) == (2, 4)


def test_export_prefers_flags_to_the_folders_facts(exported: Exported) -> None:
    manifest = exported.manifest
    assert manifest.native_px == 96
    assert manifest.face_defaults == FaceDefaults(crop_factor=1.6, lost_strength=0.8, latent_px=8)
    assert manifest.face_steps == 9
    assert manifest.defaults == Defaults(steps=7, cfg_scale=4.0)
    assert manifest.vae_scale_factor == 8
    assert manifest.scheduler["_class_name"] == "DDIMScheduler"
    assert manifest.lora is not None
    assert manifest.lora.max_rank == 4


@pytest.mark.parametrize("prompt", [PROMPT, "", "Red   COAT", "zürich"])
def test_exported_tokenizer_gives_the_ids_of_the_pipelines(exported: Exported, prompt: str) -> None:
    manifest = exported.manifest
    tokenizer = PromptTokenizer(
        manifest.encoders[0].tokenizer, exported.repository / manifest.denoiser
    )
    reference = CLIPTokenizer.from_pretrained(exported.pipeline / "tokenizer")
    expected = reference(prompt, padding="max_length", max_length=77, truncation=True).input_ids
    assert tokenizer.encode(prompt).ids.tolist() == expected


def test_exported_components_chain_like_the_pipelines(exported: Exported) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(exported.pipeline, safety_checker=None)
    manifest = exported.manifest
    assert manifest.encoders[0].lora is not None
    draw = torch.Generator().manual_seed(3)
    latents = torch.randn(1, 4, 6, 9, generator=draw)
    picture = torch.rand(1, 3, 48, 72, generator=draw) * 2 - 1
    ids = torch.randint(500, (1, 77), generator=draw)
    with torch.no_grad():
        scaling = pipeline.vae.config.scaling_factor
        expected = {
            "tiny_vae_decoder": pipeline.vae.decode(latents / scaling).sample,
            "tiny_vae_encoder": pipeline.vae.encode(picture).latent_dist.parameters,
            "tiny_denoiser/text_encoder": pipeline.text_encoder(ids)[0],
        }
    inputs = {
        "tiny_vae_decoder": {"latents": latents},
        "tiny_vae_encoder": {"image": picture},
        "tiny_denoiser/text_encoder": {
            "input_ids": ids,
            "lora": torch.zeros(1, manifest.encoders[0].lora.rows, 1),
            "lora_row": torch.zeros(1, dtype=torch.int64),
        },
    }
    for model, reference in expected.items():
        session = open_session(graph_path(exported.repository, model))
        got = session.run(None, {name: value.numpy() for name, value in inputs[model].items()})[0]
        error = np.linalg.norm(got - reference.numpy()) / np.linalg.norm(reference.numpy())
        # Float32 rounding gives 1e-6; scaling left out or zeros give more than 1e-1.
        assert error < 1e-5


def test_export_is_skipped_when_nothing_changed(
    exported: Exported, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (exported.repository / "tiny_denoiser" / "1" / "model.onnx").stat().st_mtime_ns
    assert main(exported.arguments) == 0
    assert "tiny_denoiser: unchanged" in capsys.readouterr().out
    assert (exported.repository / "tiny_denoiser" / "1" / "model.onnx").stat().st_mtime_ns == before


def test_export_is_not_skipped_when_any_file_it_wrote_is_gone(exported: Exported) -> None:
    stamp = json.loads((exported.repository / "tiny_denoiser" / "export.json").read_text())
    written = {path.removeprefix("tiny_") for path in stamp["files"]}
    assert written >= {
        "denoiser/1/model.onnx", "denoiser/1/plain.onnx", "denoiser/1/text_encoder.onnx",
        "denoiser/1/model.py", "denoiser/config.pbtxt", "denoiser/manifest.json",
        "denoiser/tokenizer.json", "vae_encoder/1/model.onnx", "vae_decoder/config.pbtxt",
    }  # fmt: skip
    model, fingerprint = "tiny_denoiser", stamp["fingerprint"]
    assert is_unchanged(exported.repository, model, fingerprint)
    assert not is_unchanged(exported.repository, model, "another")
    for name in [*stamp["files"], "tiny_denoiser/export.json"]:
        path = exported.repository / name
        path.rename(path.with_name("away"))
        try:
            assert not is_unchanged(exported.repository, model, fingerprint), name
        finally:
            path.with_name("away").rename(path)


def test_fingerprint_changes_when_weights_options_or_facts_change(
    exported: Exported, tmp_path: Path
) -> None:
    folder = shutil.copytree(exported.pipeline, tmp_path / "pipeline")
    options = parse_options(exported.arguments)
    same = pipeline_fingerprint(options, folder, options.facts)
    assert same == pipeline_fingerprint(options, exported.pipeline, options.facts)
    other_options = dataclasses.replace(options, lora_rank=5)
    assert pipeline_fingerprint(other_options, folder, options.facts) != same
    assert pipeline_fingerprint(options, folder, ModelFacts(native_px=1)) != same
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    assert pipeline_fingerprint(options, folder, options.facts) != same


def test_export_leaves_the_repository_as_it_was_when_a_check_fails(
    exported: Exported,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    files = {path: path.stat().st_mtime_ns for path in exported.repository.rglob("*.onnx")}
    monkeypatch.setitem(graphs.LIMITS, "fp32", 1e-12)
    assert main([*exported.arguments, "--force"]) == 2
    message = capsys.readouterr().err
    assert "text encoder does not agree with PyTorch" in message
    assert "Traceback" not in message
    assert {p: p.stat().st_mtime_ns for p in exported.repository.rglob("*.onnx")} == files
    assert [p.name for p in exported.repository.parent.iterdir() if p.name[0] == "."] == []


class Doubled(nn.Module):
    """Twice the input, or after the export something else."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = 2.0

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"y": x * self.factor}


@pytest.mark.parametrize("factor", [2.001, 0.0, float("nan")])
def test_check_graph_refuses_when_pytorch_gives_something_else(
    tmp_path: Path, factor: float
) -> None:
    x, y = (GraphTensor(name=name, axes=("batch", 3)) for name in "xy")
    module = Doubled()
    graph = Graph(
        title="toy",
        module=module,
        inputs=(x,),
        outputs=(y,),
        draw=normal_inputs(x),
        cases=({"batch": 2}, {"batch": 5}),
        use_validation=False,
    )
    write_graph(graph, tmp_path / "model.onnx")
    assert check_graph(graph, tmp_path / "model.onnx").max_rel_error < 1e-6
    module.factor = factor
    with pytest.raises(ExportError, match="output y at batch 2 differs"):
        check_graph(graph, tmp_path / "model.onnx")


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run the command, which must fail with one sentence; return it."""
    assert main(list(arguments)) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    assert captured.err.startswith("export: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_export_says_what_is_wrong_when_the_folder_is_no_pipeline(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ("--name", "x", "--repository", str(tmp_path / "repository"))
    missing = refused(capsys, "--model", str(tmp_path / "nothing"), *common)
    assert "there is no folder" in missing
    (tmp_path / "empty").mkdir()
    assert "no model_index.json" in refused(capsys, "--model", str(tmp_path / "empty"), *common)
    index = tmp_path / "empty" / "model_index.json"
    index.write_text('{"_class_name": "WanPipeline"}', encoding="utf-8")
    other = refused(capsys, "--model", str(tmp_path / "empty"), *common)
    assert "is a WanPipeline" in other
    assert not (tmp_path / "repository" / "models.json").exists()


def test_export_refuses_pickled_weights(
    exported: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(exported.pipeline, tmp_path / "pipeline")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    message = refused(
        capsys, "--model", str(folder), "--name", "x", "--repository", str(tmp_path / "r")
    )
    assert "no .safetensors file" in message


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--name", "../x"], "--name"),
        (["--name", "upscaler"], "--name"),
        (["--lora-rank", "-1"], "--lora-rank"),
        (["--max-batch", "0"], "--max-batch"),
        (["--upscaler", "missing.safetensors"], "--upscaler"),
    ],
)
def test_check_options_names_the_flag_when_it_cannot_be_right(
    flags: list[str], expected: str
) -> None:
    options = parse_options(["--model", "m", "--name", "n", *flags])
    with pytest.raises(ExportError, match=expected):
        check_options(options)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"native": 128}', "unknown key 'native'"),
        ('{"defaults": {"w": 128}}', "unknown key 'w'"),
        ("[1]", "expected a JSON object"),
        ("{", "not valid JSON"),
        ('{"native_px": "128"}', "native_px"),
        ('{"defaults": {"steps": 2.5}}', "steps"),
    ],
)
def test_read_folder_facts_refuses_when_the_file_is_wrong(
    tmp_path: Path, text: str, expected: str
) -> None:
    (tmp_path / "closeup.json").write_text(text, encoding="utf-8")
    with pytest.raises(ExportError, match=expected):
        read_folder_facts(tmp_path)


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        (ModelFacts(face_crop_factor=9.0), "face_crop_factor is 9; expected 1.2 to 4"),
        (ModelFacts(face_steps=51), "face_steps is 51; expected 1 to 50"),
        (ModelFacts(lost_face_strength=-0.5), "lost_face_strength is -0.5; expected 0 to 1"),
    ],
)
def test_face_facts_are_refused_when_out_of_range(facts: ModelFacts, expected: str) -> None:
    with pytest.raises(ExportError, match=expected):
        face_facts(facts)
    assert face_facts(ModelFacts(lost_face_strength=1)) == {"lost_face_strength": 1.0}
    assert repr(face_facts(ModelFacts(face_steps=7))) == "{'face_steps': 7}"


def test_add_to_index_keeps_the_order_when_a_name_is_there(tmp_path: Path) -> None:
    for name in ("first", "second", "first"):
        add_to_index(tmp_path, name)
    assert read_index(tmp_path) == ["first", "second"]


def test_export_takes_a_face_detector_as_weights_and_as_onnx(
    exported: Exported, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    save_face_detector(FaceDetector().eval(), tmp_path / "detector.safetensors")
    repository = tmp_path / "repository"
    compared = export_face_detector(tmp_path / "detector.safetensors", repository, "one")
    assert 0 < compared.component.max_rel_error < graphs.LIMITS["fp32"]
    first = read_config(repository, "face_detector")
    assert [tensor.name for tensor in first.input] == ["input"]
    assert sorted(tensor.name for tensor in first.output) == sorted(OUTPUT_NAMES)
    assert list(first.output[0].dims) == [-1, 1]
    onnx_file = shutil.copy(repository / "face_detector" / "1" / "model.onnx", tmp_path / "d.onnx")
    taken = export_face_detector(Path(onnx_file), repository, "two")
    assert "not compared" in taken.component.checks[0]
    assert taken.component.sha256 == compared.component.sha256
    assert read_config(repository, "face_detector") == first
    other = exported.repository / "upscaler" / "1" / "model.onnx"
    with pytest.raises(ExportError, match=r"expected YuNet's"):
        export_face_detector(other, repository, "three")
