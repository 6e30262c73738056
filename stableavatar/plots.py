"""Drawing with matplotlib, without a screen, the same bytes each time."""

import io
from typing import Any


def plotting() -> Any:
    """matplotlib's pyplot, drawing without a screen. Raises ValueError if it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("the picture needs matplotlib: pip install -r requirements-evaluation.txt") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def svg_settings(name: str) -> dict[str, object]:
    """What to draw an SVG under, as in `pyplot.rc_context(svg_settings(name))`: text stays text, and the same figure is the same file."""
    return {"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 9}


def svg(pyplot: Any, figure: Any) -> bytes:
    """A finished figure as an SVG file; the figure is closed."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    pyplot.close(figure)
    return buffer.getvalue()
