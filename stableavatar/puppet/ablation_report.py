"""What an experiment says: means, paired differences and their intervals; its section of docs/ablations.md, its picture.

Results are, by variant, a list over seeds of lists over cases; case c of seed s is the same person, sound and noise for all variants.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from stableavatar.evaluation.statistics import Interval, bootstrap, decimals
from stableavatar.files import replacing, write_json
from stableavatar.geometry import FPS
from stableavatar.plots import plotting, svg, svg_settings

Results = dict[str, list[list[dict[str, Any]]]]
CURVES = ("background_de", "skin_de", "identity_ssim", "aperture_correlation")
"""Figures that are drawn over time."""
MORE_IS_BETTER = ("aperture_correlation", "width_correlation", "silence_closed", "identity_ssim", "background_ssim", "sharpness")
LESS_IS_BETTER = ("silence_aperture", "broken_frames", "background_de", "skin_de", "hair_de", "drift_background", "drift_colour", "seconds",
                  "swapped_correlation")  # fmt: skip


def figure_grid(seeds: Sequence[Sequence[dict[str, Any]]], name: str) -> np.ndarray:
    """A figure of one variant [seeds, cases]; NaN where there was nothing to measure."""
    found = [[(case["model"] | {"seconds": case["seconds"]}).get(name) for case in cases] for cases in seeds]
    return np.array(found, dtype=np.float64)


def summarise(results: Results, reference: str, figures: Sequence[str]) -> dict[str, dict[str, dict[str, Interval | None]]]:
    """By variant and figure, "mean" and, case by case, "difference" to the reference.

    Raises:
        ValueError: a figure that no video has.
    """
    grids = {variant: {name: figure_grid(seeds, name) for name in figures} for variant, seeds in results.items()}
    for name in figures:
        if all(np.isnan(found[name]).all() for found in grids.values()):
            raise ValueError(f"figures has {name!r}, which no video of this experiment has")
    return {
        variant: {
            "mean": {name: bootstrap(found[name]) for name in figures},
            "difference": {name: bootstrap(found[name] - grids[reference][name]) for name in figures},
        }
        for variant, found in grids.items()
    }


def write_report(
    results: Results, reference: str, figures: Sequence[str], heading: tuple[str, str], about: str, home: Path, docs: Path
) -> None:
    """Writes summary.json into `home`, and the section and the picture of the experiment into `docs`.

    Args:
        heading: name and title of the section. about: a sentence on how it was made.
    """
    name, title = heading
    rows = summarise(results, reference, figures)
    docs.mkdir(parents=True, exist_ok=True)
    write_json(home / "summary.json", _plain(rows))
    picture = docs / f"ablations_{name}.svg"
    draw(results, rows, figures, picture)
    text = f"{about}\n\n{markdown(rows, reference, figures)}\n\n![{title}]({picture.name})"
    replace_section(docs / "ablations.md", name, title, text)


def _plain(rows: dict[str, dict[str, dict[str, Interval | None]]]) -> dict[str, dict[str, dict[str, dict[str, float] | None]]]:
    """The summary as JSON knows it."""
    return {
        variant: {kind: {name: interval and asdict(interval) for name, interval in figures.items()} for kind, figures in found.items()}
        for variant, found in rows.items()
    }


def markdown(rows: dict[str, dict[str, dict[str, Interval | None]]], reference: str, figures: Sequence[str]) -> str:
    """Two tables: means, and differences to the reference, in bold where their interval leaves out 0."""
    return "\n\n".join(["\n".join(_table(rows, "mean", "mean (95 % interval)", figures)),
                        "\n".join(_table({k: v for k, v in rows.items() if k != reference}, "difference", f"minus {reference}", figures))])


def _table(rows: dict[str, Any], kind: str, corner: str, figures: Sequence[str]) -> Iterator[str]:
    yield "| " + " | ".join([corner, *map(label, figures)]) + " |"
    yield "|" + "---|" * (len(figures) + 1)
    for variant, found in rows.items():
        yield "| " + " | ".join([variant, *(_cell(found[kind][name], kind) for name in figures)]) + " |"


def _cell(found: Interval | None, kind: str) -> str:
    if found is None:
        return "–"
    form = "+" if kind == "difference" else ""
    mean, low, high = (f"{value:{form}.{decimals(found)}f}" for value in (found.mean, found.low, found.high))
    return f"**{mean}** ({low} .. {high})" if kind == "difference" and found.low * found.high > 0 else f"{mean} ({low} .. {high})"


def label(name: str) -> str:
    """A figure's name in words, with an arrow to what is better."""
    base = name.removesuffix("_early").removesuffix("_late")
    return name.replace("_de", " ΔE").replace("_", " ") + (" ↑" if base in MORE_IS_BETTER else " ↓" if base in LESS_IS_BETTER else "")


def replace_section(path: Path, name: str, title: str, text: str) -> None:
    """Puts text between `<!-- NAME -->` and `<!-- /NAME -->` of a file in place of what is there; a new section goes to its end.

    Raises:
        ValueError: the section is not closed.
    """
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    old = path.read_text(encoding="utf-8") if path.exists() else "# Ablations in miniature\n"
    if begin not in old:
        old = f"{old.rstrip()}\n\n## {title}\n\n{begin}\n{end}\n"
    head, _, rest = old.partition(begin)
    _, closed, tail = rest.partition(end)
    if not closed:
        raise ValueError(f"{path} has {begin} without {end}")
    with replacing(path) as part:
        part.write_text(f"{head}{begin}\n{text.strip()}\n{end}{tail}", encoding="utf-8")


def draw(results: Results, rows: dict[str, Any], figures: Sequence[str], path: Path) -> None:
    """The picture, SVG: figures over time if there are curves, else a point with its interval for each variant and figure."""
    pyplot = plotting()
    with pyplot.rc_context(svg_settings(path.name)):
        curved = all("curve" in case for seeds in results.values() for cases in seeds for case in cases)
        figure = _draw_curves(pyplot, results) if curved else _draw_points(pyplot, rows, figures)
        with replacing(path) as part:
            part.write_bytes(svg(pyplot, figure))


def _draw_points(pyplot: Any, rows: dict[str, Any], figures: Sequence[str]) -> Any:
    figure, axes = pyplot.subplots(1, len(figures), figsize=(2.4 * len(figures) + 1, 0.3 * len(rows) + 1), sharey=True, squeeze=False)
    for axis, name in zip(axes[0], figures):
        for place, found in enumerate(row["mean"][name] for row in rows.values()):
            if found:
                axis.plot([found.low, found.high], [place, place], color="0.6")
                axis.plot(found.mean, place, "o", color=f"C{place % 10}")
        axis.set_title(label(name), fontsize=9)
        axis.grid(alpha=0.3)
    axes[0, 0].set_yticks(range(len(rows)), list(rows))
    axes[0, 0].invert_yaxis()
    return figure


def _draw_curves(pyplot: Any, results: Results) -> Any:
    """Means over time with bands of their intervals; every variant's stretches begin where those of the others do."""
    figure, axes = pyplot.subplots(1, len(CURVES), figsize=(3.4 * len(CURVES), 3.1), layout="constrained")
    for axis, name in zip(axes, CURVES):
        for variant, seeds in results.items():
            points = [(at, found) for at, found in stretch_intervals(seeds, name) if found]
            if points:
                times = [at for at, _ in points]
                axis.plot(times, [found.mean for _, found in points], label=variant)
                axis.fill_between(times, [found.low for _, found in points], [found.high for _, found in points], alpha=0.15)
        axis.set(title=label(name), xlabel="seconds")
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(axes))
    return figure


def stretch_intervals(seeds: Sequence[Sequence[dict[str, Any]]], name: str) -> list[tuple[float, Interval | None]]:
    """Beginning in seconds of each stretch, and a figure's mean and interval there."""
    count = len(seeds[0][0]["curve"])
    grids = [np.array([[case["curve"][k].get(name) for case in cases] for cases in seeds], dtype=np.float64) for k in range(count)]
    starts = [seeds[0][0]["starts"][k] / FPS for k in range(count)]
    return list(zip(starts, map(bootstrap, grids)))
