"""A function of a batch, compiled for every batch size at once, or on a GPU for the few sizes that occur."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

#: PyTorch chooses another CPU convolution for batches below this size, for which a compiler makes another graph.
SMALL_BATCH = 16
#: On a GPU, batch sizes that get a graph of their own: a full batch and the last, smaller one. A compiler makes no more
#: than eight graphs of a function.
STATIC_SIZES = 2


def pad_batch(x: Tensor) -> Tensor:
    """``x [B, ...]`` with zeros appended along the batch until it holds at least 16 items; a copy.

    The number that is missing may be symbolic: a compiler then makes one graph for all batch sizes.
    """
    missing = torch.sym_max(SMALL_BATCH - x.shape[0], 0)
    return F.pad(x, [0, 0] * (x.dim() - 1) + [0, missing])  # type: ignore[list-item]  # a SymInt, perhaps


def keeps_sizes(device: torch.device) -> bool:
    """Whether graphs are made for single batch sizes.

    Args:
        device: of the inputs.
    """
    return device.type == "cuda"


class CompiledRegion:
    """A function of tensors ``[B, ...]``, compiled for any batch size; within another graph it is itself.

    Without help a compiler makes new graphs for a batch of 1, for one below 16, for views and for other strides. So
    small batches are filled up with zeros, and all inputs are copied to one layout. On a CPU a batch below 8 is
    computed without the compiler: filled up, it would cost twice as much or more, where compiling gains less than that.

    On a GPU the first sizes that occur are compiled as they are: launches and indices are constants then, and nothing
    is filled up. Further sizes share one graph, as all do on a CPU.

    Args:
        function: of tensors ``[B, ...]``, to one tensor ``[B, ...]``; an item of the result must depend on the items at
            its own place only.
    """

    def __init__(self, function: Callable[..., Tensor]):
        self.function, self.compiled = function, torch.compile(function)
        self.static: dict[tuple[int, torch.device], Callable[..., Tensor]] = {}

    def __call__(self, *inputs: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return self.function(*inputs)
        batch = len(inputs[0])
        static = self._static(batch, inputs[0].device)
        if static is not None:
            return static(*(x.clone(memory_format=torch.contiguous_format) for x in inputs))
        if not keeps_sizes(inputs[0].device) and 2 * batch < SMALL_BATCH:
            return self.function(*inputs)
        if batch < SMALL_BATCH:
            inputs = tuple(pad_batch(x) for x in inputs)
        inputs = tuple(x.clone(memory_format=torch.contiguous_format) for x in inputs)
        for x in inputs:
            torch._dynamo.maybe_mark_dynamic(x, 0)
        return self.compiled(*inputs)[:batch]

    def _static(self, batch: int, device: torch.device) -> Callable[..., Tensor] | None:
        """What is compiled for this batch size alone; None if all share what is."""
        if not keeps_sizes(device):
            return None
        if (batch, device) not in self.static and len(self.static) < STATIC_SIZES:
            self.static[batch, device] = torch.compile(self.function, dynamic=False)
        return self.static.get((batch, device))

    def __reduce__(self) -> tuple[Any, ...]:
        # When a region is copied or pickled, a bound method takes its object along, and the copy compiles for itself.
        return CompiledRegion, (self.function,)
