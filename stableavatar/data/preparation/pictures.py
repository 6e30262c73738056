"""The pictures of a clip one after the other, from its video or from a folder of images."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stableavatar import ffmpeg
from stableavatar.data.clips import IMAGES, VIDEO, frame_file
from stableavatar.data.frames import nearest_in_time
from stableavatar.media import read_image


@dataclass(frozen=True)
class Pictures:
    """The pictures of a clip as training reads them: upright, at a constant rate.

    Attributes:
        path: a video file, or a folder of frame_i.png.
        frames, fps, width, height: how many, how many a second, pixels.
        start: seconds from the start of the file to the first; None for images.
    """

    path: Path
    frames: int
    fps: float
    width: int
    height: int
    start: float | None = None

    def read(self, indices: Sequence[int] | None = None) -> Iterator[np.ndarray]:
        """The pictures of these numbers (ascending, each once; None for all), uint8 [height, width, 3] RGB, one at a time.

        Raises:
            ValueError: one is missing, damaged or of another size.
        """
        indices = range(self.frames) if indices is None else indices
        return self._read_images(indices) if self.start is None else self._read_video(indices)

    def _read_images(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        for index in indices:
            path = frame_file(self.path, index)
            image = read_image(path, quiet=True)
            if image.size != (self.width, self.height):
                raise ValueError(f"{path} is of {image.width}x{image.height}; expected {self.width}x{self.height} as the first picture")
            yield np.asarray(image)

    def _read_video(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        def wrong(count: int, why: str) -> str | None:
            if count == len(indices):
                return None
            return f"cannot read frame {indices[count]} of {self.path}: {why.rstrip('.')}; expected {self.frames} frames"

        return ffmpeg.raw_frames(self._decode(indices), self.width, self.height, wrong)

    def _decode(self, indices: Sequence[int]) -> list[str]:
        """ffmpeg's arguments for these frames; the grid is that of `stableavatar.data.frames`."""
        chain = f"fps={self.fps!r}:start_time={self.start:.6f}"
        if len(indices) < self.frames:
            chain += ",select='" + "+".join(f"eq(n,{index})" for index in indices) + "'"
        return ["-xerror", "-threads", "1", *ffmpeg.file_input(self.path), "-map", "0:V:0", "-vf", chain, "-frames:v", str(len(indices))]


def spread(count: int, wanted: int) -> list[int]:
    """The middles of `wanted` equal parts of `count` frames, each once."""
    return sorted({int((part + 0.5) * count / wanted) for part in range(wanted)})


def video_pictures(path: Path) -> Pictures:
    """The pictures of a video file; ValueError where it cannot be read."""
    video = ffmpeg.probe_video(path)
    return Pictures(path, video.frames, video.fps, video.width, video.height, video.start)


def image_pictures(folder: Path, fps: float) -> Pictures:
    """The frame_0.png, frame_1.png, ... of a folder, up to the first number that is missing; ValueError where there is none."""
    frames = 0
    while frame_file(folder, frames).exists():
        frames += 1
    if not frames:
        raise ValueError(f"there is no {frame_file(folder, 0)}; give a folder of frame_0.png, frame_1.png, ...")
    return Pictures(folder, frames, fps, *read_image(frame_file(folder, 0), quiet=True).size)


def clip_pictures(folder: Path, fps: float) -> Pictures:
    """The pictures of a clip folder: those of images/, else those of sub_clip.mp4, as training takes them.

    Args:
        fps: rate of images/, which do not tell it.

    Raises:
        ValueError: it has neither, or they cannot be read.
    """
    if (folder / IMAGES).is_dir():
        return image_pictures(folder / IMAGES, fps)
    if not (folder / VIDEO).is_file():
        raise ValueError(f"no pictures in {folder}: it has neither {frame_file(Path(IMAGES), 0)} nor {VIDEO}")
    return video_pictures(folder / VIDEO)


def nearest_frames(frames: int, fps: float, wanted: float) -> list[int]:
    """The frame of a clip that is shown nearest to each time of another rate, ascending."""
    times = range(max(1, round(frames / fps * wanted)))
    return [min(index, frames - 1) for index in nearest_in_time(times, wanted, fps)]


def repeat_frames(frames: Iterator[np.ndarray], shown: Sequence[int]) -> Iterator[np.ndarray]:
    """The frames of these numbers, which ascend and may repeat."""
    numbered = enumerate(frames)
    number, frame = next(numbered)
    for wanted in shown:
        while number < wanted:
            number, frame = next(numbered)
        yield frame
