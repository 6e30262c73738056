"""mediapipe's face detectors and face mesh, behind one interface.

mediapipe 0.10.14 carries its models (its "solutions"); from 0.10.30 on there is only the "tasks" interface, which reads a model file
(face_landmarker.task).
"""

import os
import warnings
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Protocol

import numpy as np

MESH = 468
"""Landmarks of mediapipe's face mesh; those of the irises, which follow them, are left out."""
CERTAIN = 0.5
"""Score below which a detection is not looked at further: mediapipe's own."""
NEIGHBOURS = 2
"""Faces on which a mesh is laid at once."""
DETECTOR = "face_detector.tflite"
SMALL = 64
"""Pixels of the first picture, at which the models finish loading."""
Detection = tuple[np.ndarray, float]
"""A box, float32 [4] x0 y0 x1 y1 in pixels, and its score."""


class FaceModels(Protocol):
    """One of mediapipe's two interfaces."""

    def detect(self, pixels: np.ndarray, far: bool) -> list[Detection]:
        """Faces near the camera; if `far`, also smaller ones, where there is a model for them."""

    def mesh(self, pixels: np.ndarray) -> list[np.ndarray]:
        """Landmarks, float32 [468, 2], of at most NEIGHBOURS faces."""

    def close(self) -> None:
        """Frees its memory."""


def load_models(model: str) -> FaceModels:
    """The interface that is there: tasks if a model is given, else solutions.

    Raises:
        ValueError: mediapipe is not installed, it brings no model and none is given, the model is missing or damaged.
    """
    warnings.filterwarnings("ignore", message="SymbolDatabase.GetPrototype", category=UserWarning)  # Its own, of its own calls.
    try:
        import mediapipe
    except ImportError as error:
        raise ValueError(f"faces need the mediapipe package ({_first(error)}); pip install mediapipe==0.10.14") from None
    if not model and not hasattr(mediapipe, "solutions"):
        wanted = "download face_landmarker.task and set faces.model=FILE, or pip install mediapipe==0.10.14, which brings its models"
        raise ValueError(f"mediapipe {mediapipe.__version__} brings no face model; {wanted}")
    with _quiet():
        models = _Tasks(mediapipe, Path(model)) if model else _Solutions(mediapipe.solutions)
        models.detect(np.zeros((SMALL, SMALL, 3), np.uint8), far=True)
        models.mesh(np.zeros((SMALL, SMALL, 3), np.uint8))
    return models


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps what mediapipe says of how it computes off stderr: several lines for each model, past Python's own streams."""
    stderr = os.dup(2)
    try:
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


class _Solutions:
    """mediapipe's solutions, whose models are inside the wheel: detectors for near and for far, a mesh with refined lips."""

    def __init__(self, solutions: ModuleType) -> None:
        detector, mesh = solutions.face_detection.FaceDetection, solutions.face_mesh.FaceMesh
        self._near, self._far = detector(CERTAIN, model_selection=0), detector(CERTAIN, model_selection=1)
        self._mesh = mesh(static_image_mode=True, max_num_faces=NEIGHBOURS, refine_landmarks=True)

    def detect(self, pixels: np.ndarray, far: bool) -> list[Detection]:
        found = [item for detector in (self._near, self._far)[: 1 + far] for item in detector.process(pixels).detections or []]
        return [(self._box(item.location_data.relative_bounding_box, pixels), item.score[0]) for item in found]

    def _box(self, relative: object, pixels: np.ndarray) -> np.ndarray:
        height, width = pixels.shape[:2]
        box = np.array([relative.xmin, relative.ymin, relative.xmin + relative.width, relative.ymin + relative.height], np.float32)
        return box * [width, height, width, height]

    def mesh(self, pixels: np.ndarray) -> list[np.ndarray]:
        return [_points(face.landmark, pixels) for face in self._mesh.process(pixels).multi_face_landmarks or []]

    def close(self) -> None:
        for graph in (self._near, self._far, self._mesh):
            graph.close()


class _Tasks:
    """mediapipe's tasks with a face_landmarker.task, an archive that holds a detector for near faces and the mesh."""

    def __init__(self, mediapipe: ModuleType, model: Path) -> None:
        from mediapipe.tasks.python import BaseOptions, vision

        self._image = lambda pixels: mediapipe.Image(image_format=mediapipe.ImageFormat.SRGB, data=pixels)
        try:
            detector, bundle = _detector_of(model), model.read_bytes()
            near = vision.FaceDetectorOptions(BaseOptions(model_asset_buffer=detector), min_detection_confidence=CERTAIN)
            mesh = vision.FaceLandmarkerOptions(BaseOptions(model_asset_buffer=bundle), num_faces=NEIGHBOURS)
            self._near = vision.FaceDetector.create_from_options(near)
            self._mesh = vision.FaceLandmarker.create_from_options(mesh)
        except (RuntimeError, ValueError, OSError, zipfile.BadZipFile) as error:
            raise ValueError(f"cannot load the face model {model}: {_first(error)}; give mediapipe's face_landmarker.task, whole") from None

    def detect(self, pixels: np.ndarray, far: bool) -> list[Detection]:
        found = [(item.bounding_box, item.categories[0].score) for item in self._near.detect(self._image(pixels)).detections]
        corners = [(box.origin_x, box.origin_y, box.origin_x + box.width, box.origin_y + box.height) for box, _ in found]
        return [(np.array(box, np.float32), score) for box, (_, score) in zip(corners, found)]

    def mesh(self, pixels: np.ndarray) -> list[np.ndarray]:
        return [_points(face, pixels) for face in self._mesh.detect(self._image(pixels)).face_landmarks]

    def close(self) -> None:
        for graph in (self._near, self._mesh):
            graph.close()


def _detector_of(model: Path) -> bytes:
    """The detector inside a face_landmarker.task."""
    with zipfile.ZipFile(model) as archive:
        if DETECTOR not in archive.namelist():
            raise ValueError(f"it holds no {DETECTOR}")
        return archive.read(DETECTOR)


def _first(error: Exception) -> str:
    """What an error says in its first line."""
    return getattr(error, "strerror", None) or str(error).strip().partition("\n")[0] or type(error).__name__


def _points(landmarks: Iterable[object], pixels: np.ndarray) -> np.ndarray:
    """Landmarks in 0..1 of a picture as its pixels."""
    points = np.array([(point.x, point.y) for point in landmarks], np.float32)[:MESH]
    return points * [pixels.shape[1], pixels.shape[0]]
