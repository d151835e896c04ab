"""The denoiser's operations over toy engines: prompts, extras, LoRAs of two networks, threads."""

from __future__ import annotations

import importlib
import json
import sys
import threading
import types
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

import closeup.denoiser
import closeup.lora_encoders
import closeup.lora_store
from closeup.denoiser import Denoiser
from closeup.denoiser_metrics import METRICS, metric_values
from closeup.engines import EngineOptions, TensorSpec, check_feeds
from closeup.errors import FeedError, ModelError, RequestError, UnavailableError
from closeup.lora_encoders import LoraEncoders
from closeup.lora_read import read_lora
from closeup.manifest import (
    EngineLimits,
    LoraLayer,
    LoraLayout,
    ModelManifest,
    TextEncoder,
    Tokenizer,
    manifest_json,
)
from closeup.settings import Settings
from tests.lora_writers import STYLES, random_factors, tensors_from_factors, text_style, write_lora
from tests.manifests import make_manifest
from tests.numpy_engine import run_numpy_engine

Answer = dict[str, Any]
TOKENS, WIDTH, POOLED = 5, 3, 6
UNET = LoraLayout(
    max_rank=8, layers=(LoraLayer(name="mid_block.a.to_q", in_features=4, out_features=6),)
)
TEXT = LoraLayout(
    max_rank=8,
    layers=(
        LoraLayer(
            name="text_model.encoder.layers.0.self_attn.q_proj", in_features=5, out_features=7
        ),
    ),
)
TOKENIZER = Tokenizer(
    path="tokenizer.json", max_tokens=TOKENS, bos_token_id=0, eos_token_id=1, pad_token_id=1
)
ENCODER = TextEncoder(
    name="text_encoder", tokenizer=TOKENIZER, outputs=("context", "pooled"), lora=TEXT
)
EXTRA_SPECS: Mapping[str, tuple[int | str, ...]] = {
    "pooled": ("rows", POOLED), "time_ids": ("rows", 6), "guidance_embed": ("rows",),
}  # fmt: skip


def _spec(name: str, *shape: int | str, dtype: Any = np.float32) -> TensorSpec:
    return TensorSpec(name=name, dtype=np.dtype(dtype), shape=shape)


class ToyDenoiser:
    """The engine in numpy; what it was fed is kept, and its extras show in the result."""

    def __init__(self, extras: tuple[str, ...], with_lora: bool) -> None:
        self.extras = extras
        self.fed: list[Mapping[str, Any]] = []
        self.inputs = (
            _spec("context", "rows", "tokens", WIDTH),
            *(_spec(name, *EXTRA_SPECS[name]) for name in extras),
        )
        if with_lora:
            self.inputs += (_spec("lora", "adapters", UNET.rows, "rank"),)
        self.outputs = ()

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        self.fed.append(feeds)
        check_feeds("toy", self.inputs, {spec.name: feeds[spec.name] for spec in self.inputs})
        outputs = run_numpy_engine({"lora": np.zeros((1, 1, 1), "f4"),
                                    "lora_row": np.zeros(len(feeds["rows"]), "i8"),
                                    **feeds})  # fmt: skip
        for name in self.extras:
            assert len(feeds[name]) == len(feeds["rows"])
        return outputs

    def close(self) -> None:
        pass


class ToyEncoder:
    """context[n, l, :] is the token's id plus the adapter's sum; `opened` holds it back."""

    def __init__(self) -> None:
        self.inputs = (
            _spec("input_ids", "batch", "tokens", dtype=np.int64),
            _spec("lora", "adapters", TEXT.rows, "rank"),
            _spec("lora_row", "batch", dtype=np.int64),
        )
        self.outputs = (_spec("context", "batch", "tokens", WIDTH),)
        self.reached, self.opened = threading.Event(), threading.Event()
        self.opened.set()

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        check_feeds("toy", self.inputs, feeds)
        self.reached.set()
        assert self.opened.wait(20)
        ids = feeds["input_ids"].astype(np.float32)
        sums = feeds["lora"][feeds["lora_row"]].sum((1, 2))
        context = np.repeat((ids + sums[:, None])[:, :, None], WIDTH, 2)
        return {"context": context, "pooled": context[:, 0, :1].repeat(POOLED, 1)}

    def close(self) -> None:
        pass


@pytest.fixture
def toy_encoder() -> ToyEncoder:
    return ToyEncoder()


@pytest.fixture
def loras(tmp_path: Path) -> Path:
    """Files: "both" adapts the denoiser and the text encoder, "unet" and "text" one of them."""
    folder = tmp_path / "loras"
    folder.mkdir()
    unet = tensors_from_factors(random_factors(UNET.layers, seed=1), STYLES["kohya"])
    text = tensors_from_factors(
        random_factors(TEXT.layers, seed=2), text_style("kohya", "text_encoder")
    )
    for name, tensors in {"both": unet | text, "unet": unet, "text": text}.items():
        write_lora(folder / f"{name}.safetensors", tensors)
    return folder


Open = Callable[..., Denoiser]


@pytest.fixture
def open_denoiser(
    tmp_path: Path, loras: Path, toy_encoder: ToyEncoder, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Open]:
    """Opens a denoiser of a manifest over toy engines."""
    opened: list[Denoiser] = []

    def open_one(manifest: ModelManifest, **settings: Any) -> Denoiser:
        (tmp_path / "manifest.json").write_text(manifest_json(manifest))
        extras = tuple(
            name for name in manifest.facts.row_extras
            if name != "guidance_embed" or manifest.guidance_embeds
        )  # fmt: skip
        engine = ToyDenoiser(extras, manifest.lora is not None)
        monkeypatch.setattr(closeup.denoiser, "open_engine", lambda path, options: engine)
        monkeypatch.setattr(closeup.lora_encoders, "open_engine", lambda path, options: toy_encoder)
        denoiser = Denoiser(tmp_path, settings=Settings(lora_dir=loras, **settings))
        opened.append(denoiser)
        return denoiser

    yield open_one
    toy_encoder.opened.set()
    for denoiser in opened:
        denoiser.close()


def _manifest(**changes: Any) -> ModelManifest:
    small = make_manifest(native_px=64, encoders=(ENCODER,), lora=UNET)
    return replace(small, **changes)


def _fed(denoiser: Denoiser) -> Mapping[str, Any]:
    """What the engine was last fed."""
    feeds: Mapping[str, Any] = denoiser._engine.fed[-1]  # type: ignore[attr-defined]
    return feeds


def _start(denoiser: Denoiser, operation: str, **inputs: Any) -> Future[Answer]:
    tensors = {name: np.array([value.encode()], np.object_) if isinstance(value, str) else value
               for name, value in inputs.items()}  # fmt: skip
    return denoiser.start({"operation": np.array([operation.encode()], np.object_), **tensors})


def _acquire(denoiser: Denoiser, *ids: str) -> Any:
    loras = json.dumps([[name, 1.0] for name in ids])
    answer = _start(denoiser, "acquire", slots=np.array([1]), loras=loras).result(20)
    return answer["ticket"]


def _segment(rows: int = 2, steps: int = 2, **more: Any) -> dict[str, Any]:
    return {
        "sample": np.ones((4, 8, 8), np.float32),
        "context": np.ones((rows, TOKENS, WIDTH), np.float32),
        "guidance": np.array([2.0], np.float32),
        "timestep": np.full(steps, 500, np.float32),
        "input_scale": np.ones(steps, np.float32),
        "step": np.tile(np.eye(3, 5, dtype=np.float32), (steps, 1, 1)),
        **more,
    }


@pytest.mark.parametrize(
    ("family", "guidance_embeds", "rows", "extras"),
    [
        ("sd15", False, 2, {}),
        ("sdxl", False, 2, {"pooled": (2, POOLED), "time_ids": (2, 6)}),
        ("flux", True, 1, {"pooled": (1, POOLED), "guidance_embed": (1,)}),
        ("flux", False, 1, {"pooled": (1, POOLED)}),
    ],
)
def test_denoiser_warms_up_with_the_inputs_of_its_family_when_it_opens(
    family: str, guidance_embeds: bool, rows: int, extras: dict[str, Any], open_denoiser: Open
) -> None:
    pooled_only = replace(ENCODER, name="text_encoder", outputs=("pooled",))
    long = TextEncoder(name="text_encoder_2", tokenizer=replace(TOKENIZER, max_tokens=11))
    denoiser = open_denoiser(
        _manifest(family=family, guidance_embeds=guidance_embeds, encoders=(pooled_only, long))
    )
    fed = _fed(denoiser)
    assert fed["context"].shape == (rows, 11, WIDTH)
    assert fed["sample"].shape == (1, denoiser.manifest.facts.latent_channels, 8, 8)
    assert {name: fed[name].shape for name in EXTRA_SPECS if name in fed} == extras


def test_denoiser_says_what_to_do_when_the_graph_lacks_an_extra(
    open_denoiser: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(EXTRA_SPECS, "pooled", ("rows", "width"))
    with pytest.raises(ModelError, match="no input pooled of known width: export the model again"):
        open_denoiser(_manifest(family="sdxl"))


def test_segment_brings_its_extras_to_the_engine(open_denoiser: Open) -> None:
    denoiser = open_denoiser(_manifest(family="sdxl"))
    ticket = _acquire(denoiser)
    pooled = np.arange(2 * POOLED, dtype=np.float32).reshape(2, POOLED)
    time_ids = np.full((2, 6), 64, np.float32)
    segment = _segment(pooled=pooled, time_ids=time_ids)
    _start(denoiser, "segment", ticket=ticket, **segment).result(20)
    np.testing.assert_array_equal(_fed(denoiser)["pooled"], pooled)
    np.testing.assert_array_equal(_fed(denoiser)["time_ids"], time_ids)
    with pytest.raises(ModelError, match="lacks time_ids, which toy needs"):
        _start(denoiser, "segment", ticket=ticket, **_segment(pooled=pooled))
    with pytest.raises(ModelError, match="pooled has 1 rows, context has 2"):
        _start(denoiser, "segment", ticket=ticket, **{**segment, "pooled": pooled[:1]})


def _ids(*rows: int) -> Any:
    return np.repeat(np.array(rows, np.int64)[:, None], TOKENS, 1)


def _text_sum() -> float:
    item = random_factors(TEXT.layers, seed=2)[TEXT.layers[0].name]
    return float(item.down.sum() + item.up.sum())


@pytest.mark.parametrize(
    ("operation", "inputs", "missing"),
    [
        ("acquire", {"loras": "[]"}, "slots"),
        ("acquire", {"loras": "[]", "slots": np.zeros(0, "i8")}, "slots"),
        ("release", {}, "ticket"),
        ("encode", {"ticket": np.array([1])}, "encoder"),
        ("segment", {"ticket": np.array([1])}, "sample"),
    ],
)
def test_operation_names_the_input_that_it_lacks(
    operation: str, inputs: dict[str, Any], missing: str, open_denoiser: Open
) -> None:
    with pytest.raises(FeedError, match=f"{operation} needs the input {missing}"):
        _start(open_denoiser(_manifest()), operation, **inputs)


def test_encode_uses_each_tickets_lora_when_several_are_held(open_denoiser: Open) -> None:
    denoiser = open_denoiser(_manifest())
    wanted = {"none": (), "unet": ("unet",), "both": ("both",), "text": ("text",)}
    tickets = {name: _acquire(denoiser, *ids) for name, ids in wanted.items()}
    added = _text_sum()
    assert abs(added) > 0.01
    for name, expected in {"none": 0.0, "unet": 0.0, "both": added, "text": added}.items():
        answer = _start(
            denoiser, "encode", ticket=tickets[name], encoder="text_encoder", input_ids=_ids(7, 9)
        ).result(20)
        assert answer["encoded_context"].shape == (2, TOKENS, WIDTH)
        assert answer["encoded_pooled"].shape == (2, POOLED)
        # Sums of 48 float32 values of 0.1, in another order: 1e-6; a missing LoRA is off by more
        # than 1e-2 (above), the other prompt by 2.
        np.testing.assert_allclose(answer["encoded_context"][:, 0, 0], [7 + expected, 9 + expected],
                                   rtol=0, atol=1e-5)  # fmt: skip
    for name, changed in {"none": False, "unet": True, "both": True, "text": False}.items():
        _start(denoiser, "segment", ticket=tickets[name], **_segment()).result(20)
        assert (_fed(denoiser)["lora_row"] > 0).all() == changed, name
        assert _fed(denoiser)["lora"].any() == changed


@pytest.mark.parametrize("ids", [(), ("both",)])
def test_acquire_encodes_on_the_same_way_when_token_ids_come_with_it(
    ids: tuple[str, ...], open_denoiser: Open
) -> None:
    denoiser = open_denoiser(_manifest())
    answer = _acquire_and_encode(denoiser, *ids).result(20)
    apart = _start(denoiser, "encode", ticket=answer["ticket"], encoder="text_encoder",
                   input_ids=_ids(7, 9)).result(20)  # fmt: skip
    for name in ("encoded_context", "encoded_pooled"):
        np.testing.assert_array_equal(answer[name], apart[name])
    expected = 7 + (_text_sum() if ids else 0.0)
    assert abs(answer["encoded_context"][0, 0, 0] - expected) < 1e-5  # as above
    assert denoiser.slots_in_use == 1
    _start(denoiser, "release", ticket=answer["ticket"]).result(20)
    assert denoiser.slots_in_use == 0


@pytest.mark.parametrize("ids", [(), ("both",)])
def test_acquire_holds_nothing_when_its_prompts_cannot_be_encoded(
    ids: tuple[str, ...], open_denoiser: Open
) -> None:
    denoiser = open_denoiser(_manifest())
    with pytest.raises(ModelError, match="no text encoder 'other'"):
        _acquire_and_encode(denoiser, *ids, encoder="other").result(20)
    assert denoiser.slots_in_use == 0
    counters = denoiser.lora_counters()
    assert counters is not None
    assert counters.bank.in_use == 0


def test_acquire_encodes_nothing_when_there_is_no_slot(
    open_denoiser: Open, toy_encoder: ToyEncoder
) -> None:
    denoiser = open_denoiser(_manifest(), slots=1)
    _acquire(denoiser)
    toy_encoder.reached.clear()
    with pytest.raises(UnavailableError, match="1 of 1 slots are taken"):
        _acquire_and_encode(denoiser).result(20)
    assert not toy_encoder.reached.is_set()


def _acquire_and_encode(
    denoiser: Denoiser, *ids: str, encoder: str = "text_encoder"
) -> Future[Answer]:
    loras = json.dumps([[name, 1.0] for name in ids])
    return _start(denoiser, "acquire", slots=np.array([1]), loras=loras, encoder=encoder,
                  input_ids=_ids(7, 9))  # fmt: skip


def test_one_reading_of_a_file_serves_both_networks(open_denoiser: Open) -> None:
    denoiser = open_denoiser(_manifest(), lora_cache_bytes=0)
    _acquire(denoiser, "both")
    counters = denoiser.lora_counters()
    assert counters is not None
    assert (counters.store.misses, counters.bank.resident, counters.bank.in_use) == (1, 1, 1)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"encoder": "text_encoder_2", "input_ids": _ids(1)}, "no text encoder 'text_encoder_2'"),
        ({"encoder": "text_encoder", "input_ids": np.zeros(5, "i8")}, "has the shape \\(5,\\)"),
        ({"encoder": "text_encoder", "input_ids": np.zeros((0, 5), "i8")}, "\\(0, 5\\)"),
        ({"encoder": "text_encoder", "input_ids": _ids(1), "ticket": np.array([99])}, "ticket 99"),
    ],
)
def test_encode_is_refused_when_it_makes_no_sense(
    inputs: dict[str, Any], words: str, open_denoiser: Open
) -> None:
    denoiser = open_denoiser(_manifest())
    with pytest.raises(ModelError, match=words):
        _start(denoiser, "encode", **{"ticket": _acquire(denoiser), **inputs})


def test_encode_is_refused_when_nothing_takes_loras(open_denoiser: Open) -> None:
    denoiser = open_denoiser(_manifest(lora=None, encoders=(replace(ENCODER, lora=None),)))
    ticket = _acquire(denoiser)
    with pytest.raises(ModelError, match="toy has no LoRA inputs"):
        _start(denoiser, "encode", ticket=ticket, encoder="text_encoder", input_ids=_ids(1))
    with pytest.raises(ModelError, match="toy has no LoRA inputs"):
        _acquire(denoiser, "unet")
    assert denoiser.lora_counters() is None
    assert "closeup_lora_rows" not in metric_values(denoiser)


def test_loras_of_the_text_encoder_alone_work_when_the_denoiser_takes_none(
    open_denoiser: Open,
) -> None:
    denoiser = open_denoiser(_manifest(lora=None))
    ticket = _acquire(denoiser, "both")
    answer = _start(
        denoiser, "encode", ticket=ticket, encoder="text_encoder", input_ids=_ids(7)
    ).result(20)
    assert abs(answer["encoded_context"][0, 0, 0] - 7) > 0.01
    _start(denoiser, "segment", ticket=ticket, **_segment()).result(20)
    assert "lora" not in _fed(denoiser)
    with pytest.raises(RequestError, match="adapts only denoiser, which this model was exported"):
        _acquire(denoiser, "unet")


def test_steps_go_on_when_a_prompt_is_being_encoded(
    open_denoiser: Open, toy_encoder: ToyEncoder
) -> None:
    denoiser = open_denoiser(_manifest())
    ticket = _acquire(denoiser)
    toy_encoder.opened.clear()
    toy_encoder.reached.clear()
    encoding = _start(denoiser, "encode", ticket=ticket, encoder="text_encoder", input_ids=_ids(1))
    assert toy_encoder.reached.wait(20)
    _start(denoiser, "segment", ticket=ticket, **_segment()).result(20)
    assert _acquire(denoiser, "both") != ticket
    assert not encoding.done()
    toy_encoder.opened.set()
    assert encoding.result(20)["encoded_context"].any()


def test_steps_go_on_when_a_lora_is_being_read(
    open_denoiser: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached, opened = threading.Event(), threading.Event()

    def slow(path: Path, layouts: Any, *, name: str | None = None) -> Any:
        if name == "both":
            reached.set()
            assert opened.wait(20)
        return read_lora(path, layouts, name=name)

    monkeypatch.setattr(closeup.lora_store, "read_lora", slow)
    denoiser = open_denoiser(_manifest())
    running = _acquire(denoiser, "unet")
    waiting = _start(denoiser, "acquire", slots=np.array([1]), loras='[["both", 1.0]]')
    assert reached.wait(20)
    _start(denoiser, "segment", ticket=running, **_segment()).result(20)
    _start(denoiser, "encode", ticket=running, encoder="text_encoder", input_ids=_ids(1)).result(20)
    assert metric_values(denoiser)["closeup_lora_rows_in_use"] == 2  # counters answer meanwhile
    assert _start(denoiser, "loras").result(20)
    assert not waiting.done()
    opened.set()
    assert waiting.result(20)["ticket"] != running


def test_loras_lists_the_folder_with_what_is_known_of_each_file(
    open_denoiser: Open, loras: Path
) -> None:
    denoiser = open_denoiser(_manifest())
    _acquire(denoiser, "both")
    answer = _start(denoiser, "loras").result(20)
    listed = json.loads(answer["loras"][0])
    sizes = {path.stem: path.stat().st_size for path in loras.iterdir()}
    assert listed == [
        {"id": "both", "bytes": sizes["both"], "networks": ["denoiser", "text_encoder"]},
        {"id": "text", "bytes": sizes["text"], "networks": None},
        {"id": "unet", "bytes": sizes["unet"], "networks": None},
    ]


def test_metric_values_follow_the_loras_when_they_come_and_go(open_denoiser: Open) -> None:
    denoiser = open_denoiser(_manifest(), lora_rows=2)
    before = metric_values(denoiser)
    assert set(before) == {spec.name for spec in METRICS}
    assert before["closeup_lora_rows"] == 2
    assert before["closeup_engine_calls_total"] == 1  # the warm-up
    first, second = _acquire(denoiser, "both"), _acquire(denoiser, "both")
    _acquire(denoiser, "unet")
    _start(denoiser, "release", ticket=first).result(20)
    _start(denoiser, "release", ticket=second).result(20)
    after = metric_values(denoiser)
    changes = {name: after[name] - before[name] for name in after if after[name] != before[name]}
    sizes = changes.pop("closeup_lora_bytes")
    assert sizes == 4 * 4 * (2 * UNET.rows + TEXT.rows)  # float32, rank 4
    assert changes == {
        "closeup_slots_in_use": 1,
        "closeup_lora_misses_total": 2,
        "closeup_lora_files": 2,
        "closeup_lora_row_hits_total": 1,
        "closeup_lora_row_misses_total": 2,
        "closeup_lora_rows_resident": 2,
        "closeup_lora_rows_in_use": 1,
    }


def test_lora_bank_has_no_more_rows_than_the_plans_take(open_denoiser: Open) -> None:
    limits = EngineLimits(sizes=(), max_chunks=4, lora_rows=2)
    few = open_denoiser(_manifest(limits=limits), lora_rows=5)
    assert metric_values(few)["closeup_lora_rows"] == 2
    many = open_denoiser(_manifest(limits=replace(limits, lora_rows=9)), lora_rows=5)
    assert metric_values(many)["closeup_lora_rows"] == 5


class _Family:
    """Triton's metrics as far as the model uses them; every change is noted."""

    COUNTER, GAUGE = "counter", "gauge"
    values: ClassVar[dict[str, float]] = {}
    changes: ClassVar[list[str]] = []

    def __init__(self, *, name: str, description: str, kind: str) -> None:
        assert description
        assert (kind == self.COUNTER) == name.endswith("_total")
        self.name, self.kind = name, kind

    def Metric(self, *, labels: Mapping[str, str]) -> _Family:  # noqa: N802 - Triton's name
        assert labels == {"model": "toy_denoiser"}
        self.values[self.name] = 0.0
        return self

    def increment(self, amount: float) -> None:
        assert self.kind == self.COUNTER
        assert amount > 0
        self.changes.append(self.name)
        self.values[self.name] += amount

    def set(self, value: float) -> None:
        assert self.kind == self.GAUGE
        self.changes.append(self.name)
        self.values[self.name] = value


def test_triton_metrics_follow_the_values_when_some_change(
    open_denoiser: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = types.ModuleType("triton_python_backend_utils")
    backend.MetricFamily = _Family  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", backend)
    for name in ("closeup.triton_glue", "closeup.denoiser_model"):  # not kept with this backend
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        monkeypatch.delitem(sys.modules, name)
    model = importlib.import_module("closeup.denoiser_model")
    denoiser = open_denoiser(_manifest())
    metrics = model._Metrics("toy_denoiser", denoiser)
    assert _Family.values == metric_values(denoiser)
    _Family.changes.clear()
    metrics.publish()
    assert _Family.changes == []
    ticket = _acquire(denoiser, "both")
    metrics.publish()
    assert _Family.values == metric_values(denoiser)
    _start(denoiser, "release", ticket=ticket).result(20)
    _Family.changes.clear()
    metrics.publish()
    assert sorted(_Family.changes) == ["closeup_lora_rows_in_use", "closeup_slots_in_use"]
    assert _Family.values == metric_values(denoiser)


def test_every_engine_runs_on_the_gpu_of_the_instance(
    open_denoiser: Open, toy_encoder: ToyEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_denoiser(_manifest())  # writes the manifest
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "plain.onnx").touch()
    devices: list[int] = []

    def open_one(path: Path, options: EngineOptions) -> Any:
        devices.append(options.device_id)
        if path.stem == "text_encoder":
            return toy_encoder
        return ToyDenoiser((), with_lora=path.stem == "model")

    monkeypatch.setattr(closeup.denoiser, "open_engine", open_one)
    monkeypatch.setattr(closeup.lora_encoders, "open_engine", open_one)
    settings = Settings(lora_dir=tmp_path / "loras")
    Denoiser(tmp_path, settings=settings, device_id=3).close()
    assert devices == [3, 3, 3]  # with LoRAs, without, and the text encoder


def test_close_answers_prompts_that_still_wait(
    open_denoiser: Open, toy_encoder: ToyEncoder
) -> None:
    denoiser = open_denoiser(_manifest())
    ticket = _acquire(denoiser)
    toy_encoder.opened.clear()
    toy_encoder.reached.clear()
    inputs = {"ticket": ticket, "encoder": "text_encoder", "input_ids": _ids(1)}
    first = _start(denoiser, "encode", **inputs)
    assert toy_encoder.reached.wait(20)  # a prompt that has begun is finished
    waiting = _start(denoiser, "encode", **inputs)
    closing = threading.Thread(target=denoiser.close)
    closing.start()
    with pytest.raises(UnavailableError, match="shutting down"):
        waiting.result(20)
    toy_encoder.opened.set()
    closing.join(20)
    assert first.result(20)["encoded_context"].any()
    with pytest.raises(UnavailableError, match="shutting down"):
        _start(denoiser, "encode", **inputs)


def test_encoders_say_what_is_missing_when_a_graph_is(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no engine at .*text_encoder\.onnx"):
        LoraEncoders((ENCODER,), tmp_path)
