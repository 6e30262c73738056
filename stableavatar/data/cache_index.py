"""The records of a latent cache: what its samples depend on, which there are, and where each lies.

    cache.json           what the samples depend on beside clip, run and bucket: their identity
    index_00000.jsonl    a line for every sample of a process that a shard holds, and for every broken clip
"""

import errno
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

from stableavatar.data.samples import Bucket
from stableavatar.files import replacing

FORMAT = 1
IDENTITY = "cache.json"
REMEDY = "scripts/cache_latents.py with the settings of the training adds what is missing"


@dataclass(frozen=True)
class Key:
    """What samples of a cache are told apart by: the clip's folder, the run of its frames, the shape."""

    clip: str
    run: int
    bucket: Bucket

    def __str__(self) -> str:
        return f"{self.clip}, run {self.run}, {self.bucket.width}x{self.bucket.height}, {self.bucket.frames} frames"

    @property
    def id(self) -> str:
        """What its tensors are named by."""
        return digest(json.dumps([self.clip, self.run, *astuple(self.bucket)]).encode())


@dataclass(frozen=True)
class Entry:
    """Where a sample lies: the shard of its own tensors, the name and the shard of its text. Or why its clip is broken."""

    shard: str = ""
    text: str = ""
    text_shard: str = ""
    broken: str = ""


def read_index(folder: Path) -> dict[Key, Entry]:
    """What the index lines of all processes say. The last line of a sample counts, but a whole sample more than a broken clip.

    Raises:
        ValueError: a line that is none, unless it is the end of a file, where a kill may have cut it.
    """
    entries: dict[Key, Entry] = {}
    for path in sorted(folder.glob("index_*.jsonl")):
        for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
            if not line.endswith(b"\n"):
                break
            try:
                key, entry = _parse(line)
            except (ValueError, LookupError, TypeError) as error:
                raise ValueError(f"{path}, line {number}, is no line of an index ({error}); remove the line: {REMEDY}") from None
            if not entry.broken or key not in entries or entries[key].broken:
                entries[key] = entry
    return entries


def append(path: Path, entries: Mapping[Key, Entry]) -> None:
    """Adds lines to an index: all of them, or none where the disk is full."""
    lines = "".join(_line(key, entry) for key, entry in entries.items()).encode()
    with writing(path.parent), path.open("ab", buffering=0) as file:
        start = file.tell()
        if file.write(lines) < len(lines):
            file.truncate(start)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(file.fileno())


def mend(path: Path) -> None:
    """Removes the half line at the end of an index that a kill may have left."""
    if path.exists():
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)


def whole_entries(folder: Path, entries: Mapping[Key, Entry]) -> dict[Key, Entry]:
    """The entries whose shards are there, and broken clips."""
    there = {path.name for path in folder.glob("shard_*.safetensors")}
    return {key: entry for key, entry in entries.items() if entry.broken or {entry.shard, entry.text_shard} <= there}


def check_identity(folder: Path, wanted: Mapping[str, Any]) -> None:
    """Raise ValueError unless `folder` is a cache whose identity has the values of `wanted`."""
    try:
        found = json.loads((folder / IDENTITY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ValueError(f"{folder} is no latent cache: it has no readable {IDENTITY}; scripts/cache_latents.py writes one") from None
    wanted = json.loads(json.dumps(wanted))
    if other := sorted(key for key in wanted if found.get(key) != wanted[key]):
        told = "; ".join(f"{key} is {found.get(key)} there and {wanted[key]} here" for key in other)
        raise ValueError(f"the cache {folder} is of other samples: {told}; take its settings or another folder")


def claim(folder: Path, identity: dict[str, Any]) -> None:
    """Makes a folder the cache of an identity, unless it is one already. Raises ValueError if it is another's."""
    if not (folder / IDENTITY).exists() and not list(folder.glob("index_*")):
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            with replacing(folder / IDENTITY) as partial:
                partial.write_text(json.dumps(identity, indent=1), encoding="utf-8")
    check_identity(folder, identity)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """What goes wrong while the cache is written, as a ValueError."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"cannot write to the cache {folder} ({error}); choose a folder that is writable and has room") from error


def digest(content: bytes) -> str:
    """A name for some content."""
    return hashlib.sha256(content).hexdigest()[:24]


def _line(key: Key, entry: Entry) -> str:
    record = {"clip": key.clip, "run": key.run, "bucket": astuple(key.bucket)}
    return json.dumps(record | {name: value for name, value in asdict(entry).items() if value}) + "\n"


def _parse(line: bytes) -> tuple[Key, Entry]:
    record = json.loads(line)
    return Key(record.pop("clip"), record.pop("run"), Bucket(*record.pop("bucket"))), Entry(**record)
