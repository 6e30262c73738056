"""Work shared out over processes."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import cv2

Item, Result = TypeVar("Item"), TypeVar("Result")
Share = Callable[[Callable[[Item], Result], Iterable[Item], int], Iterator[Result]]
"""Takes work, items and how many of them a process takes at a time."""


def shared_out(work: Callable[[Item], Result], items: Iterable[Item], workers: int, chunk: int = 4) -> Iterator[Result]:
    """The results in the items' order, from as many processes, which take `chunk` items at a time; one works here."""
    with worker_pool(workers) as share:
        yield from share(work, items, chunk)


@contextmanager
def worker_pool(workers: int) -> Iterator[Share]:
    """A function like `shared_out`, without `workers`, whose processes stay for the next call.

    Processes are started afresh: a fork of one that has threads, as torch and OpenCV start them, may wait for ever. They start when
    there is work, end with this process, however it ends, and leave Ctrl-C to it.
    """
    if workers == 1:
        yield lambda work, items, chunk: map(work, items)
        return
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, fresh, _begin) as pool:
        try:
            yield lambda work, items, chunk: pool.map(work, items, chunksize=chunk)
        except KeyboardInterrupt:  # Who asks to stop should not wait for what is being done and what lies ready.
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def _begin() -> None:
    """Prepares a new process: its own share of the cores is one."""
    cv2.setNumThreads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
