"""Child processes that do not outlive their parent, and this process's number among those that train together."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta

import torch.distributed as dist


def end_with_parent() -> None:
    """Leave Ctrl-C to the parent process, and end when it ends; a worker calls this first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def worker_pool(count: int, prepare: Callable[[], None] = end_with_parent) -> ProcessPoolExecutor:
    """Processes that start with an interpreter of their own: threads do not survive a fork.

    Each calls ``prepare`` first, which must call `end_with_parent`.
    """
    return ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn"), initializer=prepare)


def end_workers() -> None:
    """End this process's children at once; a pool that is shut down would wait for their work."""
    for process in multiprocessing.active_children():
        process.terminate()


class Stop:
    """The request to end this process.

    Attributes:
        asked: set by SIGTERM within `stop_on_sigterm`.
    """

    asked: bool = False


@contextlib.contextmanager
def stop_on_sigterm() -> Iterator[Stop]:
    """Within the block, SIGTERM asks to end where it suits the work; a second one ends the process at once.

    SIGTERM is handled only if it would otherwise end the process. Nothing changes if the user has set a handler, in a
    thread other than the main one, in a worker, which its parent ends by SIGTERM, and among several processes, where a
    process that waits for the others would not notice the request.

    Yields:
        An object that says whether the process was asked to end.
    """
    stop = Stop()
    main = threading.current_thread() is threading.main_thread()
    alone = processes()[1] == 1 and multiprocessing.parent_process() is None
    if not main or not alone or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield stop
        return

    def ask(number: int, frame: object) -> None:
        stop.asked = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    signal.signal(signal.SIGTERM, ask)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def processes() -> tuple[int, int]:
    """This process among those that train together.

    Returns:
        Its number and how many there are, of torch's default process group; (0, 1) without one.
    """
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def patience() -> timedelta:
    """The time that an exchange waits for another process: PURIFY_FAST_TIMEOUT in seconds, 1800 if it is not set.

    Raises:
        ValueError: the variable is not a number above 0.
    """
    text = os.environ.get("PURIFY_FAST_TIMEOUT") or "1800"
    with contextlib.suppress(ValueError):
        if 0 < (seconds := float(text)) < 1e9:
            return timedelta(seconds=seconds)
    raise ValueError(f"PURIFY_FAST_TIMEOUT must be a number of seconds above 0, got {text!r}")


def sendable(error: BaseException) -> BaseException:
    """An exception that the other processes can read: itself, or its text if it cannot be pickled."""
    # An exception class of the user may raise any error when it is pickled or unpickled.
    with contextlib.suppress(Exception):
        pickle.loads(pickle.dumps(error))
        return error
    return RuntimeError(f"{type(error).__name__}: {error}")
