"""The look of every picture of the benchmarks: a white card, for print and dark pages alike; colors with a meaning.

This package's own results are green, rivals blue, everything else gray, and alarms red. Figures do not use pyplot, so
that the user's backend and open figures are left alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from purify_fast._files import atomic

INK = "#1b1f24"
#: This package's own contestants and models.
OURS = "#1f6f4a"
#: The rival ``torch.compile``.
RIVAL = "#2457a6"
#: The plain implementation.
PLAIN = "#9aa4ae"
ALARM = "#c62828"
GRID = "#dde2e7"


def new_figure(**options: Any) -> Any:
    """A figure for a file; None without matplotlib.

    Args:
        options: options of matplotlib's Figure.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    return Figure(facecolor="white", layout="constrained", **options)


def plain_axes(axes: Any) -> None:
    """Axes with a light grid along x and no frame.

    Args:
        axes: matplotlib's.
    """
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(PLAIN)
    axes.tick_params(axis="both", length=0, labelsize=8.5, labelcolor=INK)
    axes.grid(axis="x", color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)


def bars(axes: Any, names: list[str], widths: list[float], colors: list[str], texts: list[str], most: float) -> Any:
    """Horizontal bars from top to bottom, each with a text at its end; returns matplotlib's bars.

    Args:
        axes: matplotlib's.
        names: names at the left.
        widths: widths of the bars.
        colors: colors of the bars.
        texts: texts at their ends.
        most: the largest width of all axes that are compared.
    """
    container = axes.barh(range(len(names)), widths, height=0.72, color=colors)
    card = {"facecolor": "white", "edgecolor": "none", "pad": 1.2}
    axes.bar_label(container, texts, padding=4, fontsize=8.5, color=INK, bbox=card)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(0, 1.25 * most)
    plain_axes(axes)
    return container


def title(axes: Any, text: str) -> None:
    """A title at the left edge.

    Args:
        axes: matplotlib's.
        text: the title.
    """
    axes.set_title(text, fontsize=9.5, loc="left", color=INK, weight="bold")


def save(figure: Any, path: Path) -> None:
    """Write the PNG, whole or not at all, with nothing in it that changes from run to run.

    Args:
        figure: the figure.
        path: the file.
    """
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=120, metadata={"Software": None}, format="png")
