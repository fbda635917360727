"""The ops' benchmarks: one file per op, each a list of the inputs that users have.

A file has SHAPES, and larger shapes for GPUs in LARGE, the largest first. It has a function ``case(shape, dtype,
variant)``, which is called with every shape and with every pair in KINDS; a file without KINDS has no variants. If not
every shape has every kind, the file has a function ``cases(shapes)`` in place of these.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module

import torch
from torch import Tensor

#: The measured ops, in the order of the tables; some have a kernel only on a GPU.
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
    """An op at a shape, with its least work: bytes read and written once, and arithmetic.

    Attributes:
        inputs: makes tensors on torch's default device; a surrounding graph feeds the first.
        call: the public function.
        differentiable: positions of the inputs that get a gradient.
        slack: factor on the usual error by which contestants may differ.
        work: for each direction the bytes and the FLOP, as formulas of ``symbols``, the elements n and their bytes s.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    inputs: Callable[[], tuple[Tensor, ...]]
    call: Callable[..., Tensor | tuple[Tensor, ...]]
    work: Mapping[str, tuple[str, str]]
    variant: str = ""
    differentiable: tuple[int, ...] = ()
    symbols: Mapping[str, int] = field(default_factory=dict)
    slack: float = 1.0

    @property
    def named(self) -> dict[str, str]:
        """The columns of a table that tell it from the op's other cases."""
        dtype = str(self.dtype).removeprefix("torch.")
        return {"variant": self.variant, "shape": "x".join(map(str, self.shape)), "dtype": dtype}

    @property
    def directions(self) -> tuple[str, ...]:
        return ("forward", "backward") if self.differentiable else ("forward",)

    def count(self, what: str, direction: str) -> int:
        """The ``bytes`` or ``flops`` as a number."""
        symbols = {"n": math.prod(self.shape), "s": self.dtype.itemsize, **self.symbols}
        return int(eval(self.formula(what, direction), {"__builtins__": {}}, symbols))

    def formula(self, what: str, direction: str) -> str:
        """The formula of ``bytes`` or ``flops``."""
        return self.work[direction][("bytes", "flops").index(what)]


def kinds(*variants: str) -> tuple[tuple[torch.dtype, str], ...]:
    """Every variant in every dtype."""
    return tuple((dtype, variant) for variant in variants for dtype in DTYPES)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def arranged(x: Tensor, layout: str) -> Tensor:
    """The same tensor, in the memory format ``channels_last`` if that is its layout."""
    return x.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else x


def normal(*shape: int, dtype: torch.dtype, scale: float = 1.0, layout: str = "") -> Tensor:
    return arranged((torch.randn(shape, generator=_generator(0)) * scale).to(dtype), layout)


def uniform(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=_generator(seed)).to(dtype)


def _cases(name: str, kind: str) -> list[Case]:
    module = import_module(f".{name}", __name__)
    shapes = getattr(module, "LARGE", module.SHAPES) if kind == "cuda" else module.SHAPES
    if hasattr(module, "cases"):
        return module.cases(shapes)
    every = getattr(module, "KINDS", [(dtype,) for dtype in DTYPES])
    return [module.case(shape, *one) for one in every for shape in shapes]


def registry(kind: str = "cpu") -> dict[str, Callable[[], list[Case]]]:
    """For each op, the function that makes the cases for a kind of device, cpu or cuda."""
    return {name: partial(_cases, name, kind) for name in OPS if kind == "cuda" or name not in CUDA_ONLY}
