"""Draws a puppet: one frame of a person that talks in front of a still background, with masks of face and lips."""

from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np

from stableavatar.puppet.drawing import Canvas
from stableavatar.puppet.face import Pose, draw_glasses, draw_head, face_outline, lip_outline
from stableavatar.puppet.hair import draw_back_hair, draw_front_hair
from stableavatar.puppet.identity import Identity
from stableavatar.puppet.motion import Motion
from stableavatar.puppet.scenery import background, draw_arms, draw_body

PLACES = {"close": (0.74, 0.53), "bust": (0.58, 0.46), "half": (0.4, 0.3)}
"""Framing -> height of the head and height of its middle, both in parts of the stage."""
NECK_PIVOT = (0.0, 0.55)
SMALLEST = 32


@dataclass(frozen=True)
class Rendered:
    """One frame."""

    pixels: np.ndarray
    """uint8 [H, W, 3] RGB."""
    face: np.ndarray
    """uint8 [H, W]: 255 inside the face's oval, 0 elsewhere."""
    lips: np.ndarray
    """uint8 [H, W]: 255 on the lips and on what is between them, 0 elsewhere; never empty, always within `face`."""


def render(identity: Identity, motion: Motion, frame: int, size: tuple[int, int]) -> Rendered:
    """Frame number `frame` of a clip.

    Args:
        size: (width, height); the head is as large in it, relative to the shorter side, as the framing says.
    Raises:
        ValueError: a frame outside the motion, a size below 32 pixels.
    """
    if not 0 <= frame < len(motion.aperture):
        raise ValueError(f"frame is {frame}, expected 0 to {len(motion.aperture) - 1}")
    if min(size) < SMALLEST:
        raise ValueError(f"size is {size[0]}x{size[1]}, expected at least {SMALLEST} pixels a side")
    now = {name: float(track[frame]) for name, track in vars(motion).items()}
    pose = Pose(*(now[name] for name in Pose.__dataclass_fields__))
    factor = supersampling(size)
    canvas = _stage(identity, size, factor, _background(identity, size, factor).copy())
    _draw_figure(canvas, identity, pose, now)
    pixels = cv2.resize(canvas.pixels, size, interpolation=cv2.INTER_AREA)
    return Rendered(pixels, *_masks(identity, pose, now, size))


def supersampling(size: tuple[int, int]) -> int:
    """Drawn pixels per pixel and side: less for large pictures, whose edges are smooth anyway."""
    return 3 if min(size) <= 192 else 2


@lru_cache(maxsize=8)
def _background(identity: Identity, size: tuple[int, int], factor: int) -> np.ndarray:
    return background(identity, size[0] * factor, size[1] * factor, blur=factor * min(size) / 100)


def _stage(identity: Identity, size: tuple[int, int], factor: int, pixels: np.ndarray) -> Canvas:
    """Canvas whose origin is the middle of the resting head, and whose unit is its height."""
    width, height = size[0] * factor, size[1] * factor
    extent = min(height, 1.2 * width)
    head, middle = PLACES[identity.framing]
    unit = head * extent
    matrix = np.array([[unit, 0, width / 2], [0, unit, middle * extent + 0.4 * (height - extent)]], dtype=np.float64)
    return Canvas(pixels, matrix, max(0.018, 1.3 * factor / unit) if identity.style == "cartoon" else 0.0)


def _head_on(stage: Canvas, now: dict[str, float]) -> Canvas:
    return stage.moved(now["head_x"], now["head_y"], now["roll"], NECK_PIVOT)


def _draw_figure(stage: Canvas, identity: Identity, pose: Pose, now: dict[str, float]) -> None:
    head, body = _head_on(stage, now), stage.moved(now["sway"], 0.3 * now["head_y"])
    draw_back_hair(head, identity)
    draw_body(body, identity)
    draw_head(head, identity, pose)
    draw_front_hair(head, identity)
    if identity.glasses != "none":
        draw_glasses(head, identity, pose)
    if identity.framing == "half":
        draw_arms(body, identity, (now["left_hand"], now["right_hand"]))


def _masks(identity: Identity, pose: Pose, now: dict[str, float], size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    masks = []
    for outline in (face_outline(identity, pose), lip_outline(identity, pose)):
        head = _head_on(_stage(identity, size, 1, np.zeros((size[1], size[0]), np.uint8)), now)
        cv2.fillPoly(head.pixels, [np.rint(head.to_pixels(outline) * 16).astype(np.int32)], 255, cv2.LINE_8, 4)
        masks.append(head.pixels)
    return masks[0], cv2.bitwise_and(*masks)
