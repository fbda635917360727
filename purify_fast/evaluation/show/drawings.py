"""The page's drawings as SVG, in the page's own colors, so that they are readable on paper and on a dark screen."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from html import escape

import numpy as np

from ..rows import Row

#: Width of every drawing, in SVG units; the page scales it.
WIDTH = 720
_LINE, _BAR, _LEFT, _RIGHT = 34, 16, 300, 60


def bars(rows: Sequence[Row]) -> str:
    """Accuracies with standard errors, one bar a row; unreliable ones are hatched.

    Args:
        rows: of one model.
    """
    height = _LINE * len(rows) + 26
    span = WIDTH - _LEFT - _RIGHT
    parts = [_head(height, "Accuracy under each attack")]
    for percent in range(0, 101, 25):
        x = _LEFT + span * percent / 100
        parts.append(f'<line class="grid" x1="{x:.1f}" y1="0" x2="{x:.1f}" y2="{height - 20}"/>')
        parts.append(f'<text class="axis" x="{x:.1f}" y="{height - 6}" text-anchor="middle">{percent}</text>')
    for i, row in enumerate(rows):
        y = _LINE * i + 8
        wide = span * row.accuracy
        kind = "clean" if row.kind == "clean" else "attacked" if row.reliable else "masked"
        end = _LEFT + span * min(1.0, row.accuracy + row.standard_error)
        begin = _LEFT + span * max(0.0, row.accuracy - row.standard_error)
        middle = y + _BAR / 2
        parts += [
            _label(row.attack, _LEFT - 10, middle + 4),
            f'<rect class="{kind}" x="{_LEFT}" y="{y}" width="{max(wide, 1):.1f}" height="{_BAR}" rx="2"/>',
            f'<line class="error" x1="{begin:.1f}" y1="{middle}" x2="{end:.1f}" y2="{middle}"/>',
            f'<text class="value" x="{end + 6:.1f}" y="{middle + 4}">{100 * row.accuracy:.1f}</text>',
        ]
    return "".join([*parts, "</svg>"])


def overlap(rows: Sequence[Row]) -> str:
    """Who fell to what: of the images that one attack fools, the share that another one fools too.

    Args:
        rows: attacks of one model on the same images.
    """
    cell, left, top = 54, 300, 30
    count = len(rows)
    width, height = max(WIDTH, left + cell * count + 10), top + cell * count + 8
    parts = [_head(height, "Overlap of the attacks", width)]
    for j in range(count):
        parts.append(
            f'<text class="axis" x="{left + cell * (j + 0.5)}" y="{top - 8}" text-anchor="middle">{j + 1}</text>'
        )
    for i, row in enumerate(rows):
        y = top + cell * i
        parts.append(_label(f"{i + 1}. {row.attack}", left - 10, y + cell / 2 + 4))
        for j, other in enumerate(rows):
            share = _shared(row, other)
            x = left + cell * j
            number = "-" if share is None else f"{100 * share:.0f}"
            shade = 0.0 if share is None else 0.08 + 0.72 * share
            parts.append(
                f'<rect class="cell" style="fill-opacity:{shade:.2f}" x="{x + 1}" y="{y + 1}" '
                f'width="{cell - 2}" height="{cell - 2}" rx="3"/>'
            )
            parts.append(
                f'<text class="value" x="{x + cell / 2}" y="{y + cell / 2 + 4}" text-anchor="middle">{number}</text>'
            )
    return "".join([*parts, "</svg>"])


def curve(points: Sequence[tuple[float, float, float]], x_label: str) -> str:
    """Accuracy against a setting, with standard errors.

    Args:
        points: (setting, accuracy in [0, 1], its standard error), in the order of the setting.
        x_label: what the setting is.
    """
    height, left, right, top, bottom = 260, 50, 20, 12, 44
    values = [point[0] for point in points]
    low, high = min(values), max(values)
    # settings that grow by factors, such as steps, are drawn at equal distances for equal factors
    wide_range = low > 0 and high / low > 12

    def across(value: float) -> float:
        if high == low:
            share = 0.5
        elif wide_range:
            share = math.log(value / low) / math.log(high / low)
        else:
            share = (value - low) / (high - low)
        return left + (WIDTH - left - right) * share

    def up(accuracy: float) -> float:
        return top + (height - top - bottom) * (1 - accuracy)

    parts = [_head(height, f"Accuracy against {x_label}")]
    for percent in range(0, 101, 25):
        y = up(percent / 100)
        parts.append(f'<line class="grid" x1="{left}" y1="{y:.1f}" x2="{WIDTH - right}" y2="{y:.1f}"/>')
        parts.append(f'<text class="axis" x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{percent}</text>')
    path = " ".join(f"{across(x):.1f},{up(accuracy):.1f}" for x, accuracy, _ in points)
    parts.append(f'<polyline class="curve" points="{path}"/>')
    for x, accuracy, error in points:
        at, low_y, high_y = across(x), up(max(0.0, accuracy - error)), up(min(1.0, accuracy + error))
        parts.append(f'<line class="error" x1="{at:.1f}" y1="{low_y:.1f}" x2="{at:.1f}" y2="{high_y:.1f}"/>')
        parts.append(f'<circle class="point" cx="{at:.1f}" cy="{up(accuracy):.1f}" r="4"/>')
        parts.append(f'<text class="axis" x="{at:.1f}" y="{height - 26}" text-anchor="middle">{x:.3g}</text>')
    middle = (left + WIDTH - right) / 2
    parts.append(f'<text class="axis" x="{middle}" y="{height - 6}" text-anchor="middle">{escape(x_label)}</text>')
    return "".join([*parts, "</svg>"])


def only_found_by(rows: Sequence[Row]) -> list[int]:
    """For each attack, how many images it alone fools.

    Args:
        rows: attacks of one model on the same images.
    """
    if not rows:
        return []
    fell = ~np.stack([row.robust for row in rows])
    alone = fell.sum(0) == 1
    return [int((one & alone).sum()) for one in fell]


def _shared(row: Row, other: Row) -> float | None:
    """Of the images that ``row`` fools, the share that ``other`` fools too; None where it fools none."""
    fell = ~row.robust
    return float((fell & ~other.robust).sum() / fell.sum()) if fell.any() else None


def _label(text: str, x: float, y: float, most: int = 40) -> str:
    """A name that ends at x, in two lines if it is long; of a very long one the middle is left out."""
    if len(text) > 2 * most - 10:
        text = f"{text[: most - 6]} … {text[-(most - 10) :]}"
    # two lines of about the same length
    lines = textwrap.wrap(text, most if len(text) <= most else min(most, len(text) // 2 + 6))
    top = y - 7 * (len(lines) - 1)
    spans = "".join(f'<tspan x="{x}" y="{top + 14 * i}">{escape(line)}</tspan>' for i, line in enumerate(lines))
    return f'<text class="label" text-anchor="end">{spans}</text>'


def _head(height: float, title: str, width: float = WIDTH) -> str:
    return (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{escape(title)}" '
        f'xmlns="http://www.w3.org/2000/svg"><title>{escape(title)}</title>'
    )
