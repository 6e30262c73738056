"""The last step: what all steps said of every clip becomes rows, lists, a report, and the list of problems."""

import logging
from collections import Counter

from stableavatar.config import settings
from stableavatar.data.clips import PROMPTS
from stableavatar.data.preparation.filters import decide, limits
from stableavatar.data.preparation.manifest import Row, write_manifest
from stableavatar.data.preparation.report import write_report
from stableavatar.data.preparation.splits import Origin, assign_splits
from stableavatar.data.preparation.state import CLIPS, SOURCES
from stableavatar.data.preparation.walk import CUTS, SCORES, VOICE, Preparation, clip_name, problem_of
from stableavatar.files import replacing

logger = logging.getLogger(__name__)

PROBLEMS = "problems.txt"
OF_THE_RUN = ("raw", "out", "steps", "workers")
"""Settings that say where and how fast, and change nothing of the set."""


def write_set(run: Preparation) -> None:
    """Writes the manifest, the lists and the report of all clips that have a folder.

    Raises:
        ValueError: one cannot be written.
    """
    clips = list(run.finished())
    origins = {clip.id: Origin(clip.source.sha256, clip.segment.person or clip.source.person) for clip, _ in clips}
    splits = assign_splits(origins.values(), run.config.split)
    rows, unjudged = [], 0
    for clip, values in clips:
        voice, scores = (run.store.read(CLIPS, clip.id, step) for step in (VOICE, SCORES))
        problem = problem_of(run.store, clip.id)
        taken = scores.values if scores else {}
        unjudged += scores is None and problem is None
        reasons = (problem,) if problem else tuple(decide(taken, run.config.filters))
        sums = values["video_sha256"], (voice.values if voice else {}).get("audio_sha256", values["audio_sha256"])
        origin = origins[clip.id]
        rows.append(Row(
            clip.id, values["folder"], clip.source.path, clip.source.sha256, clip.segment.start, clip.segment.end, clip.fps, clip.frames,
            clip.width, clip.height, values["bucket"], values["kind"], origin.person, splits[origin], not reasons, reasons, *sums,
            PROMPTS[values["kind"]], taken,
        ))
    if unjudged:
        logger.warning("%d clips have no scores yet and are accepted as they are; run the step scores to judge them", unjudged)
    thresholds = limits(run.config.filters)
    write_manifest(run.store.out, rows, tuple(thresholds))
    shown = {key: value for key, (_, value, _) in settings(run.config).items() if key not in OF_THE_RUN}
    write_report(run.store.out, rows, thresholds, find_problems(run), shown)
    accepted = Counter(f"{row.bucket}/{row.kind}" for row in rows if row.accepted)
    logger.info("%d clips, %d accepted (%s); why not the others is in %s", len(rows), accepted.total(),
                ", ".join(f"{count} {name}" for name, count in sorted(accepted.items())) or "none", run.store.out / "report.html")


def find_problems(run: Preparation) -> dict[str, str]:
    """File, or file and times, -> why nothing could be made of it; sorted."""
    usable, _, unusable = run.sources()
    problems = dict(unusable)
    for source in usable:
        record = run.store.read(SOURCES, source.id, CUTS)
        if record and record.problem:
            problems[source.path] = record.problem
    for segment, source in run.clips():
        if problem := problem_of(run.store, segment.clip_id):
            problems[clip_name(segment, source)] = problem
    return dict(sorted((problems | run.failed).items()))


def write_problems(run: Preparation) -> None:
    """Writes OUT/problems.txt, a line per file or clip that is set aside; OSError where it cannot be written."""
    problems = find_problems(run)
    with replacing(run.store.out / PROBLEMS) as part:
        part.write_text("".join(f"{name}: {problem}\n" for name, problem in problems.items()), encoding="utf-8")
    if problems:
        logger.warning("%d files or clips are set aside; %s says why", len(problems), run.store.out / PROBLEMS)
