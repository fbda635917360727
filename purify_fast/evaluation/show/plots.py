"""Pictures of an evaluation: attacked images with what the defence made of them, bars of accuracies, trade-offs.

matplotlib and adjustText come with the extra ``demo``; both are imported where a picture is drawn.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..._files import atomic
from ...attacks import frozen
from ...protocols import Classifier, FixedNoise, Purifies, Reconstructs, SampleLogits, ShowsTransform, supports
from ..alarms import Evidence
from ..metrics import check_curve, check_pair, interpolate
from ..rows import Examples, Row, attack_names, model_names
from ..subject import device_of

#: Purified images, and transformed images, that are shown of each image at most.
SAMPLES = 4
_COLORS = ["#1f4e79", "#2e86ab", "#f2a541", "#6a994e", "#8d6a9f", "#7f7f7f"]
_RED = "#c62828"
_GREEN = "#2e7d32"
_GRAY = "#8a8a8a"
_BLACK = "#222222"


def _new_figure(**options: Any) -> Any:
    """A figure for a file. It is not pyplot's, so that the user's backend and open figures are left alone."""
    try:
        import adjustText  # noqa: F401
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ModuleNotFoundError(
            f"pictures need {(error.name or 'matplotlib').partition('.')[0]}, which is not installed: "
            "pip install 'purify-fast[demo]'"
        ) from error
    figure = Figure(**options, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


# -- bars -------------------------------------------------------------------------------------------------------------


def bars(rows: Sequence[Row], path: str | Path) -> None:
    """Accuracies with standard errors, one group per attack, one bar per model; unreliable ones hatched in red.

    Args:
        rows: of one model or several, as in a `Report`.
        path: the PNG.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
    """
    models = model_names(rows)
    by_name = {(row.attack, row.model): row for row in rows}
    groups = [(label, [by_name[label, m] for m in models if (label, m) in by_name]) for label in attack_names(rows)]
    count = sum(len(group) for _, group in groups)
    figure = _new_figure(figsize=(8.5, 1.2 + 0.24 * count + 0.16 * len(groups)))
    from matplotlib.patches import Patch

    axes = figure.add_subplot()
    at, ticks = 0.0, []
    for _, group in groups:
        ticks.append(at + (len(group) - 1) / 2)
        for row in group:
            number, error, color = 100 * row.accuracy, 100 * row.standard_error, _color(models.index(row.model))
            style = {"color": color} if row.reliable else {"fc": (color, 0.25), "ec": _RED, "hatch": "////"}
            axes.barh(at, number, 0.86, **style)
            axes.errorbar(number, at, xerr=error, color=_BLACK, capsize=2, lw=1)
            told, color = (f"{number:.1f}", _BLACK) if row.reliable else (f"{number:.1f}  unreliable", _RED)
            axes.text(number + error + 1, at, told, va="center", fontsize=8, color=color)
            at += 1
        at += 0.7
    axes.set_yticks(ticks, [textwrap.fill(label, 34) for label, _ in groups], fontsize=8)
    axes.set(xlim=(0, 118), ylim=(at - 1, -0.8), xticks=range(0, 101, 20), xlabel="accuracy, % (± standard error)")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#dddddd", lw=0.6)
    axes.set_axisbelow(True)
    handles = [Patch(color=_color(m), label=model) for m, model in enumerate(models)]
    if not all(row.reliable for row in rows):
        handles.append(Patch(facecolor="white", edgecolor=_RED, hatch="////", label="unreliable"))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)), frameon=False, fontsize=8)
    _save(figure, path)


# -- attacked images --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Picture:
    """One picture of a grid.

    Args:
        image: ``[C, H, W]`` in [0, 1], C = 1 or 3.
        caption: what is written beside it.
        right: whether the class in the caption is the true one; None where there is none.
    """

    image: Tensor
    caption: str
    right: bool | None = None


def pictured_row(rows: Sequence[Row]) -> tuple[Row | None, int]:
    """The row whose images are shown, of the attack on the deployed model to which most images fell, and their number.

    The images of a weaker attack, or of what was left to it, would flatter the model.

    Args:
        rows: of one model.
    """
    evidence = Evidence([row for row in rows if row.threat is None and (row.kind == "clean" or row.is_attack)])
    fallen = [(row, int(fell.sum())) for row, fell in evidence.fallen()]
    drawable = [pair for pair in fallen if pair[0].examples is not None and pair[0].examples.clean.shape[1] in (1, 3)]
    return max(drawable, key=lambda pair: pair[1], default=(None, 0))


def picture_lines(examples: Examples, defence: Classifier | None) -> list[list[Picture]]:
    """One line per image: clean, attacked, the amplified difference, and what the defence makes of it.

    Args:
        examples: attacked images with C = 1 or 3. The classes predicted after the attack are theirs: a random defence
            that is asked again may say something else.
        defence: gives the predicted classes, and the purified images if it has ``purify``.
    """
    clean, attacked = torch.from_numpy(examples.clean).float(), torch.from_numpy(examples.adversarial).float()
    before, columns = _asked(defence, clean, attacked)
    after, difference = torch.from_numpy(examples.predicted), attacked - clean
    amplified = 0.5 + difference / (2 * (float(difference.abs().max()) or 1.0))
    lines = []
    for i, label in enumerate(examples.labels.tolist()):
        shown = [(f"true class {label}", clean, before), ("attacked", attacked, after), ("difference", amplified, None)]
        line = []
        for caption, images, classes in (*shown, *columns):
            guess = None if classes is None else int(classes[i])
            if guess is not None:
                caption += f", predicted {guess}" if guess >= 0 else ", no class predicted"
            line.append(Picture(images[i].clamp(0, 1), caption, None if guess is None else guess == label))
        lines.append(line)
    return lines


def grid(examples: Examples, path: str | Path, defence: Classifier | None, title: str) -> None:
    """Draw `picture_lines` into a PNG.

    Args:
        examples: attacked images with C = 1 or 3.
        path: the PNG.
        defence: as of `picture_lines`.
        title: above everything.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
    """
    lines = picture_lines(examples, defence)
    figure = _new_figure(figsize=(1.25 * len(lines[0]), 1.65 * len(lines) + 0.5))
    figure.suptitle(title, fontsize=10)
    colors = {True: _GREEN, False: _RED, None: "#555555"}
    all_axes = figure.subplots(len(lines), len(lines[0]), squeeze=False).flat
    for axes, picture in zip(all_axes, itertools.chain.from_iterable(lines), strict=True):
        axes.imshow(picture.image.permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_color("#bbbbbb")
        axes.set_title(picture.caption.replace(", ", "\n"), fontsize=7, color=colors[picture.right], pad=2)
    _save(figure, path)


@torch.no_grad()
def _asked(defence: Any, x: Tensor, attacked: Tensor) -> tuple[Tensor | None, list[tuple[str, Tensor, Tensor | None]]]:
    """The classes of images before an attack, and the columns of what a defence makes of them after it.

    A column is a name, images ``[M, C, H, W]`` and their classes ``[M]``. A defence with ``transformed(x)`` shows what
    it repairs, one with ``purify(x)`` or ``reconstruct(x)``, ``[B, K, C, H, W]`` or of one draw ``[B, C, H, W]``, the
    purified images, and with ``sample_logits(x) -> [B, K, classes]`` the class of each. With ``fixed_noise`` they share
    their noise.
    """
    if defence is None:
        return None, []
    device = device_of(defence, x)

    def fixed(call: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        torch.manual_seed(0)
        with defence.fixed_noise(0) if supports(defence, FixedNoise) else contextlib.nullcontext():
            return call(images.to(device)).cpu()

    columns: list[tuple[str, Tensor, Tensor | None]] = []

    def add(name: str, images: Tensor, classes: Tensor | None) -> None:
        images = (images if images.dim() == 5 else images[:, None])[:, :SAMPLES].float()
        for k in range(images.shape[1]):
            columns.append((name, images[:, k], None if classes is None else classes[:, k]))

    devices = [device.index or 0] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), frozen(defence):
        before = fixed(defence, x).argmax(1)
        if supports(defence, ShowsTransform):
            add("transformed", fixed(defence.transformed, attacked), None)
        if supports(defence, Purifies) or supports(defence, Reconstructs):
            samples = supports(defence, SampleLogits)
            classes = fixed(defence.sample_logits, attacked).argmax(2) if samples else None
            purify = defence.purify if supports(defence, Purifies) else defence.reconstruct
            add("purified", fixed(purify, attacked), classes)
    return before, columns


# -- trade-offs -------------------------------------------------------------------------------------------------------


def plot_tradeoff(
    path: str | Path,
    points: Mapping[str, Iterable[float]],
    reference: Iterable[Iterable[float]] | None = None,
    *,
    reference_name: str = "reference",
    title: str = "",
) -> bool:
    """A picture of robust over standard accuracy: named models, lines of equal SUM, and the reference curve.

    Args:
        path: the PNG, which appears whole or not at all.
        points: from names to (standard %, robust %) or to (standard %, robust %, their two standard errors in points),
            which become error bars.
        reference: pairs (standard %, robust %) as of `ar_bd`, drawn with the curve of `ar_point_dist`.
        reference_name: the curve's name in the legend.
        title: above everything.

    Returns:
        False, without a file, if matplotlib or adjustText is missing.

    Raises:
        ValueError: nothing to show, accuracies not within 0 to 100, negative or infinite standard errors, or a
            reference that `ar_bd` refuses.
        ModuleNotFoundError: there is a reference, and scipy is missing.
    """
    shown = {name: _with_errors(name, values) for name, values in points.items()}
    x, y = (np.empty(0), np.empty(0)) if reference is None else check_curve("reference", reference)
    if not shown and not len(x):
        raise ValueError(f"points must name at least one model where there is no reference, got {points!r}")
    try:
        # more names need more room
        side = max(1.0, len(shown) / 8) ** 0.5
        figure = _new_figure(figsize=(7.2 * side, 5.0 * side))
    except ModuleNotFoundError:
        return False
    axes = figure.add_subplot()
    at = np.array([values[:2] for values in shown.values()]).reshape(-1, 2)
    errors = np.array([values[2:] for values in shown.values()]).reshape(-1, 2)
    everything = np.concatenate([at - errors, at + errors, np.stack([x, y], 1)])
    low, high = everything.min(0), everything.max(0)
    room = np.maximum(0.14 * (high - low), 2.0)
    # beyond 0 and 100 only what the marks need
    low, high = np.maximum(low - room, -0.4 * room), np.minimum(high + room, 100 + 0.4 * room)
    axes.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]))
    _lines_of_equal_sum(axes, low, high)
    traced = _draw_reference(axes, x, y, reference_name) if len(x) else np.empty((0, 2))
    for i, (center, error) in enumerate(zip(at, errors, strict=True)):
        if error.any():
            # a bar of length 0 would still have caps
            xerr, yerr = (value or None for value in error)
            axes.errorbar(*center, xerr=xerr, yerr=yerr, color=_color(i), capsize=2.5, lw=1.1, zorder=3)
        axes.plot(*center, "o", ms=7.5, color=_color(i), mec="white", mew=0.9, zorder=4)
    axes.set_xlabel("standard accuracy, %")
    axes.set_ylabel("robust accuracy, %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#888888")
    axes.tick_params(color="#888888", labelsize=9)
    if title:
        axes.set_title(title, fontsize=11, pad=18)
    _name_points(axes, list(shown), at, errors, traced)
    _save(figure, path)
    return True


def _with_errors(name: str, values: Iterable[float]) -> tuple[float, ...]:
    """(standard, robust, standard error, standard error), the errors 0 where none are given."""
    what, given = f"points[{name!r}]", tuple(values)
    if len(given) not in (2, 4):
        raise ValueError(f"{what} must be (standard %, robust %) or these and two standard errors, got {given!r}")
    errors = given[2:] or (0.0, 0.0)
    if not all(0 <= error < math.inf for error in errors):
        raise ValueError(f"{what}: standard errors must be finite and not negative, got {errors!r}")
    return *check_pair(what, given[:2]), *(float(error) for error in errors)


def _draw_reference(axes: Any, x: np.ndarray, y: np.ndarray, name: str) -> np.ndarray:
    """The reference curve with its points; returns where it runs, ``[points, 2]``."""
    along = np.linspace(x[0], x[-1], 400)
    traced = np.stack([along, interpolate(x, y)(along)], 1)
    axes.plot(*traced.T, color=_GRAY, lw=1.6, zorder=2)
    axes.plot(x, y, "o", ms=4.5, color="white", mec=_GRAY, mew=1.4, zorder=2.5)
    axes.plot([], [], "o-", color=_GRAY, lw=1.6, ms=4.5, mfc="white", mew=1.4, label=name)
    axes.legend(loc="lower left", frameon=False, fontsize=8)
    return traced


def _lines_of_equal_sum(axes: Any, low: np.ndarray, high: np.ndarray) -> None:
    """Lines of equal SUM, with the value where they leave through the right or the upper edge."""
    from matplotlib.ticker import MaxNLocator

    for total in MaxNLocator(10, steps=[1, 2, 5, 10]).tick_values(low.sum(), high.sum()):
        axes.plot([low[0], high[0]], [total - low[0], total - high[0]], color="#e4e4e4", lw=0.8, zorder=1)
        right, top = total - high[0], total - high[1]
        style = {"fontsize": 7, "color": "#9a9a9a", "annotation_clip": False, "textcoords": "offset points"}
        if low[1] <= right < high[1]:
            axes.annotate(f"SUM {total:g}", (high[0], right), (3, 0), va="center", **style)
        elif low[0] <= top < high[0]:
            axes.annotate(f"SUM {total:g}", (top, high[1]), (0, 3), ha="center", **style)


def _name_points(axes: Any, names: Sequence[str], at: np.ndarray, errors: np.ndarray, traced: np.ndarray) -> None:
    """Write each name beside its point, away from all points, their error bars, the curve and the other names."""
    from adjustText import adjust_text

    if not names:
        return
    # the layout, and with it the place of every point in pixels, is known from here on
    axes.figure.canvas.draw()
    texts = [
        axes.text(*point, name, fontsize=8.5, color=_color(i), zorder=5)
        for i, (name, point) in enumerate(zip(names, at, strict=True))
    ]
    for text in texts:
        text.set_in_layout(False)
    # nine points of an error bar and a twentieth of the curve's points stand for them; a number of rounds in place of a
    # time keeps the picture the same. The forces are the first that keep the names of a study of twenty models free.
    along = np.linspace(-1, 1, 9)[:, None, None] * errors
    bars = [(at + along * axis).reshape(-1, 2) for axis in (np.array([1, 0]), np.array([0, 1]))]
    x, y = np.concatenate([*bars, traced[::20]]).T
    legend = axes.get_legend()
    adjust_text(
        texts, x=x, y=y, ax=axes, objects=None if legend is None else [legend], iter_lim=2000,
        expand=(1.15, 1.35), force_text=(0.8, 1.0), force_explode=(0.2, 0.8),
        arrowprops={"arrowstyle": "-", "color": _GRAY, "lw": 0.6, "zorder": 2.8},
    )  # fmt: skip


def _color(i: int) -> str:
    return _COLORS[i % len(_COLORS)]


def _save(figure: Any, path: str | Path) -> None:
    with atomic(Path(path)) as temporary:
        figure.savefig(temporary, dpi=150)
