"""Contact sheets: pictures in rows, each with a line of text below."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from closeup.detection import Face

Pixels = npt.NDArray[np.uint8]
Cell = tuple[Pixels, str]

_LINE_PX, _GAP_PX = 16, 4
_INK, _PAPER = (30, 30, 30), 245


def write_sheet(path: Path, rows: Sequence[Sequence[Cell]], side: int) -> None:
    """Write rows of pictures, each resized to ``side`` px, as a PNG."""
    wide = max(len(row) for row in rows)
    lines = []
    for row in rows:
        cells = [_cell(picture, text, side) for picture, text in row]
        blank = np.full_like(cells[0], _PAPER)
        lines.append(np.concatenate([*cells, *[blank] * (wide - len(cells))], 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), cv2.cvtColor(np.concatenate(lines), cv2.COLOR_RGB2BGR))


def in_rows(cells: Sequence[Cell], columns: int) -> list[list[Cell]]:
    """Break a list of cells into rows."""
    return [list(cells[first : first + columns]) for first in range(0, len(cells), columns)]


def _cell(picture: Pixels, text: str, side: int) -> Pixels:
    how = cv2.INTER_AREA if picture.shape[0] > side else cv2.INTER_CUBIC
    shown = cv2.resize(picture, (side, side), interpolation=how)
    cell = np.full((side + _LINE_PX + _GAP_PX, side + _GAP_PX, 3), _PAPER, np.uint8)
    cell[:side, :side] = shown
    cv2.putText(cell, text, (2, side + 12), cv2.FONT_HERSHEY_SIMPLEX, 0.36, _INK, 1, cv2.LINE_AA)
    return cell


def with_boxes(
    picture: Pixels, faces: Sequence[Face], colour: tuple[int, int, int], *, zoom: int = 1
) -> Pixels:
    """Return a picture, enlarged, with numbered boxes drawn."""
    size = (picture.shape[1] * zoom, picture.shape[0] * zoom)
    drawn = cv2.resize(picture, size, interpolation=cv2.INTER_CUBIC)
    for number, face in enumerate(faces):
        x0, y0, x1, y1 = (round(value * zoom) for value in face.box)
        cv2.rectangle(drawn, (x0, y0), (x1, y1), colour, 1)
        where = (x0, max(10, y0 - 3))
        cv2.putText(drawn, str(number), where, cv2.FONT_HERSHEY_SIMPLEX, 0.4, colour, 1)
    return np.asarray(drawn, np.uint8)
