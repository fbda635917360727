"""Small inputs of each op, in the form that its kernel accepts. They are used to verify, test and time kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._pytree import tree_map_only

from ..._tensors import last_channels, memory_format

HALVES = (torch.bfloat16, torch.float16)
#: The number of samples of an example. If the size of a tensor's first dimension is a multiple of this number, this
#: dimension is assumed to count the samples; otherwise the second dimension is.
ROWS = 3
#: Image shapes, with the dtypes of `Example.gpu`, for ops whose examples differ only in the shape. The last two shapes
#: have more numbers per image than one Triton program processes in the kernels for losses and for steps in a norm.
IMAGES = {((ROWS, 1, 16, 16),): "", ((ROWS, 3, 33, 31),): "h", ((ROWS, 5001),): "", ((ROWS, 16400),): "fb"}
LAYOUTS = ("", "channels_last")


@dataclass(frozen=True)
class Example:
    """A set of shapes and settings of an op.

    Attributes:
        name: name of the example, unique within its op.
        make: function that makes the kernel's arguments on the CPU from a dtype and a seed.
        setting: the values in which this example differs from the other examples of its op.
        dtypes: dtypes that the op supports.
        exact: whether every backend must have the same bits as the reference.
        slack: allowed error in addition to rounding, in units of float32's eps times the largest output.
        variant: setting that has a flag of its own; empty if the op has no such setting.
        jumps: whether rounding can make the result jump. Then only the root mean square of the error is bounded.
        gpu: dtypes that verify the kernel on a GPU: ``f`` for float32, ``b`` for bfloat16, ``h`` for float16. The
            examples of an op cover every kernel in float32 and in a 16-bit dtype, and every layout at least once.
    """

    name: str
    make: Callable[[torch.dtype, int], tuple]
    setting: tuple = ()
    dtypes: tuple[torch.dtype, ...] = (torch.float32, *HALVES)
    exact: bool = False
    slack: float = 0.0
    variant: str = ""
    jumps: bool = False
    gpu: str = ""


def normal(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    """Return random numbers from a normal distribution, in float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), device="cpu", dtype=torch.float64) * scale


def uniform(seed: int, *shape: int) -> Tensor:
    """Return random numbers from the uniform distribution on [0, 1), in float64."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), device="cpu", dtype=torch.float64)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of an op's arithmetic."""
    return torch.promote_types(dtype, torch.float32)


def stream(seed: int) -> tuple[Tensor, Tensor]:
    """Return a seed of more than 32 bits, and ids with a negative id and an id of more than 32 bits."""
    return torch.tensor([0x0123456789ABCDEF + seed]), torch.tensor([7, -1, 2**40 + 3])


def laid_out(x: Tensor, layout: str) -> Tensor:
    """Return images in one of the `LAYOUTS`."""
    return x.contiguous(memory_format=torch.channels_last) if layout else x


def properties_of(setting: tuple, properties: Mapping) -> dict:
    """Return the properties of an example. Some of them are functions of its setting."""
    return {name: value(*setting) if callable(value) else value for name, value in properties.items()}


def examples(arguments: Callable[..., tuple], settings: Mapping[tuple, str], **properties) -> list[Example]:
    """Make an example of each setting, with its value as `gpu`. A property may be a function of the setting."""

    def word(part) -> str:
        return "x".join(map(word, part)) if isinstance(part, tuple) else str(part).removeprefix("torch.")

    def example(setting: tuple, gpu: str) -> Example:
        name = " ".join(filter(None, map(word, setting)))
        return Example(name, partial(arguments, *setting), setting, gpu=gpu, **properties_of(setting, properties))

    return [example(setting, gpu) for setting, gpu in settings.items()]


# -- converts and repeats the tensors of examples, for verifications, timings and tests --------------------------------


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
    return tuple(torch.float64 if isinstance(value, torch.dtype) else value for value in wider)


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
