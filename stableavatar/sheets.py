"""Pictures side by side with words on them: contact sheets and the frames of comparison videos."""

from collections.abc import Sequence

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

BACKDROP, INK = 24, (255, 255, 255)
GUTTER = 4
"""Pixels between the cells of a sheet, even: videos need even sizes."""


def grid(cells: Sequence[np.ndarray], columns: int) -> np.ndarray:
    """Pictures of one size, uint8 [height, width, 3], in rows of `columns`; a gutter around each."""
    height, width = cells[0].shape[:2]
    rows, columns = -(-len(cells) // columns), min(columns, len(cells))
    sheet = np.full((rows * (height + GUTTER) + GUTTER, columns * (width + GUTTER) + GUTTER, 3), BACKDROP, np.uint8)
    for index, cell in enumerate(cells):
        y, x = (GUTTER + place * (side + GUTTER) for place, side in zip(divmod(index, columns), (height, width)))
        sheet[y : y + height, x : x + width] = cell
    return sheet


def fit_cell(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    """A picture uint8 [H, W, 3] in the middle of a cell, as large as its aspect allows; uint8 [height, width, 3]."""
    scale = min(width / pixels.shape[1], height / pixels.shape[0])
    size = max(1, round(pixels.shape[1] * scale)), max(1, round(pixels.shape[0] * scale))
    small = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    cell = np.full((height, width, 3), BACKDROP, np.uint8)
    x, y = (width - size[0]) // 2, (height - size[1]) // 2
    cell[y : y + size[1], x : x + size[0]] = small
    return cell


def write_corner(pixels: np.ndarray, text: str) -> None:
    """Writes a few signs (ASCII) into a picture's upper left corner; an outline keeps them readable on any picture."""
    for thickness, colour in ((3, (0, 0, 0)), (1, INK)):
        cv2.putText(pixels, text, (6, 16), cv2.FONT_HERSHEY_SIMPLEX, 0.45, colour, thickness, cv2.LINE_AA)


def label_strip(text: str, width: int, height: int) -> np.ndarray:
    """A line of text, cut where it does not fit, in the middle of a strip; uint8 [height, width, 3]."""
    font = ImageFont.load_default(max(8, round(height * 0.6)))
    room = width - 2 * GUTTER
    while len(text) > 1 and font.getlength(text) > room:
        text = f"{text[:-2]}…"
    strip = Image.new("RGB", (width, height), (BACKDROP,) * 3)
    ImageDraw.Draw(strip).text((width / 2, height / 2), text, fill=INK, font=font, anchor="mm")
    return np.asarray(strip)
