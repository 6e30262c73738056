"""Where to cut a picture: a box of a bucket's aspect that holds every head box of the clip, without letterboxes. Pure geometry."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from stableavatar.config import setting

NAMED_SIZES = {"square": (512, 512), "vec": (480, 832), "rec": (832, 480)}
"""The released buckets, width and height; any other size is named WIDTHxHEIGHT."""
HEAD = (0.3, 0.55, 0.3, 0.15)
"""What of a head lies outside the face's box, left, above, right and below, in widths and heights of the face: hair, ears, chin."""
HEAD_HEIGHT = 0.42
"""Where the middle of the heads goes, as a share of the crop's height from the top, if the picture allows it."""
BLACK = 26
"""Grey level below which a pixel is black (10 %, as ffmpeg's blackdetect has it)."""
BLACK_SHARE = 0.98
"""Share of a line's pixels that are black if the line is part of a bar."""
THINNEST_BAR = 0.01
"""Share of the picture's side below which dark lines are an edge, no bar."""

Box = tuple[float, float, float, float]
"""x0, y0, x1, y1, in pixels unless said otherwise."""


@dataclass
class ClipConfig:
    fps: float = setting(25.0, "pictures a second of the clips; the model was trained on 25", low=1, high=120)
    buckets: str = setting("square,vec,rec", "sizes of the clips, separated by commas: square (512x512), vec (480x832), rec (832x480) or "
                           "any WIDTHxHEIGHT; each clip goes to the one that keeps the most of its picture")
    heads: str = setting("main", "what stays inside for the whole clip: the main person's head, all heads, or none (the middle is kept and "
                         "no face is looked for)", choices=("main", "all", "none"))
    margin: float = setting(1.0, "room for a head around its face: 0 for none beyond the face's box, 1 for a whole head", low=0, high=5)
    face_height: float = setting(0.2, "the crop is tightened until the face takes this share of its height, as far as it can be; 0 keeps "
                                 "the largest crop", low=0, high=1)
    upsampling: float = setting(1.25, "a crop may be enlarged this much at most to reach its bucket's size", low=1, high=100)
    looks: float = setting(5.0, "pictures a second in which faces and black bars are looked for", low=0.1, high=120)
    crf: int = setting(12, "quality of sub_clip.mp4 as x264 counts it: 0 is lossless, 12 near it, 23 loses details", low=0, high=51)


@dataclass(frozen=True)
class Crop:
    """A part of a picture (even pixels) and the size that it is scaled to."""

    x: int
    y: int
    width: int
    height: int
    to_width: int
    to_height: int

    @property
    def bucket(self) -> str:
        """Name of the folder for clips of this size."""
        return bucket_name(self.to_width, self.to_height)


def bucket_name(width: int, height: int) -> str:
    """Name of the folder for clips of a size."""
    return next((name for name, size in NAMED_SIZES.items() if size == (width, height)), f"{width}x{height}")


def bucket_sizes(buckets: str) -> list[tuple[int, int]]:
    """(width, height) of each of the named buckets, each once; ValueError for one that is not known or has odd sides."""
    sizes = []
    for name in filter(None, (word.strip() for word in buckets.split(","))):
        width, _, height = name.partition("x")
        if name not in NAMED_SIZES and not (width.isdecimal() and height.isdecimal()):
            raise ValueError(f"clip.buckets must be of {', '.join(NAMED_SIZES)} or WIDTHxHEIGHT, got {name!r}")
        size = NAMED_SIZES.get(name) or (int(width), int(height))
        if min(size) < 16 or size[0] % 2 or size[1] % 2:
            raise ValueError(f"the sides of a bucket must be even and at least 16 pixels, got {name!r} in clip.buckets")
        sizes.append(size)
    if not sizes:
        raise ValueError(f"clip.buckets names no size, got {buckets!r}; give such as square,vec,rec")
    return list(dict.fromkeys(sizes))


def head_box(face: Box, margin: float) -> Box:
    """The head around a face's box."""
    x0, y0, x1, y1 = face
    left, above, right, below = (margin * share * side for share, side in zip(HEAD, (x1 - x0, y1 - y0) * 2))
    return x0 - left, y0 - above, x1 + right, y1 + below


def union(boxes: Sequence[Box]) -> Box:
    """The smallest box around all."""
    sides = np.asarray(boxes)
    return (*sides[:, :2].min(0).tolist(), *sides[:, 2:].max(0).tolist())


def meet(box: Box, other: Box) -> Box:
    """What two boxes share (of no area where they do not meet)."""
    x0, y0 = max(box[0], other[0]), max(box[1], other[1])
    return x0, y0, max(x0, min(box[2], other[2])), max(y0, min(box[3], other[3]))


def content_box(brightest: np.ndarray) -> Box:
    """The picture without its black bars, in 0..1 of width and height; all of it where nothing else would be left.

    Args:
        brightest: uint8 [H, W], the highest grey level of each pixel over a clip.
    """
    dark = brightest < BLACK
    top, bottom = _bars(dark.mean(1) >= BLACK_SHARE)
    left, right = _bars(dark[top : len(dark) - bottom].mean(0) >= BLACK_SHARE)
    height, width = dark.shape
    return left / width, top / height, 1 - right / width, 1 - bottom / height


def _bars(black: np.ndarray) -> tuple[int, int]:
    """Lines of the bars at both ends; one line more than is black, as a bar's edge is soft."""
    lit = np.flatnonzero(~black)
    if not len(lit):
        return 0, 0
    least = THINNEST_BAR * len(black)
    return tuple(int(bar) + 1 if bar > least else 0 for bar in (lit[0], len(black) - 1 - lit[-1]))


def choose_crop(content: Box, heads: Box | None, face_height: float, config: ClipConfig) -> Crop:
    """The crop of the bucket that keeps the most of the picture.

    Args:
        content: the picture without its bars, pixels of the source.
        heads: around every head box of the clip; None where none has to stay inside.
        face_height: height of the face, pixels; 0 where there is none.

    Raises:
        ValueError: no bucket's crop holds the heads, or each would have to be enlarged too much.
    """
    outer = _even(content)
    inner = None if heads is None else meet(_even(heads, outwards=True), outer)
    found, reasons = [], []
    for size in bucket_sizes(config.buckets):
        try:
            found.append(_fit(outer, inner, size, face_height, config))
        except ValueError as error:
            reasons.append(f"{bucket_name(*size)}: {error}")
    if not found:
        raise ValueError(f"no bucket fits ({'; '.join(reasons)}); allow more clip.upsampling, less clip.margin or other clip.buckets")
    width, height = outer[2] - outer[0], outer[3] - outer[1]
    return max(found, key=lambda crop: _kept(width, height, crop))


def _kept(width: float, height: float, crop: Crop) -> float:
    """Share of a picture that the largest crop of this aspect keeps."""
    aspect = crop.to_width / crop.to_height * height / width
    return min(aspect, 1 / aspect)


def _even(box: Box, outwards: bool = False) -> Box:
    """The nearest box within, or around, whose sides are even and lie at even places."""
    rounds = (math.floor, math.floor, math.ceil, math.ceil) if outwards else (math.ceil, math.ceil, math.floor, math.floor)
    return tuple(2 * to_even(side / 2) for to_even, side in zip(rounds, box))


def _fit(outer: Box, inner: Box | None, size: tuple[int, int], face_height: float, config: ClipConfig) -> Crop:
    """The crop for one bucket, which lies in `outer` and holds `inner` (both even); ValueError (a few words) where there is none."""
    room = _scale(outer, size, min)
    if room * config.upsampling < 1:
        raise ValueError(f"a picture of {_size(outer)} would be enlarged {1 / room:.2f} times")
    held = _scale(inner, size, max) if inner else 0.0
    if held > room:
        raise ValueError(f"the heads take {_size(inner)}, a crop has at most {size[0] * room:.0f}x{size[1] * room:.0f}")
    wanted = face_height / (config.face_height * size[1]) if config.face_height and face_height else room
    scale = min(room, max(wanted, held, 1 / config.upsampling))
    width, height = (min(2 * round(side * scale / 2), int(outer[axis + 2] - outer[axis])) for axis, side in enumerate(size))
    x, y = (_place(axis, length, outer, inner) for axis, length in enumerate((width, height)))
    return Crop(x, y, width, height, *size)


def _scale(box: Box, size: tuple[int, int], choose: Callable[[float, float], float]) -> float:
    """How many times as wide and as high as a bucket a box is: the smaller or the larger of the two."""
    return choose((box[2] - box[0]) / size[0], (box[3] - box[1]) / size[1])


def _size(box: Box) -> str:
    return f"{box[2] - box[0]:.0f}x{box[3] - box[1]:.0f}"


def _place(axis: int, length: int, outer: Box, inner: Box | None) -> int:
    """Where a stretch of even length starts along an axis, within `outer` and around `inner`."""
    low, high = outer[axis], outer[axis + 2] - length
    share, box = (0.5, outer) if inner is None else ((0.5, HEAD_HEIGHT)[axis], inner)
    if inner is not None:
        low, high = max(low, inner[axis + 2] - length), min(high, inner[axis])
    wanted = 2 * round(((box[axis] + box[axis + 2]) / 2 - share * length) / 2)
    return int(min(max(wanted, low), high))
