"""Compiles several kernels in parallel, before the first of them runs."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import triton
from triton.runtime._async_compile import AsyncCompileMode

#: The largest number of threads that compile kernels: Triton releases Python's lock while it optimizes and assembles.
MOST = 8
_patched = threading.Lock()


def compile_together(launch: Callable[[], None]) -> None:
    """Compile, in parallel, the kernels that a function launches, except those that cannot be compiled. Run none.

    Args:
        launch: function that calls launchers. The results of the launchers are meaningless.
    """
    this, run = threading.get_ident(), triton.JITFunction.run

    def compiled(function, *args, grid, warmup, **kwargs):
        # Other threads may launch kernels at the same time. Those kernels run as usual.
        return run(function, *args, grid=grid, warmup=warmup or threading.get_ident() == this, **kwargs)

    workers = min(MOST, os.cpu_count() or 1)
    with _patched, ThreadPoolExecutor(workers) as pool, AsyncCompileMode(pool, ignore_errors=True):
        triton.JITFunction.run = compiled
        try:
            launch()
        finally:
            triton.JITFunction.run = run
