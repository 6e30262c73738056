"""How good pictures look, and whether a video keeps its looks."""

import numpy as np

from stableavatar.evaluation.metrics.base import Features, Need, VideoMetric
from stableavatar.evaluation.metrics.faces import mean_similarity
from stableavatar.evaluation.pairs import Pair
from stableavatar.evaluation.signals import colour_distance, seam_ratio

STRETCH = 8.0
"""Seconds at either end that drift is measured between; a quarter of a shorter video."""


class IQA(VideoMetric):
    """Q-Align's quality of pictures, 1 (bad) to 5 (excellent): the mean over one picture a second.

    Model: q-future/one-align, `score(task_="quality", input_="image")`, whole pictures. It needs transformers 4.37, so it may run in a
    Python environment of its own (weights.qalign_python).
    """

    name, label, better = "iqa", "IQA", "higher"
    needs = (Need("generated", "looks"),)
    figure = "quality"

    def value(self, features: Features) -> float:
        """As `VideoMetric.value`."""
        scores = features[self.needs[0]][self.figure]
        return float(scores.mean()) if len(scores) else float("nan")


class ASE(IQA):
    """Q-Align's aesthetics of pictures, 1 (bad) to 5 (excellent): as `iqa`, with `task_="aesthetics"`."""

    name, label, figure = "ase", "ASE", "aesthetics"


class DinoSimilarity(VideoMetric):
    """Cosine similarity with the reference picture in DINOv2's eyes: the mean over pictures.

    Network: facebook/dinov2-base, the class token after the last norm. Pictures: 5 a second (nearest in time), short side to 256
    (bicubic, antialiased), the middle 224 x 224, ImageNet's mean and deviation.
    """

    name, label, better = "dino", "DINO-S", "higher"
    needs = Need("generated", "dino"), Need("image", "dino")

    def value(self, features: Features) -> float:
        """As `VideoMetric.value`."""
        embedding, reference = (features[need]["embedding"] for need in self.needs)
        return mean_similarity(embedding, reference[0])


class Ciede(VideoMetric):
    """CIEDE2000 between the mean colour of each picture and that of the reference picture: the mean over all pictures.

    Mean colours are of all pixels in sRGB; Lab under D65, 2 degrees; all weights 1. Over the frames of two stretches (1 to 200 and 3500
    to 3700) this is how we read table 4 of the StableAvatar paper, which does not say what is compared.
    """

    name, label, better = "ciede", "CIEDE", "lower"
    needs = Need("generated", "colour"), Need("image", "colour")

    def value(self, features: Features) -> float:
        """As `VideoMetric.value`."""
        colours, reference = (features[need]["mean"] for need in self.needs)
        return float(colour_distance(colours, reference[0]).mean()) if len(colours) else float("nan")


class ColourDrift(VideoMetric):
    """CIEDE2000 between the mean colours of the first and of the last 8 seconds of a video (a quarter of one under 32 seconds).

    Mean colours are of all pixels of all pictures in sRGB; Lab under D65, 2 degrees; all weights 1. It needs no reference.
    """

    name, label, better = "colour_drift", "Colour drift", "lower"
    needs = (Need("generated", "colour"),)

    def value(self, features: Features) -> float:
        """As `VideoMetric.value`."""
        arrays = features[self.needs[0]]
        colours, times = arrays["mean"], arrays["times"]
        if len(colours) < 2:
            return float("nan")
        rate = (len(times) - 1) / (times[-1] - times[0])
        length = max(1, min(round(STRETCH * rate), len(colours) // 4))
        return float(colour_distance(colours[:length].mean(0), colours[-length:].mean(0)))


class SeamJitter(VideoMetric):
    """Mean absolute change from the picture before at the seams of windows, over that elsewhere; 1: no seam is seen.

    Seams: the frames with which a window's part of the video begins or ends, as the sidecar JSON tells. Elsewhere: the other frames with
    which a latent begins (1, 5, 9, ...), since the VAE makes these unlike frames in the middle of one.
    """

    name, label, better = "seam_jitter", "Seam jitter", "lower"
    needs = (Need("generated", "change"),)

    def lacks(self, pair: Pair) -> str:
        """As `Metric.lacks`."""
        return super().lacks(pair) or ("" if pair.seams else "no seams")

    def value(self, features: Features) -> float:
        """As `VideoMetric.value`."""
        arrays = features[self.needs[0]]
        return seam_ratio(arrays["change"], arrays["frames"], np.array(features.pair.seams))
