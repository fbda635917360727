"""Batch sizes that an attack lets its batch shrink to.

Every size has a cost of its own: a convolution library prepares its kernels for it, a compiler may compile again, a
CUDA graph is captured. So a shrinking batch only takes sizes of a fixed list, and images that have fallen fill it up.
To a CPU an image more of a large model, or under many draws, costs more than a new size: there every number is taken.
"""

from __future__ import annotations

import torch

#: Sizes per doubling. A CPU prepares a size in milliseconds, a GPU may have to capture a graph for it.
PER_DOUBLING = {"cpu": 4}
PER_DOUBLING_ELSEWHERE = 2


def bucket(items: int, device: torch.device, costly: bool = False) -> int:
    """The smallest size of the list that holds so many items.

    Args:
        items: how many are left, at least 1.
        device: where they are; the list is coarser on a GPU.
        costly: whether a step of one item costs a CPU more than a new size.

    Returns:
        A power of two times 1, 5/4, 6/4 or 7/4 on a CPU, times 1 or 3/2 on a GPU; below that, and of costly items on a
        CPU, every number.
    """
    if device.type == "cpu" and costly:
        return items
    parts = PER_DOUBLING.get(device.type, PER_DOUBLING_ELSEWHERE)
    if items <= 2 * parts:
        return items
    unit = 1 << ((items - 1).bit_length() - 1)
    step = unit // parts
    return -(-items // step) * step
