"""Measure the memory of this process and of a device, and do work again with less when memory runs out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

import torch

from .._memory import available_memory, peak_resident_memory, ran_out_of_memory

logger = logging.getLogger("purify_fast")

Result = TypeVar("Result")

#: The memory of the device within `memory_of_capture`, see `_memory_of`; None outside of it.
_measured = ContextVar[int | None]("measured", default=None)


def peak_so_far(device: torch.device) -> int:
    """The largest memory of this process so far, in bytes: that of the process on a CPU, or of tensors on a GPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_resident_memory()


def _memory_of(device: torch.device) -> int:
    """The bytes that this process may still allocate, and on a GPU also the bytes of its tensors."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return available_memory()


def free_memory(device: torch.device) -> int:
    """The bytes that this process may still allocate; 0 in a capture outside of `memory_of_capture`."""
    memory, cuda = _measured.get(), device.type == "cuda"
    if memory is None and cuda and torch.cuda.is_current_stream_capturing():
        return 0
    memory = _memory_of(device) if memory is None else memory
    return memory - (torch.cuda.memory_allocated(device) if cuda else 0)


@contextmanager
def memory_of_capture(device: torch.device) -> Iterator[None]:
    """Within the block, `free_memory` does not query the device, which a capture refuses. It subtracts the tensors."""
    token = _measured.set(_memory_of(device))
    try:
        yield
    finally:
        _measured.reset(token)


def in_capture() -> bool:
    """Return True within `memory_of_capture`."""
    return _measured.get() is not None


def same_draws_again(device: torch.device) -> Callable[[], None]:
    """Return a function that restores the current states of torch's generators for the CPU and the device."""
    host = torch.get_rng_state()
    own = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def again() -> None:
        torch.set_rng_state(host)
        if own is not None:
            torch.cuda.set_rng_state(own, device)

    return again


def retry_when_memory_ends(
    work: Callable[[], Result], device: torch.device, frees: Callable[[], Callable[[], None] | None]
) -> Result:
    """Call a function, and again with the same draws whenever memory runs out and ``frees`` finds something to free."""
    again = same_draws_again(device)
    while True:
        try:
            return work()
        except Exception as error:
            free = frees() if ran_out_of_memory(error) else None
            if free is None:
                raise
        # Free memory outside the except block, because inside it the traceback keeps the tensors of the call alive.
        free()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        again()


class BatchLimit:
    """The largest number of images in a forward pass: no limit at first, and half as many whenever memory runs out.

    ``most`` is the largest number of images that are given at once, from which the first halving starts.
    """

    def __init__(self, most: int, device: torch.device):
        self.images: int | None = None
        self.most, self.device = most, device

    def at_most(self, count: int) -> int:
        """The smaller of ``count`` and the limit."""
        return count if self.images is None else min(count, self.images)

    def limit(self, count: int | None) -> int | None:
        """The smaller of another limit and this limit; None means no limit."""
        return self.images if count is None else self.at_most(count)

    def within(self, work: Callable[[], Result]) -> Result:
        """Call a function. If memory runs out, halve the number of images, down to 1, and call it again."""
        return retry_when_memory_ends(work, self.device, lambda: None if self.images == 1 else self._halve)

    def _halve(self) -> None:
        self.images = max(1, (self.images or self.most) // 2)
        logger.warning("memory ran out: from now on a forward pass has at most %d images", self.images)
