"""Small inputs of an op, as its kernel takes them: what kernels are verified, tested and raced with.

Each op's module has its own. ``python -m benchmarks.gpu.every_op`` runs every op once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._pytree import tree_map_only

from ..._tensors import last_channels, memory_format

HALVES = (torch.bfloat16, torch.float16)
#: The number of samples of an example. A dimension is recognized as that of the samples if this number divides its
#: size.
ROWS = 3
#: The shapes of images of ops whose examples differ in nothing else. In the kernels for losses and for steps in a norm,
#: one program takes fewer numbers than the last two shapes have. Each shape has its `Example.gpu`, the dtypes in which
#: it verifies kernels on a GPU.
IMAGES = {((ROWS, 1, 16, 16),): "", ((ROWS, 3, 33, 31),): "h", ((ROWS, 5001),): "", ((ROWS, 16400),): "fb"}
#: The shape of the images with which kernels are raced.
RGB = (((ROWS, 3, 32, 32),),)
LAYOUTS = ("", "channels_last")


@dataclass(frozen=True)
class Example:
    """A set of shapes and settings of an op.

    Attributes:
        name: name of the example among those of its op.
        make: the kernel's arguments on the CPU, of a dtype and a seed: the same shapes and settings for every seed.
        setting: the setting that differs from the other examples.
        dtypes: the dtypes that the op takes.
        exact: every backend has the reference's bits.
        slack: error allowed beside rounding, in float32's eps of the largest output: normals differ by a few ulp.
        variant: the setting for which the op's backend is chosen separately, if there is one.
        summed: results are sums over the samples.
        jumps: rounding decides on which side of zero some numbers are, and the result jumps there, so that no bound of
            a single number's error holds. Errors are then root mean squares, and a tenth of the result's is allowed.
        gpu: the dtypes in which it verifies the op's kernel on a GPU, where kernels are compiled for each dtype and
            setting: ``f`` for float32, ``b`` for bfloat16, ``h`` for float16. The examples of an op cover all of its
            dtypes; every kernel in float32 and in one of two bytes; every setting, layout and width of a thread's
            accesses in one dtype at least.
    """

    name: str
    make: Callable[[torch.dtype, int], tuple]
    setting: tuple = ()
    dtypes: tuple[torch.dtype, ...] = (torch.float32, *HALVES)
    exact: bool = False
    slack: float = 0.0
    variant: str = ""
    summed: bool = False
    jumps: bool = False
    gpu: str = ""


def tensors(value) -> tuple[Tensor, ...]:
    """The outputs of an op that returns one tensor or several."""
    return (value,) if isinstance(value, Tensor) else tuple(value)


def to(arguments: tuple, device: torch.device) -> tuple:
    """The arguments on a device; a parameter stays a parameter."""

    def one(tensor: Tensor) -> Tensor:
        moved = tensor.to(device)
        return Parameter(moved, False) if isinstance(tensor, Parameter) else moved

    return tree_map_only(Tensor, one, arguments)


def double(arguments: tuple) -> tuple:
    """The arguments in float64, and dtypes among the settings too."""
    wider = tree_map_only(Tensor, lambda tensor: tensor.double() if tensor.is_floating_point() else tensor, arguments)
    return tuple(torch.float64 if isinstance(one, torch.dtype) else one for one in wider)


def batch_dimension(tensor: Tensor) -> int | None:
    """The dimension of the samples or their passes; None for seeds and settings, and for weights: parameters."""
    if tensor.numel() <= 1 or isinstance(tensor, Parameter):
        return None
    return 0 if tensor.shape[0] % ROWS == 0 else 1  # owners: [draws, samples, ...]


def tile(arguments, times: int):
    """The samples of an example, ``times`` over."""

    def one(tensor: Tensor) -> Tensor:
        dimension = batch_dimension(tensor)
        if dimension is None:
            return tensor
        tiled = tensor.repeat(*(times if d == dimension else 1 for d in range(tensor.dim())))
        return tiled.contiguous(memory_format=memory_format(last_channels(tensor)))

    return tree_map_only(Tensor, one, arguments)


def normal(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    """Normal numbers in float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def uniform(seed: int, *shape: int) -> Tensor:
    """Uniform numbers in float64."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of an op's arithmetic."""
    return torch.promote_types(dtype, torch.float32)


def stream(seed: int) -> tuple[Tensor, Tensor]:
    """A seed beyond 32 bits, and ids with a negative id and an id beyond 32 bits."""
    return torch.tensor([0x0123456789ABCDEF + seed]), torch.tensor([7, -1, 2**40 + 3])


def laid_out(x: Tensor, layout: str) -> Tensor:
    """Images in one of the `LAYOUTS`."""
    return x.contiguous(memory_format=torch.channels_last) if layout else x


def properties_of(setting: tuple, properties: Mapping) -> dict:
    """The properties of an example; some are functions of its setting."""
    return {name: value(*setting) if callable(value) else value for name, value in properties.items()}


def examples(
    arguments: Callable[..., tuple], settings: Mapping[tuple, str] | Iterable[tuple], **properties
) -> list[Example]:
    """Make an example of each setting.

    Args:
        arguments: makes the arguments of the kernel, as ``arguments(*setting, dtype, seed)``.
        settings: the settings of the examples, which also name them; a mapping gives each its `Example.gpu`.
        **properties: other attributes of the examples, each a value or a function of the setting.
    """
    gpu = settings if isinstance(settings, Mapping) else {}

    def word(part) -> str:
        return "x".join(map(word, part)) if isinstance(part, tuple) else str(part).removeprefix("torch.")

    return [
        Example(
            " ".join(filter(None, map(word, setting))),
            partial(arguments, *setting),
            setting,
            gpu=gpu.get(setting, ""),
            **properties_of(setting, properties),
        )
        for setting in settings
    ]
