"""Who is seen in a puppet clip: everything that stays the same from the first frame to the last."""

from dataclasses import dataclass, fields
from typing import TypeVar

import numpy as np

Colour = tuple[int, int, int]
"""RGB, 0 .. 255."""
Choice = TypeVar("Choice")

STYLES = ("puppet", "cartoon")
FRAMINGS = ("close", "bust", "half")
KINDS = {"speech": "talking", "singing": "singing", "dancing": "dancing"}
SKINS: tuple[Colour, ...] = (
    (250, 219, 198), (243, 201, 172), (231, 184, 148), (213, 158, 118), (186, 128, 90), (152, 98, 66), (118, 76, 54), (92, 60, 46),
)  # fmt: skip
HAIR_COLOURS: dict[str, Colour] = {
    "black": (44, 38, 42), "dark brown": (78, 50, 38), "brown": (122, 78, 48), "red": (178, 76, 40),
    "blond": (226, 184, 104), "grey": (158, 158, 164), "white": (230, 228, 222), "pink": (224, 120, 160), "blue": (70, 104, 176),
}  # fmt: skip
EYE_COLOURS: dict[str, Colour] = {"brown": (96, 58, 32), "blue": (62, 122, 186), "green": (70, 132, 82), "grey": (104, 120, 132)}
COLOURS: dict[str, Colour] = {
    "red": (198, 62, 58), "orange": (228, 136, 62), "yellow": (236, 196, 84), "green": (88, 150, 98), "teal": (52, 140, 144),
    "blue": (70, 112, 186), "navy": (44, 58, 100), "purple": (122, 88, 164), "pink": (226, 146, 166), "white": (236, 234, 228),
    "grey": (128, 134, 142), "brown": (142, 102, 74),
}  # fmt: skip
WALLS: dict[str, Colour] = {
    "green": (146, 182, 142), "blue": (138, 176, 206), "beige": (222, 204, 174), "pink": (226, 180, 178), "grey": (168, 172, 178),
    "purple": (174, 158, 200), "yellow": (232, 208, 136), "teal": (112, 172, 170), "dark blue": (62, 80, 118), "white": (226, 228, 228),
}  # fmt: skip
HAIR = {
    "woman": ("long", "bob", "curly", "bun", "ponytail", "fringe", "short"),
    "man": ("short", "parted", "bald", "buzzed", "curly", "spiky", "long"),
}
FACES = ("round", "oval", "square", "long", "heart")
NOSES = ("button", "straight", "wide")
BROWS = ("arched", "straight", "round")
GLASSES = ("none", "round", "square")
BEARDS = ("none", "moustache", "goatee", "full beard")
UNDER_HAT = {"curly": "short", "parted": "short", "fringe": "long"}
"""What a hairstyle looks like below a hat."""
HATS = ("none", "cap", "beanie")
CLOTHES = ("t-shirt", "shirt", "striped sweater", "hoodie", "v-neck sweater")
BACKGROUNDS = ("plain wall", "gradient", "window", "bookshelf", "hills", "two-tone wall")


@dataclass(frozen=True)
class Identity:
    """Names are keys of this module's tables; numbers are relative to the default figure (1) unless said otherwise."""

    style: str
    framing: str
    gender: str
    skin: Colour
    lips: Colour
    hair_style: str
    hair_colour: str
    face_shape: str
    eye_colour: str
    eye_size: float
    eye_distance: float
    brow_shape: str
    brow_thickness: float
    nose_shape: str
    nose_size: float
    mouth_size: float
    lip_fullness: float
    glasses: str
    beard: str
    hat: str
    hat_colour: str
    earrings: bool
    clothes: str
    clothes_colour: str
    background: str
    background_colour: str
    layout: float
    """0 .. 1: where things in the background stand, on which side a parting lies."""

    def code(self) -> np.ndarray:
        """Ground truth of the identity: float32 vector of one-hot names, colours / 255 and numbers, in the order of the fields."""
        return np.concatenate([np.atleast_1d(_encode(field.name, getattr(self, field.name))) for field in fields(self)]).astype(np.float32)

    def prompt(self, kind: str) -> str:
        """One sentence that says truthfully what is seen. Raises ValueError for an unknown kind."""
        if kind not in KINDS:
            raise ValueError(f"kind is {kind!r}, expected one of {', '.join(KINDS)}")
        who = f"a cartoon {self.gender}" if self.style == "cartoon" else f"a {self.gender}"
        worn = f", wearing {_join(self._worn())}," if self._worn() else ""
        return f"{who} with {_join(self._features())}{worn} is {KINDS[kind]} in front of {self._place()}"

    def _features(self) -> list[str]:
        hair = {"bald": "a bald head", "fringe": f"long {self.hair_colour} hair and a fringe", "bob": f"a {self.hair_colour} bob",
                "ponytail": f"a {self.hair_colour} ponytail", "bun": f"{self.hair_colour} hair in a bun"}  # fmt: skip
        found = [hair.get(self.hair_style, f"{self.hair_style} {self.hair_colour} hair")]
        found += [f"a {self.beard}"] * (self.beard != "none") + [f"{self.glasses} glasses"] * (self.glasses != "none")
        return found + ["earrings"] * self.earrings

    def _worn(self) -> list[str]:
        """A close picture ends at the neck."""
        hat = [] if self.hat == "none" else [f"{_article(self.hat_colour)} {self.hat}"]
        return hat if self.framing == "close" else [*hat, f"{_article(self.clothes_colour)} {self.clothes}"]

    def _place(self) -> str:
        if self.background in ("plain wall", "window", "two-tone wall"):
            wall = "two-tone wall" if self.background == "two-tone wall" else "wall"
            return f"{_article(self.background_colour)} {wall}" + " with a window" * (self.background == "window")
        return {"bookshelf": "a bookshelf", "hills": "green hills"}.get(self.background, f"{_article(self.background_colour)} backdrop")


NAMES: dict[str, tuple[str, ...]] = {
    "style": STYLES, "framing": FRAMINGS, "gender": tuple(HAIR), "hair_style": tuple(sorted({*HAIR["woman"], *HAIR["man"]})),
    "hair_colour": tuple(HAIR_COLOURS), "face_shape": FACES, "eye_colour": tuple(EYE_COLOURS), "brow_shape": BROWS,
    "nose_shape": NOSES, "glasses": GLASSES, "beard": BEARDS, "hat": HATS, "hat_colour": tuple(COLOURS), "clothes": CLOTHES,
    "clothes_colour": tuple(COLOURS), "background": BACKGROUNDS, "background_colour": tuple(WALLS),
}  # fmt: skip


def draw_identity(seed: int, style: str | None = None, framing: str | None = None) -> Identity:
    """The person that belongs to a seed; a style or framing that is given does not change the rest of them.

    Raises:
        ValueError: unknown style or framing.
    """
    for name, value, known in (("style", style, STYLES), ("framing", framing, FRAMINGS)):
        if value is not None and value not in known:
            raise ValueError(f"{name} is {value!r}, expected one of {', '.join(known)}")
    rng = np.random.default_rng([seed, 1])
    drawn_style, drawn_framing = "cartoon" if rng.random() < 0.25 else "puppet", pick(rng, FRAMINGS, (0.45, 0.4, 0.15))
    gender, skin = pick(rng, tuple(HAIR)), _jitter(rng, pick(rng, SKINS), 6)
    clothes_colour, wall = _apart(rng, skin)
    return Identity(
        style=style or drawn_style, framing=framing or drawn_framing, gender=gender, skin=skin, lips=_lips(rng, skin, gender),
        **_draw_head(rng, gender, skin), **_draw_features(rng),
        clothes=pick(rng, CLOTHES), clothes_colour=clothes_colour, background=pick(rng, BACKGROUNDS), background_colour=wall,
        layout=float(rng.random()),
    )  # fmt: skip


def pick(rng: np.random.Generator, items: tuple[Choice, ...], weights: tuple[float, ...] | None = None) -> Choice:
    """One of the items, drawn."""
    return items[int(rng.choice(len(items), p=weights))]


def mix(first: Colour, second: Colour, amount: float) -> Colour:
    """`first` at 0, `second` at 1."""
    return tuple(round(a + (b - a) * amount) for a, b in zip(first, second))  # type: ignore[return-value]


def lightness(colour: Colour) -> float:
    """Rec. 601 luma, 0 .. 255."""
    return 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]


def _draw_head(rng: np.random.Generator, gender: str, skin: Colour) -> dict:
    natural = tuple(HAIR_COLOURS)[:7] if lightness(skin) > 130 else ("black", "dark brown", "brown", "grey")
    colour = pick(rng, natural) if rng.random() < 0.92 else pick(rng, ("pink", "blue"))
    hair, man = pick(rng, HAIR[gender]), gender == "man"
    beard = pick(rng, BEARDS, (0.5, 0.15, 0.15, 0.2)) if man else "none"
    hat = pick(rng, ("cap", "beanie")) if rng.random() < 0.12 and hair not in ("bald", "bun", "ponytail", "spiky") else "none"
    if hat != "none":
        hair = UNDER_HAT.get(hair, hair)
    earrings = bool(rng.random() < (0.06 if man else 0.45)) and hair in ("short", "bun", "ponytail", "bald", "buzzed")
    return {"hair_style": hair, "hair_colour": colour, "beard": beard, "hat": hat, "hat_colour": pick(rng, tuple(COLOURS)),
            "earrings": earrings}  # fmt: skip


def _draw_features(rng: np.random.Generator) -> dict:
    def about_one(spread: float) -> float:
        return float(rng.uniform(1 - spread, 1 + spread))

    return {"face_shape": pick(rng, FACES), "eye_colour": pick(rng, tuple(EYE_COLOURS)), "eye_size": about_one(0.12),
            "eye_distance": about_one(0.07), "brow_shape": pick(rng, BROWS), "brow_thickness": about_one(0.3),
            "nose_shape": pick(rng, NOSES), "nose_size": about_one(0.2), "mouth_size": about_one(0.1),
            "lip_fullness": about_one(0.2), "glasses": pick(rng, GLASSES, (0.7, 0.15, 0.15))}  # fmt: skip


def _lips(rng: np.random.Generator, skin: Colour, gender: str) -> Colour:
    """Redder than the skin; on dark skin lighter than it, so that lips, skin and the dark inside of the mouth stay apart."""
    tone = (206, 70, 84) if lightness(skin) > 110 else (204, 104, 104)
    return mix(skin, tone, float(rng.uniform(0.6, 0.85) if gender == "woman" else rng.uniform(0.42, 0.55)))


def _apart(rng: np.random.Generator, skin: Colour) -> tuple[str, str]:
    """Names of a clothes colour and a wall colour that skin and one another stand out from."""

    def far(one: Colour, other: Colour) -> bool:
        return float(np.abs(np.subtract(one, other)).sum()) > 90

    wall = pick(rng, tuple(name for name, colour in WALLS.items() if far(colour, skin)))
    return pick(rng, tuple(name for name, colour in COLOURS.items() if far(colour, skin) and far(colour, WALLS[wall]))), wall


def _jitter(rng: np.random.Generator, colour: Colour, spread: int) -> Colour:
    return tuple(int(np.clip(part + rng.integers(-spread, spread + 1), 0, 255)) for part in colour)  # type: ignore[return-value]


def _encode(name: str, value: object) -> np.ndarray:
    if name in NAMES:
        return np.array([value == known for known in NAMES[name]], dtype=np.float32)
    return np.asarray(value, dtype=np.float32) / (255 if isinstance(value, tuple) else 1)


def _join(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
