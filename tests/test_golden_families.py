"""The golden request, word for word, against small models of every family, in this process."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from closeup import face_pass
from closeup.detection import Face
from closeup.graph import Outcome
from closeup.info import build_info
from closeup.local import LocalModels
from closeup.lora_read import Layouts, layouts_from_manifest
from closeup.manifest import INDEX_NAME, read_models
from closeup.run import Run
from closeup.settings import Settings
from export.__main__ import main as export_main
from tests.drawn_faces import make_face
from tests.family_export import DEFAULT_STEPS, NATIVE_PX, export_families
from tests.golden import GOLDEN_BODY
from tests.lora_writers import STYLES, random_factors, tensors_from_factors, text_style, write_lora
from tests.tiny_pipelines import write_tiny_pipeline

pytestmark = pytest.mark.slow

LORA, SEED = "1795721", 3
MODELS = {"sd15": "diffusers", "sdxl": "diffusers", "flux_dev": "transformer"}  # and LoRA style
FACE = make_face(448, 380, 14)  # px; the models paint 64x64 px, so repainting it adds detail


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Path]]:
    """The Triton models of all families, an upscaler and a face detector."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    families = export_families(tmp_path_factory).repository
    folder = tmp_path_factory.mktemp("sd15")
    write_tiny_pipeline(folder / "sd15", full_attention=False)
    facts = json.dumps({"native_px": NATIVE_PX, "defaults": {"steps": DEFAULT_STEPS}})
    (folder / "sd15" / "closeup.json").write_text(facts, encoding="utf-8")
    arguments = ["--model", str(folder / "sd15"), "--name", "sd15", "--lora-rank", "4",
                 "--max-batch", "2", "--repository", str(folder / "repository")]  # fmt: skip
    assert export_main(arguments) == 0
    yield [
        part
        for repository in (families, folder / "repository")
        for part in repository.iterdir()
        if part.is_dir()
    ]
    torch.set_num_threads(threads)


@contextmanager
def serve(parts: list[Path], model: str, folder: Path) -> Iterator[LocalModels]:
    """Serve the models of all families, one of them as the default, and a LoRA for that one."""
    repository, loras = folder / "repository", folder / "loras"
    repository.mkdir()
    loras.mkdir()
    for part in parts:
        (repository / part.name).symlink_to(part)
    index = json.dumps({"models": sorted(MODELS, key=lambda other: other != model)})
    (repository / INDEX_NAME).write_text(index, encoding="utf-8")
    save_lora(loras, MODELS[model], layouts_from_manifest(read_models(repository)[model]))
    with LocalModels(repository, Settings(lora_dir=loras)) as models:
        yield models


def save_lora(folder: Path, style: str, layouts: Layouts) -> None:
    tensors: dict[str, Any] = {}
    for seed, (network, layout) in enumerate(layouts.items()):
        if layout is None:
            continue
        keys = STYLES[style] if network == "denoiser" else text_style("diffusers", network)
        tensors |= tensors_from_factors(random_factors(layout.layers, seed=seed), keys)
    write_lora(folder / f"{LORA}.safetensors", tensors)


@pytest.fixture
def planted_face(monkeypatch: pytest.MonkeyPatch) -> None:
    """Add a face to what the detector finds: random weights paint none."""
    find = face_pass.find_faces

    async def find_and_add(run: Run, pixels: Any) -> list[Face]:
        return [*await find(run, pixels), FACE]

    monkeypatch.setattr(face_pass, "find_faces", find_and_add)


def ask(models: LocalModels, body: str) -> tuple[Run, Outcome]:
    """Run a request as it is, with a seed that is always the same, and keep all its stages."""
    request = models.resolve(**json.loads(body))
    run = models.start(replace(request, seed=SEED, stages=True))
    return run, asyncio.run(models.run(run))


@pytest.mark.usefixtures("planted_face")
@pytest.mark.parametrize("model", MODELS)
def test_golden_request_runs_the_whole_graph(parts: list[Path], model: str, tmp_path: Path) -> None:
    with serve(parts, model, tmp_path) as models:
        run, outcome = ask(models, GOLDEN_BODY)
        fields = json.loads(GOLDEN_BODY.replace(f"<lora:{LORA}:1.0>", f"<lora:{LORA}:0>"))
        fields |= {"seed": SEED, "super_resolution": False, "inpaint_faces": False}
        without = models.generate(**fields).pictures[0]
    painted = outcome.stages["generated"][0]
    assert np.abs(painted.astype(int) - without).max() > 20
    info = build_info(run, outcome, "golden")
    pixels = outcome.pictures[0]
    assert pixels.shape == (2304, 1792, 3)
    assert pixels.std() > 5
    assert info["model"] == model
    assert (info["generated_size"], info["size"]) == ([896, 1152], [1792, 2304])
    assert info["steps"] == DEFAULT_STEPS
    assert info["loras"] == [{"id": LORA, "weight": 1.0}]
    assert info["scheduler"] == ("euler" if model == "flux_dev" else "euler_a")
    check_warnings(info["warnings"], model)
    check_faces(info, outcome)


def check_warnings(warnings: list[str], model: str) -> None:
    """The sampler's stand-in on FLUX.1, and what CLIP could not read; nothing else."""
    noted = [text for text in warnings if "'euler_a' has no form for flow matching" in text]
    assert len(noted) == (model == "flux_dev")
    cut = [text for text in warnings if "longer than the" in text]
    assert cut
    assert sorted(noted + cut) == sorted(warnings)


def check_faces(info: dict[str, Any], outcome: Outcome) -> None:
    """Each reported face changed, the planted one among them, and nothing elsewhere.

    In some noise the detector sees a small face of its own.
    """
    boxes = np.array([face["box"] for face in info["images"][0]["faces"]])  # x0, y0, x1, y1
    assert info["usage"]["faces_repainted"] == len(boxes)
    centers, sides = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]).max(1)
    assert np.abs(centers - 2 * np.array(FACE.center)).max(1).min() < 1
    before, after = outcome.stages["super_resolution"][0], outcome.pictures[0]
    changed = np.argwhere((before != after).any(-1))[:, ::-1]
    near = np.abs(changed[:, None] - centers).max(-1) <= 2 * sides
    assert near.any(1).all()
    assert near.sum(0).min() > 100
