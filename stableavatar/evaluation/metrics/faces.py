"""Whether the face stays the same person, and whether its lips go with the voice."""

import numpy as np
import torch

from stableavatar.evaluation.metrics.base import Features, Need, VideoMetric
from stableavatar.evaluation.networks.plain import LEVEL_RATE
from stableavatar.evaluation.signals import FLAT_TRACK, correlation
from stableavatar.evaluation.syncnet import OffsetDistances, Sync

FEWEST = 10
"""Pictures with a face, below which nothing is said of a track."""
NOTHING = float("nan")
CHUNK = 256
"""Windows at a time, each of which is compared with 31 others."""


class CSIM(VideoMetric):
    """Cosine similarity of the face with that of the reference picture: the mean over pictures.

    Network: ArcFace w600k_r50.onnx (ResNet-50, WebFace600K; sha256 4c06341c...) on the largest face that det_10g.onnx (sha256 5838f7fe...)
    finds at 640 x 640 with a score of 0.5 or more, aligned to 112 x 112 by its five points; both of InsightFace's buffalo_l.
    Pictures: 5 a second (nearest in time); those without a face are left out, a video with a face in none is excluded.
    """

    name, label, better = "csim", "CSIM", "higher"
    needs = Need("generated", "arcface"), Need("image", "arcface")

    def value(self, features: Features) -> float:
        """As `VideoMetric.value`."""
        embedding, reference = (features[need]["embedding"] for need in self.needs)
        return mean_similarity(embedding[~np.isnan(embedding[:, 0])], reference[0])


class CSIMTail(CSIM):
    """CSIM as `csim`, but of 16 pictures at even times of the last 2 seconds, as LongCat-Video-Avatar measures long videos."""

    name, label = "csim_tail", "CSIM (tail)"
    needs = Need("generated", "arcface_tail"), Need("image", "arcface")


def mean_similarity(embedding: np.ndarray, reference: np.ndarray) -> float:
    """Mean cosine of rows [N, C] of length 1 with one [C]; NaN of no rows."""
    return float((embedding @ reference).mean()) if len(embedding) else NOTHING


class SyncMetric(VideoMetric):
    """What SyncNet says of lips and voice."""

    needs = Need("generated", "lips"), Need("audio", "voice")

    def value(self, features: Features) -> float:
        """As `VideoMetric.value`."""
        lips, voice = (torch.from_numpy(features[need]["embedding"]) for need in self.needs)
        count = min(len(lips) - 1, len(voice))  # the last picture makes no window, as in the authors' program
        if count < 1:
            return NOTHING
        distances = OffsetDistances()
        for windows in zip(lips[:count].split(CHUNK), voice[:count].split(CHUNK)):
            distances.add(*windows)
        return self.figure(distances.result())

    def figure(self, sync: Sync) -> float:
        """The one that is meant."""
        raise NotImplementedError


class SyncC(SyncMetric):
    """SyncNet's confidence: the median over offsets of the mean distance of lips and voice, minus the smallest.

    Network: syncnet_v2.model (sha256 961e8696...). Pictures at 25 a second (nearest in time), 5 to a window, the face cut out at 224 x 224
    as syncnet_python does it (boxes smoothed by a running median of 13, scale 0.4, grey outside); 13 MFCCs of the voice at 16 kHz, 20
    steps of 10 ms to a window; offsets from -15 to 15 pictures. The face is mediapipe's (the authors': S3FD): the most prominent of those
    whose mouths move, followed through the video, in gaps on straight lines.
    """

    name, label, better = "sync_c", "Sync-C", "higher"

    def figure(self, sync: Sync) -> float:
        """As `SyncMetric.figure`."""
        return sync.confidence


class SyncD(SyncMetric):
    """SyncNet's distance: the smallest over offsets of the mean distance of lips and voice; all else as `sync_c`."""

    name, label, better = "sync_d", "Sync-D", "lower"

    def figure(self, sync: Sync) -> float:
        """As `SyncMetric.figure`."""
        return sync.distance


class SyncOffset(SyncMetric):
    """By how many pictures (at 25 a second) the lips come before or after the voice, where SyncNet's distance is smallest, either way.

    All else as `sync_c`.
    """

    name, label, better, unit = "sync_offset", "Sync offset", "lower", "frames"

    def figure(self, sync: Sync) -> float:
        """As `SyncMetric.figure`."""
        return float(abs(sync.offset))


class LipCorrelation(VideoMetric):
    """Correlation (Pearson) of how far the mouth is open with that in the true video.

    Opening: distance of the inner lips in heights of the face, by mediapipe's face mesh of the main face in every picture. The true
    track is interpolated at the times of the generated pictures, as long as both last; pictures without a face are left out. 0 if the
    generated mouth stands still; nothing is measured if the true one does.
    """

    name, label, better = "lip_correlation", "Lip corr.", "higher"
    needs = Need("generated", "landmarks"), Need("video", "landmarks")

    def value(self, features: Features) -> float:
        """As `VideoMetric.value`."""
        (times, opening), (true_times, truth) = (_mouth(features, need) for need in self.needs)
        if min(len(opening), len(truth)) < FEWEST:
            return NOTHING
        shared = (times >= true_times[0] - 1e-6) & (times <= true_times[-1] + 1e-6)
        return _agreement(opening[shared], np.interp(times[shared], true_times, truth))


class LipEnvelope(VideoMetric):
    """Correlation (Pearson) of how far the mouth is open with how loud the voice is at that time.

    Opening: as in `lip_correlation`. Loudness: root mean square of the 40 ms of sound (16 kHz mono) from the time of a picture on.
    It needs no true video, and 1 is out of reach: lips also close within loud sounds.
    """

    name, label, better = "lip_envelope", "Lip-voice corr.", "higher"
    needs = Need("generated", "landmarks"), Need("audio", "envelope")

    def value(self, features: Features) -> float:
        """As `VideoMetric.value`."""
        times, opening = _mouth(features, self.needs[0])
        level = features[self.needs[1]]["level"]
        steps = np.round(times * LEVEL_RATE).astype(int)
        heard = steps < len(level)
        return _agreement(opening[heard], level[steps[heard]])


def _mouth(features: Features, need: Need) -> tuple[np.ndarray, np.ndarray]:
    """Times and openings of the pictures that show the face."""
    arrays = features[need]
    seen = ~np.isnan(arrays["opening"])
    return arrays["times"][seen], arrays["opening"][seen].astype(np.float64)


def _agreement(opening: np.ndarray, truth: np.ndarray) -> float:
    return NOTHING if len(opening) < FEWEST or np.std(truth) < FLAT_TRACK else correlation(opening, truth)
