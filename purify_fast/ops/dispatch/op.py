"""The parts of an op: its handle, its definition, its kernels, and the examples to verify and race them with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from .examples import Example
from .records import files_digest

Style = Literal["eager", "graph"]
Backend = Literal["reference", "cpp", "triton"]

#: The types of devices on which each backend computes.
BACKENDS: dict[Backend, tuple[str, ...]] = {"reference": ("cpu", "cuda"), "cpp": ("cpu",), "triton": ("cuda",)}
#: The sizes that are raced. A call belongs to the first size whose number here is above the bit length of its number of
#: elements: calls with 2 ** 16 elements or more are not small, and calls with 2 ** 20 or more are large.
SIZES = {"small": 17, "medium": 21, "large": 1000}


class Call(NamedTuple):
    """The facts of a call that decide which backend serves it.

    Attributes:
        device: device of its tensors.
        variant: a setting of the op that is raced on its own; empty for an op that has none.
        dtype: dtype of the tensor that `Definition.size_key` chooses; None for calls of every dtype.
        bits: bits of that tensor's number of elements; 0 for calls of every size.
        style: an eager call, or one inside a compiled graph.
    """

    device: torch.device
    variant: str = ""
    dtype: torch.dtype | None = None
    bits: int = 0
    style: Style = "eager"

    @property
    def cell(self) -> str:
        """The call's name in a file of races: variant, dtype and size."""
        dtype = str(self.dtype).removeprefix("torch.") if self.dtype else ""
        return " ".join(filter(None, (self.variant, dtype, size_of(self.bits))))


def call_of(name: str, device: torch.device, style: Style) -> Call:
    """The call that a file of races names by `Call.cell`."""
    words = name.split()
    size = words.pop() if words and words[-1] in SIZES else ""
    dtype = getattr(torch, words[-1], None) if words else None
    dtype = dtype if isinstance(dtype, torch.dtype) else None
    variant = " ".join(words[: len(words) - (dtype is not None)])
    return Call(device, variant, dtype, SIZES[size] - 1 if size else 0, style)


def size_of(bits: int) -> str:
    """The bucket of a number of elements by its bits; empty for 0 bits, which stand for every size."""
    return next(name for name, end in SIZES.items() if bits < end) if bits else ""


def first_argument(x: torch.Tensor, *_) -> tuple[torch.dtype, int]:
    """The dtype and the number of elements of the first of an op's arguments."""
    return x.dtype, x.numel()


@dataclass(frozen=True)
class Definition:
    """The description of an op.

    Attributes:
        name: name without the name space.
        handle: the op as PyTorch dispatches it.
        reference: the definition.
        available: device type to the backends that exist here, the kernel last.
        examples: the inputs that verify its kernels.
        raced: the inputs that race its kernels: a few samples of shapes that users have.
        sources: device type to the files that its kernel there is built from.
        launch: starts its Triton kernel; None where it has none.
        replaces_many: the variants for which forward and backward together replace a dozen launches or more of the
            reference; ``""`` stands for an op without variants. For these variants the kernel serves on a GPU if
            nothing was raced.
        compiler_fuses: those of these variants whose reference is fused by compilers too. Inside compiled graphs the
            reference serves them.
        size_key: the dtype and the number of elements by which a race distinguishes calls, from the kernel's arguments.
        differentiable: whether gradients pass through the public function, by a ``torch.autograd.Function`` around the
            op. The op itself records none: False says that the public function does not either, and documents it.
        served: the backends that served calls so far.
    """

    name: str
    handle: Callable
    reference: Callable
    available: dict[str, tuple[Backend, ...]]
    examples: list[Example]
    raced: list[Example]
    sources: dict[str, tuple[Path, ...]]
    launch: Callable | None
    replaces_many: tuple[str, ...] = ()
    compiler_fuses: tuple[str, ...] = ()
    size_key: Callable[..., tuple[torch.dtype, int]] = first_argument
    differentiable: bool = True
    served: dict[Call, Backend] = field(default_factory=dict)

    def kernel(self, kind: str) -> Backend:
        """The backend whose kernel the handle runs on devices of a type; ``reference`` where there is none."""
        return self.available[kind][-1] if kind in self.available else "reference"

    def code_hash(self, kind: str) -> str:
        """A hash of the sources of the kernel on devices of a type: verdicts and races hold for these sources."""
        return files_digest(self.sources.get(kind, ()))

    def serves_unraced(self, style: Style) -> tuple[str, ...]:
        """The variants whose kernel serves on a GPU where nothing was raced."""
        return tuple(name for name in self.replaces_many if style == "eager" or name not in self.compiler_fuses)
