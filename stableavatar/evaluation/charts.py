"""The report's plots: how a metric is spread over the cases of each variant, and how it changes over the frames (the paper's figure 2)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stableavatar.evaluation.statistics import Interval, Key, decimals
from stableavatar.pages import data_uri
from stableavatar.plots import plotting, svg, svg_settings

COLOURS = ("#0072b2", "#c04000", "#00795c", "#9b2f7e", "#7a5c00", "#4d4d4d", "#3b3fa8", "#a3123a")
"""Dark enough to be told from white."""
MARKERS = "osD^vP*X"
"""Beside the colours, for those who do not tell these apart."""
SPREAD = 0.25
"""Of the distance of two variants: so far the dots of one stand apart."""
Range = tuple[int, int]


@dataclass(frozen=True)
class Chart:
    """A plot as a data URI, and what it shows in words."""

    title: str
    picture: str
    text: str


def distribution(metric: str, values: Mapping[str, Sequence[float]], intervals: Mapping[str, Interval]) -> Chart:
    """A row for each variant: a dot for every case (`values`; a set-level metric has none), mean and 95 % interval in black."""
    pyplot = plotting()
    with pyplot.rc_context(svg_settings(metric)):
        figure, axis = pyplot.subplots(figsize=(4.6, 0.4 * len(intervals) + 0.8))
        for place, (variant, found) in enumerate(intervals.items()):
            dots = np.asarray(values.get(variant, ()), float)
            axis.plot(dots, place + SPREAD * np.linspace(-1, 1, len(dots)), ".", color=COLOURS[place % len(COLOURS)], alpha=0.5)
            axis.plot([found.low, found.high], [place, place], color="black")
            axis.plot(found.mean, place, "D", color="black", markersize=5)
        axis.set_yticks(range(len(intervals)), list(intervals))
        axis.set_ylim(len(intervals) - 0.5, -0.5)
        axis.set_xlabel(metric)
        axis.grid(axis="x", alpha=0.3)
        picture = data_uri("image/svg+xml", svg(pyplot, figure))
    means = "; ".join(f"{variant} {written(found)}" for variant, found in intervals.items())
    return Chart(metric, picture, f"{metric} by variant, mean and 95 % interval: {means}")


def curve(metric: str, stretches: Mapping[str, Mapping[Range, Interval]]) -> Chart:
    """A line for each variant over its ranges of frames, with a band of the intervals."""
    pyplot = plotting()
    with pyplot.rc_context(svg_settings(metric)):
        figure, axis = pyplot.subplots(figsize=(5.4, 3))
        for place, (variant, found) in enumerate(stretches.items()):
            _draw_line(axis, place, variant, found)
        ranges = sorted({frames for found in stretches.values() for frames in found})
        axis.set_xticks([sum(frames) / 2 for frames in ranges], [range_name(frames) for frames in ranges], rotation=30, ha="right")
        axis.set(xlabel="frames", ylabel=metric)
        axis.grid(alpha=0.3)
        axis.legend()
        picture = data_uri("image/svg+xml", svg(pyplot, figure))
    ends = "; ".join(f"{variant} {_ends(found)}" for variant, found in stretches.items())
    return Chart(metric, picture, f"{metric} over the frames, first and last range: {ends}")


def _draw_line(axis: Any, place: int, variant: str, found: Mapping[Range, Interval]) -> None:
    ranges = sorted(found)
    middles, points = [sum(frames) / 2 for frames in ranges], [found[frames] for frames in ranges]
    style = {"color": COLOURS[place % len(COLOURS)], "marker": MARKERS[place % len(MARKERS)]}
    axis.plot(middles, [point.mean for point in points], label=variant, markersize=4, **style)
    axis.fill_between(middles, [point.low for point in points], [point.high for point in points], color=style["color"], alpha=0.15, lw=0)


def _ends(found: Mapping[Range, Interval]) -> str:
    return ", ".join(f"{written(found[frames])} in {range_name(frames)}" for frames in (min(found), max(found)))


def range_name(frames: Range) -> str:
    """Frames [first, stop) as the papers write them: from 1, both included."""
    return f"{frames[0] + 1}–{frames[1]}"


def written(found: Interval) -> str:
    """Mean and interval; one case has none."""
    return _written(found, "")


def signed(found: Interval) -> str:
    """A difference and its interval, with their signs; one case has none."""
    return _written(found, "+")


def _written(found: Interval, sign: str) -> str:
    mean, low, high = (f"{value:{sign}.{decimals(found)}f}" for value in (found.mean, found.low, found.high))
    return f"{mean} ({low} .. {high})" if found.count > 1 else mean


def curves_of(intervals: Mapping[Key, Interval], metric: str, variants: Sequence[str]) -> dict[str, dict[Range, Interval]]:
    """The stretches of one metric, by variant (in this order) and range; without variants that have none."""
    found: dict[str, dict[Range, Interval]] = {variant: {} for variant in variants}
    for (variant, name, frames), interval in intervals.items():
        if name == metric and frames is not None:
            found[variant][frames] = interval
    return {variant: stretches for variant, stretches in found.items() if stretches}
