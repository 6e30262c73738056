"""SyncNet: how well lips and voice agree, and by how many pictures one is ahead of the other.

J. S. Chung and A. Zisserman, "Out of time: automated lip sync in the wild", 2016. The network, the crop of the face and the measures
are those of the authors' program (syncnet_python) with the weights syncnet_v2.model; Sync-D is its "Min dist", Sync-C its "Confidence".

T pictures are at 25 a second; a window is 5 of them and the 20 MFCC frames (100 a second) that start with the first of them.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
import torch
from python_speech_features import mfcc
from scipy.ndimage import median_filter
from torch import Tensor, nn
from torch.nn import functional

from stableavatar.geometry import SAMPLE_RATE
from stableavatar.media import AudioTrack
from stableavatar.models.checkpoint_files import TORCH_ERRORS

SYNC_FPS = 25
SHIFT = 15
"""Offsets are tried from -SHIFT to SHIFT pictures."""
WINDOW = 5
"""Pictures of a window; a window counts only if one more picture and its sound follow."""
STEPS_PER_PICTURE = 4
STEPS = WINDOW * STEPS_PER_PICTURE
"""MFCC frames of a window."""
HOP, SPAN = SAMPLE_RATE // 100, SAMPLE_RATE // 40
"""Samples from one MFCC frame to the next, and of one."""
COEFFICIENTS = 13
EMBEDDING = 1024
SIZE = 224
FULL_SCALE = 32_768
"""The weights expect samples of 16 bits: the first coefficient is the logarithm of their energy."""
CROP_SCALE = 0.4
"""How far the crop stands out of the face box, in halves of its longer side: once to the left and right, twice below, not above."""
SMOOTHING = 13
"""Frames of the running median of box positions and sizes."""
GREY = 110
"""What stands for pixels outside of the picture."""


@dataclass(frozen=True)
class Sync:
    """The agreement of a face and a voice.

    Attributes:
        distance: Sync-D, the smallest of the mean distances at the offsets tried; lower is better.
        confidence: Sync-C, the median of those distances minus the smallest; higher is better.
        offset: pictures by which the lips come after the voice, where the distance is smallest.
        windows: how many windows the means are of.
    """

    distance: float
    confidence: float
    offset: int
    windows: int


class SyncNet(nn.Module):
    """Both halves of the network; its tensors have the names of syncnet_v2.model. For inference only (`eval`)."""

    def __init__(self) -> None:
        super().__init__()
        self.netcnnaud = nn.Sequential(
            *_layer(nn.Conv2d, 1, 64, 3, padding=1), nn.MaxPool2d(1, 1),  # changes nothing, but counts in the tensors' names
            *_layer(nn.Conv2d, 64, 192, 3, padding=1), nn.MaxPool2d(3, (1, 2)),
            *_layer(nn.Conv2d, 192, 384, 3, padding=1),
            *_layer(nn.Conv2d, 384, 256, 3, padding=1),
            *_layer(nn.Conv2d, 256, 256, 3, padding=1), nn.MaxPool2d(3, 2),
            *_layer(nn.Conv2d, 256, 512, (5, 4)),
        )  # fmt: skip
        self.netfcaud = _head()
        flat, halved = (0, 1, 1), (1, 2, 2)
        self.netcnnlip = nn.Sequential(
            *_layer(nn.Conv3d, 3, 96, (WINDOW, 7, 7), stride=halved), nn.MaxPool3d((1, 3, 3), halved),
            *_layer(nn.Conv3d, 96, 256, (1, 5, 5), stride=halved, padding=flat), nn.MaxPool3d((1, 3, 3), halved, flat),
            *_layer(nn.Conv3d, 256, 256, (1, 3, 3), padding=flat),
            *_layer(nn.Conv3d, 256, 256, (1, 3, 3), padding=flat),
            *_layer(nn.Conv3d, 256, 256, (1, 3, 3), padding=flat), nn.MaxPool3d((1, 3, 3), halved),
            *_layer(nn.Conv3d, 256, 512, (1, 6, 6)),
        )  # fmt: skip
        self.netfclip = _head()

    def embed_lips(self, crops: Tensor) -> Tensor:
        """Windows of consecutive face crops, float32 [T, 3, 224, 224] of 0..255 in the order blue, green, red -> [T - 4, 1024]."""
        features = self.netcnnlip(crops.transpose(0, 1)[None])
        return self.netfclip(features[0, :, :, 0, 0].T)

    def embed_voice(self, steps: Tensor) -> Tensor:
        """Windows of consecutive MFCC frames, float32 [4 N + 16, 13] -> [N, 1024]."""
        windows = steps.unfold(0, STEPS, STEPS_PER_PICTURE)
        return self.netfcaud(self.netcnnaud(windows[:, None]).flatten(1))


def _layer(convolution: type[nn.Module], inputs: int, outputs: int, kernel: int | tuple[int, ...], **options: object) -> list[nn.Module]:
    norm = nn.BatchNorm2d if convolution is nn.Conv2d else nn.BatchNorm3d
    return [convolution(inputs, outputs, kernel, **options), norm(outputs), nn.ReLU(inplace=True)]


def _head() -> nn.Sequential:
    return nn.Sequential(nn.Linear(512, 512), nn.BatchNorm1d(512), nn.ReLU(inplace=True), nn.Linear(512, EMBEDDING))


def load_syncnet(path: str | Path, device: torch.device | str = "cpu") -> SyncNet:
    """The network with the weights of a file, every tensor in its place.

    Raises:
        ValueError: no such file, not a file of tensors, or not those of SyncNet.
    """
    if not Path(path).is_file():
        raise ValueError(f"SyncNet's weights {path} do not exist; fetch syncnet_v2.model and give its path")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        model = SyncNet()
        model.load_state_dict(state)
    except TORCH_ERRORS as error:
        lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
        reason = " ".join(lines[:2])[:200] if lines else type(error).__name__
        raise ValueError(f"{path} does not hold SyncNet's weights ({reason}); expected syncnet_v2.model") from None
    return model.eval().requires_grad_(False).to(device)


def mfcc_steps(track: AudioTrack, first: int, count: int) -> np.ndarray:
    """MFCC frames first..first + count - 1 of a sound, float32 [count, 13]; frame i starts at 0.01 i seconds."""
    lead = min(first, 1)  # the sample before the first is needed: the filter that raises the treble looks back by one
    samples = track.read((first - lead) * HOP, (first + count - 1) * HOP + SPAN).astype(np.float64) * FULL_SCALE
    return mfcc(samples, SAMPLE_RATE, numcep=COEFFICIENTS)[lead:].astype(np.float32)


def face_crops(frames: Iterable[np.ndarray], boxes: np.ndarray) -> Iterator[np.ndarray]:
    """The face in each frame as the network wants it, uint8 [224, 224, 3] RGB.

    Args:
        frames: uint8 [H, W, 3] RGB.
        boxes: of the face from forehead to chin in each of them, [T, 4] x0 y0 x1 y1 in pixels.
    """
    places = FacePlaces.around(boxes)
    for number, frame in enumerate(islice(frames, len(boxes))):
        yield crop_face(frame, places, number)


@dataclass(frozen=True, eq=False)
class FacePlaces:
    """Where the face is in each of T pictures: its middle, float64 [T, 2] x y, and half of its longer side, float64 [T], smoothed."""

    centres: np.ndarray
    halves: np.ndarray

    @classmethod
    def around(cls, boxes: np.ndarray) -> "FacePlaces":
        """From boxes [T, 4] x0 y0 x1 y1 in pixels."""
        corners = boxes.astype(np.float64).reshape(-1, 2, 2)
        halves = _smooth(np.diff(corners, axis=1)[:, 0].max(1) / 2)
        return cls(np.stack([_smooth(side) for side in corners.mean(1).T], axis=1), np.maximum(halves, 1.0))


def _smooth(values: np.ndarray) -> np.ndarray:
    """Running median; at the ends the first and last value go on (the authors' goes on with zeros)."""
    return median_filter(values, SMOOTHING, mode="nearest")


def crop_face(frame: np.ndarray, places: FacePlaces, number: int) -> np.ndarray:
    """The face in picture `number`, as `face_crops` gives it."""
    (x, y), half = places.centres[number], places.halves[number]
    margin = int(half * (1 + 2 * CROP_SCALE)) + 1
    top, bottom = int(y - half + margin), int(y + half * (1 + 2 * CROP_SCALE) + margin)
    left, right = int(x - half * (1 + CROP_SCALE) + margin), int(x + half * (1 + CROP_SCALE) + margin)
    padded = cv2.copyMakeBorder(frame, *4 * [margin], cv2.BORDER_CONSTANT, value=3 * [GREY])
    return cv2.resize(padded[max(0, top) : bottom, max(0, left) : right], (SIZE, SIZE))


class OffsetDistances:
    """Distances between windows of lips and of voice at every offset, averaged as the windows come; memory does not grow."""

    def __init__(self) -> None:
        self._sums = torch.zeros(2 * SHIFT + 1, dtype=torch.float64)
        self._count = 0
        self._lips: Tensor | None = None
        self._voices: Tensor | None = None

    def add(self, lips: Tensor, voices: Tensor) -> None:
        """The next windows, [N, C] each. Beyond the ends of the voice zeros are compared, as in the authors' program."""
        assert lips.shape == voices.shape, (lips.shape, voices.shape)
        if self._lips is None:
            self._lips, self._voices = lips[:0], lips.new_zeros(SHIFT, lips.shape[1])
        self._lips, self._voices = torch.cat([self._lips, lips]), torch.cat([self._voices, voices])
        self._compare()

    def result(self) -> Sync:
        """What all windows say; no more can be added."""
        assert self._lips is not None, "nothing was added"
        self._voices = functional.pad(self._voices, (0, 0, 0, SHIFT))
        self._compare()
        means = self._sums / self._count
        best = int(means.argmin())
        return Sync(float(means[best]), float(means.median() - means[best]), SHIFT - best, self._count)

    def _compare(self) -> None:
        """Takes in the lips for which all the voice up to SHIFT windows later is there."""
        ready = len(self._voices) - 2 * SHIFT
        if ready > 0:
            near = self._voices.unfold(0, 2 * SHIFT + 1, 1).transpose(1, 2)
            distances = functional.pairwise_distance(self._lips[:ready, None], near)
            self._sums += distances.double().sum(0).cpu()
            self._count += ready
            self._lips, self._voices = self._lips[ready:], self._voices[ready:]


def measure_sync(model: SyncNet, crops: Iterable[np.ndarray], track: AudioTrack, batch: int = 16) -> Sync:
    """How well a face and a voice agree.

    Args:
        model: on the device to compute on.
        crops: the face at 25 pictures a second, uint8 [224, 224, 3] RGB (see `face_crops`); they are taken as they are needed.
        track: the sound from the first picture on.
        batch: windows at a time.

    Raises:
        ValueError: picture or sound is shorter than a window and one picture, 0.24 seconds.
    """
    device = next(model.parameters()).device
    distances, done = OffsetDistances(), 0
    for chunk in _window_chunks(crops, track.samples * SYNC_FPS // SAMPLE_RATE, batch):
        count = len(chunk) - WINDOW + 1
        steps = mfcc_steps(track, STEPS_PER_PICTURE * done, STEPS_PER_PICTURE * (count - 1) + STEPS)
        pictures = torch.from_numpy(np.stack(chunk)[..., ::-1].copy()).to(device).permute(0, 3, 1, 2).float()
        with torch.inference_mode():
            distances.add(model.embed_lips(pictures), model.embed_voice(torch.from_numpy(steps).to(device)))
        done += count
    if not done:
        raise ValueError(f"{track.path} or its picture is shorter than {(WINDOW + 1) / SYNC_FPS} s; lip-sync cannot be measured")
    return distances.result()


def _window_chunks(crops: Iterable[np.ndarray], limit: int, batch: int) -> Iterator[Sequence[np.ndarray]]:
    """Runs of crops that hold `batch` windows or, at the end, fewer; at most `limit` crops are taken, and the last makes no window."""
    held: deque[np.ndarray] = deque()
    for crop in islice(crops, limit):
        held.append(crop)
        if len(held) == batch + WINDOW:
            yield list(held)[:-1]
            for _ in range(batch):
                held.popleft()
    if len(held) > WINDOW:
        yield list(held)[:-1]
