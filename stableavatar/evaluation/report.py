"""report.html: what an evaluation found, how sure that is, what it looks like. One file that fetches nothing from the network."""

import inspect
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

import numpy as np

from stableavatar.evaluation.case_sheets import case_sheets
from stableavatar.evaluation.charts import Chart, Range, curve, curves_of, distribution, range_name, signed
from stableavatar.evaluation.findings import Findings, head
from stableavatar.evaluation.pairs import Result
from stableavatar.evaluation.statistics import Comparison, Interval, Key, case_values, summarise
from stableavatar.evaluation.tables import differences, table_rows
from stableavatar.files import write_whole
from stableavatar.pages import render

REPORT = "report.html"
CaseKey = tuple[str, str, int, Range | None]


def write_report(out: Path, findings: Findings, workers: int = 1) -> Path:
    """Writes report.html into `out`, whole or not at all; returns its path.

    Args:
        workers: processes that read videos for the contact sheets.

    Raises:
        ValueError: jinja2 or matplotlib are not installed, the file cannot be written.
    """
    intervals = summarise(findings.results) | dict(findings.sets)
    shown = [name for name in findings.metrics if name not in findings.absent]
    compared, cases = _difference_rows(findings), _case_rows(findings.results)
    values = {
        "f": findings,
        "heads": {name: head(metric) for name, metric in findings.metrics.items()},
        "definitions": {name: inspect.getdoc(metric) or "" for name, metric in findings.metrics.items()},
        "rows": table_rows(findings),
        "differences": compared,
        "compared": [name for name in shown if any(name in found for found in compared.values())],
        "charts": _charts(findings, intervals, shown),
        "cases": cases,
        "measured": [name for name in shown if any(name in found for found in cases.values())],
        "cases_in_all": len({pair.name for pair in findings.pairs}),
        "sheets": case_sheets(findings.pairs, workers),
        "links": {name: _link(path, out) for name, path in findings.videos.items()},
        "signed": signed,
        "range_name": range_name,
    }
    path = out / REPORT
    page = render("stableavatar.evaluation", "report.html.j2", values)
    write_whole(path, lambda part: part.write_text(page, encoding="utf-8"))
    return path


def _difference_rows(findings: Findings) -> dict[tuple[str, Range | None], dict[str, Comparison]]:
    """(variant, range of frames) -> metric -> its difference to the reference variant."""
    rows: dict[tuple[str, Range | None], dict[str, Comparison]] = {}
    for found in differences(findings):
        rows.setdefault((found.variant, found.frames), {})[found.metric] = found
    return rows


def _charts(findings: Findings, intervals: Mapping[Key, Interval], shown: Sequence[str]) -> tuple[list[Chart], list[Chart]]:
    """Distributions over the cases, and curves over the frames."""
    cases = case_values(findings.results)
    spreads = []
    for name in shown:
        whole = {variant: intervals[variant, name, None] for variant in findings.variants if (variant, name, None) in intervals}
        if whole:
            dots = {variant: list(cases.get((variant, name, None), {}).values()) for variant in whole}
            spreads.append(distribution(findings.metrics[name].label, dots, whole))
    curves = ((findings.metrics[name].label, curves_of(intervals, name, findings.variants)) for name in shown)
    return spreads, [curve(label, found) for label, found in curves if _is_curve(found)]


def _is_curve(stretches: Mapping[str, Mapping[Range, Interval]]) -> bool:
    return any(len(found) > 1 for found in stretches.values())


def _case_rows(results: Sequence[Result]) -> dict[CaseKey, dict[str, float]]:
    """(case, variant, seed, range of frames), sorted -> metric -> value, where there was something to measure."""
    rows: dict[CaseKey, dict[str, float]] = {}
    for result in results:
        if result.pair is not None and np.isfinite(result.value):
            rows.setdefault((result.pair.name, result.variant, result.pair.seed, result.frames), {})[result.metric] = result.value
    return dict(sorted(rows.items(), key=lambda row: (row[0][:3], row[0][3] or (-1, -1))))


def _link(path: Path, out: Path) -> str:
    """How a page in `out` links to a file."""
    return quote(Path(os.path.relpath(path, out)).as_posix())
