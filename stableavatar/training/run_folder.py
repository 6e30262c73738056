"""The run folder: its settings, its checkpoints (whole or not there at all), the best of them.

    config.yaml  clips.jsonl  metrics.jsonl  tensorboard/  validation/step_000500/...
    checkpoints/step_000500/   transformer/ (or lora.safetensors)  transformer3d.safetensors  state/  run.json
    checkpoints/best.json      which one is best, and by what
"""

import json
import logging
import os
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from stableavatar.files import replacing
from stableavatar.training.config import TrainConfig

logger = logging.getLogger(__name__)

CHECKPOINT = re.compile(r"step_(\d{6,})")
PARTIAL = ".partial"
RECORD = "run.json"
BEST = "best.json"
CLIPS = "clips.jsonl"


def write_text(path: Path, text: str) -> None:
    """A text file that is there whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


class RunFolder:
    """Names and lifetimes of the files of one run.

    Args:
        folder: of the run; keep: checkpoints that stay, beside the best.
    """

    def __init__(self, folder: str | Path, keep: int) -> None:
        self.path, self.keep = Path(folder), keep
        self.checkpoints = self.path / "checkpoints"

    def open(self, config: TrainConfig) -> Path | None:
        """Makes the folder and records the settings; gives the checkpoint to go on from, None for a new run.

        Called by one process. Raises ValueError if the folder holds a run and nothing says to go on with it, or no checkpoint is there.
        """
        start = self.resume_from(config.resume)
        if start is None and self.all():
            raise ValueError(f"output {self.path} holds a run already; say resume=latest to go on with it, or give another output")
        if start and self.all() and _step(self.last()) > read_record(start)["step"]:  # they would be taken for the last ones
            raise ValueError(f"output {self.path} has checkpoints of later steps than {start}; give another output, or remove them")
        if start is None:  # what an earlier attempt found may have been mended
            (self.path / CLIPS).unlink(missing_ok=True)
            if config.resume:
                logger.info("there is no checkpoint in %s yet: a new run begins", self.path)
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        for leftover in self.checkpoints.glob(f"*{PARTIAL}"):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        write_text(self.path / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(asdict(config))))
        return start

    def resume_from(self, resume: str) -> Path | None:
        """The checkpoint that `resume` means: the last whole one for `latest` (None in a folder without one)."""
        if not resume:
            return None
        if resume == "latest":
            return self.last()
        if not (Path(resume) / RECORD).is_file():
            raise ValueError(f"resume={resume} is no checkpoint: it has no {RECORD}; give latest or one like checkpoints/step_000500")
        return Path(resume)

    def all(self) -> list[Path]:
        """Whole checkpoints, the oldest first."""
        found = [path for path in self.checkpoints.glob("step_*") if CHECKPOINT.fullmatch(path.name)]
        return sorted(found, key=_step)

    def last(self) -> Path | None:
        """The newest whole checkpoint."""
        return (self.all() or [None])[-1]

    def partial(self, step: int) -> Path:
        """Where the checkpoint of a step is written before it is whole."""
        return self.checkpoints / f"step_{step:06d}{PARTIAL}"

    def publish(self, step: int, record: dict[str, Any], measure: float | None) -> Path:
        """Makes a written checkpoint visible under its name, notes whether it is the best, and removes those that need not stay.

        Args:
            record: what `run.json` says; measure: smaller is better, None if nothing was measured.
        """
        partial, final = self.partial(step), self.checkpoints / f"step_{step:06d}"
        write_text(partial / RECORD, json.dumps(record | {"step": step, "measure": measure}, indent=1))
        _sync_folder(partial)
        partial.replace(final)
        if measure is not None and self._is_best(measure, record["measured"]):
            write_text(self.checkpoints / BEST, json.dumps({"name": final.name, "measure": measure, "of": record["measured"]}))
        self.prune()
        return final

    def best(self) -> dict[str, Any] | None:
        """{"name", "measure", "of"} of the best checkpoint."""
        path = self.checkpoints / BEST
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def _is_best(self, measure: float, measured: str) -> bool:
        """Whether a checkpoint is better than the best one. What was measured otherwise cannot be compared: the newer one counts."""
        best = self.best()
        known = best is not None and best["of"] == measured and (self.checkpoints / best["name"]).is_dir()
        return not known or measure <= best["measure"]

    def prune(self) -> None:
        """Removes all checkpoints but the last ones and the best; an interrupted removal leaves no half one under a checkpoint's name."""
        best = (self.best() or {}).get("name")
        for path in self.all()[: -self.keep]:
            if path.name != best:
                shutil.rmtree(path.rename(path.with_name(path.name + PARTIAL)))


def _step(checkpoint: Path) -> int:
    """Optimiser steps that a whole checkpoint was saved after."""
    return int(CHECKPOINT.fullmatch(checkpoint.name)[1])


def read_record(checkpoint: Path) -> dict[str, Any]:
    """run.json of a checkpoint. Raises ValueError if it is damaged."""
    try:
        return json.loads((checkpoint / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"checkpoint {checkpoint} has no readable {RECORD} ({error}); go on from another one") from None


def _sync_folder(folder: Path) -> None:
    """Makes sure that what was written is on the disk before the name says so."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
