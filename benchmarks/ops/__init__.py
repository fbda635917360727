"""The ops' benchmarks: one file per op, each a list of the inputs that users have.

A file has ``cases(shapes=SHAPES)``, and for GPUs, which these would not fill, other shapes in LARGE, the largest first.
DEVICES are those that have a kernel, if not all do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One op at one shape, and what it cannot do without: bytes read and written once, and arithmetic.

    Attributes:
        inputs: tensors on torch's default device; the first is what a surrounding graph feeds.
        slack: how many times the usual error contestants may differ by.
        bytes, flops: by direction; formulas of ``symbols``, or numbers.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    inputs: Callable[[], tuple[Tensor, ...]]
    call: Callable[..., Tensor | tuple[Tensor, ...]]  # the public function
    bytes: Mapping[str, str | int]
    flops: Mapping[str, str | int]
    variant: str = ""
    differentiable: tuple[int, ...] = field(default=())  # positions of the inputs that get a gradient
    symbols: Mapping[str, int] = field(default_factory=dict)
    slack: float = 1.0

    @property
    def directions(self) -> tuple[str, ...]:
        return ("forward", "backward") if self.differentiable else ("forward",)

    def count(self, what: str, direction: str) -> int:
        """``bytes`` or ``flops`` as a number."""
        formula = getattr(self, what)[direction]
        return formula if isinstance(formula, int) else int(eval(formula, {"__builtins__": {}}, dict(self.symbols)))


def _generator(seed: int) -> torch.Generator:
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def normal(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, generator=_generator(0)) * scale).to(dtype)


def uniform(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=_generator(seed)).to(dtype)


def registry(kind: str = "cpu") -> dict[str, Callable[[], list[Case]]]:
    """By op, what makes the cases for devices of a kind, cpu or cuda."""
    from . import (
        aggregate,
        apgd_step,
        contextual_attention,
        decode_samples,
        gated_elu,
        hyperplane_projection,
        noisy_replay,
        pgd_step,
        philox,
        random_transform,
        reconstruction_loss,
        representation_distance,
        sample_latent,
        square_proposal,
        stitch,
    )

    modules = (
        philox, aggregate, sample_latent, reconstruction_loss, pgd_step, apgd_step, random_transform, stitch, gated_elu,
        contextual_attention, representation_distance, noisy_replay, decode_samples, hyperplane_projection,
        square_proposal,
    )  # fmt: skip
    return {
        module.__name__.rpartition(".")[2]: partial(module.cases, module.LARGE)
        if kind == "cuda" and hasattr(module, "LARGE")
        else module.cases
        for module in modules
        if kind in getattr(module, "DEVICES", ("cpu", "cuda"))
    }
