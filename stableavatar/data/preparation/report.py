"""report.html: what a prepared set holds, its scores and their thresholds, what was rejected and why. One file, no scripts, no network."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from stableavatar.data.clips import one_line
from stableavatar.data.preparation.manifest import Row
from stableavatar.data.preparation.splits import SPLITS
from stableavatar.files import write_whole
from stableavatar.pages import jpeg_uri, render

REPORT = "report.html"
SHEETS = 48
"""Contact sheets of rejected clips, and as many of accepted ones: some 20 KB each."""
SHEET_FRAMES, SHEET_HEIGHT = 4, 150
"""Frames of a sheet, side by side, and their height in pixels."""
SET_ASIDE = "set aside"
"""Stands for all reasons that are no score's."""
BARS = 30
CHART_WIDTH, CHART_HEIGHT = 300, 90
"""In units of the drawings."""


@dataclass(frozen=True)
class Chart:
    """A score's histogram as it is drawn.

    Attributes:
        clips: how many the score was taken of; the sentence that describes it to those who do not see it is built from all numbers here.
        low, median, high: of the score.
        bars: x, y, width, height and what is in each; lines: x and text of each threshold.
    """

    name: str
    clips: int
    low: float
    median: float
    high: float
    bars: list[tuple[float, float, float, float, str]]
    lines: list[tuple[float, str]]


@dataclass(frozen=True)
class Sheet:
    """A few frames of a clip, as a data URI, or why they cannot be shown."""

    row: Row
    picture: str
    problem: str = ""


def write_report(
    out: Path,
    rows: Sequence[Row],
    limits: Mapping[str, Sequence[tuple[str, float]]],
    problems: Mapping[str, str],
    settings: Mapping[str, object],
) -> None:
    """Write report.html of a set, whole or not at all; it grows with the number of rejected clips only by a line each.

    Args:
        out: the prepared set.
        limits: every score that there is -> its thresholds, as ("at least" or "at most", value); a score without any never filters.
        problems: file or clip -> why nothing could be made of it.
        settings: what was asked for, key -> value.

    Raises:
        ValueError: the file cannot be written.
    """
    rows = sorted(rows, key=lambda row: row.id)
    rejected = [row for row in rows if not row.accepted]
    accepted = [row for row in rows if row.accepted]
    charts, untaken = _charts(rows, limits)
    values = {
        "rows": rows,
        "accepted": accepted,
        "rejected": rejected,
        "length": _length,
        "splits": SPLITS,
        "counts": _counts(rows),
        "charts": charts,
        "untaken": untaken,
        "chart_size": (CHART_WIDTH, CHART_HEIGHT),
        "reasons": Counter(_measure(reason, limits) for row in rejected for reason in row.reasons).most_common(),
        "rejected_sheets": _sheets(out, _sample_rejected(rejected, limits)),
        "accepted_sheets": _sheets(out, _sample(accepted, SHEETS)),
        "problems": sorted(problems.items()),
        "settings": settings,
    }
    page = render("stableavatar.data.preparation", "report.html.j2", values)
    write_whole(out / REPORT, lambda path: path.write_text(page, encoding="utf-8"))


def _length(rows: Sequence[Row]) -> str:
    """Time that all of the clips take, as a person would say it."""
    hours = sum(row.seconds for row in rows) / 3600
    return f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.1f} min"


def _counts(rows: Sequence[Row]) -> list[tuple[str, str, dict[str, list[Row]], list[Row]]]:
    """(bucket, kind, accepted clips of each split, rejected clips), sorted."""
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.bucket, row.kind].append(row)
    return [
        (*key, {split: [row for row in group if row.accepted and row.split == split] for split in SPLITS},
         [row for row in group if not row.accepted])
        for key, group in sorted(groups.items())
    ]


def _charts(rows: Sequence[Row], limits: Mapping[str, Sequence[tuple[str, float]]]) -> tuple[list[Chart], list[str]]:
    """Histograms of the scores that were taken, and the names of those that were not."""
    charts, untaken = [], []
    for name, bounds in limits.items():
        values = np.array([row.scores[name] for row in rows if row.scores.get(name) is not None], float)
        values = values[np.isfinite(values)]
        if len(values):
            charts.append(_chart(name, values, bounds))
        else:
            untaken.append(name)
    return charts, untaken


def _chart(name: str, values: np.ndarray, bounds: Sequence[tuple[str, float]]) -> Chart:
    ends = [*values, *(value for _, value in bounds)]
    low, high = float(min(ends)), float(max(ends))
    counts, edges = np.histogram(values, BARS, (low, high) if high > low else (low - 0.5, high + 0.5))
    x = (edges - edges[0]) / (edges[-1] - edges[0]) * CHART_WIDTH
    heights = counts / counts.max() * CHART_HEIGHT
    bars = [
        (round(x[i], 1), round(CHART_HEIGHT - heights[i], 1), round(x[i + 1] - x[i] - 1, 1), round(heights[i], 1),
         f"{edges[i]:.4g} to {edges[i + 1]:.4g}: {counts[i]}")
        for i in np.flatnonzero(counts)
    ]
    lines = [(round(float(np.interp(value, edges, x)), 1), f"{side} {value:g}") for side, value in bounds]
    return Chart(name, len(values), float(values.min()), float(np.median(values)), float(values.max()), bars, lines)


def _measure(reason: str, scores: Collection[str]) -> str:
    """What a reason is about: a score ("sharpness 0.12 < 0.3" -> "sharpness"), or something that kept the scores from being taken."""
    name = reason.split(" ", 1)[0]
    return name if name in scores else SET_ASIDE


def _sample(rows: Sequence[Row], count: int) -> list[Row]:
    """At most `count` rows, drawn by their names: the same ones every time."""
    drawn = sorted(rows, key=lambda row: hashlib.sha256(row.id.encode()).digest())[:count]
    return sorted(drawn, key=lambda row: row.id)


def _sample_rejected(rows: Sequence[Row], scores: Collection[str]) -> list[Row]:
    """At most SHEETS rejected clips, of which each reason has its share."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[_measure(row.reasons[0], scores)].append(row)
    return [row for _, group in sorted(groups.items()) for row in _sample(group, SHEETS // len(groups))]


def _sheets(out: Path, rows: Sequence[Row]) -> list[Sheet]:
    # Not at the top: splits and lists need no package that draws.
    from stableavatar.data.preparation.overlay import contact_sheet

    sheets = []
    for row in tqdm(rows, "contact sheets", delay=2):
        try:
            pixels = contact_sheet(out / row.folder, SHEET_FRAMES, SHEET_FRAMES, SHEET_HEIGHT)
            sheets.append(Sheet(row, jpeg_uri(pixels)))
        except (ValueError, OSError) as error:
            sheets.append(Sheet(row, "", one_line(error)))
    return sheets
