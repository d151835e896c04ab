"""A whole served pipeline in numpy, for tests of the graph: no weights, no ONNX, any fault.

The denoiser is the real one (tickets, batches, LoRA bank) around `numpy_engine`; the other models
are a few lines each. The face detector answers in YuNet's layout with the faces it is told.
"""

from __future__ import annotations

import asyncio
import io
import json
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import tokenizers
from PIL import Image

from closeup.denoiser import Denoiser
from closeup.detection import STRIDES, Face
from closeup.engines import TensorSpec
from closeup.graph import Outcome
from closeup.local import LocalModels
from closeup.manifest import (
    INDEX_NAME,
    MANIFEST_NAME,
    Component,
    FaceDetectorManifest,
    TextEncoder,
    Tokenizer,
    UpscalerManifest,
    manifest_json,
)
from closeup.run import Array, Progress, Run
from closeup.settings import Settings
from tests.manifests import make_manifest
from tests.numpy_engine import run_numpy_engine

Pixels = npt.NDArray[np.uint8]
Outputs = dict[str, Array]

NATIVE_PX, SR_SCALE, CONTEXT, WORDS = 64, 4, 8, 64
SCALING = 0.18215
COMPONENT = Component(
    model="toy", sha256="0", bytes=0, precision="fp32", max_abs_error=0.0, max_rel_error=0.0,
    checks=(),
)  # fmt: skip


def write_toy_repository(folder: Path) -> Path:
    """Write the manifests and the tokenizer of the pipeline ``toy`` and of what it shares."""
    manifest = make_manifest(
        native_px=NATIVE_PX,
        max_batch=8,
        face_prompt_suffix=" word5 word6 word7",
        encoders=(
            TextEncoder(
                name="text_encoder",
                tokenizer=Tokenizer(
                    path="tokenizer.json",
                    max_tokens=77,
                    bos_token_id=1,
                    eos_token_id=2,
                    pad_token_id=2,
                ),
            ),
        ),
    )
    upscaler = UpscalerManifest(
        scale=SR_SCALE, tile_px=96, overlap_px=16, max_batch=4, component=COMPONENT
    )
    for name, entry in (
        ("toy_denoiser", manifest),
        ("upscaler", upscaler),
        ("face_detector", FaceDetectorManifest(component=COMPONENT)),
    ):
        (folder / name).mkdir(parents=True)
        (folder / name / MANIFEST_NAME).write_text(manifest_json(entry), encoding="utf-8")
    words = {"[UNK]": 0, "[BOS]": 1, "[EOS]": 2} | {f"word{i}": i for i in range(3, WORDS)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "toy_denoiser" / "tokenizer.json"))
    (folder / INDEX_NAME).write_text(json.dumps({"models": ["toy"]}), encoding="utf-8")
    return folder


class NumpyEngine:
    """`numpy_engine` as an `Engine`; each call takes a moment, so that sequences gather."""

    inputs = (
        TensorSpec(name="context", dtype=np.dtype("f4"), shape=("R", "L", CONTEXT)),
        TensorSpec(name="lora", dtype=np.dtype("f4"), shape=("S", "M", "r")),
    )
    outputs: tuple[TensorSpec, ...] = ()

    def __init__(self, call_s: float) -> None:
        self._call_s = call_s

    def run(self, feeds: Mapping[str, Array]) -> Outputs:
        """Run one step."""
        time.sleep(self._call_s)
        return run_numpy_engine(feeds)

    def close(self) -> None:
        """Nothing to free."""


class ToyModels(LocalModels):
    """`LocalModels` whose models are numpy functions.

    Args:
        folder: from `write_toy_repository`.
        faces: what the detector finds in every picture, px of the generated picture.
        call_s: seconds a denoiser call takes.
        settings: as a server would have them; segments of four steps by default.

    Attributes:
        calls: the models called, in order, as (name, operation or "").
        faults: model name -> a function that changes its outputs, or raises.
    """

    def __init__(
        self,
        folder: Path,
        *,
        faces: Sequence[Face] = (),
        call_s: float = 0.003,
        settings: Settings | None = None,
    ) -> None:
        super().__init__(folder, settings or Settings(segment_steps=4))
        self.faces = list(faces)
        self.calls: list[tuple[str, str]] = []
        self.faults: dict[str, Callable[[Mapping[str, Array], Outputs], Outputs]] = {}
        self._call_s = call_s
        self._opening = threading.Lock()
        self._models: Mapping[str, Callable[[Mapping[str, Array]], Outputs]] = {
            "toy_text_encoder": encode_text,
            "toy_vae_encoder": encode_picture,
            "toy_vae_decoder": decode_latents,
            "upscaler": upscale,
            "face_detector": self._detect,
        }

    def denoiser(self, name: str = "toy_denoiser") -> Denoiser:
        """Return the real denoiser around the numpy engine."""
        engine = NumpyEngine(self._call_s)
        with self._opening, mock.patch("closeup.denoiser.open_engine", return_value=engine):
            return super().denoiser(name)

    async def infer(
        self, name: str, inputs: Mapping[str, Array], outputs: Sequence[str]
    ) -> Outputs:
        """Run a model; see `closeup.run.Models`."""
        operation = inputs["operation"][0].decode() if "operation" in inputs else ""
        self.calls.append((name, operation))
        if name == "toy_denoiser":
            answer = await asyncio.wrap_future(self.denoiser().start(inputs))
        else:
            await asyncio.sleep(0)
            answer = self._models[name](inputs)
        if name in self.faults:
            answer = self.faults[name](inputs, answer)
        return {output: answer[output] for output in outputs if output in answer}

    def paint(self, **fields: Any) -> tuple[Run, Outcome, list[Progress]]:
        """Run a request; return what it left behind."""
        events: list[Progress] = []
        run = self.start(self.resolve(**{"seed": 7, **fields}), report=events.append)
        return run, asyncio.run(self.run(run)), events

    def count(self, name: str, operation: str = "") -> int:
        """Return how often a model was called."""
        return self.calls.count((name, operation))

    def _detect(self, inputs: Mapping[str, Array]) -> Outputs:
        height, width = inputs["input"].shape[2:]
        # The second look, a quarter as large, finds nothing.
        return yunet_outputs(self.faces if max(height, width) >= 512 else [], height, width)


def encode_text(inputs: Mapping[str, Array]) -> Outputs:
    """One random vector a token."""
    table = np.random.default_rng(0).standard_normal((WORDS, 1, CONTEXT)) + np.zeros((1, 1, 1))
    states = table[inputs["input_ids"], 0] * 2
    return {"context": states.astype(np.float32)}


def encode_picture(inputs: Mapping[str, Array]) -> Outputs:
    """Averages over 8x8 pixels; hardly any variance."""
    image = inputs["image"]
    n, _, height, width = image.shape
    if height % 8 or width % 8:
        raise AssertionError(f"a VAE cannot encode {width}x{height}")
    pooled = image.reshape(n, 3, height // 8, 8, width // 8, 8).mean((3, 5))
    colours = np.arctanh(pooled * 0.99) / SCALING
    mean = np.concatenate([colours, colours.mean(1, keepdims=True)], 1)
    return {"moments": np.concatenate([mean, np.full_like(mean, -20)], 1).astype(np.float32)}


def decode_latents(inputs: Mapping[str, Array]) -> Outputs:
    """The inverse of `encode_picture`, on latents in the denoiser's scale."""
    picture = np.tanh(inputs["latents"][:, :3])
    return {"image": picture.repeat(8, 2).repeat(8, 3).astype(np.float32)}


def upscale(inputs: Mapping[str, Array]) -> Outputs:
    """Nearest neighbour."""
    return {"upscaled": inputs["image"].repeat(SR_SCALE, 2).repeat(SR_SCALE, 3)}


def yunet_outputs(faces: Sequence[Face], height: int, width: int) -> Outputs:
    """Return YuNet's twelve outputs for square pictures of which 512 px are looked at.

    Args:
        faces: px of a picture of 128 px a side.
        height: of the detector's input, px.
        width: of the detector's input, px.
    """
    outputs = {
        f"{kind}_{s}": np.zeros((1, (height // s) * (width // s), n), np.float32)
        for s in STRIDES
        for kind, n in (("cls", 1), ("obj", 1), ("bbox", 4), ("kps", 10))
    }
    scale = width / 128
    for face in faces:
        x, y = (value * scale for value in face.center)
        points = np.array(face.landmarks) * scale
        for s in STRIDES:  # the first stride with a free cell
            cell = np.array((min(x, width - 1) // s, min(y, height - 1) // s))
            place = int(cell[1] * (width // s) + cell[0])
            if outputs[f"cls_{s}"][0, place]:
                continue
            outputs[f"cls_{s}"][0, place] = face.score
            outputs[f"obj_{s}"][0, place] = face.score
            outputs[f"bbox_{s}"][0, place] = (
                x / s - cell[0], y / s - cell[1],
                math.log(face.width * scale / s), math.log(face.height * scale / s),
            )  # fmt: skip
            outputs[f"kps_{s}"][0, place] = (points / s - cell).reshape(-1)
            break
    return outputs


def waves(height: int, width: int) -> Pixels:
    """Return a smooth picture with detail in every channel."""
    rows, columns = np.mgrid[0:height, 0:width]
    planes = [128 + 100 * np.sin(rows / a + columns / b) for a, b in ((9, 17), (23, 7), (13, 31))]
    pixels: Pixels = np.stack(planes, -1).astype(np.uint8)
    return pixels


def png(pixels: Pixels) -> bytes:
    """Return a PNG file."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()
