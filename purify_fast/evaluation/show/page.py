"""A report as a single HTML page, with styles, drawings and pictures inside."""

from __future__ import annotations

import base64
import contextlib
import functools
import io
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...attacks import frozen
from ...protocols import Classifier, FixedNoise, Purifies, Reconstructs, SampleLogits, ShowsTransform, supports
from ..alarms import Evidence
from ..alarms.answers import PROBED
from ..rows import CURVE, Examples, Row
from ..subject import device_of
from .text import render

#: At most this many purified images, and this many transformed images, are shown for each image.
SAMPLES = 4

#: An image ``[C, H, W]`` in [0, 1] with C = 1 or 3, its caption, and whether the class in the caption is the true class
#: (None: the caption names no predicted class).
Picture = tuple[Tensor, str, bool | None]


def html_page(report: Any, defence: Classifier | Mapping[str, Classifier] | None = None) -> str:
    """The page of a report.

    Args:
        report: a `purify_fast.evaluation.Report` on one model, or on several.
        defence: for the pictures: gives predictions, and purified images if it has ``purify``. For several models, a
            mapping from their names.

    Returns:
        HTML that loads nothing from anywhere.
    """
    known = dict.fromkeys(report.models, defence) if callable(defence) else dict(defence or {})
    models = [_model(report, name, known.get(name)) for name in report.models]
    return render(
        "page.html.jinja",
        report=report,
        models=models,
        data_uri=data_uri,
        json=functools.partial(json.dumps, ensure_ascii=False, default=str),
        widest=max((len(line) for model in models for line in model["pictures"]), default=3),
    )


def _model(report: Any, name: str, defence: Classifier | None) -> dict[str, Any]:
    """The part of the page on a model."""
    rows = [row for row in report.rows if row.model == name]
    own = [row for row in rows if row.threat is None]
    evidence = Evidence([row for row in own if row.kind == "clean" or row.is_attack])
    attacks = [row for row in own if row.is_attack]
    # Compare only attacks on the same images. Attacks on survivors were given fewer images, so they are left out.
    most = [row for row in attacks if row.n == max(each.n for each in attacks)]
    whole = [row for row in most if not row.of_survivors]
    fell = [~row.robust for row in whole] if len(whole) > 1 else []
    alone = np.sum(fell, 0) == 1
    shown, count = pictured_row(evidence)
    examples = None if shown is None else shown.examples
    return {
        "name": name,
        "rows": rows,
        "own": own,
        "lowest": report.headlines.get(name),
        "counted": evidence.with_counted_gradients(),
        "findings": [finding for finding in report.findings if finding.model == name],
        "outlook": next((outlook for outlook in report.outlooks if outlook.model == name), None),
        # For each attack: how many images fell to it, how many fell to it and to each other attack, and how many fell
        # to no other attack.
        "overlap": [
            (row.attack, one.sum(), [(one & other).sum() for other in fell], (one & alone).sum())
            for row, one in zip(whole, fell, strict=False)
        ],
        "first": [(row.attack, int(mask.sum())) for row, mask in evidence.fallen() if row.of_survivors],
        "curves": [
            (what, _curve(points, PROBED))
            for what, points in report.curves.get(name, {}).items()
            if len(points) > 1 and what != CURVE
        ],
        "over_eps": _curve(report.curves.get(name, {}).get(CURVE, []), rows[0].n),
        "pictures": [] if examples is None else picture_lines(examples, defence),
        "pictured": shown,
        "fell": count,
    }


def _curve(points: Sequence[Sequence[float]], images: int) -> list[dict[str, Any]]:
    """The points of a curve by rising setting, with places from left (0) to right (1) and standard errors."""
    if not points:
        return []
    settings, accuracies = np.array(points).T
    # Use a logarithmic axis for settings that grow by factors, such as steps.
    scale = np.log(settings) if settings[0] > 0 and settings[-1] > 12 * settings[0] else settings
    across = (scale - scale[0]) / (scale[-1] - scale[0])
    errors = np.sqrt(accuracies * (1 - accuracies) / images)
    return [
        {"across": x, "setting": f"{setting:.3g}", "accuracy": accuracy, "error": error}
        for x, setting, accuracy, error in zip(across, settings, accuracies, errors, strict=True)
    ]


# -- attacked images --------------------------------------------------------------------------------------------------


def pictured_row(evidence: Evidence) -> tuple[Row | None, int]:
    """The row whose images are shown, the attack on the deployed model that felled most images, and their number.

    Images of a weaker attack, or of an attack on survivors, would flatter the model.
    """
    fallen = [(row, int(fell.sum())) for row, fell in evidence.fallen()]
    drawable = [pair for pair in fallen if pair[0].examples is not None and pair[0].examples.clean.shape[1] in (1, 3)]
    return max(drawable, key=lambda pair: pair[1], default=(None, 0))


def picture_lines(examples: Examples, defence: Classifier | None) -> list[list[Picture]]:
    """A line for each image: clean, attacked, the amplified difference, and the defence's images of it.

    Args:
        examples: attacked images with C = 1 or 3. Their stored classes after the attack are shown: a random defence
            may answer differently when asked again.
        defence: gives the predicted classes, and the purified images if it has ``purify``.
    """
    clean, attacked = torch.from_numpy(examples.clean).float(), torch.from_numpy(examples.adversarial).float()
    before, columns = _asked(defence, clean, attacked)
    after, difference = torch.from_numpy(examples.predicted), attacked - clean
    amplified = 0.5 + difference / (2 * (float(difference.abs().max()) or 1.0))
    lines = []
    for i, label in enumerate(examples.labels.tolist()):
        shown = [(f"true class {label}", clean, before), ("attacked", attacked, after), ("difference", amplified, None)]
        line: list[Picture] = []
        for caption, images, classes in (*shown, *columns):
            guess = None if classes is None else int(classes[i])
            if guess is not None:
                caption += f", predicted {guess}" if guess >= 0 else ", no class predicted"
            line.append((images[i].clamp(0, 1), caption, None if guess is None else guess == label))
        lines.append(line)
    return lines


@torch.no_grad()
def _asked(defence: Any, x: Tensor, attacked: Tensor) -> tuple[Tensor | None, list[tuple[str, Tensor, Tensor | None]]]:
    """The classes of images before an attack, and the columns with the defence's images after it.

    A column is a name, images ``[M, C, H, W]`` and their classes ``[M]``. ``transformed(x)`` gives the images that the
    defence repairs. ``purify(x)`` or ``reconstruct(x)``, ``[B, K, C, H, W]`` or for one draw ``[B, C, H, W]``, gives
    purified images, and ``sample_logits(x) -> [B, K, classes]`` the class of each. With ``fixed_noise`` all share the
    same noise.
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


def data_uri(image: Tensor) -> str:
    """An image ``[C, H, W]`` in [0, 1], C = 1 or 3, as a PNG inside a URI."""
    # Import Pillow only here, so that a report without pictures does not need it.
    from PIL import Image

    array = (image * 255).round().to(torch.uint8).permute(1, 2, 0).squeeze(-1).numpy()
    file = io.BytesIO()
    Image.fromarray(array).save(file, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")
