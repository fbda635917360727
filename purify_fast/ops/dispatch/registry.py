"""Registers ops, and chooses the backend that computes each call of an op.

A kernel is used if it was verified on this machine (`verify`), and if the call has at least the smallest size that
``purify-fast tune`` wrote on this machine, or else that is declared beside the op. If no kernel is used, the public
function calls the reference directly, which ``torch.compile`` can fuse.

The backends are ``reference`` (PyTorch, any device), ``cpp`` (C++, CPU) and ``triton`` (GPU). ``PURIFY_FAST_BACKEND``,
read once at import, forces backends, such as ``cpp,triton``.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast

import torch

from ... import _library
from .examples import Example
from .op import BACKENDS, KERNELS, Backend, Definition, Sizes


def _checked(names: str | None) -> tuple[Backend, ...]:
    chosen = tuple(dict.fromkeys(name.strip() for name in str(names).split(","))) if names is not None else ()
    if unknown := [name for name in chosen if name not in BACKENDS]:
        needs = f"backend must be one of {', '.join(BACKENDS)} (in use_backend or PURIFY_FAST_BACKEND)"
        raise ValueError(f"{needs}, got {unknown[0]!r}")
    return cast("tuple[Backend, ...]", chosen)


class _Forced(threading.local):
    """The backends that are forced in a thread. `torch.compile` can trace a change of them, not of a ContextVar."""

    # Each thread calls this once. If the attribute were the class's, the compiler would not notice a later change.
    def __init__(self, names: tuple[Backend, ...]) -> None:
        self.names = names


_forced = _Forced(_checked(os.environ.get("PURIFY_FAST_BACKEND")))


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Force the backend of the ops within the block, and of their backward passes, in the current thread only.

    The asyncio tasks of a thread share the choice, so do not await within the block.

    Args:
        name: ``reference``, ``cpp`` (on CPUs) or ``triton`` (on GPUs), or several of them separated by commas. An op
            uses the first of these that it has for the device of its tensors. With None, each op chooses its backend
            itself, as without `use_backend`.

    Raises:
        ValueError: a name is unknown. An op that has none of the backends raises RuntimeError when it is called.
    """
    before, _forced.names = _forced.names, _checked(name)
    try:
        yield
    finally:
        _forced.names = before


def forced_backends() -> tuple[Backend, ...]:
    """Return the backends that `use_backend` or the environment forces here; empty if none is forced."""
    return _forced.names


def numel_of_first(x: torch.Tensor, *_: Any) -> int:
    """Return the number of elements of a call whose first argument has them."""
    return x.numel()


class Op(Definition):
    """A registered op. Calling it chooses the backend that computes the call, and runs this backend."""

    def __call__(self, *args, variant: str = ""):
        """Choose the backend for these arguments, of which the first is a tensor, and run it."""
        # Every eager call runs these lines, so they must be fast.
        size = args[0].numel() if self.size is numel_of_first else self.size(*args)
        ready = not _forced.names and not torch.compiler.is_compiling()
        smallest = self.chosen.get((args[0].device, variant)) if ready else None
        if smallest is None:
            smallest = math.inf if self.backend_for(args[0].device, size, variant) == "reference" else 0
        return (self.reference if size < smallest else self.handle)(*args)

    def uses_reference(self, device: torch.device, size: int, variant: str = "") -> bool:
        """Return True if the public function should call the reference directly for a number of elements."""
        forced = _forced.names or torch.compiler.is_compiling()
        smallest = None if forced else self.chosen.get((device, variant))
        return self.backend_for(device, size, variant) == "reference" if smallest is None else size < smallest

    def backend_for(self, device: torch.device, size: int, variant: str = "") -> Backend:
        """Return the backend that computes a call. A kernel is used only after it was verified."""
        if (forced := self.forced(device.type)) is not None:
            return forced
        if torch.compiler.is_compiling():
            return _in_graph(self.name, device.type, device.index, variant)
        smallest = sizes_here(self.name, device)[0].get(variant)
        if smallest is None:
            self.chosen[device, variant] = math.inf
        if smallest is None or size < smallest:
            return "reference"
        # A kernel is verified once.
        from .verify import is_correct

        correct = is_correct(self, device)
        if correct is not None:
            self.chosen[device, variant] = smallest if correct else math.inf
        return self.kernel(device.type) if correct else "reference"

    def forced(self, kind: str) -> Backend | None:
        """Return the backend that is forced for a type of device, or None."""
        allowed, names = self.available.get(kind, ("reference",)), _forced.names
        usable = [name for name in names if name in allowed]
        if usable or not names:
            return usable[0] if usable else None
        missing = f"the forced backend {' or '.join(map(repr, names))} has no kernel for tensors on {kind}"
        advice = f"Add one of these, as in use_backend('{','.join(names)},reference')"
        raise RuntimeError(f"{self.name}: {missing}, allowed are: {', '.join(allowed)}. {advice}")


# Called while a graph is traced, and without a number of elements: a graph may run with inputs of any size.
def _in_graph(name: str, kind: str, index: int | None, variant: str) -> Backend:
    from .verify import is_correct

    op, device = REGISTRY[name], torch.device(kind) if index is None else torch.device(kind, index)
    used = op.kernel(kind) != "reference" and variant in op.in_graphs.get(kind, ())
    return op.kernel(kind) if used and is_correct(op, device) else "reference"


# The compiler calls the function while it traces, and stores the result. `torch.compiler.assume_constant_result` only
# sets this attribute, in every version since PyTorch 2.0, but its import is slow.
_in_graph._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def sizes_here(name: str, device: torch.device) -> tuple[Sizes, str]:
    """Return the smallest sizes of eager calls that use an op's kernel on a device, and the source of these numbers."""
    from . import records

    op = REGISTRY[name]
    if op.kernel(device.type) == "reference":
        return {}, "there is no kernel"
    # Without a GPU, the file of its machine is not known.
    if device.type != "cuda" or torch.cuda.is_available():
        tuned = records.entry_of(name, op.code_hash(device.type), device).get("tuned")
        if tuned:
            return {**op.smallest[device.type], **tuned["smallest"]}, f"tuned on this machine, {tuned['date']}"
    return op.smallest[device.type], "shipped"


REGISTRY: dict[str, Op] = {}


def define_op(
    name: str,
    schema: str,
    *,
    reference: Callable,
    fake: Callable = lambda x, *_: x.new_empty(x.shape),
    examples: list[Example],
    cpu: int | Sizes | None = 0,
    cuda: int | Sizes | None = 0,
    in_graphs: Mapping[str, Iterable[str]] | None = None,
    size: Callable[..., int] = numel_of_first,
) -> Op:
    """Register the op ``purify_fast::name``, with the kernels that are found by its name.

    The functions ``forward`` and ``backward`` of ``kernels/<name>.py`` start the Triton kernels, which never get
    float64.

    Args:
        name: name of the op, without the name space.
        schema: signature of the op, as ``torch.library.define`` accepts it.
        reference: definition, in PyTorch. The op runs it under ``no_grad``.
        fake: function that returns outputs with the right shapes and dtypes. Default: like the first argument.
        examples: small inputs that verify, time and test kernels.
        cpu: smallest number of elements with which an eager call on a CPU uses the kernel by default, for the whole op
            or by variant. 0: every call. None: no call. This number, and the next two, must agree with the committed
            times in ``benchmarks/results``: those of eager calls in ``kernels.csv``, those of graphs in ``ops.csv``.
        cuda: the same number for a GPU.
        in_graphs: by device type, the variants that use the kernel inside compiled graphs. Such a kernel must be much
            faster than the compiled reference, because a compiler cannot fuse it with its neighbors. On a GPU graphs
            were not measured: choose variants whose reference is many launches that a compiler does not fuse.
        size: function that returns the number of elements of a call, from the kernel's arguments.
    """

    def by_variant(sizes: int | Sizes | None) -> Sizes:
        return sizes if isinstance(sizes, dict) else {example.variant: sizes for example in examples}

    qualified = f"purify_fast::{name}"
    torch.library.define(qualified, schema)
    torch.library.register_fake(qualified, fake)
    # The op runs the reference if it has no kernel. Without no_grad, autograd would record the reference's operators.
    plain = torch.no_grad()(reference)
    cpp, launch = _library.has_kernel(qualified, "CPU"), _launcher(name)
    if not cpp:
        torch.library.impl(qualified, "CPU", plain)
    torch.library.impl(qualified, "CUDA", _narrow(launch, plain) if launch else plain)
    REGISTRY[name] = Op(
        name=name,
        handle=getattr(torch.ops.purify_fast, name).default,
        reference=reference,
        available={
            "cpu": ("reference", "cpp") if cpp else ("reference",),
            "cuda": ("reference", "triton") if launch else ("reference",),
        },
        examples=examples,
        launch=launch,
        size=size,
        smallest={"cpu": by_variant(cpu), "cuda": by_variant(cuda)},
        in_graphs=in_graphs or {},
    )
    return REGISTRY[name]


def _narrow(kernel: Callable, plain: Callable) -> Callable:
    """Return ``kernel``, but with the reference for float64, because the Triton kernels compute in float32."""

    def launch(*args):
        # Every eager call of a kernel runs this loop, so it must be fast. Numbers have no dtype.
        for arg in args:
            for item in arg if type(arg) is list else (arg,):
                if getattr(item, "dtype", None) is torch.float64:
                    return plain(*args)
        return kernel(*args)

    return launch


def _launcher(name: str) -> Callable | None:
    """Return a function that runs an op's Triton kernel, imported at its first call, or None if there is no kernel."""
    module = name.removesuffix("_backward")
    function = "forward" if name == module else "backward"
    if not (KERNELS / f"{module}.py").exists():
        return None
    load = functools.cache(lambda: getattr(importlib.import_module(f"purify_fast.kernels.{module}"), function))
    return lambda *args: load()(*args)


def wide(x: torch.Tensor) -> torch.Tensor:
    """Return x in the dtype for losses, distances and aggregation: float64 stays, any other dtype becomes float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
