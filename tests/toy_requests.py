"""What the tests of the graph ask of the toy pipeline, and faces to put into its pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tests.drawn_faces import make_face
from tests.toy_models import ToyModels

SIDE, FACTOR, SEED, STEPS = 128, 4, 7, 6
FIELDS: Mapping[str, Any] = {
    "prompt": "word5 word9 word20", "negative_prompt": "word30", "steps": STEPS, "cfg_scale": 3.0,
    "scheduler": "euler_a", "w": SIDE, "h": SIDE, "seed": SEED,
}  # fmt: skip
FACES: Mapping[str, Any] = {**FIELDS, "inpaint_faces": True, "stages": True}
GRID = [make_face(11 + 21 * i, 13 + 25 * j, 14.0) for i in range(6) for j in range(5)]
MakeToy = Callable[..., ToyModels]
