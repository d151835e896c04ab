"""What is measured: the demo model, and a random pipeline of Stable Diffusion 1.5's size."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demo.default_request import DEFAULT_REQUEST

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = ROOT / "demo" / "weights"
CACHE = ROOT / "out" / "bench"
PYTHON_MODELS = ("generate", "generate_stream")


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """One set of weights on both sides.

    Attributes:
        name: the request field ``model``.
        title: for tables.
        pipeline: folder in diffusers layout.
        upscaler: weights file.
        face_detector: weights file.
        repository: the exported models.
        fields: the request that is timed.
        warm_ups: requests before the timed ones.
        memory_requests: requests during which memory is watched.
        lora_rank: of the export; None leaves it to the exporter.
    """

    name: str
    title: str
    pipeline: Path
    upscaler: Path
    face_detector: Path
    repository: Path
    fields: dict[str, Any]
    warm_ups: int = 2
    memory_requests: int = 2
    lora_rank: int | None = None

    def export(self) -> None:
        """Write the repository; quick when nothing has changed.

        Raises:
            SystemExit: the export failed and said why.
        """
        add_python_models(self.repository)
        command = [
            sys.executable, "-m", "export",
            "--model", str(self.pipeline), "--name", self.name, "--target", "onnx",
            "--repository", str(self.repository),
            "--upscaler", str(self.upscaler), "--face-detector", str(self.face_detector),
        ]  # fmt: skip
        if self.lora_rank is not None:
            command += ["--lora-rank", str(self.lora_rank)]
        done = subprocess.run(command, cwd=ROOT, check=False)
        if done.returncode:
            raise SystemExit(done.returncode)


def add_python_models(repository: Path) -> None:
    """Copy the committed Python models, which run the whole graph, into a repository."""
    repository.mkdir(parents=True, exist_ok=True)
    for model in PYTHON_MODELS:
        target = repository / model
        source = ROOT / "model_repository" / model
        if target.resolve() != source:
            shutil.copytree(source, target, dirs_exist_ok=True)


def demo_subject(weights: Path = WEIGHTS, repository: Path | None = None) -> Subject:
    """Return the demo model with the default request."""
    return Subject(
        name="demo",
        title="demo model, default request",
        pipeline=weights / "sd",
        upscaler=weights / "upscaler.safetensors",
        face_detector=weights / "face_detector.safetensors",
        repository=repository or ROOT / "model_repository",
        fields=dict(DEFAULT_REQUEST),
    )


def sd15_subject(weights: Path = WEIGHTS) -> Subject:
    """Return random weights in Stable Diffusion 1.5's sizes, made at the first use (4 GB)."""
    pipeline = CACHE / "sd15" / "pipeline"
    if not (pipeline / "model_index.json").is_file():
        # In a process of its own, so that its gigabytes are given back.
        command = [sys.executable, "-m", "benchmarks.sd15", "--out", str(pipeline)]
        subprocess.run(command, cwd=ROOT, check=True, env=dict(os.environ))
    return Subject(
        name="sd15",
        title="random weights of SD 1.5's size, 512x512, 4 steps, float32",
        pipeline=pipeline,
        upscaler=weights / "upscaler.safetensors",
        face_detector=weights / "face_detector.safetensors",
        repository=CACHE / "sd15" / "repository",
        fields={
            "prompt": "a photo of a woman in a park",
            "seed": 7,
            "steps": 4,
            "scheduler": "euler_a",
            "w": 512,
            "h": 512,
        },
        warm_ups=0,  # a request takes a minute and more
        memory_requests=1,
    )
