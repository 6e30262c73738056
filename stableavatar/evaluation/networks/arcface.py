"""ArcFace: whether two pictures show the same person (J. Deng et al., "ArcFace", 2019), by InsightFace's pack buffalo_l."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from stableavatar.data.preparation.quality import INPUT_SIZE, load_insightface
from stableavatar.evaluation.samples import Arrays, BatchWatcher, Faceless, PictureNetwork, Seen, View, Watcher
from stableavatar.evaluation.weights import Tools, checked_weights
from stableavatar.sampling.offload import resolve_device

DETECTOR, RECOGNISER = "det_10g.onnx", "w600k_r50.onnx"
CERTAIN = 0.5
"""Score from which on a detection is a face: InsightFace's own."""


class ArcFace(PictureNetwork):
    """`embedding`, float32 [N, 512] of length 1: of the largest face of each picture; NaN where there is none. Faceless if in no picture.

    det_10g finds faces at 640 x 640 with a score of 0.5 or more; the largest is turned and cut to 112 x 112 by its five points, as
    InsightFace does it, and w600k_r50 embeds it.

    Args:
        name: as the cache calls it. view: which pictures.
    """

    weights = ("arcface",)

    def __init__(self, name: str, tools: Tools, view: View) -> None:
        self.name, self._tools, self._view = name, tools, view

    def load(self) -> None:
        """As `Network.load`."""
        self.definition()
        self._embedder()

    def definition(self) -> dict[str, Any]:
        """As `Network.definition`."""
        folder, paths = _folder(self._tools.weights.arcface), self._tools.weights
        digests = [checked_weights("detector", folder / DETECTOR, paths), checked_weights("arcface", folder / RECOGNISER, paths)]
        return {"network": "ArcFace of the largest face", "sha256": digests, "view": vars(self._view), "score": CERTAIN}

    def watch(self, pictures: Seen, known: Arrays, span: tuple[float, float] | None) -> Watcher:
        """As `PictureNetwork.watch`."""
        embedder = self._embedder()
        return _FaceWatcher(self._view.grid(pictures, span), pictures.path, embedder)

    def _embedder(self) -> "FaceEmbedder":
        return _load(str(_folder(self._tools.weights.arcface)), resolve_device(self._tools.device).type)


class FaceEmbedder:
    """Both models of the pack.

    Raises:
        ValueError: the package or a model is missing, or a model is damaged.
    """

    def __init__(self, folder: Path, device: str) -> None:
        self._detector = load_insightface(folder / DETECTOR, device, "detection")
        self._detector.prepare(0 if device != "cpu" else -1, input_size=INPUT_SIZE, det_thresh=CERTAIN)
        self._recogniser = load_insightface(folder / RECOGNISER, device, "recognition")

    def embed(self, frame: np.ndarray) -> np.ndarray:
        """uint8 [H, W, 3] RGB -> float32 [512] of length 1, or NaN."""
        picture = np.ascontiguousarray(frame[..., ::-1])
        boxes, points = self._detector.detect(picture, input_size=INPUT_SIZE)
        if not len(boxes):
            return np.full(self._recogniser.output_shape[1], np.nan, np.float32)
        largest = int(np.argmax(np.prod(boxes[:, 2:4] - boxes[:, :2], axis=1)))
        return self.embed_at(picture, points[largest])

    def embed_at(self, picture: np.ndarray, points: np.ndarray) -> np.ndarray:
        """The same of the face whose eyes, nose and corners of the mouth are at `points` [5, 2]; `picture` is BGR."""
        from insightface.utils.face_align import norm_crop

        found = self._recogniser.get_feat(norm_crop(picture, points, self._recogniser.input_size[0])).ravel()
        return (found / max(float(np.linalg.norm(found)), 1e-12)).astype(np.float32)


class _FaceWatcher(BatchWatcher):
    """Embeds picture after picture."""

    def __init__(self, grid: tuple[np.ndarray, np.ndarray], path: Path, embedder: FaceEmbedder) -> None:
        super().__init__(grid, embedder.embed, lambda held: {"embedding": np.stack(held)}, batch=1)
        self._path = path

    def result(self) -> Arrays:
        """As `Watcher.result`."""
        found = super().result()
        if np.isnan(found["embedding"]).all():
            raise Faceless(f"no face in {self._path}: InsightFace looked at {len(self.numbers)} of its pictures; leave it out")
        return found


def _folder(given: str) -> Path:
    """The folder with the models: the one given, or models/buffalo_l in it, as data preparation has it."""
    inner = Path(given).expanduser() / "models" / "buffalo_l"
    return inner if inner.is_dir() else Path(given).expanduser()


@lru_cache(maxsize=1)
def _load(folder: str, device: str) -> FaceEmbedder:
    return FaceEmbedder(Path(folder), device)
