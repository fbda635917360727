"""Kernels compiled side by side before the first of them runs."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import triton
from triton.runtime._async_compile import AsyncCompileMode

#: Threads that compile. Triton lets go of the interpreter while it optimizes and assembles.
MOST = 8
_patched = threading.Lock()


def compile_together(launch: Callable[[], None]) -> None:
    """Compile the kernels that a function launches, in threads, and run none of them.

    A kernel that cannot be compiled is left out: its launch will say why.

    Args:
        launch: calls launchers; what they return has no meaning.
    """
    this, run = threading.get_ident(), triton.JITFunction.run

    def compiled(function, *args, grid, warmup, **kwargs):
        # kernels of other threads run as usual
        return run(function, *args, grid=grid, warmup=warmup or threading.get_ident() == this, **kwargs)

    workers = min(MOST, os.cpu_count() or 1)
    with _patched, ThreadPoolExecutor(workers) as pool, AsyncCompileMode(pool, ignore_errors=True):
        triton.JITFunction.run = compiled
        try:
            launch()
        finally:
            triton.JITFunction.run = run
