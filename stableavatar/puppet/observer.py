"""What can be seen in a frame of the puppet world: lip aperture, mouth width, blink and where the face is, from pixels alone.

A locator finds the mouth and the point between the eyes in a heat map at a quarter of the size; a reader looks at each of the two
places, cut out upright and at one size. Frames are judged one by one, so nothing is guessed from how mouths usually move.
Trained by `observer_recipe` on renders that were painted over, blurred and discoloured.
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

WEIGHTS = Path(__file__).with_name("observer.safetensors")
STRIDE = 4
"""Pixels of a cell of the heat map."""
MULTIPLE = 16
"""Sizes that the locator can halve often enough."""
USUAL_AREA, USUAL_RATIO = 128 * 128, 1.4
"""Frames whose area differs from the usual one by more than this ratio are resized before they are looked at."""
MOUTH_VIEW = (48, 32, -0.9, 0.9, -0.45, 0.75)
"""Columns and rows of the cut-out, then left, right, top, bottom around the point, in distances of mouth and eyes."""
EYES_VIEW = (48, 24, -1.05, 1.05, -0.42, 0.42)
BATCH = 64
FOUND = 0.5
"""Share of the heat map's mass around its peak from which a face counts as found."""


@dataclass(frozen=True)
class Observation:
    """What was seen in T frames; every array float32."""

    aperture: np.ndarray
    """[T] 0 closed .. 1 widest open, as `Motion.aperture`."""
    width: np.ndarray
    """[T] mouth width 0 .. 1, as `Motion.width`."""
    blink: np.ndarray
    """[T] 0 open .. 1 closed."""
    mouth: np.ndarray
    """[T, 2] x and y in pixels of the middle of the lips' line; it stays with the head as the mouth opens."""
    eyes: np.ndarray
    """[T, 2] the point between the eyes."""
    confidence: np.ndarray
    """[T] 0 .. 1, the smaller one of the two heat maps' mass around their peaks."""

    @property
    def found(self) -> np.ndarray:
        """[T] whether there is a face."""
        return self.confidence > FOUND

    def __getitem__(self, frames: slice | np.ndarray) -> "Observation":
        """What was seen in some of the frames, by a slice or by their numbers."""
        return Observation(*(track[frames] for track in vars(self).values()))


def conv(width: int, out: int, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    """3 x 3 convolution, batch norm, ReLU."""
    layer = nn.Conv2d(width, out, 3, stride, padding=dilation, dilation=dilation, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(out), nn.ReLU(inplace=True))


def normalised(pixels: Tensor) -> Tensor:
    """[B, 3, H, W] without its mean colour and contrast, so that tint and brightness matter less."""
    centred = pixels - pixels.mean((2, 3), keepdim=True)
    return centred / (centred.square().mean((1, 2, 3), keepdim=True).sqrt() + 0.02)


class Locator(nn.Module):
    """Frames [B, 3, H, W] in [0, 1] -> logits [B, 2, H / 4, W / 4] of where the mouth and the point between the eyes are."""

    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Sequential(conv(3, 16), conv(16, 32, stride=2))
        self.middle = conv(32, 48, stride=2)
        self.coarse = nn.Sequential(conv(48, 64, stride=2), conv(64, 64, dilation=2))
        self.to_middle, self.to_fine = nn.Conv2d(64, 48, 1), nn.Conv2d(48, 32, 1)
        self.merge_middle, self.merge_fine = conv(48, 48), conv(32, 32)
        self.head = nn.Conv2d(32, 2, 1)

    def forward(self, frames: Tensor) -> Tensor:
        fine = self.fine(functional.avg_pool2d(normalised(frames), 2))
        middle = self.middle(fine)
        coarse = self.to_middle(self.coarse(middle))
        middle = self.merge_middle(middle + functional.interpolate(coarse, size=middle.shape[-2:]))
        return self.head(self.merge_fine(fine + functional.interpolate(self.to_fine(middle), size=fine.shape[-2:])))


class Reader(nn.Module):
    """Cut-outs [B, 3, rows, columns] -> values [B, n]."""

    def __init__(self, view: tuple[float, ...], values: int) -> None:
        super().__init__()
        cells = int(view[0] * view[1]) // 16
        self.layers = nn.Sequential(
            *(conv(3, 16), conv(16, 32, stride=2), conv(32, 32), conv(32, 48, stride=2), conv(48, 48), nn.Conv2d(48, 12, 1)),
            *(nn.Flatten(), nn.Linear(12 * cells, 48), nn.ReLU(inplace=True), nn.Linear(48, values)),
        )

    def forward(self, cut: Tensor) -> Tensor:
        return self.layers(normalised(cut))


class Observer(nn.Module):
    """The locator and the two readers; about 300 000 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.locator, self.mouth, self.eyes = Locator(), Reader(MOUTH_VIEW, 2), Reader(EYES_VIEW, 1)

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Frames [B, 3, H, W] in [0, 1] -> points [B, 2, 2] (mouth, eyes; x, y in pixels), confidence [B, 2], values [B, 3]."""
        points, confidence = peaks(self.locator(frames))
        return points, confidence, self.read(frames, points)

    def read(self, frames: Tensor, points: Tensor) -> Tensor:
        """Aperture, width and blink [B, 3] at the points [B, 2, 2]; of a cut-out and its mirror image, once trained."""
        values = []
        for which, (reader, view) in enumerate(((self.mouth, MOUTH_VIEW), (self.eyes, EYES_VIEW))):
            cut = cut_out(frames, points, which, view)
            values.append(reader(cut) if self.training else (reader(cut) + reader(cut.flip(3))) / 2)
        return torch.cat(values, dim=1)


def peaks(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Where heat maps [B, N, h, w] are highest: points [B, N, 2] (x, y in pixels), the mass within two cells of them [B, N].

    A point is the mean of the mass within two cells of the highest cell: what else is bright elsewhere does not pull it.
    """
    heat = logits.flatten(2).softmax(dim=2).view_as(logits)
    rows, columns = (torch.arange(n, device=heat.device, dtype=heat.dtype) for n in heat.shape[2:])
    highest = heat.flatten(2).argmax(dim=2)[..., None, None]
    near = ((rows[:, None] - highest // heat.shape[3]).abs() <= 2) & ((columns - highest % heat.shape[3]).abs() <= 2)
    mass = (heat * near).flatten(2).sum(dim=2)
    means = [(heat * near * axis).flatten(2).sum(dim=2) / mass for axis in (columns, rows[:, None])]
    return (torch.stack(means, dim=2) + 0.5) * STRIDE - 0.5, mass


def cut_out(frames: Tensor, points: Tensor, which: int, view: tuple[float, ...]) -> Tensor:
    """Upright cut-outs [B, 3, rows, columns] around a point.

    Args:
        frames: [B, 3, H, W]; points: [B, 2, 2] mouth and eyes, whose distance is the unit and whose direction is upright.
        which: 0 for the mouth, 1 for the eyes. view: as `MOUTH_VIEW`.
    """
    columns, rows, *borders = view
    down = points[:, 0] - points[:, 1]
    across = torch.stack([down[:, 1], -down[:, 0]], dim=1)
    steps = [low + (high - low) * (torch.arange(int(n), device=frames.device) + 0.5) / n
             for n, low, high in ((columns, *borders[:2]), (rows, *borders[2:]))]  # fmt: skip
    places = points[:, which, None, None] + steps[0][:, None] * across[:, None, None] + steps[1][:, None, None] * down[:, None, None]
    size = torch.tensor(frames.shape[:1:-1], device=frames.device)
    return functional.grid_sample(frames, (2 * places + 1) / size - 1, padding_mode="border", align_corners=False)


@lru_cache(maxsize=1)
def load_observer(path: Path = WEIGHTS) -> Observer:
    """The trained observer. Raises OSError if the file is missing, RuntimeError if it is of another network."""
    observer = Observer()
    observer.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()})
    return observer.eval()


@torch.no_grad()
def observe(frames: np.ndarray, observer: Observer | None = None) -> Observation:
    """What is seen in frames uint8 [T, H, W, 3], RGB; observer: None for the trained one.

    Raises:
        ValueError: frames of another shape or type.
    """
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not len(frames):
        raise ValueError(f"frames are {frames.dtype} {frames.shape}, expected uint8 [T, H, W, 3] of at least one frame")
    height, width = frames.shape[1:3]
    size = looked_at_size(width, height)
    if size != (width, height):
        frames = np.stack([cv2.resize(frame, size, interpolation=cv2.INTER_AREA) for frame in frames])
    observer = observer or load_observer()
    parts = [observer(torch.from_numpy(frames[i : i + BATCH]).permute(0, 3, 1, 2).float() / 255) for i in range(0, len(frames), BATCH)]
    points, confidence, values = (torch.cat(part).numpy() for part in zip(*parts))
    points = (points + 0.5) * np.array([width / size[0], height / size[1]], dtype=np.float32) - 0.5
    values = values.clip(0, 1)
    return Observation(values[:, 0], values[:, 1], values[:, 2], points[:, 0], points[:, 1], confidence.min(axis=1))


def looked_at_size(width: int, height: int) -> tuple[int, int]:
    """Width and height at which frames are looked at: their own if usual, else about 128 x 128 pixels in all; multiples of 16."""
    ratio = (USUAL_AREA / (width * height)) ** 0.5
    scale = ratio if not 1 / USUAL_RATIO < ratio**2 < USUAL_RATIO else 1.0
    return tuple(max(2, round(side * scale / MULTIPLE)) * MULTIPLE for side in (width, height))  # type: ignore[return-value]
