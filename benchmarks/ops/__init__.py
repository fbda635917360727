"""The ops' benchmarks: one file per op, each a list of the inputs that users have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One op at one shape, and what it cannot do without: bytes read and written once, and arithmetic."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    inputs: Callable[[], tuple[Tensor, ...]]  # made on the CPU; the first is what a surrounding graph feeds
    call: Callable[..., Tensor | tuple[Tensor, ...]]  # the public function
    bytes: dict[str, int]  # by direction
    flops: dict[str, int]
    variant: str = ""
    differentiable: tuple[int, ...] = field(default=())  # positions of the inputs that get a gradient

    @property
    def directions(self) -> tuple[str, ...]:
        return ("forward", "backward") if self.differentiable else ("forward",)


def normal(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * scale).to(dtype)


def uniform(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def registry() -> dict[str, Callable[[], list[Case]]]:
    from . import (
        aggregate,
        apgd_step,
        contextual_attention,
        gated_elu,
        noisy_replay,
        pgd_step,
        philox,
        random_transform,
        reconstruction_loss,
        representation_distance,
        sample_latent,
        stitch,
    )

    modules = (
        philox, aggregate, sample_latent, reconstruction_loss, pgd_step, apgd_step, random_transform, stitch, gated_elu,
        contextual_attention, representation_distance, noisy_replay,
    )  # fmt: skip
    return {module.__name__.rpartition(".")[2]: module.cases for module in modules}
