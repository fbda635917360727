"""Predicts the time and the memory of an evaluation from evaluations of a few images."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .._memory import resident_memory
from ..protocols import Classifier
from ..speed.memory import peak_memory
from ..speed.run_cost import Forecast
from .alarms.answers import PROBED
from .asked.config import EvaluateConfig
from .asked.subject import device_of
from .runner import evaluate
from .show.report import Report

#: The number of images in the first trial, whose memory is measured.
FEW = 8


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

    Trials with more and more images are made, until a trial takes at least half of ``seconds``. The remaining images
    are assumed to take the same time per image.

    Args:
        model: see `evaluate`.
        x: images ``[N, C, H, W]``.
        y: labels, int64 ``[N]``.
        seconds: the last trial takes at least half of this time, unless it evaluates all images.
        config: see `evaluate`.
        attacks: see `evaluate`.
        **options: further arguments of `evaluate`.
    """
    options = {"name": "trial", **options, "attacks": attacks, "out": None}
    alone, without_signs = replace(config, together=False), replace(config, together=False, probes=False)
    device, few = device_of(model, x), min(FEW, len(x))

    def some(count: int, config: EvaluateConfig = without_signs) -> Report:
        return evaluate(model, x[:count], y[:count], config=config, **options)

    together = min(config.images_together(len(x)), len(x))
    # The peak does not contain what was allocated before, such as the model.
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else resident_memory()
    memory = before + peak_memory(lambda: some(few), device) * together / few
    count = few
    while True:
        began = time.perf_counter()
        report = some(count)
        taken = time.perf_counter() - began
        if taken >= seconds / 2 or count == len(x):
            break
        count = min(4 * count, len(x))
    signs = 0.0
    if config.has_signs(attacks):
        began = time.perf_counter()
        asked = some(few, alone)
        signs = time.perf_counter() - began - _of_attacks(asked)
    # The alarms use at most PROBED images, so their time does not grow beyond that number.
    whole = _of_attacks(report) * len(x) / count + max(0.0, signs) * min(PROBED, len(x)) / few
    return Forecast(f"{len(x):,} images on {device.type}", whole, memory)


def _of_attacks(report: Report) -> float:
    return sum(row.seconds for row in report.rows if row.kind != "worst")
