"""Window plans over latent frames and the weights that fuse their overlaps: integers and vectors, no device.

The dynamic weighted sliding window of the paper (algorithm 1, figure 8, table 8).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

WEIGHTS = ("log", "uniform", "fixed", "none")
TAILS = ("cut", "shift")


Pair = tuple[int, int]
"""(window, step): a window's way through one step."""


class Window(NamedTuple):
    """Latent frames [start, stop)."""

    start: int
    stop: int


def fusion_weights(overlap: int, kind: str) -> Tensor:
    """Weight [overlap] of the newer window in an overlap; the older one has the rest.

    `log`: log1p(w (e - 1)) of w = linspace(0, 1), min-max normalised; `uniform`: w itself; `fixed`: 0.5;
    `none`: 1, a plain sliding window that overwrites. A single frame of overlap has no ramp and is averaged.
    """
    if kind == "none":
        return torch.ones(overlap)
    if kind == "fixed" or overlap == 1:
        return torch.full((overlap,), 0.5)
    ramp = torch.linspace(0, 1, overlap)
    return {"uniform": ramp, "log": torch.log1p(ramp * (math.e - 1))}[kind]


@dataclass(frozen=True)
class WindowPlan:
    """Windows in order; each reaches further than the one before.

    Attributes:
        windows: together they cover every latent frame.
        weights: kind of fusion weights, one of `WEIGHTS`.
    """

    windows: tuple[Window, ...]
    weights: str = "log"

    @classmethod
    def sliding(cls, total: int, length: int, overlap: int, tail: str = "cut", weights: str = "log") -> "WindowPlan":
        """Windows of `length` latent frames every `length - overlap`.

        Args:
            total: latent frames of the video, from 1 up.
            tail: what becomes of a last window that would pass the end: `cut` short there (as in the paper), or its start
                `shift`ed back so that it keeps its length.
        """
        if not 0 <= overlap < length:
            raise ValueError(f"window overlap {overlap} must be at least 0 and smaller than the window's {length} latent frames")
        if weights not in WEIGHTS or tail not in TAILS:
            raise ValueError(f"weights '{weights}', tail '{tail}': expected one of {WEIGHTS} and one of {TAILS}")
        windows = [Window(0, min(length, total))]
        while windows[-1].stop < total:
            stop = min(windows[-1].stop - overlap + length, total)
            start = stop - length if tail == "shift" else windows[-1].stop - overlap
            windows.append(Window(start, stop))
        return cls(tuple(windows), weights)

    def __len__(self) -> int:
        return len(self.windows)

    @property
    def total(self) -> int:
        """Latent frames of the video."""
        return self.windows[-1].stop

    def stretch(self, index: int) -> Window:
        """The frames that no later window reaches into: they are final once window `index` is through a step."""
        start = self.windows[index].start
        return Window(start, self.windows[index + 1].start if index + 1 < len(self) else self.total)

    def overlap(self, index: int) -> int:
        """Frames that window `index` shares with earlier windows."""
        return self.windows[index - 1].stop - self.windows[index].start if index else 0

    def fusion(self, index: int) -> Tensor:
        """Fusion weights [overlap] of window `index`."""
        return fusion_weights(self.overlap(index), self.weights)

    @cached_property
    def reach(self) -> int:
        """How many windows after it overlap a window, at most: a window needs them one step earlier."""
        starts = [window.start for window in self.windows]
        return max(sum(start < window.stop for start in starts[i + 1 :]) for i, window in enumerate(self.windows))

    def waves(self, steps: int, lag: int) -> Iterator[list[Pair]]:
        """Pairs in diagonals: every step follows `lag` windows behind the one before, the earliest step of a wave first."""
        for wave in range(len(self) + lag * (steps - 1)):
            pairs = ((wave - lag * step, step) for step in range(steps))
            yield [(window, step) for window, step in pairs if 0 <= window < len(self)]

    def order(self, steps: int, kind: str) -> list[Pair]:
        """All pairs in an order that respects what depends on what.

        Window k at step i reads latents that every window overlapping it has brought through step i - 1.
        `step_major` finishes a step for all windows before the next, as algorithm 1 does; `wavefront` starts the next step as
        soon as it may, so that only a band of about reach x steps windows is in work and finished ones stream out.
        """
        if kind == "step_major":
            return [(window, step) for step in range(steps) for window in range(len(self))]
        return [pair for wave in self.waves(steps, self.reach) for pair in wave]
