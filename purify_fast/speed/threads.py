"""Choose the number of threads of a CPU by timed steps. Other programs may use the same cores."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator

import torch

from .._process import processes

logger = logging.getLogger("purify_fast")

#: The measurement ends after this number of rounds, or after the round in which so many seconds have passed.
ROUNDS, SECONDS = 20, 1.0


@contextlib.contextmanager
def restored_threads() -> Iterator[None]:
    """Restore torch's number of threads after the block."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def may_choose(device: torch.device) -> bool:
    """Tell whether the number of threads for work on a device is open.

    It is not open if the user set it by OMP_NUM_THREADS, or if several processes share the cores. It is not open either
    in a process that uses torch.compile, because compiled code is made again for each number of threads.

    Args:
        device: device of the work.
    """
    alone = device.type == "cpu" and torch.get_num_threads() > 1 and processes()[1] == 1
    # `torch.compile` loads this module.
    compiles = "torch._inductor.compile_fx" in sys.modules
    return alone and not compiles and not os.environ.get("OMP_NUM_THREADS")


def fastest_threads(step: Callable[[], object]) -> int:
    """Time a step with torch's present number of threads, with half of it and with one; return the fastest number.

    Args:
        step: a typical part of the work, which can be repeated.
    """
    present, began = torch.get_num_threads(), time.perf_counter()
    times: dict[int, list[float]] = {threads: [] for threads in (present, max(1, present // 2), 1)}
    with restored_threads():
        # In rounds, so that a change of the other programs' load concerns all numbers.
        while len(times[1]) < ROUNDS and time.perf_counter() - began < SECONDS:
            for threads, taken in times.items():
                torch.set_num_threads(threads)
                before = time.perf_counter()
                step()
                taken.append(time.perf_counter() - before)
    # The first step with a number of threads also makes what the later steps use again.
    means = {threads: sum(taken[1:] or taken) / len(taken[1:] or taken) for threads, taken in times.items()}
    chosen = min(means, key=lambda threads: means[threads])
    told = ", ".join(f"{1000 * mean:.3g} ms with {threads}" for threads, mean in means.items())
    logger.info("the number of threads is %d, because a step took %s", chosen, told)
    return chosen
