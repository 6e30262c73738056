"""Several processes of one run: what a launcher such as torchrun put into the environment becomes a mesh, or one line says why not.

A mistake that all processes find is said by one of them. A process that fails ends, and with it the run: the launcher ends the others,
who may be waiting for it.
"""

import hashlib
import logging
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import TypeVar

import torch
import torch.distributed as dist
from diffusers.utils import logging as diffusers_logging
from torch.distributed.distributed_c10d import _abort_process_group
from transformers.utils import logging as transformers_logging

from stableavatar.config import ParallelConfig
from stableavatar.parallel.mesh import Mesh

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

MISTAKES = (ValueError, OSError)
"""What a user can mend; anything else is ours and keeps its traceback."""
PATIENCE = timedelta(hours=6)
"""How long a process waits for the others: one may be decoding or writing a long video, or a checkpoint."""
GRACE = 5.0
"""Seconds that a process has to clean up after a signal."""
TURN = 0.5
"""Seconds that a process leaves another one to say what both have to say, before it ends and the launcher ends the other."""
_said: Counter[str] = Counter()


class SharedMistake(ValueError):
    """A mistake that all processes know of, so that all can go on to the next case together."""


class Broken(Exception):
    """A mistake of one process in the middle of work where others wait for it: the run ends, and not only a case of a list."""


def check_launch(parallel: ParallelConfig, device: str) -> None:
    """Raises ValueError unless as many processes were started as the settings need, with a GPU for each where they compute on GPUs."""
    started, wanted = int(os.environ.get("WORLD_SIZE", 1)), parallel.processes
    if wanted != started == 1:
        command = f"torchrun --nproc_per_node={wanted} inference.py ..."
        raise ValueError(f"{parallel} needs {wanted} processes, but one was started; start them with {command}")
    if wanted != started:
        raise ValueError(f"{parallel} needs {wanted} of the {started} processes that were started; the product of windows, guidance, ring "
                         f"and ulysses must be {started}, such as parallel.ulysses={started}")
    if started > 1 and device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device={device} names one device for {started} processes; with device=cuda each takes its own GPU")
    here, there = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if on_gpus(device) and here > max(there, 1):
        raise ValueError(f"{here} processes were started on a machine with {there} GPUs; use --nproc_per_node={there}, or device=cpu")


def on_gpus(device: str) -> bool:
    """Whether processes with the setting `device` compute on GPUs."""
    return device == "cuda" or (device == "auto" and torch.cuda.is_available())


def own_device(device: str) -> str:
    """The setting `device` as it holds for this process: one of several takes the GPU of its number on the machine."""
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    return f"cuda:{os.environ['LOCAL_RANK']}" if several and on_gpus(device) else device


@contextmanager
def launched(parallel: ParallelConfig, device: str) -> Iterator[Mesh | None]:
    """The mesh of the processes that were started together; None for a single one.

    Args:
        device: auto, cpu or cuda.

    Raises:
        ValueError: what `check_launch` finds; what was wrapped in `Broken` comes out as it was.
        SystemExit: another process has ended.
    """
    check_launch(parallel, device)
    if parallel.processes == 1:
        yield None
        return
    _end_in_time()
    if int(os.environ["RANK"]):
        diffusers_logging.disable_progress_bar()
        transformers_logging.disable_progress_bar()
    if gpus := on_gpus(device):
        torch.cuda.set_device(own_device(device))
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=PATIENCE)
    try:
        sizes = {name: getattr(parallel, name) for name in ("windows", "guidance", "ring", "ulysses")}
        yield Mesh.over("cuda" if gpus else "cpu", **sizes)
    except Broken as error:
        assert error.__cause__ is not None
        raise error.__cause__ from None
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # this process ends already; the launcher is about to ask it to
        logger.debug("what was said: %s", error)
        logger.error("error: another process of this run has ended, and so do all; look for its words above, or for a kill by the system")
        raise SystemExit(1) from None
    # After an error nobody takes part any more in taking the group down: the end of the process does.
    dist.destroy_process_group()


def leads(mesh: Mesh | None) -> bool:
    """Whether this process is the one that decodes and writes."""
    return mesh is None or dist.get_rank() == 0


def together(mesh: Mesh | None, work: Callable[[], Result]) -> Result:
    """What `work` gives to this process, if it has gone well in all of them; every process calls it.

    Raises:
        SharedMistake: the first ValueError or OSError of one of several processes; a single process raises it as it is.
    """
    if mesh is None:
        return work()
    result = mistake = None
    try:
        result = work()
    except MISTAKES as error:
        mistake = error
    said: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(said, None if mistake is None else str(mistake))
    if mistakes := [line for line in said if line is not None]:
        raise SharedMistake(mistakes[0]) from mistake
    return result


@contextmanager
def in_step(mesh: Mesh | None) -> Iterator[None]:
    """Around work in which processes wait for one another: a mistake of one among several that the others do not know becomes `Broken`."""
    try:
        yield
    except SharedMistake:
        raise
    except MISTAKES as error:
        if mesh is None:
            raise
        raise Broken(str(error)) from error


def first_to_say(line: str) -> bool:
    """Whether no other process of this run has said a line as often as this one; True where that cannot be known."""
    if (store := _launcher_store()) is None:
        return True
    _said[line] += 1
    key = hashlib.sha256(f"{os.environ.get('TORCHELASTIC_RESTART_COUNT')} {_said[line]} {line}".encode()).hexdigest()
    try:
        first = store.add(f"said/{key}", 1) == 1
    except RuntimeError:  # the launcher is going down
        return True
    if not first:
        time.sleep(TURN)
    return first


@cache
def _launcher_store() -> dist.Store | None:
    """The store through which a launcher's processes find each other, if there is one and it can be reached."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True):
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        return dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=5), wait_for_workers=False)
    except RuntimeError:
        return None


def _end_in_time() -> None:
    """Ends this process some seconds after a signal, also where it hears none because it waits inside a library for another one."""
    heard, told = os.pipe()
    os.set_blocking(told, False)
    signal.set_wakeup_fd(told, warn_on_full_buffer=False)

    def watch() -> None:
        os.read(heard, 1)
        try:
            time.sleep(GRACE)
            if dist.is_initialized():
                _abort_process_group()  # who waits for a process that has ended gets an error, and can clean up
                time.sleep(GRACE)
        finally:
            os._exit(130)

    threading.Thread(target=watch, daemon=True).start()
