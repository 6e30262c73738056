"""Where batches come from: clips, their plan, a loader of this process's share, and an account of broken clips."""

import logging
import signal
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from accelerate import Accelerator
from torch.utils.data import DataLoader

from stableavatar.data.buckets import EpochPlan, RankSampler, assign
from stableavatar.data.clips import Clip, find_clips, read_index, write_index
from stableavatar.data.dataset import ClipDataset, Loaded
from stableavatar.data.latent_cache import CachedDataset
from stableavatar.training.config import DataConfig, TrainConfig, parse_lengths, parse_sizes
from stableavatar.training.parts import encoding_identity
from stableavatar.training.processes import data_parallel, gather_objects, on_main
from stableavatar.training.run_folder import CLIPS

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""How clusters announce that a job's time is over, often to every process of it."""
NAMED = 20
"""Broken clips that an error spells out; the log has them all."""


def list_clips(data: DataConfig, lists: str, index: Path | None = None) -> tuple[list[Clip], dict[str, str]]:
    """Clips of path lists and, for the broken ones, the reason.

    Args:
        index: file that keeps what was found, so that a run that goes on need not look at every clip again; None for no record.
    """
    clips, broken = find_clips(lists, data.source_fps, read_index(index) if index and index.exists() else ())
    if index:
        write_index(index, clips)
    return clips, dict(broken)


def ignore_signals(worker: int) -> None:
    """Readers leave it to the process that trains to save and to end them."""
    for number in (*SIGNALS, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def collate(loaded: list[Loaded]) -> list[Loaded]:
    """A forward's samples stay a list: they are encoded one by one."""
    return loaded


class SampleSource:
    """The training set of one run, as one process sees it.

    Args:
        folder: of the run, which keeps the index of its clips.

    Raises:
        ValueError: no usable clip; more broken ones than `data.max_broken` allows.
    """

    def __init__(self, config: TrainConfig, accelerator: Accelerator, folder: Path) -> None:
        self.config, self.accelerator = config, accelerator
        self._place = data_parallel(accelerator, config)
        data = config.data
        self.clips, self.broken = on_main(accelerator, lambda: list_clips(data, data.lists, folder / CLIPS))
        self._total, self._told = len(self.clips) + len(self.broken), 0
        self._new: dict[str, str] = {}
        self.tell_broken()
        buckets, short = assign(self.clips, parse_sizes(data.sizes), parse_lengths(data.frames), data.fps)
        if accelerator.is_main_process:
            self._tell(buckets, short)
        if not buckets:
            raise ValueError(f"no clip of {data.lists} is long enough: data.frames={data.frames} at {data.fps:g} frames per second")
        self.buckets = buckets
        self.plan = EpochPlan(buckets, config.seed, data.runs, self._place.size, config.batch, config.accumulation)
        if data.cache:
            self.dataset = CachedDataset(Path(data.cache), self.clips, buckets, data.runs, encoding_identity(config))
        else:
            self.dataset = ClipDataset(self.clips, buckets, data.fps, data.seed)

    def _tell(self, buckets: dict, short: list[int]) -> None:
        for bucket, members in buckets.items():
            logger.info("%dx%d, %d frames: %d clips", bucket.width, bucket.height, bucket.frames, len(members))
        if short:
            names = ", ".join(str(self.clips[i].folder) for i in short[:NAMED])
            logger.warning("%d clips are shorter than the shortest of data.frames=%s and are left out: %s%s", len(short),
                           self.config.data.frames, names, " ..." if len(short) > NAMED else "")

    def steps(self, epoch: int, step: int) -> Iterator[list[list[Loaded]]]:
        """For every optimiser step from a position on, without an end: this process's forwards, each a list of samples."""
        sampler = RankSampler(self.plan, self._place.rank, epoch, step)
        workers = self.config.data.workers
        loader = iter(DataLoader(self.dataset, batch_sampler=sampler, collate_fn=collate, num_workers=workers,
                                 worker_init_fn=ignore_signals, prefetch_factor=2 if workers else None, persistent_workers=workers > 0))
        while forwards := list(islice(loader, self.config.accumulation)):
            for loaded in (item for forward in forwards for item in forward):
                self._new |= {name: reason for name, reason in loaded.broken if name not in self.broken}
            yield forwards

    @property
    def new_broken(self) -> int:
        """Clips that this process found broken since they were last told."""
        return len(self._new)

    def too_many(self, new: int) -> bool:
        """Whether `new` broken clips, counted over all processes and perhaps twice, may be more than are allowed."""
        return len(self.broken) + new > self.config.data.max_broken * self._total

    def tell_broken(self) -> None:
        """Shares what every process found broken and names it; called by all processes. Raises ValueError if it is too much."""
        self.broken |= dict(gather_objects(self.accelerator, list(self._new.items())))
        self._new = {}
        fresh = list(self.broken.items())[self._told :]
        self._told = len(self.broken)
        if fresh and self.accelerator.is_main_process:
            for name, reason in fresh:
                logger.warning("broken clip %s: %s", name, reason)
            logger.warning("%d of %d clips are broken (%d new) and were skipped", len(self.broken), self._total, len(fresh))
        if self.too_many(0):
            names = ", ".join(list(self.broken)[:NAMED])
            raise ValueError(
                f"{len(self.broken)} of {self._total} clips are broken, more than data.max_broken={self.config.data.max_broken:g}: {names}"
            )
