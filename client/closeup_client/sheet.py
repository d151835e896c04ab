"""The before/after sheet: both pictures at one scale, and the faces enlarged below them.

Needs Pillow: ``pip install 'closeup-client[sheet]'``.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from closeup_client.report import face_result
from closeup_client.result import Result

MAX_FACES = 6
PAPER, INK, MUTED, MARK = (250, 249, 246), (36, 35, 33), (128, 124, 117), (196, 62, 38)
MARGIN, GAP, STRIP = 40, 16, 24
PANEL_SIZE = (660, 860)
TILE_MAX = 420
CROP_FACTOR = 2.0
BOX_FACTOR = 1.25

Box = tuple[float, float, float, float]
_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True, kw_only=True, slots=True)
class _Layout:
    panel: tuple[int, int]
    scale: float
    width: int
    columns: int
    tile: int

    @property
    def right(self) -> int:
        """Left edge of the right-hand picture."""
        return self.width - MARGIN - self.panel[0]


def sheet_from_result(result: Result, image: int = 0) -> bytes:
    """A PNG that shows what the face pass did to one picture.

    Both pictures whole, at the same scale; faces are framed by a hairline and their numbers stand
    outside the pictures. Below, the six largest faces: before and after, enlarged, with size and
    strength.

    Args:
        result: made with ``stages=True`` and ``inpaint_faces=True``.
        image: index of the picture.

    Raises:
        ValueError: there is no picture from before the face pass.
    """
    data = result.before_faces(image)
    if data is None:
        raise ValueError("a sheet needs `stages` and `inpaint_faces`.")
    after = Image.open(io.BytesIO(result.images[image])).convert("RGB")
    before = Image.open(io.BytesIO(data)).convert("RGB")
    if before.size != after.size:
        before = before.resize(after.size, Image.Resampling.LANCZOS)
    every = result.faces(image)
    faces = sorted(every, key=_area, reverse=True)[:MAX_FACES]
    faces.sort(key=every.index)
    layout = _layout(after.size, len(faces))
    panels = _draw_panels(before, after, every, faces, layout)
    rows = _draw_rows(before, after, every, faces, layout)
    sheet = Image.new("RGB", (layout.width, panels.height + rows.height), PAPER)
    sheet.paste(panels, (0, 0))
    sheet.paste(rows, (0, panels.height))
    _draw_footer(sheet, result, image, len(every))
    stream = io.BytesIO()
    sheet.save(stream, format="PNG", optimize=True)
    return stream.getvalue()


def _layout(size: tuple[int, int], faces: int) -> _Layout:
    enlarged = max(2.0, 480 / max(size))  # small pictures grow, up to a readable size
    scale = min(PANEL_SIZE[0] / size[0], PANEL_SIZE[1] / size[1], enlarged)
    panel = (max(round(size[0] * scale), 1), max(round(size[1] * scale), 1))
    content = max(2 * panel[0] + GAP, 640)
    columns = 1 if faces <= 1 else 2 if faces <= 4 else 3
    pair = (content - (columns - 1) * GAP * (1 if columns == 2 else 2)) // columns
    tile = min((pair - GAP // 2) // 2, panel[0] if columns == 1 else TILE_MAX)
    width = content + 2 * MARGIN
    return _Layout(panel=panel, scale=scale, width=width, columns=columns, tile=tile)


def _draw_panels(
    before: Image.Image,
    after: Image.Image,
    every: Sequence[Mapping[str, Any]],
    faces: Sequence[Mapping[str, Any]],
    layout: _Layout,
) -> Image.Image:
    top = MARGIN + 14 + STRIP
    canvas = Image.new("RGB", (layout.width, top + layout.panel[1] + 2 * GAP), PAPER)
    draw = ImageDraw.Draw(canvas, "RGBA")
    for left, title, picture in ((MARGIN, "before", before), (layout.right, "after", after)):
        draw.text((left, MARGIN), title, INK, _font(22), anchor="ls")
        small = picture.resize(layout.panel, Image.Resampling.LANCZOS)
        canvas.paste(small, (left, top))
        corner = (left, top)
        boxes = [_scaled(_grown(_box(face), BOX_FACTOR), layout.scale, corner) for face in faces]
        for box in boxes:
            _draw_frame(draw, box, (*corner, left + layout.panel[0], top + layout.panel[1]))
        labels = [str(_number(every, face)) for face in faces]
        _draw_numbers(draw, boxes, labels, corner, layout)
    return canvas


def _draw_frame(draw: ImageDraw.ImageDraw, box: Box, limits: Box) -> None:
    x0, y0 = max(box[0], limits[0]), max(box[1], limits[1])
    x1, y1 = min(box[2], limits[2] - 1), min(box[3], limits[3] - 1)
    if x1 - x0 > 4 and y1 - y0 > 4:
        x0, y0, x1, y1 = round(x0), round(y0), round(x1), round(y1)
        draw.rectangle((x0 + 1, y0 + 1, x1 - 1, y1 - 1), outline=(0, 0, 0, 90))
        draw.rectangle((x0, y0, x1, y1), outline=(255, 255, 255))


def _draw_numbers(
    draw: ImageDraw.ImageDraw,
    boxes: Sequence[Box],
    labels: Sequence[str],
    corner: tuple[int, int],
    layout: _Layout,
) -> None:
    """Put the numbers outside the picture, along the axis that keeps them further apart."""
    centers = [((box[0] + box[2]) / 2, (box[1] + box[3]) / 2) for box in boxes]
    across = _spread([x for x, _ in centers]) >= _spread([y for _, y in centers])
    axis = 0 if across else 1
    is_left = corner[0] < layout.right  # the margins are the outer sides
    edge = corner[0] - 5 if is_left else corner[0] + layout.panel[0] + 4
    used = -1e9
    for index in sorted(range(len(boxes)), key=lambda i: centers[i][axis]):
        at = centers[index][axis]
        place = max(at, used + 22)
        used = place
        if across:
            draw.text((place, corner[1] - 10), labels[index], MARK, _font(15), anchor="ms")
            draw.line((round(at) - 7, corner[1] - 5, round(at) + 7, corner[1] - 5), MARK)
        else:
            anchor, shift = ("rm", -5) if is_left else ("lm", 5)
            draw.text((edge + shift, place), labels[index], MARK, _font(15), anchor=anchor)
            draw.line((edge, round(at) - 7, edge, round(at) + 7), MARK)


def _spread(places: Sequence[float]) -> float:
    ordered = sorted(places)
    return min((b - a for a, b in zip(ordered, ordered[1:], strict=False)), default=1e9)


def _draw_rows(
    before: Image.Image,
    after: Image.Image,
    every: Sequence[Mapping[str, Any]],
    faces: Sequence[Mapping[str, Any]],
    layout: _Layout,
) -> Image.Image:
    caption = 50
    count = -(-len(faces) // layout.columns)
    height = max(count * (layout.tile + caption), 0 if faces else 30) + MARGIN + 10
    canvas = Image.new("RGB", (layout.width, height), PAPER)
    draw = ImageDraw.Draw(canvas)
    if not faces:
        draw.text((MARGIN, 6), "No faces were found.", INK, _font(15), anchor="la")
    pair = 2 * layout.tile + GAP // 2
    if layout.columns == 1:
        pair = layout.width - 2 * MARGIN
    pitch = (layout.width - 2 * MARGIN - pair) // max(layout.columns - 1, 1)
    for position, face in enumerate(faces):
        row, column = divmod(position, layout.columns)
        left = MARGIN + column * pitch
        top = row * (layout.tile + caption)
        region = crop_region(_box(face), after.size)
        side = (layout.tile, layout.tile)
        # One face alone stands under its two pictures.
        other = layout.right if layout.columns == 1 else left + layout.tile + GAP // 2
        for place, picture in ((left, before), (other, after)):
            tile = picture.resize(side, Image.Resampling.LANCZOS, box=region)
            canvas.paste(tile, (place, top))
        title, detail = face_caption(face, _number(every, face))
        y = top + layout.tile + 8
        draw.text((left, y), title, INK, _font(14), anchor="la")
        fitted = _fitted(draw, detail, _font(13), pair)
        draw.text((left, y + 18), fitted, MUTED, _font(13), anchor="la")
    return canvas


def _draw_footer(sheet: Image.Image, result: Result, image: int, faces: int) -> None:
    info = result.info
    seed = result.seeds[image] if image < len(result.seeds) else None
    width, height = info.get("size") or ("?", "?")
    parts = [
        str(info.get("model", "")),
        f"{width} x {height} px",
        f"{info.get('steps')} steps",
        str(info.get("scheduler", "")),
        f"seed {seed}",
        f"{faces} faces, the {MAX_FACES} largest shown" if faces > MAX_FACES else "",
    ]
    draw = ImageDraw.Draw(sheet)
    text = "  ·  ".join(part for part in parts if part and "None" not in part)
    text = _fitted(draw, text, _font(13), sheet.width - 2 * MARGIN)
    draw.text((MARGIN, sheet.height - MARGIN + 14), text, MUTED, _font(13), anchor="ls")


def face_caption(face: Mapping[str, Any], number: int) -> tuple[str, str]:
    """Two lines under a face: number and size; what was done to it."""
    x0, y0, x1, y1 = _box(face)
    title = f"face {number}   {x1 - x0:.0f} x {y1 - y0:.0f} px"
    words, strength = face_result(face)
    parts = [words] if words else []
    if strength is not None:
        parts.append(f"strength {strength:.2f}")
    return title, ", ".join(parts)


def crop_region(box: Box, size: tuple[int, int]) -> Box:
    """The square of `CROP_FACTOR` times the face around it, moved inside a picture of `size`."""
    side = min(max(box[2] - box[0], box[3] - box[1], 1.0) * CROP_FACTOR, *size)
    x0 = min(max((box[0] + box[2] - side) / 2, 0.0), size[0] - side)
    y0 = min(max((box[1] + box[3] - side) / 2, 0.0), size[1] - side)
    return x0, y0, x0 + side, y0 + side


def _box(face: Mapping[str, Any]) -> Box:
    x0, y0, x1, y1 = (float(edge) for edge in face["box"])
    return x0, y0, x1, y1


def _area(face: Mapping[str, Any]) -> float:
    x0, y0, x1, y1 = _box(face)
    return (x1 - x0) * (y1 - y0)


def _number(every: Sequence[Mapping[str, Any]], face: Mapping[str, Any]) -> int:
    """The face's number, as the report counts."""
    return int(face.get("index", every.index(face)))


def _grown(box: Box, factor: float) -> Box:
    dx, dy = (box[2] - box[0]) * (factor - 1) / 2, (box[3] - box[1]) * (factor - 1) / 2
    return box[0] - dx, box[1] - dy, box[2] + dx, box[3] + dy


def _scaled(box: Box, scale: float, corner: tuple[int, int]) -> Box:
    x, y = corner
    return box[0] * scale + x, box[1] * scale + y, box[2] * scale + x, box[3] * scale + y


def _fitted(draw: ImageDraw.ImageDraw, text: str, font: _Font, width: int) -> str:
    if draw.textlength(text, font) <= width:
        return text
    while text and draw.textlength(f"{text}...", font) > width:
        text = text[:-1]
    return f"{text.rstrip()}..."


def _font(size: int) -> _Font:
    return ImageFont.load_default(size)
