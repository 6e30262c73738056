"""Contact sheets: a few frames of a clip with its masks laid over, to be looked at."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from stableavatar.data.clips import MASKS, frame_file
from stableavatar.data.preparation.pictures import Pictures, clip_pictures, spread
from stableavatar.media import read_image

TINTS = ((60, 140, 255), (255, 40, 60))
"""RGB laid over faces and lips."""
STRENGTH = 0.35
BACKDROP, INK = 24, (255, 255, 255)
GUTTER = 4
"""Pixels between the frames of a sheet."""


def contact_sheet(folder: Path, frames: int = 8, columns: int = 4, height: int = 180, fps: float = 25.0) -> np.ndarray:
    """A few frames of a clip, evenly spread over it, their masks tinted (faces blue, lips red), each with its number.

    Args:
        folder: a clip folder; it may lack masks.
        frames: how many, at most; height: of each, in pixels.
        fps: rate of a clip that is only images/.

    Returns:
        uint8 [H, W, 3] RGB.

    Raises:
        ValueError: the clip or a mask of it cannot be read.
    """
    pictures = clip_pictures(folder, fps)
    numbers = spread(pictures.frames, frames)
    cells = [_cell(folder, pictures, number, pixels, height) for number, pixels in zip(numbers, pictures.read(numbers))]
    return _grid(cells, columns)


def tint(pixels: np.ndarray, masks: Sequence[np.ndarray]) -> np.ndarray:
    """A picture, uint8 [H, W, 3], with its face mask and its lip mask, uint8 [H, W], laid over it."""
    mixed = pixels.astype(np.float32)
    for mask, colour in zip(masks, TINTS):
        weight = STRENGTH * mask[..., None].astype(np.float32) / 255
        mixed = mixed * (1 - weight) + weight * np.array(colour, np.float32)
    return mixed.round().astype(np.uint8)


def _cell(folder: Path, pictures: Pictures, number: int, pixels: np.ndarray, height: int) -> np.ndarray:
    files = [frame_file(folder / name, number) for name in MASKS]
    if all(file.is_file() for file in files):
        pixels = tint(pixels, [np.asarray(read_image(file, quiet=True).convert("L")) for file in files])
    width = max(1, round(pictures.width * height / pictures.height))
    small = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)
    for thickness, colour in ((3, (0, 0, 0)), (1, INK)):  # An outline keeps it readable on any picture.
        cv2.putText(small, str(number), (6, 16), cv2.FONT_HERSHEY_SIMPLEX, 0.45, colour, thickness, cv2.LINE_AA)
    return small


def _grid(cells: Sequence[np.ndarray], columns: int) -> np.ndarray:
    """Pictures of one size, in rows."""
    height, width = cells[0].shape[:2]
    rows, columns = -(-len(cells) // columns), min(columns, len(cells))
    sheet = np.full((rows * (height + GUTTER) + GUTTER, columns * (width + GUTTER) + GUTTER, 3), BACKDROP, np.uint8)
    for index, cell in enumerate(cells):
        y, x = (GUTTER + place * (side + GUTTER) for place, side in zip(divmod(index, columns), (height, width)))
        sheet[y : y + height, x : x + width] = cell
    return sheet
