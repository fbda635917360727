"""The common style of all pictures of the benchmarks.

The background is white, which is readable in print and on dark pages. Each color has a meaning: green is this package,
gray is everything else, and red is an alarm. The figures do not use pyplot, because pyplot would change matplotlib's
backend and the figures that the user has opened.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from purify_fast._files import atomic

INK = "#1b1f24"
#: The color of this package's implementations and models.
OURS = "#1f6f4a"
#: The color of everything else.
PLAIN = "#9aa4ae"
ALARM = "#c62828"
GRID = "#dde2e7"


def new_figure(**options: Any) -> Any:
    """Return an empty figure, or None if matplotlib is not installed.

    Args:
        options: options of matplotlib's Figure.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    return Figure(facecolor="white", layout="constrained", **options)


def plain_axes(axes: Any) -> None:
    """Add light vertical grid lines to axes, and remove the frame except its lower edge.

    Args:
        axes: axes of matplotlib.
    """
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(PLAIN)
    axes.tick_params(axis="both", length=0, labelsize=8.5, labelcolor=INK)
    axes.grid(axis="x", color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)


def bars(axes: Any, names: list[str], widths: list[float], colors: list[str], texts: list[str]) -> Any:
    """Draw horizontal bars from top to bottom, with a text at the end of each bar. Return matplotlib's bars.

    Args:
        axes: axes of matplotlib.
        names: name at the left of each bar.
        widths: width of each bar in percent.
        colors: color of each bar.
        texts: text at the end of each bar.
    """
    container = axes.barh(range(len(names)), widths, height=0.72, color=colors)
    card = {"facecolor": "white", "edgecolor": "none", "pad": 1.2}
    axes.bar_label(container, texts, padding=4, fontsize=8.5, color=INK, bbox=card)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(0, 125)
    plain_axes(axes)
    return container


def save(figure: Any, path: Path) -> None:
    """Write a figure as PNG, atomically. The same figure always gives the same bytes.

    Args:
        figure: figure of matplotlib.
        path: path of the PNG file.
    """
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=120, metadata={"Software": None}, format="png")
