"""Seeing a run: one line per step, metrics.jsonl in the run folder, tensorboard and Weights & Biases."""

import importlib.util
import json
import logging
import time
import zlib
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from stableavatar.data.samples import Bucket
from stableavatar.files import replacing
from stableavatar.machine import MEASURED, peak_bytes, peak_of
from stableavatar.training.config import LogConfig

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
RECENT = 20
"""Steps over which speed and time left are averaged."""
GIB = 2**30
SPEED = ("seconds_per_step", "tokens_per_second", "tflops", "share_of_peak", "memory_gib")
NOT_PARTS = {"epoch", "loss", "gradient_norm", "lr", "seconds", *SPEED}
"""Figures of a step that are no part of its loss."""


@dataclass(frozen=True)
class Workers:
    """Who computes: the device of this process, in which precision, and how many processes there are."""

    device: torch.device
    dtype: torch.dtype
    processes: int


class Report:
    """What the main process says and writes about every step; the others have one that does neither.

    Args:
        folder: of the run; None for processes that write nothing.
        flops: of a forward and backward of one sample, by bucket (`estimate.flops_per_sample`).
        first_step: optimiser steps that are done; what an earlier run wrote about later ones is dropped.
        total_steps: at which the run ends.

    Raises:
        ValueError: `log.wandb` names a project, but wandb is not installed.
    """

    def __init__(
        self, config: LogConfig, folder: Path | None, flops: Mapping[Bucket, float], workers: Workers, first_step: int, total_steps: int
    ) -> None:
        check_wandb(config)
        self.config, self.total_steps = config, total_steps
        self._flops, self._workers = flops, workers
        self._recent: deque[tuple[float, float, float]] = deque(maxlen=RECENT)
        self._writers = make_writers(config, folder, first_step) if folder else []
        if folder:
            self._peak = peak_of(workers.device, workers.dtype, config.peak_tflops)
            logger.info("peak of a device: %.3g TFLOP/s (%s)", self._peak.flops / 1e12, self._peak.source)
        self._started = time.perf_counter()

    def flops(self, bucket: Bucket) -> float:
        """Of a forward and backward of one sample."""
        return self._flops[bucket]

    def step(self, step: int, epoch: int, losses: Mapping[str, float], norm: float, lr: float, tokens: float, flops: float) -> None:
        """Tells of an optimiser step that has just ended.

        Args:
            step: counted from 1.
            losses: `loss` and its parts.
            norm: of the gradient, before clipping; lr: learning rate.
            tokens, flops: of all processes together.
        """
        now = time.perf_counter()
        seconds, self._started = now - self._started, now
        self._recent.append((seconds, tokens, flops))
        if not self._writers:
            return
        values = {"epoch": epoch, **losses, "gradient_norm": norm, "lr": lr, "seconds": seconds, **self._speed()}
        for writer in self._writers:
            writer.write(step, values)
        if step % self.config.every == 0 or step == self.total_steps:
            logger.info("%s", format_step(step, self.total_steps, values, self._peak.source))

    def validation(self, step: int, loss: float) -> None:
        """Notes the loss on held-out clips after a step."""
        for writer in self._writers:
            writer.write(step, {"validation_loss": loss})

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens within it (a checkpoint, a validation) is not part of a step's time."""
        before = time.perf_counter()
        try:
            yield
        finally:
            self._started += time.perf_counter() - before

    def close(self) -> None:
        """Finishes the files."""
        for writer in self._writers:
            writer.close()

    def _speed(self) -> dict[str, float]:
        """Means over the recent steps; operations and the share of the peak are of one device."""
        seconds, tokens, flops = (sum(values) for values in zip(*self._recent))
        rate = flops / seconds / self._workers.processes
        memory = peak_bytes(self._workers.device) / GIB
        return dict(zip(SPEED, (seconds / len(self._recent), tokens / seconds, rate / 1e12, rate / self._peak.flops, memory)))


def check_wandb(config: LogConfig) -> None:
    """Raise ValueError if `log.wandb` names a project, but wandb is not installed."""
    if config.wandb and importlib.util.find_spec("wandb") is None:
        raise ValueError(f"log.wandb={config.wandb} needs wandb, which is not installed: pip install wandb")


def format_step(step: int, total: int, values: Mapping[str, float], source: str) -> str:
    """The line of a step; `values` as in metrics.jsonl, `source` of the peak."""
    parts = ", ".join(f"{name} {value:.4g}" for name, value in values.items() if name not in NOT_PARTS)
    left = timedelta(seconds=round((total - step) * values["seconds_per_step"]))
    words = [
        f"step {step}/{total}",
        f"loss {values['loss']:.4f}" + (f" ({parts})" if parts else ""),
        f"grad {values['gradient_norm']:.3g}",
        f"lr {values['lr']:.1e}",
        f"{values['seconds_per_step']:.2f} s/step",
        f"{thousands(values['tokens_per_second'])} tok/s",
        f"{values['tflops']:.3g} TFLOP/s ({100 * values['share_of_peak']:.0f} %{f' of {source}' if source == MEASURED else ''})",
        f"{values['memory_gib']:.1f} GiB",
        f"left {left}",
    ]
    return "  ".join(words)


def thousands(number: float) -> str:
    """14200 -> 14.2k"""
    return f"{number / 1000:.1f}k" if number >= 1000 else f"{number:.0f}"


class MetricsFile:
    """metrics.jsonl: a JSON object per step; floats come back exactly.

    Args:
        first_step: lines about later steps are dropped, as is one that a killed run has left unfinished.
    """

    def __init__(self, path: Path, first_step: int) -> None:
        kept = [json.dumps(line) + "\n" for line in read_metrics(path) if line["step"] <= first_step]
        with replacing(path) as partial:
            partial.write_text("".join(kept), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Appends a line."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")

    def close(self) -> None:
        """Ends it."""
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The objects of a metrics.jsonl, none if there is no such file; an unfinished last line is left out."""
    if not path.exists():
        return []
    *lines, unfinished = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines]


class Tensorboard:
    """Curves for tensorboard; those of later steps than `first_step` are hidden."""

    def __init__(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=first_step + 1 if first_step else None)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """A point on each curve."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Ends it."""
        self._writer.close()


class Wandb:
    """Curves in a project of Weights & Biases, under the run folder's name."""

    def __init__(self, project: str, folder: Path) -> None:
        import wandb

        name = f"{folder.name}-{zlib.crc32(str(folder.resolve()).encode()):08x}"  # folders of one name are different runs
        self._run = wandb.init(project=project, name=folder.name, id=name, dir=str(folder), resume="allow")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """A point on each curve."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Ends it."""
        self._run.finish()


def make_writers(config: LogConfig, folder: Path, first_step: int) -> list[MetricsFile | Tensorboard | Wandb]:
    """What a run's figures are written to; tensorboard is passed over, with a warning, where it is not installed."""
    writers: list[MetricsFile | Tensorboard | Wandb] = [MetricsFile(folder / METRICS_FILE, first_step)]
    if config.tensorboard and importlib.util.find_spec("tensorboard") is None:
        logger.warning("tensorboard is not installed (pip install tensorboard); figures go to %s alone", folder / METRICS_FILE)
    elif config.tensorboard:
        writers.append(Tensorboard(folder / "tensorboard", first_step))
    if config.wandb:
        writers.append(Wandb(config.wandb, folder))
    return writers
