"""Steps as jobs for many processes: each does one unit, writes its record, and never stops the others."""

import logging
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from stableavatar.data.clips import one_line
from stableavatar.data.preparation.state import Record, Store
from stableavatar.workers import Share

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """A step of a unit that is to be done.

    Attributes:
        units, unit, step: where its record goes.
        name: of the unit, as problems are reported.
        settings: digest of all that the step reads.
        work: gives the values of the record; a ValueError sets the unit aside.
        file: the raw file that it reads; if that is gone, nothing is done, so that what there is stays.
    """

    units: str
    unit: str
    step: str
    name: str
    settings: str
    work: Callable[[], dict[str, Any]]
    file: Path | None = None


def run_job(job: Job, store: Store) -> str | None:
    """Does a job and writes its record.

    Returns:
        None; or why nothing could be written (a full disk, say), one line: the job is done again in the next run.
    """
    if job.file and not job.file.is_file():
        return f"there is no file {job.file} any more; bring it back, or run the step inventory"
    try:
        try:
            record = Record(job.settings, job.work())
        except ValueError as error:
            if isinstance(error.__context__, OSError):  # no fault of the file's, and perhaps mended before the next run
                return one_line(error)
            record = Record(job.settings, {}, one_line(error))
        store.write(job.units, job.unit, job.step, record)
    except OSError as error:
        return one_line(error)
    return None


def run_jobs(step: str, jobs: Sequence[Job], done: int, store: Store, share: Share) -> dict[str, str]:
    """Does the jobs of a step, shows how far it is, and gives name -> reason of those whose result could not be written.

    Args:
        done: units whose records are current, for the message; share: of `worker_pool`.

    Raises:
        ValueError: a process was killed.
    """
    logger.info("%s: %d to do, %d are done", step, len(jobs), done)
    failed = {}
    try:
        results = share(partial(run_job, store=store), jobs, 1)
        for reason, job in zip(tqdm(results, step, len(jobs), delay=2), jobs):
            if reason is not None:
                logger.warning("%s: %s", job.name, reason)
                failed[job.name] = reason
    except BrokenProcessPool:
        raise ValueError(f"a process of the step {step} was killed (out of memory?); run again, if need be with fewer workers=") from None
    return failed
