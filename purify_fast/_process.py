"""The rank of this process, and the processes of its group."""

from __future__ import annotations

import contextlib
import os
import pickle
from datetime import timedelta

import torch.distributed as dist


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
