"""Whether the background of a clip stands still, told from a few of its pictures."""

import math

import cv2
import numpy as np

from stableavatar.data.preparation.crops import Crop

SMALL = 160
"""Long side in pixels at which movement is told."""
BORDER = 0.15
"""Share of a clip's sides that counts as background: left, right and above; the shoulders are below."""
MOVED = 5.0
"""Grey levels (standard deviation over time) from which on a pixel moves; the noise of cameras and codecs stays below."""


class Background:
    """Adds up how much each pixel of a picture changes over time, at a small size.

    Args:
        size: (width, height) of the pictures to come.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        self._small = tuple(max(8, round(side * SMALL / max(size))) for side in size)
        self._sum, self._squares = (np.zeros(self._small[::-1]) for _ in range(2))
        self._count = 0

    def add(self, grey: np.ndarray) -> None:
        """A picture, uint8 [H, W]."""
        small = cv2.resize(grey.astype(np.float32), self._small, interpolation=cv2.INTER_AREA).astype(np.float64)
        self._sum += small
        self._squares += small**2
        self._count += 1

    def stillness(self, crop: Crop, source_size: tuple[int, int]) -> float:
        """Share of a crop's border (left, right, above) that does not move: 1 for a camera on a stand before a quiet wall.

        Args:
            crop: in pixels of the source, whose (width, height) is `source_size`.
        """
        deviation = np.sqrt((self._squares / self._count - (self._sum / self._count) ** 2).clip(0))
        scale = [small / side for small, side in zip(self._small, source_size)]
        x0, x1 = (round(side * scale[0]) for side in (crop.x, crop.x + crop.width))
        y0, y1 = (round(side * scale[1]) for side in (crop.y, crop.y + crop.height))
        inside = deviation[y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)]
        above, beside = math.ceil(BORDER * inside.shape[0]), math.ceil(BORDER * inside.shape[1])
        border = np.zeros(inside.shape, bool)
        border[:above] = border[:, :beside] = border[:, -beside:] = True
        return float((inside[border] < MOVED).mean())
