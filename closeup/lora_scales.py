"""The scale of a LoRA's layers, as the header of its file tells it.

kohya files carry an ``alpha`` tensor for every layer and need none of this. diffusers and PEFT
write their configuration into the header, as JSON.

Source: peft, tuners/lora/layer.py (``lora_alpha / r``, or ``lora_alpha / sqrt(r)`` with rsLoRA).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from closeup.lora_files import FileError
from closeup.lora_keys import DENOISER

_ADAPTER_METADATA = "lora_adapter_metadata"
_LARGEST = 1e6  # far beyond any alpha; what is larger counts as nothing said


@dataclass(frozen=True, kw_only=True, slots=True)
class Scales:
    """Scales of layers that have no alpha of their own, from the file's header.

    Attributes:
        alpha: of all layers; None when the header says nothing.
        patterns: of single layers: whole names (``^name``) or their last parts.
        rank_stabilised: whether to divide by the root of the rank.
    """

    alpha: float | None = None
    patterns: Mapping[str, float] = field(default_factory=dict)
    rank_stabilised: bool = False

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str], network: str = DENOISER) -> Scales:
        """Read what diffusers and PEFT write; anything else counts as nothing said.

        Args:
            metadata: the header's entries.
            network: whose layers are meant; entries without a prefix are meant for all.

        Raises:
            FileError: it says that the file is a DoRA.
        """
        config = _adapter_config(metadata, network)
        if config.get("use_dora"):
            raise FileError("was trained as DoRA, which this server does not apply.")
        alpha, patterns = config.get("lora_alpha"), config.get("alpha_pattern")
        return cls(
            alpha=float(alpha) if _is_number(alpha) else None,
            patterns={
                str(key): float(value) for key, value in patterns.items() if _is_number(value)
            }
            if isinstance(patterns, dict)
            else {},
            rank_stabilised=config.get("use_rslora") is True,
        )

    def scale(self, name: str, rank: int) -> float:
        """Return alpha over rank (or its root) for the layer ``name`` of this rank."""
        alpha = self.alpha
        for pattern, value in self.patterns.items():
            whole = pattern.removeprefix("^")
            if name == whole or (whole == pattern and name.endswith("." + pattern)):
                alpha = value
                break
        if alpha is None:
            return 1.0
        return alpha / math.sqrt(rank) if self.rank_stabilised else alpha / rank


def _adapter_config(metadata: Mapping[str, str], network: str) -> dict[str, Any]:
    """The network's entries of the adapter metadata, without their prefix."""
    try:
        config = json.loads(metadata.get(_ADAPTER_METADATA, "{}"))
    except (ValueError, RecursionError):
        return {}
    if not isinstance(config, dict):
        return {}
    plain = {key: value for key, value in config.items() if "." not in key}
    for prefix in ("unet.", "transformer.") if network == DENOISER else (f"{network}.",):
        plain.update(
            {key.removeprefix(prefix): value for key, value in config.items()
             if key.startswith(prefix)}
        )  # fmt: skip
    return plain


def _is_number(value: Any) -> TypeGuard[float]:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= _LARGEST  # false for NaN; a whole number of any length compares
