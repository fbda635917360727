"""Child processes that end with their parent, for the demonstration and the studies."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor


def end_with_parent() -> None:
    """Ignore Ctrl-C in this process, and end this process when its parent ends. A worker calls this first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def worker_pool(count: int, prepare: Callable[[], None] = end_with_parent) -> ProcessPoolExecutor:
    """Make a pool of spawned processes. Forked processes would lack the threads of this process."""
    return ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn"), initializer=prepare)


def end_workers() -> None:
    """Terminate the children of this process. A shutdown of their pool would wait until their work is finished."""
    for process in multiprocessing.active_children():
        process.terminate()
