"""What is true of a model family, whatever its weights: one table.

A fourth family starts with a row here.
"""

from __future__ import annotations

from dataclasses import dataclass

from closeup.errors import ModelError


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """Facts of one family.

    Attributes:
        name: the key used in manifests.
        title: for messages and tables.
        native_px: side of the square picture the family was trained on, the default size and the
            work size of the face pass; a model's manifest may say otherwise.
        size_step_px: width and height must be multiples of this.
        latent_channels: channels of the denoiser's latents.
        max_tokens: prompt tokens, begin and end included.
        default_steps: steps when the request gives none.
        default_cfg_scale: guidance when the request gives none.
    """

    name: str
    title: str
    native_px: int
    size_step_px: int
    latent_channels: int
    max_tokens: int
    default_steps: int
    default_cfg_scale: float


SD15 = Family(
    name="sd15",
    title="Stable Diffusion 1.5",
    native_px=512,
    size_step_px=8,
    latent_channels=4,
    max_tokens=77,
    default_steps=25,
    default_cfg_scale=7.5,
)

FAMILIES: dict[str, Family] = {family.name: family for family in (SD15,)}


def family_named(name: str) -> Family:
    """Return the family called ``name``.

    Raises:
        ModelError: no such family.
    """
    if name not in FAMILIES:
        raise ModelError(
            f"the model family {name!r} is unknown to this server, which knows "
            f"{', '.join(FAMILIES)}: export the model again with this version."
        )
    return FAMILIES[name]
