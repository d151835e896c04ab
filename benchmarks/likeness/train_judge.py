"""Train the judge on drawings alone: ``python -m benchmarks.likeness.train_judge --resume``.

The first run draws the training set (about 20 minutes on one busy core); then about half an hour
of training on two shared cores. Checkpoints lie in out/likeness/judge, the weights beside this
file. ``python -m benchmarks.likeness judge`` prints its accuracy.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from benchmarks.likeness.drawings import UNKNOWN, Batch, TrainingSet, draw_training_set
from benchmarks.likeness.judge import WEIGHTS
from benchmarks.likeness.network import EYES_MATCH, FACE, HEADS, JudgeNetwork, tensor_from_crops
from benchmarks.subjects import ROOT
from demo.training import (
    Run,
    Schedule,
    add_run_arguments,
    mixed_precision,
    open_run,
    parse_run_options,
    save_half,
    size_of,
    steps_to_take,
)

FOLDER = ROOT / "out" / "likeness" / "judge"
_TEMPERATURE = 0.15
_EMBEDDING_SHARE = 0.5
#: Whether it is a face at all decides over all the others; both are the hardest questions.
_LOSS_WEIGHTS = {FACE: 4.0, EYES_MATCH: 3.0}


def attribute_loss(
    logits: dict[str, torch.Tensor], labels: torch.Tensor
) -> tuple[torch.Tensor, float]:
    """Mean of weighted cross-entropies by head, unknown labels left out; share of right ones."""
    losses, right, known = [], 0, 0
    for column, (name, values) in enumerate(logits.items()):
        truth = labels[:, column]
        there = truth != UNKNOWN
        loss = F.cross_entropy(values[there], truth[there], label_smoothing=0.02)
        losses.append(_LOSS_WEIGHTS.get(name, 1.0) * loss)
        right += int((values[there].argmax(1) == truth[there]).sum())
        known += int(there.sum())
    return torch.stack(losses).mean(), right / known


def pair_loss(embeddings: torch.Tensor, people: int) -> torch.Tensor:
    """Each view is to find the other view of its person among all others of the batch.

    Args:
        embeddings: (2 P + O, D) of length one; views as in `Batch`.
        people: P.

    Source: Chen et al., "A Simple Framework for Contrastive Learning", 2020, equation 1.
    """
    views = embeddings[: 2 * people]
    likeness = views @ views.T / _TEMPERATURE
    likeness = likeness - torch.eye(2 * people) * 1e4
    return F.cross_entropy(likeness, torch.arange(2 * people).roll(people))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    add_run_arguments(parser, run="judge", steps=3000, batch=48)
    parser.set_defaults(run=FOLDER / "run", device="cpu")
    parser.add_argument("--drawings", type=Path, default=FOLDER / "drawings")
    parser.add_argument("--people", type=int, default=12000, help="drawn twice each")
    parser.add_argument("--others", type=int, default=2000, help="squares without a face")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--start", type=Path, help="weights to go on from; damage is full at once")
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    return parser


def start_run(options: argparse.Namespace) -> Run:
    """A run from the beginning or from its checkpoint."""
    network = JudgeNetwork().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if options.start:
        network.load_state_dict({k: v.float() for k, v in load_file(options.start).items()})
    print(size_of(network))
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.0, weight_decay=0.02, fused=True)
    run = open_run(options, modules={"judge": network}, optimizer=optimizer, decay=0.0)
    if run.step:
        print(f"going on from step {run.step}")
    return run


def learn(run: Run, batch: Batch, learning_rate: float) -> None:
    """One step."""
    crops = tensor_from_crops(batch.crops).to(memory_format=torch.channels_last)
    labels = torch.from_numpy(batch.labels).long()
    with mixed_precision("cpu"):
        logits, embeddings = run.modules["judge"](crops)
    loss, right = attribute_loss(logits, labels)
    pairs = pair_loss(embeddings, batch.people)
    run.advance(loss + _EMBEDDING_SHARE * pairs, learning_rate)
    run.note({"loss": loss.item(), "pairs": pairs.item(), "right": right}, 50, len(batch.crops))


def main(arguments: list[str] | None = None) -> None:
    """Draw what is missing, train, save."""
    options = parse_run_options(_parser(), arguments)
    if not (options.drawings / "done").exists():
        draw_training_set(
            options.drawings,
            people=options.people,
            others=options.others,
            workers=options.workers,
        )
        (options.drawings / "done").touch()
    data, run = TrainingSet(options.drawings), start_run(options)
    schedule = Schedule(
        learning_rate=options.learning_rate,
        steps=options.steps,
        warmup=100,
        cooldown=2 * options.steps // 3,
    )
    run.modules["judge"].train()
    for step in steps_to_take(run, options):
        # A stream of its own for every step: a resumed run goes on as if never stopped.
        random = np.random.default_rng([options.seed, step])
        # Clean drawings first: small marks are found sooner in them.
        severity = 1.0 if options.start else min(1.0, step / (0.4 * options.steps))
        batch = data.draw(options.batch, options.batch // 2, random, severity)
        learn(run, batch, schedule.at(step))
    save_half(run.modules["judge"].state_dict(), options.out, {"heads": ", ".join(HEADS)})
    print(f"step {run.step} of {options.steps}: written {options.out.name}")


if __name__ == "__main__":
    main()
