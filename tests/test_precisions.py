"""Precision of each component, casts inside a graph, and the float32 twin of bfloat16 graphs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from closeup.errors import ExportError
from closeup.lora import balanced_rows
from closeup.manifest import LoraLayer, LoraLayout
from export.casts import CastReport, check_casts
from export.float_twin import write_float_twin
from export.precisions import (
    COMPONENTS,
    Precision,
    Target,
    parse_component_precisions,
    resolve_precision,
)
from export.tidy import tidy_model

FP32, FP16, BF16 = Precision.FP32, Precision.FP16, Precision.BF16
FLOAT, LOW = TensorProto.FLOAT, TensorProto.BFLOAT16


def resolved(target: Target, precision: Precision, **chosen: Precision) -> dict[str, str]:
    return {
        name: resolve_precision(
            name,
            target=target,
            precision=precision,
            chosen=chosen,
            is_t5=name == "text_encoder_2",
        ).value
        for name in COMPONENTS
    }


def test_graphs_keep_vae_and_upscaler_in_float32() -> None:
    assert resolved(Target.ONNX, FP16) == {
        "denoiser": "fp16", "text_encoder": "fp16", "text_encoder_2": "fp16",
        "vae_encoder": "fp32", "vae_decoder": "fp32", "upscaler": "fp32", "face_detector": "fp32",
    }  # fmt: skip


@pytest.mark.parametrize("target", [Target.TENSORRT, Target.RTX])
def test_plans_have_vae_and_t5_in_bfloat16_when_the_rest_is_float16(target: Target) -> None:
    assert resolved(target, FP16) == {
        "denoiser": "fp16", "text_encoder": "fp16", "text_encoder_2": "bf16",
        "vae_encoder": "bf16", "vae_decoder": "bf16", "upscaler": "fp16", "face_detector": "fp32",
    }  # fmt: skip
    assert set(resolved(target, FP32).values()) == {"fp32"}
    chosen = resolved(target, BF16, vae_decoder=FP32, text_encoder=FP16)
    assert (chosen["vae_decoder"], chosen["vae_encoder"]) == ("fp32", "bf16")
    assert (chosen["text_encoder"], chosen["denoiser"]) == ("fp16", "bf16")


def test_component_precisions_are_read_from_the_command_line() -> None:
    assert parse_component_precisions(["vae=bf16", "upscaler=fp16"]) == {
        "vae_encoder": BF16, "vae_decoder": BF16, "upscaler": FP16,
    }  # fmt: skip


@pytest.mark.parametrize("entry", ["vae", "unet=fp16", "vae=fp8", "=fp16", "denoiser="])
def test_component_precisions_refuse_what_is_none(entry: str) -> None:
    with pytest.raises(ExportError, match=r"--component-precision"):
        parse_component_precisions([entry])


@pytest.mark.parametrize(
    ("component", "choice", "expected"),
    [
        ("vae_decoder", FP16, "black pictures; expected vae_decoder=bf16 or vae_decoder=fp32"),
        ("text_encoder_2", FP16, "expected text_encoder_2=bf16"),
        ("face_detector", BF16, "expected face_detector=fp32"),
    ],
)
def test_precisions_that_break_pictures_are_refused(
    component: str, choice: Precision, expected: str
) -> None:
    with pytest.raises(ExportError, match=expected):
        resolve_precision(
            component, target=Target.RTX, precision=FP16, chosen={component: choice}, is_t5=True
        )


def test_graphs_in_bfloat16_are_refused_where_onnx_runtime_must_run_them() -> None:
    with pytest.raises(ExportError, match="bf16 is for TensorRT plans only"):
        resolve_precision("denoiser", target=Target.ONNX, precision=BF16, chosen={})


def save(
    path: Path,
    nodes: Sequence[Any],
    *,
    weights: dict[str, Any] | None = None,
    out_type: int = FLOAT,
) -> Path:
    """Write a graph from x (2, 4) float32 to y."""
    graph = helper.make_graph(
        list(nodes),
        "g",
        [helper.make_tensor_value_info("x", FLOAT, [2, 4])],
        [helper.make_tensor_value_info("y", out_type, None)],
        [numpy_helper.from_array(value, name) for name, value in (weights or {}).items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, path)
    return path


def cast(source: str, result: str, to: int) -> Any:
    return helper.make_node("Cast", [source], [result], name=result, to=to)


def node(kind: str, *names: str, **attributes: Any) -> Any:
    *given, result = names
    return helper.make_node(kind, given, [result], name=result, **attributes)


WEIGHT = np.eye(4, dtype=np.float32).astype(ml_dtypes.bfloat16)
INSIDE = (cast("x", "low", LOW), node("MatMul", "low", "w", "a"))


def test_check_casts_counts_those_around_the_network(tmp_path: Path) -> None:
    path = save(tmp_path / "g.onnx", [*INSIDE, cast("a", "y", FLOAT)], weights={"w": WEIGHT})
    report = check_casts(path, "bf16")
    assert report == CastReport(precision="bf16", narrowing=1, widening=1)
    assert report.describe() == "casts: 1 to bf16, 1 back, none inside the network"
    assert check_casts(path, "fp32").describe() == "no casts"


def test_check_casts_lists_stretches_of_float32_that_compute_something(tmp_path: Path) -> None:
    norm = [
        cast("a", "wide", FLOAT), node("Mul", "wide", "wide", "square"),
        node("Add", "square", "wide", "sum"), cast("sum", "b", LOW),
        node("MatMul", "b", "w", "c"), cast("c", "y", FLOAT),
    ]  # fmt: skip
    report = check_casts(save(tmp_path / "g.onnx", [*INSIDE, *norm], weights={"w": WEIGHT}), "bf16")
    assert (report.narrowing, report.widening) == (2, 2)
    assert report.stretches == (("square", 2),)
    assert "1 stretches of float32 inside (at most 2 operations)" in report.describe()


def test_check_casts_refuses_a_product_in_float32(tmp_path: Path) -> None:
    nodes = [
        *INSIDE, cast("a", "wide", FLOAT), node("MatMul", "wide", "v", "product"),
        cast("product", "b", LOW), node("MatMul", "b", "w", "c"), cast("c", "y", FLOAT),
    ]  # fmt: skip
    weights = {"w": WEIGHT, "v": np.eye(4, dtype=np.float32)}
    path = save(tmp_path / "g.onnx", nodes, weights=weights)
    with pytest.raises(ExportError, match="MatMul product runs in float32 in a network of bf16"):
        check_casts(path, "bf16")


@pytest.mark.parametrize("there", [FLOAT, LOW])
def test_check_casts_refuses_casts_there_and_back(tmp_path: Path, there: int) -> None:
    back = LOW if there == FLOAT else FLOAT
    order = np.array([4, 2], np.int64)
    if there == FLOAT:  # from inside the network
        nodes = [*INSIDE, cast("a", "b", there), node("Reshape", "b", "order", "c"),
                 cast("c", "d", back), cast("d", "y", FLOAT)]  # fmt: skip
    else:  # from before it: rounded for nothing
        nodes = [*INSIDE, node("Reshape", "low", "order", "c"), cast("c", "d", back),
                 cast("a", "e", FLOAT), node("Add", "d", "z", "y")]  # fmt: skip
    weights = {"w": WEIGHT, "order": order, "z": np.zeros((4, 2), np.float32)}
    path = save(tmp_path / "g.onnx", nodes, weights=weights)
    with pytest.raises(ExportError, match="with nothing computed in between"):
        check_casts(path, "bf16")


def run(path: Path, x: Any) -> Any:
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def test_tidy_model_drops_casts_that_are_undone_and_changes_no_value(tmp_path: Path) -> None:
    half = TensorProto.FLOAT16
    nodes = [
        cast("x", "low", half), node("Softmax", "low", "a"), cast("a", "wide", FLOAT),
        cast("wide", "b", half), node("Mul", "b", "b", "c"), cast("c", "y", FLOAT),
    ]  # fmt: skip
    path = save(tmp_path / "g.onnx", nodes)
    x = np.random.default_rng(0).normal(size=(2, 4)).astype(np.float32)
    before = run(path, x)
    model = onnx.load(path)
    tidy_model(model)
    onnx.save(model, path)
    assert [n.op_type for n in model.graph.node] == ["Cast", "Softmax", "Mul", "Cast"]
    np.testing.assert_array_equal(run(path, x), before)
    assert check_casts(path, "fp16").widening == 1


def test_tidy_model_keeps_casts_with_float32_arithmetic_in_between(tmp_path: Path) -> None:
    nodes = [
        cast("x", "low", LOW), cast("low", "wide", FLOAT), node("Softmax", "wide", "a"),
        cast("a", "b", LOW), cast("b", "y", FLOAT),
    ]  # fmt: skip
    model = onnx.load(save(tmp_path / "g.onnx", nodes))
    tidy_model(model)
    assert len(model.graph.node) == 5


def test_tidy_model_drops_pads_value_only_where_it_is_zero(tmp_path: Path) -> None:
    for value, inputs in ((0.0, 2), (1.0, 3)):
        constant = helper.make_node(
            "Constant", [], ["v"], value=numpy_helper.from_array(np.array(value, np.float32))
        )
        nodes = [constant, node("Pad", "x", "p", "v", "y")]
        path = save(tmp_path / "g.onnx", nodes, weights={"p": np.array([0, 1, 0, 1])})
        expected = run(path, np.ones((2, 4), np.float32))
        model = onnx.load(path)
        tidy_model(model)
        onnx.save(model, path)
        assert len(model.graph.node[-1].input) == inputs
        np.testing.assert_array_equal(run(path, np.ones((2, 4), np.float32)), expected)
        assert expected[0, 0] == value


def test_float_twin_widens_weights_constants_and_casts(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    weight = rng.normal(size=(4, 4)).astype(ml_dtypes.bfloat16)
    scale = helper.make_node(
        "Constant", [], ["s"], value=numpy_helper.from_array(np.array(1.703125, ml_dtypes.bfloat16))
    )
    nodes = [
        scale, cast("x", "low", LOW), node("MatMul", "low", "w", "a"), node("Mul", "a", "s", "b"),
        node("Identity", "b", "y"),
    ]  # fmt: skip
    path = save(tmp_path / "model.onnx", nodes, weights={"w": weight}, out_type=LOW)
    twin = write_float_twin(path)
    assert twin.parent == path.parent
    x = rng.normal(size=(2, 4)).astype(np.float32)
    exact = (x.astype(np.float64) @ weight.astype(np.float64)) * 1.703125
    # Float32's rounding; rounding x to bfloat16 would be off by 4e-3.
    np.testing.assert_allclose(run(twin, x), exact, rtol=1e-5)
    rounded = x.astype(ml_dtypes.bfloat16).astype(np.float64) @ weight.astype(np.float64) * 1.703125
    assert np.abs(rounded - exact).max() > 1e-3
    assert onnx.load(path).graph.node[1].attribute[0].i == LOW  # the graph itself is as it was


def test_balanced_rows_fit_a_bank_of_bfloat16() -> None:
    layout = LoraLayout(max_rank=2, layers=(LoraLayer(name="a", in_features=3, out_features=4),))
    rows = np.random.default_rng(2).normal(size=(7, 2)).astype(np.float32)
    rows[3:] *= 1e-9
    found = balanced_rows(rows, layout, ml_dtypes.bfloat16).astype(np.float32)
    product, expected = found[3:] @ found[:3].T, rows[3:] @ rows[:3].T
    # Two roundings to eight bits: 2 * 2**-9 of each term.
    np.testing.assert_allclose(product, expected, atol=8e-3 * np.abs(expected).max())
    assert np.abs(product).max() > 0
