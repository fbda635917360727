"""Choose the number of images in a forward pass from the available memory and the measured memory of a few images."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from .._compiler import EagerDispatchMode
from .._memory import available_memory, peak_resident_memory, ran_out_of_memory

logger = logging.getLogger("purify_fast")

#: The number of images in the first measured pass, and the largest number in the second.
FIRST, SECOND = 1, 8
#: The share of the free memory that is used. The rest is for memory that is not counted, and for gaps between tensors.
PLANNED = 0.8
#: The largest number of images in a pass. More images save hardly any time. With this limit, all devices with enough
#: memory use the same number.
MOST = 1024

Result = TypeVar("Result")


class LiveBytes(EagerDispatchMode):
    """Counts the bytes of existing tensors that operators have made, and their peak, without scratch memory."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.most = 0, 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.count(tensor.untyped_storage())
        return result

    def count(self, storage: torch.UntypedStorage) -> None:
        """Count a storage until it is freed. A storage that is already counted is not counted twice."""
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
    """Call a function, and return its peak of memory in bytes: from a GPU's allocator, or counted on a CPU."""
    if device.type != "cuda":
        with LiveBytes() as counted:
            work()
        return counted.most
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    work()
    return torch.cuda.max_memory_allocated(device) - before


def peak_so_far(device: torch.device) -> int:
    """The largest memory of this process so far, in bytes: that of the process on a CPU, or of tensors on a GPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_resident_memory()


def free_memory(device: torch.device) -> int:
    """The bytes that this process may still allocate."""
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserved
    return available_memory()


def images_that_fit(work: Callable[[int], object], free: int, device: torch.device) -> int:
    """Estimate how many images fit into ``free`` bytes, a power of two up to 1,024, from passes of 1 and of a few."""
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


class Room:
    """The largest number of images in a forward pass. It can be halved whenever memory runs out."""

    def __init__(self, images: int | None, device: torch.device, yields: bool = False):
        self.images, self.device, self.yields = images, device, yields

    def at_most(self, wanted: int) -> int:
        """The smaller of ``wanted`` and the limit."""
        return wanted if self.images is None else min(wanted, self.images)

    def limit(self, wanted: int | None) -> int | None:
        """The smaller of another limit and this limit; None means no limit."""
        return self.images if wanted is None else self.at_most(wanted)

    def within(self, work: Callable[[], Result]) -> Result:
        """Call a function. If memory runs out, halve the number of images, down to 1, and call it again."""
        return retry_when_memory_ends(
            work, self.device, lambda: self._halve if self.yields and self.images not in (None, 1) else None
        )

    def _halve(self) -> None:
        assert self.images is not None
        self.images //= 2
        logger.warning("memory ran out: from now on a forward pass has at most %d images", self.images)
