"""Hair and hats of a puppet: what lies behind the head, and what lies over it."""

import numpy as np

from stableavatar.puppet.drawing import Canvas, curve, mirrored, oval
from stableavatar.puppet.identity import COLOURS, HAIR_COLOURS, Colour, Identity, mix

BLACK: Colour = (20, 14, 18)
WHITE: Colour = (255, 250, 240)
LONG = curve(mirrored([(0.0, -0.6), (0.3, -0.54), (0.44, -0.25), (0.45, 0.15), (0.5, 0.6), (0.44, 0.9), (0.26, 0.94), (0.0, 0.9)]))
BOB = curve(mirrored([(0.0, -0.6), (0.3, -0.54), (0.45, -0.22), (0.49, 0.15), (0.46, 0.4), (0.3, 0.45), (0.0, 0.4)]))
TAIL = curve(np.array([[0.25, -0.4], [0.5, -0.32], [0.6, 0.0], [0.54, 0.4], [0.4, 0.55], [0.42, 0.2], [0.36, -0.1]]))
CURLS = [(0.43 * np.sin(a), -0.16 - 0.4 * np.cos(a)) for a in np.linspace(-2.3, 2.3, 12)]
OUTER = [(-0.385, 0.02), (-0.41, -0.18), (-0.34, -0.44), (-0.16, -0.565), (0.0, -0.585),
         (0.16, -0.565), (0.34, -0.44), (0.41, -0.18), (0.385, 0.02)]  # fmt: skip
"""Outer edge of hair over the skull, left to right; a hairline from right to left closes it."""
HAIRLINES = {
    "parted": [(0.33, -0.1), (0.3, -0.24), (0.06, -0.34), (-0.16, -0.36), (-0.28, -0.24), (-0.33, -0.1)],
    "middle": [(0.345, 0.02), (0.31, -0.16), (0.17, -0.3), (0.0, -0.4), (-0.17, -0.3), (-0.31, -0.16), (-0.345, 0.02)],
    "fringe": [(0.345, 0.06), (0.32, -0.12), (0.2, -0.2), (0.0, -0.215), (-0.2, -0.2), (-0.32, -0.12), (-0.345, 0.06)],
    "round": [(0.34, -0.06), (0.3, -0.26), (0.14, -0.36), (0.0, -0.375), (-0.14, -0.36), (-0.3, -0.26), (-0.34, -0.06)],
    "side": [(0.34, -0.02), (0.33, -0.12), (0.2, -0.21), (-0.05, -0.28), (-0.24, -0.42), (-0.31, -0.24), (-0.345, -0.02)],
}
LINE_OF = {"long": "middle", "bob": "side", "curly": "round", "bun": "round", "ponytail": "side", "fringe": "fringe",
           "short": "side", "parted": "parted", "spiky": "round"}  # fmt: skip
CAPS = {name: curve(np.array(OUTER + line)) for name, line in HAIRLINES.items()}
SPIKES = np.array([(-0.4, -0.1), (-0.43, -0.36), (-0.33, -0.36), (-0.32, -0.56), (-0.2, -0.48), (-0.13, -0.66), (-0.03, -0.52),
                   (0.07, -0.68), (0.15, -0.51), (0.28, -0.6), (0.31, -0.42), (0.43, -0.4), (0.4, -0.1)] + HAIRLINES["round"])  # fmt: skip


def tones(identity: Identity) -> tuple[Colour, Colour, Colour]:
    """Hair in the shade, hair, hair in the light."""
    hair = HAIR_COLOURS[identity.hair_colour]
    return mix(hair, BLACK, 0.35), hair, mix(hair, WHITE, 0.25)


def draw_back_hair(canvas: Canvas, identity: Identity) -> None:
    """What lies behind head and neck."""
    dark, hair, _ = tones(identity)
    style, side = identity.hair_style, -1 if identity.layout < 0.5 else 1
    if style in ("long", "fringe"):
        canvas.shade(LONG, dark, mix(dark, hair, 0.8), (0.0, 0.0), steps=10)
    elif style == "bob":
        canvas.shade(BOB, dark, mix(dark, hair, 0.8), (0.0, 0.0), steps=10)
    elif style == "ponytail":
        canvas.shade(TAIL * (side, 1), dark, hair, (0.48 * side, 0.0), steps=4)
    elif style == "bun":
        canvas.shade(oval(0, -0.64, 0.17, 0.15), dark, mix(hair, WHITE, 0.15), (-0.03, -0.68), steps=4)
    elif style == "curly":
        _draw_curls(canvas, identity, 0.15)


def draw_front_hair(canvas: Canvas, identity: Identity) -> None:
    """What lies over the skull; hats too."""
    dark, hair, light = tones(identity)
    style, side = identity.hair_style, -1 if identity.layout < 0.5 else 1
    if style == "buzzed":
        canvas.fill(CAPS["round"] * (0.97, 0.93), mix(identity.skin, hair, 0.6), outline=False)
    elif style == "spiky":
        canvas.fill(SPIKES, mix(dark, hair, 0.6))
        canvas.glow(-0.1, -0.43, 0.26, 0.13, light, 0.6)
    elif style != "bald":
        canvas.fill(CAPS[LINE_OF[style]] * (side, 1), mix(dark, hair, 0.7))
        _draw_shine(canvas, light)
    if style == "curly":
        for x, y in CURLS[3:-3]:
            at = (0.75 * x, 0.86 * y)
            canvas.shade(oval(*at, 0.12, 0.11), mix(dark, hair, 0.5), mix(hair, light, 0.4), (at[0] - 0.02, at[1] - 0.02), steps=4)
    if identity.hat != "none":
        _draw_hat(canvas, identity)


def _draw_curls(canvas: Canvas, identity: Identity, radius: float) -> None:
    dark, hair, _ = tones(identity)
    for x, y in CURLS:
        canvas.shade(oval(x, y, radius, radius), dark, hair, (x - 0.03, y - 0.03), steps=3)


def _draw_shine(canvas: Canvas, light: Colour) -> None:
    if canvas.outline:
        canvas.line(curve(np.array([[-0.25, -0.44], [-0.14, -0.5], [-0.02, -0.52]]), closed=False), 0.03, light)
    else:
        canvas.glow(-0.1, -0.46, 0.28, 0.12, light, 0.75)


def _draw_hat(canvas: Canvas, identity: Identity) -> None:
    cloth = COLOURS[identity.hat_colour]
    dark, light = mix(cloth, BLACK, 0.32), mix(cloth, WHITE, 0.12)
    crown = curve(mirrored([(0.0, -0.68), (0.24, -0.63), (0.4, -0.42), (0.42, -0.25), (0.2, -0.25), (0.0, -0.26)]))
    canvas.shade(crown, dark, light, (-0.1, -0.5), steps=8)
    if identity.hat == "cap":
        brim = curve(mirrored([(0.0, -0.34), (0.24, -0.32), (0.45, -0.21), (0.3, -0.2), (0.0, -0.23)]))
        canvas.fill(brim, mix(cloth, BLACK, 0.42))
    else:
        band = curve(mirrored([(0.0, -0.37), (0.3, -0.36), (0.43, -0.32), (0.43, -0.2), (0.3, -0.21), (0.0, -0.22)]))
        canvas.fill(band, mix(cloth, BLACK, 0.25))
        canvas.shade(oval(0, -0.69, 0.085, 0.075), dark, mix(cloth, WHITE, 0.3), (-0.02, -0.71), steps=3)
