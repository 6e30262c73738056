"""A canvas for smooth shapes in figure coordinates, and the curves that are drawn on it."""

from dataclasses import dataclass, replace

import cv2
import numpy as np

from stableavatar.puppet.identity import Colour, mix

SHIFT = 4
"""Fractional bits of OpenCV's fixed-point coordinates."""
INK: Colour = (38, 28, 34)


@dataclass(frozen=True)
class Canvas:
    """A supersampled picture and the affine map from figure coordinates (head heights; x right, y down) to its pixels."""

    pixels: np.ndarray
    """uint8 [H, W, 3] RGB, or [H, W] for a mask."""
    matrix: np.ndarray
    """float64 [2, 3]."""
    outline: float = 0.0
    """Width of the dark outline of filled shapes in figure coordinates; 0: none (soft shading instead)."""

    @property
    def scale(self) -> float:
        """Pixels per head height."""
        return float(np.hypot(self.matrix[0, 0], self.matrix[1, 0]))

    def moved(self, x: float, y: float, angle: float = 0.0, pivot: tuple[float, float] = (0.0, 0.0)) -> "Canvas":
        """The same picture, with figures turned around the pivot by `angle` (radians, clockwise) and shifted."""
        cos, sin, (px, py) = np.cos(angle), np.sin(angle), pivot
        turn = np.array([[cos, -sin, px + x - cos * px + sin * py], [sin, cos, py + y - sin * px - cos * py], [0, 0, 1]])
        return replace(self, matrix=self.matrix @ turn)

    def to_pixels(self, points: np.ndarray) -> np.ndarray:
        """float64 [N, 2] pixel indices (pixel 0 covers 0 .. 1, its centre is index 0)."""
        return np.asarray(points) @ self.matrix[:, :2].T + (self.matrix[:, 2] - 0.5)

    def fill(self, points: np.ndarray, colour: Colour, outline: bool = True) -> None:
        """A closed polygon [N, 2]."""
        fixed = self._fixed(points)
        cv2.fillPoly(self.pixels, [fixed], colour, cv2.LINE_AA, SHIFT)
        if outline and self.outline:
            cv2.polylines(self.pixels, [fixed], True, INK, self._thickness(self.outline), cv2.LINE_AA, SHIFT)

    def line(self, points: np.ndarray, width: float, colour: Colour, closed: bool = False) -> None:
        """A line through points [N, 2]."""
        cv2.polylines(self.pixels, [self._fixed(points)], closed, colour, self._thickness(width), cv2.LINE_AA, SHIFT)

    def ellipse(self, x: float, y: float, rx: float, ry: float, colour: Colour, outline: bool = False) -> None:
        """A filled ellipse."""
        self.fill(oval(x, y, rx, ry), colour, outline)

    def shade(self, points: np.ndarray, dark: Colour, light: Colour, to: tuple[float, float], steps: int = 8) -> None:
        """A polygon that lightens from its border towards the point `to`; flat and outlined in a picture with outlines."""
        if self.outline:
            self.fill(points, mix(dark, light, 0.6))
            return
        centre = np.asarray(to)
        for step in range(steps):
            part = step / steps
            self.fill(centre + (points - centre) * (1 - 0.75 * part), mix(dark, light, np.sin(part * np.pi / 2)))

    def glow(self, x: float, y: float, rx: float, ry: float, colour: Colour, strength: float) -> None:
        """Blends a colour in, strongest at (x, y), nothing beyond the radii; left out in a picture with outlines."""
        (cx, cy), scale = self.to_pixels(np.array([[x, y]]))[0], self.scale
        x0, x1 = max(0, int(cx - rx * scale)), min(self.pixels.shape[1], int(cx + rx * scale) + 2)
        y0, y1 = max(0, int(cy - ry * scale)), min(self.pixels.shape[0], int(cy + ry * scale) + 2)
        if self.outline or x0 >= x1 or y0 >= y1:
            return
        across = ((np.arange(x0, x1, dtype=np.float32) - cx) / (rx * scale)) ** 2
        down = ((np.arange(y0, y1, dtype=np.float32) - cy) / (ry * scale)) ** 2
        alpha = (strength * np.maximum(0, 1 - across - down[:, None]) ** 2).astype(np.float32)[..., None]
        region = self.pixels[y0:y1, x0:x1]
        region[:] = region + alpha * (np.array(colour, dtype=np.float32) - region) + 0.5

    def _fixed(self, points: np.ndarray) -> np.ndarray:
        return np.rint(self.to_pixels(points) * (1 << SHIFT)).astype(np.int32)

    def _thickness(self, width: float) -> int:
        return max(1, round(width * self.scale))


ANGLES = np.linspace(0, 2 * np.pi, 36, endpoint=False)
CIRCLE = np.stack([np.cos(ANGLES), np.sin(ANGLES)], axis=1)


def oval(x: float, y: float, rx: float, ry: float) -> np.ndarray:
    """[36, 2] points of an ellipse."""
    return CIRCLE * (rx, ry) + (x, y)


def rounded_box(x: float, y: float, rx: float, ry: float) -> np.ndarray:
    """[36, 2] points of a superellipse of power 4."""
    return np.sign(CIRCLE) * np.sqrt(np.abs(CIRCLE)) * (rx, ry) + (x, y)


def curve(points: np.ndarray, closed: bool = True, samples: int = 6) -> np.ndarray:
    """Catmull-Rom spline through control points [N, 2]."""
    points = np.asarray(points, dtype=np.float64)
    before, after = (points[-1:], points[:2]) if closed else (points[:1], points[-1:])
    padded = np.concatenate([before, points, after])
    p0, p1, p2, p3 = (padded[i : len(padded) - 3 + i, None] for i in range(4))
    t = np.arange(samples)[:, None] / samples
    spline = 0.5 * (2 * p1 + (p2 - p0) * t + (2 * p0 - 5 * p1 + 4 * p2 - p3) * t**2 + (3 * p1 - p0 - 3 * p2 + p3) * t**3)
    flat = spline.reshape(-1, 2)
    return flat if closed else np.concatenate([flat, points[-1:]])


def mirrored(right: list[tuple[float, float]]) -> np.ndarray:
    """Control points of a symmetric closed shape from those of its right half, top to bottom; points on the axis are not doubled."""
    half = np.asarray(right)
    left = half[::-1] * (-1, 1)
    return np.concatenate([half, left[np.abs(left[:, 0]) > 1e-9]])
