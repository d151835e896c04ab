"""Face detectors that come as ONNX files: what is freed, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from google.protobuf import text_format
from safetensors.torch import save_file
from torch import Tensor, nn
from tritonclient.grpc import model_config_pb2

from closeup.detection import detector_input
from closeup.engines import open_engine
from closeup.errors import ExportError, ModelError
from closeup.onnx_serving import check_config
from export.adopting import read_detector
from export.components import FaceDetectorModule
from export.config import DETECTOR_BATCH
from export.detector import OUTPUT_NAMES, DetectorSize, FaceDetector, load_face_detector
from export.exporting import export_face_detector
from export.graphs import open_session, quiet_exporters
from tests.paths import SHARED

SIDE = 64
YUNET = SHARED / "data" / "yunet" / "yunet_n_dynamic.onnx"


class Places(nn.Module):
    """A detector that knows the size it was traced at."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.places = nn.Parameter(torch.rand(1, 3, SIDE, SIDE))

    def forward(self, input: Tensor) -> dict[str, Tensor]:
        found: dict[str, Tensor] = self.inner(input + self.places)
        return found


class Counted(nn.Module):
    """A detector that gives the same number of cells at every size."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input: Tensor) -> dict[str, Tensor]:
        found = self.inner(input)
        return {name: value[:, :4] for name, value in found.items()}


def tiny_detector() -> nn.Module:
    torch.manual_seed(0)
    return FaceDetectorModule(FaceDetector(DetectorSize(stem=4, width=8)).eval(), OUTPUT_NAMES)


def trace(module: nn.Module, path: Path) -> Path:
    """Write a graph of one fixed size, as the published YuNet is."""
    with quiet_exporters():
        torch.onnx.export(
            module.eval(),
            (torch.rand(1, 3, SIDE, SIDE) * 255,),
            path,
            input_names=["input"],
            output_names=list(OUTPUT_NAMES),
            opset_version=18,
            dynamo=False,
        )
    return path


@pytest.fixture(scope="module")
def fixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trace(tiny_detector(), tmp_path_factory.mktemp("detector") / "fixed.onnx")


def test_detector_of_a_fixed_size_is_served_at_every_size(fixed: Path, tmp_path: Path) -> None:
    assert open_session(fixed).get_inputs()[0].shape == [1, 3, SIDE, SIDE]
    export_face_detector(fixed, tmp_path, "one")
    folder = tmp_path / "face_detector"
    engine = open_engine(folder / "1" / "model.onnx")
    config = text_format.Parse(
        (folder / "config.pbtxt").read_text(encoding="utf-8"), model_config_pb2.ModelConfig()
    )
    assert config.max_batch_size == DETECTOR_BATCH
    listed = {
        key: [{"name": t.name, "dims": list(t.dims)} for t in tensors]
        for key, tensors in (("input", config.input), ("output", config.output))
    }
    check_config({"max_batch_size": DETECTOR_BATCH, **listed}, engine)
    pictures = np.random.default_rng(1).uniform(0, 255, (2, 3, 96, 32)).astype(np.float32)
    found = engine.run({"input": pictures})
    with torch.no_grad():
        expected = tiny_detector()(torch.from_numpy(pictures))
    for name in OUTPUT_NAMES:
        assert found[name].shape == expected[name].shape
        # Rounding gives 1e-6; rows of the other picture, or zeros, are off by far more.
        assert np.allclose(found[name], expected[name].numpy(), rtol=1e-4, atol=1e-4)


def test_detector_keeps_the_expected_outputs_alone(fixed: Path, tmp_path: Path) -> None:
    model = onnx.load(fixed)
    extra = model.graph.node[0].output[0]
    model.graph.output.append(onnx.helper.make_tensor_value_info(extra, 1, None))
    onnx.save(model, tmp_path / "more.onnx")
    session = open_session(read_detector(tmp_path / "more.onnx", OUTPUT_NAMES))
    assert [tensor.name for tensor in session.get_outputs()] == list(OUTPUT_NAMES)


@pytest.mark.parametrize("kind", [Places, Counted])
def test_detector_is_refused_when_it_is_fixed_inside(
    kind: Callable[[nn.Module], nn.Module], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = trace(kind(tiny_detector()), tmp_path / "fixed.onnx")
    with pytest.raises(ExportError, match="is fixed inside to the size") as caught:
        export_face_detector(path, tmp_path / "repository", "one")
    assert "\n" not in str(caught.value)
    assert "onnxruntime" not in capfd.readouterr().err
    assert not (tmp_path / "repository" / "face_detector").exists()


def test_detector_is_refused_when_its_input_is_another(fixed: Path, tmp_path: Path) -> None:
    model = onnx.load(fixed)
    model.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    first = model.graph.node[0]
    cast = onnx.helper.make_node("Cast", ["input"], ["wide"], to=onnx.TensorProto.FLOAT)
    first.input[0] = "wide"
    model.graph.node.insert(0, cast)
    onnx.save(model, tmp_path / "other.onnx")
    with pytest.raises(ExportError, match=r"input is tensor\(float16\) .*expected float"):
        read_detector(tmp_path / "other.onnx", OUTPUT_NAMES)


@pytest.mark.skipif(not YUNET.exists(), reason="shared/data/yunet is not here")
def test_yunet_of_a_fixed_size_finds_what_the_dynamic_one_finds(tmp_path: Path) -> None:
    model = onnx.load(YUNET)
    for value in (*model.graph.input, *model.graph.output):
        dims = value.type.tensor_type.shape.dim
        stride = int(value.name.split("_")[1]) if "_" in value.name else 0
        sizes = (1, 640 // stride * (640 // stride)) if stride else (1, 3, 640, 640)
        for dim, size in zip(dims, sizes, strict=False):
            dim.dim_value = size
    onnx.save(model, tmp_path / "fixed.onnx")
    export_face_detector(tmp_path / "fixed.onnx", tmp_path / "repository", "one")
    served = tmp_path / "repository" / "face_detector" / "1" / "model.onnx"
    picture = np.random.default_rng(2).integers(0, 255, (320, 200, 3)).astype(np.uint8)
    tensor, _ = detector_input(picture)
    assert tensor.shape[2:] != (640, 640)
    got, expected = (open_engine(path).run({"input": tensor}) for path in (served, YUNET))
    for name in OUTPUT_NAMES:
        assert np.array_equal(got[name], expected[name])
    # The dynamic one is taken as it is.
    assert read_detector(YUNET, OUTPUT_NAMES) == YUNET.read_bytes()


def test_check_config_refuses_when_dims_are_not_the_graphs(fixed: Path) -> None:
    engine = open_engine(fixed)
    outputs = [{"name": spec.name, "dims": list(spec.shape)} for spec in engine.outputs]
    for dims in ([3, -1, -1], [1, 3, -1, -1], [1, 3, SIDE, 32]):
        config = {"max_batch_size": 0, "input": [{"name": "input", "dims": dims}]}
        with pytest.raises(ModelError, match=r"tensor input the dims \[.*expected \[1, 3, 64, 64"):
            check_config({**config, "output": outputs}, engine)
    good = {"name": "input", "dims": [1, 3, SIDE, SIDE]}
    check_config({"max_batch_size": 0, "input": [good], "output": outputs}, engine)


def test_load_face_detector_says_what_is_wrong(tmp_path: Path) -> None:
    bad = tmp_path / "bad.pt"
    torch.save({"a": torch.zeros(1)}, bad)
    with pytest.raises(ModelError, match="bad.pt is no safetensors file"):
        load_face_detector(bad)
    for size in ({}, {"size": "[]"}, {"size": '{"stem": "x"}'}, {"size": "{"}):
        path = tmp_path / "detector.safetensors"
        save_file({"a": torch.zeros(1)}, path, metadata={"architecture": "FaceDetector", **size})
        with pytest.raises(ModelError, match="expected JSON like"):
            load_face_detector(path)
