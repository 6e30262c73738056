"""The first step: which raw files there are, and what each is. OUT/.work/inventory.json lists their names."""

import json
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from stableavatar.data.preparation.inventory import inspect, list_files
from stableavatar.data.preparation.jobs import Job, run_jobs
from stableavatar.data.preparation.records import Source
from stableavatar.data.preparation.state import FILES, Store, digest
from stableavatar.files import write_json
from stableavatar.workers import Share

logger = logging.getLogger(__name__)

CATALOG, STEP = "inventory.json", "inventory"


def take_inventory(raw: Path, store: Store, share: Share) -> dict[str, str]:
    """Looks at all files that are new or changed (another size or time), and writes the catalog.

    Returns:
        name -> why a file could not be looked at now.

    Raises:
        ValueError: there are no files.
    """
    files = list(list_files(raw, store.out))
    if not files:
        raise ValueError(f"no files in {raw}; set raw to a folder of videos")
    unnamed = [ascii(name) for name, _ in files if not _is_text(name)]
    files = [(name, path) for name, path in files if _is_text(name)]
    jobs, failed = [], dict.fromkeys(unnamed, "its name is not UTF-8; rename it")
    for name, path in files:
        try:
            job = Job(FILES, digest(name), STEP, name, _stamp(path), partial(inspect, path, name))
        except OSError as error:
            failed[name] = f"cannot read {path}: {error.strerror or error}"
        else:
            jobs += [] if store.is_current(FILES, job.unit, STEP, job.settings) else [job]
    write_json(store.work / CATALOG, [name for name, _ in files])
    return failed | run_jobs(STEP, jobs, len(files) + len(unnamed) - len(failed) - len(jobs), store, share)


def _is_text(name: str) -> bool:
    """Whether a name can be written down; one of other bytes than UTF-8 cannot."""
    try:
        return bool(name.encode())
    except UnicodeEncodeError:
        return False


def _stamp(path: Path) -> str:
    """By what a file is known to be unchanged."""
    state = path.stat()
    return digest(state.st_size, state.st_mtime_ns)


def read_catalog(store: Store) -> list[str]:
    """The names that `take_inventory` wrote; ValueError if it has not run."""
    try:
        return json.loads((store.work / CATALOG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"nothing is known of {store.out}; run the step inventory first, or name no step to run all") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {store.work / CATALOG}: {error}; run the step inventory again") from None


def read_sources(names: Sequence[str], store: Store) -> tuple[list[Source], dict[str, str]]:
    """The usable files, in the order of `names`, and name -> why another is left out. Of files of the same content the first counts."""
    sources, problems = {}, {}
    for name in names:
        record = store.read(FILES, digest(name), STEP)
        if record is None:
            problems[name] = "it has not been looked at; run the step inventory"
        elif record.problem is not None:
            problems[name] = record.problem
        elif (same := sources.get(record.values["sha256"])) is not None:
            problems[name] = f"its content is that of {same.path}; it is left out"
        else:
            sources[record.values["sha256"]] = Source(**record.values)
    return list(sources.values()), problems
