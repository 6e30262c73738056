"""Where the main face of a video is and how far its mouth is open, by mediapipe."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from stableavatar.data.preparation.faces import FaceFinder, track_main_face
from stableavatar.evaluation.samples import Arrays, Faceless, PictureNetwork, Seen, View, Watcher
from stableavatar.evaluation.weights import Tools
from stableavatar.files import digest_file


class Landmarks(PictureNetwork):
    """`box`, float32 [T, 4] x0 y0 x1 y1 in pixels, and `opening`, float32 [T] (distance of the inner lips in heights of the face).

    Of every picture: all faces that mediapipe finds are followed, and the most prominent of those whose mouths move is the one that is
    meant. NaN in pictures that do not show it. Raises Faceless if none does.
    """

    name = "landmarks"

    def __init__(self, tools: Tools) -> None:
        self._model = tools.weights.face

    def load(self) -> None:
        """As `Network.load`."""
        _finder(self._model)

    def definition(self) -> dict[str, Any]:
        """As `Network.definition`."""
        model = digest_file(Path(self._model)) if self._model else "inside the package"
        return {"network": "mediapipe face mesh of the main face", "mediapipe": version("mediapipe"), "model": model}

    def watch(self, pictures: Seen, known: Arrays, span: tuple[float, float] | None) -> Watcher:
        """As `PictureNetwork.watch`."""
        return _FaceWatcher(pictures, _finder(self._model))


@dataclass(frozen=True, eq=False)
class _Sighting:
    """What is kept of a face in one picture."""

    box: np.ndarray
    opening: float


class _FaceWatcher:
    """Finds the faces of every picture, and at the end the main one."""

    def __init__(self, pictures: Seen, finder: FaceFinder) -> None:
        self._path, self._finder = pictures.path, finder
        self.numbers, self._times = View().grid(pictures)
        self._found: list[Sequence[_Sighting]] = []

    def add(self, frame: np.ndarray) -> None:
        """As `Watcher.add`."""
        self._found.append([_Sighting(face.box, face.opening) for face in self._finder.find(frame)])

    def result(self) -> Arrays:
        """As `Watcher.result`."""
        track = track_main_face(self._found)
        if track is None:
            raise Faceless(f"no face in {self._path}: looked at its {len(self._found)} pictures; leave it out")
        box, opening = np.full((len(self._found), 4), np.nan, np.float32), np.full(len(self._found), np.nan, np.float32)
        box[track.frames], opening[track.frames] = [face.box for face in track.faces], [face.opening for face in track.faces]
        return {"box": box, "opening": opening, "times": self._times, "frames": self.numbers}


@lru_cache(maxsize=1)
def _finder(model: str) -> FaceFinder:
    return FaceFinder(model)
