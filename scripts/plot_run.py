"""Draws the losses of training runs over their steps, as they are and smoothed.

    python scripts/plot_run.py RUN [RUN ...] out.png [--key loss] [--smooth 0.95]

RUN is a run folder, or its metrics.jsonl. Needs matplotlib (requirements-dev.txt).
"""

import argparse
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from stableavatar.files import replacing  # noqa: E402
from stableavatar.training.report import METRICS_FILE, read_metrics  # noqa: E402


def curve(run: Path, key: str) -> tuple[list[int], list[float]]:
    """Steps and values of a run. Raises ValueError if it has none."""
    path = run / METRICS_FILE if run.is_dir() else run
    lines = read_metrics(path)
    points = [(line["step"], line[key]) for line in lines if key in line]
    if not points:
        known = sorted({name for line in lines for name in line} - {"step"})
        raise ValueError(f"{path} has no figures named {key!r}" + (f"; it has {', '.join(known)}" if known else ""))
    steps, values = zip(*points)
    return list(steps), list(values)


def smoothed(values: list[float], factor: float) -> list[float]:
    """Exponential moving average, corrected for its start."""
    average, weight, found = 0.0, 0.0, []
    for value in values:
        average, weight = factor * average + (1 - factor) * value, factor * weight + 1 - factor
        found.append(average / weight)
    return found


def draw(runs: list[Path], out: Path, key: str, factor: float) -> None:
    """Writes the picture."""
    figure, axes = pyplot.subplots(figsize=(9, 5))
    for run in runs:
        steps, values = curve(run, key)
        (line,) = axes.plot(steps, smoothed(values, factor), label=run.stem if run.is_file() else run.resolve().name)
        axes.plot(steps, values, color=line.get_color(), alpha=0.25, linewidth=0.8)
    axes.set(xlabel="step", ylabel=key)
    axes.grid(alpha=0.3)
    axes.legend()
    with replacing(out) as partial:
        figure.savefig(partial, format="png", dpi=120, bbox_inches="tight")
    pyplot.close(figure)


def main(argv: list[str]) -> int:
    """Exit code: 0, or 2 for a mistake that one line describes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders")
    parser.add_argument("out", type=Path, help="picture to write, a .png")
    parser.add_argument("--key", default="loss", help="which figure (default: %(default)s)")
    parser.add_argument("--smooth", type=float, default=0.95, help="0 for none, towards 1 for more (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        if args.out.suffix != ".png":
            raise ValueError(f"the last word must be a .png to write, got {args.out}")
        if not 0 <= args.smooth < 1:
            raise ValueError(f"--smooth must be at least 0 and below 1, got {args.smooth:g}")
        draw(args.runs, args.out, args.key, args.smooth)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
