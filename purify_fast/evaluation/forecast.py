"""Predicts the time and the memory of an evaluation from evaluations of a few images.

The time of an attack is continued with two terms: a time for each batch, and a time for each image. The number of
images that an attack will get, and reach before it stops, follows from the share of the images that it got in a trial.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ..protocols import Classifier
from ..speed.memory import forget_peak, peak_so_far
from ..speed.run_cost import Forecast
from .alarms.answers import PROBED
from .asked.config import EvaluateConfig
from .asked.subject import device_of
from .results.rows import Row
from .run.stopping import StoppingRule
from .runner import evaluate

#: The numbers of images in the first two trials, and the factor from a fast trial to the next.
FIRST, FEW, GROWTH = 2, 8, 4


@dataclass(frozen=True)
class Trial:
    """An evaluation of a few images.

    Args:
        images: number of images.
        seconds: time of the whole trial.
        memory: largest memory during the trial, in bytes.
        rows: the rows that took time, by their label.
    """

    images: int
    seconds: float
    memory: int
    rows: dict[str, Row]

    @property
    def others(self) -> float:
        """The time that no row took: mostly that of the signs that an attack has failed."""
        return max(0.0, self.seconds - sum(row.seconds for row in self.rows.values()))


def forecast(
    model: Classifier,
    x: Tensor,
    y: Tensor,
    *,
    seconds: float = 10.0,
    config: EvaluateConfig = EvaluateConfig(),
    attacks: Sequence[Any] | None = None,
    **options: Any,
) -> Forecast:
    """Predict the cost of `evaluate` with the same arguments, on the model's device.

    Trials with more and more images are made, until a trial takes at least half of ``seconds``. If there are enough
    images, at least three are made: the first loads code, and the other two show how the time grows with the images.

    Args:
        model: see `evaluate`.
        x: images ``[N, C, H, W]``.
        y: labels, int64 ``[N]``.
        seconds: twice the time that the last trial takes at least, unless it evaluates all images.
        config: see `evaluate`.
        attacks: see `evaluate`.
        **options: further arguments of `evaluate`.
    """
    options = {"name": "trial", **options, "attacks": attacks, "out": None, "config": replace(config, together=False)}
    device, images, together = device_of(model, x), len(x), min(config.images_together, len(x))
    trials: list[Trial] = []
    loaded = peak_so_far(device)

    def trial(count: int) -> None:
        forget_peak(device)
        began = time.perf_counter()
        report = evaluate(model, x[:count], y[:count], **options)
        rows = {row.attack: row for row in report.rows if row.kind != "worst"}
        trials.append(Trial(count, time.perf_counter() - began, peak_so_far(device), rows))

    # The first trial also loads code, so its time is not used.
    trial(min(FIRST, images))
    trial(min(FEW, images))
    while trials[-1].images < images and (len(trials) == 2 or trials[-1].seconds < seconds / 2):
        growth = GROWTH if trials[-1].seconds < seconds / 2 else 2
        trial(min(growth * trials[-1].images, images))
    timed = trials[1:][-2:]
    first, last = trials[-2:]
    per_image = max(0, last.memory - first.memory) / max(1, last.images - first.images)
    # More may have been needed before, when the images were read.
    memory = max(loaded, last.memory + per_image * max(0, together - last.images))
    # The signs use at most PROBED images, so their time does not grow beyond that number.
    asked = [(1, min(each.images, PROBED), each.others) for each in timed]
    whole = _continued(asked, 1, min(images, PROBED))
    for label in timed[-1].rows:
        known = [(each.images, each.rows[label]) for each in timed if label in each.rows]
        measured = [(*_work(row, count, count, together), row.seconds) for count, row in known]
        whole += _continued(measured, *_work(known[-1][1], known[-1][0], images, together))
    return Forecast(f"{images:,} images on {device.type}", whole, memory)


def _work(row: Row, among: int, images: int, together: int) -> tuple[int, int]:
    """The numbers of batches and of images that an attack makes, if the row is its result on a few of the images.

    Args:
        row: the result on a few images.
        among: the number of these few images.
        images: the number of all images.
        together: the number of images in a batch.
    """
    got = row.n if row.attacked is None else row.attacked
    most = row.settings.get("nearest") or row.settings.get("max_images") or images
    count = min(round(got * images / among), most)
    # The attacks on a random model get all of their images.
    if "until" not in row.settings or not row.deterministic:
        return math.ceil(count / together), count
    rule = StoppingRule(row.settings["until"][0], count, images)
    fell = round((got - int(row.robust.sum())) * images / among)
    while rule.unsearched:
        begun = min(rule.round, rule.unsearched)
        # An attack begins with the images that are nearest to falling.
        falls = min(fell, begun)
        fell -= falls
        if rule.record([True] * falls + [False] * (begun - falls), 0):
            break
    reached = got - row.unsearched if images == among else count - rule.unsearched
    return math.ceil(reached / min(rule.round, together)), reached


def _continued(measured: Sequence[tuple[int, int, float]], batches: int, images: int) -> float:
    """Continue the last of one or two measured times, which are the sum of a time per batch and a time per image.

    Args:
        measured: numbers of batches and of images, each with a time.
        batches: the number of batches of the wanted time.
        images: the number of images of the wanted time.
    """
    last_batches, last_images, last = measured[-1]
    first_batches, first_images, first = measured[0]
    if not last_images:
        return last
    different = first_batches * last_images - last_batches * first_images
    per_batch = (first * last_images - last * first_images) / different if different else 0.0
    per_batch = min(max(per_batch, 0.0), last / last_batches)
    return per_batch * batches + (last - per_batch * last_batches) / last_images * images
