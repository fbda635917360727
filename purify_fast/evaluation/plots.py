"""Pictures of an evaluation: attacked images with what the defence made of them, and bars of accuracies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from .._files import atomic
from ..attacks import frozen
from .report import Report

_COLORS = ["#1f4e79", "#2e86ab", "#f2a541", "#6a994e", "#8d6a9f", "#7f7f7f"]
_RED = "#c62828"
_GREEN = "#2e7d32"


def pyplot() -> Any:
    """matplotlib's Figure class, for files only; ModuleNotFoundError names the extra to install."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ModuleNotFoundError(
            "pictures need matplotlib, which is not installed: pip install 'purify-fast[demo]'"
        ) from error

    def figure(**options: Any) -> Any:
        # a figure of its own, not pyplot's: the user's backend and open figures are left alone
        made = Figure(**options)
        FigureCanvasAgg(made)
        return made

    return figure


def bars(report: Report, path: str | Path, attacks: Sequence[str] | None = None) -> None:
    """Accuracies with standard errors, one group per attack, one bar per model; unreliable ones hatched in red.

    Args:
        report: of one model or several. path: the PNG. attacks: labels to show, in order; default all.

    Raises:
        ModuleNotFoundError: matplotlib is missing. ValueError: nothing to show.
    """
    labels = [label for label in (report.attacks if attacks is None else attacks) if label in report.attacks]
    if not labels:
        raise ValueError(f"no rows to show: the report has {report.attacks}, asked for {attacks}")
    models = report.models
    found = {(row.attack, row.model): row for row in report.rows}
    lines = [(label, [m for m in models if (label, m) in found]) for label in labels]
    count = sum(len(present) for _, present in lines)
    figure = pyplot()(figsize=(8.5, 1.2 + 0.24 * count + 0.16 * len(lines)), layout="constrained")
    axes = figure.add_subplot()
    at, ticks = 0.0, []
    for label, present in lines:
        ticks.append(at + (len(present) - 1) / 2)
        for model in present:
            row, color = found[label, model], _COLORS[models.index(model) % len(_COLORS)]
            if row.reliable:
                axes.barh(at, 100 * row.accuracy, 0.86, color=color)
            else:
                axes.barh(at, 100 * row.accuracy, 0.86, facecolor=(color, 0.25), edgecolor=_RED, hatch="////")
            axes.errorbar(100 * row.accuracy, at, xerr=100 * row.standard_error, color="#222222", capsize=2, lw=1)
            text = f"{100 * row.accuracy:.1f}" + ("" if row.reliable else "  unreliable")
            place = 100 * (row.accuracy + row.standard_error) + 1
            axes.text(place, at, text, va="center", fontsize=8, color="#222222" if row.reliable else _RED)
            at += 1
        at += 0.7
    axes.set_yticks(ticks, [_wrap(label) for label, _ in lines], fontsize=8)
    axes.set_ylim(at - 1, -0.8)
    axes.set_xlim(0, 118)
    axes.set_xticks(range(0, 101, 20))
    axes.set_xlabel("accuracy, % (± standard error)")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#dddddd", lw=0.6)
    axes.set_axisbelow(True)
    from matplotlib.patches import Patch

    handles = [Patch(color=_COLORS[m % len(_COLORS)], label=model) for m, model in enumerate(models)]
    if any(not row.reliable for row in report.rows):
        handles.append(Patch(facecolor="white", edgecolor=_RED, hatch="////", label="unreliable: no usable gradients"))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)), frameon=False, fontsize=8)
    _save(figure, path)


def grid(
    clean: np.ndarray,
    adversarial: np.ndarray,
    labels: np.ndarray,
    path: str | Path,
    defence: Callable | None = None,
    *,
    samples: int = 4,
    seed: int = 0,
    names: Sequence[str] | None = None,
    title: str = "",
) -> None:
    """One line per image: clean, adversarial, the difference, and reconstructions, with the predicted class above.

    Args:
        clean, adversarial: ``[M, C, H, W]`` in [0, 1], C = 1 or 3; arrays or tensors. labels: true classes ``[M]``.
        path: the PNG.
        defence: gives the predictions; with ``purify(x)`` or ``reconstruct(x)``, ``[B, K, C, H, W]`` or of one draw
            ``[B, C, H, W]``, also the reconstructions, with ``sample_logits(x) -> [B, K, classes]`` the class of each,
            and with ``transformed(x)``, alike, what it repairs. With ``fixed_noise`` they share their noise.
        samples: reconstructions shown at most, and transformed images. seed: of the noise. names: of the classes.
        title: above everything.

    Raises:
        ModuleNotFoundError: matplotlib is missing. ValueError: shapes disagree.
    """
    x, adv = (torch.as_tensor(a).detach().cpu().float() for a in (clean, adversarial))
    y = torch.as_tensor(labels).cpu()
    if x.shape != adv.shape or x.dim() != 4 or len(y) != len(x) or x.shape[1] not in (1, 3):
        raise ValueError(
            f"clean and adversarial must be [M, C, H, W] with C = 1 or 3 and labels [M], "
            f"got {list(x.shape)}, {list(adv.shape)} and {list(y.shape)}"
        )
    predicted, more = _look(defence, x, adv, samples, seed)
    columns = 3 + len(more)
    figure = pyplot()(figsize=(1.25 * columns, 1.45 * len(x) + 0.5), layout="constrained")
    figure.suptitle(title or "Attacked images", fontsize=10)
    axes = figure.subplots(len(x), columns, squeeze=False)
    largest = float((adv - x).abs().max()) or 1.0
    amplified = 0.5 + (adv - x) / (2 * largest)
    for i in range(len(x)):
        shown = [(x[i], predicted[0], "clean"), (adv[i], predicted[1], "adversarial"), (amplified[i], None, "")]
        shown += [(images[i], classes, "") for images, classes, _ in more]
        for axis, (image, guess, what) in zip(axes[i], shown, strict=True):
            axis.imshow(image.permute(1, 2, 0).squeeze(-1).clamp(0, 1), cmap="gray", vmin=0, vmax=1)
            axis.set_xticks([])
            axis.set_yticks([])
            axis.spines[:].set_color("#bbbbbb")
            if guess is not None:
                right = int(guess[i]) == int(y[i])
                text = _name(guess[i], names)
                axis.set_title(f"{what} {text}".strip(), fontsize=8, color=_GREEN if right else _RED, pad=2)
        axes[i][2].set_title(f"difference x{0.5 / largest:.1f}", fontsize=8, color="#555555", pad=2)
        axes[i][0].set_ylabel(f"true {_name(y[i], names)}", fontsize=8)
    for axis, (_, _, what) in zip(axes[-1][3:], more, strict=True):
        axis.set_xlabel(what, fontsize=8)
    _save(figure, path)


@torch.no_grad()
def _look(defence, x, adv, samples, seed):
    """Predictions of both, and columns of what becomes of the adversarial images: [M, C, H, W], classes [M], a name."""
    if defence is None:
        return (None, None), []
    device = x.device
    if isinstance(defence, nn.Module):
        device = next((p.device for p in (*defence.parameters(), *defence.buffers())), device)

    def fixed(call, images):
        torch.manual_seed(seed)
        if hasattr(defence, "fixed_noise"):
            with defence.fixed_noise(seed):
                return call(images.to(device)).cpu()
        return call(images.to(device)).cpu()

    devices = [device.index or 0] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), frozen(defence):
        predicted = [fixed(defence, images).argmax(1) for images in (x, adv)]
        purify = getattr(defence, "purify", None) or getattr(defence, "reconstruct", None)
        each = hasattr(defence, "sample_logits") and purify is not None
        classes = fixed(defence.sample_logits, adv)[:, :samples].argmax(2) if each else None
        columns: list[tuple] = []
        for make, what in ((getattr(defence, "transformed", None), "transformed"), (purify, "reconstructions")):
            if make is not None:
                pictures = fixed(make, adv).float()
                pictures = pictures[:, None] if pictures.dim() == 4 else pictures[:, :samples]
                known = classes.unbind(1) if classes is not None and make is purify else [None] * pictures.shape[1]
                named = [what] + [""] * (pictures.shape[1] - 1)
                columns += zip(pictures.unbind(1), known, named, strict=True)
    return predicted, columns


def _name(label, names: Sequence[str] | None) -> str:
    return str(int(label)) if names is None else names[int(label)]


def _wrap(label: str, width: int = 34) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(label, width))


def _save(figure: Any, path: str | Path) -> None:
    with atomic(Path(path)) as temporary:
        figure.savefig(temporary, dpi=150)
