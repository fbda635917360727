"""A function of a batch, compiled once for every batch size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

#: PyTorch chooses another CPU convolution for batches below this size, for which a compiler makes another graph.
SMALL_BATCH = 16


def pad_batch(x: Tensor) -> Tensor:
    """``x [B, ...]`` with zeros appended along the batch until it holds at least 16 items; a copy.

    The number that is missing may be symbolic: a compiler then makes one graph for all batch sizes.
    """
    missing = torch.sym_max(SMALL_BATCH - x.shape[0], 0)
    return F.pad(x, [0, 0] * (x.dim() - 1) + [0, missing])  # type: ignore[list-item]  # a SymInt, perhaps


class CompiledRegion:
    """A function of tensors ``[B, ...]``, compiled once for every batch size; within another graph it is itself.

    Without help a compiler makes new graphs for a batch of 1, for one below 16, for views and for other strides. So
    small batches are filled up with zeros, and all inputs are copied to one layout.

    Args:
        function: of tensors ``[B, ...]``, to one tensor ``[B, ...]``; an item of the result must depend on the items at
            its own place only.
    """

    def __init__(self, function: Callable[..., Tensor]):
        self.function, self.compiled = function, torch.compile(function)

    def __call__(self, *inputs: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return self.function(*inputs)
        batch = len(inputs[0])
        if batch < SMALL_BATCH:
            inputs = tuple(pad_batch(x) for x in inputs)
        inputs = tuple(x.clone(memory_format=torch.contiguous_format) for x in inputs)
        for x in inputs:
            torch._dynamo.maybe_mark_dynamic(x, 0)
        return self.compiled(*inputs)[:batch]

    def __reduce__(self) -> tuple[Any, ...]:
        # When a region is copied or pickled, a bound method takes its object along, and the copy compiles for itself.
        return CompiledRegion, (self.function,)
