"""What a video cost to make, as the sidecar JSON beside it tells; for a stretch of it the figure is that of the whole."""

from typing import Any

from stableavatar.evaluation.metrics.base import Features, VideoMetric
from stableavatar.evaluation.pairs import Pair, read_record

GIGABYTE = 1e9


class CostMetric(VideoMetric):
    """A figure of the record of a run."""

    def lacks(self, pair: Pair) -> str:
        """As `Metric.lacks`."""
        return "" if self.figure(read_record(pair.generated)) is not None else "its sidecar JSON does not tell"

    def value(self, features: Features) -> float:
        """As `VideoMetric.value`."""
        figure = self.figure(read_record(features.pair.generated))
        return float("nan") if figure is None else figure

    def figure(self, record: dict[str, Any]) -> float | None:
        """From a record; None if it does not tell."""
        raise NotImplementedError


def _seconds(record: dict[str, Any], name: str) -> float | None:
    return record.get("timings", {}).get(name) or None


class FPS(CostMetric):
    """Pictures made a second, over the whole run: conditions, denoising, decoding and writing of the file (Live Avatar, section 10).

    Live Avatar measures on long videos, where what comes before the first picture does not count for much.
    """

    name, label, better, unit = "fps", "FPS", "higher", "frames/s"

    def figure(self, record: dict[str, Any]) -> float | None:
        """As `CostMetric.figure`."""
        total = _seconds(record, "total_seconds")
        return record["frames"] / total if total else None


class TimeToFirstFrame(CostMetric):
    """Seconds from a sound to the first picture that follows it (Live Avatar, section 10).

    The mean wait for the next frame boundary, half a frame at the rate at which pictures are made (`fps`), plus all that comes before the
    first picture is decoded: conditions, denoising and decoding.
    """

    name, label, better, unit = "time_to_first_frame", "TTFF", "lower", "s"

    def figure(self, record: dict[str, Any]) -> float | None:
        """As `CostMetric.figure`."""
        total, first = _seconds(record, "total_seconds"), _seconds(record, "first_frames_seconds")
        return first + 0.5 * total / record["frames"] if total and first else None


class Minutes(CostMetric):
    """Minutes that the whole run took, from reading the inputs to the finished file (table 9 of the StableAvatar paper: 81 frames)."""

    name, label, better, unit = "minutes", "Time", "lower", "min"

    def figure(self, record: dict[str, Any]) -> float | None:
        """As `CostMetric.figure`."""
        total = _seconds(record, "total_seconds")
        return total / 60 if total else None


class PeakMemory(CostMetric):
    """Largest memory that tensors held on the GPU at a time, in 10^9 bytes; of a run without a GPU the largest of the process."""

    name, label, better, unit = "peak_memory", "GPU Mem", "lower", "GB"

    def figure(self, record: dict[str, Any]) -> float | None:
        """As `CostMetric.figure`."""
        peak = record.get("peak_memory", {})
        held = peak.get("device_bytes") or peak.get("host_bytes")
        return held / GIGABYTE if held else None
