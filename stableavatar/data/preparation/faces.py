"""Faces in pictures through mediapipe, and each person followed through a clip."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import numpy as np
from scipy.optimize import linear_sum_assignment

from stableavatar.data.preparation.face_models import Detection, load_models

INNER_LIPS, CHIN_TO_BROW = (13, 14), (10, 152)
CROPS = (3.0, 1.5)
"""Sides of the crop that the mesh is laid on, in faces: the detectors are surest where a face takes a third of the picture."""
SMALLEST_TILE = 192
"""Pixels: below this side a face in a tile is too small to be of use."""
SAME_FACE = 0.5
"""Faces: two whose centres lie nearer than this are one, found twice."""
STEP = 1.0
"""Faces by which a person may move, and log of the scale by which their face may change, between two sightings."""
MINOR = 0.25
"""A face that is this much less prominent than the largest stands in the background."""
STILL = 0.5
"""A mouth that moves less than this share of the liveliest does not speak."""


class Seen(Protocol):
    """What is needed of a face to follow it: `box` in pixels, float32 [4] x0 y0 x1 y1, and how far its mouth is open."""

    @property
    def box(self) -> np.ndarray: ...

    @property
    def opening(self) -> float: ...


F = TypeVar("F", bound=Seen)


@dataclass(frozen=True, eq=False)
class Face:
    """One face in one picture.

    Attributes:
        box: float32 [4] x0 y0 x1 y1, pixels: forehead to chin, ear to ear (the bounds of the landmarks).
        confidence: 0..1: the detector's best score for it, in the whole picture and in the crop around it.
        landmarks: float32 [468, 2] x y, pixels: mediapipe's face mesh; some may lie outside the picture.
    """

    box: np.ndarray
    confidence: float
    landmarks: np.ndarray

    @property
    def opening(self) -> float:
        """Distance of the inner lips, in heights of the face."""
        inner, height = (np.linalg.norm(np.subtract(*self.landmarks[list(pair)])) for pair in (INNER_LIPS, CHIN_TO_BROW))
        return float(inner / max(height, 1e-6))


class FaceFinder:
    """Finds the faces of a picture.

    Each picture is seen on its own: a track that mediapipe keeps would lag behind a mouth (it smooths), drift onto something else
    after a cut, and give other results to a worker that begins in the middle.

    Args:
        model: face_landmarker.task for mediapipe's tasks interface; empty for the models inside mediapipe 0.10.14.
        max_faces: how many of the largest faces are given.

    Raises:
        ValueError: mediapipe is not installed, it brings no model and none is given, the model is missing or damaged.
    """

    def __init__(self, model: str = "", max_faces: int = 4) -> None:
        self._models, self._max_faces = load_models(model), max_faces

    def find(self, pixels: np.ndarray) -> list[Face]:
        """The faces of a picture, uint8 [H, W, 3] RGB, the largest first.

        The whole picture is searched first; only where it shows no face, ever smaller parts of it, for small faces in a large picture.
        """
        assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3, (pixels.dtype, pixels.shape)
        for tiles in _levels(pixels.shape[1], pixels.shape[0]):
            detections = [found for tile in tiles for found in self._detect(pixels, tile, far=len(tiles) == 1)]
            faces = [self._face(pixels, *detection) for detection in _distinct_boxes(detections)]
            if known := _distinct([face for face in faces if face is not None]):
                return known[: self._max_faces]
        return []

    def close(self) -> None:
        """Frees the models."""
        self._models.close()

    def __enter__(self) -> "FaceFinder":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _detect(self, pixels: np.ndarray, tile: np.ndarray, far: bool) -> list[Detection]:
        """Detections in a part of a picture, in the picture's pixels."""
        shift = np.tile(tile[:2], 2)
        return [(box + shift, score) for box, score in self._models.detect(_cut(pixels, tile), far)]

    def _face(self, pixels: np.ndarray, box: np.ndarray, score: float) -> Face | None:
        """The face at a detection; None where no mesh fits, which a detection of something else does not survive."""
        for crop in CROPS:
            tile = _around(box, crop, pixels.shape)
            meshes = [mesh + tile[:2] for mesh in self._models.mesh(_cut(pixels, tile))]
            meshes = [mesh for mesh in meshes if _apart(_bounds(mesh), box) < SAME_FACE]
            if meshes:
                landmarks = min(meshes, key=lambda mesh: _apart(_bounds(mesh), box)).astype(np.float32)
                again = [sure for where, sure in self._detect(pixels, tile, far=False) if _apart(where, box) < SAME_FACE]
                return Face(_bounds(landmarks), max(score, *again, 0.0), landmarks)
        return None


def _levels(width: int, height: int) -> Iterator[list[np.ndarray]]:
    """The parts of a picture to search, x0 y0 x1 y1: the whole, then squares as high (or wide) as it, then of half that side."""
    yield [np.array([0, 0, width, height])]
    for side in (min(width, height), min(width, height) // 2):
        if SMALLEST_TILE <= side < max(width, height):
            corners = [(x, y) for y in _starts(height, side) for x in _starts(width, side)]
            yield [np.array([x, y, x + side, y + side]) for x, y in corners]


def _starts(length: int, side: int) -> list[int]:
    """Where tiles of `side` begin that cover `length` and overlap by half, so that one of them holds any small face whole."""
    count = math.ceil((length - side) / (side / 2)) + 1
    return np.linspace(0, length - side, count).astype(int).tolist()


def _cut(pixels: np.ndarray, tile: np.ndarray) -> np.ndarray:
    x0, y0, x1, y1 = tile
    return np.ascontiguousarray(pixels[y0:y1, x0:x1])


def _around(box: np.ndarray, crop: float, shape: tuple[int, ...]) -> np.ndarray:
    """The part of a picture around a box, `crop` times as wide and high as its longer side."""
    centre, reach = (box[:2] + box[2:]) / 2, crop * _size(box) / 2
    low, high = np.floor(centre - reach).astype(int), np.ceil(centre + reach).astype(int)
    limit = np.array([shape[1], shape[0]])
    low = low.clip(0, limit - 1)
    return np.concatenate([low, np.maximum(high.clip(0, limit), low + 1)])


def _bounds(points: np.ndarray) -> np.ndarray:
    return np.concatenate([points.min(0), points.max(0)]).astype(np.float32)


def _size(box: np.ndarray) -> float:
    """Longer side."""
    return float(max(box[2] - box[0], box[3] - box[1]))


def _apart(one: np.ndarray, other: np.ndarray) -> float:
    """Distance of the centres of two boxes, in sizes of the larger."""
    between = np.linalg.norm((one[:2] + one[2:] - other[:2] - other[2:]) / 2)
    return float(between / max(_size(one), _size(other), 1e-6))


def _distinct_boxes(detections: list[Detection]) -> list[Detection]:
    """Of detections that mean one face, the surest."""
    kept: list[Detection] = []
    for box, score in sorted(detections, key=lambda found: -found[1]):
        if all(_apart(box, other) >= SAME_FACE for other, _ in kept):
            kept.append((box, score))
    return kept


def _distinct(faces: list[Face]) -> list[Face]:
    """The faces, the largest first, each once."""
    kept: list[Face] = []
    for face in sorted(faces, key=lambda face: -_size(face.box)):
        if all(_apart(face.box, other.box) >= SAME_FACE for other in kept):
            kept.append(face)
    return kept


@dataclass(eq=False)
class Track(Generic[F]):
    """One person's face through a clip: the frames that show it, ascending, and what they show."""

    frames: list[int] = field(default_factory=list)
    faces: list[F] = field(default_factory=list)

    @property
    def prominence(self) -> float:
        """How much of the clip the face takes: the sum of its heights in all frames, pixels."""
        return float(sum(face.box[3] - face.box[1] for face in self.faces))

    @property
    def movement(self) -> float:
        """How much the mouth moves: the standard deviation of its opening, in heights of the face."""
        return float(np.std([face.opening for face in self.faces]))


def track_faces(frames: Iterable[Sequence[F]]) -> list[Track[F]]:
    """Follows each person through a clip.

    Args:
        frames: the faces of each frame. A person who is not seen for a while and comes back at about the same place is the same one.

    Returns:
        the most prominent first.
    """
    tracks: list[Track[F]] = []
    for number, faces in enumerate(frames):
        taken = _assign([track.faces[-1] for track in tracks], faces)
        for index, face in enumerate(faces):
            if index not in taken:
                tracks.append(Track())
            track = tracks[taken.get(index, -1)]
            track.frames.append(number)
            track.faces.append(face)
    return sorted(tracks, key=lambda track: -track.prominence)


def _assign(last: Sequence[Seen], faces: Sequence[Seen]) -> dict[int, int]:
    """Index of a face -> index of the track that it goes on with: together as near as possible, none further than a step."""
    costs = np.array([[_unlike(before.box, face.box) for face in faces] for before in last]).reshape(len(last), len(faces))
    rows, columns = linear_sum_assignment(costs.clip(max=STEP))
    return {int(column): int(row) for row, column in zip(rows, columns) if costs[row, column] < STEP}


def _unlike(one: np.ndarray, other: np.ndarray) -> float:
    """How far apart two boxes lie, in faces, or how differently large they are (log), whichever is more."""
    return max(_apart(one, other), abs(math.log(max(_size(one), 1e-6) / max(_size(other), 1e-6))))


def speaking_faces(tracks: Sequence[Track[F]]) -> list[Track[F]]:
    """Of all persons those whose mouths move, the most prominent first; all of them where no mouth moves.

    Those who are small or hardly there are left out: what moves in a face of few pixels is mostly noise.
    """
    largest = max((track.prominence for track in tracks), default=0.0)
    near = [track for track in tracks if track.prominence >= MINOR * largest]
    liveliest = max((track.movement for track in near), default=0.0)
    return [track for track in near if track.movement >= STILL * liveliest]


def track_main_face(frames: Iterable[Sequence[F]]) -> Track[F] | None:
    """The person whom a clip is about: of those whose mouths move the most prominent; None where there is no face."""
    return next(iter(speaking_faces(track_faces(frames))), None)


def whole_track(boxes: Sequence[Sequence[float] | None]) -> np.ndarray:
    """A box for every frame, float64 [T, 4]: on straight lines between those that are known, at the ends the nearest."""
    known = [number for number, box in enumerate(boxes) if box is not None]
    sides = np.array([boxes[number] for number in known], np.float64)
    return np.stack([np.interp(np.arange(len(boxes)), known, side) for side in sides.T], axis=1)
