"""Registers ops, and chooses the backend that computes each call of an op (the backend that serves the call).

A kernel is used if it was verified on this machine (`verify`) and measured to be faster for the dtype and the size of
the call (`races`). Without a measurement, a GPU uses the kernel for eager calls if the reference has at least ten
launches, forward and backward together; inside compiled graphs, compilers must also not fuse the reference. If no
kernel is used, the public function calls the reference directly, which ``torch.compile`` can fuse.

The backends are ``reference`` (PyTorch, any device), ``cpp`` (C++, CPU) and ``triton`` (GPU). ``PURIFY_FAST_BACKEND``,
read once at import, forces backends, such as ``cpp,triton``.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, cast

import torch

from ... import _library
from ..._tensors import text_hash
from . import races, verify
from .examples import Example, normal, properties_of, tensors
from .op import BACKENDS, KERNELS, Backend, Call, Definition, first_argument
from .races import Winner
from .records import runs_triton


def _checked(names: str | None) -> tuple[Backend, ...]:
    chosen = tuple(dict.fromkeys(name.strip() for name in str(names).split(","))) if names is not None else ()
    for name in chosen:
        if name not in BACKENDS:
            known = ", ".join(BACKENDS)
            raise ValueError(f"backend must be one of {known} (in use_backend or PURIFY_FAST_BACKEND), got {name!r}")
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


def second_argument(_, x: torch.Tensor, *__) -> tuple[torch.dtype, int]:
    """Return the dtype and the number of elements of an op's second argument."""
    return x.dtype, x.numel()


def like_first(x: torch.Tensor, *_: Any) -> torch.Tensor:
    """Compute the fake of an op whose result has the shape and dtype of its first argument, and is contiguous."""
    return x.new_empty(x.shape)


def like_second(_: torch.Tensor, x: torch.Tensor, *__: Any) -> torch.Tensor:
    """Compute the fake of an op whose result has the shape and dtype of its second argument, and is contiguous."""
    return x.new_empty(x.shape)


class Op(Definition):
    """A registered op. Calling it chooses the backend that computes the call, and runs this backend."""

    def __call__(self, *args, variant: str = ""):
        """Choose the backend for these arguments, of which the first is a tensor, and run it."""
        dtype, size = self.size_key(*args)
        return (self.reference if self.uses_reference(args[0].device, dtype, size, variant) else self.handle)(*args)

    def uses_reference(self, device: torch.device, dtype: torch.dtype, size: int, variant: str = "") -> bool:
        """Return True if the public function should call the reference directly. `size_key` returns dtype and size."""
        compiling = torch.compiler.is_compiling()
        # A traced call may have another size later, so the backend must not depend on the size.
        bits = 0 if compiling or type(size) is not int else size.bit_length()
        # Every eager call runs this line, so it must be fast. A tuple finds the `Call` with the same values.
        backend = None if compiling or _forced.names else self.served.get((device, variant, dtype, bits, "eager"))  # type: ignore[call-overload]
        return (backend or self.serving(Call(device, variant, dtype, bits))) == "reference"

    def serving(self, call: Call) -> Backend:
        """Return the backend that computes a call. A kernel is used only after it was verified."""
        forced = self.forced(call.device.type) if _forced.names else None
        if forced is not None:
            return forced
        if torch.compiler.is_compiling():
            return _in_graph(self.name, call.device.type, call.device.index, call.variant, call.dtype)
        return self.served.get(call) or self._choose(call)

    def _choose(self, call: Call) -> Backend:
        backend = self.wanted(call).backend
        if backend != "reference":
            right = verify.serves(self, call.device)
            if right is None:
                return "reference"
            backend = backend if right else "reference"
        self.served[call] = backend
        return backend

    def wanted(self, call: Call) -> Winner:
        """Return the backend to use if it is correct, and the reason: a race, or else a default rule."""
        device, kernel = call.device, self.kernel(call.device.type)
        if kernel == "reference":
            return Winner(kernel, "there is no kernel")
        if not runs_triton(device.type) or torch.cuda.is_available():
            raced = races.winner(self, call)
            if raced is not None:
                return raced
        if runs_triton(device.type) and call.variant in self.serves_unraced(call.style):
            return Winner(kernel, "not raced: the kernel replaces at least ten launches")
        why = "the reference is only a few launches" if call.style == "eager" else "compilers fuse the reference"
        return Winner("reference", "not raced" if device.type == "cpu" else f"not raced: {why}")

    def may_serve(self, device: torch.device) -> bool:
        """Return True if some eager calls on a device use the kernel, which no forced backends exclude."""
        # A forced backend that the op does not have raises an error.
        with contextlib.suppress(RuntimeError):
            return any(self.serving(call) != "reference" for call in self.calls(device))
        return False

    def forced(self, kind: str) -> Backend | None:
        """Return the backend that is forced for a type of device, or None."""
        there, wanted = self.available.get(kind, ("reference",)), _forced.names
        for name in wanted:
            if name in there:
                return name
        if not wanted:
            return None
        missing = " or ".join(map(repr, wanted))
        raise RuntimeError(
            f"{self.name}: the forced backend {missing} has no kernel for tensors on {kind}, allowed are: "
            f"{', '.join(there)}. Add one of these, as in use_backend('{','.join(wanted)},reference')"
        )


# Called while a graph is traced, and without a number of elements: a graph may run with inputs of any size.
def _in_graph(name: str, kind: str, index: int | None, variant: str, dtype: torch.dtype | None) -> Backend:
    device = torch.device(kind) if index is None else torch.device(kind, index)
    call = Call(device, variant, dtype, 0, "graph")
    return REGISTRY[name].served.get(call) or REGISTRY[name]._choose(call)


# The compiler calls the function while it traces, and stores the result. `torch.compiler.assume_constant_result` only
# sets this attribute, in every version since PyTorch 2.0, but its import is slow.
_in_graph._dynamo_marked_constant = True  # type: ignore[attr-defined]


def kernels_now(device: torch.device) -> str:
    """Return a hash of the kernels, and the choices among them, that may change the bits of results on a device.

    Args:
        device: the device on which a run computes.
    """
    # Without a GPU the races of its kernels cannot be read, and none of the kernels is used.
    here = not runs_triton(device.type) or torch.cuda.is_available()
    chosen = {
        name: [op.kernel(device.type), [entry["cells"] for entry, _ in races.entries_of(op, device)] if here else []]
        for name, op in REGISTRY.items()
        if op.kernel(device.type) != "reference" and not all(example.exact for example in op.examples)
    }
    return text_hash(json.dumps([device.type, _forced.names, chosen], sort_keys=True)).hexdigest()


def forget_choices() -> None:
    """Choose all backends again, for example after the files on the disk have changed."""
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
    few_launches: tuple[str, ...] = (),
    compiler_fuses: tuple[str, ...] = (),
    size_key: Callable[..., tuple[torch.dtype, int]] = first_argument,
    differentiable: bool = True,
) -> Op:
    """Register the op ``purify_fast::name``, with the kernels that are found by its name.

    The functions ``forward`` and ``backward`` of ``kernels/<name>.py`` start the Triton kernels, which never get
    float64.

    Args:
        name: name of the op, without the name space.
        schema: signature of the op, as ``torch.library.define`` accepts it.
        reference: definition, in PyTorch. The op runs it under ``no_grad``.
        fake: function that returns outputs with the right shapes and dtypes. Default: like the first argument.
        examples: small inputs that verify and test kernels.
        raced: inputs with realistic shapes, but only a few samples, with which kernels are raced; None: the examples.
        few_launches: variants for which the reference is only a few launches; see `Definition`.
        compiler_fuses: further variants, whose reference a compiler can fuse; see `Definition`.
        size_key: function that returns the dtype and the size by which races distinguish calls.
        differentiable: whether the public function has gradients.
    """
    qualified = f"purify_fast::{name}"
    torch.library.define(qualified, schema)
    torch.library.register_fake(qualified, fake)
    # The op runs the reference if it has no kernel. Without no_grad, autograd would record the reference's operators.
    plain = torch.no_grad()(reference)
    available: dict[str, tuple[Backend, ...]] = {"cpu": ("reference",), "cuda": ("reference",)}
    if _library.has_kernel(qualified, "CPU"):
        available["cpu"] += ("cpp",)
    else:
        torch.library.impl(qualified, "CPU", plain)
    launch = _launcher(name)
    if launch is not None:
        available["cuda"] += ("triton",)
    torch.library.impl(qualified, "CUDA", _narrow(launch, plain) if launch is not None else plain)
    REGISTRY[name] = Op(
        name=name,
        handle=getattr(torch.ops.purify_fast, name).default,
        reference=reference,
        available=available,
        examples=examples,
        raced=raced or examples,
        launch=launch,
        few_launches=few_launches,
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
    """Register the backward of an op. ``saved`` makes the arguments that follow the gradients."""

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
        few_launches=op.few_launches,
        compiler_fuses=op.compiler_fuses,
        size_key=size_key,
    )


def _narrow(kernel: Callable, plain: Callable) -> Callable:
    """Return ``kernel``, but with the reference for float64, because the Triton kernels compute in float32."""

    def launch(*args):
        # Every eager call of a kernel runs this loop, so it must be fast. Numbers have no dtype.
        for arg in args:
            several = type(arg) is list and arg and isinstance(arg[0], torch.Tensor)
            for one in arg if several else (arg,):
                if getattr(one, "dtype", None) is torch.float64:
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
