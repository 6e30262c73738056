"""Pixels, masks and sound of a run of frames of a clip, on the grid of the training rate.

Frame j of that grid is at j / fps seconds. It shows the source frame nearest in time, so picture and sound differ by at most half a
source frame, and not more at the end of a clip than at its start.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from stableavatar import ffmpeg
from stableavatar.data.clips import IMAGES, MASKS, VIDEO, Clip, frame_file
from stableavatar.geometry import SPATIAL_STRIDE, frame_samples, frames_to_latents
from stableavatar.media import AudioTrack, crop_image, read_image

ROUNDING = 1e-6
"""Frames: what floating point may add to a time that lies half way between two frames."""
REORDERED = 20
"""Frames to decode ahead: codecs show a frame up to 16 later than they decode it, and those before a key frame may need earlier ones."""


def sample_indices(clip: Clip, start: int, frames: int, fps: float) -> list[int]:
    """Source frames shown at frames start..start + frames - 1 of the training grid."""
    return nearest_in_time(range(start, start + frames), fps, clip.fps)


def nearest_in_time(frames: Iterable[int], fps: float, source_fps: float) -> list[int]:
    """For each frame of a grid the one of another grid that is nearest in time, the earlier of two."""
    return [math.ceil(frame * source_fps / fps - 0.5 - ROUNDING) for frame in frames]


def read_pixels(clip: Clip, indices: Sequence[int], width: int, height: int) -> Tensor:
    """Source frames `indices` (ascending), uint8 [T, height, width, 3]: cut to the aspect around the centre and resized if need be.

    Raises:
        ValueError, OSError: pictures are missing, damaged, or not of the clip's size.
    """
    frames = _read_images(clip, indices) if clip.video is None else _read_video(clip, indices)
    pixels = {index: np.asarray(crop_image(image, width, height)) for index, image in frames}
    return torch.from_numpy(np.stack([pixels[index] for index in indices]))


def _read_images(clip: Clip, indices: Sequence[int]) -> Iterator[tuple[int, Image.Image]]:
    """Each frame of `indices` once, with its number."""
    for index in sorted(set(indices)):
        path = frame_file(clip.folder / IMAGES, index)
        yield index, _checked(read_image(path, quiet=True), clip, path)


def _checked(image: Image.Image, clip: Clip, path: Path) -> Image.Image:
    if image.size != (clip.width, clip.height):
        raise ValueError(f"{path} is of {image.width}x{image.height}; expected {clip.width}x{clip.height} as the clip's first picture")
    return image


def _read_video(clip: Clip, indices: Sequence[int]) -> Iterator[tuple[int, Image.Image]]:
    """The same from sub_clip.mp4, in one pass from the first to the last that is wanted."""
    first, count, wanted = indices[0], indices[-1] - indices[0] + 1, set(indices)

    def wrong(there: int, why: str) -> str | None:
        if there == count:
            return None
        return f"cannot read frame {first + there} of {clip.folder / VIDEO}: {why.rstrip('.')}; expected {clip.frames} frames"

    frames = ffmpeg.raw_frames(_decode_arguments(clip, first, count), clip.width, clip.height, wrong)
    return ((index, Image.fromarray(frame)) for index, frame in enumerate(frames, first) if index in wanted)


def _decode_arguments(clip: Clip, first: int, count: int) -> list[str]:
    """ffmpeg's arguments for `count` frames from `first` on.

    An evenly spaced stream is entered shortly before the first that is wanted, any other at its start: what is shown at a time may
    have come long before.
    """
    stream = clip.video
    begin = stream.start + first / stream.fps
    seek = max(0.0, begin - REORDERED / stream.fps) if stream.even else 0.0
    grid = f"fps={stream.fps!r}:start_time={begin - seek:.6f}"
    # One thread: a loader's workers decode side by side. -xerror: a damaged frame must not be painted over with its neighbours.
    source = ["-xerror", "-threads", "1", "-ss", f"{seek:.6f}", *ffmpeg.file_input(clip.folder / VIDEO)]
    return [*source, "-map", "0:V:0", "-vf", grid, "-frames:v", str(count)]


def read_masks(clip: Clip, indices: Sequence[int], width: int, height: int) -> Tensor:
    """Face and lip masks of source frames `indices` at latent size, float32 [2, F, height / 8, width / 8] in [0, 1].

    Cut as the pixels are, then interpolated trilinearly to latent size; ones where the clip has none.

    Raises:
        ValueError, OSError: masks are missing from a folder, damaged, or not of the clip's size.
    """
    size = (frames_to_latents(len(indices)), height // SPATIAL_STRIDE, width // SPATIAL_STRIDE)
    masks = [
        _read_mask(clip, name, indices, (width, height), size) if there else torch.ones(size)
        for name, there in zip(MASKS, clip.masks)
    ]
    return torch.stack(masks)


def _read_mask(clip: Clip, name: str, indices: Sequence[int], pixels: tuple[int, int], size: tuple[int, int, int]) -> Tensor:
    """One kind of mask, float32 `size`. Space is done frame by frame before time, which is the same and needs little memory."""

    def small(index: int) -> Tensor:
        path = frame_file(clip.folder / name, index)
        grey = _checked(read_image(path, quiet=True, backdrop="black").convert("L"), clip, path)
        if grey.getextrema()[1] == 1:  # masks of zeros and ones, as some tools save them
            grey = grey.point(lambda value: 255 * value)
        grey = crop_image(grey, *pixels, Image.Resampling.BILINEAR)
        return functional.interpolate(torch.from_numpy(np.array(grey))[None, None] / 255, size[1:], mode="bilinear")[0, 0]

    frames = {index: small(index) for index in set(indices)}
    stacked = torch.stack([frames[index] for index in indices])
    return functional.interpolate(stacked[None, None], size, mode="trilinear")[0, 0]


def read_sound(clip: Clip, start: int, frames: int, fps: float) -> np.ndarray:
    """The sound of exactly frames start..start + frames - 1 of the training grid, float32 [samples] at 16 kHz.

    Raises:
        ValueError, OSError: it cannot be read.
    """
    first, last = (frame_samples(frame, fps) - clip.sound_delay for frame in (start, start + frames))
    with AudioTrack(clip.folder / clip.sound, quiet=True) as track:
        return track.read(first, last)
