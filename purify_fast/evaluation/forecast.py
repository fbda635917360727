"""Forecasts the time of an evaluation from an evaluation of a few images."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from .._memory import resident_memory
from ..protocols import Classifier
from ..speed.counting import Cost, counted
from ..speed.memory import peak_memory
from ..speed.run_cost import Forecast
from .alarms.answers import PROBED
from .auto_batch import images_together
from .config import EvaluateConfig
from .report import Report
from .runner import evaluate
from .subject import device_of

#: The number of images on which the operations are counted.
COUNTED = 8


def forecast(
    model: Classifier,
    x: Tensor,
    y: Tensor,
    *,
    gpu: str | None = None,
    gpus: int = 1,
    seconds: float = 10.0,
    config: EvaluateConfig = EvaluateConfig(),
    attacks: Sequence[Any] | None = None,
    **options: Any,
) -> Forecast:
    """Forecast the time of `evaluate` with the same arguments.

    For this CPU more and more images are evaluated, until an evaluation takes at least half of ``seconds``. The other
    images are assumed to take the same time per image.

    Args:
        model: see `evaluate`.
        x: images ``[N, C, H, W]``.
        y: labels, int64 ``[N]``.
        gpu: a name in `purify_fast.speed.counting.GPUS`. The operations are counted, and their time on this GPU is
            computed by a model. None: this CPU, on which the time is measured.
        gpus: number of GPUs that share the batches.
        seconds: for this CPU, more and more images are evaluated until a trial takes at least half of this time.
        config: see `evaluate`.
        attacks: see `evaluate`.
        **options: further arguments of `evaluate`.
    """
    options = {**options, "attacks": attacks, "out": None, "progress": False}
    alone, without_signs = replace(config, together=False), replace(config, together=False, probes=False)
    batch = images_together(config.batch_size, config.memory)
    few = min(COUNTED, len(x))

    def some(count: int, config: EvaluateConfig = without_signs) -> Report:
        return evaluate(model, x[:count], y[:count], config=config, **options)

    peaks: list[int] = []
    # The alarms are left out of the count, because they use a limited number of images. So their work does not grow
    # with the number of all images.
    counts = counted(lambda: peaks.append(peak_memory(lambda: some(few), device_of(model, x))))
    cost = Cost(counts.launches * math.ceil(len(x) / batch), *(value * len(x) / few for value in counts[1:]))
    memory = peaks[0] * min(batch, len(x)) / few
    kind = "this CPU" if gpu is None else f"{gpus} {gpu}"
    what = f"{len(x):,} images on {kind}"
    if gpu is not None:
        weights = sum(p.nbytes for p in model.parameters()) if isinstance(model, nn.Module) else 0
        return Forecast(what, cost, memory + weights, gpu=gpu, gpus=gpus, precision="bfloat16")
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
    # The alarms, and the work before the attacks, use at most PROBED images, so their time grows up to this number.
    whole = _of_attacks(report) * len(x) / count + max(0.0, signs) * min(PROBED, len(x)) / few
    return Forecast(what, cost, resident_memory() + memory, whole)


def _of_attacks(report: Report) -> float:
    return sum(row.seconds for row in report.rows if row.kind != "worst")
