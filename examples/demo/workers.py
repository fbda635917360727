"""Two child processes that end with their parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager

import torch

from purify_fast.speed import retain_freed_memory


@contextmanager
def two_workers() -> Iterator[ProcessPoolExecutor]:
    """Make a pool of two spawned processes. Forked processes would lack the threads of this process.

    After an error, the pool does not wait for the current jobs, which may take minutes. The next run continues them.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=context, initializer=_prepare) as pool:
        try:
            yield pool
        except BaseException:
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def _prepare() -> None:
    """Ignore Ctrl-C in this process, and end this process when its parent ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    # For batches of small images, a second thread would make the computation slower.
    torch.set_num_threads(1)
    retain_freed_memory()
