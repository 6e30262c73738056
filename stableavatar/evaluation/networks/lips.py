"""What SyncNet sees of the lips and hears of the voice, window by window."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stableavatar.data.preparation.faces import whole_track
from stableavatar.evaluation.networks.landmarks import Landmarks
from stableavatar.evaluation.samples import Arrays, PictureNetwork, Seen, SoundNetwork, View, Watcher
from stableavatar.evaluation.syncnet import (
    STEPS,
    STEPS_PER_PICTURE,
    SYNC_FPS,
    WINDOW,
    FacePlaces,
    SyncNet,
    crop_face,
    load_syncnet,
    mfcc_steps,
)  # fmt: skip
from stableavatar.evaluation.weights import Tools, checked_weights
from stableavatar.geometry import SAMPLE_RATE
from stableavatar.media import AudioTrack
from stableavatar.sampling.offload import resolve_device

VOICES = 256
"""Windows of sound at a time."""


class _Half:
    """What both halves of SyncNet share."""

    weights = ("syncnet",)

    def __init__(self, tools: Tools) -> None:
        self._path, self._paths, self._device, self._batch = Path(tools.weights.syncnet), tools.weights, tools.device, tools.batch

    def load(self) -> None:
        """As `Network.load`."""
        self.definition()
        self._model()

    def definition(self) -> dict[str, Any]:
        """As `Network.definition`."""
        return {"network": "SyncNet", "sha256": checked_weights("syncnet", self._path, self._paths), "fps": SYNC_FPS}

    def _model(self) -> SyncNet:
        return syncnet_on(str(self._path), self._device)


class Lips(_Half, PictureNetwork):
    """`embedding`, float32 [N, 1024]: windows of 5 crops of the main face at 25 pictures a second, one window from each picture on.

    The crops are those of `syncnet.face_crops` around the boxes of `Landmarks`, between sightings on straight lines.
    """

    name, after = "lips", "landmarks"

    def __init__(self, tools: Tools) -> None:
        super().__init__(tools)
        self._faces = Landmarks(tools)

    def definition(self) -> dict[str, Any]:
        """As `Network.definition`."""
        return super().definition() | {"faces": self._faces.definition()}

    def watch(self, pictures: Seen, known: Arrays, span: tuple[float, float] | None) -> Watcher:
        """As `PictureNetwork.watch`."""
        numbers, times = View(rate=SYNC_FPS).grid(pictures)
        if len(numbers) <= WINDOW:
            raise ValueError(f"{pictures.path} is shorter than {(WINDOW + 1) / SYNC_FPS} s; lip-sync cannot be measured")
        boxes = whole_track([None if np.isnan(box[0]) else box for box in known["box"]])
        return _LipWatcher(numbers, times, FacePlaces.around(boxes[numbers]), self._model(), self._batch)


class _LipWatcher:
    """Cuts the face out of each picture and embeds windows in batches."""

    def __init__(self, numbers: np.ndarray, times: np.ndarray, places: FacePlaces, model: SyncNet, batch: int) -> None:
        self.numbers = numbers
        self._times, self._places, self._model, self._batch = times, places, model, batch
        self._held: list[np.ndarray] = []
        self._taken = 0
        self._done: list[np.ndarray] = []

    def add(self, frame: np.ndarray) -> None:
        """As `Watcher.add`."""
        self._held.append(crop_face(frame, self._places, self._taken))
        self._taken += 1
        if len(self._held) == self._batch + WINDOW - 1:
            self._flush()

    def result(self) -> Arrays:
        """As `Watcher.result`."""
        if len(self._held) >= WINDOW:
            self._flush()
        embedding = np.concatenate(self._done)
        return {"embedding": embedding, "times": self._times[: len(embedding)], "frames": self.numbers[: len(embedding)]}

    def _flush(self) -> None:
        pictures = torch.from_numpy(np.stack(self._held)[..., ::-1].copy()).permute(0, 3, 1, 2).float()
        with torch.inference_mode():
            self._done.append(self._model.embed_lips(pictures.to(_device(self._model))).cpu().numpy())
        self._held = self._held[1 - WINDOW :]


class Voice(_Half, SoundNetwork):
    """`embedding`, float32 [N, 1024]: the windows of sound that belong to those of `Lips`; the last picture of a sound makes none."""

    name = "voice"

    def hear(self, track: AudioTrack) -> Arrays:
        """As `SoundNetwork.hear`."""
        count = track.samples * SYNC_FPS // SAMPLE_RATE - WINDOW
        if count < 1:
            raise ValueError(f"{track.path} is shorter than {(WINDOW + 1) / SYNC_FPS} s; lip-sync cannot be measured")
        model, done = self._model(), []
        for first in range(0, count, VOICES):
            windows = min(VOICES, count - first)
            steps = mfcc_steps(track, STEPS_PER_PICTURE * first, STEPS_PER_PICTURE * (windows - 1) + STEPS)
            with torch.inference_mode():
                done.append(model.embed_voice(torch.from_numpy(steps).to(_device(model))).cpu().numpy())
        return {"embedding": np.concatenate(done), "times": np.arange(count) / SYNC_FPS}


def _device(model: SyncNet) -> torch.device:
    return next(model.parameters()).device


@lru_cache(maxsize=1)
def syncnet_on(path: str, device: str) -> SyncNet:
    """SyncNet on a device, auto for the GPU if there is one; ValueError as `load_syncnet`."""
    return load_syncnet(path, resolve_device(device))
