"""Attacked images for the page, each as a small PNG inside it."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...protocols import Classifier
from .. import plots
from ..rows import Examples

#: Images of a row that are shown, and what the defence made of each.
MOST, SAMPLES = 8, 3
#: How the columns of `purify_fast.evaluation.plots.look` are called; one without a name goes on with the last.
_NAMES = {"transformed": "transformed", "reconstructions": "purified", "": "purified"}


@dataclass(frozen=True)
class Picture:
    """One picture of the grid.

    Args:
        source: the PNG as a data URI.
        caption: what is written below it.
        right: whether the class in the caption is the true one; None where there is none.
    """

    source: str
    caption: str
    right: bool | None = None


def data_uri(image: Tensor | np.ndarray) -> str:
    """An image as a PNG inside a URI.

    Args:
        image: ``[C, H, W]`` in [0, 1], C = 1 or 3.
    """
    array = (torch.as_tensor(image).clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    file = io.BytesIO()
    Image.fromarray(array.squeeze(-1) if array.shape[2] == 1 else array).save(file, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def grid(examples: Examples, defence: Classifier | None) -> list[list[Picture]]:
    """One line per image: clean, adversarial, the difference, and what the defence makes of it.

    Args:
        examples: attacked images with C = 1 or 3. Where they have the classes predicted after the attack, these are
            shown: a random defence that is asked again may say something else.
        defence: gives the predicted classes, and the purified images if it has ``purify``.
    """
    clean, attacked = (torch.from_numpy(part[:MOST]).float() for part in (examples.clean, examples.adversarial))
    labels = torch.from_numpy(examples.labels[:MOST])
    (before, after), columns = plots.look(defence, clean, attacked, SAMPLES, 0)
    if examples.predicted is not None:
        after = torch.from_numpy(examples.predicted[:MOST])
    difference = attacked - clean
    largest = float(difference.abs().max()) or 1.0
    lines = []
    for i, label in enumerate(labels):
        line = [
            _classified(f"true class {int(label)}", clean[i], before, i, label),
            _classified("attacked", attacked[i], after, i, label),
            Picture(data_uri(0.5 + difference[i] / (2 * largest)), "difference"),
        ]
        line += [_classified(_NAMES[name], made[i], classes, i, label) for made, classes, name in columns]
        lines.append(line)
    return lines


def _classified(what: str, image: Tensor, classes: Tensor | None, i: int, label: Tensor) -> Picture:
    if classes is None:
        return Picture(data_uri(image), what)
    named = f"predicted {int(classes[i])}" if classes[i] >= 0 else "no class predicted"
    return Picture(data_uri(image), f"{what}, {named}", bool(classes[i] == label))


def chosen(examples: Examples, fell: int) -> str:
    """Which images are shown, in a sentence; empty where that is not known, of rows that an earlier version kept.

    Args:
        examples: the images.
        fell: how many fell to the attack.
    """
    if examples.fell is None:
        return ""
    shown = min(MOST, len(examples.labels))
    if not examples.fell.any():
        return f"No image fell to this attack. The {shown} shown withstood it."
    if fell > shown:
        return f"{shown} of the {fell} images that fell to this attack."
    return "The only image that fell to this attack." if shown == 1 else f"All {shown} images that fell to this attack."
