"""A crew of processes that tests hand work to: each job runs in a fresh gloo group of as many of them as it asks for."""

import os
import tempfile
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

PATIENCE = 240
"""Seconds until a job counts as hung."""


def _member(orders: Connection) -> None:
    """Runs one job after another: (rank, processes, store file, function, arguments) -> ("result" or "error", value)."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    while (order := orders.recv()) is not None:
        rank, processes, path, function, args = order
        try:
            store = dist.FileStore(path, processes)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=processes, timeout=timedelta(seconds=PATIENCE))
            try:
                answer = ("result", function(*args))
            finally:
                dist.destroy_process_group()
        except BaseException:  # noqa: BLE001 - whatever it is, the test is told
            answer = ("error", traceback.format_exc())
        orders.send(answer)


class Crew:
    """Processes that wait for work; they are started when first needed, and started afresh after a failure."""

    def __init__(self) -> None:
        self._members: list[tuple[Any, Connection]] = []

    def run(self, processes: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What `function(*args)` returns in each of `processes` processes of one gloo group, by rank.

        Args:
            function: of a module's top level; it finds the group by torch.distributed. It and `args` and its result are pickled.

        Raises:
            AssertionError: one of them failed (with its traceback) or hung.
        """
        context = multiprocessing.get_context("spawn")
        while len(self._members) < processes:
            ours, theirs = context.Pipe()
            process = context.Process(target=_member, args=(theirs,), daemon=True)
            process.start()
            self._members.append((process, ours))
        with tempfile.TemporaryDirectory() as folder:
            for rank, (_, orders) in enumerate(self._members[:processes]):
                orders.send((rank, processes, os.path.join(folder, "store"), function, args))
            return self._answers(processes)

    def _answers(self, processes: int) -> Sequence[Any]:
        waiting = {orders: rank for rank, (_, orders) in enumerate(self._members[:processes])}
        results: list[Any] = [None] * processes
        while waiting:
            ready = wait(list(waiting), timeout=PATIENCE)
            for orders in ready:
                kind, results[waiting.pop(orders)] = orders.recv()
                if kind == "error":
                    self.dismiss()
                    raise AssertionError(f"a process failed:\n{next(r for r in results if isinstance(r, str) and 'Traceback' in r)}")
            if not ready:
                self.dismiss()
                raise AssertionError(f"processes {sorted(waiting.values())} of {processes} did not answer in {PATIENCE} s")
        return results

    def dismiss(self) -> None:
        """Ends all processes."""
        for process, _ in self._members:
            process.kill()
            process.join()
        self._members.clear()
