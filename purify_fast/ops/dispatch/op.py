"""`Definition` describes an op: its handle, reference and kernels, their examples, and the calls that use them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import torch

from ... import _library, kernels
from .examples import Example

KERNELS = Path(kernels.__path__[0])

Backend = Literal["reference", "cpp", "triton"]
#: The smallest number of elements of a call that uses a kernel, by variant. None: no call uses it.
Sizes = dict[str, int | None]
#: The types of devices on which each backend computes.
BACKENDS: dict[Backend, tuple[str, ...]] = {"reference": ("cpu", "cuda"), "cpp": ("cpu",), "triton": ("cuda",)}


@dataclass(frozen=True)
class Definition:
    """The description of an op, which never records gradients itself.

    Attributes:
        name: name without the name space.
        handle: the op as PyTorch dispatches it.
        reference: the definition, in PyTorch.
        available: the backends of this installation, by device type. If there is a kernel, its backend is the last.
        examples: inputs that verify and time its kernels.
        launch: function that starts its Triton kernel, or None.
        size: function that returns the number of elements of a call, from the kernel's arguments.
        smallest: by device type and variant, the smallest number of elements with which an eager call uses the kernel
            by default. None: no call does.
        in_graphs: by device type, the variants that use the kernel also inside compiled graphs, which do not know their
            sizes.
        chosen: the smallest size that uses the kernel, by device and variant, where the kernel was verified.
    """

    #: A choice of backends changes no value (`purify_fast.model_state`).
    not_dependencies: ClassVar[frozenset[str]] = frozenset({"chosen"})

    name: str
    handle: Callable
    reference: Callable
    available: dict[str, tuple[Backend, ...]]
    examples: list[Example]
    launch: Callable | None
    size: Callable[..., int]
    smallest: dict[str, Sizes]
    in_graphs: Mapping[str, Iterable[str]]
    chosen: dict[tuple[torch.device, str], float] = field(default_factory=dict)

    def kernel(self, kind: str) -> Backend:
        """Return the backend whose kernel the handle runs on a type of device; ``reference`` if there is no kernel."""
        return self.available[kind][-1] if kind in self.available else "reference"

    def code_hash(self, kind: str) -> str:
        """Return a hash of the kernel's sources on a type of device."""
        from .records import files_digest

        definition = Path(self.reference.__code__.co_filename)
        if kind == "cuda":
            # All files, because kernels call functions of other kernels, and definitions call other definitions.
            return files_digest((*sorted(definition.parent.glob("[!_]*.py")), *sorted(KERNELS.glob("*.py"))))
        return files_digest((definition, Path(_library.path)) if _library.path else (definition,))
