"""Converts and repeats the tensors of examples, for verifications, timings and tests."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._pytree import tree_map_only

from ..._tensors import last_channels, memory_format
from .examples import ROWS


def tensors(value) -> tuple[Tensor, ...]:
    """Return the outputs of an op that returns one tensor or several, as a tuple."""
    return (value,) if isinstance(value, Tensor) else tuple(value)


def to(arguments: tuple, device: torch.device) -> tuple:
    """Return the arguments on a device. Parameters remain parameters."""

    def one(tensor: Tensor) -> Tensor:
        moved = tensor.to(device)
        return Parameter(moved, False) if isinstance(tensor, Parameter) else moved

    return tree_map_only(Tensor, one, arguments)


def double(arguments: tuple) -> tuple:
    """Return the arguments in float64. Settings that are dtypes become float64 too."""
    wider = tree_map_only(Tensor, lambda tensor: tensor.double() if tensor.is_floating_point() else tensor, arguments)
    return tuple(torch.float64 if isinstance(one, torch.dtype) else one for one in wider)


def batch_dimension(tensor: Tensor) -> int | None:
    """Return the dimension that counts the samples; None for parameters (weights) and tensors of one number (seeds)."""
    if tensor.numel() <= 1 or isinstance(tensor, Parameter):
        return None
    # The argument `owners` of `stitch` and `random_transform` is [draws, samples, ...]. The coefficients [8] of
    # `diffusion_step` are the same for all samples. They have no dimension 1, so `tile` does not repeat them.
    return 0 if tensor.shape[0] % ROWS == 0 else 1


def tile(arguments, times: int):
    """Repeat the samples of an example ``times`` times."""

    def one(tensor: Tensor) -> Tensor:
        dimension = batch_dimension(tensor)
        if dimension is None:
            return tensor
        tiled = tensor.repeat(*(times if d == dimension else 1 for d in range(tensor.dim())))
        return tiled.contiguous(memory_format=memory_format(last_channels(tensor)))

    return tree_map_only(Tensor, one, arguments)
