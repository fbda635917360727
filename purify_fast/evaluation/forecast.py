"""What an evaluation will take: a few of its images are evaluated, and their cost is continued to all of them."""

from __future__ import annotations

import math
import time
from typing import Any

from torch import Tensor, nn

from .._memory import resident_memory
from ..protocols import Classifier
from ..speed.counting import Cost, counted
from ..speed.forecast import Forecast
from ..speed.memory import peak_memory
from .alarms.answers import PROBED
from .fitting import USUAL_BATCH
from .report import Report
from .runner import evaluate, has_signs
from .subject import device_of

#: Images with which it is counted what the evaluation asks of the device.
COUNTED = 8


def forecast(
    model: Classifier,
    x: Tensor,
    y: Tensor,
    *,
    gpu: str | None = None,
    gpus: int = 1,
    seconds: float = 10.0,
    **options: Any,
) -> Forecast:
    """What `evaluate` will take with the same arguments.

    How long an attack searches depends on the images: on a CPU more and more of them are evaluated until that takes
    ``seconds``, and the rest is taken to be like them.

    Args:
        model: as of `evaluate`.
        x: images ``[N, C, H, W]``.
        y: labels, int64 ``[N]``.
        gpu: a name of `purify_fast.speed.counting.GPUS`, for which operators are counted and their time is modelled;
            None: this CPU, on which they are timed.
        gpus: how many share the batches.
        seconds: that the last probe takes on a CPU at least, unless there are too few images.
        **options: of `evaluate`.
    """
    options = {**options, "out": None, "progress": False, "together": False}
    batch_size = options.get("batch_size", USUAL_BATCH)
    batch = USUAL_BATCH if batch_size == "auto" else batch_size
    few = min(COUNTED, len(x))

    def some(count: int, **more: Any) -> Report:
        return evaluate(model, x[:count], y[:count], **options | more)

    peaks: list[int] = []
    # the signs, which have a bounded number of images, are left out of what is counted
    counts = counted(lambda: peaks.append(peak_memory(lambda: some(few, probes=False), device_of(model, x))))
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
        report = some(count, probes=False)
        taken = time.perf_counter() - began
        if taken >= seconds / 2 or count == len(x):
            break
        count = min(4 * count, len(x))
    signs = 0.0
    if has_signs(options.get("protocol"), options.get("attacks"), options.get("probes")):
        began = time.perf_counter()
        asked = some(few)
        signs = time.perf_counter() - began - _of_attacks(asked)
    # neither the signs nor what comes before the attacks grow with the images, but for the first few
    whole = _of_attacks(report) * len(x) / count + max(0.0, signs) * min(PROBED, len(x)) / few
    return Forecast(what, cost, resident_memory() + memory, whole)


def _of_attacks(report: Report) -> float:
    return sum(row.seconds for row in report.rows if row.kind != "worst")
