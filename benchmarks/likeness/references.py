"""Clean drawings of the people of prompts, which faces are compared with."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.pool import Pool

import numpy as np
import numpy.typing as npt

from benchmarks.likeness.judge import Judge, Reading, mean_embedding
from benchmarks.likeness.prompts import Character
from benchmarks.likeness.subjects import REFERENCE_SEED, clean_crop, described_person
from benchmarks.likeness.wording import Values
from demo.attributes import Person

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
#: Drawings behind a reference: pose, light, clothes and scene differ, and the embedding hardly.
DRAWINGS = 2


class References:
    """Mean embeddings of clean drawings.

    A prompt leaves much of a face open, and every picture chooses that for itself. So the person
    who is drawn has what the prompt names, and for the rest what the judge sees in the face at
    hand: an open choice is no unlikeness. Where the prompt leaves nothing open (a personal LoRA),
    it is always the same person.

    Args:
        judge: looks at the drawings.
        pool: processes that draw, of `drawing_pool`; None draws in this one.
    """

    def __init__(self, judge: Judge, pool: Pool | None = None) -> None:
        self._judge, self._pool = judge, pool
        self._embeddings: dict[str, Floats] = {}

    def embedding(self, character: Character, reading: Reading) -> Floats:
        """Return the reference, (64,) float32 of length one, of a person in a face.

        Args:
            character: who it should be.
            reading: of the face.
        """
        looks = character.person or looks_of(character.truth, reading.values)
        key = _key(looks)
        if key not in self._embeddings:
            tasks = [(looks, number) for number in range(DRAWINGS)]
            if self._pool:
                drawn = self._pool.starmap(draw_looks, tasks)
            else:
                drawn = [draw_looks(*task) for task in tasks]
            self._embeddings[key] = mean_embedding(self._judge.look(drawn))
        return self._embeddings[key]


def looks_of(truth: Values, seen: Values) -> Values:
    """Return what a prompt names, and for the rest what is seen."""
    return {**seen, **truth}


def draw_looks(looks: Values | Person, number: int) -> Pixels:
    """Draw a person of given looks, always the same picture for the same number.

    Returns:
        (128, 128, 3) uint8, as the judge sees a face at its best.
    """
    random = np.random.default_rng([REFERENCE_SEED, zlib.crc32(_key(looks).encode()), number])
    person = looks if isinstance(looks, Person) else described_person(looks, random)
    return clean_crop(person, REFERENCE_SEED + int(random.integers(2**26)))


def _key(looks: Values | Person) -> str:
    return repr(looks) if isinstance(looks, Person) else repr(sorted(looks.items()))


@contextmanager
def drawing_pool() -> Iterator[Pool]:
    """Yield a process for every core, to draw in.

    To be opened before this process has threads of its own: it forks.
    """
    with get_context("fork").Pool(os.cpu_count()) as pool:
        yield pool
