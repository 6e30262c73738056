"""Features that need no weights: colours, changes from frame to frame, and how loud a sound is."""

from typing import Any

import cv2
import numpy as np

from stableavatar.evaluation.samples import Arrays, BatchWatcher, PictureNetwork, Seen, SoundNetwork, View, Watcher
from stableavatar.geometry import SAMPLE_RATE
from stableavatar.media import AudioTrack

LEVEL_RATE = 100
"""Levels a second."""
LEVEL_SPAN = SAMPLE_RATE // 25
"""Samples that a level is of: those of a picture at 25 a second."""
CHUNK = 6000
"""Levels at a time."""
ALL = View()


class Colour(PictureNetwork):
    """`mean`, float64 [T, 3]: mean red, green and blue of every picture, 0 to 255."""

    name = "colour"

    def definition(self) -> dict[str, Any]:
        """As `Network.definition`."""
        return {"network": "mean RGB of all pixels"}

    def watch(self, pictures: Seen, known: Arrays, span: tuple[float, float] | None) -> Watcher:
        """As `PictureNetwork.watch`."""
        return BatchWatcher(ALL.grid(pictures), lambda frame: cv2.mean(frame)[:3], lambda held: {"mean": np.array(held)}, batch=512)


class Change(PictureNetwork):
    """`change`, float64 [T]: mean absolute difference of every picture from the one before, 0 to 255; 0 for the first."""

    name = "change"

    def definition(self) -> dict[str, Any]:
        """As `Network.definition`."""
        return {"network": "mean absolute difference from the picture before"}

    def watch(self, pictures: Seen, known: Arrays, span: tuple[float, float] | None) -> Watcher:
        """As `PictureNetwork.watch`."""
        return BatchWatcher(ALL.grid(pictures), _Differences(), lambda held: {"change": np.array(held)}, batch=512)


class _Differences:
    """Takes picture after picture and tells how far each is from the last."""

    def __init__(self) -> None:
        self._before: np.ndarray | None = None

    def __call__(self, frame: np.ndarray) -> float:
        before, self._before = self._before, frame
        return 0.0 if before is None else float(np.mean(cv2.mean(cv2.absdiff(frame, before))[:3]))


class Envelope(SoundNetwork):
    """`level`, float64 [N] at 100 a second: root mean square of the 40 ms of sound from each time on (16 kHz mono, full scale 1)."""

    name = "envelope"

    def definition(self) -> dict[str, Any]:
        """As `Network.definition`."""
        return {"network": "root mean square", "rate": LEVEL_RATE, "span": LEVEL_SPAN}

    def hear(self, track: AudioTrack) -> Arrays:
        """As `SoundNetwork.hear`."""
        hop = SAMPLE_RATE // LEVEL_RATE
        count, levels = max(1, track.samples // hop), []
        for first in range(0, count, CHUNK):
            steps = min(CHUNK, count - first)
            samples = track.read(first * hop, (first + steps - 1) * hop + LEVEL_SPAN).astype(np.float64)
            windows = np.lib.stride_tricks.sliding_window_view(np.square(samples), LEVEL_SPAN)[::hop]
            levels.append(np.sqrt(windows.mean(axis=1)))
        return {"level": np.concatenate(levels)}
