"""What is known of every raw file and clip: one JSON per unit and step in OUT/.work. A step runs again if what it read has changed.

    OUT/.work/files/{digest of the path}/inventory.json
    OUT/.work/sources/{source id}/cuts.json
    OUT/.work/clips/{clip id}/{crop,voice,masks,scores}.json
"""

import hashlib
import json
import logging
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

from stableavatar.files import write_json

logger = logging.getLogger(__name__)

WORK = ".work"
FILES, SOURCES, CLIPS = "files", "sources", "clips"


@dataclass(frozen=True)
class Record:
    """What a step gave for a unit.

    Attributes:
        settings: digest of all that the step read.
        values: its result, empty if there is a problem.
        problem: why the unit is set aside, one line; None if it is not.
    """

    settings: str
    values: dict[str, Any]
    problem: str | None = None


def digest(*parts: Any) -> str:
    """16 hex digits that differ where any part does; parts are JSON values or dataclasses of them."""
    plain = [asdict(part) if is_dataclass(part) else part for part in parts]
    return hashlib.sha256(json.dumps(plain, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Store:
    """The records below OUT/.work."""

    out: Path

    @property
    def work(self) -> Path:
        """Folder of everything that is not part of the result."""
        return self.out / WORK

    def path(self, units: str, unit: str, step: str) -> Path:
        """The file of one record."""
        return self.work / units / unit / f"{step}.json"

    def read(self, units: str, unit: str, step: str) -> Record | None:
        """What a step gave for a unit; None if it has not run yet or the record cannot be read."""
        try:
            return Record(**json.loads(self.path(units, unit, step).read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            logger.warning("%s cannot be read (%s): the step runs again", self.path(units, unit, step), error)
            return None

    def write(self, units: str, unit: str, step: str, record: Record) -> None:
        """Writes a record, whole or not at all."""
        write_json(self.path(units, unit, step), asdict(record))

    def is_current(self, units: str, unit: str, step: str, settings: str) -> bool:
        """Whether a step has run for a unit with these settings."""
        record = self.read(units, unit, step)
        return record is not None and record.settings == settings
