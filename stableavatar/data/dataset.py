"""Samples by order: an `Item` goes in, a run of frames with its sound and masks comes out."""

import logging
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch.utils.data import Dataset

from stableavatar.data.clips import MASKS, Clip, one_line
from stableavatar.data.frames import read_masks, read_pixels, read_sound, sample_indices
from stableavatar.data.samples import Bucket, EncodedSample, Item, Sample

logger = logging.getLogger(__name__)

TRIES = 20
"""Clips of a bucket that are tried in a row before it is given up; at the largest usual share of broken clips, 5 %, never by chance."""
START = 2
"""Keeps the starts of the runs apart from what else is drawn from the same seed."""
NAMED_PARTS = 3
"""Parts of a clip's path that make its random numbers (rec/speech/00001): the data may move to another disk."""


@dataclass(frozen=True)
class Loaded:
    """What a dataset delivers for an order.

    Attributes:
        value: the sample. If the ordered clip was broken, that of another clip of the bucket, whose item has weight 0.
        broken: (clip folder, reason) of each clip that could not be read.
    """

    value: Sample | EncodedSample
    broken: tuple[tuple[str, str], ...] = ()


def start_of(clip: Clip, run: int, frames: int, fps: float, seed: int) -> int:
    """Where a run of `frames` frames starts on the grid of the training rate: uniform over what picture and sound last."""
    choices = clip.frames_at(fps) - frames + 1
    assert choices > 0, f"{clip.name} is shorter than its bucket"
    name = zlib.crc32("/".join(clip.folder.parts[-NAMED_PARTS:]).encode(errors="surrogateescape"))
    return int(np.random.default_rng(np.random.SeedSequence([seed, name, run, START])).integers(choices))


class BucketDataset(Dataset[Loaded]):
    """`dataset[item] -> Loaded`, with the next readable clip of the bucket in the place of one that cannot be read.

    Args:
        clips: what items count into; buckets: indices of the clips in each bucket.
    """

    def __init__(self, clips: Sequence[Clip], buckets: Mapping[Bucket, Sequence[int]]) -> None:
        self.clips, self.buckets = clips, buckets

    def __getitem__(self, item: Item) -> Loaded:
        """The sample of an order, or of the next clip of the bucket that can be read.

        Raises:
            ValueError: none of those that were tried can be read.
        """
        broken: list[tuple[str, str]] = []
        for index in self._candidates(item):
            try:
                sample = self.read(replace(item, clip=index, weight=0) if broken else item)
            except (ValueError, OSError) as error:
                broken.append((self.clips[index].name, one_line(error)))
            else:
                return Loaded(sample, tuple(broken))
        shape = f"{item.bucket.width}x{item.bucket.height}, {item.bucket.frames} frames"
        raise ValueError(f"{len(broken)} clips in a row cannot be read (bucket {shape}), the first: {': '.join(broken[0])}")

    def _candidates(self, item: Item) -> Iterator[int]:
        """The ordered clip, then those that follow it in its bucket."""
        yield item.clip
        indices = list(self.buckets[item.bucket])
        at = indices.index(item.clip)
        yield from (indices[at + 1 :] + indices[:at])[: TRIES - 1]

    def read(self, item: Item) -> Sample | EncodedSample:
        """The sample of an order and of no other clip.

        Raises:
            ValueError, OSError: it cannot be read.
        """
        raise NotImplementedError


class ClipDataset(BucketDataset):
    """Reads samples from clip folders.

    Args:
        clips, buckets: see BucketDataset; fps: the training rate; seed: of the runs' starts.
    """

    def __init__(self, clips: Sequence[Clip], buckets: Mapping[Bucket, Sequence[int]], fps: float, seed: int) -> None:
        super().__init__(clips, buckets)
        self.fps, self.seed = fps, seed
        self._warn_of_missing_masks()

    def _warn_of_missing_masks(self) -> None:
        used = [self.clips[index] for indices in self.buckets.values() for index in indices]
        bare = [clip for clip in used if not all(clip.masks)]
        if bare:
            text = "%d of %d clips lack %s (%s, ...): their masks count as ones"
            logger.warning(text, len(bare), len(used), " or ".join(MASKS), bare[0].name)

    def read(self, item: Item) -> Sample:
        """The sample of an order. Raises ValueError or OSError if it cannot be read."""
        clip, bucket = self.clips[item.clip], item.bucket
        start = start_of(clip, item.run, bucket.frames, self.fps, self.seed)
        indices = sample_indices(clip, start, bucket.frames, self.fps)
        waveform = read_sound(clip, start, bucket.frames, self.fps)
        masks = read_masks(clip, indices, bucket.width, bucket.height)
        pixels = read_pixels(clip, indices, bucket.width, bucket.height)
        return Sample(item, clip.name, clip.prompt, pixels, waveform, masks)
