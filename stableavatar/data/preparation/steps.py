"""The walk from raw files to a training set, step by step: what there is to do, and what it reads."""

import fcntl
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from stableavatar.data.clips import SOUND
from stableavatar.data.preparation.assembly import write_problems, write_set
from stableavatar.data.preparation.catalog import read_catalog, read_sources, take_inventory
from stableavatar.data.preparation.clips import UNFINISHED, CropSettings, remake_clip
from stableavatar.data.preparation.cuts import find_segments
from stableavatar.data.preparation.faces import FaceFinder
from stableavatar.data.preparation.jobs import Job
from stableavatar.data.preparation.labels import load_classifier, read_table, unknown_paths
from stableavatar.data.preparation.records import ClipFolder, Source
from stableavatar.data.preparation.settings import STEPS, PrepareConfig
from stableavatar.data.preparation.state import CLIPS, SOURCES, Store, digest
from stableavatar.data.preparation.walk import CROP, CUTS, MASKS, SCORES, VOICE, Preparation, clip_name
from stableavatar.files import hash_file
from stableavatar.workers import worker_pool

logger = logging.getLogger(__name__)


def prepare(config: PrepareConfig) -> int:
    """Runs the wanted steps. Exit code: 1 if something could not be written and has to be done again, else 0.

    Raises:
        ValueError: a folder, table, annotation or model cannot be read; another run is at work in OUT.
    """
    config.check_folders()
    store = Store(Path(config.out))
    with _alone(store), worker_pool(config.workers or len(os.sched_getaffinity(0))) as share:
        run = Preparation(config, store, share, read_table(config.table) if config.table else {})
        _check_models(config)
        for step in config.wanted():
            WALK[step](run)
        write_problems(run)
    return 1 if run.failed else 0


def _check_models(config: PrepareConfig) -> None:
    """ValueError if something that a wanted step will load is not there: it should not show after hours, nor as a fault of the clips."""
    wanted = config.wanted()
    if CROP in wanted and config.classifier:
        load_classifier(config.classifier)
    if MASKS in wanted or (CROP in wanted and config.clip.heads != "none"):
        FaceFinder(config.faces.model, config.faces.max_faces).close()
    # Here and below: what a step needs is slow to load, and other steps do not need it.
    if VOICE in wanted and config.voice.separator:
        from stableavatar.data.vocals import check_separator

        check_separator(config.voice.separator)
    if SCORES in wanted:
        from stableavatar.data.preparation.scores import check_models

        check_models(config.scores)


@contextmanager
def _alone(store: Store) -> Iterator[None]:
    """Keeps a second run out of OUT (the lock ends with the process); removes what a run leaves unfinished."""
    store.work.mkdir(parents=True, exist_ok=True)
    with (store.work / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"another run is at work in {store.out}; wait until it has ended, or give another out=") from None
        try:
            shutil.rmtree(store.work / UNFINISHED, ignore_errors=True)
            yield
        finally:
            shutil.rmtree(store.work / UNFINISHED, ignore_errors=True)


def take_stock(run: Preparation) -> None:
    """The step inventory."""
    run.failed |= take_inventory(run.raw, run.store, run.share)
    run.forget()
    sources = read_sources(read_catalog(run.store), run.store)[0]
    if unknown := unknown_paths(run.table, sources):
        logger.warning("the table names %d files that are no usable videos in %s (%s, ...)", len(unknown), run.raw, unknown[0])


def find_cuts(run: Preparation) -> None:
    """The step cuts."""
    sources, stretches, _ = run.sources()
    config, jobs = run.config, []
    for source in sources:
        path = run.raw / source.path
        work = partial(find_segments, source, path, stretches[source.id], config.clip.fps, config.cuts)
        reads = digest(content(source), [asdict(segment) for segment in stretches[source.id]], config.clip.fps, config.cuts)
        jobs.append(Job(SOURCES, source.id, CUTS, source.path, reads, work, path))
    run.do(CUTS, jobs)


def content(source: Source) -> dict[str, Any]:
    """What of a source decides how it looks and sounds."""
    return {name: value for name, value in asdict(source).items() if name not in ("path", "kind", "person")}


def crop(run: Preparation) -> None:
    """The step crop."""
    config, jobs, folders = run.config, [], {}
    settings = CropSettings(config.clip, config.faces, config.classifier, config.kind)
    looks = config.clip, config.faces.model, config.faces.max_faces
    for segment, source in run.clips():
        kind = segment.kind or source.kind or [config.classifier, config.kind]
        reads = digest(content(source), segment.start, segment.end, segment.box, kind, *looks)
        path = run.raw / source.path
        work = partial(remake_clip, segment, source, path, settings, run.store)
        jobs.append(Job(CLIPS, segment.clip_id, CROP, clip_name(segment, source), reads, work, path))
        if (record := run.store.read(CLIPS, segment.clip_id, CROP)) and record.values:
            folders[segment.clip_id] = run.store.out / record.values["folder"]
    run.do(CROP, jobs, folders)


def hear(run: Preparation) -> None:
    """The step voice."""
    from stableavatar.data.preparation.voice import process_voice

    def work(clip: ClipFolder) -> Callable[[], dict[str, Any]]:
        return partial(_with_sum, partial(process_voice, clip, run.config.voice), clip.folder / SOUND)

    _each_clip(run, VOICE, run.config.voice, (CROP,), work)


def _with_sum(work: Callable[[], dict[str, Any]], sound: Path) -> dict[str, Any]:
    """The values of the voice, with the digest of audio.wav as it is now."""
    return work() | {"audio_sha256": hash_file(sound)}


def mask(run: Preparation) -> None:
    """The step masks."""
    from stableavatar.data.preparation.masks import extract_masks

    _each_clip(run, MASKS, run.config.faces, (CROP,), lambda clip: partial(extract_masks, clip, run.config.faces))


def take_scores(run: Preparation) -> None:
    """The step scores."""
    from stableavatar.data.preparation.filters import not_taken
    from stableavatar.data.preparation.scores import score

    for line in not_taken(run.config.scores):
        logger.info("%s", line)

    def work(clip: ClipFolder) -> Callable[[], dict[str, Any]]:
        values = {step: run.store.read(CLIPS, clip.id, step).values for step in (CROP, VOICE, MASKS)}
        return partial(score, clip, run.config.scores, values)

    _each_clip(run, SCORES, run.config.scores, (CROP, VOICE, MASKS), work)


def _each_clip(
    run: Preparation, step: str, config: Any, earlier: tuple[str, ...], work: Callable[[ClipFolder], Callable[[], dict[str, Any]]]
) -> None:
    """A step for every clip whose earlier steps have run without a problem; it reads its settings and what they gave."""
    jobs, folders, waiting = [], {}, 0
    for clip, _ in run.finished():
        records = [run.store.read(CLIPS, clip.id, name) for name in earlier]
        if all(record is not None and record.problem is None for record in records):
            reads = digest(config, [asdict(record) for record in records])
            jobs.append(Job(CLIPS, clip.id, step, clip_name(clip.segment, clip.source), reads, work(clip)))
            folders[clip.id] = clip.folder
        waiting += any(record is None for record in records)
    if waiting:
        logger.warning("%s: %d clips have not been through the steps %s yet", step, waiting, " ".join(earlier))
    run.do(step, jobs, folders)


WALK: dict[str, Callable[[Preparation], None]] = dict(zip(STEPS, (take_stock, find_cuts, crop, hear, mask, take_scores, write_set)))
"""Step -> what does it."""
