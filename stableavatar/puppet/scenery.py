"""What is behind and below a puppet's head: the background, which never moves, and the body."""

import cv2
import numpy as np

from stableavatar.puppet.drawing import INK, Canvas, curve, mirrored, oval
from stableavatar.puppet.identity import COLOURS, WALLS, Colour, Identity, mix, pick

BLACK: Colour = (20, 16, 26)
WHITE: Colour = (255, 255, 255)


def background(identity: Identity, width: int, height: int, blur: float) -> np.ndarray:
    """uint8 [height, width, 3]; `blur` (pixels) softens a puppet's surroundings like a lens does."""
    wall = WALLS[identity.background_colour]
    pixels = gradient(mix(wall, WHITE, 0.12), mix(wall, BLACK, 0.14), width, height)
    unit = min(width, height)
    canvas = Canvas(pixels, np.array([[unit, 0, width / 2], [0, unit, height / 2]], dtype=np.float64))
    painter = {"gradient": _backdrop, "window": _window, "bookshelf": _books, "hills": _hills, "two-tone wall": _panel}
    if identity.background in painter:
        painter[identity.background](canvas, identity, (width / unit / 2, height / unit / 2))
    return pixels if identity.style == "cartoon" else cv2.GaussianBlur(pixels, (0, 0), blur)


def gradient(top: Colour, bottom: Colour, width: int, height: int) -> np.ndarray:
    """uint8 [height, width, 3], `top` above, `bottom` below."""
    part = np.linspace(0, 1, height)[:, None, None]
    rows = np.array(top) * (1 - part) + np.array(bottom) * part
    return np.ascontiguousarray(np.broadcast_to(rows, (height, width, 3)).astype(np.uint8))


def box(x0: float, y0: float, x1: float, y1: float) -> np.ndarray:
    """[4, 2] corners."""
    return np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]])


def _backdrop(canvas: Canvas, identity: Identity, half: tuple[float, float]) -> None:
    wall = WALLS[identity.background_colour]
    canvas.pixels[:] = gradient(mix(wall, WHITE, 0.35), mix(wall, BLACK, 0.38), canvas.pixels.shape[1], canvas.pixels.shape[0])


def _panel(canvas: Canvas, identity: Identity, half: tuple[float, float]) -> None:
    wall, edge = WALLS[identity.background_colour], 0.3 * identity.layout - 0.05
    canvas.fill(box(-half[0] - 1, edge, half[0] + 1, half[1] + 1), mix(wall, BLACK, 0.3), outline=False)
    canvas.fill(box(-half[0] - 1, edge - 0.025, half[0] + 1, edge + 0.01), mix(wall, WHITE, 0.55), outline=False)


def _window(canvas: Canvas, identity: Identity, half: tuple[float, float]) -> None:
    side = -1 if identity.layout < 0.5 else 1
    x, y, rx, ry = side * (half[0] - 0.16), -0.12, 0.2, 0.27
    canvas.fill(box(x - rx - 0.03, y - ry - 0.03, x + rx + 0.03, y + ry + 0.03), (240, 236, 226), outline=False)
    for step in range(8):
        top = y - ry + step * ry / 4
        canvas.fill(box(x - rx, top, x + rx, y + ry), mix((120, 178, 226), (214, 234, 242), step / 7), outline=False)
    canvas.fill(box(x - 0.012, y - ry, x + 0.012, y + ry), (240, 236, 226), outline=False)
    canvas.fill(box(x - rx, y - 0.012, x + rx, y + 0.012), (240, 236, 226), outline=False)


def _books(canvas: Canvas, identity: Identity, half: tuple[float, float]) -> None:
    """Shelves with broad, muted backs of books."""
    rng, wood = np.random.default_rng(int(identity.layout * 1e6)), (112, 80, 58)
    canvas.fill(box(-half[0] - 1, -half[1] - 1, half[0] + 1, half[1] + 1), (74, 54, 44), outline=False)
    for top in np.arange(-half[1] - 0.12, half[1], 0.32):
        x = -half[0]
        while x < half[0]:
            thick, tall = rng.uniform(0.05, 0.09), rng.uniform(0.2, 0.27)
            book = mix(COLOURS[pick(rng, tuple(COLOURS))], (90, 70, 64), 0.35)
            canvas.fill(box(x, top + 0.3 - tall, x + thick - 0.008, top + 0.3), book, outline=False)
            x += thick
        canvas.fill(box(-half[0] - 1, top + 0.28, half[0] + 1, top + 0.32), wood, outline=False)


def _hills(canvas: Canvas, identity: Identity, half: tuple[float, float]) -> None:
    canvas.pixels[:] = gradient((118, 182, 230), (226, 238, 240), canvas.pixels.shape[1], canvas.pixels.shape[0])
    side = -1 if identity.layout < 0.5 else 1
    canvas.fill(oval(side * (half[0] - 0.16), -half[1] + 0.16, 0.07, 0.07), (255, 240, 186), outline=False)
    for y, x, colour in ((0.16, side * 0.5, (142, 186, 142)), (0.26, -side * 0.45, (112, 164, 110)), (0.4, side * 0.3, (86, 142, 88))):
        canvas.fill(oval(x, y + 0.5, half[0] + 0.55, 0.5 + 0.1 * half[1]), colour, outline=False)
        canvas.fill(box(-half[0] - 1, y + 0.36, half[0] + 1, half[1] + 1), colour, outline=False)


TORSO = curve(mirrored([(0.13, 0.6), (0.3, 0.7), (0.58, 0.8), (0.74, 1.0), (0.72, 1.5), (0.68, 2.2), (0.66, 2.7)]))
NECK = curve(mirrored([(0.13, 0.2), (0.135, 0.5), (0.17, 0.66), (0.15, 0.78), (0.0, 0.82)]), samples=4)
HAND_PATH = curve(np.array([[0.8, 2.25], [0.5, 1.5], [1.0, 0.92]]), closed=False, samples=16)
SHOULDER, ELBOW = (0.64, 0.98), (0.84, 1.5)


def draw_body(canvas: Canvas, identity: Identity) -> None:
    """Neck and clothes; the canvas is placed on the body."""
    cloth, skin = COLOURS[identity.clothes_colour], identity.skin
    canvas.shade(TORSO, mix(cloth, BLACK, 0.2), mix(cloth, WHITE, 0.05), (-0.05, 1.3), steps=12)
    canvas.fill(NECK, mix(skin, BLACK, 0.1), outline=False)
    for side in (-1, 1) if canvas.outline else ():
        canvas.line(np.array([[0.131, 0.35], [0.135, 0.52], [0.17, 0.65]]) * (side, 1), canvas.outline, INK)
    _draw_chin_shadow(canvas, skin)
    {"t-shirt": _tee, "shirt": _shirt, "striped sweater": _stripes, "hoodie": _hoodie, "v-neck sweater": _v_neck}[identity.clothes](
        canvas, cloth, skin
    )


def _draw_chin_shadow(canvas: Canvas, skin: Colour) -> None:
    for step in range(1, 8):
        low = 0.68 - 0.02 * step
        shadow = curve(mirrored([(0.127, 0.4), (0.131, low - 0.07), (0.0, low)]), samples=4)
        canvas.fill(shadow, mix(skin, BLACK, 0.1 + 0.04 * step), outline=False)


def draw_arms(canvas: Canvas, identity: Identity, hands: tuple[float, float]) -> None:
    """Arms with raised hands (left and right in the picture, 0 .. 1 each)."""
    cloth = COLOURS[identity.clothes_colour]
    sleeve, edge = mix(cloth, BLACK, 0.1), mix(cloth, BLACK, 0.38)
    for side, raised in zip((-1, 1), hands):
        place = raised * (len(HAND_PATH) - 1)
        hand = np.array([np.interp(place, np.arange(len(HAND_PATH)), HAND_PATH[:, axis]) for axis in (0, 1)]) * (side, 1)
        arm = np.array([SHOULDER, ELBOW]) * (side, 1)
        wrist = hand + 0.2 * (arm[1] - hand)
        limb = curve(np.array([*arm, wrist]), closed=False)
        canvas.line(limb, 0.27, edge)
        canvas.line(limb, 0.27 - 2 * max(canvas.outline, 0.014), sleeve)
        _draw_hand(canvas, identity.skin, hand, hand - wrist)


def _draw_hand(canvas: Canvas, skin: Colour, hand: np.ndarray, towards: np.ndarray) -> None:
    along = towards / max(float(np.hypot(*towards)), 1e-6)
    across, inner = np.array([-along[1], along[0]]), -np.sign(hand[0])
    turn = np.stack([across, along])
    palm = curve(np.array([[-0.075, -0.1], [-0.1, 0.03], [-0.07, 0.15], [0.0, 0.18], [0.07, 0.15], [0.1, 0.03], [0.075, -0.1]]), samples=4)
    thumb = oval(0, 0, 0.036, 0.075) + (0.1 * inner * np.sign(across[0] or 1), 0.02)
    canvas.fill(hand + thumb @ turn, mix(skin, BLACK, 0.08))
    canvas.shade(hand + palm @ turn, mix(skin, BLACK, 0.14), mix(skin, WHITE, 0.08), tuple(hand), steps=4)


def _tee(canvas: Canvas, cloth: Colour, skin: Colour) -> None:
    collar = curve(np.array([[-0.2, 0.66], [-0.13, 0.79], [0, 0.83], [0.13, 0.79], [0.2, 0.66]]), closed=False)
    canvas.line(collar, 0.05, mix(cloth, BLACK, 0.25))


def _shirt(canvas: Canvas, cloth: Colour, skin: Colour) -> None:
    light = mix(cloth, WHITE, 0.35)
    for side in (-1, 1):
        canvas.fill(np.array([[0.17, 0.58], [0.24, 0.68], [0.17, 0.92], [0.0, 0.8]]) * (side, 1), light)
    canvas.line(np.array([[0, 0.82], [0, 2.7]]), 0.025, mix(cloth, BLACK, 0.3))
    for y in np.arange(1.0, 2.3, 0.22):
        canvas.ellipse(0.045, y, 0.022, 0.022, light)


def _stripes(canvas: Canvas, cloth: Colour, skin: Colour) -> None:
    light = mix(cloth, WHITE, 0.6) if sum(cloth) < 560 else mix(cloth, (80, 100, 150), 0.6)
    for y in np.arange(0.98, 2.5, 0.24):
        reach = float(np.interp(y, [0.8, 1.0, 1.5, 2.2], [0.56, 0.71, 0.69, 0.65]))
        canvas.line(curve(np.array([[-reach, y - 0.02], [0, y + 0.03], [reach, y - 0.02]]), closed=False), 0.085, light)
    _tee(canvas, mix(light, cloth, 0.2), skin)


def _hoodie(canvas: Canvas, cloth: Colour, skin: Colour) -> None:
    for side in (-1, 1):
        hood = curve(np.array([[0.14, 0.5], [0.3, 0.62], [0.27, 0.8], [0.06, 0.95], [0.0, 0.84], [0.15, 0.7]]) * (side, 1))
        canvas.fill(hood, mix(cloth, BLACK, 0.2))
        canvas.line(np.array([[0.09, 0.9], [0.1, 1.2]]) * (side, 1), 0.03, mix(cloth, WHITE, 0.7))


def _v_neck(canvas: Canvas, cloth: Colour, skin: Colour) -> None:
    neck = np.array([[-0.19, 0.64], [0.0, 0.97], [0.19, 0.64]])
    canvas.fill(np.concatenate([neck, [[0, 0.5]]]), mix(skin, BLACK, 0.1), outline=False)
    _draw_chin_shadow(canvas, skin)
    canvas.line(neck, 0.055, mix(cloth, BLACK, 0.3))
