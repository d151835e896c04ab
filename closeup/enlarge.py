"""Super-resolution through the repository's upscaler."""

from __future__ import annotations

from closeup.manifest import UpscalerManifest
from closeup.run import Floats, Run, together
from closeup.upscale import fit_tile, plan_tiles, sr_factor, super_resolve


async def super_resolve_all(
    run: Run, pictures: list[Floats], upscaler: UpscalerManifest
) -> list[Floats]:
    """Enlarge the pictures of a request, tile by tile, as a stage of their own.

    Args:
        run: the request.
        pictures: (H, W, 3) in [0, 1], all of one size.
        upscaler: of the repository.

    Returns:
        The pictures, each side times `closeup.upscale.sr_factor`.
    """
    height, width = pictures[0].shape[:2]
    shape = fit_tile(height, width, max_tile=upscaler.tile_px, overlap=upscaler.overlap_px)
    tiles = plan_tiles(height, width, shape, upscaler.overlap_px)
    factor = sr_factor(height, width)
    with run.stage("super_resolution", len(tiles.tops) * len(tiles.lefts) * len(pictures)):
        return await together(
            run, [enlarge(run, picture, upscaler, factor, report=True) for picture in pictures]
        )


async def enlarge(
    run: Run, picture: Floats, upscaler: UpscalerManifest, factor: int, *, report: bool = False
) -> Floats:
    """Enlarge one picture (H, W, 3) in [0, 1] by ``factor``; `report` advances the stage."""

    async def infer_tiles(tiles: Floats) -> Floats:
        answer = await run.infer_floats("upscaler", {"image": tiles}, ["upscaled"])
        upscaled = answer["upscaled"]
        if report:
            run.advance(len(tiles))
        return upscaled

    return await super_resolve(
        picture,
        infer=infer_tiles,
        scale=upscaler.scale,
        factor=factor,
        tile=upscaler.tile_px,
        overlap=upscaler.overlap_px,
        max_batch=upscaler.max_batch,
    )
