"""Forecasts the time of an evaluation from an evaluation of a few images."""

from __future__ import annotations

import functools
import math
import time
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from .._memory import resident_memory
from ..protocols import Classifier
from ..speed.counting import Cost, counted
from ..speed.memory import peak_memory
from ..speed.run_cost import Forecast
from .auto_batch import images_together
from .config import EvaluateConfig
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
    **options: Any,
) -> Forecast:
    """Forecast the time of `evaluate` with the same arguments.

    For this CPU more and more images are evaluated, until an evaluation takes at least half of ``seconds``. The other
    images are assumed to take the same time per image. This is rather too much, because larger batches take less time
    per image, and because the alarms use a limited number of images.

    Args:
        model: see `evaluate`.
        x: images ``[N, C, H, W]``.
        y: labels, int64 ``[N]``.
        gpu: a name in `purify_fast.speed.counting.GPUS`. The operations are counted, and their time on this GPU is
            computed by a model. None: this CPU, on which the time is measured.
        gpus: number of GPUs that share the batches.
        seconds: for this CPU, more and more images are evaluated until a trial takes at least half of this time.
        config: see `evaluate`.
        **options: further arguments of `evaluate`.
    """
    options = {**options, "out": None, "progress": False}
    alone = replace(config, together=False)
    batch, count = images_together(config.batch_size, config.memory), min(COUNTED, len(x))
    peaks: list[int] = []
    # The alarms are left out of the count, because they use a limited number of images. So their work does not grow
    # with the number of all images.
    without_signs = replace(alone, probes=False)
    few = functools.partial(evaluate, model, x[:count], y[:count], config=without_signs, **options)
    counts = counted(lambda: peaks.append(peak_memory(few, device_of(model, x))))
    cost = Cost(counts.launches * math.ceil(len(x) / batch), *(value * len(x) / count for value in counts[1:]))
    memory = peaks[0] * min(batch, len(x)) / count
    kind = "this CPU" if gpu is None else f"{gpus} {gpu}"
    what = f"{len(x):,} images on {kind}"
    if gpu is not None:
        weights = sum(p.nbytes for p in model.parameters()) if isinstance(model, nn.Module) else 0
        return Forecast(what, cost, memory + weights, gpu=gpu, gpus=gpus, precision="bfloat16")
    while True:
        began = time.perf_counter()
        evaluate(model, x[:count], y[:count], config=alone, **options)
        taken = time.perf_counter() - began
        if taken >= seconds / 2 or count == len(x):
            return Forecast(what, cost, resident_memory() + memory, taken * len(x) / count)
        count = min(4 * count, len(x))
