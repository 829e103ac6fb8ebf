"""One style for all pictures, and reproducible SVG text: equal numbers give equal files."""

import io
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

STYLE = {
    "font.size": 9,
    "svg.fonttype": "none",  # keep text as text: files are small and diffs are readable
    "svg.hashsalt": "lesa",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "0.9",
    "axes.axisbelow": True,
    "legend.frameon": False,
}
COLOURS = ["#2b6cb0", "#dd6b20", "#38a169", "#805ad5", "#718096", "#d53f8c", "#b7791f"]


def figure(columns: int = 1, width: float = 7.0, height: float = 3.2, **options: Any) -> tuple[Figure, list[Axes]]:
    """A figure with its axes in one row."""
    with matplotlib.rc_context(STYLE):
        made = Figure(figsize=(width, height), layout="constrained")
        return made, list(made.subplots(1, columns, squeeze=False, **options)[0])


def svg(drawn: Figure) -> str:
    """The SVG text, without a date or random names."""
    text = io.StringIO()
    with matplotlib.rc_context(STYLE):
        drawn.savefig(text, format="svg", metadata={"Date": None})
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"
