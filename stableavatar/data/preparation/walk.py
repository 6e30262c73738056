"""A run over the raw files and clips of OUT: what there is, and which jobs of a step are still to be done."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stableavatar.data.clips import MASKS as MASK_FOLDERS
from stableavatar.data.clips import SOUND, VIDEO
from stableavatar.data.preparation.catalog import read_catalog, read_sources
from stableavatar.data.preparation.clips import clip_folder
from stableavatar.data.preparation.jobs import Job, run_jobs
from stableavatar.data.preparation.labels import Label, labelled
from stableavatar.data.preparation.public_sets import read_annotations
from stableavatar.data.preparation.records import ClipFolder, Segment, Source
from stableavatar.data.preparation.settings import STEPS, PrepareConfig
from stableavatar.data.preparation.state import CLIPS, SOURCES, Record, Store
from stableavatar.workers import Share

INVENTORY, CUTS, CROP, VOICE, MASKS, SCORES, MANIFEST = STEPS
OUTPUTS = {CROP: (VIDEO, SOUND), MASKS: MASK_FOLDERS}
"""Step -> what it leaves in a clip's folder; if that is gone, the step runs again."""


@dataclass
class Preparation:
    """A run over the sources and clips of OUT.

    Attributes:
        share: of `worker_pool`; table: of labels; failed: name -> what could not be written in this run.
    """

    config: PrepareConfig
    store: Store
    share: Share
    table: dict[str, Label]
    failed: dict[str, str] = field(default_factory=dict)
    _known: tuple[list[Source], dict[str, list[Segment]], dict[str, str]] | None = None

    @property
    def raw(self) -> Path:
        """Folder of the raw files."""
        return Path(self.config.raw)

    def sources(self) -> tuple[list[Source], dict[str, list[Segment]], dict[str, str]]:
        """The usable raw files with their labels, id -> stretches that the table or the annotations give, and name -> problem."""
        if self._known is None:
            self._known = self._find_sources()
        return self._known

    def _find_sources(self) -> tuple[list[Source], dict[str, list[Segment]], dict[str, str]]:
        bare, problems = read_sources(read_catalog(self.store), self.store)
        named = [labelled(source, self.table, self.config.person_folders) for source in bare]
        stretches = {source.id: segments for source, segments in named}
        if self.config.public.name:
            for segment in read_annotations(self.config.public.name, self.config.public.path, bare):
                stretches[segment.source].append(segment)
            problems |= {source.path: f"the annotations of {self.config.public.name} say nothing of it" for source in bare
                         if not stretches[source.id]}
        return [source for source, _ in named if source.path not in problems], stretches, problems

    def forget(self) -> None:
        """Sources are looked up anew: the inventory has changed."""
        self._known = None

    def clips(self) -> Iterator[tuple[Segment, Source]]:
        """The stretches that the step cuts found, of all sources, each clip id once."""
        seen = set()
        for source in self.sources()[0]:
            record = self.store.read(SOURCES, source.id, CUTS)
            for values in record.values["segments"] if record and record.values else []:
                segment = Segment(**values | {"box": values["box"] and tuple(values["box"])})
                if segment.clip_id not in seen:
                    seen.add(segment.clip_id)
                    yield segment, source

    def finished(self) -> Iterator[tuple[ClipFolder, dict[str, Any]]]:
        """The clips that have a folder, with the values of their crop."""
        for segment, source in self.clips():
            record = self.store.read(CLIPS, segment.clip_id, CROP)
            if record and record.values:
                yield clip_folder(segment, source, record.values, self.store.out), record.values

    def do(self, step: str, jobs: list[Job], folders: dict[str, Path] | None = None) -> None:
        """Does the jobs whose records are not current or whose outputs are gone (`folders`: id -> folder of a clip)."""
        def is_done(job: Job) -> bool:
            folder = folders.get(job.unit) if folders else None
            there = folder is None or all((folder / name).exists() for name in OUTPUTS.get(step, ()))
            return there and self.store.is_current(job.units, job.unit, step, job.settings)

        open_jobs = [job for job in jobs if not is_done(job)]
        self.failed |= run_jobs(step, open_jobs, len(jobs) - len(open_jobs), self.store, self.share)


def clip_name(segment: Segment, source: Source) -> str:
    """A clip as problems are reported."""
    return f"{source.path} {segment.start:.2f}-{segment.end:.2f} s"


def problem_of(store: Store, clip_id: str) -> str | None:
    """Why a clip is set aside by the first step that did so; None if none did."""
    records: Iterator[Record | None] = (store.read(CLIPS, clip_id, step) for step in (CROP, VOICE, MASKS, SCORES))
    return next((record.problem for record in records if record and record.problem), None)
