"""What the trainings of the puppet world's small models share: one step of the optimiser, and the state file that they go on from."""

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from stableavatar.config import Config
from stableavatar.files import replacing
from stableavatar.machine import named_precision
from stableavatar.models.checkpoint_files import TORCH_ERRORS

logger = logging.getLogger(__name__)


PRECISIONS = ("auto", "float32", "bfloat16")
"""What `autocast` knows: auto is bfloat16 where the CPU has instructions for it."""


def in_bfloat16(dtype: str) -> bool:
    """Whether such a precision (of `PRECISIONS`) is bfloat16 on this machine."""
    return named_precision(dtype, torch.device("cpu")) == torch.bfloat16


def autocast(dtype: str) -> torch.autocast:
    """Computation on the CPU in such a precision, where bfloat16 is safe."""
    return torch.autocast("cpu", torch.bfloat16, enabled=in_bfloat16(dtype))


class Trainer:
    """What changes with every step, and how far it is.

    Attributes:
        free: settings that may be others when a training goes on. counters: attributes that say how far it is.
    """

    free: frozenset[str] = frozenset()
    counters: tuple[str, ...] = ("step",)

    def __init__(self, config: Config, optimizer: torch.optim.Optimizer, **parts: nn.Module | EMAModel) -> None:
        """parts: what changes beside the optimiser, by its name in the state file."""
        self.config, self.optimizer, self.step = config, optimizer, 0
        self._parts, self._saved = parts | {"optimizer": optimizer}, time.monotonic()

    def set_rate(self, largest: float, warm: float, progress: float) -> None:
        """The learning rate: the part `warm` (all from 1 on) of the largest, along half a cosine to nothing at progress 1."""
        for group in self.optimizer.param_groups:
            group["lr"] = largest * min(1, warm) * (1 + math.cos(math.pi * progress)) / 2

    def descend(self, loss: Tensor, norm: float = 1.0) -> None:
        """One step of the optimiser, with a gradient of that norm at most."""
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([weight for group in self.optimizer.param_groups for weight in group["params"]], norm)
        self.optimizer.step()
        self.step += 1

    def save(self, path: Path, every: float = 0.0) -> None:
        """Writes the state, whole or not at all, unless that was done less than so many seconds ago."""
        if time.monotonic() - self._saved < every:
            return
        state = {name: part.state_dict() for name, part in self._parts.items()}
        state |= {name: getattr(self, name) for name in self.counters}
        with replacing(path) as part:
            torch.save(state | {"settings": asdict(self.config)}, part)
        self._saved = time.monotonic()

    def load(self, path: Path) -> None:
        """Goes on from there. Raises ValueError if that was another training, or the file is damaged."""
        with _reading(path):
            state = torch.load(path, weights_only=True)
            settings = dict(state["settings"])
        for name, value in asdict(self.config).items():
            if name not in self.free and settings.get(name) != value:
                raise ValueError(f"{path} is of a training with {name}={settings.get(name)}; remove it, or go on with that")
        with _reading(path):
            for name, part in self._parts.items():
                part.load_state_dict(state[name])
            vars(self).update({name: state[name] for name in self.counters})
        logger.info("goes on from step %d", self.step)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except TORCH_ERRORS as error:
        kind = type(error).__name__
        raise ValueError(f"{path} is damaged, or of another network ({kind}); remove it, and the training begins anew") from error
