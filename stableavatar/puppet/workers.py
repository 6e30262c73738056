"""Work shared out over processes."""

import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

import cv2

Item, Result = TypeVar("Item"), TypeVar("Result")


def shared_out(work: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """The results in the items' order, from as many processes; one works here.

    Processes are started afresh: a fork of one that has threads, as torch and OpenCV start them, may wait for ever.
    """
    if workers == 1:
        yield from map(work, items)
        return
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, fresh, cv2.setNumThreads, (1,)) as pool:
        yield from pool.map(work, items, chunksize=4)
