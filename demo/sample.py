"""Sample the demo model with diffusers and lay the pictures out in a sheet.

``python -m demo.sample out.png`` takes eight standing prompts; ``--held-out N`` draws N captions of
scenes that no training set holds.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor
from numpy.typing import NDArray

from demo.attributes import sample_scene
from demo.captions import describe_scene
from demo.training import WEIGHTS

HELD_OUT_SEED = 900_000_000
PROMPTS = (
    "a full body photo of a woman with long red hair and glasses wearing a blue dress in a park",
    "a full body photo of a man with short black hair and a beard wearing a green shirt and black "
    "trousers on a beach",
    "a full body photo of a smiling woman with curly blonde hair and dark skin wearing a yellow "
    "dress in a city",
    "a half body photo of a woman with bun brown hair wearing a purple dress in the snow",
    "a portrait photo of a smiling man with curly red hair and glasses wearing a white shirt at "
    "night",
    "a portrait of a serious woman with long black hair wearing a red shirt in a studio",
    "a close up photo of a smiling woman with short blue hair and pale skin in a park",
    "a full body photo of a woman with long red hair and glasses wearing a blue dress in a park, "
    "close up of the face",
)


def held_out_captions(count: int) -> list[str]:
    """Captions of scenes beyond every training seed, always the same ones."""
    return [
        describe_scene(sample_scene(HELD_OUT_SEED + i), np.random.default_rng(HELD_OUT_SEED + i))
        for i in range(count)
    ]


def load_pipeline(folder: Path, device: str = "cpu") -> Any:
    """The pipeline in float32 with a DDIM scheduler."""
    pipeline = StableDiffusionPipeline.from_pretrained(
        folder, safety_checker=None, torch_dtype=torch.float32
    ).to(device)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.unet.set_attn_processor(AttnProcessor())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample_pictures(
    pipeline: Any, prompts: list[str], *, steps: int = 20, guidance: float = 4.0, seed: int = 0
) -> NDArray[np.uint8]:
    """One picture a prompt, (N, S, S, 3) uint8, seeds ``seed``, ``seed + 1``, ..."""
    size = pipeline.unet.config.sample_size * 8
    pictures = []
    for first in range(0, len(prompts), 8):
        part = prompts[first : first + 8]
        seeds = range(seed + first, seed + first + len(part))
        result = pipeline(
            part,
            height=size,
            width=size,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=[torch.Generator("cpu").manual_seed(s) for s in seeds],
            output_type="np",
        )
        pictures.append((result.images * 255).round().astype(np.uint8))
    return np.concatenate(pictures)


def lay_out(pictures: NDArray[np.uint8], columns: int, zoom: float = 2.0) -> NDArray[np.uint8]:
    """A sheet of pictures, row by row, enlarged."""
    blank = [np.zeros_like(pictures[0])] * (-len(pictures) % columns)
    cells = [*pictures, *blank]
    rows = [np.concatenate(cells[i : i + columns], 1) for i in range(0, len(cells), columns)]
    sheet = np.concatenate(rows)
    return np.asarray(
        cv2.resize(sheet, None, fx=zoom, fy=zoom, interpolation=cv2.INTER_CUBIC), np.uint8
    )


def main(arguments: list[str] | None = None) -> None:
    """Write a sheet, and print its prompts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--weights", type=Path, default=WEIGHTS / "sd")
    parser.add_argument("--held-out", type=int, default=0)
    parser.add_argument("--prompt", action="append", help="instead of the standing ones")
    parser.add_argument("--lora", type=Path, help="a LoRA file to load")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--columns", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    pipeline = load_pipeline(options.weights, options.device)
    if options.lora:
        pipeline.load_lora_weights(str(options.lora.parent), weight_name=options.lora.name)
    prompts = options.prompt or list(PROMPTS)
    if options.held_out:
        prompts = held_out_captions(options.held_out)
    pictures = sample_pictures(
        pipeline, prompts, steps=options.steps, guidance=options.guidance, seed=options.seed
    )
    sheet = lay_out(pictures, options.columns)
    cv2.imwrite(str(options.out), cv2.cvtColor(sheet, cv2.COLOR_RGB2BGR))
    for index, prompt in enumerate(prompts):
        print(index, prompt)


if __name__ == "__main__":
    main()
