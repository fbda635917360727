"""Define the inputs with which each op is measured. Their shapes are those of real uses.

Each op has a module with these parts:

- SHAPES are the measured shapes. LARGE are the shapes for a GPU, with the largest first. Without LARGE, a GPU uses
  SHAPES.
- KINDS are the measured pairs of a dtype and a variant of the op. An op without variants has no KINDS.
- The function ``case(shape, dtype, variant)`` makes a `Case`. It is called for every combination of a shape and a pair.
- A module may have a function ``chosen(shapes)``. It returns the combinations to measure, in place of all combinations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module

import torch
from torch import Tensor

#: The measured ops, in the order of the tables. The ops in CUDA_ONLY have a kernel only on a GPU.
OPS = (
    "philox",
    "aggregate",
    "sample_latent",
    "reconstruction_loss",
    "pgd_step",
    "apgd_step",
    "random_transform",
    "stitch",
    "gated_elu",
    "contextual_attention",
    "representation_distance",
    "noisy_replay",
    "decode_samples",
    "hyperplane_projection",
    "square_proposal",
    "diffusion_step",
    "group_norm_silu",
)
CUDA_ONLY = ("decode_samples", "square_proposal")
DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Case:
    """The inputs of an op at one shape, and the bytes that the op must move.

    Attributes:
        inputs: function that makes the input tensors on torch's default device. In the style "graph" (see `timing`),
            the first input is multiplied by 2 before the call.
        call: public function of the op.
        moved: formula of the bytes, for "forward" and "backward". The bytes are those of reading every input once, and
            of writing every output once. A formula may use ``symbols``, the number n of elements, and the number s of
            bytes per element.
        differentiable: positions of the inputs that get a gradient.
        symbols: values of the symbols in the formulas.
        slack: factor by which the usual tolerance is multiplied when results are compared.
        shape: shape that the tables show. `registry` sets this field and the next two.
        dtype: dtype of the data.
        variant: name of the op's variant, or "" for an op without variants.
    """

    inputs: Callable[[], tuple[Tensor, ...]]
    call: Callable[..., Tensor | tuple[Tensor, ...]]
    moved: Mapping[str, str]
    differentiable: tuple[int, ...] = ()
    symbols: Mapping[str, int] = field(default_factory=dict)
    slack: float = 1.0
    shape: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32
    variant: str = ""

    @property
    def named(self) -> dict[str, str]:
        """The columns that distinguish this case from the other cases of the op."""
        dtype = str(self.dtype).removeprefix("torch.")
        return {"variant": self.variant, "shape": "x".join(map(str, self.shape)), "dtype": dtype}

    @property
    def directions(self) -> tuple[str, ...]:
        return ("forward", "backward") if self.differentiable else ("forward",)

    def bytes(self, direction: str) -> int:
        """Return the number of bytes that the op must move in the direction "forward" or "backward"."""
        symbols = {"n": math.prod(self.shape), "s": self.dtype.itemsize, **self.symbols}
        return int(eval(self.moved[direction], {"__builtins__": {}}, symbols))


def kinds(*variants: str) -> tuple[tuple[torch.dtype, str], ...]:
    """Return all pairs of a dtype in `DTYPES` and one of the variants."""
    return tuple((dtype, variant) for variant in variants for dtype in DTYPES)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def arranged(x: Tensor, layout: str) -> Tensor:
    """Return a tensor in the memory format channels_last if ``layout`` is "channels_last", and unchanged otherwise."""
    return x.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else x


def normal(*shape: int, dtype: torch.dtype, scale: float = 1.0, layout: str = "") -> Tensor:
    return arranged((torch.randn(shape, generator=_generator(0)) * scale).to(dtype), layout)


def uniform(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=_generator(seed)).to(dtype)


def _cases(name: str, kind: str) -> list[Case]:
    module = import_module(f".{name}", __name__)
    shapes = getattr(module, "LARGE", module.SHAPES) if kind == "cuda" else module.SHAPES
    if hasattr(module, "chosen"):
        every = module.chosen(shapes)
    else:
        every = [(shape, *kind) for kind in getattr(module, "KINDS", zip(DTYPES, strict=True)) for shape in shapes]
    named = ("shape", "dtype", "variant")
    return [replace(module.case(*one), **dict(zip(named, one, strict=False))) for one in every]


def registry(kind: str = "cpu") -> dict[str, Callable[[], list[Case]]]:
    """Return, for each op, a function that makes its cases for a type of device ("cpu" or "cuda")."""
    return {name: partial(_cases, name, kind) for name in OPS if kind == "cuda" or name not in CUDA_ONLY}
