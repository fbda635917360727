"""Makes the HTML page of a report, which contains all of its styles, drawings and pictures."""

from __future__ import annotations

import base64
import contextlib
import functools
import io
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...attacks import frozen
from ...protocols import Classifier, FixedNoise, Purifies, SampleLogits, supports
from ..alarms.probes import PROBED
from ..alarms.signs import Evidence
from ..request.deadline import device_of
from ..results.rows import Examples, Row
from .text import advised_once, render

#: The largest number of purified images that are shown for each image.
SAMPLES = 4

#: An image ``[C, H, W]`` in [0, 1] with C = 1 or 3, its caption, and whether the class in the caption is the true class
#: (None: the caption names no predicted class).
Picture = tuple[Tensor, str, bool | None]


def html_page(report: Any, defence: Classifier | None = None) -> str:
    """Make the page of a report."""
    own = [row for row in report.rows if row.threat is None]
    evidence = Evidence([row for row in own if row.kind == "clean" or row.is_attack])
    shown = pictured_row(evidence)
    examples = None if shown is None else shown.examples
    pictures = [] if examples is None else picture_lines(examples, defence)
    return render(
        "page.html.jinja",
        report=report,
        own=own,
        lowest=report.lowest.get(None),
        counted=evidence.with_counted_gradients(),
        findings=advised_once(report.findings),
        curves=[(what, _curve(points)) for what, points in report.curves.items() if len(points) > 1],
        pictures=pictures,
        pictured=shown,
        data_uri=data_uri,
        json=functools.partial(json.dumps, ensure_ascii=False, default=str),
        widest=max(map(len, pictures), default=3),
    )


def _curve(points: Sequence[Sequence[float]]) -> list[dict[str, Any]]:
    """Return the points of a curve, each with its horizontal position from 0 to 1 and its standard error."""
    settings, accuracies = np.array(points).T
    # The axis is logarithmic if the settings grow by factors, such as numbers of steps.
    scale = np.log(settings) if settings[-1] > 12 * settings[0] else settings
    across = (scale - scale[0]) / (scale[-1] - scale[0])
    errors = np.sqrt(accuracies * (1 - accuracies) / PROBED)
    return [
        {"across": x, "setting": f"{setting:.3g}", "accuracy": accuracy, "error": error}
        for x, setting, accuracy, error in zip(across, settings, accuracies, errors, strict=True)
    ]


# -- attacked images --------------------------------------------------------------------------------------------------


def pictured_row(evidence: Evidence) -> Row | None:
    """Return the attack whose images are shown: the one to which most images fell (in most draws)."""
    fallen = [(row, int((wrong > 0.5).sum())) for row, wrong in evidence.fallen()]
    drawable = [pair for pair in fallen if pair[0].examples is not None and pair[0].examples.clean.shape[1] in (1, 3)]
    return max(drawable, key=lambda pair: pair[1], default=(None, 0))[0]


def picture_lines(examples: Examples, defence: Classifier | None) -> list[list[Picture]]:
    """A line of pictures for each image: clean, attacked, the amplified difference, and the defence's images."""
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
    """Return the predicted classes of the clean images, and columns of images that the defence makes."""
    if defence is None:
        return None, []
    device = device_of(defence, x)

    def fixed(call: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        torch.manual_seed(0)
        with defence.fixed_noise(0) if supports(defence, FixedNoise) else contextlib.nullcontext():
            return call(images.to(device)).cpu()

    columns: list[tuple[str, Tensor, Tensor | None]] = []
    devices = [device.index or 0] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), frozen(defence):
        before = fixed(defence, x).argmax(1)
        if supports(defence, Purifies):
            samples = supports(defence, SampleLogits)
            classes = fixed(defence.sample_logits, attacked).argmax(2) if samples else None
            images = fixed(defence.purify, attacked)
            images = (images if images.dim() == 5 else images[:, None])[:, :SAMPLES].float()
            for k in range(images.shape[1]):
                columns.append(("purified", images[:, k], None if classes is None else classes[:, k]))
    return before, columns


def data_uri(image: Tensor) -> str:
    """An image ``[C, H, W]`` in [0, 1], C = 1 or 3, as the data URI of a PNG."""
    # Pillow is imported only here, so that a report without pictures does not need it.
    from PIL import Image

    array = (image * 255).round().to(torch.uint8).permute(1, 2, 0).squeeze(-1).numpy()
    file = io.BytesIO()
    Image.fromarray(array).save(file, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")
