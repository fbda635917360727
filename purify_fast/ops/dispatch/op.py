"""`Definition` describes an op: its handle, reference and kernels, and the examples that verify and race kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

import torch

from ... import _library, kernels
from .examples import Example
from .records import files_digest, runs_triton

KERNELS = Path(kernels.__path__[0])

Style = Literal["eager", "graph"]
Backend = Literal["reference", "cpp", "triton"]

#: The types of devices on which each backend computes.
BACKENDS: dict[Backend, tuple[str, ...]] = {"reference": ("cpu", "cuda"), "cpp": ("cpu",), "triton": ("cuda",)}
#: The sizes that are raced separately. A call has the first size whose limit is above the bit length of the call's
#: number of elements: a call with fewer than 2 ** 16 elements is small, and a call with 2 ** 20 or more is large.
SIZES = {"small": 17, "medium": 21, "large": 1000}


class Call(NamedTuple):
    """The facts of a call that determine which backend computes it.

    ``variant`` is a setting of the op that is raced separately, or empty. ``dtype`` and ``bits``, the bit length of the
    number of elements, belong to the tensor that `Definition.size_key` chooses; None and 0 stand for every call.
    ``style`` is an eager call, or a call inside a compiled graph.
    """

    device: torch.device
    variant: str = ""
    dtype: torch.dtype | None = None
    bits: int = 0
    style: Style = "eager"

    @property
    def cell(self) -> str:
        """Return the call's name in a file with the times of kernels and references: variant, dtype and size."""
        dtype = str(self.dtype).removeprefix("torch.") if self.dtype else ""
        return " ".join(filter(None, (self.variant, dtype, size_of(self.bits))))


def size_of(bits: int) -> str:
    """Return the name of a call's size, from the bit length of its number of elements. For 0, return an empty text."""
    return next(name for name, end in SIZES.items() if bits < end) if bits else ""


def first_argument(x: torch.Tensor, *_) -> tuple[torch.dtype, int]:
    """Return the dtype and the number of elements of an op's first argument."""
    return x.dtype, x.numel()


@dataclass(frozen=True)
class Definition:
    """The description of an op.

    Attributes:
        name: name without the name space.
        handle: the op as PyTorch dispatches it.
        reference: the definition, in PyTorch.
        available: the backends of this installation, by device type. If there is a kernel, its backend is the last.
        examples: inputs that verify its kernels.
        raced: inputs with which its kernels are raced.
        launch: function that starts its Triton kernel, or None.
        few_launches: variants whose reference has fewer than ten launches, forward and backward together. Without
            races, a GPU uses the reference for these variants, and the kernel for all others.
        compiler_fuses: further variants, whose reference is used inside compiled graphs; ``""``: an op without
            variants.
        size_key: function that returns, from the kernel's arguments, dtype and size by which races distinguish calls.
        differentiable: whether the public function has gradients. The op itself never records gradients.
        served: the backend that was chosen for each call so far.
    """

    #: A choice of backends changes no value (`purify_fast.model_state`).
    not_dependencies: ClassVar[frozenset[str]] = frozenset({"served"})

    name: str
    handle: Callable
    reference: Callable
    available: dict[str, tuple[Backend, ...]]
    examples: list[Example]
    raced: list[Example]
    launch: Callable | None
    few_launches: tuple[str, ...] = ()
    compiler_fuses: tuple[str, ...] = ()
    size_key: Callable[..., tuple[torch.dtype, int]] = first_argument
    differentiable: bool = True
    served: dict[Call, Backend] = field(default_factory=dict)

    def kernel(self, kind: str) -> Backend:
        """Return the backend whose kernel the handle runs on a type of device; ``reference`` if there is no kernel."""
        return self.available[kind][-1] if kind in self.available else "reference"

    def code_hash(self, kind: str) -> str:
        """Return a hash of the kernel's sources on a type of device."""
        definition = Path(self.reference.__code__.co_filename)
        if runs_triton(kind):
            # All files, because kernels call functions of other kernels, and definitions call other definitions.
            return files_digest((*sorted(definition.parent.glob("[!_]*.py")), *sorted(KERNELS.glob("*.py"))))
        return files_digest((definition, Path(_library.path)) if _library.path else (definition,))

    def calls(self, device: torch.device, style: Style = "eager") -> list[Call]:
        """Return a call of each variant, dtype and size on a device; in compiled graphs the size is not known."""
        kinds = dict.fromkeys((example.variant, dtype) for example in self.examples for dtype in example.dtypes)
        bits = [end - 1 for end in SIZES.values()] if style == "eager" else [0]
        return [Call(device, *kind, one, style) for kind in kinds for one in bits]

    def serves_unraced(self, style: Style) -> tuple[str, ...]:
        """Return the variants whose kernel a GPU uses if nothing was raced."""
        if self.launch is None:
            return ()
        references = self.few_launches if style == "eager" else self.few_launches + self.compiler_fuses
        variants = dict.fromkeys(example.variant for example in self.examples)
        return tuple(variant for variant in variants if variant not in references)
