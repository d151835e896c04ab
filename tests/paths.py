"""Where things are."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEMO_WEIGHTS = ROOT / "demo" / "weights"
DEMO_LORAS = DEMO_WEIGHTS / "loras"
SHARED = ROOT.parent / "shared"
