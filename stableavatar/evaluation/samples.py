"""Which pictures of a video each network sees, and one pass over the video that shows them to all networks."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from stableavatar.data.preparation.pictures import Pictures, nearest_frames, video_pictures
from stableavatar.media import AudioTrack, read_image

Arrays = dict[str, np.ndarray]
"""Features of a file by name. Those of pictures have one row for each, and say of it `times` (seconds) and `frames` (its number)."""
Stretch = tuple[int, int]
"""Frames [first, stop) of a generated video."""
IMAGE_FPS = 25.0
"""What is said of the rate of a single picture."""


class Seen(Protocol):
    """Pictures at a constant rate, as `Pictures` has them."""

    @property
    def path(self) -> Path: ...

    @property
    def frames(self) -> int: ...

    @property
    def fps(self) -> float: ...

    def read(self) -> Iterator[np.ndarray]:
        """All of them, uint8 [H, W, 3] RGB."""


@dataclass(frozen=True)
class Still:
    """An image file as a video of one picture."""

    path: Path
    frames: int = 1
    fps: float = IMAGE_FPS

    def read(self) -> Iterator[np.ndarray]:
        """The picture, uint8 [H, W, 3] RGB; ValueError where it cannot be read."""
        yield np.asarray(read_image(self.path, quiet=True))


def open_video(path: Path) -> Pictures:
    """The pictures of a video file, which is looked at again only if it has changed; ValueError where it cannot be read."""
    return _open_once(path, path.stat().st_mtime_ns if path.exists() else 0)


@lru_cache(maxsize=256)
def _open_once(path: Path, changed: int) -> Pictures:
    return video_pictures(path)


def first_picture(path: Path) -> Pictures:
    """Only the first picture of a video file."""
    return replace(open_video(path), frames=1)


@dataclass(frozen=True)
class View:
    """Which pictures of a video are looked at.

    Attributes:
        rate: so many a second, those nearest in time; 0 for each as it is.
        seconds: only those of so many last seconds; 0 for all.
        count: at most so many, at even times from the first to the last; 0 for all.
    """

    rate: float = 0.0
    seconds: float = 0.0
    count: int = 0

    def grid(self, pictures: Seen, span: tuple[float, float] | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Numbers, int64 [N] ascending, and times in seconds, float64 [N], of the pictures to look at.

        Args:
            span: only those at these seconds, [first, stop); None for all.
        """
        rate = self.rate or pictures.fps
        numbers = np.array(nearest_frames(pictures.frames, pictures.fps, rate) if self.rate else range(pictures.frames), np.int64)
        times = np.arange(len(numbers)) / rate
        chosen = np.ones(len(numbers), bool) if span is None else within(times, span)
        if self.seconds:
            chosen[: max(0, len(numbers) - round(self.seconds * rate))] = False
        kept = np.flatnonzero(chosen)
        if self.count and len(kept) > self.count:
            kept = kept[np.linspace(0, len(kept) - 1, self.count).round().astype(int)]
        return numbers[kept], times[kept]


def within(times: np.ndarray, span: tuple[float, float]) -> np.ndarray:
    """bool [N]: which times lie in [first, stop) seconds, but for what floating point adds to them."""
    slack = 1e-6
    return (times >= span[0] - slack) & (times < span[1] - slack)


class Watcher(Protocol):
    """What looks at some pictures of one video as they come."""

    numbers: Sequence[int]
    """Of the pictures that it wants, ascending; one that is there twice is shown twice."""

    def add(self, frame: np.ndarray) -> None:
        """The next of them, uint8 [H, W, 3] RGB."""

    def result(self) -> Arrays:
        """What all of them gave; ValueError if that is nothing."""


def watch(pictures: Seen, watchers: Sequence[Watcher]) -> None:
    """Shows a video to all watchers in one pass, up to the last picture that one of them wants.

    Raises:
        ValueError: it is damaged before that.
    """
    wanted = [np.bincount(watcher.numbers, minlength=pictures.frames) for watcher in watchers]
    last = max((int(max(watcher.numbers)) for watcher in watchers if len(watcher.numbers)), default=-1)
    shown = pictures if last + 1 == pictures.frames else replace(pictures, frames=last + 1)
    for number, frame in enumerate(shown.read() if last >= 0 else ()):
        for watcher, times in zip(watchers, wanted):
            for _ in range(times[number]):
                watcher.add(frame)


class BatchWatcher:
    """Brings each picture into the form that a network wants and gives them to it in batches.

    Args:
        grid: as `View.grid` gives it.
        prepare: uint8 [H, W, 3] RGB -> what the network wants of a picture.
        embed: a batch of those -> features, a row for each of them (or, of a network that sees clips, for each clip).
        batch: how many at a time.
        rows: say of each row its `times` and `frames`.
    """

    def __init__(
        self,
        grid: tuple[np.ndarray, np.ndarray],
        prepare: Callable[[np.ndarray], Any],
        embed: Callable[[list[Any]], Arrays],
        batch: int,
        rows: bool = True,
    ) -> None:
        self.numbers, self._times = grid
        self._prepare, self._embed, self._batch, self._rows = prepare, embed, batch, rows
        self._held: list[Any] = []
        self._done: list[Arrays] = []

    def add(self, frame: np.ndarray) -> None:
        """As `Watcher.add`."""
        self._held.append(self._prepare(frame))
        if len(self._held) == self._batch:
            self._flush()

    def result(self) -> Arrays:
        """As `Watcher.result`."""
        if self._held:
            self._flush()
        found = {name: np.concatenate([part[name] for part in self._done]) for name in self._done[0]} if self._done else {}
        return found | ({"times": self._times, "frames": self.numbers} if self._rows else {})

    def _flush(self) -> None:
        self._done.append(self._embed(self._held))
        self._held = []


class Network(ABC):
    """What makes features of a file; its definition and the file's content decide them.

    Attributes:
        name: as metrics and the cache call it.
        weights: settings `weights.*` without which it is absent.
        after: the network whose features of the same file it needs, empty for none.
        by_frame: its features have a row for each picture, so that those of a stretch are a part of those of the whole.
    """

    name: str
    weights: tuple[str, ...] = ()
    after: str = ""
    by_frame: bool = True

    @abstractmethod
    def definition(self) -> dict[str, Any]:
        """All but the file that decides its features: network, digest of its weights, view, size, range."""

    def load(self) -> None:
        """Loads the weights, if there are any, for the sake of what is wrong with them (ValueError)."""
        self.definition()


class PictureNetwork(Network):
    """A network that looks at pictures."""

    @abstractmethod
    def watch(self, pictures: Seen, known: Arrays, span: tuple[float, float] | None) -> Watcher:
        """What is to see a video.

        Args:
            known: the features by the network `after`.
            span: seconds [first, stop); None for all, as it always is for a network that works `by_frame`.

        Raises:
            ValueError: the video is too short.
        """


class SoundNetwork(Network):
    """A network that listens."""

    @abstractmethod
    def hear(self, track: AudioTrack) -> Arrays:
        """The features of a sound; ValueError if it is too short."""


class Faceless(ValueError):
    """No face is seen in any picture of a file."""
