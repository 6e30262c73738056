"""Which clip goes to which bucket, and which samples make up each step of an epoch, on each process."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from itertools import count, cycle, islice

import numpy as np
from torch.utils.data import Sampler

from stableavatar.data.clips import Clip
from stableavatar.data.samples import Bucket, Item

SAME_ASPECT = 0.05
"""Difference of log(width / height) below which sizes are of one aspect: 832x480 and 1280x720 (0.025) both stand for 16:9."""
ORDER = 1
"""Keeps the order of the clips apart from what else is drawn from the same seed and epoch."""


def assign(
    clips: Sequence[Clip], sizes: Sequence[tuple[int, int]], lengths: Sequence[int], fps: float
) -> tuple[dict[Bucket, list[int]], list[int]]:
    """Indices of the clips in each bucket, and those of clips that are shorter than every length.

    Args:
        sizes: (width, height) of the buckets; lengths: frames at `fps`, the training rate.
    """
    buckets: dict[Bucket, list[int]] = {}
    short = []
    for index, clip in enumerate(clips):
        filled = [length for length in lengths if length <= clip.frames_at(fps)]
        if filled:
            buckets.setdefault(Bucket(*_size(clip, sizes), max(filled)), []).append(index)
        else:
            short.append(index)
    return buckets, short


def _size(clip: Clip, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The size of the nearest aspect; of several, the largest that does not enlarge the clip, else the smallest."""
    distance = {size: abs(math.log(size[0] * clip.height / (size[1] * clip.width))) for size in sizes}
    near = sorted((size for size in sizes if distance[size] <= min(distance.values()) + SAME_ASPECT), key=math.prod)
    return next((size for size in reversed(near) if size[0] <= clip.width and size[1] <= clip.height), near[0])


@dataclass(frozen=True)
class EpochPlan:
    """The samples of every step of every epoch. It follows from its fields alone, so all processes have the same.

    An optimiser step has processes * batch * accumulation places, all of one bucket. Place p belongs to the accumulated forward
    p // (processes * batch) of process (p // batch) % processes. In each epoch every clip has one place with weight 1; the last step of
    a bucket is filled up with repeats of weight 0.

    Attributes:
        buckets: indices of the clips in each bucket.
        runs: fixed runs of frames per clip, taken in turn; 0 for a new run every epoch.
    """

    buckets: Mapping[Bucket, Sequence[int]]
    seed: int
    runs: int
    processes: int
    batch: int
    accumulation: int

    def __post_init__(self) -> None:
        if not any(self.buckets.values()):
            raise ValueError("no clip is left to train on: all are broken or shorter than the shortest of data.frames")

    @property
    def places(self) -> int:
        """Samples of an optimiser step."""
        return self.processes * self.batch * self.accumulation

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps, the same in each epoch and on each process."""
        return sum(math.ceil(len(clips) / self.places) for clips in self.buckets.values())

    def steps(self, epoch: int) -> list[list[Item]]:
        """The items of each step of an epoch, place by place."""
        random = np.random.default_rng(np.random.SeedSequence([self.seed, epoch, ORDER]))
        cuts: list[tuple[Bucket, np.ndarray]] = []
        for bucket in sorted(self.buckets, key=astuple):
            clips = random.permutation(self.buckets[bucket])
            cuts += [(bucket, clips[start : start + self.places]) for start in range(0, len(clips), self.places)]
        return [self._step(epoch, step, *cuts[cut]) for step, cut in enumerate(random.permutation(len(cuts)))]

    def _step(self, epoch: int, step: int, bucket: Bucket, clips: np.ndarray) -> list[Item]:
        run = epoch % self.runs if self.runs else epoch
        items = [Item(int(clip), bucket, run, epoch, step, slot, len(clips)) for slot, clip in enumerate(clips)]
        fillers = (replace(item, weight=0) for item in cycle(items))
        return items + list(islice(fillers, self.places - len(items)))

    def forwards(self, epoch: int, start_step: int, rank: int) -> Iterator[list[Item]]:
        """The items of each forward of a process, from a step of an epoch to the epoch's end: `accumulation` lists of `batch` a step."""
        assert 0 <= rank < self.processes, (rank, self.processes)
        for items in self.steps(epoch)[start_step:]:
            for start in range(rank * self.batch, self.places, self.processes * self.batch):
                yield items[start : start + self.batch]


class RankSampler(Sampler[list[Item]]):
    """The forwards of a process from a step of an epoch on, epoch after epoch without end: a DataLoader's batch_sampler."""

    def __init__(self, plan: EpochPlan, rank: int, epoch: int = 0, step: int = 0) -> None:
        self.plan, self.rank, self.epoch, self.step = plan, rank, epoch, step

    def __iter__(self) -> Iterator[list[Item]]:
        yield from self.plan.forwards(self.epoch, self.step, self.rank)
        for epoch in count(self.epoch + 1):
            yield from self.plan.forwards(epoch, 0, self.rank)
