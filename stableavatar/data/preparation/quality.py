"""Measures of pictures: shot boundaries, black and still ones, how sharp they are, how sure a detector is of the face."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from skimage.measure import blur_effect

from stableavatar.data.preparation.cuts import BLOCK, LOOK_SIZE, CutConfig, mark_frames
from stableavatar.data.preparation.pictures import Pictures

PACK = "buffalo_l"
DETECTORS = ("det_*.onnx", "scrfd_*.onnx")
INPUT_SIZE = (640, 640)
"""Width and height that InsightFace's detectors were published with."""
FAINTEST = 0.02
"""Score below which a detection is noise; the least sure are wanted too."""
SAME_FACE = 0.3
"""Intersection over union from which on a detection is of a known face."""

Detector = Callable[[np.ndarray], np.ndarray]
"""uint8 [H, W, 3] RGB -> detections, float32 [N, 5]: x0 y0 x1 y1 in pixels, score."""


@dataclass(frozen=True)
class Survey:
    """What one pass over a clip's pictures gives.

    Attributes:
        cuts: shot boundaries; black: share of black pictures; still: share of those that stand still for 2 seconds or longer.
        samples: the chosen pictures by their numbers, uint8 [H, W, 3] RGB.
    """

    cuts: int
    black: float
    still: float
    samples: dict[int, np.ndarray]


def survey(pictures: Pictures, chosen: Sequence[int]) -> Survey:
    """Looks at every picture once, as the step `cuts` does with raw files, and keeps those of the chosen numbers."""
    scale, samples, wanted = LOOK_SIZE / max(pictures.width, pictures.height), {}, set(chosen)
    size = tuple(max(BLOCK, round(scale * side)) for side in (pictures.width, pictures.height))

    def small() -> Iterator[np.ndarray]:
        for number, pixels in enumerate(pictures.read()):
            if number in wanted:
                samples[number] = pixels
            yield cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)

    marks = mark_frames(small(), pictures.frames, pictures.fps, CutConfig())
    return Survey(len(marks.shots) - 2, float(marks.black.mean()), float(marks.still.mean()), samples)


def sharpness(pixels: np.ndarray, side: int) -> float:
    """How sharp a picture is: 0 for blurred beyond recognition, 0.6 to 0.8 for good photographs.

    One minus the blur effect of F. Crete et al., "The blur effect: perception and estimation with a new no-reference perceptual blur
    metric" (2007): how much a picture changes if it is blurred anew. Brightness, contrast and, since the picture is brought to one
    standard size first, its size do not matter; what has fewer pixels than that is as soft as it would look at that size.

    Args:
        pixels: uint8 [H, W, 3] RGB.
        side: of a square with the area that the picture is brought to, in pixels.
    """
    grey = cv2.cvtColor(np.ascontiguousarray(pixels), cv2.COLOR_RGB2GRAY).astype(np.float32) / 255
    scale = side / (grey.shape[0] * grey.shape[1]) ** 0.5
    size = tuple(max(3, round(scale * length)) for length in reversed(grey.shape))
    standard = cv2.resize(grey, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    return 1 - float(blur_effect(standard)) if np.ptp(standard) > 1 / 255 else 0.0


def cut_out(pixels: np.ndarray, box: Sequence[float]) -> np.ndarray | None:
    """The part of a picture in a box x0 y0 x1 y1 in pixels; None where less than 8 pixels a side of it lie inside."""
    limit = [pixels.shape[1], pixels.shape[0]]
    low, high = np.clip(np.round(box[:2]), 0, limit).astype(int), np.clip(np.round(box[2:]), 0, limit).astype(int)
    return pixels[low[1] : high[1], low[0] : high[0]] if min(high - low) >= 8 else None


def load_insightface(path: Path, device: str, task: str) -> Any:
    """A model of InsightFace's pack buffalo_l; nothing is downloaded.

    Args:
        device: cpu or cuda.
        task: what it is for, "detection" or "recognition".

    Raises:
        ValueError: the package is missing, or the model is damaged or for something else.
    """
    try:
        from insightface.model_zoo import get_model
        from onnxruntime.capi import onnxruntime_pybind11_state as onnx
    except ImportError as error:
        raise ValueError(f"InsightFace is not installed ({error}); pip install insightface onnxruntime") from None
    providers = ["CPUExecutionProvider"] if device == "cpu" else ["CUDAExecutionProvider", "CPUExecutionProvider"]
    try:
        model = get_model(str(path), providers=providers)
    except (onnx.InvalidArgument, onnx.InvalidProtobuf, onnx.InvalidGraph, onnx.NoSuchFile, onnx.Fail):
        raise ValueError(f"the model {path} is damaged or truncated; unpack buffalo_l.zip again") from None
    if getattr(model, "taskname", None) != task:
        raise ValueError(f"{path} is no model for face {task}; expected that of buffalo_l")
    return model


@lru_cache(maxsize=1)
def insightface_detector(root: str, device: str) -> Detector:
    """InsightFace's face detector from ROOT/models/buffalo_l; nothing is downloaded.

    Args:
        device: cpu or cuda.

    Raises:
        ValueError: the package or the model is missing, or the model is damaged.
    """
    folder = Path(root).expanduser() / "models" / PACK
    files = sorted(path for pattern in DETECTORS for path in folder.glob(pattern))
    if not files:
        raise ValueError(f"no InsightFace detector in {folder}; unpack buffalo_l.zip there (it holds det_10g.onnx), or give no folder")
    model = load_insightface(files[0], device, "detection")
    model.prepare(0 if device != "cpu" else -1, input_size=INPUT_SIZE, det_thresh=FAINTEST)
    return lambda pixels: model.detect(np.ascontiguousarray(pixels[..., ::-1]), input_size=INPUT_SIZE)[0]


def confidence_at(detections: np.ndarray, box: Sequence[float]) -> float:
    """The score of the surest detection that lies where a face is known to be; 0 where none does."""
    if not len(detections):
        return 0.0
    low, high = np.maximum(detections[:, :2], box[:2]), np.minimum(detections[:, 2:4], box[2:])
    shared = np.prod(np.clip(high - low, 0, None), axis=1)
    own, known = np.prod(detections[:, 2:4] - detections[:, :2], axis=1), np.prod(np.subtract(box[2:], box[:2]))
    same = shared >= SAME_FACE * (own + known - shared)
    return float(detections[same, 4].max()) if same.any() else 0.0
