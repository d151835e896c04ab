"""Train the demo's text encoder on what captions say, before the UNet sees it.

``python -m demo.train_text --resume``

A UNet's gradient teaches a text encoder hair and clothes soon and the colour of an eye late: few
latents hang on it. Here every word learns the two words before it (whose colour is it), and the
tokens that end a caption learn all that it names of its first two people. The linear readers are
thrown away; the encoder is written as fp16 into ``--out``, from where `demo.train_unet` and
`demo.train_gpu` take it with ``--text-encoder``: a UNet fits only the encoder it was trained with.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from demo.attributes import (
    BOTTOMS,
    CLOTH,
    EXPRESSIONS,
    EYES,
    HAIR,
    PLACES,
    SKIN,
    STYLES,
    TOPS,
    Framing,
    sample_scene,
)
from demo.captions import CLOSE_UP, PLACE_WORDS, describe_scene
from demo.tokenizer import load_tokenizer
from demo.train_unet import END_TOKEN, build_text_encoder
from demo.training import (
    RUNS,
    WEIGHTS,
    Run,
    Schedule,
    add_run_arguments,
    open_run,
    parse_run_options,
    size_of,
    steps_to_take,
)

SEED = 30_000_000
SLOTS = 2
_MARKS = ("glasses", "beard", "freckles", "mole", "earrings", "striped")
_TIED = "ponytail|braids"
_COLOURS, _CLOTH = "|".join(HAIR), "|".join(CLOTH)
_TOPS = "|".join((*TOPS, "dress"))
READ: dict[str, tuple[tuple[str, ...], re.Pattern[str]]] = {
    "gender": (("woman", "man"), re.compile(r"\b(woman|man)\b")),
    "expression": (EXPRESSIONS, re.compile(rf"\b({'|'.join(EXPRESSIONS)}) (?:wo)?man\b")),
    "hair": (tuple(HAIR), re.compile(rf"\b({_COLOURS}) (?:hair|{_TIED})\b")),
    "style": (STYLES, re.compile(rf"\b({'|'.join(STYLES)})\b")),
    "skin": (tuple(SKIN), re.compile(rf"\b({'|'.join(SKIN)}) skin\b")),
    "eyes": (tuple(EYES), re.compile(rf"\b({'|'.join(EYES)}) eyes\b")),
    "top": ((*TOPS, "dress"), re.compile(rf"\b({_TOPS})\b")),
    "top colour": (tuple(CLOTH), re.compile(rf"\b({_CLOTH}) (?:{_TOPS})\b")),
    "bottom colour": (tuple(CLOTH), re.compile(rf"\b({_CLOTH}) (?:{'|'.join(BOTTOMS)})\b")),
    **{mark: ((mark,), re.compile(rf"\b({mark})\b")) for mark in _MARKS},
}
"""Attribute -> its values, and where a person's words name one."""
_PERSON = re.compile(rf"\ba (?:(?:{'|'.join(EXPRESSIONS)}) )?(?:woman|man)\b")
_PLACES = {words: PLACES.index(place) for place, words in PLACE_WORDS.items()}


def read_caption(caption: str) -> NDArray[np.int64]:
    """What a caption says: (SLOTS * len(READ) + 1,) integers, 0 where it says nothing.

    One after the other the attributes of the first two people, in the order of `READ`, as the
    value's place in its table counted from 1; last the place of the scene, likewise.
    """
    starts = [match.start() for match in _PERSON.finditer(caption)]
    values: list[int] = []
    for slot in range(SLOTS):
        words = ""
        if slot < len(starts):
            words = caption[starts[slot] : [*starts, len(caption)][slot + 1]]
        for table, pattern in READ.values():
            found = pattern.search(words)
            values.append(1 + table.index(found[1]) if found else 0)
    place = next((1 + index for words, index in _PLACES.items() if words in caption), 0)
    return np.array([*values, place])


class Readers(nn.Module):
    """The linear readers that training alone uses.

    Attributes:
        before: (D,) -> logits of the tokens one and two places before.
        said: (D,) -> logits of every value of `read_caption`, side by side.
    """

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__()
        self.sizes = [1 + len(table) for table, _ in READ.values()] * SLOTS + [1 + len(PLACES)]
        self.before = nn.Linear(width, 2 * vocabulary)
        self.said = nn.Linear(width, sum(self.sizes))

    def before_loss(self, states: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Cross-entropy of the words before each word.

        Args:
            states: (B, L, D).
            ids: (B, L) token ids.
        """
        first, second = self.before(states[:, 2:]).chunk(2, dim=-1)
        word = (ids[:, 2:] != END_TOKEN).flatten()
        losses = [
            F.cross_entropy(logits.flatten(0, 1)[word], ids[:, shift : -2 + shift].flatten()[word])
            for logits, shift in ((first, 1), (second, 0))
        ]
        return losses[0] + losses[1]

    def said_loss(self, states: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, float]:
        """Cross-entropy of what a caption says, and the share read rightly of what is named.

        Args:
            states: (B, D), of one token that ends the captions.
            values: (B, N) as `read_caption` returns them.
        """
        logits = self.said(states).split(self.sizes, dim=1)
        losses, right, named = [], torch.zeros(()), torch.zeros(())
        for part, truth in zip(logits, values.unbind(1), strict=True):
            losses.append(F.cross_entropy(part, truth))
            right = right + ((part.argmax(1) == truth) & (truth > 0)).sum()
            named = named + (truth > 0).sum()
        return torch.stack(losses).sum(), float(right / named)


def draw_captions(count: int, seed: int) -> list[str]:
    """Captions as training pictures have them, nothing drawn: crops' among them, half thorough."""
    captions = []
    for index in range(count):
        random = np.random.default_rng([seed + index, 2])
        crop = random.random() < 0.4
        framing = (Framing.FULL, Framing.FULL, Framing.HALF, Framing.PORTRAIT)[index % 4]
        scene = sample_scene(seed + index, framing=framing if crop else None)
        words = describe_scene(scene, random, thorough=index % 2 == 1)
        captions.append(words + (CLOSE_UP if crop else ""))
    return captions


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    add_run_arguments(parser, run="text", steps=3200, batch=64)
    parser.add_argument("--captions", type=int, default=100_000)
    parser.add_argument("--start", type=Path, help="a pipeline folder to start from")
    parser.add_argument("--out", type=Path, default=RUNS / "text" / "text_encoder")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--cooldown", type=int, default=1500)
    parser.add_argument("--probe", action="store_true", help="leave the encoder as it is and write "
                        "none: the readers show what can be read from it")  # fmt: skip
    return parser


def start_run(options: argparse.Namespace, vocabulary: int) -> Run:
    """Encoder and readers with their optimizer, resumed when asked for."""
    encoder: Any = build_text_encoder(vocabulary)
    if options.start:
        encoder = type(encoder).from_pretrained(
            options.start / "text_encoder", torch_dtype=torch.float32, attn_implementation="eager"
        )
    readers = Readers(encoder.config.hidden_size, vocabulary)
    encoder.train().requires_grad_(not options.probe)
    modules = {
        "text_encoder": encoder.to(options.device),
        "readers": readers.to(options.device),
    }
    parameters = [p for module in modules.values() for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.0, betas=(0.9, 0.98), weight_decay=1e-2)
    run = open_run(options, modules=modules, optimizer=optimizer, decay=0.998)
    print(size_of(encoder), "from step", run.step, flush=True)
    return run


def train(run: Run, ids: torch.Tensor, values: torch.Tensor, options: argparse.Namespace) -> None:
    """Optimize until the last step or the last minute, with checkpoints."""
    schedule = Schedule(
        learning_rate=options.learning_rate, steps=options.steps, cooldown=options.cooldown
    )
    encoder, readers = run.modules["text_encoder"], run.modules["readers"]
    assert isinstance(readers, Readers)
    for step in steps_to_take(run, options):
        rows = torch.randint(0, len(ids), (options.batch,), generator=run.generator)
        tokens = ids[rows].to(options.device)
        # As many columns as the longest needs, and a few of the tokens that end it.
        longest = int((tokens != END_TOKEN).sum(1).max())
        tokens = tokens[:, : longest + 4].long()
        states = encoder(tokens).last_hidden_state
        first = (tokens == END_TOKEN).int().argmax(1)
        later = torch.randint(0, 4, first.shape, generator=run.generator).to(options.device)
        place = (first + later).clamp(max=tokens.shape[1] - 1)
        ends = states[torch.arange(len(rows), device=states.device), place]
        said, right = readers.said_loss(ends, values[rows].to(options.device))
        before = readers.before_loss(states, tokens)
        run.advance(said + before, schedule.at(step))
        run.note({"before": float(before.detach()), "said": float(said.detach()), "right": right},
                 100, options.batch)  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """Train, save, export."""
    options = parse_run_options(_parser(), arguments)
    tokenizer = load_tokenizer(options.start or WEIGHTS / "sd")
    captions = draw_captions(options.captions, SEED)
    ids = tokenizer(captions, padding="max_length", max_length=77, truncation=True)["input_ids"]
    values = torch.from_numpy(np.stack([read_caption(caption) for caption in captions]))
    run = start_run(options, len(tokenizer))
    train(run, torch.tensor(ids, dtype=torch.int16), values, options)
    if options.probe:
        return
    run.average.swap()
    encoder: Any = run.modules["text_encoder"]
    encoder.half().save_pretrained(options.out)


if __name__ == "__main__":
    main()
