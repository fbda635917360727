"""Pictures of an evaluation: attacked images with what the defence made of them, bars of accuracies, trade-offs.

matplotlib and adjustText come with the extra ``demo``; both are imported where a picture is drawn.
"""

from __future__ import annotations

import contextlib
import math
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..._files import atomic
from ...attacks import frozen
from ...protocols import Classifier, FixedNoise, Purifies, Reconstructs, SampleLogits, ShowsTransform, supports
from ..metrics import check_curve, check_pair, interpolate
from ..rows import Examples, Row, attack_names, model_names

#: Pictures ``[M, C, H, W]``, their predicted classes ``[M]``, and what is written below them.
_Column = tuple[Tensor, Tensor | None, str]

#: Reconstructions, and transformed images, that are shown of each image at most.
SAMPLES = 4
_COLORS = ["#1f4e79", "#2e86ab", "#f2a541", "#6a994e", "#8d6a9f", "#7f7f7f"]
_RED = "#c62828"
_GREEN = "#2e7d32"
_GRAY = "#8a8a8a"


def require_matplotlib() -> None:
    """ModuleNotFoundError, which names the extra to install, where matplotlib or adjustText is missing."""
    try:
        import adjustText  # noqa: F401
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ModuleNotFoundError(
            f"pictures need {(error.name or 'matplotlib').partition('.')[0]}, which is not installed: "
            "pip install 'purify-fast[demo]'"
        ) from error


def _new_figure(**options: Any) -> Any:
    """A figure for a file. It is not pyplot's, so that the user's backend and open figures are left alone."""
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

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
    axes = figure.add_subplot()
    at, ticks = 0.0, []
    for _, group in groups:
        ticks.append(at + (len(group) - 1) / 2)
        for row in group:
            _bar(axes, at, row, _color(models.index(row.model)))
            at += 1
        at += 0.7
    axes.set_yticks(ticks, [textwrap.fill(label, 34) for label, _ in groups], fontsize=8)
    axes.set_ylim(at - 1, -0.8)
    axes.set_xlim(0, 118)
    axes.set_xticks(range(0, 101, 20))
    axes.set_xlabel("accuracy, % (± standard error)")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#dddddd", lw=0.6)
    axes.set_axisbelow(True)
    _legend_of_models(figure, models, any(not row.reliable for row in rows))
    _save(figure, path)


def _bar(axes: Any, at: float, row: Row, color: str) -> None:
    if row.reliable:
        axes.barh(at, 100 * row.accuracy, 0.86, color=color)
    else:
        axes.barh(at, 100 * row.accuracy, 0.86, facecolor=(color, 0.25), edgecolor=_RED, hatch="////")
    axes.errorbar(100 * row.accuracy, at, xerr=100 * row.standard_error, color="#222222", capsize=2, lw=1)
    text = f"{100 * row.accuracy:.1f}" + ("" if row.reliable else "  unreliable")
    place = 100 * (row.accuracy + row.standard_error) + 1
    axes.text(place, at, text, va="center", fontsize=8, color="#222222" if row.reliable else _RED)


def _legend_of_models(figure: Any, models: Sequence[str], unreliable: bool) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(color=_color(m), label=model) for m, model in enumerate(models)]
    if unreliable:
        handles.append(Patch(facecolor="white", edgecolor=_RED, hatch="////", label="unreliable"))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)), frameon=False, fontsize=8)


# -- attacked images --------------------------------------------------------------------------------------------------


def grid(examples: Examples, path: str | Path, defence: Classifier | None, title: str) -> None:
    """One line per image: clean, adversarial, the difference, and reconstructions, with the predicted class above.

    Args:
        examples: attacked images with C = 1 or 3. The classes predicted after the attack are theirs: a random defence
            that is asked again may answer otherwise.
        path: the PNG.
        defence: gives the other predictions and the reconstructions, as `look` does; None: there are none.
        title: above everything.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
    """
    x, adv = torch.from_numpy(examples.clean).float(), torch.from_numpy(examples.adversarial).float()
    labels, after = torch.from_numpy(examples.labels), torch.from_numpy(examples.predicted)
    (before, _), more = look(defence, x, adv, SAMPLES, 0)
    columns = 3 + len(more)
    figure = _new_figure(figsize=(1.25 * columns, 1.45 * len(x) + 0.5))
    figure.suptitle(title, fontsize=10)
    axes = figure.subplots(len(x), columns, squeeze=False)
    largest = float((adv - x).abs().max()) or 1.0
    amplified = 0.5 + (adv - x) / (2 * largest)
    for i, label in enumerate(labels):
        shown = [(x[i], before, "clean"), (adv[i], after, "adversarial"), (amplified[i], None, "")]
        shown += [(images[i], classes, "") for images, classes, _ in more]
        for axis, (image, guess, what) in zip(axes[i], shown, strict=True):
            _show_image(axis, image)
            if guess is not None:
                text = "no class" if guess[i] < 0 else str(int(guess[i]))
                color = _GREEN if guess[i] == label else _RED
                axis.set_title(f"{what} {text}".strip(), fontsize=8, color=color, pad=2)
        axes[i][2].set_title(f"difference x{0.5 / largest:.1f}", fontsize=8, color="#555555", pad=2)
        axes[i][0].set_ylabel(f"true {int(label)}", fontsize=8)
    for axis, (_, _, what) in zip(axes[-1][3:], more, strict=True):
        axis.set_xlabel(what, fontsize=8)
    _save(figure, path)


def _show_image(axis: Any, image: Tensor) -> None:
    axis.imshow(image.permute(1, 2, 0).squeeze(-1).clamp(0, 1).numpy(), cmap="gray", vmin=0, vmax=1)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set_color("#bbbbbb")


@torch.no_grad()
def look(
    defence: Any, x: Tensor, adv: Tensor, samples: int, seed: int
) -> tuple[tuple[Tensor | None, Tensor | None], list[_Column]]:
    """What a defence says of images before and after an attack, and what it makes of the attacked ones.

    Args:
        defence: gives the predictions; with ``purify(x)`` or ``reconstruct(x)``, ``[B, K, C, H, W]`` or of one draw
            ``[B, C, H, W]``, also the reconstructions, with ``sample_logits(x) -> [B, K, classes]`` the class of each,
            and with ``transformed(x)``, alike, what it repairs. With ``fixed_noise`` they share their noise. None says
            nothing.
        x: clean images ``[M, C, H, W]``.
        adv: the attacked ones, of the same shape.
        samples: how many reconstructions, and how many transformed images, are made at most.
        seed: of the noise.

    Returns:
        The predicted classes of both, and columns of pictures ``[M, C, H, W]`` with their classes ``[M]`` and a name.
    """
    if defence is None:
        return (None, None), []
    device = x.device
    if isinstance(defence, nn.Module):
        device = next((p.device for p in (*defence.parameters(), *defence.buffers())), device)

    def fixed(call: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        torch.manual_seed(seed)
        with defence.fixed_noise(seed) if supports(defence, FixedNoise) else contextlib.nullcontext():
            return call(images.to(device)).cpu()

    def columns_of(images: Tensor, classes: Tensor | None, what: str) -> list[_Column]:
        pictures = images.float()[:, None] if images.dim() == 4 else images.float()[:, :samples]
        count = pictures.shape[1]
        known = [None] * count if classes is None else classes.unbind(1)
        return list(zip(pictures.unbind(1), known, [what] + [""] * (count - 1), strict=True))

    devices = [device.index or 0] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), frozen(defence):
        predicted = [fixed(defence, images).argmax(1) for images in (x, adv)]
        columns: list[_Column] = []
        if supports(defence, ShowsTransform):
            columns += columns_of(fixed(defence.transformed, adv), None, "transformed")
        purifies = supports(defence, Purifies)
        if purifies or supports(defence, Reconstructs):
            classes = None
            if supports(defence, SampleLogits):
                classes = fixed(defence.sample_logits, adv)[:, :samples].argmax(2)
            purified = fixed(defence.purify if purifies else defence.reconstruct, adv)
            columns += columns_of(purified, classes, "reconstructions")
    return (predicted[0], predicted[1]), columns


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
