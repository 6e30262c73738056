"""Interrupted work goes on: finished stretches and the state of the rest, written atomically to a folder."""

import json
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stableavatar.files import replacing


class NoRunStore:
    """Keeps nothing."""

    def load(self) -> dict | None:
        """The last saved state, or None at the start of a run."""
        return None

    def maybe_save(self, make_state: Callable[[], dict]) -> None:
        """Saves the state when it is due."""
        if self.due():
            self.save(make_state())

    def due(self) -> bool:
        """Whether the interval between saves has passed."""
        return False

    def save(self, state: dict) -> None:
        """Keeps a state and starts the next interval."""

    def put(self, index: int, latents: Tensor) -> None:
        """Keeps a finished stretch [C, n, h, w]."""

    def get(self, index: int) -> Tensor | None:
        """A finished stretch, None where there is none."""
        return None


NO_RUN_STORE = NoRunStore()


def _load(path: Path) -> Any:
    return torch.load(path, weights_only=True)


class RunStore(NoRunStore):
    """State of one run in `folder`.

    Args:
        folder: made if absent.
        identity: everything that the result depends on; a folder of another run is refused.
        every: seconds between saves.
    """

    def __init__(self, folder: Path, identity: dict, every: float) -> None:
        self.folder, self.every, self._saved = Path(folder), every, time.monotonic()
        record, wanted = self.folder / "run.json", json.dumps(identity, sort_keys=True, indent=1)
        old = self._read(record, lambda path: json.loads(path.read_text())) if record.exists() else identity
        if names := ", ".join(key for key in sorted(identity | old) if identity.get(key) != old.get(key)):
            raise ValueError(f"work_dir {self.folder} holds another run (differs in: {names}); choose another folder or delete it")
        (self.folder / "finished").mkdir(parents=True, exist_ok=True)
        self._write(record, lambda path: path.write_text(wanted))

    def load(self) -> dict | None:
        path = self.folder / "state.pt"
        return self._read(path, _load) if path.exists() else None

    def due(self) -> bool:
        return time.monotonic() - self._saved >= self.every

    def save(self, state: dict) -> None:
        self._write(self.folder / "state.pt", lambda path: torch.save(state, path))
        self._saved = time.monotonic()

    def put(self, index: int, latents: Tensor) -> None:
        self._write(self._stretch(index), lambda path: torch.save(latents.clone(), path))

    def get(self, index: int) -> Tensor | None:
        path = self._stretch(index)
        return self._read(path, _load) if path.exists() else None

    def _stretch(self, index: int) -> Path:
        return self.folder / "finished" / f"{index:06d}.pt"

    def _read(self, path: Path, read: Callable[[Path], Any]) -> Any:
        try:
            return read(path)
        except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
            raise ValueError(f"{path} cannot be read ({str(error).splitlines()[0]}); delete {self.folder} to start again") from error

    def _write(self, path: Path, write: Callable[[Path], object]) -> None:
        """Writes a file that is whole after a kill at any moment."""
        try:
            with replacing(path) as partial:
                write(partial)
        except (OSError, RuntimeError) as error:  # torch says RuntimeError where the disk is full
            reason = str(error).splitlines()[0]
            raise ValueError(f"cannot write {path} ({reason}); choose a work_dir that is writable and has room") from error
