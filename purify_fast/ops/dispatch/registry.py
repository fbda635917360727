"""The registration of ops, and the choice of the backend that serves (computes) the calls of each.

An op has a schema, a fake that computes only shapes and dtypes, and a kernel for each dispatch key. It is opaque to the
compiler. Every op has two defaults on a device: for eager calls, and inside compiled graphs, where the compiler cannot
fuse a kernel with its neighbors. If no kernel serves, the public function calls the reference directly, so that
``torch.compile`` can fuse it.

A kernel serves where it was measured to be faster, by dtype and by size: on the user's machine, or on a similar one
that was measured for the package (`races`). Where nothing was measured, it serves a GPU's eager calls if forward and
backward replace a dozen launches or more, and inside compiled graphs only if compilers do not fuse the reference as
well. It serves only if it was found right on this machine (`verify`).

Backends: ``reference`` (PyTorch, any device), ``cpp`` (C++, CPU) and ``triton`` (GPU).
``PURIFY_FAST_BACKEND``, which is read once at import, forces one, or several, as ``cpp,triton``: each op takes the
first that it has for its tensors, and raises an error if it has none. `use_backend` does so for a block.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch.utils._pytree import tree_leaves

from ... import _library, kernels
from ..._compiler import constant_in_graphs
from . import races, verify
from .examples import Example, normal, properties_of, tensors
from .op import BACKENDS, SIZES, Backend, Call, Definition, first_argument
from .races import Winner

KERNELS = Path(kernels.__path__[0])


def _checked(names: str | None) -> tuple[Backend, ...]:
    chosen = tuple(dict.fromkeys(name.strip() for name in names.split(","))) if names is not None else ()
    for name in chosen:
        if name not in BACKENDS:
            known = ", ".join(BACKENDS)
            raise ValueError(f"backend must be one of {known} (in use_backend or PURIFY_FAST_BACKEND), got {name!r}")
    return cast("tuple[Backend, ...]", chosen)


_forced: tuple[Backend, ...] = _checked(os.environ.get("PURIFY_FAST_BACKEND"))


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Within the block, the backend of this name serves ops.

    Args:
        name: ``reference``, ``cpp`` (on CPUs) or ``triton`` (on GPUs), or several with commas between: an op takes the
            first that it has for its tensors' device. None restores the measured default.

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


def second_argument(_, x: torch.Tensor, *__) -> tuple[torch.dtype, int]:
    """The dtype and the number of elements of the second of an op's arguments."""
    return x.dtype, x.numel()


def like_first(x: torch.Tensor, *_: Any) -> torch.Tensor:
    """The fake of an op whose result is as its first argument, and contiguous."""
    return x.new_empty(x.shape)


def like_second(_: torch.Tensor, x: torch.Tensor, *__: Any) -> torch.Tensor:
    """The fake of an op whose result is as its second argument, and contiguous."""
    return x.new_empty(x.shape)


class Op(Definition):
    """A registered op, and the choice of the backend that serves it."""

    def __call__(self, *args, variant: str = ""):
        """Choose the backend for these arguments, the first a tensor, and run it. No gradient is recorded."""
        dtype, size = self.size_key(*args)
        return (self.reference if self.uses_reference(args[0].device, dtype, size, variant) else self.handle)(*args)

    def uses_reference(self, device: torch.device, dtype: torch.dtype, size: int, variant: str = "") -> bool:
        """Tell whether the public function should call the reference directly; `size_key` gives dtype and size."""
        # A traced call may get any size later, so its size does not decide.
        bits = 0 if torch.compiler.is_compiling() or type(size) is not int else size.bit_length()
        return self.serving(Call(device, variant, dtype, bits)) == "reference"

    def serving(self, call: Call) -> Backend:
        """The backend that serves a call; a kernel serves only once it was verified.

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
        """The backend that serves if it is right, and the reason: it won a race, or a safe rule chose it.

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
        """Tell whether the kernel serves some eager calls on a device; False if a forced backend is missing."""
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
            RuntimeError: the op has none of the forced ones on such a device.
        """
        there = self.available.get(kind, ("reference",))
        for name in _forced:
            if name in there:
                return name
        if not _forced:
            return None
        missing = " or ".join(map(repr, _forced))
        raise RuntimeError(
            f"{self.name}: the forced backend {missing} has no kernel for tensors on {kind}, allowed are: "
            f"{', '.join(there)}. Add one of these, as in use_backend('{','.join(_forced)},reference')"
        )


# The backend is chosen while a graph is traced, in a call that does not become a part of the graph. The size does not
# decide, because a graph may run with any size.
@constant_in_graphs
def _in_graph(name: str, kind: str, index: int | None, variant: str, dtype: torch.dtype | None) -> Backend:
    device = torch.device(kind) if index is None else torch.device(kind, index)
    call = Call(device, variant, dtype, 0, "graph")
    return REGISTRY[name].served.get(call) or REGISTRY[name]._choose(call)


def forget_choices() -> None:
    """Choose all backends again, as after a change of the files on the disk."""
    for op in REGISTRY.values():
        op.served.clear()


REGISTRY: dict[str, Op] = {}


def define_op(
    name: str,
    schema: str,
    *,
    reference: Callable,
    fake: Callable = like_first,
    examples: list[Example],
    raced: list[Example] | None = None,
    triton: Callable | None = None,
    replaces_many: tuple[str, ...] = (),
    compiler_fuses: tuple[str, ...] = (),
    size_key: Callable[..., tuple[torch.dtype, int]] = first_argument,
    differentiable: bool = True,
) -> Op:
    """Register ``purify_fast::name``.

    Args:
        name: name of the op, without the name space.
        schema: its signature, as ``torch.library.define`` takes it.
        reference: the definition, in PyTorch; runs under ``no_grad`` behind the op.
        fake: shapes and dtypes of the outputs; by default those of the first argument, contiguous.
        examples: small inputs, with which kernels are verified and tested.
        raced: a few samples of shapes that users have, with which kernels are raced; the examples by default.
        triton: a launcher with the op's signature, imported on first call; never sees float64.
        replaces_many: see `Definition`, as for the arguments below.
        compiler_fuses: those of them that compilers fuse as well.
        size_key: the dtype and size by which races distinguish calls.
        differentiable: whether gradients pass through the public function.
    """
    qualified = f"purify_fast::{name}"
    torch.library.define(qualified, schema)
    torch.library.register_fake(qualified, fake)
    plain = torch.no_grad()(reference)  # without this, autograd traces the fallback
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
        # All files count, because kernels call functions of each other's modules, and definitions call each other.
        sources["cuda"] = (*sorted(definition.parent.glob("[!_]*.py")), *sorted(KERNELS.glob("*.py")))
    REGISTRY[name] = Op(
        name=name,
        handle=getattr(torch.ops.purify_fast, name).default,
        reference=reference,
        available=available,
        examples=examples,
        raced=raced or examples,
        sources=sources,
        launch=triton,
        replaces_many=replaces_many,
        compiler_fuses=compiler_fuses,
        size_key=size_key,
        differentiable=differentiable,
    )
    return REGISTRY[name]


def define_backward(
    op: Op,
    schema: str,
    *,
    reference: Callable,
    fake: Callable = like_second,
    size_key: Callable[..., tuple[torch.dtype, int]] = first_argument,
    saved: Callable[[tuple, tuple], tuple] = lambda inputs, outputs: inputs,
    constants: int = 0,
    changes: dict[str, Any] | None = None,
) -> Op:
    """Register the backward of an op, which is verified, raced and served as the op is.

    Args:
        op: the op whose backward it is.
        schema: its signature.
        reference: its definition, in PyTorch.
        fake: shapes and dtypes of the gradients; by default those of the second argument, contiguous.
        size_key: the dtype and size by which races distinguish calls.
        saved: the arguments beside the gradients, from the inputs and the outputs of the op; see `differentiable`.
        constants: how many of the last outputs have no gradient.
        changes: properties of its examples that differ from the op's, as in `examples`.
    """

    def derived(example: Example) -> Example:
        def make(dtype: torch.dtype, seed: int) -> tuple:
            inputs = example.make(dtype, seed)
            outputs = tensors(op.reference(*inputs))
            changing = enumerate(outputs[: len(outputs) - constants])
            grads = [torch.empty_like(one).copy_(normal(seed + 500 + i, *one.shape)) for i, one in changing]
            return *grads, *saved(inputs, outputs)

        return replace(example, make=make, **properties_of(example.setting, changes or {}))

    return define_op(
        f"{op.name}_backward",
        schema,
        reference=reference,
        fake=fake,
        examples=[derived(example) for example in op.examples],
        raced=[derived(example) for example in op.raced],
        triton=Launcher(op.launch.module, "backward") if isinstance(op.launch, Launcher) else None,
        replaces_many=op.replaces_many,
        compiler_fuses=op.compiler_fuses,
        size_key=size_key,
    )


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
        module = importlib.import_module(f"purify_fast.kernels.{self.module}")
        return getattr(module, self.name)(*args)


def wide(x: torch.Tensor) -> torch.Tensor:
    """float32 for half types, float64 stays: the precision losses, distances and aggregation are computed in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
