"""How every op is registered, and which backend serves it.

One schema, one fake, one kernel per dispatch key, opaque to the compiler. Every op has two defaults on a device: for
eager calls, and inside compiled graphs, where a kernel is a wall to the compiler. Where no kernel serves, the public
function calls the reference directly, so that ``torch.compile`` can fuse it with its neighbors.

A kernel serves where it was measured ahead: on the user's machine, or on one like it that was measured for the package
(`races`), by dtype and by size. Where nothing was measured, it serves a GPU's eager calls if forward and backward
replace a dozen launches or more, and inside compiled graphs only if compilers do not fuse the reference as well. It
serves only if it was found right on this machine (`verify`).

Backends: ``reference`` (PyTorch, any device), ``cpp`` (C++, CPU) and ``triton`` (GPU).
``PURIFY_FAST_BACKEND`` forces one for its device, read once at import, or several, as ``cpp,triton``: each op takes
the first that it has. `use_backend` does so for a block.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch.utils._pytree import tree_leaves

from ... import _library
from . import races, verify
from .examples import Example
from .op import BACKENDS, SIZES, Backend, Call, Definition
from .races import Winner

KERNELS = Path(__file__).parents[2] / "kernels"


def _checked(names: str | None) -> tuple[Backend, ...]:
    chosen = tuple(dict.fromkeys(name.strip() for name in names.split(","))) if names is not None else ()
    for name in chosen:
        if name not in BACKENDS:
            known = ", ".join(BACKENDS)
            raise ValueError(f"backend {name!r} is unknown; there are {known} (use_backend, PURIFY_FAST_BACKEND)")
    return cast("tuple[Backend, ...]", chosen)


_forced: tuple[Backend, ...] = _checked(os.environ.get("PURIFY_FAST_BACKEND"))


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Within the block, ops are served by the backends of this name on their devices.

    Args:
        name: ``reference``, ``cpp`` or ``triton``, or several with commas between: of those of its device, an
            op takes the first that it has. None restores the measured default.

    Raises:
        ValueError: an unknown name. An op that has none of them raises RuntimeError when it is called.
    """
    global _forced
    before, _forced = _forced, _checked(name)
    try:
        yield
    finally:
        _forced = before


def forced_backends() -> tuple[str, ...]:
    """The backends that are forced now, by `use_backend` or the environment; empty if none is."""
    return _forced


def first_argument(x: torch.Tensor, *_) -> tuple[torch.dtype, int]:
    """The dtype and the number of elements of the first of an op's arguments."""
    return x.dtype, x.numel()


def second_argument(_, x: torch.Tensor, *__) -> tuple[torch.dtype, int]:
    """The dtype and the number of elements of the second of an op's arguments."""
    return x.dtype, x.numel()


class Op(Definition):
    """A registered op, and who serves it."""

    def __call__(self, *args, variant: str = ""):
        """Run on the arguments, the first a tensor: by the backend that serves such a call. No gradient is recorded."""
        dtype, size = self.weigh(*args)
        return (self.reference if self.plain(args[0].device, dtype, size, variant) else self.handle)(*args)

    def plain(self, device: torch.device, dtype: torch.dtype, size: int, variant: str = "") -> bool:
        """Whether the public function should call the reference directly instead of the op.

        Args:
            device: of the call.
            dtype: of the tensor that `weigh` names.
            size: the number of elements that `weigh` names.
            variant: of the call.
        """
        # what is traced may be of every size
        bits = 0 if torch.compiler.is_compiling() or type(size) is not int else size.bit_length()
        return self.serving(Call(device, variant, dtype, bits)) == "reference"

    def serving(self, call: Call) -> Backend:
        """The backend that serves a call: a kernel only once it was found right.

        Raises:
            RuntimeError: the backend that is forced on this device is missing.
        """
        forced = self.forced(call.device.type) if _forced else None
        if forced is not None:
            return forced
        if torch.compiler.is_compiling():
            return _in_graph(self.name, call.device.type, call.device.index, call.variant, call.dtype)
        return self.served.get(call) or self._choose(call)  # every eager call passes here: one look-up

    def _choose(self, call: Call) -> Backend:
        backend = self.wanted(call).backend
        if backend != "reference":
            right = verify.serves(self, call)
            if right is None:
                return "reference"
            backend = backend if right else "reference"
        self.served[call] = backend
        return backend

    def wanted(self, call: Call) -> Winner:
        """The backend that serves if it is right, and why: who won a race, else by a safe rule.

        The device need not be here: then the rule decides.
        """
        device, kernel = call.device, self.kernel(call.device.type)
        if kernel == "reference":
            return Winner(kernel, "there is no kernel")
        if device.type != "cuda" or torch.cuda.is_available():
            raced = races.winner(self, call)
            if raced is not None:
                return raced if raced.backend == kernel else raced._replace(backend="reference")
        if device.type == "cuda" and call.variant in self.serves_unraced(call.style):
            return Winner(kernel, "not raced: it replaces a dozen launches or more")
        why = "it is a few launches" if call.style == "eager" else "compilers fuse it"
        return Winner("reference", "not raced" if device.type == "cpu" else f"not raced: {why}")

    def may_serve(self, device: torch.device) -> bool:
        """Whether the kernel serves some eager calls on a device; False where a backend that is forced is missing."""
        try:
            forced = self.forced(device.type)
        except RuntimeError:
            return False
        if forced is not None:
            return forced != "reference"
        kinds = {(example.variant, dtype) for example in self.examples for dtype in example.dtypes}
        calls = (Call(device, *kind, end - 1) for kind in kinds for end in SIZES.values())
        return any(self.serving(call) != "reference" for call in calls)

    def forced(self, kind: str) -> Backend | None:
        """The backend that is forced for devices of a type; None if none is.

        Raises:
            RuntimeError: none of those that are forced exists here.
        """
        names = [name for name in _forced if kind in BACKENDS[name]]
        for name in names:
            if name in self.available[kind]:
                return name
        if not names:
            return None
        missing, there = " and ".join(map(repr, names)), ", ".join(self.available[kind])
        raise RuntimeError(f"{self.name}: backend {missing} is forced but missing; on {kind} there are: {there}")


# Decided while a graph is traced, as a call of its own that is no part of it. A graph may be of every size.
@torch._dynamo.assume_constant_result
def _in_graph(name: str, kind: str, index: int | None, variant: str, dtype: torch.dtype | None) -> Backend:
    device = torch.device(kind) if index is None else torch.device(kind, index)
    call = Call(device, variant, dtype, 0, "graph")
    return REGISTRY[name].served.get(call) or REGISTRY[name]._choose(call)


def forget() -> None:
    """Choose anew who serves what, as after a change of what is kept on the disk."""
    for op in REGISTRY.values():
        op.served.clear()


REGISTRY: dict[str, Op] = {}


def define_op(
    name: str,
    schema: str,
    *,
    reference: Callable,
    fake: Callable,
    examples: list[Example],
    raced: list[Example] | None = None,
    triton: Callable | None = None,
    replaces_many: bool | tuple[str, ...] = False,
    compiler_fuses: tuple[str, ...] = (),
    weigh: Callable[..., tuple[torch.dtype, int]] = first_argument,
    differentiable: bool = True,
) -> Op:
    """Register ``purify_fast::name``.

    Args:
        name: of the op, without the name space.
        schema: its signature, as ``torch.library.define`` takes it.
        reference: the definition, in PyTorch; runs under ``no_grad`` behind the op.
        fake: shapes and dtypes of the outputs.
        examples: small inputs, with which kernels are verified and tested.
        raced: a few samples of shapes that users have, with which kernels are raced; the examples by default.
        triton: a launcher with the op's signature, imported on first call; never sees float64.
        replaces_many: whether forward and backward together replace a dozen launches or more of the reference, or the
            variants for which they do. There the kernel serves on a GPU where nothing was raced.
        compiler_fuses: those of these variants whose reference compilers fuse as well. Inside compiled graphs the
            reference serves them.
        weigh: of the op's arguments, the dtype and the number of elements by which a race tells calls apart.
        differentiable: whether gradients pass through the public function, by a ``torch.autograd.Function`` around the
            op. The op itself records none: False says that the public function does not either, and documents it.
    """
    qualified = f"purify_fast::{name}"
    torch.library.define(qualified, schema)
    torch.library.register_fake(qualified, fake)
    plain = torch.no_grad()(reference)  # else autograd traces the fallback
    available: dict[str, tuple[Backend, ...]] = {"cpu": ("reference",), "cuda": ("reference",)}
    definition = Path(reference.__code__.co_filename)
    extension = (Path(_library.path),) if _library.path else ()
    sources = {"cpu": (definition, *extension), "cuda": (definition, *extension)}
    if _library.has_kernel(qualified, "CPU"):
        available["cpu"] += ("cpp",)
    else:
        torch.library.impl(qualified, "CPU", plain)
    torch.library.impl(qualified, "CUDA", _narrow(triton, plain) if triton is not None else plain)
    available["cuda"] += ("triton",) if triton is not None else ()
    if isinstance(triton, Launcher):
        # kernels call functions of each other's modules, and definitions of each other
        sources["cuda"] = (*sorted(definition.parent.glob("[!_]*.py")), *sorted(KERNELS.glob("*.py")))
    REGISTRY[name] = Op(
        name=name,
        handle=getattr(torch.ops.purify_fast, name).default,
        reference=reference,
        available=available,
        examples=examples,
        raced=examples if raced is None else raced,
        replaces_many=replaces_many if isinstance(replaces_many, tuple) else ("",) if replaces_many else (),
        compiler_fuses=compiler_fuses,
        sources=sources,
        launch=triton,
        weigh=weigh,
        differentiable=differentiable,
    )
    return REGISTRY[name]


def _narrow(kernel: Callable, plain: Callable) -> Callable:
    """``kernel``, but float64 goes to the reference: the Triton kernels compute in float32."""

    def launch(*args):
        double = any(isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float64 for leaf in tree_leaves(args))
        return (plain if double else kernel)(*args)

    return launch


@dataclass(frozen=True)
class Launcher:
    """A launcher of ``kernels/<module>.py``, imported when a GPU tensor first needs it.

    Attributes:
        module: the file's name.
        name: the function in it.
    """

    module: str
    name: str

    def __call__(self, *args):
        kernels = importlib.import_module(f"purify_fast.kernels.{self.module}")
        return getattr(kernels, self.name)(*args)


def wide(x: torch.Tensor) -> torch.Tensor:
    """float32 for half types, float64 stays: the precision losses, distances and aggregation are computed in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
