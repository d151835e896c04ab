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
        row_extras: inputs of the denoiser beside the context, one entry a network row.
        flow: trained by flow matching; samplers take their flow forms.
        negative_prompt: whether it takes one: the family is guided by two network rows.
        cfg_scale_below: guidance must be smaller than this; None leaves the field's own range.
        default_steps: steps when the request gives none.
        default_cfg_scale: guidance when the request gives none.
    """

    name: str
    title: str
    native_px: int
    size_step_px: int
    latent_channels: int
    default_steps: int
    default_cfg_scale: float
    row_extras: tuple[str, ...] = ()
    flow: bool = False
    negative_prompt: bool = True
    cfg_scale_below: float | None = None


SD15 = Family(
    name="sd15",
    title="Stable Diffusion 1.5",
    native_px=512,
    size_step_px=8,
    latent_channels=4,
    default_steps=25,
    default_cfg_scale=7.5,
)

SDXL = Family(
    name="sdxl",
    title="Stable Diffusion XL",
    native_px=1024,
    size_step_px=8,
    latent_channels=4,
    default_steps=30,
    default_cfg_scale=5.0,
    row_extras=("pooled", "time_ids"),
)

FLUX = Family(
    name="flux",
    title="FLUX.1",
    native_px=1024,
    size_step_px=16,
    latent_channels=16,
    default_steps=28,
    default_cfg_scale=3.5,
    row_extras=("pooled", "guidance_embed"),
    flow=True,
    negative_prompt=False,
    cfg_scale_below=5.0,
)

FAMILIES: dict[str, Family] = {family.name: family for family in (SD15, SDXL, FLUX)}


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
