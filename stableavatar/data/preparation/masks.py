"""Face and lip masks of every frame of a clip, and what the faces tell of it."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image
from tqdm import tqdm

from stableavatar.data.clips import MASKS, VIDEO, frame_file
from stableavatar.data.preparation.faces import Face, FaceFinder, Track, speaking_faces, track_faces
from stableavatar.data.preparation.pictures import Pictures, video_pictures
from stableavatar.data.preparation.records import ClipFolder
from stableavatar.data.preparation.settings import FaceConfig

OVAL = (10, 338, 297, 332, 284, 251, 389, 356, 454, 323, 361, 288, 397, 365, 379, 378, 400, 377,
        152, 148, 176, 149, 150, 136, 172, 58, 132, 93, 234, 127, 162, 21, 54, 103, 67, 109)  # fmt: skip
"""Landmarks around the face (mediapipe's FACEMESH_FACE_OVAL)."""
UPPER_LIP = (61, 185, 40, 39, 37, 0, 267, 269, 270, 409, 291)
LOWER_LIP = (61, 146, 91, 181, 84, 17, 314, 405, 321, 375, 291)
"""Landmarks along the outer edges of the lips, corner to corner: the two polygons of the released tool, with the mouth between them."""
DRAWN = OVAL + UPPER_LIP + LOWER_LIP
SUBPIXEL = 4
"""Bits of a pixel that polygons are drawn to."""


@dataclass(frozen=True, eq=False)
class Outline:
    """What is kept of a face in one frame, half a kilobyte: a clip may be long.

    Attributes:
        box, confidence, opening: as `Face` has them.
        points: float32 [58, 2] x y, pixels: the landmarks DRAWN.
    """

    box: np.ndarray
    confidence: float
    opening: float
    points: np.ndarray


def extract_masks(clip: ClipFolder, config: FaceConfig) -> dict[str, Any]:
    """Write face_masks/ and lip_masks/ of a clip that was cut.

    Returns, raises: as `write_masks`.
    """
    return write_masks(video_pictures(clip.folder / VIDEO), clip.folder, config)


def write_masks(pictures: Pictures, folder: Path, config: FaceConfig, progress: bool = False) -> dict[str, Any]:
    """Write folder/face_masks/frame_i.png and folder/lip_masks/frame_i.png: one of 0 and 255 for every picture, of its size.

    A face is the hull of its oval, seen from the side too; the lips are the two polygons of the released tool. Both folders take
    their places when they are whole. Memory does not grow with the pictures, only with half a kilobyte per face and frame.

    Args:
        progress: show it, with the time left.

    Returns:
        frames, missing ([first, last] of each run of frames with empty masks), missing_share, filled_share (frames with masks that
        were filled in), faces_median and faces_max (found in a frame), masked_faces (persons with masks), and of the main one:
        face_size (median height, of the picture's), confidence_mean, confidence_min, boxes (per frame x0 y0 x1 y1 in pixels, gaps
        filled, else null), mouth_opening (per frame, in heights of the face, null where it was not seen), mouth_movement (its
        standard deviation).

    Raises:
        ValueError: no face in any picture, a picture that cannot be read, masks that cannot be written.
    """
    found = find_outlines(pictures, config, progress)
    if not any(found):
        raise ValueError(f"no face in {pictures.path}: looked at its {len(found)} pictures; leave this clip out")
    limit = round(config.max_gap * pictures.fps)
    tracks = choose_tracks(track_faces(found), config.masked)
    filled = [fill_gaps(track, limit) for track in tracks]
    try:
        with _taking_place(folder, MASKS) as parts:
            for number in range(len(found)):
                shapes = [known[number].points for known in filled if number in known]
                for part, mask in zip(parts, draw_masks(shapes, pictures.width, pictures.height)):
                    Image.fromarray(mask).save(frame_file(part, number), compress_level=1)
    except OSError as error:
        raise ValueError(f"cannot write the masks of {folder}: {error.strerror or error}; choose a writable place with room") from None
    return _frame_values(found, tracks, filled) | _face_values(len(found), tracks[0], filled[0], pictures.height)


def find_outlines(pictures: Pictures, config: FaceConfig, progress: bool = False) -> list[list[Outline]]:
    """The faces of every picture, the largest first."""
    with FaceFinder(config.model, config.max_faces) as finder:
        bar = tqdm(pictures.read(), f"faces of {pictures.path.name}", pictures.frames, delay=2, disable=not progress)
        return [[_outline(face) for face in finder.find(pixels)] for pixels in bar]


def _outline(face: Face) -> Outline:
    return Outline(face.box, face.confidence, face.opening, face.landmarks[list(DRAWN)])


def choose_tracks(tracks: Sequence[Track[Outline]], masked: str) -> list[Track[Outline]]:
    """Those who get masks, the main one first."""
    speaking = speaking_faces(tracks)
    return {"speaking": speaking, "main": speaking[:1], "all": speaking + [track for track in tracks if track not in speaking]}[masked]


def fill_gaps(track: Track[Outline], limit: int) -> dict[int, Outline]:
    """Frame -> face: where it was seen, and in gaps of up to `limit` frames on straight lines between the sightings at their ends.

    Nothing is made up before the first sighting and after the last.
    """
    filled = dict(zip(track.frames, track.faces))
    for first, last in zip(track.frames, track.frames[1:]):
        for number in range(first + 1, last) if last - first - 1 <= limit else ():
            filled[number] = _between(filled[first], filled[last], (number - first) / (last - first))
    return filled


def _between(one: Outline, other: Outline, part: float) -> Outline:
    def mix(name: str) -> Any:
        return (1 - part) * getattr(one, name) + part * getattr(other, name)

    return Outline(*map(mix, ("box", "confidence", "opening", "points")))


def draw_masks(shapes: Sequence[np.ndarray], width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    """Face mask and lip mask of one picture, uint8 [height, width] of 0 and 255; the lips are part of the face.

    Args:
        shapes: of each face its points DRAWN, [58, 2].
    """
    face, lips = np.zeros((height, width), np.uint8), np.zeros((height, width), np.uint8)
    for points in shapes:
        oval, upper, lower = np.split(_fixed(points), [len(OVAL), len(OVAL) + len(UPPER_LIP)])
        cv2.fillConvexPoly(face, cv2.convexHull(oval), 255, shift=SUBPIXEL)
        for lip in (upper, lower):
            cv2.fillPoly(lips, [lip], 255, shift=SUBPIXEL)
    return face | lips, lips


def _fixed(points: np.ndarray) -> np.ndarray:
    """Points as whole numbers of 1/16 pixel; OpenCV counts from the middle of the first pixel, landmarks from its corner."""
    return np.round((points - 0.5) * (1 << SUBPIXEL)).astype(np.int32)


@contextmanager
def _taking_place(folder: Path, names: Sequence[str]) -> Iterator[list[Path]]:
    """Empty folders that take the place of folder/name together when all is written, and are gone after an error.

    What a killed run left behind is removed first.
    """
    parts, old = [folder / f".{name}.partial" for name in names], [folder / f".{name}.old" for name in names]
    try:
        _remove(parts + old)
        for part in parts:
            part.mkdir(parents=True)
        yield parts
        for name, away in zip(names, old):
            if (folder / name).exists():
                (folder / name).rename(away)
        for part, name in zip(parts, names):
            part.rename(folder / name)
    finally:
        _remove(parts + old)


def _remove(folders: Sequence[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _frame_values(
    found: Sequence[Sequence[Outline]], tracks: Sequence[Track[Outline]], filled: Sequence[dict[int, Outline]]
) -> dict[str, Any]:
    """What all the masked faces say of the clip."""
    counts = [len(faces) for faces in found]
    shown = set().union(*filled)
    seen = set().union(*(track.frames for track in tracks))
    empty = [number for number in range(len(found)) if number not in shown]
    return {
        "frames": len(found),
        "missing": _runs(empty),
        "missing_share": round(len(empty) / len(found), 4),
        "filled_share": round(len(shown - seen) / len(found), 4),
        "faces_median": float(np.median(counts)),
        "faces_max": max(counts),
        "masked_faces": len(tracks),
    }


def _runs(numbers: Sequence[int]) -> list[list[int]]:
    """[first, last] of each run of consecutive numbers (ascending)."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return runs


def _face_values(frames: int, track: Track[Outline], filled: dict[int, Outline], height: int) -> dict[str, Any]:
    """What the main face says of the clip."""
    confidences = [face.confidence for face in track.faces]
    seen = dict(zip(track.frames, track.faces))
    return {
        "face_size": round(float(np.median([face.box[3] - face.box[1] for face in track.faces])) / height, 4),
        "confidence_mean": round(float(np.mean(confidences)), 4),
        "confidence_min": round(float(min(confidences)), 4),
        "boxes": [[round(float(side), 1) for side in filled[number].box] if number in filled else None for number in range(frames)],
        "mouth_opening": [round(seen[number].opening, 4) if number in seen else None for number in range(frames)],
        "mouth_movement": round(track.movement, 4),
    }
