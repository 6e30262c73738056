"""What a stretch of a raw file shows: where its picture ends and black bars begin, and where heads are."""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from stableavatar.data.preparation.background import Background
from stableavatar.data.preparation.crops import Box, ClipConfig, Crop, choose_crop, content_box, head_box, union
from stableavatar.data.preparation.decoding import read_frames
from stableavatar.data.preparation.faces import Face, FaceFinder, Track, track_faces, track_main_face
from stableavatar.data.preparation.records import Segment, Source
from stableavatar.data.preparation.settings import FaceConfig

LOOK_SIZE = 1280
"""Long side in pixels at which faces are looked for: larger pictures are made smaller."""


@dataclass(frozen=True)
class Framing:
    """What a stretch shows, in pixels of its source.

    Attributes:
        content: the picture without its black bars.
        heads: around all heads that must stay inside; None where none must.
        face_height: median height of the main face, 0 where none was looked for.
        face_seen: share of the pictures looked at that show the main face; None where none was looked for.
        background: how much it moves.
    """

    content: Box
    heads: Box | None
    face_height: float
    face_seen: float | None
    background: Background


def look(segment: Segment, source: Source, path: Path, config: ClipConfig, faces: FaceConfig) -> Framing:
    """Looks at `config.looks` pictures a second of a stretch.

    Raises:
        ValueError: it shows no face although heads are to be kept, or cannot be decoded.
    """
    scale = min(1.0, LOOK_SIZE / max(source.width, source.height))
    size = tuple(max(16, round(side * scale)) for side in (source.width, source.height))
    count = max(1, math.ceil((segment.end - segment.start) * config.looks))
    brightest, background, seen = np.zeros(size[::-1], np.uint8), Background(size), []
    finder = FaceFinder(faces.model, faces.max_faces) if config.heads != "none" else None
    with finder or nullcontext():
        for frame in read_frames(source, path, config.looks, size, segment.start, count):
            grey = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)
            np.maximum(brightest, grey, out=brightest)
            background.add(grey)
            seen.append(finder.find(frame) if finder else [])
    content = _scaled(content_box(brightest), (source.width, source.height))
    if finder is None:
        heads = _scaled(segment.box, (source.width, source.height)) if segment.box and _has_area(segment.box) else None
        return Framing(content, heads, 0.0, None, background)
    main = _main_track(seen, segment.box, size)
    if main is None:
        raise ValueError(f"no face in {source.path} from {segment.start:.2f} to {segment.end:.2f} s; expected one that speaks")
    kept = main.faces if config.heads == "main" else [face for faces_of in seen for face in faces_of]
    to_source = source.width / size[0], source.height / size[1]
    heads = union([head_box(_scaled(face.box.tolist(), to_source), config.margin) for face in kept])
    height = float(np.median([face.box[3] - face.box[1] for face in main.faces])) * to_source[1]
    return Framing(content, heads, height, len(main.frames) / len(seen), background)


def _scaled(box: Sequence[float], scale: tuple[float, float]) -> Box:
    return tuple(side * factor for side, factor in zip(box, scale * 2))


def _has_area(box: Box) -> bool:
    return box[0] < box[2] and box[1] < box[3]


def _main_track(seen: Sequence[Sequence[Face]], box: Box | None, size: tuple[int, int]) -> Track[Face] | None:
    """The person whom an annotation's box (0..1) means when first seen, else the main one; None where there is no face."""
    if box is None:
        return track_main_face(seen)
    middle = np.array([(box[0] + box[2]) / 2 * size[0], (box[1] + box[3]) / 2 * size[1]])

    def distance(track: Track[Face]) -> float:
        face = track.faces[0].box
        return float(np.linalg.norm((face[:2] + face[2:]) / 2 - middle))

    return min(track_faces(seen), key=distance, default=None)


def crop_of(framing: Framing, config: ClipConfig) -> Crop:
    """Where to cut; ValueError where no bucket fits."""
    return choose_crop(framing.content, framing.heads, framing.face_height, config)
