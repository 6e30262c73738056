"""Files that are there whole or not at all, and their digests."""

import hashlib
import json
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

CHUNK = 1 << 20


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C and a polite kill wait for the end of the block, in which something is put in order."""
    if threading.current_thread() is not threading.main_thread():  # which alone hears signals
        yield
        return
    heard: list[int] = []
    handlers = {number: signal.signal(number, lambda number, _: heard.append(number)) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number in heard[:1]:
            signal.raise_signal(number)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name next to `path`; what was written there is on the disk before it takes its place, and is removed after an error."""
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        _to_disk(partial)
        partial.replace(path)
    finally:
        with uninterrupted():
            partial.unlink(missing_ok=True)


@contextmanager
def filling(folder: Path) -> Iterator[Path]:
    """An empty folder next to `folder`; what was written there moves into it, whose other files stay, once all of it is on the disk.

    The files move in reverse alphabetical order: config.json, without which the libraries load nothing, comes after the weights.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        files = sorted(partial.iterdir(), reverse=True)
        for file in files:
            _to_disk(file)
        folder.mkdir(exist_ok=True)
        for file in files:
            file.replace(folder / file.name)
    finally:
        with uninterrupted():
            shutil.rmtree(partial, ignore_errors=True)


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file, whole or not at all; ValueError if it cannot be written."""
    try:
        with replacing(path) as part:
            write(part)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror or error}; choose a writable place with room") from None


def write_json(path: Path, content: Any) -> None:
    """A JSON file, whole or not at all; its folder is made if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def hash_file(path: Path) -> str:
    """Hex sha256 of a file's content, whatever its size."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def digest_file(path: Path) -> str:
    """As `hash_file`; a file that has not changed since (its size and time) is not read again."""
    state = path.stat()
    return _digest_once(path, state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=4096)
def _digest_once(path: Path, size: int, changed: int) -> str:
    return hash_file(path)


def _to_disk(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
