"""The pictures of a raw file on an even grid of times, whatever its own rate, rotation, pixel shape and range are.

Frame k of the grid is at k / fps seconds after the file's first picture. Of a faster file it shows the picture nearest in time; each
picture of a slower one begins at the grid's time nearest to its own and stays until the next. So picture and sound are never apart by more
than half a step of the grid.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stableavatar import ffmpeg
from stableavatar.data.preparation.records import Source

LOOK_BACK = 2.0
"""Seconds to decode before a stretch: codecs need earlier pictures, and sound settles in."""
LOOK_BACK_UNEVEN = 10.0
"""The same where the picture that is shown at a time may have come long before (longer ones are stills, which no clip holds)."""


def grid_frames(source: Source, fps: float) -> int:
    """Frames of the grid that the picture lasts (containers round its times, so that it may seem to end a little before the last)."""
    return max(1, int(source.seconds * fps + 0.1))


@dataclass(frozen=True)
class Entry:
    """Where a file is entered, early enough to know all that is shown and heard from a time on.

    Attributes:
        arguments: ffmpeg's, for the input; times then are those of the file's own clock (others would depend on the streams in use).
        clock, at: what that clock shows where the file is entered, and at the time that is wanted.
    """

    arguments: list[str]
    clock: float
    at: float


def entry(source: Source, path: Path, begin: float) -> Entry:
    """The entry for `begin` seconds after the first picture."""
    at = source.start + begin
    clock = max(source.clock_start, at - (LOOK_BACK if source.even else LOOK_BACK_UNEVEN))
    seek = ["-ss", f"{clock - source.clock_start:.6f}"] if clock > source.clock_start else []
    return Entry(["-copyts", "-threads", "1", *seek, *ffmpeg.file_input(path)], clock, at)


def grid_filter(source: Source, fps: float, at: float) -> str:
    """ffmpeg filters that put pictures onto the grid whose frame 0 is where the file's clock shows `at`.

    The filter `fps` shows the last picture up to half a grid step after a time, which of a faster file is a late one; moved by half the
    difference of the steps it is the nearest. Cameras and screens that give uneven pictures take them from an even grid, `source.fps`.
    """
    nearest = max(0.0, 0.5 / fps - 0.5 / source.fps)
    filters = [source.filters, f"setpts=PTS+{nearest - at:.9f}/TB", f"fps={fps!r}:start_time=0"]
    return ",".join(filter(None, filters))


def read_frames(
    source: Source, path: Path, fps: float, size: tuple[int, int], start: float = 0.0, frames: int | None = None
) -> Iterator[np.ndarray]:
    """Pictures of the grid from `start` seconds on, uint8 [height, width, 3] RGB, one at a time; `frames` None for all to the end.

    What is damaged is shown as ffmpeg guesses it; cutting refuses it (see `cutting`).

    Args:
        size: (width, height) to scale to.

    Raises:
        ValueError: nothing can be decoded.
    """
    place = entry(source, path, start)
    chain = f"{grid_filter(source, fps, place.at)},scale={size[0]}:{size[1]}:flags=area"
    limit = [] if frames is None else ["-frames:v", str(frames)]
    yield from ffmpeg.raw_frames([*place.arguments, *limit, "-map", "0:V:0", "-vf", chain], *size, lambda count, why: (
        None if count else f"cannot decode video {source.path}: {why}"
    ))
