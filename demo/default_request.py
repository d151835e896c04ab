"""The request that `make run` sends and that the benchmarks time."""

from __future__ import annotations

DEFAULT_REQUEST: dict[str, object] = {
    "prompt": "a full body photo of a woman with long red hair and pale skin wearing a blue dress "
    "in a park",
    "seed": 5,
    "steps": 20,
    "scheduler": "euler_a",
    "w": 192,
    "h": 192,
    "super_resolution": True,
    "inpaint_faces": True,
}
