"""The changes that an expert makes in the loops of other people, with PyTorch's public functions alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..pipelines import expert
from . import Dtype


def best(dtype: Dtype) -> torch.dtype:
    """Return a dtype. For "auto", it is bfloat16 if the processor multiplies bfloat16 fast."""
    if isinstance(dtype, torch.dtype):
        return dtype
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


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
WRITTEN = (best, Frozen, expert.FrozenCopy, expert.pairs, expert._fused)
