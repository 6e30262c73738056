"""Which stretches of a raw file become clips: within one shot, neither black nor still, with sound, of a length in range.

The file is decoded once, small, on the grid of times of the clips to come, so that a boundary between two frames of the grid is exact.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from stableavatar.config import setting
from stableavatar.data.preparation.crops import BLACK
from stableavatar.data.preparation.decoding import grid_frames, read_frames
from stableavatar.data.preparation.records import Segment, Source
from stableavatar.geometry import FPS, WINDOW_FRAMES

if TYPE_CHECKING:
    from scenedetect import SceneDetector

LOOK_SIZE = 256
"""Long side in pixels at which shots are told apart (scenedetect's own choice)."""
BLOCK = 8
"""Side of the blocks of that picture whose change is told: about a mouth in a half-body framing."""
STILL = 1.0
"""Grey levels by which no block of a picture that stands still changes; a codec's noise stays below."""


@dataclass
class CutConfig:
    detector: str = setting("adaptive", "scenedetect's detector of shot boundaries: adaptive compares a change with those around it, "
                            "content with a fixed threshold, none trusts the files or the annotations",
                            choices=("adaptive", "content", "none"))
    threshold: float = setting(0.0, "of the detector; 0 for scenedetect's own (adaptive 3, content 27)", low=0)
    min_seconds: float = setting(WINDOW_FRAMES / FPS, "shortest clip; the model trains on 81 frames, 3.24 s at 25 fps", low=0.04)
    max_seconds: float = setting(20.0, "longest clip; a longer stretch is divided evenly", low=0.04)
    trim: int = setting(2, "frames left out at both ends of a shot, which may be blended or beyond the detector's sight", low=0, high=100)
    black: float = setting(0.98, "share of dark pixels from which on a picture is black and left out; 0 for off", low=0, high=1)
    still_seconds: float = setting(2.0, "a picture that stands still this long is left out; 0 for off", low=0)


@dataclass(frozen=True)
class Marks:
    """What was seen of each frame of the grid.

    Attributes:
        shots: first frame of every shot, 0 among them, and the number of frames at the end.
        black, still: bool [frames].
    """

    shots: list[int]
    black: np.ndarray
    still: np.ndarray


def find_segments(source: Source, path: Path, annotated: Sequence[Segment], fps: float, config: CutConfig) -> dict[str, Any]:
    """The stretches of a file that become clips, as JSON values.

    Args:
        annotated: stretches that the table or an annotation file gives; empty for the whole file.
        fps: of the clips.

    Returns:
        shots: seconds at which shots begin; segments: fields of Segment each; dropped: reason -> seconds that are in no segment.

    Raises:
        ValueError: nothing can be decoded, or no stretch is left (with the reasons and their seconds).
    """
    marks = mark_frames(read_frames(source, path, fps, _look_size(source)), grid_frames(source, fps), fps, config)
    sound = source.sound_start, math.inf if source.sound_end is None else source.sound_end
    segments, dropped = [], dict.fromkeys(("no sound", "undecodable", "cuts", "black", "still", "too short"), 0)
    for wish in annotated or [Segment(source.id, 0.0, source.seconds)]:
        runs = _stretches(marks, (wish.start, wish.end), sound, fps, config, dropped)
        for first, last in (part for run in runs for part in divide(*run, math.floor(config.max_seconds * fps + 1e-6))):
            segments.append(asdict(wish) | {"start": first / fps, "end": last / fps})
    seconds = {reason: round(frames / fps, 3) for reason, frames in dropped.items() if frames}
    if not segments:
        lost = ", ".join(f"{reason} {length:.2f} s" for reason, length in seconds.items())
        raise ValueError(f"{source.path} gives no clip: no stretch of {config.min_seconds:g} s is left ({lost})")
    return {"shots": [shot / fps for shot in marks.shots[:-1]], "segments": segments, "dropped": seconds}


def _look_size(source: Source) -> tuple[int, int]:
    scale = LOOK_SIZE / max(source.width, source.height)
    return tuple(max(BLOCK, round(side * scale)) for side in (source.width, source.height))


def mark_frames(frames: Iterator[np.ndarray], expected: int, fps: float, config: CutConfig) -> Marks:
    """Looks at every frame (uint8 [H, W, 3] RGB) once; frames beyond the expected number are not looked at."""
    from scenedetect import FrameTimecode  # with OpenCV's and its own backends, which the other steps need not wait for

    detector = _detector(config)
    cuts, black, change, before = [], [], [], None
    for number, frame in enumerate(frames):
        if number == expected:
            break
        grey = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)
        blocks = cv2.resize(grey.astype(np.float32), (grey.shape[1] // BLOCK, grey.shape[0] // BLOCK), interpolation=cv2.INTER_AREA)
        black.append(bool(config.black) and float((grey < BLACK).mean()) >= config.black)
        change.append(np.inf if before is None else float(np.abs(blocks - before).max()))
        before = blocks
        if detector is not None:
            cuts += detector.process_frame(FrameTimecode(number, float(fps)), np.ascontiguousarray(frame[..., ::-1]))
    shots = sorted({0, *(cut.frame_num for cut in cuts), len(black)})
    return Marks(shots, np.array(black, bool), still_frames(np.array(change), fps, config.still_seconds))


def _detector(config: CutConfig) -> "SceneDetector | None":
    from scenedetect import AdaptiveDetector, ContentDetector

    threshold = [config.threshold] if config.threshold else []
    # Every boundary is wanted, however near to the last.
    kinds = {"adaptive": AdaptiveDetector, "content": ContentDetector}
    return kinds[config.detector](*threshold, min_scene_len=0) if config.detector in kinds else None


def still_frames(change: np.ndarray, fps: float, still_seconds: float) -> np.ndarray:
    """Which frames belong to a picture that stands still for at least so long (0: none do), bool [frames].

    Args:
        change: float [frames], by how many grey levels each frame's most changed block differs from the frame before.
    """
    still = np.zeros(len(change), bool)
    for first, last in runs_of(change < STILL):
        if still_seconds and last - first + 1 >= still_seconds * fps:
            still[first - 1 : last] = True
    return still


def runs_of(flags: np.ndarray) -> list[tuple[int, int]]:
    """First and one past the last index of every run of True."""
    edges = np.flatnonzero(np.diff(np.r_[False, flags, False]))
    return [(int(first), int(last)) for first, last in zip(edges[::2], edges[1::2])]


def _stretches(
    marks: Marks, wish: tuple[float, float], sound: tuple[float, float], fps: float, config: CutConfig, dropped: dict[str, int]
) -> list[tuple[int, int]]:
    """Frames (first, one past the last) of the usable stretches of a wished one (seconds); adds the others to `dropped`."""
    first, last = (round(side * fps) for side in wish)
    frames = np.arange(first, last)
    ends = np.asarray(marks.shots)
    near_cut = np.zeros(len(marks.black) + 1, bool)
    for end in ends:
        near_cut[max(0, end - config.trim) : end + config.trim] = True
    known = frames < len(marks.black)
    seen = np.minimum(frames, len(marks.black) - 1)
    free = np.ones(len(frames), bool)
    for reason, lost in [
        ("no sound", (frames < math.floor(sound[0] * fps + 0.5)) | (frames + 0.5 > sound[1] * fps)),
        ("undecodable", ~known),
        ("black", known & marks.black[seen]),
        ("still", known & marks.still[seen]),
        ("cuts", known & near_cut[seen]),
    ]:
        dropped[reason] += int((free & lost).sum())
        free &= ~lost
    shot = np.searchsorted(ends, frames, side="right")
    runs = [(int(frames[a]), int(frames[b - 1]) + 1) for number in np.unique(shot) for a, b in runs_of(free & (shot == number))]
    long = [run for run in runs if run[1] - run[0] >= config.min_seconds * fps - 1e-6]
    dropped["too short"] += sum(b - a for a, b in runs) - sum(b - a for a, b in long)
    return long


def divide(first: int, last: int, longest: int) -> list[tuple[int, int]]:
    """A stretch of frames in parts of nearly equal length, none longer than `longest`."""
    parts = math.ceil((last - first) / longest)
    sides = [first + (last - first) * part // parts for part in range(parts + 1)]
    return list(zip(sides, sides[1:]))
