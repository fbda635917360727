"""Child processes that end with their parent, and the rank of this process."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta

import torch.distributed as dist


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


def processes() -> tuple[int, int]:
    """The rank of this process and the number of processes, in torch's default process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def patience() -> timedelta:
    """The longest wait for another process: PURIFY_FAST_TIMEOUT in seconds, or 1800 if the variable is not set."""
    text = os.environ.get("PURIFY_FAST_TIMEOUT") or "1800"
    with contextlib.suppress(ValueError):
        if 0 < (seconds := float(text)) < 1e9:
            return timedelta(seconds=seconds)
    raise ValueError(f"the variable PURIFY_FAST_TIMEOUT must be a number of seconds above 0, got {text!r}")


def sendable(error: BaseException) -> BaseException:
    """The error itself if it can be pickled for other processes, or else a RuntimeError with its text."""
    # A user's class of exceptions may raise any error when it is pickled or unpickled.
    with contextlib.suppress(Exception):
        pickle.loads(pickle.dumps(error))
        return error
    return RuntimeError(f"{type(error).__name__}: {error}")
