"""Contact sheets: a few frames of a clip with its masks laid over, to be looked at."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from stableavatar.data.clips import MASKS, frame_file
from stableavatar.data.preparation.pictures import Pictures, clip_pictures, spread
from stableavatar.media import read_image
from stableavatar.sheets import grid, write_corner

TINTS = ((60, 140, 255), (255, 40, 60))
"""RGB laid over faces and lips."""
STRENGTH = 0.35


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
    return grid(cells, columns)


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
    write_corner(small, str(number))
    return small
