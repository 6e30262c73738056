"""The face of a puppet: outline, eyes, brows, nose, beard, glasses, and above all the mouth."""

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np

from stableavatar.puppet.drawing import INK, SHIFT, Canvas, curve, mirrored, oval, rounded_box
from stableavatar.puppet.identity import COLOURS, EYE_COLOURS, HAIR_COLOURS, Colour, Identity, lightness, mix
from stableavatar.puppet.scenery import BLACK, WHITE

SHAPES = {  # half widths at temple, cheek, jaw and chin, in head heights
    "round": (0.365, 0.39, 0.325, 0.18), "oval": (0.355, 0.365, 0.29, 0.145), "square": (0.36, 0.37, 0.34, 0.215),
    "long": (0.34, 0.34, 0.275, 0.15), "heart": (0.37, 0.375, 0.27, 0.125),
}  # fmt: skip
MOUTH_Y, MOUTH_HALF_WIDTH, OPENING = 0.25, 0.18, 0.155
"""In head heights: height of the closed mouth, half its neutral width, distance of the lips at aperture 1."""
JAW_DROP = 0.45
"""How far the chin follows, of the opening."""
MOUTH_INSIDE: Colour = (66, 8, 20)
EYE_Y, EYE_X = -0.045, 0.158
EDGE = np.linspace(-1, 1, 19)


@dataclass(frozen=True)
class Pose:
    """One frame of a face: the values of `Motion` that shape it."""

    aperture: float
    width: float
    blink: float
    brow: float
    gaze_x: float
    gaze_y: float
    yaw: float

    def slide(self, depth: float) -> float:
        """Sideways shift (head heights) of a feature that stands out by `depth` (1: the eyes)."""
        return 0.075 * self.yaw * depth


def face_outline(identity: Identity, pose: Pose) -> np.ndarray:
    """[N, 2] closed polygon of skull and face; the jaw drops as the mouth opens."""
    temple, cheek, jaw, chin = SHAPES[identity.face_shape]
    drop = JAW_DROP * OPENING * pose.aperture
    skull = [(0.0, -0.5), (0.6 * temple, -0.44), (temple, -0.2), (cheek, 0.06)]
    points = mirrored([*skull, (jaw, 0.3 + 0.4 * drop), (chin, 0.455 + drop), (0.0, 0.5 + drop)])
    points[:, 0] += 0.35 * pose.slide(1) * np.clip(points[:, 1] + 0.3, 0, 1)
    return curve(points)


def lip_curves(identity: Identity, pose: Pose) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Upper lip's outer and inner edge, lower lip's inner and outer edge, each [19, 2] from left to right.

    The distance of the inner edges in the middle is OPENING * aperture; the half width changes by 25 % either way with `width`.
    """
    half = MOUTH_HALF_WIDTH * identity.mouth_size * (1 + 0.5 * (pose.width - 0.5))
    full = identity.lip_fullness * (1.15 - 0.3 * pose.width)
    opening, arch = OPENING * pose.aperture, 1 - EDGE**2
    x, base = half * EDGE + pose.slide(1.15), MOUTH_Y - 0.018 * EDGE**2
    upper, lower = base - 0.25 * opening * arch, base + 0.75 * opening * arch
    bow = 1 - 0.28 * np.exp(-((EDGE / 0.2) ** 2))
    edges = (upper - 0.036 * full * bow * arch**0.6, upper, lower, lower + 0.046 * full * arch**0.7)
    return tuple(np.stack([x, y], axis=1) for y in edges)  # type: ignore[return-value]


def lip_outline(identity: Identity, pose: Pose) -> np.ndarray:
    """[38, 2] polygon around both lips."""
    outer_upper, _, _, outer_lower = lip_curves(identity, pose)
    return np.concatenate([outer_upper, outer_lower[::-1]])


def draw_head(canvas: Canvas, identity: Identity, pose: Pose) -> None:
    """Everything of the head but its hair."""
    skin = identity.skin
    _draw_ears(canvas, identity, pose)
    edge, middle = mix(skin, mix((120, 40, 20), BLACK, 0.4), 0.24), (-0.06 + pose.slide(1), -0.1)
    canvas.shade(face_outline(identity, pose), edge, mix(skin, (255, 216, 182), 0.18), middle, steps=14)
    blush = 0.25 + 0.2 * lightness(skin) / 255
    for side in (-1, 1):
        canvas.glow(0.22 * side + pose.slide(0.8), 0.13, 0.13, 0.1, mix(skin, (226, 80, 80), 0.45), blush)
    if identity.beard != "none":
        _draw_beard(canvas, identity, pose)
    _draw_nose(canvas, identity, pose)
    draw_mouth(canvas, identity, pose)
    for side in (-1, 1):
        _draw_eye(canvas, identity, pose, side)
        _draw_brow(canvas, identity, pose, side)


def draw_mouth(canvas: Canvas, identity: Identity, pose: Pose) -> None:
    """Lips, and between them the dark inside with the upper teeth and, wide open, the tongue."""
    outer_upper, upper, lower, outer_lower = lip_curves(identity, pose)
    lips, gap = identity.lips, lower - upper
    canvas.glow(pose.slide(1.15), float(outer_lower[9, 1]) + 0.025, 0.13, 0.04, mix(identity.skin, BLACK, 0.5), 0.5)
    canvas.fill(np.concatenate([outer_upper, upper[::-1]]), mix(lips, BLACK, 0.14), outline=False)
    canvas.fill(np.concatenate([lower, outer_lower[::-1]]), mix(lips, WHITE, 0.07), outline=False)
    canvas.glow(pose.slide(1.15) - 0.02, float(outer_lower[9, 1]) - 0.02, 0.06, 0.02, WHITE, 0.4)
    canvas.fill(np.concatenate([upper, lower[::-1]]), MOUTH_INSIDE, outline=False)
    if pose.aperture > 0.4:
        rise = gap[4:15] * (0.38 * min(1.0, (pose.aperture - 0.4) / 0.4)) * np.sin(np.linspace(0, np.pi, 11))[:, None]
        canvas.fill(np.concatenate([lower[4:15] - rise, lower[4:15][::-1]]), (206, 88, 96), outline=False)
    if pose.aperture > 0.08:
        teeth = np.minimum(0.36 * gap, 0.032)[2:17]
        canvas.fill(np.concatenate([upper[2:17], (upper[2:17] + teeth)[::-1]]), (250, 247, 240), outline=False)
    inner = mix(MOUTH_INSIDE, lips, 0.1)
    canvas.line(lower, 0.014, inner)
    canvas.line(upper, 0.014, inner)
    if canvas.outline:
        canvas.line(outer_upper, 0.8 * canvas.outline, INK)
        canvas.line(outer_lower, 0.8 * canvas.outline, INK)


def _draw_ears(canvas: Canvas, identity: Identity, pose: Pose) -> None:
    skin, cheek = identity.skin, SHAPES[identity.face_shape][1]
    for side in (-1, 1):
        x = side * (cheek + 0.02) - pose.slide(0.4)
        canvas.ellipse(x, 0.03, 0.065, 0.105, mix(skin, BLACK, 0.1), outline=True)
        canvas.ellipse(x + 0.004 * side, 0.035, 0.032, 0.06, mix(skin, (150, 50, 40), 0.28))
        if identity.earrings:
            canvas.ellipse(x + 0.012 * side, 0.155, 0.032, 0.036, (250, 206, 84), outline=True)


def _draw_nose(canvas: Canvas, identity: Identity, pose: Pose) -> None:
    skin, size, x = identity.skin, identity.nose_size, pose.slide(1.5)
    wide = {"button": 0.05, "straight": 0.045, "wide": 0.068}[identity.nose_shape] * size
    shade = mix(skin, mix((130, 40, 20), BLACK, 0.5), 0.34)
    y = 0.125 if identity.nose_shape != "button" else 0.105
    if canvas.outline:
        bridge = curve(np.array([[x + 0.3 * wide, y - 0.09], [x + wide, y + 0.01], [x - 0.5 * wide, y + 0.03]]), closed=False)
        canvas.line(bridge, 0.024, mix(skin, INK, 0.6))
        return
    if identity.nose_shape != "button":
        canvas.glow(x + 0.035, 0.02, 0.035, 0.13, shade, 0.55)
    canvas.ellipse(x, y + 0.012, 1.12 * wide, 0.034, shade)
    canvas.shade(oval(x, y, 1.05 * wide, 0.036), mix(skin, shade, 0.3), mix(skin, WHITE, 0.14), (x - 0.01, y - 0.008), steps=4)
    canvas.glow(x - 0.01, y - 0.012, 0.035, 0.03, WHITE, 0.5)


def _draw_eye(canvas: Canvas, identity: Identity, pose: Pose, side: int) -> None:
    """White, iris and pupil behind an opening that the upper lid closes; lashes on the lid."""
    cartoon, skin = bool(canvas.outline), identity.skin
    x = side * EYE_X * identity.eye_distance * (1 - 0.06 * pose.yaw * side) + pose.slide(1)
    half, tall = (0.088, 0.088) if cartoon else (0.083, 0.056)
    half, tall = half * identity.eye_size * (1 - 0.1 * pose.yaw * side), tall * identity.eye_size
    arch = (1 - EDGE**2) ** (0.5 if cartoon else 0.75)
    lower = EYE_Y + 0.75 * tall * arch
    upper = lower - (1 - pose.blink) * 1.75 * tall * arch
    opening = np.stack([np.concatenate([EDGE, EDGE[::-1]]) * half + x, np.concatenate([upper, lower[::-1]])], axis=1)
    canvas.glow(x, EYE_Y - 0.03, 0.13, 0.1, mix(skin, (110, 50, 40), 0.5), 0.35)
    if pose.blink < 0.97:
        iris = (x + 0.45 * half * pose.gaze_x, EYE_Y - 0.004 + 0.3 * tall * pose.gaze_y)
        _fill_clipped(canvas, opening, lambda eye: _draw_iris(eye, identity, iris, 0.66 * tall if cartoon else 0.053 * identity.eye_size))
    woman = identity.gender == "woman"
    lashes = np.stack([EDGE * half * 1.04 + x, upper], axis=1)
    canvas.line(lashes, 0.03 if woman or cartoon else 0.022, mix(skin, INK, 0.85))
    if woman:
        corner = lashes[-1 if side > 0 else 0]
        canvas.line(np.array([corner, corner + (0.03 * side, -0.02 + 0.03 * pose.blink)]), 0.022, mix(skin, INK, 0.85))
    if cartoon and pose.blink < 0.9:
        canvas.line(opening[len(EDGE) :], 0.014, INK)


def _draw_iris(canvas: Canvas, identity: Identity, centre: tuple[float, float], radius: float) -> None:
    (x, y), colour = centre, EYE_COLOURS[identity.eye_colour]
    canvas.ellipse(x, y, radius, radius, mix(colour, BLACK, 0.45))
    canvas.ellipse(x, y + 0.05 * radius, 0.8 * radius, 0.8 * radius, colour)
    canvas.ellipse(x, y + 0.3 * radius, 0.5 * radius, 0.4 * radius, mix(colour, WHITE, 0.3))
    canvas.ellipse(x, y, 0.48 * radius, 0.48 * radius, (18, 14, 18))
    canvas.ellipse(x - 0.34 * radius, y - 0.34 * radius, 0.3 * radius, 0.3 * radius, WHITE)


def _fill_clipped(canvas: Canvas, opening: np.ndarray, draw: Callable[[Canvas], None]) -> None:
    """Draws an eyeball that is seen through a polygon only."""
    fixed = canvas.to_pixels(opening)
    height, width = canvas.pixels.shape[:2]
    x0, y0 = np.maximum(np.floor(fixed.min(axis=0)).astype(int) - 1, 0)
    x1, y1 = np.minimum(np.ceil(fixed.max(axis=0)).astype(int) + 2, (width, height))
    if x0 >= x1 or y0 >= y1:
        return
    ball = np.full((y1 - y0, x1 - x0, 3), (247, 246, 244), dtype=np.uint8)
    offset = np.array([[0, 0, x0], [0, 0, y0]])
    draw(Canvas(ball, canvas.matrix - offset))
    mask = np.zeros(ball.shape[:2], dtype=np.uint8)
    cv2.fillPoly(mask, [np.rint((fixed - (x0, y0)) * (1 << SHIFT)).astype(np.int32)], 255, cv2.LINE_8, SHIFT)
    cv2.copyTo(ball, mask, canvas.pixels[y0:y1, x0:x1])


def _draw_brow(canvas: Canvas, identity: Identity, pose: Pose, side: int) -> None:
    tip, middle = {"arched": (0.02, -0.03), "straight": (0.0, -0.008), "round": (0.015, -0.02)}[identity.brow_shape]
    x, y = side * EYE_X * identity.eye_distance + pose.slide(1), -0.168 - 0.035 * pose.brow - 0.035 * bool(canvas.outline)
    thick = 0.017 * identity.brow_thickness * (0.9 if identity.gender == "woman" else 1.25)
    upper = [(-0.085, -0.002), (0.01, middle), (0.1, tip)]
    lower = [(0.01, middle + 1.9 * thick), (-0.085, -0.002 + 2 * thick)]
    colour = mix(HAIR_COLOURS[identity.hair_colour], BLACK, 0.25)
    if abs(lightness(colour) - lightness(identity.skin)) < 45:
        colour = mix(colour, BLACK, 0.45)
    canvas.fill(curve(np.array(upper + lower) * (side, 1)) + (x, y), colour, outline=False)


def _draw_beard(canvas: Canvas, identity: Identity, pose: Pose) -> None:
    hair = mix(HAIR_COLOURS[identity.hair_colour], BLACK, 0.08)
    _, cheek, jaw, chin = SHAPES[identity.face_shape]
    drop, x = JAW_DROP * OPENING * pose.aperture, pose.slide(0.9)
    if identity.beard == "full beard":
        right = [(0.0, 0.185), (0.16, 0.19), (cheek - 0.09, 0.14), (cheek, -0.02), (jaw + 0.015, 0.3 + 0.4 * drop),
                 (chin + 0.02, 0.475 + drop), (0.0, 0.545 + drop)]  # fmt: skip
        shape = mirrored(right)
        shape[:, 0] += 0.4 * x
        canvas.fill(curve(shape), mix(hair, BLACK, 0.12))
        canvas.glow(0.5 * x, 0.47 + drop, 0.2, 0.09, mix(hair, WHITE, 0.14), 0.7)
    elif identity.beard == "goatee":
        shape = mirrored([(0.0, 0.37 + drop), (0.07, 0.38 + drop), (0.1, 0.44 + drop), (0.06, 0.515 + drop), (0.0, 0.54 + drop)])
        canvas.shade(curve(shape) + (x, 0), mix(hair, BLACK, 0.3), hair, (x, 0.45 + drop), steps=3)
    if identity.beard != "goatee":
        lift = 0.25 * OPENING * pose.aperture
        half = MOUTH_HALF_WIDTH * identity.mouth_size * (1 + 0.3 * (pose.width - 0.5)) + 0.03
        shape = mirrored([(0.0, 0.165), (0.08, 0.165), (half, 0.245), (0.09, 0.23), (0.0, 0.225)])
        canvas.fill(curve(shape) + (x * 1.2, -lift), mix(hair, BLACK, 0.14))


def draw_glasses(canvas: Canvas, identity: Identity, pose: Pose) -> None:
    """Over everything else on the face."""
    frame, x = mix(COLOURS[identity.hat_colour], BLACK, 0.62), pose.slide(1.15)
    box, cheek = rounded_box if identity.glasses == "square" else oval, SHAPES[identity.face_shape][1]
    width = max(0.024, 0.9 * canvas.outline)
    for side in (-1, 1):
        centre = side * EYE_X * identity.eye_distance + x
        canvas.line(box(centre, EYE_Y, 0.128, 0.115 if identity.glasses == "round" else 0.1), width, frame, closed=True)
        canvas.glow(centre - 0.04, EYE_Y - 0.04, 0.07, 0.06, WHITE, 0.35)
        canvas.line(np.array([[centre + 0.128 * side, EYE_Y - 0.02], [side * (cheek + 0.01), EYE_Y - 0.01]]), width, frame)
    canvas.line(curve(np.array([[x - 0.035, EYE_Y], [x, EYE_Y - 0.018], [x + 0.035, EYE_Y]]), closed=False), width, frame)
