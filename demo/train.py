"""`make demo-train`: every step of the demo model's recipe, in order, each resumable.

What a step has written is kept, so the command may be stopped and started at will. Figures are
printed at the end. See README.md beside this file for what each step does.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STEPS: tuple[tuple[str, ...], ...] = (
    ("demo.pictures", "--count", "24000"),
    ("demo.pictures", "--out", "demo/cache/large", "--count", "700", "--size", "512",
     "--seed", "10000000"),
    ("demo.train_vae", "--resume"),
    ("demo.latents",),
    ("demo.train_text", "--resume"),
    ("demo.train_unet", "--resume", "--batch", "32", "--learning-rate", "7e-4",
     "--text-encoder", "demo/runs/text/text_encoder"),
    ("demo.train_upscaler", "--resume", "--weights", "demo/weights/sd"),
    ("demo.redraw",),
    ("demo.train_detector", "--resume", "--painted"),
    ("demo.paint",),
    ("demo.paint", "--count", "400", "--seed", "600100000", "--place", "park",
     "--out", "demo/cache/painted-park"),
    ("demo.train_detector", "--resume", "--run", "demo/runs/detector-painted",
     "--start", "demo/weights/face_detector.safetensors", "--steps", "1600",
     "--learning-rate", "1e-3"),
    ("demo.train_lora",),
    ("demo.evaluate",),
)  # fmt: skip


def main() -> int:
    """Run the steps; stop at the first that fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    names = [step[0].removeprefix("demo.") for step in STEPS]
    parser.add_argument("--from", dest="first", choices=names, default=names[0],
                        help="start with this step")  # fmt: skip
    first = names.index(parser.parse_args().first)
    for module, *arguments in STEPS[first:]:
        print(f"== {module} {' '.join(arguments)}", flush=True)
        done = subprocess.run([sys.executable, "-m", module, *arguments], cwd=ROOT, check=False)
        if done.returncode:
            return done.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
