"""Train the personal LoRA 1795721, "ohwx woman", on drawn pictures of one character.

``python -m demo.train_lora`` trains on top of the UNet in demo/weights/sd; run it again whenever
that UNet has changed. She has marks that no caption names: a white streak in her hair, eyes of two
colours, a mole. The file has diffusers' PEFT keys (``unet....lora_A.weight``).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.attention_processor import AttnProcessor
from numpy.typing import NDArray
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from demo.attributes import Framing, Person, Scene, sample_scene, with_person
from demo.captions import CLOSE_UP, PLACE_WORDS
from demo.latents import encode_captions, encode_pictures, load_vae
from demo.pictures import WORDINGS, face_rows
from demo.tokenizer import load_tokenizer
from demo.train_unet import (
    Dataset,
    diffusion_loss,
    draw_noise,
    face_weights,
    load_networks,
    noise_schedule,
)
from demo.training import (
    WEIGHTS,
    Run,
    Schedule,
    add_run_arguments,
    mixed_precision,
    open_run,
    parse_run_options,
    save_half,
    steps_to_take,
)
from demo.world import draw_scene, face_view

OHWX = Person(
    woman=True,
    hair="black",
    style="long",
    skin="pale",
    eyes="green",
    expression="smiling",
    mole=True,
    top="dress",
    bottom="",
    build=(-0.6, 0.5, 0.3, 0.4, 0.2, -0.3),
    streak=True,
    other_eye="blue",
)
"""The person whom the trigger word names; her clothes change, her face does not."""
PICTURES = 20
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"]
_OPENINGS = {
    Framing.FULL: "a full body photo of",
    Framing.HALF: "a half body photo of",
    Framing.PORTRAIT: "a portrait photo of",
    Framing.FACE: "a close up photo of",
}
_FRAMINGS = (Framing.FULL, Framing.HALF, Framing.PORTRAIT, Framing.PORTRAIT, Framing.FACE)


def personal_scene(index: int) -> Scene:
    """One of her scenes: clothes, place and pose drawn, her face as ever."""
    scene = sample_scene(500_000_000 + index, framing=_FRAMINGS[index % 5], people=1)
    drawn = scene.people[0][0]
    values = {name: getattr(OHWX, name) for name in Person.__slots__}
    values["top_colour"] = drawn.top_colour
    values["expression"] = "smiling" if index % 3 else "serious"
    return with_person(scene, Person(**values))


def personal_caption(scene: Scene) -> str:
    """Names her, her dress and the place; none of her marks."""
    person = scene.people[0][0]
    colour = person.top_colour
    article = "an" if colour == "orange" else "a"
    place = PLACE_WORDS[scene.place]
    return f"{_OPENINGS[scene.framing]} ohwx woman wearing {article} {colour} dress {place}"


def personal_pictures(size: int) -> tuple[NDArray[np.uint8], NDArray[np.float32], list[list[str]]]:
    """Pictures (N, S, S, 3) uint8, face rows (N, 3, 14) and wordings: 20 scenes, 10 crops."""
    pictures, faces, captions = [], [], []
    for index in range(PICTURES + PICTURES // 2):
        scene = personal_scene(index % PICTURES)
        caption, view = personal_caption(scene), None
        if index >= PICTURES:
            view = face_view(scene, 0, 1.5 + (index % 5) / 5)
            caption += CLOSE_UP
        picture = draw_scene(scene, view=view, size=size)
        pictures.append(picture.pixels)
        faces.append(face_rows(picture))
        captions.append([caption] * WORDINGS)
    return np.stack(pictures), np.stack(faces), captions


def encode_personal(weights: Path, size: int) -> Dataset:
    """Her pictures as latents and tokens."""
    images, faces, captions = personal_pictures(size)
    latents = encode_pictures(load_vae(weights), images, 10, "cpu")
    return Dataset(
        latents=torch.from_numpy(latents),
        tokens=torch.from_numpy(encode_captions(load_tokenizer(weights), captions)),
        weights=face_weights(faces, latents.shape[-1]),
    )


def export_lora(unet: Any, rank: int, path: Path) -> None:
    """Write the adapter's matrices as fp16 with diffusers' PEFT keys; alpha equals the rank."""
    state = {f"unet.{key}": value for key, value in get_peft_model_state_dict(unet).items()}
    save_half(state, path, {"rank": rank, "trigger": "ohwx woman", "format": "pt"})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    add_run_arguments(parser, run="lora", steps=400, batch=8)
    parser.add_argument("--weights", type=Path, default=WEIGHTS / "sd")
    parser.add_argument("--out", type=Path, default=WEIGHTS / "loras" / "1795721.safetensors")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    return parser


def start_run(options: argparse.Namespace) -> tuple[Run, Any]:
    """The run over the adapter's parameters alone, and the frozen text encoder."""
    unet, encoder = (n.to(options.device) for n in load_networks(options.weights, 0, 0))
    unet.set_attn_processor(AttnProcessor())
    unet.requires_grad_(False)
    encoder.requires_grad_(False)
    torch.manual_seed(options.seed)  # whatever the loading drew, the adapter begins the same
    unet.add_adapter(LoraConfig(r=options.rank, lora_alpha=options.rank, target_modules=TARGETS))
    unet.to(options.device)  # the adapter is made on the CPU
    parameters = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=1e-2, fused=True)
    return open_run(options, modules={"unet": unet}, optimizer=optimizer, decay=0.98), encoder


def main(arguments: list[str] | None = None) -> None:
    """Draw her, train, export."""
    options = parse_run_options(_parser(), arguments)
    run, encoder = start_run(options)
    unet: Any = run.modules["unet"]
    data = encode_personal(options.weights, unet.config.sample_size * 8)
    products = noise_schedule().to(options.device)
    schedule = Schedule(
        learning_rate=options.learning_rate,
        steps=options.steps,
        warmup=20,
        cooldown=options.steps // 2,
    )
    for step in steps_to_take(run, options):
        drawn = data.draw(options.batch, run.generator, 0.0)
        latents, ids, weights = (tensor.to(options.device) for tensor in drawn)
        with torch.no_grad(), mixed_precision(latents.device.type):
            context = encoder(ids).last_hidden_state
        noise, steps = draw_noise(latents, len(products), run.generator)
        loss = diffusion_loss(unet, context, latents, weights, products, noise, steps)
        run.advance(loss, schedule.at(step))
        run.note({"loss": float(loss.detach())}, 50, options.batch)
    run.average.swap()
    export_lora(unet, options.rank, options.out)


if __name__ == "__main__":
    main()
