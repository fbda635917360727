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

#: Steps are timed for so many seconds with each number of threads, in so many rounds.
SECONDS, ROUNDS = 0.15, 2
#: After so many seconds, there is no further round.
LONG = 2.0


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

    It is not open if OMP_NUM_THREADS is set, if several processes share the cores, or in a process that uses
    torch.compile, because compiled code is made again for each number of threads.
    """
    alone = device.type == "cpu" and torch.get_num_threads() > 1 and processes()[1] == 1
    # `torch.compile` loads this module.
    compiles = "torch._inductor.compile_fx" in sys.modules
    return alone and not compiles and not os.environ.get("OMP_NUM_THREADS")


def fastest_threads(step: Callable[[], object]) -> int:
    """Time a step with torch's present number of threads, with half of it and with one; return the fastest number."""
    present, began = torch.get_num_threads(), time.perf_counter()
    timed = {threads: (0.0, 0) for threads in (present, max(1, present // 2), 1)}
    with restored_threads():
        # In rounds, because the other programs' load may change.
        for _ in range(ROUNDS):
            for threads, (seconds, steps) in timed.items():
                torch.set_num_threads(threads)
                more = _timed(step)
                timed[threads] = seconds + more[0], steps + more[1]
            if time.perf_counter() - began > LONG:
                break
    means = {threads: seconds / steps for threads, (seconds, steps) in timed.items()}
    chosen = min(means, key=lambda threads: means[threads])
    told = ", ".join(f"{1000 * mean:.3g} ms with {threads}" for threads, mean in means.items())
    logger.info("the number of threads is %d, because a step took %s", chosen, told)
    return chosen


def _timed(step: Callable[[], object]) -> tuple[float, int]:
    """Take steps for a while. Return the seconds and the number of steps."""
    # The number changes only after many steps. If one thread and two took turns, two threads would seem to be slow:
    # beside busy processes, the second would have to wait for a core again in each step.
    began, steps = time.perf_counter(), 0
    step()
    first = time.perf_counter() - began
    if first > SECONDS:
        return first, 1
    # The first step also makes what the later steps use again, so it does not count.
    began = time.perf_counter()
    while not steps or time.perf_counter() - began < SECONDS:
        step()
        steps += 1
    return time.perf_counter() - began, steps
