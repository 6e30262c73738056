"""How far a set of generated videos is from the true ones: FID and FVD."""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from stableavatar.evaluation.frechet import Moments, frechet_distance
from stableavatar.evaluation.metrics.base import Features, Need, SetMetric
from stableavatar.evaluation.networks.i3d import FEATURES
from stableavatar.evaluation.samples import Arrays


class FrechetMetric(SetMetric):
    """The Frechet distance between the features of all generated and of all true videos; `network` says which features."""

    better = "lower"
    network: ClassVar[str]

    def summary(self, features: Features) -> tuple[Moments, Moments]:
        """As `SetMetric.summary`: of the generated and of the true video."""
        return tuple(Moments.of(_rows(features[role, self.network])) for role in ("generated", "video"))

    def of_set(self, summaries: Sequence[tuple[Moments, Moments]]) -> float:
        """As `SetMetric.of_set`."""
        return frechet_distance(*(Moments.together(parts) for parts in zip(*summaries))) if summaries else float("nan")


def _rows(arrays: Arrays) -> np.ndarray:
    """Of a stretch that a video does not reach there are none."""
    return arrays.get("feature", np.zeros((0, FEATURES)))


def _of_both(network: str) -> tuple[Need, Need]:
    return Need("generated", network), Need("video", network)


class FID(FrechetMetric):
    """Frechet Inception distance between all pictures of all generated and of all true videos (set level).

    Network: Inception v3 of 2015, its 2048 features before the classifier, weights-inception-2015-12-05-6726825d.pth (sha256 6726825d...).
    Pictures: every one, whole, as the file has it, stretched to 299 x 299 (bilinear, corners not aligned), in [-1, 1]; the recipe of
    pytorch-fid, on frames instead of files. torch-fidelity resizes as TensorFlow 1 did and differs by a little.
    """

    name, label, network = "fid", "FID", "inception"
    needs = _of_both("inception")


class FIDTail(FrechetMetric):
    """FID as `fid`, but of the last 16 pictures at 25 a second of each video, as LongCat-Video-Avatar measures long videos."""

    name, label, network = "fid_tail", "FID (tail)", "inception_tail"
    needs = _of_both("inception_tail")


class FVD(FrechetMetric):
    """Frechet video distance, one sample per video: the whole video at once (set level).

    Network: I3D of Kinetics-400, its 400 logits, i3d_torchscript.pt of StyleGAN-V (sha256 bec6519f...).
    Pictures: at 25 a second (nearest in time), of more than 128 those at 128 even times from the first to the last (StyleGAN-V's
    FVD of 128 frames, resampled); short side to 224 (bilinear), the middle 224 x 224, in [-1, 1]. At least 10 pictures.
    A distance in 400 dimensions needs hundreds of videos to be stable: tables show it with its interval.
    """

    name, label, network = "fvd", "FVD", "i3d"
    needs = _of_both("i3d")


class FVD16(FrechetMetric):
    """Frechet video distance over clips of 16 pictures (set level).

    Network and form of pictures as `fvd`. Samples: clips of 16 consecutive pictures at 25 a second that do not overlap, at most 16 per
    video, evenly spread from its start to its end.
    """

    name, label, network = "fvd_16", "FVD-16", "i3d_16"
    needs = _of_both("i3d_16")


class FVDTail(FrechetMetric):
    """Frechet video distance, one sample per video: its last 16 pictures at 25 a second, as LongCat-Video-Avatar measures long videos.

    Network and form of pictures as `fvd`.
    """

    name, label, network = "fvd_tail", "FVD (tail)", "i3d_tail"
    needs = _of_both("i3d_tail")
