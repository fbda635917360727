"""The changes that an expert makes in the loops of other people, with PyTorch's public functions alone."""

from __future__ import annotations

import functools
import time
import timeit
from functools import partial

import torch
from torch import Tensor, nn

from ..pipelines import expert
from . import Dtype


@functools.cache
def fastest() -> torch.dtype:
    """Return bfloat16 if a convolution is faster in it than in float32, which not all processors with bfloat16 have."""
    times = {}
    for dtype in (torch.float32, torch.bfloat16)[: 1 + torch.cpu._is_avx512_bf16_supported()]:
        x, weight = (
            torch.rand(n, 64, side, side).to(dtype, memory_format=expert.LAST) for n, side in ((8, 32), (64, 3))
        )
        convolution = partial(torch.conv2d, x, weight, padding=1)
        times[dtype] = min(timeit.repeat(convolution, timer=time.process_time, number=5, repeat=5))
    return min(times, key=times.__getitem__)


def best(dtype: Dtype) -> torch.dtype:
    """Return a dtype. For "auto", it is the fastest one."""
    return dtype if isinstance(dtype, torch.dtype) else fastest()


def cast(dtype: torch.dtype) -> torch.autocast:
    """Return the context in which an expert trains: autocast to bfloat16, or nothing for float32."""
    return torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)


class Frozen(nn.Module):
    """A frozen copy of a model, which takes and returns float32.

    Args:
        model: model whose weights are copied. Its memory format becomes channels_last.
        dtype: dtype of the copy.
    """

    def __init__(self, model: nn.Module, dtype: Dtype):
        super().__init__()
        self.dtype = best(dtype)
        self.copy = expert.FrozenCopy(model.to(memory_format=expert.LAST), dtype=self.dtype)
        self.model = self.copy.model

    def train(self, mode: bool = True) -> Frozen:
        """Give the copy the present weights of the model, whenever a loop turns to the evaluation mode."""
        self.training = mode
        if not mode:
            self.copy.refresh()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x.to(self.dtype, memory_format=expert.LAST)).float()


#: What a person must write for a frozen copy.
WRITTEN = (fastest, best, Frozen, expert.FrozenCopy, expert.pairs, expert._fused)
