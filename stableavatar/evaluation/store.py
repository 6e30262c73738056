"""Features of files on disk, found again by what decides them: the file's content and the network's definition."""

import hashlib
import json
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stableavatar.evaluation.samples import Arrays
from stableavatar.files import digest_file, replacing

DAMAGED = (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile)
"""What np.load was seen to raise for files that are cut or something else."""


def digest_definition(definition: Mapping[str, Any]) -> str:
    """Hex sha256 of a network's definition; the order of its keys does not matter."""
    return hashlib.sha256(json.dumps(definition, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class FeatureStore:
    """A folder of features: NETWORK/CONTENT-DEFINITION.npz, beginnings of both digests.

    A file that is renamed or copied is known again; one that is changed, or a network that is defined or weighted otherwise, is not
    mistaken for what it was.
    """

    folder: Path

    def path(self, network: str, file: Path, definition: Mapping[str, Any]) -> Path:
        """Where the features of a file by a network lie, whether they are there or not."""
        return self.folder / network / f"{digest_file(file)[:32]}-{digest_definition(definition)[:16]}.npz"

    def read(self, path: Path) -> Arrays | None:
        """The features in a file of the store; None where it is missing or damaged, so that they are made anew."""
        try:
            with np.load(path, allow_pickle=False) as held:
                return {name: held[name] for name in held.files}
        except DAMAGED:
            return None

    def write(self, path: Path, features: Arrays) -> None:
        """Writes a file of the store, whole or not at all; several processes may write the same one.

        Raises:
            ValueError: it cannot be written.
        """
        own = path.with_name(f"{path.name}.{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(own) as part, part.open("wb") as file:
                np.savez(file, **features)
            own.replace(path)
        except OSError as error:
            raise ValueError(f"cannot write {path}: {error.strerror}; choose a writable place with room") from None
