"""The number of images that go through a model at once, from a measured pass of a few and the memory that there is."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .._memory import available_memory, bytes_of, ran_out_of_memory, resident_memory

logger = logging.getLogger("purify_fast")

#: The number of images in the first measured pass, and the largest number in the second.
FIRST, SECOND = 1, 8
#: The share of the free memory to plan with. The rest is for memory that is not counted, and for gaps between tensors.
PLANNED = 0.8
#: The most images at once. More images save hardly any time, and with a limit the number is the same from run to run.
MOST = 1024

Result = TypeVar("Result")


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operators made and that are still held, and the most of them.

    The memory that operators use while they run, such as a library's scratch memory, is not seen.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.live, self.most = 0, 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.count(tensor.untyped_storage())
        return result

    def count(self, storage: torch.UntypedStorage) -> None:
        """Count a storage, once for as long as it lives."""
        key = storage._cdata
        if key in self.seen:
            return
        size = storage.nbytes()
        self.seen.add(key)
        self.live += size
        self.most = max(self.most, self.live)
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.live -= size


def peak_memory(work: Callable[[], object], device: torch.device) -> int:
    """The most bytes of tensors that some work takes at once: by a GPU's allocator, or counted on a CPU.

    Args:
        work: the work to measure; it is done once.
        device: where it computes.
    """
    if device.type != "cuda":
        with LiveBytes() as counted:
            work()
        return counted.most
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    work()
    return torch.cuda.max_memory_allocated(device) - before


def free_memory(device: torch.device, budget: int | str | None) -> int:
    """Bytes that this process may still take on a device.

    Args:
        device: a GPU, or the CPU.
        budget: the most that it may take in all, in bytes or as "20GB"; None: as much as there is.

    Raises:
        ValueError: the budget is not an amount of memory.
    """
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + reserved
        return free if budget is None else min(free, bytes_of(budget) - torch.cuda.memory_allocated(device))
    return available_memory() if budget is None else bytes_of(budget) - resident_memory()


def images_that_fit(work: Callable[[int], object], free: int, device: torch.device) -> int:
    """The number of images that some work can take at once, from its memory with one image and with a few.

    Args:
        work: a function of the number of images. It draws nothing from what comes after it.
        free: bytes that it may take.
        device: where it computes.

    Returns:
        A power of two from 1 to 1,024; 1 also where one image does not fit.
    """
    again = same_draws_again(device)
    try:
        one = peak_memory(lambda: work(FIRST), device)
        several = max(2, min(SECOND, int(PLANNED * free) // max(1, one)))
        slope = (peak_memory(lambda: work(several), device) - one) / (several - FIRST)
    except Exception as error:
        if not ran_out_of_memory(error):
            raise
        return 1
    finally:
        again()
    fitting = FIRST + (PLANNED * free - one) / max(1.0, slope)
    return 1 << (int(min(MOST, max(1.0, fitting))).bit_length() - 1)


def same_draws_again(device: torch.device) -> Callable[[], None]:
    """A function that puts torch's generators, including the device's, back to their present states."""
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
    """Do some work. Each time that memory runs out, free some and do the work again.

    Args:
        work: can be done several times; each run draws the same random numbers.
        device: where it computes.
        frees: returns a function that frees memory; None if no more can be freed, and the error is raised.
    """
    again = same_draws_again(device)
    while True:
        try:
            return work()
        except Exception as error:
            free = frees() if ran_out_of_memory(error) else None
            if free is None:
                raise
        # Free memory outside of the except block, because the error's traceback keeps the tensors of the failed work
        # alive.
        free()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        again()


class Room:
    """The number of images that go through a model at once: halved each time that memory runs out, if it may be.

    Args:
        images: the most images at once; None: no limit.
        device: where the model computes.
        yields: whether work is done again with half as many when memory runs out; if not, the error is raised.
    """

    def __init__(self, images: int | None, device: torch.device, yields: bool = False):
        self.images, self.device, self.yields = images, device, yields

    def at_most(self, wanted: int) -> int:
        """``wanted`` images, or as many as there is room for."""
        return wanted if self.images is None else min(wanted, self.images)

    def limit(self, wanted: int | None) -> int | None:
        """The lower of another limit and this one; None is no limit."""
        return self.images if wanted is None else self.at_most(wanted)

    def within(self, work: Callable[[], Result]) -> Result:
        """Do some work. If memory runs out, do it again with half as many images at once, down to one.

        Args:
            work: asks this object how many, and can be done several times; each run draws the same random numbers.
        """
        return retry_when_memory_ends(
            work, self.device, lambda: self._halve if self.yields and self.images not in (None, 1) else None
        )

    def _halve(self) -> None:
        assert self.images is not None
        self.images //= 2
        logger.warning("memory ran out: from now on at most %d images go through the model at once", self.images)
