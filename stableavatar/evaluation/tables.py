"""The tables of an experiment: published rows beside measured ones, each with its source, as CSV, Markdown and LaTeX."""

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from stableavatar.evaluation.charts import range_name, signed, written
from stableavatar.evaluation.findings import Findings, head
from stableavatar.evaluation.published import PublishedRow
from stableavatar.evaluation.statistics import Comparison, Interval, Key, compare, summarise
from stableavatar.files import replacing

TABLE, VALUES = "table", "values.csv"
NOTHING, ABSENT, MEASURED = "–", "absent", "measured"
TIDY = ("method", "variant", "whose", "metric", "value", "low", "high", "cases", "videos", "excluded", "note", "source")
"""Columns of table.csv."""
SHOWN_PROBLEMS = 20
"""Excluded videos that the Markdown names one by one; the report and problems.csv have all."""
LATEX = str.maketrans({"&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}",
                       "^": r"\textasciicircum{}", "\\": r"\textbackslash{}", "↑": r"$\uparrow$", "↓": r"$\downarrow$", "–": "--"})
"""Characters that mean something to LaTeX, or that it lacks."""


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        name: of the method. kind: "measured", or whose weights a published row is of. source: where it was published.
        cells: metric -> text. values: metric -> interval, or the published number; without what there is nothing of.
        videos, excluded: how many were measured, and how many were not because something is wrong with them; None for published rows.
    """

    name: str
    kind: str
    cells: Mapping[str, str]
    values: Mapping[str, Interval | float]
    source: str = ""
    variant: str = ""
    videos: int | None = None
    excluded: int | None = None


def write_tables(out: Path, findings: Findings) -> None:
    """Writes table.csv, table.md, table.tex, values.csv (every video's figures) and problems.csv into `out`, each whole or not at all."""
    rows = table_rows(findings)
    _write(out / f"{TABLE}.csv", _tidy(rows, findings))
    _write(out / f"{TABLE}.md", markdown(rows, findings))
    _write(out / f"{TABLE}.tex", latex(rows, findings))
    _write(out / VALUES, _values(findings))
    _write(out / "problems.csv", _csv([("variant", "file", "reason"), *((one.variant, one.path, one.reason) for one in findings.problems)]))


def _write(path: Path, text: str) -> None:
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def table_rows(findings: Findings) -> list[Row]:
    """The rows: what others published, then each variant after the published rows that it repeats."""
    published = findings.published
    intervals = summarise(findings.results) | dict(findings.sets)
    variants = list(dict.fromkeys([*findings.variants, *(one.variant for one in findings.problems if one.variant), *findings.missing]))
    rows = [_published(row, findings) for row in published if row.variant not in variants]
    for variant in variants:
        rows += [_published(row, findings) for row in published if row.variant == variant]
        stretches = sorted({frames for name, _, frames in intervals if name == variant}, key=lambda frames: frames or (-1, -1))
        rows += [_measured(variant, frames, intervals, findings) for frames in stretches or [None]]
    return rows


def _published(row: PublishedRow, findings: Findings) -> Row:
    name = f"{row.name} ({range_name(row.frames)})" if row.frames else row.name
    cells = {metric: row.texts.get(metric, NOTHING) for metric in findings.metrics}
    return Row(name, row.note, cells, {metric: row.values[metric] for metric in findings.metrics if metric in row.values}, row.source)


def _measured(variant: str, frames: tuple[int, int] | None, intervals: Mapping[Key, Interval], findings: Findings) -> Row:
    values = {metric: intervals[variant, metric, frames] for metric in findings.metrics if (variant, metric, frames) in intervals}
    cells = {metric: ABSENT if metric in findings.absent or variant in findings.missing else NOTHING for metric in findings.metrics}
    cells |= {metric: written(found) for metric, found in values.items()}
    videos = sum(pair.variant == variant for pair in findings.pairs)
    excluded = sum(problem.variant == variant for problem in findings.problems)
    name = f"{variant} ({range_name(frames)})" if frames else variant
    return Row(name, MEASURED, cells, values, variant=variant, videos=videos, excluded=excluded)


def _columns(findings: Findings) -> list[str]:
    return ["Method", *map(head, findings.metrics.values()), "videos", "excluded", "whose figures"]


def _cells(row: Row, sources: Mapping[str, int]) -> list[str]:
    counts = [NOTHING if count is None else str(count) for count in (row.videos, row.excluded)]
    return [row.name, *row.cells.values(), *counts, f"{row.kind} [{sources[row.source]}]" if row.source else row.kind]


def _sources(rows: Iterable[Row]) -> dict[str, int]:
    """Source -> its number, from 1."""
    return {source: number for number, source in enumerate(dict.fromkeys(row.source for row in rows if row.source), 1)}


def markdown(rows: Sequence[Row], findings: Findings) -> str:
    """The table with what has to be known of it: sources, differences, what is absent, what was excluded."""
    sources = _sources(rows)
    parts = [f"# {findings.title}", findings.about, _grid([_columns(findings), *(_cells(row, sources) for row in rows)])]
    parts.append("Measured: mean over the cases (95 % interval by bootstrap over them); a set-level figure is of all videos together.")
    parts.append("\n".join(f"[{number}] {source}" for source, number in sources.items()))
    if compared := [_difference_cells(one, findings) for one in differences(findings)]:
        heading = ("minus " + findings.reference, "metric", "difference (95 % interval)", "cases", "p")
        parts += ["## Differences, case by case", _grid([heading, *compared])]
    absent = [f"- {name}: {why}" for name, why in {**findings.absent, **findings.missing}.items()]
    parts += ["## Absent", "\n".join(absent)] * bool(absent)
    named = [f"- {problem.path}: {problem.reason}" for problem in findings.problems]
    more = [f"- ... and {len(named) - SHOWN_PROBLEMS} more (problems.csv)"] * (len(named) > SHOWN_PROBLEMS)
    parts += [f"## Excluded ({len(named)})", "\n".join(named[:SHOWN_PROBLEMS] + more)] * bool(named)
    return "\n\n".join(filter(None, parts)) + "\n"


def _grid(lines: Sequence[Sequence[str]]) -> str:
    cells = [[str(cell).replace("|", r"\|") for cell in line] for line in lines]
    rows = [f"| {' | '.join(line)} |" for line in cells]
    return "\n".join([rows[0], "|" + "---|" * len(lines[0]), *rows[1:]])


def differences(findings: Findings) -> list[Comparison]:
    """Every variant minus the reference, per metric and stretch, in the order of the rows and columns."""
    found = [*findings.set_differences, *(compare(findings.results, findings.reference) if findings.reference else [])]
    metrics = list(findings.metrics)
    return sorted(found, key=lambda one: (findings.variants.index(one.variant), one.frames or (-1, -1), metrics.index(one.metric)))


def _difference_cells(one: Comparison, findings: Findings) -> tuple[str, ...]:
    name = f"{one.variant} ({range_name(one.frames)})" if one.frames else one.variant
    p = NOTHING if math.isnan(one.p) else f"{one.p:.3g}"
    return name, findings.metrics[one.metric].label, signed(one.difference), str(one.difference.count), p


def latex(rows: Sequence[Row], findings: Findings) -> str:
    """A table environment with booktabs' rules; sources are in its caption."""
    sources, columns = _sources(rows), _columns(findings)
    notes = "; ".join(f"[{number}] {source}" for source, number in sources.items())
    top, *body = [" & ".join(map(_tex, line)) + r" \\" for line in (columns, *(_cells(row, sources) for row in rows))]
    begin = [r"\begin{table}", r"\centering", rf"\begin{{tabular}}{{l{'c' * (len(columns) - 2)}l}}"]
    end = [r"\end{tabular}", rf"\caption{{{_tex(f'{findings.title}. {notes}'.strip())}}}", r"\end{table}", ""]
    return "\n".join([*begin, r"\toprule", top, r"\midrule", *body, r"\bottomrule", *end])


def _tex(text: str) -> str:
    return text.translate(LATEX)


def _tidy(rows: Sequence[Row], findings: Findings) -> str:
    """A line for each row and metric; numbers in full."""
    lines: list[Sequence[object]] = [TIDY]
    for row in rows:
        for metric in findings.metrics:
            value = row.values.get(metric)
            numbers = (value.mean, value.low, value.high, value.count) if isinstance(value, Interval) else (value, None, None, None)
            note = findings.absent.get(metric, "") if row.kind == MEASURED else ""
            lines.append((row.name, row.variant, row.kind, metric, *numbers, row.videos, row.excluded, note, row.source))
    return _csv(lines)


def _values(findings: Findings) -> str:
    """A line for each video, metric and stretch."""
    lines = sorted((one.variant, one.pair.name, one.pair.seed, range_name(one.frames) if one.frames else "", one.metric, one.value)
                   for one in findings.results if one.pair)  # fmt: skip
    return _csv([("variant", "case", "seed", "frames", "metric", "value"), *lines])


def _csv(lines: Iterable[Iterable[object]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()
